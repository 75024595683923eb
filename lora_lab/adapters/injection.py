"""Putting adapters into a model, and `AdapterSet`, through which callbacks, storage and reports use them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_lab.adapters.base import Adapter
from lora_lab.adapters.liveness import Liveness, conclude, listed, unwatch, watch
from lora_lab.adapters.maps import is_linear
from lora_lab.adapters.methods import METHODS
from lora_lab.adapters.protocols import Growable, Prunable, Shareable
from lora_lab.adapters.sites import Site, find_sites, saved_modules, site_seed
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.adapters.trained import TrainedCopy
from lora_lab.errors import CheckpointError, ConfigError, IncompatibleError, LabError, TargetError, suggest
from lora_lab.linalg.lazy import LazyTensor
from lora_lab.linalg.norms import nonfinite
from lora_lab.linalg.rank import narrows
from lora_lab.models.quantization import QuantizedLinear

P = TypeVar("P")

USUAL_NAMES = ("head", "heads", "fc", "output", "out", "logits", "decoder")
"""Names of the last map in models that are not from transformers."""

OWNERS = "owners"
"""Name of the tensor in a state that holds, for each adapter, the number of the adapter whose tensors it
uses."""


def inject(model: nn.Module, spec: AdapterSpec, seed: int = 0) -> AdapterSet:
    """Freezes a model and puts the spec's adapters on its targets.

    Everything is found and built before anything is placed: after an error the model is unchanged.

    Args:
        model: any module; for models of transformers, targets can also be roles.
        spec: the method's spec, `LoRASpec(rank=4)`.
        seed: seed of the adapters' random start; each site derives its own from it.

    Returns:
        The set of adapters now in the model.

    Raises:
        ConfigError: if the spec is invalid.
        TargetError: if the targets do not fit the model.
        IncompatibleError: if the model holds adapters already.
    """
    return place(model, spec, seed)


def place(model: nn.Module, spec: AdapterSpec, seed: int = 0, untied: bool = False) -> AdapterSet:
    """Does what `inject` does; with `untied`, fully trained modules no longer share parameters."""
    method = _method_of(spec)
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            raise IncompatibleError(
                f"the model holds adapters already ({path}: {type(module).__name__}); call remove() or "
                "merge() of their AdapterSet, or named.remove(name), before you inject others."
            )
    sites = _sites(model, spec, method, seed)
    adapters = method.build(sites, spec)
    copies: dict[int, Any] = {}
    heads = {
        path: TrainedCopy(model.get_submodule(path), {} if untied else copies)
        for path in saved_modules(model, spec)
    }
    hooks = method.watch(model, adapters)
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    adapter_set = AdapterSet(model, spec, adapters, heads, requires_grad, hooks)
    _warn_of_second_names(model, adapter_set._all)
    _warn_of_frozen_head(model, spec, adapter_set._all)
    _warn_of_experts(model, spec, adapter_set._all)
    adapter_set._place(adapter_set._all)
    watch(adapter_set, Liveness(model, adapter_set.adapters, adapter_set.saved))
    return adapter_set


def parameter_count(model: nn.Module, spec: AdapterSpec) -> int:
    """Returns how many parameters the method of a spec would train on a model, task heads aside.

    A formula of the method gives it, before any adapter is made. `spec.size_field` names the field that
    changes the count, not always monotonically.

    Args:
        model: the model, not yet adapted.
        spec: the method's spec.

    Raises:
        ConfigError: if the spec is invalid.
        TargetError: if the targets do not fit the model.
    """
    method = _method_of(spec)
    return method.parameter_count(model, _sites(model, spec, method, seed=0), spec)


def parameter_counts(
    model: nn.Module, spec: AdapterSpec, field: str, values: Iterable[int]
) -> dict[int, int]:
    """Returns `parameter_count` for each value of one field; values that do not fit are left out.

    Args:
        model: the model, not yet adapted.
        spec: the method's spec, valid.
        field: the field to change, for example `spec.size_field`.
        values: its values.

    Raises:
        ConfigError: if the spec is invalid.
        TargetError: if the targets do not fit the model.
    """
    method = _method_of(spec)
    sites = _sites(model, spec, method, seed=0)
    counts = {}
    for value in values:
        change: Any = {field: value}
        changed = replace(spec, **change)
        with suppress(LabError, ValueError, ZeroDivisionError):
            if not changed.faults():
                counts[value] = method.parameter_count(model, sites, changed)
    return counts


def _method_of(spec: AdapterSpec) -> type[Adapter]:
    """Returns the method of a spec that is valid."""
    if spec.method not in METHODS:
        raise ConfigError(f"adapter.method: no method '{spec.method}'{suggest(spec.method, METHODS)}")
    faults = spec.faults()
    if faults:
        raise ConfigError("\n".join(f"adapter.{fault}" for fault in faults))
    return METHODS[spec.method]


def _sites(model: nn.Module, spec: AdapterSpec, method: type[Adapter], seed: int) -> list[Site]:
    return find_sites(model, spec, method.accepts, seed) if spec.targets else []


def _warn_of_second_names(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Warns of modules that the model has under several names: one adapter works at all of them."""
    first = {id(model.get_submodule(path)): path for path in adapters}
    for path, module in model.named_modules(remove_duplicate=False):
        if first.get(id(module), path) != path:
            warnings.warn(
                f"{first[id(module)]} is also {path}: a module under two names has one adapter, which files "
                "hold under the first name. PEFT adapts it only there and computes something else.",
                stacklevel=3,
            )


