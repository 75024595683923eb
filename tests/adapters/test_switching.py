"""Adapters held by name: each computes as it does alone, alone or beside others, and leaves no trace."""

import time

import pytest
import torch
from torch import nn

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.adapters.switching import NamedAdapters
from lora_lab.bench.tiny_architectures import tiny_model
from lora_lab.errors import CheckpointError, ConfigError, IncompatibleError
from tests.adapters.test_storage import OPTIONS
from tests.adapters.tiny import VOCABULARY, linear, mixtral, relative, shake, tiny_bert, tiny_llama

IDS = torch.randint(1, VOCABULARY, (8, 7), generator=torch.Generator().manual_seed(3))
MASK = (torch.arange(7) < torch.tensor([7, 6, 5, 7, 4, 3, 7, 6])[:, None]).long()


def spec_of(name):
    spec = METHODS[name].Spec(**OPTIONS.get(name, {}))
    if name in ("full", "bitfit"):
        spec.layers = [1]
    return spec


@torch.no_grad()
def outputs(model, rows=slice(None)):
    return model(input_ids=IDS[rows], attention_mask=MASK[rows]).logits


def stored(make, spec, folder, seed=2):
    """Stores a shaken adapter; returns what the model puts out with it alone."""
    model = make().eval()
    adapters = inject(model, spec)
    shake(adapters, seed=seed)
    save_adapter(adapters, folder)
    return outputs(model)


def traces(model):
    return [(path, type(module)) for path, module in model.named_modules()], [
        (name, parameter.requires_grad, id(parameter)) for name, parameter in model.named_parameters()
    ]


BERT = [name for name in METHODS if name != "clover"]


def test_a_batch_of_all_methods_equals_a_forward_each(tmp_path):
    alone = {name: stored(tiny_bert, spec_of(name), tmp_path / name) for name in BERT}
    model = tiny_bert()
    before, base = traces(model), outputs(model)
    for name in BERT:
        named = load_adapter(model, tmp_path / name, name=name)
    assert torch.equal(outputs(model), base)
    for name in BERT:
        named.use(name)
        assert relative(outputs(model), alone[name]) < 1e-6, name  # ReFT's R is made orthonormal once more
    for start in range(0, len(BERT), 7):
        names = [*BERT[start : start + 7], None]
        names += ["lora"] * (8 - len(names))
        with named.using(names):
            mixed = outputs(model)
        for row, name in enumerate(names):
            expected = base[row] if name is None else alone[name][row]
            assert relative(mixed[row], expected) < 2e-6, name
    assert named["lora"].spec.rank == 4
    for name in BERT:
        named.remove(name)
    assert traces(model) == before
    assert torch.equal(outputs(model), base)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert "save_pretrained" not in vars(model)


def test_sums_are_the_sums_of_the_updates(tmp_path):
    specs = [LoRASpec(rank=2, modules_to_save=[]), METHODS["hra"].Spec(rank=2, modules_to_save=[])]
    for number, spec in enumerate(specs):
        stored(tiny_bert, spec, tmp_path / str(number), seed=number)
    model = tiny_bert()
    for number in range(2):
        named = load_adapter(model, tmp_path / str(number), name=str(number))
    weights = {"0": 0.3, "1": -0.5}
    sets = [named[name] for name in weights]
    expected = tiny_bert()
    with torch.no_grad():
        for own, weight in zip(sets, weights.values(), strict=True):
            for path, adapter in own.items():
                expected.get_submodule(path).weight += weight * adapter.update().matrix()
    named.use(weights)
    assert relative(outputs(model), outputs(expected)) < 1e-5
    query = model.bert.encoder.layer[0].attention.self.query
    assert torch.allclose(query.weight, expected.bert.encoder.layer[0].attention.self.query.weight, atol=1e-6)
    named.use({"0": 1.0})
    assert torch.equal(outputs(model), outputs(inserted(tmp_path / "0")))


def inserted(folder):
    model = tiny_bert()
    load_adapter(model, folder)
    return model


