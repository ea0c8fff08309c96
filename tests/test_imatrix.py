"""Importance matrices: other readers and writers, hostile bytes, hooks, and what recipes do with one."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitmill import mill
from bitmill.calibrate.importance import moments_from, take_imatrix
from bitmill.calibrate.tokens import Calibration
from bitmill.checkpoint.imatrix import Entry, Imatrix, is_imatrix, read_imatrices, read_imatrix, write_imatrix
from bitmill.core.errors import BadFile, Refused
from bitmill.grids.kquant import KQuant
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.source import open_source
from tests.tiny import make_model, tokens

Q = "model.layers.1.self_attn.q_proj.weight"


def sample(seed: int = 0) -> Imatrix:
    """An ordinary weight, one that no token reached, and three experts, one of them idle."""
    generator = torch.Generator().manual_seed(seed)
    sums = torch.rand(3, 8, generator=generator)
    sums[1] = 0
    entries = {
        "blk.0.attn_q.weight": Entry(torch.rand(1, 32, generator=generator) * 1e4, torch.tensor([2048])),
        "blk.0.ffn_down_exps.weight": Entry(sums, torch.tensor([1000, 0, 48])),
        "blk.1.attn_q.weight": Entry(torch.zeros(1, 32), torch.tensor([0])),
    }
    return Imatrix(entries, ("wiki.txt", "chat.txt"), 4, 512)


def same(one: Imatrix, other: Imatrix) -> bool:
    facts = [(m.datasets, m.chunk_count, m.chunk_size, list(m.entries)) for m in (one, other)]
    return facts[0] == facts[1] and one.digest == other.digest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), intermediate_size=384)


@pytest.fixture(scope="module")
def taken(model: Path) -> Imatrix:
    calibration = Calibration(tokens(4, 32), {"source": "token ids"})
    return take_imatrix(open_source(str(model)), calibration).imatrix


def test_gguf_python_reads_ours(tmp_path: Path) -> None:
    ours, path = sample(), tmp_path / "m.gguf"
    write_imatrix(path, ours, "gguf")
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["wiki.txt", "chat.txt"]
    assert [reader.get_field(f"imatrix.chunk_{k}").contents() for k in ("count", "size")] == [4, 512]
    assert [t.name for t in reader.tensors] == [n + e for n in ours.entries for e in (".in_sum2", ".counts")]
    by_name = {t.name: t for t in reader.tensors}
    for name, entry in ours.entries.items():
        sums, counts = by_name[f"{name}.in_sum2"], by_name[f"{name}.counts"]
        assert list(sums.shape) == [entry.in_sum2.shape[1], entry.in_sum2.shape[0]]
        assert list(counts.shape) == [1, len(entry.counts)]
        assert np.array_equal(sums.data, entry.in_sum2) and np.array_equal(counts.data[:, 0], entry.counts)
    assert same(read_imatrix(path), ours) and is_imatrix(path)


def theirs(path: Path, **changed: Any) -> Path:
    """A file by gguf's own writer; ``changed`` replaces tensors and keys, None leaves them out."""
    writer = gguf.GGUFWriter(path, "none")
    writer.kv_data[0].clear()
    keys = {"type": "imatrix", "datasets": ["a"], "chunk_count": 3, "chunk_size": 256, **changed}
    if keys["type"] is not None:
        writer.add_string("general.type", keys["type"])
    if keys["datasets"] is not None:
        writer.add_array("imatrix.datasets", keys["datasets"])
    for key in ("chunk_count", "chunk_size"):
        if keys[key] is not None:
            writer.add_uint32(f"imatrix.{key}", keys[key])
    arrays = {
        "in_sum2": np.arange(8, dtype=np.float32).reshape(2, 4),
        "counts": np.array([[768], [0]], dtype=np.float32),
    }
    for part, array in {**arrays, **{k: v for k, v in changed.items() if k in arrays}}.items():
        if array is not None:
            writer.add_tensor(f"blk.0.x.weight.{part}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_by_gguf_python(tmp_path: Path) -> None:
    found = read_imatrix(theirs(tmp_path / "t.gguf"))
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("a",), 3, 256)
    entry = found.entries["blk.0.x.weight"]
    assert torch.equal(entry.in_sum2, torch.arange(8.0).reshape(2, 4)) and entry.counts.tolist() == [768, 0]
    assert torch.equal(entry.mean_square[0], torch.arange(4.0) / 768) and (entry.mean_square[1] == 1).all()
    flat = theirs(tmp_path / "f.gguf", in_sum2=np.ones(5, np.float32), counts=np.ones(1, np.float32))
    assert read_imatrix(flat).entries["blk.0.x.weight"].in_sum2.shape == (1, 5)  # ggml drops trailing ones


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"type": "model"}, "general.type is 'model'"),
        ({"type": None}, "general.type is None"),
        ({"datasets": None}, "datasets"),
        ({"datasets": [1, 2]}, "datasets"),
        ({"chunk_count": None}, "chunk_count is None"),
        ({"chunk_size": None}, "chunk_size is None"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"in_sum2": np.full((2, 4), np.nan, np.float32)}, "8 of 8 sums"),
        ({"in_sum2": np.full((2, 4), np.inf, np.float32)}, "not finite"),
        ({"in_sum2": np.full((2, 4), -1, np.float32)}, "negative"),
        ({"counts": np.array([[-1], [1]], np.float32)}, "1 of 2 counts"),
        ({"counts": np.array([[1e30], [1]], np.float32)}, "1e\\+30 tokens"),
        ({"counts": np.ones((3, 1), np.float32)}, "8 sums in rows of 4 and 3 counts"),
        ({"in_sum2": np.ones((2, 4), np.float16)}, "stored as F16"),
        ({"in_sum2": None}, "no tensor called 'blk.0.x.weight.in_sum2'"),
        ({"counts": None}, "no tensor called 'blk.0.x.weight.counts'"),
        ({"in_sum2": None, "counts": None}, "no entries"),
    ],
)
def test_gguf_files_that_lie(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadFile, match=reason):
        read_imatrix(theirs(tmp_path / "t.gguf", **changed))


