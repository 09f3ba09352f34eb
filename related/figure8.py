"""Figure 8: how a model arranges what it says. Explanations of one emotion side by side? Words near their picture?

    1. Vectors      of each test answer the mean hidden state of its explanation, and the mean of its picture's features
    2. Numbers      silhouette, and how many of the ten nearest neighbours are of the same kind
    3. The picture  t-SNE maps (tsne.py), in two rows as in the paper

    python -m related.figure8 --runs full=runs/FULL baseline=runs/BASELINE

The first row shows explanations, coloured by the emotion that they explain; the second, for one emotion, explanations
and pictures. Numbers are those of the vectors, not of the maps, which cannot keep distances. A silhouette near 1
means groups far apart, near 0 mixed ones. An explanation follows the name of its emotion, so any model parts the
emotions somewhat; what tells is the difference between models.

Shapes: n answers, L tokens, K patches, d width of the decoder and of the tower.
"""
import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data import Art, PictureBatches, add_data_options, art_of, fill_store, open_store
from metrics import Prediction, read_predictions
from related.tsne import neighbours, tsne
from sevlm import FIXED_BOUNDARY, SEVLM, load, masked_mean
from support.device import choose_device, choose_precision
from support.pages import colours
from support.program import UserError, aligned, replacing, run_program, write_json
from support.scores import Scores, bootstrap, mean_score

# 1. Vectors


@dataclass
class Vectors:
    """What a model makes of its answers, one row for each."""
    explanations: np.ndarray  # (n, d) mu f'^X of Eq. 6
    pictures: np.ndarray  # (n, d) mu f^I
    emotions: list[str]


def in_words(model: SEVLM, ids: Tensor) -> Tensor:
    """The words of the explanation (N, L): after " because", before the end."""
    because = ids == model.text.because
    after = because.cumsum(1) - because.long() > 0  # a first " because" lies before
    return after & ~torch.isin(ids, torch.tensor(model.text.special, device=ids.device))


def by_position(model: SEVLM, ids: Tensor) -> Tensor:
    """As in the authors' script: from position 6 on, whatever follows the end too."""
    return (torch.arange(ids.shape[1], device=ids.device) >= FIXED_BOUNDARY).expand_as(ids)


@torch.no_grad()
def vectors_of(model: SEVLM, art: Art, answers: dict[str, Prediction], authors: bool, batch: int = 64) -> Vectors:
    place = {name: painting for painting, name in enumerate(art.names)}
    wanted = np.array([place[name] for name in answers if name in place], int)
    dtype, _ = choose_precision("auto", model.device, model.config.width)  # as the features of training were stored
    store = open_store(art, model, dtype=dtype)
    problems = fill_store(store, art, model, wanted, dtype=dtype)
    wanted = np.array([painting for painting in wanted if painting not in problems], int)
    if len(wanted) == 0:
        raise UserError(f"none of the {len(answers):,} answers is about a picture of {art.source}")
    batches, mask_of = PictureBatches(store, wanted, batch), by_position if authors else in_words
    explanations, pictures, emotions = [], [], []
    for paintings, content in (batches[index] for index in range(len(batches))):
        said = [answers[art.names[painting]] for painting in paintings]
        inputs = model.sentence([one.emotion for one in said], [one.explanation for one in said])
        content = content.to(model.device)
        features = model.encode_image(content) if content.dtype == torch.uint8 else content.float()
        hidden = model(features, **inputs).hidden
        explanations.append(masked_mean(hidden, mask_of(model, inputs["ids"])))
        pictures.append(features.mean(1))
        emotions += [one.emotion for one in said]
    return Vectors(torch.cat(explanations).cpu().numpy(), torch.cat(pictures).cpu().numpy(), emotions)


# 2. Numbers

