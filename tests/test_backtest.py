"""Backtests: both runs over the same events, the same result however often it was stopped, and nothing of what is live touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from consumers import lockstep
from consumers.backtest import Files, backtest, begin, own
from consumers.backtest_report import Backtest, render_changes, render_table
from consumers.cli import execute
from consumers.layers import SettingsError
from consumers.live import run_worker
from consumers.opening import connect, topics_of
from consumers.progress import RunBars
from consumers.settings import Settings
from consumers.stop import Stop
from consumers.system import System
from streaming.brokers import open_log
from streaming.errors import LogError, SourceError
from streaming.log import Bounds, TopicPartition, present
from streaming.scored import read_run
from streaming.timerange import TimeRange
from streaming.topicsource import TopicSource
from streaming.validation import Limits
from tests import small_runs
from tests.small_runs import T0, Stream, fill, small

N = 110
PARTITIONS = 3


def live_settings(folder: Path, **sections: Any) -> Settings:  # noqa: ANN401 - whatever a section may hold
    return small(folder / "live.db", **{"topics": {"partitions": PARTITIONS}, **sections})


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A live log of three partitions, with garbage in it, that its worker has scored."""
    folder = tmp_path_factory.mktemp("live")
    stream = Stream(N, partitions=PARTITIONS)
    fill(live_settings(folder), [*stream.profiles, *stream.messages])
    small_runs.run(live_settings(folder))
    return folder


@pytest.fixture
def live(scored: Path, tmp_path: Path) -> Settings:
    """A copy of it."""
    for path in scored.iterdir():
        shutil.copy(path, tmp_path)
    return live_settings(tmp_path)


