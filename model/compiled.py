"""How loops are compiled, by Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

Loops = TypeVar("Loops", bound=Callable[..., object])


def compiled(function: Loops) -> Loops:
    """Compile a function of arrays when it is first called, and keep what was made beside the source or in ``NUMBA_CACHE_DIR``.

    Where neither can be written, as in a container whose files are read-only, each process compiles for itself, for some seconds.
    Sums keep their order (``contract`` only joins a product and a sum), so that the same input gives the same bits.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return cast("Loops", njit(cache=True, **options)(function))
    except RuntimeError:  # No place to keep it.
        return cast("Loops", njit(**options)(function))
