"""LoRA: closed forms, fixtures of the specification, starts, patterns, embeddings, refusals."""

import math

import pytest
import torch
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.lora import LoRA, LoRASpec
from lora_lab.adapters.methods.pissa import PiSSASpec
from lora_lab.errors import ConfigError, IncompatibleError, TargetError
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, logits, reached, relative, shake, tiny_bert, tiny_llama, tokens, train

test_contract = contract(
    LoRA,
    Variant("", {"rank": 4, "alpha": 8.0}, trained=4 * (24 + 16), on={"int8": {}}),
    Variant("rslora", {"rank": 4, "rslora": True}),
    Variant("bias", {"rank": 4, "lora_bias": True}, trained=4 * (24 + 16) + 16),
    Variant("gaussian", {"rank": 4, "init": "gaussian"}),
    Variant("olora", {"rank": 4, "init": "olora"}),
    Variant("orthogonal", {"rank": 4, "init": "orthogonal"}, start="rounded"),
    Variant("random", {"rank": 4, "init": "random"}, start="other"),
)


TOLERANCE = 1e-6  # float32, relative to the greatest output
EXACT = 1e-12  # float64


def adapt(model, **options):
    adapters = inject(model, LoRASpec(targets=["0"], modules_to_save=[], **options))
    return next(iter(adapters)), adapters


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_worked_example_gives_the_printed_weights():
    model = nn.Sequential(nn.Linear(3, 2, bias=False, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(double([[1.0, 2, 3], [4, 5, 6]]))
    lora, _ = adapt(model, rank=1, alpha=1.0)
    with torch.no_grad():
        lora.B.copy_(double([[0.1], [0.2]]))
        lora.A.copy_(double([[0.3, 0.4, 0.5]]))
    delta = double([[0.03, 0.04, 0.05], [0.06, 0.08, 0.1]])
    weight = double([[1.03, 2.04, 3.05], [4.06, 5.08, 6.1]])
    torch.testing.assert_close(lora.delta_weight(), delta, atol=EXACT, rtol=0)
    torch.testing.assert_close(lora.adapted_weight(lora.base.weight), weight, atol=EXACT, rtol=0)
    torch.testing.assert_close(lora.merged_module().weight.data, weight, atol=EXACT, rtol=0)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_scale_is_alpha_over_rank_or_over_its_root(rslora, scale):
    assert LoRASpec(rank=4, alpha=8.0, rslora=rslora).scale == scale


def test_output_is_the_papers_formula():
    model, x = linear(), torch.randn(5, 24)
    lora, adapters = adapt(model, rank=4, alpha=3.0, lora_bias=True)
    shake(adapters)
    expected = lora.base(x) + 3 / 4 * (x @ lora.A.T @ lora.B.T + lora.c)
    assert relative(model(x), expected) < TOLERANCE


def test_dropout_acts_on_the_update_alone_and_only_in_training():
    model, x = linear(), torch.randn(5, 24)
    lora, adapters = adapt(model, rank=4, dropout=0.5)
    shake(adapters)
    model.train()
    torch.manual_seed(7)
    given = model(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.5)
    assert relative(given, lora.base(x) + lora.scale * dropped @ lora.A.T @ lora.B.T) < TOLERANCE
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(("options", "count"), [({}, 160), ({"lora_bias": True}, 176)])
def test_count_of_trained_numbers_is_the_formulas(options, count):
    _, adapters = adapt(linear(), rank=4, **options)
    assert adapters.trainable_count() == count


def test_share_of_trained_numbers_is_the_printed_one():
    _, adapters = adapt(linear(768, 768, bias=False), rank=8)
    assert adapters.trainable_count() / adapters.base_count() == pytest.approx(0.020833, abs=1e-6)
    assert 3 * adapters.trainable_count() / adapters.base_count() == 0.0625


STARTS = ["default", "gaussian", "scaled_gaussian", "orthogonal", "olora", "pissa"]


@pytest.mark.parametrize("init", STARTS)
def test_every_start_but_random_is_the_identity(init):
    model, x = linear(), torch.randn(5, 24)
    before = model(x)
    lora, _ = adapt(model, rank=4, init=init)
    if init in ("orthogonal", "olora", "pissa"):
        assert relative(model(x), before) < TOLERANCE
    else:
        assert torch.equal(model(x), before)
    assert lora.delta_weight().abs().max() < TOLERANCE


def test_random_start_is_no_identity_and_within_its_bounds():
    model, x = linear(), torch.randn(5, 24)
    before = model(x)
    lora, _ = adapt(model, rank=4, init="random")
    assert relative(model(x), before) > 0.01
    assert lora.A.abs().max() <= 1 / math.sqrt(24)
    assert lora.B.abs().max() <= 1 / math.sqrt(4)


@pytest.mark.parametrize(("init", "deviation"), [("gaussian", 1 / 16), ("scaled_gaussian", 1 / 4)])
def test_gaussian_starts_have_their_spread(init, deviation):
    lora, _ = adapt(linear(columns=4000), rank=16, init=init)
    assert float(lora.A.detach().std()) == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize(
    ("init", "names"), [("default", {"B"}), ("orthogonal", {"A", "B"}), ("olora", {"A", "B"})]
)
def test_first_gradient_reaches_what_the_start_lets_through(init, names):
    model = linear()
    _, adapters = adapt(model, rank=4, init=init)
    assert reached(model, adapters, torch.randn(5, 24)) == names


def test_first_gradient_reaches_the_learned_bias():
    model = linear()
    _, adapters = adapt(model, rank=4, lora_bias=True)
    assert reached(model, adapters, torch.randn(5, 24)) == {"B", "c"}


def test_orthogonal_start_learns_a_plain_update_of_the_same_rank():
    lora, _ = adapt(linear(), rank=4, init="orthogonal")
    assert lora.start_A is None
    assert torch.linalg.matrix_rank(lora.A) == 4 / 2


def test_olora_starts_from_the_qr_factors_of_the_weight():
    model = linear()
    weight = model[0].weight.clone()
    lora, _ = adapt(model, rank=4, init="olora")
    torch.testing.assert_close(lora.B.T @ lora.B, torch.eye(4), atol=1e-5, rtol=0)
    full, _ = adapt(linear(), rank=16, init="olora")
    torch.testing.assert_close(full.B @ full.A, weight, atol=1e-5, rtol=0)
    assert set(lora.decay_exempt()) == {lora.A, lora.B}


@pytest.mark.parametrize("niter", [None, 4])
def test_pissa_as_a_start_of_lora_is_pissa_itself(niter):
    model, twin, x = linear(), linear(), torch.randn(5, 24)
    lora, _ = adapt(model, rank=4, alpha=2.0, init="pissa", niter=niter)
    pissa = next(iter(inject(twin, PiSSASpec(targets=["0"], rank=4, alpha=2.0, niter=niter))))
    assert torch.equal(lora.A, pissa.A)
    assert torch.equal(lora.start_B, pissa.start_B)
    with torch.no_grad():
        lora.A.mul_(2)
        pissa.A.mul_(2)
    assert torch.equal(model(x), twin(x))


def test_a_base_that_is_frozen_whole_leaves_the_seeds_simple_net_five_percent():
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    adapters = inject(model, LoRASpec(targets=["4"], rank=4, alpha=16.0))
    assert adapters.trainable_count() == 260
    assert adapters.base_count() == 5189 - 260
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 260


def test_learned_bias_is_merged_also_where_the_base_has_none():
    model, x = linear(bias=False), torch.randn(5, 24)
    lora, adapters = adapt(model, rank=4, alpha=8.0, lora_bias=True)
    shake(adapters)
    before = model(x)
    with adapters.merged():
        assert relative(model(x), before) < TOLERANCE
        torch.testing.assert_close(model[0].bias, 2 * lora.c)


def test_singular_values_are_those_of_the_update():
    for options in ({}, {"init": "olora"}):
        lora, adapters = adapt(linear(), rank=4, alpha=-3.0, **options)
        shake(adapters)
        expected = torch.linalg.svdvals(lora.delta_weight())
        given = lora.singular_values()
        assert relative(nn.functional.pad(given, (0, 16 - len(given))), expected) < TOLERANCE


@pytest.mark.parametrize("init", ["default", "olora"])
def test_silenced_component_adds_nothing_and_may_grow_back(init):
    model, x = linear(), torch.randn(5, 24)
    lora, adapters = adapt(model, rank=4, init=init)
    shake(adapters)
    keep = torch.tensor([True, False, True, False])
    weight = lora.base.weight + lora.scale * lora.B[:, keep] @ lora.A[keep]
    if init == "olora":
        weight = weight - lora.scale * lora.start_B[:, keep] @ lora.start_A[keep]
    lora.keep_components(keep)
    assert torch.equal(lora.kept_components(), keep)
    assert lora.rank == 2
    assert relative(model(x), nn.functional.linear(x, weight, lora.base.bias)) < TOLERANCE
    lora.keep_components(torch.zeros(4, dtype=torch.bool))
    assert torch.equal(model(x), lora.base(x))
    model(x).square().sum().backward()
    assert lora.B.grad.abs().min(dim=0).values.min() > 0


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"init": "olora"}])
def test_dropped_adapter_adds_exactly_nothing_for_good(options):
    model, x = linear(), torch.randn(5, 24)
    lora, adapters = adapt(model, rank=4, **options)
    train(model, adapters, x)
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=0.1, weight_decay=0.1)
    model(x).square().sum().backward()
    before = {name: tensor.clone() for name, tensor in adapters.named_parameters().items()}
    lora.drop()
    optimizer.step()
    assert all(torch.equal(lora.get_parameter(name.removeprefix("0.")), old) for name, old in before.items())
    assert not adapters.trainable_parameters()
    assert lora.dropped
    assert lora.rank == 0
    assert torch.equal(model(x), lora.base(x))
    assert torch.equal(lora.merged_module().weight, lora.base.weight)


