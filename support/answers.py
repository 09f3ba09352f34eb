"""Pictures in, answers out: in the terminal, as JSON lines, on a page, or by a page that takes pictures.

    1. Answers    for files, in batches; a broken picture's is an error
    2. Pages      of many pictures, or one that answers, on this machine only
    3. Program    flags, and what becomes of each answer

A program brings an Answerer, who knows what to say of pictures and how it looks.
Shapes: B pictures of S x S pixels.
"""
import argparse
import dataclasses
import io
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from support import pages
from support.device import PRECISIONS, choose_device, choose_precision, held_in
from support.journal import Journal
from support.pages import escape
from support.pictures import BadPicture, open_picture, picture_files
from support.program import UserError, printable, progress, write_text
from support.settings import flag
from support.terminal import Terminal

BATCH = 32  # pictures at once
SHOWN = 480  # pixels on a side of a picture in a page


# 1. Answers

@dataclass
class Answer:
    record: dict  # what --json prints: image, and what is said of it, or error
    attention: np.ndarray | None = None  # (words, side, side) over the picture
    image: Image.Image | None = None


class Answerer(ABC):
    """Who answers, what is asked, and how an answer looks."""
    about: str  # who speaks, in a line
    side: int  # S
    gallery_title: str
    upload_title: str
    hint = ""  # how to read a page
    scripts: Sequence[str] = ()  # of a page

    @abstractmethod
    def pixels(self, image: Image.Image) -> Tensor:
        """uint8 (3, S, S)."""

    @abstractmethod
    def answer(self, pixels: Tensor, names: Sequence[str]) -> list[Answer]:
        """Answers for uint8 pixels (B, 3, S, S)."""

    @abstractmethod
    def question(self) -> dict:
        """What an answer depends on besides its picture."""

    @abstractmethod
    def lines(self, record: dict, terminal: Terminal) -> list[str]:
        """An answer in the terminal."""

    @abstractmethod
    def story(self, found: Answer) -> str:
        """An answer as HTML."""

    @abstractmethod
    def controls(self) -> str:
        """What a form asks besides a picture, as HTML."""

    @abstractmethod
    def asked(self, fields: dict[str, str]) -> "Answerer":
        """The same, asked what a form's fields say: a UserError or ValueError where they are wrong."""

    def also(self, found: Answer) -> None:
        """What else becomes of an answer, as soon as it is there."""


def answers_for(answerer: Answerer, files: Sequence[Path]) -> Iterator[Answer]:
    """An answer for each file, in order; a broken picture's is an error."""
    batches = [files[start:start + BATCH] for start in range(0, len(files), BATCH)]
    for batch in progress(batches, f"pictures, x{BATCH}"):
        opened, answers = {}, {}
        for file in batch:
            try:
                opened[file] = open_for(answerer, file)
            except BadPicture as problem:
                answers[file] = Answer({"image": str(file), "error": str(problem)})
        if opened:
            pixels = torch.stack([pixels for pixels, _ in opened.values()])
            found = answerer.answer(pixels, list(map(str, opened)))
            for (file, (_, image)), one in zip(opened.items(), found, strict=True):
                answers[file] = dataclasses.replace(one, image=image)
        yield from map(answers.get, batch)


def open_for(answerer: Answerer, source) -> tuple[Tensor, Image.Image]:
    """A picture as the model takes it and as a page shows it, decoded once."""
    image = open_picture(source, max(SHOWN, answerer.side))
    pixels = answerer.pixels(image)
    image.thumbnail((SHOWN, SHOWN))
    return pixels, image


def recalled(record: dict) -> Answer:
    """An earlier answer with its picture, for a page."""
    try:
        return Answer(record, image=open_picture(record["image"], SHOWN))
    except BadPicture as problem:
        return Answer({"image": record["image"], "error": str(problem)})


# 2. Pages

def text_card(answerer: Answerer, record: dict, terminal: Terminal) -> str:
    """A picture's name and its answer, for the terminal."""
    broken = "error" in record
    said = terminal.lines(f"cannot be read: {record['error']}") if broken else answerer.lines(record, terminal)
    return "\n".join(["", printable(record["image"]), *said])


def card(answerer: Answerer, found: Answer) -> str:
    """A picture with its answer, as HTML."""
    record = found.record
    if "error" in record:
        return (f'<article class="card"><div><h2>{escape(Path(record["image"]).name)}</h2>'
                f'<p class="problem">cannot be read: {escape(record["error"])}</p></div></article>')
    return picture_card(found.image, record["image"], answerer.story(found))


def picture_card(image: Image.Image, name: str, story: str) -> str:
    """A picture, and below it a story in HTML."""
    name = escape(Path(name).name)
    return (f'<article class="card"><div class="picture"><img src="{pages.data_uri(image, SHOWN)}" alt="{name}">'
            f'<canvas aria-hidden="true"></canvas></div><div><h2>{name}</h2>{story}</div></article>')


