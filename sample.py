"""The picture in front of you: which emotions it is likely to evoke, and why, in a sentence.

    python sample.py image.jpg                      in the terminal
    python sample.py pictures/ --html gallery.html  a page of all pictures of a folder
    python sample.py --serve                        a local page to drop pictures on

    1. Pictures     files, folders and patterns
    2. Model        the checkpoint that is meant, and what it was trained on
    3. Answers      for a batch of pictures: emotions, sentences, words, and where the model looked
    4. Terminal     bars and gauges as text
    5. Heatmap      the words of a sentence, each over the picture, as a PNG
    6. Page         the same answers as HTML; train.py draws its report with it
    7. Server       a page that answers, on this machine only

The most probable emotion is fixed first and then explained, so that label and sentence agree.
"""
import argparse
import base64
import glob
import io
import json
import os
import shutil
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data import BadPicture, load_pixels, normalise, open_picture
from sevlm import (
    CLIP_HUB,
    EMOTIONS,
    SEVLM,
    Sight,
    attention,
    beam_search,
    emotion_log_probs,
    find_file,
    load,
    reread,
    write,
)
from vad import HERE, UserError, progress, read_lexicon, replacing, run_program, write_text

COLOURS = {"amusement": "#c98a12", "awe": "#4f7fd0", "contentment": "#3a9a6b", "excitement": "#dd6b2f",
           "anger": "#cc4444", "disgust": "#7f8c2c", "fear": "#8462b8", "sadness": "#4a86a8",
           "something else": "#85857f"}
SCALES = ("valence", "arousal", "dominance")
BUNDLED = HERE / "examples" / "toy"
BATCH = 32  # pictures at once


# 1. Pictures

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def find_pictures(arguments: Sequence[str]) -> list[Path]:
    """The files that names, folders and patterns stand for, each once, in order."""
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        else:
            inside = [path] if path.exists() else sorted(map(Path, glob.glob(argument, recursive=True)))
        if not inside:
            raise UserError(f"no pictures in {argument}" if path.is_dir() else f"no such file: {argument}")
        found += inside
    return list(dict.fromkeys(found))


# 2. Model

