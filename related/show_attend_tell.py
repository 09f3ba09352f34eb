"""Show, Attend and Tell with an emotion: the second stage of Table 1's SAT row, as ArtEmis built it.

    1. Words            a vocabulary from the training rows, rows of ids, the bias that the output starts from
    2. The speaker      an LSTM that attends to the picture again at each word, with the emotion put in
    3. Losses           of the next words, and of pixels that are attended to too little or too much
    4. Decoding         greedy and sampled, a batch at a time; beam search, a picture at a time
    5. A run            ResNet or stored features, training, sentences for the classifier's emotions and the annotators'

    python -m related.emotion_classifier --data toy
    python -m related.show_attend_tell --data toy --emotions runs/toy-emotions

Shapes: B pictures or rows, P pixels of the picture's feature map (row by row), C channels, E word embedding, H hidden,
V vocabulary, N emotions, L words put in.
"""
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import Art
from related.captions import (
    Captioner,
    Captioning,
    Utterances,
    Vocabulary,
    program,
    stored_features,
    utterances_of,
)
from related.emotion_classifier import Pictures, load_trunk, normalise, pixels_of, squashed_pictures
from related.training import Machine, fit, parameters_of
from support.program import progress, run_program, write_text
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


TOY = dict(side=64, layers=7, released=8, hidden=256, attention=128, batch=64, rate=2e-3, epochs=10, patience=3,
           precision="float32")


# 1. Words

PAD, SOS, EOS, UNKNOWN = range(4)
SPECIALS = ("<pad>", "<sos>", "<eos>", "<unk>")
SILENT = (PAD, SOS, EOS)


def vocabulary_of(texts: Sequence[Sequence[str]], least: int = 5) -> Vocabulary:
    """The words that occur at least so often, in order of first appearance."""
    counts = Counter(itertools.chain.from_iterable(texts))
    return Vocabulary([*SPECIALS, *(word for word, count in counts.items() if count >= least)])


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


# 2. The speaker

class State(NamedTuple):
    """What the LSTM carries from word to word."""
    h: Tensor  # (B, H)
    c: Tensor  # (B, H)


@dataclass
class Scene:
    """All that stays the same from word to word."""
    pixels: Tensor  # (B, P, C) a_p
    keys: Tensor  # (B, P, A) W_a a_p + b_a
    emotion: Tensor  # (B, F) m, of no width in a speaker without emotion

    def of(self, rows) -> "Scene":
        return Scene(self.pixels[rows], self.keys[rows], self.emotion[rows])


class Speaker(nn.Module):
    """Writes a sentence word by word. Before each word it attends to the picture with what it has in mind."""

    def __init__(self, words: int, channels: int = 512, emotions: int = 9, embedding: int = 128, hidden: int = 512,
                 attention: int = 512, emotion_width: int = 9, dropout: float = 0.1):
        super().__init__()
        emotion_width = emotion_width if emotions else 0
        self.embedding = nn.Embedding(words, embedding)
        self.start_h, self.start_c = nn.Linear(channels, hidden), nn.Linear(channels, hidden)
        self.key, self.query = nn.Linear(channels, attention), nn.Linear(hidden, attention)
        self.attention = nn.Linear(attention, 1)
        self.gate = nn.Linear(hidden, channels)
        self.emotion = nn.Linear(emotions, emotion_width) if emotions else None
        self.cell = nn.LSTMCell(embedding + channels + emotion_width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, words)
        for weight in (self.embedding.weight, self.output.weight):
            nn.init.uniform_(weight, -0.1, 0.1)

    def scene(self, pixels: Tensor, emotion: Tensor | None = None) -> Scene:
        """`pixels` (B, P, C); `emotion` (B, N) is 1 for the emotion that is to be explained and 0 for the others."""
        m = pixels.new_zeros(len(pixels), 0) if self.emotion is None else F.relu(self.emotion(emotion))
        return Scene(pixels, self.key(pixels), m)

    def start(self, scene: Scene) -> State:
        mean = scene.pixels.mean(1)
        return State(self.start_h(mean), self.start_c(mean))

    def step(self, words: Tensor, scene: Scene, state: State) -> tuple[State, Tensor]:
        """Put in a word (B,) each: the new state, and where the speaker attended, (B, P)."""
        s = self.attention(F.relu(scene.keys + self.query(state.h)[:, None])).squeeze(2)  # (B, P)
        alpha = s.softmax(1)
        context = torch.einsum("bp,bpc->bc", alpha, scene.pixels)
        z = self.gate(state.h).sigmoid() * context  # which channels matter for what has been said
        h, c = self.cell(torch.cat([self.embedding(words), z, scene.emotion], 1), state)
        return State(self.dropout(h), c), alpha  # thinned for the output and for the next word alike

    def forward(self, scene: Scene, words: Tensor) -> tuple[Tensor, Tensor]:
        """Sentences (B, L) put in word by word (teacher forcing): h (B, L, H) and alphas (B, L, P)."""
        state, hidden, alphas = self.start(scene), [], []
        for column in words.T:
            state, alpha = self.step(column, scene, state)
            hidden.append(state.h)
            alphas.append(alpha)
        return torch.stack(hidden, 1), torch.stack(alphas, 1)


