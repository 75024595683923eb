"""Merging file by file: the same numbers as merging in memory, rounded once, and nothing half-written."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.artifacts import export, merge
from lora_lab.errors import CheckpointError, ConfigError, IncompatibleError
from lora_lab.linalg.lazy import LazyTensor
from lora_lab.models import conversion
from lora_lab.models.build import ModelConfig, build_model
from lora_lab.models.conversion import save_model, split_fused_projections
from lora_lab.models.tiny import character_tokenizer
from tests.adapters.test_storage import OPTIONS
from tests.adapters.tiny import EXPERTS, mixtral, relative, shake, shaken, tiny_bert, tiny_llama

TOKENS = torch.arange(5, 17)[None]


@torch.no_grad()
def outputs(model):
    return model.eval()(input_ids=TOKENS).logits


def folders(tmp_path, architecture, spec, dtype="float32", **config):
    """Writes a base with its tokenizer and a trained adapter; returns their folders and the outputs."""
    drawn = ModelConfig(name=f"random:{architecture}", task="causal_lm", config=config, dtype=dtype)
    torch.manual_seed(0)
    base = mixtral() if architecture == "mixtral" else build_model(drawn)
    save_model(base, tmp_path / "base", "40KB")
    character_tokenizer(base.config).save_pretrained(tmp_path / "base")
    model = build_model(ModelConfig(name=str(tmp_path / "base"), task="causal_lm", dtype=dtype))
    adapters = inject(model, spec)
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter", str(tmp_path / "base"), "CAUSAL_LM")
    return tmp_path / "base", tmp_path / "adapter", outputs(model)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].mergeable])
def test_merging_one_by_one_is_merging_at_once(name):
    def adapted():
        model = tiny_llama() if name == "clover" else tiny_bert()
        spec = METHODS[name].Spec(**OPTIONS.get(name, {}))
        adapters = inject(model, spec)
        shake(adapters)
        return model, adapters

    model, adapters = adapted()
    expected = adapters.merge().state_dict()
    model, adapters = adapted()
    base, changed = adapters.merge_lazily()
    assert base is model
    weights = conversion._weights(model, changed)
    assert all(torch.equal(weights[name], expected[name]) for name in weights.keys() - changed.keys())
    assert {**changed} or name == "head"
    for name, tensor in changed.items():
        assert torch.equal(tensor.now() if isinstance(tensor, LazyTensor) else tensor, expected[name]), name


@pytest.mark.parametrize(
    ("architecture", "targets", "config"),
    [
        ("llama", "all-linear", {"tie_word_embeddings": True}),
        ("llama", ["embed_tokens", "query"], {"tie_word_embeddings": True}),
        ("gpt2", "all-linear", {}),
        ("mixtral", ["experts", "query"], {}),
    ],
)
def test_every_layout_opens_in_transformers(architecture, targets, config, tmp_path):
    spec = LoRASpec(rank=3, targets=targets, modules_to_save=[])
    _, adapter, expected = folders(tmp_path, architecture, spec, **config)
    merge(adapter, tmp_path / "merged", shard_size="30KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert relative(outputs(model), expected) < 1e-5


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A base in bfloat16."""
    folder, base = tmp_path_factory.mktemp("half") / "base", tiny_llama().to(torch.bfloat16)
    save_model(base, folder)
    character_tokenizer(base.config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].mergeable and name != "head"])
