"""An array on disk with one entry for each item, filled once, by any number of processes, and stopped at any moment.

The file holds a mark for each entry, then the entries. A mark is a digest of the entry's stamp, a text that says what
the entry is made from. An entry counts as done while its mark is that of the stamp wanted now, so an item that has
changed is made anew, and so is everything in a file of another origin.
"""
import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from support.program import UserError, replacing

MARK = 16  # bytes


class Store:
    """Nothing is kept open: each read and each write opens the file, so worker processes get a path, not an array."""

    def __init__(self, path: Path, stamps: Sequence[str], shape: tuple[int, ...], dtype, what: str):
        self.path, self.shape, self.dtype, self.what = Path(path), tuple(shape), np.dtype(dtype), what
        made = f"{self.shape} {self.dtype} "
        marks = b"".join(hashlib.sha256((made + stamp).encode(errors="replace")).digest()[:MARK] for stamp in stamps)
        self.marks = np.frombuffer(marks, np.uint8).reshape(-1, MARK)
        self.entry_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        size = len(self.marks) * (MARK + self.entry_bytes)
        if not self.path.is_file() or self.path.stat().st_size != size:
            self.allocate(size)

    def allocate(self, size: int) -> None:
        """An empty store that has its space: a disk that is too small is known now, not after hours."""
        with replacing(self.path) as temporary, open(temporary, "wb") as file:
            try:
                reserve(file, size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                free = shutil.disk_usage(self.path.parent).free
                raise UserError(f"{self.path} needs {size / 1e9:.2f} GB for {self.what}, and {free / 1e9:.2f} GB are "
                                "free there. Make room, or name another folder with --cache") from None

    def place(self, index: int) -> int:
        """Where an entry begins."""
        return len(self.marks) * MARK + int(index) * self.entry_bytes

    @property
    def done(self) -> np.ndarray:
        """(P,) which entries are there, as the file says now: other processes may be filling it."""
        with open(self.path, "rb") as file:
            stored = np.frombuffer(file.read(self.marks.size), np.uint8)
        return (stored.reshape(self.marks.shape) == self.marks).all(1)

    def missing(self, part: int = 0, parts: int = 1) -> np.ndarray:
        """What one of `parts` processes has to fill. Parts are cut by index, so they do not depend on when one asks."""
        indices = np.flatnonzero(~self.done)
        return indices[indices % parts == part]

    def put(self, indices: Sequence[int], entries: np.ndarray) -> None:
        """Fill entries. What was there before is no longer marked, and what comes is marked once it is on the disk."""
        entries = np.ascontiguousarray(entries, self.dtype)
        if entries.shape != (len(indices), *self.shape):
            raise ValueError(f"entries are {entries.shape}, not {(len(indices), *self.shape)}")
        with open(self.path, "r+b") as file:
            self.mark(file, indices, np.zeros_like(self.marks))
            for index, entry in zip(indices, entries, strict=True):
                file.seek(self.place(index))
                file.write(entry.data)
            file.flush()
            os.fsync(file.fileno())
            self.mark(file, indices, self.marks)

    @staticmethod
    def mark(file: BinaryIO, indices: Sequence[int], marks: np.ndarray) -> None:
        for index in indices:
            file.seek(int(index) * MARK)
            file.write(marks[index].data)
        file.flush()
        os.fsync(file.fileno())

    def get(self, indices: Sequence[int]) -> np.ndarray:
        """Entries in the order asked for, each read whole and in one go, in one sweep over the disk."""
        entries = np.empty((len(indices), *self.shape), self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing beyond an entry is read ahead
            for row in np.argsort(indices):
                file.seek(self.place(indices[row]))
                if file.readinto(entries[row].data) != self.entry_bytes:
                    raise UserError(f"{self.path} has been cut short; delete it to have it made anew")
        return entries


def stamp(file: Path | None) -> str:
    """Of a file that an entry is made from: changes when the file does."""
    try:
        status = os.stat(file or "")
    except OSError:
        return "no such file"
    return f"{os.path.abspath(file)} {status.st_size} {status.st_mtime_ns}"


def reserve(file: BinaryIO, size: int) -> None:
    """Give an open file its size with space on the disk, by writing zeros where the system cannot just allocate it."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    zeros = bytes(2**20)
    file.writelines(zeros[:size - start] for start in range(0, size, len(zeros)))
    file.flush()
