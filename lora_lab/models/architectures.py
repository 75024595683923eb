"""Where each architecture keeps its parts: one vocabulary of roles for all of them.

A role is the job of a module inside a transformer block ("query", "down"); the tables below translate it into
the names that each architecture of `transformers` uses, so that one list of targets fits them all. A fused
projection has a role of its own (`query_key_value`): GPT-2 has no "query" unless built with `split_fused`.
"""

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

ROLES = (
    "query",
    "key",
    "value",
    "query_key_value",
    "attention_output",
    "cross_query",
    "cross_key",
    "cross_value",
    "cross_attention_output",
    "up",
    "gate",
    "down",
    "block",
    "head",
)
"""All roles, in the order in which they are listed to users."""

USUAL_HEADS = ("pre_classifier", "classifier", "score", "classification_head")
"""Names of task heads at the root of a model whose architecture has no table."""


@dataclass(frozen=True)
class Architecture:
    """The module names of one architecture; all paths hold for the bare encoder and under any prefix."""

    kind: Literal["encoder", "decoder", "encoder_decoder", "vision"]
    """What it can be asked to do: only a decoder models text from left to right."""
    blocks: tuple[str, ...]
    """Paths of the lists of blocks; a block is `<list>.<number>`. Several stacks count their blocks apart."""
    roles: dict[str, tuple[str, ...]]
    """For each role the possible paths below the block; variants and versions differ, those present count."""
    heads: tuple[str, ...]
    """Freshly initialised task heads, children of the model's root."""


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
    """Path of its block, "model.layers.3": equal for parts that work together; "" for a head."""


def _bert(heads: tuple[str, ...] = ("classifier",), projection: str = "{}") -> Architecture:
    return Architecture(
        kind="encoder",
        blocks=("encoder.layer",),
        roles={
            "query": ("attention.self." + projection.format("query"),),
            "key": ("attention.self." + projection.format("key"),),
            "value": ("attention.self." + projection.format("value"),),
            "attention_output": ("attention.output.dense",),
            # A decoder which reads an encoder (`add_cross_attention`) has these too.
            "cross_query": ("crossattention.self.query",),
            "cross_key": ("crossattention.self.key",),
            "cross_value": ("crossattention.self.value",),
            "cross_attention_output": ("crossattention.output.dense",),
            "up": ("intermediate.dense",),
            "down": ("output.dense",),
        },
        heads=heads,
    )


def _llama() -> Architecture:
    return Architecture(
        kind="decoder",
        blocks=("layers",),
        roles={
            "query": ("self_attn.q_proj",),
            "key": ("self_attn.k_proj",),
            "value": ("self_attn.v_proj",),
            "attention_output": ("self_attn.o_proj",),
            "up": ("mlp.up_proj",),
            "gate": ("mlp.gate_proj",),
            "down": ("mlp.down_proj",),
        },
        heads=("score",),
    )


ARCHITECTURES: dict[str, Architecture] = {
    "bert": _bert(),
    "roberta": _bert(),
    "xlm-roberta": _bert(),
    "electra": _bert(),
    # DeBERTa pools inside the task model, so its pooler is as fresh as the classifier.
    "deberta-v2": _bert(heads=("pooler", "classifier"), projection="{}_proj"),
    "distilbert": Architecture(
        kind="encoder",
        blocks=("transformer.layer",),
        roles={
            "query": ("attention.q_lin",),
            "key": ("attention.k_lin",),
            "value": ("attention.v_lin",),
            "attention_output": ("attention.out_lin",),
            "up": ("ffn.lin1",),
            "down": ("ffn.lin2",),
        },
        heads=("pre_classifier", "classifier"),
    ),
    # The later names came with a 5.x release of transformers; the earlier ones are BERT's.
    "vit": Architecture(
        kind="vision",
        blocks=("layers", "encoder.layer"),
        roles={
            "query": ("attention.q_proj", "attention.attention.query"),
            "key": ("attention.k_proj", "attention.attention.key"),
            "value": ("attention.v_proj", "attention.attention.value"),
            "attention_output": ("attention.o_proj", "attention.output.dense"),
            "up": ("mlp.fc1", "intermediate.dense"),
            "down": ("mlp.fc2", "output.dense"),
        },
        heads=("classifier",),
    ),
    "gpt2": Architecture(
        kind="decoder",
        blocks=("h",),
        roles={
            "query": ("attn.c_attn.query",),
            "key": ("attn.c_attn.key",),
            "value": ("attn.c_attn.value",),
            "query_key_value": ("attn.c_attn",),
            "attention_output": ("attn.c_proj",),
            "up": ("mlp.c_fc",),
            "down": ("mlp.c_proj",),
        },
        heads=("score",),
    ),
    "opt": Architecture(
        kind="decoder",
        blocks=("decoder.layers",),
        roles={
            "query": ("self_attn.q_proj",),
            "key": ("self_attn.k_proj",),
            "value": ("self_attn.v_proj",),
            "attention_output": ("self_attn.out_proj",),
            "up": ("fc1",),
            "down": ("fc2",),
        },
        heads=("score",),
    ),
    "llama": _llama(),
    "mistral": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "gemma": _llama(),
    "gemma2": _llama(),
    "gemma3_text": _llama(),
    # The feed-forward part is layer.1 of an encoder block, layer.2 of a decoder block, after cross-attention.
    "t5": Architecture(
        kind="encoder_decoder",
        blocks=("encoder.block", "decoder.block"),
        roles={
            "query": ("layer.0.SelfAttention.q",),
            "key": ("layer.0.SelfAttention.k",),
            "value": ("layer.0.SelfAttention.v",),
            "attention_output": ("layer.0.SelfAttention.o",),
            "cross_query": ("layer.1.EncDecAttention.q",),
            "cross_key": ("layer.1.EncDecAttention.k",),
            "cross_value": ("layer.1.EncDecAttention.v",),
            "cross_attention_output": ("layer.1.EncDecAttention.o",),
            "up": tuple(f"layer.{n}.DenseReluDense.{name}" for n in (1, 2) for name in ("wi", "wi_1")),
            "gate": ("layer.1.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_0"),
            "down": ("layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"),
        },
        heads=("classification_head",),
    ),
}
"""The known architectures by `config.model_type`."""


