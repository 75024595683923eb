"""Where a model comes from: one class for each kind of `model.name`.

    random:<architecture>   `RandomSource`: a tiny model of that architecture, weights drawn
    embedded:<asset>        `EmbeddedSource`: a model folder that is fetched once
    ./folder, /a/b, ~/x     `FolderSource`: a model folder
    owner/name              `HubSource`: a repository of the Hugging Face hub

`parse_source` reads the name once; everything else comes from the source.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lora_lab.assets import ASSETS, fetch, hub_reachable
from lora_lab.documents.reading import DocumentError, read_json
from lora_lab.errors import CheckpointError, ConfigError, LabError, suggest
from lora_lab.models.architectures import find_roles
from lora_lab.models.perceptron import MLP
from lora_lab.models.tiny import SPECIAL_TOKENS, TINY, character_tokenizer

EMBEDDED = {"minilm": "bert", "smollm2": "llama"}
"""Models that `embedded:<name>` fetches, and the architecture of each."""

DRAWN = "drawn_weights"
"""Attribute of a model with the names of its weights that were not in its files."""

AutoClass = type[_BaseAutoModelClass]
"""`AutoModel`, `AutoModelForCausalLM` and so on."""


def parse_source(name: str, revision: str | None = None, trust_remote_code: bool = False) -> "Source":
    """Returns the source that a model's name means.

    Args:
        name: As `ModelConfig.name`. A hub repository is written "name" or "owner/name"; a name that starts
            with ".", "/" or "~", has more parts, or exists as a folder is a folder.
        revision: Branch, tag or commit of a hub repository.
        trust_remote_code: Whether Python code next to the weights may run.
    """
    kind, colon, value = name.partition(":")
    if colon and kind == "random":
        return RandomSource(name, revision, trust_remote_code, value)
    if colon and kind == "embedded":
        return EmbeddedSource(name, revision, trust_remote_code, value)
    folder = Path(name).expanduser()
    if folder.is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return FolderSource(name, revision, trust_remote_code, folder)
    return HubSource(name, revision, trust_remote_code)


@dataclass(frozen=True)
class Source(ABC):
    """A place from which a model's config, tokenizer and weights come."""

    name: str
    """As the user wrote it."""
    revision: str | None
    trust_remote_code: bool

    @abstractmethod
    def faults(self, changes: Mapping[str, object]) -> list[str]:
        """Returns what is wrong with the name or the changes to the config, without a download.

        Each message starts with its key of `ModelConfig`.
        """

    @abstractmethod
    def stored_config(self) -> dict[str, Any]:
        """Returns what is known of the model's `config.json` without a download; empty if nothing is."""

    @property
    @abstractmethod
    def public_name(self) -> str | None:
        """The name under which others find the same weights; None if they are not public."""

    @abstractmethod
    def config(self, changes: Mapping[str, object]) -> PretrainedConfig:
        """Returns the config of transformers with the user's changes, whose keys are checked.

        Raises:
            ConfigError: if there is no such model, or a change has no meaning for it.
            AssetError: if an embedded model cannot be fetched.
        """

    @abstractmethod
    def tokenizer(self, changes: Mapping[str, object]) -> PreTrainedTokenizerBase:
        """Returns the tokenizer of a model that reads text.

        Raises:
            ConfigError: if there is none, or it has no vocabulary.
            AssetError: if an embedded model cannot be fetched.
        """

    @abstractmethod
    def weights(self, auto_class: AutoClass, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Returns the model; its attribute DRAWN, if it has one, names the weights that the files lack.

        Raises:
            CheckpointError: if weights are damaged, missing or have other shapes.
            ConfigError: if the class cannot be built from this source.
        """

    def weight_files(self) -> list[Path]:
        """Returns the safetensors files that the weights lie in; [] where there are none on this machine."""
        return []

    def stored_dtypes(self) -> set[str]:
        """Returns the types of the floating numbers in the weights' files, as safetensors calls them."""
        found: set[str] = set()
        with self._translated("model"):
            for path in self.weight_files():
                with safe_open(path, "pt") as file:
                    found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        return {name for name in found if "F" in name}

    @property
    def model_type(self) -> str | None:
        """The model type of transformers, if it is known without a download."""
        return self.stored_config().get("model_type")

    @property
    def folder(self) -> Path | None:
        """The model folder that the user named."""
        return None

    def _revision_faults(self) -> list[str]:
        if self.revision is None:
            return []
        return [f"revision: only hub repositories have revisions, and '{self.name}' is not one; remove it"]

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turns the errors of loading into one clear message each."""
        try:
            yield
        except LabError:
            raise
        except SafetensorError as error:
            raise CheckpointError(
                f"model.name: the weights of '{self.name}' are damaged ({_one_line(error)}); download or copy"
                " them again"
            ) from error
        except StrictDataclassError as error:
            raise ConfigError(f"model.config: {_one_line(error)}") from error
        except RuntimeError as error:
            raise CheckpointError(
                f"model.name: the weights of '{self.name}' do not fit ({_one_line(error)}); remove the sizes"
                " from model.config, or use data with as many classes as the model was trained for"
            ) from error
        except (
            OSError,
            ArithmeticError,
            AttributeError,
            ImportError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise ConfigError(
                f"model.name: no {what} can be built from '{self.name}'{self._absence()}: {_one_line(error)}."
                f" Check name, revision and model.config. Allowed: embedded:{'|'.join(EMBEDDED)},"
                " random:<architecture>, a local folder or a hub repository"
            ) from error

    def _absence(self) -> str:
        """Returns why the source may be missing, for messages."""
        return ""


@dataclass(frozen=True)
class RandomSource(Source):
    """A tiny model with random weights, which reads single characters."""

    architecture: str

    def faults(self, changes: Mapping[str, object]) -> list[str]:
        if self.architecture not in TINY:
            return [f"name: no random model '{self.architecture}'{suggest(self.architecture, TINY)}"]
        found = self._revision_faults()
        try:
            config = self.config(changes)
        except LabError as error:
            return [*found, str(error).removeprefix("model.")]
        smallest = len(SPECIAL_TOKENS) + 1
        if getattr(config, "vocab_size", smallest) < smallest:
            needs = f"must be at least {smallest}, for the special tokens and one character"
            found.append(f"config.vocab_size: {needs}")
        sizes = getattr(config, "sizes", [1])
        if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
            found.append(f"config.sizes: must be whole numbers above 0, the input width first; got {sizes}")
        return found

    def stored_config(self) -> dict[str, Any]:
        return {"model_type": MLP if self.architecture == "mlp" else self.architecture}

    @property
    def public_name(self) -> None:
        """Random weights are not public."""
        return None

    def config(self, changes: Mapping[str, object]) -> PretrainedConfig:
        sizes = TINY[self.architecture]
        with self._translated("model"):
            config_class = CONFIG_MAPPING[self.stored_config()["model_type"]]
            _raise_unknown_keys(changes, config_class(), set(sizes))
            return config_class(**_native(config_class, sizes) | _native(config_class, changes))

    def tokenizer(self, changes: Mapping[str, object]) -> PreTrainedTokenizerBase:
        return character_tokenizer(self.config(changes))

    def weights(self, auto_class: AutoClass, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Draws the weights; they depend on torch's global seed."""
        with self._translated("model"):
            return auto_class.from_config(config, dtype=dtype)


class PretrainedSource(Source):
    """A model that transformers loads by `from_pretrained`."""

    @abstractmethod
    def _location(self) -> str:
        """Returns what `from_pretrained` takes: a folder or a hub name."""

    def weight_files(self) -> list[Path]:
        if single := self._file(SAFE_WEIGHTS_NAME):
            return [single]
        index = self._file(SAFE_WEIGHTS_INDEX_NAME)
        with self._translated("model"):
            names = sorted(set(read_json(index)["weight_map"].values())) if index else []
        return [path for name in names if (path := self._file(name))]

    def _file(self, name: str) -> Path | None:
        """Returns a file of the source that is on this machine, by its name."""
        path = Path(self._location(), name)
        return path if path.is_file() else None

    def _options(self) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": True}

    def config(self, changes: Mapping[str, object]) -> PretrainedConfig:
        with self._translated("model"):
            config = AutoConfig.from_pretrained(self._location(), **self._options())
        _raise_unknown_keys(changes, config, set())
        for key, value in changes.items():
            setattr(config, key, value)
        return config

    def tokenizer(self, changes: Mapping[str, object]) -> PreTrainedTokenizerBase:
        with self._translated("tokenizer"):
            location = self._location()
            tokenizer = AutoTokenizer.from_pretrained(location, **self._options())
        # Without its files transformers builds a tokenizer of special tokens, added ones and marks such as
        # T5's word start: every word would be unknown.
        known = set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        if not any(word.strip("▁Ġ#").isalnum() for word in known):
            files = sorted(set(tokenizer.vocab_files_names.values()))
            raise ConfigError(
                f"model.name: '{self.name}' has no tokenizer with a vocabulary: none of {', '.join(files)} is"
                " there, or it is empty. Save the tokenizer into it: tokenizer.save_pretrained(folder)"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ConfigError(
                f"model.name: the tokenizer of '{self.name}' has neither a padding nor an end token"
            )
        return tokenizer

    def weights(self, auto_class: AutoClass, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        with self._translated("model"):
            model, report = auto_class.from_pretrained(
                self._location(),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **self._options(),
            )
        model.__dict__[DRAWN] = frozenset(report["missing_keys"])
        parts = {site.path for site in find_roles(model) if site.role not in ("block", "head")}
        missing = [key for key in sorted(report["missing_keys"]) if key.rpartition(".")[0] in parts]
        if missing:
            raise CheckpointError(
                f"model.name: '{self.name}' lacks {len(missing)} weights of {type(model).__name__}, for"
                f" example {missing[0]}; config.json and the weights do not belong together"
            )
        return cast(PreTrainedModel, model)


@dataclass(frozen=True)
class EmbeddedSource(PretrainedSource):
    """A model from the table of assets, fetched when needed."""

    asset: str

    def faults(self, changes: Mapping[str, object]) -> list[str]:
        if self.asset not in EMBEDDED:
            return [f"name: no embedded model '{self.asset}'{suggest(self.asset, EMBEDDED)}"]
        return self._revision_faults()

    def stored_config(self) -> dict[str, Any]:
        return {"model_type": EMBEDDED[self.asset]}

    @property
    def public_name(self) -> str | None:
        """The hub's name of the same files."""
        hub = ASSETS[self.asset].hub
        return hub.repository if hub else None

    def _location(self) -> str:
        return str(fetch(self.asset))


@dataclass(frozen=True)
class FolderSource(PretrainedSource):
    """A folder as `save_pretrained` writes it."""

    path: Path

    def faults(self, changes: Mapping[str, object]) -> list[str]:
        if not self.path.is_dir():
            fault = "does not exist; a hub repository is written 'owner/name'"
            return [f"name: the folder '{self.path}' {fault}"]
        if (self.path / "adapter_config.json").exists():
            fault = "holds an adapter, not a model; give the model that it was trained on"
            return [f"name: '{self.path}' {fault}"]
        if not (self.path / "config.json").exists():
            return [f"name: '{self.path}' has no config.json, so it is not a model folder"]
        try:
            self._read_config()
        except DocumentError as error:
            return [f"name: {error}"]
        if not any(self.path.glob("*.safetensors")):
            pickles = sorted(path.name for path in self.path.glob("*.bin"))
            reason = f"only {pickles[0]}, a pickle that may run code" if pickles else "no weights"
            fault = f"holds {reason}; safetensors are needed: convert with save_pretrained"
            return [f"name: '{self.path}' {fault}"]
        return self._revision_faults()

    def stored_config(self) -> dict[str, Any]:
        """Returns what the file holds; empty if it cannot be read."""
        try:
            return self._read_config()
        except DocumentError:
            return {}

    @property
    def public_name(self) -> str:
        """The folder, as it was written."""
        return self.name

    @property
    def folder(self) -> Path:
        """The folder, with "~" resolved."""
        return self.path

    def _read_config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise DocumentError(f"{path}: does not hold settings.")
        return stored

    def _location(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class HubSource(PretrainedSource):
    """A repository of the hub, or its copy in the hub's cache."""

    def faults(self, changes: Mapping[str, object]) -> list[str]:
        kind, colon, _ = self.name.partition(":")
        if colon:
            return [f"name: no source '{kind}' for '{self.name}'{suggest(kind, ('embedded', 'random'))}"]
        return []

    def stored_config(self) -> dict[str, Any]:
        """Nothing is known before the download."""
        return {}

    @property
    def public_name(self) -> str:
        """The repository."""
        return self.name

    def _location(self) -> str:
        return self.name

    def _file(self, name: str) -> Path | None:
        found = try_to_load_from_cache(self.name, name, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def _options(self) -> dict[str, Any]:
        # If the hub cannot be reached, its cache may hold the model; the client would first retry for half a
        # minute.
        offline = not hub_reachable()
        return super()._options() | {"revision": self.revision or "main", "local_files_only": offline}

    def _absence(self) -> str:
        return "" if hub_reachable() else " (the hub is not reachable from here)"


def _native(config_class: type[PretrainedConfig], changes: Mapping[str, object]) -> dict[str, Any]:
    """Renames common keys to the architecture's own ("hidden_size" → "n_embd")."""
    return {config_class.attribute_map.get(key, key): value for key, value in changes.items()}


def _raise_unknown_keys(changes: Mapping[str, object], config: PretrainedConfig, known: set[str]) -> None:
    known = known | config.to_dict().keys() | config.attribute_map.keys()
    for key in changes:
        if key in ("num_labels", "id2label", "label2id"):
            raise ConfigError(f"model.config.{key}: the number of classes comes from the data; remove it")
        if key not in known:
            near = get_close_matches(key, known, n=5, cutoff=0.4) or known
            raise ConfigError(f"model.config: {type(config).__name__} has no key '{key}'{suggest(key, near)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(". ")
