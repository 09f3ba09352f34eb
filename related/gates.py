"""Gates: five ways to merge what two systems say of a picture, and how to fit them on few pictures.

    1. Gates        two vectors to one                                            (B, C), (B, C) -> (B, C)
    2. Fitting      from the mean of the two as far as pictures left out allow
    3. As published

Shapes: B pictures, C classes, M experts. emovlm_kd.py says whose vectors v1 and v2 are.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from related.training import descend
from support.program import progress

# 1. Gates. Each can be set to answer a v1 + b v2, which is where fitting begins; the weights not set are zero then.

class ConcatLinearGate(nn.Module):
    """One linear layer over both vectors: the published default."""

    def __init__(self, classes: int):
        super().__init__()
        self.fc = nn.Linear(2 * classes, classes)

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        return self.fc(torch.cat([v1, v2], 1))

    def set_sum(self, a: float, b: float, eye: Tensor) -> None:
        self.fc.weight.copy_(torch.cat([a * eye, b * eye], 1))


class BilinearGate(nn.Module):
    """Every class of the one times every class of the other. A sum, it is only of inputs that sum to 1."""

    def __init__(self, classes: int):
        super().__init__()
        self.bilinear = nn.Bilinear(classes, classes, classes)
        self.fc = nn.Linear(classes, classes)

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        return self.fc(self.bilinear(v1, v2))

    def set_sum(self, a: float, b: float, eye: Tensor) -> None:
        self.bilinear.weight.copy_(a * eye[:, :, None] + b * eye[:, None, :])
        self.fc.weight.copy_(eye)


class MoEGate(nn.Module):
    """Experts that each read both vectors, weighed by one more layer."""

    def __init__(self, classes: int, experts: int = 3):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2 * classes, classes) for _ in range(experts))
        self.gate = nn.Linear(2 * classes, experts)

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        x = torch.cat([v1, v2], 1)  # (B, 2C)
        answers = torch.stack([expert(x) for expert in self.experts], 2)  # (B, C, M)
        return (answers * self.gate(x).softmax(1)[:, None]).sum(2)

    def set_sum(self, a: float, b: float, eye: Tensor) -> None:
        for expert in self.experts:
            expert.weight.copy_(torch.cat([a * eye, b * eye], 1))
        nn.init.normal_(self.gate.weight)  # else all experts would learn the same


class DynamicWeightingGate(nn.Module):
    """Two weights for each picture: how far to follow the one, and the other."""

    def __init__(self, classes: int):
        super().__init__()
        self.gate = nn.Linear(2 * classes, 2)
        self.fc = nn.Linear(classes, classes)

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        weights = self.gate(torch.cat([v1, v2], 1)).softmax(1)  # (B, 2)
        return self.fc(weights[:, :1] * v1 + weights[:, 1:] * v2)

    def set_sum(self, a: float, b: float, eye: Tensor) -> None:
        self.gate.bias.copy_(torch.tensor([a, b]).log())
        self.fc.weight.copy_((a + b) * eye)


class CrossGatingGate(nn.Module):
    """Each vector opens and closes the classes of the other."""

    def __init__(self, classes: int):
        super().__init__()
        self.gate1, self.gate2, self.fc = (nn.Linear(classes, classes) for _ in range(3))

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        return self.fc(self.gate1(v2).sigmoid() * v1 + self.gate2(v1).sigmoid() * v2)

    def set_sum(self, a: float, b: float, eye: Tensor) -> None:
        self.gate1.bias.fill_(math.log(a / b))  # whose sigmoid is a / (a + b)
        self.gate2.bias.fill_(math.log(b / a))
        self.fc.weight.copy_((a + b) * eye)


GATES = {gate.__name__: gate for gate in (ConcatLinearGate, BilinearGate, MoEGate, DynamicWeightingGate,
                                          CrossGatingGate)}


# 2. Fitting. On pictures that the two systems were trained on both are too good: a gate would learn a trust that does
# not hold later. Others are few (a hundred on the toy, where a gate has up to 828 weights), and from random weights a
# gate would have to learn from them what a class is. So it starts as the best weighted sum, which has two numbers, and
# takes only steps that pay on pictures left out: it is fitted five times without a fifth of them, and judged by that.

FORMS = ("logits", "probabilities")  # what a gate reads
STEPS = (0, 10, 30, 100, 300)
FOLDS = 5


def inputs(form: str, student: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor]:
    """v1 and v2, from the student's logits and the decoder's log-probabilities."""
    return (student, decoder) if form == "logits" else (student.softmax(1), decoder.exp())


@dataclass
class Fitted:
    """A gate, and how it was fitted."""
    name: str
    form: str
    start: tuple[float, float]  # a and b of the sum
    steps: int
    gate: nn.Module
    losses: Tensor | None = None  # (B,) the cross-entropy on each picture, left out; None if it comes from a file

    @torch.no_grad()
    def __call__(self, student: Tensor, decoder: Tensor) -> Tensor:
        """Log-probabilities (B, C) of the classes."""
        return self.gate(*inputs(self.form, student, decoder)).log_softmax(1)


def fit_gate(name: str, student: Tensor, decoder: Tensor, shares: Tensor, seed: int = 0) -> Fitted:
    """Fit to shares of votes (B, C), reading the form and taking the steps that do best on pictures left out."""
    ways = [(steps, form) for steps in STEPS for form in FORMS]  # the plainest first
    losses = torch.stack([left_out(name, *inputs(form, student, decoder), shares, seed) for form in FORMS], 2)
    place = first_as_good(losses.flatten(1))
    (steps, form), v1, v2 = ways[place], *inputs(ways[place][1], student, decoder)
    gate = next(gate for step, gate in stages(name, v1, v2, shares, seed) if step == steps)
    return Fitted(name, form, best_sum(v1, v2, shares), steps, gate, losses.flatten(1)[:, place])


def left_out(name: str, v1: Tensor, v2: Tensor, shares: Tensor, seed: int) -> Tensor:
    """Each picture's loss by a gate that was fitted without it, after each of STEPS: (B, STEPS)."""
    fold, losses = torch.arange(len(v1)) % FOLDS, torch.empty(len(v1), len(STEPS))
    for number in fold.unique():
        out = fold == number
        for place, (_, gate) in enumerate(stages(name, v1[~out], v2[~out], shares[~out], seed)):
            with torch.no_grad():
                losses[out, place] = F.cross_entropy(gate(v1[out], v2[out]), shares[out], reduction="none")
    return losses


