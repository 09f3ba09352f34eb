"""Training by epochs, as the systems of this folder were trained: keep the epoch that validates best, stop when several
in a row were no better, go on where a killed run stopped.

A run is a folder (support/run.py); beside its log and its state it holds config.json, what it was begun with, and
model.safetensors, the weights of the best epoch. It is finished when results.json is there.
"""
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from support.device import autocast, choose_device, choose_precision
from support.files import load_checked, read_tensors
from support.program import UserError, read_json, replacing, write_json
from support.run import Run, restore, tensors_of

CONFIG, WEIGHTS, LOG = "config.json", "model.safetensors", "log.jsonl"


@dataclass
class Machine:
    """Where to compute, and in which precision."""
    device: torch.device
    dtype: torch.dtype
    why: str

    @classmethod
    def chosen(cls, device: str, precision: str, width: int) -> "Machine":
        device = choose_device(device)
        dtype, why = choose_precision(precision, device, width)
        if dtype == torch.float16:
            dtype, why = torch.float32, "fp16 would need loss scaling"
        return cls(device, dtype, why)

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.dtype)


def best_epoch(losses: list[float], latest: bool = False) -> int:
    """The epoch (from 1) of the lowest validation loss: of equal ones the first, or the `latest`; 0 before any."""
    if not losses:
        return 0
    return len(losses) - losses[::-1].index(min(losses)) if latest else 1 + losses.index(min(losses))


def finished(losses: list[float], epochs: int, patience: int, latest: bool = False) -> bool:
    """All epochs are done, or the last `patience` of them brought nothing better."""
    return len(losses) >= epochs or len(losses) - best_epoch(losses, latest) >= patience


def decides(settings) -> dict:
    """The settings that decide what a run computes, not where and how fast."""
    return {name: value for name, value in asdict(settings).items() if name not in ("precision", "device")}


def refuse_another(run: Run, config: dict) -> None:
    """An error if the folder holds a run that was begun with something else."""
    stored, wanted = run.plan(), json.loads(json.dumps(config))
    for name in {**wanted, **stored}:
        if stored.get(name) != wanted.get(name):
            raise UserError(f"{run.folder} was begun with {name} {stored.get(name)!r}, and now {name} is "
                            f"{wanted.get(name)!r}: delete that folder, or let it be and work in another")


def results_of(folder: Path, config: dict) -> dict | None:
    """Those of the run that this folder holds, once it is finished."""
    run = Run(folder)
    if not run.begun:
        return None
    refuse_another(run, config)
    return read_json(run.results_file) if run.finished else None


@contextlib.contextmanager
def opened(folder: Path, config: dict) -> Iterator[Run]:
    """The run that this folder holds, or a new one; nobody else may use it meanwhile. Another run is not touched."""
    run = Run(folder)
    if not run.begun:
        run = Run.begin(folder, config)
    refuse_another(run, config)
    with run.lock():
        write_json(folder / CONFIG, config)
        yield run


def fit(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, train: Callable[[list[float]], float],
        validate: Callable[[], float], epochs: int, patience: int, seed: int = 0, latest: bool = False) -> list[float]:
    """Train epoch by epoch and leave the best weights in `model` and in the folder; returns the validation losses.

    `train` runs one epoch, is given the validation losses so far, and returns its own mean loss; `validate` returns
    what is to be low. Random numbers begin anew with each epoch, so a resumed run ends like one that was not killed.
    """
    losses = run.position().get("losses", [])
    restore(model, optimizer, run.tensors())
    while not finished(losses, epochs, patience, latest):
        torch.manual_seed(1000 * seed + len(losses))
        trained, validated = train_epoch(model, train, losses), validate()
        if not math.isfinite(validated):
            raise UserError(f"epoch {len(losses) + 1}: the validation loss is {validated}; try a lower --rate")
        losses.append(validated)
        better = best_epoch(losses, latest) == len(losses)
        print(f"epoch {len(losses)}: training {trained:.4f}  validation {validated:.4f}" + "  best so far" * better,
              flush=True)
        if better:
            with replacing(run.folder / WEIGHTS) as temporary:
                save_file(model.state_dict(), temporary)
        run.append(LOG, {"epoch": len(losses), "training": trained, "validation": validated})
        buffers = {f"model.{name}": buffer for name, buffer in model.named_buffers()}
        run.save_state(tensors_of(model, optimizer) | buffers, {"losses": losses})
    load_weights(model.eval(), run.folder)
    return losses


def finish(run: Run, results: dict) -> dict:
    """Results make a run finished; what going on needed is not needed any more."""
    write_json(run.results_file, results)
    run.state_file.unlink(missing_ok=True)
    return results


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float = math.inf) -> float:
    """A step down the loss, along a gradient whose norm is cut; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    if clip_norm < math.inf:
        nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], clip_norm)
    optimizer.step()
    return loss.item()


def train_epoch(model: nn.Module, train: Callable[[list[float]], float], losses: list[float]) -> float:
    model.train()
    loss = train(losses)
    model.eval()
    return loss


def load_weights(model: nn.Module, folder: Path) -> None:
    """The weights of a run, every one in its place."""
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}: no epoch of its training is over")
    device = next(model.parameters()).device
    tensors = {name: tensor.to(device) for name, tensor in read_tensors(folder / WEIGHTS).items()}
    load_checked(model, tensors, str(folder / WEIGHTS))


def parameters_of(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def gflop_of(work: Callable[[], object]) -> float:
    """What matrix products and convolutions of a computation cost."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def seconds_of(work: Callable[[], object], rounds: int = 3) -> float:
    """What a computation takes on this machine: the median of some rounds, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def config_of(folder: Path, system: str) -> dict:
    """config.json of a run of this system, or an error that says what the folder is instead."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run of {system}: it has no {CONFIG}")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("system") != system:
        raise UserError(f"{folder} is no run of {system}")
    return config
