"""LoftQ's start: the best update of its rank between codes and W, which is kept for no longer than that."""

import copy
from dataclasses import replace

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

from lora_lab import experiment
from lora_lab.adapters import inject
from lora_lab.adapters.families.starts import start
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.config import compose
from lora_lab.config.schema import ExperimentConfig
from lora_lab.data import FilesConfig
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.models.build import ModelConfig, build_model
from lora_lab.models.quantization import QuantizationOptions, QuantizedLinear
from lora_lab.tracking import TrackingConfig
from lora_lab.training.trainer import TrainerConfig


def loftq(base, rank, scale):
    return start(base, LoRASpec(rank=rank, alpha=rank * scale, init="loftq"))


def codes_of(rows=48, columns=80, kind="nf4", dtype=torch.float32, keep_weight=True):
    return QuantizedLinear(nn.Linear(columns, rows, dtype=dtype), kind, QuantizationOptions(), keep_weight)


@pytest.mark.parametrize("scale", [1.0, 4.0, 0.25, -2.0])
@pytest.mark.parametrize("rank", [1, 8, 48])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_codes_and_update_are_as_near_to_the_weight_as_the_rank_allows(kind, rank, scale):
    base = codes_of(kind=kind)
    A, B = loftq(base, rank, scale)
    assert A.shape == (rank, 80)
    assert B.shape == (48, rank)
    W, Q = base.full_weight, base.weight
    left = torch.linalg.svdvals(W.double() - Q.double())[rank:]  # Eckart and Young
    error = (W - Q - scale * B @ A).norm()
    torch.testing.assert_close(error.double(), left.square().sum().sqrt(), rtol=1e-4, atol=1e-5)
    assert error < (W - Q).norm()
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-4, atol=1e-6)  # halved between the two


def test_start_of_a_half_precision_base_is_float32():
    A, B = loftq(codes_of(dtype=torch.bfloat16), 4, 1.0)
    assert A.dtype == B.dtype == torch.float32


def test_a_base_without_its_weight_is_told_what_to_do():
    for base in (codes_of(keep_weight=False), nn.Linear(8, 8), copy.deepcopy(codes_of())):
        with pytest.raises(IncompatibleError, match=r"build_model\(config, keep_weights=True\)"):
            loftq(base, 2, 1.0)
    with pytest.raises(IncompatibleError, match=r"at most min\(in, out\) = 48"):
        loftq(codes_of(), 49, 1.0)


def test_a_run_keeps_the_weights_until_the_adapters_are_in_place(tmp_path, monkeypatch):
    kept = []

    def watched(model, spec, seed):
        maps = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        assert all(module.full_weight is not None for module in maps)
        kept.extend(maps)
        return inject(model, spec, seed)

    monkeypatch.setattr(experiment, "inject", watched)
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"text {n},{n % 2}\n" for n in range(40)))
    config = ExperimentConfig(
        output=str(tmp_path),
        model=ModelConfig(name="random:bert", quantization="nf4"),
        data=FilesConfig(train=str(tmp_path / "rows.csv"), text=["text"], label="label", batch_size=8),
        adapter=LoRASpec(rank=2, init="loftq"),
        trainer=TrainerConfig(max_epochs=1, progress_bar=False, accelerator="cpu"),
        tracking=TrackingConfig(wandb="disabled"),
    )
    assert experiment.run(config).record["status"] == "finished"
    assert kept
    assert all(module.full_weight is None for module in kept)
    model, _ = experiment.build_parts(config)
    assert all(getattr(module, "full_weight", None) is None for module in model.modules())


def test_a_config_with_nothing_to_make_up_for_is_refused(tmp_path):
    text = "{model: {name: 'random:bert'}, adapter: {method: lora, init: loftq}}"
    (tmp_path / "experiment.yaml").write_text(text)
    data = ["data.source=embedded", "data.name=movie_reviews"]
    with pytest.raises(ConfigError, match="model.quantization: is none, and this adapter's start corrects"):
        compose(tmp_path / "experiment.yaml", data)
    compose(tmp_path / "experiment.yaml", [*data, "model.quantization=nf4"])


@torch.no_grad()
def test_peft_opens_the_adapter_over_the_same_codes(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    torch.manual_seed(0)
    config = ModelConfig(name="random:bert", quantization="nf4", config=sizes)
    model = build_model(config, num_labels=3, keep_weights=True).eval()
    torch.manual_seed(0)
    theirs = build_model(ModelConfig(name="random:bert", config=sizes), num_labels=3).eval()
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            linear = theirs.get_submodule(path)
            made = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, quant_type="nf4", compute_dtype=torch.float32
            )
            made.load_state_dict(linear.state_dict())
            made.support_avx512bf16_for_cpu = False  # it would compute in bfloat16
            theirs.set_submodule(path, made.to("cpu"))
    theirs.is_loaded_in_4bit = True
    ids = torch.randint(5, 100, (2, 6))
    before = model(input_ids=ids).logits
    torch.testing.assert_close(theirs.eval()(input_ids=ids).logits, before, rtol=1e-5, atol=1e-6)
    adapters = inject(model, LoRASpec(rank=4, alpha=6.0, init="loftq"))
    save_adapter(adapters, tmp_path / "adapter", task_type="SEQ_CLS")
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert "Linear4bit" in str(type(opened.base_model.model.bert.encoder.layer[0].attention.self.query))
    expected = model(input_ids=ids).logits
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(opened(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_stored_adapter_opens_where_the_weights_are_gone(tmp_path, make_batch):
    config = ModelConfig(name="random:bert", quantization="nf4")
    torch.manual_seed(0)
    model = build_model(config, keep_weights=True).eval()
    torch.manual_seed(0)
    bare = build_model(config).eval()
    adapters = inject(model, LoRASpec(rank=4, init="loftq"))
    save_adapter(adapters, tmp_path / "adapter")
    again = load_adapter(bare, tmp_path / "adapter")
    assert again.spec == replace(adapters.spec, modules_to_save=["classifier"])
    batch = make_batch("bert")
    assert torch.equal(bare(**batch).logits, model(**batch).logits)
