"""EmoSet on disk, and a language model's part in EmoVIT's data: what it is asked, and what becomes of its replies.

    1. EmoSet        pictures of eight emotions with attributes; what is missing, broken or odd is said, and left out
    2. Requests      the clues of a picture as text, and what a language model is to make of them
    3. Replies       text to pairs of question and answer, by the authors' rule and by ours; folders and JSON lines

The layout is FOLDER/{info,train,val,test}.json, annotation/EMOTION/ID.json and image/EMOTION/ID.jpg; captions, which
requests need, are caption/EMOTION/ID.txt. instructions.py makes records of all this.
"""
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from data import Art
from related.heldout import LabelledPictures
from support.program import UserError, progress, read_json, read_text
from support.records import json_records, short, text_in
from support.splits import SPLITS

# 1. EmoSet

SCALES = ("brightness", "colorfulness")
SINGLE = (*SCALES, "scene", "facial_expression", "human_action")  # `object` is a list of names


@dataclass
class EmoSet(LabelledPictures):
    """Pictures are in the order of the split files."""
    captions: list[Path] = field(default_factory=list)  # (P,) whether they are there or not
    annotations: list[dict] = field(default_factory=list)  # (P,) as they are; empty if they cannot be read
    attributes: list[dict] = field(default_factory=list)  # (P,) what is valid of them


class Entry(NamedTuple):
    """A picture of a split file; paths are relative to EmoSet's folder."""
    label: str
    identity: str
    image: str
    annotation: str


def read_split(folder: Path, split: str, problems: list[str]) -> list[Entry]:
    """EmoSet's own entries have four fields, those of EmoVIT's authors lack the second one."""
    path = folder / f"{split}.json"
    if not path.is_file() and split != "train":
        problems.append(f"there is no {path.name}")
        return []
    fields, entries = read_json(path), []
    if not isinstance(fields, list):
        raise UserError(f"{path}: expected a list of pictures")
    for number, entry in enumerate(fields, 1):
        if not isinstance(entry, list) or len(entry) not in (3, 4) or not all(isinstance(one, str) for one in entry):
            problems.append(f"{path.name}, entry {number}: expected three or four texts, not {short(entry)}")
        else:
            entries.append(Entry(entry[0], PurePosixPath(entry[-2]).stem, *entry[-2:]))
    return entries


def read_info(folder: Path) -> dict[str, dict[str, int]]:
    """The names that each attribute may have, with their numbers; those of the scales are shares themselves."""
    path = folder / "info.json"
    info = read_json(path)
    try:
        known = {name: dict(info[name]["label2idx"]) for name in ("emotion", "object", *SINGLE)}
        if all(0 <= float(share) <= 1 for name in SCALES for share in known[name]):
            return known
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(f"{path}: expected label2idx of emotion, object, {', '.join(SINGLE)}, with names in 0 to 1 for "
                    f"{' and '.join(SCALES)}")


def read_emoset(folder: Path) -> EmoSet:
    info, problems = read_info(folder), []
    of_splits = {split: read_split(folder, split, problems) for split in ("test", "val", "train")}
    kept: dict[str, tuple[str, Entry]] = {}
    for split, entries in of_splits.items():  # test and val first: what they have is not trained on
        for entry in entries:
            if entry.label not in info["emotion"]:
                problems.append(f"{split}.json: {entry.identity} is of an unknown emotion, {entry.label[:30]!r}")
            elif entry.identity in kept:
                problems.append(f"{split}.json: {entry.identity} is in {kept[entry.identity][0]}.json too")
            else:
                kept[entry.identity] = split, entry
    if not kept:
        raise UserError(f"{folder} has no picture that can be used" + (f": {problems[0]}" if problems else ""))
    splits, entries = zip(*kept.values(), strict=True)
    files = [path if (path := folder / entry.image).is_file() else None for entry in entries]
    problems += [f"there is no {entry.image}" for entry, file in zip(entries, files, strict=True) if file is None]
    annotations = [read_annotation(folder, entry, problems) for entry in progress(entries, "annotations")]
    emotions, none = sorted(info["emotion"]), np.empty(0, int)
    art = EmoSet(
        name="emoset", folder=folder, source=str(folder), emotions=tuple(emotions),
        names=[PurePosixPath(entry.image).name for entry in entries], files=files, problems=problems, owner=none,
        emotion=none, texts=[], split=np.array([SPLITS.index(split) for split in splits]), annotations=annotations,
        votes=np.eye(len(emotions), dtype=int)[[emotions.index(entry.label) for entry in entries]],
        captions=[folder / "caption" / entry.label / f"{entry.identity}.txt" for entry in entries])
    art.attributes = [valid(annotation, info, entry.identity, problems)
                      for annotation, entry in zip(annotations, entries, strict=True)]
    return art


def read_annotation(folder: Path, entry: Entry, problems: list[str]) -> dict:
    try:
        annotation = read_json(folder / entry.annotation)
        if isinstance(annotation, dict):
            return annotation
        problems.append(f"{entry.annotation}: expected an object")
    except UserError as error:
        problems.append(str(error))
    return {}


def valid(annotation: Mapping[str, Any], info: Mapping[str, Mapping], identity: str, problems: list[str]) -> dict:
    """The attributes that info.json knows, by their names there: 1 is its "1.0"; null and unknown names are none."""
    found: dict[str, str | list[str]] = {}
    for name in SINGLE:
        value = annotation.get(name)
        label = f"{value}.0" if type(value) is int else str(value)
        if label in info[name]:
            found[name] = label
        elif name in annotation:
            problems.append(f"{identity}: {name} is {short(value)}, which info.json does not know")
    objects = annotation.get("object", [])
    if not isinstance(objects, list):
        problems.append(f"{identity}: object is {short(objects)}; it must be a list")
        objects = []
    found["object"] = [one for one in map(str, objects) if one in info["object"]]
    problems += [f"{identity}: object has {one[:30]!r}, which info.json does not know" for one in map(str, objects)
                 if one not in info["object"]]
    return found


