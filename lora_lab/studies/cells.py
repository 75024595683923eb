"""From a study's file to cells, each a composed config; every fault of every cell in one message.

A cell's layers are those of an experiment: the files in `extends`, `experiment:`, the command line, and then
the cell's own settings. They are composed by `config.compose`, as every run is.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from lora_lab.config.compose import COMMAND_LINE, Layer, compose_layers, parse_overrides, read_layers
from lora_lab.config.schema import ExperimentConfig, differing
from lora_lab.documents.reading import flat, plain, references, texts
from lora_lab.documents.structured import fill
from lora_lab.errors import ConfigError, LabError, suggest
from lora_lab.experiment.folder import RunFolder
from lora_lab.statistics.metrics import higher_is_better
from lora_lab.studies.matching import TOLERANCE, Match, Matcher
from lora_lab.studies.spec import StudySpec
from lora_lab.studies.tuning import Tuning, read_tuning
from lora_lab.tasks import TASKS

Phase = Literal["tune", "compare"]

OWN_KEYS = ("seed", "run", "name", "continues")
"""Settings of a run that only the study sets."""
STUDY_NAMES = tuple(field.name for field in fields(StudySpec))
MOST_CELLS = 1000
LONGEST_NAME = 200
"""Most bytes of a name that becomes a part of a folder's; file systems allow 255 for the whole."""


@dataclass(frozen=True)
class Cell:
    """One of the configurations that a study compares."""

    name: str
    keys: dict[str, Any]
    """The grid's keys and this cell's values; empty for cells of `list`."""
    layers: list[Layer]
    """All settings but the seed and what is tuned."""
    config: ExperimentConfig
    """The composed config, with the first seed and what is tuned as the files have it."""
    resets: list[str]
    """What a change of method resets, as sentences."""
    match: Match | None = None
    """The chosen size, if the study matches parameters."""
    _tuned: dict[str, ExperimentConfig] = field(default_factory=dict, compare=False)

    def tuned(self, key: str, value: Any) -> ExperimentConfig:
        """Returns the config with another value of one key.

        Raises:
            ConfigError: if the value does not fit.
        """
        name = f"{key}={value!r}"
        if name not in self._tuned:
            layer = Layer(f"{self.layers[-1].source}: tune", nested({key: value}))
            self._tuned[name] = compose_layers([*self.layers, layer], tell=lambda text: None)
        return self._tuned[name]

    def fits(self, key: str, value: Any) -> bool:
        """Returns whether the config may have this value of a key."""
        try:
            self.tuned(key, value)
        except ConfigError:
            return False
        return True


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    cell: str
    phase: Phase
    seed: int
    value: Any
    """Value of the tuned key; None without tuning."""
    config: ExperimentConfig = field(compare=False)
    order: tuple[int, ...] = field(compare=False, default=())
    """Order in which jobs are started."""

    @property
    def folder(self) -> RunFolder:
        """Where the run is."""
        return RunFolder.of(self.config)


