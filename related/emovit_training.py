"""Training EmoVIT (emovit.py): the Q-Former and the projection learn from records; what is frozen stays as it was.

    1. Settings     the published recipe, the toy's preset
    2. Examples     records (picture, question, answer) in batches of like length
    3. The loop     that of train.py, on records: a step at a time, on one process or several, in any precision
    4. A run        begun, or gone on with

Called by emovit.py's program. The best epoch by the validation split's loss is kept; the original kept its last.
Shapes: B records of a batch, K patches of width E, L tokens of a row.
"""
import argparse
import dataclasses
import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data import Art, Batch, loader
from related.emovit import GPT2_SMALL, Config, EmoVIT, Encoded, Text, from_public, from_run, save
from related.instructions import records_of, source_of
from related.questions import KINDS, Record, read_records
from related.training import best_epoch, finish, refuse_another
from sevlm import BUNDLED, IGNORE, load_model
from support.device import peak_memory
from support.learner import MOST_SKIPPED, Interrupted, Learner, Progress, dropout_seed, finite, pace, resume, save_state
from support.program import UserError
from support.public import CLIP_HUB
from support.records import finite_only
from support.report import Meter
from support.run import Run, stop_requests
from support.settings import add_flags, check, flag, given, option, restored
from support.world import World
from train import Pictures, batches_from, give_up, open_pictures, workers_of

# 1. Settings

@dataclass
class Settings:
    """How to train. Published, from InstructBLIP's weights: 4 epochs, rate 1e-5, one record a step."""
    kinds: str = option(",".join(KINDS), "kinds of record to learn from")
    per_picture: int = option(0, "records of each picture and kind that an epoch visits, the next epoch the next ones; "
                                 "0: all", least=0, most=10**6)
    leave_out: float = option(0.0, "share of a question's tokens to leave out, at most, so that other wordings will do",
                              least=0, most=1)
    epochs: int = option(4, "passes over the training records", least=1, most=10**6)
    batch: int = option(32, "records of a step, over all processes", least=1, most=10**6)
    accumulate: int = option(1, "parts of a step computed one after the other, to save memory", least=1, most=10**6)
    lr: float = option(1e-4, "learning rate", above=0)
    weight_decay: float = option(0.005, "AdamW's weight decay, of matrices and tables only", least=0)
    warmup: int = option(1000, "steps until the learning rate is reached; it falls to zero linearly from there",
                         least=0, most=10**9)
    cache: str = option("", "folder for every picture's features (default: beside the data)")
    workers: int = option(-1, "processes that prepare batches; -1: up to 4 with a GPU, none without", least=-1, most=64)
    seed: int = 0  # this one and the following have a flag already: answering has it too
    precision: str = "auto"
    device: str = "auto"

    def __post_init__(self):
        check(self)
        if unknown := set(self.chosen) - set(KINDS):
            raise UserError(f"--kinds: there is no {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")

    @property
    def chosen(self) -> list[str]:
        return self.kinds.split(",")


MOVABLE = ("accumulate", "cache", "workers", "precision", "device")  # what decides nothing of what is computed
# leave_out: 88.7% of the toy's emotions are right as the mean over five wordings of the instruction, four of them never
# trained on; without it 60.8%, and 88.0% under the one that was
SMALL = dict(per_picture=2, leave_out=0.6, epochs=6, batch=32, lr=1.5e-3, warmup=50)
SMALL_MODEL = dict(queries=8, q_blocks=2, q_width=128, q_heads=4, q_inner=256, q_positions=128, cross_every=1,
                   dropout=0.0, answer_length=48, train_language_model=True)


# 2. Examples

WINDOW = 50  # batches, among whose records like lengths come together


