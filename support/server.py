"""A page on this machine that answers uploads: one at a time, for few connections, each with little time.

    serve(page, answer, port)
        page(nonce)              the page; its style and scripts carry the nonce
        answer(upload, fields)   HTML for the bytes of an upload and the fields of its query; may raise Refused

Only a browser of this machine is answered, and only this page in it: another site's page may not send pictures here,
nor a name that somebody has pointed at this machine.
"""
import contextlib
import io
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

from support.pages import policy
from support.program import UserError

LARGEST = 20_000_000  # bytes of an upload
CONNECTIONS = 16  # served at once
PATIENCE = 20.0  # seconds for a request to arrive
LINGER = 2.0  # seconds in which a client may go on sending what nobody reads


class Refused(Exception):
    """An upload without an answer: the HTTP status, and why."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status, self.why = status, why


class TimedReader(io.RawIOBase):
    """What a connection sends, within so many seconds in all: a byte now and then does not hold it open."""

    def __init__(self, connection, seconds: float):
        self.connection, self.end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, page: Callable[[str], str], answer: Callable[[bytes, dict[str, str]], str], port: int):
        self.page, self.answer = page, answer
        self.worker = ThreadPoolExecutor(1)  # each thread would keep some of what its answer took of memory
        self.places = threading.Semaphore(CONNECTIONS)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error.strerror}); name another with --serve PORT") from None

    def process_request(self, request, client_address) -> None:
        if threading.active_count() > 8 * CONNECTIONS:  # a flood: not even a refusal
            self.close_request(request)
        else:
            super().process_request(request, client_address)

    def server_close(self) -> None:
        super().server_close()
        self.worker.shutdown(cancel_futures=True)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # which says that the client has gone
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "local", ""
    error_message_format, error_content_type = "%(message)s", "text/plain; charset=utf-8"
    command, request_version = "", "HTTP/1.0"  # until a request is read

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(TimedReader(self.connection, PATIENCE))

    def handle(self) -> None:
        if not self.server.places.acquire(blocking=False):
            return self.reply(503, "too many at once; try again in a moment")
        try:
            super().handle()
        finally:
            self.server.places.release()

    def finish(self) -> None:
        """End the connection so that the reply arrives: a browser that is still sending would miss it."""
        super().finish()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            rest, buffer = TimedReader(self.connection, LINGER), bytearray(1 << 16)
            while rest.readinto(buffer):
                pass

    def do_GET(self) -> None:
        if not self.is_local():
            self.reply(403, "ask for this page as localhost")
        elif self.path.partition("?")[0] != "/":
            self.reply(404, "there is only /")
        else:
            nonce = secrets.token_urlsafe(16)
            self.reply(200, self.server.page(nonce), "text/html", policy(nonce, connect="'self'"))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        try:
            text = self.answer()
        except Refused as refusal:
            self.reply(refusal.status, refusal.why)
        except Exception:  # a bug: its traceback goes to the terminal
            self.reply(500, "the program failed; its terminal says why")
            raise
        else:
            self.reply(200, text, "text/html")

    def answer(self) -> str:
        path, _, query = self.path.partition("?")
        if not self.is_local():
            raise Refused(403, "only this page may send an upload")
        if path != "/answer":
            raise Refused(404, "uploads go to /answer")
        upload, fields = self.upload(), dict(parse_qsl(query))
        try:
            return self.server.worker.submit(self.server.answer, upload, fields).result()
        except CancelledError:
            raise Refused(503, "the program is ending") from None

    def not_allowed(self) -> None:
        self.reply(405, "GET / or POST /answer")

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = not_allowed

    def is_local(self) -> bool:
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        return bool(re.fullmatch(r"(127\.0\.0\.1|localhost)(:[0-9]+)?", host)) and origin in (None, f"http://{host}")

    def upload(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]+", length):
            raise Refused(411, "Content-Length is missing")
        if len(length) > len(str(LARGEST)) or int(length) > LARGEST:
            raise Refused(413, f"an upload may have {LARGEST // 10**6} MB")
        try:
            upload = self.rfile.read(int(length))
        except TimeoutError:
            raise Refused(408, "the upload took too long to arrive") from None
        if len(upload) < int(length):
            raise Refused(400, "the upload ended early")
        return upload

    def reply(self, status: int, text: str, kind: str = "text/plain", rules: str = "default-src 'none'") -> None:
        body = text.encode()
        self.connection.settimeout(PATIENCE)
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(body),
                            "Content-Security-Policy": f"{rules}; frame-ancestors 'none'",
                            "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
                            "Connection": "close"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_request(self, *_) -> None:
        pass

    log_error = log_request


def serve(page: Callable[[str], str], answer: Callable[[bytes, dict[str, str]], str], port: int) -> None:
    """Until Ctrl-C."""
    with Server(page, answer, port) as server:
        try:
            print(f"http://127.0.0.1:{server.server_port}/ answers; Ctrl-C ends it", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print()
