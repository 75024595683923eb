"""How folders written by PEFT open here: one row for each of its types, its options and some models.

    python -m lora_lab.bench.peft_folders --out experiments/peft_folders/results.csv

Every option of every config is set to another value than its default, one at a time. PEFT puts such an
adapter into a tiny model, its tensors are moved off their start, and it writes the folder. Correct is:
lora_lab opens it with PEFT's logits, or refuses it and names the field.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from lora_lab.adapters import METHODS
from lora_lab.adapters.storage import load_adapter
from lora_lab.bench.architectures import time_limit
from lora_lab.bench.results import about, write_rows
from lora_lab.bench.tiny_architectures import CLASSES, TASKS, tiny_config, tiny_inputs
from lora_lab.errors import LabError
from lora_lab.models.conversion import linearise

TOLERANCE = 5e-5
"""Largest difference of logits, in units of the largest logit, that still counts as equal."""
SECONDS = 60

MODELS: dict[str, tuple[str, str, list[str]]] = {
    "llama": ("causal_lm", "llama", ["q_proj", "k_proj", "down_proj"]),
    "bert": ("sequence_classification", "bert", ["query", "value", "output.dense"]),
    "gpt2": ("causal_lm", "gpt2", ["c_attn", "c_proj"]),
    "t5": ("sequence_to_sequence", "t5", ["q", "v", "wo"]),
    "mixtral": ("causal_lm", "mixtral", ["q_proj", "v_proj"]),
    "convolutions": ("", "", ["first", "second", "head"]),
}
"""Name → task and architecture of `tiny_architectures`, and target modules of various shapes."""

BASES: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4},
    "OFT": {"oft_block_size": 4},
    "OSF": {"effective_rank": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 4, "randlora_alpha": 8},
    "ROAD": {"group_size": 8},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5]},
    "VBLORA": {"num_vectors": 8, "vector_length": 8},
    "WAVEFT": {"n_frequency": 20},
}
"""Options that a type needs on tiny models; types with a rank but without an entry have rank 4."""

VALUES: dict[str, list[Any]] = {
    "r": [1, 6],
    "target_modules": ["all-linear", r".*(q_proj|query|c_attn|SelfAttention\.q|first)"],
    "exclude_modules": [["q_proj", "query", "c_attn", "q", "first"]],
    "lora_alpha": [3],
    "alpha": [3],
    "modules_to_save": [["lm_head", "classifier", "head"], ["embed_tokens", "embeddings", "wte", "shared"]],
    "layers_to_transform": [1, [0]],
    "layers_pattern": [],
    "rank_pattern": [{"q_proj": 2, "value": 2, "c_proj": 2, "v": 2, "second": 2}, {"no_such_module": 9}],
    "alpha_pattern": [{"q_proj": 5, ".*value": 5, "c_proj": 5, "v": 5, "second": 5}],
    "lambda_pattern": [{"q_proj": 3.0, "value": 3.0, "c_proj": 3.0, "v": 3.0}],
    "n_frequency_pattern": [{"q_proj": 9, "value": 9, "c_proj": 9, "v": 9}],
    "init_lora_weights": [
        False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "eva", "corda", "lora_ga",
        "loftq", "mica",
    ],
    "init_ia3_weights": [False],
    "trainable_token_indices": [[3, 5]],
    "target_parameters": [
        ["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"], ["gate.weight"],
        ["q_proj.weight", "query.weight"], ["wte.weight", "embed_tokens.weight", "shared.weight"],
        ["c_proj.weight"],
    ],
    "layer_replication": [[[0, 1], [0, 2]]],
    "alora_invocation_tokens": [[3, 4]],
    "loftq_config": [{"loftq_bits": 4}],
    "feedforward_modules": [["down_proj", "output.dense", "c_proj", "wo", "second"], ["q_proj"]],
    "boft_block_num": [4],
    "boft_n_butterfly_factor": [2],
    "oft_block_size": [8, 0],
    "decompose_factor": [4],
    "ab_svd_init": ["pissa_init"],
    "psoft_svd": ["lowrank"],
    "psoft_alpha": [3],
    "cayley_neumann_eps": [0.9],
    "variant": ["road_2", "road_4"],
    "init_r": [6],
    "target_r": [4],
    "tinit": [1],
    "tfinal": [2],
    "total_step": [20],
    "eps": [0.5],
    "lora_dropout": [0.1],
}  # fmt: skip
"""Field → the values to try. Other flags are inverted, and other numbers halved."""

OWN_VALUES: dict[tuple[str, str], list[Any]] = {
    ("LOKR", "init_weights"): [False, "lycoris"],
    ("LOHA", "init_weights"): [False, "abba"],
}
"""Values of fields that mean something else in one type."""

SKIPPED = frozenset(
    # Origin, and how a model runs; none of these options changes what is computed.
    "megatron_config megatron_core token_dim num_transformer_submodules num_attention_heads num_layers "
    "tokenizer_name_or_path tokenizer_kwargs prompt_tuning_init_text prompt_tuning_init_state_dict_path "
    "progressbar prompt_tuning_init opt_weighted_loss_type runtime_config runtime_offload_base_weight "
    "encoder_reparameterization_type adapters".split()
)


def variants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields type, option (`field=value`, "" for the defaults) and all options that are set.

    A type without a method here gets only its defaults, as none of its options is read.
    """
    ours = {method.peft.peft_type for method in METHODS.values()}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = str(getattr(kind, "value", kind))
        fields = {field.name: field for field in dataclasses.fields(config)}
        common = {field.name for field in dataclasses.fields(peft.PeftConfig)}
        base = dict(BASES.get(name, {"r": 4} if "r" in fields else {}))
        yield name, "", base
        if name not in ours:
            continue
        for field in fields.keys() - common - SKIPPED:
            for value in OWN_VALUES.get((name, field)) or _values(name, fields[field], base):
                yield name, f"{field}={value}", {**base, field: value}


