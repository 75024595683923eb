"""What LoHa and LoKr share: PEFT's files, convolutions, starts, dropouts, recomputation."""

import math
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.families import lycoris
from lora_lab.adapters.maps import project
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import ConfigError
from tests.adapters.tiny import linear, reached, relative, shake

TOLERANCE = 1e-6  # float32, relative to the greatest output
CONFIGS = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}
BOTH = pytest.mark.parametrize("method", CONFIGS)

MAPS = {
    "linear": (lambda: nn.Linear(15, 21), (2, 3, 15)),
    "wide": (lambda: nn.Linear(40, 6, bias=False), (5, 40)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 9)),
    "conv1d pointwise": (lambda: nn.Conv1d(8, 9, 1), (2, 8, 5)),
    "conv2d": (lambda: nn.Conv2d(6, 10, (3, 2), stride=2, padding=1, dilation=2), (2, 6, 9, 8)),
    "conv2d pointwise": (lambda: nn.Conv2d(8, 9, 1, bias=False), (3, 8, 4, 5)),
    "conv2d same": (lambda: nn.Conv2d(9, 5, 3, padding="same"), (9, 6, 6)),
}
"""Maps with the shape of an input, the last one without a batch."""

OPTIONS = {
    "": {},
    "effective": {"use_effective_conv2d": True},
    "rank 1": {"rank": 1},
    "rank 12": {"rank": 12},
}
ON_MAPS = pytest.mark.parametrize(
    ("method", "kind", "options"),
    [(m, k, o) for m in CONFIGS for k in MAPS for o in OPTIONS],
)


def adapt(model, method, **options):
    adapters = inject(model, METHODS[method].Spec(targets=["0"], modules_to_save=[], **options))
    return next(iter(adapters)), adapters


def mapped(kind, method, options, dtype=torch.float32):
    """Returns a model of one adapted map, shaken, and an input."""
    make, shape = MAPS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype)
    adapter, adapters = adapt(model, method, **{"rank": 2, "alpha": 3.0} | OPTIONS[options])
    shake(adapters, 0.2)
    return model, adapter, adapters, torch.randn(shape, dtype=dtype)


