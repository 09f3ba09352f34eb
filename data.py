"""From annotation files and pictures on disk to batches: ArtEmis v1 and v2, and a toy world that this file paints.

    1. Rows             annotation files, read row by row; what cannot be used is counted, with line numbers
    2. Text             cleaning of utterances, words, and the length limits of ArtEmis
    3. Splits           the published train/val/test splits, from names alone
    4. Art              a data set: paintings, splits, votes, explanations; cached
    5. Pictures         files under names of any spelling, decoding, and the store of features or pixels
    6. Captions         all explanations as token ids and lexicon rows in one compact array
    7. Batches          paintings with two explanations each, their negatives, for any number of processes
    8. The toy world    paintings with a mood, and annotators who talk about them
    9. What there is    a data set's lexicon and tokenizer, an overview, examples

A row is one annotation: somebody's emotion in front of a painting, and why. Shapes: P paintings, R rows, B pictures
of a batch, N = 2 * B sentences, L tokens. To see what there is in a data set, and some of it as the model sees it:

    python data.py --data toy --show 2
"""
import argparse
import csv
import hashlib
import json
import math
import os
import re
import shutil
import sys
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from sevlm import EMOTIONS, GPT2_HUB, SEVLM, Config, Text, byte_level, find_file, read_tokenizer
from vad import (
    HERE,
    OUR_LEXICON,
    Lexicon,
    UserError,
    WordVAD,
    progress,
    read_lexicon,
    replacing,
    run_program,
    write_text,
)

SPLITS = ("train", "val", "test", "rest")
V1_FILE, V2_FILE, PREPROCESSED_FILE = "artemis_dataset_release_v0.csv", "Contrastive.csv", "artemis_preprocessed.csv"
HOW_TO_GET = """{missing} is not in {folder}. To train on ArtEmis, put these there:
  {v1}   ArtEmis v1.0: ask for it at https://www.artemisdataset.org (research use, its own terms)
  {v2}                      for v2.0: https://www.artemisdataset-v2.org (research use, its own terms)
  wikiart/<art_style>/<painting>.jpg   the WikiArt pictures: https://github.com/cs-chan/ArtGAN (non-commercial use)
Another place: --data-root FOLDER or the environment variable SEVLM_DATA. Without any download: --data toy"""


# 1. Rows

@dataclass
class Rows:
    """Annotations as columns, and what was wrong with the lines that are not among them."""
    style: list[str]
    painting: list[str]
    emotion: list[int]
    text: list[str]
    repetition: list[int]  # how many annotations the painting has
    extra: dict[str, list[str]]  # other columns of the file, where a caller asked for them
    problems: list[str]

    @property
    def keys(self) -> list[str]:
        """ArtEmis's name for a painting: style and name, joined without a separator."""
        return [style + painting for style, painting in zip(self.style, self.painting, strict=True)]


def read_rows(path: Path, text: str = "utterance", extra: Sequence[str] = ()) -> Rows:
    """Read an ArtEmis CSV file with columns in any order. Bad lines are noted, never fatal."""
    wanted = ["art_style", "painting", "emotion", text, "repetition", *extra]
    index_of = {emotion: index for index, emotion in enumerate(EMOTIONS)}
    columns: tuple[list, ...] = tuple([] for _ in wanted)
    problems = []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if lacking := [name for name in wanted if name not in header]:
            raise UserError(f"{path}, line 1: no column {', '.join(lacking)} among {', '.join(header) or 'none'}")
        places = [header.index(name) for name in wanted]
        while True:
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:  # a field without end, say: the next line starts afresh
                problems.append(f"line {reader.line_num}: {error}")
                continue
            if len(row) != len(header):
                if row:  # an empty line is no row
                    problems.append(f"line {reader.line_num}: {len(row)} columns instead of {len(header)}")
                continue
            values = [row[place] for place in places]
            emotion = index_of.get(values[2].strip().lower())
            if emotion is None:
                problems.append(f"line {reader.line_num}: unknown emotion {values[2][:30]!r}")
            elif not values[3].strip():
                problems.append(f"line {reader.line_num}: blank {text}")
            elif not values[4].strip().isdecimal():
                problems.append(f"line {reader.line_num}: repetition is {values[4][:30]!r}")
            else:
                values[2], values[4] = emotion, int(values[4])
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
    return Rows(*columns[:5], dict(zip(extra, columns[5:], strict=True)), problems)


# 2. Text. ArtEmis corrects spelling with tables and SymSpell, which are not ours to copy. What needs no such data we
# do alike: lower case, quotes around a word dropped, contractions expanded, punctuation to blanks. Two differences
# are on purpose: "'d" becomes "would", and a possessive 's stays on its word, as GPT-2 knows it ("the man's").

QUOTES = str.maketrans(dict.fromkeys("’‘‛´`", "'") | dict.fromkeys("“”„«»", '"') | dict.fromkeys("…―", " "))
PUNCTUATION = str.maketrans(dict.fromkeys(".?!,:;/\\-~*_=[–]{}$^@|%#<—>", " "))
CONTRACTIONS = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\b(can|won|shan|ain)'t\b", lambda match: {"can": "cannot", "won": "will not", "shan": "shall not",
                                                  "ain": "am not"}[match[1]]),
    (r"n't\b", " not"), (r"\blet's\b", "let us"), (r"\bi'm\b", "i am"), (r"'re\b", " are"), (r"'ve\b", " have"),
    (r"'ll\b", " will"), (r"\b(i|you|he|she|it|we|they|that|there)'d\b", r"\1 would"),
    (r"\b(he|she|it|that|there|here|what|where|who|how|why|when|so)'s\b", r"\1 is"))]
QUOTED = re.compile(r"['\"](\w+)['\"]")
TREEBANK = re.compile(r"can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|[\"()&]|'(?:s|m|d)?(?![^\s\"()&])|"
                      r"(?:[^\s\"()&']|'(?!(?:s|m|d)?(?![^\s\"()&])))+")
SHORTEST, LONGEST_PERCENTILE = 5, 95  # words; the deep-net setting of ArtEmis


def clean(text: str) -> str:
    text = QUOTED.sub(r" \1 ", text.translate(QUOTES).lower())
    if "'" in text:
        for pattern, replacement in CONTRACTIONS:
            text = pattern.sub(replacement, text)
    return " ".join(text.translate(PUNCTUATION).split())


def words(text: str) -> list[str]:
    """Cleaned text as Treebank tokens: possessive 's, quotes and parentheses are words of their own."""
    return TREEBANK.findall(text)


def length_limit(lengths: np.ndarray, in_training: np.ndarray) -> float:
    """The longest length kept: a percentile of the training rows, short ones still among them."""
    return float(np.percentile(lengths[in_training], LONGEST_PERCENTILE))


