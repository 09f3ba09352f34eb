"""Pictures: found under names of any spelling, opened safely, cut to a square of pixels."""
import glob
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from support.program import UserError, first_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # of Pillow's others, some start programs (Ghostscript)
MOST_PIXELS = 40_000_000


class BadPicture(Exception):
    """A picture that cannot be used, and why."""


def open_picture(source, side: int) -> Image.Image:
    """A picture file or stream as RGB, upright, alpha over white; JPEGs are decoded at a scale near twice `side`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of size: the next line refuses
            image = Image.open(source, formats=FORMATS)
        refuse_above(image.width, image.height)
        image.draft(image.mode, (2 * side, 2 * side))
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = Image.fromarray(eight_bits(image))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except BadPicture:
        raise
    except FileNotFoundError:
        raise BadPicture("no such file") from None
    except UnidentifiedImageError:  # its own message carries the whole path
        raise BadPicture("no picture, or of another kind than " + ", ".join(FORMATS)) from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise nearly anything on broken files
        raise BadPicture(f"{type(error).__name__}: {first_line(error)[:100]}") from None


def refuse_above(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise BadPicture(f"{width} x {height} pixels are too many")


def eight_bits(image: Image.Image) -> np.ndarray:
    """Grey values of more than 8 bits as bytes. What is white follows from their type, not from the brightest one, so
    that a dark picture stays dark; floats and 32-bit integers have the smallest usual range that they fit into."""
    grey = np.asarray(image, np.float32)
    if image.mode.startswith("I;16"):
        white = 2**16 - 1
    else:
        brightest = grey[np.isfinite(grey)].max(initial=0)
        usual = (1, 2**8 - 1, 2**16 - 1, 2**31 - 1)[image.mode == "I":]
        white = next((limit for limit in usual if brightest <= limit), usual[-1])
    return np.nan_to_num(grey * (255 / white)).clip(0, 255).astype(np.uint8)


def squared(image: Image.Image, side: int, crop: bool, resample: Image.Resampling) -> Tensor:
    """uint8 pixels (3, side, side): the whole picture squashed, or its central square.

    Bit for bit what torchvision's transforms give; to import those would take as long as all else at a start.
    """
    width, height = image.size
    short = min(width, height)
    size = (side * width // short, side * height // short) if crop else (side, side)
    refuse_above(*size)  # a line of 40 million pixels would become a band of `side` as many lines
    image = image.resize(size, resample)
    left, top = (round((length - side) / 2) for length in size)
    image = image.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def spelling(name: str) -> str:
    """A file name with its escapes (#U00e9, and \\u0142 beyond Latin-1) resolved, in composed form."""
    if "#U" in name or "\\u" in name:
        name = re.sub(r"(?:#U|\\u)([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), name)
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def index_pictures(folder: Path) -> dict[str, list[Path]]:
    """The pictures in a folder and in its folders: spelling of "name" or "folder/name", without suffix, -> files.

    The first of several files of one name is the one to use: they are sorted. A name that was wrongly decoded on its
    way into an annotation file (UTF-8 read as Latin-1, then lower case: é -> Ã© -> ã©) finds its file too.
    """
    files: dict[str, list[Path]] = {}
    mistaken: dict[str, list[Path]] = {}
    for inside, file in sorted(pictures_in(folder)):
        name, path = spelling(os.path.splitext(file)[0]), Path(folder, inside, file)
        files.setdefault(spelling(inside) + name, []).append(path)
        forms = () if name.isascii() else {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
        for form in forms:
            wrong = form.encode(errors="replace").decode("latin-1").lower()
            mistaken.setdefault(spelling(inside + wrong), []).append(path)
    return mistaken | files


def pictures_in(folder: Path) -> Iterable[tuple[str, str]]:
    """Folder ("name/" or nothing) and name of each picture."""
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from ((f"{entry.name}/", inner) for inner in os.listdir(entry) if is_picture(inner))
        elif is_picture(entry.name):
            yield "", entry.name


def is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def picture_files(arguments: Sequence[str]) -> list[Path]:
    """The files that names, folders and patterns stand for, each once, in order."""
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if is_picture(file.name))
        else:
            inside = [path] if path.exists() else sorted(map(Path, glob.glob(argument, recursive=True)))
        if not inside:
            raise UserError(f"no pictures in {argument}" if path.is_dir() else f"no such file: {argument}")
        found += inside
    return list(dict.fromkeys(found))
