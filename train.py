"""Training: one loop, from public weights or from nothing to scores, samples, a report and a model to pass on.

    python train.py                                     the toy model on the toy data, on a CPU
    python train.py --one-step                          one step of it in numbers, in under five seconds
    python train.py --data artemis_v1                   the paper's model, on one GPU of 11 GB
    python train.py --data mine.csv --small             pictures, emotions and explanations of one's own
    torchrun --nproc_per_node=2 train.py --data ...     the same on several GPUs; --nnodes=2: on two machines
    python train.py --study components                  Figure 5 and Table 1

    1. Settings         the paper's training (5.1) as defaults, the toy's preset, and the plan of a run
    2. Pictures         every painting encoded once, the work shared out over the processes
    3. Scores           predictions for a split, and what metrics.py says of them
    4. A step           gradients, learning rates (5.1), numbers that are not finite
    5. The loop         read `train` first: it is what all the rest is for
    6. Results          the test split, report, model card
    7. Studies          the paper's ablations (5.3), one run after the other, with a table at the end
    8. Saved models     scored on a test split, or on folders of labelled pictures
    9. One step         what a step does, in numbers

A run can be stopped at any moment and goes on with --resume. What is random is a function of (seed, step), so a
resumed run computes the same numbers as one that was never stopped. The run folder is written by the first process of
all; another machine needs its own copy of the data, and nothing of that folder.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import (
    Art,
    Batch,
    Captions,
    Examples,
    PictureBatches,
    PictureFiles,
    add_data_options,
    art_of,
    best_accuracy,
    fill_store,
    find_lexicon,
    find_tokenizer,
    load_art,
    load_captions,
    loader,
    open_store,
    tower_fingerprint,
)
from metrics import (
    Prediction,
    as_json,
    compare,
    confusion_matrix,
    display,
    emotions_of,
    evaluate,
    read_predictions,
    references_of,
    text_classifier_of,
    without_prediction,
)
from sevlm import (
    BASELINE,
    DIFFERENCES,
    SEVLM,
    Config,
    emotion_log_probs,
    from_public,
    generate,
    initialise,
    load,
    load_model,
    save,
)
from support.device import PRECISIONS, peak_memory
from support.files import is_hub_id, load_checked
from support.flags import named_flags, refuse_contradiction, refuse_nonsense
from support.labels import label_rows, labelled_files, memberships, right_or_wrong
from support.memory import step_memory
from support.pages import colours, data_uri, escape, page, table
from support.pictures import BadPicture, open_picture
from support.program import UserError, aligned, run_program, write_json, write_text
from support.public import CLIP_HUB
from support.records import finite_only
from support.report import (
    Meter,
    comparison_charts,
    comparison_rows,
    curves,
    markdown,
    results_page,
    score_rows,
    side_by_side,
    story_card,
)
from support.run import Run, make_folder, newest_unfinished, restore, stop_requests, tensors_of
from support.scores import Scores, bootstrap, how_tested, pooled
from support.settings import add_flags, check, flag, given, option, restored
from support.store import Store
from support.world import World
from vad import OUR_LEXICON, Lexicon

# 1. Settings

@dataclass
class Settings:
    """How to train. What the paper leaves out is as in the authors' code."""
    epochs: int = option(35, "passes over the training paintings, at most (5.1)", least=1, most=10**6)
    batch: int = option(32, "paintings of a step, over all processes (5.1)", least=1, most=10**6)
    accumulate: int = option(1, "parts of a step computed one after the other, to save memory", least=1, most=10**6)
    lr: float = option(2e-5, "learning rate of decoder and heads (5.1)", above=0)
    vad_lr: float = option(4e-5, "learning rate of VAD emotion modelling: emotion encoder and fusion (5.1)", above=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", least=0)
    warmup: int = option(0, "steps until the learning rate is reached; it falls to zero linearly from there", least=0,
                         most=10**9)
    validate_every: int = option(2000, "steps between validations", least=1, most=10**9)
    patience: int = option(10, "stop after more than so many validations without a better ACC or BLEU-4", least=0,
                           most=10**6)
    top_p: float = option(0.9, "nucleus of the final evaluation (5.1)", above=0, most=1)
    seed: int = option(0, "decides initial weights, order, pairs, negatives, dropout and samples", least=0,
                       most=2**32 - 1)
    drop_single_emotion: bool = option(False, "leave out paintings whose annotators all agree, as the authors do")
    precision: str = option("auto", "auto (by measurement), bf16, fp16 or float32", choices=("auto", *PRECISIONS))
    cache: str = option("", "folder for every picture's features, or pixels if the tower trains "
                            "(default: beside the data)")
    workers: int = option(-1, "processes that prepare batches; -1: up to 4 with a GPU, none without", least=-1, most=64)
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))

    def __post_init__(self):
        check(self)


SMALL = dict(epochs=12, batch=16, lr=1.5e-3, vad_lr=3e-3, warmup=50, validate_every=300, weight_decay=0.01)
SETTINGS, CONFIG = ([known.name for known in dataclasses.fields(kind)] for kind in (Settings, Config))
SOURCES = dict(data=str, data_root=str, images=str, lexicon=str, gpt2=str, clip=str, toy_paintings=int, small=bool,
               study=str, seeds=int) | {"from": str}
MOVABLE = {"data_root", "images", "lexicon", "gpt2", "clip", "from", "cache", "device", "workers",
           "precision", "accumulate"}  # what may change while a run is stopped
PARTS = {"alpha": "contrastive_head", "wrong_emotion": "contrastive_head", "wrong_image": "contrastive_head",
         "padding_in_means": "contrastive_head", "emotion_encoder": "vad_input", "two_way_emotions": "vad_input",
         "vad_on_emotion": "vad_input"}  # a detail, and the part of the model that it belongs to


