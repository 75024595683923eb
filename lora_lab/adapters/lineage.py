"""Where a stored adapter comes from: base, data, config and versions, so that no other base gets it.

    lineage:
      base: {name, revision, dtype, weights}
      data: sha256 of the data        config: sha256 of the settings that decide the run
      versions: {lora_lab, torch, transformers}
      made: how a mixture or another form was made: command, options, relative error of each module
      sources: of a mixture, the lineage of each source
      loaded_onto: other bases onto which it was loaded on purpose, in their order

The fingerprint `weights` is of some numbers of each tensor, 64 at its start, middle and end, rounded to
bfloat16: reading takes three pages of a file for each tensor, for any size of the model. It is the same for
a base in float32 and in bfloat16, in one file or several, quantised or not, with adapters or without; task
heads, which belong to no base, are left out. It does not detect a base in which only a few other numbers
differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.errors import CheckpointError
from lora_lab.models.architectures import head_paths
from lora_lab.models.quantization import holds_codes

SAMPLE = 64
UNKNOWN = "-"
"""Stands for the linear maps of a base that holds them as codes."""

Lineage = dict[str, Any]


def fingerprint(model: nn.Module, places: Iterable[str] = (), left_out: Iterable[str] = ()) -> str | None:
    """Returns two hashes of a base's parameters, `<of maps and their biases>:<of embeddings and norms>`.

    Args:
        model: with adapters or without.
        places: paths of the adapters in it.
        left_out: paths of modules that belong to no base, besides the task heads.

    Returns:
        The hashes; None for a model without values.
    """
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    inside = [f"{path}.base." for path in places]
    outputs = [path for path, module in model.named_modules(remove_duplicate=False) if module is output]
    skipped = [f"{path}." for path in (*head_paths(model), *outputs, *left_out)]
    found: dict[str, tuple[bool, Tensor]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False))
        maps = not isinstance(module, nn.Embedding) and any(tensor.ndim > 1 for tensor in own.values())
        for name, tensor in own.items():
            full = f"{path}.{name}" if path else name
            standing = next((start for start in inside if full.startswith(start)), None)
            if standing is not None:
                full = standing.removesuffix("base.") + full.removeprefix(standing)
            elif any(full.startswith(start.removesuffix("base.")) for start in inside):
                continue  # the adapter's own
            if not any(full.startswith(start) for start in skipped):
                found[full] = maps, tensor
    if any(tensor.is_meta for _, tensor in found.values()):
        return None
    parts = []
    for kind in (True, False):
        digest = hashlib.sha256()
        for name in sorted(name for name, (maps, _) in found.items() if maps is kind):
            digest.update(name.encode() + b"\0" + _sample(found[name][1]))
        parts.append(UNKNOWN if kind and holds_codes(model) else digest.hexdigest()[:16])
    return ":".join(parts)


def _sample(tensor: Tensor) -> bytes:
    """Returns shape and some numbers of a tensor."""
    flat = tensor.detach().flatten()
    middle = len(flat) // 2
    pieces = [flat[:SAMPLE], flat[middle : middle + SAMPLE], flat[-SAMPLE:]]
    numbers = torch.cat(pieces).to("cpu", torch.bfloat16).view(torch.int16).numpy()
    return f"{tuple(tensor.shape)}".encode() + numbers.tobytes()


def base_lineage(model: nn.Module, places: Iterable[str] = (), left_out: Iterable[str] = ()) -> Lineage:
    """Returns the lineage of a base; arguments as for `fingerprint`."""
    config = getattr(model, "config", None)
    found = {
        "name": getattr(config, "_name_or_path", None) or type(model).__name__,
        "dtype": str(next((p.dtype for p in model.parameters()), None)).removeprefix("torch."),
        "weights": fingerprint(model, places, left_out),
    }
    return {field: value for field, value in found.items() if value is not None}


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that compute."""
    found = {}
    for name in ("lora_lab", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_lineage(own: Mapping[str, Any], source: str) -> Lineage:
    """Checks the lineage of a `lora_lab.yaml`; {} for folders that were written before there was one.

    Raises:
        CheckpointError: if it is something else.
    """
    found = own.get("lineage") or {}
    whole = isinstance(found, Mapping)
    bases = [found.get("base") or {}, *(found.get("loaded_onto") or [])] if whole else [None]
    if not all(_is_base(base) for base in bases):
        raise CheckpointError(
            f"{source}: `lineage` must say base, data, config and versions; copy the folder again, or delete "
            "the lineage to load the adapter onto any base."
        )
    return {name: value for name, value in found.items() if value}


def _is_base(base: object) -> bool:
    return isinstance(base, Mapping) and all(isinstance(value, str) for value in base.values())


def same_base(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Returns whether two bases can be the same, as far as both are known."""
    weights = [base.get("weights") for base in (one, other)]
    dtypes = {one.get("dtype"), other.get("dtype")}
    # Numbers rounded to float16 and then to bfloat16 differ from those rounded once.
    if None in weights or (len(dtypes) > 1 and "float16" in dtypes):
        return True
    pairs = zip(*(str(text).split(":") for text in weights), strict=False)
    return all(left == right or UNKNOWN in (left, right) for left, right in pairs)
