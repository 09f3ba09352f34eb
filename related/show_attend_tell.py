"""Show, Attend and Tell with an emotion: the second stage of Table 1's SAT row, as ArtEmis built it.

    1. Words            a vocabulary from the training rows, rows of ids, the bias that the output starts from
    2. Losses           of the next words, and of pixels that are attended to too little or too much
    3. Decoding         greedy and sampled, a batch at a time; beam search, a picture at a time
    4. A run            ResNet or stored features, training, sentences for the classifier's emotions and the annotators'

speaker.py comes before this file: the network.

    python -m related.emotion_classifier --data toy
    python -m related.show_attend_tell --data toy --emotions runs/toy-emotions

Shapes: B pictures or rows, P pixels of the picture's feature map, C channels, L words put in, V vocabulary.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import Art
from related import captions
from related.captions import Captioning, Vocabulary, best_continuations
from related.emotion_classifier import load_trunk
from related.resnet import normalise, pixels_of, squashed_pictures
from related.speaker import Scene, Speaker, State
from related.training import Machine, descend, fit
from support.program import progress, run_program
from support.run import Run
from support.settings import option


@dataclass
class Settings(Captioning):
    """ArtEmis's recipe by default."""
    released: int = option(5, "the ResNet's first layer to train, of 0 to 7; 8: none, and its maps are stored",
                           least=0, most=8)
    longest: int = option(30, "words of a caption; longer ones are cut", least=1)
    embedding: int = option(128, "width of a word", least=1)
    hidden: int = option(512, "width of the LSTM", least=1)
    attention: int = option(512, "width of the attention", least=1)
    emotion_width: int = option(9, "width of the emotion", least=1)
    dropout: float = option(0.1, "dropout of the LSTM's output", least=0, below=1)
    epochs: int = option(50, "passes over the training explanations, at most", least=1)
    patience: int = option(5, "stop after so many epochs in a row without a lower validation loss", least=1)
    batch: int = option(128, "explanations of a step", least=2)
    rate: float = option(5e-4, "Adam's learning rate of the speaker", above=0)
    resnet_rate: float = option(1e-4, "Adam's learning rate of the ResNet", above=0)
    clip_norm: float = option(5.0, "the gradient's norm is cut to this", above=0)
    even_attention: float = option(1.0, "weight of the loss that wants every pixel attended to alike", least=0)
    decoding: str = option("beam", "beam, greedy, or sample: words at random", choices=("beam", "greedy", "sample"))
    temperature: float = option(0.3, "below 1 the likely words become likelier", above=0)
    top_k: int = option(0, "sample from so many likeliest words; 0: from all", least=0)


TOY = dict(side=64, layers=7, released=8, hidden=256, attention=128, batch=64, rate=2e-3, epochs=5, patience=3,
           precision="float32")


# 1. Words

PAD, SOS, EOS, UNKNOWN = range(4)
SPECIALS = ("<pad>", "<sos>", "<eos>", "<unk>")
SILENT = (PAD, SOS, EOS)


def vocabulary_of(texts: Sequence[Sequence[str]], least: int = 5) -> Vocabulary:
    """In order of first appearance."""
    return Vocabulary([*SPECIALS, *captions.frequent(texts, least)])


def rows_of(texts: Sequence[Sequence[str]], vocabulary: Vocabulary, longest: int) -> Tensor:
    """<sos>, the first `longest` words, <eos>, and <pad> up to a common length."""
    rows = torch.full((len(texts), longest + 2), PAD)
    for row, words in zip(rows, texts, strict=True):
        ids = [SOS, *vocabulary.ids(words[:longest]), EOS]
        row[:len(ids)] = torch.tensor(ids)
    return rows


def lengths_of(rows: Tensor) -> Tensor:
    """How many words of each row are to be predicted: its own and <eos>."""
    return (rows != PAD).sum(1) - 1


def output_bias(rows: Tensor, size: int) -> Tensor:
    """Log frequency of each word, the likeliest at 0, so that training need not learn how rare rare words are."""
    counts = torch.bincount(rows.flatten(), minlength=size).double()
    counts[[PAD, SOS]] = counts[counts > 0].min()  # never to be said
    logs = counts.clamp(min=1).log()
    return (logs - logs.max()).float()


# 2. Losses

class Lesson(NamedTuple):
    """What the speaker makes of sentences that are put in word by word."""
    logits: Tensor  # (n, V) for all n words that are to be predicted
    targets: Tensor  # (n,) those words
    spoken: Tensor  # (B, L) where they stand
    alphas: Tensor  # (B, L, P)


def teach(speaker: Speaker, scene: Scene, rows: Tensor) -> Lesson:
    lengths = lengths_of(rows)
    longest = int(lengths.max())
    spoken = torch.arange(longest, device=rows.device) < lengths[:, None]
    hidden, alphas = speaker(scene, rows[:, :longest])
    return Lesson(speaker.output(hidden[spoken]).float(), rows[:, 1:longest + 1][spoken], spoken, alphas.float())


