"""From YAML files and `key=value` overrides to one typed `ExperimentConfig`, or one message with every fault.

A file may start from others:

    extends: [../../configs/models/minilm.yaml, ../../configs/adapters/lora.yaml]
    adapter: {rank: 4}

Their paths count from the file, and later ones win. `adapter` and `data` are tagged unions: `adapter.method`
and `data.source` choose the dataclass that the rest of the node must fit. A layer that names another method
starts the node afresh, so that `adapter.method=ia3` works over a file that sets LoRA's rank. `controllers`
holds any number: each key names one, and null takes one out again that an earlier layer put in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.adapters import METHODS
from lora_lab.adapters.spec import FOREIGN_NAMES
from lora_lab.callbacks import CONTROLLERS, check_controllers, renamed, unknown
from lora_lab.config.schema import ExperimentConfig
from lora_lab.data import DATA_SOURCES, check_data
from lora_lab.errors import ConfigError, suggest
from lora_lab.models.build import check_model
from lora_lab.tasks import TASKS

COMMAND_LINE = "command line"

UNIONS: dict[str, tuple[str, Mapping[str, type]]] = {
    "adapter": ("method", {name: method.Spec for name, method in METHODS.items()}),
    "data": ("source", DATA_SOURCES),
}
"""Node → the key that names the kind, and the dataclass of each kind."""


@dataclass
class Layer:
    """One source of settings: a file, or the command line."""

    source: str
    settings: dict[str, Any]


def compose(path: str | Path, overrides: Sequence[str] = (), stored: bool = False) -> ExperimentConfig:
    """Composes an experiment's config and checks all that can be checked before anything is loaded.

    Args:
        path: the experiment's YAML file.
        overrides: settings such as `adapter.rank=4`, which win over every file.
        stored: whether the file was written by a run, perhaps under names of before.

    Raises:
        ConfigError: with one line per fault: file, key, what is wrong, what is allowed.
    """
    layers = _read(Path(path), ())
    for layer in layers if stored else ():
        layer.settings["controllers"] = renamed(layer.settings.get("controllers") or {})
    layers += _parse_overrides(overrides)
    return compose_layers(layers)


def compose_layers(layers: Sequence[Layer]) -> ExperimentConfig:
    """Merges layers, later ones winning, into a checked config; see `compose`."""
    faults: list[str] = []
    schema = OmegaConf.structured(ExperimentConfig)
    settings = [Layer(layer.source, dict(layer.settings)) for layer in layers]
    for node, (tag, kinds) in UNIONS.items():
        kind = _choose(node, tag, kinds, settings, faults)
        if kind is None:
            for layer in settings:
                layer.settings.pop(node, None)
        else:
            schema[node] = OmegaConf.structured(kinds[kind])
    for layer in settings:
        _merge_controllers(schema.controllers, layer, faults)
        _merge(schema, layer.settings, layer.source, "", faults)
    where = settings[0].source if settings else COMMAND_LINE
    faults += [
        f"{where}: {key}: is required and has no default; set it in the file or as {key}=…"
        for key in sorted(OmegaConf.missing_keys(schema))
        if key.partition(".")[0] not in UNIONS or not any(f.startswith(f"{where}: {key}") for f in faults)
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    try:
        config = cast(ExperimentConfig, OmegaConf.to_object(schema))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {error}") from error
    faults = _cross_checks(config)
    if faults:
        raise ConfigError("\n".join(f"{where}: {fault}" for fault in faults))
    return config


def _cross_checks(config: ExperimentConfig) -> list[str]:
    """Returns the faults of settings that are each well-formed."""
    found = [f"adapter.{fault}" for fault in config.adapter.faults()]
    found += check_controllers(config.controllers, METHODS[config.adapter.method])
    found += [f"optimization.{fault}" for fault in config.optimization.faults()]
    found += [f"trainer.{fault}" for fault in config.trainer.faults()]
    found += [f"model.{fault}" for fault in check_model(config.model)]
    if config.model.task in TASKS:  # else the model's faults say so
        found += check_data(config.data, config.model.task)
    if config.adapter.reads_full_weights and config.model.quantization == "none":
        found.append(
            "model.quantization: is none, and this adapter's start makes up for what quantisation takes; set "
            "it to nf4, or choose another adapter.init"
        )
    for name in ("name", "run"):
        value = getattr(config, name)
        if value is not None and (not value or value in (".", "..") or "/" in value):
            found.append(f"{name}: must be a plain folder name; got '{value}'")
    return found


def _read(path: Path, trail: tuple[Path, ...]) -> list[Layer]:
    """Reads a file and all that it extends, farthest first."""
    if path in trail:
        raise ConfigError(f"{trail[-1]}: extends: {path} is extended in a circle; take one of them out.")
    if not path.is_file():
        asker = f"{trail[-1]}: extends: " if trail else ""
        raise ConfigError(f"{asker}no file '{path}'. Paths in extends count from the file that names them.")
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no valid YAML: {' '.join(str(error).split())}") from error
    settings = {} if told is None else told
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: must hold keys and values, not a {type(settings).__name__}.")
    extended = settings.pop("extends", [])
    if not isinstance(extended, list) or not all(isinstance(name, str) for name in extended):
        raise ConfigError(f"{path}: extends: must be a list of paths; got {extended!r}.")
    layers = [layer for name in extended for layer in _read(path.parent / name, (*trail, path))]
    return [*layers, Layer(str(path), settings)]


def _parse_overrides(overrides: Sequence[str]) -> list[Layer]:
    """Reads `key=value` settings; each is a layer of its own, so that order decides."""
    wrong = [
        f"{COMMAND_LINE}: '{text}' is no setting; write key=value, as in adapter.rank=4"
        for text in overrides
        if "=" not in text or text.startswith(("=", "-"))
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    try:
        parsed: list[Any] = [OmegaConf.to_container(OmegaConf.from_dotlist([text])) for text in overrides]
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{COMMAND_LINE}: {' '.join(str(error).split())}") from error
    return [Layer(COMMAND_LINE, settings) for settings in parsed]


def _choose(
    node: str, tag: str, kinds: Mapping[str, type], layers: Sequence[Layer], faults: list[str]
) -> str | None:
    """Returns the kind that the last layer to name one names; drops the node from layers before."""
    chosen, source = None, ""
    for index, layer in enumerate(layers):
        told = layer.settings.get(node)
        if not isinstance(told, dict) or tag not in told:
            continue
        if told[tag] != chosen:
            for earlier in layers[:index]:
                earlier.settings.pop(node, None)
        chosen, source = told[tag], layer.source
    if chosen is None:
        faults.append(f"{layers[0].source}: {node}.{tag}: is required. Known: {', '.join(sorted(kinds))}")
    elif not isinstance(chosen, str) or chosen not in kinds:
        faults.append(f"{source}: {node}.{tag}: no {tag} '{chosen}'{suggest(str(chosen), kinds)}")
        return None
    return chosen


def _merge_controllers(schema: DictConfig, layer: Layer, faults: list[str]) -> None:
    """Takes `controllers` out of a layer: each key there chooses the dataclass that its node must fit."""
    told = layer.settings.pop("controllers", {})
    if not isinstance(told, dict):
        faults.append(f"{layer.source}: controllers: must hold controllers and their options; got {told!r}")
        return
    for name, options in told.items():
        key = f"controllers.{name}"
        if name not in CONTROLLERS:
            faults.append(f"{layer.source}: {key}: no such controller{unknown(str(name))}")
        elif options is None:
            schema.pop(name, None)
        elif not isinstance(options, dict):
            faults.append(f"{layer.source}: {key}: must hold options, {{}} for the defaults; got {options!r}")
        else:
            if name not in schema:
                schema[name] = OmegaConf.structured(CONTROLLERS[name].Spec)
            _merge(schema[name], options, layer.source, f"{key}.", faults)


def _merge(
    schema: DictConfig, settings: Mapping[str, Any], source: str, prefix: str, faults: list[str]
) -> None:
    """Merges settings into a structured node key by key, so that one fault does not hide the others."""
    kind: Any = OmegaConf.get_type(schema)
    known = [field.name for field in fields(kind)]
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if name not in known:
            faults.append(f"{source}: {key}: no such key{_suggest_key(str(name), known)}")
            continue
        child: Any = schema._get_node(name)
        child_kind = OmegaConf.get_type(child) if isinstance(child, DictConfig) else None
        if is_dataclass(child_kind):
            if isinstance(value, dict):
                _merge(child, value, source, f"{key}.", faults)
            else:
                faults.append(f"{source}: {key}: must hold keys and values; got {value!r}")
            continue
        try:
            OmegaConf.update(schema, name, value, merge=True)
        except OmegaConfBaseException as error:
            faults.append(f"{source}: {key}: {_first_line(error)}")


def _suggest_key(name: str, known: Sequence[str]) -> str:
    ours = FOREIGN_NAMES.get(name)
    if ours in known or (ours and "." in ours):
        return f"; it is called '{ours}' here. Known: {', '.join(sorted(known))}"
    return suggest(name, known)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