def gallery(answerer: Answerer, cards: Sequence[str]) -> str:
    """All pictures on one page."""
    head = f'<h1>{answerer.gallery_title}</h1><p class="about">{escape(answerer.about)}. {answerer.hint}</p>'
    return pages.page(answerer.gallery_title, f'{head}<div class="gallery">{"".join(cards)}</div>', answerer.scripts)


def upload_pages(answerer: Answerer) -> tuple[Callable[[str], str], Callable[[bytes, dict[str, str]], str]]:
    """What support/server.py asks for: a page to drop pictures on, and the answer to one."""
    from support.server import Refused

    def page(nonce: str) -> str:
        about = f"{escape(answerer.about)}. Your picture stays on this machine."
        form = pages.fill("upload.html", title=answerer.upload_title, about=about, controls=answerer.controls())
        return pages.page(answerer.upload_title, form, [*answerer.scripts, "upload.js"], nonce)

    def answer_upload(upload: bytes, fields: dict[str, str]) -> str:
        try:
            asked = answerer.asked(fields)
            pixels, image = open_for(asked, io.BytesIO(upload))
        except BadPicture as problem:
            raise Refused(415, f"not a picture that can be read: {problem}") from None
        except (UserError, ValueError) as problem:
            raise Refused(400, str(problem)) from None
        [found] = asked.answer(pixels[None], [fields.get("name", "your picture")])
        return card(asked, dataclasses.replace(found, image=image))

    return page, answer_upload


# 3. Program

def add_ways(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Pictures, and ways to answer; a program may have ways of its own."""
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="pictures, folders, patterns")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS], help="auto tries what is faster")
    ways = parser.add_argument_group("where to say it")
    ways.add_argument("--json", action="store_true", help="one JSON object a line, and nothing else")
    ways.add_argument("--out", type=Path, metavar="FILE",
                      help="append JSON lines to a file; what it answers already is not asked again")
    ways.add_argument("--html", type=Path, metavar="FILE", help="a page of all pictures")
    ways.add_argument("--serve", type=int, nargs="?", const=8000, metavar="PORT",
                      help="a local page to drop pictures on")
    return ways


def pictures_named(options: argparse.Namespace, on_page: Sequence[str] = ()) -> list[Path]:
    """The pictures, once the flags have been checked; --serve asks on its page what the flags `on_page` say."""
    if options.serve is not None:
        named = {"PICTURE": options.pictures} | {
            flag(name): getattr(options, name, None) for name in ("json", "out", "html", *on_page)}
        if clash := [name for name, value in named.items() if value]:
            raise UserError(f"--serve asks and answers on its page, without {', '.join(clash)}")
        if not 0 <= options.serve < 2**16:
            raise UserError(f"--serve {options.serve}: ports end at {2**16 - 1}")
    elif not options.pictures:
        raise UserError("name a picture, or a folder of pictures")
    if options.html and options.html.is_file() and not pages.is_page(options.html):
        raise UserError(f"--html {options.html} is a file of another kind; it stays as it is")
    return picture_files(options.pictures)


def settled(model: nn.Module, width: int, about: str, options: argparse.Namespace) -> torch.dtype:
    """Move a model to its device and precision, and say who speaks and in which."""
    device = choose_device(options.device)
    dtype, why = choose_precision(options.precision, device, width)
    held_in(model.to(device), dtype)
    [precision] = [name for name, kind in PRECISIONS.items() if kind == dtype]
    print(printable(f"{about}; {precision}: {why}"), file=sys.stderr)
    return dtype


def deliver(answerer: Answerer, files: Sequence[Path], options: argparse.Namespace) -> int:
    """Answer in every way that was asked for; 1 if a picture was broken."""
    if options.serve is not None:
        from support.server import serve  # http.server is slow to import
        serve(*upload_pages(answerer), options.serve)
        return 0
    journal = Journal(options.out, answerer.question()) if options.out else None
    new = [file for file in files if journal is None or str(file) not in journal.answered]
    terminal, cards, broken = Terminal(sys.stdout), {}, 0
    for found in answers_for(answerer, new):
        broken += "error" in found.record
        show(answerer, found, options, terminal, journal)
        if options.html:
            cards[found.record["image"]] = card(answerer, found)
    if options.html:
        earlier = set(map(str, files)) - cards.keys()
        for record in journal.records() if earlier else ():
            if record["image"] in earlier:
                cards[record["image"]] = card(answerer, recalled(record))
        write_text(options.html, gallery(answerer, [cards[str(file)] for file in files]))
    if broken:
        print(f"{broken} of {len(new)} pictures cannot be read", file=sys.stderr)
    return int(broken > 0)


def show(answerer: Answerer, found: Answer, options: argparse.Namespace, terminal: Terminal, journal: Journal | None
         ) -> None:
    """One answer, as soon as it is there."""
    record = found.record
    if options.json:
        print(json.dumps(record), flush=True)
    elif not journal:
        print(text_card(answerer, record, terminal), flush=True)
    elif "error" in record:
        print(text_card(answerer, record, terminal), file=sys.stderr)
    if "error" not in record:
        if journal:
            journal.append(record)
        answerer.also(found)
