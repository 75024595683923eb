"""Each cell's search for the best value of one key, on validation data and with other seeds.

A search gets all results so far and returns the values to try. Its only state is what Optuna stores in the
study's folder, so a killed study continues where it was.
"""

from __future__ import annotations

import importlib.util
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from lora_lab.documents.reading import Scalar, plain, texts
from lora_lab.documents.structured import fill
from lora_lab.report.search import good_values
from lora_lab.studies.spec import TuneSpec

STORAGE = "optuna.journal"
"""File in the study's folder that holds Optuna's searches."""
EDGE = 0.1
"""Share of a range, at each end, in which a best value counts as at the edge."""


@dataclass
class Tuning:
    """A checked `tune:`."""

    key: str
    values: list[Any] | None
    low: float | None
    high: float | None
    trials: int | None
    log: bool
    by: str | None
    seeds: list[int]
    higher_is_better: bool = True
    """Whether more of `by` is better."""

    def extremes(self) -> list[Any]:
        """Returns values that must be valid in every cell: all of a list, the ends of a range."""
        return self.values if self.values is not None else [self.low, self.high]

    def count(self) -> int:
        """Returns the number of values to try."""
        return len(self.values) if self.values is not None else int(self.trials or 0)

    def proposals(self, cell: str, scores: Mapping[Any, float | None], folder: Path | None) -> list[Any]:
        """Returns the values to try so far; there are no new ones until all of these have a score.

        Args:
            cell: name of the cell.
            scores: value → mean of the metric, None if its runs have no result.
            folder: where Optuna's storage is; None does not use Optuna.
        """
        if self.values is not None:
            return self.values
        return [] if folder is None else self._trials(cell, scores, folder)

    def best(self, scores: Mapping[Any, float | None]) -> Any:
        """Returns the value of the best score, the first of several; None if there is no score."""
        useful = {
            value: score for value, score in scores.items() if score is not None and math.isfinite(score)
        }
        if not useful:
            return None
        return max(useful, key=lambda value: useful[value] if self.higher_is_better else -useful[value])

    def at_edge(
        self,
        best: Any,
        scores: Mapping[Any, float | None],
        margin: float | None,
        fits: Callable[[Any], bool],
    ) -> str | None:
        """Returns the settings that widen the search, if the best value is at its edge.

        It is not if the next value inside is as good, or if no value further out would be valid.

        Args:
            best: the best value.
            scores: value → mean of the metric.
            margin: the difference that counts as none, as `search_margin` returns it.
            fits: says whether a value is valid.
        """
        inner: Any
        if self.values is not None:
            numbers = sorted(v for v in self.values if isinstance(v, int | float) and not isinstance(v, bool))
            if len(numbers) != len(self.values) or len(numbers) < 2 or best not in (numbers[0], numbers[-1]):
                return None
            end, inner = (numbers[0], numbers[1]) if best == numbers[0] else (numbers[-1], numbers[-2])
            whole = all(isinstance(number, int) for number in numbers)
            beyond = end * (end / inner) if numbers[0] > 0 else 2 * end - inner
            # To the fewest digits, from two on, that lie beyond the end; whole if the key takes only such.
            rounded = (float(f"{beyond:.{digits}g}") for digits in range(2, 17))
            further = next((v for v in rounded if (v - end) * (end - inner) > 0), beyond)
            further = round(beyond) if whole and not fits(further) else further
            setting = f"'tune.values={sorted([*numbers, further])}'"
        else:
            low, high = cast(float, self.low), cast(float, self.high)
            places = {
                v: math.log(v / low) / math.log(high / low) if self.log else (v - low) / (high - low)
                for v in scores
            }
            inside = [value for value, place in places.items() if EDGE <= place <= 1 - EDGE]
            if best in inside:
                return None
            upper = places[best] > 0.5
            inner = max(inside, default=None) if upper else min(inside, default=None)
            if self.log:
                further = high * 10 if upper else low / 10
            else:
                further = 2 * high - low if upper else 2 * low - high
            setting = f"tune.{'high' if upper else 'low'}={further:g}"
        return None if inner in good_values(scores, best, margin) or not fits(further) else setting

    def _trials(self, cell: str, scores: Mapping[Any, float | None], folder: Path) -> list[float]:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from optuna.trial import TrialState

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        low, high, trials_wanted = cast(float, self.low), cast(float, self.high), cast(int, self.trials)
        storage = JournalStorage(JournalFileBackend(str(folder / STORAGE)))
        name = f"{cell} {self.key} {low} {high} {self.log} {self.by} {self.seeds}"
        found: list[float] = []
        for number in range(trials_wanted):
            # A sampler for each trial: its draws depend on the trials before, not on how often the study was
            # killed.
            sampler = optuna.samplers.TPESampler(
                seed=zlib.crc32(f"{name} {number}".encode()), n_startup_trials=max(3, trials_wanted // 2)
            )
            search = optuna.create_study(
                storage=storage,
                sampler=sampler,
                study_name=name,
                direction="maximize" if self.higher_is_better else "minimize",
                load_if_exists=True,
            )
            trials = search.get_trials(deepcopy=False)
            if number < len(trials):
                trial = optuna.trial.Trial(search, trials[number]._trial_id)
                state = trials[number].state
            else:
                trial, state = search.ask(), TrialState.RUNNING
            value = trials[number].params.get(self.key) if number < len(trials) else None
            if value is None:
                value = trial.suggest_float(self.key, low, high, log=self.log)
            found.append(value)
            if value not in scores:
                break
            if state == TrialState.RUNNING:
                score = scores[value]
                usable = score is not None and math.isfinite(score)
                search.tell(
                    trial, score if usable else None, state=TrialState.COMPLETE if usable else TrialState.FAIL
                )
        return found


def read_tuning(tree: Any, path: Path, faults: list[str]) -> Tuning | None:
    """Reads a study's `tune:`; returns None if there is none, or it cannot be read."""
    if tree is None:
        return None
    where = f"{path}: tune"
    if not isinstance(tree, Mapping):
        faults.append(f"{where}: must hold key, values and seeds; got {plain(tree)!r}")
        return None
    before = len(faults)
    settings = dict(tree)
    values = settings.pop("values", None)
    schema = OmegaConf.structured(TuneSpec)
    fill(schema, settings, str(path), faults, "tune.")
    if OmegaConf.is_missing(schema, "key"):
        faults.append(f"{where}.key: is required; name what is tuned, optimization.learning_rate for example")
        return None
    spec: TuneSpec = OmegaConf.to_object(schema)  # type: ignore[assignment]
    ends = (spec.low, spec.high, spec.trials)
    if values is not None:
        faults += _value_faults(values, ends, where)
    elif None in ends:
        faults.append(f"{where}: needs `values`, or `low`, `high` and `trials`")
    elif spec.low is not None and spec.high is not None and spec.trials is not None:
        if not spec.low < spec.high or not (math.isfinite(spec.low) and math.isfinite(spec.high)):
            faults.append(f"{where}.low: must be below high; got {spec.low} and {spec.high}")
        elif spec.log and spec.low <= 0:
            faults.append(f"{where}.low: must be above 0 on a logarithmic scale; got {spec.low}")
        if spec.trials < 1:
            faults.append(f"{where}.trials: must be at least 1; got {spec.trials}")
        if importlib.util.find_spec("optuna") is None:
            faults.append(
                f"{where}.low: a range is searched by Optuna; pip install 'lora_lab[study]', or give `values`"
            )
    if len(faults) > before:
        return None
    numbers = None if values is None else [plain(value) for value in values]
    return Tuning(spec.key, numbers, *ends, spec.log, spec.by, spec.seeds)


def _value_faults(values: Any, ends: tuple[Any, ...], where: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, Scalar | str) for value in values):
        return [f"{where}.values: must be a list of plain values; got {texts(values)!r}"]
    found = []
    if len(values) < 2:
        found.append(f"{where}.values: a search needs at least two values; got {texts(values)}")
    seen = [repr(plain(value)) for value in values]
    if len({*seen}) < len(seen):
        found.append(f"{where}.values: {next(v for v in seen if seen.count(v) > 1)} occurs twice")
    if any(end is not None for end in ends):
        found.append(f"{where}.values: excludes low, high and trials; give one or the other")
    return found
