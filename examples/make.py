"""Make what lies in this folder: python examples/make.py runs/NAME

    *.png         six paintings of the toy world, larger than it trains on, named after their mood
    toy/          the run's model in half precision
    answers.jpg   what that model says about them
"""
import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))
from sample import Wish, answer, likely, mean_vad
from sevlm import load, load_pixels, save
from support.pages import colours
from support.program import run_program
from toy.painter import PROTOTYPES, paint

HERE = Path(__file__).parent
SCENES = [("contentment", "boat", "blue", 8), ("fear", "figure", "black", 3), ("excitement", "flowers", "orange", 5),
          ("awe", "moon", "purple", 4), ("sadness", "ruin", "gray", 6), ("amusement", "house", "golden", 7)]


def paint_examples() -> None:
    for emotion, subject, palette, seed in SCENES:
        picture = paint(np.array(PROTOTYPES[emotion]), subject, palette, np.random.default_rng(seed), side=384)
        picture.save(HERE / f"{emotion}-{subject}.png")


def draw_answers(records: list[dict], side: int = 300, gap: int = 26) -> Image.Image:
    """Two rows of three cards: painting, sentence, bars, VAD."""
    font, bold, small = (ImageFont.load_default(size) for size in (17, 20, 13))
    height = side + 196
    sheet = Image.new("RGB", (3 * side + 4 * gap, 2 * height + 3 * gap), "#fbfaf7")
    draw = ImageDraw.Draw(sheet)
    for place, record in enumerate(records):
        colour = colours(record["probabilities"])
        x, y = gap + place % 3 * (side + gap), gap + place // 3 * (height + gap)
        draw.rounded_rectangle((x - 1, y - 1, x + side, y + height), 10, "#ffffff", "#e3e0d8")
        sheet.paste(Image.open(HERE / record["image"]).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        draw.text((x + 14, y + side + 10), record["emotion"], colour[record["emotion"]], bold)
        reason = textwrap.fill("because " + record["explanation"], 31)
        draw.multiline_text((x + 14, y + side + 38), reason, "#24241f", font, spacing=4)
        for line, (emotion, share) in enumerate(likely(record["probabilities"], 3)):
            top = y + side + 112 + 20 * line
            draw.text((x + 14, top), emotion, "#6b6b66", small)
            draw.rounded_rectangle((x + 120, top + 5, x + 120 + 2 + 120 * share, top + 12), 3, colour[emotion])
            draw.text((x + side - 14, top), f"{share:.0%}", "#6b6b66", small, anchor="ra")
        vad = "   ".join(f"{name} {value:+.2f}" for name, value in mean_vad(record).items())
        draw.text((x + 14, y + height - 20), vad, "#6b6b66", ImageFont.load_default(11))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run")
    model = load(parser.parse_args().run)
    paint_examples()
    model.about = {key: model.about[key] for key in ("data", "settings", "changes") if key in model.about}
    save(model, HERE / "toy", torch.float16)
    model = load(HERE / "toy")
    names = [f"{emotion}-{subject}.png" for emotion, subject, *_ in SCENES]
    pixels = torch.stack([load_pixels(HERE / name, model.config) for name in names])
    records = [found.record for found in answer(model, pixels, names, Wish())]
    draw_answers(records).save(HERE / "answers.jpg", quality=90)


if __name__ == "__main__":
    run_program(main)
