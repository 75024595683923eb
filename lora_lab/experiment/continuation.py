"""A run that continues from the last checkpoint of a finished one, for more steps, in a new folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_lab.config.compose import compose
from lora_lab.config.schema import ExperimentConfig
from lora_lab.errors import CheckpointError, ConfigError
from lora_lab.experiment.folder import RunFolder

LENGTHS = ("max_epochs", "max_steps")
MORE = re.compile(rf"trainer\.({'|'.join(LENGTHS)})=\+(\d+)")


def compose_run(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Composes a run's config, as `compose` does.

    `trainer.max_epochs=+2` (or `max_steps`) makes it a continuation, two epochs longer, of the run with the
    other settings.

    Raises:
        ConfigError: if a setting is invalid.
    """
    more = [found for text in overrides if (found := MORE.fullmatch(text))]
    config = compose(path, [text for text in overrides if not MORE.fullmatch(text)])
    if not more:
        return config
    if len({found[1] for found in more}) < len(more):
        raise ConfigError(f"trainer.{more[0][1]}: a length to add stands twice; give their sum once.")
    trainer, suffix = config.trainer, ""
    for found in more:
        name, count = found[1], int(found[2])
        now = getattr(trainer, name)
        if now < 1 or not count:
            raise ConfigError(f"trainer.{name}=+{count}: adds nothing to {now}. Set the length itself.")
        trainer = replace(trainer, **{name: now + count})
        suffix += f"-{name}{now + count}"
    run = config.run and f"{config.run}{suffix}"
    return replace(config, trainer=trainer, continues=str(RunFolder.of(config).path), run=run)


def source_of(config: ExperimentConfig) -> RunFolder | None:
    """Returns the folder of the finished run that this one continues, if it continues one.

    Raises:
        ConfigError: if the two runs differ in more than their length, or have controllers.
        CheckpointError: if the folder holds no finished run with a checkpoint.
    """
    if config.continues is None:
        return None
    folder = RunFolder(Path(config.continues))
    folder.finished()
    if not folder.checkpoint.is_file():
        raise CheckpointError(f"continues: {folder.path} has no checkpoint. Name a finished run with one.")
    if config.controllers:
        raise ConfigError(
            "continues: schedules of controllers depend on the length of a run, so a run with controllers "
            f"({', '.join(config.controllers)}) cannot be made longer. Train it again with that length."
        )
    stored = compose(folder.config, stored=True)
    if differing := differences(_without_length(stored), _without_length(config)):
        raise ConfigError(
            f"continues: {folder.path} was trained with other settings ({', '.join(differing[:5])}). Only "
            f"{' and '.join(f'trainer.{name}' for name in LENGTHS)} may differ."
        )
    return folder


def differences(one: dict[str, Any], two: dict[str, Any], start: str = "") -> list[str]:
    """Returns where two configs of plain values differ, as `key: value there, value here`."""
    found = []
    for name in one.keys() | two.keys():
        old, new = one.get(name), two.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{start}{name}.")
        elif old != new:
            found.append(f"{start}{name}: {old!r} there, {new!r} here")
    return sorted(found)


def _without_length(config: ExperimentConfig) -> dict[str, Any]:
    settings = config.decisive()
    del settings["continues"]
    for name in LENGTHS:
        del settings["trainer"][name]
    return settings
