"""What adapters in a weight's singular basis share: the basis, in checkpoints and folders."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.antipasto import AntiPaSTOSpec
from lora_lab.adapters.methods.edora import EDoRASpec
from lora_lab.adapters.methods.psoft import PSOFTSpec
from lora_lab.adapters.methods.salt import SALTSpec
from lora_lab.adapters.methods.ssvd import SSVDSpec
from lora_lab.adapters.storage import TENSORS, load_adapter, save_adapter
from lora_lab.errors import CheckpointError, IncompatibleError
from tests.adapters.tiny import linear, logits, relative, shake, tiny_bert

BASES = [
    SALTSpec(rank=3, r_lora=2),
    EDoRASpec(rank=4),
    SSVDSpec(),
    PSOFTSpec(rank=4),
    AntiPaSTOSpec(rank=4),
]
"""One of each kind of method in a singular basis."""


def other_signs(adapters):
    """Turns singular pairs around, and what was learned with them stays: another library's basis."""
    for adapter in adapters:
        sign = torch.ones(len(adapter.S)).index_fill(0, torch.arange(0, len(adapter.S), 2), -1)
        adapter.U.mul_(sign)
        adapter.Vh.mul_(sign.unsqueeze(1))


def test_the_basis_is_a_persistent_buffer_and_wins_over_a_fresh_one():
    model = tiny_bert()
    adapters = inject(model, SALTSpec(rank=3, r_lora=2))
    other_signs(adapters)
    shake(adapters)
    again = tiny_bert()
    fresh = inject(again, SALTSpec(rank=3, r_lora=2))
    fresh.load_state_dict(adapters.state_dict())
    assert torch.equal(logits(again), logits(model))
    assert sum(name.endswith((".U", ".S", ".Vh")) for name in adapters.state_dict()) == 3 * len(adapters)


def test_a_folder_with_the_basis_needs_no_equal_basis(tmp_path):
    model = tiny_bert()
    adapters = inject(model, SALTSpec(rank=3, r_lora=2))
    other_signs(adapters)
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    fresh = tiny_bert()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))


def test_a_folder_without_the_basis_is_small_and_refuses_another_one(tmp_path):
    model = tiny_bert()
    adapters = inject(model, SALTSpec(rank=3, r_lora=2, save_basis=False))
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    file = load_file(tmp_path / "adapter" / TENSORS)
    assert {name.rpartition(".")[2] for name in file if "salt_" in name} == {
        "salt_alpha",
        "salt_beta",
        "salt_X",
        "salt_Y",
        "salt_basis_S",
        "salt_basis_probe",
    }
    fresh = tiny_bert()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(CheckpointError, match="singular basis of this base differs.*save_basis: true"):
        load_adapter(tiny_bert(seed=1), tmp_path / "adapter", any_base=True)


def other_directions(adapters):
    """Swaps two singular pairs, and their values: the same W, made up of its parts in another order."""
    for adapter in adapters:
        swapped = torch.tensor([1, 0, *range(2, len(adapter.S))])
        adapter.U.copy_(adapter.U[:, swapped])
        adapter.S.copy_(adapter.S[swapped])
        adapter.Vh.copy_(adapter.Vh[swapped])


@pytest.mark.parametrize("spec", BASES, ids=lambda spec: spec.method)
@torch.no_grad()
def test_a_folder_without_the_basis_brings_its_signs_and_refuses_other_directions(spec, tmp_path):
    model = tiny_bert()
    adapters = inject(model, replace(spec, save_basis=False))
    other_signs(adapters)
    for adapter in adapters:
        adapter.tensors_changed()  # EDoRA's norms are made of the basis
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    fresh = tiny_bert()
    load_adapter(fresh, tmp_path / "adapter")
    assert relative(logits(fresh), logits(model)) < 2e-6
    other_directions(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=f"{spec.method}: .* basis of this base differs"):
        load_adapter(tiny_bert(), tmp_path / "adapter")


def test_folders_of_before_with_the_rows_of_the_probe_apart_still_open(tmp_path):
    model = tiny_bert()
    adapters = inject(model, PSOFTSpec(rank=4, save_basis=False))
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    file, before = load_file(tmp_path / "adapter" / TENSORS), {}
    for name, tensor in file.items():
        if name.endswith("psoft_basis_probe"):
            start = name.removesuffix("basis_probe")
            before |= {f"{start}probe_U": tensor[0].clone(), f"{start}probe_Vh": tensor[1].clone()}
        else:
            before[name] = tensor
    assert len(before) == len(file) + len(adapters)
    save_file(before, tmp_path / "adapter" / TENSORS)
    fresh = tiny_bert()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))


def test_a_weight_that_is_not_finite_is_refused():
    model = linear()
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(IncompatibleError, match="salt: the base's weight has numbers that are not finite"):
        inject(model, SALTSpec(targets=["0"], modules_to_save=[]))
    assert type(model[0]) is nn.Linear


def test_the_basis_of_a_half_precision_base_is_float32():
    adapters = inject(linear(dtype=torch.bfloat16), SALTSpec(targets=["0"], modules_to_save=[]))
    adapter = next(iter(adapters))
    assert {buffer.dtype for name, buffer in adapter.named_buffers() if "base" not in name} == {torch.float32}
    torch.testing.assert_close(adapter.U.T @ adapter.U, torch.eye(16), atol=1e-5, rtol=0)
