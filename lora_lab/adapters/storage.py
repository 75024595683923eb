"""Adapters on disk, in PEFT's layout: two files that PEFT opens, one with everything else, and a model card.

    adapter_config.json          PEFT's fields of the method
    adapter_model.safetensors    `base_model.model.<path>.<PEFT's tensor name>`
    lora_lab.yaml                the full spec, which adapters share tensors or were dropped, and where all
                                 comes from (`lineage`); PEFT ignores unknown files
    README.md                    method, base, and what PEFT cannot rebuild of the folder

A method's `PeftLayout` says how its tensors and options are called there; nothing here depends on a method.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast, overload

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import conversion_mapping

from lora_lab.adapters.injection import AdapterSet, load_tensors, parameter_count, place
from lora_lab.adapters.lineage import Lineage, base_lineage, read_lineage, same_base, versions
from lora_lab.adapters.maps import stacked
from lora_lab.adapters.methods import METHODS
from lora_lab.adapters.peft_folder import PREFIX, PeftFolder, understand
from lora_lab.adapters.protocols import Droppable
from lora_lab.adapters.sites import saved_modules
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.adapters.switching import NamedAdapters
from lora_lab.documents.reading import (
    DocumentError,
    plain,
    read_json,
    read_yaml,
    references,
    texts,
    yaml_text,
)
from lora_lab.documents.structured import fill
from lora_lab.documents.writing import new_folder
from lora_lab.errors import CheckpointError
from lora_lab.linalg.norms import nonfinite
from lora_lab.models.pooled_encoder import PooledEncoder
from lora_lab.tasks import name_classes

CONFIG, TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", "lora_lab.yaml"
CARD = "README.md"
LINEAGE = "lineage"
CLASSES = "classes"
"""Key of `lora_lab.yaml`: the names of a classifier's classes in the order of its outputs."""

UNREADABLE = "cannot be read as the spec of a method"
READ_INSTEAD = f"Delete the file to read {CONFIG} instead."
EXPERTS_NAMES = frozenset(("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
"""Names of experts before they were stacked in one parameter, which PEFT still reads as theirs."""
MOST_SPARED = 1000
"""Factor by which adapters may be larger than their file, if most of their components were pruned."""


def save_adapter(
    adapters: AdapterSet,
    folder: str | os.PathLike[str],
    base_model: str | None = None,
    task_type: str | None = None,
    label_names: Sequence[str] = (),
    lineage: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter folder, whole or not at all.

    The folder says which base it belongs to, see `lineage`. What PEFT cannot rebuild of it is said in a
    warning and in its README.md.

    Args:
        adapters: the adapters, with their saved modules.
        folder: where; an older folder of this name is replaced.
        base_model: hub name or path of the base, for PEFT's Auto classes.
        task_type: PEFT's `SEQ_CLS` or `CAUSAL_LM`, also for these; left out for mean pooling: the Auto
            classes would build another head, and refuse the folder without it.
        label_names: names of a classifier's classes in the order of its outputs.
        lineage: what is known besides the base's weights; it is added to the lineage of loaded adapters.

    Raises:
        CheckpointError: if the folder cannot be written to, or holds anything but an adapter.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and not (folder.is_dir() and _empty(folder)):
        raise CheckpointError(
            f"{folder}: holds something other than an adapter, which would be replaced. Name a new folder."
        )
    # Shared and sliced storage is copied: safetensors refuses both.
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in _file_tensors(adapters).items()
    }
    layout = _layout(adapters)
    limits = _limits(adapters)
    for limit in limits:
        warnings.warn(limit, stacklevel=2)
    if isinstance(adapters.model, PooledEncoder):
        task_type = None
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
    origin = _lineage_of(adapters, {"name": base_model} if base_model else {}, lineage or {})
    try:
        with new_folder(folder) as fresh:
            save_file(tensors, fresh / TENSORS, metadata={"format": "pt"})
            (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            shutil.copymode(fresh / CONFIG, fresh / TENSORS)  # safetensors' files are their owner's alone
            own = {"adapter": asdict(spec)} | {name: value for name, value in structure.items() if value}
            # Added here, because a name may look like a reference to another value.
            apart = {LINEAGE: origin} | ({CLASSES: list(label_names)} if label_names else {})
            names = yaml_text(apart)
            (fresh / OWN).write_text(OmegaConf.to_yaml(OmegaConf.create(own)) + names, encoding="utf-8")
            card = _card(adapters, base_model, config["peft_type"], limits)
            (fresh / CARD).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: could not be written ({error}); nothing was changed there."
        ) from error


def _lineage_of(adapters: AdapterSet, base: Lineage, given: Mapping[str, Any]) -> Lineage:
    """Returns the lineage of adapters that are about to be stored; their first base stays theirs."""
    if "base" in adapters.lineage:
        base = adapters.lineage["base"]
    elif adapters.held is not None:
        with NamedAdapters.of(adapters.model).base_in_place():
            base = base_lineage(adapters.model, (), adapters.saved) | base
    else:
        base = base_lineage(adapters.model, adapters._all, adapters.saved) | base
    base = base | given.get("base", {})
    return adapters.lineage | dict(given) | {"base": base, "versions": versions()}


@overload
def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], any_base: bool = False, name: None = None
) -> AdapterSet: ...
@overload
def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], any_base: bool = False, *, name: str
) -> NamedAdapters: ...
def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], any_base: bool = False, name: str | None = None
) -> AdapterSet | NamedAdapters:
    """Puts the adapters of a folder, ours or PEFT's, into a model.

    The names of a classifier's classes, if the folder has them, are written into the model's config; of
    adapters held by name, those of the chosen one.

    Args:
        model: the base model; it is unchanged after an error.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        any_base: whether the model may have other weights than the base that the folder was trained on; that
            it has is then said in the set's lineage, and in folders that are made of it.
        name: holds the adapters under this name, next to others in the model (see `switching`); they work
            once they are chosen.

    Returns:
        The set of adapters now in the model; with a name, all that the model holds by name.

    Raises:
        CheckpointError: if a file is missing or broken, a number in it is not finite, or the folder belongs
            to another model.
        IncompatibleError: if the folder uses an option of PEFT that lora_lab does not have.
        TargetError: if the model does not have the modules that the folder names.
        ConfigError: if the name is taken.
    """
    if name is None:
        adapters, classes = _load(model, Path(folder), any_base)
        name_classes(getattr(model, "config", None), classes)
        return adapters
    named = NamedAdapters.of(model)
    with named.base_in_place():
        named.check_name(name)
        named.take(name, *_load(model, Path(folder), any_base))
    return named


