"""Reads the file of a W&B offline run, so that tests see what W&B was really given.

The file is a LevelDB log: blocks of 32 KiB with records of `crc32 u32, length u16, type u8, data`; the first
block begins with a header of 7 bytes. A record that crosses a block's end is split. Each whole record is a
`Record` of W&B's own protobuf, the one private part of W&B used here.
"""

import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    id: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    project: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    media: list[Path] = field(default_factory=list)
    """Files of tables and images."""
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    """Name, type, metadata and names of files of each artifact that the run has put out."""
    exit_code: int | None = None
    """None if the run was never ended."""


def offline_folders(folder: Path) -> list[Path]:
    """Returns W&B's folders of a run's folder."""
    return sorted((folder / "wandb").glob("offline-run-*"))


def read_offline_run(folder: Path, ended: bool = True) -> OfflineRun:
    """Reads one of W&B's offline folders.

    W&B's `finish` returns before the file is whole: unless told otherwise, this waits for its end.
    """
    (path,) = folder.glob("*.wandb")
    for _ in range(100):
        run = _read(path)
        if run.exit_code is not None or not ended:
            return run
        time.sleep(0.1)
    raise AssertionError(f"{path} was not ended")


def _read(path: Path) -> OfflineRun:
    media = (path.parent / "files" / "media").rglob("*")
    run = OfflineRun(media=sorted(file for file in media if file.is_file()))
    for data in records(path.read_bytes()):
        _add(run, Record.FromString(data))
    return run


def records(file: bytes) -> Iterator[bytes]:
    """Yields the whole records; a record that the file ends in is left out."""
    magic, number, version = struct.unpack("<4sHB", file[:7])
    assert (magic, number, version) == (b":W&B", 0xBEE1, 0)
    position, parts = 7, b""
    while position + 7 <= len(file):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", file[position : position + 7])
        data = file[position + 7 : position + 7 + length]
        if kind == 0 or len(data) < length:
            return
        assert zlib.crc32(bytes([kind]) + data) == checksum, f"record at {position} is damaged"
        position += 7 + length
        parts = data if kind in (FULL, FIRST) else parts + data
        if kind in (FULL, LAST):
            yield parts


def _add(run: OfflineRun, record: Record) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run.id, run.name, run.group = record.run.run_id, record.run.display_name, record.run.run_group
        run.job_type = record.run.job_type
        run.project, run.tags = record.run.project, list(record.run.tags)
        run.config |= _items(record.run.config.update)
    elif kind == "config":
        run.config |= _items(record.config.update)
    elif kind == "history":
        run.history.append(_items(record.history.item))
    elif kind == "summary":
        run.summary |= _items(record.summary.update)
    elif kind == "artifact":
        found = record.artifact
        files = sorted(entry.path for entry in found.manifest.contents)
        metadata = json.loads(found.metadata or "{}")
        run.artifacts.append(
            {
                "name": found.name,
                "type": found.type,
                "metadata": metadata,
                "files": files,
                "run": found.run_id,
            }
        )
    elif kind == "exit":
        run.exit_code = record.exit.exit_code


def _items(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
