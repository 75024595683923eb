"""Checks that everything that counts as trained learns: no adapter may be where the model does not use it.

A model may hold a module and not use it (T5's `shared`), or use it where no gradient flows. Only a backward
pass shows which, so gradients are checked when an optimizer has made a step, in a plain Python loop or in a
trainer. An adapter is alive once a number in one of its gradients is not zero. For the others:

    no gradient, though parts around it have one          the model passes it by    fails after the first step
    the same in a list whose other items have gradients   a rare expert, a layer    a warning after PATIENCE
                                                          that is left out at times
    anything else, also one dead tensor of an adapter     may be chance             fails after PATIENCE steps

A step in which nothing has a gradient (labels that are all ignored) says nothing about the parts; only
PATIENCE such steps in a row fail.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lora_lab.adapters.base import Adapter
from lora_lab.adapters.protocols import Prunable
from lora_lab.adapters.trained import TrainedCopy
from lora_lab.errors import TargetError

PATIENCE = 10
"""Optimizer steps for which a tensor may have no gradient by chance."""

PASSED_BY = "the model does not call them: it keeps them for another use, or never uses them"
NO_GRADIENT = "no gradient comes to them: their output does not reach the loss, or is multiplied by zero"


class Liveness:
    """What the optimizer's steps have shown about the trained tensors of one model.

    Args:
        model: the adapted model.
        adapters: its adapters, by path.
        saved: the fully trained modules next to them, by path.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter], saved: Mapping[str, Adapter]):
        self.model = model
        self.adapters = adapters
        self.saved = saved
        self.steps = 0
        """Optimizer steps in which something had a gradient."""
        self.empty = 0
        """Optimizer steps in which nothing had."""
        self.decided = False
        self._alive: dict[str, set[str]] = {}  # path → names of the tensors whose gradient was not zero once
        self._connected: set[str] = set()  # paths that had a gradient once, of any numbers

    def observe(self, optimized: Iterable[nn.Parameter]) -> None:
        """Checks the gradients of the step just made.

        Args:
            optimized: the tensors of the optimizer; others are not checked.

        Raises:
            TargetError: if a tensor is dead.
        """
        known = {id(parameter) for parameter in optimized}
        trained = {
            path: found
            for path, adapter in {**self.adapters, **self.saved}.items()
            if (found := {name: p for name, p in _trained(adapter).items() if id(p) in known})
        }
        if not trained:
            return
        for path, tensors in trained.items():
            alive = self._alive.setdefault(path, set())
            graded = {name: p.grad for name, p in tensors.items() if p.grad is not None}
            if graded:
                self._connected.add(path)
            alive |= {name for name, grad in graded.items() if name not in alive and _any(grad)}
        if any(_any(p.grad) for found in trained.values() for p in found.values() if p.grad is not None):
            self.steps += 1
        else:
            self.empty += 1
        self._judge(trained, last=self.steps >= PATIENCE or (not self.steps and self.empty >= PATIENCE))

    def conclude(self) -> None:
        """Decides after fewer steps than PATIENCE, at the end of a short training.

        Raises:
            TargetError: if a tensor is dead; those without a gradient at the start have more time.
        """
        if self.steps and not self.decided:
            self._judge({path: self._reached_at_once(path) for path in self._alive}, last=True)

    def _reached_at_once(self, path: str) -> dict[str, nn.Parameter]:
        """Returns an adapter's trained tensors that have a gradient from the first step on."""
        late = self._all(path).without_gradient_at_start()
        return {name: p for name, p in _trained(self._all(path)).items() if name not in late}

    def _judge(self, trained: Mapping[str, Mapping[str, Tensor]], last: bool) -> None:
        living = {path for path, names in self._alive.items() if names}
        dead = [path for path in trained if path not in living]
        passed_by = [path for path in dead if self._passed_by(path, living)]
        if passed_by:
            self._stop(passed_by, PASSED_BY)
        partly = {
            f"{path}.{name}": path
            for path, tensors in trained.items()
            for name in tensors.keys() - self._alive[path]
            if path in living and not self._may_rest(path)
        }
        if not dead and not partly:
            self.decided = True
        if not last:
            return
        self.decided = True
        rare = [path for path in dead if self._skipped(path, living)]
        if rare:
            warnings.warn(
                f"no gradient came to {listed(rare)} in {self.steps} optimizer steps, though one came to "
                "others of their list: experts that no token chose, or layers left out at random. They count "
                "as trained.",
                stacklevel=2,
            )
        stuck = [path for path in dead if path not in rare and not self._may_rest(path)]
        stuck += [name for name, path in partly.items() if not isinstance(self._all(path), TrainedCopy)]
        if stuck:
            self._stop(stuck, NO_GRADIENT)

    def _all(self, path: str) -> Adapter:
        return self.adapters[path] if path in self.adapters else self.saved[path]

    def _may_rest(self, path: str) -> bool:
        """Whether an adapter that is called may go without a gradient for long."""
        adapter = self._all(path)
        silenced = isinstance(adapter, Prunable) and not adapter.kept_components().any()
        return path in self._connected and (silenced or adapter.rests_by_chance)

    def _passed_by(self, path: str, living: set[str]) -> bool:
        """Whether the module around an adapter ran without it. Of several heads a batch may use only one."""
        if path in self._connected or path in self.saved:
            return False
        around = path.rpartition(".")[0]
        inside = f"{around}." if around else ""
        return not self._is_list(around) and any(other.startswith(inside) for other in living)

    def _skipped(self, path: str, living: set[str]) -> bool:
        """Whether an adapter is in a list in which adapters of other items are alive."""
        parts = path.split(".")
        for depth in range(1, len(parts)):
            around, item = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
            if self._is_list(around) and path not in self._connected:
                beside = {other for other in living if other.startswith(f"{around}.")}
                if beside and not any(f"{other}.".startswith(f"{item}.") for other in beside):
                    return True
        return False

    def _is_list(self, path: str) -> bool:
        return isinstance(self.model.get_submodule(path), nn.ModuleList | nn.ModuleDict)

    def _stop(self, paths: list[str], why: str) -> None:
        self.decided = True
        count = self.steps or self.empty
        steps = "the first optimizer step" if count == 1 else f"{count} optimizer steps"
        raise TargetError(
            f"adapter.targets: {listed(paths, most=8)} learned nothing in {steps}: {why}. The adapters "
            "there count as trained and never will be. Name these modules in adapter.exclude."
        )


