"""One plain model of base and adapter, which transformers opens without us."""

from __future__ import annotations

from pathlib import Path

from lora_lab.adapters.injection import AdapterSet
from lora_lab.artifacts.opening import Source, open_adapter, open_source
from lora_lab.documents.writing import new_folder
from lora_lab.errors import CheckpointError
from lora_lab.models.build import build_tokenizer
from lora_lab.models.conversion import save_model


def merge(
    path: Path, out: Path, base: str | None = None, dtype: str | None = None, shard_size: str = "5GB"
) -> Path:
    """Writes base and adapter as one model folder, whole or not at all.

    The merged weights are computed in float32 or wider and rounded once. A quantised base is written
    dequantised, a split projection joined.

    Args:
        path: the folder of a finished run, or of an adapter of a language model.
        out: the model's folder; it must not exist, or be empty.
        base: the base model, as `model.name`; None takes the one that the adapter was trained on.
        dtype: the type of the weights, `float32`, `bfloat16` or `float16`; None keeps the base's.
        shard_size: the size of the largest file, `500MB`.

    Returns:
        The folder.

    Raises:
        CheckpointError: if there is no such adapter, or the folder holds something or cannot be written.
        IncompatibleError: if the method cannot be merged.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already, and nothing in it is replaced. Name a new folder.")
    source = open_source(path, base, dtype)
    model, adapters = open_adapter(source)
    card = model_card(source, adapters)
    adapters.merge()
    tokenizer = build_tokenizer(source.model)
    with new_folder(out) as fresh:
        save_model(model, fresh, shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(card, encoding="utf-8")
    return out


def model_card(source: Source, adapters: AdapterSet) -> str:
    """Returns what a reader must know of a merged model, as Markdown with the hub's head."""
    name, spec = source.model.source().public_name or source.model.name, adapters.spec
    lines = ["---", f"base_model: {name}", "library_name: transformers", "---", ""]
    lines += [f"# {name} + {spec.method}", ""]
    lines.append(f"`{name}` with a {spec.method} adapter of {len(adapters)} modules merged into its weights.")
    if source.model.quantization != "none":
        lines += [
            "",
            f"It was trained on weights in {source.model.quantization}, dequantised here.",
        ]
    if source.model.pooling == "mean":
        lines += [
            "",
            "Its classifier stands on the mean of the tokens. Open it in lora_lab, with `model.name` set to",
            "this folder and `model.pooling: mean`. The Auto classes of transformers know no such head and",
            "would open the encoder alone.",
        ]
    if source.record is not None:
        record = source.record
        lines += ["", "## Training", "", f"- run: {record['experiment']} / {record['run']}"]
        lines += [f"- seed: {record['seed']}", f"- steps: {record['steps']}"]
        lines += [f"- data: {record['data_fingerprint']}", "", "## Metrics", ""]
        known = {metric: value for metric, value in record["metrics"].items() if value is not None}
        lines += [f"- {metric}: {value:.4g}" for metric, value in known.items()]
    return "\n".join(lines) + "\n"
