"""The low-rank update of experts that lie stacked in the parameters of one module, as in Mixtral or GPT-OSS.

    W_e' = W_e + s B_e A_e      for every expert e of every parameter W (experts, out, in)

    A.<name>   (experts, rank, in)    learned; U(±1/√in) at the start
    B.<name>   (experts, out, rank)   learned; zeros at the start, hence W' = W

Modules with `is_transposed` hold W as (experts, in, out); the update is transposed like it. PEFT calls these
`target_parameters` and wraps the module once for each, the first parameter innermost.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lora_lab.adapters.base import Adapter, PeftLayout
from lora_lab.adapters.families.low_rank import ScaledSpec
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.kaiming import kaiming_uniform
from lora_lab.linalg.rank import widened


def stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters (experts, …, …) of a module of experts, by name; none of any other module."""
    if not (hasattr(module, "num_experts") or re.search("Expert", type(module).__name__)):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if p.ndim == 3 and len(p) > 1 and p.is_floating_point()}


class LowRankExperts(Adapter):
    """The adapter of one module of experts."""

    base: Any
    A: Any
    B: Any
    peft = PeftLayout("LORA", {})

    def __init__(self, base: nn.Module, spec: ScaledSpec):
        super().__init__(base)
        self.spec, self.scale = spec, spec.scale
        self.transposed = bool(getattr(base, "is_transposed", False))
        # Filled one by one, in the module's own order: the constructor would sort them.
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in stacked(base).items():
            experts, rows, columns = self._sizes(weight)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            drawn = kaiming_uniform(experts * spec.rank, columns, dtype=dtype)
            self.A[name] = nn.Parameter(drawn.reshape(experts, spec.rank, columns))
            self.B[name] = nn.Parameter(torch.zeros(experts, rows, spec.rank, dtype=dtype))

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Modules that hold all experts in one parameter each."""
        return bool(stacked(module))

    @classmethod
    def at(cls, site: Any, spec: Any, *shared: Any) -> Adapter:
        """Makes the adapter.

        Raises:
            IncompatibleError: if an option has no meaning where no activation is seen.
        """
        if spec.dropout or getattr(spec, "lora_bias", False) or getattr(spec, "init", "default") != "default":
            raise IncompatibleError(
                f"adapter.targets: {site.path} holds experts in one parameter each; LoRA on them has no "
                "dropout, no lora_bias and one start (init: default). Change these, or exclude the experts."
            )
        return super().at(site, spec)

    def _sizes(self, weight: Tensor) -> tuple[int, int, int]:
        experts, rows, columns = weight.shape
        return (experts, columns, rows) if self.transposed else (experts, rows, columns)

    @classmethod
    def site_parameter_count(cls, module: Any, spec: Any) -> int:
        """Counts rank · (out + in) numbers for every expert."""
        return sum(spec.rank * len(p) * sum(p.shape[1:]) for p in stacked(module).values())

    def without_gradient_at_start(self) -> tuple[str, ...]:
        """Returns A, as B is zero."""
        return tuple(f"A.{name}" for name in self.A)

    def loraplus_parameters(self) -> list[nn.Parameter]:
        return list(self.B.values())

    def adapted(self, name: str) -> Float[Tensor, "experts _ _"]:
        """Returns W' of one parameter, computed in float32 or wider and rounded once."""
        weight = self.base.get_parameter(name)
        left, right = widened(self.B[name]), widened(self.A[name])
        if self.transposed:
            left, right = right.mT, left.mT
        return torch.baddbmm(widened(weight), left, right, alpha=self.scale).to(weight.dtype)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Runs the experts with W' in W's place; autocast must not narrow the sum."""
        device = next(self.base.parameters()).device
        with torch.autocast(device.type, enabled=False):
            adapted = {name: self.adapted(name) for name in self.A}
        return functional_call(self.base, adapted, arguments, options)

    @torch.no_grad()
    def merged_module(self) -> nn.Module:
        merged = {name: nn.Parameter(self.adapted(name), requires_grad=False) for name in self.A}
        # Deepcopy takes what its memo holds for a copy: the old experts are not copied.
        return copy.deepcopy(self.base, {id(self.base.get_parameter(name)): p for name, p in merged.items()})

    def _prefixes(self) -> dict[str, str]:
        """Returns what stands before the tensors of each parameter in PEFT's files, by its name."""
        names = list(self.A)
        return {name: "base_layer." * (len(names) - 1 - i) for i, name in enumerate(names)}

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns (experts · rank, in) and (out, rank · experts), experts innermost."""
        tensors = {}
        for name, prefix in self._prefixes().items():
            tensors[f"{prefix}lora_A.weight"] = self.A[name].flatten(0, 1)
            tensors[f"{prefix}lora_B.weight"] = self.B[name].permute(1, 2, 0).flatten(1)
        return tensors

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, prefix in self._prefixes().items():
            A, B = self.A[name], self.B[name]
            A.copy_(tensors[f"{prefix}lora_A.weight"].reshape(A.shape))
            experts, rows, rank = B.shape
            stored = tensors[f"{prefix}lora_B.weight"].reshape(rows, rank, experts)
            B.copy_(stored.permute(2, 0, 1))


def target_parameters(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Returns PEFT's fields that name parameters, and the modules that are left for `target_modules`."""
    named = [
        f"{path}.{name}"
        for path, adapter in adapters.items()
        if isinstance(adapter, LowRankExperts)
        for name in adapter.A
    ]
    if not named:
        return {}
    others = [path for path, adapter in adapters.items() if not isinstance(adapter, LowRankExperts)]
    return {"target_modules": others, "target_parameters": named}
