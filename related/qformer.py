"""The Q-Former: learned queries that look at a picture with a question in mind, as in InstructBLIP and EmoVIT.

    [queries ; question]                                                    (B, Q + L, d)
    each block:  self-attention over both, padding of the question left out
                 cross-attention of the queries to the patches, in every other block
                 two feed-forwards, one for queries and one for the question
    the queries' rows are what the language model is given                  (B, Q, d)

Every layer is added to its input before a LayerNorm (post-norm), as in BERT, whose weights fit: `bert_tensors`.
InstructBLIP's fit too, under the names of either library: `instructblip_tensors`.

Shapes: B pictures, K patches of width E, Q queries, L tokens of the question, S = Q + L, d width, H heads.
"""
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sevlm import Embedding, Linear
from support.files import renamed
from support.program import UserError
from support.settings import check, flag, option


@dataclass
class Sizes:
    """InstructBLIP's, but half of its 12 blocks: a step of 32 records then needs 5 to 6 GB; a GPU of 11 GB will do."""
    queries: int = option(32, "learned queries: rows of the soft prompt", least=1, most=1024)
    q_blocks: int = option(6, "blocks of the Q-Former (InstructBLIP: 12)", least=1, most=1000)
    q_width: int = option(768, "width of the Q-Former", least=1, most=2**14)
    q_heads: int = option(12, "attention heads of the Q-Former", least=1, most=2**14)
    q_inner: int = option(3072, "width inside its feed-forwards", least=1, most=2**16)
    q_positions: int = option(512, "rows of its position table", least=1, most=2**20)
    cross_every: int = option(2, "every so many blocks one attends to the picture, the first among them", least=1,
                              most=1000)
    dropout: float = option(0.1, "dropout of the Q-Former", least=0, below=1)

    def __post_init__(self):
        check(self)
        if self.q_width % self.q_heads:
            raise UserError(f"{flag('q_width')} {self.q_width} is no multiple of {flag('q_heads')} {self.q_heads}")


class Attention(nn.Module):
    """Rows attend to themselves, or to a picture's patches."""

    def __init__(self, sizes: Sizes, source: int):
        super().__init__()
        d = sizes.q_width
        self.heads, self.rate = sizes.q_heads, sizes.dropout
        self.query, self.key, self.value = Linear(d, d), Linear(source, d), Linear(source, d)
        self.c_proj, self.ln, self.dropout = Linear(d, d), nn.LayerNorm(d, eps=1e-12), nn.Dropout(sizes.dropout)

    def cut(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, S, d/H)

    def forward(self, x: Tensor, source: Tensor, visible: Tensor | None = None) -> Tensor:
        """`visible` (B, 1, 1, S) is False at the rows of the source that are nobody's keys."""
        query, key, value = self.cut(self.query(x)), self.cut(self.key(source)), self.cut(self.value(source))
        attended = F.scaled_dot_product_attention(query, key, value, visible, self.rate * self.training)
        return self.ln(x + self.dropout(self.c_proj(attended.transpose(1, 2).flatten(2))))


