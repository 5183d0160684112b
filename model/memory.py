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
from model.memorykernels import SHORT, attend, follow, write
from model.settings import ModelSettings, rate

if TYPE_CHECKING:
    from model.kernels import Floats


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
        return attend(p_u, self.profile.numpy(), self.origin(centred=centred), temperature)

    def origin(self, *, centred: bool) -> Floats:
        """What `attention` looks at profiles less of, (d_u,)."""
        centre = self.centre.numpy()
        return centre if centred else np.zeros_like(centre)

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


def compose(writes: Iterable[Writes | None]) -> Writes | None:
    """The one write that does what all do, in order; None where there is none."""
    composed = None
    for each in writes:
        if each is not None:
            composed = each if composed is None else composed.then(each)
    return composed
