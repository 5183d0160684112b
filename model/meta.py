"""The outer loop: what a step teaches the global model, and how the global model follows (Eq. 12 and the memory writes of Eq. 5, 6, 8).

A worker calls `learn` on a batch: scores, the gradient of the query loss, and the memory writes, all at one version. A trainer sums the
gradients of a round and calls `Optimiser.step`. Nothing here depends on who sends what to whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.mamo import SCALARS, Mamo, Prediction
from model.memory import Writes
from model.settings import ModelSettings
from model.tables import Table
from model.tasks import Batch, Task, collate


@dataclass
class RowGradients:
    """Gradients of rows of one table, by key: ``values`` is of shape (len(keys), width)."""

    keys: list[str]
    values: Tensor


@dataclass
class Gradient:
    """The gradient of a query loss, summed over ``queries``."""

    queries: int
    vector: Tensor  # of all phi, in the order of Mamo.phi
    rows: dict[str, RowGradients]


class Scores:
    """Scores and standard deviations (B, q) inside the rating scale; ``sd`` is None where the model has no variance."""

    def __init__(self, prediction: Prediction, scale: tuple[float, float]) -> None:
        self.score = prediction.score.detach().clamp(*scale)
        self.sd = None if prediction.variance is None else prediction.variance.detach().sqrt()


def predict(model: Mamo, tasks: Sequence[Task]) -> Scores:
    """Score the queries of tasks, and learn nothing."""
    with torch.set_grad_enabled(bool(model.settings.inner_steps)):  # the inner loop needs gradients of its own
        leaves, batch = model.leaves(collate(tasks, model.users, model.items, model.dtype), requires_grad=False)
        return Scores(model.forward(leaves, batch), model.scale)


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


def learn(model: Mamo, tasks: Sequence[Task], *, write: bool) -> tuple[Scores, Gradient, Writes | None]:
    """Score the queries of tasks; differentiate their loss; with ``write``, compose one memory write for each user with a support."""
    leaves, batch = model.leaves(collate(tasks, model.users, model.items, model.dtype), requires_grad=True)
    prediction = model.forward(leaves, batch)
    loss = query_loss(model.settings, prediction, batch).sum()
    at_users = [*prediction.theta_u, *([] if prediction.mixing is None else [prediction.mixing])] if write else []
    inputs = [*leaves.phi.values(), leaves.user_values, leaves.item_values, *at_users]
    gradients = list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    of_users = [gradients.pop() for _ in at_users][::-1]
    of_items, of_user_rows = gradients.pop(), gradients.pop()
    gradient = Gradient(
        queries=int(batch.query_mask.sum()),
        vector=torch.cat([part.flatten() for part in gradients]),
        rows={"user": RowGradients(leaves.user_keys, of_user_rows), "item": RowGradients(leaves.item_keys, of_items)},
    )
    writes = compose_writes(model, batch, prediction, of_users) if write and model.settings.memory != "off" else None
    return Scores(prediction, model.scale), gradient, writes


def compose_writes(model: Mamo, batch: Batch, prediction: Prediction, gradients: list[Tensor]) -> Writes:
    """One write for each user that has a support, in the order of their first task, composed.

    ``gradients`` are those of the query loss at ``prediction.theta_u`` and ``prediction.mixing``, by user or by task. The gradient of
    Eq. 6 is the mean over the user's queries, first order; what adaptation changed, in Eq. 8 and for M_w, is that of the user's last task.
    """
    settings, memory = model.settings, model.memory
    writes = Writes.nothing(memory)
    task_of = batch.user_of.tolist()
    supported = batch.support_mask.any(1).tolist()
    last = {user: task for task, user in enumerate(task_of) if supported[task]}
    by_user = torch.zeros(len(batch.users), dtype=model.dtype).index_add_(0, batch.user_of, batch.query_mask.sum(1)).clamp(min=1)
    flat = torch.cat([gradient.flatten(1) for gradient in gradients[: len(prediction.theta_u)]], 1)
    if settings.adapts_inner_layers:
        flat = torch.zeros(len(batch.users), flat.shape[1], dtype=model.dtype).index_add_(0, batch.user_of, flat)
    for user in sorted(last):
        task = last[user]
        change = torch.zeros_like(memory.mixing[0])
        if prediction.mixing is not None and prediction.mixing_read is not None:
            if settings.adapts_inner_layers:
                change = prediction.mixing[task].detach() - prediction.mixing_read[user].detach()
            else:
                change = -settings.task_step * gradients[-1][user] / by_user[user]
        weights = torch.zeros_like(memory.weights[0])
        if prediction.last_layer is not None and prediction.last_layer_prior is not None:
            weights = (prediction.last_layer[task] - prediction.last_layer_prior[task]).detach()
        one = Writes.of_user(
            settings,
            memory.centre,
            prediction.attention[user].detach(),
            prediction.p_u[user].detach(),
            flat[user] / by_user[user],
            change,
            weights,
        )
        writes = writes.then(one)
    return writes


def total(gradients: Sequence[Gradient]) -> Gradient:
    """The sum of the gradients of a round. ``rows`` keep the order in which keys first come."""
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


class Optimiser:
    """Eq. 12: phi follows the gradient of a round, by plain steps (SGD) or by Adam (Kingma and Ba, 2015).

    Rows that the gradient does not touch are not updated, so that a step costs what the round holds and not what the catalogue holds:
    their moments wait, and decay applies when they are touched. ``count`` is the number of steps made, Adam's t. ``moments`` are
    the running first and second moments of phi (2, size) and, in a table beside each embedding table, of its rows (first | second).
    """

    def __init__(self, model: Mamo, *, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        settings = model.settings
        self.model = model
        self.betas = betas
        self.count = 0
        self.moments = model.vector.new_zeros(2, len(model.vector))
        self.row_moments = {
            name: Table(f"{name}.moments", 2 * table.width, deviation=0, zero_from=0, seed=0, max_rows=2**62, overflow_rows=1)
            for name, table in model.tables.items()
        }
        for name, table in self.row_moments.items():
            table.values = table.values.to(model.tables[name].values.dtype)

        def spread(scalars: float, prior: float, networks: float) -> Tensor:
            return torch.cat(
                [
                    torch.full((value.numel(),), scalars if name in SCALARS else prior if name.startswith("prior.") else networks)
                    for name, value in model.phi.items()
                ]
            ).to(model.vector.dtype)

        self.rates = spread(settings.scalar_rate, settings.learning_rate, settings.learning_rate)
        self.decays = spread(0.0, settings.prior_decay, 0.0)
        if "log_prior" in model.phi:
            model.of_vector(self.decays)["log_prior"].fill_(settings.prior_decay)

    def step(self, gradient: Gradient, writes: Writes | None) -> dict[str, list[str]]:
        """One optimiser step and the memory writes of a round; returns the keys of the rows that changed, by table.

        Under ``reduction = mean`` the sum of gradients is divided by the number of queries; memory writes are not.
        """
        model, settings = self.model, self.model.settings
        self.count += 1
        scale = 1 / max(1, gradient.queries) if settings.reduction == "mean" else 1.0
        vector, self.moments = self._follow(model.vector, gradient.vector * scale, self.moments, self.rates, self.decays)
        model.set_vector(vector)
        changed = {}
        for name, part in gradient.rows.items():
            table, moments = model.tables[name], self.row_moments[name]
            # Keys past the table's bound share a row, and their gradients add up.
            unique, place = torch.unique(torch.tensor(table.admit(part.keys), dtype=torch.int64), return_inverse=True)
            summed = part.values.new_zeros(len(unique), table.width).index_add_(0, place, part.values)
            keys = [table.keys[row] for row in unique.tolist()]
            at = torch.tensor(moments.admit(keys), dtype=torch.int64)
            before = moments.values[at].view(len(at), 2, table.width).transpose(0, 1)
            rate, decay = torch.tensor(settings.learning_rate), torch.tensor(settings.weight_decay)
            table.values[unique], after = self._follow(table.values[unique], summed * scale, before, rate, decay)
            moments.values[at] = after.transpose(0, 1).reshape(len(at), -1)
            changed[name] = keys
        if writes is not None:
            model.memory = writes.apply(model.memory)
        return changed

    def _follow(self, value: Tensor, gradient: Tensor, moments: Tensor, rate: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        gradient = gradient + decay * value
        if self.model.settings.optimiser == "sgd":
            return value - rate * gradient, moments
        b1, b2 = self.betas
        first = torch.lerp(gradient, moments[0], b1)
        second = torch.lerp(gradient.square(), moments[1], b2)
        unbiased = (second / (1 - b2**self.count)).sqrt() + 1e-8
        return value - rate / (1 - b1**self.count) * first / unbiased, torch.stack([first, second])
