"""Adapters on disk, in PEFT's layout: two files that PEFT opens, and one that says all that we know.

    adapter_config.json          PEFT's fields of the method
    adapter_model.safetensors    `base_model.model.<path>.<PEFT's tensor name>`
    lora_lab.yaml                the full spec, and which adapters share tensors or were dropped; PEFT
                                 ignores unknown files

A method says how its tensors and options are called there in its `PeftLayout`; nothing here knows a method.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from yaml import YAMLError

from lora_lab.adapters.injection import AdapterSet, inject, load_tensors
from lora_lab.adapters.methods import METHODS
from lora_lab.adapters.protocols import Droppable
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.errors import CheckpointError, IncompatibleError, suggest
from lora_lab.files import new_folder

PREFIX = "base_model.model."
CONFIG, TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", "lora_lab.yaml"


def save_adapter(
    adapters: AdapterSet, folder: Path, base_model: str | None = None, task_type: str | None = None
) -> None:
    """Writes an adapter folder, whole or not at all.

    Args:
        adapters: the adapters, with their saved modules.
        folder: where; an older folder of this name is replaced.
        base_model: hub name or path of the base, for PEFT's Auto classes.
        task_type: PEFT's `SEQ_CLS` or `CAUSAL_LM`, for the same.

    Raises:
        CheckpointError: if the folder cannot be written to, or holds anything but an adapter.
    """
    if folder.exists() and not (folder / CONFIG).is_file() and not (folder.is_dir() and _empty(folder)):
        raise CheckpointError(
            f"{folder}: holds other things than an adapter and would be replaced. Name a new folder."
        )
    # Shared and sliced storage is copied: safetensors refuses both.
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in _file_tensors(adapters).items()
    }
    layout = _layout(adapters)
    dropped = [path for path, own in adapters.implementing(Droppable).items() if own.dropped]
    structure = {"shared": adapters.owners, "dropped": dropped}
    config = {
        "peft_type": layout.peft_type,
        "base_model_name_or_path": base_model,
        "task_type": task_type,
        "inference_mode": True,
        "target_modules": list(adapters.adapters),
        "modules_to_save": list(adapters.saved) or None,
        **layout.write(adapters.spec),
        **_patterns(adapters),
        **layout.site_config(adapters.adapters),
    }
    spec = replace(adapters.spec, modules_to_save=list(adapters.saved))
    try:
        with new_folder(folder) as fresh:
            save_file(tensors, fresh / TENSORS, metadata={"format": "pt"})
            (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            own = {"adapter": asdict(spec)} | {name: told for name, told in structure.items() if told}
            (fresh / OWN).write_text(OmegaConf.to_yaml(OmegaConf.create(own)))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: could not be written ({error}); nothing was changed there."
        ) from error


def load_adapter(model: nn.Module, folder: Path) -> AdapterSet:
    """Puts the adapters of a folder, ours or PEFT's, into a model.

    Args:
        model: the base model; it is left as it was if anything is wrong.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The set of adapters now in the model.

    Raises:
        CheckpointError: if a file is missing or broken, or the folder belongs to another model.
        IncompatibleError: if the folder uses an option of PEFT that lora_lab does not have.
    """
    tensors = read_tensors(folder)
    spec = read_spec(folder, tensors)
    adapters = inject(model, spec.for_stored())
    try:
        shared, dropped = _read_structure(folder, adapters)
        for path, owner in shared.items():
            adapters.share(path, owner)
        by_path, others = _by_path(adapters, tensors)
        given = {
            f"{PREFIX}{path}.{name}": tensor
            for path, own in by_path.items()
            for name, tensor in adapters._all[path].complete_peft_tensors(own).items()
        }
        # Shared tensors follow from the spec, so that a file may leave them out.
        given |= _shared_tensors(adapters)
        given |= others
        load_tensors(_file_tensors(adapters), given, str(folder), write=False)
        for path, adapter in adapters._all.items():
            start = f"{PREFIX}{path}."
            adapter.load_peft_tensors({name: given[f"{start}{name}"] for name in adapter.peft_tensors()})
        for name, tensor in _shared_tensors(adapters).items():
            tensor.data.copy_(given[name])
        for unused in dropped:
            unused.drop()
        for adapter in adapters.everything():
            adapter.tensors_changed()
    except Exception:
        adapters.remove()
        raise
    adapters.spec = spec
    return adapters


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads `adapter_model.safetensors`.

    Raises:
        CheckpointError: if it is missing, truncated, or a pickle.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Name the folder that holds {CONFIG} and {TENSORS}.")
    path = folder / TENSORS
    if not path.is_file():
        pickles = ", ".join(sorted(file.name for file in folder.glob("*.bin")))
        why = (
            f"only {pickles}, a pickle, which can run code when it is opened. Save it again as safetensors"
            if pickles
            else f"no {TENSORS}. Name the folder that a run wrote as adapter/, or PEFT's save_pretrained"
        )
        raise CheckpointError(f"{folder}: holds {why}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: is truncated or no safetensors file ({error}). Copy it again."
        ) from error


def read_spec(folder: Path, tensors: Mapping[str, Tensor]) -> AdapterSpec:
    """Reads the spec of a folder from `lora_lab.yaml`, or else from PEFT's config.

    Raises:
        CheckpointError: if neither file is there and readable.
        IncompatibleError: if PEFT's config asks for what lora_lab does not have.
    """
    own, foreign = folder / OWN, folder / CONFIG
    if own.is_file():
        try:
            given: Any = OmegaConf.to_container(OmegaConf.load(own).adapter)
            if given["method"] not in METHODS:
                raise CheckpointError(
                    f"{own}: method '{given['method']}' is not known here. Install the package that it is "
                    "of, or call lora_lab.register with its class."
                )
            kind = METHODS[given["method"]].Spec
            schema, kept = OmegaConf.structured(kind), kind.without_removed(given)
            return cast(AdapterSpec, OmegaConf.to_object(OmegaConf.merge(schema, kept)))
        except (
            OmegaConfBaseException,
            YAMLError,
            AttributeError,
            KeyError,
            OSError,
            TypeError,
            ValueError,
        ) as error:
            raise CheckpointError(
                f"{own}: cannot be read as the spec of a method ({error}). Delete the file to read {CONFIG} "
                "instead."
            ) from error
    try:
        return _spec_from_peft(json.loads(foreign.read_text()), tensors)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{foreign}: is missing or no config of PEFT ({error}).") from error


def _read_structure(folder: Path, adapters: AdapterSet) -> tuple[dict[str, str], list[Droppable]]:
    """Reads from `lora_lab.yaml` which adapters share another's tensors, and which were dropped."""
    if not (folder / OWN).is_file():
        return {}, []
    own: Any = OmegaConf.to_container(OmegaConf.load(folder / OWN))
    droppable = adapters.implementing(Droppable)
    try:
        dropped = [droppable[path] for path in own.get("dropped", [])]
        shared = dict(own.get("shared", {}))
        for path in (*shared, *shared.values()):
            adapters.adapters[path]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / OWN}: `shared` or `dropped` names what is no adapter of this model ({error}). Use "
            "the model that it was made with."
        ) from error
    return shared, dropped


