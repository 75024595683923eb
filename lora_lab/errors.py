"""The faults a user can cause. Each message says what, where, what is allowed and what to do.

The command line turns every `LabError` into that one message and its exit code; anything else is a bug and
keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar


class LabError(Exception):
    """Base class of all errors that the user can fix."""

    exit_code: ClassVar[int] = 2
    """Exit code of the command line."""
    status: ClassVar[str] = "failed"
    """Status in a run's record after this error ended its training."""


class ConfigError(LabError):
    """A config file or override that is not valid."""


class TargetError(LabError):
    """Targets, layers or patterns that do not fit the model."""


class IncompatibleError(LabError):
    """Parts that exist but cannot work together."""


class DataError(LabError):
    """A data set that is missing, broken or empty."""


class CheckpointError(LabError):
    """A checkpoint, adapter folder or run folder that cannot be read or written."""


class AssetError(LabError):
    """A model or data set that no source could deliver."""


class StudyError(LabError):
    """Runs of a study that failed."""


class DivergenceError(LabError):
    """Training reached numbers that are not finite."""

    exit_code = 3
    status = "diverged"
    checkpoint: Path | None = None
    """The last checkpoint before it, if there is one; all its weights are finite."""
    skipping = False
    """Whether steps that are not finite were already left out."""

    def __str__(self) -> str:
        if self.checkpoint is None:
            return f"{super().__str__()} No checkpoint was written before."
        way = (
            "" if self.skipping else "; trainer.on_nonfinite=skip continues from it and leaves out such steps"
        )
        return f"{super().__str__()} The last finite checkpoint is {self.checkpoint}{way}."


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'? Known: a, b, x`, without the question if nothing is close."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    question = f"; did you mean '{close[0]}'?" if close else "."
    return f"{question} Known: {', '.join(known)}"
