"""A model as a stream of blocks: transformers' own decoder layers, built empty and filled one at a time.

Any causal model that transformers knows runs here without a line of ours about its architecture: the body is
built on the meta device, its forward is called once with the layers replaced by recorders, and what each
layer was called with (positions, masks) is kept. Memory is one block and the hidden states.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Protocol

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from bitmill.calibrate.crew import MicroBatches
from bitmill.calibrate.head import Head
from bitmill.calibrate.skeleton import empty_model, final_norm_path, find_layers, path_of, scaled_logits
from bitmill.core.axes import Checkpoint, cache_of, inputs_of
from bitmill.core.errors import BadFile, Refused
from bitmill.core.experts import ExpertTokens
from bitmill.core.types import Inputs
from bitmill.families.base import describe
from bitmill.numerics.cache import Change, cache_changes, check_cache, watch_cache
from bitmill.numerics.inputs import check_inputs, input_hook, seen
from bitmill.run.experts import Experts, linears_of, open_all_experts, open_experts

Read = Callable[[str], Tensor]
_VOCAB_ROWS = 16384  # head rows converted to float32 at a time: 37 MB at width 576, 268 MB at 4096
_FEW = 16  # tokens, enough to see who reads what


class _Recorded(Exception):
    """Raised by the last recorder: nothing after the blocks needs to run."""


class Block:
    """One decoder layer with its weights in memory.

    Paths are canonical: those of the checkpoint's tensors, whatever transformers calls its modules.

    Attributes:
        index: position in the model.
        prefix: canonical name prefix of its tensors, with the dot.
        module: transformers' own layer, its experts opened.
        inputs: how the inputs of linears are rounded before they are multiplied, by path inside the block.
            What watches a linear sees its input before that.
    """

    def __init__(self, stream: Stream, index: int, module: nn.Module) -> None:
        self.index, self.module, self._stream = index, module, stream
        self.prefix = f"{stream.layers_path}.{index}."
        self.inputs: dict[str, Inputs] = {}
        self._experts = {path: m for path, m in module.named_modules() if isinstance(m, Experts)}
        for path, linear in self.linears().items():
            linear.register_forward_pre_hook(input_hook(partial(self.inputs.get, path)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states ``n T H`` after this block; ``n`` is what fits in memory at once."""
        args, kwargs = self._stream.call(self.index, hidden)
        with torch.no_grad():
            out = self.module(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def run(self, hidden: Tensor, batch: int) -> Tensor:
        """As :meth:`forward`, ``batch`` sequences at a time, writing over nothing."""
        out = torch.empty_like(hidden)
        for a in range(0, hidden.shape[0], batch):
            out[a : a + batch] = self.forward(hidden[a : a + batch])
        return out

    def linears(self) -> dict[str, nn.Linear]:
        """Every linear layer by its path inside the block."""
        canonical = self._stream.family.canonical
        return {canonical(p): m for p, m in self.module.named_modules() if isinstance(m, nn.Linear)}

    def watch_cache(self, path: str, change: Change) -> None:
        """Let keys and values of the attention at ``path`` go through ``change`` before it sees them."""
        watch_cache(self.module.get_submodule(self._stream.family.inside(path)), change)

    def assign(self, name: str, value: Tensor) -> None:
        """Replace a parameter by its path inside the block (``mlp.up_proj.weight``)."""
        path, _, leaf = name.rpartition(".")
        inside = f"{self._stream.family.inside(path)}.{leaf}"
        _assign(self.module, inside, value, self._stream.device, self._stream.dtype)

    def _hooks(self, hooks: Mapping[str, Callable[..., Any]]) -> _hooks:
        inside = self._stream.family.inside
        return _hooks({inside(path): hook for path, hook in hooks.items()}, self.module)

    def shared_inputs(self, hidden: Tensor) -> list[tuple[str, ...]]:
        """Paths of the linears grouped by the input they share, in the order they run."""
        seen: list[tuple[int, list[str]]] = []
        keep: list[Tensor] = []  # inputs stay alive so that no address is used twice

        def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                keep.append(args[0])
                for address, paths in seen:
                    if address == args[0].data_ptr():
                        paths.append(path)
                        return
                seen.append((args[0].data_ptr(), [path]))

            return hook

        for module in self._experts.values():
            module.everywhere = True
        try:
            with self._hooks({path: note(path) for path in self.linears()}):
                self.forward(hidden[:1, :_FEW])
        finally:
            for module in self._experts.values():
                module.everywhere = False
        return [tuple(paths) for _, paths in seen]

    def show_experts(self, tokens: ExpertTokens, share: float) -> None:
        """Which tokens experts are shown from here on; see :class:`Experts`."""
        for experts in self._experts.values():
            experts.tokens, experts.share = tokens, share

    def recount(self) -> None:
        """Count from here on how many tokens each expert is sent."""
        for experts in self._experts.values():
            experts.sent.zero_()

    def sent(self, path: str) -> int | None:
        """Tokens that the expert of the linear at ``path`` was sent; None where it is no expert's."""
        inside = self._stream.family.inside(path)
        for place, experts in self._experts.items():
            if inside.startswith(f"{place}."):
                return int(experts.sent[int(inside.removeprefix(f"{place}.").partition(".")[0])])
        return None

    def outputs(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """As :meth:`forward`, with these weights in place of those at their paths; differentiable in them."""
        inside = self._stream.family.inside
        named = {f"{inside(path)}.weight": weight for path, weight in weights.items()}
        args, kwargs = self._stream.call(self.index, hidden)
        for experts in self._experts.values():
            experts.watched = False
        try:
            out = torch.func.functional_call(self.module, named, (hidden, *args), kwargs)
        finally:
            for experts in self._experts.values():
                experts.watched = True
        return out[0] if isinstance(out, tuple) else out

    def watched(self, hidden: Tensor, hooks: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Tensor:
        """:meth:`forward` while ``hooks[path]`` sees, and may replace, the input of linear ``path``."""

        def wrap(see: Callable[[Tensor], Tensor | None]) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
                changed = see(args[0])
                return None if changed is None else (changed, *args[1:])

            return hook

        with self._hooks({path: wrap(see) for path, see in hooks.items()}):
            return self.forward(hidden)

    def in_step(self, hidden: Tensor, gates: Mapping[str, Gate], batch: int) -> None:
        """:meth:`forward` over ``hidden``, in place, ``batch`` sequences at a time and all at the same place.

        Each micro-batch runs until a linear that has a gate is about to be called, shows it the input, and
        waits there. When all wait, the gate is closed, which may replace weights, and all go on. Temporaries
        are those of one micro-batch, small enough for the cache, though every token is inside the block.

        Args:
            hidden: ``n T H``; becomes the block's output.
            gates: by path of a linear, in the order the block calls them.
            batch: sequences of a micro-batch.
        """
        self.recount()
        with closing(self.steps(hidden, {path: gate.see for path, gate in gates.items()}, batch)) as steps:
            passed = set()
            for path in steps:
                gates[path].close()
                passed.add(path)
        for path, gate in gates.items():
            if path not in passed:  # a router may send no token at all to an expert
                gate.close()

    def steps(
        self, hidden: Tensor, see: Mapping[str, Callable[[Tensor], None]], batch: int
    ) -> Generator[str, None, None]:
        """As :meth:`in_step`, one gate after the other: its path, once every micro-batch has shown its input
        to ``see[path]`` and waits there. Gradients are off inside. On the CPU each thread has micro-batches
        of its own; inputs are shown in the caller's, in the order of the sequences."""
        starts = range(0, hidden.shape[0], batch)
        for first in {starts[0], starts[-1]}:  # noted for these shapes before threads ask for it
            self._stream.call(self.index, hidden[first : first + batch])

        def stop(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                getcurrent().parent.switch((path, args[0]))

            return hook

        def run(first: int) -> None:
            part = hidden[first : first + batch]
            part.copy_(self.forward(part))

        order = {path: place for place, path in enumerate(see)}
        batches = MicroBatches(run, starts, torch.get_num_threads() if hidden.device.type == "cpu" else 1)
        with closing(batches), self._hooks({path: stop(path) for path in see}):
            waiting: dict[int, str] = {}
            ready: Sequence[int] = starts
            while ready:
                for first, reached in batches.go_on(ready):
                    if reached is None:
                        waiting.pop(first, None)
                    else:
                        waiting[first], x = reached
                        see[waiting[first]](x)
                if not waiting:
                    return
                # A router may send no token of a micro-batch to an expert: those further on stay there.
                gate = min(waiting.values(), key=order.__getitem__)
                yield gate
                ready = [first for first, place in waiting.items() if place == gate]


class Twin:
    """A block of the original model on that model's own hidden states, a gate ahead of the same block that is
    being quantized: what its inputs would have been.

    Args:
        block: with the weights as they were.
        hidden: ``n T H`` of the original model; becomes the block's output.
        paths, batch: the gates and micro-batches of the other one.
    """

    def __init__(self, block: Block, hidden: Tensor, paths: Sequence[str], batch: int) -> None:
        self._seen: deque[Tensor] = deque()
        self._steps = block.steps(hidden, dict.fromkeys(paths, self._seen.append), batch)
        self.advance()

    def take(self) -> Tensor:
        """The input of the next micro-batch at this gate."""
        return self._seen.popleft()

    def advance(self) -> None:
        """On to the next gate, or through the block."""
        self._seen.clear()
        next(self._steps, None)

    def close(self) -> None:
        """Out of the block, wherever it is."""
        self._steps.close()


class Gate(Protocol):
    """What stands before a linear in :meth:`Block.in_step`."""

    def see(self, x: Tensor) -> None:
        """One micro-batch's input of the linear."""

    def close(self) -> None:
        """Every micro-batch has been seen; none has gone through."""


class Stream:
    """A checkpoint that can be run block by block.

    Args:
        checkpoint: any container's.
        device: where blocks run.
        dtype: what they compute in; float32 unless memory forbids it.
        read: where dense tensors come from; the checkpoint itself unless a transform changes them on the way.
        inputs: how the inputs of linears are rounded, by weight name; None does as the checkpoint says, with
            the keys and values of its cache, too.
        experts: which tokens experts are shown, and of how many in all; hidden states do not change by it.

    Raises:
        Refused: transformers does not know the architecture, its body is not a plain list of blocks, or
            inputs are to be rounded that are no linear's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        read: Read | None = None,
        inputs: Mapping[str, Inputs] | None = None,
        experts: tuple[ExpertTokens, int] = (ExpertTokens(), 0),
    ) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self._shown = experts
        self._read = read or checkpoint.read
        self.family = describe(checkpoint.config)
        self._model = empty_model(checkpoint.config, self.device)
        self.layers_path, self._layers = find_layers(self._model)
        self._calls: dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._norm_path = final_norm_path(self._model, self.layers_path)
        self._inputs = inputs_of(checkpoint) if inputs is None else inputs
        where = str(checkpoint.path)
        if self._inputs:
            whole = copy.deepcopy(self._model)
            open_all_experts(whole, self.layers_path, self.family, checkpoint.tensors)
            check_inputs(linears_of(whole, self.family), self._inputs, where)
        cache = cache_of(checkpoint) if inputs is None else {}
        check_cache(self._model, cache, where)
        self._cache = cache_changes(cache)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self._layers)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self._model.config.hidden_size)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states ``n T H`` of token ids ``n T``; only the rows that occur are converted."""
        module = self._model.get_input_embeddings()
        path = path_of(self._model, module)
        table = self._tensor(f"{path}.weight")
        rows, index = tokens.unique(return_inverse=True)
        if int(rows[-1]) >= table.shape[0]:
            raise BadFile(
                f"token id {int(rows[-1])} is outside the embedding table of {table.shape[0]} rows",
                where=f"{path}.weight",
                fix="the tokenizer and the model do not belong together",
            )
        module = copy.copy(module)
        module._parameters = {}
        module.__dict__["padding_idx"] = None  # it would have to be a row of the small table
        module.weight = nn.Parameter(table[rows].to(self.device, self.dtype), requires_grad=False)
        with torch.no_grad():
            return module(index.to(self.device)).clone()

    def block(self, index: int, read: Read | None = None) -> Block:
        """Block ``index`` with its weights filled in from ``read``."""
        module = copy.deepcopy(self._layers[index])
        prefix = f"{self.layers_path}.{index}."
        open_experts(module, prefix, self.family, self.checkpoint.tensors)
        for name, _ in list(module.named_parameters()):
            _assign(module, name, self._parameter(prefix, name, read), self.device, self.dtype)
        block = Block(self, index, module)
        tokens, total = self._shown
        block.show_experts(tokens, tokens.count / max(total, 1))
        for path in block.linears():
            if f"{prefix}{path}.weight" in self._inputs:
                block.inputs[path] = self._inputs[f"{prefix}{path}.weight"]
        for path, change in self._cache.items():
            if path.startswith(prefix):
                block.watch_cache(path.removeprefix(prefix), change)
        return block

    def blocks(self) -> Iterator[Block]:
        """Every block in order, one in memory at a time."""
        for index in range(self.layers):
            yield self.block(index)

    def hidden(
        self, tokens: Tensor, batch: int = 8, after: Callable[[Tensor, int], Tensor] | None = None
    ) -> Tensor:
        """Hidden states ``n T H`` after the last block; ``after(hidden, index)`` may change each."""
        hidden = self.embed(tokens)
        for block in self.blocks():
            hidden = block.run(hidden, batch)
            if after is not None:
                hidden = after(hidden, block.index)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``… V`` of hidden states ``… H``: final norm, head, the model's own scaling."""
        norm = copy.deepcopy(self._model.get_submodule(self._norm_path))
        for name, _ in list(norm.named_parameters()):
            _assign(norm, name, self._tensor(f"{self._norm_path}.{name}"), self.device, self.dtype)
        with torch.no_grad():
            x = norm(hidden.to(self.device, self.dtype)).float()
            weight, bias = self._head()
            inputs = self._inputs.get(f"{path_of(self._model, self._model.get_output_embeddings())}.weight")
            x = x if inputs is None else seen(inputs, x)
            rows = weight.shape[0]
            out = torch.empty(*x.shape[:-1], rows, dtype=torch.float32, device=self.device)
            for a in range(0, rows, _VOCAB_ROWS):
                part = weight[a : a + _VOCAB_ROWS].to(self.device, torch.float32)
                out[..., a : a + _VOCAB_ROWS] = x @ part.T
            if bias is not None:
                out += bias.to(self.device, torch.float32)
            return scaled_logits(out, self.checkpoint.config)

    def head(self) -> Head:
        """What stands behind the last block, in memory."""
        norm = copy.deepcopy(self._model.get_submodule(self._norm_path))
        for name, _ in list(norm.named_parameters()):
            _assign(norm, name, self._tensor(f"{self._norm_path}.{name}"), self.device, self.dtype)
        weight, bias = (None if t is None else t.to(self.device, torch.float32) for t in self._head())
        assert weight is not None
        inputs = self._inputs.get(f"{path_of(self._model, self._model.get_output_embeddings())}.weight")
        return Head(f"{self._norm_path}.weight", norm, weight, bias, inputs, self.checkpoint.config)

    def call(self, index: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model calls layer ``index`` with, beside the hidden states, for a batch of this shape."""
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in self._calls:
            self._calls[shape] = self._record(hidden)
        return self._calls[shape][index]

    def _record(self, hidden: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        body = self._model.get_submodule(self.layers_path.rpartition(".")[0])

        def recorder(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append((args, kwargs))
            if len(calls) == self.layers:
                raise _Recorded
            return hidden_states

        for layer in self._layers:
            layer.forward = recorder  # an instance attribute: the class keeps its own
        try:
            with torch.no_grad():
                body(inputs_embeds=hidden, use_cache=False)
        except _Recorded:
            return calls
        finally:
            for layer in self._layers:
                del layer.forward
        raise Refused(
            f"the blocks of {type(body).__name__} are not called one after the other",
            fix="quantize without calibration (solver nearest, hqq or clip)",
        )

    def _head(self) -> tuple[Tensor, Tensor | None]:
        head = self._model.get_output_embeddings()
        path = path_of(self._model, head)
        names = self.checkpoint.tensors
        if f"{path}.weight" in names:
            bias = self._tensor(f"{path}.bias") if f"{path}.bias" in names else None
            return self._tensor(f"{path}.weight"), bias
        return self._tensor(f"{path_of(self._model, self._model.get_input_embeddings())}.weight"), None

    def _parameter(self, prefix: str, name: str, read: Read | None) -> Tensor:
        """A parameter of a layer, put together where the checkpoint has it in parts."""
        path, _, leaf = name.rpartition(".")
        named = f"{prefix}{self.family.canonical(path)}.{leaf}"
        parts = self.family.joined.get(name, ())
        if not parts or named in self.checkpoint.tensors:
            return self._tensor(named, read)
        return torch.cat([self._tensor(f"{prefix}{part}.weight", read) for part in parts])

    def _tensor(self, name: str, read: Read | None = None) -> Tensor:
        if name not in self.checkpoint.tensors:
            raise BadFile(
                f"the checkpoint has no tensor {name!r}, which {type(self._model).__name__} needs",
                where=str(self.checkpoint.path),
                fix="the file is incomplete, or stores this architecture under other names",
            )
        return (read or self._read)(name)


def _assign(root: nn.Module, name: str, value: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    expected = module.get_parameter(leaf).shape
    if tuple(expected) != tuple(value.shape):
        raise BadFile(
            f"shape {tuple(value.shape)} where the architecture wants {tuple(expected)}",
            where=name,
            fix="config.json and the weights do not belong together",
        )
    module._parameters[leaf] = nn.Parameter(value.to(device, dtype), requires_grad=False)


class _hooks:
    """Forward pre-hooks by path, gone when the block of code ends."""

    def __init__(self, hooks: Mapping[str, Callable[..., Any]], module: nn.Module) -> None:
        self._wanted, self._module = hooks, module

    def __enter__(self) -> None:
        self._handles: Sequence[Any] = [
            self._module.get_submodule(path).register_forward_pre_hook(hook, prepend=True)
            for path, hook in self._wanted.items()
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
