"""A check that no score knows what came after it: change one rating, and nothing up to and including that event may score otherwise.

A runner takes the events in order, runs a fresh system over them, and gives the score of each, in the same order. Scores are compared for
equality, so the runner must be deterministic (lockstep, one partition, a fixed seed).
"""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from streaming.events import Interaction

Runner = Callable[[Sequence[Interaction]], Sequence[float]]


class Leak(AssertionError):
    """A score that depends on a rating which it must not know."""


def assert_no_leak(run: Runner, events: Sequence[Interaction], places: Iterable[int], scale: tuple[float, float] = (1.0, 5.0)) -> None:
    """Change the rating at each of ``places`` in turn, to the end of the scale that is farther from it.

    Raises `Leak` if the event's own score or an earlier one changes, and AssertionError if no later one does either, since then the
    runner does not learn and the check shows nothing. Choose places inside a micro-batch as well as at its ends, and none at the very end.
    """
    before = list(run(events))
    assert len(before) == len(events), f"{len(events)} events got {len(before)} scores"
    for place in places:
        low, high = scale
        event = events[place]
        other = high if event.rating - low < high - event.rating else low
        changed = [*events[:place], msgspec.structs.replace(event, rating=other), *events[place + 1 :]]
        after = list(run(changed))
        for earlier in range(place + 1):
            if before[earlier] != after[earlier]:
                raise Leak(
                    f"the score of event {earlier} became {after[earlier]!r} instead of {before[earlier]!r} when the rating of event "
                    f"{place} was changed from {event.rating} to {other}"
                )
        assert before[place + 1 :] != after[place + 1 :], f"the rating of event {place} has no effect on any later score"
