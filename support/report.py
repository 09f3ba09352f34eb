"""What a long computation tells: a line while it runs, and tables, curves and cards on the page that remains."""
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta

import numpy as np

from support.pages import bar_chart, bars, chart, escape, matrix, page, table
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


def curves(records: Sequence[Mapping], scores: Mapping[str, Sequence[str]]) -> str:
    """Of a log: each loss by step, and under each title the percentages of the validation scores it names."""
    steps, validations = ([record for record in records if key in record] for key in ("losses", "validation"))
    charts = []
    for name in steps[0]["losses"] if steps else ():
        points = [(record["step"], record["losses"][name]) for record in steps]
        charts.append(chart(f"{name} loss", {name: smoothed([(x, y) for x, y in points if y is not None])}))
    for title, names in scores.items():
        lines = {name: [(record["step"], 100 * record["validation"][name]) for record in validations
                        if record["validation"].get(name) is not None] for name in names}
        charts.append(chart(f"{title}, validation", lines))
    return f'<div class="charts">{"".join(charts)}</div>'


def story_card(title: str, picture: str | None, shares: Iterable[tuple[str, float, str]],
               told: Iterable[tuple[int, str, str]]) -> str:
    """A picture (as a data URI), the last bars, and what was said at some steps: (step, in bold, the rest)."""
    image = f'<img alt="" src="{picture}">' if picture else ""
    lines = "".join(f"<li><small>{step:,}</small> <b>{escape(first)}</b> {escape(rest)}</li>"
                    for step, first, rest in told)
    return (f'<article class="card sample">{image}<div><h3>{escape(title)}</h3>{bars(shares)}'
            f'<ol class="story">{lines}</ol></div></article>')


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


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
