"""Files of sd-scripts and LyCORIS: against ΔW by the formulas of their own sources, and against PEFT."""

import warnings

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.artifacts.importing import place_file
from lora_lab.cli import main
from lora_lab.errors import LabError
from lora_lab.models.build import ModelConfig, build_model
from lora_lab.models.conversion import save_model
from tests.adapters.tiny import logits, relative, tiny_llama

generator = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(shape, generator=generator) / 2


def lora(out, columns, rank=3, alpha=2.0):
    tensors = {"lora_up.weight": drawn(out, rank), "lora_down.weight": drawn(rank, columns)}
    if alpha is None:
        return tensors, tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    delta = alpha / rank * tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    return tensors | {"alpha": torch.tensor(alpha)}, delta


def loha(out, columns, rank=3, alpha=2.0):
    a, b, c, d = drawn(out, rank), drawn(rank, columns), drawn(out, rank), drawn(rank, columns)
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(alpha)}
    return tensors, alpha / rank * (a @ b) * (c @ d)


def lokr(first, second, rank=2, alpha=3.0, both=False):
    (rows, p), (k, q) = first, second
    tensors = {"alpha": torch.tensor(alpha)}
    W1, W2, scale = drawn(rows, p), drawn(k, q), 1.0
    if rank is None:  # both whole: alpha does not count
        return tensors | {"lokr_w1": W1, "lokr_w2": W2}, torch.kron(W1, W2)
    scale = alpha / rank
    tensors |= {"lokr_w2_a": drawn(k, rank), "lokr_w2_b": drawn(rank, q)}
    if both:
        tensors |= {"lokr_w1_a": drawn(rows, rank), "lokr_w1_b": drawn(rank, p)}
        W1 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    else:
        tensors["lokr_w1"] = W1
    return tensors, scale * torch.kron(W1, tensors["lokr_w2_a"] @ tensors["lokr_w2_b"])


QUERY, VALUE, DOWN = (
    "model.layers.0.self_attn.q_proj",  # 30 × 35
    "model.layers.1.self_attn.v_proj",  # 6 × 35
    "model.layers.0.mlp.down_proj",  # 35 × 53
)
FILES = {
    "lora": {QUERY: lora(30, 35), VALUE: lora(6, 35, 4, 5.5), DOWN: lora(35, 53, 2, None)},
    "loha": {QUERY: loha(30, 35), VALUE: loha(6, 35, 2, 0.5)},
    # Divisors up to the root: 30 = 5 · 6, 35 = 5 · 7, 6 = 2 · 3, and 53 is prime.
    "lokr": {QUERY: lokr((5, 5), (6, 7)), VALUE: lokr((2, 5), (3, 7), None), DOWN: lokr((5, 1), (7, 53), 4)},
    "lokr of a factor": {QUERY: lokr((3, 1), (10, 35)), VALUE: lokr((3, 1), (2, 35), 3)},
    "lokr of both": {QUERY: lokr((5, 5), (6, 7), 2, both=True), VALUE: lokr((2, 5), (3, 7), 2, 1.0, True)},
}


def written(path, modules, prefix="lora_te", inner=""):
    save_file(
        {
            f"{prefix}_{place.removeprefix(inner).replace('.', '_')}.{name}": tensor.contiguous()
            for place, (tensors, _) in modules.items()
            for name, tensor in tensors.items()
        },
        path,
    )
    return path


@pytest.mark.parametrize("kind", FILES)
def test_a_file_becomes_a_folder_of_the_same_updates(kind, tmp_path):
    modules = FILES[kind]
    file = written(tmp_path / "file.safetensors", modules, inner="model." if kind == "loha" else "")
    model = tiny_llama()
    adapters = place_file(model, file)
    assert adapters.spec.method == kind.split()[0]
    save_adapter(adapters, tmp_path / "adapter", "base", "CAUSAL_LM")
    fresh = tiny_llama()
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert loaded.adapters.keys() == modules.keys()
    expected = tiny_llama()
    for path, (_, delta) in modules.items():
        assert relative(loaded.adapters[path].delta_weight(), delta) < 1e-6, path
        expected.get_submodule(path).weight.data += delta
    assert relative(logits(fresh), logits(expected)) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert relative(logits(opened), logits(expected)) < 1e-5


