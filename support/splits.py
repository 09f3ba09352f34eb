"""Splits as functions of names alone, so that all that read the same files agree: ArtEmis's two, and one's own."""
import hashlib
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

SPLITS = ("train", "val", "test", "rest")
SEED, TOO_MANY = 2021, 41  # ArtEmis sets what has 41 or more annotations aside, 701 names
VAL_SHARE, TEST_SHARE = 0.05, 0.1
REST_SHARE = VAL_SHARE + TEST_SHARE  # 0.15000000000000002: the sum as a float decides some sizes


# ArtEmis. `keys` are the names that it splits by, style and title joined without a separator: their order decides.

def parted(items: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """`count` random items, and the others, as scikit-learn's train_test_split draws them."""
    order = np.random.RandomState(SEED).permutation(len(items))
    return [items[i] for i in order[:count]], [items[i] for i in order[count:]]


def splits_v1(keys: Sequence[str], repetitions: Sequence[int], too_many: float = TOO_MANY) -> dict[str, str]:
    """Key -> split: 85 % train, 5 % val, 10 % test, and "rest" for those with too many annotations."""
    usual = sorted({key for key, count in zip(keys, repetitions, strict=True) if count < too_many})
    rest, train = parted(usual, math.ceil(REST_SHARE * len(usual)))
    test, val = parted(rest, round(TEST_SHARE * len(usual)))
    return {**dict.fromkeys(keys, "rest"), **dict.fromkeys(train, "train"), **dict.fromkeys(val, "val"),
            **dict.fromkeys(test, "test")}


def splits_v2(new: Sequence[str], new_repetitions: Sequence[int], anchors: Sequence[str],
              old: Sequence[str], old_repetitions: Sequence[int]) -> dict[str, str]:
    """v2's algorithm over sorted lists (the original iterates Python sets, so no two of its runs agree).

    New keys of few annotations are evaluated on; the anchors, which they were contrasted with, are trained on.
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


def combined(keys: Sequence[str], splits: Sequence[str], versions: Sequence[str], within: np.ndarray) -> np.ndarray:
    """Which rows v2's "Combined" uses of those `within` the length limits: all new ones and as many old ones; but its
    tests are all old rows of half of the old test keys. The candidates' order decides what the original draws.
    """
    keys, splits, versions = map(np.array, (keys, splits, versions))
    new, old = within & (versions == "new"), within & (versions == "old")
    aside, test = splits == "rest", splits == "test"
    candidates = np.concatenate([np.flatnonzero(old & ~aside), np.flatnonzero(old & aside)])
    joining = np.random.RandomState(42).permutation(len(candidates))[:new.sum()]
    chosen = new.copy()
    chosen[candidates[joining]] = True
    tested = np.unique(keys[old & test])
    half = tested[np.random.RandomState(42).permutation(len(tested))[:len(tested) // 2]]
    return np.where(old & test, np.isin(keys, half), chosen)


# One's own

def wrong_splits(names: Sequence[str], splits: Sequence[str], optional: bool = False) -> Iterator[str | None]:
    """For each row, what is wrong with its split, if anything: there is no such one, or its name is in another one."""
    first: dict[str, str] = {}
    for name, split in zip(names, splits, strict=True):
        if split in SPLITS:
            before = first.setdefault(name, split)
            yield None if before == split else f"{name} is in {split} here, but in {before} before"
        else:
            yield None if optional and not split else f"split is {split[:30]!r}; there are {', '.join(SPLITS)}"


def completed(given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Name -> split: the one that is given, or for "" one by the name; and what to say about it."""
    splits = {name: given[name] or split_by_name(name) for name in sorted(given, key=place)}
    notes = []
    if lacking := sum(not split for split in given.values()):
        notes.append(f"{lacking:,} pictures have no split: it follows from their names, 85/5/10")
    for split, share in (("val", VAL_SHARE), ("test", TEST_SHARE)):
        train = [name for name in splits if splits[name] == "train"]
        if split not in splits.values() and len(train) > 1:
            moved = [name for name in train if place(name) >= 1 - share] or train[-1:]
            splits |= dict.fromkeys(moved, split)
            notes.append(f"no picture was in {split}: {len(moved):,} of train are there now")
    return splits, notes


def split_by_name(name: str) -> str:
    """85/5/10 by a hash of the name: whatever is added to the data later, a picture stays where it is."""
    return "train" if place(name) < 1 - REST_SHARE else "val" if place(name) < 1 - TEST_SHARE else "test"


def place(name: str) -> float:
    """A number in 0..1 that only the name decides."""
    return int.from_bytes(hashlib.sha256(unicodedata.normalize("NFC", name).encode()).digest()[:8], "big") / 2**64
