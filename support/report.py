"""What a long computation tells: a line while it runs, and tables, curves and cards on the page that remains."""
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np

from support.pages import bar_chart, bars, chart, data_uri, escape, fill, matrix, page, table
from support.pictures import BadPicture, open_picture
from support.scores import Scores, bootstrap, pooled


class Meter:
    """A line that updates: numbers smoothed over some twenty steps, the speed since the start, the time left."""

    def __init__(self, step: int, total: int, items: int, what: str, shown: bool = True):
        """`items` of something are dealt with in each step, the first of which follows `step`."""
        self.first, self.total, self.items, self.what, self.shown = step, total, items, what, shown
        self.begun = self.last = time.monotonic()
        self.live, self.smooth, self.rate = sys.stdout.isatty(), {}, 0.0

    def note(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shown five times a second on a terminal, else every ten seconds."""
        now = time.monotonic()
        self.smooth |= {name: 0.95 * self.smooth.get(name, value) + 0.05 * value for name, value in numbers.items()
                        if math.isfinite(value)}
        self.rate = (step - self.first) * self.items / max(now - self.begun, 1e-9)
        if self.shown and now - self.last > (0.2 if self.live else 10):
            self.last, left = now, timedelta(seconds=round((self.total - step) * self.items / self.rate))
            told = "  ".join(f"{name} {value:.3f}" for name, value in self.smooth.items())
            text = (f"step {step:,}/{self.total:,}  {100 * step // self.total}%  {told}  "
                    f"{self.rate:.0f} {self.what}/s  {left} left")
            print(f"\r{text}\x1b[K" if self.live else text, end="" if self.live else "\n", flush=True)


# The page of a result

def results_page(title: str, remarks: Sequence[str], scores: Sequence[Sequence[str]], names: Sequence[str],
                 confusion: Sequence[Sequence[int]], settings: Mapping, training: str = "") -> str:
    """One page that needs nothing else. `confusion` has a row for each name; a last column may count none of them."""
    said = [*names, "none"][:len(confusion[0])]
    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for line in remarks),
            "<h2>Test scores</h2>", table(scores), training,
            "<h2>What was right, and what the model said</h2>", matrix(names, said, confusion, "right ↓ said →"),
            "<h2>Settings</h2>", table([["setting", "value"], *settings.items()], "settings")]
    return page(title, "".join(body))


def smoothed(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbourhood."""
    parts = np.array_split(np.array(points), min(most, len(points))) if points else []
    return [tuple(part.mean(0)) for part in parts]


def training(log: Sequence[Mapping], scores: Mapping[str, Sequence[str]], stories: Iterable[str]) -> str:
    """That part of the page, if there is a log: each loss by step, the validation scores named under each title, as
    percentages, and cards."""
    steps, validations = ([record for record in log if key in record] for key in ("losses", "validation"))
    charts = []
    for name in steps[0]["losses"] if steps else ():
        points = [(record["step"], record["losses"][name]) for record in steps]
        charts.append(chart(f"{name} loss", {name: smoothed([(x, y) for x, y in points if y is not None])}))
    for title, names in scores.items():
        lines = {name: [(record["step"], 100 * record["validation"][name]) for record in validations
                        if record["validation"].get(name) is not None] for name in names}
        charts.append(chart(f"{title}, validation", lines))
    return (f'<h2>Training</h2><div class="charts">{"".join(charts)}</div>'
            f'<h2>The same pictures as training goes on</h2>{"".join(stories)}') if log else ""


def story_card(title: str, picture: Path | None, shares: Mapping[str, float], colours: Mapping[str, str],
               told: Sequence[tuple[int, str, str]]) -> str:
    """A picture, its four largest shares, and what was told of it at up to eight steps: (step, in bold, the rest)."""
    try:
        image = f'<img alt="" src="{data_uri(open_picture(picture, 240), 240)}">'
    except BadPicture:
        image = ""
    likely = sorted(shares.items(), key=lambda pair: -pair[1])[:4]
    shown = [told[place] for place in np.linspace(0, len(told) - 1, min(8, len(told))).astype(int)]
    levels = bars((name, share, colours[name]) for name, share in likely)
    lines = "".join(f"<li><small>{step:,}</small> <b>{escape(first)}</b> {escape(rest)}</li>"
                    for step, first, rest in shown)
    return (f'<article class="card sample">{image}<div><h3>{escape(title)}</h3>{levels}'
            f'<ol class="story">{lines}</ol></div></article>')


# The card of a model that is passed on, in Markdown

def card(title: str, tags: str, about: str, facts: Mapping, scores: Sequence[Sequence[str]], remarks: Sequence[str],
         use: str, settings: Mapping) -> str:
    return fill("card.md", title=title, tags=tags, about=about, facts=bullets(facts), scores=markdown(scores),
                remarks=" ".join(remarks), use=use, settings=bullets(settings))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def bullets(facts: Mapping) -> str:
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


# Scores side by side; `display` says how the score of a name is written

Display = Callable[[str, float], str]


def score_rows(corner: str, systems: Mapping[str, Mapping], display: Display) -> list[list[str]]:
    """A line for each score that all systems have: values, intervals, and how many images the last one's rests on."""
    rows = [[corner, *(title for name in systems for title in (name, "95% interval")), "images"]]
    *_, last = systems.values()
    for name, count in last["counts"].items():
        if all(one.get(name) is not None for one in systems.values()):
            cells = ((display(name, one[name]), " .. ".join(display(name, end) for end in one["intervals"][name]))
                     for one in systems.values())
            rows.append([name, *itertools.chain(*cells), f"{count:,}"])
    return rows


def side_by_side(runs: Mapping[str, Sequence[Scores]], compare: Callable[[Sequence[Scores]], Sequence[Mapping]]
                 ) -> dict[str, dict[str, dict]]:
    """Of each system each score, its interval, its spread over the runs, and how far it is from the first system's.

    A system has a run for each seed. Images are what is drawn and swapped: an image's results are summed over the runs.
    """
    sums = {system: pooled(each) for system, each in runs.items()}
    gaps = [{}, *compare(list(sums.values()))]
    return {system: {name: {"value": sums[system][name].value, "interval": ends, "against": gap.get(name),
                            "spread": spread([run[name].value for run in runs[system]])}
                     for name, ends in bootstrap(sums[system]).items()}
            for system, gap in zip(sums, gaps, strict=True)}


def spread(values: Sequence[float]) -> float:
    """Their standard deviation; none of a single one."""
    return float(np.std(values, ddof=min(1, len(values) - 1)))


def comparison_rows(corner: str, found: Mapping[str, Mapping[str, Mapping]], display: Display) -> list[list[str]]:
    rows = [[corner, *next(iter(found.values()))]]
    for system, scores in found.items():
        rows.append([system, *(f"{display(name, one['value'])} ±{100 * one['spread']:.1f}"
                               for name, one in scores.items())])
        gaps = [one["against"] for one in scores.values()]
        if all(gaps):
            ends = [[100 * end for end in gap["interval"]] for gap in gaps]
            rows += [["  difference", *(f"{100 * gap['difference']:+.1f}" for gap in gaps)],
                     ["  95% interval", *(f"{low:+.1f}..{high:+.1f}" for low, high in ends)],
                     ["  p", *(f"{gap['p']:.3f}" for gap in gaps)],
                     ["  p, Holm", *(f"{gap['holm']:.3f}" for gap in gaps)]]
    return rows


def comparison_charts(found: Mapping[str, Mapping[str, Mapping]]) -> str:
    """A bar for each system, under the name of each score."""
    first = next(iter(found.values()))
    charts = [bar_chart(name, {system: (100 * scores[name]["value"], *(100 * end for end in scores[name]["interval"]))
                               for system, scores in found.items()}) for name in first]
    return f'<div class="charts">{"".join(charts)}</div>'


def comparison_page(title: str, note: str, tables: Mapping[str, tuple[Mapping, Sequence[Sequence[str]]]]) -> str:
    """Under each heading what `side_by_side` found, as charts, and its rows."""
    parts = [f"<h2>{escape(heading)}</h2>{comparison_charts(found)}{table(rows)}"
             for heading, (found, rows) in tables.items()]
    return page(title, f"<h1>{escape(title)}</h1><p>{escape(note)}</p>" + "".join(parts))
