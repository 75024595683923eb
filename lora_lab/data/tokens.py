"""Texts to token ids, kept on disk because the same texts are tokenised by every run of a study."""

import hashlib
import json
import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_lab.assets import cache_root
from lora_lab.data.examples import Examples
from lora_lab.errors import DataError

TEXTS_AT_ONCE = 1000
SHOW_PROGRESS_FROM = 5000
LAYOUT = 1
"""Goes up when the stored tensors change their meaning."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """Token ids of all examples, end to end."""

    ids: Tensor
    """`(tokens,)` int32."""
    offsets: Tensor
    """`(examples + 1,)` int64; example i owns `ids[offsets[i]:offsets[i + 1]]`."""
    types: Tensor | None
    """`(tokens,)` int32: first or second text of a pair, where the tokenizer tells."""
    prompts: Tensor
    """`(examples,)` int64: tokens at the front that are given and not to be learned."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each example, `(examples,)`."""
        return self.offsets.diff()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a sha256 that changes when the tokenizer would give other ids.

    Truncation and padding are left out of the backend's description: every call of the tokenizer alters them.
    """
    parts: dict[str, object] = {
        "class": type(tokenizer).__name__,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "sides": [tokenizer.truncation_side, tokenizer.padding_side],
        "inputs": tokenizer.model_input_names,
        "library": tokenizers.__version__,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts["backend"] = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def encode_chunk(
    examples: Examples, chunk: slice, tokenizer: PreTrainedTokenizerBase, causal: bool, max_length: int
) -> tuple[list[list[int]], list[list[int]] | None, list[int]]:
    """Tokenises some examples.

    A causal text ends with the end-of-text token where it fits and the tokenizer has one, so that a model
    learns to stop. Prompt and text are tokenised apart, which makes the border between them one of tokens.

    Returns:
        Ids and token types (or None) of each example, and the number of prompt tokens of each.
    """
    texts = examples.texts[chunk]
    if not causal:
        pairs = None if examples.pairs is None else examples.pairs[chunk]
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
        return encoded["input_ids"], encoded.get("token_type_ids"), [0] * len(texts)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    given: list[list[int]] = [[]] * len(texts)
    if examples.prompts is not None:
        given = tokenizer(examples.prompts[chunk], truncation=True, max_length=max_length)["input_ids"]
    learned = tokenizer(
        texts, truncation=True, max_length=max_length, add_special_tokens=examples.prompts is None
    )["input_ids"]
    learned = [ids if ids[-1:] == end else ids + end for ids in learned]
    joined = [(prompt + ids)[:max_length] for prompt, ids in zip(given, learned, strict=True)]
    return joined, None, [len(prompt) for prompt in given]


def encode(examples: Examples, tokenizer: PreTrainedTokenizerBase, causal: bool, max_length: int) -> Tokens:
    """Tokenises all examples, with a progress bar on a terminal when there are many."""
    count = len(examples.texts)
    chunks = [slice(start, start + TEXTS_AT_ONCE) for start in range(0, count, TEXTS_AT_ONCE)]
    hidden = count < SHOW_PROGRESS_FROM or not sys.stderr.isatty()
    ids: list[list[int]] = []
    types: list[list[int]] = []
    prompts: list[int] = []
    for chunk in track(chunks, description="Tokenising", transient=True, disable=hidden):
        some_ids, some_types, some_prompts = encode_chunk(examples, chunk, tokenizer, causal, max_length)
        ids += some_ids
        types += some_types or []
        prompts += some_prompts
    lengths = np.array([len(example) for example in ids])
    return Tokens(
        ids=torch.from_numpy(np.concatenate(ids).astype(np.int32)),
        offsets=torch.from_numpy(np.concatenate([[0], lengths.cumsum()])),
        types=torch.from_numpy(np.concatenate(types).astype(np.int32)) if types else None,
        prompts=torch.tensor(prompts),
    )


def check_causal(tokens: Tokens, origin: str, rows: list[int], max_length: int) -> None:
    """Checks that every example leaves at least one token to predict.

    Raises:
        DataError: If a prompt fills the whole length, or a text is a single token; names the row.
    """
    short = (tokens.lengths - tokens.prompts.clamp(min=1) < 1).nonzero().flatten().tolist()
    if not short:
        return
    row, prompt = rows[short[0]], int(tokens.prompts[short[0]])
    if prompt >= max_length:
        raise DataError(
            f"{origin}: row {row}: the prompt fills all of data.max_length={max_length} tokens and leaves "
            "none to learn; raise data.max_length or shorten the prompt"
        )
    raise DataError(
        f"{origin}: row {row}: the text is a single token and leaves none to predict; remove or lengthen it"
    )


def checksum(tensors: dict[str, Tensor]) -> str:
    """Returns the sha256 of names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def read_cache(path: Path) -> Tokens | None:
    """Returns the stored tokens, or None where there are none or they are damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            intact = (stored.metadata() or {}).get("sha256") == checksum(tensors)
    except (SafetensorError, OSError):
        intact = False
    if not intact:
        log.warning("%s is damaged; tokenising anew", path)
        return None
    return Tokens(tensors["ids"], tensors["offsets"], tensors.get("types"), tensors["prompts"])


def write_cache(path: Path, tokens: Tokens) -> None:
    """Stores the tokens in one step: other processes see the old file, none or the whole new one."""
    tensors = {"ids": tokens.ids, "offsets": tokens.offsets, "prompts": tokens.prompts}
    if tokens.types is not None:
        tensors["types"] = tokens.types
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft = Path(folder) / path.name
            save_file(tensors, draft, metadata={"sha256": checksum(tensors)})
            os.replace(draft, path)
    except OSError as fault:
        log.warning("tokens are not cached: %s", fault)


def tokenise(examples: Examples, tokenizer: PreTrainedTokenizerBase, causal: bool, max_length: int) -> Tokens:
    """Returns the examples' tokens, from the cache where they are there.

    Args:
        examples: Their texts; labels play no part.
        tokenizer: Of the model to be trained.
        causal: Whether prompt and text are joined for causal language modelling.
        max_length: Longest example in tokens.
    """
    texts = [examples.texts, examples.pairs, examples.prompts]
    key = json.dumps([LAYOUT, tokenizer_fingerprint(tokenizer), causal, max_length, texts])
    path = cache_root() / "tokens" / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    tokens = read_cache(path)
    if tokens is None:
        tokens = encode(examples, tokenizer, causal, max_length)
        write_cache(path, tokens)
    return tokens
