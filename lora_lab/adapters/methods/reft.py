"""ReFT: edit hidden states inside a small learned subspace (Wu et al. 2024, arXiv:2404.03592).

On the output h of a block, at some positions of the prompt, with a function a:

    loreft    h' = h + R (a(W h + b) − Rᵀh)     noreft    the same with a free R
    direft    h' = h + R a(W h + b)             nodireft  the same with a free R (the paper's DiReFT)
    consreft  h' = h + R (b − Rᵀh)              lobireft  h' = h + R b

    original  (width, rank)  learned; R is `original`, with its columns orthonormalised unless it is free
    W         (rank, width)  learned; U(±1/√width) at the start
    b         (rank,)        learned; U(±1/√width) at the start, in consreft and lobireft U(0, 1)

The authors' start is intentionally not the identity. `init: identity` starts loreft and noreft with W = Rᵀ
and b = 0, the others with W = 0 and b = 0, so h' = h; consreft has no such start.

Positions count from the first token that is not padding. The prompt is the whole row, or its first
`prompt_lengths` (batch,) tokens if the model is called with that keyword, which is not passed on to it. While
a key-value cache holds the prompt nothing is edited, since the prompt was edited when it was read.

`positions` other than `all` are refused in encoder-decoders and on images, and in generation without a cache,
with a prompt read in chunks, with draft tokens, or with a static cache and padding. Not covered: attention
masks with holes. If a checkpointed function contains the adapter itself (those of transformers contain only
the block), its backward has to come before the model's next forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Union, cast  # noqa: UP035  (omegaconf reads typing.Union)

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_lab.adapters.base import Adapter, HiddenStateAdapter, PeftLayout
from lora_lab.adapters.families.positions import Positions, read_counts
from lora_lab.adapters.maps import LinearMap, is_linear
from lora_lab.adapters.sites import Site
from lora_lab.adapters.spec import AdapterSpec, least_fault, probability_fault
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.kaiming import kaiming_uniform
from lora_lab.linalg.orthogonal import orthonormal_columns

ORTHONORMAL = ("loreft", "direft", "consreft", "lobireft")
SOURCED = ("loreft", "noreft", "direft", "nodireft")
REPLACING = ("loreft", "noreft", "consreft")


@dataclass
class ReFTSpec(AdapterSpec):
    """ReFT's options; the paper edits f1+l1 to f7+l7 on all or some layers, with rank 1 to 8."""

    method: str = "reft"

    removed_fields = {"dropout_on": "output", "add_bias": False}

    targets: Union[str, list[str]] = "block"  # noqa: UP007
    """Modules that return hidden states: blocks, by role, name or pattern."""

    intervention: Literal["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft"] = "loreft"
    """Which variant of the paper."""

    rank: int = 8
    """Dimension of the edited subspace, in [1, width]; pyreft's low_rank_dimension."""

    positions: str = "f1+l1"
    """The prompt's first and last tokens to edit: `f2`, `l3` or `f2+l3`; of N tokens at most the first ⌊N/2⌋
    and the last ⌈N/2⌉. `all` edits every token, generated ones too."""

    share_weights: bool = False
    """One edit for first and last tokens (tied weights in the paper) instead of one for each."""

    init: Literal["reference", "identity"] = "reference"
    """Start: random as in the authors' code, or h' = h."""

    act_fn: Literal["none", "relu", "gelu", "silu", "tanh"] = "none"
    """The function a on W h + b, as in the authors' code."""

    dropout: float = 0.0
    """Probability of zeroing a number of an edited state while training, in [0, 1), as in the
    authors' code."""

    @property
    def size_field(self) -> str | None:
        return "rank"

    def faults(self) -> list[str]:
        found = super().faults() + least_fault("rank", self.rank, 1)
        if self.positions != "all" and not read_counts(self.positions):
            found.append(f"positions: must be 'all', or like 'f1', 'l1', 'f1+l1'; got '{self.positions}'")
        if self.act_fn != "none" and self.intervention not in SOURCED:
            found.append(f"act_fn: {self.intervention} has no W h + b to apply it to; remove it")
        if self.init == "identity" and self.intervention == "consreft":
            found.append("init: consreft replaces Rᵀh by a constant, so h' is never h; use reference")
        elif self.init == "identity" and self.intervention in REPLACING and self.act_fn != "none":
            found.append(f"init: {self.intervention} with an act_fn cannot start at h' = h; use reference")
        elif self.init == "identity" and self.act_fn == "relu":
            found.append(
                "init: identity starts at W h + b = 0, where relu has no gradient, so nothing would learn; "
                "use reference, or another act_fn"
            )
        return found + probability_fault("dropout", self.dropout)


