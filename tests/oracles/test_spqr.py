"""spqr_quant as the judge of SpQR folders. Its kernels need a GPU; its converter and its decoder are code for
the processor in the same source file, which is compiled here as it is, around a stand-in for the kernels."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.cpp_extension import load
from transformers import AutoModelForCausalLM
from transformers.quantizers.quantizer_spqr import SpQRHfQuantizer

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers._spqr_read import TENSORS
from bitmill.containers.spqr import Spqr
from bitmill.core.registry import parse_grid
from bitmill.source import open_path
from tests.tiny import make_model, tokens
from tests.written import Written, rows_of, write

pytestmark = pytest.mark.client

GRIDS = ["spqr3-g16-o1", "spqr3-g16-o1-act", "spqr3-g16-o0", "spqr3-g16-o5-act"]
NAME = "model.layers.0.mlp.up_proj"
NO_STREAM = """
#pragma once
#include <cuda_runtime_api.h>
#include <torch/extension.h>
namespace at::cuda { inline cudaStream_t getCurrentCUDAStream(int) { return nullptr; } }
"""
NO_KERNEL = """
#include <cuda_runtime_api.h>
#include <cstdint>
int spqr_matvec(int, int, int, int, int, const void *, const void *, int, void *, void *, int, void *, void *,
                cudaStream_t, void *, uint32_t) { return -1; }
"""


def places(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The functions of ``spqr_cuda.cpp``."""
    folder = tmp_path_factory.mktemp("spqr_host")
    (folder / "ATen" / "cuda").mkdir(parents=True)
    (folder / "ATen" / "cuda" / "CUDAContext.h").write_text(NO_STREAM)
    (folder / "none.cpp").write_text(NO_KERNEL)
    cuda = places("nvidia") / "cu13"
    return load(
        name="spqr_host",
        sources=[
            str(places("spqr_quant") / "inference_kernels" / "spqr_cuda.cpp"),
            str(folder / "none.cpp"),
        ],
        extra_include_paths=[str(folder), str(cuda / "include"), str(cuda / "include" / "cccl")],
        extra_cflags=["-O1"],
        extra_ldflags=[f"-L{cuda / 'lib'}", "-l:libcudart.so.13", f"-Wl,-rpath,{cuda / 'lib'}"],
        build_directory=str(folder),
        with_cuda=False,
    )


