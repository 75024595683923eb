import pytest
import torch
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.ia3 import IA3Spec
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.errors import IncompatibleError
from lora_lab.training.optimization import (
    OptimizationConfig,
    build_optimizer,
    build_schedule,
    keep_frozen_parts,
    parameter_groups,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 2))


def adapted(**options):
    return inject(network(), LoRASpec(targets=["0", "2"], rank=2, modules_to_save=["4"], **options))


def build_optimizer_of(adapters, config):
    return build_optimizer(parameter_groups(adapters, config), config)


def rates(optimizer) -> dict[int, tuple[float, float]]:
    return {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_every_trainable_tensor_is_in_exactly_one_group():
    adapters = adapted()
    optimizer = build_optimizer_of(adapters, OptimizationConfig(loraplus_ratio=16, head_learning_rate=0.5))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in adapters.trainable_parameters())


def test_loraplus_trains_b_and_the_bias_beside_it_faster_and_leaves_head_and_a_alone():
    adapters = adapted(lora_bias=True)
    config = OptimizationConfig(
        learning_rate=0.01, loraplus_ratio=16, head_learning_rate=0.5, weight_decay=0.1
    )
    found = rates(build_optimizer_of(adapters, config))
    first = adapters.adapters["0"]
    assert found[id(first.A)] == (0.01, 0.1)
    assert found[id(first.B)] == (0.16, 0.1)
    assert found[id(first.c)] == (0.16, 0.1)
    head = adapters.saved["4"].trained
    assert found[id(head.weight)] == (0.5, 0.1)
    assert found[id(head.bias)] == (0.5, 0.0)


def test_tensors_whose_zero_means_something_are_spared_from_decay():
    adapters = inject(network(), IA3Spec(targets=["0", "2"], feedforward_modules=[], modules_to_save=[]))
    found = rates(build_optimizer_of(adapters, OptimizationConfig(weight_decay=0.1)))
    assert {decay for _, decay in found.values()} == {0.0}


def test_loraplus_without_a_b_is_refused():
    adapters = inject(network(), IA3Spec(targets=["0", "2"], feedforward_modules=[], modules_to_save=[]))
    with pytest.raises(IncompatibleError, match="loraplus_ratio: ia3 has no factor B"):
        build_optimizer_of(adapters, OptimizationConfig(loraplus_ratio=2))


def course(config: OptimizationConfig, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}])
    schedule = build_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_linear_schedule_climbs_to_the_peak_and_falls_towards_zero():
    found = course(OptimizationConfig(schedule="linear", warmup=0.2), 10)
    expected = [1 / 3, 2 / 3, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert found == pytest.approx(expected)


def test_cosine_schedule_is_half_way_in_the_middle():
    found = course(OptimizationConfig(schedule="cosine", warmup=0.0), 10)
    assert found[0] == 1.0
    assert found[5] == pytest.approx(0.5)


def test_constant_schedule_stays():
    assert course(OptimizationConfig(schedule="constant", warmup=0.0), 5) == [1.0] * 5


def test_frozen_parts_and_their_moments_outlive_steps_with_decay_and_momentum():
    adapters = adapted()
    adapter = adapters.adapters["0"]
    config = OptimizationConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer_of(adapters, config)
    keep_frozen_parts(optimizer, adapters)

    def step():
        for parameter in adapters.trainable_parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    flags = torch.tensor([[True], [False]])
    adapter.frozen_parts = lambda: [(adapter.A, flags)]
    start = adapter.A.detach().clone()
    step()  # the first step makes the moments
    assert torch.equal(adapter.A[0], start[0])
    assert not torch.equal(adapter.A[1], start[1])
    assert not optimizer.state[adapter.A]["exp_avg"][0].any()
    adapter.frozen_parts = lambda: []
    step()
    before = [x.clone() for x in (adapter.A.detach(), *moments(optimizer, adapter.A))]
    adapter.frozen_parts = lambda: [(adapter.A, flags)]
    step()
    for old, new in zip(before, (adapter.A, *moments(optimizer, adapter.A)), strict=True):
        assert torch.equal(new[0], old[0])
        assert not torch.equal(new[1], old[1])


def moments(optimizer, parameter):
    state = optimizer.state[parameter]
    return state["exp_avg"], state["exp_avg_sq"]
