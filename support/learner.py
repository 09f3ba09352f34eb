"""A training step by step, whatever is trained: on one process or several, in any precision, stopped and gone on with.

A batch comes in parts, for processes and for turns that save memory. A part is what the model is called with,
`model(part.pictures, **part.inputs).losses`, and for each loss the share of the whole batch that it is. So the gradient
is the same for any number of parts. A step whose gradient is not finite is skipped, in every precision.
"""
import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from support.run import Run, restore, tensors_of
from support.world import World

MOST_SKIPPED = 10  # steps in a row


class Interrupted(Exception):
    """A signal asked to stop, and the state has been saved."""


@dataclass
class Progress:
    """Where a training stands: with weights and optimizer, all that going on needs."""
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    precision: str = ""  # the one that was chosen
    trained_on: str = ""  # a run goes on with what it began with
    scaler: dict = field(default_factory=dict)

    def count(self, norm: float) -> None:
        """One more step, by the norm of its gradient."""
        self.step += 1
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        self.skipped += not math.isfinite(norm)


class Learner:
    """A model and its optimizer. Each group of weights has a `name` and its own learning rate, `base`."""

    def __init__(self, model: nn.Module, settings, world: World, groups: Sequence[dict]):
        self.model, self.world = model, world
        self.optimizer = torch.optim.AdamW(groups, settings.lr, eps=1e-6, weight_decay=settings.weight_decay,
                                           fused=world.device.type in ("cpu", "cuda"))
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        self.forward = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world.size > 1 else model

    def step(self, parts: Sequence, factor: float, stop: bool = False) -> tuple[dict[str, float], float, bool]:
        """One step: the losses, the gradient's norm, and whether any process was asked to stop."""
        losses = self.backward(parts)
        norms = self.gradient_norms()
        mine = torch.stack([*losses.values(), *norms.values(), torch.tensor(float(stop), device=self.world.device)])
        *values, stopped = self.world.sum(mine).tolist()
        norm = math.hypot(*values[len(losses):]) / self.world.size  # gradients are the same on all processes
        self.update(factor, math.isfinite(norm))
        return dict(zip(losses, values, strict=False)), norm, stopped > 0

    def backward(self, parts: Sequence) -> dict[str, Tensor]:
        """The gradient of a step, part by part. Returns this process's share of each loss."""
        losses: dict[str, Tensor] = {}
        for turn, part in enumerate(parts, 1):
            part, last = part.to(self.world.device), turn == len(parts)
            exchange = contextlib.nullcontext() if last or self.world.size == 1 else self.forward.no_sync()
            with exchange, self.world.autocast():
                found = self.forward(part.pictures, **part.inputs).losses
                mine = {name: found[name] * share for name, share in part.shares.items() if name in found}
                total = sum(loss * self.model.weight(name) for name, loss in mine.items())
                self.scaler.scale(total * self.world.size).backward()  # processes are averaged
            losses = {name: losses.get(name, 0) + loss.detach() for name, loss in mine.items()}
        self.scaler.unscale_(self.optimizer)
        return losses

    def gradient_norms(self) -> dict[str, Tensor]:
        return {group["name"]: nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
                for group in self.optimizer.param_groups}

    def update(self, factor: float, finite: bool = True) -> None:
        """Change the weights, at each group's learning rate times a factor."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["base"]
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    @property
    def rates(self) -> dict[str, float]:
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}


def pace(step: int, total: int, warmup: int) -> float:
    """The factor of the learning rates at a step: up within the warm-up, and linearly down to zero."""
    return min((step + 1) / warmup, 1.0) * (total - step) / total if step < warmup else (total - step) / total


def dropout_seed(*place: int) -> int:
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


def save_state(run: Run, learner: Learner, at: Progress) -> None:
    """Weights that are not finite never take the place of good ones."""
    at.scaler = learner.scaler.state_dict()
    if finite(learner.model):
        run.save_state(tensors_of(learner.model, learner.optimizer), asdict(at))


def resume(run: Run, learner: Learner, at: Progress) -> None:
    """Go on from the run's last state, on all processes."""
    restore(learner.model, learner.optimizer, learner.world.share_tensors(run.tensors()))
    learner.scaler.load_state_dict(at.scaler or learner.scaler.state_dict())  # fp16's alone has a state
