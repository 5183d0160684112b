"""The outer loop: what a step teaches the global model, and how the global model follows (Eq. 12 and the memory writes of Eq. 5, 6, 8).

A worker calls `adapt` on a batch of tasks and `differentiate` on the result: scores, the gradient of the query loss and the memory writes,
all at one version. A trainer sums the gradients of a round and calls `Optimiser.step`. Nothing here depends on who sends what to whom.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import adam, engine, kernels, steps
from model.mamo import SCALARS, Leaves, Mamo, Prediction
from model.memory import Writes
from model.memorykernels import of_writers
from model.numbering import distinct, last_tasks
from model.settings import RATINGS, ModelSettings
from model.tasks import Batch, Task, collate

if TYPE_CHECKING:
    from model.kernels import Floats, Numbers


@dataclass
class RowGradients:
    """Gradients of rows of one table, by key: ``values`` is of shape (len(keys), width)."""

    keys: Sequence[str]
    values: Tensor


@dataclass
class Gradient:
    """The gradient of a query loss, summed over ``queries``."""

    queries: int
    vector: Tensor  # of all phi, in the order of Mamo.phi
    rows: dict[str, RowGradients]

    def finite(self) -> bool:
        """Whether all numbers are finite, their squares as well: one step along one that is not would end all learning."""
        return all(kernels.finite(values.numpy().ravel()) for values in (self.vector, *(part.values for part in self.rows.values())))

    def weighted(self, weight: float) -> Gradient:
        """The gradient times ``weight``, of as many queries."""
        rows = {name: RowGradients(part.keys, part.values * weight) for name, part in self.rows.items()}
        return Gradient(self.queries, self.vector * weight, rows)


class Scores:
    """Scores and standard deviations (B, q) on the ratings' own scale and inside it; ``sd`` is None where the model has no variance.

    Where adaptation diverged there is nothing to score from: the middle of the scale, with the width of the scale as its deviation.
    Each is made when it is asked for: nobody asks for those of tasks that are only learned from.
    """

    def __init__(self, prediction: Prediction, scale: tuple[float, float]) -> None:
        self._prediction = prediction
        self._scale = scale
        self._factor = (scale[1] - scale[0]) / (RATINGS[1] - RATINGS[0])

    @cached_property
    def score(self) -> Tensor:
        """Scores (B, q)."""
        return torch.from_numpy(kernels.inside(self._prediction.score.detach().cpu().numpy(), RATINGS[0], self._factor, *self._scale))

    @cached_property
    def sd(self) -> Tensor | None:
        """Standard deviations (B, q)."""
        variance, (low, high) = self._prediction.variance, self._scale
        return None if variance is None else torch.from_numpy(kernels.deviations(variance.detach().cpu().numpy(), self._factor, high - low))

    def pairs(self) -> list[tuple[float, float | None]]:
        """Score and standard deviation of each task's first query."""
        score = self.score[:, 0].tolist()
        return list(zip(score, [None] * len(score) if self.sd is None else self.sd[:, 0].tolist(), strict=True))


class Adapted(NamedTuple):
    """A batch of tasks, adapted and scored; what `differentiate` goes on from."""

    batch: Batch
    prediction: Prediction
    scores: Scores
    way: Leaves | engine.Solved | steps.Stepped | None
    """How gradients get back: to leaves by autograd, or through what an engine keeps; None where nothing can be differentiated."""


PASS_TASKS = 512
"""Tasks that the engine takes at once: enough for products to be worth their calls, few enough to stay in the cache."""


def passes(model: Mamo, sizes: Sequence[int]) -> Iterator[slice]:
    """Which groups of so many tasks each to adapt together: as many as are best taken at once. By autograd each goes alone."""
    start, tasks = 0, 0
    for end, size in enumerate(sizes):
        if end > start and (not model.analytic or tasks + size > PASS_TASKS):
            yield slice(start, end)
            start, tasks = end, 0
        tasks += size
    if sizes:
        yield slice(start, len(sizes))


def adapt(model: Mamo, *groups: Sequence[Task], learning: bool) -> Adapted:
    """Adapt each task and score its query, all at once; groups only say which tasks share a gradient.

    Without ``learning`` nothing can be differentiated.
    """
    batch = collate(groups, model.users, model.items, model.scale, model.dtype)
    way: Leaves | engine.Solved | steps.Stepped
    if model.plain:
        # The inner loop needs gradients of its own, learning or not.
        way, batch = model.leaves(batch, requires_grad=learning or model.settings.inner_steps > 0)
        with torch.set_grad_enabled(way.item_values.requires_grad):
            prediction = model.forward(way, batch)
    elif model.closed_form:
        prediction, way = engine.solve(model, batch)
    else:
        prediction, way = steps.solve(model, batch, learning=learning)
    return Adapted(batch, prediction, Scores(prediction, model.scale), way if learning else None)