# 3. Splits. Each is a function of the paintings' names, so all that read the same files agree.

SEED, TOO_MANY = 2021, 41  # ArtEmis sets its 701 paintings with 41 or more annotations aside
VAL_SHARE, TEST_SHARE = 0.05, 0.1
REST_SHARE = VAL_SHARE + TEST_SHARE  # 0.15000000000000002: the sum as a float decides some sizes


def parted(items: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """`count` random items, and the others, as scikit-learn's train_test_split draws them."""
    order = np.random.RandomState(SEED).permutation(len(items))
    return [items[i] for i in order[:count]], [items[i] for i in order[count:]]


def splits_v1(keys: Sequence[str], repetitions: Sequence[int], too_many: float = TOO_MANY) -> dict[str, str]:
    """Painting -> split: 85 % train, 5 % val, 10 % test, and "rest" for those with too many annotations."""
    usual = sorted({key for key, count in zip(keys, repetitions, strict=True) if count < too_many})
    rest, train = parted(usual, math.ceil(REST_SHARE * len(usual)))
    test, val = parted(rest, round(TEST_SHARE * len(usual)))
    return {**dict.fromkeys(keys, "rest"), **dict.fromkeys(train, "train"), **dict.fromkeys(val, "val"),
            **dict.fromkeys(test, "test")}


def splits_v2(new: Sequence[str], new_repetitions: Sequence[int], anchors: Sequence[str],
              old: Sequence[str], old_repetitions: Sequence[int]) -> dict[str, str]:
    """v2's algorithm over sorted lists (the original iterates Python sets, so no two of its runs agree).

    New paintings of few annotations are evaluated on; the paintings that they were contrasted with are trained on.
    """
    everything = [*new, *old]
    repetition = {key: count for key, count in zip(new, new_repetitions, strict=True) if count < TOO_MANY}
    usual_old = {key for key, count in zip(old, old_repetitions, strict=True) if count < TOO_MANY}
    wanted = int(REST_SHARE * sum(key in repetition for key in new))  # rows to evaluate on
    evaluated: list[str] = []
    for count in range(5, 10):
        if wanted <= 0:
            break
        candidates = sorted(key for key in repetition if repetition[key] == count)
        evaluated += candidates if wanted > count * len(candidates) else candidates[:wanted // count]
        wanted -= count * len(candidates)
    n_test = int(len(evaluated) * (TEST_SHARE / REST_SHARE))
    remaining = sorted(usual_old - repetition.keys())
    n_train = 0.85 * len(remaining)
    usual_anchors = {key for key, n in zip(anchors, new_repetitions, strict=True) if n < TOO_MANY}
    anchored = sorted(usual_anchors - repetition.keys())
    anchored = anchored[max(0, math.ceil(len(anchored) - n_train)):]
    others = sorted(set(remaining) - set(anchored))
    n_rest = len(remaining) * REST_SHARE
    rest, train = parted(others, math.ceil(n_rest / (n_rest + n_train - len(anchored)) * len(others)))
    test, val = parted(rest, math.ceil(TEST_SHARE / REST_SHARE * len(rest)))
    return (dict.fromkeys(everything, "rest") | dict.fromkeys([*repetition, *anchored, *train], "train")
            | dict.fromkeys(val + evaluated[n_test:], "val") | dict.fromkeys(test + evaluated[:n_test], "test"))


# 4. Art

@dataclass
class Art:
    """A data set. Explanations are sorted by painting; those that ArtEmis's length limits drop are not among them."""
    name: str
    folder: Path
    source: str  # which file the splits and texts come from
    names: list[str]  # (P,) "style/painting"
    split: np.ndarray  # (P,) index into SPLITS
    votes: np.ndarray  # (P, 9) annotators for each emotion, over all annotations; the target of ACC
    owner: np.ndarray  # (R,) index of the painting
    emotion: np.ndarray  # (R,) index of the emotion
    texts: list[str]  # (R,)
    problems: list[str]
    dropped: int  # rows beyond the length limits
    files: list[Path | None] = field(default_factory=list)  # (P,) None: no such picture

    def paintings(self, split: str) -> np.ndarray:
        """The split's paintings that have explanations."""
        explained = np.bincount(self.owner, minlength=len(self.names)) > 0
        return np.flatnonzero((self.split == SPLITS.index(split)) & explained)

    def rows(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.split[self.owner] == SPLITS.index(split))

    def rows_of(self, painting: int) -> range:
        return range(*np.searchsorted(self.owner, (painting, painting + 1)))

    def references(self, split: str) -> dict[str, dict]:
        """Painting -> its explanations with their emotions, and all votes, as metrics.py wants them."""
        return {self.names[p]: {"emotions": [EMOTIONS[self.emotion[r]] for r in self.rows_of(p)],
                                "explanations": [self.texts[r] for r in self.rows_of(p)],
                                "votes": self.votes[p].tolist()} for p in self.paintings(split)}


def load_art(name: str, root: str | Path | None = None, images: str | Path | None = None,
             toy_paintings: int = 2000) -> Art:
    """The data set `name` (artemis_v1, artemis_v2 or toy) from `root`, by default data/ or $SEVLM_DATA."""
    root = Path(root or os.environ.get("SEVLM_DATA", "data"))
    if name == "toy":
        folder = root / f"toy-{toy_paintings}"
        if not (folder / "toy.json").is_file():
            paint_toy(folder, toy_paintings)
    elif name in ("artemis_v1", "artemis_v2"):
        folder = root / name if (root / name).is_dir() else root
    else:
        raise UserError(f"unknown data {name!r}; there are artemis_v1, artemis_v2 and toy")
    sources = [folder / file for file in (PREPROCESSED_FILE, *JSON_FILES.values(), V1_FILE, V2_FILE)]
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources if path.is_file()]
    arrays = cached(folder / "cache" / f"{name}.npz", fingerprint(name, stamps), lambda: pack(read_art(name, folder)))
    art = unpack(arrays, name, folder)
    pictures = Path(images) if images else folder / "wikiart"
    if not pictures.is_dir():
        raise UserError(HOW_TO_GET.format(missing=f"{pictures.name}/", folder=pictures.parent, v1=V1_FILE, v2=V2_FILE))
    art.files = find_pictures(pictures, art.names)
    return art


def read_art(name: str, folder: Path) -> Art:
    """From the best source in the folder: ArtEmis's own preprocessing, the authors' JSON, or the raw CSV."""
    preprocessed, raw, new = folder / PREPROCESSED_FILE, folder / V1_FILE, folder / V2_FILE
    if preprocessed.is_file():
        return from_preprocessed(name, folder)
    if all((folder / file).is_file() for file in JSON_FILES.values()):
        return from_json(name, folder)
    for path in (raw, new) if name == "artemis_v2" else (raw,):
        if not path.is_file():
            raise UserError(HOW_TO_GET.format(missing=path.name, folder=folder, v1=V1_FILE, v2=V2_FILE))
    rows = read_rows(raw)
    if name != "artemis_v2":
        return assemble(name, folder, raw.name, rows, splits_v1(rows.keys, rows.repetition), clean)
    fresh = read_rows(new, extra=["anchor_art_style", "anchor_painting"])
    for table in (rows, fresh):
        table.painting = [unicodedata.normalize("NFD", painting) for painting in table.painting]
    anchors = [style + unicodedata.normalize("NFD", painting)
               for style, painting in zip(*fresh.extra.values(), strict=True)]
    splits = splits_v2(fresh.keys, fresh.repetition, anchors, rows.keys, rows.repetition)
    both = Rows(fresh.style + rows.style, fresh.painting + rows.painting, fresh.emotion + rows.emotion,
                fresh.text + rows.text, fresh.repetition + rows.repetition,
                {"version": ["new"] * len(fresh.text) + ["old"] * len(rows.text)},
                [f"{file.name}, {problem}" for file, table in ((new, fresh), (raw, rows))
                 for problem in table.problems])
    return assemble(name, folder, f"{new.name} and {raw.name}", both, splits, clean)


def assemble(name: str, folder: Path, source: str, rows: Rows, splits: dict[str, str] | None,
             cleaning: Callable[[str], str] | None) -> Art:
    """Rows to a data set: clean, drop by length, vote. Without `cleaning` rows are kept as they are."""
    keys, texts = rows.keys, rows.text
    split = np.array([SPLITS.index(splits[key]) for key in keys], np.int8)
    kept = np.ones(len(texts), bool)
    if cleaning:
        texts = [cleaning(text) for text in texts]
        lengths = np.array([len(words(text)) for text in texts])
        kept = (lengths >= SHORTEST) & (lengths <= length_limit(lengths, split == SPLITS.index("train")))
    dropped = int((~kept).sum())
    if "version" in rows.extra:
        kept &= combined(np.array(rows.extra["version"]) == "new", kept, split, np.array(keys))
    paths = [f"{style}/{painting}" for style, painting in zip(rows.style, rows.painting, strict=True)]
    names, owner = np.unique(np.array(paths, dtype=object), return_inverse=True)
    votes = np.zeros((len(names), len(EMOTIONS)), np.float32)
    np.add.at(votes, (owner, rows.emotion), 1)
    split_of = np.zeros(len(names), np.int8)
    split_of[owner] = split
    order = np.flatnonzero(kept)[np.argsort(owner[kept], kind="stable")]
    return Art(name, folder, source, names.tolist(), split_of, votes, owner[order].astype(np.int32),
               np.array(rows.emotion, np.int8)[order], [texts[i] for i in order], rows.problems, dropped)


def combined(new: np.ndarray, kept: np.ndarray, split: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """v2's "Combined" rows: all new ones and as many old; tested on the old ones of half the old test paintings."""
    usual, test = split != SPLITS.index("rest"), split == SPLITS.index("test")
    old = np.concatenate([np.flatnonzero(kept & ~new & usual), np.flatnonzero(kept & ~new & ~usual)])  # their order
    sample = np.random.RandomState(42).permutation(len(old))[:(kept & new).sum()]
    chosen = kept & new
    chosen[old[sample]] = True
    tested = np.unique(keys[kept & ~new & test])
    half = tested[np.random.RandomState(42).permutation(len(tested))[:len(tested) // 2]]
    return np.where(~new & test, np.isin(keys, half), chosen)


def from_preprocessed(name: str, folder: Path) -> Art:
    """`artemis_preprocessed.csv`: its splits and its spelling, as they are."""
    path, raw = folder / PREPROCESSED_FILE, folder / V1_FILE
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        header = next(csv.reader(file), [])
    if name == "artemis_v2" and "version" not in header:
        raise UserError(f"{path} is of ArtEmis v1 (no column version); v2's comes from the artemis-v2 code")
    already = "grounding_emotion" in header  # a file of combined/: the old rows have been sampled
    version = ["version"] if "version" in header and not already else []
    rows = read_rows(path, text="utterance_spelled", extra=["split", *version])
    splits = dict(zip(rows.keys, rows.extra.pop("split"), strict=True))
    art = assemble(name, folder, path.name, rows, splits, None)
    if raw.is_file() and name == "artemis_v1":  # ACC counts the votes of all annotations, dropped ones too
        everything = read_rows(raw)
        place = {painting: index for index, painting in enumerate(art.names)}
        voters = [place.get(f"{s}/{p}", -1) for s, p in zip(everything.style, everything.painting, strict=True)]
        known = np.array(voters) >= 0
        art.votes[:] = 0
        np.add.at(art.votes, (np.array(voters)[known], np.array(everything.emotion)[known]), 1)
    return art


JSON_FILES = {split: f"artEmisX_{split}.json" for split in ("train", "val", "test")}


def from_json(name: str, folder: Path) -> Art:
    """The SEVLM authors' files: {id: {emotions, explanations, image_name, origin_emotion_distribution}}."""
    names, split, votes, owner, emotion, texts, problems = [], [], [], [], [], [], []
    for part, file in JSON_FILES.items():
        for identity, item in json.loads((folder / file).read_text(encoding="utf-8")).items():
            try:
                pairs = list(zip(item["emotions"], item["explanations"], strict=True))
                emotions = [EMOTIONS.index(label) for label, _ in pairs]
                image, shares = item["image_name"][:-4], item["origin_emotion_distribution"]
            except (KeyError, ValueError) as error:
                problems.append(f"{file}, id {identity}: {error}")
                continue
            owner += [len(names)] * len(pairs)
            emotion += emotions
            texts += [text for _, text in pairs]
            names.append(image)
            split.append(SPLITS.index(part))
            votes.append(shares)
    return Art(name, folder, ", ".join(JSON_FILES.values()), names, np.array(split, np.int8),
               np.array(votes, np.float32), np.array(owner, np.int32), np.array(emotion, np.int8), texts, problems, 0)


LISTS, ARRAYS = ("names", "texts", "problems"), ("split", "votes", "owner", "emotion")


def pack(art: Art) -> dict[str, np.ndarray]:
    """As arrays for the cache; strings, which hold no line break, as one long text."""
    lists = {name: np.frombuffer("\n".join(getattr(art, name)).encode(), np.uint8) for name in LISTS}
    return lists | {name: getattr(art, name) for name in ARRAYS} | {
        "source": np.array(art.source), "dropped": np.array(art.dropped)}


def unpack(arrays: dict[str, np.ndarray], name: str, folder: Path) -> Art:
    lists = {key: text.split("\n") if (text := arrays[key].tobytes().decode()) else [] for key in LISTS}
    return Art(name, folder, str(arrays["source"]), **lists, **{key: arrays[key] for key in ARRAYS},
               dropped=int(arrays["dropped"]))


def fingerprint(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def cached(path: Path, key: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from a file if it was made from the same things (`key`), else built and stored."""
    try:
        with np.load(path) as stored:
            if str(stored["key"]) == key:
                return {name: stored[name] for name in stored.files}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        pass  # none yet, or damaged: build it
    arrays = build()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, key=np.array(key), **arrays)
    return arrays


# 5. Pictures

class BadPicture(Exception):
    """A picture that cannot be used, and why."""


def spelling(name: str) -> str:
    """A file name with its escapes (#U00e9, and \\u0142 beyond Latin-1) resolved, in composed form."""
    if "#U" in name or "\\u" in name:
        name = re.sub(r"(?:#U|\\u)([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), name)
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def find_pictures(folder: Path, names: Sequence[str]) -> list[Path | None]:
    """Each painting's file. Names on disk may be escaped, (de)composed, or right where ArtEmis's are mojibake."""
    files: dict[str, Path] = {}
    for style in os.scandir(folder):
        if not style.is_dir():
            continue
        for entry in os.scandir(style):
            name = spelling(f"{style.name}/{os.path.splitext(entry.name)[0]}")
            files.setdefault(name, Path(entry.path))
            if not name.isascii():  # ArtEmis's form of a wrongly decoded name: é -> Ã© -> ã©
                for form in ("NFC", "NFD"):
                    wrong = unicodedata.normalize(form, name).encode().decode("latin-1").lower()
                    files.setdefault(spelling(f"{style.name}/{wrong.split('/', 1)[1]}"), Path(entry.path))
    return [files.get(spelling(name)) for name in names]


LARGEST = 100_000_000  # pixels; ArtEmis's copies have at most 360,000


def open_picture(source, side: int) -> Image.Image:
    """Any picture as RGB, upright, alpha over white; JPEGs are decoded at a scale near twice `side`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of size: the next line refuses
            image = Image.open(source)
        if image.width * image.height > LARGEST:
            raise BadPicture(f"{image.width} x {image.height} pixels are too many")
        image.draft(image.mode, (2 * side, 2 * side))
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16 or 32 bits a pixel
            grey = np.asarray(image, np.float32)
            image = Image.fromarray((grey * (255 / 65535 if grey.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except BadPicture:
        raise
    except FileNotFoundError:
        raise BadPicture("no such file") from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise nearly anything on broken files
        raise BadPicture(f"{type(error).__name__}: {str(error)[:100]}") from None


def load_pixels(source, config: Config) -> Tensor:
    """A picture file or stream as uint8 pixels (3, S, S): the whole picture squashed, or its central square.

    Bit for bit what torchvision's transforms give; to import those would take as long as all else at a start.
    """
    image, side = open_picture(source, config.image_size), config.image_size
    width, height = image.size
    short = min(width, height)
    size = (side * width // short, side * height // short) if config.crop else (side, side)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)
    image = image.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


PIXEL_STATISTICS = {  # mean and deviation of red, green and blue
    False: ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # CLIP
    True: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet
}


def normalise(pixels: Tensor, config: Config) -> Tensor:
    """uint8 pixels to what the tower expects; features pass unchanged: (B, ...) -> (B, ...)."""
    if pixels.dtype != torch.uint8:
        return pixels
    mean, deviation = (torch.tensor(values, device=pixels.device).view(3, 1, 1)
                       for values in PIXEL_STATISTICS[config.imagenet_pixels])
    return (pixels / 255 - mean) / deviation


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


class Store:
    """One array on disk with every painting's features (fp16, frozen tower) or pixels (uint8, tower in training).

    The pass that fills it can be interrupted at any moment: `done` says which paintings are in.
    """

    def __init__(self, path: Path, art: Art, model: SEVLM, features: bool):
        config = model.config
        self.path, self.files, self.model, self.features = path, art.files, model, features
        patches = (config.image_size // config.patch_size) ** 2
        item = (patches, config.tower_width) if features else (3, config.image_size, config.image_size)
        self.shape, self.dtype = (len(art.names), *item), np.float16 if features else np.uint8
        self.key = fingerprint(art.names, self.shape, config.crop, config.imagenet_pixels if features else None,
                               tower_fingerprint(model) if features else None)
        self.problems: dict[int, str] = {}

    def open(self) -> "Store":
        """Open the array, or make an empty one if there is none and the disk has room."""
        self.done_path, meta = self.path.with_suffix(".done.npy"), self.path.with_suffix(".json")
        if meta.is_file() and self.path.is_file():
            if json.loads(meta.read_text()).get("key") != self.key:
                raise UserError(f"{self.path} was made with another vision tower, preprocessing or list of paintings. "
                                f"Delete it to make it anew, or give another folder with --cache")
        else:
            size = int(np.prod(self.shape)) * self.dtype().nbytes
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
            if size > 0.98 * free:
                raise UserError(f"{self.path} needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free. Make room, "
                                f"give another folder with --cache, or use --cache off")
            np.lib.format.open_memmap(self.path, "w+", self.dtype, self.shape)
            np.lib.format.open_memmap(self.done_path, "w+", np.bool_, self.shape[:1])
            write_text(meta, json.dumps({"key": self.key}))
        self.array = np.lib.format.open_memmap(self.path, "r+")
        self.done = np.lib.format.open_memmap(self.done_path, "r+")
        return self

    @torch.no_grad()
    def fill(self, workers: int = 0, batch: int = 32, part: int = 0, parts: int = 1) -> "Store":
        """Decode (and encode) what is missing, one of `parts` processes its part; unusable pictures stay missing."""
        missing = [p for p in np.flatnonzero(~self.done) if self.files[p]][part::parts]
        self.problems = {p: "no such file" for p in np.flatnonzero(~self.done) if not self.files[p]}
        loader = torch.utils.data.DataLoader(PictureFiles([self.files[p] for p in missing], self.model.config), batch,
                                             num_workers=workers, collate_fn=list)
        what = "encoding pictures" if self.features else "decoding pictures"
        for start, loaded in zip(range(0, len(missing), batch), progress(loader, f"{what}, x{batch}"), strict=True):
            found = dict(zip(missing[start:start + batch], loaded, strict=True))
            self.problems |= {p: pixels for p, pixels in found.items() if isinstance(pixels, str)}
            good = [p for p, pixels in found.items() if not isinstance(pixels, str)]
            if good:
                self.array[good] = self.encode(torch.stack([found[p] for p in good]))
                self.done[good] = True
        return self

    def encode(self, pixels: Tensor) -> np.ndarray:
        if not self.features:
            return pixels.numpy()
        device = self.model.device
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            return self.model.tower(normalise(pixels.to(device), self.model.config)).half().cpu().numpy()

    def usable(self) -> np.ndarray:
        """(P,) which paintings have a picture."""
        return np.array(self.done)

    def get(self, paintings: np.ndarray) -> tuple[Tensor, dict[int, str]]:
        """These paintings' arrays, and what was wrong with pictures that could not be read just now: nothing."""
        return torch.from_numpy(self.array[paintings]), {}


class OnTheFly:
    """The same without a cache: pictures are decoded when asked for, and each is encoded once in its batch."""

    def __init__(self, art: Art, config: Config):
        self.pictures = PictureFiles(art.files, config)
        self.problems = {p: "no such file" for p in np.flatnonzero(~self.usable())}

    def usable(self) -> np.ndarray:
        return np.array([file is not None for file in self.pictures.files])

    def get(self, paintings: np.ndarray) -> tuple[Tensor, dict[int, str]]:
        """Broken pictures are left out of the array and named beside it."""
        loaded = {int(p): self.pictures[p] for p in paintings}
        problems = {p: pixels for p, pixels in loaded.items() if isinstance(pixels, str)}
        pixels = [pixels for p, pixels in loaded.items() if p not in problems]
        side = self.pictures.config.image_size
        return torch.stack(pixels) if pixels else torch.empty(0, 3, side, side, dtype=torch.uint8), problems


def tower_fingerprint(model: SEVLM) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.tower.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# 6. Captions

@dataclass
class Captions:
    """Every explanation of a data set as the model reads it."""
    ids: np.ndarray  # (R, L) padded
    starts: np.ndarray  # (R,) where X begins
    rows: np.ndarray  # (R, L) WordVAD's lexicon rows
    labels: np.ndarray  # (R,) how many tokens are to be predicted
    known: np.ndarray  # (R,) how many of X's words the lexicon knows
    cut: np.ndarray  # (R,) sentences that lost their end


def load_captions(art: Art, model: SEVLM) -> Captions:
    """Tokenise all explanations, or read them from the cache if data, tokenizer, lexicon and settings are the same."""
    config, text = model.config, model.text
    tables = hashlib.sha256()
    for table in model.word_vad.buffers() if config.uses_vad else ():
        tables.update(table.cpu().numpy().tobytes())
    key = fingerprint("\n".join(art.texts), art.emotion.tobytes(), text.tokenizer.to_str(), tables.digest(),
                      config.length, config.fixed_boundary)

    def build() -> dict[str, np.ndarray]:
        ids, starts = text.encode([EMOTIONS[e] for e in art.emotion], art.texts, config.length)
        rows = model.word_vad(ids.to(model.device)).cpu() if config.uses_vad else torch.zeros_like(ids)
        explanation = model.in_explanation(ids, text.segments(starts, config.length))
        small = np.uint16 if text.size <= 2**16 else np.int32
        return dict(ids=ids.numpy().astype(small), starts=starts.numpy().astype(np.uint8),
                    rows=rows.numpy().astype(np.int32), labels=(ids[:, 1:] != text.pad).sum(1).numpy().astype(np.int32),
                    known=((rows > 0) & explanation)[:, 1:].sum(1).numpy().astype(np.int32),
                    cut=((ids[:, -1] != text.pad) & (ids[:, -1] != text.end)).numpy())
    arrays = cached(art.folder / "cache" / f"{art.name}-captions.npz", key, build)
    return Captions(**{name: arrays[name] for name in Captions.__dataclass_fields__})


# 7. Batches. A step's batch is cut into parts, one for each process and each accumulation step. Negatives are drawn
# within groups of a few paintings that no cut divides, and losses are weighted by each part's share of the step, so
# that any number of parts computes the same gradient.

GROUP = 4  # paintings; one "wrong image" is drawn, and from three others it is as random as from thirty-one


@dataclass
class Batch:
    """A part of a step: B pictures with two sentences each, side by side."""
    paintings: np.ndarray  # (B,)
    pictures: Tensor  # uint8 pixels (B, 3, S, S) or features (B, K, d)
    inputs: dict[str, Tensor]  # the other arguments of the model's forward pass, (N, ...)
    shares: dict[str, float]  # for each loss, this part's share of the step's terms
    problems: dict[int, str]  # paintings left out, and why

    def pin_memory(self) -> "Batch":
        return self.mapped(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        inputs = {name: change(tensor) for name, tensor in self.inputs.items()}
        return Batch(self.paintings, change(self.pictures), inputs, self.shares, self.problems)


def pick(eligible: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """A random True column of each row, by a number in [0, 1) for each; -1 where there is none."""
    count = eligible.sum(1)
    place = (eligible.cumsum(1) > (uniform * count).astype(int)[:, None]).argmax(1)
    return np.where(count > 0, place, -1)


class Examples:
    """The paintings to train on. An example is a painting with two annotations, of different emotions if it has them.

    What is drawn in an epoch is a function of (seed, epoch) alone, so it is the same in every process, for any
    number of workers, and after resuming anywhere.
    """

    def __init__(self, art: Art, captions: Captions, text: Text, pictures: "Store | OnTheFly", seed: int,
                 drop_single_emotion: bool = False, trim: bool = True):
        self.captions, self.text, self.pictures, self.seed, self.emotion = captions, text, pictures, seed, art.emotion
        self.trim = trim  # cut a batch's padding to its longest sentence
        paintings = art.paintings("train")
        paintings = paintings[pictures.usable()[paintings]]
        first = np.searchsorted(art.owner, paintings)
        count = np.searchsorted(art.owner, paintings, side="right") - first
        columns = np.arange(count.max(initial=1))
        valid = columns < count[:, None]
        emotions = np.where(valid, art.emotion[np.minimum(first[:, None] + columns, len(art.emotion) - 1)], -1)
        if drop_single_emotion:  # as the authors do
            several = (valid & (emotions != emotions[:, :1])).any(1)
            paintings, first, count, emotions = paintings[several], first[several], count[several], emotions[several]
        if len(paintings) == 0:
            raise UserError(f"{art.name} has no training painting with a picture and an explanation")
        self.paintings, self.first, self.count, self.emotions = paintings, first, count, emotions

    def __len__(self) -> int:
        return len(self.paintings)

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An epoch's order (P,), annotations (P, 2) as rows, and uniform numbers (P, 2, 2) for the negatives."""
        rng = np.random.default_rng([self.seed, epoch])
        order, uniform = rng.permutation(len(self)), rng.random(len(self))
        turn = np.random.default_rng(self.seed).integers(self.count)  # whose turn it is in epoch 0
        first = (turn + epoch) % self.count  # all annotations of a painting get their turn
        everyone = np.arange(len(self))
        same = self.emotions == self.emotions[everyone, first][:, None]
        second = pick(~same & (self.emotions >= 0), uniform)
        itself = np.arange(self.emotions.shape[1]) == first[:, None]
        second = np.where(second >= 0, second, pick(same & ~itself, uniform))  # all of one emotion: another voice
        second = np.where(second >= 0, second, first)  # one annotation
        return order, np.stack([first, second], 1) + self.first[:, None], rng.random((len(self), 2, 2))

    def epoch(self, epoch: int, batch: int, part: int = 0, parts: int = 1, accumulate: int = 1) -> "Epoch":
        return Epoch(self, epoch, batch, part, parts, accumulate)


class Epoch(torch.utils.data.Dataset):
    """What one of `parts` processes computes in an epoch: `accumulate` batches for each step of `batch` paintings."""

    def __init__(self, examples: Examples, epoch: int, batch: int, part: int, parts: int, accumulate: int):
        self.examples, self.batch, self.accumulate, self.part, self.parts = examples, batch, accumulate, part, parts
        self.order, self.pairs, self.uniform = examples.draw(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch) * self.accumulate

    def __getitem__(self, index: int) -> Batch:
        step, turn = divmod(index, self.accumulate)
        everyone = self.order[step * self.batch:(step + 1) * self.batch]  # (B of the whole step,)
        groups = np.array_split(everyone, max(1, len(everyone) // GROUP))
        mine = np.array_split(np.arange(len(groups)), self.parts * self.accumulate)[self.part * self.accumulate + turn]
        idle = len(mine) == 0  # more parts than groups: take part without weight
        mine = [0] if idle else mine
        group = np.concatenate([np.full(len(groups[g]), g) for g in mine])
        chosen = np.concatenate([groups[g] for g in mine])
        pictures, problems = self.examples.pictures.get(self.examples.paintings[chosen])
        if problems:
            usable = ~np.isin(self.examples.paintings[chosen], list(problems))
            if not usable.any():  # a black picture, without weight, keeps the processes in step
                idle, usable[0], pictures = True, True, pictures.new_zeros(1, *pictures.shape[1:])
            chosen, group = chosen[usable], group[usable]
        captions, rows = self.examples.captions, self.pairs[chosen].ravel()  # (N,)
        whole = self.pairs[everyone].ravel()
        shares = dict(language=captions.labels[rows].sum() / max(1, captions.labels[whole].sum()),
                      vad=captions.known[rows].sum() / max(1, captions.known[whole].sum()),
                      contrastive=len(rows) / len(whole))
        return Batch(self.examples.paintings[chosen], pictures, self.inputs(rows, group, self.uniform[chosen]),
                     {name: 0.0 if idle else float(share) for name, share in shares.items()}, problems)

    def inputs(self, rows: np.ndarray, group: np.ndarray, uniform: np.ndarray) -> dict[str, Tensor]:
        captions, text = self.examples.captions, self.examples.text
        length = 1 + captions.labels[rows].max() if self.examples.trim else captions.ids.shape[1]
        ids = torch.from_numpy(captions.ids[rows, :length].astype(np.int64))
        starts = torch.from_numpy(captions.starts[rows].astype(np.int64))
        wrong_emotion, wrong_image = negatives(self.examples.emotion[rows], group, uniform)
        return dict(ids=ids, segments=text.segments(starts, ids.shape[1]), labels=text.labels(ids),
                    rows=torch.from_numpy(captions.rows[rows, :length]),
                    wrong_emotion=torch.from_numpy(wrong_emotion),
                    wrong_image=torch.from_numpy(wrong_image))


def negatives(emotion: np.ndarray, group: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each sentence (N,) a wrong-emotion and a wrong-image partner of its group, as indices; -1: there is none.

    Wrong emotion is the sibling on the same image, or where that has the same emotion, a sentence of another
    painting with another emotion. Wrong image is the same sibling of another painting.
    """
    sentence = np.arange(len(emotion))
    painting, uniform = sentence // 2, uniform.reshape(-1, 2)
    stranger = (group[painting][:, None] == group[painting]) & (painting[:, None] != painting)  # (N, N)
    sibling = sentence ^ 1
    wrong_emotion = pick(stranger & (emotion[:, None] != emotion), uniform[:, 0])
    wrong_emotion = np.where(emotion[sibling] != emotion, sibling, wrong_emotion)
    return wrong_emotion, pick(stranger & (sentence[:, None] % 2 == sentence % 2), uniform[:, 1])


def loader(dataset, workers: int, device: torch.device, start: int = 0) -> torch.utils.data.DataLoader:
    """Batches from `start` on, prepared ahead by worker processes while the device computes."""
    return torch.utils.data.DataLoader(dataset, batch_size=None, sampler=range(start, len(dataset)),
                                       num_workers=workers, pin_memory=device.type == "cuda")


class PictureBatches(torch.utils.data.Dataset):
    """Paintings to be looked at, a batch at a time: (indices that can be seen, pictures, problems)."""

    def __init__(self, pictures: "Store | OnTheFly", paintings: np.ndarray, batch: int):
        self.pictures = pictures
        paintings = paintings[pictures.usable()[paintings]]
        self.batches = [paintings[start:start + batch] for start in range(0, len(paintings), batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Tensor, dict[int, str]]:
        pictures, problems = self.pictures.get(self.batches[index])
        return np.array([p for p in self.batches[index] if p not in problems], dtype=int), pictures, problems


# 8. The toy world. A painting's latent mood (valence, arousal, dominance) decides palette, light, contrast, turbulence
# and scale; a subject decides what is there. Annotators feel the emotion whose prototype is near the mood, each with
# doubts of their own, and explain it with the emotion's words and what is to be seen.

TOY_VERSION, TOY_SIDE, TOY_WORDS = 1, 96, 1000
GRAMMAR = HERE / "examples" / "toy_grammar.txt"
PROTOTYPES = np.array([  # the nine emotions as (v, a, d), in the order of EMOTIONS
    (.7, .3, .35), (.55, .45, -.5), (.7, -.65, .15), (.6, .85, .4),
    (-.65, .8, .5), (-.75, .15, .05), (-.65, .65, -.7), (-.6, -.55, -.5), (0, -.1, 0)])
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


def colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV to RGB, all in 0..1."""
    ramp = np.abs((np.array([0, 4, 2]) / 6 + hue) % 1 * 6 - 3) - 1
    return np.clip(value, 0, 1) * (1 + np.clip(saturation, 0, 1) * (np.clip(ramp, 0, 1) - 1))


def noise(rng: np.random.Generator, side: int, octaves: int, roughness: float) -> np.ndarray:
    """Fractal noise (side, side), about -1..1."""
    layers = [rng.uniform(-1, 1, (2**i + 1, 2**i + 1)).astype(np.float32) for i in range(1, octaves + 1)]
    weights = roughness ** np.arange(octaves)
    fields = [np.asarray(Image.fromarray(layer).resize((side, side), Image.Resampling.BICUBIC)) for layer in layers]
    return np.tensordot(weights / weights.sum(), fields, 1)


def paint(mood: np.ndarray, subject: str, palette: str, rng: np.random.Generator, side: int = TOY_SIDE) -> Image.Image:
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


def brush(image: Image.Image, rng: np.random.Generator, turbulence: float, length: float, width: float,
          count: int) -> None:
    """Short strokes in the colours below them, along a field that arousal stirs up."""
    side, pixels, draw = image.width, np.asarray(image).astype(float), ImageDraw.Draw(image)
    angles = noise(rng, side, 3, .6) * math.pi * (.15 + 1.6 * turbulence)
    middle = rng.random((count, 2)) * side
    column, row = middle.astype(int).T
    half = np.stack([np.cos(angles[row, column]), np.sin(angles[row, column])], 1) * length * side / 2
    shades = pixels[row, column] + rng.normal(0, 9 + 9 * turbulence, (count, 1)) + rng.normal(0, 5, (count, 3))
    lines = np.concatenate([middle - half, middle + half], 1).tolist()
    for line, shade in zip(lines, shades.clip(0, 255).astype(int).tolist(), strict=True):
        draw.line(line, tuple(shade), max(1, round(width * side)))


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


@cache
def grammar() -> dict[str, list[str]]:
    rules: dict[str, list[str]] = {}
    for line in GRAMMAR.read_text().splitlines():
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


def feelings(mood: np.ndarray) -> np.ndarray:
    """How likely each of the nine emotions is in front of a painting of this mood."""
    near = np.exp(-((PROTOTYPES - mood) ** 2).sum(1) / (2 * DOUBT**2))
    return near / near.sum()


def toy_painting(number: int) -> tuple[str, str, list[tuple[int, str]], int, Image.Image]:
    """Everything about one painting: style, name, its annotations, the likeliest emotion, and the picture."""
    rng = np.random.default_rng([TOY_VERSION, number])
    mood = np.clip(PROTOTYPES[rng.choice(9, p=FREQUENCY)] + rng.normal(0, MOOD_SPREAD, 3), -1, 1)
    suits = np.array([np.exp(-((np.array(fitting) - mood) ** 2).sum() / .12) for _, _, fitting in PALETTES.values()])
    palette = list(PALETTES)[rng.choice(len(PALETTES), p=suits / suits.sum())]
    subject = list(SHAPES)[rng.integers(len(SHAPES))]
    size = "high" if mood[2] > .3 else "low" if mood[2] < -.3 else "middle"
    annotations = []
    for emotion in rng.choice(9, size=rng.integers(5, 8), p=feelings(mood)):
        text = tell("sentence", dict(thing=subject, color=palette, size=size, emotion=EMOTIONS[emotion]), rng)
        text = text[0].upper() + text[1:] if rng.random() < .5 else text
        annotations.append((int(emotion), text + "." * (rng.random() < .5)))
    name = f"{ARTISTS[rng.integers(len(ARTISTS))]}_{palette}-{subject}-{number:05}-{rng.integers(1860, 1940)}"
    style = STYLES[rng.integers(len(STYLES))]
    return style, name, annotations, int(feelings(mood).argmax()), paint(mood, subject, palette, rng)


def paint_toy(folder: Path, count: int) -> None:
    """The toy world as files in ArtEmis's layout: CSV, pictures, lexicon, tokenizer, and what the best can reach."""
    if count < 20:
        raise UserError(f"--toy-paintings {count}: at least 20 are needed for three splits")
    print(f"Painting {count:,} pictures for the toy world in {folder}", flush=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    for style in STYLES:
        (temporary / "wikiart" / style).mkdir(parents=True)
    lines, keys, hits = [], [], {}
    method = "fork" if sys.platform == "linux" else "spawn"  # fork needs no second import
    with get_context(method).Pool(min(8, os.cpu_count() or 1)) as pool:
        paintings = progress(pool.imap(toy_painting, range(count), 32), "painting", count)
        for style, name, annotations, likeliest, image in paintings:
            image.save(temporary / "wikiart" / style / f"{name}.jpg", quality=92)
            lines += [(style, name, EMOTIONS[emotion], text, len(annotations)) for emotion, text in annotations]
            votes = Counter(emotion for emotion, _ in annotations)
            favourite, most = votes.most_common(1)[0]
            if 2 * most > len(annotations):  # a dominant emotion: a target of ACC
                hits[style + name] = favourite == likeliest
            keys.append(style + name)
    with open(temporary / V1_FILE, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("art_style", "painting", "emotion", "utterance", "repetition"), *lines])
    shutil.copy(OUR_LEXICON, temporary / "lexicon.txt")
    toy_tokenizer(f" {opening}{clean(text)}" for _, _, emotion, text, _ in lines
                  for opening in ("", f"the emotion is {emotion} because ")).save(str(temporary / "tokenizer.json"))
    splits = splits_v1(keys, [5] * count)
    best = {split: [hits[key] for key in keys if splits[key] == split and key in hits] for split in SPLITS[:3]}
    (temporary / "toy.json").write_text(json.dumps({
        "version": TOY_VERSION, "paintings": count,
        "best_accuracy": {split: float(np.mean(right)) for split, right in best.items() if right},
        "with_dominant_emotion": {split: len(right) for split, right in best.items()}}, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def toy_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Byte-level BPE of about 1,000 entries."""
    tokenizer = byte_level(models.BPE())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=TOY_WORDS, special_tokens=["<|endoftext|>", *Text.ADDED], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def best_accuracy(art: Art, split: str) -> float | None:
    """The ACC of somebody who knows the toy paintings' moods; None for data whose moods nobody knows."""
    path = art.folder / "toy.json"
    return json.loads(path.read_text())["best_accuracy"].get(split) if path.is_file() else None


# 9. What there is

def find_lexicon(art: Art, path: str | Path | None) -> Lexicon:
    """The lexicon to use with a data set: the one named, or one that lies with the data."""
    if path:
        return read_lexicon(path)
    found = [*art.folder.glob("lexicon.txt"), *sorted(art.folder.glob("*NRC-VAD*.txt"), reverse=True)]
    if not found:
        raise UserError(
            f"no VAD lexicon in {art.folder}. Get NRC VAD at https://saifmohammad.com/WebPages/nrc-vad.html "
            "(research use, no redistribution) and put its .txt file there, or name it with --lexicon; "
            "without VAD: --no-vad-input --no-vad-head")
    return read_lexicon(found[0])


def find_tokenizer(art: Art, gpt2: str) -> Tokenizer:
    """The data set's own tokenizer, or GPT-2's."""
    if (art.folder / "tokenizer.json").is_file():
        return read_tokenizer(art.folder)
    return read_tokenizer(find_file(gpt2, ["tokenizer.json", "vocab.json"], "--gpt2").parent)


def overview(art: Art, lexicon: Lexicon | None) -> str:
    """A page about a data set."""
    lengths = np.array([len(words(text)) for text in art.texts])
    vocabulary = Counter(word for text in art.texts for word in words(text))
    each = np.bincount(art.owner, minlength=len(art.names))
    shares = art.votes.sum(0) / art.votes.sum()
    majority = art.votes.max(1) > art.votes.sum(1) / 2
    lines = [f"{art.name}: {len(art.texts):,} explanations of {len(art.names):,} paintings, from {art.source}",
             f"dropped by length   {art.dropped:,} rows", ""]
    lines.append("split     paintings  explained  explanations  dominant emotion  best ACC")
    for index, split in enumerate(SPLITS):
        inside, best = art.split == index, best_accuracy(art, split)
        lines.append(f"{split:8}{inside.sum():>11,}{len(art.paintings(split)):>11,}{len(art.rows(split)):>14,}"
                     f"{(inside & majority).sum():>18,}{f'{best:.1%}' if best else '':>10}")
    counts = sorted(Counter(each.tolist()).items())[:12]
    lines += ["", "annotations of a painting   " + ", ".join(f"{n}: {count:,}" for n, count in counts), ""]
    lines += [f"{emotion:16}{share:6.1%} {'#' * round(100 * share)}"
              for emotion, share in zip(EMOTIONS, shares, strict=True)]
    lines += ["", (f"words of an explanation     mean {lengths.mean():.1f}, median {np.median(lengths):.0f}, "
                   f"95% up to {np.percentile(lengths, 95):.0f}, longest {lengths.max()}"),
              (f"vocabulary                  {len(vocabulary):,} words, "
               f"{sum(count >= 5 for count in vocabulary.values()):,} of them five times or more"),
              f"distinct explanations       {len(set(art.texts)):,}"]
    if lexicon:
        known = {word for word in vocabulary if lexicon.lemma(word)}
        lines.append(f"lexicon coverage            {len(known) / len(vocabulary):.1%} of the vocabulary, "
                     f"{sum(vocabulary[word] for word in known) / vocabulary.total():.1%} of all words")
    missing = [name for name, file in zip(art.names, art.files, strict=True) if file is None]
    for what, items in (("rows skipped", art.problems), ("pictures not found", missing)):
        lines.append(f"{what:28}{len(items):,}")
        lines += [f"    {item}" for item in items[:10]] + (["    ..."] if len(items) > 10 else [])
    return "\n".join(lines)


def show(art: Art, captions: Captions, text: Text, reader: WordVAD, count: int) -> Iterator[str]:
    """Examples as the model reads them."""
    for row in np.random.default_rng(0).choice(len(art.texts), min(count, len(art.texts)), replace=False):
        yield f"\n{art.names[art.owner[row]]}"
        yield f"position  {'token':16}{'segment':14}{'label':16}     V      A      D"
        ids, start = captions.ids[row].astype(int), captions.starts[row]
        name = [text.tokenizer.id_to_token(i).replace("Ġ", "␣") for i in ids]
        for position in range(int((ids != text.pad).sum())):
            v, a, d = reader.values[captions.rows[row, position] if position >= start else 0].tolist()
            label = name[position + 1] if position + 1 < len(ids) and ids[position + 1] != text.pad else ""
            yield (f"{position:>8}  {name[position]:16}{'explanation' if position >= start else 'emotion':14}{label:16}"
                   f"{v:+6.2f}{a:+7.2f}{d:+7.2f}")


def add_data_options(parser: argparse.ArgumentParser, data: str | None = "toy") -> None:
    """The flags that say where data is; data.py, metrics.py and train.py share them."""
    parser.add_argument("--data", default=data, metavar="NAME", help=f"toy, artemis_v1 or artemis_v2 (default: {data})")
    parser.add_argument("--data-root", metavar="FOLDER", help="where data sets are (default: $SEVLM_DATA or data/)")
    parser.add_argument("--images", metavar="FOLDER", help="the pictures (default: wikiart/ beside the annotations)")
    parser.add_argument("--lexicon", metavar="FILE", help="NRC VAD lexicon (default: the one beside the annotations)")
    parser.add_argument("--gpt2", default=GPT2_HUB, metavar="SOURCE",
                        help=f"GPT-2: file, folder or hub id (default: {GPT2_HUB})")
    parser.add_argument("--toy-paintings", type=int, default=2000, metavar="N",
                        help="size of the toy world (default: 2000)")


def art_of(options: argparse.Namespace) -> Art:
    """The data set that these flags name."""
    return load_art(options.data, options.data_root, options.images, options.toy_paintings)


def main() -> None:
    parser = argparse.ArgumentParser(description="Look at a data set.")
    add_data_options(parser)
    parser.add_argument("--show", type=int, nargs="?", const=1, default=0, metavar="N",
                        help="print N examples as the model reads them")
    options = parser.parse_args()
    art = art_of(options)
    try:
        lexicon = find_lexicon(art, options.lexicon)
        tokenizer = find_tokenizer(art, options.gpt2)
    except UserError as error:
        if options.show:
            raise
        print(overview(art, None) + f"\nTokens and VAD are not shown: {error}")
        return
    print(overview(art, lexicon))
    model = SEVLM(Config.toy(), tokenizer, lexicon)  # only its text and its tables are used
    captions = load_captions(art, model)
    print(f"{'cut at 30 tokens':28}{captions.cut.mean():.1%} of the sentences")
    for line in show(art, captions, model.text, model.word_vad, options.show):
        print(line)


if __name__ == "__main__":
    run_program(main)
