"""A mixture of stored adapters as one LoRA.

The sum of weighted updates is exact in ΔW itself, for any methods and ranks; if it is cut to a rank, the
error is measured. The other methods change single numbers of ΔW before they add:

    weighted         Σ wᵢ ΔWᵢ
    cat              the same, with the components of all sources side by side
    svd              the same, cut to `rank` or `energy`
    magnitude_prune  only the largest numbers of each source, the rest 0
    dare             each number at random: 0 with probability 1 − density, else divided by density
                     (Yu et al. 2024, arXiv:2311.03099)
    ties             the largest numbers of each source; of these, those of the sign that has the larger sum;
                     of these the mean (Yadav et al. 2023, arXiv:2306.01708)

The largest numbers are those of all modules of a source together, as in TIES, not of each matrix. PEFT
chooses them matrix by matrix, and most of its methods mix A and B, which is no sum of updates: see
`peft_mixtures` for `peft_ties`, `peft_linear` and others, which compute what PEFT computes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from lora_lab.adapters.storage import load_adapter, read_label_names
from lora_lab.artifacts.converting import Converted, as_lora, check_size, store, updates
from lora_lab.artifacts.opening import StoredAdapter, check_out, find_adapter
from lora_lab.artifacts.peft_mixtures import PeftMethod, peft_factors, peft_mixture
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.linalg.updates import Update

OwnMethod = Literal["weighted", "cat", "svd", "ties", "dare", "magnitude_prune"]
Method = OwnMethod | PeftMethod
METHODS = (*get_args(OwnMethod), *get_args(PeftMethod))
SPARSE = tuple(method for method in METHODS if re.search("ties|dare|prune", method))
"""The methods that keep a share of the numbers, `density`."""

UNCUT = ("cat", *(method for method in get_args(PeftMethod) if not method.endswith("_svd")))
"""The methods whose factors are kept as they are."""

State = Mapping[str, Tensor]


def combine(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    method: Method = "weighted",
    rank: int | None = None,
    energy: float = 1.0,
    density: float | None = None,
    seed: int = 0,
    heads: int | Literal["average"] | None = None,
    base: str | None = None,
    any_base: bool = False,
) -> Converted:
    """Writes a mixture of stored adapters as one LoRA; experts that lie stacked are mixed one by one.

    Args:
        paths: folders of runs or adapters, all on the same base model.
        out: the new adapter's folder; one that export, combine or import made is replaced.
        weights: the factor of each source; None means 1 / number of sources for each, and 1 for methods of
            TIES, which take a mean themselves.
        method: how they are mixed.
        rank: largest number of components of a module; None sets no limit.
        energy: the share of each mixture's squared norm to keep, in (0, 1].
        density: the share of numbers that `ties`, `dare`, `magnitude_prune` and PEFT's of these keep, in
            [0, 1].
        seed: seed of `dare`, and of PEFT's.
        heads: the fully trained modules (task heads) of the mixture: the number of a source, counted from 1,
            or their weighted average; None if they are the same in all sources. The names of the classes are
            those of the head.
        base: the base model, as `model.name`.
        any_base: whether it may have other weights than the one that was trained on.

    Raises:
        CheckpointError: if a source is no adapter, or the new folder would replace one that was trained.
        ConfigError: if a setting is out of range or has no meaning here.
        IncompatibleError: if the sources belong to different models, or have different heads and `heads` is
            None, or different classes and `heads` is no number.
    """
    check_size(rank, energy)
    weights = _checked(paths, weights, method, rank, energy, density)
    if isinstance(heads, int) and not 1 <= heads <= len(paths):
        raise ConfigError(f"--heads: must be a source's number, 1 to {len(paths)}, or average; got {heads}")
    sources = [find_adapter(path, base, any_base) for path in paths]
    for source in sources[1:]:
        if source.model != sources[0].model:
            raise IncompatibleError(
                f"{source.path} belongs to another base model or task than {sources[0].path} "
                f"({source.model.name}, {sources[0].model.name}). Mix adapters of one base."
            )
    check_out(out, *sources)
    named = _named(sources, heads)
    model = sources[0].build().eval()
    found, factors, trained, lineages = [], [], [], []
    for source in sources:
        adapters = load_adapter(model, source.adapter, any_base)
        found.append(updates(adapters))
        if method.startswith("peft_"):
            factors.append(peft_factors(adapters, source.path))
        lineages.append(adapters.lineage)
        trained.append(
            {
                f"{path}.{name}": tensor.clone()
                for path, copy in adapters.saved.items()
                for name, tensor in copy.peft_tensors().items()
            }
        )
        if source is not sources[-1]:
            adapters.remove()
    head = _head(trained, weights, heads)
    sites = dict.fromkeys(path for own in found for path in own)
    if factors:
        order = [path for path, _ in model.named_modules() if path in sites]
        mixed = peft_mixture(factors, order, weights, cast(PeftMethod, method), density, seed)
    elif method in SPARSE:
        assert density is not None
        mixed = _sparse_mixture(found, weights, method, density, seed)
    else:
        mixed = {path: Update.sum(*_present(path, found, weights)) for path in sites}
    cut = {path: (update, 0.0) for path, update in mixed.items()}
    if method not in UNCUT:
        cut = {path: update.truncated(rank, energy) for path, update in mixed.items()}
    lora = as_lora(adapters, {path: update for path, (update, _) in cut.items()})
    with torch.no_grad():
        for path, copy in lora.saved.items():
            own = copy.peft_tensors()
            copy.load_peft_tensors({name: head[f"{path}.{name}"] for name in own})
    ranks = {path: update.rank for path, (update, _) in cut.items()}
    errors = {path: error for path, (_, error) in cut.items()}
    options = {"rank": rank, "energy": energy, "density": density, "seed": seed, "heads": heads}
    made = {"by": "combine", "method": method, "weights": [*weights], **options, "errors": errors}
    lora.lineage = {"base": lineages[0]["base"]} if "base" in lineages[0] else {}
    store(lora, out, named, {"made": made, "sources": lineages})
    return Converted(Path(out), ranks, errors)


def _checked(
    paths: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None,
    method: str,
    rank: int | None,
    energy: float,
    density: float | None,
) -> Sequence[float]:
    if len(paths) < 2:
        raise ConfigError("combine: needs at least two adapters.")
    if method not in METHODS:
        raise ConfigError(f"--method: must be one of {', '.join(METHODS)}; got {method!r}")
    if (density is None) == (method in SPARSE):
        who = (
            f"{method} needs the share of numbers to keep" if density is None else f"{method} keeps them all"
        )
        raise ConfigError(f"--density: {who}; it belongs to ties, dare, magnitude_prune and PEFT's of these.")
    if density is not None and not (0 < density <= 1 or (density == 0 and "dare" not in method)):
        raise ConfigError(
            f"--density: must lie in [0, 1], and above 0 for dare, which divides by it; got {density}"
        )
    if method.endswith("svd") and rank is None and energy == 1:
        raise ConfigError(f"--method {method}: needs --rank or --energy, to which it cuts the mixture.")
    if method in UNCUT and (rank is not None or energy < 1):
        raise ConfigError(f"--method {method}: keeps the factors; use --rank and --energy with the others.")
    if weights is None:
        return [1.0 if "ties" in method else 1 / len(paths)] * len(paths)
    if len(weights) != len(paths):
        raise ConfigError(f"--weights: needs one for each adapter, {len(paths)}; got {len(weights)}")
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"--weights: must be finite; got {', '.join(map(str, weights))}")
    return weights


def _named(sources: Sequence[StoredAdapter], heads: int | Literal["average"] | None) -> StoredAdapter:
    """Returns the source whose classes those of the mixture are."""
    if isinstance(heads, int):
        return sources[heads - 1]
    found = [source for source in sources if read_label_names(source.adapter)]
    for source in found[1:]:
        if (own := read_label_names(source.adapter)) != (first := read_label_names(found[0].adapter)):
            raise IncompatibleError(
                f"{source.path}, {found[0].path}: have other classes ({', '.join(own)}; {', '.join(first)}), "
                "and no mixture of heads predicts both. Take one source's head and classes: --heads 1, 2, …"
            )
    return (found or sources)[0]


def _present(
    path: str, found: Sequence[Mapping[str, Update]], weights: Sequence[float]
) -> tuple[list[Update], list[float]]:
    """Returns the updates of one module and their weights; a source without an adapter there adds nothing."""
    pairs = [(own[path], weight) for own, weight in zip(found, weights, strict=True) if path in own]
    return [update for update, _ in pairs], [weight for _, weight in pairs]


def _sparse_mixture(
    found: Sequence[Mapping[str, Update]], weights: Sequence[float], method: str, density: float, seed: int
) -> dict[str, Update]:
    """Mixes whole updates number by number, including biases."""
    vectors = [_whole(own) for own in found]
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for vector, weight in zip(vectors, weights, strict=True):
        if method == "dare":
            names, drawn = list(vector), {}
            for name in names:
                flags = torch.rand(vector[name].shape, generator=generator) < density
                drawn[name] = vector[name] * flags / density * weight
            kept.append(drawn)
        else:
            kept.append({name: tensor * weight for name, tensor in largest(vector, density).items()})
    mixed = {}
    for name in dict.fromkeys(name for vector in kept for name in vector):
        stacked = torch.stack([vector[name] for vector in kept if name in vector])
        mixed[name] = elected_mean(stacked) if method == "ties" else stacked.sum(0)
    return {
        path: Update.of_matrix(mixed[path], mixed.get(f"{path}.bias"))
        for path in dict.fromkeys(path for own in found for path in own)
    }


def largest(vector: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Returns tensors with all but the largest of their numbers zeroed, counted over all of them together.

    Args:
        vector: name → tensor, of any shapes.
        density: the share to keep, in [0, 1]; the count is rounded, and numbers equal to the smallest kept
            one are also kept.
    """
    sizes = torch.cat([tensor.abs().flatten() for tensor in vector.values()])
    count = round(density * len(sizes))
    if not count:
        return {name: torch.zeros_like(tensor) for name, tensor in vector.items()}
    border = sizes.kthvalue(len(sizes) - count + 1).values
    return {name: tensor * (tensor.abs() >= border) for name, tensor in vector.items()}


