"""support/server.py and support/pages.py: an upload's way, hostile and slow clients, pages in a real browser."""
import html.parser
import http.client
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from browser import browser
from PIL import Image

from support import server
from support.pages import bar_chart, bars, chart, colours, data_uri, dot, escape, fill, gauges, matrix, page, table
from support.program import UserError
from support.server import Refused, Server

ROOT = Path(__file__).parents[1]
EMPTY = ("meta", "link", "img", "input", "br")


class Reader(html.parser.HTMLParser):
    """Checks that a page closes its tags, loads nothing from elsewhere, and has neither style attributes nor handlers."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert name not in ("src", "href") or value.startswith("data:"), value
            assert name != "style" and not name.startswith("on"), name
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def echo(upload: bytes, fields: dict[str, str]) -> str:
    """What the tests' server answers."""
    if upload.startswith(b"bad"):
        raise Refused(415, "not what was asked for")
    if upload.startswith(b"bug"):
        raise ZeroDivisionError
    return f'<article class="card"><div><p class="sentence">{escape(fields.get("name"))}: {len(upload)} bytes, seed {escape(fields.get("seed"))}</p></div></article>'


def upload_page(nonce: str) -> str:
    controls = '<label>Kind <select name="kind"><option>a</option><option>b</option></select></label><button type="button" name="seed">Again</button>'
    return page("Upload", fill("upload.html", title="Upload", about="A test", controls=controls), ["upload.js"], nonce)


@pytest.fixture
def address(monkeypatch):
    """A running server, which has one second for slow clients."""
    monkeypatch.setattr(server, "PATIENCE", 1.0)
    with Server(upload_page, echo, 0) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield "127.0.0.1", running.server_port
        running.shutdown()


