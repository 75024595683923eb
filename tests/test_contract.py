"""The contract fails for methods that do not keep it, by the check that says what is wrong."""

from dataclasses import dataclass

import pytest
import torch

from lora_lab.adapters.base import PeftLayout
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.errors import LabError
from lora_lab.linalg.rank import widened
from lora_lab.testing import Variant, checks
from tests.plugin.volume_lab import Volume


@dataclass
class FaultySpec(AdapterSpec):
    method: str = "faulty"
    gain: float = 1.0


class Faulty(Volume):
    Spec = FaultySpec


class StartsElsewhere(Faulty):
    def __init__(self, base, spec):
        super().__init__(base, spec)
        self.v.data.fill_(1e-3)


class CountsTwo(Faulty):
    @classmethod
    def site_parameter_count(cls, module, spec):
        return 2


class ForwardIsAnother(Faulty):
    def forward(self, x):
        return self.base(x) * (1 + self.v)  # the bias too


class NeverCalled(Faulty):
    def delta_weight(self):
        return 0 * self.v * widened(self.base.weight)


class WritesToTheBase(Faulty):
    def forward(self, x):
        self.base.weight.data.mul_(1 + 1e-3)
        return super().forward(x)


class HasAGradient(Faulty):
    def without_gradient_at_start(self):
        return ("v",)


class StoresNothing(Faulty):
    peft = PeftLayout(None, tensors={})


class TrainsInHalfPrecision(Faulty):
    def __init__(self, base, spec):
        super().__init__(base, spec)
        self.v = torch.nn.Parameter(torch.zeros((), dtype=base.weight.dtype))


class MergesNot(Faulty):
    mergeable = False


FAULTS = {
    StartsElsewhere: "starts_as_the_identity",
    CountsTwo: "the_formula_counts_what_is_trained",
    ForwardIsAnother: "forward_equals_the_adapted_weight",
    NeverCalled: "changes_the_output",
    WritesToTheBase: "removing_restores_the_model",
    HasAGradient: "gradients_at_the_start",
    StoresNothing: "comes_back_from_its_folder",
    TrainsInHalfPrecision: "half_precision_base",
    MergesNot: "merged_model_gives_the_same_logits",
}


def failing(method, *variants: Variant) -> set[str]:
    """Names of the checks on bert and on one map that fail, without the slow ones."""
    found = set()
    for check in checks(method, *variants):
        name, _, where = check.name.partition("-")
        if where.endswith(("on_bert", "on_linear")) and not name.startswith("compile"):
            try:
                check()
            except (AssertionError, LabError):
                found.add(name)
    return found


def test_a_good_method_passes(register):
    assert failing(Faulty, Variant("", trained=1), Variant("loud", {"gain": 2.0})) == set()


@pytest.mark.parametrize(("method", "check"), FAULTS.items(), ids=[kind.__name__ for kind in FAULTS])
def test_a_faulty_method_is_caught(method, check, register):
    assert check in failing(method)


def test_a_count_worked_out_by_hand_is_compared(register):
    assert failing(Faulty, Variant("", trained=2)) == {"number_trained"}
