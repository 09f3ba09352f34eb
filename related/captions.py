"""What the captioners of Table 1 share. They are second stages: emotion_classifier.py has named the emotion of a
painting, show_attend_tell.py or meshed_memory.py writes a sentence for it, in whole words, not tokens.

    1. Settings         those that both have
    2. Words            a vocabulary, what annotators wrote, how a beam goes on
    3. Features         of a frozen ResNet or of a vision tower of ours, stored once
    4. A captioner      made ready, trained, asked
    5. A run            answers for the first stage's emotions and for the annotators' own, on disk and scored
"""
import argparse
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import Art, add_data_options, art_of, fill_store, open_store
from metrics import Prediction, as_json, display, evaluate, references_of, text_classifier_of
from related.emotion_classifier import load_trunk, read_logits
from related.resnet import Pictures, feature_maps
from related.training import Machine, decides, finish, gflop_of, opened, parameters_of, results_of, seconds_of
from sevlm import load_model
from support.english import words
from support.program import UserError, aligned, progress, write_text
from support.run import Run
from support.scores import bootstrap
from support.settings import add_flags, check, given, option
from train import write_predictions

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

    def write(self, folder: Path) -> None:
        write_text(folder / "words.txt", "".join(f"{word}\n" for word in self.words))

    def text(self, ids: Iterable[int], without: Iterable[int] = ()) -> str:
        """Words joined by blanks, but for the ids `without`."""
        return " ".join(self.words[i] for i in ids if i not in without)


def frequent(texts: Iterable[Sequence[str]], least: int) -> dict[str, int]:
    """The words that occur at least so often, in order of first appearance, and how often they do."""
    counts = Counter(itertools.chain.from_iterable(texts))
    return {word: count for word, count in counts.items() if count >= least}


