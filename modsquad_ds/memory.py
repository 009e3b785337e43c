"""Memory of one rank over a training step: a trace of activations, and what DeepSpeed's ZeRO does with weights and gradients.

Pure arithmetic on a trace (memory_trace.py) and the sizes of parameters. ZeRO 1 and 2 are followed as DeepSpeed 0.19.8 does them
(runtime/zero/stage_1_and_2.py): flat weights, an fp32 copy and two moments of the rank's part, gradients that go through buckets,
and one group of parameters after the other in the optimizer's step. Read by feasibility.py; bytes throughout.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from modsquad_ds.config import Recipe
from modsquad_ds.memory_trace import Trace
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.parallel.engine import in_bf16, zero_stage
from modsquad_ds.parallel.optimizer import parameter_groups

FP32 = 4
BYTES = {"fp32": 4, "float32": 4, "fp16": 2, "float16": 2, "bf16": 2, "bfp16": 2, "bfloat16": 2}
"""DeepSpeed's names of precisions -> bytes of a number."""
MOMENTS = 2 * FP32
LAMB_PLACES = 8
"""Per element of a rank's part: an int64 that says which matrix it belongs to (`parallel.lamb.Pieces`)."""
LAMB_SCRATCH = 3 * FP32
"""Per element while a group's update is worked out: the update, its denominator, and one result on the way."""


class Zero(NamedTuple):
    """What a DeepSpeed config says that decides on memory and traffic."""

    stage: int
    weight: int
    """Bytes of a weight, an activation and a gradient as autograd makes it: 2 in bf16, else 4."""
    message: int
    """Bytes of a gradient while it is summed over ranks."""
    compact: bool
    """Stage 2 in bf16 that keeps its part of the gradients in fp32 (`data_types.grad_accum_dtype`)."""
    bucket: int
    """Elements that are summed over ranks together."""
    overlap: bool
    """Sums run during the backward pass, through two buckets in turn."""


