"""Pictures about pictures: heat over a picture, and sheets of captioned pictures."""
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.program import printable


def heat(image: Image.Image, weights: np.ndarray, side: int) -> Image.Image:
    """The picture as a square, dark where the weights (n, n) in 0..1 are low and warm where they are high."""
    picture = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    smooth = Image.fromarray(weights.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    weight = np.asarray(smooth).clip(0, 1)[..., None]
    return Image.fromarray((picture * (0.4 + 0.6 * weight) + weight**2 * (60, 25, 0)).clip(0, 255).astype(np.uint8))


def sheet(title: tuple[str, str], subtitle: str, cells: Sequence[tuple[str, str, Image.Image]], columns: int = 5
          ) -> Image.Image:
    """A grid of square pictures of one size, each below its caption; texts come with their colour."""
    font, small = ImageFont.load_default(19), ImageFont.load_default(15)
    side, gap, top = cells[0][2].width, 14, 64
    rows = -(-len(cells) // columns)
    whole = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + 44) + top), "#fbfaf7")
    draw = ImageDraw.Draw(whole)
    draw.text((gap, 16), printable(title[0]), title[1], font)
    draw.text((gap, 40), textwrap.shorten(printable(subtitle), 90, placeholder="..."), "#66655f", small)
    for place, (caption, colour, picture) in enumerate(cells):
        x, y = gap + place % columns * (side + gap), top + place // columns * (side + 44)
        draw.text((x + side / 2, y + 16), printable(caption), colour, font, anchor="mm")
        whole.paste(picture, (x, y + 32))
    return whole
