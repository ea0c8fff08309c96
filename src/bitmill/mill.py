"""One call from a model to a file: resolve, plan, calibrate, walk, seal; what happens when it stops."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from bitmill.account import Report
from bitmill.calibrate.importance import moments_from
from bitmill.calibrate.moments import load_moments, save_moments
from bitmill.calibrate.tokens import OWN, Calibration, calibration_tokens
from bitmill.calibrate.windows import tokens_sha256
from bitmill.checkpoint.imatrix import read_imatrices
from bitmill.core.axes import CalibratedSolver, Checkpoint
from bitmill.core.errors import BitmillError, Interrupted, Refused
from bitmill.core.learning import BlockSolver
from bitmill.core.types import Moments, Note
from bitmill.fitting import KEY
from bitmill.journal import RESUME, Boundary, Workspace, report_path
from bitmill.planning import Plan, plan
from bitmill.recipe import Recipe, parse
from bitmill.rotating import with_rotating
from bitmill.source import open_source
from bitmill.tuning import with_tuning
from bitmill.walk import Progress, Walk


def quantize(
    model: str | Checkpoint,
    recipe: str | Recipe,
    out: str | Path,
    *,
    calib: Sequence[str] | str | Tensor | None = None,
    nsamples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    chat: bool = False,
    device: str = "cpu",
    moments: str | Path | None = None,
    imatrix: str | Path | Sequence[str | Path] = (),
    imatrix_missing: str = "plain",
    save: str | Path | None = None,
    force: bool = False,
    strict: bool = False,
    resume: bool = True,
    revision: str | None = None,
    progress: Progress | None = None,
    boundary: Boundary = lambda _: None,
) -> Report:
    """Quantize ``model`` by ``recipe`` into ``out``.

    Args:
        model: a folder, a ``.gguf`` file, a hub id, ``smollm2``, or an open checkpoint.
        recipe: a known name, a one-line recipe, a TOML file.
        out: a file or folder that does not exist yet (or ``force``).
        calib: texts to calibrate on (files, data set names), token ids ``n T``; None takes the default
        mixture.
        nsamples, seqlen, seed, chat: how many windows, how long, drawn how, through the chat template or not.
        moments: moments taken before, instead of calibrating.
        imatrix: importance matrices, merged, instead of calibrating; for solvers that need no Gram matrix.
        imatrix_missing: a weight without data: ``plain``, without importance and with a note, or ``refuse``.
        save: where to keep this run's moments.
        strict: refuse when a shape forces another type than the recipe's, or nobody is known to load the
            output rightly.
        resume: go on from an interrupted run of the same command.
        progress: called as ``progress(event, done, total, text)``.
        boundary: called at every durable step (tests).

    Raises:
        Refused: something the user can change; nothing was written.
        Interrupted: a clean stop; the same command goes on.
        Unsolvable: the numbers gave out; the block and the way out are named.
    """
    started = time.monotonic()
    out, tell = Path(out), progress or (lambda *_: None)
    source = open_source(model, revision=revision) if isinstance(model, str) else model
    wanted = parse(recipe) if isinstance(recipe, str) else recipe
    told = Told.of(calib, nsamples, seqlen, seed, chat, moments, imatrix, imatrix_missing)
    made = told.plan(wanted, source, out, strict)
    refuse_existing(out, made, force)
    known, calibration = told.known(made, source, tell)
    space = Workspace(out, made.files, not made.files[0].path, boundary)
    walk = Walk(made, source, space, tell, calibration, known, device, save is not None)
    keep = Path(save) if save is not None else None

    def kept() -> None:
        if keep is not None:
            facts = {**{k: str(v) for k, v in calibration.facts.items()}, "model": source.digest}
            facts["rotations"] = _rotations(made)
            save_moments(keep, walk.kept_moments, facts)

    identity = identity_of(made, calibration, device)
    job = with_rotating(walk, with_tuning(walk))
    return carry_out(job, identity, started, force=force, resume=resume, before_sealing=kept)


def identity_of(made: Plan, calibration: Calibration, device: str) -> dict[str, Any]:
    """The fields a resumed run must agree on, calibration among them."""
    tokens = calibration.tokens
    sha256 = tokens_sha256(tokens) if tokens.numel() else calibration.facts.get("sha256", "")
    return {**made.identity(), "calibration": sha256, "device": device}


@dataclass(frozen=True, eq=False)
class Told:
    """What a run is told about the inputs of weights, and how it draws windows where it has to look itself.

    Attributes:
        calib, nsamples, seqlen, seed, chat, moments: as of :func:`quantize`.
        matrices, missing: its ``imatrix`` and ``imatrix_missing``.
    """

    calib: Sequence[str] | str | Tensor | None
    nsamples: int
    seqlen: int
    seed: int
    chat: bool
    moments: Path | None
    matrices: tuple[Path, ...]
    missing: str

    @classmethod
    def of(
        cls,
        calib: Sequence[str] | str | Tensor | None,
        nsamples: int,
        seqlen: int,
        seed: int,
        chat: bool,
        moments: str | Path | None,
        imatrix: str | Path | Sequence[str | Path],
        missing: str,
    ) -> Told:
        """From the arguments of :func:`quantize`."""
        matrices = tuple(Path(p) for p in ([imatrix] if isinstance(imatrix, str | Path) else imatrix))
        nsamples, seqlen = (0, 0) if matrices else (nsamples, seqlen)
        file = None if moments is None else Path(moments)
        return cls(calib, nsamples, seqlen, seed, chat, file, matrices, missing)

    def plan(self, wanted: Recipe, source: Checkpoint, out: Path, strict: bool) -> Plan:
        """The plan of a recipe under this."""
        calibrated = self.calib is not None or self.moments is not None or bool(self.matrices)
        windows = {"nsamples": self.nsamples, "seqlen": self.seqlen}
        made = plan(wanted, source, out, **windows, strict=strict, calibrated=calibrated)
        learns = wanted.tune or (wanted.solver if isinstance(wanted.make_solver(), BlockSolver) else None)
        if learns is not None and (self.moments is not None or self.matrices):
            raise Refused(
                f"{learns} learns from what the model puts out; moments of its inputs do not tell",
                fix="calibrate: --calib TEXT instead of --moments or --imatrix",
            )
        rotations = made.learned_rotations
        if rotations is not None and (self.moments is not None or self.matrices):
            raise Refused(
                f"{rotations} learns from what the model puts out; moments of its inputs do not tell",
                fix="calibrate: --calib TEXT instead of --moments or --imatrix",
            )
        if any(KEY in t.seams() for t in wanted.make_transforms()) and (self.moments or self.matrices):
            raise Refused(
                "smoothattention needs the range of keys; moments of inputs do not tell it",
                fix="calibrate: --calib TEXT instead of them, or leave it out",
            )
        if any(row.cache and row.cache.static for row in made.rows) and (self.moments or self.matrices):
            raise Refused(
                f"cache={wanted.cache} needs the range of keys and values; moments of inputs do not tell it",
                fix="calibrate: --calib TEXT instead of --moments or --imatrix",
            )
        if wanted.experts is not None and (self.moments is not None or self.matrices):
            raise Refused(
                f"experts={wanted.experts} chooses tokens while calibrating; these were chosen before",
                fix="leave it out, or calibrate: --calib TEXT",
            )
        if self.matrices and (self.calib is not None or self.moments is not None):
            raise Refused("--imatrix stands instead of --calib and --moments", fix="give one of them")
        return made

    def known(
        self, made: Plan, source: Checkpoint, tell: Progress, drawn: Calibration | None = None
    ) -> tuple[dict[str, Moments], Calibration]:
        """Moments that are known already, and the calibration; windows ``drawn`` before serve again."""
        known, calibration = importance(made, source, self.matrices, self.missing)
        if self.moments is not None:
            known, calibration = _saved(self.moments, source, made)
        if not made.calibrates or known:
            return known, calibration
        if drawn is None:
            windows = {"nsamples": self.nsamples, "seqlen": self.seqlen, "seed": self.seed}
            calib = [OWN] if self.own_text(made) else self.calib
            drawn = calibration_tokens(source, calib, **windows, chat=self.chat, progress=tell)
        return known, drawn

    def own_text(self, made: Plan) -> bool:
        """Whether no text is named, and the plan's recipe takes what the model itself writes."""
        tune = made.recipe.make_tune()
        return self.calib is None and tune is not None and tune.own_text


