"""The order of the examples: batches of similar length, the same for any number of processes."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

BATCHES_PER_BUCKET = 50
"""Global batches that are sorted by length together: more pads less, but mixes less."""


def seeded_generator(*seeds: int) -> torch.Generator:
    """Returns a new generator for these non-negative seeds; torch's global one is not changed."""
    state = np.random.SeedSequence(seeds).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def training_order(lengths: Tensor, size: int, bucketed: bool, seed: int, epoch: int) -> list[Tensor]:
    """Shuffles one epoch into global batches; a pure function of its arguments.

    The rows that do not fill a batch are set aside before sorting, so that they are a random choice and not
    the longest rows. They form a shorter batch, which is the last one if batches are not sorted by length.

    Args:
        lengths: Tokens of each example, `(examples,)`.
        size: Examples in a global batch.
        bucketed: Whether a batch holds examples of similar length.
        seed: The run's seed.
        epoch: Which epoch, counted from 0.

    Returns:
        The batches in their order, each `(size,)` indices, of which one may be shorter.
    """
    generator = seeded_generator(seed, epoch)
    order = torch.randperm(len(lengths), generator=generator)
    if not bucketed:
        return list(order.split(size))
    whole = len(lengths) - len(lengths) % size
    buckets = order[:whole].split(size * BATCHES_PER_BUCKET)
    sorted_buckets = [bucket[lengths[bucket].argsort(stable=True)] for bucket in buckets]
    batches = [batch for bucket in sorted_buckets for batch in bucket.split(size)] if whole else []
    if whole < len(lengths):
        batches.append(order[whole:])
    return [batches[position] for position in torch.randperm(len(batches), generator=generator)]


def stratified_sample(size: int, classes: Tensor, seed: int) -> Tensor:
    """Draws examples without replacement, from each class its share; a pure function of its arguments.

    Args:
        size: Smallest number of examples; each class's share of it is rounded up.
        classes: Class of each example, `(examples,)`.
        seed: The run's seed.

    Returns:
        Indices in ascending order.
    """
    generator = seeded_generator(seed, 0, 1)  # two numbers are used for an epoch's order
    order = torch.randperm(len(classes), generator=generator)
    chosen = [order[classes[order] == value] for value in classes.unique()]
    return torch.cat([own[: math.ceil(size * len(own) / len(classes))] for own in chosen]).sort().values


class BucketedBatches(Sampler[list[int]]):
    """The training batches of one process, used as a DataLoader's `batch_sampler`.

    Global batches of `batch_size * world_size` are formed first, and process `rank` takes every
    `world_size`-th row of each. Two processes with batches of 16 therefore train on the same global batches
    as one process with batches of 32. A process may have no rows of an incomplete batch: then its batch is
    `[]`.

    Attributes:
        skip: Number of batches to leave out at the start of the epoch, which an interrupted run has done.
    """

    def __init__(
        self,
        lengths: Tensor,
        batch_size: int,
        seed: int,
        bucketed: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.lengths = lengths
        self.size = batch_size * world_size
        self.seed = seed
        self.bucketed = bucketed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._global_batches()[self.skip :]:
            yield batch[self.rank :: self.world_size].tolist()

    def rows(self, first: int, last: int) -> list[int]:
        """Returns the rows of all processes in the epoch's batches from `first` to `last`, counted from 0."""
        return [row for batch in self._global_batches()[first : last + 1] for row in batch.tolist()]

    def _global_batches(self) -> list[Tensor]:
        return training_order(self.lengths, self.size, self.bucketed, self.seed, self.epoch)

    def __len__(self) -> int:
        """Returns the number of batches of an epoch, including those to skip, as Lightning counts."""
        return math.ceil(len(self.lengths) / self.size)


class EvaluationBatches(Sampler[list[int]]):
    """Every example once over all processes, sorted by length, always in the same order.

    The last batch may be short, and a process may have one batch fewer than another.
    """

    def __init__(self, lengths: Tensor, batch_size: int, rank: int = 0, world_size: int = 1):
        order = lengths.argsort(stable=True)
        shares = [batch[rank::world_size].tolist() for batch in order.split(batch_size * world_size)]
        self.batches = [share for share in shares if share]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