def test_dropped_state_travels_in_the_state_dict():
    lora, adapters = adapt(linear(), rank=4)
    lora.drop()
    fresh, others = adapt(linear(), rank=4)
    others.load_state_dict(adapters.state_dict())
    assert fresh.dropped
    assert not others.trainable_parameters()


def test_embedding_is_adapted_in_place_of_its_rows():
    model = tiny_llama()
    before = logits(model)
    adapters = inject(model, LoRASpec(targets=["embed_tokens"], rank=3, alpha=6.0))
    lora = next(iter(adapters))
    assert torch.equal(logits(model), before)
    assert lora.A.shape == (3, 41)
    assert lora.B.shape == (35, 3)
    shake(adapters)
    rows = lora.base.weight + 2 * (lora.B @ lora.A).T
    torch.testing.assert_close(lora(tokens()), rows[tokens()])
    changed = logits(model)
    assert relative(changed, before) > 0.01
    with adapters.merged():
        assert type(model.model.embed_tokens) is nn.Embedding
        assert relative(logits(model), changed) < TOLERANCE
    assert torch.equal(logits(adapters.remove()), before)


def test_embedding_that_does_more_than_look_up_is_refused():
    class Scaled(nn.Embedding):
        def forward(self, numbers):
            return 3 * super().forward(numbers)

    for embedding in (Scaled(9, 4), nn.Embedding(9, 4, max_norm=1.0)):
        with pytest.raises(TargetError, match="cannot edit"):
            inject(nn.Sequential(embedding), LoRASpec(targets=["0"], rank=2))


