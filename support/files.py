"""Other people's weights: found on disk or on the hub, read without running code, every tensor accounted for."""
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from support.program import UserError, first_line

PATIENCE = 5  # seconds for the hub to answer


def is_hub_id(source: str | Path) -> bool:
    """`owner/name`, and no path that was meant: neither it nor its first part is there."""
    owner, *rest = str(source).split("/")
    return len(rest) == 1 and not Path(owner).exists() and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)))


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
    if not is_hub_id(source):
        raise UserError(f"{flag} {source}: there is no such file or folder")
    return fetch(str(source), names, flag)


def fetch(repository: str, names: Sequence[str], flag: str) -> Path:
    """The first of `names` that a hub repository has; what has been fetched once needs no network."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    try:
        for name in names:
            if isinstance(cached := try_to_load_from_cache(repository, name), str):
                return Path(cached)
        knock()
        for name in names:
            try:
                return Path(hf_hub_download(repository, name, etag_timeout=PATIENCE))
            except LocalEntryNotFoundError:  # unreachable
                raise
            except EntryNotFoundError as error:  # reachable, but no such file there: try the next
                reason = error
    except Exception as error:  # noqa: BLE001 - offline, no such repository, gated, ...: many types, one remedy
        reason = error
    raise UserError(f"cannot fetch {' or '.join(names)} from {repository}: {first_line(reason)}\nDownload it from "
                    f"https://huggingface.co/{repository} and name its folder with {flag}")


def fetch_folder(repository: str, patterns: Sequence[str]) -> Path:
    """A hub repository's files of these names; without a network, those that have been fetched."""
    from huggingface_hub import snapshot_download
    try:
        knock()
        unreachable = False
    except OSError:
        unreachable = True
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=unreachable))
    except Exception as error:  # noqa: BLE001 - as above
        raise UserError(f"the hub did not give {repository}: {first_line(error)}") from None


def knock() -> None:
    """An OSError where no hub answers: its library would try for half a minute, but not where told to stay offline."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE:
        return
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=PATIENCE).close()
    except HTTPError:
        pass  # an answer


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The content of a .safetensors file, or of a .pt, .bin or .tar file, of which no code is run."""
    from safetensors.torch import load_file
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - each library has its own types for a truncated or foreign file
        raise UserError(f"{path} is truncated or no file of weights: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights by name")
    return content


def renamed(tensors: dict[str, Tensor], table: Iterable[tuple[str, str]], unused: str = "") -> dict[str, Tensor]:
    """Tensors under our names in float32, without those that are unused; unknown names stay and will be reported."""
    result = {}
    for name, tensor in tensors.items():
        if not re.fullmatch(unused, name):
            for pattern, replacement in table:
                name = re.sub(pattern, replacement, name)
            result[name] = tensor.float().contiguous()
    return result


def load_checked(module: nn.Module, tensors: dict[str, Tensor], source: str, optional: str = "") -> None:
    """Load tensors, each in its place and of its shape, or name all that do not fit in one error."""
    expected = module.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in tensors and not re.fullmatch(optional, name)]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]
    problems += [f"misshapen: {name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
                 for name, tensor in tensors.items() if name in expected and tensor.shape != expected[name].shape]
    if problems:
        raise UserError(f"{source}: {len(problems)} tensors do not fit\n  " + "\n  ".join(problems))
    module.load_state_dict(tensors, strict=False, assign=True)  # no copy: files are mapped into memory


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, or GPT-2's vocab.json and merges.txt."""
    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        return byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # noqa: BLE001 - `tokenizers` raises plain Exception
        raise UserError(f"{folder} holds no tokenizer.json, nor vocab.json and merges.txt, that can be read: "
                        f"{first_line(error)}") from None


def byte_level(bpe: models.BPE) -> Tokenizer:
    """A tokenizer that cuts and joins text as GPT-2's does."""
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer
