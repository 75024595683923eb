"""A stored adapter and its base: from a run's folder, or from an adapter's folder and the name of a base."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from lora_lab.adapters.storage import CONFIG, load_adapter, read_label_names, stored_lineage
from lora_lab.config.schema import ExperimentConfig
from lora_lab.documents.reading import DocumentError, read_json
from lora_lab.errors import CheckpointError, ConfigError
from lora_lab.experiment import build_parts, quiet_libraries
from lora_lab.experiment.folder import Record, RunFolder
from lora_lab.models.build import ModelConfig, build_model
from lora_lab.tasks import TASKS


@dataclass(frozen=True)
class StoredAdapter:
    """Where a stored adapter is, and which model it belongs to."""

    path: Path
    """As the user named it."""

    adapter: Path
    """The adapter's folder."""

    model: ModelConfig
    record: Record | None
    """The record of the run that trained it; None for an adapter by itself."""

    config: ExperimentConfig | None
    """The config of that run."""

    any_base: bool = False
    """Whether the base may have other weights than the one that the adapter was trained on."""

    @property
    def data(self) -> str:
        """The data that it was trained on, if known."""
        data: Any = None if self.config is None else self.config.data
        names = (getattr(data, field, None) for field in ("name", "train"))
        return " ".join(str(part) for part in (getattr(data, "source", ""), *names) if part)

    def build(self) -> PreTrainedModel:
        """Returns the base model, not adapted.

        Raises:
            LabError: if the model cannot be loaded, or the data that give its number of classes.
        """
        if self.config is not None:
            torch.manual_seed(self.config.seed)  # random bases and heads are those of the run
        if names := read_label_names(self.adapter):
            return build_model(self.model, len(names), label_names=names)
        if self.config is None or TASKS[self.model.task].causal:
            return build_model(self.model)
        return cast(PreTrainedModel, build_parts(replace(self.config, model=self.model))[0])


def find_adapter(
    path: str | os.PathLike[str], base: str | None = None, any_base: bool = False
) -> StoredAdapter:
    """Finds a stored adapter and its model; neither is loaded yet.

    Args:
        path: the folder of a finished run, its `adapter/`, or the folder of an adapter by itself, wherever it
            lies.
        base: the base model, as `model.name`; None takes the run's, or the one that the adapter names.
        any_base: whether it may have other weights than the one that the adapter was trained on.

    Raises:
        CheckpointError: if there is no finished run and no adapter.
        ConfigError: if nothing says which model it belongs to.
    """
    quiet_libraries()
    path = Path(path)
    run = path if RunFolder(path).record.is_file() else run_of(path)
    if run is None and not (path / CONFIG).is_file():
        raise CheckpointError(f"{path}: holds neither a run nor an adapter ({CONFIG}). Name such a folder.")
    record = config = None
    if run is not None:
        folder = RunFolder(run)
        record, adapter = folder.finished(), folder.adapter
        config = folder.stored_config()
        model = config.model
    else:
        adapter, model = path, _named_base(path, base)
    if base is not None:
        model = replace(model, name=base, revision=None)
    return StoredAdapter(path, adapter, model, record, config, any_base)


def run_of(path: Path) -> Path | None:
    """Returns the run whose own adapter a folder is; None for every other folder, also in a run."""
    path = path.absolute()  # "." has no parent
    run = RunFolder(path.parent)
    return run.path if path == run.adapter and run.record.is_file() else None


def check_out(out: str | os.PathLike[str], *sources: StoredAdapter) -> None:
    """Checks that a new folder would replace no adapter but one that was made of others.

    Args:
        out: the new folder.
        sources: what it is made of.

    Raises:
        CheckpointError: if it is a run's own adapter, one that was trained, or a source.
    """
    place = Path(out).resolve()
    if run_of(place) is not None:
        fault = "is the place of a run's own adapter"
    elif any(place.is_relative_to(source.adapter.resolve()) for source in sources):
        fault = "is or lies in a source, which it would change"
    elif (place / CONFIG).is_file() and "made" not in stored_lineage(place):
        fault = "holds an adapter that export, combine or import did not make, and that would be lost"
    else:
        return
    raise CheckpointError(f"{out}: {fault}. Name a new folder.")


def open_adapter(source: StoredAdapter) -> tuple[PreTrainedModel, Any]:
    """Returns a source's model, and the adapters in it."""
    model = source.build().eval()
    return model, load_adapter(model, source.adapter, source.any_base)


def _named_base(path: Path, base: str | None) -> ModelConfig:
    try:
        config = read_json(path / CONFIG)
    except DocumentError as error:
        raise CheckpointError(f"{path / CONFIG}: cannot be read ({error}).") from error
    named = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if base is None and not isinstance(named, str):
        raise ConfigError(f"{path}: does not name its base model. Name it: --base MODEL")
    kinds = {task.peft_type: name for name, task in TASKS.items() if task.causal}
    kind = config.get("task_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(
            f"{path}: is an adapter of a classifier or an unknown task by itself, and does not say how its "
            "model was built. Name the folder of the run that trained it."
        )
    return ModelConfig(name=base or str(named), task=kinds[kind])
