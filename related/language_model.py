"""GPT-2 as it was, behind a soft prompt: rows of its own width that stand where words would. EmoVIT's language model.

Shapes: N rows of Q soft and L other tokens, w width, V vocabulary, C given answers.
"""
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sevlm import IGNORE, MLP, Cache, Embedding, SelfAttention, tanh_gelu


class LanguageBlock(nn.Module):
    """GPT-2's own block: SEVLM's has a cross-attention layer in it."""

    def __init__(self, sizes):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(sizes.width), SelfAttention(sizes.width, sizes.heads, causal=True)
        self.ln_2, self.mlp = nn.LayerNorm(sizes.width), MLP(sizes.width, tanh_gelu)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class LanguageModel(nn.Module):
    """Of a configuration's `width`, `layers`, `heads` and `positions`."""

    def __init__(self, sizes, vocabulary: int):
        super().__init__()
        self.wte, self.wpe = Embedding(vocabulary, sizes.width), Embedding(sizes.positions, sizes.width)
        self.blocks = nn.ModuleList(LanguageBlock(sizes) for _ in range(sizes.layers))
        self.ln_f = nn.LayerNorm(sizes.width)

    def embed(self, soft: Tensor, ids: Tensor) -> Tensor:
        """(N, Q, w) and (N, L) -> (N, Q + L, w); positions run on from 0."""
        x = torch.cat([soft, self.wte(ids)], 1)
        return x + self.wpe.weight[:x.shape[1]]

    def forward(self, x: Tensor, caches: Sequence[Cache | None] | None = None) -> Tensor:
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, cache)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.wte.weight)  # (..., V)

    def surprise(self, soft: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """-log p of each token that is a label, given all before it; 0 elsewhere: (N, L)."""
        hidden = self(self.embed(soft, ids))[:, soft.shape[1] - 1:-1]  # what is before each token of the text
        wanted = labels != IGNORE
        logits = self.logits(hidden[wanted]).float()  # none where nothing is asked
        found = F.cross_entropy(logits, labels[wanted], reduction="none")
        return torch.zeros_like(labels, dtype=found.dtype).masked_scatter(wanted, found)


class Decoding:
    """Answers on their way, as `generate` and `beam_search` want them."""

    def __init__(self, decoder: LanguageModel, soft: Tensor, ids: Tensor, length: int):
        self.decoder, self.soft, self.ids = decoder, soft, ids
        self.caches = [Cache(soft.shape[1] + length) for _ in decoder.blocks]

    def append(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)

    def logits(self) -> Tensor:
        """For the next token of each answer: (n, V), float32."""
        unread = self.decoder.embed(self.soft, self.ids)[:, self.caches[0].length:]
        return self.decoder.logits(self.decoder(unread, self.caches)[:, -1]).float()

    def log_probs(self, answers: Sequence[Sequence[int]]) -> Tensor:
        """Of each of C whole answers, after each of n questions: (n, C)."""
        n, C, device = len(self.ids), len(answers), self.ids.device
        told = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in answers], batch_first=True).to(device)
        lengths = torch.tensor(list(map(len, answers)), device=device)
        real = torch.arange(told.shape[1], device=device) < lengths[:, None]
        told, real = told.repeat(n, 1), real.repeat(n, 1)  # (n C, longest answer)
        logits = self.logits().repeat_interleave(C, 0)  # a question is read once for all answers
        self.select(torch.arange(n, device=device).repeat_interleave(C))
        total = torch.zeros(n * C, device=device)
        for place, tokens in enumerate(told.unbind(1)):
            if place:
                logits = self.logits()
            total -= F.cross_entropy(logits, tokens, reduction="none") * real[:, place]
            self.append(tokens)
        return total.view(n, C)

    def select(self, answers: Tensor) -> None:
        self.soft, self.ids = self.soft[answers], self.ids[answers]
        for cache in self.caches:
            cache.select(answers)
