"""Rank redistribution: ranks and starts are those of the inputs' singular values."""

import lightning as L
import numpy as np
import pytest

from lora_lab.adapters import inject
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.callbacks.controllers.rank_redistribution import RankRedistribution, RankRedistributionSpec
from lora_lab.errors import ConfigError, IncompatibleError
from tests.callbacks.controlled import LAYERS, assert_equal, fresh_model, train

RANK = 3


class First(L.Callback):
    """Keeps the adapters as they are before the first step, and what they say of the model's outputs."""

    def __init__(self):
        self.start = None

    def on_train_start(self, trainer, module):
        if trainer.global_step == 0:
            self.rows = trainer.datamodule.splits["train"].examples
            self.start = {
                path: (own.A.detach().clone(), own.B.clone()) for path, own in module.adapters.items()
            }


def run(first=None, **options):
    spec = RankRedistributionSpec(sample_ratio=1.0, rho=2.0)
    extra = [first] if first else []
    return train(LoRASpec(rank=RANK), {"rank_redistribution": spec}, 8, extra=extra, **options)


def inputs_of_layers(rows):
    """Returns the inputs of each layer, from plain NumPy."""
    model = fresh_model()
    x = np.stack([row["features"].numpy() for row in rows]).astype(float)
    found = {}
    for name, layer in model.named_children() if hasattr(model, "layer1") else []:
        if name in LAYERS:
            found[name] = x
            weight, bias = (t.detach().double().numpy() for t in (layer.weight, layer.bias))
            x = np.maximum(x @ weight.T + bias, 0)
    return found


def test_ranks_and_starts_are_those_of_the_inputs():
    first = First()
    done = run(first)
    found = inputs_of_layers([first.rows[i] for i in range(len(first.rows))])
    assert list(found) == LAYERS
    shares, directions = {}, {}
    for name, x in found.items():
        _, values, vectors = np.linalg.svd(x, full_matrices=True)
        shares[name] = values**2 / (values**2).sum()
        directions[name] = vectors
    left = sorted(((share, name) for name in LAYERS for share in shares[name][1 : 2 * RANK]), reverse=True)
    chosen = [name for _, name in left[: 3 * RANK - 3]]
    expected = {name: 1 + chosen.count(name) for name in LAYERS}
    assert len(set(expected.values())) > 1
    for name, (A, B) in first.start.items():
        assert len(A) == expected[name]
        assert not B.any()
        alike = np.abs(np.sum(A.double().numpy() * directions[name][: len(A)], axis=1))
        assert alike == pytest.approx(np.ones(len(A)), abs=1e-3)
    assert [own.rank for own in done.adapters] == list(expected.values())
    assert done.controllers["rank_redistribution"].statistics() == {"budget/kept": 3 * RANK}


def test_a_resumed_run_is_not_prepared_again_and_equals_the_uninterrupted_one(tmp_path):
    whole = run()
    run(stop_after=3, folder=tmp_path)
    assert_equal(run(folder=tmp_path, resume=True).adapters, whole.adapters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.5}, "controllers.rank_redistribution.rho: must be finite and at least 1; got 0.5"),
        ({"sample_ratio": 0.0}, r"sample_ratio: must lie in \(0, 1\]"),
        ({"min_rank": 0}, "min_rank: must be at least 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    adapters = inject(fresh_model(), LoRASpec(rank=2, targets=LAYERS, modules_to_save=[]))
    with pytest.raises(ConfigError, match=message):
        RankRedistribution(RankRedistributionSpec(**options), adapters)


def test_subtracted_starts_are_refused():
    adapters = inject(fresh_model(), LoRASpec(rank=2, init="olora", targets=LAYERS, modules_to_save=[]))
    with pytest.raises(IncompatibleError, match="layer1 subtracts its start"):
        RankRedistribution(RankRedistributionSpec(), adapters)
