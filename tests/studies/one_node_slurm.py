"""A Slurm cluster of one node on 127.0.0.1, of Debian's slurm-wlm and munge, for tests.

    python -m tests.studies.one_node_slurm FOLDER

starts one, prints the SLURM_CONF to use, and stops it when its input ends.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
PATIENCE = 60

CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdParameters=config_overrides
MailProg=/bin/true
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Returns why no cluster can be started here."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons need root to start one here"


@contextmanager
def cluster(folder: Path):
    """Runs a cluster with all its files in a folder; yields the path of slurm.conf."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = [_free_port() for _ in range(2)]
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(folder=folder, host=socket.gethostname(), controller=ports[0], daemon=ports[1])
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    files = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
    options = [f"--{name}={folder / file}" for name, file in files.items()]
    commands = [
        [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--seed-file={folder}/munge.seed",
            *options,
        ],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", socket.gethostname()],
    ]
    started = []
    try:
        for command in commands:
            log = (folder / f"{command[0]}.out").open("wb")
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if command[0] == "munged":
                _until((folder / "munge.socket").exists, folder)
        _until(lambda: "idle" in _slurm(environment, "sinfo", "--noheader", "--format=%T"), folder)
        try:
            yield conf
        finally:  # processes of a job would outlive the daemons, which alone can end them
            _slurm(environment, "scancel", "--me")
            _until(lambda: not _slurm(environment, "squeue", "--noheader"), folder)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _slurm(environment, *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE).stdout


def _until(done, folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > deadline:
            logs = "\n".join(
                f"{path.name}: {path.read_text()[-500:]}" for path in folder.glob("*.[lo][ou][gt]")
            )
            raise RuntimeError(f"Slurm did not start:\n{logs}")
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


if __name__ == "__main__":
    with cluster(Path(sys.argv[1]).resolve()) as path:
        print(f"export SLURM_CONF={path}", flush=True)
        sys.stdin.read()
