"""A classifier of short texts, after ArtEmis's: words, an LSTM, the maximum over the words, a label."""
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from support.device import autocast
from support.files import load_checked
from support.program import UserError, first_line, progress, replacing
from support.ptb import tokenize

VECTOR = 100  # numbers for a word
PADDING, UNKNOWN = 0, 1  # rows of the embedding; words follow
CPU = torch.device("cpu")


class TextClassifier(nn.Module):
    """Shapes: B texts, L words, C labels."""

    def __init__(self, words: Sequence[str], labels: Sequence[str], accuracy: float = math.nan):
        super().__init__()
        self.words, self.labels = tuple(words), tuple(labels)
        self.accuracy = accuracy  # on texts that it was not trained on
        self.rows = {word: row for row, word in enumerate(words, UNKNOWN + 1)}
        self.embedding = nn.Embedding(len(words) + 2, VECTOR, padding_idx=PADDING)
        self.project = nn.Sequential(nn.Dropout(0.25), nn.Linear(VECTOR, 256), nn.ReLU(), nn.Dropout(0.25),
                                     nn.Linear(256, 256))
        self.lstm = nn.LSTM(256, 256, batch_first=True)
        self.head = nn.Sequential(nn.Linear(256, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Dropout(0.25),
                                  nn.Linear(100, len(labels)))

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.rows.get(word, UNKNOWN) for word in tokenize(text).split()] or [UNKNOWN])

    def forward(self, encoded: Sequence[Tensor]) -> Tensor:
        ids = pad_sequence(encoded, batch_first=True).to(self.embedding.weight.device)  # (B, L)
        states, _ = self.lstm(self.project(self.embedding(ids)))  # (B, L, 256); no word comes after padding
        return self.head(states.masked_fill(ids[..., None] == PADDING, -torch.inf).amax(1))  # (B, C)

    @torch.no_grad()
    def predict(self, texts: Sequence[str], batch: int = 1024) -> list[str]:
        self.eval()
        encoded = [self.encode(text) for text in texts]
        return [self.labels[index] for first in range(0, len(encoded), batch)
                for index in self(encoded[first:first + batch]).argmax(1).tolist()]

    def save(self, path: str | Path) -> None:
        accuracy = None if math.isnan(self.accuracy) else self.accuracy
        about = json.dumps({"words": self.words, "labels": self.labels, "accuracy": accuracy})
        with replacing(path) as temporary:
            save_file({name: tensor.cpu() for name, tensor in self.state_dict().items()}, temporary, {"about": about})

    @classmethod
    def load(cls, path: str | Path) -> "TextClassifier":
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            words, labels, accuracy = about["words"], about["labels"], about["accuracy"]
            if not all(isinstance(text, str) for text in (*words, *labels)):
                raise ValueError("words and labels must be texts")
            classifier = cls(words, labels, math.nan if accuracy is None else float(accuracy))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no text classifier, or a damaged one ({first_line(error)})") from None
        load_checked(classifier, tensors, str(path))
        return classifier.eval()


def train_text_classifier(texts: Sequence[str], answers: Sequence[str], validation_texts: Sequence[str],
                          validation_answers: Sequence[str], labels: Sequence[str], vectors: Path | None = None,
                          device: torch.device = CPU, dtype: torch.dtype = torch.float32, seed: int = 0, *,
                          rare: int, rate: float, batch: int, epochs: int, patience: int) -> TextClassifier:
    """Adam on the cross entropy. The epoch that validates best is kept; `patience` epochs without a gain end it.

    Words seen fewer than `rare` times are unknown. A file of word vectors (GloVe's) takes the place of the embedding
    that is learned: they stay as they are, and words without one are unknown.
    """
    if len(texts) < 2:
        raise UserError(f"{len(texts)} training texts are too few for a text classifier")
    seen = Counter(word for text in texts for word in tokenize(text).split())
    words = sorted(word for word, count in seen.items() if count >= rare)
    known = read_vectors(vectors, words) if vectors else {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        classifier = TextClassifier(sorted(known) if vectors else words, labels)
        if vectors:
            classifier.embedding.weight.data[UNKNOWN + 1:] = torch.tensor([known[word] for word in classifier.words])
            classifier.embedding.requires_grad_(False)
        classifier.to(device)
        encoded = [classifier.encode(text) for text in texts]
        targets = torch.tensor([classifier.labels.index(answer) for answer in answers])
        optimizer = torch.optim.Adam([p for p in classifier.parameters() if p.requires_grad], lr=rate)
        best, best_epoch, best_weights = -1.0, 0, {}
        lengths = torch.tensor([len(row) for row in encoded])
        batch = min(batch, max(16, len(encoded) // 64))  # few texts need many steps more than large ones
        for epoch in range(epochs):
            classifier.train()
            for rows in progress(random_batches(lengths, batch), f"text classifier, epoch {epoch + 1}"):
                with autocast(device, dtype):
                    logits = classifier([encoded[row] for row in rows.tolist()])
                loss = F.cross_entropy(logits.float(), targets[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            right = share_right(classifier, validation_texts, validation_answers)
            if not right <= best:  # nan, without validation texts, keeps the last epoch
                best, best_epoch = right, epoch
                best_weights = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
            if epoch - best_epoch >= patience or best == 1:
                break
    classifier.load_state_dict(best_weights)
    return classifier.eval()


def random_batches(lengths: Tensor, batch: int) -> list[Tensor]:
    """Every text once, beside others of its length: there is little padding to compute. No batch has a single text."""
    by_length = (lengths + torch.rand(len(lengths))).argsort()
    batches = by_length.tensor_split(math.ceil(len(lengths) / batch))
    return [batches[index] for index in torch.randperm(len(batches))]


def share_right(classifier: TextClassifier, texts: Sequence[str], answers: Sequence[str]) -> float:
    right = [said == answer for said, answer in zip(classifier.predict(texts), answers, strict=True)]
    return sum(right) / len(right) if right else math.nan


def read_vectors(path: Path, words: Iterable[str]) -> dict[str, list[float]]:
    """Those of the words that a text file of lines "word v1 ... v100" has."""
    wanted, vectors = set(words), {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            word, *values = line.rstrip().split(" ")
            if word in wanted:
                try:
                    vectors[word] = [float(value) for value in values]
                except ValueError:
                    vectors[word] = []
                if len(vectors[word]) != VECTOR or not all(map(math.isfinite, vectors[word])):
                    raise UserError(f"{path}, line {number}: expected a word and {VECTOR} numbers, as in GloVe's files")
    if not vectors:
        raise UserError(f"{path} has a vector for none of the {len(wanted)} words of the training texts")
    return vectors
