"""Pre-trains a network on the sum of its inputs, adapts it to the product of the first two, compares both.

    python experiments/sum_to_product/run.py

Writes results.csv and losses.png next to this file. Finished runs are not trained again.
"""

from pathlib import Path

import pandas as pd
import torch

from lora_lab.adapters.storage import load_adapter
from lora_lab.config import compose
from lora_lab.experiment import RunResult, build_parts, evaluate, run
from lora_lab.models.conversion import save_model
from lora_lab.report.collect import collect
from lora_lab.report.comparison import picture
from lora_lab.tracking import read_metrics

HERE = Path(__file__).parent
PARTS = {
    "pre-trained": "pretrain.yaml",
    "LoRA on the last layer": "experiment.yaml",
    "LoRA on all layers": "all_layers.yaml",
}


def pretrain() -> tuple[RunResult, Path]:
    """Runs part one and saves its network as a model that the other parts start from."""
    config = compose(HERE / PARTS["pre-trained"])
    result = run(config)
    model, _ = build_parts(config)
    base = result.folder.path.parent / "base"
    save_model(load_adapter(model, result.folder.adapter).merge(), base)
    return result, base


def merge_error(config_path: Path, base: Path, result: RunResult) -> float:
    """Returns max |merged − adapted| / max |adapted| over the validation batches' outputs."""
    model, data = build_parts(compose(config_path, [f"model.name={base}"]))
    adapters = load_adapter(model.eval(), result.folder.adapter)
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        adapted = model(features=batch["features"]).logits
        with adapters.merged():
            merged = model(features=batch["features"]).logits
    return float((merged - adapted).abs().max() / adapted.abs().max())


def main() -> None:
    """Runs all parts and writes the results."""
    pretrained, base = pretrain()
    results = {"pre-trained": pretrained}
    errors: dict[str, float] = {}
    for name, file in list(PARTS.items())[1:]:
        results[name] = run(compose(HERE / file, [f"model.name={base}"]))
        errors[name] = merge_error(HERE / file, base, results[name])
    rows = []
    for name, result in results.items():
        row = {
            "network": name,
            "trained_parameters": result.record["trainable_parameters"],
            "total_parameters": result.record["total_parameters"],
        }
        for target in ("sum", "product"):
            row[f"mse_{target}"] = evaluate(result.folder.path, [f"data.target={target}"])["test/mse"]
        rows.append({**row, "merge_error": errors.get(name)})
    table = pd.DataFrame(rows)
    runs = collect(result.record for result in results.values())
    about = runs[["run", "seed", "steps", "wall_seconds", "git_commit", "processor", "torch"]]
    pd.concat([table, about], axis=1).to_csv(HERE / "results.csv", index=False)
    draw(results, HERE / "losses.png")
    print(table.to_string(index=False))


def draw(results: dict[str, RunResult], path: Path) -> None:
    """Draws the training losses, each part's on its own task."""
    with picture(path) as (axes,):
        for name, result in results.items():
            rows = [row for row in read_metrics(result.folder.path) if "train/loss" in row]
            steps, losses = [row["step"] + 1 for row in rows], [row["train/loss"] for row in rows]
            axes.plot(steps, losses, label=f"{name} ({'sum' if name == 'pre-trained' else 'product'})")
        axes.set(xlabel="optimizer step", ylabel="training loss (mean squared error)", yscale="log")
        axes.legend(frameon=False)


if __name__ == "__main__":
    main()
