"""Every method runs the contract of `lora_lab.testing`, in its own test or here."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.base import AdditiveAdapter
from lora_lab.adapters.protocols import RandomlyDropped
from lora_lab.testing import Case, Variant, checks
from lora_lab.testing.methods import assert_close
from tests.adapters.tiny import linear, relative, shake

OWN = {name: Path(__file__).with_name(f"test_{name}.py") for name in METHODS}
CHECKS = [check for name, path in OWN.items() if not path.is_file() for check in checks(METHODS[name])]
"""Those of methods without a test of their own, which is how a new method begins."""


@pytest.mark.parametrize("check", [pytest.param(check, id=check.name) for check in CHECKS])
def test_contract(check):
    check()


@pytest.mark.parametrize("name", METHODS)
def test_own_tests_run_the_contract(name):
    if OWN[name].is_file():
        assert f"\ntest_contract = contract(\n    {METHODS[name].__name__}," in OWN[name].read_text()


@pytest.mark.parametrize("method", ["lora", "reft"])
@torch.no_grad()
def test_compiled_model_agrees(method):
    case = Case(METHODS[method], Variant("", {"rank": 4}, on={"bert": {"layers": [0]}}), "bert")
    model, _ = case.adapted()
    torch.compiler.reset()
    assert_close(case.logits(torch.compile(model, fullgraph=True, backend="aot_eager")), case.logits(model))


DROPPING = [
    name
    for name, method in METHODS.items()
    if issubclass(method, AdditiveAdapter) and "dropout" in {field.name for field in fields(method.Spec)}
]


@pytest.mark.parametrize("method", DROPPING)
@torch.no_grad()
def test_dropout_of_inputs_acts_on_the_update_alone(method):
    model, x = linear(), torch.randn(5, 24)
    adapters = inject(model, METHODS[method].Spec(targets=["0"], modules_to_save=[], rank=4, dropout=0.5))
    shake(adapters)
    for adapter in adapters.implementing(RandomlyDropped).values():
        adapter.drop_prob = 0.0
    torch.manual_seed(7)
    given = model.train()(x)
    torch.manual_seed(7)
    dropped, adapter = nn.functional.dropout(x, 0.5), model[0]
    assert relative(given, adapter.base(x) + dropped @ adapter.delta_weight().T) < 1e-6
