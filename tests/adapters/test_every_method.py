"""The contract that every method keeps: one body, run for all of METHODS on models of every kind.

A new method is tried with its defaults at once. One fact about it is asked for as data, COUNTS; variants
of its options go into OPTIONS, and a check that cannot hold for it into one of the tables of exceptions,
with the reason.
"""

import copy
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lora_lab.adapters import METHODS, inject, parameter_count
from lora_lab.adapters.base import (
    Adapter,
    AdditiveAdapter,
    LinearAdapter,
    PeftLayout,
)
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.adapters.trained import TrainedCopy
from lora_lab.errors import IncompatibleError, TargetError
from lora_lab.linalg.rank import widened

TOLERANCE = 1e-5
"""Of every comparison in float32, relative to the largest number compared."""

MODELS = ("bert", "llama", "llama biased", "gpt2", "opt", "t5", "plain", "int8", "nf4")

OPTIONS: dict[str, dict] = {
    "lora": {"method": "lora", "rank": 4, "alpha": 8.0},
    "lora rslora": {"method": "lora", "rank": 4, "rslora": True},
    "lora bias": {"method": "lora", "rank": 4, "lora_bias": True},
    "lora gaussian": {"method": "lora", "rank": 4, "init": "gaussian"},
    "lora olora": {"method": "lora", "rank": 4, "init": "olora"},
    "lora orthogonal": {"method": "lora", "rank": 4, "init": "orthogonal"},
    "lora random": {"method": "lora", "rank": 4, "init": "random"},
    "dora": {"method": "dora", "rank": 4},
    "dora in": {"method": "dora", "rank": 4, "dora_axis": "in"},
    "dora attached": {"method": "dora", "rank": 4, "detach_norm": False},
    "dylora": {"method": "dylora", "rank": 4},
    "dylora frozen": {"method": "dylora", "rank": 4, "frozen": True, "rslora": True},
    "dylora separate": {"method": "dylora", "rank": 4, "separate_ranks": [1, 3, 4]},
    "lora_drop": {"method": "lora_drop", "rank": 4},
    "lora_drop samples": {"method": "lora_drop", "rank": 4, "drop_granularity": "sample"},
    "lora_drop batches": {"method": "lora_drop", "rank": 4, "drop_granularity": "batch"},
    "lora_drop modules": {"method": "lora_drop", "rank": 4, "drop_unit": "module", "drop_rescale": False},
    "lora_prune": {"method": "lora_prune", "rank": 4},
    "pissa": {"method": "pissa", "rank": 4, "alpha": 4.0},
    "pissa residual": {"method": "pissa", "rank": 4, "alpha": 4.0, "mode": "residual"},
    "pissa niter": {"method": "pissa", "rank": 4, "alpha": 4.0, "niter": 4},
    "adalora": {"method": "adalora", "rank": 6},
    "adalora squared": {"method": "adalora", "rank": 6, "orth_reg_squared": True},
    "adalora unpenalised": {"method": "adalora", "rank": 6, "orth_reg_weight": 0.0},
    "loha": {"method": "loha", "rank": 4, "alpha": 6.0},
    "loha factored": {"method": "loha", "rank": 1},
    "loha lycoris": {"method": "loha", "rank": 4, "init": "lycoris"},
    "loha random": {"method": "loha", "rank": 4, "init": "random"},
    "lokr": {"method": "lokr", "rank": 1, "alpha": 2.0},
    "lokr both": {"method": "lokr", "rank": 1, "decompose_both": True},
    "lokr whole": {"method": "lokr", "rank": 64, "decompose_factor": 3},
    "lokr lycoris": {"method": "lokr", "rank": 1, "init": "lycoris"},
    "lokr random": {"method": "lokr", "rank": 1, "init": "random"},
    "delora": {"method": "delora", "rank": 4},
    "delora current": {"method": "delora", "rank": 4, "residual_lambda": "current"},
    "delora zero_b": {"method": "delora", "rank": 4, "init": "zero_b"},
    "vera": {"method": "vera", "rank": 8},
    "randlora": {"method": "randlora", "rank": 5},
    "randlora sparse": {"method": "randlora", "rank": 5, "alpha": 10.0, "sparse": True},
    "randlora very sparse": {"method": "randlora", "rank": 5, "very_sparse": True},
    "salt": {"method": "salt", "rank": 3, "r_lora": 2},
    "salt values": {"method": "salt", "rank": None, "ratio": 0.5, "r_lora": 0},
    "salt clamped": {"method": "salt", "rank": 3, "r_lora": 2, "relu": "diag", "reg_multiplier": 0.1},
    "salt clamped whole": {"method": "salt", "rank": 3, "r_lora": 2, "relu": "all"},
    "edora": {"method": "edora", "rank": 4},
    "edora exact": {"method": "edora", "rank": 4, "init_sigma": 0.0},
    "edora tail": {"method": "edora", "rank": 4, "subspace": "tail", "fold_sigma": False},
    "edora core": asdict(METHODS["edora"].Spec.tail_core(4)),
    "salt_edora": {"method": "salt_edora", "rank": 4},
    "salt_edora polar": {"method": "salt_edora", "rank": 4, "r_tail": 3, "tail_mode": "polar"},
    "ssvd": {"method": "ssvd"},
    "ssvd first order": {"method": "ssvd", "rotation": "first_order", "gate": True},
    "ssvd free": {"method": "ssvd", "rank": 3, "rotation_ratio": None, "rotation": "free"},
    "ia3": {"method": "ia3"},
    "ia3 outputs": {"method": "ia3", "targets": ["key", "value", "down"], "feedforward_modules": []},
    "oft": {"method": "oft", "oft_block_size": 4},
    "oft exact": {"method": "oft", "oft_block_size": 4, "use_cayley_neumann": False},
    "oft terms": {"method": "oft", "oft_block_size": 4, "num_cayley_neumann_terms": 6},
    "oft shared": {"method": "oft", "oft_block_size": 8, "block_share": True},
    "oft adjusted": {"method": "oft", "oft_block_size": 5, "auto_adjust": True},
    "oft coft": {"method": "oft", "oft_block_size": 4, "coft": True, "eps": 0.3},
    "boft": {"method": "boft", "boft_block_size": 2, "boft_n_butterfly_factor": 2},
    "boft one factor": {"method": "boft"},
    "boft blocks": {"method": "boft", "boft_block_size": 0, "boft_block_num": 4}
    | {"boft_n_butterfly_factor": 3},
    "boft unscaled": {"method": "boft", "boft_n_butterfly_factor": 2, "train_scale": False},
    "goft": {"method": "goft"},
    "goft scaled": {"method": "goft", "scaling": True, "angle_param": "raw"},
    "goft soft": {"method": "goft", "strict_oft": False},
    "fourierft": {"method": "fourierft", "n_frequency": 40, "scaling": 10.0},
    "fourierft zeros": {"method": "fourierft", "n_frequency": 40, "init": "zeros"},
    "fourierft fft": {"method": "fourierft", "n_frequency": 40, "scaling": 10.0, "mode": "fft"},
    "fourierft zeros fft": {"method": "fourierft", "n_frequency": 40, "init": "zeros", "mode": "fft"},
    "svft": {"method": "svft"},
    "svft plain": {"method": "svft", "pattern": "plain", "rank": 5},
    "svft random": {"method": "svft", "pattern": "random", "k": 9},
    "svft top_k": {"method": "svft", "pattern": "top_k", "targets": ["query", "value"]},
    "svft gate": {"method": "svft", "gate": True, "off_diag": 3, "rank": 7},
    "svft reference": {"method": "svft", "gate": True, "init": "reference"},
    "road": {"method": "road", "group_size": 4},
    "road 2": {"method": "road", "group_size": 2, "variant": "road_2"},
    "road 4": {"method": "road", "group_size": 8, "variant": "road_4"},
    "road random": {"method": "road", "group_size": 4, "init": "random"},
    "hra": {"method": "hra", "rank": 4},
    "hra random": {"method": "hra", "rank": 3, "identity_start": False},
    "hra GS": {"method": "hra", "rank": 3, "apply_GS": True},
    "hra GS random": {"method": "hra", "rank": 3, "apply_GS": True, "identity_start": False},
    "hra penalised": {"method": "hra", "rank": 4, "reg_lambda": 0.1},
    # Of a map that is no part of an attention, as in the checks on one linear map, the blocks must be told.
    "clover": {"method": "clover", "block_size": 8},
    "clover rank": {"method": "clover", "block_size": 8, "rank": 3},
    "clover alone": {"method": "clover", "block_size": 8, "targets": ["query", "key", "down"]},
    "clover rebased": {"method": "clover", "block_size": 8, "form": "rebased"},
    "clover rebased rank": {"method": "clover", "block_size": 8, "form": "rebased", "rank": 3},
    "psoft": {"method": "psoft", "rank": 4},
    "psoft pissa": {"method": "psoft", "rank": 4, "ab_svd_init": "pissa_init", "psoft_mag_b": False},
    "psoft free": {"method": "psoft", "rank": 4, "psoft_orth": False},
    "psoft neumann": {
        "method": "psoft",
        "rank": 4,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 6,
        "cayley_neumann_eps": 0.1,
    },
    "psoft niter": {"method": "psoft", "rank": 4, "niter": 3, "save_basis": False},
    "psoft random": {"method": "psoft", "rank": 4, "init": "random"},
    "antipasto": {"method": "antipasto", "rank": 4},
    "antipasto identity": {"method": "antipasto", "rank": 4, "init": "identity"},
    "antipasto reversed": {"method": "antipasto", "rank": 4, "coefficient": -1.5, "dim_select": "random"},
    "antipasto output": {"method": "antipasto", "rank": 4, "rotate_v": False, "rotate_u": True},
    "antipasto both": {
        "method": "antipasto",
        "rank": 4,
        "rotate_u": True,
        "rotation_method": "matrix_exp",
        "save_basis": False,
    },
    "antipasto blocks": {"method": "antipasto", "rank": 4, "block_size": 2, "use_delta_s": False},
    "reft": {"method": "reft", "rank": 4},
    "reft all": {"method": "reft", "rank": 4, "positions": "all"},
    "reft shared": {"method": "reft", "rank": 4, "positions": "f2+l2", "share_weights": True},
    "reft noreft": {"method": "reft", "rank": 4, "intervention": "noreft", "add_bias": True},
    "reft direft": {"method": "reft", "rank": 4, "intervention": "direft", "act_fn": "silu"},
    "reft nodireft": {"method": "reft", "rank": 4, "intervention": "nodireft", "init": "identity"},
    "reft consreft": {"method": "reft", "rank": 4, "intervention": "consreft"},
    "reft lobireft": {"method": "reft", "rank": 4, "intervention": "lobireft"},
    "reft identity": {"method": "reft", "rank": 4, "init": "identity"},
    "bitfit": {"method": "bitfit"},
    "head": {"method": "head"},
    "full": {"method": "full"},
}
OPTIONS |= {name: {"method": name} for name in METHODS if name not in OPTIONS}
"""The specs that are tried; those named like their method on every model, the others on one."""