def predict(model: Mamo, tasks: Sequence[Task]) -> Scores:
    """Score the queries of tasks, and learn nothing."""
    return adapt(model, tasks, learning=False).scores


def query_loss(settings: ModelSettings, prediction: Prediction, batch: Batch) -> Tensor:
    """The loss of each query, shape (B, q), 0 where padded.

    Squared error, or the Gaussian log loss (log v + (r - y)^2 / v) / 2 at the closed form's variance v. The score is taken as it is,
    before it is brought inside the scale, where its gradient would vanish.
    """
    error = (batch.query_ratings - prediction.score).square()
    if settings.loss == "gaussian":
        assert prediction.variance is not None  # noqa: S101  settings refuse this loss without a variance
        error = 0.5 * (prediction.variance.log() + error / prediction.variance)
    return error * batch.query_mask


def query_slopes(settings: ModelSettings, prediction: Prediction, batch: Batch) -> tuple[Floats, Floats]:
    """The derivatives of `query_loss` by score and by variance, both (B, q)."""
    ratings, mask = batch.query_ratings.numpy(), batch.query_mask.numpy()
    if settings.loss == "squared" or prediction.variance is None:
        error = prediction.score.numpy() - ratings
        return 2 * error * mask, np.zeros_like(error)
    # What is not finite ends as a gradient that the trainer refuses.
    return kernels.slopes_of(prediction.score.numpy(), prediction.variance.numpy(), ratings, mask)


class Writing(NamedTuple):
    """What users write to the memories, not yet composed."""

    model: Mamo
    adapted: Adapted
    users: Numbers | None  # (W,), of those who write, in order, and the task that each is written of; None where nobody was named
    tasks: Numbers
    theta_u: Tensor | None  # gradients of these users: see `engine.Gradients`
    mixing: Tensor | None

    def composed(self) -> Writes | None:
        """One write for each user, in order, composed; None where nobody was named, or there are no memories.

        The gradient of Eq. 6 is the mean over the user's queries, first order; what adaptation changed, in Eq. 8 and for M_w, is that of
        the user's last task.
        """
        if self.users is None:
            return None
        settings, memory, prediction, batch = self.model.settings, self.model.memory, self.adapted.prediction, self.adapted.batch

        def on_host(values: Tensor) -> np.ndarray:
            return np.ascontiguousarray(values.detach().cpu().numpy())

        def or_nothing(values: Tensor | None, count: int, like: Tensor) -> Floats:
            return np.zeros((count, *like.shape[1:]), like.numpy().dtype) if values is None else on_host(values)

        writers, tasks = len(self.users), len(batch.user_of)
        attention, p_u, gradient, change, weights = of_writers(
            self.users,
            self.tasks,
            on_host(batch.user_of),
            on_host(batch.queries),
            on_host(prediction.attention),
            on_host(prediction.p_u),
            or_nothing(self.theta_u, writers, memory.gradient),
            or_nothing(self.mixing, writers, memory.mixing),
            or_nothing(prediction.last_layer, tasks, memory.weights),
            or_nothing(prediction.last_layer_prior, tasks, memory.weights),
            settings.task_step,
        )
        if prediction.mixing is not None and prediction.mixing_read is not None and settings.adapts_inner_layers:
            change = on_host(prediction.mixing).take(self.tasks, 0) - on_host(prediction.mixing_read).take(self.users, 0)
        return Writes.of_users(settings, memory.centre.numpy(), attention, p_u, gradient, change, weights)


