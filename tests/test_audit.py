"""The audit finds nothing in a run that kept its promises, finds each that was spoiled, and names what is out of its reach."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from consumers import cli
from consumers.audit import Report, audit
from consumers.inspection import toml
from consumers.opening import connect, topics_of
from consumers.settings import Settings
from consumers.trainer import Trainer
from streaming.codec import decode, encode
from streaming.events import DeadLetter, Position, Score, Support
from streaming.log import Bounds, Log, Message, Record, Topic, TopicPartition
from streaming.readonly import ReadOnlyLog
from streaming.topics import POSITION_KEY
from tests.small_runs import Stream, fill, packed, profile, run, small
from tests.verify.reading import read

Rewrite = Callable[[list[Message]], list[Message]]


def audited(settings: Settings, **rest: Any) -> Report:  # noqa: ANN401 - as audit
    with connect(settings) as log:
        return audit(log, settings, topics_of(settings), **rest)


def valid(stream: Stream) -> int:
    return stream.reasons.count(None)


@pytest.mark.parametrize(
    ("partitions", "sections"),
    [
        (1, {}),
        (3, {"trainer": {"meta_update": 5, "snapshot_every": 7}}),
        (1, {"model": {"local": "all", "inner_steps": 2, "loss": "squared"}}),
        (1, {"model": {"max_rows": 20, "overflow_rows": 3}, "worker": {"max_users": 8}, "trainer": {"round_updates": 3}}),
        (1, {"topics": {"max_record_bytes": 4096}, "model": {"embedding_size": 12}, "worker": {"support_size": 1}}),
    ],
    ids=["plain", "partitions", "gradient steps", "small tables and few users", "chunks"],
)
def test_it_finds_nothing_in_a_run_that_kept_its_promises(tmp_path: Path, partitions: int, sections: dict[str, Any]) -> None:
    settings = small(tmp_path / "log.db", **sections | {"topics": {"partitions": partitions} | sections.get("topics", {})})
    stream = Stream(300, seed=partitions, garbage=0.1, partitions=partitions)
    fill(settings, stream.profiles)
    for start in range(0, 300, 130):  # with restarts, and ends inside a micro-batch
        fill(settings, stream.messages[start : start + 130])
        run(settings)
    report = audited(settings)
    assert report.shown == []
    assert report.out_of_reach == []
    assert report.scores == report.events == valid(stream) > 200
    assert report.dead_letters == 300 - valid(stream) > 10
    assert report.versions > 15
    assert report.support_sets > (5 if settings.worker.max_users else 20)
    assert report.deviation < 1e-5


def test_versions_that_come_late_and_profiles_that_come_between_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As live: partitions score at versions of their own, several steps at one, and new profiles take effect at the next step."""
    settings = small(tmp_path / "log.db", topics={"partitions": 3})
    stream = Stream(400, seed=4, partitions=3)
    fill(settings, stream.profiles)
    fill(settings, stream.messages)
    folds, steps, fold = [0], [0], Trainer.catch_up

    def late(trainer: Trainer, beat: Callable[[], object]) -> None:
        folds[0] += 1
        if folds[0] % 4 == 1:
            fold(trainer, beat)

    monkeypatch.setattr(Trainer, "catch_up", late)

    def new_item(_: object) -> None:
        steps[0] += 1
        fill(settings, [profile("items", f"i{2 * steps[0] + 1}", {"genre": ["x"]})])

    run(settings, on_step=new_item)
    report = audited(settings)
    assert report.shown == []
    assert report.out_of_reach == []
    assert report.scores == report.events == valid(stream) > 300
    assert 3 < report.versions < steps[0] / 2
    assert audited(settings, partitions=[1], limit=10).scores == 10
    with connect(settings) as log:
        plans = {
            decode(record.value, Position, what="it").tables["items"] for record in read(log, "support", 0) if record.key == POSITION_KEY
        }
    assert plans != {30}, "profiles came while it ran"


