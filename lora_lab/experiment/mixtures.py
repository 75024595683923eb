"""A mixture of finished runs, on the data of each."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L

from lora_lab.adapters.storage import load_adapter
from lora_lab.config.schema import ExperimentConfig
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.experiment import build_base, evaluation_data, measure, open_evaluation, quiet_libraries


@dataclass(frozen=True)
class Judged:
    """What one source's data say."""

    path: Path
    """The source's run."""
    alone: dict[str, float]
    """The metrics of the source's own adapter, `validation/…` and `test/…`."""
    mixture: dict[str, float]
    """Those of the mixture."""


def evaluate_mixture(
    paths: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    overrides: Sequence[str] = (),
    any_base: bool = False,
) -> list[Judged]:
    """Evaluates a weighted sum of the adapters of finished runs on the data of each run.

    The sum is `switching`'s: of the updates, of hidden states' shifts, and of heads of one shape.

    Args:
        paths: folders of finished runs on one base.
        weights: the factor of each; None means 1 / number of runs.
        overrides: `key=value` settings that override each run's config.
        any_base: whether the base may have other weights than that of a run.

    Raises:
        ConfigError: if a setting or the weights are invalid.
        IncompatibleError: if the runs differ in base, task or classes, or in their fully trained modules.
        LabError: as `evaluate`.
    """
    quiet_libraries()
    if len(paths) < 2:
        raise ConfigError("evaluate: a mixture needs at least two runs.")
    weights = [1 / len(paths)] * len(paths) if weights is None else weights
    if len(weights) != len(paths) or not all(map(math.isfinite, weights)):
        raise ConfigError(f"--weights: needs a finite number for each run, {len(paths)}; got {[*weights]}")
    opened = [open_evaluation(path, overrides) for path in paths]
    configs = [config for _, config in opened]
    for path, config in zip(paths, configs, strict=True):
        _check_model(config, configs[0], f"{path}, {paths[0]}")
    L.seed_everything(configs[0].seed, workers=True, verbose=False)
    data = [evaluation_data(folder, config) for folder, config in opened]
    for path, own in zip(paths, data, strict=True):
        classes = [(other.num_labels, *other.label_names) for other in (own, data[0])]
        if classes[0] != classes[1]:
            raise IncompatibleError(
                f"{path}, {paths[0]}: have other classes ({_named(classes[0])}; {_named(classes[1])}), and "
                "no sum of heads predicts both. Mix runs of one set of classes, or language models."
            )
    model = build_base(configs[0], data[0])
    names = [f"run-{number}" for number in range(len(paths))]
    for name, (folder, _) in zip(names, opened, strict=True):
        named = load_adapter(model, folder.adapter, any_base, name=name)
    heads = [set(named[name].saved) for name in names]
    for path, trained in zip(paths, heads, strict=True):
        if trained != heads[0]:
            raise IncompatibleError(
                f"{path}, {paths[0]}: train different modules as a whole ({_named(sorted(trained))}; "
                f"{_named(sorted(heads[0]))}), and the base's own would fill in. Mix runs with the same ones."
            )
    if heads[0] and not math.isclose(sum(weights), 1):
        raise ConfigError(
            f"--weights: must add up to 1 where {_named(sorted(heads[0]))} is mixed too, or the rest would "
            f"be the untrained one; got {[*weights]}"
        )
    mixture = dict(zip(names, weights, strict=True))
    found = []
    for path, name, config, own in zip(paths, names, configs, data, strict=True):
        results = []
        for choice in ({name: 1.0}, mixture):
            with named.using(choice):
                # Prompts are passed on if an adapter in use reads them.
                reader = next((n for n in choice if any(a.reads_prompt_lengths for a in named[n])), name)
                results.append(measure(model, named[reader], config, own))
        found.append(Judged(Path(path), *results))
    return found


def _check_model(config: ExperimentConfig, first: ExperimentConfig, paths: str) -> None:
    own, other = asdict(config.model), asdict(first.model)
    for field, value in own.items():
        if value != other[field]:
            raise IncompatibleError(
                f"{paths}: differ in model.{field} ({value}; {other[field]}). Mix runs of one model and task."
            )


def _named(words: Sequence[object]) -> str:
    return ", ".join(map(str, words)) or "none"
