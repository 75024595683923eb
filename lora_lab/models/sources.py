"""Where a model comes from, as its name tells: embedded, random, a folder or the hub."""

import json
from pathlib import Path
from typing import Any

from lora_lab.assets import ASSETS, fetch
from lora_lab.models.pooled_encoder import saved_with_mean_pooling

EMBEDDED = tuple(name for name, asset in ASSETS.items() if asset.kind == "model")
"""Models that `embedded:<name>` fetches by themselves."""


def is_folder_name(name: str) -> bool:
    """Tells a folder from a hub repository, which is written "name" or "owner/name"."""
    return Path(name).expanduser().is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1


def is_local(name: str) -> bool:
    """Tells whether a model comes without the hub's client: random, embedded or from a folder."""
    return name.startswith(("random:", "embedded:")) or is_folder_name(name)


def known_type(name: str) -> str | None:
    """Returns the model type where it is known without a download."""
    kind, _, value = name.partition(":")
    if kind == "random":
        return value
    if kind == "embedded":
        return {"minilm": "bert", "smollm2": "llama"}.get(value)
    return folder_config(name).get("model_type")


def folder_config(name: str) -> dict[str, Any]:
    """Returns the `config.json` of a model folder; empty for any other name, and where it cannot be read."""
    try:
        return json.loads((Path(name).expanduser() / "config.json").read_text())
    except (OSError, ValueError):
        return {}


def source_of(name: str) -> str:
    """Returns what `from_pretrained` takes, a folder or a hub name; an embedded model is fetched."""
    kind, _, value = name.partition(":")
    if kind == "embedded":
        return str(fetch(value))
    return str(Path(name).expanduser()) if is_folder_name(name) else name


def public_name(name: str) -> str | None:
    """Returns the name by which others find the same weights; None where nobody else has them."""
    kind, _, value = name.partition(":")
    if kind == "embedded":
        hub = ASSETS[value].hub
        return hub.repository if hub else None
    return None if kind == "random" else name


def folder_faults(folder: Path, pooling: str) -> list[str]:
    """Returns why a folder cannot be opened as a model with this pooling; empty where it can."""
    if not folder.is_dir():
        return [f"name: the folder '{folder}' does not exist; a hub repository is written 'owner/name'"]
    if (folder / "adapter_config.json").exists():
        return [f"name: '{folder}' holds an adapter, not a model; give the model which it was trained on"]
    try:
        json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return [f"name: '{folder}' has no config.json, so it is no model folder"]
    except (OSError, ValueError) as error:
        return [f"name: {folder / 'config.json'} cannot be read: {error}"]
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        reason = f"only {pickles[0]}, a pickle that may run code" if pickles else "no weights"
        return [f"name: '{folder}' holds {reason}; safetensors are needed: convert with save_pretrained"]
    if saved_with_mean_pooling(folder) and pooling != "mean":
        return [f"pooling: '{folder}' was saved with mean pooling; set pooling to 'mean'"]
    return []
