"""Data sources, and how a config becomes batches.

To add a source: write a config class with `faults` and `load` (or, for text, `columns` and `tables`), and
add it to `DATA_SOURCES`.
"""

import logging
from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_only
from transformers import PreTrainedTokenizerBase

from lora_lab.data.config import DataConfig
from lora_lab.data.embedded import EmbeddedConfig
from lora_lab.data.files import FilesConfig
from lora_lab.data.hub import HubConfig
from lora_lab.data.task_data import TaskData
from lora_lab.data.toy import ToyConfig
from lora_lab.errors import DataError
from lora_lab.tasks import task_faults

__all__ = [
    "DATA_SOURCES",
    "DataConfig",
    "EmbeddedConfig",
    "FilesConfig",
    "HubConfig",
    "TaskData",
    "ToyConfig",
    "build_data",
    "check_data",
]

DATA_SOURCES: dict[str, type[DataConfig]] = {
    "embedded": EmbeddedConfig,
    "hub": HubConfig,
    "files": FilesConfig,
    "toy": ToyConfig,
}
"""All data sources by the name that `data.source` takes."""

log = logging.getLogger(__name__)


def check_data(config: DataConfig, task: str) -> list[str]:
    """Returns all faults that show without loading data, each with its key; empty if there are none."""
    return task_faults(task) or config.faults(task)


def build_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    task: str,
    seed: int,
    label_names: Sequence[str] = (),
) -> TaskData:
    """Reads, checks, splits and tokenises the data; logs how many texts were cut and how many rows repeat.

    Args:
        config: Options of one source.
        tokenizer: The model's tokenizer; None for models without text.
        task: A key of TASKS.
        seed: Seed of the run, at least 0; decides the order of the training examples, not the split.
        label_names: The classes of a stored model in the order of their ids; empty to find them in the
            training rows.

    Raises:
        DataError: If options or data are invalid.
        AssetError: If an embedded data set cannot be fetched from any source.
    """
    faults = check_data(config, task)
    if faults:
        raise DataError("; ".join(faults))
    data = TaskData(config, config.load(tokenizer, task, label_names), task, seed)
    _log_remarks(data)
    return data


@rank_zero_only
def _log_remarks(data: TaskData) -> None:
    for remark in data.remarks():
        log.warning("data: %s", remark)