def test_embedding_refuses_options_that_it_cannot_have():
    with pytest.raises(IncompatibleError, match="LoRA on an embedding has no dropout, no lora_bias"):
        inject(tiny_llama(), LoRASpec(targets=["embed_tokens"], dropout=0.1))


def test_patterns_by_role_path_and_regex_set_rank_and_alpha():
    spec = LoRASpec(
        targets=["query", "value", "down"],
        rank=4,
        alpha=4.0,
        rank_pattern={"value": 2, r"layers\.1\.mlp\.down_proj": 3},
        alpha_pattern={"query": 8.0, "down_proj": 6.0},
    )
    adapters = dict(inject(tiny_llama(), spec).items())
    assert {path.partition("layers.")[2]: (a.spec.rank, a.scale) for path, a in adapters.items()} == {
        "0.self_attn.q_proj": (4, 2.0),
        "0.self_attn.v_proj": (2, 2.0),
        "0.mlp.down_proj": (4, 1.5),
        "1.self_attn.q_proj": (4, 2.0),
        "1.self_attn.v_proj": (2, 2.0),
        "1.mlp.down_proj": (3, 2.0),
    }


def test_pattern_that_matches_nothing_is_refused():
    message = "rank_pattern: 'vlaue' matches no adapted module; did you mean 'value'"
    with pytest.raises(TargetError, match=message):
        inject(tiny_llama(), LoRASpec(rank_pattern={"vlaue": 2}))