@dataclass
class Study:
    """A checked study."""

    source: Path
    spec: StudySpec
    cells: list[Cell]
    tuning: Tuning | None
    grid: dict[str, list[Any]]
    """The grid's keys and plain values."""
    listed: dict[str, Any]
    """The settings of `list`, plain."""
    overrides: tuple[str, ...] = ()
    """Settings of the command line."""

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.spec.name)

    @property
    def folder(self) -> Path:
        """The folder of its results and runs."""
        return Path(self.cells[0].config.output) / self.name

    def cell(self, name: str) -> Cell:
        """Returns the cell of this name."""
        return next(cell for cell in self.cells if cell.name == name)

    def job(self, cell: Cell, phase: Phase, seed: int, value: Any = None) -> Job:
        """Returns one run: the cell with a seed and a value of the tuned key."""
        config = cell.config if self.tuning is None else cell.tuned(self.tuning.key, value)
        config = replace(config, seed=seed, name=self.name)
        tracking = replace(
            config.tracking,
            group=config.tracking.group or self.name,
            job_type=phase,
            cell=cell.name,
        )
        stem = folder_name(cell.name) + ("-tune" if phase == "tune" else "")
        run = f"{stem}-seed{seed}-{config.hash()[:8]}"
        trainer = replace(config.trainer, progress_bar=False)
        config = replace(config, run=run, tracking=tracking, trainer=trainer)
        seeds = self.spec.seeds if phase == "compare" or self.tuning is None else self.tuning.seeds
        order = (int(phase == "compare"), seeds.index(seed), self.cells.index(cell))
        return Job(cell.name, phase, seed, value, config, order)

    def differences(self) -> list[dict[str, Any]]:
        """Returns, for each cell, the keys beyond the grid in which it differs from the baseline."""
        baseline = self.cell(self.spec.baseline)
        expected = [*self.grid, *([self.tuning.key] if self.tuning else [])]
        found = []
        for cell in self.cells:
            if cell is baseline:
                continue
            values = {
                name: found
                for name, found in differing(baseline.config.decisive(), cell.config.decisive()).items()
                if not under(name, expected)
            }
            row = {"cell": cell.name, "baseline": baseline.name, "keys": sorted(values), "values": values}
            found.append(row)
        return found

    def resolved(self) -> dict[str, Any]:
        """Returns the study as it was read, of plain values."""
        return {
            "name": self.name,
            "question": self.spec.question,
            "source": os.path.relpath(self.source, self.folder),
            "overrides": list(self.overrides),
            "metric": self.spec.metric,
            "higher_is_better": higher_is_better(self.spec.metric),
            "baseline": self.spec.baseline,
            "equivalence": self.spec.equivalence,
            "seeds": list(self.spec.seeds),
            "grid": self.grid,
            "list": self.listed,
            "tune": asdict(self.tuning) if self.tuning else None,
            "match_parameters": self.spec.match_parameters,
            "cells": {cell.name: self._cell_facts(cell) for cell in self.cells},
        }

    def _cell_facts(self, cell: Cell) -> dict[str, Any]:
        match = asdict(cell.match) if cell.match else None
        return {"method": cell.config.adapter.method, "keys": cell.keys, "match": match}


def read_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Study:
    """Reads a study and composes all its cells; nothing is written.

    Args:
        path: the study's YAML file.
        overrides: `key=value` settings of the study (`seeds=[0,1]`) or of all runs (`trainer.max_epochs=1`).

    Raises:
        ConfigError: with one line per fault, those of all cells.
    """
    path = Path(path)
    *base, own = read_layers(path)
    faults: list[str] = []
    command_line = []
    for layer in parse_overrides(overrides):
        ((name, given),) = layer.settings.items()
        if name in STUDY_NAMES:
            kept = own.settings.get(name)
            # What is no mapping, or empty, takes the place of what the file has, and is checked as that is.
            if isinstance(given, Mapping) and given and isinstance(kept, Mapping):
                given = flat(kept) | flat(given) if name == "grid" else _merged(kept, given)
            own = Layer(own.source, {**own.settings, name: given})
        else:
            command_line.append(layer)
    for layer in base:
        if strange := [name for name in STUDY_NAMES if name in layer.settings and name not in OWN_KEYS]:
            faults.append(f"{layer.source}: {strange[0]}: belongs to a study, not to what it extends")
    settings = dict(own.settings)
    if references([settings.get(name) for name in ("grid", "list", "tune")]):
        faults.append(f"{path}: grid, list and tune hold no `${{…}}`; write the values")
    raw = {name: settings.pop(name, None) for name in ("experiment", "grid", "list", "tune")}
    schema = OmegaConf.structured(StudySpec)
    fill(schema, settings, str(path), faults)
    for key in sorted(OmegaConf.missing_keys(schema)):
        if not any(f": {key}: " in fault for fault in faults):
            faults.append(f"{path}: {key}: is required and has no default; set it in the file")
        schema[key] = ""
    spec: StudySpec = OmegaConf.to_object(schema)  # type: ignore[assignment]
    if not spec.question.strip() and not any(": question: " in fault for fault in faults):
        faults.append(f"{path}: question: is empty; ask what the study answers")
    if spec.name is None:
        spec.name = path.resolve().parent.name if path.stem == "study" else path.stem
    if not spec.name or spec.name in (".", "..") or set(spec.name) & set("/\0\n"):
        faults.append(f"{path}: name: must be a plain folder name; got {spec.name!r}")
    elif len(os.fsencode(spec.name)) > LONGEST_NAME:
        faults.append(f"{path}: name: must have at most {LONGEST_NAME} bytes; got {spec.name!r}")
    experiment = _mapping(raw["experiment"], f"{path}: experiment", faults)
    base = [*base, Layer(f"{path}: experiment", experiment), *command_line]
    _check_own_keys(base, faults)
    tuning = read_tuning(raw["tune"], path, faults)
    grid = _grid(raw["grid"], path, faults)
    listed = _listed(raw["list"], path, faults)
    faults += _seed_faults(spec, tuning, path)
    cells = _cells(grid, listed, path, faults)
    fixed = [key for layer in command_line for key in flat(layer.settings)]
    for key in sorted({key for _, keys, own_ in cells for key in flat(own_.settings)}):
        if under(key, fixed) or any(under(given, [key]) for given in fixed):
            faults.append(f"{COMMAND_LINE}: {key}: is what the study compares; set it in only one of the two")
    composed = _composed(cells, base, spec, faults)
    if tuning:
        faults += _tuning_faults(tuning, composed, path)
    faults += _study_faults(spec, composed, [name for name, _, _ in cells], tuning, path)
    if spec.match_parameters is not None and spec.match_parameters > 0 and composed:
        composed = _matched(composed, spec.match_parameters, tuning, path, faults)
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    plain_grid = {key: [plain(value) for value in values] for key, values in grid.items()}
    return Study(path, spec, composed, tuning, plain_grid, plain(listed), tuple(overrides))


