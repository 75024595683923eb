"""Running a study: real runs, really killed."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from lora_lab.cli import main
from lora_lab.documents.console import plain_console
from lora_lab.errors import CheckpointError, ConfigError, DataError, StudyError
from lora_lab.experiment import run
from lora_lab.models.conversion import save_model
from lora_lab.models.tiny import character_tokenizer
from lora_lab.report.pages import report
from lora_lab.studies import ablate, read_study
from lora_lab.studies.ablation import Progress
from lora_lab.studies.display import Board
from lora_lab.studies.executors import Executor, LocalExecutor
from lora_lab.studies.worker import execute
from tests.adapters.tiny import tiny_bert
from tests.forks import Fork, fork
from tests.wandb_file import offline_folders, read_offline_run

STUDY = {
    "question": "Which method learns a sum?",
    "experiment": {
        "model": {"name": "random:mlp", "task": "regression"},
        "data": {"source": "toy", "size": 32, "batch_size": 8},
        "adapter": {"method": "lora", "targets": "all-linear", "rank": 2},
        "trainer": {"max_epochs": 2, "validate_every": 0.5, "checkpoint_every": 1, "log_every": 1},
        "tracking": {"wandb": "disabled"},
    },
    "grid": {"adapter.method": ["lora", "ia3"]},
    "seeds": [0, 1],
    "metric": "test/mse",
    "baseline": "lora",
}
TUNE = {"key": "optimization.learning_rate", "values": [0.0001, 0.001, 0.01], "seeds": [100, 101]}
MEASURED = ["step_seconds", "peak_megabytes", "seconds"]
QUICK = {"trainer": {"max_epochs": 1, "checkpoint_every": 100}}


class Inline(Executor):
    """Makes the runs in this process."""

    slots = 1

    def __init__(self, logs: Path):
        self.jobs = []
        self.made = []

    def submit(self, job):
        self.jobs.append(job)

    def running(self):
        return []

    def wait(self, seconds):
        self.jobs.sort(key=lambda job: job.order)
        job = self.jobs.pop(0)
        self.made.append(job)
        return [(job, execute(job.config))]

    def cancel(self):
        self.jobs.clear()


def study(folder: Path, **changes):
    folder.mkdir(exist_ok=True)
    content = STUDY | changes
    content["experiment"] = content["experiment"] | {"output": str(folder / "runs")}
    path = folder / "methods.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_study(path)


def results(study) -> pd.DataFrame:
    return pd.read_csv(study.folder / "results.csv")


def test_a_tuned_study(tmp_path, capsys):
    experiment = STUDY["experiment"] | QUICK
    found = study(tmp_path, tune=TUNE, experiment=experiment)
    executor = Inline(tmp_path)
    ablate(found, lambda logs: executor)
    assert len(executor.made) == 2 * (3 * 2 + 2)
    widened = f"lora-lab ablate {found.source} 'tune.values=[0.0001, 0.001, 0.01, 0.1]'"
    assert widened in capsys.readouterr().out
    rows = results(found)
    assert list(rows)[:10] == [
        "cell", "phase", "seed", "status", "error", "run", "trained_parameters", "adapter_parameters",
        "adapter.method", "optimization.learning_rate",
    ]  # fmt: skip
    assert list(rows)[-3:] == MEASURED
    assert set(rows["status"]) == {"finished"}
    # By hand: the mean of the validation metric over the search's seeds chooses each cell's value.
    tried = rows[rows["phase"] == "tune"]
    best = tried.groupby(["cell", TUNE["key"]])["validation/mse"].mean().unstack().idxmin(axis=1)
    compared = rows[rows["phase"] == "compare"]
    for _, row in compared.iterrows():
        assert row[TUNE["key"]] == best[row["cell"]]
        assert (found.folder / row["run"] / "test_examples.parquet").is_file()
    assert sorted(compared["seed"]) == [0, 0, 1, 1]
    validations = pd.read_csv(found.folder / "validations.csv")
    last = validations[validations["metric"] == "validation/mse"].groupby(["cell", "phase", "seed"])["value"]
    assert len(validations) == 16 * 4
    assert (
        last.last()["lora", "compare", 0] == compared.set_index(["cell", "seed"])["validation/mse"]["lora", 0]
    )
    stored = yaml.safe_load((found.folder / "study.yaml").read_text())
    assert (stored["metric"], stored["baseline"], stored["higher_is_better"]) == ("test/mse", "lora", False)
    assert stored["grid"] == {"adapter.method": ["lora", "ia3"]}
    again = Inline(tmp_path)
    ablate(read_study(found.source), lambda logs: again)
    assert again.made == []
    pd.testing.assert_frame_equal(results(found), rows)


def test_a_range_is_searched_and_goes_on_where_it_was_killed(tmp_path):
    pytest.importorskip("optuna")
    tune = {"key": "optimization.learning_rate", "low": 1e-4, "high": 1e-1, "trials": 4, "seeds": [100]}
    changes = {"tune": tune, "seeds": [0], "experiment": STUDY["experiment"] | QUICK}
    changes["grid"] = {"adapter.method": ["lora"]}
    whole = study(tmp_path / "whole", **changes)
    ablate(whole, Inline)
    rows = results(whole)
    tried = rows[(rows["phase"] == "tune") & (rows["cell"] == "lora")]["optimization.learning_rate"]
    assert tried.nunique() == 4
    assert tried.between(1e-4, 1e-1).all()

    class Killed(Inline):
        def wait(self, seconds):
            if len(self.made) == 2:
                raise KeyboardInterrupt
            return super().wait(seconds)

    other = study(tmp_path / "other", **changes)
    with pytest.raises(KeyboardInterrupt):
        ablate(read_study(other.source), Killed)
    ablate(read_study(other.source), Inline)
    pd.testing.assert_frame_equal(results(other).drop(columns=MEASURED), rows.drop(columns=MEASURED))
    # As the guide says: more trials add to the earlier ones, another range is searched anew.
    for setting, count in (("tune.trials=5", 1), ("tune.high=0.2", 4)):
        again = Inline(tmp_path)
        ablate(read_study(whole.source, [setting]), lambda logs, again=again: again)
        assert sum(job.phase == "tune" for job in again.made) == count


def test_a_run_that_fails_stops_no_other_and_is_tried_again(tmp_path):
    found = study(tmp_path, experiment=STUDY["experiment"] | QUICK, seeds=[0])
    broken = found.job(found.cell("ia3"), "compare", 0).folder.path
    broken.parent.mkdir(parents=True)
    broken.write_text("in the way")
    with pytest.raises(StudyError, match="1 of 2 runs failed") as caught:
        ablate(found, Inline)
    assert str(broken) in str(caught.value)
    rows = results(found).set_index("cell")
    assert rows["status"].to_dict() == {"lora": "finished", "ia3": "failed"}
    assert "is a file, not a folder" in rows["error"]["ia3"]
    broken.unlink()
    again = Inline(tmp_path)
    ablate(read_study(found.source), lambda logs: again)
    assert [job.cell for job in again.made] == ["ia3"]
    assert set(results(found)["status"]) == {"finished"}


def test_runs_on_other_data_are_not_taken_for_those_of_today(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f"film {i},{'good' if i % 2 else 'bad'}\n" for i in range(40)))
    data = {"source": "files", "train": str(table), "label": "label", "test_fraction": 0.2}
    experiment = STUDY["experiment"] | QUICK | {
        "model": {"name": "random:bert"}, "data": data, "adapter": {"method": "lora", "targets": ["query"]},
    }  # fmt: skip
    found = study(tmp_path, experiment=experiment, seeds=[0], metric="test/accuracy")
    ablate(found, Inline)
    table.write_text(table.read_text().replace("film 7,", "film seven,"))
    with pytest.raises(DataError, match=r"lora-seed0-\w+: was trained on other data"):
        ablate(read_study(found.source), Inline)


def test_runs_on_other_weights_are_not_taken_for_those_of_today(tmp_path):
    base = tmp_path / "base"

    def write(seed):
        save_model(tiny_bert(seed, num_labels=2), base)
        character_tokenizer(tiny_bert().config).save_pretrained(base)

    write(0)
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"film {i},{'good' if i % 2 else 'bad'}\n" for i in range(40)))
    data = {"source": "files", "train": str(rows), "label": "label", "test_fraction": 0.2, "max_length": 8}
    experiment = STUDY["experiment"] | QUICK | {
        "model": {"name": str(base)}, "data": data, "adapter": {"method": "lora", "targets": ["query"]},
    }  # fmt: skip
    changes = {"experiment": experiment, "metric": "test/accuracy", "grid": {"adapter.method": ["lora"]}}
    found = study(tmp_path, seeds=[0], **changes)
    ablate(found, Inline)
    ablate(read_study(found.source), Inline)
    shutil.rmtree(base)
    write(1)
    with pytest.raises(CheckpointError, match=r"lora-seed0-\w+: its run was trained on other weights"):
        ablate(read_study(found.source, ["seeds=[0,1]"]), Inline)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        run(found.job(found.cell("lora"), "compare", 0).config)


def test_a_run_that_diverges_is_a_result(tmp_path):
    experiment = STUDY["experiment"] | {"optimization": {"learning_rate": 1e30, "gradient_clip": None}}
    found = study(tmp_path, experiment=experiment, seeds=[0])
    ablate(found, Inline)
    assert "diverged" in set(results(found)["status"])
    again = Inline(tmp_path)
    ablate(read_study(found.source), lambda logs: again)
    assert again.made == []
    # Under another rule for such steps the run is another.
    diverged = set(results(found).query("status == 'diverged'")["cell"])
    ablate(read_study(found.source, ["trainer.on_nonfinite=skip"]), lambda logs: again)
    assert {job.cell for job in again.made} == diverged


class Watched(LocalExecutor):
    """Tries the same study again whenever it waits."""

    source: Path

    def wait(self, seconds):
        with pytest.raises(CheckpointError, match=rf"methods: process {os.getpid()} on .* is writing to it"):
            ablate(read_study(self.source), Inline)
        return super().wait(seconds)


def make(source: Path, kind: type[LocalExecutor] = LocalExecutor, workers: int = 2) -> None:
    kind.source = source
    ablate(read_study(source), lambda logs: kind(workers, logs, "fork"))


def start(source: Path, *arguments) -> Fork:
    """Makes a study in a process that has trained nothing before: it may be forked."""
    return fork(make, source, *arguments, folder=source.parent)


def test_two_workers_make_the_same_rows_and_a_second_study_is_refused(tmp_path):
    found = study(tmp_path / "two")
    alone = study(tmp_path / "one")
    ablate(alone, Inline)
    code, printed = start(found.source, Watched).end()
    assert code == 0, printed
    pd.testing.assert_frame_equal(
        results(found).drop(columns=MEASURED), results(alone).drop(columns=MEASURED)
    )
    logs = sorted(path.name for path in (found.folder / "logs").iterdir())
    assert logs == ["worker0.log", "worker1.log"]


class Murderous(LocalExecutor):
    """Kills the worker of its first run."""

    killed = False

    def wait(self, seconds):
        busy = [worker for worker in self._workers if worker and worker.job]
        if busy and not self.killed:
            self.killed = True
            os.kill(busy[0].process.pid, signal.SIGKILL)
        return super().wait(seconds)


def test_a_worker_that_is_killed_fails_its_run_alone(tmp_path):
    found = study(tmp_path, seeds=[0])
    assert start(found.source, Murderous, 1).end()[0] != 0
    rows = results(found)
    assert sorted(rows["status"]) == ["failed", "finished"]
    assert rows["error"].dropna().item().startswith("its process was killed by SIGKILL")


def test_a_study_killed_twice_has_the_rows_of_one_left_alone(tmp_path):
    tune = TUNE | {"values": [0.001, 0.01], "seeds": [100]}
    alone, found = study(tmp_path / "alone", tune=tune), study(tmp_path / "killed", tune=tune)
    process = start(alone.source)
    while not alone.folder.exists():  # the first process also waits for the imports
        time.sleep(0.05)
    started = time.monotonic()
    assert process.end()[0] == 0
    one_run = (time.monotonic() - started) / len(results(alone))
    draw = random.Random(5)
    finished: dict[Path, int] = {}
    for least, kill in ((1, os.kill), (3, os.killpg)):  # the study alone, and with its workers
        process = start(found.source)
        while sum('"finished"' in path.read_text() for path in found.folder.glob("*/run.json")) < least:
            time.sleep(0.02)
        time.sleep(draw.uniform(0.1, 0.9) * one_run)
        kill(process.process.pid, signal.SIGKILL)
        process.end()
        # What is finished now must not be made again.
        for job in Progress(read_study(found.source), None).jobs:
            record = job.folder.read()
            if record and record["status"] == "finished":
                finished.setdefault(job.folder.record, job.folder.record.stat().st_mtime_ns)
    assert start(found.source).end()[0] == 0
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in finished.items())
    assert finished
    one, two = results(alone), results(found)
    pd.testing.assert_frame_equal(two.drop(columns=MEASURED), one.drop(columns=MEASURED))
    for name in ("validations.csv", "tuning.json"):
        assert (found.folder / name).read_text() == (alone.folder / name).read_text()


def test_ctrl_c_leaves_all_resumable(tmp_path):
    experiment = STUDY["experiment"] | {"trainer": {"max_epochs": 4000, "checkpoint_every": 1}}
    found = study(tmp_path, experiment=experiment)
    process = start(found.source)
    folder = found.job(found.cell("lora"), "compare", 0).folder
    while not folder.checkpoint.is_file():
        time.sleep(0.05)
    os.killpg(process.process.pid, signal.SIGINT)  # as a terminal does it
    assert process.end()[0] == 130
    assert folder.read()["status"] == "interrupted"
    assert folder.checkpoint.is_file()
    assert "interrupted" in set(results(found)["status"])


def test_a_folder_of_another_study_is_refused(tmp_path):
    found = study(tmp_path, experiment=STUDY["experiment"] | QUICK, seeds=[0])
    ablate(found, Inline)
    before = (found.folder / "results.csv").read_text()
    other = tmp_path / "elsewhere" / "methods.yaml"
    other.parent.mkdir()
    other.write_text(found.source.read_text())
    executor = Inline(tmp_path)
    with pytest.raises(ConfigError, match=r"holds the results of another study, \S*methods.yaml"):
        ablate(read_study(other, ["seeds=[1]"]), lambda logs: executor)
    assert (executor.made, (found.folder / "results.csv").read_text()) == ([], before)


def test_a_tracked_study_has_a_group_of_runs_and_one_summary(tmp_path):
    tracked = {"tracking": {"wandb": "offline", "tags": ["trial"]}}
    tune = TUNE | {"values": [0.001, 0.01], "seeds": [100]}
    experiment = STUDY["experiment"] | QUICK | tracked
    found = study(tmp_path, experiment=experiment, seeds=[0], grid={"adapter.method": ["lora"]}, tune=tune)
    ablate(found, Inline)
    for folder, job_type in (("lora-seed0-*", "compare"), ("lora-tune-seed100-*", "tune")):
        for path in found.folder.glob(folder):
            one = read_offline_run(*offline_folders(path))
            assert (one.group, one.job_type, one.tags) == ("methods", job_type, ["trial"])
            assert one.config["tracking"]["cell"] == one.config["adapter"]["method"] == "lora"
    (own,) = offline_folders(found.folder / "summary")
    summary = read_offline_run(own)
    assert (summary.name, summary.group, summary.job_type) == ("summary", "methods", "summary")
    assert summary.tags == ["trial"]
    assert (summary.config["metric"], summary.config["baseline"]) == ("test/mse", "lora")
    made = report([found.folder])
    assert summary.summary["verdict"] == made.verdict
    (table,) = [path for path in summary.media if path.name.endswith(".table.json")]
    stored = json.loads(table.read_text())
    assert (
        dict(zip(stored["columns"], stored["data"][0], strict=True))["mean"]
        == results(found).iloc[-1]["test/mse"]
    )
    (page,) = [path for path in summary.media if path.suffix == ".html"]
    assert page.read_text() == made.html()
    ablate(read_study(found.source), Inline)  # makes no run, and no second summary
    assert offline_folders(found.folder / "summary") == [own]


def test_texts_are_shown_as_they_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    listed = {"b[/]": {"adapter.rank": 1}, "[query, value] :cat:": {"adapter.rank": 3}}
    changes = {"question": "Does [query, value] beat [all-linear]?", "list": listed, "seeds": [0]}
    found = study(tmp_path, experiment=STUDY["experiment"] | QUICK, baseline="b[/]", grid=None, **changes)
    assert main(["ablate", str(found.source), "--plan"]) == 0
    planned = capsys.readouterr().out
    ablate(found, Inline)
    ended = capsys.readouterr().out
    for text in (changes["question"], *listed):
        assert text in planned
        assert text in ended
    console = plain_console()
    with console.capture() as shown:
        console.print(Board(Progress(found, None), Inline(tmp_path), console)._table())
    assert all(name in shown.get() for name in listed)


def test_a_plan_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    found = study(tmp_path, tune=TUNE)
    assert main(["ablate", str(found.source), "--plan", "seeds=[0]", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "Which method learns a sum?" in out
    assert "lora (baseline)" in out
    assert "ia3: adapter: what was set for lora is reset, as ia3 does not have the same: rank." in out
    assert re.search(
        r"14 of 14 runs to make, 2 at once; expected time: about [1-9]\d* s, by two steps of lora", out
    )
    assert not found.folder.exists()
    assert main(["ablate", str(found.source), "--workers", "0"]) == 2