def find_checkpoint() -> Path:
    """The newest run, or else the toy model that comes with the code."""
    runs = sorted(Path("runs").glob("**/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs and not BUNDLED.is_dir():
        raise UserError("there is no model yet: train one with python train.py, or name one with --checkpoint")
    return runs[-1].parent if runs else BUNDLED


def load_model(source: str | Path, clip: str = CLIP_HUB, lexicon: str | None = None) -> SEVLM:
    """A run or model folder, the authors' folder, or a hub id of either kind."""
    folder = Path(source)
    theirs = folder.is_dir() and (folder.name.startswith("nle_model_") or any(folder.rglob("nle_model_*")))
    if not folder.exists() and str(source).count("/") == 1 and not str(source).startswith((".", "/")):
        try:
            folder = find_file(source, ["model.safetensors"], "--checkpoint").parent
            for name in ("config.json", "tokenizer.json"):
                find_file(source, [name], "--checkpoint")
        except UserError:
            theirs = True
    if theirs:
        return SEVLM.from_official(source, clip, read_lexicon(lexicon) if lexicon else None).eval()
    return load(folder)


def introduce(model: SEVLM, source: str | Path) -> str:
    """One line: which model speaks, and what it was trained on."""
    about = model.about.get("data", "data unknown")
    if about == "toy":
        about = "toy paintings and made-up annotators: it knows nothing else"
    return f"{source}, trained on {about}"


def choose_device(name: str) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind, usable in there.items() if usable]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise UserError(f"--device {name}: this machine has {' and '.join(available)}")
    return torch.device(name)


# 3. Answers

@dataclass
class Wish:
    """What is asked of each picture."""
    samples: int = 1
    best_of: int = 0
    beams: int = 0
    top_p: float = 0.9
    temperature: float = 1.0
    seed: int = 0
    emotion: str | None = None  # to be explained, instead of the most probable one
    all_emotions: bool = False
    looks: bool = False  # also where the model looked

    @property
    def sentences(self) -> int:
        return max(self.samples, self.best_of, self.beams)


@dataclass
class Answer:
    record: dict  # what --json prints
    looks: np.ndarray | None = None  # (words, side, side) attention over the patches


@torch.no_grad()
def answer(model: SEVLM, pixels: Tensor, names: Sequence[str], wish: Wish) -> list[Answer]:
    """Answers for uint8 pixels (B, 3, S, S)."""
    started, device = time.perf_counter(), model.device
    with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
        sight = model.look(normalise(pixels.to(device), model.config))
        probabilities = emotion_log_probs(model, sight).double().softmax(1).cpu()  # (B, 9)
        likeliest = probabilities.argmax(1).tolist()
        emotions = [EMOTIONS if wish.all_emotions else (wish.emotion or EMOTIONS[best],) for best in likeliest]
        ids, log_probs, match = explain(model, sight, emotions, pixels, wish)  # (B, M, E, ...)
        chosen = []  # of each picture: which emotion, which of its sentences
        for picture, best in enumerate(likeliest):
            place = best if wish.all_emotions else 0
            chosen.append((place, int(match[picture, place].argmax()) if wish.best_of else 0))
        best_ids = torch.stack([ids[picture, m, e] for picture, (m, e) in enumerate(chosen)])  # (B, L)
        looks = attention(model, sight, best_ids.to(device)).float().cpu().numpy() if wish.looks else None
    seconds, answers = (time.perf_counter() - started) / len(pixels), []
    for picture, name in enumerate(names):
        told = [[{"emotion": emotion, "explanation": model.text.reason(ids[picture, m, e].tolist()),
                  "log_probability": log_probs[picture, m, e].item(),
                  "match": None if match is None else match[picture, m, e].item()} for e in range(wish.sentences)]
                for m, emotion in enumerate(emotions[picture])]
        m, e = chosen[picture]
        words = model.text.words(best_ids[picture].tolist())
        record = {"image": name, "emotion": told[m][e]["emotion"], "probabilities": probabilities[picture].tolist(),
                  "explanation": told[m][e]["explanation"], "explanations": [one for each in told for one in each],
                  "words": vad_of(model, best_ids[picture], words), "seconds": seconds}
        answers.append(Answer(record, looked(looks[picture], words) if wish.looks else None))
    return answers


def explain(model: SEVLM, sight: Sight, emotions: Sequence[Sequence[str]], pixels: Tensor, wish: Wish
            ) -> tuple[Tensor, Tensor, Tensor | None]:
    """E sentences for each of M emotions of each picture: ids (B, M, E, L), their log-probabilities and matches."""
    B, M, E = len(sight), len(emotions[0]), wish.sentences
    if M > 1:
        sight = sight[torch.arange(B, device=model.device).repeat_interleave(M)]
    openings = [model.text.opening(emotion) for each in emotions for emotion in each]
    if wish.beams:
        written = beam_search(model, sight, openings, wish.beams)
    else:  # a picture's seed comes from its pixels, so that its neighbours change nothing
        own = [zlib.crc32(picture.numpy().tobytes(), wish.seed) for picture in pixels]
        seeds = [seed + EMOTIONS.index(emotion) for seed, each in zip(own, emotions, strict=True) for emotion in each]
        written = write(model, sight, openings, E, wish.top_p, wish.temperature, seeds)
    match = reread(model, sight, written.ids).match if model.config.contrastive_head else None
    return (written.ids.view(B, M, E, -1).cpu(), written.log_probs.view(B, M, E).cpu(),
            None if match is None else match.view(B, M, E).cpu())


def vad_of(model: SEVLM, ids: Tensor, words: list[tuple[str, list[int]]]) -> list[dict]:
    """Each word with its VAD, that of its last token's word so far."""
    rows = model.word_vad(ids[None].to(model.device))[0].tolist() if model.config.uses_vad else [0] * len(ids)
    return [{"word": word, "vad": model.word_vad.values[rows[places[-1]]].tolist() if rows[places[-1]] else None}
            for word, places in words]


def looked(looks: np.ndarray, words: list[tuple[str, list[int]]]) -> np.ndarray:
    """From each token's attention (L, K) to each word's (words, side, side), stretched to 0..1."""
    side = int(looks.shape[1] ** 0.5)
    each = np.array([looks[places].mean(0) for _, places in words]).reshape(-1, side * side)
    each -= each.min(1, keepdims=True)
    return (each / each.max(1, keepdims=True).clip(min=1e-9)).reshape(-1, side, side)


def answers_for(model: SEVLM, files: Sequence[Path], wish: Wish) -> Iterator[Answer]:
    """An answer for each file, in order; a broken picture's is an error."""
    batches = [files[start:start + BATCH] for start in range(0, len(files), BATCH)]
    for batch in progress(batches, f"pictures, x{BATCH}"):
        loaded = {}
        for file in batch:
            try:
                loaded[file] = load_pixels(file, model.config)
            except BadPicture as problem:
                loaded[file] = str(problem)
        good = [file for file in batch if not isinstance(loaded[file], str)]
        found = answer(model, torch.stack([loaded[file] for file in good]), list(map(str, good)), wish) if good else []
        by_file = dict(zip(good, found, strict=True))
        for file in batch:
            yield by_file.get(file) or Answer({"image": str(file), "error": loaded[file]})


def mean_vad(record: dict) -> list[float] | None:
    """The mean VAD of the sentence's words that the lexicon knows."""
    known = [word["vad"] for word in record["words"] if word["vad"]]
    return np.mean(known, 0).tolist() if known else None


def likely(probabilities: Sequence[float], most: int) -> list[tuple[str, float]]:
    """The most probable emotions, at least one, none below 3%."""
    order = sorted(zip(EMOTIONS, probabilities, strict=True), key=lambda pair: -pair[1])[:most]
    return [pair for place, pair in enumerate(order) if place == 0 or pair[1] >= 0.03]


# 4. Terminal

class Paper:
    """Text for a terminal, coloured and as wide as it is, or plain."""

    def __init__(self, stream):
        self.colour = stream.isatty() and "NO_COLOR" not in os.environ
        self.fine = "utf" in (stream.encoding or "").lower()  # or only ASCII
        self.width = min(shutil.get_terminal_size((80, 24)).columns, 100)

    def paint(self, text: str, colour: str, bold: bool = False) -> str:
        red, green, blue = bytes.fromhex(colour[1:])
        return f"\x1b[{'1;' if bold else ''}38;2;{red};{green};{blue}m{text}\x1b[0m" if self.colour else text

    def bar(self, share: float, width: int) -> str:
        eighths = round(share * width * 8)
        return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip() if self.fine else "#" * round(share * width)

    def gauge(self, name: str, value: float) -> str:
        """A scale from -1 to 1 with a mark."""
        line, mark = ("─", "●") if self.fine else ("-", "o")
        place = round((value + 1) * 4)
        return f"{name:9} {line * place}{mark}{line * (8 - place)} {value:+.2f}"

    def card(self, record: dict) -> str:
        if "error" in record:
            return f"\n{record['image']}\n  {self.paint('cannot be read: ' + record['error'], '#cc4444')}"
        lines = ["", record["image"]]
        for emotion, share in likely(record["probabilities"], 5):
            bar = self.paint(self.bar(share, max(self.width - 30, 8)), COLOURS[emotion])
            lines.append(f"  {emotion:15}{share:5.0%}  {bar}")
        lines.append("")
        for told in record["explanations"]:
            chosen = told["emotion"] == record["emotion"] and told["explanation"] == record["explanation"]
            sentence = textwrap.wrap(f"{told['emotion']} because {told['explanation']}", self.width - 4)
            end = len(told["emotion"])
            sentence[0] = self.paint(sentence[0][:end], COLOURS[told["emotion"]], bold=chosen) + sentence[0][end:]
            lines += ["  " + line for line in sentence]
        if vad := mean_vad(record):
            gauges = [self.gauge(name, value) for name, value in zip(SCALES, vad, strict=True)]
            line = "   ".join(gauges)
            lines += ["", *("  " + text for text in ([line] if len(line) + 4 <= self.width else gauges))]
        return "\n".join(lines)


# 5. Heatmap

def heat(image: Image.Image, look: np.ndarray, side: int) -> Image.Image:
    """The picture, dark where the model did not look and warm where it did."""
    picture = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    smooth = Image.fromarray(look.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    weight = np.asarray(smooth).clip(0, 1)[..., None]
    return Image.fromarray((picture * (0.4 + 0.6 * weight) + weight**2 * (60, 25, 0)).clip(0, 255).astype(np.uint8))


def valence_colour(vad: Sequence[float] | None) -> str:
    """From red through grey to green."""
    if vad is None:
        return "#8a8a86"
    strength, end = abs(vad[0]), (64, 160, 100) if vad[0] > 0 else (206, 74, 66)
    return "#" + bytes(round(138 + strength * (channel - 138)) for channel in end).hex()


def heatmap(found: Answer, image: Image.Image, columns: int = 5, side: int = 180) -> Image.Image:
    """A grid: the whole picture first, then a cell for each word."""
    record, font, small = found.record, ImageFont.load_default(19), ImageFont.load_default(15)
    rows, cell = -(-(1 + len(record["words"])) // columns), side + 44
    sheet = Image.new("RGB", (columns * (side + 14) + 14, rows * cell + 64), "#fbfaf7")
    draw = ImageDraw.Draw(sheet)
    draw.text((14, 16), record["emotion"], COLOURS[record["emotion"]], font)
    draw.text((14, 40), textwrap.shorten(record["image"], 90, placeholder="..."), "#6b6b66", small)
    cells = [("", "#000000", image.resize((side, side), Image.Resampling.BICUBIC))]
    cells += [(word["word"], valence_colour(word["vad"]), heat(image, look, side))
              for word, look in zip(record["words"], found.looks, strict=True)]
    for place, (word, colour, picture) in enumerate(cells):
        x, y = 14 + place % columns * (side + 14), 64 + place // columns * cell
        draw.text((x + side / 2, y + 16), word, colour, font, anchor="mm")
        sheet.paste(picture, (x, y + 32))
    return sheet


def save_heatmap(found: Answer, folder: Path) -> Path:
    """Named after the picture's whole path, so that two pictures of one name do not meet."""
    image = found.record["image"]
    name = "_".join(part for part in Path(image).parts if part.strip("./\\"))
    with replacing(folder / f"{name}.png") as path:
        heatmap(found, open_picture(image, 360)).save(path, "PNG")
    return folder / f"{name}.png"


# 6. Page

def data_uri(image: Image.Image, side: int) -> str:
    """The picture inside the page."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def bars(probabilities: Sequence[float], most: int = 4) -> str:
    """The likely emotions as bars."""
    lines = [f'<li><span>{emotion}</span><i style="width:{100 * share:.1f}%;background:{COLOURS[emotion]}"></i>'
             f'<b>{share:.0%}</b>' for emotion, share in likely(probabilities, most)]
    return f'<ul class="bars">{"".join(lines)}</ul>'


def gauges(vad: list[float] | None) -> str:
    lines = [f'<span class="gauge">{name}<i><b style="left:{50 + 50 * value:.0f}%"></b></i>{value:+.2f}</span>'
             for name, value in zip(SCALES, vad or [], strict=False)]
    return f'<p class="gauges">{"".join(lines)}</p>' if lines else ""


def because(told: dict) -> str:
    """An emotion and its explanation."""
    emotion = told["emotion"]
    return f'<b style="color:{COLOURS[emotion]}">{emotion}</b> because {escape(told["explanation"])}'


def spoken(found: Answer) -> str:
    """The sentence; each word knows its valence and, packed as bytes, where the model looked."""
    words = []
    for place, word in enumerate(found.record["words"]):
        look = ""
        if found.looks is not None:
            packed = base64.b64encode((found.looks[place] * 255).round().astype(np.uint8).tobytes()).decode()
            look = f' tabindex="0" data-look="{packed}"'
        tone = valence_colour(word["vad"])
        words.append(f'<span class="word" style="--tone:{tone}"{look}>{escape(word["word"])}</span>')
    emotion = found.record["emotion"]
    return f'<p class="said"><b style="color:{COLOURS[emotion]}">{emotion}</b> because {" ".join(words)}</p>'


def card(found: Answer, image: Image.Image | None) -> str:
    """A picture with its answer."""
    record = found.record
    title = f'<h2>{escape(Path(record["image"]).name)}</h2>'
    if "error" in record:
        problem = escape(record["error"])
        return f'<article class="card broken"><div>{title}<p>cannot be read: {problem}</p></div></article>'
    chosen = because(record)
    others = "".join(f"<li>{line}" for line in map(because, record["explanations"]) if line != chosen)
    return (f'<article class="card"><div class="picture"><img src="{data_uri(image, 480)}" alt="">'
            f'<canvas aria-hidden="true"></canvas></div><div>{title}{spoken(found)}{bars(record["probabilities"])}'
            f'{gauges(mean_vad(record))}<ul class="others">{others}</ul></div></article>')


def gallery(found: Sequence[Answer], about: str) -> str:
    """All pictures on one page."""
    cards = []
    for one in progress(found, "drawing the page"):
        broken = "error" in one.record
        cards.append(card(one, None if broken else open_picture(one.record["image"], 480)))
    hint = "Point at a word to see where the model looked." if any(one.looks is not None for one in found) else ""
    title = "What these pictures evoke"
    head = f'<h1>{title}</h1><p class="about">{escape(about)}. {hint}</p>'
    return page(title, f'{head}<main class="gallery">{"".join(cards)}</main>', script=LOOK_SCRIPT)


def page(title: str, body: str, style: str = "", script: str = "", connect: str = "'none'") -> str:
    """A whole page that loads nothing from elsewhere."""
    policy = ("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
              f"connect-src {connect}")
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}{style}</style></head>'
            f'<body>{body}<script>{script}</script></body></html>\n')


STYLE = """
:root { color-scheme: light dark; }
:root { --ground: #fbfaf7; --ink: #24241f; --soft: #6b6b66; --line: #e3e0d8; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #17181a; --ink: #e9e7e1; --soft: #9d9b94; --line: #33343a; --card: #202226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 1180px; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; font-weight: 650; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
.about { color: var(--soft); margin: 0 0 1.6rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 1.3rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { overflow: hidden; margin: 0 0 1.3rem; }
.gallery .card { margin: 0; } .card > div:last-child { padding: .9rem 1.1rem 1.1rem; }
.card h2, .card h3 { margin: 0; font-size: .82rem; font-weight: 500; color: var(--soft); overflow-wrap: anywhere; }
.picture { position: relative; line-height: 0; } .picture img, .picture canvas { width: 100%; }
.picture canvas { position: absolute; inset: 0; height: 100%; opacity: 0; transition: opacity .15s; }
.picture canvas { pointer-events: none; } .picture canvas.on { opacity: 1; }
.said { font-size: 1.12rem; margin: .45rem 0 .8rem; }
.word { border-bottom: 2px solid var(--tone); border-radius: 2px; }
.word[data-look]:hover, .word[data-look]:focus { background: var(--tone); color: #fff; outline: none; cursor: default; }
.bars, .others { list-style: none; margin: 0; padding: 0; } .others { margin-top: .8rem; font-size: .92rem; }
.bars li { display: grid; grid-template-columns: 8.2em 1fr 3em; gap: .6em; align-items: center; font-size: .88rem; }
.bars i { height: .62em; border-radius: 1em; min-width: 2px; }
.bars b { font-weight: 500; text-align: right; color: var(--soft); }
.gauges { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .8rem 0 0; font-size: .8rem; color: var(--soft); }
.gauge { display: inline-flex; align-items: center; gap: .45em; }
.gauge i { position: relative; width: 4.2em; height: 3px; border-radius: 2px; background: var(--line); }
.gauge i b { position: absolute; top: -3.5px; width: 10px; height: 10px; margin-left: -5px; border-radius: 50%; }
.gauge i b { background: var(--soft); }
.broken p { color: #cc4444; }
"""

LOOK_SCRIPT = """
function show(event) {
  const word = event.target.closest && event.target.closest('.word[data-look]');
  if (!word) return;
  const canvas = word.closest('.card').querySelector('canvas');
  const look = Uint8Array.from(atob(word.dataset.look), c => c.charCodeAt(0)), side = Math.sqrt(look.length);
  canvas.width = canvas.height = side;
  const brush = canvas.getContext('2d'), shade = brush.createImageData(side, side);
  look.forEach((value, i) => { shade.data[4 * i + 3] = 190 - 0.74 * value; });
  brush.putImageData(shade, 0, 0);
  canvas.classList.add('on');
}
function hide(event) {
  const word = event.target.closest && event.target.closest('.word[data-look]');
  if (word) word.closest('.card').querySelector('canvas').classList.remove('on');
}
for (const kind of ['mouseover', 'focusin']) document.addEventListener(kind, show);
for (const kind of ['mouseout', 'focusout']) document.addEventListener(kind, hide);
"""


# 7. Server

LARGEST_UPLOAD, PATIENCE = 20_000_000, 20.0  # bytes, and seconds for a request to arrive


def server(model: SEVLM, wish: Wish, about: str, port: int) -> ThreadingHTTPServer:
    """Answers on this machine only. The model takes one picture at a time; the others wait."""
    one_at_a_time = threading.Lock()

    def card_for(upload: bytes, asked: dict[str, str]) -> str:
        image = open_picture(io.BytesIO(upload), max(480, model.config.image_size))
        pixels = load_pixels(io.BytesIO(upload), model.config)
        own = Wish(top_p=wish.top_p, temperature=wish.temperature, looks=True, seed=int(asked.get("seed", 0)),
                   emotion=asked.get("emotion") or None)
        with one_at_a_time:
            [found] = answer(model, pixels[None], [asked.get("name", "your picture")], own)
        return card(found, image)

    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE  # for each piece of a request
        server_version, sys_version = "SEVLM", ""

        def reply(self, status: int, text: str, kind: str = "text/plain") -> None:
            content = text.encode()
            self.send_response(status)
            for name, value in (("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(content))),
                                ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"),
                                ("Connection", "close")):
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self) -> None:
            if not self.is_local():
                self.reply(403, "ask for this page as localhost")
            elif urlsplit(self.path).path == "/":
                self.reply(200, serving_page(about), "text/html")
            else:
                self.reply(404, "there is only /")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            address = urlsplit(self.path)
            asked, length = dict(parse_qsl(address.query)), self.headers.get("Content-Length")
            if not self.is_local():
                self.reply(403, "pictures may be sent by this page alone")
            elif address.path != "/answer":
                self.reply(404, "pictures go to /answer")
            elif length is None or not length.isascii() or not length.isdigit():
                self.reply(411, "Content-Length is missing")
            elif int(length) > LARGEST_UPLOAD:
                self.reply(413, f"a picture may have {LARGEST_UPLOAD // 10**6} MB")
            elif asked.get("emotion", EMOTIONS[0]) not in EMOTIONS or not asked.get("seed", "0").isascii() \
                    or not asked.get("seed", "0").isdigit() or len(asked.get("seed", "0")) > 9:
                self.reply(400, "emotion is one of the nine, seed a number")
            else:
                self.answer_upload(int(length), asked)

        def answer_upload(self, length: int, asked: dict[str, str]) -> None:
            try:
                self.reply(200, card_for(self.receive(length), asked), "text/html")
            except TimeoutError:
                self.reply(408, "the picture took too long to arrive")
            except BadPicture as problem:
                self.reply(415, f"not a picture that can be read: {problem}")

        def receive(self, length: int) -> bytes:
            """All of the body, within the time for it."""
            deadline, parts = time.monotonic() + PATIENCE, []
            while length and (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                part = self.rfile.read1(min(length, 1 << 16))
                if not part:
                    raise BadPicture("the connection ended early")
                parts.append(part)
                length -= len(part)
            if length:
                raise TimeoutError
            return b"".join(parts)

        def is_local(self) -> bool:
            """Not from another site's page, nor by a name that somebody else has pointed at this machine."""
            host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
            return host.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]") and origin in (None, f"http://{host}")

        def not_allowed(self) -> None:
            self.reply(405, "GET / or POST /answer")

        do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = not_allowed

        def log_message(self, *_) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"port {port} cannot be used ({error.strerror}); name another with --serve PORT") from None


def serve(model: SEVLM, wish: Wish, about: str, port: int) -> None:
    with server(model, wish, about, port) as running:
        running.daemon_threads = True
        try:
            print(f"http://127.0.0.1:{running.server_port}/ answers; Ctrl-C ends it", flush=True)
            running.serve_forever()
        except KeyboardInterrupt:
            print()


def serving_page(about: str) -> str:
    choices = "".join(f"<option>{emotion}</option>" for emotion in EMOTIONS)
    body = f"""<h1>What does this picture evoke?</h1>
<p class="about">{escape(about)}. Your picture stays on this machine.</p>
<form><label class="drop"><input type="file" accept="image/*">
<span><b>Choose a picture</b> or drop one here</span></label>
<div class="ask" hidden><label>Emotion <select><option value="">the most likely</option>{choices}</select></label>
<button type="button">Another sentence</button></div></form>
<p role="status" aria-live="polite"></p><section aria-live="polite"></section>"""
    return page("What does this picture evoke?", body, SERVING_STYLE, LOOK_SCRIPT + SERVING_SCRIPT, "'self'")


SERVING_STYLE = """
body { max-width: 640px; }
.drop { display: block; padding: 2.2rem 1rem; text-align: center; cursor: pointer; }
.drop { border: 2px dashed var(--line); border-radius: 12px; }
.drop.over, .drop:hover { border-color: var(--soft); }
.drop:focus-within { outline: 3px solid #4f7fd0; outline-offset: 2px; }
.drop input { position: absolute; width: 1px; height: 1px; opacity: 0; }
.ask { display: flex; flex-wrap: wrap; gap: .8rem 1.2rem; align-items: center; margin: 1rem 0; }
.ask[hidden] { display: none; }
button, select { font: inherit; padding: .4rem .8rem; border-radius: 8px; border: 1px solid var(--line); }
button, select { background: var(--card); color: inherit; }
[role=status] { min-height: 1.6em; color: var(--soft); margin: .8rem 0; }
"""

SERVING_SCRIPT = """
const find = name => document.querySelector(name), state = find('[role=status]'), drop = find('.drop');
let picture = null, seed = 0, asked = 0;
async function ask() {
  const mine = ++asked, wish = new URLSearchParams({ seed, name: picture.name });
  if (find('select').value) wish.set('emotion', find('select').value);
  state.textContent = 'Looking ...';
  try {
    const reply = await fetch('/answer?' + wish, { method: 'POST', body: picture }), text = await reply.text();
    if (mine !== asked) return;
    state.textContent = reply.ok ? '' : text;
    if (reply.ok) { find('section').innerHTML = text; find('.ask').hidden = false; }
  } catch (problem) { if (mine === asked) state.textContent = 'The program does not answer; is it still running?'; }
}
function take(files) { if (files.length) { picture = files[0]; seed = 0; find('select').value = ''; ask(); } }
find('input').addEventListener('change', event => take(event.target.files));
find('select').addEventListener('change', () => { seed = 0; ask(); });
find('button').addEventListener('click', () => { seed += 1; ask(); });
for (const kind of ['dragover', 'dragleave', 'drop']) document.addEventListener(kind, event => {
  event.preventDefault();
  drop.classList.toggle('over', kind === 'dragover');
  if (kind === 'drop') take(event.dataTransfer.files);
});
"""


# main

def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Say what a picture evokes, and why.")
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="pictures, folders, patterns")
    parser.add_argument("--checkpoint", metavar="RUN", help="a run, a model folder, the authors' folder or a hub id "
                        "(default: the newest run under runs/, else examples/toy)")
    parser.add_argument("--clip", default=CLIP_HUB, metavar="SOURCE",
                        help="CLIP for the authors' folder: file, folder or hub id")
    parser.add_argument("--lexicon", metavar="FILE",
                        help="VAD lexicon for the authors' folder; our own folders need none")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    asked = parser.add_argument_group("what to say")
    asked.add_argument("--emotion", choices=EMOTIONS, metavar="NAME",
                       help="explain this emotion: " + ", ".join(EMOTIONS))
    asked.add_argument("--all-emotions", action="store_true", help="a sentence for each of the nine")
    asked.add_argument("--samples", type=int, default=1, metavar="N", help="so many sentences (default: 1)")
    asked.add_argument("--best-of", type=int, default=0, metavar="N", help="draw N and choose by the contrastive head")
    asked.add_argument("--top-p", type=float, default=0.9, metavar="P", help="nucleus to draw from (default: 0.9)")
    asked.add_argument("--temperature", type=float, default=1.0, metavar="T", help="above 1: more daring (default: 1)")
    asked.add_argument("--greedy", action="store_true", help="always the likeliest word")
    asked.add_argument("--beam", type=int, default=0, metavar="N", help="the N likeliest sentences")
    asked.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other sentences (default: 0)")
    shown = parser.add_argument_group("where to say it")
    shown.add_argument("--json", action="store_true", help="one JSON object a line, and nothing else")
    shown.add_argument("--out", type=Path, metavar="FILE",
                       help="JSON lines to a file; pictures that it has are not asked again")
    shown.add_argument("--heatmap", action="store_true",
                       help="where the model looked, word by word: heatmaps/PICTURE.png")
    shown.add_argument("--html", type=Path, metavar="FILE", help="a page of all pictures")
    shown.add_argument("--serve", type=int, nargs="?", const=8000, metavar="PORT",
                       help="a local page to drop pictures on")
    return parser


def wish_of(options: argparse.Namespace) -> Wish:
    for flag in ("samples", "best_of", "beam", "seed"):
        if getattr(options, flag) < (flag == "samples"):
            raise UserError(f"--{flag.replace('_', '-')} {getattr(options, flag)} is too small")
    if not 0 < options.top_p <= 1 or options.temperature <= 0:
        raise UserError("--top-p must lie above 0 and not above 1, --temperature above 0")
    ways = [flag for flag, on in (("--greedy", options.greedy), ("--beam", options.beam),
                                  ("--samples", options.samples > 1), ("--best-of", options.best_of)) if on]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)} contradict each other; choose one")
    if options.emotion and options.all_emotions:
        raise UserError("--emotion and --all-emotions contradict each other; choose one")
    return Wish(options.samples, options.best_of, options.beam, 0.0 if options.greedy else options.top_p,
                options.temperature, options.seed, options.emotion, options.all_emotions,
                looks=options.heatmap or options.html is not None)


def read_earlier(path: Path) -> dict[str, Answer]:
    """What an earlier run has written; a last line that was cut off is asked again."""
    found, whole = {}, ""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            if "error" not in record:
                found[record["image"]] = Answer(record)
                whole += line + "\n"
        except (ValueError, KeyError, TypeError):
            continue
    if path.is_file():
        write_text(path, whole)
    return found


def show(found: Iterator[Answer], options: argparse.Namespace) -> Iterator[Answer]:
    """Write answers as they come."""
    paper = Paper(sys.stdout)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    for one in found:
        if options.out:
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(one.record, ensure_ascii=False) + "\n")
        if options.json:
            print(json.dumps(one.record), flush=True)
        elif not options.out:
            print(paper.card(one.record), flush=True)
        if options.heatmap and one.looks is not None:
            print(f"  {save_heatmap(one, Path('heatmaps'))}", file=sys.stderr)
        yield one


def main() -> int:
    options = parser().parse_args()
    wish = wish_of(options)
    if options.serve is None and not options.pictures:
        raise UserError("name a picture, as in: python sample.py image.jpg")
    files = find_pictures(options.pictures)
    source = options.checkpoint or find_checkpoint()
    device = choose_device(options.device)
    model = load_model(source, options.clip, options.lexicon).to(device).eval()
    if wish.best_of and not model.config.contrastive_head:
        raise UserError(f"--best-of needs a contrastive head to choose with, and {source} has none")
    about = introduce(model, source)
    print(about, file=sys.stderr)
    if options.serve is not None:
        serve(model, wish, about, options.serve)
        return 0
    earlier = read_earlier(options.out) if options.out else {}
    new = [file for file in files if str(file) not in earlier]
    found = {one.record["image"]: one for one in show(answers_for(model, new, wish), options)}
    if options.html:
        write_text(options.html, gallery([(earlier | found)[str(file)] for file in files], about))
    broken = [one for one in found.values() if "error" in one.record]
    if broken:
        print(f"{len(broken)} of {len(new)} pictures cannot be read", file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    run_program(main)
