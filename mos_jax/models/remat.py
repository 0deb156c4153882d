"""What a block keeps for its backward pass, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# The outputs of the large products, so that none of those runs twice; everything else is cheap to
# compute again. "down" only where a norm comes after it.
SAVED = ("q", "k", "v", "attended", "middle", "gate", "up", "down", "low_rank")
# Not the MLP's, the widest: its products run twice.
NARROW = ("q", "k", "v", "attended", "middle", "down", "low_rank")
_NAMES = {"products": SAVED, "attention": NARROW, "full": ()}
REMAT_POLICIES = ("none", *_NAMES)


def remat_policy(name: str, attention: str) -> Callable[..., Any]:
    """The policy for `jax.checkpoint`.

    Args:
      name: one of `REMAT_POLICIES` but "none", which has none.
      attention: the implementation, as `choose_attention` returned it.
    """
    policies = jax.checkpoint_policies
    names = _NAMES[name]
    if attention != "cudnn" or not names:
        return policies.save_only_these_names(*names)
    # Its backward kernel takes what the forward kernel returned besides the output, and that has
    # no name; so both are kept as they leave the kernel.
    others = policies.save_only_these_names(*(n for n in names if n != "attended"))
    return policies.save_from_both_policies(others, _leaves_cudnn)


def _leaves_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    return str(primitive).startswith("dot_product_attention_fwd")
