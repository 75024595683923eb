"""FourierFT: an update with few Fourier coefficients (Gao et al. 2024, arXiv:2405.03003).

    ΔW = scaling · Re(ifft2(F)),   F[r_k, s_k] = c_k, and 0 elsewhere
    y  = base(x) + x ΔWᵀ           by transforms of x; ΔW itself is formed only for merging and for small maps

    c         (n_frequency,)     learned; N(0, 1) at the start as in the paper, where W' is not W, or zeros
    indices   (2, n_frequency)   frozen: r_k and s_k, from `random_loc_seed` and the map's sizes only

The indices equal PEFT's, whose files do not hold them. Entries (r, s) and (−r, −s) of F give the same ΔW.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, AdditiveAdapter, PeftLayout
from lora_lab.adapters.maps import LinearMap
from lora_lab.adapters.sites import Site, match_pattern
from lora_lab.adapters.spec import AdapterSpec, least_fault
from lora_lab.errors import IncompatibleError, TargetError
from lora_lab.linalg.fourier import Scatter, first_of_permutation, fourier_matrix, fourier_product, scatter

SMALL = 2**14
"""Size of a map up to which ΔW itself is cheaper than transforms."""


@dataclass
class FourierFTSpec(AdapterSpec):
    """FourierFT's options; the paper's learning rates are 1e-2 to 3e-1."""

    method: str = "fourierft"

    removed_fields = {"mode": "auto"}

    n_frequency: int = 1000
    """Number of coefficients of each map, at least 1 and at most in · out."""

    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    """Number of coefficients for some sites, as in PEFT: role, path ending or regex → n_frequency."""

    scaling: float = 150.0
    """Factor of ΔW, above 0; the paper: 300 for LLaMA and ViT, 29 to 141 for GLUE."""

    random_loc_seed: int = 777
    """Seed of the indices, at least 0; the run's own seed does not touch them."""

    init: Literal["default", "zeros"] = "default"
    """Start of c: `default` is N(0, 1), as in the paper; `zeros`, PEFT's init_weights, is the identity."""

    @property
    def size_field(self) -> str | None:
        return "n_frequency"

    def faults(self) -> list[str]:
        found = super().faults() + least_fault("n_frequency", self.n_frequency, 1)
        for key, count in self.n_frequency_pattern.items():
            found += least_fault(f"n_frequency_pattern.{key}", count, 1)
        if not 0 < self.scaling < float("inf"):
            found.append(f"scaling: must be finite and above 0; got {self.scaling}")
        return found + least_fault("random_loc_seed", self.random_loc_seed, 0)


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "n_frequency_pattern": config.get("n_frequency_pattern") or {},
        "init": "zeros" if config.get("init_weights") else "default",
    }


def _write_pattern(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    # Whole paths, since PEFT has no roles.
    return {"n_frequency_pattern": {path: len(adapter.c) for path, adapter in adapters.items()}}


def _spec_at(site: Site, spec: FourierFTSpec) -> FourierFTSpec:
    count = match_pattern(spec.n_frequency_pattern, site)
    return spec if count is None else replace(spec, n_frequency=count)


class FourierFT(AdditiveAdapter[FourierFTSpec]):
    """The adapter of one linear map."""

    indices: Tensor
    identity_at_start = False

    Spec = FourierFTSpec
    family = "spectral"
    paper = "Gao et al. 2024, arXiv:2405.03003"
    peft = PeftLayout(
        "FOURIERFT",
        {"fourierft_spectrum": "c"},
        fields={name: name for name in ("n_frequency", "scaling", "random_loc_seed")},
        config=lambda spec: {"init_weights": spec.init == "zeros"},
        spec=_read_config,
        site_config=_write_pattern,
    )

    def __init__(self, base: LinearMap, spec: FourierFTSpec):
        super().__init__(base)
        self.spec = spec
        m, n, count = self.out_features, self.in_features, spec.n_frequency
        if count > m * n:
            raise IncompatibleError(
                f"adapter.n_frequency: must be at most in · out = {m * n} here; got {count}. Lower it, or "
                "use n_frequency_pattern for this module."
            )
        distinct = (m * n + (2 - m % 2) * (2 - n % 2)) // 2  # some entries are their own mirror images
        if count > distinct:
            warnings.warn(
                f"adapter.n_frequency: {count} for a map from {n} to {m}, where entries (r, s) and (−r, −s) "
                f"give the same update: more than {distinct} add nothing.",
                stacklevel=2,
            )
        start = torch.zeros if spec.init == "zeros" else torch.randn
        self.c = nn.Parameter(start(count, dtype=self.dtype))
        flat = first_of_permutation(count, m * n, spec.random_loc_seed)
        self.register_buffer("indices", torch.stack((flat // n, flat % n)))
        self.tensors_changed()

    @classmethod
    def build(cls, sites: list[Site], spec: FourierFTSpec) -> dict[str, Adapter]:
        """Makes the adapters; `n_frequency_pattern` can set the number for each site."""
        for key in spec.n_frequency_pattern:
            if not any(match_pattern({key: True}, site) for site in sites):
                raise TargetError(f"adapter.n_frequency_pattern: '{key}' matches no adapted module.")
        return {site.path: cls.at(site, _spec_at(site, spec)) for site in sites}

    @classmethod
    def parameter_count(cls, model: nn.Module, sites: list[Site], spec: FourierFTSpec) -> int:
        return sum(_spec_at(site, spec).n_frequency for site in sites)

    def tensors_changed(self) -> None:
        """Computes what the two products need from the indices."""
        m, n = self.out_features, self.in_features
        maps = scatter(self.indices, m, n, self.dtype), scatter(self.indices.flip(0), n, m, self.dtype)
        for name, values in zip(("forward", "back"), maps, strict=True):
            for field_name, tensor in values._asdict().items():
                self.register_buffer(f"{name}_{field_name}", tensor, persistent=False)

    def delta_weight(self) -> Float[Tensor, "out in"]:
        return fourier_matrix(self.c * self.spec.scaling, self.indices, self.out_features, self.in_features)

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.out_features * self.in_features <= SMALL or not x.numel():  # transforms need a token
            return super().delta_output(x)
        forward, back = (
            Scatter(*(getattr(self, f"{way}_{name}") for name in Scatter._fields))
            for way in ("forward", "back")
        )
        return fourier_product(x, self.c * self.spec.scaling, forward, back, self.out_features)
