"""Several stored adapters over one base in memory, chosen by name while the model is used.

    named = load_adapter(model, "a/adapter", name="a")
    load_adapter(model, "b/adapter", name="b")
    named.use("a")                       one for all rows
    named.use({"a": 0.7, "b": 0.3})      a sum:  y = base(x) + Σ w (adapter(x) − base(x))
    named.use(["a", None, "b"])          one for each row of the batch; None is the base
    named.use(None)                      the base alone, bitwise
    named.remove("a")

At each place stands one `Switch`, which holds the base's module and the adapters by name. An adapter of any
method gets the rows that are its own and computes as if it were alone. Choosing moves and copies nothing.

For methods with an update of a matrix the sum is that of the updates; hidden states are shifted by the sum of
the shifts. Fully trained modules (task heads) mix likewise; where the weights do not add up to 1, the rest is
the base's own head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from inspect import signature
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from lora_lab.adapters.base import Adapter, HiddenStateAdapter
from lora_lab.adapters.families.positions import PLAIN, Positions
from lora_lab.adapters.injection import AdapterSet, place_modules
from lora_lab.errors import ConfigError, IncompatibleError, suggest
from lora_lab.linalg.rank import widened
from lora_lab.models.attention import SplitMultiheadAttention
from lora_lab.tasks import name_classes

Choice = str | Mapping[str, float] | Sequence[str | None] | None

OWNER = "named_adapters"
"""Attribute of a model that holds named adapters."""
TIME_FIRST = ("fsmt", "led", "longformer", "xlnet")
"""Model types of transformers whose maps get (time, batch, …)."""
KNOWN = {
    *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
"""Model types whose other maps get (batch, …). In text models this was tried with as many rows as tokens."""


class _Use:
    """What is chosen now, and the present batch; shared by all switches of a model."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self.names: list[str | None] | None = None
        self.generating = False
        self.repeated = 1
        """Rows of the model's input for each name: beams of a generation."""
        self.time: int | None = None
        self.known = False
        """Whether the model is of a known type."""

    def rows_of(self, path: str, x: Tensor) -> dict[str | None, Int[Tensor, " rows"]]:
        """Returns which rows of a map's input belong to which name.

        Raises:
            IncompatibleError: if the input is not made of the batch's rows.
        """
        assert self.names is not None
        batch = len(self.names) * self.repeated
        tokens = x.ndim == 2 and self.time is not None and len(x) == batch * self.time
        if len(x) != batch and not tokens:
            raise IncompatibleError(
                f"{path}: got {len(x)} rows for a batch of {batch}, so that it cannot be told which adapter "
                "each is for. Use one adapter at a time in this model, or leave the module out of targets."
            )
        if not self.known and x.ndim > 2 and x.shape[1] == batch:
            raise IncompatibleError(
                f"{path}: got {tuple(x.shape)} for a batch of {batch}, and it is not known which of the "
                "equal axes is the batch in a model of this type. Pad the batch to another length, or use "
                "one adapter at a time."
            )
        each = len(x) // len(self.names)
        found: dict[str | None, list[int]] = {}
        for number, name in enumerate(self.names):
            found.setdefault(name, []).extend(range(number * each, (number + 1) * each))
        return {name: torch.tensor(rows, device=x.device) for name, rows in found.items()}