@pytest.fixture(scope="module")
def wanted(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Backtest:
    """What a candidate with a support of 2 comes to, run through without a stop."""
    settings = live_settings(scored)
    return finished(compare(settings, candidate_of(settings), tmp_path_factory.mktemp("whole") / "out"))


def candidate_of(live: Settings, **worker: Any) -> Settings:  # noqa: ANN401 - whatever a setting may hold
    given = live.model_dump(by_alias=True)
    given["worker"] |= {"support_size": 2} | worker
    return Settings.model_validate(given)


def compare(
    live: Settings,
    candidate: Settings,
    out: Path,
    on_step: Callable[[str, lockstep.Progress], None] | None = None,
    **more: Any,  # noqa: ANN401
) -> Backtest | None:
    with Stop() as stop, connect(live, read_only=True) as log:
        source = TopicSource(log, topics_of(live)["interactions"].name, place="live", limits=live.event_limits())

        def step(side: str, progress: lockstep.Progress) -> None:
            if on_step is not None:
                on_step(side, progress)

        return backtest(live, candidate, source, out, stop, profiles=log, on_step=step, **more)


def finished(found: Backtest | None) -> Backtest:
    assert found is not None
    return found


def same_but_for_time(one: Backtest, other: Backtest) -> bool:
    def plain(found: Backtest) -> dict[str, Any]:
        built: dict[str, Any] = msgspec.to_builtins(found)
        for side in ("control", "candidate"):
            for name in ("seconds", "events_per_second", "settings"):
                built[side].pop(name)
        return built

    return plain(one) == plain(other)


def state(settings: Settings) -> tuple[dict[TopicPartition, Bounds], dict[TopicPartition, int]]:
    """The bounds of everything and what the workers' group has committed."""
    with connect(settings, read_only=True) as log:
        tps = [TopicPartition(topic.name, number) for topic in log.topics().values() for number in range(topic.partitions)]
        return log.bounds(tps), log.committed(settings.group_id, tps)


def test_both_sides_score_every_valid_event_in_the_order_of_time_and_the_difference_is_theirs(live: Settings, tmp_path: Path) -> None:
    result = finished(compare(live, candidate_of(live), tmp_path / "out", keep=True))
    stream = Stream(N, partitions=PARTITIONS)
    # The wrong partition is a matter of where a record lay: in a log of one partition there is none.
    valid = sum(reason in {None, "wrong-partition"} for reason in stream.reasons)
    assert (result.events, result.refused) == (valid, N - valid)
    assert result.changed == {"worker.support_size": (4, 2)}
    runs = []
    for side in ("control", "candidate"):
        with open_log(f"embedded:{tmp_path / 'out' / side}.db") as log:
            assert log.topics()["interactions"].partitions == 1
            runs.append(read_run(log, Limits()))
            users = {record.key for record in present(log, [TopicPartition("users", 0)])}
            assert users == {message.key for message in stream.profiles if message.topic == "users"}
    first, second = runs
    assert (first.timestamp[1:] >= first.timestamp[:-1]).sum() >= valid - 1 - sum(reason == "wrong-partition" for reason in stream.reasons)
    error = [np.abs(run.score - run.rating).mean() for run in runs]
    whole = result.groups["all"]
    assert whole.control.mae == pytest.approx(error[0], abs=1e-6)
    assert whole.mae == pytest.approx(error[1] - error[0], abs=1e-6)
    assert whole.mae != 0, "or the candidate's settings were not used"
    assert (first.scores_sha256, second.scores_sha256) == (result.control.scores_sha256, result.candidate.scores_sha256)
    assert msgspec.json.decode((tmp_path / "out" / "backtest.json").read_bytes(), type=Backtest).groups == result.groups


def test_a_candidate_of_the_live_settings_differs_by_nothing(live: Settings, tmp_path: Path) -> None:
    result = finished(compare(live, live, tmp_path / "out"))
    assert result.changed == {}
    assert result.control.scores_sha256 == result.candidate.scores_sha256
    assert (result.groups["all"].mae, result.groups["all"].mae_se) == (0, 0)


def test_nothing_is_left_but_the_result_and_a_finished_one_starts_anew(live: Settings, wanted: Backtest, tmp_path: Path) -> None:
    assert finished(compare(live, candidate_of(live, support_size=3), tmp_path / "out", events=30)).events <= 30
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["backtest.json"]
    assert same_but_for_time(finished(compare(live, candidate_of(live), tmp_path / "out")), wanted)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["backtest.json"]


def test_one_that_is_asked_to_stop_has_no_result_and_goes_on(live: Settings, wanted: Backtest, tmp_path: Path) -> None:
    with Stop() as stop, connect(live, read_only=True) as log:
        stop.ask()
        source = TopicSource(log, "interactions", place="live", limits=live.event_limits())
        assert backtest(live, candidate_of(live), source, tmp_path / "out", stop, profiles=log) is None
    assert same_but_for_time(finished(compare(live, candidate_of(live), tmp_path / "out")), wanted)


class Cut(Exception):
    """A run that ends in the middle."""


@pytest.mark.parametrize("cut", [("control", 2), ("candidate", 1), ("candidate", 5)])
def test_cut_off_anywhere_it_goes_on_to_the_same_result(live: Settings, wanted: Backtest, cut: tuple[str, int], tmp_path: Path) -> None:
    steps = {"control": 0, "candidate": 0}

    def count(side: str, _: lockstep.Progress) -> None:
        steps[side] += 1
        if (side, steps[side]) == cut:
            raise Cut

    with pytest.raises(Cut):
        compare(live, candidate_of(live), tmp_path / "out", on_step=count)
    # What comes to the live log meanwhile is not in it.
    fill(live, Stream(30, seed=9, partitions=PARTITIONS).messages)
    result = finished(compare(live, candidate_of(live), tmp_path / "out", on_step=count))
    assert same_but_for_time(result, wanted)
    assert steps["control"] < 2 * (N // small_runs.MICRO_BATCH), "it went on, it did not start anew"


def test_another_plan_starts_anew(live: Settings, wanted: Backtest, tmp_path: Path) -> None:
    def cut(_side: str, _progress: lockstep.Progress) -> None:
        raise Cut

    with pytest.raises(Cut):
        compare(live, candidate_of(live, support_size=3), tmp_path / "out", on_step=cut)
    assert same_but_for_time(finished(compare(live, candidate_of(live), tmp_path / "out")), wanted)


def test_a_range_of_time_is_run_alone(live: Settings, tmp_path: Path) -> None:
    within = TimeRange(T0 + 50_000, T0 + 100_000)
    result = finished(compare(live, candidate_of(live), tmp_path / "out", keep=True, within=within))
    with open_log(f"embedded:{tmp_path / 'out' / 'control.db'}") as log:
        run = read_run(log, Limits())
    assert run.timestamp.min() >= T0 + 50_000
    assert run.timestamp.max() < T0 + 100_000
    assert (result.since, result.until) == (within.since, within.until)
    assert result.outside + result.events + result.refused == N


def test_settings_that_decide_what_an_event_is_must_be_the_same(tmp_path: Path) -> None:
    live = live_settings(tmp_path)
    other = live.model_copy(update={"rating": live.rating.model_copy(update={"maximum": 10.0})})
    with pytest.raises(SettingsError, match=r"rating.maximum = 10.0 for the candidate and 5.0 for the live settings"):
        backtest(live, other, None, tmp_path / "out", None)  # type: ignore[arg-type]  # neither is reached
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["control", "candidate"])
def test_a_folder_with_a_log_that_no_backtest_left_is_refused(name: str, tmp_path: Path) -> None:
    log = tmp_path / f"{name}.db"
    with pytest.raises(SourceError, match="is a log that the backtest reads"):
        begin(Files(tmp_path), {}, ["kafka:here:9092", f"embedded:{log}"])
    log.write_bytes(b"somebody's")
    with pytest.raises(SourceError, match="not one that a backtest left"):
        begin(Files(tmp_path), {}, [live_settings(tmp_path).broker])
    assert log.read_bytes() == b"somebody's"


def test_the_runs_have_nothing_of_what_is_live(tmp_path: Path) -> None:
    live = live_settings(tmp_path, topic_prefix="live.", group="workers", metrics={"enabled": True}, worker={"state_dir": str(tmp_path)})
    settings = own(live, tmp_path / "own.db")
    assert (settings.broker, settings.topic_prefix, settings.group_id) == (f"embedded:{tmp_path / 'own.db'}", "", "backtest")
    assert not settings.metrics.enabled
    assert settings.worker.state_dir == ""
    assert settings.digest() == live.digest()


def test_a_quiet_live_log_keeps_every_byte(live: Settings, tmp_path: Path) -> None:
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.glob("live.db*") if path.suffix != ".db-shm"}
    finished(compare(live, candidate_of(live), tmp_path / "out"))
    assert hashlib.sha256((tmp_path / "live.db").read_bytes()).digest() == before["live.db"]
    assert all(path.stat().st_size == 0 for path in tmp_path.glob("live.db-wal"))


