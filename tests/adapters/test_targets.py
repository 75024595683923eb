"""Where adapters are placed: faulty targets are refused and the model is left alone."""

from dataclasses import replace

import pytest
from torch import nn

from lora_lab.adapters import METHODS, inject
from lora_lab.errors import IncompatibleError, TargetError
from lora_lab.testing.methods import assert_same_tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ["q_proj"]},
            "bert has no 'q_proj' (its roles are query, key, value, attention_output, up",
        ),
        ({"targets": ["querry"]}, "did you mean 'query'?"),
        ({"targets": "regex:.*[query"}, "is not a regular expression"),
        ({"targets": "regex:query"}, "bert has no 'regex:query'"),
        ({"layers": [1, 5]}, "have no layer [5]; their layers are [0, 1]"),
        ({"targets": ["classifier"]}, "which is fully trained"),
        ({"modules_to_save": ["scorer"]}, "adapter.modules_to_save: no module 'scorer'"),
        ({"targets": ["LayerNorm"]}, "a LayerNorm, which lora cannot edit"),
        ({"rank_pattern": {"keys": 2}}, "adapter.rank_pattern: 'keys' matches no adapted module"),
    ],
)
def test_faulty_targets_name_the_fault_and_leave_the_model_alone(changes, message, make_model, make_batch):
    """Check 13."""
    model = make_model("bert")
    before = model.state_dict()
    with pytest.raises(TargetError) as caught:
        inject(model, replace(METHODS["lora"].Spec(rank=4), **changes))
    assert message in str(caught.value)
    assert_same_tensors(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parts_of_multihead_attention_are_refused():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(TargetError, match="never calls the module"):
        inject(model, METHODS["lora"].Spec(targets=["out_proj"]))


def test_regular_expressions_match_whole_paths(make_model):
    adapters = inject(make_model("bert"), METHODS["lora"].Spec(targets=r"regex:.*layer\.1\..*\.(query|key)"))
    assert [path.rpartition(".")[2] for path in adapters.adapters] == ["query", "key"]


def test_second_injection_is_refused(make_model):
    model = make_model("bert")
    adapters = inject(model, METHODS["lora"].Spec(rank=4))
    with pytest.raises(IncompatibleError, match=r"remove\(\) or merge\(\)"):
        inject(model, METHODS["ia3"].Spec())
    adapters.remove()
    inject(model, METHODS["ia3"].Spec())
