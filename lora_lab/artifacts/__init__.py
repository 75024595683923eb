"""What people do with adapters after training: one model of base and adapter, plain LoRA, a mixture."""

from lora_lab.artifacts.combining import combine
from lora_lab.artifacts.converting import Converted, export
from lora_lab.artifacts.merging import merge

__all__ = ["Converted", "combine", "export", "merge"]
