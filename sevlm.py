"""SEVLM: a small vision language model that names the emotion a painting evokes and explains it in a sentence.

    picture -> "the emotion is awe because the light breaking through the clouds feels like something holy"

The numbers are those of the figure in the README; sections and equations are those of arXiv 2403.11150.

    1. Config            sizes, the paper's parts as switches (5.3), and where we differ from the authors
    2. Text              the sentence: M "the emotion is awe", X "because ...", tokens and segments (4.1)
    3. VisionTower       CLIP's ViT, frozen: picture -> patch features f^I                 (B, 3, S, S) -> (B, K, d)
    4. Decoder           GPT-2 with cross-attention to the patches (Eq. 1, 3)               (N, L, d) -> (N, L, d)
    5. SEVLM             fusion of VAD and text (Eq. 2), VAD head (Eq. 4), contrastive head (Eq. 6), losses (5, 7, 8)
    6. Decoding          words one by one, with caches: greedy, nucleus, beam; emotion probabilities; attention
    7. Weights           public CLIP and GPT-2 weights, the authors' checkpoint, our own folders

Shapes: B pictures, N = B * E sentences (E for each picture, those of one picture side by side), K patches,
L tokens, d width, H heads, V vocabulary. vad.py comes before this file: words to VAD, and the emotion encoder.
"""
import itertools
import json
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

from vad import EmotionEncoder, Lexicon, UserError, WordVAD, read_lexicon, replacing, vad_loss, write_text

EMOTIONS = ("amusement", "awe", "contentment", "excitement", "anger", "disgust", "fear", "sadness", "something else")
IGNORE = -100  # a label that asks for no prediction


# 1. Config

def option(default, help: str):
    """A dataclass field with its help text; train.py turns each into a flag."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """The paper's model by default; `toy()` is a small one for a laptop's CPU."""
    image_size: int = option(224, "pixels on a side of the picture")
    patch_size: int = option(16, "pixels on a side of a patch")
    tower_width: int = option(768, "width of the vision tower")
    tower_layers: int = option(12, "blocks of the vision tower")
    tower_heads: int = option(12, "attention heads of the vision tower")
    train_tower: bool = option(False, "train the vision tower too (the paper freezes CLIP's)")
    width: int = option(768, "width of the decoder")
    layers: int = option(6, "blocks of the decoder")
    heads: int = option(12, "attention heads of the decoder")
    positions: int = option(1024, "rows of the decoder's position table")
    length: int = option(30, "tokens of a sentence (5.1); longer ones are cut")
    dropout: float = option(0.1, "dropout of embeddings, attention and residuals")
    crop: bool = option(False, "cut the picture's central square instead of squashing the whole picture")
    # the paper's parts; without the first three this is the baseline of Table 1
    vad_input: bool = option(True, "fuse VAD features into the text embedding (4.2.1)")
    vad_head: bool = option(True, "predict the VAD of the next word (4.2.2)")
    contrastive_head: bool = option(True, "score whether image, emotion and explanation match (4.2.3)")
    emotion_encoder: bool = option(True, "encode VAD before fusion (Eq. 2); off: raw VAD (Figure 6)")
    wrong_emotion: bool = option(True, "contrast with an explanation of another emotion (Figure 7)")
    wrong_image: bool = option(True, "contrast with an explanation of another image (Figure 7)")
    alpha: float = option(2.0, "weight of the contrastive loss (Eq. 8)")
    # the authors' choices where ours differ; the README says why
    two_way_emotions: bool = option(False, "emotion encoder attends both ways, so it sees words still to predict")
    fixed_boundary: bool = option(False, "X always begins at position 6, however long the emotion's name is")
    vad_on_emotion: bool = option(False, "M's words carry VAD too")
    padding_in_means: bool = option(False, "the contrastive head's means count padding")
    vad_per_token: bool = option(False, "look up each token alone, not the word so far")
    imagenet_pixels: bool = option(False, "normalise pixels with ImageNet's mean and deviation, not CLIP's")

    def __post_init__(self):
        for whole, part in (("image_size", "patch_size"), ("tower_width", "tower_heads"), ("width", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(f"{whole} {getattr(self, whole)} is no multiple of {part} {getattr(self, part)}")
        if self.length > self.positions:
            raise UserError(f"length {self.length} is beyond the position table's {self.positions} rows")
        if self.contrastive_head and not (self.wrong_emotion or self.wrong_image):
            raise UserError("the contrastive head needs a negative: turn on wrong_emotion or wrong_image, "
                            "or turn off contrastive_head")

    @classmethod
    def toy(cls, **changes) -> "Config":
        small = dict(image_size=64, patch_size=8, tower_width=128, tower_layers=4, tower_heads=4, train_tower=True,
                     width=128, layers=3, heads=4, positions=64, dropout=0.0, alpha=0.1)
        return cls(**small | changes)

    @classmethod
    def baseline(cls, **changes) -> "Config":
        return cls(**BASELINE | changes)

    @classmethod
    def authors(cls, **changes) -> "Config":
        """Every choice as in the authors' code."""
        return cls(**dict.fromkeys(DIFFERENCES, True) | changes)

    @property
    def uses_vad(self) -> bool:
        return self.vad_input or self.vad_head


BASELINE = dict(vad_input=False, vad_head=False, contrastive_head=False)  # Table 1
DIFFERENCES = ("two_way_emotions", "fixed_boundary", "vad_on_emotion", "padding_in_means", "vad_per_token",
               "imagenet_pixels")
FIXED_BOUNDARY = 6  # tokens of M in the authors' code: <|endoftext|> the emotion is awe because


# 2. Text: <|endoftext|> the emotion is {emotion} because {explanation} <|endoftext|>
#          |--------------- M ----------------| |------------- X ----------------|

