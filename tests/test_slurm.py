"""slurm/*.sbatch run as the first node's shell would, with stand-ins for Slurm's programs: what they are called with and told.

tests/slurm runs the scripts on a real Slurm.
"""

import getpass
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$CALLS"
case "$1 $2" in
    "show hostnames") printf 'node7\\nnode8\\n' ;;
    "show node") echo "NodeName=$3 Arch=x86_64 NodeAddr=10.1.2.7 NodeHostName=$3 Port=6818" ;;
    "show job")
        if [[ $* == *-o* ]]; then echo "JobId=$3 JobName=x JobState=${STATE:-RUNNING} Reason=None"
        else printf '   JobState=RUNNING Reason=None\\n   StdOut=%s\\n' "$LOG"; fi ;;
esac
"""
SRUN = """#!/bin/bash
echo "srun $*" >>"$CALLS"
echo "$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS $SRUN_CPUS_PER_TASK $(command -v python) $PYTHONPATH" >>"$CALLS"
echo "interface ${NCCL_SOCKET_IFNAME:-} ${GLOO_SOCKET_IFNAME:-}" >>"$CALLS"
for word in "$@"; do [[ $word == --output=* ]] && logs="$(dirname "${word#--output=}")"; done
if [[ -n ${logs:-} ]]; then
    echo "the first rank" >>"$logs/rank-0.log"
    printf '%b' "${SAID:-the second}\\n" >>"$logs/rank-1.log"
fi
[[ -z ${ERROR:-} ]] || echo "srun: error: node8: task 9: $ERROR" >&2
trap 'echo "told USR1" >>"$CALLS"; exit "${ON_USR1:-75}"' USR1
for _ in $(seq "${SLOW:-0}"); do sleep 0.1; done
exit "${CODE:-0}"
"""


class Job:
    """A submit folder with the project's slurm files and an environment, and the variables of a job on two nodes."""

    def __init__(self, folder: Path, script: str = "train.sbatch") -> None:
        self.folder, self.calls = folder / "a clone", folder / "calls"
        shutil.copytree(ROOT / "slurm", self.folder / "slurm")
        self.log = folder / "a job.log"
        self.log.touch()
        self.programs = folder / "programs"
        self.programs.mkdir()
        self.program(self.programs / "scontrol", SCONTROL)
        self.program(self.programs / "srun", SRUN)
        self.program(self.programs / "getent", '#!/bin/bash\nexit "${UNKNOWN:-0}"\n')
        self.program(self.folder / ".venv/bin/python", "#!/bin/bash\n")
        # Slurm runs a copy of the script from its spool folder.
        self.script = shutil.copy(ROOT / "slurm" / script, folder / "slurm_script")

    @staticmethod
    def program(path: Path, text: str) -> None:
        """Write an executable stand-in."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start the batch script."""
        environment = {
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "CALLS": str(self.calls),
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "LOG": str(self.log),
            "SLURM_NTASKS": "16",
            "SLURM_CPUS_PER_TASK": "12",
            **variables,
        }
        return subprocess.Popen(
            ["bash", self.script, *arguments],
            cwd=self.programs,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """Exit code and output of the batch script."""
        with self.start(*arguments, **variables) as process:
            output, _ = process.communicate(timeout=30)
            return process.returncode, output


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def calls_of_srun(job: Job) -> list[str]:
    """Its command line, then what its environment is."""
    return [line for line in job.calls.read_text().splitlines() if not line.startswith("scontrol")]


def test_ranks_get_the_recipe_the_address_and_the_environment(job: Job) -> None:
    code, output = job.run("heterogeneous", "train.steps=10", "run=a b")
    assert code == 0, output
    assert "heterogeneous on 2 node(s) (node[7-8]), 16 rank(s), node7:23456, start 0" in output
    options = f"--kill-on-bad-exit=1 --output={job.folder.parent}/a job.ranks/start-0/rank-%t.log --open-mode=append"
    settings = "resume=auto parallel.expect_world_size=16 train.steps=10 run=a b"
    assert calls_of_srun(job) == [
        f"srun {options} python -m modsquad_ds train heterogeneous {settings}",
        f"node7 23456 12 12 {job.folder}/.venv/bin/python {job.folder}",
        "interface  ",
    ]


def test_what_the_cluster_file_says_of_containers_and_network_is_done(job: Job) -> None:
    site = job.folder.parent / "my site.env"
    site.write_text('MODSQUAD_CONTAINER="--container-image=/a.sqsh --container-mounts=/s:/s"\nMODSQUAD_INTERFACE=ib0\n')
    (job.folder / ".venv/bin/python").unlink()
    code, output = job.run("quickstart", MODSQUAD_CLUSTER_ENV=str(site))
    assert code == 0, output
    srun = calls_of_srun(job)
    assert " --open-mode=append --container-image=/a.sqsh --container-mounts=/s:/s python -m modsquad_ds train" in srun[0]
    assert srun[2] == "interface ib0 ib0"


def test_data_are_copied_to_each_node_before_the_ranks_start(job: Job) -> None:
    code, output = job.run("quickstart", "train.steps=3", MODSQUAD_STAGE="1", TMPDIR="/disk")
    assert code == 0, output
    to = f"/disk/modsquad-{getpass.getuser()}"
    first, *_, second, _, _ = calls_of_srun(job)
    assert first == (
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 "
        f"python -m modsquad_ds stage quickstart train.steps=3 --to {to}"
    )
    assert second.endswith(f" train.steps=3 data_root={to}")


def test_first_rank_is_heard_as_it_goes_and_the_others_when_the_job_fails(job: Job) -> None:
    _, output = job.run("quickstart", SAID="rank 1: error: no disk")
    assert "the first rank\n" in output and "no disk" not in output
    code, output = job.run("quickstart", CODE="2", SAID="chatter\nrank 1: error: no disk")
    assert code == 2
    assert output.splitlines()[-2:] == [
        "rank 1: error: no disk",
        f"train.sbatch: exit code 2; the ranks' logs are in {job.folder.parent}/a job.ranks/start-0",
    ]
    said = "rank 1: Traceback (most recent)\n  File x\nValueError: 3"
    _, output = job.run("quickstart", CODE="1", SAID=said, SLURM_RESTART_COUNT="4")
    assert output.splitlines()[-2] == "rank-1: ValueError: 3"
    assert output.splitlines()[-1].endswith("a job.ranks/start-4")


def test_unknown_node_name_gives_way_to_the_address_that_slurm_uses(job: Job) -> None:
    assert job.run("quickstart", UNKNOWN="2")[0] == 0
    assert calls_of_srun(job)[1].startswith("10.1.2.7 23456 ")


def test_address_can_be_set(job: Job) -> None:
    assert job.run("quickstart", UNKNOWN="2", MODSQUAD_MASTER_ADDR="node7-ib")[0] == 0
    assert calls_of_srun(job)[1].startswith("node7-ib 23456 ")


@pytest.mark.parametrize(
    ("number", "variables", "requeued"),
    [
        (signal.SIGUSR1, {}, True),
        (signal.SIGTERM, {}, True),
        # A rank that was still starting, or already leaving, dies of the signal.
        (signal.SIGUSR1, {"ON_USR1": "138"}, True),
        # The last step was done.
        (signal.SIGUSR1, {"ON_USR1": "0"}, False),
        (signal.SIGUSR1, {"ON_USR1": "2"}, False),
        # Slurm requeues what it preempts; a job that was cancelled stays so.
        (signal.SIGTERM, {"STATE": "COMPLETING"}, False),
        (signal.SIGTERM, {"STATE": "CANCELLED"}, False),
    ],
)
def test_signal_ends_the_ranks_and_requeues(job: Job, number: int, variables: dict[str, str], requeued: bool) -> None:
    with job.start("quickstart", SLOW="100", **variables) as process:
        deadline = time.monotonic() + 20
        while not (job.calls.exists() and "interface" in job.calls.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == int(variables.get("ON_USR1", "75")), output
    assert "told USR1" in job.calls.read_text()
    assert ("scontrol requeue 123456" in job.calls.read_text()) == requeued


def test_ranks_that_were_told_to_stop_by_others_requeue_too(job: Job) -> None:
    assert job.run("quickstart", CODE="75")[0] == 75
    assert job.calls.read_text().splitlines()[-1] == "scontrol requeue 123456"


@pytest.mark.parametrize(
    ("error", "code"), [("", 139), ("Segmentation fault", 139), ("Exited with exit code 1", 1), ("Exited with exit code 2", 2)]
)
def test_crash_is_not_requeued_and_the_first_rank_to_fail_gives_the_code(job: Job, error: str, code: int) -> None:
    """What srun returns is the largest code, that of a rank it has killed for another one's failure."""
    found, output = job.run("quickstart", CODE="139", ERROR=error)
    assert found == code, output
    assert error in output
    assert "scontrol requeue" not in job.calls.read_text()


@pytest.mark.parametrize(
    ("arguments", "broken", "message"),
    [
        ((), "", "which recipe?"),
        (("quickstart",), "slurm/ranks.sh", "is not the project's root"),
        (("quickstart",), "slurm/cluster.env", "slurm/cluster.env cannot be read"),
        (("quickstart",), ".venv/bin/python", "no environment at"),
    ],
)
def test_mistake_is_named_before_anything_starts(
    job: Job, arguments: tuple[str, ...], broken: str, message: str
) -> None:
    if broken:
        (job.folder / broken).unlink()
    code, output = job.run(*arguments)
    assert code == 2
    assert message in output
    assert len(output.splitlines()) == 1
    assert not job.calls.exists()


def test_sizes_of_a_benchmark_run_one_after_the_other_whatever_becomes_of_one(tmp_path: Path) -> None:
    job = Job(tmp_path, "bench.sbatch")
    sizes = [tmp_path / f"{name}.arguments.json" for name in ("a", "measured before", "c")]
    (tmp_path / "measured before.rows.json").touch()
    code, output = job.run("scaling", *map(str, sizes), CODE="3")
    assert code == 3, output
    assert f"scaling on 2 node(s), 16 rank(s), node7:23557, {tmp_path}/c" in output
    calls = job.calls.read_text().splitlines()
    assert [line.split()[1] for line in calls if line.startswith("node7 ")] == ["23456", "23557"]
    program = "srun --kill-on-bad-exit=1 python -m modsquad_ds bench worker scaling"
    assert [line for line in calls if line.startswith("srun")] == [
        f"{program} {tmp_path}/{name}.arguments.json {tmp_path}/{name}.rows.json" for name in ("a", "c")
    ]
    assert sorted(path.name for path in tmp_path.glob("?.log")) == ["a.log", "c.log"]


def test_benchmark_without_sizes_is_a_mistake(tmp_path: Path) -> None:
    assert Job(tmp_path, "bench.sbatch").run("scaling") == (
        2, "bench.sbatch: error: which sizes? sbatch slurm/bench.sbatch BENCHMARK FILE.arguments.json ...\n"
    )  # fmt: skip


def test_tasks_and_gpus_of_a_node_have_to_agree(job: Job) -> None:
    code, output = job.run("quickstart", SLURM_GPUS_ON_NODE="4")
    assert (code, output) == (
        2, "train.sbatch: error: 8 task(s) per node but 4 GPU(s); ask for as many: --ntasks-per-node=N --gpus-per-node=N\n"
    )  # fmt: skip
    assert job.run("quickstart", SLURM_GPUS_ON_NODE="8")[0] == 0


def test_scaling_runs_on_the_login_node_too_and_its_jobs_know_nothing_of_its_own(tmp_path: Path) -> None:
    job = Job(tmp_path, "scaling.sbatch")
    job.program(job.folder / ".venv/bin/python", '#!/bin/bash\nprintf "%s " "$@"\nenv | grep -c SLURM_\n')
    arguments = ("quickstart", "--nodes", "1,2")
    assert job.run(*arguments, SLURM_CONF="c") == (0, "-m modsquad_ds bench scaling quickstart --nodes 1,2 1\n")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = ["bash", str(ROOT / "slurm/scaling.sbatch"), *arguments]
    done = subprocess.run(command, cwd=job.folder, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "-m modsquad_ds bench scaling quickstart --nodes 1,2 0\n", done.stderr


@pytest.mark.parametrize(
    ("script", "may"),
    [
        ("train.sbatch", {"job-name", "output", "open-mode", "requeue", "signal"}),
        ("evaluate.sbatch", {"job-name", "output", "open-mode", "requeue"}),
        ("bench.sbatch", {"job-name", "open-mode", "requeue"}),
        # One small task that waits for others.
        ("scaling.sbatch", {"job-name", "output", "open-mode", "requeue", "ntasks", "time"}),
    ],
)
def test_only_the_cluster_file_asks_for_resources(script: str, may: set[str]) -> None:
    header = [line for line in (ROOT / "slurm" / script).read_text().splitlines() if line.startswith("#SBATCH")]
    assert {line.split("--")[1].split("=")[0] for line in header} == may
