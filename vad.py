"""Words to emotion (in progress; the household part below is final)."""
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend: shown as one message, without a traceback."""


def run_program(main: Callable[[], int | None]) -> None:
    """Call a program's `main`; a UserError ends it with exit code 1, a bug keeps its traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone: no reason to complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` once all is on disk: old or new, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def progress(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """Pass `items` on; on a terminal, show count, rate and time left twice a second."""
    total = len(items) if total is None else total
    shown, start, last = sys.stderr.isatty(), time.monotonic(), 0.0
    for count, item in enumerate(items):
        now = time.monotonic()
        if shown and count and now - last > 0.5:
            last, rate = now, count / (now - start)
            left = int((total - count) / rate)
            line = f"{what} {count:,}/{total:,}  {100 * count // total}%  {rate:.1f}/s  {left // 60}:{left % 60:02} left"
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
        yield item
    if shown and last:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