TARGETS: dict[str, dict[str, dict]] = {
    "gpt2": {
        "": {"targets": ["query_key_value", "attention_output"]},
        "ia3": {"targets": ["query_key_value", "down"]},
        "clover": {"targets": ["up", "down"]},
        "reft": {},
    },
    "t5": {"reft": {"positions": "all"}},
    "plain": {
        "": {"targets": ["first", "second"]},
        "ia3": {"targets": ["first", "second"], "feedforward_modules": ["second"]},
        "clover": {"targets": ["first", "second"], "block_size": 4},
        "head": {"modules_to_save": ["output"]},
        "reft": {"targets": ["block"]},
    },
    # BERT's classifier reads the first token alone: edits of others reach it only through a later block.
    "bert": {"reft": {"layers": [0]}},
    "int8": {"reft": {"layers": [0]}},
    "nf4": {"reft": {"layers": [0]}},
}
"""What a spec needs on a model: by method, or for `""` every method that adapts linear maps."""

NOT_ON: dict[tuple[str, str], str] = {
    ("bitfit", "llama"): "has no biases",
    ("bitfit", "t5"): "has no biases",
    ("head", "llama"): "its head is pretrained",
    ("head", "llama biased"): "its head is pretrained",
    ("head", "gpt2"): "its head is pretrained",
    ("head", "opt"): "its head is pretrained",
    ("full", "nf4"): "codes cannot be trained, which is refused",
}
"""The namesakes of methods that have nothing to train on a model."""

