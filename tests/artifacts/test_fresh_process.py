"""Every method's folder in a process of its own: load, merge, export, open in PEFT."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.artifacts import export, merge
from lora_lab.models.conversion import save_model
from lora_lab.models.tiny import character_tokenizer
from tests.adapters.test_storage import OPTIONS
from tests.adapters.tiny import logits, relative, shake, tiny_llama
from tests.forks import fork

LINEAR = [name for name in METHODS if name not in ("reft", "head", "full")]


def opened(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def check(place: Path, dtype: torch.dtype) -> None:
    """Writes the relative errors of every method, in the other process.

    What was loaded is compared with the outputs in `dtype`, merged and exported weights with the exact ones.
    """
    found = {}
    for path in sorted((place / "adapters").iterdir()):
        name = path.name
        own, exact = torch.load(place / f"{name}.pt", weights_only=True)
        model = opened(place / "base", dtype)
        adapters = load_adapter(model, path)
        errors = {"load": relative(logits(model), own)}
        if METHODS[name].mergeable:
            merge(path, place / "merged" / name, dtype=str(dtype).removeprefix("torch."))
            errors["merge"] = relative(logits(opened(place / "merged" / name)), exact)
            errors["maps"] = len(adapters)
        if name in LINEAR:
            errors["stated"] = max(export(path, place / "lora" / name).errors.values())
            theirs = peft.AutoPeftModelForCausalLM.from_pretrained(place / "lora" / name, dtype=torch.float32)
            errors["peft"] = relative(logits(theirs), exact)
        found[name] = errors
    (place / "errors.json").write_text(json.dumps(found))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def errors(request, tmp_path_factory):
    place, dtype = tmp_path_factory.mktemp("fresh"), getattr(torch, request.param)
    base = tiny_llama().to(dtype)
    save_model(base, place / "base")
    character_tokenizer(base.config).save_pretrained(place / "base")
    for name in METHODS:
        if name == "head":  # a language model has none to train
            continue
        model = opened(place / "base", dtype)
        spec = METHODS[name].Spec(**OPTIONS.get(name, {}))
        if name == "road":
            spec.group_size = 6
        adapters = inject(model, spec)
        shake(adapters)
        save_adapter(adapters, place / "adapters" / name, str(place / "base"), "CAUSAL_LM")
        own = logits(model)
        torch.save((own, logits(model.double()).float()), place / f"{name}.pt")
    code, printed = fork(check, place, dtype, folder=place).end()
    assert code == 0, printed
    return request.param, json.loads((place / "errors.json").read_text())


@pytest.mark.slow
def test_it_loads_merges_and_opens_in_peft(errors):
    dtype, errors = errors
    assert errors.keys() == METHODS.keys() - {"head"}
    for name, found in errors.items():
        # ReFT's R is made orthonormal once more; all others come back bit for bit.
        assert found["load"] <= (1e-6 if name == "reft" else 0), name
        # In bfloat16, each merged map is wrong by at most half a unit of the last place.
        bound = 1e-5 if dtype == "float32" else 2**-8 * found.get("maps", 0)
        assert found.get("merge", 0) < bound or "merge" not in found, name
        assert found.get("stated", 0) < 1e-5, name
        assert found.get("peft", 0) < 1e-5 + found.get("stated", 0), name
