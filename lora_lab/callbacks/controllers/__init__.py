"""CONTROLLERS: every controller, one file each. This is the one place where a controller is added."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lora_lab.adapters import Adapter, AdapterSet
from lora_lab.callbacks.controllers.base import (
    Controller as Controller,
    ControllerSpec as ControllerSpec,
    misfit,
)
from lora_lab.callbacks.controllers.compaction import (
    Compaction as Compaction,
    CompactionSpec as CompactionSpec,
)
from lora_lab.callbacks.controllers.dropout_schedule import (
    DropoutSchedule as DropoutSchedule,
    DropoutScheduleSpec as DropoutScheduleSpec,
)
from lora_lab.callbacks.controllers.importance_pruning import (
    ImportancePruning as ImportancePruning,
    ImportancePruningSpec as ImportancePruningSpec,
)
from lora_lab.callbacks.controllers.output_evaluation import (
    OutputEvaluation as OutputEvaluation,
    OutputEvaluationSpec as OutputEvaluationSpec,
)
from lora_lab.callbacks.controllers.rank_growth import (
    RankGrowth as RankGrowth,
    RankGrowthSpec as RankGrowthSpec,
)
from lora_lab.callbacks.controllers.rank_pruning import (
    RankPruning as RankPruning,
    RankPruningSpec as RankPruningSpec,
)
from lora_lab.callbacks.controllers.rank_redistribution import (
    RankRedistribution as RankRedistribution,
    RankRedistributionSpec as RankRedistributionSpec,
)
from lora_lab.callbacks.controllers.rank_switching import (
    RankSwitching as RankSwitching,
    RankSwitchingSpec as RankSwitchingSpec,
)
from lora_lab.callbacks.controllers.svd_truncation import (
    SVDTruncation as SVDTruncation,
    SVDTruncationSpec as SVDTruncationSpec,
)
from lora_lab.errors import suggest
from lora_lab.registry import Registry

CONTROLLERS = Registry[Controller](
    "controller",
    Controller,
    needs=("Spec", "name"),
    id_of=lambda controller: controller.name,
    own=(
        RankRedistribution,
        OutputEvaluation,
        DropoutSchedule,
        ImportancePruning,
        RankPruning,
        RankGrowth,
        RankSwitching,
        SVDTruncation,
        Compaction,
    ),
)
"""Every controller by its id, in the order in which those of a run act; those of other packages (see
`Registry`) act last. A new one here is one file, one entry here and one YAML in configs/controllers."""

FORMER_NAMES: dict[str, dict[str, str]] = {
    "lora_drop": {"output_evaluation": "output_evaluation", "stochastic": "dropout_schedule"}
}
"""Former id of a controller in stored runs, which had several strategies → strategy → today's id."""


def renamed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `controllers` of a stored config under today's ids and with today's options."""
    found = {}
    for name, options in stored.items():
        strategies = FORMER_NAMES.get(name, {})
        strategy = (
            options.get("strategy", next(iter(strategies), None)) if isinstance(options, dict) else None
        )
        if strategy in strategies:
            name = strategies[strategy]
            known = [field.name for field in fields(CONTROLLERS[name].Spec)]
            options = {key: value for key, value in options.items() if key in known}
        found[name] = options
    return found


def unknown(name: str) -> str:
    """Returns the end of the message for an unknown controller: what could be meant."""
    if name not in FORMER_NAMES:
        return suggest(name, CONTROLLERS)
    found = ", ".join(f"'{new}' (was strategy: {old})" for old, new in FORMER_NAMES[name].items())
    return f"; it is {found} now"


def build_controllers(
    specs: Mapping[str, ControllerSpec], adapters: AdapterSet, seed: int
) -> list[Controller]:
    """Makes the controllers of a run, in the order in which they act."""
    return [CONTROLLERS[name](specs[name], adapters, seed) for name in CONTROLLERS if name in specs]


def check_controllers(specs: Mapping[str, ControllerSpec], method: type[Adapter]) -> list[str]:
    """Returns what is wrong with the controllers of one run, as `key: what, what is allowed`."""
    found, deciding = [], dict[str, str]()
    for name, spec in specs.items():
        faults = spec.faults()
        found += [f"controllers.{name}.{fault}" for fault in faults]
        if not faults and not issubclass(method, spec.needs()):
            found.append(misfit(name, spec.needs(), method.Spec().method))
        others = {other: specs[other] for other in specs if other != name}
        found += [f"controllers.{name}: {fault}" for fault in spec.faults_beside(others)]
        matter = spec.decides()
        if matter is not None and matter in deciding:
            found.append(f"controllers.{name}: decides {matter}, as {deciding[matter]} does; remove one")
        elif matter is not None:
            deciding[matter] = name
    return found