def _spec_from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterSpec:
    layouts = [(method, method.peft) for method in METHODS.values() if method.peft.peft_type]
    known = {str(layout.peft_type) for _, layout in layouts}
    peft_type = config["peft_type"]
    if peft_type is None:
        raise IncompatibleError(
            f"peft_type: is empty: the method is not PEFT's, and {OWN} is missing. Copy it too."
        )
    if peft_type not in known:
        raise IncompatibleError(
            f"peft_type: no method here is PEFT's '{peft_type}'{suggest(str(peft_type), known)}"
        )
    for name, none in {"bias": "none", "exclude_modules": []}.items():
        if config.get(name) not in (none, None):
            raise IncompatibleError(
                f"{name}: {config[name]!r} of PEFT's config has no counterpart in lora_lab."
            )
    targets, saved = config["target_modules"], config.get("modules_to_save") or []
    if isinstance(targets, str) and targets != "all-linear":
        targets = f"regex:{targets}"
    common = {
        "targets": targets,
        "layers": config.get("layers_to_transform"),
        # PEFT lists heads that a model may have (`score` beside `classifier`); the file tells which it has.
        "modules_to_save": [name for name in saved if any(f".{name}." in key for key in tensors)],
    }
    if isinstance(common["layers"], int):
        common["layers"] = [common["layers"]]
    for method, layout in layouts:
        own = layout.read(dict(config)) if layout.peft_type == peft_type else None
        if own is not None:
            return method.Spec(**common, **own)
    raise IncompatibleError(f"peft_type: this kind of PEFT's '{peft_type}' is none of our methods.")


def _layout(adapters: AdapterSet) -> Any:
    return METHODS[adapters.spec.method].peft


def _file_tensors(adapters: AdapterSet) -> dict[str, Tensor]:
    found = dict(_shared_tensors(adapters))
    for path, adapter in adapters._all.items():
        found |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in adapter.peft_tensors().items()}
    return found


def _by_path(
    adapters: AdapterSet, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sorts a file's tensors by the adapter that they belong to; returns those that belong to none apart."""
    found: dict[str, dict[str, Tensor]] = {path: {} for path in adapters._all}
    others = dict(tensors)
    for key, tensor in tensors.items():
        for path, own in found.items():
            if key.startswith(f"{PREFIX}{path}."):
                own[key.removeprefix(f"{PREFIX}{path}.")] = tensor
                others.pop(key, None)
    return found, others


def _empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _shared_tensors(adapters: AdapterSet) -> dict[str, Tensor]:
    first = next(iter(adapters), None)
    return {} if first is None else dict(_layout(adapters).shared(first))


def _patterns(adapters: AdapterSet) -> dict[str, Any]:
    """Spells patterns out as PEFT understands them: ours may name roles, which PEFT does not know."""
    if not any(field.name == "rank_pattern" for field in fields(adapters.spec)):
        return {}
    layout = _layout(adapters)
    general = layout.write(adapters.spec)
    alpha = next((name for name in general if name.endswith("alpha")), None)
    names = {"rank_pattern": "r", "alpha_pattern": alpha}
    found: dict[str, dict[str, Any]] = {pattern: {} for pattern, name in names.items() if name in general}
    for path, adapter in adapters.items():
        own = layout.write(adapter.stored_spec)
        for pattern, values in found.items():
            if own[names[pattern]] != general[names[pattern]]:
                values[f"^{re.escape(path)}"] = own[names[pattern]]
    return found
