"""Folders of labelled pictures, FOLDER/CLASS/*.jpg, and how often somebody is right about their classes."""
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.pictures import picture_files
from support.program import UserError
from support.scores import bootstrap, mean_score


def labelled_files(folder: Path) -> dict[str, str]:
    """The class of each picture, class by class."""
    if not folder.is_dir():
        raise UserError(f"--labels {folder}: there is no such folder")
    if len(class_folders(folder)) < 2:
        raise UserError(f"--labels {folder}: expected two or more folders in it, one for each class")
    return files_by_class(folder)


def class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def files_by_class(folder: Path) -> dict[str, str]:
    return {str(file): path.name for path in class_folders(folder) for file in picture_files([str(path)])}


def in_words(label: str) -> str:
    """A class's folder as a sentence says it: "something else" of Something_else."""
    return label.replace("_", " ").strip().lower()


def memberships(text: str, classes: Sequence[str], names: Sequence[str]) -> Tensor:
    """What "sad=sadness,joy=amusement+awe" says, as zeros and ones: (classes, names)."""
    parts = {name.strip(): members.split("+") for name, _, members in (part.partition("=") for part in text.split(","))}
    for name in [*classes, *parts]:
        if name not in parts or name not in classes:
            where = "here, no folder there" if name in parts else "a folder there, not named here"
            raise UserError(f"--map {text}: {name} is {where}; it must name each folder: {', '.join(classes)}")
    table = torch.zeros(len(classes), len(names))
    for row, name in enumerate(classes):
        for member in map(str.strip, parts[name]):
            if member not in names:
                raise UserError(f"--map {text}: {member!r} is none of the model's own, {', '.join(names)}")
            table[row, names.index(member)] = 1
    return table


def right_or_wrong(labels: Mapping[str, str], shares: Mapping[str, Sequence[float]]) -> dict:
    """Accuracy and each class's recall, with intervals, and the confusion of true (rows) and said classes.

    `shares` are each picture's probabilities of the classes, in the order in which `labels` has them.
    """
    classes = list(dict.fromkeys(labels.values()))
    truth = np.array([classes.index(labels[file]) for file in shares])
    said = np.array(list(shares.values())).argmax(1)
    scores = {"accuracy": mean_score(said == truth)}
    scores |= {name: mean_score(said == truth, truth == index) for index, name in enumerate(classes)}
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (truth, said), 1)
    told = {name: {"value": scores[name].value, "interval": ends, "pictures": scores[name].images}
            for name, ends in bootstrap(scores).items()}
    return {"accuracy": told.pop("accuracy"), "recall": told, "confusion": confusion.tolist()}


def label_rows(results: Mapping) -> list[list[str]]:
    """The same as a table."""
    rows = [["", "right", "95% interval", "pictures"]]
    for name, one in {"accuracy": results["accuracy"], **results["recall"]}.items():
        rows.append([name, *(f"{100 * one['value']:.1f}", " .. ".join(f"{100 * end:.1f}" for end in one["interval"])),
                     f"{one['pictures']:,}"])
    return rows
