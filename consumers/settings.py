"""Every setting of Coldstream: its name, default, unit and range. docs/settings.md is made from this file.

Where values come from (defaults, preset, file, environment, flags) is `consumers.layers`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from consumers.threads import allowed_cores
from model.settings import RATINGS, FeatureSchema, ModelSettings

if TYPE_CHECKING:
    from streaming.validation import Limits

NAME = re.compile(r"[A-Za-z0-9._-]*")
DAY_MS = 86_400_000
BROKER = re.compile(r"embedded:.+|kafka:[^\s,:]+:\d+(,[^\s,:]+:\d+)*")


def setting(default: Any, description: str, unit: str = "", **constraints: Any) -> Any:  # noqa: ANN401 - as pydantic.Field
    """A documented field; ``constraints`` are those of `pydantic.Field`. The unit ends the description, in brackets."""
    return Field(default, description=f"{description} [{unit}]" if unit else description, **constraints)


class Section(BaseModel):
    """A table of settings: immutable, and without names that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class Rating(Section):
    """The scale of ratings. Scores stay inside it; an event off the scale is a dead letter."""

    minimum: float = setting(1.0, "Lowest rating.", "rating", ge=-1e6, le=1e6)
    maximum: float = setting(5.0, "Highest rating; above rating.minimum.", "rating", ge=-1e6, le=1e6)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.maximum <= self.minimum:
            msg = f"rating.maximum ({self.maximum:g}) must be above rating.minimum ({self.minimum:g})"
            raise ValueError(msg)
        return self


class LimitSettings(Section):
    """What an event or profile may hold. Whatever is larger, deeper or outside of it is a dead letter."""

    max_event_bytes: int = setting(65_536, "Size of a record's value.", "bytes", ge=64, le=16_777_216)
    max_depth: int = setting(8, "Nesting of maps and lists, the event itself being the first.", "levels", ge=2, le=64)
    max_id_bytes: int = setting(256, "Length of a user or item id.", "bytes", ge=1, le=4096)
    max_features: int = setting(256, "Features in a profile.", "features", ge=1, le=65_536)
    max_values: int = setting(256, "Values of one multi-valued feature.", "values", ge=1, le=65_536)
    max_text_bytes: int = setting(1024, "Length of one feature name or value.", "bytes", ge=1, le=65_536)
    earliest_ms: int = setting(DAY_MS, "Earliest event time accepted (default: 1970-01-02).", "ms since the epoch", ge=-62_135_596_800_000)
    latest_ms: int = setting(
        7_258_118_400_000,
        "Latest event time accepted (default: 2200-01-01); after limits.earliest_ms.",
        "ms since the epoch",
        le=253_402_300_799_999,
    )

    max_candidates: int = setting(1000, "Items that one request names.", "items", ge=1, le=65_536)
    max_n: int = setting(100, "How many of the best one request asks for.", "items", ge=1, le=65_536)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.latest_ms <= self.earliest_ms:
            msg = f"limits.latest_ms ({self.latest_ms}) must be after limits.earliest_ms ({self.earliest_ms})"
            raise ValueError(msg)
        return self


KEPT = {"ge": 0, "le": 3650 * DAY_MS}


class Retention(Section):
    """How long the topics that are kept by time keep their records."""

    interactions: int = setting(0, "Interactions; 0 keeps them for ever.", "ms", **KEPT)
    scores: int = setting(0, "Scores; 0 keeps them for ever.", "ms", **KEPT)
    requests: int = setting(DAY_MS, "Requests; 0 keeps them for ever.", "ms", **KEPT)
    dead_letters: int = setting(0, "Dead letters; 0 keeps them for ever.", "ms", **KEPT)


