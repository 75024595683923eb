"""merge, export and combine on the folders of real runs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BertForMaskedLM

from lora_lab import evaluate
from lora_lab.adapters.storage import (
    CARD,
    CONFIG,
    OWN,
    TENSORS,
    load_adapter,
    read_label_names,
    stored_lineage,
)
from lora_lab.artifacts import combine, export, import_file, merge
from lora_lab.artifacts.opening import find_adapter, open_adapter
from lora_lab.cli import main
from lora_lab.errors import CheckpointError, IncompatibleError
from lora_lab.experiment.mixtures import evaluate_mixture
from lora_lab.models.build import ModelConfig, build_model, build_tokenizer
from lora_lab.models.conversion import save_model
from lora_lab.models.tiny import character_tokenizer
from lora_lab.report.pages import report
from tests.wandb_file import offline_folders, read_offline_run

TEXTS = ["a good film", "what a bore", "well made and moving", "not worth the time", "fine", "no"]


def trained(folder, model, name, *settings):
    """Trains one run of a few steps; returns its folder."""
    lines = [json.dumps({"text": text, "label": index % 2}) for index, text in enumerate(TEXTS * 2)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    task, label = ("causal_lm", "") if "gpt2" in model else ("sequence_classification", ", label: label")
    (folder / "experiment.yaml").write_text(
        f"name: trial\noutput: {folder / 'runs'}\nmodel: {{name: '{model}', task: {task}}}\n"
        f"data: {{source: files, train: {folder / 'rows.jsonl'}, batch_size: 4, max_length: 16{label}}}\n"
        "adapter: {method: lora, rank: 4, targets: all-linear}\n"
        "optimization: {learning_rate: 0.05}\ntrainer: {max_steps: 4}\ntracking: {wandb: disabled}\n"
    )
    arguments = ["train", str(folder / "experiment.yaml"), f"run={name}", *settings]
    assert main(arguments) == 0
    return folder / "runs" / "trial" / name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder of GPT-2, whose layers lie transposed on the disk, with a tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "gpt2"
    config = ModelConfig(name="random:gpt2", task="causal_lm")
    torch.manual_seed(0)
    save_model(build_model(config), folder)
    build_tokenizer(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tracked = ["tracking.wandb=offline", "tracking.log_adapter=true"]
    return [
        trained(folder, str(base), "one", *tracked),
        trained(folder, str(base), "two", "seed=7", "adapter.rank=3"),
    ]


def stored_logits(base, adapter):
    model = build_model(ModelConfig(name=str(base), task="causal_lm")).eval()
    load_adapter(model, adapter)
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 17)[None]).logits


def test_a_merged_run_opens_in_transformers_alone(base, runs, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", str(runs[0]), "--out", str(out), "--shard-size", "20KB"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        merged = model(input_ids=torch.arange(5, 17)[None]).logits
    torch.testing.assert_close(merged, stored_logits(base, runs[0] / "adapter"), atol=1e-5, rtol=1e-5)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert (out / "tokenizer_config.json").is_file()
    card = (out / "README.md").read_text()
    assert "lora adapter" in card
    assert "validation" in card or "train/loss" in card
    assert main(["merge", str(runs[0]), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_classifier_keeps_its_head(tmp_path):
    run = trained(tmp_path, "random:bert", "one", "adapter.targets=[query]", "data.max_length=12")
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.num_labels == 2


def test_frozen_weights_that_the_files_lack_are_merged_as_they_were_drawn(tmp_path):
    """BERT's pooler, on files in bfloat16 of a language model, in a run in float32."""
    language = BertForMaskedLM(build_model(ModelConfig(name="random:bert")).config).to(torch.bfloat16)
    language.save_pretrained(tmp_path / "base")
    character_tokenizer(language.config).save_pretrained(tmp_path / "base")
    run = trained(tmp_path, str(tmp_path / "base"), "one", "adapter.targets=[query]", "data.max_length=12")
    merge(run, tmp_path / "merged")
    _, adapters = open_adapter(find_adapter(run))
    expected, found = adapters.merge().state_dict(), load_file(tmp_path / "merged" / "model.safetensors")
    for name in ("bert.pooler.dense.weight", "classifier.weight"):
        assert torch.equal(found[name], expected[name]), name


