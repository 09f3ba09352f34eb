"""What every program of ours needs: errors for people, whole files or nothing, a progress line, aligned tables."""
import contextlib
import json
import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake that the user can mend: shown as one message, without a traceback."""


def run_program(main: Callable[[], int | None]) -> None:
    """Call a program's `main`; a user's mistake or a full disk ends it with a message, a bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {printable(str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone: no reason to complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder that may not be written
        where = f"{error.filename}: " if error.filename is not None else ""
        sys.exit(f"error: {printable(where)}{error.strerror or error}")


def printable(text: str) -> str:
    """Text without what would steer a terminal: control characters and lone surrogates are spelt out."""
    return "".join(letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs")
                   else letter.encode("unicode_escape").decode() for letter in text)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
        temporary.chmod(0o666 & ~current_umask())  # some writers make their files private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_text(path: str | Path, text: str) -> None:
    """All of a text file or nothing of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: str | Path, content) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None


def parse_json(text: str, path: str | Path, line: int = 1) -> Any:
    """`line` is where the text begins in its file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:  # brackets without end, numbers of 5,000 digits
        raise UserError(f"{path}, line {line}: not JSON that can be read ({first_line(error)})") from None


def read_json(path: str | Path) -> Any:
    return parse_json(read_text(path), path)


def progress(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """Pass `items` on; on a terminal, show count, rate and time left twice a second."""
    total = len(items) if total is None else total
    shown, start, last = sys.stderr.isatty(), time.monotonic(), 0.0
    for count, item in enumerate(items):
        now = time.monotonic()
        if shown and count and now - last > 0.5:
            last, rate = now, count / (now - start)
            left = math.ceil((total - count) / rate)
            line = f"{what} {count:,}/{total:,}  {100 * count // total}%  {rate:.1f}/s"
            print(f"\r{line}  {left // 60}:{left % 60:02} left\x1b[K", end="", file=sys.stderr, flush=True)
        yield item
    if shown and last:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, row, widths)]).rstrip() for name, *row in rows)