class Group(NamedTuple):
    """Parameters that the optimizer treats alike, which ZeRO lays end to end."""

    sizes: dict[str, int]
    """Name -> elements held by this rank."""
    ranks: int
    """Among which they are divided: the whole job, or the ranks that hold the same experts."""
    expert: bool

    @property
    def part(self) -> int:
        """Elements of one rank's part, padded as DeepSpeed does: to 4 bytes per rank."""
        return -(-sum(self.sizes.values()) // (2 * self.ranks)) * 2


class Held(NamedTuple):
    """Bytes at the moment when they are most."""

    weights: int
    gradients: int
    optimizer: int
    """With the moving average of weights (`train.ema`)."""
    buffers: int
    """Through which gradients are summed, and what the optimizer's step needs on the way."""
    activations: int
    """And all else that the forward and backward pass hold, buffers of all-to-alls included."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def zero_of(config: Mapping[str, Any]) -> Zero:
    """Read from a DeepSpeed config; defaults are DeepSpeed's."""
    section, bf16 = config.get("zero_optimization", {}), in_bf16(dict(config))
    weight, stage = 2 if bf16 else FP32, zero_stage(dict(config))
    message = config.get("communication_data_type")
    accumulate = config.get("data_types", {}).get("grad_accum_dtype")
    return Zero(
        stage=stage,
        weight=weight,
        message=weight if message is None else BYTES[message],
        compact=stage == 2 and weight < FP32 and accumulate is not None and BYTES[accumulate] == FP32,
        bucket=int(section.get("reduce_bucket_size", 5e8)),
        overlap=bool(section.get("overlap_comm", False)),
    )


def groups_of(network: MultiTaskNetwork, recipe: Recipe, world: int) -> list[Group]:
    """The optimizer's groups of a network that is spread already (`memory_trace.network_of`)."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = []
    for group in parameter_groups(network, recipe.train.optimizer):
        ranks = {world // _ep_size(parameter) for parameter in group["params"]}
        expert = any(_ep_size(parameter) > 1 for parameter in group["params"])
        found.append(Group({names[id(p)]: p.numel() for p in group["params"]}, ranks.pop(), expert))
        assert not ranks, "DeepSpeed keeps experts of different groups apart"
    return found


def _ep_size(parameter: Any) -> int:
    """From the name of the group by which a spread expert is marked."""
    return int(parameter.group_name.rpartition("_")[2]) if hasattr(parameter, "group_name") else 1


def step_memory(trace: Trace, groups: Sequence[Group], zero: Zero, recipe: Recipe, world: int) -> Held:
    """The most that one rank holds at once in an optimizer step, whose micro-batches are alike: the worst of the ranks."""
    step = _Step(groups, zero, recipe, world)
    for micro in range(min(2, recipe.train.accumulation)):
        last = micro == min(2, recipe.train.accumulation) - 1
        for event in trace.events:
            step.move("activations", event.bytes)
            if event.gradient is not None:
                step.gradient_arrives(event.gradient, last)
        step.backward_ends(last)
    step.update()
    return step.most


class _Step:
    """What is held now, by kind, and the most so far."""

    def __init__(self, groups: Sequence[Group], zero: Zero, recipe: Recipe, world: int) -> None:
        self.groups, self.zero = groups, zero
        self.sizes = {name: size for group in groups for name, size in group.sizes.items()}
        self.experts = {name for group in groups if group.expert for name in group.sizes}
        self.lamb = recipe.train.optimizer.type == "lamb"
        self.owned = _owned(groups, world)
        self.held = dict.fromkeys(Held._fields, 0)
        self.most = Held(0, 0, 0, 0, 0)
        self.whole: set[str] = set()
        """Parameters whose gradient is held as autograd made it."""
        self.waiting: list[str] = []
        """Those in the bucket."""
        self.own = 0
        """Bytes of this rank's part of the gradients."""
        self._states(recipe)

    def move(self, kind: str, size: int) -> None:
        """Take (or give back) bytes of a kind."""
        self.held[kind] += size
        if size > 0 and sum(self.held.values()) > self.most.total:
            self.most = Held(**self.held)

    def _states(self, recipe: Recipe) -> None:
        zero, every = self.zero, sum(self.sizes.values())
        if zero.stage == 0:
            self.move("weights", every * zero.weight)
            self.move("optimizer", every * MOMENTS)
        else:
            self.move("weights", sum(group.part * group.ranks for group in self.groups) * zero.weight)
            per_element = FP32 + MOMENTS + (LAMB_PLACES if self.lamb else 0)
            self.move("optimizer", sum(group.part for group in self.groups) * per_element)
        if recipe.train.ema:
            self.move("optimizer", every * FP32)

    def gradient_arrives(self, name: str, last: bool) -> None:
        """What DeepSpeed's hook does with a finished gradient. Parameters that do not learn have none."""
        zero = self.zero
        if zero.stage and not self.held["buffers"]:
            self.move("buffers", zero.bucket * zero.weight * (2 if zero.overlap else 1))
        if name not in self.whole:
            self.move("gradients", self.sizes[name] * zero.weight)
            self.whole.add(name)
        if zero.stage == 2 or (zero.stage == 1 and zero.overlap and last):
            self._into_bucket(name)

    def _into_bucket(self, name: str) -> None:
        size, zero = self.sizes[name], self.zero
        if sum(self.sizes[other] for other in self.waiting) + size > zero.bucket:
            self._sum_over_ranks()
        self.waiting.append(name)
        if size <= zero.bucket:
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        if name in self.whole:
            self.whole.remove(name)
            self.move("gradients", -self.sizes[name] * self.zero.weight)

    def _sum_over_ranks(self) -> None:
        """The bucket laid out anew for each group of ranks, in the precision of messages, then this rank's part copied away."""
        zero = self.zero
        for chosen in (self.experts, self.sizes.keys() - self.experts):
            elements = sum(self.sizes[name] for name in self.waiting if name in chosen)
            size = elements * (zero.weight + (zero.message if zero.message != zero.weight else 0))
            self.move("buffers", size)
            self.move("buffers", -size)
        if self.waiting and not self.own:
            parts = sum(group.part for group in self.groups) * FP32
            self.own = parts if zero.compact else self.owned * zero.weight
            self.move("gradients", self.own)
        for name in self.waiting:
            self._let_go(name)
        self.waiting = []

    def backward_ends(self, last: bool) -> None:
        """Stage 1 sums now, once per step; stage 2 what is left, and its buffers end."""
        if self.zero.stage == 1 and last and not self.zero.overlap:
            for name in self.sizes:
                if name in self.whole:
                    self._into_bucket(name)
        if self.zero.stage:
            self._sum_over_ranks()
            self.move("buffers", -self.held["buffers"])
        if self.zero.stage == 2 and not last and not self.zero.compact:
            self.own = 0  # the next micro-batch has a part of its own, which is then added to this one

    def update(self) -> None:
        """One group after the other: its part of the gradients in one piece, in fp32, and the optimizer's scratch memory."""
        zero = self.zero
        for group in self.groups:
            elements = group.part if zero.stage else sum(group.sizes.values())
            in_a_row = 0 if zero.stage == 0 or zero.compact else elements * zero.weight
            in_fp32 = elements * FP32 if zero.weight != FP32 and not zero.compact else 0
            self.move("buffers", in_a_row + in_fp32)
            if in_fp32:
                self.move("buffers", -in_a_row)
                in_a_row = 0
            if zero.stage and not zero.compact and group is self.groups[-1]:
                self.move("gradients", -self.own)  # one piece of memory for all groups, which ends with the last's copy
            scratch = elements * LAMB_SCRATCH if self.lamb else 0
            self.move("buffers", scratch)
            self.move("buffers", -scratch - in_a_row - in_fp32)


def _owned(groups: Sequence[Group], world: int) -> int:
    """Elements of the parameters of which a part belongs to a rank, whole: of the rank where they are most."""
    by_group = [list(_parameters_in_parts(group)) for group in groups]

    def of(rank: int) -> int:
        return sum(parts[rank * group.ranks // world] for group, parts in zip(groups, by_group, strict=True))

    return max(map(of, range(world)))


def _parameters_in_parts(group: Group) -> Iterator[int]:
    """Per part, the elements of all parameters that lie in it, if only with an end."""
    ends, total = [], 0
    for size in group.sizes.values():
        ends.append((total, total + size))
        total += size
    for first in range(0, group.part * group.ranks, max(1, group.part)):
        yield sum(end - start for start, end in ends if start < first + group.part and end > first)
