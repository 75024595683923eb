"""Reading what a report shows: the folder of a study, or any run folders."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import yaml
from numpy.typing import NDArray

from lora_lab.config.schema import differing
from lora_lab.documents.reading import DocumentError, flat, parse_yaml, plain, read_json, read_text
from lora_lab.errors import CheckpointError
from lora_lab.statistics.analysis import FINISHED
from lora_lab.tasks import TASKS

STUDY, RESULTS, VALIDATIONS = "study.yaml", "results.csv", "validations.csv"
RECORD, CONFIG, METRICS, EXAMPLES = "run.json", "config.yaml", "metrics.csv", "test_examples.parquet"
CURVES = ("train/loss", "rank/mean", "rank/effective_mean", "sparsity/mean")
"""Metrics that are drawn over steps, besides validations."""
COSTS = ("trained_parameters", "peak_megabytes", "step_seconds")
"""Costs against which the metric is drawn."""
RANK = "rank/"
CURVE_COLUMNS = ["cell", "seed", "step", "metric", "value"]
MOST_FLOW = 1000
"""Brackets in a file beyond which it may be nested deeply."""
APART = ("seed", "name", "run", "output", "continues", "tracking")
"""Keys in which runs of one cell may differ."""
COMPARE = "compare"
"""The phase of the runs that are compared, and not only tuned."""
WAITING = "not started"
"""The status of a run that the study plans."""


@dataclass
class Gathered:
    """All that a report shows."""

    title: str
    metric: str
    runs: pd.DataFrame
    """One row for each run: cell, phase (tune or compare), seed, status, error, metrics, costs."""
    folders: Sequence[Path | None]
    """Folder of each run; None if it does not exist."""
    commands: Sequence[str]
    question: str | None = None
    baseline: str | None = None
    margin: float | None = None
    validations: pd.DataFrame | None = None
    """Columns cell, seed, step, metric, value, of the compared runs that finished; None if the runs' own
    files have them."""
    differences: Sequence[Mapping[str, Any]] = ()
    """For each cell: the keys beyond the grid in which it differs from the baseline."""
    tuning: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For each cell: the value that its search chose, and all that it tried."""
    matches: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For each cell: the size that was chosen to match a number of parameters."""

    @cached_property
    def compared(self) -> pd.DataFrame:
        """The runs that are compared."""
        return self.runs[self.runs["phase"] == COMPARE]

    @cached_property
    def costs(self) -> pd.DataFrame:
        """The median over runs of each of `COSTS` that is known, with one row for each cell."""
        known = [name for name in COSTS if name in self.compared]
        numbers = self.compared[known].apply(pd.to_numeric, errors="coerce")
        return numbers.groupby(self.compared["cell"]).median()

    @cached_property
    def records(self) -> list[Mapping[str, Any]]:
        """What the record of each existing run says about its machine and versions."""
        return [record for folder in self.folders if folder and (record := _record(folder))]

    @cached_property
    def examples(self) -> dict[tuple[str, int], pd.DataFrame]:
        """(cell, seed) → a row for each test example."""
        found = {}
        for (_, run), folder in zip(self.runs.iterrows(), self.folders, strict=True):
            if run["phase"] == COMPARE and folder and (folder / EXAMPLES).is_file():
                found[str(run["cell"]), int(run["seed"])] = _parquet(folder / EXAMPLES)
        return found

    @cached_property
    def logged(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Curves of the compared runs (cell, seed, step, metric, value), and their modules' last ranks.

        The latter have columns cell, seed, module and rank.
        """
        # Lists of arrays, since one pandas operation for each run and metric would take minutes for 1,000
        # runs.
        keys, steps, values, ranks = [], [], [], []
        columns = [self.runs[name] for name in ("cell", "seed", "phase", "status")]
        for cell, seed, phase, status, folder in zip(*columns, self.folders, strict=True):
            if phase != COMPARE or status != FINISHED or folder is None:
                continue
            rows = _logged(folder / METRICS)
            for name, column in rows.items():
                if name in CURVES or name.startswith("validation/"):
                    known = ~np.isnan(column)
                    keys.append((cell, seed, name))
                    steps.append(rows["step"][known])
                    values.append(column[known])
                elif _is_rank_of_module(name) and (last := column[~np.isnan(column)]).size:
                    ranks.append((cell, seed, name.removeprefix(RANK), last[-1]))
        curves = pd.DataFrame(columns=CURVE_COLUMNS)
        if keys:
            frame = pd.DataFrame(keys, columns=["cell", "seed", "metric"])
            curves = frame.loc[frame.index.repeat([len(column) for column in values])].reset_index(drop=True)
            curves = curves.assign(step=np.concatenate(steps), value=np.concatenate(values))
        return curves, pd.DataFrame(ranks, columns=["cell", "seed", "module", "rank"])


