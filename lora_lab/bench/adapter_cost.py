"""What an adapter costs: ours compared with PEFT's, and both with the frozen base.

    python -m lora_lab.bench.adapter_cost OUTPUT.csv [--shapes bert] [--methods lora …] [--rounds 5]
    python -m lora_lab.bench.adapter_cost OUTPUT.csv --show      # the tables of a file, as markdown

Three models of one base take turns: `limit`, which is frozen and only passes gradients on to its embeddings;
PEFT's adapters on all linear maps; and ours with the same numbers in them. They must agree before anything is
measured. One thread and CPU time: wall time would also count what else the machine does. A CPU's speed
drifts, so only ratios within a round are used; bytes are exact. Needs PEFT, `pip install lora_lab[dev]`.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from lora_lab.adapters import METHODS, AdapterSet, inject
from lora_lab.adapters.base import Adapter
from lora_lab.adapters.peft_folder import PREFIX
from lora_lab.adapters.storage import TENSORS, save_adapter
from lora_lab.bench.adapter_cases import CASES, SHAPES, Case, Shapes
from lora_lab.bench.adapter_report import read_rows, show_markdown, show_tables
from lora_lab.bench.results import about
from lora_lab.bench.step_cost import peak_bytes, saved_bytes, seconds
from lora_lab.errors import LabError

TOLERANCE = 1e-5
"""Largest allowed difference of the two sides, relative to the largest number."""

Row = dict[str, Any]


class DisagreementError(LabError):
    """The two sides do not compute the same, so their costs cannot be compared."""


@dataclass(frozen=True)
class Side:
    """One of the three models."""

    module: nn.Module
    embeddings: Tensor
    penalty: Callable[[], Tensor | float] = lambda: 0.0

    def forward(self) -> Tensor:
        """Returns the loss."""
        return self.module(self.embeddings).loss + self.penalty()

    def step(self) -> None:
        """Runs forward and backward."""
        self.forward().backward()

    def fresh(self) -> None:
        """Deletes all gradients, so that every step creates them."""
        self.module.zero_grad(set_to_none=True)
        self.embeddings.grad = None


def build_sides(case: Case, shapes: Shapes, device: torch.device) -> dict[str, Side]:
    """Makes the three models, PEFT's with our numbers.

    Raises:
        DisagreementError: if PEFT's and ours do not compute the same.
    """
    limit, ours = shapes.task().to(device), shapes.task().to(device)
    adapters = inject(ours, case.spec(shapes))
    _shake(adapters)
    wrapped = peft.get_peft_model(shapes.task().to(device), case.peft(shapes))
    result: Any = peft.set_peft_model_state_dict(wrapped, _tensors(adapters, case))
    if result.unexpected_keys:
        raise DisagreementError(f"PEFT's modules have no tensors {result.unexpected_keys[:3]}.")
    # The tuner, not its wrapper: only there AdaLoRA's penalty is added.
    modules = {"limit": limit, "peft": wrapped.base_model, "ours": ours}
    sides = {}
    for name, module in modules.items():
        embeddings = shapes.embeddings().to(device).requires_grad_()
        sides[name] = Side(module.train(), embeddings, *[adapters.penalty] * (name == "ours"))
    check_agreement(sides["ours"], sides["peft"], sides["limit"])
    return sides


def check_agreement(ours: Side, theirs: Side, limit: Side) -> None:
    """Compares outputs, losses and the embeddings' gradients, without dropout.

    Raises:
        DisagreementError: if ours and PEFT's differ, or are so close to the base that equality means nothing.
    """
    own, other, base = (_results(side) for side in (ours, theirs, limit))
    for name in own:
        # A loss can have either sign and be near 0; its scale is 1, as `direction` has length 1.
        apart = _apart(own[name], other[name], least=float(name == "loss"))
        if not apart <= TOLERANCE:
            raise DisagreementError(f"{name} differs by {apart:.1e} from PEFT's, above {TOLERANCE:.0e}.")
    moved = _apart(own["output"], base["output"])
    if not moved > 100 * TOLERANCE:
        raise DisagreementError(f"output differs by {moved:.1e} from the base's, too little to compare.")


def _results(side: Side) -> dict[str, Tensor]:
    side.module.eval()
    side.fresh()
    result = side.module(side.embeddings)
    loss = result.loss + side.penalty()
    loss.backward()
    side.module.train()
    assert side.embeddings.grad is not None
    return {"output": result.output.detach(), "loss": loss.detach(), "gradient": side.embeddings.grad}


def _apart(own: Tensor, other: Tensor, least: float = 0.0) -> float:
    return float((own - other).abs().max() / other.abs().max().clamp(min=least))


def _shake(adapters: AdapterSet) -> None:
    """Moves the adapters away from their start, where many compute what the base computes."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def _tensors(adapters: AdapterSet, case: Case) -> dict[str, Tensor]:
    """Returns our tensors by PEFT's names."""
    found: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        own = Adapter.peft_tensors(adapter) if case.stacked else adapter.peft_tensors()
        found |= {f"{PREFIX}{path}.{name}": tensor.detach() for name, tensor in own.items()}
    return found | dict(METHODS[case.method].peft.shared(next(iter(adapters))))


