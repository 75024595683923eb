"""Our methods against PEFT's: the same tensors give the same outputs, and each opens the other's folders.

How far outputs are apart is max |Δ| / max |y| (`relative`); the tolerance is stated once, for float32.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import IncompatibleError
from tests.adapters.tiny import MODELS, linear, logits, relative, shake

TOLERANCE = 1e-6
ROLES = {"bert": ["query", "value", "up"], "llama": ["query", "value", "down"]}
NAMES = {"bert": ["query", "value", "intermediate.dense"], "llama": ["q_proj", "v_proj", "down_proj"]}
TASK = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}


@dataclass(frozen=True)
class Case:
    """One method in our words and in PEFT's."""

    method: str
    config: type[peft.PeftConfig]
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    patterns: bool = False
    """Whether rank and alpha may differ between sites."""
    sites: int = 3
    """How many of the targets it can edit: not all of them have an even number of outputs."""

    def spec(self, model, **options):
        own = {"feedforward_modules": ROLES[model][2:]} if self.method == "ia3" else {}
        return METHODS[self.method].Spec(targets=ROLES[model][: self.sites], **self.ours, **own, **options)

    def peft(self, model, **options):
        own = {"feedforward_modules": NAMES[model][2:]} if self.method == "ia3" else {}
        return self.config(target_modules=NAMES[model][: self.sites], **self.theirs, **own, **options)


SAME_RANKS = ({"rank": 4, "alpha": 6.0}, {"r": 4, "alpha": 6})
RANKS = ({"rank": 4, "alpha": 6.0}, {"r": 4, "lora_alpha": 6})


def lora(method="lora", ours=None, **theirs):
    return Case(method, peft.LoraConfig, RANKS[0] | (ours or {}), RANKS[1] | theirs, patterns=True)


def road(variant):
    options = {"variant": variant, "group_size": 6}
    return Case("road", peft.RoadConfig, options, options, sites=2)


def fourierft():
    options = {"n_frequency": 30, "scaling": 10.0, "random_loc_seed": 5}
    return Case("fourierft", peft.FourierFTConfig, options, options)


CASES = {
    "lora": lora(),
    "rslora": lora(ours={"rslora": True}, use_rslora=True),
    "lora_bias": lora(ours={"lora_bias": True}, lora_bias=True),
    "dora": lora("dora", use_dora=True),
    "dora_rslora": lora("dora", {"rslora": True}, use_dora=True, use_rslora=True),
    "pissa": lora("pissa", init_lora_weights="pissa"),
    "adalora": Case(
        "adalora",
        peft.AdaLoraConfig,
        RANKS[0],
        {"init_r": 4, "lora_alpha": 6, "total_step": 10},
    ),
    "loha": Case("loha", peft.LoHaConfig, *SAME_RANKS, patterns=True),
    "lokr": Case("lokr", peft.LoKrConfig, *SAME_RANKS, patterns=True),
    "lokr_both": Case(
        "lokr",
        peft.LoKrConfig,
        SAME_RANKS[0] | {"rank": 1, "decompose_both": True, "decompose_factor": 5},
        SAME_RANKS[1] | {"r": 1, "decompose_both": True, "decompose_factor": 5},
        patterns=True,
    ),
    "vera": Case("vera", peft.VeraConfig, {"rank": 8}, {"r": 8}),
    "vera_unsaved": Case(
        "vera",
        peft.VeraConfig,
        {"rank": 8, "save_projection": False, "projection_prng_key": 5},
        {"r": 8, "save_projection": False, "projection_prng_key": 5},
    ),
    "randlora": Case(
        "randlora", peft.RandLoraConfig, {"rank": 4, "alpha": 6.0}, {"r": 4, "randlora_alpha": 6}
    ),
    "randlora_sparse": Case(
        "randlora",
        peft.RandLoraConfig,
        {"rank": 3, "alpha": 7.0, "sparse": True},
        {"r": 3, "randlora_alpha": 7.0, "sparse": True},
    ),
    "randlora_unsaved": Case(
        "randlora",
        peft.RandLoraConfig,
        {"rank": 5, "alpha": 11.0, "very_sparse": True, "save_projection": False, "projection_prng_key": 5},
        {
            "r": 5,
            "randlora_alpha": 11.0,
            "very_sparse": True,
            "save_projection": False,
            "projection_prng_key": 5,
        },
    ),
    "delora_zero_b": Case(
        "delora",
        peft.DeloraConfig,
        {"rank": 4, "delora_lambda": 3.0, "init": "zero_b"},
        {"r": 4, "delora_lambda": 3},
    ),
    "delora_current": Case(
        "delora",
        peft.DeloraConfig,
        {"rank": 4, "residual_lambda": "current"},
        {"r": 8},
    ),
    "psoft": Case("psoft", peft.PsoftConfig, {"rank": 5}, {"r": 5, "psoft_alpha": 3}),
    "psoft_unsaved": Case(
        "psoft",
        peft.PsoftConfig,
        {"rank": 5, "ab_svd_init": "pissa_init", "psoft_mag_a": False, "save_basis": False},
        {"r": 5, "ab_svd_init": "pissa_init", "psoft_mag_a": False},
    ),
    "psoft_neumann": Case(
        "psoft",
        peft.PsoftConfig,
        {"rank": 4, "use_cayley_neumann": True, "cayley_neumann_eps": 0.2, "niter": 2, "random_seed": 3},
        {
            "r": 4,
            "use_cayley_neumann": True,
            "cayley_neumann_eps": 0.2,
            "psoft_svd": "lowrank",
            "psoft_svd_lowrank_niter": 2,
            "random_seed": 3,
        },
    ),
    "psoft_free": Case(
        "psoft",
        peft.PsoftConfig,
        {"rank": 3, "psoft_orth": False, "psoft_mag_b": False},
        {"r": 3, "psoft_orth": False, "psoft_mag_b": False},
    ),
    "ia3": Case("ia3", peft.IA3Config),
    # Widths that share no divisor: PEFT adjusts the blocks at every site.
    "oft": Case("oft", peft.OFTConfig, {"auto_adjust": True}),
    "oft_exact": Case(
        "oft",
        peft.OFTConfig,
        {"auto_adjust": True, "use_cayley_neumann": False},
        {"use_cayley_neumann": False},
    ),
    "oft_blocks": Case(
        "oft",
        peft.OFTConfig,
        {"auto_adjust": True, "r": 3, "oft_block_size": 0, "num_cayley_neumann_terms": 6},
        {"r": 3, "oft_block_size": 0, "num_cayley_neumann_terms": 6},
    ),
    # The widths' only common number of blocks; more of them, and more factors, are in test_boft.
    "boft": Case(
        "boft",
        peft.BOFTConfig,
        {"boft_block_size": 0, "boft_block_num": 1},
        {"boft_block_size": 0, "boft_block_num": 1},
    ),
    "fourierft": fourierft(),
    "road": road("road_1"),
    "road_2": road("road_2"),
    "road_4": road("road_4"),
    "hra": Case("hra", peft.HRAConfig, {"rank": 4}, {"r": 4}),
}
ALL = pytest.mark.parametrize(("name", "model"), [(name, model) for name in CASES for model in MODELS])
# bert has a head and biases, which files hold too.
FILES = pytest.mark.parametrize(
    ("name", "model"),
    [(name, model) for name in CASES for model in MODELS if model == "bert" or CASES[name].patterns],
)