class Switch(nn.Module):
    """Stands in a module's place and lets the chosen adapters of that place compute."""

    def __init__(self, path: str, base: nn.Module, use: _Use):
        super().__init__()
        self.path, self.use = path, use
        self.base = base
        self.adapters = nn.ModuleDict()
        self.read = False
        """Whether the weight was read, and nothing called since, while rows have adapters of their own."""

    def __getattr__(self, name: str) -> Any:
        """Looks a name up here, then in the one adapter in use, or the base."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            parts = self.__dict__.get("_modules", {})
            if name.startswith("__") or "base" not in parts:
                raise
            if name == "weight":
                self.read = self.use.names is not None
                if len(self.use.weights) > 1 or set(self.use.weights.values()) - {1.0}:
                    return self._mixed_weight()
            return getattr(self._only() or parts["base"], name)

    def _only(self) -> Adapter | None:
        """Returns the adapter that alone is in use here."""
        here = [name for name in self.use.weights if name in self.adapters]
        alone = self.use.names is None and len(here) == 1 and self.use.weights[here[0]] == 1
        return cast(Adapter, self.adapters[here[0]]) if alone else None

    def _mixed_weight(self) -> Tensor:
        own = cast(Tensor, self.base.weight)
        shifts = [
            weight * (widened(cast(Tensor, self.adapters[name].weight)) - widened(own))
            for name, weight in self.use.weights.items()
            if name in self.adapters
        ]
        return sum(shifts, start=widened(own)).to(own.dtype)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Computes as the choice says."""
        self.read = False
        if self.use.names is not None:
            return self._by_rows(arguments, options)
        here = {name: weight for name, weight in self.use.weights.items() if name in self.adapters}
        if not here:
            return self.base(*arguments, **options)
        if (alone := self._only()) is not None:
            return alone(*arguments, **options)
        output = self.base(*arguments, **options)
        hidden, rest = _first(output)
        mixed = widened(hidden)
        for name, weight in here.items():
            other = self._with(name, hidden, arguments, options)
            mixed = mixed + weight * (widened(other) - widened(hidden))
        return _joined(mixed.to(hidden.dtype), rest)

    def _with(self, name: str, hidden: Tensor | None, arguments: Any, options: Any) -> Tensor:
        """Returns what an adapter makes of the base's output, or of its inputs."""
        adapter = self.adapters[name]
        if isinstance(adapter, HiddenStateAdapter):
            return adapter.transform_hidden(cast(Tensor, hidden))
        found, _ = _first(adapter(*arguments, **options))
        return found

    def _by_rows(self, arguments: Any, options: Any) -> Any:
        given = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        rows = self.use.rows_of(self.path, given[0])
        own = {name: index for name, index in rows.items() if name and name in self.adapters}
        if not own:
            return self.base(*arguments, **options)
        edits = {name for name in own if isinstance(self.adapters[name], HiddenStateAdapter)}
        others = own.keys() - edits
        if others:
            self._check_rows_part((*arguments, *options.values()))
        hidden, rest = None, None
        if edits or len(own) < len(rows):
            hidden, rest = _first(self.base(*arguments, **options))
        parts = []
        for name, index in rows.items():
            if name not in own:
                parts.append(cast(Tensor, hidden)[index])
                continue
            adapter = self.adapters[name]
            positions = getattr(adapter, "positions", None)
            with positions.of_rows(index) if isinstance(positions, Positions) else nullcontext():
                if name in edits:
                    parts.append(self._with(name, cast(Tensor, hidden)[index], (), {}))
                else:
                    taken = [_rows(value, index, len(given[0])) for value in arguments]
                    named = {key: _rows(value, index, len(given[0])) for key, value in options.items()}
                    parts.append(self._with(name, None, taken, named))
        order = torch.cat(list(rows.values())).argsort()
        return _joined(torch.cat(parts)[order], rest)

    def _check_rows_part(self, values: Sequence[Any]) -> None:
        """Raises for an argument that belongs to the whole batch and cannot be parted, a cache say."""
        for value in values:
            if not isinstance(value, PLAIN) and not (
                isinstance(value, tuple) and all(isinstance(part, PLAIN) for part in value)
            ):
                raise IncompatibleError(
                    f"{self.path}: is called with a {type(value).__name__}, which cannot be parted by rows. "
                    "Use one adapter at a time here."
                )


def _first(output: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    """Returns the first of a module's outputs, and the others; None where it is the only one."""
    return (output[0], output[1:]) if isinstance(output, tuple) else (output, None)


def _joined(first: Tensor, rest: tuple[Any, ...] | None) -> Any:
    return first if rest is None else (first, *rest)


def _rows(value: Any, index: Tensor, count: int) -> Any:
    """Returns some rows of an argument that has as many as the first; others are for all rows."""
    if isinstance(value, tuple):
        return tuple(_rows(part, index, count) for part in value)
    return value[index] if isinstance(value, Tensor) and value.ndim and len(value) == count else value


def _inputs(given: Mapping[str, Any]) -> Tensor | None:
    """Returns the tensor of a call that has a row for each of the batch."""
    names = ("inputs", "input_ids", "inputs_embeds", *given)
    return next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)


