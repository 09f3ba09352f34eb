"""From annotation files and pictures on disk to batches: ArtEmis v1 and v2, the toy world, and data of your own.

    1. Art              a data set: paintings, splits, votes, explanations
    2. ArtEmis          its released files, v1 and v2, its preprocessed ones, the authors' JSON
    3. Own data         any file with images, emotions and explanations
    4. Pictures         stored once: features of the frozen tower, or pixels
    5. Captions         all explanations as token ids and lexicon rows, in compact arrays
    6. Batches          paintings with two sentences each, their negatives, for any number of processes
    7. What there is    a data set's lexicon and tokenizer, an overview, examples

A row is one annotation: somebody's emotion in front of a painting, and why. An example is a painting with two
sentences, made from two of its rows. How tables are read, texts cleaned and splits drawn is in support/.
Shapes: P paintings, R rows, E emotions, B pictures of a batch, N = 2 B sentences, L tokens, K patches of width d.
For an overview of a data set, and examples of it with their negatives:

    python data.py --data toy --show 2
"""
import argparse
import hashlib
import math
import os
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from sevlm import EMOTIONS, IGNORE, SEVLM, Config, Text, load_pixels
from support.annotations import opinions, read_annotations, whole_numbers
from support.device import autocast
from support.english import clean, words
from support.files import find_file, read_tokenizer
from support.names import files_of, first_few
from support.pictures import BadPicture
from support.program import UserError, aligned, printable, progress, read_json, run_program
from support.public import GPT2_HUB
from support.records import numbers_by_name, text_in, texts_in
from support.splits import SPLITS, combined, splits_v1, splits_v2, wrong_splits
from support.store import Store, stamp
from support.tables import SUFFIXES, Table, read_csv
from support.tokens import trained_tokenizer
from toy.painter import paint_toy
from vad import OUR_LEXICON, Lexicon, read_lexicon

# 1. Art

TINY = 30  # paintings of a split whose scores mean little


@dataclass
class Art:
    """A data set. Explanations are sorted by painting; those that a length limit drops are not among them."""
    name: str
    folder: Path
    source: str  # which files the splits and texts come from
    emotions: tuple[str, ...]  # (E,)
    names: list[str]  # (P,) "style/painting", or the picture's path in one's own data
    split: np.ndarray  # (P,) index into SPLITS
    votes: np.ndarray  # (P, E) how many annotators felt each emotion, those of dropped rows too; the target of ACC
    owner: np.ndarray  # (R,) index of the painting
    emotion: np.ndarray  # (R,) index of the emotion
    texts: list[str]  # (R,)
    problems: list[str]  # rows that cannot be used
    dropped: int = 0  # rows beyond the length limits
    notes: list[str] = field(default_factory=list)  # choices that were made for the user
    files: list[Path | None] = field(default_factory=list)  # (P,) None: no such picture

    def paintings(self, split: str) -> np.ndarray:
        """The split's paintings that have explanations."""
        explained = np.bincount(self.owner, minlength=len(self.names)) > 0
        return np.flatnonzero((self.split == SPLITS.index(split)) & explained)

    def rows(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.split[self.owner] == SPLITS.index(split))

    def rows_of(self, painting: int) -> range:
        return range(*np.searchsorted(self.owner, (painting, painting + 1)))


@dataclass
class Annotations:
    """What the files of a data set say, row by row."""
    source: str  # the files
    table: Table  # with the columns name, emotion, text and split
    kept: np.ndarray | None = None  # (R,) rows to train on and to compare with; None: all
    dropped: int = 0  # rows beyond the length limits
    votes: Mapping[tuple[str, str], int] | None = None  # of (painting, emotion), if not one for each row
    emotions: Sequence[str] = EMOTIONS
    notes: Sequence[str] = ()  # choices that were made for the user


def load_art(name: str, root: str | Path | None = None, images: str | Path | None = None,
             toy_paintings: int = 2000, pictures: bool = True) -> Art:
    """The data set `name`: one of ours from `root` (by default data/ or $SEVLM_DATA), or a file of one's own.

    Its pictures are in `images`, by default beside the annotations; without `pictures` none are needed.
    """
    root, path = Path(root or os.environ.get("SEVLM_DATA", "data")), Path(name)
    if name.lower().endswith(SUFFIXES):
        art, beside = assemble(path.name, path.parent, read_own(path)), path.parent
    elif name in ("toy", "artemis_v1", "artemis_v2"):
        folder = root / (f"toy-{toy_paintings}" if name == "toy" else name)
        if name == "toy":
            paint_toy(folder, toy_paintings)
        elif not folder.is_dir():
            folder = root
        art = assemble(name, folder, read_artemis(2 if name == "artemis_v2" else 1, folder))
        beside = folder / "wikiart"
    else:
        raise UserError(f"unknown data {name!r}; there are artemis_v1, artemis_v2 and toy, and files of your own "
                        f"({', '.join(SUFFIXES)})")
    if not art.texts:
        raise UserError(f"{art.source} in {art.folder} has no row that can be used"
                        + (f": {art.problems[0]}" if art.problems else ""))
    if pictures:
        find_pictures(art, images, beside)
    return art


