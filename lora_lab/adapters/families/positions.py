"""Which tokens of the prompt are edited: what adapters of hidden states need to know of the model's input.

A block sees neither the padding mask nor where the prompt ends. One `Positions` is shared by the adapters of
a model and filled by a hook on the model itself, which runs before every forward. It is plain data and the
hook is its bound method, so that the model can still be copied and pickled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_lab.errors import IncompatibleError

Slots = tuple[Int[Tensor, "batch slots"], Bool[Tensor, "batch slots"]]
"""Indices into time, and which of them are in use: short prompts leave some idle."""


class Positions:
    """The edited positions of the model's present input.

    Attributes:
        counts: number of first (`f`) and last (`l`) tokens; empty if every token is edited.
        slots: the positions, under the keys of `counts`; empty while nothing is edited.
        shape: (batch, time) of the present input; None before the first.
    """

    def __init__(self, counts: Mapping[str, int]):
        self.counts = dict(counts)
        self.slots: dict[str, Slots] = {}
        self.shape: tuple[int, ...] | None = None
        self._names: list[str] = []

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Registers its hook on a model.

        Raises:
            IncompatibleError: if positions have no meaning in the model.
        """
        has_two_inputs = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if self.counts and (has_two_inputs or getattr(model, "main_input_name", "") == "pixel_values"):
            raise IncompatibleError(
                f"adapter.positions: {type(model).__name__} is an encoder-decoder or reads images, where a "
                "prompt's first and last tokens are not defined. Use positions: all."
            )
        self._names = list(signature(model.forward).parameters)
        return [model.register_forward_pre_hook(self._read, with_kwargs=True)]

    def _read(
        self, model: nn.Module, arguments: tuple[object, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[object, ...], dict[str, Any]]:
        """Finds the positions of one call, and removes `prompt_lengths` from it."""
        keywords = dict(keywords)
        prompt_lengths = keywords.pop("prompt_lengths", None)
        if self.counts:
            given = {**dict(zip(self._names, arguments, strict=False)), **keywords}
            self._find(given, prompt_lengths)
        return arguments, keywords

    def slots_of(self, hidden: Float[Tensor, "batch time width"]) -> dict[str, Slots]:
        """Returns the edited positions of a block's output.

        Raises:
            IncompatibleError: if the block returns other tokens than those of the model's input.
        """
        if self.shape != tuple(hidden.shape[:2]):
            raise IncompatibleError(
                f"adapter.positions: the block was called with {tuple(hidden.shape[:2])} tokens, the model "
                f"with {self.shape}. Call the whole model, or use positions: all."
            )
        return self.slots

    @contextmanager
    def of_rows(self, rows: Int[Tensor, " rows"]) -> Iterator[None]:
        """Holds the positions of some rows of the batch inside the context."""
        before = self.shape, self.slots
        if self.shape is not None:
            self.shape = (len(rows), *self.shape[1:])
            self.slots = {
                key: (index[rows.to(index.device)], used[rows.to(used.device)])
                for key, (index, used) in self.slots.items()
            }
        try:
            yield
        finally:
            self.shape, self.slots = before

    def _find(self, given: Mapping[str, Any], prompt_lengths: Tensor | None) -> None:
        names = [
            name for name in ("input_ids", "inputs_embeds", *given) if isinstance(given.get(name), Tensor)
        ]
        tokens = given[names[0]]
        self.shape, self.slots = tuple(tokens.shape[:2]), {}
        cached = cached_tokens(given)
        if cached and self.shape[1] > 1 and prompt_lengths is None:
            raise IncompatibleError(
                f"adapter.positions: {self.shape[1]} tokens at once follow {cached} in a cache, and may be of"
                " the prompt (prefill_chunk_size) or not (draft tokens). Read the prompt in one call; give"
                " what was written after it a token at a time, or with the keyword prompt_lengths."
            )
        if cached:
            return  # The cache holds the edited prompt; what comes now was generated.
        if given.get("use_cache") is False and prompt_lengths is None and not torch.is_grad_enabled():
            raise IncompatibleError(
                "adapter.positions: generation with use_cache: False shows the model prompt and answer as "
                "one text. Generate with a cache, or call the model with the keyword prompt_lengths."
            )
        mask = given.get("attention_mask")
        if mask is None:
            mask = torch.ones(self.shape, dtype=torch.long, device=tokens.device)
        if not isinstance(mask, Tensor) or mask.shape != self.shape:
            form = f"the shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise IncompatibleError(
                f"adapter.positions: {self.shape} tokens need an attention_mask of the same shape; got"
                f" {form}. Pass the tokenizer's mask with a dynamic cache (a static one changes it before the"
                " model is called), or use positions: all."
            )
        lengths = mask.sum(1) if prompt_lengths is None else prompt_lengths.to(mask.device)
        self.slots = prompt_slots(mask.long().argmax(1), lengths, self.counts, self.shape[1])


PLAIN = (Tensor, bool, int, float, str, torch.dtype, type(None))
"""Types of arguments that hold no earlier tokens."""


def cached_tokens(given: Mapping[str, Any]) -> int:
    """Returns how many tokens the cache of a call holds, under any name; 0 without one.

    Args:
        given: the call's arguments by name.

    Raises:
        IncompatibleError: if an argument may hold earlier tokens and does not say how many.
    """
    count = 0
    for name, value in given.items():
        if isinstance(value, PLAIN) or name == "attention_mask":
            continue
        try:
            count = max(count, int(value.get_seq_length()))
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise IncompatibleError(
                f"adapter.positions: the model is called with {name}, a {type(value).__name__} that does not "
                "say how many tokens it holds, so the prompt cannot be found. Leave it out, or use "
                "positions: all."
            ) from error
    return count


def read_counts(text: str) -> dict[str, int]:
    """Returns the numbers of first (`f`) and last (`l`) tokens in `f1+l2`; {} if it cannot be read."""
    parts = re.findall(r"([fl])([1-9]\d*)", text)
    written = "+".join(key + number for key, number in parts)
    readable = written == text and len(dict(parts)) == len(parts)
    return {key: int(number) for key, number in parts} if readable else {}


def prompt_slots(
    starts: Int[Tensor, " batch"], lengths: Int[Tensor, " batch"], counts: Mapping[str, int], time: int
) -> dict[str, Slots]:
    """Returns where the first and last tokens of each prompt are.

    Args:
        starts: index of each prompt's first token.
        lengths: its number of tokens N. At most ⌊N/2⌋ first and ⌈N/2⌉ last ones are used: they never overlap.
        counts: number of first (`f`) and last (`l`) tokens.
        time: number of tokens in a row.
    """
    starts, lengths = starts[:, None], lengths[:, None]  # (batch, 1)
    slots = {}
    for key, count in counts.items():
        step = torch.arange(count, device=starts.device)  # (slots,)
        if key == "f":
            index, used = starts + step, step < lengths // 2
        else:
            index, used = starts + lengths - 1 - step, step < (lengths + 1) // 2
        slots[key] = (index.clamp(0, time - 1), used)
    return slots
