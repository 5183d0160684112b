"""Versions to go back to: which can be made again, that going back takes every reader along, and that no update is lost or folded twice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from consumers import cli, lineage, versions
from consumers.lineage import Lineage
from consumers.opening import connect, topics_of
from consumers.replacing import rollback
from consumers.settings import Settings
from consumers.system import new_model
from consumers.versions import Versions
from model import checkpoint
from model.meta import Optimiser
from streaming.codec import decode, encode
from streaming.errors import Fenced, OtherSettings, Refused, VersionLost
from streaming.events import Score, Version
from streaming.log import Log, Record
from tests.small_runs import Stream, fill, run, small
from tests.test_promises import findings
from tests.verify.reading import read

STREAM = Stream(400, seed=21)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return small(tmp_path / "log.db", trainer={"snapshot_every": 7})


def learn(settings: Settings, start: int, end: int) -> int:
    """Score a part of the stream and learn from it; returns the version in force then."""
    fill(settings, STREAM.messages[start:end])
    run(settings)
    with connect(settings) as log:
        return Lineage(log, topics_of(settings)).last


def names(settings: Settings) -> dict[str, str]:
    return {name: topic.name for name, topic in topics_of(settings).items()}


def follower(log: Log, settings: Settings) -> Versions:
    model = new_model(settings)
    return Versions(log, names(settings), settings.digest(), model, Optimiser(model))


def values(followed: Versions) -> checkpoint.State:
    assert followed.optimiser is not None
    return checkpoint.export(followed.model, followed.optimiser)


def state_at_end(settings: Settings) -> checkpoint.State:
    with connect(settings) as log:
        return values(follower(log, settings))


def same(one: checkpoint.State, other: checkpoint.State) -> bool:
    """Bit for bit, whatever the order of rows."""

    def by_key(state: checkpoint.State, name: str) -> dict[str, list[float]]:
        keys, rows = state.rows[name]
        return dict(zip(keys, rows.tolist(), strict=True))

    return all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors | other.tensors) and all(
        by_key(one, name) == by_key(other, name) for name in one.rows | other.rows
    )


def back(settings: Settings, number: int) -> Version:
    with connect(settings) as log:
        return rollback(log, settings, topics_of(settings), number)


def test_going_back_gives_the_values_of_then_to_who_starts_and_to_who_follows(settings: Settings) -> None:
    then = learn(settings, 0, 150)
    wanted = state_at_end(settings)
    with connect(settings) as log:
        early = follower(log, settings)
        last = learn(settings, 150, 260)
        late = follower(log, settings)
        assert not same(values(late), wanted)
        made = back(settings, then)
        for followed in (early, late):
            assert followed.advance()
        for followed in (early, late, follower(log, settings)):
            assert followed.version == last + 1
            assert same(values(followed), wanted)
    assert (made.version, made.parent, made.replaces) == (last + 1, then, last)


def test_what_follows_is_learned_from_there_and_all_promises_are_kept(settings: Settings) -> None:
    then = learn(settings, 0, 130)
    last = learn(settings, 130, 220)
    made = back(settings, then)
    assert findings(settings) == []
    with connect(settings) as log:
        kept = Lineage(log, topics_of(settings)).kept
    assert made.skipped == [(0, kept[then].header.folded[0], kept[last].header.folded[0])]
    learn(settings, 220, 300)
    assert findings(settings) == []
    with connect(settings) as log:
        used = [decode(record.value, Score, what="score").model_version for record in read(log, "scores", 0)]
    assert min(version for version in used if version > last) == made.version
    # From a branch to the branch before it, and to the beginning.
    back(settings, last)
    back(settings, 0)
    learn(settings, 300, 330)
    assert findings(settings) == []


def test_version_0_is_the_untrained_model(settings: Settings) -> None:
    learn(settings, 0, 60)
    made = back(settings, 0)
    model = new_model(settings)
    assert same(state_at_end(settings), checkpoint.export(model, Optimiser(model)))
    assert made.skipped == [(0, 0, made.folded[0])]


def test_the_verifier_finds_a_wrong_statement_of_what_is_skipped(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    then = learn(settings, 0, 130)
    learn(settings, 130, 220)

    def shortened(topic: Any, version: Version, original: Any = versions.version_messages) -> Any:  # noqa: ANN401
        (number, start, end), *rest = version.skipped
        return original(topic, msgspec.structs.replace(version, skipped=[(number, start + 1, end), *rest]))

    monkeypatch.setattr("consumers.replacing.version_messages", shortened)
    back(settings, then)
    (found,) = findings(settings)
    assert found.promise == "c"
    assert "skips" in found.text


CHANGES: list[dict[str, Any]] = [{"parent": 1}, {"replaces": 3}, {"folded": {0: 1}}, {"events": 8}, {"parent": 9999}]


def test_the_verifier_finds_a_version_that_goes_back_to_another_place(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = learn(settings, 0, 60)
    learn(settings, 60, 100)
    original = versions.version_messages
    for number, change in enumerate(CHANGES):

        def changed(topic: Any, made: Version, change: dict[str, Any] = change) -> Any:  # noqa: ANN401
            return original(topic, msgspec.structs.replace(made, **change))

        copy = settings.model_copy(update={"broker": f"embedded:{tmp_path}/{number}.db"})
        shutil.copy(tmp_path / "log.db", tmp_path / f"{number}.db")
        monkeypatch.setattr("consumers.replacing.version_messages", changed)
        back(copy, then)
        assert {finding.promise for finding in findings(copy)} == {"c"}, change


def test_a_trainer_at_work_is_fenced_and_its_next_run_goes_on_from_there(settings: Settings) -> None:
    then = learn(settings, 0, 100)
    fill(settings, STREAM.messages[100:300])
    steps: list[int] = []

    def go_back(_: object) -> None:
        steps.append(1)
        if len(steps) == 4:
            back(settings, then)

    with pytest.raises(Fenced):
        run(settings, on_step=go_back)
    run(settings)
    assert findings(settings) == []


@pytest.fixture
def cut(settings: Settings) -> Settings:
    """Settings of a log of which retention keeps little of the model."""
    topics = settings.topics.model_copy(update={"model_bytes": 60_000})
    return settings.model_copy(update={"topics": topics, "trainer": settings.trainer.model_copy(update={"snapshot_every": 20})})


def test_what_can_be_made_again_is_what_the_log_says_can(cut: Settings) -> None:
    learn(cut, 0, 400)
    with connect(cut) as log:
        found = Lineage(log, topics_of(cut))
        held = sorted(found.kept)
        assert held[0] > 1, "retention has cut nothing"
        restorable = found.restorable()
        assert {0, *found.snapshots} < set(restorable) < {0, *found.snapshots, *held}
        for number in (0, *held):
            if number in restorable:
                assert found.state(cut, number).tensors
            else:
                with pytest.raises(VersionLost, match=rf"version {number} cannot .*topics\.model_bytes.*those that can be are 0, "):
                    found.state(cut, number)


def test_a_version_that_is_not_there_is_an_error_that_says_what_is(cut: Settings) -> None:
    last = learn(cut, 0, 300)
    for number, said in ((1, "those that can be made again are 0, "), (9999, f"the last is {last}")):
        with pytest.raises(VersionLost, match=said):
            back(cut, number)
    with pytest.raises(Refused, match="is the last"):
        back(cut, last)
    with connect(cut) as log:
        assert Lineage(log, topics_of(cut)).last == last, "nothing was changed"


def test_a_log_of_other_settings_is_refused(settings: Settings) -> None:
    then = learn(settings, 0, 60)
    learn(settings, 60, 90)
    with pytest.raises(OtherSettings):
        back(settings.model_copy(update={"seed": 2}), then)


def test_numbers_that_follow_each_other_run_together() -> None:
    assert lineage.spans([0, 4, 6, 9], [0, 3, 4, 6, 9]) == "0, 4 to 9"
    assert lineage.spans([], [0]) == ""


class Counting:
    """Counts the records that pass a log's readers, by topic."""

    def __init__(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[str, int] = {}
        original = type(log.reader()).poll

        def poll(reader: Any, *args: Any, **rest: Any) -> list[Record]:  # noqa: ANN401
            records: list[Record] = original(reader, *args, **rest)
            for record in records:
                self.counts[record.topic] = self.counts.get(record.topic, 0) + 1
            return records

        monkeypatch.setattr(type(log.reader()), "poll", poll)


def test_whoever_starts_reads_the_newest_snapshot_and_what_came_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(
        tmp_path / "log.db", worker={"micro_batch": 4}, trainer={"snapshot_every": 20, "meta_update": 4}, rehearsal={"users": 0}
    )
    fill(settings, [])
    with connect(settings) as log:
        counting = Counting(log, monkeypatch)
        for events in (0, 200, 400):
            learn(settings, max(0, events - 200), events)
            counting.counts.clear()
            followed = follower(log, settings)
            after_snapshot = followed.version - followed.snapshot
            assert after_snapshot < 20
            # A version is one record here, and so is a snapshot; of `snapshots` a few are looked at to find the last.
            assert counting.counts.get("model", 0) <= after_snapshot + 1
            assert counting.counts.get("snapshots", 0) <= versions.SLOTS
        assert followed.version > 90, "a log much longer than what was read"


def test_snapshots_take_turns_with_those_of_versions_gone_back_to(settings: Settings) -> None:
    then = learn(settings, 0, 150)
    learn(settings, 150, 200)
    with connect(settings) as log:
        before = Lineage(log, topics_of(settings)).snapshots
    made = back(settings, then)
    with connect(settings) as log:
        assert set(Lineage(log, topics_of(settings)).snapshots) == {max(before), made.version}


def test_the_command_line_lists_shows_and_goes_back(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    learn(settings, 0, 100)
    flags = [f"--set=broker={settings.broker}", *sets(settings)]
    capsys.readouterr()  # What the worker logged, where no test has sent logs elsewhere before.
    assert cli.execute(["model", "list", "--json", *flags]) == 0
    rows = msgspec.json.decode(capsys.readouterr().out)
    assert rows[0]["version"] >= 1
    assert [row["version"] for row in rows if row["snapshot"]]
    assert all(row["restorable"] for row in rows)
    then, last = rows[-4]["version"], rows[-1]["version"]
    assert cli.execute(["model", "list", "--last", "2", *flags]) == 0
    assert str(last) in capsys.readouterr().out
    assert cli.execute(["model", "rollback", str(then), *flags]) == 0
    assert f"version {last + 1} is version {then} again, in place of {last}; skipped: updates[0] " in capsys.readouterr().out
    assert cli.execute(["model", "show", str(last + 1), *flags]) == 0
    assert f"{then}, in place of {last}" in capsys.readouterr().out
    assert cli.execute(["model", "show", str(last + 2), *flags]) != 0
    assert "the last is" in capsys.readouterr().err


def sets(settings: Settings) -> list[str]:
    """Flags that make the command line's settings those of the small runs."""
    dumped = settings.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    flags = []
    for section, table in dumped.items():
        if isinstance(table, dict):
            flags += [f"--set={section}.{name}={encode_json(value)}" for name, value in table.items()]
    return flags


def encode_json(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def test_a_version_survives_the_codec(settings: Settings) -> None:
    learn(settings, 0, 40)
    made = back(settings, 0)
    assert decode(encode(made), Version, what="it") == made


def test_a_trainer_that_comes_in_between_is_fenced_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    then = learn(settings, 0, 60)
    last = learn(settings, 60, 90)
    times = [3]
    original = versions.snapshot_messages

    def interrupted(*args: Any) -> Any:  # noqa: ANN401
        if times[0]:
            times[0] -= 1
            with connect(settings) as log:
                log.writer(f"{settings.group_id}-trainer").close()
        return original(*args)

    monkeypatch.setattr("consumers.replacing.snapshot_messages", interrupted)
    made = back(settings, then)
    assert (made.version, times) == (last + 1, [0])
    times[0] = 1000
    with pytest.raises(Fenced, match="another trainer came in between"):
        back(settings, then)
    with connect(settings) as log:
        assert Lineage(log, topics_of(settings)).last == made.version
