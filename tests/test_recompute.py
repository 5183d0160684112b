"""Promise (d): every score can be made again from the log, by the model and the codec alone.

The version that a score names is rebuilt from the topic `model`, or from a snapshot and what follows it; profiles are those that stand
before the position that the step was made at; the support set is the fold of the user's events before the one scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from consumers.opening import connect
from consumers.settings import Settings
from consumers.system import new_model
from model import checkpoint
from model.mamo import Mamo
from model.meta import predict
from model.tasks import Task
from streaming import codec
from streaming.chunks import Joiner
from streaming.codec import decode
from streaming.events import Score, Version
from streaming.log import Log
from tests.small_runs import Stream, fill, run, small
from tests.verify.fold import Fold
from tests.verify.reading import Event, Whole, event_of, joined, read


def state_of(version: Version) -> checkpoint.State:
    def tensor(wire: Any) -> torch.Tensor:  # noqa: ANN401
        return torch.from_numpy(codec.array(wire).copy())

    rows: dict[str, tuple[Sequence[str], torch.Tensor]] = {
        name: (codec.texts(part.ids, what=name), tensor(part.values)) for name, part in version.rows.items()
    }
    return checkpoint.State({name: tensor(value) for name, value in version.tensors.items()}, rows)


def fresh(settings: Settings, log: Log) -> Mamo:
    """Version 0 with every profile; here they all stood in the log before the run began."""
    model = new_model(settings)
    for side, topic in ((model.users, "users"), (model.items, "items")):
        for record in read(log, topic, 0):
            assert record.key is not None
            side.set(record.key.decode(), msgspec.msgpack.decode(record.value or b"")["features"])
    return model


def support(before: list[Event], size: int) -> tuple[list[str], list[float]]:
    """The last ``size`` interactions; of an item rated again the latest rating, in its place."""
    kept: list[Event] = []
    for event in before[-size:]:
        kept = [*(earlier for earlier in kept if earlier.item != event.item), event]
    return [event.item for event in kept], [event.rating for event in kept]


def versions(log: Log, topic: str) -> list[tuple[Whole, Version]]:
    return [(whole, decode(whole.value, Version, what=topic)) for whole in joined(read(log, topic, 0))]


def check(settings: Settings, model: Mamo, later: list[Version], at: int, scores: list[Score], before: dict[int, list[Event]]) -> int:
    """Score again what was scored at version ``at``, where the model stands, and at those in ``later``; returns how many scores."""
    waiting, made = {version.version: version for version in later}, 0
    worst = 0.0
    for score in scores:
        if score.model_version < at:
            continue
        while at < score.model_version:
            (step,) = [version for version in waiting.values() if version.parent == at]
            checkpoint.load(state_of(step), model, whole=False)
            at = step.version
        items, ratings = support(before[score.source[2]], settings.worker.support_size)
        again = predict(model, [Task(score.user, items, ratings, [score.item], [0.0])])
        worst = max(worst, abs(float(again.score[0, 0]) - score.score))
        if score.sd is not None:
            assert again.sd is not None
            worst = max(worst, abs(float(again.sd[0, 0]) - score.sd))
        made += 1
    assert worst < 1e-5
    return made


CASES: dict[str, dict[str, Any]] = {
    "closed form": {},
    "gradient steps": {"model": {"local": "all", "inner_steps": 2, "loss": "squared"}},
    "small tables": {"model": {"max_rows": 20, "overflow_rows": 3}, "worker": {"max_users": 8}},
}


@pytest.mark.parametrize("case", CASES)
def test_every_score_can_be_made_again_from_the_log(case: str, tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", **CASES[case])
    stream = Stream(300, seed=6)
    fill(settings, stream.profiles)
    fill(settings, stream.messages)
    run(settings)
    with connect(settings) as log:
        fold = Fold(settings.worker.support_size, settings.worker.max_users)
        events = [event for record in read(log, "interactions", 0) if (event := event_of(record, (1.0, 5.0), 1)) is not None]
        before = {event.offset: fold.take(event) for event in events}
        scores = [decode(record.value, Score, what="score") for record in read(log, "scores", 0)]
        chain = [version for _, version in versions(log, "model")]
        assert check(settings, fresh(settings, log), chain, 0, scores, before) == len(events) > 250

        # From a snapshot, with nothing of what came before it.
        snapshots = versions_by_slot(log)
        newest = max(snapshots, key=lambda version: version.version)
        assert 0 < newest.version < chain[-1].version
        model = fresh(settings, log)
        checkpoint.load(state_of(newest), model, whole=True)
        rest = [version for whole, version in versions(log, "model") if whole.start >= newest.position and version.version > newest.version]
        made = check(settings, model, rest, newest.version, scores, before)
        assert made == sum(score.model_version >= newest.version for score in scores) > 0


def versions_by_slot(log: Log) -> list[Version]:
    """The snapshots: keys are slot/chunk."""
    found = []
    records = read(log, "snapshots", 0)
    for slot in {(record.key or b"").partition(b"/")[0] for record in records}:
        joiner, value = Joiner(), None
        for record in records:
            if (record.key or b"").startswith(slot + b"/"):
                value = joiner.feed(record)
        assert value is not None
        found.append(decode(value, Version, what="snapshot"))
    return found