def test_rows_keep_their_adapters_in_generation_and_among_experts(tmp_path):
    for make, specs in (
        (tiny_llama, {"a": METHODS["clover"].Spec(), "b": METHODS["reft"].Spec(rank=2, positions="f1+l1")}),
        (mixtral, {"a": LoRASpec(rank=2, targets=["experts", "gate"]), "b": LoRASpec(rank=2)}),
    ):
        ids = IDS[:2, :5].clamp(max=40)
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
        alone = {}
        for name, spec in specs.items():
            stored(make, spec, tmp_path / make.__name__ / name, seed=ord(name))
            model = make().eval()
            load_adapter(model, tmp_path / make.__name__ / name)
            alone[name] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        model = make().eval()
        for name in specs:
            named = load_adapter(model, tmp_path / make.__name__ / name, name=name)
        named.use(["a", "b"])
        mixed = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        for row, name in enumerate(specs):
            length = min(mixed.shape[1], alone[name].shape[1])
            assert torch.equal(mixed[row, :length], alone[name][row, :length]), (make.__name__, name)
        # In blocks only the beams of a generation, not other rows.
        for call in (model, model.generate):
            with pytest.raises(IncompatibleError, match="2 rows were given a name, and the batch has 4"):
                call(ids.repeat(2, 1))
        for name in specs:
            named.use(None)
            named.remove(name)
        assert "generate" not in vars(model)


def test_a_hundred_are_held_and_chosen_within_a_millisecond(tmp_path):
    expected = stored(tiny_bert, LoRASpec(rank=1), tmp_path / "one")
    model = tiny_bert()
    base = {id(parameter) for parameter in model.parameters()}
    for number in range(100):
        named = load_adapter(model, tmp_path / "one", name=f"n{number}")
    assert base <= {id(parameter) for parameter in model.parameters()}
    assert len({id(p) for p in model.parameters()} - base) == 100 * (2 * 2 * 2 + 2)
    times = []
    for number in range(100):
        start = time.process_time()
        named.use(f"n{number}")
        times.append(time.process_time() - start)
    assert sorted(times)[50] < 1e-3
    assert torch.equal(outputs(model), expected)


def test_gradients_reach_the_adapters_of_their_rows_alone(tmp_path):
    for name in "ab":
        stored(tiny_bert, LoRASpec(rank=2), tmp_path / name)
    model = tiny_bert()
    for name in "ab":
        named = load_adapter(model, tmp_path / name, name=name)
    named.use(["a", None] * 4)
    model(input_ids=IDS, attention_mask=MASK).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in named["a"].trainable_parameters())
    assert all(parameter.grad is None for parameter in named["b"].trainable_parameters())