def gather(paths: Sequence[Path]) -> Gathered:
    """Reads one study, or any number of run folders and folders of runs.

    Raises:
        CheckpointError: if a path holds neither, if a study is given with something else, or if a file
            cannot be read.
    """
    studies = [path for path in paths if (path / STUDY).is_file()]
    if studies and len(paths) > 1:
        raise CheckpointError(
            f"{studies[0]}: is a study, and a report shows one study or any number of runs; give it alone."
        )
    return read_study(studies[0]) if studies else read_runs(paths)


def read_study(folder: Path) -> Gathered:
    """Reads the folder of a study, finished or not.

    Raises:
        CheckpointError: if it has no results yet, or a file cannot be read.
    """
    if not (folder / RESULTS).is_file():
        raise CheckpointError(f"{folder}: has no results yet; lora-lab ablate makes its runs.")
    # Results may be kept next to the study's file, which does not have to contain its name.
    study = {"name": folder.resolve().name, **_yaml(folder / STUDY)}
    missing = [name for name in ("metric", "baseline", "name") if not study.get(name)]
    try:
        runs = _table(folder / RESULTS)
        validations = folder / VALIDATIONS
        learned = _table(validations) if validations.is_file() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its results cannot be read ({error}).") from error
    missing += [name for name in ("cell", "phase", "seed", "status", "run") if name not in runs]
    if missing:
        raise CheckpointError(
            f"{folder}: is not a study that lora-lab ablate wrote: {', '.join(missing)} missing"
        )
    if study["metric"] not in runs:
        raise CheckpointError(
            f"{folder}: no run has logged {study['metric']} yet; lora-lab ablate finishes its runs."
        )
    source = folder / str(study.get("source", STUDY))
    ablate = ["lora-lab", "ablate", _short(source), *map(str, study.get("overrides") or ())]
    folders = [path if (path := folder / str(run)).is_dir() else None for run in runs["run"]]
    waiting = _waiting(runs, study)
    return Gathered(
        title=str(study["name"]),
        metric=str(study["metric"]),
        runs=pd.concat([runs, waiting], ignore_index=True) if len(waiting) else runs,
        folders=[*folders, *[None] * len(waiting)],
        commands=[shlex.join(ablate), f"lora-lab report {shlex.quote(_short(folder))}"],
        question=study.get("question"),
        baseline=str(study["baseline"]),
        margin=study.get("equivalence"),
        differences=_json(folder / "differences.json") or (),
        tuning=_json(folder / "tuning.json") or {},
        matches={
            name: facts["match"] for name, facts in (study.get("cells") or {}).items() if facts.get("match")
        },
        validations=None if learned is None else _of_finished(learned, runs),
    )


def _table(path: Path) -> pd.DataFrame:
    """Reads a table in which a cell's name is the text that stands there, be it "1e-3" or "NA"."""
    names = pd.read_csv(path, nrows=0).columns
    empty = {name: ["", "nan", "NaN"] for name in names if name != "cell"}
    return pd.read_csv(path, dtype={"cell": str}, keep_default_na=False, na_values=empty)


def _waiting(runs: pd.DataFrame, study: Mapping[str, Any]) -> pd.DataFrame:
    """Returns a row for each compared run that the study plans and has not started."""
    started = runs[runs["phase"] == COMPARE]
    known = set(zip(started["cell"], started["seed"].astype(int), strict=True))
    rows = [
        {"cell": str(cell), "phase": COMPARE, "seed": int(seed), "status": WAITING}
        for cell in study.get("cells") or {}
        for seed in study.get("seeds") or ()
        if (str(cell), int(seed)) not in known
    ]
    return pd.DataFrame(rows)


