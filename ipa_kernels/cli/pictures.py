"""Pictures: the demo's reference, the sheet that shows what was compared, and PNGs that are written whole or not at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from .output_files import written


def draw_reference() -> Image.Image:
    """The embedded reference picture: a lighthouse by the sea at sunset."""
    picture = ImageOps.colorize(Image.linear_gradient("L"), "#27306e", "#ffb36b")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((140, 100, 220, 180), fill="#fff0b0")
    pen.rectangle((0, 160, 256, 256), fill="#1d5a7a")
    for y in range(166, 256, 12):
        pen.line((180 - y // 4, y, 180 + y // 4, y), fill="#ffcf8a", width=2)
    pen.ellipse((-60, 190, 150, 330), fill="#2c2a35")
    pen.polygon([(48, 205), (56, 90), (84, 90), (92, 205)], fill="#f4ead8")
    pen.polygon([(51, 165), (53, 130), (87, 130), (89, 165)], fill="#c0392b")
    pen.rectangle((58, 70, 82, 90), fill="#ffe680")
    pen.polygon([(52, 70), (70, 50), (88, 70)], fill="#c0392b")
    return picture


class Panel(NamedTuple):
    """A picture, and one or more short lines over it."""

    caption: str
    picture: Image.Image


def largest_difference(stock: Image.Image, fused: Image.Image) -> int:
    """Of any channel of any pixel, of 255."""
    return max(ImageChops.difference(stock, fused).tobytes())


def compose(inputs: Sequence[Panel], stock: Panel, fused: Panel) -> Image.Image:
    """Inputs, stock, accelerated and their difference, a caption over each: in one row if four, else results in the last.

    Small pictures are enlarged without smoothing. The difference is grey, of each pixel the channel that differs most, so
    that none is lost in print. Lengths are in 256ths of a panel's width: captions look the same at any size.
    """
    factor = max(1, 256 // max(stock.picture.size))
    width, height = size = (stock.picture.width * factor, stock.picture.height * factor)
    results = [
        Panel(panel.caption, panel.picture.resize(size, Image.Resampling.NEAREST))
        for panel in (stock, fused, _difference(stock.picture, fused.picture))
    ]
    references = [Panel(panel.caption, ImageOps.pad(panel.picture, size, color="lightgrey")) for panel in inputs]
    rows = [references[i : i + 4] for i in range(0, len(references), 4)]
    rows = [references + results] if len(references) == 1 else [*rows, results]

    column = max(width, 256)
    unit = column / 256
    lines = max(panel.caption.count("\n") for row in rows for panel in row)
    gap, line, head = round(12 * unit), round(18 * unit), round(32 * unit) + round(18 * unit) * lines
    sheet = Image.new(
        "RGB", (gap + max(map(len, rows)) * (column + gap), gap + len(rows) * (head + height) + (len(rows) - 1) * gap), "white"
    )
    pen, font, edge = ImageDraw.Draw(sheet), ImageFont.load_default(14 * unit), max(1, round(unit / 2))
    for i, row in enumerate(rows):
        top = i * (head + height + gap) + head
        for j, panel in enumerate(row):
            left = gap + j * (column + gap)
            for k, text in enumerate(panel.caption.split("\n")):
                baseline = top - head + round(16 * unit) + k * line
                pen.text((left, baseline), _fitting(text, font, column), fill="black", font=font, anchor="lm")
            pen.rectangle((left - edge, top - edge, left + width + edge - 1, top + height + edge - 1), fill="grey")
            sheet.paste(panel.picture, (left, top))
    return sheet


def save(picture: Image.Image, path: Path, settings: str = "") -> None:
    """Write a PNG, whole or not at all; what it was made with goes into its text. Raises UserError where that fails."""
    text = PngInfo()
    if settings:
        text.add_itxt("ipa-kernels", settings)
    with written("--output", path) as part:
        picture.save(part, "PNG", pnginfo=text)


def _difference(stock: Image.Image, fused: Image.Image) -> Panel:
    largest = largest_difference(stock, fused)
    if not largest:
        return Panel("difference: none", Image.new("RGB", stock.size))
    red, green, blue = ImageChops.difference(stock, fused).split()
    most, gain = ImageChops.lighter(ImageChops.lighter(red, green), blue), 255 // largest
    return Panel(f"difference: {largest} of 255, shown x{gain}", most.point(lambda value: value * gain).convert("RGB"))


def _fitting(text: str, font: Any, width: int) -> str:
    """The text, or as much of it as is not wider."""
    if font.getlength(text) <= width:
        return text
    return next(short for end in range(len(text), -1, -1) if font.getlength(short := f"{text[:end]}...") <= width)
