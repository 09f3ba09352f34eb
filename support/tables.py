"""Tables of text: CSV, JSONL and JSON files as columns. What cannot be used is named with its line, never fatal."""
import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import compress
from pathlib import Path

from support.program import UserError, parse_json, read_text

SUFFIXES = (".csv", ".jsonl", ".json")


@dataclass
class Table:
    """The rows of a file as columns of text, their lines there, and what was wrong with the rows left out."""
    path: Path
    columns: dict[str, list[str]]
    lines: list[int]
    problems: list[str]

    def __getitem__(self, name: str) -> list[str]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, line: int) -> str:
        return f"{self.path.name}, {'entry' if self.path.suffix.lower() == '.json' else 'line'} {line}"

    @property
    def titles(self) -> str:
        """The columns' names, for messages."""
        return ", ".join(name[:30] for name in list(self.columns)[:20]) or "none"

    def need(self, names: Iterable[str]) -> None:
        if lacking := [name for name in names if name not in self.columns]:
            raise UserError(f"{self.path}: no column {', '.join(lacking)} among {self.titles}")

    def drop(self, reasons: Iterable[str | None]) -> None:
        """Leave out each row for which there is a reason."""
        reasons = list(reasons)
        if any(reasons):
            self.problems += [f"{self.place(line)}: {reason}" for line, reason in zip(self.lines, reasons, strict=True)
                              if reason]
            kept = [not reason for reason in reasons]
            self.columns = {name: list(compress(column, kept)) for name, column in self.columns.items()}
            self.lines = list(compress(self.lines, kept))


def read_table(path: Path, label: str) -> Table:
    """A file by its suffix. `label` names a column of few different values, by which rows are told from prose."""
    return read_csv(path, label) if path.suffix.lower() == ".csv" else read_objects(path)


def read_csv(path: Path, label: str) -> Table:
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            lines = file.readlines()
        header = [name.strip() for name in next(csv.reader(lines[:1]), [])]
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except csv.Error as error:
        raise UserError(f"{path}, line 1: {error}") from None
    table = Table(path, {}, [], [])
    cells_of_all: list[str] = []  # in one list: half a million short ones would keep the garbage collector busy
    for first, last, cells in csv_rows(lines, header, label, table):
        if len(cells) == len(header):
            cells_of_all += cells
            table.lines.append(first)
        elif cells:  # an empty line is no row
            table.problems.append(f"{table.place(first)}{f' to {last}' if last > first else ''}: "
                                  f"{len(cells)} columns instead of {len(header)}")
    table.columns = {name: cells_of_all[place::len(header)] for place, name in enumerate(header)}
    return table


def csv_rows(lines: Sequence[str], header: Sequence[str], label: str, table: Table) -> Iterator[tuple]:
    """Each row's first and last line and its cells; a line that cannot be read goes to the table's problems.

    A text between quotes may have several lines. But where one of them is a whole row by itself, a quote was never
    closed and has swallowed rows: its own line is lost, and the lines after it are read once more.
    """
    place = header.index(label) if label in header else 0

    def label_of(line: str) -> str | None:
        """What stands in the column `label`, if the line by itself has the header's columns."""
        cells = next(csv.reader([line]), []) if len(line) < csv.field_size_limit() and "\0" not in line else []
        return cells[place] if len(cells) == len(header) else None

    @cache
    def labels() -> Counter:
        return Counter(map(label_of, lines))

    def is_row(line: str) -> bool:
        found = label_of(line)
        return line.count('"') % 2 == 0 and found is not None and labels()[found] > 1

    first = 1
    while first < len(lines):
        start, reader = first, csv.reader(map(lines.__getitem__, range(first, len(lines))))
        try:
            for cells in reader:
                after = start + reader.line_num
                if after - first > 1 and any(map(is_row, lines[first + 1:after])):
                    raise csv.Error
                yield first + 1, after, cells
                first = after
        except csv.Error as error:  # on more than one line: no closing quote until a row, or the longest field, ended
            count = start + reader.line_num - first
            table.problems.append(
                f"{table.place(first + 1)}: {error}" if count == 1 else
                f"{table.place(first + 1)} to {first + count}: a quote is not closed; its line is lost, and the "
                f"{count - 1} after it are read on their own")
            first += 1


def read_objects(path: Path) -> Table:
    """A list of objects in one JSON file, or an object on each line of a JSONL file."""
    text, table = read_text(path), Table(path, {}, [], [])
    if path.suffix.lower() == ".json":
        objects = parse_json(text, path)
        if not isinstance(objects, list):
            raise UserError(f"{path}: expected a list of objects, one for each row")
        numbered = enumerate(objects, 1)
    else:
        numbered = json_lines(text, table)
    rows = []
    for line, row in numbered:
        if isinstance(row, dict):
            rows.append(row)
            table.lines.append(line)
        else:
            table.problems.append(f"{table.place(line)}: no object with names and values")
    names = dict.fromkeys(name for row in rows for name in row)
    table.columns = {name: [cell(row.get(name)) for row in rows] for name in names}
    return table


def json_lines(text: str, table: Table) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                table.problems.append(f"{table.place(number)}: not JSON")


def cell(value) -> str:
    """A value as text that can be written as UTF-8; nothing for what is no single value."""
    return str(value).encode(errors="replace").decode() if isinstance(value, str | int | float) else ""
