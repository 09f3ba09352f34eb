"""Answers in a file of JSON lines, each with the question that it answers, so that none has to be asked twice."""
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.program import UserError, parse_json

START = b'{"image": '  # of every line


class Journal:
    """The file is only appended to; one with other lines than ours is refused."""

    def __init__(self, path: Path, question: dict[str, Any]):
        self.path, self.question = path, question
        self.answered = {record["image"] for record in self.records()}

    def records(self) -> Iterator[dict]:
        """What the file says on our question; a last line that a kill cut off is taken away."""
        if not self.path.is_file():
            return
        with open(self.path, "rb+") as file:
            whole = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and line[:len(START)] == START[:len(line)]:
                    file.truncate(whole)
                    return
                record = parse_json(line.decode("ascii", "replace"), self.path, number)
                if not isinstance(record, dict) or not {"image", "question"} <= record.keys():
                    raise UserError(f"{self.path}, line {number} was not written by this program; name another file")
                if record["question"] == self.question:
                    yield record
                whole += len(line)

    def append(self, record: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="ascii") as file:
            file.write(json.dumps(record | {"question": self.question}) + "\n")
