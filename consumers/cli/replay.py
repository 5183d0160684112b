"""`coldstream replay`: fills a topic from a historical log, a file or another topic."""

from __future__ import annotations

import enum
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured

if TYPE_CHECKING:
    from consumers.settings import Settings
    from streaming.log import Log
    from streaming.sources import ColumnName, Source
    from streaming.timerange import TimeRange
    from streaming.topicsource import TopicSource

EXAMPLES = (
    "[bold]coldstream replay ratings.csv --user-column userId --item-column movieId[/bold]\n\n"
    "[bold]coldstream replay ratings.tsv.gz --timestamp-unit s --rate 60[/bold]\n\n"
    "[bold]coldstream replay movies.csv --into items --id-column movieId[/bold]\n\n"
    "[bold]coldstream replay --from-topic interactions --from-broker embedded:runs/old.db --last 7d --rate 10[/bold]"
)


FromTopic = Annotated[str | None, typer.Option("--from-topic", metavar="NAME", help="A topic, by its full name, in place of a file.")]
FromBroker = Annotated[
    str | None,
    typer.Option("--from-broker", metavar="BROKER", help="The log of that topic, which is only read; default: the setting broker."),
]
MOMENT = "an ISO 8601 date or time, milliseconds since the epoch, or a span before the newest event such as 7d"
Since = Annotated[str | None, typer.Option(metavar="TIME", help=f"Only events from this time on: {MOMENT}.")]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="Only events before this time.")]
Last = Annotated[
    str | None, typer.Option(metavar="SPAN", help="Only events at most this long before the newest one: 90s, 30m, 12h, 7d, 2w.")
]


class Into(enum.StrEnum):
    """The topic that a file fills."""

    INTERACTIONS = "interactions"
    USERS = "users"
    ITEMS = "items"


