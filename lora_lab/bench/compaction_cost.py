"""What compaction saves: a training step before and after, on the same adapters.

    python -m lora_lab.bench.compaction_cost OUTPUT.csv

The model has BERT base's shapes, 3 layers and random weights; `lora_prune` of rank 64 on all linear maps of
its blocks, with all, half or none of the components left after pruning. One thread and CPU time of this
process. Silenced and sliced adapters take turns, and each round gives one ratio.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from lora_lab.adapters import AdapterSet, inject
from lora_lab.adapters.methods.lora_prune import LoRAPruneSpec
from lora_lab.adapters.protocols import Prunable
from lora_lab.bench.results import CPU, about, write_rows
from lora_lab.bench.step_cost import seconds
from lora_lab.callbacks.controllers.compaction import Compaction, CompactionSpec
from lora_lab.callbacks.memory_statistics import optimizer_bytes, size
from lora_lab.training.optimization import (
    OptimizationConfig,
    build_optimizer,
    keep_frozen_parts,
    parameter_groups,
)

RANK, ROWS, LENGTH, ROUNDS = 64, 4, 64, 15
LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


class Run:
    """A model in training whose adapters keep some of their components, sliced or not."""

    def __init__(self, keep: int, sliced: bool):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=3, vocab_size=1000))
        self.adapters: AdapterSet = inject(model, LoRAPruneSpec(rank=RANK, targets=LINEARS))
        self.model = model.train()
        options = OptimizationConfig()
        self.optimizer = build_optimizer(parameter_groups(self.adapters, options), options)
        keep_frozen_parts(self.optimizer, self.adapters)
        self.ids = torch.randint(1, 1000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        self.step()
        for adapter in self.adapters.implementing(Prunable).values():
            adapter.keep_components(torch.arange(RANK) < keep)
        if sliced:
            trainer: Any = SimpleNamespace(
                optimizers=[self.optimizer], strategy=SimpleNamespace(model=self.model)
            )
            Compaction(CompactionSpec(), self.adapters).compact(trainer)
        self.step()

    def step(self) -> None:
        """Takes one optimizer step."""
        self.optimizer.zero_grad()
        self.model(input_ids=self.ids).logits.square().mean().backward()
        self.optimizer.step()

    def megabytes(self) -> tuple[float, float]:
        """Returns the size of trained tensors and optimizer state."""
        return size(self.adapters.trainable_parameters()) / 1e6, optimizer_bytes([self.optimizer]) / 1e6


def measure(keep: int) -> list[dict[str, float]]:
    """Returns one row for each round, in which silenced and sliced adapters take a step each."""
    runs = {"silenced": Run(keep, sliced=False), "sliced": Run(keep, sliced=True)}
    rows = []
    for number in range(ROUNDS):
        order = list(runs) if number % 2 else list(runs)[::-1]
        times = {name: seconds(runs[name].step, CPU) for name in order}
        rows.append(
            {
                "kept_components": keep,
                "round": number + 1,
                **{f"{name}_step_milliseconds": round(1e3 * times[name], 3) for name in runs},
                "ratio": round(times["sliced"] / times["silenced"], 5),
                **{
                    f"{name}_{what}_megabytes": round(value, 6)
                    for name, run in runs.items()
                    for what, value in zip(("trainable", "optimizer"), run.megabytes(), strict=True)
                },
            }
        )
    ratios = [row["ratio"] for row in rows]
    print(f"{keep} of {RANK} kept: {statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})")
    return rows


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description="Measures what compaction saves.")
    parser.add_argument("output", type=Path, help="CSV file to write")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    origin = about(["torch"])
    rows = [origin | row for keep in (RANK, RANK // 2, 0) for row in measure(keep)]
    write_rows(output, rows)


if __name__ == "__main__":
    main()
