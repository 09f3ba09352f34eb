"""Records for EmoVIT, the published JSON, and how its questions are worded, read and answered.

    1. Records        picture, question, answer
    2. Questions      which emotion is it, in five wordings; how a model reads a question; what an answer names
"""
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from related.clues import enumerated
from support.pictures import is_picture
from support.program import UserError, write_text
from support.records import json_records, text_in

KINDS = ("categorical", "conversation", "reasoning")


# 1. Records

@dataclass(frozen=True)
class Record:
    image: str  # its name in the data set
    question: str
    answer: str
    kind: str
    emotion: str  # what the picture evokes, or in reasoning, what is explained; "" if a file does not say


def stem(image: str) -> str:
    """A picture's name without its suffix; the names of paintings have none, but dots."""
    return image.rpartition(".")[0] if is_picture(image) else image


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """As published: a list of conversations of one turn; the id is the number in the picture's name."""
    content = []
    for record in records:
        number = re.search(r"_(\d+)$", stem(record.image))
        turns = [{"from": "human", "value": record.question}, {"from": "gpt", "value": record.answer}]
        content.append({"id": number[1] if number else stem(record.image), "image": record.image,
                        "conversations": turns})
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_records(path: str | Path) -> list[Record]:
    return [one for where, content in json_records(Path(path)) for one in published_records(content, where)]


def published_records(content, where: str) -> Iterator[Record]:
    """One for each question. Its kind is told from its words, its emotion from a closed answer or EMOTION_ID.jpg."""
    turns = content.get("conversations") if isinstance(content, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: expected an object with id, image and conversations")
    if [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise UserError(f"{where}: human and gpt must take turns, human first")
    image = text_in(content, "image", where)
    labelled = re.fullmatch(r"([a-z]+)_\d+", stem(image))
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        question, answer = (text_in(turn, "value", where) for turn in (human, gpt))
        kind = kind_of(question)
        emotion = answer.removeprefix(ANSWER) if kind == "categorical" else labelled[1] if labelled else ""
        yield Record(image, question, answer, kind, emotion)


def kind_of(question: str) -> str:
    if ANSWER.strip() in question:
        return "categorical"
    return "reasoning" if re.search(r"\b(why|feels?|felt|emotions?)\b", question, re.IGNORECASE) else "conversation"


# 2. Questions

ANSWER = "Predict emotion: "
INSTRUCTIONS = (  # the first as published, to the blank; the others are never trained on
    ("Please select the emotion closest to the image from the following options:{} (Do not provide answers outside of "
     "the candidates options.) Please answer in the following format:  Predict emotion:"),
    "Which of these emotions does the image evoke: {}? Answer in the following format: Predict emotion:",
    "From the options {}, please provide the emotion closest to the image. Format: Predict emotion:",
    "Look at the image. Its emotion is one of {}. Select it in the format Predict emotion:",
    "Candidates: {}. Please name the one closest to what somebody feels in front of the image. Predict emotion:")
MOST_WORDS = 50  # of a question, as a model reads it


def closed_question(labels: Sequence[str], instruction: str = INSTRUCTIONS[0]) -> str:
    return instruction.format(enumerated(labels))


PARAPHRASES = tuple(partial(closed_question, instruction=instruction) for instruction in INSTRUCTIONS)


def closed_answer(label: str) -> str:
    return ANSWER + label


def processed(question: str) -> str:
    """As a model reads it, in training and later: lower case, blanks for some punctuation, at most 50 words."""
    blank = re.sub(r"\s{2,}", " ", re.sub(r"[.!\"()*#:;~]", " ", question.lower()))
    return " " + " ".join(blank.rstrip("\n").strip(" ").split(" ")[:MOST_WORDS])


def named(text: str, choices: Iterable[str]) -> list[str]:
    """The choices that a text names, as whole words: "danger" is not "anger"."""
    return [choice for choice in choices if re.search(rf"\b{re.escape(choice)}\b", text, re.IGNORECASE)]
