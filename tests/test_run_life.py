"""One folder, one owner, one life: who may write, what may be deleted, and how a run ends."""

import errno
import json
import os
import resource
import signal
import time
import warnings
from contextlib import contextmanager, suppress

import lightning as L
import psutil
import pytest
import torch
import wandb
from safetensors.torch import load_file

from lora_lab import experiment
from lora_lab.cli import main
from lora_lab.config import compose
from lora_lab.documents.writing import clean_unfinished, new_folder
from lora_lab.errors import CheckpointError, ConfigError, DataError
from lora_lab.experiment import life, run
from lora_lab.experiment.continuation import compose_run
from lora_lab.experiment.folder import RunFolder
from lora_lab.tracking import MetricsFile, loggers, read_metrics
from lora_lab.training.stopping import Interruption
from tests.survival import rows
from tests.wandb_file import offline_folders, read_offline_run

CONFIG = """
name: life
model: {name: "random:mlp", task: regression}
data: {source: toy, size: 24, batch_size: 4}
adapter: {method: lora, rank: 2, dropout: 0.2, targets: [layer1, layer2], modules_to_save: [layer3]}
optimization: {schedule: constant, warmup: 0.0, learning_rate: 0.01}
trainer: {max_epochs: 2, log_every: 1, checkpoint_every: 5, progress_bar: false, accelerator: cpu}
tracking: {wandb: disabled}
"""
STEPS = 12


@pytest.fixture
def config(tmp_path):
    (tmp_path / "x.yaml").write_text(f"{CONFIG}output: {tmp_path / 'runs'}\n")
    return tmp_path / "x.yaml"


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.adapter / "adapter_model.safetensors")


def same(one: RunFolder, two: RunFolder) -> bool:
    ours, theirs = weights(one), weights(two)
    return all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def act_at(monkeypatch, step: int, action) -> None:
    """Adds a callback that acts once, in the middle of an optimizer step."""

    class Act(L.Callback):
        done = False

        def on_after_backward(self, trainer, module):
            if trainer.global_step == step and not self.done:
                self.done = True
                action()

    usual = experiment._Callbacks.everything
    monkeypatch.setattr(experiment._Callbacks, "everything", lambda self, bars: [*usual(self, bars), Act()])


def test_overwriting_deletes_nothing_that_the_run_did_not_write(config):
    folder = run(compose(config, ["run=one"])).folder
    others = [
        folder.path / name for name in ("photo.jpg", "adapter/notes.txt", "checkpoints/old/x", "wandb/y")
    ]
    for path in others:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("mine")
    (folder.path / "metrics.csv").write_text("step,a\n0,1\n")
    again = run(compose(config, ["run=one", "adapter.rank=3"]), overwrite=True)
    assert again.fresh
    assert all(path.read_text() == "mine" for path in others)
    assert len(read_metrics(folder.path)) > STEPS
    assert weights(folder)["base_model.model.layer1.lora_A.weight"].shape[0] == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_runs_is_not_written_over(config, tmp_path, overwrite):
    folder = tmp_path / "runs" / "life" / "one"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no run, but files .*adapter"):
        run(compose(config, ["run=one"]), overwrite=overwrite)
    (folder / "adapter" / "adapter_config.json").unlink()
    (folder / "run.json").write_text('{"name": "a jog in the park"}')
    with pytest.raises(CheckpointError, match="not a record of a run"):
        run(compose(config, ["run=one"]), overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "mine"
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"thesis.txt", "run.json", "adapter"}


def test_a_folder_has_one_writer_and_the_message_names_it(config, tmp_path, capsys):
    folder = RunFolder.of(compose(config, ["run=one"]))
    with folder.owned():
        assert main(["train", str(config), "run=one"]) == 2
    message = capsys.readouterr().err
    assert f"process {os.getpid()} on " in message
    assert "--resume" not in message
    assert not (tmp_path / "runs").exists()  # no run was started
    assert main(["train", str(config), "run=one"]) == 0


