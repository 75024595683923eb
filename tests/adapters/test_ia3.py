import pytest
import torch
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.ia3 import IA3, IA3Input, IA3Spec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import TargetError
from lora_lab.testing import Variant, contract

test_contract = contract(
    IA3,
    Variant(
        trained=24,
        on={
            "gpt2": {"targets": ["query_key_value", "down"]},
            "plain": {"targets": ["first", "second"], "feedforward_modules": ["second"]},
            "int8": {},
        },
        linear={"feedforward_modules": ["linear"]},
    ),
    Variant("outputs", {"targets": ["key", "value", "down"], "feedforward_modules": []}, trained=16),
)


def one(feedforward: bool, width_in: int = 3, width_out: int = 3):
    model = nn.Sequential(nn.Linear(width_in, width_out))
    names = ["0"] if feedforward else []
    adapters = inject(model, IA3Spec(targets=["0"], feedforward_modules=names))
    return model, adapters, model[0]


@pytest.mark.parametrize("feedforward", [True, False])
def test_worked_rescaling(feedforward):
    """The seed's example: x ⊙ l, here before or behind an identity map."""
    model, _, adapter = one(feedforward)
    adapter.base.weight.data.copy_(torch.eye(3))
    adapter.base.bias.data.zero_()
    adapter.l.data.copy_(torch.tensor([0.5, 1.5, 1.0]).reshape(adapter.l.shape))
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    assert model(x).tolist() == [[0.5, 3, 3], [2, 7.5, 6]]


def test_output_form_scales_the_bias_and_input_form_does_not():
    for feedforward, factor in ((False, 2.0), (True, 1.0)):
        model, _, adapter = one(feedforward)
        adapter.l.data.fill_(2.0)
        torch.testing.assert_close(model(torch.zeros(1, 3))[0], factor * adapter.base.bias)


def test_shapes_and_kinds_follow_the_roles(make_model):
    adapters = inject(make_model("bert"), IA3Spec())
    for path, adapter in adapters.items():
        if path.endswith(("key", "value")):
            assert type(adapter) is IA3
            assert adapter.l.shape == (32, 1)
        else:
            assert path.endswith("output.dense")
            assert type(adapter) is IA3Input
            assert adapter.l.shape == (1, 64)
    assert len(adapters) == 6


def test_ones_are_spared_by_weight_decay():
    for feedforward in (True, False):
        _, adapters, adapter = one(feedforward)
        assert adapter.decay_exempt() == [adapter.l]
        assert list(adapters.named_parameters()) == ["0.l"]


def test_feedforward_modules_are_named_like_targets(make_model):
    def inputs(*names):
        spec = IA3Spec(targets=["value", "down"], feedforward_modules=list(names))
        found = inject(make_model("bert"), spec).items()
        return [path for path, adapter in found if isinstance(adapter, IA3Input)]

    down = ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"]
    assert inputs("down") == inputs("output.dense") == inputs(r"regex:.*layer\.\d\.output\.dense") == down
    assert inputs("layer.1.output.dense") == down[1:]
    # A role that none of the targets has is a rule without a case, not a misspelling.
    assert inputs("gate") == []


def test_misspelled_feedforward_modules_are_refused(make_model):
    with pytest.raises(TargetError, match="adapter.feedforward_modules: 'dwon'.*did you mean 'down'"):
        inject(make_model("bert"), IA3Spec(feedforward_modules=["dwon"]))


def test_feedforward_paths_stand_in_the_file(make_model, make_batch, tmp_path):
    """PEFT knows no roles; without our own file the paths are all that is left."""
    model = make_model("llama")
    adapters = inject(model, IA3Spec())
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter += torch.rand_like(parameter)
    save_adapter(adapters, tmp_path / "adapter")
    (tmp_path / "adapter" / "lora_lab.yaml").unlink()
    again = make_model("llama")
    spec = load_adapter(again, tmp_path / "adapter").spec
    assert spec.feedforward_modules == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    batch = make_batch("llama")
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("feedforward", [True, False])
def test_gradients(feedforward):
    model, _, adapter = one(feedforward, 8, 6)
    model.double()
    adapter.dtype = torch.float64
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda scale: torch.func.functional_call(model, {"0.l": scale}, (x,)), (adapter.l,)
    )
