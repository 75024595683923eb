"""Only the head, on frozen features: the baseline that every adapter has to beat.

W' = W everywhere; only the task head (`modules_to_save`) is trained
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union  # noqa: UP035  (omegaconf reads typing.Union)

from lora_lab.adapters.methods.full import Full, FullSpec


@dataclass
class HeadSpec(FullSpec):
    """The head baseline has no options of its own."""

    method: str = "head"
    meaningless = frozenset({"targets", "layers"})

    targets: Union[str, list[str]] = field(default_factory=list)  # noqa: UP007
    """Empty: no module of the base is adapted."""

    def faults(self) -> list[str]:
        if self.targets or self.layers is not None:
            return ["targets: head adapts no module of the base; leave out targets and layers"]
        return (
            ["modules_to_save: head trains nothing else; name a module"] if self.modules_to_save == [] else []
        )


class Head(Full):
    """Full fine-tuning of no module of the base; `modules_to_save` trains the head."""

    Spec = HeadSpec
