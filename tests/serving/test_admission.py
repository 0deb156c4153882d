"""Turns when tenants share few slots, on a bank without a device."""

import collections
import types

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mos_jax import InputError
from mos_jax.adapters.bank import BASE_NAME
from mos_jax.serving.admission import Admission
from mos_jax.serving.slots import Slots
from mos_jax.serving.uses import Use


class FakeBank:
    """Slots by slab, the first letter of a tenant's name, and reading that takes some ticks."""

    def __init__(self, slots, reading=0):
        self.slots = collections.defaultdict(lambda: Slots(slots, "tests"))
        self.reading, self.loading = reading, {}
        self.broken, self.removed = set(), set()

    def slab_of(self, name):
        if name in self.removed:
            raise InputError(f"no tenant {name}")
        return name[0]

    def request(self, name):
        slots = self.slots[self.slab_of(name)]
        slots.pin(name)
        use = Use(
            lambda name: slots.place_of(name) is not None, lambda use: slots.unpin(name), name
        )
        if slots.place_of(name) is None:
            self.loading.setdefault(name, (self.reading, []))[1].append(use)
            self.tick(0)
        return use

    def tick(self, ticks=1):
        for name, (left, uses) in list(self.loading.items()):
            if left - ticks > 0:
                self.loading[name] = left - ticks, uses
                continue
            del self.loading[name]
            for use in uses if name in self.broken else ():
                use.error = InputError(f"{name} is broken")
                use.release()
            if name not in self.broken and self.slots[name[0]].pins(name):
                self.slots[name[0]].give(name)


class Server:
    """Rows whose answers take some ticks; what was admitted, in order."""

    def __init__(self, bank, rows, patience=None):
        self.bank, self.rows = bank, rows
        self.admission = Admission(bank, ahead=rows, patience=patience or rows)
        self.running, self.admitted, self.failed = [], [], []

    def add(self, tenant, ticks):
        slab = None if tenant == BASE_NAME else self.bank.slab_of(tenant)
        job = types.SimpleNamespace(tenant=tenant, ticks=ticks, use=None, slab=slab)
        self.admission.add(job)
        return job

    def tick(self):
        for job in list(self.running):
            job.ticks -= 1
            if job.ticks <= 0:
                self.running.remove(job)
                self.admission.release(job)
        self.bank.tick()
        while True:
            failed = self.admission.ask()
            for job, error in failed:
                self.failed.append((job, str(error)))
                self.admission.remove(job)
                self.admission.release(job)
            job = self.admission.next() if len(self.running) < self.rows and not failed else None
            if job is not None:
                self.running.append(job)
                self.admitted.append(job)
            elif not failed:
                return

    def until(self, job, ticks):
        """Ticks until a job is admitted, at most so many."""
        for n in range(ticks):
            self.tick()
            if job in self.admitted:
                return n
        raise AssertionError(f"not admitted within {ticks} ticks")


class TestWithSlotsEnough:
    @given(
        waiting=st.dictionaries(st.sampled_from(["a", "a2", "b", BASE_NAME]), st.integers(1, 200)),
        rows=st.integers(1, 4),
        ticks=st.integers(1, 3),
    )
    def test_one_request_sees_one_admission_of_each_tenant_before_it(self, waiting, rows, ticks):
        server = Server(FakeBank(slots=16), rows)
        for tenant, count in waiting.items():
            for _ in range(count):
                server.add(tenant, ticks)
        one = server.add("a1", ticks)
        server.until(one, 50)
        before = collections.Counter(job.tenant for job in server.admitted)
        before = collections.Counter(
            job.tenant for job in server.admitted[: server.admitted.index(one)]
        )
        assert set(before) <= set(waiting)
        assert all(count == 1 for count in before.values())

    def test_one_that_is_read_keeps_its_turn_and_stops_nobody(self):
        server = Server(FakeBank(slots=8, reading=5), rows=2)
        slow = server.add("a", 1)
        others = [server.add(BASE_NAME, 1) for _ in range(20)]
        assert server.until(slow, 20) == 5
        # Of the others two in each tick before; then the one that waited comes first.
        assert server.admitted.index(slow) == 10
        assert server.admitted[:10] == others[:10]

    def test_tenants_are_read_ahead_while_all_rows_are_taken(self):
        server = Server(FakeBank(slots=8, reading=3), rows=2)
        long = [server.add(BASE_NAME, 10) for _ in range(2)]
        server.tick()
        ones = [server.add(f"a{n}", 1) for n in range(4)]
        for _ in range(9):
            server.tick()
        assert server.admitted == long
        assert [job.use is not None and job.use.ready for job in ones] == [True, True, False, False]
        server.tick()
        assert server.admitted == long + ones[:2]


