"""The toy world: paintings with a mood, and annotators who talk about them, as files in ArtEmis's layout.

    1. The world        emotions, moods, palettes, subjects
    2. Paintings        sky, light, hills or water, strokes, the subject
    3. Annotators       what each of them feels, and a sentence of grammar.txt that says so
    4. Files            the annotations as CSV, the pictures, lexicon.txt, and toy.json

A painting's mood is a point of valence, arousal and dominance. It decides palette, light, contrast, turbulence and
size; a subject decides what is there. Annotators feel an emotion whose prototype is near the mood, each with doubts of
their own. toy.json keeps what nobody knows of a real painting: the emotion that its mood makes the likeliest, and the
truth about what there is to see.
"""
import csv
import hashlib
import math
import os
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from support.program import UserError, progress, read_json, write_json

# 1. The world

TOY_VERSION = 1  # of the pictures and of what is said about them
SIDE = 96  # pixels
HERE = Path(__file__).parent
GRAMMAR, LEXICON = HERE / "grammar.txt", HERE / "lexicon.txt"
PROTOTYPES = {  # the nine emotions as (valence, arousal, dominance)
    "amusement": (.7, .3, .35), "awe": (.55, .45, -.5), "contentment": (.7, -.65, .15), "excitement": (.6, .85, .4),
    "anger": (-.65, .8, .5), "disgust": (-.75, .15, .05), "fear": (-.65, .65, -.7), "sadness": (-.6, -.55, -.5),
    "something else": (0, -.1, 0)}
EMOTIONS = tuple(PROTOTYPES)
FREQUENCY = np.array([12, 14, 17, 11, 9, 9, 11, 12, 5]) / 100
MOOD_SPREAD, DOUBT = .17, .4  # of paintings around a prototype, and of annotators around the mood
PALETTES = {  # hues of sky, ground and accent, how much colour there is, and the mood that it suits
    "golden": ((.11, .09, .04), 1, (.75, .05, .35)), "pink": ((.93, .85, .98), 1, (.7, -.3, -.1)),
    "blue": ((.58, .55, .13), 1, (.35, -.6, .1)), "green": ((.45, .32, .15), 1, (.5, -.4, .3)),
    "red": ((.01, .03, .12), 1, (-.45, .8, .4)), "orange": ((.07, .98, .14), 1, (.5, .75, .3)),
    "purple": ((.76, .70, .08), 1, (.2, .4, -.5)), "gray": ((.60, .58, .07), .2, (-.4, -.55, -.45)),
    "black": ((.68, .70, .02), .3, (-.65, .5, -.7)), "brown": ((.10, .22, .26), .6, (-.7, .15, 0))}