def _load(model: nn.Module, folder: Path, any_base: bool) -> tuple[AdapterSet, list[str]]:
    """Returns the adapters of a folder, now in the model, and the names of a classifier's classes."""
    shapes = read_shapes(folder)
    foreign: PeftFolder | None = None
    if (folder / OWN).exists():
        own = _read_own(folder / OWN)
        spec = _own_spec(own, folder / OWN)
        names = _label_names(own, folder / OWN)
    else:
        own, names = {}, []
        foreign = _read_foreign(model, folder / CONFIG, shapes)
        spec = foreign.spec
    _check_size(model, spec, shapes, folder)
    lineage = read_lineage(_texts(own), str(folder / OWN))
    tensors = read_tensors(folder / TENSORS)
    if foreign is not None:
        foreign.check_copies(model, tensors, str(folder))
        tensors |= foreign.missing(model)
    adapters = place(model, spec.for_stored(), untied=_apart(model, spec, tensors))
    try:
        shared, dropped = _structure(own, folder / OWN, adapters)
        for path, owner in shared.items():
            adapters.share(path, owner)
        if foreign is not None:
            tensors = foreign.convert(adapters, tensors)
        by_path, others = _by_path(adapters, tensors)
        given = {
            f"{PREFIX}{path}.{name}": tensor
            for path, found in by_path.items()
            for name, tensor in adapters._all[path].complete_peft_tensors(found).items()
        }
        if foreign is not None:
            foreign.check_ranks(adapters, by_path, str(folder / CONFIG))
        # Shared tensors follow from the spec, so a file may leave them out.
        given |= _shared_tensors(adapters)
        given |= others
        load_tensors(_file_tensors(adapters), given, str(folder), write=False)
        adapters.lineage = _checked_lineage(adapters, lineage, folder, any_base)
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
    return adapters, names


def _texts(own: Mapping[str, Any]) -> dict[str, Any]:
    return {LINEAGE: texts(own.get(LINEAGE))}


def stored_lineage(folder: str | os.PathLike[str]) -> Lineage:
    """Returns the lineage of an adapter folder; {} if it has none, as PEFT's folders and older ones.

    Raises:
        CheckpointError: if `lora_lab.yaml` cannot be read, or holds something else there.
    """
    path = Path(folder) / OWN
    return read_lineage(_texts(_read_own(path)), str(path)) if path.is_file() else {}


