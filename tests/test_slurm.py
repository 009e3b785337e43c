"""slurm/*.sbatch run as the first node's shell would, with stand-ins for Slurm's programs."""

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
esac
"""
SRUN = """#!/bin/bash
echo "srun $*" >>"$CALLS"
echo "$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS $SRUN_CPUS_PER_TASK $(command -v python) $PYTHONPATH" >>"$CALLS"
for _ in $(seq "${SLOW:-0}"); do sleep 0.1; done
exit "${CODE:-0}"
"""


class Job:
    """A submit folder with the project's slurm files and an environment, and the variables of a job on two nodes."""

    def __init__(self, folder: Path, script: str = "train.sbatch") -> None:
        self.folder, self.calls = folder / "a clone", folder / "calls"
        shutil.copytree(ROOT / "slurm", self.folder / "slurm")
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


def test_ranks_get_the_recipe_the_address_and_the_environment(job: Job) -> None:
    code, output = job.run("heterogeneous", "train.steps=10", "run=a b")
    assert code == 0, output
    assert "heterogeneous on 2 node(s), 16 rank(s), node7:23456" in output
    calls = job.calls.read_text().splitlines()
    command = "python -m modsquad_ds train heterogeneous resume=auto train.steps=10 run=a b"
    assert calls[1:] == [
        f"srun --kill-on-bad-exit=1 {command}",
        f"node7 23456 12 12 {job.folder}/.venv/bin/python {job.folder}",
    ]


def test_unknown_node_name_gives_way_to_the_address_that_slurm_uses(job: Job) -> None:
    assert job.run("quickstart", UNKNOWN="2")[0] == 0
    assert job.calls.read_text().splitlines()[-1].startswith("10.1.2.7 23456 ")


def test_address_can_be_set(job: Job) -> None:
    assert job.run("quickstart", UNKNOWN="2", MODSQUAD_MASTER_ADDR="node7-ib")[0] == 0
    assert job.calls.read_text().splitlines()[-1].startswith("node7-ib 23456 ")


def test_exit_code_of_the_training_is_that_of_the_job(job: Job) -> None:
    assert job.run("quickstart", CODE="2")[0] == 2


def test_signal_before_the_time_limit_requeues(job: Job) -> None:
    with job.start("quickstart", SLOW="20") as process:
        deadline = time.monotonic() + 20
        while not (job.calls.exists() and "srun" in job.calls.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert "requeueing" in output
    assert job.calls.read_text().splitlines()[-1] == "scontrol requeue 123456"


@pytest.mark.parametrize(
    ("arguments", "broken", "message"),
    [
        ((), "", "which recipe?"),
        (("quickstart",), "slurm/cluster.env", "is not the project's root"),
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
    assert [line.split()[1] for line in calls if line.startswith("node7")] == ["23456", "23557"]
    program = "srun --kill-on-bad-exit=1 python -m modsquad_ds bench worker scaling"
    assert [line for line in calls if line.startswith("srun")] == [
        f"{program} {tmp_path}/{name}.arguments.json {tmp_path}/{name}.rows.json" for name in ("a", "c")
    ]
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["a.log", "c.log"]


def test_benchmark_without_sizes_is_a_mistake(tmp_path: Path) -> None:
    assert Job(tmp_path, "bench.sbatch").run("scaling") == (
        2, "bench.sbatch: which sizes? sbatch slurm/bench.sbatch BENCHMARK FILE.arguments.json ...\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "may"),
    [
        ("train.sbatch", {"job-name", "output", "open-mode", "requeue", "signal"}),
        ("bench.sbatch", {"job-name", "open-mode", "requeue"}),
    ],
)
def test_only_the_cluster_file_asks_for_resources(script: str, may: set[str]) -> None:
    header = [line for line in (ROOT / "slurm" / script).read_text().splitlines() if line.startswith("#SBATCH")]
    assert {line.split("--")[1].split("=")[0] for line in header} == may
