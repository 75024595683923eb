"""The loss of a step is one number: for any batches, windows, processes and paddings, by brute force."""

from pathlib import Path

import pytest
import torch

from lora_lab.data.batches import training_order
from tests.training import step_cases
from tests.training.step_cases import CASES, GLOBAL_BATCH, ROWS, expected, measure, write_rows
from tests.two_processes import run_in_two_processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("steps")
    write_rows(path)
    return path


@pytest.fixture(scope="module")
def of_two_processes(folder) -> list[dict[str, dict]]:
    """Returns what each of two processes has measured of all cases for two, by their names."""
    run_in_two_processes(step_cases.__file__, folder, str(folder))
    return [torch.load(folder / f"measured_{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_steps_gradients_and_loss_and_the_evaluation_are_those_of_single_examples(folder, case, request):
    if case.processes == 1:
        measured = [measure(case, folder)]
    else:
        measured = [of_one[str(case)] for of_one in request.getfixturevalue("of_two_processes")]
    right = expected(case.task, case.model, case.prompts, case.penalty, folder, case.weights)
    batches = training_order(right["lengths"], GLOBAL_BATCH, True, seed=0, epoch=0)
    assert sorted(torch.cat(batches).tolist()) == list(range(ROWS))
    starts = range(0, len(batches), case.accumulate)
    steps = [torch.cat(batches[start : start + case.accumulate]).tolist() for start in starts]
    exact = case.precision == "32-true"
    relative = 1e-6 if exact else 3e-2
    for process in measured:
        assert len(process["gradients"]) == len(process["losses"]) == len(process["logged"]) == len(steps)
        for number, rows in enumerate(steps):
            count = sum(right["counts"][row] for row in rows)
            loss = sum(right["losses"][row] for row in rows) / count
            gradient = sum(right["gradients"][row] for row in rows) / count + right["penalty_gradient"]
            off = (process["gradients"][number] - gradient).norm() / gradient.norm()
            assert off < relative, (number, float(off))
            assert process["losses"][number] == pytest.approx(loss, rel=relative)
            assert process["logged"][number] == pytest.approx([loss, right["penalty"]], rel=relative)
        for name, value in right["metrics"].items():
            tolerance = {"rel": 2e-6, "abs": 1e-5} if exact else {"abs": 0.05, "rel": relative}
            assert process["metrics"][name] == pytest.approx(value, **tolerance), name
