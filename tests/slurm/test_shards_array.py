"""slurm/shards.sbatch on a real Slurm: an array whose last element is killed and requeued leaves the shards of one piece."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

import layouts
from cluster import Cluster
from layouts import all_samples, contents
from modsquad_ds.data.convert import convert
from modsquad_ds.data.shards import ShardSet

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
DEADLINE = 120


def wait_for(path: Path) -> None:
    end = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.1)


def test_an_element_that_is_killed_and_requeued_loses_nothing_and_merges(cluster: Cluster, tmp_path: Path) -> None:
    """7 tars: part 1 of 3 has tars 1 and 4, and hangs in the last sample of the second until it is killed."""
    src, out = layouts.imagenet(tmp_path / "src", per_class=10), tmp_path / "out"
    convert("imagenet", src, tmp_path / "one", "train", samples_per_shard=3, progress=False)
    row = json.loads((tmp_path / "one/train/shard-00004.index.json").read_text())[-1]
    stuck = next((src / "train").glob(row["key"] + ".*"))
    picture = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)
    site = tmp_path / "cluster.env"
    site.write_text(f"MODSQUAD_VENV={sys.prefix}\n")
    number = cluster.submit(
        "--array=0-2", "--ntasks=1", "--time=10", f"--output={tmp_path}/%a.log", ROOT / "slurm/shards.sbatch",
        "imagenet", src, out, "--split", "train", "--samples-per-shard", "3",
        cwd=ROOT, env={"MODSQUAD_CLUSTER_ENV": str(site), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(out / ".train.parts/.part-1-of-3.partial/shard-00004.tar")
    for element in ("0", "2"):
        cluster.wait(f"{number}_{element}", "COMPLETED", timeout=DEADLINE)
    assert not (out / "train").exists()
    stuck.unlink()
    stuck.write_bytes(picture)
    cluster.run("scontrol", "requeue", f"{number}_1")
    cluster.wait(f"{number}_1", "COMPLETED", timeout=DEADLINE, restarts=1)
    assert contents(out / "train") == contents(tmp_path / "one/train")
    assert os.listdir(out) == ["train"]
    keys = [sample.key for sample in all_samples(ShardSet(out / "train"))]
    assert len(keys) == len(set(keys)) == 20
    logs = [(tmp_path / f"{element}.log").read_text() for element in range(3)]
    assert all(f"part {element}/3 on " in log and ", start 0" in log for element, log in enumerate(logs))
    assert ", start 1" in logs[1] and f"{out}/train: 20 samples of 2 classes in 7 shards" in logs[1]
    assert "parts still to come: " in logs[0] and "parts still to come: " in logs[2]
