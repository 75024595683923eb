"""What adapters in a weight's singular basis share: the basis, in checkpoints and folders."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.salt import SALTSpec
from lora_lab.adapters.storage import TENSORS, load_adapter, save_adapter
from lora_lab.errors import CheckpointError, IncompatibleError
from tests.adapters.tiny import linear, logits, shake, tiny_bert


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
        load_adapter(tiny_bert(seed=1), tmp_path / "adapter")
    other_signs(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="basis_probe: the singular basis of this base differs"):
        load_adapter(tiny_bert(), tmp_path / "adapter")


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