EXACT_START = {
    "lora",
    "lora rslora",
    "lora bias",
    "lora gaussian",
    "dora",
    "dora in",
    "dora attached",
    "adalora",
    "dylora",
    "lora_drop",
    "lora_drop modules",
    "lora_prune",
    "loha",
    "loha factored",
    "loha lycoris",
    "lokr",
    "lokr both",
    "lokr whole",
    "lokr lycoris",
    "vera",
    "fourierft zeros",
    "fourierft zeros fft",
    "svft",
    "svft plain",
    "svft random",
    "svft top_k",
}
EXACT_START |= {name for name in OPTIONS if name.startswith(("delora", "randlora"))}
EXACT_START |= {name for name in OPTIONS if name.startswith("psoft")}
EXACT_START |= {"antipasto identity"}
EXACT_START |= {"pissa", "pissa niter", "lora olora"}
EXACT_START |= {"salt", "salt values", "salt clamped", "salt clamped whole"}
EXACT_START |= {"edora exact", "edora core", "salt_edora", "salt_edora polar"}
EXACT_START |= {"ssvd", "ssvd first order", "ssvd free"}
EXACT_START |= {name for name in OPTIONS if name.startswith(("oft", "boft", "goft"))}
EXACT_START |= {"clover", "clover rank", "clover alone"}
EXACT_START |= {"road", "road 2", "road 4"}
EXACT_START |= {"ia3", "ia3 outputs", "bitfit", "head", "full", "reft nodireft"}
"""Specs that promise a bitwise identity at the start."""

