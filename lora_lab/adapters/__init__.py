"""Adapters: what every method needs is here, what several share is in `families`, each method in `methods`.

Every method's class and spec can be imported from here: `from lora_lab.adapters import LoRASpec`.
"""

from typing import TYPE_CHECKING

from lora_lab.adapters.base import Adapter as Adapter
from lora_lab.adapters.injection import (
    AdapterSet as AdapterSet,
    inject as inject,
    parameter_count as parameter_count,
    parameter_counts as parameter_counts,
)
from lora_lab.adapters.methods import METHODS as METHODS
from lora_lab.adapters.spec import (
    AdapterSpec as AdapterSpec,
    LowRankSpec as LowRankSpec,
    RankedSpec as RankedSpec,
)

if TYPE_CHECKING:
    from lora_lab.adapters.methods import *  # noqa: F403
else:  # the same names, without those of the modules that they come from
    _parts = {part.__name__: part for method in METHODS.own.values() for part in (method, method.Spec)}
    globals().update(_parts)
    __all__ = [
        "METHODS",
        "Adapter",
        "AdapterSet",
        "AdapterSpec",
        "LowRankSpec",
        "RankedSpec",
        "inject",
        "parameter_count",
        "parameter_counts",
        *_parts,
    ]
