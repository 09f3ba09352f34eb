"""sample.py: answers, the terminal, JSON, heatmaps, the page and the server, with a tiny random model."""
import contextlib
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browser
from PIL import Image
from test_server import Reader, request

import sample
from sevlm import BUNDLED, EMOTIONS, load_model, load_pixels, save
from support import answers
from support.answers import answers_for, card, text_card, upload_pages
from support.program import UserError
from support.server import Server
from support.terminal import Terminal

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.png"))
HOSTILE = '<img src=x onerror="alert(1)">&\x1b[31m.png'
NO_UTF8 = os.fsdecode(b"caf\xe9.png")


@pytest.fixture
def folder(make_model, tmp_path) -> Path:
    model = make_model()
    model.about = {"data": "toy"}
    save(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    rng, files = np.random.default_rng(0), []
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        files.append(tmp_path / "pictures" / f"p{number}.png")
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8)).save(files[-1])
    return files


@pytest.fixture
def ask(folder, monkeypatch, capsys, tmp_path):
    """Run the program in this process: `ask(flags)` gives its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*flags) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", str(folder), "--precision", "float32", *map(str, flags)])
        code = sample.main()
        return code, capsys.readouterr().out
    return run


def records(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


# answers

def test_json_has_all_fields_and_nothing_else_is_printed(ask, pictures):
    code, output = ask(*pictures, "--json", "--samples", 3)
    assert code == 0 and [one["image"] for one in records(output)] == list(map(str, pictures))
    for one in records(output):
        assert set(one) == {"image", "emotion", "probabilities", "explanation", "explanations", "words", "seconds"}
        assert tuple(one["probabilities"]) == EMOTIONS and sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-12)
        assert one["emotion"] == max(one["probabilities"], key=one["probabilities"].get)
        assert len(one["explanations"]) == 3 and one["explanations"][0]["explanation"] == one["explanation"]
        assert all(set(told) == {"emotion", "explanation", "log_probability", "match"} for told in one["explanations"])
        spelled = ["".join(filter(str.isalnum, text)) for text in ("".join(word["word"] for word in one["words"]), one["explanation"])]
        assert spelled[0] == spelled[1]
        assert all(word["vad"] is None or len(word["vad"]) == 3 for word in one["words"]) and one["seconds"] > 0


def test_the_same_seed_says_the_same_and_another_something_else(ask, pictures):
    def said(*flags) -> list[str]:
        return [one["explanation"] for one in records(ask(*flags, "--json")[1])]
    together = said(*pictures)
    assert together == said(*pictures) == [said(picture)[0] for picture in pictures]
    assert together != said(*pictures, "--seed", 1)
    assert said(*pictures, "--greedy") == said(*pictures, "--greedy") != together


def test_best_of_keeps_the_highest_match(ask, pictures):
    for one in records(ask(*pictures, "--best-of", 6, "--json")[1]):
        best = max(one["explanations"], key=lambda told: told["match"])
        assert len(one["explanations"]) == 6 and one["explanation"] == best["explanation"]


def test_the_match_is_the_models_score(make_model, pictures):
    model = make_model()
    pixels = load_pixels(pictures[0], model.config)[None]
    [one] = sample.answer(model, pixels, ["a"], sample.Wish(samples=3))
    told = one.record["explanations"]
    short = [place for place, each in enumerate(told) if len(model.text.tokens(each["explanation"])) < 15]  # not cut off
    again = model.score(model.encode_image(pixels), [each["emotion"] for each in told], [each["explanation"] for each in told])
    assert all(again[place].item() == pytest.approx(told[place]["match"], abs=1e-3) for place in short)


def test_emotions_can_be_forced(ask, pictures):
    [one] = records(ask(pictures[0], "--emotion", "something else", "--json")[1])
    assert one["emotion"] == one["explanations"][0]["emotion"] == "something else"
    for nine in records(ask(*pictures[:2], "--all-emotions", "--samples", 2, "--json")[1]):
        assert [told["emotion"] for told in nine["explanations"]] == [emotion for emotion in EMOTIONS for _ in range(2)]
        assert nine["emotion"] == max(nine["probabilities"], key=nine["probabilities"].get)
        assert nine["explanation"] == nine["explanations"][2 * EMOTIONS.index(nine["emotion"])]["explanation"]


def test_beams_come_likeliest_first(ask, pictures):
    [one] = records(ask(pictures[0], "--beam", 3, "--json")[1])
    assert len({told["explanation"] for told in one["explanations"]}) == 3


def test_a_models_own_emotions(make_model, ask, pictures, tmp_path):
    own = ("calm", "deep sorrow", "awe")
    save(make_model(emotions=own), tmp_path / "own")
    [one] = records(ask(pictures[0], "--checkpoint", tmp_path / "own", "--emotion", "deep sorrow", "--json")[1])
    assert tuple(one["probabilities"]) == own and one["emotion"] == "deep sorrow"
    assert "deep sorrow" in ask(pictures[0], "--checkpoint", tmp_path / "own", "--all-emotions", "--html", "own.html")[1]
    with pytest.raises(UserError, match="the emotions are calm, deep sorrow, awe"):
        ask(pictures[0], "--checkpoint", tmp_path / "own", "--emotion", "fear")


def test_another_programs_probabilities_and_note(make_model, pictures):
    model = make_model()
    def gated(model, features):
        log_probs = torch.full((len(features), 9), -5.0)
        log_probs[:, EMOTIONS.index("fear")] = 0.0
        return log_probs.log_softmax(1), ["alone it would say\x1b awe"] * len(features)
    answerer = sample.Explainer(model, "", sample.Wish(attention=True), probabilities=gated)
    [one] = answers_for(answerer, pictures[:1])
    assert one.record["emotion"] == one.record["explanations"][0]["emotion"] == "fear" and one.record["probabilities"]["fear"] > 0.9
    assert "alone it would say\\x1b awe" in text_card(answerer, one.record, Terminal(io.StringIO()))
    assert '<p class="note">alone it would say\\x1b awe</p>' in card(answerer, one)


def test_a_broken_picture_becomes_an_entry_and_the_rest_go_on(ask, pictures, tmp_path):
    pictures[2].write_bytes(b"no picture")
    code, output = ask(tmp_path / "pictures", "--json")
    assert code == 1 and ["error" in one for one in records(output)] == [False, False, True, False, False]


def test_attention_of_words_comes_from_their_tokens():
    maps = np.zeros((6, 4), np.float32)
    maps[3], maps[4], maps[5] = (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 3)
    words = sample.word_maps(maps, [("melancholy", [3, 4]), ("sea", [5])])
    assert words.tolist() == [[[1, 1], [0, 0]], [[0, 0], [pytest.approx(1 / 3), 1]]]


# --out

def test_out_is_continued(ask, pictures, tmp_path):
    out = tmp_path / "deep" / "out.jsonl"
    assert ask(*pictures[:3], "--out", out) == (0, "")
    first = out.read_text()
    out.write_text(first + '{"image": "cut o')  # as a kill in the middle of a line leaves it
    ask(*pictures, "--out", out)
    assert out.read_text().startswith(first)
    assert [one["image"] for one in records(out.read_text())] == list(map(str, pictures))


@pytest.mark.parametrize("flags", [("--emotion", "fear"), ("--seed", 1), ("--greedy",), ("--temperature", 2), ("--samples", 2)])
def test_another_question_is_asked_again(ask, pictures, tmp_path, flags):
    out = tmp_path / "out.jsonl"
    ask(*pictures, "--out", out)
    before = out.read_text()
    for _ in range(2):
        ask(*pictures, "--out", out, *flags)
        assert out.read_text().startswith(before) and len(records(out.read_text())) == 10


def test_another_model_is_asked_again(ask, pictures, tmp_path, folder, make_model):
    out = tmp_path / "out.jsonl"
    ask(pictures[0], "--out", out)
    shutil.move(folder, tmp_path / "moved")
    ask(pictures[0], "--out", out, "--checkpoint", tmp_path / "moved")
    assert len(records(out.read_text())) == 1, "the same model in another place"
    model = make_model()
    with torch.no_grad():
        model.decoder.wte.weight[0, 0] += 1
    save(model, tmp_path / "other")
    ask(pictures[0], "--out", out, "--checkpoint", tmp_path / "other")
    assert len(records(out.read_text())) == 2


@pytest.mark.parametrize("content", ["notes of mine", "notes of mine\n", '{"image": "a", "emotion": "awe"}\n', "[1]\n", '{"image": "a", "question": 1}\nx\n{"im', "\udcff\n"])
def test_a_file_that_is_not_ours_stays_as_it_is(ask, pictures, tmp_path, content):
    out = tmp_path / "mine.txt"
    out.write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match="mine.txt, line"):
        ask(pictures[0], "--out", out)
    assert out.read_text(errors="surrogateescape") == content


def test_a_page_shows_earlier_answers_too_and_errors_are_not_kept(ask, pictures, tmp_path):
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    pictures[1].write_bytes(b"no picture")
    assert ask(*pictures[:3], "--out", out)[0] == 1 and len(records(out.read_text())) == 2
    pictures[0].write_bytes(b"no picture any more")
    assert ask(*pictures, "--out", out, "--html", page)[0] == 1
    text = page.read_text()
    assert [text.count(part) for part in ("<article", "<img", "cannot be read")] == [5, 3, 2]
    assert [text.index(f"<h2>{picture.name}") for picture in pictures] == sorted(text.index(f"<h2>{picture.name}") for picture in pictures)


# shown

def test_the_terminal_shows_bars_sentence_and_gauges(ask, pictures):
    _, output = ask(pictures[0])
    [one] = records(ask(pictures[0], "--json")[1])
    assert f"{one['emotion']:15}" in output and "because" in output and "%" in output
    assert "\x1b" not in output and max(map(len, output.splitlines())) <= 100


RECORD = {"image": "x.png", "emotion": "awe", "probabilities": {"amusement": 0.02, "awe": 0.9, "fear": 0.08}, "explanation": "light " * 20,
          "explanations": [{"emotion": "awe", "explanation": "light " * 20}], "words": [{"word": "light", "vad": [0.5, -1.0, 1.0]}]}


ANSWERER = sample.Explainer(None, "a test model", sample.Wish())  # showing needs no model


def test_text_fits_narrow_terminals_and_plain_ones(monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")
    text = text_card(ANSWERER, RECORD, Terminal(io.TextIOWrapper(io.BytesIO(), encoding="ascii")))
    assert text.isascii() and max(map(len, text.splitlines())) <= 44 and "valence   ------o-- +0.50" in text


def test_colours_are_the_only_escapes(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stream.isatty = lambda: True
    hostile = RECORD | {"image": HOSTILE, "explanations": [{"emotion": "awe", "explanation": "a \x1b]0;title\x07 \x9b31m b"}], "note": "\x1b[2J"}
    text = text_card(ANSWERER, hostile, Terminal(stream))
    plain = re.sub(r"\x1b\[(1;)?38;2;\d+;\d+;\d+m|\x1b\[0m", "", text)
    assert text != plain and not any(ord(letter) < 32 and letter != "\n" or 127 <= ord(letter) < 160 for letter in plain)


def test_names_that_are_no_text(ask, pictures, tmp_path):
    files = [pictures[0].rename(tmp_path / "pictures" / HOSTILE), pictures[1].rename(tmp_path / "pictures" / NO_UTF8)]
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    assert ask(*files, "--out", out, "--html", page, "--heatmap") == (0, "") and ask(*files, "--out", out) == (0, "")
    assert [one["image"] for one in records(out.read_text())] == list(map(str, files))
    assert [one["image"] for one in records(ask(*files, "--json")[1])] == list(map(str, files))
    text = page.read_text(encoding="utf-8")
    assert Reader(text).tags.count("article") == 2 and "<img src=x" not in text and "&lt;img src=x onerror=" in text and "caf\\udce9.png" in text
    assert "\x1b" not in text and len(list((tmp_path / "heatmaps").iterdir())) == 2
    said = subprocess.run([sys.executable, ROOT / "sample.py", "--checkpoint", tmp_path / "model", *files], capture_output=True, check=True).stdout
    assert b"\x1b" not in said and b"caf\\udce9.png" in said


def test_two_pictures_never_share_a_heatmap(ask, pictures, tmp_path):
    for name in ("a/b_c.png", "a_b/c.png", "a/b/c.png", "a b/c.png", "a.b/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(pictures[0]).save(tmp_path / name)
    files = [path for folder in ("a", "a_b", "a b", "a.b") for path in (tmp_path / folder).rglob("*.*")]
    ask(*files, tmp_path / "a" / ".." / "a_b" / "c.png", "--heatmap")
    heatmaps = list((tmp_path / "heatmaps").iterdir())
    assert len(heatmaps) == 5
    with Image.open(heatmaps[0]) as image:
        assert image.format == "PNG" and image.width > 900 and np.ptp(np.asarray(image)) > 100


def test_the_page_is_well_formed(ask, pictures, tmp_path):
    page = tmp_path / "page.html"
    ask(*pictures, "--html", page, "--all-emotions")
    text = page.read_text()
    assert Reader(text).tags.count("article") == 5 and text.count("data-grid=") > 5
    assert "unsafe-inline" not in text and text.count('tabindex="0"') == 5, "one stop for a sentence"


def test_the_gallery_in_a_browser(ask, pictures, tmp_path):
    page = tmp_path / "page.html"
    ask(*pictures, "--html", page)
    with browser() as tab:
        tab.open(page.as_uri())
        assert tab.run("[...document.images].every(image => image.naturalWidth > 0 && image.alt) && document.images.length") == 5
        tab.run("document.querySelector('.word').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))")
        assert tab.run("document.querySelector('canvas.on').width") == 2
        tab.show(390, dark=True)
        assert tab.run("document.documentElement.scrollWidth <= 390")
        assert tab.complaints == []


# the program

def test_mistakes_are_named(ask, pictures, folder, tmp_path):
    for name, config in (("foreign", '{"model_type": "gpt2"}'), ("runs/other", '{"classes": 9}'), ("asks", '{"ask": "python ask.py PICTURES"}')):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "release" / "nle_model_3").mkdir(parents=True)
    for flags, message in [
            ((tmp_path / "none.jpg",), "no such file"), ((tmp_path / "nothing",), "no pictures in"), ((), "name a picture"),
            ((pictures[0], "--checkpoint", tmp_path / "nothing"), "is no SEVLM checkpoint"),
            ((pictures[0], "--checkpoint", tmp_path / "foreign"), "was not written by SEVLM"),
            ((pictures[0], "--checkpoint", tmp_path / "asks"), "python ask.py PICTURES"),
            ((pictures[0], "--checkpoint", "runs/typo"), "runs/typo: there is no such folder"),
            ((pictures[0], "--checkpoint", tmp_path / "release"), "python -m related.authors .* --lexicon FILE --out FOLDER"),
            ((pictures[0], "--device", "tpu"), "this machine has")]:
        with pytest.raises(UserError, match=message):
            ask(*flags)


@pytest.mark.parametrize("flags, message", [
    (("--samples", 0), "--samples is 0"), (("--samples", -3), "--samples"), (("--best-of", -1), "--best-of"), (("--beam", -2), "--beam"),
    (("--seed", -1), "--seed"), (("--seed", 10**30), "--seed"), (("--top-p", 0), "--top-p"), (("--top-p", 1.01), "--top-p"), (("--top-p", "nan"), "--top-p"),
    (("--temperature", 0), "--temperature"), (("--temperature", "nan"), "--temperature"), (("--temperature", "inf"), "--temperature"),
    (("--serve", 99999), "--serve 99999"), (("--serve", -1), "--serve -1"),
    (("--greedy", "--best-of", 3), "--greedy and --best-of contradict"), (("--greedy", "--top-p", 0.5), "--greedy and --top-p contradict"),
    (("--beam", 3, "--samples", 2), "--beam and --samples contradict"), (("--beam", 2, "--seed", 2), "--beam and --seed contradict"),
    (("--samples", 2, "--best-of", 2), "--samples and --best-of contradict"), (("--emotion", "awe", "--all-emotions"), "contradict"),
    (("--serve", 0, "--json"), "without --json"), (("--serve", 0, "--html", "a.html"), "without --html"), (("--serve", 0, "--out", "a"), "without --out"),
    (("--serve", 0, "--heatmap"), "without --heatmap"), (("--serve", 0, "--emotion", "awe"), "without --emotion"), (("--emotion", "joy"), "unknown emotion 'joy'")])
def test_wrong_flags_are_refused(ask, pictures, tmp_path, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ask(*([] if "--serve" in flags else [pictures[0]]), *flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pictures"], "nothing is written"


def test_serve_takes_its_pictures_on_the_page(ask, pictures):
    with pytest.raises(UserError, match="asks and answers on its page, without PICTURE"):
        ask(pictures[0], "--serve", 0)


def test_best_of_needs_the_head(make_model, ask, pictures, tmp_path):
    save(make_model(contrastive_head=False), tmp_path / "headless")
    with pytest.raises(UserError, match="has none"):
        ask(pictures[0], "--checkpoint", tmp_path / "headless", "--best-of", 2)
    [one] = records(ask(pictures[0], "--checkpoint", tmp_path / "headless", "--json")[1])
    assert one["explanations"][0]["match"] is None


def test_a_model_without_vad_answers(make_model, ask, pictures, tmp_path):
    save(make_model(vad_input=False, vad_head=False), tmp_path / "plain")
    [one] = records(ask(pictures[0], "--checkpoint", tmp_path / "plain", "--json", "--html", "page.html")[1])
    assert all(word["vad"] is None for word in one["words"])


def test_the_newest_full_model_speaks_by_default(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample.find_checkpoint() == BUNDLED

    def run(name: str, age: float, config: str = "") -> None:
        if config:
            (tmp_path / "runs" / name).mkdir(parents=True)
            (tmp_path / "runs" / name / "config.json").write_text(config)
            (tmp_path / "runs" / name / "model.safetensors").touch()
        else:
            save(make_model(), tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "model.safetensors", times=(time.time() - age,) * 2)

    run("full-blown", 1000)
    run("old", 900)
    assert sample.find_checkpoint() == Path("runs/old")
    for age, name in enumerate(("full-0", "no-VAD-head-0", "full-1", "baseline-1")):
        run(f"components/{name}", 800 - age)
    run("other-study/full-0", 850)
    assert sample.find_checkpoint() == Path("runs/components/full-1"), "not the last ablation"
    run("toy-classifier", 10, '{"classes": 9}')
    assert sample.find_checkpoint() == Path("runs/components/full-1"), "other systems have runs too"
    (tmp_path / "runs" / "evaluated").mkdir()
    (tmp_path / "runs" / "evaluated" / "results.json").write_text("{}")
    run("new", 5)
    assert sample.find_checkpoint() == Path("runs/new")


@pytest.mark.parametrize("precision, told", [("float32", "float32: as asked"), ("bf16", "bf16: as asked"), ("auto", "float32: narrow layers gain nothing")])
def test_the_precision_is_told_with_its_reason(ask, pictures, folder, monkeypatch, capsys, precision, told):
    monkeypatch.setattr(sys, "argv", ["sample.py", str(pictures[0]), "--checkpoint", str(folder), "--precision", precision])
    assert sample.main() == 0
    [line] = capsys.readouterr().err.splitlines()
    assert "model, trained on toy paintings" in line and told in line


def test_answers_are_not_kept(ask, pictures, monkeypatch):
    alive, show = [], answers.show
    def count(*arguments) -> None:
        gc.collect()
        alive.append(sum(type(one) is answers.Answer for one in gc.get_objects()))
        show(*arguments)
    monkeypatch.setattr(answers, "BATCH", 1)
    monkeypatch.setattr(answers, "show", count)
    ask(*pictures, "--html", "page.html", "--out", "out.jsonl")
    assert len(alive) == 5 and max(alive) <= 2


def test_a_page_replaces_only_a_page(ask, pictures):
    before = pictures[0].read_bytes()
    with pytest.raises(UserError, match="is a file of another kind"):
        ask(pictures[1], "--html", pictures[0])  # as --html *.png would say
    assert pictures[0].read_bytes() == before
    ask(pictures[1], "--html", "page.html")
    assert ask(pictures[2], "--html", "page.html")[0] == 0


def test_nothing_slow_is_imported():
    slow = {"http.server", "data", "metrics", "train", "torchvision", "huggingface_hub", "PIL.ImageFont", "support.server", "support.drawing"}
    code = f"import sys, sample; print({slow} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "set()\n"


# the server

@pytest.fixture
def address(make_model):
    with Server(*upload_pages(sample.Explainer(make_model(), "a test model", sample.Wish(attention=True))), 0) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield "127.0.0.1", running.server_port
        running.shutdown()


def test_the_server_answers_a_picture(address, pictures):
    status, page = request(address, "GET", "/")
    assert status == 200 and {"form", "select", "button", "section"} <= set(Reader(page).tags) and page.count("<option") == 10
    picture = pictures[0].read_bytes()
    status, card = request(address, "POST", "/answer?seed=1&name=%3Cb%3E.png", picture)
    assert status == 200 and Reader(card).tags.count("article") == 1 and "&lt;b&gt;.png" in card and "data-grid" in card
    assert request(address, "POST", "/answer?seed=1&name=%3Cb%3E.png", picture) == (200, card)
    assert request(address, "POST", "/answer?seed=2&name=%3Cb%3E.png", picture)[1] != card
    assert "<b>fear</b> because" in request(address, "POST", "/answer?emotion=fear", picture)[1]


def test_the_server_says_what_the_program_says(address, make_model, pictures, tmp_path):
    photo = tmp_path / "photo.jpg"  # large enough for a JPEG to be decoded at a smaller scale
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 50, 3), np.uint8)).resize((2500, 3000)).save(photo)
    answerer = sample.Explainer(make_model(), "", sample.Wish(attention=True))
    for picture in (pictures[0], photo):
        [one] = answers_for(answerer, [picture])
        assert card(answerer, one) == request(address, "POST", f"/answer?name={picture.name}", picture.read_bytes())[1]


def test_what_is_no_picture_or_question(address, pictures):
    picture = pictures[0].read_bytes()
    for status, path, body in [(415, "/answer", b"no picture"), (415, "/answer", b""), (415, "/answer", picture[:200]),
                               (415, "/answer", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), (400, "/answer?emotion=joy", picture),
                               (400, "/answer?seed=-1", picture), (400, "/answer?seed=x", picture), (400, f"/answer?seed={'9' * 5000}", picture)]:
        assert request(address, "POST", path, body)[0] == status, (path, body[:20])


def test_twenty_uploads_at_once(address, pictures):
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda i: request(address, "POST", f"/answer?name={i}", pictures[i % 5].read_bytes()), range(20)))
    answered = [Reader(text).tags.count("article") for status, text in replies if status == 200]
    assert {status for status, _ in replies} <= {200, 503} and len(answered) >= 4 and set(answered) == {1}


def memory(process: int, name: str) -> float:
    """MB, from the system's books."""
    return int(re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) / 1000


