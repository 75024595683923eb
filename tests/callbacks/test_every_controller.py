"""Every controller with every method, in one process and in two, with and without accumulation.

A pair either trains alike however a step of 8 rows is split up, or is refused before training with the
methods that fit.
"""

import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from lora_lab.adapters import METHODS
from lora_lab.adapters.protocols import Prunable
from lora_lab.callbacks import CONTROLLERS, check_controllers
from lora_lab.errors import IncompatibleError
from tests.callbacks.controlled import LAYERS, fresh_model, train

pytestmark = pytest.mark.slow

STEPS = 12
TOLERANCE = 2e-5
"""Relative to the largest number of a tensor: float32 sums in another order, over 12 steps of AdamW."""

CASES = {
    "importance_pruning": {"importance_pruning": {"target_rank": 2, "deltaT": 2}},
    "importance_by_magnitude": {"importance_pruning": {"target_rank": 3, "importance": "magnitude"}},
    "rank_pruning": {"rank_pruning": {"threshold": 0.7}},
    "rank_pruning_of_the_model": {"rank_pruning": {"threshold": 0.5, "scope": "model", "min_rank": 0}},
    "uniform_ranks": {"rank_switching": {}},
    "geometric_ranks": {"rank_switching": {"policy": "geometric"}},
    "ranks_by_gradient": {"rank_switching": {"policy": "gradient_norm"}},
    "ranks_by_loss": {"rank_switching": {"policy": "recent_loss", "window": 1, "period": 2}},
    "shared": {
        "output_evaluation": {"threshold": 0.4, "warmup": 3, "sample_ratio": 1.0, "group_by": "shape"}
    },
    "dropped": {"output_evaluation": {"threshold": 0.4, "warmup": 3, "sample_ratio": 1.0, "share": False}},
    "drop_schedule": {"dropout_schedule": {"start_prob": 0.0, "end_prob": 0.0}},
    "compacted_importance_pruning": {"importance_pruning": {"target_rank": 2}, "compaction": {}},
    "compacted_rank_pruning": {"rank_pruning": {"threshold": 0.7}, "compaction": {}},
    "compacted_dropping": {
        "output_evaluation": {"threshold": 0.4, "warmup": 3, "sample_ratio": 1.0, "share": False},
        "compaction": {},
    },
}
"""What the controllers of a run are told."""

# Masks of tokens and samples are drawn anew for every batch, which no two ways to split a step share.
OPTIONS = {"lora_drop": {"drop_prob": 0.0}}
PLAIN = ["dora", "dylora", "lora_prune", "hra", "ia3", "vera", "bitfit"]
"""Methods that need no particular model, of which some or all do not fit a case."""


def controllers_of(case: str) -> dict:
    return {name: CONTROLLERS[name].Spec(**options) for name, options in CASES[case].items()}


def fits(case: str, method: str) -> bool:
    return all(issubclass(METHODS[method], spec.needs()) for spec in controllers_of(case).values())


FITTING = [(case, method) for case in CASES for method in METHODS if fits(case, method)]
OTHERS = [(case, method) for case in CASES for method in METHODS if not fits(case, method)]


def spec_of(method: str):
    kind = METHODS[method].Spec
    rank = {"rank": 4} if "rank" in kind.__dataclass_fields__ else {}
    return kind(**rank, **OPTIONS.get(method, {}))


def run(case: str, method: str, devices: int, accumulate: int):
    return train(spec_of(method), controllers_of(case), STEPS, devices, accumulate)


@cache
def alone(case: str, method: str, accumulate: int = 1):
    return run(case, method, 1, accumulate)


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """States after training in two processes, which share one process group over all pairs."""
    path = tmp_path_factory.mktemp("two") / "states.pt"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(path)],
            env={**environment, "LOCAL_RANK": str(rank)},
            cwd=path.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = [worker.communicate(timeout=500)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(told)
    return torch.load(path, weights_only=True)


def assert_like(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].shape == tensor.shape, name
        if tensor.is_floating_point() and tensor.numel():
            assert (state[name] - tensor).abs().max() <= TOLERANCE * tensor.abs().max(), name
        else:
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(("case", "method"), FITTING)
def test_a_run_leaves_the_base_and_comes_back_from_its_state(case, method):
    done = alone(case, method)
    adapters = done.adapters
    assert done.trainer.global_step == STEPS
    for name, tensor in fresh_model().state_dict().items():
        path, _, own = name.rpartition(".")
        if path in LAYERS:
            base = adapters.adapters[path].base if path in adapters.adapters else None
            assert base is None or torch.equal(getattr(base, own), tensor), name
    x = torch.randn(5, 6)
    adapters.model.eval()
    again = train(spec_of(method), {}, 1).adapters
    again.load_state_dict(adapters.state_dict())
    again.model.eval()
    assert torch.equal(again.model(features=x).logits, adapters.model(features=x).logits)


@pytest.mark.parametrize(("case", "method"), [pair for pair in FITTING if "pruning" in pair[0]])
def test_something_was_pruned_and_stays_zero(case, method):
    done = alone(case, method)
    pruned = 0
    for adapter in done.adapters.implementing(Prunable).values():
        dead = ~adapter.kept_components()
        pruned += adapter.initial_components - int(adapter.kept_components().sum())
        (last, axis) = adapter.rank_components()[-1 if method != "adalora" else 0]
        assert not last.movedim(axis, 0)[dead].any()
    assert pruned > 0


@pytest.mark.parametrize(("case", "method"), FITTING)
def test_two_batches_of_half_the_size_make_the_same_step(case, method):
    assert_like(alone(case, method, 2).adapters.state_dict(), alone(case, method).adapters.state_dict())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("case", "method"), FITTING)
def test_two_processes_train_what_one_does(case, method, accumulate, of_two_processes):
    assert_like(of_two_processes[f"{case} {method} {accumulate}"], alone(case, method).adapters.state_dict())


@pytest.mark.parametrize(("case", "method"), OTHERS)
def test_what_does_not_fit_is_refused_with_the_methods_that_do(case, method):
    for name, spec in controllers_of(case).items():
        told = [
            fault for fault in check_controllers({name: spec}, METHODS[method]) if "needs adapters" in fault
        ]
        assert bool(told) != issubclass(METHODS[method], spec.needs())
        for fault in told:
            assert fault.startswith(f"controllers.{name}: needs adapters that are ")
            listed = fault.rpartition("Methods that are: ")[2].split(", ")
            assert listed == sorted(
                known for known, kind in METHODS.items() if issubclass(kind, spec.needs())
            )


@pytest.mark.parametrize(("case", "method"), [pair for pair in OTHERS if pair[1] in PLAIN])
def test_in_python_it_is_refused_before_training_too(case, method):
    with pytest.raises(IncompatibleError, match=f"those of method '{method}' are not. Methods that are: "):
        train(spec_of(method), controllers_of(case), 1)


if __name__ == "__main__":
    states = {
        f"{case} {method} {accumulate}": run(case, method, 2, accumulate).adapters.state_dict()
        for case, method in FITTING
        for accumulate in (1, 2)
    }
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(states, sys.argv[1])
