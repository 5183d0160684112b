"""Recommenders that are fed the same events in the same order as Coldstream, to show what its error is worth.

A peer scores an event before it learns it. To add one, write a class with ``score`` and ``learn`` and name it in `peers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from river import optim, reco, stats

from streaming.scored import Events, ScoredRun

Scale = tuple[float, float]
"""Lowest and highest rating."""

FITTED: Scale = (1.0, 5.0)
"""The scale that the rates below were found on."""

Scores = Mapping[str, NDArray[np.float64]]
"""Scores of every event, shape (n,), by peer."""


class Peer(Protocol):
    """Scores and learns one event at a time. Users and items are given as integers that stand for their ids."""

    def score(self, user: int, item: int) -> float:
        """The rating expected of the user for the item, inside the scale."""

    def learn(self, user: int, item: int, rating: float) -> None:
        """Take in what the user said."""


class RunningMean:
    """Scores everything with the mean of all ratings so far; its first score is the middle of the scale."""

    def __init__(self, scale: Scale) -> None:
        self._middle = sum(scale) / 2
        self._mean = stats.Mean()

    def score(self, user: int, item: int) -> float:  # noqa: ARG002 - a peer that looks at neither
        """The mean of all ratings so far."""
        return float(self._mean.get()) if self._mean.n else self._middle

    def learn(self, user: int, item: int, rating: float) -> None:  # noqa: ARG002
        """Take in a rating."""
        self._mean.update(rating)


class RiverBiasedMF:
    """river's biased matrix factorisation at its best found settings for this task, clipped to the scale.

    Ratings on another scale are brought to that on which the settings were found, without which it diverges on a wide one.
    Learning rates .04 for biases and .08 for latents, 10 factors, l2_latent .05; biases and latents both start from Normal(0, .1) with
    seed 1. Its first score is the middle of the scale.
    """

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self._learned = False
        self._model = reco.BiasedMF(
            n_factors=10,
            bias_optimizer=optim.SGD(0.04),
            latent_optimizer=optim.SGD(0.08),
            l2_latent=0.05,
            weight_initializer=optim.initializers.Normal(mu=0.0, sigma=0.1, seed=1),
            latent_initializer=optim.initializers.Normal(mu=0.0, sigma=0.1, seed=1),
            seed=1,
        )

    def score(self, user: int, item: int) -> float:
        """The model's prediction, clipped to the scale."""
        low, high = self._scale
        if not self._learned:
            return (low + high) / 2
        expected = float(self._model.predict_one(user, item))  # type: ignore[no-untyped-call]
        if self._scale != FITTED:
            expected = low + (expected - FITTED[0]) * (high - low) / (FITTED[1] - FITTED[0])
        return min(high, max(low, expected))

    def learn(self, user: int, item: int, rating: float) -> None:
        """One step of stochastic gradient descent."""
        if self._scale != FITTED:
            low, high = self._scale
            rating = FITTED[0] + (rating - low) * (FITTED[1] - FITTED[0]) / (high - low)
        self._model.learn_one(user, item, rating)  # type: ignore[no-untyped-call]
        self._learned = True


def peers(scale: Scale) -> dict[str, Peer]:
    """New peers by the name that they have in a report."""
    return {"river_biased_mf": RiverBiasedMF(scale), "running_mean": RunningMean(scale)}


def peer_scores(events: Events | ScoredRun, scale: Scale) -> dict[str, NDArray[np.float64]]:
    """What each peer makes of the events."""
    return {name: prequential_scores(peer, events) for name, peer in peers(scale).items()}


def prequential_scores(peer: Peer, events: Events | ScoredRun) -> NDArray[np.float64]:
    """The peer's score of every event, shape (n,), each made before the peer learned from that event or any later one."""
    scores = np.empty(len(events.rating))
    for place, (user, item, rating) in enumerate(zip(events.user.tolist(), events.item.tolist(), events.rating.tolist(), strict=True)):
        scores[place] = peer.score(user, item)
        peer.learn(user, item, rating)
    return scores
