"""How many cores a process counts on, and that no library of its arithmetic takes more."""

from __future__ import annotations

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of control groups, version 2: microseconds of processor in each period, or "max", and the period. A container sees its own."""


def allowed_cores() -> int:
    """The cores that this process may use, by its affinity and its container's quota; at least one."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # No such file, or no quota.
        return cores


def limit_threads(cores: int) -> None:
    """Give arithmetic half of these ``cores``, at least one.

    A step's products are small: a second thread saves it little, and takes a core from the trainer or the broker.
    """
    import scipy.linalg.cython_blas  # noqa: F401  loads the BLAS that is limited below
    import torch
    from threadpoolctl import ThreadpoolController

    torch.set_num_threads(max(1, cores // 2))
    # What Numba's loops multiply is smaller still, and its BLAS would take every core of the machine.
    ThreadpoolController().select(internal_api="openblas").limit(limits=1)