def importance(
    made: Plan, source: Checkpoint, matrices: Sequence[Path], missing: str = "plain"
) -> tuple[dict[str, Moments], Calibration]:
    """What importance matrices, merged, say about the weights of a plan, and the account of it; nothing
    without any. See :func:`~bitmill.calibrate.importance.moments_from`.

    Raises:
        Refused: the recipe needs more than that, or changes what the matrices describe.
    """
    if not matrices:
        return {}, Calibration.none()
    if made.recipe.transforms:
        raise Refused(
            f"an importance matrix describes the inputs before {made.recipe.transforms[0].name} changes them",
            fix="drop the transform, or calibrate: --calib TEXT instead of --imatrix",
        )
    fixing = next((row.inputs for row in made.rows if row.inputs is not None and row.inputs.fixed), None)
    if fixing is not None:
        raise Refused(
            f"{fixing} needs the range of every input; an importance matrix holds mean squares only",
            fix="calibrate: --calib TEXT instead of it; or input=int8-token, which needs none",
        )
    if made.needs == "gram":
        raise Refused(
            f"{made.recipe.solver} needs Gram matrices; an importance matrix holds their diagonals only",
            fix="nearest and clip work with --imatrix; or calibrate: --calib TEXT instead of it",
        )
    return moments_from(read_imatrices(matrices), source, made.rows, missing)


