"""Trains a language model on two tasks apart, mixes the two adapters in several ways, and tests all on both.

    python experiments/mixed_tasks/run.py

Writes results.csv and losses.png next to this file and prints the README's table. Finished runs are not
trained again.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lora_lab.adapters.storage import load_adapter
from lora_lab.artifacts.combining import combine
from lora_lab.config import compose
from lora_lab.config.schema import ExperimentConfig
from lora_lab.experiment import build_parts, quiet_libraries, run_all
from lora_lab.report.comparison import markdown_table, picture, spread
from lora_lab.training.module import FineTuner

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
TASKS = ("films", "sums")
SPLITS = {"train": 160, "validation": 50, "test": 100}
ABOUT = ("steps", "wall_seconds", "git_commit")
MIXTURES: dict[str, dict[str, Any]] = {
    "mean of both": {"method": "weighted"},
    "sum of both": {"method": "weighted", "weights": [1, 1]},
    "TIES, density 0.2": {"method": "ties", "density": 0.2},
    "TIES, density 0.5": {"method": "ties", "density": 0.5},
    "DARE, density 0.5, sum": {"method": "dare", "density": 0.5, "weights": [1, 1]},
    "magnitude pruning, density 0.2, sum": {"method": "magnitude_prune", "density": 0.2, "weights": [1, 1]},
}
NAMES = ("base", "films alone", "sums alone", *MIXTURES)


def write_sums(folder: Path) -> list[str]:
    """Writes the files of the second task, no sum in two of them; returns the settings that name them."""
    draw = np.random.default_rng(0)
    pairs = draw.permutation(90 * 90)[: sum(SPLITS.values())]
    rows = pd.DataFrame({"first": 10 + pairs // 90, "second": 10 + pairs % 90})
    answers = " " + (rows["first"] + rows["second"]).astype(str)
    asked = rows["first"].astype(str) + " plus " + rows["second"].astype(str) + " is"
    table = pd.DataFrame({"question": asked, "answer": answers})
    folder.mkdir(parents=True, exist_ok=True)
    settings, start = ["data.source=files", "data.text=[answer]", "data.prompt=question"], 0
    for split, count in SPLITS.items():
        path = folder / f"{split}.csv"
        table.iloc[start : start + count].to_csv(path, index=False)
        settings.append(f"data.{split}={path}")
        start += count
    return settings


def losses(configs: list[ExperimentConfig], adapters: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Yields the test loss of each adapter, and of the base without one, on the data of each task."""
    parts = [build_parts(config) for config in configs]
    model = parts[0][0].eval()
    for name, folder in adapters.items():
        named = load_adapter(model, folder, name=name)
    module = FineTuner(model, named[name], configs[0].model.task, 0)
    for adapter in (None, *adapters):
        row = {}
        for task, (_, data) in zip(TASKS, parts, strict=True):
            metrics = module.new_metrics()
            with named.using(adapter):
                for batch in data.test_dataloader():
                    module.evaluate(batch, metrics)
            row[f"{task}_loss"] = float(module.results(metrics)["loss"])
        yield row


def main() -> None:
    """Runs everything and writes the results."""
    quiet_libraries()
    quiet = ["trainer.progress_bar=false"]
    rows = []
    for seed in SEEDS:
        configs = [compose(HERE / "films.yaml", ["run=films-" + str(seed), f"seed={seed}", *quiet])]
        files = write_sums(Path(configs[0].output) / "mixed_tasks" / "data")
        configs.append(compose(HERE / "films.yaml", [f"run=sums-{seed}", f"seed={seed}", *quiet, *files]))
        results = [result for _, result in run_all(configs)]
        folders = {task: result.folder.adapter for task, result in zip(TASKS, results, strict=True)}
        sources = [*folders.values()]
        for number, options in enumerate(MIXTURES.values()):
            out = results[0].folder.path.parent / f"mixture-{number}-{seed}"
            if not out.exists():
                combine(sources, out, seed=seed, **options)
            folders[f"mixture-{number}"] = out
        records = {task: result.record for task, result in zip(TASKS, results, strict=True)}
        about = {f"{task}_{name}": record[name] for task, record in records.items() for name in ABOUT}
        about["processor"] = results[0].record["hardware"]["processor"]
        about["torch"] = results[0].record["packages"]["torch"]
        found = zip(NAMES, losses(configs, folders), strict=True)
        rows += [{"adapter": name, "seed": seed, **row, **about} for name, row in found]
    table_of_all = pd.DataFrame(rows)
    table_of_all.to_csv(HERE / "results.csv", index=False)
    draw(table_of_all, HERE / "losses.png")
    print(table(table_of_all))


def kept(results: pd.DataFrame, task: str) -> pd.Series:
    """Returns, for each row, the share of what the task's own adapter gains over the base, in its seed."""
    loss = results.set_index(["seed", "adapter"])[f"{task}_loss"].unstack()
    gain = loss.rsub(loss["base"], axis=0).div(loss["base"] - loss[f"{task} alone"], axis=0)
    return gain.stack().reindex(pd.MultiIndex.from_frame(results[["seed", "adapter"]])).to_numpy()


def table(results: pd.DataFrame) -> str:
    """Returns the README's table: means over the seeds, lowest and highest in brackets."""
    shares = results.assign(**{task: kept(results, task) for task in TASKS})
    columns = [column for task in TASKS for column in (f"{task}_loss", task)]
    lines = []
    for name in NAMES:
        own = shares[shares["adapter"] == name]
        lines.append([name, *(spread(own[column]) for column in columns)])
    headings = [text for task in TASKS for text in (f"loss on {task}", f"share of the gain on {task}")]
    return markdown_table(["adapter", *headings], lines)


def draw(results: pd.DataFrame, path: Path) -> None:
    """Draws each adapter's loss on one task over that on the other, a point for each seed."""
    with picture(path, size=(7, 5)) as (axes,):
        for name, marker in zip(NAMES, ".sDovP^X*", strict=True):
            own = results[results["adapter"] == name]
            axes.plot(own["films_loss"], own["sums_loss"], marker, ls="", label=name)
        axes.set(xlabel="test loss on film reviews", ylabel="test loss on sums", yscale="log")
        axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
