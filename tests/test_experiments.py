"""What experiments share, and that the figures in their READMEs are those of their results."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from lora_lab.config import compose
from lora_lab.experiment import run_all
from lora_lab.report.comparison import markdown_table, picture, spread

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def script(path: Path):
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "file", "arguments"),
    [
        ("dylora_inference_ranks", "run.py", ["accuracy"]),
        ("dylora_inference_ranks", "run.py", ["loss"]),
        ("lora_drop_threshold", "run.py", []),
        ("method_table", "run.py", []),
    ],
)
def test_a_readmes_table_is_that_of_the_results(name, file, arguments):
    folder = EXPERIMENTS / name
    table = script(folder / file).table(pd.read_csv(folder / "results.csv"), *arguments)
    assert len(table.splitlines()) >= 10
    assert table in (folder / "README.md").read_text()


def test_the_quickstarts_figures_are_those_of_its_results():
    folder = EXPERIMENTS / "quickstart"
    text = (folder / "README.md").read_text()
    rows = script(folder / "compare.py").table(pd.read_csv(folder / "results.csv")).splitlines()[2:]
    assert len(rows) == 2
    for cell in [cell.strip() for row in rows for cell in row.split("|")[2:-1]]:
        assert cell in text, cell


def comparison_rows(results: pd.DataFrame) -> list[list[str]]:
    """Returns the rows of method_comparison's table; the last has a paired 95 % interval over seeds."""
    runs = results[results["phase"] == "compare"]
    test = runs.pivot(index="seed", columns="cell", values="test/accuracy")
    rows = []
    for cell in runs["cell"].unique():
        own = runs[runs["cell"] == cell]
        difference = ""
        if cell != "lora":
            paired = test[cell] - test["lora"]
            low, high = ttest_1samp(paired, 0).confidence_interval()
            difference = f"{paired.mean():+.3f} ({low:+.3f} to {high:+.3f})"
        rows.append(
            [
                f"`{cell}`",
                f"{own['adapter_parameters'].iloc[0]:,}",
                f"{own['optimization.learning_rate'].iloc[0]:g}",
                f"{own['validation/accuracy'].mean():.3f}",
                spread(own["test/accuracy"]),
                difference,
            ]
        )
    return rows


def test_method_comparisons_figures_are_those_of_its_results():
    folder = EXPERIMENTS / "method_comparison"
    text = (folder / "README.md").read_text()
    for row in comparison_rows(pd.read_csv(folder / "results.csv")):
        assert f"| {' | '.join(row)} |" in text


def test_sum_to_products_figures_are_those_of_its_results():
    text = (EXPERIMENTS / "sum_to_product" / "README.md").read_text()
    for _, row in pd.read_csv(EXPERIMENTS / "sum_to_product" / "results.csv").iterrows():
        shown = next(line for line in text.splitlines() if line.startswith(f"| {row['network']} |"))
        name, trained, errors = shown.strip("| ").split(" | ")[0], *_numbers(shown)
        assert (name, trained) == (row["network"], row["trained_parameters"])
        for told, value in zip(errors, (row["mse_sum"], row["mse_product"]), strict=True):
            assert float(told) == pytest.approx(value, abs=0.5 * 10 ** -len(told.partition(".")[2]))


def _numbers(line: str) -> tuple[int, list[str]]:
    trained, *errors = (cell.strip() for cell in line.strip("| ").split("|")[1:])
    return int(trained.replace(",", "")), errors


def test_all_runs_of_a_comparison_run_once_and_spread_into_a_table(tmp_path):
    (tmp_path / "toy.yaml").write_text(
        f"name: toy\noutput: {tmp_path / 'runs'}\nmodel: {{name: 'random:mlp', task: regression}}\n"
        "data: {source: toy, size: 64}\nadapter: {method: lora, targets: all-linear}\n"
        "trainer: {max_steps: 2, progress_bar: false}\ntracking: {wandb: disabled}\n"
    )
    configs = [compose(tmp_path / "toy.yaml", [f"seed={seed}"]) for seed in (3, 4)]
    first = list(run_all(configs))
    assert [config.seed for config, _ in first] == [3, 4]
    assert [result.fresh for _, result in first] == [True, True]
    again = list(run_all(configs))
    assert [result.fresh for _, result in again] == [False, False]
    assert [result.record for _, result in again] == [result.record for _, result in first]


def test_a_spread_is_mean_lowest_and_highest_and_nothing_of_nothing():
    assert spread(pd.Series([0.25, 1.0, 0.7]), ".2f") == "0.65 (0.25 to 1.00)"
    assert spread(pd.Series([], dtype=float)) == ""
    assert markdown_table(["a", "b"], [[1, "x"]]) == "| a | b |\n|---|---|\n| 1 | x |"


def test_a_picture_is_written_when_its_context_ends(tmp_path):
    with picture(tmp_path / "two.png", 2, (4, 2)) as (left, right):
        left.plot([0, 1], [1, 0])
        right.set(xlabel="step")
        assert not (tmp_path / "two.png").exists()
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
