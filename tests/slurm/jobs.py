"""Small jobs of the quickstart for the test cluster: how they are submitted, and what their runs leave."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from cluster import Cluster

ROOT = Path(__file__).parents[2]
STEPS = 16
SMALL = ["tasks.digits.batch_size=8", "tasks.scenes.batch_size=4", "tasks.textures.batch_size=4", "train.workers=0"]
OFTEN = ["train.log_every=1", "train.checkpoint_every=2"]
DEFAULT = ("--nodes=2", "--ntasks-per-node=1")
SITE = """
MODSQUAD_SBATCH="--ntasks-per-node=1 --cpus-per-task=1 --time=15"
MODSQUAD_VENV={venv}
MODSQUAD_SCRATCH={scratch}
"""


class Jobs:
    """Training jobs of the quickstart, small, on a cluster."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path) -> None:
        self.cluster, self.folder, self.data = cluster, folder, data
        self.run = folder / "run"
        self.site = folder / "cluster.env"
        self.site.write_text(SITE.format(venv=sys.prefix, scratch=cluster.scratch))

    def submit(
        self, *arguments: str, options: tuple[str, ...] = DEFAULT,
        script: str = "train.sbatch", env: dict[str, str] | None = None,
    ) -> str:  # fmt: skip
        """sbatch as a user would; the job's number."""
        here = {"MODSQUAD_CLUSTER_ENV": str(self.site), "PYTHONPATH": str(ROOT), **(env or {})}
        words = [*options, f"--output={self.folder}/job-%j.log", ROOT / "slurm" / script, *arguments]
        return self.cluster.submit(*words, cwd=ROOT, env=here)

    def train(self, *settings: str, options: tuple[str, ...] = DEFAULT, env: dict[str, str] | None = None) -> str:
        """Submit a training in the test's folder."""
        where = [f"run={self.run}", f"data_root={self.data}", f"train.steps={STEPS}"]
        return self.submit("quickstart", *where, *SMALL, *OFTEN, *settings, options=options, env=env)

    def log(self, number: str) -> str:
        """What the job's log says."""
        path = self.folder / f"job-{number}.log"
        return path.read_text() if path.is_file() else ""

    def wait_for_step(self, number: str, step: int) -> None:
        """Wait until a running job has done a step."""
        deadline = time.monotonic() + 200
        while len(records(self.run)) < step:
            state = self.cluster.job(number)["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING") and time.monotonic() < deadline, (state, self.log(number))
            time.sleep(0.1)


def records(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each step, but for what depends on the time."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    of_time = ("_per_s", "seconds")
    return [{key: value for key, value in json.loads(line).items() if not key.endswith(of_time)} for line in lines]


def weights(run: Path) -> bytes:
    """All tensors of a run's model file; its header also holds the recipe, with the run's folder."""
    content = (run / "model.safetensors").read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]