class Text:
    """Sentences as token ids. Four tokens are added to GPT-2's 50,257, in the authors' order."""
    ADDED = ("<pad>", "<prefix>", "<emotion>", "<explanation>")  # <prefix> is unused, but their weights have it

    def __init__(self, tokenizer: Tokenizer):
        tokenizer.add_special_tokens(["<|endoftext|>", *self.ADDED])
        self.tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()  # V
        self.end, self.pad, _, self.emotion, self.explanation = map(
            tokenizer.token_to_id, ("<|endoftext|>", *self.ADDED))
        self.special = [self.end, *map(tokenizer.token_to_id, self.ADDED)]
        because = self.tokens(" because")
        if len(because) != 1:
            raise UserError(f"the tokenizer cuts ' because' into {len(because)} tokens; X must begin with one")
        self.because = because[0]
        self.prompt = [self.end, *self.tokens(" the emotion is")]
        self.names = [self.tokens(" " + emotion) for emotion in EMOTIONS]

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def emotion_index(self, emotion: str) -> int:
        if emotion not in EMOTIONS:
            raise UserError(f"unknown emotion {emotion!r}; the emotions are {', '.join(EMOTIONS)}")
        return EMOTIONS.index(emotion)

    def opening(self, emotion: str) -> list[int]:
        """M and " because": what comes before an explanation."""
        return [*self.prompt, *self.names[self.emotion_index(emotion)], self.because]

    def encode(self, emotions: Sequence[str], explanations: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Padded ids (N, L) and the position (N,) at which each X begins. A longer sentence loses its end."""
        encoded = self.tokenizer.encode_batch_fast([" because " + text for text in explanations],
                                                   add_special_tokens=False)
        opening = {emotion: self.opening(emotion)[:-1] for emotion in set(emotions)}
        sentences = [opening[emotion] + x.ids + [self.end] for emotion, x in zip(emotions, encoded, strict=True)]
        ids = torch.tensor([(s + [self.pad] * length)[:length] for s in sentences]).view(-1, length)
        return ids, torch.tensor([len(opening[emotion]) for emotion in emotions])

    def segments(self, starts: Tensor, length: int) -> Tensor:
        """<emotion> before X begins, <explanation> from there on, padding included: (N,) -> (N, L)."""
        positions = torch.arange(length, device=starts.device)
        return torch.where(positions < starts[:, None], self.emotion, self.explanation)

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


# 3. Vision tower

PACKS = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. On a CPU, big weights that do not change are packed as oneDNN likes them, for twice the speed."""
    packs = PACKS and x.device.type == "cpu" and not torch.is_grad_enabled() and weight.numel() >= 2**18
    if packs and x.dtype == weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, packed(weight), bias, "none", [], "")
    return F.linear(x, weight, bias)


def packed(weight: Tensor) -> Tensor:
    """A weight in oneDNN's own layout: kept beside it, and made again when it has changed."""
    state = weight.data_ptr(), weight._version
    if getattr(weight, "packed", (None,))[0] != state:
        weight.packed = state, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)
    return weight.packed[1]


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself; causal for text."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float = 0.0):
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, cache: "Cache | None" = None) -> Tensor:
        N, L, d = x.shape
        query, key, value = self.qkv(x).view(N, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (N, H, L, d/H) each
        if cache is not None:
            key, value = cache.extend(key, value)
        rate = self.dropout if self.training else 0.0
        causal = self.causal and L > 1  # a single new token may look at all before it
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=causal)
        return self.out(attended.transpose(1, 2).reshape(N, L, d))


