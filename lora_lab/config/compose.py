"""From YAML files and `key=value` overrides to one typed `ExperimentConfig`, or one message with every fault.

A file may start from others:

    extends: [../../configs/models/minilm.yaml, ../../configs/adapters/lora.yaml]
    adapter: {rank: 4}

Their paths count from the file, and later ones win. `adapter` and `data` are tagged unions: `adapter.method`
and `data.source` choose the dataclass that the rest of the node must fit. A layer that names another method
keeps the earlier settings of fields that both methods have (`rank`, `targets`), so that a comparison changes
only the method. Fields that only the former method has are reset, and a message names them. (Own code,
because no config library does this or names the file of each fault.) `controllers` holds any number: each key
names one, and null removes one that an earlier layer added. Text fields get a value as it was written:
`run=0123` names the folder 0123.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.adapters import METHODS
from lora_lab.adapters.spec import FOREIGN_NAMES, AdapterSpec
from lora_lab.callbacks import CONTROLLERS, check_controllers
from lora_lab.callbacks.controllers import renamed, unknown
from lora_lab.config.schema import ExperimentConfig
from lora_lab.data import DATA_SOURCES, check_data
from lora_lab.documents.reading import DocumentError, parse_yaml, plain, read_yaml, references, texts
from lora_lab.documents.structured import fill
from lora_lab.errors import ConfigError, IncompatibleError, suggest
from lora_lab.models.build import check_model
from lora_lab.tasks import TASKS

COMMAND_LINE = "command line"

logger = logging.getLogger(__name__)

MOST_EXTENDED = 50
"""Files that one may extend, those of the files in between counted as often as they are read."""

UNIONS: dict[str, tuple[str, Callable[[], Mapping[str, type]]]] = {
    "adapter": ("method", lambda: {name: method.Spec for name, method in METHODS.items()}),
    "data": ("source", lambda: DATA_SOURCES),
}
"""Node → the key that names the kind, and a function that returns the dataclass of each known kind."""


@dataclass
class Layer:
    """One source of settings: a file, or the command line."""

    source: str
    settings: dict[str, Any]
    """Key → value; values may be `documents.Scalar`, which keeps the text of the file."""


def compose(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), stored: bool = False
) -> ExperimentConfig:
    """Composes an experiment's config and checks everything that can be checked before anything is loaded.

    Args:
        path: the experiment's YAML file.
        overrides: settings such as `adapter.rank=4`, which win over every file.
        stored: whether a run wrote the file, possibly with former names; it extends and interpolates nothing.

    Raises:
        ConfigError: with one line per fault: file, key, what is wrong, what is allowed.
    """
    layers = read_layers(Path(path), stored=stored)
    if stored:
        controllers = layers[0].settings.get("controllers")
        if isinstance(controllers, dict):
            layers[0].settings["controllers"] = renamed(controllers)
        adapter = layers[0].settings.get("adapter")
        method = texts(adapter.get("method")) if isinstance(adapter, dict) else None
        if isinstance(adapter, dict) and isinstance(method, str) and method in METHODS:
            try:
                kept = METHODS[method].Spec.without_removed(plain(adapter))
            except IncompatibleError as error:
                raise ConfigError(f"{path}: {error}") from error
            layers[0].settings["adapter"] = {name: adapter[name] for name in kept}
    return compose_layers([*layers, *parse_overrides(overrides)])


def compose_layers(layers: Sequence[Layer], tell: Callable[[str], None] = logger.warning) -> ExperimentConfig:
    """Merges layers, later ones winning, into a checked config; see `compose`.

    Args:
        layers: the sources of settings, which are not changed.
        tell: called with a sentence for each node whose settings do not fit the chosen kind.

    Raises:
        ConfigError: with one line per fault.
    """
    faults: list[str] = []
    schema = OmegaConf.structured(ExperimentConfig)
    settings = [Layer(layer.source, dict(layer.settings)) for layer in layers]
    for node, (tag, known) in UNIONS.items():
        kinds = known()
        kind = _choose(node, tag, kinds, settings, faults)
        if kind is None:
            for layer in settings:
                layer.settings.pop(node, None)
        else:
            schema[node] = OmegaConf.structured(kinds[kind])
            _keep_shared_fields(node, tag, kinds, settings, tell)
    for layer in settings:
        _merge_controllers(schema.controllers, layer, faults)
        fill(schema, layer.settings, layer.source, faults, names=FOREIGN_NAMES)
    where = _file_of(settings)
    try:
        missing = sorted(OmegaConf.missing_keys(schema))
    except OmegaConfBaseException as error:  # a `${…}` of the wrong type
        raise ConfigError("\n".join([*faults, f"{where}: {_first_line(error)}"])) from error
    for key in missing:
        node = key.partition(".")[0]
        source = _blamed(node, settings) or where
        if not any(f": {key}: " in fault for fault in faults):
            faults.append(
                f"{source}: {key}: is required and has no default; set it in the file or as {key}=…"
            )
    if faults:
        raise ConfigError("\n".join(faults))
    try:
        config = cast(ExperimentConfig, OmegaConf.to_object(schema))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error
    faults = _cross_checks(config)
    if faults:
        raise ConfigError("\n".join(f"{where}: {fault}" for fault in faults))
    return config


def _first_line(error: Exception) -> str:
    """Returns what OmegaConf says without its lines of keys and types."""
    return str(error).partition("\n")[0]


def _cross_checks(config: ExperimentConfig) -> list[str]:
    """Returns the faults of combinations of settings."""
    found = [f"adapter.{fault}" for fault in config.adapter.faults()]
    found += check_controllers(config.controllers, METHODS[config.adapter.method])
    found += [f"optimization.{fault}" for fault in config.optimization.faults()]
    found += [f"trainer.{fault}" for fault in config.trainer.faults()]
    found += [f"model.{fault}" for fault in check_model(config.model)]
    if config.model.task in TASKS:  # else the model's faults name it
        found += check_data(config.data, config.model.task)
        found += [
            f"trainer.{fault}" for fault in TASKS[config.model.task].monitor_faults(config.trainer.monitor)
        ]
    if config.adapter.reads_full_weights and config.model.quantization == "none":
        found.append(
            "model.quantization: is none, and this adapter's start corrects the error of quantisation; set "
            "it to nf4, or choose another adapter.init"
        )
    for name in ("name", "run"):
        value = getattr(config, name)
        if value is not None and (not value or value in (".", "..") or set(value) & set("/\0\n")):
            found.append(f"{name}: must be a plain folder name; got {value!r}")
    highest = 2**32 - max(1, config.trainer.devices)  # each process adds its rank to the seed
    if not 0 <= config.seed <= highest:
        found.append(f"seed: must lie from 0 to {highest}; got {config.seed}")
    return found


def read_layers(path: Path, trail: tuple[Path, ...] = (), stored: bool = False) -> list[Layer]:
    """Reads a file and all files that it extends, the most distant first.

    Args:
        path: the file.
        trail: the chain of files that extend each other up to it.
        stored: whether a run wrote the file; see `compose`.

    Raises:
        ConfigError: if a file is missing or not a mapping, or files extend each other in a circle.
    """
    if any(path.resolve() == earlier.resolve() for earlier in trail):
        raise ConfigError(f"{trail[-1]}: extends: {path} is extended in a circle; remove one of them.")
    if len(trail) > MOST_EXTENDED:
        raise _too_many(trail[0])
    if not path.exists():
        asker = f"{trail[-1]}: extends: " if trail else ""
        raise ConfigError(f"{asker}no file '{path}'. Paths in extends count from the file that names them.")
    try:
        settings = read_yaml(path)
    except DocumentError as error:
        raise ConfigError(str(error)) from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: must hold keys and values, not a {type(plain(settings)).__name__}.")
    # It may come from an unknown source: `${oc.env:…}` would read the environment, `extends` any file.
    if stored and ("extends" in settings or references(settings)):
        raise ConfigError(
            f"{path}: a stored config cannot extend another and cannot hold `${{…}}`. Write the values "
            "instead."
        )
    extended = texts(settings.pop("extends", []))
    if not isinstance(extended, list) or not all(isinstance(name, str) for name in extended):
        raise ConfigError(f"{path}: extends: must be a list of paths; got {extended!r}.")
    layers = [layer for name in extended for layer in read_layers(path.parent / name, (*trail, path))]
    if len(layers) > MOST_EXTENDED:
        raise _too_many(path)
    return [*layers, Layer(str(path), settings)]


def _too_many(path: Path) -> ConfigError:
    return ConfigError(f"{path}: extends: goes through more than {MOST_EXTENDED} files.")


def parse_overrides(overrides: Sequence[str]) -> list[Layer]:
    """Reads `key=value` settings; each is a separate layer, so that later ones win.

    Raises:
        ConfigError: if one is not a setting.
    """
    wrong = [
        f"{COMMAND_LINE}: '{text}' is not a setting; write key=value, as in adapter.rank=4"
        for text in overrides
        if "=" not in text or text.startswith(("=", "-"))
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return [_parse_override(text) for text in overrides]


def _parse_override(text: str) -> Layer:
    key, _, value = text.partition("=")
    try:
        settings: Any = parse_yaml(value, f"{COMMAND_LINE}: {key}")
    except DocumentError as error:
        raise ConfigError(str(error)) from error
    *outer, last = key.split(".")
    if not all((*outer, last)):
        raise ConfigError(
            f"{COMMAND_LINE}: '{key}' is not a key; write names between dots, as in adapter.rank=4"
        )
    settings = {last: settings}
    for name in reversed(outer):
        settings = {name: settings}
    return Layer(COMMAND_LINE, settings)


def _file_of(layers: Sequence[Layer]) -> str:
    """Returns the experiment's own file: the last layer that is not the command line."""
    return next((layer.source for layer in reversed(layers) if layer.source != COMMAND_LINE), COMMAND_LINE)


