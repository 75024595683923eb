"""Adapters after training: one model from base and adapter, plain LoRA, mixtures, foreign files."""

from lora_lab.artifacts.combining import combine
from lora_lab.artifacts.converting import Converted, export
from lora_lab.artifacts.importing import import_file, place_file
from lora_lab.artifacts.merging import merge

__all__ = ["Converted", "combine", "export", "import_file", "merge", "place_file"]
