"""``bitmill verify``: sound files pass, and each kind of damage is found with the right words."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill.checkpoint.chat_template import scan, words_looked_for
from bitmill.checkpoint.gguf import GgufFile
from bitmill.checkpoint.patterns import compiled
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.core.errors import BadFile, Refused
from bitmill.trust.rendering import render
from bitmill.trust.sums import NAME, write_manifest
from bitmill.trust.verdict import Verdict, verify
from tests.test_gguf import write as write_gguf
from tests.tiny import CHAT, make_model

Break = Callable[[Path], object]


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="bitmill-tests-"))
    return make_model(path / "m", "llama", tied=True, num_hidden_layers=2)


@functools.cache
def gguf() -> Path:
    path = folder().parent / "m.gguf"
    write_gguf(SafetensorsFolder(folder()), path, "q4_0")
    return path


def quiet(event: str, done: int, total: int, text: str) -> None:
    """Tells nobody."""


def levels(found: Verdict, check: str) -> list[str]:
    return [f.level for f in found.found if f.check == check]


def test_a_sound_folder() -> None:
    found = verify(str(folder()), to=("vllm", "transformers", "mlx"), base=str(folder()), values=True)
    assert found.good and not found.count("warning"), found.found
    assert found.method == "dense" and found.tensors == len(load_file(folder() / "model.safetensors"))
    assert {"structure", "files", "layout", "architecture", "template", "tokenizer", "values"} <= {
        *found.checked
    }
    assert found.to_json()["good"] and [t["runtime"] for t in found.to_json()["for"]] == [
        "vllm", "transformers", "mlx",
    ]  # fmt: skip


def test_a_sound_gguf() -> None:
    found = verify(str(gguf()), to=("llama.cpp",), base=str(folder()), values=True)
    assert found.good and not found.count("warning"), found.found
    assert found.bytes_ == gguf().stat().st_size


def edit(path: Path, name: str, **keys: object) -> None:
    """Set keys of a JSON file, or with None take them out."""
    said = json.loads((path / name).read_text())
    said |= keys
    (path / name).write_text(json.dumps({k: v for k, v in said.items() if v is not None}))


def retensor(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def cut(path: Path, bytes_: int) -> None:
    """Cut a file's end off."""
    data = path.read_bytes()
    path.write_bytes(data[:-bytes_])


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    tensors["model.norm.weight"][0] = float("-inf")


def sums(path: Path) -> None:
    write_manifest(path, quiet)
    edit(path, "generation_config.json", top_k=3)


