"""The best of a catalogue, exactly: every item scored for an adapted user by products with a table of items.

What a user's adaptation changes is few numbers, what an item brings is the same for all users of a model version. In closed form a score is
mu + b_i + [e_i, 1] T w: one product of a table [e_i, 1, mu + b_i] with a vector of the user's. After gradient steps an item passes through
the user's own networks; there the first layer is what it was less a few factors, and layers with no activation between are one matrix.

The products only choose. Whoever ranks scores the chosen few as any query is scored, so that an answer has the same numbers as an event.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import nsmallest
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from model import engine, networks, steps
from model.fastweights import Networks
from model.highest import Runs
from model.itemscores import Common, Items, Way, filled, in_common, scores
from model.mamo import Mamo
from model.numbering import embed, slices
from model.rowkernels import CODES
from model.settings import RATINGS
from model.tasks import Task, collate

if TYPE_CHECKING:
    from model.kernels import Floats

BLOCK_ITEMS = 16_384
"""Items that are looked up and passed through shared layers at once."""
IN_CACHE = 2_048
"""Items that one task after the other is asked for."""
SCORES_AT_ONCE = 16_777_216
"""Scores held at once, 64 MB: users are taken by as many as fit, at least one."""
TABLE_BYTES = 268_435_456
"""What is kept of items as a version sees them; past it that is made anew for each question, from encoded profiles, which are kept."""
ADDED_ITEMS = 1_024
"""Items that were added later, in a block: the last one is made anew whenever there is one more."""
MOST_STALE = 1_024
"""Items that may have changed before everything is made anew; of a large catalogue, a thousandth."""
MARGIN = 1e-4
"""Of the width of the scale: how far a score from the table may be from the one that the engine finds. In single precision: some 1e-6."""


Block = Tensor | Items
"""Items as one version sees them: in closed form [e_i, 1, mu + b_i], (m, d_e + 2); else their profiles in parts."""


class Keys(Sequence[str]):
    """Every item with a profile, rated or not, and every item that the model version has an id row for; what was `added` since comes last.

    The texts are those that the model has. An item that has a row alone is named by the row's key, less the name of the feature; that is
    made when it is asked for, since ten million more texts are most of a gigabyte.
    """

    def __init__(self, model: Mamo) -> None:
        self._table = model.item_table
        # Not what the table has by then: where rows are laid out anew, while a question is answered, it has another list.
        self._of_rows = model.item_table.keys
        self._features = model.items.features
        # One at most.
        self._starts = tuple(f"{name}=" for name, feature in model.items.schema.items() if feature.kind == "id")
        self._profiled = list(self._features)
        self._seen = 0
        self._provisional = set[int]()
        """Rows that may come to be the version's."""
        self._rows = np.fromiter(self._admitted(), np.int32)
        self.first = len(self._profiled) + len(self._rows)
        """How many there were at first."""
        self.added = list[str]()

    def __len__(self) -> int:
        return self.first + len(self.added)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        places = range(len(self))[place]
        return self._key(places) if isinstance(places, int) else list(map(self._key, places))

    def in_version(self, key: str) -> bool:
        """Whether the model version has an id row for an item."""
        return any(row is not None and not self._table.provisional[row] for row in map(self._table.rows.get, self._names(key)))

    def lost_profile(self, key: str) -> None:
        """An item has no profile any more, but stays if the version has an id row for it, and comes back once it has."""
        self._provisional.update(self._table.rows[name] for name in self._names(key) if name in self._table.rows)

    def admitted(self) -> list[str]:
        """The items without a profile whose id rows the version has, but for those that were among all before."""
        return list(map(self._of_row, self._admitted()))

    def _admitted(self) -> Iterator[int]:
        keys, provisional = self._of_rows, self._table.provisional
        for row in itertools.chain(list(self._provisional), range(self._seen, len(keys))):
            self._provisional.discard(row)
            if keys[row].startswith(self._starts) and self._of_row(row) not in self._features:
                # What was only asked for has a provisional row: an answer must not depend on what was asked before.
                if provisional[row]:
                    self._provisional.add(row)
                else:
                    yield row
        self._seen = len(keys)

    def _names(self, key: str) -> list[str]:
        return [f"{start}{key}" for start in self._starts]

    def _of_row(self, row: int) -> str:
        return self._of_rows[row].partition("=")[2]

    def _key(self, place: int) -> str:
        if place >= self.first:
            return self.added[place - self.first]
        return self._profiled[place] if place < len(self._profiled) else self._of_row(self._rows[place - len(self._profiled)])


