"""`coldstream dead-letters`: list them, show one, and send records back after a fix."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console

if TYPE_CHECKING:
    from consumers.deadletters import Letter, Original, Wanted
    from streaming.events import SentBack
    from streaming.log import Topic

app = typer.Typer(name="dead-letters", no_args_is_help=True, help="List and show what could not be taken, and send it back after a fix.")

Reasons = Annotated[list[str] | None, typer.Option("--reason", metavar="R", help="Only letters of this reason; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("list", epilog="[bold]coldstream dead-letters list --reason wrong-key --since 7d[/bold]")
def list_letters(
    ctx: typer.Context,
    reason: Reasons = None,
    since: Annotated[str | None, typer.Option(metavar="WHEN", help="Written since: 7d, 12h, or a date or time (ISO 8601).")] = None,
    topic: Annotated[str | None, typer.Option(metavar="TOPIC", help="Only of this source: a topic, or file:NAME.")] = None,
    partition: Annotated[int | None, typer.Option(min=0, metavar="N", help="Only of this partition of the source.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The last so many.")] = 50,
    as_json: AsJson = False,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """List dead letters by position, oldest first, and what has been sent back."""
    settings = configured(ctx, config, sets, verbose).settings
    from consumers.deadletters import letters, sent_back
    from consumers.opening import connect, topics_of

    topics = topics_of(settings)
    wanted = _wanted(reason)._replace(since=None if since is None else _moment(since), topic=_source(topic, topics), partition=partition)
    kept, found = deque["Letter"](maxlen=limit), 0
    with connect(settings) as log:
        for letter in letters(log, topics, wanted):
            kept.append(letter)
            found += 1
        sent = sent_back(log, topics)
    if as_json:
        import msgspec

        rows = [_plain(letter, sent.get(letter.position)) for letter in kept]
        typer.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2))
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("position", "written", "reason", "source", "detail", "sent back"):
        table.add_column(column, no_wrap=column != "detail")
    for letter in kept:
        back = sent.get(letter.position)
        source = "{}[{}] {}".format(*letter.letter.source)
        table.add_row(
            f"{letter.position}", _time(letter.at), *map(_text, (letter.letter.reason, source, letter.letter.detail)), _back(back) or ""
        )
    console().print(table)
    typer.echo(f"{found:,} dead letters" + (f", of which the last {limit:,} are shown (--limit)" if found > limit else ""))


@app.command("show", epilog="[bold]coldstream dead-letters show 17[/bold]")
def show_letter(
    ctx: typer.Context,
    position: Annotated[int, typer.Argument(min=0, help="As `coldstream dead-letters list` tells it.")],
    as_json: AsJson = False,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Show all of one dead letter, and the whole record behind it if that is still to be had.

    Bytes are shown escaped or in hexadecimal: whatever a sender wrote, nothing of it reaches the terminal as it is.
    """
    settings = configured(ctx, config, sets, verbose).settings
    from consumers.deadletters import Originals, letters, sent_back
    from consumers.opening import connect, topics_of
    from streaming.errors import OffsetOutOfRange

    topics = topics_of(settings)
    with connect(settings) as log, Originals(log) as originals:
        letter = next(letters(log, topics, _wanted(None)._replace(positions=frozenset([position]))), None)
        if letter is None:
            raise OffsetOutOfRange(f"{topics['dead-letters'].name} has no letter at {position}, or retention has removed it")
        original = originals.of(letter)
        back = sent_back(log, topics).get(position)
    if as_json:
        import msgspec

        record = original.record
        whole = {"from": original.where, "key": record.key if record else None, "value": record.value if record else None}
        typer.echo(msgspec.json.format(msgspec.json.encode(_plain(letter, back) | {"record": whole}), indent=2))
        return
    console().print(_page(letter, original, back))


