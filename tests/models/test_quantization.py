"""Quantised bases, against bitsandbytes' own layers, the specification's numbers and a search for codes."""

import copy
import importlib.util
import json
import pickle

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from lora_lab.adapters import METHODS, inject
from lora_lab.cli import main
from lora_lab.config import compose
from lora_lab.errors import ConfigError, IncompatibleError, TargetError
from lora_lab.experiment import run
from lora_lab.models.architectures import find_roles
from lora_lab.models.build import ModelConfig, build_model, check_model
from lora_lab.models.conversion import save_model
from lora_lab.models.quantization import (
    QuantizationOptions,
    QuantizedLinear,
    forget_weights,
    holds_codes,
    quantize,
)
from lora_lab.models.sources import HubSource
from lora_lab.training.module import FineTuner

KINDS = ("nf4", "fp4", "int8")
SINGLE = QuantizationOptions(use_double_quant=False)

CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
"""NF4's sixteen numbers, from the specification."""


def linear(rows=16, columns=24, bias=True, seed=0, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(columns, rows, bias=bias, dtype=dtype)


def of_weight(weight) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight
    return made


def quantized(kind="nf4", options=None, **shape) -> QuantizedLinear:
    return QuantizedLinear(linear(**shape), kind, options or QuantizationOptions())


def nearest_codes(weight, blocksize=64):
    """Brute force: each number's nearest code and its value, block by block."""
    codes, values = [], []
    for block in weight.flatten().split(blocksize):
        scale = block.abs().max()
        distance = (block.unsqueeze(1) - CODE * scale).abs()
        codes.append(distance.argmin(1))
        values.append(CODE[codes[-1]] * scale)
    return torch.cat(codes), torch.cat(values).view_as(weight)


# The codes


def test_nf4_of_evenly_spaced_numbers():
    made = QuantizedLinear(of_weight(torch.linspace(-1, 1, 64).view(1, 64)), "nf4", SINGLE)
    expected = (
        "0,0,1,17,17,17,18,34,34,51,52,68,69,85,102,103,"
        "120,136,153,170,171,187,204,204,221,221,238,238,238,239,255,255"
    )
    assert made.codes.flatten().tolist() == [int(byte) for byte in expected.split(",")]


def test_nf4_of_a_small_matrix():
    made = QuantizedLinear(of_weight(torch.tensor([[0, 0.5, -1, 2], [1, -2, 0.25, -0.1]])), "nf4", SINGLE)
    assert made.codes.flatten().tolist() == [122, 47, 192, 150]
    assert made.absmax.tolist() == [2]
    expected = [[0, 0.49222460, -1.05014610, 2], [0.88141966, -2, 0.32186040, -0.18210007]]
    torch.testing.assert_close(made.weight, torch.tensor(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(16, 24), (7, 9), (5, 50), (48, 80), (9, 81), (1, 1)])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_nf4_takes_the_nearest_code_whatever_the_shape(shape, blocksize):
    weight = torch.randn(*shape)
    made = QuantizedLinear(of_weight(weight), "nf4", QuantizationOptions(False, blocksize))
    codes, values = nearest_codes(weight, blocksize)
    unpacked = torch.stack([made.codes >> 4, made.codes & 15], dim=1).flatten()
    assert torch.equal(unpacked[: weight.numel()].long(), codes)
    assert torch.equal(made.weight, values)


def test_a_block_of_zeros_stays_zero():
    weight = torch.randn(2, 64)
    weight[0] = 0
    for options in (SINGLE, QuantizationOptions()):
        made = QuantizedLinear(of_weight(weight), "nf4", options)
        assert set(made.codes[:32].flatten().tolist()) == {0x77}  # twice the code of 0
        assert not made.weight[0].any()
        assert made.weight[1].any()
    assert not QuantizedLinear(of_weight(weight), "int8", SINGLE).weight[0].any()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantising_what_was_dequantised_changes_nothing(kind):
    once = quantized(kind, SINGLE, rows=48, columns=80)
    again = QuantizedLinear(of_weight(once.weight), kind, SINGLE)
    assert torch.equal(again.absmax, once.absmax)
    assert torch.equal(again.weight, once.weight)
    assert kind == "fp4" or torch.equal(again.codes, once.codes)  # fp4 has two zeros


@pytest.mark.parametrize(
    ("kind", "options", "bits"),
    [
        ("nf4", SINGLE, 4 + 32 / 64),
        ("nf4", QuantizationOptions(), 4 + 8 / 64 + 32 / (64 * 256)),  # 4.127
        ("fp4", QuantizationOptions(), 4 + 8 / 64 + 32 / (64 * 256)),
        ("nf4", QuantizationOptions(blocksize=128), 4 + 8 / 128 + 32 / (128 * 256)),
        ("int8", QuantizationOptions(), 8 + 32 / 1024),
    ],
)
def test_bits_held_for_each_weight(kind, options, bits):
    made = QuantizedLinear(linear(1024, 1024, bias=False), kind, options)
    held = sum(tensor.numel() * tensor.element_size() for tensor in made.state_dict().values())
    offset = 4 if made.offset is not None else 0
    assert 8 * (held - offset) / 1024**2 == bits
    assert not list(made.parameters())


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.092), ("fp4", 0.12), ("int8", 0.0073)])
def test_error_on_a_gaussian_weight(kind, error):
    weight = torch.randn(512, 512)
    made = QuantizedLinear(of_weight(weight), kind, SINGLE)
    assert float((made.weight - weight).norm() / weight.norm()) == pytest.approx(error, rel=0.05)


