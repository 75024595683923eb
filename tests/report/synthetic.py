"""Study folders as `lora-lab ablate` leaves them, with numbers made up from known effects."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

EXAMPLES = 400
MODULES = [
    f"encoder.layer.{index}.attention.self.{name}" for index in range(6) for name in ("query", "value")
]
RATES = (5e-4, 2e-3, 8e-3)


def record(run, seed, status, metrics, method="lora", parameters=36_000):
    return {
        "schema_version": 2,
        "experiment": "synthetic",
        "run": run,
        "status": status,
        "error": None if status == "finished" else "DivergenceError: step 12: the loss is not finite (nan).",
        "method": method,
        "controllers": [],
        "seed": seed,
        "config_hash": run,
        "method_parameters": parameters,
        "trainable_parameters": parameters + 770,
        "packages": {"lora_lab": "0.1.0", "torch": "2.13.0+cpu"},
        "python": "3.11.7",
        "git_commit": "37cf22bceb0cd403e48202c3351ffcb99b4e9fd3",
        "hardware": {"processor": "AMD EPYC", "cores": 2, "threads": 1, "gpus": []},
        "median_step_milliseconds": 40.0 + parameters / 4000,
        "peak_memory_megabytes": 600.0 + parameters / 900,
        "wall_seconds": 60.0,
        "metrics": metrics,
    }


def logged(generator, final, steps=100, dynamic=False):
    """Returns the rows of a `metrics.csv` whose last validation accuracy is `final`."""
    at = np.arange(10, steps + 1, 10)
    progress = 1 - np.exp(-3 * at / steps)
    rows = pd.DataFrame({"step": at})
    rows["train/loss"] = 0.7 - 0.4 * progress + generator.normal(0, 0.02, len(at))
    rows["validation/accuracy"] = 0.5 + (final - 0.5) * progress / progress[-1]
    rows["validation/loss"] = 0.7 - 0.3 * progress
    ranks = 8 - (4 * progress if dynamic else 0 * progress)
    rows["rank/mean"] = ranks
    rows["rank/effective_mean"] = 0.6 * ranks
    for place, module in enumerate(MODULES):
        rows[f"rank/{module}"] = np.round(ranks * (1 + 0.5 * np.sin(place)))
        rows[f"rank/effective/{module}"] = 0.5 * ranks
    return rows


def study(folder: Path, effects, seeds=(0, 1, 2), tune=True, lost=(), noise=0.01, examples=True, **settings):
    """Writes a study.

    Args:
        folder: where.
        effects: cell → how much its true accuracy is above 0.8; the first one is the baseline.
        seeds: of the comparison.
        tune: whether a search for the rate came before.
        lost: (cell, seed) → status of runs that did not finish.
        noise: deviation of a run's accuracy over seeds.
        examples: whether rows of test examples are stored.
        settings: more keys of `study.yaml`, in the place of these.
    """
    generator = np.random.default_rng(7)
    lost = dict(lost)
    hardness = generator.random(EXAMPLES)
    rows, validations, tuning = [], [], {}
    baseline = next(iter(effects))
    for place, (cell, effect) in enumerate(effects.items()):
        parameters = 9000 * (1 + place * 7 % 11)
        jobs = [("tune", 100, rate) for rate in RATES] if tune else []
        jobs += [("compare", seed, RATES[1]) for seed in seeds]
        for phase, seed, rate in jobs:
            run = f"{cell}-{phase}-seed{seed}-{rate:g}".replace(" ", "_")
            status = lost.get((cell, seed), "finished") if phase == "compare" else "finished"
            off = 0.08 * abs(np.log10(rate / RATES[1])) ** (1 + place % 2)
            chance = 0.8 + effect - off + generator.normal(0, noise)
            right = (hardness + 0.15 * generator.normal(size=EXAMPLES)) < chance
            found = {"test/accuracy": float(right.mean()), "test/loss": float(1.2 - chance)}
            found |= {"validation/accuracy": float(chance - 0.01), "validation/loss": 0.4}
            row = {
                "cell": cell,
                "phase": phase,
                "seed": seed,
                "status": status,
                "error": record(run, seed, status, {})["error"],
                "run": run,
                "trained_parameters": parameters + 770,
                "adapter_parameters": parameters,
                "adapter.method": cell,
                "optimization.learning_rate": rate,
            }
            mine = record(run, seed, status, found, cell, parameters)
            if status == "finished":
                row |= found | {
                    "step_seconds": mine["median_step_milliseconds"] / 1000,
                    "peak_megabytes": mine["peak_memory_megabytes"],
                    "seconds": 60.0,
                }
            rows.append(row)
            (folder / run).mkdir(parents=True)
            (folder / run / "run.json").write_text(json.dumps(mine))
            curve = logged(generator, found["validation/accuracy"], dynamic="ada" in cell)
            curve.to_csv(folder / run / "metrics.csv", index=False)
            for name in ("validation/accuracy", "validation/loss"):
                part = curve[["step", name]].rename(columns={name: "value"})
                validations.append(part.assign(cell=cell, phase=phase, seed=seed, metric=name))
            if examples and status == "finished":
                pd.DataFrame(
                    {"id": np.arange(EXAMPLES), "label": 1, "prediction": right.astype(int), "loss": 0.5}
                ).to_parquet(folder / run / "test_examples.parquet", index=False)
        if tune:
            tried = [one for one in rows if one["cell"] == cell and one["phase"] == "tune"]
            by = "validation/accuracy"
            best = max(tried, key=lambda one: one[by])["optimization.learning_rate"]
            tuning[cell] = {
                "key": "optimization.learning_rate",
                "value": best,
                "by": by,
                "tried": [{"value": one["optimization.learning_rate"], by: one[by]} for one in tried],
                "widen": None if best == RATES[1] else f"'tune.values={[*RATES, 0.032]}'",
            }
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    pd.concat(validations).to_csv(folder / "validations.csv", index=False)
    facts = {
        "name": folder.name,
        "question": "At equal size and each at its own best rate, is any method better than LoRA?",
        "source": "../../synthetic.yaml",
        "metric": "test/accuracy",
        "higher_is_better": True,
        "baseline": baseline,
        "equivalence": 0.02,
        "seeds": list(seeds),
        "grid": {"adapter.method": list(effects)},
        "tune": {"key": "optimization.learning_rate", "seeds": [100]} if tune else None,
        "cells": {
            cell: {"method": cell, "keys": {"adapter.method": cell}, "match": None} for cell in effects
        },
        **settings,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(facts))
    differences = [
        {"cell": cell, "baseline": baseline, "keys": ["adapter.alpha"], "values": {"adapter.alpha": [8, 16]}}
        for cell in effects
        if cell != baseline
    ]
    (folder / "differences.json").write_text(json.dumps(differences))
    if tune:
        (folder / "tuning.json").write_text(json.dumps(tuning))
    return folder


def runs(folder: Path, count: int, methods=("lora", "dora"), steps=100):
    """Writes run folders of no study."""
    generator = np.random.default_rng(1)
    curve = logged(generator, 0.8, steps).to_csv(index=False)
    for place in range(count):
        method, seed = methods[place % len(methods)], place // len(methods)
        run = folder / f"{method}-{seed}"
        run.mkdir(parents=True)
        accuracy = 0.8 + 0.01 * (place % len(methods)) + float(generator.normal(0, 0.005))
        (run / "run.json").write_text(
            json.dumps(record(run.name, seed, "finished", {"test/accuracy": accuracy}, method))
        )
        config = {"seed": seed, "adapter": {"method": method, "rank": 4}, "run": run.name, "name": "runs"}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (run / "metrics.csv").write_text(curve)
    return folder