def differentiate(model: Mamo, adapted: Adapted, *writers: Collection[str]) -> tuple[list[Gradient], Writing]:
    """The gradient of the summed query loss of each group, and what the users whom ``writers`` names write to the memories.

    Writers are given by group, for the first groups or all. A user who has no support in that group writes nothing.
    Profiles must be those that the batch was adapted with: gradients go to the rows that they are made of.
    """
    batch, prediction, way = adapted.batch, adapted.prediction, adapted.way
    users, tasks = _writing(batch, writers)
    if isinstance(way, engine.Solved):
        found = engine.gradients(model, batch, way, *query_slopes(model.settings, prediction, batch), users=users)
    elif isinstance(way, steps.Stepped) and model.analytic:
        at_score, _ = query_slopes(model.settings, prediction, batch)
        found = steps.gradients(model, batch, way, torch.from_numpy(at_score), users=torch.from_numpy(users))
    else:
        found = _by_autograd(model, adapted, torch.from_numpy(users))
    queries = batch.queries.tolist()
    gradients = [
        Gradient(
            queries=sum(queries[tasks]),
            vector=found.vectors[group],
            rows={"user": RowGradients(*found.user_rows[group]), "item": RowGradients(*found.item_rows[group])},
        )
        for group, tasks in enumerate(batch.tasks_of)
    ]
    named = any(writers) and model.settings.memory != "off"
    return gradients, Writing(model, adapted, users if named else None, tasks, found.theta_u, found.mixing)


def _writing(batch: Batch, writers: Sequence[Collection[str]]) -> tuple[Numbers, Numbers]:
    """The numbers of the users who write, in order, and of the last task of each that has a support."""
    named = np.zeros(len(batch.users), np.bool_)
    for names, of in zip(writers, batch.users_of, strict=False):
        named[of] = np.fromiter(map(names.__contains__, batch.users[of]), np.bool_)
    return last_tasks(named, batch.user_of.cpu().numpy(), batch.support.bounds.cpu().numpy())


def _by_autograd(model: Mamo, adapted: Adapted, users: Tensor) -> engine.Gradients:
    """What `engine.gradients` finds, of a batch of one group by the graph of `Mamo.forward` or of `steps.solve`."""
    batch, prediction = adapted.batch, adapted.prediction
    stepped = adapted.way if isinstance(adapted.way, steps.Stepped) else None
    leaves = adapted.way if stepped is None else stepped.leaves
    assert isinstance(leaves, Leaves), "adapted without learning"  # noqa: S101
    # What is written is a gradient at nodes of the plain graph; the engine of gradient steps goes back to it by hand.
    nodes = [] if stepped or not len(users) else [*prediction.theta_u, *([] if prediction.mixing is None else [prediction.mixing])]
    inputs = [*leaves.phi.values(), leaves.user_values, leaves.item_values, *nodes]
    loss = query_loss(model.settings, prediction, batch).sum()
    # What the loss does not depend on is made up of zeros that may be leaves of a graph of their own.
    found = [part.detach() for part in torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]
    written = [found.pop() for _ in nodes][::-1]
    of_items, of_user_rows = found.pop(), found.pop()
    theta_u = mixing = None
    if stepped is not None:
        at_score, _ = query_slopes(model.settings, prediction._replace(score=prediction.score.detach()), batch)
        theta_u, mixing = steps.writings(model, batch, steps.pull(stepped, torch.from_numpy(at_score)), users)
    elif nodes:
        if model.settings.adapts_inner_layers:
            written = [part.new_zeros(len(batch.users), *part.shape[1:]).index_add_(0, batch.user_of, part) for part in written]
        written = [part[users] for part in written]
        mixing = None if prediction.mixing is None else written.pop()
        theta_u = torch.cat([part.flatten(1) for part in written], 1)
    return engine.Gradients(
        vectors=torch.cat([part.flatten() for part in found])[None].cpu(),
        user_rows=[(leaves.user_keys, of_user_rows.cpu())],
        item_rows=[(leaves.item_keys, of_items.cpu())],
        theta_u=None if theta_u is None else theta_u.cpu(),
        mixing=None if mixing is None else mixing.cpu(),
    )


def total(gradients: Sequence[Gradient]) -> Gradient:
    """The sum of the gradients of a round. ``rows`` keep the order in which keys first come."""
    if len(gradients) == 1:
        return gradients[0]
    rows = {}
    for table in gradients[0].rows:
        parts = [gradient.rows[table] for gradient in gradients]
        keys = list(dict.fromkeys(key for part in parts for key in part.keys))
        place = {key: number for number, key in enumerate(keys)}
        values = parts[0].values.new_zeros(len(keys), parts[0].values.shape[1])
        for part in parts:
            values.index_add_(0, torch.tensor([place[key] for key in part.keys], dtype=torch.int64), part.values)
        rows[table] = RowGradients(keys, values)
    vector = torch.stack([gradient.vector for gradient in gradients]).sum(0)
    return Gradient(sum(gradient.queries for gradient in gradients), vector, rows)


CLOCK = 1 << 23
"""Steps are remembered modulo this, which float32 holds exactly."""