# Against bitsandbytes' own layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_layers_are_those_of_bitsandbytes(kind, double, dtype):
    # Their kernel for AVX-512 is wrong where rows are not whole blocks.
    plain = linear(48, 128, dtype=dtype)
    theirs = bnb.nn.Linear4bit(128, 48, quant_type=kind, compress_statistics=double, compute_dtype=dtype)
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to(dtype).to("cpu")
    ours = QuantizedLinear(plain, kind, QuantizationOptions(double))
    assert torch.equal(ours.codes, theirs.weight.data)
    assert torch.equal(
        ours.weight, bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    )
    x = torch.randn(2, 3, 128, dtype=dtype)
    assert_same_products(ours, theirs, x, {torch.float32: 1e-6}.get(dtype, 1e-2))


def test_eight_bit_layers_are_those_of_bitsandbytes():
    plain = linear(48, 80)
    theirs = bnb.nn.Linear8bitLt(80, 48, has_fp16_weights=False)
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to("cpu")
    ours = QuantizedLinear(plain, "int8", QuantizationOptions())
    assert_same_products(ours, theirs, torch.randn(2, 3, 80), 1e-5)


def assert_same_products(ours, theirs, x, tolerance):
    """Compares outputs and the inputs' gradients, relative to the greatest."""
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    y, z = ours(found), theirs.train()(expected)
    y.square().sum().backward()
    z.square().sum().backward()
    for own, other in ((y, z), (found.grad, expected.grad)):
        assert own.dtype == other.dtype == x.dtype
        torch.testing.assert_close(own, other, rtol=0, atol=tolerance * float(other.detach().abs().max()))


# The module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_map_and_its_gradient_are_those_of_the_lent_weight(kind, bias):
    made = quantized(kind, bias=bias).double()
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    assert made.weight.dtype == torch.float64
    torch.testing.assert_close(made(x), F.linear(x, made.weight, made.bias), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(made, x)
    assert made(torch.randn(0, 24)).shape == (0, 16)
    assert made(torch.randn(24)).shape == (16,)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_input_and_adapter_alone(kind):
    model = nn.Sequential(quantized(kind))
    adapters = inject(model, METHODS["lora"].Spec(rank=4, targets=["0"], init="random"))
    x = torch.randn(5, 24, requires_grad=True)
    model(x).square().sum().backward()
    assert x.grad.any()
    assert {name: bool(p.grad.any()) for name, p in adapters.named_parameters().items()} == {
        "0.A": True,
        "0.B": True,
    }
    assert {name for name, _ in model.named_parameters()} == {"0.A", "0.B"}
    assert not any(tensor.requires_grad for tensor in model[0].base.state_dict().values())


@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_float_weight_is_kept_for_the_backward_pass(kind, compute_dtype):
    model = nn.Sequential(quantized(kind, QuantizationOptions(compute_dtype=compute_dtype)), nn.ReLU())
    inject(model, METHODS["lora"].Spec(rank=4, targets=["0"]))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(5, 24, requires_grad=True)).sum().backward()
    assert saved
    assert max(tensor.numel() for tensor in saved) < 24 * 16


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16"])
def test_products_are_computed_in_compute_dtype_and_returned_in_the_inputs_type(compute_dtype):
    dtype = getattr(torch, compute_dtype)
    made = quantized(options=QuantizationOptions(compute_dtype=compute_dtype))
    x = torch.randn(5, 24, requires_grad=True)
    y = made(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, F.linear(x.to(dtype), made.weight.to(dtype), made.bias.to(dtype)).float())
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_another_type_of_the_model_leaves_codes_and_scales_alone(kind):
    made = quantized(kind, rows=48, columns=80)
    weight, codes = made.weight, {name: getattr(made, name).clone() for name in ("codes", "absmax")}
    made.bfloat16()
    assert all(torch.equal(getattr(made, name), tensor) for name, tensor in codes.items())
    assert made.bias.dtype == torch.bfloat16
    assert torch.equal(made.weight, weight.bfloat16())
    assert torch.equal(made.float().weight, weight)
    assert made.to("meta").absmax.device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state_dicts_are_exact_and_hold_no_full_weight(kind):
    made = QuantizedLinear(linear(), kind, QuantizationOptions(), keep_weight=True)
    other = quantized(kind, seed=1)
    assert torch.equal(made.full_weight, linear().weight)
    assert not torch.equal(other.weight, made.weight)
    other.load_state_dict(made.state_dict())
    for twin in (other, copy.deepcopy(made), pickle.loads(pickle.dumps(made)), quantized(kind)):
        assert torch.equal(twin.weight, made.weight)
        assert torch.equal(twin.bias, made.bias)
        assert twin.full_weight is None
    assert made.full_weight is not None
    assert set(made.state_dict()) <= {"codes", "absmax", "nested_absmax", "offset", "bias"}
    assert "W" not in repr(made)
    forget_weights(made)
    assert made.full_weight is None


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_map_agrees(kind):
    model = nn.Sequential(quantized(kind))
    adapters = inject(model, METHODS["lora"].Spec(rank=4, targets=["0"], init="random"))
    x = torch.randn(5, 24)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    found, expected = (
        torch.autograd.grad(made(x).square().sum(), adapters.trainable_parameters())
        for made in (compiled, model)
    )
    torch.testing.assert_close(found, expected)


