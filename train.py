"""Training: one loop, from public weights or from scratch to scores, samples and a report.

    python train.py                                     the toy model on the toy data, on a CPU
    python train.py --data artemis_v1                   the paper's model, on one GPU of 11 GB
    torchrun --nproc_per_node=2 train.py --data ...     the same on several
    python train.py --study components                  Figure 5 and Table 1

    1. Settings         the paper's training (5.1) as defaults, the toy's preset, flags made from dataclasses
    2. World            one process or several, device and precision
    3. Run              the folder: settings, log, samples, the best model, and the state to resume from
    4. Scores           predictions for a split, shared out over the processes, and what metrics.py says of them
    5. The loop         read `train` first: it is what all the rest is for
    6. Report           results, and a page with curves, pictures and the confusion matrix
    7. Studies          the paper's ablations, one run after the other, with a table at the end
    8. Profile          Table 3: parameters, FLOPs, memory, speed

A run can be stopped at any moment and goes on with --resume. What is random is a function of (seed, step), so a
resumed run computes the same numbers as one that was never stopped.
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from threading import Event

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from data import (
    Art,
    BadPicture,
    Batch,
    Examples,
    OnTheFly,
    PictureBatches,
    Store,
    add_data_options,
    best_accuracy,
    find_lexicon,
    find_tokenizer,
    load_art,
    load_captions,
    loader,
    normalise,
    open_picture,
    tower_fingerprint,
)
from metrics import (
    Prediction,
    Score,
    Scores,
    aligned,
    as_json,
    bootstrap,
    confusion_matrix,
    differences,
    display,
    emotions_of,
    evaluate,
    interval,
    read_predictions,
    references_of,
    resampled,
    text_classifier_of,
)
from sample import bars, because, choose_device, data_uri, load_model, page
from sevlm import (
    BASELINE,
    CLIP_HUB,
    DIFFERENCES,
    EMOTIONS,
    SEVLM,
    Config,
    byte_level,
    emotion_log_probs,
    load,
    option,
    save,
    write,
)
from vad import UserError, read_lexicon, replacing, run_program, write_text

# 1. Settings

@dataclass
class Settings:
    """How to train. What the paper leaves out is as in the authors' code."""
    epochs: int = option(35, "passes over the training paintings, at most (5.1)")
    batch: int = option(32, "paintings of a step, over all processes (5.1)")
    accumulate: int = option(1, "parts of a step computed one after the other, to save memory")
    lr: float = option(2e-5, "learning rate of decoder and heads (5.1)")
    vad_lr: float = option(4e-5, "learning rate of VAD emotion modelling: emotion encoder and fusion (5.1)")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    warmup: int = option(0, "steps until the learning rate is reached; it falls to zero linearly from there")
    validate_every: int = option(2000, "steps between validations")
    patience: int = option(10, "stop after more than so many validations without a better ACC or BLEU-4")
    top_p: float = option(0.9, "nucleus of the final evaluation (5.1)")
    seed: int = option(0, "decides initial weights, order, pairs, negatives, dropout and samples")
    drop_single_emotion: bool = option(False, "leave out paintings whose annotators all agree, as the authors do")
    precision: str = option("auto", "auto, bf16, fp16 or float32")
    cache: str = option("", "folder for every picture's features (or pixels, if the tower trains), by default "
                            "beside the data; off: encode a picture whenever it is needed")
    workers: int = option(-1, "processes that prepare batches; default: up to 4 with a GPU, none without")
    device: str = option("auto", "auto, cpu, cuda or mps")

    def __post_init__(self):
        for name in ("epochs", "batch", "accumulate", "lr", "vad_lr", "validate_every"):
            if getattr(self, name) <= 0:
                raise UserError(f"{flag(name)} must be above 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} must lie above 0 and not above 1")


TOY = dict(epochs=12, batch=16, lr=1.5e-3, vad_lr=3e-3, warmup=50, validate_every=300, weight_decay=0.01)
MAIN_LOSSES = ("language", "vad", "contrastive")
STUDIES = ("components", "encoder", "negatives", "alpha", "ours")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_fields(parser: argparse.ArgumentParser, title: str, kind: type, toy: dict) -> None:
    """A flag for each field of a dataclass, with its help text and defaults."""
    group = parser.add_argument_group(title)
    for setting in dataclasses.fields(kind):
        default, own = setting.default, toy.get(setting.name, setting.default)
        text = f"{setting.metadata['help']} (default: {default}" + (f"; toy: {own})" if own != default else ")")
        switch = isinstance(default, bool)
        how = dict(action=argparse.BooleanOptionalAction) if switch else dict(type=type(default), metavar="X")
        group.add_argument(flag(setting.name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **how)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train SEVLM.", usage="%(prog)s [--data NAME] [flags]",
                                     allow_abbrev=False)
    parser.add_argument("--name", help="of the folder under runs/ (default: data and time)")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="where run folders are (default: runs/)")
    parser.add_argument("--resume", action="store_true", help="go on with the run --name, by default the newest")
    instead = parser.add_argument_group("instead of one training").add_mutually_exclusive_group()
    instead.add_argument("--study", choices=STUDIES, help="train the variants of one of the paper's studies")
    instead.add_argument("--evaluate", metavar="RUN",
                         help="score a saved model, ours or the authors', on the test split")
    instead.add_argument("--profile", action="store_true", help="print parameters, FLOPs, memory and speed (Table 3)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N",
                        help="runs of each variant of a study (default: 1)")
    add_data_options(parser)
    parser.add_argument("--clip", default=CLIP_HUB, metavar="SOURCE",
                        help=f"CLIP: file, folder or hub id (default: {CLIP_HUB})")
    add_fields(parser, "training", Settings, TOY)
    add_fields(parser, "model", Config, asdict(Config.toy()))
    return parser


SOURCES = ("data", "data_root", "images", "lexicon", "gpt2", "clip", "toy_paintings")


