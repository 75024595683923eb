"""Which module of a transformer does what: one vocabulary of roles for every architecture.

A role is the job of a module inside a block ("query", "down"), so one list of targets fits all models. It is
found by structure. A block is an entry of an outermost list of modules. An attention is where there are
projections named as queries, keys and values side by side, or one map as wide as all three. A feed-forward
part is a pair of maps, up from the hidden width and down to it again. Names decide only what shapes cannot:
which projection is the query, and which of two equal maps is the gate. A fused projection has its own role:
GPT-2 has no "query" but a "query_key_value", unless built with `split_fused`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

_ATTENTION = (
    "query",
    "key",
    "value",
    "query_key_value",
    "query_key",
    "key_value",
    "attention_output",
)
ROLES = (
    *_ATTENTION,
    *(f"cross_{role}" for role in _ATTENTION),
    "up",
    "gate",
    "gate_up",
    "down",
    "block",
    "head",
)
"""All roles, in the order in which they are listed to users."""

FUSED = {
    f"{cross}{role}": tuple(f"{cross}{fused}" for fused in inside)
    for cross in ("", "cross_")
    for role, inside in {
        "query": ("query_key_value", "query_key"),
        "key": ("query_key_value", "query_key", "key_value"),
        "value": ("query_key_value", "key_value"),
    }.items()
} | {"up": ("gate_up",), "gate": ("gate_up",)}
"""For each role, the roles of fused maps that contain it."""

USUAL_HEADS = ("pre_classifier", "classifier", "score", "classification_head")
"""Names of task heads at the root of a model without a base model inside it."""

_TASK_MODEL = re.compile(r"Classification|QuestionAnswering|MultipleChoice")

_SENSES = re.compile(r"vision|visual|image|img|audio|speech|qformer")
"""Names in transformers of parts that do not read text."""

_POSITIONS = re.compile(r"(?<!rel_)(?<!relative_)position|^wpe$")
"""Names of tables of absolute positions."""

Kind = Literal["encoder", "decoder", "encoder_decoder", "vision"]


@dataclass(frozen=True)
class RoleSite:
    """One module that has a role."""

    path: str
    """Full module path, "model.layers.3.self_attn.q_proj"."""
    role: str
    """One of `ROLES`."""
    layer: int | None
    """Number of its block within the stack, from 0; None for a head."""
    block: str
    """Path of its block, "model.layers.3": equal for parts of one block; "" for a head."""


def kind_of(model_type: str) -> Kind | None:
    """Returns the kind of an architecture of transformers: only a decoder models text from left to right.

    None for a type that the installed transformers does not know.
    """
    if model_type not in CONFIG_MAPPING:
        return None
    if getattr(CONFIG_MAPPING[model_type], "is_encoder_decoder", False):
        return "encoder_decoder"
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    if model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return "encoder"
    return "vision" if model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES else None


def find_roles(model: nn.Module) -> list[RoleSite]:
    """Finds every module of the model that has a role.

    Args:
        model: A model of `transformers`, bare or with a task head, adapted or not.

    Returns:
        The sites in the model's own order, each block before its parts, the heads at the end. Empty for a
        module without a `config`, whose names can mean anything.
    """
    if not hasattr(model, "config"):
        return []
    sites = []
    sizes = _size(model, "hidden_size"), head_width(model)
    for path, block, layer in _blocks(model):
        roles = _Block(block, *sizes).roles()
        sites.append(RoleSite(path, "block", layer, path))
        sites += [RoleSite(f"{path}.{inside}", role, layer, path) for inside, role in roles.items()]
    return sites + [RoleSite(path, "head", None, "") for path in head_paths(model)]


def reads_text(model: nn.Module, path: str) -> bool:
    """Whether a module of a model that reads text is reached without images and sound.

    True for every module of other models, such as those of images only.
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return True
    return not any(_SENSES.search(name) for name in path.lower().split("."))


def roles_of(model: nn.Module) -> list[str]:
    """Returns the roles that exist in this model, in the order of `ROLES`."""
    present = {site.role for site in find_roles(model)}
    return [role for role in ROLES if role in present]