# Whole models

ARCHITECTURES = {
    "bert": {},
    "bert pooled": {"pooling": "mean"},
    "gpt2": {"task": "causal_lm"},
    "gpt2 split": {"split_fused": True},
    "llama": {"task": "causal_lm"},
    "t5": {},
    "vit": {},
    "deberta-v2": {},
}


def tiny(name: str, **fields) -> ModelConfig:
    kind = name.partition(" ")[0]
    return ModelConfig(name=f"random:{kind}", **ARCHITECTURES.get(name, {}), **fields)


def build_tiny(name: str, num_labels=3, **fields):
    torch.manual_seed(0)
    return build_model(tiny(name, **fields), num_labels=num_labels).eval()


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 1, 8, 8)}
    ids = torch.randint(5, 100, (2, 6))
    ids[:, -1] = 3  # the end token, by which t5 classifies
    return {"input_ids": ids}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_linear_maps_of_the_blocks_are_quantised_and_nothing_else(name):
    plain, model = build_tiny(name), build_tiny(name, quantization="nf4")
    blocks = tuple(f"{site.path}." for site in find_roles(plain) if site.role == "block")
    expected = {
        path
        for path, module in plain.named_modules()
        if isinstance(module, nn.Linear) and path.startswith(blocks)
    }
    found = {path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert found == expected
    assert found
    left = dict(model.named_parameters())
    assert all(torch.equal(left[key], tensor) for key, tensor in plain.named_parameters() if key in left)
    assert {path for path, m in plain.named_modules() if type(m) is nn.Linear} - found == {
        path for path, m in model.named_modules() if type(m) is nn.Linear
    }
    assert [site.path for site in find_roles(model)] == [site.path for site in find_roles(plain)]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_computes_what_its_dequantised_copy_does(kind, name):
    model = build_tiny(name, quantization=kind)
    plain = build_tiny(name)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(path).weight.data = module.weight
    inputs = inputs_of(name)
    logits, expected = model(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain.get_parameter(key).grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_half_precision_models_train_on_codes(name, dtype):
    model = build_tiny(name, quantization="nf4", dtype=dtype)
    inject(model, METHODS["lora"].Spec(rank=2, init="random"))
    logits = model(**inputs_of(name)).logits
    assert logits.dtype == getattr(torch, dtype)
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_model_without_a_table_of_roles_keeps_its_heads():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.lm_head, self.classifier = (nn.Sequential(nn.Linear(8, 8)) for _ in range(3))

        def get_output_embeddings(self):
            return self.lm_head[0]

    model = quantize(Unknown(), "nf4", QuantizationOptions())
    assert [holds_codes(part) for part in (model.body, model.lm_head, model.classifier)] == [
        True,
        False,
        False,
    ]


def test_a_shared_map_is_quantised_once_and_stays_shared():
    shared = nn.Linear(8, 8)
    model = quantize(nn.Sequential(shared, nn.ReLU(), shared), "nf4", QuantizationOptions())
    assert model[0] is model[2]
    assert isinstance(model[0], QuantizedLinear)


def test_parts_of_multihead_attention_stay():
    model = quantize(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)), "nf4", SINGLE)
    assert isinstance(model[0].out_proj, nn.Linear)
    assert isinstance(model[1], QuantizedLinear)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_numbers_count_as_parameters(kind):
    spec = METHODS["lora"].Spec(rank=2)
    plain, codes = inject(build_tiny("bert"), spec), inject(build_tiny("bert", quantization=kind), spec)
    assert codes.base_count() == plain.base_count()
    assert codes.trainable_count() == plain.trainable_count()