def _warn_of_frozen_head(model: nn.Module, spec: AdapterSpec, adapters: Mapping[str, Adapter]) -> None:
    """Warns where a model that is not from transformers may end in a new head, which would stay frozen."""
    if hasattr(model, "config") or spec.modules_to_save is not None:
        return
    children = [
        (name, child) for name, child in model.named_children() if any(True for _ in child.parameters())
    ]
    last = children[-1][0] if children else ""
    for name, child in children:
        reached = any(path == name or path.startswith(f"{name}.") for path in adapters)
        maps = [module for module in child.modules() if is_linear(module)]
        if (name == last or name in USUAL_NAMES) and maps and not reached:
            warnings.warn(
                f"{name}, a {type(child).__name__} of {maps[-1].out_features} outputs, stays frozen. If it "
                f"is a new head, train it: adapter.modules_to_save: [{name}]; if not, say so with [].",
                stacklevel=3,
            )


def _warn_of_experts(model: nn.Module, spec: AdapterSpec, adapters: Mapping[str, Adapter]) -> None:
    """Warns if targets like `all-linear` leave out experts stacked in one parameter."""
    if not {"all", "all-linear"} & {*([spec.targets] if isinstance(spec.targets, str) else spec.targets)}:
        return
    stacked = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and not isinstance(module := model.get_submodule(name.rpartition(".")[0]), nn.Conv1d)
        and not any(name.startswith(f"{path}.") for path in adapters)
        and not isinstance(module, Adapter)
        and min(parameter.shape) > 1
    }
    if stacked:
        share = sum(p.numel() for p in stacked.values()) / sum(p.numel() for p in model.parameters())
        # One line for the experts of all layers: "model.layers.*.mlp.experts.down_proj".
        kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in stacked)
        modules = {name.rpartition(".")[0] for name in stacked}
        ends = sorted({module.rpartition(".")[2] for module in modules})
        able = [
            name
            for name in (spec.method, "lora")
            if all(METHODS[name].accepts(model.get_submodule(module)) for module in modules)
        ]
        way = "No method adapts these"
        if able:
            way = f"{spec.method} cannot adapt these; lora can"
        if spec.method in able:
            way = f"Add {', '.join(ends)} to targets"
        warnings.warn(
            f"adapter.targets: {spec.targets} leaves {share:.0%} of the model's weights without an adapter: "
            f"{', '.join(kinds)} hold all experts in one parameter each, not in linear maps. {way}.",
            stacklevel=3,
        )


