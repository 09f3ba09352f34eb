"""The first stage of Table 1's two-stage systems: ResNet-34 names the emotion of a painting, as ArtEmis trained it.

    1. Pictures         squashed to a square, stored once, normalised
    2. The classifier   ResNet-34 without its last two layers, and a small head
    3. Loss, accuracy   against the shares of all votes; of paintings that most annotators agree on
    4. A run            training, and what the classifier says of every painting, for the second stages

    python -m related.emotion_classifier --data toy

Shapes: B pictures of side S, g = S / 32 the side of the feature map, C = 512 channels, P = g * g pixels of the map,
E emotions. With 256 pixels and ImageNet's weights this is the published recipe; its ACC on ArtEmis v1 is 60.2.
"""
import argparse
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet34

from data import SPLITS, Art, add_data_options, art_of, best_accuracy, stamp
from related.training import CONFIG, Machine, config_of, finish, fit, gflop_of, load_weights, opened, parameters_of
from support.files import find_file, load_checked, read_tensors
from support.pictures import BadPicture, open_picture, squared
from support.program import UserError, aligned, progress, read_json, run_program, write_text
from support.records import json_records
from support.run import Run
from support.scores import Scores, bootstrap, mean_score
from support.settings import add_flags, check, given, option
from support.store import Store

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


# 1. Pictures

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def squash(image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Tensor:
    """All of the picture in a square, whatever its shape: uint8 (3, S, S)."""
    return squared(image.convert("RGB"), side, crop=False, resample=resample)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (..., 3, S, S) to floats with ImageNet's mean and deviation as 0 and 1."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels / 255 - mean) / std


@dataclass
class Pictures:
    """What a model is given of each painting, on disk: pixels, or a feature map."""
    store: Store
    usable: np.ndarray  # (P,) is there a picture that can be read?
    parameters: int = 0  # of the network that made the feature map
    gflop: float = 0.0  # what it cost for each picture

    def of(self, paintings, device: torch.device) -> Tensor:
        return torch.from_numpy(self.store.get(np.asarray(paintings))).to(device, non_blocking=True)


def squashed_pictures(art: Art, side: int) -> Pictures:
    """Every painting's pixels (3, S, S), as far as its picture can be used."""
    store = Store(art.folder / "cache" / f"{art.name}-squashed-{side}.store", [f"squashed {stamp(file)}" for file in
                  art.files], (3, side, side), np.uint8, f"pictures of {side} x {side} pixels")

    def load(painting: int) -> np.ndarray | str:
        try:
            return squash(open_picture(art.files[painting] or "", side), side).numpy()
        except BadPicture as problem:
            return str(problem)

    missing, problems = store.missing(), {}
    with ThreadPoolExecutor() as pool:
        for part in progress(np.array_split(missing, 1 + len(missing) // 64), "pictures, x64"):
            loaded = dict(zip(part.tolist(), pool.map(load, part), strict=True))
            problems |= {painting: why for painting, why in loaded.items() if isinstance(why, str)}
            if good := [painting for painting in loaded if painting not in problems]:
                store.put(good, np.stack([loaded[painting] for painting in good]))
    if problems:
        first = min(problems)
        print(f"{len(problems):,} pictures cannot be used, such as {art.names[first]}: {problems[first]}")
    return Pictures(store, np.array([painting not in problems for painting in range(len(art.names))]))


# 2. The classifier

LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")  # of torchvision's ResNet


def trunk(released: int = 0, layers: int = len(LAYERS)) -> nn.Sequential:
    """ResNet-34 up to its last feature map (B, C, g, g), random; its layers before `released` are frozen."""
    resnet = resnet34()
    found = nn.Sequential(*(getattr(resnet, name) for name in LAYERS[:layers]))
    found[:released].requires_grad_(False)
    return found


def load_resnet(layers: nn.Sequential, source: str, flag: str = "--weights") -> None:
    """ImageNet's weights under torchvision's names, which timm's files use too."""
    path = find_file(source, ["model.safetensors", "pytorch_model.bin", "resnet34-b627a593.pth"], flag)
    places = {name: str(place) for place, name in enumerate(LAYERS[:len(layers)])}
    named = (name.partition(".") + (tensor,) for name, tensor in read_tensors(path).items())
    tensors = {f"{places[first]}.{rest}": tensor for first, _, rest, tensor in named if first in places}
    load_checked(layers, tensors, str(path), optional=r".*\.num_batches_tracked")


def pixels_of(feature_map: Tensor, pool_to: int | None = None) -> Tensor:
    """(B, C, g, g), pooled to another side if asked, to pixels row by row: (B, P, C)."""
    if pool_to:
        feature_map = F.adaptive_avg_pool2d(feature_map, pool_to)
    return feature_map.flatten(2).transpose(1, 2)


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


# 3. Loss, accuracy

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


# 4. A run

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
            loss = loss_of(paintings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, count = total + len(paintings) * loss.item(), count + len(paintings)
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
    decides = {name: value for name, value in asdict(settings).items() if name not in ("precision", "device")}
    with opened(folder, {"system": SYSTEM, "data": art.name, "paintings": len(art.names), "emotions": art.emotions,
                         **decides}) as run:
        if run.finished:
            return read_json(run.results_file)
        machine = Machine.chosen(settings.device, settings.precision, 512)
        torch.manual_seed(settings.seed)
        model = EmotionClassifier(len(art.emotions), settings.released)
        if settings.resnet != "none":
            load_resnet(model.trunk, settings.resnet, "--resnet")
        pictures = squashed_pictures(art, settings.side)
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
