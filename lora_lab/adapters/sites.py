"""Where adapters are placed: from the names that a user gives to the modules of a model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from typing import TypeVar

import regex
import torch
from torch import nn

from lora_lab.adapters.maps import is_router, stacked
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.errors import TargetError, suggest
from lora_lab.models.architectures import (
    FUSED,
    RoleSite,
    find_roles,
    head_paths,
    layer_of,
    reads_text,
    roles_of,
)
from lora_lab.models.quantization import holds_codes

Value = TypeVar("Value")
SpecType = TypeVar("SpecType", bound=AdapterSpec)

SPLIT_FIRST = (
    "Split the attention first, by `model.split_fused: true` or in Python `lora_lab.split_attention(model)`; "
    "it then has linear layers `query`, `key`, `value` and `output` to target."
)
"""What to do where `nn.MultiheadAttention` prevents adapters."""


@dataclass(frozen=True)
class Site:
    """A place in a model where an adapter may be placed."""

    path: str
    """Path of the module in the model, `model.layers.3.self_attn.q_proj`."""

    module: nn.Module
    """The frozen module at that place."""

    role: str | None = None
    """What the module does (`query`), where the architecture is known."""

    layer: int | None = None
    """Index of its block, counted from 0."""

    seed: int = 0
    """Seed of the random start of the adapter here; a function of the run's seed and the path alone."""

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Seeds torch's CPU generator with this site's seed inside; its state outside is unchanged."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            yield


def find_sites(
    model: nn.Module, spec: AdapterSpec, accepts: Callable[[nn.Module], bool], seed: int = 0
) -> list[Site]:
    """Resolves a spec's `targets` and `layers` on a model.

    Args:
        model: the model, not yet adapted.
        spec: gives `targets`, `exclude`, `layers` and `modules_to_save`.
        accepts: whether the method can edit a module.
        seed: the run's seed.

    Returns:
        The sites in the model's own order, each module once.

    Raises:
        TargetError: if a target matches nothing, or a module that the method cannot edit; if a layer does not
            exist; if a target is inside a fully trained module.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    roles = {found.path: found for found in find_roles(model)}
    saved = saved_modules(model, spec)
    targets = [spec.targets] if isinstance(spec.targets, str) else spec.targets
    matched: dict[str, str] = {}
    default = targets == _default_targets(spec)
    for target in targets:
        paths = [path for path in _matching(target, model, modules, roles, saved, accepts)]
        if default:
            # A default names a role; a map that has several roles takes its place.
            paths += [path for path, found in roles.items() if found.role in FUSED.get(target, ())]
            # Text does not reach the parts of a model for images or sound.
            paths = [path for path in paths if reads_text(model, path)]
        if not paths:
            raise TargetError(_no_match(target, model, modules))
        matched.update(dict.fromkeys(paths, target))
    for name in spec.exclude:
        left_out = [path for path in matched if _names_or_holds(name, path, roles)]
        parts = [p for path in matched for p in parts_of(spec, Site(path, modules[path])).values()]
        if not left_out and not any(_names_or_holds(name, part.path, {}) for part in parts):
            endings = {path.rpartition(".")[2] for path in matched}
            raise TargetError(f"adapter.exclude: '{name}' is in none of the targets{suggest(name, endings)}")
        for path in left_out:
            del matched[path]
    for path in list(matched):
        site = Site(path, modules[path])
        if parts_of(spec, site) and not part_specs(spec, site):
            del matched[path]
    if not matched:
        raise TargetError("adapter.exclude: leaves out everything that targets name; shorten one of them.")
    for path, target in matched.items():
        _refuse_impossible(path, target, model, saved, accepts, spec.method)
    layers = {path: roles[path].layer if path in roles else layer_of(path) for path in matched}
    if spec.layers is not None:
        missing = sorted(set(spec.layers) - {layer for layer in layers.values() if layer is not None})
        if missing:
            known = sorted({layer for layer in layers.values() if layer is not None})
            raise TargetError(
                f"adapter.layers: the targets {targets} have no layer {missing}; their layers are {known}."
            )
    order = {path: index for index, path in enumerate(modules)}
    sites = [
        Site(
            path,
            modules[path],
            roles[path].role if path in roles else None,
            layers[path],
            site_seed(seed, path),
        )
        for path in sorted(matched, key=order.__getitem__)
        if spec.layers is None or layers[path] in spec.layers
    ]
    _check_patterns(spec, sites)
    return sites


def saved_modules(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Returns the paths of the modules to train fully: those of the spec, or else the model's new task head.

    Raises:
        TargetError: if a name in `modules_to_save` matches no module, or a module that cannot be trained.
    """
    if spec.modules_to_save is None:
        return head_paths(model)
    found = []
    for name in spec.modules_to_save:
        paths = [path for path, _ in model.named_modules() if path and ends_with(path, name)]
        if not paths:
            names = {path.rpartition(".")[2] for path, _ in model.named_modules() if path}
            raise TargetError(f"adapter.modules_to_save: no module '{name}'{suggest(name, names)}")
        quantised = [path for path in paths if holds_codes(model.get_submodule(path))]
        if quantised:
            raise TargetError(
                f"adapter.modules_to_save: {quantised[0]} holds codes, which cannot be trained; name its "
                "other parts, or set model.quantization to none."
            )
        empty = [path for path in paths if next(model.get_submodule(path).parameters(), None) is None]
        if empty:
            raise TargetError(f"adapter.modules_to_save: {empty[0]} has no parameters to train; remove it.")
        found += paths
    # A module inside another one of the list is trained with it.
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def exact_targets(paths: list[str], modules: Mapping[str, nn.Module]) -> str | list[str]:
    """Returns targets that name these modules and no others: their paths, where no other path ends alike."""
    if all(sum(ends_with(other, path) for other in modules) == 1 for path in paths):
        return paths
    return "regex:" + "|".join(map(re.escape, paths))


