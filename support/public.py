"""CLIP's and GPT-2's public weights under the names that both share here, whatever library saved them.

`attn.c_attn` is the joint layer for queries, keys and values, `attn.c_proj` what follows the heads, `mlp.c_fc` and
`mlp.c_proj` the two layers of an MLP, `ln_1` and `ln_2` the LayerNorms before them, and `blocks` the list of it all.
"""
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from support.files import renamed
from support.program import UserError

CLIP_HUB, GPT2_HUB = "timm/vit_base_patch16_clip_224.openai", "distilbert/distilgpt2"
CLIP_FILES = ("open_clip_model.safetensors", "model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
GPT2_FILES = ("model.safetensors", "pytorch_model.bin")
CLIP_NAMES = [
    (r"^transformer\.resblocks\b", "blocks"), (r"\battn\.in_proj_", "attn.c_attn."),  # OpenAI and open_clip
    (r"\battn\.out_proj\b", "attn.c_proj"),
    (r"^embeddings\.class_embedding$", "class_embedding"), (r"^embeddings\.patch_embedding\b", "conv1"),  # Hugging Face
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"), (r"^pre_laye?rnorm\b", "ln_pre"),  # misspelt
    (r"^post_layernorm\b", "ln_post"), (r"^encoder\.layers\b", "blocks"), (r"\blayer_norm([12])\b", r"ln_\1"),
    (r"\bself_attn\.([qkv])_proj\b", r"attn.\1"), (r"\bself_attn\.out_proj\b", "attn.c_proj"),
    (r"\bmlp\.fc1\b", "mlp.c_fc"), (r"\bmlp\.fc2\b", "mlp.c_proj"),
]
CLIP_UNUSED = r"proj|embeddings\.position_ids"  # the projection into the common space, and a table of 0, 1, 2, ...
GPT2_NAMES = [(r"^(transformer\.)?(h|wte|wpe|ln_f)\b", r"decoder.\2"), (r"^decoder\.h\b", "decoder.blocks"),
              (r"\bln_cross_attn\b", "ln_cross"), (r"\bcrossattention\b", "cross_attn")]
GPT2_UNUSED = r"(transformer\.)?h\.\d+\.(attn|crossattention)\.(masked_)?bias"  # causal masks, stored as buffers
CONV1D = r".*\b(c_attn|q_attn|c_proj|c_fc)\.weight"  # stored as (in, out); a Linear is (out, in)


def clip_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's vision tower under our names; what lies outside of it, the text tower, is left out."""
    prefix = next((p for p in ("visual.", "vision_model.") if any(name.startswith(p) for name in tensors)), "")
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    tower = renamed(inside, CLIP_NAMES, CLIP_UNUSED)
    for name in [name for name in tower if ".attn.q." in name]:  # Hugging Face keeps q, k and v apart
        parts = [tower.pop(name.replace(".q.", f".{part}."), torch.empty(0)) for part in "qkv"]
        tower[name.replace(".q.", ".c_attn.")] = torch.cat(parts)
    return {f"tower.{name}": tensor for name, tensor in tower.items()}


def gpt2_tensors(tensors: dict[str, Tensor], source: Path, names: Sequence[tuple[str, str]] = GPT2_NAMES
                 ) -> dict[str, Tensor]:
    """GPT-2's weights under our names."""
    tensors = {name: tensor.T if re.fullmatch(CONV1D, name) else tensor for name, tensor in tensors.items()}
    head = tensors.pop("lm_head.weight", None)
    decoder = renamed(tensors, names, GPT2_UNUSED)
    if head is not None and not torch.equal(head.float(), decoder.get("decoder.wte.weight", head[:0])):
        raise UserError(f"{source}: lm_head.weight differs from the word embedding; ours are tied")
    return decoder


def tower_sizes(tensors: dict[str, Tensor], source: Path) -> dict[str, int]:
    """The tower's configuration, read off its shapes; CLIP's heads are 64 wide."""
    try:
        width, _, patch, _ = tensors["tower.conv1.weight"].shape
        side = math.isqrt(len(tensors["tower.positional_embedding"]) - 1)
    except (KeyError, ValueError):
        raise UserError(f"{source} holds no CLIP vision transformer") from None
    return dict(image_size=side * patch, patch_size=patch, tower_width=width, tower_heads=max(1, width // 64),
                tower_layers=blocks_of(tensors, "tower"))


def decoder_sizes(tensors: dict[str, Tensor], source: Path) -> dict[str, int]:
    try:
        width, positions = tensors["decoder.wte.weight"].shape[1], len(tensors["decoder.wpe.weight"])
    except (KeyError, IndexError):
        raise UserError(f"{source} holds no GPT-2") from None
    return dict(width=width, positions=positions, heads=max(1, width // 64), layers=blocks_of(tensors, "decoder"))


def blocks_of(tensors: dict[str, Tensor], part: str) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith(f"{part}.blocks.")})
