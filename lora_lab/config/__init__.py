"""Experiment configs: schema and composition."""

from lora_lab.config.compose import compose
from lora_lab.config.schema import ExperimentConfig

__all__ = ["ExperimentConfig", "compose"]
