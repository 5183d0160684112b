"""What the demo reads and leaves, in whichever way it runs. Without torch, which a process that only watches others has no use for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from consumers.inspection import public
from streaming.errors import SourceError
from streaming.sources import Mapped

if TYPE_CHECKING:
    from consumers.settings import Settings

SETTINGS = Path(__file__).with_name("demo.toml")
COLUMNS = Mapped("user_id", "item_id", "rating", "timestamp")


class Files(NamedTuple):
    """What a demo leaves in its folder."""

    log: Path
    journal: Path
    settings: Path
    report: Path

    @classmethod
    def under(cls, out: Path) -> Files:
        """The files of the demo in folder ``out``."""
        return cls(out / "log.db", out / "journal.jsonl", out / "settings.json", out / "report.json")


def begin(settings: Settings, out: Path, *, anew: bool = False) -> bool:
    """Make the folder ready; say whether an interrupted run goes on there.

    A finished demo, and one begun with other settings, starts anew, and with ``anew`` every one does. Raises `SourceError` for a folder
    with a log that is no demo's, which would be lost.
    """
    files = Files.under(out)
    out.mkdir(parents=True, exist_ok=True)
    wanted = json.dumps(public(settings), indent=1, sort_keys=True)
    if files.log.exists() and not files.settings.exists():
        raise SourceError(f"{files.log} is a log, but not one that a demo left; name another folder with --out")
    goes_on = not anew and files.log.exists() and not files.report.exists() and files.settings.read_text() == wanted
    if not goes_on:
        for path in (files.report, files.journal, *out.glob(files.log.name + "*"), out / "report.html"):
            path.unlink(missing_ok=True)
        files.settings.write_text(wanted)
    return goes_on


def require_data(data: Path) -> None:
    """Raise `SourceError` where the data set is not."""
    if not (data / "ml-100k.inter").exists():
        raise SourceError(f"{data}: MovieLens-100K is not there; `make data` fetches it")