def _mapping(tree: Any, where: str, faults: list[str]) -> dict[str, Any]:
    """Returns a mapping with dotted keys nested; {} and a fault if it is not a mapping."""
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        faults.append(f"{where}: must hold keys and values; got {plain(tree)!r}")
        return {}
    wrong = [name for name in tree if not all(name.split("."))]
    if wrong:
        faults.append(f"{where}: '{wrong[0]}' is not a key; write names between dots, as in adapter.rank")
        return {}
    return nested(tree)


def _grid(tree: Any, path: Path, faults: list[str]) -> dict[str, list[Any]]:
    if tree is None:
        return {}
    if not isinstance(tree, Mapping) or not tree:
        faults.append(f"{path}: grid: must hold keys, each with a list of values; got {plain(tree)!r}")
        return {}
    found: dict[str, list[Any]] = {}
    for key, values in flat(tree).items():
        where = f"{path}: grid.{key}"
        if not isinstance(values, list):
            faults.append(f"{where}: must be a list of values; write [{texts(values)}]")
        elif not values:
            faults.append(f"{where}: is empty; give at least one value")
        elif any(isinstance(value, Mapping) for value in values):
            faults.append(f"{where}: a value with several settings needs a name; put such cells under `list`")
        elif not all(key.split(".")):
            faults.append(f"{where}: is not a key; write names between dots, as in adapter.rank")
        elif twice := _twice([repr(plain(value)) for value in values]):
            faults.append(f"{where}: {twice[0]} occurs twice")
        else:
            found[key] = values
    for one, two in itertools.permutations(found, 2):
        if under(one, [two]):
            faults.append(f"{path}: grid.{one}: lies within grid.{two}; keep one of them")
    if (count := _product(found.values())) > MOST_CELLS:
        faults.append(f"{path}: grid: makes {count:,} cells; at most {MOST_CELLS:,} are run")
        return {}
    return found


