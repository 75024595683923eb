"""Adapter files of kohya-ss/sd-scripts and of LyCORIS as adapter folders, with the same updates.

A key is `<prefix>_<module's path with underscores for dots>.<tensor>`. ΔW of one module, with
s = alpha / rank (1 if alpha is missing or 0):

    LoRA    s lora_up lora_down                          `lora_down` of a convolution has its kernel
            s lora_up lora_mid lora_down                 instead a core lora_mid (rank, rank, *kernel) has it
    DoRA    W' = dora_scale (W + ΔW) / ‖W + ΔW‖          a LoRA with a magnitude for each output or each input
    LoHa    s (hada_w1_a hada_w1_b) ⊙ (hada_w2_a hada_w2_b)   with cores hada_t1, hada_t2 for a convolution
    LoKr    s lokr_w1 ⊗ lokr_w2                          each whole, or as a product `_a` `_b`; s = 1 if both
                                                         are whole; alpha has no effect
    IA3     W' = W (1 + weight)                          for each output, or each input if `on_input` is 1

The product of a core and lora_down is the lora_down of a convolution with its kernel. A bias stays as it is,
also with IA3, for which it is scaled here: a map with a bias is refused where its outputs are scaled.

Sources: `networks/lora.py` of sd-scripts; `modules/locon.py`, `loha.py`, `lokr.py` and `ia3.py` of LyCORIS.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lab.adapters.families.lycoris import factorization
from lora_lab.adapters.injection import AdapterSet, load_tensors, place
from lora_lab.adapters.maps import is_convolution, is_linear, sizes
from lora_lab.adapters.methods import METHODS
from lora_lab.adapters.sites import exact_targets
from lora_lab.adapters.storage import read_tensors
from lora_lab.artifacts.converting import Converted, store
from lora_lab.artifacts.opening import StoredAdapter, check_out
from lora_lab.errors import CheckpointError, ConfigError, IncompatibleError
from lora_lab.experiment import quiet_libraries
from lora_lab.linalg.rank import widened
from lora_lab.models.build import ModelConfig

PREFIX = re.compile(r"(lora_unet|lora_te\d?|lora_transformer|lycoris)_")
"""The names of models in such files, before the module's path."""

LORA = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
NAMES: dict[str, dict[str, str]] = {
    "lora": LORA,
    "dora": LORA | {"dora_scale": "lora_magnitude_vector"},
    "loha": {name: name for name in METHODS["loha"].peft.tensors},
    "lokr": {name: name for name in METHODS["lokr"].peft.tensors},
    "ia3": {"weight": "ia3_l"},
}
"""Method → its tensors in such files → PEFT's names of them."""

CORE, ON_INPUT = "lora_mid.weight", "on_input"
"""What such files hold besides: the core of a LoRA, and whether IA3 scales inputs."""

EXTRA = {"lora": {CORE}, "dora": {CORE}, "ia3": {ON_INPUT}}

VECTORS = {"lora_magnitude_vector", "ia3_l"}
"""Tensors that have other axes of length 1 in such files."""

Modules = Mapping[str, Mapping[str, Tensor]]
"""Module → its tensors, by the file's names."""


def import_file(
    file: str | os.PathLike[str], out: str | os.PathLike[str], base: str, prefix: str | None = None
) -> Converted:
    """Writes an adapter file of a language model as an adapter folder.

    Args:
        file: a safetensors file of sd-scripts or LyCORIS.
        out: the new adapter's folder; one that export, combine or import made is replaced.
        base: the base model, as `model.name`.
        prefix: see `place_file`.

    Raises:
        LabError: as `place_file`, or if the base cannot be built or the folder not be written.
    """
    quiet_libraries()
    check_out(out)
    path = Path(file)
    source = StoredAdapter(path, path, ModelConfig(name=base, task="causal_lm"), None, None)
    tensors = read_tensors(path)
    adapters = _place(source.build().eval(), tensors, str(path), prefix)
    made = {"by": "import", "file": path.name, "method": adapters.spec.method}
    store(adapters, out, source, {"made": made})
    ranks = {name: adapter.rank or 0 for name, adapter in adapters.items()}
    return Converted(Path(out), ranks, dict.fromkeys(ranks, 0.0))


