"""What every method must fulfil, as checks of one class: `contract` collects them for pytest."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lora_lab.adapters import METHODS, Adapter, AdapterSet, AdapterSpec, inject, parameter_count
from lora_lab.adapters.base import LinearAdapter
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import IncompatibleError
from lora_lab.testing.models import One, tiny_batch, tiny_model

TOLERANCE = 1e-5
"""Tolerance of comparisons in float32, relative to the largest number compared."""

MODELS = ("bert", "llama", "gpt2", "t5", "plain", "nf4")
"""The models of `models.tiny_model` on which a method's first variant is tested; others only on bert."""

QUERY_AND_VALUE = {"gpt2": ["query_key_value", "attention_output"], "plain": ["first", "second"]}
"""What replaces the targets query and value on models without such maps."""

INERT = ("key.delta", "key.trained.bias")
"""Softmax ignores what all keys share, so the gradient of a key's bias is only rounding."""


@dataclass(frozen=True)
class Variant:
    """Options with which a method is tested; the first variant should be as small as the models."""

    name: str = ""
    """Name of the variant, in the names of its checks."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the spec."""

    start: Literal["exact", "rounded", "other"] | None = None
    """Whether W' = W at the start exactly, up to rounding, or not; by default exact, or other if the class
    has `identity_at_start = False`."""

    trained: int | None = None
    """How many parameters are trained on one linear map from 24 to 16 with a bias, worked out by hand."""

    on: Mapping[str, Mapping[str, Any] | str] = field(default_factory=dict)
    """Model → further options that the method needs there, or the reason why it cannot be used there. The
    first variant is also tested on the models named here besides MODELS: `opt`, `llama biased`, `int8`."""

    linear: Mapping[str, Any] | str = field(default_factory=dict)
    """Likewise, for the checks on one linear map from 24 to 16."""

    dropout: bool = True
    """Whether a field `dropout` may be set with these options."""

    rounded: tuple[Literal["folder", "checkpointing"], ...] = ()
    """What is equal only up to rounding: loading from a folder, or the gradients under gradient
    checkpointing."""


@dataclass(frozen=True)
class Check:
    """One check of one variant on one model."""

    name: str
    run: Callable[[], None]

    def __call__(self) -> None:
        """Runs the check, seeded.

        Raises:
            AssertionError: if the method fails.
        """
        torch.manual_seed(0)
        self.run()


def contract(method: type[Adapter], *variants: Variant) -> Callable[..., None]:
    """Returns a test function for pytest, with one case for each check of a method.

        test_contract = contract(Volume, Variant("", {"rank": 4}), Variant("loud", {"rank": 4, "gain": 2.0}))

    The method is registered for this, see `lora_lab.register`.

    Args:
        method: the class.
        variants: the options to try, the smallest first; without any, the defaults.
    """
    import pytest  # of those who test alone

    cases = [pytest.param(check, id=check.name) for check in checks(method, *variants)]

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
    @pytest.mark.parametrize("check", cases)
    def test_contract(check: Check) -> None:
        check()

    return test_contract


def checks(method: type[Adapter], *variants: Variant) -> list[Check]:
    """Returns the checks of a method, for use without pytest.

    Args:
        method: the class, which is registered for it.
        variants: the options to try, the smallest first; without any, the defaults.
    """
    METHODS.add(method)
    found = [Check("facts", partial(facts, method))]
    for index, variant in enumerate(variants or (Variant(),)):
        first = index == 0
        models = dict.fromkeys([*MODELS, *variant.on] if first else ["bert"])
        cases = [Case(method, variant, name) for name in models if not isinstance(variant.on.get(name), str)]
        pairs = [
            (check, case)
            for check, repeated in ON_MODELS.items()
            for case in cases
            if case.model_name not in MODELS or case.model_name in ("bert", *repeated)
            if check is not starts_as_the_identity or case.start != "other"
        ]
        pairs += [(check, case) for case in cases for check in _others(case, first)]
        one = Case(method, variant, "linear")
        if issubclass(method, LinearAdapter) and not isinstance(variant.linear, str):
            pairs += [(check, one) for check in ON_ONE_MAP]
            # Autograd through the compiled graph is the same for all variants, and takes the longest.
            pairs.append((compiled_map_agrees if first else compiles_without_a_break, one))
        elif variant.trained is not None:
            pairs.append((number_trained, one))
        found += [Check(f"{check.__name__}-{case}", partial(check, case)) for check, case in pairs]
    return found