def measure_once(case: Case, shapes: Shapes, sides: dict[str, Side], device: torch.device) -> Iterator[Row]:
    """Measures what is the same in every round: bytes."""
    for name, side in sides.items():
        side.fresh()
        yield {"side": name, "measure": "saved_bytes", "value": saved_bytes(side.forward, side.module)}
        side.step()  # warm-up: what a first step allocates permanently is not part of its peak
        side.fresh()
        yield {"side": name, "measure": "peak_bytes", "value": peak_bytes(side.step, device)}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(inject(shapes.task(), case.spec(shapes)), Path(folder) / "ours")
        wrapped = peft.get_peft_model(shapes.task(), case.peft(shapes))
        wrapped.save_pretrained(str(Path(folder) / "peft"), save_embedding_layers=False)
        for name in ("peft", "ours"):
            size = (Path(folder) / name / TENSORS).stat().st_size
            yield {"side": name, "measure": "file_bytes", "value": size}


def measure_round(
    case: Case, shapes: Shapes, sides: dict[str, Side], device: torch.device, number: int
) -> Iterator[Row]:
    """Measures one round of times, in an order that changes with the round."""
    names = list(sides)
    for name in names[number % 3 :] + names[: number % 3]:
        side = sides[name]
        side.fresh()
        yield {"side": name, "measure": "step_seconds", "value": seconds(side.step, device)}
    for name in ("peft", "ours") if number % 2 else ("ours", "peft"):
        injected, merged = _setup_seconds(name, case, shapes, device)
        yield {"side": name, "measure": "inject_seconds", "value": injected}
        yield {"side": name, "measure": "merge_seconds", "value": merged}


def _setup_seconds(name: str, case: Case, shapes: Shapes, device: torch.device) -> tuple[float, float]:
    """Returns the times of injecting adapters into a fresh model, and of merging them permanently."""
    task, made = shapes.task().to(device), list[Any]()
    if name == "ours":
        injected = seconds(lambda: made.append(inject(task, case.spec(shapes))), device)
        return injected, seconds(lambda: made[0].merge(), device)
    injected = seconds(lambda: made.append(peft.get_peft_model(task, case.peft(shapes))), device)
    return injected, seconds(lambda: made[0].merge_and_unload(), device)


def measure(
    case: Case, shapes: Shapes, rounds: int, device: torch.device, advance: Callable[[], None] = lambda: None
) -> Iterator[Row]:
    """Measures one case.

    Args:
        case: the method.
        shapes: the model.
        rounds: how often times are measured; at least 1.
        device: where.
        advance: called after every round.

    Raises:
        DisagreementError: before anything is measured, if the sides do not compute the same.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, for models without a name on the hub
        sides = build_sides(case, shapes, device)
        yield from ({"round": 1, **row} for row in measure_once(case, shapes, sides, device))
        for number in range(1, rounds + 1):
            yield from (
                {"round": number, **row} for row in measure_round(case, shapes, sides, device, number)
            )
            advance()


def run(
    output: Path, methods: list[str], shapes: dict[str, Shapes], rounds: int, device: torch.device
) -> dict[str, str]:
    """Measures all cases and writes their rows, each case as soon as it is done.

    Returns:
        The cases that were not measured, with the reason.
    """
    machine = about(["torch", "transformers", "peft"], device)
    skipped: dict[str, str] = {}
    known = [name for name in methods if CASES[name].method in METHODS]
    skipped |= {name: "no method here yet" for name in methods if name not in known}
    columns = [*machine, "shapes", "method", "side", "round", "measure", "value"]
    with output.open("w", encoding="utf-8", newline="") as file, Progress(transient=True) as progress:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        bar = progress.add_task("", total=len(known) * len(shapes) * rounds)
        for place, sizes in shapes.items():
            for name in known:
                progress.update(bar, description=f"{name}, {place}")
                keys = machine | {"shapes": place, "method": name}
                try:
                    rows = list(measure(CASES[name], sizes, rounds, device, lambda: progress.advance(bar)))
                except DisagreementError as error:
                    skipped[f"{name}, {place}"] = str(error)
                    continue
                writer.writerows(keys | row | {"value": round(row["value"], 6)} for row in rows)
                file.flush()
    return skipped


def main() -> None:
    """Measures and shows tables and verdicts."""
    parser = argparse.ArgumentParser(description="Measures what adapters cost, ours and PEFT's.")
    parser.add_argument("output", type=Path, help="CSV file to write, or to show")
    parser.add_argument("--show", action="store_true", help="print a file's tables as markdown and stop")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    if not options.show:
        torch.set_num_threads(1)
        shapes = {name: SHAPES[name] for name in options.shapes}
        skipped = run(options.output, options.methods, shapes, options.rounds, options.device)
        show_tables(read_rows(options.output), Console())
        for name, why in skipped.items():
            print(f"not measured: {name}: {why}")
        return
    print(show_markdown(read_rows(options.output)))


if __name__ == "__main__":
    main()
