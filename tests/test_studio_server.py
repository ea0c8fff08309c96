"""The studio's server answers its own page and nobody else, and survives what is thrown at it."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bitmill
from bitmill.core.errors import Refused
from bitmill.source import open_source
from bitmill.studio.asked import MOST_BYTES
from bitmill.studio.opened import opened
from bitmill.studio.server import Answers, Server
from tests.browser import CHROMIUM, Browser

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[Server]:
    yield from serving(opened(open_source(str(tiny_llama))))


def serving(answers: Answers) -> Iterator[Server]:
    with Server(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: Server, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one request."""
    line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    line.request("GET" if body is None else "POST", path, body, headers or ({} if body is None else JSON))
    found = line.getresponse()
    said = found.read()
    line.close()
    return found.status, {k.lower(): v for k, v in found.getheaders()}, said


def raw(server: Server, text: bytes) -> bytes:
    """All that comes back for these bytes."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as line:
        line.sendall(text)
        line.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: line.recv(1 << 16), b""))


def test_the_page_and_its_questions_are_answered(server: Server) -> None:
    status, headers, body = ask(server, f"/{server.token}/")
    assert status == 200 and b'id="explore"' in body and headers["cache-control"] == "no-store"
    assert headers["content-security-policy"] == "frame-ancestors 'none'"
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert "access-control-allow-origin" not in headers and "python" not in headers["server"].lower()
    origin = {**JSON, "Origin": f"http://127.0.0.1:{server.server_port}"}
    status, headers, body = ask(server, f"/{server.token}/ask/number", b'{"text": "0.5"}', origin)
    assert status == 200 and json.loads(body)["x"] == 0.5
    assert (
        headers["content-type"] == "application/json"
        and "default-src 'none'" in headers["content-security-policy"]
    )


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1" and len(server.token) >= 32
    assert server.url == f"http://127.0.0.1:{server.server_port}/{server.token}/"


@pytest.mark.parametrize("wrong", ["", "x", "{token}x", "{start}", "%2e%2e", "é", "{token}%00", "{upper}"])
def test_without_the_token_there_is_nothing(server: Server, wrong: str) -> None:
    token = server.token
    said = wrong.format(token=token, start=token[:-1], upper=token.swapcase())
    for rest in ("/", "/ask/number", "", "/../"):
        path = f"/{said}{rest}".encode().decode("latin-1").replace("Ã", "%C3").replace("©", "%A9")
        assert ask(server, path)[0] == 404
        status, _, body = ask(server, path, b'{"text": "1"}')
        assert status == 404 and token.encode() not in body


@pytest.mark.parametrize(
    "path",
    [
        "/{t}/../../../etc/passwd", "/{t}//etc/passwd", "/{t}/ask/../number", "/{t}/page.css",
        "/{t}/%2e%2e/x", "/{t}/ask/", "/{t}/ask/nothing", "/{t}/ask/number/", "/{t}/ask/__class__",
        "/{t}", "/favicon.ico",
    ],
)  # fmt: skip
def test_addresses_that_are_none(server: Server, path: str) -> None:
    path = path.format(t=server.token)
    assert ask(server, path)[0] == 404 and ask(server, path, b"{}")[0] == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "example.org"}, {"Host": "127.0.0.1.example.org"}, {"Host": "localhost.example.org:80"},
        {"Host": "127.0.0.1:80@example.org"}, {"Host": "[::1]"}, {"Host": ""}, {"Host": "0.0.0.0"},
        {"Origin": "http://example.org"}, {"Origin": "null"}, {"Origin": "http://localhost:1"},
        {"Origin": "https://127.0.0.1"},
    ],
    ids=str,
)  # fmt: skip
def test_other_names_and_other_pages_are_not_answered(server: Server, headers: dict[str, str]) -> None:
    for path, body in ((f"/{server.token}/", None), (f"/{server.token}/ask/number", b'{"text": "1"}')):
        status, back, _ = ask(server, path, body, {**JSON, **headers})
        assert status == 403 and "access-control-allow-origin" not in back


def test_two_hosts_or_none_are_not_answered(server: Server) -> None:
    good = f"Host: 127.0.0.1:{server.server_port}\r\n".encode()
    for hosts in (b"", good + b"Host: example.org\r\n"):
        found = raw(server, f"GET /{server.token}/ HTTP/1.1\r\n".encode() + hosts + b"\r\n")
        assert b" 403 " in found.partition(b"\r\n")[0]
    assert b" 200 " in raw(server, f"GET /{server.token}/ HTTP/1.1\r\n".encode() + good + b"\r\n")


def test_a_name_that_leads_here_through_a_tunnel_is_answered(server: Server) -> None:
    headers = {**JSON, "Host": "localhost:9999", "Origin": "http://localhost:9999"}
    assert ask(server, f"/{server.token}/ask/number", b'{"text": "1"}', headers)[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({**JSON, "Content-Length": "-1"}, 411),
        ({**JSON, "Content-Length": "1e3"}, 411),
        ({**JSON, "Content-Length": "9" * 40}, 411),
        ({**JSON, "Content-Length": str(MOST_BYTES + 1)}, 413),
        ({**JSON, "Content-Length": "999999999"}, 413),
        ({**JSON, "Transfer-Encoding": "chunked", "Content-Length": "2"}, 411),
    ],
    ids=str,
)
def test_bodies_are_judged_before_they_are_read(server: Server, headers: dict[str, str], status: int) -> None:
    host = f"Host: 127.0.0.1:{server.server_port}\r\n"
    lines = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
    found = raw(server, f"POST /{server.token}/ask/number HTTP/1.1\r\n{host}{lines}\r\n".encode())
    assert f" {status} ".encode() in found.partition(b"\r\n")[0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "JSON"), (b"[1]", "object"), (b'{"text": Infinity}', "JSON"),
        (b'{"path": "/etc/passwd"}', "no field"),
        (b'{"text": 1e99}', "text"), (b'{"text": "1", "largest": -1}', "largest"), (b"[" * 9000, "JSON"),
        (b'{"text": "1", "largest": 1e999}', "largest"), (b'{"text": "\xed\xa0\x80"}', "JSON"),
        (b'{"text": "\\ud800"}', "number"),
    ],
)  # fmt: skip
def test_questions_that_make_no_sense_get_a_sentence(server: Server, body: bytes, said: str) -> None:
    status, _, found = ask(server, f"/{server.token}/ask/number", body)
    assert status == 400 and said in json.loads(found)["error"]["what"] and b"Traceback" not in found


def test_sizes_are_refused_before_anything_is_read(server: Server) -> None:
    huge: dict[str, Any] = {"tensor": "model.embed_tokens.weight", "rows": 1 << 40}
    status, _, found = ask(server, f"/{server.token}/ask/line", json.dumps(huge).encode())
    assert status == 400 and json.loads(found)["error"]["where"] == "rows"


def test_methods_that_are_none(server: Server) -> None:
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "CONNECT"):
        line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        line.request(method, f"/{server.token}/")
        found = line.getresponse()
        assert found.status == 501 and found.getheader("Access-Control-Allow-Origin") is None
        line.close()


def test_the_door_opens_once(server: Server) -> None:
    path = "/" + server.door.rpartition("/")[2]
    assert server.token not in server.door
    status, headers, _ = ask(server, path)
    assert status == 303 and headers["location"] == f"/{server.token}/"
    assert ask(server, path)[0] == 404


def test_too_many_questions_at_a_time_are_told_to_wait() -> None:
    go, waiting = threading.Event(), threading.Semaphore(0)

    def slow(body: bytes) -> dict[str, Any]:
        waiting.release()
        go.wait(30)
        return {}

    for server in serving(Answers("", {"slow": slow})):
        path = f"/{server.token}/ask/slow"
        threads = [threading.Thread(target=ask, args=(server, path, b"{}")) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert waiting.acquire(timeout=30)
        assert ask(server, path, b"{}")[0] == 429
        go.set()
        for thread in threads:
            thread.join()
        assert ask(server, path, b"{}")[0] == 200


def test_a_defect_is_said_to_be_one(capfd: pytest.CaptureFixture[str]) -> None:
    def broken(body: bytes) -> dict[str, Any]:
        raise IndexError(len(body))

    for server in serving(Answers("", {"broken": broken})):
        status, _, found = ask(server, f"/{server.token}/ask/broken", b"{}")
        assert status == 500 and "defect" in json.loads(found)["error"]["what"]
        assert ask(server, f"/{server.token}/ask/broken", b"{}")[0] == 500, "it goes on"


def test_a_port_that_is_taken_is_a_refusal(server: Server) -> None:
    with pytest.raises(Refused, match="cannot be had"):
        Server(Answers("", {}), server.server_port)


_ELSEWHERE = """new Promise((said) => {
    addEventListener("securitypolicyviolation", (event) => said(event.effectiveDirective));
    fetch("http://127.0.0.1:9/").catch(() => 0);
})"""
needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1060, False), (360, True)])
def test_in_a_browser(server: Server, tmp_path: Path, width: int, dark: bool) -> None:
    with Browser(tmp_path, width, 1200, dark) as page:
        page.open(server.url)
        page.until("document.querySelectorAll('#verdict .card').length === 3")
        page.until("document.querySelectorAll('.kind').length > 12")
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
        background = page.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(int(n) for n in background[4:-1].split(",")) < 200) == dark
        assert page.run("document.querySelector('#line svg').querySelectorAll('line.axis').length") == 16
        page.run("document.getElementById('bits').focus()")
        page.press("ArrowLeft")
        page.until(
            "document.querySelector('#verdict .card span:last-child').textContent.startsWith('int3-g64-sym')"
        )
        assert page.run("document.querySelector('#line svg').querySelectorAll('line.axis').length") == 8
        page.run("document.getElementById('outlier').focus()")
        page.press("ArrowRight")
        page.until("document.querySelectorAll('#verdict .card').length === 4")
        choose = "(id, v) => { const e = byId(id); e.value = v; e.dispatchEvent(new Event('input')) }"
        page.run(f"({choose})('weight', 'model.layers.0.self_attn.q_proj.weight')")
        page.run(f"({choose})('grid', 'iq2_s')")
        page.until("!document.getElementById('trouble').hidden")
        assert "256" in page.run("document.getElementById('trouble').textContent")
        page.run(f"({choose})('grid', 'nf4-b64')")
        page.until("document.getElementById('trouble').hidden")
        page.run("document.getElementById('compare').click()")
        page.until("document.querySelectorAll('#compared .spot').length > 40")
        page.run(f"({choose})('text', 'ten')")
        page.until("!document.getElementById('number-trouble').hidden")
        assert page.run(_ELSEWHERE) == "connect-src", "it may ask nobody else"
        wrong = [line for line in page.said if "127.0.0.1:9/" not in line and "400" not in line]
        assert not wrong, wrong


@needs_chromium
def test_a_made_file_in_a_browser(tiny_llama: Path, tmp_path: Path) -> None:
    """Names of the file are text; a tensor of the map opens with what the server finds."""
    out = tmp_path / "<img src=x onerror=alert(1)>.gguf"
    bitmill.quantize(str(tiny_llama), "Q4_0", tmp_path / "plain.gguf")
    shutil.copy(tmp_path / "plain.gguf", out)
    shutil.copy(tmp_path / "plain.gguf.report.json", f"{out}.report.json")
    for server in serving(opened(open_source(str(out)), open_source(str(tiny_llama)))):
        with Browser(tmp_path / "profile") as page:
            page.open(server.url)
            page.until("document.querySelectorAll('#map [data-cell]').length === 21")
            assert page.run("document.querySelectorAll('img').length") == 0
            assert "<img" in page.run("document.querySelector('h1').textContent")
            page.run("document.querySelector('#map svg').focus()")
            page.press("ArrowRight")
            page.press("Enter")
            page.until("document.querySelectorAll('#tensor svg').length === 3")
            assert not page.said, page.said
