"""What each adapter of a model is, in numbers: rank, spectrum, sparsity and size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from lora_lab.adapters import Adapter, AdapterSet
from lora_lab.adapters.protocols import Droppable, NestedRank, Prunable
from lora_lab.linalg.rank import effective_rank, stable_rank, zero_fraction
from lora_lab.models.architectures import find_roles, layer_of


@dataclass(frozen=True)
class AdapterRow:
    """The numbers of one adapter; None for what has no meaning for the method."""

    path: str
    role: str
    layer: int | None
    rank: int | None
    """Components in its weights now, see `Prunable.components_in_use`; the owner's if it shares."""
    effective_rank: float | None
    stable_rank: float | None
    sparsity: float | None
    """Share of the initial components that are no longer in the weights; 1 if it is dropped or uses another
    adapter's tensors."""
    dropped: bool | None
    trainable: int
    """Its own trained numbers; 0 if it uses another adapter's."""
    shared: bool = False
    """Whether it uses another adapter's tensors."""


@torch.no_grad()
def adapter_rows(adapters: AdapterSet, spectra: bool = True) -> list[AdapterRow]:
    """Measures every adapter, in the order of the model.

    Args:
        adapters: the adapters.
        spectra: whether to compute singular values, for effective and stable ranks; dense updates take long.
    """
    sites = {site.path: site for site in find_roles(adapters.model)}
    rows = []
    for path, adapter in adapters.items():
        site = sites.get(path)
        rows.append(
            AdapterRow(
                path,
                site.role if site else path.rpartition(".")[2],
                site.layer if site else layer_of(path),
                adapter.rank,
                *(_spectrum(adapter) if spectra else (None, None)),
                1.0 if path in adapters.owners else sparsity(adapter),
                adapter.dropped if isinstance(adapter, Droppable) else None,
                0 if path in adapters.owners else sum(p.numel() for p in _trained(adapter)),
                path in adapters.owners,
            )
        )
    return rows


def sparsity(adapter: Adapter) -> float | None:
    """Returns the share of an adapter that is switched off, in [0, 1]; None if nothing is trained."""
    if isinstance(adapter, Droppable) and adapter.dropped:
        return 1.0
    if isinstance(adapter, Prunable):
        return max(0.0, 1 - int(adapter.components_in_use().sum()) / adapter.initial_components)
    if isinstance(adapter, NestedRank):
        return 1 - adapter.active_rank / adapter.max_rank
    trained = _trained(adapter)
    return zero_fraction(*trained) if trained else None


def _spectrum(adapter: Adapter) -> tuple[float | None, float | None]:
    """Returns effective and stable rank of W' − W."""
    try:
        values = adapter.singular_values()
    except torch.linalg.LinAlgError:
        # A run that has diverged to inf or nan must end as diverged, not with an error here.
        return math.nan, math.nan
    return (None, None) if values is None else (effective_rank(values), stable_rank(values))


def _trained(adapter: Adapter) -> list[nn.Parameter]:
    return [parameter for parameter in adapter.parameters() if parameter.requires_grad]  # the base is frozen
