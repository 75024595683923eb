"""Adapters of convolutions: the contract of linear maps again, with kernels, strides and PEFT's shapes."""

import copy
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.base import LinearAdapter
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import IncompatibleError, TargetError
from tests.adapters.tiny import reached, relative, shake

CONVOLVING = [
    name for name, method in METHODS.items() if issubclass(method, LinearAdapter) and method.convolves
]
SHAPES = {
    "1d": (nn.Conv1d, (6, 10, 3), {"stride": 2, "padding": 1}),
    "2d": (nn.Conv2d, (6, 10, (3, 2)), {"stride": (1, 2), "padding": (2, 1)}),
    "dilated": (nn.Conv2d, (6, 10, 3), {"padding": (2, 1), "dilation": (2, 1)}),
    "same": (nn.Conv2d, (6, 8, 3), {"padding": "same"}),
    "pointwise": (nn.Conv2d, (8, 6, 1), {}),
    "patches": (nn.Conv2d, (3, 12, 4), {"stride": 4}),
    "unbiased": (nn.Conv2d, (4, 6, 3), {"bias": False}),
}
ALL = pytest.mark.parametrize(("method", "shape"), [(m, s) for m in CONVOLVING for s in SHAPES])


def convolution(shape, dtype=torch.float32):
    kind, sizes, options = SHAPES[shape]
    torch.manual_seed(0)
    return nn.Sequential(kind(*sizes, **options, dtype=dtype)).eval()


def images(shape, batch=2, dtype=torch.float32):
    kind, (channels, *_), _ = SHAPES[shape]
    size = (12,) if kind is nn.Conv1d else (12, 8)
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapted(method, shape, dtype=torch.float32, **options):
    model = convolution(shape, dtype)
    return model, inject(model, METHODS[method].Spec(targets=["0"], rank=4, alpha=6.0, **options))


def same_convolution(base, weight, bias):
    """What torch computes with these values: the oracle, on its own path."""
    plain = copy.deepcopy(base)
    plain.weight.data = weight.reshape(base.weight.shape)
    if bias is not None:
        plain.bias.data = bias
    return plain


@ALL
@torch.no_grad()
def test_starts_as_the_identity(method, shape):
    model, _ = adapted(method, shape)
    assert torch.equal(model(images(shape)), convolution(shape)(images(shape)))


@ALL
@torch.no_grad()
def test_equals_the_convolution_with_the_adapted_weight_and_merges_to_it(method, shape):
    model, adapters = adapted(method, shape, torch.float64)
    shake(adapters)
    x = images(shape, dtype=torch.float64)
    adapter, base = model[0], model[0].base
    weight = adapter.adapted_weight(base.weight.flatten(1))
    plain = same_convolution(base, weight, adapter.adapted_bias(base.bias))
    expected = plain(x)
    assert relative(expected, base(x)) > 0.01
    assert relative(model(x), expected) < 1e-12
    torch.testing.assert_close(
        adapter.singular_values(),
        torch.linalg.svdvals(adapter.delta_weight())[: len(adapter.singular_values())],
    )
    with adapters.merged() as merged:
        assert type(merged[0]) is type(base)
        assert relative(merged(x), expected) < 1e-12
    adapters.remove()
    assert torch.equal(model(x), convolution(shape, torch.float64)(x))


@ALL
def test_gradients_agree_with_autograd_through_the_adapted_weight(method, shape):
    model, adapters = adapted(method, shape, torch.float64)
    shake(adapters)
    x = images(shape, dtype=torch.float64)
    adapter, base = model[0], model[0].base
    probe = torch.randn(model(x).shape, dtype=torch.float64)
    found = torch.autograd.grad((model(x) * probe).sum(), adapters.trainable_parameters())
    function = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d}[type(base)]
    weight = adapter.adapted_weight(base.weight.flatten(1)).reshape(base.weight.shape)
    y = function(x, weight, adapter.adapted_bias(base.bias), base.stride, base.padding, base.dilation)
    expected = torch.autograd.grad((y * probe).sum(), adapters.trainable_parameters())
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-10 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize(
    ("method", "shape"), [(m, s) for m in CONVOLVING for s in SHAPES if m == "lora" or s in ("1d", "2d")]
)
def test_copies_half_precision_and_compiled_forms_agree(method, shape):
    model, adapters = adapted(method, shape)
    shake(adapters)
    x = images(shape)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    if method == "lora" or shape == "2d":  # of all methods on one, and on all shapes of one
        torch.compiler.reset()
        assert relative(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected) < 1e-5
    narrow = convolution(shape).bfloat16()
    narrow_adapters = inject(narrow, adapters.spec)
    narrow_adapters.load_state_dict(adapters.state_dict())
    assert narrow(x.bfloat16()).dtype == torch.bfloat16
    assert relative(narrow(x.bfloat16()).float(), expected) < 5e-2


