"""What a run's numbers depend on besides its config: versions, commit, hardware, process."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

PACKAGES = (
    "lora_lab",
    "torch",
    "lightning",
    "transformers",
    "torchmetrics",
    "wandb",
    "omegaconf",
    "safetensors",
)


def process_rank() -> int:
    """Returns the rank of this process, 0 for the first; known before there is a Trainer."""
    return int(getattr(rank_zero_only, "rank", 0))


def environment() -> dict[str, Any]:
    """Returns what a run's numbers depend on besides its config: versions, commit, hardware."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    hardware = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": devices,
    }
    return {
        "packages": packages,
        "python": platform.python_version(),
        "git_commit": _commit(),
        "hardware": hardware,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Returns the commit of the code in the working folder, with `+` if files differ from it."""
    try:
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changed else commit
