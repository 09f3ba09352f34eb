"""Instructions for EmoVIT (Xie et al., CVPR 2024, "Revolutionizing Emotion Insights with Visual Instruction Tuning"):
questions about pictures, and the answers to them.

    1. Sources           records from votes, from clues, and from what annotators said; questions of known answer
    2. Language model    requests for any of them, and records from its replies
    3. Program

The original has GPT-4 write all dialogues, from EmoSet's attributes. Here there are three kinds of records without it:

    categorical       which of these emotions?                      a record for each vote
    conversation      what is there, how bright, which colours?     from clues
    reasoning         why, and could somebody feel differently?     in the annotators' own words

questions.py has records and wordings, emoset.py reads EmoSet and what a language model writes, clues.py knows what
there is to see. No record is of a picture of the val or test split, unless it is asked for.

    python -m related.instructions --data toy --show 3
    python -m related.instructions --emoset FOLDER --requests requests.jsonl
    python -m related.instructions --emoset FOLDER --replies replies.jsonl --out records.json
"""
import argparse
import random
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import Art, add_data_options, art_of
from related.clues import BRIGHTNESS, SHOWN, WORDINGS, Clues, clues_of
from related.emoset import EmoSet, clue_text, emoset_clue, pairs_of, positions, read_emoset, read_replies, request
from related.questions import KINDS, Record, closed_answer, closed_question, named, stem, write_records
from support.names import first_few
from support.program import UserError, aligned, printable, run_program, write_text
from support.splits import SPLITS
from toy.painter import PALETTES, SHAPES

# 1. Sources

WHY = ("Why would somebody feel {}?", "Why does the picture evoke {}?", "Why is the emotion {}?",
       "What in the painting makes people feel {}?", "Somebody feels {} here. Why?")
OPEN = ("What does the picture make people feel, and why?", "Which emotion does it evoke, and why?",
        "How does somebody feel in front of the painting, and why?")
DIFFERENTLY = ("Could somebody feel differently?", "Would everybody feel the same?",
               "Most feel {}. Could the emotion be another one?")


def reason_question(emotion: str) -> str:
    """What is asked in a test."""
    return WHY[0].format(emotion)


def records_of(art: Art, split: str = "train", kinds: Sequence[str] = KINDS) -> list[Record]:
    """Of the split's pictures that are there. Wordings are drawn by the picture's name: always the same ones."""
    paintings = np.array([painting for painting in art.paintings(split) if art.files[painting]], int)
    clues, records = clues_of(art, paintings) if "conversation" in kinds else {}, []
    for painting in paintings.tolist():
        if "categorical" in kinds:
            records += categorical(art, painting)
        if "conversation" in kinds:
            records += conversation(art, painting, clues.get(painting, {}))
        if "reasoning" in kinds:
            records += reasoning(art, painting)
    return records


def most_felt(art: Art, painting: int) -> str:
    return art.emotions[art.votes[painting].argmax()]


def categorical(art: Art, painting: int) -> list[Record]:
    """One for each vote, so that a model learns how people are divided."""
    question = closed_question(art.emotions)
    return [Record(art.names[painting], question, closed_answer(emotion), "categorical", emotion)
            for emotion, votes in zip(art.emotions, art.votes[painting], strict=True) for _ in range(votes)]


def conversation(art: Art, painting: int, clues: Clues) -> list[Record]:
    """A question for each clue; on the toy, where nothing else is in a picture, also whether some thing is."""
    image, emotion = art.names[painting], most_felt(art, painting)
    draw = random.Random(f"conversation {image}")
    turns = [(draw.choice(WORDINGS[name].questions), draw.choice(WORDINGS[name].answers).format(clue))
             for name, clue in clues.items()]
    if "subject" in clues:
        thing = draw.choice([clues["subject"], draw.choice(list(SHAPES))])
        yes, no = SHOWN.answers
        turns.append((draw.choice(SHOWN.questions).format(thing),
                      (yes if thing == clues["subject"] else no).format(clues["subject"])))
    return [Record(image, question, answer, "conversation", emotion) for question, answer in turns]


def reasoning(art: Art, painting: int) -> list[Record]:
    """Each annotator's reason; and that one of them felt differently, or that nobody did."""
    image, draw = art.names[painting], random.Random(f"reasoning {art.names[painting]}")
    said = [(art.emotions[art.emotion[row]], art.texts[row]) for row in art.rows_of(painting)]
    turns = [(draw.choice(WHY).format(emotion), reason, emotion) if draw.random() < 0.7 else
             (draw.choice(OPEN), f"{emotion}, because {reason}", emotion) for emotion, reason in said]
    usual, votes = most_felt(art, painting), art.votes[painting]
    question = draw.choice(DIFFERENTLY).format(usual)
    if others := [(emotion, reason) for emotion, reason in said if emotion != usual]:
        emotion, reason = draw.choice(others)
        turns.append((question, f"Yes, some feel {emotion}, because {reason}", emotion))
    elif votes.max() == votes.sum() > 1:  # some annotators only vote: their words were too many or too few
        turns.append((question, f"Hardly: everybody felt {usual}.", usual))
    return [Record(image, question, answer, "reasoning", emotion) for question, answer, emotion in turns]


@dataclass(frozen=True)
class Clue:
    """A question whose true answer is known."""
    image: str
    asked: str  # subject, colour or brightness
    question: str
    truth: str
    choices: tuple[str, ...]


