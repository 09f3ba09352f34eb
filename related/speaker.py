"""The network of Show, Attend and Tell (Xu et al. 2015) as ArtEmis built it: an LSTM that attends to the picture again
at each word, with an emotion put in.

    1. Speaker      a picture and the words so far -> what decides the next word        (B, P, C), (B, L) -> (B, L, H)

show_attend_tell.py trains it and lets it speak.

Shapes: B pictures, P pixels of the picture's feature map (row by row), C channels, A width of the attention, F of the
emotion, E of a word, H of the LSTM, N emotions, L words put in, V vocabulary.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