def test_the_lock_of_a_killed_owner_is_free(config):
    folder = RunFolder.of(compose(config, ["run=one"]))
    child = os.fork()
    if not child:
        with folder.owned():
            time.sleep(60)
        os._exit(0)
    deadline = time.monotonic() + 30
    while not (folder.path / ".owner.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match=f"process {child} on"), folder.owned():
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with folder.owned():
        pass


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)],
)
def test_a_signal_leaves_a_checkpoint_of_the_next_step_and_a_true_record(config, monkeypatch, number, code):
    whole = run(compose(config, ["run=whole"]))
    with monkeypatch.context() as patch:
        act_at(patch, 7, lambda: os.kill(os.getpid(), number))
        patch.setattr(signal, "SIG_IGN", None)  # a background job ignores Ctrl-C
        assert main(["train", str(config), "run=part"]) == code
    folder = RunFolder.of(compose(config, ["run=part"]))
    record = folder.read()
    assert (record["status"], record["error"]) == ("interrupted", f"interrupted: {number.name}")
    assert life.step_of(folder.checkpoint) == 8
    again = run(compose(config, ["run=part"]))
    assert again.record["resumptions"] == 1
    assert same(folder, whole.folder)
    assert rows(folder.path).equals(rows(whole.folder.path))


@pytest.mark.parametrize("where", ["inject", "life._earlier"])
def test_a_signal_before_training_says_so_of_a_run_that_was_killed_before(config, monkeypatch, where):
    """The record that a killed process has left must not stay `running` where nothing runs."""
    with monkeypatch.context() as patch:
        act_at(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["train", str(config), "run=part"]) == 143
    folder = RunFolder.of(compose(config, ["run=part"]))
    record = folder.read()
    folder.write({**record, "status": "running", "error": None})
    with monkeypatch.context() as patch:
        patch.setattr(f"lora_lab.experiment.{where}", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["train", str(config), "run=part"]) == 143
    assert folder.read() == record
    assert run(compose(config, ["run=part"])).record["resumptions"] == 1


def test_an_epoch_of_one_batch_has_checkpoints_too(config, monkeypatch):
    settings = ["data.size=4", "trainer.max_epochs=6", "trainer.checkpoint_every=1"]
    whole = run(compose(config, [*settings, "run=whole"]))
    with monkeypatch.context() as patch:
        act_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interruption):
            run(compose(config, [*settings, "run=part"]))
    again = run(compose(config, [*settings, "run=part"]))
    assert same(again.folder, whole.folder)
    assert rows(again.folder.path).equals(rows(whole.folder.path))


def test_a_second_ctrl_c_is_obeyed_at_once(config, monkeypatch):
    def press_twice():
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr("lora_lab.training.stopping.DOUBLE_PRESS", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("training went on")

    monkeypatch.setattr(signal, "SIG_IGN", None)
    act_at(monkeypatch, 7, press_twice)
    with pytest.raises(KeyboardInterrupt):
        run(compose(config, ["run=one"]))
    folder = RunFolder.of(compose(config, ["run=one"]))
    assert folder.read()["status"] == "interrupted"
    assert life.step_of(folder.checkpoint) == 5


def test_a_finished_run_is_refused_when_its_data_have_changed(config, tmp_path):
    texts = ["good film", "bad film"] * 20
    lines = [f"{text},{text.split()[0]}" for text in texts]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    settings = ["model={name: 'random:bert', task: sequence_classification}", "trainer.max_epochs=1"]
    data = (
        f"data={{source: files, train: {tmp_path / 'rows.csv'}, text: [text], label: label, max_length: 8}}"
    )
    composed = compose(config, [*settings, data, "adapter.targets=[query]", "adapter.modules_to_save=[]"])
    assert run(composed).fresh
    assert not run(composed).fresh
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines[1:], "fine film,good"]) + "\n")
    with pytest.raises(DataError, match=r"finished.*trained on other data"):
        run(composed)


def test_the_end_comes_in_order_adapter_loggers_record(config, monkeypatch):
    close, seen = life.close_loggers, []

    def watched(loggers, **options):
        folder = RunFolder.of(composed)
        seen.append((folder.read()["status"], (folder.adapter / "adapter_model.safetensors").is_file()))
        close(loggers, **options)

    monkeypatch.setattr(life, "close_loggers", watched)
    composed = compose(config, ["run=one"])
    assert run(composed).record["status"] == "finished"
    assert seen == [("running", True)]
    assert RunFolder.of(composed).read()["status"] == "finished"


