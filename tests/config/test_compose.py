import pytest

from lora_lab.config import ExperimentConfig, compose
from lora_lab.config.documentation import field_documentation
from lora_lab.errors import ConfigError

TOY = "model: {name: random:mlp, task: regression}\ndata: {source: toy}\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def composed(tmp_path, text, *overrides) -> ExperimentConfig:
    return compose(write(tmp_path / "experiment.yaml", TOY + text), overrides)


def faults(tmp_path, text, *overrides) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        composed(tmp_path, text, *overrides)
    return str(caught.value).split("\n")


def test_the_method_chooses_the_fields_of_adapter(tmp_path):
    config = composed(tmp_path, "adapter: {method: lora, rank: 3, targets: all-linear}")
    assert (config.adapter.method, config.adapter.rank, config.adapter.targets) == ("lora", 3, "all-linear")


def test_a_layer_that_names_another_method_starts_adapter_afresh(tmp_path):
    config = composed(tmp_path, "adapter: {method: lora, rank: 3, rslora: true}", "adapter.method=ia3")
    assert config.adapter.method == "ia3"
    assert not hasattr(config.adapter, "rank")


def test_a_layer_that_names_the_same_method_again_changes_only_what_it_says(tmp_path):
    config = composed(tmp_path, "adapter: {method: lora, rank: 3}", "adapter.method=lora", "adapter.alpha=5")
    assert (config.adapter.rank, config.adapter.alpha) == (3, 5.0)


def test_files_extend_others_and_the_nearest_wins(tmp_path):
    write(tmp_path / "parts" / "far.yaml", "adapter: {method: lora, rank: 2, alpha: 2}")
    write(tmp_path / "parts" / "near.yaml", "extends: [far.yaml]\nadapter: {rank: 4}")
    config = composed(tmp_path, "extends: [parts/near.yaml]\nadapter: {dropout: 0.5}", "seed=7")
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout, config.seed) == (
        4,
        2.0,
        0.5,
        7,
    )


def test_overrides_win_in_their_order(tmp_path):
    config = composed(tmp_path, "adapter: {method: lora}", "adapter.rank=2", "adapter.rank=6")
    assert config.adapter.rank == 6


def test_overrides_take_lists_and_mappings(tmp_path):
    config = composed(
        tmp_path,
        "adapter: {method: lora}",
        "adapter.targets=[layer1,layer2]",
        "adapter.rank_pattern={layer1: 2}",
    )
    assert config.adapter.targets == ["layer1", "layer2"]
    assert config.adapter.rank_pattern == {"layer1": 2}


def test_all_faults_come_in_one_message_with_file_and_key(tmp_path):
    found = faults(
        tmp_path, "adapter: {method: lora, rnak: 2, alpha: much}\nsede: 1", "trainer.max_epochs=many"
    )
    file = str(tmp_path / "experiment.yaml")
    assert len(found) == 4
    assert any(
        f.startswith(f"{file}: adapter.rnak: no such key; did you mean 'rank'? Known: ") for f in found
    )
    assert any(f.startswith(f"{file}: adapter.alpha: ") and "much" in f for f in found)
    assert any(f.startswith(f"{file}: sede: no such key; did you mean 'seed'?") for f in found)
    assert any(f.startswith("command line: trainer.max_epochs: ") and "many" in f for f in found)


def test_other_libraries_names_are_translated(tmp_path):
    assert "it is called 'alpha' here" in faults(tmp_path, "adapter: {method: lora, lora_alpha: 2}")[0]
    assert "it is called 'rank' here" in faults(tmp_path, "adapter: {method: lora, r: 2}")[0]


def test_faults_of_fields_that_are_each_well_formed_are_gathered_too(tmp_path):
    found = faults(
        tmp_path,
        "adapter: {method: lora, rank: 0, dropout: 1.0}\n"
        "optimization: {learning_rate: -1}\n"
        "trainer: {accumulate: 0}",
    )
    assert [f.split(": ")[1] for f in found] == [
        "adapter.rank",
        "adapter.dropout",
        "optimization.learning_rate",
        "trainer.accumulate",
    ]


def test_an_unknown_method_is_told_with_a_suggestion(tmp_path):
    assert (
        "adapter.method: no method 'lorra'; did you mean 'lora'? Known: "
        in faults(tmp_path, "adapter: {method: lorra}")[0]
    )


def test_a_missing_method_is_told_with_those_there_are(tmp_path):
    assert "adapter.method: is required. Known: " in faults(tmp_path, "seed: 1")[0]


def test_a_circle_of_extends_is_refused(tmp_path):
    write(tmp_path / "a.yaml", "extends: [b.yaml]")
    write(tmp_path / "b.yaml", "extends: [a.yaml]")
    with pytest.raises(ConfigError, match="in a circle"):
        compose(tmp_path / "a.yaml")


def test_the_hash_depends_on_what_decides_the_result_and_on_nothing_else(tmp_path):
    text = "adapter: {method: lora}"
    plain = composed(tmp_path, text).hash()
    assert (
        composed(tmp_path, text, "output=elsewhere", "name=other", "tracking.wandb=disabled").hash() == plain
    )
    assert composed(tmp_path, text, "adapter.rank=9").hash() != plain
    assert composed(tmp_path, text, "seed=1").hash() != plain


def test_a_composed_config_composes_again_to_itself(tmp_path):
    from dataclasses import asdict

    import yaml

    config = composed(tmp_path, "adapter: {method: lora, rank_pattern: {layer1: 2}, targets: [layer1]}")
    path = write(tmp_path / "again.yaml", yaml.safe_dump(asdict(config)))
    assert compose(path) == config


def test_every_field_of_every_part_is_documented():
    from dataclasses import fields

    from lora_lab.config.compose import UNIONS
    from lora_lab.models.build import ModelConfig
    from lora_lab.tracking import TrackingConfig
    from lora_lab.training.optimization import OptimizationConfig
    from lora_lab.training.trainer import TrainerConfig

    kinds = [kind for _, table in UNIONS.values() for kind in table.values()]
    for kind in [*kinds, ModelConfig, TrackingConfig, OptimizationConfig, TrainerConfig]:
        documented = field_documentation(kind)
        silent = [f.name for f in fields(kind) if f.name not in documented and f.name != "method"]
        assert not silent, f"{kind.__name__}: no docstring under {silent}"
