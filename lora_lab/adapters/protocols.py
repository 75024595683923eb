"""What controllers may ask of an adapter. Adapters inherit these explicitly.

`isinstance` against a structural protocol does not see the parameters and buffers of an `nn.Module` (from
Python 3.12 it looks attributes up statically), so the protocols hold methods and properties only.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@runtime_checkable
class RankAllocatable(Protocol):
    """A sum of rank-one components whose members can be scored and silenced one by one."""

    def rank_components(self) -> list[tuple[nn.Parameter, int]]:
        """Returns each tensor that holds components, with its axis that counts them."""
        ...

    def keep_components(self, keep: Bool[Tensor, " rank"]) -> None:
        """Silences the components whose flag is False by writing zeros, so that they may grow back."""
        ...

    def kept_components(self) -> Bool[Tensor, " rank"]:
        """Returns the flags of the last `keep_components`; all True before it."""
        ...


@runtime_checkable
class Prunable(Protocol):
    """A sum of rank-one components that can be scored by their size and removed for good."""

    def importance(self) -> Float[Tensor, " rank"]:
        """Returns how much each component matters, 0 or more; 0 for those removed."""
        ...

    def keep_components(self, keep: Bool[Tensor, " rank"]) -> None:
        """Removes the components whose flag is False; those removed before stay so, whatever their flag."""
        ...

    def kept_components(self) -> Bool[Tensor, " rank"]:
        """Returns the flags of the components that are left."""
        ...


@runtime_checkable
class NestedRank(Protocol):
    """Every prefix of the components is a valid adapter."""

    @property
    def max_rank(self) -> int:
        """Number of components that exist."""
        ...

    @property
    def active_rank(self) -> int:
        """Number of leading components in use, in [1, max_rank]."""
        ...

    @active_rank.setter
    def active_rank(self, rank: int) -> None: ...


@runtime_checkable
class Droppable(Protocol):
    """Its contribution can be measured and switched off."""

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Returns what the adapter adds to the base's output."""
        ...

    def drop(self) -> None:
        """Switches the adapter off for good: it adds exactly zero from now on."""
        ...

    @property
    def dropped(self) -> bool:
        """Whether `drop` was called."""
        ...


@runtime_checkable
class Steerable(Protocol):
    """Its edit has a signed strength that is chosen while the model is used: 0 leaves the base as it is."""

    @property
    def coefficient(self) -> float:
        """The strength in use."""
        ...

    @coefficient.setter
    def coefficient(self, coefficient: float) -> None: ...


@runtime_checkable
class Selectable(Protocol):
    """Works in some singular directions of its weight, and can be told in which."""

    @property
    def undecided(self) -> bool:
        """Whether it waits to be told."""
        ...

    def directions(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
        """Returns all that there are: U, S and Vᵀ, from the greatest singular value down."""
        ...

    def choose(self, indices: Int[Tensor, " rank"]) -> None:
        """Takes the directions of these indices, in rising order; only before training."""
        ...