def test_convolutions_keep_their_kernel(tmp_path):
    up, down, small, core = drawn(5, 2, 1, 1), drawn(2, 4, 3, 3), drawn(2, 4, 1, 1), drawn(2, 2, 3, 3)
    # LyCORIS' tucker_weight_from_conv
    tucker = torch.einsum("mnxy,im,nj->ijxy", core, up.flatten(1), small.flatten(1))
    mid = {"lora_up.weight": up, "lora_mid.weight": core, "lora_down.weight": small}
    t1, t2 = drawn(2, 2, 3, 3), drawn(2, 2, 3, 3)
    a, b, c, d = drawn(2, 5), drawn(2, 4), drawn(2, 5), drawn(2, 4)
    first = torch.einsum("ij...,jr,ip->pr...", t1, b, a)  # LyCORIS' rebuild_tucker
    second = torch.einsum("ij...,jr,ip->pr...", t2, d, c)
    cores = {"hada_t1": t1, "hada_t2": t2, "hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    low_rank = torch.einsum("ok,kcxy->ocxy", up[..., 0, 0], down)
    W1, W2 = drawn(1, 2), drawn(5, 2, 3, 3)
    for name, tensors, delta in (
        ("lora", {"lora_up.weight": up, "lora_down.weight": down}, low_rank),
        ("lora with a core", mid | {"alpha": torch.tensor(5.0)}, 2.5 * tucker),
        ("loha", cores, first * second),
        ("lokr", {"lokr_w1": W1, "lokr_w2": W2}, torch.kron(W1[..., None, None], W2)),
    ):
        model = nn.ModuleDict({"conv": nn.Conv2d(4, 5, 3)})
        file = written(tmp_path / f"{name}.safetensors", {"conv": (tensors, None)}, "lycoris")
        (adapter,) = place_file(model, file)
        assert relative(adapter.delta_weight(), delta.flatten(1)) < 1e-6, name


def decomposed(weight, delta, scale):
    """W' of DoRA in float64, as `apply_weight_decompose` of LyCORIS computes it."""
    moved = weight.double() + delta.double()
    sums = (0, *range(2, weight.ndim)) if len(scale) == 1 else (*range(1, weight.ndim),)
    return moved / moved.square().sum(sums, keepdim=True).sqrt() * scale.double()


@pytest.mark.parametrize("axis", ["out", "in"])
def test_magnitudes_of_outputs_or_inputs_are_dora(axis, tmp_path):
    modules, expected, model = {}, tiny_llama(), tiny_llama()
    for path, (rows, columns) in {QUERY: (30, 35), DOWN: (35, 53)}.items():
        tensors, delta = lora(rows, columns)
        scale = 1 + drawn(rows, 1) if axis == "out" else 1 + drawn(1, columns)
        modules[path] = (tensors | {"dora_scale": scale}, None)
        weight = expected.get_submodule(path).weight.data
        weight.copy_(decomposed(weight, delta, scale))
    adapters = place_file(model, written(tmp_path / "file.safetensors", modules))
    assert adapters.spec.method == "dora"
    assert relative(logits(model), logits(expected)) < 1e-5
    save_adapter(adapters, tmp_path / "adapter", "base", "CAUSAL_LM")
    fresh = tiny_llama()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))
    if axis == "out":  # PEFT has no other
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
        assert relative(logits(theirs), logits(expected)) < 1e-5


def test_a_convolution_with_a_core_and_magnitudes_is_dora(tmp_path):
    conv = nn.Conv2d(4, 5, 3)
    up, small, core, scale = drawn(5, 2, 1, 1), drawn(2, 4, 1, 1), drawn(2, 2, 3, 3), 1 + drawn(5, 1, 1, 1)
    tensors = {"lora_up.weight": up, "lora_mid.weight": core, "lora_down.weight": small, "dora_scale": scale}
    delta = torch.einsum("mnxy,im,nj->ijxy", core, up.flatten(1), small.flatten(1))
    file = written(tmp_path / "file.safetensors", {"conv": (tensors, None)}, "lycoris")
    model, x = nn.ModuleDict({"conv": conv}), torch.randn(2, 4, 6, 6)
    expected = nn.functional.conv2d(x.double(), decomposed(conv.weight, delta, scale), conv.bias.double())
    place_file(model, file)
    assert relative(model["conv"](x), expected) < 1e-6
    tensors["dora_scale"] = drawn(1, 4, 1, 1)
    with pytest.raises(LabError, match="a magnitude for each input of a convolution"):
        place_file(
            nn.ModuleDict({"conv": conv}),
            written(tmp_path / "in.safetensors", {"conv": (tensors, None)}, "lycoris"),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_factors_of_outputs_and_inputs_are_ia3(dtype, tmp_path):
    up = "model.layers.1.mlp.up_proj"  # 53 × 35, without a bias; q_proj has one
    modules, expected, model = {}, tiny_llama(), tiny_llama()
    for path, size, at_input in ((up, 53, 0), (QUERY, 35, 1), (DOWN, 53, 1)):
        factor = drawn(size).to(dtype)
        modules[path] = ({"weight": factor, "on_input": torch.tensor(at_input)}, None)
        weight = expected.get_submodule(path).weight.data
        whole = 1 + factor.double()
        weight.copy_(weight.double() * (whole if at_input else whole[:, None]))
    adapters = place_file(model, written(tmp_path / "file.safetensors", modules))
    assert adapters.spec.method == "ia3"
    assert relative(logits(model), logits(expected)) < 1e-5
    save_adapter(adapters, tmp_path / "adapter", "base", "CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert relative(logits(theirs), logits(expected)) < 1e-5
    fresh = tiny_llama()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))
    biased = {QUERY: ({"weight": drawn(30), "on_input": torch.tensor(0)}, None)}
    with pytest.raises(LabError, match="q_proj has a bias, and IA3 scales it"):
        place_file(tiny_llama(), written(tmp_path / "biased.safetensors", biased))
    pointwise = {"conv": ({"weight": drawn(1, 5, 1, 1), "on_input": torch.tensor(0)}, None)}
    with pytest.raises(LabError, match="a Conv2d, which ia3 cannot edit here"):
        place_file(
            nn.ModuleDict({"conv": nn.Conv2d(4, 5, 1)}), written(tmp_path / "conv.safetensors", pointwise)
        )


