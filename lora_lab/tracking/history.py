"""Giving a resumed run the rows that its killed process logged before the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lora_lab.tracking.loggers import delete_earlier
from lora_lab.tracking.metrics_file import MetricsFile


@rank_zero_only
def replay(rows: Sequence[dict[str, Any]], loggers: Iterable[Logger], until_step: int) -> None:
    """Writes the rows before a checkpoint to new loggers, so that a resumed run has each row exactly once.

    Offline, the new W&B run gets the rows, and the folders of earlier processes are deleted. Pictures and
    tables are not repeated: they are logged when training ends, which a killed process did not reach. Online,
    W&B continues with the rows on the server: those between the checkpoint and the kill are then there twice,
    with the same `trainer/global_step`. `metrics.csv` is exact in both modes.

    Args:
        rows: what `read_metrics` returned before the run was resumed.
        loggers: what `build_loggers` made, before their first row.
        until_step: number of optimizer steps of the checkpoint; 0 to start from the beginning.
    """
    kept = [row for row in rows if row["step"] < until_step]
    for logger in loggers:
        if isinstance(logger, MetricsFile):
            logger.write(kept)
        elif isinstance(logger, WandbLogger) and logger.experiment.offline:
            for row in kept:
                metrics = {name: value for name, value in row.items() if name != "step"}
                logger.log_metrics(metrics, row["step"])
            delete_earlier(Path(logger.experiment.sync_dir), logger.experiment.id)