def command(
    ctx: typer.Context,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="CSV, TSV or JSONL, also gzipped (.gz).")] = None,
    from_topic: FromTopic = None,
    from_broker: FromBroker = None,
    into: Annotated[Into, typer.Option(help="The topic to fill.")] = Into.INTERACTIONS,
    rate: Annotated[str, typer.Option(metavar="RATE", help="max, or a multiple of the recorded pace: 2 is twice as fast.")] = "max",
    sort_by_time: Annotated[bool, typer.Option("--sort-by-time", help="Send lines in the order of their times.")] = False,
    since: Since = None,
    until: Until = None,
    last: Last = None,
    restart: Annotated[bool, typer.Option("--restart", help="Send everything again, also what earlier runs sent.")] = False,
    id_column: Annotated[str, typer.Option(metavar="COLUMN", help="With --into users or items: the column of the id.")] = "id",
    user_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="replay.user_column")] = None,
    item_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="replay.item_column")] = None,
    rating_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="replay.rating_column")] = None,
    timestamp_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="replay.timestamp_column")] = None,
    timestamp_unit: Annotated[str | None, typer.Option(metavar="UNIT", help="replay.timestamp_unit: ms, s or iso")] = None,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="replay.header: whether the first line names the columns.")
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Fill a topic from a historical log, each line or record exactly once.

    Interrupted and run again, it goes on where it was. Lines that cannot be taken go to dead-letters with their reason; records of a topic
    go on as they are. Without a header, columns are numbered from 0.

    Columns of profiles are features by the schema (settings schema.user, schema.item): numbers, texts, and lists of texts between
    replay.list_separator; RecBole's headers (name:token, name:float, name:token_seq) say it themselves.

    Times are those of the events. Every range of a source is a replay of its own. Topics are merged by time; a record or line whose time
    cannot be told is always taken.
    """
    from consumers.opening import connect, topics_of
    from consumers.replayer import replay
    from consumers.stop import Stop

    flags = {
        "replay.user_column": user_column,
        "replay.item_column": item_column,
        "replay.rating_column": rating_column,
        "replay.timestamp_column": timestamp_column,
        "replay.timestamp_unit": timestamp_unit,
        "replay.header": header,
    }
    settings = configured(ctx, config, sets, verbose, flags).settings
    pace, within = _pace(rate), time_range(since, until, last)
    if (file is None) == (from_topic is None):
        raise typer.BadParameter("name either a file or a topic", param_hint="FILE, --from-topic")
    if from_topic is not None and sort_by_time:
        raise typer.BadParameter("a topic is always merged by time; leave it out", param_hint="--sort-by-time")
    topics = topics_of(settings)
    from rich.console import Console

    from consumers.progress import ShareBar

    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        log = stack.enter_context(connect(settings, create=True))
        if file is not None:
            source: Source | TopicSource = file_source(file, settings, into, id_column)
        else:
            assert from_topic is not None  # noqa: S101 - asked for above
            source = topic_source(stack, settings, log, from_topic, from_broker, timed=into is Into.INTERACTIONS)
        log.create(topics.values())
        with ShareBar(Console(stderr=True), file.name if file is not None else f"topic {from_topic}") as bar:
            result = replay(
                log,
                source,
                topics,
                into=into.value,
                group=settings.group_id,
                rate=pace,
                sort_by_time=sort_by_time,
                within=within,
                restart=restart,
                on_progress=bar.update,
                stop=stop.__bool__,
            )
        refused = ", ".join(f"{count:,} {reason}" for reason, count in sorted(result.dead_letters.items()))
        what = "lines" if file is not None else "records"
        typer.echo(f"{into.value}: {result.events:,} sent in all, {result.sent:,} {what} in this run, {result.skipped:,} before")
        if not within.whole:
            typer.echo(f"{result.outside:,} outside {shown_range(result.since, result.until)}")
        if refused:
            typer.echo(f"dead letters: {refused}")
        if not result.done:
            stop.unfinished()


def topic_source(
    stack: ExitStack, settings: Settings, log: Log | None, topic: str, broker: str | None, *, timed: bool = True
) -> TopicSource:
    """The topic of this name in ``log``, or in the log that ``broker`` names, which is opened for reading only and closed by ``stack``.

    Raises `SettingsError` for a broker that is none, `UnknownTopic`, and `LogUnavailable`.
    """
    from consumers.layers import SettingsError
    from consumers.opening import connect
    from consumers.settings import BROKER
    from streaming.topicsource import TopicSource

    place = broker or settings.broker
    if not BROKER.fullmatch(place):
        raise SettingsError([f'--from-broker {broker}: must be "embedded:PATH" or "kafka:HOST:PORT,..."'])
    if log is None or place != settings.broker:
        log = stack.enter_context(connect(settings.model_copy(update={"broker": place}), read_only=True))
    return TopicSource(log, topic, place=place, timed=timed, limits=settings.event_limits())


def time_range(since: str | None, until: str | None, last: str | None) -> TimeRange:
    """The range that the flags name. Raises `typer.BadParameter`."""
    from streaming.timerange import Before, TimeRange, parse_moment, parse_span

    if last is not None and since is not None:
        raise typer.BadParameter("give one of them", param_hint="--last, --since")
    found: dict[str, int | Before | None] = {"since": None, "until": None}
    for name, text in (("since", since), ("until", until), ("last", last)):
        if text is None:
            continue
        try:
            found["since" if name == "last" else name] = Before(parse_span(text)) if name == "last" else parse_moment(text)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=f"--{name}") from None
    first, last_of = found["since"], found["until"]
    if isinstance(first, int) and isinstance(last_of, int) and first >= last_of:
        raise typer.BadParameter(f"{until} is not after {since}", param_hint="--until")
    return TimeRange(**found)


def shown_range(since: int | None, until: int | None) -> str:
    """The bounds of a range as people read them."""
    from streaming.timerange import shown_time

    return f"{'the beginning' if since is None else shown_time(since)} to {'the end' if until is None else shown_time(until)}"


def _pace(rate: str) -> float | Literal["max"]:
    if rate == "max":
        return "max"
    try:
        found = float(rate)
    except ValueError:
        raise typer.BadParameter(f"{rate!r} is neither max nor a number", param_hint="--rate") from None
    if not 0 < found < float("inf"):
        raise typer.BadParameter(f"it must be above 0, or max; it is {rate}", param_hint="--rate")
    return found


def _column(name: str, *, header: bool) -> ColumnName:
    return int(name) if not header and name.isdecimal() else name


def file_source(file: Path, settings: Settings, into: Into = Into.INTERACTIONS, id_column: str = "id") -> Source:
    """The file as the settings ``replay.*`` say, and of profiles ``schema``.

    Raises `SourceError` for one that cannot be read, or without these columns.
    """
    from streaming.sources import Mapped, interaction_source, profile_source
    from streaming.textfiles import Layout

    replay = settings.replay
    layout = Layout(delimiter=replay.delimiter or None, encoding=replay.encoding, header=replay.header)
    if into is not Into.INTERACTIONS:
        schema = settings.feature_schema
        return profile_source(
            file,
            id_column=_column(id_column, header=replay.header),
            kinds={name: feature.kind for name, feature in (schema.user if into is Into.USERS else schema.item).items()},
            separator=replay.list_separator,
            layout=layout,
            limits=settings.event_limits(),
        )
    columns = Mapped(
        *(
            _column(name, header=replay.header)
            for name in (replay.user_column, replay.item_column, replay.rating_column, replay.timestamp_column)
        )
    )
    return interaction_source(file, layout=layout, columns=columns, timestamps=replay.timestamp_unit, limits=settings.event_limits())
