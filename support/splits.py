"""Published splits as functions of names alone, so that all that read the same files agree: ArtEmis's v1 and v2.

`keys` are the names that it splits by, style and painting joined without a separator: their order decides.
"""
import math
from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "val", "test", "rest")
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
