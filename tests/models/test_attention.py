"""`SplitMultiheadAttention` against torch's own `nn.MultiheadAttention`, on all its options."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

import lora_lab
from lora_lab.errors import IncompatibleError
from lora_lab.models.attention import SplitMultiheadAttention, split_attention
from lora_lab.models.conversion import save_model, split_fused_projections
from tests.adapters.tiny import relative

BATCH, L, S, EMBED, HEADS = 3, 4, 5, 12, 3
EXACT = {"rtol": 0, "atol": 1e-12}
SINGLE = {"rtol": 0, "atol": 1e-6}
LAYOUTS = ("batch_first", "length_first", "unbatched")
MASKS = (None, "bool 2", "float 2", "bool 3", "float 3")
PADDINGS = (None, "bool", "float")
WEIGHTS = (
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
)
OPTIONS = {
    "plain": {},
    "without bias": {"bias": False},
    "other widths": {"kdim": 7, "vdim": 9},
    "other width of values": {"vdim": 9, "bias": False},
    "bias of keys and values": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 7, "vdim": 9},
}


@pytest.fixture(autouse=True)
def quiet():
    """Torch warns that one mask is boolean and the other is not, and that nested tensors are a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_attention(dtype=torch.float64, **options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(EMBED, HEADS, **options).to(dtype)
    with torch.no_grad():  # biases start at 0, which would hide faults
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attention


def make_inputs(attention, layout="batch_first", dtype=torch.float64):
    torch.manual_seed(1)
    shapes = [(BATCH, L, EMBED), (BATCH, S, attention.kdim), (BATCH, S, attention.vdim)]
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if layout == "unbatched":
        inputs = [x[0] for x in inputs]
    if layout == "length_first":
        inputs = [x.transpose(0, 1).contiguous() for x in inputs]
    return [x.requires_grad_() for x in inputs]


def make_masks(mask, padding, layout, dtype=torch.float64):
    """Masks which leave every query a key to attend to."""
    torch.manual_seed(2)
    rows = HEADS if layout == "unbatched" else BATCH * HEADS
    found = {}
    if mask is not None:
        kind, dimensions = mask.split()
        shape = (L, S) if dimensions == "2" else (rows, L, S)
        hidden = torch.rand(shape) < 0.4
        hidden[..., 0] = False
        found["attn_mask"] = hidden if kind == "bool" else torch.randn(shape, dtype=dtype)
    if padding is not None:
        hidden = torch.arange(S) >= torch.tensor([[5], [3], [2]])
        hidden = hidden if padding == "bool" else torch.randn(BATCH, S, dtype=dtype)
        found["key_padding_mask"] = hidden[0] if layout == "unbatched" else hidden
    return found


def outcome(attention, inputs, **options):
    """Output, weights and the gradients of the inputs, of a fixed weighing of the outputs."""
    output, weights = attention(*inputs, **options)
    torch.manual_seed(3)
    loss = (output * torch.randn(output.shape).to(output)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape).to(output)).sum()
    return output, weights, *torch.autograd.grad(loss, inputs)


def assert_same(given, expected, tolerance, equal_nan=False):
    assert len(given) == len(expected)
    for mine, theirs in zip(given, expected, strict=True):
        if theirs is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, theirs, **tolerance, equal_nan=equal_nan)


# The module


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_attention_equals_torchs_on_all_masks(name, layout):
    theirs = make_attention(batch_first=layout == "batch_first", **OPTIONS[name])
    ours = SplitMultiheadAttention(theirs)
    inputs = make_inputs(theirs, layout)
    for mask, padding, wanted in itertools.product(MASKS, PADDINGS, WEIGHTS):
        options = make_masks(mask, padding, layout) | wanted
        assert_same(outcome(ours, inputs, **options), outcome(theirs, inputs, **options), EXACT)


@pytest.mark.parametrize("name", OPTIONS)
def test_split_attention_equals_torchs_in_single_precision(name):
    theirs = make_attention(torch.float32, batch_first=True, **OPTIONS[name]).eval().requires_grad_(False)
    ours = SplitMultiheadAttention(theirs)
    inputs = [x.detach() for x in make_inputs(theirs, dtype=torch.float32)]
    for padding, wanted in itertools.product((None, "bool"), WEIGHTS):
        options = make_masks(None, padding, "batch_first") | wanted
        for given, expected in zip(ours(*inputs, **options), theirs(*inputs, **options), strict=True):
            assert given is expected is None or relative(given, expected) < 1e-6


