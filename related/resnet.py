"""ResNet-34, the eyes of Table 1's two-stage systems, and the pictures that it is given.

    1. Pictures         squashed to a square, stored once, normalised
    2. The network      without its last two layers: a feature map          (B, 3, S, S) -> (B, C, g, g)
    3. Feature maps     of a network that does not learn, stored once

Shapes: B pictures of side S, g = S / 32 the side of the feature map, C = 512 channels, P = g * g pixels of the map.
"""
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet34

from data import Art, stamp
from related.training import Machine, gflop_of, parameters_of, seconds_of
from support.files import find_file, load_checked, read_tensors
from support.pictures import BadPicture, open_picture, squared
from support.program import progress
from support.store import Store

# 1. Pictures

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def squash(image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Tensor:
    """All of the picture in a square, whatever its shape: uint8 (3, S, S)."""
    return squared(image.convert("RGB"), side, crop=False, resample=resample)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (..., 3, S, S) to floats with ImageNet's mean and deviation as 0 and 1."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels / 255 - mean) / std


@dataclass
class Pictures:
    """What a model is given of each painting, on disk: pixels, or a feature map."""
    store: Store
    usable: np.ndarray  # (P,) is there a picture that can be read?
    parameters: int = 0  # of the network that made the feature map
    gflop: float = 0.0  # what it cost for each picture
    seconds: float = 0.0  # and on this machine

    def of(self, paintings, device: torch.device) -> Tensor:
        return torch.from_numpy(self.store.get(np.asarray(paintings))).to(device, non_blocking=True)


def squashed_pictures(art: Art, side: int) -> Pictures:
    """Every painting's pixels (3, S, S), as far as its picture can be used."""
    store = Store(art.folder / "cache" / f"{art.name}-squashed-{side}.store", [f"squashed {stamp(file)}" for file in
                  art.files], (3, side, side), np.uint8, f"pictures of {side} x {side} pixels")

    def load(painting: int) -> np.ndarray | str:
        try:
            return squash(open_picture(art.files[painting] or "", side), side).numpy()
        except BadPicture as problem:
            return str(problem)

    missing, problems = store.missing(), {}
    with ThreadPoolExecutor() as pool:
        for part in progress(np.array_split(missing, 1 + len(missing) // 64), "pictures, x64"):
            loaded = dict(zip(part.tolist(), pool.map(load, part), strict=True))
            problems |= {painting: why for painting, why in loaded.items() if isinstance(why, str)}
            if good := [painting for painting in loaded if painting not in problems]:
                store.put(good, np.stack([loaded[painting] for painting in good]))
    if problems:
        first = min(problems)
        print(f"{len(problems):,} pictures cannot be used, such as {art.names[first]}: {problems[first]}")
    return Pictures(store, np.array([painting not in problems for painting in range(len(art.names))]))


# 2. The network

LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")  # of torchvision's ResNet


def trunk(released: int = 0, layers: int = len(LAYERS)) -> nn.Sequential:
    """ResNet-34 up to its last feature map (B, C, g, g), random; its layers before `released` are frozen."""
    resnet = resnet34()
    found = nn.Sequential(*(getattr(resnet, name) for name in LAYERS[:layers]))
    found[:released].requires_grad_(False)
    return found


def load_resnet(layers: nn.Sequential, source: str, flag: str = "--weights") -> None:
    """ImageNet's weights under torchvision's names, which timm's files use too."""
    path = find_file(source, ["model.safetensors", "pytorch_model.bin", "resnet34-b627a593.pth"], flag)
    places = {name: str(place) for place, name in enumerate(LAYERS[:len(layers)])}
    named = (name.partition(".") + (tensor,) for name, tensor in read_tensors(path).items())
    tensors = {f"{places[first]}.{rest}": tensor for first, _, rest, tensor in named if first in places}
    load_checked(layers, tensors, str(path), optional=r".*\.num_batches_tracked")


def pixels_of(feature_map: Tensor, pool_to: int | None = None) -> Tensor:
    """(B, C, g, g), pooled to another side if asked, to pixels row by row: (B, P, C)."""
    if pool_to:
        feature_map = F.adaptive_avg_pool2d(feature_map, pool_to)
    return feature_map.flatten(2).transpose(1, 2)


# 3. Feature maps

def feature_maps(art: Art, trunk: nn.Sequential, side: int, machine: Machine) -> Pictures:
    """The pixels of every painting's map, (P, C) fp16."""
    pictures, trunk = squashed_pictures(art, side), trunk.eval().to(machine.device)
    digest = hashlib.sha256()
    for tensor in trunk.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    made = f"resnet {digest.hexdigest()[:16]} of {side}"

    @torch.no_grad()
    def encode(paintings: np.ndarray) -> np.ndarray:
        with machine.autocast():
            maps = trunk(normalise(pictures.of(paintings, machine.device)))
        return pixels_of(maps).half().cpu().numpy()

    some = np.flatnonzero(pictures.usable)[:16]
    stamps = [f"{made} {mark.tobytes().hex()}" for mark in pictures.store.marks]  # changed pictures have other marks
    store = Store(art.folder / "cache" / f"{art.name}-{made.replace(' ', '-')}.store", stamps,
                  encode(some[:1]).shape[1:], np.float16, "feature maps")
    missing = np.flatnonzero(pictures.usable & ~store.done)
    for part in progress(np.array_split(missing, 1 + len(missing) // 64), "feature maps, x64"):
        if len(part):
            store.put(part, encode(part))
    return Pictures(store, pictures.usable, parameters_of(trunk), gflop_of(lambda: encode(some[:1])),
                    seconds_of(lambda: encode(some)) / len(some))
