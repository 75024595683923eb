"""A product by a scaled frozen tensor: its gradients, and what the backward pass keeps for them."""

import pytest
import torch
from torch import nn

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.families.projections import scaled_linear
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.callbacks.saved_tensors import SavedTensors
from lora_lab.errors import CheckpointError, IncompatibleError
from tests.adapters.tiny import linear, logits, relative, shake, tiny_llama

SHAPES = {
    "rows and columns": (((7, 1), (7, 5), (5,)), 5),
    "bases below each other": (((3, 2, 1), (3, 1, 5), (2, 5)), 5),
    "bases side by side": (((7, 1, 2), (7, 3, 1), (3, 2)), 6),
}
"""Shapes of left, frozen and right, and the width of x."""


def random_factors(shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(("shapes", "inputs"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("batch", [(4,), (2, 3), (), (0,)])
def test_product_and_gradients_are_those_of_native_operations(shapes, inputs, batch):
    left, frozen, right = random_factors(shapes)
    x = torch.randn(*batch, inputs, dtype=torch.float64)
    learned = [tensor.requires_grad_() for tensor in (x, left, right)]
    matrix = (left * frozen * right).reshape(-1, inputs)
    found, expected = scaled_linear(x, left, frozen, right), x @ matrix.T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    probe = torch.randn_like(expected)
    for given, wanted in zip(
        torch.autograd.grad((found * probe).sum(), learned),
        torch.autograd.grad((expected * probe).sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(given, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shapes", "inputs"), SHAPES.values(), ids=SHAPES)
def test_gradients_agree_with_finite_differences(shapes, inputs):
    left, frozen, right = random_factors(shapes)
    x = torch.randn(4, inputs, dtype=torch.float64)
    learned = [tensor.requires_grad_() for tensor in (x, left, right)]
    assert torch.autograd.gradcheck(lambda x, left, right: scaled_linear(x, left, frozen, right), learned)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_gradients_stay_close(autocast):
    left, frozen, right = torch.randn(7, 1), torch.randn(7, 5), torch.randn(5)
    x = torch.randn(64, 5)
    gradients = []
    for enabled in (False, autocast):
        learned = [tensor.clone().requires_grad_() for tensor in (x, left, right)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = scaled_linear(learned[0], learned[1], frozen, learned[2])
        assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
        output.float().square().sum().backward()
        gradients.append([tensor.grad for tensor in learned])
        assert all(tensor.grad.dtype == torch.float32 for tensor in learned)
    for given, wanted in zip(*gradients, strict=True):
        assert relative(given, wanted) < 3e-2


KEPT = {
    # VeRA keeps A x, (tokens, rank), and RandLoRA x or, where it narrows, B x, (tokens, bases · rank).
    "vera, widening": ("vera", {"rank": 8}, 24, 40, 50 * 8),
    "vera, narrowing": ("vera", {"rank": 8}, 40, 24, 50 * 8),
    "randlora, widening": ("randlora", {"rank": 5}, 24, 40, 0),
    "randlora, narrowing": ("randlora", {"rank": 5}, 40, 24, 50 * 25),
}


@pytest.mark.parametrize(("method", "options", "inputs", "outputs", "numbers"), KEPT.values(), ids=KEPT)
def test_backward_pass_keeps_no_matrix_and_no_output(method, options, inputs, outputs, numbers):
    # A larger map next to it makes what is used of the projections a slice, which must not be copied either.
    model = nn.Sequential(linear(outputs, inputs)[0], nn.Linear(56, 56))
    adapters = inject(model, METHODS[method].Spec(targets=["0", "1"], modules_to_save=[], **options))
    shake(adapters)
    x = torch.randn(50, inputs, requires_grad=True)
    saved = SavedTensors()
    saved.start()
    output = model[0](x)
    saved.stop()
    small = 5 * 5 if method == "randlora" else 0  # s λ
    assert saved.count([x, *model.parameters(), *model.buffers()]) == 4 * (numbers + small)
    output.sum().backward()


def test_projections_without_spread_are_refused():
    model = linear(3, 3)
    with pytest.raises(
        IncompatibleError, match="projection_prng_key: this key draws projections without any"
    ):
        inject(
            model,
            METHODS["randlora"].Spec(
                targets=["0"], modules_to_save=[], rank=1, sparse=True, projection_prng_key=1
            ),
        )
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize(
    ("method", "options"), [("vera", {"rank": 8}), ("randlora", {"rank": 4, "alpha": 4.0})]
)
def test_stored_projections_win_over_the_ones_drawn_here(method, options, tmp_path):
    model = tiny_llama()
    adapters = inject(model, METHODS[method].Spec(targets=["query", "value", "up", "down"], **options))
    shake(adapters)
    projections = next(iter(adapters)).projections
    projections.A.mul_(3)
    projections.B.copy_(torch.randn_like(projections.B))
    save_adapter(adapters, tmp_path / "adapter")
    fresh = tiny_llama()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("method", ["vera", "randlora"])
def test_other_sizes_would_be_other_slices_and_are_refused(method, tmp_path):
    def two(columns):
        return nn.ModuleDict({"q": nn.Linear(8, 6), "v": nn.Linear(columns, 6)})

    spec = METHODS[method].Spec(targets=["q", "v"], rank=4, save_projection=False)
    adapters = inject(two(10), spec)
    with pytest.raises(CheckpointError, match=r"sizes' of shape \(10, 6, 0\), not \(12, 6, 0\)"):
        inject(two(12), spec).load_state_dict(adapters.state_dict())
    save_adapter(adapters, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"sizes' of shape \(10, 6, 0\), not \(12, 6, 0\)"):
        load_adapter(two(12), tmp_path / "adapter")
