"""CLOVER: against dense matrices and the authors' form, which models it pairs, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaModel

from lora_lab.adapters import inject, parameter_count
from lora_lab.adapters.methods import clover
from lora_lab.adapters.methods.clover import CLOVER, CLOVERSpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import ConfigError, IncompatibleError, TargetError
from lora_lab.models.build import ModelConfig, build_model
from lora_lab.models.tiny import TINY
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, logits, relative, shake, tiny_bert, tiny_llama, tokens

test_contract = contract(
    CLOVER,
    Variant(
        "",
        {"block_size": 8},
        trained=2 * 8 * 8,
        on={
            "gpt2": {"targets": ["up", "down"]},
            "plain": {"targets": ["first", "second"], "block_size": 4},
            "opt": {},
            "llama biased": {},
        },
    ),
    Variant("rank", {"block_size": 8, "rank": 3}, trained=2 * 3 * 3),
    Variant("alone", {"block_size": 8, "targets": ["query", "key", "down"]}),
)


PAIRS = ["query", "key", "value", "attention_output"]
VO = ["value", "attention_output"]
ROTATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
KINDS = [name for name in TINY if name != "mlp"]


def random_model(kind, **config):
    """A random model of each architecture that has a table, in float64, its biases and norms shaken."""
    torch.manual_seed(0)
    task = "sequence_classification"
    split = kind == "gpt2"
    model = build_model(
        ModelConfig(name=f"random:{kind}", task=task, split_fused=split, config=config), num_labels=3
    )
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


@torch.no_grad()
def outputs(model):
    if model.config.model_type == "vit":
        pixels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return model(pixel_values=pixels.to(model.dtype)).logits
    ids = tokens() % 100 + 5
    ids[:, -1] = 3  # the end token, by which T5 classifies
    return model(input_ids=ids).logits


def adapt(model, **options):
    return inject(model, CLOVERSpec(**{"modules_to_save": [], **options}))


def dense(linear):
    """[W, b] or W in float64."""
    bias = [] if linear.bias is None else [linear.bias.unsqueeze(1)]
    return torch.cat([linear.weight, *bias], dim=1).detach().double()


# The formula ----------------------------------------------------------------------------------------------


def decomposed(product, rank):
    """Singular bases of a product of A and B that is formed, with the sign of the specification."""
    U, S, Vh = torch.linalg.svd(product)
    U, S, V = U[:, :rank], S[:rank], Vh[:rank].T
    sign = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
    return U * sign, S, V * sign


@pytest.mark.parametrize("kind", ["bert", "opt", "llama", "qwen2", "t5"])
def test_values_and_outputs_of_a_head_multiply_to_the_changed_spectrum(kind):
    """The oracle forms the product of each group of heads and decomposes it whole."""
    model = random_model(kind)
    adapters = adapt(model, targets=VO, layers=[1])
    shake(adapters)
    path, value = next(iter(adapters.items()))
    output = model.get_submodule(value.partner)
    heads, width = value.dS.shape[:2]
    before_v, before_o = dense(value.base), output.weight.detach()
    dS = value.dS.detach()
    adapters.merge()
    after_v = dense(model.get_submodule(path))
    after_o = model.get_submodule(value.partner).weight
    share = before_o.shape[1] // (heads * width)
    assert share == (2 if kind in ("llama", "qwen2") else 1)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        parts = [slice(h * width, (h + 1) * width) for h in range(head * share, (head + 1) * share)]
        product = before_v[own].T @ torch.cat([before_o[:, part] for part in parts]).T
        U, S, V = decomposed(product, width)
        found = after_v[own].T @ torch.cat([after_o[:, part] for part in parts]).T
        assert relative(found, U @ (S.diag() + dS[head]) @ V.T) < 1e-9
        assert torch.equal(after_o, before_o)


@pytest.mark.parametrize("kind", ["bert", "opt", "t5"])
def test_queries_and_keys_of_a_head_multiply_to_the_changed_spectrum(kind):
    model = random_model(kind)
    adapters = adapt(model, targets=["query", "key"])
    shake(adapters)
    path, query = next(iter(adapters.items()))
    key = model.get_submodule(query.partner)
    heads, width = query.dS.shape[:2]
    before, dS = (dense(query.base), dense(key)), query.dS.detach()
    adapters.merge()
    after = dense(model.get_submodule(path)), dense(model.get_submodule(query.partner))
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        U, S, V = decomposed(before[0][own].T @ before[1][own], width)
        expected = U @ (S.diag() + dS[head]) @ V.T
        assert relative(after[0][own].T @ after[1][own], expected) < 1e-9


def test_a_map_alone_is_q_times_r_plus_the_change():
    model = tiny_llama().double()
    path = "model.layers.1.self_attn.q_proj"
    adapters = adapt(model, targets=["query"])
    shake(adapters)
    query = adapters.adapters[path]
    assert query.dS.shape == (5, 6, 6)
    for head, changed in enumerate(query.adapted_weight(query.base.weight).reshape(5, 6, 35)):
        own = slice(6 * head, 6 * head + 6)
        Q, R = torch.linalg.qr(dense(query.base)[own].T)
        sign = R.diagonal().sign()
        expected = (Q * sign) @ (sign[:, None] * R + query.dS[head])  # (in + 1, d)
        assert relative(changed.T, expected[:-1]) < 1e-9
        assert relative(query.adapted_bias(query.base.bias)[own], expected[-1]) < 1e-9


def test_directions_of_a_map_alone_are_chosen_by_its_own_singular_values():
    model = tiny_llama().double()
    adapters = adapt(model, targets=["query"], rank=3)
    (query, _) = adapters
    query.dS.data.uniform_(0, 0.1)
    for head, changed in enumerate(query.adapted_weight(query.base.weight).reshape(5, 6, 35)):
        U, S, Vh = torch.linalg.svd(dense(query.base)[6 * head : 6 * head + 6].T, full_matrices=False)
        dS = F.pad(query.dS[head], (0, 3, 0, 3))
        own = query.N_inverse[head] @ Vh.T  # a pair of singular vectors is known up to its sign
        flip = F.pad(own.diagonal().sign(), (0, 6 - len(own)), value=1.0)
        assert relative(own.abs(), torch.eye(6, dtype=own.dtype)[: len(own)]) < 1e-9
        expected = U @ (S.diag() + flip[:, None] * dS * flip) @ Vh
        assert relative(changed.T, expected[:-1]) < 1e-9


def test_a_rank_is_a_part_of_the_whole():
    whole, part = tiny_bert().double(), tiny_bert().double()
    full, own = adapt(whole), adapt(part, rank=4)
    shake(full)
    for path, adapter in full.items():
        adapter.dS.data *= F.pad(torch.ones(4, 4), (0, 6, 0, 6))
        other = own.adapters[path]
        other.dS.data.copy_(adapter.dS[:, :4, :4])
        assert other.rank == 4
    assert relative(logits(part), logits(whole)) < 1e-12


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"targets": ["query", "up"]}])
def test_gradients_are_the_numerical_ones(options):
    model = tiny_bert().double()
    adapters = adapt(model, **{"layers": [0], **options})
    shake(adapters)
    for adapter in adapters:
        x = torch.randn(3, 30, dtype=torch.float64, requires_grad=True)

        def output(x, dS, adapter=adapter):
            return torch.func.functional_call(adapter, {"dS": dS}, (x,))

        assert torch.autograd.gradcheck(output, (x, adapter.dS), fast_mode=True)


# The whole model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_counts_and_merges_to_itself(kind):
    model = random_model(kind)
    adapters = adapt(model, targets=["query", *VO] if kind in ROTATED else PAIRS)
    shake(adapters)
    expected = outputs(model)
    assert relative(expected, outputs(random_model(kind))) > 1e-3
    assert relative(outputs(adapters.merge()), expected) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_starts_bitwise_as_the_model(kind):
    expected = outputs(random_model(kind).float())
    model = random_model(kind).float()
    adapt(model, targets=["query", *VO] if kind in ROTATED else PAIRS)
    assert torch.equal(outputs(model), expected)


def test_cross_attention_is_paired_too():
    adapters = adapt(random_model("t5"), targets=[*PAIRS, *(f"cross_{role}" for role in PAIRS)])
    assert len(adapters) == 2 * (2 + 4)
    assert {a.partner.rpartition(".")[2] for a in adapters} == {"k", "o"}
    assert all(a.partner.rpartition(".")[0] == path.rpartition(".")[0] for path, a in adapters.items())


class Mask(nn.Module):
    """A dropout that strikes the same numbers in any layout."""

    def forward(self, z):
        keep = torch.rand(z.numel(), generator=torch.Generator().manual_seed(1)) > 0.4
        return z * keep.reshape(z.shape) / 0.6


def test_dropout_strikes_what_the_change_reads_in_training_alone():
    model = tiny_bert().double()
    adapters = adapt(model, dropout=0.4)
    shake(adapters)
    adapter = next(iter(adapters)).train()
    assert adapter.dropout.p == 0.4
    adapter.dropout = Mask()
    x = torch.randn(5, 30, dtype=torch.float64)
    y = adapter.base(x)
    z = torch.einsum("thd,hde->the", y.reshape(5, 3, 10), adapter.M_inverse)
    change = torch.einsum("thd,hde->the", Mask()(z), adapter.dS @ adapter.N_inverse)
    assert relative(adapter(x), y + change.flatten(1)) < 1e-12
    plain = tiny_bert().double()
    for given, own in zip(adapters, adapt(plain), strict=True):
        own.dS.data.copy_(given.dS)
    trained = model.train()(input_ids=tokens()).logits
    merged = logits(adapters.merge())  # made in training mode
    assert relative(merged, logits(plain)) < 1e-12
    assert relative(trained, merged) > 1e-3


def test_generation_with_a_cache_equals_generation_without():
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "output_logits": True}
    model = tiny_llama()
    shake(adapt(model, targets=["query", *VO]))
    with torch.no_grad():
        runs = [
            model.generate(tokens(), use_cache=cache, return_dict_in_generate=True, **options)
            for cache in (True, False)
        ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert relative(torch.stack(runs[0].logits), torch.stack(runs[1].logits)) < 1e-5


# What is paired -------------------------------------------------------------------------------------------


def test_only_the_first_map_of_a_pair_has_an_adapter():
    adapters = adapt(tiny_bert())
    assert [path.rpartition(".")[2] for path in adapters.adapters] == ["query", "value"] * 2
    assert adapters.trainable_count() == 2 * 2 * 3 * 10 * 10


@pytest.mark.parametrize("kind", ROTATED)
def test_a_rotated_model_starts_as_it_is_with_the_query_alone(kind):
    model = random_model(kind)
    adapters = adapt(model, targets=PAIRS)
    assert torch.equal(outputs(model), outputs(random_model(kind)))
    alone = {path.rpartition(".")[2]: adapter.partner is None for path, adapter in adapters.items()}
    assert alone == {"q_proj": True, "v_proj": False}


def test_norms_of_queries_and_keys_part_them():
    model = random_model("qwen3")
    model.config.rope_parameters = None
    alone = {path.rpartition(".")[2]: a.partner is None for path, a in adapt(model, targets=PAIRS).items()}
    assert alone == {"q_proj": True, "v_proj": False}


def test_positions_with_projections_of_their_own_part_query_and_key():
    model = random_model("deberta-v2", share_att_key=False)
    assert {a.partner is None for p, a in adapt(model, targets=["query", "key"]).items()} == {True}


@pytest.mark.parametrize("targets", [["key"], ["value"], ["query", "value"], ["up", "down"]])
def test_maps_named_without_their_partner_are_decomposed_alone(targets):
    model = tiny_bert()
    adapters = adapt(model, targets=targets)
    assert all(adapter.partner is None for adapter in adapters)
    widths = {adapter.dS.shape[1] for adapter in adapters}
    assert widths == ({5} if "up" in targets else {10})  # half a head, or a head
    assert torch.equal(logits(model), logits(tiny_bert()))


# Counts ---------------------------------------------------------------------------------------------------


def test_count_on_a_block_of_llama_2_7b_is_the_papers():
    """1 753 088 = 32 · 128² (value and output) + 32 · 128² (query) + 172 · 64² (up)."""
    config = LlamaConfig(vocab_size=8, num_hidden_layers=1)
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (4096, 11008, 32)
    with torch.device("meta"):
        model = LlamaModel(config)
    spec = CLOVERSpec(targets=["query", *VO, "up"], modules_to_save=[])
    assert parameter_count(model, spec) == 1_753_088
    small = adapt(tiny_llama(), targets=["query", *VO])
    assert parameter_count(tiny_llama(), small.spec) == small.trainable_count()


def test_counts_are_the_formulas():
    """Hk d² for values, H d² for queries alone, I · block for the up map."""
    assert adapt(tiny_llama(), targets=VO, layers=[0]).trainable_count() == 1 * 6 * 6
    assert adapt(tiny_llama(), targets=["query"], layers=[0]).trainable_count() == 5 * 6 * 6
    assert adapt(tiny_bert(), targets=["up"], layers=[0]).trainable_count() == 50 * 5


# Files, cost ----------------------------------------------------------------------------------------------


def test_files_hold_the_bases_which_win_over_those_of_another_library(tmp_path, monkeypatch):
    model = tiny_bert()
    adapters = adapt(model, rank=4)
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    names = {name.rpartition(".")[2] for name in load_file(tmp_path / "adapter/adapter_model.safetensors")}
    assert names == {"clover_dS", "clover_M_inverse", "clover_N_inverse"}

    def turned(A, B):
        U, M, V, N = paired(A, B)
        return -U, -M, -V, -N

    paired = clover.paired_svd
    monkeypatch.setattr(clover, "paired_svd", turned)
    again = tiny_bert()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_a_step_keeps_one_activation_for_each_trained_map_and_no_matrix_of_its_size():
    layer = nn.Sequential(nn.Linear(40, 24))
    adapter = next(iter(adapt(layer, targets=["0"], block_size=8)))
    own = {t.untyped_storage().data_ptr() for t in (*adapter.parameters(), *adapter.buffers())}
    saved = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor)
        return tensor

    x = torch.randn(7, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in saved}
    assert sum(storages.values()) <= 7 * 24 + 2 * 3 * 8 * 8


# Refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"block_size": 0}, "adapter.block_size: must be at least 1; got 0"),
        ({"dropout": 1.0}, "adapter.dropout: must lie in [0, 1); got 1.0"),
    ],
)
def test_a_faulty_spec_is_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        adapt(tiny_bert(), **options)
    assert message in str(caught.value)


def no_config(model):
    model.config.num_attention_heads = 7
    return model


@pytest.mark.parametrize(
    ("make", "options", "fault", "message"),
    [
        (
            tiny_bert,
            {"targets": ["attention_output"]},
            TargetError,
            "add value, or remove attention_output",
        ),
        (
            tiny_bert,
            {"rank": 11},
            IncompatibleError,
            "adapter.rank: a head of bert.encoder.layer.0.attention.",
        ),
        (
            lambda: no_config(tiny_bert()),
            {},
            IncompatibleError,
            "has no heads of width 4, which must divide 30",
        ),
        (linear, {"targets": ["0"]}, IncompatibleError, "adapter.block_size: is needed for 0"),
        (linear, {"targets": ["0"], "block_size": 5}, IncompatibleError, "must divide 16"),
        (
            lambda: linear(32, 4),
            {"targets": ["0"], "block_size": 8},
            IncompatibleError,
            "has 5 inputs, fewer than",
        ),
    ],
)
def test_maps_that_are_no_heads_are_refused(make, options, fault, message):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fault) as caught:
        adapt(model, **options)
    assert message in str(caught.value)
    assert model.state_dict().keys() == before.keys()


def test_fused_projections_are_refused_with_the_way_out(make_model):
    with pytest.raises(TargetError, match="set model.split_fused to true"):
        adapt(make_model("gpt2"), targets=["query_key_value"])


@pytest.mark.parametrize(
    ("part", "role", "remedy"),
    [
        ("attention.self.value", "its own map", "remove it from targets"),
        ("attention.output.dense", "its partner", "remove attention_output from targets"),
    ],
)
def test_a_head_near_singular_is_refused_with_the_way_out(part, role, remedy):
    def make():
        model = tiny_bert()
        weight = model.bert.encoder.layer[1].get_submodule(part).weight.data
        if role == "its partner":
            weight[:, 12] = weight[:, 11]
        else:
            weight[12], model.bert.encoder.layer[1].attention.self.value.bias.data[12] = 0, 0
        return model

    with pytest.raises(IncompatibleError) as caught:
        adapt(make())
    assert "head 1 of bert.encoder.layer.1.attention.self.value is too close to singular in" in str(
        caught.value
    )
    assert f"{role} (condition" in str(caught.value)
    assert f"{remedy}, or leave its block out of layers" in str(caught.value)
    adapt(make(), layers=[0])
    adapt(make(), targets=["query", "key"] if role == "its own map" else ["query", "key", "value"])
