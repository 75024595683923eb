"""What controllers may ask of an adapter: interfaces that a method inherits besides its base class.

They are classes and not `typing.Protocol`s, since a method may have these functions with another meaning:
DyLoRA's components can be silenced like LoRA's, but then its ranks would no longer be nested.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lora_lab.linalg.updates import Update


class Prunable:
    """A sum of rank-one components that can be scored one by one, and removed permanently.

    Attributes:
        kept: (rank,), flags of the components that are left; a persistent buffer.
        initial_components: number of components at the start of training.
    """

    components: dict[str, int]
    """Name of each tensor that holds components, `kept` among them → its axis that counts them."""

    kept: Tensor
    initial_components: int

    def rank_components(self) -> list[tuple[nn.Parameter, int]]:
        """Returns each trained tensor that holds components, with its axis that counts them."""
        held = [(getattr(self, name), axis) for name, axis in self.components.items()]
        return [(tensor, axis) for tensor, axis in held if isinstance(tensor, nn.Parameter)]

    def keep_components(self, keep: Bool[Tensor, " rank"]) -> None:
        """Silences the components whose flag is False, by writing zeros."""
        raise NotImplementedError

    def kept_components(self) -> Bool[Tensor, " rank"]:
        """Returns the flags of the components that the last decision left."""
        return self.kept

    def components_in_use(self) -> Bool[Tensor, " rank"]:
        """Returns the flags of the components that are in the weights now.

        These are the kept ones, and silenced ones that an optimizer step has filled again; none if the
        adapter is dropped. Logged ranks and sparsity count them, and folders hold them.
        """
        raise NotImplementedError

    @torch.no_grad()
    def select_components(self, index: Int[Tensor, " k"]) -> None:
        """Removes all other components of the adapter; every tensor stays the same object.

        The update loses what the removed components contributed; its scale stays that of the rank at the
        start. Of adapters that share tensors, each must be given the same choice.

        Args:
            index: the components, in ascending order.
        """
        for name, axis in self.components.items():
            tensor = getattr(self, name)
            # It has this length already: nothing is removed, or an adapter that shares the tensor has done
            # it.
            if tensor is not None and tensor.shape[axis] != len(index):
                tensor.data = tensor.data.index_select(axis, index)
        self.tensors_changed()

    @torch.no_grad()
    def resize_components(self, count: int) -> None:
        """Changes the number of components, all kept, before their values are loaded."""
        for name, shape in self.component_shapes(count).items():
            tensor = getattr(self, name)
            if tensor.shape != shape:
                tensor.data = tensor.new_full(shape, name == "kept")

    def component_shapes(self, count: int) -> dict[str, torch.Size]:
        """Returns the shape of each tensor that holds components, for this many of them."""
        held = {name: (getattr(self, name), axis) for name, axis in self.components.items()}
        return {
            name: torch.Size((*tensor.shape[:axis], count, *tensor.shape[axis + 1 :]))
            for name, (tensor, axis) in held.items()
            if tensor is not None
        }

    def tensors_changed(self) -> None:
        """Recomputes what the adapter derives from its tensors, as `Adapter` does."""


class RankAllocatable(Prunable):
    """A `Prunable` adapter whose silenced components may come back: a step can fill the zeros again."""


class Growable(Prunable):
    """A `Prunable` adapter to which more components can be added while it trains."""

    def new_components(self, count: int) -> dict[str, Tensor]:
        """Returns the start of `count` more components, drawn from torch's generator.

        By name of the tensor (without `kept`), `count` long on the axis that counts components. They add
        exactly zero to the update, but have a gradient.
        """
        raise NotImplementedError

    @torch.no_grad()
    def extend_components(self, count: int, init: Mapping[str, Tensor] | None = None) -> None:
        """Adds components after the present ones; the counterpart of `select_components`.

        The others keep their values, the update keeps its scale, and every tensor stays the same object. Not
        for adapters that share tensors.

        Args:
            count: how many, 0 or more.
            init: what `new_components` would return, to start them elsewhere.
        """
        new = dict(self.new_components(count) if init is None else init)
        new["kept"] = self.kept.new_ones(count)
        for name, axis in self.components.items():
            if (tensor := getattr(self, name)) is not None:
                tensor.data = torch.cat([tensor, new[name].to(tensor)], dim=axis)
        self.tensors_changed()


class Truncatable(Prunable):
    """A `Prunable` adapter whose update can be any product of two thin factors."""

    def take_update(self, update: Update) -> None:
        """Makes ΔW the given one, without its bias.

        Its components come first, further ones are zero, and all are kept.

        Args:
            update: L R of at most as many components as the adapter has.
        """
        raise NotImplementedError


class NestedRank:
    """Every prefix of the components is a valid adapter.

    Attributes:
        ranks: the ranks that can be active, rising up to `max_rank`.
    """

    ranks: Sequence[int]

    @property
    def max_rank(self) -> int:
        """Number of components that exist."""
        raise NotImplementedError

    @property
    def active_rank(self) -> int:
        """Number of leading components in use, in [1, max_rank]."""
        raise NotImplementedError

    @active_rank.setter
    def active_rank(self, rank: int) -> None: ...


class Droppable:
    """Its contribution can be measured and switched off."""

    def delta_output(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Returns what the adapter adds to the base's output."""
        raise NotImplementedError

    def drop(self) -> None:
        """Switches the adapter off permanently: it adds exactly zero from now on."""
        raise NotImplementedError

    @property
    def dropped(self) -> bool:
        """Whether `drop` was called."""
        raise NotImplementedError


class Shareable(Droppable):
    """Its update is a function of its trained tensors alone, so that adapters of one shape may share them."""

    def share_key(self) -> Hashable | None:
        """Returns a key that is equal for adapters that may share; None if this one may not."""
        raise NotImplementedError

    def share(self, owner: Shareable) -> None:
        """Uses the trained tensors of an adapter with the same key instead of its own."""
        raise NotImplementedError


class RandomlyDropped:
    """Parts of its update are zeroed at random while training."""

    @property
    def drop_prob(self) -> float:
        """Probability of zeroing a part, in [0, 1)."""
        raise NotImplementedError

    @drop_prob.setter
    def drop_prob(self, probability: float) -> None: ...


class Steerable:
    """Its edit has a signed strength that is chosen while the model is used: 0 is the base."""

    @property
    def coefficient(self) -> float:
        """The strength in use."""
        raise NotImplementedError

    @coefficient.setter
    def coefficient(self, coefficient: float) -> None: ...


class Selectable:
    """Works in some singular directions of its weight, which can be chosen."""

    @property
    def undecided(self) -> bool:
        """Whether the choice has not been made yet."""
        raise NotImplementedError

    def directions(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
        """Returns all directions: U, S and Vᵀ, from the largest singular value down."""
        raise NotImplementedError

    def choose(self, indices: Int[Tensor, " rank"]) -> None:
        """Chooses the directions of these indices, in ascending order; only before training."""
        raise NotImplementedError


PROTOCOLS: tuple[type, ...] = (
    RankAllocatable,
    Growable,
    Truncatable,
    Prunable,
    NestedRank,
    Shareable,
    Droppable,
    RandomlyDropped,
)
"""What controllers ask for, the more specific first."""
