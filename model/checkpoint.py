"""All values of a model version, by name: as tensors for whoever carries them, and as a safetensors file.

The names are fixed: ``phi`` (size,), ``moments`` (2, size), ``count`` (1,), ``memory.*``, and for each embedding table its rows, value and
moments side by side. Nothing else is needed to go on learning, and every name but the moments to score.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.mamo import Mamo
from model.memory import Memory
from model.meta import Optimiser
from model.numbering import distinct, slices

if TYPE_CHECKING:
    from model.numbering import Numbers

FORMAT = "coldstream-checkpoint/2"
FORMATS = ("coldstream-checkpoint/1", FORMAT)
"""Those that can be read. In the first the keys of rows stood in the metadata, of which a file holds 100 MB."""


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or values that do not fit the model. The message names the file or the value."""


class State(NamedTuple):
    """Values of a version: whole tensors by name, and rows of tables by key, (len(keys), 2 width + 1) each: value, then moments."""

    tensors: dict[str, Tensor]
    rows: dict[str, tuple[Sequence[str], Tensor]]


def export(model: Mamo, optimiser: Optimiser, changed: Mapping[str, Sequence[Numbers]] | None = None) -> State:
    """The values of a version. With ``changed``, of each table only the rows of these numbers; whole tensors always, they are small.

    Numbers come as steps of the optimiser return them, and a row of several steps counts once.

    Without, the rows stand in the order of their keys: where in a table they are depends on what was looked up since it was made.
    """
    tensors = {"phi": model.vector, "moments": optimiser.moments, "count": torch.from_numpy(np.array([optimiser.count]))}
    tensors |= {f"memory.{field.name}": getattr(model.memory, field.name) for field in fields(Memory)}
    rows = dict[str, tuple[Sequence[str], Tensor]]()
    for name, table in model.tables.items():
        if changed is None:
            at = np.array([table.rows[key] for key in sorted(table.export()[0])], np.int64)
        else:
            at = distinct(np.concatenate([np.empty(0, np.int64), *changed.get(name, ())]), table.cells)
        both = np.concatenate([table.values.numpy().take(at, 0), optimiser.moments_of(name).numpy().take(at, 0)], 1)
        rows[name] = (table.keys_of(at), torch.from_numpy(both))
    return State(tensors, rows)


def load(state: State, model: Mamo, optimiser: Optimiser | None = None, *, whole: bool = True) -> None:
    """Set a model to ``state``. ``whole`` forgets the rows that the state does not name; else they stay as they are.

    Raises CheckpointError where a tensor is missing or of another shape; the model is then unchanged.
    """
    wanted = {"phi": model.vector.shape, **{f"memory.{field.name}": getattr(model.memory, field.name).shape for field in fields(Memory)}}
    if optimiser is not None:
        wanted |= {"moments": optimiser.moments.shape, "count": torch.Size([1])}
    for name, shape in wanted.items():
        if name not in state.tensors or state.tensors[name].shape != shape:
            found = tuple(state.tensors[name].shape) if name in state.tensors else "none"
            raise CheckpointError(f"{name}: the settings call for a tensor of shape {tuple(shape)}, found {found}")
    for name, table in model.tables.items():
        if name not in state.rows or state.rows[name][1].shape != (len(state.rows[name][0]), 2 * table.width + 1):
            raise CheckpointError(f"rows of {name}: the settings call for a row of {2 * table.width + 1} numbers for each key")
    model.set_vector(state.tensors["phi"].to(model.dtype))
    model.memory = Memory(**{field.name: state.tensors[f"memory.{field.name}"].to(model.dtype) for field in fields(Memory)})
    for name, table in model.tables.items():
        keys, values = state.rows[name]
        if whole:
            table.clear()
        at = table.assign(keys, values[:, : table.width])
        if optimiser is not None:
            moments = optimiser.moments_of(name)
            if whole:
                moments.zero_()
            moments[torch.from_numpy(at)] = values[:, table.width :].to(moments.dtype)
    if optimiser is not None:
        optimiser.moments = state.tensors["moments"].to(model.dtype)
        optimiser.count = int(state.tensors["count"])


class Saved(NamedTuple):
    """What a file holds: a version's number and values, the digest of the settings that they depend on, and these settings."""

    version: int
    state: State
    digest: str
    settings: dict[str, Any]


def save(path: Path, saved: Saved) -> None:
    """Write a version to a safetensors file, which is replaced whole or not at all, in a folder that is made if need be.

    Raises OSError, also where something else than a file is in its place, such as a folder or a device.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "is no file that could be replaced", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = dict(saved.state.tensors)
    metadata = {
        "format": FORMAT,
        "version": str(saved.version),
        "digest": saved.digest,
        "settings": json.dumps(saved.settings, ensure_ascii=False),
    }
    for name, (keys, values) in saved.state.rows.items():
        encoded = [key.encode() for key in keys]
        tensors[f"rows.{name}"] = values
        tensors[f"keys.{name}"] = torch.from_numpy(np.frombuffer(bytearray(b"".join(encoded)), np.uint8))
        tensors[f"lengths.{name}"] = torch.tensor(list(map(len, encoded)), dtype=torch.int32)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> Saved:
    """Read what `save` wrote. Raises CheckpointError for anything else; whether its shapes fit a model is for `load` to say."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a checkpoint that can be read ({error})") from error
    if metadata.get("format") not in FORMATS:
        raise CheckpointError(f"{path}: found format {metadata.get('format')!r}, expected {FORMAT!r}")
    try:
        version, digest, settings = int(metadata["version"]), metadata["digest"], json.loads(metadata["settings"])
        names = [name.removeprefix("rows.") for name in tensors if name.startswith("rows.")]
        rows = {name: _rows(name, tensors, metadata) for name in names}
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is not that of a checkpoint ({error})") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: its settings are not a table")
    if wild := [name for name, tensor in [*tensors.items(), *((name, rows[name][1]) for name in rows)] if not tensor.isfinite().all()]:
        raise CheckpointError(f"{path}: {wild[0]} holds numbers that are not finite")
    return Saved(version, State(tensors, rows), digest, settings)


def _rows(name: str, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> tuple[Sequence[str], Tensor]:
    """Keys and values of a table, taken out of the tensors of a file. Raises ValueError for keys that are none, and KeyError."""
    values = tensors.pop(f"rows.{name}")
    if metadata["format"] == FORMAT:
        lengths, text = tensors.pop(f"lengths.{name}"), tensors.pop(f"keys.{name}").numpy().tobytes()
        ends = lengths.long().cumsum(0).tolist()
        fits = lengths.dim() == 1 and bool((lengths >= 0).all()) and (ends[-1] if ends else 0) == len(text)
        keys = [text[of].decode() for of in slices(ends)] if fits else None
    else:
        keys = json.loads(metadata[f"rows.{name}"])
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or values.dim() != 2 or len(keys) != len(values):
        raise ValueError("keys and rows do not fit")
    return keys, values
