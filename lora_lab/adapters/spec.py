"""The options of adapters: one dataclass per method, all built on those here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import (  # omegaconf reads typing.Union
    Any,
    ClassVar,
    Literal,
    Self,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from lora_lab.errors import IncompatibleError

# Names in other libraries, for the "did you mean" of a config error.
FOREIGN_NAMES = {
    "r": "rank",
    "lora_r": "rank",
    "init_r": "rank",
    "target_r": "target_rank",
    "lora_alpha": "alpha",
    "randlora_alpha": "alpha",
    "lora_dropout": "dropout",
    "vera_dropout": "dropout",
    "randlora_dropout": "dropout",
    "module_dropout": "dropout",
    "clover_dropout": "dropout",
    "up_block_size": "block_size",
    "target_modules": "targets",
    "target_pattern": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "init_lora_weights": "init",
    "init_weights": "init",
    "loraplus_lr_ratio": "optimization.loraplus_ratio",
}


@dataclass
class AdapterSpec:
    """The options of every method: where adapters are placed, and which whole modules are trained as well."""

    method: str = ""
    """Name of the method, a key of METHODS."""

    meaningless: ClassVar[frozenset[str]] = frozenset()
    """Fields of this class that a method cannot use; settings of another method do not carry over to them."""

    names_parts: ClassVar[bool] = False
    """Whether `exclude` and the patterns also name parameters inside a module, `experts.down_proj`."""

    removed_fields: ClassVar[Mapping[str, object]] = {}
    """Fields that a stored spec may still hold, each with the only value that is still supported."""

    targets: Union[str, list[str]] = field(default_factory=lambda: ["query", "value"])  # noqa: UP007
    """Where adapters are placed: roles (`query`), module names or path endings (`q_proj`, `mlp.down_proj`),
    one pattern for whole paths (`regex:.*layers\\.[0-3]\\..*q_proj`), `all-linear` (every linear map except
    heads), or `all` (every module the method can edit)."""

    exclude: list[str] = field(default_factory=list)
    """What to leave out of the targets, named in the same way; a name also leaves out everything inside."""

    layers: list[int] | None = None
    """Indices of the blocks to adapt, counted from 0; null means all."""

    modules_to_save: list[str] | None = None
    """Fully trained modules, stored with the adapters, by path or path ending; null means the model's
    freshly initialised task head, [] means none."""

    @property
    def size_field(self) -> str | None:
        """Name of the field that sets the number of trained parameters, such as `rank`; None if none does."""
        return None

    @classmethod
    def without_removed(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a stored spec without the fields that this method no longer has.

        Args:
            stored: field → value, as a run or an adapter folder holds it.

        Raises:
            IncompatibleError: if one of them has a value that is no longer supported.
        """
        for name, value in cls.removed_fields.items():
            if name in stored and stored[name] != value:
                raise IncompatibleError(
                    f"adapter.{name}: {stored[name]!r} is no longer supported; {cls.method} always works as "
                    f"with {value!r}. Train again without this field, or use the version that wrote it."
                )
        return {name: value for name, value in stored.items() if name not in cls.removed_fields}

    @property
    def reads_full_weights(self) -> bool:
        """Whether the adapters' start needs the full-precision weights of a quantised base."""
        return False

    def for_stored(self) -> Self:
        """Returns the spec for adapters whose tensors a file gives: their start does not matter."""
        return self

    def faults(self) -> list[str]:
        """Returns every fault that shows without a model, as `field: what is wrong, what is allowed`."""
        found = []
        if not self.targets:
            found.append("targets: is empty; name at least one role, module or pattern")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            found.append(f"layers: needs indices >= 0, or null for all layers; got {self.layers}")
        return found + choice_faults(self) + _width_faults(self)

    def for_site(self, values: dict[str, Any]) -> Self:
        """Returns this spec with the values that the `…_pattern` fields give for one site.

        Args:
            values: field name (`rank`) → the value whose key matched the site.
        """
        return replace(self, **values)


@dataclass
class RankedSpec(AdapterSpec):
    """Adds the fields that all methods with rank-one components share."""

    rank: int = 8
    """Number of rank-one components; at least 1."""

    alpha: float = 8.0
    """Strength of the update: it is scaled by alpha / rank."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank for some sites, as in PEFT: role, path ending or regex → rank."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alpha for some sites, as in PEFT: role, path ending or regex → alpha."""

    def faults(self) -> list[str]:
        """Returns the faults of all specs and those of ranks and alphas."""
        found = super().faults()
        for name, rank in self.ranks().items():
            found += least_fault(name, rank, 1)
        for name, alpha in self.alphas().items():
            found += zero_fault(name, alpha)
        return found

    @property
    def size_field(self) -> str | None:
        """The rank."""
        return "rank"

    def ranks(self) -> dict[str, int]:
        """Returns every rank in the spec, by its field."""
        return {"rank": self.rank, **_keyed("rank_pattern", self.rank_pattern)}

    def alphas(self) -> dict[str, float]:
        """Returns every alpha in the spec, by its field."""
        return {"alpha": self.alpha, **_keyed("alpha_pattern", self.alpha_pattern)}


@dataclass
class LowRankSpec(RankedSpec):
    """Adds the dropout of LoRA and its relatives."""

    dropout: float = 0.0
    """Probability of zeroing an input of the adapter's branch while training, in [0, 1), as in LoRA's
    paper."""

    def faults(self) -> list[str]:
        """Returns the faults of all specs and those of ranks, alphas and dropout."""
        return super().faults() + probability_fault("dropout", self.dropout)


def choice_faults(spec: object) -> list[str]:
    """Returns the fault of every field whose value is not one of its choices."""
    return [
        f"{name}: must be one of {', '.join(get_args(hint))}; got {getattr(spec, name)!r}"
        for name, hint in get_type_hints(type(spec)).items()
        if get_origin(hint) is Literal and getattr(spec, name) not in get_args(hint)
    ]


def _width_faults(spec: Any) -> list[str]:
    """Returns the fault of every integer that has more than 63 bits."""
    return [
        f"{item.name}: must be a whole number below 2^63; got one of {abs(value).bit_length()} bits"
        for item in fields(spec)
        if isinstance(value := getattr(spec, item.name), int) and abs(value) >= 2**63
    ]


def least_fault(name: str, value: float, least: float) -> list[str]:
    """Returns the fault of a value below `least`, or nothing."""
    return [] if value >= least else [f"{name}: must be at least {least}; got {value}"]


def zero_fault(name: str, value: float) -> list[str]:
    """Returns the fault of a factor that is zero, infinite or no number, or nothing."""
    return [] if math.isfinite(value) and value else [f"{name}: must be finite and not 0; got {value}"]


def probability_fault(name: str, value: float) -> list[str]:
    """Returns the fault of a probability outside [0, 1), or nothing."""
    return [] if 0 <= value < 1 else [f"{name}: must lie in [0, 1); got {value}"]


def _keyed(name: str, pattern: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in pattern.items()}