def record(
    name: bytes = b"blk.0.x.weight", calls: int = 3, values: Any = (1.5, 0.0, 6.0), **lie: int
) -> bytes:
    raw = np.asarray(values, dtype="<f4").tobytes()
    sizes = struct.pack("<i", lie.get("length", len(name))) + name, struct.pack("<i", calls)
    return b"".join(sizes) + struct.pack("<i", lie.get("size", len(raw) // 4)) + raw


def old(*records: bytes, count: int | None = None, tail: bytes = struct.pack("<ii", 3, 4) + b"wiki") -> bytes:
    return struct.pack("<i", len(records) if count is None else count) + b"".join(records) + tail


def test_the_old_form_by_hand_and_back(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    data = old(record(), record(b"blk.1.x.weight", 7, (0.25,)))
    path.write_bytes(data)
    found = read_imatrix(path)
    assert is_imatrix(path)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("wiki",), 3, 512)
    entry = found.entries["blk.0.x.weight"]
    assert entry.counts.tolist() == [3 * 512]
    assert torch.equal(entry.mean_square, torch.tensor([[1.5, 0.0, 6.0]]) / 3)
    write_imatrix(tmp_path / "again.dat", found, "dat")
    assert (tmp_path / "again.dat").read_bytes() == data
    path.write_bytes(old(record(), tail=b""))  # the first years' files end here
    assert read_imatrix(path).chunk_count == 3 and read_imatrix(path).datasets == ()


def test_what_the_old_form_loses(tmp_path: Path) -> None:
    ours, path = sample(), tmp_path / "m.dat"
    write_imatrix(path, ours, "dat")
    found = read_imatrix(path)
    assert list(found.entries) == list(ours.entries)[:2]
    assert found.entries["blk.0.attn_q.weight"].counts.tolist() == [2048]
    name = "blk.0.ffn_down_exps.weight"
    experts = found.entries[name]
    assert experts.in_sum2.shape == (1, 24) and experts.counts.tolist() == [1024]
    torch.testing.assert_close(experts.mean_square.reshape(3, 8), ours.entries[name].mean_square)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (old(record(), count=0), "0 entries"),
        (old(record(), count=-1), "-1 entries"),
        (old(record(), count=(1 << 31) - 1), "2147483647 entries"),
        (old(record(), count=2), "bytes"),
        (old(record(length=-5)), "a name of -5"),
        (old(record(length=1 << 30)), "a name of 1073741824"),
        (old(record(b"\xff\xfe")), "UTF-8"),
        (old(record(calls=-1)), "-1 calls"),
        (old(record(size=0)), "0 values"),
        (old(record(size=-1)), "-1 values"),
        (old(record(size=(1 << 31) - 1)), "ends inside"),
        (old(record(), record()), "twice"),
        (old(record(values=(1.0, float("nan")))), "1 of 2 sums"),
        (old(record(values=(1.0, -1.0))), "negative"),
        (old(record(values=(3e38,))), "not finite"),
        (old(record(), tail=struct.pack("<ii", 3, -1)), "-1 bytes"),
        (old(record(), tail=struct.pack("<ii", 3, 1 << 30)), "ends inside"),
        (old(record()) + b"more", "4 bytes follow"),
    ],
)
def test_old_files_that_lie(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(data)
    with pytest.raises(BadFile, match=reason) as caught:
        read_imatrix(path)
    assert "m.dat" in str(caught.value.where)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_every_truncation_is_bad(tmp_path: Path, form: str) -> None:
    path = tmp_path / "m"
    write_imatrix(path, sample(), form)
    data = path.read_bytes()
    end = len(data) - 31 if form == "gguf" else len(data)
    entries = end - 8 - len("wiki.txt, chat.txt")  # where the old form may end
    for length in range(end):
        if form == "dat" and length == entries:
            continue
        path.write_bytes(data[:length])
        with pytest.raises(BadFile):
            read_imatrix(path)


@given(st.binary(max_size=300), st.booleans())
def test_noise_is_bad_or_an_importance_matrix(noise: bytes, fake: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.dat"
        path.write_bytes(struct.pack("<ii", 1, 4) + b"name" + noise if fake else noise)
        try:
            found = read_imatrix(path)
        except BadFile:
            return
        for entry in found.entries.values():
            assert (entry.in_sum2 >= 0).all() and torch.isfinite(entry.mean_square).all()


def test_merging_adds_and_refuses_other_shapes(tmp_path: Path) -> None:
    a, b = sample(0), sample(1)
    alone = Entry(torch.ones(1, 4), torch.tensor([5]))
    b = Imatrix({**b.entries, "blk.2.x.weight": alone}, ("code.txt",), 3, 256)
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path, one in zip(paths, (a, b), strict=True):
        write_imatrix(path, one, "gguf")
    both = read_imatrices(paths)
    assert both.datasets == ("wiki.txt", "chat.txt", "code.txt") and both.chunk_count == 4 + 2
    for name, entry in a.entries.items():
        assert torch.equal(both.entries[name].in_sum2, entry.in_sum2 + b.entries[name].in_sum2)
        assert torch.equal(both.entries[name].counts, entry.counts + b.entries[name].counts)
    assert both.entries["blk.2.x.weight"].digest == alone.digest
    wrong = Imatrix({"blk.0.attn_q.weight": alone}, (), 1, 512)
    with pytest.raises(Refused, match="1×32 and 1×4"):
        a.merged([wrong])


def test_sums_are_those_of_forward_hooks(model: Path, taken: Imatrix) -> None:
    """Against transformers' whole model: same inputs, plain sums in double precision."""
    whole = AutoModelForCausalLM.from_pretrained(model).eval()
    sums: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def see(_: Any, args: tuple[Tensor, ...]) -> None:
            sums[path] = args[0].double().square().sum((0, 1))

        return see

    for path, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(path))
    with torch.no_grad():
        whole(tokens(4, 32))
    assert len(taken.entries) == 3 * 7 and (taken.chunk_count, taken.chunk_size) == (4, 32)
    names = {"self_attn.q_proj": "attn_q", "self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}
    for layer in range(3):
        for path, name in names.items():
            entry = taken.entries[f"blk.{layer}.{name}.weight"]
            expected = sums[f"model.layers.{layer}.{path}"]
            torch.testing.assert_close(entry.in_sum2[0].double(), expected, rtol=2e-4, atol=1e-4)
            assert entry.counts.tolist() == [4 * 32]


def test_a_recipe_uses_it_as_llama_quantize_does(model: Path, taken: Imatrix, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_imatrix(path, taken, "gguf")
    source = open_source(str(model))
    report = mill.quantize(source, "nearest : q4_0 > gguf", tmp_path / "out.gguf", imatrix=path)
    name = "model.layers.1.mlp.up_proj.weight"
    entry = taken.entries["blk.1.ffn_up.weight"]
    stored = open_source(str(tmp_path / "out.gguf")).read(name)
    assert torch.equal(stored, KQuant("q4_0").round(source.read(name), entry.mean_square[0]).dense())
    assert not torch.equal(stored, KQuant("q4_0").round(source.read(name)).dense())
    assert report.calibration["sha256"] == taken.digest == report.identity["calibration"]
    assert report.calibration["weights"] == 21 and report.calibration["without"] == 0
    assert not [note for note in report.notes if note.kind == "no-importance"]
    rotated = open_source(str(tmp_path / "out.gguf")).read(
        Q
    )  # rows are permuted in the file, columns are not
    expected = KQuant("q4_0").round(source.read(Q), taken.entries["blk.1.attn_q.weight"].mean_square[0])
    assert torch.equal(rotated, expected.dense())


def test_the_heads_importance_is_used_where_there_is_one(tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path / "model", tied=False)))
    taken = take_imatrix(source, Calibration(tokens(2, 32))).imatrix
    squares = torch.rand(1, 128) ** 4
    head = Entry(squares * 64, torch.tensor([64]))
    path = tmp_path / "m.gguf"
    write_imatrix(path, Imatrix({**taken.entries, "output.weight": head}, (), 2, 32), "gguf")
    mill.quantize(source, "nearest : q4_0, head=q4_0 > gguf", tmp_path / "out.gguf", imatrix=[path])
    stored = open_source(str(tmp_path / "out.gguf")).read("lm_head.weight")
    expected = KQuant("q4_0").round(source.read("lm_head.weight"), head.mean_square[0]).dense()
    assert torch.equal(stored, expected)


@pytest.mark.parametrize("without", ["absent", "count 0"])
def test_weights_without_data_are_the_users_choice(
    model: Path, taken: Imatrix, tmp_path: Path, without: str
) -> None:
    entries, lost = dict(taken.entries), "blk.1.attn_q.weight"
    del entries[lost]
    if without == "count 0":
        entries[lost] = Entry(torch.zeros(1, 128), torch.tensor([0]))
    path, recipe = tmp_path / "m.gguf", "nearest : q4_0 > gguf"
    write_imatrix(path, Imatrix(entries, (), 4, 32), "gguf")
    with pytest.raises(Refused, match="no data for 1 weights") as caught:
        mill.quantize(str(model), recipe, tmp_path / "no.gguf", imatrix=path, imatrix_missing="refuse")
    assert Q in str(caught.value.where) and not (tmp_path / "no.gguf").exists()
    report = mill.quantize(str(model), recipe, tmp_path / "out.gguf", imatrix=path)
    assert [note.where for note in report.notes if note.kind == "no-importance"] == [Q]
    assert report.calibration["without"] == 1
    plain = KQuant("q4_0").round(open_source(str(model)).read(Q)).dense()
    assert torch.equal(open_source(str(tmp_path / "out.gguf")).read(Q), plain)


def test_weights_with_one_input_share_a_record(model: Path, taken: Imatrix) -> None:
    source = open_source(str(model))
    known, _ = moments_from(taken, source, plan(parse("q8_0"), source).rows)
    q, k, o = (known[Q.replace("q_proj", f"{x}_proj")] for x in "qko")
    assert q is k and q is not o and q.gram is None and q.magnitude is None


@pytest.mark.parametrize(
    ("recipe", "more", "reason"),
    [
        ("gptq : q4_0 > gguf", {}, "Gram"),
        ("hadamard + nearest : int4-g32-asym > bitmill", {}, "before hadamard"),
        ("nearest : q4_0 > gguf", {"calib": tokens()}, "instead of --calib"),
        ("nearest : q4_0 > gguf", {"imatrix_missing": "ones"}, "'ones' is not one of plain, refuse"),
    ],
)
def test_what_an_importance_matrix_cannot_do(
    model: Path, taken: Imatrix, tmp_path: Path, recipe: str, more: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "m.gguf"
    write_imatrix(path, taken, "gguf")
    with pytest.raises(Refused, match=reason):
        mill.quantize(str(model), recipe, tmp_path / "out", imatrix=path, **more)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_another_models_matrix_is_refused(model: Path, taken: Imatrix, tmp_path: Path) -> None:
    narrow = Entry(torch.ones(1, 64), torch.tensor([9]))
    for entries, reason in (
        ({**taken.entries, "blk.0.attn_q.weight": narrow}, "1 × 64 values, the weight 128"),
        ({"blk.0.ssm_in.weight": narrow}, "no weight of this model"),
    ):
        write_imatrix(tmp_path / "m.gguf", Imatrix(entries, (), 1, 512), "gguf")
        with pytest.raises(Refused, match=reason):
            mill.quantize(str(model), "q8_0", tmp_path / "out.gguf", imatrix=tmp_path / "m.gguf")


def test_another_matrix_does_not_resume(model: Path, taken: Imatrix, tmp_path: Path) -> None:
    first, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_imatrix(first, taken, "gguf")
    write_imatrix(other, taken.merged([taken]), "gguf")

    def stop(where: str) -> None:
        if where == "block 0: journaled":
            raise KeyboardInterrupt

    out, recipe = tmp_path / "out.gguf", "nearest : q4_0 > gguf"
    with pytest.raises(mill.Interrupted):
        mill.quantize(str(model), recipe, out, imatrix=first, boundary=stop)
    with pytest.raises(Refused, match="calibration"):
        mill.quantize(str(model), recipe, out, imatrix=other)
    assert mill.quantize(str(model), recipe, out, imatrix=first).resumed == 2


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot write"):
        write_imatrix(tmp_path / "absent" / "m.gguf", sample(), "gguf")
    assert not list(tmp_path.iterdir())
    with pytest.raises(Refused, match="no importance matrix"):
        read_imatrix(tmp_path / "m.gguf")
