from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import typer

from consumers import cli, exits, opening
from consumers.exits import Exit
from consumers.layers import SettingsError
from consumers.opening import connect, topics_of
from consumers.settings import Settings
from consumers.status import status_of
from consumers.stop import Interrupted
from streaming import errors
from streaming.chunks import split
from streaming.codec import encode
from streaming.deadletters import LETTER_BYTES
from streaming.events import Version
from streaming.log import Log, Message, TopicPartition

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("COLDSTREAM_")]:
        monkeypatch.delenv(name)


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


MAIN = "from consumers.cli import main; main()"


# Help and version


def test_help_loads_none_of_the_heavy_libraries() -> None:
    program = """
import sys
from consumers.cli import execute
code = execute(["--help"])
heavy = {"torch", "numpy", "river", "pydantic", "structlog", "prometheus_client", "matplotlib", "kafka", "msgspec"}
print(code, sorted(sys.modules.keys() & heavy))
"""
    process = start(program)
    out, err = process.communicate(timeout=30)
    assert out.splitlines()[-1] == "0 []", err
    for command in (
        "audit",
        "dead-letters",
        "run",
        "worker",
        "trainer",
        "replay",
        "report",
        "evaluate",
        "model",
        "topics",
        "status",
        "score",
        "config",
        "demo",
    ):
        assert re.search(rf"\b{command}\b", out)