def _others(case: Case, first: bool) -> list[Callable[[Case], None]]:
    """Returns the checks that need only one or two models."""
    found: list[Callable[[Case], None]] = []
    if first and case.model_name in ("bert", "llama"):
        found += [gradients_under_checkpointing, comes_back_from_its_folder]
    if case.model_name != "bert":
        return found
    if not first:
        found.append(comes_back_from_its_folder)
    if case.spec.targets:
        found.append(gradients_at_the_start)
    if case.variant.dropout and any(f.name == "dropout" for f in fields(case.method.Spec)):
        found.append(dropout_in_training_alone)
    if first and case.method.mergeable:
        found.append(merged_model_is_saved_as_a_plain_one)
    return found


@dataclass(frozen=True)
class Case:
    """A variant of a method on a model, the argument of every check."""

    method: type[Adapter]
    variant: Variant
    model_name: str

    def __str__(self) -> str:
        words = (self.method.Spec().method, self.variant.name, "on", self.model_name)
        return "_".join(" ".join(words).split())

    @property
    def spec(self) -> AdapterSpec:
        """The spec for this model."""
        spec = self.method.Spec(**self.variant.options)
        if self.model_name == "linear":
            options: Any = {"targets": ["linear"], "modules_to_save": [], **_given(self.variant.linear)}
            return replace(spec, **options)
        if spec.targets == AdapterSpec().targets and self.model_name in QUERY_AND_VALUE:
            spec = replace(spec, targets=QUERY_AND_VALUE[self.model_name])
        return replace(spec, **_given(self.variant.on.get(self.model_name, {})))

    @property
    def start(self) -> str:
        """What the variant promises for its start."""
        return self.variant.start or ("exact" if self.method.identity_at_start else "other")

    def model(self) -> nn.Module:
        """Returns the model without adapters."""
        return tiny_model(self.model_name)

    def adapted(self, seed: int = 0, perturbed: bool = True, **changes: Any) -> tuple[nn.Module, AdapterSet]:
        """Returns model and adapters, with all trained tensors moved away from their start."""
        model = self.model()
        adapters = inject(model, replace(self.spec, **changes), seed)
        if perturbed:
            perturb(adapters)
        return model, adapters

    def one_map(
        self, bias: bool = True, dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Module, AdapterSet, Any]:
        """Returns a model of one linear map, its adapters, and the one on the map; perturbed."""
        torch.manual_seed(0)
        model = One(bias, dtype).eval()
        adapters = inject(model, self.spec)
        perturb(adapters)
        return model, adapters, model.linear

    def base_logits(self) -> Tensor:
        """Returns what the model without adapters computes."""
        return _base_logits(self.model_name)

    def logits(self, model: nn.Module) -> Tensor:
        """Calls the model on its batch."""
        return logits_of(model, tiny_batch(self.model_name))


@cache
def _base_logits(name: str) -> Tensor:
    with torch.no_grad():
        return logits_of(tiny_model(name), tiny_batch(name))


def _given(options: Mapping[str, Any] | str) -> Mapping[str, Any]:
    return {} if isinstance(options, str) else options


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns a model's output, or the logits in it."""
    output = model(**batch)
    return output if isinstance(output, Tensor) else output.logits