OTHER_START: dict[str, str] = {
    "lora random": "a start for comparison",
    "loha random": "a start for comparison",
    "lokr random": "a start for comparison",
    "edora": "the authors' start, R ~ N(0, 1e-10)",
    "edora tail": "the authors' start",
    "fourierft": "the reference's start",
    "fourierft fft": "the reference's start",
    "svft reference": "the reference's start",
    "road random": "a start for comparison",
    "hra random": "reflections drawn at random do not cancel",
    "hra GS random": "the paper's form",
    "psoft random": "a start for comparison",
    **{
        name: "the reference's start"
        for name in OPTIONS
        if name.startswith("antipasto") and name not in ("antipasto identity", "antipasto seed")
    },
    **{
        name: "the reference's start"
        for name in OPTIONS
        if name.startswith("reft") and name not in ("reft identity", "reft nodireft")
    },
}
"""Specs that deliberately do not start as the identity."""

COUNTS: dict[str, int] = {
    "lora": 4 * (24 + 16),
    "lora bias": 4 * (24 + 16) + 16,
    "dora": 4 * (24 + 16) + 16,
    "dora in": 4 * (24 + 16) + 24,
    "dylora": 4 * (24 + 16),
    "dylora separate": (1 + 3 + 4) * (24 + 16),
    "lora_drop": 4 * (24 + 16),
    "lora_prune": 4 * (24 + 16),
    "pissa": 4 * (24 + 16),
    "adalora": 6 * (24 + 16 + 1),
    "loha": 2 * 4 * (24 + 16),
    "lokr": 4 * 4 + 1 * (4 + 6),
    "lokr both": 1 * (4 + 4) + 1 * (4 + 6),
    "lokr whole": 2 * 3 + 8 * 8,
    "delora": 4 * (24 + 16) + 1,
    "vera": 16 + 8,
    "randlora": 5 * 4 + 4 * 16,
    "salt": 2 * 3 + 2 * 2 * (16 - 3),
    "salt values": 2 * 8,
    "edora": 4 * 4 + 16,
    "edora core": 4 * 4,
    "salt_edora": 2 * 4 + 4 * 4,
    "salt_edora polar": 2 * 4 + 3 * (3 + 1) // 2,
    "ssvd": 6 * 7 // 2,
    "ssvd first order": 6 * 7 // 2 + 1,
    "ssvd free": 3 * 3 + 3,
    "ia3": 24,
    "ia3 outputs": 16,
    "oft": 24 * 3 // 2,
    "oft shared": 8 * 7 // 2,
    "oft adjusted": 24 * 3 // 2,
    "boft": 2 * 24 * 2 + 16,
    "boft one factor": 24 * 4 + 16,
    "boft unscaled": 2 * 24 * 4,
    "goft": 24 - 1,
    "goft scaled": 24 - 1 + 24,
    "goft soft": 4 * (24 - 1),
    "fourierft": 40,
    "svft": 3 * 16 - 2,
    "svft plain": 5,
    "svft random": 9,
    "road": 16,
    "road 2": 2 * 16,
    "road 4": 4 * 16,
    "hra": 24 * 4,
    "hra GS": 24 * 3,
    "clover": 2 * 8 * 8,
    "clover rank": 2 * 3 * 3,
    "psoft": 4 * 3 // 2 + 2 * 4,
    "psoft pissa": 4 * 3 // 2 + 4,
    "psoft free": 4 * 4 + 2 * 4,
    "antipasto": 4 * 3 // 2 + 4,
    "antipasto both": 2 * (4 * 3 // 2) + 4,
    "antipasto blocks": 2 * 1,
    "bitfit": 16,
    "full": 24 * 16 + 16,
}
"""Trained numbers on one linear map from 24 to 16."""

WITH_DROPOUT = [
    option
    for option, values in OPTIONS.items()
    if "dropout" in {f.name for f in fields(METHODS[values["method"]].Spec)}
    and option not in ("pissa residual", "oft shared")
]
"""PiSSA's residual mode refuses dropout, which would reach the principal part of W; OFT's drops single blocks
of several."""

INERT = ("key.delta", "key.trained.bias")
"""Softmax does not see what all keys share, so that a key's bias has no gradient but rounding."""


@dataclass
class Case:
    """A spec on a model, as every check gets it."""

    option: str
    model_name: str
    make_model: Callable[[str], nn.Module]
    make_batch: Callable[[str], dict[str, Tensor]]
    values: dict = field(default_factory=dict)

    @property
    def method(self) -> type[Adapter]:
        return METHODS[self.values["method"]]

    @property
    def spec(self) -> AdapterSpec:
        spec = self.method.Spec(**self.values)
        table = TARGETS.get(self.model_name, {})
        general = {} if spec.method in ("bitfit", "head", "full") else table.get("", {})
        return replace(spec, **table.get(spec.method, general))

    def model(self) -> nn.Module:
        return self.make_model(self.model_name)

    def batch(self) -> dict[str, Tensor]:
        return self.make_batch(self.model_name)

    def adapted(self, seed: int = 0, perturbed: bool = True, **changes):
        """Returns model and adapters, with all that is trained moved away from its start."""
        model = self.model()
        adapters = inject(model, replace(self.spec, **changes), seed)
        if perturbed:
            perturb(adapters)
        return model, adapters

    def logits(self, model: nn.Module) -> Tensor:
        return logits_of(model, self.batch())


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    return output if isinstance(output, Tensor) else output.logits


def perturb(adapters) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def backward(case: Case, model: nn.Module, adapters) -> None:
    logits = case.logits(model)
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    ((logits * probe).sum() + adapters.penalty()).backward()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    scale = max(1e-30, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


NAMESAKES = [option for option, values in OPTIONS.items() if option == values["method"]]
PAIRS = [
    (option, model)
    for option in OPTIONS
    for model in (MODELS if option in NAMESAKES else ("bert",))
    if (option, model) not in NOT_ON
]
"""Every spec with the models it is tried on."""


def over(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """Runs a check on these specs and models."""
    names = [f"{option} on {model}".replace(" ", "_") for option, model in pairs]
    return pytest.mark.parametrize("case", pairs, ids=names, indirect=True)


def on_bert(options) -> pytest.MarkDecorator:
    """Runs a check on one model, where it does not depend on it."""
    return over([(option, "bert") for option in options])


@pytest.fixture
def case(request, make_model, make_batch) -> Case:
    option, model = request.param
    return Case(option, model, make_model, make_batch, OPTIONS[option])


# The checks on whole models -------------------------------------------------------------------------------


@over([pair for pair in PAIRS if pair[0] not in OTHER_START])
@torch.no_grad()
def test_starts_as_the_identity(case):
    """Check 1."""
    expected = case.logits(case.model())
    model, _ = case.adapted(perturbed=False)
    assert_close(case.logits(model), expected, 0 if case.option in EXACT_START else TOLERANCE)


@over(PAIRS)
def test_the_formula_counts_what_is_trained(case):
    model, spec = case.model(), case.spec
    told = parameter_count(model, spec)
    assert told == inject(model, spec).trainable_count(saved=False)
    assert spec.size_field is None or hasattr(spec, spec.size_field)


@over(PAIRS)
@torch.no_grad()
def test_perturbing_changes_the_output(case):
    """Without this the other checks could hold for an adapter that is never called."""
    model, adapters = case.adapted()
    difference = case.logits(model) - case.logits(case.model())
    assert difference.abs().max() > 1e-4
    assert len(adapters) > 0 or case.option == "head"


@over(PAIRS)
@torch.no_grad()
def test_merged_model_gives_the_same_logits(case):
    """Check 4."""
    model, adapters = case.adapted()
    expected = case.logits(model)
    if not case.method.mergeable:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(IncompatibleError, match="cannot be merged"):
            adapters.merge()
        assert_same_tensors(model.state_dict(), before)
        assert torch.equal(case.logits(model), expected)
        return
    with adapters.merged() as merged:
        assert not any(isinstance(module, Adapter) for module in merged.modules())
        assert_close(case.logits(merged), expected)
    assert torch.equal(case.logits(model), expected)
    assert_close(case.logits(adapters.merge()), expected)
    assert not any(type(module).__module__.startswith("lora_lab.adapters") for module in model.modules())


@over(PAIRS)
@torch.no_grad()
def test_removing_restores_the_model(case):
    """Check 5."""
    model = case.model()
    frozen = next(model.parameters()).requires_grad_(False)
    expected, before = case.logits(model), {name: p.clone() for name, p in model.state_dict().items()}
    adapters = inject(model, case.spec)
    perturb(adapters)
    assert adapters.remove() is model
    assert_same_tensors(model.state_dict(), before)
    assert torch.equal(case.logits(model), expected)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        name for name, p in model.named_parameters() if p is frozen
    ]
    assert not model._forward_pre_hooks


@over(PAIRS)
def test_training_reaches_the_adapters_alone(case):
    """Check 6."""
    model, adapters = case.adapted()
    own = adapters.named_parameters()
    base = {name: p for name, p in model.named_parameters() if not any(p is q for q in own.values())}
    before = {name: p.clone() for name, p in base.items()}
    optimizer = torch.optim.SGD(own.values(), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        backward(case, model, adapters)
        for name, parameter in own.items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert step or name.endswith(INERT) or parameter.grad.any(), name
        optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in base.values())
    assert_same_tensors(base, before)


@over(PAIRS)
@torch.no_grad()
def test_copies_give_the_same_logits(case):
    """Check 8: deepcopy, pickle, and a state dict loaded into a set with another seed."""
    model, adapters = case.adapted()
    expected = case.logits(model)
    twin, twin_adapters = copy.deepcopy((model, adapters))
    assert torch.equal(case.logits(twin), expected)
    assert torch.equal(case.logits(pickle.loads(pickle.dumps(model))), expected)
    fresh, fresh_adapters = case.adapted(seed=1, perturbed=False)
    fresh_adapters.load_state_dict(adapters.state_dict())
    assert torch.equal(case.logits(fresh), expected)
    twin_adapters.remove()
    assert torch.equal(case.logits(twin), case.logits(case.model()))
    assert torch.equal(case.logits(model), expected)


@over([pair for pair in PAIRS if pair[1] != "int8"])
def test_half_precision_base(case):
    """Check 9: in bfloat16 and under autocast, the output keeps its type and stays close to float32.

    Not on int8, which dequantises to float32.
    """
    wide, adapters = case.adapted()
    expected = case.logits(wide).detach()
    narrow = case.model().bfloat16()
    narrow_adapters = inject(narrow, case.spec)
    assert {parameter.dtype for parameter in narrow_adapters.trainable_parameters()} == {torch.float32}
    narrow_adapters.load_state_dict(adapters.state_dict())
    batch = {name: x.bfloat16() if x.is_floating_point() else x for name, x in case.batch().items()}
    logits = logits_of(narrow, batch)
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), expected, 5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(wide, case.batch())
    assert_close(logits.float(), expected, 5e-2)
    backward(case, wide, adapters)


def test_heads_of_a_double_precision_base_stay_double(make_model, make_batch):
    model = make_model("bert").double()
    inject(model, METHODS["head"].Spec())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert logits_of(model, make_batch("bert")).dtype == torch.float64


def test_a_merged_half_precision_model_has_one_type(make_model, make_batch):
    model = make_model("bert").bfloat16()
    with inject(model, METHODS["lora"].Spec()).merged():
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert logits_of(model, make_batch("bert")).dtype == torch.bfloat16


def test_a_half_precision_head_may_be_called_by_keyword():
    head = TrainedCopy(nn.Bilinear(3, 4, 2).bfloat16(), {})
    one, two = torch.randn(5, 3).bfloat16(), torch.randn(5, 4).bfloat16()
    assert torch.equal(head(input1=one, input2=two), head(one, two))


# The checks on one model ----------------------------------------------------------------------------------


@on_bert(option for option in OPTIONS if option != "head")
def test_gradients_at_the_start(case):
    """The tensors that the first step reaches are all but those of which the method says that it does not."""
    model, adapters = case.adapted(perturbed=False, modules_to_save=[])
    backward(case, model, adapters)
    own = {
        name: p for name, p in adapters.named_parameters().items() if p.numel() and not name.endswith(INERT)
    }
    unreached = {name for name, p in own.items() if not p.grad.any()}
    assert unreached == {name for name in adapters.without_gradient_at_start() if name in own}


def test_gradients_at_the_start_of_an_embedding(make_model, make_batch):
    model = make_model("bert")
    spec = METHODS["lora"].Spec(rank=4, targets=["word_embeddings"], modules_to_save=[])
    adapters = inject(model, spec)
    logits_of(model, make_batch("bert")).square().sum().backward()
    unreached = {name for name, p in adapters.named_parameters().items() if not p.grad.any()}
    assert unreached == adapters.without_gradient_at_start()
    assert {name.rpartition(".")[2] for name in unreached} == {"B"}


REBUILD = {"oft", "boft", "goft"}
"""Make their inputs again where no checkpoint does it for them, and round in another order then."""


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing_gives_equal_gradients(name, make_model, make_batch):
    """Check 11, for all methods in one test: recomputation happens after the forward has ended."""
    for option in METHODS:
        if (option, name) in NOT_ON:
            continue
        case = Case(option, name, make_model, make_batch, OPTIONS[option])
        gradients = []
        for checkpointing in (False, True):
            model, adapters = case.adapted()
            model.train()
            torch.manual_seed(5)  # of what is drawn in training
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            backward(case, model, adapters)
            gradients.append({path: p.grad for path, p in adapters.named_parameters().items()})
        if option in REBUILD:
            plain, checkpointed = gradients
            for path, gradient in plain.items():
                assert_close(checkpointed[path], gradient)
        else:
            assert_same_tensors(*gradients)


@on_bert(WITH_DROPOUT)
@torch.no_grad()
def test_dropout_works_in_training_alone(case):
    """Check 12."""
    plain, _ = case.adapted()
    model, _ = case.adapted(dropout=0.5)
    expected = case.logits(plain)
    assert torch.equal(case.logits(model), expected)
    model.train()
    assert not torch.equal(case.logits(model), case.logits(model))
    model.eval()
    assert torch.equal(case.logits(model), expected)


@on_bert(name for name in NAMESAKES if METHODS[name].mergeable)
@torch.no_grad()
def test_merged_model_is_saved_as_a_plain_one(case, tmp_path):
    model, adapters = case.adapted()
    adapters.merge().save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(case.logits(again), case.logits(model))


# The checks on one linear map -----------------------------------------------------------------------------


class One(nn.Module):
    """A model of one linear map."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


LINEAR_OPTIONS = [
    name
    for name, values in OPTIONS.items()
    if issubclass(METHODS[values["method"]], LinearAdapter) and name != "svft top_k"
]
"""SVFT's `top_k` refuses this map, which is not square."""


def one_linear(option: str, bias: bool = True, dtype: torch.dtype = torch.float32, perturbed: bool = True):
    values = dict(OPTIONS[option], targets=["linear"])
    if option == "ia3":
        values["feedforward_modules"] = ["linear"]
    torch.manual_seed(0)
    model = One(nn.Linear(24, 16, bias=bias, dtype=dtype)).eval()
    adapters = inject(model, METHODS[values["method"]].Spec(**values))
    if perturbed:
        perturb(adapters)
    return model, adapters, model.linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("option", LINEAR_OPTIONS)
@torch.no_grad()
def test_forward_equals_the_adapted_weight(option, bias):
    """Checks 2 and 3: the definition is the oracle of every faster form."""
    model, _, adapter = one_linear(option, bias)
    base = adapter.base
    weight, adapted_bias = adapter.adapted_weight(base.weight), adapter.adapted_bias(base.bias)
    assert_close(adapter.delta_weight(), weight - base.weight)
    assert_close(
        adapter.singular_values(),
        torch.linalg.svdvals(weight - base.weight)[: len(adapter.singular_values())],
    )
    wide = torch.randn(24, 7, 2)
    for x in (wide[:, :, 0].T, torch.randn(2, 3, 24), wide.permute(2, 1, 0), torch.randn(24)):
        assert_close(model(x), F.linear(x, weight, adapted_bias))
    assert model(torch.randn(0, 24)).shape == (0, 16)
    assert model(torch.randn(2, 0, 24)).shape == (2, 0, 16)


@pytest.mark.parametrize("option", LINEAR_OPTIONS)
def test_empty_batches_have_gradients(option):
    model, adapters, _ = one_linear(option)
    model(torch.randn(0, 24)).sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in adapters.trainable_parameters())