def _refuse_to_save(*_: object, **__: object) -> None:
    """Replaces `save_pretrained` while adapters are in a model.

    Raises:
        IncompatibleError: always.
    """
    raise IncompatibleError(
        "save_pretrained: the model holds adapters, and what it would write is neither the base nor the "
        "adapted model. Call save_adapter(adapters, folder) to store the adapters; to store a whole model, "
        "call it inside `with adapters.merged() as model:`, or after adapters.merge()."
    )


class AdapterSet:
    """The adapters of one model. Iterating gives them in the model's order.

    Attributes:
        model: the adapted model.
        spec: the spec they were made from.
        adapters: the method's adapters, by path of the module that each replaces.
        saved: the fully trained modules next to them (task heads), by path.
        owners: path of each adapter that uses another's tensors → the other's path; see `share`.
        lineage: where loaded adapters come from, see `lineage`; {} for fresh ones.
        held: the name under which the model holds them beside others, see `switching`; None in general.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: AdapterSpec,
        adapters: Mapping[str, Adapter],
        saved: Mapping[str, TrainedCopy],
        requires_grad: Mapping[str, bool],
        hooks: Sequence[RemovableHandle] = (),
    ):
        self.model = model
        self.spec = spec
        self.adapters = dict(adapters)
        self.saved = dict(saved)
        self.owners: dict[str, str] = {}
        self.lineage: dict[str, Any] = {}
        self.held: str | None = None
        self._requires_grad = dict(requires_grad)
        self._hooks = list(hooks)
        self._all: dict[str, Adapter] = {**self.adapters, **self.saved}

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self.adapters.values())

    def __len__(self) -> int:
        return len(self.adapters)

    def items(self) -> Iterator[tuple[str, Adapter]]:
        """Iterates over (path, adapter)."""
        return iter(self.adapters.items())

    def everything(self) -> Iterator[Adapter]:
        """Iterates over the adapters and the fully trained modules."""
        return iter(self._all.values())

    def implementing(self, protocol: type[P]) -> dict[str, P]:
        """Returns the adapters that offer a protocol of `adapters.protocols`, by path."""
        return {path: adapter for path, adapter in self.adapters.items() if isinstance(adapter, protocol)}

    # Tensors ------------------------------------------------------------------------------------------

    def named_tensors(self) -> dict[str, Tensor]:
        """Returns parameters and persistent buffers of adapters and saved modules, shared ones once.

        They do not include the base's tensors. Names are paths in the adapted model.
        """
        found, seen = {}, set()
        for path, adapter in self._all.items():
            for name, tensor in adapter.adapter_tensors().items():
                borrowed = path in self.owners and isinstance(tensor, nn.Parameter)
                if id(tensor) not in seen and not borrowed:
                    seen.add(id(tensor))
                    found[f"{path}.{name}"] = tensor
        return found

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the trainable tensors, by path in the adapted model; shared ones once."""
        return {
            name: tensor
            for name, tensor in self.named_tensors().items()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        }

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the trainable tensors, each once."""
        return list(self.named_parameters().values())

    def without_gradient_at_start(self) -> set[str]:
        """Returns the names in `named_parameters` of tensors without a gradient before the first step.

        This holds for new adapters, not for trained or loaded ones.
        """
        return {
            f"{path}.{name}"
            for path, adapter in self._all.items()
            for name in adapter.without_gradient_at_start()
        }

    def trainable_count(self, saved: bool = True) -> int:
        """Returns how many parameters are trained; without `saved`, those of the method alone."""
        heads = tuple(f"{path}.trained." for path in self.saved)
        return sum(
            p.numel() for name, p in self.named_parameters().items() if saved or not name.startswith(heads)
        )

    def base_count(self) -> int:
        """Returns the number of parameters without adapters, shared ones once; codes count as weights."""
        own = {id(tensor) for tensor in self.named_tensors().values()}
        plain = sum(p.numel() for p in self.model.parameters() if id(p) not in own)
        return plain + sum(m.numel() for m in self.model.modules() if isinstance(m, QuantizedLinear))

    def share(self, path: str, owner: str) -> None:
        """Makes an adapter use the trained tensors of another, from now on and after saving and loading.

        Args:
            path: the adapter that gives up its own tensors.
            owner: the one whose tensors it uses; it must not share another's itself.

        Raises:
            IncompatibleError: if the method or the shapes do not allow it.
        """
        sharer, other = self.adapters[path], self.adapters[owner]
        if (
            not isinstance(sharer, Shareable)
            or not isinstance(other, Shareable)
            or sharer.share_key() is None
            or sharer.share_key() != other.share_key()
        ):
            raise IncompatibleError(
                f"{path} cannot share the adapter of {owner}: shapes, scale or method differ, or its start "
                "depends on its own base. Share only between adapters of one shape."
            )
        sharer.share(other)
        self.owners[path] = owner

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """Resets trained tensors to the start that `inject` gives; what is shared or dropped stays so.

        Each is built again at its own site, so this is for methods like LoRA, whose adapters share nothing at
        the start.

        Args:
            seed: seed of the random start, as for `inject`.
        """
        for path in self.adapters.keys() - self.owners.keys():
            adapter = self.adapters[path]
            site = Site(path, adapter.base, seed=site_seed(seed, path))
            fresh = type(adapter).build([site], adapter.spec)[path]
            for name, tensor in fresh.named_parameters(recurse=False):
                getattr(adapter, name).copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `named_tensors` detached: everything that training changes, nothing of the base.

        If adapters share tensors, OWNERS has for each the number of the one whose tensors it uses.
        """
        state = {name: tensor.detach() for name, tensor in self.named_tensors().items()}
        if self.owners:
            paths = list(self.adapters)
            state[OWNERS] = torch.tensor([paths.index(self.owners.get(path, path)) for path in paths])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads a `state_dict` of a set made from the same spec on the same model.

        Adapters then have as many components and share the same tensors as those of the state. This replaces
        tensors, so build the optimizer afterwards.

        Raises:
            CheckpointError: if names, shapes or dtypes differ; no number is changed then.
        """
        given = dict(state)
        owners = self._owners_in(given)
        expected = self.named_tensors()
        for path in owners.keys() - self.owners.keys():
            for name, _ in self.adapters[path].named_parameters(recurse=False):
                expected.pop(f"{path}.{name}")
        counts = {}
        prunable = self.implementing(Prunable)
        for path, adapter in prunable.items():
            kept = given.get(f"{path}.kept")
            fits = kept is not None and len(kept) <= adapter.initial_components
            if kept is not None and (fits or isinstance(adapter, Growable)):
                counts[path] = len(kept)
                for name, shape in adapter.component_shapes(len(kept)).items():
                    if (tensor := expected.get(f"{path}.{name}")) is not None:
                        expected[f"{path}.{name}"] = tensor.new_empty(shape)
        load_tensors(expected, given, "the checkpoint", write=False)
        for path, owner in owners.items():
            self.share(path, owner)
        for path, count in counts.items():
            prunable[path].resize_components(count)
        load_tensors(self.named_tensors(), given, "the checkpoint")
        for loaded in self.everything():
            loaded.tensors_changed()

    def _owners_in(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Removes OWNERS from a state and returns its contents."""
        paths = list(self.adapters)
        numbers = state.pop(OWNERS, torch.arange(len(paths))).tolist()
        if len(numbers) != len(paths) or not all(0 <= number < len(paths) for number in numbers):
            raise CheckpointError(
                f"the checkpoint is of {len(numbers)} adapters, this model has {len(paths)}. It belongs to "
                "another model or spec: use the config it was made with."
            )
        owners = [paths[number] for number in numbers]
        return {path: owner for path, owner in zip(paths, owners, strict=True) if path != owner}

    def penalty(self) -> Tensor | float:
        """Returns the adapters' term of the training loss."""
        return METHODS[self.spec.method].total_penalty(self)

    # Merging and removing -----------------------------------------------------------------------------

    def merge(self) -> nn.Module:
        """Replaces the adapters by plain modules with the merged weights, permanently.

        Returns:
            The model, with nothing of lora_lab left in it.

        Raises:
            IncompatibleError: if the method cannot be merged, a number of an adapter or of a merged weight is
                not finite, or the adapters are held by name; the model is unchanged then.
        """
        self._place(self._merged_modules())
        self._leave()
        return self.model

    def merge_lazily(self, dtype: torch.dtype | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
        """Takes the adapters out of the model and returns what merging changes, computed when it is used.

        Args:
            dtype: the type of the merged tensors, to which they are rounded once; None keeps the base's.

        Returns:
            The base, and name in its state dict → merged tensor. A lazy one raises IncompatibleError if a
            number of it is not finite; fully trained modules are in memory.

        Raises:
            IncompatibleError: if the method cannot be merged, a number of it is not finite, or the adapters
                are held by name; the model is unchanged then.
        """
        self._check_mergeable()
        paths: dict[int, list[str]] = {}
        base = self.remove()
        for path, module in base.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), []).append(path)
        changed: dict[str, Tensor] = {}
        merged = _MergedTensors(dtype)
        for adapter in self.everything():
            for path in paths[id(adapter.base)]:
                changed |= {f"{path}.{name}": tensor for name, tensor in merged.of(path, adapter).items()}
        return base, changed

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """Merges inside the context. Leaving it puts the adapters back, without any rounding.

        Raises:
            IncompatibleError: as `merge`.
        """
        plain = self._merged_modules()
        self._place(plain)
        try:
            yield self.model
        finally:
            self._place(self._all)

    def remove(self) -> nn.Module:
        """Puts the base's own modules back, bitwise as they were, and unfreezes what was trainable before.

        Raises:
            IncompatibleError: if the adapters are held by name; the model is unchanged then.
        """
        self._check_not_held()
        self._place({path: adapter.base for path, adapter in self._all.items()})
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, True))
        self._leave()
        return self.model

    def check_alive(self) -> None:
        """Checks by the gradients of the optimizer's steps so far that every adapter learns.

        Every step is checked automatically; call this after a training of few steps.

        Raises:
            TargetError: if an adapter had no gradient; see `liveness`.
        """
        conclude(self)

    def check_reached(self, output: Tensor) -> None:
        """Makes sure that what the model computed in training depends on something that is trained.

        Raises:
            TargetError: if there is nothing to differentiate.
        """
        if not output.requires_grad:
            raise TargetError(
                f"adapter.targets: the model's output has no gradient for {listed(self.adapters)}: either it "
                "calls none of them, or it goes on without gradients where its embeddings are frozen, as "
                "Reformer does. Choose targets that reach its output, such as 'all'."
            )

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        unwatch(self)

    def _check_not_held(self) -> None:
        if self.held is not None:
            raise IncompatibleError(
                f"the model holds these adapters by name, beside others. named.remove({self.held!r}) takes "
                "them out of it; to merge them, load their folder without a name: load_adapter(model, folder)"
            )

    def _check_mergeable(self) -> None:
        self._check_not_held()
        if not self._in_place():
            raise IncompatibleError("the adapters are not in the model (merged or removed already).")
        for adapter in self.everything():
            if not adapter.mergeable:
                adapter.merged_module()  # says why
        _check_finite(self.state_dict())

    def _merged_modules(self) -> dict[str, nn.Module]:
        self._check_mergeable()
        plain = {path: adapter.merged_module() for path, adapter in self._all.items()}
        for path, module in plain.items():
            _check_finite({f"{path}.{name}": tensor for name, tensor in module.named_parameters()})
        return plain

    def nonfinite(self) -> list[str]:
        """Returns the names in `state_dict` of the tensors that have a number which is not finite."""
        return nonfinite(self.state_dict())

    def _in_place(self) -> bool:
        modules = {id(module) for module in self.model.modules()}
        return all(id(adapter) in modules for adapter in self._all.values())

    def _place(self, modules: Mapping[str, nn.Module]) -> None:
        place_modules(self.model, modules)

    def leave_place(self) -> None:
        """Puts the base's modules back and forgets the model; the adapters may then stand elsewhere in it."""
        self._place({path: adapter.base for path, adapter in self._all.items()})
        self._leave()


