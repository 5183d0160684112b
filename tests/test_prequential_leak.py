"""The leak check passes runners that are honest and catches those that are not, the one that peeks inside a micro-batch above all."""

from collections.abc import Sequence

import numpy as np
import pytest

from streaming.events import Interaction
from streaming.peers import Peer, RiverBiasedMF, RunningMean
from tests.prequential_leak import Leak, assert_no_leak

RNG = np.random.default_rng(4)
EVENTS = [Interaction(f"u{RNG.integers(4)}", f"i{RNG.integers(6)}", float(RNG.integers(1, 6)), 1000 + n) for n in range(40)]
BATCH = 8


def honest(events: Sequence[Interaction]) -> list[float]:
    scores, total = [], 0.0
    for n, event in enumerate(events):
        scores.append(total / n if n else 3.0)
        total += event.rating
    return scores


def learns_own_event_first(events: Sequence[Interaction]) -> list[float]:
    return [float(np.mean([e.rating for e in events[: n + 1]])) for n in range(len(events))]


def learns_micro_batch_first(events: Sequence[Interaction]) -> list[float]:
    return [float(np.mean([e.rating for e in events[: (n // BATCH + 1) * BATCH]])) for n in range(len(events))]


def learns_the_next_event_only(events: Sequence[Interaction]) -> list[float]:
    return [float(np.mean([e.rating for e in [*events[:n], *events[n + 1 : n + 2]]])) for n in range(len(events))]


def learns_nothing(events: Sequence[Interaction]) -> list[float]:
    return [3.0] * len(events)


def test_an_honest_runner_passes() -> None:
    assert_no_leak(honest, EVENTS, range(len(EVENTS) - 1))


@pytest.mark.parametrize("runner", [learns_own_event_first, learns_micro_batch_first, learns_the_next_event_only])
def test_a_leaking_runner_is_caught(runner: object) -> None:
    with pytest.raises(Leak, match="the score of event"):
        assert_no_leak(runner, EVENTS, [19])  # type: ignore[arg-type]


def test_a_change_at_the_start_of_a_micro_batch_does_not_excuse_the_middle() -> None:
    """At the first event of a batch, only its own score can show the leak; at the last one, all of the batch."""
    for place in (16, 20, 23):
        with pytest.raises(Leak):
            assert_no_leak(learns_micro_batch_first, EVENTS, [place])


def test_a_runner_that_learns_nothing_proves_nothing() -> None:
    with pytest.raises(AssertionError, match="no effect"):
        assert_no_leak(learns_nothing, EVENTS, [5])


@pytest.mark.parametrize("kind", [RiverBiasedMF, RunningMean])
def test_the_peers_do_not_leak(kind: type[RiverBiasedMF | RunningMean]) -> None:
    def run(events: Sequence[Interaction]) -> list[float]:
        peer: Peer = kind((1.0, 5.0))
        scores = []
        for event in events:
            user, item = int(event.user[1:]), int(event.item[1:])
            scores.append(peer.score(user, item))
            peer.learn(user, item, event.rating)
        return scores

    assert_no_leak(run, EVENTS, range(0, 36, 5))