def test_a_run_puts_its_adapter_and_lineage_out_as_an_artifact(base, runs):
    lineage = stored_lineage(runs[0] / "adapter")
    record = json.loads((runs[0] / "run.json").read_text())
    assert lineage["base"]["name"] == str(base)
    assert (lineage["data"], lineage["config"]) == (record["data_fingerprint"], record["config_hash"])
    offline = read_offline_run(*offline_folders(runs[0]))
    (artifact,) = [made for made in offline.artifacts if made["type"] == "adapter"]
    assert artifact["run"] == offline.id
    assert artifact["metadata"] == lineage
    assert artifact["files"] == sorted((CARD, CONFIG, TENSORS, OWN))


def test_another_base_needs_a_word_and_the_card_says_so(base, runs, tmp_path, capsys):
    torch.manual_seed(1)
    other = tmp_path / "other"
    save_model(build_model(ModelConfig(name="random:gpt2", task="causal_lm")), other)
    character_tokenizer(AutoConfig.from_pretrained(other)).save_pretrained(other)
    words = ["merge", str(runs[0]), "--out", str(tmp_path / "merged"), "--base", str(other)]
    assert main(words) == 2
    assert f"was trained on {base}" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert main([*words, "--any-base"]) == 0
    assert f"than those of {other}" in (tmp_path / "merged" / "README.md").read_text()


def test_exports_and_mixtures_are_the_functions_that_they_claim(base, runs, tmp_path, capsys):
    both = [stored_logits(base, run / "adapter") for run in runs]
    assert main(["export", str(runs[0]), "--out", str(tmp_path / "lora")]) == 0
    assert "relative error" in capsys.readouterr().out
    torch.testing.assert_close(stored_logits(base, tmp_path / "lora"), both[0], atol=1e-5, rtol=1e-5)
    for weights, expected in ((["1", "0"], both[0]), (["0", "1"], both[1])):
        out = tmp_path / f"mixed{weights[0]}"
        assert main(["combine", *map(str, runs), "--out", str(out), "--weights", *weights]) == 0
        torch.testing.assert_close(stored_logits(base, out), expected, atol=1e-5, rtol=1e-5)


def test_a_mixture_is_judged_on_the_data_of_each_run(runs, tmp_path, capsys):
    quiet = "trainer.progress_bar=false"
    judged = evaluate_mixture(runs, [3.0, -2.0], [quiet])
    combine(runs, tmp_path / "mixed", [3.0, -2.0])
    for run, found in zip(runs, judged, strict=True):
        assert found.alone == pytest.approx(evaluate(run, [quiet]), rel=1e-6)
        copy = tmp_path / run.name
        shutil.copytree(run, copy)
        shutil.rmtree(copy / "adapter")
        shutil.copytree(tmp_path / "mixed", copy / "adapter")
        assert found.mixture == pytest.approx(evaluate(copy, [quiet]), rel=1e-5)
        assert found.mixture["validation/loss"] != pytest.approx(found.alone["validation/loss"], rel=1e-4)
    assert main(["evaluate", "+".join(map(str, runs)), quiet]) == 0
    assert "mixture" in capsys.readouterr().out


