"""A model taken from one deployment to another by a file: what is in the file, what it is good for, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from consumers import cli
from consumers.exits import Exit
from consumers.lineage import Lineage
from consumers.opening import connect, topics_of
from consumers.replacing import export, import_model
from consumers.settings import Settings
from model import checkpoint
from streaming.codec import decode
from streaming.errors import OtherSettings, Refused, SourceError
from streaming.events import Interaction, Score, Version
from streaming.log import Message
from tests.small_runs import T0, fill, message, run, small
from tests.test_going_back import same, sets, state_at_end
from tests.test_promises import findings
from tests.verify.reading import read


def stream(n: int, seed: int) -> list[Message]:
    """Users of this seed alone, who all like the same items: what one deployment learns of items holds in another."""
    dice = random.Random(seed)
    items = [(f"i{number}", 5.0 if number % 2 else 1.0) for number in range(20)]
    events = [(f"{seed}-{dice.randrange(15)}", *dice.choice(items)) for _ in range(n)]
    return [message(Interaction(user, item, rating, T0 + number)) for number, (user, item, rating) in enumerate(events)]


def of(path: Path, **sections: Any) -> Settings:  # noqa: ANN401 - as `small`
    model = {"embedding_size": 4, "memory_rows": 3, "row_rate": 0.05} | sections.pop("model", {})
    return small(path, model=model, trainer={"snapshot_every": 10}, **sections)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = of(tmp_path_factory.mktemp("trained") / "log.db")
    fill(settings, stream(400, seed=1))
    run(settings)
    return settings


@pytest.fixture(scope="module")
def file(trained: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    with connect(trained) as log:
        export(log, trained, topics_of(trained), None, path)
    return path


def take(settings: Settings, path: Path, *, force: bool = False) -> Version:
    fill(settings, [])
    with connect(settings) as log:
        return import_model(log, settings, topics_of(settings), path, force=force)


def scores(settings: Settings) -> list[tuple[Score, float]]:
    """Every score with its rating."""
    with connect(settings) as log:
        found = [decode(record.value, Score, what="score") for record in read(log, "scores", 0)]
        ratings = [msgspec.msgpack.decode(record.value or b"", type=Interaction).rating for record in read(log, "interactions", 0)]
    return [(score, ratings[score.source[2]]) for score in found]


def error(settings: Settings) -> float:
    found = scores(settings)
    return sum(abs(score.score - rating) for score, rating in found) / len(found)


def test_a_fresh_deployment_starts_from_what_another_learned(trained: Settings, file: Path, tmp_path: Path) -> None:
    untrained, pretrained = of(tmp_path / "untrained.db"), of(tmp_path / "pretrained.db")
    made = take(pretrained, file)
    assert (made.version, made.parent, made.replaces, made.folded, made.skipped) == (1, None, 0, {}, [])
    assert same(state_at_end(pretrained), state_at_end(trained))
    for settings in (untrained, pretrained):
        fill(settings, stream(40, seed=2))
        run(settings)
        assert findings(settings) == []
    assert scores(pretrained)[0][0].model_version == 1
    assert error(pretrained) < 0.5 * error(untrained)


def test_the_file_says_what_it_is(trained: Settings, file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "coldstream-checkpoint/2"
    assert metadata["digest"] == trained.digest()
    assert json.loads(metadata["settings"]) == trained.decisive()
    assert int(metadata["version"]) == checkpoint.read(file).version > 10


def test_other_settings_are_refused_by_name(file: Path, tmp_path: Path) -> None:
    other = of(tmp_path / "log.db", model={"embedding_size": 6}, rating={"maximum": 10.0}, seed=2)
    with pytest.raises(
        OtherSettings,
        match=r"model\.embedding_size is 4 there and 6 here; rating\.brought_to is absent .*; rating\.maximum is 5\.0 .*; seed",
    ):
        take(other, file)
    with connect(other) as log:
        assert Lineage(log, topics_of(other)).last == 0


def test_a_log_with_versions_is_only_overwritten_when_asked_to(file: Path, tmp_path: Path) -> None:
    settings = of(tmp_path / "log.db")
    fill(settings, stream(60, seed=3))
    run(settings)
    with pytest.raises(Refused, match="--force"):
        take(settings, file)
    made = take(settings, file, force=True)
    assert made.skipped == [(0, 0, made.folded[0])]
    assert made.version == (made.replaces or 0) + 1
    assert findings(settings) == []
    fill(settings, stream(30, seed=4))
    run(settings)
    assert findings(settings) == []


def changed_metadata(**fields: str) -> Any:  # noqa: ANN401
    def change(source: Path, target: Path) -> None:
        with safe_open(source, framework="pt") as opened:
            metadata = opened.metadata() | fields
        save_file(load_file(source), target, {name: value for name, value in metadata.items() if value})

    return change


def changed_tensors(edit: Any) -> Any:  # noqa: ANN401
    def change(source: Path, target: Path) -> None:
        with safe_open(source, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(source)
        edit(tensors)
        save_file(tensors, target, metadata)

    return change


BROKEN: dict[str, tuple[Any, str]] = {
    "nothing": (lambda source, target: target.write_bytes(b""), "not a checkpoint that can be read"),
    "half": (
        lambda source, target: target.write_bytes(source.read_bytes()[: source.stat().st_size // 2]),
        "not a checkpoint that can be read",
    ),
    "other bytes": (lambda source, target: target.write_bytes(b"\xff" * 1000), "not a checkpoint that can be read"),
    "no file": (lambda source, target: None, "not a checkpoint that can be read"),
    "another format": (changed_metadata(format="other/1"), "found format 'other/1'"),
    "no version": (changed_metadata(version=""), "metadata"),
    "fewer keys": (changed_tensors(lambda tensors: tensors.update({"lengths.item": tensors["lengths.item"][1:].clone()})), "do not fit"),
    "keys cut short": (changed_tensors(lambda tensors: tensors.update({"keys.item": tensors["keys.item"][1:].clone()})), "do not fit"),
    "a length below 0": (changed_tensors(lambda tensors: tensors["lengths.item"].neg_()), "do not fit"),
    "keys that are no text": (changed_tensors(lambda tensors: tensors["keys.item"].fill_(255)), "metadata"),
    "no keys": (changed_tensors(lambda tensors: tensors.pop("keys.item")), "metadata"),
    "keys that an older file has not": (changed_metadata(format="coldstream-checkpoint/1"), "metadata"),
    "an older file's keys that do not fit": (
        changed_metadata(format="coldstream-checkpoint/1", **{"rows.item": '["a"]', "rows.user": "[1]"}),
        "keys and rows do not fit",
    ),
    "settings that are none": (changed_metadata(settings="[]"), "settings are not a table"),
    "NaN": (changed_tensors(lambda tensors: tensors["phi"].fill_(float("nan"))), "phi holds numbers that are not finite"),
    "a tensor less": (changed_tensors(lambda tensors: tensors.pop("memory.centre")), "memory.centre"),
    "no moments": (changed_tensors(lambda tensors: tensors.pop("moments")), "moments"),
    "another shape": (changed_tensors(lambda tensors: tensors.update(phi=tensors["phi"][:-1].clone())), "phi"),
}


def test_a_file_of_the_first_format_is_read(file: Path, tmp_path: Path) -> None:
    """Its keys stood in the metadata, which a large model's have no room in."""
    saved, old = checkpoint.read(file), tmp_path / "old.safetensors"
    keys = {f"rows.{name}": json.dumps(list(keys)) for name, (keys, _) in saved.state.rows.items()}
    changed_metadata(format="coldstream-checkpoint/1", **keys)(file, old)
    found = checkpoint.read(old)
    for name, (texts, values) in saved.state.rows.items():
        assert list(found.state.rows[name][0]) == list(texts) != []
        assert torch.equal(found.state.rows[name][1], values)


