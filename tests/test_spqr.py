"""SpQR: which weights are apart, the two loops against a slow restatement, and folders byte by byte against a
decoder that knows nothing but the sheet."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmill import mill
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers._spqr_read import TENSORS, words_of
from bitmill.containers.bitmill import Bitmill
from bitmill.containers.spqr import Spqr as Container
from bitmill.core.errors import BadFile, BitmillError, Refused
from bitmill.core.registry import parse_grid
from bitmill.core.types import Moments, Problem, Quantized
from bitmill.grids.spqr import Spqr as Grid
from bitmill.numerics.factor import upper_inverse_factor
from bitmill.numerics.outliers import filled, largest, round_apart, rows_of, sensitivity, sparse
from bitmill.recipe import parse
from bitmill.solvers.gptq import Gptq
from bitmill.solvers.nearest import Nearest
from bitmill.solvers.spqr import Spqr
from bitmill.source import open_path
from tests.tiny import EXPERTS, make_model, tokens
from tests.written import Written, write
from tests.written import rows_of as planned_rows

NAME = "model.layers.0.mlp.up_proj"
WEIGHT = f"{NAME}.weight"
NATURAL, ACT = "spqr3-g16-o1", "spqr3-g16-o1-act"


def moments(columns: int, seed: int = 0) -> Moments:
    """Inputs that depend on each other, some far louder than the rest."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=rng) * torch.logspace(0, -1.5, columns)[:, None]
    x = torch.randn(1024, columns, generator=rng) @ mix / columns**0.5
    x = (x + 0.05 * torch.randn(1024, columns, generator=rng)) * (
        torch.rand(columns, generator=rng) ** 3 + 0.1
    )
    x[:, 7] *= 20
    return Moments(1024, x.square().sum(0), x.abs().sum(0), x.abs().amax(0), x.T @ x)


def weight(out: int, columns: int, seed: int = 1) -> Tensor:
    """Student's t with four degrees of freedom, and a few weights far out, as trained layers have them."""
    rng = torch.Generator().manual_seed(seed)
    gamma = torch.randn(4, out, columns, generator=rng).square().sum(0) / 4
    w = 0.02 * torch.randn(out, columns, generator=rng) / gamma.sqrt()
    w[torch.rand(out, columns, generator=rng) < 0.003] *= 6
    return w


def loss(value: Tensor, w: Tensor, known: Moments) -> float:
    assert known.gram is not None
    error = (value - w).double()
    return float(((error @ known.gram.double()) * error).sum())


def solved(solver: Spqr | Gptq | Nearest, grid: str, w: Tensor, known: Moments) -> Quantized:
    return solver.solve([Problem("w", "q", w, known)], [parse_grid(grid)])[0].quantized


# Outliers


def test_leaving_out_is_leaving_out() -> None:
    """Against sixteen fits of fifteen weights each."""
    rng = torch.Generator().manual_seed(3)
    w, u = weight(32, 32), torch.rand(32, generator=rng) + 0.1
    w[0, :16], w[1, 3], w[2, :16] = 0.5, w[1, 4], torch.arange(16) // 8
    found = sensitivity(w, u[None], 16, 3)

    def error(x: Tensor, counts: Tensor) -> float:
        low, high = float(x.min()), float(x.max())
        low, high = (-1.0, 1.0) if low == high else (low, high)
        step = (high - low) / 7
        values = ((x / step - low / step).round().clamp(0, 7) + low / step) * step
        return float((counts * (values - x) ** 2).sum())

    for row in range(32):
        for first in (0, 16):
            x, counts = w[row, first : first + 16], u[first : first + 16]
            for k in range(16):
                rest = torch.arange(16) != k
                wanted = error(x, counts) - error(x[rest], counts[rest])
                assert float(found[row, first + k]) == pytest.approx(wanted, rel=1e-3, abs=1e-7)


def test_the_largest_are_exactly_so_many() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0], [2.0, 2.0, 0.0]])
    assert largest(scores, 2).tolist() == [[False, True, True], [False, False, False]]
    assert largest(scores, 3).tolist() == [[False, True, True], [True, False, False]]
    assert not largest(scores, 0).any()
    assert largest(scores, 6).all()


