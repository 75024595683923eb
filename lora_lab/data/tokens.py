"""Texts to token ids, cached on disk because every run of a study tokenises the same texts."""

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
LAYOUT = 3
"""Increased when the stored tensors change their meaning."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """Token ids of all examples, end to end."""

    ids: Tensor
    """`(tokens,)` int32."""
    offsets: Tensor
    """`(examples + 1,)` int64; example i owns `ids[offsets[i]:offsets[i + 1]]`."""
    types: Tensor | None
    """`(tokens,)` int32: first or second text of a pair, if the tokenizer says so."""
    prompts: Tensor
    """`(examples,)` int64: number of tokens at the start that are given and not learned."""
    cut: Tensor
    """`(examples,)` bool: whether tokens at the end were left out, as the example is too long."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each example, `(examples,)`."""
        return self.offsets.diff()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a sha256 that changes when the tokenizer would return other ids.

    Truncation and padding are not included, since every call of the tokenizer changes them in its backend.
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


def frame_of(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the special tokens that the tokenizer puts before and after a text."""
    bare, framed = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return [], []


def without_end(ids: list[int], *ends: list[int]) -> list[int]:
    """Returns the tokens without the first of these ends that matches."""
    found = next((end for end in ends if end and ids[-len(end) :] == end), [])
    return ids[: len(ids) - len(found)]


def without_start(ids: list[int], *starts: list[int]) -> list[int]:
    """Returns the tokens without the first of these starts that matches."""
    return ids[len(next((start for start in starts if start and ids[: len(start)] == start), [])) :]


def without_frame(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns texts without special tokens at their ends that the tokenizer adds itself.

    Models that read the class at the end of a text (T5, BART) need that token only once.
    """
    front, back = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in frame_of(tokenizer))

    def bare(text: str) -> str:
        inner = text.strip()
        if not ((front and inner.startswith(front)) or (back and inner.endswith(back))):
            return text
        return inner.removeprefix(front).removesuffix(back).strip()

    return [bare(text) for text in texts]


def encode_causal(
    examples: Examples, chunk: slice, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[list[int]], list[int], list[bool]]:
    """Tokenises some prompts and texts for causal language modelling.

    The tokenizer's start tokens occur once at the start, also if the prompt or text already contains them, as
    with chat templates. Its end tokens and the end-of-text token occur once at the end, if they fit, so that
    a model learns to stop only there: neither at the end of the prompt nor where a text is cut. Prompt and
    text are tokenised separately, so that no token crosses the border between them.

    Returns:
        Ids of each example, its number of prompt tokens, and whether it was cut.
    """

    def read(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    front, back = frame_of(tokenizer)
    start, stop = (
        [] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    end = without_end(back, stop) + stop
    texts = read(examples.texts[chunk])
    given: list[list[int]] = [[]] * len(texts)
    if examples.prompts is not None:
        prompts = [without_start(prompt, front) for prompt in read(examples.prompts[chunk])]
        given = [front + without_end(prompt, end, back, stop) for prompt in prompts]
        texts = [without_start(text, front, start) for text in texts]
    else:
        texts = [front + without_start(text, front) for text in texts]
    whole = [
        prompt + without_end(text, end, back, stop) + end for prompt, text in zip(given, texts, strict=True)
    ]
    return (
        [ids[:max_length] for ids in whole],
        [min(len(prompt), max_length) for prompt in given],
        [len(ids) > max_length for ids in whole],
    )


def encode_chunk(
    examples: Examples, chunk: slice, tokenizer: PreTrainedTokenizerBase, causal: bool, max_length: int
) -> tuple[list[list[int]], list[list[int]] | None, list[int], list[bool]]:
    """Tokenises some examples.

    Returns:
        Ids and token types (or None) of each example, the number of prompt tokens of each, and whether it was
        cut to `max_length`.
    """
    if causal:
        ids, prompts, cut = encode_causal(examples, chunk, tokenizer, max_length)
        return ids, None, prompts, cut
    texts = without_frame(examples.texts[chunk], tokenizer)
    pairs = None if examples.pairs is None else without_frame(examples.pairs[chunk], tokenizer)
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    if encoded.encodings is not None:
        cut = [bool(encoding.overflowing) for encoding in encoded.encodings]
    else:  # a tokenizer in Python
        whole = tokenizer(texts, pairs, verbose=False)["input_ids"]
        cut = [len(ids) < len(all_ids) for ids, all_ids in zip(encoded["input_ids"], whole, strict=True)]
    return encoded["input_ids"], encoded.get("token_type_ids"), [0] * len(texts), cut


def encode(examples: Examples, tokenizer: PreTrainedTokenizerBase, causal: bool, max_length: int) -> Tokens:
    """Tokenises all examples, with a progress bar on a terminal when there are many."""
    count = len(examples.texts)
    chunks = [slice(start, start + TEXTS_AT_ONCE) for start in range(0, count, TEXTS_AT_ONCE)]
    hidden = count < SHOW_PROGRESS_FROM or not sys.stderr.isatty()
    ids: list[list[int]] = []
    types: list[list[int]] = []
    prompts: list[int] = []
    cut: list[bool] = []
    for chunk in track(chunks, description="Tokenising", transient=True, disable=hidden):
        some_ids, some_types, some_prompts, some_cut = encode_chunk(
            examples, chunk, tokenizer, causal, max_length
        )
        ids += some_ids
        types += some_types or []
        prompts += some_prompts
        cut += some_cut
    lengths = np.array([len(example) for example in ids])
    return Tokens(
        ids=torch.from_numpy(np.concatenate(ids).astype(np.int32)),
        offsets=torch.from_numpy(np.concatenate([[0], lengths.cumsum()])),
        types=torch.from_numpy(np.concatenate(types).astype(np.int32)) if types else None,
        prompts=torch.tensor(prompts),
        cut=torch.tensor(cut),
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
    """Returns the stored tokens; None if they are missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            intact = (stored.metadata() or {}).get("sha256") == checksum(tensors)
    except (SafetensorError, OSError):
        intact = False
    if not intact:
        log.warning("%s is damaged; tokenising again", path)
        return None
    return Tokens(**{"types": None} | tensors)


def write_cache(path: Path, tokens: Tokens) -> None:
    """Stores the tokens in one step: other processes see the old file, no file or the complete new one."""
    tensors = {name: tensor for name, tensor in vars(tokens).items() if tensor is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft = Path(folder) / path.name
            save_file(tensors, draft, metadata={"sha256": checksum(tensors)})
            os.replace(draft, path)
    except OSError as fault:
        log.warning("tokens are not cached: %s", fault)


def tokenise(examples: Examples, tokenizer: PreTrainedTokenizerBase, causal: bool, max_length: int) -> Tokens:
    """Returns the examples' tokens, from the cache if they are there.

    Args:
        examples: Their texts; labels are not used.
        tokenizer: The model's tokenizer.
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
