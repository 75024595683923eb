"""Writing files so that a reader, or a killed writer, never leaves half of one."""

import os
import shutil
import tempfile
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
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill, which takes the place of `path` when the block ends without an error.

    Raises:
        CheckpointError: if the parent folder cannot be written to.
    """
    with writable(path.parent):
        fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield fresh
        fresh.chmod(0o755)  # mkdtemp makes folders that nobody else can read
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.rename(path, old / path.name)
            os.rename(fresh, path)
            shutil.rmtree(old)
        else:
            os.rename(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


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