def perturb(adapters: AdapterSet) -> None:
    """Moves all trained tensors away from their start, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def backward(case: Case, model: nn.Module, adapters: AdapterSet) -> None:
    """Computes the gradients of a random function of the logits, and of the penalty."""
    logits = case.logits(model)
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    loss = (logits * probe).sum() + adapters.penalty()
    loss.backward()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compares relative to the largest number; 0 requires the same bits."""
    scale = max(1e-30, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def assert_same_tensors(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Same names, bitwise equal numbers."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# On whole models -------------------------------------------------------------------------------------------


def facts(method: type[Adapter]) -> None:
    """The class has what tables and configs show."""
    spec = method.Spec()
    assert METHODS[spec.method] is method
    assert not spec.faults(), "the spec's defaults are invalid"
    assert method.family
    assert method.paper
    assert spec.size_field is None or hasattr(spec, spec.size_field)


@torch.no_grad()
def starts_as_the_identity(case: Case) -> None:
    """The adapted model computes what the base does, if the variant promises it."""
    model, _ = case.adapted(perturbed=False)
    assert_close(case.logits(model), case.base_logits(), 0 if case.start == "exact" else TOLERANCE)


def the_formula_counts_what_is_trained(case: Case) -> None:
    """`parameter_count` is the number of trained parameters, task heads aside."""
    model, spec = case.model(), case.spec
    counted = parameter_count(model, spec)
    assert counted == inject(model, spec).trainable_count(saved=False)


@torch.no_grad()
def changes_the_output(case: Case) -> None:
    """Otherwise the other checks could pass for an adapter that is never called."""
    model, adapters = case.adapted()
    expected = case.base_logits()
    assert (case.logits(model) - expected).abs().max() > 1e-4
    if case.spec.targets:
        assert len(adapters) > 0
        model, _ = case.adapted(modules_to_save=[])  # a head alone also changes the output
        assert (case.logits(model) - expected).abs().max() > 1e-6 * expected.abs().max()


@torch.no_grad()
def merged_model_gives_the_same_logits(case: Case) -> None:
    """Merging temporarily and permanently; what cannot be merged is refused and unchanged."""
    model, adapters = case.adapted()
    expected = case.logits(model)
    if not case.method.mergeable:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert "cannot be merged" in _refusal(adapters.merge), "it says mergeable = False, and merges"
        assert_same_tensors(model.state_dict(), before)
        assert torch.equal(case.logits(model), expected)
        return
    with adapters.merged() as merged:
        assert not any(isinstance(module, Adapter) for module in merged.modules())
        assert_close(case.logits(merged), expected)
    assert torch.equal(case.logits(model), expected)
    assert_close(case.logits(adapters.merge()), expected)
    assert not any(type(module).__module__.startswith("lora_lab.adapters") for module in model.modules())


def _refusal(call: Callable[[], Any]) -> str:
    """Returns the message with which a call is refused, or nothing."""
    try:
        call()
    except IncompatibleError as error:
        return str(error)
    return ""


@torch.no_grad()
def removing_restores_the_model(case: Case) -> None:
    """Tensors, output and what is trainable are as they were before."""
    model = case.model()
    frozen = next(model.parameters()).requires_grad_(False)
    expected, before = case.logits(model), {name: p.clone() for name, p in model.state_dict().items()}
    adapters = inject(model, case.spec)
    perturb(adapters)
    case.logits(model)
    assert adapters.remove() is model
    assert_same_tensors(model.state_dict(), before)
    assert torch.equal(case.logits(model), expected)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        name for name, p in model.named_parameters() if p is frozen
    ]
    assert not model._forward_pre_hooks


def training_reaches_the_adapters_alone(case: Case) -> None:
    """Three steps: all trained tensors have finite gradients, which are not zero from the second step on."""
    model, adapters = case.adapted()
    own = adapters.named_parameters()
    base = {name: p for name, p in model.named_parameters() if not any(p is q for q in own.values())}
    before = {name: p.clone() for name, p in base.items()}
    optimizer = torch.optim.SGD(own.values(), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        backward(case, model, adapters)
        for name, parameter in own.items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert step or name.endswith(INERT) or parameter.grad.any(), name
        optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in base.values())
    assert_same_tensors(base, before)


@torch.no_grad()
def copies_give_the_same_logits(case: Case) -> None:
    """Deepcopy, pickle, and a state dict loaded into a set with another seed."""
    model, adapters = case.adapted()
    expected = case.logits(model)
    twin, twin_adapters = copy.deepcopy((model, adapters))
    assert torch.equal(case.logits(twin), expected)
    assert torch.equal(case.logits(pickle.loads(pickle.dumps(model))), expected)
    fresh, fresh_adapters = case.adapted(seed=1, perturbed=False)
    fresh_adapters.load_state_dict(adapters.state_dict())
    assert torch.equal(case.logits(fresh), expected)
    twin_adapters.remove()
    assert torch.equal(case.logits(twin), case.base_logits())
    assert torch.equal(case.logits(model), expected)


def half_precision_base(case: Case) -> None:
    """In bfloat16 and under autocast, the output keeps its type and stays close to float32."""
    if case.model_name == "int8":
        return  # dequantises to float32
    wide, adapters = case.adapted()
    expected = case.logits(wide).detach()
    narrow = case.model().bfloat16()
    narrow_adapters = inject(narrow, case.spec)
    assert {parameter.dtype for parameter in narrow_adapters.trainable_parameters()} == {torch.float32}
    narrow_adapters.load_state_dict(adapters.state_dict())
    batch = {
        name: x.bfloat16() if x.is_floating_point() else x for name, x in tiny_batch(case.model_name).items()
    }
    logits = logits_of(narrow, batch)
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), expected, 5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = case.logits(wide)
    assert_close(logits.float(), expected, 5e-2)
    backward(case, wide, adapters)


