"""How well EmoVIT answers about pictures whose truth is known.

    1. Exams      a test split, or a folder of labelled pictures: labels, truth, questions
    2. Answers    the likelihood of each label under five wordings of the instruction, and what is said
    3. Scores     of emotions, of what is seen, of reasons
    4. Results    runs side by side, as text, JSON and a page
    5. Program

The published script looks for eight words anywhere in an answer, in a fixed order, and forgets answers without one: to
it "danger" is anger. Here the emotion is the label whose whole closed answer is the likeliest, so that no picture is
left out and no setting of the decoding matters. Beside it stands which label the greedy answer names in whole words,
and how often it names just one.

    python -m related.emovit --evaluate RUN                    the test split, beside runs of fewer kinds of records
    python -m related.emovit --evaluate RUN --labels FOLDER    labelled pictures, under the labels' own names

Shapes: B pictures of K patches, W wordings, C labels.
"""
import argparse
import contextlib
import itertools
import json
import math
import sys
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import metrics
from data import Art, PictureFiles, best_accuracy
from related.asked import Wish, dialogue
from related.emovit import EmoVIT, load_emovit, read_config
from related.heldout import held_out
from related.instructions import Clue, clue_questions, reason_question, right, source_of
from related.questions import PARAPHRASES, closed_answer, named
from related.training import Machine
from sample import introduce
from support.answers import SHOWN, picture_card
from support.files import is_hub_id
from support.labels import in_words
from support.pages import escape, matrix, page, table
from support.pictures import open_picture
from support.program import UserError, aligned, printable, progress, write_json, write_text
from support.records import finite_only
from support.report import side_by_side
from support.scores import Scores, compare, how_tested, mean_score, pooled
from support.settings import flag, given
from support.text_classifier import TextClassifier

BATCH = 32  # pictures
CARDS = 24  # of a page
OF_REASONS = ("EA", "BLEU-1", "BLEU-4", "METEOR (exact+stem)", "ROUGE-L", "CIDEr", "Unique")


# 1. Exams

@dataclass
class Exam:
    """Pictures by name, and what is known of them."""
    name: str
    files: dict[str, Path | None]
    labels: Sequence[str]
    truth: dict[str, str | None]  # None: people disagree
    clues: dict[str, list[tuple[str, Clue]]] = field(default_factory=dict)  # which score, and the question
    references: dict[str, metrics.Reference] = field(default_factory=dict)  # what people say of it
    best: float | None = None  # the ACC of somebody who knows the moods


def exam_of(art: Art) -> Exam:
    """The test split of a data set; of the toy's pictures it is also known what is there."""
    paintings, clues = art.paintings("test"), defaultdict(list)
    for paraphrased in (False, True):
        for clue in clue_questions(art, "test", paraphrased):
            clues[clue.image].append((clue.asked + " (other words)" * paraphrased, clue))
    votes = {art.names[p]: dict(zip(art.emotions, art.votes[p].tolist(), strict=True)) for p in paintings}
    if not votes:
        raise UserError(f"{art.source} has no test pictures")
    return Exam(art.name, {art.names[p]: art.files[p] for p in paintings}, art.emotions,
                {name: metrics.dominant_emotion(each) for name, each in votes.items()}, clues,
                metrics.references_of(art, "test") if art.texts else {}, best_accuracy(art, "test"))


def labelled(folder: Path) -> Exam:
    """Labelled pictures under the labels' own names, which are not mapped to emotions that the model has met."""
    truth = {file: in_words(name) for file, name in held_out(folder).items()}
    return Exam(folder.resolve().name, {file: Path(file) for file in truth}, list(dict.fromkeys(truth.values())), truth)


# 2. Answers

@dataclass
class Sheet:
    """What a model answers about a picture."""
    log_probs: Tensor  # (W, C) of each label as the answer
    said: str  # greedily, after the first wording
    clues: list[str]  # an answer to each of the picture's questions
    reason: str  # why somebody could feel the likeliest emotion