def best_continuations(scores: Tensor, beams: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best of all words after all beams (..., beams, V): their scores, beams and words, (..., new beams) each."""
    best, places = scores.flatten(-2).topk(beams)
    return best, places // scores.shape[-1], places % scores.shape[-1]


@dataclass
class Utterances:
    """What the annotators of a split wrote: an example for each row."""
    paintings: np.ndarray  # (R,) index of the painting
    emotions: np.ndarray  # (R,) index of the emotion
    words: list[list[str]]  # (R,)


def utterances_of(art: Art, usable: np.ndarray) -> dict[str, Utterances]:
    """Those to train on and to validate on, of paintings that are usable (P,)."""
    found = {}
    for split in ("train", "val"):
        rows = art.rows(split)
        rows = rows[usable[art.owner[rows]]]
        if len(rows) == 0:
            raise UserError(f"{art.source} has no explanations for {split} whose pictures can be used")
        found[split] = Utterances(art.owner[rows], art.emotion[rows], [words(art.texts[row]) for row in rows])
    return found


# 3. Features

def stored_features(art: Art, settings: Captioning, machine: Machine) -> Pictures:
    """What a model that does not learn makes of every painting: the pixels of a map, or patches, (P, C) fp16."""
    if settings.features == "clip":
        return tower_features(art, settings.weights, machine)
    return feature_maps(art, load_trunk(settings.weights, layers=settings.layers), settings.side, machine)


@torch.no_grad()
def tower_features(art: Art, source: str, machine: Machine) -> Pictures:
    model = load_model(source, "--weights").to(machine.device)
    model.config = dataclasses.replace(model.config, train_tower=False)  # trained or not, it is done: store features
    store = open_store(art, model, dtype=machine.dtype)
    problems = fill_store(store, art, model, dtype=machine.dtype)
    usable = np.array([painting not in problems for painting in range(len(art.names))])
    blank = torch.zeros(16, 3, model.config.image_size, model.config.image_size, device=machine.device)
    with machine.autocast():
        cost, seconds = gflop_of(lambda: model.encode_image(blank[:1])), seconds_of(lambda: model.encode_image(blank))
    return Pictures(store, usable, parameters_of(model.tower), cost, seconds / len(blank))


# 4. A captioner

class Captioner:
    """Is made ready before a run begins, so that whatever is missing is said first; then it is trained, then asked.

    Each kind says how in `__init__(art, settings, machine)`, `train` and `explain`.
    """

    def __init__(self, pictures: Pictures, model: nn.Module, settings: Captioning, machine: Machine):
        self.pictures, self.model, self.settings, self.machine = pictures, model.to(machine.device), settings, machine
        self.parameters = pictures.parameters + parameters_of(model)

    def train(self, run: Run) -> int:
        """Returns the number of epochs."""
        raise NotImplementedError

    def explain(self, paintings: np.ndarray, emotions: np.ndarray) -> list[str]:
        """A sentence for each painting (n,) and the emotion (n,) that it is to explain."""
        raise NotImplementedError

    def shown(self, paintings: np.ndarray, emotions: np.ndarray) -> tuple[Tensor, Tensor]:
        """What is stored of these paintings, and the emotions, on the model's device."""
        device = self.machine.device
        return self.pictures.of(paintings, device), torch.from_numpy(emotions).long().to(device)

    def in_parts(self, paintings: np.ndarray, emotions: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Paintings to explain, some 64 at a time, and what is shown of them."""
        for part in progress(np.array_split(np.arange(len(paintings)), 1 + len(paintings) // 64), "sentences"):
            yield paintings[part], *self.shown(paintings[part], emotions[part])


# 5. A run

def emotions_for(art: Art, paintings: np.ndarray, logits: np.ndarray
                 ) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Which emotion is to be explained of each painting, by grounding: its index (n,), and the first stage's
    probabilities (n, E), from its logits (P, E)."""
    logits = logits[paintings]
    if np.isnan(logits).any():
        missing = art.names[paintings[np.isnan(logits).any(1)][0]]
        raise UserError(f"the first stage (--emotions) says nothing of {missing}; let it classify these pictures first")
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return {"predicted": (logits.argmax(1), odds / odds.sum(1, keepdims=True)),
            "annotated": (art.votes[paintings].argmax(1), None)}


def answers(art: Art, paintings: np.ndarray, emotions: np.ndarray, explanations: Sequence[str],
            probabilities: np.ndarray | None) -> dict[str, Prediction]:
    found = {}
    for i, painting in enumerate(paintings):
        by_name = None if probabilities is None else dict(zip(art.emotions, probabilities[i].tolist(), strict=True))
        found[art.names[painting]] = Prediction(art.emotions[emotions[i]], explanations[i], by_name)
    return found


def answered(folder: Path, art: Art, paintings: np.ndarray, wanted: dict, captioner: Captioner) -> dict:
    """Explain the emotions that are wanted of these paintings, write the answers to the folder, and score them.

    `gflop` and `seconds` are those of one painting, its features included, but not the classifier's.
    """
    begun = time.perf_counter()
    said = {grounding: answers(art, paintings, emotions, captioner.explain(paintings, emotions), probabilities)
            for grounding, (emotions, probabilities) in wanted.items()}
    seconds = (time.perf_counter() - begun) / len(said) / len(paintings)
    write_predictions(folder, said)
    references, judge, results = references_of(art, "test"), text_classifier_of(art, train=True), {}
    for grounding, predictions in said.items():
        scores = evaluate(predictions, references, art.emotions, judge)
        results[grounding] = as_json(scores, bootstrap(scores))
    gflop = gflop_of(lambda: captioner.explain(paintings[:1], np.zeros(1, int)))
    return {**results, "gflop": captioner.pictures.gflop + gflop, "seconds": captioner.pictures.seconds + seconds}


def captioned(folder: Path, art: Art, classifier: str | Path, system: str, settings: Captioning,
              kind: type[Captioner]) -> dict:
    """The results of a run, which is begun, gone on with, or already finished."""
    config = {"system": system, "data": art.name, "paintings": len(art.names), "emotions": art.emotions,
              "classifier": str(classifier), **decides(settings)}
    if results := results_of(folder, config):
        return results
    if not Path(classifier).exists():
        raise UserError(f"there is no first stage {classifier}; python -m related.emotion_classifier --data {art.name} "
                        f"--out {classifier} trains one")
    logits = read_logits(classifier, art)
    machine = Machine.chosen(settings.device, settings.precision, 512)
    torch.manual_seed(settings.seed)
    captioner = kind(art, settings, machine)
    paintings = art.paintings("test")
    paintings = paintings[captioner.pictures.usable[paintings]]
    wanted = emotions_for(art, paintings, logits)
    with opened(folder, config) as run:
        epochs = captioner.train(run)
        return finish(run, {**answered(folder, art, paintings, wanted, captioner), "epochs": epochs,
                            "parameters": captioner.parameters})


def program(module: str, system: str, settings: type[Captioning], toy: dict, kind: type[Captioner]) -> None:
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
    results = captioned(folder, art, classifier, system, settings(**preset | given(options, settings)), kind)
    print(f"{summary(results)}\n{folder}")


def summary(results: dict) -> str:
    both = [results[grounding] for grounding in GROUNDINGS]
    names = [name for name in both[0]["intervals"] if all(one.get(name) is not None for one in both)]
    rows = [[name, *(display(name, one[name]) for one in both)] for name in names]
    return aligned([["emotion", *GROUNDINGS], *rows])
