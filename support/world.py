"""This process among others, on one machine or several: who it is, what all of them know, and on what it computes.

torchrun numbers the processes: RANK among all WORLD_SIZE of them, LOCAL_RANK among the LOCAL_WORLD_SIZE of their
machine. Machines need not share a disk: what one process has to tell the others goes over the network.
"""
import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from support.device import PRECISIONS, autocast, choose_device, choose_precision
from support.program import printable

LONGEST_WAIT = timedelta(hours=24)  # while one process prepares what the others need


class World:
    """One process out of one, unless torchrun started it."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.device, self.dtype, self.why = torch.device("cpu"), torch.float32, "by default"
        if self.size > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=LONGEST_WAIT)

    @property
    def leads(self) -> bool:
        """Is this the first process of all, the one that writes and speaks?"""
        return self.rank == 0

    def compute_on(self, device: str) -> None:
        """Choose the device: auto, cpu, cuda or mps; each process of a machine takes a GPU of its own."""
        self.device = choose_device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32

    def compute_in(self, precision: str, width: int, before: str = "") -> None:
        """Choose the precision for layers of this width; "auto" keeps the one from `before`, if there was one, or
        measures. What the first process measures holds for all."""
        dtype, why = choose_precision(before if before and precision == "auto" else precision, self.device, width)
        name = next(name for name, one in PRECISIONS.items() if one == dtype)
        name, self.why = self.share([name, why])
        self.dtype = PRECISIONS[name]

    @property
    def precision(self) -> str:
        return next(name for name, dtype in PRECISIONS.items() if dtype == self.dtype)

    @property
    def place(self) -> str:
        """Where and how it computes, for people."""
        others = f" and {self.size - 1} more" * (self.size > 1)
        return f"{self.device}{others}, in {self.precision} ({self.why})"

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.dtype)

    def share(self, content, source: int = 0):
        """What one process has, for all of them; anything that JSON can say."""
        if self.size == 1:
            return content
        text = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        length = torch.tensor([len(text)])
        dist.broadcast(length, source)
        text = text if self.rank == source else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, source)
        return json.loads(text.numpy().tobytes())

    def share_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's tensors, for all of them; what the others pass does not count."""
        if self.size == 1:
            return tensors
        kinds = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()}
        result = {}
        for name, (shape, dtype) in self.share(kinds).items():
            empty = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            result[name] = tensors[name].detach().cpu().contiguous() if self.leads else empty
            dist.broadcast(result[name], 0)
        return result

    def merge(self, mine: dict) -> dict:
        """The union of all processes' dicts, in the order of the processes."""
        parts = [self.share(mine, rank) for rank in range(self.size)]
        return {key: value for part in parts for key, value in part.items()}

    def say(self, text: str) -> None:
        """A line from the first process, in place of one that updates itself."""
        if self.leads:
            print(("\r\x1b[K" if sys.stdout.isatty() else "") + printable(text), flush=True)

    def sum(self, numbers: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def wait(self) -> None:
        """Until every process has come here."""
        self.sum(torch.zeros(1))

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @contextlib.contextmanager
    def first_here(self) -> Iterator[None]:
        """What a machine's first process makes on disk, its others find there.

        The first process of all goes ahead: where machines do share a disk, the work is done once.
        """
        turn = 0 if self.leads else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(2 - turn):
            self.wait()

    def environment(self) -> dict[str, str | int]:
        """Devices, versions and revision: what somebody needs to know who gets other numbers."""
        try:
            revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                                      check=False, cwd=Path(__file__).parent).stdout.strip()
        except OSError:  # there is no git here
            revision = ""
        own = f"{platform.machine()}, {torch.get_num_threads()} threads"
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else own
        return {"device": f"{self.device.type}: {name}", "precision": self.precision, "processes": self.size,
                "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "revision": revision or "unknown"}
