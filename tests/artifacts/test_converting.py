"""Adapters as plain LoRA, and mixtures of them: against ΔW itself, dense decompositions and PEFT."""

import warnings

import numpy as np
import peft
import pytest
import torch
import yaml

from lora_lab.adapters import METHODS, inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.artifacts.combining import _sparse_mixture, combine, elected_mean, largest
from lora_lab.artifacts.converting import as_lora, export, updates
from lora_lab.errors import IncompatibleError
from lora_lab.linalg.updates import Update
from lora_lab.models.build import ModelConfig, build_model
from lora_lab.models.conversion import save_model
from tests.adapters.test_storage import OPTIONS
from tests.adapters.tiny import gpt_oss, linear, logits, mixtral, relative, shake, tiny_bert, tiny_llama

LINEAR = [name for name in METHODS if name not in ("reft", "head")]


def drawn(rows=13, columns=17, rank=5, seed=0, bias=False):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
    return Update(left, right, torch.randn(rows, generator=generator) if bias else None)


@pytest.mark.parametrize("name", LINEAR)
def test_every_method_becomes_a_lora_that_peft_opens(name, tmp_path):
    spec = METHODS[name].Spec(**OPTIONS.get(name, {}))
    if not isinstance(spec.targets, list):
        spec.targets = "all-linear"
    model = tiny_llama() if name == "clover" else tiny_bert()
    adapters = inject(model, spec)
    shake(adapters)
    expected = logits(model)
    found = updates(adapters)
    cut = {path: update.truncated() for path, update in found.items()}
    assert max(error for _, error in cut.values()) < 1e-5
    lora = as_lora(adapters, {path: update for path, (update, _) in cut.items()})
    assert relative(logits(model), expected) < 1e-5
    task = "CAUSAL_LM" if name == "clover" else "SEQ_CLS"
    save_adapter(lora, tmp_path / "lora", "base", task)

    fresh = tiny_llama() if name == "clover" else tiny_bert()
    load_adapter(fresh, tmp_path / "lora")
    assert relative(logits(fresh), expected) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = tiny_llama() if name == "clover" else tiny_bert()
        opened = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    assert relative(logits(opened), expected) < 1e-5


def test_what_edits_no_linear_map_is_refused_by_its_path():
    for spec in (METHODS["reft"].Spec(rank=4), METHODS["full"].Spec()):
        adapters = inject(tiny_bert(), spec)
        with pytest.raises(IncompatibleError, match=r"bert\.\S+: .*no matrix update"):
            updates(adapters)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_experts_are_cut_and_mixed_one_by_one(make, tmp_path):
    """As (experts, out, in) and (experts, in, out), and a router; one source has some parameters alone."""
    down = "experts.down_proj"
    specs = [
        LoRASpec(rank=2, targets=["experts", "query", *(["router"] if make is gpt_oss else [])]),
        LoRASpec(rank=3, alpha=5.0, targets=["experts"], exclude=["experts.gate_up_proj"], rslora=True),
    ]
    save_model(make(), tmp_path / "base")
    merged, paths = [], []
    for number, spec in enumerate(specs):
        model = make()
        adapters = inject(model, spec)
        shake(adapters, 0.3, seed=number)
        paths.append(tmp_path / str(number))
        save_adapter(adapters, paths[-1], str(tmp_path / "base"), "CAUSAL_LM")
        merged.append({k: v.double() for k, v in adapters.merge().state_dict().items()})
    base = {name: tensor.double() for name, tensor in make().state_dict().items()}

    def opened(folder):
        """The numbers that a folder adds, by the base's names, and what the model computes."""
        model = make()
        load_adapter(model, folder).merge()
        return {name: tensor - base[name] for name, tensor in model.state_dict().items()}

    mixed = combine(paths, tmp_path / "mixed", [0.7, -1.2])
    found = opened(tmp_path / "mixed")
    for name, tensor in found.items():
        exact = 0.7 * (merged[0][name] - base[name]) - 1.2 * (merged[1][name] - base[name])
        assert torch.allclose(tensor, exact, atol=2e-6), name
    changed = {name for name, tensor in found.items() if tensor.abs().max() > 1e-3}
    assert {name.removesuffix(".weight") for name in changed} == {
        name.removesuffix(".weight") for name in mixed.ranks
    }
    assert {mixed.ranks[name] for name in mixed.ranks if name.endswith(down)} == {5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "mixed")
    ours = make()
    load_adapter(ours, tmp_path / "mixed")
    assert relative(logits(theirs), logits(ours)) < 1e-5

    small = combine(paths, tmp_path / "small", [0.7, -1.2], "svd", rank=2)
    cut = opened(tmp_path / "small")
    for name in [name for name in mixed.ranks if name.endswith(down)]:
        U, S, Vh = torch.linalg.svd(found[name], full_matrices=False)  # of all experts
        assert torch.allclose(cut[name], U[..., :2] @ (S[..., :2, None] * Vh[..., :2, :]), atol=1e-5)
        lost = (S[..., 2:].square().sum() / S.square().sum()).sqrt()
        assert small.errors[name] == pytest.approx(float(lost), abs=1e-5)
    export(tmp_path / "mixed", tmp_path / "exported", rank=2)
    for name, tensor in opened(tmp_path / "exported").items():
        assert torch.allclose(tensor, cut[name], atol=1e-5), name
    combine(paths, tmp_path / "ties", method="ties", density=0.4)
    with pytest.raises(IncompatibleError, match="adapts the experts of .*, which PEFT does not mix"):
        combine(paths, tmp_path / "no", method="peft_linear")


