"""Where the weights and the activations of a base lie on a mesh.

A mesh has the axes `data`, `fsdp` and `tensor`. The rows of a batch are divided over the first two.
Weights are divided over the last two: over `tensor` as the layers before and after them divide
their work (Megatron-LM, arXiv 1909.08053), and over `fsdp` along the other axis, which only saves
memory: just before its use, one layer's weight is gathered over `fsdp` (ZeRO stage 3, arXiv
1910.02054; FSDP, arXiv 2304.11277), forward and again backward.

Without a mesh every function here returns its argument, and the compiled program has no trace of
it.

Axis legend: B rows, S tokens of a row, N = B * S, L blocks, h = d_in, o = d_out, r rank, H query
heads, K key heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mos_jax.adapters.low_rank import LowRank
from mos_jax.models.config import DecoderConfig
from mos_jax.models.quantized import BLOCK, Weight, is_quantized

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
# Of the rows of a batch.
ROWS = (DATA, FSDP)

# For each dimension of an array, the axis or the axes of the mesh that would divide it.
Wanted: TypeAlias = "tuple[str | tuple[str, ...] | None, ...]"

# Layers whose outputs are divided over `tensor`, and those whose inputs are.
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_NAME: dict[str, Wanted] = {
    "embed": (TENSOR, FSDP),
    "head": (FSDP, TENSOR),
    **{f"blocks/{name}": (None, FSDP, TENSOR) for name in _COLUMNS},
    **{f"blocks/{name}": (None, TENSOR, FSDP) for name in ("o_proj", "down_proj")},
    **{f"blocks/{name}": (None, TENSOR) for name in ("q_bias", "k_bias", "v_bias")},
}


def fit_spec(shape: Sequence[int], wanted: Wanted, sizes: Mapping[str, int]) -> PartitionSpec:
    """The part of `wanted` that divides `shape`: a dimension that does not divide is whole.

    Args:
      shape: of the array.
      wanted: an entry for each of its dimensions; of several axes, the last ones are left out
        first.
      sizes: of the mesh's axes.

    Returns:
      A spec with an entry for each dimension; axes of size 1 are left out.

    Raises:
      ValueError: if `wanted` has not as many entries as `shape`.
    """
    fitted: list[str | tuple[str, ...] | None] = []
    for size, axes in zip(shape, wanted, strict=True):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        names = tuple(name for name in names if sizes[name] > 1)
        while names and size % math.prod(sizes[name] for name in names):
            names = names[:-1]
        fitted.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*fitted)


def weight_axes(name: str, ndim: int) -> Wanted:
    """What divides a weight, by its name in `DecoderConfig.weight_shapes`; nothing for norms."""
    return _BY_NAME.get(name, (None,) * ndim)


def weight_spec(
    name: str, shape: Sequence[int], sizes: Mapping[str, int], quantized: bool = False
) -> PartitionSpec:
    """The spec of a weight; a quantised one is only cut between blocks that share a scale."""
    if quantized:
        shape = (*shape[:-2], shape[-2] // BLOCK, shape[-1])
    return fit_spec(shape, weight_axes(name, len(shape)), sizes)


def constrain(x: jax.Array, mesh: Mesh | None, *wanted: Any) -> jax.Array:
    """Lays `x` out as `wanted`, as far as that divides its shape."""
    if mesh is None:
        return x
    return _pin(x, mesh, fit_spec(x.shape, wanted, mesh.shape))


def _pin(x: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def readable(tree: Any, mesh: Mesh | None) -> Any:
    """Puts results on every device of the mesh, so that each of its processes can read them."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: _pin(x, mesh, PartitionSpec()), tree)


