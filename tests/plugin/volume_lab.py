"""Volume: the smallest method there is, from a package of its own.

W' = (1 + v) W

v   ()   learned; zero at the start, so W' = W
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lora_lab.adapters import Adapter, AdapterSpec
from lora_lab.adapters.base import AdditiveAdapter, PeftLayout
from lora_lab.callbacks import Controller, ControllerSpec
from lora_lab.linalg.rank import widened


@dataclass
class VolumeSpec(AdapterSpec):
    """Volume's options."""

    method: str = "volume"

    gain: float = 1.0
    """Factor of v."""


class Volume(AdditiveAdapter):
    """The adapter of one linear map."""

    Spec = VolumeSpec
    family = "activation"
    paper = "-"
    peft = PeftLayout(None, tensors={"volume_v": "v"})

    def __init__(self, base: nn.Module, spec: VolumeSpec):
        super().__init__(base)
        self.spec = spec
        self.v = nn.Parameter(torch.zeros((), dtype=self.dtype))

    @classmethod
    def site_parameter_count(cls, module: Any, spec: Any) -> int:
        return 1

    def delta_weight(self) -> Tensor:
        return self.spec.gain * self.v * widened(self.base.weight)


@dataclass
class LimitSpec(ControllerSpec):
    """The limit's options."""

    most: float = 0.5
    """Largest size of v."""

    def needs(self) -> type:
        return Adapter


class Limit(Controller):
    """Holds every number that is learned within a limit."""

    Spec = LimitSpec
    name = "limit"

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        for parameter in self.adapters.trainable_parameters():
            parameter.data.clamp_(-self.spec.most, self.spec.most)
