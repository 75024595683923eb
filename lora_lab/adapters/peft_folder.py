"""What a folder written by PEFT means: its tensors say where adapters are, its config gives numbers only.

PEFT's `target_modules`, `modules_to_save` and patterns are abbreviations that PEFT resolves by its own rules,
and can name less or more than a file holds. So places, saved modules and trained biases are read from the
names and shapes in the safetensors header, before any tensor is made:

    base_model.model.<path>.<name of the method>      the adapter at <path>
    base_model.model.<path>.base_layer.<name>         a copy of the base's tensor, or its trained bias
    base_model.model.<path>.<name>                    a fully trained module, or a trained bias
    base_model.<name>                                 what all adapters share

Of the parameters that `target_parameters` names in one module, each is wrapped around the one before: the
last is at the module's path, the others at <path>.base_layer, <path>.base_layer.base_layer …

PEFT's patterns for rank and alpha are matched by PEFT's rule, never as roles. A field of the PEFT config that
changes what is computed and has no counterpart here is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter
from lora_lab.adapters.injection import AdapterSet
from lora_lab.adapters.maps import stacked
from lora_lab.adapters.methods import METHODS
from lora_lab.adapters.sites import ends_with, exact_targets, match_regex
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.documents.reading import references
from lora_lab.documents.structured import fill
from lora_lab.errors import CheckpointError, IncompatibleError, suggest

PREFIX = "base_model.model."
BASE_COPY = ".base_layer."
TWICE = (".modules_to_save.", ".original_module.")
"""Parts of names under which PEFT writes the biases of saved modules a second time, with `bias: all`."""
Shapes = Mapping[str, tuple[int, ...]]

HARMLESS = frozenset(
    # Origin; and where adapters are, which the tensors say.
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "target_modules feedforward_modules modules_to_save layers_to_transform "
    "layers_pattern exclude_modules bias "
    # The orientation in which the base stores its matrix; here it is always (out, in).
    "fan_in_fan_out "
    # How the tensors started and were trained; the file holds the result.
    "init_weights init_ia3_weights init_lora_weights loftq_config eva_config corda_config lora_ga_config "
    "target_r tinit tfinal deltaT beta1 beta2 total_step r psoft_svd_lowrank_niter psoft_alpha "
    "lambda_pattern "
    # Options of features that are off, and of another library's parallel maps.
    "megatron_config megatron_core qalora_group_size".split()
)
"""Fields of PEFT configs that change nothing in what a file computes, where no method reads them."""


@dataclass(frozen=True)
class PeftFolder:
    """What a PEFT folder holds, for one model."""

    spec: AdapterSpec
    """Method, exact places and numbers."""
    ranks: Mapping[str, int]
    """Path → components in the file, where the config says that they are fewer than the rank."""
    copies: Mapping[str, str]
    """Name in the file of what must equal a tensor of the base → that tensor's path in the model."""
    biases: Mapping[str, str]
    """Name in the file of the trained bias of an adapted map → the map's path."""
    beside: Mapping[str, str]
    """Name of a tensor of a fully trained module that the file leaves out → its path in the base."""

    def check_copies(self, model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        """Checks that copies of the base's tensors equal this base's.

        Args:
            model: the base, not yet adapted.
            tensors: all tensors of the file.
            source: the folder, for messages.

        Raises:
            CheckpointError: if one differs.
        """
        for name, path in self.copies.items():
            own, given = _tensor(model, path), tensors[name]
            if own is None or own.shape != given.shape or not torch.allclose(own.float(), given.float()):
                raise CheckpointError(
                    f"{source}: holds a copy of {path} that differs from this model's. The adapter was made "
                    "on another base, or with another vocabulary: load it onto that base."
                )

    def missing(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the base's tensors of modules whose bias only is in the file, by the file's names."""
        found = {name: _tensor(model, path) for name, path in self.beside.items()}
        return {name: tensor.detach().clone() for name, tensor in found.items() if tensor is not None}

    def convert(self, adapters: AdapterSet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the file's tensors as our own folders hold them: without copies, biases as differences."""
        found = {name: tensor for name, tensor in tensors.items() if name not in self.copies}
        found = {name: tensor for name, tensor in found.items() if not any(part in name for part in TWICE)}
        if not self.biases:
            return found
        given = {path: found.pop(name).float() for name, path in self.biases.items()}
        for path, adapter in adapters.items():
            base: Any = adapter.base
            own = torch.zeros(len(base.weight)) if base.bias is None else base.bias.detach().float()
            scale = cast(Any, adapter).scale
            name = f"{PREFIX}{path}.lora_B.bias"
            # y = base(x) + s (B A x + c): a bias of the base that moved by d is a c of d / s.
            found[name] = found.get(name, torch.zeros_like(own)) + (given.get(path, own) - own) / scale
        return found

    def check_ranks(
        self, adapters: AdapterSet, tensors: Mapping[str, Mapping[str, Tensor]], source: str
    ) -> None:
        """Checks that each site of the file has the rank that the config says.

        Raises:
            CheckpointError: if one has another, which PEFT refuses too.
        """
        for path, adapter in adapters.items():
            count = getattr(adapter, "initial_components", None)
            kept = getattr(adapter, "kept", None)
            if count is None or kept is None or len(kept) == self.ranks.get(path, count):
                continue
            # PEFT needs at least one component, so files may hold one of zeros, which is not loaded.
            rows = [len(tensor) for name, tensor in tensors[path].items() if "_A" in name]
            if len(kept) < count and rows == [self.ranks.get(path, count)]:
                continue
            raise CheckpointError(
                f"{source}: the tensors at {path} have {len(kept)} components, and the config says "
                f"{self.ranks.get(path, count)}. Copy both files again from one save."
            )


def understand(model: nn.Module, config: Mapping[str, Any], shapes: Shapes, source: str) -> PeftFolder:
    """Reads a PEFT folder for a model.

    Args:
        model: the base, not yet adapted.
        config: `adapter_config.json`.
        shapes: names in the safetensors file → shapes, from its header.
        source: the config file, for messages.

    Raises:
        CheckpointError: if the config, or a tensor's name, does not fit this model.
        IncompatibleError: if the config asks for what lora_lab does not have.
    """
    method, own = _method(config, source)
    names = method.file_names()
    sites: dict[str, dict[str, tuple[int, ...]]] = {}
    others: list[str] = []
    modules = dict(model.named_modules())
    parameters = _parameters(modules, config)
    for name in sorted(shapes):
        path, _, kind = _split(name.removeprefix(PREFIX), names)
        while path.endswith(BASE_COPY[:-1]) and path not in modules:  # PEFT wraps once for each parameter
            path, kind = path.removesuffix(BASE_COPY[:-1]), f"{BASE_COPY[1:]}{kind}"
        if name.startswith(PREFIX) and path:
            sites.setdefault(path, {})[kind] = shapes[name]
        elif name.startswith(PREFIX):
            others.append(name)
    unknown = sorted(sites.keys() - modules.keys())
    if unknown or not sites:
        what = f"belong to '{unknown[0]}', which this model does not have" if unknown else "hold no adapter"
        raise CheckpointError(f"{source}: the tensors {what}. Load it onto the model that it was made on.")
    saved, copies, biases, beside = _sort(model, modules, config, others, sites, source)
    experts = [path for path in sites if stacked(modules[path])]
    if biases and (method.Spec().method != "lora" or experts):
        raise IncompatibleError(
            f"bias: {config.get('bias')!r} trains biases in addition to {method.Spec().method}"
            f"{f' on the experts of {experts[0]}' if experts else ''}, which has no counterpart in lora_lab; "
            "only files of LoRA on linear maps are opened with it."
        )
    places, excluded = _places(modules, parameters, sites, source)
    own |= method.peft.from_shapes(sites) | _numbers(config, method, places)
    if excluded:
        own["exclude"] = excluded
    own |= {"targets": exact_targets(list(sites), modules), "modules_to_save": saved}
    if biases:
        own["lora_bias"] = True
    return PeftFolder(_spec(method, own, source), method.peft.ranks(dict(config)), copies, biases, beside)


def _parameters(modules: Mapping[str, nn.Module], config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the parameters that `target_parameters` names, by module, by PEFT's rule and in its order."""
    wanted = [str(name) for name in config.get("target_parameters") or []]
    found: dict[str, list[str]] = {}
    for path, module in modules.items() if wanted else ():
        for name, _ in module.named_parameters(recurse=False):
            if any(ends_with(f"{path}.{name}", target) for target in wanted):
                found.setdefault(path, []).append(name)
    return found


def _places(
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, list[str]],
    sites: Mapping[str, Mapping[str, Any]],
    source: str,
) -> tuple[dict[str, str], list[str]]:
    """Returns every place by the name that PEFT matches patterns with, and the parameters to leave out.

    Raises:
        IncompatibleError: if `target_parameters` names one that lora_lab does not adapt.
        CheckpointError: if the tensors are of other parameters than the config says.
    """
    places: dict[str, str] = {}
    excluded: list[str] = []
    for path, tensors in sites.items():
        names, held = parameters.get(path, []), stacked(modules[path])
        others = [name for name in names if name not in held]
        plain = type(modules[path]) is nn.Linear and not hasattr(modules[path], "from_conv1d")
        if names == ["weight"] and plain:
            places[path] = f"{path}.weight"
        elif others:
            raise IncompatibleError(
                f"target_parameters: {path}.{others[0]} has no counterpart in lora_lab, which adapts linear "
                "maps, experts stacked in one parameter (experts, …, …), and their routers."
            )
        elif held and len(tensors) != 2 * len(names):
            raise CheckpointError(
                f"{source}: the tensors at {path} adapt {len(tensors) // 2} parameters, and "
                f"target_parameters names {len(names)} there. Copy both files again from one save."
            )
        elif names:
            places |= {f"{path}.{name}": f"{path}.{name}" for name in names}
            excluded += [f"{path}.{name}" for name in held if name not in names]
        else:
            places[path] = path
    return places, excluded


class _Read(dict[str, Any]):
    """A config that remembers which of its fields were read."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.seen: list[str] = []

    def __getitem__(self, name: str) -> Any:
        self.seen.append(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.seen.append(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.append(name)
        return super().get(name, default)


def _method(config: Mapping[str, Any], source: str) -> tuple[type[Adapter], dict[str, Any]]:
    """Returns the method that a config means, and the fields of its spec that the config gives."""
    for name, value in config.items():
        if found := references({name: value}):  # OmegaConf would read the environment for it
            raise CheckpointError(f"{source}: {name}: '{found[0]}' is not a value; write the value itself.")
    bias = config.get("bias", "none")
    if not isinstance(bias, str | None) or not re.fullmatch(r"none|all|\w+_only", bias or "none"):
        raise IncompatibleError(f"bias: must be none, all or lora_only, as in PEFT; got {bias!r}.")
    known = {str(method.peft.peft_type): method for method in METHODS.values() if method.peft.peft_type}
    kind = config["peft_type"]
    if kind is None:
        raise IncompatibleError(
            "peft_type: is empty: the method is not PEFT's, and lora_lab.yaml is missing. Copy it too."
        )
    if kind not in known:
        raise IncompatibleError(f"peft_type: no method here is PEFT's '{kind}'{suggest(str(kind), known)}")
    for method in METHODS.values():
        if method.peft.peft_type != kind:
            continue
        read = _Read(config)
        try:
            own = method.peft.read(read)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            value = f"got {config[read.seen[-1]]!r}" if read.seen[-1] in config else "it is missing"
            raise CheckpointError(
                f"{source}: {read.seen[-1]}: is not what PEFT writes there; {value}."
            ) from error
        if own is None:
            continue
        patterns = {name for name in ("rank_pattern", "alpha_pattern") if name in _fields(method)}
        if method.peft.ranks(dict(config)):
            patterns.add("rank_pattern")
        for name in sorted(config.keys() - {*read.seen} - HARMLESS - patterns):
            if config[name]:
                raise IncompatibleError(
                    f"{name}: {config[name]!r} of the PEFT config has no counterpart in lora_lab."
                )
        return method, own
    raise IncompatibleError(f"peft_type: this kind of PEFT '{kind}' is none of our methods.")


def _fields(method: type[Adapter]) -> set[str]:
    return {field.name for field in fields(method.Spec)}


def _split(name: str, kinds: Collection[str]) -> tuple[str, str, str]:
    """Splits a tensor's name into its module's path and the method's own name; "" where there is none."""
    for kind in kinds:
        if name.endswith(f".{kind}"):
            return name.removesuffix(f".{kind}"), ".", kind
    return "", "", ""


def _sort(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    names: list[str],
    sites: Collection[str],
    source: str,
) -> tuple[list[str], dict[str, str], dict[str, str], dict[str, str]]:
    """Sorts the tensors that belong to no adapter: saved modules, copies of the base, biases and others."""
    saved: list[str] = []
    copies, biases, beside = dict[str, str](), dict[str, str](), dict[str, str]()
    wanted = [str(name) for name in config.get("modules_to_save") or []]
    trains_biases = config.get("bias") not in (None, "none")
    wrapped = [path for path in modules if path and any(path.endswith(name) for name in wanted)]
    inner = next((path for path in wrapped if any(path.startswith(f"{outer}.") for outer in wrapped)), None)
    if inner is not None:
        raise IncompatibleError(
            f"modules_to_save: {wanted} names {inner} and a module around it. PEFT wraps both, computes with "
            "one and may store the other. Make the adapter again without nested names."
        )
    for name in names:
        if any(part in name for part in TWICE):
            continue
        path = name.removeprefix(PREFIX)
        owner, _, kind = path.rpartition(".")
        whole = next(
            (p for p in _prefixes(path) if p in modules and any(p.endswith(w) for w in wanted)), None
        )
        if BASE_COPY in f"{path}." and path.rpartition(BASE_COPY)[0] in sites:
            site, _, kind = path.rpartition(BASE_COPY)
            if kind == "bias" and trains_biases:
                biases[name] = site
            else:
                copies[name] = f"{site}.{kind}"
        elif whole is not None:
            saved.append(whole)
        elif kind == "bias" and trains_biases and owner in modules:
            saved.append(owner)
            tensors = modules[owner].state_dict()
            beside |= {f"{PREFIX}{owner}.{other}": f"{owner}.{other}" for other in tensors if other != "bias"}
        elif _tensor(model, path) is not None:
            copies[name] = path
        else:
            raise CheckpointError(
                f"{source}: the file has '{name}', which this model does not. Load it onto the model that it "
                "was made on."
            )
    return list(dict.fromkeys(saved)), copies, biases, beside


def _prefixes(path: str) -> Iterator[str]:
    """Yields the paths of the modules around a tensor, the outermost first."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        yield ".".join(parts[:count])


def _tensor(model: nn.Module, path: str) -> Tensor | None:
    owner, _, name = path.rpartition(".")
    try:
        return cast(Tensor | None, getattr(model.get_submodule(owner), name))
    except AttributeError:
        return None


def _numbers(config: Mapping[str, Any], method: type[Adapter], places: Mapping[str, str]) -> dict[str, Any]:
    """Returns a spec's patterns with one key for each place, by PEFT's rule: the first key that matches."""
    found: dict[str, Any] = {}
    if method.peft.ranks(dict(config)):
        return {name: {} for name in ("rank_pattern", "alpha_pattern") if name in _fields(method)}
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        pattern = config.get(name) or {}
        if name not in _fields(method):
            continue
        if not isinstance(pattern, Mapping):
            raise ValueError(f"{name}: must hold names and numbers; got {pattern!r}")
        keys = {
            path: next((k for k in pattern if match_regex(rf"(.*\.)?({k})$", theirs, name)), None)
            for path, theirs in places.items()
        }
        found[name] = {f"^{re.escape(path)}": kind(pattern[k]) for path, k in keys.items() if k is not None}
    return found


def _spec(method: type[Adapter], own: Mapping[str, Any], source: str) -> AdapterSpec:
    schema: Any = OmegaConf.structured(method.Spec)
    faults: list[str] = []
    fill(schema, own, source, faults)
    if faults:
        raise CheckpointError("\n".join(faults))
    try:
        return cast(AdapterSpec, OmegaConf.to_object(schema))
    except OmegaConfBaseException as error:
        raise CheckpointError(f"{source}: {error}") from error
