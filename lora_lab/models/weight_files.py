"""Safetensors files of weights, read and written without a copy of them in memory.

transformers maps the files, of which a page is read when it is used. What was read stays in the process's
memory until it is given back here.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path

import psutil
from safetensors.torch import _TYPES
from torch import Tensor, uint8

from lora_lab.linalg.lazy import now

Range = tuple[int, int]
"""Address and length in bytes."""
DTYPES = {dtype: name for name, dtype in _TYPES.items()}
"""torch's types in safetensors' names."""
PIECE = 1 << 16
"""Bytes written at once. Larger pieces took up to three times as long where it was measured."""
TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of the C library's `mallopt`."""


def write_weights(path: Path, weights: Mapping[str, Tensor], mapped: list[Range]) -> None:
    """Writes a safetensors file tensor by tensor.

    Each is computed while the one before is written, so that memory holds two. safetensors itself needs all
    of a file's tensors at once. Format: https://github.com/huggingface/safetensors#format

    Args:
        path: the file.
        weights: tensors by name, lazy or not.
        mapped: where the numbers are read from; these pages are given back after each tensor.

    Raises:
        OSError: if the file cannot be written; what was written so far stays.
    """
    # Wide numbers first, so that each tensor starts at a multiple of its numbers' size.
    names = sorted(weights, key=lambda name: -weights[name].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = weights[name]
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, freed_memory_kept(), ThreadPoolExecutor(1) as writer:
        if hasattr(os, "posix_fallocate"):  # a full disk is told now, and the rest is written faster
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        file.write(len(text).to_bytes(8, "little") + text)
        written: Future[None] | None = None
        for name in names:
            tensor = now(weights[name]).detach().cpu().contiguous()
            if written:
                written.result()
            written = writer.submit(_write, file, tensor)
            give_back(mapped)
        if written:
            written.result()


def _write(file: BufferedWriter, tensor: Tensor) -> None:
    """Writes a tensor's bytes."""
    whole = tensor.flatten().view(uint8).numpy().data
    for start in range(0, len(whole), PIECE):
        file.write(whole[start : start + PIECE])


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Lets the process use freed memory again instead of giving it back to the system, inside the context.

    Linux fills new memory with zeros, page by page. For tensors as large as weights, this takes longer than
    computing them.
    """
    library = ctypes.CDLL(None) if hasattr(mmap, "MADV_DONTNEED") else None
    if not hasattr(library, "mallopt"):  # it is glibc's alone
        yield
        return
    assert library is not None
    library.mallopt(MMAP_MAX, 0)
    library.mallopt(TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.mallopt(MMAP_MAX, 1 << 16)  # glibc's defaults
        library.mallopt(TRIM_THRESHOLD, 1 << 17)
        library.malloc_trim(0)


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
