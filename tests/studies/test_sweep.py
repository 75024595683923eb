"""A study as a sweep of W&B's."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lora_lab.cli import main
from lora_lab.errors import ConfigError
from lora_lab.studies import ablate, read_study
from lora_lab.studies.sweep import job_of, sweep
from tests.studies.sweep_server import ENTITY, served
from tests.studies.test_ablation import QUICK, STUDY, TUNE, Inline, results, study
from tests.wandb_file import offline_folders


def written(found, tmp_path, *overrides):
    assert main(["ablate", str(found.source), *overrides, "--sweep", str(tmp_path / "sweep.yaml")]) == 0
    return yaml.safe_load((tmp_path / "sweep.yaml").read_text())


def combinations(parameters):
    """Returns what W&B's grid gives the agent."""
    found = [{}]
    for name, one in parameters.items():
        found = [given | {name: {"value": value}} for given in found for value in one["values"]]
    return found


def test_the_agents_commands_make_the_study(tmp_path, monkeypatch):
    found = study(tmp_path, experiment=STUDY["experiment"] | QUICK, seeds=[0])
    made = written(found, tmp_path, "trainer.max_epochs=1")
    assert made["metric"] == {"name": "test/mse", "goal": "minimize"}
    assert made["method"] == "grid"
    # As wandb_agent.py makes its command line.
    for given in combinations(made["parameters"]):
        flags = create_sweep_command_args({"args": given})["args_no_hyphens"]
        command = create_sweep_command(list(made["command"]))
        place = command.index("${args_no_hyphens}")
        program, *arguments = [*command[:place], *flags, *command[place + 1 :]]
        assert program == "lora-lab"
        assert main(arguments) == 0
    left = Inline(tmp_path)
    ablate(read_study(found.source), lambda logs: left)
    assert left.made == []
    assert set(results(found)["status"]) == {"finished"}


def test_a_search_is_swept_and_names_its_runs(tmp_path):
    found = study(tmp_path, tune=TUNE)
    made = sweep(found)
    assert made["metric"] == {"name": "validation/mse", "goal": "minimize"}
    jobs = [
        job_of(found, create_sweep_command_args({"args": given})["args_no_hyphens"])
        for given in combinations(made["parameters"])
    ]
    values = {(job.cell, job.config.optimization.learning_rate, job.config.seed, job.phase) for job in jobs}
    assert values == {
        (cell, rate, seed, "tune")
        for cell in ("lora", "ia3")
        for rate in TUNE["values"]
        for seed in (100, 101)
    }
    for texts, why in (
        (["cell=lora", "seed=100"], "whose runs need value=V"),
        (["cell=lora", "seed=0", "value=0.001"], "seed: must be one of 100, 101"),
        (["cell=lor", "seed=100", "value=0.001"], "no cell 'lor'; did you mean"),
        (["cell=lora", "seed=100", "value=5"], "value: must be one of"),
        (["cell=lora", "rank=4"], "must be cell=NAME seed=N"),
    ):
        with pytest.raises(ConfigError, match=why):
            job_of(found, texts)
    ranged = {"key": TUNE["key"], "low": 1e-4, "high": 1e-1, "trials": 4, "seeds": [100]}
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError, match="--sweep: tune.low"):
        sweep(study(tmp_path, tune=ranged))


def test_a_sweeps_file_is_what_wandbs_schema_allows(tmp_path):
    sweeps = importlib.util.find_spec("sweeps")  # to import it takes scikit-learn
    if sweeps is None:
        pytest.skip("sweeps is not installed, which has W&B's schema")
    schema = Path(sweeps.origin).parent / "config" / "schema.json"
    validate = pytest.importorskip("jsonschema").Draft7Validator(json.loads(schema.read_text()))
    for changes in ({}, {"tune": TUNE}):
        made = sweep(study(tmp_path, **changes))
        assert [error.message for error in validate.iter_errors(made)] == []
    assert list(validate.iter_errors(made | {"method": "gird"}))


@pytest.mark.slow
def test_wandbs_own_agent_makes_a_run_and_the_study_makes_the_others(tmp_path):
    experiment = STUDY["experiment"] | QUICK | {"tracking": {"wandb": "offline"}}
    found = study(tmp_path, experiment=experiment, seeds=[0])
    written(found, tmp_path)
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with served() as (server, url):
        ours = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}
        for command in ("wandb sweep sweep.yaml", f"wandb agent --count 1 {ENTITY}/lora_lab/sweep1"):
            done = subprocess.run(
                command.split(),
                cwd=tmp_path,
                env=os.environ | ours | {"PATH": programs},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
        assert server.sweep.given == [{"cell": "lora", "seed": 0}], done.stderr
    job = found.job(found.cell("lora"), "compare", 0)
    assert job.folder.read()["status"] == "finished", done.stderr
    (tracked,) = offline_folders(job.folder.path)
    assert tracked.name.rpartition("-")[2] == "run1"  # the agent's name for it
    left = Inline(tmp_path)
    ablate(read_study(found.source), lambda logs: left)
    assert [job.cell for job in left.made] == ["ia3"]
