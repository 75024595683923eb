"""Callbacks: those that every run has, in this folder, and `controllers`, which change adapters."""

from lora_lab.callbacks.controllers import (
    CONTROLLERS,
    Controller,
    ControllerSpec,
    build_controllers,
    check_controllers,
    renamed,
    unknown,
)

__all__ = [
    "CONTROLLERS",
    "Controller",
    "ControllerSpec",
    "build_controllers",
    "check_controllers",
    "renamed",
    "unknown",
]