def test_a_live_worker_keeps_its_partitions_and_its_topics_while_a_backtest_runs(live: Settings, tmp_path: Path) -> None:
    before = state(live)
    with Stop() as stop, System(live) as system:
        errors: list[BaseException] = []

        def work() -> None:
            try:
                run_worker(system, stop)
            except BaseException as error:  # noqa: BLE001 - told to the test below
                errors.append(error)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            result = finished(compare(live, candidate_of(live), tmp_path / "out"))
            assert state(live) == before
            late = Stream(20, seed=5, garbage=0, partitions=PARTITIONS).messages
            fill(live, late)
            ends = lambda: sum(state(live)[1].values())  # noqa: E731 - asked again and again
            wanted = sum(before[1].values()) + len(late)
            for _ in range(200):
                if errors or ends() == wanted:
                    break
                stop.wait(0.05)
        finally:
            stop.ask()
            worker.join(30)
    assert errors == []
    assert system.metrics.fenced._value.get() == 0
    assert ends() == wanted, "the worker scored on, unfenced"
    assert result.events > 0


def test_the_live_log_could_not_be_written_to(live: Settings, tmp_path: Path) -> None:
    with connect(live, read_only=True) as log, pytest.raises(LogError, match="for reading only"):
        log.writer("coldstream-0")
    wrong = candidate_of(live)
    with Stop() as stop, connect(live, read_only=True) as log, pytest.raises(LogError, match="for reading only"):
        lockstep.run(System(wrong, log=log), stop, until_end=True)


