"""Trains LoRA and the head baseline with three seeds each and writes results.csv next to this file.

    python experiments/quickstart/compare.py

Takes 10 to 15 minutes on 2 CPU cores. Finished runs are not trained again.
"""

from pathlib import Path

import pandas as pd

from lora_lab.config import compose
from lora_lab.experiment import run_all
from lora_lab.report.collect import collect
from lora_lab.report.comparison import markdown_table, spread

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
SHOWN = {"validation/accuracy": ".3f", "test/accuracy": ".3f", "wall_seconds": ".0f"}


def table(results: pd.DataFrame) -> str:
    """Returns the README's figures: mean over the seeds, the lowest and highest in brackets."""
    rows = [
        [
            method,
            f"{found['trainable_parameters'].iloc[0]:,}",
            *(spread(found[n], f) for n, f in SHOWN.items()),
        ]
        for method, found in results.groupby("method", sort=False)
    ]
    return markdown_table(["method", "trained parameters", *SHOWN], rows)


def main() -> None:
    """Runs everything, with the bar of all runs in place of each run's own."""
    settings = [[f"seed={seed}", "trainer.progress_bar=false"] for seed in SEEDS]
    configs = [compose(HERE / f"{name}.yaml", own) for own in settings for name in ("experiment", "head")]
    results = collect(result.record for _, result in run_all(configs))
    results.to_csv(HERE / "results.csv", index=False)
    print(table(results))


if __name__ == "__main__":
    main()
