"""Every YAML that is shipped composes, and says what it is for."""

from pathlib import Path

import pytest

from lora_lab.adapters import METHODS
from lora_lab.callbacks import CONTROLLERS
from lora_lab.config import compose
from lora_lab.data import hub
from lora_lab.studies import read_study

ROOT = Path(__file__).parent.parent
FILL = {
    "models": "model: {name: embedded:minilm}\n",
    "data": "data: {source: toy}\n",
    "adapters": "adapter: {method: lora}\n",
}
FRAGMENTS = sorted((ROOT / "configs").rglob("*.yaml"))
STUDIES = sorted(path for path in (ROOT / "experiments").rglob("*.yaml") if "\nquestion:" in path.read_text())
CLAIMS = ROOT / "experiments" / "claims"
EXPERIMENTS = sorted({*(ROOT / "experiments").rglob("*.yaml")} - {*STUDIES, *CLAIMS.iterdir()})


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_fragment_composes_into_an_experiment(path, tmp_path):
    group = path.parent.name
    rest = "".join(text for name, text in FILL.items() if name != group)
    task = "causal_lm" if "causal_lm" in path.read_text() else "sequence_classification"
    rest = rest.replace("{source: toy}", "{source: embedded, name: movie_reviews}")
    whole = tmp_path / "experiment.yaml"
    whole.write_text(f"extends: [{path}]\n{rest}")
    settings = [f"model.task={task}"]
    if group == "controllers":
        needs = CONTROLLERS[path.stem].Spec().needs()
        if CONTROLLERS[path.stem].Spec().faults_beside({}):  # it goes with another
            settings.append("controllers.rank_pruning={}")
        settings.append(f"adapter.method={next(m for m, kind in METHODS.items() if issubclass(kind, needs))}")
    config = compose(whole, settings)
    assert path.stem in (config.adapter.method, config.model.name) or group != "adapters"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_experiment_composes(path):
    assert compose(path).name == path.parent.name


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_study_composes(path, monkeypatch):
    # Data of the hub are not read here, so their package need not be installed. Transformers asks for others.
    find = hub.importlib.util.find_spec
    monkeypatch.setattr(
        hub.importlib.util, "find_spec", lambda name, *rest: name == "datasets" or find(name, *rest)
    )
    study = read_study(path)
    assert study.name == (path.parent.name if path.stem == "study" else path.stem)


def test_each_config_opens_with_its_purpose():
    assert not [path for path in FRAGMENTS + EXPERIMENTS + STUDIES if not path.read_text().startswith("# ")]


def test_each_experiment_tells_its_command_and_what_to_expect():
    for path in EXPERIMENTS + STUDIES:
        head = path.read_text()
        assert "# Command:" in head, path
        assert "# Expect:" in head, path


def test_each_experiment_folder_has_a_readme_and_raw_results():
    overview = (ROOT / "experiments" / "README.md").read_text()
    for folder in {*(ROOT / "experiments").glob("*/")} - {CLAIMS}:
        assert f"({folder.name}/README.md)" in overview, folder
        assert (folder / "README.md").is_file(), folder
        assert (folder / "results.csv").is_file() or (folder / "summary.json").is_file(), folder
