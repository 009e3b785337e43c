"""What memory a training step takes over time, and its FLOPs, from the recipe's own network run without any memory.

The real forward pass, the heads' real losses and the real backward pass run on tensors that have shapes but no contents (torch's
FakeTensorMode), and every storage that comes and goes is written down. So any head, any layout and activation checkpointing are
counted as they are, and a change of the code changes the count. Two things have no answer without contents, and a stand-in
gives one: how many rows an expert gets (all the same, times an imbalance where rows cross ranks) and how many elements a boolean
mask picks (all of them). Exchanges between ranks have their sizes but send nothing.

Not seen: what kernels allocate inside (cuDNN's workspaces), the allocator's gaps, NCCL. Read by memory.py and feasibility.py.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from modsquad_ds.config import ParallelSpec, Recipe
from modsquad_ds.data.types import Rows
from modsquad_ds.model.dispatch import Groups, LocalDispatcher, Plan, sort_by_expert
from modsquad_ds.model.network import MultiTaskNetwork, NetworkOutput
from modsquad_ds.model.products import as_on
from modsquad_ds.model.router import Routing
from modsquad_ds.parallel.capacity import AllToAllCapacityDispatcher
from modsquad_ds.parallel.dispatch import AllToAllDispatcher, Remote
from modsquad_ds.parallel.experts import spread_experts
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.tasks import SetTask, Size, TaskSpec, streams_of

BLOCK = {"cuda": 512, "cpu": 64}
"""Bytes in whose multiples memory is given out: torch's caching allocator on CUDA; the alignment on CPU."""
BOXES = 8
"""Boxes of an image of a detection task. What depends on their number is small beside what depends on anchors and cells."""

Images = Mapping[str, tuple[int, Size]]
"""Task -> images of a micro-batch on one rank, and their height and width in pixels."""


class Event(NamedTuple):
    """Memory that comes or goes, or a gradient that is complete."""

    bytes: int
    """Taken (or given back, negative) by anything but weights and finished gradients."""
    gradient: str | None = None
    """Name of the parameter whose gradient the autograd engine hands over now; its memory is not counted any more."""


class Trace(NamedTuple):
    """One micro-batch's forward and backward pass on one rank."""

    events: tuple[Event, ...]
    flops: int
    """Two per multiply-add of matrix products, convolutions and attention; recomputation included."""

    @property
    def operations(self) -> int:
        """Those that make a tensor: about as many kernels, each of which the host has to start."""
        return sum(event.bytes > 0 for event in self.events)

    @property
    def peak(self) -> int:
        """Most bytes at once, besides weights and gradients."""
        held = most = 0
        for event in self.events:
            held += event.bytes
            most = max(most, held)
        return most


def network_of(recipe: Recipe, parallel: ParallelSpec, world: int) -> MultiTaskNetwork:
    """The recipe's network as rank 0 holds it, on the meta device: experts spread, their parameters marked for DeepSpeed."""
    with torch.device("meta"):
        network = MultiTaskNetwork(recipe)
        spread_experts(network.backbone, parallel, Ranks(0, world))
    for layer in network.backbone.sparse_layers().values():
        for parameter in (*layer.experts.parameters(), *layer.router.parameters()):
            parameter.stacked = True  # type: ignore[attr-defined]
    return network


def trace_step(
    recipe: Recipe,
    parallel: ParallelSpec,
    world: int,
    images: Images,
    *,
    bf16: bool,
    device: str = "cuda",
    imbalance: float = 1.0,
) -> Trace:
    """Run a micro-batch without memory.

    Args:
        parallel: how experts are spread, in place of the recipe's.
        images: of one rank.
        bf16: precision of weights and activations; else fp32.
        device: whose way the experts' products go, `cpu` or `cuda`.
        imbalance: rows that arrive at this rank's experts from all ranks / the mean over ranks.
    """
    network = network_of(recipe, parallel, world)
    with FakeTensorMode(allow_non_fake_inputs=True), as_on(device):
        _without_memory(network, torch.bfloat16 if bf16 else torch.float32)
        _stand_in(network, imbalance)
        network.train()
        with _Ledger(BLOCK[device]) as ledger:
            for tensor in (*network.parameters(), *network.buffers()):
                ledger.leave_out(tensor)
            for name, parameter in network.named_parameters():
                parameter.register_post_accumulate_grad_hook(ledger.hand_over(name))
            _forward_backward(network, recipe, images)
    return Trace(tuple(ledger.events), ledger.flops)


