"""From settings to the parts of a running system: model, worker, trainer, and what watches them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import structlog
import torch

from consumers import patience
from consumers.histories import history_of_encoded
from consumers.layers import SettingsError
from consumers.opening import connect, endpoint, topics_of
from consumers.threads import limit_threads
from consumers.trainer import Trainer
from consumers.versions import Versions
from consumers.wire import gradient_from_wire, gradient_to_wire, rows_to_wire
from consumers.worker import Worker
from model import checkpoint
from model.history import rated
from model.mamo import Mamo
from model.meta import Optimiser, adapt, differentiate
from model.tasks import Task
from streaming.codec import encode
from streaming.events import Support
from streaming.health import Health
from streaming.metrics import Metrics

if TYPE_CHECKING:
    from types import TracebackType

    from consumers.settings import Settings
    from streaming.log import Log, Member


logger = structlog.get_logger()

COMPILED_SECONDS = 2.0
"""Reading what was compiled before takes less."""


def new_model(settings: Settings) -> Mamo:
    """Version 0 of the model: what settings and seed make of it. Raises `SettingsError` for a device that is not there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError(["device: cuda is not available here (torch sees no GPU that it can use); leave it at cpu"])
    scale = (settings.rating.minimum, settings.rating.maximum)
    return Mamo(settings.model, settings.feature_schema, scale, seed=settings.seed, device=settings.device)


def compile_loops(settings: Settings) -> None:
    """Have every loop compiled, or read from where it was kept, before anybody waits: a step that did it would be late by seconds."""
    began, model = time.monotonic(), new_model(settings)
    task = Task("", [""], [settings.rating.minimum], [""], [settings.rating.minimum])
    (gradient,), writing = differentiate(model, adapt(model, [task], learning=True), [""])
    writes = writing.composed()
    history = history_of_encoded(encode(Support([("", settings.rating.minimum, 0)], ("", 0, 0), 1, 0)))
    rated([history], model.items)
    model.items.places(list(map(str, range(64))))  # More than the index of their ids has room for at first.
    model.items.set("0", None)
    gradient = gradient_from_wire(gradient.queries, *gradient_to_wire(gradient))
    if gradient.finite() and (writes is None or writes.finite()):
        optimiser = Optimiser(model)
        changed = {name: [rows] for name, rows in optimiser.step(gradient, writes).items()}
        rows_to_wire(checkpoint.export(model, optimiser, changed).rows)
    if (seconds := time.monotonic() - began) > COMPILED_SECONDS:
        logger.info("loops compiled; next time they are read", seconds=round(seconds, 1))


COLLECTED_AFTER = 50_000
"""Objects made, and not let go, between two looks of Python's collector for cycles: with its own 700 it takes a twentieth of a step."""


class System:
    """What the processes share: the log with its topics, metrics and health. A context manager; leaving it closes all."""

    def __init__(self, settings: Settings, *, log: Log | None = None) -> None:
        self.settings = settings
        limit_threads(settings.cores())
        compile_loops(settings)
        self._stack = ExitStack()
        self.topics = topics_of(settings)
        self.log = log or self._stack.enter_context(connect(settings, create=True))
        patience.within(patience.FIRST_ANSWER_SECONDS, lambda: self.log.create(self.topics.values()))
        self.metrics = Metrics()
        self.health = Health()
        self._stack.enter_context(endpoint(settings, self.metrics, self.health))
        # What has been imported and compiled stays: looking through it each time takes Python's collector a fifth of a second.
        gc.collect()
        gc.freeze()
        gc.set_threshold(COLLECTED_AFTER)

    def worker(self, versions: Versions | None = None) -> Worker:
        """A worker at the newest model version, without partitions yet; ``versions`` are those of a trainer in the same process."""
        if versions is None:
            names = {name: topic.name for name, topic in self.topics.items()}
            versions = Versions(self.log, names, self.settings.digest(), new_model(self.settings))
        worker = Worker(self.log, self.settings, self.topics, versions, self.metrics)
        self._stack.callback(worker.close)
        self.health.loaded(versions.version)
        if versions.version:
            self.metrics.observe_version(versions.version, versions.made_at)
        return worker

    def learner(self, beat: Callable[[], object] = lambda: None) -> Versions:
        """A model with its optimiser at the newest version, for whoever trains or stands by to."""
        model = new_model(self.settings)
        names = {name: topic.name for name, topic in self.topics.items()}
        return Versions(self.log, names, self.settings.digest(), model, Optimiser(model), beat)

    def trainer(self) -> Trainer:
        """The trainer, at the newest model version."""
        trainer = Trainer(self.log, self.settings, self.topics, self.learner(), self.metrics)
        self._stack.callback(trainer.close)
        self.health.loaded(trainer.version)
        return trainer

    def heard(self, member: Member) -> None:
        """The heartbeat of a process that is in the midst of something long: for whoever looks at its health, and for its group."""
        self.health.beat()
        member.assignment()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # The endpoint is told of the error on its way out.
        self._stack.__exit__(kind, error, trace)
