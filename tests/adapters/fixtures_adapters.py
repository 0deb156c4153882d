"""Small sites and plain NumPy loops that the tests of adapters compare with."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.sites import SiteShape
from mos_jax.models.known import KNOWN_CONFIGS

# Widths divisible by 4; one input width, so that the types share what JAX compiles.
SITES = {"q_proj": SiteShape(3, 8, 12), "down_proj": SiteShape(3, 8, 4)}
# The same with only three of the model's five blocks adapted.
SOME_LAYERS = {name: SiteShape(3, site.d_in, site.d_out, (0, 2, 3)) for name, site in SITES.items()}
MODEL_LAYERS = 5


def model_sites(name: str) -> dict[str, SiteShape]:
    """All sites of a known model, for counts from shapes."""
    return {site: SiteShape(*shape) for site, shape in KNOWN_CONFIGS[name].site_shapes().items()}


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` for what is exact, or compared with a tolerance, however well XLA optimises it."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def split_trained(adapter: Adapter) -> Any:
    """The adapter's graph definition, trained state and frozen state."""
    return nnx.split(adapter, nnx.Param, ...)


def randomised(adapter: Adapter, seed: int = 0) -> Any:
    """The adapter with all its trained arrays redrawn, so that no factor is zero."""
    graphdef, trained, frozen = split_trained(adapter)
    random = np.random.default_rng(seed)
    trained = jax.tree.map(
        lambda leaf: jax.numpy.asarray(random.normal(size=leaf.shape), leaf.dtype), trained
    )
    return nnx.merge(graphdef, trained, frozen)


def trained_arrays(adapter: Adapter) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(adapter, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}


def frozen_arrays(adapter: Adapter) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(adapter, nnx.Not(nnx.Param)))
    return {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}


def assembled_by_hand(
    pool: np.ndarray, table: np.ndarray, num_public: int, private_rank: int
) -> np.ndarray:
    """All blocks' rank vectors [L, r, l w]: the public ones as routed, then each block's own.

    The private vectors are read from where they must lie, whatever the table says of them.
    """
    num_layers, rank, per_vector = table.shape
    blocks = []
    for k in range(num_layers):
        vectors = []
        for j in range(rank - private_rank):
            picks = [int(index) for index in table[k, j]]
            assert all(0 <= index < num_public for index in picks)
            vectors.append(np.concatenate([pool[index] for index in picks]))
        for j in range(private_rank):
            first = num_public + (k * private_rank + j) * per_vector
            vectors.append(np.concatenate([pool[first + i] for i in range(per_vector)]))
        blocks.append(np.stack(vectors))
    return np.stack(blocks)