# 3. Losses

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


def log_probs(lesson: Lesson, temperature: float = 1.0) -> Tensor:
    """ln p of each word to be predicted, where it stands: (B, L), 0 elsewhere."""
    logs = (lesson.logits / temperature).log_softmax(1).gather(1, lesson.targets[:, None])
    return logs.new_zeros(lesson.spoken.shape).masked_scatter(lesson.spoken, logs)


# 4. Decoding

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


class Said(NamedTuple):
    """Sentences as sampled, all steps of all rows."""
    tokens: Tensor  # (B, steps + 1) <sos>, words, <eos>, <pad>
    raw: Tensor  # (B, steps) as chosen, also beyond <eos>
    logits: Tensor  # (B, steps, V) before temperature and bans
    alphas: Tensor  # (B, steps, P)


@torch.no_grad()
def sample(speaker: Speaker, scene: Scene, longest: int, choose: Callable[[Tensor], Tensor] = greedy,
           temperature: float = 1.0, drop_unknown: bool = True, drop_bigrams: bool = True, slip: bool = False) -> Said:
    """A sentence for each picture. Never one of the last two words again; `drop_bigrams`: no two words twice.

    With the original's indexing `slip`, no row may say one of the last two words of *any* row of its batch.
    """
    state, count = speaker.start(scene), len(scene.pixels)
    words = torch.full((count, 1), SOS, device=scene.pixels.device)
    steps = []
    for step in range(longest + 1):
        state, alpha = speaker.step(words[:, -1], scene, state)
        logits = speaker.output(state.h)  # (B, V)
        banned = torch.zeros_like(logits, dtype=torch.bool)
        banned.scatter_(1, words[:, 1:][:, -2:], True)
        if slip:
            banned |= banned.any(0)
        banned[:, UNKNOWN] |= drop_unknown
        if drop_bigrams and step >= 2:
            banned |= banned_next(words[:, 1:], logits.shape[1])
        word = choose((logits / temperature).masked_fill(banned, -torch.inf))
        words = torch.cat([words, word[:, None]], 1)
        steps.append((logits, alpha))
    raw = words[:, 1:]
    tokens = words.clone()
    tokens[:, 1:][(raw == EOS).cumsum(1) - (raw == EOS).long() > 0] = PAD
    tokens[(raw != EOS).all(1), -1] = EOS
    return Said(tokens, raw, *(torch.stack(part, 1) for part in zip(*steps, strict=True)))


class Hypothesis(NamedTuple):
    """A finished sentence of beam search."""
    tokens: list[int]  # <sos>, words, <eos>
    score: float  # sum of tempered log-probabilities
    alphas: Tensor  # (L, P) where the speaker attended for each token; ones for <sos>


@torch.no_grad()
def beam_search(speaker: Speaker, scene: Scene, beams: int = 5, temperature: float = 0.3, most: int = 240,
                drop_unknown: bool = True, drop_bigrams: bool = True, conjunction: int = UNKNOWN) -> list[Hypothesis]:
    """The finished sentences for one picture, best first. A finished sentence gives its place in the beam away.

    `conjunction` is the id of "and": what stands before it may not stand after it.
    """
    live = scene.of([0] * beams)
    state = speaker.start(live)
    tokens = torch.full((beams, 1), SOS, device=scene.pixels.device)
    alphas = torch.ones(beams, 1, scene.pixels.shape[1], device=scene.pixels.device)
    scores = scene.pixels.new_zeros(beams)
    finished = []
    for step in range(most + 1):
        state, alpha = speaker.step(tokens[:, -1], live, state)
        q = (speaker.output(state.h) / temperature).log_softmax(1)  # (beams, V)
        if drop_unknown:
            q[:, UNKNOWN] = -torch.inf
        if step >= 2:
            if drop_bigrams:
                q[banned_next(tokens, q.shape[1])] = -torch.inf
            after = (tokens[:, -1] == conjunction).nonzero().squeeze(1)
            q[after, tokens[after, -2]] = -torch.inf
        total = scores[:, None] + q
        pool = total[:1] if step == 0 else total  # all beams are alike at first
        scores, places = pool.flatten().topk(len(tokens))
        parents, words = places // q.shape[1], places % q.shape[1]
        tokens = torch.cat([tokens[parents], words[:, None]], 1)
        alphas = torch.cat([alphas[parents], alpha[parents, None]], 1)
        for i in (words == EOS).nonzero().flatten().tolist():
            finished.append(Hypothesis(tokens[i].tolist(), float(scores[i]), alphas[i]))
        going = words != EOS
        if not going.any():
            break
        tokens, alphas, scores, parents = tokens[going], alphas[going], scores[going], parents[going]
        state, live = State(state.h[parents], state.c[parents]), live.of(parents)
    return sorted(finished, key=lambda hypothesis: -hypothesis.score)


