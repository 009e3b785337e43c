"""A real Slurm of several nodes on this machine, for tests of the batch scripts. Its controller and nodes run as root.

Mode `netns`: a namespace of its own for the login node, with munge, the controller and a bridge in it, and one for each node,
with its own address, host name and processes. All hangs on one process that reads a pipe from here: when this process ends,
however it ends, the kernel takes the rest down, network included, and nothing outside can collide with it.
Mode `host`: where namespaces are refused, all daemons run beside everything else, on free ports, known by a mark in their
environment; a guard process ends them when this one ends. Names of nodes do not resolve there.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from cluster_files import NET, write_files

Mode = Literal["netns", "host"]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
MARK = "MODSQUAD_TEST_CLUSTER"
NAMESPACES = ("--mount", "--net", "--uts", "--ipc", "--pid")

# Process 1 of a namespace: says its number outside, sets up, then reaps what ends until the pipe from the test closes.
INIT = """
read -r outside _ </proc/self/stat
mount -t proc proc /proc && hostname "$1" && eval "$2" || exit 1
echo "ready $outside"
while read -r _; do :; done
"""


def unavailable() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "Slurm's daemons of a test cluster need root"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
    if missing:
        return f"no {', '.join(missing)}: apt-get install --no-install-recommends munge slurmctld slurmd slurm-client"
    return None


def no_namespaces() -> str | None:
    """Why there can be no namespaces with a bridge and a veth pair here; None if there can."""
    missing = [program for program in ("unshare", "nsenter", "ip", "mount") if not shutil.which(program, path=PATH)]
    if missing:
        return f"no {', '.join(missing)}: apt-get install util-linux iproute2"
    tries = ("mount -t tmpfs tmpfs /run", "ip link add name nodes type bridge", "ip netns add node1")
    script = " && ".join((*tries, "ip link add name here type veth peer name there netns node1"))
    command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=30, env={**os.environ, "PATH": PATH}
    )  # fmt: skip
    return None if done.returncode == 0 else f"namespaces are refused: {done.stderr.strip()}"


class ClusterError(AssertionError):
    """The cluster, or a job on it, did not do what the test waits for."""


class Cluster:
    """A running Slurm; as a context it stops when the block ends.

    Nodes are named node1, node2, ...; each claims `cpus` CPUs and `gpus` GPUs that are none. A node that does not answer for
    `patience` seconds is down. All see the same files, but for the folder `scratch`: in mode `netns` each node has its own.
    """

    def __init__(
        self, folder: Path, nodes: int = 2, gpus: int = 2, cpus: int = 4, patience: int = 5, mode: Mode | None = None
    ) -> None:
        reason = unavailable()
        if reason:
            raise ClusterError(reason)
        self.folder, self.gpus, self.cpus, self.patience = folder, gpus, cpus, patience
        self.nodes = tuple(f"node{number}" for number in range(1, nodes + 1))
        self.mode: Mode = mode or ("host" if no_namespaces() else "netns")
        self.conf, self.scratch = folder / "slurm.conf", folder / "scratch"
        self._pipes: dict[str, subprocess.Popen[str]] = {}
        self._outside: dict[str, str] = {}
        self._killed: set[str] = set()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    # ------------------------------------------------------------ commands

    def run(
        self, *command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None,
        check: bool = True, timeout: float = 120.0,
    ) -> "subprocess.CompletedProcess[str]":  # fmt: skip
        """Run a command as on the login node. With `check`, ClusterError with its output if it fails."""
        words = [*self._enter("login", cwd or Path.cwd()), *map(str, command)]
        done = subprocess.run(
            words, cwd=cwd, env=self.environment(env), capture_output=True, text=True, check=False, timeout=timeout,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise ClusterError(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def environment(self, more: dict[str, str] | None = None) -> dict[str, str]:
        """Variables of a command on the login node; sbatch hands them to its job."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return {**mine, "PATH": PATH, "SLURM_CONF": str(self.conf), MARK: str(self.folder), **(more or {})}

    def submit(self, *arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """sbatch; the job's number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env).stdout.strip().partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """Fields of a job as `scontrol show job` names them: JobState, Restarts, NodeList, ExitCode, Reason ..."""
        text = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(word.partition("=")[::2] for word in text.split())

    def wait(self, number: str, *states: str, timeout: float = 120.0, restarts: int = 0) -> dict[str, str]:
        """Wait until a job is in one of `states` (default: ended) and was started again at least `restarts` times.

        A requeued job would wait two minutes. It is let go after three seconds: a node that gets it sooner takes it for the one
        that it has just ended. ClusterError if the job ends otherwise, or not in time.
        """
        wanted, deadline, released = states or ENDED, time.monotonic() + timeout, False
        while True:
            job = self.job(number)
            if job["JobState"] in wanted and int(job["Restarts"]) >= restarts:
                return job
            ended = job["JobState"] in ENDED and not any(state in ENDED for state in wanted)
            if ended or time.monotonic() > deadline:
                raise ClusterError(f"job {number} is {job['JobState']}, not {wanted} after {restarts} restarts: {job}")
            held = job["JobState"] == "PENDING" and job["Reason"] == "BeginTime"
            if held and not released:
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now+3", check=False)
            released = held
            time.sleep(0.2)

    def signal(self, number: str, name: str = "USR1") -> None:
        """Signal the batch shell of a job, as `--signal=B:USR1@...` does."""
        self.run("scancel", f"--signal={name}", "--batch", number)

    # ------------------------------------------------------------ nodes

    def kill_node(self, node: str) -> None:
        """Cut a node's power: its network is silent first, then all its processes are gone."""
        if self.mode == "netns":
            self.run("ip", "link", "set", f"to-{node}", "down")
            self._end(node)
        else:
            _kill_marked(self.folder, node)
        self._killed.add(node)

    def start_node(self, node: str) -> None:
        """Start a node, or one that was killed, and wait until Slurm may use it."""
        if self.mode == "netns":
            self.run("ip", "link", "set", f"to-{node}", "up")
            disk = f"mount --bind '{self.folder}/disks/{node}' '{self.scratch}'"
            self._begin(node, ["nsenter", f"--net=/run/netns/{node}"], disk)
            command = [*self._enter(node, self.folder), "slurmd", "-f", str(self.conf), "-N", node]
        else:
            command = ["slurmd", "-f", str(self.conf), "-N", node]
        self._daemon(command, self.environment({"SLURMD_NODENAME": node}))
        self._killed.discard(node)

    def drain(self, node: str) -> None:
        """Keep jobs from a node."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")

    def resume(self, node: str) -> None:
        """Let jobs on a drained node again."""
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)

    def heal(self) -> None:
        """Cancel all jobs and bring every node back: the cluster as new, for the next test."""
        self.run("scancel", "--user=root", check=False)
        for node in self.nodes:
            if node in self._killed:
                self.start_node(node)
            if "DRAIN" in self.node_state(node):
                self.resume(node)
        self._until(lambda: not self.run("squeue", "--noheader").stdout.strip(), "no job is left", 30)
        self.wait_nodes()

    def node_state(self, node: str) -> str:
        """State of a node as `scontrol show node` names it, e.g. IDLE, MIXED, DOWN*, IDLE+DRAIN."""
        text = self.run("scontrol", "--oneliner", "show", "node", node).stdout
        return dict(word.partition("=")[::2] for word in text.split())["State"]

    def wait_nodes(self, *nodes: str, timeout: float = 30.0) -> None:
        """Wait until nodes (default: all) answer."""
        for node in nodes or self.nodes:
            self._until(lambda node=node: self.node_state(node) in ("IDLE", "MIXED", "ALLOCATED"), f"{node} is up", timeout)

    # ------------------------------------------------------------ life

    def stop(self) -> None:
        """End everything; what was written stays in the folder."""
        for name in reversed(list(self._pipes)):
            self._end(name)
        if self.mode == "host":
            _kill_marked(self.folder)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _start(self) -> None:
        write_files(self.folder, self.nodes, self.gpus, self.cpus, self.patience, self.mode == "netns")
        if self.mode == "netns":
            hosts, names = self.folder / "hosts", self.folder / "nsswitch.conf"
            script = f"""mount --bind '{hosts}' /etc/hosts && mount --bind '{names}' /etc/nsswitch.conf &&
                mount -t tmpfs tmpfs /run && ip link set lo up &&
                ip link add name nodes type bridge && ip addr add {NET}.1/24 dev nodes && ip link set nodes up"""
            self._begin("login", [], script)
            for number, node in enumerate(self.nodes, 1):
                link = f"to-{node}"
                self.run("ip", "netns", "add", node)
                self.run("ip", "link", "add", "name", link, "type", "veth", "peer", "name", "eth0", "netns", node)
                self.run("ip", "link", "set", link, "master", "nodes")
                self.run("ip", "-n", node, "addr", "add", f"{NET}.{10 + number}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    self.run("ip", "-n", node, "link", "set", device, "up")
        else:
            guard = [sys.executable, "-S", __file__, str(self.folder)]
            self._pipes["guard"] = subprocess.Popen(guard, stdin=subprocess.PIPE, text=True, start_new_session=True)
        where, socket_path = self._enter("login", self.folder), self.folder / "run/munge.sock"
        files = {"key-file": "munge.key", "pid-file": "run/munged.pid", "log-file": "log/munged.log", "seed-file": "run/seed"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._daemon([*where, "munged", "--force", f"--socket={socket_path}", *options], self.environment())
        self._daemon([*where, "slurmctld", "-f", str(self.conf)], self.environment())
        self._until(lambda: self.run("scontrol", "ping", check=False).returncode == 0, "the controller answers", 20)
        for node in self.nodes:
            self.start_node(node)
        self.wait_nodes()

    def _begin(self, name: str, prefix: Sequence[str], script: str) -> None:
        """Start process 1 of the login node or, inside of that, of a node."""
        inside = self._enter("login", self.folder) if name != "login" else []
        kinds = [kind for kind in NAMESPACES if kind != "--net"] if name != "login" else NAMESPACES
        command = [*inside, *prefix, "unshare", *kinds, "--fork", "--kill-child", "bash", "-c", INIT, "init", name, script]
        environment = self.environment()
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        self._pipes[name] = process
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 20)
        line = process.stdout.readline().split() if ready else []
        if len(line) != 2 or line[0] != "ready":
            raise ClusterError(f"{name} did not start: {line}")
        self._outside[name] = line[1]

    def _enter(self, name: str, cwd: Path) -> list[str]:
        """Prefix of a command that runs on the login node or on a node, in a folder."""
        if self.mode == "host":
            return []
        login = ["nsenter", f"--target={self._outside['login']}", *NAMESPACES, "--", "env", f"--chdir={cwd}"]
        # A node's process has its number as the login node sees it.
        inner = ["nsenter", f"--target={self._outside[name]}", *NAMESPACES, "--", "env", f"--chdir={cwd}"]
        return login if name == "login" else [*login, *inner]

    def _end(self, name: str) -> None:
        process = self._pipes.pop(name, None)
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def _daemon(self, command: Sequence[str], environment: dict[str, str]) -> None:
        with (self.folder / "log/daemons.out").open("a") as out:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, check=False, timeout=30
            )  # fmt: skip
        if done.returncode != 0:
            logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted((self.folder / "log").iterdir()))
            raise ClusterError(f"{' '.join(command)}: exit code {done.returncode}\n{logs}")

    def _until(self, true: Callable[[], bool], what: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            if time.monotonic() > deadline:
                raise ClusterError(f"not in {timeout} s: {what}; logs are in {self.folder / 'log'}")
            time.sleep(0.1)


def _marked(folder: Path, node: str | None = None) -> Iterator[int]:
    """Processes of the cluster in a folder, or those on one of its nodes, but for the guard."""
    wanted = {f"{MARK}={folder}"} | ({f"SLURMD_NODENAME={node}"} if node else set())
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((entry / "environ").read_bytes().decode(errors="replace").split("\0"))
        except OSError:  # it has ended, or is a zombie
            continue
        if wanted <= variables:
            yield int(entry.name)


def _kill_marked(folder: Path, node: str | None = None) -> None:
    for _ in range(50):  # what is killed may have been starting another
        found = list(_marked(folder, node))
        if not found:
            return
        for number in found:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    raise ClusterError(f"processes of {folder} do not end: {found}")


if __name__ == "__main__":  # the guard of mode `host`
    sys.stdin.read()
    _kill_marked(Path(sys.argv[1]))