def place_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts modules at their paths, and at every other path under which the same module is reached.

    transformers' models write themselves only while no adapter is in them.
    """
    replacement = {id(model.get_submodule(path)): module for path, module in modules.items()}
    inside = {id(part) for module in modules.values() for part in module.modules()}
    for parent in list(model.modules()):
        if id(parent) in inside:
            continue
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in replacement:
                parent._modules[name] = replacement[id(child)]
    holders = [m for m in model.modules() if callable(getattr(type(m), "save_pretrained", None))]
    for holder in holders:
        if any(isinstance(part, Adapter) for part in holder.modules()):
            holder.__dict__["save_pretrained"] = _refuse_to_save
        elif holder.__dict__.get("save_pretrained") is _refuse_to_save:
            del holder.__dict__["save_pretrained"]


class _MergedTensors:
    """Merged tensors of adapters, of which the last adapter's are kept: several come out of one merge."""

    def __init__(self, dtype: torch.dtype | None):
        self.dtype = dtype
        self._last: tuple[str, dict[str, Tensor]] = "", {}

    def of(self, path: str, adapter: Adapter) -> Mapping[str, Tensor]:
        """Returns an adapter's tensors by name, lazy except for a fully trained module."""
        if isinstance(adapter, TrainedCopy):
            return self._merge(path, adapter)
        base: Any = adapter.base
        if isinstance(base, QuantizedLinear):
            shapes = {"weight": torch.Size((base.out_features, base.in_features))}
        else:
            shapes = {name: tensor.shape for name, tensor in base.state_dict().items()}
        if getattr(adapter, "bias", None) is not None:
            shapes["bias"] = cast(Tensor, adapter.bias).shape
        own = base.dtype if isinstance(base, QuantizedLinear) else next(base.parameters()).dtype
        return {
            name: LazyTensor.of(partial(self._tensor, path, adapter, name), shape, self.dtype or own)
            for name, shape in shapes.items()
        }

    def _tensor(self, path: str, adapter: Adapter, name: str) -> Tensor:
        if self._last[0] != path:
            self._last = "", {}  # not both at once
            self._last = path, self._merge(path, adapter)
        return self._last[1][name]

    @torch.no_grad()
    def _merge(self, path: str, adapter: Adapter) -> dict[str, Tensor]:
        weight = getattr(adapter.base, "weight", None)
        if self.dtype is not None and weight is not None and narrows(torch.float32, weight.dtype):
            adapter = copy.deepcopy(adapter).float()  # merged in the base's type, it would be rounded twice
        found = dict(adapter.merged_module().state_dict())
        _check_finite({f"{path}.{name}": tensor for name, tensor in found.items()})
        if self.dtype is None:
            return found
        return {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in found.items()}


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises for a number of an adapter, or a merged one, that is not finite."""
    if found := nonfinite(tensors):
        raise IncompatibleError(
            f"{found[0]}: an adapter's or a merged number is not finite; the adapter's training has "
            "diverged. Nothing was merged: train again with a smaller learning rate, or load an earlier "
            "checkpoint."
        )


def load_tensors(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str, write: bool = True
) -> None:
    """Copies tensors into those of the same names and shapes, all of them or none.

    Args:
        own: the tensors to write.
        given: the tensors to read.
        what: the source, for messages.
        write: whether to copy after checking.

    Raises:
        CheckpointError: if names, shapes or dtypes differ.
    """
    faults = [f"has no '{name}'" for name in own.keys() - given.keys()]
    faults += [f"has '{name}', which this model does not" for name in given.keys() - own.keys()]
    for name in own.keys() & given.keys():
        if own[name].shape != given[name].shape:
            shapes = f"{tuple(given[name].shape)}, not {tuple(own[name].shape)}"
            faults.append(f"has '{name}' of shape {shapes}")
        elif own[name].is_floating_point() != given[name].is_floating_point():
            faults.append(f"has '{name}' of type {given[name].dtype}, not {own[name].dtype}")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise CheckpointError(
            f"{what} {'; it '.join(sorted(faults)[:3])}{more}. It belongs to another model, method or spec: "
            "use the config it was made with."
        )
    if write:
        with torch.no_grad():
            for name, tensor in given.items():
                own[name].copy_(tensor)
