"""Ask the picture: EmoVIT's answers, given as sample.py gives its own.

    python -m related.emovit PICTURES --ask "What is in the picture?" --ask "Why could somebody feel awe?"
    python -m related.emovit --serve

Every question is asked of every picture, each by itself: the model was tuned on single questions, not on dialogues.
The likeliest token is taken each time, as in the original: an answer about what is there needs no surprise.
Shapes: B pictures of K patches of width E, Q questions.
"""
import argparse
import dataclasses
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from related.emovit import EmoVIT, load_emovit, newest_emovit
from sample import fingerprint, introduce
from sevlm import to_pixels
from support.answers import Answer, Answerer, add_ways, deliver, pictures_named, settled
from support.device import autocast
from support.pages import escape
from support.program import UserError
from support.settings import add_flags, check, given, option
from support.terminal import Terminal

FIRST = "What is in the picture?"  # in the page's field, until somebody asks another
LONGEST = 1000  # letters of a question; the model reads 50 words


@dataclass
class Wish:
    """How an answer is found."""
    top_p: float = option(0.0, "draw from the likeliest tokens that make up this share; 0: always the likeliest token",
                          least=0, most=1)
    beam: int = option(0, "the likeliest of so many answers, by beam search", least=0, most=100)
    seed: int = option(0, "another seed, other answers with --top-p", least=0, most=2**31 - 1)

    def __post_init__(self):
        check(self)
        if self.beam and self.top_p:
            raise UserError("--beam and --top-p contradict each other; choose one")
        if self.seed and not self.top_p:
            raise UserError("--seed needs --top-p: without it nothing is drawn")


@dataclass
class Asked(Answerer):
    """A model, and the questions that it is asked."""
    model: EmoVIT
    about: str
    questions: Sequence[str]
    wish: Wish
    dtype: torch.dtype = torch.float32
    gallery_title, upload_title = "What these pictures answer", "Ask the picture"

    @property
    def side(self) -> int:
        return self.model.config.image_size

    def pixels(self, image: Image.Image) -> Tensor:
        return to_pixels(image, self.model.config)

    @torch.no_grad()
    def answer(self, pixels: Tensor, names: Sequence[str]) -> list[Answer]:
        start, model, count = time.perf_counter(), self.model, len(self.questions)
        asked = list(self.questions) * len(names)
        own = [zlib.crc32(picture.numpy().tobytes(), self.wish.seed) for picture in pixels]  # in any batch
        seeds = [zlib.crc32(question.encode(errors="replace"), own[n // count]) for n, question in enumerate(asked)]
        with autocast(model.device, self.dtype):
            features = model.encode_image(pixels.to(model.device)).repeat_interleave(count, 0)  # (B * Q, K, E)
            texts = model.answer(features, asked, self.wish.top_p, self.wish.beam, seeds)
        seconds = (time.perf_counter() - start) / len(names)
        told = [{"question": question, "answer": text} for question, text in zip(asked, texts, strict=True)]
        return [Answer({"image": name, "answers": told[n * count:(n + 1) * count], "seconds": seconds})
                for n, name in enumerate(names)]

    def question(self) -> dict:
        asked = {"questions": list(self.questions)} | dataclasses.asdict(self.wish)
        return {"model": fingerprint(self.model)} | asked

    def lines(self, record: dict, terminal: Terminal) -> list[str]:
        lines = []
        for one in record["answers"]:
            lines += [*terminal.lines(one["question"]), *terminal.lines(one["answer"] or "(nothing)", indent=6)]
        return lines

    def story(self, found: Answer) -> str:
        return dialogue(found.record["answers"])

    def controls(self) -> str:
        field = f'<input name="question" value="{escape(FIRST)}" maxlength="{LONGEST}" required>'
        again = '<button type="button" name="seed">Another answer</button>' if self.wish.top_p else ""
        return f"<label>Question {field}</label><button>Ask</button>{again}"

    def asked(self, fields: dict[str, str]) -> "Asked":
        wish = dataclasses.replace(self.wish, seed=int(fields.get("seed", "0")))
        return dataclasses.replace(self, questions=[checked(fields.get("question", FIRST))], wish=wish)


def checked(question: str) -> str:
    """A question without blanks around it."""
    question = question.strip()
    if not question or len(question) > LONGEST:
        raise UserError(f"a question has 1 to {LONGEST:,} letters, not {len(question):,}")
    return question


def dialogue(answers: Sequence[dict]) -> str:
    """Questions and answers as HTML; beside an answer that is known not to be `right` stands the `truth`."""
    parts = []
    for one in answers:
        mark = f' data-right="{int(one["right"])}"' if "right" in one else ""
        truth = f' <small>truth: {escape(one["truth"])}</small>' if not one.get("right", True) else ""
        parts.append(f'<dt>{escape(one["question"])}</dt><dd{mark}>{escape(one["answer"] or "(nothing)")}{truth}</dd>')
    return f'<dl class="dialogue">{"".join(parts)}</dl>'


def add_options(parser: argparse.ArgumentParser) -> None:
    """Pictures and flags of a program that is asked."""
    add_ways(parser)
    parser.add_argument("--ask", action="append", default=[], metavar="QUESTION",
                        help="a question to ask of every picture; may be named several times")
    parser.add_argument("--run", metavar="RUN", help="a run of this program, or a hub id (default: the newest run)")
    add_flags(parser, "how to answer", Wish)


def ask(options: argparse.Namespace) -> int:
    """Answer in every way that was asked for; 1 if a picture was broken."""
    wish, files = Wish(**given(options, Wish)), pictures_named(options, on_page=("ask", "seed"))
    questions = list(map(checked, options.ask)) or [FIRST]
    source = options.run or newest_emovit(Path("runs"))
    model = load_emovit(source, "--run")
    about = introduce(model, source)
    dtype = settled(model, model.config.width, about, options)
    return deliver(Asked(model, about, questions, wish, dtype), files, options)
