"""The publisher's folder: what is in it, what the card says, and what goes to the hub."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from bitmill.core.errors import Refused
from bitmill.sweep import publish, run
from tests.cli.command import Command
from tests.test_kill import content
from tests.test_report import EVIL
from tests.test_sweep import asked

RECIPES = ("Q8_0", "nearest : int4-g32 > gptq")


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    text = folder / "words.txt"
    text.write_text("".join(f"{i} green bottles on the wall, then {i * 7} more.\n" for i in range(200)))
    wanted = asked(tiny_llama, folder / "out", text, *RECIPES)
    run.write(run.sweep(wanted, run.prospect(wanted)))
    return folder / "out"


@pytest.fixture
def swept(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


class FakeHub:
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.asked.append({"repo": repo_id, "private": private, "exist_ok": exist_ok})

    def upload_folder(
        self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str
    ) -> None:
        there = sorted(str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file())
        sent = [name for name in there if any(fnmatch(name, pattern) for pattern in allow_patterns)]
        self.asked.append({"repo": repo_id, "sent": sent, "message": commit_message})


def test_a_folder_to_publish(swept: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = Command(capsys)
    planned = command("publish", swept, "--repo", "me/tiny-GGUF", "--push", "--dry-run", "--json").json
    assert not planned["pushed"] and not (swept / "SHA256SUMS").exists()
    done = command("publish", swept, "--repo", "me/tiny-GGUF", "--license", "apache-2.0", "--json").json
    names = [f["file"] for f in done["files"]]
    assert names == [f["file"] for f in planned["files"]] and all(f["bytes"] for f in done["files"])
    sums = (swept / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ", 1)[1] for line in sums} == set(names) - {"SHA256SUMS"}
    for line in sums:
        digest, name = line.split("  ", 1)
        assert hashlib.sha256((swept / name).read_bytes()).hexdigest() == digest
    card = (swept / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n") and "# tiny-GGUF" in card
    told = json.loads((swept / "sweep.json").read_text())
    for tier in told["tiers"]:
        assert f"](<{tier['file']}>)" in card and tier["command"] in card
    assert "--imatrix imatrix.gguf" in card and str(made.parent) not in card
    assert (swept / "size-loss.svg").read_text().startswith("<svg xmlns=")
    assert command("publish", swept).code == 0, "its own card is replaced"
    (swept / "README.md").write_text("mine")
    refused = command("publish", swept)
    assert refused.code == 2 and "--force" in refused.err and (swept / "README.md").read_text() == "mine"


def test_the_commands_make_the_same_bytes(
    made: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = json.loads((made / "sweep.json").read_text())
    monkeypatch.chdir(tmp_path)
    for name in (made.parent / "words.txt", made / "imatrix.gguf", tiny_llama):
        (tmp_path / name.name).symlink_to(name)
    for tier in told["tiers"]:
        words = shlex.split(tier["command"])
        assert words[:2] == ["bitmill", "quantize"]
        done = Command(capsys)(*words[1:], "--no-measure")
        assert done.code == 0, done.err
        assert content(tmp_path / tier["file"]) == content(made / tier["file"])


def test_what_goes_to_the_hub(swept: Path) -> None:
    (swept / "notes.txt").write_text("private")
    folder = publish.opened(swept)
    publish.write(folder, repo="me/tiny", license_=None)
    hub = FakeHub()
    publish.push(folder, "me/tiny", hub, private=True)
    made, sent = hub.asked
    assert made == {"repo": "me/tiny", "private": True, "exist_ok": True}
    assert sent["sent"] == sorted(folder.files) and "notes.txt" not in sent["sent"]
    assert not any(name.startswith(".sweep") for name in sent["sent"])
    for wrong in ("tiny", "a/b/c", "../x", "me/ti ny"):
        with pytest.raises(Refused, match="no repository"):
            publish.push(folder, wrong, hub, private=False)


def test_what_is_not_published(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refused, match=r"no sweep\.json"):
        publish.opened(tmp_path)
    told = json.loads((swept / "sweep.json").read_text())
    for name in ("../words.txt", "", "a/b"):
        (swept / "sweep.json").write_text(json.dumps({**told, "tiers": [{**told["tiers"][0], "file": name}]}))
        with pytest.raises(Refused, match="no name"):
            publish.opened(swept)
    (swept / "sweep.json").write_text("[]")
    with pytest.raises(Refused, match="not what a sweep"):
        publish.opened(swept)
    (swept / "sweep.json").write_text(json.dumps(told))
    output = swept / told["tiers"][1]["file"]
    output.write_bytes(output.read_bytes()[:-1]) if output.is_file() else (
        output / "model.safetensors"
    ).unlink()
    with pytest.raises(Refused, match="not whole"):
        publish.opened(swept)
    assert Command(capsys)("publish", swept, "--push").code == 2


def test_names_are_text_in_a_card(swept: Path) -> None:
    folder = publish.opened(swept)
    told = json.loads((swept / "sweep.json").read_text())
    told["reference"]["name"] = EVIL + "`|\n# head"
    told["tiers"][0] |= {"recipe": "a`b|c\n", "worst_kind": EVIL}
    card = publish.model_card(publish.Folder(swept, told, folder.files), None, None)
    assert "<script" not in card.replace("\\<script", "").replace("`<script", "")
    assert "\n# head" not in card and "a'b/c" in card
