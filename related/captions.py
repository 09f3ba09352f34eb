"""What the captioners of Table 1 share. They are second stages: emotion_classifier.py has named the emotion of a
painting, show_attend_tell.py or meshed_memory.py writes a sentence for it, in whole words, not tokens.

    1. Settings         those that both have
    2. Words            a vocabulary; what annotators wrote
    3. Features         of a frozen ResNet or of a vision tower of ours, stored once
    4. Answers          for the first stage's emotions and for the annotators' own, on disk and scored
    5. A run            from settings to scores; goes on where it stopped
"""
import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import Art, add_data_options, art_of, fill_store, open_store
from metrics import as_json, display, evaluate, read_predictions, references_of, text_classifier_of
from related.emotion_classifier import Pictures, load_trunk, normalise, pixels_of, read_logits, squashed_pictures
from related.training import Machine, finish, gflop_of, opened, parameters_of
from sevlm import load_model
from support.english import words
from support.program import UserError, aligned, progress, read_json, write_text
from support.run import Run
from support.scores import bootstrap
from support.settings import add_flags, check, given, option
from support.store import Store

GROUNDINGS = ("predicted", "annotated")  # whose emotion is explained: the first stage's, or the annotators' (an oracle)


# 1. Settings

@dataclass
class Captioning:
    features: str = option("resnet", "what the captioner attends to: resnet, or clip, a vision tower's patches",
                           choices=("resnet", "clip"))
    weights: str = option("timm/resnet34.tv_in1k", "for resnet ImageNet's weights (torchvision's file, a folder or hub "
                          "id) or a run of emotion_classifier; for clip one of our models, for its tower")
    side: int = option(256, "pixels on a side of the squashed picture, for resnet", least=32, most=1024)
    layers: int = option(8, "of the ResNet's eight layers; each of the last three halves the map", least=5, most=8)
    least: int = option(5, "how often a word must occur in training to be known", least=1)
    beams: int = option(5, "sentences side by side in beam search", least=1)
    seed: int = option(0, "decides initial weights, order, dropout and samples", least=0, most=2**31)
    precision: str = option("auto", "auto (by measurement), bf16 or float32", choices=("auto", "bf16", "float32"))
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))

    def __post_init__(self):
        check(self)


# 2. Words

class Vocabulary:
    """Words and their ids. The special ones come first, in each captioner's own order."""

    def __init__(self, words: Sequence[str], unknown: str = "<unk>"):
        self.words = tuple(words)
        self.index = {word: i for i, word in enumerate(self.words)}
        self.unknown = self.index[unknown]

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, words: Iterable[str]) -> list[int]:
        return [self.index.get(word, self.unknown) for word in words]

    def text(self, ids: Iterable[int], without: Iterable[int] = ()) -> str:
        """Words joined by blanks, but for the ids `without`."""
        return " ".join(self.words[i] for i in ids if i not in without)


@dataclass
class Utterances:
    """What the annotators of a split wrote: an example for each row."""
    paintings: np.ndarray  # (R,) index of the painting
    emotions: np.ndarray  # (R,) index of the emotion
    words: list[list[str]]  # (R,)


def utterances_of(art: Art, split: str, usable: np.ndarray) -> Utterances:
    """The rows of a split's paintings, as far as these are usable (P,)."""
    rows = art.rows(split)
    rows = rows[usable[art.owner[rows]]]
    if len(rows) == 0:
        raise UserError(f"{art.source} has no explanations for {split} whose pictures can be used")
    return Utterances(art.owner[rows], art.emotion[rows], [words(art.texts[row]) for row in rows])


# 3. Features

def stored_features(art: Art, settings: Captioning, machine: Machine) -> Pictures:
    """What a model that does not learn makes of every painting: the pixels of a map, or patches, (P, C) fp16."""
    if settings.features == "clip":
        return tower_features(art, settings.weights, machine)
    return resnet_features(art, load_trunk(settings.weights, layers=settings.layers), settings.side, machine)


