"""Pages that need nothing else: style, scripts, tables, charts and pictures inside one HTML file.

A page allows only the style and the scripts that carry its nonce, a random word, and loads nothing. So there are no
style attributes here: a number becomes an attribute of SVG, or one of a few levels that pages/style.css knows.
Every text given is escaped, and control characters in it are spelt out.
"""
import base64
import colorsys
import html
import io
import itertools
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

from PIL import Image

from support.program import printable

FILES = Path(__file__).with_suffix("")  # pages/
LINES = ("#4878a8", "#d9822b", "#5a9e5f", "#b5546c", "#8268b0", "#8a8a80")
PALETTE = ("#c98a12", "#4f7fd0", "#3a9a6b", "#dd6b2f", "#cc4444", "#7f8c2c", "#8462b8", "#4a86a8", "#85857f")
SHADES = 9  # of a matrix


# Pages

def page(title: str, body: str, scripts: Sequence[str] = (), nonce: str = "") -> str:
    """A whole page. Whoever gives the nonce sends the policy along; a page without one states its own."""
    own = "" if nonce else secrets.token_urlsafe(16)
    stated = f'<meta http-equiv="Content-Security-Policy" content="{policy(own)}">' if own else ""
    return fill("page.html", title=escape(title), body=body, nonce=nonce or own, policy=stated,
                style=content("style.css"), script="".join(map(content, scripts)))


def policy(nonce: str, connect: str = "'none'") -> str:
    """What the page may load and run, in the language of browsers."""
    return (f"default-src 'none'; img-src data:; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
            f"connect-src {connect}; base-uri 'none'; form-action 'none'")


def is_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(15).lower() == b"<!doctype html>"


def fill(name: str, **parts: str) -> str:
    """A file of pages/ with its $names replaced."""
    return Template(content(name)).substitute(parts)


def content(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")


def escape(text) -> str:
    return html.escape(printable(str(text)))


# Colours and pictures

def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, by its place: of a list chosen by hand, then of a wheel without end."""
    wheel = ((0.58 + 0.382 * place) % 1 for place in itertools.count())  # the golden angle keeps neighbours apart
    others = ("#" + bytes(round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.5, 0.42)).hex() for hue in wheel)
    return dict(zip(names, itertools.chain(PALETTE, others), strict=False))


def data_uri(image: Image.Image, side: int) -> str:
    """The picture inside the page."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# Small marks

def dot(colour: str) -> str:
    return f'<svg class="dot" viewBox="0 0 2 2" aria-hidden="true"><circle cx="1" cy="1" r="1" fill="{colour}"/></svg>'


def bars(shares: Iterable[tuple[str, float, str]]) -> str:
    """A bar for each (name, share, colour)."""
    lines = [f'<li><span>{escape(name)}</span><svg class="bar" aria-hidden="true">'
             f'<rect width="{100 * share:.1f}%" height="100%" rx="4" fill="{colour}"/></svg><b>{share:.0%}</b></li>'
             for name, share, colour in shares]
    return f'<ul class="bars">{"".join(lines)}</ul>'


def gauges(values: Mapping[str, float]) -> str:
    """Scales from -1 to 1, each with a mark."""
    marks = [f'<span class="gauge">{escape(name)} <svg aria-hidden="true"><line x1="0" x2="100%" y1="50%" y2="50%"/>'
             f'<circle cx="{50 + 44 * value:.0f}%" cy="50%" r="4.5"/></svg> {value:+.2f}</span>'
             for name, value in values.items()]
    return f'<p class="gauges">{"".join(marks)}</p>'


# Tables

def table(rows: Sequence[Sequence], kind: str = "numbers") -> str:
    """The first row and the first column are headings; a row that begins with blanks explains the one above."""
    head, *body = [[escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr>"]
    for first, *rest in body:
        detail = ' class="detail"' if first.startswith(" ") else ""
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        lines.append(f'<tr{detail}><th scope="row">{first}</th>{cells}</tr>')
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>'


def matrix(rows: Sequence[str], columns: Sequence[str], counts: Sequence[Sequence[int]], corner: str = "") -> str:
    """Counts, each darker the larger its share of its row."""
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in columns)
    lines = [f"<tr><td>{escape(corner)}</td>{head}</tr>"]
    for name, row in zip(rows, counts, strict=True):
        shades = [round(SHADES * count / max(1, sum(row))) for count in row]
        cells = "".join(f'<td data-shade="{shade}">{count or "·"}</td>'
                        for shade, count in zip(shades, row, strict=True))
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return f'<div class="wide"><table class="matrix">{"".join(lines)}</table></div>'


# Charts

def chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Curves of (x, y) points, all axes from zero."""
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    width, height, left, right, top, bottom = 420, 230, 46, 12, 40, 26
    xs, ys = (ticks(max((point[axis] for point in points), default=0)) for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (width - left - right) * x / xs[-1], height - bottom - (height - top - bottom) * y / ys[-1])

    parts = []
    for y in ys:
        level = place(0, y)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{level:.1f}" y2="{level:.1f}"/>'
                     f'<text x="{left - 6}" y="{level + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in xs:
        anchor = "end" if x == xs[-1] else "middle"
        parts.append(f'<text x="{place(x, 0)[0]:.1f}" y="{height - 8}" text-anchor="{anchor}">{x:,.6g}</text>')
    start = left
    for (name, curve), colour in zip(curves.items(), itertools.cycle(LINES)):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve if math.isfinite(y))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(curves) > 1:
            parts.append(f'<circle cx="{start + 4}" cy="27" r="4" fill="{colour}"/>'
                         f'<text x="{start + 12}" y="31">{escape(name)}</text>')
            start += 28 + 6 * len(name)
    return drawing(width, height, title, parts)


def bar_chart(title: str, values: Mapping[str, tuple[float, float, float]]) -> str:
    """A horizontal bar for each name's (value, low, high), with the interval as a line over its end."""
    left, width, line = 150, 420, 24
    top = ticks(max((high for *_, high in values.values()), default=0))[-1]
    parts = []
    for index, (name, bounds) in enumerate(values.items()):
        y = 26 + line * index
        value, low, high = (left + (width - left - 50) * bound / top for bound in bounds)
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>'
                     f'<rect x="{left}" y="{y + 2}" width="{value - left:.1f}" height="15" fill="{LINES[index > 0]}"/>'
                     f'<path class="whisker" d="M{low:.1f},{y + 9.5} H{high:.1f} m0,-3.5 v7 M{low:.1f},{y + 6} v7"/>'
                     f'<text x="{high + 6:.1f}" y="{y + 14}">{bounds[0]:.1f}</text>')
    return drawing(width, 30 + line * len(values), title, parts)


def ticks(top: float) -> list[float]:
    """Round numbers from 0 until `top` is reached."""
    top = top if top > 0 else 1.0
    magnitude = 10.0 ** math.floor(math.log10(top))
    step = next(step for step in (0.2 * magnitude, 0.5 * magnitude, magnitude, 2 * magnitude) if top / step <= 5)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def drawing(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
            f'<text class="title" x="0" y="14">{escape(title)}</text>{"".join(parts)}</svg>')
