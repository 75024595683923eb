"""The mixtures named after PEFT: against `add_weighted_adapter` itself."""

import math
import warnings
from typing import get_args

import peft
import pytest
import torch
from peft.tuners.lora import model as peft_lora
from torch import nn

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.artifacts.combining import combine
from lora_lab.artifacts.peft_mixtures import PeftMethod, peft_factors, peft_mixture
from lora_lab.cli import main
from lora_lab.errors import LabError
from lora_lab.models.conversion import save_model
from tests.adapters.tiny import logits, relative, shake, tiny_llama

NAMES = get_args(PeftMethod)
OTHERS = {"lora_bias": LoRASpec(rank=2, lora_bias=True), "pissa": METHODS["pissa"].Spec(rank=2)}
SEED = 11


class Odd(nn.Module):
    """An embedding, a convolution and two linear maps, whose names are not in the model's order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 6)
        self.z = nn.Linear(6, 9)
        self.conv = nn.Conv2d(3, 5, (3, 2))
        self.a = nn.Linear(9, 4, bias=False)


SPECS = [
    LoRASpec(rank=3, alpha=2.0, targets=["a", "conv", "z"], alpha_pattern={"z": -5.0}, modules_to_save=[]),
    LoRASpec(rank=3, alpha=7.0, targets=["a", "conv", "words"], modules_to_save=[]),
    LoRASpec(rank=3, alpha=1.0, init="gaussian", targets=["conv", "z", "words"], modules_to_save=[]),
]
WEIGHTS = [0.7, -1.3, 0.4]


def stored(folder, specs):
    """Writes an adapter for each spec; returns the folders and what PEFT mixes of each."""
    paths, found = [], []
    for number, spec in enumerate(specs):
        adapters = inject(Odd(), spec)
        shake(adapters, 0.5, seed=number)
        paths.append(folder / str(number))
        save_adapter(adapters, paths[-1])
        found.append(peft_factors(adapters, paths[-1]))
    return paths, found


def pefts(paths, method, density, monkeypatch, rank=None, model=None):
    """Mixes in PEFT; returns its model, with the mixture alone in use."""
    # PEFT draws the start of its new adapter first: the draws of dare start after it.
    monkeypatch.setattr(peft_lora, "_freeze_adapter", lambda *_: torch.manual_seed(SEED))
    names = [str(number) for number in range(len(paths))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(model or Odd(), paths[0], adapter_name="0")
        for name, path in zip(names[1:], paths[1:], strict=True):
            theirs.load_adapter(path, name)
        kind = method.removeprefix("peft_")
        theirs.base_model.add_weighted_adapter(
            names, WEIGHTS[: len(names)], "mixed", kind, svd_rank=rank, density=density
        )
    theirs.set_adapter("mixed")
    return theirs.eval()


def layers(theirs):
    modules = theirs.base_model.model.named_modules()
    return {path: module for path, module in modules if isinstance(module, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize("density", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("method", NAMES)
def test_mixtures_are_pefts(method, density, tmp_path, monkeypatch):
    if "dare" in method and not density:  # PEFT divides 0 by 0 there, and combine refuses it
        return
    paths, found = stored(tmp_path, SPECS)
    whole = method.endswith("_svd")
    theirs = layers(pefts(paths, method, density, monkeypatch, rank=4 if whole else None))
    order = [path for path, _ in Odd().named_modules() if path in theirs]
    ours = peft_mixture(found, order, WEIGHTS, method, None if method == "peft_linear" else density, SEED)
    assert [*ours] == ["words", "z", "conv", "a"]
    if "dare" in method and whole and density < 1:
        # PEFT lays out the update of an embedding the other way, so that its draws fall on other numbers.
        del theirs["words"]
    for path, layer in theirs.items():
        assert layer.scaling["mixed"] == 1
        A, B = (
            part["mixed"] if path == "words" else part["mixed"].weight
            for part in (
                (layer.lora_embedding_A, layer.lora_embedding_B)
                if path == "words"
                else (layer.lora_A, layer.lora_B)
            )
        )
        if whole:
            cut, _ = ours[path].truncated(4)
            assert torch.allclose(cut.matrix(), B.flatten(1) @ A.flatten(1), atol=1e-5), path
        else:
            assert torch.equal(ours[path].right, A.flatten(1)), path
            assert torch.equal(ours[path].left, B.flatten(1)), path
    if method != "peft_linear" and not density:
        assert not any(update.matrix().any() for update in ours.values())


def folders(place, *specs):
    base = place / "base"
    save_model(tiny_llama(), base)
    paths = []
    for number, spec in enumerate(specs):
        adapters = inject(tiny_llama(), spec)
        shake(adapters, 0.3, seed=number)
        paths.append(place / str(number))
        save_adapter(adapters, paths[-1], str(base), "CAUSAL_LM")
    return paths


@pytest.mark.parametrize("method", ["peft_ties", "peft_dare_ties_svd"])
def test_the_command_writes_what_peft_computes(method, tmp_path, monkeypatch):
    """Of ranks that differ between modules, which PEFT only mixes by SVD."""
    ranks = {"value": 2} if method == "peft_dare_ties_svd" else {}
    one = LoRASpec(rank=4, targets=["query", "value"], rank_pattern=ranks)
    paths = folders(tmp_path, one, LoRASpec(rank=4, alpha=3.0, targets=["value", "down"]))
    theirs = pefts(paths, method, 0.6, monkeypatch, 3, tiny_llama())
    words = ["combine", *map(str, paths), "--out", str(tmp_path / "mixed"), "--method", method]
    words += ["--weights", *map(str, WEIGHTS[:2]), "--density", "0.6", "--seed", str(SEED)]
    assert main([*words, *(["--rank", "3"] if ranks else [])]) == 0
    model = tiny_llama()
    load_adapter(model, tmp_path / "mixed")
    assert relative(logits(theirs), logits(tiny_llama())) > 0.01
    assert relative(logits(model), logits(theirs)) < 1e-5


def test_a_mixture_of_rank_stabilised_lora_has_its_own_scale(tmp_path, monkeypatch):
    """PEFT keeps use_rslora with alpha = rank, so that its mixture is √rank times too large."""
    specs = [LoRASpec(rank=4, rslora=True, targets=["z"], modules_to_save=[]) for _ in range(2)]
    paths, found = stored(tmp_path, specs)
    (theirs,) = layers(pefts(paths, "peft_linear", None, monkeypatch)).values()
    ours = peft_mixture(found, ["z"], WEIGHTS[:2], "peft_linear", None, 0)["z"]
    assert relative(ours.matrix(), theirs.get_delta_weight("mixed") / math.sqrt(4)) < 1e-6


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (OTHERS["lora_bias"], {}, r"with a bias \(lora_bias\), and the methods peft_… mix A and B"),
        (OTHERS["pissa"], {}, "is pissa, and .* export it as a LoRA first"),
        (LoRASpec(rank=2, rank_pattern={"value": 3}), {}, r"v_proj: the sources have ranks \[2, 3\]"),
        (LoRASpec(rank=2), {"rank": 1}, "--method peft_ties: keeps the factors"),
        (LoRASpec(rank=2), {"method": "peft_ties_svd"}, "needs --rank or --energy"),
        (LoRASpec(rank=2), {"method": "peft_linear"}, "peft_linear keeps them all"),
        (LoRASpec(rank=2), {"method": "peft_dare_linear", "density": 0.0}, "above 0 for dare"),
    ],
)
def test_what_peft_cannot_or_gets_wrong_is_refused(spec, options, message, tmp_path):
    paths = folders(tmp_path, LoRASpec(rank=2), spec)
    options = {"method": "peft_ties", "density": 0.5, **options}
    with pytest.raises(LabError, match=message):
        combine(paths, tmp_path / "mixed", **options)
    assert not (tmp_path / "mixed").exists()
