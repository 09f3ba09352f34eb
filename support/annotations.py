"""Files of annotations, of any origin: in each row a picture, a label and a text, perhaps a split and an annotator.

Rows that cannot be used are named and left out, and what was decided for the user is said.
"""
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from support.english import clean
from support.program import UserError
from support.splits import completed, wrong_splits
from support.tables import Table, read_table

FEWEST, MOST = 2, 40  # labels


def read_annotations(path: Path, titles: Mapping[str, Sequence[str]], folder_of: Mapping[str, str],
                     usual: Sequence[str]) -> tuple[Table, list[str], list[str]]:
    """The usable rows, with the columns name, label, text, split and annotator; the labels; what to say of the splits.

    `titles` are those that name, label and text may have in a file. What stands in the column `folder_of[title]` comes
    before a name under that title. Of the labels those that are `usual` come first, in their order.
    """
    table = read_table(path, titles["label"][0])
    title = {column: next((one for one in known if one in table.columns), None) for column, known in titles.items()}
    if None in title.values():
        wanted = ", ".join(" or ".join(known) for known in titles.values())
        raise UserError(f"{path} needs columns {wanted}; it has {table.titles}")
    blank = [""] * len(table)
    folders = table.columns.get(folder_of.get(title["name"]), blank)
    table.columns |= {
        "name": [posixpath.join(folder.strip(), name.strip())
                 for folder, name in zip(folders, table[title["name"]], strict=True)],
        "label": [" ".join(label.lower().split()) for label in table[title["label"]]],
        "text": list(map(clean, table[title["text"]])),
        "split": [split.strip().lower() for split in table.columns.get("split", blank)],
        "annotator": table.columns.get("annotator", blank)}
    for column in titles:
        table.drop(None if cell else f"blank {title[column]}" for cell in table[column])
    often = Counter(table["label"])
    table.drop(None if often[label] > 1 else f"the {title['label']} {label[:30]!r} occurs only here"
               for label in table["label"])
    table.columns["name"] = list(map(posixpath.normpath, table["name"]))
    table.drop(wrong_splits(table["name"], table["split"], optional=True))
    given = {name: split for name, split in zip(table["name"], table["split"], strict=True) if split}
    splits, notes = completed(dict.fromkeys(table["name"], "") | given)
    table.columns["split"] = [splits[name] for name in table["name"]]
    return table, labels_of(table, path, title["label"], usual), notes


def labels_of(table: Table, path: Path, title: str, usual: Sequence[str]) -> list[str]:
    found = set(table["label"])
    labels = [label for label in usual if label in found] + sorted(found.difference(usual))
    if not FEWEST <= len(labels) <= MOST:
        few = f" ({', '.join(labels[:3])}{', ...' if len(labels) > 3 else ''})" if labels else ""
        why = f"; {len(table.problems):,} rows cannot be used: {table.problems[0]}" if table.problems else ""
        raise UserError(f"{path} has {len(labels)} {title}s{few}; there must be {FEWEST} to {MOST}{why}")
    return labels


def opinions(table: Table) -> Counter:
    """(name, label) -> how many annotators chose it. Whoever repeats it counts once; who has no name is another one."""
    everyone = {(name, label, annotator or line) for name, label, annotator, line in
                zip(table["name"], table["label"], table["annotator"], table.lines, strict=True)}
    return Counter((name, label) for name, label, _ in everyone)


def whole_numbers(shares: np.ndarray) -> np.ndarray:
    """For each row of shares (n, k) the smallest counts in these proportions, whatever was lost in rounding: where one
    label has half of an item's annotators it has exactly half."""
    counts, todo = np.rint(1000 * shares), np.ones(len(shares), bool)  # where nothing fits
    for total in range(1, 200):
        scaled = total * shares
        fits = todo & (np.abs(scaled - np.rint(scaled)) < 1e-3).all(1)
        counts[fits], todo[fits] = np.rint(scaled[fits]), False
    return counts.astype(np.int64)