def request(address, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*address, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def raw(address, *pieces: bytes, pause: float = 0.0) -> bytes:
    """The reply to bytes that no HTTP library would send."""
    with socket.create_connection(address, timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        reply = b""
        while part := connection.recv(1 << 16):
            reply += part
        return reply


def test_an_upload_is_answered(address):
    status, text = request(address, "GET", "/")
    assert status == 200 and {"form", "select", "button", "section"} <= set(Reader(text).tags)
    status, text = request(address, "POST", "/answer?name=%3Cb%3E%1B%5B31m.png&seed=3", b"12345")
    assert (status, Reader(text).tags) == (200, ["article", "div", "p"]) and "&lt;b&gt;\\x1b[31m.png: 5 bytes, seed 3" in text
    assert request(address, "POST", "/answer", b"bad") == (415, "not what was asked for")


def test_the_policy_names_this_pages_scripts_and_nothing_else(address):
    nonces = set()
    for _ in range(2):
        connection = http.client.HTTPConnection(*address)
        connection.request("GET", "/")
        reply = connection.getresponse()
        policy, text = reply.headers["Content-Security-Policy"], reply.read().decode()
        [nonce] = set(re.findall(r"'nonce-([\w-]+)'", policy))
        nonces.add(nonce)
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy and "default-src 'none'" in policy
        assert re.findall(r"<(?:script|style)[^>]*>", text) == [f'<style nonce="{nonce}">', f'<script nonce="{nonce}">']
    assert len(nonces) == 2


@pytest.mark.parametrize("status, arguments", [
    (404, ("GET", "/../../etc/passwd")), (404, ("GET", "/server.py")), (404, ("POST", "/elsewhere", b"1")),
    (405, ("PUT", "/answer", b"1")), (405, ("DELETE", "/")), (405, ("OPTIONS", "/answer")), (501, ("BREW", "/"))])
def test_what_is_not_there_is_not_answered(address, status, arguments):
    assert request(address, *arguments)[0] == status


def test_only_this_machines_browser_may_ask(address):
    for host in ("evil.example", f"evil.example:{address[1]}", "localhost.evil.example", ""):
        assert request(address, "GET", "/", Host=host)[0] == 403
    assert request(address, "POST", "/answer", b"1", Origin="http://evil.example")[0] == 403
    assert request(address, "POST", "/answer", b"1", Origin="null")[0] == 403
    for host in ("localhost", "127.0.0.1", f"localhost:{address[1]}"):  # a browser names no port when it is 80
        assert request(address, "GET", "/", Host=host)[0] == 200
        assert request(address, "POST", "/answer", b"1", Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize("status, lines", [
    (b" 411 ", b"POST /answer HTTP/1.1\r\nHost: localhost\r\n"), (b" 411 ", b"POST /answer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"),
    (b" 411 ", b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n"),
    (b" 413 ", b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n"),
    (b" 404 ", b"GET //[ HTTP/1.1\r\nHost: localhost\r\n"), (b" 404 ", b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n"),
    (b" 200 ", b"GET /?%ff%00&&&=== HTTP/1.1\r\nHost: localhost\r\n"), (b" 403 ", b"GET / HTTP/1.0\r\n"),
    (b" 414 ", b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n"), (b" 431 ", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200),
    (b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), (b"", b"GET /\r\n"), (b"", b"\0" * 1000)])
def test_broken_requests_get_an_answer_or_a_closed_connection(address, capfd, status, lines):
    reply = raw(address, lines + b"\r\n")
    assert status in reply.partition(b"\r\n")[0] and capfd.readouterr().err == ""


def test_a_body_that_is_too_large_is_refused_readably(address, monkeypatch):
    monkeypatch.setattr(server, "LARGEST", 1_000_000)
    assert request(address, "POST", "/answer", bytes(60_000_000)) == (413, "an upload may have 1 MB")
    assert request(address, "POST", "/answer", bytes(1_000_000))[0] == 200


def test_the_time_limit_is_for_the_whole_request(address):
    start = time.monotonic()
    with socket.create_connection(address, timeout=20) as slow:
        slow.sendall(b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        assert request(address, "POST", "/answer", b"1")[0] == 200, "a slow client delays nobody"
        assert b" 408 " in slow.recv(1000)
    with socket.create_connection(address, timeout=20) as slow, pytest.raises(OSError):
        for _ in range(100):  # a header's letter now and then
            slow.sendall(b"a")
            time.sleep(0.1)
    assert time.monotonic() - start < 2 * (server.PATIENCE + server.LINGER) + 1


def test_sixteen_connections_at_once_and_503_for_the_others(address, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 5.0)
    idle = [socket.create_connection(address) for _ in range(server.CONNECTIONS)]
    time.sleep(0.3)
    assert request(address, "GET", "/")[0] == 503 and request(address, "POST", "/answer", bytes(5_000_000))[0] == 503
    for connection in idle:
        connection.close()
    time.sleep(0.3)
    assert request(address, "GET", "/")[0] == 200


def test_clients_that_leave_and_bugs(address, capfd):
    for lines in (b"", b"GET / HT", b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with socket.create_connection(address) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset instead of a goodbye
            gone.sendall(lines)
    time.sleep(0.3)
    assert request(address, "GET", "/")[0] == 200 and capfd.readouterr().err == ""
    assert request(address, "POST", "/answer", b"bug")[0] == 500
    time.sleep(0.3)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_two_hundred_hostile_requests_and_twenty_uploads_at_once(address, capfd):
    hostile = [b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
               b"GET //[ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\0\xff" * 500 + b"\r\n\r\n", b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"]
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda i: raw(address, hostile[i % len(hostile)]), range(200)))
        uploads = list(pool.map(lambda i: request(address, "POST", f"/answer?name={i}", bytes(2_000_000))[0], range(20)))
    assert all(replies) and set(uploads) <= {200, 503} and uploads.count(200) >= 1 and capfd.readouterr().err == ""
    assert request(address, "POST", "/answer", b"1")[0] == 200


def test_a_taken_port_is_named(address):
    with pytest.raises(UserError, match=f"port {address[1]} cannot be used"):
        Server(upload_page, echo, address[1])


# pages

def everything() -> str:
    """A page with all that pages.py draws, and hostile names."""
    curve = [(step, 1 / (1 + step)) for step in range(10)]
    bad = '<img src=x onerror="alert(1)">&\x1b[31m\udcff'
    card = (f'<article class="card"><div class="picture"><img alt="" src="{data_uri(Image.new("RGB", (900, 600)), 480)}"><canvas></canvas></div>'
            '<div><p class="sentence"><span class="word" tabindex="0" data-grid="AAAA/w==" data-level="1">one</span> '
            '<span class="word" tabindex="-1" data-grid="/wAAAA==">two</span></p></div></article>')
    return page(bad, "".join([
        f"<h1>{escape(bad)}</h1>", dot("#4f7fd0"), bars([(bad, 0.7, "#4f7fd0"), ("b", 0.0, "#222222")]), gauges({"up": 0.5, bad: -1.0}),
        table([[bad, "x"], ["a", bad], ["  detail", "3"]]), matrix(["a", bad], ["a", bad], [[3, 0], [0, 0]], bad),
        '<div class="charts">', chart(bad, {"one": curve, bad: [(0, float("nan"))]}), chart("empty", {}),
        bar_chart(bad, {"a": (50, 40, 60), bad: (0, 0, 0)}), bar_chart("nothing", {"a": (0, 0, 0)}), "</div>", card]), ["overlay.js"])


def test_pages_are_well_formed_and_escape_everything():
    text = everything()
    assert Reader(text).tags.count("table") == 2 and "<img src=x" not in text and "\x1b" not in text and "\udcff" not in text
    assert text.count("&lt;img src=x onerror=") > 10 and "unsafe" not in text


def test_charts_put_points_where_they_belong():
    [points] = re.findall(r'points="([^"]+)"', chart("t", {"a": [(0, 0), (5, 50), (10, 100)]}))
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, point.split(","))) for point in points.split()]
    assert x1 - x0 == x2 - x1 > 0 and y0 - y1 == pytest.approx(y1 - y2) and y1 < y0
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', bar_chart("t", {"a": (40, 0, 40), "b": (20, 0, 20)}))]
    assert widths[0] == 2 * widths[1]
    assert re.findall(r'data-shade="(\d)"', matrix("ab", "ab", [[9, 0], [1, 8]])) == ["9", "0", "1", "8"]


def test_every_name_has_a_colour_of_its_own():
    names = [f"emotion {number}" for number in range(40)]
    found = colours(names)
    assert len(set(found.values())) == 40 and found == colours(names)
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in found.values())


def test_pages_are_found_from_anywhere(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from support.pages import page; print(len(page('t', '')))"
    assert int(subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True).stdout) > 1000


def test_a_page_in_a_browser(tmp_path):
    (tmp_path / "page.html").write_text(everything(), encoding="utf-8")
    with browser() as tab:
        tab.show(390)
        tab.open((tmp_path / "page.html").as_uri())
        assert tab.run("[...document.images].every(image => image.naturalWidth > 0) && document.images.length") == 1
        assert tab.run("document.documentElement.scrollWidth <= 390"), "fits a phone"
        assert tab.run("getComputedStyle(document.querySelector('.card')).borderRadius") == "12px", "the style is allowed"
        tab.run("document.querySelector('.word').focus()")
        alpha = "[...document.querySelector('canvas.on').getContext('2d').getImageData(0, 0, 2, 2).data].filter((_, i) => i % 4 === 3)"
        assert tab.run(alpha) == [190, 190, 190, 1]
        for kind in ("keyDown", "keyUp"):
            tab.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight")
        assert tab.run("document.activeElement.textContent") == "two" and tab.run(alpha) == [1, 190, 190, 190]
        tab.run("document.activeElement.blur()")
        assert tab.run("document.querySelector('canvas.on')") is None
        assert tab.complaints == []


def test_an_upload_in_a_browser(address, tmp_path, monkeypatch):
    picture, large = tmp_path / "a b.png", tmp_path / "large.png"
    Image.new("RGB", (30, 40)).save(picture)
    large.write_bytes(bytes(60_000_000))
    monkeypatch.setattr(server, "LARGEST", 1_000_000)
    with browser() as tab:
        tab.show(390)
        tab.open(f"http://{address[0]}:{address[1]}/")
        tab.choose("input[type=file]", picture)
        size, said = picture.stat().st_size, "document.querySelector('.sentence')?.textContent"
        tab.until(f"{said} === 'a b.png: {size} bytes, seed 0'")
        tab.run("document.querySelector('button').click()")
        tab.until(f"{said} === 'a b.png: {size} bytes, seed 1'")
        tab.choose("input[type=file]", large)
        tab.until("document.querySelector('[role=status]').textContent === 'an upload may have 1 MB'")
        assert tab.run("document.documentElement.scrollWidth <= 390"), "fits a phone"
        assert [one for one in tab.complaints if "413" not in one] == []
