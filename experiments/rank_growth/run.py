"""Trains LoRA alone and under three controllers at one budget, three seeds each; writes results.csv.

    python experiments/rank_growth/run.py

Finished runs are not trained again, interrupted ones go on from their last checkpoint.
"""

from pathlib import Path

import pandas as pd

from lora_lab.config import compose
from lora_lab.experiment import RunResult, run_all
from lora_lab.report.collect import collect
from lora_lab.report.comparison import markdown_table, spread
from lora_lab.tracking import read_metrics

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
CHOICES = {
    "lora": "lora",
    "adalora": "adalora",
    "rank growth": "experiment",
    "rank redistribution": "redistribution",
}


def row_of(name: str, result: RunResult) -> pd.DataFrame:
    """Returns a run's row, with the ranks that it ended with."""
    row = collect([result.record])
    row.insert(0, "choice", name)
    row["final_method_parameters"] = result.record["final_method_parameters"]
    ends = [logged for logged in read_metrics(result.folder.path) if "rank/mean" in logged][-1]
    ranks = {key: value for key, value in ends.items() if key.startswith("rank/layer")}
    row["least_rank"], row["greatest_rank"] = min(ranks.values()), max(ranks.values())
    return pd.concat([row, pd.DataFrame([ranks])], axis=1)


def table(results: pd.DataFrame) -> str:
    """Returns the README's table in Markdown: means over the seeds, the lowest and highest in brackets."""
    rows = [
        (
            choice,
            f"{own['final_method_parameters'].mean():,.0f}",
            f"{own['least_rank'].min():.0f} to {own['greatest_rank'].max():.0f}",
            spread(own["validation/mse"]),
            spread(own["test/mse"]),
        )
        for choice, own in results.groupby("choice", sort=False)
    ]
    return markdown_table(["choice", "parameters at the end", "ranks", "validation", "test"], rows)


def main() -> None:
    """Runs everything and shows it."""
    names = [name for name in CHOICES for _ in SEEDS]
    configs = [
        compose(HERE / f"{file}.yaml", [f"seed={seed}", "trainer.progress_bar=false"])
        for file in CHOICES.values()
        for seed in SEEDS
    ]
    rows = [row_of(name, result) for name, (_, result) in zip(names, run_all(configs), strict=True)]
    results = pd.concat(rows)
    results.to_csv(HERE / "results.csv", index=False)
    print(table(results))


if __name__ == "__main__":
    main()
