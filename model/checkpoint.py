"""All values of a model version, by name: as tensors for whoever carries them, and as a safetensors file.

The names are fixed: ``phi`` (size,), ``moments`` (2, size), ``count`` (1,), ``memory.*``, and for each embedding table its rows, value and
moments side by side. Nothing else is needed to go on learning, and every name but the moments to score.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.mamo import Mamo
from model.memory import Memory
from model.meta import Optimiser

FORMAT = "coldstream-checkpoint/1"


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or that was made with other settings. The message names the file and the mend."""


class State(NamedTuple):
    """Values of a version: whole tensors by name, and rows of tables by key, (len(keys), 2 width + 1) each: value, then moments."""

    tensors: dict[str, Tensor]
    rows: dict[str, tuple[list[str], Tensor]]


def export(model: Mamo, optimiser: Optimiser, changed: Mapping[str, Iterable[str]] | None = None) -> State:
    """The values of a version. With ``changed``, of each table only those rows; whole tensors always, they are small."""
    tensors = {"phi": model.vector, "moments": optimiser.moments, "count": torch.tensor([optimiser.count])}
    tensors |= {f"memory.{field.name}": getattr(model.memory, field.name) for field in fields(Memory)}
    rows = {}
    for name, table in model.tables.items():
        keys = table.export()[0] if changed is None else list(changed.get(name, ()))
        at = torch.tensor(table.lookup(keys), dtype=torch.int64)
        rows[name] = (keys, torch.cat([table.values[at], optimiser.moments_of(name)[at]], 1))
    return State(tensors, rows)


def load(state: State, model: Mamo, optimiser: Optimiser | None = None, *, whole: bool = True) -> None:
    """Set a model to ``state``. ``whole`` forgets the rows that the state does not name; else they stay as they are.

    Raises CheckpointError where a tensor is missing or of another shape; the model is then unchanged.
    """
    wanted = {"phi": model.vector.shape, **{f"memory.{field.name}": getattr(model.memory, field.name).shape for field in fields(Memory)}}
    for name, shape in wanted.items():
        if name not in state.tensors or state.tensors[name].shape != shape:
            found = tuple(state.tensors[name].shape) if name in state.tensors else "none"
            raise CheckpointError(f"{name}: the settings call for a tensor of shape {tuple(shape)}, found {found}")
    for name, table in model.tables.items():
        if name not in state.rows or state.rows[name][1].shape[1:] != (2 * table.width + 1,):
            raise CheckpointError(f"rows of {name}: the settings call for a width of {2 * table.width + 1}")
    model.set_vector(state.tensors["phi"].to(model.dtype))
    model.memory = Memory(**{field.name: state.tensors[f"memory.{field.name}"].to(model.dtype) for field in fields(Memory)})
    for name, table in model.tables.items():
        keys, values = state.rows[name]
        if whole:
            table.clear()
        table.assign(keys, values[:, : table.width])
        if optimiser is not None:
            moments = optimiser.moments_of(name)
            if whole:
                moments.zero_()
            moments[torch.tensor(table.lookup(keys), dtype=torch.int64)] = values[:, table.width :].to(moments.dtype)
    if optimiser is not None:
        optimiser.moments = state.tensors["moments"].to(model.dtype)
        optimiser.count = int(state.tensors["count"])


def save(path: Path, state: State, *, version: int, settings: str) -> None:
    """Write a version to a safetensors file, with the ``settings`` digest that its values depend on; replaced whole or not at all."""
    tensors = dict(state.tensors)
    metadata = {"format": FORMAT, "version": str(version), "settings": settings}
    for name, (keys, values) in state.rows.items():
        tensors[f"rows.{name}"] = values
        metadata[f"rows.{name}"] = json.dumps(keys)
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.replace(path)


def read(path: Path, *, settings: str) -> tuple[State, int]:
    """Read what `save` wrote: the state and its version. Raises CheckpointError for anything else, and for other settings."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a checkpoint that can be read ({error})") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: found format {metadata.get('format')!r}, expected {FORMAT!r}")
    if metadata["settings"] != settings:
        raise CheckpointError(f"{path}: made with other settings ({metadata['settings'][:12]}, not {settings[:12]})")
    rows = {
        name.removeprefix("rows."): (json.loads(metadata[name]), tensors.pop(name)) for name in list(tensors) if name.startswith("rows.")
    }
    return State(tensors, rows), int(metadata["version"])
