"""M2, the Meshed-Memory Transformer (Cornia et al. 2020), with an emotion joined to every region, as in ArtEmis v2.

    1. Settings         the published recipe as defaults
    2. Words            a vocabulary, rows of ids, sentences
    3. Decoding         beam search exactly as published, greedy, at random
    4. A run            training, sentences for the classifier's emotions and for the annotators'

mesh.py comes before this file: the network.

    python -m related.emotion_classifier --data toy
    python -m related.meshed_memory --data toy --emotions runs/toy-emotions

The original's regions are a detector's boxes. Ours are the places of a ResNet's map, or the patches of a vision tower:
all of them real, none missing.

Shapes: B pictures, V vocabulary.
"""
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data import Art
from metrics import cider_d, references_of
from related import captions
from related.captions import Captioning, Vocabulary, best_continuations
from related.mesh import BEGIN, END, PAD, Decoder, MeshedMemory, Picture, Sizes, initialise
from related.training import Machine, descend, fit
from support.overlap import Corpus
from support.program import UserError, progress, run_program
from support.ptb import tokenize
from support.run import Run
from support.settings import option

# 1. Settings

@dataclass
class Settings(Captioning, Sizes):
    """The published recipe by default."""
    epochs: int = option(100, "passes over the training explanations, at most", least=1)
    patience: int = option(5, "stop after so many epochs in a row without a validation CIDEr as high", least=1)
    batch: int = option(50, "explanations of a step", least=1)
    warmup: int = option(10_000, "steps until the learning rate is highest", least=1)
    decoding: str = option("beam", "beam, greedy, or sample: words at random", choices=("beam", "greedy", "sample"))
    steps: int = option(20, "words of a sentence, at most", least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.steps > self.positions:
            raise UserError(f"--steps {self.steps} is beyond --positions {self.positions}")


TOY = dict(side=64, layers=7, width=128, attention_heads=4, key_width=32, value_width=32, slots=10, inner=512,
           dropout=0.0, epochs=5, warmup=400)


# 2. Words

SPECIALS = ("<unk>", "<pad>", "<bos>", "<eos>")  # in the order of their ids
DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def spoken(words: Iterable[str]) -> list[str]:
    """Lower case, without the marks that the original drops."""
    return [word for word in map(str.lower, words) if word not in DROPPED]


def vocabulary_of(texts: Iterable[Sequence[str]], least: int = 5) -> Vocabulary:
    """The most frequent words first, equally frequent ones in code-point order."""
    counts = captions.frequent(texts, least)
    return Vocabulary([*SPECIALS, *sorted(counts, key=lambda word: (-counts[word], word))])


def rows_of(texts: Iterable[Sequence[str]], vocabulary: Vocabulary, positions: int) -> Tensor:
    """<bos> words <eos>, and <pad> up to a common length; all but the last id of a row have a position."""
    rows = [torch.tensor([BEGIN, *vocabulary.ids(words), END][:positions + 1]) for words in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def sentence(vocabulary: Vocabulary, ids: Iterable[int]) -> str:
    """The words before the first <eos>, of equal neighbours only one: so loops do not show in the scores."""
    said = itertools.takewhile(lambda i: i != END, ids)
    return vocabulary.text(i for i, _ in itertools.groupby(said))


# 3. Decoding

@torch.no_grad()
def beam_search(decoder: Decoder, picture: Picture, beams: int = 5, steps: int = 20) -> tuple[Tensor, Tensor]:
    """Words (B, beams, steps) and scores (B, beams), best first. One beam decodes greedily.

    As published: always all steps, no length normalisation, nothing forbidden. A finished beam goes on with id 0 at
    no cost, and with any other at -999.
    """
    each, past = torch.arange(len(picture), device=picture.device)[:, None], None
    last = torch.full_like(each, BEGIN)  # (B, 1): one beam at first
    scores, live = torch.zeros_like(last, dtype=torch.float), torch.ones_like(last, dtype=torch.bool)
    ids = last.new_empty(len(picture), 1, 0)
    for _ in range(steps):
        log_probs, past = decoder(last.view(-1, 1), picture, past)
        candidates = scores[..., None] + log_probs.view(*last.shape, -1)  # (B, beams, V)
        candidates = torch.where(live[..., None], candidates, -999.0)
        candidates[..., 0] = torch.where(live, candidates[..., 0], scores)
        scores, parents, words = best_continuations(candidates, beams)
        past = past[(each * last.shape[1] + parents).flatten()]
        ids = torch.cat([ids[each, parents], words[..., None]], 2)
        last, live = words, live[each, parents] & (words != END)
    return ids, scores


@torch.no_grad()
def draw(decoder: Decoder, picture: Picture, steps: int, chance: torch.Generator) -> Tensor:
    """A sentence (B, steps) of each picture, each word drawn by its probability."""
    ids, past = torch.full((len(picture), 1), BEGIN, device=chance.device), None
    for _ in range(steps):
        log_probs, past = decoder(ids[:, -1:], picture, past)
        ids = torch.cat([ids, log_probs[:, -1].exp().multinomial(1, generator=chance)], 1)
    return ids[:, 1:]


# 4. A run

def rate(iterations: int, epoch: int, width: int, warmup: int) -> float:
    """The learning rate after so many iterations: up linearly, then down with their square root.

    The start of an epoch counts as one more step, as in the original.
    """
    n = iterations + epoch + 2
    return width ** -0.5 * min(n ** -0.5, n * warmup ** -1.5)


class Captioner(captions.Captioner):
    def __init__(self, art: Art, settings: Settings, machine: Machine):
        pictures = captions.stored_features(art, settings, machine)
        machine = Machine.chosen(settings.device, settings.precision, settings.width)  # may be narrower than a ResNet
        self.utterances = captions.utterances_of(art, pictures.usable)
        self.texts = {split: list(map(spoken, one.words)) for split, one in self.utterances.items()}
        self.vocabulary = vocabulary_of([*self.texts["train"], *self.texts["val"]], settings.least)
        model = MeshedMemory(settings, pictures.store.shape[1], len(self.vocabulary), len(art.emotions))
        super().__init__(pictures, model, settings, machine)
        initialise(model)
        paintings, references = np.unique(self.utterances["val"].paintings), references_of(art, "val")
        self.validation = paintings, np.asarray(art.votes)[paintings].argmax(1)
        self.references = [list(map(tokenize, references[art.names[one]].explanations)) for one in paintings]

    def train(self, run: Run) -> int:
        """An example is a row of ids with its annotator's own emotion."""
        self.vocabulary.write(run.folder)
        settings, utterances = self.settings, self.utterances["train"]
        rows = rows_of(self.texts["train"], self.vocabulary, settings.positions)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.Adam(trained, betas=(0.9, 0.98), fused=self.machine.device.type in ("cpu", "cuda"))
        steps = max(1, len(rows) // settings.batch)  # of an epoch; what is left over is dropped

        def epoch(losses: list[float]) -> float:
            done, total = len(losses), 0.0
            batches = torch.randperm(len(rows)).split(settings.batch)[:steps]
            for step, batch in enumerate(progress(batches, f"epoch {done + 1}")):
                longest = int((rows[batch] != PAD).sum(1).max())
                regions, emotions = self.shown(utterances.paintings[batch], utterances.emotions[batch])
                with self.machine.autocast():
                    loss = self.model(regions.float(), emotions, rows[batch, :longest].to(self.machine.device))
                [group] = optimizer.param_groups
                group["lr"] = rate(done * steps + step, done, settings.width, settings.warmup)
                total += descend(optimizer, loss)
            return total / steps

        return len(fit(run, self.model, optimizer, epoch, self.validate, settings.epochs, settings.patience,
                       settings.seed, latest=True))

    def validate(self) -> float:
        """Minus the CIDEr of sentences for the annotators' emotions, on the validation split."""
        said = list(map(tokenize, self.explain(*self.validation)))
        return -cider_d(Corpus(said, self.references)).value

    @torch.no_grad()
    def explain(self, paintings: np.ndarray, emotions: np.ndarray) -> list[str]:
        settings, decoder, said = self.settings, self.model.decoder, []
        chance = torch.Generator(self.machine.device).manual_seed(settings.seed)
        for _, regions, emotion in self.in_parts(paintings, emotions):
            with self.machine.autocast():
                picture = self.model.encode(regions.float(), emotion)
                if settings.decoding == "sample":
                    ids = draw(decoder, picture, settings.steps, chance)
                else:
                    beams = settings.beams if settings.decoding == "beam" else 1
                    ids = beam_search(decoder, picture, beams, settings.steps)[0][:, 0]
            said += [sentence(self.vocabulary, words) for words in ids.tolist()]
        return said


def main() -> None:
    captions.program("meshed_memory", "the Meshed-Memory Transformer", Settings, TOY, Captioner)


if __name__ == "__main__":
    run_program(main)