class Encoded(NamedTuple):
    """The profiles of a block's items, both (m, slots) and as narrow as they go, and the layout of the table that they hold for."""

    rows: NDArray[np.int32]
    weights: NDArray[np.float32]
    layout: int
    common: list[Common]
    """What several of them have in common; not looked for in closed form."""


class Catalogue:
    """All items that a model knows of: with a profile, rated or not, or with a row of their own in the model version.

    An item that is new, or whose profile changes, is added behind all others. What stood for it before stays where it is, and may be
    among the best by what it was: so as many more are looked at.
    """

    def __init__(self, model: Mamo, *, table_bytes: int = TABLE_BYTES) -> None:
        self.model = model
        self._room = table_bytes
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.keys = Keys(self.model)
        self._layout, self._revision = self.model.item_table.layout, self.model.items.revision
        self._stale = 0
        """How many of the keys at most stand for what they no longer are."""
        self._gone = set[str]()
        self._encoded: dict[int, Encoded] = {}
        self._forget_blocks()

    def _forget_blocks(self) -> None:
        self._version, self._kept = self.model.vector, 0
        self._blocks: dict[int, Block] = {}
        """By the place where they begin; of the last one, which may have grown since, that which is longest."""

    def renew(self) -> None:
        """Take note of what has changed since the last time."""
        self.model.items.begin()
        if not self._follow():
            self._begin_anew()
        if self._version is not self.model.vector:
            self._forget_blocks()

    def _follow(self) -> bool:
        """Add what has changed; False where that has become so much that all is better taken anew, or where rows have moved."""
        items, keys = self.model.items, self.keys
        changes = None if self._layout != self.model.item_table.layout else items.changed_since(self._revision)
        if changes is None:
            return False
        self._revision = items.revision
        for key, known in changes:
            self._stale += known or keys.in_version(key)
            if key not in items.features:
                keys.lost_profile(key)
                if known:  # Else it was not among them, or has gone already.
                    self._gone.add(key)
        # Each once: places beyond those that are stale would be taken for others that are wanted.
        added = list(dict.fromkeys(key for key, _ in changes if key in items.features)) + keys.admitted()
        self._gone.difference_update(added)
        keys.added += added
        return self._stale <= max(MOST_STALE, keys.first // 1_000) and len(keys.added) <= max(MOST_STALE, keys.first // 4)

    def every(self) -> list[str]:
        """All of them as they are known now, each once."""
        return self._standing(self.keys)

    def _standing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in dict.fromkeys(keys) if key not in self._gone]

    def candidates(self, tasks: Sequence[Task], wanted: Sequence[int]) -> list[list[str]]:
        """For each task, without its query, items among which the best so many are, whoever breaks ties by key.

        A few more than wanted, and as many more as may have changed since everything was taken anew.
        """
        self.renew()
        if not tasks or not self.keys:
            return [[] for _ in tasks]
        if self.model.plain:
            return [self.every() for _ in tasks]  # No table serves settings that no engine serves.
        found = []
        at_once = max(1, SCORES_AT_ONCE // len(self.keys))
        for start in range(0, len(tasks), at_once):
            scores = self._scores(tasks[start : start + at_once])
            for row, count in zip(scores, wanted[start : start + at_once], strict=True):
                found.append(self._standing(self._choose(row, count + self._stale)))
        return found

    def _choose(self, scores: Tensor, wanted: int) -> list[str]:
        """The items of the best scores (N,), those beyond the scale being equal, and all that are too near to tell."""
        low, high = RATINGS
        margin = MARGIN * (high - low)
        if not 0 < wanted < len(scores):
            return list(self.keys) if wanted else []
        runs = Runs(scores)
        best = runs.best(wanted)
        if not bool(best.isfinite().all()):
            # Not a number counts as the highest. Where adaptation diverged every item stands in the middle: `meta.Scores`.
            scores = scores.nan_to_num(nan=(low + high) / 2, posinf=high + 2 * margin, neginf=low)
            runs = Runs(scores)
            best = runs.best(wanted)
        least = min(float(best[-1]), high) - 2 * margin
        if least < low:
            return list(self.keys)
        places = runs.places_from(least)
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
        batch = collate([tasks], model.users, model.items, model.scale, model.dtype)
        _, solved = engine.solve(model, batch)
        found = solved.found
        of_users = (found.to_user * found.answers[:, None, :, 0]).sum(2).transpose(0, 2, 1).reshape(-1, found.mean.shape[1])
        own = pad(torch.from_numpy(of_users[: len(tasks)]), (0, 1), value=1.0)
        for place, block in self._all():
            assert isinstance(block, Tensor)  # noqa: S101  `_made` sees to it
            torch.mm(own, block.T, out=scores[:, place])

    def _by_networks(self, tasks: list[Task], scores: Tensor) -> None:
        model = self.model
        _, stepped = steps.in_factors(model, collate([tasks], model.users, model.items, model.scale, model.dtype), learning=False)
        ways = [
            (number, Scorer(part.networks, part.query.user[-1], place))
            for part in stepped.parts
            for place, number in enumerate(part.tasks.tolist())
        ]
        for place, block in self._all():
            assert isinstance(block, Items)  # noqa: S101  likewise
            asked = [(number, scorer(block)) for number, scorer in ways]
            # In parts that the processor's second cache holds: all tasks read them from the memory once.
            for begin in range(0, len(block.own), IN_CACHE):
                part = slice(begin, begin + IN_CACHE)
                for number, of in asked:
                    found = of(part)
                    scores[number, place.start + begin : place.start + begin + len(found)] = found

    def _all(self) -> Iterator[tuple[slice, Block]]:
        first, end = self.keys.first, len(self.keys)
        starts = [*range(0, first, BLOCK_ITEMS), *range(first, end, ADDED_ITEMS), end]
        for place in slices(starts[1:]):
            block = self._blocks.get(place.start)
            yield place, self._made(place) if block is None or items_in(block) != place.stop - place.start else block

    def _made(self, place: slice) -> Block:
        model, encoded = self.model, self._profiles(place)
        p_i, bias = embed(model.items.embedding(np.arange(len(encoded.rows)), (encoded.rows.astype(np.int64), encoded.weights)))
        block: Block
        if model.closed_form:
            phi = model.arrays()
            e_i = networks.embeddings(model.in_place(), p_i)[-1]
            table = np.concatenate([e_i, np.ones_like(bias)[:, None], (phi["mean"] + bias)[:, None]], 1)
            block = torch.from_numpy(table)
        else:
            layers, profiles = [model.phi[name] for name in model.item_names], torch.from_numpy(p_i)
            start = torch.addmm(layers[1], profiles, layers[0]).numpy() if len(layers) > 2 else p_i[:0]
            block = Items.of(p_i, start, encoded.common)
        if (shorter := self._blocks.pop(place.start, None)) is not None:
            self._kept -= shorter.nbytes
        if self._kept + block.nbytes <= self._room:
            self._kept += block.nbytes
            self._blocks[place.start] = block
        return block

    def _profiles(self, place: slice) -> Encoded:
        items = self.model.items
        encoded = self._encoded.get(place.start)
        if encoded is None or encoded.layout != items.table.layout or len(encoded.rows) != place.stop - place.start:
            items.begin()  # Rows that no version holds are let go once they are too many.
            wide, weights = items.encoded_of(self.keys[place])
            rows = wide.astype(np.int32)
            found = [] if self.model.closed_form else self._common(rows, weights)
            encoded = self._encoded[place.start] = Encoded(rows, weights, items.table.layout, found)
        return encoded

    def _common(self, rows: NDArray[np.int32], weights: NDArray[np.float32]) -> list[Common]:
        d, both = self.model.settings.embedding_size, np.stack([rows, weights.view(np.int32)], 2)
        found = (
            in_common(slice(number * d, (number + 1) * d), both[:, start:end].reshape(len(rows), -1))
            for number, (start, end) in enumerate(self.model.items.spans)
        )
        return [each for each in found if each is not None]


def items_in(block: Block) -> int:
    """How many."""
    return len(block if isinstance(block, Tensor) else block.own)


class Scorer:
    """The way of an item to its score through one task's adapted networks, as few products as there are activations between."""

    def __init__(self, networks: Networks, e_u: Tensor, task: int) -> None:
        """``e_u`` (B, 1, d_e) are the adapted user embeddings; the task is number ``task`` of these."""
        of_user = networks.joint[0](e_u)[task, 0]
        weight, bias = networks.joint[1].of(task)
        rating = [layer.of(task) for layer in networks.rating]
        runs: list[list[tuple[Tensor, Tensor]]] = [[layer.of(task)] for layer in networks.item]
        # M_uI is linear and so is what it joins; without it the first rating layer is followed by an activation, if by anything.
        runs[-1].append((weight, bias + of_user))
        if networks.mixed:
            runs[-1].append(rating.pop(0))
        runs += [[layer] for layer in rating]
        products = [joined(run) for run in runs]
        self._alone = products[0]
        self._way = way(products, networks, task) if len(products) > 1 else None

    def __call__(self, block: Items) -> Callable[[slice], Tensor]:
        """What gives the scores (m,) of those of a block's items that a slice says."""
        of = self._way
        weight, bias = self._alone
        factor, known = block.times(weight.numpy() if of is None else of.first)

        def asked(part: slice) -> Tensor:
            own, which = block.own[part], block.which[part]
            if of is None:
                return torch.from_numpy((own @ factor + known[which].sum(1))[:, 0]) + bias
            return torch.from_numpy(scores(of, own, which, block.start[part], factor, known)[:, 0])

        return asked


def way(products: list[tuple[Tensor, Tensor]], networks: Networks, task: int) -> Way:
    """What `scores` passes through, of products with activations between, two at least."""
    (first, first_bias), *between, (last, last_bias) = products
    into, learned, constant = first, first.new_zeros(0, first.shape[1]), first_bias
    layer = networks.item[0]
    if len(networks.item) > 1 and layer.learned is not None and layer.learned[0].shape[1] <= sum(layer.weight.shape[-2:]):
        into, learned = layer.learned[0][task].T, layer.learned[1][task]
        constant = -learned.sum(0)  # The bias is the weight of a constant 1, which is in each likeness.
    weights, biases = zip(*between, strict=True) if between else ((), ())
    size, more = len(last), filled(into.shape[1]) - into.shape[1]

    def array(of: Tensor) -> Floats:
        return of.contiguous().numpy()

    return Way(
        first=array(pad(into, (0, more))),
        learned=array(pad(learned, (0, 0, 0, more)) if len(learned) else learned),
        constant=array(constant),
        weights=array(torch.cat([first.new_zeros(0, size), *weights]).view(-1, size, size)),
        biases=array(torch.cat([first.new_zeros(0), *biases]).view(-1, size)),
        last=array(last.T),
        last_bias=last_bias.numpy()[0],
        activation=CODES[networks.activation],
    )


def joined(run: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The one layer that does what these do one after the other, with no activation between."""
    weight, bias = run[0]
    for next_weight, next_bias in run[1:]:
        weight, bias = weight @ next_weight, bias @ next_weight + next_bias
    return weight, bias
