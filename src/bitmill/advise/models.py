"""A model to be asked about: a file or folder as it is, or what a plan would make of it."""

from __future__ import annotations

from pathlib import Path

from bitmill.advise.memory import Model
from bitmill.advise.runtimes import RUNTIMES, Runtime, runtime_named, runtime_of
from bitmill.advise.shape_config import config_shape
from bitmill.advise.shape_gguf import gguf_shape
from bitmill.advise.weights import folder_weights, gguf_weights, image_weights
from bitmill.checkpoint.gguf import GgufFile, first_parts, planned_file
from bitmill.checkpoint.hf_folder import read_config
from bitmill.containers.gguf import Gguf
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.planning import Plan
from bitmill.trust.contracts import method_of, target


def as_it_is(path: Path, runtime: str | None = None, card: bool = False) -> Model:
    """The model in ``path``; only headers are read, of any architecture.

    Args:
        path: a GGUF file (or one of its parts), or a folder with ``config.json`` and safetensors.
        runtime: the program that runs it; by default the usual one for such files.
        card: whether there is a card to run it on.

    Raises:
        Refused: the file is neither, or what the architecture keeps is not known.
        BadFile: the file is not what it claims to be.
    """
    if path.suffix == ".gguf" or (path.is_dir() and first_parts(path)):
        file = GgufFile(path)
        program = _runtime(runtime, "gguf", card)
        embedding = file.tensors.get("token_embd.weight")
        rows = None if embedding is None else embedding.shape[0]
        shape = gguf_shape(file.metadata, str(file.path), rows)
        return Model(shape, gguf_weights(file.tensors.values(), file.metadata), program)
    if not path.is_dir():
        raise Refused(f"{path.name} is neither a GGUF file nor a model folder", where=str(path))
    config = read_config(path)
    packed = config.get("quantization_config") or config.get("quantization")
    method = packed.get("quant_method", "mlx") if isinstance(packed, dict) else "safetensors"
    program = _runtime(runtime, str(method), card)
    weights = folder_weights(path, bool(config.get("tie_word_embeddings", False)))
    return Model(config_shape(config, program.latent), weights, program)


def planned(plan: Plan, source: Checkpoint, runtime: str | None = None, card: bool = False) -> Model:
    """The model that a plan would write; a GGUF file is judged by the very head it will have.

    Raises:
        Refused: what the architecture keeps between tokens is not known.
    """
    program = _runtime(runtime, plan.recipe.container.replace("_", "-"), card)
    if isinstance(plan.container, Gguf):
        files = [planned_file(image.head, image.bytes_) for image in plan.files]
        keys, tensors = files[0][0], [t for _, found in files for t in found.values()]
        return Model(gguf_shape(keys, "the planned file"), gguf_weights(tensors, keys), program)
    return Model(config_shape(source.config, program.latent), image_weights(plan.files), program)


def _runtime(name: str | None, container: str, card: bool) -> Runtime:
    if name is None:
        return runtime_of(container, card)
    runtime, to = runtime_named(name), target(name)
    usual = f"--runtime {runtime_of(container, card).name}"
    if to.contract.method(method_of(container), to.version) is None:
        raise Refused(f"{name} does not run {container} files", fix=usual)
    if container == "gguf" and name != "llama.cpp":
        raise Refused(f"what {name} makes of {container} files in memory is not modelled", fix=usual)
    return runtime


def modelled(runtime: str | None) -> str | None:
    """The program that memory is modelled for, of ``NAME[@VERSION]``; None for one whose memory is not.

    Raises:
        Refused: there is no such program at all.
    """
    name = None if runtime is None else target(runtime).contract.name
    return name if name in RUNTIMES else None
