"""What an update made at an older version counts for: the stated weight, against loops in plain numbers of 64 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from consumers.opening import connect
from consumers.settings import Settings
from consumers.system import System
from consumers.trainer import Trainer
from consumers.wire import gradient_from_wire, writes_from_wire
from model.memory import Memory, Writes
from model.settings import ModelSettings
from streaming.codec import array, decode, encode, tensor, texts
from streaming.events import Update, Version
from streaming.log import Message
from streaming.scored import read_run
from tests.small_runs import Stream, fill, run, small
from tests.test_promises import findings
from tests.verify.reading import joined, read

STREAM = Stream(120, seed=31)
PLAIN: dict[str, Any] = {"optimiser": "sgd", "weight_decay": 0.0, "user_decay": 0.0, "prior_decay": 0.0, "learning_rate": 0.1}


def settings_of(path: Path, **trainer: Any) -> Settings:  # noqa: ANN401 - as the section
    return small(path, model={"embedding_size": 4, "memory_rows": 3} | PLAIN, trainer={"meta_update": 8, "snapshot_every": 40} | trainer)


def stale(settings: Settings, version: int) -> Update:
    """An update as the workers wrote it, with memory writes, but made at this version."""
    with connect(settings) as log:
        updates = [decode(whole.value, Update, what="update") for whole in joined(read(log, "updates", 0))]
    update = next(update for update in reversed(updates) if update.writes and texts(update.rows["item"].ids, what="ids"))
    return msgspec.structs.replace(update, version=version)


def numbers(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(tensor.tolist(), np.float64)


@pytest.mark.parametrize("ages", [[0], [3], [4, 0], [1, 2, 7]])
def test_a_round_of_stale_updates_moves_the_model_by_their_weights(ages: list[int], tmp_path: Path) -> None:
    half_life = 2.0
    settings = settings_of(tmp_path / "log.db", staleness_half_life=half_life, round_updates=len(ages))
    fill(settings, STREAM.messages)
    run(settings)
    with System(settings) as system:
        trainer = system.trainer()
        updates = [stale(settings, trainer.version - age) for age in ages]
        system.log.append([Message("updates", b"0", encode(update), 0) for update in updates])
        phi, memory = numbers(trainer.model.vector), trainer.model.memory
        rates = numbers(trainer.optimiser.rates)
        assert trainer.step() == len(ages)

        gradient, queries = np.zeros_like(phi), 0
        wanted = {name: numbers(getattr(memory, name)) for name in ("profile", "gradient", "mixing", "weights", "centre")}
        for age, update in zip(ages, updates, strict=True):
            weight = 0.5 ** (age / half_life)
            gradient += weight * numbers(gradient_from_wire(update.events, update.tensors, update.rows).vector)
            # All queries count, however old: a stale update makes a shorter step.
            queries += update.events
            writes = writes_from_wire(update.writes)
            assert writes is not None
            for name, written in once(wanted, writes).items():
                wanted[name] += weight * (written - wanted[name])
        np.testing.assert_allclose(numbers(trainer.model.vector), phi - rates * gradient / queries, rtol=1e-5, atol=1e-7)
        for name, value in wanted.items():
            np.testing.assert_allclose(numbers(getattr(trainer.model.memory, name)), value, rtol=1e-4, atol=1e-6, err_msg=name)
        assert count(system, "coldstream_updates_weighted_total") == sum(age > 0 for age in ages)


@pytest.mark.parametrize(
    ("ages", "rounds", "groups"),
    [([5, 5, 5, 5, 0, 0], 2, [3, 3]), ([5, 5, 5], 0, [1, 1, 1]), ([2, 2, 2], 2, [1, 2]), ([9] * 4, 3, [3, 1]), ([0] * 3, 1, [1, 1, 1])],
)
def test_what_was_made_long_ago_is_folded_in_fewer_and_larger_rounds(
    ages: list[int], rounds: int, groups: list[int], tmp_path: Path
) -> None:
    settings = settings_of(tmp_path / "log.db", stale_rounds=rounds)
    fill(settings, STREAM.messages)
    run(settings)
    with System(settings) as system:
        trainer = system.trainer()
        before, phi, rates = trainer.version, numbers(trainer.model.vector), numbers(trainer.optimiser.rates)
        # None like another, so that it shows which were folded together.
        updates = [scaled(stale(settings, before - age), 1.5**place) for place, age in enumerate(ages)]
        system.log.append([Message("updates", b"0", encode(update), 0) for update in updates])
        assert trainer.step() == len(ages)
        assert trainer.version == before + len(groups)
        for size in groups:
            part, updates = updates[:size], updates[size:]
            gradients = [numbers(gradient_from_wire(update.events, update.tensors, update.rows).vector) for update in part]
            phi = phi - rates * sum(gradients) / sum(update.events for update in part)
        np.testing.assert_allclose(numbers(trainer.model.vector), phi, rtol=1e-5, atol=1e-7)


def scaled(update: Update, by: float) -> Update:
    """The update with gradients so many times as large."""
    tensors = {name: tensor(array(value) * np.float32(by)) for name, value in update.tensors.items()}
    rows = {name: msgspec.structs.replace(part, values=tensor(array(part.values) * np.float32(by))) for name, part in update.rows.items()}
    return msgspec.structs.replace(update, tensors=tensors, rows=rows)


def test_in_lockstep_each_update_is_a_version_however_many_there_are(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", worker={"micro_batch": 600}, trainer={"meta_update": 4, "snapshot_every": 1000})
    fill(settings, Stream(600, garbage=0, seed=3).messages)
    run(settings)
    with connect(settings) as log:
        updates = [decode(whole.value, Update, what="update") for whole in joined(read(log, "updates", 0))]
        versions = [decode(whole.value, Version, what="version") for whole in joined(read(log, "model", 0))]
    assert len(updates) > 2 * settings.trainer.stale_rounds, "else it would show nothing"
    assert versions[-1].version == sum(update.completes for update in updates)


@pytest.mark.parametrize(("updates", "folded"), [(1, 1), (64, 64), (65, 65), (300, 300), (520, 512)])
def test_a_step_folds_all_that_is_there_up_to_its_bound(tmp_path: Path, updates: int, folded: int) -> None:
    settings = settings_of(tmp_path / "log.db")
    fill(settings, STREAM.messages[:64])
    run(settings)
    with System(settings) as system:
        trainer = system.trainer()
        system.log.append([Message("updates", b"0", encode(stale(settings, trainer.version)), 0)] * updates)
        assert trainer.step() == folded
        assert trainer.behind == (folded < updates)
        trainer.catch_up()
        assert not trainer.behind


def once(memory: dict[str, Any], writes: Writes) -> dict[str, Any]:
    """The memories after a write, row by row."""
    after = {name: np.zeros_like(value) for name, value in memory.items()}
    for k in range(len(memory["profile"])):
        for name, decay in (("profile", writes.profile_decay), ("gradient", writes.gradient_decay), ("weights", writes.weights_decay)):
            after[name][k] = float(decay[k]) * memory[name][k] + numbers(getattr(writes, name))[k]
        after["mixing"][k] = numbers(writes.mixing)[k]
        for j in range(len(memory["profile"])):
            after["mixing"][k] += float(writes.mixing_map[k, j]) * memory["mixing"][j]
    after["centre"] = float(writes.centre_decay) * memory["centre"] + numbers(writes.centre)
    return after


def count(system: System, name: str) -> float:
    return system.metrics.registry.get_sample_value(name) or 0.0


def test_a_gated_write_at_a_weight_is_the_write_at_so_much_of_its_rates() -> None:
    """What makes the rule a fair one: to go part of the way is to forget and to learn at part of the rate."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    memory = Memory(draw(3, 4), draw(3, 5), draw(3, 2, 4), draw(3, 6), draw(4))
    parts = [part.numpy() for part in (torch.softmax(draw(1, 3), 1), draw(1, 4), draw(1, 5), draw(1, 2, 4), draw(1, 6))]

    def written(rate: float) -> Writes:
        life = float(-1 / np.log2(1 - rate))
        settings = ModelSettings(gated=True, profile_half_life=life, gradient_half_life=life, task_half_life=life)
        return Writes.of_users(settings, memory.centre.numpy(), *parts)

    part, less = written(0.2).weighted(0.25).apply(memory), written(0.05).apply(memory)
    for name in ("profile", "gradient", "mixing", "weights", "centre"):
        np.testing.assert_allclose(numbers(getattr(part, name)), numbers(getattr(less, name)), rtol=1e-9, atol=1e-12)


