"""The model as an estimator of river's, for a notebook or a program without a stream.

It learns as the stream does in lockstep over one partition: the same settings, seed and events in the same order give the same scores.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from river import reco

from model import checkpoint
from model.features import Value
from model.history import History
from model.mamo import Mamo
from model.memory import Writes, compose
from model.meta import Gradient, Optimiser, RowGradients, adapt, differentiate, passes, predict, total
from model.profiles import Profiles
from model.settings import FeatureSchema, ModelSettings
from model.tasks import Task, cut

Features = Mapping[str, Any]


class MAMORanker(reco.base.Ranker):
    """MAMO: a rating model that adapts to each user from that user's last few ratings.

    `predict_one` adapts the model to the user's support set, the last ratings that `learn_one` was told of, and changes nothing. Every
    ``micro_batch`` events `learn_one` also moves the global model and writes its memories, so that it gets slower by a few dozen
    milliseconds then; in between it only notes the event, which the user's next prediction is already adapted to.

    Users and items are named by anything with a text, which is their id: 1 and "1" are the same. A rating is a number on ``scale``; a
    bool is the top of the scale or its bottom. ``x`` holds features by the names that ``schema`` gives them, of the user, of the item or
    of both; others are ignored. `learn_one` remembers them, so they are needed only when new; a feature that is None is forgotten.

    Args:
        settings: The model's settings; the defaults if None.
        schema: The features of users and items to look at; None is the item's id alone. No name may stand on both sides.
        scale: Lowest and highest rating.
        support_size: Ratings kept of each user, the last ones.
        micro_batch: Events between two moves of the global model.
        meta_update: Events whose gradients make one move; a micro-batch that is larger makes several.
        rehearsal_users: Earlier users whose histories are gone over again with each move; 0 is none.
        rehearsal_query: Ratings of a rehearsed user that are held out to learn from.
        seed: Of the weights at the start and of the rehearsed users. None takes another one each time.

    Raises:
        ValueError: A parameter is out of range, or a name of the schema stands on both sides.

    Examples:
        >>> from model.estimator import MAMORanker
        >>> from model.settings import ModelSettings
        >>> from river import metrics

        >>> films = {"Alien": "space", "Gravity": "space", "Apollo 13": "space", "Titanic": "love", "Amelie": "love", "Ghost": "love"}
        >>> model, mae = MAMORanker(ModelSettings(row_rate=0.03), micro_batch=6, meta_update=6), metrics.MAE()
        >>> for user in range(30):
        ...     for film, kind in films.items():
        ...         y = 5 if (kind == "space") == (user % 2 == 0) else 1
        ...         mae.update(y, model.predict_one(user, film))
        ...         model.learn_one(user, film, y)
        >>> mae.get() < 1.4  # the mean rating is always off by 2
        True
        >>> model.learn_one("Eve", "Alien", 5)
        >>> model.rank("Eve", {"Titanic", "Gravity"})
        ['Gravity', 'Titanic']

    Sources: Dong et al., MAMO: Memory-Augmented Meta-Optimization for Cold-start Recommendation, KDD 2020 (arXiv 2007.03183); the closed
    form as in ALPaCA, Harrison et al. 2018.
    """

    def __init__(
        self,
        settings: ModelSettings | None = None,
        schema: FeatureSchema | None = None,
        scale: tuple[float, float] = (1.0, 5.0),
        support_size: int = 100,
        micro_batch: int = 16,
        meta_update: int = 16,
        rehearsal_users: int = 64,
        rehearsal_query: int = 5,
        seed: int | None = 1,
    ) -> None:
        super().__init__(seed=seed)
        self.settings = settings
        self.schema = schema
        self.scale = scale
        self.support_size = support_size
        self.micro_batch = micro_batch
        self.meta_update = meta_update
        self.rehearsal_users = rehearsal_users
        self.rehearsal_query = rehearsal_query
        self._check()
        self._seed = self._rng.getrandbits(63) if seed is None else seed
        self._optimiser = self._start()
        self._supports: dict[str, list[tuple[str, float]]] = {}
        self._users: list[str] = []
        """Users in the order of their first events; rehearsal draws from them by number."""
        self._waiting: list[Task] = []
        """Events of the micro-batch that is filling, each with the support that its user had before it."""
        self._learned = 0
        """How many events came before that micro-batch."""
        self._parts: list[tuple[Gradient, Writes | None]] = []
        """What the events since the last multiple of ``meta_update`` taught."""
        self._users_before = 0
        """How many users had an event before it."""

    def _check(self) -> None:
        low, high = self.scale
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"scale must be the lowest and the highest rating, not {self.scale!r}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, or None, not {self.seed!r}")
        least = {"support_size": 1, "micro_batch": 1, "meta_update": 1, "rehearsal_users": 0, "rehearsal_query": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} must be a whole number of at least {bound}, not {value!r}")
        if self.schema is not None and (twice := self.schema.user.keys() & self.schema.item.keys()):
            raise ValueError(f"schema: {min(twice)!r} names a feature of users and one of items; x could not tell them apart")

    def _start(self) -> Optimiser:
        model = Mamo(self.settings or ModelSettings(), self.schema or FeatureSchema(), self.scale, seed=self._seed)
        return Optimiser(model)

    @property
    def model(self) -> Mamo:
        """The global model: parameters, memories and embedding tables."""
        # Held by the optimiser alone: river copies attribute by attribute, and two would part.
        return self._optimiser.model

    @property
    def is_contextual(self) -> bool:
        """Whether ``x`` makes a difference: the schema names a feature other than the item's id."""
        schema = self.schema or FeatureSchema()
        return any(feature.kind != "id" for feature in (*schema.user.values(), *schema.item.values()))

    def predict_one(self, user: Hashable, item: Hashable, x: Features | None = None) -> float:  # type: ignore[override] # float is no Number
        """The rating expected of the user for the item, inside the scale. ``x`` counts for this prediction alone."""
        with self._knowing(text(user), text(item), x):
            return self._predict(user, item)[0]

    def predict_sd_one(self, user: Hashable, item: Hashable, x: Features | None = None) -> float:
        """The standard deviation of the rating that `predict_one` expects, the noise of a rating included, in rating points.

        Raises NotImplementedError where the settings call for gradient steps, which give no variance.
        """
        with self._knowing(text(user), text(item), x):
            sd = self._predict(user, item)[1]
        if sd is None:
            raise NotImplementedError(f"settings.local = {self.model.settings.local} has no variance; closed_form has")
        return sd

    def _predict(self, user: Hashable, item: Hashable) -> tuple[float, float | None]:
        return predict(self.model, [self._task(str(user), [str(item)], [0.0])]).pairs()[0]

    def rank(self, user: Hashable, items: Iterable[Hashable], x: Features | None = None) -> list[Hashable]:
        """The items by decreasing expected rating, all from one adaptation. Of ``x`` only the user's features are taken.

        Ratings are compared before they are brought inside the scale; equal ones stand in the order of their ids.
        """
        by_id = {text(item): item for item in items}
        if not by_id:
            return []
        ids = sorted(by_id)
        with self._knowing(text(user), None, x):
            adapted = adapt(self.model, [self._task(str(user), ids, [0.0] * len(ids))], learning=False)
        order = torch.sort(adapted.prediction.score.detach()[0], descending=True, stable=True).indices
        return [by_id[ids[place]] for place in order.tolist()]

    def learn_one(self, user: Hashable, item: Hashable, y: float, x: Features | None = None) -> None:  # type: ignore[override]
        """Take in that the user rated the item ``y``.

        Raises ValueError for a rating off the scale and for an id or a feature that no UTF-8 has; nothing is then kept.
        """
        key, rated, rating = text(user), text(item), self._rating(y)
        for profiles, owner, features in self._profiles(key, rated, x):
            profiles.set(owner, features)
        self._waiting.append(self._task(key, [rated], [rating]))
        if key not in self._supports:
            self._supports[key] = []
            self._users.append(key)
        support = self._supports[key]
        support.append((rated, rating))
        del support[: -self.support_size]
        if len(self._waiting) >= self.micro_batch:
            self._learn()

    def _rating(self, y: object) -> float:
        low, high = self.scale
        if isinstance(y, (bool, np.bool_)):
            return float(high if y else low)
        if not isinstance(y, numbers.Real):
            raise TypeError(f"a rating must be a number or a bool, not {type(y).__name__}")
        rating = float(y)
        if not low <= rating <= high:
            raise ValueError(f"rating {rating:g} is off the scale of {low:g} to {high:g}; set scale, or rescale the ratings")
        return rating

    def _task(self, user: str, items: Sequence[str], ratings: Sequence[float]) -> Task:
        """The user's support as it stands, and a query."""
        history = self._history(user)
        return Task(user, history.items, history.ratings, items, ratings, history)

    def _history(self, user: str) -> History:
        support = self._supports.get(user, [])
        return History.of([item for item, _ in support], [rating for _, rating in support])

    def _learn(self) -> None:
        """Learn from a micro-batch: all gradients at the model as it was; the memory writes go with the first.

        Every ``meta_update`` events there is a step along what they taught together, and one along what rehearsed users did.
        A user writes to the memories once, however many of the events are theirs.
        """
        model, size = self.model, self.meta_update
        groups: list[tuple[list[Task], set[str], bool]] = []
        written: set[str] = set()
        for start in range(0, len(self._waiting), size):
            group = self._waiting[start : start + size]
            event = self._learned + start
            completes = event // size != (event + len(group)) // size
            writers = {task.user for task in group if task.support_items} - written
            written |= writers
            groups.append((group, writers, completes))
            if completes and (rehearsed := self._rehearsal(event)):
                groups.append((rehearsed, set(), True))
        gradients: list[Gradient] = []
        writes: list[Writes | None] = []
        for span in passes(model, [len(tasks) for tasks, _, _ in groups]):
            adapted = adapt(model, *(tasks for tasks, _, _ in groups[span]), learning=True)
            found, writing = differentiate(model, adapted, *(writers for _, writers, _ in groups[span]))
            gradients += found
            writes.append(writing.composed())
        # The memory writes go with the first.
        parts = [(gradient, compose(writes) if place == 0 else None) for place, gradient in enumerate(gradients)]
        # Before the steps: whatever breaks them off, as a Ctrl-C in a notebook may, no event is learned twice.
        self._learned += len(self._waiting)
        self._users_before = len(self._users)
        self._waiting = []
        for (gradient, written_with), (_, _, completes) in zip(parts, groups, strict=True):
            if gradient.finite() and (written_with is None or written_with.finite()):
                self._parts.append((gradient, written_with))
            if completes and self._parts:
                self._optimiser.step(total([part for part, _ in self._parts]), compose(part for _, part in self._parts))
                self._parts = []

    def _rehearsal(self, event: int) -> list[Task]:
        """Tasks of users from before this micro-batch, drawn by the seed and the number of the event as a worker draws them."""
        if not self._users_before:
            return []
        generator = np.random.default_rng([self._seed, 0, event])
        drawn = dict.fromkeys(generator.integers(0, self._users_before, 4 * self.rehearsal_users).tolist())
        users = [self._users[number] for number in list(drawn)[: self.rehearsal_users]]
        return cut(users, [self._history(user) for user in users], self.rehearsal_query, generator)

    @contextmanager
    def _knowing(self, user: str, item: str | None, x: Features | None) -> Iterator[None]:
        """The profiles with ``x`` in them, for as long as it lasts."""
        changes = self._profiles(user, item, x)
        before = [(profiles, owner, profiles.features.get(owner)) for profiles, owner, _ in changes]
        try:
            for profiles, owner, after in changes:
                profiles.set(owner, after)
            yield
        finally:
            for profiles, owner, features in before:
                profiles.set(owner, features)

    def _profiles(self, user: str, item: str | None, x: Features | None) -> list[tuple[Profiles, str, dict[str, Value] | None]]:
        """The profiles that ``x`` changes: where they are held, whose they are, and what they then are."""
        changes = []
        schema = self.schema or FeatureSchema()
        for profiles, owner, declared in ((self.model.users, user, schema.user), (self.model.items, item, schema.item)):
            if x and owner is not None:
                given = {name: plain(name, x[name]) for name, feature in declared.items() if feature.kind != "id" and name in x}
                before = profiles.features.get(owner, {})
                after = {name: value for name, value in (dict(before) | given).items() if value is not None}
                if after != before:
                    changes.append((profiles, owner, after or None))
        return changes

    @property
    def _raw_memory_usage(self) -> int:
        # river follows references, which do not lead to what tensors hold.
        tensors, rows = checkpoint.export(self.model, self._optimiser)
        referred: int = super()._raw_memory_usage
        return referred + sum(tensor.nbytes for tensor in (*tensors.values(), *(values for _, values in rows.values())))

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: numbers as numpy has them, for torch writes addresses into it, and no two would be alike."""
        model = self.model
        tensors, rows = checkpoint.export(model, self._optimiser)
        state = {name: value for name, value in vars(self).items() if name != "_optimiser"}
        return state | {
            "_tensors": {name: tensor.numpy() for name, tensor in tensors.items()},
            "_rows": {name: (list(keys), values.numpy()) for name, (keys, values) in rows.items()},
            "_features": (dict(model.users.features), dict(model.items.features)),
            "_parts": [_arrays(*part) for part in self._parts],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors, rows, features = (state.pop(name) for name in ("_tensors", "_rows", "_features"))
        vars(self).update(state)
        self._optimiser = self._start()
        version = checkpoint.State(
            {name: torch.from_numpy(array) for name, array in tensors.items()},
            {name: (keys, torch.from_numpy(values)) for name, (keys, values) in rows.items()},
        )
        checkpoint.load(version, self.model, self._optimiser)
        self.model.users.features, self.model.items.features = features
        self._parts = [_tensors(*part) for part in state["_parts"]]

    @classmethod
    def _unit_test_params(cls) -> Iterator[dict[str, Any]]:
        yield {}
        yield {"scale": (0.0, 1.0), "micro_batch": 4}


def _arrays(gradient: Gradient, writes: Writes | None) -> tuple[Any, ...]:
    rows = {name: (list(part.keys), part.values.numpy()) for name, part in gradient.rows.items()}
    written = None if writes is None else {name: tensor.numpy() for name, tensor in writes.tensors().items()}
    return gradient.queries, gradient.vector.numpy(), rows, written


def _tensors(
    queries: int, vector: np.ndarray, rows: dict[str, Any], written: dict[str, np.ndarray] | None
) -> tuple[Gradient, Writes | None]:
    gradients = {name: RowGradients(keys, torch.from_numpy(values)) for name, (keys, values) in rows.items()}
    # A scalar comes back as one of numpy's, which is no array.
    writes = None if written is None else Writes(**{name: torch.as_tensor(array) for name, array in written.items()})
    return Gradient(queries, torch.from_numpy(vector), gradients), writes


def text(value: object) -> str:
    """An id or a category as text. Raises ValueError, naming it, where no UTF-8 has it, as it is of lone surrogates."""
    found = str(value)
    try:
        found.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{found!a} is no text that UTF-8 has; read the file that it is from in its own encoding") from None
    return found


def plain(name: str, value: object) -> Value | None:
    """A feature's value as profiles hold it, whatever kind of number or collection it came as. Raises TypeError naming the feature."""
    if value is None:
        return None
    if isinstance(value, str):
        return text(value)
    if isinstance(value, (numbers.Real, np.bool_)):
        return float(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(text, value))
    if isinstance(value, (list, tuple)):
        return list(map(text, value))
    raise TypeError(f"x[{name!r}]: a number, a text or a list of texts is needed, not {type(value).__name__}")
