"""What llama.cpp itself allocates, to the byte: its memory breakdown, read through ctypes.

The log prints MiB with two decimals; the function behind it returns a ``std::map`` of bytes, whose nodes are
walked here. A model may be made of keys alone, and be as large as one likes: nothing is allocated.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as api

from bitmill.checkpoint.gguf_write import encoded, head

_LIBRARIES = Path(llama_cpp.__file__).parent / "lib"
_LLAMA = ctypes.CDLL(str(_LIBRARIES / "libllama.so"))
_GGML = ctypes.CDLL(str(_LIBRARIES / "libggml-base.so"))
_BREAKDOWN = _LLAMA["_Z26llama_get_memory_breakdownPK13llama_context"]
_BREAKDOWN.argtypes, _BREAKDOWN.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}


class _Gguf(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


class _Map(ctypes.Structure):
    """libstdc++'s map: an empty comparison, then a node without a value that points to the root."""

    _fields_ = [
        ("compare", ctypes.c_void_p),
        ("color", ctypes.c_long),
        ("root", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    ]


class _Node(ctypes.Structure):
    _fields_ = [
        ("color", ctypes.c_long),
        ("parent", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("buffer_type", ctypes.c_void_p),
        ("model", ctypes.c_size_t),
        ("context", ctypes.c_size_t),
        ("compute", ctypes.c_size_t),
    ]


@dataclass(frozen=True)
class Allocated:
    """Bytes of llama.cpp's buffers: weights, caches and states, everything of one step."""

    model: int
    context: int
    compute: int


_GGML.gguf_init_from_file.argtypes, _GGML.gguf_init_from_file.restype = (
    [ctypes.c_char_p, _Gguf],
    ctypes.c_void_p,
)
_GGML.gguf_free.argtypes, _GGML.gguf_free.restype = [ctypes.c_void_p], None
_SET = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_NOTHING = _SET(lambda tensor, data: None)
_FROM_USER = _LLAMA.llama_model_init_from_user
_FROM_USER.argtypes = [ctypes.c_void_p, _SET, ctypes.c_void_p, api.llama_model_params]
_FROM_USER.restype = ctypes.c_void_p
_SAVE = _LLAMA.llama_model_save_to_file
_SAVE.argtypes, _SAVE.restype = [ctypes.c_void_p, ctypes.c_char_p], None


@api.llama_log_callback
def _quiet(level: int, text: bytes, data: Any) -> None:
    _LOG.append(text.decode(errors="replace"))


_LOG: deque[str] = deque(maxlen=8)
api.llama_log_set(_quiet, ctypes.c_void_p(0))
api.llama_backend_init()


def of_file(path: Path, *, mapped: bool = False, real: bool = False, **wanted: Any) -> Allocated:
    """What a file takes; ``real`` loads it, ``mapped`` as a map of the file."""
    parameters = _parameters(no_alloc=not (real or mapped))
    parameters.load_mode = 1 if mapped else 0
    return _allocated(api.llama_model_load_from_file(str(path).encode(), parameters), **wanted)


def of_keys(metadata: Mapping[str, Any], folder: Path, **wanted: Any) -> Allocated:
    """What a model of these keys takes, every tensor in single precision; nothing is allocated."""
    return _allocated(_from_keys(metadata, folder, no_alloc=True), **wanted)


def save(keys: Mapping[str, Any], folder: Path) -> Path:
    """A file of a model of these keys, with every tensor that its architecture has."""
    model = _from_keys(keys, folder, no_alloc=False)
    _SAVE(model, str(folder / "made.gguf").encode())
    api.llama_model_free(model)
    return folder / "made.gguf"


def _from_keys(keys: Mapping[str, Any], folder: Path, no_alloc: bool) -> Any:
    header, _, _ = head({name: encoded(value) for name, value in keys.items()}, [])
    (folder / "keys.gguf").write_bytes(header)
    context = _GGML.gguf_init_from_file(str(folder / "keys.gguf").encode(), _Gguf(True, None))
    model = _FROM_USER(context, _NOTHING, None, _parameters(no_alloc))
    _GGML.gguf_free(context)
    return model


def _parameters(no_alloc: bool) -> Any:
    parameters = api.llama_model_default_params()
    parameters.use_extra_bufts, parameters.no_alloc = False, no_alloc
    return parameters


def _allocated(
    model: Any,
    *,
    context: int = 512,
    parallel: int = 1,
    keys: str = "f16",
    values: str = "f16",
    full_windows: bool = False,
    flash: int = 1,
    ubatch: int = 512,
) -> Allocated:
    assert model, "".join(_LOG)
    parameters = api.llama_context_default_params()
    parameters.n_ctx, parameters.n_seq_max = context * parallel, parallel
    parameters.type_k, parameters.type_v = TYPES[keys], TYPES[values]
    parameters.swa_full, parameters.flash_attn_type, parameters.n_ubatch = full_windows, flash, ubatch
    made = api.llama_init_from_model(model, parameters)
    assert made, "".join(_LOG)
    found_map, nodes = _Map(), []
    _BREAKDOWN(ctypes.byref(found_map), ctypes.cast(made, ctypes.c_void_p))
    waiting = [found_map.root]
    while waiting:
        address = waiting.pop()
        if address:
            nodes.append(_Node.from_address(address))
            waiting += [nodes[-1].left, nodes[-1].right]
    assert len(nodes) == found_map.count
    found = Allocated(*(sum(getattr(n, part) for n in nodes) for part in ("model", "context", "compute")))
    api.llama_free(made)
    api.llama_model_free(model)
    return found
