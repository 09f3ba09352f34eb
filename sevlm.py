"""SEVLM: a small vision language model that names the emotion a painting evokes and explains it in a sentence.

    picture -> "the emotion is awe because the light breaking through the clouds feels like something holy"

Sections, equations and figures are those of arXiv 2403.11150; the numbers are those of the figure in the README.

    1. Config            sizes, the paper's parts as switches (5.3), and where we differ from the authors
    2. Text              the sentence: M "the emotion is awe", X "because ...", tokens and segments (4.1)
    3. VisionTower       CLIP's ViT, frozen: picture -> patch features f^I                 (B, 3, S, S) -> (B, K, d)
    4. Decoder           GPT-2 with cross-attention to the patches (Eq. 1, 3)               (N, L, d) -> (N, L, d)
    5. SEVLM             fusion of VAD and text (Eq. 2), VAD head (Eq. 4), contrastive head (Eq. 6), losses (5, 7, 8)
    6. Generation        word by word, with caches: greedy, nucleus, beam; emotion probabilities; attention maps
    7. Checkpoints       our folders, and CLIP's and GPT-2's public weights

Shapes: B pictures, N = B * E sentences (E for each picture, side by side), K patches, L tokens, d width, H heads,
V vocabulary. vad.py comes before this file. To walk through Figure 4 with the small model and a picture:

    python sevlm.py examples/awe-moon.png "awe because the light is holy"
"""
import argparse
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from support.files import fetch, find_file, is_hub_id, load_checked, read_tensors, read_tokenizer
from support.pictures import BadPicture, open_picture, squared
from support.program import UserError, read_json, replacing, run_program, write_json, write_text
from support.public import (
    CLIP_FILES,
    CLIP_HUB,
    GPT2_FILES,
    GPT2_HUB,
    clip_tensors,
    decoder_sizes,
    gpt2_tensors,
    tower_sizes,
)
from support.settings import check, flag, option, restored
from vad import EmotionEncoder, Lexicon, WordVAD, read_lexicon, vad_loss

EMOTIONS = ("amusement", "awe", "contentment", "excitement", "anger", "disgust", "fear", "sadness", "something else")
IGNORE = -100  # a label that asks for no prediction
BUNDLED = Path(__file__).parent / "examples" / "toy"


# 1. Config