def assemble(name: str, folder: Path, annotations: Annotations) -> Art:
    """Rows to paintings: number them, count votes, sort explanations by painting."""
    table, kept, emotions = annotations.table, annotations.kept, annotations.emotions
    names = sorted(set(table["name"]))
    index_of, emotion_of = ({key: index for index, key in enumerate(keys)} for keys in (names, emotions))
    owner = np.array([index_of[painting] for painting in table["name"]], np.int32)
    emotion = np.array([emotion_of[label] for label in table["emotion"]], np.int8)
    votes = np.zeros((len(names), len(emotions)), np.int64)
    counts = annotations.votes or Counter(zip(table["name"], table["emotion"], strict=True))
    for (painting, label), count in counts.items():
        if painting in index_of:
            votes[index_of[painting], emotion_of[label]] = count
    split_of = dict(zip(table["name"], table["split"], strict=True))
    split = np.array([SPLITS.index(split_of[painting]) for painting in names], np.int8)
    order = np.arange(len(table)) if kept is None else np.flatnonzero(kept)
    order = order[np.argsort(owner[order], kind="stable")]
    art = Art(name, folder, annotations.source, tuple(emotions), names, split, votes, owner[order], emotion[order],
              [table["text"][row] for row in order], table.problems, annotations.dropped, [*annotations.notes])
    art.notes += [f"{part} has only {count} paintings: its scores mean little" for part in ("val", "test")
                  if (count := len(art.paintings(part))) < TINY]
    return art


def find_pictures(art: Art, images: str | Path | None, beside: Path) -> None:
    """Find each painting's file, in `images` or beside the annotations."""
    folder = Path(images or beside)
    if not folder.is_dir():
        raise UserError(f"--images {images}: there is no such folder") if images else not_there("wikiart/", art.folder)
    art.files, choices = files_of(art.names, folder)
    art.notes += choices
    if not any(art.files):
        raise UserError(f"none of the {len(art.files):,} pictures of {art.source} is in {folder} (such as "
                        f"{art.names[0]}); --images names their folder")


# 2. ArtEmis

V1_FILE, V2_FILE, PREPROCESSED_FILE = "artemis_dataset_release_v0.csv", "Contrastive.csv", "artemis_preprocessed.csv"
JSON_FILES = {split: f"artEmisX_{split}.json" for split in ("train", "val", "test")}
SHORTEST, LONGEST_PERCENTILE = 5, 95  # words of an explanation; the deep-net setting of ArtEmis
HOW_TO_GET = """{missing} is not in {folder}. To train on ArtEmis, put these there:
  {v1}   ArtEmis v1.0: ask for it at https://www.artemisdataset.org (research use, its own terms)
  {v2}                      for v2.0: https://www.artemisdataset-v2.org (research use, its own terms)
  wikiart/<art_style>/<painting>.jpg   the WikiArt pictures: https://github.com/cs-chan/ArtGAN (non-commercial use)
Another place: --data-root FOLDER or the environment variable SEVLM_DATA. Without any download: --data toy"""


def not_there(missing: str, folder: Path) -> UserError:
    return UserError(HOW_TO_GET.format(missing=missing, folder=folder, v1=V1_FILE, v2=V2_FILE))


def read_artemis(version: int, folder: Path) -> Annotations:
    """From the best source in the folder: ArtEmis's own preprocessing, the authors' JSON, or the raw CSV."""
    if (folder / PREPROCESSED_FILE).is_file():
        return from_preprocessed(version, folder)
    if all((folder / file).is_file() for file in JSON_FILES.values()):
        return from_authors(folder)
    for file in (V1_FILE, V2_FILE)[:version]:  # v2 adds to v1
        if not (folder / file).is_file():
            raise not_there(file, folder)
    return from_v1(folder) if version == 1 else from_v2(folder)


def read_rows(path: Path, text: str = "utterance", extra: Sequence[str] = ()) -> Table:
    """The usable rows of an ArtEmis CSV file, with a painting's name for people and its key for the splits."""
    table = read_csv(path, "emotion")
    table.need(["art_style", "painting", "emotion", text, "repetition", *extra])
    emotion_of = {cell: cell.strip().lower() for cell in set(table["emotion"])}
    table.drop(f"unknown emotion {label[:30]!r}" if emotion_of[label] not in EMOTIONS else
               f"blank {text}" if not said.strip() else
               f"repetition is {count[:30]!r}" if not count.strip().isdecimal() else None
               for label, said, count in zip(table["emotion"], table[text], table["repetition"], strict=True))
    paintings = list(zip(table["art_style"], table["painting"], strict=True))
    table.columns |= {"name": [f"{style}/{painting}" for style, painting in paintings],
                      "key": [style + painting for style, painting in paintings],
                      "emotion": [emotion_of[label] for label in table["emotion"]],
                      "repetition": [int(count) for count in table["repetition"]],
                      "text": table[text]}
    return table


def from_v1(folder: Path) -> Annotations:
    table = read_rows(folder / V1_FILE)
    return cleaned(V1_FILE, table, splits_v1(table["key"], table["repetition"]))


def from_v2(folder: Path) -> Annotations:
    """v2's paintings, each chosen to contrast with its `anchor`, and v1's."""
    new = read_rows(folder / V2_FILE, extra=["anchor_art_style", "anchor_painting"])
    old = read_rows(folder / V1_FILE)
    for table in (new, old):  # which write accents in two ways
        table.columns |= {column: decomposed(table[column]) for column in ("name", "key")}
    anchors = decomposed(map(str.__add__, new["anchor_art_style"], new["anchor_painting"]))
    splits = splits_v2(new["key"], new["repetition"], anchors, old["key"], old["repetition"])
    both = Table(new.path, {column: new[column] + old[column] for column in ("name", "key", "emotion", "text")},
                 new.lines + old.lines, new.problems + old.problems)
    both.columns["version"] = ["new"] * len(new) + ["old"] * len(old)
    return cleaned(f"{V2_FILE} and {V1_FILE}", both, splits)


def decomposed(names: Iterable[str]) -> list[str]:
    return [unicodedata.normalize("NFD", name) for name in names]


def cleaned(source: str, table: Table, splits: Mapping[str, str]) -> Annotations:
    """Texts as a model reads them, within ArtEmis's length limits."""
    table.columns |= {"split": [splits[key] for key in table["key"]], "text": list(map(clean, table["text"]))}
    lengths = np.array([len(words(text)) for text in table["text"]])
    longest = length_limit(lengths, np.array(table["split"]) == "train")
    within = kept = (lengths >= SHORTEST) & (lengths <= longest)
    if "version" in table.columns:
        kept = combined(table["key"], table["split"], table["version"], within)
    return Annotations(source, table, kept, dropped=int((~within).sum()))


def length_limit(lengths: np.ndarray, in_training: np.ndarray) -> float:
    """The longest length kept: a percentile of the training rows, short ones still among them."""
    return float(np.percentile(lengths[in_training], LONGEST_PERCENTILE)) if in_training.any() else np.inf


def from_preprocessed(version: int, folder: Path) -> Annotations:
    """`artemis_preprocessed.csv`: its splits and its spelling, as they are."""
    table = read_rows(folder / PREPROCESSED_FILE, "utterance_spelled", ["split"])
    if version == 2 and "version" not in table.columns:
        raise UserError(f"{table.path} is of ArtEmis v1 (no column version); v2's comes from the artemis-v2 code")
    table.drop(wrong_splits(table["name"], table["split"]))
    kept = votes = None
    if "version" in table.columns and "grounding_emotion" not in table.columns:  # all old rows are still there
        kept = combined(table["key"], table["split"], table["version"], np.ones(len(table), bool))
    if version == 1 and (folder / V1_FILE).is_file():  # the annotators of rows that preprocessing has dropped vote too
        everyone = read_rows(folder / V1_FILE)
        votes = Counter(zip(everyone["name"], everyone["emotion"], strict=True))
    return Annotations(PREPROCESSED_FILE, table, kept, votes=votes)


def from_authors(folder: Path) -> Annotations:
    """The SEVLM authors' files: {id: {emotions, explanations, image_name, origin_emotion_distribution}}."""
    rows, problems, shares = [], [], {}
    for split, file in JSON_FILES.items():
        items = read_json(folder / file)
        if not isinstance(items, dict):
            raise UserError(f"{folder / file}: expected an object, one entry for each painting")
        for identity, item in items.items():
            try:
                name, said, felt = authors_item(item, f"{file}, id {identity}")
                if name in shares:
                    raise UserError(f"{file}, id {identity}: {name} occurs before")
            except UserError as problem:
                problems.append(str(problem))
                continue
            shares[name] = felt
            rows += [(name, split, emotion, text) for emotion, text in said]
    columns = {title: [row[place] for row in rows] for place, title in enumerate(("name", "split", "emotion", "text"))}
    counts = whole_numbers(np.array(list(shares.values())).reshape(-1, len(EMOTIONS))).tolist()
    votes = {(name, emotion): count for name, own in zip(shares, counts, strict=True)
             for emotion, count in zip(EMOTIONS, own, strict=True)}
    return Annotations(", ".join(JSON_FILES.values()), Table(folder, columns, [0] * len(rows), problems), votes=votes)


