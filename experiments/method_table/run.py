"""Trains every method once with its paper's settings, writes results.csv and prints the README's table.

    python experiments/method_table/run.py              # all
    python experiments/method_table/run.py ia3 dora     # some; the other rows stay as they are

Each run has a process of its own, so that none inherits another's peak of memory. Finished runs are not
trained again.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
from rich.progress import track

from lora_lab.config import compose
from lora_lab.experiment import run
from lora_lab.report.collect import collect
from lora_lab.report.comparison import markdown_table

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"


def record_of(name: str) -> dict:
    """Trains one row."""
    return run(compose(HERE / f"{name}.yaml")).record


def main() -> None:
    """Runs what was asked for and shows everything there is."""
    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.yaml"))
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in track(names, "methods"):
            row = collect([pool.submit(record_of, name).result()])
            row.insert(0, "row", "lora" if name == "experiment" else name)
            others = pd.read_csv(RESULTS) if RESULTS.is_file() else row[:0]
            kept = others[others["row"] != row["row"].item()]
            pd.concat([kept, row]).sort_values("row").to_csv(RESULTS, index=False)
    print(table(pd.read_csv(RESULTS)))


def table(results: pd.DataFrame) -> str:
    """Returns the README's table in Markdown, the best test accuracy first."""
    rows = [
        (
            f"`{row['row']}`",
            f"{row['method_parameters']:,}",
            f"{row['validation/accuracy']:.3f}",
            f"{row['test/accuracy']:.3f}",
            f"{row['median_step_milliseconds']:.0f} ms",
            f"{row['peak_memory_megabytes']:,.0f} MB",
        )
        for _, row in results.sort_values("test/accuracy", ascending=False).iterrows()
    ]
    return markdown_table(["method", "parameters", "validation", "test", "step", "memory"], rows)


if __name__ == "__main__":
    main()
