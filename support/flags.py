"""Which flags were named, which have no effect together, and which may change while a run is stopped."""
import argparse
from collections.abc import Collection, Mapping
from pathlib import Path

from support.program import UserError
from support.settings import flag


def named_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict:
    """Those that differ from their defaults."""
    return {name: value for name, value in vars(options).items() if value != parser.get_default(name)}


def refuse_nonsense(named: Mapping, needs: Mapping[str, str], goes_with: Mapping[str, Collection[str]],
                    not_with: Mapping[str, Collection[str]]) -> None:
    """`needs`: a flag without effect unless another is named; `goes_with`: all that may be named beside a flag;
    `not_with`: what may not."""
    for name in named:
        if needs.get(name, name) not in named:
            raise UserError(f"{flag(name)} has no effect without {flag(needs[name])}")
        strangers = named.keys() - goes_with.get(name, named) - {name} | named.keys() & not_with.get(name, ())
        if strangers:
            raise UserError(f"{', '.join(map(flag, sorted(strangers)))} has no effect with {flag(name)}; "
                            "leave one of them out")


def refuse_contradiction(named: Mapping, known: Mapping, movable: Collection[str], folder: Path) -> None:
    """A run goes on as it began; only what is movable may change."""
    for name, value in named.items():
        if name in known and name not in movable and value != known[name]:
            raise UserError(f"{flag(name)} {value} contradicts {folder}, which began with {known[name]}; "
                            "leave it out, or start another --name")
