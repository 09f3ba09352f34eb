"""M2, the Meshed-Memory Transformer (Cornia et al. 2020), with an emotion joined to every region, as in ArtEmis v2.

    1. Settings           the published sizes and recipe as defaults
    2. Attention          over the regions and, in the encoder, over learned slots beside them
    3. Encoder            regions -> the outputs of all its layers                       (B, K, F) -> (B, K, d) each
    4. Decoder            words attend to each of these outputs; a gate per channel mixes them (the mesh)
    5. MeshedMemory       emotion and regions joined, encoded once; words in parallel (training) or one by one
    6. Decoding           beam search exactly as published, greedy, at random
    7. Words              a vocabulary, rows of ids, sentences
    8. A run              training, sentences for the classifier's emotions and for the annotators'

    python -m related.emotion_classifier --data toy
    python -m related.meshed_memory --data toy --emotions runs/toy-emotions

The original's regions are a detector's boxes. Ours are the places of a ResNet's map, or the patches of a vision tower:
all of them real, none missing.

Shapes: B pictures, K regions, F their width, E width of the emotion, d model width, h heads, d_k and d_v width of one
head's keys and values, m slots, N = B * S sentences (S for each picture, side by side), L words, V vocabulary.
"""
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import Art
from metrics import cider_d, references_of
from related.captions import (
    Captioner,
    Captioning,
    Utterances,
    Vocabulary,
    program,
    stored_features,
    utterances_of,
)
from related.emotion_classifier import Pictures
from related.training import Machine, fit, parameters_of
from support.overlap import Corpus
from support.program import UserError, progress, run_program, write_text
from support.ptb import tokenize
from support.run import Run
from support.settings import option

UNKNOWN, PAD, BEGIN, END = range(4)  # ids of words that are none


# 1. Settings

@dataclass
class Settings(Captioning):
    """The published sizes and recipe by default."""
    width: int = option(512, "width of the model", least=1)
    attention_heads: int = option(8, "heads of every attention", least=1)
    key_width: int = option(64, "width of one head's queries and keys", least=1)
    value_width: int = option(64, "width of one head's values", least=1)
    slots: int = option(40, "learned keys and values beside the regions", least=0)
    inner: int = option(2048, "width inside the MLPs", least=1)
    encoder_layers: int = option(3, "blocks of the encoder; the decoder attends to the output of each", least=1)
    decoder_layers: int = option(3, "blocks of the decoder", least=1)
    emotion_width: int = option(10, "width of the emotion", least=1)
    positions: int = option(54, "words of a caption, its begin included; longer ones are cut", least=2)
    dropout: float = option(0.1, "dropout of the blocks' outputs and inside the MLPs", least=0, below=1)
    exact_zero_mask: bool = option(False, "hide regions whose projection sums to exactly 0, the original's way of "
                                          "finding padding; by rounding it hides real ones too")
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
           dropout=0.0, epochs=8, warmup=400)


# 2. Attention

class Attention(nn.Module):
    """Multi-head attention. With slots it also reaches m learned keys and values, which hold what no region says."""

    def __init__(self, sizes: Settings, slots: int = 0):
        super().__init__()
        self.heads, self.slots = sizes.attention_heads, slots
        keys, values = self.heads * sizes.key_width, self.heads * sizes.value_width
        self.query, self.key = nn.Linear(sizes.width, keys), nn.Linear(sizes.width, keys)
        self.value, self.out = nn.Linear(sizes.width, values), nn.Linear(values, sizes.width)
        if slots:
            self.slot_keys = nn.Parameter(torch.zeros(1, slots, keys))  # M_k
            self.slot_values = nn.Parameter(torch.zeros(1, slots, values))  # M_v

    def cut(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, h, K, d_k or d_v)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.key(context), self.value(context)
        if self.slots:
            d_k, m, shape = keys.shape[-1] // self.heads, self.slots, (len(context), -1, -1)
            keys = torch.cat([keys, math.sqrt(d_k) * self.slot_keys.expand(shape)], 1)  # (B, K + m, h d_k)
            values = torch.cat([values, math.sqrt(m) * self.slot_values.expand(shape)], 1)  # (B, K + m, h d_v)
        return self.cut(keys), self.cut(values)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`hidden` is True at the keys that a query must not reach."""
        visible = None if hidden is None else ~hidden
        attended = F.scaled_dot_product_attention(self.cut(self.query(x)), keys, values, visible)
        return self.out(attended.transpose(1, 2).flatten(2))


def mlp(sizes: Settings) -> nn.Sequential:
    return nn.Sequential(nn.Linear(sizes.width, sizes.inner), nn.ReLU(), nn.Dropout(sizes.dropout),
                         nn.Linear(sizes.inner, sizes.width), nn.Dropout(sizes.dropout))


# 3. Encoder

class EncoderBlock(nn.Module):
    def __init__(self, sizes: Settings):
        super().__init__()
        self.attn, self.ln_1 = Attention(sizes, sizes.slots), nn.LayerNorm(sizes.width)
        self.mlp, self.ln_2 = mlp(sizes), nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        x = self.ln_1(x + self.dropout(self.attn(x, *self.attn.keys_values(x), hidden)))  # A
        return self.ln_2(x + self.mlp(x))  # H'


class Encoder(nn.Module):
    """Regions are a set: no positions."""

    def __init__(self, sizes: Settings, region_width: int):
        super().__init__()
        self.project, self.ln_in = nn.Linear(region_width, sizes.width), nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)
        self.blocks = nn.ModuleList(EncoderBlock(sizes) for _ in range(sizes.encoder_layers))
        self.slots, self.exact_zero_mask = sizes.slots, sizes.exact_zero_mask

    def forward(self, regions: Tensor, count: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """H_0 = U, H_1, ... of (B, K, d) each, and which regions are hidden, (B, 1, 1, K): those after the first
        `count` (B,), where not all are real."""
        states = [self.ln_in(self.dropout(torch.relu(self.project(regions))))]
        hidden = None
        if self.exact_zero_mask:
            hidden = (states[0].sum(-1) == 0)[:, None, None]
        elif count is not None:
            hidden = (torch.arange(regions.shape[1], device=count.device) >= count[:, None])[:, None, None]
        with_slots = None if hidden is None else F.pad(hidden, (0, self.slots))  # slots are never hidden
        for block in self.blocks:
            states.append(block(states[-1], with_slots))
        return states, hidden


# 4. Decoder

@dataclass
class Picture:
    """Pictures as the decoder wants them, computed once for all words and beams."""
    mesh: list[list[tuple[Tensor, Tensor]]]  # for each decoder block, of each H_i: (B, h, K, d_k) and (B, h, K, d_v)
    hidden: Tensor | None  # (B, 1, 1, K)

    def __len__(self) -> int:
        return len(self.mesh[0][0][0])

    @property
    def device(self) -> torch.device:
        return self.mesh[0][0][0].device


@dataclass
class Past:
    """The words of N sentences so far, and what the blocks' self-attention keeps of them."""
    ids: Tensor  # (N, T)
    keys_values: list[tuple[Tensor, Tensor]]  # (N, h, T, d_k), (N, h, T, d_v)

    def __getitem__(self, sentences: Tensor) -> "Past":
        return Past(self.ids[sentences], [(keys[sentences], values[sentences]) for keys, values in self.keys_values])


class DecoderBlock(nn.Module):
    def __init__(self, sizes: Settings):
        super().__init__()
        self.attn, self.ln_1 = Attention(sizes), nn.LayerNorm(sizes.width)
        self.cross_attn, self.ln_cross = Attention(sizes), nn.LayerNorm(sizes.width)  # the same for every H_i
        self.gates = nn.ModuleList(nn.Linear(2 * sizes.width, sizes.width) for _ in range(sizes.encoder_layers))
        self.mlp, self.ln_2 = mlp(sizes), nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor, keep: Tensor, keys_values: tuple[Tensor, Tensor], out_of_reach: Tensor,
                mesh: list[tuple[Tensor, Tensor]], hidden: Tensor | None) -> Tensor:
        """`keep` (N, L, 1) is 0 where the word is <pad>, else 1. S reaches Y only through the C_i."""
        s = keep * self.ln_1(x + self.dropout(self.attn(x, *keys_values, out_of_reach)))  # (N, L, d) S
        y = torch.zeros_like(s)
        for gate, (keys, values) in zip(self.gates, mesh, strict=True):
            queries = s.reshape(len(keys), -1, s.shape[-1])  # (B, S L, d): all sentences of a picture ask together
            found = self.cross_attn(queries, keys, values, hidden).view_as(s)
            c = keep * self.ln_cross(s + self.dropout(found))  # C_i
            y = y + gate(torch.cat([s, c], -1)).sigmoid() * c  # a_i C_i
        y = keep * y / math.sqrt(len(self.gates))  # Y
        return keep * self.ln_2(y + self.mlp(y))


