import os
import re

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


def test_another_method_keeps_the_fields_that_both_have_and_says_what_is_reset(tmp_path, caplog):
    file = "adapter: {method: lora, rank: 3, alpha: 5, targets: [layer1], layers: [1], rslora: true}"
    dora = composed(tmp_path, file, "adapter.method=dora").adapter
    assert (dora.rank, dora.alpha, dora.targets, dora.layers) == (3, 5.0, ["layer1"], [1])
    caplog.clear()
    ia3 = composed(tmp_path, file, "adapter.method=ia3").adapter
    assert (ia3.method, ia3.targets, hasattr(ia3, "rank")) == ("ia3", ["layer1"], False)
    (record,) = caplog.records
    assert record.getMessage().endswith("ia3 does not have the same: rank, alpha, rslora.")
    assert composed(tmp_path, file, "adapter.method=head").adapter.targets == []


def test_a_method_named_back_has_its_own_fields_again(tmp_path):
    file = "adapter: {method: lora, rank: 3, rslora: true}"
    adapter = composed(tmp_path, file, "adapter.method=ia3", "adapter.method=lora").adapter
    assert (adapter.rank, adapter.rslora) == (3, True)


def test_another_data_source_keeps_what_all_sources_have(tmp_path):
    config = composed(
        tmp_path, "adapter: {method: lora}", "data.batch_size=3", "data.size=7", "data.source=embedded",
        "data.name=movie_reviews", "model.name=random:bert", "model.task=sequence_classification",
    )  # fmt: skip
    assert (config.data.source, config.data.batch_size) == ("embedded", 3)


@pytest.mark.parametrize(
    "text", ["0123", "on", "12:30", "1e3", "12e4567", "true", "0x1f", "1_000", "2020-01-01", "+5", ".5"]
)
def test_a_field_for_text_takes_a_value_as_it_was_written(tmp_path, text):
    assert composed(tmp_path, "adapter: {method: lora}", f"run={text}").run == text
    assert composed(tmp_path, f"adapter: {{method: lora}}\nrun: {text}").run == text
    assert composed(tmp_path, "adapter: {method: lora}", f"adapter.targets=[{text}]").adapter.targets == [
        text
    ]


def test_numbers_of_every_usual_form_reach_fields_for_numbers(tmp_path):
    config = composed(
        tmp_path, "adapter: {method: lora, rank: 010}", "optimization.learning_rate=1e-3",
        "optimization.gradient_clip=null", "trainer.progress_bar=off", "trainer.max_steps=-1",
    )  # fmt: skip
    assert (config.adapter.rank, config.optimization.learning_rate) == (10, 1e-3)
    assert config.optimization.gradient_clip is None
    assert config.trainer.progress_bar is False


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nname: a\nseed: 2", "the key 'seed' occurs twice, in lines 3 and 5"),
        ("adapter: {method: lora, rank: 2, rank: 3}", "the key 'rank' occurs twice, in lines 3 and 3"),
        ("seed: &s [*s]", "holds itself"),
        ("seed: " + "[" * 5000, "nests more than"),
        ("seed: !!python/name:os.system", "tag"),
        ("seed: !!python/object/apply:os.getenv [HOME]", "tag"),
        ("tracking: !!python/object:os.environ {wandb: disabled}", "tag"),
        ("<<: {seed: 1}", "<<: no such key"),
        ("seed: 4294967296", "seed: must lie from 0 to 4294967295"),
        ("run: ${oc.env:NO_SUCH_NAME_HERE}", "NO_SUCH_NAME_HERE"),
    ],
)
def test_what_yaml_hides_is_refused(tmp_path, text, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        composed(tmp_path, text if "adapter" in text else text + "\nadapter: {method: lora}")


def test_values_behind_aliases_are_counted_where_they_are_used(tmp_path):
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    with pytest.raises(ConfigError, match="aliases expand to more than"):
        composed(tmp_path, bomb)


def test_a_pipe_is_no_config(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="not a plain file"):
        compose(tmp_path / "pipe.yaml")


def test_a_stored_config_reads_nothing_else(tmp_path):
    path = write(tmp_path / "config.yaml", TOY + "adapter: {method: lora}\nname: ${oc.env:HOME}")
    with pytest.raises(ConfigError, match="stored config"):
        compose(path, stored=True)
    write(path, TOY + "adapter: {method: lora}\nextends: [other.yaml]")
    write(tmp_path / "other.yaml", "seed: 3")
    with pytest.raises(ConfigError, match="stored config"):
        compose(path, stored=True)
    write(path, TOY + "adapter: {method: lora}")
    assert compose(path, ["seed=4"], stored=True).seed == 4


def test_a_missing_key_is_blamed_on_the_file_that_names_its_source(tmp_path):
    write(tmp_path / "parts" / "own.yaml", "data: {source: files}")
    path = write(
        tmp_path / "x.yaml",
        "extends: [parts/own.yaml]\nmodel: {name: random:bert}\nadapter: {method: lora}",
    )
    with pytest.raises(ConfigError, match=r"own\.yaml: data\.train: is required"):
        compose(path)


@pytest.mark.parametrize(
    ("own", "settings", "blamed"),
    [
        ("data: {batch_size: 4}", ["data.batch_size=8"], "x.yaml"),
        ("seed: 1", ["data.batch_size=8"], "part.yaml"),
        ("seed: 1", ["data.source=hub"], "command line"),
    ],
)
def test_a_missing_key_is_blamed_on_the_file_where_it_should_stand(tmp_path, own, settings, blamed):
    write(tmp_path / "part.yaml", "data: {source: files, label: label}")
    text = "extends: [part.yaml]\nmodel: {name: random:bert}\nadapter: {method: lora}\n"
    with pytest.raises(ConfigError, match=r"data\.(train|path): is required") as caught:
        compose(write(tmp_path / "x.yaml", text + own), settings)
    (message,) = str(caught.value).splitlines()
    assert message.removeprefix(f"{tmp_path}/").startswith(f"{blamed}: data.")


def test_text_for_a_list_is_answered_with_the_list_to_write(tmp_path):
    text = "model: {name: random:bert}\nadapter: {method: lora}\n"
    text += "data: {source: files, train: a.csv, text: review}"
    with pytest.raises(ConfigError, match=r"data\.text: must be a list; write \[review\]"):
        compose(write(tmp_path / "x.yaml", text))


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
    write(tmp_path / "a.yaml", "extends: [./sub/../b.yaml]")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.yaml", "extends: [a.yaml]")
    with pytest.raises(ConfigError, match="in a circle"):
        compose(tmp_path / "a.yaml")


def test_files_that_extend_one_twice_each_are_counted(tmp_path):
    for place in range(20):
        write(tmp_path / f"{place}.yaml", f"extends: [{place + 1}.yaml, {place + 1}.yaml]")
    write(tmp_path / "20.yaml", TOY + "adapter: {method: lora}")
    assert compose(tmp_path / "17.yaml").adapter.method == "lora"
    with pytest.raises(ConfigError, match="goes through more than 50 files"):
        compose(tmp_path / "0.yaml")


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

    kinds = [kind for _, table in UNIONS.values() for kind in table().values()]
    for kind in [*kinds, ModelConfig, TrackingConfig, OptimizationConfig, TrainerConfig]:
        documented = field_documentation(kind)
        silent = [f.name for f in fields(kind) if f.name not in documented and f.name != "method"]
        assert not silent, f"{kind.__name__}: no docstring under {silent}"
