"""Every method runs the contract of `lora_lab.testing`, beside its own test or here."""

from pathlib import Path

import pytest
import torch

from lora_lab.adapters import METHODS
from lora_lab.testing import Case, Variant, checks
from lora_lab.testing.methods import assert_close

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
