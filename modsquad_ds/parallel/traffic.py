"""What collectives cost: a record of each while a benchmark runs, its bytes and its seconds. Used by bench/, never by training.

    with counted() as traffic:
        train_step(...)
    traffic.totals()["rows"].bytes, traffic.totals()["all_reduce"].calls, traffic.by_deepspeed().seconds

Functions of torch.distributed and of DeepSpeed's backend (through which deepspeed.comm goes) are replaced inside the block. A
call that reaches one through the other is recorded once, as the outer one. Not recorded: point-to-point and coalesced calls,
which nothing here makes with ZeRO up to stage 2.

Bytes are those that this rank sends to OTHER ranks, P being the ranks of the call's group and n the bytes of the tensor:

    rows, counts     exact: all parts but this rank's own (all-to-all of floats / of integers)
    all_reduce       2 n (P - 1) / P, as a ring or halving-doubling sends
    reduce_scatter   n (P - 1) / P, n of the input
    all_gather       n (P - 1), n of the input
    reduce           n, and 0 at the destination
    broadcast        n (P - 1) at the source, else 0
    barrier          0

Summed over ranks that is what any algorithm of least traffic moves; which rank sends it is the library's affair.

Seconds are from the call to its end, waiting for slower ranks included. With `timed` a GPU is synchronised before and after
each call, so nothing overlaps: such a step is slower than one that is not timed.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.comm import comm
from torch import Tensor

ARGUMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "all_reduce": ("all_reduce", ("input", "op", "group")),
    "reduce": ("reduce", ("input", "root", "op", "group")),
    "broadcast": ("broadcast", ("input", "root", "group")),
    "reduce_scatter": ("reduce_scatter", ("output", "input", "op", "group")),
    "reduce_scatter_tensor": ("reduce_scatter", ("output", "input", "op", "group")),
    "all_gather": ("all_gather", ("output", "input", "group")),
    "all_gather_into_tensor": ("all_gather", ("output", "input", "group")),
    "barrier": ("barrier", ("group",)),
    "all_to_all_single": ("rows", ("output", "input", "received", "sent", "group")),
}
"""Recorded function -> kind (an all-to-all of integers is `counts`) and its first arguments, in torch's and DeepSpeed's order."""
KEYWORDS = {
    "tensor": "input",
    "input_tensor": "input",
    "input_list": "input",
    "input_split_sizes": "sent",
    "src": "root",
    "dst": "root",
}
"""Names of keyword arguments -> those of ARGUMENTS, where they differ."""


class Call(NamedTuple):
    """One collective on this rank."""

    kind: str
    """rows, counts, all_reduce, reduce_scatter, all_gather, reduce, broadcast or barrier."""
    deepspeed: bool
    """Whether DeepSpeed called: its reduction of gradients and gathering of weights, and a few scalars."""
    ranks: int
    """Size of the process group."""
    elements: int
    """Of the tensor that this rank put in."""
    bytes: int
    """To other ranks; see the file's head."""
    seconds: float


class Total(NamedTuple):
    """Several calls together."""

    calls: int
    bytes: int
    seconds: float


class Traffic:
    """The calls of a `counted` block, in order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def totals(self) -> dict[str, Total]:
        """Kind -> its calls together; kinds that did not occur are absent."""
        kinds = dict.fromkeys(call.kind for call in self.calls)
        return {kind: total([call for call in self.calls if call.kind == kind]) for kind in kinds}

    def all_to_all(self) -> Total:
        """The dispatch of tokens: rows and counts, both ways."""
        return total([call for call in self.calls if call.kind in ("rows", "counts")])

    def by_deepspeed(self) -> Total:
        """DeepSpeed's calls: gradients reduced and weights gathered."""
        return total([call for call in self.calls if call.deepspeed])


def total(calls: Sequence[Call]) -> Total:
    """Sums over calls."""
    return Total(len(calls), sum(call.bytes for call in calls), sum(call.seconds for call in calls))


@contextmanager
def counted(timed: bool = True) -> Iterator[Traffic]:
    """Record every collective of this rank inside the block. The process group must exist."""
    traffic, inside = Traffic(), threading.local()  # a backward pass on GPUs calls from threads of its own
    backends = ((dist, False), *(((comm.cdb, True),) if comm.cdb is not None else ()))
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for owner, deepspeed in backends:
            for name in ARGUMENTS:
                original = getattr(owner, name)
                # A method of the backend is shadowed on the instance, so nothing there is to be put back but its absence.
                replaced.append((owner, name, None if deepspeed else original))
                setattr(owner, name, _recorder(original, name, deepspeed, traffic, inside, timed))
        yield traffic
    finally:
        for owner, name, original in replaced:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _recorder(
    original: Callable[..., Any], name: str, deepspeed: bool, traffic: Traffic, inside: threading.local, timed: bool
) -> Callable[..., Any]:
    kind, names = ARGUMENTS[name]

    def record(*args: Any, **kwargs: Any) -> Any:
        if getattr(inside, "call", False):
            return original(*args, **kwargs)
        inside.call = True
        try:
            seconds, result = _run(original, args, kwargs, timed)
        finally:
            inside.call = False
        by_name = dict(zip(names, args, strict=False)) | {KEYWORDS.get(key, key): value for key, value in kwargs.items()}
        traffic.calls.append(_call(kind, deepspeed, by_name, seconds))
        return result

    return record


def _run(original: Callable[..., Any], args: Any, kwargs: Any, timed: bool) -> tuple[float, Any]:
    _synchronise(timed)
    began = time.perf_counter()
    result = original(*args, **kwargs)
    if timed and result is not None:
        result.wait()  # an asynchronous call; its caller may wait once more
    _synchronise(timed)
    return time.perf_counter() - began, result


def _synchronise(timed: bool) -> None:
    if timed and torch.cuda.is_available():
        torch.cuda.synchronize()


def _call(kind: str, deepspeed: bool, arguments: dict[str, Any], seconds: float) -> Call:
    """The record of a call."""
    group = arguments.get("group")
    ranks, mine = dist.get_world_size(group), dist.get_rank(group)
    if kind == "barrier":
        return Call(kind, deepspeed, ranks, 0, 0, seconds)
    into = arguments["input"]
    tensors: list[Tensor] = list(into) if isinstance(into, list | tuple) else [into]
    elements = sum(tensor.numel() for tensor in tensors)
    size = elements * tensors[0].element_size()
    if kind == "rows":
        kind = "rows" if tensors[0].is_floating_point() else "counts"
        sent = size - _own_part(size, tensors[0].shape[0], arguments.get("sent"), ranks, mine)
    else:
        sent = _sent(kind, size, ranks, root=arguments.get("root") == dist.get_rank())
    return Call(kind, deepspeed, ranks, elements, sent, seconds)


def _own_part(size: int, rows: int, splits: Sequence[int] | None, ranks: int, mine: int) -> int:
    """Bytes of an all-to-all's input that stay on this rank."""
    if not splits:
        return size // ranks
    return size // rows * splits[mine] if rows else 0


def _sent(kind: str, size: int, ranks: int, root: bool) -> int:
    """Bytes to other ranks; see the file's head."""
    others = ranks - 1
    return {
        "all_reduce": 2 * size * others // ranks,
        "reduce_scatter": size * others // ranks,
        "all_gather": size * others,
        "reduce": 0 if root or not others else size,
        "broadcast": size * others if root else 0,
    }[kind]