class Optimiser:
    """Eq. 12: phi follows the gradient of a round, by plain steps (SGD) or by Adam (Kingma and Ba, 2015).

    A step costs what the round holds, not what the catalogue holds: a row that the gradient does not touch is left alone, and once it is
    touched it catches up with what Adam would have done meanwhile. Its second moment has decayed by b2 a step; L2 decay has pulled it to 0
    at the rate that this moment allows. Its momentum would have been spent, so rows have none: a gradient acts at once and in full.

    ``count`` is the number of steps made, Adam's t. ``moments`` (2, size) are those of phi; beside each row of an embedding
    table, (width + 1,), stand its second moment and the step at which it was last touched (`moments_of`).
    """

    def __init__(self, model: Mamo, *, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        settings = model.settings
        self.model = model
        self.betas = betas
        self.count = 0
        self.moments = model.vector.new_zeros(2, len(model.vector))
        for table in model.tables.values():
            table.beside = table.values.new_zeros(len(table.values), table.width + 1)
        self.row_decays = {"user": settings.user_decay, "item": settings.weight_decay}
        self.rates = self._by_name(settings.network_rate, prior=settings.learning_rate, rating=settings.learning_rate)
        for name in SCALARS:
            self._fill(self.rates, name, settings.mean_rate if name == "mean" else settings.scalar_rate)
        self.decays = self._by_name(0.0, prior=settings.prior_decay)
        self._fill(self.decays, "log_prior", settings.prior_decay)

    def _by_name(self, default: float, **of_network: float) -> Tensor:
        """A number for each number of phi: that of its network (the name's first part), or the default."""
        parts = [torch.full((value.numel(),), of_network.get(name.split(".")[0], default)) for name, value in self.model.phi.items()]
        return torch.cat(parts).to(self.model.dtype)

    def _fill(self, vector: Tensor, name: str, value: float) -> None:
        if name in self.model.spans:
            vector[self.model.spans[name]] = value

    def step(self, gradient: Gradient, writes: Writes | None) -> dict[str, Numbers]:
        """One optimiser step and the memory writes of a round; returns the numbers of the rows that changed, by table.

        Under ``reduction = mean`` the sum of gradients is divided by the number of queries; memory writes are not.
        """
        model, settings = self.model, self.model.settings
        self.count += 1
        scale = 1 / max(1, gradient.queries) if settings.reduction == "mean" else 1.0
        model.set_vector(self._follow(model.vector.numpy(), gradient.vector.numpy(), scale))
        changed = {}
        for name, part in gradient.rows.items():
            table = model.tables[name]
            rows = table.admit(part.keys)
            changed[name], summed = distinct(rows, table.cells), part.values
            if len(changed[name]) < len(rows):
                # Keys past the table's bound share a row, and their gradients add up.
                summed = summed.new_zeros(len(changed[name]), table.width).index_add_(0, torch.from_numpy(table.cells[rows]), summed)
            self._follow_rows(name, changed[name], summed, scale)
        if writes is not None:
            model.memory = writes.apply(model.memory)
        return changed

    def moments_of(self, name: str) -> Tensor:
        """The moments of a table's rows, (allotted, width + 1)."""
        moments = self.model.tables[name].beside
        assert moments is not None, "the optimiser of another model"  # noqa: S101
        return moments

    def _follow(self, value: Floats, gradient: Floats, scale: float) -> Tensor:
        """Phi (size,) after a step along its gradient times ``scale``."""
        rates, decays = self.rates.numpy(), self.decays.numpy()
        if self.model.settings.optimiser == "sgd":
            return torch.from_numpy(value - rates * (gradient * scale + decays * value))
        followed, moments = adam.follow(value, self.moments.numpy(), gradient, scale, rates, decays, *self.betas, self.count)
        self.moments = torch.from_numpy(moments)
        return torch.from_numpy(followed)

    def _follow_rows(self, name: str, rows: Numbers, gradient: Tensor, scale: float) -> None:
        """Move ``rows`` (m,) of a table along their gradient (m, width) times ``scale``."""
        settings, values, decay = self.model.settings, self.model.tables[name].values, self.row_decays[name]
        if settings.optimiser == "sgd":
            old = values[rows]
            values[rows] = old - settings.row_rate * (gradient * scale + decay * old)
            return
        moments = self.moments_of(name).numpy()
        known = gradient.contiguous().numpy(), scale, settings.row_rate, decay, self.betas[1]
        adam.follow_rows(values.numpy(), moments, rows, *known, self.count, CLOCK)
