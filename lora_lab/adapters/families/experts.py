"""The low-rank update of experts that lie stacked in the parameters of one module, as in Mixtral or GPT-OSS.

    W_e' = W_e + s B_e A_e      for every expert e of every parameter W (experts, out, in)

    A.<name>   (experts, rank, in)    learned; U(±1/√in) at the start
    B.<name>   (experts, out, rank)   learned; zeros at the start, so W' = W

Modules with `is_transposed` hold W as (experts, in, out); the update is transposed like it. The matrix of a
router (experts, in), which is not in a linear map, is adapted as a stack of one. `exclude` can leave out
single parameters, and patterns can give them another rank, by names like `experts.down_proj`. PEFT calls
these `target_parameters` and wraps the module once for each, the first parameter innermost.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lora_lab.adapters.base import Adapter, PeftLayout
from lora_lab.adapters.families.low_rank import ScaledSpec
from lora_lab.adapters.maps import stacked
from lora_lab.adapters.sites import Site, part_specs
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.kaiming import kaiming_uniform
from lora_lab.linalg.rank import widened
from lora_lab.linalg.updates import Update


class LowRankExperts(Adapter[ScaledSpec]):
    """The adapter of one module of experts."""

    A: nn.ParameterDict
    B: nn.ParameterDict
    peft = PeftLayout("LORA", {})

    def __init__(self, base: nn.Module, spec: ScaledSpec, parts: Mapping[str, ScaledSpec]):
        super().__init__(base)
        self.spec, self.parts = spec, dict(parts)
        self.transposed = bool(getattr(base, "is_transposed", False))
        # Filled one by one in the module's order, since the constructor would sort them.
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, own in parts.items():
            weight = base.get_parameter(name)
            experts, rows, columns = self._sizes(weight)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            drawn = kaiming_uniform(experts * own.rank, columns, dtype=dtype)
            self.A[name] = nn.Parameter(drawn.reshape(experts, own.rank, columns))
            self.B[name] = nn.Parameter(torch.zeros(experts, rows, own.rank, dtype=dtype))

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Modules that hold all experts in one parameter each, and routers."""
        return bool(stacked(module))

    @classmethod
    def at(cls, site: Site, spec: ScaledSpec, *shared: object) -> Adapter:
        """Makes the adapter.

        Raises:
            IncompatibleError: if an option needs the activations, which are not available here.
        """
        if spec.dropout or getattr(spec, "lora_bias", False) or getattr(spec, "init", "default") != "default":
            raise IncompatibleError(
                f"adapter.targets: {site.path} holds experts in one parameter each; LoRA on them has no "
                "dropout, no lora_bias and one start (init: default). Change these, or exclude the experts."
            )
        return super().at(site, spec, part_specs(spec, site))

    def _sizes(self, weight: Tensor) -> tuple[int, int, int]:
        experts, rows, columns = weight.shape if weight.ndim == 3 else (1, *weight.shape)
        return (experts, columns, rows) if self.transposed else (experts, rows, columns)

    @classmethod
    def count(cls, site: Site, spec: ScaledSpec) -> int:
        """Counts rank · (out + in) numbers for every expert of every parameter."""
        shapes = {name: p.shape if p.ndim == 3 else (1, *p.shape) for name, p in stacked(site.module).items()}
        own = part_specs(spec, site)
        return sum(part.rank * shapes[name][0] * sum(shapes[name][1:]) for name, part in own.items())

    @property
    def rank(self) -> int:
        """The largest of the parameters' ranks."""
        return max(part.rank for part in self.parts.values())

    def without_gradient_at_start(self) -> tuple[str, ...]:
        """Returns A, as B is zero."""
        return tuple(f"A.{name}" for name in self.A)

    def loraplus_parameters(self) -> list[nn.Parameter]:
        return list(self.B.values())

    def adapted(self, name: str) -> Float[Tensor, "*experts _ _"]:
        """Returns W' of one parameter, computed in float32 or wider and rounded once."""
        weight = self.base.get_parameter(name)
        left, right = widened(self.B[name]), widened(self.A[name])
        if self.transposed:
            left, right = right.mT, left.mT
        stack = widened(weight if weight.ndim == 3 else weight[None])
        adapted = torch.baddbmm(stack, left, right, alpha=self.parts[name].scale)
        return adapted.reshape(weight.shape).to(weight.dtype)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Runs the experts with W' instead of W; autocast must not narrow the sum."""
        device = next(self.base.parameters()).device
        with torch.autocast(device.type, enabled=False):
            adapted = {name: self.adapted(name) for name in self.A}
        return functional_call(self.base, adapted, arguments, options)

    @torch.no_grad()
    def updates(self, path: str) -> dict[str, Update]:
        """Returns the factors of each parameter, of all its experts."""
        return {
            f"{path}.{name}": Update(widened(self.B[name]) * part.scale, widened(self.A[name]))
            for name, part in self.parts.items()
        }

    @torch.no_grad()
    def merged_module(self) -> nn.Module:
        merged = {name: nn.Parameter(self.adapted(name), requires_grad=False) for name in self.A}
        # Deepcopy uses what its memo holds as the copy: the old experts are not copied.
        return copy.deepcopy(self.base, {id(self.base.get_parameter(name)): p for name, p in merged.items()})

    def _prefixes(self) -> dict[str, str]:
        """Returns what is before the tensors of each parameter in PEFT's files, by its name."""
        names = list(self.A)
        return {name: "base_layer." * (len(names) - 1 - i) for i, name in enumerate(names)}

    def stored_specs(self, path: str) -> dict[str, Any]:
        """Returns the spec of each parameter: PEFT's patterns are matched with the names of those."""
        return {f"{path}.{name}": part for name, part in self.parts.items()}

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
