"""related/asked.py and related/emovit_scores.py: answers in every way, and scores of answers whose truth is known.

The model here is one whose answers are known: it says what it was asked about and how light the picture is.
"""
import argparse
import io
import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from browser import browser
from PIL import Image
from test_server import Reader, request
from torch import nn

from data import add_data_options
from related import asked, emovit, emovit_scores
from related.asked import FIRST, Asked, Wish, add_options, ask
from related.emovit import from_run
from related.emovit_scores import Exam, examine, fewer_kinds, labelled, only_label, scores_of, told
from related.instructions import Clue
from related.questions import PARAPHRASES, closed_answer
from sevlm import BUNDLED, Config, load_model, load_pixels
from support.answers import answers_for, card, text_card, upload_pages
from support.program import UserError
from support.server import Server
from support.terminal import Terminal

HOSTILE = '<img src=x onerror="alert(1)">\x1b[31m?'


class Known(nn.Module):
    """Answers "QUESTION, LIGHT", where LIGHT is the picture's mean; each label is as likely as `chances` says."""
    config, device, about = Config.toy(image_size=16), torch.device("cpu"), {"data": "toy", "kinds": ["categorical"]}

    def __init__(self, chances=lambda question, answer, light: 0.0):
        super().__init__()
        self.chances, self.asked, self.weight = chances, [], nn.Parameter(torch.zeros(1))

    def encode_image(self, pixels):
        return pixels.flatten(1).float().mean(1).view(-1, 1, 1)

    def answer(self, features, questions, top_p=0.0, beams=0, seeds=0, length=None):
        self.asked.append((len(questions), top_p, beams))
        drawn = [f", drawn {seed % 1000}" for seed in seeds] if top_p else [""] * len(questions)
        return [f"{question} {light:.0f}{more}" for question, light, more in
                zip(questions, features.flatten().tolist(), drawn, strict=True)]

    def answer_log_probs(self, features, questions, answers):
        return torch.tensor([[self.chances(question, answer, light) for answer in answers]
                             for question, light in zip(questions, features.flatten().tolist(), strict=True)])


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    files = [tmp_path / "pictures" / f"p{light}.png" for light in (10, 60, 200)]
    files[0].parent.mkdir()
    for light, file in zip((10, 60, 200), files, strict=True):
        Image.new("RGB", (40, 30), (light, light, light)).save(file)
    return files


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Ask in this process: `run(flags)` gives the exit code and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asked, "load_emovit", lambda source, flag: Known())

    def call(*flags) -> tuple[int, str]:
        parser = argparse.ArgumentParser()
        add_options(parser)
        return ask(parser.parse_args(["--run", "runs/known", "--precision", "float32", *map(str, flags)])), capsys.readouterr().out
    return call


