"""Timing several ways of doing the same, by turns, in one run: what is slow for a while on the machine is slow for all of them."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's ``mallopt``: how much unused memory at the end is kept, and how many pieces are asked of the system by themselves."""

SETTLED = 0.01
"""Seconds by when GNU's OpenMP threads, and so those of torch from PyPI, wait busily no more: until then they take a core from the next."""


def settle() -> None:
    """Have threads that were left waiting fall asleep; awake, for a core that has slept is slow at first."""
    if torch.get_num_threads() > 1:
        until = time.perf_counter() + SETTLED
        while time.perf_counter() < until:
            pass


def keep_memory() -> None:
    """Have glibc give no memory back to the system: else one call's is given back in the next, and asked for anew in the one after."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def timed(calls: Mapping[str, Callable[[], object]], seconds: float, *, least: int = 3) -> dict[str, list[float]]:
    """Seconds of each call, by turns, for so long altogether and ``least`` times at least; the first call of each does not count.

    What has been made by then is left out of Python's collections, as in a worker: else each would look through all of it.
    """
    for call in calls.values():
        call()
    gc.collect()
    gc.freeze()
    took: dict[str, list[float]] = {name: [] for name in calls}
    end, turns = time.monotonic() + seconds, 0
    while turns < least or time.monotonic() < end:
        turns += 1
        for name, call in calls.items():
            settle()
            began = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - began)
    return took


def in_a_row(calls: Mapping[str, Callable[[], object]], seconds: float, *, block: float = 0.1) -> dict[str, list[float]]:
    """As `timed`, but each is called again and again for ``block`` seconds before it is another's turn, and finds its own in the caches.

    The first call of each block does not count.
    """
    took: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, call in calls.items():
            settle()
            call()
            until = time.perf_counter() + block
            while (began := time.perf_counter()) < until:
                call()
                took[name].append(time.perf_counter() - began)
    return took


def rates(took: Mapping[str, list[float]], count: int) -> dict[str, float]:
    """How many a second, by the median of the repetitions."""
    return {name: count / statistics.median(each) for name, each in took.items()}


def ratios(took: Mapping[str, list[float]], of: str) -> dict[str, float]:
    """How many times as long as ``of`` each other took, by the median over turns: both sides of a ratio are of the same moment."""
    return {name: statistics.median(a / b for a, b in zip(each, took[of], strict=True)) for name, each in took.items() if name != of}


def spread(took: list[float], count: int) -> str:
    """From the tenth to the ninetieth percentile of the rates."""
    low, high = np.quantile(took, [0.1, 0.9])
    return f"{count / high:,.0f} to {count / low:,.0f}"


def machine() -> dict[str, Any]:
    """What it was measured on, and with what."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "numba": numba.__version__}
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return versions | {"system": platform.platform(), "processor": model, "cores": len(os.sched_getaffinity(0))}
