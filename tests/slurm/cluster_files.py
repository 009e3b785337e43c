"""What a test cluster's daemons read: slurm.conf, gres.conf, munge.key, and the names that its nodes know. For cluster.py."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

NET = "10.77.0"
CONF = """
ClusterName=modsquad
SlurmctldHost={name}({head})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout={patience}
KillWait=20
CompleteWait=0
JobRequeue=1
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES DefaultTime=20 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL DefaultTime=20 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
"""


def write_files(folder: Path, nodes: Sequence[str], gpus: int, cpus: int, patience: int, own_addresses: bool) -> None:
    """Write all of them; with `own_addresses` every node is a host of its own, else all are ports of this one."""
    for name in ("run", "state", "log", "scratch", *(f"{kind}/{node}" for kind in ("spool", "disks") for node in nodes)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    name = "login" if own_addresses else socket.gethostname().partition(".")[0]
    head = f"{NET}.1" if own_addresses else "127.0.0.1"
    ports = [6817, *(6818 for _ in nodes)] if own_addresses else _free_ports(1 + len(nodes))
    addresses = [f"{NET}.{10 + i}" if own_addresses else f"127.0.1.{i}" for i in range(1, len(nodes) + 1)]
    hosts = {"localhost": "127.0.0.1", name: head, **dict(zip(nodes, addresses, strict=True))}
    (folder / "hosts").write_text("".join(f"{address} {host}\n" for host, address in hosts.items()))
    # Without a resolver each look-up of a name would wait for it.
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    lines = CONF.format(folder=folder, name=name, head=head, port=ports[0], patience=patience).splitlines()
    for node, address, port in zip(nodes, addresses, ports[1:], strict=True):
        host = node if own_addresses else name
        what = f"CPUs={cpus} RealMemory=4000" + (f" Gres=gpu:{gpus}" if gpus else "")
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={port} {what} State=UNKNOWN")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    _write_gpus(folder, nodes, gpus)


def _write_gpus(folder: Path, nodes: Sequence[str], gpus: int) -> None:
    """Slurm counts GPUs by their device files; these are as good as /dev/null."""
    devices = [folder / f"gpu{number}" for number in range(gpus)]
    for device in devices:
        try:
            os.mknod(device, 0o20666, os.makedev(1, 3))
        except PermissionError:  # in some containers; a plain file is enough for Slurm's count
            device.touch()
    lines = [f"NodeName={node} Name=gpu File={device}\n" for node in nodes for device in devices]
    (folder / "gres.conf").write_text("".join(lines))


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
