"""`bench loader --profile`: what an image of classification's plain pipeline costs, part by part, beside bare decoding.

Four walks over the same images take turns. The first decodes the files and does nothing else. The second decodes them too, but
transforms each image before it decodes the next, uncounted: what it takes longer is what the transform has pushed out of the
caches. The third makes the loader's batches by the loader's own functions in its order and reads the clock between them, so
every part is timed where it stands, with the caches as the part before left them; its batches are checked against the loader's,
bit for bit. The fourth is the loader itself, untouched: what the sum of the parts has to come to. Seconds are CPU time of this
process. Other work on the machine is not in them, but it makes caches smaller.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from modsquad_ds.bench.loader import Case, cases_of, decoder, measured_plan, one_thread, record_files, run_steps
from modsquad_ds.bench.measure import Row, spread, spread_fields, with_environment
from modsquad_ds.data.collate import Pixels, Ready, batch_memory, collate_classification, fill
from modsquad_ds.data.decode import Decoded, decode_sample
from modsquad_ds.data.loader import StepDataset, TaskStream
from modsquad_ds.data.loader_plan import LoaderPlan
from modsquad_ds.data.order import rank_slice
from modsquad_ds.data.transforms import TRANSFORMS, augmentation, contiguous, seeded
from modsquad_ds.data.types import SubBatch
from modsquad_ds.errors import UserError
from modsquad_ds.tasks import ClassificationTransform, Size

BARE, COLD = "bare decoding", "bare decoding, each after a transform"
READ, DECODED, DRAWN, COPIED = "read from the shard", "decoded", "crop drawn", "window copied"
RESIZED, FLIPPED, WRITTEN, SEEDED, OTHER = "resized", "flipped", "written into the batch", "seeded", "the rest"
STAGES = (READ, DECODED, DRAWN, COPIED, RESIZED, FLIPPED, WRITTEN, SEEDED, OTHER)
SUM, WHOLE = "sum of these", "whole, as the loader runs it"
PARTS = (BARE, COLD, *STAGES, SUM, WHOLE)
COLUMNS = {"part": "part", "microseconds": "CPU time an image, microseconds", "ratio": "x bare decoding"}
NOTE = (
    "Means over the images, then the median (and range) of rounds. From 'read' to 'the rest': the loader's functions in its "
    "order, with the clock read between them; the batches are the loader's, bit for bit. Decoded: bytes copied, JPEG decoded, "
    "EXIF and label read. Seeded: torch's generator set for the sample, and set back."
)
WARMUP = 1

Spent = dict[str, float]
"""Part -> seconds."""


class Clock:
    """CPU time of this process, split up."""

    def __init__(self) -> None:
        self.spent: Spent = dict.fromkeys(STAGES, 0.0)
        self._last = time.process_time()

    def tell(self, part: str) -> None:
        """What passed since the last call was this."""
        now = time.process_time()
        self.spent[part] += now - self._last
        self._last = now


def profile_loader(recipe: str | None, overrides: Sequence[str], images: int, repeat: int) -> list[Row]:
    """A row per part, of the recipe's first classification task: `images` images or more, `repeat` rounds.

    Without a recipe, photographs. UserError as in `measure_loader`, or where there is no such task.
    """
    with one_thread(), measured_plan(recipe, overrides) as plan:
        case = plain_case(plan, images)
        record_files(case)
        walks = _walks(case)
        rounds = [_round(walks, turn) for turn in range(WARMUP + repeat)][WARMUP:]
    sizes = {"case": case.name, "images": len(case.files)}
    return with_environment([sizes | row for row in rows_of(rounds, len(case.files))])


def plain_case(plan: LoaderPlan, images: int) -> Case:
    """The first classification task, without changes of colour and content."""
    for case in cases_of(plan, images):
        first, *others = case.plan.tasks.values()
        if not others and first.stream is None and isinstance(first.transform, ClassificationTransform):
            return case
    raise UserError("--profile: takes the loading of a classification task apart, and the recipe has none; name another recipe")


def _walks(case: Case) -> dict[str, Callable[[], Spent]]:
    """The walks over a case's images; each tells what its parts took."""
    encoded, bare = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in case.files], decoder(case.files)
    (name,) = case.plan.tasks
    stream, dataset = TaskStream(case.plan, name), StepDataset(case.plan)
    return {
        BARE: lambda: {BARE: _seconds(bare)},
        COLD: lambda: {COLD: _cold_decoding(stream, encoded)},
        SUM: lambda: _staged(stream, case),
        WHOLE: lambda: {WHOLE: _seconds(lambda: run_steps(dataset, case.steps))},
    }


