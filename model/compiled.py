"""How loops are compiled, by Numba."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit

Loops = TypeVar("Loops", bound=Callable[..., object])

SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
"""Of all files whose functions may be compiled into one another."""


def compiled(function: Loops) -> Loops:
    """Compile a function of arrays when it is first called, and keep what was made beside the source or in ``NUMBA_CACHE_DIR``.

    Where neither can be written, as in a container whose files are read-only, each process compiles for itself, for some seconds.
    Sums keep their order (``contract`` only joins a product and a sum), so that the same input gives the same bits.
    """
    return _compiled(function, _nrt=True)


def borrowing(function: Loops) -> Loops:
    """As `compiled`, for a function that makes no array, and calls none that does.

    Whoever calls it holds all arrays meanwhile, and so nothing counts who does: each slice would cost two counts, as much as adding up the
    rows of a small one.
    """
    return _compiled(function, _nrt=False)


def inlined(function: Loops) -> Loops:
    """As `borrowing`, for a function that takes many arrays, as part of those that call it: handed over, an array is seven numbers."""
    return _compiled(function, _nrt=False, forceinline=True)


def _compiled(function: Loops, **more: Any) -> Loops:  # noqa: ANN401  options of Numba's
    # Nobody calls them from C.
    options: dict[str, Any] = {"nogil": True, "no_cfunc_wrapper": True, "error_model": "numpy", "fastmath": {"contract"}} | more
    try:
        made = njit(cache=True, **options)(function)
    except RuntimeError:  # No place to keep it.
        return cast("Loops", njit(**options)(function))
    file = made._cache._cache_file  # noqa: SLF001
    # Numba looks at the function's own file, and would keep what was made of functions in others that have changed since.
    file._source_stamp = SOURCES  # noqa: SLF001
    file.save = partial(_save, file)
    made._cache.save_overload = partial(_keep, made._cache.save_overload)  # noqa: SLF001
    return cast("Loops", made)


def _save(file: Any, key: object, data: object) -> None:  # noqa: ANN401  Numba's
    """Keep what was compiled under a name of its own, and then the index that names it.

    Numba counts names, so that of two processes that keep different types at the same time one would load the other's ever after.
    """
    index = file._load_index()  # noqa: SLF001
    index[key] = name = file._data_name(int(hashlib.sha256(repr(key).encode()).hexdigest()[:12], 16))  # noqa: SLF001
    file._save_data(name, data)  # noqa: SLF001
    file._save_index(index)  # noqa: SLF001


def _keep(save: Callable[..., None], *what: object) -> None:
    """Keep what was compiled, where there is room for it: a full disk is no reason not to use it."""
    with suppress(OSError):
        save(*what)
