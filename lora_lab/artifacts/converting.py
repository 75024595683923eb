"""Any adapter of linear maps as a plain LoRA: exact if its update has the rank, else the nearest."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_lab.adapters import LoRASpec
from lora_lab.adapters.injection import AdapterSet, place
from lora_lab.adapters.maps import stacked
from lora_lab.adapters.protocols import NestedRank
from lora_lab.adapters.sites import exact_targets
from lora_lab.adapters.storage import read_label_names, save_adapter
from lora_lab.artifacts.opening import StoredAdapter, check_out, find_adapter, open_adapter
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.linalg.norms import nonfinite
from lora_lab.linalg.updates import Update
from lora_lab.tasks import TASKS


@dataclass(frozen=True)
class Converted:
    """A folder made from an adapter or several."""

    folder: Path
    ranks: Mapping[str, int]
    """Path → components of its update; {} where it is whole."""
    errors: Mapping[str, float]
    """Path → ‖ΔW − ΔW of the folder‖_F / ‖ΔW‖_F."""


def export(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    form: Literal["peft", "lora"] = "lora",
    rank: int | None = None,
    energy: float = 1.0,
    active_rank: int | None = None,
    base: str | None = None,
    any_base: bool = False,
) -> Converted:
    """Writes a stored adapter in another form.

    Args:
        path: the folder of a finished run, or of an adapter of a language model.
        out: the new adapter's folder; one that export, combine or import made is replaced.
        form: `lora`, a plain LoRA that any library opens; `peft`, the method's own form.
        rank: largest number of components of a module; None sets no limit.
        energy: the share of each ‖ΔW‖²_F to keep, in (0, 1].
        active_rank: the rank at which a method of nested ranks is exported; None takes the stored one.
        base: the base model, as `model.name`.
        any_base: whether it may have other weights than the one that was trained on.

    Raises:
        CheckpointError: if there is no such adapter, or the new folder would replace one that was trained.
        ConfigError: if a setting is out of range or has no meaning here.
        IncompatibleError: if the adapter has no such form.
    """
    check_size(rank, energy)
    if form == "peft" and (rank is not None or energy < 1):
        raise ConfigError("export: --rank and --energy cut a LoRA; a method's own form cannot be cut.")
    source = find_adapter(path, base, any_base)
    check_out(out, source)
    _, adapters = open_adapter(source)
    if active_rank is not None:
        _activate(adapters, active_rank)
    if form == "peft":
        layout = type(next(iter(adapters))).peft if len(adapters) else None
        if layout is None or layout.peft_type is None:
            raise IncompatibleError(
                f"{path}: PEFT has no method like {adapters.spec.method}. Export it as a LoRA: --as lora"
            )
        store(adapters, out, source, {"made": {"by": "export"}})
        ranks = {name: adapter.rank or 0 for name, adapter in adapters.items()}
        return Converted(Path(out), ranks, dict.fromkeys(ranks, 0.0))
    found, ranks, errors = cut(adapters, rank, energy)
    made = {"by": "export", "method": adapters.spec.method, "rank": rank, "energy": energy, "errors": errors}
    store(as_lora(adapters, found), out, source, {"made": made})
    return Converted(Path(out), ranks, errors)


def cut(
    adapters: AdapterSet, rank: int | None = None, energy: float = 1.0
) -> tuple[dict[str, Update], dict[str, int], dict[str, float]]:
    """Returns each adapter's best update of at most a rank, its rank, and its error; see `Update.truncated`.

    Raises:
        IncompatibleError: if one of them edits no linear map.
    """
    found = {path: update.truncated(rank, energy) for path, update in updates(adapters).items()}
    kept = {path: update for path, (update, _) in found.items()}
    ranks = {path: update.rank for path, update in kept.items()}
    return kept, ranks, {path: error for path, (_, error) in found.items()}


def check_size(rank: int | None, energy: float) -> None:
    """Checks what limits a LoRA's size.

    Raises:
        ConfigError: if it is out of range.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank: must be at least 1; got {rank}")
    if not 0 < energy <= 1:
        raise ConfigError(f"--energy: must lie in (0, 1]; got {energy}")


