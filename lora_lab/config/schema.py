"""The settings of an experiment file: one dataclass per part, each in the module that uses it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_lab.adapters.spec import AdapterSpec
from lora_lab.callbacks import ControllerSpec
from lora_lab.data import DataConfig
from lora_lab.models.build import ModelConfig
from lora_lab.tracking import TrackingConfig
from lora_lab.training.optimization import OptimizationConfig
from lora_lab.training.trainer import TrainerConfig


@dataclass
class ExperimentConfig:
    """One run: a model, data, an adapter, and how it is trained and tracked."""

    name: str = "experiment"
    """Name of the experiment; its runs are in `<output>/<name>/`."""

    run: str | None = None
    """Name of the run's folder; null means `<method>-<first 8 digits of the config's hash>-seed<seed>`."""

    output: str = "runs"
    """Folder of all experiments' runs."""

    continues: str | None = None
    """Folder of a finished run, from whose last checkpoint this run starts to train longer; null means none.
    Only `trainer.max_epochs` and `trainer.max_steps` may differ from that run's."""

    seed: int = 0
    """Seed of everything random in the run: adapters, heads, data order, dropout."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    controllers: dict[str, ControllerSpec] = field(default_factory=dict)
    """What changes the adapters while they train: id of a controller → its options, {} for its defaults."""
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def decisive(self) -> dict[str, Any]:
        """Returns the settings that decide the result: all but names, folders, tracking and conveniences.

        How steps that are not finite are handled may be changed when such a step has occurred.
        """
        settings = asdict(self)
        for name in ("name", "run", "output", "tracking"):
            del settings[name]
        for name in ("progress_bar", "checkpoint_every", "on_nonfinite", "max_skipped_steps"):
            del settings["trainer"][name]
        settings["data"].pop("workers", None)
        return settings

    def hash(self) -> str:
        """Returns a sha256 of the settings that decide the result."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()

    def run_name(self) -> str:
        """Returns the name of the run's folder."""
        return self.run or f"{self.adapter.method}-{self.hash()[:8]}-seed{self.seed}"


def differing(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    """Returns the dotted keys in which two configs of plain values differ, each with its two values.

    What only one of them has, such as a controller, is None in the other. Keys of an adapter that only one
    method has are left out.
    """
    found: dict[str, list[Any]] = {}
    for name in {**one, **other}:
        mine, theirs = one.get(name), other.get(name)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found |= differing(mine, theirs, f"{prefix}{name}.")
        elif mine != theirs and (prefix != "adapter." or (name in one and name in other)):
            found[prefix + name] = [mine, theirs]
    return found