@pytest.mark.parametrize("option", LINEAR_OPTIONS)
@torch.no_grad()
def test_double_precision_stays_double(option):
    model, adapters, adapter = one_linear(option, dtype=torch.float64)
    assert {p.dtype for p in adapters.trainable_parameters()} == {torch.float64}
    x = torch.randn(5, 24, dtype=torch.float64)
    expected = F.linear(
        x, adapter.adapted_weight(adapter.base.weight), adapter.adapted_bias(adapter.base.bias)
    )
    assert_close(model(x), expected, 1e-12)


@pytest.mark.parametrize("option", COUNTS)
def test_number_of_trained_parameters(option):
    """Check 7."""
    values = dict(OPTIONS[option], targets=["linear"], modules_to_save=[])
    if option == "ia3":
        values["feedforward_modules"] = ["linear"]
    model, spec = One(nn.Linear(24, 16)), METHODS[values["method"]].Spec(**values)
    assert parameter_count(model, spec) == COUNTS[option]
    adapters = inject(model, spec)
    assert adapters.trainable_count() == COUNTS[option]
    assert adapters.base_count() == 24 * 16 + 16


@pytest.mark.parametrize("option", LINEAR_OPTIONS)
def test_compiled_linear_agrees(option):
    """Check 10: no graph break, output and gradients equal."""
    model, adapters, _ = one_linear(option)
    x = torch.randn(5, 24)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # Not the distance from 0: a turn of y does not change it, and its gradient would be rounding alone.
    expected = torch.autograd.grad((model(x) - 1).square().sum(), adapters.trainable_parameters())
    assert_close(compiled(x), model(x))
    for found, gradient in zip(
        torch.autograd.grad((compiled(x) - 1).square().sum(), adapters.trainable_parameters()),
        expected,
        strict=True,
    ):
        assert_close(found, gradient)