def resnet_features(art: Art, trunk: nn.Sequential, side: int, machine: Machine) -> Pictures:
    pictures, trunk = squashed_pictures(art, side), trunk.eval().to(machine.device)
    digest = hashlib.sha256()
    for tensor in trunk.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    made = f"resnet {digest.hexdigest()[:16]} of {side}"

    @torch.no_grad()
    def encode(paintings: np.ndarray) -> np.ndarray:
        with machine.autocast():
            maps = trunk(normalise(pictures.of(paintings, machine.device)))
        return pixels_of(maps).half().cpu().numpy()

    shape = encode(np.flatnonzero(pictures.usable)[:1]).shape[1:]
    stamps = [f"{made} {mark.tobytes().hex()}" for mark in pictures.store.marks]  # changed pictures have other marks
    store = Store(art.folder / "cache" / f"{art.name}-{made.replace(' ', '-')}.store", stamps, shape, np.float16,
                  "feature maps")
    missing = np.flatnonzero(pictures.usable & ~store.done)
    for part in progress(np.array_split(missing, 1 + len(missing) // 64), "feature maps, x64"):
        if len(part):
            store.put(part, encode(part))
    cost = gflop_of(lambda: encode(np.flatnonzero(pictures.usable)[:1]))
    return Pictures(store, pictures.usable, parameters_of(trunk), cost)


def tower_features(art: Art, source: str, machine: Machine) -> Pictures:
    model = load_model(source).to(machine.device)
    model.config = dataclasses.replace(model.config, train_tower=False)  # trained or not, it is done: store features
    store = open_store(art, model)
    problems = fill_store(store, art, model, dtype=machine.dtype)
    usable = np.array([painting not in problems for painting in range(len(art.names))])
    side = model.config.image_size
    cost = gflop_of(lambda: model.encode_image(torch.zeros(1, 3, side, side, device=machine.device)))
    return Pictures(store, usable, parameters_of(model.tower), cost)


# 4. Answers

def emotions_for(art: Art, paintings: np.ndarray, classifier: str | Path
                 ) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Which emotion is to be explained of each painting, by grounding: its index (n,), and the first stage's
    probabilities (n, E)."""
    logits = read_logits(classifier, art)[paintings]
    if np.isnan(logits).any():
        missing = art.names[paintings[np.isnan(logits).any(1)][0]]
        raise UserError(f"{classifier} says nothing of {missing}; let it classify these pictures first")
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return {"predicted": (logits.argmax(1), odds / odds.sum(1, keepdims=True)),
            "annotated": (art.votes[paintings].argmax(1), None)}


def write_answers(path: Path, art: Art, paintings: Sequence[int], emotions: Sequence[int], explanations: Sequence[str],
                  probabilities: np.ndarray | None = None) -> None:
    """Emotion and explanation of each painting as JSON lines that metrics.py reads."""
    lines = []
    for i, painting in enumerate(paintings):
        record = {"image": art.names[painting], "emotion": art.emotions[emotions[i]], "explanation": explanations[i]}
        if probabilities is not None:
            record["probabilities"] = dict(zip(art.emotions, probabilities[i].tolist(), strict=True))
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


@dataclass
class Captioner:
    """A trained captioner, ready to be asked."""
    pictures: Pictures
    explain: Callable[[np.ndarray, np.ndarray], list[str]]  # paintings (n,) and an emotion for each -> sentences
    parameters: int
    epochs: int


def answered(folder: Path, art: Art, classifier: str | Path, captioner: Captioner) -> dict:
    """Explain the test paintings' emotions, write the answers to the folder, and score them, by grounding.

    `gflop` is that of one painting, its features included, but not the classifier's.
    """
    paintings, results, judge = art.paintings("test"), {}, text_classifier_of(art, train=True)
    paintings = paintings[captioner.pictures.usable[paintings]]
    for grounding, (emotions, probabilities) in emotions_for(art, paintings, classifier).items():
        path, begun = folder / f"test-{grounding}.jsonl", time.perf_counter()
        sentences = captioner.explain(paintings, emotions)
        seconds = time.perf_counter() - begun
        write_answers(path, art, paintings, emotions, sentences, probabilities)
        answers = dict(read_predictions(path, art.emotions))
        scores = evaluate(answers, references_of(art, "test"), art.emotions, judge)
        results[grounding] = {**as_json(scores, bootstrap(scores)),
                              "pictures_per_second": len(paintings) / seconds}
    one = gflop_of(lambda: captioner.explain(paintings[:1], np.zeros(1, int)))
    return {**results, "gflop": captioner.pictures.gflop + one}


# 5. A run

def captioned(folder: Path, art: Art, classifier: str | Path, system: str, settings: Captioning,
              learn: Callable[[Run, Art, Captioning, Machine], Captioner]) -> dict:
    """The results of a run, which is begun, gone on with, or already finished."""
    decides = {name: value for name, value in dataclasses.asdict(settings).items()
               if name not in ("precision", "device")}
    with opened(folder, {"system": system, "data": art.name, "paintings": len(art.names), "emotions": art.emotions,
                         "classifier": str(classifier), **decides}) as run:
        if run.finished:
            return read_json(run.results_file)
        machine = Machine.chosen(settings.device, settings.precision, 512)
        torch.manual_seed(settings.seed)
        captioner = learn(run, art, settings, machine)
        return finish(run, {**answered(folder, art, classifier, captioner), "epochs": captioner.epochs,
                            "parameters": captioner.pictures.parameters + captioner.parameters})


def program(module: str, system: str, settings: type[Captioning], toy: dict,
            learn: Callable[[Run, Art, Captioning, Machine], Captioner]) -> None:
    """The command line of a captioner."""
    parser = argparse.ArgumentParser(prog=f"python -m related.{module}", allow_abbrev=False,
                                     description=f"Train {system} to explain a classifier's emotions.")
    add_data_options(parser)
    parser.add_argument("--emotions", metavar="RUN", help="the first stage: a run of related.emotion_classifier, or a "
                        "file of its predictions (default: runs/DATA-emotions)")
    parser.add_argument("--out", metavar="FOLDER", help=f"of the run (default: runs/DATA-{module})")
    add_flags(parser, "settings", settings, toy)
    options = parser.parse_args()
    art = art_of(options)
    classifier = options.emotions or f"runs/{art.name}-emotions"
    preset = {"weights": classifier, **toy} if art.name == "toy" else {}  # nothing is downloaded for the toy
    folder = Path(options.out or f"runs/{art.name}-{module}")
    results = captioned(folder, art, classifier, system, settings(**preset | given(options, settings)), learn)
    print(f"{summary(results)}\n{folder}")


def summary(results: dict) -> str:
    both = [results[grounding] for grounding in GROUNDINGS]
    names = [name for name in both[0]["intervals"] if all(one.get(name) is not None for one in both)]
    rows = [[name, *(display(name, one[name]) for one in both)] for name in names]
    return aligned([["emotion", *GROUNDINGS], *rows])