def test_factors_are_the_update_for_layers_of_every_kind():
    model = torch.nn.Sequential(torch.nn.Embedding(11, 6), torch.nn.Conv1d(6, 4, 3), torch.nn.Linear(5, 7))
    adapters = inject(model, LoRASpec(rank=3, targets="all", modules_to_save=[], lora_bias=False))
    shake(adapters)
    tokens = torch.arange(7)[None]

    def output():
        hidden = model[0](tokens).mT
        return model[2](model[1](hidden))

    expected = output()
    as_lora(adapters, updates(adapters))
    assert relative(output(), expected) < 1e-5


@pytest.mark.parametrize(("rank", "energy"), [(3, 1.0), (None, 0.9), (2, 0.9), (40, 1.0)])
def test_truncation_is_the_optimum_of_the_dense_decomposition(rank, energy):
    update = Update.sum([drawn(seed=1), drawn(seed=2, rank=4, bias=True)], [0.7, -2.0])
    dense = (0.7 * drawn(seed=1).matrix() - 2.0 * drawn(seed=2, rank=4).matrix()).double().numpy()
    assert np.allclose(update.matrix().numpy(), dense, atol=1e-5)
    S = np.linalg.svd(dense, compute_uv=False)
    share = np.cumsum(S**2) / np.sum(S**2)
    sufficient = 9 if energy == 1 else int(np.argmax(share >= energy)) + 1
    expected = min(rank or 99, sufficient)
    cut, error = update.truncated(rank, energy)
    assert cut.rank == expected
    assert error == pytest.approx(np.sqrt(np.sum(S[expected:] ** 2) / np.sum(S**2)), abs=1e-6)
    residual = np.linalg.norm(cut.matrix().double().numpy() - dense) / np.linalg.norm(dense)
    assert residual == pytest.approx(error, abs=2e-6)


def test_a_rank_can_be_chosen_of_nested_ones():
    model = linear()
    adapters = inject(model, METHODS["dylora"].Spec(rank=4, targets=["0"], modules_to_save=[]))
    shake(adapters)
    adapter = next(iter(adapters))
    adapter.active_rank = 2
    expected = adapter.spec.alpha / 2 * (adapter.B[:, :2] @ adapter.A[:2])
    found = updates(adapters)["0"]
    assert found.rank == 2
    assert relative(found.matrix(), expected) < 1e-6


def test_three_adaptations_of_weight_a_third_add_up():
    """The seed's mixture: W0 + 0.3 · (three updates)."""
    three = [drawn(seed=seed, rank=rank) for seed, rank in ((1, 2), (2, 3), (3, 5))]
    mixed, error = Update.sum(three, [0.3] * 3).truncated()
    expected = 0.3 * sum(update.matrix() for update in three)
    assert error < 1e-6
    assert relative(mixed.matrix(), expected) < 1e-6