def silhouettes(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(b - a) / max(a, b) of each point: a and b are its mean distances to its own and to the nearest other group."""
    kinds, labels = np.unique(labels, return_inverse=True)
    if len(kinds) < 2:
        return np.full(len(points), np.nan)
    points, members = np.asarray(points, np.float64), np.eye(len(kinds))[labels]  # (n, groups)
    squares, found = np.square(points).sum(1), np.empty(len(points))
    for rows in np.array_split(np.arange(len(points)), 1 + len(points) // 256):
        squared = squares[rows, None] + squares - 2 * points[rows] @ points.T
        squared[np.arange(len(rows)), rows] = 0
        sums, own = np.sqrt(squared.clip(0)) @ members, labels[rows]
        sizes = members.sum(0) - members[rows]  # a point is not among its own neighbours
        means = sums / sizes.clip(1)
        a = means[np.arange(len(rows)), own]
        means[np.arange(len(rows)), own] = np.inf
        b = means.min(1)
        alone = sizes[np.arange(len(rows)), own] == 0
        found[rows] = np.where(alone, 0, (b - a) / np.maximum(a, b).clip(1e-12))
    return found


def alike(points: np.ndarray, labels: np.ndarray, k: int = 10) -> np.ndarray:
    """The share of each point's k nearest neighbours that are of its own kind."""
    nearest, _ = neighbours(np.asarray(points, np.float32), min(k, len(points) - 1))
    return (labels[nearest] == labels[:, None]).mean(1)


def separation(points: np.ndarray, labels: Sequence[str]) -> Scores:
    found = {"silhouette": silhouettes, "10 nearest alike": alike}
    return {name: mean_score(measure(points, np.array(labels))) for name, measure in found.items()}


# 3. The picture

@dataclass
class Panel:
    title: str
    map: np.ndarray  # (n, 2)
    labels: list[str]
    caption: str


def panel(title: str, points: np.ndarray, labels: list[str]) -> tuple[Panel, dict]:
    """A map with its numbers below it, and the numbers themselves, also those of the map."""
    if len(points) < 5:
        raise UserError(f"{title}: {len(points)} points are too few to draw")
    drawn = tsne(points, perplexity=min(30.0, (len(points) - 1) / 3))
    found = {}
    for name, where in (("vectors", points), ("map", drawn)):
        scores = separation(where, labels)
        intervals = bootstrap(scores)
        found[name] = {score: {"value": value.value, "interval": intervals[score]} for score, value in scores.items()}
    told = [f"{name} {one['value']:.2f} ({one['interval'][0]:.2f} .. {one['interval'][1]:.2f})"
            for name, one in found["vectors"].items()]
    return Panel(title, drawn, labels, "   ".join(told)), {"title": title, "points": len(points), **found}


SIDE, MARGIN, LEGEND, FINER = 460, 24, 150, 3  # pixels; all is drawn three times as large and then reduced


def draw(rows: Sequence[Sequence[Panel]], colour: dict[str, str], path: Path) -> None:
    across, down = SIDE + MARGIN, SIDE + 4 * MARGIN
    wide, high = len(rows[0]) * across + LEGEND + MARGIN, len(rows) * down
    sheet = Image.new("RGB", (FINER * wide, FINER * high), "white")
    pen, large, small = ImageDraw.Draw(sheet), *(ImageFont.load_default(FINER * size) for size in (17, 13))
    for row, panels in enumerate(rows):
        top = FINER * (MARGIN + row * down)
        for column, one in enumerate(panels):
            left = FINER * (MARGIN + column * across)
            pen.text((left, top), one.title, "black", large)
            place_points(pen, one, colour, left, top + FINER * MARGIN)
            pen.text((left, top + FINER * (SIDE + MARGIN + 6)), one.caption, "#555555", small)
        names = [name for name in colour if any(name in one.labels for one in panels)]
        line = FINER * min(22, SIDE / len(names))
        left = FINER * (MARGIN + len(panels) * across)
        for place, name in enumerate(names):
            middle = top + FINER * MARGIN + (place + 0.5) * line
            pen.ellipse((left, middle - 5 * FINER, left + 10 * FINER, middle + 5 * FINER), fill=colour[name])
            pen.text((left + 16 * FINER, middle), name, "black", small, anchor="lm")
    with replacing(path) as temporary:
        sheet.resize((wide, high), Image.Resampling.LANCZOS).save(temporary, "PNG")


def place_points(pen: ImageDraw.ImageDraw, one: Panel, colour: dict[str, str], left: int, top: int) -> None:
    """The map in a frame, in a random order, so that no kind lies on top of all others."""
    side, radius = FINER * SIDE, FINER * (3.2 if len(one.map) < 1000 else 1.6)
    pen.rectangle((left, top, left + side, top + side), outline="#bbbbbb", width=FINER)
    low, high = one.map.min(0), one.map.max(0)
    spots = ((one.map - (low + high) / 2) / (high - low).max() * 0.94 + 0.5) * side
    for index in np.random.default_rng(0).permutation(len(spots)):
        x, y = left + spots[index, 0], top + spots[index, 1]
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour[one.labels[index]])