def split(path: Path, name: str) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    tensors = load_file(path / "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 10**9}, "weight_map": dict.fromkeys(tensors, name)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def swapped(path: Path) -> None:
    """Exchange the ids of two tokens."""
    said = json.loads((path / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (path / "tokenizer.json").write_text(json.dumps(said))


BROKEN: dict[str, tuple[Break, str, str, str]] = {
    "cut": (lambda p: cut(p / "model.safetensors", 7), "error", "structure", "ends at byte"),
    "grown": (lambda p: cut_in(p / "model.safetensors"), "error", "structure", "belong to nothing"),
    "header": (
        lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 64),
        "error",
        "structure",
        "header announces",
    ),
    "shard outside": (
        lambda p: split(p, "../model-00001-of-00001.safetensors"),
        "error",
        "structure",
        "not the name of a file",
    ),
    "shard missing": (lambda p: split(p, "model-7.safetensors"), "error", "structure", "is missing"),
    "index of other sizes": (
        lambda p: split(p, "model-00001-of-00001.safetensors"),
        "warning",
        "files",
        "announces",
    ),
    "file beside": (
        lambda p: (
            split(p, "model-00001-of-00001.safetensors"),
            shutil.copy(p / "model-00001-of-00001.safetensors", p / "model-2.safetensors"),
        ),
        "warning",
        "files",
        "leaves these files",
    ),
    "pickle beside": (
        lambda p: (p / "pytorch_model.bin").write_bytes(b"x"),
        "warning",
        "files",
        "1 pickled file",
    ),
    "pickles only": (
        lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
        "error",
        "files",
        "run any code",
    ),
    "link outside": (
        lambda p: (p / "merges.txt").symlink_to("/etc/hostname"),
        "error",
        "files",
        "leads outside",
    ),
    "program": (lambda p: (p / "setup.sh").write_text("x"), "warning", "files", "programs lie"),
    "remote code": (
        lambda p: edit(p, "config.json", auto_map={"AutoModel": "evil.Model"}),
        "warning",
        "code",
        "evil.Model",
    ),
    "code of a tokenizer": (
        lambda p: edit(p, "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}),
        "warning",
        "code",
        "auto_map",
    ),
    "config is no JSON": (
        lambda p: (p / "config.json").write_text("{"),
        "error",
        "structure",
        "not valid JSON",
    ),
    "key twice": (
        lambda p: (p / "config.json").write_text('{"model_type": "llama", "model_type": "x"}'),
        "error",
        "structure",
        "appears twice",
    ),
    "template": (
        lambda p: (p / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}"),
        "error",
        "template",
        "__class__",
    ),
    "template fails": (
        lambda p: (p / "chat_template.jinja").write_text("{{ messages.nothing.at.all }}"),
        "warning",
        "template",
        "fails on one short message",
    ),
    "template of another": (
        lambda p: (p / "chat_template.jinja").write_text(CHAT + "!"),
        "warning",
        "template",
        "renders differently",
    ),
    "NaN": (lambda p: retensor(p, poison), "error", "values", "1 NaN"),
    "infinity": (lambda p: retensor(p, poison), "error", "values", "1 infinities"),
    "zeros": (
        lambda p: retensor(p, lambda t: t["model.layers.0.mlp.up_proj.weight"].zero_()),
        "warning",
        "values",
        "are zero",
    ),
    "sums": (sums, "error", "manifest", "not the one listed"),
    "sums of what is gone": (
        lambda p: (write_manifest(p, quiet), (p / "generation_config.json").unlink()),
        "error",
        "manifest",
        "missing",
    ),
    "sums of a path": (lambda p: (p / NAME).write_text(f"{'0' * 64}  ../x\n"), "error", "manifest", "line 1"),
    "not summed": (
        lambda p: (write_manifest(p, quiet), (p / "new.txt").write_text("x")),
        "warning",
        "manifest",
        "new.txt",
    ),
    "tensor gone": (
        lambda p: retensor(p, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "error",
        "architecture",
        "missing",
    ),
    "tensor more": (
        lambda p: retensor(p, lambda t: t.update(odd=torch.ones(2))),
        "warning",
        "architecture",
        "nothing uses",
    ),
    "shapes": (
        lambda p: edit(p, "config.json", intermediate_size=300),
        "error",
        "architecture",
        "another shape",
    ),
    "ids beyond": (
        lambda p: (
            edit(p, "config.json", vocab_size=10),
            retensor(p, lambda t: t.update({"model.embed_tokens.weight": torch.ones(10, 128)})),
        ),
        "error",
        "tokenizer",
        "ids up to",
    ),
    "other tokenizer": (swapped, "error", "tokenizer", "against the base"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "warning", "tokenizer", "no tokenizer.json"),
    "unknown architecture": (
        lambda p: edit(p, "config.json", model_type="nosuch"),
        "warning",
        "layout",
        "no architecture 'nosuch'",
    ),
}


def cut_in(path: Path) -> None:
    """Add bytes that belong to nothing."""
    path.write_bytes(path.read_bytes() + b"PK\x03\x04")


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, tmp_path: Path) -> None:
    change, level, check, said = BROKEN[name]
    path = Path(shutil.copytree(folder(), tmp_path / "m"))
    change(path)
    found = verify(str(path), base=str(folder()), values=check == "values")
    there = [f.level for f in found.found if f.check == check and said in f.what]
    assert there and there[0] == level, found.found
    assert found.good == (not found.count("error"))


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, b"\x09\0\0\0", "version 9"),
        (8, b"\xff" * 8, "more than the file can hold"),
        (16, b"\xff" * 8, "more than the file can hold"),
    ],
)
def test_a_broken_gguf(at: int, value: bytes, said: str, tmp_path: Path) -> None:
    data = gguf().read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(data[:at] + value + data[at + len(value) :])
    found = verify(str(path))
    assert not found.good and said in found.found[0].what