def clue_questions(art: Art, split: str, paraphrased: bool = False) -> list[Clue]:
    """Three for each of the toy's paintings, in words of the training or in others; none for other data."""
    if art.name != "toy":
        return []
    choices = {"subject": tuple(SHAPES), "colour": tuple(PALETTES), "brightness": tuple(word for _, word in BRIGHTNESS)}
    found = []
    for painting, truth in clues_of(art, art.paintings(split)).items():
        draw = random.Random(f"clue {art.names[painting]}")
        for asked, possible in choices.items():
            wording = WORDINGS[asked]
            question = draw.choice(wording.paraphrases if paraphrased else wording.questions)
            found.append(Clue(art.names[painting], asked, question, truth[asked], possible))
    return found


def right(clue: Clue, answer: str) -> bool:
    return named(answer, clue.choices) == [clue.truth]


# 2. Language model

ASKED = {"conversation": 1000, "reasoning": 100}  # pictures of each emotion, as published
EMOSETS_NAMES = {"colourfulness": "colorfulness", "subject": "object", "mentioned": "object"}


def requests_of(art: Art, problems: list[str]) -> Iterator[str]:
    """For the first training pictures of each emotion; of paintings, the annotators' sentences are the caption."""
    clues = {} if isinstance(art, EmoSet) else clues_of(art, art.paintings("train"))
    for kind, most in ASKED.items():
        for picture in positions(art, 0, most):
            if not art.files[picture]:
                continue
            try:
                clue = emoset_clue(art, picture) if isinstance(art, EmoSet) else painting_clue(art, picture, clues)
            except UserError as error:
                problems.append(f"no {kind} request: {error}")
                continue
            yield request(kind, stem(art.names[picture]), clue)


def painting_clue(art: Art, painting: int, clues: dict[int, Clues]) -> str:
    told = {EMOSETS_NAMES.get(name, name): clue for name, clue in clues.get(painting, {}).items()}
    said = [art.texts[row] for row in art.rows_of(painting)]
    return clue_text("\n".join(said), {"emotion": most_felt(art, painting), **told})


def records_from_replies(art: Art, source: Path, problems: list[str]) -> list[Record]:
    """What a language model wrote about training pictures; what cannot be used becomes a problem."""
    known = {stem(name): picture for picture, name in enumerate(art.names)}
    train, records = set(art.paintings("train").tolist()), []
    for reply in read_replies(source, problems):
        picture = known.get(reply.identity, known.get(reply.identity.rpartition("/")[2]))
        turns = [turn for turn in pairs_of(reply.text, reply.kind) if all(turn)]
        why_not = ("there is no such picture in the data" if picture is None else
                   f"a picture of {SPLITS[art.split[picture]]}, not of train" if picture not in train else
                   "its picture is missing" if not art.files[picture] else
                   "no question with an answer in it" if not turns else None)
        if why_not:
            problems.append(f"reply {reply.kind} {reply.identity}: {why_not}")
            continue
        records += [Record(art.names[picture], question, answer, reply.kind, most_felt(art, picture))
                    for question, answer in turns]
    return records


# 3. Program

def source_of(options: argparse.Namespace) -> Art:
    return read_emoset(Path(options.emoset)) if options.emoset else art_of(options)


def overview(records: Sequence[Record], emotions: Sequence[str]) -> Iterator[str]:
    counts = Counter((record.emotion, record.kind) for record in records)
    rows = [["", *KINDS]]
    for emotion in [*emotions, *sorted({record.emotion for record in records}.difference(emotions))]:
        rows.append([emotion, *(f"{counts[emotion, kind]:,}" for kind in KINDS)])
    kinds = Counter(record.kind for record in records)
    rows.append([f"{len(records):,} records", *(f"{kinds[kind]:,}" for kind in KINDS)])
    yield aligned(rows)


def shown(records: Sequence[Record], count: int) -> Iterator[str]:
    """All records of some pictures, wide apart in the data."""
    of_image: dict[str, dict[Record, None]] = defaultdict(dict)
    for record in records:
        of_image[record.image][record] = None  # equal ones once
    images = list(of_image)
    for image in images[::max(1, len(images) // max(1, count))][:count]:
        yield f"\n{image}"
        for record in of_image[image]:
            yield from (f"    {record.kind:13} {record.question}", textwrap.indent(record.answer, " " * 18))


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions about pictures and answers to them, to train EmoVIT on.")
    add_data_options(parser)
    parser.add_argument("--emoset", metavar="FOLDER", help="EmoSet's folder, instead of --data")
    parser.add_argument("--requests", metavar="FILE", help="write what to ask a language model, as JSON lines, and end")
    parser.add_argument("--replies", metavar="SOURCE", help="take up its replies: JSON lines with id, kind and reply, "
                        "or a folder of KIND/EMOTION/ID.txt")
    parser.add_argument("--out", metavar="FILE", help="write the records there")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the records of N pictures")
    options = parser.parse_args()
    if options.requests and (options.replies or options.out or options.show):
        raise UserError("--requests makes no records: leave --replies, --out and --show for later")
    art = source_of(options)
    problems = [*art.problems]
    if options.requests:
        lines = list(requests_of(art, problems))
        write_text(options.requests, "".join(lines))
        print(f"{len(lines):,} requests in {options.requests}")
    else:
        records = records_of(art)
        if options.replies:
            records += records_from_replies(art, Path(options.replies), problems)
        for line in [*overview(records, art.emotions), *shown(records, options.show)]:
            print(printable(line))
        if options.out:
            write_records(options.out, records)
    if problems:
        print(f"{len(problems):,} things that cannot be used", *map(printable, first_few(problems)), sep="\n    ")


if __name__ == "__main__":
    run_program(main)