@ON_MAPS
def test_adapted_maps_open_both_ways_in_peft(method, kind, options, tmp_path):
    model, _, adapters, x = mapped(kind, method, options)
    expected = model(x)
    assert relative(expected, model[0].base(x)) > 0.01
    save_adapter(adapters, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(adapters.remove(), tmp_path / "ours")
        assert relative(theirs(x), expected) < TOLERANCE
        theirs.save_pretrained(tmp_path / "theirs")
    file = {name: t.shape for name, t in load_file(tmp_path / "ours/adapter_model.safetensors").items()}
    assert file == {
        name: t.shape for name, t in load_file(tmp_path / "theirs/adapter_model.safetensors").items()
    }
    fresh = theirs.unload()
    back = load_adapter(fresh, tmp_path / "theirs")
    assert back.spec.use_effective_conv2d == adapters.spec.use_effective_conv2d
    assert relative(fresh(x), expected) < TOLERANCE


@ON_MAPS
def test_forward_merged_module_and_singular_values_agree(method, kind, options):
    model, adapter, adapters, x = mapped(kind, method, options, torch.float64)
    expected = model(x)
    values = torch.linalg.svdvals(adapter.delta_weight())
    found = adapter.singular_values()
    assert relative(nn.functional.pad(found, (0, len(values) - len(found))), values) < 1e-12
    with adapters.merged():
        assert relative(model(x), expected) < 1e-12


FEW = pytest.mark.parametrize(
    ("kind", "options"),
    [("linear", ""), ("linear", "rank 12"), ("conv1d", "effective"), ("conv2d", ""), ("conv2d", "effective")],
)


@BOTH
@FEW
def test_gradients_are_those_of_the_dense_update(method, kind, options, monkeypatch):
    """Recomputed, against finite differences and against autograd through ΔW, in double precision."""
    monkeypatch.setattr(lycoris, "WORTH_RECOMPUTING", 0)
    model, adapter, adapters, x = mapped(kind, method, options, torch.float64)
    inputs = (x.requires_grad_(True), *adapters.trainable_parameters())
    assert torch.autograd.gradcheck(lambda *_: model(x), inputs, fast_mode=True)
    y = adapter.base(x) + project(adapter.base, x, adapter.delta_weight())
    probe = torch.randn_like(y)
    expected = torch.autograd.grad((y * probe).sum(), inputs)
    for found, gradient in zip(torch.autograd.grad((model(x) * probe).sum(), inputs), expected, strict=True):
        assert relative(found, gradient) < 1e-12


@BOTH
@FEW
def test_recomputation_compiles_without_a_break(method, kind, options, monkeypatch):
    monkeypatch.setattr(lycoris, "WORTH_RECOMPUTING", 0)
    model, _, adapters, x = mapped(kind, method, options)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(model(x).square().sum(), adapters.trainable_parameters())
    found = torch.autograd.grad(compiled(x).square().sum(), adapters.trainable_parameters())
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-5


def kept_bytes(model, x):
    """Counts what a forward keeps for its backward, besides x and the parameters."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(size for storage, size in kept.items() if storage not in known)


@pytest.mark.parametrize(("method", "rank"), [("loha", 8), ("loha", 40), ("lokr", 8), ("lokr", 40)])
def test_nothing_of_the_size_of_the_weight_is_kept_for_backward(method, rank):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(768, 768)), torch.randn(128, 768)
    adapt(model, method, rank=rank)
    # LoHa's P and Q (768, rank²) and the hidden (128, rank²), where they are the cheaper way; else nothing.
    most = 4 * rank**2 * (2 * 768 + 128) + 2**16 if (method, rank) == ("loha", 8) else 0
    assert kept_bytes(model, x) <= most < 4 * 768 * 768


@BOTH
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize(
    "options",
    [
        {"rank_dropout": 0.5},
        {"module_dropout": 0.5},
        {"rank_dropout": 0.3, "module_dropout": 0.3, "use_effective_conv2d": True},
        {"rank": 1, "rank_dropout": 0.5},
        {"rank": 12, "rank_dropout": 0.5},
    ],
)
def test_dropped_outputs_and_modules_are_pefts(method, kind, options):
    """The same draws of torch's generator, and the same sizes after them."""
    options = {"rank": 2, **options}
    variants = [{}] if method == "loha" else [{"rank_dropout_scale": False}, {"rank_dropout_scale": True}]
    for more in variants:
        make, shape = MAPS[kind]
        base = make()
        model, x = nn.Sequential(base), torch.randn(shape)
        adapter, adapters = adapt(model, method, **options, **more)
        shake(adapters, 0.2)
        names = {"r" if name == "rank" else name: value for name, value in (options | more).items()}
        config = CONFIGS[method](target_modules=["0"], alpha=8, **names)
        theirs = peft.get_peft_model(nn.Sequential(base), config)
        tensors = {f"base_model.model.0.{name}": t.detach() for name, t in adapter.peft_tensors().items()}
        assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys
        seen = set()
        for seed in range(12):
            torch.manual_seed(seed)
            found = model(x)
            torch.manual_seed(seed)
            expected = theirs.train()(x)
            assert relative(found, expected) < TOLERANCE
            seen.add(float(found.detach().sum()))
        assert len(seen) > 1
        model.eval()
        assert torch.equal(model(x), model(x))


@BOTH
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_an_update_of_which_all_is_dropped_is_zero_and_trains_on(method, kind, monkeypatch):
    options = {"rank_dropout": 0.5, "rank": 2} | ({"rank_dropout_scale": True} if method == "lokr" else {})
    make, shape = MAPS[kind]
    model, x = nn.Sequential(make()), torch.randn(shape)
    adapter, adapters = adapt(model, method, **options)
    shake(adapters)
    monkeypatch.setattr(torch, "rand", torch.zeros)
    assert relative(model(x), adapter.base(x)) < TOLERANCE
    model(x).square().sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in adapters.trainable_parameters())


