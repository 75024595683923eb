"""Folders of strangers that ask for secrets: all that can be done is done with them, and nothing gets out.

Secrets stand in the environment and in files of the home folder. The folders ask for them in every way that a
reader of YAML, JSON, Python or templates might follow; then every byte that was written is searched.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import wandb
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lora_lab import load_adapter, save_adapter
from lora_lab.adapters.storage import OWN
from lora_lab.cli import main
from lora_lab.errors import CheckpointError, LabError
from lora_lab.models.build import ModelConfig, build_model, build_tokenizer
from lora_lab.models.conversion import save_model

TEXT, NUMBER, FILE, TOKEN = (
    "swordfish-in-the-environment",
    "481516234210815",
    "swordfish-in-a-file",
    "hf_swordfishToken",
)
KEY = "5w0rdf15h" * 4 + "5w0r"
"""A key of W&B's length."""
SECRETS = (TEXT, NUMBER, FILE, TOKEN, KEY)
ASKING = [
    "${oc.env:PLANTED_TEXT}",
    "${oc.decode:${oc.env:PLANTED_NUMBER}}",
    "${oc.create:{a:${oc.env:PLANTED_TEXT}}}",
    "${env:PLANTED_TEXT}",
    "$PLANTED_TEXT",
    "{{ environ.PLANTED_TEXT }}",
    "!!python/object/apply:os.getenv [PLANTED_TEXT]",
]
"""Texts that some reader would replace by a secret."""
ROWS = [("a good film", "yes"), ("a bad film", "no"), ("fine plot", "yes"), ("dull plot", "no")] * 5


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Secrets in the environment and in a home folder that is not among what is searched."""
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    for name in (".netrc", ".env", "vocab.txt", "notes.yaml", ".cache/huggingface/token"):
        (home / name).write_text(f"machine api.wandb.ai login user password {FILE}\n")
    values = {"PLANTED_TEXT": TEXT, "PLANTED_NUMBER": NUMBER, "HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY}
    for name, value in {**values, "HOME": str(home), "NETRC": str(home / ".netrc")}.items():
        monkeypatch.setenv(name, value)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    wandb.teardown()
    yield work
    wandb.teardown()


def strange_model(folder: Path) -> None:
    """A model folder that names code beside it, and asks for secrets in texts of all its files."""
    config = ModelConfig(name="random:bert")
    save_model(build_model(config, 2), folder)
    build_tokenizer(config).save_pretrained(folder)
    (folder / "evil.py").write_text(
        "import os, pathlib\npathlib.Path('executed').write_text(os.environ['PLANTED_TEXT'])\n"
    )
    for name, changes in {
        "config.json": {
            "auto_map": {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"},
            "trust_remote_code": True,
            "_name_or_path": ASKING[0],
            "note": ASKING,
        },
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
            "trust_remote_code": True,
            "chat_template": ASKING[5],
            "note": ASKING,
        },
    }.items():
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(stored | changes))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "note": " ".join(ASKING)})
    (folder / "README.md").write_text("---\nbase_model: " + ASKING[0] + "\n---\n" + "\n".join(ASKING))


def strange_adapter(folder: Path) -> None:
    """Adds to a folder of PEFT's what asks for secrets in every field that changes no number."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"auto_mapping": {"base_model_class": "evil.Model", "parent_library": "evil"}}
    config |= {"base_model_name_or_path": "$PLANTED_TEXT", "revision": "{{ environ.PLANTED_TEXT }}"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt", "note": " ".join(ASKING)})
    (folder / "README.md").write_text("---\nbase_model: " + ASKING[0] + "\n---\n" + "\n".join(ASKING))


def experiment(place: Path) -> str:
    lines = ["text,label", *(f"{text},{label}" for text, label in ROWS)]
    lines += [f'"{asking}",{label}' for asking in ASKING[:4] for label in ("yes", "no")]
    (place / "train.csv").write_text("\n".join(lines) + "\n")
    (place / "experiment.yaml").write_text(
        "name: strange\noutput: runs\nmodel: {name: ./model}\n"
        "data: {source: files, train: train.csv, label: label, max_length: 16, test_fraction: 0.2}\n"
        "adapter: {method: lora, rank: 2, targets: [query]}\n"
        "trainer: {max_epochs: 1, progress_bar: false}\ntracking: {wandb: offline}\n"
    )
    return str(place / "experiment.yaml")


def test_no_secret_gets_into_anything_that_is_written(place, capfd):
    strange_model(place / "model")
    run = place / "runs" / "strange" / "one"
    assert main(["train", experiment(place), "run=one"]) == 0
    strange_adapter(run / "adapter")
    (run / "adapter" / "lora_lab.yaml").rename(place / "lora_lab.yaml")

    model = build_model(ModelConfig(name="model"), 2)
    adapters = load_adapter(model, run / "adapter")  # read as a folder of PEFT's
    save_adapter(adapters, place / "again")
    (place / "lora_lab.yaml").rename(run / "adapter" / "lora_lab.yaml")

    assert main(["evaluate", str(run), "trainer.progress_bar=false"]) == 0
    for command in (["merge"], ["export", "--as", "peft"], ["export"]):
        out = f"out-{'-'.join(command)}"
        assert main([command[0], str(run), "--out", out, *command[1:]]) == 0
    assert main(["report", str(run), "--html", "report.html", "--csv", "report.csv"]) == 0
    AutoTokenizer.from_pretrained("out-merge")

    refusals(place, run, model, adapters)
    printed = capfd.readouterr()
    check(place, printed.out + printed.err)
    assert not (place / "executed").exists()


def refusals(place: Path, run: Path, model: torch.nn.Module, adapters) -> None:
    """What must be refused, since a field with a meaning asks for a secret."""
    adapters.remove()
    copy = place / "copy"
    for asking in ASKING[:3]:
        for field, file in (("name", "config.yaml"), ("model", "config.yaml"), ("alpha", f"adapter/{OWN}")):
            shutil.copytree(run, copy)
            text = (copy / file).read_text()
            old = next(line for line in text.splitlines() if line.strip().startswith(f"{field}:"))
            new = f"{old.partition(':')[0]}: {json.dumps(asking)}"
            (copy / file).write_text(text.replace(old, new, 1))
            command = ["evaluate", str(copy)] if field == "name" else ["merge", str(copy), "--out", "no"]
            assert main(command) == 2
            assert not (place / "no").exists()
            shutil.rmtree(copy)
    for command in (["evaluate"], ["merge", "--out", "no"], ["export", "--out", "no"]):
        shutil.copytree(run, copy)
        config = copy / "config.yaml"
        text = config.read_text()
        assert "trust_remote_code: false" in text
        config.write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
        assert main([command[0], str(copy), *command[1:]]) == 2
        shutil.rmtree(copy)
    for outward in (os.environ["NETRC"], "../../home/notes.yaml", "~/.env"):
        shutil.copytree(run, copy)
        config = copy / "config.yaml"
        config.write_text(f"extends: [{outward}]\n" + config.read_text())
        assert main(["evaluate", str(copy)]) == 2
        shutil.rmtree(copy)
    for field in ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias", "peft_type"):
        shutil.copytree(place / "again", copy)
        (copy / OWN).unlink()
        path = copy / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: ASKING[1]}))
        with pytest.raises(LabError) as caught:
            load_adapter(model, copy)
        print(caught.value)
        shutil.rmtree(copy)
    for text in ("!!python/object/apply:os.getenv [PLANTED_TEXT]", "!!python/name:os.environ ''", "!env X"):
        shutil.copytree(place / "again", copy)
        (copy / OWN).write_text(f"adapter: {{method: lora, targets: {text}}}\n")
        with pytest.raises(CheckpointError, match="the tag"):
            load_adapter(model, copy)
        shutil.rmtree(copy)
    for file in ("../../home/vocab.txt", str(place.parent / "home" / "vocab.txt")):
        shutil.copytree(place / "model", copy)
        path = copy / "tokenizer_config.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"vocab_file": file, "tokenizer_file": file})
        )
        (copy / "tokenizer.json").unlink()
        try:
            build_tokenizer(ModelConfig(name=str(copy))).save_pretrained(place / "tokenizer")
        except LabError as error:
            print(error)
        shutil.rmtree(copy)


def check(place: Path, printed: str) -> None:
    files = [path for path in place.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    (place / "printed.txt").write_text(printed)
    for path in [*files, place / "printed.txt"]:
        held = path.read_bytes()
        for secret in SECRETS:
            assert secret.encode() not in held, f"{path.relative_to(place)} holds {secret}"
