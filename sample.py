"""The picture in front of you: which emotions it is likely to evoke, and why, in a sentence.

    python sample.py image.jpg                      in the terminal
    python sample.py pictures/ --html gallery.html  a page of all pictures of a folder
    python sample.py --serve                        a local page to drop pictures on

    1. Model        the checkpoint that is meant, and what it was trained on
    2. Answers      for a batch of pictures: emotions, sentences, words, and what each word attended to
    3. Shown        an answer in the terminal, as a heatmap of its words, on a page
    4. Program      flags

How answers get to where they are wanted, whoever gives them, is support/answers.py's.
The likeliest emotion is fixed first and then explained, so that label and sentence agree.
Shapes: B pictures of K patches, E emotions, L tokens, d width.
"""
import argparse
import base64
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sevlm import (
    BUNDLED,
    SEVLM,
    attention_maps,
    beam_search,
    emotion_log_probs,
    generate,
    load_model,
    match_scores,
    read_config,
    to_pixels,
)
from support import pages
from support.answers import Answer, Answerer, add_ways, deliver, pictures_named, settled
from support.device import autocast
from support.pages import escape
from support.program import UserError, printable, replacing, run_program
from support.settings import add_flags, check, flag, given, option
from support.terminal import Terminal

SCALES = ("valence", "arousal", "dominance")


# 1. Model