# 2. Requests

CLUES = (*SCALES, "object", "facial_expression", "human_action")  # in this order; never the scene
TASK = """\
You are looking at a picture, which is described to you by a caption, by the emotion that it evokes, and by attributes.
Brightness runs from 0, dark, to 1, bright; colorfulness from 0, black and white, to 1.
{}
Write nothing but lines of this form:
Question: ...
Answer: ..."""
SYSTEM = {
    "conversation": TASK.format("""\
Write a conversation between somebody who asks about the picture and somebody who sees it and answers. First two
questions on what is visible: objects, what they do, how they stand to each other. Ask only for what surely is, or
surely is not, in the picture. Then one complex question on the picture with a detailed answer."""),
    "reasoning": TASK.format("""\
Write one question that can only be answered by thinking about what the picture does to somebody who sees it. It must
not give away what is visible. Then answer it in detail, as somebody who sees the picture, without a word about captions
or attributes.""")}


def clue_text(caption: str, clues: Mapping[str, Any]) -> str:
    """What a language model is told of a picture. Values are spelt as Python spells them, null as None."""
    known = [f"{name}: {clues[name]}" for name in ("emotion", *CLUES) if name == "emotion" or name in clues]
    return f"{caption}\n\n" + "\n".join(known)


def emoset_clue(art: EmoSet, picture: int) -> str:
    caption, annotation = read_text(art.captions[picture]), art.annotations[picture]
    if "emotion" not in annotation:
        raise UserError(f"{art.names[picture]}: no annotation that names an emotion")
    return clue_text(caption, annotation)


def positions(art: Art, start: int, stop: int) -> Sequence[int]:
    """The training pictures from `start` to before `stop` of each emotion, in their order, emotions by alphabet."""
    train, felt = art.paintings("train"), art.votes.argmax(1)
    of_emotion = [train[felt[train] == art.emotions.index(emotion)] for emotion in sorted(art.emotions)]
    return np.concatenate([pictures[start:stop] for pictures in of_emotion]).tolist()


def request(kind: str, identity: str, clue: str) -> str:
    """A JSON line for any language model; id and kind come back with its reply."""
    asked = {"id": identity, "kind": kind, "system": SYSTEM[kind], "user": clue, "temperature": 1}
    return json.dumps(asked, ensure_ascii=False) + "\n"


# 3. Replies

def authors_pairs(reply: str, kind: str) -> list[tuple[str, str]]:
    """By the authors' rule. A marker is one anywhere, even inside a word; numbers are understood in conversations only,
    and there not by what ends an answer, so that a numbered question stays in the answer before it."""
    opens, closes = ((r"\s*\d*\s*:", "complex question:|question:") if kind == "conversation" else
                     (r"\s*:", r"question\s*:|answer\s*:"))
    found = re.findall(rf"question{opens}(.*?)answer{opens}(.*?)(?={closes}|\Z)", reply, re.DOTALL | re.IGNORECASE)
    return [(question.strip(), answer.strip()) for question, answer in found]


def marked_pairs(reply: str, question: str, answer: str) -> list[tuple[str, str]]:
    """A marker begins a line. It counts only in pairs: a question's, and the next one is an answer's."""
    markers = list(re.finditer(rf"^[ *#(-]*(?:complex[\s):*]*)?({question}|{answer})\s*\d*\s*:[ *]*", reply,
                               re.MULTILINE | re.IGNORECASE))
    pairs = [(first, second) for first, second in pairwise(markers)
             if first[1].lower() == question and second[1].lower() == answer]
    found, end = [], len(reply)
    for first, second in reversed(pairs):  # an answer ends where the next question begins
        texts = reply[first.end():second.start()], reply[second.end():end]
        found.append(tuple(text.strip("*# \t\r\n") for text in texts))
        end = first.start()
    return found[::-1]


def pairs_of(reply: str, kind: str) -> list[tuple[str, str]]:
    """Question and answer of each turn: markers spelt out, or else as letters, or else as the authors see them."""
    return (marked_pairs(reply, "question", "answer") or marked_pairs(reply, "q", "a")
            or authors_pairs(reply, kind))


class Reply(NamedTuple):
    kind: str
    identity: str
    text: str


def read_replies(source: Path, problems: list[str]) -> Iterator[Reply]:
    """Of FOLDER/KIND/EMOTION/ID.txt, as published, or of JSON lines with id, kind and reply."""
    if not source.is_dir():
        for where, record in json_records(source):
            if not isinstance(record, dict) or record.get("kind") not in list(SYSTEM):
                raise UserError(f"{where}: expected an object with id, reply, and kind: {' or '.join(SYSTEM)}")
            yield Reply(record["kind"], text_in(record, "id", where), text_in(record, "reply", where))
        return
    if not any((source / kind).is_dir() for kind in SYSTEM):
        raise UserError(f"--replies {source}: expected a folder in it named {' or '.join(SYSTEM)}")
    for kind in SYSTEM:
        for path in sorted((source / kind).rglob("*.txt")):
            try:
                yield Reply(kind, path.relative_to(source / kind).with_suffix("").as_posix(), read_text(path))
            except UserError as error:
                problems.append(str(error))