def test_heads_mix_if_they_are_of_one_kind_and_nothing_of_the_untrained_one_stays(runs, tmp_path, capsys):
    run = trained(tmp_path, "random:bert", "one", "adapter.targets=[query]", "data.max_length=12")
    (found, _) = evaluate_mixture([run, run], None, ["trainer.progress_bar=false"])
    assert found.mixture == pytest.approx(found.alone, rel=1e-5)
    for words, message in (
        ([f"{run}+{run}", "--weights", "0.3", "0.3"], "must add up to 1 where classifier is mixed"),
        ([f"{run}+{runs[0]}"], "differ in model.name"),
        ([f"{run}+{run}", "--weights", "1"], "a finite number for each run, 2"),
        ([str(run), "--weights", "1"], "belong to a mixture"),
        ([f"{run}+{run}", "adapter.rank=2"], "no setting of adapter can act"),
        ([f"{run}+{run.parent}"], "holds no run"),
    ):
        assert main(["evaluate", *words]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_the_folder_that_is_named_is_used_in_a_run_too(base, runs, tmp_path):
    export(runs[0], runs[0] / "small", rank=1)
    assert set(export(runs[0] / "adapter", tmp_path / "whole").ranks.values()) == {4}
    merge(runs[0] / "small", tmp_path / "merged")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(torch.arange(5, 17)[None]).logits
    torch.testing.assert_close(merged, stored_logits(base, runs[0] / "small"), atol=1e-5, rtol=1e-5)
    assert set(combine([runs[0] / "small", runs[1]], tmp_path / "mixed").ranks.values()) == {4}


def test_no_adapter_is_lost_to_an_out_folder(runs, tmp_path):
    run, other, own = *runs, runs[0] / "adapter"
    before = (own / TENSORS).read_bytes()
    made = export(run, tmp_path / "made").folder
    combine([run, other], made)
    shutil.copytree(own, tmp_path / "trained")
    (tmp_path / "link").symlink_to(own)
    lost = tmp_path / "lost"
    shutil.copytree(run, lost)
    shutil.rmtree(lost / "adapter")
    for make in (
        lambda: export(other, own),
        lambda: export(run, tmp_path / "link"),
        lambda: export(run, own / "inner"),
        lambda: export(made, made),
        lambda: combine([run, made], made),
        lambda: combine([run, other], tmp_path / "trained"),
        lambda: merge(run, lost / "adapter"),
        lambda: import_file(tmp_path / "file.safetensors", own, "random:llama"),
    ):
        with pytest.raises(CheckpointError, match="Name a new folder"):
            make()
    assert (own / TENSORS).read_bytes() == before


def test_a_mixture_has_the_classes_of_its_head(tmp_path):
    run = trained(tmp_path, "random:bert", "one", "adapter.targets=[query]", "data.max_length=12")
    other = shutil.copytree(run, tmp_path / "other")
    tensors = load_file(other / "adapter" / TENSORS)
    (head,) = [name for name in tensors if name.endswith("classifier.weight")]
    save_file(tensors | {head: tensors[head] + 1}, other / "adapter" / TENSORS)
    own = other / "adapter" / OWN
    own.write_text(own.read_text().replace("classes:\n- '0'\n- '1'", "classes: [spam, ham]"))
    for heads, source, classes in ((1, run, ["0", "1"]), (2, other, ["spam", "ham"])):
        mixed = combine([run, other], tmp_path / "mixed", heads=heads).folder
        assert read_label_names(mixed) == classes
        expected = load_file(source / "adapter" / TENSORS)[head]
        assert torch.equal(load_file(mixed / TENSORS)[head], expected)
    for heads in ("average", None):
        with pytest.raises(IncompatibleError, match=r"other classes \(spam, ham; 0, 1\).*--heads 1"):
            combine([run, other], tmp_path / "refused", heads=heads)
    assert not (tmp_path / "refused").exists()


def test_python_takes_paths_as_text(runs, tmp_path):
    run, other = map(str, runs)
    assert merge(run, str(tmp_path / "merged")).folder == tmp_path / "merged"
    assert export(run, str(tmp_path / "lora")).folder == tmp_path / "lora"
    assert combine([run, other], str(tmp_path / "mixed")).folder == tmp_path / "mixed"
    assert evaluate(run, ["trainer.progress_bar=false"])
    files = {name: str(tmp_path / name) for name in ("html", "markdown", "csv")}
    report([run, other]).write(**files)
    assert all((tmp_path / name).is_file() for name in files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "RUN", "--rank", "0"], "--rank: must be at least 1"),
        (["export", "RUN", "--energy", "1.5"], "--energy: must lie in"),
        (["export", "RUN", "--as", "peft", "--rank", "2"], "cut a LoRA"),
        (["export", "RUN", "--active-rank", "2"], "no nested ranks"),
        (["export", "NOTHING"], "neither a run nor an adapter"),
        (["combine", "RUN"], "at least two adapters"),
        (["combine", "RUN", "RUN", "--method", "mean"], "--method: must be one of"),
        (["combine", "RUN", "RUN", "--method", "ties"], "share of numbers"),
        (["combine", "RUN", "RUN", "--density", "0.5"], "keeps them all"),
        (["combine", "RUN", "RUN", "--method", "dare", "--density", "0"], "above 0 for dare"),
        (["combine", "RUN", "RUN", "--method", "svd"], "needs --rank or --energy"),
        (["combine", "RUN", "RUN", "--weights", "1"], "one for each adapter"),
        (["combine", "RUN", "RUN", "--weights", "1", "nan"], "--weights: must be finite; got 1.0, nan"),
        (["combine", "RUN", "RUN", "--heads", "0"], "--heads: must be a source's number, 1 to 2"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(runs, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    places = {"RUN": str(runs[0]), "NOTHING": str(tmp_path)}
    assert main([places.get(word, word) for word in arguments] + ["--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
