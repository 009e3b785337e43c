"""slurm/train.sbatch on a real Slurm: over two nodes, stopped and requeued, on a node that dies, and with wrong requests."""

from pathlib import Path

import pytest

from jobs import STEPS, Jobs, records, weights

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_two_nodes_give_the_same_losses_and_weights_as_two_local_ranks(jobs: Jobs, alone: Path) -> None:
    """From data that were copied to a folder of each node."""
    number = jobs.train(env={"MODSQUAD_STAGE": "1"})
    job = jobs.cluster.wait(number, timeout=200)
    log = jobs.log(number)
    assert job["JobState"] == "COMPLETED", log
    assert "quickstart on 2 node(s) (node[1-2]), 2 rank(s)," in log
    assert f"step {STEPS}/{STEPS}" in log
    if jobs.cluster.mode == "netns":
        for node in ("node1", "node2"):
            assert f"{node}: {jobs.cluster.scratch} has 6 folders of shards, 6 of them new" in log
    assert records(jobs.run) == records(alone)
    assert weights(jobs.run) == weights(alone)
    assert sorted(path.name for path in jobs.folder.glob("job-*.ranks/start-0/rank-*")) == ["rank-0.log", "rank-1.log"]


def test_stopped_by_a_signal_and_by_preemption_gives_the_same_weights(jobs: Jobs, alone: Path) -> None:
    """First Slurm's warning before the time limit, then a job of a partition that goes first takes the nodes."""
    number = jobs.train(options=("--nodes=2", "--ntasks-per-node=1", "--partition=low"))
    jobs.wait_for_step(number, 3)
    jobs.cluster.signal(number, "USR1")
    jobs.cluster.wait(number, "RUNNING", restarts=1)
    done = len(records(jobs.run))
    assert 3 <= done < STEPS, jobs.log(number)
    jobs.wait_for_step(number, done + 3)
    first = jobs.cluster.submit("--nodes=3", "--exclusive", "--partition=main", "--output=/dev/null", "--wrap=sleep 1")
    jobs.cluster.wait(first, "COMPLETED")
    job = jobs.cluster.wait(number, restarts=2, timeout=200)
    log = jobs.log(number)
    assert job["JobState"] == "COMPLETED", log
    assert [line.rpartition(" ")[2] for line in log.splitlines() if "train.sbatch: quickstart on" in line] == ["0", "1", "2"]
    assert log.count("going on from") == 2 and log.count(": requeueing") == 1
    assert records(jobs.run) == records(alone)
    assert weights(jobs.run) == weights(alone)


def test_killed_node_is_replaced_and_the_run_goes_on(jobs: Jobs, alone: Path) -> None:
    number = jobs.train()
    jobs.wait_for_step(number, 5)
    jobs.cluster.kill_node("node2")
    job = jobs.cluster.wait(number, restarts=1, timeout=200)
    log = jobs.log(number)
    assert (job["JobState"], job["NodeList"]) == ("COMPLETED", "node[1,3]"), log
    assert "going on from" in log
    assert records(jobs.run) == records(alone)
    assert weights(jobs.run) == weights(alone)


def test_run_goes_on_with_one_node_fewer(jobs: Jobs, alone: Path) -> None:
    """The node of the first rank and of the batch shell dies, and no other is free: `--nodes=1-2` takes what there is."""
    jobs.cluster.drain("node3")
    number = jobs.train("parallel.ep_size=1", options=("--nodes=1-2",))
    jobs.wait_for_step(number, 5)
    jobs.cluster.kill_node("node1")
    job = jobs.cluster.wait(number, restarts=1, timeout=200)
    log = jobs.log(number)
    assert (job["JobState"], job["NodeList"]) == ("COMPLETED", "node2"), log
    assert "2 rank(s)" in log and "on 1 node(s) (node2), 1 rank(s)" in log and "going on from" in log
    found, expected = records(jobs.run), records(alone)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        (("quickstrat",), (), "error: recipe quickstrat: no such file"),
        (("quickstart", "train.stepps=5"), (), "error: recipe quickstart: train.stepps: unknown key; did you mean steps?"),
        (("quickstart", "parallel.ep_size=3"), (), "parallel.ep_size 3 does not divide the 8 experts"),
        (("quickstart", "parallel.expect_world_size=4"), (), "error: 2 rank(s) started, parallel.expect_world_size is 4"),
        (("quickstart",), ("--nodes=1",), "parallel.ep_size 2"),
        (("quickstart", "data_root=/nowhere"), (), "error: shard folder /nowhere/digits/train does not exist"),
        (("quickstart",), ("--gpus-per-node=1", "--ntasks-per-node=2"), "error: 2 task(s) per node but 1 GPU(s)"),
        ((), (), "error: which recipe?"),
    ],
)
def test_wrong_request_ends_with_the_reason_in_the_log(
    jobs: Jobs, arguments: tuple[str, ...], options: tuple[str, ...], reason: str
) -> None:
    recipe, settings = arguments[:1], arguments[1:]
    words = (*recipe, f"run={jobs.run}", f"data_root={jobs.data}", *settings) if recipe else ()
    number = jobs.submit(*words, options=("--nodes=2", "--ntasks-per-node=1", *options))
    job = jobs.cluster.wait(number, timeout=60)
    log = jobs.log(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), log
    assert sum(reason in line for line in log.splitlines()) == 1, log
    assert "Traceback" not in log and not any(jobs.run.rglob("*"))