@dataclass
class Examined:
    """A run, and what it answers in each exam."""
    run: str
    kinds: list[str]  # of the records that it was trained on
    sheets: dict[str, dict[str, Sheet]] = field(default_factory=dict)  # by exam, by picture
    problems: dict[str, dict[str, str]] = field(default_factory=dict)  # pictures that cannot be used, and why


def examine(run: str | Path, named_by: str, exams: Sequence[Exam], options: argparse.Namespace) -> Examined:
    model = load_emovit(run, named_by)
    machine = Machine.chosen(options.device, options.precision, model.config.width)
    model.to(machine.device)
    print(printable(introduce(model, run)), flush=True)
    found = Examined(str(run), list(model.about.get("kinds", ())))
    for exam in exams:
        found.sheets[exam.name], found.problems[exam.name] = sheets_of(model, exam, machine)
    return found


def sheets_of(model: EmoVIT, exam: Exam, machine: Machine) -> tuple[dict[str, Sheet], dict[str, str]]:
    """A sheet for each picture that can be used, and why the others cannot be."""
    names, pictures = list(exam.files), PictureFiles(list(exam.files.values()), model.config)
    sheets, problems = {}, {}
    for start in progress(range(0, len(names), BATCH), f"{exam.name}, x{BATCH}"):
        found = {names[place]: pictures[place] for place in range(start, min(start + BATCH, len(names)))}
        problems |= {name: why for name, why in found.items() if isinstance(why, str)}
        usable = {name: pixels for name, pixels in found.items() if name not in problems}
        if usable:
            with torch.no_grad(), machine.autocast():
                features = model.encode_image(torch.stack(list(usable.values())).to(machine.device))  # (B, K, E)
                sheets |= answers_about(model, features, exam, list(usable))
    if not sheets:
        name, why = next(iter(problems.items()))
        raise UserError(f"no picture of {exam.name} can be used: {name}: {why}")
    return sheets, problems


def answers_about(model: EmoVIT, features: Tensor, exam: Exam, names: Sequence[str]) -> dict[str, Sheet]:
    """All that is asked about the pictures with these features (B, K, E)."""
    answers = list(map(closed_answer, exam.labels))
    wordings = [[wording(exam.labels)] * len(names) for wording in PARAPHRASES]
    log_probs = torch.stack([model.answer_log_probs(features, each, answers).float().cpu() for each in wordings], 1)
    said = model.answer(features, wordings[0])
    reasons = (model.answer(features, [reason_question(likeliest(exam, one)) for one in log_probs])
               if exam.references else [""] * len(names))
    asked = [(place, clue) for place, name in enumerate(names) for _, clue in exam.clues.get(name, ())]
    told = iter(model.answer(features[[place for place, _ in asked]], [clue.question for _, clue in asked])
                if asked else ())
    return {name: Sheet(log_probs[place], said[place], list(itertools.islice(told, len(exam.clues.get(name, ())))),
                        reasons[place]) for place, name in enumerate(names)}


def likeliest(exam: Exam, log_probs: Tensor, wording: int = 0) -> str:
    """A picture's label, from log-probabilities (W, C)."""
    return exam.labels[int(log_probs[wording].argmax())]


def only_label(exam: Exam, answer: str) -> str | None:
    """The label that an answer names; None where it names none, or several."""
    found = named(answer, exam.labels)
    return found[0] if len(found) == 1 else None


# 3. Scores. Where something can be right, a picture without a sheet is wrong.

def labels_of(exam: Exam, sheets: Mapping[str, Sheet], wording: int = 0) -> list[str | None]:
    """The likeliest label of every picture."""
    return [likeliest(exam, sheets[name].log_probs, wording) if name in sheets else None for name in exam.truth]


