"""What an adapter is: a trainable edit of one module of a frozen model, put in its place.

A method states its mathematics once, as `adapted_weight` or one of its fast forms:

    LinearAdapter       W' = f(W)         y = x f(W)ᵀ + b
    AdditiveAdapter     W' = W + ΔW       y = base(x) + x ΔWᵀ
    InputAdapter        W' = W T          y = base(T x)
    OutputAdapter       W' = S W          y = S base(x),  b' = S b
    HiddenStateAdapter  h' = f(h)         on the output of a whole block

The base is never written to. An adapter's tensors, and those of fully trained modules, are float32 if the
base is in half precision or quantised, else of the base's type. Casting the model keeps this: after
`model.half()` the base is float16 and what is trained is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Generic, Self, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import TypeVar

from lora_lab.adapters.maps import LinearMap, is_convolution, is_linear, matrix, project, with_weight
from lora_lab.adapters.sites import Site, site_spec
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.rank import narrows, singular_values, widened
from lora_lab.linalg.updates import Update

SpecT = TypeVar("SpecT", bound=AdapterSpec, default=Any)
"""The dataclass of a method's options."""


@dataclass(frozen=True)
class PeftLayout:
    """How a method's tensors and options are called in PEFT's two files."""

    peft_type: str | None
    """PEFT's name of the method; None if PEFT has no such method and only lora_lab opens the folder."""

    tensors: Mapping[str, str]
    """PEFT's tensor name → attribute of the adapter; attributes that are None are left out."""

    fields: Mapping[str, str] = field(default_factory=dict)
    """Fields of PEFT's config that hold the same as fields of our spec: its name → ours."""

    config: Callable[[Any], dict[str, Any]] = lambda spec: {}
    """Spec → the method's other fields of `adapter_config.json`."""

    spec: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda config: {}
    """Fields of an `adapter_config.json` of this `peft_type` → the other fields of our spec; None if the
    file means another of our methods (PEFT calls LoRA, DoRA and PiSSA all LORA)."""

    shared: Callable[[Any], Mapping[str, Tensor]] = lambda adapter: {}
    """Any adapter → the tensors that all adapters share, by their names at the root of the file."""

    from_shapes: Callable[[Mapping[str, Mapping[str, tuple[int, ...]]]], dict[str, Any]] = lambda sites: {}
    """Path → name in the file → shape → the fields of our spec that follow from shapes in PEFT's files."""

    ranks: Callable[[dict[str, Any]], Mapping[str, int]] = lambda config: {}
    """An `adapter_config.json` → path → components in the file, for sites with fewer than the rank."""

    site_config: Callable[[Mapping[str, Adapter]], dict[str, Any]] = lambda adapters: {}
    """Adapters by path → fields of `adapter_config.json` that name modules: PEFT knows paths, not roles."""

    def write(self, spec: Any) -> dict[str, Any]:
        """Returns the method's fields of `adapter_config.json`."""
        return {name: getattr(spec, own) for name, own in self.fields.items()} | self.config(spec)

    def read(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Returns our spec's fields for a PEFT config, None if it means another of our methods."""
        others = self.spec(config)
        same = {own: config[name] for name, own in self.fields.items() if name in config}
        return None if others is None else same | others


class Adapter(nn.Module, Generic[SpecT]):
    """A trainable edit of one module of a frozen model; replaces it."""

    Spec: ClassVar[type[AdapterSpec]]
    family: ClassVar[str]
    """Kind of method, for tables: low-rank, orthogonal, activation, hidden state, baseline …"""
    paper: ClassVar[str]
    """Authors, year and arXiv id."""
    mergeable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    spared_from_decay: ClassVar[tuple[str, ...]] = ()
    """Names of the trained tensors for which 0 is not "no change"."""
    trained_faster: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that LoRA+ trains at the larger rate: B, and vectors next to it."""
    reads_prompt_lengths: ClassVar[bool] = False
    """Whether the model must be called with `prompt_lengths` (batch,); `watch` removes them from the call."""
    peft: ClassVar[PeftLayout]

    base: nn.Module
    spec: SpecT = cast(Any, None)
    """The spec that holds at this site; None if no option matters once the adapter is made."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        """Looks up a name in the adapter, then in its base: model code reads attributes (`conv1.stride`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # There is no base to ask before `__init__` has set it; a base's protocols (`__deepcopy__`) are
            # not the adapter's.
            if name.startswith("__") or "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.lender, name)

    @property
    def lender(self) -> nn.Module:
        """The module whose attributes the adapter also shows."""
        return self._modules["base"]  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts as any module does, but never narrows the adapter's own tensors below float32."""
        base = {id(tensor) for tensor in chain(self.base.parameters(), self.base.buffers())}

        def widening(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in base or not narrows(tensor.dtype, moved.dtype):
                return moved
            return tensor.to(moved.device, torch.float32)

        super()._apply(widening, recurse)  # type: ignore[no-untyped-call]
        return self

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether the method can edit this module."""
        raise NotImplementedError

    @classmethod
    def parameter_count(cls, model: nn.Module, sites: list[Site], spec: SpecT) -> int:
        """Returns how many parameters the adapters at these sites train at the start, without making them.

        Args:
            model: the model of the sites, not yet adapted.
            sites: where the adapters would be placed.
            spec: the method's spec, which fits the sites.
        """
        return sum(cls.site_parameter_count(site.module, site_spec(spec, site)) for site in sites)

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: SpecT) -> int:
        """Returns how many parameters the adapter of one module trains: a formula of the spec and its sizes.

        Args:
            module: one that `accepts` allows; `maps.sizes` gives (out, in).
            spec: the spec for this site.
        """
        raise NotImplementedError

    @classmethod
    def build(cls, sites: list[Site], spec: SpecT) -> dict[str, Adapter]:
        """Makes the adapters for these sites, by path; by default one for each, which share nothing.

        Args:
            sites: where the adapters will be placed.
            spec: the method's spec; `site_spec` gives the one that holds at a site.
        """
        return {site.path: cls.at(site, site_spec(spec, site)) for site in sites}

    @classmethod
    def at(cls, site: Site, spec: SpecT, *shared: object) -> Adapter:
        """Constructs the adapter of one site: seeded by the site, then with the base's device and mode."""
        # The constructors of methods also take the spec, and what the adapters share.
        construct: Callable[..., Adapter] = cls
        with site.seeded(), torch.no_grad():
            adapter = construct(site.module, spec, *shared)
        base = set(site.module.modules())
        for part in set(adapter.modules()) - base:
            part.training = site.module.training  # a model in eval mode must not get active dropout
        tensor = next(iter(site.module.parameters()), next(iter(site.module.buffers()), None))
        return adapter if tensor is None else adapter.to(tensor.device)

    @classmethod
    def watch(cls, model: nn.Module, adapters: Mapping[str, Adapter]) -> list[RemovableHandle]:
        """Registers hooks on the whole model, for adapters that need its inputs; most do not.

        Called before the adapters are placed, so that a model can still be refused. `remove` removes the
        hooks too.
        """
        return []

    @property
    def rank(self) -> int | None:
        """The rank now in use; None if the word has no meaning for the method."""
        return getattr(self.spec, "rank", None)

    def singular_values(self) -> Float[Tensor, " k"] | None:
        """Returns the singular values of W' − W in descending order; None if no matrix is edited."""
        return None

    @property
    def rests_by_chance(self) -> bool:
        """Whether random choices of the method may leave a trained tensor without a gradient in a step."""
        return False

    def penalty(self) -> Tensor | float:
        """Returns a term for the training loss, such as an orthogonality penalty; 0 for most methods."""
        return 0.0

    @classmethod
    def total_penalty(cls, adapters: Iterable[Adapter]) -> Tensor | float:
        """Returns the term of all adapters of a model; by default their sum."""
        return sum((adapter.penalty() for adapter in adapters), start=0.0)

    def without_gradient_at_start(self) -> tuple[str, ...]:
        """Names the trained tensors whose gradient is exactly zero before the first step, by the formula.

        LoRA's A, for example, as B is zero. Every other tensor has a gradient from the first step on, unless
        dropout removes the whole update. Names are those of the adapter's own parameters.
        """
        return ()

    def frozen_parts(self) -> list[tuple[nn.Parameter, Bool[Tensor, ...]]]:
        """Returns trained tensors of which the next step must not change a part, with flags of that part.

        A gradient of zero is not enough for this, because of momentum and weight decay. The flags broadcast
        to the tensor's shape. The optimizer's state of these parts does not change either.
        """
        return []

    def update(self) -> Update:
        """Returns W' − W in thin factors, and b' − b.

        Raises:
            IncompatibleError: if it is not a linear map that the adapter edits.
        """
        raise IncompatibleError(
            f"{type(self).__name__} on a {type(self.base).__name__} has no matrix update that factors could "
            "express. Keep the adapter as it is, or merge it."
        )

    def updates(self, path: str) -> dict[str, Update]:
        """Returns `update` by the name of what it changes: this adapter's path, or parameters inside it."""
        return {path: self.update()}

    def merged_module(self) -> nn.Module:
        """Returns a new plain module that computes what base and adapter compute together."""
        raise IncompatibleError(
            f"{self.Spec().method} cannot be merged: it edits hidden states, which no weight of the model "
            "can express. Keep the adapter in place, or choose a method that edits weights."
        )

    def decay_exempt(self) -> list[nn.Parameter]:
        """Returns the trainable tensors for which 0 is not "no change": weight decay must not touch them."""
        return self._parameters_named(self.spared_from_decay)

    def loraplus_parameters(self) -> list[nn.Parameter]:
        """Returns the tensors that LoRA+ trains at the larger rate."""
        return self._parameters_named(self.trained_faster)

    def _parameters_named(self, names: tuple[str, ...]) -> list[nn.Parameter]:
        return [parameter for name in names if (parameter := getattr(self, name)) is not None]

    @classmethod
    def file_names(cls) -> set[str]:
        """Returns every name that a tensor of one adapter may have in a PEFT file."""
        return set(cls.peft.tensors)

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns this adapter's tensors under PEFT's names."""
        named = {name: getattr(self, attribute) for name, attribute in self.peft.tensors.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def stored_spec(self) -> SpecT:
        """The spec of what `peft_tensors` returns: its rank counts what the file holds."""
        return self.spec

    def stored_specs(self, path: str) -> dict[str, Any]:
        """Returns `stored_spec` by the name that PEFT's patterns are matched with: this adapter's path."""
        return {path: self.stored_spec}

    def complete_peft_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a file's tensors for this adapter in the form of `peft_tensors`.

        For methods whose PEFT files leave out what PEFT computes again, or hold more than is needed.
        """
        return tensors

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads tensors by PEFT's names; `storage` has checked them against `peft_tensors`."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                own = getattr(self, self.peft.tensors[name])
                own.copy_(tensor.reshape(own.shape))

    def tensors_changed(self) -> None:
        """Recomputes what the adapter derives from its tensors; called after they were loaded."""

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Returns the adapter's own parameters and persistent buffers by name, the base's excluded."""
        state = self.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if not name.startswith("base.")}


class LinearAdapter(Adapter[SpecT]):
    """Edits a linear map. `adapted_weight` defines the method; everything else follows from it.

    A convolution is also such a map, see `maps`: then `in` is the size of a patch, `out` the number of
    channels.
    """

    base: LinearMap
    convolves: ClassVar[bool] = False
    """Whether the method's own forms use `maps.project` and `maps.mix`, which convolutions need."""

    def __init__(self, base: LinearMap):
        super().__init__(base)
        self.out_features, self.in_features = matrix(base).shape
        self.dtype: torch.dtype = torch.promote_types(base.weight.dtype, torch.float32)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether it is a linear map, or a convolution if the method supports them."""
        return is_linear(module) or (cls.convolves and is_convolution(module))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Applies a cast or move; the type in which the adapter computes follows its base."""
        super()._apply(fn, recurse)
        self.dtype = torch.promote_types(self.base.weight.dtype, torch.float32)
        return self

    # Some models read the weight of a map without calling it (Mamba's `dt_proj`), or only ask for its type
    # (T5's `wo.weight.dtype`): they see what the merged map would have.
    @property
    def weight(self) -> Tensor:
        """W', in the shape and type of the base's weight; the gradient reaches the adapter through it."""
        own: Tensor = self.base.weight
        return self.adapted_weight(widened(matrix(self.base))).reshape(own.shape).to(own.dtype)

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        """b', in the type of the base's bias."""
        own: Tensor | None = self.base.bias
        adapted = self.adapted_bias(None if own is None else widened(own))
        return adapted if adapted is None else adapted.to((self.base.weight if own is None else own).dtype)

    def adapted_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Returns W' from W: the method's definition, with which tests compare every faster form."""
        raise NotImplementedError

    def adapted_bias(self, bias: Float[Tensor, " out"] | None) -> Float[Tensor, " out"] | None:
        """Returns b' from b."""
        return bias

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """Returns W' − W, in float32 or wider."""
        weight = widened(matrix(self.base))
        return self.adapted_weight(weight) - weight

    @torch.no_grad()
    def update(self) -> Update:
        """Returns the update, decomposed by the singular values of W' − W."""
        return Update.of_matrix(self.delta_weight(), self._bias_shift())

    def _bias_shift(self) -> Float[Tensor, " out"] | None:
        own: Tensor | None = self.base.bias
        adapted = self.adapted_bias(None if own is None else widened(own))
        if adapted is None or own is None:
            return adapted
        shift = adapted - widened(own)
        return shift if shift.any() else None

    def singular_values(self) -> Float[Tensor, " k"]:
        """Returns the singular values of W' − W in descending order."""
        return singular_values(self.delta_weight())

    def cast(self, x: Tensor) -> Tensor:
        """Casts an activation to the adapter's type, unless autocast chooses the types."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.dtype)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Applies the adapted map; the slow form, for methods that have no better one."""
        weight, bias = widened(matrix(self.base)), self.base.bias
        bias = self.adapted_bias(None if bias is None else widened(bias))
        return project(self.base, self.cast(x), self.adapted_weight(weight), bias).to(x.dtype)

    @torch.no_grad()
    def merged_module(self) -> nn.Module:
        """Returns the merged map, computed in float32 or wider and rounded once."""
        base = self.base
        weight = self.adapted_weight(widened(matrix(base)))
        bias = self.adapted_bias(None if base.bias is None else widened(base.bias))
        return with_weight(base, weight, bias)


class AdditiveAdapter(LinearAdapter[SpecT]):
    """W' = W + ΔW, so y = base(x) + x ΔWᵀ."""

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """Returns ΔW."""
        raise NotImplementedError

    def adapted_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Returns W + ΔW."""
        return weight + self.delta_weight()

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Returns x ΔWᵀ; low-rank methods never form ΔW for it."""
        return project(self.base, x, self.delta_weight())

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Applies base and update side by side."""
        y = self.base(x)
        return (y + self.delta_output(self.cast(x))).to(y.dtype)


class InputAdapter(LinearAdapter[SpecT]):
    """W' = W T, so y = base(T x)."""

    def transform_input(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... in"]:
        """Returns T x for every row of x."""
        raise NotImplementedError

    def adapted_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Returns W T, with the columns of T from the identity's rows."""
        identity = torch.eye(self.in_features, dtype=weight.dtype, device=weight.device)
        return weight @ self.transform_input(identity).T

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Transforms the input, then applies the base."""
        return self.base(self.transform_input(self.cast(x)).to(x.dtype))


class OutputAdapter(LinearAdapter[SpecT]):
    """W' = S W and b' = S b, so y = S base(x)."""

    def transform_output(self, y: Float[Tensor, "... out"]) -> Float[Tensor, "... out"]:
        """Returns S y for every row of y."""
        raise NotImplementedError

    def adapted_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Returns S W: S acts on the columns of W."""
        return self.transform_output(weight.T).T

    def adapted_bias(self, bias: Float[Tensor, " out"] | None) -> Float[Tensor, " out"] | None:
        """Returns S b: the base's output, to which S is applied, includes its bias."""
        return None if bias is None else self.transform_output(bias)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Applies the base, then transforms its output."""
        y = self.base(x)
        return self.transform_output(self.cast(y)).to(y.dtype)


class HiddenStateAdapter(Adapter[SpecT]):
    """h' = f(h) on a block's output. No change of weights, so never mergeable."""

    mergeable = False

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether the module is a block (it has submodules)."""
        return any(True for _ in module.children())

    def transform_hidden(
        self, hidden: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time width"]:
        """Returns the edited hidden states."""
        raise NotImplementedError

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Runs the block as its model calls it and edits its hidden states, the first of its outputs."""
        output = self.base(*arguments, **options)
        if isinstance(output, tuple):
            return (self.transform_hidden(output[0]), *output[1:])
        return self.transform_hidden(output)
