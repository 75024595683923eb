import pytest
import torch
from peft import HRAConfig, get_peft_model
from torch import nn

from lora_lab.adapters import inject
from lora_lab.adapters.methods.hra import HRA, HRASpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.testing import Variant, contract

test_contract = contract(
    HRA,
    Variant("", {"rank": 4}, start="rounded", trained=24 * 4),
    Variant("random", {"rank": 3, "identity_start": False}, start="other"),
    Variant("GS", {"rank": 3, "apply_GS": True}, start="rounded", trained=24 * 3, rounded=("folder",)),
    Variant("GS random", {"rank": 3, "apply_GS": True, "identity_start": False}, start="other"),
    Variant("penalised", {"rank": 4, "reg_lambda": 0.1}, start="rounded"),
)


def one(width_in: int = 12, width_out: int = 5, dtype: torch.dtype = torch.float32, **options):
    model = nn.Sequential(nn.Linear(width_in, width_out, dtype=dtype))
    adapters = inject(model, HRASpec(targets=["0"], **options))
    return model, adapters, model[0]


def randomise(adapter) -> None:
    adapter.u.data.normal_()


def rotation(adapter) -> torch.Tensor:
    """R, by its action on the identity: R x for every unit vector x."""
    return adapter.transform_input(torch.eye(adapter.in_features, dtype=adapter.dtype)).T.detach()


def test_worked_example():
    model, _, adapter = one(4, 3, rank=2)
    adapter.base.weight.data.copy_(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [-1, 0, 1, 2]]))
    adapter.base.bias.data.zero_()
    adapter.u.data.copy_(torch.tensor([[1.0, 1], [0, 1], [0, 0], [0, 0]]))
    torch.testing.assert_close(model(torch.tensor([[1.0, 2, 3, 4]])), torch.tensor([[25.0, 57, 9]]))


@pytest.mark.parametrize("rank", [1, 2, 7, 8])
@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_equals_peft(rank, gram_schmidt):
    model, _, adapter = one(rank=rank, identity_start=False, apply_GS=gram_schmidt)
    randomise(adapter)
    config = HRAConfig(r=rank, apply_GS=gram_schmidt, target_modules=["0"], init_weights=False)
    reference = get_peft_model(nn.Sequential(nn.Linear(12, 5)), config).base_model.model
    reference[0].base_layer.load_state_dict(adapter.base.state_dict())
    reference[0].hra_u["default"].data.copy_(adapter.u)
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"apply_GS": True}, {"apply_GS": True, "identity_start": False}])
def test_rotation_is_orthogonal_and_keeps_lengths_and_angles(options):
    _, _, adapter = one(rank=4, dtype=torch.float64, **options)
    randomise(adapter)
    R, identity = rotation(adapter), torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(R @ R.T, identity)
    most = 8 if options.get("apply_GS") and options.get("identity_start", True) else 4
    assert torch.linalg.matrix_rank(R - identity) == most
    torch.testing.assert_close(torch.linalg.det(R), torch.tensor(1.0, dtype=torch.float64))
    weight = adapter.base.weight
    adapted = adapter.adapted_weight(weight)
    torch.testing.assert_close(adapted, weight @ R)
    torch.testing.assert_close(adapted @ adapted.T, weight @ weight.T)


def test_gram_schmidt_is_one_reflection_at_a_subspace():
    _, _, adapter = one(rank=3, apply_GS=True, identity_start=False, dtype=torch.float64)
    Q = torch.linalg.qr(adapter.u).Q
    torch.testing.assert_close(rotation(adapter), torch.eye(12, dtype=torch.float64) - 2 * Q @ Q.T)


def test_twins_start_equal_and_part_with_the_first_step():
    model, _, adapter = one(rank=4)
    assert torch.equal(adapter.u[:, 0::2], adapter.u[:, 1::2])
    model(torch.randn(7, 12)).square().sum().backward()
    first, second = adapter.u.grad[:, 0::2], adapter.u.grad[:, 1::2]
    torch.testing.assert_close(first.norm(dim=0), second.norm(dim=0))
    assert not torch.allclose(first, second)


def test_zero_vector_gives_no_nan():
    model, _, adapter = one(rank=2)
    adapter.u.data.zero_()
    x = torch.randn(3, 12)
    y = model(x)
    torch.testing.assert_close(y, adapter.base(x))
    y.sum().backward()
    assert adapter.u.grad.isfinite().all()


def test_penalty_is_the_distance_from_orthogonal_vectors():
    _, adapters, adapter = one(rank=2, reg_lambda=0.5)
    # Equal twins: ÛᵀÛ is all ones, two of them off the diagonal.
    torch.testing.assert_close(adapters.penalty(), torch.tensor(0.5 * 2))
    adapter.u.data.copy_(torch.eye(12)[:, :2] * 3)
    torch.testing.assert_close(adapters.penalty(), torch.tensor(0.0))
    adapters.penalty().backward()
    assert adapter.u.grad.isfinite().all()


def test_no_penalty_by_default():
    _, adapters, _ = one(rank=2)
    assert adapters.penalty() == 0.0


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 3, "apply_GS": True}])
def test_gradients(options):
    model, _, adapter = one(8, 6, dtype=torch.float64, **options)
    randomise(adapter)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda u: torch.func.functional_call(model, {"0.u": u}, (x,)), (adapter.u,)
    )


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"rank": 0}, "adapter.rank: must be at least 1; got 0"),
        ({"rank": 3}, "adapter.rank: must be even"),
        ({"rank": 4, "reg_lambda": -1.0}, "adapter.reg_lambda: must be finite"),
        ({"rank": 4, "reg_lambda": 0.1, "apply_GS": True}, "use one of the two"),
    ],
)
def test_faulty_specs_are_refused(options, fault):
    with pytest.raises(ConfigError, match=fault):
        one(**options)


def test_gram_schmidt_needs_independent_vectors():
    with pytest.raises(IncompatibleError, match="rank <= 12"):
        one(rank=14, apply_GS=True)
    one(rank=14)


@pytest.mark.parametrize("own_file", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"rank": 3, "identity_start": False},
        {"rank": 3, "apply_GS": True},
        {"rank": 3, "apply_GS": True, "identity_start": False},
    ],
)
def test_folder_gives_the_same_map_with_and_without_our_own_file(options, own_file, tmp_path):
    model, adapters, adapter = one(**options)
    randomise(adapter)
    save_adapter(adapters, tmp_path / "adapter")
    if not own_file:
        (tmp_path / "adapter" / "lora_lab.yaml").unlink()
    fresh = nn.Sequential(nn.Linear(12, 5))
    fresh[0].load_state_dict(adapter.base.state_dict())
    load_adapter(fresh, tmp_path / "adapter")
    x = torch.randn(3, 12)
    torch.testing.assert_close(fresh(x), model(x), atol=1e-6, rtol=1e-5)