class Examples:
    """Records with usable pictures, to train on or to validate with.

    Of each picture an epoch visits a few records of a kind, the next ones in the next epoch, so that a picture with
    many voices counts no more than another. What is drawn is a function of (seed, epoch) alone, as in data.py.
    """

    def __init__(self, art: Art, records: Iterable[Record], text: Text, pictures: Pictures, settings: Settings):
        painting = {name: index for index, name in enumerate(art.names)}
        records = [one for one in records if pictures.usable[painting[one.image]]]
        if not records:
            raise UserError(f"{art.name} has no {' or '.join(settings.chosen)} record with a usable picture in train, "
                            "or none in val")
        self.kinds, self.store, self.seed = Counter(one.kind for one in records), pictures.store, settings.seed
        self.paintings = np.array([painting[one.image] for one in records])  # (R,)
        self.encoded = Encoded(text.questions(one.question for one in records),
                               text.answers(one.answer for one in records))
        group = self.paintings * len(KINDS) + [KINDS.index(one.kind) for one in records]
        _, self.group, self.count = np.unique(group, return_inverse=True, return_counts=True)
        self.leave_out = settings.leave_out
        self.per_picture = settings.per_picture or self.count.max()
        names = "\n".join(one.image for one in records).encode(errors="replace")
        self.fingerprint = hashlib.sha256(names + self.encoded.ids.tobytes()).hexdigest()

    def __len__(self) -> int:
        """Records of an epoch."""
        return int(np.minimum(self.count, self.per_picture).sum())

    def visited(self, epoch: int) -> np.ndarray:
        """The records whose turn it is."""
        shuffled = np.random.default_rng(self.seed).permutation(len(self.group))
        order = shuffled[np.argsort(self.group[shuffled], kind="stable")]  # group by group, each in an order of its own
        group = self.group[order]
        place = np.arange(len(order)) - np.searchsorted(group, group)
        return order[(place - epoch * self.per_picture) % self.count[group] < self.per_picture]

    def epoch(self, epoch: int, batch: int, part: int = 0, parts: int = 1, accumulate: int = 1) -> "Epoch":
        return Epoch(self, epoch, batch, part, parts, accumulate)


class Epoch(torch.utils.data.Dataset):
    """What one of `parts` processes computes in an epoch: `accumulate` batches for each step of `batch` records."""

    def __init__(self, examples: Examples, epoch: int, batch: int, part: int, parts: int, accumulate: int):
        self.examples, self.accumulate, self.part, self.parts = examples, accumulate, part, parts
        self.seed = [examples.seed, epoch]
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(examples.visited(epoch))
        window = np.arange(len(order)) // (WINDOW * batch)
        order = order[np.lexsort((examples.encoded.length[order], window))]
        steps = np.split(order, range(batch, len(order), batch))
        self.steps = [steps[place] for place in rng.permutation(len(steps))]

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __getitem__(self, index: int) -> Batch:
        step, turn = divmod(index, self.accumulate)
        everyone, encoded, weight = self.steps[step], self.examples.encoded, 1.0
        own = np.array_split(np.arange(len(everyone)), self.parts * self.accumulate)[self.part * self.accumulate + turn]
        if len(own) == 0:  # more parts than records: take part without weight
            own, weight = np.arange(1), 0.0
        mine = everyone[own]
        share = weight * encoded.answered[mine].sum() / encoded.answered[everyone].sum()  # of the step's tokens
        paintings = self.examples.paintings[mine]
        pictures = torch.from_numpy(self.examples.store.get(paintings))
        inputs = without(encoded.inputs(mine), torch.from_numpy(self.left_out(step)[own]))
        return Batch(paintings, pictures, inputs, {"language": float(share)})

    def left_out(self, step: int) -> np.ndarray:
        """Which tokens of a step's questions are left out, of some many and of some few: (B, longest question)."""
        everyone, rng = self.steps[step], np.random.default_rng([*self.seed, step])
        share = self.examples.leave_out * rng.random((len(everyone), 1))
        return rng.random((len(everyone), self.examples.encoded.asked[everyone].max())) < share


def without(inputs: dict[str, Tensor], left_out: Tensor) -> dict[str, Tensor]:
    """Inputs without some tokens of the questions; what follows moves up, and they become padding."""
    ids, labels, asked = (inputs[name] for name in ("ids", "labels", "asked"))
    gone = F.pad(asked & left_out[:, :asked.shape[1]], (0, ids.shape[1] - asked.shape[1]))  # (N, L)
    order = gone.int().argsort(dim=1, stable=True)
    left = asked.sum(1) - gone.sum(1)
    return dict(ids=ids.gather(1, order), labels=labels.gather(1, order),
                asked=torch.arange(int(left.max())) < left[:, None])


# 3. The loop

@dataclass
class Position(Progress):
    """Where a training stands, with what its validations have shown, one after each epoch."""
    losses: list[float] = field(default_factory=list)


