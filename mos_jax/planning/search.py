"""Meshes, batches and remat policies of a run on a slice, ranked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mos_jax.errors import InputError, suggest
from mos_jax.models.config import DecoderConfig
from mos_jax.models.remat import REMAT_POLICIES
from mos_jax.planning.chips import Slice, find_slice
from mos_jax.planning.plan import Compiles, Plan, make_plan
from mos_jax.planning.request import Request
from mos_jax.planning.resolving import place_on


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What a search found.

    Attributes:
      plans: those tried, the most tokens a second first, then those that do not fit, then those
        that are refused for something else than memory.
      untried: settings that were left out, since `tries` were compiled.
    """

    plans: list[Plan]
    untried: list[Request]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "plans": [plan.to_dict() for plan in self.plans],
            "untried": len(self.untried),
        }

    @property
    def best(self) -> Plan | None:
        """The first of those that fit."""
        return self.plans[0] if self.plans and self.plans[0].fits else None


def check_search(request: Request, rows: Sequence[int], remat: Sequence[str]) -> None:
    """Raises InputError for batches that no mesh divides, or an unknown policy."""
    for policy in remat:
        if policy not in REMAT_POLICIES:
            raise InputError(
                f"--remat: unknown policy {policy!r}; {suggest(policy, REMAT_POLICIES)}"
            )
    for batch in rows:
        if batch < 1:
            raise InputError(f"--rows must be 1 or more, got {batch}")
    if not candidates(request, rows, remat):
        raise InputError(
            f"no mesh of {request.topology} divides these rows and the model's "
            f"{' and '.join(map(str, _columns(request.model)))} columns; try other --rows"
        )


def candidates(
    request: Request, rows: Sequence[int] = (), remat: Sequence[str] = ()
) -> list[Request]:
    """All settings of a search, those that promise most first.

    Every mesh of the slice whose data * fsdp divides the rows and whose tensor divides the layers.

    Args:
      request: the run.
      rows: batches to try; default: the run's, twice and four times as many.
      remat: policies to try; default: all but "none".
    """
    chips = find_slice(request.topology)
    config = request.config
    rows = tuple(rows) or tuple(config.data.batch_size * times for times in (1, 2, 4))
    policies = tuple(remat) or tuple(p for p in REMAT_POLICIES if p != "none")
    found = []
    for batch in rows:
        data = dataclasses.replace(config.data, batch_size=batch)
        for sizes in meshes(chips, batch, request.model):
            placed = place_on(dataclasses.replace(config, data=data), sizes, chips)
            for policy in policies:
                base = dataclasses.replace(config.base, remat=policy)
                whole = dataclasses.replace(placed, base=base)
                found.append(dataclasses.replace(request, config=whole))
    return sorted(found, key=guessed_seconds)


def meshes(chips: Slice, rows: int, model: DecoderConfig) -> Iterator[tuple[int, int, int]]:
    """Sizes of data, fsdp and tensor that fill the slice and divide rows and layers.

    Heads that tensor does not divide rule no mesh out, since with few rows there may be no other:
    attention is then whole on every chip, which `guessed_seconds` counts.
    """
    for tensor in _divisors(chips.count):
        for fsdp in _divisors(chips.count // tensor):
            data = chips.count // tensor // fsdp
            fits = all(size % tensor == 0 for size in _columns(model))
            if rows % (data * fsdp) == 0 and fits:
                yield data, fsdp, tensor


def _columns(model: DecoderConfig) -> tuple[int, int]:
    """Outputs of the layers before attention and before the MLP's activation."""
    return model.num_heads * model.head_dim, model.d_ff


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


# How often the products of the base run: forward, backward, and what is computed again, of which
# the MLP's are two thirds.
_PASSES = {"none": 2.0, "products": 2.0, "attention": 2.7, "full": 3.0}


def guessed_seconds(request: Request) -> float:
    """Seconds for each token by a rule of thumb, to choose what is compiled first.

    Products of the base, those that are computed again included, and of attention; its weights
    gathered over fsdp twice a step; activations summed over tensor four times a layer. Where tensor
    does not divide the heads, every chip attends with all of them, which it gathers.
    """
    chips, c, mesh = find_slice(request.topology), request.model, request.config.mesh
    chip = chips.chip
    weights = sum(layers * h * o for layers, h, o in c.site_shapes().values())
    passes = _PASSES[request.config.base.remat]
    batch = request.rows * request.width
    width, own = c.num_heads * c.head_dim, batch // (mesh.data * mesh.fsdp)
    divided = c.num_heads % mesh.tensor == 0
    # Scores and their products with values, forward, backward twice, and computed again.
    attention = 4.0 * 4 * c.num_layers * width * request.width * own
    attention /= mesh.tensor if divided else 1
    compute = (passes * 2 * weights * batch / chips.count + attention) / chip.flops
    itemsize = 2 if request.config.base.dtype == "bfloat16" else 4
    gathered = 2 * weights * itemsize / mesh.tensor * (mesh.fsdp - 1) / mesh.fsdp
    passed = 2 * (mesh.tensor - 1) / mesh.tensor
    summed = 4 * c.num_layers * own * c.d_model * itemsize * passed
    # Queries, keys and values, and the gradient of what is attended.
    heads = 0 if divided else 4 * c.num_layers * own * width * itemsize * passed / 2
    links = (gathered + summed + heads) / chip.axis_bandwidth
    return max(compute, links) / batch


def search(
    request: Request,
    compiler: Compiles,
    tries: int,
    rows: Sequence[int] = (),
    remat: Sequence[str] = (),
    told: Callable[[Plan], None] = lambda plan: None,
) -> Ranking:
    """Compiles the most promising settings and ranks them by the least time of a token.

    Args:
      request: the run.
      compiler: of its steps.
      tries: how many to compile at most; settings whose arrays alone are too much do not count.
      rows: batches to try; see `candidates`.
      remat: policies to try; see `candidates`.
      told: is called with every plan.
    """
    plans: list[Plan] = []
    left = candidates(request, rows, remat)
    compiled = 0
    while left and compiled < tries:
        plan = make_plan(left.pop(0), compiler, compile_all=False)
        compiled += plan.program is not None
        plans.append(plan)
        told(plan)
    return Ranking(sorted(plans, key=_rank), left)


def _rank(plan: Plan) -> tuple[int, float]:
    if plan.estimate is not None:
        return 0, -plan.estimate.tokens_per_second[1]
    return (2, 0.0) if plan.excess is None else (1, plan.excess)