def _values(kind: str, field: Any, base: Mapping[str, Any]) -> list[Any]:
    if field.name == "bias":
        return ["all", f"{kind.lower()}_only"]
    if field.name in VALUES:
        return [value for value in VALUES[field.name] if value != base.get(field.name, field.default)]
    default = base.get(field.name, field.default)
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, float):
        return [0.1 if "dropout" in field.name else default / 2]
    return [max(1, default // 2)] if isinstance(default, int) and default > 1 else []


def model_of(name: str) -> nn.Module:
    """Builds one of `MODELS`, with weights moved away from the usual initial 0 and 1."""
    torch.manual_seed(0)
    task, model_type, _ = MODELS[name]
    model: nn.Module
    if not task:
        model = nn.Sequential()
        model.add_module("first", nn.Conv2d(3, 8, 3, padding=1))
        model.add_module("act", nn.Tanh())
        model.add_module("second", nn.Conv2d(8, 12, 1))
        model.add_module("flat", nn.Flatten())
        model.add_module("head", nn.Linear(12 * 16, 5))
    else:
        config = tiny_config(model_type)
        config.num_labels = CLASSES
        model = TASKS[task][0].from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, name: str, inputs: Any) -> Tensor:
    """Returns the outputs of one of `MODELS`, adapted or not."""
    torch.manual_seed(2)
    output = model.eval()(inputs) if name == "convolutions" else model.eval()(**inputs).logits
    return output.float()


def measure(kind: str, option: str, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the row of one folder.

    Its `outcome` is "equal", "refused" (with the field in `field`), "refused without a field", "other
    numbers", "failed" (no error of ours), or "not by PEFT" (PEFT does not make or write it on this model).
    """
    row: dict[str, Any] = {"type": kind, "option": option, "model": name}
    inputs = torch.randn(2, 3, 4, 4) if name == "convolutions" else tiny_inputs(model_of(name))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        try:
            with time_limit(SECONDS):
                expected = _written(kind, options, name, inputs, folder)
        except Exception as error:
            return row | {"outcome": "not by PEFT", "field": "", "error": "", "message": _line(error)}
        model = linearise(model_of(name))
        try:
            with time_limit(SECONDS):
                load_adapter(model, folder)
                found = logits_of(model, name, inputs)
        except LabError as error:
            field = re.match(r"(?:.*adapter_config\.json: )?(?:adapter\.)?(\w+): ", str(error))
            outcome = "refused" if field else "refused without a field"
            message = _line(error).replace(folder, "…")
            return row | {
                "outcome": outcome,
                "field": field[1] if field else "",
                "error": "",
                "message": message,
            }
        except Exception as error:
            return row | {"outcome": "failed", "field": "", "error": "", "message": _line(error)}
    difference = float((found - expected).abs().max() / expected.abs().max())
    outcome = "equal" if difference < TOLERANCE else "other numbers"
    return row | {"outcome": outcome, "field": "", "error": f"{difference:.1e}", "message": ""}


def _written(kind: str, options: Mapping[str, Any], name: str, inputs: Any, folder: str) -> Tensor:
    """Lets PEFT write a folder; returns its logits."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    fields = {field.name for field in dataclasses.fields(config)}
    tasks = {
        "causal_lm": "CAUSAL_LM",
        "sequence_classification": "SEQ_CLS",
        "sequence_to_sequence": "SEQ_2_SEQ_LM",
    }
    given: dict[str, Any] = {"task_type": tasks.get(MODELS[name][0])}
    if "target_modules" in fields:
        given["target_modules"] = MODELS[name][2]
    if kind == "LORA" and options.get("target_parameters"):
        given |= {"target_modules": [], "fan_in_fan_out": False}
    if kind in ("LN_TUNING", "TRAINABLE_TOKENS", "ADAPTION_PROMPT", "BEFT"):
        del given["target_modules"]
    given |= options
    if name == "gpt2" and "fan_in_fan_out" in fields:
        given.setdefault("fan_in_fan_out", True)
    model = peft.get_peft_model(model_of(name), config(**given))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if kind not in (
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "CPT",
        "CARTRIDGE",
    ):
        expected = logits_of(model, name, inputs)
    else:
        expected = torch.zeros(1)
    model.save_pretrained(folder)
    return expected


def _line(error: BaseException) -> str:
    kind = "" if isinstance(error, LabError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the table; rows that are already in the file are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--types", nargs="*", help="PEFT's types; all by default")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    machine = about(["peft", "transformers", "torch"])
    rows: list[dict[str, Any]] = []
    if given.out.exists():
        known = pd.read_csv(given.out, keep_default_na=False).to_dict("records")
        rows = [{str(name): value for name, value in row.items()} for row in known]
    done = {(row["type"], row["option"], row["model"]) for row in rows}

    def key(row: Mapping[str, Any]) -> tuple[str, str, str]:
        return row["type"], row["option"], row["model"]

    for kind, option, options in sorted(variants(), key=lambda variant: variant[:2]):
        if given.types and kind not in given.types:
            continue
        new = [
            measure(kind, option, options, name) | machine
            for name in given.models
            if (kind, option, name) not in done
        ]
        rows += new
        if new:
            write_rows(given.out, sorted(rows, key=key))
            print(kind, option, *(f"{row['model']}: {row['outcome']}" for row in new), sep="  ", flush=True)


if __name__ == "__main__":
    main()