def architecture_of(model: nn.Module) -> Architecture | None:
    """Returns the table of this model's architecture; None where its `config.model_type` has none."""
    return ARCHITECTURES.get(getattr(getattr(model, "config", None), "model_type", ""))


def find_roles(model: nn.Module) -> list[RoleSite]:
    """Finds every module of the model that has a role.

    Args:
        model: A model of `transformers`, bare or with a task head.

    Returns:
        The sites in the model's own order, each block before its parts, the heads at the end; empty for a
        model whose architecture has no table.
    """
    architecture = architecture_of(model)
    if architecture is None:
        return []
    lists = "|".join(re.escape(path) for path in architecture.blocks)
    is_block = re.compile(rf"(?:.+\.)?(?:{lists})\.(\d+)")
    modules = dict(model.named_modules())
    sites = []
    for path in modules:
        if match := is_block.fullmatch(path):
            sites.append(RoleSite(path, "block", int(match[1]), path))
            sites += _parts(architecture, modules, path, int(match[1]))
    return sites + [RoleSite(path, "head", None, "") for path in head_paths(model)]


def roles_of(model: nn.Module) -> list[str]:
    """Returns the roles that exist in this model, in the order of `ROLES`."""
    present = {site.role for site in find_roles(model)}
    return [role for role in ROLES if role in present]


def head_paths(model: nn.Module) -> list[str]:
    """Returns the paths of the freshly initialised task heads, which have to be trained whatever the adapter.

    The language-modelling head and BERT's own pooler come with the pretrained weights and are none. A model
    whose architecture has no table is searched for the usual names.
    """
    architecture = architecture_of(model)
    # `classifier` stands on every encoder with mean pooling, whatever head the architecture itself has.
    names = (*architecture.heads, "classifier") if architecture else USUAL_HEADS
    children = dict(model.named_children())
    return [name for name in dict.fromkeys(names) if name in children]


def head_width(model: nn.Module) -> int | None:
    """Returns how many numbers of query, key and value belong to one attention head.

    Args:
        model: Any module.

    Returns:
        The width by the model's config; None where it has no config that tells.
    """
    config = getattr(model, "config", None)
    if width := getattr(config, "head_dim", None):
        return int(width)
    size, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    return int(size) // int(heads) if size and heads else None


def between_query_and_key(model: nn.Module, query: str) -> str | None:
    """Names what stands between the projections of queries and keys and their dot product.

    Args:
        model: A model of `transformers`.
        query: Path of the projection of queries.

    Returns:
        "a rotation by position", the name of a norm or of a projection of positions; None where scores are
        plain dot products, whatever is added to them.
    """
    rotary = ("rope_parameters", "rope_theta", "rotary_dim")
    if any(getattr(getattr(model, "config", None), name, None) for name in rotary):
        return "a rotation by position"
    attention = model.get_submodule(query.rpartition(".")[0])
    named = (name for name, _ in attention.named_children())
    return next((name for name in named if re.search(r"norm|^pos_\w+_proj$", name)), None)


def layer_of(path: str) -> int | None:
    """Returns the first number in a module path ("encoder.layer.3.output" → 3), None where there is none.

    The layer of a module whose architecture has no table.
    """
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(match[1]) if match else None


def _parts(
    architecture: Architecture, modules: dict[str, nn.Module], block: str, layer: int
) -> list[RoleSite]:
    sites = []
    for role, paths in architecture.roles.items():
        for path in (f"{block}.{path}" for path in paths):
            # A split projection has no weight of its own, so that it loses its role to its three parts.
            if path in modules and hasattr(modules[path], "weight"):
                sites.append(RoleSite(path, role, layer, block))
    return sites