PEFTS = {
    "lora": lambda **o: peft.LoraConfig(r=4, lora_alpha=6, **o),
    "dora": lambda **o: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, **o),
    "adalora": lambda **o: peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=1, **o),
    "dylora": lambda **o: peft.LoraConfig(r=4, lora_alpha=6, **o),
    "lora_drop": lambda **o: peft.LoraConfig(r=4, lora_alpha=6, **o),
    "lora_prune": lambda **o: peft.LoraConfig(r=4, lora_alpha=6, **o),
    "loha": lambda **o: peft.LoHaConfig(r=4, alpha=6, **o),
    "lokr": lambda **o: peft.LoKrConfig(r=4, alpha=6, **o),
}


NOT_IN_PEFT = {
    ("lora", "dilated"): "PEFT 0.21.2 forgets the dilation of A, so that its shapes do not fit",
    **{(name, "dilated"): "as lora" for name in ("dora", "dylora", "lora_drop", "lora_prune")},
    ("adalora", "1d"): "PEFT's AdaLoRA knows Conv2d alone",
}


@pytest.mark.parametrize(
    ("method", "shape"),
    [(method, shape) for method in CONVOLVING for shape in SHAPES if (method, shape) not in NOT_IN_PEFT],
)
@torch.no_grad()
def test_folders_open_both_ways_in_peft(method, shape, tmp_path):
    model, adapters = adapted(method, shape)
    shake(adapters)
    x = images(shape)
    save_adapter(adapters, tmp_path / "ours")
    opened = peft.PeftModel.from_pretrained(convolution(shape), tmp_path / "ours")
    assert relative(opened(x), model(x)) < 1e-6
    theirs = peft.get_peft_model(convolution(shape), PEFTS[method](target_modules=["0"]))
    generator = torch.Generator().manual_seed(4)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "theirs")
    back = convolution(shape)
    load_adapter(back, tmp_path / "theirs")
    assert relative(back(x), theirs(x)) < 1e-6


@pytest.mark.parametrize("method", CONVOLVING)
def test_patch_embeddings_of_a_vision_transformer_train(method):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=12,
        patch_size=4,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
    )
    model = ViTForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 12, 12)
    expected = model(pixel_values=pixels).logits.detach()
    adapters = inject(
        model, METHODS[method].Spec(targets=["projection", "query"], rank=2, modules_to_save=[])
    )
    assert len(adapters) == 2
    assert torch.equal(model(pixel_values=pixels).logits, expected)
    shake(adapters)
    assert not torch.allclose(model(pixel_values=pixels).logits, expected, atol=1e-3)
    model(pixel_values=pixels).logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.trainable_parameters())


def test_first_gradients_reach_what_they_reach_on_linear_maps():
    model, adapters = adapted("lora", "2d")
    assert reached(model, adapters, images("2d")) == {"B"}


def test_every_start_of_lora_works_on_a_convolution():
    for init in ("gaussian", "scaled_gaussian", "orthogonal", "olora", "pissa"):
        model, _ = adapted("lora", "2d", init=init)
        assert relative(model(images("2d")), convolution("2d")(images("2d"))) < 1e-5


def test_a_bias_of_lora_is_one_number_a_channel():
    model, adapters = adapted("lora", "2d", torch.float64, lora_bias=True)
    shake(adapters)
    x = images("2d", dtype=torch.float64)
    expected = model(x)
    assert relative(adapters.merge()(x), expected) < 1e-12


def test_convolutions_are_no_part_of_all_linear():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert list(inject(model, METHODS["lora"].Spec(targets="all-linear")).adapters) == ["2"]


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv3d(4, 4, 3),
    ],
)
def test_other_convolutions_are_refused(module):
    with pytest.raises(TargetError, match="which lora cannot edit"):
        inject(nn.Sequential(module), METHODS["lora"].Spec(targets=["0"]))


def test_methods_of_linear_maps_alone_refuse_convolutions():
    with pytest.raises(TargetError, match="a Conv2d, which vera cannot edit"):
        inject(convolution("2d"), METHODS["vera"].Spec(targets=["0"]))


def test_magnitudes_per_input_are_refused_on_a_convolution():
    with pytest.raises(IncompatibleError, match="dora_axis: in cannot scale a convolution's inputs"):
        adapted("dora", "2d", dora_axis="in")