class TopicSettings(Section):
    """How topics are made (`coldstream topics create`). Topics that exist are not changed."""

    partitions: int = setting(
        8, "Partitions of interactions, requests, users, support, updates and scores; fixed once made.", "partitions", ge=1, le=4096
    )
    retention_ms: Retention = Field(default_factory=Retention, description="By topic.")
    updates_bytes: int = setting(268_435_456, "Updates kept, for each partition.", "bytes", ge=1_048_576)
    model_bytes: int = setting(1_073_741_824, "Model versions kept.", "bytes", ge=1_048_576)
    max_record_bytes: int = setting(
        1_000_000, "Largest record, key and value together; larger ones are cut into chunks.", "bytes", ge=4096, le=67_108_864
    )


class WorkerSettings(Section):
    """The process that scores."""

    micro_batch: int = setting(
        16,
        "Events of one partition scored at one model version; behind a backlog several are committed together.",
        "events",
        ge=1,
        le=65_536,
    )
    support_size: int = setting(100, "Interactions kept for each user, the last ones.", "interactions", ge=1, le=10_000)
    max_users: int = setting(
        0, "Users held for each partition; one more, and the user silent for longest is forgotten. 0 is without bound.", "users", ge=0
    )
    poll_timeout_ms: int = setting(500, "Longest wait for an event before the worker looks at its other duties.", "ms", ge=1, le=5000)
    linger_ms: int = setting(
        20,
        "Least time from one micro-batch of a live worker to the next, for it to fill; lockstep never cuts by time.",
        "ms",
        ge=0,
        le=60_000,
    )
    request_deadline_ms: int = setting(
        2000,
        "How long a request waits for interactions that stood in the log before it; then it is answered without them and marked stale.",
        "ms",
        ge=0,
        le=600_000,
    )
    state_dir: str = setting(
        "",
        "Folder of the local stores, one file for each partition, so that a restart reads only the rest of the changelog; empty: "
        "support sets are held in memory alone.",
    )
    standby: bool = setting(
        False, "Keep stores of the partitions that others own, too, and follow their changelogs; needs a worker.state_dir of its own."
    )
    skip_lost: bool = setting(
        False,
        "Where retention removed events before they were scored, go on behind them: they are lost, said and counted. Otherwise a worker "
        "that is given such a partition ends, and says so.",
    )
    frozen: bool = setting(False, "Score and keep support sets, but learn nothing: no update is written.")


class TrainerSettings(Section):
    """The process that learns: it folds the workers' updates into model versions."""

    meta_update: int = setting(16, "Events whose query gradients make one update (Eq. 12).", "events", ge=1, le=65_536)
    round_updates: int = setting(1, "Updates folded into one version.", "updates", ge=1, le=65_536)
    snapshot_every: int = setting(
        500,
        "Versions between two snapshots; fewer where they fill a quarter of topics.model_bytes, which must always hold all since the last.",
        "versions",
        ge=1,
        le=1_000_000,
    )
    stale_rounds: int = setting(
        64,
        "Versions that updates made at one version may lead to, one by one: an update made s versions ago is folded in one version with "
        "others, s / this rounded up. 0: never more than round_updates; so it is in lockstep, where none is made behind.",
        "versions",
        ge=0,
    )
    max_staleness: int = setting(0, "An update made more versions ago is dropped and counted; 0 is without limit.", "versions", ge=0)
    staleness_half_life: float = setting(
        0.0,
        "An update made s versions ago has weight 0.5^(s / this): so much of its gradient counts, and so far on their way go the memories; "
        "the count of events that a round is divided by stays. 0: all count alike.",
        "versions",
        ge=0,
        le=1e9,
    )


class RehearsalSettings(Section):
    """Gradients from the support sets of earlier users, so that the model does not learn from the last burst alone."""

    users: int = setting(64, "Users drawn for each meta-update; 0 is off.", "users", ge=0, le=65_536)
    query: int = setting(5, "Interactions of a rehearsed user that are scored from those before them.", "interactions", ge=1, le=1000)

    @property
    def enabled(self) -> bool:
        """Whether any user is rehearsed."""
        return self.users > 0


