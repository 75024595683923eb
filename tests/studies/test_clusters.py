"""The same study by Ray and by Slurm, with what is lost on the way."""

import importlib.util
import os

import pandas as pd
import pytest
import yaml

from lora_lab.cli import main
from lora_lab.errors import ConfigError
from lora_lab.studies import ablate, read_study
from lora_lab.studies.clusters import RayExecutor, SlurmExecutor, slurm_options
from tests.studies.one_node_slurm import cluster, missing
from tests.studies.test_ablation import MEASURED, STUDY, Inline, results

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="submitit is not installed"
)
TRAINER = {"max_epochs": 8, "checkpoint_every": 1, "log_every": 8}
"""Some seconds for a run, in which it can be interrupted."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The study that is made undisturbed in this process."""
    found = study(tmp_path_factory.mktemp("alone"))
    ablate(found, Inline)
    return results(found)


def study(folder):
    content = STUDY | {
        "experiment": STUDY["experiment"] | {"output": str(folder / "runs"), "trainer": TRAINER}
    }
    path = folder / "methods.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_study(path)


def same(found, alone):
    pd.testing.assert_frame_equal(results(found).drop(columns=MEASURED), alone.drop(columns=MEASURED))


@needs_ray
def test_a_ray_cluster_that_loses_a_node_makes_the_same_rows(tmp_path, alone, monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default, which a busy machine starves
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = nodes.add_node(num_cpus=1)

    class Losing(RayExecutor):
        lost = False

        def wait(self, seconds):
            under_way = [job for job in self.running() if job.folder.checkpoint.is_file()]
            if not self.lost and len(under_way) == 2:
                self.lost = True
                nodes.remove_node(second, allow_graceful=False)
            return super().wait(0.1)

    try:
        found, made = study(tmp_path), []
        ablate(found, lambda logs: made.append(Losing(2, logs, nodes.address)) or made[0])
        assert made[0].lost
        same(found, alone)
        resumed = [job.folder.read()["resumptions"] for job in found_jobs(found)]
        assert sum(resumed) == 1
    finally:
        ray.shutdown()
        nodes.shutdown()


def found_jobs(study):
    return [study.job(cell, "compare", seed) for cell in study.cells for seed in study.spec.seeds]


@needs_submitit
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_slurm_makes_the_same_rows_and_a_lost_job_is_made_again(tmp_path, alone, monkeypatch):
    class Losing(SlurmExecutor):
        lost = None

        def wait(self, seconds):
            if self.lost is None:
                for task, job in self._running.items():
                    if job.folder.checkpoint.is_file():
                        self.lost = job
                        os.system(f"scancel --signal=KILL --full {task.job_id}")
                        break
            return super().wait(0.1)

    with cluster(tmp_path / "slurm") as conf:
        monkeypatch.setenv("SLURM_CONF", str(conf))
        found, made = study(tmp_path), []
        ablate(found, lambda logs: made.append(Losing(2, logs, {"timeout_min": 5})) or made[0])
        assert made[0].lost.folder.read()["resumptions"] == 1
        same(found, alone)


@needs_ray
def test_ctrl_c_leaves_runs_of_ray_resumable(tmp_path):
    import ray

    content = STUDY["experiment"] | {"output": str(tmp_path / "runs")}
    content["trainer"] = TRAINER | {"max_epochs": 4000}
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"experiment": content, "seeds": [0]}))
    found = read_study(path)

    class Stopped(RayExecutor):
        def wait(self, seconds):
            if any(job.folder.checkpoint.is_file() for job in self.running()):
                raise KeyboardInterrupt
            return super().wait(0.2)

    try:
        with pytest.raises(KeyboardInterrupt):
            ablate(found, lambda logs: Stopped(1, logs))
    finally:
        ray.shutdown()
    states = [(job.folder.read() or {}).get("status") for job in found_jobs(found)]
    assert states == ["interrupted", None]


def test_settings_of_another_executor_are_refused(tmp_path, capsys):
    path = str(study(tmp_path).source)
    assert main(["ablate", path, "--address", "auto"]) == 2
    assert "--address: goes with --executor ray; got local" in " ".join(capsys.readouterr().err.split())
    assert main(["ablate", path, "--executor", "ray", "--slurm", "timeout_min=5"]) == 2
    assert "--slurm: goes with --executor slurm; got ray" in " ".join(capsys.readouterr().err.split())
    assert slurm_options(["timeout_min=5", "slurm_partition=gpu"]) == {
        "timeout_min": 5,
        "slurm_partition": "gpu",
    }
    for wrong, why in (("x", "must be key=value"), ("slurm_array_parallelism=1", "is what --workers says")):
        with pytest.raises(ConfigError, match=why):
            slurm_options([wrong])


@needs_submitit
def test_an_unknown_parameter_of_slurm_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("submitit.slurm.slurm.SlurmExecutor.affinity", lambda: 2)
    with pytest.raises(ConfigError, match="timeot_min"):
        SlurmExecutor(1, tmp_path, {"timeot_min": 5})