def by_wording(exam: Exam, sheets: Mapping[str, Sheet]) -> list[Scores]:
    """Accuracy under each wording of the instruction."""
    return [{"ACC": metrics.accuracy(labels_of(exam, sheets, wording), list(exam.truth.values()))}
            for wording in range(len(PARAPHRASES))]


def sensitivity(accuracies: Sequence[float]) -> float:
    """How much depends on the wording: standard deviation / mean of the accuracies under several. Low is good."""
    mean = float(np.mean(accuracies))
    return float(np.std(accuracies)) / mean if mean else math.nan


def scores_of(exam: Exam, sheets: Mapping[str, Sheet], judge: TextClassifier | None) -> Scores:
    """All scores, by name; ACC is the mean over the wordings."""
    said = [only_label(exam, sheets[name].said) if name in sheets else None for name in exam.truth]
    scores = pooled(by_wording(exam, sheets))
    scores |= {"ACC of what is said": metrics.accuracy(said, list(exam.truth.values())),
               "one label is said": mean_score([label is not None for label in said], right_or_wrong=True)}
    scores |= clue_scores(exam, sheets)
    if exam.references:
        reasons = {name: metrics.Prediction(likeliest(exam, one.log_probs), one.reason) for name, one in sheets.items()}
        found = metrics.evaluate(reasons, exam.references, exam.labels, judge)
        scores |= {name: found[name] for name in OF_REASONS if name in found}
    return scores


def clue_scores(exam: Exam, sheets: Mapping[str, Sheet]) -> Scores:
    """How often what is there is named right, by what is asked."""
    found: dict[str, np.ndarray] = {}
    for place, name in enumerate(exam.truth):
        for number, (asked, clue) in enumerate(exam.clues.get(name, ())):
            is_right = name in sheets and right(clue, sheets[name].clues[number])
            found.setdefault(asked, np.zeros((2, len(exam.truth))))[:, place] = is_right, 1
    return {asked: mean_score(*counts, right_or_wrong=True) for asked, counts in found.items()}


# 4. Results

def fewer_kinds(run: Path) -> list[Path]:
    """Of the finished runs beside this one, the newest for each choice of fewer kinds of records of the same data."""
    own, found = about_of(run), {}
    for results in sorted(run.resolve().parent.glob("*/results.json"), key=lambda path: path.stat().st_mtime):
        other = about_of(results.parent)
        if other.get("data") == own.get("data") and set() < set(other.get("kinds", [])) < set(own.get("kinds", [])):
            found[frozenset(other["kinds"])] = results.parent
    return list(found.values())


def about_of(folder: Path) -> dict:
    """What a run was trained on; nothing if it is no run of this system."""
    try:
        return read_config(folder).get("about", {})
    except UserError:
        return {}


def by_name(runs: Sequence[Examined]) -> dict[str, Examined]:
    """Runs by their kinds where these tell them apart, else by their folders; the fewest kinds first."""
    runs = sorted(runs, key=lambda one: len(one.kinds))
    kinds = [" + ".join(one.kinds) for one in runs]
    names = kinds if len(set(kinds)) == len(runs) and all(kinds) else [one.run for one in runs]
    return dict(zip(names, runs, strict=True))


def told(exam: Exam, runs: Mapping[str, Examined], judge: TextClassifier | None) -> dict:
    """An exam in numbers: each run, and how it differs from the first."""
    sheets = {name: one.sheets[exam.name] for name, one in runs.items()}
    scores = {name: scores_of(exam, each, judge) for name, each in sheets.items()}
    found, results = side_by_side({name: [each] for name, each in scores.items()}, compare), {}
    for name, one in runs.items():
        wordings = [each["ACC"].value for each in by_wording(exam, sheets[name])]
        confusion = metrics.confusion_matrix(labels_of(exam, sheets[name]), list(exam.truth.values()), exam.labels)
        results[name] = {"run": one.run, "kinds": one.kinds, "ACC by wording": wordings,
                         "sensitivity": sensitivity(wordings), "scores": found[name], "confusion": confusion.tolist(),
                         "unusable pictures": one.problems[exam.name]}
    return {"pictures": len(exam.truth), "labels": list(exam.labels), "best possible ACC": exam.best, "runs": results,
            "how tested": how_tested(scores[name])}


