"""What a teacher and a decoder say of the pictures of a data set, computed once and kept beside the data.

Shapes: B pictures, K patches, d their width, C classes, always in the data's order.
"""
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import SPLITS, Art, fill_store, open_store
from metrics import Prediction
from related.emotion_classifier import read_logits
from related.heldout import LabelledPictures
from related.training import Machine
from sevlm import SEVLM, emotion_log_probs, generate
from support.labels import in_words, labelled_files
from support.program import UserError, progress
from support.store import Store

BATCH = 64  # pictures


@dataclass
class Said:
    """A split's usable pictures: what people felt, what teacher and decoder say, what a student reads."""
    paintings: np.ndarray  # (B,)
    votes: Tensor  # (B, C)
    pooled: Tensor  # (B, d) mean patch features
    teacher: Tensor  # (B, C) logits
    decoder: Tensor | None  # (B, C) log-probabilities, if it was asked

    @property
    def shares(self) -> Tensor:
        return self.votes / self.votes.sum(1, keepdim=True)

    def digest(self) -> str:
        """Of what a student learns from."""
        parts = (self.votes, self.pooled, self.teacher)
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]


def labelled_pictures(folder: Path) -> LabelledPictures:
    """FOLDER/{train,val,test}/CLASS/*.jpg, the classes in the order of their names."""
    found = [(file, split, label) for split in SPLITS[:3] for file, label in labelled_files(folder / split).items()]
    files, splits, labels = zip(*sorted(found), strict=True)
    classes, none = sorted(set(labels)), np.empty(0, int)
    return LabelledPictures(
        name=folder.resolve().name, folder=folder, source=str(folder), problems=[], owner=none, emotion=none, texts=[],
        emotions=tuple(map(in_words, classes)), files=list(map(Path, files)),
        names=[Path(file).relative_to(folder).as_posix() for file in files],
        split=np.array([SPLITS.index(split) for split in splits]),
        votes=np.eye(len(classes), dtype=int)[[classes.index(label) for label in labels]])


def stored_features(art: Art, model: SEVLM, machine: Machine) -> tuple[Store, dict[str, str]]:
    """The features of all pictures of the splits, and why some have none. The tower must be frozen."""
    features = open_store(art, model, dtype=machine.dtype)
    wanted = np.concatenate([art.paintings(split) for split in SPLITS[:3]])
    problems = fill_store(features, art, model, wanted, dtype=machine.dtype)
    return features, {art.names[painting]: why for painting, why in problems.items()}


def said_of(art: Art, model: SEVLM, identity: str, features: Store, teacher: str | Path, machine: Machine,
            asked: Sequence[str] = ("val", "test")) -> dict[str, Said]:
    """All that students and gates are trained and tested on, by split; the decoder is asked about some of the splits.

    `identity` tells the model from others.
    """
    logits, usable = read_logits(teacher, art), {}
    for split in SPLITS[:3]:
        paintings = art.paintings(split)
        usable[split] = paintings = paintings[features.done[paintings]]
        if len(paintings) < 2:
            raise UserError(f"{art.source} has no two {split} pictures that can be used")
        silent = paintings[np.isnan(logits[paintings]).any(1)]
        if len(silent):
            raise UserError(f"{teacher} says nothing of {len(silent):,} {split} pictures, such as "
                            f"{art.names[silent[0]]}; name a teacher of this data with --teacher")
    for emotion, votes in zip(art.emotions, art.votes[usable["train"]].sum(0), strict=True):
        if votes == 0:
            raise UserError(f"no training picture of {art.source} is of the class {emotion}: it cannot be learned; "
                            "leave it out, or add pictures")

    def kept(what: str, width: int) -> Store:
        stamps = [f"{what} {identity} {machine.dtype} {mark.tobytes().hex()}" for mark in features.marks]
        return Store(art.folder / "cache" / f"{art.name}-{what}-{identity}.store", stamps, (width,), np.float32, what)

    pooled, decoder = kept("pooled", model.config.tower_width), kept("decoder", len(art.emotions))
    complete(pooled, features, np.concatenate(list(usable.values())), lambda x: x.mean(1), machine)
    complete(decoder, features, np.concatenate([usable[split] for split in asked]),
             lambda x: emotion_log_probs(model, x), machine)
    return {split: Said(paintings, torch.from_numpy(art.votes[paintings]).float(),
                        torch.from_numpy(pooled.get(paintings)), torch.from_numpy(logits[paintings]).float(),
                        torch.from_numpy(decoder.get(paintings)) if split in asked else None)
            for split, paintings in usable.items()}


@torch.no_grad()
def complete(store: Store, features: Store, paintings: np.ndarray, measure: Callable[[Tensor], Tensor],
             machine: Machine) -> None:
    """Fill in what `measure` makes of the features (B, K, d) of those paintings that the store lacks."""
    missing = paintings[~store.done[paintings]]
    for start in progress(range(0, len(missing), BATCH), f"{store.what}, x{BATCH}"):
        part = missing[start:start + BATCH]
        with machine.autocast():
            measured = measure(of(features, part, machine))
        store.put(part, measured.float().cpu().numpy())


def of(features: Store, paintings: np.ndarray, machine: Machine) -> Tensor:
    return torch.from_numpy(features.get(paintings)).float().to(machine.device)


@torch.no_grad()
def explained(art: Art, model: SEVLM, features: Store, paintings: np.ndarray, log_probs: Tensor, machine: Machine
              ) -> dict[str, Prediction]:
    """The likeliest emotion of each painting by these log-probabilities (B, C), and the decoder's greedy sentence."""
    found = {}
    for part in torch.arange(len(paintings)).split(BATCH):
        emotions = [art.emotions[index] for index in log_probs[part].argmax(1).tolist()]
        with machine.autocast():
            openings = [model.text.opening(emotion) for emotion in emotions]
            sentences = generate(model, of(features, paintings[part], machine), openings)
        for i, emotion, ids in zip(part.tolist(), emotions, sentences.ids.tolist(), strict=True):
            probabilities = dict(zip(art.emotions, log_probs[i].exp().tolist(), strict=True))
            found[art.names[paintings[i]]] = Prediction(emotion, model.text.reason(ids), probabilities)
    return found