def test_what_is_apart_is_rounded_to_half_precision() -> None:
    exact = torch.logspace(-9, 5.5, 4096).sin() * torch.logspace(-9, 5.5, 4096)
    half = torch.arange(0, 0x7C00, 7, dtype=torch.int16).view(torch.float16).float()
    x = torch.cat((exact, half, -half, half * (1 + 2.0**-11), torch.tensor([65519.0, -70000.0])))[:, None]
    _, _, added = round_apart(
        x.clone(), torch.ones(1, 1), torch.zeros(len(x), 1), torch.ones_like(x, dtype=torch.bool), 0.0
    )
    assert torch.equal(added, x.clamp(-65504, 65504).half().float())


def test_entries_there_and_back() -> None:
    matrix = torch.zeros(4, 6)
    matrix[0, 5], matrix[2, 1], matrix[2, 0] = 1.5, -2.0, 0.25
    offsets, columns, values = sparse(matrix, 5)
    assert offsets.tolist() == [0, 1, 1, 3, 5]
    assert columns.tolist() == [5, 0, 1, 0, 0]
    assert torch.equal(filled(rows_of(offsets), columns, values, (4, 6)), matrix)
    with pytest.raises(ValueError, match="3 weights are apart"):
        sparse(matrix, 2)
    with pytest.raises(ValueError, match="same place"):
        filled(torch.tensor([1, 1]), torch.tensor([2, 2]), torch.tensor([1.0, 1.0]), (4, 6))


