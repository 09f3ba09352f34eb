"""Training: one loop, from public weights or from nothing to scores, samples, a report and a model to pass on.

    python train.py                                     the toy model on the toy data, on a CPU
    python train.py --one-step                          one step of it in numbers, in under five seconds
    python train.py --data artemis_v1                   the paper's model, on one GPU of 11 GB
    python train.py --data mine.csv --small             pictures, emotions and explanations of one's own
    torchrun --nproc_per_node=2 train.py --data ...     the same on several GPUs; --nnodes=2: on two machines
    python train.py --study components                  Figure 5 and Table 1

    1. Settings         the paper's training (5.1) as defaults, the toy's preset, and the plan of a run
    2. Setup            what a training works with: every painting encoded once, references, a model
    3. Scores           predictions for a split, and what metrics.py says of them
    4. The loop         read `train` first: it is what all the rest is for
    5. Results          the best model's scores, report, model card
    6. Studies          the paper's ablations (5.3), one run after the other, with a table at the end
    7. Saved models     scored on a test split, or on folders of labelled pictures
    8. One step         what a step does, in numbers
    9. Program          flags, and the run that they begin or go on with

A run can be stopped at any moment and goes on with --resume. What is random is a function of (seed, step), so a
resumed run computes the same numbers as one that was never stopped. The run folder is written by the first process of
all; another machine needs its own copy of the data, and nothing of that folder. How a step's gradient is computed in
any precision and on several processes is support/learner.py's.
"""
import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import metrics
from data import (
    Art,
    Batch,
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
from support import report
from support.device import PRECISIONS, peak_memory
from support.files import is_hub_id, load_checked
from support.flags import named_flags, refuse_contradiction, refuse_nonsense
from support.labels import in_words, label_rows, labelled_files, memberships, right_or_wrong
from support.learner import MOST_SKIPPED, Interrupted, Learner, Progress, dropout_seed, finite, pace, resume, save_state
from support.memory import step_memory
from support.pages import colours
from support.program import UserError, aligned, run_program, write_json, write_text
from support.public import CLIP_HUB
from support.records import finite_only
from support.run import Run, json_lines, make_folder, newest_unfinished, stop_requests
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
SETTINGS = [known.name for known in dataclasses.fields(Settings)]
CONFIG = [known.name for known in dataclasses.fields(Config)]
SOURCES = dict(data=str, data_root=str, images=str, lexicon=str, gpt2=str, clip=str, toy_paintings=int, small=bool,
               study=str, seeds=int) | {"from": str}
MOVABLE = {"data_root", "images", "lexicon", "gpt2", "clip", "from", "cache", "device", "workers",
           "precision", "accumulate"}  # what may change while a run is stopped
PARTS = {"contrastive_head": ("alpha", "wrong_emotion", "wrong_image", "padding_in_means"),
         "vad_input": ("emotion_encoder", "two_way_emotions", "vad_on_emotion")}  # and what has no effect without them


@dataclass
class Plan:
    """All that decides a run, by the names of the flags: where data and first weights are, every setting, and what was
    named of the model's configuration."""
    values: dict

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Plan":
        sources, config = {name: vars(options)[name] for name in SOURCES}, given(options, Config)
        for part, details in PARTS.items():
            idle = [name for name in details if name in config and not config.get(part, True)]
            if idle:
                raise UserError(f"{flag(idle[0])} has no effect with --no{flag(part)[1:]}; leave one of them out")
        preset = SMALL if starting_config(sources).train_tower else {}  # only a small model trains its tower
        plan = cls(sources | asdict(Settings(**preset | given(options, Settings))) | config)
        plan.expected_config()  # an error now, where the model's settings contradict each other
        return plan

    @classmethod
    def stored(cls, values: dict, file: Path, named: dict) -> "Plan":
        """The plan that a run began with, where the flags named now take it: to another place, device or precision."""
        needed = {*SOURCES, *SETTINGS}
        if not (needed <= values.keys() <= needed.union(CONFIG)
                and all(type(values[name]) in (kind, type(None)) for name, kind in SOURCES.items())):
            raise UserError(f"{file} is damaged or of another version: this run cannot go on, start another")
        plan = cls(values | {name: value for name, value in named.items() if name in MOVABLE})
        try:
            known = asdict(plan.settings) | asdict(plan.expected_config()) | values  # by each flag's name
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


# 2. Setup

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
        store = open_store(art, model, settings.cache or None, world.dtype)
    problems = fill_store(store, art, model, wanted, workers_of(settings, world), world.local_rank, world.local_size,
                          world.dtype)
    problems = world.merge({art.names[painting]: why for painting, why in problems.items()})
    world.wait()
    return Pictures(store, np.array([name not in problems for name in art.names]), problems)


def workers_of(settings: Settings, world: World) -> int:
    if settings.workers >= 0:
        return settings.workers
    return min(4, os.cpu_count() or 1) if world.device.type == "cuda" else 0


Predictions = dict[str, metrics.Prediction]  # by painting


class Judge:
    """References and the EA classifier of a data set, trained if need be: all that scoring needs, loaded once."""

    def __init__(self, art: Art):
        self.emotions, self.classifier = art.emotions, metrics.text_classifier_of(art, train=True)
        self.references = {split: metrics.references_of(art, split) for split in ("val", "test")}

    def scores(self, predictions: Predictions, split: str) -> Scores:
        """None where there is nothing to score: a tiny split may be empty, and a model may compute nan."""
        shares = [sum(one.probabilities.values()) for one in predictions.values()]
        if not shares or not all(map(math.isfinite, shares)):
            return {}
        return metrics.evaluate(predictions, self.references[split], self.emotions, self.classifier)


@dataclass
class Setup:
    """All that a training works with; to score a saved model takes the same."""
    art: Art
    model: SEVLM
    pictures: Pictures
    settings: Settings
    world: World
    judge: Judge | None = None  # the first process's: it scores for all

    @classmethod
    def of(cls, art: Art, model: SEVLM, settings: Settings, world: World, wanted: np.ndarray | None = None,
           before: str = "") -> "Setup":
        """Ready to compute with the pictures of all paintings, or of the `wanted` ones, and in the precision that a run
        chose `before` it was stopped."""
        judge = Judge(art) if world.leads else None
        world.compute_in(settings.precision, model.config.width, before)
        pictures = open_pictures(art, model.to(world.device), settings, world, wanted)
        return cls(art, model, pictures, settings, world, judge)


# 3. Scores

TABLE = ("ACC", "EA", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR (exact+stem)", "ROUGE-L", "CIDEr", "Unique")


@torch.no_grad()
def predict(setup: Setup, split: str, top_p: float) -> Predictions:
    """For each painting of a split the most probable emotion and an explanation of it; top_p 0 is greedy decoding."""
    art, model, settings, world = setup.art, setup.model.eval(), setup.settings, setup.world
    paintings = art.paintings(split)
    mine = paintings[setup.pictures.usable[paintings]][world.rank::world.size]
    batches = PictureBatches(setup.pictures.store, mine, max(1, 2 * settings.batch // settings.accumulate))
    found = {}
    for indices, pictures in loader(batches, workers_of(settings, world), world.device):
        with world.autocast():
            pictures = pictures.to(world.device)
            features = model.encode_image(pictures) if model.config.train_tower else pictures  # (B, K, d)
            log_probs = emotion_log_probs(model, features)  # (B, E)
            emotions = [model.text.emotions[index] for index in log_probs.argmax(1).tolist()]
            sentences = generate(model, features, [model.text.opening(emotion) for emotion in emotions], top_p=top_p,
                                 seeds=[settings.seed + int(painting) for painting in indices])
        answers = zip(indices, emotions, sentences.ids.tolist(), log_probs.exp().tolist(), strict=True)
        for painting, emotion, ids, shares in answers:
            probabilities = dict(zip(model.text.emotions, shares, strict=True))
            found[art.names[painting]] = [emotion, model.text.reason(ids), probabilities]
    return {name: metrics.Prediction(*answer) for name, answer in sorted(world.merge(found).items())}


def validate(setup: Setup) -> tuple[dict[str, float], Predictions]:
    """Greedy scores on the validation split, the same for all processes, and what they are scores of."""
    predictions = predict(setup, "val", top_p=0.0)
    scores = setup.judge.scores(predictions, "val") if setup.judge else {}
    return setup.world.share({name: score.value for name, score in scores.items()}), predictions


def test(setup: Setup) -> tuple[dict, dict[str, Predictions]]:
    """Scores on the test split by nucleus sampling, as in 5.1, and greedily, and the predictions."""
    art, judge = setup.art, setup.judge
    predictions = {decoding: predict(setup, "test", top_p)
                   for decoding, top_p in (("nucleus", setup.settings.top_p), ("greedy", 0.0))}
    if not judge:
        return {}, predictions
    tested, references = {}, judge.references["test"]
    for decoding, found in predictions.items():
        scores = judge.scores(found, "test")
        if not scores:
            raise UserError("there is nothing to score: " + (
                "the model computes no numbers (nan); train another with a smaller --lr" if found else
                f"no painting of the test split of {art.name} has a usable picture"))
        confusion = metrics.confusion_matrix(*metrics.emotions_of(found, references), art.emotions)
        tested[decoding] = metrics.as_json(scores, bootstrap(scores)) | {"confusion": confusion.tolist()}
    missing, acc_without = metrics.without_prediction(predictions["greedy"], references)
    numbers = {"best_possible_acc": best_accuracy(art, "test"), "ea_classifier": judge.classifier.accuracy,
               "their_cost_in_acc": acc_without - (tested["greedy"]["ACC"] or 0),
               "memory_gb": peak_memory(setup.world.device)}
    return {"data": art.name, "emotions": list(art.emotions), "test": tested,
            "unusable_pictures": setup.pictures.problems, "test_paintings_without_picture": missing,
            **finite_only(numbers), "environment": setup.world.environment()}, predictions


# 4. The loop

@dataclass
class Position(Progress):
    """Where a training stands, with what its validations have shown."""
    best: float = -1.0  # ACC + BLEU-4 of the model that was kept; -1: none yet
    acc: float = -1.0
    bleu: float = -1.0
    stale: int = 0  # validations in a row that improved neither
    model: str = ""  # what training does not change of it

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


def parameter_groups(model: SEVLM, settings: Settings) -> list[dict]:
    """5.1: VAD emotion modelling learns twice as fast as the rest."""
    rest, vad = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (vad if name.startswith(("emotion_encoder.", "fusion.")) else rest).append(parameter)
    groups = [dict(params=rest, name="all other weights", base=settings.lr),
              dict(params=vad, name="VAD emotion modelling", base=settings.vad_lr)]
    return [group for group in groups if group["params"]]


def train(run: Run, plan: Plan, world: World) -> None:
    """Train, validate, keep the best, and score it on the test split."""
    settings = plan.settings
    world.compute_on(settings.device)
    at = restored(Position, world.share(run.position()), run.state_file)
    with world.first_here():
        art = plan.art()
        model = plan.model(art)
    setup = Setup.of(art, model, settings, world, before=at.precision)
    examples = examples_of(setup)
    recognise(at, model, examples, run)
    at.precision, model.about = world.precision, {"data": art.name}
    learner = Learner(model, settings, world, parameter_groups(model, settings))
    resume(run, learner, at)
    total = settings.epochs * math.ceil(len(examples) / settings.batch)
    introduce(run, setup, examples, at, total)
    started = time.monotonic() - at.seconds
    meter = report.Meter(at.step, total, settings.batch, "pictures", world.leads)
    model.train()
    with stop_requests(world.say) as asked:
        for epoch, parts in batches_from(at.step, examples, settings, world):
            if at.stale > settings.patience:
                break
            torch.manual_seed(dropout_seed(settings.seed, at.step, world.rank))
            losses, norm, stop = learner.step(parts, pace(at.step, total, settings.warmup), asked.is_set())
            at.count(norm)
            at.seconds = time.monotonic() - started
            meter.note(at.step, losses)
            run.append("log.jsonl", finite_only({
                "step": at.step, "epoch": epoch, "losses": losses, "lr": learner.rates, "gradient": norm,
                "pictures_per_second": meter.rate, "memory_gb": peak_memory(world.device)}))
            if at.skipped_in_a_row == MOST_SKIPPED:
                give_up(run, at, losses, parts, art)
            validated = at.step % settings.validate_every == 0 or at.step == total
            if validated:
                scores, predictions = validate(setup)
                model.train()
                better = finite(model) and at.note(scores)
                if better and world.leads:
                    save(model, run.folder)
                record(run, at, scores, better, predictions, world)
            if validated or stop:
                save_state(run, learner, at)
            if stop:
                raise Interrupted(f"stopped after step {at.step:,} of {total:,}")
    finish(run, plan, setup, at)


def examples_of(setup: Setup) -> Examples:
    art, model, pictures, settings = setup.art, setup.model, setup.pictures, setup.settings
    values = model.lexicon.values if model.lexicon else None
    return Examples(art, load_captions(art, model), model.text, values, pictures.store, pictures.usable, settings.seed,
                    settings.drop_single_emotion, trim=not model.config.padding_in_means)


def batches_from(step: int, examples: Examples, settings: Settings, world: World) -> Iterator[tuple[int, list[Batch]]]:
    """The epoch and this process's batches, a list of `accumulate`, of each step from `step` to the end."""
    steps = math.ceil(len(examples) / settings.batch)  # of an epoch
    for epoch in range(step // steps, settings.epochs):
        done = max(0, step - epoch * steps) * settings.accumulate
        own = examples.epoch(epoch, settings.batch, world.rank, world.size, settings.accumulate)
        batches = iter(loader(own, workers_of(settings, world), world.device, done))
        while parts := list(itertools.islice(batches, settings.accumulate)):
            yield epoch, parts


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


def introduce(run: Run, setup: Setup, examples: Examples, at: Position, total: int) -> None:
    """What is about to happen, and what the user may not know of the data."""
    art, world, unusable = setup.art, setup.world, setup.pictures.problems
    trained = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    lines = [f"{run.folder}: {len(examples):,} paintings of {art.name}, {trained:,} weights to train on {world.place}",
             *art.notes[:5]]
    if art.problems:
        lines.append(f"{len(art.problems):,} rows cannot be used, such as {art.problems[0]}")
    if unusable:
        shown = "; ".join(f"{name}: {why}" for name, why in itertools.islice(unusable.items(), 3))
        lines.append(f"{len(unusable):,} pictures cannot be used, such as {shown}")
    if at.step:
        lines.append(f"resumed at step {at.step:,} of {total:,}")
    if world.leads:
        lines.append(memory_needed(setup))
    world.say("\n".join(lines))


def memory_needed(setup: Setup) -> str:
    """What a step of this process needs where every sentence is of full length, counted before it starts."""
    model, settings, world = setup.model, setup.settings, setup.world
    length, part = model.config.length, math.ceil(settings.batch / settings.accumulate / world.size)

    def gradients(paintings: int) -> None:
        pictures, inputs = made_up_batch(model, paintings, "sea " * length, length)
        for _ in range(min(2, settings.accumulate)):  # the second part finds gradients there
            with world.autocast():
                model(pictures, **inputs).losses["total"].backward()
    try:
        return f"memory of a step, counted: {step_memory(gradients, model.train())(part) / 1e9:.2f} GB"
    except (ValueError, torch.OutOfMemoryError):  # the two counts do not line up: no reason not to begin
        return "memory of a step: it could not be counted"


def made_up_batch(model: SEVLM, paintings: int, explanation: str, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Empty pictures as a store has them, and two sentences for each with labels and negatives."""
    config = model.config
    shape, dtype = (((3, config.image_size, config.image_size), torch.uint8) if config.train_tower else
                    ((config.patches, config.tower_width), torch.half))
    ids = model.text.encode(config.emotions[:2] * paintings, [explanation] * 2 * paintings, length).to(model.device)
    sentence = torch.arange(2 * paintings, device=model.device)
    return torch.zeros(paintings, *shape, dtype=dtype, device=model.device), model.inputs(ids) | dict(
        labels=model.text.labels(ids), wrong_emotion=sentence ^ 1, wrong_image=sentence.roll(2))


def record(run: Run, at: Position, scores: dict[str, float], better: bool, predictions: Predictions, world: World
           ) -> None:
    """A validation in the log and on the terminal, with what was said of the same few pictures."""
    run.append("log.jsonl", finite_only({"step": at.step, "validation": scores, "best": better}))
    shown = list(predictions.items())[::max(1, len(predictions) // 6)][:6]
    run.append("samples.jsonl", *({"step": at.step, "image": name, **asdict(one)} for name, one in shown))
    told = "  ".join(f"{name} {metrics.display(name, scores[name])}" for name in TABLE if name in scores)
    world.say(f"validation at step {at.step:,}: {told or 'nothing to score'}" + "  best so far" * better)
    for image, one in shown[:2]:
        world.say(f"    {image.split('/')[-1]}: {one.emotion} because {one.explanation}")


def give_up(run: Run, at: Position, losses: dict[str, float], parts: Sequence[Batch], art: Art) -> None:
    shown = ", ".join(f"{name} {loss:.3g}" for name, loss in losses.items())
    names = ", ".join(art.names[painting] for batch in parts for painting in batch.paintings)
    raise UserError(f"step {at.step}: for the {MOST_SKIPPED}th time in a row the gradient is not finite ({shown}). "
                    f"{run.folder} keeps its last good state, but going on would end here again: start another run "
                    f"with a smaller --lr or --precision float32. The batch: {names}")


# 5. Results

CURVES = {"emotion: ACC, EA, top-2": ("ACC", "EA", "Top-2"),
          "words: BLEU-4, METEOR, ROUGE-L": ("BLEU-4", "METEOR (exact+stem)", "ROUGE-L"),
          "distinct explanations": ("Unique",)}


def finish(run: Run, plan: Plan, setup: Setup, at: Position) -> None:
    """The best model on the test split, which nothing has been chosen by."""
    model, world = setup.model, setup.world
    if at.best < 0:
        world.say("no validation gave a number: the last weights are kept, which need not be the best")
        if world.leads and finite(model):
            save(model, run.folder)
    model.load_state_dict(world.share_tensors(load(run.folder).state_dict() if world.leads else {}))
    results, predictions = test(setup)
    if world.leads:
        results |= {"steps": at.step, "skipped_steps": at.skipped, "seconds": at.seconds}
        write_predictions(run.folder, predictions)
        shown = asdict(setup.settings) | asdict(model.config)
        write_text(run.folder / "report.html", run_page(run, results, setup.art, shown))
        write_text(run.folder / "README.md", model_card(run.folder.name, model, plan, results))
        write_json(run.results_file, results)  # last: now the run is finished
        tell(run.folder, results)
        print(f"Now try: python sample.py --checkpoint {run.folder} examples/*.png")
    world.wait()


def write_predictions(folder: Path, predictions: dict[str, Predictions]) -> None:
    for name, lines in prediction_files(predictions).items():
        write_text(folder / name, lines)


def prediction_files(predictions: dict[str, Predictions]) -> dict[str, str]:
    return {f"test-{decoding}.jsonl": json_lines({"image": image, **asdict(one)} for image, one in found.items())
            for decoding, found in predictions.items()}


def tell(folder: Path, results: dict) -> None:
    print("\n".join([aligned(test_rows(results)), *remarks(results), f"report: {folder / 'report.html'}"]))


def run_page(run: Run, results: dict, art: Art, settings: dict) -> str:
    """The page of a run, or of a saved model that was scored."""
    training = report.training(run.records("log.jsonl"), CURVES, stories(run.records("samples.jsonl"), art))
    return report.results_page(run.folder.name, remarks(results), test_rows(results), results["emotions"],
                               results["test"]["greedy"]["confusion"], settings | results["environment"], training)


def test_rows(results: dict) -> list[list[str]]:
    return report.score_rows("test", results["test"], metrics.display)


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


def stories(samples: Sequence[Mapping], art: Art) -> Iterator[str]:
    """What was said of the same few pictures as training went on."""
    files, colour = dict(zip(art.names, art.files, strict=True)), colours(art.emotions)
    for image in dict.fromkeys(sample["image"] for sample in samples):
        mine = [sample for sample in samples if sample["image"] == image]
        told = [(one["step"], one["emotion"], f"because {one['explanation']}") for one in mine]
        yield report.story_card(image, files[image], mine[-1]["probabilities"], colour, told)


ABOUT = """\
A small emotional vision language model (SEVLM, arXiv 2403.11150): it names the emotion that a picture evokes and says
why in a sentence. `python sample.py picture.jpg --checkpoint FOLDER` asks it."""
USE = """\
For research on what pictures evoke. An emotion is what some annotators said they felt; the model repeats them, and
their culture, with confidence. It measures nobody's feelings and is no basis for decisions about people. The terms of
its data, and of the weights that it started from, hold for it too."""
NO_LEXICON = "It uses no VAD lexicon."
OWN_LEXICON = "`lexicon.txt` is the small list that comes with the code, under its MIT licence."
OTHER_LEXICON = """\
`lexicon.txt` is the VAD lexicon that the model was trained with. If it is NRC VAD: that is for
research only and must not be passed on, so do not publish this folder with it."""


def model_card(name: str, model: SEVLM, plan: Plan, results: dict) -> str:
    """README.md of a run: what somebody needs to know who is given the folder. It names no place of this machine."""
    lexicon = NO_LEXICON
    if model.lexicon:
        lexicon = OWN_LEXICON if model.lexicon.text == OUR_LEXICON.read_text(encoding="utf-8") else OTHER_LEXICON
    settings = {key: value for key, value in plan.part(SETTINGS).items() if key not in MOVABLE} | plan.part(CONFIG)
    facts = {"Data": results["data"], "Emotions": ", ".join(model.text.emotions), "Started from": origin(plan.values)}
    return report.card(name, "visual-emotion, image-to-text, sevlm", ABOUT, facts, test_rows(results), remarks(results),
                       f"{USE} {lexicon}", settings)


def origin(sources: dict) -> str:
    """Where the first weights came from; a path is nobody else's business."""
    if sources["from"]:
        return f"the weights of {Path(sources['from']).name}"
    if is_small(sources):
        return "random weights"
    return " and ".join(source if is_hub_id(source) else name
                        for name, source in (("CLIP", sources["clip"]), ("GPT-2", sources["gpt2"])))


# 6. Studies

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
    judge, results, parts = Judge(plan.art()), {}, {}
    for decoding in ("greedy", "nucleus"):
        runs = {label: [scores_of_run(run.folder / run_name(label, seed), decoding, judge) for seed in seeds]
                for label in variants}
        found = report.side_by_side(runs, metrics.compare)
        rows = report.comparison_rows(decoding, found, metrics.display)
        print("\n" + aligned(rows))
        parts[f"{decoding.capitalize()} decoding"] = found, rows
        results |= {f"{decoding}: {label}": scores for label, scores in found.items()}
    note = (f"Seeds for each variant: {len(seeds)}; ± is the standard deviation over them. "
            f"{how_tested(pooled(runs['full']))} Holm corrects for the {(len(runs) - 1) * len(found['full'])} p-values "
            "of a table. None of them knows how another seed would have come out.")
    print(f"\n{note}\nreport: {run.folder / 'report.html'}")
    write_text(run.folder / "report.html", report.comparison_page(f"Study: {plan.values['study']}", note, parts))
    write_json(run.results_file, results)


def scores_of_run(folder: Path, decoding: str, judge: Judge) -> Scores:
    predictions = dict(metrics.read_predictions(folder / f"test-{decoding}.jsonl", judge.emotions))
    return {name: score for name, score in judge.scores(predictions, "test").items() if name in TABLE}


# 7. Saved models

def evaluate_again(options: argparse.Namespace, folder: Path, settings: Settings, world: World) -> None:
    """Score a saved model on the test split of --data. Its own emotions are the data's: a label is words."""
    with world.first_here():
        art = art_of(options)
    model = adapted(load_model(options.evaluate, "--evaluate"), emotions=art.emotions)
    results, predictions = test(Setup.of(art, model, settings, world, wanted=art.paintings("test")))
    if world.leads:
        shown = {"evaluated": options.evaluate} | asdict(settings) | asdict(model.config)
        files = {"report.html": run_page(Run(folder), results, art, shown),
                 "results.json": results | {"evaluated": str(options.evaluate)}}
        tell(make_folder(folder, prediction_files(predictions) | files, numbered=not options.name), results)


def evaluate_labels(options: argparse.Namespace, folder: Path, settings: Settings, world: World) -> None:
    """How often a saved model is right about the classes of labelled pictures.

    By default it scores the classes' names in place of its emotions, whatever it was trained on; with --map a class is
    a sum of its emotions.
    """
    labels, model = labelled_files(Path(options.labels)), load_model(options.evaluate, "--evaluate")
    classes = list(dict.fromkeys(labels.values()))
    if options.map:
        members = memberships(options.map, classes, model.text.emotions)  # (classes, E)
    else:
        model = adapted(model, emotions=list(map(in_words, classes)))
        members = torch.eye(len(classes))
    world.compute_in(settings.precision, model.to(world.device).config.width)
    shares, problems = class_shares(model, list(labels), members, settings, world)
    if not shares:
        raise UserError(f"--labels {options.labels}: none of its pictures can be used")
    if world.leads:
        facts = {"evaluated": options.evaluate, "labels": options.labels, "map": options.map, **world.environment()}
        results = right_or_wrong(labels, shares) | {"unusable_pictures": problems} | facts
        answers = [{"image": file, "class": labels[file], "probabilities": dict(zip(classes, each, strict=True))}
                   for file, each in shares.items()]
        page = report.results_page(folder.name, [], label_rows(results), classes, results["confusion"], facts)
        files = {"labels.jsonl": json_lines(answers), "report.html": page, "results.json": results}
        written = make_folder(folder, files, numbered=not options.name)
        print(aligned(label_rows(results)))
        print(f"{len(problems):,} pictures cannot be used\nreport: {written / 'report.html'}")


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


# 8. One step

def one_step(options: argparse.Namespace) -> None:
    """The first step of the toy's training, on a world of a few paintings."""
    world = World()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan.of(argparse.Namespace(**vars(options) | dict(data_root=folder, toy_paintings=30)))
        settings, art = plan.settings, plan.art()
        world.compute_on(settings.device)
        model = plan.model(art).to(world.device).train()
        world.compute_in(settings.precision, model.config.width)
        setup = Setup(art, model, open_pictures(art, model, settings, world), settings, world)
        examples = examples_of(setup)
        batch = examples.epoch(0, settings.batch)[0]
    learner = Learner(model, settings, world, parameter_groups(model, settings))
    total = settings.epochs * math.ceil(len(examples) / settings.batch)
    before = losses_of(model, batch, world)
    learner.backward([batch])
    norms = learner.gradient_norms()
    learner.update(pace(0, total, settings.warmup))
    after = losses_of(model, batch, world)
    titles = {"language": "language (4.1)", "vad": "VAD (Eq. 5)", "contrastive": "contrastive (Eq. 7)",
              "total": "all (Eq. 8)"}
    losses = [["", "weight", "before the step", "after it"]]
    for name, title in titles.items():
        if name in before:
            weight = "" if name == "total" else f"{model.weight(name):g}"
            losses.append([title, weight, f"{before[name]:.4f}", f"{after[name]:.4f}"])
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
    return {name: float(loss) for name, loss in losses.items()}


# 9. Program

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


def open_run(options: argparse.Namespace, world: World) -> tuple[Run, Plan]:
    """A new run, its plan written; or the one to --resume, with the plan that it began with."""
    plan, found = None if options.resume else Plan.of(options), None
    if world.leads:
        if plan:
            folder = run_folder(options, Path(options.data).stem, options.study)
            run = Run.begin(folder, plan.values, PRIVATE, numbered=not options.name)
        elif options.name:
            run = Run(Path(options.runs) / options.name)
        else:
            run = newest_unfinished(Path(options.runs), lambda plan: options.study in (None, plan.get("study")))
        found = [str(run.folder), run.plan()]
    folder, values = world.share(found)
    run = Run(Path(folder), world.leads)
    return run, plan or Plan.stored(values, run.plan_file, named_flags(parser(), options))


def evaluate_saved(options: argparse.Namespace, world: World) -> None:
    """All that it finds is written at the end, at once."""
    folder = run_folder(options, Path(options.labels or options.data).stem, "evaluation")
    if folder.exists():
        raise UserError(f"{folder} is there already; name another --name")
    settings = Settings(**given(options, Settings))
    world.compute_on(settings.device)
    (evaluate_labels if options.labels else evaluate_again)(options, folder, settings, world)
    world.wait()


def run_folder(options: argparse.Namespace, *words: str | None) -> Path:
    """--name, or these words and the time."""
    made_up = "-".join([*filter(None, words), f"{datetime.now():%Y%m%d-%H%M%S}"])
    return Path(options.runs) / (options.name or made_up)


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
            evaluate_saved(options, world)
        else:
            run, plan = open_run(options, world)
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