def forward_flops(recipe: Recipe, sizes: Mapping[str, Sequence[Size]]) -> dict[str, list[tuple[int, int]]]:
    """FLOPs of one image's forward pass in training, of the backbone and of the task's head: task -> a pair for each size."""
    network = network_of(recipe, ParallelSpec(), 1)
    with FakeTensorMode(allow_non_fake_inputs=True), as_on("cuda"), torch.no_grad():
        _without_memory(network, torch.bfloat16)
        _stand_in(network, 1.0)
        network.train()
        return {task: [_forward_flops(network, recipe.active[task], task, size) for size in sizes[task]] for task in sizes}


def _forward_flops(network: MultiTaskNetwork, spec: TaskSpec, task: str, size: Size) -> tuple[int, int]:
    backbone, count = network.backbone, _images_that_norm_needs(spec)
    with _Ledger() as of_backbone:
        pack = backbone.embed({network.task_names.index(task): torch.empty(1, 3, *size, dtype=torch.bfloat16)})
    total = of_backbone.flops
    of_kind: dict[tuple[Any, ...], int] = {}
    for block in backbone.blocks:
        kind = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        if kind not in of_kind:
            with _Ledger() as of_block:
                block(*pack)
            of_kind[kind] = of_block.flops
        total += of_kind[kind]
    (segment,) = pack.segments
    map_BDHW = torch.empty(count, pack.tokens_SD.shape[1], segment.height, segment.width, dtype=torch.bfloat16)
    with _Ledger() as of_head:
        network.head(task)(map_BDHW)
    return total, of_head.flops // count


# ---------------------------------------------------------------- the run


def _forward_backward(network: MultiTaskNetwork, recipe: Recipe, images: Images) -> None:
    """As `train.forward_backward`, with sums in the place of the objective, which is a handful of numbers."""
    dtype = network.backbone.pos_embed.dtype
    streams = streams_of({task: recipe.active[task] for task in images})
    bytes_of = {stream: _pixels(*images[tasks[0]]) for stream, tasks in streams.items()}
    pixels = {stream: x.to(torch.float32).to(dtype) for stream, x in bytes_of.items()}
    sets = [(pixels.pop(stream), _rows(images, streams[stream])) for stream in streams if stream not in images]
    targets = {task: _targets(recipe.active[task], *images[task]) for task in images}
    output: NetworkOutput = network(pixels, sets)
    terms = {task: network.head(task).losses(output.outputs[task], targets[task]) for task in images}
    sums = [term.sum for of_task in terms.values() for term in of_task.values()]
    sums += [s.prob_TE.sum() + s.lse2_T.sum() for s in output.stats]
    torch.stack([x.float() for x in sums]).sum().backward()


def _pixels(count: int, size: Size) -> Tensor:
    return torch.empty(count, 3, *size, dtype=torch.uint8)


def _rows(images: Images, tasks: Sequence[str]) -> dict[str, Rows]:
    """Every task of a set reads all its images, the most that they can."""
    return {task: Rows(torch.arange(images[task][0]), images[task][0]) for task in tasks}


def _targets(spec: TaskSpec, count: int, size: Size) -> dict[str, Any]:
    """`SubBatch.targets` of a task."""
    if isinstance(spec, SetTask):
        return _set_targets(spec, count, size)
    if spec.kind == "detection":
        boxes, labels = torch.empty(BOXES, 4), torch.empty(BOXES, dtype=torch.int64)
        return {"boxes": [boxes] * count, "labels": [labels] * count, "ignore": [torch.empty(0, 4)] * count}
    if spec.kind == "segmentation":
        return {"labels": torch.empty(count, *size, dtype=torch.int64)}
    if spec.transform.mixup or spec.transform.cutmix:
        return {"probabilities": torch.empty(count, spec.num_classes)}
    return {"labels": torch.empty(count, dtype=torch.int64)}


def _set_targets(spec: SetTask, count: int, size: Size) -> dict[str, Any]:
    """The same of a task of an image set."""
    if spec.kind == "soft_classification":
        return {"probabilities": torch.empty(count, spec.num_classes), "valid": torch.empty(count, dtype=torch.bool)}
    if spec.kind in ("semantic", "segments"):
        return {"labels": torch.empty(count, *size, dtype=torch.int64)}
    channels = () if spec.kind == "binary" else (spec.num_classes,)
    return {"values": torch.empty(count, *channels, *size), "valid": torch.empty(count, *size, dtype=torch.bool)}


def _images_that_norm_needs(spec: TaskSpec) -> int:
    """Batch norm refuses to train on one image."""
    return 2 if getattr(spec.head, "norm", "group") != "group" else 1