@dataclass
class Plan:
    """All that decides a run: where the data is, how to train, and which model."""
    sources: dict[str, str | int | None]
    settings: Settings
    config: dict  # changes to the preset's or the public weights' configuration

    @classmethod
    def of(cls, options: argparse.Namespace, **changes) -> "Plan":
        given = vars(options) | changes
        toy = given["data"] == "toy"
        settings, config = ({field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given}
                            for kind in (Settings, Config))
        for name, needed in NEEDS.items():
            if name in config and not config.get(needed, True):
                raise UserError(f"{flag(name)} has no effect with --no{flag(needed)[1:]}; leave one of them out")
        return cls({name: given[name] for name in SOURCES}, Settings(**(TOY if toy else {}) | settings), config)

    def art(self) -> Art:
        return load_art(*(self.sources[name] for name in ("data", "data_root", "images", "toy_paintings")))

    def model(self, art: Art) -> SEVLM:
        """The untrained model."""
        torch.manual_seed(self.settings.seed)
        config = Config.toy(**self.config) if art.name == "toy" else Config(**self.config)
        lexicon = find_lexicon(art, self.sources["lexicon"]) if config.uses_vad else None
        if art.name == "toy":
            return SEVLM(config, find_tokenizer(art, self.sources["gpt2"]), lexicon)
        return SEVLM.from_public(self.sources["clip"], self.sources["gpt2"], lexicon, **self.config)


MAY_MOVE = ("data_root", "images", "cache", "device", "workers")  # while a run is stopped
NEEDS = {"alpha": "contrastive_head", "wrong_emotion": "contrastive_head", "wrong_image": "contrastive_head",
         "padding_in_means": "contrastive_head", "emotion_encoder": "vad_input", "two_way_emotions": "vad_input",
         "vad_on_emotion": "vad_input"}


def given_flags(options: argparse.Namespace) -> dict:
    """The flags that were named, as far as they differ from their defaults."""
    defaults = parser()
    return {name: value for name, value in vars(options).items() if value != defaults.get_default(name)}


# 2. World

def is_leader() -> bool:
    return os.environ.get("RANK", "0") == "0"


class World:
    """This process among others (torchrun sets RANK and WORLD_SIZE), its device and its precision."""

    def __init__(self, settings: Settings):
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = choose_device(settings.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        if self.size > 1 and not dist.is_initialized():  # building a feature cache may take hours
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(hours=24))
        self.dtype, self.why = choose_precision(settings.precision, self.device)
        own = min(4, os.cpu_count() or 1) if self.device.type == "cuda" else 0
        self.workers = own if settings.workers < 0 else settings.workers

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """What the leader makes on disk, the others find there."""
        if not is_leader():
            dist.barrier()
        yield
        if is_leader() and self.size > 1:
            dist.barrier()

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, numbers: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def merge(self, mine: dict) -> dict:
        """The union of all processes' dicts, sent as JSON text in byte tensors."""
        if self.size == 1:
            return mine
        text = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(text)], device=self.device))
        longest = int(max(sizes))
        texts = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in sizes]
        dist.all_gather(texts, nn.functional.pad(text, (0, longest - len(text))))
        parts = [json.loads(bytes(part[:size].tolist())) for part, size in zip(texts, sizes, strict=True)]
        return {key: value for part in parts for key, value in part.items()}


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type to compute in, and the reason."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
    if name != "auto":
        if name not in types:
            raise UserError(f"--precision {name}: there are auto, bf16, fp16 and float32")
        if name == "fp16" and device.type != "cuda":
            raise UserError("--precision fp16 needs a GPU: its gradients need loss scaling there")
        return types[name], "as asked"
    if device.type != "cuda":
        return torch.float32, f"on {device.type}"
    if torch.cuda.get_device_capability(device)[0] >= 8:  # is_bf16_supported() is also True where it is emulated
        return torch.bfloat16, "this GPU has it"
    return torch.float16, "with loss scaling: this GPU has no bf16"


# 3. Run

class Run:
    """A folder under runs/. Everything is written to a temporary name and renamed; the log is only appended to."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def state_file(self) -> Path:
        return self.folder / "state" / "state.safetensors"

    @property
    def frozen_file(self) -> Path:
        return self.folder / "state" / "frozen.safetensors"

    def path(self, name: str) -> Path:
        return self.folder / name

    def plan(self, given: dict) -> Plan:
        """The plan that this run began with. Flags given now may move it to another place or device, no more."""
        stored = json.loads(self.path("config.json").read_text())
        about = stored["about"]
        known = about["sources"] | about["settings"] | stored["sevlm"]
        for name in given.keys() & known.keys() - set(MAY_MOVE):
            if given[name] != known[name]:
                raise UserError(f"{flag(name)} {given[name]} contradicts {self.folder}, which began with "
                                f"{known[name]}; leave it out, or start another --name")
        sources, settings = ({name: given[name] if name in MAY_MOVE and name in given else value
                              for name, value in about[part].items()} for part in ("sources", "settings"))
        return Plan(sources, Settings(**settings), about["changes"])

    def write_json(self, name: str, content) -> None:
        write_text(self.path(name), json.dumps(content, indent=1))

    def append(self, name: str, record: dict) -> None:
        if is_leader():
            with open(self.path(name), "a") as file:
                file.write(json.dumps(record) + "\n")

    def records(self, name: str) -> list[dict]:
        path = self.path(name)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def save_state(self, model: SEVLM, optimizer: torch.optim.Optimizer, progress: dict) -> None:
        """Weights, optimizer and position in one file, so that they always belong together."""
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        tensors = {f"model.{name}": parameter for name, parameter in trained.items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        sizes = {name: self.path(name).stat().st_size if self.path(name).is_file() else 0
                 for name in ("log.jsonl", "samples.jsonl")}
        with replacing(self.state_file) as path:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path,
                      {"progress": json.dumps(progress | {"sizes": sizes})})

    def save_frozen(self, model: SEVLM) -> None:
        """What does not change, once: a frozen tower and the lexicon's tables."""
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        with replacing(self.frozen_file) as path:
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()
                       if name not in trained}, path)

    def load_state(self, model: SEVLM, optimizer: torch.optim.Optimizer) -> dict:
        """Put model, optimizer, log and samples back to where the state was saved."""
        with safe_open(self.state_file, "pt", device="cpu") as file, safe_open(self.frozen_file, "pt") as frozen:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            weights = {name: frozen.get_tensor(name) for name in frozen.keys()}  # noqa: SIM118
        state: dict[int, dict] = {}
        for name, tensor in tensors.items():
            owner, rest = name.split(".", 1)
            if owner == "model":
                weights[rest] = tensor
            else:
                index, key = rest.split(".")
                state.setdefault(int(index), {})[key] = tensor
        model.load_state_dict(weights)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        if is_leader():
            for name, size in progress.pop("sizes").items():
                if self.path(name).is_file():
                    os.truncate(self.path(name), size)
        return progress