def gather_weight(weight: Weight, mesh: Mesh, name: str) -> Weight:
    """One layer's weight [h, o] of a site, gathered over `fsdp` and still divided over `tensor`.

    A quantised weight is gathered as codes, before it becomes numbers.
    """
    axes = tuple(None if axis == FSDP else axis for axis in _BY_NAME[f"blocks/{name}"][1:])
    d_in, d_out = weight.shape
    shape = (d_in // BLOCK, d_out) if is_quantized(weight) else (d_in, d_out)
    spec = fit_spec(shape, axes, mesh.shape)
    return jax.tree.map(lambda leaf: _pin(leaf, mesh, spec), weight)


def output_axes(name: str) -> Wanted:
    """What divides the output [N, o] of a site."""
    axis = _BY_NAME[f"blocks/{name}"][-1]
    return ROWS, TENSOR if axis == TENSOR else None


def constrain_factors(low_rank: LowRank, mesh: Mesh | None, name: str) -> LowRank:
    """Divides factors of all blocks, a [L, r, h] and b [L, r, o], as the site's weight is.

    What the weight's layout leaves whole is divided over `fsdp` as well, so that a device holds
    its share of A and of B and no more.
    """
    axes = _BY_NAME[f"blocks/{name}"][1:]
    return _factors_as(low_rank, mesh, tuple(FSDP if a == FSDP else (TENSOR, FSDP) for a in axes))


def gather_factors(low_rank: LowRank, mesh: Mesh | None, name: str) -> LowRank:
    """One block's factors, gathered over `fsdp` as `gather_weight` gathers the weight."""
    axes = _BY_NAME[f"blocks/{name}"][1:]
    return _factors_as(low_rank, mesh, tuple(None if axis == FSDP else axis for axis in axes))


def _factors_as(low_rank: LowRank, mesh: Mesh | None, axes: Wanted) -> LowRank:
    if mesh is None:
        return low_rank
    leading = (None,) * (low_rank.a.ndim - 1)
    return LowRank(
        constrain(low_rank.a, mesh, *leading, axes[0]),
        constrain(low_rank.b, mesh, *leading, axes[1]),
        low_rank.scale,
        low_rank.layers,
        low_rank.ranks,
    )


def key_head_copies(heads: int, shared: int, sizes: Mapping[str, int]) -> int:
    """How often each of K key heads must stand so that `tensor` divides them as the query heads.

    Copies that stand side by side leave every query head its key head; each device then takes no
    more of them than its query heads ask for.

    Args:
      heads: H, a multiple of K.
      shared: K.
      sizes: of the mesh's axes.

    Returns:
      1 where `tensor` divides K, or does not divide H either; a divisor of H / K elsewhere.
    """
    tensor = sizes[TENSOR]
    return 1 if heads % tensor else tensor // math.gcd(shared, tensor)


def whole_attention(config: DecoderConfig, sizes: Mapping[str, int]) -> str | None:
    """In words that `tensor` cannot divide attention; None where it can."""
    tensor, heads = sizes[TENSOR], config.num_heads
    if heads % tensor == 0:
        return None
    return (
        f"attention of {config.name} is whole on every chip: tensor {tensor} does not divide its "
        f"{heads} heads"
    )


def per_shard(
    function: Callable[..., jax.Array], mesh: Mesh | None, *wanted: Wanted
) -> Callable[..., jax.Array]:
    """`function`, run by every device on its own part of the arguments.

    Args:
      function: of arrays, with results that are independent along all divided dimensions.
      mesh: None returns `function`.
      *wanted: for each argument, what divides it; the result is divided as the first one.
        A dimension is divided only if the axes divide it in all arguments that have them there.
    """
    if mesh is None:
        return function

    def divided(*arguments: jax.Array) -> jax.Array:
        sizes = dict(mesh.shape)
        # An axis that one argument cannot take is taken by none: they must be cut alike.
        for x, axes in zip(arguments, wanted, strict=True):
            for size, names in zip(x.shape, axes, strict=True):
                fits = fit_spec((size,), (names,), sizes)[0]
                kept = () if fits is None else (fits,) if isinstance(fits, str) else fits
                every = () if names is None else (names,) if isinstance(names, str) else names
                sizes |= {name: 1 for name in every if name not in kept}
        specs = [fit_spec(x.shape, axes, sizes) for x, axes in zip(arguments, wanted, strict=True)]
        return jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=specs[0])(
            *arguments
        )

    return divided