@dataclass
class Config:
    """The paper's model by default; `toy()` is a small one for a laptop's CPU."""
    image_size: int = option(224, "pixels on a side of the picture", least=1, most=4096)
    patch_size: int = option(16, "pixels on a side of a patch", least=1)
    tower_width: int = option(768, "width of the vision tower", least=1, most=2**14)
    tower_layers: int = option(12, "blocks of the vision tower", least=1, most=1000)
    tower_heads: int = option(12, "attention heads of the vision tower", least=1, most=2**14)
    train_tower: bool = option(False, "train the vision tower too (the paper freezes CLIP's)")
    width: int = option(768, "width of the decoder", least=1, most=2**14)
    layers: int = option(6, "blocks of the decoder", least=1, most=1000)
    heads: int = option(12, "attention heads of the decoder", least=1, most=2**14)
    positions: int = option(1024, "rows of the decoder's position table", least=8, most=2**20)
    length: int = option(30, "tokens of a sentence (5.1); longer ones are cut", least=8, most=2**20)
    dropout: float = option(0.1, "dropout of embeddings, attention and residuals", least=0, below=1)
    crop: bool = option(False, "cut the picture's central square instead of squashing the whole picture")
    # the paper's parts; without the first three this is the baseline of Table 1
    vad_input: bool = option(True, "fuse VAD features into the text embedding (4.2.1)")
    vad_head: bool = option(True, "predict the VAD of the next word (4.2.2)")
    contrastive_head: bool = option(True, "score whether image, emotion and explanation match (4.2.3)")
    emotion_encoder: bool = option(True, "encode VAD before fusion (Eq. 2); off: raw VAD (Figure 6)")
    wrong_emotion: bool = option(True, "contrast with an explanation of another emotion (Figure 7)")
    wrong_image: bool = option(True, "contrast with an explanation of another image (Figure 7)")
    alpha: float = option(2.0, "weight of the contrastive loss (Eq. 8)", least=0, most=1e6)
    # the authors' choices where ours differ; the README says why
    two_way_emotions: bool = option(False, "emotion encoder attends both ways, so it knows words still to predict")
    fixed_boundary: bool = option(False, "X always begins at position 6, however long the emotion's name is")
    vad_on_emotion: bool = option(False, "M's words carry VAD too")
    padding_in_means: bool = option(False, "the contrastive head's means count padding")
    vad_per_token: bool = option(False, "look up each token alone, not the word so far")
    authors_pixels: bool = option(False, "resize bilinearly and normalise with ImageNet's mean and deviation")
    emotions: tuple[str, ...] = field(default=EMOTIONS)

    def __post_init__(self):
        check(self)
        if not isinstance(self.emotions, (list, tuple)) or not all(isinstance(one, str) and one.strip() == one != ""
                                                                   for one in self.emotions):
            raise UserError(f"emotions is {self.emotions!r}; it must be a list of names")
        self.emotions = tuple(self.emotions)
        if not 2 <= len(set(self.emotions)) == len(self.emotions) <= 40:
            raise UserError(f"a model has 2 to 40 different emotions, not {len(self.emotions)}")
        for whole, part in (("image_size", "patch_size"), ("tower_width", "tower_heads"), ("width", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(f"{flag(whole)} {getattr(self, whole)} is no multiple of "
                                f"{flag(part)} {getattr(self, part)}")
        if self.length > self.positions:
            raise UserError(f"--length {self.length} is beyond the position table's --positions {self.positions}")
        if self.contrastive_head and not (self.wrong_emotion or self.wrong_image):
            raise UserError("the contrastive head needs a negative: turn on --wrong-emotion or --wrong-image, "
                            "or turn off --contrastive-head")

    @classmethod
    def toy(cls, **changes) -> "Config":
        small = dict(image_size=64, patch_size=8, tower_width=128, tower_layers=4, tower_heads=4, train_tower=True,
                     width=128, layers=3, heads=4, positions=64, dropout=0.0, alpha=0.1)
        return cls(**small | changes)

    @classmethod
    def authors(cls, **changes) -> "Config":
        """Every choice as in the authors' code."""
        return cls(**dict.fromkeys(DIFFERENCES, True) | changes)

    @property
    def uses_vad(self) -> bool:
        return self.vad_input or self.vad_head

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2  # K


BASELINE = dict(vad_input=False, vad_head=False, contrastive_head=False)  # Table 1
DIFFERENCES = ("two_way_emotions", "fixed_boundary", "vad_on_emotion", "padding_in_means", "vad_per_token",
               "authors_pixels")
FIXED_BOUNDARY = 6  # tokens of M in the authors' code: <|endoftext|> the emotion is awe because


# 2. Text: <|endoftext|> the emotion is {emotion} because {explanation} <|endoftext|>
#          |--------------- M ----------------| |------------- X ----------------|

class Text:
    """Sentences as token ids. Four tokens are added to GPT-2's 50,257, in the authors' order."""
    ADDED = ("<pad>", "<prefix>", "<emotion>", "<explanation>")  # <prefix> is unused, but their weights have it

    def __init__(self, tokenizer: Tokenizer, emotions: Sequence[str]):
        tokenizer.add_special_tokens(["<|endoftext|>", *self.ADDED])
        self.tokenizer, self.emotions = tokenizer, tuple(emotions)
        self.size = tokenizer.get_vocab_size()  # V
        self.end, self.pad, _, self.emotion, self.explanation = map(
            tokenizer.token_to_id, ("<|endoftext|>", *self.ADDED))
        self.special = [self.end, *map(tokenizer.token_to_id, self.ADDED)]
        because = self.tokens(" because")
        if len(because) != 1:
            raise UserError(f"the tokenizer cuts ' because' into {len(because)} tokens; X must begin with one")
        self.because = because[0]
        self.prompt = [self.end, *self.tokens(" the emotion is")]
        self.names = [self.tokens(" " + emotion) for emotion in emotions]
        if any(self.because in name for name in self.names):
            raise UserError("the word 'because' begins an explanation; it cannot be part of an emotion's name")

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def emotion_index(self, emotion: str) -> int:
        if emotion not in self.emotions:
            raise UserError(f"unknown emotion {emotion!r}; the emotions are {', '.join(self.emotions)}")
        return self.emotions.index(emotion)

    def opening(self, emotion: str) -> list[int]:
        """M and " because": what comes before an explanation."""
        return [*self.prompt, *self.names[self.emotion_index(emotion)], self.because]

    def encode(self, emotions: Sequence[str], explanations: Sequence[str], length: int) -> Tensor:
        """Padded ids (N, L). A longer sentence loses its end."""
        encoded = self.tokenizer.encode_batch_fast([" because " + text for text in explanations],
                                                   add_special_tokens=False)
        opening = {emotion: self.opening(emotion)[:-1] for emotion in set(emotions)}
        padding = [self.pad] * length
        sentences = [(opening[emotion] + x.ids + [self.end] + padding)[:length]
                     for emotion, x in zip(emotions, encoded, strict=True)]
        return torch.from_numpy(np.array(sentences, np.int64)).view(-1, length)  # torch.tensor is slow

    def segments(self, ids: Tensor) -> Tensor:
        """<emotion> before the first " because", <explanation> from there on, padding included: (N, L)."""
        return torch.where((ids == self.because).cumsum(1) > 0, self.explanation, self.emotion)

    def labels(self, ids: Tensor) -> Tensor:
        """Every token after the first is to be predicted; padding is not."""
        labels = ids.masked_fill(ids == self.pad, IGNORE)
        labels[:, 0] = IGNORE
        return labels

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first special token after the start."""
        ids = list(ids[1:]) if ids and ids[0] == self.end else list(ids)
        stop = next((place for place, index in enumerate(ids) if index in self.special), len(ids))
        return self.tokenizer.decode(ids[:stop]).strip()

    def reason(self, ids: Sequence[int]) -> str:
        """What follows the first " because"."""
        return self.decode(ids[ids.index(self.because) + 1:]) if self.because in ids else ""

    def words(self, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """The words of X, each with the positions of its tokens; punctuation belongs to the word before it."""
        positions: list[list[int]] = []
        for position in range(ids.index(self.because) + 1, len(ids)) if self.because in ids else ():
            if ids[position] in self.special:
                break
            if not positions or self.tokenizer.id_to_token(ids[position]).startswith("Ġ"):  # a blank
                positions.append([])
            positions[-1].append(position)
        return [(self.tokenizer.decode([ids[p] for p in places]).strip(), places) for places in positions]


# 3. Vision tower. Layers carry the names that CLIP and GPT-2 share.

class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        pass  # `initialise` or a file fills it: to draw 100 million random numbers and drop them takes a second


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        pass


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)  # CLIP's own approximation, 0.02 away from the GELU


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")  # GPT-2's


class SelfAttention(nn.Module):
    """Attention of a sequence to itself; causal for text."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float = 0.0):
        super().__init__()
        self.heads, self.causal, self.rate = heads, causal, dropout
        self.c_attn = Linear(width, 3 * width)
        self.c_proj = Linear(width, width)

    def forward(self, x: Tensor, cache: "Cache | None" = None) -> Tensor:
        N, L, d = x.shape
        all_three = self.c_attn(x).view(N, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (3, N, H, L, d/H)
        query, key, value = all_three
        if cache is not None:
            key, value = cache.extend(all_three[1:])
        causal = self.causal and L > 1  # a single new token may attend to all before it
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=self.rate * self.training,
                                                  is_causal=causal)
        return self.c_proj(attended.transpose(1, 2).reshape(N, L, d))


class MLP(nn.Module):
    def __init__(self, width: int, activation):
        super().__init__()
        self.c_fc, self.c_proj = Linear(width, 4 * width), Linear(4 * width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class TowerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), SelfAttention(width, heads, causal=False)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width, quick_gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTower(nn.Module):
    """CLIP's ViT up to its last LayerNorm; the class token takes part and is dropped at the end (4.1)."""

    def __init__(self, config: Config):
        super().__init__()
        width, patch = config.tower_width, config.patch_size
        self.image_size = config.image_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(config.patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(TowerBlock(width, config.tower_heads) for _ in range(config.tower_layers))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        size = self.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be (B, 3, {size}, {size}), not {tuple(images.shape)}")
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, K, d)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first.to(x.dtype), x], 1) + self.positional_embedding)  # (B, 1 + K, d)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x[:, 1:])  # (B, K, d)