class FeedForward(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        d = sizes.q_width
        self.c_fc, self.c_proj = Linear(d, sizes.q_inner), Linear(sizes.q_inner, d)
        self.ln, self.dropout = nn.LayerNorm(d, eps=1e-12), nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(x + self.dropout(self.c_proj(F.gelu(self.c_fc(x)))))


class Block(nn.Module):
    def __init__(self, sizes: Sizes, source: int, looks: bool):
        super().__init__()
        self.attn = Attention(sizes, sizes.q_width)
        self.cross = Attention(sizes, source) if looks else None
        self.mlp, self.mlp_query = FeedForward(sizes), FeedForward(sizes)

    def forward(self, x: Tensor, queries: int, features: Tensor, visible: Tensor | None, seen: Tensor | None) -> Tensor:
        x = self.attn(x, x, visible)
        asking, question = x[:, :queries], x[:, queries:]
        if self.cross is not None:
            asking = self.cross(asking, features, seen)
        return torch.cat([self.mlp_query(asking), self.mlp(question)], 1)


class QFormer(nn.Module):
    """Its weights come from a file, or from `initialise`: the constructor leaves them unset."""

    def __init__(self, sizes: Sizes, source: int, vocabulary: int):
        super().__init__()
        d = sizes.q_width
        self.queries = nn.Parameter(torch.empty(1, sizes.queries, d))
        self.wte, self.wpe = Embedding(vocabulary, d), Embedding(sizes.q_positions, d)
        self.ln_in, self.dropout = nn.LayerNorm(d, eps=1e-12), nn.Dropout(sizes.dropout)
        self.blocks = nn.ModuleList(Block(sizes, source, looks=number % sizes.cross_every == 0)
                                    for number in range(sizes.q_blocks))

    def embed(self, pictures: int, ids: Tensor | None) -> Tensor:
        """Queries, which have no position, in front of the question, whose positions begin at 0."""
        x = self.queries.expand(pictures, -1, -1)
        if ids is not None:
            x = torch.cat([x, self.wte(ids) + self.wpe.weight[:ids.shape[1]]], 1)
        return self.dropout(self.ln_in(x))  # (B, Q + L, d)

    def forward(self, features: Tensor, ids: Tensor | None = None, asked: Tensor | None = None,
                seen: Tensor | None = None) -> Tensor:
        """Features (B, K, E) and questions (B, L) -> all rows (B, Q + L, d), the queries' first.

        `asked` (B, L) is False at a question's padding, `seen` (B, K) at patches that do not count.
        """
        Q, x = self.queries.shape[1], self.embed(len(features), ids)
        visible = None if asked is None else F.pad(asked, (Q, 0), value=True)[:, None, None]
        seen = None if seen is None else seen[:, None, None]
        for block in self.blocks:
            x = block(x, Q, features, visible, seen)
        return x


def initialise(module: nn.Module, width: int) -> None:
    """N(0, 0.02) at width 768, zero biases; LayerNorms keep their ones and zeros."""
    std = 0.02 * math.sqrt(768 / width)  # narrower layers add up fewer terms
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif not re.search(r"\bln(_in)?\.weight$", name):
            nn.init.normal_(parameter, std=std)


# Other people's weights

LAYERS = [  # BERT's names, which InstructBLIP's two libraries share but for `.self.`, `.attention.` and `layernorm`
    (r"^(bert\.)?embeddings\.word_embeddings\b", "wte"), (r"^(bert\.)?embeddings\.position_embeddings\b", "wpe"),
    (r"^(bert\.)?embeddings\.(LayerNorm|layernorm)\b", "ln_in"), (r"^(bert\.)?encoder\.layer\b", "blocks"),
    (r"\b((cross)?attention)\.(self|attention)\.", r"\1."), (r"\b((cross)?attention)\.output\.dense\b", r"\1.c_proj"),
    (r"\b((cross)?attention)\.output\.LayerNorm\b", r"\1.ln"), (r"\bcrossattention\b", "cross"),
    (r"\battention\b", "attn"), (r"\bintermediate(_query)?\.dense\b", r"mlp\1.c_fc"),
    (r"\boutput(_query)?\.dense\b", r"mlp\1.c_proj"), (r"\boutput(_query)?\.LayerNorm\b", r"mlp\1.ln"),
    (r"\.gamma$", ".weight"), (r"\.beta$", ".bias"),  # old spellings
]
BERT_UNUSED = (r"(bert\.)?embeddings\.(token_type_embeddings\.weight|position_ids)|(bert\.)?pooler\..*|cls\..*|"
               r"(bert\.)?embeddings\.word_embeddings\.weight")
INSTRUCTBLIP = [(r"^(qformer|Qformer\.bert)\.", ""), (r"^query_tokens$", "queries"), *LAYERS,
                (r"^(language_projection|llm_proj|t5_proj|opt_proj)\b", "projection")]
INSTRUCTBLIP_UNUSED = (r"(qformer|Qformer\.bert)\.embeddings\.(word_embeddings\.weight|position_ids)|Qformer\.cls\..*|"
                       r"(vision_model|visual_encoder|ln_vision|language_model|llm_model|t5_model|opt_model)\..*")


FOREIGN = r"qformer\.blocks\.\d+\.cross\.(key|value)\.weight|projection\..*"  # as wide as a tower, a language model


def bert_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's blocks under our names; its feed-forwards serve for the question, and copies of them for the queries.

    Its words are left out: our tokens are GPT-2's.
    """
    found = {f"qformer.{name}": tensor for name, tensor in renamed(tensors, LAYERS, BERT_UNUSED).items()}
    return found | {name.replace(".mlp.", ".mlp_query."): tensor.clone() for name, tensor in found.items()
                    if ".mlp." in name}


def instructblip_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """InstructBLIP's Q-Former and projection, without the words: our tokens are GPT-2's."""
    return {name if name.startswith("projection.") else f"qformer.{name}": tensor
            for name, tensor in renamed(tensors, INSTRUCTBLIP, INSTRUCTBLIP_UNUSED).items()}


def sizes_of(tensors: dict[str, Tensor], source: Path) -> dict[str, int]:
    """What shapes tell of a Q-Former; its heads are 64 wide. Nothing, if there is nothing."""
    if not tensors:
        return {}
    try:
        inner, width = tensors["qformer.blocks.0.mlp.c_fc.weight"].shape
        found = dict(q_width=width, q_heads=max(1, width // 64), q_inner=inner,
                     q_positions=len(tensors["qformer.wpe.weight"]))
    except KeyError as missing:
        raise UserError(f"{source} holds no Q-Former, nor BERT: {missing} is missing") from None
    return found | ({"queries": tensors["qformer.queries"].shape[1]} if "qformer.queries" in tensors else {})


def fitting(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Without the blocks that the model does not have, and without what is as wide as another's tower or words."""
    own, kept = model.state_dict(), {}
    for name, tensor in tensors.items():
        block = re.match(r"qformer\.blocks\.(\d+)\.", name)
        beyond = block is not None and int(block[1]) >= len(model.qformer.blocks)
        if not beyond and not (re.fullmatch(FOREIGN, name) and name in own and tensor.shape != own[name].shape):
            kept[name] = tensor
    return kept
