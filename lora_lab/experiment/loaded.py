"""Data that a process has read for one run and keeps for the next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from lora_lab.config.schema import ExperimentConfig
from lora_lab.data import TaskData, build_data
from lora_lab.models.build import build_tokenizer

MOST = 4
"""How many data sets are kept, the last that were used."""


class LoadedData:
    """Builds the data of runs; what was read and tokenised for one serves all that have the same settings.

    A file that changes meanwhile is not read again. Models are not kept: their weights are read from the
    system's file cache, in a tenth of the time that data take; heads are drawn again with each run's seed.
    """

    def __init__(self) -> None:
        self._kept: dict[str, TaskData] = {}

    def of(self, config: ExperimentConfig, label_names: Sequence[str] = ()) -> TaskData:
        """Returns the data of a run.

        Args:
            config: of the run.
            label_names: as in `build_data`.

        Raises:
            LabError: if the data or the tokenizer cannot be used.
        """
        task = config.model.task
        key = json.dumps([asdict(config.data), asdict(config.model), list(label_names)], sort_keys=True)
        kept = self._kept.pop(key, None)
        if kept is None:
            data = build_data(config.data, build_tokenizer(config.model), task, config.seed, label_names)
        else:
            data = kept.with_seed(config.seed)
        self._kept[key] = data
        for oldest in list(self._kept)[:-MOST]:
            del self._kept[oldest]
        return data