@dataclass
class Plan:
    """All that decides a run, by the names of the flags: where data and first weights are, every setting, and what was
    named of the model's configuration."""
    values: dict

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Plan":
        sources, config = {name: vars(options)[name] for name in SOURCES}, given(options, Config)
        for name, part in PARTS.items():
            if name in config and not config.get(part, True):
                raise UserError(f"{flag(name)} has no effect with --no{flag(part)[1:]}; leave one of them out")
        preset = SMALL if starting_config(sources).train_tower else {}
        plan = cls(sources | asdict(Settings(**preset | given(options, Settings))) | config)
        plan.expected_config()
        return plan

    @classmethod
    def stored(cls, values: dict, file: Path, named: dict) -> "Plan":
        """The plan that a run began with, where the flags named now take it: to another place, device or precision."""
        if ({*SOURCES, *SETTINGS} - values.keys() or values.keys() - {*SOURCES, *SETTINGS, *CONFIG}
                or not all(values[name] is None or type(values[name]) is kind for name, kind in SOURCES.items())):
            raise UserError(f"{file} is damaged or of another version: this run cannot go on, start another")
        plan = cls(values | {name: value for name, value in named.items() if name in MOVABLE})
        try:
            known = asdict(plan.settings) | asdict(plan.expected_config()) | values
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        refuse_contradiction(named, known, MOVABLE, file.parents[1])
        return plan

    def part(self, names: Sequence[str]) -> dict:
        return {name: self.values[name] for name in names if name in self.values}

    @property
    def settings(self) -> Settings:
        return Settings(**self.part(SETTINGS))

    def expected_config(self) -> Config:
        """The model's, as far as it is known before weights and data are read."""
        return dataclasses.replace(starting_config(self.values), **self.part(CONFIG))

    def art(self) -> Art:
        return load_art(*(self.values[name] for name in ("data", "data_root", "images", "toy_paintings")))

    def model(self, art: Art) -> SEVLM:
        """The untrained model, with the data's emotions."""
        torch.manual_seed(self.values["seed"])
        lexicon, changes = self.values["lexicon"], self.part(CONFIG) | {"emotions": art.emotions}
        if self.values["from"]:
            lexicon = find_lexicon(art, lexicon) if lexicon else None
            return adapted(load_model(self.values["from"], "--from"), lexicon, **changes)
        lexicon = find_lexicon(art, lexicon) if self.expected_config().uses_vad else None
        if is_small(self.values):
            tokenizer = find_tokenizer(art, self.values["gpt2"], small=True)
            return initialise(SEVLM(Config.toy(**changes), tokenizer, lexicon))
        return from_public(self.values["clip"], self.values["gpt2"], lexicon, **changes)


def is_small(sources: dict) -> bool:
    return sources["data"] == "toy" or sources["small"]


def starting_config(sources: dict) -> Config:
    if sources["from"]:
        return load_model(sources["from"], "--from").config
    return Config.toy() if is_small(sources) else Config()


def adapted(model: SEVLM, lexicon: Lexicon | None = None, **changes) -> SEVLM:
    """The same weights under other settings. Other emotions need no other weights: a label is words."""
    other = SEVLM(dataclasses.replace(model.config, **changes), model.text.tokenizer, lexicon or model.lexicon)
    load_checked(other, model.state_dict(), "the model to start from does not fit these settings")
    return other.eval()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train SEVLM.", usage="%(prog)s [--data NAME] [flags]",
                                     allow_abbrev=False)
    parser.add_argument("--name", help="of the folder under runs/ (default: data, date and time)")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="where run folders are (default: runs/)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run --name, by default the newest that is not finished")
    parser.add_argument("--from", metavar="RUN", help="start from the weights of a run, model folder or hub id")
    parser.add_argument("--small", action="store_true",
                        help="the toy's model and a tokenizer of the data's own, from nothing: no download")
    instead = parser.add_argument_group("instead of one training").add_mutually_exclusive_group()
    instead.add_argument("--study", choices=STUDIES, help="train the variants of one of the paper's studies")
    instead.add_argument("--evaluate", metavar="RUN", help="score a run, model folder or hub id on the test split")
    instead.add_argument("--one-step", action="store_true", help="show one step on the toy in numbers")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="trainings of each variant of --study")
    parser.add_argument("--labels", metavar="FOLDER", help="--evaluate on the pictures of FOLDER/CLASS/ instead")
    parser.add_argument("--map", metavar="CLASS=EMOTIONS,...", help="which of the model's emotions make up a class of "
                        "--labels: sad=sadness,joy=amusement+excitement (default: the class names are the emotions)")
    add_data_options(parser)
    parser.add_argument("--clip", default=CLIP_HUB, metavar="SOURCE",
                        help=f"CLIP: file, folder or hub id (default: {CLIP_HUB})")
    add_flags(parser, "training", Settings, SMALL)
    add_flags(parser, "model", Config, asdict(Config.toy()))
    return parser


# which flags make sense together: all that may be named beside one, what may not, and which other one it needs
COMPUTING = {"name", "runs", "batch", "accumulate", "precision", "workers", "device"}
GOES_WITH = {
    "one_step": {"batch", "precision", "device", "seed", "lr", "vad_lr", "weight_decay", *CONFIG},
    "labels": COMPUTING | {"evaluate", "map"},
    "evaluate": COMPUTING | {"data", "data_root", "images", "toy_paintings", "cache", "top_p", "seed", "labels", "map"},
}
NOT_WITH = {"from": {"small", "clip", "gpt2"}, "small": {"clip", "gpt2"}}
NEEDS = {"seeds": "study", "labels": "evaluate", "map": "labels"}
PRIVATE = ("report.html",)  # shows pictures of the data, so it is not published with a run


def begin(options: argparse.Namespace, world: World) -> tuple[Run, Plan]:
    """A new run: its folder is taken, its plan written."""
    plan, folder = Plan.of(options), None
    name = "-".join(filter(None, [Path(options.data).stem, options.study, f"{datetime.now():%Y%m%d-%H%M%S}"]))
    if world.leads:
        folder = Run.begin(Path(options.runs) / (options.name or name), plan.values, PRIVATE,
                           numbered=not options.name).folder
    return Run(Path(world.share(str(folder))), world.leads), plan


def go_on(options: argparse.Namespace, world: World) -> tuple[Run, Plan]:
    """The run --name, or the newest that is not finished, with the plan that it began with."""
    found = None
    if world.leads:
        run = Run(Path(options.runs) / options.name) if options.name else newest_unfinished(
            Path(options.runs), lambda plan: options.study in (None, plan.get("study")))
        found = [str(run.folder), run.plan()]
    folder, values = world.share(found)
    run = Run(Path(folder), world.leads)
    return run, Plan.stored(values, run.plan_file, named_flags(parser(), options))


