"""MovieLens-100K for the demo: fetched once, checked by digest, and never part of the repository.

The ratings and the profiles of users and items are taken from the wheel of recbole 1.2.1, which pip downloads from wherever pip is
configured to look. Nothing of that package is installed or run. ``python -m consumers.demo_data --out data/ml-100k`` does the whole.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from streaming.errors import SourceError

LICENCE_NOTE = """\
MovieLens 100K was collected by GroupLens Research at the University of Minnesota. It may be used for research; it may not be used
commercially or passed on without their permission. Work that uses it cites: F. Maxwell Harper and Joseph A. Konstan. 2015.
The MovieLens Datasets: History and Context. ACM Transactions on Interactive Intelligent Systems 5, 4, Article 19.
https://doi.org/10.1145/2827872"""

MAX_WHEEL_BYTES = 64 << 20
MAX_FILE_BYTES = 16 << 20
DOWNLOAD_SECONDS = 600


class DemoDataError(SourceError):
    """The demo's data set could not be had, or is not the one expected. The message says what to do."""


class Dataset(NamedTuple):
    """Files inside a wheel: ``requirement`` is what pip is asked for, ``folder`` where the files lie, all digests are SHA-256 in hex."""

    requirement: str
    wheel_digest: str
    folder: str
    files: Mapping[str, str]


ML_100K = Dataset(
    requirement="recbole==1.2.1",
    wheel_digest="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    folder="recbole/dataset_example/ml-100k",
    files={
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    },
)


def ensure(out: Path, wheel: Path | None = None, dataset: Dataset = ML_100K) -> bool:
    """Make ``out`` a folder that holds the files of ``dataset``. Returns False if it already was one.

    ``wheel`` is a wheel that is already on this machine; without it pip downloads one. The folder appears whole or not at all. Raises
    `DemoDataError` if the wheel cannot be had or has another digest, or if ``out`` holds something else, which is left untouched.
    """
    if _is_complete(out, dataset):
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        message = f"{out} does not hold the expected {', '.join(dataset.files)}: move it away, or choose another folder with --out"
        raise DemoDataError(message)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            source = wheel if wheel is not None else _download(dataset.requirement, Path(scratch))
            _check_wheel(source, dataset.wheel_digest)
            staged = Path(scratch) / "files"
            _extract(source, dataset, staged)
            staged.rename(out)
    except OSError as error:
        # Another process may have put the same folder there first.
        if _is_complete(out, dataset):
            return False
        message = f"cannot write the demo's data to {out}: {error}"
        raise DemoDataError(message) from error
    return True


def _is_complete(out: Path, dataset: Dataset) -> bool:
    return all(
        (path := out / name).is_file() and path.stat().st_size <= MAX_FILE_BYTES and _digest(path) == digest
        for name, digest in dataset.files.items()
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(requirement: str, folder: Path) -> Path:
    # The environment's own pip, so that a mirror, a proxy or a folder of wheels configured for it is used here too.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    advice = f"without a network, fetch the wheel elsewhere with `pip download --no-deps {requirement}` and pass it with --wheel PATH"
    try:
        # Its output is bounded by pip's own retries and is read only to be shown in the error.
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        message = f"pip did not download {requirement} within {DOWNLOAD_SECONDS} s; {advice}"
        raise DemoDataError(message) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        told = "\n".join(done.stderr.strip().splitlines()[-3:])[-1000:]
        message = f"pip could not download {requirement} (exit code {done.returncode}); {advice}\n{told}".rstrip()
        raise DemoDataError(message)
    return wheels[0]


def _check_wheel(path: Path, expected: str) -> None:
    if not path.is_file():
        message = f"--wheel {path}: no such file"
        raise DemoDataError(message)
    if (size := path.stat().st_size) > MAX_WHEEL_BYTES:
        message = f"{path.name} has {size} bytes, more than the {MAX_WHEEL_BYTES} allowed; it was not used"
        raise DemoDataError(message)
    if (found := _digest(path)) != expected:
        message = f"{path.name} is not the expected wheel and was not used: its SHA-256 is {found}, expected {expected}"
        raise DemoDataError(message)


def _extract(wheel: Path, dataset: Dataset, folder: Path) -> None:
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, digest in dataset.files.items():
                with archive.open(f"{dataset.folder}/{name}") as entry:
                    data = entry.read(MAX_FILE_BYTES + 1)
                if len(data) > MAX_FILE_BYTES:
                    message = f"{name} in {wheel.name} has more than the {MAX_FILE_BYTES} bytes allowed"
                    raise DemoDataError(message)
                if (found := hashlib.sha256(data).hexdigest()) != digest:
                    message = f"{name} in {wheel.name} is not the expected file: its SHA-256 is {found}, expected {digest}"
                    raise DemoDataError(message)
                (folder / name).write_bytes(data)
    except (KeyError, zipfile.BadZipFile) as error:
        message = f"{wheel.name} does not hold the demo's data: {error}"
        raise DemoDataError(message) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0 if the data is there, 1 if it could not be had."""
    parser = argparse.ArgumentParser(prog="python -m consumers.demo_data", description="Fetch MovieLens-100K for the demo.")
    parser.add_argument("--out", type=Path, default=Path("data/ml-100k"), help="the folder to make (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of {ML_100K.requirement} that is already here; without it pip downloads one")
    options = parser.parse_args(arguments)
    try:
        made = ensure(options.out, options.wheel)
    except DemoDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: MovieLens-100K {'is ready' if made else 'was already there'}\n\n{LICENCE_NOTE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
