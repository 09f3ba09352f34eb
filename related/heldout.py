"""Labelled pictures as data sets, and the seven sets of them that emotion models are tested on, as they come.

FI, and whatever else is FOLDER/LABEL/*.jpg; EmotionROI, Emotion6 and UnBiasedEmo (images/LABEL/); WEBEmo
(images/test25/NUMBER/ or test/LABEL/); ArtPhoto (LABEL_NUMBER.jpg in one folder); Abstract (votes in a table).
"""
import csv
import io
import re
from pathlib import Path

import numpy as np

from data import Art
from support.labels import class_folders, files_by_class
from support.pictures import is_picture
from support.program import UserError, read_text
from support.splits import SPLITS

VOTES, LISTS = "ABSTRACT_groundTruth.csv", "training_testing_split"
FULL_NAMES = {"sad": "sadness", "content": "contentment"}  # what ArtPhoto and Abstract abbreviate
WEBEMO = (
    "affection", "cheerfullness", "confusion", "contentment", "disappointment", "disgust", "enthrallment", "envy",
    "exasperation", "gratitude", "horror", "irritabilty", "lust", "neglect", "nervousness", "optimism", "pride", "rage",
    "relief", "sadness", "shame", "suffering", "surprise", "sympathy", "zest")  # their spelling; numbers are places


class LabelledPictures(Art):
    """A data set without explanations, where a picture's label is its only vote."""

    def paintings(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.split == SPLITS.index(split))


def held_out(folder: Path, part: str = "testing") -> dict[str, str]:
    """The label of each picture, label by label. `part`: which of EmotionROI's two lists of pictures to follow."""
    if not folder.is_dir():
        raise UserError(f"--labels {folder}: there is no such folder")
    if (folder / VOTES).is_file():
        found = by_votes(folder / VOTES)
    elif (folder / "images" / "test25").is_dir():
        found = by_number(folder / "images" / "test25")
    else:
        inner = next((folder / name for name in ("images", "test") if holds_folders(folder / name)), folder)
        found = files_by_class(inner) if holds_folders(inner) else by_name(inner)
        if (folder / LISTS).is_dir():
            listed = set(read_text(folder / LISTS / f"{part}.txt").split())
            found = {file: label for file, label in found.items() if Path(file).relative_to(inner).as_posix() in listed}
    if len(set(found.values())) < 2:
        raise UserError(f"--labels {folder}: expected two or more folders in it, one for each class")
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def holds_folders(folder: Path) -> bool:
    return folder.is_dir() and bool(class_folders(folder))


def by_number(folder: Path) -> dict[str, str]:
    found = files_by_class(folder)
    for number in set(found.values()):
        if not number.isdecimal() or int(number) >= len(WEBEMO):
            raise UserError(f"--labels: {folder / number} is none of WEBEmo's folders, 0 to {len(WEBEMO) - 1}")
    return {file: WEBEMO[int(number)] for file, number in found.items()}


def by_name(folder: Path) -> dict[str, str]:
    """LABEL_NUMBER.jpg in one folder; other files are not looked at."""
    named = {str(file): re.fullmatch(r"(.+)_\d+", file.stem) for file in sorted(folder.iterdir())
             if is_picture(file.name)}
    return {file: FULL_NAMES.get(match[1], match[1]) for file, match in named.items() if match}


def by_votes(path: Path) -> dict[str, str]:
    """Pictures with more votes for one label than for each other; cells are in single quotes."""
    rows = list(csv.reader(io.StringIO(read_text(path)), quotechar="'", skipinitialspace=True))
    names = [FULL_NAMES.get(name.strip().lower(), name.strip().lower()) for name in rows[0][1:]] if rows else []
    found = {}
    for line, row in enumerate(rows[1:], 2):
        try:
            votes = dict(zip(names, map(float, row[1:]), strict=True))
        except ValueError:
            raise UserError(f"{path}, line {line}: expected a picture and {len(names)} numbers") from None
        most = [name for name, count in votes.items() if count == max(votes.values())]
        if len(most) == 1:
            found[str(path.parent / row[0].strip())] = most[0]
    return found
