"""Writing files so that nobody sees half a file, also if the writer was killed.

Own code, because the libraries for this write only single files, do not sync them, or are not maintained.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_lab.errors import CheckpointError

UNFINISHED, OLD = "unfinished", "old"


def write_text(path: Path, text: str) -> None:
    """Writes a text file completely or not at all.

    Raises:
        CheckpointError: if the folder cannot be written to.
    """
    with writable(path.parent):
        unfinished = _beside(path, UNFINISHED)
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)  # a full disk may refuse even an empty file
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, which replaces `path` if the block ends without an error.

    Other files in an older folder of this name stay: only files that are written again are replaced.

    Raises:
        CheckpointError: if the parent folder cannot be written to.
    """
    path = path.resolve()
    fresh, old = _beside(path, UNFINISHED), _beside(path, OLD)
    with writable(path.parent):
        fresh.mkdir()
    try:
        yield fresh
        _sync(fresh)
        if path.exists():
            os.rename(path, old)
        os.rename(fresh, path)
        _keep_others(old, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def clean_unfinished(folder: Path) -> None:
    """Cleans up a folder after its writer was killed; no other process may write to it meanwhile.

    Unfinished files are deleted. A folder that was about to be replaced gets its name back, unless its
    replacement was complete.
    """
    for path in sorted(folder.glob(".*")):
        found = re.fullmatch(rf"\.(.+)\.({UNFINISHED}|{OLD})\.\d+", path.name)
        if found is None:
            continue
        name, kind = found.groups()
        if kind == UNFINISHED:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif not (folder / name).exists():
            os.rename(path, folder / name)
        else:
            _keep_others(path, folder / name)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Makes a folder if necessary, and turns errors of the operating system inside into one clear message.

    Raises:
        CheckpointError: if the operating system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written to ({error.strerror or error}). Choose another folder, free some "
            "disk space, or change the folder's permissions."
        ) from error


def _beside(path: Path, kind: str) -> Path:
    """Returns a name in the same folder, so that permissions are as usual and renaming is one step."""
    return path.with_name(f".{path.name}.{kind}.{os.getpid()}")


def _keep_others(old: Path, new: Path) -> None:
    """Moves what the new folder does not replace from the old one into it, and deletes the rest."""
    if not old.is_dir():
        return
    for entry in old.iterdir():
        if not (new / entry.name).exists():
            os.rename(entry, new / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    with path.open("rb") as file, suppress(OSError):  # some network file systems refuse it
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Waits until the folder's files are on the disk: a power failure must not leave empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
