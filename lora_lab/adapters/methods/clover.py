"""CLOVER: train between the orthonormal bases of paired attention maps (Meng et al. 2024, arXiv:2411.17426).

    A Bᵀ = U diag(S) Vᵀ,   A = U M,   B = V N        head by head, the product is never formed
    A'   = U (diag(S) + ΔS) N⁻ᵀ,   B' = B            y = y₀ + drop(y₀ M⁻¹) ΔS N⁻ᵀ,  y₀ = base(x)

    A          (in + 1, d)     [W, b]ᵀ of a head of `value` or `query`, frozen
    B          (·, d)          W of a head of `attention_output`, or [W, b]ᵀ of one of `key`, frozen
    ΔS         (heads, d, d)   learned; zeros at the start, so A' B'ᵀ = A Bᵀ
    M⁻¹, N⁻ᵀ   (heads, d, d)   frozen

The authors' code replaces A and B by U and V: the same function of ΔS, but here B is unchanged.
Heads that share a key or a value are stacked, the rows of one below those of the other, and share one ΔS. A
map without a partner, and a query that a rotation or a norm separates from its key, is decomposed alone, as
in the authors' code: A = Q R by QR and A' = Q (R + ΔS), which is M = R and N = I.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Union, cast  # noqa: UP035  (omegaconf reads typing.Union)

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_lab.adapters.base import Adapter, OutputAdapter, PeftLayout
from lora_lab.adapters.maps import LinearMap, matrix, sizes
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import AdapterSpec, least_fault, probability_fault
from lora_lab.errors import IncompatibleError, TargetError
from lora_lab.linalg.heads import per_head, stack_heads
from lora_lab.linalg.orthogonal import positive_qr
from lora_lab.linalg.spectral import paired_svd
from lora_lab.models.architectures import between_query_and_key, head_width

PARTNERS = {
    "query": "key",
    "value": "attention_output",
    "cross_query": "cross_key",
    "cross_value": "cross_attention_output",
}
"""The role that holds A → the role that holds B."""

TO_OUTPUT = ("value", "cross_value")
"""Roles whose partner reads heads, as columns of its weight; the others' writes them, as rows."""

WORST_CONDITION = 1e5
"""Of M and N; above it their inverses would have less than two digits in float32."""


@dataclass
class CLOVERSpec(AdapterSpec):
    """CLOVER's options; the paper's learning rate is 1e-4."""

    method: str = "clover"

    removed_fields = {"s_mode": "full", "qk_mode": "auto", "form": "additive"}

    targets: Union[str, list[str]] = field(  # noqa: UP007
        default_factory=lambda: ["query", "key", "value", "attention_output"]
    )
    """The maps to decompose. Of a pair [query, key] or [value, attention_output] the first is trained; a map
    without its partner is decomposed alone, head by head, and any other map in blocks of `block_size`. Query
    and key are a pair if only a dot product joins them."""

    rank: int | None = None
    """Train only the block of ΔS for this many of the largest singular values of each head; null means all,
    as in the paper."""

    block_size: int | None = None
    """Width of the blocks of maps other than query, key and value; at least 1, a divisor of its outputs.
    Null means half the width of the model's heads, as in the paper."""

    dropout: float = 0.0
    """Probability of zeroing a number before ΔS while training, in [0, 1); 0.05 in the authors' code."""

    @property
    def size_field(self) -> str | None:
        return "rank"

    def faults(self) -> list[str]:
        found = super().faults() + probability_fault("dropout", self.dropout)
        for name in ("rank", "block_size"):
            value = getattr(self, name)
            found += [] if value is None else least_fault(name, value, 1)
        return found


