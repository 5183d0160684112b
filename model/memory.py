"""MAMO's memories: what is read from them (Eq. 3, 4, 7) and how they are written (Eq. 5, 6, 8).

Memories learn by their writes alone, never by gradients. A write is a linear map of the rows and an addition, so writes compose: a
worker sends the writes of a whole step as one `Writes`, and the trainer composes those of a round, in order, before it applies them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from model import kernels
from model.compiled import borrowing, compiled
from model.products import accumulate, multiply, multiply_rows, scale, turn
from model.rowkernels import add
from model.settings import ModelSettings, rate

if TYPE_CHECKING:
    from model.kernels import Floats, Numbers


SHORT = 1e-8
"""A vector that is shorter has no direction."""


@dataclass
class Memory:
    """The memories, K rows each."""

    profile: Tensor  # M_P (K, d_u)
    gradient: Tensor  # M_U (K, size of theta_u)
    mixing: Tensor  # M_UI (K, d_e, 2 d_e)
    weights: Tensor  # M_w (K, F), the task memory of the closed form's last layer
    centre: Tensor  # (d_u,), running mean of the profiles written

    def attention(self, p_u: Tensor, temperature: float, *, centred: bool) -> Tensor:
        """Eq. 3: a_u = softmax(temperature cosine(p_u, M_P)) of profiles (U, d_u) -> (U, K), less the mean profile if ``centred``.

        No gradient flows through a_u: M_P averages the profiles, and a profile that learns to be attended to would chase it.
        """
        looked = (p_u.detach() - self.centre) if centred else p_u.detach()
        return torch.softmax(temperature * (normalize(looked, eps=SHORT) @ normalize(self.profile, eps=SHORT).T), -1)

    def attend(self, p_u: Floats, temperature: float, *, centred: bool) -> Floats:
        """As `attention`, of arrays and compiled."""
        centre = self.centre.numpy() if centred else np.zeros(p_u.shape[1], p_u.dtype)
        return attend(p_u, self.profile.numpy(), centre, temperature)

    def to(self, device: torch.device) -> Memory:
        """The same on a device; itself where it is there already."""
        return self if self.profile.device == device else Memory(**{name: value.to(device) for name, value in vars(self).items()})

    def row_spread(self) -> float:
        """How different the rows of M_P are: one less their mean pairwise cosine, 0 when all are collinear."""
        k = len(self.profile)
        if k == 1:
            return 0.0
        unit = normalize(self.profile, eps=SHORT).numpy()
        cosine = unit @ unit.T
        return float(1 - (cosine.sum() - cosine.trace()) / (k * (k - 1)))


def user_spread(attention: Tensor) -> float:
    """How different the attention (U, K) of users is: the mean share of it that would have to move for a user to be like the average."""
    of_users = attention.cpu().numpy()
    return float(np.abs(of_users - of_users.mean(0)).sum(1).mean() / 2)


@dataclass
class Writes:
    """A composed write, one (decay, delta) for each row of each memory; for M_UI the decay is a matrix.

    M_P[k] <- profile_decay[k] M_P[k] + profile[k], and so for the others; M_UI <- mixing_map M_UI + mixing, for Eq. 8 reads a_u^T M_UI
    anew at each write: with D = diag(decay) and the change C that adaptation made to M_uI, a write of user u is
    M_UI <- D M_UI + g a_u (a_u^T M_UI + C) = (D + g a_u a_u^T) M_UI + g a_u C, a product that does not commute.
    """

    profile_decay: Tensor  # (K,)
    profile: Tensor  # (K, d_u)
    centre_decay: Tensor  # ()
    centre: Tensor  # (d_u,)
    gradient_decay: Tensor  # (K,)
    gradient: Tensor  # (K, size of theta_u)
    mixing_map: Tensor  # (K, K)
    mixing: Tensor  # (K, d_e, 2 d_e)
    weights_decay: Tensor  # (K,)
    weights: Tensor  # (K, F)

    @classmethod
    def nothing(cls, memory: Memory) -> Self:
        """The write that changes nothing, the unit of `then`."""
        ones = torch.ones(len(memory.profile), dtype=memory.profile.dtype)
        return cls(
            profile_decay=ones,
            profile=torch.zeros_like(memory.profile),
            centre_decay=ones[0],
            centre=torch.zeros_like(memory.centre),
            gradient_decay=ones,
            gradient=torch.zeros_like(memory.gradient),
            mixing_map=torch.diag(ones),
            mixing=torch.zeros_like(memory.mixing),
            weights_decay=ones,
            weights=torch.zeros_like(memory.weights),
        )

    @classmethod
    def of_users(
        cls,
        settings: ModelSettings,
        centre: Floats,
        attention: Floats,
        p_u: Floats,
        gradient: Floats,
        mixing_change: Floats,
        weights: Floats,
    ) -> Self:
        """The writes of users with attention a_u (U, K), one after the other, as one.

        Eq. 5 takes ``p_u`` (U, d_u), Eq. 6 the ``gradient`` (U, size) of the query loss at the adapted theta_u, Eq. 8 ``mixing_change``
        (U, d_e, 2 d_e), what adaptation added to M_uI; M_w takes, in the form of Eq. 5, ``weights`` (U, F), the adapted w less what the
        profile predicted of it.

        The paper lets a row forget at one rate, (1 - alpha) M_P, attended to or not. Gated, it forgets as it is written: 1 - alpha a_u.
        A centred M_P averages what attention looks at, the profile less ``centre``, the mean profile of the version read.
        """
        alpha, beta, gamma = rate(settings.profile_half_life), rate(settings.gradient_half_life), rate(settings.task_half_life)
        flat = mixing_change.reshape(len(mixing_change), math.prod(mixing_change.shape[1:]))
        *parts, mixing, decay, of_weights = write(
            attention, p_u, gradient, weights, centre, flat, alpha, beta, gamma, settings.gated, settings.centred
        )
        return cls(*map(torch.from_numpy, (*parts, mixing.reshape(-1, *mixing_change.shape[1:]), decay, of_weights)))

    def then(self, later: Self) -> Self:
        """The one write that does what this write and then ``later`` do. Associative, not commutative."""
        return type(self)(
            profile_decay=later.profile_decay * self.profile_decay,
            centre_decay=later.centre_decay * self.centre_decay,
            gradient_decay=later.gradient_decay * self.gradient_decay,
            mixing_map=later.mixing_map @ self.mixing_map,
            weights_decay=later.weights_decay * self.weights_decay,
            # What was added until then fares as a memory does.
            **vars(later.apply(Memory(self.profile, self.gradient, self.mixing, self.weights, self.centre))),
        )

    def apply(self, memory: Memory) -> Memory:
        """The memory after this write."""
        kept = (self.profile_decay, self.gradient_decay, self.mixing_map, self.weights_decay, self.centre_decay)
        added = (self.profile, self.gradient, self.weights, self.centre)
        before = (memory.profile, memory.gradient, memory.weights, memory.centre)
        mixing, added_mixing = memory.mixing.numpy(), self.mixing.numpy()
        profile, gradient, weights, centre, followed = follow(
            *(part.numpy() for part in (*kept, *added, *before)), *(part.reshape(len(part), -1) for part in (added_mixing, mixing))
        )
        arrays = profile, gradient, followed.reshape(mixing.shape), weights, centre
        return Memory(*map(torch.from_numpy, arrays))

    def weighted(self, weight: float) -> Self:
        """The write that goes only this part of the way, from the memory as it is (0) to the memory after this write (1)."""
        still = torch.eye(len(self.mixing_map), dtype=self.mixing_map.dtype)
        return type(self)(
            profile_decay=1 + weight * (self.profile_decay - 1),
            profile=weight * self.profile,
            centre_decay=1 + weight * (self.centre_decay - 1),
            centre=weight * self.centre,
            gradient_decay=1 + weight * (self.gradient_decay - 1),
            gradient=weight * self.gradient,
            mixing_map=still + weight * (self.mixing_map - still),
            mixing=weight * self.mixing,
            weights_decay=1 + weight * (self.weights_decay - 1),
            weights=weight * self.weights,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The parts by name, as they travel."""
        return dict(vars(self))

    def finite(self) -> bool:
        """Whether no number is infinite or NaN."""
        return all(kernels.finite(tensor.numpy().ravel()) for tensor in self.tensors().values())