def place_file(model: nn.Module, file: str | os.PathLike[str], prefix: str | None = None) -> AdapterSet:
    """Puts the adapters of a file of sd-scripts or LyCORIS into a model.

    Args:
        model: the base model, of any kind; it is unchanged after an error.
        file: a safetensors file whose modules are all of one method: LoRA, DoRA, LoHa, LoKr or IA3.
        prefix: what the keys of this model start with, without the last underscore; None takes the known one
            (`lora_unet`, `lora_te`, `lora_te1`, …, `lora_transformer`, `lycoris`) that all keys have. Keys
            with another prefix belong to another model and are left out.

    Raises:
        CheckpointError: if the file cannot be read, or its tensors do not fit the model.
        ConfigError: if the file has several prefixes and none is chosen, or not the chosen one.
        IncompatibleError: if a tensor of it is of another method, or the methods are mixed.
    """
    return _place(model, read_tensors(Path(file)), str(file), prefix)


def _place(model: nn.Module, tensors: Mapping[str, Tensor], what: str, prefix: str | None) -> AdapterSet:
    flat, alphas = _split(_chosen(tensors, what, prefix), what)
    method = _method(flat, what)
    paths = _paths(model, flat, what)
    modules = {path: model.get_submodule(path) for path in paths.values()}
    for path, module in modules.items():
        if not ((is_linear(module) or is_convolution(module)) and METHODS[method].accepts(module)):
            raise IncompatibleError(
                f"{what}: adapts {path}, a {type(module).__name__}, which {method} cannot edit here."
            )
    found = {path: _without_core(flat[name], f"{what}: {path}") for name, path in paths.items()}
    own = {path: alphas[name] for name, path in paths.items() if alphas.get(name)}
    if method == "ia3":
        options = _ia3(modules, found, own, what)
    else:
        options = _ranked(method, modules, found, own, what)
    make: Any = METHODS[method].Spec
    spec = make(targets=_exact(model, found), modules_to_save=[], **options)
    adapters = place(model, spec.for_stored())
    try:
        for path, adapter in adapters.items():
            given = {NAMES[method][name]: tensor for name, tensor in found[path].items()}
            kept = adapter.peft_tensors()
            for name in VECTORS & given.keys():
                if given[name].numel() == kept[name].numel():
                    given[name] = given[name].reshape(kept[name].shape)
            load_tensors(kept, given, f"{what}: {path}", write=False)
            adapter.load_peft_tensors(given)
            adapter.tensors_changed()
    except Exception:
        adapters.remove()
        raise
    return adapters


def _chosen(tensors: Mapping[str, Tensor], what: str, prefix: str | None) -> dict[str, Tensor]:
    """Returns the tensors with a prefix, without it."""
    if prefix is None:
        found = {key: match[1] if (match := PREFIX.match(key)) else None for key in tensors}
        if None in found.values() or not found:
            key = next((key for key, name in found.items() if name is None), "nothing")
            raise CheckpointError(
                f"{what}: holds {key}, which has no known prefix (lora_unet_, lora_te_, lycoris_). If "
                "another one stands before the module's path: --prefix NAME. An adapter folder needs no "
                "import."
            )
        prefixes = sorted({str(name) for name in found.values()})
        if len(prefixes) > 1:
            raise ConfigError(
                f"{what}: holds adapters of several models. Choose this base's: --prefix "
                f"{' or '.join(prefixes)}"
            )
        prefix = prefixes[0]
    start = f"{prefix}_"
    chosen = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
    if not chosen:
        raise ConfigError(f"--prefix {prefix}: nothing in {what} starts with {start}")
    return chosen


