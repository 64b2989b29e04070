"""The pictures of the demo: the reference that it draws, and the row in which it shows what it compared."""

from PIL import Image, ImageDraw, ImageFont, ImageOps


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


def compose(
    reference: Image.Image, stock: Image.Image, fused: Image.Image, difference: Image.Image, largest: int
) -> Image.Image:
    """The four pictures in a row, a caption over each; small ones are enlarged without smoothing."""
    factor = max(1, 256 // max(stock.size))
    width, height = size = (stock.width * factor, stock.height * factor)
    gain = 255 // largest if largest else 1
    amplified = f"difference, amplified {gain} times" if largest else "difference (none)"
    panels = {
        "reference": ImageOps.pad(reference, size, color="white"),
        f"stock ({stock.width}x{stock.height})": stock.resize(size, Image.Resampling.NEAREST),
        "accelerated": fused.resize(size, Image.Resampling.NEAREST),
        amplified: difference.point(lambda value: value * gain).resize(size, Image.Resampling.NEAREST),
    }
    gap, head = 12, 32
    sheet = Image.new("RGB", (gap + len(panels) * (width + gap), head + height + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (caption, panel) in enumerate(panels.items()):
        left = gap + i * (width + gap)
        pen.text((left, head // 2), caption, fill="black", font=ImageFont.load_default(14), anchor="lm")
        sheet.paste(panel, (left, head))
    return sheet