@pytest.mark.parametrize("wanted", WEIGHTS, ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_causal_attention_equals_torchs(name, padding, wanted):
    theirs = make_attention(batch_first=True, **OPTIONS[name])
    hidden = torch.ones(L, S, dtype=torch.bool).triu(1)
    options = make_masks(None, padding, "batch_first") | wanted | {"attn_mask": hidden, "is_causal": True}
    inputs = make_inputs(theirs)
    ours = outcome(SplitMultiheadAttention(theirs), inputs, **options)
    assert_same(ours, outcome(theirs, inputs, **options), EXACT)


@pytest.mark.parametrize("wanted", WEIGHTS, ids=str)
def test_self_attention_equals_torchs_fused_kernel(wanted):
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double().eval().requires_grad_(False)
    x = torch.randn(BATCH, L, 8, dtype=torch.float64)
    hidden = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1]], dtype=torch.bool)
    for masks in ({}, {"key_padding_mask": hidden}, {"attn_mask": torch.ones(L, L).triu(1).bool()}):
        given = SplitMultiheadAttention(theirs)(x, x, x, **masks, **wanted)
        assert_same(given, theirs(x, x, x, **masks, **wanted), EXACT)


@pytest.mark.parametrize("wanted", WEIGHTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_draws_the_same_numbers_as_torchs(layout, wanted):
    theirs = make_attention(batch_first=layout == "batch_first", dropout=0.4)
    inputs = make_inputs(theirs, layout)
    results = []
    for attention in (SplitMultiheadAttention(theirs), theirs):
        torch.manual_seed(5)
        results.append(attention(*inputs, **wanted))
    assert_same(*results, EXACT)
    assert not torch.equal(theirs(*inputs, **wanted)[0], results[1][0])
    ours = SplitMultiheadAttention(theirs).eval()
    assert torch.equal(ours(*inputs, **wanted)[0], ours(*inputs, **wanted)[0])


@pytest.mark.parametrize("wanted", WEIGHTS, ids=str)
def test_a_query_that_may_see_nothing_gives_what_torch_gives(wanted):
    theirs = make_attention(batch_first=True)
    options = wanted | {"key_padding_mask": torch.tensor([[True] * S, [False] * S, [False] * S])}
    inputs = make_inputs(theirs)
    given = SplitMultiheadAttention(theirs)(*inputs, **options)
    assert_same(given, theirs(*inputs, **options), EXACT, equal_nan=True)


def test_half_precision_takes_masks_of_any_float():
    theirs = make_attention(torch.bfloat16, batch_first=True)
    inputs = make_inputs(theirs, dtype=torch.bfloat16)
    mask = make_masks("float 2", None, "batch_first", torch.float32)["attn_mask"]
    for wanted in WEIGHTS:
        output, _ = SplitMultiheadAttention(theirs)(*inputs, attn_mask=mask, **wanted)
        expected, _ = theirs(*inputs, attn_mask=mask.bfloat16(), **wanted)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (BATCH, L, 5)}, r"query must have the shape \(3, 4, 12\); got \(3, 4, 5\)"),
        ({"key": (2, S, EMBED)}, r"key must have the shape \(3, 5, 12\); got \(2, 5, 12\)"),
        ({"value": (BATCH, S + 1, EMBED)}, r"value must have the shape \(3, 5, 12\)"),
        ({"value": (S, EMBED)}, "must all have 2 or all 3 dimensions"),
        ({"key_padding_mask": (BATCH, L)}, r"key_padding_mask must have the shape \(3, 5\); got \(3, 4\)"),
        ({"attn_mask": (BATCH, L, S)}, r"attn_mask must have the shape \(4, 5\) or \(9, 4, 5\)"),
        ({"is_causal": True}, "give the causal mask"),
    ],
)
def test_inputs_of_other_shapes_are_told(change, message):
    attention = SplitMultiheadAttention(make_attention(batch_first=True))
    inputs = dict(zip(("query", "key", "value"), make_inputs(attention), strict=True))
    given = {name: torch.zeros(size) if isinstance(size, tuple) else size for name, size in change.items()}
    with pytest.raises(ValueError, match=message):
        attention(**inputs | given)