def figure(found: dict[str, Vectors], emotion: str, colour: dict[str, str], path: Path) -> dict:
    """Draw both rows; returns the numbers."""
    above, below, numbers = [], [], []
    for label, vectors in found.items():
        mine = np.array([each == emotion for each in vectors.emotions])
        if vectors.explanations.shape[1] != vectors.pictures.shape[1]:
            raise UserError(f"{label}: explanations are {vectors.explanations.shape[1]} wide and picture features "
                            f"{vectors.pictures.shape[1]}; they cannot be on one map")
        both = np.concatenate([vectors.explanations[mine], vectors.pictures[mine]])
        kinds = ["explanation"] * mine.sum() + ["picture"] * mine.sum()
        for row, one in ((above, panel(f"{label}: explanations", vectors.explanations, vectors.emotions)),
                         (below, panel(f"{label}: {emotion}", both, kinds))):
            row.append(one[0])
            numbers.append(one[1])
    draw([above, below], colour | {"explanation": "#c0504d", "picture": "#4f81bd"}, path)
    return {"emotion": emotion, "panels": numbers}


def read_answers(run: Path, emotions: Sequence[str]) -> dict[str, Prediction]:
    path = run / "test-greedy.jsonl"
    if not path.is_file():
        raise UserError(f"{run} has no {path.name}: it is no run, or not finished")
    return {name: answer for name, answer in read_predictions(path, emotions) if answer.explanation}


def table(numbers: dict) -> str:
    rows = [["panel", "points", "silhouette", "in the map", "10 nearest alike", "95% interval", "in the map"]]
    for one in numbers["panels"]:
        (silhouette, near), (mapped, near_in_map) = (list(one[where].values()) for where in ("vectors", "map"))
        rows.append([one["title"], f"{one['points']:,}", f"{silhouette['value']:.3f}", f"{mapped['value']:.3f}",
                     f"{100 * near['value']:.1f}%", " .. ".join(f"{100 * x:.1f}" for x in near["interval"]),
                     f"{100 * near_in_map['value']:.1f}%"])
    return aligned(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m related.figure8", allow_abbrev=False, description="Draw Figure 8.")
    parser.add_argument("--runs", nargs="+", required=True, metavar="LABEL=RUN", help="finished runs, with a name each")
    add_data_options(parser)
    parser.add_argument("--emotion", help="of the second row (default: the one that is answered most)")
    parser.add_argument("--authors", action="store_true",
                        help="means from position 6 on and beyond the end, as in the authors' script")
    parser.add_argument("--out", default="figure8.png", metavar="FILE", help="(default: figure8.png; numbers in .json)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    options = parser.parse_args()
    labelled = [pair.partition("=")[::2] for pair in options.runs]
    if not all(label and run for label, run in labelled) or len(dict(labelled)) < len(labelled):
        raise UserError("--runs wants LABEL=RUN ..., a different label for each run")
    art, device = art_of(options), choose_device(options.device)
    answers = {label: read_answers(Path(run), art.emotions) for label, run in labelled}
    found = {label: vectors_of(load(run).to(device), art, answers[label], options.authors) for label, run in labelled}
    said = Counter(emotion for vectors in found.values() for emotion in vectors.emotions)
    emotion = options.emotion or said.most_common(1)[0][0]
    if emotion not in said:
        raise UserError(f"--emotion {emotion}: nothing was answered so; there are {', '.join(sorted(said))}")
    numbers = figure(found, emotion, colours(dict.fromkeys([*art.emotions, *said])), Path(options.out))
    write_json(Path(options.out).with_suffix(".json"), numbers)
    print(f"{table(numbers)}\n{options.out}")


if __name__ == "__main__":
    run_program(main)
