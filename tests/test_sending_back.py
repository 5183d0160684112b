"""Dead letters: read whole, and sent back after a fix, each exactly once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from consumers import cli, deadletters
from consumers.audit import audit
from consumers.deadletters import Letter, Originals, Outcome, Wanted, letters, send_back, sent_back
from consumers.inspection import toml
from consumers.opening import connect, topics_of
from consumers.settings import Settings
from streaming.codec import encode
from streaming.deadletters import dead_letter_message
from streaming.embedded.broker import EmbeddedLog
from streaming.embedded.writer import EmbeddedWriter
from streaming.errors import Fenced, Malformed
from streaming.events import DeadLetter, Forgotten
from streaming.log import Assignment, Bounds, Log, Message, Record, TopicPartition
from streaming.partitioner import partition_of
from tests.small_runs import T0, Stream, fill, packed, profile, run, small
from tests.test_promises import findings
from tests.verify.reading import read

LATE = 7_300_000_000_000
"""After what limits.latest_ms allows by default."""


class Killed(Exception):
    """Stands for the end of the process."""


def sent(settings: Settings, wanted: Wanted = Wanted(), **rest: Any) -> dict[int, Outcome]:  # noqa: ANN401, B008 - immutable
    with connect(settings) as log:
        return {outcome.position: outcome for outcome in send_back(log, settings, topics_of(settings), wanted, **rest)}


def outcomes(settings: Settings, **rest: Any) -> Counter[str]:  # noqa: ANN401
    return Counter(outcome.outcome for outcome in sent(settings, **rest).values())


def found(settings: Settings) -> list[Letter]:
    with connect(settings) as log:
        return list(letters(log, topics_of(settings), Wanted()))


def later_limits(settings: Settings) -> Settings:
    return settings.model_copy(update={"limits": settings.limits.model_copy(update={"latest_ms": 2 * LATE})})


def values(settings: Settings, topic: str = "interactions", partition: int = 0) -> Counter[bytes | None]:
    with connect(settings) as log:
        return Counter(record.value for record in read(log, topic, partition))


@pytest.fixture
def refused(tmp_path: Path) -> Settings:
    """A run of a stream with garbage, and 30 events of the far future, which yesterday's limits refused."""
    settings = small(tmp_path / "log.db", topics={"partitions": 2})
    stream = Stream(80, seed=9, garbage=0.2)
    fill(settings, stream.messages)
    fill(settings, [Message("interactions", b"u%d" % n, packed(user=f"u{n}", timestamp=LATE + n)) for n in range(30)])
    run(settings)
    return settings


def test_after_a_fix_of_limits_each_is_sent_once_and_scored(refused: Settings) -> None:
    fixed = later_limits(refused)
    before = found(refused)
    late = [letter for letter in before if letter.letter.reason == "timestamp-out-of-range" and letter.letter.detail.find("73000") > 0]
    assert len(late) == 30
    assert sent(refused, Wanted(positions=frozenset(letter.position for letter in late))).keys() == {letter.position for letter in late}
    assert outcomes(refused) == {"refused": len(before)}, "without the fix nothing goes"
    done = sent(fixed)
    assert {position for position, outcome in done.items() if outcome.outcome == "sent"} == {letter.position for letter in late}
    assert all(outcome.detail for outcome in done.values())
    assert outcomes(fixed) == {"sent before": 30, "refused": len(before) - 30}
    for letter in late:
        number = partition_of(letter.letter.key, 2)
        assert values(fixed, partition=number)[letter.letter.value] == 2, "as it first came, and sent back"
    run(fixed)
    with connect(fixed) as log:
        report = audit(log, fixed, topics_of(fixed))
        # What was refused then is valid by the limits of today; the audit can tell the two apart.
        assert report.shown == []
        assert sum(reach.count for reach in report.out_of_reach if "valid under today's limits" in reach.what) == 30
        assert report.scores == report.events
    assert len(found(fixed)) == len(before)