def _split(tensors: Mapping[str, Tensor], what: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Returns the tensors of each flattened name, and the alphas that are given."""
    known = {name for method, names in NAMES.items() for name in (*names, *EXTRA.get(method, ()))}
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        module, _, name = key.partition(".")
        if name == "alpha" and tensor.numel() == 1:
            alphas[module] = float(tensor)
        elif name in known and (tensor.is_floating_point() or (name == ON_INPUT and tensor.numel() == 1)):
            found[module][name] = tensor
        else:
            raise IncompatibleError(
                f"{what}: {key} is not read here, and without it the adapter would be another one. Read are "
                "LoRA (lora_down, lora_mid, lora_up) and DoRA (dora_scale next to it), LoHa (hada_…), LoKr "
                "(lokr_…) and IA3 (weight, on_input). Merge other files into their base with the program "
                "that wrote them."
            )
    if alone := [module for module in alphas if module not in found]:
        raise CheckpointError(f"{what}: holds an alpha of {alone[0]} and nothing else of it. Copy it again.")
    return found, alphas


def _method(modules: Modules, what: str) -> str:
    """Returns the one method of all modules, which have every tensor that it needs."""
    methods = {}
    for module, own in modules.items():
        fitting = [m for m, names in NAMES.items() if own.keys() <= names.keys() | EXTRA.get(m, set())]
        if not fitting:
            raise IncompatibleError(
                f"{what}: {module} has {', '.join(sorted(own))}, which no method here has together. Merge "
                "the file into its base with the program that wrote it."
            )
        methods[fitting[0]] = module
    if len(methods) > 1:
        raise IncompatibleError(
            f"{what}: mixes {', '.join(sorted(methods))}, and an adapter folder has one method. Split the "
            "file."
        )
    (method,) = methods
    optional = {CORE, "hada_t1", "hada_t2"}
    for module, own in modules.items():
        needed: Iterable[str] = {*NAMES[method], *EXTRA.get(method, ())} - optional
        if method == "lokr":
            needed = [n for n in ("lokr_w1", "lokr_w2") if not {f"{n}_a", f"{n}_b"} <= own.keys()]
        for name in sorted(name for name in needed if name not in own):
            raise CheckpointError(f"{what}: has no {name} of {module}. Copy it again.")
    return method


def _exact(model: nn.Module, paths: Iterable[str]) -> str | list[str]:
    return exact_targets(list(paths), dict(model.named_modules()))


def _without_core(own: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns a module's tensors with the core of a LoRA multiplied into its lora_down."""
    found = dict(own)
    if CORE in found:
        core, down = widened(found.pop(CORE)), widened(found["lora_down.weight"])
        pointwise = down.ndim > 2 and down.shape[2:].numel() == 1
        if not pointwise or core.ndim != down.ndim or core.shape[:2] != (len(down), len(down)):
            raise CheckpointError(
                f"{where}: lora_mid {tuple(core.shape)} is no core of lora_down {tuple(down.shape)}. Copy "
                "the file again."
            )
        found["lora_down.weight"] = torch.einsum("kj...,ji->ki...", core, down.flatten(1))
    return found


def _ranked(
    method: str,
    modules: Mapping[str, nn.Module],
    found: Modules,
    alphas: Mapping[str, float],
    what: str,
) -> dict[str, Any]:
    """Returns the spec's options of a method with a rank."""
    options: dict[str, Any] = {}
    whole: set[str] = set()
    if method == "lokr":
        ranks, whole, options = _lokr(modules, found, what)
    else:
        rows = "hada_w1_b" if method == "loha" else "lora_down.weight"
        ranks = {path: _length(own[rows]) for path, own in found.items()}
    if method in ("loha", "lokr"):
        options["use_effective_conv2d"] = any("t1" in n or "t2" in n for own in found.values() for n in own)
    if method == "dora":
        options["dora_axis"] = _axis(modules, found, what)
    if wrong := [path for path, rank in ranks.items() if rank < 1]:
        raise CheckpointError(f"{what}: the factors of {wrong[0]} are empty or no matrices. Copy it again.")
    strengths = {
        path: float(count) if path in whole else alphas.get(path, float(count))
        for path, count in ranks.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, strengths))
    return options | {
        "rank": int(rank),
        "alpha": float(alpha),
        "rank_pattern": {f"^{re.escape(path)}": own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{re.escape(path)}": own for path, own in strengths.items() if own != alpha},
    }


def _axis(modules: Mapping[str, nn.Module], found: Modules, what: str) -> str:
    """Returns what the magnitudes of DoRA belong to: (out, 1, …) to outputs, (1, in, …) to inputs."""
    axes: dict[str, str] = {}
    for path, own in found.items():
        shape, weight = tuple(own["dora_scale"].shape), cast(Tensor, modules[path].weight)
        ones = (1,) * (weight.ndim - 2)
        forms = {"out": (len(weight), 1, *ones), "in": (1, weight.shape[1], *ones)}
        axis = next((axis for axis, form in forms.items() if shape == form), None)
        if axis is None:
            raise CheckpointError(
                f"{what}: dora_scale of {path} is {shape}, and must be {forms['out']} or {forms['in']} for "
                "this model. Name the base that the file was trained on."
            )
        if axis == "in" and is_convolution(modules[path]):
            raise IncompatibleError(
                f"{what}: dora_scale of {path} has a magnitude for each input of a convolution, which DoRA "
                "does not have here. Train with wd_on_out, or merge the file with the program that wrote it."
            )
        axes[axis] = path
    if len(axes) > 1:
        raise IncompatibleError(
            f"{what}: dora_scale has magnitudes of outputs at {axes['out']} and of inputs at {axes['in']}, "
            "and an adapter folder has one kind. Split the file."
        )
    return next(iter(axes))


def _ia3(
    modules: Mapping[str, nn.Module], found: dict[str, dict[str, Tensor]], alphas: Collection[str], what: str
) -> dict[str, Any]:
    """Makes IA3's factors of what files hold, 1 less, and returns the spec's options."""
    at_input = [path for path, own in found.items() if own.pop(ON_INPUT).any()]
    for path, own in found.items():
        if path in alphas:
            raise IncompatibleError(f"{what}: has an alpha of {path}, and IA3 has none. Remove it.")
        if path not in at_input and modules[path].bias is not None:
            raise IncompatibleError(
                f"{what}: {path} has a bias, and IA3 scales it here with the outputs, which LyCORIS does "
                "not. Merge the file into its base with LyCORIS."
            )
        own["weight"] = 1 + widened(own["weight"])
    return {"feedforward_modules": at_input}


def _paths(model: nn.Module, names: Iterable[str], what: str) -> dict[str, str]:
    """Returns the path of each flattened name; the base model's own attribute may be left out of it."""
    inner = f"{getattr(model, 'base_model_prefix', '')}."
    known: dict[str, set[str]] = defaultdict(set)
    for path, _ in model.named_modules():
        for form in {path, path.removeprefix(inner)}:
            known[form.replace(".", "_")].add(path)
    paths: dict[str, str] = {}
    for name in names:
        fitting = sorted(known.get(name, ()))
        if not fitting:
            raise CheckpointError(
                f"{what}: adapts {name}, and this model has no such module. Name the base that the file was "
                "trained on."
            )
        if len(fitting) > 1:
            raise IncompatibleError(f"{what}: {name} may be {' or '.join(fitting)} of this model.")
        if fitting[0] in paths.values():
            raise CheckpointError(f"{what}: holds adapters of {fitting[0]} under two names.")
        paths[name] = fitting[0]
    return paths


def _lokr(
    modules: Mapping[str, nn.Module], found: Modules, what: str
) -> tuple[dict[str, int], set[str], dict[str, Any]]:
    """Returns the ranks, the modules without low-rank factors, and the options that give these shapes."""
    firsts: dict[str, tuple[int, ...]] = {}
    ranks: dict[str, int] = {}
    whole = set()
    for path, own in found.items():
        if "lokr_w1" in own:
            firsts[path] = tuple(own["lokr_w1"].shape)
        else:
            firsts[path] = (*own["lokr_w1_a"].shape[:1], *own["lokr_w1_b"].shape[1:])
        low = [own[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in own]
        if "lokr_w2" in own and isinstance(modules[path], nn.Conv1d):
            raise IncompatibleError(
                f"{what}: lokr_w2 of {path}, a Conv1d, means another product in PEFT's form of LoKr."
            )
        if low:
            ranks[path] = _length(low[0])
        else:
            whole.add(path)
            ranks[path] = max(sizes(modules[path]))  # any rank at which LoKr keeps W1 and W2 whole
    sides = {
        path: (module.weight.shape[0], module.weight.shape[1])
        for path, module in modules.items()
        if isinstance(module.weight, Tensor)
    }
    for factor in (-1, *sorted({side for first in firsts.values() for side in first if side})):
        split = {path: tuple(factorization(side, factor)[0] for side in two) for path, two in sides.items()}
        if split == firsts:
            both = any("lokr_w1_a" in own for own in found.values())
            return ranks, whole, {"decompose_factor": factor, "decompose_both": both}
    path = next(iter(firsts))
    raise IncompatibleError(
        f"{what}: no decompose_factor of LoKr gives the shapes of its lokr_w1 ({path}: {firsts[path]})."
    )


def _length(tensor: Tensor) -> int:
    return len(tensor) if tensor.ndim > 1 and tensor.numel() else 0
