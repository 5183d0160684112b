"""Fast weights of many tasks at once, in factors, and passes through networks made of them (Eq. 1, 2 and 11 of MAMO).

- The gradient at a layer's weights is x' d, of the n rows x that went in and the gradients d at what came out. So after t steps the fast
  weights are W - x' d with t n rows in x and d, and most layers never need them written out: y = x W - (x x') d.
- What goes into the first layers, p_u and p_i, stays as it is from step to step, so x W and x x' are made once, and d of all steps adds up.
- A user's own rows do not repeat for every item of the support: e_u enters M_uI once a task.
- Once the factors have more rows than pay, they are folded into weights of the task's own. The last step's never are: a query is few rows.
- What a step leaves unchanged (with local adaptation of the decision layers, all but these) is not passed through again.

All of it is differentiable as it stands. Shapes: B tasks, n interactions of a support or q of a query, d_e.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.adaptation import Weights
from model.mamo import ACTIVATIONS
from model.settings import ModelSettings

Pair = tuple[Tensor, Tensor]
"""What went into a layer, (B, n, in), and the gradient at what came out of it, (B, n, out)."""


class Fast:
    """A fully connected layer of B tasks: x W + b - (x x_s' + 1) d_s with the rows x_s (B, r, in) and d_s (B, r, out) learned.

    ``weight`` is shared, (in, out), or of each task, (B, in, out); likewise ``bias``, (out,) or (B, out). Without a bias the 1 falls away.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        into, out = weight.shape[-2:]
        self.bound: float = into * out // (4 * (into + out))
        """Rows up to which factors cost less than weights of the task's own: they are two products more, of in + out numbers a row."""
        self.learned: Pair | None = None
        self._fixed: tuple[Tensor, Tensor, Tensor] | None = None
        self._folded = False

    def fix(self, x: Tensor) -> None:
        """Say that ``x`` (B, n, in) goes in at every step."""
        self._fixed = x, self._start(x), self._likeness(x, x)

    def _likeness(self, x: Tensor, rows: Tensor) -> Tensor:
        """X rows' (B, n, r), with the bias as the weight of a constant 1."""
        return x @ rows.mT if self.bias is None else x @ rows.mT + 1

    def _start(self, x: Tensor) -> Tensor:
        """What comes of x (B, n, in) at the weights as they were before anything was learned, or since it was folded in."""
        y = x @ self.weight
        if self.bias is None:
            return y
        y += self.bias[:, None] if self.bias.dim() > 1 else self.bias
        return y

    def _start_back(self, at: Tensor) -> Tensor:
        # With one number out, a product of matrices is a detour.
        return at * self.weight.mT if at.shape[-1] == 1 else at @ self.weight.mT

    def __call__(self, x: Tensor) -> Tensor:
        """From (B, n, in) to (B, n, out)."""
        if self._fixed is not None and x is self._fixed[0]:
            _, start, likeness = self._fixed
            return start if self.learned is None else torch.baddbmm(start, likeness, self.learned[1], alpha=-1)
        y = self._start(x)
        return y if self.learned is None else y.baddbmm_(self._likeness(x, self.learned[0]), self.learned[1], alpha=-1)

    def back(self, at: Tensor) -> Tensor:
        """The gradient at x from that at what came out of it."""
        at_x = self._start_back(at)
        return at_x if self.learned is None else at_x.baddbmm_(at @ self.learned[1].mT, self.learned[0], alpha=-1)

    def learn(self, x: Tensor, by: Tensor, *, last: bool) -> None:
        """Take a gradient step, weight - x' by and bias - the sum of by; ``by`` is the gradient at what came out, times the rate."""
        if self._fixed is not None:
            self.learned = x, by if self.learned is None else self.learned[1] + by
            return
        self.learned = (x, by) if self.learned is None else (torch.cat([self.learned[0], x], 1), torch.cat([self.learned[1], by], 1))
        if self.learned[0].shape[1] > self.bound and not last:
            self._fold(*self.learned)
            self.learned = None

    def _fold(self, rows: Tensor, by: Tensor) -> None:
        if self._folded and not torch.is_grad_enabled():  # These are nobody else's. Memory that is new costs as much as the product.
            self.weight.baddbmm_(rows.mT, by, alpha=-1)
            self.bias = None if self.bias is None else self.bias.sub_(by.sum(1))
        else:
            self.weight, self.bias = self.dense()
        self._folded = True

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The adapted weight (B, in, out) and bias (B, out), written out; as they were where nothing was learned."""
        if self.learned is None:
            return self.weight, self.bias
        rows, by = self.learned
        return torch.baddbmm(self.weight, rows.mT, by, alpha=-1), None if self.bias is None else self.bias - by.sum(1)

    def of(self, task: int) -> Pair:
        """One task's adapted weight (in, out) and bias (out,), zeros where there is none."""
        weight, bias = self.dense()
        weight = weight[task] if weight.dim() > 2 else weight
        if bias is None:
            return weight, weight.new_zeros(weight.shape[1])
        return weight, bias[task] if bias.dim() > 1 else bias

    def norm(self, x: Tensor, at: Tensor) -> Tensor:
        """The squared norm of each task's gradient, weight and bias together, (B,)."""
        likeness = self._fixed[2] if self._fixed else self._likeness(x, x)
        return (likeness * (at @ at.mT)).sum((1, 2))


class Blended(Fast):
    """A layer of each user's own that starts as a blend of memory rows, sum_k a_k M_k, on top of what is shared (Eq. 7 and 9).

    What the one row of a user makes of K memory rows is less work than weights written out for each task, and so these never are.
    """

    def __init__(self, attention: Tensor, weights: Tensor, biases: Tensor | None, shared: Fast | None) -> None:
        """``attention`` (B, K) times a factor; ``weights`` (K, in, out) and ``biases`` (K, out) or None are rows of memory."""
        super().__init__(weights[0], None if biases is None else attention @ biases)
        self.attention = attention
        self.weights = weights
        self.flat = weights.transpose(0, 1).flatten(1)  # (in, K out)
        self.shared = shared
        self.bound = math.inf

    def _start(self, x: Tensor) -> Tensor:
        of_rows = (x @ self.flat).view(len(x), len(self.weights), -1)
        y = self.attention[:, None] @ of_rows
        y = y if self.bias is None else y + self.bias[:, None]
        return y if self.shared is None else y + self.shared(x)

    def _start_back(self, at: Tensor) -> Tensor:
        by_rows = (self.attention[..., None] * at).flatten(1)  # (B, K out)
        at_x = (by_rows @ self.flat.T)[:, None]
        return at_x if self.shared is None else at_x + self.shared.back(at)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """As `Fast.dense`, of the blend written out."""
        weight, bias = torch.einsum("bk,kio->bio", self.attention, self.weights), self.bias
        if self.shared is not None and self.shared.bias is not None and bias is not None:
            weight, bias = weight + self.shared.weight, bias + self.shared.bias
        whole = Fast(weight, bias)
        whole.learned = self.learned
        return whole.dense()


class Passed(NamedTuple):
    """A pass: what went into each layer and, at last, what came out."""

    user: list[Tensor]  # (B, 1, ...)
    item: list[Tensor]  # (B, n, ...)
    rating: list[Tensor]  # (B, n, ...), from what M_uI, or the first rating layer, made of both

    @property
    def score(self) -> Tensor:
        """The scores, (B, n)."""
        return self.rating[-1][..., 0]


class Pulled(NamedTuple):
    """The way back through a pass, by layer, and the gradients at p_u (B, 1, d_u) and p_i (B, n, d_i); only what was asked for."""

    rating: list[Pair]
    joint: list[Pair]  # of e_u (B, 1, d_e), and of e_i (B, n, d_e)
    user: list[Pair]
    item: list[Pair]
    at_p_u: Tensor
    at_p_i: Tensor


def layers(values: list[Tensor]) -> list[Fast]:
    """Layers of weights and biases by turns."""
    return [Fast(weight, bias) for weight, bias in zip(values[::2], values[1::2], strict=True)]


class Networks:
    """The networks of B tasks, Eq. 1 and 2, at their own fast weights.

    What first sees e_u and e_i together, M_uI or without it the first rating layer, stands as two halves, ``joint``.
    """

    def __init__(self, settings: ModelSettings, phi: Weights, user: list[Fast], mixing: tuple[Fast, Fast] | None) -> None:
        """Start where adaptation starts, Eq. 9 and 10, with these layers of the user network and halves of M_uI, if there is one."""
        self.activation = settings.activation
        self.mixed = mixing is not None
        self.inner = settings.adapts_inner_layers
        self.user = user
        self.item = layers([value for name, value in phi.items() if name.startswith("item.")])
        self.rating = layers([value for name, value in phi.items() if name.startswith("rating.")])
        if mixing is None:
            first = self.rating.pop(0)
            of_user, of_item = first.weight.chunk(2)
            mixing = Fast(of_user, None), Fast(of_item, first.bias)
        self.joint = list(mixing)

    def fix(self, p_u: Tensor, p_i: Tensor) -> Passed:
        """The pass over profiles p_u (B, 1, d_u) and p_i (B, n, d_i) of a support, which stay as they are while it is adapted to."""
        self.user[0].fix(p_u)
        if self.inner:
            self.item[0].fix(p_i)
        passed = self.passes(p_u, p_i)
        if not self.inner and self.mixed:
            self.rating[0].fix(passed.rating[0])
        elif not self.inner:
            self.joint[0].fix(passed.user[-1])
            self.joint[1].fix(passed.item[-1])
        return passed

    def passes(self, p_u: Tensor, p_i: Tensor) -> Passed:
        """The pass of items p_i (B, n, d_i) for each task's user, p_u (B, 1, d_u)."""
        return self._rate(self._through(self.user, p_u), self._through(self.item, p_i))

    def again(self, passed: Passed) -> Passed:
        """The same pass after a step of adaptation, as far as that changes it."""
        if self.inner:
            return self.passes(passed.user[0], passed.item[0])
        if self.mixed:
            return passed._replace(rating=self._through(self.rating, passed.rating[0]))
        return self._rate(passed.user, passed.item)

    def _rate(self, user: list[Tensor], item: list[Tensor]) -> Passed:
        both = self.joint[0](user[-1]) + self.joint[1](item[-1])
        if not self.mixed and self.rating:
            both = ACTIVATIONS[self.activation](both)
        return Passed(user, item, self._through(self.rating, both))

    def _through(self, layers: list[Fast], x: Tensor) -> list[Tensor]:
        values = [x]
        for number, layer in enumerate(layers):
            x = layer(x)
            if number < len(layers) - 1:
                x = ACTIVATIONS[self.activation](x)
            values.append(x)
        return values

    def pull(self, passed: Passed, at_score: Tensor, *, whole: bool) -> Pulled:
        """Go back from the gradient at the scores (B, n): the whole way to the profiles, or only to what is adapted."""
        rating, at = self._back(self.rating, passed.rating, at_score[..., None], through=True)
        if not whole and not self.inner and self.mixed:
            return Pulled(rating, [], [], [], at, at)
        if not self.mixed and self.rating:
            at = before(self.activation, passed.rating[0], at)
        at_user = at.sum(1, keepdim=True)
        joint = [(passed.user[-1], at_user), (passed.item[-1], at)]
        if not whole and not self.inner:
            return Pulled(rating, joint, [], [], at, at)
        user, at_p_u = self._back(self.user, passed.user, self.joint[0].back(at_user), through=whole)
        item, at_p_i = self._back(self.item, passed.item, self.joint[1].back(at), through=whole)
        return Pulled(rating, joint, user, item, at_p_u, at_p_i)

    def _back(self, layers: list[Fast], values: list[Tensor], at: Tensor, *, through: bool) -> tuple[list[Pair], Tensor]:
        pairs = []
        for number in reversed(range(len(layers))):
            if number < len(layers) - 1:
                at = before(self.activation, values[number + 1], at)
            pairs.append((values[number], at))
            if number or through:
                at = layers[number].back(at)
        return pairs[::-1], at

    def learn(self, pulled: Pulled, rate: float, clip: float, *, last: bool) -> None:
        """Take one step of Eq. 11, of gradients that are ``rate`` times their size.

        ``clip`` bounds the norm of one task's gradient (0: no bound).
        """
        adapted = [*self.rating, *(self.joint if pulled.joint else []), *(self.user + self.item if pulled.item else [])]
        pairs = [*pulled.rating, *pulled.joint, *pulled.user, *pulled.item]
        if clip:
            norm = torch.stack([layer.norm(*pair) for layer, pair in zip(adapted, pairs, strict=True)]).sum(0).add(rate**2 * 1e-12).sqrt()
            shrink = (rate * clip / norm).clamp(max=1)[:, None, None]
            pairs = [(x, shrink * by) for x, by in pairs]
        for layer, (x, by) in zip(adapted, pairs, strict=True):
            layer.learn(x, by, last=last)


def before(activation: str, y: Tensor, at: Tensor) -> Tensor:
    """The gradient at what went into an activation, from that at ``y``, which came out of it."""
    match activation:
        case "relu":
            at_x: Tensor = torch.ops.aten.threshold_backward(at, y, 0.0)
            return at_x
        case "tanh":
            return at * (1 - y.square())
    return at * -torch.expm1(-y)