_watched: weakref.WeakKeyDictionary[object, Liveness] = weakref.WeakKeyDictionary()


def watch(owner: object, liveness: Liveness) -> None:
    """Lets a `Liveness` see every optimizer's step, until it has decided or its owner is gone."""
    _watched[owner] = liveness


def unwatch(owner: object) -> None:
    """Ends `watch`."""
    _watched.pop(owner, None)


def conclude(owner: object) -> None:
    """Calls `Liveness.conclude` if the owner is still watched."""
    if owner in _watched:
        _watched.pop(owner).conclude()


def _show(optimizer: Optimizer, arguments: object, keywords: object) -> None:
    for owner, liveness in list(_watched.items()):
        liveness.observe(p for group in optimizer.param_groups for p in group["params"])
        if liveness.decided:
            unwatch(owner)


# One hook for the whole process, since an optimizer is not known before it makes a step.
register_optimizer_step_post_hook(_show)


def _trained(adapter: Adapter) -> dict[str, nn.Parameter]:
    return {
        name: tensor
        for name, tensor in adapter.adapter_tensors().items()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad
    }


def _any(gradient: Tensor) -> bool:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(values.any())


def listed(names: Iterable[str], most: int = 3) -> str:
    """Returns the first names, and how many more there are."""
    names = list(names)
    more = f" (and {len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