def test_a_gguf_with_other_tensors(tmp_path: Path) -> None:
    data = gguf().read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(data.replace(b"blk.1.ffn_gate.weight", b"blk.1.ffn_goat.weight"))
    said = " ".join(f.what for f in verify(str(path)).found)
    assert "no place for" in said


def test_nan_in_a_block_of_a_gguf(tmp_path: Path) -> None:
    path = Path(shutil.copy(gguf(), tmp_path / "x.gguf"))
    record = GgufFile(path).tensors["blk.0.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[record.offset : record.offset + 2] = np.float16("nan").tobytes()
    path.write_bytes(data)
    found = verify(str(path), values=True)
    assert levels(found, "values") == ["error"] and "32 NaN" in found.found[0].what
    assert verify(str(path)).good


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR.")
    assert [f.check for f in verify(str(path)).found] == ["files"]


def test_what_cannot_be_asked() -> None:
    for asked in ({"to": ("abacus",)}, {"tp": 0}, {"base": "no-such-model"}):
        with pytest.raises(Refused):
            verify(str(folder()), **asked)
    with pytest.raises(Refused):
        verify("no-such-model")


GRAVE = [
    "{{ x.__class__ }}",
    "{{ x['__class__'] }}",
    "{{ x['\\x5f\\x5fclass\\x5f\\x5f'] }}",
    "{{ x['__cl' ~ 'ass__'] }}",
    "{{ x['__cl' + y] }}",
    "{{ x|attr('y') }}",
    "{{ messages|map(attribute='__init__')|list }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{{ lipsum }}",
    "{{ cycler }}",
    "{{ 'a' * 100000000 }}",
    "{{ 'a'.center(100000000) }}",
    "{{ 'a'|indent(100000000) }}",
    "{% for i in range(10000000) %}{% endfor %}",
    "{% for %}",
    "{{" + "1+" * 20_000 + "1 }}",
    "a" * 300_000,
]
HONEST = [
    CHAT,
    "{% for m in messages if m.role != 'system' %}{% generation %}{{ m['content'] | trim }}"
    "{% endgeneration %}{% break %}{% endfor %}",
    "{%- macro f(x) -%}{{ x.name | tojson(indent=4) }}{%- endmacro -%}{{ f(tools[0]) }}"
    "{{ strftime_now('%Y') }}"
    "{% set ns = namespace(a=1) %}{% set ns.a = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% if '</think>' in messages[0].content %}{{ raise_exception('x' ~ ns.a) }}{% endif %}",
]


@pytest.mark.parametrize("text", GRAVE)
def test_templates_that_none_should_write(text: str) -> None:
    assert scan(text) and scan(text)[0].grave


@pytest.mark.parametrize("text", HONEST)
def test_honest_templates(text: str) -> None:
    assert not scan(text)


def test_what_templates_look_for_and_loop_over() -> None:
    deep = "".join(f"{{% for a{i} in messages %}}" for i in range(4)) + "{% endfor %}" * 4
    assert [r.grave for r in scan(deep)] == [False] and "4 loops" in scan(deep)[0].what
    assert "'secret'" in scan("{{ secret }}")[0].what
    assert words_looked_for("{% if 'open sesame' in messages[0].content %}{% endif %}") == ("open sesame",)


def test_templates_are_rendered_within_limits() -> None:
    chat = [{"role": "user", "content": "Hello"}]
    (good,) = render(CHAT, [chat], {}) or ()
    assert good.characters > 20 and not good.failed
    (bad,) = render("{{ raise_exception('no') }}", [chat], {}) or ()
    assert "no" in bad.failed
    endless = "{% set n = 90000 %}{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}"
    assert render(endless, [chat], {}, seconds=1) is None


@pytest.mark.parametrize(
    "text", ["(a+)+$", "(a|a)*b", "(.*)*x", "a*b*c*d*e*f*g", "((x+)y)+", "(", "a" * 5000]
)
def test_patterns_that_may_never_end(text: str) -> None:
    with pytest.raises(BadFile):
        compiled(text, "here")


@pytest.mark.parametrize(
    "text",
    [
        r".*model\.layers\.\d+\.self_attn\.q_proj$",
        "(q|k|v)_proj",
        r"model\.layers\.(0|1|12)\..*",
        "a{2}[+*]+",
    ],
)
def test_patterns_that_people_write(text: str) -> None:
    assert compiled(text, "here")