def _without_memory(network: nn.Module, dtype: torch.dtype) -> None:
    """From the meta device to tensors of the mode around, in place: floats in `dtype`, as DeepSpeed casts them."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            kept = dtype if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, torch.empty(buffer.shape, dtype=kept))


def _flops_of_operation(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """Two per multiply-add. torch's table lacks grouped products and the CPU's fused attention.

    torch's own FlopCounterMode holds on to tensors by its hooks on modules, which would be taken for memory of the step.
    """
    aten, packet = torch.ops.aten, func.overloadpacket
    if packet is aten._grouped_mm:
        return 2 * math.prod(args[0].shape) * args[1].shape[-1]
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    return flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0


class _Ledger(TorchDispatchMode):
    """Writes down every storage that an operation makes, its end, and the operation's FLOPs."""

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.flops = 0
        self._block = block
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            result = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        else:
            result = func(*_masks_that_pick_all(func, args), **(kwargs or {}))
        self.flops += _flops_of_operation(func, args, kwargs or {}, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count a tensor that is there already."""
        self._sizes[tensor.untyped_storage()._cdata] = 0

    def hand_over(self, name: str) -> Any:
        """What autograd calls when a parameter's gradient is complete."""

        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            key = parameter.grad.untyped_storage()._cdata
            self.events.append(Event(-self._sizes.pop(key, 0), name))
            parameter.grad = None

        return hook

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // self._block) * self._block
        self._sizes[key] = size
        self.events.append(Event(size))
        weakref.finalize(storage, self._end, key).atexit = False

    def _end(self, key: int) -> None:
        size = self._sizes.pop(key, 0)
        if size:
            self.events.append(Event(-size))


def _masks_that_pick_all(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of an operation whose boolean masks are turned into as many indices as they have elements."""
    aten = torch.ops.aten
    if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default):
        return args
    indices: list[Any] = []
    for index in args[1]:
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            indices += [torch.empty(index.numel(), dtype=torch.int64, device=index.device) for _ in range(index.dim())]
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])


# ---------------------------------------------------------------- dispatch without contents


def _stand_in(network: MultiTaskNetwork, imbalance: float) -> None:
    """Replace every dispatcher that has to look at a routing, or to speak to other ranks."""
    for layer in network.backbone.sparse_layers().values():
        dropless = layer.dispatcher
        if isinstance(dropless, AllToAllDispatcher):
            layer.dispatcher = dropless = _EvenExchange(layer.experts.num_experts, dropless.ep_size, imbalance)
        else:
            layer.dispatcher = _Even(layer.experts.num_experts)
        capacity = layer.training_dispatcher
        if isinstance(capacity, AllToAllCapacityDispatcher) and isinstance(dropless, _EvenExchange):
            layer.training_dispatcher = _EvenCapacity(capacity.num_experts, float(capacity.factor), dropless)


def _parts(rows: int, parts: int) -> list[int]:
    """Rows in parts that differ by one at most."""
    return [rows * (i + 1) // parts - rows * i // parts for i in range(parts)]


class _Even(LocalDispatcher):
    """Every expert gets as many rows as any other."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def plan(self, routing: Routing) -> Plan:
        """See `Dispatcher`."""
        order_R, inverse_R = sort_by_expert(routing.expert_SK)
        return Plan(order_R, inverse_R, Groups(tuple(_parts(order_R.numel(), self.num_experts)), order_R, inverse_R))


class _EvenExchange(AllToAllDispatcher):
    """Every rank sends as many rows to each, and this one receives `imbalance` times as many as it sends."""

    def __init__(self, num_experts: int, ep_size: int, imbalance: float) -> None:
        super().__init__(num_experts, ep_size)
        self.imbalance = imbalance

    def plan(self, routing: Routing) -> Plan:
        """See `Dispatcher`."""
        order_R, inverse_R = sort_by_expert(routing.expert_SK)
        arriving = round(order_R.numel() * self.imbalance)
        expert_Q = torch.empty(arriving, dtype=torch.int64, device=order_R.device)
        groups = Groups(tuple(_parts(arriving, self.local)), *sort_by_expert(expert_Q))
        remote = Remote(_parts(order_R.numel(), self.ep_size), _parts(arriving, self.ep_size))
        return Plan(order_R, inverse_R, groups, remote)

    def _exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return _Exchanged.apply(x, sum(received))


class _EvenCapacity(AllToAllCapacityDispatcher):
    """Its exchanges keep their size."""

    def _exchange(self, x: Tensor) -> Tensor:
        return _Exchanged.apply(x, len(x))


class _Exchanged(torch.autograd.Function):
    """The buffers of an all-to-all of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> Tensor:
        """`[n, D]` -> `[rows, D]`."""
        ctx.rows = len(x)
        return x.contiguous().new_empty(rows, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Gradient rows on their way back."""
        return grads[0].contiguous().new_empty(ctx.rows, grads[0].shape[1]), None
