"""Table 1: every system trained on the same paintings, scored by the same rules, side by side.

    1. Systems          the command that trains each
    2. Scores           of answers on disk, ours and anybody's, over all seeds
    3. Costs            parameters, GFLOP and seconds for a picture, from its pixels to its sentence
    4. The table        as text, JSON, LaTeX and a page

    python -m related.table1 --data toy
    python -m related.table1 --data artemis_v1 --seeds 3 --add "LLaVA-FT=theirs.jsonl"

Each system is trained by its own command, which is printed. What is finished is not trained again, so a system may as
well be trained by hand, with other settings or on another machine, into the folder that its command names.
"""
import argparse
import itertools
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import Art, PictureFiles, add_data_options, art_of
from metrics import (
    Reference,
    accuracy,
    compare,
    credit,
    display,
    emotions_of,
    evaluate,
    load_predictions,
    references_of,
    text_classifier_of,
)
from related.captions import GROUNDINGS
from related.nlx_gpt import reasons
from related.training import Machine, gflop_of, opened, parameters_of, seconds_of
from sevlm import BASELINE, emotion_log_probs, load_model
from support.pages import bar_chart, escape, page, table
from support.program import UserError, aligned, read_json, run_program, write_json, write_text
from support.records import finite_only
from support.report import side_by_side
from support.run import Run, stop_requests
from support.scores import Scores, how_tested, pooled
from support.settings import flag
from support.text_classifier import TextClassifier

# 1. Systems

FIRST_STAGE, BASE, FULL = "emotions", "baseline", "SEVLM"
PROGRAMS = {FIRST_STAGE: "emotion_classifier", "SAT": "show_attend_tell", "SAT-clip": "show_attend_tell",
            "M2": "meshed_memory", "M2-clip": "meshed_memory", "NLX-GPT": "nlx_gpt"}
SYSTEMS = ("SAT", "SAT-clip", "M2", "M2-clip", "NLX-GPT", BASE, FULL)
BY_DEFAULT = ("SAT", "M2", "NLX-GPT", BASE, FULL)
ROOT = Path(__file__).parents[1]


@dataclass
class Runs:
    """Where every system's run is, and how it gets there."""
    folder: Path
    decoding: str  # of our own models
    data: list[str]  # the flags that say where data is

    def of(self, system: str, seed: int) -> Run:
        name = f"NLX-GPT-{self.decoding}" if system == "NLX-GPT" else system  # it trains nothing, it only answers
        return Run(self.folder / f"{name}-{seed}")

    def needed(self, system: str) -> list[str]:
        """What is to be trained, the system itself last."""
        if system in (BASE, FULL):
            return [system]
        given = [BASE] if system == "NLX-GPT" else [FULL] if system.endswith("-clip") else []  # whose tower it uses
        return [FIRST_STAGE, *given, system]

    def command(self, system: str, seed: int) -> list[str]:
        """What stands behind `python` to train a system, or to go on with it."""
        run = self.of(system, seed)
        if system in (BASE, FULL):
            words = [str(ROOT / "train.py"), "--runs", str(self.folder), "--name", run.folder.name]
            off = [flag(f"no_{part}") for part in BASELINE] if system == BASE else []
            return [*words, "--resume"] if run.begun else [*words, "--seed", str(seed), *self.data, *off]
        words = ["-m", f"related.{PROGRAMS[system]}", "--out", str(run.folder), "--seed", str(seed), *self.data]
        if system == FIRST_STAGE:
            return words
        words += ["--emotions", str(self.of(FIRST_STAGE, seed).folder)]
        if system == "NLX-GPT":
            return [*words, "--weights", str(self.of(BASE, seed).folder), "--decoding", self.decoding]
        patches = ["--features", "clip", "--weights", str(self.of(FULL, seed).folder)]
        return words + patches if system.endswith("-clip") else words

    def train_missing(self, systems: Sequence[str], seeds: range) -> None:
        every = [(stage, seed) for seed in seeds for system in systems for stage in self.needed(system)]
        for stage, seed in dict.fromkeys(every):
            if not self.of(stage, seed).finished:
                run_to_its_end(self.command(stage, seed))

    def answers(self, system: str, seed: int, grounding: str) -> Path:
        """Of the test split. A system of two stages is also told the annotators' emotions."""
        return self.of(system, seed).folder / f"test-{self.decoding if system in (BASE, FULL) else grounding}.jsonl"


