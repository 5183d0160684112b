"""Local adaptation: from a user's support set to that user's own parameters.

Two ways. `gradient_steps` is MAMO's inner loop (Eq. 11). `posterior` adapts the last layer exactly, as Bayesian linear regression
does (ALPaCA, Harrison et al. 2018; R2-D2, Bertinetto et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Posterior:
    """The Gaussian posterior of B users' last layers: ``mean`` (B, F), ``factor`` (B, F, F) the Cholesky factor of the precision A.

    Sources: A = X' N X + Lambda, w = A^-1 (X' N (y - mu - b) + Lambda w0) of the design, Eq. 5-7 of ALPaCA.
    """

    def __init__(self, x: Tensor, residual: Tensor, precision: Tensor, prior_precision: Tensor, prior_mean: Tensor) -> None:
        """Condition the prior N(``prior_mean`` (B, F), diag(``prior_precision`` (F,))^-1) on the support.

        ``x`` (B, n, F) are the features of the support, ``residual`` (B, n) its ratings less all that is not x w, ``precision`` (B, n)
        of each rating, 0 where padded: a padded row adds nothing.
        """
        weighted = x * precision[..., None]
        # Lambda > 0 keeps A positive definite, whatever the support: an empty one gives back the prior.
        a = weighted.mT @ x + torch.diag(prior_precision)
        target = (weighted.mT @ residual[..., None])[..., 0] + prior_precision * prior_mean
        self.factor, failed = torch.linalg.cholesky_ex(a)
        if bool(failed.any()):
            # Only features that have diverged come to this: such a task has no posterior, and the others must not suffer.
            self.factor = self.factor.masked_fill((failed > 0)[:, None, None], torch.nan)
        self.mean = torch.cholesky_solve(target[..., None], self.factor)[..., 0]

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x w, both (B, q), for features ``x`` (B, q, F). The variance is x A^-1 x, without a rating's noise."""
        half = torch.linalg.solve_triangular(self.factor, x.mT, upper=False)
        return (x @ self.mean[..., None])[..., 0], half.square().sum(1)


def gradient_steps(
    fast: Weights,
    names: list[str],
    predict: Callable[[Weights], Tensor],
    ratings: Tensor,
    mask: Tensor,
    *,
    rate: float,
    steps: int,
    clip: float,
    second_order: bool,
) -> Weights:
    """Eq. 11: theta <- theta - rho grad L(support), ``steps`` times, L the mean squared error of a user's support.

    ``fast`` holds tensors with a leading dimension of B tasks; those in ``names`` are adapted. ``predict`` gives scores (B, n) of the
    support. Tasks do not touch each other: the gradient of the sum of their losses is each one's own. In first order the gradients
    are constants, so that d adapted / d start is the identity; in second order they are differentiated through.
    ``clip`` bounds the norm of one task's gradient over all of ``names`` (0: no bound).
    """
    count = mask.sum(1).clamp(min=1)
    fast = dict(fast)
    for _ in range(steps):
        loss = ((predict(fast) - ratings).square() * mask).sum(1) / count
        gradients = torch.autograd.grad(loss.sum(), [fast[name] for name in names], create_graph=second_order, retain_graph=True)
        shrink = loss.new_ones(len(loss))
        if clip:
            norm = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).add(1e-12).sqrt()
            shrink = (clip / norm).clamp(max=1)
        for name, gradient in zip(names, gradients, strict=True):
            fast[name] = fast[name] - rate * shrink.view(-1, *[1] * (gradient.dim() - 1)) * gradient
    return fast