def flags(live: Settings) -> list[str]:
    schema = json.dumps({"job": {"kind": "categorical"}})
    sets = [
        f"broker={live.broker}",
        f"topics.partitions={PARTITIONS}",
        "threads=1",
        f"schema.user={schema}",
        "model.embedding_size=4",
        "rehearsal.users=3",
        "model.memory=off",
    ]
    return [word for each in sets for word in ("--set", each)]


def test_the_command_prints_both_sides_and_writes_the_result(live: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert execute(["backtest", "--try", "worker.support_size=20", "--last", "60s", "--out", str(out), *flags(live)]) == 0
    shown = capsys.readouterr().out
    assert "worker.support_size │ 100            │ 20" in shown
    for word in ("control (live)", "candidate", "difference", "MAE, 1-5 earlier events", "RMSE", "events/s", "no valid events", "outside"):
        assert word in shown
    result = msgspec.json.decode((out / "backtest.json").read_bytes(), type=Backtest)
    assert result.changed == {"worker.support_size": (100, 20)}


def test_the_command_takes_a_file_and_a_settings_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"u{n % 7},i{n % 11},{n % 5 + 1},{T0 + (90 - n) * 1000}" for n in range(80)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,rating,timestamp", *rows, "u1,i1,much,5"]), encoding="utf-8")
    (tmp_path / "next.toml").write_text("[worker]\nsupport_size = 3\n", encoding="utf-8")
    command = [
        "backtest",
        str(tmp_path / "log.csv"),
        "--no-profiles",
        "--candidate",
        str(tmp_path / "next.toml"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert execute([*command, "--set", "threads=1", "--set", "model.embedding_size=4"]) == 0
    assert "1 records are no valid events" in capsys.readouterr().out
    result = msgspec.json.decode((tmp_path / "out" / "backtest.json").read_bytes(), type=Backtest)
    assert (result.events, result.refused, result.changed) == (80, 1, {"worker.support_size": (100, 3)})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "there is nothing to try"),
        (["log.csv", "--from-topic", "old", "--try", "seed=2"], 2, "name either a file or a topic"),
        (["--try", "rating.maximum=10"], 2, "rating.maximum = 10.0 for the candidate and 5.0 for the live settings"),
        (["--try", "worker.support=10"], 2, "unknown setting"),
        (["--try", "seed=2", "--set", "broker=embedded:nowhere.db"], 3, "there is no log"),
        (["--try", "seed=2", "--from-topic", "old"], 3, "there is no topic old"),
    ],
)
def test_what_cannot_be_compared_is_named(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(live_settings(tmp_path), [])
    assert execute(["--set", f"broker=embedded:{tmp_path / 'live.db'}", "backtest", *arguments]) == code
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_between_steps_and_the_same_command_goes_on(
    number: signal.Signals, code: int, live: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, steps = tmp_path / "out", list[int]()
    step = RunBars.step

    def signalled(self: RunBars, side: str, progress: lockstep.Progress) -> None:
        steps.append(progress.done)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
        step(self, side, progress)

    monkeypatch.setattr(RunBars, "step", signalled)
    arguments = ["backtest", "--try", "worker.support_size=5", "--out", str(out), *flags(live)]
    assert execute(arguments) == code
    assert len(steps) == 3
    assert not (out / "backtest.json").exists()
    assert execute(arguments) == 0
    assert steps[2] < steps[3], "it goes on"
    assert len(steps) == 2 * -(-N // 16)
    assert (out / "backtest.json").exists()


def test_a_table_says_what_there_is(wanted: Backtest) -> None:
    assert render_changes(wanted).row_count == 1
    assert render_table(wanted).row_count == 12