def head_paths(model: nn.Module) -> list[str]:
    """Returns the paths of the newly initialised task heads, which must be trained with any adapter.

    In a task model of transformers these are the modules next to the base model; the language-modelling head
    and BERT's pooler are pretrained and do not count. Other modules are searched for the usual names.
    """
    children = dict(model.named_children())
    base = children.get(getattr(model, "base_model_prefix", ""))
    if base is not None and _TASK_MODEL.search(type(model).__name__):
        return [name for name, child in children.items() if child is not base and list(child.parameters())]
    return [name for name in USUAL_HEADS if name in children]


def head_width(model: nn.Module) -> int | None:
    """Returns the width of an attention head.

    Args:
        model: Any module.

    Returns:
        The width by the model's config; None if no config has it.
    """
    if width := _size(model, "head_dim"):
        return width
    size, heads = _size(model, "hidden_size"), _size(model, "num_attention_heads")
    return size // heads if size and heads else None


def _size(model: nn.Module, name: str) -> int | None:
    """Returns a number of the model's config; None if it is missing, or differs between layers."""
    try:
        found = getattr(getattr(model, "config", None), name, None)
    except RuntimeError:  # transformers raises it for configs that vary by layer
        return None
    return found if isinstance(found, int) else None


def between_query_and_key(model: nn.Module, query: str) -> str | None:
    """Returns what is between the projections of queries and keys and their dot product.

    Args:
        model: A model of `transformers`.
        query: Path of the projection of queries.

    Returns:
        "a rotation by position", the name of a norm or of a projection of positions; None if scores are plain
        dot products, possibly with added terms.
    """
    rotary = ("rope_parameters", "rope_theta", "rotary_dim")
    if any(getattr(getattr(model, "config", None), name, None) for name in rotary):
        return "a rotation by position"
    attention = model.get_submodule(query.rpartition(".")[0])
    named = (name for name, _ in attention.named_children())
    return next((name for name in named if re.search(r"norm|^pos_\w+_proj$", name)), None)


def layer_of(path: str) -> int | None:
    """Returns the first number in a module path ("encoder.layer.3.output" → 3), None if there is none.

    For modules of an unknown architecture.
    """
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(match[1]) if match else None


# Blocks


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yields path, module and number of each block: the entries of outermost lists that hold linear maps."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or path.startswith(tuple(inside)):
            continue
        entries = list(_entries(module, path))
        if any(_is_block(entry) for _, entry in entries):
            inside.append(f"{path}.")
            yield from ((name, entry, number) for number, (name, entry) in enumerate(entries))