@contextlib.contextmanager
def serving(folder: Path):
    def heed_ctrl_c():  # which a job in the background of a shell does not
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen([sys.executable, "sample.py", "--checkpoint", str(folder), "--serve", "0"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c)  # noqa: PLW1509
    try:
        line = running.stdout.readline()
        assert "Ctrl-C ends it" in line
        yield running, ("127.0.0.1", int(re.search(r":(\d+)/", line)[1]))
    finally:
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0 and "Traceback" not in running.stderr.read()


def test_ctrl_c_ends_the_server_cleanly(folder):
    with serving(folder):
        pass


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_bombs_do_not_fill_the_memory(folder):
    pictures = {}
    for status, side in ((415, 10_000), (200, 6_300)):  # 100 and 39.7 megapixels, in some hundred kB
        buffer = io.BytesIO()
        Image.new("RGB", (side, side)).save(buffer, "PNG", compress_level=1)
        pictures[status] = buffer.getvalue()
    with serving(folder) as (running, address):
        assert request(address, "POST", "/answer", pictures[415])[0] == 415
        idle = memory(running.pid, "VmRSS")
        for status, picture in pictures.items():
            with ThreadPoolExecutor(6) as pool:
                replies = list(pool.map(lambda _, picture=picture: request(address, "POST", "/answer", picture)[0], range(6)))
            assert replies == [status] * 6
            assert memory(running.pid, "VmHWM") - idle < 1000


def test_a_real_upload_in_a_browser(address, pictures):
    with browser() as tab:
        tab.show(390)
        tab.open(f"http://{address[0]}:{address[1]}/")
        tab.choose("input[type=file]", pictures[0])
        said = "document.querySelector('.sentence')?.textContent"
        for change in ("0", "document.querySelector('button').click()",
                       "const s = document.querySelector('select'); s.value = 'fear'; s.dispatchEvent(new Event('change', {bubbles: true}))"):
            before = "" if change == "0" else tab.run(said)
            tab.run(change)
            tab.until(f"({said} || '') !== {json.dumps(before)}")
        assert tab.run(said).startswith("fear because")
        tab.run("document.querySelector('.word').focus()")
        assert tab.run("document.querySelector('canvas').classList.contains('on')")
        assert tab.run("document.documentElement.scrollWidth <= 390"), "fits a phone"
        assert tab.complaints == []


# the bundled model

@pytest.mark.skipif(not BUNDLED.is_dir(), reason="the bundled model is not made yet")
def test_the_bundled_model_answers_sensibly_about_the_bundled_pictures():
    answerer = sample.Explainer(load_model(BUNDLED), "", sample.Wish(greedy=True))
    told = [one.record for one in answers_for(answerer, EXAMPLES)]
    assert len(told) >= 4
    valence = {True: [], False: []}
    for one in told:
        wanted = Path(one["image"]).name.split("-")[0]  # the examples are named after the mood they were painted in
        assert one["emotion"] == wanted, one
        assert len(one["words"]) > 5 and sum(word["vad"] is not None for word in one["words"]) >= 2
        valence[wanted in EMOTIONS[:4]].append(sample.mean_vad(one)["valence"])
    assert min(valence[True]) > np.mean(valence[False])
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) < 4_000_000