SHAPES = {  # polygons and ellipses (two corners), in units of the subject's size, upwards from its foot
    "sea": [], "flowers": [],
    "moon": [("light", ((-.5, 0), (.5, 1))), ("sky", ((-.2, .12), (.62, .94)))],
    "house": [("dark", ((-.5, 0), (-.5, .55), (.5, .55), (.5, 0))), ("accent", ((-.62, .55), (0, 1), (.62, .55))),
              ("light", ((-.3, .2), (-.3, .42), (-.1, .42), (-.1, .2))),
              ("light", ((.12, 0), (.12, .36), (.32, .36), (.32, 0)))],
    "figure": [("dark", ((-.2, 0), (-.05, .45), (-.15, .78), (.15, .78), (.05, .45), (.22, 0))),
               ("accent", ((-.15, .78), (-.24, .4), (-.18, .38), (-.07, .6), (.07, .6), (.2, .42), (.25, .45),
                           (.15, .78))),
               ("light", ((-.09, .8), (.09, 1.02))), ("dark", ((-.11, .94), (-.03, 1.07), (.1, 1.03), (.1, .95)))],
    "tree": [("dark", ((-.09, 0), (-.06, .6), (-.3, .8), (-.27, .83), (0, .66), (.2, .84), (.23, .8), (.06, .6),
                       (.1, 0))),
             ("accent", ((-.48, .6), (-.02, 1))), ("accent", ((0, .58), (.46, .98))),
             ("dark", ((-.24, .52), (.24, .82))),
             ("accent", ((-.28, .72), (.28, 1.22)))],
    "storm": [("dark", ((-1.1, .35), (-.1, .9))), ("dark", ((-.6, .5), (.5, 1.1))), ("dark", ((0, .3), (1.1, .9))),
              ("light", ((.05, .45), (-.18, -.05), (0, -.02), (-.14, -.6), (.22, .1), (.05, .08), (.2, .45)))],
    "ruin": [("dark", ((-.6, 0), (-.6, .8), (-.44, .8), (-.44, 0))),
             ("accent", ((-.2, 0), (-.2, 1), (-.04, 1), (-.04, 0))),
             ("dark", ((.2, 0), (.2, .45), (.28, .52), (.36, .4), (.36, 0))),
             ("accent", ((-.68, .8), (-.68, .92), (.02, 1.1), (.02, .98))),
             ("dark", ((.5, 0), (.5, .14), (.75, .1), (.75, 0)))],
    "mountain": [("dark", ((-1.1, 0), (-.35, .62), (-.1, .52), (.15, 1), (1.15, 0))),
                 ("light", ((-.05, .62), (.15, 1), (.42, .7), (.25, .66), (.15, .76), (.05, .62)))],
    "boat": [("dark", ((-.55, .18), (-.4, 0), (.4, 0), (.58, .2))), ("light", ((-.02, .24), (-.02, 1), (-.42, .28))),
             ("accent", ((.04, .24), (.04, .92), (.44, .3)))]}
RELATIVE_SIZE = {"mountain": 1.25, "moon": .7, "tree": 1.1, "figure": 1.1, "flowers": .6, "sea": .75}
ARTISTS = ("mira-holt", "jonas-quell", "ada-venn", "ilse-brandt", "tomas-rye", "clara-odum", "wim-sorel", "nina-faro")
STYLES = ("Impressionism", "Expressionism", "Romanticism", "Symbolism", "Fauvism")


# 2. Paintings. Lengths are shares of the picture's side, colours lie in 0..1 until they are drawn with.

def paint(mood: np.ndarray, subject: str, palette: str, rng: np.random.Generator, side: int = SIDE) -> Image.Image:
    """Sky, light, hills or water, wide strokes, the subject, fine strokes, vignette and grain."""
    valence, arousal, dominance = np.clip(mood, -1, 1)
    turbulence = (arousal + 1) / 2
    hues, richness, _ = PALETTES[palette]
    sky_hue, ground_hue, accent_hue = np.array(hues) + rng.normal(0, .012, 3)
    bright = .57 + .25 * valence + .08 * arousal * (valence < 0) - .16 * (palette == "black")
    rich = np.clip((.52 + .32 * arousal + .08 * valence) * richness, .06, .95)
    contrast = .75 + .25 * dominance
    high, low = colour(sky_hue, rich, bright - .16 * contrast), colour(sky_hue + .03, rich * .55, bright + .24)
    ground = colour(ground_hue, rich * .9, bright * .8)
    colours = {"dark": colour(ground_hue, rich + .1, bright * .36),
               "accent": colour(accent_hue, rich + .25, bright + .12),
               "light": colour(accent_hue, rich * .3, bright + .42), "sky": .6 * high + .4 * low}
    y, x = np.mgrid[:side, :side] / side
    horizon = .62 - .08 * dominance + rng.uniform(-.05, .05)
    light_x, light_y = rng.uniform(.2, .8), .42 - .28 * turbulence + rng.uniform(-.03, .03)
    canvas = high + (low - high) * np.clip(y / horizon, 0, 1)[..., None]
    canvas += (noise(rng, side, 5, .55 + .15 * turbulence) * (.08 + .3 * turbulence))[..., None] * (.5 + .5 * low)
    glow = np.exp(-((x - light_x) ** 2 + (y - light_y) ** 2) / (.08 + .05 * valence))
    canvas += (glow * (.22 + .1 * valence))[..., None] * colours["light"]
    if subject in ("sea", "boat"):
        waves = np.sin(70 * np.sqrt(np.clip(y - horizon, 0, 1)) + (2 + 7 * turbulence) * noise(rng, side, 4, .6))
        shine = np.exp(-((x - light_x) ** 2) / .01) * (waves > .2) * (.12 + .12 * valence)
        water = .55 * ground + .45 * low + (waves * (.05 + .12 * turbulence) + shine)[..., None]
        canvas = np.where((y > horizon)[..., None], water, canvas)
    else:
        for depth in range(2):
            ridge = horizon - .05 + .07 * depth + (.05 + .07 * turbulence) * noise(rng, side, 4 + depth, .5)[side // 2]
            hill = (ground * (.5 + .5 * depth) + low * (.5 - .5 * depth)) * (1.15 - .5 * (y - horizon))[..., None]
            hill *= 1 + .25 * noise(rng, side, 6, .8)[..., None]
            canvas = np.where((y > ridge)[..., None], hill, canvas)
    image = Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8))
    brush(image, rng, turbulence, length=.10, width=.030, count=260)
    draw_subject(image, subject, colours, horizon, dominance, (light_x, light_y), rng)
    brush(image, rng, turbulence, length=.035, width=.011, count=700)
    edge = 2 * ((x - .5) ** 2 + (y - .5) ** 2)
    pixels = np.asarray(image) / 255 * (1 - (.1 + .28 * (1 - dominance)) * edge)[..., None]
    return Image.fromarray(((pixels + rng.normal(0, .012, pixels.shape)).clip(0, 1) * 255).astype(np.uint8))


def colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV to RGB."""
    ramp = np.abs((np.array([0, 4, 2]) / 6 + hue) % 1 * 6 - 3) - 1
    return np.clip(value, 0, 1) * (1 + np.clip(saturation, 0, 1) * (np.clip(ramp, 0, 1) - 1))


def noise(rng: np.random.Generator, side: int, octaves: int, roughness: float) -> np.ndarray:
    """Fractal noise (side, side), about -1..1."""
    layers = [rng.uniform(-1, 1, (2**i + 1, 2**i + 1)).astype(np.float32) for i in range(1, octaves + 1)]
    weights = roughness ** np.arange(octaves)
    fields = [np.asarray(Image.fromarray(layer).resize((side, side), Image.Resampling.BICUBIC)) for layer in layers]
    return np.tensordot(weights / weights.sum(), fields, 1)


def brush(image: Image.Image, rng: np.random.Generator, turbulence: float, length: float, width: float,
          count: int) -> None:
    """Short strokes in the colours below them, along a field that arousal stirs up."""
    side, pixels, draw = image.width, np.asarray(image).astype(float), ImageDraw.Draw(image)
    angles = noise(rng, side, 3, .6) * math.pi * (.15 + 1.6 * turbulence)
    middle = rng.random((count, 2)) * side
    column, line = middle.astype(int).T
    half = np.stack([np.cos(angles[line, column]), np.sin(angles[line, column])], 1) * length * side / 2
    shades = pixels[line, column] + rng.normal(0, 9 + 9 * turbulence, (count, 1)) + rng.normal(0, 5, (count, 3))
    strokes = np.concatenate([middle - half, middle + half], 1).tolist()
    for stroke, shade in zip(strokes, shades.clip(0, 255).astype(int).tolist(), strict=True):
        draw.line(stroke, tuple(shade), max(1, round(width * side)))


def draw_subject(image: Image.Image, subject: str, colours: dict, horizon: float, dominance: float,
                 light: tuple[float, float], rng: np.random.Generator) -> None:
    """Drawn at twice the size and scaled down, so that edges are smooth. Dominance is size."""
    side = 2 * image.width
    large = image.resize((side, side))
    draw, rgb = ImageDraw.Draw(large), {name: tuple((c.clip(0, 1) * 255).astype(int)) for name, c in colours.items()}
    scale = (.44 + .16 * dominance + rng.uniform(-.02, .02)) * RELATIVE_SIZE.get(subject, 1)
    x, y, flip = rng.uniform(.3, .7), horizon + .12 + .1 * rng.random() + .1 * dominance, rng.choice([-1, 1])
    y = {"moon": .18 + scale, "storm": .18 + scale, "mountain": horizon + .04}.get(subject, y)
    if subject not in ("moon", "storm"):
        disc(draw, light[0] * side, light[1] * side, .05 * side, rgb["light"])
    for name, points in SHAPES[subject]:
        corners = [((x + flip * dx * scale) * side, (y - dy * scale) * side) for dx, dy in points]
        if len(corners) == 2:
            (x0, x1), (y0, y1) = map(sorted, zip(*corners, strict=True))
            draw.ellipse([x0, y0, x1, y1], rgb[name])
        else:
            draw.polygon(corners, rgb[name])
    for _ in range(int(30 + 200 * scale) if subject == "flowers" else 0):
        fx, fy = rng.uniform(.05, .95), rng.uniform(horizon + .08, .97)
        draw.line([fx * side, fy * side, fx * side, (fy + .06) * side], rgb["dark"], side // 96)
        disc(draw, fx * side, fy * side, scale * rng.uniform(.05, .14) * (.4 + fy) * side,
             rgb[rng.choice(["accent", "accent", "light"])])
    for _ in range(int(14 + 26 * scale) if subject == "sea" else 0):
        wy = rng.uniform(horizon + .04, .98)
        wx, reach = rng.uniform(0, 1), scale * rng.uniform(.5, 1.4) * (wy - horizon + .15)
        draw.arc([(wx - reach) * side, (wy - .35 * reach) * side, (wx + reach) * side, (wy + .35 * reach) * side],
                 190, 350, rgb["light"], side // 64)
    image.paste(large.resize(image.size, Image.Resampling.LANCZOS))


def disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, shade: tuple) -> None:
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], shade)


# 3. Annotators

TRUTH = ("subject", "colour", "size", "brightness")  # size is the subject's: high, low or middle


@dataclass
class Painting:
    """One painting and all that is said about it."""
    style: str
    name: str
    annotations: list[tuple[str, str]]  # emotion and explanation, one for each annotator
    likeliest: str  # the emotion that annotators of this mood feel most often
    truth: dict[str, str | float]  # what there is to see, by the names of TRUTH
    image: Image.Image


def painting(number: int) -> Painting:
    """The toy world's painting of this number, the same on every machine."""
    rng = np.random.default_rng([TOY_VERSION, number])
    prototype = PROTOTYPES[EMOTIONS[rng.choice(len(EMOTIONS), p=FREQUENCY)]]
    mood = np.clip(prototype + rng.normal(0, MOOD_SPREAD, 3), -1, 1)
    suits = np.array([np.exp(-((np.array(fitting) - mood) ** 2).sum() / .12) for _, _, fitting in PALETTES.values()])
    palette = list(PALETTES)[rng.choice(len(PALETTES), p=suits / suits.sum())]
    subject = list(SHAPES)[rng.integers(len(SHAPES))]
    size = "high" if mood[2] > .3 else "low" if mood[2] < -.3 else "middle"
    likely = feelings(mood)
    annotations = []
    for emotion in rng.choice(len(EMOTIONS), size=rng.integers(5, 8), p=likely):
        scene = dict(thing=subject, color=palette, size=size, emotion=EMOTIONS[emotion])
        text = tell("sentence", scene, rng)
        text = text[0].upper() + text[1:] if rng.random() < .5 else text
        annotations.append((EMOTIONS[emotion], text + "." * (rng.random() < .5)))
    name = f"{ARTISTS[rng.integers(len(ARTISTS))]}_{palette}-{subject}-{number:05}-{rng.integers(1860, 1940)}"
    style = STYLES[rng.integers(len(STYLES))]
    image = paint(mood, subject, palette, rng)
    brightness = round(float(np.asarray(image.convert("L")).mean()) / 255, 3)
    truth = dict(zip(TRUTH, (subject, palette, size, brightness), strict=True))
    return Painting(style, name, annotations, EMOTIONS[likely.argmax()], truth, image)


def feelings(mood: np.ndarray) -> np.ndarray:
    """How likely each of the nine emotions is in front of a painting of this mood."""
    near = np.exp(-((np.array(list(PROTOTYPES.values())) - mood) ** 2).sum(1) / (2 * DOUBT**2))
    return near / near.sum()


@cache
def grammar() -> dict[str, list[str]]:
    rules: dict[str, list[str]] = {}
    for line in GRAMMAR.read_text(encoding="utf-8").splitlines():
        if line and line[0] != "#":
            name, choices = line.split(": ", 1)
            rules.setdefault(name, []).extend(choices.split(" | "))
    return rules


def tell(rule: str, scene: dict[str, str], rng: np.random.Generator) -> str:
    """A random sentence of the grammar; {thing} becomes {thing.sea}, as `scene` says, {adj} the emotion's."""
    def choose(match: re.Match) -> str:
        name = match[1]
        full = next((key for key in (f"{name}.{scene.get(name, scene['emotion'])}", name) if key in grammar()), name)
        return tell(full, scene, rng)
    choices = grammar()[rule]
    return re.sub(r"\{(\w+)\}", choose, choices[rng.integers(len(choices))])


# 4. Files

ANNOTATIONS, ABOUT = "artemis_dataset_release_v0.csv", "toy.json"
FEWEST = 20  # paintings, for three splits


