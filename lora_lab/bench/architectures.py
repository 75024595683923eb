"""Whether adapters on every architecture of transformers are alive: one row for each model and targets.

    python -m lora_lab.bench.architectures --out experiments/architectures/results.csv

Each architecture of the installed version is built tiny and gets LoRA with the default targets, with
`all-linear` and with `all`. It then takes one step of training on random tokens. Correct is: every counted
tensor changes and the merged model computes what the adapted one does, or the targets are refused.
"""

from __future__ import annotations

import argparse
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lora_lab.adapters import AdapterSet, LoRASpec, inject
from lora_lab.bench.results import about, write_rows
from lora_lab.bench.tiny_architectures import TASKS, tiny_inputs, tiny_model
from lora_lab.errors import LabError
from lora_lab.models.architectures import roles_of

TARGETS: dict[str, str | None] = {"default": None, "all-linear": "all-linear", "all": "all"}
TRAINS_ONLY = {"reformer"}
"""Architectures that compute no gradients in evaluation."""
SECONDS = 60
"""Time limit for one model: some cannot be made small."""


def measure(task: str, model_type: str) -> list[dict[str, Any]]:
    """Returns the rows of an architecture, one for each of `TARGETS`, or one that says why it was not built.

    Each has an `outcome`, and possibly a `message`: "alive", "refused", "dead" (and which
    tensors), "merged differs" (by what share of the largest logit), "failed" or "not built" (and why).
    """
    about_model = {"task": task, "architecture": model_type}
    rows = []
    for name, targets in TARGETS.items():
        row: dict[str, Any] = {**about_model, "targets": name, "roles": "", "adapters": 0, "trained": 0}
        try:
            with time_limit(SECONDS):
                model = tiny_model(task, model_type).eval()
                inputs = tiny_inputs(model)
                _logits(model, inputs)
        except Exception as error:  # what an architecture raises is the reason
            return [{**row, "targets": "", "outcome": "not built", "message": _line(error)}]
        spec = LoRASpec(rank=2) if targets is None else LoRASpec(rank=2, targets=targets)
        try:
            with time_limit(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row["roles"] = " ".join(roles_of(model))
                adapters = inject(model, spec)
                row |= {"adapters": len(adapters), "trained": adapters.trainable_count(saved=False)}
                row |= _after_one_step(model, adapters, inputs)
        except LabError as error:
            row |= {"outcome": "refused", "message": _line(error)}
        except Exception as error:
            row |= {"outcome": "failed", "message": _line(error)}
        rows.append(row)
    return rows


def _after_one_step(
    model: PreTrainedModel, adapters: AdapterSet, inputs: Mapping[str, Tensor]
) -> dict[str, str]:
    parameters = adapters.named_parameters()
    # Away from the start, where half of LoRA's tensors are 0 and the others have no gradient.
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.SGD(adapters.trainable_parameters(), lr=1.0)
    model.train(model.config.model_type in TRAINS_ONLY)
    logits = _logits(model, inputs)
    adapters.check_reached(logits)
    answers = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
    F.cross_entropy(logits.flatten(0, -2), answers.flatten()).backward()
    optimizer.step()
    model.eval()
    adapters.check_alive()
    dead = [name for name, parameter in parameters.items() if torch.equal(before[name], parameter)]
    if dead:
        return {"outcome": "dead", "message": f"{len(dead)} of {len(parameters)}: {', '.join(dead[:4])}"}
    with torch.no_grad():
        adapted = _logits(model, inputs)
        with adapters.merged():
            merged = _logits(model, inputs)
    error = float((merged - adapted).abs().max() / adapted.abs().max())
    if not error < 1e-3:
        return {"outcome": "merged differs", "message": f"{error:.1e}"}
    return {"outcome": "alive", "message": ""}


def _logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    torch.manual_seed(2)  # Reformer draws its hashes in evaluation too
    return model(**inputs).logits.float()


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside the context after this many seconds of computing."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"computes longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _line(error: BaseException) -> str:
    kind = "" if isinstance(error, LabError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:400]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all architectures and writes the table after each; rows that the file has already are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", nargs="*", help="architectures; all by default")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    machine = about(["transformers", "torch"])
    rows: list[dict[str, Any]] = []
    if given.out.exists():
        known = pd.read_csv(given.out, keep_default_na=False).to_dict("records")
        rows = [{str(name): value for name, value in row.items()} for row in known]
    done = {(row["task"], row["architecture"]) for row in rows}
    for task in given.tasks:
        for model_type in sorted(set(given.only or TASKS[task][1]) & set(TASKS[task][1])):
            if (task, model_type) not in done:
                new = [row | machine for row in measure(task, model_type)]
                rows += new
                write_rows(given.out, sorted(rows, key=lambda row: (row["task"], row["architecture"])))
                outcomes = [f"{row['targets']}: {row['outcome']}" for row in new]
                print(task, model_type, *outcomes, sep="  ", flush=True)


if __name__ == "__main__":
    main()