@compiled
def attend(p_u: Floats, profile: Floats, centre: Floats, temperature: float) -> Floats:
    """As `Memory.attention`, of profiles (U, d_u) and rows (K, d_u), less ``centre`` (d_u,): (U, K)."""
    kind, size = p_u.dtype, profile.shape[1]
    looked, towards, turned = np.empty_like(p_u), np.empty_like(profile), np.empty((size, len(profile)), kind)
    attention, square = np.empty((len(p_u), len(profile)), kind), np.empty((1, 1), kind)
    attend_to(p_u, profile, centre, kind.type(temperature), looked, towards, turned, square, attention)
    return attention


@borrowing
def attend_to(
    p_u: Floats,
    profile: Floats,
    centre: Floats,
    temperature: np.floating,
    looked: Floats,
    towards: Floats,
    turned: Floats,
    square: Floats,
    into: Floats,
) -> None:
    """The loop of `attend`; ``looked`` (U, d_u), ``towards`` (K, d_u), ``turned`` (d_u, K) and ``square`` (1, 1) are room."""
    for row in range(len(profile)):
        by = 1 / length(profile, row, square)
        for k in range(len(centre)):
            towards[row, k] = profile[row, k] * by
    turn(towards, turned)
    for user in range(len(p_u)):
        for k in range(len(centre)):
            looked[user, k] = p_u[user, k] - centre[k]
    multiply(looked, turned, into)
    for user in range(len(p_u)):
        cosines, sharpness = into[user], temperature / length(looked, user, square)
        most, total = -np.inf, 0.0
        for row in range(len(cosines)):
            cosines[row] *= sharpness
            most = max(most, float(cosines[row]))
        for row in range(len(cosines)):
            cosines[row] = math.exp(cosines[row] - most)
            total += cosines[row]
        for row in range(len(cosines)):
            cosines[row] /= total


