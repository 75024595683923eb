"""What `run.json` holds: the start of a run, and its end."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import lightning as L
from torch import Tensor

from lora_lab.adapters import AdapterSet
from lora_lab.callbacks.adapter_statistics import final_statistics
from lora_lab.config.schema import ExperimentConfig
from lora_lab.data import TaskData
from lora_lab.experiment.callbacks import RunCallbacks
from lora_lab.experiment.environment import environment

SCHEMA_VERSION = 2


def start_record(
    config: ExperimentConfig, adapters: AdapterSet, data: TaskData, before: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns what is known when a run starts; `before` is the record of the run that it continues."""
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": config.name,
        "run": config.run_name(),
        "continues": config.continues,
        "status": "running",
        "error": None,
        "method": config.adapter.method,
        "controllers": list(config.controllers),
        "seed": config.seed,
        "config_hash": config.hash(),
        "started": before["started"] if before else datetime.now(UTC).isoformat(timespec="seconds"),
        "resumptions": before["resumptions"] + 1 if before else 0,
        "method_parameters": adapters.trainable_count(saved=False),
        "trainable_parameters": adapters.trainable_count(),
        "total_parameters": adapters.base_count(),
        "data_fingerprint": data.fingerprint,
        "data": data.facts(),
        "label_names": data.label_names,
        **environment(),
    }


def end_record(
    trainer: L.Trainer, callbacks: RunCallbacks, metrics: Mapping[str, Tensor | float]
) -> dict[str, Any]:
    """Returns what is known when training has ended: how long it took, and what it reached."""
    return {
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "wall_seconds": round(callbacks.resume.elapsed(), 3),
        "median_step_milliseconds": callbacks.speed.median_step_milliseconds,
        "tokens_per_second": callbacks.speed.tokens_per_second,
        "peak_memory_megabytes": callbacks.memory.peak_megabytes,
        "peak_memory_kind": callbacks.memory.peak_kind,
        "final_method_parameters": callbacks.adapters.adapters.trainable_count(saved=False),
        **final_statistics(callbacks.adapters.rows),
        "best_value": callbacks.best.best_value,
        "best_step": callbacks.best.best_step,
        "metrics": {
            name: float(value)
            for name, value in metrics.items()
            if name.startswith(("train/", "validation/", "test/"))
        },
    }
