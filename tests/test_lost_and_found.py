"""What the log, a store or retention has lost is noticed by who reads it, and what is there is not taken for a difference."""

from __future__ import annotations

import importlib
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from consumers.audit.run import audit
from consumers.backtest import backtest
from consumers.deadletters import Wanted, send_back
from consumers.opening import connect, topics_of
from consumers.stop import Stop
from streaming.codec import encode
from streaming.errors import SourceError
from streaming.events import Score
from streaming.log import Message
from streaming.topics import DAY_MS, topics
from streaming.topicsource import TopicSource
from tests.small_runs import SMALL, Stream, fill, packed, run, small
from tests.test_promises import findings

if TYPE_CHECKING:
    from consumers.audit.run import Report
    from consumers.settings import Settings

run_module: Any = importlib.import_module("consumers.audit.run")


def audited(settings: Settings, **how: Any) -> Report:  # noqa: ANN401 - as `audit`
    with connect(settings, read_only=True) as log:
        return audit(log, settings, topics_of(settings), **how)


def test_a_store_ahead_of_a_log_that_was_put_back_is_set_aside_though_the_log_has_grown_past_it(tmp_path: Path) -> None:
    """As after a loss of power, or a log restored from a copy: other events stand now where the store's were."""
    stream = Stream(400, garbage=0.0).messages
    stores, path = tmp_path / "stores", tmp_path / "log.db"
    with_store = small(path, worker=SMALL["worker"] | {"state_dir": str(stores)})
    fill(with_store, stream[:60])
    run(with_store)
    shutil.copy(path, tmp_path / "copy.db")
    fill(with_store, stream[60:100])
    run(with_store)
    for each in tmp_path.glob("log.db*"):
        each.unlink()
    shutil.copy(tmp_path / "copy.db", path)
    # Another worker, without that store, takes the partition over and goes on with other events.
    fill(small(path), stream[200:320])
    run(small(path))
    fill(with_store, stream[320:])
    run(with_store)
    assert audited(with_store).differences == {}
    assert findings(with_store) == []
    assert list(stores.glob("*.set-aside"))


def test_what_says_that_somebody_is_to_be_forgotten_is_kept_for_ever() -> None:
    """However long no worker was there: nothing else says it."""
    kept = {name: topic.retention_ms for name, topic in topics().items() if topic.cleanup == "compact"}
    assert kept["users"] is None
    assert kept["support"] == kept["items"] == 7 * DAY_MS


@pytest.mark.parametrize("what", ["score", "sd"])
def test_an_audit_takes_no_number_that_is_none(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(60, garbage=0.0).messages)
    with monkeypatch.context() as patch:
        made = encode

        def spoiled(value: object) -> bytes:
            return made(msgspec.structs.replace(value, **{what: math.nan}) if isinstance(value, Score) else value)  # type: ignore[arg-type]

        patch.setattr("consumers.worker.encode", spoiled)
        run(settings)
    assert audited(settings).differences == {"score": 60}


def test_profiles_that_come_while_an_audit_begins_are_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path / "log.db")
    stream = Stream(200, garbage=0.0)
    fill(settings, [*stream.profiles, *stream.messages[:100]])
    run(settings)
    made, done = run_module.ProfileHistory, [False]

    def beside(*given: Any) -> object:  # noqa: ANN401 - as the class
        found = made(*given)
        if not done[0]:
            done[0] = True
            new = [Message("items", b"i%d" % number, msgspec.msgpack.encode({"features": {"genre": ["new"]}})) for number in range(30)]
            fill(settings, [*new, *stream.messages[100:]])
            run(settings)
        return found

    monkeypatch.setattr(run_module, "ProfileHistory", beside)
    assert audited(settings).differences == {}
    assert done == [True]


def test_retention_of_events_that_passes_while_an_audit_reads_is_out_of_reach_and_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_ms = 3000
    settings = small(tmp_path / "log.db", topics={"partitions": 1, "retention_ms": {"interactions": keep_ms}})
    stream, began = Stream(160, garbage=0.0).messages, time.monotonic()
    fill(settings, stream[:100])
    run(settings)
    walk = run_module.VersionWalk

    def late(*given: Any) -> object:  # noqa: ANN401 - as the class
        """What comes after the partitions were looked at, and before they are read."""
        time.sleep(max(0.0, began + keep_ms / 1000 + 0.5 - time.monotonic()))
        fill(settings, stream[100:130])
        return walk(*given)

    monkeypatch.setattr(run_module, "VersionWalk", late)
    report = audited(settings)
    assert report.differences == {}
    assert "interactions removed by retention" in {reach.what for reach in report.out_of_reach}


def test_retention_of_updates_and_versions_that_overtakes_an_audit_is_out_of_reach_and_no_difference(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    with connect(settings, create=True) as log:
        log.create(
            topic._replace(retention_bytes=60_000) if name in ("updates", "model") else topic for name, topic in topics_of(settings).items()
        )
    stream, done = Stream(1200, garbage=0.0), [False]
    fill(settings, [*stream.profiles, *stream.messages[:800]])
    run(settings)

    def beside(_: object) -> None:
        if not done[0]:
            done[0] = True
            fill(settings, stream.messages[800:])
            run(settings)

    report = audited(settings, on_progress=beside)
    assert report.differences == {}
    assert done == [True]


def test_a_backtest_of_a_log_that_one_left_does_not_remove_it(tmp_path: Path) -> None:
    live = small(tmp_path / "live.db")
    fill(live, Stream(60, garbage=0.0).messages)
    tried = small(tmp_path / "live.db", worker=SMALL["worker"] | {"support_size": 3})
    with Stop() as stop:
        with connect(live, read_only=True) as log:
            source = TopicSource(log, "interactions", place=live.broker)
            assert backtest(live, tried, source, tmp_path / "out", stop, keep=True) is not None
        kept = tmp_path / "out" / "control.db"
        again = live.model_copy(update={"broker": f"embedded:{kept}"})
        with connect(again, read_only=True) as log:
            source = TopicSource(log, "interactions", place=again.broker)
            with pytest.raises(SourceError, match="is a log that the backtest reads"):
                backtest(live, tried, source, tmp_path / "out", stop)
        assert kept.stat().st_size > 10_000


def test_no_letter_of_a_user_who_is_to_be_forgotten_is_sent_back(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    wrong = [Message("interactions", b"bob", packed(user=user), 0) for user in ("ann", "ben")]
    fill(settings, [Message("users", b"ben", None), *wrong])
    run(settings)
    time.sleep(0.002)
    fill(settings, [Message("users", b"ann", None)])  # which no step has read yet; ben's was before what he did
    with connect(settings) as log:
        outcomes = list(send_back(log, settings, topics_of(settings), Wanted(), set_key=True))
    assert [outcome.outcome for outcome in outcomes] == ["refused", "sent"]
    assert "about to be" in outcomes[0].detail
