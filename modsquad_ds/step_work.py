"""What a rank does in an optimizer step: FLOPs, tokens, rows and exchanges, means over a recipe's steps. For feasibility.py."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from modsquad_ds.config import Recipe
from modsquad_ds.memory import Zero
from modsquad_ds.memory_trace import Images, forward_flops
from modsquad_ds.model.network import MultiTaskNetwork
from modsquad_ds.model.sparse import SparseAttention, SparseLayer, SparseMLP
from modsquad_ds.plan import image_tokens, step_shares
from modsquad_ds.projection import Cluster, Exchange, Work
from modsquad_ds.tasks import streams_of
from modsquad_ds.topologies import Topology


@dataclass
class Job:
    """A recipe on a cluster."""

    recipe: Recipe
    cluster: Cluster
    network: MultiTaskNetwork
    """Whole, on the meta device."""
    images: Mapping[str, int]
    """Of each task in a rank's micro-batch."""
    flops_of_image: Mapping[str, tuple[float, float]]
    """Forward pass, mean over sizes: backbone, head."""

    @property
    def layers(self) -> list[SparseLayer]:
        """The sparse ones."""
        return list(self.network.backbone.sparse_layers().values())

    @property
    def passes(self) -> int:
        """Forward passes of a block in a step."""
        return 2 if self.recipe.model.activation_checkpointing else 1

    def shares(self) -> dict[str, float]:
        """Share of the steps that have the task."""
        return step_shares({task: self.recipe.active[task] for task in self.images}, self.recipe.train.sampling)

    def packs(self) -> list[Images]:
        """Images of the micro-batches that may need the most memory."""
        largest = {
            task: (count, max(self.recipe.active[task].transform.train_sizes, key=lambda size: size[0] * size[1]))
            for task, count in self.images.items()
        }
        if self.recipe.train.sampling == "packed":
            return [largest]
        streams = streams_of({task: self.recipe.active[task] for task in largest})
        return [{task: largest[task] for task in tasks} for tasks in streams.values()]

    def flops(self) -> float:
        """Of a rank in an optimizer step; the backward pass is twice the forward pass."""
        total = 0.0
        for task, share in self.shares().items():
            backbone, head = self.flops_of_image[task]
            total += share * self.images[task] * (backbone * (2 + self.passes) + 3 * head)
        return total * self.recipe.train.accumulation

    def tokens(self) -> float:
        """Of a rank's micro-batch, mean over steps."""
        patch = self.recipe.model.shape.patch
        return sum(s * self.images[task] * image_tokens(self.recipe.active[task], patch) for task, s in self.shares().items())

    def rows(self, layer: SparseLayer) -> float:
        """Rows that leave a rank in a pass, or without other ranks go to experts."""
        factor = self.recipe.parallel.capacity_factor
        return self.tokens() * layer.router.top_k * (1.0 if factor is None else factor)

    def work(self, topology: Topology, zero: Zero, operations: float) -> Work:
        """What a rank does in an optimizer step; `operations` are those of a micro-batch."""
        width, micro = self.recipe.model.shape.width, self.recipe.train.accumulation
        sizes = {SparseMLP: topology.ep, SparseAttention: topology.attention_ep}
        experts: dict[int, float] = {}
        exchanges = []
        row_bytes = expert_flops = 0.0
        for layer in self.layers:
            ep, rows = sizes[type(layer)], self.rows(layer)
            weights = sum(p.numel() for p in layer.experts.parameters() if p.dim() == 3) / layer.experts.num_experts
            row_bytes += rows * width * zero.weight * micro
            expert_flops += 2 * rows * weights * (2 + self.passes) * micro
            if ep > 1:
                experts[ep] = experts.get(ep, 0.0) + sum(p.numel() for p in layer.experts.parameters())
                exchanges.append(self._exchange(layer, ep, rows * zero.weight))
        total = sum(p.numel() for p in self.network.parameters())
        return Work(
            flops=self.flops(),
            operations=operations * micro,
            expert_share=expert_flops / self.flops(),
            width=width,
            bf16=zero.weight == 2,
            row_bytes=row_bytes,
            dense=total - sum(experts.values()),
            experts=tuple(experts.items()),
            exchanges=tuple(exchanges),
            reductions=micro if zero.stage == 2 else 1,
            message=zero.message,
            weight=zero.weight,
            bucket=zero.bucket,
            overlap=zero.overlap,
            zero=zero.stage,
        )

    def _exchange(self, layer: SparseLayer, ep: int, bytes_per_width: float) -> Exchange:
        """Rows out and back in the forward pass, as often as it runs, and once more each in the backward pass."""
        width, micro = self.recipe.model.shape.width, self.recipe.train.accumulation
        ways, mean_width = 2, float(width)
        if isinstance(layer, SparseAttention):
            ways, mean_width = 4, (width + layer.head_dim) / 2
        counts = self.passes * micro if self.recipe.parallel.capacity_factor is None else 0
        return Exchange(ep, bytes_per_width * mean_width, ways * (1 + self.passes) * micro, counts)


def flops_of_images(recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Forward pass of an image of each task, mean over its sizes: backbone and head. Turned canvases cost the same."""
    every = {task: [(min(s), max(s)) for s in spec.transform.train_sizes] for task, spec in recipe.adapted.items()}
    distinct = {task: list(dict.fromkeys(sizes)) for task, sizes in every.items()}
    means = {}
    for task, pairs in forward_flops(recipe, distinct).items():
        found = dict(zip(distinct[task], pairs, strict=True))
        backbone, head = zip(*(found[size] for size in every[task]), strict=True)
        means[task] = (statistics.mean(backbone), statistics.mean(head))
    return means
