import pytest
import torch

from lora_lab.adapters import inject
from lora_lab.adapters.methods.goft import GOFT, GOFTSpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import CheckpointError, ConfigError, IncompatibleError
from lora_lab.linalg.orthogonal import givens, givens_tree
from lora_lab.testing import Variant, contract
from tests.adapters.tiny import linear, shake, train

test_contract = contract(
    GOFT,
    Variant(trained=24 - 1, rounded=("checkpointing",)),
    Variant("soft", {"strict_oft": False}, trained=4 * (24 - 1)),
)


SOFT = {"strict_oft": False}
OPTIONS = [{}, SOFT]


def one(rows=16, columns=24, dtype=torch.float32, **options):
    model = linear(rows, columns, dtype=dtype)
    adapters = inject(model, GOFTSpec(targets=["0"], **options))
    return model, adapters, model[0]


def rotation(adapter):
    """R, by its action on unit rows."""
    return adapter.transform_input(torch.eye(adapter.in_features, dtype=adapter.dtype)).detach()


def dense_tree(n, G):
    """P_L … P_1, stage after stage as full matrices."""
    R, count, step, used = torch.eye(n, dtype=G.dtype), n, 1, 0
    while count > 1:
        P = torch.eye(n, dtype=G.dtype)
        for t in range(count // 2):
            pair = torch.tensor([2 * step * t, 2 * step * t + step])
            P[pair[:, None], pair] = G[used]
            used += 1
        R, count, step = P @ R, count // 2 + count % 2, 2 * step
    assert used == n - 1
    return R


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 33, 64])
def test_tree_is_the_product_of_its_stages(n):
    G, x = torch.randn(n - 1, 2, 2, dtype=torch.float64), torch.randn(2, 5, n, dtype=torch.float64)
    R = dense_tree(n, G)
    torch.testing.assert_close(givens_tree(x, G), x @ R)
    torch.testing.assert_close(givens_tree(x[0, 0], G, inverse=True), x[0, 0] @ R.T)


def test_worked_example():
    model, _, adapter = one(4, 4)
    adapter.base.weight.data.copy_(torch.eye(4))
    adapter.base.bias.data.zero_()
    adapter.theta.data.copy_(torch.tensor([0.5, 0, 0.5]).atanh())  # π tanh θ = π / 2
    torch.testing.assert_close(model(torch.tensor([[1.0, 2, 3, 4]])), torch.tensor([[2.0, -3, -1, 4]]))


def test_worked_count():
    assert one(5, 13)[1].trainable_count() == 12


@pytest.mark.parametrize("columns", [13, 24])
def test_trained_rotation_is_orthogonal_and_keeps_lengths_and_angles(columns):
    model, adapters, adapter = one(16, columns)
    train(model, adapters, torch.randn(32, columns), steps=20)
    R, weight = rotation(adapter), adapter.base.weight
    assert (R - torch.eye(columns)).abs().max() > 0.1
    assert torch.linalg.matrix_norm(R @ R.T - torch.eye(columns)) < 1e-5
    assert torch.linalg.det(R).item() == pytest.approx(1, abs=1e-5)
    adapted = adapter.adapted_weight(weight)
    torch.testing.assert_close(adapted.norm(dim=1), weight.norm(dim=1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(adapted @ adapted.T, weight @ weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options):
    model, adapters, adapter = one(6, 7, dtype=torch.float64, **options)
    shake(adapters, 0.3)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    names, tensors = zip(*adapter.named_parameters(), strict=True)
    own = {f"0.{name}": tensor for name, tensor in zip(names, tensors, strict=True) if tensor.requires_grad}
    assert torch.autograd.gradcheck(
        lambda x, *given: torch.func.functional_call(model, dict(zip(own, given, strict=True)), (x,)),
        (x, *own.values()),
    )


def test_penalty_is_zero_for_orthogonal_columns_and_grows_with_their_product():
    _, adapters, adapter = one(5, 4, strict_oft=False, soft_reg=0.5)
    assert adapters.penalty() == 0
    adapter.G.data.copy_(givens(torch.randn(3)) * 2)
    torch.testing.assert_close(adapters.penalty(), torch.tensor(0.0))
    adapter.G.data[1] = torch.tensor([[1.0, 2], [3, 4]])  # columns (1, 3) and (2, 4)
    torch.testing.assert_close(adapters.penalty(), torch.tensor(0.5 * 14**2))


@pytest.mark.parametrize("options", [{}, SOFT | {"soft_reg": 0.0}])
def test_no_penalty_but_that_of_qgoft(options):
    assert one(**options)[1].penalty() == 0.0


@pytest.mark.parametrize(("options", "names"), [({}, []), (SOFT, ["G"])])
def test_weight_decay_spares_what_zero_is_no_identity_for(options, names):
    _, _, adapter = one(**options)
    found = adapter.decay_exempt()
    assert [name for name in names if any(getattr(adapter, name) is p for p in found)] == names
    assert len(found) == len(names)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_folder_gives_the_same_map(options, tmp_path):
    model, adapters, _ = one(**options)
    shake(adapters)
    save_adapter(adapters, tmp_path / "adapter")
    back, x = linear(), torch.randn(3, 24)
    load_adapter(back, tmp_path / "adapter")
    assert torch.equal(back(x), model(x))
    other = linear(columns=12)
    with pytest.raises(CheckpointError, match="of shape"):
        load_adapter(other, tmp_path / "adapter")


def test_a_negative_penalty_is_refused():
    with pytest.raises(ConfigError, match="adapter.soft_reg: must be finite and at least 0; got -0.1"):
        one(**SOFT, soft_reg=-0.1)


def test_a_single_input_is_refused():
    with pytest.raises(IncompatibleError, match="adapter.targets: 0 has one input, which cannot be rotated"):
        one(columns=1)
