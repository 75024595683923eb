"""Adapters on a few odd architectures: alive, or refused with the module's name and the way out."""

import re

import pytest
import torch
from torch import nn

from lora_lab.adapters import LoRASpec, inject
from lora_lab.adapters.maps import is_linear
from lora_lab.bench.architectures import main, measure
from lora_lab.bench.tiny_architectures import tiny_model
from lora_lab.errors import TargetError

ALIVE = ["alive"] * 3


@pytest.mark.parametrize(
    ("task", "architecture", "outcomes", "refusal"),
    [
        # A fused projection, and latent attention with thin maps.
        ("causal_lm", "phi3", ALIVE, ""),
        ("causal_lm", "deepseek_v3", ALIVE, ""),
        # A router that is an nn.Linear by class but returns two tensors.
        ("causal_lm", "llama4_text", ALIVE, ""),
        # A decoder without its encoder: cross-attention is there and never called.
        ("causal_lm", "bart", ["alive", "refused", "refused"], "encoder_attn"),
        # A state-space model has no attention, and reads the weight of dt_proj past the module.
        ("causal_lm", "mamba", ["refused", "alive", "alive"], "has no 'query'"),
        # Images are not given, so that nothing behind them is reached.
        ("causal_lm", "got_ocr2", ["alive", "refused", "refused"], "vision_tower"),
        ("sequence_classification", "funnel", ALIVE, ""),
        ("sequence_to_sequence", "led", ["alive", "refused", "refused"], "_global"),
    ],
)
def test_adapters_are_alive_or_refused(task, architecture, outcomes, refusal):
    rows = measure(task, architecture)
    assert [row["outcome"] for row in rows] == outcomes, rows
    for row in rows:
        if row["outcome"] == "refused":
            assert re.search(refusal, row["message"]), row["message"]
        else:
            assert row["adapters"] > 0


class Grouped(nn.Linear):
    """Applies its weight in two groups, as some experts do."""

    def forward(self, x):
        halves = zip(x.chunk(2, -1), self.weight[:, : x.shape[-1] // 2].chunk(2), strict=True)
        return torch.cat([half @ rows.T for half, rows in halves], -1)


class Pair(nn.Linear):
    """Returns two tensors, as some routers do."""

    def forward(self, x):
        y = super().forward(x)
        return y, y.softmax(-1)


class Plain(nn.Linear):
    """Computes what its parent does, in its own words."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize(("kind", "linear"), [(Grouped, False), (Pair, False), (Plain, True)])
def test_a_class_of_its_own_is_a_linear_map_where_it_computes_one(kind, linear):
    torch.manual_seed(0)
    module = kind(6, 4)
    assert is_linear(module) is linear
    model = nn.Sequential(nn.Linear(6, 6), module)
    assert list(inject(model, LoRASpec(targets="all-linear")).adapters) == ["0", *(["1"] if linear else [])]
    if not linear:
        with pytest.raises(TargetError, match=f"matches 1, a {kind.__name__}, which lora cannot edit"):
            inject(nn.Sequential(nn.Linear(6, 6), module), LoRASpec(targets=["1"]))


def test_default_targets_leave_images_out_and_named_ones_do_not():
    model = tiny_model("causal_lm", "gemma3")
    assert not [path for path in inject(model, LoRASpec()).adapters if "vision" in path]
    model = tiny_model("causal_lm", "gemma3")
    assert [path for path in inject(model, LoRASpec(targets=["query"])).adapters if "vision" in path]


def test_the_table_keeps_the_rows_it_has(tmp_path, capsys):
    out = tmp_path / "results.csv"
    for only in (["olmo2"], ["olmo2", "bloom"]):
        main(["--out", str(out), "--tasks", "causal_lm", "--only", *only])
    assert capsys.readouterr().out.count("olmo2") == 1
    rows = out.read_text().splitlines()
    assert len(rows) == 7
    assert [row.split(",")[1] for row in rows[1:]] == ["bloom"] * 3 + ["olmo2"] * 3
