"""Adapters on cross-attention, on `nn.MultiheadAttention` and on split projections: none is ever dead."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from lora_lab import inject, split_attention
from lora_lab.adapters import METHODS
from lora_lab.errors import TargetError
from lora_lab.models.architectures import roles_of
from lora_lab.models.conversion import split_fused_projections
from tests.adapters.tiny import relative, shake

LoRASpec = METHODS["lora"].Spec
EXACT = {"rtol": 0, "atol": 1e-12}
BATCH, L, S, EMBED, CONTEXT, HEADS = 2, 4, 5, 12, 7, 3
CROSS = ["cross_query", "cross_key", "cross_value"]
ON_PROJECTIONS = {
    "lora": {},
    "dora": {"rank": 2},
    "pissa": {"rank": 2},
    "ia3": {"feedforward_modules": []},
    "hra": {"rank": 2},
    "vera": {},
    "bitfit": {},
}


class CrossAttention(nn.Module):
    """Reads a context of another width."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(EMBED, HEADS, kdim=CONTEXT, vdim=CONTEXT, batch_first=True)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x, context, hidden=None):
        return self.attention(x, context, context, key_padding_mask=hidden, need_weights=False)[0]


def cross_attention():
    torch.manual_seed(0)
    return split_attention(CrossAttention().double().eval())


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = (BATCH, L, EMBED), (BATCH, S, CONTEXT)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def adapted(method="lora", targets=("query", "key", "value"), shaken=True, **options):
    model = cross_attention()
    adapters = inject(model, METHODS[method].Spec(targets=list(targets), **options))
    if shaken:
        shake(adapters)
    return model, adapters


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 20, **{"batch_first": True} | options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@torch.no_grad()
def assert_alive(adapters, output, at_least=1e-4):
    """Moves each adapter alone and looks whether the output follows."""
    before = output()
    assert len(adapters) > 0
    for path, adapter in adapters.items():
        own = [tensor for tensor in adapter.adapter_tensors().values() if tensor.requires_grad]
        start = [tensor.clone() for tensor in own]
        for tensor in own:
            tensor.add_(0.3 * torch.randn_like(tensor))
        assert relative(output(), before) > at_least, f"{path} is dead"
        for tensor, value in zip(own, start, strict=True):
            tensor.copy_(value)


# Cross-attention


def test_adapted_attention_is_softmax_of_merged_weights():
    model, adapters = adapted(rank=2, alpha=5.0)
    x, context = make_inputs()
    W = {}
    for path, adapter in adapters.items():
        W[path.rpartition(".")[2]] = adapter.base.weight + 5 / 2 * adapter.B @ adapter.A
    attention = model.attention
    Q = x @ W["query"].T + attention.query.bias
    K = context @ W["key"].T + attention.key.bias
    V = context @ W["value"].T + attention.value.bias
    width = EMBED // HEADS
    expected = torch.empty(BATCH, L, EMBED, dtype=torch.float64)
    for row in range(BATCH):
        for head in range(HEADS):
            own = slice(head * width, (head + 1) * width)
            scores = Q[row, :, own] @ K[row, :, own].T / width**0.5
            expected[row, :, own] = scores.softmax(-1) @ V[row, :, own]
    expected = expected @ attention.output.weight.T + attention.output.bias
    torch.testing.assert_close(model(x, context), expected, **EXACT)


def test_order_of_the_context_does_not_matter():
    model, _ = adapted()
    x, context = make_inputs()
    shuffled = context[:, torch.tensor([3, 0, 4, 1, 2])]
    torch.testing.assert_close(model(x, shuffled), model(x, context), **EXACT)


def test_hidden_context_has_no_influence_and_no_gradient():
    model, _ = adapted()
    x, context = make_inputs()
    context.requires_grad_()
    hidden = torch.tensor([[False] * 4 + [True], [False, True, False, False, True]])
    output = model(x, context, hidden)
    output.square().sum().backward()
    assert torch.equal(context.grad[hidden], torch.zeros(3, CONTEXT, dtype=torch.float64))
    assert (context.grad[~hidden].abs().amax(-1) > 0).all()
    changed = context.detach().clone()
    changed[hidden] = 1e3
    assert torch.equal(model(x, changed, hidden), output)


