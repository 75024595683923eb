"""What counts as trained learns, or the training stops with its name."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import MambaConfig, MambaForCausalLM, MarianConfig, MarianMTModel

from lora_lab import METHODS, inject
from lora_lab.adapters.liveness import PATIENCE
from lora_lab.errors import ConfigError, TargetError
from lora_lab.training.module import FineTuner
from tests.adapters.tiny import relative, shake

LoRA = METHODS["lora"].Spec


def mamba():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=41, hidden_size=16, state_size=3, num_hidden_layers=2, time_step_rank=5)
    return MambaForCausalLM(config)


def marian():
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=41,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=16,
        pad_token_id=0,
        decoder_start_token_id=0,
        dropout=0.0,
    )
    return MarianMTModel(config)


def train(model, adapters, batch, steps):
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=1e-2, weight_decay=0.0)
    before = {name: tensor.detach().clone() for name, tensor in adapters.named_parameters().items()}
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return {name for name, p in adapters.named_parameters().items() if torch.equal(p, before[name])}


def ids(seed=0):
    return torch.randint(3, 41, (3, 7), generator=torch.Generator().manual_seed(seed))


def test_weights_that_a_model_reads_without_calling_the_module_are_the_adapted_ones():
    """Mamba multiplies by dt_proj's weight; torch's call would never see the adapter."""
    model = mamba()
    adapters = inject(model, LoRA(rank=3, targets="all-linear"))
    assert any(path.endswith("dt_proj") for path in adapters.adapters)
    batch = {"input_ids": ids(), "labels": ids()}
    assert not train(model, adapters, batch, steps=2)
    shake(adapters)
    model.eval()
    with torch.no_grad():
        expected = model(ids()).logits
        with adapters.merged():
            assert relative(model(ids()).logits, expected) < 1e-5
        adapters.remove()
        assert relative(model(ids()).logits, expected) > 1e-3


@pytest.mark.parametrize("method", ["lora", "oft", "ia3"])
def test_a_lent_weight_is_that_of_the_merged_map(method):
    options = {"oft": {"oft_block_size": 4}}.get(method, {})
    model = nn.Sequential(nn.Linear(8, 12))
    adapters = inject(model, METHODS[method].Spec(targets=["0"], **options))
    shake(adapters)
    (adapter,) = adapters
    adapter.weight.sum().backward()
    assert all(p.grad is not None for p in adapters.trainable_parameters())
    merged = adapter.merged_module()
    assert relative(adapter.weight, merged.weight) < 1e-6
    assert relative(adapter.bias, merged.bias) < 1e-6


def test_an_adapter_that_the_model_passes_by_stops_the_first_step():
    model = marian()
    adapters = inject(model, LoRA(rank=3, targets="all"))
    batch = {"input_ids": ids(), "labels": ids(1)}
    with pytest.raises(TargetError, match=r"model\.shared learned nothing in the first optimizer step"):
        train(model, adapters, batch, steps=1)
    adapters.remove()
    adapters = inject(model, LoRA(rank=3, targets="all", exclude=["shared"]))
    assert not any("shared" in path for path in adapters.adapters)
    assert not train(model, adapters, batch, steps=PATIENCE + 2)


class Odd(nn.Module):
    """Parts that are used, that are never used, used at times, and used where no gradient comes."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(6, 6)
        self.unused = nn.ModuleDict({"only": nn.Linear(6, 6)})
        self.blind = nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(3))

    def forward(self, x, labels=None, expert=0, ignore=False):
        x = self.used(x) + 0 * self.blind(x)
        return type(
            "Output", (), {"loss": (0.0 if ignore else 1.0) * self.experts[expert](x).square().mean()}
        )


def test_parts_that_no_gradient_reaches_stop_when_chance_is_no_reason_any_more():
    model = Odd()
    adapters = inject(model, LoRA(rank=2, targets="all-linear"))
    batch = {"x": torch.randn(4, 6)}
    with pytest.raises(TargetError, match="blind learned nothing in 10 optimizer steps"):
        train(model, adapters, batch, PATIENCE)
    adapters.remove()
    adapters = inject(model, LoRA(rank=2, targets="all-linear", exclude=["unused", "blind"]))
    with pytest.warns(UserWarning, match=r"experts\.1\.0, experts\.2\.0.*experts that no token chose"):
        train(model, adapters, batch, PATIENCE)


def test_a_step_without_any_gradient_judges_nobody():
    model = Odd()
    adapters = inject(model, LoRA(rank=2, targets=["used", "experts.0.0"]))
    train(model, adapters, {"x": torch.randn(4, 6), "ignore": True}, PATIENCE - 1)
    assert not train(model, adapters, {"x": torch.randn(4, 6)}, 3)


@pytest.mark.parametrize(
    ("targets", "message"),
    [("all-linear", r"unused\.0 learned nothing"), (["unused.0"], r"no gradient for unused\.0: either it")],
)
def test_a_run_of_one_step_stops_as_well(targets, message):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 1), nn.Sequential(nn.Linear(6, 1))

        def forward(self, x):
            return type("Output", (), {"logits": self.used(x)})

    model = Branches()
    adapters = inject(model, LoRA(rank=1, targets=targets))
    data = DataLoader([{"x": torch.randn(6), "labels": torch.randn(())} for _ in range(4)], batch_size=4)
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(TargetError, match=message):
        trainer.fit(FineTuner(model, adapters, "regression"), data)


@pytest.mark.parametrize("intervention", ["direft", "nodireft"])
def test_reft_refuses_a_start_from_which_nothing_learns(intervention):
    spec = METHODS["reft"].Spec(intervention=intervention, init="identity", act_fn="relu")
    assert any("nothing would learn" in fault for fault in spec.faults())
    with pytest.raises(ConfigError, match="relu has no gradient"):
        inject(nn.Sequential(nn.Linear(4, 4)), spec)


@pytest.mark.parametrize("exclude", [["nothing"], ["used", "experts", "unused", "blind"]])
def test_exclude_that_names_nothing_or_all_is_refused(exclude):
    with pytest.raises(TargetError, match=r"adapter\.exclude"):
        inject(Odd(), LoRA(rank=2, targets="all-linear", exclude=exclude))