@pytest.mark.parametrize(
    "command",
    [
        "audit",
        "run",
        "worker",
        "trainer",
        "replay",
        "report",
        "evaluate",
        "status",
        "score",
        "config",
        "demo",
        "topics list",
        "dead-letters list",
        "dead-letters show",
        "dead-letters send-back",
        "model list",
        "model show",
        "model rollback",
        "model export",
        "model import",
    ],
)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.count(f"coldstream {command}") >= 2  # usage and an example
    for common in ("--config", "--set", "--verbose"):
        assert common in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["--version"]) == 0
    assert re.fullmatch(r"coldstream \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# config


def test_config_prints_values_and_where_they_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "coldstream.toml").write_text("[worker]\nmicro_batch = 32\n")
    monkeypatch.setenv("COLDSTREAM_SEED", "5")
    assert cli.execute(["config", "--changed", "--set", "rating.maximum=10"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "seed 5 environment COLDSTREAM_SEED" in lines
    assert "worker.micro_batch 32 events file coldstream.toml: [worker] micro_batch" in lines
    assert "rating.maximum 10.0 rating flag --set rating.maximum" in lines


def test_common_flags_may_stand_before_or_behind_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text("seed = 3")
    (tmp_path / "b.toml").write_text("seed = 4")
    for arguments, seed in (
        (["--config", "a.toml", "config"], 3),
        (["config", "--config", "a.toml"], 3),
        (["--config", "a.toml", "config", "--config", "b.toml"], 4),
        (["--set", "seed=8", "config"], 8),
        (["--set", "seed=8", "config", "--set", "seed=9"], 9),
    ):
        assert cli.execute([*arguments, "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["seed"]["value"] == seed


def test_the_environment_may_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.toml").write_text("seed = 3")
    monkeypatch.setenv("COLDSTREAM_CONFIG", "a.toml")
    assert cli.execute(["config", "seed", "--format", "toml"]) == 0
    assert capsys.readouterr().out.startswith("seed = 3  # file a.toml: seed")


# Errors and exit codes


def test_a_wrong_setting_ends_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["status", "--set", "worker.micro_batch=0"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("coldstream: worker.micro_batch = 0 (flag --set worker.micro_batch)")


@pytest.mark.parametrize("arguments", [["frobnicate"], ["status", "--frobnicate"], ["config", "--format", "xml"], ["replay"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(arguments) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError(["x"]), 2),
        (errors.EndpointError("x"), 2),
        (errors.TopicMismatch("x"), 2),
        (errors.LogUnavailable("x"), 3),
        (errors.UnknownTopic("x"), 3),
        (errors.OffsetOutOfRange("x"), 3),
        (errors.FormatMismatch("x"), 3),
        (errors.LogFull("x"), 4),
        (errors.Fenced("x"), 5),
        (errors.SourceError("x"), 6),
        (errors.Malformed("x", "y"), 6),
        (Interrupted(signal.SIGINT), 130),
        (Interrupted(signal.SIGTERM), 143),
        (FileNotFoundError("x"), 6),
        (ValueError("x"), 1),
    ],
)
def test_each_error_has_its_exit_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(opening, "topics_of", fail)
    monkeypatch.setattr(opening, "connect", fail)
    assert cli.execute(["topics", "create"]) == code
    err = capsys.readouterr().err
    assert str(error) in err
    assert "Traceback" not in err
    assert cli.execute(["topics", "create", "--verbose"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_every_exit_code_is_documented() -> None:
    assert set(exits.MEANING) == set(Exit)


def test_secrets_are_masked_in_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> Log:
        raise errors.LogUnavailable("no answer from kafka://me:hunter2@host with password=hunter2")

    monkeypatch.setattr(opening, "connect", fail)
    assert cli.execute(["status", "--verbose"]) == 3
    assert "hunter2" not in capsys.readouterr().err


# topics and status


def test_topics_are_created_once_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    log = ["--set", "broker=embedded:runs/x.db"]
    assert cli.execute(["topics", "list", *log]) == 3
    assert "topics create" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert cli.execute(["topics", "create", "--partitions", "2", *log]) == 0
    assert "interactions" in capsys.readouterr().out
    assert cli.execute(["topics", "create", "--partitions", "2", *log]) == 0
    assert capsys.readouterr().out == "all topics exist already\n"
    assert cli.execute(["topics", "create", "--partitions", "3", *log]) == 2
    assert "partitions" in capsys.readouterr().err
    assert cli.execute(["topics", "list", "--set", "topics.partitions=2", *log]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["interactions", "2", "delete", "for", "ever", "1,000,000", "B"] in lines
    assert not any("differs" in line or "missing" in line for line in lines)


def test_topics_follow_the_settings() -> None:
    settings = Settings.model_validate(
        {
            "topic_prefix": "a.",
            "topics": {
                "partitions": 3,
                "retention_ms": {"scores": 5},
                "updates_bytes": 2_000_000,
                "model_bytes": 3_000_000,
                "max_record_bytes": 9000,
            },
        }
    )
    topics = topics_of(settings)
    assert {topic.name for topic in topics.values()} == {f"a.{name}" for name in topics}
    # Support sets of a hundred of the longest ids find room all the same.
    least = {"dead-letters": LETTER_BYTES, "support": 100 * (256 + 32) + 256 + 2048}
    assert {name: topic.max_record_bytes for name, topic in topics.items()} == dict.fromkeys(topics, 9000) | least
    assert (topics["scores"].partitions, topics["scores"].retention_ms) == (3, 5)
    assert topics["interactions"].retention_ms is None
    assert topics["updates"].retention_bytes == 2_000_000
    assert topics["model"].retention_bytes == 3_000_000


def version(number: int, settings: str, folded: dict[int, int]) -> bytes:
    return encode(Version(number, number - 1, folded, settings, {}, {}, events=16 * number, made_at=1_700_000_000_000))


def test_status_tells_how_the_system_stands(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings.model_validate({"topics": {"partitions": 2}, "topic_prefix": "p-", "broker": "embedded:x.db"})
    topics = topics_of(settings)
    with connect(settings, create=True) as log:
        log.create(topic for plain, topic in topics.items() if plain != "requests")
        log.append([Message("p-interactions", b"u", b"x", partition=1)] * 5)
        log.append([Message("p-updates", b"0", b"x", partition=0)] * 4)
        pieces = split(version(9, settings.digest(), {0: 1}) + bytes(0), 100)
        assert len(pieces) > 1
        log.append([Message("p-model", None, piece, partition=0) for piece in split(version(8, "", {}), 100) + pieces])
        with log.writer("w") as writer:
            writer.commit([], {TopicPartition("p-interactions", 1): 3}, settings.group_id)
        status = status_of(log, settings, topics)
    assert [(row.partition, row.start, row.end, row.committed, row.lag) for row in status.partitions] == [
        (0, 0, 0, None, 0),
        (1, 0, 5, 3, 2),
    ]
    assert status.missing == ["p-requests"]
    assert status.model is not None
    assert (status.model.version, status.model.parent, status.model.events, status.model.waiting, status.model.ours) == (9, 8, 144, 3, True)

    flags = ["--set", "topics.partitions=2", "--set", "topic_prefix=p-", "--set", "broker=embedded:x.db"]
    assert cli.execute(["status", *flags]) == 0
    out = capsys.readouterr().out
    assert "missing topics: p-requests" in out
    assert "version 9 of 2023-11-14 22:13:20 UTC, 144 events, 3 updates wait" in out
    assert "other settings" not in out
    assert cli.execute(["status", "--json", "--set", "seed=2", *flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["model"]["ours"] is False
    assert shown["partitions"] == [msgspec.to_builtins(row) for row in status.partitions]


def test_status_finds_a_version_cut_into_more_records_than_one_look_back() -> None:
    settings = Settings.model_validate({"broker": "embedded:x.db"})
    topics = topics_of(settings)
    with connect(settings, create=True) as log:
        log.create(topics.values())
        assert status_of(log, settings, topics).model is None
        whole = version(3, "s" * 20_000, {})
        pieces = split(whole, 100)
        assert len(pieces) > 128
        log.append([Message("model", None, piece, partition=0) for piece in [version(2, "", {}), *pieces]])
        found = status_of(log, settings, topics).model
    assert found is not None
    assert found.version == 3


# replay


def test_replay_fills_the_topic_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ratings.csv"
    file.write_text("who,item,rating,timestamp\nu1,i1,4,1000000\nu2,i2,9,1000001\nu1,i2,5,1000002\n")
    arguments = ["replay", str(file), "--user-column", "who", "--timestamp-unit", "s", "--set", "broker=embedded:x.db"]
    assert cli.execute(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        "interactions: 2 sent in all, 3 lines in this run, 0 before",
        "dead letters: 1 rating-off-scale",
    ]
    assert cli.execute(arguments) == 0
    assert capsys.readouterr().out.splitlines()[0] == "interactions: 2 sent in all, 0 lines in this run, 3 before"


def test_replay_names_what_is_wrong_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ratings.csv"
    file.write_text("who,item,rating,timestamp\n")
    for arguments, code, words in (
        ([str(file)], 6, "user"),
        ([str(tmp_path / "none.csv")], 6, "none.csv"),
        ([str(file), "--rate", "fast"], 2, "--rate"),
        ([str(file), "--timestamp-unit", "days"], 2, "replay.timestamp_unit"),
    ):
        assert cli.execute(["replay", *arguments]) == code
        assert words in capsys.readouterr().err


def test_typers_own_ways_to_leave_keep_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(**_: object) -> None:
        raise SystemExit(typer.Exit(7).exit_code)

    monkeypatch.setattr(cli, "app", leave)
    assert cli.execute([]) == 7
