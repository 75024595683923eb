"""The contract of controllers: one body, run for all of CONTROLLERS with the methods that fit.

A new controller is tried with its `trials` at once. A pair either trains alike however a step of 8 rows is
split up, or is refused before training with the methods that fit. The first trial of a controller that asks
for a protocol meets every method that has it; others, and those with compaction, the first and the last.
"""

import os
import sys
from functools import cache

import pytest
import torch

from lora_lab.adapters import METHODS
from lora_lab.adapters.protocols import Prunable
from lora_lab.callbacks import CONTROLLERS, check_controllers
from lora_lab.errors import IncompatibleError
from tests.callbacks.controlled import LAYERS, fresh_model, train
from tests.two_processes import run_in_two_processes

pytestmark = pytest.mark.slow

STEPS = 12
TOLERANCE = 2e-5
"""Relative to the largest number of a tensor: float32 sums in another order, over 12 steps of AdamW."""
EIGENVECTORS = {"rank_redistribution"}
"""Controllers whose start is eigenvectors of what a forward pass computes. Eigenvalues close to each other
would amplify the rounding of its sums, before any step; the inputs of their runs have them far apart."""


def trials() -> dict[str, dict[str, dict]]:
    """Returns controllers and options of each case: every trial, also with compaction where that fits."""
    found = {}
    for name, controller in CONTROLLERS.items():
        for variant, options in controller.trials.items():
            found[f"{name} {variant}".strip()] = {name: options}
            if controller.Spec(**options).silences():
                found[f"compacted {name} {variant}".strip()] = {name: options, "compaction": {}}
    return found


CASES = trials()

# Masks of tokens and samples are drawn again for every batch, which no two ways to split a step share.
OPTIONS = {"lora_drop": {"drop_prob": 0.0}}
PLAIN = ["dora", "dylora", "lora_prune", "hra", "ia3", "vera", "bitfit"]
"""Methods that need no particular model, of which some or all do not fit a controller."""


def controllers_of(case: str) -> dict:
    return {name: CONTROLLERS[name].Spec(**options) for name, options in CASES[case].items()}


def fits(case: str, method: str) -> bool:
    return all(issubclass(METHODS[method], spec.needs()) for spec in controllers_of(case).values())


def pairs() -> list[tuple[str, str]]:
    """Returns cases and methods that train together."""
    found, seen = [], set()
    for case, controllers in CASES.items():
        fitting = [method for method in METHODS if fits(case, method)]
        asked = {spec.needs() for spec in controllers_of(case).values()}
        kind = (next(iter(controllers)), *asked)
        if kind in seen or "compaction" in controllers:
            fitting = list(dict.fromkeys([fitting[0], fitting[-1]]))
        seen.add(kind)
        found += [(case, method) for method in fitting]
    return found


FITTING = pairs()
ASKING = {(name, spec.needs()): spec for case in CASES for name, spec in controllers_of(case).items()}
"""A spec for each controller and what it asks adapters to be."""


SPLIT = []
for case in CASES:
    fitting = [method for own, method in FITTING if own == case]
    SPLIT += [(case, fitting[0], 2), (case, fitting[-1], 1)]
"""Runs in two processes: of each case the first method with accumulation, the last one without."""


def spec_of(method: str):
    kind = METHODS[method].Spec
    rank = {"rank": 4} if "rank" in kind.__dataclass_fields__ else {}
    return kind(**rank, **OPTIONS.get(method, {}))


def uneven(case: str) -> bool:
    return not EIGENVECTORS.isdisjoint(CASES[case])


def run(case: str, method: str, devices: int, accumulate: int):
    return train(spec_of(method), controllers_of(case), STEPS, devices, accumulate, uneven=uneven(case))


@cache
def alone(case: str, method: str, accumulate: int = 1):
    return run(case, method, 1, accumulate)


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """States after training in two processes, which share one process group over all pairs."""
    path = tmp_path_factory.mktemp("two") / "states.pt"
    run_in_two_processes(__file__, path.parent, str(path))
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
    for name, tensor in fresh_model(uneven(case)).state_dict().items():
        path, _, own = name.rpartition(".")
        if path in LAYERS:
            base = adapters.adapters[path].base if path in adapters.adapters else None
            assert base is None or torch.equal(getattr(base, own), tensor), name
    x = torch.randn(5, 6)
    adapters.model.eval()
    again = train(spec_of(method), {}, 1, uneven=uneven(case)).adapters
    again.load_state_dict(adapters.state_dict())
    again.model.eval()
    assert torch.equal(again.model(features=x).logits, adapters.model(features=x).logits)


@pytest.mark.parametrize(
    ("case", "method"),
    [pair for pair in FITTING if any(spec.silences() for spec in controllers_of(pair[0]).values())],
)
def test_something_was_silenced_and_stays_zero(case, method):
    adapters = alone(case, method).adapters
    left = total = 0
    for adapter in adapters:
        total += 1 if not isinstance(adapter, Prunable) else adapter.initial_components
        if not isinstance(adapter, Prunable):
            left += not adapter.dropped
            continue
        dead = ~adapter.kept_components()
        left += int(adapter.components_in_use().sum())
        (last, axis) = adapter.rank_components()[-1 if method != "adalora" else 0]
        assert not last.movedim(axis, 0)[dead].any()
    assert left < total


@pytest.mark.parametrize(("case", "method"), list(dict.fromkeys(split[:2] for split in SPLIT)))
def test_two_batches_of_half_the_size_make_the_same_step(case, method):
    assert_like(alone(case, method, 2).adapters.state_dict(), alone(case, method).adapters.state_dict())


@pytest.mark.parametrize(("case", "method", "accumulate"), SPLIT)
def test_two_processes_train_what_one_does(case, method, accumulate, of_two_processes):
    assert_like(of_two_processes[f"{case} {method} {accumulate}"], alone(case, method).adapters.state_dict())


@pytest.mark.parametrize(("name", "needs"), ASKING, ids=str)
def test_what_does_not_fit_is_refused_with_the_methods_that_do(name, needs):
    spec, fitting = ASKING[name, needs], sorted(m for m, kind in METHODS.items() if issubclass(kind, needs))
    assert fitting
    for method, kind in METHODS.items():
        faults = [f for f in check_controllers({name: spec}, kind) if "needs adapters" in f]
        assert len(faults) == (method not in fitting)
        for fault in faults:
            assert fault.startswith(f"controllers.{name}: needs adapters that are {needs.__name__}; ")
            assert fault.rpartition("Methods that are: ")[2].split(", ") == fitting
    for method in (method for method in PLAIN if method not in fitting):
        with pytest.raises(IncompatibleError, match=f"of method '{method}' are not. Methods that are: "):
            train(spec_of(method), {name: spec}, 1)


if __name__ == "__main__":
    states = {
        f"{case} {method} {accumulate}": run(case, method, 2, accumulate).adapters.state_dict()
        for case, method, accumulate in SPLIT
    }
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(states, sys.argv[1])