def _round(walks: Mapping[str, Callable[[], Spent]], turn: int) -> Spent:
    """What all parts took in one round; another walk goes first in each."""
    names, shift = list(walks), turn % len(walks)
    spent: Spent = {}
    for name in names[shift:] + names[:shift]:
        spent |= walks[name]()
    return spent


def _seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def _cold_decoding(stream: TaskStream, encoded: Sequence[Tensor]) -> float:
    """Seconds of decoding alone, where every image is transformed before the next is decoded."""
    canvas, seconds = _canvas(stream), 0.0
    images = batch_memory(len(encoded), canvas)
    for data, image in zip(encoded, images, strict=True):
        began = time.process_time()
        decoded = decode_image(data, ImageReadMode.RGB)
        seconds += time.process_time() - began
        TRANSFORMS[stream.spec.kind].train(Decoded(decoded, 0), stream.spec.transform, stream.plan.pixels, canvas, image)
    return seconds


def _canvas(stream: TaskStream) -> Size:
    return TRANSFORMS[stream.spec.kind].canvas(stream.spec.transform, stream.plan.seed, stream.name, 0)


def _staged(stream: TaskStream, case: Case) -> Spent:
    spent: Spent = dict.fromkeys(STAGES, 0.0)
    for micro_step, expected in zip(case.steps, case.batches, strict=True):
        clock = Clock()
        found = staged_batch(stream, micro_step, clock)
        spent = {part: spent[part] + clock.spent[part] for part in STAGES}
        if not torch.equal(found.images_BCHW, expected.images_BCHW) or found.keys != expected.keys:
            raise AssertionError("loader_profile.staged_batch no longer does what the loader does")
    return spent | {SUM: sum(spent.values())}


def staged_batch(stream: TaskStream, micro_step: int, clock: Clock) -> SubBatch:
    """The batch of a task without changes of colour and content, as `TaskStream.batch` makes it; the clock is told every part."""
    plan, spec, canvas, transform = stream.plan, stream.spec, _canvas(stream), stream.spec.transform
    assert isinstance(transform, ClassificationTransform)
    everyone = stream.positions(*divmod(micro_step, plan.accumulation))
    positions = everyone[rank_slice(len(everyone), plan.rank, plan.world)]
    stream.announce(positions[0])
    images = batch_memory(len(positions), canvas)
    samples, keys = [], []
    for position, image in zip(positions, images, strict=True):
        place = stream.order.locate(position)
        clock.tell(OTHER)
        raw = stream.store.read(place.shard, place.sample)
        clock.tell(READ)
        decoded = decode_sample(raw, spec.kind, spec.num_classes)
        clock.tell(DECODED)
        with seeded(stream.sample_seed(place, position)):
            clock.tell(SEEDED)
            samples.append(staged_sample(decoded, transform, plan.pixels, canvas, image, clock))
        clock.tell(SEEDED)
        keys.append(raw.key)
    batch = collate_classification(samples, keys, plan.pixels, images)
    clock.tell(OTHER)
    return batch


def staged_sample(
    sample: Decoded, spec: ClassificationTransform, pixels: Pixels, canvas: Size, out: Tensor, clock: Clock
) -> Ready:
    """`classification_train` without changes of colour and content; the clock is told every part."""
    place = augmentation(spec, pixels).crop.make_params([sample.image])
    top, left, height, width = (place[name] for name in ("top", "left", "height", "width"))
    clock.tell(DRAWN)
    window = contiguous(sample.image[:, top : top + height, left : left + width])
    clock.tell(COPIED)
    image = F.resize(window, list(canvas), interpolation=InterpolationMode.BICUBIC, antialias=True)
    clock.tell(RESIZED)
    if torch.rand(()) < spec.flip:
        image = image.flip(-1)
    clock.tell(FLIPPED)
    image = fill(out, image)
    clock.tell(WRITTEN)
    return Ready(image, {"label": sample.label}, {})


def rows_of(rounds: Sequence[Spent], images: int) -> list[Row]:
    """A row per part: microseconds an image and how many times as long as bare decoding it took, medians over rounds."""
    return [
        {
            "part": part,
            **spread_fields("microseconds", spread([1e6 * spent[part] / images for spent in rounds])),
            **spread_fields("ratio", spread([spent[part] / spent[BARE] for spent in rounds])),
        }
        for part in PARTS
    ]