def test_a_merge_in_bfloat16_is_one_rounding_of_the_weights_in_float64(name, half, tmp_path, record_property):
    """So each number is wrong by at most half a unit of its last place, 2⁻⁸ of it.

    What this does to the outputs is of the same order for each merged map that they pass through.
    """
    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16)
    spec = METHODS[name].Spec(**OPTIONS.get(name, {}))
    if name == "road":
        spec.group_size = 6
    adapters = inject(model, spec)
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter", str(half), "CAUSAL_LM")
    model.double()
    expected = outputs(model)
    exact = adapters.merge().state_dict()
    merge(tmp_path / "adapter", tmp_path / "merged", dtype="bfloat16")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(half / "model.safetensors")
    moved = [key for key in stored if not torch.equal(exact[key], base[key].double())]
    assert moved
    for key, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16
        error = (tensor.double() - exact[key]).abs()
        slack = 1e-6 * exact[key].abs().max()  # of the sum in float32
        assert (error <= 2**-8 * exact[key].abs() + slack).all(), key
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    error = relative(outputs(merged), expected)
    record_property("relative error of the outputs", error)
    assert error < 2**-8 * len(moved)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_half_precision_is_rounded_once(dtype, tmp_path):
    spec = LoRASpec(rank=3, targets=["query"], modules_to_save=[])
    base, adapter, _ = folders(tmp_path, "llama", spec, dtype="bfloat16")
    merge(adapter, tmp_path / "merged", dtype=dtype)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    model = build_model(ModelConfig(name=str(base), task="causal_lm", dtype="float32"))
    load_adapter(model, adapter).merge()
    expected = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert {str(tensor.dtype) for tensor in merged.values()} == {f"torch.{dtype}"}
    assert torch.equal(merged["model.layers.0.self_attn.q_proj.weight"], expected.to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype


def test_memory_holds_two_tensors(tmp_path):
    model, alive, most = tiny_llama(), [], []

    def make(tensor):
        made = tensor.detach().clone()
        alive.append(weakref.ref(made))
        most.append(sum(part().nbytes for part in alive if part() is not None))
        return made

    changed = {
        name: LazyTensor.of(lambda tensor=tensor: make(tensor), tensor.shape, tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    save_model(model, tmp_path, "25KB", changed=changed)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    largest = sorted(tensor.nbytes for tensor in changed.values())[-2:]
    assert max(most) <= sum(largest)
    assert len(alive) == len(changed)


def test_a_merge_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    spec = LoRASpec(rank=3, modules_to_save=[])
    _, adapter, _ = folders(tmp_path, "llama", spec)
    write, calls = conversion.write_weights, []

    def breaking(*arguments, **options):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments, **options)

    monkeypatch.setattr(conversion, "write_weights", breaking)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "merged", shard_size="30KB")
    assert sorted(tmp_path.iterdir()) == before


def test_a_rank_cuts_the_update_and_the_card_says_so(tmp_path):
    spec = LoRASpec(rank=3, targets=["query", "value"], modules_to_save=[])
    _, adapter, _ = folders(tmp_path, "llama", spec)
    found = merge(adapter, tmp_path / "merged", rank=1)
    assert set(found.ranks.values()) == {1}
    assert f"{max(found.errors.values()):.3g}" in (tmp_path / "merged" / "README.md").read_text()
    base = build_model(ModelConfig(name=str(tmp_path / "base"), task="causal_lm")).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    moved = load_file(tmp_path / "merged" / "model.safetensors")[name] - base[name]
    assert int(torch.linalg.matrix_rank(moved, rtol=1e-4)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "int8"}, "--dtype"), ({"shard_size": "many"}, "--shard-size"), ({"rank": 0}, "--rank")],
)
def test_settings_that_mean_nothing_are_refused_before_work(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        merge(tmp_path / "missing", tmp_path / "out", **options)
    with pytest.raises(CheckpointError, match="neither a run nor an adapter"):
        merge(tmp_path / "missing", tmp_path / "out")


def test_what_edits_hidden_states_is_refused_with_a_way_out(tmp_path):
    _, adapter, _ = folders(tmp_path, "llama", METHODS["reft"].Spec(rank=2))
    with pytest.raises(IncompatibleError, match=r"cannot be merged.*Keep the adapter in place"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_bias_that_the_architecture_lacks_is_refused_and_an_export_has_it(tmp_path):
    """transformers drops what its class does not have, without an error."""
    spec = LoRASpec(rank=2, targets=["value"], modules_to_save=[], lora_bias=True)
    base, adapter, expected = folders(tmp_path, "llama", spec)
    with pytest.raises(
        IncompatibleError, match=r"v_proj\.bias and 1 more: LlamaForCausalLM has no .* export"
    ):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    export(adapter, tmp_path / "exported")
    model = build_model(ModelConfig(name=str(base), task="causal_lm"))
    load_adapter(model, tmp_path / "exported")
    assert relative(outputs(model), expected) < 1e-5

    config = Phi3Config(**EXPERTS, pad_token_id=0)
    for targets in (["value"], ["query", "value"], ["query", "key", "value"]):
        for lazy in (True, False):
            model = split_fused_projections(shaken(Phi3ForCausalLM(config)))
            adapters = inject(model, LoRASpec(rank=2, targets=targets, lora_bias=True))
            shake(adapters)
            changed = adapters.merge_lazily()[1] if lazy else {}
            model = model if lazy else adapters.merge()
            with pytest.raises(IncompatibleError, match=r"qkv_proj\.(value\.|query\.)?bias and \d more"):
                save_model(model, tmp_path / "fused", changed=changed)
