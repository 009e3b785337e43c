"""slurm/shards.sbatch run as an array's element would, with stand-ins for Slurm's programs."""

import subprocess
from pathlib import Path

import pytest

from test_slurm import ROOT, Job

DATASET = ("imagenet", "/data/a set", "/shards/imagenet", "--split", "val", "--workers", "3")
ELEMENT = {
    "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "3",
}  # fmt: skip
SINGLE = {
    "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_MAX": "2",
}  # fmt: skip


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, "shards.sbatch")


@pytest.mark.parametrize("variables", [ELEMENT, {**SINGLE, "MODSQUAD_PARTS": "4"}])
def test_an_element_writes_its_part_and_merges_if_it_is_the_last(job: Job, variables: dict[str, str]) -> None:
    code, output = job.run(*DATASET, **variables)
    assert code == 0, output
    assert "part 2/4 on " in output
    calls = job.calls.read_text().splitlines()
    command = "python -m modsquad_ds shards --workers 12 imagenet /data/a set /shards/imagenet --split val --workers 3"
    assert calls[0] == f"srun --nodes=1 --ntasks=1 {command} --part 2/4 --merge 4"
    assert calls[1].endswith(f" 12 {job.folder}/.venv/bin/python {job.folder}")  # as many CPUs as the job has


def test_the_exit_code_is_that_of_the_conversion(job: Job) -> None:
    assert job.run(*DATASET, **ELEMENT, CODE="2")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (DATASET[:2], ELEMENT, "which dataset? sbatch --array=0-31 slurm/shards.sbatch LAYOUT SRC OUT"),
        (DATASET, {}, "no array job; submit with --array=0-31 for 32 parts"),
        (DATASET, SINGLE, "--array has to be 0-N"),
        (DATASET, {**ELEMENT, "SLURM_ARRAY_TASK_MAX": "6"}, "--array has to be 0-N"),  # 0-6:2
        (DATASET, {**ELEMENT, "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4"}, "--array has to be 0-N"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(
    job: Job, arguments: tuple[str, ...], variables: dict[str, str], message: str
) -> None:
    code, output = job.run(*arguments, **variables)
    assert code == 2
    assert output.startswith("shards.sbatch: error: ") and message in output
    assert len(output.splitlines()) == 1
    assert not job.calls.exists()


def test_from_elsewhere_the_root_is_asked_for(job: Job) -> None:
    (job.folder / "slurm/surroundings.sh").unlink()
    code, output = job.run(*DATASET, **ELEMENT)
    assert code == 2 and "is not the project's root; submit from there or export MODSQUAD_ROOT" in output


def test_only_the_cluster_file_asks_for_resources() -> None:
    header = [line for line in (ROOT / "slurm/shards.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {line.split("--")[1].split("=")[0] for line in header} == {"job-name", "output", "open-mode", "requeue"}
    show = f". {ROOT}/slurm/cluster.env; echo $MODSQUAD_SBATCH_CPU"
    said = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True).stdout
    assert said == "--ntasks=1 --cpus-per-task=8 --time=4:00:00\n"
