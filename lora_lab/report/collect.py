"""From records of runs to rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

COLUMNS = (
    "experiment",
    "run",
    "method",
    "seed",
    "method_parameters",
    "trainable_parameters",
    "total_parameters",
    "adapter_file_bytes",
    "final_rank_mean",
    "effective_rank_mean",
    "steps",
    "median_step_milliseconds",
    "tokens_per_second",
    "peak_memory_megabytes",
    "peak_memory_kind",
    "wall_seconds",
    "started",
    "git_commit",
    "config_hash",
)


def collect(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns one row for each run: its record's main fields, final metrics, and machine."""
    return pd.DataFrame([_row(record) for record in records])


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {name: value for name, value in record["metrics"].items() if not name.startswith("train/")}
    hardware = record["hardware"]
    machine = {"processor": hardware["processor"], "threads": hardware["threads"]}
    machine["gpus"] = " + ".join(hardware["gpus"])
    versions = {name: record["packages"][name] for name in ("torch", "transformers", "lightning")}
    return {**{name: record[name] for name in COLUMNS}, **metrics, **machine, **versions}