def authors_item(item, where: str) -> tuple[str, list[tuple[str, str]], list[float]]:
    """A painting's name, its emotions and explanations, and each emotion's share of the votes."""
    felt, texts = texts_in(item, "emotions", where), texts_in(item, "explanations", where)
    if len(felt) != len(texts):
        raise UserError(f"{where}: there must be a text for each emotion")
    if unknown := [label for label in felt if label not in EMOTIONS]:
        raise UserError(f"{where}: unknown emotion {unknown[0]!r}")
    shares = numbers_by_name(item.get("origin_emotion_distribution"), EMOTIONS, where, in_order=True)
    name = text_in(item, "image_name", where).removesuffix(".jpg")
    return name, list(zip(felt, texts, strict=True)), list(shares.values())


# 3. Own data

TITLES = {"name": ("image", "painting"), "label": ("emotion",), "text": ("explanation", "utterance")}


def read_own(path: Path) -> Annotations:
    """Any CSV, JSONL or JSON file with the columns image, emotion and explanation, and perhaps split and annotator.

    The emotions are those that occur: ArtEmis's in their usual order, then the others by alphabet. No row is dropped
    for its length: a sentence that is too long for the model loses its end.
    """
    table, emotions, notes = read_annotations(path, TITLES, folder_of={"painting": "art_style"}, usual=EMOTIONS)
    table.columns["emotion"] = table["label"]
    return Annotations(path.name, table, votes=opinions(table), emotions=emotions, notes=notes)


# 4. Pictures. Each is decoded, and by a frozen tower encoded, once: a broken one is known before training begins.

BATCH = 32  # pictures encoded at once


class PictureFiles(torch.utils.data.Dataset):
    """Decoded pictures by index, or the reason why there is none; for worker processes."""

    def __init__(self, files: Sequence[Path | None], config: Config):
        self.files, self.config = files, config

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return load_pixels(self.files[index] or "", self.config)
        except BadPicture as problem:
            return str(problem)