def note_of(results: Mapping[str, Mapping], judge: TextClassifier | None) -> str:
    """What must be known to read the numbers."""
    one = next(iter(results.values()))
    first, *others = one["runs"]
    against = f" p: against {first}, corrected for the whole table (Holm)." if others else ""
    return f"{one['how tested']}{against}" + (f" {metrics.credit(judge)}." if judge else "")


def rows_of(results: Mapping) -> list[list[str]]:
    """A column for each run; below each score its interval, and p against the first run where there are several."""
    runs = results["runs"]
    rows = [["", *runs]]
    for score in next(iter(runs.values()))["scores"]:
        shown, each = partial(metrics.display, score), [run["scores"][score] for run in runs.values()]
        rows.append([score, *(shown(one["value"]) for one in each)])
        rows.append(["  95% interval", *(" .. ".join(map(shown, one["interval"])) for one in each)])
        if len(runs) > 1:
            rows.append(["  p, Holm", *(f"{one['against']['holm']:.4f}" if one["against"] else "" for one in each)])
        if score == "ACC":
            for number, values in enumerate(zip(*(run["ACC by wording"] for run in runs.values()), strict=True), 1):
                rows.append([f"  wording {number}", *map(shown, values)])
            rows.append(["  sensitivity", *(f"{run['sensitivity']:.4f}" for run in runs.values())])
    return rows


def summary(results: Mapping) -> str:
    """The tables as text."""
    parts = []
    for name, one in results["exams"].items():
        parts += [f"{name}: {size_of(one)}", aligned(rows_of(one))]
    if len(results["exams"]) > 1:
        parts.append("Sensitivity, mean of all sets: "
                     + ", ".join(f"{name} {value:.4f}" for name, value in results["mean sensitivity"].items()))
    return "\n\n".join([*parts, textwrap.fill(results["note"], 100)])


def size_of(results: Mapping) -> str:
    """How many pictures an exam has, and how much can be right."""
    unusable = max(len(run["unusable pictures"]) for run in results["runs"].values())
    best = results["best possible ACC"]
    return (f"{results['pictures']:,} pictures" + f", of which {unusable:,} cannot be used" * (unusable > 0)
            + ("" if best is None else f"; best possible ACC {100 * best:.1f}"))


def write_results(folder: Path, exams: Sequence[Exam], own: Examined, results: Mapping) -> None:
    """Numbers, tables and a page; and all questions and answers of the run that was named."""
    dialogues = [{"exam": exam.name, "image": image, "answers": dialogue_of(exam, image, sheet)}
                 for exam in exams for image, sheet in own.sheets[exam.name].items()]
    write_text(folder / "dialogues.jsonl", "".join(json.dumps(one) + "\n" for one in dialogues))
    write_text(folder / "report.html", report(exams, own, results))
    write_text(folder / "table.txt", summary(results) + "\n")
    write_json(folder / "results.json", finite_only(results))