def test_a_killed_loader_worker_gets_a_message_with_the_way_on(config, monkeypatch):
    def kill_worker():
        for child in psutil.Process().children():
            child.kill()
        time.sleep(0.5)

    act_at(monkeypatch, 1, kill_worker)
    with pytest.raises(DataError, match=r"data.workers: .*continues from the last checkpoint \(--resume\)"):
        run(compose(config, ["run=one", "data.workers=1", "data.size=400"]))
    assert RunFolder.of(compose(config, ["run=one"])).read()["status"] == "failed"


def test_an_unknown_run_of_another_config_names_the_difference(config):
    run(compose(config, ["run=one"]))
    with pytest.raises(ConfigError, match="adapter.rank: 2 there, 3 here"):
        run(compose(config, ["run=one", "adapter.rank=3"]))
    assert not run(compose(config, ["run=one", "data.workers=1"])).fresh  # it changes no result


# Longer runs ------------------------------------------------------------------------------------------------


def test_a_longer_run_continues_a_finished_one_in_its_own_folder(config):
    short = run(compose(config))
    before = short.folder.record.read_bytes()
    longer = run(compose_run(config, ["trainer.max_epochs=+1"]))
    anew = run(compose(config, ["trainer.max_epochs=3"]))
    assert longer.folder.path not in (short.folder.path, anew.folder.path)
    assert longer.record["continues"] == str(short.folder.path)
    assert longer.record["steps"] == STEPS + 6
    assert same(longer.folder, anew.folder)
    # The rows that the short run logged at its end stand in the history of the longer one no more.
    common = rows(anew.folder.path).columns.intersection(rows(longer.folder.path).columns)
    assert rows(longer.folder.path)[common].equals(rows(anew.folder.path)[common])
    assert short.folder.record.read_bytes() == before
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs: a length to add stands twice"):
        compose_run(config, ["trainer.max_epochs=+1"] * 2)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["adapter.rank=3"], "adapter.rank: 2 there, 3 here"),
        (["controllers={importance_pruning: {target_rank: 1}}"], "schedules of controllers depend"),
        (["continues=nowhere"], "holds no run"),
    ],
)
def test_what_cannot_be_continued_is_refused(config, settings, why):
    short = run(compose(config, ["run=one"]))
    longer = ["trainer.max_epochs=3", f"continues={short.folder.path}"]
    with pytest.raises((ConfigError, CheckpointError), match=why):
        run(compose(config, [*longer, *settings]))


# Files ------------------------------------------------------------------------------------------------------


def test_what_a_killed_writer_left_is_put_in_order(tmp_path):
    for name in (".a.unfinished.1", ".b.unfinished.22", ".c.old.3", ".d.old.4", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".d.old.4" / "photo").write_text("mine")
    (tmp_path / ".run.json.unfinished.5").write_text("{")
    (tmp_path / ".others").write_text("mine")
    clean_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"c", "d", ".others"}
    assert (tmp_path / "c" / "file").read_text() == ".c.old.3"
    assert (tmp_path / "d" / "file").read_text() == "d"
    assert (tmp_path / "d" / "photo").read_text() == "mine"


