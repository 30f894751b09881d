"""One thread for NumPy's linear algebra while many small matrices are worked on.

OpenBLAS and MKL split even a 64 x 64 product among all cores. Where several programs are worked on at once, or other
processes have the cores, their threads wait for one another: decompositions of 256 x 256 then take 10 to 30 times as
much processor time as on one thread.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from numpy.linalg import _umath_linalg

NAMES = (
    ("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
    ("scipy_openblas_get_num_threads", "scipy_openblas_set_num_threads"),
    ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)
"""Of the libraries that NumPy is built with: its wheels' OpenBLAS, a system's, conda's MKL."""
_lock = threading.Lock()
_inside, _before = 0, 0


@cache
def blas_threads() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """(reads, sets) how many threads NumPy's library takes; None where it has no such calls (Accelerate)."""
    try:
        # Symbols are looked for in what the extension is linked with, too.
        library = ctypes.CDLL(_umath_linalg.__file__)
    except OSError:
        return None
    for reads, sets in NAMES:
        if hasattr(library, reads) and hasattr(library, sets):
            get, put = getattr(library, reads), getattr(library, sets)
            put.argtypes, put.restype = [ctypes.c_int], None
            return get, put
    return None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Linear algebra of the process runs on the thread that asks for it; as before once the last one leaves."""
    global _inside, _before
    calls = blas_threads()
    if calls is None:
        yield
        return
    get, put = calls
    with _lock:
        if _inside == 0:
            _before = get()
            put(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                put(_before)
