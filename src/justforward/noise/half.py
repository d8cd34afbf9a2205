"""Numba kernels for weights stored in 16 bits (`formats`): those of `cpu` and `moments`, and what a forward pass reads."""

# mypy: ignore-errors
# (Numba types what is in here; mypy cannot follow its intrinsics.)
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from justforward.noise import cpu, moments, spec
from justforward.noise.cpu import draw_tile
from justforward.noise.formats import (
    BFLOAT16,
    FLOAT16,
    SOURCES,
    TILE,
    f32,
    kernel,
    u64,
    wide_bfloat16,
    wide_float16,
)

_GAUSSIAN, _RADEMACHER = u64(spec.DOMAIN_GAUSSIAN), u64(spec.DOMAIN_RADEMACHER)


def _make_widen(SIGNS: bool, DOMAIN: Any, FORM: int) -> Any:
    BRAIN, KEY = FORM == BFLOAT16, SOURCES

    def _widen(theta, out, first, last, stream, seeds, cs):
        """out[i - first] = theta[i] + sum_d cs[d] z_d[i] for elements first .. last; theta uint16 [n], out float32."""
        _ = KEY
        z = np.empty(TILE, np.float32)
        w0, w1 = np.empty(256, np.uint32), np.empty(256, np.uint32)
        w2, w3 = np.empty(256, np.uint32), np.empty(256, np.uint32)
        for tile in range(first // TILE, (last + TILE - 1) // TILE):
            start, end = max(tile * TILE, first), min((tile + 1) * TILE, last)
            lane = start - tile * TILE
            here, part = theta[start:end], out[start - first : end - first]
            if BRAIN:
                for i in range(part.size):
                    part[i] = wide_bfloat16(here[i])
            else:
                for i in range(part.size):
                    part[i] = wide_float16(here[i])
            for d in range(seeds.size):
                draw_tile(tile, seeds[d], stream, DOMAIN, SIGNS, z, w0, w1, w2, w3)
                values, c = z[lane : lane + part.size], cs[d]
                for i in range(part.size):
                    part[i] = f32(part[i] + f32(c * values[i]))

    return kernel(_widen)


def _kernels(FORM: int) -> SimpleNamespace:
    return SimpleNamespace(
        fill_rows=cpu.fill_rows,
        update=cpu.make_update(False, _GAUSSIAN, FORM),
        update_signs=cpu.make_update(True, _RADEMACHER, FORM),
        update_outer=cpu.make_update_outer(FORM),
        adapt=moments.make_adapt(False, _GAUSSIAN, FORM),
        adapt_signs=moments.make_adapt(True, _RADEMACHER, FORM),
        adapt_outer=moments.make_adapt_outer(FORM),
        widen=_make_widen(False, _GAUSSIAN, FORM),
        widen_signs=_make_widen(True, _RADEMACHER, FORM),
    )


OF = {torch.bfloat16: _kernels(BFLOAT16), torch.float16: _kernels(FLOAT16)}
