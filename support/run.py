"""A run: a folder that is made whole, used by one program at a time, and gone on with from its last saved state.

    NAME/                     what the run is for: its results, as its program names them
    NAME/log.jsonl, ...       logs, which are only ever appended to
    NAME/state/               what going on needs, and nobody else: plan.json, state.safetensors, and a lock
    NAME/.gitignore           keeps the state, and what else is private, from being published with the rest
"""
import contextlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from support.program import UserError, first_line, parse_json, read_json, replacing, write_json, write_text

LOGS = ("log.jsonl", "samples.jsonl")


def make_folder(folder: Path, files: Mapping[str, str | dict], numbered: bool = False) -> Path:
    """A folder with these files, of text or JSON, or none: of two programs that want a name one gets it.

    `numbered`: if the name is taken, it is followed by -2, -3, ...
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            (write_text if isinstance(content, str) else write_json)(temporary / name, content)
        for number in itertools.count(1):
            wanted = folder.with_name(f"{folder.name}-{number}") if number > 1 else folder
            try:
                return temporary.rename(wanted)
            except OSError:  # renaming fails where there is a file, or a folder with files
                if not wanted.exists():
                    raise
                if not numbered:
                    raise UserError(f"{folder} is there already; name another one") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def json_lines(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


class Run:
    """A run's folder. Of several processes one writes; for the others `writes` is False and nothing happens."""

    def __init__(self, folder: Path, writes: bool = True):
        self.folder, self.writes = folder, writes

    @classmethod
    def begin(cls, folder: Path, plan: dict, private: Sequence[str] = (), numbered: bool = False) -> "Run":
        """A new folder that knows what is to be done in it."""
        files = {"state/plan.json": plan, ".gitignore": "".join(f"/{name}\n" for name in ("state/", *private))}
        return cls(make_folder(folder, files, numbered))

    @property
    def plan_file(self) -> Path:
        return self.folder / "state" / "plan.json"

    @property
    def state_file(self) -> Path:
        return self.folder / "state" / "state.safetensors"

    @property
    def results_file(self) -> Path:
        return self.folder / "results.json"

    @property
    def begun(self) -> bool:
        return self.plan_file.is_file()

    @property
    def finished(self) -> bool:
        return self.results_file.is_file()

    def plan(self) -> dict:
        if not self.begun:
            raise UserError(f"--resume: {self.folder} holds no run to go on with")
        plan = read_json(self.plan_file)
        if not isinstance(plan, dict):
            raise UserError(f"{self.plan_file} is damaged; this run cannot go on, start another")
        return plan

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other programs out. The system lets go of a lock when its owner dies, however it dies."""
        if not self.writes:
            yield
            return
        with open(self.folder / "state" / "lock", "a") as file:
            try:
                take_lock(file.fileno())
            except (BlockingIOError, PermissionError):
                raise UserError(f"{self.folder} is in use by another program") from None
            yield

    def append(self, log: str, *records: dict) -> None:
        """A line for each record, written at once."""
        if self.writes:
            with open(self.folder / log, "a", encoding="utf-8") as file:
                file.write(json_lines(records))

    def records(self, log: str) -> list[dict]:
        path = self.folder / log
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        try:
            return [parse_json(line, path, number) for number, line in enumerate(lines, 1)]
        except UserError as error:
            raise UserError(f"{error}; nothing but the report needs that line: delete it") from None

    def save_state(self, tensors: dict[str, Tensor], position: dict) -> None:
        """Tensors, position and the length of each log in one file, so that they always belong together."""
        if not self.writes:
            return
        sizes = {log: (self.folder / log).stat().st_size for log in LOGS if (self.folder / log).is_file()}
        with replacing(self.state_file) as path:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path,
                      {"position": json.dumps(position), "sizes": json.dumps(sizes)})

    def position(self) -> dict:
        """The last one that was saved, or nothing; the logs are cut back to it."""
        about = self.read_state(lambda file: {name: json.loads(file.metadata()[name])
                                              for name in ("position", "sizes")})
        if self.writes:
            self.cut_logs(about.get("sizes", {}))
        return about.get("position", {})

    def tensors(self) -> dict[str, Tensor]:
        """Those that belong to it."""
        return self.read_state(lambda file: {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    def read_state(self, read: Callable) -> dict:
        if not self.writes or not self.state_file.is_file():
            return {}
        try:
            with safe_open(self.state_file, "pt") as file:
                return read(file)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{self.state_file} is damaged ({first_line(error)}); delete it, and --resume "
                            "trains from the beginning") from None

    def cut_logs(self, sizes: dict[str, int]) -> None:
        """Back to the length they had, or to the last whole line before it."""
        for path in (self.folder / log for log in LOGS):
            if path.is_file():
                kept = path.read_bytes()[:sizes.get(path.name, 0)]
                os.truncate(path, kept.rfind(b"\n") + 1)


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained weights, and what the optimizer remembers of them, by name."""
    tensors = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    for index, memory in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in memory.items()}
    return tensors


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `tensors_of` gave; nothing, if there is nothing."""
    weights, memory = {}, {}
    for name, tensor in tensors.items():
        owner, rest = name.split(".", 1)
        if owner == "model":
            weights[rest] = tensor
        else:
            index, key = rest.split(".")
            memory.setdefault(int(index), {})[key] = tensor
    model.load_state_dict(model.state_dict() | weights)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": memory})


def take_lock(file: int) -> None:
    """An OSError if another process has it. Unlike flock's, these locks are not inherited by child processes."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def newest_unfinished(folder: Path, wanted: Callable[[dict], bool]) -> Run:
    """The run under a folder that has no results yet, and whose plan is a wanted one."""
    plans = sorted(folder.glob("*/state/plan.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    runs = (Run(path.parents[1]) for path in plans if not path.parents[1].name.startswith("."))
    found = next((run for run in runs if not run.finished and wanted(run.plan())), None)
    if found is None:
        raise UserError(f"--resume: {folder} holds no run that is not finished")
    return found


@contextlib.contextmanager
def stop_requests(tell: Callable[[str], None]) -> Iterator[Event]:
    """Ctrl-C, SIGTERM and SIGHUP set the event, for a loop to stop after its step; a second Ctrl-C does not wait.

    What is ignored stays so: that is what `nohup` is for.
    """
    asked = Event()

    def ask(number: int, frame) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
        with contextlib.suppress(RuntimeError):  # print was interrupted in the middle of printing
            tell("stopping after this step; Ctrl-C again stops at once")

    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: two
    heard = [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