class Decoder(nn.Module):
    def __init__(self, sizes: Settings, vocabulary: int):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, sizes.width, padding_idx=PAD)
        self.wpe = nn.Embedding(sizes.positions + 1, sizes.width).requires_grad_(False)
        self.blocks = nn.ModuleList(DecoderBlock(sizes) for _ in range(sizes.decoder_layers))
        self.head = nn.Linear(sizes.width, vocabulary, bias=False)

    def forward(self, ids: Tensor, picture: Picture, past: Past | None = None) -> tuple[Tensor, Past]:
        """log p (N, L, V) of the word after each of `ids` (N, L), which follow those of the past."""
        so_far = ids if past is None else torch.cat([past.ids, ids], 1)  # (N, T)
        places = torch.arange(so_far.shape[1], device=ids.device)
        own = places[-ids.shape[1]:]  # t of each word
        x = self.wte(ids) + self.wpe((own + 1) * (ids != PAD))  # position t + 1, but 0 for <pad>
        out_of_reach = (places > own[:, None]) | (so_far == PAD)[:, None, None]  # (N, 1, L, T)
        keep, kept = (ids != PAD)[..., None], []
        for layer, block in enumerate(self.blocks):
            keys_values = block.attn.keys_values(x)
            if past is not None:
                earlier = past.keys_values[layer]
                keys_values = tuple(torch.cat(pair, 2) for pair in zip(earlier, keys_values, strict=True))
            kept.append(keys_values)
            x = block(x, keep, keys_values, out_of_reach, picture.mesh[layer], picture.hidden)
        return self.head(x).log_softmax(-1), Past(so_far, kept)


# 5. MeshedMemory

class MeshedMemory(nn.Module):
    def __init__(self, sizes: Settings, region_width: int, vocabulary: int, emotions: int = 9):
        """Without emotions this is the basic model."""
        super().__init__()
        if emotions:
            self.emotion = nn.Linear(emotions, sizes.emotion_width)  # W_e
            region_width += sizes.emotion_width
        self.encoder, self.decoder = Encoder(sizes, region_width), Decoder(sizes, vocabulary)

    def join(self, regions: Tensor, emotions: Tensor) -> Tensor:
        """[region ; e] for every region, e = W_e onehot + b_e: (B, K, F) and (B,) -> (B, K, F + E)."""
        e = self.emotion(F.one_hot(emotions, self.emotion.in_features).float())
        return torch.cat([regions, e[:, None].expand(-1, regions.shape[1], -1)], -1)

    def encode(self, regions: Tensor, emotions: Tensor | None, count: Tensor | None = None) -> Picture:
        """Regions (B, K, F), the first `count` (B,) of them real, and the emotion (B,) to explain."""
        states, hidden = self.encoder(regions if emotions is None else self.join(regions, emotions), count)
        mesh = [[block.cross_attn.keys_values(state) for state in states[1:]] for block in self.decoder.blocks]
        return Picture(mesh, hidden)

    def forward(self, regions: Tensor, emotions: Tensor | None, rows: Tensor) -> Tensor:
        """The mean of -log p over the words to be predicted."""
        log_probs, _ = self.decoder(rows[:, :-1], self.encode(regions, emotions))
        return F.nll_loss(log_probs.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=PAD)


# 6. Decoding