def attention_loss(lesson: Lesson) -> Tensor:
    """Over a whole sentence each of P pixels should get the same attention, l / P of l steps."""
    attended = (lesson.alphas * lesson.spoken[:, :, None]).sum(1)  # (B, P)
    meant = lesson.spoken.sum(1, keepdim=True) / attended.shape[1]
    return (meant - attended).square().mean()


# 3. Decoding

def banned_next(tokens: Tensor, size: int) -> Tensor:
    """(B, V): the words that followed earlier occurrences of each sentence's last word: no two words twice."""
    again = tokens[:, :-1] == tokens[:, -1:]  # (B, L-1)
    banned = torch.zeros(len(tokens), size + 1, dtype=torch.bool, device=tokens.device)
    followers = torch.where(again, tokens[:, 1:], size)  # the extra column takes what is not banned
    return banned.scatter_(1, followers, True)[:, :size]


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(1)


def drawn(k: int = 0, generator: torch.Generator | None = None) -> Callable[[Tensor], Tensor]:
    """A choice at random: from all words, or from the `k` likeliest."""
    return lambda logits: torch.multinomial(likeliest(logits, k).softmax(1), 1, generator=generator).squeeze(1)


def likeliest(logits: Tensor, k: int) -> Tensor:
    """All but the `k` largest of each row at -inf; 0 is for all."""
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf) if k else logits


@torch.no_grad()
def sample(speaker: Speaker, scene: Scene, longest: int, choose: Callable[[Tensor], Tensor] = greedy,
           temperature: float = 1.0, drop_unknown: bool = True, drop_bigrams: bool = True, slip: bool = False
           ) -> Tensor:
    """A sentence for each picture, (B, longest + 2): <sos>, words, <eos>, <pad>. Never one of the last two words
    again; `drop_bigrams`: no two words twice.

    With the original's indexing `slip`, no row may say one of the last two words of *any* row of its batch.
    """
    state = speaker.start(scene)
    tokens = torch.full((len(scene.pixels), 1), SOS, device=scene.pixels.device)
    for step in range(longest + 1):
        state, _ = speaker.step(tokens[:, -1], scene, state)
        logits = speaker.output(state.h)  # (B, V)
        banned = torch.zeros_like(logits, dtype=torch.bool)
        banned.scatter_(1, tokens[:, 1:][:, -2:], True)
        if slip:
            banned |= banned.any(0)
        banned[:, UNKNOWN] |= drop_unknown
        if drop_bigrams and step >= 2:
            banned |= banned_next(tokens[:, 1:], logits.shape[1])
        word = choose((logits / temperature).masked_fill(banned, -torch.inf))
        tokens = torch.cat([tokens, word[:, None]], 1)
    ends = tokens == EOS
    tokens[~ends.any(1), -1] = EOS
    return tokens.masked_fill(ends.cumsum(1) > ends.long(), PAD)  # all after the first <eos>


@torch.no_grad()
def beam_search(speaker: Speaker, scene: Scene, beams: int = 5, temperature: float = 0.3, most: int = 240,
                drop_unknown: bool = True, drop_bigrams: bool = True, conjunction: int = UNKNOWN
                ) -> list[tuple[float, list[int]]]:
    """The finished sentences for one picture, best first: sum of tempered log-probabilities, and <sos> words <eos>.

    A finished sentence gives its place in the beam away. `conjunction` is the id of "and": what stands before it may
    not stand after it.
    """
    state, finished = speaker.start(scene), []
    tokens = torch.full((1, 1), SOS, device=scene.pixels.device)  # one beam at first: all would be alike
    scores = scene.pixels.new_zeros(1)
    for step in range(most + 1):
        state, _ = speaker.step(tokens[:, -1], scene, state)
        q = (speaker.output(state.h) / temperature).log_softmax(1)  # (beams, V)
        if drop_unknown:
            q[:, UNKNOWN] = -torch.inf
        if step >= 2:
            if drop_bigrams:
                q[banned_next(tokens, q.shape[1])] = -torch.inf
            after = (tokens[:, -1] == conjunction).nonzero().squeeze(1)
            q[after, tokens[after, -2]] = -torch.inf
        scores, parents, words = best_continuations(scores[:, None] + q, beams)
        tokens = torch.cat([tokens[parents], words[:, None]], 1)
        going = words != EOS
        finished += zip(scores[~going].tolist(), tokens[~going].tolist(), strict=True)
        beams = int(going.sum())
        if beams == 0:
            break
        tokens, scores, parents = tokens[going], scores[going], parents[going]
        state, scene = State(state.h[parents], state.c[parents]), scene.of(parents)
    return sorted(finished, key=lambda found: -found[0])


# 4. A run

class ShowAttendTell(nn.Module):
    """The speaker with its ResNet, or without one where feature maps are stored."""

    def __init__(self, speaker: Speaker, trunk: nn.Sequential | None = None):
        super().__init__()
        self.speaker, self.trunk = speaker, trunk

    def scene(self, pictures: Tensor, emotions: Tensor) -> Scene:
        """Pixels (B, 3, S, S) or stored maps (B, P, C), and the index of the emotion to explain, (B,)."""
        maps = pixels_of(self.trunk(normalise(pictures))) if self.trunk else pictures.float()
        return self.speaker.scene(maps, F.one_hot(emotions, self.speaker.emotion.in_features).float())