def match_regex(pattern: str, path: str, field: str, whole: bool = False) -> bool:
    """Returns whether a pattern matches a path from its start (or the whole of it), in bounded time.

    Args:
        pattern: a regular expression, perhaps from an unknown source.
        path: a module's path.
        field: the field that holds the pattern, for messages.
        whole: whether the match must reach the path's end.

    Raises:
        TargetError: if it is not a regular expression, or takes more than a second.
    """
    try:
        match = regex.fullmatch if whole else regex.match
        return match(pattern, path, timeout=1.0) is not None
    except regex.error as error:
        raise TargetError(f"adapter.{field}: '{pattern}' is not a regular expression: {error}.") from None
    except TimeoutError:
        raise TargetError(
            f"adapter.{field}: '{pattern}' takes more than a second on '{path}'; write a simpler pattern."
        ) from None


def match_pattern(pattern: Mapping[str, Value], site: Site) -> Value | None:
    """Returns the value of the first key that is the site's role, path ending or a regex of it, or None."""
    for key, value in pattern.items():
        if key == site.role or match_regex(rf"(.*\.)?({key})$", site.path, "rank_pattern or alpha_pattern"):
            return value
    return None


def is_named(site: Site, target: str) -> bool:
    """Whether a target names a site, by its role, path ending or pattern, as in `find_sites`."""
    if target.startswith("regex:"):
        return match_regex(target.removeprefix("regex:"), site.path, "targets", whole=True)
    return target == site.role or ends_with(site.path, target)


def site_spec(spec: SpecType, site: Site) -> SpecType:
    """Returns the spec for one site, with its `rank_pattern` and `alpha_pattern` resolved."""
    found: dict[str, float] = {}
    for name in ("rank", "alpha"):
        value = match_pattern(getattr(spec, f"{name}_pattern", {}), site)
        if value is not None:
            found[name] = value
    return spec.for_site(found) if found else spec


def parts_of(spec: AdapterSpec, site: Site) -> dict[str, Site]:
    """Returns the parameters inside a site's module that count as separate places, by name."""
    if not spec.names_parts:
        return {}
    return {name: replace(site, path=f"{site.path}.{name}", role=None) for name in stacked(site.module)}


def part_specs(spec: SpecType, site: Site) -> dict[str, SpecType]:
    """Returns the spec of each of `parts_of` that `exclude` leaves; patterns are resolved."""
    return {
        name: site_spec(spec, part)
        for name, part in parts_of(spec, site).items()
        if not any(_names_or_holds(word, part.path, {}) for word in spec.exclude)
    }


def _matching(
    target: str,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    roles: Mapping[str, RoleSite],
    saved: list[str],
    accepts: Callable[[nn.Module], bool],
) -> list[str]:
    """Returns the paths that one target names."""
    if target in ("all", "all-linear"):
        linear = target == "all-linear"
        head = {id(_output_head(model))} if linear else set()
        return [
            path
            for path, module in modules.items()
            if accepts(module)
            and (not linear or hasattr(module, "in_features"))
            and id(module) not in head
            and not is_router(module)
            and not _inside(path, saved)
        ]
    if target.startswith("regex:"):
        pattern = target.removeprefix("regex:")
        return [path for path in modules if match_regex(pattern, path, "targets", whole=True)]
    by_role = [path for path, found in roles.items() if found.role == target]
    return by_role or [path for path in modules if ends_with(path, target)]