def _of_finished(validations: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of the compared runs that finished; the others are in no mean."""
    finished = runs[(runs["phase"] == COMPARE) & (runs["status"] == FINISHED)][["cell", "seed"]]
    return validations[validations["phase"] == COMPARE].merge(finished, on=["cell", "seed"])


def read_runs(paths: Sequence[Path]) -> Gathered:
    """Reads run folders; runs whose configs differ only in the seed are one cell.

    Raises:
        CheckpointError: if a path holds no run, no run has a metric, or a file cannot be read.
    """
    folders = sorted({folder for path in paths for folder in _run_folders(path)})
    records = {folder: _record(folder) for folder in folders}
    settings = {folder: _settings(folder, records[folder]) for folder in folders}
    names = _cell_names(settings)
    metric = _common_metric(records.values())
    rows, seen = [], set[tuple[str, int]]()
    for folder in folders:
        record, seed = records[folder], int(records[folder].get("seed", 0))
        cell = names[folder] if (names[folder], seed) not in seen else f"{names[folder]} ({folder.name})"
        seen.add((cell, seed))
        milliseconds = record.get("median_step_milliseconds")
        row = {
            "cell": cell,
            "phase": COMPARE,
            "seed": seed,
            "status": record["status"],
            "error": record.get("error"),
            "run": _short(folder),
            "trained_parameters": record.get("trainable_parameters"),
            "adapter_parameters": record.get("method_parameters"),
            "step_seconds": None if milliseconds is None else milliseconds / 1000,
            "peak_megabytes": record.get("peak_memory_megabytes"),
            "seconds": record.get("wall_seconds"),
            **{k: v for k, v in (record.get("metrics") or {}).items() if not k.startswith("train/")},
        }
        rows.append(row)
    shown = folders[:3]
    return Gathered(
        title=" + ".join(sorted({str(record.get("experiment")) for record in records.values()})[:3]),
        metric=metric,
        runs=pd.DataFrame(rows),
        folders=folders,
        commands=[
            *(f"lora-lab train {shlex.quote(_short(folder / CONFIG))}" for folder in shown),
            *([f"… and {len(folders) - len(shown)} more"] if len(folders) > len(shown) else []),
            f"lora-lab report {shlex.join(map(_short, paths))}",
        ],
        differences=_differences(names, settings),
    )


def _run_folders(path: Path) -> list[Path]:
    found = [path] if (path / RECORD).is_file() else [record.parent for record in path.rglob(RECORD)]
    if not found:
        raise CheckpointError(
            f"{path}: holds neither a study nor runs. Name the folder of a study, of a run, or one that "
            "holds runs."
        )
    return found


def _common_metric(records: Iterable[Mapping[str, Any]]) -> str:
    """Returns the metric by which most runs can be compared: their task's, of test before validation."""
    logged = [set(record.get("metrics") or {}) for record in records]
    names = [f"{split}/{task.monitor}" for split in ("test", "validation") for task in TASKS.values()]
    counts = {name: sum(name in metrics for metrics in logged) for name in [*names, "validation/loss"]}
    best = max(counts, key=lambda name: counts[name])
    if not counts[best]:
        raise CheckpointError("None of these runs has finished; there is nothing to compare yet.")
    return best


def _settings(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides a run's result."""
    config = (
        _yaml(folder / CONFIG) if (folder / CONFIG).is_file() else {"adapter": {"method": record["method"]}}
    )
    return {name: value for name, value in config.items() if name not in APART}


def _cell_names(settings: Mapping[Path, Mapping[str, Any]]) -> dict[Path, str]:
    """Names each run by its method, and by the settings that differ between runs of this method."""
    method = "adapter.method"
    settings = {folder: flat(found) for folder, found in settings.items()}
    groups: dict[Any, list[Path]] = {}
    for folder, found in settings.items():
        groups.setdefault(found.get(method), []).append(folder)
    names = {}
    for kind, folders in groups.items():
        keys = _differing([settings[folder] for folder in folders])
        for folder in folders:
            parts = [str(kind)]
            parts += [f"{key.rpartition('.')[2]}={settings[folder].get(key)}" for key in keys]
            names[folder] = " ".join(parts)
    return names


def _differing(found: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for settings in found for key in settings)
    return [key for key in keys if any(found[0].get(key) != settings.get(key) for settings in found)]


def _differences(
    names: Mapping[Path, str], settings: Mapping[Path, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns, as for a study, the keys in which each cell differs from the first one."""
    cells = {name: settings[folder] for folder, name in reversed(list(names.items()))}
    first, *others = dict.fromkeys(names.values())
    found = []
    for cell in others:
        values = differing(cells[first], cells[cell])
        found.append({"cell": cell, "baseline": first, "keys": sorted(values), "values": values})
    return found


def _is_rank_of_module(name: str) -> bool:
    known = (f"{RANK}effective", f"{RANK}stable", f"{RANK}mean", f"{RANK}total")
    return name.startswith(RANK) and not name.startswith(known)


def _short(path: Path) -> str:
    """Returns a path relative to the working folder, if it is inside."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _logged(path: Path) -> dict[str, NDArray[np.float64]]:
    """Reads the columns of `metrics.csv`, without an incomplete last line."""
    if not path.is_file():
        return {}
    try:
        text = path.read_bytes()
        lines = pa.BufferReader(text[: text.rfind(b"\n") + 1])
        table = pyarrow.csv.read_csv(lines, pyarrow.csv.ReadOptions(use_threads=False))
        columns = {name: table[name].cast(pa.float64()).to_numpy() for name in table.column_names}
    except (OSError, pa.ArrowInvalid) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error
    return columns if "step" in columns else {}


def _parquet(path: Path) -> pd.DataFrame:
    try:
        return pyarrow.parquet.read_table(path, use_threads=False).to_pandas()
    except (OSError, pa.ArrowInvalid) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error


def _record(folder: Path) -> Mapping[str, Any]:
    record = _json(folder / RECORD)
    if record is not None and not (isinstance(record, dict) and "status" in record):
        raise CheckpointError(f"{folder / RECORD}: is not a record of a run.")
    return record or {}


def _json(path: Path) -> Any:
    """Reads a JSON file; None if there is none."""
    return read_json(path) if path.is_file() else None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
        # The strict reader is too slow for 1,000 runs, and what a run writes has no aliases.
        if "*" in text or text.count("[") + text.count("{") > MOST_FLOW:
            found = plain(parse_yaml(text, str(path)))
        else:
            found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except DocumentError as error:
        raise CheckpointError(str(error)) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no settings.")
    return found
