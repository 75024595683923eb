"""Parameter-efficient fine-tuning as controlled experiments.

from lora_lab import METHODS, compose, inject, run

result = run(compose("experiments/quickstart/experiment.yaml", ["adapter.rank=4"]))
"""

from typing import Any

__all__ = ["METHODS", "compose", "inject", "load_adapter", "run", "save_adapter", "split_attention"]

_HOMES = {
    "METHODS": "lora_lab.adapters",
    "inject": "lora_lab.adapters",
    "load_adapter": "lora_lab.adapters.storage",
    "save_adapter": "lora_lab.adapters.storage",
    "compose": "lora_lab.config",
    "run": "lora_lab.experiment",
    "split_attention": "lora_lab.models.attention",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: torch and transformers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_lab' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
