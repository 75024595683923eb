"""Sizes at which methods train equally many parameters, by each method's size field and formula."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from lora_lab.adapters import METHODS, inject, parameter_counts
from lora_lab.config.schema import ExperimentConfig
from lora_lab.errors import ConfigError, LabError
from lora_lab.models.build import build_model

TOLERANCE = 0.1
"""A method that misses the count by more than this share is marked."""
SMALL = 64
"""All sizes up to this one are tried."""
STEP = 1.1
"""Ratio of consecutive larger sizes."""


@dataclass(frozen=True)
class Match:
    """The size that was chosen for a method."""

    field: str
    """The method's field that sets its size."""
    value: int
    parameters: int
    """Trained parameters with this size, without task heads."""
    wanted: int

    @property
    def misses(self) -> bool:
        """Whether no size is within a tenth of the wanted number."""
        return abs(self.parameters - self.wanted) > TOLERANCE * self.wanted


class Matcher:
    """Finds sizes; each base model is built once.

    Args:
        wanted: number of trained parameters, without task heads.
    """

    def __init__(self, wanted: int):
        self.wanted = wanted
        self._model: tuple[str, nn.Module] | None = None

    def match(self, config: ExperimentConfig) -> Match:
        """Returns the size of a config's method with the nearest count; of two equally near, the smaller.

        Raises:
            LabError: if the method has no size that fits the model, or cannot edit its targets, or the model
                itself has fewer parameters.
        """
        spec = config.adapter
        field = spec.size_field
        if field is None:
            raise ConfigError(f"{spec.method} has no field that sets its size")
        model = self._built(config)
        if self.wanted > (own := sum(p.numel() for p in model.parameters())):
            raise ConfigError(f"the model itself has {own:,} parameters; {self.wanted:,} were to be trained")
        widest = max((size for p in model.parameters() for size in p.shape if p.dim() == 2), default=1)
        counts = parameter_counts(model, spec, field, self._candidates(model, widest))
        # The best size may be between those tried, so all around it are tried.
        if counts:
            near = self._best(counts)
            around = range(max(1, int(near / STEP)), int(near * STEP) + 2)
            counts |= parameter_counts(model, spec, field, [v for v in around if v not in counts])
        refusal = "none of its formula's sizes is valid"
        while counts:
            value = self._best(counts)
            change: Any = {field: value}
            try:
                # A formula accepts sizes that the maps do not, for example blocks that do not divide them.
                inject(model, replace(spec, **change)).remove()
            except LabError as error:
                del counts[value]
                refusal = str(error)
            else:
                return Match(field, value, counts[value], self.wanted)
        raise ConfigError(f"no adapter.{field} fits the model ({refusal})")

    def _best(self, counts: dict[int, int]) -> int:
        return min(counts, key=lambda value: (abs(counts[value] - self.wanted), value))

    def _candidates(self, model: nn.Module, widest: int) -> list[int]:
        """Returns small sizes, sizes of even ratio, and the divisors of the model's widths (for blocks)."""
        found = set(range(1, SMALL + 1))
        size = float(SMALL)
        while size < max(widest, self.wanted):
            found.add(int(size))
            size *= STEP
        widths = {size for p in model.parameters() for size in p.shape if p.dim() == 2 and size <= 2**15}
        found |= {d for width in widths for d in range(1, width + 1) if width % d == 0}
        return sorted(found)

    def _built(self, config: ExperimentConfig) -> nn.Module:
        key = json.dumps(asdict(config.model), sort_keys=True)
        if self._model is None or self._model[0] != key:
            self._model = (key, build_model(config.model, num_labels=2))
        return self._model[1]


def knobs() -> dict[str, str]:
    """Returns the size field of each method that has one."""
    return {name: field for name, method in METHODS.items() if (field := method.Spec().size_field)}
