"""The studio's server: this machine alone, one page, a few questions; whoever asks must know the token.

The token is a part of every address. Host and Origin are checked beside it, so that no other site's page and
no name that somebody points at this machine gets an answer.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore, Lock
from typing import Any, cast

from bitmill.core.errors import BitmillError, Refused
from bitmill.studio.asked import MOST_BYTES

LOOPBACK = "127.0.0.1"

_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::[1-9]\d{0,4})?")
_AT_ONCE = 4
_DEFECTS = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_SECONDS = 20
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_NOTHING = "default-src 'none'; frame-ancestors 'none'"
_FRAMES = "frame-ancestors 'none'"


@dataclass(frozen=True)
class Answers:
    """What a studio has to say.

    Attributes:
        page: its page, with a policy of its own inside.
        asks: by name, what turns a request's body into plain values.
    """

    page: str
    asks: Mapping[str, Callable[[bytes], Mapping[str, Any]]]


class Server(ThreadingHTTPServer):
    """A studio that listens on this machine, from the moment it is made.

    Attributes:
        token: what an address must begin with.
        answers: what it says.

    Raises:
        Refused: the port is taken.
    """

    daemon_threads = True

    def __init__(self, answers: Answers, port: int = 0) -> None:
        self.answers = answers
        self.token = secrets.token_urlsafe(24)
        self.room = BoundedSemaphore(_AT_ONCE)
        self._once: str | None = secrets.token_urlsafe(24)
        self._lock = Lock()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise Refused(
                f"port {port} cannot be had: {error.strerror}",
                fix="another --port, or none for any that is free",
            ) from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.token}/"

    @property
    def door(self) -> str:
        """An address that leads there once: command lines of programs are seen by everybody here."""
        return f"http://{LOOPBACK}:{self.server_port}/{self._once}"

    def opens(self, word: str) -> bool:
        """Whether this is the word of the door, which then opens no more."""
        with self._lock:
            good = self._once is not None and hmac.compare_digest(word.encode(), self._once.encode())
            self._once = None if good else self._once
            return good


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    timeout = _SECONDS
    server_version, sys_version = "bitmill", ""

    def do_GET(self) -> None:
        if not self._trusted():
            return
        studio = cast(Server, self.server)
        if self._rest() == "":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", studio.answers.page.encode(), _FRAMES)
        elif studio.opens(self.path.removeprefix("/")):
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header("Location", f"/{studio.token}/")
            self.send_header("Content-Length", "0")
            self._common(_NOTHING)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing at this address")

    def do_POST(self) -> None:
        if not self._trusted():
            return
        answers = cast(Server, self.server).answers
        rest = self._rest()
        ask = None if rest is None else answers.asks.get(rest.removeprefix("ask/")) if "/" in rest else None
        if ask is None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing at this address")
            return
        body = self._body()
        if body is not None:
            self._answer(ask, body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are nobody's news."""

    def _answer(self, ask: Callable[[bytes], Mapping[str, Any]], body: bytes) -> None:
        room = cast(Server, self.server).room
        if not room.acquire(blocking=False):
            self._refuse(HTTPStatus.TOO_MANY_REQUESTS, "too many questions at a time")
            return
        try:
            found = ask(body)
        except BitmillError as error:
            said = {"what": error.what, "where": error.where, "fix": error.fix}
            self._json(HTTPStatus.BAD_REQUEST, {"error": said})
            return
        except _DEFECTS as error:
            what = f"{type(error).__name__}: this is a defect of bitmill; the terminal says more"
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, what)
            raise
        finally:
            room.release()
        self._json(HTTPStatus.OK, found)

    def _trusted(self) -> bool:
        """Whether the request comes from the page itself, or from whoever typed its address."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            self._refuse(HTTPStatus.FORBIDDEN, "this name is not one of the studio's")
            return False
        if origins not in ([], [f"http://{hosts[0]}"]):
            self._refuse(HTTPStatus.FORBIDDEN, "pages of others are not answered")
            return False
        return True

    def _rest(self) -> str | None:
        """The address behind the token; None where the token is not there."""
        head, slash, rest = self.path.removeprefix("/").partition("/")
        token = cast(Server, self.server).token
        good = hmac.compare_digest(head.encode("utf-8", "replace"), token.encode())
        return rest if good and slash else None

    def _body(self) -> bytes | None:
        """The body, once it is known to be small; None where the request has been refused."""
        kind = self.headers.get_content_type()
        length = self.headers.get("Content-Length", "")
        if kind != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a question is application/json")
        elif "Transfer-Encoding" in self.headers or not re.fullmatch(r"[0-9]{1,9}", length):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "a question says how long it is")
        elif int(length) > MOST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a question has at most {MOST_BYTES:,} bytes")
        else:
            return self.rfile.read(int(length))
        return None

    def _refuse(self, status: HTTPStatus, what: str) -> None:
        self._json(status, {"error": {"what": what, "where": None, "fix": None}})

    def _json(self, status: HTTPStatus, found: Mapping[str, Any]) -> None:
        body = json.dumps(found, allow_nan=False).encode()
        self._send(status, "application/json", body, _NOTHING)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, policy: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self._common(policy)
        try:
            self.wfile.write(body)
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # whoever asked has gone

    def _common(self, policy: str) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
