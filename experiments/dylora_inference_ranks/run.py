"""Trains one DyLoRA and eight LoRAs with three seeds each, and reads them at ranks 1 to 8.

    python experiments/dylora_inference_ranks/run.py

Writes results.csv and ranks.png next to this file and prints the README's table. Finished runs are not
trained again, and interrupted ones continue.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lora_lab.adapters.storage import load_adapter
from lora_lab.config import compose
from lora_lab.config.schema import ExperimentConfig
from lora_lab.experiment import RunResult, build_parts, quiet_libraries, run_all
from lora_lab.report.comparison import markdown_table, picture, spread
from lora_lab.training.module import FineTuner

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
RANK = 8
RANKS = range(1, RANK + 1)
ABOUT = ("run", "steps", "wall_seconds", "median_step_milliseconds", "git_commit")
Factors = tuple[Tensor, Tensor]


def leading(B: Tensor, A: Tensor, rank: int) -> Factors:
    """Returns the first components as they are, at the scale alpha / 8 that they were trained with."""
    return B * (torch.arange(len(A)) < rank), A


def singular(B: Tensor, A: Tensor, rank: int) -> Factors:
    """Returns the best approximation of B A by this rank."""
    left, values, right = torch.linalg.svd(B @ A, full_matrices=False)
    return left[:, : len(A)] * values[: len(A)] * (torch.arange(len(A)) < rank), right[: len(A)]


CUTS: dict[str, Callable[[Tensor, Tensor, int], Factors]] = {
    "LoRA of rank 8, first k components": leading,
    "LoRA of rank 8, k largest singular values": singular,
}
TRAINED = "LoRA trained at rank k"
NESTED = "DyLoRA of rank 8, trained once"
CURVES = (NESTED, TRAINED, *CUTS)
METRICS = ("accuracy", "loss")


@torch.no_grad()
def cut_rows(config: ExperimentConfig, result: RunResult) -> Iterator[dict[str, Any]]:
    """Yields the test metrics of a trained LoRA for each way and rank to cut it."""
    model, data = build_parts(config)
    adapters = load_adapter(model, result.folder.adapter)
    module = FineTuner(model, adapters, config.model.task, data.num_labels).eval()
    whole = [(adapter.B.clone(), adapter.A.clone()) for adapter in adapters]
    cuts = [(curve, cut, rank) for curve, cut in CUTS.items() for rank in RANKS[:-1]]
    for curve, cut, rank in cuts:
        for adapter, factors in zip(adapters, whole, strict=True):
            for tensor, value in zip((adapter.B, adapter.A), cut(*factors, rank), strict=True):
                tensor.copy_(value)
        metrics = module.new_metrics()
        for batch in data.test_dataloader():
            module.evaluate(batch, metrics)
        yield row(curve, rank, {f"test/{name}": float(x) for name, x in module.results(metrics).items()})


def row(curve: str, rank: int, metrics: dict[str, float], suffix: str = "") -> dict[str, Any]:
    """Returns one point of a curve."""
    return {"curve": curve, "rank": rank} | {name: metrics[f"test/{name}{suffix}"] for name in METRICS}


def rows_of(config: ExperimentConfig, result: RunResult) -> list[dict[str, Any]]:
    """Returns what a run comes to at the ranks at which it can be read."""
    metrics = result.record["metrics"]
    if config.adapter.method == "dylora":
        return [row(NESTED, rank, metrics, f"_rank_{rank}") for rank in RANKS]
    rows = [row(TRAINED, config.adapter.rank, metrics)]
    if config.adapter.rank == RANK:
        stored = result.folder.path / "cuts.csv"
        if not stored.is_file():
            pd.DataFrame(cut_rows(config, result)).to_csv(stored, index=False)
        rows += pd.read_csv(stored).to_dict("records")
        rows += [row(curve, RANK, metrics) for curve in CUTS]  # nothing is cut
    return rows


def main() -> None:
    """Runs everything and writes the results."""
    quiet_libraries()
    quiet = ["trainer.progress_bar=false", "tracking.wandb=disabled"]
    configs = [compose(HERE / "experiment.yaml", [f"seed={seed}", *quiet]) for seed in SEEDS]
    for rank in reversed(RANKS):
        lora = [f"adapter.rank={rank}", *quiet]
        configs += [compose(HERE / "lora.yaml", [f"seed={seed}", *lora]) for seed in SEEDS]
    rows = []
    for config, result in run_all(configs):
        about = {name: result.record[name] for name in ABOUT}
        about["processor"] = result.record["hardware"]["processor"]
        about["torch"] = result.record["packages"]["torch"]
        rows += [{**found, "seed": config.seed, **about} for found in rows_of(config, result)]
    results = pd.DataFrame(rows)
    results.to_csv(HERE / "results.csv", index=False)
    draw(results, HERE / "ranks.png")
    for metric in METRICS:
        print(f"\nTest {metric}\n\n{table(results, metric)}")


def table(results: pd.DataFrame, metric: str) -> str:
    """Returns a table of the README in Markdown: mean over the seeds, lowest and highest in brackets."""

    def cell(curve: str, rank: int) -> str:
        return spread(results.loc[(results["curve"] == curve) & (results["rank"] == rank), metric])

    return markdown_table(
        ["rank k", *CURVES], ([rank, *(cell(curve, rank) for curve in CURVES)] for rank in RANKS)
    )


def draw(results: pd.DataFrame, path: Path) -> None:
    """Draws the mean of each curve over the ranks, in a band from the lowest to the highest seed."""
    with picture(path, len(METRICS), (11, 4.2)) as panels:
        for axes, metric in zip(panels, METRICS, strict=True):
            for curve, style in zip(CURVES, ("o-", "s-", "^--", "D--"), strict=True):
                bounds = (
                    results[results["curve"] == curve].groupby("rank")[metric].agg(["mean", "min", "max"])
                )
                (line,) = axes.plot(bounds.index, bounds["mean"], style, markersize=4, label=curve)
                axes.fill_between(
                    bounds.index, bounds["min"], bounds["max"], color=line.get_color(), alpha=0.15
                )
            axes.set(xlabel="rank at which the adapter is read", ylabel=f"test {metric}", xticks=list(RANKS))
        panels[0].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
