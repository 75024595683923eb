"""Trains LoRA, LoRA-drop and the head with three seeds each; writes results.csv and accuracy.png.

    python experiments/lora_drop_threshold/run.py

Finished runs are not trained again, interrupted ones go on from their last checkpoint.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from lora_lab.config import compose
from lora_lab.experiment import RunResult, run_all
from lora_lab.report.collect import collect
from lora_lab.report.comparison import markdown_table, picture, spread
from lora_lab.tracking import read_metrics

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
ADAPTERS = 12
PREFIX = "importance/"


def choices() -> dict[str, tuple[str, list[str]]]:
    """Returns what is compared: a name → its file and settings."""
    found = {"head": ("head", list[str]()), "lora": ("lora", []), "restart": ("experiment", [])}
    found["restart"][1].append("controllers.output_evaluation.threshold=1.0")
    for threshold in (0.5, 0.7, 0.9):
        for name, share in (("shared", "true"), ("dropped", "false")):
            settings = [
                f"controllers.output_evaluation.threshold={threshold}",
                f"controllers.output_evaluation.share={share}",
            ]
            found[f"{name} {threshold}"] = ("experiment", settings)
    return found


def row_of(name: str, file: str, result: RunResult) -> pd.DataFrame:
    """Returns a run's row, with what the controller decided."""
    row = collect([result.record])
    last: dict[str, Any] = {}
    for logged in read_metrics(result.folder.path):
        last |= logged
    kept = int(last.get("budget/kept", 0 if file == "head" else ADAPTERS))
    row.insert(0, "choice", name)
    row.insert(1, "kept", kept)
    row.insert(2, "kept_parameters", kept * row["method_parameters"] // ADAPTERS)
    importance = {key: value for key, value in last.items() if key.startswith(PREFIX)}
    return pd.concat([row, pd.DataFrame([importance])], axis=1)


def draw(results: pd.DataFrame, path: Path) -> None:
    """Draws accuracy against the share of adapters, and the importance that the choice was made by."""
    with picture(path, 2, (11, 4.2)) as (left, right):
        draw_accuracy(results, left)
        draw_importance(results, right)


def draw_accuracy(results: pd.DataFrame, left: Axes) -> None:
    """Draws accuracy against the share of adapters."""
    kinds = results["choice"].str.partition(" ")
    looks = {
        "head": ("head alone", "black", "s"),
        "dropped": ("the others dropped", "tab:orange", "v"),
        "shared": ("the others share", "tab:blue", "o"),
        "restart": ("all kept, restarted", "tab:green", "D"),
        "lora": ("LoRA", "tab:red", "^"),
    }
    for kind, (label, colour, marker) in looks.items():
        rows = results[kinds[0] == kind].groupby("choice")[["kept", "test/accuracy"]]
        mean, spread = rows.mean().sort_values("kept"), rows.std()
        spread = spread.loc[mean.index]
        left.errorbar(
            mean["kept"] / ADAPTERS,
            mean["test/accuracy"],
            xerr=spread["kept"] / ADAPTERS,
            yerr=spread["test/accuracy"],
            label=label,
            color=colour,
            marker=marker,
            capsize=3,
            linestyle="-" if len(mean) > 1 else "none",
        )
    left.set(xlabel="share of adapters with tensors of their own", ylabel="test accuracy", xlim=(-0.05, 1.08))
    left.legend(frameon=False, loc="lower right")


def draw_importance(results: pd.DataFrame, right: Axes) -> None:
    """Draws the importance that the choice was made by."""
    decided = results[results["choice"] == "restart"]
    for role, colour in (("query", "tab:blue"), ("value", "tab:orange")):
        columns = [name for name in results if name.startswith(PREFIX) and name.endswith(role)]
        values = decided[columns]
        right.errorbar(
            range(len(columns)),
            values.mean(),
            yerr=values.std(),
            label=role,
            color=colour,
            marker="o",
            capsize=3,
        )
    right.set(xlabel="layer", ylabel="share of the role's importance")
    right.legend(frameon=False)


def table(results: pd.DataFrame) -> str:
    """Returns the README's table in Markdown: means over the seeds, the lowest and highest in brackets."""
    rows = []
    for choice, found in results.groupby("choice", sort=False):
        kept = ", ".join(str(count) for count in found["kept"])
        parameters = f"{found['kept_parameters'].mean():,.0f}"
        metrics = (spread(found[name]) for name in ("validation/accuracy", "test/accuracy"))
        rows.append([choice, kept, parameters, *metrics])
    return markdown_table(["adapters", "of their own", "parameters", "validation", "test"], rows)


def main() -> None:
    """Runs everything and shows it."""
    named = [
        (name, file, [*settings, f"seed={seed}"])
        for seed in SEEDS
        for name, (file, settings) in choices().items()
    ]
    quiet = "trainer.progress_bar=false"
    runs = run_all(compose(HERE / f"{file}.yaml", [*settings, quiet]) for _, file, settings in named)
    rows = [row_of(name, file, result) for (name, file, _), (_, result) in zip(named, runs, strict=True)]
    results = pd.concat(rows)
    results["choice"] = pd.Categorical(results["choice"], list(choices()))
    results = results.sort_values(["choice", "seed"])
    results.to_csv(HERE / "results.csv", index=False)
    results["choice"] = results["choice"].astype(str)
    draw(results, HERE / "accuracy.png")
    print(table(results))


if __name__ == "__main__":
    main()