class MetricsSettings(Section):
    """The HTTP endpoint for Prometheus and for health checks: /metrics, /healthz, /readyz."""

    enabled: bool = setting(True, "Serve the endpoint.")
    host: str = setting("127.0.0.1", "Address to listen at. Anything but loopback shows the metrics to the network.", min_length=1)
    port: int = setting(9464, "Port to listen at; 0 takes any free one, which is logged.", "port", ge=0, le=65_535)


class LogSettings(Section):
    """How the broker is used."""

    durability: Literal["process", "power"] = setting(
        "process", "What a commit of the embedded log survives: a killed process, or a loss of power too (a sync to disk for each commit)."
    )
    session_timeout_ms: int = setting(6000, "A group member that is silent for longer loses its partitions.", "ms", ge=1000, le=600_000)


class KafkaSettings(Section):
    """How Apache Kafka is reached and used. Without effect on the embedded log."""

    replication: int = setting(0, "Copies of every topic that is made; 0 takes the brokers' own default.", "copies", ge=0, le=32)
    min_insync: int = setting(
        0, "Copies that must have a record before it counts, for topics that are made; 0 takes the brokers' own.", "copies", ge=0, le=32
    )
    transaction_timeout_ms: int = setting(
        15_000, "Longest wait for a step's transaction; one whose process is gone is aborted after it.", "ms", ge=1000, le=900_000
    )
    request_timeout_ms: int = setting(10_000, "Longest wait for any other answer of a broker.", "ms", ge=500, le=300_000)
    max_poll_interval_ms: int = setting(
        60_000, "A worker that does not come round for longer loses its partitions, though its process lives.", "ms", ge=1000, le=3_600_000
    )
    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = setting("PLAINTEXT", "How the connection is protected.")
    ca_file: str = setting("", "Certificates of the authorities to trust, PEM; empty takes the system's.")
    cert_file: str = setting("", "Our own certificate, PEM, where brokers ask for one.")
    key_file: str = setting("", "Its private key, PEM.")
    key_password_file: str = setting("", "File with the key's password.")
    check_hostname: bool = setting(True, "Whether a broker's certificate must name its host.")
    mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = setting("", "How we say who we are, under SASL.")
    username: str = setting("", "Who we are, under SASL.")
    password_file: str = setting("", "File with the password; without it, the environment's COLDSTREAM_KAFKA_PASSWORD is taken.")

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.protocol.startswith("SASL") and not (self.mechanism and self.username):
            msg = f"kafka.mechanism and kafka.username must be set for kafka.protocol = {self.protocol}"
            raise ValueError(msg)
        if self.min_insync > self.replication > 0:
            msg = f"kafka.min_insync ({self.min_insync}) must not be above kafka.replication ({self.replication})"
            raise ValueError(msg)
        return self


class ReplaySettings(Section):
    """How a historical log is read. Columns are named by its header, or numbered from 0 where it has none."""

    user_column: str = setting("user", "Column of the user id.", min_length=1)
    item_column: str = setting("item", "Column of the item id.", min_length=1)
    rating_column: str = setting("rating", "Column of the rating.", min_length=1)
    timestamp_column: str = setting("timestamp", "Column of the event's time.", min_length=1)
    timestamp_unit: Literal["ms", "s", "iso"] = setting("ms", "What a time counts since the epoch, or iso for ISO 8601 text.")
    delimiter: str = setting("", "Between columns; empty: a comma for .csv, a tab for .tsv.", max_length=8)
    list_separator: str = setting("|", "Between the values of a multivalued feature in a file of profiles.", min_length=1, max_length=8)
    encoding: str = setting("utf-8", "Of the file's text.", min_length=1)
    header: bool = setting(True, "Whether the first line names the columns.")

    @field_validator("encoding")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            codecs.lookup(value)
        except LookupError:
            msg = "there is no such encoding"
            raise ValueError(msg) from None
        return value


