"""The adaptation engine: the closed form and its gradients, for all tasks of a batch at once, with derivatives taken by hand.

`Mamo.forward` with autograd is the specification, and what tests hold this against. The same numbers come of less work here:

- The tasks of a user share one network, one matrix T and one prior, so that an item's features are x = T' z of z = [e_i, 1]. What a support
  tells of the last layer is then T' S T with S = Z' N Z, in which items are as all users see them: no task has features of its own.
- T is made of the rows of M_UI where a task is adapted, for 16 tasks in one product: to read a user's from memory takes longer.
- So items are embedded once, however many supports hold them, a task's rows z are gathered, and S is one product; supports need no padding.
- What is summed over a support on the way back is summed by item before anything else is done with it.
- All of it is compiled: what is done for each task (`model.kernels`), and what is done once for all users or items (`model.networks`).

Shapes as in `model.mamo` and `model.tasks`: B tasks in G groups, of U users, L interactions in all supports, q of a query, I different
items, J counted once for each group, F = d_e + 1, and E = F + 1 with the residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from model import kernels, networks
from model.mamo import Mamo, Prediction
from model.tasks import Batch

if TYPE_CHECKING:
    from model.kernels import Floats, Numbers


class Solved(NamedTuple):
    """What gradients go back through."""

    phi: networks.Phi
    rows: networks.Rows
    shared: networks.Shared
    given: kernels.Given
    found: kernels.Found


class Gradients(NamedTuple):
    """Of the summed query loss of each of G groups, at phi and at the rows that the group touches, by key.

    For the W users who write to the memories, also at their theta_u and M_uI.
    """

    vectors: Tensor  # (G, size of phi), in the order of Mamo.phi
    user_rows: Sequence[tuple[Sequence[str], Tensor]]
    item_rows: Sequence[tuple[Sequence[str], Tensor]]
    theta_u: Tensor | None  # (W, size of theta_u); None without writers
    mixing: Tensor | None  # (W, d_e, 2 d_e); None without writers or task memory


def solve(model: Mamo, batch: Batch) -> tuple[Prediction, Solved]:
    """Adapt every task to its support and score its query, as `Mamo.forward` does.

    A task whose precision matrix is not positive definite in floating point has NaN for scores and variances.
    """
    phi, rows, starts, task = model.in_place(), rows_of(model), batch.support.bounds.numpy(), batch.user_of.numpy()
    of_users, of_items = model.users.embedding(batch.user_places), model.items.embedding(batch.item_places)
    shared = networks.share(phi, rows, of_users, of_items, starts)
    given = kernels.Given(
        known=shared.known,
        item_of=batch.item_of.numpy(),
        items=batch.support.items.numpy(),
        ratings=batch.support.ratings.numpy(),
        starts=starts,
        decay=shared.decay,
        user_of=task,
        e_u=shared.users[-1],
        attention=shared.attention,
        mixing=rows.mixing,
        prior=shared.prior,
        prior_precision=shared.prior_precision,
        query_items=batch.query_items.numpy(),
        queries=batch.queries.numpy(),
        noise=shared.noise,
    )
    found = kernels.adapt(given)
    prediction = Prediction(
        score=torch.from_numpy(found.score),
        variance=torch.from_numpy(found.variance),
        attention=torch.from_numpy(shared.attention),
        p_u=torch.from_numpy(shared.p_u),
        theta_u=[],
        mixing=None,
        mixing_read=None,
        last_layer=torch.from_numpy(found.mean),
        last_layer_prior=torch.from_numpy(shared.profile_prior.take(task, 0)),
    )
    return prediction, Solved(phi, rows, shared, given, found)


def rows_of(model: Mamo) -> networks.Rows:
    """What attention reads of the memories, as the loops take it."""
    settings, memory = model.settings, model.memory
    gradient, mixing = memory.gradient.numpy(), memory.mixing.numpy().reshape(len(memory.mixing), -1)
    return networks.Rows(
        profile=memory.profile.numpy(),
        centre=memory.origin(centred=settings.centred),
        temperature=settings.temperature,
        gradient=gradient if settings.feature_memory else gradient[:0],
        mixing=mixing if settings.task_memory else mixing[:0],
        weights=memory.weights.numpy(),
        tau=settings.tau,
    )


def gradients(model: Mamo, batch: Batch, solved: Solved, at_score: Floats, at_variance: Floats, *, users: Numbers) -> Gradients:
    """The gradients of a loss that has gradients ``at_score`` and ``at_variance``, both (B, q), at the scores and variances.

    With A = T' S T + Lambda, t = T' s + Lambda w0, w = A^-1 t, V = A^-1 X' of queries X: score = x w + ..., variance = x A^-1 x + 1/N.
    So dw = A^-1 (dt - dA w) and d(x A^-1 x) = 2 v dx - v' dA v, of which all that follows is the transpose. ``users`` (W,) write.
    """
    phi, rows, shared, given, found = solved
    ends, item_of = batch.ends, given.item_of
    pulled = kernels.pull(given, found, ends.tasks, at_score, at_variance)
    back = networks.bring_back(phi, rows, shared, item_of, ends.users, ends.items, pulled, users)
    return Gradients(
        vectors=torch.from_numpy(back.vectors),
        user_rows=model.users.embed_back(batch.user_places, ends.users, back.users),
        item_rows=model.items.embed_back(batch.item_places.take(item_of), ends.items, back.items, back.biases),
        theta_u=torch.from_numpy(back.theta_u) if len(users) else None,
        mixing=torch.from_numpy(back.mixing) if len(users) and model.settings.task_memory else None,
    )
