"""Labels, boxes and masks drawn on pictures, and heat maps. Used by predict.py and report.py; writes no files.

Pictures come in as uint8 RGB tensors `[3, H, W]` and go out as PIL images; boxes and masks are in the tensor's pixels.
"""

import colorsys
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modsquad_ds.tasks import IGNORE_INDEX

Colour = tuple[int, int, int]

SMALLEST_SIDE = 240
"""Pictures whose long side is shorter, in pixels, are magnified."""
DRAWN_SCORE = 0.4
"""Predicted boxes that score less are not drawn: detectors report many guesses, which would cover the picture."""
MASK_COVER = 0.65
"""How much of a pixel's colour is its class's colour; the rest is the pixel's brightness."""

# Okabe and Ito's colours, which people with any of the common colour-vision deficiencies can tell apart, without black.
_BASE: tuple[Colour, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
)
BLACK, WHITE, GREY = (25, 25, 25), (255, 255, 255), (128, 128, 128)
RIGHT, WRONG = _BASE[0], _BASE[5]
"""Colours of right and wrong answers."""
IGNORED: Colour = (0, 0, 0)
"""Colour of pixels that belong to no class."""
GRID_WIDTH = 2000
"""Pixels that the panels side by side in a grid may take."""
NUMBERED_SIDE = 16
"""Up to this many rows and columns, the cells of a heat map also show their numbers."""
_GOLDEN = 0.6180339887498949
_LIGHTNESS = (0.35, 0.75, 0.5)
_MARGIN = 4


class Boxes(NamedTuple):
    """What is drawn on a picture of a detection task."""

    boxes: Tensor
    """`[n, 4]`, x1 y1 x2 y2."""
    labels: Tensor
    """`[n]`, 0-based classes."""
    scores: Tensor | None = None
    """`[n]`, falling; None for ground truth."""
    crowds: Tensor | None = None
    """`[m, 4]`: areas that count neither as object nor as background."""


class _Area(NamedTuple):
    """A rectangle on a drawn picture; right and bottom are not part of it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def pixels(self) -> tuple[int, int, int, int]:
        """As PIL's rectangles want it: right and bottom included."""
        return self.left, self.top, self.right - 1, self.bottom - 1

    def meets(self, other: "_Area") -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


class _Mark(NamedTuple):
    """A box to be drawn."""

    area: _Area
    text: str
    colour: Colour


# ---------------------------------------------------------------- colours and text


def colour_of(label: int) -> Colour:
    """The colour of a class: the same in every picture, all different at least for the first 256 classes."""
    if label < len(_BASE):
        return _BASE[label]
    # Neighbouring numbers get far hues; the lightness changes too, since it is what colour-blind eyes go by.
    extra = label - len(_BASE)
    red, green, blue = colorsys.hls_to_rgb(extra * _GOLDEN % 1, _LIGHTNESS[extra % len(_LIGHTNESS)], 0.65)
    return round(255 * red), round(255 * green), round(255 * blue)


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever reads better on `colour` (luma of ITU-R BT.601)."""
    red, green, blue = colour
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else WHITE


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, as matplotlib ships it, in pixels."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def text_size(side: int) -> int:
    """Size of the letters, in pixels, on a picture whose long side is `side`."""
    return max(13, side // 40)


def elided(text: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    """`text`, cut and ended with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


# ---------------------------------------------------------------- pictures


def enlargement(size: Sequence[int]) -> float:
    """The whole factor that brings a picture of (height, width) to at least `SMALLEST_SIDE`; 1 for larger ones."""
    return float(max(1, math.ceil(SMALLEST_SIDE / max(size))))


