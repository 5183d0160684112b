"""The best of a catalogue, exactly: every item scored for an adapted user by products with a table of items.

What a user's adaptation changes is few numbers, what an item brings is the same for all users of a model version. In closed form a score is
mu + b_i + [e_i, 1] T w: one product of a table [e_i, 1, mu + b_i] with a vector of the user's. After gradient steps an item passes through
the user's own networks; there the first layer is what it was less a few factors, and layers with no activation between are one matrix.

The products only choose. Whoever ranks scores the chosen few as any query is scored, so that an answer has the same numbers as an event.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import nsmallest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from model import engine, steps
from model.fastweights import Networks
from model.mamo import ACTIVATIONS, Mamo
from model.tasks import Task, collate

BLOCK_ITEMS = 16_384
"""Items that are looked up and passed through shared layers at once."""
SCORES_AT_ONCE = 16_777_216
"""Scores held at once, 64 MB: users are taken by as many as fit, at least one."""
TABLE_BYTES = 268_435_456
"""What is kept of items between questions; of those past it everything is made anew each time."""
MARGIN = 1e-4
"""Of the width of the scale: how far a score from the table may be from the one that the engine finds. Measured: some 1e-7."""


class Block(NamedTuple):
    """Items as one version sees them: in closed form [e_i, 1, mu + b_i], (m, d_e + 2); else p_i (m, d_i) and what layer 0 makes of it."""

    table: Tensor
    start: Tensor | None


class Catalogue:
    """All items that a model knows of: with a profile, rated or not, or with a row of their own in the model version."""

    def __init__(self, model: Mamo, *, table_bytes: int = TABLE_BYTES) -> None:
        self.model = model
        self.keys: list[str] = []
        self._room = table_bytes
        self._known: tuple[int, int, int] | None = None
        self._version: Tensor | None = None
        self._kept = 0
        self._encoded: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._blocks: dict[int, Block] = {}

    def renew(self) -> list[str]:
        """Take note of what has changed since the last time; returns all keys."""
        model, items = self.model, self.model.items
        items.begin()
        known = items.revision, items.table.known, items.table.layout
        if known != self._known:
            self._known, self._kept, self._encoded, self._blocks = known, 0, {}, {}
            self.keys = keys(model)
        if self._version is not model.vector:
            self._version, self._blocks = model.vector, {}
        return self.keys

    def candidates(self, tasks: Sequence[Task], wanted: Sequence[int]) -> list[list[str]]:
        """For each task, without its query, items among which the best so many are, whoever breaks ties by key: a few more than wanted."""
        if not tasks or not self.renew():
            return [[] for _ in tasks]
        if self.model.plain:
            return [list(self.keys) for _ in tasks]  # No table serves settings that no engine serves.
        found = []
        at_once = max(1, SCORES_AT_ONCE // len(self.keys))
        for start in range(0, len(tasks), at_once):
            scores = self._scores(tasks[start : start + at_once])
            found += [self._choose(row, count) for row, count in zip(scores, wanted[start : start + at_once], strict=True)]
        return found

    def _choose(self, scores: Tensor, wanted: int) -> list[str]:
        """The items of the best scores (N,), those beyond the scale being equal, and all that are too near to tell."""
        low, high = self.model.scale
        margin = MARGIN * (high - low)
        if wanted >= len(scores):
            return list(self.keys)
        best = scores.topk(wanted).values
        if not bool(best.isfinite().all()):
            # Not a number counts as the highest. Where adaptation diverged every item stands in the middle: `meta.Scores`.
            scores = scores.nan_to_num(nan=(low + high) / 2, posinf=high + 2 * margin, neginf=low)
            best = scores.topk(wanted).values
        least = min(float(best[-1]), high) - 2 * margin
        if least < low:
            return list(self.keys)
        places = (scores >= least).nonzero()[:, 0]
        top = scores[places] > high + margin
        if int(top.sum()) <= wanted:
            return [self.keys[place] for place in places.tolist()]
        # All these have the highest score that there is, and of equals the first by key are the best.
        first = nsmallest(wanted, (self.keys[place] for place in places[top].tolist()))
        return first + [self.keys[place] for place in places[~top].tolist()]

    @torch.no_grad()
    def _scores(self, tasks: Sequence[Task]) -> Tensor:
        """Scores (U, N) of all items for the users of tasks, not yet brought inside the scale."""
        model = self.model
        # The query only has to be there.
        asked = [Task(task.user, task.support_items, task.support_ratings, self.keys[:1], [0.0]) for task in tasks]
        scores = torch.empty(len(tasks), len(self.keys), dtype=model.dtype)
        if model.closed_form:
            self._by_table(asked, scores)
        else:
            self._by_networks(asked, scores)
        return scores

    def _by_table(self, tasks: list[Task], scores: Tensor) -> None:
        model = self.model
        batch = collate([tasks], model.users, model.items, model.dtype)
        prediction, solved = engine.solve(model, batch)
        w, to_user = prediction.last_layer, torch.from_numpy(solved.given.to_user)
        assert w is not None  # noqa: S101  the closed form has one
        own = pad((to_user[batch.user_of] @ w[..., None])[..., 0], (0, 1), value=1.0)
        for place, block in self._all():
            torch.mm(own, block.table.T, out=scores[:, place])

    def _by_networks(self, tasks: list[Task], scores: Tensor) -> None:
        model = self.model
        _, stepped = steps.in_factors(model, collate([tasks], model.users, model.items, model.dtype), learning=False)
        ways = [
            (number, Scorer(part.networks, part.query.user[-1], place))
            for part in stepped.parts
            for place, number in enumerate(part.tasks.tolist())
        ]
        for place, block in self._all():
            for number, scorer in ways:
                scores[number, place] = scorer(block)

    def _all(self) -> Iterator[tuple[slice, Block]]:
        for start in range(0, len(self.keys), BLOCK_ITEMS):
            block = self._blocks.get(start)
            yield slice(start, min(start + BLOCK_ITEMS, len(self.keys))), self._made(start) if block is None else block

    def _made(self, start: int) -> Block:
        model, items = self.model, self.model.items
        encoded = self._encoded.get((start, items.table.layout))
        if encoded is None:
            items.begin()  # Places given before are let go once they are too many, and rows that no version holds.
            encoded = items.encoded(items.places(self.keys[start : start + BLOCK_ITEMS]))
        p_i, bias = items.embedded(encoded[0].numpy(), encoded[1].numpy())
        if model.closed_form:
            phi = model.arrays()
            e_i = engine.network([phi[name] for name in model.item_names], p_i, model.settings.activation).output
            table = np.concatenate([e_i, np.ones_like(bias)[:, None], (phi["mean"] + bias)[:, None]], 1)
            block = Block(torch.from_numpy(table), None)
        else:
            layers, profiles = [model.phi[name] for name in model.item_names], torch.from_numpy(p_i)
            block = Block(profiles, torch.addmm(layers[1], profiles, layers[0]) if len(layers) > 2 else None)
        if (start, items.table.layout) not in self._encoded:
            size = sum(part.nbytes for part in (*encoded, *block) if part is not None)
            if self._kept + size > self._room:
                return block
            self._kept += size
        self._encoded[start, items.table.layout], self._blocks[start] = encoded, block
        return block


class Scorer:
    """The way of an item to its score through one task's adapted networks, as few products as there are activations between."""

    def __init__(self, networks: Networks, e_u: Tensor, task: int) -> None:
        """``e_u`` (B, 1, d_e) are the adapted user embeddings; the task is number ``task`` of these."""
        self._activation = ACTIVATIONS[networks.activation]

        of_user = networks.joint[0](e_u)[task, 0]
        weight, bias = networks.joint[1].of(task)
        rating = [layer.of(task) for layer in networks.rating]
        runs: list[list[tuple[Tensor, Tensor]]] = [[layer.of(task)] for layer in networks.item]
        # M_uI is linear and so is what it joins; without it the first rating layer is followed by an activation, if by anything.
        runs[-1].append((weight, bias + of_user))
        if networks.mixed:
            runs[-1].append(rating.pop(0))
        runs += [[layer] for layer in rating]
        self._runs = [joined(run) for run in runs]
        first = networks.item[0]
        self._factors: tuple[Tensor, Tensor] | None = None
        if len(networks.item) > 1 and first.learned is not None and first.learned[0].shape[1] <= sum(first.weight.shape[-2:]):
            self._factors = first.learned[0][task], first.learned[1][task]

    def __call__(self, block: Block) -> Tensor:
        """Scores (m,) of the items of a block."""
        runs = self._runs
        if self._factors is not None and block.start is not None:
            rows, by = self._factors
            x = torch.addmm(block.start, block.table @ rows.T + 1, by, alpha=-1)
        else:
            x = torch.addmm(runs[0][1], block.table, runs[0][0])
        for weight, bias in runs[1:]:
            x = torch.addmm(bias, self._activation(x), weight)
        return x[:, 0]


def joined(run: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The one layer that does what these do one after the other, with no activation between."""
    weight, bias = run[0]
    for next_weight, next_bias in run[1:]:
        weight, bias = weight @ next_weight, bias @ next_weight + next_bias
    return weight, bias


def keys(model: Mamo) -> list[str]:
    """Every item with a profile, rated or not, and every item that the model version has an id row for."""
    known = dict.fromkeys(model.items.features)
    names = [name for name, feature in model.items.schema.items() if feature.kind == "id"]
    # What was only asked for, or is too new for the version, has a provisional row: an answer must not depend on what was asked before.
    rows = [key for key in model.item_table.keys if key not in model.item_table.provisional]
    for name in names:
        known |= dict.fromkeys(key.removeprefix(f"{name}=") for key in rows if key.startswith(f"{name}="))
    return list(known)
