"""Adapters after training: one model from base and adapter, plain LoRA, mixtures."""

from lora_lab.artifacts.combining import combine
from lora_lab.artifacts.converting import Converted, export
from lora_lab.artifacts.merging import merge

__all__ = ["Converted", "combine", "export", "merge"]
