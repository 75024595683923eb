"""The low-rank update of an embedding (vocabulary, width).

Wᵀ' = Wᵀ + s B A       y = base(t) + s B a_t, with a_t the column of A for token t

A   (rank, vocabulary)   learned; zeros at the start, so W' = W
B   (width, rank)        learned; N(0, 1) at the start
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter, PeftLayout
from lora_lab.adapters.families.low_rank import ScaledSpec, filled, resized
from lora_lab.adapters.protocols import Growable, RankAllocatable, Truncatable
from lora_lab.linalg.rank import product_singular_values, widened
from lora_lab.linalg.updates import Update


class LowRankEmbedding(Adapter[ScaledSpec], RankAllocatable, Growable, Truncatable):
    """The adapter of one embedding: columns of A are looked up, then mapped by B."""

    base: nn.Embedding
    components: dict[str, int] = {"A": 0, "B": 1, "kept": 0}
    peft = PeftLayout("LORA", {"lora_embedding_A": "A", "lora_embedding_B": "B"})

    def __init__(self, base: nn.Embedding, spec: ScaledSpec):
        super().__init__(base)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.spec, self.scale = spec, spec.scale
        self.A = nn.Parameter(torch.zeros(spec.rank, base.num_embeddings, dtype=dtype))
        self.B = nn.Parameter(torch.randn(base.embedding_dim, spec.rank, dtype=dtype))
        self.register_buffer("kept", torch.ones(spec.rank, dtype=torch.bool))
        self.initial_components = spec.rank

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Plain embeddings only: subclasses scale or renormalise what they look up."""
        return type(module) is nn.Embedding and module.max_norm is None

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: ScaledSpec) -> int:
        """Counts A and B, rank · (vocabulary + width) numbers."""
        return spec.rank * sum(module.get_parameter("weight").shape)

    @property
    def rank(self) -> int:
        """The number of components in use."""
        return int(self.components_in_use().sum())

    def delta_weight(self) -> Float[Tensor, "vocabulary width"]:
        """Returns W' − W."""
        return self.scale * (self.B @ self.A).T

    @torch.no_grad()
    def update(self) -> Update:
        """Returns the factors of Wᵀ' − Wᵀ, (width, vocabulary)."""
        return Update(widened(self.B) * self.scale, widened(self.A))

    def singular_values(self) -> Float[Tensor, " k"]:
        return abs(self.scale) * product_singular_values(self.B, self.A)

    @property
    def weight(self) -> Float[Tensor, "vocabulary width"]:
        """W', for models that read it (DeBERTa's `rel_embeddings`); see `LinearAdapter.weight`."""
        return (widened(self.base.weight) + self.delta_weight()).to(self.base.weight.dtype)

    def forward(self, tokens: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens width"]:
        """Looks up base and update; the padding token's column gets no gradient, like the base's row."""
        y: Tensor = self.base(tokens)
        base = self.base
        columns = F.embedding(tokens, self.A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        return (y + F.linear(columns * self.scale, self.B)).to(y.dtype)

    @torch.no_grad()
    def merged_module(self) -> nn.Module:
        base = self.base
        merged: nn.Module = nn.Embedding.from_pretrained(
            self.weight, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq
        )
        return merged.train(base.training)

    def without_gradient_at_start(self) -> tuple[str, ...]:
        """Returns B, as A starts at zero."""
        return ("B",)

    def new_components(self, count: int) -> dict[str, Tensor]:
        """Returns rows of A that are zero, and columns of B as they start."""
        return {"A": torch.zeros(count, self.A.shape[1]), "B": torch.randn(len(self.B), count)}

    @torch.no_grad()
    def keep_components(self, keep: Bool[Tensor, " rank"]) -> None:
        self.kept.copy_(keep)
        self.A.masked_fill_(~keep.unsqueeze(1), 0)

    @torch.no_grad()
    def take_update(self, update: Update) -> None:
        left, right = filled(update.left / self.scale, update.right, len(self.A))
        self.A.copy_(right)
        self.B.copy_(left)
        self.kept.fill_(True)

    def components_in_use(self) -> Bool[Tensor, " rank"]:
        return self.kept | self.A.any(1)

    def held(self) -> Bool[Tensor, " rank"]:
        """Returns flags of the components in files, as `LowRankAdapter.held` does."""
        flags = self.components_in_use()
        flags[:1] |= ~flags.any()
        return flags

    @property
    def stored_spec(self) -> ScaledSpec:
        return resized(self.spec, max(1, int(self.held().sum())))

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns the part of A and B that files hold."""
        held = self.held()
        left, right = filled(self.B[:, held], self.A[held], self.stored_spec.rank)
        return {"lora_embedding_A": right, "lora_embedding_B": left}

    def complete_peft_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Makes as many components as the file has."""
        B = tensors.get("lora_embedding_B")
        if B is not None:
            self.resize_components(B.shape[1] if B.any() else 0)
        return tensors

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.A.copy_(tensors["lora_embedding_A"][: len(self.A)])
        self.B.copy_(tensors["lora_embedding_B"][:, : len(self.A)])
