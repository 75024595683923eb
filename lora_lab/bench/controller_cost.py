"""What controllers cost: a run with a controller against the same run without.

    python -m lora_lab.bench.controller_cost OUTPUT.csv

The model has BERT base's shapes and random weights; each controller acts with its defaults on the method that
it was made for. One thread and CPU time. The two runs take turns, and each round gives one ratio; as a CPU's
speed drifts by a few per cent within a round, the time in the controller's hooks is also measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from lora_lab.adapters import METHODS, inject
from lora_lab.bench import short_run
from lora_lab.bench.hook_clock import HookClock
from lora_lab.bench.results import about, write_rows
from lora_lab.callbacks import CONTROLLERS, build_controllers

STEPS = 20
HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


@dataclass(frozen=True)
class Case:
    """Controllers, and the adapters that they act on."""

    name: str
    controllers: tuple[str, ...]
    adapter: dict[str, Any]
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


ALL = {"targets": "all-linear", "modules_to_save": ["classifier"]}
CASES = (
    Case("importance_pruning", ("importance_pruning",), {"method": "adalora", "rank": 12, **ALL}),
    Case(
        "importance_pruning and compaction",
        ("importance_pruning", "compaction"),
        {"method": "adalora", "rank": 12, **ALL},
    ),
    Case("rank_pruning", ("rank_pruning",), {"method": "lora_prune", **ALL}),
    Case("rank_switching", ("rank_switching",), {"method": "dylora", **ALL}),
    Case("dropout_schedule", ("dropout_schedule",), {"method": "lora_drop", **ALL}),
)


def train(model: nn.Module, case: Case, controlled: bool) -> HookClock:
    """Trains some steps, with the case's controllers or without."""
    options = dict(case.adapter)
    adapters = inject(model, METHODS[options["method"]].Spec(**options))
    specs = {name: CONTROLLERS[name].Spec(**case.options.get(name, {})) for name in case.controllers}
    clock = HookClock()
    controllers = build_controllers(specs if controlled else {}, adapters, seed=0)
    for controller in controllers:
        clock.watch(controller, HOOKS, "hooks")
    short_run.train(model, adapters, STEPS, [clock, *controllers])
    return clock


def measure(model: nn.Module, case: Case, number: int) -> dict[str, Any]:
    """Runs one round and returns its row: CPU milliseconds of a step, and the controllers' share."""
    order = (False, True) if number % 2 else (True, False)
    runs = {controlled: train(model, case, controlled) for controlled in order}
    plain, controlled = runs[False].process, runs[True].process
    each = 1e3 / STEPS
    row = {
        "case": case.name,
        "method": case.adapter["method"],
        "round": number,
        "plain_step_milliseconds": plain * each,
        "controlled_step_milliseconds": controlled * each,
        "ratio": controlled / plain,
        "hooks_milliseconds": runs[True].hooks * each,
        "hooks_share": runs[True].hooks / plain,
    }
    return short_run.rounded(row)


def main() -> None:
    """Measures all cases and rounds and writes one row each."""
    parser = argparse.ArgumentParser(description="Measures what controllers cost.")
    parser.add_argument("output", type=Path, help="CSV file to write")
    parser.add_argument("--rounds", type=int, default=2, help="runs with and without, for each case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    origin = about(["torch", "lightning"])
    model = short_run.bert()
    work = [(case, number) for case in CASES for number in range(1, options.rounds + 1)]
    rows = [origin | measure(model, case, number) for case, number in track(work, "Measuring")]
    write_rows(options.output, rows)


if __name__ == "__main__":
    main()
