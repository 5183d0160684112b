"""What people do in their first hour and would fall over: each ends as they expect, or with a line that names what is at fault."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from consumers import cli
from consumers.opening import connect
from consumers.settings import Settings
from streaming.events import Support
from streaming.log import TopicPartition, present
from tests.small_runs import Stream, fill, run, run_and_keep, small

if TYPE_CHECKING:
    from streaming.log import Record


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.execute([*arguments])
    return code, "".join(capsys.readouterr())


def of(path: Path) -> list[str]:
    return ["--set", f"broker=embedded:{path}", "--set", "topics.partitions=1"]


def records(path: Path, topic: str) -> list[Record]:
    with connect(Settings.model_validate({"broker": f"embedded:{path}"})) as log:
        return list(present(log, [TopicPartition(topic, 0)]))


def test_a_user_is_forgotten_by_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(100, garbage=0.0).messages)
    run(settings)
    log = of(tmp_path / "log.db")
    with run_and_keep(settings) as (_, worker):
        known = next(user for user in ("u1", "u2", "u3") if isinstance(worker.held[0].support.get(user), Support))
    code, text = said(capsys, "forget", known, "nobody", "--yes", *log)
    assert (code, "2 to be forgotten; a worker does it with its next step" in text) == (0, True), text
    with run_and_keep(settings) as (_, worker):
        assert worker.held[0].support.get(known) is None


@pytest.mark.parametrize("answer", ["n\n", "", "what\n"])
def test_who_is_asked_and_does_not_say_yes_forgets_nobody(
    answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    fill(small(tmp_path / "log.db"), Stream(10, garbage=0.0).messages)
    assert said(capsys, "forget", "u1", *of(tmp_path / "log.db"))[0] == 1
    assert records(tmp_path / "log.db", "users") == []


@pytest.mark.parametrize("command", [["score", "u1"], ["forget", "u1", "--yes"], ["audit"], ["dead-letters", "send-back", "--all"]])
def test_another_number_of_partitions_than_the_logs_is_named(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(small(tmp_path / "log.db", topics={"partitions": 2}), Stream(10, garbage=0.0, partitions=2).messages)
    code, text = said(capsys, *command, "--set", f"broker=embedded:{tmp_path / 'log.db'}")
    assert code == 2
    assert "has 2 partitions, and topics.partitions is 8: set it to 2" in text


def test_movies_as_grouplens_has_them_fill_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "movies.csv").write_text('movieId,title,genres\n1,"Toy Story, the (1995)",Animation|Comedy\n', encoding="utf-8")
    schema = 'schema.item={"id": {"kind": "id"}, "genres": {"kind": "multivalued"}}'
    log = of(tmp_path / "log.db")
    code, text = said(capsys, "replay", "movies.csv", "--into", "items", "--id-column", "movieId", "--set", schema, *log)
    assert code == 0, text
    (record,) = records(tmp_path / "log.db", "items")
    features = msgspec.msgpack.decode(record.value or b"")["features"]
    assert (record.key, features) == (b"1", {"title": "Toy Story, the (1995)", "genres": ["Animation", "Comedy"]})


def test_an_export_replaces_files_alone_and_makes_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(40, garbage=0.0).messages)
    run(settings)
    (tmp_path / "own.toml").write_text(
        "model = {embedding_size = 4, memory_rows = 3}\n[schema]\nuser = {job = {kind = 'categorical'}}\n"
        "item = {id = {kind = 'id'}, genre = {kind = 'multivalued', max_values = 2}}\n",
        encoding="utf-8",
    )
    given = ["--config", "own.toml", *of(tmp_path / "log.db")]
    os.mkfifo(tmp_path / "pipe")
    for place in ("pipe", "."):
        code, text = said(capsys, "model", "export", "last", place, *given)
        assert (code, "is no file that could be replaced" in text) == (6, True), text
    assert not (tmp_path / "pipe").is_file(), "what was there is there still"
    code, text = said(capsys, "model", "export", "last", "new/folder/m.safetensors", *given)
    assert code == 0, text
    assert (tmp_path / "new/folder/m.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["replay", "none.txt"], 6, "there is no such file"),
        (["replay", "."], 6, "is no file"),
        (["replay", "a.csv", "--rate", "0"], 2, "it must be above 0, or max"),
        (["replay", "a.csv", "--since", "2024-01-01", "--until", "2023-01-01"], 2, "is not after"),
        (["replay", "a.csv", "--set", "replay.encoding=klingon"], 2, "replay.encoding = klingon"),
        (["report", "--journal", "nope.jsonl"], 6, "run journal nope.jsonl"),
        (["evaluate", "--out", "."], 2, "is no file that could be replaced"),
    ],
)
def test_what_is_at_fault_is_named_and_the_code_says_whose_it_is(
    arguments: list[str], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("user,item,rating,timestamp\nu,i,3,1700000000000\n", encoding="utf-8")
    fill(small(tmp_path / "log.db"), Stream(10, garbage=0.0).messages)
    found, shown = said(capsys, *arguments, *of(tmp_path / "log.db"))
    # Messages of usage are boxed, and wrapped where they are long.
    assert (found, text in " ".join(shown.replace("│", "").split())) == (code, True), shown


def test_a_value_that_is_the_default_is_no_change_whoever_wrote_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "coldstream.toml").write_text("seed = 1\n[worker]\nmicro_batch = 32\n", encoding="utf-8")
    code, text = said(capsys, "config", "--changed", "--format", "json")
    assert (code, list(msgspec.json.decode(text))) == (0, ["worker.micro_batch"])


def test_a_feature_that_reads_like_a_secret_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = '[schema.user.token_count]\nkind = "numeric"\nmean = 3\n'
    (tmp_path / "coldstream.toml").write_text(text, encoding="utf-8")
    code, shown = said(capsys, "config", "--changed", "--format", "toml")
    assert (code, "***" in shown, "token_count" in shown) == (0, False, True)
    (tmp_path / "again.toml").write_text(shown, encoding="utf-8")
    assert said(capsys, "config", "--config", "again.toml")[0] == 0


def test_the_letter_of_a_line_too_long_to_keep_says_how_long_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("user,item,rating,timestamp\n" + "x" * 70_000 + "\n", encoding="utf-8")
    log = of(tmp_path / "log.db")
    assert said(capsys, "replay", "a.csv", *log)[0] == 0
    code, text = said(capsys, "dead-letters", "show", "0", *log)
    assert code == 0
    assert "70,001 bytes" in text
    assert "all of it is in the letter" not in text