def test_ties_dare_and_pruning_give_the_numbers_worked_out_by_hand():
    # The 3 largest of 6 over both matrices: 5, −4, 3.
    first = {"a": torch.tensor([[5.0, -1.0], [2.0, -4.0]]), "b": torch.tensor([3.0, 0.5])}
    kept = largest(first, 0.5)
    assert kept["a"].tolist() == [[5.0, 0.0], [0.0, -4.0]]
    assert kept["b"].tolist() == [3.0, 0.0]
    assert not any(tensor.any() for tensor in largest(first, 0.0).values())
    # Signs by sum: + + − and a tie; the mean of those that agree.
    stacked = torch.tensor([[3.0, 1.0, -1.0, 2.0], [1.0, -0.5, -3.0, -2.0], [-2.0, 0.0, 1.0, 0.0]])
    assert elected_mean(stacked).tolist() == [2.0, 1.0, -2.0, 0.0]

    one = Update.of_matrix(torch.tensor([[4.0, -1.0], [2.0, 8.0]]))
    other = Update.of_matrix(torch.tensor([[-2.0, 6.0], [1.0, 2.0]]))
    ties = _sparse_mixture([{"x": one}, {"x": other}], [1.0, 1.0], "ties", 0.5, 0)["x"].matrix()
    # Kept: 4, 8 of the first; −2 (equal to 2, which stays too), 6, 2 of the other.
    assert torch.allclose(ties, torch.tensor([[4.0, 6.0], [0.0, 5.0]]), atol=1e-5)
    pruned = _sparse_mixture([{"x": one}, {"x": other}], [0.5, 0.5], "magnitude_prune", 0.25, 0)["x"].matrix()
    assert torch.allclose(pruned, torch.tensor([[0.0, 3.0], [0.0, 4.0]]), atol=1e-5)


def test_rank_stabilised_scales_count_in_full_and_a_density_of_0_leaves_nothing():
    model = linear()
    adapters = inject(model, LoRASpec(rank=4, alpha=3.0, rslora=True, targets=["0"], modules_to_save=[]))
    shake(adapters)
    (adapter,) = adapters
    found = updates(adapters)
    exact = 3.0 / 2 * (adapter.B @ adapter.A)
    assert relative(Update.sum([found["0"]] * 2, [0.3, 0.4]).matrix(), 0.7 * exact) < 1e-6
    for method in ("ties", "magnitude_prune"):
        empty = _sparse_mixture([found, found], [1.0, 1.0], method, 0.0, 0)["0"]
        assert not empty.matrix().any()
        assert empty.truncated(2)[1] == 0


def test_dare_keeps_the_expectation_and_a_share_of_density():
    update = Update.of_matrix(torch.randn(60, 50, generator=torch.Generator().manual_seed(4)))
    draws = torch.stack(
        [_sparse_mixture([{"x": update}], [2.0], "dare", 0.4, seed)["x"].matrix() for seed in range(60)]
    )
    whole = 2 * update.matrix()
    shares = (draws.abs() > 1e-4).float().mean()
    assert shares == pytest.approx(0.4, abs=0.01)
    kept = draws.abs() > 1e-4
    assert torch.allclose(draws[kept], (whole / 0.4).expand_as(draws)[kept], atol=1e-4)


def test_peft_refuses_a_head_that_it_cannot_build_and_opens_it_on_the_same_model(tmp_path):
    config = ModelConfig(name="random:bert", pooling="mean")

    def pooled():
        torch.manual_seed(0)
        return build_model(config, 3).eval()

    model = pooled()
    save_model(model, tmp_path / "base")
    adapters = inject(model, METHODS["lora"].Spec(rank=2))
    shake(adapters)
    with pytest.warns(UserWarning, match="reads the mean of the tokens"):
        save_adapter(adapters, tmp_path / "adapter", str(tmp_path / "base"), "SEQ_CLS")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "reads the mean of the tokens" in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == str(tmp_path / "base")
    with pytest.raises(ValueError, match="Cannot infer the auto class"):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(pooled(), tmp_path / "adapter").eval()
    assert relative(logits(theirs), logits(model)) < 1e-6
