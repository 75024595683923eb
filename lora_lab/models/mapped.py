"""Weights that lie in files and not in memory.

transformers maps safetensors files, of which a page is read when it is used. What was read stays in the
process's memory until it is given back here.
"""

from __future__ import annotations

import ctypes
import mmap

import psutil

Range = tuple[int, int]
"""Address and length in bytes."""


def mapped_weights() -> list[Range]:
    """Returns where safetensors files are mapped whose numbers nobody has changed; [] where nothing tells."""
    if not hasattr(mmap, "MADV_DONTNEED") or not hasattr(psutil.Process, "memory_maps"):
        return []
    found = []
    for part in psutil.Process().memory_maps(grouped=False):
        # Changed pages are the process's own, and would be lost.
        if part.path.endswith(".safetensors") and not part.anonymous:
            start, end = (int(text, 16) for text in part.addr.split("-"))
            found.append((start, end - start))
    return found


def give_back(ranges: list[Range]) -> None:
    """Frees the pages that were read; they are read again where they are used again."""
    library = ctypes.CDLL(None) if ranges else None
    for start, length in ranges:
        assert library is not None
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