@BOTH
def test_checkpointing_a_block_replays_what_was_dropped(method, monkeypatch):
    monkeypatch.setattr(lycoris, "WORTH_RECOMPUTING", 0)
    model, x = linear(), torch.randn(5, 24, requires_grad=True)
    _, adapters = adapt(model, method, rank=4, rank_dropout=0.4, module_dropout=0.2)
    shake(adapters)
    for seed in range(5):
        gradients = []
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
            torch.manual_seed(seed)
            gradients.append(
                torch.autograd.grad(run(x).square().sum(), (x, *adapters.trainable_parameters()))
            )
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@BOTH
@torch.no_grad()
def test_small_update_is_not_rounded_away_under_autocast(method):
    """W + ΔW, rounded to bfloat16, would be wrong by half of a ΔW that is 0.4 % of W."""
    model, x = linear(64, 64, bias=False), torch.randn(8192, 64)
    adapter, _ = adapt(model, method, rank=4, init="random")
    adapter.spec.alpha *= 4e-3 * float(adapter.base.weight.norm() / adapter.delta_weight().norm())
    with torch.autocast("cpu", torch.bfloat16):
        difference = (model(x) - adapter.base(x)).float()
    seen = torch.linalg.lstsq(x, difference).solution.T
    update = adapter.delta_weight()
    assert (seen - update).norm() < 0.15 * update.norm()


@BOTH
def test_half_precision_base_has_an_update_in_float32(method):
    model, x = linear(dtype=torch.bfloat16), torch.randn(5, 24, dtype=torch.bfloat16)
    adapter, adapters = adapt(model, method, rank=4)
    shake(adapters, 0.3)
    assert {p.dtype for p in adapters.trainable_parameters()} == {torch.float32}
    assert model(x).dtype == torch.bfloat16
    expected = nn.functional.linear(
        x.float(), adapter.base.weight.float() + adapter.delta_weight(), adapter.base.bias.float()
    )
    assert relative(model(x).float(), expected) < 1e-2


# Starts and refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "names"),
    [
        ("loha", {}, {"w2_b"}),
        ("loha", {"use_effective_conv2d": True}, {"w2_b"}),
        ("loha", {"init": "lycoris", "use_effective_conv2d": True}, {"w2_a"}),
        ("lokr", {}, {"w1"}),
        ("lokr", {"decompose_both": True}, {"w1_a"}),
        ("lokr", {"use_effective_conv2d": True}, {"w1"}),
        ("lokr", {"init": "lycoris"}, {"w2_b"}),
        ("lokr", {"init": "lycoris", "rank": 12}, {"w2"}),
        ("lokr", {"init": "lycoris", "use_effective_conv2d": True}, {"w2_b"}),
    ],
)
def test_first_gradient_reaches_the_one_tensor_that_is_zero(method, options, names):
    model, x = nn.Sequential(nn.Conv2d(9, 16, 3)), torch.randn(2, 9, 5, 5)
    before = model(x)
    _, adapters = adapt(model, method, **{"rank": 1, **options})
    assert torch.equal(model(x), before)
    assert reached(model, adapters, x) == names
    zero = {
        name.rpartition(".")[2] for name, p in adapters.named_parameters().items() if not p.detach().any()
    }
    assert zero == names


@BOTH
@pytest.mark.parametrize("effective", [True, False])
def test_random_start_has_pefts_bounds_in_every_tensor(method, effective):
    model = nn.Sequential(nn.Conv2d(48, 60, 3))
    options = {"use_effective_conv2d": effective}
    adapter, adapters = adapt(model, method, rank=3, init="random", **options)
    for name, tensor in adapter.peft_tensors().items():
        bound = 1 / math.sqrt(math.prod(tensor.shape[1:]))
        assert 0.8 * bound < tensor.abs().max() <= bound, name
    assert adapter.delta_weight().any()


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"alpha": 0.0}, "adapter.alpha: must be finite and not 0; got 0.0"),
        ({"rank_dropout": 1.0}, r"adapter.rank_dropout: must lie in \[0, 1\); got 1.0"),
        ({"module_dropout": -0.1}, r"adapter.module_dropout: must lie in \[0, 1\); got -0.1"),
        ({"init": "gaussian"}, "adapter.init: must be one of default, lycoris, random; got 'gaussian'"),
    ],
)
def test_faulty_options_are_refused(method, options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(linear(), method, **options)


@BOTH
def test_patterns_set_rank_and_alpha_of_a_site(method):
    adapter, adapters = adapt(
        linear(), method, rank=4, alpha=4.0, rank_pattern={"0": 2}, alpha_pattern={"0": 3.0}
    )
    assert (adapter.rank, adapter.spec.scale) == (2, 1.5)
