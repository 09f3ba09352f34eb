"""sample.py: answers, the terminal, JSON, heatmaps, the page and the server, with a tiny random model."""
import contextlib
import html.parser
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from data import load_pixels
from sevlm import EMOTIONS, save
from vad import HERE, UserError

EXAMPLES = sorted((HERE / "examples").glob("*.png"))


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
        monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", str(folder), *map(str, flags)])
        code = sample.main()
        return code, capsys.readouterr().out
    return run


def records(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def test_json_has_all_fields_and_nothing_else_is_printed(ask, pictures):
    code, output = ask(*pictures, "--json", "--samples", 3)
    assert code == 0 and [one["image"] for one in records(output)] == list(map(str, pictures))
    for one in records(output):
        assert set(one) == {"image", "emotion", "probabilities", "explanation", "explanations", "words", "seconds"}
        assert len(one["probabilities"]) == 9 and sum(one["probabilities"]) == pytest.approx(1, abs=1e-12)
        assert one["emotion"] == EMOTIONS[int(np.argmax(one["probabilities"]))]
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
    assert said(*pictures, "--greedy") == said(*pictures, "--greedy", "--seed", 5)


def test_best_of_keeps_the_highest_match(ask, pictures):
    for one in records(ask(*pictures, "--best-of", 6, "--json")[1]):
        best = max(one["explanations"], key=lambda told: told["match"])
        assert len(one["explanations"]) == 6 and one["explanation"] == best["explanation"]


def test_emotions_can_be_forced(ask, pictures):
    [one] = records(ask(pictures[0], "--emotion", "something else", "--json")[1])
    assert one["emotion"] == one["explanations"][0]["emotion"] == "something else"
    for nine in records(ask(*pictures[:2], "--all-emotions", "--json")[1]):
        assert [told["emotion"] for told in nine["explanations"]] == list(EMOTIONS)
        assert nine["emotion"] == EMOTIONS[int(np.argmax(nine["probabilities"]))]
        assert nine["explanation"] == nine["explanations"][int(np.argmax(nine["probabilities"]))]["explanation"]


def test_beams_come_likeliest_first(ask, pictures):
    [one] = records(ask(pictures[0], "--beam", 3, "--json")[1])
    assert len({told["explanation"] for told in one["explanations"]}) == 3


def test_folders_patterns_and_duplicates(pictures, tmp_path):
    assert sample.find_pictures([str(tmp_path / "pictures"), str(pictures[0]), str(tmp_path / "pic*" / "p[01].png")]) == pictures


def test_a_broken_picture_becomes_an_entry_and_the_rest_go_on(ask, pictures, tmp_path):
    pictures[2].write_bytes(b"no picture")
    code, output = ask(tmp_path / "pictures", "--json")
    assert code == 1 and ["error" in one for one in records(output)] == [False, False, True, False, False]


def test_out_is_continued(ask, pictures, tmp_path):
    out = tmp_path / "out.jsonl"
    assert ask(*pictures[:3], "--out", out) == (0, "")
    first = out.read_text()
    out.write_text(first + '{"image": "cut o')  # as a kill in the middle of a line leaves it
    ask(*pictures, "--out", out)
    assert out.read_text().startswith(first)
    assert [one["image"] for one in records(out.read_text())] == list(map(str, pictures))


def test_the_terminal_shows_bars_sentence_and_gauges(ask, pictures):
    _, output = ask(pictures[0])
    [one] = records(ask(pictures[0], "--json")[1])
    assert f"{one['emotion']:15}" in output and "because" in output and "%" in output
    assert "\x1b" not in output and max(map(len, output.splitlines())) <= 100


def test_text_fits_narrow_terminals_and_plain_ones(monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")
    paper = sample.Paper(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    record = {"image": "x.png", "emotion": "awe", "probabilities": [0.02, 0.9] + [0.08 / 7] * 7, "explanation": "light " * 20,
              "explanations": [{"emotion": "awe", "explanation": "light " * 20}], "words": [{"word": "light", "vad": [0.5, -1.0, 1.0]}]}
    text = paper.card(record)
    assert text.isascii() and max(map(len, text.splitlines())) <= 44 and "valence   ------o-- +0.50" in text


def test_heatmaps_show_each_word(ask, pictures, tmp_path):
    ask(pictures[0], "--heatmap")
    [found] = (tmp_path / "heatmaps").iterdir()
    with Image.open(found) as image:
        assert image.format == "PNG" and image.width > 900 and np.ptp(np.asarray(image)) > 100


def test_attention_of_words_comes_from_their_tokens():
    looks = np.zeros((6, 4), np.float32)
    looks[3], looks[4], looks[5] = (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 3)
    words = sample.looked(looks, [("melancholy", [3, 4]), ("sea", [5])])
    assert words.tolist() == [[[1, 1], [0, 0]], [[0, 0], [pytest.approx(1 / 3), 1]]]


class Reader(html.parser.HTMLParser):
    """Checks that a page's tags are closed, and that it loads nothing from elsewhere."""
    EMPTY = ("meta", "img", "input", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        assert all(value.startswith("data:") for name, value in attributes if name in ("src", "href"))
        if tag not in (*self.EMPTY, "li"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "li":
            assert self.open.pop() == tag


def test_the_page_is_well_formed_and_escapes_hostile_names(ask, pictures, tmp_path):
    hostile = pictures[0].rename(tmp_path / "pictures" / '<img src=x onerror="alert(1)">&.png')
    page = tmp_path / "page.html"
    ask(hostile, *pictures[1:], "--html", page)
    text = page.read_text()
    assert Reader(text).seen.count("article") == 5 and "<img src=x" not in text and "&lt;img src=x onerror=" in text
    assert text.count("data-look=") > 5


def test_mistakes_are_named(ask, pictures, folder, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "nothing").mkdir()
    for flags, message in [
            ((tmp_path / "none.jpg",), "no such file"), ((tmp_path / "nothing",), "no pictures in"), ((), "name a picture"),
            ((pictures[0], "--checkpoint", tmp_path / "nothing"), "is no SEVLM checkpoint"),
            ((pictures[0], "--checkpoint", tmp_path / "foreign"), "was not written by SEVLM"),
            ((pictures[0], "--device", "tpu"), "this machine has"), ((pictures[0], "--samples", 0), "too small"),
            ((pictures[0], "--greedy", "--best-of", 3), "contradict"), ((pictures[0], "--top-p", 2), "--top-p"),
            ((pictures[0], "--emotion", "awe", "--all-emotions"), "contradict")]:
        with pytest.raises(UserError, match=message):
            ask(*flags)


def test_best_of_needs_the_head(make_model, ask, pictures, tmp_path):
    save(make_model(contrastive_head=False), tmp_path / "headless")
    with pytest.raises(UserError, match="has none"):
        ask(pictures[0], "--checkpoint", tmp_path / "headless", "--best-of", 2)
    [one] = records(ask(pictures[0], "--checkpoint", tmp_path / "headless", "--json")[1])
    assert one["explanations"][0]["match"] is None


def test_the_newest_run_speaks_by_default(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in ((100, "old"), (10, "new")):
        save(make_model(), tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "model.safetensors", times=(time.time() - age,) * 2)
    assert sample.find_checkpoint() == Path("runs/new")


@pytest.fixture
def address(make_model, monkeypatch):
    """A running server, which waits one second for slow clients."""
    monkeypatch.setattr(sample, "PATIENCE", 1.0)
    with sample.server(make_model(), sample.Wish(), "a test model", 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield "127.0.0.1", running.server_port
        running.shutdown()


def request(address, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*address, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def test_the_server_answers_a_picture(address, pictures):
    status, page = request(address, "GET", "/")
    assert status == 200 and {"form", "select", "button", "section"} <= set(Reader(page).seen) and "aria-live" in page
    picture = pictures[0].read_bytes()
    status, card = request(address, "POST", "/answer?seed=1&name=%3Cb%3E.png", picture)
    assert status == 200 and Reader(card).seen.count("article") == 1 and "&lt;b&gt;.png" in card
    assert request(address, "POST", "/answer?seed=1&name=%3Cb%3E.png", picture) == (200, card)
    assert request(address, "POST", "/answer?seed=2&name=%3Cb%3E.png", picture)[1] != card
    assert '">fear</b> because' in request(address, "POST", "/answer?emotion=fear", picture)[1]


def test_hostile_requests_get_proper_answers(address, pictures, monkeypatch):
    picture = pictures[0].read_bytes()
    for wanted, arguments in [
            (404, ("GET", "/../../etc/passwd")), (404, ("GET", "/sample.py")), (404, ("POST", "/elsewhere", picture)),
            (405, ("PUT", "/answer", picture)), (405, ("DELETE", "/")), (405, ("OPTIONS", "/answer")),
            (415, ("POST", "/answer", b"no picture")), (415, ("POST", "/answer", b"")), (415, ("POST", "/answer", picture[:200])),
            (400, ("POST", "/answer?emotion=joy", picture)), (400, ("POST", "/answer?seed=-1", picture)), (400, ("POST", "/answer?seed=x", picture))]:
        assert request(address, *arguments)[0] == wanted, arguments
    assert request(address, "GET", "/", Host="evil.example")[0] == 403
    assert request(address, "POST", "/answer", picture, Origin="http://evil.example")[0] == 403
    assert request(address, "POST", "/answer", b"", Content_Length="99999999999")[0] == 413
    with socket.create_connection(address, timeout=20) as chunked:
        chunked.sendall(b"POST /answer HTTP/1.1\r\nHost: localhost:1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b" 411 " in chunked.recv(1000)
    monkeypatch.setattr("data.LARGEST", 100)
    assert request(address, "POST", "/answer", picture)[0] == 415


def test_a_slow_client_is_told_so_and_delays_nobody(address, pictures):
    with socket.create_connection(address, timeout=20) as slow:
        slow.sendall(b"POST /answer HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 1000\r\n\r\nabc" % address[1])
        assert request(address, "POST", "/answer", pictures[0].read_bytes())[0] == 200
        assert b" 408 " in slow.recv(1000)


def test_a_taken_port_is_named(address, make_model):
    with pytest.raises(UserError, match=f"port {address[1]} cannot be used"):
        sample.server(make_model(), sample.Wish(), "", address[1])


@contextlib.contextmanager
def browser():
    """Headless Chromium through chromedriver's plain HTTP protocol: yields a function that sends commands."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not chromium:
        pytest.skip("needs chromium and chromedriver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def send(path: str, content: dict | None = None):
        data = json.dumps(content).encode() if content is not None else None
        for _ in range(100):
            try:
                with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data), timeout=60) as reply:
                    return json.load(reply)["value"]
            except urllib.error.HTTPError:
                raise
            except OSError:  # not up yet
                time.sleep(0.1)
        raise TimeoutError("chromedriver does not answer")

    try:
        flags = ["--headless=new", "--no-sandbox", "--window-size=390,900"]
        wanted = {"alwaysMatch": {"goog:chromeOptions": {"binary": chromium, "args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}}
        session = f"/session/{send('/session', {'capabilities': wanted})['sessionId']}"
        yield lambda path, content=None: send(session + path, content)
    finally:
        running.terminate()
        running.wait()


def script(send, code: str):
    return send("/execute/sync", {"script": code, "args": []})


def test_a_real_upload_in_a_browser(address, pictures):
    with browser() as send:
        send("/url", {"url": f"http://{address[0]}:{address[1]}/"})
        [field] = send("/element", {"using": "css selector", "value": "input[type=file]"}).values()
        send(f"/element/{field}/value", {"text": str(pictures[0])})
        for step, change in (("upload", "return 0"), ("another sentence", "document.querySelector('button').click()"),
                             ("another emotion", "const s = document.querySelector('select'); s.value = 'fear'; s.dispatchEvent(new Event('change'))")):
            before = script(send, "return (document.querySelector('.said') || {}).textContent")
            script(send, change)
            deadline = time.monotonic() + 30
            while (said := script(send, "return (document.querySelector('.said') || {}).textContent")) == before:
                assert time.monotonic() < deadline, (step, script(send, "return document.querySelector('[role=status]').textContent"))
                time.sleep(0.1)
        assert said.startswith("fear because")
        script(send, "document.querySelector('.word').focus()")
        assert script(send, "return document.querySelector('canvas').classList.contains('on')")
        assert script(send, "return document.documentElement.scrollWidth <= innerWidth"), "fits a phone"
        assert [entry for entry in send("/se/log", {"type": "browser"}) if "favicon" not in entry["message"]] == []


def test_the_gallery_shows_in_a_browser(ask, pictures, tmp_path):
    page = tmp_path / "page.html"
    ask(*pictures, "--html", page)
    with browser() as send:
        send("/url", {"url": page.as_uri()})
        assert script(send, "return [...document.images].every(image => image.naturalWidth > 0) && document.images.length") == 5
        script(send, "document.querySelector('.word').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))")
        assert script(send, "return document.querySelector('canvas.on').width") == 2
        assert send("/se/log", {"type": "browser"}) == []


def test_ctrl_c_ends_the_server_cleanly(folder):
    def heed_ctrl_c():  # which a job in the background of a shell does not
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen([sys.executable, "sample.py", "--checkpoint", str(folder), "--serve", "0"], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c)  # noqa: PLW1509
    assert "Ctrl-C ends it" in running.stdout.readline()
    running.send_signal(signal.SIGINT)
    assert running.wait(20) == 0 and "Traceback" not in running.stderr.read()


@pytest.mark.skipif(not sample.BUNDLED.is_dir(), reason="the bundled model is not made yet")
def test_the_bundled_model_answers_sensibly_about_the_bundled_pictures():
    model = sample.load_model(sample.BUNDLED).eval()
    pixels = [load_pixels(file, model.config) for file in EXAMPLES]
    wish = sample.Wish(top_p=0.0)
    answers = [sample.answer(model, picture[None], [file.name], wish)[0].record for picture, file in zip(pixels, EXAMPLES, strict=True)]
    assert len(answers) >= 4
    valence = {True: [], False: []}
    for one in answers:
        wanted = one["image"].split("-")[0]  # the examples are named after the mood they were painted in
        assert one["emotion"] == wanted, one
        assert len(one["words"]) > 5 and sum(word["vad"] is not None for word in one["words"]) >= 2
        valence[wanted in EMOTIONS[:4]].append(sample.mean_vad(one)[0])
    assert min(valence[True]) > np.mean(valence[False])
    sizes = sum(file.stat().st_size for file in sample.BUNDLED.iterdir())
    assert sizes < 4_000_000