def rate_after(losses: Sequence[float], start: float, wait: int = 2, threshold: float = 1e-4, floor: float = 5e-7
               ) -> float:
    """The learning rate after epochs with these validation losses: halved at the third in a row that is not lower."""
    best, bad, rate = float("inf"), 0, start
    for loss in losses:
        best, bad = (loss, 0) if loss < best * (1 - threshold) else (best, bad + 1)
        if bad > wait:
            rate, bad = max(rate / 2, floor), 0
    return rate


class Captioner(captions.Captioner):
    def __init__(self, art: Art, settings: Settings, machine: Machine):
        trunk = None
        if settings.features == "resnet" and settings.released < settings.layers:
            trunk = load_trunk(settings.weights, settings.released, settings.layers)
            pictures, channels = squashed_pictures(art, settings.side), 2 ** (settings.layers + 1)  # 512 of 8 layers
        else:
            pictures = captions.stored_features(art, settings, machine)
            channels = pictures.store.shape[1]
        self.utterances = captions.utterances_of(art, pictures.usable)
        self.vocabulary = vocabulary_of(self.utterances["train"].words, settings.least)
        self.rows = {split: rows_of(one.words, self.vocabulary, settings.longest)
                     for split, one in self.utterances.items()}
        speaker = Speaker(len(self.vocabulary), channels, len(art.emotions), settings.embedding, settings.hidden,
                          settings.attention, settings.emotion_width, settings.dropout)
        super().__init__(pictures, ShowAttendTell(speaker, trunk), settings, machine)

    def lesson(self, split: str, batch: Tensor) -> Lesson:
        utterances, rows = self.utterances[split], self.rows[split][batch].to(self.machine.device)
        with self.machine.autocast():
            scene = self.model.scene(*self.shown(utterances.paintings[batch], utterances.emotions[batch]))
            return teach(self.model.speaker, scene, rows)

    def train(self, run: Run) -> int:
        self.vocabulary.write(run.folder)
        settings, model, rows = self.settings, self.model, self.rows
        with torch.no_grad():
            model.speaker.output.bias.copy_(output_bias(rows["train"], len(self.vocabulary)))
        groups = [{"params": list(model.speaker.parameters()), "start": settings.rate}]
        if model.trunk:
            groups.append({"params": [weight for weight in model.trunk.parameters() if weight.requires_grad],
                           "start": settings.resnet_rate})
        optimizer = torch.optim.Adam(groups)

        def epoch(losses: list[float]) -> float:
            for group in optimizer.param_groups:
                group["lr"] = rate_after(losses, group["start"])
            batches = torch.randperm(len(rows["train"])).split(settings.batch)
            total = 0.0
            for batch in progress(batches, f"epoch {len(losses) + 1}"):
                taught = self.lesson("train", batch)
                cross_entropy = F.cross_entropy(taught.logits, taught.targets)
                descend(optimizer, cross_entropy + settings.even_attention * attention_loss(taught), settings.clip_norm)
                total += cross_entropy.item()
            return total / len(batches)

        @torch.no_grad()
        def validate() -> float:
            """The mean over all words to be predicted of -ln p."""
            lost = words = 0
            for batch in torch.arange(len(rows["val"])).split(2 * settings.batch):
                taught = self.lesson("val", batch)
                lost += F.cross_entropy(taught.logits, taught.targets, reduction="sum").item()
                words += len(taught.targets)
            return lost / words

        return len(fit(run, model, optimizer, epoch, validate, settings.epochs, settings.patience, settings.seed))

    @torch.no_grad()
    def explain(self, paintings: np.ndarray, emotions: np.ndarray) -> list[str]:
        generator, texts = torch.Generator(self.machine.device).manual_seed(self.settings.seed), []
        for _, pictures, emotion in self.in_parts(paintings, emotions):
            texts += [self.vocabulary.text(sentence, SILENT)
                      for sentence in self.sentences(self.model.scene(pictures, emotion), generator)]
        return texts

    def sentences(self, scene: Scene, generator: torch.Generator) -> list[list[int]]:
        settings, speaker = self.settings, self.model.speaker
        if settings.decoding != "beam":
            choose = drawn(settings.top_k, generator) if settings.decoding == "sample" else greedy
            return sample(speaker, scene, settings.longest, choose, settings.temperature).tolist()
        conjunction = self.vocabulary.index.get("and", UNKNOWN)
        searched = [beam_search(speaker, scene.of([i]), settings.beams, settings.temperature, 8 * settings.longest,
                                conjunction=conjunction) for i in range(len(scene.pixels))]
        return [found[0][1] if found else [] for found in searched]  # []: none came to its end


def main() -> None:
    captions.program("show_attend_tell", "Show, Attend and Tell", Settings, TOY, Captioner)


if __name__ == "__main__":
    run_program(main)
