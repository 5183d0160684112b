"""`coldstream score`: asks a running worker, says when nobody answers, and reads the log alone where it is told to."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from consumers.cli import execute
from consumers.exits import Exit
from consumers.inspection import toml
from consumers.settings import Settings
from tests.nursery import Nursery
from tests.small_runs import SMALL, Stream, fill, run, small


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(120, seed=3, garbage=0).messages)
    run(settings)
    (tmp_path / "small.toml").write_text(
        "\n".join(f"{name} = {toml(value)}" for name, value in (SMALL | {"broker": settings.broker}).items())
    )
    return settings


def score(tmp_path: Path, *arguments: str) -> int:
    return execute(["score", *arguments, "--config", str(tmp_path / "small.toml")])


def rows(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]


def test_it_asks_a_worker_and_the_log_alone_says_the_same(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Nursery() as nursery:
        worker = nursery.start(settings, role="worker")
        assert score(tmp_path, "u1", "--best", "3", "--timeout", "60") == Exit.DONE
        asked = capsys.readouterr().out
        assert score(tmp_path, "u1", "--item", "i3", "--item", "i5", "--item", "never-seen", "--timeout", "60") == Exit.DONE
        named = capsys.readouterr().out
        assert score(tmp_path, "u1", "--best", "101", "--timeout", "60") == Exit.DATA
        assert "n: 101, at most 100" in capsys.readouterr().err
        os.kill(worker, signal.SIGTERM)
    assert "as of interactions[0] before 120" in " ".join(asked.split())
    assert len(rows(asked)) == 3
    assert {row[0] for row in rows(named)} == {"i3", "i5", "never-seen"}
    assert score(tmp_path, "u1", "--best", "3", "--offline") == Exit.DONE
    assert rows(capsys.readouterr().out) == rows(asked)


def test_it_says_so_where_nobody_answers(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert settings.topics.partitions == 1
    assert score(tmp_path, "u1", "--timeout", "0.2") == Exit.NO_ANSWER
    assert "no answer within 0.2 s: no worker holds partition 0" in capsys.readouterr().err
    assert score(tmp_path, " u1") == Exit.DATA
    assert "white space" in capsys.readouterr().err
