"""The network of M2, the Meshed-Memory Transformer (Cornia et al. 2020), with an emotion joined to every region.

    1. Sizes              those that were published as defaults
    2. Attention          over the regions and, in the encoder, over learned slots beside them
    3. Encoder            regions -> the outputs of all its layers                       (B, K, F) -> (B, K, d) each
    4. Decoder            words attend to each of these outputs; a gate per channel mixes them (the mesh)
    5. MeshedMemory       emotion and regions joined, encoded once; words in parallel (training) or one by one

meshed_memory.py trains it and lets it speak.

Shapes: B pictures, K regions, F their width, E width of the emotion, d model width, h heads, d_k and d_v width of one
head's keys and values, m slots, N = B * S sentences (S for each picture, side by side), L words, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.settings import option

UNKNOWN, PAD, BEGIN, END = range(4)  # ids of words that are none


# 1. Sizes

@dataclass
class Sizes:
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


# 2. Attention

class Attention(nn.Module):
    """Multi-head attention. With slots it also reaches m learned keys and values, which hold what no region says."""

    def __init__(self, sizes: Sizes, slots: int = 0):
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


def mlp(sizes: Sizes) -> nn.Sequential:
    return nn.Sequential(nn.Linear(sizes.width, sizes.inner), nn.ReLU(), nn.Dropout(sizes.dropout),
                         nn.Linear(sizes.inner, sizes.width), nn.Dropout(sizes.dropout))


# 3. Encoder

class EncoderBlock(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.attn, self.ln_1 = Attention(sizes, sizes.slots), nn.LayerNorm(sizes.width)
        self.mlp, self.ln_2 = mlp(sizes), nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        x = self.ln_1(x + self.dropout(self.attn(x, *self.attn.keys_values(x), hidden)))  # A
        return self.ln_2(x + self.mlp(x))  # H'


class Encoder(nn.Module):
    """Regions are a set: no positions."""

    def __init__(self, sizes: Sizes, region_width: int):
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
    def __init__(self, sizes: Sizes):
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
    def __init__(self, sizes: Sizes, vocabulary: int):
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
    def __init__(self, sizes: Sizes, region_width: int, vocabulary: int, emotions: int = 9):
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
