"""Two processes that train together over gloo, for tests."""

import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

import lora_lab

COMMAND = str(Path(lora_lab.__file__).with_name("__main__.py"))
"""The script that `lora-lab` is."""


def run_in_two_processes(file: str, folder: Path, *arguments: str, codes: tuple[int, int] = (0, 0)) -> None:
    """Runs a test's file as a script in two processes, which find each other as Lightning's do.

    They are forks of this one: torch and Lightning would take each of them many seconds to import.

    Args:
        file: the script.
        folder: where they stand, and leave what they print.
        arguments: of the script.
        codes: with which they are to end.

    Raises:
        AssertionError: with what they printed, if one of them ends otherwise.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=_run, args=(rank, port, file, folder, arguments), daemon=True)
        for rank in (0, 1)
    ]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(500)
    finally:
        for process in started:
            process.kill()
    printed = "\n".join((folder / f"output_{rank}").read_text() for rank in (0, 1))
    assert tuple(process.exitcode for process in started) == codes, printed


def _run(rank: int, port: int, file: str, folder: Path, arguments: tuple[str, ...]) -> None:
    output = (folder / f"output_{rank}").open("w", buffering=1)
    sys.stdout = sys.stderr = output
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    rank_zero_only.rank = rank
    os.chdir(folder)
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")
