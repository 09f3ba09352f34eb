"""Scores of images that can be resampled: how sure is one, and do two systems differ by more than chance?

    1. Score       a formula over what each image adds
    2. Intervals   by resampling: images are drawn anew, with replacement
    3. p-values    by swapping: were two systems equally good, either could have given either result for an image
"""
import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# 1. Score

@dataclass
class Score:
    """A score as a formula over sums of what each image adds: one row of `statistics` per image.

    For a mean a row is (value, 1), or (0, 0) where the image does not count; BLEU and METEOR have more columns, since
    they pool counts over all images. So the score of images that are drawn anew is one product with `statistics`.
    """
    statistics: np.ndarray  # (images, k)
    formula: Callable[[np.ndarray], np.ndarray]  # sums (..., k) -> scores (...)
    right_or_wrong: bool = False  # each image's value is 1 or 0

    @property
    def value(self) -> float:
        return float(self.formula(self.statistics.sum(0))) if self.images else math.nan

    @property
    def per_image(self) -> np.ndarray:
        return self.formula(self.statistics)

    @property
    def images(self) -> int:
        """How many images the score rests on."""
        return int(self.statistics.any(1).sum())

    def spread(self, present: np.ndarray) -> "Score":
        """The same score with a row for every image; an absent one adds nothing."""
        statistics = np.zeros((len(present), self.statistics.shape[1]))
        statistics[present] = self.statistics
        return dataclasses.replace(self, statistics=statistics)


Scores = dict[str, Score]  # by name
Intervals = dict[str, tuple[float, float]]


def mean_score(values: Sequence[float], counted: Sequence[bool] | None = None, right_or_wrong: bool = False) -> Score:
    """The mean of the values that are counted."""
    counted = np.ones(len(values), bool) if counted is None else np.asarray(counted, bool)
    return Score(np.column_stack([np.where(counted, values, 0.0), counted]), ratio, right_or_wrong)


def ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]  # nan where nothing is counted


def pooled(runs: Sequence[Scores]) -> Scores:
    """Several runs as one: an image's statistics are summed over them, so images stay what is drawn and swapped."""
    return {name: Score(sum(run[name].statistics for run in runs), score.formula,
                        right_or_wrong=score.right_or_wrong and len(runs) == 1) for name, score in runs[0].items()}


# 2. Intervals

def resampled(scores: Scores, resamples: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """Each score of images drawn with replacement; the same draws for all scores, and for all systems.

    What rests on the whole set stays as it is: CIDEr's document frequencies, the copies that Unique counts.
    """
    images = len(next(iter(scores.values())).statistics)
    draw = np.random.default_rng(seed)
    values = {name: [] for name in scores}
    for _ in range(resamples):
        times = np.bincount(draw.integers(images, size=images), minlength=images)
        for name, score in scores.items():
            values[name].append(score.formula(times @ score.statistics))
    return {name: np.array(column, float) for name, column in values.items()}


def interval(values: np.ndarray) -> tuple[float, float]:
    """Between which 95% of the resampled values lie; nan where there are none."""
    defined = values[~np.isnan(values)]
    low, high = np.percentile(defined if len(defined) else [math.nan], [2.5, 97.5]).tolist()
    return low, high


def bootstrap(scores: Scores, resamples: int = 1000, seed: int = 0) -> Intervals:
    return {name: interval(values) for name, values in resampled(scores, resamples, seed).items()}


# 3. p-values: the chance that two systems that are equally good differ as much as these do

SWAPS, AT_ONCE = 10_000, 500


def test_of(score: Score) -> str:
    """McNemar's test is exact, but only for results that are right or wrong, not for sums over several runs."""
    return "McNemar" if score.right_or_wrong else "permutation"


def how_tested(scores: Scores) -> str:
    """What the intervals and p-values of a table are, to be printed below it."""
    exact = [name for name, score in scores.items() if test_of(score) == "McNemar"]
    coins = f", for {', '.join(exact)} all of them (McNemar's exact test)" if exact else ""
    return ("95% intervals come from resampling the images; p-values from swapping two systems' results image by "
            f"image: {SWAPS:,} random swaps{coins}.")


def p_values(scores: Scores, others: Scores, swaps: int = SWAPS, seed: int = 0) -> dict[str, float]:
    """Two-sided, paired p-values of the scores that both systems have."""
    both = {name: (score, others[name]) for name, score in scores.items()
            if name in others and score.images and others[name].images}
    exact = {name: mcnemar(*pair) for name, pair in both.items() if {test_of(score) for score in pair} == {"McNemar"}}
    drawn = permutation({name: pair for name, pair in both.items() if name not in exact}, swaps, seed)
    return {name: exact[name] if name in exact else drawn[name] for name in both}


def mcnemar(first: Score, second: Score) -> float:
    """Only images where just one system is right matter; which one would be a coin's choice, were both as good."""
    difference = first.statistics[:, 0] - second.statistics[:, 0]
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def permutation(pairs: Mapping[str, tuple[Score, Score]], swaps: int, seed: int) -> dict[str, float]:
    """How often two systems differ at least as much once they have swapped the results of about half the images."""
    draw = np.random.default_rng(seed)
    as_far = dict.fromkeys(pairs, 0)
    images = max((len(first.statistics) for first, _ in pairs.values()), default=0)
    for start in range(0, swaps, AT_ONCE):
        signs = draw.integers(0, 2, (min(AT_ONCE, swaps - start), images)) * 2.0 - 1  # -1: swapped
        for name, (first, second) in pairs.items():
            total = (first.statistics + second.statistics).sum(0)
            swing = signs @ (first.statistics - second.statistics)
            gaps = np.abs(first.formula((total + swing) / 2) - first.formula((total - swing) / 2))
            as_far[name] += int((~(gaps < abs(first.value - second.value) - 1e-12)).sum())
    return {name: (1 + count) / (1 + swaps) for name, count in as_far.items()}  # what was found is one of the swaps


def holm(chances: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """p-values that stand together, corrected: the smallest of m times m, the next times m - 1, ..., never falling.

    Among systems that are all equal, a table in 20 then has any p below 0.05; uncorrected it is one p in 20.
    """
    corrected, highest = {}, 0.0
    for rank, name in enumerate(sorted(chances, key=chances.get)):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[name]))
        corrected[name] = highest
    return {name: corrected[name] for name in chances}


def compare(systems: Sequence[Scores]) -> list[dict[str, dict]]:
    """For each system after the first each score that both have: value, difference, its interval, p, Holm's p.

    An interval is paired, as the same images are drawn for both systems. Holm corrects for all p-values of all systems.
    """
    first, *others = systems
    drawn = resampled(first)
    chances = [p_values(scores, first) for scores in others]
    corrected = holm({(row, name): p for row, each in enumerate(chances) for name, p in each.items()})
    found = []
    for row, scores in enumerate(others):
        own = resampled(scores)
        found.append({name: {"value": scores[name].value, "difference": scores[name].value - first[name].value,
                             "interval": interval(own[name] - drawn[name]), "p": p, "holm": corrected[row, name]}
                      for name, p in chances[row].items()})
    return found