def fitting(size: Sequence[int], side: int) -> float:
    """The largest whole factor at which (height, width) fits a square of `side`, or the fraction that makes it fit."""
    longest = max(size)
    return float(side // longest) if longest <= side else side / longest


def picture(image_CHW: Tensor, scale: float = 1.0) -> Image.Image:
    """The pixels as a picture, magnified without smoothing or reduced with it."""
    image = Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())
    if scale == 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def with_boxes(image_CHW: Tensor, found: Boxes, names: Sequence[str], scale: float = 1.0) -> Image.Image:
    """The picture with a rectangle in its class's colour and a label for each box of `DRAWN_SCORE` or more."""
    drawn = picture(image_CHW, scale)
    pen = ImageDraw.Draw(drawn)
    side = max(drawn.size)
    line, face = max(2, side // 300), font(text_size(side))
    marks = [_Mark(_on_picture(box, scale, drawn.size), text, colour) for box, text, colour in _told(found, names)]
    for mark in reversed(marks):  # the best lies on top
        pen.rectangle(mark.area.pixels, outline=mark.colour, width=line)
    taken: list[_Area] = []
    for mark in marks:
        text = elided(mark.text, face, drawn.width - _MARGIN)
        taken.append(_place_label(text, face, mark.area, taken, drawn.size))
        pen.rectangle(taken[-1].pixels, fill=mark.colour)
        pen.text((taken[-1].left + _MARGIN // 2, taken[-1].top), text, font=face, fill=ink_on(mark.colour))
    return drawn


def _told(found: Boxes, names: Sequence[str]) -> Iterator[tuple[Tensor, str, Colour]]:
    """Box, label and colour of all that is drawn, the best first, crowds last."""
    scores = [None] * len(found.boxes) if found.scores is None else found.scores.tolist()
    for box, label, score in zip(found.boxes, found.labels.tolist(), scores, strict=True):
        if score is None or score >= DRAWN_SCORE:
            yield box, names[label] if score is None else f"{names[label]} {score:.2f}", colour_of(label)
    for box in () if found.crowds is None else found.crowds:
        yield box, "crowd", GREY


def with_mask(image_CHW: Tensor, mask_HW: Tensor, scale: float = 1.0) -> Image.Image:
    """The picture, turned grey so that only classes have colours, under its classes; a white line between regions.

    `mask_HW` is uint8, 255 = ignored.
    """
    below = picture(image_CHW, scale)
    mask = Image.fromarray(mask_HW.contiguous().numpy()).resize(below.size, Image.Resampling.NEAREST)
    labels_HW = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(below.height, below.width)
    palette = torch.tensor([colour_of(label) for label in range(IGNORE_INDEX)] + [IGNORED], dtype=torch.uint8)
    colours = Image.fromarray(palette[labels_HW.long()].numpy())
    drawn = Image.blend(below.convert("L").convert("RGB"), colours, MASK_COVER)
    edge_HW = torch.zeros_like(labels_HW)
    edge_HW[1:] |= labels_HW[1:] != labels_HW[:-1]
    edge_HW[:, 1:] |= labels_HW[:, 1:] != labels_HW[:, :-1]
    drawn.paste(WHITE, mask=Image.fromarray((255 * edge_HW).numpy()))
    return drawn


def _on_picture(box: Tensor, scale: float, size: tuple[int, int]) -> _Area:
    """Where a box lies in a drawn picture of (width, height): at least one pixel of it."""
    left, top, right, bottom = (round(side * scale) for side in box.tolist())
    left, top = min(max(left, 0), size[0] - 1), min(max(top, 0), size[1] - 1)
    return _Area(left, top, max(left + 1, min(right, size[0])), max(top + 1, min(bottom, size[1])))


def _place_label(
    text: str, face: ImageFont.FreeTypeFont, box: _Area, taken: Sequence[_Area], size: tuple[int, int]
) -> _Area:
    """Where a box's label goes: above it, below it or inside, the first that is in the picture and free."""
    width, height = math.ceil(face.getlength(text)) + _MARGIN, sum(face.getmetrics())
    places = []
    for top in (box.top - height, box.bottom, box.top, box.bottom - height):
        left = min(box.left, max(0, size[0] - width))
        places.append(_Area(left, top, left + width, top + height))
    inside = [place for place in places if place.top >= 0 and place.bottom <= size[1]]
    free = [place for place in inside if not any(place.meets(other) for other in taken)]
    return (free or inside or [_Area(0, 0, width, height)])[0]


# ---------------------------------------------------------------- around pictures


def captioned(image: Image.Image, text: str, least_width: int = SMALLEST_SIDE) -> Image.Image:
    """The picture with one line of text under it, on a sheet of at least `least_width` pixels."""
    width = max(image.width, least_width)
    face = font(text_size(max(image.size)))
    strip = Image.new("RGB", (width, sum(face.getmetrics()) + 2 * _MARGIN), WHITE)
    text = elided(text, face, width - 2 * _MARGIN)
    ImageDraw.Draw(strip).text((width / 2, _MARGIN), text, font=face, fill=BLACK, anchor="ma")
    return stacked([image, strip])


def legend(entries: Sequence[tuple[Colour, str]], width: int, size: int) -> Image.Image:
    """A row of coloured squares with their names, in letters of `size` pixels, wrapped at `width`."""
    face = font(size)
    row, gap, square = sum(face.getmetrics()) + _MARGIN, size, size
    places, x, y = [], _MARGIN, 0
    for _, text in entries:
        room = square + gap // 2 + math.ceil(face.getlength(elided(text, face, width - 2 * square - gap)))
        if x > _MARGIN and x + room > width:
            x, y = _MARGIN, y + row
        places.append((x, y))
        x += room + gap
    drawn = Image.new("RGB", (width, y + row), WHITE)
    pen = ImageDraw.Draw(drawn)
    for (colour, text), (x, y) in zip(entries, places, strict=True):
        top = y + (row - square) // 2
        pen.rectangle((x, top, x + square - 1, top + square - 1), fill=colour)
        text = elided(text, face, width - 2 * square - gap)
        pen.text((x + square + gap // 2, y + row / 2), text, font=face, fill=BLACK, anchor="lm")
    return drawn


def bars(rows: Sequence[tuple[str, float, Colour]], size: tuple[int, int]) -> Image.Image:
    """A chart of (width, height): per row a name, a bar as long as the value (0 to 1) and the value in per cent."""
    drawn = Image.new("RGB", size, WHITE)
    pen, face = ImageDraw.Draw(drawn), font(text_size(max(size)))
    height, letters = size[1] / len(rows), sum(face.getmetrics())
    for i, (name, value, colour) in enumerate(rows):
        top = i * height + max(0, (height - 2 * letters - _MARGIN) / 2)
        percent = f"{100 * value:.1f} %"
        room = size[0] - 3 * _MARGIN - face.getlength(percent)
        pen.text((_MARGIN, top), elided(name, face, int(room)), font=face, fill=BLACK)
        pen.text((size[0] - _MARGIN, top), percent, font=face, fill=BLACK, anchor="ra")
        bar = (_MARGIN, top + letters, size[0] - _MARGIN - 1, top + letters + letters / 2)
        pen.rectangle(bar, fill=(232, 232, 232))
        length = value * (bar[2] - bar[0])
        if length >= 1:
            pen.rectangle((bar[0], bar[1], bar[0] + length, bar[3]), fill=colour)
    return drawn


def stacked(images: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """The pictures from top to bottom on white, each in the middle."""
    width = max(image.width for image in images)
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    drawn, top = Image.new("RGB", (width, height), WHITE), 0
    for image in images:
        drawn.paste(image, ((width - image.width) // 2, top))
        top += image.height + gap
    return drawn


def beside(images: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """The pictures from left to right on white, aligned at their tops."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    drawn, left = Image.new("RGB", (width, max(image.height for image in images)), WHITE), 0
    for image in images:
        drawn.paste(image, (left, 0))
        left += image.width + gap
    return drawn


def heading(text: str, width: int, size: int, bold: bool = False) -> Image.Image:
    """One line of text in the middle of a strip of `width` pixels, in letters of `size` pixels."""
    face = font(size, bold)
    drawn = Image.new("RGB", (width, sum(face.getmetrics()) + 2 * _MARGIN), WHITE)
    place = (width / 2, drawn.height / 2)
    ImageDraw.Draw(drawn).text(place, elided(text, face, width), font=face, fill=BLACK, anchor="mm")
    return drawn


def grid(rows: Sequence[Sequence[Image.Image]], headings: Sequence[str], side: int) -> Image.Image:
    """Groups of panels, none wider than `side`, in as many columns as fit; above every column its panels' headings."""
    columns = min(len(rows), max(1, GRID_WIDTH // (len(headings) * side)))
    size = (side, max(panel.height for row in rows for panel in row))
    groups = [beside([_in_middle(panel, size) for panel in row], gap=6) for row in rows]
    blank = Image.new("RGB", groups[0].size, WHITE)
    lines = [beside([beside([heading(text, side, 14) for text in headings], gap=6)] * columns, gap=32)]
    for first in range(0, len(groups), columns):
        line = groups[first : first + columns]
        lines.append(beside(line + [blank] * (columns - len(line)), gap=32))
    return stacked(lines, gap=10)


def _in_middle(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    drawn = Image.new("RGB", size, WHITE)
    drawn.paste(image, ((size[0] - image.width) // 2, 0))
    return drawn


def framed(image: Image.Image, margin: int = 16) -> Image.Image:
    """The picture with a white margin on all sides."""
    drawn = Image.new("RGB", (image.width + 2 * margin, image.height + 2 * margin), WHITE)
    drawn.paste(image, (margin, margin))
    return drawn


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def heat_map(prob_TE: Tensor, tasks: Sequence[str], title: str) -> Figure:
    """P(expert | task) of one sparse layer: a row per task, a column per expert."""
    return heat_maps({"P(expert | task)": prob_TE}, tasks, title)


def heat_maps(tables_TE: Mapping[str, Tensor], tasks: Sequence[str], title: str) -> Figure:
    """Tables of one sparse layer, one below the other under the names of their values, each with a scale of its own."""
    rows, experts = next(iter(tables_TE.values())).shape
    size = (min(max(6.0, 2.5 + 0.62 * experts), 13.0), 0.5 + len(tables_TE) * (1.4 + 0.5 * rows))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    all_axes = figure.subplots(len(tables_TE), 1, squeeze=False)[:, 0]
    for axes, (label, table_TE) in zip(all_axes, tables_TE.items(), strict=True):
        most = max(float(table_TE.max()), 1e-6)
        image = axes.imshow(table_TE.float().numpy(), cmap="cividis", vmin=0, vmax=most, aspect="auto")
        axes.set_xticks(range(0, experts, 1 + experts // 33))
        axes.set_yticks(range(rows), tasks)
        axes.set_xlabel("expert")
        axes.set_ylabel("task")
        figure.colorbar(image, ax=axes, label=label)
        write_numbers(axes, table_TE, most)
    all_axes[0].set_title(title, fontsize=11)
    return figure


def write_numbers(axes: Axes, table: Tensor, most: float) -> None:
    """The numbers of a table into the cells of its picture, where they are few; `most` is the end of the colours' scale."""
    if max(table.shape) > NUMBERED_SIDE:
        return
    for (row, column), value in np.ndenumerate(table.float().numpy()):
        ink = "black" if value > 0.55 * most else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)


def figure_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file. Its own canvas: importers keep whatever backend they chose."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
