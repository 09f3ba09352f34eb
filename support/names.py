"""Names of pictures: the files that they mean, and which of many pictures a name in somebody's list means."""
import os
import posixpath
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from support.pictures import SUFFIXES, index_pictures, is_picture, spelling
from support.program import UserError, printable

LISTED = 20


def files_of(names: Sequence[str], folder: Path) -> tuple[list[Path | None], list[str]]:
    """Each name's file, by its path or under any spelling that index_pictures knows; and where there was a choice."""
    files = [path if os.path.isfile(path := folder / name) else None for name in names]
    index = index_pictures(folder) if None in files else {}
    choices = []
    for place, name in enumerate(names):
        name = posixpath.splitext(name)[0] if is_picture(name) else name
        if files[place] is None and (found := index.get(spelling(name))):
            files[place] = found[0]
            if len(found) > 1:
                choices.append(f"{name} has {len(found)} files: {found[0].name} is used")
    return files, choices


def pictures_meant(names: Iterable[str], known: Mapping[str, str], source: Path) -> dict[str, str]:
    """Which of the `known` pictures (an id and a file name each) names mean, with or without folders and suffix.

    Those that mean none or several are listed on stderr.
    """
    by_file = defaultdict(set)
    for picture, file in known.items():
        for parts in {path_parts(picture), path_parts(file)}:
            by_file[parts[-1]].add((parts, picture))
    found, lost = {}, []
    for name in names:
        parts = path_parts(name)
        fitting = {picture for others, picture in by_file.get(parts[-1], ())
                   if all(a == b for a, b in zip(reversed(parts), reversed(others), strict=False))}
        if name in known:
            found[name] = name
        elif len(fitting) == 1:
            found[name] = fitting.pop()
        else:
            lost.append(f"{name} (it could be {' or '.join(sorted(fitting)[:3])})" if fitting else name)
    if not found:
        raise UserError(f"{source}: the references have none of its {len(lost)} images, such as {lost[0]}")
    if lost:
        title = f"{source}: {len(lost)} names fit no image of the references, or several:"
        print(printable("\n  ".join([title, *first_few(lost)])), file=sys.stderr)
    return found


def path_parts(name: str) -> tuple[str, ...]:
    """Folders and file of a picture's name, in one spelling and without a picture's suffix."""
    stem, suffix = os.path.splitext(spelling(name))
    return tuple((stem if suffix.lower() in SUFFIXES else stem + suffix).split("/"))


def first_few(items: Sequence[str]) -> list[str]:
    """As many as one reads, and how many more there are."""
    more = len(items) - LISTED
    return [*items[:LISTED], f"... and {more:,} more"] if more > 0 else list(items)
