"""The first stage of Table 1's two-stage systems: ResNet-34 names the emotion of a painting, as ArtEmis trained it.

    1. The classifier   a ResNet (resnet.py), the mean of its map's pixels, and a small head
    2. Loss, accuracy   against the shares of all votes; of paintings that most annotators agree on
    3. A run            training, and what the classifier says of every painting, for the second stages

    python -m related.emotion_classifier --data toy

Shapes: B pictures of side S, E emotions. With 256 pixels and ImageNet's weights this is the published recipe; its ACC
on ArtEmis v1 is 60.2.
"""
import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import SPLITS, Art, add_data_options, art_of, best_accuracy
from related.resnet import LAYERS, Pictures, load_resnet, normalise, pixels_of, squashed_pictures, trunk
from related.training import (
    CONFIG,
    Machine,
    config_of,
    decides,
    descend,
    finish,
    fit,
    gflop_of,
    load_weights,
    opened,
    parameters_of,
    results_of,
)
from support.files import load_checked
from support.program import UserError, aligned, progress, read_json, run_program, write_text
from support.records import json_records
from support.run import Run
from support.scores import Scores, bootstrap, mean_score
from support.settings import add_flags, check, given, option

SYSTEM, PREDICTIONS = "emotion classifier", "predictions.jsonl"


@dataclass
class Settings:
    """ArtEmis's recipe by default."""
    resnet: str = option("timm/resnet34.tv_in1k", "ImageNet's weights: torchvision's file, a folder or hub id; "
                                                  "none: from nothing")
    side: int = option(256, "pixels on a side of the squashed picture", least=32, most=1024)
    released: int = option(7, "the ResNet's first layer to train, of 0 to 7; those before it stay as they are",
                           least=0, most=8)
    epochs: int = option(25, "passes over the training paintings, at most", least=1)
    patience: int = option(5, "stop after so many epochs in a row without a lower validation loss", least=1)
    batch: int = option(128, "paintings of a step", least=2)
    rate: float = option(5e-4, "Adam's learning rate", above=0)
    seed: int = option(0, "decides initial weights, order and dropout", least=0, most=2**31)
    precision: str = option("auto", "auto (by measurement), bf16 or float32", choices=("auto", "bf16", "float32"))
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))

    def __post_init__(self):
        check(self)


TOY = dict(resnet="none", side=64, released=0, epochs=6, patience=3, batch=32, rate=2e-4)


# 1. The classifier

def head(emotions: int, channels: int = 512, hidden: int = 100, dropout: float = 0.3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout),
                         nn.Linear(hidden, emotions))


