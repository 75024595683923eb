"""Adapters: this folder has what every method needs, `families` what some share, `methods` one file each."""

from lora_lab.adapters.base import Adapter
from lora_lab.adapters.injection import AdapterSet, inject
from lora_lab.adapters.methods import METHODS

__all__ = ["METHODS", "Adapter", "AdapterSet", "inject"]