# 5. A run

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


def train(run: Run, model: ShowAttendTell, utterances: dict[str, Utterances], vocabulary: Vocabulary,
          pictures: Pictures, settings: Settings, machine: Machine) -> int:
    rows = {split: rows_of(one.words, vocabulary, settings.longest) for split, one in utterances.items()}
    with torch.no_grad():
        model.speaker.output.bias.copy_(output_bias(rows["train"], len(vocabulary)))
    groups = [{"params": list(model.speaker.parameters()), "start": settings.rate}]
    if model.trunk:
        groups.append({"params": [p for p in model.trunk.parameters() if p.requires_grad],
                       "start": settings.resnet_rate})
    optimizer = torch.optim.Adam(groups)

    def lesson(split: str, batch: Tensor) -> Lesson:
        emotions = torch.from_numpy(utterances[split].emotions[batch]).long().to(machine.device)
        with machine.autocast():
            scene = model.scene(pictures.of(utterances[split].paintings[batch], machine.device), emotions)
            return teach(model.speaker, scene, rows[split][batch].to(machine.device))

    def epoch(losses: list[float]) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate_after(losses, group["start"])
        batches = torch.randperm(len(rows["train"])).split(settings.batch)
        total = 0.0
        for batch in progress(batches, f"epoch {len(losses) + 1}"):
            taught = lesson("train", batch)
            cross_entropy = F.cross_entropy(taught.logits, taught.targets)
            optimizer.zero_grad()
            (cross_entropy + settings.even_attention * attention_loss(taught)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            total += cross_entropy.item()
        return total / len(batches)

    @torch.no_grad()
    def validate() -> float:
        """The mean over all words to be predicted of -ln p."""
        lost = words = 0
        for batch in torch.arange(len(rows["val"])).split(2 * settings.batch):
            taught = lesson("val", batch)
            lost, words = lost - log_probs(taught).sum().item(), words + len(taught.targets)
        return lost / words

    return len(fit(run, model, optimizer, epoch, validate, settings.epochs, settings.patience, settings.seed))


@torch.no_grad()
def explain(model: ShowAttendTell, vocabulary: Vocabulary, pictures: Pictures, paintings: np.ndarray,
            emotions: np.ndarray, settings: Settings, device: torch.device) -> list[str]:
    """A sentence for each painting and the emotion that it is to explain."""
    conjunction, texts = vocabulary.index.get("and", UNKNOWN), []
    generator = torch.Generator(device).manual_seed(settings.seed)
    choose = drawn(settings.top_k, generator) if settings.decoding == "sample" else greedy
    for part in progress(np.array_split(np.arange(len(paintings)), 1 + len(paintings) // 64), "sentences"):
        scene = model.scene(pictures.of(paintings[part], device), torch.from_numpy(emotions[part]).to(device))
        if settings.decoding == "beam":
            searched = [beam_search(model.speaker, scene.of([i]), settings.beams, settings.temperature,
                                    8 * settings.longest, conjunction=conjunction) for i in range(len(part))]
            sentences = [found[0].tokens if found else [] for found in searched]  # []: none came to its end
        else:
            sentences = sample(model.speaker, scene, settings.longest, choose, settings.temperature).tokens.tolist()
        texts += [vocabulary.text(sentence, SILENT) for sentence in sentences]
    return texts


def learn(run: Run, art: Art, settings: Settings, machine: Machine) -> Captioner:
    if settings.features == "resnet" and settings.released < settings.layers:
        trunk = load_trunk(settings.weights, settings.released, settings.layers)
        pictures = squashed_pictures(art, settings.side)
    else:
        pictures, trunk = stored_features(art, settings, machine), None
    utterances = {split: utterances_of(art, split, pictures.usable) for split in ("train", "val")}
    vocabulary = vocabulary_of(utterances["train"].words, settings.least)
    write_text(run.folder / "words.txt", "".join(f"{word}\n" for word in vocabulary.words))
    channels = 2 ** (settings.layers + 1) if trunk else pictures.store.shape[1]  # 512 after 8 layers, 256 after 7
    speaker = Speaker(len(vocabulary), channels, len(art.emotions), settings.embedding, settings.hidden,
                      settings.attention, settings.emotion_width, settings.dropout)
    model = ShowAttendTell(speaker, trunk).to(machine.device)
    epochs = train(run, model, utterances, vocabulary, pictures, settings, machine)

    def explain_these(paintings: np.ndarray, emotions: np.ndarray) -> list[str]:
        return explain(model, vocabulary, pictures, paintings, emotions, settings, machine.device)

    return Captioner(pictures, explain_these, parameters_of(model), epochs)


def main() -> None:
    program("show_attend_tell", "Show, Attend and Tell", Settings, TOY, learn)


if __name__ == "__main__":
    run_program(main)
