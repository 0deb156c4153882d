"""Operations of the matrix products of a compiled program, two for each multiplication."""

from __future__ import annotations

import json
import math
import re

import numpy as np

from mos_jax.planning.hlo import Computation, Instruction

# Products that XLA on NVIDIA GPUs leaves to a library.
_LIBRARY_PRODUCTS = "__cublas$"


def called_target(call: Instruction) -> str:
    """What a custom call calls; "" for other instructions."""
    return (call.attribute("custom_call_target") or "").strip('"')


def product_flops(place: Computation, one: Instruction) -> float:
    """Operations of a matrix product or a convolution, two for each multiplication; else 0."""
    if one.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (place.instructions[name].arrays[0] for name in one.operands[:2])
    if one.opcode == "dot":
        contracted = re.findall(r"\d+", one.attribute("lhs_contracting_dims") or "")
        inner = math.prod(left.dims[int(axis)] for axis in contracted)
        return 2.0 * one.arrays[0].size * inner
    labels = one.attribute("dim_labels") or ""
    lhs, rhs, out = re.split("_|->", labels)
    window = _window(one.attribute("window") or "", rhs)
    positions = 1
    for axis in (c for c in rhs if c.isdigit()):
        positions *= _valid_pairs(
            left.dims[lhs.index(axis)],
            right.dims[rhs.index(axis)],
            one.arrays[0].dims[out.index(axis)],
            window[axis],
        )
    batch = left.dims[lhs.index("b")] // int(one.attribute("batch_group_count") or 1)
    # The kernel's input features are those of one group already.
    features = right.dims[rhs.index("i")] * right.dims[rhs.index("o")]
    return 2.0 * batch * features * positions


def library_flops(place: Computation, call: Instruction) -> float | None:
    """Operations of a product that a custom call leaves to cuBLAS, as `product_flops`.

    XLA writes the dimensions that are summed over into the configuration of the call.

    Returns:
      None for other calls, and where that is missing.
    """
    if not called_target(call).startswith(_LIBRARY_PRODUCTS):
        return None
    try:
        config = json.loads(call.attribute("backend_config") or "")
        dims = config["gemm_backend_config"]["dot_dimension_numbers"]
        contracted = [int(axis) for axis in dims["lhs_contracting_dimensions"]]
    except (ValueError, LookupError, TypeError):
        return None
    # The first of its results is the product, the others are room to work in.
    left = place.instructions[call.operands[0]].arrays[0]
    return 2.0 * call.arrays[0].size * math.prod(left.dims[axis] for axis in contracted)


def _window(text: str, rhs: str) -> dict[str, dict[str, str]]:
    fields = dict(part.split("=", 1) for part in text.strip("{}").split() if "=" in part)
    axes = sorted(c for c in rhs if c.isdigit())
    return {
        axis: {name: value.split("x")[place] for name, value in fields.items()}
        for place, axis in enumerate(axes)
    }


def _valid_pairs(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of output and kernel positions that meet an entry, not padding, along one axis."""
    stride = int(window.get("stride", 1))
    low = int(window.get("pad", "0_0").split("_")[0])
    spread, holes = int(window.get("rhs_dilate", 1)), int(window.get("lhs_dilate", 1))
    at = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None, :] * spread
    met = (at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)
    return int(met.sum())
