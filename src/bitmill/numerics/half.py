"""Products in half the bits, for what is learned from them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def products_in_half(device: torch.device, wanted: bool) -> AbstractContextManager[object]:
    """Matrix products in bfloat16, where that is ``wanted`` and the processor multiplies it as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and _multiplies_bfloat16(device))


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