def records(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


# answers

def test_every_question_is_asked_of_every_picture(run, pictures):
    code, output = run(*pictures, "--ask", "one?", "--ask", "  two? ", "--json")
    assert code == 0 and [(one["image"], one["answers"]) for one in records(output)] == [
        (str(file), [{"question": question, "answer": f"{question} {light}"} for question in ("one?", "two?")])
        for file, light in zip(pictures, (10, 60, 200), strict=True)]
    assert {"image", "answers", "seconds"} == set(records(output)[0])


def test_how_it_is_answered_reaches_the_model(pictures):
    for wish, passed in ((Wish(), (3, 0.0, 0)), (Wish(beam=4), (3, 0.0, 4)), (Wish(top_p=0.9), (3, 0.9, 0))):
        model = Known()
        list(answers_for(Asked(model, "", ["a?"], wish), pictures))
        assert model.asked == [passed]


def test_what_is_drawn_depends_on_picture_question_and_seed_alone(pictures):
    def drawn(files, questions, seed=0) -> dict:
        answerer = Asked(Known(), "", questions, Wish(top_p=0.9, seed=seed))
        return {(one.record["image"], each["question"]): each["answer"] for one in answers_for(answerer, files) for each in one.record["answers"]}
    together = drawn(pictures, ["a?", "b?"])
    assert len({text[-3:] for text in together.values()}) == 6
    assert drawn(pictures[1:2], ["b?"]).items() <= together.items() and drawn(pictures, ["a?", "b?"], 1).items().isdisjoint(together.items())


def test_a_broken_picture_and_answers_asked_before(run, pictures, tmp_path):
    pictures[1].write_bytes(b"no picture")
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    assert run(*pictures, "--ask", "a?", "--out", out)[0] == 1 and len(records(out.read_text())) == 2
    run(*pictures, "--ask", "a?", "--out", out, "--html", page)
    assert len(records(out.read_text())) == 2 and [page.read_text().count(part) for part in ("<article", "<img", "<dd>", "cannot be read")] == [3, 2, 2, 1]
    run(*pictures, "--ask", "another?", "--out", out)
    assert len(records(out.read_text())) == 4


def test_nothing_that_is_asked_or_answered_is_code(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    record = {"image": HOSTILE, "answers": [{"question": HOSTILE, "answer": "light " * 20}, {"question": "?", "answer": ""}]}
    answerer = Asked(Known(), "", [HOSTILE], Wish())
    text = text_card(answerer, record, Terminal(io.TextIOWrapper(io.BytesIO(), encoding="ascii")))
    assert "\x1b" not in text and max(map(len, text.splitlines()[2:])) <= 40 and "      (nothing)" in text
    page = card(answerer, asked.Answer(record, image=Image.new("RGB", (9, 9))))
    assert Reader(page).tags.count("dt") == 2 and "<img src=x" not in page and "\x1b" not in page


@pytest.mark.parametrize("flags, message", [
    (("--top-p", 2), "--top-p is 2"), (("--beam", -1), "--beam"), (("--beam", 2, "--top-p", 0.5), "--beam and --top-p contradict"), (("--seed", 3), "--seed needs --top-p"),
    (("--ask", "  "), "a question has 1 to"), (("--ask", "why " * 1000), "a question has 1 to"), (("--serve", 0), "without PICTURE"), (("none.png",), "no such file")])
def test_wrong_flags_are_refused(run, pictures, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(pictures[0], *flags)


def test_without_a_picture(run):
    with pytest.raises(UserError, match="name a picture"):
        run("--ask", "a?")
    with pytest.raises(UserError, match="without --ask"):
        run("--serve", 0, "--ask", "a?")


def test_a_real_model_by_its_program(pictures, tmp_path, monkeypatch, capsys):
    model = from_run(load_model(BUNDLED), queries=4, q_blocks=1, q_width=32, q_heads=2, q_inner=32, question_length=32, answer_length=8)
    model.about = {"data": "toy", "kinds": ["categorical"]}
    emovit.save(model, tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "mine" / "results.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    said = {}
    for how in ("", "--top-p=0.9", "--beam=3"):
        monkeypatch.setattr(sys, "argv", ["emovit", *map(str, pictures), "--ask", "why?", "--json", "--precision=float32", *filter(None, [how])])
        assert emovit.main() == 0
        said[how] = [one["answers"][0]["answer"] for one in records(capsys.readouterr().out)]
    features = model.encode_image(torch.stack([load_pixels(file, model.config) for file in pictures]))
    assert said[""] == model.answer(features, ["why?"] * 3) and len(said["--top-p=0.9"]) == len(said["--beam=3"]) == 3


# the page that is asked

@pytest.fixture
def address():
    with Server(*upload_pages(Asked(Known(), "a test model", [FIRST], Wish(top_p=0.9))), 0) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield "127.0.0.1", running.server_port
        running.shutdown()


def test_the_server_is_asked(address, pictures):
    picture = pictures[0].read_bytes()
    status, page = request(address, "GET", "/")
    assert status == 200 and {"form", "input", "button"} <= set(Reader(page).tags) and f'value="{FIRST}"' in page
    assert f"<dt>{FIRST}</dt><dd>{FIRST} 10, drawn" in request(address, "POST", "/answer", picture)[1]
    status, told = request(address, "POST", "/answer?question=%3Cb%3E+why%3F&seed=2", picture)
    assert status == 200 and Reader(told).tags.count("dt") == 1 and "<dt>&lt;b&gt; why?</dt><dd>&lt;b&gt; why? 10" in told
    for status, path, body in [(400, "/answer?question=+", picture), (400, f"/answer?question={'a' * 2000}", picture), (400, "/answer?seed=x", picture), (415, "/answer", b"")]:
        assert request(address, "POST", path, body)[0] == status, path


def test_a_question_in_a_browser(address, pictures):
    said, field = "document.querySelector('dd')?.textContent", "document.querySelector('[name=question]')"
    with browser() as tab:
        tab.show(390)
        tab.open(f"http://{address[0]}:{address[1]}/")
        tab.choose("input[type=file]", pictures[0])
        first = tab.until(f"({said} || '').startsWith('{FIRST} 10') && {said}")
        tab.run(f"{field}.value = 'why?'; {field}.focus()")
        for kind in ("keyDown", "keyUp"):
            tab.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13)
        why = tab.until(f"{said}.startsWith('why? 10') && {said}")
        tab.run("document.querySelector('button[name=seed]').click()")
        tab.until(f"{said}.startsWith('why? 10') && {said} !== {json.dumps(why)}")
        tab.choose("input[type=file]", pictures[2])
        tab.until(f"{said}.startsWith('why? 200')")
        assert tab.run("location.pathname + location.search") == "/" and first, "the form itself goes nowhere"
        assert tab.run("document.documentElement.scrollWidth <= 390"), "fits a phone"
        assert tab.complaints == []


# scores

def exam_about(pictures, **changes) -> Exam:
    labels = ["anger", "awe", "fear"]
    truth = dict(zip(map(str, pictures), ("awe", "fear", None), strict=True))
    return Exam("three", {str(file): file for file in pictures}, labels, truth, **changes)


def answered(model, exam: Exam, monkeypatch) -> emovit_scores.Examined:
    monkeypatch.setattr(emovit_scores, "load_emovit", lambda source, flag: model)
    return examine("runs/known", "--evaluate", [exam], argparse.Namespace(device="cpu", precision="float32"))


def test_the_emotion_is_the_likeliest_closed_answer_under_five_wordings(pictures, monkeypatch):
    exam, heard = exam_about(pictures), set()

    def chances(question, answer, light):
        heard.add((question, answer))
        wording = [one(exam.labels) for one in PARAPHRASES].index(question)
        return float(answer == closed_answer("awe" if wording < 3 or light < 20 else "fear"))  # p0 is awe, p60 is fear
    found = told(exam, {"a": answered(Known(chances), exam, monkeypatch)}, None)["runs"]["a"]
    assert heard == {(one(exam.labels), f"Predict emotion: {label}") for one in PARAPHRASES for label in exam.labels}
    assert found["ACC by wording"] == [0.5, 0.5, 0.5, 1, 1], "the third picture's truth is unknown"
    assert found["scores"]["ACC"]["value"] == 0.7 and found["sensitivity"] == pytest.approx(0.06 ** 0.5 / 0.7)
    assert found["confusion"] == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("answer, label", [
    ("Predict emotion: anger", "anger"), ("danger", None), ("fear, then anger", None), ("awesome", None), ("AWE.", "awe"), ("", None), ("a fear of fear", "fear")])
def test_danger_is_not_anger(pictures, answer, label):
    assert only_label(exam_about(pictures), answer) == label


def test_what_is_said_counts_for_every_picture(pictures, monkeypatch):
    exam, model = exam_about(pictures), Known()
    model.answer = lambda features, questions, **_: ["awe" if light < 20 else "danger" for light in features.flatten().tolist()]
    scores = scores_of(exam, answered(model, exam, monkeypatch).sheets["three"], None)
    assert (scores["ACC of what is said"].value, scores["one label is said"].value) == (0.5, pytest.approx(1 / 3))


def test_a_broken_picture_is_wrong_and_not_forgotten(pictures, monkeypatch):
    pictures[1].write_bytes(b"no picture")
    exam = exam_about(pictures)
    found = answered(Known(lambda question, answer, light: float("awe" in answer)), exam, monkeypatch)
    assert set(found.problems["three"]) == {str(pictures[1])} and scores_of(exam, found.sheets["three"], None)["ACC"].value == 0.5
    for file in pictures:
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match="no picture of three can be used"):
        answered(Known(), exam, monkeypatch)


def test_clues_are_right_or_wrong(pictures, monkeypatch):
    names = list(map(str, pictures))
    def clue(name, asked, question, truth):
        return asked, Clue(name, asked, question, truth, ("sea", "moon", "10", "60"))
    clues = {names[0]: [clue(names[0], "subject", "the sea?", "sea"), clue(names[0], "light", "?", "10")],
             names[1]: [clue(names[1], "light", "?", "10")], names[2]: [clue(names[2], "subject", "sea or moon?", "sea")]}
    exam = exam_about(pictures, clues=clues)
    scores = scores_of(exam, answered(Known(), exam, monkeypatch).sheets["three"], None)
    assert {name: (scores[name].value, scores[name].images) for name in ("subject", "light")} == {"subject": (0.0, 2), "light": (0.5, 2)}


# the program

@pytest.fixture
def evaluate(monkeypatch, capsys, tmp_path):
    """Evaluate in this process; a run's weights are its name: the longer, the more often it is right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emovit_scores.metrics, "text_classifier_of", lambda art, train: None)

    def load(source, flag):
        model = Known(lambda question, answer, light: (answer[-1] == "e") * len(Path(source).name) - (light % 7 > 3))
        model.about = json.loads((Path(source) / "config.json").read_text())["about"]
        return model
    monkeypatch.setattr(emovit_scores, "load_emovit", load)

    def call(*flags) -> str:
        parser = argparse.ArgumentParser()
        add_options(parser)
        emovit_scores.add_options(parser)
        add_data_options(parser)
        parser.add_argument("--emoset")
        emovit_scores.evaluate(parser.parse_args(["--precision", "float32", *map(str, flags)]))
        return capsys.readouterr().out
    return call


def a_run(folder: Path, *kinds: str, **more) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"emovit": {}, "about": {"data": "toy", "kinds": kinds} | more}))
    (folder / "results.json").write_text("{}")
    return folder


def test_runs_with_fewer_kinds_stand_beside_a_run(tmp_path):
    full = a_run(tmp_path / "full", "categorical", "conversation", "reasoning")
    for number, kinds in enumerate((["categorical"], ["categorical"], ["categorical", "conversation"], ["categorical", "conversation", "reasoning"], [])):
        os.utime(a_run(tmp_path / f"run{number}", *kinds) / "results.json", times=(number, number))
    a_run(tmp_path / "on-other-data", "categorical", data="artemis_v1")
    (a_run(tmp_path / "on-its-way", "categorical") / "results.json").unlink()
    (a_run(tmp_path / "other-system", "categorical") / "config.json").write_text('{"sevlm": {}}')
    assert {one.name for one in fewer_kinds(full)} == {"run1", "run2"}


def test_the_test_split_and_all_kinds(evaluate, tmp_path, toy_root):
    runs = [a_run(tmp_path / "runs" / f"run{'x' * len(kinds)}", *kinds) for kinds in (("categorical",), ("categorical", "conversation"), ("categorical", "conversation", "reasoning"))]
    text = evaluate("--evaluate", runs[-1], "--data-root", toy_root, "--toy-paintings", 60)
    results = json.loads((runs[-1] / "evaluation-toy" / "results.json").read_text())["exams"]["toy"]
    assert list(results["runs"]) == ["categorical", "categorical + conversation", "categorical + conversation + reasoning"]
    assert {"ACC", "subject", "subject (other words)", "colour", "brightness", "ROUGE-L"} <= set(results["runs"]["categorical"]["scores"])
    first, *others = (run["scores"]["ACC"]["against"] for run in results["runs"].values())
    assert not first and all(0 < one["p"] <= one["holm"] <= 1 for one in others)
    assert "sensitivity" in text and "p, Holm" in text and (runs[-1] / "evaluation-toy" / "table.txt").read_text() == text
    page = (runs[-1] / "evaluation-toy" / "report.html").read_text()
    dialogues = records((runs[-1] / "evaluation-toy" / "dialogues.jsonl").read_text())
    assert len(dialogues) == results["pictures"] and all("right" in one for each in dialogues for one in each["answers"][1:-1])
    assert Reader(page).tags.count("dl") == page.count("<article") > 5
    assert 6 <= page.count("<dd data-right=") / page.count("<dl") <= 7, "the truth about the emotion is not always known"


def test_labelled_pictures_under_their_own_labels(evaluate, pictures, tmp_path):
    for label, file in zip(("deep_calm", "Joy", "Joy"), pictures, strict=True):
        (tmp_path / "set" / label).mkdir(parents=True, exist_ok=True)
        file.rename(tmp_path / "set" / label / file.name)
    run = a_run(tmp_path / "runs" / "known", "categorical")
    assert list(labelled(tmp_path / "set").labels) == ["joy", "deep calm"]
    results = json.loads(evaluate("--evaluate", run, "--labels", tmp_path / "set", "--json"))["exams"]["set"]
    assert results["labels"] == ["joy", "deep calm"] and results["pictures"] == 3 and "subject" not in results["runs"]["categorical"]["scores"]
    with pytest.raises(UserError, match="there is no such folder"):
        evaluate("--evaluate", run, "--labels", "nowhere")
    with pytest.raises(UserError, match="is no EmoVIT"):
        evaluate("--evaluate", run, "--labels", tmp_path / "set", "--versus", BUNDLED)
    with pytest.raises(UserError, match="--evaluate asks its own questions, without --ask, --top-p"):
        evaluate("--evaluate", run, "--labels", tmp_path / "set", "--ask", "why?", "--top-p", 0.5)


def test_a_page_of_dialogues_in_a_browser(evaluate, tmp_path, toy_root):
    run = a_run(tmp_path / "runs" / HOSTILE.replace("/", ""), "categorical")
    evaluate("--evaluate", run, "--data-root", toy_root, "--toy-paintings", 60)
    with browser() as tab:
        tab.show(390, dark=True)
        tab.open((run / "evaluation-toy" / "report.html").as_uri())
        assert tab.run("[...document.images].every(image => image.naturalWidth > 0) && document.images.length") > 5
        assert tab.run("getComputedStyle(document.querySelector('[data-right]'), '::before').content").startswith(('"✗', '"✓'))
        assert tab.run("document.documentElement.scrollWidth <= 390"), "fits a phone"
        assert tab.complaints == []
