"""What every row of a benchmark's results contains, and writing the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lora_lab.experiment.environment import environment

CPU = torch.device("cpu")


def about(packages: Sequence[str], device: torch.device = CPU) -> dict[str, str]:
    """Returns the columns that name date, machine and the versions of packages."""
    hardware = environment()["hardware"]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    machine = f"{hardware['cores']}-core {hardware['processor']}, {where}"
    versions = {name: version(name) for name in packages}
    return {"date": datetime.now(UTC).date().isoformat(), "machine": machine, **versions}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of the same names as CSV."""
    pd.DataFrame(rows).to_csv(path, index=False, lineterminator="\n")