@pytest.fixture(autouse=True)
def quiet():
    """PEFT warns of what is meant here: projections that are not stored, models without a hub name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def shake_peft(model, seed=4):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def opened_by_peft(model, folder):
    return logits(peft.PeftModel.from_pretrained(MODELS[model](), folder))


@ALL
def test_same_tensors_give_pefts_outputs(name, model):
    case, ours = CASES[name], MODELS[model]()
    base = logits(ours)
    adapters = inject(ours, case.spec(model, modules_to_save=[]))
    shake(adapters)
    theirs = peft.get_peft_model(MODELS[model](), case.peft(model))
    tensors = {}
    for path, adapter in adapters.items():
        own = adapter.peft_tensors()
        if case.method == "psoft":  # PEFT computes the directions itself
            own = {key: tensor for key, tensor in own.items() if key in adapter.peft.tensors}
        if name == "pissa":  # PEFT's file holds what is trained; the start it computes itself
            own = {"lora_A.weight": adapter.A, "lora_B.weight": adapter.B}
        tensors |= {f"base_model.model.{path}.{key}": tensor.detach() for key, tensor in own.items()}
    if name == "vera":  # its projections are those that PEFT drew itself
        theirs.peft_config["default"].save_projection = False
    result = peft.set_peft_model_state_dict(theirs, tensors)
    assert not result.unexpected_keys
    assert relative(logits(ours), base) > 0.01
    assert relative(logits(ours), logits(theirs)) < TOLERANCE


@FILES
def test_our_folder_opens_in_peft_with_head_and_patterns(name, model, tmp_path):
    case, ours = CASES[name], MODELS[model]()
    patterns = {"rank_pattern": {"value": 2}, "alpha_pattern": {"query": 9.0}} if case.patterns else {}
    adapters = inject(ours, case.spec(model, **patterns))
    assert bool(adapters.saved) == (model == "bert")
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter", task_type=TASK[model])
    assert relative(opened_by_peft(model, tmp_path / "adapter"), logits(ours)) < TOLERANCE


@FILES
def test_pefts_folder_opens_here_with_head_and_patterns(name, model, tmp_path):
    case = CASES[name]
    query, value, _ = NAMES[model]
    patterns = {"rank_pattern": {value: 2}, "alpha_pattern": {query: 9}} if case.patterns else {}
    theirs = peft.get_peft_model(MODELS[model](), case.peft(model, task_type=TASK[model], **patterns))
    shake_peft(theirs)
    theirs.save_pretrained(tmp_path)
    ours = MODELS[model]()
    adapters = load_adapter(ours, tmp_path)
    assert adapters.spec.method == case.method
    assert list(adapters.saved) == (["classifier"] if model == "bert" else [])
    assert relative(logits(ours), logits(theirs)) < TOLERANCE


@FILES
def test_folder_that_went_through_peft_comes_back_the_same(name, model, tmp_path):
    adapters = inject(MODELS[model](), CASES[name].spec(model))
    shake(adapters)
    save_adapter(adapters, tmp_path / "ours", task_type=TASK[model])
    peft.PeftModel.from_pretrained(MODELS[model](), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = MODELS[model]()
    load_adapter(back, tmp_path / "theirs")
    assert relative(logits(back), logits(adapters.model)) < TOLERANCE


@pytest.mark.parametrize("rslora", [False, True])
def test_olora_computes_what_pefts_does_on_the_base_that_it_changes(rslora):
    ours = MODELS["llama"]()
    adapters = inject(ours, lora(ours={"init": "olora", "rslora": rslora}).spec("llama"))
    shake(adapters)
    config = lora(init_lora_weights="olora", use_rslora=rslora).peft("llama")
    theirs = peft.get_peft_model(MODELS["llama"](), config)
    tensors = {}
    for path, adapter in adapters.items():
        for name, tensor in {"lora_A": adapter.A, "lora_B": adapter.B}.items():
            tensors[f"base_model.model.{path}.{name}.weight"] = tensor.detach()
    assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys
    assert relative(logits(ours), logits(theirs)) < TOLERANCE


@pytest.mark.parametrize("init", ["gaussian", "scaled_gaussian", "orthogonal", "olora", "pissa"])
def test_every_start_of_lora_opens_in_peft(init, tmp_path):
    spec = METHODS["lora"].Spec(
        targets=ROLES["llama"], rank=4, init=init, rslora=True, rank_pattern={"value": 2}
    )
    adapters = inject(MODELS["llama"](), spec)
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    assert relative(opened_by_peft("llama", tmp_path / "adapter"), logits(adapters.model)) < TOLERANCE


def test_residual_pissa_opens_in_peft(tmp_path):
    adapters = inject(MODELS["llama"](), METHODS["pissa"].Spec(rank=4, mode="residual", niter=2))
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    assert relative(opened_by_peft("llama", tmp_path / "adapter"), logits(adapters.model)) < TOLERANCE


@pytest.mark.parametrize("sizes", [(1, 64, 4), (7, 3, 5), (3, 7, 1), (33, 17, 9)])
@pytest.mark.parametrize("method", ["dylora", "lora_drop", "lora_prune"])
def test_relatives_of_lora_open_in_peft_as_lora_whatever_their_sizes(method, sizes, tmp_path):
    rows, columns, rank = sizes
    model, x = linear(rows, columns), torch.randn(5, columns)
    adapters = inject(model, METHODS[method].Spec(targets=["0"], rank=rank, alpha=3.0))
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(linear(rows, columns), tmp_path / "adapter")
    assert relative(theirs(x), model.eval()(x)) < TOLERANCE


@pytest.mark.parametrize("model", MODELS)
def test_adapted_embeddings_open_both_ways(model, tmp_path):
    name = {"bert": "word_embeddings", "llama": "embed_tokens"}[model]
    adapters = inject(MODELS[model](), METHODS["lora"].Spec(targets=[name, "query"], rank=3))
    shake(adapters)
    save_adapter(adapters, tmp_path / "ours", task_type=TASK[model])
    assert relative(opened_by_peft(model, tmp_path / "ours"), logits(adapters.model)) < TOLERANCE
    theirs = peft.get_peft_model(
        MODELS[model](), peft.LoraConfig(r=3, target_modules=[name], task_type=TASK[model])
    )
    shake_peft(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = MODELS[model]()
    load_adapter(ours, tmp_path / "theirs")
    assert relative(logits(ours), logits(theirs)) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*\.1\.self_attn\.[qv]_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_pefts_ways_to_choose_modules_are_understood(options, tmp_path):
    theirs = peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(r=4, **options))
    shake_peft(theirs)
    theirs.save_pretrained(tmp_path)
    ours = MODELS["llama"]()
    load_adapter(ours, tmp_path)
    assert relative(logits(ours), logits(theirs)) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"init_lora_weights": "pissa_niter_2"},
            "init_lora_weights: 'pissa_niter_2' started from a random SVD",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' changed the base model"),
        ({"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, r"alora_invocation_tokens: \[3\]"),
    ],
)
def test_options_of_peft_that_we_cannot_honour_are_refused(options, message, tmp_path):
    theirs = peft.get_peft_model(
        MODELS["llama"](), peft.LoraConfig(r=4, target_modules=["q_proj"], **options)
    )
    theirs.save_pretrained(tmp_path)
    model = MODELS["llama"]()
    with pytest.raises(IncompatibleError, match=message):
        load_adapter(model, tmp_path)
    assert all(parameter.requires_grad for parameter in model.parameters())
