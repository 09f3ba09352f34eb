"""Where to compute and in which precision, chosen by what the machine has and by measurement."""
import ctypes
import re
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from support.program import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
NARROW = 256  # below, changing types takes longer than the products save
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


def choose_device(name: str) -> torch.device:
    """Where to compute; a CPU's memory is made ready for it."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind, usable in there.items() if usable]
    if name == "auto":
        name = available[0]
    if name not in available:
        raise UserError(f"--device {name}: this machine has {' and '.join(available)}")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: given back to the system, it is cleared before the next step has it again.

    Two cores spent 1.1 s of 3.1 s there in a training step of the paper's size (bf16). A sixth more memory is held.
    """
    if sys.platform == "linux":
        allocator = ctypes.CDLL(None)
        if hasattr(allocator, "mallopt"):  # other C libraries have none
            allocator.mallopt(M_TRIM_THRESHOLD, -1)
            allocator.mallopt(M_MMAP_MAX, 0)


def choose_precision(name: str, device: torch.device, width: int) -> tuple[torch.dtype, str]:
    """The type to compute layers of this width in, and the reason."""
    if name != "auto":
        slow = name == "fp16" and device.type == "cpu"
        return PRECISIONS[name], "as asked; slow on a CPU" if slow else "as asked"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:  # is_bf16_supported() is also True where it is emulated
            return torch.bfloat16, "this GPU has it"
        return torch.float16, "with loss scaling: this GPU has no bf16"
    if device.type == "cpu" and width < NARROW:
        return torch.float32, "narrow layers gain nothing"
    if device.type == "cpu":
        gain = bf16_gain(width)
        return (torch.bfloat16, f"{gain:.1f}x as fast here") if gain > 1.1 else (torch.float32, f"bf16 is {gain:.1f}x")
    return torch.float32, f"on {device.type}"


@torch.no_grad()
def bf16_gain(width: int, rows: int = 64) -> float:
    """How many times as fast an MLP's two matrix products are in bf16, by the best of three in each type.

    The types take turns, so that what else the machine does meets both; as in a step, weights are converted once.
    """
    x, rise, fall = torch.ones(rows, width), torch.ones(4 * width, width), torch.ones(width, 4 * width)
    weights = {dtype: (rise.to(dtype), fall.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(weights, float("inf"))
    for _ in range(3):
        for dtype, (up, down) in weights.items():
            start = time.perf_counter()
            F.linear(F.linear(x.to(dtype), up), down)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def held_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """For answering: matrices of tower and decoder in the type that autocast would convert them to for every batch.

    At the paper's size a picture is answered 12% faster. Norms, positions and heads stay in float32, and so does what
    passes from block to block.
    """
    for name, layer in model.named_modules():
        if re.fullmatch(r"(tower|decoder)\.(.*\.)?(conv1|wte|c_attn|q_attn|c_fc|c_proj)", name):
            layer.to(dtype)
    return model


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_memory(device: torch.device) -> float:
    """GB: on the GPU, or of this process; nan where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