def _checked_lineage(adapters: AdapterSet, lineage: Lineage, folder: Path, any_base: bool) -> Lineage:
    """Checks that a model is the base of a folder's lineage; with `any_base` records if it is not."""
    base = lineage.get("base") or {}
    if "weights" not in base:
        return lineage
    here = base_lineage(adapters.model, adapters._all, adapters.saved)
    if same_base(base, here):
        return lineage
    if any_base:
        return lineage | {"loaded_onto": [*lineage.get("loaded_onto", []), here]}
    raise CheckpointError(
        f"{folder}: was trained on {base.get('name')} with weights {base['weights']}, and this model is "
        f"{here['name']} with weights {here.get('weights')}. Load it onto that base, or onto this one "
        "with --any-base (in Python any_base=True)."
    )


def read_label_names(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the names of the classes of a stored classifier in the order of its outputs.

    Empty for other tasks, for PEFT's folders, and for folders from before names were stored.

    Raises:
        CheckpointError: if `lora_lab.yaml` cannot be read, or holds something else there.
    """
    path = Path(folder) / OWN
    return _label_names(_read_own(path), path) if path.exists() else []


def _label_names(own: Mapping[str, Any], path: Path) -> list[str]:
    names = texts(own.get(CLASSES) or [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: `{CLASSES}` must be a list of names; copy the folder again.")
    if len(set(names)) < len(names):
        raise CheckpointError(f"{path}: `{CLASSES}` holds a name twice; copy the folder again.")
    return names


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Reads names and shapes from the header of `adapter_model.safetensors`, but no tensor.

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
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file of an adapter.

    Raises:
        CheckpointError: if it cannot be read, or a number in it is not finite.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    if found := nonfinite(tensors):
        raise CheckpointError(
            f"{path}: {len(found)} of {len(tensors)} tensors have numbers that are not finite "
            f"({found[0]}); its training has diverged, or the file is damaged. Load an adapter of an earlier "
            "step, or train again with a smaller learning rate."
        )
    return tensors


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: is truncated or no safetensors file ({error}). Copy it again.")


def _check_size(model: nn.Module, spec: AdapterSpec, shapes: Mapping[str, Any], folder: Path) -> None:
    """Checks, before any tensor is made, that the adapters would not be larger than the folder's contents."""
    held = sum(math.prod(shape) for shape in shapes.values())
    count = parameter_count(model, spec.for_stored())
    # Adapters that share, were pruned or dropped are stored smaller than they are built, at most by this
    # factor.
    if count > MOST_SPARED * max(held, 1000):
        raise CheckpointError(
            f"{folder}: its config asks for adapters of {count:,} numbers on this model, and the folder "
            f"holds {held:,}. It belongs to another model, or was changed: copy it again."
        )


def _read_own(path: Path) -> dict[str, Any]:
    """Reads `lora_lab.yaml`, which may come from an unknown source: nothing in it is interpolated."""
    try:
        own = read_yaml(path)
    except DocumentError as error:
        raise CheckpointError(f"{path}: {UNREADABLE} ({error}). {READ_INSTEAD}") from error
    if not isinstance(own, dict) or not isinstance(own.get("adapter"), dict):
        raise CheckpointError(f"{path}: {UNREADABLE} (it has no `adapter` with fields). {READ_INSTEAD}")
    referring = references({name: value for name, value in own.items() if name not in (CLASSES, LINEAGE)})
    if referring:
        raise CheckpointError(f"{path}: {UNREADABLE} ('{referring[0]}' is not a value). {READ_INSTEAD}")
    return own


def _own_spec(own: Mapping[str, Any], path: Path) -> AdapterSpec:
    given = own["adapter"]
    method = texts(given.get("method"))
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError(
            f"{path}: {UNREADABLE}: method '{method}' is not known here. Install its package, or call "
            "lora_lab.register with its class."
        )
    schema: Any = OmegaConf.structured(METHODS[method].Spec)
    faults: list[str] = []
    given = {name: given[name] for name in METHODS[method].Spec.without_removed(plain(given))}
    fill(schema, given, path.name, faults, "adapter.")
    if faults:
        raise CheckpointError(f"{path}: {UNREADABLE} ({'; '.join(faults)}). {READ_INSTEAD}")
    try:
        return cast(AdapterSpec, OmegaConf.to_object(schema))
    except OmegaConfBaseException as error:
        raise CheckpointError(f"{path}: {UNREADABLE} ({error}). {READ_INSTEAD}") from error


def _structure(
    own: Mapping[str, Any], path: Path, adapters: AdapterSet
) -> tuple[dict[str, str], list[Droppable]]:
    """Reads from `lora_lab.yaml` which adapters share another's tensors, and which were dropped."""
    droppable = adapters.implementing(Droppable)
    try:
        dropped = [droppable[name] for name in texts(own.get("dropped") or [])]
        shared = {str(name): str(owner) for name, owner in dict(texts(own.get("shared") or {})).items()}
        for name in (*shared, *shared.values()):
            adapters.adapters[name]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: `shared` or `dropped` names something that is not an adapter of this model ({error}). "
            "Use the model that it was made with."
        ) from error
    return shared, dropped