def stages(name: str, v1: Tensor, v2: Tensor, shares: Tensor, seed: int) -> Iterator[tuple[int, nn.Module]]:
    """A gate on its way: the best sum, and after each of STEPS on all pictures at once."""
    gate = sum_gate(name, *best_sum(v1, v2, shares), v1.shape[1], seed)
    optimizer = torch.optim.Adam(gate.parameters(), 3e-3)
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            yield step, gate
        descend(optimizer, F.cross_entropy(gate(v1, v2), shares))


def best_sum(v1: Tensor, v2: Tensor, shares: Tensor) -> tuple[float, float]:
    """a and b, above 0, for which the softmax of a v1 + b v2 describes the votes best."""
    logs = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        a, b = logs.exp()
        value = F.cross_entropy(a * v1 + b * v2, shares) + (logs**2).sum() / (2 * len(v1))  # log a, log b ~ N(0, 1)
        value.backward()
        return value

    optimizer.step(loss)
    a, b = logs.exp().tolist()
    return a, b


@torch.no_grad()
def sum_gate(name: str, a: float, b: float, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    gate = GATES[name](classes)
    for parameter in gate.parameters():
        parameter.zero_()
    gate.set_sum(a, b, torch.eye(classes))
    return gate


def first_as_good(losses: Tensor) -> int:
    """Of several ways, given their losses (B, ways) on pictures left out, the first one that is not worse than the best
    by more than two standard errors of the difference: a hundred pictures decide no more than that."""
    worse = losses - losses[:, [int(losses.mean(0).argmin())]]
    return int((worse.mean(0) <= 2 * worse.std(0) / len(worse) ** 0.5).nonzero()[0])


# 3. As published: on the training pictures, from random weights, one picture at a time. All that the gate is told of
# the language model is one answer, drawn anew in each epoch.

def one_answer(decoder: Tensor, seed: int) -> Tensor:
    """The one-hot (B, C) of an answer drawn at temperature 0.8."""
    drawn = torch.multinomial((decoder / 0.8).softmax(1), 1, generator=torch.Generator().manual_seed(seed))
    return F.one_hot(drawn.squeeze(1), decoder.shape[1]).float()


def published_gate(student: Tensor, decoder: Tensor, labels: Tensor, seed: int = 0, epochs: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    gate = ConcatLinearGate(decoder.shape[1])
    optimizer = torch.optim.Adam(gate.parameters(), 1e-4, weight_decay=1e-4)
    for epoch in range(epochs):
        answers = one_answer(decoder, seed + epoch)
        for picture in progress(torch.randperm(len(labels)).split(1), f"the published gate, epoch {epoch + 1}"):
            descend(optimizer, F.cross_entropy(gate(student[picture], answers[picture]), labels[picture]))
    return gate
