"""For a fork server to import before it forks: what every process that quantizes loads for itself otherwise,
compiled loops among it, and what takes most of its time on a tiny model."""

from __future__ import annotations

import torch
from transformers.models.llama import modeling_llama  # noqa: F401

import bitmill.mill  # noqa: F401
from bitmill.core.registry import members, parse_grid

torch.set_num_threads(1)  # no thread may be alive where a server forks
for axis in ("containers", "grids", "solvers", "transforms"):
    members(axis)
for text in ("q4_0", "q8_0", "int4-g32-asym"):
    parse_grid(text).round(torch.ones(2, 32))