def test_a_superseded_profile_is_out_of_reach_and_no_difference(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    stream = Stream(200, seed=2, garbage=0)
    fill(settings, stream.profiles)
    fill(settings, stream.messages[:100])
    run(settings)
    # Item i0 is asked for often; compaction removes its first profile.
    fill(settings, [profile("items", "i0", {"genre": ["never seen before"]})])
    fill(settings, stream.messages[100:])
    run(settings)
    report = audited(settings)
    assert report.shown == []
    (reach,) = report.out_of_reach
    assert "superseded" in reach.what
    assert 0 < reach.count < 60
    assert reach.last < 100
    assert report.scores == 200 - reach.count


def test_steps_of_a_frozen_worker_have_no_plan_and_that_is_said(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", worker={"frozen": True})
    stream = Stream(150, seed=2)
    fill(settings, stream.profiles)
    fill(settings, stream.messages)
    run(settings)
    report = audited(settings)
    assert report.shown == []
    assert report.scores == valid(stream)
    (reach,) = report.out_of_reach
    assert "frozen" in reach.what
    assert reach.count == valid(stream)


# Spoiled runs. A log's records are copied into another log, but for those that are changed.


class Run:
    """A finished run: its settings, and its records by topic."""

    def __init__(self, folder: Path) -> None:
        self.settings = small(folder / "log.db", trainer={"snapshot_every": 8})
        stream = Stream(200, seed=3, garbage=0.1)
        fill(self.settings, stream.profiles)
        fill(self.settings, stream.messages)
        run(self.settings)
        self.valid = valid(stream)
        self.topics = topics_of(self.settings)
        with connect(self.settings) as log:
            self.records = {topic.name: read(log, topic.name, 0) for topic in self.topics.values()}
            self.committed = log.committed(self.settings.group_id, [TopicPartition(name, 0) for name in ("interactions", "users", "items")])

    def copy(self, path: Path, topic: str, change: Rewrite) -> Settings:
        """The run in another log, with the messages of ``topic`` changed. Compacted topics keep their order, and lose their gaps."""
        settings = self.settings.model_copy(update={"broker": f"embedded:{path}"})
        with connect(settings, create=True) as log:
            log.create(self.topics.values())
            for name, records in self.records.items():
                messages = [Message(name, record.key, record.value, record.partition) for record in records]
                log.append(change(messages) if name == topic else messages)
            with log.writer("copy") as writer:
                writer.commit([], self.committed, settings.group_id)
        return settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


def changed(place: int, kind: type[Any], **fields: Callable[[Any], Any]) -> Rewrite:
    def change(messages: list[Message]) -> list[Message]:
        at = range(len(messages))[place]
        record = decode(messages[at].value, kind, what="it")
        new = msgspec.structs.replace(record, **{name: make(getattr(record, name)) for name, make in fields.items()})
        return [*messages[:at], messages[at]._replace(value=encode(new)), *messages[at + 1 :]]

    return change


def without(place: int) -> Rewrite:
    return lambda messages: messages[:place] + messages[place + 1 :]


def of_the_first_full_set(change: Callable[[Support], Support]) -> Rewrite:
    def rewrite(messages: list[Message]) -> list[Message]:
        for place, each in enumerate(messages):
            if each.key != POSITION_KEY and len((held := decode(each.value, Support, what="it")).interactions) == 4:
                return [*messages[:place], each._replace(value=encode(change(held))), *messages[place + 1 :]]
        raise AssertionError("no user has a full support set")

    return rewrite


SPOILED: dict[str, tuple[str, Rewrite, set[str]]] = {
    "a score off by 1e-3": ("scores", changed(70, Score, score=lambda score: score + 1e-3), {"score"}),
    "a deviation off by 1e-3": ("scores", changed(70, Score, sd=lambda sd: sd + 1e-3), {"score"}),
    "a score of another version": ("scores", changed(70, Score, model_version=lambda v: v + 1), {"score of another version or step"}),
    "a score of no version": ("scores", changed(70, Score, model_version=lambda _: 9999), {"score of another version or step"}),
    "a score of another step": ("scores", changed(70, Score, step=lambda step: step - 16), {"score of another version or step"}),
    "an event without a score": ("scores", without(70), {"score missing"}),
    "a score doubled": ("scores", lambda messages: [*messages[:71], *messages[70:]], {"score too many"}),
    "a score of a later place": (
        "scores",
        changed(-1, Score, source=lambda _: ("interactions", 0, 10_000)),
        {"score missing", "score too many"},
    ),
    "a score of another item": ("scores", changed(70, Score, item=lambda _: "i999"), {"score of another event"}),
    "a wrong count of earlier events": ("scores", changed(70, Score, earlier=lambda n: n + 1), {"score of another support"}),
    "a support set short by one": (
        "support",
        of_the_first_full_set(lambda held: msgspec.structs.replace(held, interactions=held.interactions[1:])),
        {"support set"},
    ),
    "a rating changed in a support set": (
        "support",
        of_the_first_full_set(
            lambda held: msgspec.structs.replace(
                held, interactions=[*held.interactions[:3], (held.interactions[3][0], 6.0 - 0.5, held.interactions[3][2])]
            )
        ),
        {"support set"},
    ),
    "a support set missing": ("support", without(3), {"support set missing"}),
    "a support set of nobody": (
        "support",
        lambda messages: [Message("support", b"nobody", encode(Support([("i", 1.0, 1)], ("interactions", 0, 1), 1, 99)), 0), *messages],
        {"support set too many"},
    ),
    "a position behind": ("support", lambda messages: [*messages[:-1], _moved_back(messages[-1])], {"position"}),
    "a dead letter missing": ("dead-letters", without(2), {"dead letter missing"}),
    "a dead letter doubled": ("dead-letters", lambda messages: [*messages[:3], *messages[2:]], {"dead letter too many"}),
    "a dead letter of other bytes": ("dead-letters", changed(2, DeadLetter, digest=lambda _: "00"), {"dead letter of other bytes"}),
}


def _moved_back(last: Message) -> Message:
    assert last.key == POSITION_KEY
    fields = msgspec.msgpack.decode(last.value or b"")
    return last._replace(value=msgspec.msgpack.encode(fields | {"users": fields["users"] + 1}))


def test_the_copy_of_a_run_is_as_good_as_the_run(finished: Run, tmp_path: Path) -> None:
    settings = finished.copy(tmp_path / "copy.db", "scores", lambda messages: messages)
    report = audited(settings)
    assert report.shown == []
    assert report.scores == finished.valid > 150
    # Positions of a table mean nothing where its gaps are gone; here no profile was superseded, so there were none.
    assert report.out_of_reach == []


@pytest.mark.parametrize("what", SPOILED)
def test_it_finds(what: str, finished: Run, tmp_path: Path) -> None:
    topic, change, kinds = SPOILED[what]
    report = audited(finished.copy(tmp_path / "copy.db", topic, change))
    assert report.differences.keys() == kinds
    assert sum(report.differences.values()) == len(report.shown) <= 3
    assert report.scores >= finished.valid - 2
    if kinds & {"score", "score missing"}:
        assert "interactions[0] at " in report.shown[0].place


def test_a_dead_letter_of_a_profile_that_is_missing_is_found(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(
        settings,
        [Message("users", b"ann", b"\xc1", 0), Message("items", b"i1", packed(features=7), 0), Message("interactions", b"ann", packed())],
    )
    run(settings)
    assert audited(settings).shown == []
    with connect(settings) as log:
        letters = [letter for letter in read(log, "dead-letters", 0) if b"items" not in (letter.value or b"")]
        assert len(letters) == 1
    other = settings.model_copy(update={"broker": f"embedded:{tmp_path / 'copy.db'}"})
    copy_all(settings, other, lambda record: record.topic != "dead-letters" or record in letters)
    (difference,) = audited(other).shown
    assert (difference.kind, difference.place) == ("dead letter missing", "items[0] at 0")


def copy_all(settings: Settings, other: Settings, keep: Callable[[Record], bool]) -> None:
    topics: Sequence[Topic] = list(topics_of(settings).values())
    with connect(settings) as log, connect(other, create=True) as copy:
        copy.create(topics)
        for topic in topics:
            copy.append([Message(r.topic, r.key, r.value, r.partition) for r in read(log, topic.name, 0) if keep(r)])
        committed = log.committed(settings.group_id, [TopicPartition(name, 0) for name in ("interactions", "users", "items")])
        with copy.writer("copy") as writer:
            writer.commit([], committed, settings.group_id)


# Retention


def test_what_retention_has_cut_is_named(tmp_path: Path) -> None:
    """Updates and versions go by size; snapshots stand in for the versions, and the profiles as they are now for the plans."""
    settings = small(tmp_path / "log.db", trainer={"snapshot_every": 20})
    stream = Stream(600, seed=5, garbage=0.05)
    fill(settings, stream.profiles)
    topics = settings.topics.model_copy(update={"model_bytes": 60_000, "updates_bytes": 60_000})
    cut = settings.model_copy(update={"topics": topics})
    fill(cut, stream.messages)
    # The topics exist with the larger sizes, so that they are made anew in a log of their own.
    other = cut.model_copy(update={"broker": f"embedded:{tmp_path / 'cut.db'}"})
    fill(other, stream.profiles)
    fill(other, stream.messages)
    run(other)
    report = audited(other)
    assert report.shown == []
    reaches = {reach.what: reach for reach in report.out_of_reach}
    (removed,) = [reach for what, reach in reaches.items() if "model version was removed" in what]
    (plans,) = [reach for what, reach in reaches.items() if "updates were removed by retention" in what]
    assert removed.count + report.scores == report.events == valid(stream)
    assert removed.first == 0
    assert report.scores > 50
    assert plans.first < 20
    assert plans.last > 100


def test_events_that_retention_has_cut_leave_support_unknown_until_it_is_whole_again(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    stream = Stream(400, seed=6, garbage=0)
    fill(settings, stream.profiles)
    fill(settings, stream.messages)
    run(settings)
    with connect(settings) as log:
        report = audit(Cut(log, {"interactions": 150, "scores": 160}), settings, topics_of(settings))
    assert report.shown == []
    reaches = {reach.what: reach for reach in report.out_of_reach}
    assert (reaches["interactions removed by retention"].first, reaches["interactions removed by retention"].last) == (0, 149)
    assert (reaches["score removed by retention"].first, reaches["score removed by retention"].last) == (150, 159)
    unknown = next(reach for what, reach in reaches.items() if "support began before" in what)
    assert 20 < unknown.count < 200
    assert report.events == 250
    assert report.scores + unknown.count + 10 == 250
    assert report.scores > 50


class Cut(ReadOnlyLog):
    """A log of which retention has removed the beginnings of some topics."""

    def __init__(self, log: Log, starts: dict[str, int]) -> None:
        super().__init__(log)
        self.starts = starts

    def bounds(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, Bounds]:
        return {tp: Bounds(max(start, self.starts.get(tp.topic, 0)), end) for tp, (start, end) in super().bounds(tps).items()}


# The command


def test_the_command_prints_a_page_or_json_and_ends_with_7_where_something_differs(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = finished.copy(tmp_path / "copy.db", "scores", changed(70, Score, score=lambda score: score + 1e-3))
    flags = ["--config", str(_config(settings, tmp_path)), "--broker", settings.broker]
    assert cli.execute(["audit", *flags]) == 7
    out = capsys.readouterr().out
    assert "interactions[0] at" in out
    assert "tolerance 1e-05" in out
    assert "differences: 1 score" in out
    assert cli.execute(["audit", "--json", *flags]) == 7
    shown = json.loads(capsys.readouterr().out)
    assert shown["differences"] == {"score": 1}
    assert shown["scores"] == finished.valid
    assert cli.execute(["audit", "--limit", "20", *flags]) == 0
    assert "no differences" in capsys.readouterr().out
    assert cli.execute(["audit", "--partition", "1", *flags]) == 3


def _config(settings: Settings, folder: Path) -> Path:
    path = folder / "coldstream.toml"
    dumped = settings.model_dump(mode="json", by_alias=True)
    path.write_text("\n".join(f"{name} = {toml(value)}" for name, value in dumped.items()))
    return path


def test_it_shares_no_code_with_the_workers_step() -> None:
    modules = set()
    for path in (Path(__file__).parent.parent / "consumers" / "audit").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                modules.add(node.module)
    assert "streaming.codec" in modules
    assert not modules & {
        "consumers.worker",
        "consumers.tables",
        "consumers.versions",
        "consumers.system",
        "streaming.support",
        "model.history",
    }
