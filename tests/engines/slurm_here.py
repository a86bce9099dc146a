"""A real Slurm on this machine's loopback: controller, three nodes, their own configuration; as any user.

`with Slurm(folder) as slurm:` starts it and ends it; nothing is left behind. Partitions: `tpu` (two nodes), which
`tpu-high` preempts by requeueing, and `gpu` (one node), which `gpu-high` preempts.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.engines.guardian import kill

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
NODES = ("tpu0", "tpu1", "gpu0")
GRACE_S = 20

CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# Short-lived credentials: a requeued job waits until those of its last start have expired.
AuthInfo=socket={run}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=5,bf_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
MinJobAge=600
SlurmdTimeout=20
OverTimeLimit=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
GresTypes=gpu,tpu
NodeName=tpu0 NodeHostname={host} NodeAddr=127.0.0.1 Port={p0} CPUs=8 RealMemory=1000 Gres=tpu:4
NodeName=tpu1 NodeHostname={host} NodeAddr=127.0.0.1 Port={p1} CPUs=8 RealMemory=1000 Gres=tpu:4
NodeName=gpu0 NodeHostname={host} NodeAddr=127.0.0.1 Port={p2} CPUs=8 RealMemory=1000 Gres=gpu:2
PartitionName=tpu      Nodes=tpu0,tpu1 Default=YES State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime={grace}
PartitionName=tpu-high Nodes=tpu0,tpu1 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=gpu      Nodes=gpu0      State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime={grace}
PartitionName=gpu-high Nodes=gpu0      State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs that are not installed (Debian: slurmctld slurmd slurm-client munge)."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Slurm:
    """Use in a `with` block; SLURM_CONF is set meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pids: dict[str, int] = {}

    def __enter__(self) -> Slurm:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        self.run = Path(tempfile.mkdtemp(prefix="pt-slurm-", dir="/tmp"))  # a socket's path has 108 characters at most
        self.run.chmod(0o755)
        for name in ("state", "log", "spool"):
            (folder / name).mkdir(parents=True)
            (folder / name).chmod(0o755)
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        ports = _free_ports(4)
        import getpass

        text = CONFIG.format(
            host=host,
            user=getpass.getuser(),
            folder=folder,
            run=self.run,
            port=ports[0],
            p0=ports[1],
            p1=ports[2],
            p2=ports[3],
            grace=GRACE_S,
        )
        (folder / "slurm.conf").write_text(text)
        for device in ("gpu-0", "gpu-1"):  # a node whose GPUs have no files is refused
            (self.run / device).touch()
        (folder / "gres.conf").write_text(
            f"NodeName=tpu[0-1] Name=tpu Count=4\nNodeName=gpu0 Name=gpu File={self.run}/gpu-[0-1]\n"
        )
        self._before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        # Ends all of it when this process is gone, however it went: its end of the pipe closes.
        self._guardian = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("guardian.py")), str(folder / "slurm.conf"), str(self.run)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._start(
                "munged",
                [
                    "munged",
                    "--force",
                    f"--key-file={key}",
                    f"--socket={self.run}/munge.socket",
                    f"--pid-file={self.run}/munged.pid",
                    f"--log-file={folder}/log/munged.log",
                    f"--seed-file={self.run}/munge.seed",
                ],
            )
            self._start("slurmctld", ["slurmctld"])
            for node in NODES:
                self.start_node(node)
            self.wait_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, name: str, words: list[str]) -> None:
        subprocess.run(words, check=True, capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
        until_s = time.monotonic() + 60
        path = self.run / f"{name}.pid"
        while not (path.exists() and path.read_text().strip()):
            assert time.monotonic() < until_s, f"{name} did not start"
            time.sleep(0.05)
        self.pids[name] = int(path.read_text())

    def start_node(self, node: str) -> None:
        self._start(f"slurmd-{node}", ["slurmd", "-N", node])

    def kill_node(self, node: str) -> None:
        """As if its power were cut: the daemon, and everything that runs there."""
        os.kill(self.pids.pop(f"slurmd-{node}"), signal.SIGKILL)
        (self.run / f"slurmd-{node}.pid").unlink(missing_ok=True)
        kill(f"{self.folder}/slurm.conf", f"SLURMD_NODENAME={node}")

    def wait_idle(self, seconds: float = 180) -> None:
        until_s = time.monotonic() + seconds
        while True:
            states = self.call("sinfo", "-h", "-N", "-o", "%t", check=False).split()
            if states and all(state == "idle" for state in states):
                return
            assert time.monotonic() < until_s, self.call("sinfo", "-N", check=False)
            time.sleep(0.1)

    def call(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=180)
        assert not check or done.returncode == 0, (words, done.stderr)
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """id -> state of what the scheduler has."""
        rows = self.call("squeue", "-h", "-o", "%i|%T").split()
        return dict(row.split("|") for row in rows)

    def preempt(self, partition: str, nodes: int) -> str:
        """A job of higher priority on all its nodes; its id."""
        return self.call(
            "sbatch",
            "--parsable",
            f"--partition={partition}-high",
            f"--nodes={nodes}",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=sleep 600",
        ).strip()

    def __exit__(self, *_: object) -> None:
        self.call("scancel", "--user", str(os.getuid()), check=False)
        until_s = time.monotonic() + 60
        while self.jobs_left() and time.monotonic() < until_s:
            time.sleep(0.1)
        for name in (*(f"slurmd-{n}" for n in NODES), "slurmctld", "munged"):
            pid = self.pids.get(name)
            if pid is not None:
                _end(pid)
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        self._guardian.wait()
        if self._before is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = self._before

    def jobs_left(self) -> bool:
        return bool(self.call("squeue", "-h", check=False).strip())


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