def test_the_oldest_are_dropped_and_the_others_weighed(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "log.db", staleness_half_life=1.0, max_staleness=3, round_updates=8)
    fill(settings, STREAM.messages)
    run(settings)
    with System(settings) as system:
        trainer = system.trainer()
        ages = [0, 3, 4, 1]
        system.log.append([Message("updates", b"0", encode(stale(settings, trainer.version - age)), 0) for age in ages])
        kept, dropped = trainer._choose(trainer._read(0.0, lambda: None))
    assert [[part.weight for part in parts] for parts in kept] == [[1.0], [0.125], [0.5]]
    assert len(dropped) == 1


def test_lockstep_where_nothing_is_stale_gives_the_same_bits(tmp_path: Path) -> None:
    digests = []
    for half_life in (0.0, 2.0):
        settings = small(tmp_path / f"{half_life}.db", trainer={"staleness_half_life": half_life})
        fill(settings, STREAM.messages)
        run(settings)
        assert findings(settings) == []
        with connect(settings) as log:
            digests.append(read_run(log, settings.event_limits()).scores_sha256)
    assert digests[0] == digests[1]


def test_off_nothing_is_touched(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "log.db")
    fill(settings, STREAM.messages[:64])
    run(settings)
    with System(settings) as system:
        trainer: Trainer = system.trainer()
        system.log.append([Message("updates", b"0", encode(stale(settings, 0)), 0)])
        ((lesson,),), _ = trainer._choose(trainer._read(0.0, lambda: None))
        assert lesson.weight == 1.0
        assert count(system, "coldstream_updates_weighted_total") == 0