def test_keys_and_partitions_are_mended_and_all_promises_still_hold(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", topics={"partitions": 3})
    stream = Stream(200, seed=4, garbage=0.3, partitions=3)
    fill(settings, stream.messages)
    run(settings)
    by_reason = Counter(letter.letter.reason for letter in found(settings))
    assert by_reason["wrong-partition"] > 3
    assert by_reason["wrong-key"] > 3
    wanted = Wanted(reasons=frozenset({"wrong-key", "wrong-partition"}))
    first = sent(settings, wanted)
    assert Counter(outcome.outcome for outcome in first.values()) == {
        "sent": by_reason["wrong-partition"],
        "refused": by_reason["wrong-key"],
    }
    assert all("--set-key" in outcome.detail for outcome in first.values() if outcome.outcome == "refused")
    second = sent(settings, wanted, set_key=True)
    assert Counter(outcome.outcome for outcome in second.values()) == {
        "sent before": by_reason["wrong-partition"],
        "sent": by_reason["wrong-key"],
    }
    run(settings)
    assert findings(settings) == []
    assert len(found(settings)) == by_reason.total(), "nothing that was sent came back"
    with connect(settings) as log:
        back = sent_back(log, topics_of(settings))
        assert back.keys() == {position for position, outcome in (first | second).items() if outcome.outcome != "refused"}
        ann = partition_of(b"ann", 3)
        assert {entry.partition for entry in back.values()} == {ann}
        assert all(record.key == b"ann" for record in read(log, "interactions", ann)[-by_reason["wrong-key"] :])


# Exactly once


def commits(patch: pytest.MonkeyPatch, at: int, fail: Callable[[Callable[[], list[int]]], list[int]]) -> None:
    """Let ``fail`` make the commit of this number of those that send back."""
    original, count = EmbeddedWriter.commit, [0]

    def commit(
        writer: EmbeddedWriter,
        messages: Sequence[Message],
        offsets: Mapping[TopicPartition, int] | None = None,
        owner: Assignment | str | None = None,
    ) -> list[int]:
        count[0] += 1
        return fail(lambda: original(writer, messages, offsets, owner)) if count[0] == at else original(writer, messages, offsets, owner)

    patch.setattr(EmbeddedWriter, "commit", commit)


@pytest.mark.parametrize("committed", [True, False])
def test_killed_around_a_commit_and_run_again_each_is_sent_once(
    refused: Settings, committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = later_limits(refused)
    monkeypatch.setattr(deadletters, "BATCH", 7)

    def killed(commit: Callable[[], list[int]]) -> list[int]:
        if committed:
            commit()
        raise Killed

    with monkeypatch.context() as patch:
        commits(patch, 3, killed)
        with pytest.raises(Killed):
            sent(fixed)
    assert 0 < outcomes(fixed)["sent"] < 30
    all_sent_once(fixed)


def all_sent_once(settings: Settings) -> None:
    late = [letter.letter for letter in found(settings) if letter.letter.detail.find("73000") > 0]
    assert len(late) == 30
    both = values(settings) + values(settings, partition=1)
    assert [both[letter.value] for letter in late] == [2] * 30
    with connect(settings) as log:
        assert len(sent_back(log, topics_of(settings))) == 30


def test_two_at_once_send_each_once_and_the_first_is_told(refused: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = later_limits(refused)
    monkeypatch.setattr(deadletters, "BATCH", 7)
    with connect(fixed) as log:
        first = send_back(log, fixed, topics_of(fixed), Wanted())
        told = Counter(next(first).outcome for _ in range(3))
        second = outcomes(fixed)
        assert second["sent"] + second["sent before"] == 30
        assert second["sent before"] >= told["sent"]
        with pytest.raises(Fenced):
            list(first)
    all_sent_once(fixed)


def test_what_was_sent_back_is_remembered_as_long_as_its_letter(refused: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = later_limits(refused)
    late = sorted(position for position, outcome in sent(fixed).items() if outcome.outcome == "sent")
    original = EmbeddedLog.bounds

    def cut(log: EmbeddedLog, tps: Iterable[TopicPartition]) -> dict[TopicPartition, Bounds]:
        found = original(log, tps)
        return {tp: bounds._replace(start=late[10]) if tp.topic == "dead-letters" else bounds for tp, bounds in found.items()}

    monkeypatch.setattr(EmbeddedLog, "bounds", cut)
    assert outcomes(fixed)["sent before"] == 20
    with connect(fixed) as log:
        assert sorted(sent_back(log, topics_of(fixed))) == late[10:]


# The whole record


def test_the_whole_record_comes_from_its_topic_or_from_a_letter_that_holds_all_of_it(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    long = packed(timestamp=LATE, comment="x" * 5000)
    topics = topics_of(settings)
    fill(settings, [Message("interactions", b"ann", packed(timestamp=LATE)), Message("interactions", b"ann", long)])
    run(settings)
    with connect(settings) as log, Originals(log) as originals:
        short_letter, long_letter = letters(log, topics, Wanted())
        assert [originals.of(letter).where for letter in (short_letter, long_letter)] == ["source", "source"]
        whole = originals.of(long_letter).record
        assert whole is not None
        assert whole.value == long
    # Where retention has removed the records, or another log's stand in their place.
    other = small(tmp_path / "other.db", limits={"latest_ms": 2 * LATE})
    fill(other, [Message("interactions", b"bob", packed(user="bob"))])
    with connect(other) as log:
        log.append([Message("dead-letters", letter.letter.key, encode(letter.letter)) for letter in (short_letter, long_letter)])
        with Originals(log) as originals:
            assert [originals.of(letter).where for letter in letters(log, topics, Wanted())] == ["letter", "gone"]
    done = sent(other)
    assert done[0].outcome == "sent"
    assert done[1].outcome == "refused"
    assert "retention has removed it" in done[1].detail
    with connect(other) as log:
        (_, back) = read(log, "interactions", 0)
    assert (back.key, back.value) == (b"ann", packed(timestamp=LATE))


def letter_to(log: Log, record: Record, reason: str) -> None:
    log.append([dead_letter_message("dead-letters", record, Malformed(reason, "as it was"))])


def test_profiles_go_back_unless_a_newer_one_came(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", limits={"max_text_bytes": 4})
    many = {"genre": ["a long name"]}
    fill(settings, [profile("items", name, many) for name in ("i1", "i2")])
    fill(settings, [Message("interactions", b"ann", packed())])
    run(settings)
    fill(settings, [profile("items", "i2", {"genre": ["x"]})])
    fixed = small(tmp_path / "log.db")
    done = sent(fixed)
    assert [done[n].outcome for n in (0, 1)] == ["sent", "refused"]
    assert "a newer record of this key" in done[1].detail
    with connect(fixed) as log:
        assert {record.key: msgspec.msgpack.decode(record.value or b"")["features"] for record in read(log, "items", 0)} == {
            b"i1": many,
            b"i2": {"genre": ["x"]},
        }


def test_of_a_user_forgotten_since_nothing_is_sent_back(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", limits={"latest_ms": 2 * LATE})
    late = packed(timestamp=LATE)
    offsets = fill(settings, [Message("interactions", b"ann", late)] * 3)
    with connect(settings) as log:
        for offset in offsets:
            letter_to(log, Record("interactions", 0, offset, 0, b"ann", late), "timestamp-out-of-range")
        log.append([Message("support", b"ann", encode(Forgotten(offsets[2])), 0)])
    done = sent(settings)
    assert [done[n].outcome for n in range(3)] == ["refused", "refused", "sent"]
    assert "forgotten" in done[0].detail


def test_lines_of_files_and_letters_that_are_not_there_are_refused_with_a_reason(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, [])
    with connect(settings) as log:
        letter_to(log, Record("file:a.csv", 0, 3, 0, None, b"1,2"), "not-decodable")
    done = sent(settings, Wanted(positions=frozenset({0, 5})))
    assert [done[n].outcome for n in (0, 5)] == ["refused", "refused"]
    assert "replay it" in done[0].detail
    assert "no letter at 5" in done[5].detail


# The command


def flags(settings: Settings, folder: Path) -> list[str]:
    path = folder / "coldstream.toml"
    dumped = settings.model_dump(mode="json", by_alias=True)
    path.write_text("\n".join(f"{name} = {toml(value)}" for name, value in dumped.items()))
    return ["--config", str(path)]


def test_list_filters_and_tells_what_was_sent_back(refused: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = later_limits(refused)
    given = flags(fixed, tmp_path)
    total = len(found(fixed))

    def listed(*arguments: str) -> list[dict[str, Any]]:
        assert cli.execute(["dead-letters", "list", "--json", *arguments, *given]) == 0
        rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        return rows

    assert len(listed("--limit", "1000")) == total
    assert [row["position"] for row in listed("--limit", "3")] == [total - 3, total - 2, total - 1]
    assert {row["reason"] for row in listed("--reason", "empty", "--reason", "bad-id")} <= {"empty", "bad-id"}
    assert len(listed("--since", "1h", "--limit", "1000")) == total
    assert listed("--since", "2200-01-01") == []
    assert listed("--topic", "items") == []
    ones = listed("--topic", "interactions", "--partition", "1", "--limit", "1000")
    assert 0 < len(ones) < total
    assert {row["source"][1] for row in ones} == {1}
    assert cli.execute(["dead-letters", "list", "--reason", "nonsense", *given]) == 2
    assert "wrong-key" in capsys.readouterr().err
    assert cli.execute(["dead-letters", "list", "--since", "soon", *given]) == 2
    capsys.readouterr()

    late = [str(row["position"]) for row in listed("--reason", "timestamp-out-of-range", "--limit", "30")]
    assert cli.execute(["dead-letters", "send-back", *late[:2], *given]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 sent, 0 sent before, 0 refused"
    assert cli.execute(["dead-letters", "send-back", "--all", *given]) == 6
    assert capsys.readouterr().out.splitlines()[-1] == f"28 sent, 2 sent before, {total - 30} refused"
    assert cli.execute(["dead-letters", "list", *given]) == 0
    out = capsys.readouterr().out
    assert out.count(" to interactions[") == 30
    assert f"{total} dead letters" in out
    for wrong in ([], ["--all", "--reason", "empty"], ["3", "--all"]):
        assert cli.execute(["dead-letters", "send-back", *wrong, *given]) == 2
    capsys.readouterr()


def test_show_prints_nothing_that_acts_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small(tmp_path / "log.db")
    wicked = b'{"user": "\x1b]0;owned\x07\x9b31m[red]", "item": "\xe2\x80\xae"'
    fill(
        settings,
        [
            Message("interactions", b"\x1b[2J[bold]k", wicked),
            Message("interactions", "zo\u00eb".encode(), b"[link=x]plain"),
            Message("interactions", None, None),
        ],
    )
    run(settings)
    given = flags(settings, tmp_path)
    shown = []
    for position in ("0", "1", "2"):
        assert cli.execute(["dead-letters", "show", position, *given]) == 0
        shown.append(capsys.readouterr().out)
        assert all(c == "\n" or c.isprintable() for c in shown[-1])
    assert "1b 5d 30 3b 6f" in shown[0]
    assert "1b 5b 32 4a 5b 62 6f 6c 64 5d 6b" in shown[0]
    assert "read from its topic" in shown[0]
    assert "[link=x]plain" in shown[1]
    assert "zo\u00eb" in shown[1]
    assert "none" in shown[2]
    assert cli.execute(["dead-letters", "list", *given]) == 0
    assert all(c == "\n" or c.isprintable() for c in capsys.readouterr().out)
    assert cli.execute(["dead-letters", "show", "0", "--json", *given]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["record"]["from"] == "source"
    assert msgspec.json.decode(json.dumps(plain["value"]), type=bytes) == wicked
    assert cli.execute(["dead-letters", "show", "9", *given]) == 3
    assert "no letter at 9" in capsys.readouterr().err


def test_what_a_letter_says_is_shown_safely_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Letters come from the log, and whoever can write to it can write anything there."""
    settings = small(tmp_path / "log.db")
    fill(settings, [])
    with connect(settings) as log:
        log.append([Message("dead-letters", None, encode(DeadLetter("a\x1b[0m", "b\x07[red]", ("c\x1b", 0, 1), None, None, T0, "d\r")))])
    given = flags(settings, tmp_path)
    for command in (["list"], ["show", "0"], ["send-back", "0"]):
        assert cli.execute(["dead-letters", *command, *given]) in (0, 6)
        assert all(c == "\n" or c.isprintable() for c in capsys.readouterr().out)