def report(exams: Sequence[Exam], own: Examined, results: Mapping) -> str:
    """A page: the tables; what the run that was named took for what, and what it said of some pictures."""
    title, body = f"What {Path(own.run).name} answers", []
    for exam in exams:
        one, sheets = results["exams"][exam.name], own.sheets[exam.name]
        shown = list(sheets)[::max(1, len(sheets) // CARDS)][:CARDS]
        cards = [picture_card(open_picture(exam.files[image], SHOWN), image,
                              dialogue(dialogue_of(exam, image, sheets[image]))) for image in shown]
        [confusion] = [run["confusion"] for run in one["runs"].values() if run["run"] == own.run]
        body += [f"<h2>{escape(exam.name)}: {size_of(one)}</h2>", table(rows_of(one)),
                 "<h2>What was right, and what the model said</h2>",
                 matrix(exam.labels, [*exam.labels, "none"], confusion, "right ↓ said →"),
                 f'<h2>Questions and answers</h2><div class="gallery">{"".join(cards)}</div>']
    return page(title, f'<h1>{escape(title)}</h1><p class="about">{escape(results["note"])}</p>{"".join(body)}')


def dialogue_of(exam: Exam, image: str, sheet: Sheet) -> list[dict]:
    """What was asked about a picture, and what was right."""
    closed = textwrap.shorten(PARAPHRASES[0](exam.labels), 70, placeholder=" …")
    truth, said = exam.truth[image], only_label(exam, sheet.said)
    answers = [{"question": closed, "answer": sheet.said} | ({"right": said == truth, "truth": truth} if truth else {})]
    answers += [{"question": clue.question, "answer": answer, "right": right(clue, answer), "truth": clue.truth}
                for (_, clue), answer in zip(exam.clues.get(image, ()), sheet.clues, strict=True)]
    if exam.references:
        answers.append({"question": reason_question(likeliest(exam, sheet.log_probs)), "answer": sheet.reason})
    return answers


# 5. Program

def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--evaluate", metavar="RUN", help="how well a run answers about the test split of --data")
    group.add_argument("--versus", nargs="+", default=[], metavar="RUN",
                       help="beside these runs (default: those next to it with fewer kinds of records)")
    group.add_argument("--labels", action="append", default=[], metavar="FOLDER",
                       help="labelled pictures instead of --data; may be named several times")


def exams_named(options: argparse.Namespace) -> tuple[list[Exam], TextClassifier | None]:
    """What to evaluate on, and EA's judge where there are explanations."""
    if options.labels:
        exams = [labelled(Path(folder)) for folder in dict.fromkeys(options.labels)]
        if len({exam.name for exam in exams}) < len(exams):
            raise UserError(f"--labels {', '.join(options.labels)}: evaluate folders of one name one after the other")
        return exams, None
    art = source_of(options)
    return [exam_of(art)], metrics.text_classifier_of(art, train=True) if art.texts else None


def refuse_other_questions(options: argparse.Namespace) -> None:
    answering = {"ask", "run", "serve", "out", "html", *given(options, Wish)} - {"seed"}
    asked = {"PICTURE": options.pictures} | {flag(name): getattr(options, name) for name in sorted(answering)}
    if idle := [name for name, value in asked.items() if value not in ([], None)]:
        raise UserError(f"--evaluate asks its own questions, without {', '.join(idle)}")


def evaluate(options: argparse.Namespace) -> None:
    """Tables on the terminal (or --json), and in the run's folder, with a page."""
    refuse_other_questions(options)
    run = Path(options.evaluate)
    for other in options.versus:
        if not is_hub_id(other):
            read_config(Path(other))  # a mistake is told before anything is computed
    with contextlib.redirect_stdout(sys.stderr):  # what is said on the way; the result alone can be piped
        exams, judge = exams_named(options)
        others = options.versus or (fewer_kinds(run) if run.is_dir() else [])
        own = examine(options.evaluate, "--evaluate", exams, options)
        runs = by_name([*(examine(other, "--versus", exams, options) for other in others), own])
    by_exam = {exam.name: told(exam, runs, judge) for exam in exams}
    results = {"exams": by_exam, "note": note_of(by_exam, judge), "mean sensitivity": {
        name: float(np.mean([one["runs"][name]["sensitivity"] for one in by_exam.values()])) for name in runs}}
    folder = (run if run.is_dir() else Path("runs") / run.name) / "-".join(["evaluation", *by_exam])
    write_results(folder, exams, own, results)
    print(json.dumps(finite_only(results), indent=1) if options.json else summary(results))
    print(f"report: {folder / 'report.html'}", file=sys.stderr)
