"""A run's folder and its life: who owns it, what it records, which callbacks it has."""

from lora_lab.runs.environment import environment, process_rank
from lora_lab.runs.folder import RunFolder

__all__ = ["RunFolder", "environment", "process_rank"]