def test_a_new_folder_keeps_what_it_does_not_replace(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("one", "photo"):
        (tmp_path / "a" / name).write_text("old")
    with new_folder(tmp_path / "a") as fresh:
        (fresh / "one").write_text("new")
    assert {path.name: path.read_text() for path in (tmp_path / "a").iterdir()} == {
        "one": "new",
        "photo": "old",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# Faults of disk and tracking --------------------------------------------------------------------------------


@pytest.fixture
def limit_files():
    """A function that limits the size of files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_that_a_full_disk_refuses_are_written_when_it_has_room(tmp_path, limit_files):
    file = MetricsFile(tmp_path)
    for step in range(3):
        file.log_metrics({"x": 1.5}, step)
    limit_files((tmp_path / "metrics.csv").stat().st_size + 3)  # room for half a row
    with pytest.warns(UserWarning, match="no row can be written"):
        file.log_metrics({"x": 2.5}, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file.log_metrics({"x": 3.5, "new": 1.0}, 4)
    limit_files(None)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    file.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert read_metrics(tmp_path)[4] == {"step": 4, "x": 3.5, "new": 1.0}


def test_without_room_for_the_adapter_nothing_is_trained(config, limit_files, tmp_path):
    limit_files(100_000)
    with pytest.raises(CheckpointError, match=r"no 1\.\d MB left for the adapter"):
        run(compose(config, ["run=one"]))


def test_a_disk_that_fills_up_costs_checkpoints_and_not_the_adapter(config, monkeypatch):
    whole = run(compose(config, ["run=whole"]))

    def full(self, path, **options):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.warns(UserWarning, match="no checkpoint could be written") as caught:
        result = run(compose(config, ["run=full"]))
    assert len([warning for warning in caught if "no checkpoint" in str(warning.message)]) == 1
    assert same(result.folder, whole.folder)
    assert list(result.folder.checkpoint.parent.iterdir()) == []


class Broken:
    """A run of W&B's whose service has gone."""

    offline = True
    settings = None

    def __getattr__(self, name):
        raise ConnectionResetError("Connection lost")


@pytest.mark.parametrize("at_start", [True, False])
def test_a_fault_of_wandb_is_warned_of_once_and_costs_nothing(config, monkeypatch, at_start):
    def start(*arguments):
        if at_start:
            raise OSError("no server")
        return Broken()

    monkeypatch.setattr("lora_lab.tracking.loggers._start", start)
    with pytest.warns(UserWarning, match=r"tracking: W&B (does not start|failed)") as caught:
        result = run(compose(config, ["run=one", "tracking.wandb=offline"]))
    assert len([warning for warning in caught if "tracking:" in str(warning.message)]) == 1
    assert json.loads(result.folder.record.read_text())["status"] == "finished"
    assert len([row for row in read_metrics(result.folder.path) if "train/loss" in row]) == STEPS
    assert weights(result.folder)


def service() -> psutil.Process:
    """Returns W&B's service, the newest: an earlier test may have left one that is not used now."""
    services = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
    return max(services, key=psutil.Process.create_time)


def test_a_service_of_wandb_that_hangs_is_waited_for_no_longer_than_said(config, monkeypatch):
    """It is stopped, not ended: without a limit the end of the run would wait for it for ever."""

    act_at(monkeypatch, 3, lambda: service().suspend())
    usual = loggers.ANSWER_SECONDS
    monkeypatch.setattr(loggers, "ANSWER_SECONDS", 1.5)
    with suppress(Exception):  # an earlier test may have ended the service
        wandb.teardown()
    begun = time.monotonic()
    with pytest.warns(UserWarning, match=r"tracking: W&B failed") as caught:
        result = run(compose(config, ["run=one", "tracking.wandb=offline"]))
    assert time.monotonic() - begun < usual  # 2 seconds on a machine that is idle
    assert len([warning for warning in caught if "tracking:" in str(warning.message)]) == 1
    assert json.loads(result.folder.record.read_text())["status"] == "finished"
    assert len([row for row in read_metrics(result.folder.path) if "train/loss" in row]) == STEPS
    monkeypatch.undo()
    other = run(compose(config, ["run=two", "tracking.wandb=offline"]))  # it has a service again
    assert len(offline_folders(other.folder.path)) == 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "x.yaml").write_text(f"{CONFIG}output: {folder}\n")
    return run(compose(folder / "x.yaml", ["run=whole"])).folder


@pytest.mark.parametrize(
    ("fault", "moment"),
    [("home", "start"), ("home", "middle"), ("home", "end"), ("service", "end")],
)
def test_neither_a_home_nor_a_service_that_has_gone_costs_the_adapter_or_a_row(
    config, monkeypatch, tmp_path, undisturbed, fault, moment
):
    """Outside the run's folder, W&B writes into the home folder. Services that fail before: see above."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    with suppress(Exception):  # an earlier test may have ended the service
        wandb.teardown()

    def strike():
        if fault == "home":
            home.rename(tmp_path / "gone")
            home.write_text("no folder")
        else:
            service().kill()

    if moment == "start":
        strike()
    elif moment == "middle":
        act_at(monkeypatch, 7, strike)
    else:  # training has ended, the adapter is written next
        release = life.OpenRun.release_space
        monkeypatch.setattr(life.OpenRun, "release_space", lambda self: (strike(), release(self)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(compose(config, ["run=one", "tracking.wandb=offline"]))
    assert home.is_file() or fault == "service"
    said = [warning for warning in caught if "tracking:" in str(warning.message)]
    assert len(said) == (0 if (fault, moment) == ("home", "end") else 1)
    assert result.folder.read()["status"] == "finished"
    assert same(result.folder, undisturbed)
    assert len([row for row in read_metrics(result.folder.path) if "train/loss" in row]) == STEPS
    if fault == "home":
        history = read_offline_run(*offline_folders(result.folder.path)).history
        assert len([row for row in history if "train/loss" in row]) == STEPS
    else:
        with suppress(Exception):
            wandb.teardown()  # the next test's service is a new one


def test_a_disk_that_is_full_at_the_end_costs_the_last_rows_and_not_the_adapter(
    config, monkeypatch, limit_files, undisturbed
):
    room = (undisturbed.adapter / "adapter_model.safetensors").stat().st_size + 100
    begin = L.Trainer.test
    monkeypatch.setattr(L.Trainer, "test", lambda *a, **b: (limit_files(room), begin(*a, **b))[1])
    with (
        freed(limit_files),
        pytest.warns(UserWarning, match=r"metrics\.csv: no row can be written"),
        pytest.warns(UserWarning, match=r"test_examples\.parquet: could not be written"),
    ):
        result = run(compose(config, ["run=one"]))
    assert result.folder.read()["status"] == "finished"
    assert same(result.folder, undisturbed)
    assert len([row for row in read_metrics(result.folder.path) if "train/loss" in row]) == STEPS
    assert not list(result.folder.path.glob("*.unfinished*"))


@contextmanager
def freed(limit_files):
    """Lifts the limit when the block ends: pytest writes files too."""
    try:
        yield
    finally:
        limit_files(None)


def test_a_run_whose_disk_takes_nothing_any_more_does_not_stay_running(config, monkeypatch, limit_files):
    act_at(monkeypatch, 3, lambda: limit_files(0))
    with (
        pytest.warns(UserWarning, match="the record cannot say how the run has ended"),
        pytest.raises(CheckpointError, match="adapter: could not be written"),
        freed(limit_files),
    ):
        run(compose(config, ["run=one"]))
    folder = RunFolder.of(compose(config, ["run=one"]))
    record = folder.read()
    assert (record["status"], record["error"]) == (
        "failed",
        "the folder could not be written to when the run ended",
    )
    monkeypatch.undo()
    again, whole = run(compose(config, ["run=one"])), run(compose(config, ["run=whole"]))
    assert again.record["status"] == "finished"
    assert same(again.folder, whole.folder)
    assert not folder.failure.exists()


@pytest.mark.parametrize("settings", [["trainer.monitor=mae"], ["adapter.rank=3", "seed=2"]])
def test_wandbs_summary_has_parameter_counts_best_value_and_step(config, settings):
    result = run(compose(config, ["tracking.wandb=offline", "trainer.validate_every=0.5", *settings]))
    (offline,) = offline_folders(result.folder.path)
    summary = read_offline_run(offline).summary
    names = (
        "method_parameters",
        "trainable_parameters",
        "total_parameters",
        "best_value",
        "best_step",
        "steps",
    )
    assert {name: summary[name] for name in names} == {name: result.record[name] for name in names}
    rank = 3 if "adapter.rank=3" in settings else 2
    assert summary["method_parameters"] == rank * ((10 + 64) + (64 + 64))
    column = "validation/mae" if "trainer.monitor=mae" in settings else "validation/mse"
    validated = [row for row in read_metrics(result.folder.path) if column in row]
    assert summary["best_value"] == min(row[column] for row in validated)