def _entries(modules: nn.ModuleList, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the entries of a list; a list directly inside it is replaced by its entries (Funnel)."""
    for name, entry in modules.named_children():
        inside = f"{path}.{name}"
        if isinstance(entry, nn.ModuleList):
            yield from _entries(entry, inside)
        else:
            yield inside, entry


def _is_block(module: nn.Module) -> bool:
    return widths(module) is None and sum(1 for _ in _linears(module)) > 1


def _linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields path and widths of a module's linear maps, without maps inside others."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if found := widths(child):
            yield path, found
        else:
            yield from _linears(child, f"{path}.")


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Returns the widths (in, out) of a linear map, `Conv1D` or convolution of width 1; None for others."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Conv1d) and module.kernel_size == (1,):
        return module.in_channels, module.out_channels
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    # A projection that was split has no weight; its three parts have the roles.
    if isinstance(found[0], int) and isinstance(found[1], int):
        return found[0], found[1]
    return None


# Parts of a block

_FILLERS = frozenset(
    "proj projection project lin linear layer dense c to w head att attn attention self in fc matrix conv1d "
    "norm layernorm ln base".split()
)
"""Words in a module's name that say nothing about its job."""
_PARTS = {
    "q": "query",
    "query": "query",
    "wq": "query",
    "q_gate": "query",  # fused with a gate on the attention's output
    "q_b": "query",  # the second of two thin maps (DeepSeek's latent attention), as is kv_b
    "wq_b": "query",
    "k": "key",
    "key": "key",
    "wk": "key",
    "v": "value",
    "value": "value",
    "wv": "value",
    "qkv": "query_key_value",
    "wqkv": "query_key_value",
    "query_key_value": "query_key_value",
    "qk": "query_key",
    "query_key": "query_key",
    "kv": "key_value",
    "wkv": "key_value",
    "key_value": "key_value",
    "kv_b": "key_value",
    "wkv_b": "key_value",
}
_OUTPUTS = ("o", "out", "output", "wo", "post", "")
_DOWNS = ("down", "2", "fc2", "lin2", "linear2", "w2", "wo", "out", "output", "4h_h", "ffn_output", "")
_UPS = ("up", "1", "fc1", "lin1", "linear1", "w3", "wi", "wi_1", "intermediate", "h_4h", "ffn", "")
_GATES = ("w1", "wi_0")
_OTHERS = re.compile(r"(^|_)(gate|g|global|q|k|v|qkv|kv|query|key|value|index|indexer)(_|$)")
"""Words in the name of a map inside an attention that is not the output projection."""
_CROSS = re.compile(r"cross|encoder_attn|enc_?dec|inter_?attention|encoder_attention")
_NORM = re.compile(r"norm[._]|^ln_")
"""Maps inside a norm that depends on its input are not feed-forward parts."""
_ATTENTIVE = re.compile(r"att(entio)?n?$|att(entio)?n[._]|^att")


def job(path: str) -> tuple[str, str]:
    """Returns the part of a path that names the module's job, and the path up to there.

    "self_attn.q_proj" is ("q", "self_attn.q_proj"), "output.dense" is ("output", "output"); inside an
    attention, a name without such a part gives ("", "attn.c_proj").
    """
    name, _, parents = path[::-1].partition(".")
    leaf, parent = name[::-1], parents[::-1]
    words = [word for word in re.split(r"[_.]", leaf.lower()) if word not in _FILLERS]
    said = "_".join(words)
    if (not said or said.isdigit()) and parent and not _ATTENTIVE.search(parent.rpartition(".")[2].lower()):
        above, where = job(parent)
        if above in _PARTS or above in ("output", "intermediate"):
            return above, where
    return said, path


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _inside(path: str, container: str) -> bool:
    return not container or path.startswith(f"{container}.")


class _Block:
    """The linear maps of one block, and their roles.

    Args:
        block: The block.
        hidden: The model's hidden width, if its config names one.
        head: Width of an attention head, if its config has it.
    """

    def __init__(self, block: nn.Module, hidden: int | None, head: int | None):
        self.module = block
        self.head = head
        self.linears = dict(_linears(block))
        self.hidden = hidden
        self.found: dict[str, str] = {}
        self.jobs = {path: job(path) for path in self.linears}

    def roles(self) -> dict[str, str]:
        """Returns the role of each map that has one, by its path in the block, in the block's order."""
        taken = [scope for container in self._attentions() for scope in self._attention(container)]
        rest = [
            path
            for path in self.linears
            if path not in self.found
            and not any(_inside(path, scope) for scope in taken if scope)
            and not _NORM.search(path)
        ]
        self._feed_forward([path for path in rest if not self._convolves(path)])
        return {path: self.found[path] for path in self.linears if path in self.found}

    def _attentions(self) -> list[str]:
        """Finds projections of queries, keys and values; returns the modules around them."""
        parts: dict[str, dict[str, str]] = {}
        for path in self.linears:
            said, where = self.jobs[path]
            if said in _PARTS:
                parts.setdefault(_parent(where), {})[path] = _PARTS[said]
        for path, (width_in, width_out) in self.linears.items():
            container = _parent(path)
            named = parts.get(container, {})
            if path in named or not _ATTENTIVE.search(container.lower()):
                continue
            roles = set(named.values())
            # Keys and values for all heads of queries, or one head of each for all of them.
            if not roles and width_out in (3 * width_in, width_in + 2 * (self.head or width_in)):
                parts.setdefault(container, {})[path] = "query_key_value"
            elif roles == {"query"} and width_out == 2 * width_in:
                named[path] = "key_value"
        found = []
        for container, named in parts.items():
            if {word for role in named.values() for word in role.split("_")} == {"query", "key", "value"}:
                prefix = "cross_" if _CROSS.search(container.lower()) else ""
                self.found |= {path: prefix + role for path, role in named.items()}
                found.append(container)
        return found

    def _attention(self, container: str) -> list[str]:
        """Finds the output projection of an attention; returns the modules that only the attention has."""
        prefix = "cross_" if _CROSS.search(container.lower()) else ""
        parts = [path for path in self.found if _inside(path, container)]
        width = next(self.linears[path][0] for path in parts)
        if not prefix and self.hidden is None:
            self.hidden = width
        scope = container
        while True:
            rest = [path for path in self.linears if path not in self.found and _inside(path, scope)]
            named = [path for path in rest if self.jobs[path][0] in _OUTPUTS[:-1]]
            shaped = [
                path
                for path in rest
                if self.linears[path][1] == width
                and (self.jobs[path][0] in _OUTPUTS or (scope and path == rest[-1]))
                and not _OTHERS.search(self.jobs[path][0])
            ]
            if not scope:
                named = [path for path in named if self.jobs[path][0] != "output" or _parent(path) == ""]
                shaped = []
            both = [path for path in named if path in shaped]
            if output := next(iter(both or named or shaped), None):
                self.found[output] = f"{prefix}attention_output"
                return [scope]
            if not scope or not _ATTENTIVE.search(_parent(scope).lower()):
                return [container]
            scope = _parent(scope)

    def _convolves(self, path: str) -> bool:
        """Whether a map is part of a state-space or convolution module, which is not a feed-forward part."""
        around = self.module.get_submodule(_parent(path))
        # For maps directly in the block, a convolution elsewhere in the block means nothing.
        near = around.children() if around is self.module else around.modules()
        return any(isinstance(part, nn.Conv1d) and part.kernel_size != (1,) for part in near)

    def _feed_forward(self, paths: list[str]) -> None:
        """Finds pairs of maps up and down, in the innermost module that has both."""
        around = {scope for path in paths for scope in _scopes(path)}
        for scope in sorted(around, key=lambda scope: (-scope.count(".") - bool(scope), scope)):
            inside = [path for path in paths if path not in self.found and _inside(path, scope)]
            downs = [path for path in inside if self._ups(path, inside)]
            known = [path for path in downs if self.jobs[path][0] in _DOWNS]
            for down in known or downs:
                ups = self._ups(down, inside)
                known_ups = [path for path in ups if self._names_up(path)]
                self._assign(down, known_ups or ups)

    def _names_up(self, path: str) -> bool:
        said = self.jobs[path][0]
        return said in _UPS or said in _GATES or "gate" in said or "up" in said

    def _ups(self, down: str, paths: list[str]) -> list[str]:
        """Returns the maps that can come before a map down."""
        narrow, out = self.linears[down]
        if self.hidden is not None and out != self.hidden:
            return []
        said = self.jobs[down][0]
        if "gate" in said or (narrow == out and (said in _UPS[:-1] or paths[0] == down)):
            return []
        if narrow < out and said not in _DOWNS:  # a thin map next to the feed-forward part
            return []
        return [
            path
            for path in paths
            if path != down
            and path not in self.found
            and self.linears[path][0] == out
            and self.linears[path][1] in (narrow, 2 * narrow)
            and not (narrow == out and self.jobs[path][0] in _DOWNS[:-1])
        ]

    def _assign(self, down: str, ups: list[str]) -> None:
        if not ups or down in self.found:
            return
        self.found[down] = "down"
        narrow = self.linears[down][0]
        for path in ups:
            said = self.jobs[path][0]
            if self.linears[path][1] == 2 * narrow:
                self.found[path] = "gate_up"
            elif len(ups) > 1 and ("gate" in said or said in _GATES):
                self.found[path] = "gate"
            else:
                self.found[path] = "up"


def _scopes(path: str) -> Iterator[str]:
    """Yields the paths of the modules around a module, the innermost first, and last the block itself, ""."""
    while path:
        path = _parent(path)
        yield path


def position_limit(model: nn.Module) -> int | None:
    """Returns how many tokens of text a model has learned positions for; None if it counts in another way.

    Some tables begin after the padding token's index (RoBERTa), or at another offset (OPT).
    """
    limits = []
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name) and not _SENSES.search(path):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - getattr(module, "offset", skipped))
    return min(limits, default=None)
