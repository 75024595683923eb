"""What a mixture of two LoRA costs here and in PEFT, both by singular values.

    python -m lora_lab.bench.combine_cost OUTPUT.csv

One block of BERT base with two LoRA of rank 16 on its six linear maps, mixed with the weights 0.7 and 0.3
and cut to rank 16: PEFT's `add_weighted_adapter` with `combination_type="svd"`, and the sum and the cut of
`lora_lab.artifacts.combine`. One thread and CPU time of this process; both take turns, and each round gives
one ratio. The errors are those against the exact sum of the updates.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import BertConfig, BertModel

from lora_lab.bench.results import about, write_rows
from lora_lab.linalg.updates import Update

RANK, WEIGHTS, ROUNDS = 16, (0.7, 0.3), 3
LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def model() -> Any:
    """Returns PEFT's model with the adapters `0` and `1`."""
    torch.manual_seed(0)
    options = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS, init_lora_weights=False)
    made = peft.get_peft_model(BertModel(BertConfig(num_hidden_layers=1, vocab_size=100)), options, "0")
    made.add_adapter("1", options)
    return made


def layers(made: Any) -> list[Any]:
    """Returns the adapted maps."""
    return [module for module in made.modules() if isinstance(module, peft.tuners.lora.Linear)]


def summed(layer: Any) -> Update:
    """Returns the exact sum of the two updates of a map."""
    updates = [
        Update(layer.lora_B[name].weight.detach() * layer.scaling[name], layer.lora_A[name].weight.detach())
        for name in ("0", "1")
    ]
    return Update.sum(updates, WEIGHTS)


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the CPU time of an action, and what it returned."""
    start = time.process_time()
    found = action()
    return time.process_time() - start, found


def error(exact: Update, given: torch.Tensor) -> float:
    """Returns ‖ΔW − given‖ / ‖ΔW‖."""
    whole = exact.matrix()
    return float((whole - given).norm() / whole.norm())


def measure(number: int) -> dict[str, float]:
    """Returns one round."""
    made = model()
    found = layers(made)

    def ours() -> list[Update]:
        return [summed(layer).truncated(RANK)[0] for layer in found]

    def theirs() -> None:
        made.add_weighted_adapter(["0", "1"], list(WEIGHTS), "mixed", "svd", svd_rank=RANK)

    first, second = (ours, theirs) if number % 2 else (theirs, ours)
    times = {action.__name__: seconds(action) for action in (first, second)}
    cut = times["ours"][1]
    exact = [summed(layer) for layer in found]
    mixed = [layer.get_delta_weight("mixed") for layer in found]
    return {
        "round": number + 1,
        "peft_seconds": round(times["theirs"][0], 4),
        "lora_lab_seconds": round(times["ours"][0], 4),
        "ratio": round(times["theirs"][0] / times["ours"][0], 2),
        "peft_error": round(max(map(error, exact, mixed)), 6),
        "lora_lab_error": round(max(error(e, c.matrix()) for e, c in zip(exact, cut, strict=True)), 6),
    }


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description="Measures what a mixture costs.")
    parser.add_argument("output", type=Path, help="CSV file to write")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    origin = about(["torch", "peft"])
    rows = []
    with torch.no_grad():
        for number in range(ROUNDS):
            rows.append(origin | measure(number))
            print(rows[-1], flush=True)
    print(f"median ratio {statistics.median(float(row['ratio']) for row in rows):.1f}")
    write_rows(output, rows)


if __name__ == "__main__":
    main()