def find_run(options: argparse.Namespace) -> Run:
    """The folder that the options mean; a used one only with --resume."""
    runs = Path(options.runs)
    if options.resume:
        newest = sorted(runs.glob("*/config.json"), key=lambda path: path.stat().st_mtime)[-1:]
        folder = runs / options.name if options.name else newest[0].parent if newest else runs
        if not (folder / "config.json").is_file():
            raise UserError(f"--resume: {folder} holds no run")
        return Run(folder)
    folder = runs / (options.name or f"{options.data}-{datetime.now():%Y%m%d-%H%M%S}")
    refuse_used(folder, f"--resume --name {folder.name}")
    return Run(folder)


def refuse_used(folder: Path, how: str) -> None:
    if is_leader() and folder.is_dir() and any(folder.iterdir()):  # the other processes may already find its files
        raise UserError(f"{folder} is not empty; go on with {how}, or name another --name")


# 4. Scores

@torch.no_grad()
def predict(model: SEVLM, pictures: Store | OnTheFly, art: Art, split: str, world: World, settings: Settings,
            top_p: float) -> dict[str, Prediction]:
    """For each painting of a split the most probable emotion and an explanation of it; 0 is greedy decoding."""
    model.eval()
    mine = art.paintings(split)[world.rank::world.size]
    found: dict[str, list] = {}
    together = max(1, 2 * settings.batch // settings.accumulate)
    for seen, pixels, _ in loader(PictureBatches(pictures, mine, together), world.workers, world.device):
        if len(seen) == 0:
            continue
        with world.autocast():
            sight = model.look(normalise(pixels.to(world.device), model.config))
            log_probs = emotion_log_probs(model, sight)
            emotions = [EMOTIONS[index] for index in log_probs.argmax(1).tolist()]
            written = write(model, sight, list(map(model.text.opening, emotions)), top_p=top_p,
                            seeds=[settings.seed + int(painting) for painting in seen])
        reasons = map(model.text.reason, written.ids.tolist())
        for painting, *values in zip(seen, emotions, reasons, log_probs.exp().tolist(), strict=True):
            found[art.names[painting]] = values
    model.train()
    return {name: Prediction(*values) for name, values in sorted(world.merge(found).items())}


class Judge:
    """References, training texts and the EA classifier of a data set: all that scoring needs, loaded once."""

    def __init__(self, art: Art):
        self.art, self.classifier = art, text_classifier_of(art)
        self.references = {split: references_of(art, split) for split in ("val", "test")}
        self.training = [art.texts[row] for row in art.rows("train")]

    def scores(self, predictions: dict[str, Prediction], split: str, novelty: bool = False) -> Scores:
        return evaluate(predictions, self.references[split], self.training if novelty else (), self.classifier)


# 5. The loop

def parameter_groups(model: SEVLM, settings: Settings) -> list[dict]:
    """5.1: VAD emotion modelling learns twice as fast as the rest."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    vad = [parameter for name, parameter in named if name.startswith(("emotion_encoder.", "fusion."))]
    rest = [parameter for name, parameter in named if not name.startswith(("emotion_encoder.", "fusion."))]
    groups = [dict(params=rest, name="decoder and heads", base=settings.lr)]
    return groups + [dict(params=vad, name="VAD emotion modelling", base=settings.vad_lr)] if vad else groups


def pace(step: int, total: int, warmup: int) -> float:
    """The factor of the learning rates at a step: up within the warm-up, then linearly down to zero."""
    return min((step + 1) / warmup, 1.0) * (total - step) / total if step < warmup else (total - step) / total


class Interrupted(Exception):
    """A signal asked to stop, and the state has been saved."""


def train(run: Run, plan: Plan, quiet: bool = False) -> dict:
    """Train, validate, keep the best, and score it on the test split. Returns what results.json holds."""
    settings, world = plan.settings, World(plan.settings)
    run.folder = Path(world.merge({"folder": str(run.folder)} if is_leader() else {})["folder"])
    say = Terminal(quiet or not is_leader())
    with world.leader_first():
        art = plan.art()
        model = plan.model(art)
        judge, captions = Judge(art), load_captions(art, model)
    model.about = {"data": art.name, "sources": plan.sources, "settings": asdict(settings), "changes": plan.config}
    if is_leader() and not run.path("config.json").is_file():
        run.write_json("config.json", {"sevlm": asdict(model.config), "about": model.about})
    model.to(world.device)
    pictures = open_pictures(art, model, settings, world)
    examples = Examples(art, captions, model.text, pictures, settings.seed, settings.drop_single_emotion,
                        trim=not model.config.padding_in_means)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), settings.lr, eps=1e-6,
                                  weight_decay=settings.weight_decay, fused=world.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    forward = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world.size > 1 else model
    steps = math.ceil(len(examples) / settings.batch)  # of an epoch
    total = settings.epochs * steps
    at = dict(step=0, best=-1.0, acc=-1.0, bleu=-1.0, stale=0, skipped=0, skipped_in_a_row=0, seconds=0.0, scaler={})
    if run.state_file.is_file():
        at = run.load_state(model, optimizer)
        scaler.load_state_dict(at["scaler"])
    elif is_leader():
        run.save_frozen(model)
        run.save_state(model, optimizer, at)
    say.start(run, art, model, examples, pictures, world, at, total)
    started = time.monotonic() - at["seconds"]
    with stop_requests() as stop_asked:
        while at["step"] < total and at["stale"] <= settings.patience:
            epoch, done = divmod(at["step"], steps)
            batches = iter(loader(examples.epoch(epoch, settings.batch, world.rank, world.size, settings.accumulate),
                                  world.workers, world.device, done * settings.accumulate))
            for step in range(at["step"], (epoch + 1) * steps):
                [own] = np.random.SeedSequence((settings.seed, step, world.rank)).generate_state(1)
                torch.manual_seed(int(own))  # dropout
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * pace(step, total, settings.warmup)
                losses, paintings, problems = backward(forward, model, batches, settings.accumulate, scaler, world)
                scaler.unscale_(optimizer)
                norm = nn.utils.get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"]])
                stop = torch.tensor(float(stop_asked.is_set()), device=world.device)
                mine = torch.stack([*losses.values(), norm / world.size, stop])
                *values, norm, stop = world.sum(mine).tolist()  # the only wait for the device in a step
                values = dict(zip(losses, values, strict=True))
                if not math.isfinite(norm):
                    at["skipped_in_a_row"] += 1
                    at["skipped"] += 1
                    if world.dtype != torch.float16 or at["skipped_in_a_row"] >= 10:
                        give_up(run, model, optimizer, at, values, [art.names[p] for p in paintings])
                else:
                    at["skipped_in_a_row"] = 0
                scaler.step(optimizer)  # does nothing where a gradient is not finite
                scaler.update()
                optimizer.zero_grad()
                at |= dict(step=step + 1, seconds=time.monotonic() - started, scaler=scaler.state_dict())
                say.step(at, total, values, settings.batch)
                skipped = {"skipped_pictures": {art.names[p]: why for p, why in problems.items()}} if problems else {}
                run.append("log.jsonl", {"step": step + 1, "epoch": epoch, "losses": values, "gradient": norm,
                                         "lr": {group["name"]: group["lr"] for group in optimizer.param_groups},
                                         "pictures_per_second": say.rate, "memory_gb": peak_memory(world.device),
                                         **skipped})
                if at["step"] % settings.validate_every == 0 or at["step"] == total:
                    validate(run, model, pictures, judge, world, settings, at, say)
                    if is_leader():
                        run.save_state(model, optimizer, at)
                    if at["stale"] > settings.patience:
                        break
                if stop:
                    if is_leader():
                        run.save_state(model, optimizer, at)
                    raise Interrupted
    world.wait()
    return finish(run, pictures, judge, world, settings, at, say)


def open_pictures(art: Art, model: SEVLM, settings: Settings, world: World) -> Store | OnTheFly:
    """Features of the frozen tower, or pixels if it trains; every process encodes its share."""
    if settings.cache == "off":
        return OnTheFly(art, model.config)
    features = not model.config.train_tower
    what = f"features-{tower_fingerprint(model)[:8]}" if features else f"pixels-{model.config.image_size}"
    folder = Path(settings.cache or art.folder / "cache")
    store = Store(folder / f"{art.name}-{what}.npy", art, model, features)
    with world.leader_first():
        store.open()
    store.fill(world.workers, part=world.rank, parts=world.size)
    world.wait()
    return store


def backward(forward: nn.Module, model: SEVLM, batches: Iterator[Batch], accumulate: int, scaler: torch.amp.GradScaler,
             world: World) -> tuple[dict[str, Tensor], list[int], dict[int, str]]:
    """The gradient of a step, part by part. Returns this process's share of each loss, its paintings and problems."""
    losses, paintings, problems = {}, [], {}
    for turn in range(accumulate):
        batch = next(batches).to(world.device)
        last = turn == accumulate - 1
        with contextlib.nullcontext() if last or world.size == 1 else forward.no_sync(), world.autocast():
            try:
                output = forward(normalise(batch.pictures, model.config), **batch.inputs)
                parts = {name: output.losses[name] * batch.shares[name]
                         for name in MAIN_LOSSES if name in output.losses}
                total = sum(part * model.weight(name) for name, part in parts.items())  # Eq. 8
                scaler.scale(total * world.size).backward()  # DistributedDataParallel takes the mean over processes
            except torch.cuda.OutOfMemoryError:
                raise UserError(f"out of memory with {len(batch.paintings)} paintings at once: --accumulate "
                                f"{2 * accumulate} computes the same in half the memory") from None
        losses = {name: losses.get(name, 0) + part.detach() for name, part in parts.items()}
        paintings += batch.paintings.tolist()
        problems |= batch.problems
    return losses, paintings, problems


def give_up(run: Run, model: SEVLM, optimizer: torch.optim.Optimizer, at: dict, losses: dict,
            paintings: list[str]) -> None:
    """Stop at numbers that are not finite; the weights have not been changed by them."""
    if is_leader():
        run.save_state(model, optimizer, at | {"skipped_in_a_row": 0})
    shown = ", ".join(f"{name} {loss:.3g}" for name, loss in losses.items())
    raise UserError(f"step {at['step'] + 1}: the gradient is not finite ({shown}); the last good state is saved in "
                    f"{run.folder}. The batch: {', '.join(paintings)}")


def validate(run: Run, model: SEVLM, pictures: Store | OnTheFly, judge: Judge, world: World, settings: Settings,
             at: dict, say: "Terminal") -> None:
    """Score the validation split greedily. The authors keep the best ACC and the best BLEU-4 and stop when neither
    has improved for a while; we stop by the same rule, and keep one model, the best by the sum of the two."""
    predictions = predict(model, pictures, judge.art, "val", world, settings, top_p=0.0)
    values = {name: score.value for name, score in judge.scores(predictions, "val").items()}
    acc, bleu = values["ACC"], values["BLEU-4"]
    at["stale"] = 0 if acc > at["acc"] or bleu > at["bleu"] else at["stale"] + 1
    at |= dict(acc=max(acc, at["acc"]), bleu=max(bleu, at["bleu"]))
    better = acc + bleu > at["best"]
    if better:
        at["best"] = acc + bleu
        if is_leader():
            save(model, run.folder)
    run.append("log.jsonl", {"step": at["step"], "validation": values, "best": better})
    shown = list(predictions.items())[::max(1, len(predictions) // 6)][:6]
    for name, prediction in shown:
        run.append("samples.jsonl", {"step": at["step"], "image": name, **asdict(prediction)})
    say.validation(at, values, better, shown)


def finish(run: Run, pictures: Store | OnTheFly, judge: Judge, world: World, settings: Settings, at: dict,
           say: "Terminal") -> dict:
    """The best model on the test split, which nothing has looked at before."""
    results = test(run, load(run.folder).to(world.device), pictures, judge, world, settings)
    results |= {"steps": at["step"], "skipped_steps": at["skipped"], "seconds": at["seconds"]}
    if is_leader():
        run.write_json("results.json", results)
        write_report(run, judge.art)
        say.finish(run, results)
    return results


def test(run: Run, model: SEVLM, pictures: Store | OnTheFly, judge: Judge, world: World, settings: Settings) -> dict:
    """Scores on the test split by nucleus sampling, as in 5.1, and greedily; predictions go to test-*.jsonl."""
    scores_by = {}
    for name, top_p in (("nucleus", settings.top_p), ("greedy", 0.0)):
        predictions = predict(model, pictures, judge.art, "test", world, settings, top_p)
        if is_leader():
            lines = [json.dumps({"image": image, **asdict(prediction)}) for image, prediction in predictions.items()]
            write_text(run.path(f"test-{name}.jsonl"), "\n".join(lines) + "\n")
        scores = judge.scores(predictions, "test", novelty=True)
        confusion = confusion_matrix(*emotions_of(predictions, judge.references["test"]))
        scores_by[name] = as_json(scores, bootstrap(scores), {}, {}) | {"confusion": confusion.tolist()}
    unusable = {judge.art.names[p]: why for p, why in pictures.problems.items()}
    return {"test": scores_by, "best_possible_acc": best_accuracy(judge.art, "test"),
            "ea_classifier": judge.classifier.accuracy, "memory_gb": peak_memory(world.device), "processes": world.size,
            "precision": world.precision, "unusable_pictures": unusable, **environment(world.device)}


@contextlib.contextmanager
def stop_requests() -> Iterator[Event]:
    """Ctrl-C and SIGTERM set the event, and the loop stops after its step; a second Ctrl-C does not wait."""
    asked = Event()

    def ask(signum: int, frame) -> None:
        if asked.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def peak_memory(device: torch.device) -> float:
    """GB: on the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def environment(device: torch.device) -> dict[str, str]:
    """Device, versions and revision: what somebody needs to know who gets other numbers."""
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
                              cwd=Path(__file__).parent).stdout.strip()
    own = f"{platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else own
    return {"device": f"{device.type}: {name}", "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "revision": revision or "unknown"}


class Terminal:
    """What a run says: a line that updates, a block at each validation, a table at the end; plain if no terminal."""

    def __init__(self, quiet: bool):
        self.quiet, self.live, self.smooth, self.rate = quiet, sys.stdout.isatty(), {}, 0.0
        self.last = self.begun = None

    def line(self, text: str) -> None:
        if not self.quiet:
            print(("\r\x1b[K" if self.live else "") + text, flush=True)

    def start(self, run: Run, art: Art, model: SEVLM, examples: Examples, pictures: Store | OnTheFly, world: World,
              at: dict, total: int) -> None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        others = f" and {world.size - 1} more" * (world.size > 1)
        self.line(f"{run.folder}: {len(examples):,} paintings of {art.name}, {trained:,} weights to train "
                  f"on {world.device}{others}, in {world.precision} ({world.why})")
        if pictures.problems:
            self.line(f"{len(pictures.problems):,} pictures cannot be used, such as "
                      + "; ".join(f"{art.names[p]}: {why}" for p, why in list(pictures.problems.items())[:3]))
        if at["step"]:
            self.line(f"resumed at step {at['step']:,} of {total:,}")

    def step(self, at: dict, total: int, losses: dict[str, float], batch: int) -> None:
        now = time.monotonic()
        if self.begun is None:
            self.begun = self.last = now
            self.first = at["step"] - 1
        self.smooth = {name: 0.95 * self.smooth.get(name, value) + 0.05 * value for name, value in losses.items()}
        self.rate = (at["step"] - self.first) * batch / max(now - self.begun, 1e-9)
        if self.quiet or now - self.last < (0.2 if self.live else 10):
            return
        self.last, left = now, timedelta(seconds=round((total - at["step"]) * batch / self.rate))
        shown = "  ".join(f"{name} {value:.3f}" for name, value in self.smooth.items())
        text = (f"step {at['step']:,}/{total:,}  {100 * at['step'] // total}%  {shown}  {self.rate:.0f} pictures/s  "
                f"{left} left")
        print(f"\r{text}\x1b[K" if self.live else text, end="" if self.live else "\n", flush=True)

    def validation(self, at: dict, values: dict[str, float], better: bool,
                   shown: Sequence[tuple[str, Prediction]]) -> None:
        scores = "  ".join(f"{name} {100 * values[name]:.1f}" for name in TABLE if name in values)
        self.line(f"validation at step {at['step']:,}: {scores}" + "  best so far" * better)
        for image, prediction in shown[:2]:
            self.line(f"    {image.split('/')[-1]}: {prediction.emotion} because {prediction.explanation}")

    def finish(self, run: Run, results: dict) -> None:
        best = results["best_possible_acc"]
        self.line(aligned(score_rows(results)) + "\n" + (f"best possible ACC {100 * best:.1f}; " if best else "")
                  + f"EA's classifier is right for {100 * results['ea_classifier']:.1f}% of the test texts\n"
                  + f"{summary(results)} Report: {run.path('report.html')}")
        if run.path("model.safetensors").is_file():
            self.line(f"Now try: python sample.py --checkpoint {run.folder} examples/*.png")


# 6. Report

TABLE = ("ACC", "EA", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR (exact+stem)", "ROUGE-L", "CIDEr", "Unique")
LINES = ("#4878a8", "#d9822b", "#5a9e5f", "#b5546c", "#8268b0", "#8a8a80")


def round_steps(top: float) -> list[float]:
    """Round numbers from 0 until `top` is reached."""
    magnitude = 10.0 ** math.floor(math.log10(top))
    step = next(step for step in (0.2 * magnitude, 0.5 * magnitude, magnitude, 2 * magnitude) if top / step <= 5)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def chart(title: str, curves: dict[str, list[tuple[float, float]]]) -> str:
    """Curves of (x, y) points as SVG, all axes from zero."""
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    width, height, left, top, bottom = 420, 230, 46, 40, 26
    xs, ys = (round_steps(max([p[i] for p in points], default=0) or 1) for i in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (width - left - 12) * x / xs[-1], height - bottom - (height - top - bottom) * y / ys[-1]

    parts = []
    for y in ys:
        level = place(0, y)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{level:.1f}" y2="{level:.1f}"/>'
                     f'<text x="{left - 6}" y="{level + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in xs:
        anchor = "end" if x == xs[-1] else "middle"
        parts.append(f'<text x="{place(x, 0)[0]:.1f}" y="{height - 8}" text-anchor="{anchor}">{x:,.6g}</text>')
    at = left
    for (name, curve), colour in zip(curves.items(), itertools.cycle(LINES)):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve if math.isfinite(y))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(curves) > 1:
            parts.append(f'<text x="{at}" y="31" style="fill:{colour}">{escape(name)}</text>')
            at += 7 * len(name) + 14
    return drawing(width, height, title, parts)


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<text class="title" x="0" y="14">{escape(title)}</text>'
    return (f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
            f'{head}{"".join(parts)}</svg>')


def bar_picture(title: str, values: dict[str, tuple[float, float, float]]) -> str:
    """A horizontal bar for each name's (value, low, high), with the interval as a line over its end."""
    left, width, row = 150, 420, 24
    top = round_steps(max(max(v) for v in values.values()) or 1)[-1]
    parts = []
    for index, (name, bounds) in enumerate(values.items()):
        y = 26 + row * index
        value, low, high = (left + (width - left - 50) * bound / top for bound in bounds)
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>'
                     f'<rect x="{left}" y="{y + 2}" width="{value - left:.1f}" height="15" fill="{LINES[index > 0]}"/>'
                     f'<path class="whisker" d="M{low:.1f},{y + 9.5} H{high:.1f} m0,-3.5 v7 M{low:.1f},{y + 6} v7"/>'
                     f'<text x="{high + 6:.1f}" y="{y + 14}">{bounds[0]:.1f}</text>')
    return drawing(width, 30 + row * len(values), title, parts)


def html_table(rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """The first row and the first column are headings; a row that begins with blanks explains the one above."""
    head, *body = [[escape(str(cell)) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th scope=col>{cell}" for cell in head)]
    lines += [f"<tr{' class=detail' * first.startswith(' ')}><th scope=row>{first}"
              + "".join(f"<td>{cell}" for cell in rest) for first, *rest in body]
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>'


def confusion_table(confusion: list[list[int]]) -> str:
    """Counts, each darker the larger its share of its row."""
    head = "".join(f'<th scope="col"><span>{emotion}</span>' for emotion in EMOTIONS)
    body = "".join(f'<tr><th scope="row">{emotion}' + "".join(
        f'<td style="--share:{100 * count / max(1, sum(row)):.0f}%">{count or "·"}' for count in row[:len(EMOTIONS)])
        for emotion, row in zip(EMOTIONS, confusion, strict=True))
    return f'<div class="wide"><table class="confusion"><tr><th>felt ↓ said →{head}{body}</table></div>'


def score_rows(results: dict) -> list[list[str]]:
    """The final scores as a table: nucleus sampling and greedy decoding, with intervals and counts."""
    nucleus, greedy = results["test"]["nucleus"], results["test"]["greedy"]
    rows = [["test", "nucleus", "95% interval", "greedy", "95% interval", "images"]]
    for name, count in greedy["counts"].items():
        if greedy.get(name) is not None and nucleus.get(name) is not None:
            rows.append([name])
            for part in (nucleus, greedy):
                bounds = " .. ".join(display(name, bound) for bound in part["intervals"][name])
                rows[-1] += [display(name, part[name]), bounds]
            rows[-1].append(f"{count:,}")
    return rows


def smoothed(points: list[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbourhood."""
    parts = np.array_split(np.array(points), min(most, len(points))) if points else []
    return [tuple(part.mean(0)) for part in parts]


def curves_of(records: list[dict]) -> str:
    """Losses and learning rates of every step, scores of every validation."""
    steps, validations = ([r for r in records if key in r] for key in ("losses", "validation"))
    charts = [chart(f"{name} loss", {name: smoothed([(r["step"], r["losses"][name]) for r in steps])})
              for name in (steps[0]["losses"] if steps else ())]
    for title, names in (("emotion: ACC, EA, top-2", ("ACC", "EA", "Top-2")), ("words: BLEU-4, METEOR, ROUGE-L", (
            "BLEU-4", "METEOR (exact+stem)", "ROUGE-L")), ("distinct explanations", ("Unique",))):
        found = {name: [(r["step"], 100 * r["validation"].get(name, math.nan)) for r in validations] for name in names}
        charts.append(chart(f"{title}, validation", found))
    return f'<div class="charts">{"".join(charts)}</div>'


def sample_cards(samples: list[dict], art: Art) -> str:
    """The same few pictures as training goes on: bars of the last validation, sentences of up to eight."""
    files, cards = dict(zip(art.names, art.files, strict=True)), []
    for image in dict.fromkeys(sample["image"] for sample in samples):
        mine = [sample for sample in samples if sample["image"] == image]
        try:
            picture = f'<img alt="" src="{data_uri(open_picture(files[image], 240), 240)}">'
        except BadPicture:
            picture = ""
        shown = [mine[i] for i in np.linspace(0, len(mine) - 1, min(8, len(mine))).astype(int)]
        lines = "".join(f'<li><small>{sample["step"]:,}</small> {because(sample)}' for sample in shown)
        cards.append(f'<article class="card sample">{picture}<div><h3>{escape(image)}</h3>'
                     f'{bars(mine[-1]["probabilities"])}<ol class="story">{lines}</ol></div></article>')
    return "".join(cards)


def write_report(run: Run, art: Art) -> None:
    """report.html: one page that needs nothing else."""
    results, stored = json.loads(run.path("results.json").read_text()), json.loads(run.path("config.json").read_text())
    records, best = run.records("log.jsonl"), results["best_possible_acc"]
    facts = {key: results[key] for key in ("device", "precision", "processes", "python", "torch", "numpy", "revision")}
    settings = stored["about"].get("settings", {}) | facts | stored["sevlm"]
    body = [f"<h1>{escape(run.folder.name)}</h1><p>{escape(summary(results))}"
            + (f" The best possible ACC of this data is {100 * best:.1f}." if best else "")
            + f" EA's classifier is right for {100 * results['ea_classifier']:.1f}% of the test texts.</p>",
            "<h2>Test scores</h2>", html_table(score_rows(results))]
    if records:
        body += ["<h2>Training</h2>", curves_of(records)]
        body += ["<h2>The same pictures as training goes on</h2>", sample_cards(run.records("samples.jsonl"), art)]
    body += ["<h2>What was felt, and what the model said</h2>", confusion_table(results["test"]["greedy"]["confusion"]),
             "<h2>Settings</h2>", html_table([["setting", "value"], *settings.items()], "settings")]
    write_text(run.path("report.html"), page(run.folder.name, "".join(body), REPORT_STYLE))


def summary(results: dict) -> str:
    trained = ""
    if "steps" in results:
        trained = f"{results['steps']:,} steps in {timedelta(seconds=round(results['seconds']))}, "
    return f"{trained}{results['memory_gb']:.2f} GB at most, on {results['device']} in {results['precision']}."


REPORT_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.5rem; }
.chart text { font-size: 11px; fill: currentColor; } .chart .title { font-size: 13px; font-weight: 600; }
.chart .grid { stroke: currentColor; opacity: .15; } .chart .whisker { stroke: currentColor; fill: none; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; }
.wide { margin-top: 1rem; font-size: .88rem; } tr.detail > * { color: var(--soft); font-size: .8rem; padding-block: 0; }
tr.detail > :first-child { padding-left: 1.6rem; font-weight: 400; }
tr.detail + tr:not(.detail) > * { padding-top: .7rem; }
table.settings :is(th, td) { text-align: left; white-space: normal; }
table.confusion td { background: color-mix(in srgb, #4878a8 var(--share), transparent); min-width: 2.6rem; }
table.confusion td { text-align: center; }
table.confusion th[scope=col] { writing-mode: vertical-rl; transform: rotate(180deg); }
table.confusion th[scope=col] { text-align: left; padding: .4rem .2rem; }
.sample { display: grid; grid-template-columns: minmax(120px, 220px) 1fr; }
.sample img { width: 100%; aspect-ratio: 1; object-fit: cover; border-bottom-right-radius: 12px; }
.story { list-style: none; padding: 0; margin: .6rem 0 0; }
.story li { padding-left: 3.5rem; text-indent: -3.5rem; }
.story small { display: inline-block; min-width: 3.2rem; text-indent: 0; opacity: .6; }
"""


# 7. Studies

def study_variants(name: str, full: Config) -> dict[str, dict]:
    """The paper's ablations as changes to the configuration; the first is what the others are compared with."""
    variants = {
        "components": {"no VAD input": dict(vad_input=False), "no VAD head": dict(vad_head=False),
                       "no contrastive head": dict(contrastive_head=False),
                       "baseline": BASELINE},  # Figure 5, Table 1
        "encoder": {"raw VAD": dict(emotion_encoder=False), "no VAD input": dict(vad_input=False)},  # Figure 6
        "negatives": {"wrong emotion only": dict(wrong_image=False), "wrong image only": dict(wrong_emotion=False),
                      "no negatives": dict(contrastive_head=False)},  # Figure 7
        "alpha": {f"alpha {alpha:g}": dict(alpha=alpha) for alpha in (0.0, 0.5, 1.0, 2.0, 4.0)},
        "ours": {name.replace("_", " "): {name: True} for name in DIFFERENCES},
    }[name]
    return {"full": {}} | {label: changes for label, changes in variants.items()
                           if dataclasses.replace(full, **changes) != full}


def study(options: argparse.Namespace) -> None:
    """Train each variant with each seed, one after the other, and compare them; --resume goes on with a stopped one."""
    folder = Path(options.runs) / (options.name or f"{options.data}-{options.study}")
    if not options.resume:
        refuse_used(folder, "--resume")
    plan = Plan.of(options)
    varied = {name for changes in study_variants(options.study, Config()).values() for name in changes}
    if given := varied & plan.config.keys():
        raise UserError(f"--study {options.study} itself varies {', '.join(sorted(given))}; leave that flag out")
    preset = Config.toy if options.data == "toy" else Config
    variants = study_variants(options.study, preset(**plan.config))
    seeds = range(plan.settings.seed, plan.settings.seed + options.seeds)
    for count, (seed, label) in enumerate(itertools.product(seeds, variants), 1):
        run = Run(folder / run_name(label, seed))
        if is_leader():
            print(f"\n{label}, seed {seed}: run {count} of {len(variants) * len(seeds)}", flush=True)
        own = dict(seed=seed, **variants[label])
        begun = run.path("config.json").is_file()
        own_plan = run.plan(given_flags(options) | own) if begun else Plan.of(options, **own)
        if not run.path("results.json").is_file():
            train(run, own_plan)
    if is_leader():
        compare(folder, options.study, list(variants), list(seeds), plan)


def run_name(label: str, seed: int) -> str:
    return f"{label.replace(' ', '-')}-{seed}"


def compare(folder: Path, name: str, variants: list[str], seeds: list[int], plan: Plan) -> None:
    """A study's table and page. Images are what is resampled; an image's results are summed over the seeds."""
    judge, body, result = Judge(plan.art()), [], {}
    for decoding in ("greedy", "nucleus"):
        runs = {label: [read_predictions(folder / run_name(label, seed) / f"test-{decoding}.jsonl") for seed in seeds]
                for label in variants}
        runs = {label: [judge.scores(predictions, "test") for predictions in each] for label, each in runs.items()}
        pooled = {label: {score: Score(sum(run[score].statistics for run in each), each[0][score].formula)
                          for score in TABLE} for label, each in runs.items()}
        draws = {label: resampled(scores) for label, scores in pooled.items()}
        rows = [[decoding, *TABLE]]
        for label, scores in pooled.items():
            gaps = differences(scores, pooled["full"], draws[label], draws["full"])
            bounds = {score: interval(values) for score, values in draws[label].items()}
            spread = {score: float(np.std([run[score].value for run in runs[label]], ddof=min(1, len(seeds) - 1)))
                      for score in TABLE}
            found = {score: dict(value=scores[score].value, spread=spread[score], interval=bounds[score],
                                 against_full=gaps[score]) for score in TABLE}
            result[f"{decoding}: {label}"] = found
            rows.append([label, *(f"{display(score, one['value'])} ±{100 * one['spread']:.1f}"
                                  for score, one in found.items())])
            if label != "full":
                ends = {score: [100 * end for end in gaps[score]["interval"]] for score in TABLE}
                rows.append(["  difference", *(f"{100 * gaps[score]['difference']:+.1f}" for score in TABLE)])
                rows.append(["  95% interval", *(f"{low:+.1f}..{high:+.1f}" for low, high in ends.values())])
                rows.append(["  p", *(f"{gaps[score]['p']:.3f}" for score in TABLE)])
        print("\n" + aligned(rows))
        pictures = []
        for score in ("ACC", "EA", "BLEU-4", "ROUGE-L", "CIDEr", "Unique"):
            found = {label: result[f"{decoding}: {label}"][score] for label in variants}
            pictures.append(bar_picture(score, {label: tuple(100 * x for x in (one["value"], *one["interval"]))
                                                for label, one in found.items()}))
        body += [f"<h2>{decoding.capitalize()} decoding</h2>",
                 f"<div class=charts>{''.join(pictures)}</div>{html_table(rows)}"]
    note = (f"Seeds for each variant: {len(seeds)}; ± is the standard deviation over them. Intervals and p-values "
            "resample images and are paired; they do not know how another seed would have come out.")
    print(f"\n{note}\nreport: {folder / 'report.html'}")
    Run(folder).write_json("results.json", result)
    head = f"<h1>Study: {name}</h1><p>{note}</p>"
    write_text(folder / "report.html", page(f"Study: {name}", head + "".join(body), REPORT_STYLE))


# 8. Profile

def stand_in_tokenizer() -> Tokenizer:
    """As large as GPT-2's, with the words of our lexicon: for speed and memory, it does not matter which words."""
    texts = ("the emotion is because", *EMOTIONS, *read_lexicon().rows)
    words = sorted({f" {word}" for text in texts for word in text.split()})
    vocabulary, merges = dict.fromkeys(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]), {}
    for word in words:  # merge each from its first letter on
        text = word.replace(" ", "Ġ")
        for end in range(2, len(text) + 1):
            vocabulary[text[:end]] = merges[text[:end - 1], text[end - 1]] = None
    vocabulary |= dict.fromkeys(f"filler{i}" for i in range(50_257 - len(vocabulary)))
    return byte_level(models.BPE({token: i for i, token in enumerate(vocabulary)}, list(merges)))


def profile(plan: Plan) -> str:
    """Table 3 for a configuration, with random weights; needs no file, but the toy's vocabulary for the toy."""
    world, settings, toy = World(plan.settings), plan.settings, plan.sources["data"] == "toy"
    model = plan.model(plan.art()) if toy else SEVLM(Config(**plan.config), stand_in_tokenizer(), read_lexicon())
    config = model.to(world.device).config
    rows = [["parameters", "all", "trained"]]
    for name, part in [*model.named_children(), ("all", model)]:
        count, trained = (sum(p.numel() * keep(p) for p in part.parameters())
                          for keep in (lambda p: True, lambda p: p.requires_grad))
        if count:
            rows.append([name.replace("_", " "), f"{count:,}", f"{trained:,}"])
    images = torch.rand(settings.batch, 3, config.image_size, config.image_size, device=world.device)
    text = model.sentence(["awe", "fear"] * settings.batch, [" ".join(["the quiet sea"] * 10)] * (2 * settings.batch))
    sibling = torch.arange(2 * settings.batch, device=world.device) ^ 1
    inputs = text | dict(labels=model.text.labels(text["ids"]), wrong_emotion=sibling, wrong_image=sibling.roll(2))
    with torch.no_grad():
        patches = model.see(images)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), settings.lr)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)

    def step() -> None:
        with world.autocast():
            scaler.scale(model(images if config.train_tower else patches, **inputs).losses["total"]).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    @torch.no_grad()
    def answer() -> None:
        with world.autocast():
            seen = model.look(images)
            best = emotion_log_probs(model, seen).argmax(1).tolist()
            write(model, seen, [model.text.opening(EMOTIONS[index]) for index in best], top_p=settings.top_p)

    one = {name: tensor[:2] for name, tensor in text.items() if tensor is not None}
    tower = flops(lambda: model.see(images[:1]))
    reading = flops(lambda: model.decoder.logits(model(patches[:1], **one).hidden))
    rows += [["", "", ""], ["GFLOP for one picture", "", ""], ["vision tower", f"{tower:.2f}", ""],
             ["reading two explanations, with logits", f"{reading:.2f}", ""],
             ["", "", ""], [f"speed, batch {settings.batch}", "pictures/s", "peak GB"]]
    training = "training step" if config.train_tower else "training step, features cached"
    for name, work in ((training, step), ("emotion and explanation", answer)):
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rows.append([name, f"{settings.batch / seconds(work, world.device):.1f}", f"{peak_memory(world.device):.2f}"])
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    rows += [["", "", ""], ["checkpoint on disk, MB", f"{size / 1e6:.1f}", ""]]
    return aligned(rows) + f"\n{world.device}, {world.precision} ({world.why}), torch {torch.__version__}"


@torch.no_grad()
def flops(work: Callable) -> float:
    """GFLOP, counted operator by operator; a multiplication and an addition are two."""
    from torch.utils.flop_counter import FlopCounterMode  # a tenth of a second that only this needs
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose products the counter sees
        work()
    return counter.get_total_flops() / 1e9


def seconds(work: Callable, device: torch.device, rounds: int = 3) -> float:
    """Median time of a call, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[rounds // 2]


def evaluate_again(options: argparse.Namespace) -> None:
    """Score a saved model, ours or the authors', on the test split of --data; writes a folder of its own."""
    run, plan = find_run(options), Plan.of(options)
    world = World(plan.settings)
    model = load_model(options.evaluate, options.clip, options.lexicon).to(world.device)
    art = plan.art()
    results = test(run, model, open_pictures(art, model, plan.settings, world), Judge(art), world, plan.settings)
    model.about |= {"evaluated": options.evaluate}
    if is_leader():
        run.write_json("config.json", {"sevlm": asdict(model.config), "about": model.about})
        run.write_json("results.json", results)
        write_report(run, art)
        Terminal(False).finish(run, results)


def main() -> None:
    options = parser().parse_args()
    try:
        if options.profile:
            print(profile(Plan.of(options)))
        elif options.evaluate:
            evaluate_again(options)
        elif options.study:
            study(options)
        else:
            run = find_run(options)
            train(run, run.plan(given_flags(options)) if options.resume else Plan.of(options))
    except Interrupted:
        raise UserError("stopped; the same command with --resume goes on") from None


if __name__ == "__main__":
    run_program(main)