def test_gradient_checkpointing_gives_equal_gradients():
    gradients = []
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for checkpointing in (False, True):
        model = build_tiny("bert", quantization="nf4", config=no_dropout).train()
        adapters = inject(model, METHODS["lora"].Spec(rank=2, init="random"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        model(**inputs_of("bert")).logits.square().sum().backward()
        gradients.append([p.grad for p in adapters.trainable_parameters()])
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_merging_gives_plain_maps_at_the_sites_and_saving_dequantises_the_rest(tmp_path):
    model = build_tiny("bert pooled", quantization="nf4")
    adapters = inject(model, METHODS["lora"].Spec(rank=2, init="random"))
    inputs = inputs_of("bert")
    expected = model(**inputs).logits
    query = next(iter(adapters))
    weight = query.base.weight + query.delta_weight()
    adapters.merge()
    merged = model.bert.encoder.layer[0].attention.self.query
    assert type(merged) is nn.Linear
    assert torch.equal(merged.weight, weight)
    assert isinstance(model.bert.encoder.layer[0].attention.self.key, QuantizedLinear)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    save_model(model, tmp_path)
    assert all(tensor.is_floating_point() for tensor in load_file(tmp_path / "model.safetensors").values())
    again = build_model(ModelConfig(name=str(tmp_path), pooling="mean"), num_labels=3).eval()
    assert not holds_codes(again)
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gpt2 split"])
def test_gpt2_on_codes_is_saved_in_its_own_layout(name, tmp_path):
    model = build_tiny(name, quantization="nf4")
    inputs = inputs_of(name)
    save_model(model, tmp_path)
    again = build_model(ModelConfig(name=str(tmp_path), **ARCHITECTURES[name]), num_labels=3).eval()
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"quantization": "nf4", "quantization_options": QuantizationOptions(blocksize=100)},
            "quantization_options.blocksize: must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096; got 100",
        ),
        (
            {"quantization": "int8", "quantization_options": QuantizationOptions(blocksize=128)},
            "quantization_options.blocksize: has no meaning with quantization: int8; remove it",
        ),
        (
            {"quantization_options": QuantizationOptions(compute_dtype="bfloat16")},
            "quantization_options.compute_dtype: has no meaning with quantization: none; remove it",
        ),
    ],
)
def test_faulty_options_show_without_a_model(fields, message):
    assert check_model(tiny("bert", **fields)) == [message]
    with pytest.raises(ConfigError, match="model.quantization_options"):
        build_model(tiny("bert", **fields))


def test_a_model_without_blocks_is_refused():
    (fault,) = check_model(tiny("mlp", quantization="nf4"))
    assert fault.startswith("quantization: mlp has no blocks with maps to quantise")


def test_an_unknown_kind_is_refused_by_the_config(tmp_path):
    (tmp_path / "experiment.yaml").write_text("model: {name: 'random:bert'}\nadapter: {method: lora}\n")
    with pytest.raises(ConfigError, match="model.quantization: .*nf5"):
        compose(tmp_path / "experiment.yaml", ["data.source=toy", "model.quantization=nf5"])


