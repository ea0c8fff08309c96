"""``bitmill studio`` and ``bitmill plots``: what they say and refuse, and how the first of them ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import bitmill
from tests.cli.command import Command
from tests.test_pages import ROWS, tiers
from tests.test_report import record

STARTED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
from bitmill.cli.main import main
main()
"""


def test_a_dry_run_says_what_would_be_opened(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.gguf"
    bitmill.quantize(str(tiny_llama), "Q8_0", out)
    said = command("studio", out, "--against", tiny_llama, "--dry-run")
    assert (
        said.code == 0
        and "with the report" in said.out
        and "tiny-llama" in said.out
        and "http" not in said.out
    )
    plain = command("studio", tiny_llama, "--dry-run", "--json").json
    assert plain["model"] == str(tiny_llama) and plain["report"] is False and plain["original"] is None


def test_what_cannot_be_opened_is_refused(command: Command, tmp_path: Path) -> None:
    assert "there is no file" in command("studio", tmp_path / "nothing", "--dry-run").err
    assert command("studio", tmp_path / "nothing").code == 2
    assert command("studio", "--port", "65536").code == 2


def test_it_serves_until_it_is_interrupted(tiny_llama: Path) -> None:
    """As a user's terminal does it: the address, an answer, Ctrl-C, nothing more."""
    words = [sys.executable, "-c", STARTED, "studio", str(tiny_llama), "--json", "--no-browser"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        lines: list[str] = []
        while not lines or lines[-1].rstrip() != "}":
            lines.append(run.stdout.readline())
            assert lines[-1], run.stderr.read()
        told = json.loads("".join(lines))
        with urllib.request.urlopen(told["url"], timeout=60) as page:
            assert b'id="explore"' in page.read()
        assert told["url"].startswith(f"http://127.0.0.1:{told['port']}/")
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 0 and run.stderr.read().strip() == "" and run.stdout.read() == ""


def svg(path: Path) -> ElementTree.Element:
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return root


def test_pictures_of_a_measurement(command: Command, tmp_path: Path) -> None:
    source, out = tmp_path / "account.json", tmp_path / "figures"
    source.write_text(json.dumps(record().to_json()))
    dry = command("plots", source, "-o", out, "--dry-run", "--png")
    assert dry.code == 0 and "kinds.png" in dry.out and not out.exists()
    said = command("plots", source, "-o", out, "--png", "--width", 400, "--json").json
    assert {Path(name).stem for name in said["files"]} == {"kinds", "divergence", "confidence", "weights"}
    for name in said["files"]:
        if name.endswith(".svg"):
            svg(out / name)
        else:
            head = (out / name).read_bytes()[:24]
            assert head.startswith(b"\x89PNG") and int.from_bytes(head[16:20], "big") == 400
    again = command("plots", source, "-o", out)
    assert again.code == 2 and "--force" in again.err
    assert command("plots", source, "-o", out, "--force").code == 0


def test_pictures_of_several_and_of_a_sweep(command: Command, tmp_path: Path) -> None:
    records = [record(name, seed=i).to_json() for i, (name, *_) in enumerate(ROWS)]
    several = tmp_path / "several.json"
    several.write_text(json.dumps({"records": records, "comparisons": []}))
    assert command("plots", several, "-o", tmp_path / "a").code == 0
    assert (
        len([e for e in svg(tmp_path / "a" / "size-loss.svg").iter() if "spot" in (e.get("class") or "")])
        == 4
    )
    folder = tmp_path / "ladder"
    folder.mkdir()
    rows = [{**tier, "file": f"{i}.gguf"} for i, tier in enumerate(tiers(*ROWS))]
    (folder / "sweep.json").write_text(json.dumps({"tiers": rows, "budget": 100_000_000}))
    assert command("plots", folder, "-o", tmp_path / "b", "--json").json["files"] == ["size-loss.svg"]
    for i, one in enumerate(records):
        (folder / f"{i}.gguf.measured.json").write_text(json.dumps({"record": one}))
    files = command("plots", folder, "-o", tmp_path / "c", "--json").json["files"]
    assert files == ["size-loss.svg", "divergence.svg"]


def test_what_is_no_measurement_is_refused(command: Command, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    for text in ("[]", "{}", "3", "{", '{"records": 3}', '[{"measurement": null}]', "[" * 100_000):
        bad.write_text(text)
        said = command("plots", bad, "-o", tmp_path / "out")
        assert said.code == 2 and "defect" not in said.err and not (tmp_path / "out").exists(), text
    assert command("plots", tmp_path, "-o", tmp_path / "out").code == 2


def test_without_resvg_the_way_to_have_it_is_named(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    source = tmp_path / "account.json"
    source.write_text(json.dumps(record().to_json()))
    said = command("plots", source, "-o", tmp_path / "out", "--png")
    assert said.code == 2 and "pip install 'bitmill[png]'" in said.err and not (tmp_path / "out").exists()