class TestWithFewSlots:
    @settings(max_examples=60)
    @given(
        slots=st.integers(1, 3),
        rows=st.integers(1, 4),
        greedy=st.integers(1, 4),
        longest=st.integers(1, 6),
        reading=st.integers(0, 2),
        data=st.data(),
    )
    @example(slots=1, rows=4, greedy=1, longest=5, reading=0, data=None)
    @example(slots=2, rows=4, greedy=2, longest=6, reading=1, data=None)
    def test_one_request_is_admitted_whatever_others_queue(
        self, slots, rows, greedy, longest, reading, data
    ):
        """The others never run out of requests; the bound is the one that admission.py states."""

        def ticks():
            return longest if data is None else data.draw(st.integers(1, longest))

        server = Server(FakeBank(slots, reading), rows)
        names = [f"a{n}" for n in range(greedy)]
        for _ in range(2 * rows):
            for name in names:
                server.add(name, ticks())
        for _ in range(3):
            server.tick()
        one, count = server.add("a one", 1), len(server.admitted)
        admission, lost, after = server.admission, None, collections.Counter()
        for _ in range((greedy + 2) * (rows + 4) * (longest + reading + 2)):
            start = len(server.admitted)
            server.tick()
            if one in server.admitted:
                break
            if lost is None and admission._passed.get("a", {}).get("a one", 0) >= rows:
                lost = admission._giving_way()
            elif lost is not None and one.use is None:
                after.update(job.tenant for job in server.admitted[start:])
            for name in names:
                while admission.queue.waiting(name) < 2 * rows:
                    server.add(name, ticks())
        assert one in server.admitted
        ahead = server.admitted[count : server.admitted.index(one)]
        if slots > greedy:
            # Its slot was there: only turns, and what was admitted while it was read.
            assert lost is None
            assert reading or len(ahead) <= greedy
        if lost:
            # Who gives way has at most what had been asked for before.
            assert all(after[name] <= 1 for name in lost)

    def test_only_as_many_give_way_as_wait(self):
        server = Server(FakeBank(slots=2), rows=4)
        for _ in range(60):
            server.add("a1", 3)
            server.add("a2", 3)
        server.tick()
        one, giving_way = server.add("a3", 3), set()
        while one not in server.admitted:
            giving_way |= server.admission._giving_way()
            before = len(server.admitted)
            server.tick()
            # While a1 leaves its rows, a2 takes them: none is empty.
            assert len(server.running) == 4
            assert not giving_way & {job.tenant for job in server.admitted[before:]}
        assert giving_way == {"a1"}
        assert not server.admission._giving_way()

    def test_a_tenant_that_waits_keeps_nobody_of_another_slab_waiting(self):
        server = Server(FakeBank(slots=1), rows=2)
        server.add("a1", 50)
        server.tick()
        blocked = server.add("a2", 1)
        others = [server.add(name, 1) for _ in range(20) for name in ("b1", BASE_NAME)]
        for _ in range(41):
            server.tick()
        assert blocked not in server.admitted
        assert all(job in server.admitted for job in others)
        server.until(blocked, 10)

    def test_cancelling_one_that_waits_lets_the_others_go_on(self):
        server = Server(FakeBank(slots=1), rows=2)
        for _ in range(40):
            server.add("a1", 2)
        blocked = server.add("a2", 1)
        while not server.admission._giving_way():
            server.tick()
        server.admission.remove(blocked)
        server.admission.release(blocked)
        assert not server.admission._giving_way()
        assert not server.admission.stuck
        for _ in range(60):
            server.tick()
        assert [job.tenant for job in server.admitted] == ["a1"] * 40
        assert server.bank.slots["a"].in_use == 0


class TestBroken:
    def test_each_request_of_a_broken_tenant_fails_and_no_other(self):
        bank = FakeBank(slots=1, reading=1)
        bank.broken.add("a1")
        server = Server(bank, rows=2)
        broken = [server.add("a1", 1) for _ in range(3)]
        good = server.add("a2", 1)
        server.until(good, 20)
        for _ in range(10):
            server.tick()
        assert [job for job, _ in server.failed] == broken
        assert {error for _, error in server.failed} == {"a1 is broken"}
        assert bank.slots["a"].in_use == 0

    def test_one_that_is_removed_while_it_waits_holds_up_nobody(self):
        server = Server(FakeBank(slots=1), rows=2)
        for _ in range(20):
            server.add("a1", 2)
        gone = server.add("a2", 1)
        while not server.admission._giving_way():
            server.tick()
        server.bank.removed.add("a2")
        for _ in range(30):
            server.tick()
        assert server.failed == [(gone, "no tenant a2")]
        assert len(server.admitted) == 20

    def test_slots_that_somebody_else_holds(self):
        bank = FakeBank(slots=1)
        other = bank.request("a1")
        server = Server(bank, rows=1)
        job = server.add("a2", 1)
        server.tick()
        assert server.admission.stuck
        other.release()
        server.tick()
        assert not server.admission.stuck
        assert server.admitted == [job]


@pytest.mark.parametrize("slots", [1, 2])
def test_all_are_served_where_all_queue_much(slots):
    """Tenants that share fewer slots than there are of them, each with as many requests."""
    server = Server(FakeBank(slots, reading=1), rows=4)
    for _ in range(12):
        for name in ("a1", "a2", "a3"):
            server.add(name, 3)
    for _ in range(200):
        server.tick()
    order = [job.tenant for job in server.admitted]
    assert collections.Counter(order) == dict.fromkeys(("a1", "a2", "a3"), 12)
    begun = max(order.index(name) for name in set(order))
    assert begun < min(len(order) - 1 - order[::-1].index(name) for name in set(order))