def _names_or_holds(name: str, path: str, roles: Mapping[str, RoleSite]) -> bool:
    """Whether a name in `exclude` means a module or one around it."""
    if name.startswith("regex:"):
        return match_regex(name.removeprefix("regex:"), path, "exclude", whole=True)
    if path in roles and roles[path].role == name:
        return True
    return any(ends_with(path[: end.start()], name) for end in re.finditer(r"\.|$", path))


def _refuse_impossible(
    path: str,
    target: str,
    model: nn.Module,
    saved: list[str],
    accepts: Callable[[nn.Module], bool],
    method: str,
) -> None:
    """Raises for a matched module on which an adapter could not work."""
    module = model.get_submodule(path)
    around = _computed_past(path, model, accepts)
    if around is not None:
        raise TargetError(
            f"adapter.targets: '{target}' matches {path}, a part of {around} reads the weight and never "
            f"calls the module: an adapter there would have no effect. {SPLIT_FIRST}"
        )
    if not accepts(module):
        fused = isinstance(module, nn.MultiheadAttention)
        raise TargetError(
            f"adapter.targets: '{target}' matches {path}, a {type(module).__name__}, which {method} cannot "
            f"edit. {SPLIT_FIRST if fused else 'Name the modules inside it, or narrow the pattern.'}"
        )
    if _inside(path, saved):
        raise TargetError(
            f"adapter.targets: '{target}' matches {path}, which is fully trained (modules_to_save: {saved}). "
            "Take it out of one of the two."
        )


def _computed_past(path: str, model: nn.Module, accepts: Callable[[nn.Module], bool]) -> str | None:
    """Names the module around this one that reads its weight without calling it; None if there is none."""
    ends = [0, *(dot.start() for dot in re.finditer(r"\.", path))]
    for around in (model.get_submodule(path[:end]) for end in ends):
        attention, name = around, "nn.MultiheadAttention, which"
        # Torch's kernel for a whole layer needs the batch first.
        if isinstance(around, nn.TransformerEncoderLayer) and getattr(around.self_attn, "batch_first", False):
            attention, name = around.self_attn, "nn.TransformerEncoderLayer, which in evaluation"
        # A method that also accepts the attention itself trains copies, and these are read.
        if isinstance(attention, nn.MultiheadAttention) and not (
            accepts(attention) and accepts(attention.out_proj)
        ):
            return name
    return None


def _default_targets(spec: AdapterSpec) -> object:
    """Returns the targets of a method whose user names none."""
    factories = (f.default_factory for f in fields(spec) if f.name == "targets")
    return next((factory() for factory in factories if factory is not MISSING), None)


def _no_match(target: str, model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    roles = roles_of(model)
    names = {path.rpartition(".")[2] for path in modules if not path.rpartition(".")[2].isdigit()}
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    known_roles = f"its roles are {', '.join(roles)}" if roles else "it has no roles"
    held = [role for role in FUSED.get(target, ()) if role in roles]
    if held:
        known_roles += f"; {target} is a part of {held[0]}: name that, or try model.split_fused: true"
    if target in ("all", "all-linear"):
        return f"adapter.targets: {kind} has no module that the method can edit with '{target}'; name others."
    first = {id(module): path for path, module in modules.items()}
    for path, module in model.named_modules(remove_duplicate=False):
        if path not in modules and id(module) in first and ends_with(path, target):
            own = first[id(module)]
            return f"adapter.targets: '{target}' is the same module as '{own}'; name it by that."
    known = suggest(target, names | set(roles) | {"all-linear"})
    fault = f"adapter.targets: {kind} has no '{target}' ({known_roles}); name what it has{known}"
    fused = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    split = fused and target in ("query", "key", "value", "output")
    return f"{fault.rstrip('.')}. {SPLIT_FIRST}" if split else fault


def _check_patterns(spec: AdapterSpec, sites: list[Site]) -> None:
    """Raises for a pattern that matches no site, which would be ignored without a message."""
    places = [*sites, *(part for site in sites for part in parts_of(spec, site).values())]
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(spec, name, {}):
            if not any(match_pattern({key: True}, site) for site in places):
                known = {site.role or site.path.rpartition(".")[2] for site in places}
                raise TargetError(f"adapter.{name}: '{key}' matches no adapted module{suggest(key, known)}")


def ends_with(path: str, name: str) -> bool:
    """Returns whether a path is `name` or ends in it after a dot."""
    return path == name or path.endswith(f".{name}")


def _inside(path: str, parents: list[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def site_seed(seed: int, path: str) -> int:
    """Mixes seed and path, so that a start depends neither on the order of wrapping nor on other sites."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "big") >> 1