def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path):
    stored(tiny_bert, LoRASpec(rank=2), tmp_path / "a")
    model = tiny_bert()
    before = traces(model)
    with pytest.raises(ConfigError, match="needs letters"):
        load_adapter(model, tmp_path / "a", name="a.b")
    with pytest.raises(CheckpointError):
        load_adapter(model, tmp_path / "missing", name="a")
    assert traces(model) == before
    assert "named_adapters" not in vars(model)
    named = load_adapter(model, tmp_path / "a", name="a")
    for choice, message in (
        ("b", "no adapter is called 'b'"),
        ({"a": float("nan")}, "finite"),
        ([], "empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            named.use(choice)
    with pytest.raises(ConfigError, match="already"):
        load_adapter(model, tmp_path / "a", name="a")
    with pytest.raises(IncompatibleError, match="holds adapters already"):
        inject(model, LoRASpec(rank=2))
    named.use(["a"] * 3)
    with pytest.raises(IncompatibleError, match="3 rows were given a name, and the batch has 8"):
        outputs(model)
    with pytest.raises(ConfigError, match="in use beside others"):
        named.remove("a")
    named.use("a")
    named.remove("a")
    assert traces(model) == before


def test_held_adapters_leave_the_model_through_their_name_alone(tmp_path):
    alone = {name: stored(tiny_bert, LoRASpec(rank=2), tmp_path / name, seed=ord(name)) for name in "ab"}
    model = tiny_bert()
    before = traces(model)
    for name in "ab":
        named = load_adapter(model, tmp_path / name, name=name)
    own = named["b"]
    for leave in (own.merge, own.remove, own.merge_lazily, own.merged().__enter__):
        with pytest.raises(IncompatibleError, match=r"named\.remove\('b'\)"):
            leave()
    for name in "ab":
        with named.using(name):
            assert torch.equal(outputs(model), alone[name])
    for name in "ab":
        named.remove(name)
    assert traces(model) == before
    with pytest.raises(IncompatibleError, match="removed already"):
        own.merge()


def test_the_config_names_the_classes_of_what_is_chosen(tmp_path):
    classes = {"a": ["x", "y", "z"], "b": ["u", "v", "w"], "c": ["x", "y", "z"], "d": []}
    for name, names in classes.items():
        save_adapter(inject(tiny_bert(), LoRASpec(rank=1)), tmp_path / name, label_names=names)
    model = tiny_bert()
    before = dict(model.config.id2label), dict(model.config.label2id)
    for name in classes:
        named = load_adapter(model, tmp_path / name, name=name)
    base = [*model.config.id2label.values()]
    for choice, expected in (
        ("a", classes["a"]),
        ("b", classes["b"]),
        ({"a": 0.5, "c": 0.5}, classes["a"]),
        ({"a": 0.5, "b": 0.5}, base),
        (["b", None], base),
        ("d", base),
        (None, base),
    ):
        with named.using(choice):
            assert [*model.config.id2label.values()] == expected, choice
            assert model.config.label2id == {name: number for number, name in enumerate(expected)}
        assert [*model.config.id2label.values()] == base
    named.use("b")
    for name in classes:
        named.remove(name)
    assert (model.config.id2label, model.config.label2id) == before


def test_rows_are_refused_where_they_cannot_be_followed(tmp_path):
    save_adapter(inject(linear(4, 4), LoRASpec(rank=1, targets=["0"], modules_to_save=[])), tmp_path / "a")
    fresh = linear(4, 4)
    named = load_adapter(fresh, tmp_path / "a", name="a")
    assert isinstance(named, NamedAdapters)
    named.use(["a", None])
    with pytest.raises(IncompatibleError, match="3 rows"):
        fresh[0](torch.ones(3, 4))

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(4, 4)

        def forward(self, x):
            return x @ self.map.weight.T

    torch.manual_seed(0)
    reading = Reads()
    save_adapter(inject(reading, LoRASpec(rank=1, targets=["map"], modules_to_save=[])), tmp_path / "b")
    torch.manual_seed(0)
    reading = Reads()
    load_adapter(reading, tmp_path / "b", name="b").use(["b", None])
    with pytest.raises(IncompatibleError, match="reads the weight"):
        reading(torch.ones(2, 4))


@pytest.mark.filterwarnings("ignore:adapter.targets")
@pytest.mark.parametrize("model_type", ["fsmt", "led", "longformer", "xlnet", "canine", None])
def test_a_batch_as_long_as_its_texts_is_not_mixed_up(model_type, tmp_path):
    """Where the time comes first, the rows of such a batch would get the adapters of positions."""

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(4, 4)

        def forward(self, x):
            return self.map(x.mT)

    task = "sequence_to_sequence" if model_type in ("fsmt", "led") else "sequence_classification"
    model = tiny_model(task, model_type) if model_type else TimeFirst()
    targets = "all-linear" if model_type else ["map"]
    adapters = inject(model, LoRASpec(rank=1, targets=targets, modules_to_save=[]))
    save_adapter(adapters, tmp_path / "a")
    adapters.remove()
    named = load_adapter(model, tmp_path / "a", name="a")
    if model_type == "canine":
        named.use(["a", None])
    elif model_type:
        with pytest.raises(IncompatibleError, match=f"{model_type} has the batch on its second axis"):
            named.use(["a", None])
    else:
        named.use(["a", None, None, "a"])
        with pytest.raises(IncompatibleError, match="not known which of the equal axes"):
            model(torch.ones(4, 4, 4))
