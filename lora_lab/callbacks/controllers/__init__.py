"""CONTROLLERS: every controller, one file each. This is the one place where a controller is added."""

from collections.abc import Mapping

from lora_lab.adapters import Adapter, AdapterSet
from lora_lab.callbacks.controllers.base import Controller, ControllerSpec, misfit
from lora_lab.callbacks.controllers.compaction import Compaction
from lora_lab.callbacks.controllers.importance_pruning import ImportancePruning
from lora_lab.callbacks.controllers.lora_drop import AdapterDropping
from lora_lab.callbacks.controllers.rank_pruning import RankPruning
from lora_lab.callbacks.controllers.rank_switching import RankSwitching

CONTROLLERS: dict[str, type[Controller]] = {
    controller.name: controller
    for controller in (AdapterDropping, ImportancePruning, RankPruning, RankSwitching, Compaction)
}
"""Every controller by its id, in the order in which those of one run act. A new one is one file, one entry
here and one YAML in configs/controllers."""


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
        others = [other for other in specs if other != name]
        found += [f"controllers.{name}: {fault}" for fault in spec.faults_beside(others)]
        matter = spec.decides()
        if matter is not None and matter in deciding:
            found.append(f"controllers.{name}: decides {matter}, as {deciding[matter]} does; take one out")
        elif matter is not None:
            deciding[matter] = name
    return found


__all__ = ["CONTROLLERS", "Controller", "ControllerSpec", "build_controllers", "check_controllers"]