def test_long_keys_of_many_rows_go_into_a_file(tmp_path: Path) -> None:
    keys = [f"id={'long ' * 50}{number}" for number in range(450_000)]
    rows: dict[str, tuple[Sequence[str], torch.Tensor]] = {"item": (keys, torch.zeros(len(keys), 1)), "user": ([], torch.zeros(0, 1))}
    path = tmp_path / "large.safetensors"
    checkpoint.save(path, checkpoint.Saved(1, checkpoint.State({"phi": torch.zeros(1)}, rows), "", {}))
    found = checkpoint.read(path).state.rows
    assert (found["item"][0], found["user"][0]) == (keys, [])


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_is_none_is_refused_by_name(what: str, file: Path, tmp_path: Path) -> None:
    spoil, said = BROKEN[what]
    spoil(file, tmp_path / "spoiled.safetensors")
    settings = of(tmp_path / "log.db")
    with pytest.raises(SourceError, match=rf"spoiled\.safetensors: .*{said}"):
        take(settings, tmp_path / "spoiled.safetensors")
    with connect(settings) as log:
        assert Lineage(log, topics_of(settings)).last == 0


def test_an_export_that_fails_leaves_the_file_that_was_there(trained: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("as it was")

    def fail(tensors: Any, target: Path, metadata: Any) -> None:  # noqa: ANN401
        target.write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with connect(trained) as log, pytest.raises(OSError, match="no space"):
        export(log, trained, topics_of(trained), None, path)
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"model.safetensors": "as it was"}


def test_the_command_line_exports_and_imports(trained: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, fresh = tmp_path / "model.safetensors", of(tmp_path / "fresh.db")
    flags = sets(trained)
    assert cli.execute(["model", "export", "last", str(file), f"--set=broker={trained.broker}", *flags]) == 0
    assert "bytes" in capsys.readouterr().out
    assert cli.execute(["model", "export", "first", str(file), f"--set=broker={trained.broker}", *flags]) == Exit.USAGE
    capsys.readouterr()
    again = ["model", "import", str(file), f"--set=broker={fresh.broker}", *flags]
    assert cli.execute(again) == 0
    assert "version 1 is the model of" in capsys.readouterr().out
    assert cli.execute(again) == Exit.USAGE
    assert "--force" in capsys.readouterr().err
    assert cli.execute([*again, "--set=seed=9", "--force"]) == Exit.USAGE
    assert "seed is 1 there and 9 here" in capsys.readouterr().err
    assert cli.execute(["model", "list", f"--set=broker={fresh.broker}", *flags]) == 0
    assert "imported" in capsys.readouterr().out
