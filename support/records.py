"""Records of JSON files, checked: what is wrong is said in one line, with the file and the place in it."""
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from support.program import UserError, parse_json, read_text


def json_records(path: Path) -> list[tuple[str, Any]]:
    """Where each record is, and the record: of a JSON list, or of a file with JSON on every line."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return [(f"{path}, entry {number}", record) for number, record in enumerate(parse_json(text, path), 1)]
    return [(f"{path}, line {number}", parse_json(line, path, number))
            for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def objects_in(records: Any, identity: str, where: str) -> Iterator[tuple[str, dict]]:
    """Where each object of a list is, and the object, which has to have an identity."""
    if not isinstance(records, list):
        raise UserError(f"{where}s: expected a list")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or type(record.get(identity)) not in (str, int):
            raise UserError(f"{where} {number}: expected an object with {identity}")
        yield f"{where} {number}", record


def text_in(record: dict, name: str, where: str) -> str:
    if not isinstance(record.get(name), str):
        raise UserError(f"{where}: {name} is {short(record.get(name))}; it must be text")
    return record[name].strip()


def texts_in(record: Any, name: str, where: str) -> list[str]:
    texts = record.get(name) if isinstance(record, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {name} must be a list of texts")
    return texts


def numbers_by_name(values: Any, names: Sequence[str], where: str, in_order: bool = False) -> dict[str, float]:
    """A number for each name, 0 or more; 0 for a name that is not there. A list of them is taken only `in_order`."""
    if in_order and isinstance(values, list) and len(values) == len(names):
        values = dict(zip(names, values, strict=True))
    if not isinstance(values, dict) or not values.keys() <= set(names):
        raise UserError(f"{where}: expected a number for each of {', '.join(names)}, by name")
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 <= value <= 1e9:  # nan is not either
            raise UserError(f"{where}: {name} is {short(value)}; it must be a number, 0 or more")
    return {name: float(values.get(name, 0)) for name in names}


def finite_only(value: Any) -> Any:
    """The same with null for nan and the infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite_only(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_only(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(value: Any) -> str:
    return json.dumps(value)[:40]