def _read_foreign(model: nn.Module, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> PeftFolder:
    try:
        config = read_json(path)
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: is missing or not a PEFT config (it holds no object).")
        return understand(model, config, shapes, str(path))
    except DocumentError as error:
        raise CheckpointError(f"{path}: is missing or not a PEFT config ({error}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: is missing or not a PEFT config ({type(error).__name__}: {error})."
        ) from error


def _apart(model: nn.Module, spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether the file holds two different tensors for one parameter that two saved modules share.

    PEFT trains each module of `modules_to_save` separately, tied or not.
    """
    first: dict[int, Tensor] = {}
    for path in saved_modules(model, spec):
        for name, parameter in model.get_submodule(path).named_parameters(remove_duplicate=False):
            given = tensors.get(f"{PREFIX}{path}.{name}")
            if given is not None and not torch.equal(first.setdefault(id(parameter), given), given):
                return True
    return False


def _limits(adapters: AdapterSet) -> list[str]:
    """Returns what PEFT cannot rebuild of a folder that it opens: the model around it, or single adapters."""
    peft_type, model = _layout(adapters).peft_type, adapters.model
    found = []
    if peft_type is not None and isinstance(model, PooledEncoder):
        found.append(
            "the classifier reads the mean of the tokens, a model that PEFT's Auto classes cannot build: "
            "they refuse this folder. In PEFT, build the model with lora_lab.build_model (pooling: mean) and "
            "call PeftModel.from_pretrained(model, folder)."
        )
    # Maps near stacked experts that have the former names of these.
    kind = getattr(getattr(model, "config", None), "model_type", None)
    renamed = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}) | {"mixtral": "mixtral"}
    named = [path for path in adapters.adapters if path.rpartition(".")[2] in EXPERTS_NAMES]
    own = [path for path in named if not stacked(adapters.adapters[path].base)]
    if own and peft_type == "LORA" and renamed.get(kind) in ("mixtral", "qwen2_moe"):
        found.append(
            f"{own[0]}: in models like {kind} PEFT takes this name for the experts themselves and leaves "
            "out the adapter, so it computes something else from this folder. lora_lab opens it correctly; "
            "for PEFT, exclude such maps (shared experts, dense blocks) and train again."
        )
    return found


def _card(adapters: AdapterSet, base: str | None, peft_type: str | None, limits: Sequence[str]) -> str:
    """Returns the folder's model card, as Markdown with the hub's metadata."""
    method = adapters.spec.method
    head = {"library_name": "peft" if peft_type else "lora_lab", "tags": ["lora_lab", method]}
    named = {"base_model": base} if base else {}
    lines = ["---", yaml.safe_dump(named | head, sort_keys=False).rstrip(), "---", ""]
    lines += [f"# {base or 'A model'} + {method}", "", f"A {method} adapter of {len(adapters)} modules.", ""]
    if peft_type is None:
        lines.append("PEFT has no such method: lora_lab opens it, with `load_adapter(model, folder)`.")
    elif limits:
        lines += ["What PEFT cannot rebuild of it:", "", *(f"- {limit}" for limit in limits)]
    else:
        lines.append(f"PEFT opens it as {peft_type}.")
    return "\n".join(lines) + "\n"


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
    """Sorts a file's tensors by adapter; those that belong to none are returned separately."""
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
    """Writes patterns as PEFT understands them: ours may name roles, which PEFT does not know."""
    if not any(field.name == "rank_pattern" for field in fields(adapters.spec)):
        return {}
    layout = _layout(adapters)
    general = layout.write(adapters.spec)
    alpha = next((name for name in general if name.endswith("alpha")), None)
    names = {"rank_pattern": "r", "alpha_pattern": alpha}
    found: dict[str, dict[str, Any]] = {pattern: {} for pattern, name in names.items() if name in general}
    for path, adapter in adapters.items():
        for name, spec in adapter.stored_specs(path).items():
            own = layout.write(spec)
            for pattern, values in found.items():
                if own[names[pattern]] != general[names[pattern]]:
                    values[f"^{re.escape(name)}"] = own[names[pattern]]
    return found
