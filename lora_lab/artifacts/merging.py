"""One plain model from base and adapter, which transformers opens without lora_lab."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import PreTrainedModel

from lora_lab.adapters.injection import AdapterSet
from lora_lab.artifacts.converting import Converted, as_lora, check_size, cut
from lora_lab.artifacts.opening import StoredAdapter, check_out, find_adapter, open_adapter
from lora_lab.documents.writing import new_folder
from lora_lab.errors import CheckpointError, ConfigError
from lora_lab.models.build import ModelConfig, build_tokenizer
from lora_lab.models.conversion import check_shard_size, save_model
from lora_lab.models.pooled_encoder import PooledEncoder
from lora_lab.models.sources import DRAWN

Dtype = Literal["float32", "bfloat16", "float16"]
STORED: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16"}
"""Half precision in safetensors' names and in ours."""


def merge(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | None = None,
    dtype: str | None = None,
    shard_size: str = "5GB",
    rank: int | None = None,
    any_base: bool = False,
) -> Converted:
    """Writes base and adapter as one model folder, completely or not at all.

    The merged weights are computed in float32 or wider and rounded once. A quantised base is written
    dequantised, a split projection joined.

    If the base is in safetensors files, memory holds only two merged weights and the adapter: each is read
    and merged while the one before is written. Completely in memory are random bases, bases that are
    quantised, cast to fewer bits or without a frozen weight in their half-precision files, GPT-2's transposed
    maps, and experts that the files hold one by one.

    Args:
        path: the folder of a finished run, or of an adapter of a language model.
        out: the model's folder; it must be empty, or not exist.
        base: the base model, as `model.name`; None takes the one that the adapter was trained on.
        dtype: the type of the weights, `float32`, `bfloat16` or `float16`; None keeps the run's.
        shard_size: the size of the largest file, `500MB`.
        rank: largest number of components of a module's update; None keeps all.
        any_base: whether it may have other weights than the one that was trained on.

    Raises:
        CheckpointError: if there is no such adapter, or the folder holds something or cannot be written.
        ConfigError: if a setting is out of range.
        IncompatibleError: if the method cannot be merged, or has no update to cut to a rank, or adds a bias
            to a map without one.
    """
    out = Path(out)
    check_size(rank, 1.0)
    check_shard_size(shard_size)
    if dtype is not None and dtype not in (*STORED.values(), "float32"):
        raise ConfigError(f"--dtype: must be float32, bfloat16 or float16; got {dtype}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already, and nothing in it is replaced. Name a new folder.")
    source = find_adapter(path, base, any_base)
    check_out(out, source)
    written = getattr(torch, dtype or source.model.dtype)
    tokenizer = build_tokenizer(source.model)
    model, adapters = _open(source)
    method = adapters.spec
    found = Converted(out, {}, {})
    if rank is not None:
        lora, ranks, errors = cut(adapters, rank)
        adapters, found = as_lora(adapters, lora), Converted(out, ranks, errors)
    card = model_card(source, adapters, asdict(method), found)
    own = model.dtype
    _, changed = adapters.merge_lazily(None if own == written else written)
    with new_folder(out) as fresh:
        save_model(model, fresh, shard_size, None if own == written else written, changed)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(card, encoding="utf-8")
    return found


def _open(source: StoredAdapter) -> tuple[PreTrainedModel, AdapterSet]:
    """Opens a source in its files' half precision, unless the run drew frozen weights in float32."""
    stored = _as_stored(source.model)
    model, adapters = open_adapter(replace(source, model=stored))
    trained = tuple(f"{path}." for path in adapters.saved)
    if stored == source.model or all(name.startswith(trained) for name in _drawn(model)):
        return model, adapters
    del model, adapters  # not both at once
    return open_adapter(source)


def _drawn(model: PreTrainedModel) -> list[str]:
    """Returns the weights that are not in the model's files."""
    if isinstance(model, PooledEncoder):
        inside = [name for name in model.body.__dict__.get(DRAWN, ()) if not name.startswith("pooler.")]
        return ["classifier.weight", *(f"{model.encoder_name}.{name}" for name in inside)]
    return list(model.__dict__.get(DRAWN, ()))


def _as_stored(model: ModelConfig) -> ModelConfig:
    """Returns the model in the half precision of its files, with the same numbers in fewer bytes."""
    if model.quantization != "none" or model.dtype != "float32":
        return model
    stored = model.source().stored_dtypes()
    return replace(model, dtype=STORED[stored.pop()]) if len(stored) == 1 and stored <= {*STORED} else model


def model_card(
    source: StoredAdapter, adapters: AdapterSet, method: dict[str, object], found: Converted
) -> str:
    """Returns the model card of a merged model, as Markdown with the hub's metadata."""
    model = source.model
    name = model.source().public_name or model.name
    head = {"base_model": name, "library_name": "transformers", "tags": ["lora_lab", str(method["method"])]}
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", ""]
    lines += [f"# {name} + {method['method']}", ""]
    lines.append(
        f"`{name}` with a {method['method']} adapter of {len(adapters)} modules merged into its weights."
    )
    if model.quantization != "none":
        lines += ["", f"It was trained on weights in {model.quantization}, dequantised here."]
    if found.errors:
        lines += ["", "Each update was cut to a rank; what is lost of it, ‖ΔW − ΔW'‖ / ‖ΔW‖, is at most"]
        lines.append(f"{max(found.errors.values()):.3g}.")
    if model.pooling == "mean":
        lines += [
            "",
            "Its classifier uses the mean of the tokens. Open it in lora_lab, with `model.name` set to",
            "this folder and `model.pooling: mean`. The Auto classes of transformers have no such head and",
            "would open the encoder alone.",
        ]
    lines += ["", "## Method", ""]
    lines += [f"- {field}: {value}" for field, value in method.items() if value not in (None, [], {})]
    if others := adapters.lineage.get("loaded_onto"):
        lines += [
            "",
            f"The adapter was trained on other weights of its base than those of {others[-1].get('name')}.",
        ]
    if source.record is not None:
        record = source.record
        lines += ["", "## Training", "", f"- run: {record['experiment']} / {record['run']}"]
        lines += [f"- seed: {record['seed']}", f"- steps: {record['steps']}"]
        lines += [f"- data: {source.data} ({record['data_fingerprint']})", "", "## Metrics", ""]
        known = {metric: value for metric, value in record["metrics"].items() if value is not None}
        lines += [f"- {metric}: {value:.4g}" for metric, value in known.items()]
    return "\n".join(lines) + "\n"
