"""Writing files so that a reader, or a killed writer, never leaves half of one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_lab.errors import CheckpointError


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all.

    Raises:
        CheckpointError: if the folder cannot be written to.
    """
    with writable(path.parent):
        unfinished = _beside(path)
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill, which takes the place of `path` when the block ends without an error.

    Raises:
        CheckpointError: if the parent folder cannot be written to.
    """
    fresh, old = _beside(path), _beside(path, "old")
    with writable(path.parent):
        fresh.mkdir()
    try:
        yield fresh
        if path.exists():
            os.rename(path, old)
        os.rename(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Makes a folder if need be, and turns the operating system's refusals inside into one clear message."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written to ({error.strerror or error}). Choose another folder, or mend its "
            "rights."
        ) from error


def _beside(path: Path, kind: str = "unfinished") -> Path:
    """Returns a name in the same folder: what is made there has usual rights, and renaming is one step."""
    return path.with_name(f".{path.name}.{kind}.{os.getpid()}")
