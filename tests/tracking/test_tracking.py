"""Rows reach the CSV file and W&B, each exactly once, no matter what happens to the process."""

import math
import os
import random
import signal
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.errors import CheckpointError, ConfigError
from lora_lab.tracking import (
    MetricsFile,
    TrackingConfig,
    build_loggers,
    close_loggers,
    read_metrics,
    replay,
    wandb_mode,
)
from lora_lab.tracking.loggers import run_id
from tests.forks import fork
from tests.tracked_run import SETTINGS, train
from tests.wandb_file import offline_folders, read_offline_run

OFFLINE = TrackingConfig(wandb="offline", tags=["a", "b"])


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """The machine's own W&B account plays no part."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()


def logs(folder, config=OFFLINE, run="one"):
    return build_loggers(config, folder, "trial", run, SETTINGS)


def write(loggers, rows):
    for row in rows:
        metrics = {name: value for name, value in row.items() if name != "step"}
        for logger in loggers:
            logger.log_metrics(metrics, row["step"])


def plain(history):
    """W&B's rows without its own columns, in the form of the CSV's."""
    named = [{name: value for name, value in row.items() if not name.startswith("_")} for row in history]
    return [{"step": row.pop("trainer/global_step"), **row} for row in named]


def some_rows(count, seed=0):
    rows = []
    for step in range(count):
        draw = random.Random(1000 * seed + step)
        rows.append({"step": step, "train/loss": draw.expovariate(1), "epoch": 0})
        if step % 10 == 9:
            rows[-1]["validation/loss"] = draw.uniform(-1e-30, 1e30)
    return rows


def test_a_run_leaves_its_config_and_rows_in_both_places(make_model, tmp_path, capfd):
    train(make_model("bert"), LoRASpec(rank=2), tmp_path)
    told = capfd.readouterr()
    assert "wandb" not in (told.out + told.err).lower()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "wandb"}
    offline = read_offline_run(*offline_folders(tmp_path))
    assert {name: offline.config[name] for name in SETTINGS} == SETTINGS
    assert (offline.name, offline.group, offline.project) == ("one", "trial", "lora_lab")
    assert offline.exit_code == 0
    rows = read_metrics(tmp_path)
    assert len([row for row in rows if "train/loss" in row]) == 4
    assert [
        row
        for row in plain(offline.history)
        if not any(name.startswith(("rank/table", "rank/heatmap")) for name in row)
    ] == rows
    assert (
        offline.summary["validation/loss"]
        == [r["validation/loss"] for r in rows if "validation/loss" in r][-1]
    )


def test_names_tags_and_failure_reach_wandb(tmp_path):
    config = TrackingConfig(wandb="offline", project="p", group="g", tags=["x", "y"])
    loggers = logs(tmp_path, config)
    close_loggers(loggers, failed=True)
    offline = read_offline_run(*offline_folders(tmp_path))
    assert (offline.project, offline.group, offline.tags, offline.exit_code) == ("p", "g", ["x", "y"], 1)
    assert offline.id == run_id(config, "trial", "one") != run_id(config, "trial", "two")


def test_two_runs_in_one_process_do_not_mix(tmp_path):
    first, second = logs(tmp_path / "1", run="one"), logs(tmp_path / "2", run="two")
    write(first, some_rows(3))
    write(second, some_rows(5))
    close_loggers([*first, *second])
    for name, count in (("1", 3), ("2", 5)):
        assert plain(read_offline_run(*offline_folders(tmp_path / name)).history) == some_rows(count)
    assert wandb.run is None


def test_disabled_leaves_only_the_csv(make_model, tmp_path):
    train(make_model("bert"), LoRASpec(rank=2), tmp_path, tracking="disabled")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    assert read_metrics(tmp_path)


# The CSV file ---------------------------------------------------------------------------------------------


def test_numbers_come_back_bit_for_bit(tmp_path):
    draw = random.Random(1)
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf, 3, 10**17, 2.0]
    values += [draw.uniform(-1, 1) * 10.0 ** draw.randint(-300, 300) for _ in range(500)]
    file = MetricsFile(tmp_path)
    for step, value in enumerate(values):
        file.log_metrics({"x": value}, step)
    found = read_metrics(tmp_path)
    assert [(type(row["x"]), repr(row["x"])) for row in found] == [(type(v), repr(v)) for v in values]
    file.log_metrics({"x": math.nan}, 0)
    assert math.isnan(read_metrics(tmp_path)[-1]["x"])


def test_a_row_is_in_the_file_at_once_and_columns_may_come_late(tmp_path):
    file = MetricsFile(tmp_path)
    rows = [
        {"step": 0, "a": 1.5},
        {"step": 1, "a": 2.5},
        {"step": 1, "b": 0.5},
        {"step": 2, "a": 3.5, "c": 1},
    ]
    for count, row in enumerate(rows, start=1):
        write([file], [row])
        assert read_metrics(tmp_path) == rows[:count]
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "step,a,b,c"


def test_an_earlier_file_is_replaced_at_the_first_row(tmp_path):
    write([MetricsFile(tmp_path)], some_rows(5))
    again = MetricsFile(tmp_path)
    assert read_metrics(tmp_path) == some_rows(5)
    write([again], some_rows(2, seed=1))
    assert read_metrics(tmp_path) == some_rows(2, seed=1)


def test_a_torn_last_line_is_dropped(tmp_path):
    rows = some_rows(12)
    write([MetricsFile(tmp_path)], rows)
    whole = (tmp_path / "metrics.csv").read_bytes()
    ends = [index for index, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole)):
        (tmp_path / "metrics.csv").write_bytes(whole[:length])
        lines = sum(end < length for end in ends)
        assert read_metrics(tmp_path) == rows[: max(0, lines - 1)]


@pytest.mark.parametrize("text", ["step,a\n0,word\n", "step,a\n0,1,2\n"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(CheckpointError, match="metrics.csv"):
        read_metrics(tmp_path)


def test_no_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


# Resuming -------------------------------------------------------------------------------------------------


def write_and_die(folder: Path) -> None:
    write(logs(folder), some_rows(40))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_goes_on_with_each_row_exactly_once(tmp_path):
    code, printed = fork(write_and_die, tmp_path / "run", folder=tmp_path).end()
    assert code == -signal.SIGKILL, printed
    tmp_path = tmp_path / "run"
    rows = read_metrics(tmp_path)
    assert rows == some_rows(40)
    (before,) = offline_folders(tmp_path)
    # W&B numbers the folder of a process that starts in the same second.
    numbered = before.rename(before.with_name(f"{before.name}-1"))
    numbered.with_name("offline-run-20260101_000000-other-1").mkdir()  # another run's
    loggers = logs(tmp_path)
    replay(rows, loggers, until_step=30)
    assert read_metrics(tmp_path) == some_rows(40)[:30]
    write(loggers, some_rows(60)[30:])
    close_loggers(loggers)
    assert read_metrics(tmp_path) == some_rows(60)
    other, after = offline_folders(tmp_path)
    assert other.name.endswith("other-1")
    assert after != numbered
    offline = read_offline_run(after)
    assert plain(offline.history) == some_rows(60)
    assert offline.id == run_id(OFFLINE, "trial", "one")


def test_beginning_afresh_leaves_no_old_rows(tmp_path):
    write([MetricsFile(tmp_path)], some_rows(5))
    loggers = logs(tmp_path, TrackingConfig(wandb="disabled"))
    replay(read_metrics(tmp_path), loggers, until_step=0)
    assert read_metrics(tmp_path) == []


def test_an_online_run_is_not_given_its_rows_again(tmp_path):
    class Online(WandbLogger):
        def __init__(self):
            self.given = []

        @property
        def experiment(self):
            return type("Run", (), {"offline": False})

        def log_metrics(self, metrics, step=None):
            self.given.append(metrics)

    online, file = Online(), MetricsFile(tmp_path)
    replay(some_rows(5), [file, online], until_step=5)
    assert online.given == []
    assert read_metrics(tmp_path) == some_rows(5)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    loggers = logs(tmp_path)
    write(loggers, some_rows(3))
    replay(some_rows(3), loggers, 3)
    close_loggers(loggers)
    assert list(tmp_path.iterdir()) == []


# Choosing the mode ----------------------------------------------------------------------------------------


def test_auto_is_offline_without_a_key_and_online_with_one(monkeypatch, tmp_path):
    assert wandb_mode(TrackingConfig()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wandb.teardown()
    assert wandb_mode(TrackingConfig()) == "online"
    assert wandb_mode(TrackingConfig(wandb="offline")) == "offline"
    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()
    host = wandb.setup().settings.base_url.removeprefix("https://")
    (tmp_path / "netrc").write_text(f"machine {host} login user password {'k' * 40}\n")
    assert wandb_mode(TrackingConfig()) == "online"


@pytest.mark.parametrize(
    ("said", "meant"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")]
)
def test_auto_follows_the_environment(monkeypatch, said, meant):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", said)
    assert wandb_mode(TrackingConfig()) == meant
    assert wandb_mode(TrackingConfig(wandb="online")) == "online"


def test_online_without_a_key_is_refused_and_not_asked_for(monkeypatch):
    with pytest.raises(ConfigError, match=r"tracking.wandb: online needs an API key.*wandb login"):
        wandb_mode(TrackingConfig(wandb="online"))
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="WANDB_MODE: online needs an API key"):
        wandb_mode(TrackingConfig())
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ConfigError, match="did you mean 'offline'"):
        wandb_mode(TrackingConfig())


def test_names_that_wandb_refuses_are_reported(tmp_path):
    with pytest.raises(ConfigError, match="tracking"):
        logs(tmp_path, TrackingConfig(wandb="offline", project="no/slashes"))