def _blamed(node: str, layers: Sequence[Layer]) -> str | None:
    """Returns where a node's missing key should be set: the last file that sets something in the node.

    It is the command line only if that names the kind which needs the key.
    """
    tag = UNIONS[node][0] if node in UNIONS else ""
    for layer in reversed(layers):
        own = layer.settings.get(node)
        if own and (layer.source != COMMAND_LINE or tag in own):
            return layer.source
    return None


def _choose(
    node: str, tag: str, kinds: Mapping[str, type], layers: Sequence[Layer], faults: list[str]
) -> str | None:
    """Returns the kind that the last layer with the tag names; None if there is no such kind."""
    chosen, source = None, ""
    for layer in layers:
        settings = layer.settings.get(node)
        if isinstance(settings, dict) and tag in settings:
            chosen, source = texts(settings[tag]), layer.source
    if chosen is None:
        faults.append(f"{_file_of(layers)}: {node}.{tag}: is required. Known: {', '.join(sorted(kinds))}")
        return None
    if not isinstance(chosen, str) or chosen not in kinds:
        faults.append(f"{source}: {node}.{tag}: no {tag} '{chosen}'{suggest(str(chosen), kinds)}")
        return None
    return chosen


def _keep_shared_fields(
    node: str, tag: str, kinds: Mapping[str, type], layers: Sequence[Layer], tell: Callable[[str], None]
) -> None:
    """Removes from each layer the fields of its kind that mean nothing or something else for the chosen kind.

    A layer's kind is the last that it or an earlier layer names. What is removed is reported, as the user set
    it.
    """
    names: list[str | None] = []
    for layer in layers:
        settings = layer.settings.get(node)
        named = texts(settings[tag]) if isinstance(settings, dict) and tag in settings else None
        names.append(named if isinstance(named, str) else (names[-1] if names else None))
    chosen = names[-1]
    if chosen is None:
        return
    reset: dict[str, list[str]] = {}
    for layer, kind in zip(layers, names, strict=True):
        settings = layer.settings.get(node)
        if kind in (None, chosen) or kind not in kinds or not isinstance(settings, dict):
            continue
        kept = {
            name: value
            for name, value in settings.items()
            if name != tag and _means_the_same(name, kinds[kind], kinds[chosen], node)
        }
        lost = [name for name in settings if name != tag and name not in kept]
        reset[kind] = list(dict.fromkeys([*reset.get(kind, []), *lost]))
        layer.settings[node] = kept
    for kind, lost in reset.items():
        if lost:
            tell(
                f"{node}: what was set for {kind} is reset, as {chosen} does not have the same: "
                f"{', '.join(lost)}."
            )


