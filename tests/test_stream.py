"""Blocks streamed one by one compute what transformers computes whole, for every family."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitmill.calibrate.crew import Crew
from bitmill.calibrate.moments import MomentSum, Sampled, load_moments, save_moments
from bitmill.calibrate.stream import Stream
from bitmill.core.errors import BadFile, Refused, Unsolvable
from bitmill.core.types import SAMPLE, Moments
from bitmill.source import open_source
from tests.tiny import CONFIGS, make_model, tokens


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    make_model(tmp_path, family, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stream = Stream(open_source(str(tmp_path)))
    x = tokens(3, 40)
    with torch.no_grad():
        assert torch.equal(stream.logits(stream.hidden(x, batch=3)), model(x).logits)


def test_linears_that_share_an_input_are_found(tmp_path: Path) -> None:
    stream = Stream(open_source(str(make_model(tmp_path))))
    x = stream.embed(tokens(1, 16))
    assert stream.block(0).shared_inputs(x) == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]


class _Witness:
    """A gate that writes down what it saw and when it was closed."""

    def __init__(self, name: str, log: list[str], fail: bool = False) -> None:
        self.name, self.log, self.fail, self.seen = name, log, fail, []

    def see(self, x: torch.Tensor) -> None:
        self.log.append(f"see {self.name}")
        self.seen.append(x.clone())

    def close(self) -> None:
        if self.fail:
            raise RuntimeError("no")
        self.log.append(f"close {self.name}")


def test_micro_batches_in_step_meet_at_every_gate_and_compute_what_one_pass_does(tmp_path: Path) -> None:
    stream = Stream(open_source(str(make_model(tmp_path))))
    block, x = stream.block(0), stream.embed(tokens(5, 16))
    log: list[str] = []
    gates = {path: _Witness(path, log) for path in ("self_attn.o_proj", "mlp.down_proj")}
    whole: dict[str, torch.Tensor] = {}
    keep = {path: lambda v, path=path: whole.__setitem__(path, v.clone()) for path in gates}
    expected = block.watched(x, keep)
    hidden = x.clone()
    block.in_step(hidden, gates, 2)
    assert torch.allclose(hidden, expected, atol=1e-6)
    o, down = "self_attn.o_proj", "mlp.down_proj"
    assert log == [f"see {o}"] * 3 + [f"close {o}"] + [f"see {down}"] * 3 + [f"close {down}"]
    for path, gate in gates.items():
        assert torch.allclose(torch.cat(gate.seen), whole[path], atol=1e-6)


def test_an_error_at_a_gate_leaves_no_hook_behind(tmp_path: Path) -> None:
    stream = Stream(open_source(str(make_model(tmp_path))))
    block, x = stream.block(0), stream.embed(tokens(4, 16))
    hooks = [list(m._forward_pre_hooks) for m in block.module.modules()]
    with pytest.raises(RuntimeError, match="no"):
        block.in_step(x.clone(), {"mlp.down_proj": _Witness("d", [], fail=True)}, 1)
    assert torch.is_grad_enabled()
    assert [list(m._forward_pre_hooks) for m in block.module.modules()] == hooks
    log: list[str] = []
    block.in_step(x.clone(), {"mlp.down_proj": _Witness("d", log)}, 4)
    assert log == ["see d", "close d"]


def test_a_token_outside_the_table_is_refused(tmp_path: Path) -> None:
    stream = Stream(open_source(str(make_model(tmp_path))))
    with pytest.raises(BadFile, match="outside the embedding"):
        stream.embed(torch.tensor([[10**6]]))


def test_moments_equal_the_plain_sums_and_merge(tmp_path: Path) -> None:
    x = torch.randn(700, 1300)
    parts = []
    for half in (x[:300], x[300:]):
        total = MomentSum(1300, gram=True)
        total.add(half, "x")
        parts.append(total.moments())
    both = parts[0].merged(parts[1])
    assert both.tokens == 700
    assert both.gram is not None
    assert torch.allclose(both.gram, x.T @ x, atol=1e-3)
    assert torch.equal(both.gram, both.gram.T)
    assert torch.allclose(both.importance, x.square().mean(0), atol=1e-5)
    assert torch.allclose(both.absmax, x.abs().amax(0))
    assert both.sample is not None and 128 < len(both.sample) <= SAMPLE
    path = tmp_path / "m.safetensors"
    save_moments(path, {"a": both, "b": both}, {"source": "s"})
    loaded, facts = load_moments(path)
    assert facts == {"source": "s"}
    assert loaded["a"] is loaded["b"]
    assert loaded["a"].gram is not None and torch.equal(loaded["a"].gram, both.gram)
    assert loaded["a"].sample is not None and torch.equal(loaded["a"].sample, both.sample)


def test_a_sample_is_spread_evenly_and_does_not_depend_on_how_the_stream_is_cut() -> None:
    x = torch.arange(64 * 512.0)[:, None]
    whole, cut = Sampled(1, x.device), Sampled(1, x.device)
    whole.add(x, 0)
    for start in range(0, len(x), 700):
        cut.add(x[start : start + 700], start)
    assert torch.equal(whole.rows, cut.rows)
    assert SAMPLE / 2 <= len(whole.rows) <= SAMPLE
    gaps = whole.rows[:, 0].diff()
    assert gaps.min() > 0 and gaps.max() < 4 * len(x) / len(whole.rows)
    inside = (whole.rows[:, 0] % 512 / 128).long().bincount()  # quarters: out of step with windows
    assert inside.min() > len(whole.rows) / 5


def test_joined_samples_are_as_large_as_one_and_have_of_both() -> None:
    one, other = (Moments(400, torch.ones(1), sample=torch.full((200, 1), v)) for v in (1.0, 2.0))
    joined = one.merged(other).sample
    assert joined is not None and len(joined) == SAMPLE
    assert (joined == 1).sum() == SAMPLE / 2
    short = replace(one, sample=torch.ones(3, 1)).merged(replace(other, sample=torch.ones(4, 1))).sample
    assert short is not None and len(short) == 7


def test_moments_refuse_what_is_not_finite_and_files_that_are_not_theirs(tmp_path: Path) -> None:
    with pytest.raises(Unsolvable, match="1 of 8"):
        MomentSum(4, gram=False).add(torch.tensor([[1.0, 2, 3, 4], [1, float("inf"), 3, 4]]), "x")
    with pytest.raises(Refused):
        load_moments(tmp_path / "none")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_inputs_are_shown_in_order_by_the_same_thread_whatever_computed_them(
    threads: int, tmp_path: Path
) -> None:
    stream = Stream(open_source(str(make_model(tmp_path))))
    block, x = stream.block(0), stream.embed(tokens(5, 16))
    want = block.forward(x)
    shown: list[tuple[int, torch.Tensor]] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hidden = x.clone()
        see = {"mlp.down_proj": lambda v: shown.append((threading.get_ident(), v.clone()))}
        steps = block.steps(hidden, see, 1)
        assert next(steps) == "mlp.down_proj"
        assert torch.get_num_threads() == threads  # the caller's operations have all of them
        assert next(steps, None) is None
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(hidden, want)
    whole: list[torch.Tensor] = []
    block.watched(x, {"mlp.down_proj": whole.append})
    assert {thread for thread, _ in shown} == {threading.get_ident()}
    torch.testing.assert_close(torch.cat([v for _, v in shown]), whole[0])


def test_an_error_in_a_thread_reaches_the_caller_and_the_block_can_be_used_again(tmp_path: Path) -> None:
    stream = Stream(open_source(str(make_model(tmp_path))))
    block, x = stream.block(0), stream.embed(tokens(5, 16))
    linear = block.linears()["mlp.up_proj"]

    def fail(*_: object) -> None:
        raise ArithmeticError("in the middle")

    handle = linear.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="in the middle"):
        block.in_step(x.clone(), {"self_attn.o_proj": _Witness("o", [])}, 1)
    handle.remove()
    hidden = x.clone()
    block.in_step(hidden, {"self_attn.o_proj": _Witness("o", [])}, 1)
    torch.testing.assert_close(hidden, block.forward(x))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gram_matrices_of_many_parts_do_not_depend_on_who_sums_which_panel(threads: int) -> None:
    parts = [torch.randn(50, 1300, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        total = MomentSum(1300, gram=True)
        total.add_all(parts, "x")
    finally:
        torch.set_num_threads(before)
    x = torch.cat(parts).double()
    gram = total.moments().gram
    assert gram is not None
    torch.testing.assert_close(gram.double(), x.T @ x, rtol=1e-5, atol=1e-3)
    assert torch.equal(gram, gram.T)


def test_workers_keep_their_threads_and_errors_wait_for_all() -> None:
    crew = Crew(2)
    first, again = crew.each(lambda k: threading.get_ident()), crew.each(lambda k: threading.get_ident())
    assert first == again and len(set(first)) == 2 and threading.get_ident() not in first
    done: list[int] = []

    def work(k: int) -> None:
        if k == 0:
            raise ArithmeticError("one of them")
        done.append(k)

    with pytest.raises(ArithmeticError, match="one of them"):
        crew.each(work)
    assert done == [1]
    crew.close()