class MLP(nn.Module):
    def __init__(self, width: int, activation):
        super().__init__()
        self.rise, self.fall = Linear(width, 4 * width), Linear(4 * width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(self.activation(self.rise(x)))


def quick_gelu(x: Tensor) -> Tensor:
    return x * (1.702 * x).sigmoid_()  # CLIP's own approximation, 0.02 away from the GELU


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")  # GPT-2's


class TowerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_attention, self.attention = nn.LayerNorm(width), SelfAttention(width, heads, causal=False)
        self.norm_mlp, self.mlp = nn.LayerNorm(width), MLP(width, quick_gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class VisionTower(nn.Module):
    """CLIP's ViT up to its last LayerNorm; the class token takes part and is dropped at the end (4.1)."""

    def __init__(self, config: Config):
        super().__init__()
        width, patch = config.tower_width, config.patch_size
        self.image_size = config.image_size
        self.patches = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros((config.image_size // patch) ** 2 + 1, width))
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(TowerBlock(width, config.tower_heads) for _ in range(config.tower_layers))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        size = self.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be (B, 3, {size}, {size}), not {tuple(images.shape)}")
        x = self.patches(images).flatten(2).transpose(1, 2)  # (B, K, d)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = self.norm_in(torch.cat([first.to(x.dtype), x], 1) + self.positions)  # (B, 1 + K, d)
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x[:, 1:])  # (B, K, d)


# 4. Decoder

class CrossAttention(nn.Module):
    """Text looks at the picture. Keys and values are computed once for each picture, however many sentences."""

    def __init__(self, width: int, source: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key_value = Linear(width, width), Linear(source, 2 * width)
        self.out = Linear(width, width)

    def keys_values(self, patches: Tensor) -> Tensor:
        B, K, _ = patches.shape
        kv = self.key_value(patches).view(B, K, 2, self.heads, -1).permute(2, 0, 3, 1, 4)  # (2, B, H, K, d/H)
        return kv if self.training else kv.contiguous()  # decoding reads them at every step

    def forward(self, x: Tensor, keys_values: Tensor, looks: list[Tensor] | None = None) -> Tensor:
        N, L, d = x.shape
        key, value = keys_values
        B = len(key)
        # the E sentences of a picture are queries to the same keys: one long row of E * L queries
        query = self.query(x).view(B, N // B * L, self.heads, -1).transpose(1, 2)  # (B, H, E * L, d/H)
        if self.training:
            attended = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout)
        else:  # few queries and 196 keys: the weights are small, and somebody may want to see them
            weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)  # (B, H, E * L, K)
            attended = weights @ value
            if looks is not None:
                looks.append(weights.mean(1).view(N, L, -1))  # (N, L, K), mean over heads
        return self.out(attended.transpose(1, 2).reshape(N, L, d))


class Block(nn.Module):
    """A GPT-2 block with a cross-attention layer between self-attention and MLP (Eq. 1)."""

    def __init__(self, config: Config):
        super().__init__()
        width, heads = config.width, config.heads
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = SelfAttention(width, heads, causal=True, dropout=config.dropout)
        self.cross_attention = CrossAttention(width, config.tower_width, heads, config.dropout)
        self.mlp = MLP(width, tanh_gelu)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, keys_values: Tensor, cache: "Cache | None", looks: list | None) -> Tensor:
        x = x + self.dropout(self.self_attention(self.norm_self(x), cache))
        x = x + self.dropout(self.cross_attention(self.norm_cross(x), keys_values, looks))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class Decoder(nn.Module):
    """GPT-2: embeddings, blocks, last LayerNorm, and the head that is tied to the word embedding."""

    def __init__(self, config: Config, vocabulary: int):
        super().__init__()
        self.words = nn.Embedding(vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def embed(self, ids: Tensor, segments: Tensor, start: int = 0) -> Tensor:
        """Word + position + segment (4.1); a segment's embedding is that of the word <emotion> or <explanation>."""
        stop = start + ids.shape[1]
        if stop > self.positions.num_embeddings:
            raise ValueError(f"{stop} tokens are beyond the position table's {self.positions.num_embeddings} rows")
        x = self.words(ids) + self.positions.weight[start:stop] + self.words(segments)
        return self.dropout(x)  # (N, L, d)

    def keys_values(self, patches: Tensor) -> list[Tensor]:
        return [block.cross_attention.keys_values(patches) for block in self.blocks]

    def forward(self, x: Tensor, keys_values: list[Tensor], caches: "list[Cache] | None" = None,
                looks: list[Tensor] | None = None) -> Tensor:
        """Eq. 3, f'. `looks` collects each layer's attention over the patches."""
        for block, kv, cache in zip(self.blocks, keys_values, caches or [None] * len(self.blocks), strict=True):
            x = block(x, kv, cache, looks)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.words.weight)  # (..., V)


# 5. SEVLM

@dataclass
class Sight:
    """Pictures as the decoder wants them, computed once for all that is asked of them."""
    patches: Tensor  # (B, K, d) f^I
    keys_values: list[Tensor]  # of each block, (2, B, H, K, d/H)

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, pictures: Tensor) -> "Sight":
        return Sight(self.patches[pictures], [kv[:, pictures] for kv in self.keys_values])


@dataclass
class Output:
    """What a forward pass computes; losses are None where their part or the labels are missing."""
    emotion_features: Tensor | None  # (N, L, 3) f^E
    embedded: Tensor  # (N, L, d) what the decoder reads, VAD fused in
    hidden: Tensor  # (N, L, d) f'
    match: Tensor | None  # (N,) the contrastive head's score of each sentence for its picture
    losses: dict[str, Tensor]  # "language", "vad", "contrastive", and "total"


class SEVLM(nn.Module):
    def __init__(self, config: Config, tokenizer: Tokenizer, lexicon: Lexicon | None = None):
        super().__init__()
        self.config, self.text, self.about = config, Text(tokenizer), {}
        width = config.width
        self.tower = VisionTower(config).requires_grad_(config.train_tower)
        self.decoder = Decoder(config, self.text.size)
        if config.vad_input:
            self.fusion = nn.Linear(width + 3, width)  # W_E, b_E
        if config.vad_head:
            self.vad_head = nn.Linear(width, 3)
        if config.contrastive_head:
            sizes = [config.tower_width + 2 * width, *[width] * 4]
            layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
            self.contrastive_head = nn.Sequential(*layers, nn.Linear(width, 1))
        self.initialise()
        # the emotion encoder keeps torch's own initial weights, as in the authors' code
        if config.vad_input and config.emotion_encoder:
            self.emotion_encoder = EmotionEncoder(causal=not config.two_way_emotions, dropout=config.dropout)
        if config.uses_vad:
            self.word_vad = WordVAD.build(tokenizer, lexicon or read_lexicon(), config.vad_per_token)

    def initialise(self) -> None:
        """GPT-2's initial weights for all that comes from no file: N(0, 0.02) at width 768, zero biases."""
        std = 0.02 * math.sqrt(768 / self.config.width)  # narrower layers add up fewer terms
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                into_residual = re.match(r"decoder\.blocks.*(attention\.out|mlp\.fall)", name)
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.layers) if into_residual else std)

    @property
    def device(self) -> torch.device:
        return self.decoder.words.weight.device

    def see(self, pictures: Tensor) -> Tensor:
        """Images (B, 3, S, S), or patch features (B, K, d) computed earlier -> patch features f^I (B, K, d)."""
        if len(pictures) == 0:
            raise ValueError("the batch is empty")
        if pictures.dim() == 3:
            return pictures.to(self.decoder.words.weight.dtype)  # they are stored in half precision
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_tower):
            return self.tower(pictures)

    def look(self, pictures: "Tensor | Sight") -> Sight:
        """What `forward` and all decoding begin with; a Sight passes unchanged."""
        if isinstance(pictures, Sight):
            return pictures
        patches = self.see(pictures)
        return Sight(patches, self.decoder.keys_values(patches))

    def in_explanation(self, ids: Tensor, segments: Tensor) -> Tensor:
        """The mask of X (N, L)."""
        if self.config.fixed_boundary:
            mask = (torch.arange(ids.shape[1], device=ids.device) >= FIXED_BOUNDARY).expand_as(ids)
        else:
            mask = segments == self.text.explanation
        return mask if self.config.padding_in_means else mask & (ids != self.text.pad)

    def read(self, ids: Tensor, segments: Tensor, rows: Tensor | None, start: int = 0) -> tuple[Tensor, Tensor | None]:
        """Embed a sentence's tokens from `start` on, its VAD fused into X. `rows` (N, L) are WordVAD's."""
        x = self.decoder.embed(ids[:, start:], segments[:, start:], start)  # (N, L - start, d)
        if not self.config.vad_input:
            return x, None
        explanation = self.in_explanation(ids, segments)
        vad = self.word_vad.values[rows if self.config.vad_on_emotion else rows * explanation]  # (N, L, 3)
        if self.config.emotion_encoder:  # Eq. 2, f^E = EE(VAD)
            vad = self.emotion_encoder(vad, ids == self.text.pad)
        fused = self.fusion(torch.cat([x, vad[:, start:].to(x.dtype)], -1))  # Eq. 2, W_E [f_X ; f_E] + b_E
        return torch.where(explanation[:, start:, None], fused, x), vad

    def forward(self, pictures: Tensor | Sight, ids: Tensor, segments: Tensor, rows: Tensor | None = None,
                labels: Tensor | None = None, wrong_emotion: Tensor | None = None,
                wrong_image: Tensor | None = None, looks: list[Tensor] | None = None) -> Output:
        """`wrong_emotion` and `wrong_image` (N,) say which sentence's X is the negative; -1: there is none."""
        if ids.device.type == "cpu" and not (0 <= ids.min() and ids.max() < self.text.size):  # a GPU would wait
            raise ValueError(f"token ids must lie in 0..{self.text.size - 1}")
        sight = self.look(pictures)
        if len(ids) % len(sight):
            raise ValueError(f"{len(ids)} sentences do not divide among {len(sight)} pictures")
        embedded, emotion_features = self.read(ids, segments, rows)
        hidden = self.decoder(embedded, sight.keys_values, looks=looks)  # Eq. 3
        explanation = self.in_explanation(ids, segments)
        match, losses = None, {}
        with torch.autocast(ids.device.type, enabled=False):  # heads and losses stay in float32
            if self.config.contrastive_head:
                negatives = [index for index, wanted in ((wrong_emotion, self.config.wrong_emotion),
                                                         (wrong_image, self.config.wrong_image))
                             if wanted and index is not None]
                scores = self.match_scores(sight.patches, hidden, ids, explanation, negatives)  # (1 + negatives, N)
                match = scores[0]
                if negatives:
                    losses["contrastive"] = -scores.log_softmax(0)[0].mean()  # Eq. 7, with the log
            if labels is not None and self.config.vad_head:
                predicted = self.vad_head(hidden[:, :-1].float())  # Eq. 4: position t predicts token t + 1
                known = (rows[:, 1:] > 0) & explanation[:, 1:]
                losses["vad"] = vad_loss(predicted, self.word_vad.values[rows[:, 1:]].float(), known)  # Eq. 5
        if labels is not None:
            wanted = labels[:, 1:] != IGNORE
            logits = self.decoder.logits(hidden[:, :-1][wanted])  # (labels, V): no logits where nothing is asked
            losses["language"] = F.cross_entropy(logits.float(), labels[:, 1:][wanted])
            losses["total"] = sum(loss * self.weight(name) for name, loss in losses.items())  # Eq. 8
        return Output(emotion_features, embedded, hidden, match, losses)

    def weight(self, loss: str) -> float:
        return self.config.alpha if loss == "contrastive" else 1.0

    def match_scores(self, patches: Tensor, hidden: Tensor, ids: Tensor, explanation: Tensor,
                     negatives: list[Tensor]) -> Tensor:
        """Eq. 6: scores of [mean f_I ; mean f'_M ; mean f'_X], with the own X first and then each negative's."""
        emotion = ~explanation if self.config.padding_in_means else ~explanation & (ids != self.text.pad)
        image = patches.float().mean(1).repeat_interleave(len(ids) // len(patches), 0)  # (N, d)
        m, x = (masked_mean(hidden.float(), mask) for mask in (emotion, explanation))  # (N, d)
        others = torch.stack([x, *(x[index.clamp(min=0)] for index in negatives)])  # (1 + negatives, N, d)
        both = torch.cat([image, m], 1).expand(len(others), -1, -1)
        scores = self.contrastive_head(torch.cat([both, others], 2)).squeeze(2)
        missing = torch.stack([torch.zeros_like(ids[:, 0], dtype=torch.bool), *(index < 0 for index in negatives)])
        return scores.masked_fill(missing, -torch.inf)

    def sentence(self, emotions: Sequence[str], explanations: Sequence[str]) -> dict[str, Tensor]:
        """Sentences as the keyword arguments of a forward pass."""
        encoded = self.text.encode(emotions, explanations, self.config.length)
        ids, starts = (tensor.to(self.device) for tensor in encoded)
        rows = self.word_vad(ids) if self.config.uses_vad else None
        return {"ids": ids, "segments": self.text.segments(starts, self.config.length), "rows": rows}

    @classmethod
    def from_public(cls, *args, **changes) -> "SEVLM":
        return public_model(*args, **changes)

    @classmethod
    def from_official(cls, *args, **changes) -> "SEVLM":
        return official_model(*args, **changes)

    @torch.no_grad()
    def score(self, pictures: Tensor | Sight, emotions: Sequence[str], explanations: Sequence[str]) -> Tensor:
        """How well each (image, emotion, explanation) matches, by the contrastive head: (N,)."""
        if not self.config.contrastive_head:
            raise UserError("this model has no contrastive head to score with")
        return self(pictures, **self.sentence(emotions, explanations)).match


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(N, L, d) and (N, L) -> (N, d); zero where the mask is empty."""
    weights = mask[..., None].to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


# 6. Decoding

class Cache:
    """One layer's keys and values of all tokens read so far, in buffers that are written by position."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        N, H, L, width = key.shape
        if self.length == 0:
            self.key, self.value = key.new_empty(2, N, H, self.capacity, width)
        start, self.length = self.length, self.length + L
        self.key[:, :, start:self.length], self.value[:, :, start:self.length] = key, value
        return self.key[:, :, :self.length], self.value[:, :, :self.length]

    def select(self, rows: Tensor) -> None:
        self.key, self.value = self.key[rows], self.value[rows]


class Decoding:
    """Sentences on their way: what each has read so far, its word's hash and its cached keys and values.

    With an emotion encoder that attends both ways every new word changes the features of all earlier
    positions, so nothing of the text can be cached: each step reads the whole sentence again.
    """

    def __init__(self, model: SEVLM, pictures: Tensor | Sight, prompt: Tensor, length: int | None = None):
        """One sentence for each picture, all with prompts of one length (B, t)."""
        config = model.config
        self.model = model
        self.keys_values = model.look(pictures).keys_values
        both_ways = config.vad_input and config.emotion_encoder and config.two_way_emotions
        self.caches = None if both_ways else [Cache(length or config.length) for _ in range(config.layers)]
        self.ids = self.segments = self.rows = prompt[:, :0]  # (n, t)
        self.words = torch.zeros_like(prompt[:, 0])  # (n,) WordVAD's hash of the current word
        self.explaining = torch.zeros_like(self.words, dtype=torch.bool)  # (n,) X has begun
        for tokens in prompt.unbind(1):
            self.append(tokens)

    def append(self, tokens: Tensor) -> None:
        """One more token (n,) for each sentence."""
        text = self.model.text
        self.explaining = self.explaining | (tokens == text.because)
        segments = torch.where(self.explaining, text.explanation, text.emotion)
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.segments = torch.cat([self.segments, segments[:, None]], 1)
        if self.model.config.vad_input:
            self.words = self.model.word_vad.spell(self.words, tokens)
            self.rows = torch.cat([self.rows, self.model.word_vad.look_up(self.words)[:, None]], 1)

    def logits(self) -> Tensor:
        """For the next token of each sentence: (n, V), float32."""
        start = self.caches[0].length if self.caches else 0
        embedded, _ = self.model.read(self.ids, self.segments, self.rows, start)
        hidden = self.model.decoder(embedded, self.keys_values, self.caches)
        return self.model.decoder.logits(hidden[:, -1]).float()

    def select(self, rows: Tensor, pictures: Tensor | None = None) -> None:
        """Go on with these sentences, repeated or reordered, E for each of these pictures side by side."""
        for name in ("ids", "segments", "rows", "words", "explaining"):
            setattr(self, name, getattr(self, name)[rows])
        for cache in self.caches or ():
            cache.select(rows)
        if pictures is not None:
            self.keys_values = [kv[:, pictures] for kv in self.keys_values]


@dataclass
class Written:
    """Finished sentences, those of one picture side by side."""
    ids: Tensor  # (N, L), padded
    log_probs: Tensor  # (N,) of the tokens that the model chose, the end included


def nucleus(logits: Tensor, top_p: float, temperature: float, uniform: Tensor) -> Tensor:
    """Draw (n,) tokens from the fewest most likely ones that hold `top_p` of the mass; 0: the likeliest.

    `uniform` (n,) in [0, 1) decides, so that a picture's sentence does not depend on its neighbours.
    """
    if top_p == 0:
        return logits.argmax(1)
    probs, order = ranked((logits / temperature).softmax(1), top_p)
    before = probs.cumsum(1) - probs
    mass = (probs * (before < top_p)).cumsum(1)
    place = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)
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
def write(model: SEVLM, pictures: Tensor | Sight, openings: Sequence[Sequence[int]] | None = None, samples: int = 1,
          top_p: float = 0.0, temperature: float = 1.0, seeds: Sequence[int] | int = 0,
          length: int | None = None) -> Written:
    """Finish sentences for pictures, greedily or by nucleus sampling (5.1: p = 0.9), `samples` for each.

    Openings may differ in length: a longer one dictates its tokens while the others already choose theirs.
    A finished sentence leaves the batch; one that finishes before its picture's other samples may have to
    wait, since a picture's sentences share its keys and values and stay side by side.
    """
    length, text = length or model.config.length, model.text
    sight = model.look(pictures)
    B = len(sight)
    dictated, start = padded(model, openings, B, length)
    decoding = Decoding(model, sight, dictated[:, :start], length)
    repeat = torch.arange(B, device=model.device).repeat_interleave(samples)
    dictated, ids = dictated[repeat], torch.full((B * samples, length), text.pad, device=model.device)
    ids[:, :start] = dictated[:, :start]
    log_probs = torch.zeros(B * samples, device=model.device)
    special = torch.zeros(text.size, dtype=torch.bool, device=model.device)
    special[text.special] = True
    uniform = draw(seeds, B, samples, length).to(model.device)
    live = torch.arange(B * samples, device=model.device)  # the sentences that `decoding` still holds
    done = torch.zeros_like(live, dtype=torch.bool)
    for position in range(start, length):
        logits = decoding.logits()
        if position == start and samples > 1:
            decoding.select(repeat)  # until here a picture's samples were one
            logits = logits[repeat]
        chosen = nucleus(logits, top_p, temperature, uniform[live, position])
        told = dictated[live, position]
        tokens = torch.where(told >= 0, told, chosen)
        gain = logits.log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
        log_probs[live] += gain.masked_fill((told >= 0) | done, 0)
        ids[live, position] = tokens.masked_fill(done, text.pad)
        done = done | (special[tokens] & (told < 0))
        decoding.append(tokens)
        if done.any():
            if done.all():
                break
            rows, kept = still_writing(done.view(-1, samples))
            if len(rows) < len(live):
                decoding.select(rows, kept)
                live, done, samples = live[rows], done[rows], len(rows) // len(kept)
    return Written(ids, log_probs)


