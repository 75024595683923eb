"""Trains LoRA alone and under three controllers at one budget, three seeds each; writes results.csv.

    python experiments/rank_growth/run.py

Finished runs are not trained again, interrupted ones go on from their last checkpoint.
"""

from pathlib import Path

import pandas as pd
from rich.progress import track

from lora_lab.config import compose
from lora_lab.experiment import run
from lora_lab.report.collect import collect
from lora_lab.tracking import read_metrics

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
CHOICES = {
    "lora": "lora",
    "adalora": "adalora",
    "rank growth": "experiment",
    "rank redistribution": "redistribution",
}


def row_of(name: str, seed: int) -> pd.DataFrame:
    """Trains one run and returns its row, with the ranks that it ended with."""
    config = compose(HERE / f"{CHOICES[name]}.yaml", [f"seed={seed}", "trainer.progress_bar=false"])
    result = run(config)
    row = collect([result.record])
    row.insert(0, "choice", name)
    row["final_method_parameters"] = result.record["final_method_parameters"]
    ends = [logged for logged in read_metrics(result.folder.path) if "rank/mean" in logged][-1]
    others = ("rank/mean", "rank/total", "rank/effective", "rank/stable")
    ranks = {key: value for key, value in ends.items() if key.startswith("rank/")}
    ranks = {key: value for key, value in ranks.items() if not key.startswith(others)}
    row["least_rank"], row["greatest_rank"] = min(ranks.values()), max(ranks.values())
    return pd.concat([row, pd.DataFrame([ranks])], axis=1)


def table(results: pd.DataFrame) -> str:
    """Returns the README's table in Markdown: means over the seeds, the lowest and highest in brackets."""
    lines = ["| choice | parameters at the end | ranks | validation | test |", "|---|---|---|---|---|"]
    for choice, rows in results.groupby("choice", sort=False):
        cells = []
        for name in ("validation/mse", "test/mse"):
            values = rows[name]
            cells.append(f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})")
        ranks = f"{rows['least_rank'].min():.0f} to {rows['greatest_rank'].max():.0f}"
        parameters = f"{rows['final_method_parameters'].mean():,.0f}"
        lines.append(f"| {choice} | {parameters} | {ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs everything and shows it."""
    todo = [(name, seed) for seed in SEEDS for name in CHOICES]
    results = pd.concat([row_of(*choice) for choice in track(todo, "runs")])
    results["choice"] = pd.Categorical(results["choice"], list(CHOICES))
    results = results.sort_values(["choice", "seed"])
    results.to_csv(HERE / "results.csv", index=False)
    results["choice"] = results["choice"].astype(str)
    print(table(results))


if __name__ == "__main__":
    main()