def test_start_depends_on_seed_and_path_alone():
    def start(seed, targets):
        adapters = inject(tiny_bert(), LoRASpec(targets=targets), seed=seed)
        return dict(adapters.items())["bert.encoder.layer.1.attention.self.value"].A

    assert torch.equal(start(0, ["query", "value"]), start(0, ["value"]))
    assert not torch.equal(start(0, ["value"]), start(1, ["value"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"alpha": 0.0}, "adapter.alpha: must be finite and not 0; got 0.0"),
        ({"alpha": math.inf}, "adapter.alpha: must be finite"),
        ({"dropout": 1.0}, r"adapter.dropout: must lie in \[0, 1\); got 1.0"),
        ({"rank": 3, "init": "orthogonal"}, "adapter.rank: must be even for init: orthogonal; got 3"),
        (
            {"rank_pattern": {"0": 5}, "init": "orthogonal"},
            "adapter.rank_pattern.0: must be even for init: orthogonal; got 5",
        ),
        ({"lora_bias": True, "init": "gaussian"}, "adapter.lora_bias: needs init: default or random"),
        ({"init": "pissa", "alpha": -1.0}, "adapter.alpha: must be above 0 for pissa"),
        ({"niter": 4}, "adapter.niter: needs init: pissa; got init: default"),
        ({"init": "pissa", "niter": -1}, "adapter.niter: must be at least 0"),
        ({"init": "corda"}, "adapter.init: must be one of .*; got 'corda'"),
        ({"init": "eva"}, "adapter.init: must be one of default, gaussian, .*; got 'eva'"),
    ],
)
def test_faulty_options_are_refused_before_the_model_is_touched(options, message):
    model = linear()
    with pytest.raises(ConfigError, match=message):
        adapt(model, **options)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


def test_olora_refuses_a_rank_that_the_qr_cannot_give():
    with pytest.raises(IncompatibleError, match=r"at most min\(in, out\) = 16 here; got 17"):
        adapt(linear(), rank=17, init="olora")


def test_rank_above_the_smaller_side_is_allowed_for_lora_itself():
    assert adapt(linear(rows=1, columns=64), rank=4)[1].trainable_count() == 260


def test_half_precision_base_has_float32_adapters_and_its_own_output_type():
    model = linear(dtype=torch.bfloat16)
    lora, _ = adapt(model, rank=4)
    assert lora.A.dtype == torch.float32
    assert model(torch.randn(5, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gradients_at_the_start_of_an_embedding(make_model, make_batch):
    model = make_model("bert")
    spec = LoRASpec(rank=4, targets=["word_embeddings"], modules_to_save=[])
    adapters = inject(model, spec)
    model(**make_batch("bert")).logits.square().sum().backward()
    unreached = {name for name, p in adapters.named_parameters().items() if not p.grad.any()}
    assert unreached == adapters.without_gradient_at_start()
    assert {name.rpartition(".")[2] for name in unreached} == {"B"}