class Edit(nn.Module):
    """The edit of hidden states at some positions."""

    def __init__(self, width: int, spec: ReFTSpec, dtype: torch.dtype):
        super().__init__()
        self.spec = spec
        sourced, replacing = spec.intervention in SOURCED, spec.intervention in REPLACING
        R = kaiming_uniform(spec.rank, width, dtype=dtype).T
        if spec.intervention in ORTHONORMAL:
            R = orthonormal_columns(torch.randn(width, spec.rank, dtype=dtype))
        W = kaiming_uniform(spec.rank, width, dtype=dtype)
        b = torch.rand(spec.rank, dtype=dtype)
        if sourced:
            b = (2 * b - 1) / width**0.5
        if spec.init == "identity":
            W = R.T.clone() if replacing else torch.zeros_like(W)
            b = torch.zeros_like(b)
        self.original = nn.Parameter(R.contiguous())  # (width, rank)
        self.W = nn.Parameter(W.contiguous()) if sourced else None  # (rank, width)
        self.b = nn.Parameter(b)  # (rank,)

    @property
    def R(self) -> Float[Tensor, "width rank"]:
        """The basis of the edited subspace."""
        return orthonormal_columns(self.original) if self.spec.intervention in ORTHONORMAL else self.original

    def forward(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """Returns h' − h, in the type of the parameters."""
        spec = self.spec
        with torch.autocast(hidden.device.type, enabled=False):
            h, R = hidden.to(self.original.dtype), self.R
            target = self.b.expand(*h.shape[:-1], -1) if self.W is None else F.linear(h, self.W, self.b)
            if spec.act_fn != "none":
                target = getattr(F, spec.act_fn)(target)
            if spec.intervention in REPLACING:
                target = target - h @ R
            delta = target @ R.T
            if self.training and spec.dropout:
                delta = F.dropout(h + delta, spec.dropout) - h  # on the whole h', as in the authors' code
            return delta


def entry_of(block: nn.Module, rank: int) -> LinearMap:
    """Returns a block's first linear map, whose inputs are as wide as the hidden states.

    Raises:
        IncompatibleError: if there is none, or it has fewer inputs than the rank.
    """
    entry = next((part for part in block.modules() if is_linear(part)), None)
    if entry is None or rank > entry.in_features:
        raise IncompatibleError(
            f"adapter.rank: reft edits blocks beginning with a linear map of {rank} inputs or more; "
            f"{type(block).__name__} begins with {entry}. Lower the rank or choose other targets."
        )
    return entry


def edit_names(spec: ReFTSpec) -> list[str]:
    """Returns the names of a block's edits: of first tokens (f), of last tokens (l), or one for all (t)."""
    counts = read_counts(spec.positions)
    return ["t"] if spec.share_weights or not counts else list(counts)


class ReFT(HiddenStateAdapter[ReFTSpec]):
    """The edits of one block's output: of first tokens (f), of last tokens (l), or one for all (t)."""

    Spec = ReFTSpec
    family = "hidden state"
    paper = "Wu et al. 2024, arXiv:2404.03592"
    identity_at_start = False
    reads_prompt_lengths = True
    edits: Mapping[str, Edit]
    peft = PeftLayout(None, tensors={})

    def __init__(self, base: nn.Module, spec: ReFTSpec, positions: Positions):
        super().__init__(base)
        self.spec = spec
        self.positions = positions
        entry = entry_of(base, spec.rank)
        self.width = entry.in_features
        dtype = torch.promote_types(entry.weight.dtype, torch.float32)
        edits = {name: Edit(self.width, spec, dtype) for name in edit_names(spec)}
        self.edits = cast(Mapping[str, Edit], nn.ModuleDict(edits))

    @classmethod
    def site_parameter_count(cls, module: nn.Module, spec: ReFTSpec) -> int:
        width, rank = entry_of(module, spec.rank).in_features, spec.rank
        edit = (2 if spec.intervention in SOURCED else 1) * width * rank + rank
        return len(edit_names(spec)) * edit

    @classmethod
    def build(cls, sites: list[Site], spec: ReFTSpec) -> dict[str, Adapter]:
        """Makes the adapters, which share the positions."""
        positions = Positions(read_counts(spec.positions))
        return {site.path: cls.at(site, spec, positions) for site in sites}

    @classmethod
    def watch(cls, model: nn.Module, adapters: Mapping[str, Adapter]) -> list[RemovableHandle]:
        return cast(ReFT, next(iter(adapters.values()))).positions.watch(model)

    def transform_hidden(self, hidden: Tensor) -> Tensor:
        if hidden.shape[-1] != self.width:
            raise IncompatibleError(
                f"adapter.targets: reft is on a {type(self.base).__name__} that reads width {self.width} and "
                f"returns {hidden.shape[-1]}; hidden states keep their width. Choose other targets."
            )
        if not self.positions.counts:
            shift: Tensor = self.edits["t"](hidden)
            return (hidden + shift).to(hidden.dtype)
        edited = hidden
        for name, (index, used) in self.positions.slots_of(hidden).items():
            rows = index.to(hidden.device)[..., None].expand(-1, -1, self.width)  # (batch, slots, width)
            edit = self.edits[name if name in self.edits else "t"]
            delta = edit(hidden.gather(1, rows)) * used.to(hidden.device)[..., None]
            # Unused slots add zero at any position.
            edited = edited.scatter_add(1, rows, delta.to(hidden.dtype))
        return edited

    def without_gradient_at_start(self) -> tuple[str, ...]:
        """Returns R if it is multiplied only by zeros."""
        if self.spec.init == "reference" or self.spec.intervention in REPLACING:
            return ()
        return tuple(f"edits.{name}.original" for name in self.edits)

    def decay_exempt(self) -> list[nn.Parameter]:
        """Returns columns that are normalised, whose length has no effect."""
        orthonormal = self.spec.intervention in ORTHONORMAL
        return [edit.original for edit in self.edits.values()] if orthonormal else []

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns R itself, however it is parametrised."""
        return {
            f"reft_{name}.{letter}": tensor
            for name, edit in self.edits.items()
            for letter in ("R", "W", "b")
            if (tensor := getattr(edit, letter)) is not None
        }

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads R; orthonormalising an orthonormal R gives R again."""
        for name, edit in self.edits.items():
            for letter, own in {"R": edit.original, "W": edit.W, "b": edit.b}.items():
                if own is not None:
                    own.copy_(tensors[f"reft_{name}.{letter}"])