def parameter_groups(model: EmoVIT, settings: Settings) -> list[dict]:
    """No weight decay for biases and LayerNorms."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices, vectors = [w for w in trained if w.dim() > 1], [w for w in trained if w.dim() < 2]
    return [dict(params=matrices, name="matrices", base=settings.lr),
            dict(params=vectors, name="biases and LayerNorms", base=settings.lr, weight_decay=0.0)]


@torch.no_grad()
def validate(model: EmoVIT, examples: Examples, settings: Settings, world: World) -> float:
    """The mean of -log p over all tokens of the answers."""
    model.eval()
    total = torch.zeros(2, dtype=torch.double)
    own = examples.epoch(0, settings.batch, world.rank, world.size)
    for batch in loader(own, workers_of(settings, world), world.device):
        batch = batch.to(world.device)
        with world.autocast():
            surprise = model(batch.pictures, **batch.inputs).surprise
        if batch.shares["language"]:
            total += torch.stack([surprise.sum(), (batch.inputs["labels"] != IGNORE).sum()]).double().cpu()
    model.train()
    surprise, tokens = world.sum(total).tolist()
    return surprise / tokens


def train(run: Run, art: Art, records: Sequence[Record], model: EmoVIT, settings: Settings, world: World) -> None:
    """Train, validate after each epoch, and keep the best: train.py's loop on records."""
    at = restored(Position, world.share(run.position()), run.state_file)
    world.compute_in(settings.precision, model.config.width, at.precision)
    pictures = open_pictures(art, model.to(world.device), settings, world)
    examples = Examples(art, records, model.text, pictures, settings)
    held_out = Examples(art, records_of(art, "val", settings.chosen), model.text, pictures,
                        dataclasses.replace(settings, leave_out=0.0))
    recognise(at, model, examples, run)
    at.precision = world.precision
    learner = Learner(model, settings, world, parameter_groups(model, settings))
    resume(run, learner, at)
    steps = math.ceil(len(examples) / settings.batch)  # of an epoch
    total = settings.epochs * steps
    introduce(run, art, model, examples, pictures, world, at, total)
    started, meter = time.monotonic() - at.seconds, Meter(at.step, total, settings.batch, "records", world.leads)
    model.train()
    with stop_requests(world.say) as asked:
        for epoch, parts in batches_from(at.step, examples, settings, world):
            torch.manual_seed(dropout_seed(settings.seed, at.step, world.rank))
            losses, norm, stop = learner.step(parts, pace(at.step, total, settings.warmup), asked.is_set())
            at.count(norm)
            at.seconds = time.monotonic() - started
            meter.note(at.step, losses)
            run.append("log.jsonl", finite_only({"step": at.step, "epoch": epoch, "losses": losses, "gradient": norm}))
            if at.skipped_in_a_row == MOST_SKIPPED:
                give_up(run, at, losses, parts, art)
            validated = at.step % steps == 0
            if validated:
                at.losses.append(validate(model, held_out, settings, world))
                better = finite(model) and best_epoch(at.losses) == len(at.losses)
                run.append("log.jsonl", finite_only({"step": at.step, "validation": at.losses[-1], "best": better}))
                world.say(f"epoch {epoch + 1}: validation loss {at.losses[-1]:.4f}" + "  best so far" * better)
                if better and world.leads:
                    save(model, run.folder)
            if validated or stop:
                save_state(run, learner, at)
            if stop:
                raise Interrupted(f"stopped after step {at.step:,} of {total:,}")
    if world.leads:
        finish(run, finite_only({
            "data": art.name, "records": examples.kinds, "validation": at.losses, "steps": at.step,
            "skipped_steps": at.skipped, "seconds": at.seconds, "unusable_pictures": pictures.problems,
            "memory_gb": peak_memory(world.device), "environment": world.environment()}))
        print("Now try: python -m related.emovit examples/*.png --ask 'what is in the picture?'")
    world.wait()


def recognise(at: Position, model: EmoVIT, examples: Examples, run: Run) -> None:
    """Refuse to go on with other records, or other frozen weights, than the run began with."""
    digest = hashlib.sha256(examples.fingerprint.encode())
    for parameter in model.parameters():
        if not parameter.requires_grad:
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
    known = digest.hexdigest()[:16]
    if at.trained_on not in ("", known):
        raise UserError(f"{run.folder} began with other records, or other frozen weights, than there are now: bring "
                        "them back, or name another folder with --name")
    at.trained_on = known