# On one model or two ---------------------------------------------------------------------------------------


def gradients_at_the_start(case: Case) -> None:
    """The first step reaches all tensors except those that the method lists."""
    model, adapters = case.adapted(perturbed=False, modules_to_save=[])
    backward(case, model, adapters)
    own = {
        name: p for name, p in adapters.named_parameters().items() if p.numel() and not name.endswith(INERT)
    }
    unreached = {name for name, p in own.items() if p.grad is None or not p.grad.any()}
    assert unreached == {name for name in adapters.without_gradient_at_start() if name in own}


def gradients_under_checkpointing(case: Case) -> None:
    """Recomputation happens after the end of the forward pass."""
    gradients = []
    for checkpointing in (False, True):
        model, adapters = case.adapted()
        model.train()
        torch.manual_seed(5)  # for random numbers in training
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        backward(case, model, adapters)
        gradients.append({path: cast(Tensor, p.grad) for path, p in adapters.named_parameters().items()})
    plain, checkpointed = gradients
    tolerance = TOLERANCE if "checkpointing" in case.variant.rounded else 0
    for path, gradient in plain.items():
        assert_close(checkpointed[path], gradient, tolerance)


@torch.no_grad()
def dropout_in_training_alone(case: Case) -> None:
    """Evaluation has no randomness."""
    plain, _ = case.adapted()
    model, _ = case.adapted(dropout=0.5)
    expected = case.logits(plain)
    assert torch.equal(case.logits(model), expected)
    model.train()
    assert not torch.equal(case.logits(model), case.logits(model))
    model.eval()
    assert torch.equal(case.logits(model), expected)


@torch.no_grad()
def merged_model_is_saved_as_a_plain_one(case: Case) -> None:
    """A merged model's folder opens in transformers."""
    model, adapters = case.adapted()
    with tempfile.TemporaryDirectory() as folder:
        adapters.merge().save_pretrained(folder)  # type: ignore[operator]
        again = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        assert torch.equal(case.logits(again), case.logits(model))


@torch.no_grad()
def comes_back_from_its_folder(case: Case) -> None:
    """Saving and loading give the same logits and the same spec."""
    model, adapters = case.adapted(seed=7)  # loading does not know this seed
    expected = case.logits(model)
    with tempfile.TemporaryDirectory() as place:
        save_adapter(adapters, Path(place) / "adapter")
        fresh = case.model()
        loaded = load_adapter(fresh, Path(place) / "adapter")
    assert_close(case.logits(fresh), expected, 1e-6 if "folder" in case.variant.rounded else 0)
    assert asdict(loaded.spec) == asdict(case.spec) | {"modules_to_save": list(adapters.saved)}
    assert loaded.named_parameters().keys() == adapters.named_parameters().keys()