@pytest.mark.parametrize("option", ["lora", "reft"])
@torch.no_grad()
def test_compiled_model_agrees(option, make_model, make_batch):
    case = Case(option, "bert", make_model, make_batch, OPTIONS[option])
    model, _ = case.adapted()
    torch.compiler.reset()
    assert_close(case.logits(torch.compile(model, fullgraph=True, backend="aot_eager")), case.logits(model))


# Targets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ["q_proj"]},
            "bert has no 'q_proj' (its roles are query, key, value, attention_output, up",
        ),
        ({"targets": ["querry"]}, "did you mean 'query'?"),
        ({"targets": "regex:.*[query"}, "is no regular expression"),
        ({"targets": "regex:query"}, "bert has no 'regex:query'"),
        ({"layers": [1, 5]}, "have no layer [5]; their layers are [0, 1]"),
        ({"targets": ["classifier"]}, "which is trained whole"),
        ({"modules_to_save": ["scorer"]}, "adapter.modules_to_save: no module 'scorer'"),
        ({"targets": ["LayerNorm"]}, "a LayerNorm, which lora cannot edit"),
        ({"rank_pattern": {"keys": 2}}, "adapter.rank_pattern: 'keys' matches no adapted module"),
    ],
)
def test_faulty_targets_name_the_fault_and_leave_the_model_alone(changes, message, make_model, make_batch):
    """Check 13."""
    model = make_model("bert")
    before = model.state_dict()
    with pytest.raises(TargetError) as caught:
        inject(model, replace(METHODS["lora"].Spec(rank=4), **changes))
    assert message in str(caught.value)
    assert_same_tensors(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parts_of_multihead_attention_are_refused():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(TargetError, match="never calls the module"):
        inject(model, METHODS["lora"].Spec(targets=["out_proj"]))


def test_regular_expressions_match_whole_paths(make_model):
    adapters = inject(make_model("bert"), METHODS["lora"].Spec(targets=r"regex:.*layer\.1\..*\.(query|key)"))
    assert [path.rpartition(".")[2] for path in adapters.adapters] == ["query", "key"]


def test_second_injection_is_refused(make_model):
    model = make_model("bert")
    adapters = inject(model, METHODS["lora"].Spec(rank=4))
    with pytest.raises(IncompatibleError, match=r"remove\(\) or merge\(\)"):
        inject(model, METHODS["ia3"].Spec())
    adapters.remove()
    inject(model, METHODS["ia3"].Spec())


# Tables and new methods -----------------------------------------------------------------------------------


def test_tables_know_every_method():
    assert {name for name in METHODS if name not in ("head", "reft")} <= set(COUNTS)
    for name, method in METHODS.items():
        assert method.identity_at_start == (name not in OTHER_START)
        assert method.Spec().method == name


@dataclass
class VolumeSpec(AdapterSpec):
    method: str = "volume"


class Volume(AdditiveAdapter):
    """W' = (1 + v) W: the smallest method there is, to show what adding one takes."""

    Spec = VolumeSpec
    family = "test"
    paper = "-"
    peft = PeftLayout(None, tensors={"volume_v": "v"})

    def __init__(self, base: nn.Module, spec: VolumeSpec):
        super().__init__(base)
        self.v = nn.Parameter(torch.zeros((), dtype=self.dtype))

    def delta_weight(self) -> Tensor:
        return self.v * widened(self.base.weight)


@pytest.mark.parametrize("name", MODELS)
def test_a_new_method_is_one_class_and_one_entry(name, make_model, make_batch, register):
    """Check 14."""
    register(Volume)
    case = Case("volume", name, make_model, make_batch, {"method": "volume"})
    test_starts_as_the_identity(case)
    test_perturbing_changes_the_output(case)
    test_merged_model_gives_the_same_logits(case)
    test_removing_restores_the_model(case)
    test_training_reaches_the_adapters_alone(case)
    test_copies_give_the_same_logits(case)
    if name != "int8":
        test_half_precision_base(case)


def assert_same_tensors(found, expected) -> None:
    """Same names, bitwise the same numbers."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