# Splitting a model


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 20, **{"batch_first": True, "dtype": torch.float64} | options)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12, dtype=torch.float64))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": False}, {"norm_first": True}, {"bias": False}], ids=str
)
def test_transformer_encoder_gives_the_same_before_and_after(options, padding, mask, training, gradients):
    """In evaluation without a mask torch's own runs a fused kernel, with padding on nested tensors."""
    theirs = encoder(**options).train(training)
    ours = split_attention(copy.deepcopy(theirs))
    x = torch.randn(BATCH, L, 12, dtype=torch.float64)
    x = x if options.get("batch_first", True) else x.transpose(0, 1)
    hidden = torch.arange(L) >= torch.tensor([[4], [3], [2]])
    masks = {"src_key_padding_mask": hidden} if padding else {}
    masks |= {"mask": torch.ones(L, L).triu(1).bool()} if mask else {}
    results = []
    with torch.set_grad_enabled(gradients):
        for model in (ours, theirs):
            torch.manual_seed(5)
            output = model(x, **masks)
            results.append(output if options.get("batch_first", True) else output.transpose(0, 1))
    seen = ~hidden if padding else slice(None)  # torch's nested tensors lose what stands at padding
    torch.testing.assert_close(results[0][seen], results[1][seen], **EXACT)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_whole_transformer_gives_the_same_before_and_after(batch_first, training):
    theirs = nn.Transformer(12, 2, 2, 2, 20, batch_first=batch_first, dtype=torch.float64).train(training)
    ours = split_attention(copy.deepcopy(theirs))
    assert sum(isinstance(module, SplitMultiheadAttention) for module in ours.modules()) == 6
    source, target = torch.randn(BATCH, S, 12).double(), torch.randn(BATCH, L, 12).double()
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    hidden = torch.arange(S) >= torch.tensor([[5], [3], [2]])
    causal = theirs.generate_square_subsequent_mask(L, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        results.append(
            model(source, target, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=hidden)
        )
    torch.testing.assert_close(*results, **EXACT)


def test_splitting_keeps_values_type_mode_and_what_is_trainable():
    parts = {
        "fused": make_attention(),
        "apart": make_attention(kdim=7),
        "narrow": make_attention(torch.bfloat16),
    }
    old = nn.ModuleDict(parts | {"linear": nn.Linear(2, 2)})
    old["fused"].in_proj_bias.requires_grad_(False)
    old["apart"].k_proj_weight.requires_grad_(False)
    old["narrow"].requires_grad_(False).eval()
    model, state = nn.ModuleDict(old.items()), torch.get_rng_state()
    with torch.no_grad():
        assert split_attention(model) is model
    assert torch.equal(torch.get_rng_state(), state)
    fused, apart, narrow = (model[name] for name in parts)
    assert torch.equal(apart.key.weight, parts["apart"].k_proj_weight)
    assert torch.equal(narrow.value.weight, parts["narrow"].in_proj_weight[2 * EMBED :])
    assert torch.equal(narrow.value.bias, parts["narrow"].in_proj_bias[2 * EMBED :])
    assert torch.equal(fused.output.weight, parts["fused"].out_proj.weight)
    assert all(type(part) is nn.Linear for part in fused.children())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [
        *(f"fused.{name}.bias" for name in ("query", "key", "value")),
        "apart.key.weight",
        *(f"narrow.{name}" for name, _ in narrow.named_parameters()),
    ]
    assert (fused.query.training, narrow.query.training) == (True, False)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert model["linear"] is old["linear"]
    meta = split_attention(nn.Sequential(nn.MultiheadAttention(4, 2, device="meta")))
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_encoder_can_be_stacked_from_a_split_layer():
    layer = encoder().layers[0].eval()
    x, hidden = torch.randn(2, 3, 12).double(), torch.tensor([[False] * 3, [False, True, True]])
    expected = layer(layer(x, src_key_padding_mask=hidden), src_key_padding_mask=hidden)
    stacked = nn.TransformerEncoder(split_attention(layer), 2).eval()
    with torch.no_grad():
        output = stacked(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(output[~hidden], expected[~hidden], **EXACT)


def test_attention_that_stands_twice_is_split_once():
    shared = nn.MultiheadAttention(4, 2)
    model = split_attention(nn.ModuleList([shared, nn.ModuleDict({"again": shared})]))
    assert isinstance(model[0], SplitMultiheadAttention)
    assert model[0] is model[1]["again"]


def test_attention_itself_is_returned_split():
    assert isinstance(lora_lab.split_attention(make_attention()), SplitMultiheadAttention)


def test_subclass_with_its_own_forward_is_refused_and_nothing_is_changed():
    class Mine(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    model = nn.ModuleList([nn.MultiheadAttention(4, 2), Mine(4, 2)])
    with pytest.raises(IncompatibleError, match="Mine is a subclass of nn.MultiheadAttention"):
        split_attention(model)
    assert type(model[0]) is nn.MultiheadAttention


def test_split_attention_can_be_copied_pickled_and_compiled():
    attention = SplitMultiheadAttention(make_attention(batch_first=True)).eval()
    inputs = make_inputs(attention)
    expected = attention(*inputs)
    assert_same(copy.deepcopy(attention)(*inputs), expected, EXACT)
    assert_same(pickle.loads(pickle.dumps(attention))(*inputs), expected, EXACT)
    torch.compiler.reset()
    assert_same(torch.compile(attention, fullgraph=True, backend="aot_eager")(*inputs), expected, EXACT)


@pytest.mark.parametrize("name", OPTIONS)
def test_fused_tensors_are_those_of_torchs_attention(name):
    theirs = make_attention(**OPTIONS[name])
    fused = SplitMultiheadAttention(theirs).fused_tensors()
    assert fused.keys() == theirs.state_dict().keys()
    assert all(torch.equal(fused[key], tensor) for key, tensor in theirs.state_dict().items())


def test_saved_model_of_transformers_gets_its_fused_attention_back(tmp_path):
    """Siglip pools with `nn.MultiheadAttention`."""
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    model = SiglipVisionModel(config).eval()
    pixels = torch.randn(2, 3, 8, 8)
    expected = model(pixels).pooler_output
    split_fused_projections(model)
    assert any(isinstance(module, SplitMultiheadAttention) for module in model.modules())
    torch.testing.assert_close(model(pixels).pooler_output, expected, **SINGLE)
    save_model(model, tmp_path)
    opened = SiglipVisionModel.from_pretrained(tmp_path).eval()
    assert torch.equal(opened(pixels).pooler_output, expected)
