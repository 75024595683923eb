"""Kills training runs, really and at random moments, and checks that nothing is lost and no record is false.

    python -m tests.survival 200 summary.json        # number of kills; 10 to 30 minutes on one core

Each run is a process of its own, forked from this one, which has imported everything: that saves the start.
It is killed with SIGKILL or SIGTERM, alone or with its process group, again and again until one of its
processes ends by itself; some moments are drawn from the whole run, others from its end, and in some trials
two processes are started on one folder. What must hold:

- The record says `finished` only if the adapter, every row and W&B's offline file are those of a run that was
  never killed, bit for bit; in the end it says so.
- After SIGTERM the record says `interrupted`, the exit code is 143, and the run continues from the step after
  its last row.
- Of two processes on one folder at most one writes.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}

import pandas as pd
import torch
import wandb
from safetensors.torch import load_file
from wandb.sdk.data_types._private import MEDIA_TMP

import lora_lab.experiment
import lora_lab.report.terminal  # noqa: F401
from lora_lab.bench.results import about
from lora_lab.cli import main
from tests.wandb_file import offline_folders, read_offline_run

CONFIG = """
name: survival
model: {name: "random:mlp", task: regression}
data: {source: toy, size: 72, batch_size: 4}
adapter: {method: lora, rank: 2, dropout: 0.1, targets: [layer1, layer2], modules_to_save: [layer3]}
trainer: {max_epochs: 2, validate_every: 0.5, log_every: 1, checkpoint_every: 7, progress_bar: false}
tracking: {wandb: auto}
"""
VOLATILE = ("speed/", "memory/", "_runtime", "_timestamp", "_step", "_wandb", "epoch_seconds")
"""Names of what measures the machine and not the run."""
PATIENCE = 180.0
"""Seconds after which a process is taken to hang."""


@dataclass
class Process:
    """A training process."""

    pid: int
    output: Path
    code: int | None = None
    started: float = field(default_factory=time.time)

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self) -> int:
        """Waits for its end."""
        deadline = time.monotonic() + PATIENCE
        while self.poll() is None:
            assert time.monotonic() < deadline, f"{self.pid} hangs: {self.output.read_text()}"
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def kill(self, how: signal.Signals, group: bool) -> None:
        """Sends a signal, to the process or to all of its group."""
        (os.killpg if group else os.kill)(self.pid, how)


@dataclass
class Trials:
    """Runs, kills and what was seen."""

    folder: Path
    draw: random.Random
    seconds: float = 1.0
    """How long a whole run takes by what was seen last: the machine may be busy."""
    seen: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def start(self, run: str) -> Process:
        """Starts a training process."""
        output = self.folder / f"{run}.txt"
        output.write_text("")
        pid = os.fork()
        if pid:
            os.setpgid(pid, pid)
            return Process(pid, output)
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        file = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.makedirs(MEDIA_TMP.name, exist_ok=True)  # the parent's, which an earlier child has cleaned up
        faulthandler.dump_traceback_later(PATIENCE - 20, file=os.fdopen(os.dup(2), "w"))
        code = 1
        try:
            code = main(["train", str(self.folder / "x.yaml"), f"output={self.folder}", f"run={run}"])
        finally:
            with suppress(Exception):
                wandb.teardown()  # as at the end of any process; other exit functions are the parent's
            sys.stdout.flush()
            os._exit(code)

    def path(self, run: str) -> Path:
        """Returns a run's folder."""
        return self.folder / "survival" / run

    def record(self, run: str) -> dict:
        """Returns a run's record, empty if there is none."""
        path = self.path(run) / "run.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def check(self, right: bool, what: str, run: str) -> None:
        """Notes a fault."""
        if not right:
            output = self.folder / f"{run}.txt"
            self.faults.append(f"{run}: {what}\n{output.read_text()[-2000:] if output.is_file() else ''}")

    def check_finished(self, run: str) -> None:
        """Checks that a run which says `finished` has everything that a run that nobody killed has."""
        ours, theirs = self.path(run), self.path("whole")
        mine, other = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (ours, theirs))
        same = mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
        self.check(same, "other weights", run)
        self.check(rows(ours).equals(rows(theirs)), "other rows", run)
        self.check(self.record(run)["metrics"] == self.record("whole")["metrics"], "other metrics", run)
        folders = offline_folders(ours)
        self.check(len(folders) == 1, f"{len(folders)} folders of W&B's", run)
        if len(folders) == 1:
            try:
                self.check(history(ours) == history(theirs), "other rows in W&B's file", run)
            except AssertionError as error:
                self.check(False, f"W&B's file: {error}", run)
        left = [path.name for path in ours.rglob("*") if "unfinished" in path.name or ".old." in path.name]
        self.check(not left, f"left: {left}", run)

    def kill_until_finished(self, run: str, at_end: bool, kills: int) -> int:
        """Starts a run again and again and kills it; returns how often, at most `kills` times."""
        done = 0
        while True:
            fresh = not self.record(run)
            process = self.start(run)
            how = self.draw.choice([signal.SIGKILL, signal.SIGTERM])
            if done < kills:
                self._wait_for_moment(process, run, at_end)
                if process.poll() is None:
                    process.kill(how, group=self.draw.random() < 0.5)
                    done += 1
                    self.seen[f"{how.name} {'at the end' if at_end else 'anywhere'}"] += 1
            code = process.wait()
            record = self.record(run)
            took = time.time() - process.started
            self.seconds = took if fresh and code == 0 else max(took, self.seconds)
            self._check_end(run, process, code, how, record)
            if record.get("status") == "finished":
                self.check_finished(run)
                return done

    def _check_end(self, run: str, process: Process, code: int, how: signal.Signals, record: dict) -> None:
        status = record.get("status", "none")
        self.seen[f"ended {code}, {status}"] += 1
        if code == 0:
            self.check(status == "finished", f"exit code 0, but {status}", run)
        elif code == 143:
            # While `starting`, as with none, there is no run yet.
            self.check(status in ("interrupted", "none", "starting"), f"exit code 143, but {status}", run)
            self.check(how is signal.SIGTERM, "exit code 143 without SIGTERM", run)
        else:
            self.check(code in (-signal.SIGKILL, -signal.SIGTERM), f"exit code {code}", run)
        output = process.output.read_text()
        if found := re.search(r"interrupted before; it continues from step (\d+)", output):
            self.seen["continued after SIGTERM"] += 1
            lost = self.rows_before.get(run, 0) - int(found[1])
            self.check(lost <= 0, f"{lost} steps lost", run)
        # Rows of a process that SIGTERM ended in training: before, the file has those of an earlier process,
        # and the end of a run has no checkpoint of its own.
        metrics = self.path(run) / "metrics.csv"
        own = metrics.is_file() and metrics.stat().st_mtime > process.started
        logged = rows(self.path(run)) if own else []
        steps = int(logged["step"].max()) + 1 if len(logged) else 0
        self.rows_before[run] = steps if code == 143 and steps < STEPS else 0

    def _wait_for_moment(self, process: Process, run: str, at_end: bool) -> None:
        deadline = time.monotonic() + PATIENCE
        if at_end:
            moment = self.draw.choice(["test", "adapter", "finished"])
            while process.poll() is None and time.monotonic() < deadline:
                if self._reached(run, moment):
                    time.sleep(self.draw.random() * 0.3)
                    return
                time.sleep(0.002)
            return
        until = time.monotonic() + self.draw.random() * 1.05 * self.seconds
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)

    def _reached(self, run: str, moment: str) -> bool:
        path = self.path(run)
        if moment == "finished":
            return self.record(run).get("status") == "finished"
        if moment == "adapter":
            return any(path.glob(".adapter*")) or (path / "adapter").exists()
        metrics = path / "metrics.csv"
        return metrics.is_file() and "test/" in metrics.read_text().partition("\n")[0]

    def race(self, run: str) -> int:
        """Starts two processes on one folder, kills one, and lets the run end; returns the kills."""
        both = [self.start(run), self.start(run)]
        end = time.monotonic() + self.draw.random() * self.seconds
        while time.monotonic() < end and any(process.poll() is None for process in both):
            time.sleep(0.005)
        kills, alive = 0, [process for process in both if process.poll() is None]
        if alive:
            self.draw.choice(alive).kill(signal.SIGKILL, group=True)
            kills = 1
            self.seen["SIGKILL of one of two"] += 1
        for process in both:
            code = process.wait()
            self.seen[f"race ended {code}"] += 1
            self.check(code in (0, 2, -signal.SIGKILL), f"exit code {code}", run)
        codes = [process.code for process in both]
        if codes.count(0) == 2:  # the second found the first's run finished
            self.seen["race: both ended well"] += 1
        self.rows_before.pop(run, None)
        return kills + self.kill_until_finished(run, at_end=False, kills=0)

    rows_before: dict[str, int] = field(default_factory=dict)
    """Run → steps that its rows had shown when SIGTERM ended it."""


