"""What of the model can be set: the feature schema, the sizes, the switches of the ablation, and the two presets."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

RATINGS = 1.0, 5.0
"""The scale that the model works on, whatever the ratings' own: its noise, rates and memories are in points of this one."""


class Feature(BaseModel):
    """One feature of a profile.

    ``id`` is the item's own id and takes no value. ``categorical`` holds one category, ``multivalued`` several, which count alike
    (past ``max_values`` they are ignored).
    ``numeric`` holds a number x, seen as (x - mean) / scale along one learned direction and, with ``bins``, as the category of the
    bin it falls into: bin k holds the numbers from bins[k-1] up to but not including bins[k].
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["id", "categorical", "multivalued", "numeric"]
    mean: float = Field(default=0.0, description="of numeric: the number that counts as 0")
    scale: float = Field(default=1.0, gt=0, description="of numeric: how much more counts as 1")
    bins: tuple[float, ...] = Field(
        default=(), description="of numeric: rising bounds; a category is from one up to but not including the next"
    )
    max_values: int = Field(default=8, ge=1, le=256, description="of multivalued: as many count, what comes after them is ignored")

    @property
    def slots(self) -> int:
        """How many rows of the embedding table one value of this feature may use."""
        match self.kind:
            case "multivalued":
                return self.max_values
            case "numeric":
                return 2 if self.bins else 1
        return 1

    @model_validator(mode="after")
    def _bins_rise(self) -> Self:
        if any(low >= high for low, high in zip(self.bins, self.bins[1:], strict=False)):
            msg = f"bins must rise, not {list(self.bins)}"
            raise ValueError(msg)
        return self


class FeatureSchema(BaseModel):
    """The features that the model looks at; whatever else a profile holds is ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user: dict[str, Feature] = Field(default_factory=dict, description="features of user profiles, by name; an id is not allowed here")
    item: dict[str, Feature] = Field(
        default_factory=lambda: {"id": Feature(kind="id")}, description="features of item profiles, by name; of kind id at most one"
    )

    @model_validator(mode="after")
    def _ids_in_place(self) -> Self:
        if any(feature.kind == "id" for feature in self.user.values()):
            msg = "a user profile holds no user id (a new user would have none to go by)"
            raise ValueError(msg)
        if sum(feature.kind == "id" for feature in self.item.values()) > 1:
            msg = "at most one item feature is of kind id"
            raise ValueError(msg)
        if not self.item:
            msg = "at least one item feature is needed"
            raise ValueError(msg)
        for name in (*self.user, *self.item):
            if not name or "=" in name:
                msg = f'a feature may not be named "{name}": the rows of its values are named NAME=VALUE'
                raise ValueError(msg)
        return self