@pytest.mark.parametrize("text", [NATURAL, ACT, "spqr3-g16-o0", "spqr4-g16-o0.5", "spqr2-g16-o10"])
@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (64, 128)])
def test_as_many_are_apart_as_the_grid_says(text: str, shape: tuple[int, int]) -> None:
    grid = parse_grid(text)
    assert isinstance(grid, Grid)
    count = -(-shape[0] * shape[1] * grid.outliers // 1000)
    assert grid.apart(shape) == count
    for solver in (Spqr(), Nearest()):
        quantized = solved(solver, text, weight(*shape), moments(shape[1]))
        assert 0.95 * count <= int((quantized.params["outlier"] != 0).sum()) <= count
    assert parse_grid("spqr3") == parse_grid("spqr3-g16") == parse_grid(NATURAL)
    for text in ("spqr5", "spqr3-g32", "spqr3-o11", "spqr3-o0.55", "spqr1-g16"):
        assert Grid.parse(text) is None


def test_rows_of_a_tile_cannot_be_moved() -> None:
    quantized = parse_grid(NATURAL).round(weight(32, 32))
    for order in (torch.arange(31, -1, -1), torch.arange(32).roll(16)):
        with pytest.raises(ValueError, match="share parameters"):
            quantized.rows(order)
    with pytest.raises(ValueError, match="share parameters"):
        quantized.parts([16, 16])
    assert quantized.parts([32]) == [quantized]


# The solver


def slowly(w: Tensor, known: Moments, grid: Grid, damp: float) -> tuple[Tensor, Tensor]:
    """The two loops, a weight at a time; values and what is apart."""
    assert known.gram is not None
    power = known.gram.diagonal()
    if grid.act:
        order = sorted(range(len(power)), key=lambda j: -float(power[j]))
    else:
        groups = sorted(range(len(power) // 16), key=lambda g: -float(power[16 * g : 16 * g + 16].max()))
        order = [
            j for g in groups for j in sorted(range(16 * g, 16 * g + 16), key=lambda j: -float(power[j]))
        ]
    columns = torch.tensor(order)
    upper = upper_inverse_factor(known.gram, damp, "w", columns).upper.double()
    cost, importance = upper.diagonal() ** -2, known.importance[columns]
    count, x = grid.apart((len(w), len(power))), w[:, columns]

    def loop(marked: Tensor | None, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        ahead, scores, apart = x.double(), torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
        for first in range(0, x.shape[1], 16):
            here = slice(first, first + 16)
            now = ahead[:, here].float()
            if marked is None:
                group = grid.fit_group(now, sensitivity(now, cost[None, here].float(), 16, 3) > threshold)
            else:
                group = grid.fit_group(now, marked[:, here], importance[None, here])
            levels = grid.values_of(group).double()
            for j in range(first, first + 16):
                for row in range(len(x)):
                    wanted = ahead[row, j]
                    value = levels[row, (levels[row] - wanted).abs().argmin()]
                    error = (wanted - value) / upper[j, j]
                    scores[row, j] = error**2
                    if error**2 > threshold if marked is None else marked[row, j]:
                        apart[row, j] = True
                        value = value + (wanted - value).half().double()
                        error = (wanted - value) / upper[j, j]
                    ahead[row, j] = value
                    ahead[row, j + 1 :] -= error * upper[j, j + 1 :]
        return ahead, scores, apart

    first = sensitivity(x, cost[None].float(), 16, 3).reshape(-1).sort(descending=True).values[count - 1]
    _, scores, _ = loop(None, float(first))
    marked = torch.zeros(scores.numel(), dtype=torch.bool)
    marked[scores.reshape(-1).sort(descending=True, stable=True).indices[:count]] = True
    values, _, apart = loop(marked.reshape(scores.shape), torch.inf)
    back = columns.argsort()
    return values[:, back].float(), apart[:, back]


@pytest.mark.parametrize("text", [NATURAL, ACT])
@pytest.mark.parametrize("damp", [1.0, 0.01])
def test_the_solver_does_what_the_slow_one_does(text: str, damp: float) -> None:
    grid, w, known = parse_grid(text), weight(32, 64), moments(64)
    assert isinstance(grid, Grid)
    values, apart = slowly(w, known, grid, damp)
    quantized = solved(Spqr(damp=damp), text, w, known)
    assert torch.equal(quantized.params["outlier"] != 0, apart)
    agree = torch.isclose(quantized.dense(), values, rtol=1e-5, atol=1e-7)
    assert agree.float().mean() > 0.99  # sums in another order may tip a weight to the next value
    assert loss(quantized.dense(), w, known) == pytest.approx(loss(values, w, known), rel=0.01)


@pytest.mark.parametrize("text", [NATURAL, ACT])
def test_it_beats_gptq_at_the_same_bits_where_weights_stand_out(text: str) -> None:
    """At 4.0 bits stored: against groups of the same width, and against four bits a row or by wide groups;
    none of them has fewer bits. Then against no outliers, and against plain rounding."""
    w, known = weight(256, 384), moments(384)
    ours = solved(Spqr(damp=0.01), text, w, known)
    best = loss(ours.dense(), w, known)
    for grid in ("int3-g16-asym", "int3-g16-sym", "int4-channel-asym", "int4-g128-asym"):
        theirs = solved(Gptq(), grid, w, known)
        assert theirs.bits >= 0.97 * ours.bits
        assert best < (0.6 if text == ACT else 0.95) * loss(theirs.dense(), w, known), grid
    assert best < 0.85 * loss(solved(Spqr(damp=0.01), text.replace("o1", "o0"), w, known).dense(), w, known)
    assert best < 0.5 * loss(solved(Nearest(), text, w, known).dense(), w, known)


def test_dead_inputs_and_refusals_of_the_solver() -> None:
    known = moments(64)
    assert known.gram is not None
    known.gram[:, 5] = known.gram[5] = known.square[5] = 0
    solution = Spqr().solve([Problem("w", "q", weight(32, 64), known)], [parse_grid(ACT)])[0]
    assert [note.kind for note in solution.notes] == ["dead-channels"]
    assert solution.quantized.dense().isfinite().all()
    with pytest.raises(Refused, match="Gram matrix"):
        Spqr().solve([Problem("w", "q", weight(32, 64))], [parse_grid(ACT)])
    with pytest.raises(ValueError, match="damp"):
        Spqr(damp=0)


# Folders


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsFolder:
    folder = tmp_path_factory.mktemp("model")
    return SafetensorsFolder(make_model(folder, "llama", tied=True, dtype="bfloat16"))


def written(source: SafetensorsFolder, grid: str, out: Path, **other: str) -> Written:
    chosen = {role: parse_grid(text) for role, text in other.items()}
    rows = planned_rows(Container(), source, "bf16", parse_grid(grid), chosen)
    return write(Container(), source, rows, out)


def tensors_of(out: Written) -> dict[str, Tensor]:
    return load_file(out.path / "model.safetensors")


def save(out: Written, tensors: dict[str, Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, out.path / "model.safetensors")


def half(x: float) -> float:
    return struct.unpack("<e", struct.pack("<e", x))[0]


def read_by_hand(tensors: dict[str, Tensor], module: str) -> list[list[float]]:
    """A decoder after the sheet: one integer at a time, half precision after every operation."""
    words, offsets, entries, pairs = (tensors[f"{module}.{part}"].tolist() for part in TENSORS)
    order = [place for pair in pairs for place in (pair & 0xFFFF, (pair >> 16) & 0xFFFF)]
    out, columns = len(offsets) - 1, len(order)
    values = [[0.0] * columns for _ in range(out)]
    for i in range(out // 16):
        for j in range(columns // 16):
            tile = words[(i * (columns // 16) + j) * 16 :][:16]
            second = sum((tile[k] >> 54) << 8 * (k // 2) for k in range(0, 16, 2))
            step_s, step_z, zero_s, zero_z = struct.unpack("<4e", second.to_bytes(8, "little"))
            for k, word in enumerate(tile):
                scale = half(step_s * half((word & 7) - zero_s))
                zero = half(step_z * half((word >> 3 & 7) - zero_z))
                for c in range(16):
                    code = word >> 6 + 3 * c & 7
                    values[16 * i + k][order[16 * j + c]] = half(scale * half(code - zero))
    for row in range(out):
        for entry in entries[offsets[row] : offsets[row + 1]]:
            (value,) = struct.unpack("<e", (entry >> 16 & 0xFFFF).to_bytes(2, "little"))
            values[row][order[entry & 0xFFFF]] += value
    return values


@pytest.mark.parametrize("grid", [NATURAL, ACT, "spqr3-g16-o0", "spqr3-g16-o10"])
def test_folders_decode_by_hand(source: SafetensorsFolder, tmp_path: Path, grid: str) -> None:
    out = written(source, grid, tmp_path)
    again, tensors = open_path(out.path), tensors_of(out)
    wanted = torch.tensor(read_by_hand(tensors, NAME))
    assert torch.equal(wanted, out.quantized[WEIGHT].dense())
    assert torch.equal(again.read(WEIGHT), wanted)
    rows, columns = out.quantized[WEIGHT].shape
    assert tensors[f"{NAME}.dense_weights"].shape == (rows * columns // 16,)
    assert bool((tensors[f"{NAME}.dense_weights"] >> 62 == 0).all())
    settings = json.loads((out.path / "config.json").read_text())["quantization_config"]
    assert settings["shapes"][f"{NAME}.in_perm.shape"] == columns // 2
    assert settings["modules_to_not_convert"] == ["lm_head", "lm_head.weight"]
    assert json.loads((out.path / "config.json").read_text())["dtype"] == "float16"


def test_a_word_is_what_the_sheet_says() -> None:
    grid = parse_grid("spqr3-g16-o0")
    params = {
        "scale": torch.full((16, 1), 5, dtype=torch.uint8),
        "zero": torch.full((16, 1), 6, dtype=torch.uint8),
        "scale_step": torch.tensor([[1.0]]),  # 0x3C00
        "zero_step": torch.tensor([[0.5]]),  # 0x3800
        "scale_zero": torch.tensor([[-2.0]]),  # 0xC000
        "zero_zero": torch.tensor([[1.5]]),  # 0x3E00
        "outlier": torch.zeros(16, 16),
    }
    codes = torch.arange(16, dtype=torch.uint8).remainder(8).expand(16, 16).contiguous()
    words = words_of(codes, params).tolist()
    low = 5 | 6 << 3 | sum((k % 8) << 6 + 3 * k for k in range(16))
    assert [w & (1 << 54) - 1 for w in words] == [low] * 16
    assert [w >> 54 for w in words[::2]] == [0x00, 0x3C, 0x00, 0x38, 0x00, 0xC0, 0x00, 0x3E]
    assert [w >> 54 for w in words[1::2]] == [w >> 54 for w in words[::2]]
    assert grid.decode(codes, params)[0, 7] == 7.0 * (7 - 2.25)


def test_what_the_layout_cannot_hold_is_refused(source: SafetensorsFolder) -> None:
    container, grid = Container(), parse_grid(ACT)
    for wanted, role, shape, words in (
        (grid, "down", (4096, 11008), None),
        (grid, "down", (4096, 23504), None),
        (grid, "down", (8192, 28672), "48 KiB"),
        (grid, "down", (4096, 32784), "at most 32768 columns, not 32784"),
        (grid, "q", (100, 64), "not whole tiles: multiples of 16"),
        (grid, "q", (64, 100), "not whole tiles: multiples of 16"),
        (grid, "head", (512, 64), "not the head"),
        (grid, "embed", (512, 64), "not the embed"),
        (parse_grid("spqr4-g16-o1"), "q", (64, 64), "3 bits a code, not 4"),
        (parse_grid("int3-g16-asym"), "q", (64, 64), "say spqr3-g16-o1-act"),
    ):
        reason = container.refuses(wanted, role, shape)
        assert (reason is None) if words is None else (reason is not None and words in reason)
    assert "16 bits" in str(grid.refuses((16, 65552)))
    assert container.default_grid("bf16", "norm") == "f16"


@pytest.mark.parametrize(("family", "words"), [("qwen2", "no bias"), ("mixtral", "experts")])
def test_biases_and_experts_are_refused(tmp_path: Path, family: str, words: str) -> None:
    model = SafetensorsFolder(make_model(tmp_path / "model", family))
    with pytest.raises(Refused, match=words) as refusal:
        Container().files(planned_rows(Container(), model, "f32", parse_grid(ACT)), model, {})
    assert "> bitmill" in str(refusal.value.fix)
    assert family in ("qwen2", *EXPERTS)


def test_outliers_by_rows_of_tiles_are_read(source: SafetensorsFolder, tmp_path: Path) -> None:
    """The authors' other order of entries: those of sixteen rows take turns, shorter rows end in zeros."""
    out = written(source, ACT, tmp_path)
    tensors, before = tensors_of(out), open_path(out.path).stored(WEIGHT)
    offsets, entries = tensors[f"{NAME}.row_offsets"], tensors[f"{NAME}.col_vals"]
    turns, starts = [], [0]
    for first in range(0, len(offsets) - 1, 16):
        rows = [entries[offsets[r] : offsets[r + 1]].tolist() for r in range(first, first + 16)]
        longest = max(map(len, rows))
        turns += [row[k] if k < len(row) else 0 for k in range(longest) for row in rows]
        starts.append(len(turns))
    tensors[f"{NAME}.row_offsets"] = torch.tensor(starts, dtype=torch.int32)
    tensors[f"{NAME}.col_vals"] = torch.tensor(turns, dtype=torch.int32)
    save(out, tensors)
    config = json.loads((out.path / "config.json").read_text())
    del config["quantization_config"]["shapes"]
    (out.path / "config.json").write_text(json.dumps(config))
    after = open_path(out.path).stored(WEIGHT)
    assert before is not None and after is not None and before.same_values(after)
    assert isinstance(after.grid, Grid) and after.grid.outliers > 10  # the zeros are stored, too


def test_without_an_order_columns_are_in_their_own(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, NATURAL, tmp_path)
    tensors = tensors_of(out)
    tensors[f"{NAME}.in_perm"] = torch.zeros(0, dtype=torch.int32)
    save(out, tensors)
    with pytest.raises(BadFile, match="shapes in config.json says"):
        open_path(out.path)
    config = json.loads((out.path / "config.json").read_text())
    config["quantization_config"]["shapes"][f"{NAME}.in_perm.shape"] = 0
    (out.path / "config.json").write_text(json.dumps(config))
    assert torch.equal(open_path(out.path).read(WEIGHT), out.quantized[WEIGHT].dense())


@pytest.mark.parametrize(
    ("part", "at", "value", "words"),
    [
        ("dense_weights", 0, 1 << 54, "do not agree"),
        ("dense_weights", 3, 1 << 62, "do not agree"),
        ("row_offsets", 0, 1, "do not rise"),
        ("row_offsets", 5, 1 << 30, "do not rise"),
        ("row_offsets", -1, 7, "offsets end at 7"),
        ("col_vals", 0, 200, "none of the 128 columns"),
        ("col_vals", 0, 0x7C000000, "not finite"),
        ("in_perm", 0, 0, "no order"),
        ("in_perm", 1, -1, "no order"),
    ],
)
def test_numbers_that_lie(
    source: SafetensorsFolder, tmp_path: Path, part: str, at: int, value: int, words: str
) -> None:
    out = written(source, ACT, tmp_path)
    tensors = tensors_of(out)
    tensors[f"{NAME}.{part}"][at] = value
    save(out, tensors)
    model = open_path(out.path)
    for read in (model.read, model.stored):
        with pytest.raises(BadFile, match=words):
            read(WEIGHT)


def test_second_order_numbers_must_be_finite(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, ACT, tmp_path)
    tensors = tensors_of(out)
    words = tensors[f"{NAME}.dense_weights"]
    words[0:4] = words[0:4] & (1 << 54) - 1 | torch.tensor([0, 0, 0x7C, 0x7C]) << 54
    save(out, tensors)
    with pytest.raises(BadFile, match="not finite"):
        open_path(out.path).read(WEIGHT)


@pytest.mark.parametrize("part", ["dense_weights", "row_offsets", "col_vals", "in_perm"])
@pytest.mark.parametrize("change", ["missing", "short", "matrix", "type"])
def test_parts_that_do_not_fit(source: SafetensorsFolder, tmp_path: Path, part: str, change: str) -> None:
    out = written(source, ACT, tmp_path)
    tensors = tensors_of(out)
    value = tensors.pop(f"{NAME}.{part}")
    if change != "missing":
        changed = {"short": value[:-2], "matrix": value[None], "type": value.to(torch.int16)}[change]
        tensors[f"{NAME}.{part}"] = changed
    save(out, tensors)
    config = json.loads((out.path / "config.json").read_text())
    del config["quantization_config"]["shapes"]
    (out.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitmillError):
        open_path(out.path).read(WEIGHT)


@pytest.mark.parametrize(("key", "value"), [("bits", 4), ("beta1", 32), ("beta2", None), ("shapes", [])])
def test_other_tiles_are_refused(source: SafetensorsFolder, tmp_path: Path, key: str, value: object) -> None:
    out = written(source, ACT, tmp_path)
    config = json.loads((out.path / "config.json").read_text())
    config["quantization_config"][key] = value
    (out.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitmillError, match=key):
        open_path(out.path)


def test_our_own_folder_checks_its_outliers_too(source: SafetensorsFolder, tmp_path: Path) -> None:
    rows = planned_rows(Bitmill(), source, "bf16", parse_grid(ACT))
    out = write(Bitmill(), source, rows, tmp_path)
    tensors = tensors_of(out)
    with safe_open(out.path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    for part, value, words in (
        ("scale", 8, "three bits"),
        ("outlier_offsets", 1 << 30, "do not rise|end at"),
        ("outlier_columns", 999, "none of the"),
        ("order", 0, "its order"),
    ):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed[f"{WEIGHT}.{part}"].view(-1)[1] = value
        save_file(changed, out.path / "model.safetensors", metadata)
        with pytest.raises(BadFile, match=words):
            open_path(out.path).read(WEIGHT)


def test_the_name_people_use() -> None:
    assert str(parse("SpQR")) == f"spqr : {ACT} > spqr"
    assert parse("spqr(damp=0.01) : spqr4 > bitmill").grid == "spqr4-g16-o1"


def test_the_whole_way(source: SafetensorsFolder, tmp_path: Path) -> None:
    mill.quantize(str(source.path), "SpQR", tmp_path / "out", calib=tokens(4, 32), nsamples=4, seqlen=32)
    mill.quantize(str(tmp_path / "out"), "nearest : bf16 > safetensors", tmp_path / "dense")
    again = open_path(tmp_path / "out")
    placed = [name for name in again.tensors if again.stored(name) is not None]
    assert len(placed) == 21
    assert {str(stored.grid) for name in placed if (stored := again.stored(name))} == {ACT}
