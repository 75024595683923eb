"""Full fine-tuning, the baseline with which adapters are compared.

    W' = W*        a copy of every module that owns parameters is trained

    trained   the module's own shapes; learned; a copy of the base at the start, so W' = W

The frozen original is kept, so that `remove()` is exact and a run can say what changed. This takes the base's
memory twice; tied parameters stay tied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Union  # noqa: UP035

from torch import nn

from lora_lab.adapters.base import Adapter, PeftLayout
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.adapters.trained import TrainedCopy
from lora_lab.errors import IncompatibleError
from lora_lab.models.quantization import holds_codes


@dataclass
class FullSpec(AdapterSpec):
    """Full fine-tuning has no options of its own; `targets` and `layers` may restrict it."""

    method: str = "full"

    targets: Union[str, list[str]] = "all"  # noqa: UP007
    """Which modules are trained; `all` trains every parameter."""


class Full(TrainedCopy[AdapterSpec]):
    """A trained copy of one module."""

    Spec: ClassVar[type[AdapterSpec]] = FullSpec
    family = "baseline"
    paper = "-"
    peft = PeftLayout(None, tensors={})

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether it owns parameters, or quantised weights, which `build` refuses."""
        return super().accepts(module) or (holds_codes(module) and not any(module.children()))

    @classmethod
    def parameter_count(cls, model: nn.Module, sites: list[Site], spec: AdapterSpec) -> int:
        """Counts tied parameters once."""
        return sum({id(p): p.numel() for site in sites for p in site.module.parameters()}.values())

    @classmethod
    def build(cls, sites: list[Site], spec: AdapterSpec) -> dict[str, Adapter]:
        """Copies the modules; one that owns parameters besides its parts is copied with its parts.

        Raises:
            IncompatibleError: if a module is quantised.
        """
        whole: dict[str, nn.Module] = {}
        copies: dict[int, Any] = {}
        for site in sites:
            if holds_codes(site.module):
                raise IncompatibleError(
                    f"adapter.method: full trains the weights, and {site.path} holds codes, which cannot be "
                    "trained. Set model.quantization to none, narrow adapter.targets, or choose an adapter."
                )
            if not any(site.path.startswith(f"{path}.") for path in whole):
                whole[site.path] = site.module
        return {path: cls(module, copies) for path, module in whole.items()}
