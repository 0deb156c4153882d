import gc
import json
import shutil
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax import InputError, LoRAConfig, MoSConfig, save_adapter
from mos_jax.adapters.bank import BASE_NAME
from mos_jax.adapters.factor_slots import write_slot
from mos_jax.interop.peft import export_peft
from mos_jax.serving import kinds, lanes, slabs, tenants
from mos_jax.serving.options import BankOptions
from mos_jax.serving.tenants import TenantBank
from tests.adapters.fixtures_adapters import quick_jit
from tests.models.fixtures_decoder import filled_adapter, plain_logits, tokens_of
from tests.serving.fixtures_tenants import (
    DECODER,
    FINGERPRINT,
    LORA,
    MOS,
    bank_of,
    tenants_in,
)

WIDTH = MoSConfig(2, 2, pool_scope="width", rank_scaling=True)
ROWS = ["c", "a", BASE_NAME, "b", "d", "e"]


@quick_jit
def logits_of(tokens, rows):
    return DECODER(tokens, rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two of a kind of MoS, one of another kind, a LoRA and a PEFT folder; see `adapters`."""
    folder = tmp_path_factory.mktemp("tenants")
    made = tenants_in(folder, a=MOS, b=MOS, c=LORA, d=WIDTH)
    peft = filled_adapter({"v_proj": DECODER.sites["v_proj"]}, LORA, 9)
    export_peft(folder / "e", peft.factors(), base_name="tiny-random", num_layers=2)
    return folder, {**made, "e": peft}


@pytest.fixture
def opened(folder, request):
    bank, refused = bank_of(folder[0], **getattr(request, "param", {}))
    assert refused == {}
    yield bank, folder[1]
    bank.close()


class TestRows:
    @pytest.mark.parametrize("opened", [{}, {"assembly": "inside"}], indirect=True)
    def test_each_rows_factors_are_its_own_to_the_bit(self, opened):
        bank, adapters = opened
        with bank.using(*ROWS):
            rows = bank.for_rows(ROWS)
            for layer in range(2):
                block = rows(layer)
                for row, name in enumerate(ROWS):
                    own = {} if name == BASE_NAME else adapters[name].factors(layer)
                    for site, f in block.items():
                        rank = own[site].rank if site in own else 0
                        if rank:
                            np.testing.assert_array_equal(f.a[row, :rank], own[site].a)
                            np.testing.assert_array_equal(f.b[row, :rank], own[site].b)
                        assert f.scale[row] == (own[site].scale if rank else 0)
                        assert not np.any(f.a[row, rank:])
                        assert not np.any(f.b[row, rank:])

    @pytest.mark.parametrize("opened", [{}, {"assembly": "inside"}], indirect=True)
    def test_logits_are_those_of_the_adapter_alone_whoever_its_neighbours_are(self, opened):
        bank, adapters = opened
        tokens = tokens_of(DECODER, rows=6)
        with bank.using(*ROWS):
            mixed = logits_of(tokens, bank.for_rows(ROWS))
            for row in (1, 3):  # to the bit, in another company and in none
                alone = [BASE_NAME] * 6
                alone[row] = ROWS[row]
                np.testing.assert_array_equal(
                    logits_of(tokens, bank.for_rows(alone))[row], mixed[row]
                )
            assert logits_of._cache_size() <= 2  # one for each form: no tenant compiles
        np.testing.assert_array_equal(
            mixed[2], logits_of(tokens, bank.for_rows([BASE_NAME] * 6))[2]
        )
        for row, name in enumerate(ROWS):
            factors = None if name == BASE_NAME else adapters[name].factors()
            want = plain_logits(DECODER, tokens[row], factors)
            np.testing.assert_allclose(mixed[row], want, atol=1e-4)

    @pytest.mark.parametrize("opened", [{"dtype": "bfloat16"}], indirect=True)
    def test_a_bank_in_bf16_rounds_pools_and_nothing_else(self, opened):
        bank, adapters = opened
        with bank.using("a", "d"):
            block = bank.for_rows(["a", "d"])(1)
        for row, name in enumerate("ad"):
            for site, f in adapters[name].factors(1).items():
                near = lambda x: np.asarray(x.astype(jnp.bfloat16), np.float32)  # noqa: E731
                np.testing.assert_array_equal(block[site].b[row, : f.rank], near(f.b))

    def test_one_kind_alone_reads_only_the_shards_it_uses(self, tmp_path):
        """The slab is gathered from as a whole: no pool of a tenant is copied."""
        tenants_in(tmp_path, a=MOS)
        bank, _ = bank_of(tmp_path, slots=3, assembly="inside")
        with bank.using("a"):
            rows = bank.for_rows(["a", "a"])
        text = jax.jit(lambda rows: rows(jnp.int32(0))).lower(rows).as_text()
        gathered = [line for line in text.splitlines() if "stablehlo.gather" in line]
        pools = [line for line in gathered if "f32" in line]
        assert len(pools) == 2 * len(DECODER.sites)
        for line in pools:
            result = line.rsplit("-> tensor<", 1)[1]
            assert result.startswith("2x3x2x")  # rows, rank, shards of a vector
        bank.close()

    def test_what_for_rows_refuses(self, opened):
        bank, _ = opened
        for rows in ([], "abc"):
            with pytest.raises(InputError, match="needs a list of names"):
                bank.for_rows(rows)
        with pytest.raises(InputError, match="no tenant 'zz'"):
            bank.for_rows(["zz"])
        with pytest.raises(InputError, match="'a' is not ready; request it"):
            bank.for_rows(["a"])
        with bank.using("a"):
            bank.for_rows(["a"])
        with pytest.raises(InputError, match="'a' is not ready"):
            bank.for_rows(["a"])  # nothing holds it any more


class TestTiers:
    @pytest.fixture
    def many(self, tmp_path):
        adapters = tenants_in(tmp_path, a=MOS, b=MOS, c=MOS)
        bank, _ = bank_of(tmp_path, slots=2, assembly="inside")
        yield bank, adapters, tmp_path
        bank.close()

    def test_a_tenant_in_use_is_never_evicted(self, many):
        bank, adapters, _ = many
        with bank.using("a"):
            with bank.using("b"):
                with pytest.raises(InputError, match="all 2 slots of this kind of MoS belong to"):
                    bank.request("c")
            with bank.using("c"):
                f = bank.for_rows(["a", "c"])(0)["q_proj"]
                np.testing.assert_array_equal(f.a[0], adapters["a"].factors(0)["q_proj"].a)
                np.testing.assert_array_equal(f.a[1], adapters["c"].factors(0)["q_proj"].a)
            assert not bank.is_resident("b")
        assert bank.summary()["slabs"][0]["evictions"] == 1

    def test_what_was_read_comes_back_from_host_memory_without_its_folder(self, many):
        bank, adapters, folder = many
        for name in "abc":
            with bank.using(name):
                pass
        shutil.rmtree(folder / "a")
        with bank.using("a"):
            f = bank.for_rows(["a"])(0)["q_proj"]
            np.testing.assert_array_equal(f.a[0], adapters["a"].factors(0)["q_proj"].a)
        assert bank.summary()["read"] == 3

    def test_host_memory_is_bounded(self, many):
        _, _, folder = many
        small = TenantBank(
            DECODER.sites, BankOptions(slots=1, host_bytes=40000), base_fingerprint=FINGERPRINT
        )
        small.register_folder(folder)
        for name in "abca":
            with small.using(name):
                assert small.host.nbytes <= 40000
        summary = small.summary()
        assert summary["host"] == {"tenants": 2, "bytes": 2 * summary["slabs"][0]["slot_bytes"]}
        assert summary["read"] == 4  # 'a' had given way
        small.close()

    def test_device_bytes_do_not_move(self, many):
        bank, _, _ = many
        bank.open()
        before = bank.nbytes
        for name in "abcb":
            with bank.using(name):
                assert bank.nbytes == before
        slab = bank.summary()["slabs"][0]
        assert slab["slot_bytes"] == 4 * filled_adapter(DECODER.sites, MOS).count_served()

    def test_reading_stops_nobody(self, many, monkeypatch):
        bank, _, _ = many
        go = threading.Event()
        read = lanes.read_tenant_arrays
        with bank.using("a"):

            def slow(*args):
                assert go.wait(60)
                return read(*args)

            monkeypatch.setattr(lanes, "read_tenant_arrays", slow)
            first, second = bank.request("b"), bank.request("b")
            assert bank.poll() == []
            rows = bank.for_rows(["a", BASE_NAME])  # goes on meanwhile
            assert not first.ready
            assert not second.ready
            with pytest.raises(InputError, match="'b' is in use"):
                bank.remove("b")
            go.set()
            assert bank.poll(timeout=60) == ["b"]
            assert first.ready
            assert second.ready
            # The write was made in the slab's own memory.
            assert all(leaf.is_deleted() for leaf in rows.params.values())
            for use in (first, second, second):
                use.release()

    def test_a_use_that_ends_before_it_was_read(self, many):
        bank, _, _ = many
        bank.request("a").release()
        deadline = time.monotonic() + 60
        while bank.summary()["loading"]:
            assert bank.poll(timeout=1) == []
            assert time.monotonic() < deadline
        assert not bank.is_resident("a")
        bank.remove("a")
        assert bank.names == ("b", "c")

    def test_a_closed_bank_reads_no_more(self, many):
        bank, _, _ = many
        with bank.using("a"):
            pass
        bank.close()
        with bank.using("a"):
            assert bank.for_rows(["a"]) is not None
        with pytest.raises(InputError, match="the bank is closed and reads no more"):
            bank.request("b")
        assert bank.summary()["slabs"][0]["in_use"] == 0

    def test_programs_are_compiled_once_whoever_comes(self, many):
        bank, _, _ = many
        tokens = tokens_of(DECODER, rows=2, length=3)
        run = quick_jit(lambda t, f: DECODER(t, f))
        for pair in ("ab", "bc", "ca"):
            with bank.using(*pair):
                run(tokens, bank.for_rows(list(pair)))
        writes = slabs._write._cache_size()
        for pair in ("ab", "ca"):
            with bank.using(*pair):
                run(tokens, bank.for_rows([pair[0], BASE_NAME]))
        assert run._cache_size() == 1
        assert slabs._write._cache_size() == writes

    def test_a_batch_beyond_the_cache_is_refused_and_a_swapped_tenant_assembled_again(
        self, tmp_path
    ):
        adapters = tenants_in(tmp_path, a=MOS, b=MOS)
        bank, _ = bank_of(tmp_path, slots=2, assembly="cached", cached=1)
        with bank.using("a", "b"):
            with pytest.raises(InputError, match="a batch of 2 tenants does not fit a cache of 1"):
                bank.for_rows(["a", "b"])
            for name in "abba":
                f = bank.for_rows([name])(1)["k_proj"]
                np.testing.assert_array_equal(f.b[0], adapters[name].factors(1)["k_proj"].b)
            before = bank.for_rows(["a"])
            bank.for_rows(["b"])  # entered in the cache's own memory
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.bank))
        assert bank.summary()["assembled"] == 4
        bank.remove("a")
        save_adapter(tmp_path / "a", adapters["b"], base_fingerprint=FINGERPRINT)
        bank.register("a", tmp_path / "a")
        with bank.using("a"):
            f = bank.for_rows(["a"])(1)["k_proj"]
            np.testing.assert_array_equal(f.b[0], adapters["b"].factors(1)["k_proj"].b)
        bank.close()


class Unsearchable(dict):
    """A dictionary that nobody looks through."""

    def _refuse(self, *_):
        raise AssertionError("all tenants are looked at")

    __iter__ = keys = values = items = _refuse


def test_load_swap_and_unload_cost_the_same_however_many_are_known(tmp_path, monkeypatch):
    """Lines of Python run, in the thread of the decoder, and no look through the tenants."""
    tenants_in(tmp_path, a=MOS, b=MOS)
    keys = {name: kinds.read_key(tmp_path / name, DECODER.sites, FINGERPRINT) for name in "ab"}
    monkeypatch.setattr(tenants, "read_key", lambda path, *_: keys[path.name])

    def cost(known):
        bank, _ = bank_of(tmp_path, slots=1)
        for i in range(known):
            bank.register(f"t{i}", tmp_path / "ab"[i % 2])
        bank.open()
        bank._tenants = Unsearchable(bank._tenants)
        with bank.using("a"):  # compiles
            pass
        lines = 0

        def trace(frame, event, _):
            nonlocal lines
            ours = "mos_jax/serving" in frame.f_code.co_filename
            lines += ours and event == "line"
            return trace if ours else None

        for name in ("b", "t0"):
            sys.settrace(trace)
            try:
                use = bank.request(name)
            finally:
                sys.settrace(None)
            while not bank._loader._ready.qsize():
                time.sleep(0.001)
            sys.settrace(trace)
            try:
                assert bank.poll() == [name]
                use.release()
                bank.remove(name)
            finally:
                sys.settrace(None)
        bank.close()
        return lines

    few = cost(10)
    assert few > 40
    assert cost(10_000) == few


class TestRefusals:
    def test_broken_and_foreign_adapters_are_refused_by_name_and_the_rest_goes_on(self, tmp_path):
        tenants_in(tmp_path, good=MOS, torn=MOS, lost=MOS, other=MOS, table=MOS)
        (tmp_path / "torn/adapter.json").write_text("{")
        (tmp_path / "empty").mkdir()
        (tmp_path / "a file").touch()
        (tmp_path / "two words").mkdir()
        save_adapter(
            tmp_path / "other", filled_adapter(DECODER.sites, MOS), base_fingerprint="e" * 64
        )
        (tmp_path / "lost/adapter.safetensors").write_bytes(b"no tensors")
        card = json.loads((tmp_path / "table/adapter.json").read_text())
        card["routing_checksum"] = "0" * 64
        (tmp_path / "table/adapter.json").write_text(json.dumps(card))
        bank, refused = bank_of(tmp_path)
        assert set(refused) == {"torn", "empty", "other", "two words", "table"}
        assert "another base" in refused["other"]
        assert "routing tables have checksum" in refused["table"]
        assert "1 to 64 letters" in refused["two words"]
        use = bank.request("lost")
        with bank.using("good"):
            assert bank.for_rows(["good"]) is not None
        assert "SHA-256 differs" in str(use.error)
        assert not use.ready
        with pytest.raises(InputError, match="SHA-256 differs"), bank.using("lost"):
            pass
        # Its slot is nobody's: as many can be used as there are slots.
        assert bank.summary()["slabs"][0]["in_use"] == 0
        bank.remove("lost")
        bank.close()

    @pytest.mark.parametrize(
        "name", ["", "..", "../a", "a/b", "a\\b", BASE_NAME, ".a", "a b", "é", "a" * 65, "a\n", 3]
    )
    def test_names(self, tmp_path, name):
        bank = TenantBank(DECODER.sites)
        with pytest.raises(InputError, match="name of a tenant has 1 to 64 letters"):
            bank.register(name, tmp_path)

    def test_a_card_that_changes_kind_after_it_was_registered(self, tmp_path):
        tenants_in(tmp_path, a=MOS, b=MOS)
        bank, _ = bank_of(tmp_path)
        other = filled_adapter(DECODER.sites, MoSConfig(2, 3, 2, 1, routing_seed=1))
        save_adapter(tmp_path / "b", other, base_fingerprint=FINGERPRINT)
        with pytest.raises(InputError, match="another configuration or routing"), bank.using("b"):
            pass
        bank.close()

    @pytest.mark.parametrize("name", ["a", "c", "e"], ids=["pools", "factors", "peft"])
    def test_other_weights_in_a_folder_are_refused_until_it_is_registered_again(
        self, folder, tmp_path, name
    ):
        shutil.copytree(folder[0] / name, tmp_path / name)
        bank, _ = bank_of(tmp_path, host_bytes=0)
        before = bank.registration(name)
        with bank.using(name):
            pass
        bank.open()
        shutil.rmtree(tmp_path / name)
        if name == "e":
            other = filled_adapter({"v_proj": DECODER.sites["v_proj"]}, LORA, 5)
            export_peft(tmp_path / "e", other.factors(), base_name="tiny-random", num_layers=2)
        else:
            other = filled_adapter(DECODER.sites, MOS if name == "a" else LORA, 5)
            save_adapter(tmp_path / name, other, base_fingerprint=FINGERPRINT)
        lane = next(iter(bank._lanes.values()))
        lane.slots.forget(name)  # as if others had taken its slot
        with pytest.raises(InputError, match="has changed on disk since it"), bank.using(name):
            pass
        bank.remove(name)
        bank.register(name, tmp_path / name)
        assert bank.registration(name) != before
        with bank.using(name):
            f = bank.for_rows([name])(1)["v_proj"]
            np.testing.assert_array_equal(f.b[0], other.factors(1)["v_proj"].b)
        bank.close()

    def test_the_scale_of_a_lora_is_part_of_it(self, tmp_path):
        tenants_in(tmp_path, a=LORA)
        bank, _ = bank_of(tmp_path)
        other = filled_adapter(DECODER.sites, LoRAConfig(rank=2, alpha=40), 0)
        save_adapter(tmp_path / "a", other, base_fingerprint=FINGERPRINT)
        with pytest.raises(InputError, match="has changed on disk since it"), bank.using("a"):
            pass
        bank.close()

    def test_an_open_bank_takes_what_fits_as_factors_and_refuses_the_rest(self, tmp_path):
        tenants_in(tmp_path, a=MOS)
        bank, _ = bank_of(tmp_path, factor_rank=2)
        bank.open()
        adapter = tenants_in(tmp_path / "more", fits=WIDTH, wide=MoSConfig(2, 3))["fits"]
        bank.register("fits", tmp_path / "more/fits")
        with pytest.raises(InputError, match=r"'wide' has factors of rank 3 .* factor_rank=3"):
            bank.register("wide", tmp_path / "more/wide")
        with bank.using("fits", "a"):
            f = bank.for_rows(["a", "fits"])(1)["o_proj"]
            np.testing.assert_array_equal(f.b[1, :2], adapter.factors(1)["o_proj"].b)
        bank.close()

    def test_a_kind_is_known_as_long_as_it_has_tenants_or_a_slab(self, tmp_path):
        tenants_in(tmp_path, a=MOS)
        bank, _ = bank_of(tmp_path, factor_rank=2, host_bytes=0)
        bank.open()
        more = tmp_path / "more"
        tenants_in(more, one=WIDTH, two=WIDTH, torn=MoSConfig(2, 2))
        (more / "torn/adapter.safetensors").write_bytes(b"no tensors")
        gc.collect()
        arrays = len(jax.live_arrays())
        for _ in range(2):
            bank.register("one", more / "one", read=True)
            bank.register("two", more / "two")
            assert len(bank._kinds) == 2
            gc.collect()
            assert len(jax.live_arrays()) == arrays  # its routing tables are nowhere
            bank.remove("one")
            assert len(bank._kinds) == 2
            bank.remove("two")
            assert len(bank._kinds) == 1
        with pytest.raises(InputError, match="SHA-256 differs"):
            bank.register("torn", more / "torn", read=True)
        with pytest.raises(InputError, match="a tenant 'a' already"):
            bank.register("a", more / "one", read=True)
        assert len(bank._kinds) == 1
        bank.remove("a")
        bank.register("a", tmp_path / "a", read=True)
        with bank.using("a"):
            assert bank.summary()["slabs"][0]["in_use"] == 1
        bank.close()

    def test_options_and_unknown_names(self, tmp_path):
        for options in ({"slots": 0}, {"assembly": "both"}, {"dtype": "int8"}, {"cached": True}):
            with pytest.raises(InputError, match="bank: "):
                BankOptions(**options)
        bank = TenantBank(DECODER.sites)
        assert bank.for_rows([BASE_NAME]) is None
        for call in (bank.request, bank.remove):
            with pytest.raises(InputError, match="no tenant 'a'"):
                call("a")
        with pytest.raises(InputError, match="is not a folder"):
            bank.register_folder(tmp_path / "none")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [MOS, LORA], ids=["pools", "factors"])
def test_a_write_touches_its_slot_and_not_the_slab(config, dtype):
    adapter, slots = filled_adapter(DECODER.sites, config, 0), 200
    if config is MOS:
        slab = slabs.PoolSlab(adapter, slots, dtype)
        program, entry = slabs._write, slab.entry_of(adapter)
        whole = slab._rows.params
    else:
        slab = slabs.FactorSlab(DECODER.sites, slots, dict.fromkeys(DECODER.sites, 2), dtype)
        program, entry = write_slot, slab.entry("x", adapter.factors())
        whole = slab.source
    compiled = program.lower(whole, jnp.int32(3), entry).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2 * slab.slot_bytes
    assert memory.alias_size_in_bytes >= slots * slab.slot_bytes  # in the slab's own memory