def introduce(run: Run, art: Art, model: EmoVIT, examples: Examples, pictures: Pictures, world: World, at: Position,
              total: int) -> None:
    """What is about to happen."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in examples.kinds.items())
    lines = [f"{run.folder}: {len(examples):,} records of {art.name} in an epoch, out of {kinds}",
             (f"{trained:,} weights to train, {model.about['random']:,} of them random at first, "
              f"on {world.place}"), *art.notes[:5]]
    if pictures.problems:
        lines.append(f"{len(pictures.problems):,} pictures cannot be used, such as "
                     + ": ".join(next(iter(pictures.problems.items()))))
    if at.step:
        lines.append(f"resumed at step {at.step:,} of {total:,}")
    world.say("\n".join(lines))


# 4. A run

def add_options(parser: argparse.ArgumentParser) -> None:
    start = parser.add_argument_group("what training starts from")
    start.add_argument("--name", help="of the folder under runs/ (default: DATA-emovit); what it holds is gone on with")
    start.add_argument("--from", dest="start", metavar="RUN", help="tower, tokenizer and decoder of a run of "
                       "train.py, in place of CLIP and GPT-2 (the toy's default: examples/toy)")
    start.add_argument("--records", metavar="FILE", help="learn from these records, which related.instructions writes "
                       "(default: those made from the data alone)")
    start.add_argument("--clip", default=CLIP_HUB, metavar="SOURCE",
                       help=f"CLIP: file, folder or hub id (default: {CLIP_HUB})")
    weights = start.add_mutually_exclusive_group()
    weights.add_argument("--bert", metavar="SOURCE",
                         help="the Q-Former begins with BERT's weights: file, folder or hub id")
    weights.add_argument("--qformer", metavar="SOURCE", help="with InstructBLIP's: a safetensors file")
    parser.set_defaults(gpt2=GPT2_SMALL)
    add_flags(parser, "training", Settings, SMALL)
    add_flags(parser, "model", Config, SMALL_MODEL)


def starting_model(options: argparse.Namespace) -> tuple[EmoVIT, bool]:
    """The untrained model, and whether it is a small one, built on a run that trained its tower itself."""
    changes = given(options, Config)
    if (options.emoset or options.data != "toy") and not options.start:
        return from_public(options.clip, options.gpt2, options.bert, options.qformer, **changes), False
    if idle := [flag(name) for name in ("bert", "qformer") if getattr(options, name)]:
        raise UserError(f"{idle[0]} has no effect where a run of train.py is built on; leave it out")
    base = load_model(options.start or BUNDLED, "--from")
    small = base.config.train_tower
    return from_run(base, **(SMALL_MODEL if small else {}) | changes), small


def training_records(art: Art, file: str | None, settings: Settings) -> list[Record]:
    """Made from the data, or those of a file, which must be about training pictures."""
    if not file:
        return records_of(art, "train", settings.chosen)
    records = [one for one in read_records(file) if one.kind in settings.chosen]
    strangers = {one.image for one in records} - {art.names[painting] for painting in art.paintings("train")}
    if strangers:
        raise UserError(f"--records {file}: {len(strangers):,} pictures are none of {art.name}'s training pictures, "
                        f"such as {min(strangers)}")
    return records


def learn(options: argparse.Namespace) -> None:
    """Train on --data, or go on with what the folder holds."""
    world = World()
    with world.first_here():
        art = source_of(options)
        torch.manual_seed(getattr(options, "seed", 0))
        model, small = starting_model(options)
    settings = Settings(**(SMALL if small else {}) | given(options, Settings))
    world.compute_on(settings.device)
    model.about |= {"data": art.name, "kinds": settings.chosen}
    plan = {"system": "EmoVIT", "data": art.name, "paintings": len(art.names), **asdict(model.config),
            **{name: value for name, value in asdict(settings).items() if name not in MOVABLE}}
    fewer = settings.chosen if set(settings.chosen) < set(KINDS) else []
    run = Run(Path("runs") / (options.name or "-".join([art.name, "emovit", *fewer])), world.leads)
    if world.leads:
        if not run.begun:
            Run.begin(run.folder, plan)
        refuse_another(run, plan)
    try:
        if world.share(run.finished):
            world.say(f"{run.folder} is finished: --evaluate {run.folder} scores it, another --name begins anew")
        else:
            with run.lock():
                train(run, art, training_records(art, options.records, settings), model, settings, world)
        world.leave()
    except Interrupted as stopped:
        raise UserError(f"{stopped}; the same command goes on") from None
    except torch.OutOfMemoryError:
        raise UserError("out of memory: the same command with --accumulate 2, or twice what it was, goes on in half of "
                        "it") from None