STEPS = 2 * 72 // 4


def rows(folder: Path) -> pd.DataFrame:
    """Returns a run's rows without what measures the machine."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return pd.DataFrame(columns=["step"])
    frame = pd.read_csv(path)
    return frame[sorted(name for name in frame if not name.startswith(VOLATILE))]


def history(folder: Path) -> list[dict]:
    """Returns the rows of a run's one offline file of W&B's, which must have been ended without a fault."""
    (offline,) = offline_folders(folder)
    run = read_offline_run(offline)
    assert run.exit_code == 0, f"exit code {run.exit_code}"
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(VOLATILE) and "artifact" not in name
        }
        for row in run.history
    ]


def survive(folder: Path, kills: int, seed: int = 0, report: Path | None = None) -> Trials:
    """Kills runs this many times and returns what was seen."""
    trials = Trials(folder, random.Random(seed))
    (folder / "x.yaml").write_text(CONFIG)
    begun = time.monotonic()
    process = trials.start("whole")
    assert process.wait() == 0, process.output.read_text()
    trials.seconds = time.monotonic() - begun
    done = number = 0
    while done < kills and len(trials.faults) < 20:
        run, left = f"run{number}", kills - done
        kind = ("anywhere", "end", "race")[number % 3]
        if kind == "race":
            done += trials.race(run)
        else:
            most = min(left, 8, max(1, kills // 3))  # so that few kills are of several kinds
            done += trials.kill_until_finished(run, kind == "end", trials.draw.randint(1, most))
        number += 1
        trials.seen["kills"], trials.seen["runs"], trials.seen["faults"] = done, number, len(trials.faults)
        if report is not None:
            seen = about(["torch", "lightning", "wandb"]) | dict(sorted(trials.seen.items()))
            report.write_text(json.dumps(seen, indent=1) + "\n")
    return trials


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
        trials = survive(Path(place), int(sys.argv[1]), seed, Path(sys.argv[2]))
    print("\n\n".join(trials.faults))
    sys.exit(bool(trials.faults))
