"""Methods and controllers of others, added in Python; `registry` says how an installed package adds them."""

from __future__ import annotations

from typing import TypeVar

from lora_lab.adapters import METHODS, Adapter
from lora_lab.callbacks import CONTROLLERS, Controller
from lora_lab.errors import ConfigError

Kind = TypeVar("Kind", bound=type)


def register(kind: Kind) -> Kind:
    """Adds a method or a controller, for configs, the command line, storage and the contract tests.

    It holds for this process. A run in several processes, or `lora-lab train`, needs the entry point of an
    installed package instead.

    Args:
        kind: a class that inherits `Adapter` or `Controller`.

    Returns:
        The class, so that this serves as a decorator.

    Raises:
        ConfigError: if something is missing in the class, or its id is taken.
    """
    if isinstance(kind, type) and issubclass(kind, Adapter):
        METHODS.add(kind)
    elif isinstance(kind, type) and issubclass(kind, Controller):
        CONTROLLERS.add(kind)
    else:
        raise ConfigError(f"register: {kind!r} is no class that inherits lora_lab.Adapter or Controller.")
    return kind