def test_the_command_writes_a_folder_that_other_commands_open(tmp_path, capsys):
    torch.manual_seed(0)
    base = build_model(ModelConfig(name="random:llama", task="causal_lm"))
    save_model(base, tmp_path / "base")
    path = "model.layers.0.mlp.up_proj"
    tensors, delta = lora(*base.get_submodule(path).weight.shape)
    modules = {path: (tensors, delta)}
    file = written(tmp_path / "file.safetensors", modules)
    words = ["import", str(file), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "adapter")]
    assert main(words) == 0
    assert path in capsys.readouterr().out.replace("\n", "")
    assert main(["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "lora")]) == 0
    loaded = load_adapter(base, tmp_path / "lora")
    assert relative(loaded.adapters[path].delta_weight(), delta) < 1e-5
    assert loaded.lineage["made"]["by"] == "export"
    assert main([*words, "--prefix", "lora_unet"]) == 2
    assert "nothing in" in capsys.readouterr().err


def renamed(changes, modules=FILES["lora"]):
    """A file's tensors with some more."""
    flat = {
        f"lora_te_{path.replace('.', '_')}.{name}": tensor
        for path, (tensors, _) in modules.items()
        for name, tensor in tensors.items()
    }
    return flat | {key: torch.ones(shape) for key, shape in changes.items()}


FLAT, OTHER = (f"lora_te_{path.replace('.', '_')}" for path in (QUERY, VALUE))
TWO = {QUERY: lora(30, 35), VALUE: lora(6, 35)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (renamed({f"{FLAT}.diff": (30, 35)}), "diff is not read here"),
        (renamed({f"{FLAT}.dora_scale": (1, 35)}), "mixes dora, lora"),
        (renamed({f"{FLAT}.dora_scale": (35, 1)}, {QUERY: lora(30, 35)}), r"dora_scale of .* is \(35, 1\)"),
        (
            renamed({f"{FLAT}.dora_scale": (30, 1)}, {QUERY: loha(30, 35)}),
            "dora_scale, hada_w1_a, .* no method",
        ),
        (
            renamed({f"{FLAT}.dora_scale": (30, 1), f"{OTHER}.dora_scale": (1, 35)}, TWO),
            "outputs at .*q_proj and of inputs at .*v_proj",
        ),
        (renamed({f"{FLAT}.lora_mid.weight": (3, 3)}), "no core of lora_down"),
        (renamed({f"{FLAT}.on_input": ()}), "has lora_down.weight, lora_up.weight, on_input, which"),
        (renamed({f"{FLAT}.weight": (30,)}, {}), "no on_input of"),
        (renamed({f"{FLAT}.weight": (30,), f"{FLAT}.on_input": (), f"{FLAT}.alpha": ()}, {}), "IA3 has none"),
        (renamed({f"{FLAT}.weight": (31,), f"{FLAT}.on_input": ()}, {}), "shape"),
        (renamed({"lora_unet_x.lora_up.weight": (2, 2)}), "several models.*lora_te or lora_unet"),
        (renamed({"model.x.lora_A.weight": (2, 2)}), "no known prefix"),
        (renamed({"lora_te_other.lora_up.weight": (2, 2)}), "has no lora_down.weight of other"),
        (renamed({"lora_te_other.alpha": ()}), "an alpha of other"),
        (renamed({f"{FLAT}.hada_w1_a": (30, 3)}), "hada_w1_a, lora_down.weight"),
        (renamed({f"{OTHER}.hada_w1_a": (6, 2)}, {QUERY: lora(30, 35)}), "mixes loha, lora"),
        (
            renamed({f"lora_te_x.{name}.weight": (2, 2) for name in ("lora_up", "lora_down")}),
            "no such module",
        ),
        (renamed({f"lora_te_lm_head.{name}.weight": (2, 2) for name in ("lora_up", "lora_down")}), "shape"),
        (renamed({f"{FLAT}.lora_down.weight": (0, 35)}), "are empty"),
        (renamed({f"{FLAT}.lokr_w1": (4, 5)}, {QUERY: lokr((5, 5), (6, 7))}), "no decompose_factor"),
    ],
)
def test_what_would_be_another_adapter_is_refused_by_name(tensors, message, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "file.safetensors")
    model = tiny_llama()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(LabError, match=message):
        place_file(model, tmp_path / "file.safetensors")
    assert [name for name, _ in model.named_modules()] == before


def test_the_same_flattened_name_of_two_modules_is_refused(tmp_path):
    model = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    written(tmp_path / "file.safetensors", {"a.b": lora(2, 2, 1)})
    with pytest.raises(LabError, match=r"a_b may be a\.b or a_b"):
        place_file(model, tmp_path / "file.safetensors")
