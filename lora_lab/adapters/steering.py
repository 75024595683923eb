"""Edits with a signed strength: setting it, and choosing their directions by examples.

with set_coefficient(model, -1.0): everything that the model computes here is steered in the opposite
direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.base import Adapter
from lora_lab.adapters.injection import AdapterSet
from lora_lab.adapters.protocols import Selectable, Steerable
from lora_lab.errors import DataError, IncompatibleError
from lora_lab.linalg.spectral import contrastive_directions

Batches = Iterable[Mapping[str, Tensor]]
"""Arguments of the model's forward, by name."""


@contextmanager
def set_coefficient(model: nn.Module, coefficient: float) -> Iterator[None]:
    """Sets the strength of all steerable adapters of a model inside the context.

    With gradient checkpointing the backward pass must be inside too, as it computes activations again.

    Args:
        model: the adapted model, or a part of it.
        coefficient: the strength; 0 is the base.

    Raises:
        IncompatibleError: if the model has no such adapter, for example after a merge, or the number is not
            finite.
    """
    found = [part for part in model.modules() if isinstance(part, Adapter) and isinstance(part, Steerable)]
    if not found:
        raise IncompatibleError(
            "no adapter in this model has a coefficient to set. A merged model keeps the coefficient at "
            "which it was merged: set it first, and merge with `with adapters.merged()` to be able to set "
            "it again."
        )
    before = [adapter.coefficient for adapter in found]
    try:
        for adapter in found:
            adapter.coefficient = coefficient
        yield
    finally:
        for adapter, old in zip(found, before, strict=True):
            adapter.coefficient = old


@torch.no_grad()
def calibrate(adapters: AdapterSet, chosen: Batches, rejected: Batches | None = None) -> None:
    """Chooses the singular directions of adapters by the inputs x of their maps on examples.

    Direction i scores S_i · mean |x v_i| on each kind of examples, and S_i · |mean x v_i − mean x' v_i| for
    the difference; see `contrastive_directions`. With only one kind, the highest scores are chosen. The
    inputs are those of the base, except for padding, where `attention_mask` is 0.

    Args:
        adapters: still untrained.
        chosen: batches of one kind of examples.
        rejected: batches of the opposite kind, or None.

    Raises:
        IncompatibleError: if no adapter needs it.
        DataError: if a kind has no inputs, or all have fewer than there are directions to choose.
    """
    waiting = {
        path: adapter
        for path, adapter in adapters.items()
        if isinstance(adapter, Selectable) and adapter.undecided
    }
    if not waiting:
        raise IncompatibleError(
            f"{adapters.spec.method}: no adapter needs examples to choose its directions. Use "
            "antipasto with dim_select: wanda_trip, and calibrate it once, before training."
        )
    bases = {path: adapter.directions()[1:] for path, adapter in waiting.items()}
    kinds = [_projections(adapters, bases, batches) for batches in (chosen, rejected) if batches is not None]
    found = {}
    for path, (S, _) in bases.items():
        rank, counts = waiting[path].rank or 0, [kind[path][0] for kind in kinds]
        if min(counts) == 0 or sum(counts) < rank:
            raise DataError(
                f"{path}: {' and '.join(map(str, counts))} tokens are too few to choose {rank} directions. "
                "Give at least as many, and some of each kind."
            )
        scores = [S * sizes / count for count, sizes, _ in (kind[path] for kind in kinds)]
        means = [total / count for count, _, total in (kind[path] for kind in kinds)]
        if len(means) == 1:
            found[path] = scores[0].topk(rank).indices.sort().values
        else:
            difference = S * (means[0] - means[1]).abs()
            found[path] = contrastive_directions(scores[0], scores[1], difference, rank)
    for path, adapter in waiting.items():
        adapter.choose(found[path])


def _projections(
    adapters: AdapterSet, bases: Mapping[str, tuple[Tensor, Tensor]], batches: Batches
) -> dict[str, tuple[int, Tensor, Tensor]]:
    """Returns, by path, the number of inputs x, the sum of |x V| and the sum of x V."""
    found = {path: (0, torch.zeros_like(S), torch.zeros_like(S)) for path, (S, _) in bases.items()}
    mask: Tensor | None = None

    def add(path: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, Vh = inputs[0], bases[path][1]
        if mask is not None and x.shape[:-1] == mask.shape:
            x = x[mask.bool()]
        rows = x.reshape(-1, x.shape[-1])
        projected = rows.to(Vh) @ Vh.T  # (inputs, k)
        count, sizes, total = found[path]
        found[path] = (count + len(rows), sizes + projected.abs().sum(0), total + projected.sum(0))

    model, modes = adapters.model, [(part, part.training) for part in adapters.model.modules()]
    hooks = [adapters.adapters[path].register_forward_pre_hook(partial(add, path)) for path in bases]
    try:
        model.eval()
        with set_coefficient(model, 0.0):
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
    finally:
        for part, training in modes:
            part.training = training
        for hook in hooks:
            hook.remove()
    return found