@pytest.fixture(scope="session")
def entries() -> ModuleType:
    """``sparse_util.py``; the package itself compiles kernels when it is imported."""
    spec = spec_from_file_location("sparse_util", places("spqr_quant") / "sparse_util.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(folder: Path, grid: str) -> tuple[Path, Written]:
    model = make_model(folder / "model", "llama", tied=True, dtype="float16")
    source = SafetensorsFolder(model)
    rows = rows_of(Spqr(), source, "f16", parse_grid(grid), {"o": parse_grid("f16")})
    return model, write(Spqr(), source, rows, folder)


def decoded(host: Any, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Its decoder, columns as the file has them."""
    values = torch.zeros(shape, dtype=torch.float16)
    words, offsets, kept = (parts[part] for part in ("dense_weights", "row_offsets", "col_vals"))
    host.dequantize_compressed(*shape, 3, 16, 16, words, offsets, kept, len(kept), values)
    return values


def order_of(parts: dict[str, Tensor]) -> Tensor:
    return parts["in_perm"].view(torch.int16).to(torch.int64) & 0xFFFF


def parts_of(out: Written, module: str = NAME) -> dict[str, Tensor]:
    tensors = load_file(out.path / "model.safetensors")
    return {part: tensors[f"{module}.{part}"] for part in TENSORS}


@pytest.mark.parametrize("grid", GRIDS)
def test_its_converter_writes_the_same_numbers(
    host: Any, entries: ModuleType, tmp_path: Path, grid: str
) -> None:
    _, out = written(tmp_path, grid)
    for module in (NAME, NAME.replace("up", "down")):
        quantized, ours = out.quantized[f"{module}.weight"], parts_of(out, module)
        rows, columns = quantized.shape
        order, params = order_of(ours), quantized.params

        def numbers(name: str, dtype: torch.dtype, params: Any = params) -> Tensor:
            return params[name].T.to(dtype).flatten()

        sparse = params["outlier"][:, order].to_sparse_csr()
        assert sparse.values().numel() >= 0.95 * len(ours["col_vals"])
        kept = ours["col_vals"][: sparse.values().numel()]
        assert torch.equal(
            entries.merge_col_val(sparse.col_indices().short(), sparse.values().half()).to(torch.int32), kept
        )
        theirs = torch.zeros_like(ours["dense_weights"])
        host.tensor_compress_interleaved(
            *(rows, columns, 3, quantized.codes[:, order].to(torch.int8).flatten(), 16, 16),
            *(numbers("scale", torch.int8), numbers("zero", torch.int8)),
            *(
                numbers(name, torch.float16)
                for name in ("scale_step", "scale_zero", "zero_step", "zero_zero")
            ),
            *(ours["row_offsets"], ours["row_offsets"], ours["col_vals"], ours["col_vals"], 0, theirs),
        )
        assert torch.equal(theirs, ours["dense_weights"])


@pytest.mark.parametrize("grid", GRIDS)
def test_its_decoder_reads_the_same_values(host: Any, tmp_path: Path, grid: str) -> None:
    _, out = written(tmp_path, grid)
    for name, quantized in out.quantized.items():
        if quantized.grid == parse_grid(grid):
            parts = parts_of(out, name.removesuffix(".weight"))
            values = torch.empty(quantized.shape, dtype=torch.float16)
            values[:, order_of(parts)] = decoded(host, parts, quantized.shape)
            assert torch.equal(values, quantized.dense().half())


@pytest.mark.parametrize("grid", GRIDS[:2])
def test_its_other_order_of_outliers_is_read(
    host: Any, entries: ModuleType, tmp_path: Path, grid: str
) -> None:
    """By rows of tiles (PTCSR), as its converter writes them."""
    _, out = written(tmp_path, grid)
    tensors, ours = load_file(out.path / "model.safetensors"), parts_of(out)
    before = open_path(out.path).read(f"{NAME}.weight")
    quantized, order = out.quantized[f"{NAME}.weight"], order_of(ours)
    offsets, kept = entries.init_ptcsr(ours["row_offsets"])
    params = {key: value.T.contiguous().flatten() for key, value in quantized.params.items()}
    host.tensor_compress_interleaved(
        *(*quantized.shape, 3, quantized.codes[:, order].to(torch.int8).flatten(), 16, 16),
        *(params[name].to(torch.int8) for name in ("scale", "zero")),
        *(params[name].half() for name in ("scale_step", "scale_zero", "zero_step", "zero_zero")),
        *(ours["row_offsets"], offsets, ours["col_vals"], kept, 1, torch.zeros_like(ours["dense_weights"])),
    )
    tensors[f"{NAME}.row_offsets"], tensors[f"{NAME}.col_vals"] = offsets, kept
    config = (out.path / "config.json").read_text()
    for part in ("row_offsets", "col_vals"):
        said = f'"{NAME}.{part}.shape": '
        config = config.replace(f"{said}{len(ours[part])}", f"{said}{len(tensors[f'{NAME}.{part}'])}")
    (out.path / "config.json").write_text(config)
    save_file(tensors, out.path / "model.safetensors")
    after = open_path(out.path)
    assert torch.equal(after.read(f"{NAME}.weight"), before)
    stored = after.stored(f"{NAME}.weight")
    assert stored is not None and torch.equal(stored.dense(), before)


class _Reaching(dict[str, nn.Module]):
    """The children of a model, and whatever has a path in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model._modules)
        self.model = [model]

    def __missing__(self, name: str) -> nn.Module:
        return self.model[0].get_submodule(name)


@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_transformers_fills_its_layers(
    host: Any, tmp_path: Path, grid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with a layer that multiplies what the decoder says, and past the line at which
    transformers 5.23.0 gives up."""

    class QuantizedLinear(nn.Module):
        @staticmethod
        def create_placeholder(rows: int, cols: int, **sizes: int) -> QuantizedLinear:
            layer = QuantizedLinear()
            layer.shape = (rows, cols)
            for part in TENSORS:
                dtype = torch.int64 if part == "dense_weights" else torch.int32
                empty = torch.empty(sizes[f"{part}_shape"], dtype=dtype)
                layer.register_parameter(part, nn.Parameter(empty, requires_grad=False))
            return layer

        def forward(self, x: Tensor) -> Tensor:
            parts = dict(self.named_parameters())
            values = torch.empty(self.shape, dtype=torch.float16)
            values[:, order_of(parts)] = decoded(host, parts, self.shape)
            return nn.functional.linear(x, values)

    package = ModuleType("spqr_quant")
    package.QuantizedLinear = QuantizedLinear  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spqr_quant", package)
    monkeypatch.setattr("transformers.integrations.spqr.is_spqr_available", lambda: True)
    monkeypatch.setattr(SpQRHfQuantizer, "validate_environment", lambda *_, **__: None)
    with pytest.raises(KeyError, match=r"layers\.0"):  # what it looks for by a path are the children's names
        AutoModelForCausalLM.from_pretrained(written(tmp_path / "as_it_is", grid)[1].path, dtype="auto")
    replace = SpQRHfQuantizer._process_model_before_weight_loading

    def reaching(self: SpQRHfQuantizer, model: Any, **options: Any) -> None:
        model._modules = _Reaching(model)
        replace(self, model, **options)

    monkeypatch.setattr(SpQRHfQuantizer, "_process_model_before_weight_loading", reaching)
    model, out = written(tmp_path, grid)
    found, info = AutoModelForCausalLM.from_pretrained(out.path, output_loading_info=True, dtype="auto")
    assert {key: value for key, value in info.items() if value} == {}
    layers = {name for name, layer in found.named_modules() if isinstance(layer, QuantizedLinear)}
    placed = [row.name for row in out.rows if row.grid == parse_grid(grid)]
    assert layers == {name.removesuffix(".weight") for name in placed}
    values = {name: quantized.dense().half() for name, quantized in out.quantized.items()}
    save_file(values, model / "model.safetensors", {"format": "pt"})
    dense = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert torch.equal(found(tokens(1, 24)).logits, dense(tokens(1, 24)).logits)
