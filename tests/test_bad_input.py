"""Promise (e): bad input of every kind goes to dead-letters with its reason and place, once, and nothing stops the stream.

And a full disk, which does stop it: cleanly, and losing nothing.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from consumers.cli import execute
from consumers.exits import Exit
from consumers.inspection import toml
from consumers.opening import connect
from consumers.settings import Settings
from streaming.codec import decode
from streaming.errors import RecordTooLarge
from streaming.events import REASONS, DeadLetter, Score
from streaming.log import Message
from streaming.scored import read_run
from tests.small_runs import SMALL, T0, Stream, fill, packed, profile, run, small
from tests.test_promises import findings
from tests.verify.reading import read

YEAR_1, YEAR_9999 = -62_135_596_800_000, 253_402_300_799_000
EVENT = {"user": "ann", "item": "i1", "rating": 3.0, "timestamp": T0}


def text(**fields: Any) -> bytes:  # noqa: ANN401 - whatever a sender may put there
    return json.dumps(EVENT | fields).encode()


KINDS: dict[str, tuple[str, bytes | None, bytes | None]] = {
    "a null": ("empty", b"ann", None),
    "no bytes": ("empty", b"ann", b""),
    "a byte that MessagePack does not know": ("not-decodable", b"ann", b"\xc1"),
    "MessagePack cut short": ("not-decodable", b"ann", packed()[:-3]),
    "bytes behind the end": ("not-decodable", b"ann", packed() + b"\x01"),
    "JSON cut short": ("not-decodable", b"ann", text()[:-3]),
    "a pickle": ("not-decodable", b"ann", b"\x80\x04\x95\x0b\x00"),
    "a list": ("not-a-map", b"ann", msgpack.packb(list(EVENT.values()))),
    "a field missing": ("missing-field", b"ann", msgpack.packb({key: EVENT[key] for key in ("user", "item", "rating")})),
    "a field twice": ("duplicate-field", b"ann", b'{"user":"ann","user":"bob","item":"i1","rating":3,"timestamp":880000000000}'),
    "a rating that is text": ("wrong-type", b"ann", packed(rating="3")),
    "a rating that is true": ("wrong-type", b"ann", packed(rating=True)),
    "a rating that is null": ("wrong-type", b"ann", text(rating=None)),
    "a user that is a list": ("wrong-type", b"ann", packed(user=["ann"])),
    "a timestamp with a fraction": ("wrong-type", b"ann", packed(timestamp=T0 + 0.5)),
    "NaN": ("rating-off-scale", b"ann", packed(rating=float("nan"))),
    "infinity": ("rating-off-scale", b"ann", packed(rating=float("inf"))),
    "1e308": ("rating-off-scale", b"ann", text(rating=1e308)),
    "a rating below the scale": ("rating-off-scale", b"ann", packed(rating=0.999)),
    "a rating above the scale": ("rating-off-scale", b"ann", packed(rating=6)),
    "the year 1": ("timestamp-out-of-range", b"ann", packed(timestamp=YEAR_1)),
    "the year 9999": ("timestamp-out-of-range", b"ann", text(timestamp=YEAR_9999)),
    "an empty id": ("bad-id", b"", packed(user="")),
    "an id of 60 kB": ("bad-id", b"ann", packed(item="x" * 60_000)),
    "an id of nearly 1 MB": ("too-large", b"ann", packed(item="x" * 999_000)),
    "white space around an id": ("bad-id", b"ann", packed(item=" i1")),
    "a control character": ("bad-id", b"ann", packed(item="a\x00b")),
    "invalid UTF-8": ("invalid-utf8", b"ann", packed().replace(b"i1", b"\xff\xfe")),
    "half a surrogate pair": ("invalid-utf8", b"ann", text(item="X").replace(b'"X"', b'"\\ud800"')),
    "10,000 fields": ("too-many-features", b"ann", msgpack.packb(EVENT | {f"{n}": 1 for n in range(10_000)})),
    "a nesting bomb in MessagePack": ("too-deep", b"ann", b"\x91" * 60_000 + b"\x01"),
    "a nesting bomb in JSON": ("too-deep", b"ann", b'{"user":' + b"[" * 60_000),
    "a key that is not the user": ("wrong-key", b"bob", packed()),
    "no key": ("wrong-key", None, packed()),
}


def letters(settings: Settings) -> list[DeadLetter]:
    with connect(settings) as log:
        return [decode(record.value, DeadLetter, what="dead letter") for record in read(log, "dead-letters", 0)]


def scores(settings: Settings) -> list[Score]:
    with connect(settings) as log:
        return [decode(record.value, Score, what="score") for record in read(log, "scores", 0)]


def test_every_kind_of_garbage_is_a_dead_letter_between_events_that_are_scored(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    messages = []
    for _, key, value in KINDS.values():
        messages += [Message("interactions", key, value, 0), Message("interactions", b"ann", packed(), 0)]
    offsets = fill(settings, messages)
    reasons = {("interactions", 0, offset): reason for (reason, _, _), offset in zip(KINDS.values(), offsets[::2], strict=True)}
    run(settings)
    found = {name: letter.reason for name, letter in zip(KINDS, letters(settings), strict=True)}
    assert found == {name: reason for name, (reason, _, _) in KINDS.items()}
    assert len(scores(settings)) == len(KINDS)
    assert findings(settings, reasons=reasons) == []
    run(settings)
    assert len(letters(settings)) == len(KINDS), "once, however often it is started"


def test_a_step_of_garbage_alone_is_a_step(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, [Message("interactions", key, value, 0) for _, key, value in KINDS.values()])
    run(settings)
    assert (len(letters(settings)), scores(settings)) == (len(KINDS), [])
    fill(settings, [Message("interactions", b"ann", packed(), 0)])
    run(settings)
    assert len(scores(settings)) == 1
    assert findings(settings) == []


def test_a_record_above_the_topics_limit_is_refused_by_the_log(tmp_path: Path) -> None:
    with pytest.raises(RecordTooLarge):
        fill(small(tmp_path / "log.db"), [Message("interactions", b"ann", packed(item="x" * 1_000_000), 0)])


def test_bad_profiles_are_dead_letters_once_although_tables_are_read_at_each_start(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    bad = [
        ("too-many-features", profile("items", "i1", {f"f{n}": 1.0 for n in range(3000)})),
        ("bad-feature", profile("items", "i2", {"genre": float("inf")})),
        ("wrong-type", Message("users", b"ann", msgspec.msgpack.encode({"features": {"job": {"a": 1}}}))),
        ("not-decodable", Message("users", b"bob", b"\xc1")),
        ("too-deep", Message("users", b"cem", b"\x91" * 3000 + b"\x01")),
    ]
    fill(settings, [message for _, message in bad])
    event = Message("interactions", b"ann", packed(), 0)
    for _ in range(3):
        fill(settings, [event])
        run(settings)
        assert sorted(letter.reason for letter in letters(settings)) == sorted(reason for reason, _ in bad)
    fill(settings, [Message("users", b"dan", b"[]"), event])
    run(settings)
    assert [letter.source for letter in letters(settings)][-1][0] == "users"
    assert len(letters(settings)) == len(bad) + 1
    assert len(scores(settings)) == 4


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
mangled = st.fixed_dictionaries(
    {},
    optional={
        "user": st.just("ann") | values,
        "item": st.just("i1") | values,
        "rating": st.just(3.0) | values,
        "timestamp": st.just(T0) | values,
        "more": values,
    },
).map(lambda fields: msgpack.packb(EVENT | fields))
cut = st.tuples(mangled, st.integers(0, 60), st.binary(max_size=3)).map(lambda parts: parts[0][: parts[1]] + parts[2])
anything = st.one_of(st.none(), st.binary(max_size=40), mangled, cut, st.just(packed()))


@examples(max_examples=12)
@given(records=st.lists(st.tuples(st.sampled_from([b"ann", b"ann", b"bob", b"\xff", None]), anything), min_size=20, max_size=60))
def test_whatever_comes_is_scored_or_a_dead_letter(
    records: list[tuple[bytes | None, bytes | None]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = small(tmp_path_factory.mktemp("fuzz") / "log.db", rehearsal={"users": 1})
    fill(settings, [Message("interactions", key, value, 0) for key, value in records])
    run(settings)
    scored = [score.source[2] for score in scores(settings)]
    dead = [letter.source[2] for letter in letters(settings)]
    assert sorted(scored + dead) == list(range(len(records)))
    assert {letter.reason for letter in letters(settings)} <= REASONS


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of resources there")
def test_a_full_disk_stops_the_run_with_its_exit_code_and_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calm, full = small(tmp_path / "calm.db"), small(tmp_path / "full.db")
    stream = Stream(300, seed=4)
    for settings in (calm, full):
        fill(settings, stream.messages)
    run(calm)
    config = tmp_path / "small.toml"
    config.write_text("\n".join(f"{name} = {toml(value)}" for name, value in (SMALL | {"broker": full.broker}).items()))
    command = ["run", "--until-end", "--config", str(config), "--journal", str(tmp_path / "journal.jsonl")]
    stops = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in range(400_000, 4_000_000, 200_000):
        # No file may grow beyond this: what the operating system then says is what it says when a quota is reached.
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            code = execute(command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if code == Exit.DONE:
            break
        assert code == Exit.LOG_FULL
        assert "nothing of the commit was kept" in capsys.readouterr().err
        stops += 1
    assert stops >= 2
    assert findings(full) == []
    with connect(calm) as one, connect(full) as other:
        assert read_run(one, calm.event_limits()).scores_sha256 == read_run(other, full.event_limits()).scores_sha256