def draw(seeds: Sequence[int] | int, pictures: int, samples: int, length: int) -> Tensor:
    """(B * S, L) uniform numbers; each picture has its own generator, on the CPU, alike on every device."""
    seeds = [seeds] * pictures if isinstance(seeds, int) else seeds
    numbers = [torch.rand(samples, length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(numbers)


def still_writing(done: Tensor) -> tuple[Tensor, Tensor]:
    """From (B, E) flags: rows to keep and pictures to keep, with as many rows for each as the busiest needs."""
    kept = (~done).any(1).nonzero().squeeze(1)
    most = (~done).sum(1).max()
    order = done[kept].byte().argsort(dim=1, stable=True)[:, :most]  # unfinished ones first
    return (kept[:, None] * done.shape[1] + order).flatten(), kept


@torch.no_grad()
def beam_search(model: SEVLM, pictures: Tensor | Sight, openings: Sequence[Sequence[int]] | None = None, beams: int = 5,
                length: int | None = None) -> Written:
    """The `beams` most probable sentences found for each picture, best mean log-probability of a token first."""
    length, text = length or model.config.length, model.text
    sight = model.look(pictures)
    B, V = len(sight), text.size
    dictated, start = padded(model, openings, B, length)
    decoding = Decoding(model, sight, dictated[:, :start], length)
    ids = torch.full((B, beams, length), text.pad, device=model.device)
    ids[:, :, :start] = dictated[:, None, :start]
    scores = torch.full((B, beams), -torch.inf, device=model.device)
    scores[:, 0] = 0.0  # all beams of a picture begin alike: let one of them branch
    chosen = torch.zeros_like(scores)  # tokens that were not dictated
    done = torch.zeros_like(scores, dtype=torch.bool)
    special = torch.tensor(text.special, device=model.device)
    live = torch.arange(B, device=model.device)  # pictures with an unfinished beam
    for position in range(start, length):
        logits = decoding.logits()
        if position == start:
            decoding.select(live.repeat_interleave(beams))
            logits = logits.repeat_interleave(beams, 0)
        gains = logits.log_softmax(1).view(-1, beams, V)
        gains[done[live]] = only(text.pad, gains)  # a finished beam goes on with padding, at no cost
        told = dictated[live, position]
        for row in (told >= 0).nonzero().flatten():
            gains[row] = only(told[row], gains)
        scores[live], best = (scores[live, :, None] + gains).flatten(1).topk(beams)
        parents, tokens = best // V, best % V  # (live, beams)
        ids[live] = ids[live].gather(1, parents[..., None].expand(-1, -1, length))
        ids[live, :, position] = tokens
        chosen[live] = chosen[live].gather(1, parents)
        done[live] = done[live].gather(1, parents)
        chosen[live] += ~done[live] & (told < 0)[:, None]
        done[live] |= torch.isin(tokens, special) & (told < 0)[:, None]
        decoding.select((torch.arange(len(live), device=live.device)[:, None] * beams + parents).flatten())
        decoding.append(tokens.flatten())
        kept = (~done[live]).any(1).nonzero().squeeze(1)
        if len(kept) == 0:
            break
        if len(kept) < len(live):
            rows = (kept[:, None] * beams + torch.arange(beams, device=live.device)).flatten()
            decoding.select(rows, kept)
            live = live[kept]
    order = (scores / chosen.clamp(min=1)).argsort(1, descending=True)
    ids = ids.gather(1, order[..., None].expand_as(ids))
    return Written(ids.flatten(0, 1), scores.gather(1, order).flatten())


def only(token: int | Tensor, like: Tensor) -> Tensor:
    """Log-probabilities (V,) that allow a single token."""
    gains = like.new_full(like.shape[-1:], -torch.inf)
    gains[token] = 0.0
    return gains


@torch.no_grad()
def emotion_log_probs(model: SEVLM, pictures: Tensor | Sight) -> Tensor:
    """The distribution over the nine emotions after "the emotion is", exact for names of several tokens: (B, 9)."""
    names, sight = model.text.names, model.look(pictures)
    prompt = torch.tensor([model.text.prompt] * len(sight), device=model.device)
    decoding = Decoding(model, sight, prompt)
    first = torch.tensor([name[0] for name in names], device=model.device)
    total = decoding.logits().log_softmax(1)[:, first]  # (B, 9)
    longer = [place for place, name in enumerate(names) if len(name) > 1]
    decoding.select(torch.arange(len(sight), device=model.device).repeat_interleave(len(longer)))
    for position in range(1, max(map(len, names))):
        tokens = [names[place][min(position, len(names[place])) - 1] for place in longer]
        decoding.append(torch.tensor(tokens * len(sight), device=model.device))
        gains = decoding.logits().log_softmax(1).view(len(sight), len(longer), -1)
        for column, place in enumerate(longer):
            if position < len(names[place]):
                total[:, place] += gains[:, column, names[place][position]]
    return total.log_softmax(1)


@torch.no_grad()
def reread(model: SEVLM, pictures: Tensor | Sight, ids: Tensor, looks: list[Tensor] | None = None) -> Output:
    """Written sentences through the model once more, all at once: for their match, or for what it looked at."""
    text = model.text
    segments = torch.where((ids == text.because).cumsum(1) > 0, text.explanation, text.emotion)
    return model(pictures, ids, segments, model.word_vad(ids) if model.config.uses_vad else None, looks=looks)


def attention(model: SEVLM, pictures: Tensor | Sight, ids: Tensor, layer: int | None = None) -> Tensor:
    """Where the model looked as it chose each token: (N, L, K), mean over heads and layers or of one layer.

    Token t was chosen at position t - 1; the first token was given, so its row is zero.
    """
    looks: list[Tensor] = []
    reread(model, pictures, ids, looks)
    mean = torch.stack(looks).mean(0) if layer is None else looks[layer]
    return torch.cat([torch.zeros_like(mean[:, :1]), mean[:, :-1]], 1)


# 7. Weights. One table of patterns turns a file's names into ours; then every tensor must be accounted for.

CLIP_HUB, GPT2_HUB = "timm/vit_base_patch16_clip_224.openai", "distilbert/distilgpt2"
CLIP_FILES = ("open_clip_model.safetensors", "model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
GPT2_FILES = ("model.safetensors", "pytorch_model.bin")

CLIP_NAMES = [
    # OpenAI and open_clip
    (r"^conv1\b", "patches"), (r"^positional_embedding$", "positions"), (r"^ln_pre\b", "norm_in"),
    (r"^ln_post\b", "norm_out"), (r"^transformer\.resblocks\b", "blocks"), (r"\bln_1\b", "norm_attention"),
    (r"\bln_2\b", "norm_mlp"), (r"\battn\.in_proj_", "attention.qkv."), (r"\battn\.out_proj\b", "attention.out"),
    (r"\bmlp\.c_fc\b", "mlp.rise"), (r"\bmlp\.c_proj\b", "mlp.fall"),
    # Hugging Face, whose first norm is misspelt
    (r"^embeddings\.class_embedding$", "class_embedding"), (r"^embeddings\.patch_embedding\b", "patches"),
    (r"^embeddings\.position_embedding\.weight$", "positions"), (r"^pre_laye?rnorm\b", "norm_in"),
    (r"^post_layernorm\b", "norm_out"), (r"^encoder\.layers\b", "blocks"), (r"\blayer_norm1\b", "norm_attention"),
    (r"\blayer_norm2\b", "norm_mlp"), (r"\bself_attn\.([qkv])_proj\b", r"attention.\1"),
    (r"\bself_attn\.out_proj\b", "attention.out"), (r"\bmlp\.fc1\b", "mlp.rise"), (r"\bmlp\.fc2\b", "mlp.fall"),
]
CLIP_UNUSED = {  # by the prefix of the vision tower's names: the text tower and what joins the two
    "visual.": r"(transformer|ln_final)\..*|token_embedding\.weight|positional_embedding|text_projection|"
               r"logit_(scale|bias)|input_resolution|context_length|vocab_size",
    "vision_model.": r"text_model\..*|(visual|text)_projection\.weight|logit_scale",
    "": r"",
}
TOWER_UNUSED = r"proj|embeddings\.position_ids"  # the projection into the common space, and a table of 0, 1, 2, ...

GPT2_NAMES = [  # with the authors' heads
    (r"^transformer\.", ""), (r"^(wte|wpe|h|ln_f)\b", r"decoder.\1"), (r"\bwte\b", "words"), (r"\bwpe\b", "positions"),
    (r"\bh\b", "blocks"), (r"\bln_f\b", "norm"), (r"\bln_1\b", "norm_self"), (r"\bln_cross_attn\b", "norm_cross"),
    (r"\bln_2\b", "norm_mlp"), (r"\battn\.c_attn\b", "self_attention.qkv"),
    (r"\battn\.c_proj\b", "self_attention.out"), (r"\bcrossattention\.q_attn\b", "cross_attention.query"),
    (r"\bcrossattention\.c_attn\b", "cross_attention.key_value"),
    (r"\bcrossattention\.c_proj\b", "cross_attention.out"), (r"\bmlp\.c_fc\b", "mlp.rise"),
    (r"\bmlp\.c_proj\b", "mlp.fall"), (r"^VAD_linear\b", "fusion"), (r"^VAD_head\b", "vad_head"),
    (r"^sim_mlp\.pred\b", "contrastive_head"),
]
GPT2_UNUSED = r"(transformer\.)?h\.\d+\.(attn|crossattention)\.(masked_)?bias"  # causal masks, stored as buffers
CONV1D = r".*\b(c_attn|q_attn|c_proj|c_fc)\.weight"  # stored as (in, out); a Linear is (out, in)

EMOTION_NAMES = [(r"^pos_encoder\b", "positions"), (r"^encoder\.layers\b", "blocks"), (r"\bself_attention\.", ""),
                 (r"\bfc\.0\b", "rise"), (r"\bfc\.2\b", "fall"), (r"\bnorm1\b", "norm_attention"),
                 (r"\bnorm2\b", "norm_feedforward")]
EMOTION_UNUSED = r"decoder\.(weight|bias)"  # a linear layer whose output the authors' code drops

NOT_PUBLIC = r"decoder\.blocks\.\d+\.(norm_cross|cross_attention)\..*|(fusion|vad_head|contrastive_head|" \
             r"emotion_encoder|word_vad)\..*"  # parts that start from random weights


def find_file(source: str | Path, names: Sequence[str], flag: str) -> Path:
    """The file `source` itself, or the first of `names` in the folder or hub repository `source`."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds none of {', '.join(names)}")
        return found[0]
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
    try:
        for name in names:  # what has been fetched once needs no network
            if isinstance(cached := try_to_load_from_cache(str(source), name), str):
                return Path(cached)
        for name in names:
            try:
                return Path(hf_hub_download(str(source), name))
            except LocalEntryNotFoundError:  # unreachable
                raise
            except EntryNotFoundError as error:  # reachable, but no such file there: try the next
                reason = error
    except HFValidationError:
        raise UserError(f"{source} is no file, no folder and no hub repository") from None
    except Exception as error:  # noqa: BLE001 - offline, no such repository, gated, ...: many types, one remedy
        reason = error
    raise UserError(f"cannot fetch {' or '.join(names)} from {source}: {first_line(reason)}\nDownload it from "
                    f"https://huggingface.co/{source} and name its folder with {flag}")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_tensors(path: Path) -> dict:
    """The content of a .safetensors file, or of a .pt, .bin or .tar file, of which no code is run."""
    from safetensors.torch import load_file
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - each library has its own types for a truncated or foreign file
        raise UserError(f"{path} is truncated or no file of weights: {first_line(error)}") from None


def renamed(tensors: dict[str, Tensor], table: list[tuple[str, str]], unused: str) -> dict[str, Tensor]:
    """Tensors under our names in float32, without those that are unused; unknown names stay and will be reported."""
    result = {}
    for name, tensor in tensors.items():
        if not re.fullmatch(unused, name):
            for pattern, replacement in table:
                name = re.sub(pattern, replacement, name)
            result[name] = tensor.float()
    return result


def clip_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's vision tower under our names."""
    prefix = next(p for p in CLIP_UNUSED if any(name.startswith(p) for name in tensors))
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    tower = renamed(inside, CLIP_NAMES, TOWER_UNUSED)
    for name in [name for name in tower if ".attention.q." in name]:  # Hugging Face keeps q, k and v apart
        parts = [tower.pop(name.replace(".q.", f".{part}."), torch.empty(0)) for part in "qkv"]
        tower[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return {f"tower.{name}": tensor for name, tensor in tower.items()} | renamed(outside, [], CLIP_UNUSED[prefix])


def gpt2_tensors(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """GPT-2's weights, with or without the authors' heads, under our names."""
    tensors = {name: tensor.T if re.fullmatch(CONV1D, name) else tensor for name, tensor in tensors.items()}
    head = tensors.pop("lm_head.weight", None)
    decoder = renamed(tensors, GPT2_NAMES, GPT2_UNUSED)
    if head is not None and not torch.equal(head.float(), decoder.get("decoder.words.weight", head[:0])):
        raise UserError(f"{source}: lm_head.weight differs from the word embedding; ours are tied")
    return decoder


def tower_sizes(tensors: dict[str, Tensor], source: Path) -> dict[str, int]:
    """The tower's configuration, read off its shapes; CLIP's heads are 64 wide."""
    try:
        width, _, patch, _ = tensors["tower.patches.weight"].shape
        side = math.isqrt(len(tensors["tower.positions"]) - 1)
    except (KeyError, ValueError):
        raise UserError(f"{source} holds no CLIP vision transformer") from None
    return dict(image_size=side * patch, patch_size=patch, tower_width=width, tower_heads=max(1, width // 64),
                tower_layers=blocks(tensors, "tower"))


def decoder_sizes(tensors: dict[str, Tensor], source: Path) -> dict[str, int]:
    try:
        width, positions = tensors["decoder.words.weight"].shape[1], len(tensors["decoder.positions.weight"])
    except KeyError:
        raise UserError(f"{source} holds no GPT-2") from None
    return dict(width=width, positions=positions, heads=max(1, width // 64), layers=blocks(tensors, "decoder"))


def blocks(tensors: dict[str, Tensor], part: str) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith(f"{part}.blocks.")})


def load_checked(model: SEVLM, tensors: dict[str, Tensor], source: str, optional: str = "") -> None:
    """Load tensors, each in its place and of its shape, or name all that do not fit in one error."""
    expected = model.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in tensors and not re.fullmatch(optional, name)]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]
    problems += [f"misshapen: {name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
                 for name, tensor in tensors.items() if name in expected and tensor.shape != expected[name].shape]
    if problems:
        raise UserError(f"{source}: {len(problems)} tensors do not fit\n  " + "\n  ".join(problems))
    model.load_state_dict(tensors, strict=False)


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, or GPT-2's vocab.json and merges.txt."""
    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        return byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # noqa: BLE001 - `tokenizers` raises plain Exception
        raise UserError(f"{folder} holds no tokenizer.json, nor vocab.json and merges.txt: {error}") from None


def byte_level(bpe: models.BPE) -> Tokenizer:
    """A tokenizer that cuts and joins text as GPT-2's does."""
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def public_model(clip: str | Path = CLIP_HUB, gpt2: str | Path = GPT2_HUB, lexicon: Lexicon | None = None,
                 **changes) -> SEVLM:
    """The paper's starting point: CLIP's tower and GPT-2 from files, folders or the hub, the rest random."""
    clip_file, gpt2_file = find_file(clip, CLIP_FILES, "--clip"), find_file(gpt2, GPT2_FILES, "--gpt2")
    tower = clip_tensors(read_tensors(clip_file))
    decoder = gpt2_tensors(read_tensors(gpt2_file), gpt2_file)
    config = Config(**tower_sizes(tower, clip_file) | decoder_sizes(decoder, gpt2_file) | changes)
    if not Path(gpt2).exists():
        find_file(gpt2, ["tokenizer.json"], "--gpt2")  # the hub's cache puts it beside the weights
    model = SEVLM(config, read_tokenizer(gpt2_file.parent), lexicon)
    known, words = decoder["decoder.words.weight"], model.decoder.words.weight.detach().clone()
    if not 0 <= len(words) - len(known) <= len(Text.ADDED):
        raise UserError(f"{gpt2_file} has {len(known)} words and its tokenizer {len(words) - len(Text.ADDED)}")
    words[:len(known)] = known  # the rows of the added tokens stay N(0, 0.02)
    load_checked(model, tower | decoder | {"decoder.words.weight": words}, f"{clip_file} and {gpt2_file}", NOT_PUBLIC)
    return model


def official_model(source: str | Path, clip: str | Path = CLIP_HUB, lexicon: Lexicon | None = None, **changes) -> SEVLM:
    """The authors' checkpoint, set to compute what their code computes.

    `source` is the folder that holds `nle_model_*`, `nle_gpt2_tokenizer_*` and `ckpt_stats_*.tar`, one of its
    `nle_model_*` folders where it has several, or a hub repository (theirs is jing5566/SEVLM).
    """
    folder = official_folder(source)
    files = {"model": folder / "pytorch_model.bin", "config": folder / "config.json",
             "state": folder.parent / f"ckpt_stats_{folder.name.removeprefix('nle_model_')}.tar",
             "tokenizer": next(iter(sorted(folder.parent.glob("nle_gpt2_tokenizer_*"))),
                               folder.parent / "nle_gpt2_tokenizer_0")}
    for file in files.values():
        if not file.exists():
            raise UserError(f"{source} lacks {file.relative_to(folder.parent)} of the authors' layout")
    theirs, state = json.loads(files["config"].read_text()), read_tensors(files["state"])
    for key, value in (("activation_function", "gelu_new"), ("layer_norm_epsilon", 1e-5), ("len_prefix", 0)):
        if theirs.get(key, value) != value:
            raise UserError(f"{files['config']}: {key} is {theirs[key]!r}, and only {value!r} is supported")
    decoder = gpt2_tensors(read_tensors(files["model"]), files["model"])
    emotion = renamed(state.get("emo_encoder_state_dict", {}), EMOTION_NAMES, EMOTION_UNUSED)
    if trained := state.get("encoder_state_dict"):  # only there if they trained the tower too
        clip_file, tower = files["state"], clip_tensors({n.removeprefix("encoder."): t for n, t in trained.items()})
    else:
        clip_file = find_file(clip, CLIP_FILES, "--clip")
        tower = clip_tensors(read_tensors(clip_file))
    sizes = tower_sizes(tower, clip_file) | decoder_sizes(decoder, files["model"]) | {"heads": theirs["n_head"]}
    parts = dict(vad_input=bool(emotion), vad_head=bool(theirs.get("use_VAD_loss")),
                 contrastive_head=bool(theirs.get("use_cl_loss")), length=theirs["max_seq_len"])
    model = SEVLM(Config.authors(**sizes | parts | changes), read_tokenizer(files["tokenizer"]), lexicon)
    if not emotion:  # their baseline keeps a fusion layer that it never uses
        decoder = {name: tensor for name, tensor in decoder.items() if not name.startswith("fusion.")}
    emotion = {f"emotion_encoder.{name}": tensor for name, tensor in emotion.items()}
    load_checked(model, tower | decoder | emotion, f"{folder} and {clip_file}", r"word_vad\..*")
    return model


def official_folder(source: str | Path) -> Path:
    """The `nle_model_*` folder that `source` means."""
    root = Path(source)
    if not root.exists():
        from huggingface_hub import snapshot_download
        try:
            root = Path(snapshot_download(str(source), allow_patterns=["*nle_*", "*ckpt_stats_*"]))
        except Exception as error:  # noqa: BLE001 - as in find_file
            raise UserError(f"{source} is no folder, and the hub did not give it: {first_line(error)}") from None
    if root.name.startswith("nle_model_"):
        return root
    found = sorted(root.rglob("nle_model_*"))
    if len(found) != 1:
        names = "; name one of them: " + ", ".join(map(str, found)) if found else ""
        raise UserError(f"{source} holds {len(found)} folders nle_model_*{names}")
    return found[0]


def save(model: SEVLM, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Our checkpoint: config.json (with the preprocessing), tokenizer.json and, last, model.safetensors."""
    from safetensors.torch import save_file
    folder = Path(folder)
    write_text(folder / "config.json", json.dumps({"sevlm": asdict(model.config), "about": model.about}, indent=1))
    with replacing(folder / "tokenizer.json") as path:
        model.text.tokenizer.save(str(path))
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
               for name, tensor in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load(folder: str | Path) -> SEVLM:
    """A model from a folder that `save` wrote; needs no lexicon."""
    folder = Path(folder)
    try:
        stored = json.loads((folder / "config.json").read_text())
        known = {setting.name for setting in fields(Config)}
        config = Config(**{name: value for name, value in stored["sevlm"].items() if name in known})
    except OSError:
        raise UserError(f"{folder} is no SEVLM checkpoint: it has no config.json") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / 'config.json'} was not written by SEVLM") from None
    if unknown := stored["sevlm"].keys() - known:
        raise UserError(f"{folder / 'config.json'} has settings that this version does not know: {', '.join(unknown)}")
    tensors = read_tensors(find_file(folder, ["model.safetensors"], "--checkpoint"))
    tables = {name.removeprefix("word_vad."): tensor
              for name, tensor in tensors.items() if name.startswith("word_vad.")}
    model = SEVLM(config, read_tokenizer(folder))
    if config.uses_vad:
        try:
            model.word_vad = WordVAD(**tables)
        except TypeError:
            raise UserError(f"{folder / 'model.safetensors'} lacks the lexicon's tables word_vad.*") from None
    load_checked(model, tensors, str(folder / "model.safetensors"))
    model.about = stored.get("about", {})
    return model.eval()
