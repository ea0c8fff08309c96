"""Products in half the bits, for what is learned from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from bitmill.numerics.causal import causal_attention, is_plainly_causal


@contextmanager
def products_in_half(device: torch.device, wanted: bool) -> Iterator[None]:
    """Matrix products in bfloat16, where that is ``wanted`` and the processor multiplies it as it is."""
    if not (wanted and _multiplies_bfloat16(device)):
        yield
    elif device.type == "cpu":
        with torch.autocast("cpu", torch.bfloat16), _CausalInPieces():
            yield
    else:
        with torch.autocast(device.type, torch.bfloat16):
            yield


class _CausalInPieces(TorchFunctionMode):
    """Torch's own attention takes twice the time on a processor, forwards and backwards."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """``function`` itself, if it is no causal attention."""
        told = dict(kwargs or {})
        asked = function is scaled_dot_product_attention and len(args) >= 3
        if asked and is_plainly_causal(*args, **told):
            query, key, value = (tensor.to(torch.bfloat16) for tensor in args[:3])
            with torch.autocast("cpu", enabled=False):
                return causal_attention(query, key, value, told.get("scale"))
        return function(*args, **told)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        told = torch.cpu.get_capabilities()
    except AttributeError:  # an older torch does not say
        return False
    return bool(told.get("avx512_bf16") or told.get("amx_bf16"))
