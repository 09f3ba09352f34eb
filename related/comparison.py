"""Systems that name an emotion, side by side: how often each is right, how sure it is, what it costs.

Shapes: B pictures, C classes. All answer the same pictures, and all are compared with the first.
"""
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from metrics import compare, display, distribution_scores
from related.emotion_classifier import accuracies
from related.training import gflop_of, parameters_of, seconds_of
from support.program import aligned
from support.report import side_by_side
from support.scores import Scores

RULES = {"ACC": "more than half", "ACC (>= half)": "at least half"}
COSTS = {"parameters": "{:,}", "GFLOP": "{:.4f}", "ms": "{:.2f}"}


@dataclass
class System:
    log_probs: Tensor  # (B, C)
    adds: dict[str, float] = field(default_factory=dict)  # what a picture costs besides the first system, where known
    note: str = ""


def cost(work: Callable[[], Tensor], *modules: nn.Module) -> dict[str, float]:
    """Weights, and what a computation for one picture takes on this machine's CPU."""
    with torch.no_grad():
        return {"parameters": sum(map(parameters_of, modules)), "GFLOP": gflop_of(work),
                "ms": 1e3 * seconds_of(work, rounds=30)}


def scores_of(log_probs: Tensor, votes: Tensor, emotions: Sequence[str]) -> Scores:
    """ACC by both rules, and how well the probabilities describe the votes (B, C)."""
    probabilities = log_probs.double().softmax(1)
    right = accuracies(probabilities.argmax(1).numpy(), votes.numpy())
    said, felt = ([dict(zip(emotions, one, strict=True)) for one in each.tolist()] for each in (probabilities, votes))
    accuracy = {name: dataclasses.replace(right[rule], right_or_wrong=True) for name, rule in RULES.items()}
    return accuracy | distribution_scores(said, felt, emotions)


def jointly(how: Callable, one: Scores, other: Scores) -> Scores:
    """Two systems taken together, picture by picture: np.maximum where either is right, np.not_equal where just one."""
    def joined(rule: str) -> np.ndarray:
        (mine, counted), (theirs, _) = one[rule].statistics.T, other[rule].statistics.T
        return np.column_stack([how(mine, theirs), counted])
    return {rule: dataclasses.replace(one[rule], statistics=joined(rule)) for rule in RULES}


def told(systems: Mapping[str, Scores]) -> dict[str, dict[str, dict]]:
    """Of each system each score: its value, its 95% interval, and how it differs from that of the first."""
    return side_by_side({name: [scores] for name, scores in systems.items()}, compare)


def score_table(found: Mapping[str, Mapping[str, Mapping]], scores: Sequence[str]) -> str:
    """A line for each system: value, 95% interval, and p against the first."""
    lines = [["", *(title for score in scores for title in (score, "95% interval", "p"))]]
    for name, own in found.items():
        lines.append([name])
        for score, one in ((score, own[score]) for score in scores):
            ends = " .. ".join(display(score, end) for end in one["interval"])
            lines[-1] += [display(score, one["value"]), ends, chance(one["against"]["p"]) if one["against"] else ""]
    return aligned(lines)


def chance(p: float | None) -> str:
    return "-" if p is None else f"{p:.4f}"


def cost_table(found: Mapping[str, Mapping[str, Mapping]], systems: Mapping[str, Mapping]) -> str:
    """How sure each system is, and what it adds."""
    lines = [["", "ECE", "KL", *COSTS, ""]]
    for name, system in systems.items():
        sure = [display(score, found[name][score]["value"]) for score in ("ECE", "KL")]
        adds = [form.format(system["adds"][what]) if what in system["adds"] else "-" for what, form in COSTS.items()]
        lines.append([name, *sure, *adds, system["note"]])
    return aligned(lines)