class CLOVER(OutputAdapter[CLOVERSpec]):
    """One small matrix for each head, on the outputs of the map that holds A.

    Attributes:
        dS: (heads, rank, rank), learned.
        partner: path of the map that holds B; None if there is none.
        M_inverse: (heads, d, rank), frozen, the first columns of M⁻¹.
        N_inverse: (heads, rank, d), frozen, the first rows of N⁻ᵀ.
    """

    dS: nn.Parameter
    M_inverse: Tensor
    N_inverse: Tensor

    Spec = CLOVERSpec
    family = "spectral"
    paper = "Meng et al. 2024, arXiv:2411.17426"
    peft = PeftLayout(
        None, {"clover_dS": "dS", "clover_M_inverse": "M_inverse", "clover_N_inverse": "N_inverse"}
    )

    def __init__(self, base: LinearMap, spec: CLOVERSpec, role: str | None, partner: str | None):
        super().__init__(base)
        self.spec, self.role, self.partner = spec, role, partner
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()

    @property
    def rank(self) -> int:
        return self.dS.shape[1]

    @property
    def dropping(self) -> bool:
        """Whether dropout is at work."""
        return self.training and self.spec.dropout > 0

    def bases(self, path: str, width: int, other: Any) -> tuple[Tensor, Tensor]:
        """Makes ΔS; returns M and N of all heads in float64.

        Args:
            path: path of the map, for messages.
            width: width d of a head; a site alone does not show it.
            other: the map that stands at `partner`, or None.

        Raises:
            IncompatibleError: if maps and heads do not fit.
        """
        rows = _rows(self.base)
        others = None if other is None else matrix(other).T if self.role in TO_OUTPUT else _rows(other)
        counts = [len(part) for part in (rows, others) if part is not None]
        heads = min(counts) // width
        if not heads or any(count % (heads * width) for count in counts):
            raise IncompatibleError(
                f"adapter.targets: {path} has no heads of width {width}, which must divide "
                f"{' and '.join(map(str, counts))}. Take it out, or set block_size for a map without heads."
            )
        A, rank = stack_heads(rows, heads, width), self.spec.rank or width
        if A.shape[1] < width:
            raise IncompatibleError(
                f"adapter.targets: {path} has {A.shape[1]} inputs, fewer than the width {width} of a head. "
                "Take it out, or set a smaller block_size for a map without heads."
            )
        if rank > width:
            raise IncompatibleError(
                f"adapter.rank: a head of {path} has {width} singular values; got {rank}. Lower it."
            )
        self.dS = nn.Parameter(torch.zeros(heads, rank, rank, dtype=self.dtype, device=A.device))
        if others is not None:
            _, M, _, N = paired_svd(A, stack_heads(others, heads, width))
            return M, N
        one = torch.eye(width, dtype=torch.float64, device=A.device).expand(heads, -1, -1)
        if rank == width:
            return positive_qr(A.double())[1], one
        _, M, _, N = paired_svd(A, one)  # the singular values decide which directions to train
        return M, N

    @classmethod
    def build(cls, sites: list[Site], spec: CLOVERSpec) -> dict[str, Adapter]:
        """Makes an adapter for every map except the second of each pair.

        Raises:
            TargetError: if a map holds query, key and value in one, or the output is a target but its values
                are not.
        """
        places = {(_block(site), site.role): site for site in sites}
        found: dict[str, Adapter] = {}
        for site in sites:
            if site.role == "query_key_value":
                raise TargetError(
                    f"adapter.targets: {site.path} holds query, key and value in one map, which clover has "
                    "to split: set model.split_fused to true, then target query, key and value."
                )
            first = next((role for role, second in PARTNERS.items() if second == site.role), None)
            if first is not None and (_block(site), first) in places:
                continue
            if first in TO_OUTPUT:
                raise TargetError(
                    f"adapter.targets: {site.path} is decomposed together with its values; add {first}, or "
                    f"remove {site.role}."
                )
            partner = places.get((_block(site), PARTNERS.get(str(site.role), "")))
            found[site.path] = cls.at(site, spec, site.role, partner and partner.path)
        return found

    @classmethod
    @torch.no_grad()
    def watch(cls, model: nn.Module, adapters: Mapping[str, Adapter]) -> list[RemovableHandle]:
        """Makes ΔS and its bases: the model shows the width of heads and what joins query and key.

        Raises:
            IncompatibleError: if these must not be separated, if no width is known, or by `decompose`.
        """
        for path, width, other in cls._joined(model, adapters):
            cast(CLOVER, adapters[path]).decompose(path, width, other)
        return []

    @classmethod
    def parameter_count(cls, model: nn.Module, sites: list[Site], spec: CLOVERSpec) -> int:
        """Counts with the width of heads and the pairs of maps, which need the model."""
        adapters, count = cls.build(sites, spec), 0
        for path, width, other in cls._joined(model, adapters):
            adapter = cast(CLOVER, adapters[path])
            lengths = [adapter.out_features]
            if other is not None:
                out, inputs = sizes(other)
                lengths.append(inputs if adapter.role in TO_OUTPUT else out)
            rank = spec.rank or width
            count += min(lengths) // width * rank**2
        return count

    @classmethod
    def _joined(cls, model: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[tuple[str, int, Any]]:
        """Yields the arguments of `decompose` for every trained map; separates pairs where it has to."""
        heads = head_width(model)
        for path, adapter in adapters.items():
            assert isinstance(adapter, CLOVER)
            spec, headed = adapter.spec, adapter.role in (*PARTNERS, *PARTNERS.values())
            width = heads if headed else spec.block_size or (heads or 0) // 2
            if not width:
                raise IncompatibleError(
                    f"adapter.block_size: is needed for {path}: the model's config has no width of heads."
                )
            between = None
            if adapter.partner is not None and adapter.role not in TO_OUTPUT:
                between = between_query_and_key(model, path)
            if between:
                adapter.partner = None
            yield path, width, None if adapter.partner is None else model.get_submodule(adapter.partner)

    def decompose(self, path: str, width: int, other: Any) -> None:
        """Makes ΔS and its bases; arguments as for `bases`.

        Raises:
            IncompatibleError: if a head is too close to singular, or by `bases`.
        """
        M, N = self.bases(path, width, other)
        for name, matrices in (("its own map", M), ("its partner", N)):
            condition = torch.linalg.cond(matrices)
            if not (condition <= WORST_CONDITION).all():
                worst = int(condition.nan_to_num(torch.inf).argmax())
                remedy = "it" if matrices is M else PARTNERS[str(self.role)]
                raise IncompatibleError(
                    f"adapter.targets: head {worst} of {path} is too close to singular in {name} (condition "
                    f"{float(condition[worst]):.0e}, at most {WORST_CONDITION:.0e}): remove {remedy} "
                    "from targets, or leave its block out of layers."
                )
        rank = self.rank
        for name, inverse in (
            ("M_inverse", torch.linalg.inv(M)[..., :rank]),
            ("N_inverse", torch.linalg.inv(N).mT[:, :rank]),
        ):
            self.register_buffer(name, inverse.to(self.dtype).contiguous())

    def change(self, y: Float[Tensor, "... out"], drop: bool = False) -> Float[Tensor, "... out"]:
        """Returns drop(y M⁻¹) ΔS N⁻ᵀ."""
        with torch.autocast(y.device.type, enabled=False):
            right = self.dS @ self.N_inverse  # (heads, rank, d)
            if not drop:
                right = self.M_inverse @ right  # (heads, d, d)
        return per_head(self.dropout(per_head(y, self.M_inverse)) if drop else y, right)

    def transform_output(self, y: Tensor) -> Tensor:
        return y + self.change(y)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y = self.base(x)
        return (y + self.change(self.cast(y), drop=self.dropping)).to(y.dtype)


def _block(site: Site) -> str:
    """Returns what the paths of one block's parts have in common."""
    return f".{site.path}".partition(f".{site.layer}.")[0] + f".{site.layer}"


def _rows(base: Any) -> Float[Tensor, "out inputs"]:
    """Returns [W, b], or W without a bias."""
    columns = [matrix(base)] + ([] if base.bias is None else [base.bias.unsqueeze(1)])
    return torch.cat([column.double() for column in columns], dim=1)
