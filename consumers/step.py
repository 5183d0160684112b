"""What a step is made of, from the events that it takes to the transaction that it is a part of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from consumers.tables import Pending
    from model.memory import Writes
    from model.meta import Gradient
    from model.tasks import Task
    from streaming.events import Interaction, Source
    from streaming.log import Commit, Message
    from streaming.metrics import StepReport


class Taken(NamedTuple):
    """A valid event of a step, with what its user had before it."""

    interaction: Interaction
    source: Source
    earlier: int
    """How many interactions the user had before it, of all time."""
    task: Task


class Group(NamedTuple):
    """Tasks that teach together."""

    kind: Literal["query", "rehearsal"]
    tasks: list[Task]
    completes: bool
    """Whether they complete a meta-update."""
    writers: set[str]
    """Users who write to the memories."""


class Learned(NamedTuple):
    """What a step made of its events: a score (and its standard deviation) for each, and what the model should learn."""

    scores: list[tuple[float, float | None]]
    lessons: list[tuple[Group, Gradient]]
    writes: Writes | None
    writers: int


class Computed(NamedTuple):
    """A step that waits for its transaction to be begun."""

    messages: Sequence[Message]
    position: Message
    """The position record, which only the last step of a transaction sends."""
    tables: Pending
    report: StepReport


class UnderWay(NamedTuple):
    """A transaction whose commit was begun, and its steps: what is to be done once it has taken place."""

    commit: Commit
    begun: float
    """In seconds since the epoch."""
    steps: list[Computed]
