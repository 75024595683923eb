"""An adapter folder knows its base, and does not go onto another one unseen."""

import pytest
import torch
import yaml

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.lineage import fingerprint, same_base
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.storage import OWN, load_adapter, save_adapter, stored_lineage
from lora_lab.errors import CheckpointError
from lora_lab.models.quantization import QuantizationOptions, quantize
from tests.adapters.test_storage import OPTIONS
from tests.adapters.tiny import mixtral, shake, tiny_bert, tiny_llama

SPEC = LoRASpec(rank=2, modules_to_save=[])


@pytest.mark.parametrize("name", ["lora", "full", "bitfit", "vera", "reft", "ia3", "head"])
def test_the_fingerprint_is_of_the_base_whatever_stands_in_it(name):
    model = tiny_bert()
    expected = fingerprint(model)
    adapters = inject(model, METHODS[name].Spec(**OPTIONS.get(name, {})))
    shake(adapters)
    assert fingerprint(model, adapters._all, adapters.saved) == fingerprint(tiny_bert(), (), adapters.saved)
    adapters.remove()
    assert fingerprint(model) == expected


def test_casts_and_codes_keep_a_base_and_other_weights_do_not():
    base = {"dtype": "float32", "weights": fingerprint(tiny_llama())}
    narrow = {"dtype": "bfloat16", "weights": fingerprint(tiny_llama().bfloat16())}
    assert narrow["weights"] == base["weights"]
    codes = quantize(tiny_llama(), "nf4", QuantizationOptions())
    quantised = {"dtype": "float32", "weights": fingerprint(codes)}
    assert same_base(base, quantised)
    assert same_base(quantised, base)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"):
        changed = tiny_llama()
        with torch.no_grad():
            changed.get_parameter(name)[-1] += 0.1
        assert not same_base(base, {"dtype": "float32", "weights": fingerprint(changed)}), name
    heads = tiny_bert()
    torch.nn.init.normal_(heads.classifier.weight)
    assert fingerprint(heads) == fingerprint(tiny_bert())
    assert fingerprint(mixtral()) != fingerprint(tiny_llama())


def test_another_base_is_refused_by_name_and_allowed_on_the_record(tmp_path):
    adapters = inject(tiny_llama(), SPEC)
    shake(adapters)
    save_adapter(adapters, tmp_path / "one", "owner/base", lineage={"data": "d1", "config": "c1"})
    found = stored_lineage(tmp_path / "one")
    assert found["base"]["name"] == "owner/base"
    assert (found["data"], found["config"]) == ("d1", "c1")
    assert found["versions"]["torch"] == torch.__version__

    other = tiny_llama(seed=1)
    with pytest.raises(CheckpointError, match=r"was trained on owner/base .*this model is LlamaForCausalLM"):
        load_adapter(other, tmp_path / "one")
    loaded = load_adapter(other, tmp_path / "one", any_base=True)
    save_adapter(loaded, tmp_path / "two")
    again = stored_lineage(tmp_path / "two")
    assert again["base"] == found["base"]
    assert again["loaded_onto"][0]["weights"] == fingerprint(tiny_llama(seed=1))
    load_adapter(tiny_llama(), tmp_path / "two")


def test_adapters_held_by_name_are_stored_with_their_base_alone(tmp_path):
    for name, targets in (("a", ["query"]), ("b", ["query", "up"])):
        save_adapter(inject(tiny_llama(), LoRASpec(rank=2, targets=targets)), tmp_path / name)
        (tmp_path / name / OWN).unlink()  # as PEFT's folders, which have no lineage
    model = tiny_llama()
    for name in "ab":
        named = load_adapter(model, tmp_path / name, name=name)
    named.use("b")
    for name in "ab":
        save_adapter(named[name], tmp_path / "again")
        assert stored_lineage(tmp_path / "again")["base"]["weights"] == fingerprint(tiny_llama()), name
        load_adapter(tiny_llama(), tmp_path / "again")


def test_folders_of_before_open_and_broken_lineages_do_not(tmp_path):
    save_adapter(inject(tiny_llama(), SPEC), tmp_path / "one")
    path = tmp_path / "one" / OWN
    own = yaml.safe_load(path.read_text())
    for lineage in ([1], {"base": [2]}, {"base": {"weights": {}}}, "x"):
        path.write_text(yaml.safe_dump(own | {"lineage": lineage}))
        with pytest.raises(CheckpointError, match="`lineage` must say"):
            load_adapter(tiny_llama(), tmp_path / "one")
    del own["lineage"]
    path.write_text(yaml.safe_dump(own))
    assert load_adapter(tiny_llama(seed=1), tmp_path / "one").lineage == {}