def _listed(tree: Any, path: Path, faults: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    if tree is not None and (not isinstance(tree, Mapping) or not tree):
        faults.append(f"{path}: list: must hold named cells with their settings; got {plain(tree)!r}")
        return {}
    for name, settings in (tree or {}).items():
        found[str(name)] = _mapping(settings, f"{path}: list.{name}", faults)
    return found


def _cells(
    grid: Mapping[str, list[Any]], listed: Mapping[str, dict[str, Any]], path: Path, faults: list[str]
) -> list[tuple[str, dict[str, Any], Layer]]:
    """Returns name, grid keys with plain values, and settings of each cell."""
    found = []
    # One source for all, so that a fault in their common part is reported once.
    for values in itertools.product(*grid.values()) if grid else ():
        own = dict(zip(grid, values, strict=True))
        varied = [key for key in grid if len(grid[key]) > 1] or list(grid)
        name = "-".join(_label(key, own[key]) for key in varied)
        found.append((name, {key: plain(value) for key, value in own.items()}, Layer(str(path), nested(own))))
    found += [(name, {}, Layer(str(path), own)) for name, own in listed.items()]
    if not found and not any(": grid" in fault or ": list" in fault for fault in faults):
        faults.append(
            f"{path}: grid: a study needs cells; name the values of a key in `grid`, or cells in `list`"
        )
    for name in _twice([name for name, _, _ in found]):
        faults.append(f"{path}: list.{name}: a cell of the grid has the same name; rename it")
    for name, _, layer in found:
        if not name.strip() or not name.isprintable():
            faults.append(f"{path}: list: the name of a cell must be plain text; got {name!r}")
        elif len(os.fsencode(name)) > LONGEST_NAME:
            faults.append(
                f"{path}: a cell's name must have at most {LONGEST_NAME} bytes; got {name!r}. "
                "Name it yourself, under `list`"
            )
        for key in OWN_KEYS:
            if key in layer.settings:
                faults.append(f"{path}: {key}: is set by the study itself, see seeds and name (cell {name})")
        if "output" in layer.settings:
            faults.append(
                f"{path}: output: all runs of a study are in one folder; set it in experiment (cell {name})"
            )
    return found


def _composed(
    cells: Sequence[tuple[str, dict[str, Any], Layer]], base: list[Layer], spec: StudySpec, faults: list[str]
) -> list[Cell]:
    """Composes all valid cells; a fault that several cells have is reported once."""
    found: list[Cell] = []
    found_in: dict[str, list[str]] = {}
    for name, keys, layer in cells:
        layers = [*base, layer]
        resets: list[str] = []
        try:
            config = compose_layers(layers, tell=resets.append)
        except ConfigError as error:
            for line in str(error).split("\n"):
                found_in.setdefault(line, []).append(name)
            continue
        found.append(Cell(name, keys, layers, config, resets))
    for line, names in found_in.items():
        which = "every cell" if len(names) == len(cells) > 1 else f"cell {few(names)}"
        faults.append(f"{line} ({which})")
    alike: dict[str, list[str]] = {}
    for cell in found:
        for key in ("cell", "job_type"):
            if getattr(cell.config.tracking, key) is not None:
                faults.append(
                    f"{cell.layers[-1].source}: tracking.{key}: is set by the study itself; remove it"
                )
        alike.setdefault(cell.config.hash(), []).append(cell.name)
        if cell.config.trainer.devices != 1:
            faults.append(
                f"{cell.layers[-1].source}: trainer.devices: each run of a study has one device; got "
                f"{cell.config.trainer.devices}. Leave it at 1, and give `ablate` more --workers"
            )
    for names in alike.values():
        if len(names) > 1:
            faults.append(
                f"{found[0].layers[-1].source}: cells {few(names)} are the same run; keep one of them"
            )
    return found


def _seed_faults(spec: StudySpec, tuning: Tuning | None, path: Path) -> list[str]:
    found = []
    for where, seeds in (("seeds", spec.seeds), ("tune.seeds", tuning.seeds if tuning else None)):
        if seeds is None:
            continue
        if not seeds:
            found.append(f"{path}: {where}: give at least one seed")
        if twice := _twice(seeds):
            found.append(f"{path}: {where}: {twice[0]} occurs twice; each seed is one run")
        if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
            found.append(f"{path}: {where}: must lie from 0 to {2**32 - 1}; got {wrong[0]}")
    if tuning and (common := sorted({*spec.seeds} & {*tuning.seeds})):
        found.append(
            f"{path}: tune.seeds: {common[0]} is also a seed of the comparison, whose runs the search would "
            "have used; use other seeds, such as 100"
        )
    return found


def _tuning_faults(tuning: Tuning, cells: Sequence[Cell], path: Path) -> list[str]:
    """Returns the faults that show after cells are composed; fills in the deciding metric."""
    found: list[str] = []
    if not cells:
        return found
    task = cells[0].config.model.task
    if tuning.by is None:
        tuning.by = f"validation/{TASKS[task].monitor}"
    if tuning.by.startswith("test/"):
        found.append(
            f"{path}: tune.by: {tuning.by} is of test data, which must not decide; name a validation metric"
        )
    elif tuning.by not in (known := [name for name in metric_names(task) if name.startswith("validation/")]):
        found.append(f"{path}: tune.by: no run logs '{tuning.by}'{suggest(tuning.by, known)}")
    else:
        tuning.higher_is_better = higher_is_better(tuning.by)
    untuned = (*OWN_KEYS, "tracking", "output", "data", "model", "trainer.devices")
    if under(tuning.key, untuned):
        return [
            *found,
            f"{path}: tune.key: '{tuning.key}' is not a setting that a search on validation can choose",
        ]
    found_in: dict[str, list[str]] = {}
    for cell in cells:
        own = flat(cell.layers[-1].settings)
        if under(tuning.key, own) or any(under(key, [tuning.key]) for key in own):
            found.append(
                f"{path}: tune.key: cell '{cell.name}' sets {tuning.key} itself; keep one of the two"
            )
            continue
        for value in tuning.extremes():
            try:
                cell.tuned(tuning.key, value)
            except ConfigError as error:
                lines = str(error).split("\n")
                if tuning.values is None and _takes_whole_numbers(cell, tuning.key, round(value)):
                    lines = [f"{path}: tune.low: {tuning.key} takes whole numbers; list them in `values`"]
                for line in lines:
                    found_in.setdefault(line, []).append(cell.name)
    if tuning.values is not None and not found and not found_in:
        runs = [cells[0].tuned(tuning.key, value).hash() for value in tuning.values]
        if twice := _twice(runs):
            same = [repr(value) for value, run in zip(tuning.values, runs, strict=True) if run == twice[0]]
            found.append(f"{path}: tune.values: {few(same)} are the same run; keep one of them")
    return found + [f"{line} (cell {few(list(dict.fromkeys(names)))})" for line, names in found_in.items()]


def _takes_whole_numbers(cell: Cell, key: str, number: int) -> bool:
    return cell.fits(key, number) and not cell.fits(key, float(number))


def _study_faults(
    spec: StudySpec, cells: Sequence[Cell], names: Sequence[str], tuning: Tuning | None, path: Path
) -> list[str]:
    found = []
    if spec.baseline and spec.baseline not in names and names:
        found.append(f"{path}: baseline: no cell '{spec.baseline}'{suggest(spec.baseline, names)}")
    if spec.equivalence is not None and not 0 < spec.equivalence < math.inf:
        found.append(f"{path}: equivalence: must be above 0 and finite; got {spec.equivalence}")
    if spec.match_parameters is not None and spec.match_parameters < 1:
        found.append(f"{path}: match_parameters: must be at least 1; got {spec.match_parameters}")
    if not cells:
        return found
    tasks = {cell.config.model.task for cell in cells}
    if len(tasks) > 1:
        found.append(
            f"{path}: cells have several tasks ({', '.join(sorted(tasks))}), whose metrics cannot be compared"
        )
    known = metric_names(cells[0].config.model.task)
    if not spec.metric:
        return found
    split = spec.metric.partition("/")[0]
    if spec.metric not in known:
        found.append(f"{path}: metric: no run logs '{spec.metric}'{suggest(spec.metric, known)}")
    elif split == "validation" and tuning:
        found.append(
            f"{path}: metric: {spec.metric} is of the data that the search used; compare by a test metric"
        )
    elif split == "test":
        for cell in cells:
            data = cell.config.data
            if not (data.has_test_split or data.test_fraction):
                found.append(
                    f"{path}: metric: no run logs '{spec.metric}', as data.source {data.source} has no "
                    "test rows; name them, set data.test_fraction, or compare by a validation metric"
                )
                break
    return found


def _matched(
    cells: list[Cell], count: int, tuning: Tuning | None, path: Path, faults: list[str]
) -> list[Cell]:
    """Gives each cell's method the size at which it trains nearest to `count` parameters."""
    matcher = Matcher(count)
    found = []
    for cell in cells:
        spec = cell.config.adapter
        where = f"{path}: match_parameters: cell '{cell.name}'"
        if spec.size_field is None:
            faults.append(f"{where}: {spec.method} has no field that sets its size; leave the cell out")
        elif f"adapter.{spec.size_field}" in flat(cell.layers[-1].settings):
            faults.append(
                f"{where}: sets adapter.{spec.size_field} itself, which the match would choose; remove it"
            )
        elif tuning and under(f"adapter.{spec.size_field}", [tuning.key]):
            faults.append(
                f"{where}: tune.key sets its size, which the match would choose; keep one of the two"
            )
        else:
            try:
                match = matcher.match(cell.config)
                layer = Layer(cell.layers[-1].source, {"adapter": {match.field: match.value}})
                layers = [*cell.layers, layer]
                config = compose_layers(layers, tell=lambda text: None)
                found.append(replace(cell, layers=layers, config=config, match=match, _tuned={}))
            except LabError as error:
                faults.append(f"{where}: {error}")
    if found and all(cell.match and cell.match.misses for cell in found):
        sizes = few([f"{cell.name} {cell.match.parameters:,}" for cell in found if cell.match])
        faults.append(
            f"{path}: match_parameters: no cell comes within {TOLERANCE:.0%} of {count:,}; the nearest are "
            f"{sizes}. Name a number that they can reach"
        )
    return found


def _check_own_keys(layers: Iterable[Layer], faults: list[str]) -> None:
    for layer in layers:
        own = layer.source == COMMAND_LINE or layer.source.endswith(": experiment")
        for key in OWN_KEYS if own else ("continues",):
            if key in layer.settings:
                faults.append(f"{layer.source}: {key}: is set by the study itself, see seeds and name")


def metric_names(task: str) -> list[str]:
    """Returns the metrics of validation and test that a run of this task ends with."""
    if task not in TASKS:
        return []
    names = ["loss", *map(str, TASKS[task].metrics(2))]
    return [f"{split}/{name}" for split in ("test", "validation") for name in names]


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with dotted keys as nested mappings."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        value = nested(value) if isinstance(value, Mapping) else value
        for name in reversed(key.split(".")):
            value = {name: value}
        found = _merged(found, value)
    return found


def under(key: str, others: Iterable[str]) -> bool:
    """Returns whether a key is one of the others, or within one."""
    return any(key == other or key.startswith(f"{other}.") for other in others)


def folder_name(cell: str) -> str:
    """Returns a cell's name as a part of a folder's."""
    return "".join("_" if letter in '/\\:*?"<>| \t' else letter for letter in cell)


def _merged(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(one)
    for name, value in two.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _merged(found[name], value) if both else value
    return found


def _label(key: str, value: Any) -> str:
    """Returns a value's part of a cell's name: text itself, numbers with the last part of their key."""
    text = texts(value)
    if isinstance(text, list):
        return "+".join(map(str, text))
    if isinstance(value, str):
        return value
    return f"{key.rpartition('.')[2]}{'none' if text is None else text}"


def _twice(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(value for value in values if values.count(value) > 1))


def few(names: Sequence[str]) -> str:
    """Returns some names, and the number of others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _product(lists: Iterable[Sequence[Any]]) -> int:
    count = 1
    for values in lists:
        count *= len(values)
    return count


def jobs_of(study: Study, phase: Phase, cell: Cell, values: Sequence[Any]) -> Iterator[Job]:
    """Yields the runs of a cell for all seeds of a phase and these values of the tuned key."""
    seeds = study.tuning.seeds if phase == "tune" and study.tuning else study.spec.seeds
    for value in values:
        for seed in seeds:
            yield study.job(cell, phase, seed, value)
