"""The same study by two processes, by Ray and by Slurm, with what is lost on the way."""

import importlib.util
import json
import re
import signal
from contextlib import suppress

import pandas as pd
import psutil
import pytest
import yaml

from lora_lab.cli import main
from lora_lab.errors import ConfigError
from lora_lab.experiment.folder import OWNER
from lora_lab.studies import ablate, read_study
from lora_lab.studies.clusters import LOOPBACK, RayExecutor, SlurmExecutor, slurm_options
from tests.studies.one_node_slurm import cluster, missing
from tests.studies.test_ablation import MEASURED, STUDY, results, start

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="submitit is not installed"
)
TRAINER = {"max_epochs": 8, "checkpoint_every": 1, "log_every": 8}
"""Some seconds for a run, in which it can be interrupted."""
RAY = LOOPBACK | {
    # On a busy machine, Python takes longer to start than Ray waits for it: 60 and 30 seconds by default.
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_niceness": "0",  # 15 by default, which starves there
}
NODE = {"num_cpus": 1, "include_dashboard": False}


def study(folder):
    content = STUDY | {
        "experiment": STUDY["experiment"] | {"output": str(folder / "runs"), "trainer": TRAINER},
        "grid": {"adapter.method": ["lora", "ia3", "dora"]},
    }
    path = folder / "methods.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_study(path)


def jobs_of(study):
    return [study.job(cell, "compare", seed) for cell in study.cells for seed in study.spec.seeds]


def resumptions(study):
    return [job.folder.read()["resumptions"] for job in jobs_of(study)]


def process_of(job):
    """Returns the process of a run that has a checkpoint and is under way; None if it is not."""
    with suppress(FileNotFoundError, psutil.NoSuchProcess):  # it has just ended
        if job.folder.checkpoint.is_file():
            return psutil.Process(json.loads((job.folder.path / OWNER).read_text())["pid"])
    return None


@pytest.fixture(scope="module")
def by_two_processes(tmp_path_factory):
    """The study by two undisturbed processes of this machine."""
    found = study(tmp_path_factory.mktemp("local"))
    code, printed = start(found.source).end()
    assert code == 0, printed
    rows = results(found)
    assert (len(rows), set(rows["status"]), resumptions(found)) == (6, {"finished"}, [0] * 6)
    return found


def same(found, other):
    """Compares all that results.csv and validations.csv say, but time and memory."""
    ours, theirs = (results(one).drop(columns=MEASURED) for one in (found, other))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    ours, theirs = ((one.folder / "validations.csv").read_text() for one in (found, other))
    assert ours == theirs


@pytest.fixture
def ray(monkeypatch):
    for name, value in RAY.items():
        monkeypatch.setenv(name, value)
    import ray

    yield ray
    ray.shutdown()


@pytest.mark.slow
@needs_ray
def test_a_ray_cluster_that_loses_a_node_makes_the_same_rows(tmp_path, by_two_processes, ray):
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args=NODE)
    second = nodes.add_node(**NODE)
    raylet = second.all_processes["raylet"][0].process.pid

    class Losing(RayExecutor):
        lost = None

        def wait(self, seconds):
            for job in self.running() if self.lost is None else ():
                process = process_of(job)
                if process and process.ppid() == raylet:
                    self.lost = job
                    nodes.remove_node(second, allow_graceful=False)
                    break
            return super().wait(0.1)

    try:
        found, made = study(tmp_path), []
        ablate(found, lambda logs: made.append(Losing(2, logs, nodes.address)) or made[0])
    finally:
        ray.shutdown()  # before the cluster that it is connected to
        nodes.shutdown()
    same(found, by_two_processes)
    assert sum(resumptions(found)) == made[0].lost.folder.read()["resumptions"] == 1


@pytest.mark.slow
@needs_submitit
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_slurm_makes_the_same_rows_and_a_lost_job_is_made_again(tmp_path, by_two_processes, monkeypatch):
    class Losing(SlurmExecutor):
        lost = None

        def wait(self, seconds):
            for job in self.running() if self.lost is None else ():
                if process := process_of(job):
                    self.lost = job
                    process.send_signal(signal.SIGKILL)
                    break
            return super().wait(0.1)

    with cluster(tmp_path / "slurm") as conf:
        monkeypatch.setenv("SLURM_CONF", str(conf))
        found, made = study(tmp_path), []
        ablate(found, lambda logs: made.append(Losing(2, logs, {"timeout_min": 60})) or made[0])
    same(found, by_two_processes)
    assert sum(resumptions(found)) == made[0].lost.folder.read()["resumptions"] == 1


@pytest.mark.slow
@needs_ray
def test_a_ray_of_this_machine_tells_a_fault_and_ctrl_c_leaves_its_runs_resumable(tmp_path, ray):
    content = STUDY["experiment"] | {"output": str(tmp_path / "runs")}
    content["trainer"] = TRAINER | {"max_epochs": 4000}
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"experiment": content, "seeds": [0]}))
    found = read_study(path)
    first = jobs_of(found)[0]

    class Stopped(RayExecutor):
        def wait(self, seconds):
            if any(job.folder.checkpoint.is_file() for job in self.running()):
                raise KeyboardInterrupt
            return super().wait(0.2)

    def executor(logs):
        made = Stopped(1, logs)
        place, made._place = made._place, (str(tmp_path / "elsewhere"), str(logs))
        made.submit(first)
        while not (ended := made.wait(1)):
            pass
        made._place = place
        ((job, outcome),) = ended
        assert (job, outcome.status) == (first, "failed")
        assert re.search(r"No such file or directory: '\S+/elsewhere'$", outcome.error)
        return made

    with pytest.raises(KeyboardInterrupt):
        ablate(found, executor)
    states = [(job.folder.read() or {}).get("status") for job in jobs_of(found)]
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
    monkeypatch.setattr("submitit.slurm.slurm.SlurmExecutor.affinity", staticmethod(lambda: 2))
    with pytest.raises(ConfigError, match="timeot_min"):
        SlurmExecutor(1, tmp_path, {"timeot_min": 5})
