"""What `lora-lab describe` shows, as data; the documentation and the README show the same.

Everything comes from the sources: the module docstring of a method or controller, the docstring of a config
class and those under its fields.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import partial
from typing import Any, get_type_hints

from lora_lab.adapters import METHODS, AdapterSpec
from lora_lab.adapters.protocols import PROTOCOLS
from lora_lab.callbacks import CONTROLLERS
from lora_lab.config.documentation import field_documentation
from lora_lab.config.schema import ExperimentConfig
from lora_lab.data import DATA_SOURCES, DataConfig
from lora_lab.tasks import TASKS

REQUIRED = "required"
"""Shown if a field has no default."""
PARTS: dict[str, type] = {"experiment": ExperimentConfig}
"""Parts of a config that are the same for every method and data source."""


def _add_parts(config: type, prefix: str = "") -> None:
    for name, kind in get_type_hints(config).items():
        if isinstance(kind, type) and is_dataclass(kind) and not issubclass(kind, AdapterSpec):
            PARTS[prefix + name] = kind
            _add_parts(kind, f"{prefix}{name}.")


_add_parts(ExperimentConfig)


@dataclass(frozen=True)
class FieldDescription:
    """One setting."""

    name: str
    type: str
    """The type, as Python writes it."""
    default: str
    """The default as YAML writes it, or REQUIRED."""
    meaning: str
    peft: str | None = None
    """The field of PEFT's `adapter_config.json` that holds the same value."""


@dataclass(frozen=True)
class Description:
    """All that is known of one method, controller or part of a config."""

    name: str
    kind: str
    """method, controller, data source, task or config."""
    title: str
    """One line: what it is."""
    text: str
    """The rest in Markdown; formulas and tables of tensors are indented."""
    node: str
    """Its place in a config; empty for a task, which has no settings."""
    fields: tuple[FieldDescription, ...]
    example: str
    """YAML."""
    facts: Mapping[str, str]
    """Other facts, by label."""
    papers: tuple[str, ...] = ()
    """arXiv ids."""


def describe(name: str) -> Description:
    """Returns the description of a key of `known`."""
    return _makers()[name]()


def known() -> dict[str, Description]:
    """Returns every description by name: methods, controllers, parts of a config, data sources, tasks."""
    return {name: make() for name, make in _makers().items()}


def _makers() -> dict[str, Callable[[], Description]]:
    kinds: list[tuple[Callable[[str], Description], Iterable[str]]] = [
        (_method, METHODS),
        (_controller, CONTROLLERS),
        (_part, PARTS),
        (_source, DATA_SOURCES),
        (_task, TASKS),
    ]
    return {name: partial(make, name) for make, names in kinds for name in names}


def arxiv(paper: str) -> tuple[str, ...]:
    """Returns the arXiv ids in a method's or controller's `paper`."""
    return tuple(re.findall(r"arXiv:(\d+\.\d+)", paper))


def _method(name: str) -> Description:
    method = METHODS[name]
    offered = [protocol.__name__ for protocol in PROTOCOLS if protocol in method.__mro__]
    takers = [
        controller for controller, kind in CONTROLLERS.items() if issubclass(method, kind.Spec().needs())
    ]
    ours = {own: theirs for theirs, own in method.peft.fields.items()}
    facts = {
        "Family": method.family,
        "Paper": method.paper,
        "Merges into plain weights": "yes" if method.mergeable else "no",
        "Opens in PEFT": f"yes, as {method.peft.peft_type}" if method.peft.peft_type else "no",
        "Tensors in PEFT": ", ".join(f"`{theirs}` is {own}" for theirs, own in method.peft.tensors.items()),
        "Protocols": ", ".join(offered) or "none",
        "Controllers": ", ".join(takers) or "none",
    }
    if method.peft.peft_type is None:
        del facts["Tensors in PEFT"]
    title, text = _head(sys.modules[method.__module__].__doc__)
    example = f"adapter:\n  method: {name}"
    settings = tuple(_fields(method.Spec, ours))
    return Description(name, "method", title, text, "adapter", settings, example, facts, arxiv(method.paper))


def _controller(name: str) -> Description:
    controller = CONTROLLERS[name]
    needs = controller.Spec().needs()
    fitting = [method for method, kind in METHODS.items() if issubclass(kind, needs)]
    title, text = _head(sys.modules[controller.__module__].__doc__)
    facts = {
        "Paper": controller.paper,
        "Needs adapters that are": needs.__name__,
        "Methods": ", ".join(fitting),
    }
    node, example = f"controllers.{name}", f"controllers:\n  {name}: {{}}"
    settings = tuple(_fields(controller.Spec))
    return Description(
        name, "controller", title, text, node, settings, example, facts, arxiv(controller.paper)
    )


def _part(name: str) -> Description:
    title, text = _head(PARTS[name].__doc__)
    more = {"data": {"Sources": ", ".join(DATA_SOURCES)}, "model": {"Tasks": ", ".join(TASKS)}}
    settings = tuple(_fields(PARTS[name]))
    if name == "experiment":  # its parts have their own descriptions
        settings = tuple(field for field in settings if field.name not in PARTS)
    node = "" if name == "experiment" else name
    return Description(name, "config", title, text, node, settings, "", more.get(name, {}))


def _source(name: str) -> Description:
    kind = DATA_SOURCES[name]
    title, text = _head(kind.__doc__)
    own = {field.name for field in fields(kind)} - {field.name for field in fields(DataConfig)}
    settings = tuple(found for found in _fields(kind) if found.name in own)
    example = f"data:\n  source: {name}"
    for setting in settings:
        example += f"\n  {setting.name}: …" if setting.default == REQUIRED else ""
    facts = {"Fields of every source": "data"}
    return Description(name, "data source", title, text, "data", settings, example, facts)


def _task(name: str) -> Description:
    task = TASKS[name]
    metrics = ", ".join(str(name) for name in task.metrics(2))
    better = {"max": "more", "min": "less"}[task.mode]
    facts = {
        "Metrics": f"loss, {metrics}",
        "Runs are compared by": f"validation/{task.monitor} ({better} is better)",
    }
    title = f"Task {task.name.replace('_', ' ')}"
    return Description(task.name, "task", title, "", "", (), f"model:\n  task: {task.name}", facts)


def _head(documentation: str | None) -> tuple[str, str]:
    """Splits a docstring into its first paragraph, without citation and full stop, and the rest."""
    title, _, text = inspect.cleandoc(documentation or "").partition("\n\n")
    title = re.sub(r"\s*\([^()]*(\b20\d\d\b|arXiv|no paper)[^()]*\)", "", " ".join(title.split()))
    return title.removesuffix("."), text


def _fields(kind: type, peft: Mapping[str, str] = {}) -> Iterator[FieldDescription]:
    meanings = field_documentation(kind)
    for found in fields(kind):
        name = found.name
        yield FieldDescription(name, _type(found), _default(found), meanings.get(name, ""), peft.get(name))


def _type(found: Field[Any]) -> str:
    text = found.type if isinstance(found.type, str) else inspect.formatannotation(found.type)
    text = re.sub(r"\b(typing|lora_lab[\w.]*)\.", "", text)
    text = re.sub(r"Union\[(\w+), (.*)\]$", r"\1 | \2", text)
    return re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace(", ", " | "), text).replace("'", '"')


def _default(found: Field[Any]) -> str:
    value = found.default_factory() if found.default_factory is not MISSING else found.default
    if value is MISSING or value == "???":
        return REQUIRED
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