def updates(adapters: AdapterSet) -> dict[str, Update]:
    """Returns what each adapter adds to its map, by path; for experts by the path of each parameter.

    Raises:
        IncompatibleError: if one of them edits no linear map, or a number of it is not finite.
    """
    found: dict[str, Update] = {}
    for path, adapter in adapters.items():
        try:
            own = adapter.updates(path)
        except IncompatibleError as error:
            raise IncompatibleError(f"{path}: {error}") from error
        except torch.linalg.LinAlgError:
            own = {path: Update(torch.full((1, 1), torch.nan), torch.ones(1, 1))}
        for name, update in own.items():
            parts = (update.left, update.right, update.bias)
            if nonfinite({str(number): part for number, part in enumerate(parts) if part is not None}):
                raise IncompatibleError(
                    f"{name}: a number of the update is not finite; the adapter's training has diverged. "
                    "Train again with a smaller learning rate, or take an earlier checkpoint."
                )
        found |= own
    return found


@torch.no_grad()
def as_lora(adapters: AdapterSet, found: Mapping[str, Update]) -> AdapterSet:
    """Replaces adapters by plain LoRA with the given updates; fully trained modules are kept.

    Args:
        adapters: the adapters in the model, which are removed.
        found: path → update, as `updates` names them; they may differ from those of the adapters.
    """
    trained = {path: copy.trained.state_dict() for path, copy in adapters.saved.items()}
    lineage = adapters.lineage
    model = adapters.remove()
    # PEFT has no rank of 0: a module without a change gets one component of zeros.
    ranks = {path: max(1, update.rank) for path, update in found.items()}
    general = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != general}
    modules = dict(model.named_modules())
    sites = dict.fromkeys(path if path in modules else path.rpartition(".")[0] for path in found)
    parts = (f"{site}.{name}" for site in sites for name in stacked(modules[site]))
    spec = LoRASpec(
        targets=exact_targets(list(sites), modules),
        exclude=[path for path in parts if path not in found],
        rank=general,
        alpha=float(general),  # a scale of 1
        rank_pattern={f"^{re.escape(path)}": rank for path, rank in others.items()},
        alpha_pattern={f"^{re.escape(path)}": float(rank) for path, rank in others.items()},
        modules_to_save=list(trained),
        lora_bias=any(update.bias is not None for update in found.values()),
    )
    lora = place(model, spec)
    lora.lineage = lineage
    adapter: Any
    for path, adapter in lora.items():
        experts = isinstance(adapter.A, nn.ParameterDict)
        for name in adapter.A if experts else [""]:
            update = found[f"{path}.{name}" if experts else path]
            A, B = (adapter.A[name], adapter.B[name]) if experts else (adapter.A, adapter.B)
            A.zero_()[..., : update.rank, :] = update.right
            B.zero_()[..., : update.rank] = update.left
        if not experts and update.bias is not None:
            adapter.c.copy_(update.bias)
    for path, state in trained.items():
        copy: Any = lora.saved[path]
        copy.trained.load_state_dict(state)
    return lora


def store(
    adapters: AdapterSet, folder: str | os.PathLike[str], source: StoredAdapter, lineage: Mapping[str, Any]
) -> None:
    """Writes adapters with the names of their base and of its classes."""
    name, task = source.model.source().public_name, TASKS[source.model.task]
    save_adapter(adapters, folder, name, task.peft_type, read_label_names(source.adapter), lineage)


def _activate(adapters: AdapterSet, rank: int) -> None:
    nested = adapters.implementing(NestedRank)
    if not nested:
        raise ConfigError(
            f"--active-rank: {adapters.spec.method} has no nested ranks to choose from; dylora has. --rank "
            "cuts any method."
        )
    for adapter in nested.values():
        adapter.active_rank = rank
