"""Trains LoRA and the head baseline with three seeds each and writes results.csv beside this file.

    python experiments/quickstart/compare.py

Takes 10 to 15 minutes on 2 CPU cores. Finished runs are not trained again.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_lab.config import compose
from lora_lab.experiment import run
from lora_lab.report.collect import collect

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
SHOWN = ("validation/accuracy", "test/accuracy", "wall_seconds")


def main() -> None:
    """Runs everything and shows means over seeds with the half-range."""
    configs = [
        compose(HERE / f"{name}.yaml", [f"seed={seed}"]) for seed in SEEDS for name in ("experiment", "head")
    ]
    results = collect(run(config).record for config in configs)
    results.to_csv(HERE / "results.csv", index=False)
    table = Table("method", "trained parameters", *SHOWN, title="mean (lowest to highest of 3 seeds)")
    for method, rows in results.groupby("method", sort=False):
        cells = [
            f"{rows[name].mean():.4g} ({rows[name].min():.4g} to {rows[name].max():.4g})" for name in SHOWN
        ]
        table.add_row(method, f"{rows['trainable_parameters'].iloc[0]:,}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