@pytest.mark.parametrize("targets", [("query", "value"), ("key",), ("output",)])
def test_only_the_projections_asked_for_get_gradients(targets):
    model, adapters = adapted(targets=targets)
    model(*make_inputs()).square().sum().backward()
    assert [path.rpartition(".")[2] for path in adapters.adapters] == list(targets)
    for name, parameter in model.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert trained == name.endswith((".A", ".B")), name


@pytest.mark.parametrize("method", ON_PROJECTIONS)
def test_methods_on_split_projections_start_at_the_base_and_merge(method):
    base, inputs = cross_attention(), make_inputs()
    targets = ["query", "key", "value", "output"]
    model, adapters = adapted(method, targets, shaken=False, **ON_PROJECTIONS[method])
    torch.testing.assert_close(model(*inputs), base(*inputs), **EXACT)
    shake(adapters)
    changed = model(*inputs)
    assert relative(changed, base(*inputs)) > 0.01
    if method != "bitfit":  # a shift of all keys shifts every score of a row alike, which softmax ignores
        assert_alive(adapters, lambda: model(*inputs))
    with adapters.merged():
        torch.testing.assert_close(model(*inputs), changed, **EXACT)
    adapters.remove()
    assert torch.equal(model(*inputs), base(*inputs))


def test_seeds_example_has_its_parameters_and_shape():
    """Queries, keys, values (4, 32, 512), 8 heads, rank 8 on query, key, value: 3 · 8 · (512 + 512)."""
    model = split_attention(nn.Sequential(nn.MultiheadAttention(512, 8, batch_first=True)))
    adapters = inject(model, LoRASpec(rank=8, targets=["query", "key", "value"]))
    assert adapters.trainable_count() == 24_576
    x = [torch.randn(4, 32, 512) for _ in range(3)]
    assert model[0](*x)[0].shape == (4, 32, 512)


def test_context_of_another_width_has_adapters_of_its_width():
    _, adapters = adapted(rank=2)
    shapes = {path.rpartition(".")[2]: adapter.A.shape for path, adapter in adapters.items()}
    assert shapes == {"query": (2, EMBED), "key": (2, CONTEXT), "value": (2, CONTEXT)}


# Models of transformers


@pytest.mark.parametrize("role", [*CROSS, "cross_attention_output"])
def test_every_cross_adapter_of_t5_is_alive(role, make_model, make_batch):
    model = make_model("t5")
    adapters = inject(model, LoRASpec(rank=4, init="random", targets=[role]))
    assert all("EncDecAttention" in path for path in adapters.adapters)
    assert_alive(adapters, lambda: model(**make_batch("t5")).logits, at_least=1e-5)


def test_same_tensors_on_t5s_cross_attention_give_pefts_logits(make_model, make_batch):
    model, batch = make_model("t5"), make_batch("t5")
    with torch.no_grad():
        base = model(**batch).logits
    adapters = inject(model, LoRASpec(rank=4, alpha=6.0, targets=CROSS, modules_to_save=[]))
    shake(adapters, by=0.3)
    theirs = peft.get_peft_model(
        make_model("t5"), peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(adapters.adapters))
    )
    tensors = {
        f"base_model.model.{path}.{name}": tensor.detach()
        for path, adapter in adapters.items()
        for name, tensor in adapter.peft_tensors().items()
    }
    result = peft.set_peft_model_state_dict(theirs, tensors)
    assert not result.unexpected_keys
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(adapters)
    with torch.no_grad():
        assert relative(model(**batch).logits, base) > 0.01
        assert relative(model(**batch).logits, theirs.eval()(**batch).logits) < 1e-6


def test_bert_as_a_decoder_has_cross_roles_that_are_alive():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = BertLMHeadModel(
        BertConfig(vocab_size=30, is_decoder=True, add_cross_attention=True, **sizes)
    ).eval()
    assert [*CROSS, "cross_attention_output"] == [role for role in roles_of(model) if "cross" in role]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    context, ids = torch.randn(2, 5, 16), torch.randint(30, (2, 4))
    adapters = inject(model, LoRASpec(rank=4, init="random", targets=[*CROSS, "cross_attention_output"]))
    assert len(adapters) == 8
    assert all(".crossattention." in path for path in adapters.adapters)
    assert_alive(adapters, lambda: model(input_ids=ids, encoder_hidden_states=context).logits)