def open_store(art: Art, model: SEVLM, folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Store:
    """The file of all pictures' features (fp16, frozen tower) or pixels (uint8, tower in training), made if need be.

    Its name depends on tower, preprocessing and the type that the tower computes in, an entry's stamp on its picture's
    path, size and time.
    """
    config = model.config
    if config.train_tower:
        what, shape, kept = "pixels", (3, config.image_size, config.image_size), np.uint8
    else:
        what, shape, kept = "features", (config.patches, config.tower_width), np.float16
    kind = repr((what, config.image_size, config.crop, config.authors_pixels))
    if not config.train_tower:
        kind += f"{tower_fingerprint(model)} {dtype}"
    short = hashlib.sha256(kind.encode()).hexdigest()[:8]
    path = Path(folder or art.folder / "cache") / f"{art.name}-{what}-{short}.store"
    return Store(path, [f"{kind} {stamp(file)}" for file in art.files], shape, kept, what)


def tower_fingerprint(model: SEVLM) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.tower.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def fill_store(store: Store, art: Art, model: SEVLM, paintings: np.ndarray | None = None, workers: int = 0,
               part: int = 0, parts: int = 1, dtype: torch.dtype = torch.float32) -> dict[int, str]:
    """Decode (and encode) what is missing of some paintings, one of `parts` processes its part.

    Returns the paintings of this part without a usable picture, and why; they are tried again at the next start.
    """
    missing = store.missing(part, parts)
    if paintings is not None:
        missing = missing[np.isin(missing, paintings)]
    decoded = torch.utils.data.DataLoader(PictureFiles([art.files[p] for p in missing], model.config), BATCH,
                                          num_workers=workers, collate_fn=list)
    problems: dict[int, str] = {}
    batches = [missing[first:first + BATCH].tolist() for first in range(0, len(missing), BATCH)]
    for batch, pictures in zip(batches, progress(decoded, f"storing {store.what}, x{BATCH}"), strict=True):
        found = dict(zip(batch, pictures, strict=True))
        problems |= {p: picture for p, picture in found.items() if isinstance(picture, str)}
        good = [p for p in found if p not in problems]
        if good:
            pixels = torch.stack([found[p] for p in good])
            if not model.config.train_tower:
                with autocast(model.device, dtype):
                    pixels = model.encode_image(pixels.to(model.device)).half().cpu()
            store.put(good, pixels.numpy())
    return problems


# 5. Captions

@dataclass
class Captions:
    """Every explanation of a data set as the model reads it."""
    ids: np.ndarray  # (R, L) padded
    vad_rows: np.ndarray  # (R, L) where the lexicon has each token's VAD
    predicted: np.ndarray  # (R,) how many tokens are to be predicted
    known: np.ndarray  # (R,) for how many of them the VAD is to be predicted
    cut: np.ndarray  # (R,) which sentences lost their end


def load_captions(art: Art, model: SEVLM) -> Captions:
    """Tokenise all explanations."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said aloud, it does not warn when workers start
    parts = [captions_of(art, model, slice(start, start + 10_000))
             for start in progress(range(0, max(1, len(art.texts)), 10_000), "tokenising, x10,000")]
    return Captions(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def captions_of(art: Art, model: SEVLM, part: slice) -> Captions:
    """Of some rows."""
    text, length = model.text, model.config.length
    ids = text.encode([art.emotions[e] for e in art.emotion[part]], art.texts[part], length)
    rows, known = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    if model.config.uses_vad:
        rows = model.word_vad.rows(ids)
        known = (model.lexicon.values != 0).any(1)[rows] & model.in_explanation(ids, text.segments(ids))
    compact = np.uint16 if text.size <= 2**16 else np.int32
    return Captions(
        ids=ids.numpy().astype(compact), vad_rows=rows.numpy().astype(np.int32),
        predicted=(ids[:, 1:] != text.pad).sum(1).numpy(), known=known[:, 1:].sum(1).numpy(),
        cut=((ids[:, -1] != text.pad) & (ids[:, -1] != text.end)).numpy())


# 6. Batches. A step's batch is cut into parts, one for each process and each accumulation step. Negatives are drawn
# within groups of a few paintings that no cut divides, and losses are weighted by each part's share of the step, so
# that any number of parts computes the same gradient. An epoch visits the paintings in random order, wherever they are
# in the store. A part's entries are read whole, in one sweep over the file and without reading ahead: of ArtEmis's
# features, 0.3 MB a painting, that is 9.7 MB for a step of 32. A memory map was measured to read six times as much.

GROUP = 4  # paintings; one "wrong image" is drawn, and from three others it is as random as from thirty-one


@dataclass
class Batch:
    """A part of a step: B paintings with two sentences each, side by side."""
    paintings: np.ndarray  # (B,)
    pictures: Tensor  # uint8 pixels (B, 3, S, S) or features (B, K, d)
    inputs: dict[str, Tensor]  # the other arguments of the model's forward pass, (N, ...)
    shares: dict[str, float]  # for each loss, this part's share of the step's terms

    def pin_memory(self) -> "Batch":
        return self.mapped(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        inputs = {name: change(tensor) for name, tensor in self.inputs.items()}
        return Batch(self.paintings, change(self.pictures), inputs, self.shares)


class Examples:
    """The paintings to train on. An example is a painting with two annotations, of different emotions if it has them.

    What is drawn in an epoch is a function of (seed, epoch) alone, so it is the same in every process, for any
    number of workers, and after resuming anywhere. Without a store there are sentences, but no pictures.
    """

    def __init__(self, art: Art, captions: Captions, text: Text, values: Tensor | None, store: Store | None,
                 usable: np.ndarray, seed: int, drop_single_emotion: bool = False, trim: bool = True):
        self.captions, self.text, self.values, self.store, self.seed = captions, text, values, store, seed
        self.emotion = art.emotion  # (R,)
        self.trim = trim  # cut a batch's padding to its longest sentence
        paintings = art.paintings("train")
        paintings = paintings[usable[paintings]]
        if drop_single_emotion:  # as the authors do
            felt = np.zeros(art.votes.shape, bool)  # (P, E)
            felt[art.owner, art.emotion] = True
            paintings = paintings[felt[paintings].sum(1) > 1]
        if len(paintings) == 0:
            raise UserError(f"{art.name} has no training painting with a picture and an explanation")
        self.paintings = paintings  # (P',)
        self.first, end = (np.searchsorted(art.owner, paintings, side) for side in ("left", "right"))  # of its rows
        self.count = end - self.first
        rows = self.first[:, None] + np.arange(self.count.max())  # (P', most rows of a painting)
        self.emotions = np.where(rows < end[:, None], art.emotion.take(rows, mode="clip"), -1)  # -1 beyond its last
        names = "\n".join(art.names[painting] for painting in paintings)
        self.fingerprint = hashlib.sha256(names.encode(errors="replace")).hexdigest()

    def __len__(self) -> int:
        return len(self.paintings)

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An epoch's order (P',), its pairs of rows (P', 2), and what chooses the negatives: numbers in 0..1 for each
        painting, sentence and kind of negative (P', 2, 2)."""
        rng = np.random.default_rng([self.seed, epoch])
        order, partner = rng.permutation(len(self)), rng.random(len(self))
        turn = np.random.default_rng(self.seed).integers(self.count)  # whose turn it is in epoch 0
        first = (turn + epoch) % self.count  # all annotations of a painting get their turn
        itself = np.arange(self.emotions.shape[1]) == first[:, None]
        same = self.emotions == self.emotions[itself][:, None]
        second = pick(~same & (self.emotions >= 0), partner)
        second = np.where(second >= 0, second, pick(same & ~itself, partner))  # all of one emotion: another voice
        second = np.where(second >= 0, second, first)  # one annotation
        return order, np.stack([first, second], 1) + self.first[:, None], rng.random((len(self), 2, 2))

    def epoch(self, epoch: int, batch: int, part: int = 0, parts: int = 1, accumulate: int = 1) -> "Epoch":
        return Epoch(self, epoch, batch, part, parts, accumulate)


class Epoch(torch.utils.data.Dataset):
    """What one of `parts` processes computes in an epoch: `accumulate` batches for each step of `batch` paintings."""

    def __init__(self, examples: Examples, epoch: int, batch: int, part: int, parts: int, accumulate: int):
        self.examples, self.batch, self.accumulate, self.part, self.parts = examples, batch, accumulate, part, parts
        self.order, self.pairs, self.chances = examples.draw(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch) * self.accumulate

    def __getitem__(self, index: int) -> Batch:
        everyone, mine, group = self.cut(index)
        weight = 1.0
        if len(mine) == 0:  # more parts than groups: take part without weight
            mine, group, weight = everyone[:1], np.zeros(1, int), 0.0
        paintings = self.examples.paintings[mine]
        pictures = torch.from_numpy(self.examples.store.get(paintings))
        return Batch(paintings, pictures, self.sentences(mine, group), self.shares(mine, everyone, weight))

    def cut(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The examples of the whole step, those of this part, and the group of each of these."""
        step, turn = divmod(index, self.accumulate)
        everyone = self.order[step * self.batch:(step + 1) * self.batch]
        groups = max(1, len(everyone) // GROUP)
        group = np.sort(np.arange(len(everyone)) % groups)  # 0 0 0 0 1 1 1 1 ..., the first ones with what is left over
        own = np.array_split(np.arange(groups), self.parts * self.accumulate)[self.part * self.accumulate + turn]
        mine = np.isin(group, own)
        return everyone, everyone[mine], group[mine]

    def sentences(self, mine: np.ndarray, group: np.ndarray) -> dict[str, Tensor]:
        """The two sentences of each example, with their negatives, as the model's forward pass takes them."""
        captions, text, values = self.examples.captions, self.examples.text, self.examples.values
        rows = self.pairs[mine].ravel()  # (N,)
        length = 1 + captions.predicted[rows].max() if self.examples.trim else captions.ids.shape[1]
        ids = torch.from_numpy(captions.ids[rows, :length].astype(np.int64))
        inputs = dict(ids=ids, segments=text.segments(ids), labels=text.labels(ids))
        if values is not None:
            inputs["vad"] = values[torch.from_numpy(captions.vad_rows[rows, :length])]
        wrong_emotion, wrong_image = negatives(self.examples.emotion[rows], group, self.chances[mine])
        return inputs | dict(wrong_emotion=torch.from_numpy(wrong_emotion), wrong_image=torch.from_numpy(wrong_image))

    def shares(self, mine: np.ndarray, everyone: np.ndarray, weight: float) -> dict[str, float]:
        """Of each loss's terms in the step, the share that is computed here."""
        captions, rows, all_rows = self.examples.captions, self.pairs[mine].ravel(), self.pairs[everyone].ravel()
        shares = {"language": captions.predicted[rows].sum() / max(1, captions.predicted[all_rows].sum()),
                  "vad": captions.known[rows].sum() / max(1, captions.known[all_rows].sum()),
                  "contrastive": len(mine) / len(everyone)}
        return {loss: weight * float(share) for loss, share in shares.items()}


def negatives(emotion: np.ndarray, group: np.ndarray, chances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each sentence (N,) a wrong-emotion and a wrong-image partner of its group, as indices; -1: there is none.

    Wrong emotion is the sibling on the same image, or where that has the same emotion, a sentence of another
    painting with another emotion. Wrong image is the same sibling of another painting. `chances` (B, 2, 2) are those
    of each painting, sentence and kind.
    """
    sentence = np.arange(len(emotion))
    painting, chances = sentence // 2, chances.reshape(-1, 2)
    stranger = (group[painting][:, None] == group[painting]) & (painting[:, None] != painting)  # (N, N)
    sibling = sentence ^ 1
    wrong_emotion = pick(stranger & (emotion[:, None] != emotion), chances[:, 0])
    wrong_emotion = np.where(emotion[sibling] != emotion, sibling, wrong_emotion)
    return wrong_emotion, pick(stranger & (sentence[:, None] % 2 == sentence % 2), chances[:, 1])


def pick(eligible: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """A random True column of each row, by a number in 0..1 for each; -1 where there is none."""
    count = eligible.sum(1)
    column = (eligible.cumsum(1) > (chance * count).astype(int)[:, None]).argmax(1)
    return np.where(count > 0, column, -1)


def loader(dataset, workers: int, device: torch.device, start: int = 0) -> torch.utils.data.DataLoader:
    """Batches from `start` on, prepared ahead by worker processes while the device computes."""
    return torch.utils.data.DataLoader(dataset, batch_size=None, sampler=range(start, len(dataset)),
                                       num_workers=workers, pin_memory=device.type == "cuda")


class PictureBatches(torch.utils.data.Dataset):
    """Paintings to answer for, a batch at a time: those with a picture (B,), and their pictures."""

    def __init__(self, store: Store, paintings: np.ndarray, batch: int):
        self.store, self.batch, self.paintings = store, batch, paintings[store.done[paintings]]

    def __len__(self) -> int:
        return math.ceil(len(self.paintings) / self.batch)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Tensor]:
        paintings = self.paintings[index * self.batch:(index + 1) * self.batch]
        return paintings, torch.from_numpy(self.store.get(paintings))


# 7. What there is

OWN_TOKENS = 1000  # of a small tokenizer: the toy's, or that of one's own data


def find_lexicon(art: Art, path: str | Path | None, required: bool = True) -> Lexicon | None:
    """The lexicon to use with a data set: the one named, or one that lies with the data."""
    if path:
        return read_lexicon(path)
    found = [*art.folder.glob("lexicon.txt"), *sorted(art.folder.glob("*NRC-VAD*.txt"), reverse=True)]
    if found:
        return read_lexicon(found[0])
    if required:
        raise UserError(
            f"no VAD lexicon in {art.folder}. Get NRC VAD at https://saifmohammad.com/WebPages/nrc-vad.html "
            "(research use, no redistribution) and put its .txt file there, or name it with --lexicon; to try things "
            f"out, our few words will do: --lexicon {OUR_LEXICON}; without VAD: --no-vad-input --no-vad-head")
    return None


def find_tokenizer(art: Art, gpt2: str, small: bool = False) -> Tokenizer:
    """GPT-2's, or for the toy and other `small` models one that is trained on the data set's own words."""
    if not small and art.name != "toy":
        return read_tokenizer(find_file(gpt2, ["tokenizer.json", "vocab.json"], "--gpt2").parent)
    texts = [f"{opening} {art.texts[row]}" for row in art.rows("train")
             for opening in ("", f" the emotion is {art.emotions[art.emotion[row]]} because")]
    return trained_tokenizer(texts, Text.ADDED, OWN_TOKENS, art.folder / "cache", art.name)


def best_accuracy(art: Art, split: str) -> float | None:
    """The ACC of somebody who knows the toy paintings' moods; None for data whose moods nobody knows."""
    if art.name != "toy":
        return None
    likeliest = read_json(art.folder / "toy.json")["likeliest"]
    dominant = (art.split == SPLITS.index(split)) & has_dominant_emotion(art)
    hits = [likeliest.get(art.names[p]) == art.emotions[art.votes[p].argmax()] for p in np.flatnonzero(dominant)]
    return float(np.mean(hits)) if hits else None


def has_dominant_emotion(art: Art) -> np.ndarray:
    """(P,) where more than half of the annotators agree: the paintings that ACC counts."""
    return 2 * art.votes.max(1) > art.votes.sum(1)


def overview(art: Art, lexicon: Lexicon | None) -> Iterator[str]:
    """A page about a data set."""
    tokens = [words(text) for text in art.texts]
    lengths, vocabulary = np.array(list(map(len, tokens))), Counter(word for text in tokens for word in text)
    yield f"{art.name}: {len(art.texts):,} explanations of {len(art.names):,} paintings, from {art.source}"
    yield f"dropped by length   {art.dropped:,} rows\n"
    yield aligned(split_table(art))
    counts = Counter(np.bincount(art.owner, minlength=len(art.names)).tolist())
    yield "\nannotations of a painting   " + ", ".join(f"{n}: {count:,}" for n, count in sorted(counts.items())[:8])
    yield ""
    for emotion, share in zip(art.emotions, art.votes.sum(0) / art.votes.sum(), strict=True):
        yield f"{emotion:16}{share:6.1%} {'#' * round(50 * share)}"
    yield (f"\nwords of an explanation     mean {lengths.mean():.1f}, median {np.median(lengths):.0f}, "
           f"95% up to {np.percentile(lengths, 95):.0f}, longest {lengths.max()}")
    yield (f"vocabulary                  {len(vocabulary):,} words, "
           f"{sum(count >= 5 for count in vocabulary.values()):,} of them five times or more")
    yield f"distinct explanations       {len(set(art.texts)):,}"
    if lexicon:
        known = {word for word in vocabulary if lexicon.lemma(word)}
        yield (f"lexicon coverage            {len(known) / len(vocabulary):.1%} of the vocabulary, "
               f"{sum(vocabulary[word] for word in known) / vocabulary.total():.1%} of all words")
    not_found = [name for name, file in zip(art.names, art.files, strict=True) if file is None]
    for what, items in (("rows skipped", art.problems), ("pictures not found", not_found), ("remarks", art.notes)):
        yield f"{what:28}{len(items):,}"
        yield from (f"    {item}" for item in first_few(items))


def split_table(art: Art) -> list[list[str]]:
    rows = [["split", "paintings", "explained", "explanations", "dominant emotion", "best ACC"]]
    for index, split in enumerate(SPLITS):
        inside, best = art.split == index, best_accuracy(art, split)
        dominant = inside & has_dominant_emotion(art)
        counts = inside.sum(), len(art.paintings(split)), len(art.rows(split)), dominant.sum()
        rows.append([split, *(f"{count:,}" for count in counts), f"{best:.1%}" if best else ""])
    return rows


def show(art: Art, model: SEVLM, captions: Captions, count: int) -> Iterator[str]:
    """The first example of some steps as the model reads it, with the negatives of its first sentence (Eq. 7)."""
    values = model.lexicon.values if model.lexicon else None
    examples = Examples(art, captions, model.text, values, None, np.ones(len(art.names), bool), seed=0)
    epoch = examples.epoch(0, batch=32)
    for index in range(min(count, len(epoch))):
        _, mine, group = epoch.cut(index)
        inputs = epoch.sentences(mine, group)
        names = [art.names[painting] for painting in examples.paintings[mine]]
        said = [model.text.decode(ids) for ids in inputs["ids"].tolist()]
        yield f"\n{names[0]}"
        yield from token_table(model.text, {name: of_all[0] for name, of_all in inputs.items()})
        yield from hanging("other sentence", said[1])
        partners = {sentence: f"{said[sentence]} (of {names[sentence // 2]})" for sentence in range(2, len(said))}
        partners |= {-1: "none in its group", 1: "the other sentence"}
        yield from hanging("wrong emotion", partners[int(inputs["wrong_emotion"][0])])
        yield from hanging("wrong image", partners[int(inputs["wrong_image"][0])])


def hanging(title: str, text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=f"{title:16}", subsequent_indent=" " * 16)


def token_table(text: Text, sentence: Mapping[str, Tensor]) -> Iterator[str]:
    """A sentence, token by token; a token's label is the next one, and only X carries VAD."""
    ids, labels = sentence["ids"].tolist(), sentence["labels"].tolist()
    explains = (sentence["segments"] == text.explanation).tolist()
    yield f"position  {'token':16}{'segment':14}{'label':16}" + "     V      A      D" * ("vad" in sentence)
    token = [text.tokenizer.id_to_token(index).replace("Ġ", "␣") for index in ids]
    for position in range(len(ids) - ids.count(text.pad)):
        predicts = position + 1 < len(ids) and labels[position + 1] != IGNORE
        line = (f"{position:>8}  {token[position]:16}{'explanation' if explains[position] else 'emotion':14}"
                f"{token[position + 1] if predicts else '':16}")
        if "vad" in sentence:
            v, a, d = (sentence["vad"][position] * explains[position]).tolist()
            line += f"{v:+6.2f}{a:+7.2f}{d:+7.2f}"
        yield line.rstrip()


def add_data_options(parser: argparse.ArgumentParser, data: str | None = "toy") -> None:
    """The flags that say where data is, of all programs that read a data set."""
    parser.add_argument("--data", default=data, metavar="NAME",
                        help="toy, artemis_v1, artemis_v2, or a .csv, .jsonl or .json file with image, emotion and "
                             f"explanation (default: {data})")
    parser.add_argument("--data-root", metavar="FOLDER", help="where data sets are (default: $SEVLM_DATA or data/)")
    parser.add_argument("--images", metavar="FOLDER", help="the pictures (default: beside the annotations)")
    parser.add_argument("--lexicon", metavar="FILE", help="NRC VAD lexicon (default: the one beside the annotations)")
    parser.add_argument("--gpt2", default=GPT2_HUB, metavar="SOURCE",
                        help=f"GPT-2: file, folder or hub id (default: {GPT2_HUB})")
    parser.add_argument("--toy-paintings", type=int, default=2000, metavar="N",
                        help="size of the toy world (default: 2000)")


def art_of(options: argparse.Namespace, pictures: bool = True) -> Art:
    """The data set that these flags name."""
    return load_art(options.data, options.data_root, options.images, options.toy_paintings, pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description="What there is in a data set.")
    add_data_options(parser)
    parser.add_argument("--small", action="store_true", help="tokens of the data's own words, not GPT-2's")
    parser.add_argument("--show", type=int, nargs="?", const=1, default=0, metavar="N",
                        help="print N examples as the model reads them, with their negatives")
    options = parser.parse_args()
    art = art_of(options)
    lexicon = find_lexicon(art, options.lexicon, required=False)
    print(printable("\n".join(overview(art, lexicon))))
    try:
        tokenizer = find_tokenizer(art, options.gpt2, options.small)
    except UserError as error:
        if options.show:
            raise
        print(f"Tokens are not counted: {error}")
        return
    config = Config.toy(emotions=art.emotions, vad_input=lexicon is not None, vad_head=lexicon is not None)
    model = SEVLM(config, tokenizer, lexicon)  # only its text and its lexicon are used
    captions = load_captions(art, model)
    print(f"{f'cut at {config.length} tokens':28}{captions.cut.mean():.1%} of the sentences")
    for line in show(art, model, captions, options.show):
        print(printable(line))


if __name__ == "__main__":
    run_program(main)