class ModelSettings(BaseModel):
    """The model's settings. Symbols are those of MAMO (KDD 2020); every default is that of the preset ``default``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Sizes
    embedding_size: int = Field(default=12, ge=1, le=1024, description="d_e, width of user and item embeddings [numbers]")
    item_id: bool = Field(default=True, description="whether features of kind id count; the paper knows an item by its content alone")
    layers: int = Field(default=1, ge=1, le=4, description="fully connected layers of the user and of the item network [layers]")
    rating_layers: int = Field(
        default=1, ge=1, le=4, description="fully connected layers of the rating network (gradient steps only) [layers]"
    )
    activation: Literal["relu", "tanh", "softplus"] = Field(default="relu", description="between the layers of a network")
    memory_rows: int = Field(default=8, ge=1, le=1024, description="K, rows of each memory, one for each type of user [rows]")
    max_rows: int = Field(
        default=1_000_000,
        ge=1,
        le=100_000_000,
        description="ids or values that one embedding table holds; those past it share overflow rows [rows]",
    )
    max_profiles: int = Field(
        default=2_000_000, ge=1, le=100_000_000, description="profiles held of each side; those past it count as missing [profiles]"
    )
    overflow_rows: int = Field(default=64, ge=1, le=65536, description="rows shared by the ids and values past max_rows [rows]")

    # Switches of the ablation
    memory: Literal["both", "feature", "task", "off"] = Field(default="both", description="which memories are read and written")
    local: Literal["closed_form", "all", "decision", "none"] = Field(
        default="closed_form",
        description="local adaptation: the last layer exactly, gradient steps on all fast weights, on the rating layers alone, or none",
    )

    # Local adaptation by gradient steps, Eq. 9-11
    tau: float = Field(
        default=100.0,
        ge=0,
        le=1_000_000,
        description="scale at which the user-embedding memory shifts the user network, Eq. 9; `paper` has .05",
    )
    inner_rate: float = Field(default=0.01, gt=0, le=10, description="rho, rate of the inner gradient steps, Eq. 11")
    inner_steps: int = Field(default=0, ge=0, le=100, description="inner gradient steps, Eq. 11 [steps]")
    inner_clip: float = Field(default=0.0, ge=0, description="bound on the norm of a user's inner gradient; 0 is none")
    order: Literal["first", "second"] = Field(default="first", description="whether meta-gradients pass through the inner gradient steps")

    # Local adaptation in closed form
    rating_sd: float = Field(
        default=0.9,
        gt=0,
        le=100,
        description="standard deviation of a rating's noise at the start, on a scale of 1 to 5, which every other is brought to [points]",
    )
    prior_precision: float = Field(
        default=4.0, gt=0, le=1_000_000, description="precision of each weight of the last layer at the start, learned from there"
    )
    recency: float = Field(
        default=0.3,
        ge=0,
        le=5,
        description="at the start, how fast a rating loses weight with k newer ones, (1 + k)^-recency; 0 is not at all",
    )
    task_step: float = Field(
        default=1.0, ge=0, le=100, description="rate of the one gradient step that stands for adapting M_uI where no inner step does"
    )

    # Memories, Eq. 3-8
    temperature: float = Field(default=5.0, gt=0, le=1000, description="factor on the cosine before the softmax of Eq. 3")
    centred: bool = Field(default=True, description="whether attention looks at profiles less their running mean")
    gated: bool = Field(default=True, description="whether a memory row forgets only as far as it is attended to")
    profile_half_life: float = Field(
        default=100.0, gt=0, description="alpha of Eq. 5, as users fully attended until half is forgotten [users]"
    )
    gradient_half_life: float = Field(default=100.0, gt=0, description="beta of Eq. 6, likewise [users]")
    task_half_life: float = Field(default=100.0, gt=0, description="gamma of Eq. 8, likewise [users]")

    # Meta-update, Eq. 12
    loss: Literal["squared", "gaussian"] = Field(
        default="gaussian", description="query loss; gaussian is the log loss of the closed form's own variance"
    )
    optimiser: Literal["sgd", "adam"] = Field(default="adam", description="how phi follows its gradient")
    learning_rate: float = Field(default=0.001, gt=0, le=10, description="lambda of Eq. 12")
    network_rate: float = Field(default=0.0001, ge=0, le=10, description="lambda of the user and item networks")
    row_rate: float = Field(default=0.001, gt=0, le=10, description="lambda of the rows of embedding tables")
    scalar_rate: float = Field(default=0.003, gt=0, le=10, description="lambda of precisions, recency and gate")
    mean_rate: float = Field(default=0.03, gt=0, le=10, description="lambda of the mean rating, which starts at the middle of the scale")
    weight_decay: float = Field(
        default=0.003, ge=0, le=1, description="L2 in the gradient of the rows of item profiles, their biases among them"
    )
    user_decay: float = Field(default=0.001, ge=0, le=1, description="L2 in the gradient of the rows of user profiles")
    prior_decay: float = Field(
        default=0.003, ge=0, le=1, description="L2 in the gradient of the prior's network and of log Lambda: of the closed form"
    )
    reduction: Literal["mean", "sum"] = Field(
        default="mean", description="whether a round's gradients are averaged over its queries or summed"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.loss == "gaussian" and self.local != "closed_form":
            msg = f"loss = gaussian needs the variance of local = closed_form, which local = {self.local} has not"
            raise ValueError(msg)
        return self

    @property
    def adapts_inner_layers(self) -> bool:
        """Whether theta_u, theta_i and M_uI take gradient steps of their own for each task (Eq. 11)."""
        return self.inner_steps > 0 and self.local in {"all", "closed_form"}

    @property
    def feature_memory(self) -> bool:
        """Whether the profile and user-embedding memories shift the user network (Eq. 9)."""
        return self.memory in {"both", "feature"}

    @property
    def task_memory(self) -> bool:
        """Whether the task memories M_UI and M_w are in use (Eq. 2, 7, 8)."""
        return self.memory in {"both", "task"}


def rate(half_life: float) -> float:
    """The rate of a running mean that forgets half in ``half_life`` writes of full attention."""
    return float(1 - 2 ** (-1 / half_life))


def half_life(rate: float) -> float:
    """The inverse of `rate`."""
    return -1 / math.log2(1 - rate)


def digest(*parts: BaseModel | dict[str, Any]) -> str:
    """SHA-256 over settings, the same for the same values in any order of the fields."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The equations literally, at the sizes of the paper's reference code. docs/decisions/0002 records each difference.
    "paper": {
        "model": {
            "item_id": False,
            "embedding_size": 100,
            "layers": 2,
            "rating_layers": 2,
            "memory_rows": 8,
            "local": "all",
            "tau": 0.05,
            "inner_rate": 0.005,
            "inner_steps": 3,
            "temperature": 1.0,
            "centred": False,
            "gated": False,
            "profile_half_life": half_life(0.1),
            "gradient_half_life": half_life(0.05),
            "task_half_life": half_life(0.1),
            "loss": "squared",
            "optimiser": "sgd",
            "learning_rate": 0.01,
            "network_rate": 0.01,
            "row_rate": 0.01,
            "scalar_rate": 0.01,
            "mean_rate": 0.01,
            "weight_decay": 0.0,
            "user_decay": 0.0,
            "prior_decay": 0.0,
            "reduction": "sum",
        },
        "rehearsal": {"users": 0},
    },
}
"""Values of each preset by section of the settings; whatever a preset leaves out keeps its default."""