def run_to_its_end(words: Sequence[str]) -> None:
    """Run a program of ours as from a shell; whoever asks this one to stop, asks that one."""
    print(f"\npython {shlex.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, *words])
    with stop_requests(lambda _: process.terminate()):
        code = process.wait()
    if code:
        raise UserError("that program did not come to its end; the same command as before goes on with it")


def data_flags(options: argparse.Namespace) -> list[str]:
    """The flags that say where data is, as far as they were named."""
    parser = argparse.ArgumentParser()
    add_data_options(parser)
    named = {name: value for name, value in vars(options).items()
             if name in vars(parser.parse_args([])) and value != parser.get_default(name)}
    return [word for name, value in named.items() for word in (flag(name), str(value))]


# 2. Scores

TABLE = ("ACC", "ACC (>= half)", "EA", "EA (>= half)", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR (exact+stem)",
         "ROUGE-L", "Unique")
Found = Mapping[str, Mapping[str, Mapping]]  # what was found of each system in each score


@dataclass
class Protocol:
    """All that scoring needs."""
    references: Mapping[str, Reference]
    emotions: Sequence[str]
    judge: TextClassifier

    @classmethod
    def of(cls, art: Art) -> "Protocol":
        return cls(references_of(art, "test"), art.emotions, text_classifier_of(art, train=True))

    def scores(self, path: Path, allow_missing: bool) -> Scores:
        answers = load_predictions(path, self.references, self.references, self.emotions, False, allow_missing)
        scores = evaluate(answers, self.references, self.emotions, self.judge)
        half = accuracy(*emotions_of(answers, self.references, half_is_enough=True))
        scores["ACC (>= half)"] = half if scores["ACC"].images else scores["ACC"]  # plain captions name no emotion
        return {name: scores[name] for name in TABLE}


def found_of(runs: Mapping[str, Sequence[Scores]]) -> Found:
    """Each score of each system with its interval, its spread over the seeds, and how far it is from SEVLM's."""
    first = {FULL: runs[FULL]} if FULL in runs else {}
    found = side_by_side(first | runs, compare if first else lambda systems: [{} for _ in systems[1:]])
    return {system: found[system] for system in runs}


# 3. Costs

@dataclass
class Cost:
    """Of one picture, from its pixels to its sentence, on this machine."""
    parameters: int
    gflop: float
    seconds: float


def cost_of(system: str, runs: Runs, art: Art) -> Cost:
    """A system of two stages costs both; their runs have measured themselves."""
    run = runs.of(system, 0)
    if system in (BASE, FULL):
        return cost_of_model(run.folder, art)
    first, second = (read_json(one.results_file) for one in (runs.of(FIRST_STAGE, 0), run))
    return Cost(first["parameters"] + second["parameters"], first["gflop"] + second["gflop"],
                1 / first["pictures_per_second"] + second["seconds"])


PICTURES = 16  # to measure speed with


@torch.no_grad()
def cost_of_model(source: Path, art: Art) -> Cost:
    """Of the likeliest emotion and its explanation, by a model of ours."""
    model = load_model(source)
    machine = Machine.chosen("auto", "auto", model.config.width)
    model.to(machine.device)

    def answer(pixels: Tensor) -> list[str]:
        with machine.autocast():
            features = model.encode_image(pixels)
            likeliest = emotion_log_probs(model, features).argmax(1).tolist()
            return reasons(model, features, [model.text.emotions[index] for index in likeliest])

    files = [art.files[painting] for painting in art.paintings("test")]
    readable = (pixels for pixels in PictureFiles(files, model.config) if isinstance(pixels, Tensor))
    pixels = torch.stack(list(itertools.islice(readable, PICTURES))).to(machine.device)
    return Cost(parameters_of(model), gflop_of(lambda: answer(pixels[:1])),
                seconds_of(lambda: answer(pixels)) / len(pixels))


# 4. The table

ALONE, ORACLE = "From the picture alone", "Told the annotators' own emotion, which no system may know"
COSTS = ("parameters, M", "GFLOP a picture", "pictures/s")


def rows_of(found: Found, costs: Mapping[str, Cost], seeds: int) -> list[list[str]]:
    """Systems side by side; below each score its interval, and its p-value against SEVLM."""
    rows = [["test", *found]]
    for name in TABLE:
        scores = [scores[name] for scores in found.values()]
        spreads = [f" ±{100 * one['spread']:.1f}" if seeds > 1 else "" for one in scores]
        rows.append([name, *(display(name, one["value"]) + each for one, each in zip(scores, spreads, strict=True))])
        rows.append(["  95% interval", *("-".join(f"{100 * end:.1f}" for end in one["interval"]) for one in scores)])
        if any(one["against"] for one in scores):
            rows.append(["  p, Holm", *(f"{one['against']['holm']:.3f}" if one["against"] else "" for one in scores)])
    if costs:
        columns = [shown(costs.get(system)) for system in found]
        rows += [[what, *cells] for what, *cells in zip(COSTS, *columns, strict=True)]
    return rows


def shown(cost: Cost | None) -> list[str]:
    return [f"{cost.parameters / 1e6:.1f}", f"{cost.gflop:.2f}", f"{1 / cost.seconds:.0f}"] if cost else ["-"] * 3


def latex(found: Found, costs: Mapping[str, Cost]) -> str:
    """As in the paper, a line for each system; a dagger where it differs from SEVLM."""
    lines = [["System", *TABLE, *COSTS]]
    for system, scores in found.items():
        marks = [r"$^\dagger$" * bool(one["against"] and one["against"]["holm"] < 0.05) for one in scores.values()]
        values = [display(name, one["value"]) for name, one in scores.items()]
        lines.append([tex(system), *map(str.__add__, values, marks), *shown(costs.get(system))])
    head, *body = (" & ".join(line).replace(">=", r"$\geq$") + r" \\" for line in lines)
    return "\n".join([r"\begin{tabular}{l" + "r" * (len(lines[0]) - 1) + "}", r"\hline", head, r"\hline", *body,
                      r"\hline", r"\end{tabular}", rf"% \dagger: p below 0.05 against {FULL} (Holm)", ""])


def tex(text: str) -> str:
    return "".join("\\" + letter if letter in "&%$#_{}" else letter for letter in text)


def report(found: Found, tables: Mapping[str, Sequence[Sequence[str]]], note: str) -> str:
    """A page: a chart for each score, with SEVLM first, and the numbers."""
    charts = []
    for name in TABLE:
        values = {system: (found[system][name]["value"], *found[system][name]["interval"])
                  for system in sorted(found, key=lambda system: system != FULL)}
        charts.append(bar_chart(name, {system: tuple(100 * value for value in each) for system, each in values.items()
                                       if np.isfinite(each).all()}))
    parts = [f"<h2>{escape(title)}</h2>{table(rows)}" for title, rows in tables.items()]
    head = f'<h1>Table 1</h1><p>{escape(note)}</p><div class="charts">{"".join(charts)}</div>'
    return page("Table 1", head + "".join(parts))


def write_table(folder: Path, found: Found, told: Found, costs: Mapping[str, Cost], seeds: int, note: str) -> None:
    tables = {ALONE: rows_of(found, costs, seeds)} | ({ORACLE: rows_of(told, {}, seeds)} if told else {})
    text = "\n\n".join([*(f"{title}\n{aligned(rows)}" for title, rows in tables.items()), textwrap.fill(note, 100)])
    write_text(folder / "table1.txt", text + "\n")
    write_text(folder / "table1.tex", latex(found, costs))
    write_text(folder / "report.html", report(found, tables, note))
    write_json(folder / "results.json", finite_only({
        "systems": found, "told the emotion": told, "costs": {system: asdict(cost) for system, cost in costs.items()},
        "note": note}))
    print(f"\n{text}\n{folder / 'report.html'}, table1.tex, results.json")


def note_of(scores: Scores, judge: TextClassifier, decoding: str, seeds: int) -> str:
    """What must be known to read the numbers."""
    return (f"{how_tested(scores)} p: against {FULL}, corrected for the whole table (Holm). {credit(judge)}. {FULL}, "
            f"{BASE} and NLX-GPT: {decoding} decoding; SAT and M2: beam search. Seeds: {seeds}"
            + "; ± is the standard deviation over them" * (seeds > 1) + ". The costs are those of all stages, from a "
            "picture's pixels to its sentence, on this machine.")


def added(texts: Sequence[str]) -> dict[str, Path]:
    """The files of --add, by the names of their systems."""
    files = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path or name in (*SYSTEMS, *files):
            raise UserError(f"--add {text}: expected NAME=FILE, with a name that no other system has")
        files[name] = Path(path)
    return files


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m related.table1", allow_abbrev=False,
                                     description="Train what is missing, and print Table 1.")
    add_data_options(parser)
    parser.add_argument("--rows", nargs="+", choices=SYSTEMS, default=BY_DEFAULT, metavar="SYSTEM",
                        help=f"of {', '.join(SYSTEMS)} (default: {', '.join(BY_DEFAULT)}); -clip: on the patches of "
                             f"{FULL}'s vision tower instead of a ResNet's map")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="trainings of each system (default: 1)")
    parser.add_argument("--add", action="append", default=[], metavar="NAME=FILE",
                        help="predictions of another system for the test split; may be named several times")
    parser.add_argument("--decoding", choices=("greedy", "nucleus"), default="greedy",
                        help=f"of {FULL}, {BASE} and NLX-GPT (default: greedy)")
    parser.add_argument("--out", metavar="FOLDER", help="of the table and all its runs (default: runs/DATA-table1)")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    if options.seeds < 1:
        raise UserError(f"--seeds is {options.seeds}; it must be at least 1")
    art, files, seeds = art_of(options), added(options.add), range(options.seeds)
    systems = [system for system in SYSTEMS if system in options.rows]
    of_two_stages = [system for system in systems if system in PROGRAMS]
    protocol, folder = Protocol.of(art), Path(options.out or f"runs/{art.name}-table1")
    theirs = {name: [protocol.scores(path, allow_missing=False)] * len(seeds) for name, path in files.items()}
    with opened(folder, {"system": "Table 1", "data": art.name, "paintings": len(art.names)}):
        runs = Runs(folder, options.decoding, data_flags(options))
        runs.train_missing(systems, seeds)
        ours, told = ({system: [protocol.scores(runs.answers(system, seed, grounding), allow_missing=True)
                                for seed in seeds] for system in names}
                      for grounding, names in zip(GROUNDINGS, (systems, of_two_stages), strict=True))
        costs = {system: cost_of(system, runs, art) for system in systems}
        note = note_of(pooled(ours[systems[0]]), protocol.judge, options.decoding, options.seeds)
        write_table(folder, found_of(ours | theirs), found_of(told), costs, options.seeds, note)


if __name__ == "__main__":
    run_program(main)
