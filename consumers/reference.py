"""The pages docs/settings.md, docs/metrics.md and docs/cli.md, made from the code: ``python -m consumers.reference`` writes them.

A test fails while a page is not what this module makes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from consumers import catalogue, exits
from consumers.inspection import toml

MADE = "<!-- Made by `python -m consumers.reference`; edit the code that it is made from. -->"


def settings_page() -> str:
    """docs/settings.md."""
    parts = [
        MADE,
        "# Settings",
        'Later sources win: defaults, the preset (`preset = "paper"`), `coldstream.toml` in the working directory (or `--config FILE`, or the file that '
        "`COLDSTREAM_CONFIG` names), the environment, flags. `worker.micro_batch` is `micro_batch` under `[worker]` in the file, "
        "`COLDSTREAM_WORKER__MICRO_BATCH` in the environment and `--set worker.micro_batch=32` as a flag of every command; common settings have "
        "flags of their own. Lists and tables are JSON in the environment and in `--set`, and replace the whole value.",
        "`coldstream config` prints the values in force and where each came from. A setting that is unknown or wrong is an error that names it and its "
        "place, with exit code 2; so is any other variable that begins with `COLDSTREAM_` (in Kubernetes set `enableServiceLinks: false` where a service "
        "is called coldstream, or its own variables would count as settings).",
    ]
    entries = catalogue.entries().values()
    for table, model in catalogue.sections():
        own = [entry for entry in entries if entry.name.rpartition(".")[0] == table]
        if own:
            parts.append(f"## [{table}]" if table else "## At the top of the file")
            parts += [_sentence(model.__doc__)] if table else []
            parts.append(_table(("setting", "default", "unit", "allowed", "what it does"), map(_setting_row, own)))
    return _page(parts)


def _setting_row(entry: catalogue.Entry) -> tuple[str, ...]:
    return f"`{entry.name}`", f"`{toml(entry.default)}`", entry.unit, entry.allowed(), entry.description


def metrics_page() -> str:
    """docs/metrics.md."""
    from streaming.health import Health
    from streaming.metrics import GROUPS, HALF_LIFE, STAGES, Metrics

    rows = [
        (f"`{metric.name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.help) for metric in Metrics().described
    ]
    return _page(
        [
            MADE,
            "# Metrics and health",
            "Every worker and trainer serves `/metrics`, `/healthz` and `/readyz` at `metrics.host` and `metrics.port` (127.0.0.1:9464; with port 0 "
            "the one that was got is in the log). No label holds a user or item id. The usual `process_*` metrics are there too.",
            _table(("metric", "kind", "labels", "what it says"), rows),
            f"`stage` is one of {_words(STAGES)}. `earlier` is one of {_words(GROUPS)}: how many events the user had before the one scored; the groups "
            f"overlap. A running error is an exponentially weighted mean over the events of its group, in which an error counts half after {HALF_LIFE} more "
            "events; it is the weighted mean of just the values seen, from the first on, and NaN before that. `event_to_score_seconds` begins when the broker "
            "took the event, not at the event's own time, so the age of a replayed history is not in it, but its waiting in the topic is.",
            "## Health",
            "Both answer 200 or 503 and JSON: `ok`, and under `conditions` each condition with `ok` and `detail`. Where /healthz fails, restart the process; "
            "where /readyz fails, wait.",
            _table(("path", "conditions"), [("`/healthz`", _words(Health().live())), ("`/readyz`", _words(Health().ready()))]),
            "`main_loop`: the last turn of the main loop is young. `no_fatal_error`: nothing happened that it cannot go on from. `assignment`: partitions, or a "
            "place as stand-by, are held. `state`: support sets and tables are restored. `model`: a version is loaded. `progress`: the last commit is "
            "young, or there is nothing to do.",
        ]
    )


def cli_page() -> str:
    """docs/cli.md."""
    from typer.main import get_command

    from consumers.cli import app

    rows: list[tuple[str, str, str]] = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]  # a group, as there are several commands
        for path, leaf in (
            [(f"{name} {inner}", found) for inner, found in command.commands.items()] if hasattr(command, "commands") else [(name, command)]
        ):
            rows.append(
                (
                    f"`coldstream {path}`",
                    _sentence(_plain(leaf.help or "")),
                    "<br>".join(f"`{text}`" for text in _examples(leaf.epilog or "")),
                )
            )
    return _page(
        [
            MADE,
            "# Command line",
            "`coldstream COMMAND --help` tells each command's flags. `--config FILE`, `--set NAME=VALUE` and `--verbose` may stand before or behind the "
            "command's name. Results go to standard output, logs and errors to standard error: readable on a terminal, JSON lines elsewhere (`log_format`).",
            _table(("command", "what it does", "examples"), sorted(rows)),
            "## Exit codes",
            _table(("code", "meaning"), [(f"{code:d}", meaning) for code, meaning in exits.MEANING.items()]),
            "The first Ctrl-C or SIGTERM finishes the step in hand and commits it; the second ends the process at once, with 130 or 143, which loses nothing "
            "either: what is not committed does not count, and is done again.",
        ]
    )


def _plain(text: str) -> str:
    return re.sub(r"\[/?bold\]", "", text)


def _examples(epilog: str) -> list[str]:
    return re.findall(r"\[bold\](.*?)\[/bold\]", epilog)


def _sentence(doc: str | None) -> str:
    return " ".join((doc or "").partition("\n\n")[0].split())


def _words(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[], str]] = {"settings.md": settings_page, "metrics.md": metrics_page, "cli.md": cli_page}


def write(folder: Path) -> None:
    """Write every page into ``folder``."""
    for name, make in PAGES.items():
        (folder / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent.parent / "docs")
