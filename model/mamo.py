"""The model: Memory-Augmented Meta-Optimization for cold-start recommendation (MAMO, Dong et al., KDD 2020), with a closed-form variant.

Read `Mamo.forward` from top to bottom. The numbers of equations are the paper's. Shapes: B tasks of U users, n interactions of a support,
q of a query, d_e embedding size, K memory rows, F = d_e + 1 features of the last layer (the constant is the last).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from model.adaptation import Posterior, Weights, gradient_steps
from model.memory import Memory
from model.networks import OTHERS, Phi
from model.numbering import distinct, slices
from model.profiles import Profiles
from model.rowkernels import CODES
from model.settings import RATINGS, Feature, FeatureSchema, ModelSettings
from model.tables import RowKeys, Table
from model.tasks import Batch, Padded

if TYPE_CHECKING:
    from model.numbering import Floats, Numbers

ITEM_CHANGES = 4096
"""Profiles of items that were set or dropped last, for whoever keeps something of all items."""
SCALARS = ("mean", "log_precision", "log_prior", "recency", "gate")
"""Parameters that learn at the rate of scalars, without decay but for ``log_prior``."""


ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "softplus": softplus}


class Encoded(NamedTuple):
    """Profiles of a batch, and of which values they are made: ``rows`` number those, (n, slots), ``weights`` is of the same shape."""

    rows: Tensor
    weights: Tensor


class Leaves(NamedTuple):
    """What meta-gradients are taken at: phi by name, and the rows of the embedding tables that a batch touches.

    Profiles number the rows of the values beside them.
    """

    phi: Weights
    user_keys: RowKeys
    user_values: Tensor
    user_profiles: Encoded
    item_keys: RowKeys
    item_values: Tensor
    item_profiles: Encoded


class Prediction(NamedTuple):
    """Scores of a batch, and the nodes of its graph at which memories are written.

    ``score`` (B, q) is on the scale of `RATINGS`, and not yet inside it; ``variance`` (B, q) is None without the closed form. ``theta_u``
    are the parameters of the user network and ``mixing`` is M_uI, of each user (U, ...) before, or of each task (B, ...) after gradient
    steps.
    """

    score: Tensor
    variance: Tensor | None
    attention: Tensor  # (U, K)
    p_u: Tensor  # (U, d_u)
    theta_u: list[Tensor]
    mixing: Tensor | None
    mixing_read: Tensor | None  # (U, d_e, 2 d_e), a_u^T M_UI
    last_layer: Tensor | None  # (B, F), the adapted w
    last_layer_prior: Tensor | None  # (B, F), what the profile alone predicts of it


class Mamo:
    """Parameters, memories and tables of one model version, and the forward pass."""

    def __init__(
        self,
        settings: ModelSettings,
        schema: FeatureSchema,
        scale: tuple[float, float],
        *,
        seed: int = 1,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.settings = settings
        self.scale = scale
        self.dtype = dtype
        self.device = torch.device(device)
        """Where `forward` runs. What a version holds stays in main memory, and what a batch touches is copied."""
        self.closed_form = settings.local == "closed_form"
        self.plain = (self.closed_form and settings.inner_steps > 0) or self.device.type != "cpu"
        """Whether `forward` and autograd adapt and differentiate: where no engine serves, or as tests and benchmarks set it."""
        d = settings.embedding_size
        # Where no feature is declared there still is a profile: the embedding of knowing nothing.
        nothing = {"profile": Feature(kind="categorical")}
        user_schema = schema.user or nothing
        item_schema = {name: feature for name, feature in schema.item.items() if settings.item_id or feature.kind != "id"} or nothing
        bounds = {"max_rows": settings.max_rows, "overflow_rows": settings.overflow_rows}
        self.user_table = Table("user", d, deviation=0.1, zero_from=d, seed=seed, dtype=dtype, **bounds)
        # The last column is the bias of an item, the sum over its features.
        self.item_table = Table("item", d + 1, deviation=0.1, zero_from=d, seed=seed, dtype=dtype, **bounds)
        self.users = Profiles(user_schema, self.user_table, remember=settings.max_profiles)
        # Of users no change is remembered: that one was forgotten may be the change.
        self.items = Profiles(item_schema, self.item_table, remember=settings.max_profiles, changes=ITEM_CHANGES)

        generator = torch.Generator().manual_seed(seed)
        phi = self._initial(len(user_schema) * d, len(item_schema) * d, generator)
        self.shapes = {name: value.shape for name, value in phi.items()}
        ends = list(itertools.accumulate(shape.numel() for shape in self.shapes.values()))
        self.spans = dict(zip(self.shapes, slices(ends), strict=True))
        """Where each parameter stands in the vector of all."""
        self.set_vector(torch.cat([value.flatten() for value in phi.values()]).to(dtype))
        self.user_names = [name for name in self.shapes if name.startswith("user.")]
        self.item_names = [name for name in self.shapes if name.startswith("item.")]
        starts = {name: of.start for name, of in self.spans.items()}
        user_layers, item_layers = (
            np.array([(starts[name], self.shapes[name][0]) for name in names[::2]], np.int64)
            for names in (self.user_names, self.item_names)
        )
        self._in_place = Phi(
            vector=self.vector.numpy(),
            user=user_layers,
            item=item_layers,
            starts=np.array([starts.get(name, -1) for name in OTHERS], np.int64),
            activation=CODES[settings.activation],
            size=d,
        )
        rows, d_u = settings.memory_rows, len(user_schema) * d
        size = sum(self.shapes[name].numel() for name in self.user_names)
        self.memory = Memory(
            profile=0.1 * torch.randn(rows, d_u, generator=generator, dtype=torch.float64).to(dtype),
            gradient=torch.zeros(rows, size, dtype=dtype),
            mixing=torch.cat([torch.zeros(d, d), torch.eye(d)], 1).to(dtype)
            + 0.01 * torch.randn(rows, d, 2 * d, generator=generator, dtype=torch.float64).to(dtype),
            weights=torch.zeros(rows, d + 1, dtype=dtype),
            centre=torch.zeros(d_u, dtype=dtype),
        )

    @property
    def tables(self) -> dict[str, Table]:
        """The embedding tables by name."""
        return {"user": self.user_table, "item": self.item_table}

    @property
    def analytic(self) -> bool:
        """Whether an engine takes the meta-gradients by hand, and so of many groups at once."""
        return not self.plain and (self.closed_form or self.settings.order == "first")

    def set_vector(self, vector: Tensor) -> None:
        """Set all of phi, given as one vector."""
        self.vector = vector
        self._phi: Weights = {}
        self._arrays: dict[str, Floats] = {}

    @property
    def phi(self) -> Weights:
        """The parameters by name, views of the vector."""
        if not self._phi:
            self._phi = self.of_vector(self.vector)
        return self._phi

    def of_vector(self, vector: Tensor) -> Weights:
        """Views of a vector as long as phi, by parameter."""
        parts = torch.split(vector, [shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def arrays(self) -> dict[str, Floats]:
        """Phi as arrays, which share its memory."""
        if not self._arrays:
            vector = self.vector.numpy()
            self._arrays = {name: vector[of].reshape(self.shapes[name]) for name, of in self.spans.items()}
        return self._arrays

    def in_place(self) -> Phi:
        """Phi as the loops of the closed form take it."""
        return self._in_place._replace(vector=self.vector.numpy())

    def _initial(self, d_u: int, d_i: int, generator: torch.Generator) -> Weights:
        """Phi at the start. One layer starts as the sum of the feature embeddings, more start as Glorot and Bengio (2010) have it."""
        settings = self.settings
        d = settings.embedding_size
        middle = sum(RATINGS) / 2

        def network(name: str, layers: int, into: int, out: int) -> Weights:
            sizes = [into, *[d] * (layers - 1), out]
            phi: Weights = {}
            for layer, (a, b) in enumerate(itertools.pairwise(sizes)):
                bound = (6 / (a + b)) ** 0.5
                glorot = (torch.rand(a, b, generator=generator, dtype=torch.float64) * 2 - 1) * bound
                identity = torch.eye(d, dtype=torch.float64).repeat(a // d, 1) if layers == 1 and b == d else glorot
                phi[f"{name}.{layer}.weight"] = identity
                phi[f"{name}.{layer}.bias"] = torch.zeros(b)
            return phi

        phi = network("user", settings.layers, d_u, d) | network("item", settings.layers, d_i, d)
        if not self.closed_form:
            phi |= network("rating", settings.rating_layers, d if settings.task_memory else 2 * d, 1)
            phi[f"rating.{settings.rating_layers - 1}.bias"] += middle
            return phi
        phi["prior.weight"] = torch.zeros(d, d + 1)
        phi["prior.bias"] = torch.cat([0.1 * torch.randn(d, generator=generator), torch.zeros(1)])
        phi["gate"] = torch.zeros(d + 1)
        phi["mean"] = torch.tensor([middle])
        phi["log_precision"] = torch.tensor([settings.rating_sd]).log() * -2
        phi["log_prior"] = torch.full((d + 1,), settings.prior_precision).log()
        if settings.recency:
            phi["recency"] = torch.tensor([settings.recency]).expm1().log()  # softplus gives it back
        return phi

    def leaves(self, batch: Batch, *, requires_grad: bool) -> tuple[Leaves, Batch]:
        """Copy out what the batch touches, and the batch, to the model's device."""

        def touched(profiles: Profiles, places: Numbers) -> tuple[RowKeys, Tensor, Encoded]:
            (rows, weights), table = profiles.encoded(places), profiles.table
            unique = distinct(rows.flatten().numpy(), table.cells)
            values = table.values[torch.from_numpy(unique)].to(self.device).requires_grad_(requires_grad)
            own = torch.from_numpy(table.cells[rows.numpy()])
            return table.keys_of(unique), values, Encoded(own.to(self.device), weights.to(self.device))

        phi = {name: value.detach().to(self.device).requires_grad_(requires_grad) for name, value in self.phi.items()}
        leaves = Leaves(phi, *touched(self.users, batch.user_places), *touched(self.items, batch.item_places))
        return leaves, batch.to(self.device)

    def forward(self, leaves: Leaves, batch: Batch) -> Prediction:
        """Adapt every task of a batch of one group to its support and score its query."""
        settings, phi, memory = self.settings, leaves.phi, self.memory.to(self.device)
        support = batch.support.padded()

        # Profiles, and what the memories hold for users like these (Eq. 1, 3, 4, 7).
        p_u = self.users.embed(*leaves.user_profiles, leaves.user_values).flatten(1)
        item = self.items.embed(*leaves.item_profiles, leaves.item_values)
        p_i, bias = item[..., :-1].flatten(1), item[..., -1].sum(1)
        attention = memory.attention(p_u, settings.temperature, centred=settings.centred)
        theta_u = [phi[name].expand(len(p_u), *phi[name].shape) for name in self.user_names]
        if settings.feature_memory:
            shift = torch.split(attention @ memory.gradient, [phi[name].numel() for name in self.user_names], 1)
            theta_u = [theta - settings.tau * b.view(theta.shape) for theta, b in zip(theta_u, shift, strict=True)]  # Eq. 9
        mixing = None
        if settings.task_memory:
            mixing = torch.einsum("uk,kab->uab", attention, memory.mixing).requires_grad_(theta_u[0].requires_grad)  # Eq. 7

        # Fast weights: those of the user where tasks share them, one copy a task where each takes its own gradient steps (Eq. 10).
        task = batch.user_of

        def of_tasks(theta_u: list[Tensor], mixing: Tensor | None) -> Weights:
            own = {name: theta[task] for name, theta in zip(self.user_names, theta_u, strict=True)}
            return own if mixing is None else own | {"mixing": mixing[task]}

        fast = dict(phi) | of_tasks(theta_u, mixing)
        written = theta_u, mixing
        if settings.inner_steps and settings.local != "none":
            fast = self._inner_loop(fast, support, p_u[task], p_i, bias)
            if settings.adapts_inner_layers:
                written = [fast[name] for name in self.user_names], fast.get("mixing")
            else:
                # Nodes of the query's own: what is written of them, in first order, must not pass through the steps of other layers.
                written = [theta.view_as(theta) for theta in theta_u], None if mixing is None else mixing.view_as(mixing)
                fast |= of_tasks(*written)
        if not self.closed_form:
            score = self._rate(fast, p_u[task], p_i[batch.query_items])
            return Prediction(score, None, attention, p_u, *written, mixing, None, None)

        # The last layer, exactly (the design's closed form).
        e_u = self._network(fast, "user", settings.layers, p_u[task][:, None])
        prior, profile_prior = self._prior(fast, e_u, attention[task] @ memory.weights)
        precision = phi["log_precision"].exp()
        weight = precision * support.mask
        if "recency" in phi:
            weight = weight * (1 + support.newer) ** -softplus(phi["recency"])
        items, n = torch.cat([support.items, batch.query_items], 1), support.items.shape[1]
        x, offset = self._features(fast, e_u, p_i, items), phi["mean"] + bias[items]
        posterior = Posterior(x[:, :n], support.ratings - offset[:, :n], weight, phi["log_prior"].exp(), prior)
        on_query, variance = posterior.predict(x[:, n:])
        score = offset[:, n:] + on_query
        return Prediction(score, variance + 1 / precision, attention, p_u, *written, mixing, posterior.mean, profile_prior)

    def _network(self, theta: Weights, name: str, layers: int, x: Tensor) -> Tensor:
        """Fully connected layers; weights and biases may have a leading dimension of tasks, which x (B, n, in) then has as well."""
        act = ACTIVATIONS[self.settings.activation]
        for layer in range(layers):
            bias = theta[f"{name}.{layer}.bias"]
            x = x @ theta[f"{name}.{layer}.weight"] + (bias[:, None] if bias.dim() > 1 else bias)
            if layer < layers - 1:
                x = act(x)
        return x

    def _rate(self, fast: Weights, p_u: Tensor, p_i: Tensor) -> Tensor:
        """Eq. 1 and 2 with a rating network: scores (B, n) of items with profiles (B, n, d_i) for users with profiles (B, d_u)."""
        e_u = self._network(fast, "user", self.settings.layers, p_u[:, None])
        e_i = self._network(fast, "item", self.settings.layers, p_i)
        both = torch.cat([e_u.expand_as(e_i), e_i], -1)
        if "mixing" in fast:
            both = both @ fast["mixing"].mT
        return self._network(fast, "rating", self.settings.rating_layers, both)[..., 0]

    def _features(self, fast: Weights, e_u: Tensor, p_i: Tensor, items: Tensor) -> Tensor:
        """Features x (B, n, F) of the items numbered (B, n): M_uI [e_u, e_i], the inside of Eq. 2, and the constant 1.

        As [e_i, 1] times a matrix of the user's own, so that e_u (B, 1, d_e) enters once a task and not once an item. Without M_uI the
        features are e_i: what e_u could add to every item alike is the constant's business.
        """
        if fast["item.0.weight"].dim() == 2:
            # Shared by all tasks: each item's embedding is computed once.
            x = pad(self._network(fast, "item", self.settings.layers, p_i), (0, 1), value=1.0)[items]
        else:
            x = pad(self._network(fast, "item", self.settings.layers, p_i[items]), (0, 1), value=1.0)
        if "mixing" not in fast:
            return x
        of_user, of_item = fast["mixing"].mT.chunk(2, 1)
        return x @ torch.cat([pad(of_item, (0, 1)), pad(e_u @ of_user, (0, 1), value=1.0)], 1)

    def _prior(self, fast: Weights, e_u: Tensor, remembered: Tensor) -> tuple[Tensor, Tensor]:
        """The prior mean w0 (B, F) of the last layer: what the profile predicts, plus what M_w ``remembered`` (B, F) of users like this."""
        of_profile = e_u[:, 0] @ fast["prior.weight"] + fast["prior.bias"]
        if not self.settings.task_memory:
            return of_profile, of_profile
        return of_profile + fast["gate"] * remembered, of_profile

    def _inner_loop(self, fast: Weights, support: Padded, p_u: Tensor, p_i: Tensor, bias: Tensor) -> Weights:
        """Eq. 11. Before a closed form the last layer stands at what the profile predicts of it."""
        settings = self.settings
        heads = ("rating.",) if settings.local == "decision" else ("user.", "item.", "rating.", "mixing")
        names = [name for name in fast if name.startswith(heads)]
        tasks = len(p_u)
        for name in names:
            if name in self.phi and fast[name].dim() == self.phi[name].dim():
                fast[name] = fast[name].expand(tasks, *fast[name].shape)

        def predict(weights: Weights) -> Tensor:
            if not self.closed_form:
                return self._rate(weights, p_u, p_i[support.items])
            e_u = self._network(weights, "user", settings.layers, p_u[:, None])
            x = self._features(weights, e_u, p_i, support.items)
            of_profile = self._prior(weights, e_u, torch.zeros_like(weights["gate"]))[1]
            return weights["mean"] + bias[support.items] + (x @ of_profile[..., None])[..., 0]

        return gradient_steps(
            fast,
            names,
            predict,
            support.ratings,
            support.mask,
            rate=settings.inner_rate,
            steps=settings.inner_steps,
            clip=settings.inner_clip,
            second_order=settings.order == "second",
        )
