"""Adapter folders: round trips of every method, and everything that may be wrong with a folder."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from lora_lab.adapters import METHODS, inject, storage
from lora_lab.adapters.base import Adapter
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.storage import CARD, CONFIG, OWN, TENSORS, load_adapter, save_adapter
from lora_lab.errors import CheckpointError, IncompatibleError, TargetError
from tests.adapters.tiny import logits, relative, shake, tiny_bert, tiny_llama, tokens

OPTIONS = {
    name: {"rank": 4}
    for name in ("lora", "dora", "pissa", "delora", "randlora", "hra", "reft", "psoft", "antipasto")
}
OPTIONS |= {
    "vera": {"rank": 8},
    "salt": {"rank": 3, "r_lora": 2},
    "edora": {"rank": 4},
    "salt_edora": {"rank": 4},
}
OPTIONS |= {"road": {"group_size": 2}, "fourierft": {"n_frequency": 20}}
OPTIONS |= {"oft": {"oft_block_size": 5}, "boft": {"boft_block_size": 5}}
"""What makes a method small enough for the tiny models."""

VARIANTS = {
    "lora, olora with patterns": LoRASpec(rank=4, init="olora", rank_pattern={"value": 2}),
    "lora, bias and one layer": LoRASpec(rank=4, lora_bias=True, layers=[1], dropout=0.1),
    "lora, regex": LoRASpec(rank=4, targets="regex:.*query"),
    "pissa, residual": METHODS["pissa"].Spec(rank=4, mode="residual", niter=0),
    "pissa, randomised": METHODS["pissa"].Spec(rank=4, niter=2, rslora=True),
    "delora, current": METHODS["delora"].Spec(rank=4, residual_lambda="current", rank_pattern={"value": 2}),
    "delora, zero_b": METHODS["delora"].Spec(rank=4, init="zero_b"),
    "salt, no basis": METHODS["salt"].Spec(rank=None, ratio=0.5, r_lora=2, save_basis=False),
    "edora, no basis": METHODS["edora"].Spec(rank=4, rank_pattern={"value": 2}, save_basis=False),
    "ssvd, free": METHODS["ssvd"].Spec(rotation="free"),
    "vera, unsaved": METHODS["vera"].Spec(rank=8, save_projection=False),
    "randlora, unsaved": METHODS["randlora"].Spec(rank=4, alpha=7.0, save_projection=False),
    "randlora, sparse": METHODS["randlora"].Spec(rank=4, sparse=True, projection_prng_key=3),
}


@pytest.fixture
def folder(tmp_path):
    """A good LoRA folder of the tiny classifier."""
    adapters = inject(tiny_bert(), LoRASpec(rank=4))
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_whoever_may_read_one_file_may_read_the_others(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def refused(folder, message, error=CheckpointError, model=tiny_bert):
    """Loads what must be refused, and checks that the model is as it was."""
    model = model()
    before, modules = logits(model), [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert [type(module) for module in model.modules()] == modules
    assert not any(isinstance(module, Adapter) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), before)


def rewrite(folder, **changes):
    """Changes tensors of a folder; None takes one out."""
    tensors = load_file(folder / TENSORS) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / TENSORS)


def same_after_loading(make, spec, folder):
    model = make()
    adapters = inject(model, spec, seed=7)  # loading knows nothing of this seed
    shake(adapters)
    expected = logits(model)
    save_adapter(adapters, folder)
    fresh = make()
    loaded = load_adapter(fresh, folder)
    assert torch.equal(logits(fresh), expected)
    assert asdict(loaded.spec) == asdict(spec) | {"modules_to_save": list(adapters.saved)}
    assert loaded.named_parameters().keys() == adapters.named_parameters().keys()
    return loaded


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_from_its_folder(variant, tmp_path):
    same_after_loading(tiny_bert, VARIANTS[variant], tmp_path / "adapter")


@pytest.mark.parametrize(
    "variant",
    [
        "lora, bias and one layer",
        "pissa, residual",
        "delora, current",
    ],
)
def test_dropped_adapters_are_saved_as_no_change(variant, tmp_path):
    base = tiny_bert()
    adapters = inject(tiny_bert(), replace(VARIANTS[variant], modules_to_save=[]))
    shake(adapters)
    for adapter in adapters:
        adapter.drop()
    save_adapter(adapters, tmp_path / "adapter")
    fresh = tiny_bert()
    load_adapter(fresh, tmp_path / "adapter")
    assert relative(logits(fresh), logits(base)) < 1e-6


REMOVED = [
    (name, field, value) for name, m in METHODS.items() for field, value in m.Spec.removed_fields.items()
]


@pytest.mark.parametrize(("method", "field", "value"), REMOVED)
def test_a_removed_field_is_forgotten_at_its_default_and_refused_at_another_value(
    method, field, value, tmp_path
):
    model = tiny_bert()
    adapters = inject(model, METHODS[method].Spec(**OPTIONS.get(method, {})))
    save_adapter(adapters, tmp_path / "adapter")
    own = tmp_path / "adapter" / OWN
    spec = OmegaConf.load(own)
    OmegaConf.update(spec, f"adapter.{field}", value)
    own.write_text(OmegaConf.to_yaml(spec))
    fresh = tiny_bert()
    assert asdict(load_adapter(fresh, tmp_path / "adapter").spec) == asdict(adapters.spec) | {
        "modules_to_save": list(adapters.saved)
    }
    other = not value if isinstance(value, bool) else "something else"
    OmegaConf.update(spec, f"adapter.{field}", other)
    own.write_text(OmegaConf.to_yaml(spec))
    refused(tmp_path / "adapter", f"adapter.{field}: {other!r} is no longer supported", IncompatibleError)


def test_model_in_half_precision_comes_back_from_its_folder(tmp_path):
    same_after_loading(lambda: tiny_bert().bfloat16(), LoRASpec(rank=4), tmp_path / "adapter")


@pytest.mark.parametrize("method", ["lora", "pissa", "delora", "vera", "randlora"])
def test_loaded_adapter_trains_on_as_the_saved_one_would(method, tmp_path):
    outputs = []
    for loaded in (False, True):
        adapters = inject(tiny_bert(), METHODS[method].Spec(**OPTIONS[method]))
        shake(adapters)
        if loaded:
            save_adapter(adapters, tmp_path / "adapter")
            adapters = load_adapter(tiny_bert(), tmp_path / "adapter")
        before = logits(adapters.model)
        optimizer = torch.optim.SGD(adapters.trainable_parameters(), lr=0.05)
        adapters.model.train()(input_ids=tokens()).logits.square().sum().backward()
        optimizer.step()
        outputs.append(logits(adapters.model))
        assert relative(outputs[-1], before) > 1e-3
    assert torch.equal(*outputs)


def test_folder_holds_pefts_two_files_and_our_spec(folder):
    assert sorted(file.name for file in folder.iterdir()) == sorted([CARD, CONFIG, OWN, TENSORS])
    tensors = load_file(folder / TENSORS)
    path = "base_model.model.bert.encoder.layer.0.attention.self.query"
    assert tensors[f"{path}.lora_A.weight"].shape == (4, 30)
    assert "base_model.model.classifier.weight" in tensors
    assert not any("base" in name.removeprefix("base_model") for name in tensors)
    assert json.loads((folder / CONFIG).read_text())["modules_to_save"] == ["classifier"]


def test_folder_is_replaced_whole_and_only_if_it_is_an_adapter(folder, tmp_path):
    save_adapter(inject(tiny_bert(), METHODS["ia3"].Spec()), folder)
    assert json.loads((folder / CONFIG).read_text())["peft_type"] == "IA3"
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("ten years")
    with pytest.raises(CheckpointError, match="holds something other than an adapter"):
        save_adapter(inject(tiny_bert(), LoRASpec()), tmp_path / "work")
    assert (tmp_path / "work" / "thesis.tex").read_text() == "ten years"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "work"]


def test_failed_write_leaves_nothing_and_keeps_the_old_folder(folder, tmp_path, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_adapter(inject(tiny_bert(), LoRASpec()), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: cannot be written to .* Choose another folder"):
        save_adapter(inject(tiny_bert(), LoRASpec()), tmp_path / "file" / "adapter")


def test_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such folder. Name the folder that holds adapter_config.json")


def test_missing_tensors_are_refused(folder):
    (folder / TENSORS).unlink()
    refused(folder, "holds no adapter_model.safetensors. Name the folder that a run wrote")


def test_pickle_is_not_opened(folder):
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(folder, "holds only adapter_model.bin, a pickle, which can run code")


def test_truncated_tensors_are_refused(folder):
    whole = (folder / TENSORS).read_bytes()
    for length in (0, 4, len(whole) // 2, len(whole) - 1):
        (folder / TENSORS).write_bytes(whole[:length])
        refused(folder, "is truncated or no safetensors file")


def test_folder_without_any_config_is_refused(folder):
    (folder / OWN).unlink()
    (folder / CONFIG).unlink()
    refused(folder, "adapter_config.json: is missing or not a PEFT config")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\x00"])
def test_broken_config_of_peft_is_refused(folder, text):
    (folder / OWN).unlink()
    (folder / CONFIG).write_text(text)
    refused(folder, "adapter_config.json: is missing or not a PEFT config")


def test_a_field_of_peft_that_is_missing_is_named(folder):
    (folder / OWN).unlink()
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    refused(folder, "adapter_config.json: r: is not what PEFT writes there; it is missing")


@pytest.mark.parametrize(
    "text",
    [
        "adapter: [",
        "",
        "- 1",
        "adapter:",
        "adapter: {method: lroa}",
        "adapter: {method: lora, rnak: 2}",
        "\x00",
    ],
)
def test_broken_spec_of_ours_is_refused(folder, text):
    (folder / OWN).write_text(text)
    refused(folder, "lora_lab.yaml: cannot be read as the spec of a method")


def test_unknown_method_of_peft_is_refused_with_the_known_ones(folder):
    (folder / OWN).unlink()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"peft_type": "LORAA"}))
    refused(folder, "no method here is PEFT's 'LORAA'; did you mean 'LORA'", IncompatibleError)
    (folder / CONFIG).write_text(json.dumps(config | {"peft_type": None}))
    refused(folder, "peft_type: is empty: the method is not PEFT's", IncompatibleError)


def test_folder_of_another_architecture_is_refused(folder):
    refused(folder, "llama has no 'classifier'|no module 'classifier'", TargetError, tiny_llama)


def test_folder_of_another_size_is_refused(folder):
    message = r"of shape \(\d+, 30\), not \(\d+, 36\).*It belongs to another model"
    refused(folder, message, model=lambda: tiny_bert(hidden_size=36))


def test_folder_with_more_layers_is_refused(tmp_path):
    save_adapter(inject(tiny_bert(num_hidden_layers=3), LoRASpec(rank=4)), tmp_path / "adapter")
    refused(tmp_path / "adapter", "which this model does not")


def test_missing_and_surplus_tensors_are_refused(folder):
    name = next(name for name in load_file(folder / TENSORS) if "lora_A" in name)
    rewrite(folder, **{name: None})
    refused(folder, f"has no '{name}'")
    rewrite(folder, **{name: torch.zeros(4, 30), "base_model.model.other.weight": torch.zeros(2)})
    refused(folder, "has 'base_model.model.other.weight', which this model does not")


def test_integers_in_place_of_numbers_are_refused(folder):
    name = next(name for name in load_file(folder / TENSORS) if "lora_A" in name)
    rewrite(folder, **{name: torch.zeros(4, 30, dtype=torch.int64)})
    refused(folder, r"of type torch.int64, not torch.float32")


def test_model_that_holds_adapters_is_refused(folder):
    model = tiny_bert()
    load_adapter(model, folder)
    with pytest.raises(IncompatibleError, match="holds adapters already"):
        load_adapter(model, folder)