class NamedAdapters:
    """The adapters that a model holds by name."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._sets: dict[str, AdapterSet] = {}
        self._switches: dict[str, Switch] = {}
        self._classes: dict[str | None, Sequence[str]] = {}
        config = getattr(model, "config", None)
        self._base_classes = {
            field: getattr(config, field) for field in ("id2label", "label2id") if hasattr(config, field)
        }
        self._use = _Use()
        self._use.known = getattr(config, "model_type", None) in KNOWN
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._names = list(signature(model.forward).parameters)
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        object.__setattr__(model, OWNER, self)
        if callable(getattr(model, "generate", None)):
            model.__dict__["generate"] = self._generate

    @classmethod
    def of(cls, model: nn.Module) -> NamedAdapters:
        """Returns those of a model; a model that holds none gets an empty set of them."""
        found = model.__dict__.get(OWNER)
        return found if isinstance(found, cls) else cls(model)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def __getitem__(self, name: str) -> AdapterSet:
        """Returns the adapters of a name, to save them or to read their tensors; `remove` takes them out.

        Raises:
            ConfigError: if there are none.
        """
        if name not in self._sets:
            raise ConfigError(f"no adapter is called {name!r} in this model{suggest(name, self._sets)}")
        return self._sets[name]

    def check_name(self, name: str) -> None:
        """Checks a new name.

        Raises:
            ConfigError: if it is taken, or no name.
        """
        if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
            raise ConfigError(
                f"name: needs letters, digits, _ or -, and must be no word of torch's; got {name!r}"
            )
        if name in self._sets:
            raise ConfigError(
                f"name: an adapter is called {name!r} already; remove it first, or choose another"
            )

    @contextmanager
    def base_in_place(self) -> Iterator[None]:
        """Puts the base's own modules into the model inside the context."""
        self._put({path: switch.base for path, switch in self._switches.items()}, inwards=True)
        try:
            yield
        finally:
            self._put(self._switches, inwards=False)
            if not self._sets:
                self._leave()

    def take(self, name: str, adapters: AdapterSet, classes: Sequence[str] = ()) -> None:
        """Holds adapters that stand in the model under a name; called inside `base_in_place`.

        Args:
            name: a new name.
            adapters: those in the model.
            classes: names of their classifier's classes in the order of its outputs.
        """
        adapters.leave_place()
        adapters.held = name
        self._sets[name], self._classes[name] = adapters, classes
        for path, adapter in adapters._all.items():
            if path not in self._switches:
                self._switches[path] = Switch(path, adapter.base, self._use).train(adapter.training)
            self._switches[path].adapters[name] = adapter

    def use(self, choice: Choice) -> None:
        """Chooses what the model computes with from now on.

        The model's config names the classes of what is chosen, or the base's if they differ or are unknown.

        Args:
            choice: one name; names with weights, for a sum; a name or None for each row of the batch; or
                None, the base. In `model.generate` these are the rows of the prompts: each one's beams and
                returned sequences have its adapter.

        Raises:
            ConfigError: if a name is unknown, or a weight is not finite.
            IncompatibleError: if rows of this model cannot be told apart.
        """
        weights: dict[str, float] = {}
        names: list[str | None] | None = None
        if isinstance(choice, str):
            weights = {choice: 1.0}
        elif isinstance(choice, Mapping):
            weights = {name: float(weight) for name, weight in choice.items()}
        elif choice is not None:
            names = list(choice)
            if not names:
                raise ConfigError("use: a list names an adapter, or None, for each row; this one is empty")
        for name in {*weights, *(name for name in names or () if name is not None)}:
            self[name]
        if not all(torch.isfinite(torch.tensor(weight)) for weight in weights.values()):
            raise ConfigError(f"use: weights must be finite; got {weights}")
        if names is not None:
            self._check_rows({name for name in names if name is not None})
        self._use.weights, self._use.names = weights, names
        self._use.repeated, self._use.time = 1, None
        self._name_classes()

    @contextmanager
    def using(self, choice: Choice) -> Iterator[nn.Module]:
        """Chooses inside the context, see `use`; the former choice is back after it."""
        before = self._use.weights, self._use.names
        self.use(choice)
        try:
            yield self.model
        finally:
            self._use.weights, self._use.names = before
            self._name_classes()

    def remove(self, name: str) -> None:
        """Takes an adapter out of the model and of memory; with the last one, every trace of all of them.

        Raises:
            ConfigError: if there is none of this name, or it is in use for rows or in a sum.
        """
        self[name]
        if self._use.weights.keys() - {name} and name in self._use.weights or name in (self._use.names or ()):
            raise ConfigError(f"remove: {name!r} is in use beside others; choose without it first")
        self._use.weights.pop(name, None)
        self._name_classes()
        with self.base_in_place():
            adapters = self._sets.pop(name)
            adapters.held = None
            del self._classes[name]
            for path in adapters._all:
                del self._switches[path].adapters[name]
                if not self._switches[path].adapters:
                    del self._switches[path]

    def _name_classes(self) -> None:
        config: Any = getattr(self.model, "config", None)
        for field, value in self._base_classes.items():
            setattr(config, field, value)
        found = {tuple(self._classes.get(n, ())) for n in (*self._use.weights, *(self._use.names or ()))}
        if len(found) == 1:
            name_classes(config, found.pop())

    def _put(self, modules: Mapping[str, nn.Module], inwards: bool) -> None:
        """Puts modules in their places; of modules in one another the inner ones first, or the outer ones."""
        for depth in sorted({path.count(".") for path in modules}, reverse=not inwards):
            place_modules(self.model, {p: module for p, module in modules.items() if p.count(".") == depth})

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, True))
        del self.model.__dict__[OWNER]
        self.model.__dict__.pop("generate", None)

    def _check_rows(self, names: set[str]) -> None:
        """Raises for a model in which rows of the batch cannot be followed."""
        config: Any = getattr(self.model, "config", None)
        getter = getattr(self.model, "get_input_embeddings", None)
        first = None
        with suppress(NotImplementedError):  # Canine has several
            first = getter() if callable(getter) else None
        reason = None
        if getattr(config, "model_type", None) in TIME_FIRST:
            reason = f"{config.model_type} has the batch on its second axis"
        if any(isinstance(module, SplitMultiheadAttention) for module in self.model.modules()):
            reason = "nn.MultiheadAttention has the batch on its second axis"
        for path, switch in self._switches.items():
            if not names & set(switch.adapters):
                continue
            if isinstance(switch.base, nn.Embedding) and switch not in (first,):
                reason = f"{path} is looked up for the whole batch at once"
            if re.search(r"experts\.\d+\b", path):
                reason = f"{path} gets some tokens of some rows"
        if reason is not None:
            raise IncompatibleError(
                f"use: rows cannot have adapters of their own here: {reason}. Use one adapter at a time."
            )

    def _before(
        self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Reads the batch of a call; takes `prompt_lengths` out of it where an adapter reads them."""
        use = self._use
        given = {**dict(zip(self._names, arguments, strict=False)), **keywords}
        if use.names is not None and (inputs := _inputs(given)) is not None:
            if not use.generating or len(inputs) % len(use.names):
                self._check_batch(len(inputs))
            use.repeated = len(inputs) // len(use.names)
            use.time = inputs.shape[1] if inputs.ndim in (2, 3) else None
        chosen = {*use.weights, *(name for name in use.names or () if name)}
        readers = {
            id(adapter.positions): adapter.positions
            for name in chosen
            for adapter in self._sets[name]
            if isinstance(getattr(adapter, "positions", None), Positions)
        }
        for positions in readers.values():
            positions._read(model, arguments, keywords)
        if any(adapter.reads_prompt_lengths for own in self._sets.values() for adapter in own):
            keywords = {name: value for name, value in keywords.items() if name != "prompt_lengths"}
        return arguments, keywords

    def _check_batch(self, rows: int) -> None:
        names = self._use.names
        if names is not None and rows != len(names):
            raise IncompatibleError(
                f"use: {len(names)} rows were given a name, and the batch has {rows}. Name each row."
            )

    def _generate(self, *arguments: Any, **keywords: Any) -> Any:
        """Stands for the model's `generate`: in it alone, rows may be the beams of a prompt."""
        given = {**dict(zip(["inputs"], arguments, strict=False)), **keywords}
        if (inputs := _inputs(given)) is not None:
            self._check_batch(len(inputs))
        self._use.generating, self._use.repeated = True, 1
        try:
            return cast(Any, type(self.model)).generate(self.model, *arguments, **keywords)
        finally:
            self._use.generating, self._use.repeated = False, 1

    def _after(self, model: nn.Module, arguments: object, output: object) -> None:
        for path, switch in self._switches.items() if self._use.names is not None else ():
            if switch.read:
                switch.read = False
                raise IncompatibleError(
                    f"{path}: this model reads the weight and does not call the module, so that all rows "
                    "have the same. Use one adapter at a time."
                )
