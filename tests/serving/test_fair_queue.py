import collections

from hypothesis import given, settings
from hypothesis import strategies as st

from mos_jax.serving.fair_queue import FairQueue

TENANTS = "abcdef"


class TestTurns:
    def test_each_tenant_has_its_turn(self):
        queue = FairQueue()
        for n in range(3):
            queue.push("a", n)
        queue.push("b", 0)
        order = []
        while queue:
            tenant, item = next(queue.heads())
            order.append((tenant, item))
            assert queue.take(tenant) == item
        assert order == [("a", 0), ("b", 0), ("a", 1), ("a", 2)]

    @given(
        waiting=st.dictionaries(st.sampled_from(TENANTS), st.integers(1, 1000), max_size=6),
        later=st.lists(st.tuples(st.integers(0, 20), st.sampled_from(TENANTS)), max_size=30),
    )
    def test_one_request_sees_one_admission_of_each_tenant_before_it(self, waiting, later):
        queue = FairQueue()
        for tenant, count in waiting.items():
            for n in range(count):
                queue.push(tenant, n)
        queue.push("one", "the one")
        before = collections.Counter()
        admitted = None
        while admitted != "the one":
            for _, tenant in [entry for entry in later if entry[0] == sum(before.values())]:
                queue.push(tenant, "late")
            tenant, _ = next(queue.heads())
            admitted = queue.take(tenant)
            before[tenant] += 1
        del before["one"]
        assert set(before) <= set(waiting)
        assert all(count == 1 for count in before.values())


class TestAgainstLists:
    @settings(max_examples=60)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["push", "take", "remove"]),
                st.sampled_from(TENANTS),
                st.integers(0, 3),
            ),
            max_size=60,
        )
    )
    def test_any_operations(self, operations):
        queue, ring, items = FairQueue(), [], {}
        for count, (operation, tenant, n) in enumerate(operations):
            if operation == "push":
                queue.push(tenant, count)
                items.setdefault(tenant, []).append(count)
                ring += [tenant] if tenant not in ring else []
            elif operation == "take" and tenant in ring:
                assert queue.take(tenant) == items[tenant].pop(0)
                ring.remove(tenant)
                ring += [tenant] if items[tenant] else []
            elif operation == "remove":
                own = items.get(tenant, [])
                item = own[n] if n < len(own) else -1
                assert queue.remove(tenant, item) == (item in own)
                if item in own:
                    own.remove(item)
                    ring = [name for name in ring if items[name]]
            assert [name for name, _ in queue.heads()] == ring
            assert [item for _, item in queue.heads()] == [items[name][0] for name in ring]
            assert len(queue) == sum(map(len, items.values()))
            assert queue.tenants == len(ring)
            assert all(queue.waiting(name) == len(items.get(name, [])) for name in TENANTS)
            assert all((name in queue) == (name in ring) for name in TENANTS)
