"""Settings as dataclasses: each field's default, help and range stand together, and become a flag.

A field made by `option` says what it may be. The same check serves the command line, a resumed run and the
config.json of a checkpoint, so that no way in is more lenient than another.
"""
import argparse
import dataclasses
import math
import operator
from collections.abc import Sequence
from pathlib import Path

from support.program import UserError

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def option(default, help: str, above: float | None = None, least: float | None = None, most: float | None = None,
           below: float | None = None, choices: Sequence[str] = ()):
    """A dataclass field with its help text and what it may be."""
    limits = dict(above=above, least=least, most=most, below=below, choices=tuple(choices))
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check(settings, spelt=flag) -> None:
    """Raise a UserError for the first field of a dataclass that is not what its `option` allows."""
    for field in dataclasses.fields(settings):
        if problem := wrong(field, getattr(settings, field.name)):
            raise UserError(f"{spelt(field.name)} {problem}")


def wrong(field: dataclasses.Field, value) -> str | None:
    """What is wrong with a field's value, if anything is."""
    kind, limits = type(field.default), field.metadata
    if kind in (bool, int, str) and type(value) is not kind or kind is float and type(value) not in (int, float):
        return f"is {value!r}; it must be {KINDS[kind]}"
    if kind in (int, float):
        if isinstance(value, float) and not math.isfinite(value):
            return f"is {value}; it must be a finite number"
        for name, words, right in (("above", "above", operator.gt), ("least", "at least", operator.ge),
                                   ("most", "at most", operator.le), ("below", "below", operator.lt)):
            if limits.get(name) is not None and not right(value, limits[name]):
                return f"is {str(value)[:20]}; it must be {words} {limits[name]}"
    if limits.get("choices") and value not in limits["choices"]:
        return f"is {value!r}; there are {', '.join(limits['choices'])}"
    return None


def add_flags(parser: argparse.ArgumentParser, title: str, kind: type, preset: dict | None = None,
              preset_name: str = "toy") -> None:
    """A flag for each field of a dataclass made of options; only those that are named end up in the result."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(kind):
        if "help" not in field.metadata:
            continue
        default, own = field.default, (preset or {}).get(field.name, field.default)
        also = f"; {preset_name}: {own}" if own != default else ""
        text = f"{field.metadata['help']} (default: {default}{also})" if default != "" else field.metadata["help"]
        how = (dict(action=argparse.BooleanOptionalAction) if isinstance(default, bool)
               else dict(type=type(default), metavar="N" if isinstance(default, int) else "X"))
        group.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **how)


def given(options: argparse.Namespace, kind: type) -> dict:
    """The fields of a dataclass that were named on the command line."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(kind) if field.name in options}


def restored(kind: type, values, source: str | Path):
    """A dataclass from what a file says, or an error that names the file."""
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected names and values of {kind.__name__}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - known.keys()):
        raise UserError(f"{source} has settings that this version does not know: {', '.join(unknown)}")
    for name, value in values.items():
        if problem := wrong(known[name], value):
            raise UserError(f"{source}: {name} {problem}")
    return kind(**values)