class Settings(Section):
    """All settings. ``Settings()`` holds the defaults alone; `consumers.layers.load` reads every source."""

    broker: str = setting("embedded:runs/coldstream.db", 'The log: "embedded:PATH" or "kafka:HOST:PORT,...".')
    topic_prefix: str = setting("", "Put before the names of topics, groups and transactional ids.", max_length=100)
    group: str = setting("coldstream", "Consumer group of the workers, and stem of transactional ids.", min_length=1, max_length=100)
    seed: int = setting(1, "Of every random choice.", ge=0, le=2**63 - 1)
    threads: int = setting(
        0,
        "Cores to count on; 0: all that this process may use. Arithmetic takes half of them, at least one thread.",
        "threads",
        ge=0,
        le=1024,
    )
    device: Literal["cpu", "cuda"] = setting("cpu", "Where adapting and learning are computed; cuda needs a GPU that torch can use.")
    preset: Literal["default", "paper"] = setting("default", "Values right above the defaults: paper is MAMO as printed.")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Least severe message that is logged.")
    log_format: Literal["auto", "console", "json"] = setting("auto", "auto: console on a terminal, JSON lines elsewhere.")

    rating: Rating = Field(default_factory=Rating)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    topics: TopicSettings = Field(default_factory=TopicSettings)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    trainer: TrainerSettings = Field(default_factory=TrainerSettings)
    rehearsal: RehearsalSettings = Field(default_factory=RehearsalSettings)
    # "schema" is taken by a method of pydantic's, so that only the outside calls it that.
    feature_schema: FeatureSchema = Field(default_factory=FeatureSchema, alias="schema")
    model: ModelSettings = Field(default_factory=ModelSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    replay: ReplaySettings = Field(default_factory=ReplaySettings)

    @field_validator("broker")
    @classmethod
    def _broker(cls, value: str) -> str:
        if not BROKER.fullmatch(value):
            msg = 'must be "embedded:PATH" or "kafka:HOST:PORT,..."'
            raise ValueError(msg)
        return value

    @field_validator("topic_prefix", "group")
    @classmethod
    def _name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            msg = "may hold letters, digits, dots, dashes and underscores"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _copies_have_a_place(self) -> Self:
        if self.worker.standby and not self.worker.state_dir:
            msg = "worker.standby needs worker.state_dir, the folder that the copies are kept in"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _heard_in_time(self) -> Self:
        silent = self.worker.poll_timeout_ms + self.worker.linger_ms
        if silent >= self.log.session_timeout_ms:
            msg = (
                f"log.session_timeout_ms ({self.log.session_timeout_ms}) must be above worker.poll_timeout_ms + worker.linger_ms "
                f"({silent}), or a worker that waits for events is taken for dead"
            )
            raise ValueError(msg)
        return self

    @property
    def group_id(self) -> str:
        """The consumer group with the prefix before it, as the broker knows it; transactional ids begin with it."""
        return self.topic_prefix + self.group

    def cores(self) -> int:
        """How many cores this process counts on: ``threads``, or those that it may use."""
        return self.threads or allowed_cores()

    def event_limits(self) -> Limits:
        """The limits and the rating scale as the checks of events take them."""
        from streaming.validation import Limits

        limits = self.limits
        return Limits(
            max_event_bytes=limits.max_event_bytes,
            max_depth=limits.max_depth,
            max_id_bytes=limits.max_id_bytes,
            max_features=limits.max_features,
            max_values=limits.max_values,
            max_text_bytes=limits.max_text_bytes,
            earliest=limits.earliest_ms,
            latest=limits.latest_ms,
            rating_min=self.rating.minimum,
            rating_max=self.rating.maximum,
            max_candidates=limits.max_candidates,
            max_n=limits.max_n,
        )

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the settings that a model's values depend on: model, schema, rating and seed.

        Versions of a model carry it. The order in which fields are declared or given does not matter.
        """
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def decisive(self) -> dict[str, Any]:
        """The settings that `digest` is of, nested, as JSON has them."""
        found = self.model_dump(mode="json", by_alias=True, include={"model", "feature_schema", "rating", "seed"})
        # Models of other scales that were made before ratings were brought to this one hold other values.
        if (self.rating.minimum, self.rating.maximum) != RATINGS:
            found["rating"]["brought_to"] = list(RATINGS)
        return found
