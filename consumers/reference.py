"""The pages docs/settings.md, docs/metrics.md and docs/cli.md, made from the code: ``python -m consumers.reference`` writes them.

A test fails while a page is not what this module makes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from consumers import catalogue, exits
from consumers.inspection import toml
from model.settings import Feature

SETTINGS = """\
<!-- Made by `python -m consumers.reference`; edit the code that it is made from. -->

# Settings

Later sources win: defaults, the preset (`preset = "paper"`), the file, the environment, flags.

| source | `micro_batch` of `[worker]` there |
| --- | --- |
| `coldstream.toml` here, or `--config FILE`, or the file that `COLDSTREAM_CONFIG` names | `micro_batch = 32` under `[worker]` |
| environment | `COLDSTREAM_WORKER__MICRO_BATCH=32` |
| flags, of every command | `--set worker.micro_batch=32`; common settings have flags of their own, such as `--micro-batch 32` |

In the environment and in `--set`, lists and tables are written as JSON. A list or a table of names that are not settings (the features
of a schema) replaces that of the source below as a whole.

`coldstream config` prints the values in force and where each came from. A setting that is unknown or wrong is an error that names it and
its place, with exit code 2. So is any other variable that begins with `COLDSTREAM_`: in Kubernetes set `enableServiceLinks: false` where
a service is called coldstream, or the variables that it makes would count as settings.
"""

FEATURES = """\
## Features

Under `[schema.user]` and `[schema.item]` stand the features that the model looks at, by the names that they have in profiles:

```toml
[schema.user]
age = {{ kind = "numeric", mean = 35, scale = 12, bins = [25, 35, 50] }}
occupation = {{ kind = "categorical" }}

[schema.item]
id = {{ kind = "id" }}
class = {{ kind = "multivalued", max_values = 4 }}
```

| kind | its value in a profile | to the model |
| --- | --- | --- |
| `id` | none; of items only | the item itself, which can be learned apart from all that are like it |
| `categorical` | one text | a category |
| `multivalued` | a list of texts | categories that count alike |
| `numeric` | a number x | (x - mean) / scale along one direction, and with `bins` the category of the bin that x falls into |

{fields}
"""

METRICS = """\
<!-- Made by `python -m consumers.reference`; edit the code that it is made from. -->

# Metrics and health

Every worker and trainer serves `/metrics`, `/healthz` and `/readyz` at `metrics.host` and `metrics.port` (127.0.0.1:9464; with port 0
the one that was got is in the log). No label holds a user or item id. The usual `process_*` metrics are there too.

{metrics}

- `stage` is one of {stages}.
- `earlier` is one of {groups}: how many events the user had before the one scored. The groups overlap.
- `running_error` is an exponentially weighted mean over the events of its group, in which an error counts half after {half_life} more
  events. It is the weighted mean of just the values seen, from the first on, and NaN before that.
- `event_to_score_seconds` begins when the broker took the event, not at the event's own time. So the age of a replayed history is not
  in it, but its waiting in the topic is.

## Health

Both answer 200 or 503 and JSON: `ok`, and under `conditions` each condition with `ok` and `detail`. Where `/healthz` fails, restart the
process; where `/readyz` fails, wait.

| path | conditions |
| --- | --- |
| `/healthz` | {live} |
| `/readyz` | {ready} |

- `main_loop`: the last turn of the main loop is young.
- `no_fatal_error`: nothing happened that it cannot go on from.
- `assignment`: partitions, or a place as stand-by, are held.
- `state`: support sets and tables are restored.
- `model`: a version is loaded.
- `progress`: the last commit is young, or there is nothing to do.
"""

CLI = """\
<!-- Made by `python -m consumers.reference`; edit the code that it is made from. -->

# Command line

`coldstream COMMAND --help` tells each command's flags. `--config FILE`, `--set NAME=VALUE` and `--verbose` may stand before or behind the
command's name. Results go to standard output, logs and errors to standard error: readable on a terminal, JSON lines elsewhere
(`log_format`).

{commands}

## Exit codes

{codes}

The first Ctrl-C or SIGTERM finishes the step in hand and commits it; the second ends the process at once, with 130 or 143, which loses
nothing either: what is not committed does not count, and is done again. A worker or trainer has no end of its own, so being asked to
stop is its proper one: 0.
"""


def settings_page() -> str:
    """docs/settings.md."""
    parts = [SETTINGS]
    entries = catalogue.entries().values()
    for table, model in catalogue.sections():
        own = [entry for entry in entries if entry.name.rpartition(".")[0] == table]
        if own:
            parts.append(f"## [{table}]\n\n{_sentence(model.__doc__)}\n" if table else "## At the top of the file\n")
            parts.append(_table(("setting", "default", "unit", "allowed", "what it does"), map(_setting_row, own)) + "\n")
    fields = [(f"`{name}`", f"`{toml(field.default)}`", field.description or "") for name, field in Feature.model_fields.items()]
    parts.append(FEATURES.format(fields=_table(("field", "default", "what it does"), fields[1:])))
    return "\n".join(parts)


def _setting_row(entry: catalogue.Entry) -> tuple[str, ...]:
    return f"`{entry.name}`", f"`{toml(entry.default)}`", entry.unit, entry.allowed(), entry.description


def metrics_page() -> str:
    """docs/metrics.md."""
    from streaming.health import Health
    from streaming.metrics import GROUPS, HALF_LIFE, STAGES, Metrics

    rows = [(f"`{metric.name}`", metric.kind, _words(metric.labels), metric.help) for metric in Metrics().described]
    return METRICS.format(
        metrics=_table(("metric", "kind", "labels", "what it says"), rows),
        stages=_words(STAGES),
        groups=_words(GROUPS),
        half_life=HALF_LIFE,
        live=_words(Health().live()),
        ready=_words(Health().ready()),
    )


def cli_page() -> str:
    """docs/cli.md."""
    from typer.main import get_command

    from consumers.cli import app

    rows = [
        (f"`{path}`", _sentence(_plain(command.help or "")), "<br>".join(f"`{text}`" for text in _examples(command.epilog or "")))
        for path, command in _commands("coldstream", get_command(app))
    ]
    codes = [(f"{code:d}", meaning) for code, meaning in exits.MEANING.items()]
    return CLI.format(commands=_table(("command", "what it does", "examples"), sorted(rows)), codes=_table(("code", "meaning"), codes))


def _commands(path: str, command: Any) -> Iterable[tuple[str, Any]]:  # noqa: ANN401 - typer keeps its classes of commands to itself
    inner = getattr(command, "commands", None)
    return [(path, command)] if inner is None else [row for name, found in inner.items() for row in _commands(f"{path} {name}", found)]


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


PAGES: dict[str, Callable[[], str]] = {"settings.md": settings_page, "metrics.md": metrics_page, "cli.md": cli_page}


def write(folder: Path) -> None:
    """Write every page into ``folder``."""
    for name, make in PAGES.items():
        (folder / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent.parent / "docs")