def _means_the_same(name: str, before: type, after: type, node: str) -> bool:
    """Returns whether a field keeps its meaning from one kind of a node to another.

    Fields of methods with the same name mean the same. Those of data sources do not (`name` has two
    meanings), unless they are inherited.
    """
    old, new = get_type_hints(before), get_type_hints(after)
    if issubclass(after, AdapterSpec) and name in after.meaningless:
        return False
    if name not in old:
        return True  # a key that the former kind does not have either is refused as usual
    common = {*before.__mro__} & {*after.__mro__}
    inherited = any(name in vars(kind).get("__annotations__", {}) for kind in common)
    return old[name] == new.get(name) and (node == "adapter" or inherited)


def _merge_controllers(schema: DictConfig, layer: Layer, faults: list[str]) -> None:
    """Removes `controllers` from a layer: each of its keys chooses the dataclass that its node must fit."""
    named = layer.settings.pop("controllers", {})
    if not isinstance(named, dict):
        faults.append(
            f"{layer.source}: controllers: must hold controllers and their options; got {plain(named)!r}"
        )
        return
    for name, options in named.items():
        key = f"controllers.{name}"
        if name not in CONTROLLERS:
            faults.append(f"{layer.source}: {key}: no such controller{unknown(str(name))}")
        elif options is None:
            schema.pop(name, None)
        elif not isinstance(options, dict):
            faults.append(
                f"{layer.source}: {key}: must hold options, {{}} for the defaults; got {plain(options)!r}"
            )
        else:
            if name not in schema:
                schema[name] = OmegaConf.structured(CONTROLLERS[name].Spec)
            fill(schema[name], options, layer.source, faults, f"{key}.", FOREIGN_NAMES)