@borrowing
def length(values: Floats, row: int, square: Floats) -> float:
    """The length of a row, `SHORT` where it is shorter; ``square`` (1, 1) is room."""
    of = values[row : row + 1]
    multiply_rows(of, of, square)
    return max(SHORT, math.sqrt(square[0, 0]))


@compiled
def of_writers(
    users: Numbers,
    tasks: Numbers,
    user_of: Numbers,
    queries: Numbers,
    attention: Floats,
    p_u: Floats,
    theta_u: Floats,
    mixing: Floats,
    last_layer: Floats,
    last_layer_prior: Floats,
    step: float,
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """What `Writes.of_users` takes, of the W ``users`` who write, from what is known of all U users and B tasks.

    ``tasks`` (W,) is the task that each is written of; ``queries`` (B,) counts those of each task. ``theta_u`` (W, size) and ``mixing``
    (W, d_e, 2 d_e) are sums of gradients over a user's queries: the first counts as their mean, the second as a step along it.
    """
    asked, kind = np.zeros(len(p_u), np.int64), p_u.dtype.type
    for task in range(len(user_of)):
        asked[user_of[task]] += queries[task]
    gradient, change, one = np.empty_like(theta_u), np.empty_like(mixing), kind(1)
    flat = (len(users), mixing.shape[1] * mixing.shape[2])
    changes, mixings = change.reshape(flat), mixing.reshape(flat)
    attended, profiles = np.empty((len(users), attention.shape[1]), p_u.dtype), np.empty((len(users), p_u.shape[1]), p_u.dtype)
    weights = np.empty((len(users), last_layer.shape[1]), p_u.dtype)
    for writer in range(len(users)):
        user, task = users[writer], tasks[writer]
        mean = kind(1 / max(1, asked[user]))
        scale(attended[writer], one, attention[user])
        scale(profiles[writer], one, p_u[user])
        scale(gradient[writer], mean, theta_u[writer])
        scale(changes[writer], kind(-step) * mean, mixings[writer])
        scale(weights[writer], one, last_layer[task])
        accumulate(weights[writer], -one, last_layer_prior[task])
    return attended, profiles, gradient, change, weights


@compiled
def write(
    attended: Floats,
    profiles: Floats,
    gradient: Floats,
    weights: Floats,
    centre: Floats,
    change: Floats,
    alpha: float,
    beta: float,
    gamma: float,
    gated: bool,  # noqa: FBT001  what is compiled has no names
    centred: bool,  # noqa: FBT001
) -> tuple[Floats, ...]:
    """What `Writes.of_users` gives, in its order, with changes of M_uI as (U, size).

    All in one, as `follow` is: of so few users and rows each call would take longer than what it does.
    """
    (users, rows), size, kind = attended.shape, profiles.shape[1], attended.dtype
    looked, of_centre, left, still = np.empty_like(profiles), np.zeros(size, kind), 1.0, 1 - alpha / rows
    for user in range(users - 1, -1, -1):
        by = kind.type(left * alpha / rows)
        for k in range(size):
            looked[user, k] = profiles[user, k] - (centre[k] if centred else kind.type(0))
            of_centre[k] += by * profiles[user, k]
        left *= still
    centre_decay = np.empty(1, kind)
    centre_decay[0] = left
    profile_decay, of_profile = np.ones(rows, kind), np.empty((rows, size), kind)
    gradient_decay, of_gradient = np.ones(rows, kind), np.empty((rows, gradient.shape[1]), kind)
    weights_decay, of_weights = np.ones(rows, kind), np.empty((rows, weights.shape[1]), kind)
    mixing_map, reached, mixing = np.eye(rows).astype(kind), np.empty_like(attended), np.empty((rows, change.shape[1]), kind)
    # Where what a user writes ends up, and then all of it at once.
    average(attended, kind.type(alpha), gated, profile_decay, reached)
    multiply(reached.T, looked, of_profile)
    average(attended, kind.type(beta), gated, gradient_decay, reached)
    multiply(reached.T, gradient, of_gradient)
    average(attended, kind.type(gamma), gated, weights_decay, reached)
    multiply(reached.T, weights, of_weights)
    move(attended, kind.type(gamma), gated, mixing_map, reached)
    multiply(reached.T, change, mixing)
    return (
        profile_decay,
        of_profile,
        centre_decay.reshape(()),
        of_centre,
        gradient_decay,
        of_gradient,
        mixing_map,
        mixing,
        weights_decay,
        of_weights,
    )


@borrowing
def average(attended: Floats, step: np.floating, gated: bool, left: Floats, reached: Floats) -> None:  # noqa: FBT001
    """Eq. 5 and 6 for users in order, as one: the decay (K,) of each row, 1 as it comes, and how much of each user's write ends up in it.

    ``attended`` (U, K) is a_u, ``reached`` is of its shape. Backwards, for of a user's write there is left what those after it leave.
    """
    one = left.dtype.type(1)
    for user in range(len(attended) - 1, -1, -1):
        for row in range(len(left)):
            reached[user, row] = left[row] * step * attended[user, row]
            left[row] *= one - step * (attended[user, row] if gated else one)


@borrowing
def move(attended: Floats, step: np.floating, gated: bool, so_far: Floats, reached: Floats) -> None:  # noqa: FBT001
    """Eq. 8 for users in order, as one: the product (K, K) of their D + g a_u a_u', the last leftmost, and where each one's change ends up.

    The first is the unit as it comes; the second (U, K) is the product of those after a user, times g a_u.
    """
    one, rows = so_far.dtype.type(1), len(so_far)
    for user in range(len(attended) - 1, -1, -1):
        a, into = attended[user], reached[user]
        for i in range(rows):
            into[i] = 0
            for j in range(rows):
                into[i] += so_far[i, j] * a[j]
            into[i] *= step
        for i in range(rows):
            for j in range(rows):
                so_far[i, j] = so_far[i, j] * (one - step * (a[j] if gated else one)) + into[i] * a[j]


@compiled
def follow(
    profile_decay: Floats,
    gradient_decay: Floats,
    mixing_map: Floats,
    weights_decay: Floats,
    centre_decay: Floats,
    of_profile: Floats,
    of_gradient: Floats,
    of_weights: Floats,
    of_centre: Floats,
    profile: Floats,
    gradient: Floats,
    weights: Floats,
    centre: Floats,
    of_mixing: Floats,
    mixing: Floats,
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """What `Writes.apply` gives, with M_UI, its rows flat, at the end: memories (K, size) and the centre (d_u,), kept and added to."""
    after = np.empty_like(profile), np.empty_like(gradient), np.empty_like(weights), np.empty_like(centre), np.empty_like(mixing)
    keep(profile_decay, of_profile, profile, after[0])
    keep(gradient_decay, of_gradient, gradient, after[1])
    keep(weights_decay, of_weights, weights, after[2])
    for k in range(len(centre)):
        after[3][k] = centre_decay[()] * centre[k] + of_centre[k]
    multiply(mixing_map, mixing, after[4])
    for row in range(len(mixing)):
        add(of_mixing[row], after[4][row])
    return after


@borrowing
def keep(kept: Floats, added: Floats, rows: Floats, into: Floats) -> None:
    """Fill rows (K, size) with so much of others, (K,), and what is added to each."""
    for row in range(len(rows)):
        for k in range(rows.shape[1]):
            into[row, k] = kept[row] * rows[row, k] + added[row, k]


def compose(writes: Iterable[Writes | None]) -> Writes | None:
    """The one write that does what all do, in order; None where there is none."""
    composed = None
    for each in writes:
        if each is not None:
            composed = each if composed is None else composed.then(each)
    return composed
