"""What the peer comparisons share: one work folder, both sides as processes of their own, one table.

A comparison runs the peer in the peer's environment and Bitmill in this one, one after the other,
on the same model, the same token ids and as many threads, and scores both with :mod:`ruler`. The
machine's load before each run is kept with the result: a time taken on a busy machine says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fixture import off_grid
from ruler import Ruler, Score, as_json, calibration_windows, digest, line, write_json
from safetensors.torch import load_file, save_file

import bitmill
from bitmill.run.load import load_model

HERE = Path(__file__).resolve().parent
EVIDENCE = HERE.parent / "docs" / "evidence"


@dataclass
class Bench:
    """One comparison: where it works, with how many threads, and the rows it has found.

    Attributes:
        work: models, tokens, peers' environments (``work/peers/NAME``) and everything that is written.
        threads: of either side.
        reuse: take a side's stored result where there is one.
        evidence: where tables go.
    """

    work: Path
    threads: int = 2
    reuse: bool = False
    evidence: Path = EVIDENCE
    rows: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def model(self) -> Path:
        """The off-grid test model."""
        return off_grid(self.work / "fixture")

    @cached_property
    def wide_model(self) -> Path:
        """The same with rows that are multiples of 256."""
        return off_grid(self.work / "fixture-wide", wide=True)

    @cached_property
    def ruler(self) -> Ruler:
        """The ruler over the test model."""
        return Ruler(self.model, self.work / "ruler.safetensors")

    @cached_property
    def tokens(self) -> Path:
        """The calibration tokens as a file: ``input_ids``, 64 windows of 512."""
        path = self.work / "tokens.safetensors"
        if not path.is_file():
            save_file({"input_ids": calibration_windows(self.model)}, path)
        return path

    def take(self, windows: int) -> None:
        """Calibrate on this many of the windows from here on, spread over them all."""
        ids = load_file(self.tokens)["input_ids"]
        self.tokens = self.work / f"tokens-{windows}.safetensors"
        save_file({"input_ids": ids[:: len(ids) // windows].contiguous()}, self.tokens)

    def peer(
        self, environment: str, script: str, name: str, *options: str, eight_bit_inputs: bool = False
    ) -> dict[str, Any]:
        """Run a peer's script in its environment; add its scored row.

        Args:
            eight_bit_inputs: as its runtime does, see :meth:`ruler.Ruler.score_linears`.

        Raises:
            FileNotFoundError: the environment is not there.
        """
        python = self.work / "peers" / environment / "bin" / "python"
        if not python.exists():
            raise FileNotFoundError(
                f"{python}: run benchmarks/setup_peers.sh {self.work}/peers {environment}"
            )
        out = self.work / "results" / name
        command = [str(python), str(HERE / script), str(self.model), str(self.tokens), str(out), *options]
        facts = self.run(command, out)
        scores = self.ruler.score_linears(load_file(out / "linears.safetensors"), eight_bit_inputs)
        return self.add(name, facts, scores)

    def bitmill(self, recipe: str, name: str, *options: str, loaded: bool = False) -> dict[str, Any]:
        """Run Bitmill on the same work; add its scored row.

        Args:
            loaded: score the model as Bitmill loads it, inputs rounded where the file says so.
        """
        out, facts = self.run_bitmill(self.model, recipe, name, *options)
        if loaded:
            model = load_model(bitmill.open_source(str(out / facts["file"])))
            return self.add(name, facts, self.ruler.score(model))
        return self.add(name, facts, self.ruler.score_file(out / facts["file"]))

    def run_bitmill(self, model: Path, recipe: str, name: str, *options: str) -> tuple[Path, dict[str, Any]]:
        """Bitmill's folder and facts, not scored."""
        out = self.work / "results" / name
        command = [sys.executable, str(HERE / "run_bitmill.py"), str(model), str(self.tokens), str(out)]
        return out, self.run([*command, recipe, *options], out)

    def has(self, name: str) -> bool:
        """Whether a run of this name is stored."""
        return (self.work / "results" / name / "facts.json").is_file()

    def add(self, name: str, facts: Mapping[str, Any], scores: Mapping[str, Score]) -> dict[str, Any]:
        """Keep one row and say it."""
        row = {"name": name, **facts, "scores": as_json(scores)}
        self.rows.append(row)
        print(line(name, scores), f" {facts['seconds']:.1f} s", flush=True)
        return row

    def run(self, command: Sequence[str], out: Path) -> dict[str, Any]:
        """One side as a process with ``--threads`` added; the facts it left in ``out``."""
        stored = out / "facts.json"
        if self.reuse and stored.is_file():
            return json.loads(stored.read_text(encoding="utf-8"))
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        load = os.getloadavg()[0]
        threads = str(self.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        with (out / "log.txt").open("w") as log:
            done = subprocess.run(
                [*command, "--threads", threads],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: {out / 'log.txt'}")
        facts = {**json.loads(stored.read_text(encoding="utf-8")), "load_before": load}
        write_json(stored, facts)
        return facts

    def report(self, name: str, title: str, notes: str) -> Path:
        """Write the rows as ``NAME.json`` and as a table ``NAME.md``."""
        about = {
            **machine(),
            "threads": self.threads,
            "calibration": digest(load_file(self.tokens)["input_ids"]),
        }
        write_json(self.evidence / f"{name}.json", {"about": about, "rows": self.rows})
        path = self.evidence / f"{name}.md"
        path.write_text(
            f"# {title}\n\n{notes}\n\n{table(self.rows)}\n\n{signature(about)}\n", encoding="utf-8"
        )
        print(path)
        return path


def against(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """One sentence: a row of ours beside the peer's, without a full stop."""
    docs, other = (
        ours["scores"][kind]["mean_kld"] / theirs["scores"][kind]["mean_kld"] for kind in ("docs", "other")
    )
    time = ours["seconds"] / theirs["seconds"]
    return (
        f"{name}: bitmill's KLD is {docs:.2f} (docs) and {other:.2f} (other) of the peer's, "
        f"in {time:.3f} of its time"
    )


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        named = [
            x.split(":", 1)[1].strip() for x in information.read_text().splitlines() if "model name" in x
        ]
        model = named[0] if named else model
    packages = ("bitmill", "torch", "transformers", "numpy")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def signature(about: Mapping[str, Any]) -> str:
    """One line under a table: machine and versions."""
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    where = f"{about['cores']} cores ({about['cpu']}), {about['threads']} threads"
    return f"{where}, Python {about['python']}, {versions}."


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown: KLD in and out of domain first."""
    columns = ["bpw", "KLD docs", "KLD other", "median", "q99", "ppl", "same top", "seconds", "whole"]
    columns += ["peak MiB", "load before"]
    lines = [f"| | {' | '.join(columns)} |", "|---" + len(columns) * "|--:" + "|"]
    for row in rows:
        docs, other = row["scores"]["docs"], row["scores"]["other"]
        cells = [
            row["name"],
            f"{row['bpw']:.3f}" if "bpw" in row else "",
            f"{docs['mean_kld']:.4f}",
            f"{other['mean_kld']:.4f}",
            f"{docs['median_kld']:.4f}",
            f"{docs['q99_kld']:.3f}",
            f"{docs['perplexity']:.2f}",
            f"{docs['same_top']:.3f}",
            f"{row['seconds']:.1f}",
            f"{row['seconds_whole']:.1f}" if "seconds_whole" in row else "",
            f"{row['peak_rss_mib']:.0f}" if "peak_rss_mib" in row else "",
            f"{row['load_before']:.1f}" if "load_before" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every comparison has."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument(
        "--work", type=Path, default=Path("out/benchmarks"), help="models, environments, results"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reuse", action="store_true", help="take stored results where there are any")
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where tables go")
    return parser


def bench(options: argparse.Namespace) -> Bench:
    """The comparison that these options describe."""
    return Bench(options.work.resolve(), options.threads, options.reuse, options.evidence)