def test_query_and_value_of_split_gpt2_are_loralibs_merged_linear(make_model):
    """`MergedLinear(enable_lora=[True, False, True])`: one A of 2 r rows, B a convolution of two groups."""
    model = make_model("gpt2")
    hidden = torch.randn(2, 5, 32)
    base = copy.deepcopy(model.transformer.h[0].attn.c_attn)(hidden)
    split_fused_projections(model)
    fused = model.transformer.h[0].attn.c_attn
    unadapted = fused(hidden)
    adapters = inject(model, LoRASpec(rank=3, alpha=6.0, targets=["query", "value"]))
    shake(adapters)
    output = fused(hidden)
    keys = slice(32, 64)
    assert torch.equal(output[..., keys], unadapted[..., keys])
    query, value = (adapters.adapters[f"transformer.h.0.attn.c_attn.{name}"] for name in ("query", "value"))
    A, B = torch.cat((query.A, value.A)), torch.cat((query.B, value.B))  # (2 r, in), (2 · 32, r)
    inner = F.linear(hidden, A).transpose(1, 2)  # (batch, 2 r, length)
    update = F.conv1d(inner, B[..., None], groups=2).transpose(1, 2)
    expected = base.clone()
    expected[..., :32] += 2 * update[..., :32]
    expected[..., 64:] += 2 * update[..., 32:]
    assert relative(output, expected) < 1e-6


# nn.MultiheadAttention


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["out_proj"], "matches layers.0.self_attn.out_proj, a part of nn.MultiheadAttention, which reads"),
        ("all-linear", "matches layers.0.self_attn.out_proj, a part of nn.MultiheadAttention"),
        ("all", "matches layers.0.self_attn.out_proj, a part of nn.MultiheadAttention"),
        ("regex:.*out_proj", "a part of nn.MultiheadAttention"),
        (["self_attn"], "layers.0.self_attn, a MultiheadAttention, which lora cannot edit"),
        (["query"], "has no 'query'"),
    ],
    ids=str,
)
def test_targets_in_unsplit_attention_are_refused_with_the_way_out(targets, message):
    model = encoder(batch_first=False)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError) as caught:
        inject(model, LoRASpec(targets=targets))
    assert message in str(caught.value)
    assert "`model.split_fused: true`" in str(caught.value)
    assert "`lora_lab.split_attention(model)`" in str(caught.value)
    assert model.state_dict().keys() == state.keys()


def test_attention_that_is_the_model_itself_is_refused_too():
    with pytest.raises(TargetError, match="a part of nn.MultiheadAttention"):
        inject(nn.MultiheadAttention(8, 2), LoRASpec(targets=["out_proj"]))


@pytest.mark.parametrize(
    ("method", "targets"),
    [("lora", ["linear1"]), ("lora", ["linear2"]), ("bitfit", ["norm1"]), ("reft", ["self_attn"])],
)
def test_parts_that_torchs_kernel_of_a_layer_would_skip_are_refused(method, targets):
    """In evaluation `nn.TransformerEncoderLayer` reads all its weights itself, if the batch comes first."""
    options = {"rank": 2} if method in ("lora", "reft") else {}
    spec = METHODS[method].Spec(targets=targets, **options)
    with pytest.raises(TargetError, match="a part of nn.TransformerEncoderLayer, which in evaluation reads"):
        inject(encoder(), spec)
    x = torch.randn(2, 4, 12)
    for model in (split_attention(encoder()), encoder(batch_first=False)):
        assert_alive(inject(model, spec), lambda model=model: model(x))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("target", ["all-linear", "all"])
def test_all_linear_maps_of_a_split_encoder_are_alive_in_evaluation(target, padded):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), 2).eval()
    adapters = inject(split_attention(model), LoRASpec(rank=2, init="random", targets=target))
    assert len(adapters) == 12
    hidden = torch.tensor([[False] * 4, [False, False, True, True]]) if padded else None
    x = torch.randn(2, 4, 12)
    assert_alive(adapters, lambda: model(x, src_key_padding_mask=hidden)[:, :2])


@pytest.mark.parametrize("batch_first", [True, False])
def test_full_fine_tuning_trains_unsplit_attention(batch_first):
    model = encoder(batch_first=batch_first)
    adapters = inject(model, METHODS["full"].Spec())
    x = torch.randn(2, 4, 12)
    assert_alive(adapters, lambda: model(x))
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.trainable_parameters())