def elected_mean(stacked: Tensor) -> Tensor:
    """Returns, for each number, the mean of the sources that agree with the elected sign, as TIES does.

    Args:
        stacked: (sources, …); zeros do not count.
    """
    agree = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def _whole(found: Mapping[str, Update]) -> dict[str, Tensor]:
    whole = {path: update.matrix() for path, update in found.items()}
    return whole | {f"{path}.bias": own.bias for path, own in found.items() if own.bias is not None}


def _head(
    trained: Sequence[State],
    weights: Sequence[float],
    heads: int | Literal["average"] | None,
) -> State:
    alike = all(
        own.keys() == trained[-1].keys()
        and all(torch.equal(tensor, trained[-1][name]) for name, tensor in own.items())
        for own in trained
    )
    if alike:
        return trained[-1]
    if heads is None:
        raise IncompatibleError(
            "the adapters have different task heads or other fully trained modules, and no sum of updates "
            "mixes them. Choose those of the mixture: --heads 1 (the first source's), 2, …, or average"
        )
    if any(own.keys() != trained[-1].keys() for own in trained):
        raise IncompatibleError("the adapters fully train different modules; only adapters of one head mix.")
    if heads != "average":
        return trained[heads - 1]
    total = sum(weights)
    if not total:
        raise ConfigError("--heads average: the weights add up to 0, which has no mean.")
    mean = dict(trained[0])
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            parts = [own[name] * (weight / total) for own, weight in zip(trained, weights, strict=True)]
            mean[name] = torch.stack(parts).sum(0)
    return mean
