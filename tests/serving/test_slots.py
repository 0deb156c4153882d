import random

import pytest

from mos_jax.errors import InputError
from mos_jax.serving.slots import Slots


def test_the_one_used_longest_ago_gives_way_and_never_one_in_use():
    slots = Slots(2, "tests")
    for name in "ab":
        slots.pin(name)
        slots.give(name)
    with pytest.raises(InputError, match="no slot for 'c': all 2 slots of tests belong to tenants"):
        slots.pin("c")
    slots.pin("a")
    slots.unpin("a")
    with pytest.raises(InputError, match="no slot for 'c'"):
        slots.pin("c")  # 'a' has a use left
    slots.unpin("b")
    slots.unpin("a")
    slots.pin("c")
    assert slots.give("c") == 2
    assert (slots.place_of("a"), slots.place_of("b"), slots.evictions) == (1, None, 1)


def test_a_promise_counts_as_use():
    slots = Slots(1, "tests")
    slots.pin("a")
    slots.give("a")
    slots.unpin("a")
    slots.pin("b")  # promised, not given
    with pytest.raises(InputError, match="no slot for 'a'"):
        slots.pin("a")
    assert slots.give("b") == 1
    assert slots.place_of("a") is None


def test_random_use_keeps_every_pinned_tenant_and_shares_no_slot():
    rng, slots, pins = random.Random(0), Slots(3, "tests"), {}
    for _ in range(3000):
        name = rng.choice("abcdefg")
        if rng.random() < 0.5:
            if name not in pins and len(pins) == 3:
                with pytest.raises(InputError):
                    slots.pin(name)
                continue
            slots.pin(name)
            pins[name] = pins.get(name, 0) + 1
            if slots.place_of(name) is None:
                slots.give(name)
        elif name in pins:
            slots.unpin(name)
            pins[name] -= 1
            if not pins[name]:
                del pins[name]
        elif rng.random() < 0.2:
            slots.forget(name)
        places = {n: slots.place_of(n) for n in "abcdefg" if slots.place_of(n) is not None}
        assert set(pins) <= set(places)
        assert len(set(places.values())) == len(places) == slots.resident
        assert set(places.values()) <= {1, 2, 3}
        assert {n: slots.pins(n) for n in pins} == pins
    assert slots.evictions > 20