@app.command(
    "send-back",
    epilog="[bold]coldstream dead-letters send-back 17 18[/bold]\n\n"
    "[bold]coldstream dead-letters send-back --reason wrong-key --set-key[/bold]",
)
def send_letters_back(
    ctx: typer.Context,
    positions: Annotated[list[int] | None, typer.Argument(metavar="POSITION...", help="Of the letters to send back.")] = None,
    reason: Reasons = None,
    everything: Annotated[bool, typer.Option("--all", help="All that retention has kept.")] = False,
    set_key: Annotated[
        bool, typer.Option("--set-key", help="Where the key is not the user of the value, take that user as the key.")
    ] = False,
    as_json: AsJson = False,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Send the records of dead letters back to the topics they came from, each once, after a fix of limits or keys.

    Each is checked by today's settings first; what is still malformed is refused, and the command ends with 6. It goes to the partition
    of its key, behind all that is there. Run again or by two at once, nothing is sent twice.
    """
    if sum((bool(positions), bool(reason), everything)) != 1:
        raise typer.BadParameter("name positions, or --reason, or --all", param_hint="POSITION...")
    settings = configured(ctx, config, sets, verbose).settings
    from consumers.deadletters import send_back
    from consumers.exits import Exit
    from consumers.opening import connect, require_topics, topics_of

    topics = topics_of(settings)
    wanted = _wanted(reason)._replace(positions=frozenset(positions or ()))
    counts = {"sent": 0, "sent before": 0, "refused": 0}
    with connect(settings) as log:
        require_topics(log, topics.values())
        for outcome in send_back(log, settings, topics, wanted, set_key=set_key):
            counts[outcome.outcome] += 1
            if as_json:
                import msgspec

                typer.echo(msgspec.json.encode(outcome))
            else:
                typer.echo(f"{outcome.position}: {outcome.outcome}, {_safe(outcome.detail)}")
    if not as_json:
        typer.echo(", ".join(f"{count:,} {what}" for what, count in counts.items()))
    if counts["refused"]:
        raise typer.Exit(Exit.DATA)


def _wanted(reasons: list[str] | None) -> Wanted:
    from consumers.deadletters import Wanted
    from streaming.events import REASONS

    for reason in reasons or ():
        if reason not in REASONS:
            raise typer.BadParameter(f"{_safe(reason)} is none; there are {', '.join(sorted(REASONS))}", param_hint="--reason")
    return Wanted(reasons=frozenset(reasons or ()))


def _moment(text: str) -> int:
    """A time in ms since the epoch; a span is before now."""
    import time

    from streaming.timerange import Before, parse_moment

    try:
        moment = parse_moment(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--since") from None
    return time.time_ns() // 1_000_000 - moment.span if isinstance(moment, Before) else moment


def _source(topic: str | None, topics: dict[str, Topic]) -> str | None:
    """A topic's name in the log: people may leave the prefix away."""
    return topics[topic].name if topic in topics else topic


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _back(sent: SentBack | None) -> str | None:
    return None if sent is None else f"{_time(sent.sent_at)} to {sent.topic}[{sent.partition}]"


def _safe(text: str) -> str:
    """Text that does nothing to a terminal: what is not printable is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text(text: str) -> str:
    """As `_safe`, and without what rich takes for markup."""
    from rich.markup import escape

    return escape(_safe(text))


def _plain(letter: Letter, sent: SentBack | None) -> dict[str, object]:
    """A letter as JSON has it; bytes are in base64."""
    import msgspec

    fields: dict[str, object] = msgspec.structs.asdict(letter.letter)
    return {"position": letter.position, "written": letter.at, **fields, "sent_back": sent}


def _page(letter: Letter, original: Original, sent: SentBack | None) -> object:
    from rich.table import Table

    held = letter.letter
    gone = f"gone: retention has removed it, or another stands in its place; here are the first {len(held.value or b''):,} bytes"
    where = {"source": "read from its topic, digest as in the letter", "letter": "all of it is in the letter", "gone": gone}
    key = original.record.key if original.record else held.key
    value = original.record.value if original.record else held.value
    table = Table.grid(padding=(0, 2))
    for name, text in (
        ("position", str(letter.position)),
        ("written", _time(letter.at)),
        ("reason", _text(held.reason)),
        ("detail", _text(held.detail)),
        ("source", _text("{}[{}] at {}".format(*held.source))),
        ("length", f"{held.length:,} bytes"),
        ("digest", _text(held.digest)),
        ("sent back", _back(sent) or "no"),
        ("record", where[original.where]),
        ("key", _bytes(key)),
        ("value", _bytes(value)),
    ):
        table.add_row(name, text)
    return table


def _bytes(data: bytes | None, most: int = 4096) -> str:
    """Bytes as text where they are printable UTF-8, else in hexadecimal with what is ASCII beside; the first ``most`` of them."""
    if data is None:
        return "none"
    more = f"\n... {len(data) - most:,} bytes more" if len(data) > most else ""
    data = data[:most]
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "\0"
    if text.isprintable():
        return (_text(text) or "empty") + more
    rows = (data[start : start + 16] for start in range(0, len(data), 16))
    shown = ("".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row) for row in rows)
    lines = [f"{16 * n:04x}  {data[16 * n : 16 * n + 16].hex(' '):47}  {_text(text)}" for n, text in enumerate(shown)]
    return "\n".join(lines) + more