# 2. Pictures

@dataclass
class Pictures:
    """What the model is given of each painting: features, or pixels if the tower trains."""
    store: Store
    usable: np.ndarray  # (P,)
    problems: dict[str, str]  # by painting: why there is nothing, whichever process found out


def open_pictures(art: Art, model: SEVLM, settings: Settings, world: World, wanted: np.ndarray | None = None
                  ) -> Pictures:
    """Encode what is not stored yet, by default of every painting. Each machine has a store of its own."""
    with world.first_here():
        store = open_store(art, model, settings.cache or None)
    problems = fill_store(store, art, model, wanted, workers_of(settings, world), world.local_rank, world.local_size,
                          world.dtype)
    problems = world.merge({art.names[painting]: why for painting, why in problems.items()})
    world.wait()
    return Pictures(store, np.array([name not in problems for name in art.names]), problems)


def workers_of(settings: Settings, world: World) -> int:
    if settings.workers >= 0:
        return settings.workers
    return min(4, os.cpu_count() or 1) if world.device.type == "cuda" else 0


# 3. Scores

@torch.no_grad()
def predict(model: SEVLM, pictures: Pictures, art: Art, split: str, world: World, settings: Settings,
            top_p: float) -> dict[str, Prediction]:
    """For each painting of a split the most probable emotion and an explanation of it; 0 is greedy decoding."""
    model.eval()
    paintings = art.paintings(split)
    mine = paintings[pictures.usable[paintings]][world.rank::world.size]
    batches = PictureBatches(pictures.store, mine, max(1, 2 * settings.batch // settings.accumulate))
    found = {}
    for indices, images in loader(batches, workers_of(settings, world), world.device):
        with world.autocast():
            features = images.to(world.device)  # (B, K, d), or pixels
            features = model.encode_image(features) if model.config.train_tower else features
            log_probs = emotion_log_probs(model, features)
            emotions = [model.text.emotions[index] for index in log_probs.argmax(1).tolist()]
            sentences = generate(model, features, [model.text.opening(emotion) for emotion in emotions], top_p=top_p,
                                 seeds=[settings.seed + int(painting) for painting in indices])
        reasons = map(model.text.reason, sentences.ids.tolist())
        for painting, *answer in zip(indices, emotions, reasons, log_probs.exp().tolist(), strict=True):
            found[art.names[painting]] = answer
    return {name: Prediction(emotion, reason, dict(zip(model.text.emotions, shares, strict=True)))
            for name, (emotion, reason, shares) in sorted(world.merge(found).items())}


class Judge:
    """References and the EA classifier of a data set: all that scoring needs, loaded once."""

    def __init__(self, art: Art):
        self.emotions, self.classifier = art.emotions, text_classifier_of(art, train=True)
        self.references = {split: references_of(art, split) for split in ("val", "test")}

    def scores(self, predictions: dict[str, Prediction], split: str) -> Scores:
        """None where there is nothing to score: a tiny split may be empty, and a model may compute nan."""
        shares = [sum(one.probabilities.values()) for one in predictions.values()]
        if not shares or not all(map(math.isfinite, shares)):
            return {}
        return evaluate(predictions, self.references[split], self.emotions, self.classifier)


# 4. A step

MAIN_LOSSES = ("language", "vad", "contrastive")
MOST_SKIPPED = 10  # steps in a row


def parameter_groups(model: SEVLM, settings: Settings) -> list[dict]:
    """5.1: VAD emotion modelling learns twice as fast as the rest."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    vad = [parameter for name, parameter in named if name.startswith(("emotion_encoder.", "fusion."))]
    rest = [parameter for name, parameter in named if not name.startswith(("emotion_encoder.", "fusion."))]
    groups = [dict(params=rest, name="all other weights", base=settings.lr)]
    return groups + [dict(params=vad, name="VAD emotion modelling", base=settings.vad_lr)] if vad else groups


def pace(step: int, total: int, warmup: int) -> float:
    """The factor of the learning rates at a step: up within the warm-up, and linearly down to zero."""
    return min((step + 1) / warmup, 1.0) * (total - step) / total if step < warmup else (total - step) / total


class Learner:
    """A model and its optimizer: a step at a time, on one process or several, in any precision."""

    def __init__(self, model: SEVLM, settings: Settings, world: World):
        self.model, self.world = model, world
        self.optimizer = torch.optim.AdamW(parameter_groups(model, settings), settings.lr, eps=1e-6,
                                           weight_decay=settings.weight_decay,
                                           fused=world.device.type in ("cpu", "cuda"))
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        self.forward = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world.size > 1 else model

    def step(self, parts: Sequence[Batch], factor: float, stop: bool = False) -> tuple[dict[str, float], float, bool]:
        """One step of the loop: the losses, the gradient's norm, and whether any process was asked to stop."""
        losses = self.backward(parts)
        norms = self.gradient_norms()
        mine = torch.stack([*losses.values(), *norms.values(), torch.tensor(float(stop), device=self.world.device)])
        *values, stopped = self.world.sum(mine).tolist()
        norm = math.hypot(*values[len(losses):]) / self.world.size  # gradients are the same on all processes
        self.update(factor, math.isfinite(norm))
        return dict(zip(losses, values, strict=False)), norm, stopped > 0

    def backward(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """The gradient of a step, part by part. Returns this process's share of each loss."""
        losses: dict[str, Tensor] = {}
        for turn, batch in enumerate(parts, 1):
            batch, last = batch.to(self.world.device), turn == len(parts)
            exchange = contextlib.nullcontext() if last or self.world.size == 1 else self.forward.no_sync()
            with exchange, self.world.autocast():
                output = self.forward(batch.pictures, **batch.inputs)
                shares = {name: output.losses[name] * batch.shares[name]
                          for name in MAIN_LOSSES if name in output.losses}
                total = sum(share * self.model.weight(name) for name, share in shares.items())  # Eq. 8
                self.scaler.scale(total * self.world.size).backward()  # processes are averaged
            losses = {name: losses.get(name, 0) + share.detach() for name, share in shares.items()}
        self.scaler.unscale_(self.optimizer)
        return losses

    def gradient_norms(self) -> dict[str, Tensor]:
        return {group["name"]: nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
                for group in self.optimizer.param_groups}

    def update(self, factor: float, finite: bool = True) -> None:
        """Change the weights; where the gradient is not finite the step is skipped, in every precision."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["base"]
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    @property
    def rates(self) -> dict[str, float]:
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}


def finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


# 5. The loop

@dataclass
class Position:
    """Where a training stands: with weights and optimizer, all that going on needs."""
    step: int = 0
    best: float = -1.0  # ACC + BLEU-4 of the model that was kept; -1: none yet
    acc: float = -1.0
    bleu: float = -1.0
    stale: int = 0  # validations in a row that improved neither
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    precision: str = ""  # the one that was chosen
    trained_on: str = ""  # a run goes on with the paintings and the model that it began with
    model: str = ""
    scaler: dict = field(default_factory=dict)

    def note(self, scores: dict[str, float]) -> bool:
        """Take note of a validation; was it the best?

        The authors keep the best ACC and the best BLEU-4, and stop when neither has improved for a while. We stop by
        the same rule and keep one model, the best by the sum of the two.
        """
        acc, bleu = (scores.get(name, math.nan) for name in ("ACC", "BLEU-4"))  # nan: there was nothing to score
        known = [value for value in (acc, bleu) if math.isfinite(value)]
        if known:
            self.stale = 0 if acc > self.acc or bleu > self.bleu else self.stale + 1
        self.acc, self.bleu = max(self.acc, acc), max(self.bleu, bleu)  # nan is never larger
        better = bool(known) and sum(known) > self.best
        self.best = sum(known) if better else self.best
        return better


class Interrupted(Exception):
    """A signal asked to stop, and the state has been saved."""


def train(run: Run, plan: Plan, world: World) -> dict:
    """Train, validate, keep the best, and score it on the test split. Returns what results.json holds."""
    settings = plan.settings
    world.compute_on(settings.device)
    at = restored(Position, world.share(run.position()), run.state_file)
    with world.first_here():
        art = plan.art()
        model = plan.model(art)
    captions, judge = load_captions(art, model), Judge(art) if world.leads else None
    world.compute_in(at.precision if at.precision and settings.precision == "auto" else settings.precision,
                     model.config.width)
    pictures = open_pictures(art, model.to(world.device), settings, world)
    examples = examples_of(art, model, captions, pictures, settings)
    recognise(at, model, examples, run)
    at.precision, model.about = world.precision, {"data": art.name}
    learner = Learner(model, settings, world)
    restore(model, learner.optimizer, world.share_tensors(run.tensors()))
    learner.scaler.load_state_dict(at.scaler or learner.scaler.state_dict())  # fp16's alone has a state
    total = settings.epochs * math.ceil(len(examples) / settings.batch)
    introduce(run, art, model, examples, pictures, settings, world, at, total)
    started, meter = time.monotonic() - at.seconds, Meter(at.step, total, settings.batch, "pictures", world.leads)
    model.train()
    with stop_requests(world.say) as asked:
        for epoch, parts in batches_from(at.step, examples, settings, world):
            if at.stale > settings.patience:
                break
            torch.manual_seed(dropout_seed(settings.seed, at.step, world.rank))
            losses, norm, stop = learner.step(parts, pace(at.step, total, settings.warmup), asked.is_set())
            at.step, at.seconds = at.step + 1, time.monotonic() - started
            at.skipped_in_a_row = 0 if math.isfinite(norm) else at.skipped_in_a_row + 1
            at.skipped += not math.isfinite(norm)
            meter.note(at.step, losses)
            run.append("log.jsonl", {
                "step": at.step, "epoch": epoch, "losses": finite_only(losses), "lr": learner.rates, **finite_only(
                    {"gradient": norm, "pictures_per_second": meter.rate, "memory_gb": peak_memory(world.device)})})
            if at.skipped_in_a_row == MOST_SKIPPED:
                give_up(run, at, losses, parts, art)
            if at.step % settings.validate_every == 0 or at.step == total:
                scores, predictions = validate(model, pictures, judge, art, world, settings)
                model.train()
                better = finite(model) and at.note(scores)
                if better and world.leads:
                    save(model, run.folder)
                record(run, at, scores, better, predictions, world)
                save_state(run, learner, at)
            if stop:
                save_state(run, learner, at)
                raise Interrupted(f"stopped after step {at.step:,} of {total:,}")
    return finish(run, plan, model, pictures, judge, art, world, at)


def examples_of(art: Art, model: SEVLM, captions: Captions, pictures: Pictures, settings: Settings) -> Examples:
    values = model.lexicon.values if model.lexicon else None
    return Examples(art, captions, model.text, values, pictures.store, pictures.usable, settings.seed,
                    settings.drop_single_emotion, trim=not model.config.padding_in_means)


def recognise(at: Position, model: SEVLM, examples: Examples, run: Run) -> None:
    """Refuse to go on with other paintings, or another model, than the run began with."""
    trained_on, known = f"{len(examples):,} paintings ({examples.fingerprint[:16]})", fingerprint(model)
    if at.trained_on not in ("", trained_on):
        raise UserError(f"{run.folder} was trained on {at.trained_on}; now there are {trained_on}. Bring the data "
                        "back to what it was, or start another run")
    if at.model not in ("", known):
        raise UserError(f"{run.folder} began with another CLIP, tokenizer, lexicon or configuration than "
                        "there is now; name what it began with, or start another run")
    at.trained_on, at.model = trained_on, known


def fingerprint(model: SEVLM) -> str:
    """Of all in a model that training does not change."""
    fixed = [asdict(model.config), model.text.tokenizer.get_vocab(), model.lexicon.text if model.lexicon else "",
             "" if model.config.train_tower else tower_fingerprint(model)]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def introduce(run: Run, art: Art, model: SEVLM, examples: Examples, pictures: Pictures, settings: Settings,
              world: World, at: Position, total: int) -> None:
    """What is about to happen, and what the user may not know of the data."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = f" and {world.size - 1} more" * (world.size > 1)
    lines = [(f"{run.folder}: {len(examples):,} paintings of {art.name}, {trained:,} weights to train on "
              f"{world.device}{others}, in {world.precision} ({world.why})"), *art.notes[:5]]
    if art.problems:
        lines.append(f"{len(art.problems):,} rows cannot be used, such as {art.problems[0]}")
    if problems := pictures.problems:
        shown = "; ".join(f"{name}: {why}" for name, why in itertools.islice(problems.items(), 3))
        lines.append(f"{len(problems):,} pictures cannot be used, such as {shown}")
    if at.step:
        lines.append(f"resumed at step {at.step:,} of {total:,}")
    if world.leads:
        lines.append(memory_needed(model, settings, world))
    world.say("\n".join(lines))


def memory_needed(model: SEVLM, settings: Settings, world: World) -> str:
    """What a step of this process needs where every sentence is of full length, counted before it starts."""
    config, part = model.config, math.ceil(settings.batch / settings.accumulate / world.size)
    shape, dtype = (((3, config.image_size, config.image_size), torch.uint8) if config.train_tower else
                    ((config.patches, config.tower_width), torch.half))

    def gradients(paintings: int) -> None:
        data = model.sentence(config.emotions[:2] * paintings, ["sea " * config.length] * 2 * paintings)
        data["labels"], sentence = model.text.labels(data["ids"]), torch.arange(2 * paintings, device=model.device)
        pictures = torch.zeros(paintings, *shape, dtype=dtype, device=model.device)
        for _ in range(min(2, settings.accumulate)):  # the second part finds gradients there
            with world.autocast():
                output = model(pictures, **data, wrong_emotion=sentence ^ 1, wrong_image=sentence.roll(2))
                output.losses["total"].backward()
    try:
        return f"memory of a step, counted: {step_memory(gradients, model.train())(part) / 1e9:.2f} GB"
    except (ValueError, torch.OutOfMemoryError):  # the two counts do not line up: no reason not to begin
        return "memory of a step: it could not be counted"


def batches_from(step: int, examples: Examples, settings: Settings, world: World) -> Iterator[tuple[int, list[Batch]]]:
    """The epoch and this process's batches, a list of `accumulate`, of each step from `step` to the end."""
    steps = math.ceil(len(examples) / settings.batch)  # of an epoch
    for epoch in range(step // steps, settings.epochs):
        done = max(0, step - epoch * steps) * settings.accumulate
        own = examples.epoch(epoch, settings.batch, world.rank, world.size, settings.accumulate)
        batches = iter(loader(own, workers_of(settings, world), world.device, done))
        while parts := list(itertools.islice(batches, settings.accumulate)):
            yield epoch, parts


def dropout_seed(*place: int) -> int:
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def validate(model: SEVLM, pictures: Pictures, judge: Judge | None, art: Art, world: World, settings: Settings
             ) -> tuple[dict[str, float], dict[str, Prediction]]:
    """Greedy scores on the validation split, the same for all processes, and what they are scores of."""
    predictions = predict(model, pictures, art, "val", world, settings, top_p=0.0)
    scores = judge.scores(predictions, "val") if judge else {}
    return world.share({name: score.value for name, score in scores.items()}), predictions


def record(run: Run, at: Position, scores: dict[str, float], better: bool, predictions: dict[str, Prediction],
           world: World) -> None:
    """A validation in the log and on the terminal, with what was said of the same few pictures."""
    run.append("log.jsonl", {"step": at.step, "validation": finite_only(scores), "best": better})
    shown = list(predictions.items())[::max(1, len(predictions) // 6)][:6]
    run.append("samples.jsonl", *({"step": at.step, "image": name, **asdict(one)} for name, one in shown))
    told = "  ".join(f"{name} {display(name, scores[name])}" for name in TABLE if name in scores)
    world.say(f"validation at step {at.step:,}: {told or 'nothing to score'}" + "  best so far" * better)
    for image, one in shown[:2]:
        world.say(f"    {image.split('/')[-1]}: {one.emotion} because {one.explanation}")


def save_state(run: Run, learner: Learner, at: Position) -> None:
    """Weights that are not finite never take the place of good ones."""
    at.scaler = learner.scaler.state_dict()
    if finite(learner.model):
        run.save_state(tensors_of(learner.model, learner.optimizer), asdict(at))


def give_up(run: Run, at: Position, losses: dict[str, float], parts: Sequence[Batch], art: Art) -> None:
    shown = ", ".join(f"{name} {loss:.3g}" for name, loss in losses.items())
    names = ", ".join(art.names[painting] for batch in parts for painting in batch.paintings)
    raise UserError(f"step {at.step}: for the {MOST_SKIPPED}th time in a row the gradient is not finite ({shown}). "
                    f"{run.folder} keeps its last good state, but going on would end here again: start another run "
                    f"with a smaller --lr or --precision float32. The batch: {names}")


# 6. Results

TABLE = ("ACC", "EA", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR (exact+stem)", "ROUGE-L", "CIDEr", "Unique")
CURVES = {"emotion: ACC, EA, top-2": ("ACC", "EA", "Top-2"),
          "words: BLEU-4, METEOR, ROUGE-L": ("BLEU-4", "METEOR (exact+stem)", "ROUGE-L"),
          "distinct explanations": ("Unique",)}


def finish(run: Run, plan: Plan, model: SEVLM, pictures: Pictures, judge: Judge | None, art: Art, world: World,
           at: Position) -> dict:
    """The best model on the test split, which nothing has been chosen by."""
    if at.best < 0:
        world.say("no validation gave a number: the last weights are kept, which need not be the best")
        if world.leads and finite(model):
            save(model, run.folder)
    model.load_state_dict(world.share_tensors(load(run.folder).state_dict() if world.leads else {}))
    results, predictions = test(model, pictures, judge, art, world, plan.settings)
    if world.leads:
        results |= {"steps": at.step, "skipped_steps": at.skipped, "seconds": at.seconds}
        write_predictions(run.folder, predictions)
        write_text(run.folder / "report.html", report(run, results, art, plan.part([*SETTINGS]) | asdict(model.config)))
        write_text(run.folder / "README.md", model_card(run.folder.name, model, plan, results))
        write_json(run.results_file, results)  # last: now the run is finished
        tell(run.folder, results)
        print(f"Now try: python sample.py --checkpoint {run.folder} examples/*.png")
    world.wait()
    return results


def test(model: SEVLM, pictures: Pictures, judge: Judge | None, art: Art, world: World, settings: Settings
         ) -> tuple[dict, dict[str, dict[str, Prediction]]]:
    """Scores on the test split by nucleus sampling, as in 5.1, and greedily, and the predictions."""
    predictions = {decoding: predict(model, pictures, art, "test", world, settings, top_p)
                   for decoding, top_p in (("nucleus", settings.top_p), ("greedy", 0.0))}
    if not judge:
        return {}, predictions
    tested, references = {}, judge.references["test"]
    for decoding, found in predictions.items():
        scores = judge.scores(found, "test")
        if not scores:
            raise UserError("there is nothing to score: " + (
                "the model computes no numbers (nan); train another with a smaller --lr" if found else
                f"no painting of the test split of {art.name} has a usable picture"))
        confusion = confusion_matrix(*emotions_of(found, references), art.emotions)
        tested[decoding] = as_json(scores, bootstrap(scores)) | {"confusion": confusion.tolist()}
    missing, acc_without = without_prediction(predictions["greedy"], references)
    numbers = {"best_possible_acc": best_accuracy(art, "test"), "ea_classifier": judge.classifier.accuracy,
               "their_cost_in_acc": acc_without - (tested["greedy"]["ACC"] or 0),
               "memory_gb": peak_memory(world.device)}
    return {"data": art.name, "emotions": list(art.emotions), "test": tested, "unusable_pictures": pictures.problems,
            "test_paintings_without_picture": missing, **finite_only(numbers), "environment": world.environment()
            }, predictions


def write_predictions(folder: Path, predictions: dict[str, dict[str, Prediction]]) -> None:
    for decoding, found in predictions.items():
        lines = [json.dumps({"image": image, **asdict(prediction)}) for image, prediction in found.items()]
        write_text(folder / f"test-{decoding}.jsonl", "\n".join(lines) + "\n")


def tell(folder: Path, results: dict) -> None:
    print("\n".join([aligned(test_rows(results)), *remarks(results), f"report: {folder / 'report.html'}"]))


def report(run: Run, results: dict, art: Art, settings: dict) -> str:
    """The page of a run, or of a saved model that was scored."""
    training, records = "", run.records("log.jsonl")
    if records:
        training = (f"<h2>Training</h2>{curves(records, CURVES)}<h2>The same pictures as training goes on</h2>"
                    + "".join(stories(run.records("samples.jsonl"), art)))
    return results_page(run.folder.name, remarks(results), test_rows(results), results["emotions"],
                        results["test"]["greedy"]["confusion"], settings | results["environment"], training)


def test_rows(results: dict) -> list[list[str]]:
    return score_rows("test", results["test"], display)


def remarks(results: dict) -> list[str]:
    """What must be known to read the scores."""
    lines, where = [], results["environment"]
    if "steps" in results:
        skipped = f" ({results['skipped_steps']:,} of them skipped)" if results["skipped_steps"] else ""
        memory = f", {results['memory_gb']:.2f} GB at most" if results["memory_gb"] else ""
        lines.append(f"{results['steps']:,} steps{skipped} in {timedelta(seconds=round(results['seconds']))}{memory}, "
                     f"on {where['device']} in {where['precision']}.")
    if results["best_possible_acc"]:
        lines.append(f"The best possible ACC of this data is {100 * results['best_possible_acc']:.1f}.")
    if results["ea_classifier"] is not None:
        lines.append(f"EA's classifier is right for {100 * results['ea_classifier']:.1f}% of the test texts.")
    if results["test_paintings_without_picture"]:
        lines.append(f"{results['test_paintings_without_picture']:,} test paintings have no usable picture; ACC counts "
                     f"them as wrong, which costs it {100 * (results['their_cost_in_acc'] or 0):.1f} points.")
    return lines


def stories(samples: list[dict], art: Art) -> Iterator[str]:
    """The same few pictures as training goes on: bars of the last validation, sentences of up to eight."""
    files, colour = dict(zip(art.names, art.files, strict=True)), colours(art.emotions)
    for image in dict.fromkeys(sample["image"] for sample in samples):
        mine = [sample for sample in samples if sample["image"] == image]
        try:
            picture = data_uri(open_picture(files[image], 240), 240)
        except BadPicture:
            picture = None
        likely = sorted(mine[-1]["probabilities"].items(), key=lambda pair: -pair[1])[:4]
        shown = [mine[place] for place in np.linspace(0, len(mine) - 1, min(8, len(mine))).astype(int)]
        yield story_card(image, picture, [(name, share, colour[name]) for name, share in likely],
                         [(one["step"], one["emotion"], f"because {one['explanation']}") for one in shown])


def model_card(name: str, model: SEVLM, plan: Plan, results: dict) -> str:
    """README.md of a run: what somebody needs to know who is given the folder. It names no place of this machine."""
    lexicon = NO_LEXICON
    if model.lexicon:
        lexicon = OWN_LEXICON if model.lexicon.text == OUR_LEXICON.read_text(encoding="utf-8") else OTHER_LEXICON
    settings = {key: value for key, value in plan.part(SETTINGS).items() if key not in MOVABLE} | plan.part(CONFIG)
    return CARD.format(
        name=name, data=results["data"], emotions=", ".join(model.text.emotions), start=origin(plan.values),
        scores=markdown(test_rows(results)), remarks=" ".join(remarks(results)), lexicon=lexicon,
        settings="\n".join(f"- {key}: {value}" for key, value in settings.items()))


def origin(sources: dict) -> str:
    """Where the first weights came from; a path is nobody else's business."""
    if sources["from"]:
        return f"the weights of {Path(sources['from']).name}"
    if is_small(sources):
        return "random weights"
    return " and ".join(source if is_hub_id(source) else name
                        for name, source in (("CLIP", sources["clip"]), ("GPT-2", sources["gpt2"])))


NO_LEXICON = "It uses no VAD lexicon."
OWN_LEXICON = "`lexicon.txt` is the small list that comes with the code, under its MIT licence."
OTHER_LEXICON = """`lexicon.txt` is the VAD lexicon that the model was trained with. If it is NRC VAD: that is for
research only and must not be passed on, so do not publish this folder with it."""
CARD = """---
tags: [visual-emotion, image-to-text, sevlm]
---
# {name}

A small emotional vision language model (SEVLM, arXiv 2403.11150): it names the emotion that a picture evokes and says
why in a sentence. `python sample.py picture.jpg --checkpoint FOLDER` asks it.

- Data: {data}
- Emotions: {emotions}
- Started from: {start}

## Scores on the test split

{scores}

{remarks}

## What it may be used for

For research on what pictures evoke. An emotion is what some annotators said they felt; the model repeats them, and
their culture, with confidence. It measures nobody's feelings and is no basis for decisions about people. The terms of
its data, and of the weights that it started from, hold for it too. {lexicon}

## Settings

{settings}
"""


# 7. Studies

STUDIES = ("components", "encoder", "negatives", "alpha", "ours")


def study_variants(name: str, full: dict) -> dict[str, dict]:
    """The paper's ablations as changes to the settings; the first variant is what the others are compared with."""
    variants = {
        "components": {"no VAD input": dict(vad_input=False), "no VAD head": dict(vad_head=False),
                       "no contrastive head": dict(contrastive_head=False),
                       "baseline": BASELINE},  # Figure 5, Table 1
        "encoder": {"raw VAD": dict(emotion_encoder=False), "no VAD input": dict(vad_input=False)},  # Figure 6
        "negatives": {"wrong emotion only": dict(wrong_image=False), "wrong image only": dict(wrong_emotion=False),
                      "no negatives": dict(contrastive_head=False)},  # Figure 7
        "alpha": {f"alpha {alpha:g}": dict(alpha=alpha) for alpha in (0.0, 0.5, 1.0, 2.0, 4.0)},
        "ours": {name.replace("_", " "): {name: True} for name in (*DIFFERENCES, "drop_single_emotion")},
    }[name]
    return {"full": {}} | {label: changes for label, changes in variants.items() if full | changes != full}


def varied_by(name: str) -> set[str]:
    """The settings that a study varies itself."""
    return {setting for changes in study_variants(name, {}).values() for setting in changes}


def study(run: Run, plan: Plan, world: World) -> None:
    """Train each variant with each seed, one after the other, and compare them."""
    variants = study_variants(plan.values["study"], asdict(plan.settings) | asdict(plan.expected_config()))
    seeds = range(plan.values["seed"], plan.values["seed"] + plan.values["seeds"])
    for count, (seed, label) in enumerate(itertools.product(seeds, variants), 1):
        one = Run(run.folder / run_name(label, seed), world.leads)
        own = Plan(plan.values | {"study": None, "seeds": 1, "seed": seed} | variants[label])
        if world.leads and not one.begun:
            Run.begin(one.folder, own.values, PRIVATE)
        if not world.share(one.finished):
            world.say(f"\n{label}, seed {seed}: run {count} of {len(variants) * len(seeds)}")
            with one.lock():
                train(one, own, world)
    if world.leads:
        compare_variants(run, plan, list(variants), list(seeds))


def run_name(label: str, seed: int) -> str:
    return f"{label.replace(' ', '-')}-{seed}"


def compare_variants(run: Run, plan: Plan, variants: list[str], seeds: list[int]) -> None:
    """A study's tables and page."""
    judge, results, body, title = Judge(plan.art()), {}, [], f"Study: {plan.values['study']}"
    for decoding in ("greedy", "nucleus"):
        runs = {label: [scores_of_run(run.folder / run_name(label, seed), decoding, judge) for seed in seeds]
                for label in variants}
        found = side_by_side(runs, compare)
        rows = comparison_rows(decoding, found, display)
        print("\n" + aligned(rows))
        body += [f"<h2>{decoding.capitalize()} decoding</h2>", comparison_charts(found), table(rows)]
        results |= {f"{decoding}: {label}": scores for label, scores in found.items()}
    note = (f"Seeds for each variant: {len(seeds)}; ± is the standard deviation over them. "
            f"{how_tested(pooled(runs['full']))} Holm corrects for the {(len(runs) - 1) * len(found['full'])} p-values "
            "of a table. None of them knows how another seed would have come out.")
    print(f"\n{note}\nreport: {run.folder / 'report.html'}")
    write_text(run.folder / "report.html", page(title, f"<h1>{title}</h1><p>{escape(note)}</p>" + "".join(body)))
    write_json(run.results_file, results)


def scores_of_run(folder: Path, decoding: str, judge: Judge) -> Scores:
    predictions = dict(read_predictions(folder / f"test-{decoding}.jsonl", judge.emotions))
    return {name: score for name, score in judge.scores(predictions, "test").items() if name in TABLE}


# 8. Saved models

def evaluate_again(options: argparse.Namespace, world: World) -> None:
    """Score a saved model on the test split of --data. Its own emotions are the data's: a label is words."""
    settings = Settings(**given(options, Settings))
    world.compute_on(settings.device)
    folder = evaluation_folder(options)
    with world.first_here():
        art = art_of(options)
    model = adapted(load_model(options.evaluate, "--evaluate"), emotions=art.emotions).to(world.device)
    world.compute_in(settings.precision, model.config.width)
    pictures = open_pictures(art, model, settings, world, art.paintings("test"))
    judge = Judge(art) if world.leads else None
    results, predictions = test(model, pictures, judge, art, world, settings)
    if world.leads:
        results["evaluated"] = str(options.evaluate)

        def fill(new: Path) -> None:
            write_predictions(new, predictions)
            shown = {"evaluated": options.evaluate} | asdict(settings) | asdict(model.config)
            write_text(new / "report.html", report(Run(folder), results, art, shown))
            write_json(new / "results.json", results)
        tell(make_folder(folder, fill, numbered=not options.name), results)
    world.wait()


def evaluation_folder(options: argparse.Namespace) -> Path:
    """Named, or made up; it is written at the end, at once."""
    data = Path(options.labels or options.data).stem
    folder = Path(options.runs) / (options.name or f"{data}-evaluation-{datetime.now():%Y%m%d-%H%M%S}")
    if folder.exists():
        raise UserError(f"{folder} is there already; name another --name")
    return folder


def evaluate_labels(options: argparse.Namespace, world: World) -> None:
    """How often a saved model is right about the classes of labelled pictures.

    By default it scores the classes' names in place of its emotions, whatever it was trained on; with --map a class is
    a sum of its emotions.
    """
    settings = Settings(**given(options, Settings))
    world.compute_on(settings.device)
    folder, labels = evaluation_folder(options), labelled_files(Path(options.labels))
    classes, model = list(dict.fromkeys(labels.values())), load_model(options.evaluate, "--evaluate")
    if not options.map:
        model = adapted(model, emotions=[name.replace("_", " ").lower() for name in classes])
    members = memberships(options.map, classes, model.text.emotions) if options.map else torch.eye(len(classes))
    world.compute_in(settings.precision, model.to(world.device).config.width)
    shares, problems = class_shares(model, list(labels), members, settings, world)
    if not shares:
        raise UserError(f"--labels {options.labels}: none of its pictures can be used")
    if world.leads:
        facts = {"evaluated": options.evaluate, "labels": options.labels, "map": options.map, **world.environment()}
        results = right_or_wrong(labels, shares) | {"unusable_pictures": problems} | facts
        lines = [{"image": file, "class": labels[file], "probabilities": dict(zip(classes, each, strict=True))}
                 for file, each in shares.items()]

        def fill(new: Path) -> None:
            write_text(new / "labels.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
            write_text(new / "report.html", results_page(folder.name, [], label_rows(results), classes,
                                                         results["confusion"], facts))
            write_json(new / "results.json", results)
        written = make_folder(folder, fill, numbered=not options.name)
        print(aligned(label_rows(results)))
        print(f"{len(problems):,} pictures cannot be used\nreport: {written / 'report.html'}")
    world.wait()


@torch.no_grad()
def class_shares(model: SEVLM, files: Sequence[str], members: Tensor, settings: Settings, world: World
                 ) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Each usable picture's probabilities of the classes, and why the others cannot be used."""
    mine, shares, problems = files[world.rank::world.size], {}, {}
    decoded = torch.utils.data.DataLoader(PictureFiles(mine, model.config), settings.batch, collate_fn=list,
                                          num_workers=workers_of(settings, world))
    for start, pictures in zip(itertools.count(0, settings.batch), decoded):
        found = dict(zip(mine[start:], pictures))
        problems |= {file: why for file, why in found.items() if isinstance(why, str)}
        usable = [file for file in found if file not in problems]
        if usable:
            pixels = torch.stack([found[file] for file in usable]).to(world.device)
            with world.autocast():
                log_probs = emotion_log_probs(model, model.encode_image(pixels))
            shares |= dict(zip(usable, (log_probs.float().exp().cpu() @ members.T).tolist(), strict=True))
    return dict(sorted(world.merge(shares).items())), world.merge(problems)


# 9. One step

def one_step(options: argparse.Namespace) -> None:
    """The first step of the toy's training, on a world of a few paintings."""
    world = World()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan.of(argparse.Namespace(**vars(options) | dict(data_root=folder, toy_paintings=30)))
        settings, art = plan.settings, plan.art()
        world.compute_on(settings.device)
        model = plan.model(art).to(world.device).train()
        world.compute_in(settings.precision, model.config.width)
        pictures = open_pictures(art, model, settings, world)
        examples = examples_of(art, model, load_captions(art, model), pictures, settings)
        batch = examples.epoch(0, settings.batch)[0]
    learner, total = Learner(model, settings, world), settings.epochs * math.ceil(len(examples) / settings.batch)
    before = losses_of(model, batch, world)
    learner.backward([batch])
    norms = learner.gradient_norms()
    learner.update(pace(0, total, settings.warmup))
    after = losses_of(model, batch, world)
    titles = {"language": "language (4.1)", "vad": "VAD (Eq. 5)", "contrastive": "contrastive (Eq. 7)",
              "total": "all (Eq. 8)"}
    losses = [["", "weight", "before the step", "after it"]]
    losses += [[titles[name], f"{model.weight(name):g}" if name != "total" else "", f"{loss:.4f}", f"{after[name]:.4f}"]
               for name, loss in before.items()]
    groups = [["weights", "how many", "norm of the gradient", "learning rate"]]
    groups += [[group["name"], f"{sum(p.numel() for p in group['params']):,}", f"{norms[group['name']]:.4f}",
                f"{group['lr']:.2e}"] for group in learner.optimizer.param_groups]
    print(f"The first step of the toy's training: {len(batch.paintings)} paintings with two sentences each, "
          f"on {world.device} in {world.precision}.\n\n{aligned(losses)}\n\n{aligned(groups)}")


@torch.no_grad()
def losses_of(model: SEVLM, batch: Batch, world: World) -> dict[str, float]:
    """Without dropout, so that two calls can be compared."""
    model.eval()
    batch = batch.to(world.device)
    with world.autocast():
        losses = model(batch.pictures, **batch.inputs).losses
    model.train()
    return {name: float(losses[name]) for name in (*MAIN_LOSSES, "total") if name in losses}


def main() -> None:
    options = parser().parse_args()
    varied = {"study": varied_by(options.study)} if options.study else {}
    refuse_nonsense(named_flags(parser(), options), NEEDS, GOES_WITH, NOT_WITH | varied)
    if options.seeds < 1:
        raise UserError(f"--seeds is {options.seeds}; it must be at least 1")
    if options.one_step:
        return one_step(options)
    world, again = World(), ""
    try:
        if options.evaluate:
            (evaluate_labels if options.labels else evaluate_again)(options, world)
        else:
            run, plan = go_on(options, world) if options.resume else begin(options, world)
            again = f"--resume --name {run.folder.name} "
            with run.lock():
                (study if plan.values["study"] else train)(run, plan, world)
        world.leave()
    except Interrupted as stopped:
        raise UserError(f"{stopped}; {again}goes on") from None
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory: {again}--accumulate 2, or twice what it was, computes the same in half of "
                        "it") from None


if __name__ == "__main__":
    run_program(main)