# On one linear map -----------------------------------------------------------------------------------------


def forward_equals_the_adapted_weight(case: Case) -> None:
    """Every faster form equals the definition; batches may be empty, with gradients of zero."""
    for bias in (True, False):
        with torch.no_grad():
            _compare_forward(*case.one_map(bias))
    model, adapters, _ = case.one_map()
    model(torch.randn(0, 24)).sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in adapters.trainable_parameters())


def _compare_forward(model: nn.Module, adapters: AdapterSet, adapter: Any) -> None:
    base = adapter.base
    weight, adapted_bias = adapter.adapted_weight(base.weight), adapter.adapted_bias(base.bias)
    assert_close(adapter.delta_weight(), weight - base.weight)
    found = adapter.singular_values()
    assert_close(found, torch.linalg.svdvals(weight - base.weight)[: len(found)])
    wide = torch.randn(24, 7, 2)
    for x in (wide[:, :, 0].T, torch.randn(2, 3, 24), wide.permute(2, 1, 0), torch.randn(24)):
        assert_close(model(x), F.linear(x, weight, adapted_bias))
    assert model(torch.randn(0, 24)).shape == (0, 16)
    assert model(torch.randn(2, 0, 24)).shape == (2, 0, 16)


@torch.no_grad()
def double_precision_stays_double(case: Case) -> None:
    """Tensors and output, to twelve digits."""
    model, adapters, adapter = case.one_map(dtype=torch.float64)
    assert {p.dtype for p in adapters.trainable_parameters()} == {torch.float64}
    x, base = torch.randn(5, 24, dtype=torch.float64), adapter.base
    expected = F.linear(x, adapter.adapted_weight(base.weight), adapter.adapted_bias(base.bias))
    assert_close(model(x), expected, 1e-12)


def number_trained(case: Case) -> None:
    """The formula and the adapters have as many parameters as computed by hand."""
    model = One()
    counted = parameter_count(model, case.spec)
    adapters = inject(model, case.spec)
    assert counted == adapters.trainable_count()
    assert case.variant.trained in (None, counted)
    assert adapters.base_count() == 24 * 16 + 16


def compiled_map_agrees(case: Case, backend: str = "aot_eager") -> None:
    """No graph break; output and gradients are equal."""
    model, adapters, _ = case.one_map()
    x = torch.randn(5, 24)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    # Not the distance from 0: a rotation of y does not change it, and its gradient would be only rounding.
    expected = torch.autograd.grad((model(x) - 1).square().sum(), adapters.trainable_parameters())
    y = compiled(x)
    assert_close(y, model(x))
    found = torch.autograd.grad((y - 1).square().sum(), adapters.trainable_parameters())
    for gradient, other in zip(found, expected, strict=True):
        assert_close(gradient, other)


def compiles_without_a_break(case: Case) -> None:
    """Likewise for a further variant, whose captured graph autograd runs without compilation."""
    compiled_map_agrees(case, "eager")


ON_MODELS: Mapping[Callable[[Case], None], tuple[str, ...]] = {
    starts_as_the_identity: ("llama", "plain", "nf4"),
    changes_the_output: ("llama", "gpt2", "plain", "nf4"),
    the_formula_counts_what_is_trained: ("llama", "gpt2", "plain", "nf4"),
    merged_model_gives_the_same_logits: MODELS,
    removing_restores_the_model: ("t5", "nf4"),
    training_reaches_the_adapters_alone: MODELS,
    copies_give_the_same_logits: ("nf4",),
    half_precision_base: ("llama", "t5", "plain"),
}
"""Check → the models besides bert on which it may give another result."""

ON_ONE_MAP: Iterable[Callable[[Case], None]] = (
    forward_equals_the_adapted_weight,
    double_precision_stays_double,
    number_trained,
)