def _saved(path: Path, source: Checkpoint, made: Plan) -> tuple[dict[str, Moments], Calibration]:
    """Moments from a file, and what it says about the calibration they are from."""
    known, facts = load_moments(path)
    _refuse_foreign_moments(known, facts, source, made)
    return known, Calibration(Calibration.none().tokens, facts)


class Job(Protocol):
    """What fills a workspace: the walk that quantizes, or one that takes over what is stored."""

    @property
    def space(self) -> Workspace:
        """What it fills."""

    @property
    def tell(self) -> Progress:
        """Who hears of its progress."""

    def run(self, identity: Mapping[str, Any], done: Sequence[Mapping[str, Any]], started: float) -> Report:
        """Every unit that is not done yet; the report of all of them."""

    def verify_sample(self) -> None:
        """Open what was written as any reader would, and compare."""


def carry_out(
    job: Job,
    identity: Mapping[str, Any],
    started: float,
    *,
    force: bool,
    resume: bool,
    before_sealing: Callable[[], None] = lambda: None,
) -> Report:
    """Run, verify, seal; or take over, or go on. A clean stop keeps what is done; a failure leaves nothing
    behind.

    Raises:
        Refused: the output exists and this very command did not make it.
        Interrupted: a clean stop; the same command goes on.
    """
    space = job.space
    finished = _already_there(space.out, space, identity, force)
    if finished is not None:
        return finished
    try:
        done = space.open(identity, resume)
    except BitmillError:
        space.close()  # another run's folder, or another recipe's: not ours to clear
        raise
    try:
        report = job.run(identity, done, started)
        before_sealing()
        job.tell("seal", 0, 1, "verifying")
        job.verify_sample()
        space.seal((json.dumps(report.to_json(), indent=1) + "\n").encode(), force)
    except KeyboardInterrupt as stop:
        raise Interrupted("stopped", where=str(space.folder), fix=RESUME) from stop
    except Interrupted:
        raise
    except BitmillError:
        space.discard()
        raise
    finally:
        space.close()
    job.tell("seal", 1, 1, str(space.out))
    return report