@torch.no_grad()
def beam_search(decoder: Decoder, picture: Picture, beams: int = 5, steps: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Words and their log p, (B, beams, steps) each, and scores (B, beams), best first. One beam decodes greedily.

    As published: always all steps, no length normalisation, nothing forbidden. A finished beam goes on with id 0 at
    no cost, and with any other at -999.
    """
    each, past = torch.arange(len(picture), device=picture.device)[:, None], None
    last = torch.full_like(each, BEGIN)  # (B, 1): one beam at first
    scores, live = torch.zeros_like(last, dtype=torch.float), torch.ones_like(last, dtype=torch.bool)
    ids, gains = last[..., None][..., :0], scores[..., None][..., :0]  # (B, 1, 0)
    for _ in range(steps):
        log_probs, past = decoder(last.view(-1, 1), picture, past)
        log_probs = log_probs.view(*last.shape, -1) * live[..., None]  # (B, beams, V)
        candidates = torch.where(live[..., None], scores[..., None] + log_probs, -999.0)
        candidates[..., 0] = scores + log_probs[..., 0]
        scores, best = candidates.flatten(1).topk(beams)
        parents, chosen = best // log_probs.shape[2], best % log_probs.shape[2]  # (B, beams)
        past = past[(each * last.shape[1] + parents).flatten()]
        ids = torch.cat([ids[each, parents], chosen[..., None]], 2)
        gains = torch.cat([gains[each, parents], log_probs.flatten(1).gather(1, best)[..., None]], 2)
        last, live = chosen, live[each, parents] & (chosen != END)
    return ids, gains, scores


@torch.no_grad()
def draw(decoder: Decoder, picture: Picture, steps: int, chance: torch.Generator) -> Tensor:
    """A sentence (B, steps) of each picture, each word drawn by its probability."""
    ids, past = torch.full((len(picture), 1), BEGIN, device=chance.device), None
    for _ in range(steps):
        log_probs, past = decoder(ids[:, -1:], picture, past)
        ids = torch.cat([ids, log_probs[:, -1].exp().multinomial(1, generator=chance)], 1)
    return ids[:, 1:]


# 7. Words

SPECIALS = ("<unk>", "<pad>", "<bos>", "<eos>")
DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def spoken(words: Iterable[str]) -> list[str]:
    """Lower case, without the marks that the original drops."""
    return [word for word in map(str.lower, words) if word not in DROPPED]


def vocabulary_of(texts: Iterable[Sequence[str]], least: int = 5) -> Vocabulary:
    """The words that occur at least so often, the most frequent first, equally frequent ones in code-point order."""
    counts = Counter(itertools.chain.from_iterable(texts))
    known = (word for word, count in counts.items() if count >= least)
    return Vocabulary([*SPECIALS, *sorted(known, key=lambda word: (-counts[word], word))])


def rows_of(texts: Iterable[Sequence[str]], vocabulary: Vocabulary, positions: int) -> Tensor:
    """<bos> words <eos>, and <pad> up to a common length; all but the last id of a row have a position."""
    rows = [torch.tensor([BEGIN, *vocabulary.ids(words), END][:positions + 1]) for words in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def sentence(vocabulary: Vocabulary, ids: Iterable[int]) -> str:
    """The words before the first <eos>, of equal neighbours only one: so loops do not show in the scores."""
    said = itertools.takewhile(lambda i: i != END, ids)
    return vocabulary.text(i for i, _ in itertools.groupby(said))


# 8. A run

def initialise(model: MeshedMemory) -> None:
    """As the original ends up: tables and matrices of the captioner Xavier-uniform, also the slots, and the positions,
    which were meant to be sinusoids and stay frozen; no bias in attention and gates."""
    for parameter in (*model.encoder.parameters(), *model.decoder.parameters()):
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    linears = [linear for one in attentions for linear in (one.query, one.key, one.value, one.out)]
    for linear in (*linears, *(gate for block in model.decoder.blocks for gate in block.gates)):
        nn.init.zeros_(linear.bias)


def rate(iterations: int, epoch: int, width: int, warmup: int) -> float:
    """The learning rate after so many iterations: up linearly, then down with their square root.

    The start of an epoch counts as one more step, as in the original.
    """
    n = iterations + epoch + 2
    return width ** -0.5 * min(n ** -0.5, n * warmup ** -1.5)


def train(run: Run, model: MeshedMemory, rows: Tensor, utterances: Utterances, pictures: Pictures,
          validate: Callable[[], float], settings: Settings, machine: Machine) -> int:
    """An example is a row of ids with its annotator's own emotion."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.98), fused=machine.device.type in ("cpu", "cuda"))
    steps = max(1, len(rows) // settings.batch)  # of an epoch; what is left over is dropped

    def epoch(losses: list[float]) -> float:
        done, total = len(losses), 0.0
        batches = torch.randperm(len(rows)).split(settings.batch)[:steps]
        for step, batch in enumerate(progress(batches, f"epoch {done + 1}")):
            longest = int((rows[batch] != PAD).sum(1).max())
            regions = pictures.of(utterances.paintings[batch], machine.device).float()
            emotions = torch.from_numpy(utterances.emotions[batch]).long().to(machine.device)
            with machine.autocast():
                loss = model(regions, emotions, rows[batch, :longest].to(machine.device))
            [group] = optimizer.param_groups
            group["lr"] = rate(done * steps + step, done, settings.width, settings.warmup)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total / steps

    return len(fit(run, model, optimizer, epoch, validate, settings.epochs, settings.patience, settings.seed,
                   latest=True))


def validation(art: Art, usable: np.ndarray, explain: Callable[[np.ndarray, np.ndarray], list[str]]
               ) -> Callable[[], float]:
    """Minus the CIDEr of sentences for the annotators' emotions, on the validation split."""
    paintings = art.paintings("val")
    paintings = paintings[usable[paintings]]
    felt, references = np.asarray(art.votes)[paintings].argmax(1), references_of(art, "val")
    theirs = [list(map(tokenize, references[art.names[painting]].explanations)) for painting in paintings]
    return lambda: -cider_d(Corpus(list(map(tokenize, explain(paintings, felt))), theirs)).value


def learn(run: Run, art: Art, settings: Settings, machine: Machine) -> Captioner:
    pictures = stored_features(art, settings, machine)
    machine = Machine.chosen(settings.device, settings.precision, settings.width)  # M2 may be narrower than a ResNet
    utterances = {split: utterances_of(art, split, pictures.usable) for split in ("train", "val")}
    texts = {split: [spoken(words) for words in one.words] for split, one in utterances.items()}
    vocabulary = vocabulary_of([*texts["train"], *texts["val"]], settings.least)
    write_text(run.folder / "words.txt", "".join(f"{word}\n" for word in vocabulary.words))
    model = MeshedMemory(settings, pictures.store.shape[1], len(vocabulary), len(art.emotions))
    initialise(model.to(machine.device))

    @torch.no_grad()
    def explain(paintings: np.ndarray, emotions: np.ndarray) -> list[str]:
        """A sentence for each painting and the emotion that it is to explain."""
        chance, said = torch.Generator(machine.device).manual_seed(settings.seed), []
        for part in progress(np.array_split(np.arange(len(paintings)), 1 + len(paintings) // 64), "sentences"):
            regions = pictures.of(paintings[part], machine.device).float()
            with machine.autocast():
                picture = model.encode(regions, torch.from_numpy(emotions[part]).to(machine.device))
                if settings.decoding == "sample":
                    ids = draw(model.decoder, picture, settings.steps, chance)
                else:
                    beams = settings.beams if settings.decoding == "beam" else 1
                    ids = beam_search(model.decoder, picture, beams, settings.steps)[0][:, 0]
            said += ids.tolist()
        return [sentence(vocabulary, words) for words in said]

    rows, validate = rows_of(texts["train"], vocabulary, settings.positions), validation(art, pictures.usable, explain)
    epochs = train(run, model, rows, utterances["train"], pictures, validate, settings, machine)
    return Captioner(pictures, explain, parameters_of(model), epochs)


def main() -> None:
    program("meshed_memory", "the Meshed-Memory Transformer", Settings, TOY, learn)


if __name__ == "__main__":
    run_program(main)