def find_checkpoint() -> Path:
    """The newest run, of a study the newest of its full model, or else the toy model that comes with the code."""
    models = sorted(Path("runs").glob("**/model.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    runs = [path.parent for path in models if is_checkpoint(path.parent)]
    if not runs:
        return BUNDLED
    study = runs[0].parent  # or the folder of all runs
    full = [run for run in runs if run.parent == study != Path("runs") and run.name.startswith("full-")]
    return (full or runs)[0]


def is_checkpoint(folder: Path) -> bool:
    """Whether it holds a SEVLM; other systems have runs too."""
    try:
        return bool(read_config(folder))
    except UserError:
        return False


def introduce(model: SEVLM, source: str | Path) -> str:
    """One line: which model speaks, and what it was trained on."""
    data = model.about.get("data", "data unknown")
    if data == "toy":
        data = "toy paintings and made-up annotators only"
    return f"{'/'.join(Path(source).parts[-2:])}, trained on {data}"


def fingerprint(model: SEVLM) -> str:
    """Equal for models that answer alike: of weights, configuration and what `about` says."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(model.config), model.about], default=str).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# 2. Answers

@dataclass
class Wish:
    """What is asked of each picture."""
    emotion: str = option("", "explain this emotion instead of the likeliest")
    all_emotions: bool = option(False, "a sentence for each emotion")
    samples: int = option(1, "so many sentences", least=1, most=1000)
    best_of: int = option(0, "draw so many sentences and choose by the contrastive head", least=0, most=1000)
    beam: int = option(0, "the so many likeliest sentences, by beam search", least=0, most=100)
    greedy: bool = option(False, "always the likeliest token")
    top_p: float = option(0.9, "draw from the likeliest tokens that make up this share (5.1)", above=0, most=1)
    temperature: float = option(1.0, "above 1: more daring", above=0)
    seed: int = option(0, "another seed, other sentences", least=0, most=2**31 - 1)
    attention: bool = False  # also what each word attended to

    def __post_init__(self):
        check(self)
        changed = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}
        drawing = ("samples", "best_of", "top_p", "temperature", "seed")
        for one, others in {"greedy": ("beam", *drawing), "beam": drawing, "samples": ("best_of",),
                            "emotion": ("all_emotions",)}.items():
            if one in changed and (clash := [flag(name) for name in others if name in changed]):
                raise UserError(f"{flag(one)} and {' and '.join(clash)} contradict each other; choose one")

    @property
    def sentences(self) -> int:
        return max(self.samples, self.best_of, self.beam)

    def check_for(self, model: SEVLM) -> None:
        """A UserError where the model cannot grant it."""
        if self.emotion:
            model.text.emotion_index(self.emotion)
        if self.best_of and not model.config.contrastive_head:
            raise UserError("--best-of needs a contrastive head to choose with, and this model has none")


Probabilities = Callable[[SEVLM, Tensor], tuple[Tensor, Sequence[str]]]


def own_probabilities(model: SEVLM, features: Tensor) -> tuple[Tensor, Sequence[str]]:
    """The emotions' log-probabilities (B, E) for patch features (B, K, d), and a note on each picture: here none."""
    return emotion_log_probs(model, features), [""] * len(features)


@torch.no_grad()
def answer(model: SEVLM, pixels: Tensor, names: Sequence[str], wish: Wish, dtype: torch.dtype = torch.float32,
           probabilities: Probabilities = own_probabilities) -> list[Answer]:
    """Answers for uint8 pixels (B, 3, S, S)."""
    start, emotions = time.perf_counter(), model.config.emotions
    with autocast(model.device, dtype):
        features = model.encode_image(pixels.to(model.device))  # (B, K, d)
        log_probs, notes = probabilities(model, features)
        shares = log_probs.cpu().double().softmax(1).tolist()  # (B, E)
        chosen = [wish.emotion or emotions[np.argmax(each)] for each in shares]
        told, ids = explain(model, features, pixels, [emotions if wish.all_emotions else [one] for one in chosen], wish)
        best = [pick(each, emotion, wish) for each, emotion in zip(told, chosen, strict=True)]
        ids = ids[torch.arange(len(best)), best]  # (B, L)
        vad = model.vad(ids)  # (B, L, 3)
        maps = attention_maps(model, features, ids).float().cpu().numpy() if wish.attention else None  # (B, L, K)
    seconds, answers = (time.perf_counter() - start) / len(names), []
    for i, name in enumerate(names):
        words = model.text.words(ids[i].tolist())
        record = {"image": name, "emotion": chosen[i], "probabilities": dict(zip(emotions, shares[i], strict=True)),
                  "explanation": told[i][best[i]]["explanation"], "explanations": told[i],
                  "words": [{"word": word, "vad": None if vad is None else known(vad[i, positions[-1]])}
                            for word, positions in words], "seconds": seconds}
        if notes[i]:
            record["note"] = notes[i]
        answers.append(Answer(record, word_maps(maps[i], words) if wish.attention else None))
    return answers


def explain(model: SEVLM, features: Tensor, pixels: Tensor, emotions: Sequence[Sequence[str]], wish: Wish
            ) -> tuple[list[list[dict]], Tensor]:
    """S sentences about each of M emotions of each picture, as told in a record, and as ids (B, M * S, L)."""
    asked = [(picture, emotion) for picture, each in enumerate(emotions) for emotion in each]
    features = features[[picture for picture, _ in asked]]
    openings = [model.text.opening(emotion) for _, emotion in asked]
    if wish.beam:
        sentences = beam_search(model, features, openings, wish.beam)
    else:
        own = [zlib.crc32(picture.numpy().tobytes(), wish.seed) for picture in pixels]  # whatever its neighbours are
        seeds = [own[picture] + model.text.emotion_index(emotion) for picture, emotion in asked]
        share = 0.0 if wish.greedy else wish.top_p
        sentences = generate(model, features, openings, wish.sentences, share, wish.temperature, seeds)
    ids, log_probs = sentences.ids, sentences.log_probs.tolist()
    match = match_scores(model, features, ids).tolist() if model.config.contrastive_head else [None] * len(ids)
    told = [{"emotion": asked[n // wish.sentences][1], "explanation": model.text.reason(sentence),
             "log_probability": log_probs[n], "match": match[n]} for n, sentence in enumerate(ids.tolist())]
    each = len(told) // len(emotions)
    return [told[n:n + each] for n in range(0, len(told), each)], ids.view(len(emotions), each, -1)


def pick(told: Sequence[dict], emotion: str, wish: Wish) -> int:
    """Which sentence to show first, of those about this emotion."""
    own = [place for place, one in enumerate(told) if one["emotion"] == emotion]
    return max(own, key=lambda place: told[place]["match"]) if wish.best_of else own[0]


def known(vad: Tensor) -> list[float] | None:
    """The VAD (3,) of a word, that is of its last token's word so far; None for one that the lexicon lacks."""
    return vad.tolist() if vad.any() else None


def word_maps(maps: np.ndarray, words: Sequence[tuple[str, list[int]]]) -> np.ndarray:
    """From each token's attention (L, K) to each word's (words, side, side), stretched to 0..1."""
    side = int(maps.shape[1] ** 0.5)
    each = np.array([maps[positions].mean(0) for _, positions in words]).reshape(-1, side * side)
    each -= each.min(1, keepdims=True)
    return (each / each.max(1, keepdims=True).clip(min=1e-9)).reshape(-1, side, side)


def likely(probabilities: Mapping[str, float], most: int) -> list[tuple[str, float]]:
    """The most probable emotions, at least one, none below 3%."""
    first, *others = sorted(probabilities.items(), key=lambda pair: -pair[1])[:most]
    return [first, *(pair for pair in others if pair[1] >= 0.03)]


def mean_vad(record: dict) -> dict[str, float]:
    """The mean VAD of the words that the lexicon knows, by scale; empty where it knows none."""
    vads = [word["vad"] for word in record["words"] if word["vad"]]
    return dict(zip(SCALES, np.mean(vads, 0).tolist(), strict=True)) if vads else {}


# 3. Shown

@dataclass
class Explainer(Answerer):
    """A model, and what is asked of it."""
    model: SEVLM
    about: str
    wish: Wish
    dtype: torch.dtype = torch.float32
    probabilities: Probabilities = own_probabilities
    heatmaps: bool = False
    gallery_title, upload_title = "What these pictures evoke", "What does this picture evoke?"
    hint = ("A line below a word shows its valence, from rust to teal. Point at a word to see what it attended to; "
            "arrow keys go from word to word.")
    scripts = ("overlay.js",)

    @property
    def side(self) -> int:
        return self.model.config.image_size

    def pixels(self, image: Image.Image) -> Tensor:
        return to_pixels(image, self.model.config)

    def answer(self, pixels: Tensor, names: Sequence[str]) -> list[Answer]:
        return answer(self.model, pixels, names, self.wish, self.dtype, self.probabilities)

    def question(self) -> dict:
        asked = dataclasses.asdict(self.wish)
        del asked["attention"]
        return {"model": fingerprint(self.model)} | asked

    def lines(self, record: dict, terminal: Terminal) -> list[str]:
        """Bars, sentences and gauges."""
        lines, colour = [], pages.colours(record["probabilities"])
        names = max(map(len, colour)) + 1
        for emotion, share in likely(record["probabilities"], 5):
            bar = terminal.paint(terminal.bar(share, max(terminal.width - names - 15, 8)), colour[emotion])
            lines.append(f"  {printable(emotion):{names}}{share:5.0%}  {bar}")
        lines.append("")
        for told in record["explanations"]:
            emotion, chosen = printable(told["emotion"]), told["explanation"] == record["explanation"]
            first, *others = terminal.lines(f"{told['emotion']} because {told['explanation']}")
            lines += [first.replace(emotion, terminal.paint(emotion, colour[told["emotion"]], chosen), 1), *others]
        if vad := mean_vad(record):
            lines += ["", *terminal.beside([terminal.gauge(name, value) for name, value in vad.items()])]
        if "note" in record:
            lines += ["", *terminal.lines(record["note"])]
        return lines

    def story(self, found: Answer) -> str:
        """The sentence, bars, gauges, and the other sentences."""
        record, colour = found.record, pages.colours(found.record["probabilities"])
        others = "".join(f"<li>{because(told, colour)}</li>" for told in record["explanations"]
                         if (told["emotion"], told["explanation"]) != (record["emotion"], record["explanation"]))
        return "".join([
            sentence(found, colour),
            pages.bars((emotion, share, colour[emotion]) for emotion, share in likely(record["probabilities"], 4)),
            pages.gauges(mean_vad(record)), f'<ul class="others">{others}</ul>' if others else "",
            f'<p class="note">{escape(record["note"])}</p>' if "note" in record else ""])

    def controls(self) -> str:
        names = "".join(f"<option>{escape(emotion)}</option>" for emotion in self.model.config.emotions)
        again = '<button type="button" name="seed">Another sentence</button>'
        return ('<label>Emotion <select name="emotion"><option value="">the likeliest</option>'
                f"{names}</select></label>{'' if self.wish.greedy or self.wish.beam else again}")

    def asked(self, fields: dict[str, str]) -> "Explainer":
        wish = dataclasses.replace(self.wish, emotion=fields.get("emotion", ""), seed=int(fields.get("seed", "0")))
        wish.check_for(self.model)
        return dataclasses.replace(self, wish=wish)

    def also(self, found: Answer) -> None:
        if self.heatmaps:
            print(f"  {save_heatmap(found, Path('heatmaps'))}", file=sys.stderr)


def save_heatmap(found: Answer, folder: Path) -> Path:
    """The whole picture, then each word over it. Named after the picture and, by a digest, after where it lies."""
    from support.drawing import heat, sheet  # fonts are slow to import
    record, path = found.record, Path(found.record["image"])
    cells = [("", "#000000", found.image.resize((180, 180)))]
    cells += [(word["word"], valence_colour(word["vad"]), heat(found.image, weights, 180))
              for word, weights in zip(record["words"], found.attention, strict=True)]
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]
    target = folder / f"{re.sub('[^0-9A-Za-z-]', '_', path.stem)[:60]}-{digest}.png"
    colour = pages.colours(record["probabilities"])[record["emotion"]]
    with replacing(target) as temporary:
        sheet((record["emotion"], colour), record["image"], cells).save(temporary, "PNG")
    return target


def valence_colour(vad: Sequence[float] | None) -> str:
    """From rust through grey to teal."""
    valence = vad[0] if vad else 0.0
    end = (31, 127, 116) if valence > 0 else (181, 64, 47)
    return "#" + bytes(round(138 + abs(valence) * (channel - 138)) for channel in end).hex()


def because(told: dict, colour: Mapping[str, str], explanation: str = "") -> str:
    """An emotion and its explanation."""
    emotion = told["emotion"]
    return f'{pages.dot(colour[emotion])}<b>{escape(emotion)}</b> because {explanation or escape(told["explanation"])}'


def sentence(found: Answer, colour: Mapping[str, str]) -> str:
    """The sentence; each word shows its valence and carries, as bytes, what it attended to."""
    words = []
    for place, word in enumerate(found.record["words"]):
        level = f' data-level="{round(2 * word["vad"][0])}"' if word["vad"] else ""
        if found.attention is not None:
            packed = base64.b64encode((found.attention[place] * 255).round().astype(np.uint8)).decode()
            level += f' tabindex="{-(place > 0)}" data-grid="{packed}"'
        words.append(f'<span class="word"{level}>{escape(word["word"])}</span>')
    return f'<p class="sentence">{because(found.record, colour, " ".join(words))}</p>'


# 4. Program

def add_options(parser: argparse.ArgumentParser) -> None:
    """Pictures and flags of a program that explains."""
    ways = add_ways(parser)
    ways.add_argument("--heatmap", action="store_true", help="what each word attended to, in heatmaps/")
    add_flags(parser, "what to say", Wish)


def what_is_asked(options: argparse.Namespace) -> tuple[Wish, list[Path]]:
    """The wish and the pictures, once the flags have been checked."""
    shown = options.heatmap or options.html is not None or options.serve is not None
    wish = Wish(**given(options, Wish), attention=shown)
    return wish, pictures_named(options, on_page=("heatmap", "emotion", "all_emotions", "seed"))


def respond(model: SEVLM, about: str, options: argparse.Namespace,
            probabilities: Probabilities = own_probabilities) -> int:
    """Answer in every way that was asked for; 1 if a picture was broken."""
    wish, files = what_is_asked(options)
    wish.check_for(model)
    dtype = settled(model, model.config.width, about, options)
    answerer = Explainer(model, about, wish, dtype, probabilities, options.heatmap)
    return deliver(answerer, files, options)


def main() -> int:
    parser = argparse.ArgumentParser(description="Say what a picture evokes, and why.")
    parser.add_argument("--checkpoint", metavar="RUN", help="a run, a model's folder or a hub id "
                        "(default: the newest run under runs/, else examples/toy)")
    add_options(parser)
    options = parser.parse_args()
    what_is_asked(options)  # mistakes are told before a model is loaded
    source = options.checkpoint or find_checkpoint()
    model = load_model(source)
    return respond(model, introduce(model, source), options)


if __name__ == "__main__":
    run_program(main)