def paint_toy(folder: Path, count: int) -> None:
    """Have the toy world of `count` paintings in a folder: painted if it is not there, or there by other rules."""
    if count < FEWEST:
        raise UserError(f"--toy-paintings {count}: at least {FEWEST} are needed for three splits")
    key = toy_key(count)
    if stored_key(folder) == key:
        return
    print(f"Painting {count:,} pictures for the toy world in {folder}", flush=True)
    new_root = not folder.parent.exists()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        fill(temporary, count, key)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:  # Ctrl-C leaves nothing behind
        shutil.rmtree(temporary, ignore_errors=True)
        if new_root and not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def toy_key(count: int) -> str:
    """Changes with everything that decides the files: the rules here, the grammar, the lexicon, and what is kept."""
    texts = [path.read_text(encoding="utf-8") for path in (GRAMMAR, LEXICON)]
    return hashlib.sha256(repr([TOY_VERSION, TRUTH, SIDE, count, *texts]).encode()).hexdigest()


def stored_key(folder: Path) -> str | None:
    """The key of the toy world in a folder, None if nothing is there; somebody's own files are an error."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    about = read_json(folder / ABOUT) if (folder / ABOUT).is_file() else None
    if not isinstance(about, dict) or not {"version", "paintings"} <= about.keys():
        raise UserError(f"{folder} is no toy world and is not painted over; move it, or name another --data-root")
    return about.get("key", "")


def fill(folder: Path, count: int, key: str) -> None:
    for style in STYLES:
        (folder / "wikiart" / style).mkdir(parents=True)
    likeliest, truth = {}, {}
    method = "fork" if sys.platform == "linux" else "spawn"  # fork needs no second import
    pool = get_context(method).Pool(min(8, os.cpu_count() or 1), initializer=signal.signal,
                                    initargs=(signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is this process's to answer
    with pool, open(folder / ANNOTATIONS, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("art_style", "painting", "emotion", "utterance", "repetition"))
        for made in progress(pool.imap(painting, range(count), 32), "painting", count):
            made.image.save(folder / "wikiart" / made.style / f"{made.name}.jpg", quality=92)
            writer.writerows((made.style, made.name, emotion, text, len(made.annotations))
                             for emotion, text in made.annotations)
            likeliest[f"{made.style}/{made.name}"] = made.likeliest
            truth[f"{made.style}/{made.name}"] = made.truth
    shutil.copyfile(LEXICON, folder / "lexicon.txt")
    write_json(folder / ABOUT, {"version": TOY_VERSION, "paintings": count, "key": key, "likeliest": likeliest,
                                "truth": truth})
