"""The settings of tracking, and what `auto` means on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

import wandb
from wandb.errors import Error as WandbError
from wandb.sdk.lib.wbauth import read_netrc_auth

from lora_lab.errors import ConfigError, suggest

Mode = Literal["online", "offline", "disabled"]

MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""Values of WANDB_MODE, including old names, and what they mean."""


@dataclass
class TrackingConfig:
    """Whether and under which names a run is tracked by Weights & Biases; `metrics.csv` is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`online` sends rows to the server, `offline` keeps them in `<run>/wandb/` for `wandb sync`, `disabled`
    does not use W&B. `auto` follows the environment variable WANDB_MODE; without it, it means `online` if an
    API key is configured (WANDB_API_KEY or `wandb login`), else `offline`."""

    project: str = "lora_lab"
    """W&B project."""

    entity: str | None = None
    """W&B user or team; null means the default of the account."""

    group: str | None = None
    """W&B group; null means the experiment's name."""

    job_type: str | None = None
    """W&B job type; a study sets `tune` or `compare`."""

    cell: str | None = None
    """Name of the cell of a study that the run belongs to."""

    tags: list[str] = field(default_factory=list)
    """W&B tags."""

    log_adapter: bool = False
    """Whether the adapter's folder becomes a W&B artifact of the run, with base, data, config and versions as
    its metadata."""

    test_examples: bool = True
    """Whether `test_examples.parquet` is written: label, prediction and loss of each test example, for paired
    statistics."""


def wandb_mode(config: TrackingConfig) -> Mode:
    """Returns the mode that the config means on this machine.

    Raises:
        ConfigError: if WANDB_MODE is not a mode, or the mode is online and there is no API key.
    """
    source, mode = "tracking.wandb", config.wandb
    if mode == "auto" and (variable := os.environ.get("WANDB_MODE")):
        if variable not in MODES:
            raise ConfigError(f"WANDB_MODE: no mode '{variable}'{suggest(variable, MODES)}")
        source, mode = "WANDB_MODE", MODES[variable]
    if mode == "auto":
        return "online" if has_api_key() else "offline"
    if mode == "online" and not has_api_key():
        raise ConfigError(
            f"{source}: online needs an API key, and none is configured. Run `wandb login`, "
            "set WANDB_API_KEY, or use tracking.wandb=offline."
        )
    return mode


def has_api_key() -> bool:
    """Whether W&B would find an API key; asks neither the user nor the server.

    `wandb.login(prompt=False)` does the same, but prints and waits for the server.
    """
    try:
        settings = wandb.setup().settings
        return bool(settings.api_key or read_netrc_auth(host=settings.base_url))
    except WandbError as error:
        raise ConfigError(
            f"tracking.wandb: W&B's own settings are invalid ({error}). "
            "Fix them, or use tracking.wandb=offline."
        ) from error