class EmotionClassifier(nn.Module):
    """In training, frozen layers' norms too use the batch's statistics, and move their own, as in the original."""

    def __init__(self, emotions: int, released: int = 7):
        super().__init__()
        self.trunk, self.head = trunk(released), head(emotions)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> logits (B, E)"""
        return self.head(pixels_of(self.trunk(normalise(pixels)), pool_to=1).squeeze(1))


def load_classifier(folder: Path) -> EmotionClassifier:
    """The classifier of a run."""
    model = EmotionClassifier(len(config_of(folder, SYSTEM)["emotions"]))
    load_weights(model, folder)
    return model.eval()


def load_trunk(source: str, released: int = len(LAYERS), layers: int = len(LAYERS)) -> nn.Sequential:
    """The first layers of a ResNet: of a run's classifier, or with ImageNet's weights."""
    found = trunk(released, layers)
    if (Path(source) / CONFIG).is_file():
        load_checked(found, load_classifier(Path(source)).trunk[:layers].state_dict(), source)
    else:
        load_resnet(found, source)
    return found


# 2. Loss, accuracy

def shares(votes: Tensor) -> Tensor:
    return votes / votes.sum(1, keepdim=True)


def divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """How far the probabilities are from the shares of the votes (Kullback-Leibler), the mean over pictures."""
    return F.kl_div(logits.log_softmax(1), targets, reduction="batchmean")


def accuracies(guesses: np.ndarray, votes: np.ndarray) -> Scores:
    """How often the emotion with most votes is guessed, by the rule that says which paintings count.

    A painting counts if one emotion has more than half of its votes, or at least half, or more than any other. Of
    two emotions with half of the votes each the first is right.
    """
    top, right = votes.max(1), guesses == votes.argmax(1)
    rules = {"more than half": 2 * top > votes.sum(1), "at least half": 2 * top >= votes.sum(1),
             "unique maximum": (votes == top[:, None]).sum(1) == 1}
    return {name: mean_score(right, counted) for name, counted in rules.items()}


# 3. A run

def train(run: Run, model: EmotionClassifier, pictures: Pictures, art: Art, settings: Settings, machine: Machine
          ) -> int:
    """Train to the shares of the votes of all annotations, also of those without a usable explanation."""
    targets = shares(torch.from_numpy(np.asarray(art.votes)).float()).to(machine.device)
    of_split = {split: torch.from_numpy(np.flatnonzero((art.split == SPLITS.index(split)) & pictures.usable))
                for split in ("train", "val")}
    if any(len(paintings) < 2 for paintings in of_split.values()):
        raise UserError(f"{art.source} has no two pictures to train on, or to validate on")
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], settings.rate)

    def loss_of(paintings: Tensor) -> Tensor:
        return divergence(logits_of(model, pictures, paintings, machine), targets[paintings])

    def epoch(losses: list[float]) -> float:
        total, count = 0.0, 0
        shuffled = of_split["train"][torch.randperm(len(of_split["train"]))]
        for paintings in progress(shuffled.split(settings.batch), f"epoch {len(losses) + 1}"):
            if len(paintings) == 1:
                continue  # a batch norm needs two
            loss = descend(optimizer, loss_of(paintings))
            total, count = total + len(paintings) * loss, count + len(paintings)
        return total / count

    @torch.no_grad()
    def validate() -> float:
        batches = of_split["val"].split(2 * settings.batch)
        return sum(len(batch) * loss_of(batch).item() for batch in batches) / len(of_split["val"])

    return len(fit(run, model, optimizer, epoch, validate, settings.epochs, settings.patience, settings.seed))


def logits_of(model: EmotionClassifier, pictures: Pictures, paintings: Tensor, machine: Machine) -> Tensor:
    with machine.autocast():
        return model(pictures.of(paintings, machine.device)).float()


@torch.no_grad()
def write_predictions(path: Path, model: EmotionClassifier, pictures: Pictures, art: Art, machine: Machine,
                      batch: int) -> None:
    """A JSON line for every painting with a picture, whatever its split: emotion, probabilities and logits by name."""
    lines = []
    for paintings in progress(torch.from_numpy(np.flatnonzero(pictures.usable)).split(batch), "predictions"):
        for painting, logits in zip(paintings.tolist(), logits_of(model, pictures, paintings, machine), strict=True):
            by_name = [dict(zip(art.emotions, values.tolist(), strict=True)) for values in (logits.softmax(0), logits)]
            lines.append(json.dumps({"image": art.names[painting], "split": SPLITS[art.split[painting]],
                                     "emotion": art.emotions[logits.argmax()], "probabilities": by_name[0],
                                     "logits": by_name[1]}, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def read_logits(source: str | Path, art: Art) -> np.ndarray:
    """What a classifier says of each painting, (P, E), nan where it says nothing; the emotions in the data's order.

    `source` is a run of this program, or a file of JSON lines with `image` and `probabilities`, or `logits`, by name.
    """
    path = Path(source) / PREDICTIONS if Path(source).is_dir() else Path(source)
    place, found = {name: index for index, name in enumerate(art.names)}, np.full(art.votes.shape, np.nan)
    for where, record in json_records(path):
        record = record if isinstance(record, dict) else {}
        image, kind = record.get("image"), "logits" if "logits" in record else "probabilities"
        named = record.get(kind)
        if (not isinstance(image, str) or not isinstance(named, dict) or named.keys() != set(art.emotions)
                or not all(type(number) in (int, float) and math.isfinite(number) for number in named.values())):
            raise UserError(f"{where}: expected an image, and for each of {', '.join(art.emotions)} a number under "
                            f"{kind}")
        if image in place:
            numbers = np.array([named[emotion] for emotion in art.emotions], float)
            found[place[image]] = numbers if kind == "logits" else np.log(numbers.clip(1e-12))
    if np.isnan(found).all():
        raise UserError(f"{path} says nothing of any picture of {art.source}")
    return found


def accuracy_of(art: Art, folder: Path) -> dict:
    logits, by_split = read_logits(folder, art), {}
    for split in ("val", "test"):
        paintings = np.flatnonzero((art.split == SPLITS.index(split)) & ~np.isnan(logits[:, 0]))
        scores = accuracies(logits[paintings].argmax(1), np.asarray(art.votes)[paintings])
        intervals = bootstrap(scores)
        by_split[split] = {name: {"accuracy": score.value, "interval": intervals[name], "paintings": len(paintings),
                                  "counted": int(score.statistics[:, 1].sum())} for name, score in scores.items()}
    return {**by_split, "best_possible": best_accuracy(art, "test")}


def summary(results: dict) -> str:
    rows = [["ACC (test)", "", "95% interval", "paintings"]]
    for name, found in results["test"].items():
        rows.append([name, f"{100 * found['accuracy']:.1f}", " .. ".join(f"{100 * x:.1f}" for x in found["interval"]),
                     f"{found['counted']:,} of {found['paintings']:,}"])
    best = results["best_possible"]
    return aligned(rows) + (f"\nbest possible, of more than half: {100 * best:.1f}" if best else "")


def trained(folder: Path, art: Art, settings: Settings | None = None) -> dict:
    """The results of a run, which is begun, gone on with, or already finished; without settings any finished run
    will do."""
    if settings is None and Run(folder).finished:
        return read_json(Run(folder).results_file)
    settings = settings or Settings(**preset(art))
    config = {"system": SYSTEM, "data": art.name, "paintings": len(art.names), "emotions": art.emotions,
              **decides(settings)}
    if results := results_of(folder, config):
        return results
    machine = Machine.chosen(settings.device, settings.precision, 512)
    torch.manual_seed(settings.seed)
    model = EmotionClassifier(len(art.emotions), settings.released)
    if settings.resnet != "none":
        load_resnet(model.trunk, settings.resnet, "--resnet")
    pictures = squashed_pictures(art, settings.side)
    with opened(folder, config) as run:
        epochs = train(run, model.to(machine.device), pictures, art, settings, machine)
        begun = time.perf_counter()
        write_predictions(folder / PREDICTIONS, model, pictures, art, machine, 2 * settings.batch)
        seconds, one = time.perf_counter() - begun, torch.from_numpy(np.flatnonzero(pictures.usable)[:1])
        return finish(run, {**accuracy_of(art, folder), "epochs": epochs, "parameters": parameters_of(model),
                            "gflop": gflop_of(lambda: logits_of(model, pictures, one, machine)),
                            "pictures_per_second": int(pictures.usable.sum()) / seconds})


def preset(art: Art) -> dict:
    return TOY if art.name == "toy" else {}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m related.emotion_classifier", allow_abbrev=False,
                                     description="Train ResNet-34 to name the emotion of a painting.")
    add_data_options(parser)
    parser.add_argument("--out", metavar="FOLDER", help="of the run (default: runs/DATA-emotions)")
    add_flags(parser, "settings", Settings, TOY)
    options = parser.parse_args()
    art = art_of(options)
    folder = Path(options.out or f"runs/{art.name}-emotions")
    print(f"{summary(trained(folder, art, Settings(**preset(art) | given(options, Settings))))}\n{folder}")


if __name__ == "__main__":
    run_program(main)