PIXEL_STATISTICS = {  # mean and deviation of red, green and blue, by `authors_pixels`
    False: ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # CLIP's
    True: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
}


def load_pixels(source, config: Config) -> Tensor:
    """A picture file or stream as uint8 pixels (3, S, S)."""
    return to_pixels(open_picture(source, config.image_size), config)


def to_pixels(image: Image.Image, config: Config) -> Tensor:
    """The whole picture squashed, or its central square: (3, S, S)."""
    resample = Image.Resampling.BILINEAR if config.authors_pixels else Image.Resampling.BICUBIC
    return squared(image, config.image_size, config.crop, resample)


def normalise(pixels: Tensor, config: Config) -> Tensor:
    """uint8 pixels to what the tower expects; floats have been through here: (B, 3, S, S) -> (B, 3, S, S)."""
    if pixels.dtype != torch.uint8:
        return pixels
    mean, deviation = (torch.tensor(values, device=pixels.device).view(3, 1, 1)
                       for values in PIXEL_STATISTICS[config.authors_pixels])
    return (pixels / 255 - mean) / deviation


# 4. Decoder

class CrossAttention(nn.Module):
    """Text attends to the picture's patches, whose keys and values are computed once."""

    def __init__(self, width: int, source: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.q_attn, self.c_attn = Linear(width, width), Linear(source, 2 * width)
        self.c_proj = Linear(width, width)

    def keys_values(self, features: Tensor) -> Tensor:
        B, K, _ = features.shape
        return self.c_attn(features).view(B, K, 2, self.heads, -1).permute(0, 2, 3, 1, 4)  # (B, 2, H, K, d/H)

    def forward(self, x: Tensor, keys_values: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        N, L, d = x.shape
        B = len(keys_values)
        key, value = keys_values.unbind(1)
        # the N / B sentences of a picture ask the same keys: one long row of queries
        query = self.q_attn(x).view(B, N // B * L, self.heads, -1).transpose(1, 2)  # (B, H, N/B * L, d/H)
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=self.rate * self.training)
        if maps is not None:
            weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
            maps.append(weights.mean(1).view(N, L, -1))  # (N, L, K), mean over heads
        return self.c_proj(attended.transpose(1, 2).reshape(N, L, d))


class Block(nn.Module):
    """A GPT-2 block with a cross-attention layer between self-attention and MLP (Eq. 1)."""

    def __init__(self, config: Config):
        super().__init__()
        width, heads, rate = config.width, config.heads, config.dropout
        self.ln_1, self.attn = nn.LayerNorm(width), SelfAttention(width, heads, causal=True, dropout=rate)
        self.ln_cross, self.cross_attn = nn.LayerNorm(width), CrossAttention(width, config.tower_width, heads, rate)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width, tanh_gelu)
        self.dropout = nn.Dropout(rate)

    def forward(self, x: Tensor, keys_values: Tensor, cache: "Cache | None", maps: list | None) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), cache))
        x = x + self.dropout(self.cross_attn(self.ln_cross(x), keys_values, maps))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class Decoder(nn.Module):
    """GPT-2: embeddings, blocks, last LayerNorm, and the head that is tied to the word embedding."""

    def __init__(self, config: Config, vocabulary: int):
        super().__init__()
        self.wte = Embedding(vocabulary, config.width)
        self.wpe = Embedding(config.positions, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)

    def embed(self, ids: Tensor, segments: Tensor, start: int = 0) -> Tensor:
        """Word + position + segment (4.1); a segment's embedding is that of the word <emotion> or <explanation>."""
        stop = start + ids.shape[1]
        if stop > self.wpe.num_embeddings:
            raise ValueError(f"{stop} tokens are beyond the position table's {self.wpe.num_embeddings} rows")
        x = self.wte(ids) + self.wpe.weight[start:stop] + self.wte(segments)
        return self.dropout(x)  # (N, L, d)

    def keys_values(self, features: Tensor) -> list[Tensor]:
        features = features.to(self.wte.weight.dtype)  # once for all layers, where weights are bf16
        return [block.cross_attn.keys_values(features) for block in self.blocks]

    def forward(self, x: Tensor, keys_values: list[Tensor], caches: "list[Cache] | None" = None,
                maps: list[Tensor] | None = None) -> Tensor:
        """Eq. 3, f'. `maps` collects each layer's attention over the patches."""
        for block, kv, cache in zip(self.blocks, keys_values, caches or [None] * len(self.blocks), strict=True):
            x = block(x, kv, cache, maps)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.wte.weight)  # (..., V)


# 5. SEVLM

@dataclass
class Output:
    """What a forward pass computes; losses are there for the parts and labels that are."""
    emotion_features: Tensor | None  # (N, L, 3) f^E
    embedded: Tensor  # (N, L, d) what the decoder reads, VAD fused in
    hidden: Tensor  # (N, L, d) f'
    match: Tensor | None  # (N,) the contrastive head's score of each sentence for its picture
    losses: dict[str, Tensor]  # "language", "vad", "contrastive", and "total"