def refuse_existing(out: Path, made: Plan, force: bool) -> None:
    """Before any work: an output that this recipe did not make stays untouched.

    Raises:
        Refused: it exists.
    """
    if not out.exists() or force:
        return
    recorded = report_path(out)
    unfinished = out.with_name(out.name + ".partial").is_dir()
    ours = (
        recorded.is_file()
        and json.loads(recorded.read_text(encoding="utf-8"))["plan"]["digest"] == made.digest
    )
    if not ours and not unfinished:
        raise Refused(f"{str(out)!r} exists", fix="add --force to replace it, or choose another -o")


def _already_there(out: Path, space: Workspace, identity: Mapping[str, Any], force: bool) -> Report | None:
    """The report of an output that this very command has finished; refuses to touch any other."""
    if not out.exists() or force:
        return None
    space.finish_sealed()
    recorded = report_path(out)
    known = json.loads(recorded.read_text(encoding="utf-8")) if recorded.is_file() else {}
    if known.get("identity") != json.loads(json.dumps(identity)):
        raise Refused(f"{str(out)!r} exists", fix="add --force to replace it, or choose another -o")
    fields = {
        k: known[k] for k in ("path", "plan", "calibration", "tensors", "blocks", "seconds", "identity")
    }
    notes = (
        *(Note(**n) for n in known["notes"]),
        Note("present", str(out), "this very command had finished it"),
    )
    return Report(**fields, notes=notes, resumed=known["resumed"], tuning=known.get("tuning", {}))


def _rotations(made: Plan) -> str:
    """What the moments of a plan's run depend on, of its transforms: those known before it."""
    return " + ".join(str(t) for t in made.recipe.make_transforms() if t.needs == "nothing")


def _refuse_foreign_moments(
    known: Mapping[str, Moments], facts: Mapping[str, str], source: Checkpoint, made: Plan
) -> None:
    if not known:
        return
    if facts.get("model") not in (None, source.digest):
        raise Refused("these moments were taken on another model", fix="take them again with --save-moments")
    if facts.get("rotations", "") != _rotations(made):
        raise Refused(
            "these moments are of inputs in another basis: the recipe they were taken with rotates otherwise",
            fix="take them again with this recipe and --save-moments",
        )
    missing = [row.name for row in made.rows if row.solved and row.name not in known]
    if missing:
        raise Refused(
            f"the moments file lacks {len(missing)} of the weights to place",
            where=missing[0],
            fix="take them again",
        )
    solver = made.recipe.make_solver()
    cross = isinstance(solver, CalibratedSolver) and solver.cross
    if cross and any(known[row.name].cross is None for row in made.rows if row.solved):
        raise Refused(
            f"these moments do not compare with the original model, and {made.recipe.solver} needs that",
            fix="take them again with this recipe",
        )
    if made.needs == "gram" and any(known[row.name].gram is None for row in made.rows if row.solved):
        raise Refused(
            "these moments hold no Gram matrices, and the recipe needs them", fix="take them again with gptq"
        )
    transforms = zip(made.recipe.transforms, made.recipe.make_transforms(), strict=True)
    seeing = [call.name for call, transform in transforms if transform.needs == "diagonal"]
    if seeing and any(known[row.name].sample is None for row in made.rows if row.solved):
        raise Refused(
            f"these moments hold none of the inputs themselves, and {seeing[0]} goes by them",
            fix="take them again with this recipe and --save-moments",
        )
    for row in made.rows:
        moments = known.get(row.name)
        fixed = row.inputs.fixed if row.inputs is not None and moments is not None else ()
        if (
            moments is not None
            and fixed
            and (moments.range is None or ("zero" in fixed and moments.low is None))
        ):
            raise Refused(
                f"these moments do not hold the range of inputs that {row.inputs} needs",
                where=row.name,
                fix="take them again with this recipe",
            )