def test_a_missing_library_is_told_before_anything_is_loaded(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    message = "quantization: nf4 needs bitsandbytes: pip install 'lora_lab[quant]'"
    assert check_model(ModelConfig(name="embedded:minilm", quantization="nf4")) == [message]
    assert check_model(ModelConfig(name="embedded:minilm")) == []
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        quantize(nn.Sequential(nn.Linear(2, 2)), "nf4", SINGLE)


def test_a_checkpoint_of_codes_is_not_quantised_again(tmp_path, monkeypatch):
    save_model(build_tiny("bert"), tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    told["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(told))
    (fault,) = check_model(ModelConfig(name=str(tmp_path), quantization="nf4"))
    assert "is stored quantised already; set it to none, or give the model of full precision" in fault
    assert check_model(ModelConfig(name=str(tmp_path))) == []
    # A hub repository shows its config only once it is loaded.
    hub_config = AutoConfig.from_pretrained(tmp_path)
    monkeypatch.setattr(HubSource, "config", lambda source, changes: hub_config)
    with pytest.raises(ConfigError, match="'owner/name' is stored quantised already"):
        build_model(ModelConfig(name="owner/name", quantization="nf4"))


def test_quantising_twice_is_refused():
    model = build_tiny("bert", quantization="nf4")
    with pytest.raises(IncompatibleError, match="the model is already quantised; set it to none"):
        quantize(model, "int8", QuantizationOptions())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.double(), "not float64"),
        (lambda model: model[0].weight.data.fill_(torch.nan), "0 has numbers that are not finite"),
        (lambda model: model.__delitem__(0), "has no linear map to quantise"),
    ],
)
def test_what_cannot_be_quantised_is_refused_and_left_alone(change, message):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    change(model)
    with pytest.raises(IncompatibleError, match=message):
        quantize(model, "nf4", QuantizationOptions())
    assert not holds_codes(model)


def test_methods_that_would_train_codes_are_refused():
    model = build_tiny("bert", quantization="nf4")
    with pytest.raises(IncompatibleError, match=r"full trains the weights, and .*query holds codes"):
        inject(model, METHODS["full"].Spec())
    with pytest.raises(IncompatibleError, match="would undo the base's quantisation. Use mode: subtract"):
        inject(model, METHODS["pissa"].Spec(rank=2, mode="residual"))
    for name in ("attention.self.query", "layer.0.attention.output"):
        with pytest.raises(TargetError, match=f"modules_to_save: .*{name} holds codes"):
            inject(model, METHODS["lora"].Spec(modules_to_save=[name]))
    norms = inject(model, METHODS["full"].Spec(targets=["LayerNorm"]))
    assert norms.trainable_count(saved=False) > 0


def test_full_is_refused_on_maps_without_a_bias():
    model = build_tiny("llama", quantization="nf4")
    with pytest.raises(IncompatibleError, match="full trains the weights"):
        inject(model, METHODS["full"].Spec())


def test_bitfit_learns_beside_the_codes():
    model = build_tiny("bert", quantization="nf4")
    adapters = inject(model, METHODS["bitfit"].Spec(targets=["query"]))
    model(**inputs_of("bert")).logits.sum().backward()
    assert all(p.grad.any() for p in adapters.trainable_parameters())


@pytest.mark.parametrize("kind", ["fp4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora", "hra", "ia3"])
@torch.no_grad()
def test_methods_start_as_the_identity_of_the_other_codes_too(method, kind):
    model = build_tiny("bert", quantization=kind)
    inputs = inputs_of("bert")
    expected = model(**inputs).logits
    inject(model, METHODS[method].Spec())
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


# Runs

CONFIG = """
name: quantised
model: {name: "random:bert", quantization: nf4}
data: {source: files, train: ROWS, text: [text], label: label, batch_size: 4, max_length: 16}
adapter: {method: lora, rank: 2, dropout: 0.2}
trainer: {max_epochs: 2, checkpoint_every: 5, progress_bar: false, accelerator: cpu}
tracking: {wandb: disabled}
"""


class Stopped(Exception):
    pass


def test_a_run_on_codes_trains_resumes_and_evaluates(tmp_path, monkeypatch):
    rows = [f"{'good' if index % 3 else 'bad'} film {index},{index % 3 > 0}" for index in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    path = tmp_path / "experiment.yaml"
    path.write_text(CONFIG.replace("ROWS", str(tmp_path / "rows.csv")) + f"output: {tmp_path / 'runs'}\n")
    assert main(["train", str(path), "run=whole"]) == 0
    assert main(["evaluate", str(tmp_path / "runs" / "quantised" / "whole")]) == 0

    step = FineTuner.training_step

    def stopping(self, *arguments):
        if self.global_step == 8:
            raise Stopped
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "training_step", stopping)
        with pytest.raises(Stopped):
            run(compose(path, ["run=part"]))
    assert main(["train", str(path), "run=part", "--resume"]) == 0
    ours, theirs = (
        load_file(tmp_path / "runs" / "quantised" / name / "adapter" / "adapter_model.safetensors")
        for name in ("part", "whole")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