class SEVLM(nn.Module):
    """The model. Its weights come from a file, or from `initialise`: the constructor leaves them unset."""

    def __init__(self, config: Config, tokenizer: Tokenizer, lexicon: Lexicon | None = None):
        super().__init__()
        self.config, self.text, self.about = config, Text(tokenizer, config.emotions), {}
        longest = max(len(self.text.opening(emotion)) for emotion in config.emotions)
        if config.length < longest + 2:
            raise UserError(f"--length {config.length} leaves no room: an emotion's opening takes {longest} tokens")
        if config.uses_vad and lexicon is None:
            raise UserError("this model needs a VAD lexicon; name one with --lexicon")
        self.lexicon = lexicon if config.uses_vad else None
        self.word_vad = WordVAD(tokenizer, lexicon, config.vad_per_token) if config.uses_vad else None
        width = config.width
        self.tower = VisionTower(config).requires_grad_(config.train_tower)
        self.decoder = Decoder(config, self.text.size)
        if config.vad_input and config.emotion_encoder:
            self.emotion_encoder = EmotionEncoder(causal=not config.two_way_emotions, dropout=config.dropout)
        if config.vad_input:
            self.fusion = Linear(width + 3, width)  # W_E, b_E
        if config.vad_head:
            self.vad_head = Linear(width, 3)
        if config.contrastive_head:
            sizes = [config.tower_width + 2 * width, *[width] * 4]
            layers = [layer for pair in itertools.pairwise(sizes) for layer in (Linear(*pair), nn.ReLU())]
            self.contrastive_head = nn.Sequential(*layers, Linear(width, 1))

    @property
    def device(self) -> torch.device:
        return self.decoder.wte.weight.device

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 or normalised pixels (B, 3, S, S) -> patch features f^I (B, K, d)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_tower):
            return self.tower(normalise(pixels, self.config))

    def vad(self, ids: Tensor) -> Tensor | None:
        """Each token's VAD, from the word spelled so far: (N, L) -> (N, L, 3)."""
        return self.lexicon.values[self.word_vad.rows(ids.cpu())].to(self.device) if self.config.uses_vad else None

    def in_explanation(self, ids: Tensor, segments: Tensor) -> Tensor:
        """The mask of X (N, L)."""
        if self.config.fixed_boundary:
            mask = (torch.arange(ids.shape[1], device=ids.device) >= FIXED_BOUNDARY).expand_as(ids)
        else:
            mask = segments == self.text.explanation
        return mask if self.config.padding_in_means else mask & (ids != self.text.pad)

    def in_emotion(self, ids: Tensor, explanation: Tensor) -> Tensor:
        """The mask of M (N, L)."""
        return ~explanation if self.config.padding_in_means else ~explanation & (ids != self.text.pad)

    def embed(self, ids: Tensor, segments: Tensor, vad: Tensor | None, start: int = 0) -> tuple[Tensor, Tensor | None]:
        """Embed a sentence's tokens from `start` on, and fuse VAD into those of X (4.2.1)."""
        x = self.decoder.embed(ids[:, start:], segments[:, start:], start)  # (N, L - start, d)
        if not self.config.vad_input:
            return x, None
        explanation = self.in_explanation(ids, segments)
        if not self.config.vad_on_emotion:
            vad = vad * explanation[..., None]
        with torch.autocast(ids.device.type, enabled=False):  # three numbers a token deserve all their digits
            emotion_features = self.emotion_encoder(vad) if self.config.emotion_encoder else vad  # Eq. 2, f^E
        both = torch.cat([x, emotion_features[:, start:].to(x.dtype)], -1)  # Eq. 2, [f_X ; f_E]
        fused = self.fusion(both)  # Eq. 2, W_E [f_X ; f_E] + b_E
        return torch.where(explanation[:, start:, None], fused, x), emotion_features

    def forward(self, pictures: Tensor, ids: Tensor, segments: Tensor, vad: Tensor | None = None,
                labels: Tensor | None = None, wrong_emotion: Tensor | None = None,
                wrong_image: Tensor | None = None, maps: list[Tensor] | None = None) -> Output:
        """Figure 4 from left to right.

        Reading: patches f^I of the picture (or stored features (B, K, d)), words with VAD fused in, six blocks: f'.
        Heads: the language head says each next word, the VAD head (Eq. 4) how it will feel, and the contrastive head
        (Eq. 6) whether picture, emotion and explanation belong together. Losses: Eq. 5, 7 and 8, where there are
        labels. `wrong_emotion` and `wrong_image` (N,) say which sentence's X is the negative; -1: there is none.
        """
        features = pictures.float() if pictures.dim() == 3 else self.encode_image(pictures)
        if len(features) == 0 or len(ids) % len(features):
            raise ValueError(f"{len(ids)} sentences do not divide among {len(features)} pictures")
        if ids.device.type == "cpu" and not (0 <= ids.min() and ids.max() < self.text.size):  # a GPU would wait
            raise ValueError(f"token ids must lie in 0..{self.text.size - 1}")
        embedded, emotion_features = self.embed(ids, segments, vad)
        hidden = self.decoder(embedded, self.decoder.keys_values(features), maps=maps)  # Eq. 3
        explanation = self.in_explanation(ids, segments)
        negatives = [index for index, wanted in ((wrong_emotion, self.config.wrong_emotion),
                                                 (wrong_image, self.config.wrong_image))
                     if wanted and index is not None]
        losses, scores = {}, None
        with torch.autocast(ids.device.type, enabled=False):  # heads and losses stay in float32
            if self.config.contrastive_head:
                scores = self.match_scores(features.float(), hidden.float(), ids, explanation, negatives)
                if negatives:
                    losses["contrastive"] = -scores.log_softmax(0)[0].mean()  # Eq. 7, with the log
            if labels is not None and self.config.vad_head:
                predicted = self.vad_head(hidden[:, :-1].float())  # Eq. 4: position t predicts token t + 1
                known = (vad[:, 1:] != 0).any(-1) & explanation[:, 1:]
                losses["vad"] = vad_loss(predicted, vad[:, 1:], known)  # Eq. 5, against the words' own VAD
        if labels is not None:
            losses["language"] = self.language_loss(hidden, labels)
            losses["total"] = sum(loss * self.weight(name) for name, loss in losses.items())  # Eq. 8
        return Output(emotion_features, embedded, hidden, None if scores is None else scores[0], losses)

    def language_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        wanted = labels[:, 1:] != IGNORE
        logits = self.decoder.logits(hidden[:, :-1][wanted])  # (labels, V): no logits where nothing is asked
        return F.cross_entropy(logits.float(), labels[:, 1:][wanted])

    def weight(self, loss: str) -> float:
        return self.config.alpha if loss == "contrastive" else 1.0

    def match_scores(self, features: Tensor, hidden: Tensor, ids: Tensor, explanation: Tensor,
                     negatives: list[Tensor]) -> Tensor:
        """Eq. 6: scores of [mean f_I ; mean f'_M ; mean f'_X], the own X first, then each negative's: (1 + n, N)."""
        image = features.mean(1).repeat_interleave(len(ids) // len(features), 0)  # (N, d)
        m = masked_mean(hidden, self.in_emotion(ids, explanation))  # (N, d)
        x = masked_mean(hidden, explanation)  # (N, d)
        others = torch.stack([x, *(x[index.clamp(min=0)] for index in negatives)])  # (1 + n, N, d)
        both = torch.cat([image, m], 1).expand(len(others), -1, -1)
        scores = self.contrastive_head(torch.cat([both, others], 2)).squeeze(2)
        missing = torch.stack([torch.zeros_like(ids[:, 0], dtype=torch.bool), *(index < 0 for index in negatives)])
        return scores.masked_fill(missing, -torch.inf)

    def sentence(self, emotions: Sequence[str], explanations: Sequence[str]) -> dict[str, Tensor]:
        """Sentences as the keyword arguments of a forward pass."""
        return self.inputs(self.text.encode(emotions, explanations, self.config.length).to(self.device))

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Token ids (N, L) with all that follows from them."""
        return {"ids": ids, "segments": self.text.segments(ids), "vad": self.vad(ids)}

    def decoding(self, features: Tensor, prompt: Tensor, length: int) -> "Decoding":
        """What `generate` and `beam_search` go on with; another model may have one of its own."""
        return Decoding(self, features, prompt, length)

    @torch.no_grad()
    def score(self, pictures: Tensor, emotions: Sequence[str], explanations: Sequence[str]) -> Tensor:
        """How well each (image, emotion, explanation) matches, by the contrastive head: (N,)."""
        if not self.config.contrastive_head:
            raise UserError("this model has no contrastive head to score with")
        return self(pictures, **self.sentence(emotions, explanations)).match


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(N, L, d) and (N, L) -> (N, d); zero where the mask is empty."""
    weights = mask[..., None].to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


# 6. Generation

class Cache:
    """One layer's keys and values of all tokens read so far, in buffers that are written by position."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0

    def extend(self, new: Tensor) -> Tensor:
        """Those of L more tokens (2, N, H, L, d/H); returns all."""
        _, N, H, L, width = new.shape
        if self.length == 0:
            self.held = new.new_empty(2, N, H, self.capacity, width)
        start, self.length = self.length, self.length + L
        self.held[:, :, :, start:self.length] = new
        return self.held[:, :, :, :self.length]

    def select(self, sentences: Tensor) -> None:
        self.held = self.held[:, sentences]


class Decoding:
    """Sentences on their way; all that belongs to one is indexed by it: tokens, word so far, keys and values.

    With an emotion encoder that attends both ways every new word changes the features of all earlier
    positions, so nothing of the text can be cached: each step reads the whole sentence again.
    """

    def __init__(self, model: SEVLM, features: Tensor, prompt: Tensor, length: int):
        """One sentence for each picture, all with prompts of one size (B, t), at most `length` tokens in the end."""
        config = model.config
        self.model = model
        self.keys_values = [kv.contiguous() for kv in model.decoder.keys_values(features)]  # every word reads them
        both_ways = config.vad_input and config.emotion_encoder and config.two_way_emotions
        self.caches = None if both_ways else [Cache(length) for _ in range(config.layers)]
        self.ids, self.vad = prompt[:, :0], torch.empty(len(prompt), 0, 3, device=prompt.device)
        self.words = model.word_vad.begin(len(prompt)) if config.vad_input else []
        for tokens in prompt.unbind(1):
            self.append(tokens)

    def append(self, tokens: Tensor) -> None:
        """One more token (n,) for each sentence."""
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        if self.model.config.vad_input:
            self.words = self.model.word_vad.extend(self.words, tokens.tolist())
            vad = self.model.word_vad.vad(self.words).to(tokens.device)
            self.vad = torch.cat([self.vad, vad[:, None]], 1)

    def logits(self) -> Tensor:
        """For the next token of each sentence: (n, V), float32."""
        start = self.caches[0].length if self.caches else 0
        embedded, _ = self.model.embed(self.ids, self.model.text.segments(self.ids), self.vad, start)
        hidden = self.model.decoder(embedded, self.keys_values, self.caches)
        return self.model.decoder.logits(hidden[:, -1]).float()

    def select(self, sentences: Tensor) -> None:
        """Go on with these sentences, repeated or reordered."""
        self.ids, self.vad = self.ids[sentences], self.vad[sentences]
        self.words = [self.words[place] for place in sentences.tolist()] if self.words else []
        self.keys_values = [kv[sentences] for kv in self.keys_values]
        for cache in self.caches or ():
            cache.select(sentences)


@dataclass
class Sentences:
    """Finished sentences, those of one picture side by side."""
    ids: Tensor  # (N, L), padded
    log_probs: Tensor  # (N,) of the tokens that the model chose, the end included


def nucleus(logits: Tensor, top_p: float, temperature: float, draws: Tensor) -> Tensor:
    """Draw (n,) tokens from the fewest most likely ones that hold `top_p` of the mass; 0: the likeliest.

    `draws` (n,) in [0, 1) decide, so that a picture's sentence does not depend on its neighbours.
    """
    if top_p == 0:
        return logits.max(1).indices  # argmax takes a CPU 0.8 ms for 16 rows of GPT-2's words, max 0.35
    probs, order = ranked((logits / temperature).softmax(1), top_p)
    before = probs.cumsum(1) - probs
    mass = (probs * (before < top_p)).cumsum(1)
    place = torch.searchsorted(mass, draws[:, None] * mass[:, -1:], right=True)
    return order.gather(1, place.clamp(max=order.shape[1] - 1)).squeeze(1)


def ranked(probs: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens in order, enough to hold `mass`: mostly a thousand are, and all take far longer to sort."""
    few = probs.topk(min(1000, probs.shape[1]), 1)
    return few if (few.values.sum(1) >= mass).all() else probs.sort(1, descending=True)


def padded(model: SEVLM, openings: Sequence[Sequence[int]] | None, pictures: int, length: int) -> tuple[Tensor, int]:
    """Openings as a (B, L) array padded with -1 and the length of the shortest; the prompt by default."""
    openings = openings or [model.text.prompt] * pictures
    if len(openings) != pictures:
        raise ValueError(f"{len(openings)} openings for {pictures} pictures")
    if not 0 < max(map(len, openings)) < length <= model.config.positions:
        raise ValueError(f"openings of {max(map(len, openings))} tokens, sentences of {length} and a position table "
                         f"of {model.config.positions} rows do not go together")
    rows = [[*opening, *[-1] * (length - len(opening))] for opening in openings]
    return torch.tensor(rows, device=model.device), min(map(len, openings))


@torch.no_grad()
def generate(model: SEVLM, features: Tensor, openings: Sequence[Sequence[int]] | None = None, samples: int = 1,
             top_p: float = 0.0, temperature: float = 1.0, seeds: Sequence[int] | int = 0,
             length: int | None = None) -> Sentences:
    """Finish sentences for pictures (B, K, d), greedily or by nucleus sampling (5.1: p = 0.9), `samples` for each.

    Openings may differ in length: a longer one dictates its tokens while the others already choose theirs.
    A finished sentence leaves the batch.
    """
    length, text, B = length or model.config.length, model.text, len(features)
    dictated, start = padded(model, openings, B, length)
    decoding = model.decoding(features, dictated[:, :start], length)
    picture = torch.arange(B, device=model.device).repeat_interleave(samples)  # of each sentence
    dictated, ids = dictated[picture], torch.full((B * samples, length), text.pad, device=model.device)
    ids[:, :start] = dictated[:, :start]
    log_probs = torch.zeros(B * samples, device=model.device)
    special = torch.tensor(text.special, device=model.device)
    draws = random_numbers(seeds, B, samples, length).to(model.device)
    live = torch.arange(B * samples, device=model.device)  # the sentences that `decoding` still holds
    for position in range(start, length):
        logits = decoding.logits()
        if position == start and samples > 1:
            decoding.select(picture)  # until here a picture's samples were one
            logits = logits[picture]
        told = dictated[live, position]
        tokens = torch.where(told >= 0, told, nucleus(logits, top_p, temperature, draws[live, position]))
        log_probs[live] -= F.cross_entropy(logits, tokens, reduction="none").masked_fill(told >= 0, 0)
        ids[live, position] = tokens
        decoding.append(tokens)
        unfinished = (told >= 0) | ~torch.isin(tokens, special)
        if not unfinished.all():
            live = live[unfinished]
            if len(live) == 0:
                break
            decoding.select(unfinished.nonzero().squeeze(1))
    return Sentences(ids, log_probs)


def random_numbers(seeds: Sequence[int] | int, pictures: int, samples: int, length: int) -> Tensor:
    """(B * samples, L) in [0, 1); each picture has its own generator, on the CPU, alike on every device."""
    seeds = [seeds] * pictures if isinstance(seeds, int) else seeds
    numbers = [torch.rand(samples, length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(numbers)


@torch.no_grad()
def beam_search(model: SEVLM, features: Tensor, openings: Sequence[Sequence[int]] | None = None, beams: int = 5,
                length: int | None = None) -> Sentences:
    """The `beams` most probable sentences found for each picture, best mean log-probability of a token first."""
    openings = openings or [model.text.prompt] * len(features)
    found = [beams_of(model, picture, opening, beams, length or model.config.length)
             for picture, opening in zip(features.split(1), openings, strict=True)]
    return Sentences(torch.cat([one.ids for one in found]), torch.cat([one.log_probs for one in found]))


def beams_of(model: SEVLM, features: Tensor, opening: Sequence[int], beams: int, length: int) -> Sentences:
    """One picture (1, K, d). Each step keeps the best of all continuations and of the sentences already finished."""
    text, device = model.text, model.device
    special = torch.tensor(text.special, device=device)
    decoding = model.decoding(features, torch.tensor([opening], device=device), length)
    scores = torch.zeros(1, device=device)  # of the sentences that `decoding` holds
    done, done_scores = torch.empty(0, length, dtype=torch.long, device=device), torch.empty(0, device=device)
    for _ in range(len(opening), length):
        gains = decoding.logits().log_softmax(1)  # (n, V)
        pool = torch.cat([done_scores, (scores[:, None] + gains).flatten()])
        best, place = pool.topk(min(beams, len(pool)))
        kept, grown = place[place < len(done)], place >= len(done)
        parents, tokens = (place[grown] - len(done)) // text.size, (place[grown] - len(done)) % text.size
        scores = best[grown]
        done, done_scores = done[kept], done_scores[kept]
        decoding.select(parents)
        decoding.append(tokens)
        ended = torch.isin(tokens, special)
        if ended.any():
            rows = F.pad(decoding.ids[ended], (0, length - decoding.ids.shape[1]), value=text.pad)
            done, done_scores = torch.cat([done, rows]), torch.cat([done_scores, scores[ended]])
            scores = scores[~ended]
            decoding.select((~ended).nonzero().squeeze(1))
        if len(scores) == 0:
            break
    ids = torch.cat([done, F.pad(decoding.ids, (0, length - decoding.ids.shape[1]), value=text.pad)])
    scores = torch.cat([done_scores, scores])
    chosen = (ids != text.pad).sum(1) - len(opening)
    order = (scores / chosen.clamp(min=1)).argsort(descending=True)
    return Sentences(ids[order], scores[order])


@torch.no_grad()
def emotion_log_probs(model: SEVLM, features: Tensor) -> Tensor:
    """The distribution over the emotions after "the emotion is", exact for names of several tokens: (B, emotions).

    Names share beginnings, and each is read once, those of a length together: of the nine, "" and "something".
    """
    text, B = model.text, len(features)
    names = [[*name, text.because] if any(other[:len(name)] == name and other != name for other in text.names) else name
             for name in text.names]  # where "joy" and "joy of life" begin alike, "because" ends the shorter one
    total = torch.zeros(B, len(names), device=model.device)
    for n in range(max(map(len, names))):
        beginnings = sorted({tuple(name[:n]) for name in names if len(name) > n})
        ids = torch.tensor([[*text.prompt, *beginning] for beginning in beginnings], device=model.device)
        hidden = model(features, **model.inputs(ids.repeat(B, 1))).hidden[:, -1]
        log_probs = model.decoder.logits(hidden).float().log_softmax(-1).view(B, len(beginnings), -1)
        here = [place for place, name in enumerate(names) if len(name) > n]
        total[:, here] += log_probs[:, [beginnings.index(tuple(names[place][:n])) for place in here],
                                    [names[place][n] for place in here]]
    return total.log_softmax(1)


@torch.no_grad()
def match_scores(model: SEVLM, features: Tensor, ids: Tensor) -> Tensor:
    """The contrastive head's score of finished sentences (N, L) for their pictures: (N,)."""
    return model(features, **model.inputs(ids)).match


@torch.no_grad()
def attention_maps(model: SEVLM, features: Tensor, ids: Tensor) -> Tensor:
    """Where the model attended as it chose each token: (N, L, K), mean over heads and layers.

    Token t was chosen at position t - 1; the first token was given, so its row is zero.
    """
    maps: list[Tensor] = []
    model(features, **model.inputs(ids), maps=maps)
    mean = torch.stack(maps).mean(0)
    return torch.cat([torch.zeros_like(mean[:, :1]), mean[:, :-1]], 1)


# 7. Checkpoints. Every tensor of a file must be accounted for.

NOT_PUBLIC = r"decoder\.blocks\.\d+\.(ln_cross|cross_attn)\..*|(fusion|vad_head|contrastive_head|emotion_encoder)\..*"


def initialise(model: SEVLM, given: Sequence[str] = ()) -> SEVLM:
    """GPT-2's initial weights for all that is not `given` by a file: N(0, 0.02) at width 768, zero biases.

    LayerNorms and, as in the authors' code, the emotion encoder keep torch's own.
    """
    config = model.config
    std = 0.02 * math.sqrt(768 / config.width)  # narrower layers add up fewer terms
    for name, parameter in model.named_parameters():
        if name in given or "ln_" in name or name.startswith("emotion_encoder."):
            continue
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            into_residual = re.fullmatch(r"decoder\.blocks.*c_proj\.weight", name)
            nn.init.normal_(parameter, std=std / math.sqrt(2 * config.layers) if into_residual else std)
    return model


def from_public(clip: str | Path = CLIP_HUB, gpt2: str | Path = GPT2_HUB, lexicon: Lexicon | None = None,
                **changes) -> SEVLM:
    """The paper's starting point: CLIP's tower and GPT-2 from files, folders or the hub, the rest random."""
    clip_file, gpt2_file = find_file(clip, CLIP_FILES, "--clip"), find_file(gpt2, GPT2_FILES, "--gpt2")
    tower = clip_tensors(read_tensors(clip_file))
    decoder = gpt2_tensors(read_tensors(gpt2_file), gpt2_file)
    config = Config(**tower_sizes(tower, clip_file) | decoder_sizes(decoder, gpt2_file) | changes)
    if not Path(gpt2).exists():
        find_file(gpt2, ["tokenizer.json"], "--gpt2")  # the hub's cache puts it beside the weights
    model = SEVLM(config, read_tokenizer(gpt2_file.parent), lexicon)
    initialise(model, given=(tower.keys() | decoder.keys()) - {"decoder.wte.weight"})
    known, words = decoder["decoder.wte.weight"], model.decoder.wte.weight.detach().clone()
    if not 0 <= len(words) - len(known) <= len(Text.ADDED):
        raise UserError(f"{gpt2_file} has {len(known)} words and its tokenizer {len(words) - len(Text.ADDED)}")
    words[:len(known)] = known  # the rows of the added tokens stay N(0, 0.02)
    load_checked(model, tower | decoder | {"decoder.wte.weight": words}, f"{clip_file} and {gpt2_file}", NOT_PUBLIC)
    return model.eval()


def save(model: SEVLM, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Our checkpoint: config.json, tokenizer.json, lexicon.txt and, last, model.safetensors."""
    from safetensors.torch import save_file
    folder = Path(folder)
    write_json(folder / "config.json", {"sevlm": asdict(model.config), "about": model.about})
    write_text(folder / "tokenizer.json", model.text.tokenizer.to_str())
    if model.lexicon:
        write_text(folder / "lexicon.txt", model.lexicon.text)
    with replacing(folder / "model.safetensors") as path:
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}, path)


def load(folder: str | Path) -> SEVLM:
    """A model from a folder that `save` wrote."""
    folder = Path(folder)
    stored = read_config(folder)
    config = restored(Config, stored["sevlm"], folder / "config.json")
    lexicon = read_lexicon(folder / "lexicon.txt") if config.uses_vad else None
    tensors = read_tensors(find_file(folder, ["model.safetensors"], "--checkpoint"))
    model = SEVLM(config, read_tokenizer(folder), lexicon)
    load_checked(model, {name: tensor.float() for name, tensor in tensors.items()}, folder / "model.safetensors")
    model.about = stored.get("about", {})
    return model.eval()


def read_config(folder: Path) -> dict:
    """What config.json of a checkpoint says, as far as it is one."""
    path = folder / "config.json"
    if not path.is_file():
        theirs = any(folder.glob("**/nle_model_*")) or folder.name.startswith("nle_model_")
        raise UserError(f"{folder} is no SEVLM checkpoint: it has no config.json" + (
            f"; the authors' release is converted once: python -m related.authors {folder} --lexicon FILE --out FOLDER"
            if theirs else ""))
    stored = read_json(path)
    if not isinstance(stored, dict) or "sevlm" not in stored or not isinstance(stored.get("about", {}), dict):
        ask = stored.get("ask") if isinstance(stored, dict) else None  # another system of this project says how
        raise UserError(f"{path} was not written by SEVLM" + (f"; to ask this model: {ask}" if ask else ""))
    return stored


def load_model(source: str | Path, flag: str = "--checkpoint") -> SEVLM:
    """A folder of ours, or a hub repository that holds one; `flag` is where the user named it."""
    if not is_hub_id(source):
        if not Path(source).is_dir():
            raise UserError(f"{flag} {source}: there is no such folder")
        return load(source)
    folder = fetch(str(source), ["config.json"], flag).parent
    uses_vad = restored(Config, read_config(folder)["sevlm"], folder / "config.json").uses_vad
    for name in ("tokenizer.json", "model.safetensors", *["lexicon.txt"] * uses_vad):
        fetch(str(source), [name], flag)
    return load(folder)


# The way through Figure 4, with numbers

@torch.no_grad()
def walk(model: SEVLM, pixels: Tensor, emotion: str, explanation: str) -> list[str]:
    """An example: the sentence that is given and, as its wrong emotion, one of the model's own."""
    text = model.text
    features = model.encode_image(pixels[None])
    likeliest = emotion_log_probs(model, features)[0].argsort(descending=True).tolist()
    other = next(model.config.emotions[place] for place in likeliest if model.config.emotions[place] != emotion)
    its_own = text.reason(generate(model, features, [text.opening(other)]).ids[0].tolist())
    data = model.sentence([emotion, other], [explanation, its_own])
    labels, sibling = text.labels(data["ids"]), torch.tensor([1, 0])
    blocks: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *passed: blocks.append(passed[2])) for block in model.decoder.blocks]
    output = model(features, **data, labels=labels, wrong_emotion=sibling)
    for hook in hooks:
        hook.remove()
    ids, hidden = data["ids"][0], output.hidden[0]
    end = int((ids != text.pad).sum()) - 1
    place = end - 1  # X's last word
    steps = [("patch features f^I", "4.1", features, features[0, 0]),
             ("word + position + segment", "4.1", output.embedded,
              model.decoder.embed(data["ids"], data["segments"])[0, place])]
    if model.config.uses_vad:
        steps.append(("VAD of the word so far", "4.2.1", data["vad"], data["vad"][0, place]))
    if output.emotion_features is not None:
        steps += [("emotion features f^E", "Eq. 2", output.emotion_features, output.emotion_features[0, place]),
                  ("W_E [f_X ; f_E] + b_E", "Eq. 2", output.embedded, output.embedded[0, place])]
    steps += [(f"block {number}", "Eq. 1", x, x[0, place]) for number, x in enumerate(blocks, 1)]
    steps.append(("last LayerNorm: f'", "Eq. 3", output.hidden, hidden[place]))
    if model.config.vad_head:
        steps.append(("VAD head: the next word's", "Eq. 4", data["vad"], model.vad_head(hidden[place])))
    if output.match is not None:
        steps.append(("contrastive head", "Eq. 6", output.match, output.match))
    equations = {"language": "4.1", "vad": "Eq. 5", "contrastive": "Eq. 7", "total": "Eq. 8"}
    lines = [f'example: "{emotion} because {explanation}"', f'     and "{other} because {its_own}"', "",
             f"{'step':28}{'paper':8}{'shape':16}first numbers, at {text.tokenizer.decode([int(ids[place])])!r}"]
    lines += [f"{step:28}{paper:8}{tuple(all_of_it.shape)!s:16}" + " ".join(f"{x:+.3f}" for x in some[:3].tolist())
              for step, paper, all_of_it, some in steps]
    lines += ["", *(f"{name + ' loss':28}{equations[name]:8}{loss:.3f}, times {model.weight(name):g}"
                    for name, loss in output.losses.items())]
    silent = None
    if model.config.vad_input:
        silent = model(features, data["ids"], data["segments"], torch.zeros_like(data["vad"]))
    start = text.opening(emotion).index(text.because)
    for position in sorted({start, (start + place) // 2, place}):
        lines += ["", f'after "{text.decode(ids[:position + 1].tolist())}"']
        lines.append("    likeliest next        " + next_words(model, hidden[position]))
        if silent:
            lines.append("    with all VAD at zero  " + next_words(model, silent.hidden[0, position]))
    return lines


def next_words(model: SEVLM, hidden: Tensor) -> str:
    best = model.decoder.logits(hidden).softmax(0).topk(5)
    words = [model.text.tokenizer.decode([index], skip_special_tokens=False) for index in best.indices.tolist()]
    return "  ".join(f"{word.strip()} {share:.0%}" for word, share in zip(words, best.values.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Walk through Figure 4 with a picture and a sentence.")
    parser.add_argument("picture")
    parser.add_argument("sentence", help='such as "awe because the light is holy"')
    parser.add_argument("--checkpoint", default=BUNDLED, metavar="RUN",
                        help="a run or model folder (default: examples/toy)")
    options = parser.parse_args()
    emotion, because, explanation = options.sentence.partition(" because ")
    if not because:
        raise UserError('the sentence is an emotion, "because" and an explanation')
    model = load_model(options.checkpoint)
    try:
        pixels = load_pixels(options.picture, model.config)
    except BadPicture as problem:
        raise UserError(f"{options.picture} cannot be read: {problem}") from None
    print("\n".join(walk(model, pixels, emotion, explanation)))


if __name__ == "__main__":
    run_program(main)
