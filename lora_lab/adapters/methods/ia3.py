"""IA3: rescale the outputs or inputs of a frozen map (Liu et al. 2022, arXiv:2205.05638).

W' = diag(l) W,  b' = l ⊙ b      y = l ⊙ base(x)      the output form, on keys and values
W' = W diag(l)                   y = base(l ⊙ x)      the input form, on `feedforward_modules`

l   (out, 1) or (1, in)   learned; ones at the start, so W' = W bitwise
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union  # noqa: UP035  (omegaconf reads typing.Union)

import torch
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, InputAdapter, OutputAdapter, PeftLayout
from lora_lab.adapters.maps import LinearMap, sizes
from lora_lab.adapters.sites import Site, is_named
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.errors import TargetError, suggest
from lora_lab.models.architectures import ROLES


@dataclass
class IA3Spec(AdapterSpec):
    """IA3's options; the paper rescales keys, values and the input of the second feed-forward map."""

    method: str = "ia3"

    targets: Union[str, list[str]] = field(default_factory=lambda: ["key", "value", "down"])  # noqa: UP007

    feedforward_modules: list[str] = field(default_factory=lambda: ["down"])
    """Targets that are rescaled at their input: roles, path endings or `regex:` patterns as in `targets`; all
    others are rescaled at their output."""


def _write_paths(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    paths = [path for path, adapter in adapters.items() if isinstance(adapter, IA3Input)]
    return {"feedforward_modules": paths}


def _read_shapes(sites: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Any]:
    """PEFT rescales inputs if the vector is (1, in), and outputs if it is (out, 1)."""
    return {"feedforward_modules": [path for path, shapes in sites.items() if shapes["ia3_l"][0] == 1]}


def _at_input(site: Site, spec: IA3Spec) -> bool:
    return any(is_named(site, name) for name in spec.feedforward_modules)


class IA3(OutputAdapter[IA3Spec]):
    """The rescaled output of one linear map."""

    Spec = IA3Spec
    family = "activation"
    paper = "Liu et al. 2022, arXiv:2205.05638"
    spared_from_decay = ("l",)
    peft = PeftLayout("IA3", {"ia3_l": "l"}, from_shapes=_read_shapes, site_config=_write_paths)

    def __init__(self, base: LinearMap, spec: IA3Spec):
        super().__init__(base)
        self.l = nn.Parameter(torch.ones(self.out_features, 1, dtype=self.dtype))

    @classmethod
    def build(cls, sites: list[Site], spec: IA3Spec) -> dict[str, Adapter]:
        """Makes the adapters, in the form that `feedforward_modules` chooses.

        Raises:
            TargetError: if a name in `feedforward_modules` is not a role and matches no target.
        """
        for name in spec.feedforward_modules:
            if name not in ROLES and not any(is_named(site, name) for site in sites):
                known = {site.role or site.path.rpartition(".")[2] for site in sites}
                raise TargetError(
                    f"adapter.feedforward_modules: '{name}' matches none of the targets{suggest(name, known)}"
                )
        return {site.path: (IA3Input if _at_input(site, spec) else IA3).at(site, spec) for site in sites}

    @classmethod
    def parameter_count(cls, model: nn.Module, sites: list[Site], spec: IA3Spec) -> int:
        return sum(sizes(site.module)[1 if _at_input(site, spec) else 0] for site in sites)

    def transform_output(self, y: Tensor) -> Tensor:
        return y * self.l.flatten()


class IA3Input(InputAdapter[IA3Spec]):
    """The rescaled input of one linear map."""

    Spec = IA3Spec
    peft = IA3.peft
    spared_from_decay = ("l",)

    def __init__(self, base: LinearMap, spec: IA3Spec):
        super().__init__(base)
        self.l = nn.Parameter(torch.ones(1, self.in_features, dtype=self.dtype))

    def transform_input(self, x: Tensor) -> Tensor:
        return x * self.l.flatten()

    def adapted_weight(self, weight: Tensor) -> Tensor:
        """Returns W diag(l): l scales the columns of W."""
        return weight * self.l
