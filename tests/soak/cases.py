"""Random requests, good and bad, and what may become of them."""

import dataclasses
import random

from mos_jax import InputError
from mos_jax.adapters.bank import BASE_NAME
from mos_jax.serving.requests import Request, TokenSampling

STOPS = ("e", "th", "\n", "\u00e9", "nothing like it")


@dataclasses.dataclass
class Case:
    """One request.

    Attributes:
      request: what is submitted.
      behaviour: of its client, see `ledger.ALLOWED`.
      after: events after which the client vanishes, or its listener raises.
      refusals: codes that it may be refused with; a malformed one must be.
      malformed: whether it must be refused.
    """

    request: Request
    behaviour: str = "read"
    after: int = 0
    refusals: frozenset = frozenset()
    malformed: bool = False


def random_case(rng: random.Random, names, broken, length, vocabulary):
    """A case.

    Args:
      rng: of all choices.
      names: of tenants that can be used; a few get most of the requests.
      broken: names of tenants whose folder is gone or damaged, or that come and go.
      length: positions of a row.
      vocabulary: number of ids.
    """
    if rng.random() < 0.15:
        return malformed(rng, names, length, vocabulary)
    busy = {"queue_full"}
    if broken and rng.random() < 0.1:
        tenant, behaviour = rng.choice(broken), "broken"
        busy.add("unknown_tenant")
    else:
        rank = min(int(rng.paretovariate(0.8)) - 1, len(names))
        tenant = [*names, BASE_NAME][rank]
        behaviour = rng.choices(("read", "vanish", "raise", "timeout"), (70, 15, 5, 10))[0]
    sampling = TokenSampling(
        max_tokens=rng.choice((1, 2, 8, 24)),
        temperature=rng.choice((0.0, 0.0, 0.5, 1.5)),
        top_p=rng.choice((1.0, 0.9, 0.1)),
        top_k=rng.choice((0, 0, 1, 5)),
        seed=rng.choice((None, rng.randrange(1 << 32))),
        stop=tuple(rng.sample(STOPS, rng.choice((0, 0, 1, 3)))),
        logprobs=rng.choice((None, None, 0, 3)),
    )
    size = rng.choice((1, 2, 7, 20, length - sampling.max_tokens))
    prompt = tuple(rng.randrange(vocabulary) for _ in range(size))
    timeout = rng.choice((0.001, 0.05, 0.5)) if behaviour == "timeout" else None
    request = Request(tenant, prompt, sampling, timeout)
    return Case(request, behaviour, rng.randrange(4), frozenset(busy))


def malformed(rng: random.Random, names, length, vocabulary):
    """One that must be refused, and how."""
    good = tuple(rng.randrange(vocabulary) for _ in range(3))
    tenant = rng.choice(names)
    cases = (
        (tenant, (), "invalid", None),
        (tenant, (*good, vocabulary), "invalid", None),
        (tenant, (-1,), "invalid", None),
        (tenant, (1 << 40,), "invalid", None),
        (tenant, ("a",), "invalid", None),
        (tenant, good, "invalid", -1.0),
        (tenant, good, "invalid", float("nan")),
        (tenant, good * length, "too_long", None),
        ("nobody", good, "unknown_tenant", None),
        ("../etc/passwd", good, "unknown_tenant", None),
        ("x" * 500, good, "unknown_tenant", None),
        ("", good, "unknown_tenant", None),
    )
    name, prompt, code, timeout = rng.choice(cases)
    return Case(
        Request(name, prompt, TokenSampling(max_tokens=4), timeout),
        refusals=frozenset({code}),
        malformed=True,
    )


def check_sampling_refusals(rng: random.Random):
    """Sampling that is nonsense is refused where it is made. Returns how often."""
    bad = (
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -3},
        {"seed": 1 << 40},
        {"stop": ("",)},
        {"logprobs": 99},
    )
    try:
        TokenSampling(**rng.choice(bad))
    except InputError:
        return 1
    raise AssertionError("nonsense was accepted")
