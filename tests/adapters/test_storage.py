import dataclasses
import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import load_file, save_file
from safetensors.numpy import save as format_safetensors

from mos_jax.adapters import routing, storage
from mos_jax.adapters.adapter import Frozen
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.adapters.storage import (
    ARRAYS_FILE,
    CARD_FILE,
    adapter_arrays,
    load_adapter,
    read_card,
    save_adapter,
    with_arrays,
)
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import MODEL_LAYERS, SITES, SOME_LAYERS, randomised

CONFIG = MoSConfig(equivalent_rank=3, rank=5, shards_per_vector=2, private_rank=1)


@pytest.fixture(scope="module")
def adapter():
    return randomised(create_adapter(CONFIG, SITES, jax.random.key(0)))


@pytest.fixture
def folder(adapter, tmp_path):
    metadata = {"base": "tiny-base", "steps": 3}
    return save_adapter(tmp_path / "adapter", adapter, base_fingerprint="f" * 64, metadata=metadata)


def edit_card(folder, **changes):
    card = json.loads((folder / CARD_FILE).read_text())
    (folder / CARD_FILE).write_text(json.dumps({**card, **changes}))


def put_arrays_file(folder, payload):
    """Replaces the file of arrays and makes the card's hash agree."""
    (folder / ARRAYS_FILE).write_bytes(payload)
    edit_card(folder, arrays_sha256=hashlib.sha256(payload).hexdigest())


def edit_arrays(folder, change):
    arrays = {name: array.copy() for name, array in load_file(folder / ARRAYS_FILE).items()}
    change(arrays)
    put_arrays_file(folder, format_safetensors(arrays, {"format": storage.FORMAT}))


def assert_same_arrays(have, want):
    have, want = adapter_arrays(have), adapter_arrays(want)
    assert sorted(have) == sorted(want)
    for name in want:
        assert have[name].dtype == want[name].dtype
        np.testing.assert_array_equal(have[name], want[name])


class TestWhatIsWritten:
    def test_two_files_and_nothing_beside_them(self, folder):
        assert sorted(p.name for p in folder.iterdir()) == [CARD_FILE, ARRAYS_FILE]
        assert [p.name for p in folder.parent.iterdir()] == [folder.name]

    def test_each_pool_and_table_once_under_its_path(self, adapter, folder):
        arrays = load_file(folder / ARRAYS_FILE)
        assert sorted(arrays) == sorted(
            f"{part}/{name}"
            for part in ("pool_a", "pool_b", "table_a", "table_b")
            for name in SITES
        )
        assert arrays["pool_a/q_proj"].shape == (3 * 3 * 2, 4)
        np.testing.assert_array_equal(
            arrays["table_b/down_proj"], adapter.table_b["down_proj"][...]
        )

    def test_the_card_says_what_the_arrays_are(self, adapter, folder):
        card = json.loads((folder / CARD_FILE).read_text())
        payload = (folder / ARRAYS_FILE).read_bytes()
        assert card["format"] == "mos_jax.adapter"
        assert card["format_version"] == 1
        assert card["method"] == "mos"
        assert card["config"] == dataclasses.asdict(CONFIG)
        assert card["sites"]["q_proj"] == {
            "num_layers": 3, "d_in": 8, "d_out": 12, "layers": None
        }  # fmt: skip
        assert card["scale"]["q_proj"] == [float(np.float32(16 / 5))] * 3
        assert card["routing_checksum"] == routing.checksum(adapter.tables())
        assert card["arrays_sha256"] == hashlib.sha256(payload).hexdigest()
        assert card["base_fingerprint"] == "f" * 64
        assert card["metadata"] == {"base": "tiny-base", "steps": 3}

    def test_read_card_gives_the_same_with_sites_as_shapes(self, folder):
        card = read_card(folder)
        assert card.sites == SITES
        assert (card.method, card.config) == ("mos", dataclasses.asdict(CONFIG))
        assert card.metadata == {"base": "tiny-base", "steps": 3}

    def test_a_method_without_routing_has_no_checksum(self, tmp_path):
        lora = create_adapter(LoRAConfig(rank=2), SITES, jax.random.key(0))
        assert read_card(save_adapter(tmp_path / "lora", lora)).routing_checksum is None

    def test_the_same_adapter_is_written_as_the_same_bytes(self, adapter, folder, tmp_path):
        again = save_adapter(
            str(tmp_path / "a" / "b"), adapter, base_fingerprint="f" * 64,
            metadata={"base": "tiny-base", "steps": 3},
        )  # fmt: skip
        for name in (ARRAYS_FILE, CARD_FILE):
            assert (again / name).read_bytes() == (folder / name).read_bytes()


class TestRoundTrip:
    def test_everything_comes_back(self, adapter, folder):
        loaded = load_adapter(folder, sites=SITES, base_fingerprint="f" * 64)
        assert_same_arrays(loaded, adapter)
        assert (loaded.config, loaded.sites) == (CONFIG, SITES)
        assert nnx.graphdef(loaded) == nnx.graphdef(adapter)

    def test_stored_tables_are_used_and_not_drawn_again(self, adapter, tmp_path):
        arrays = adapter_arrays(adapter)
        other: Any = create_adapter(
            dataclasses.replace(CONFIG, routing_seed=9), SITES, jax.random.key(1)
        )
        tables = {n: a for n, a in adapter_arrays(other).items() if n.startswith("table")}
        mixed = with_arrays(adapter, {**arrays, **tables})
        loaded: Any = load_adapter(save_adapter(tmp_path / "mixed", mixed))
        assert routing.checksum(loaded.tables()) == routing.checksum(other.tables())
        assert routing.checksum(loaded.tables()) != routing.checksum(adapter.tables())

    def test_an_unknown_fingerprint_on_either_side_is_no_reason_to_refuse(
        self, adapter, folder, tmp_path
    ):
        plain = save_adapter(tmp_path / "plain", adapter)
        for loaded in (load_adapter(folder), load_adapter(plain, base_fingerprint="a" * 64)):
            assert loaded.count_trained() == adapter.count_trained()

    def test_selected_layers_fit_a_base_with_more_blocks(self, tmp_path):
        some = create_adapter(LoRAConfig(rank=2), SOME_LAYERS, jax.random.key(0))
        folder = save_adapter(tmp_path / "some", some)
        base = {n: SiteShape(MODEL_LAYERS, s.d_in, s.d_out) for n, s in SITES.items()}
        base["k_proj"] = SiteShape(MODEL_LAYERS, 8, 8)
        assert load_adapter(folder, sites=base).sites == SOME_LAYERS

    @hypothesis.settings(max_examples=5, deadline=None)
    @hypothesis.given(data=st.data())
    def test_any_small_adapter_comes_back_bitwise(self, data):
        e = data.draw(st.integers(1, 3), "e")
        p = data.draw(st.integers(0, e), "p")
        blocks = data.draw(st.integers(1, 3), "L")
        shards = data.draw(st.integers(1, 3), "l")
        selection = data.draw(st.booleans(), "ss")
        config = MoSConfig(
            e,
            None
            if not selection or p == e
            else p + data.draw(st.integers(1, (e - p) * blocks), "r - p"),
            shards,
            p,
            alpha=data.draw(st.floats(1e-3, 1e3), "alpha"),
            routing_seed=data.draw(st.integers(0, 2**63), "seed"),
            subset_selection=selection,
            pair_dissociation=data.draw(st.booleans(), "pd"),
            random_scaling=data.draw(st.sampled_from([None, "fixed", "trained"]), "scaling"),
        )
        chosen = data.draw(
            st.none() | st.sets(st.integers(0, 9), min_size=blocks, max_size=blocks), "layers"
        )
        layers = None if chosen is None else tuple(sorted(chosen))
        sites = {"odd name.0": SiteShape(blocks, 2 * shards, shards, layers)}
        adapter = randomised(create_adapter(config, sites, jax.random.key(0)))
        with tempfile.TemporaryDirectory() as folder:
            loaded = load_adapter(save_adapter(Path(folder) / "adapter", adapter))
        assert (loaded.config, loaded.sites) == (config, sites)
        assert_same_arrays(loaded, adapter)


class TestAnotherBase:
    def test_another_fingerprint_is_refused_with_the_name_of_the_base(self, folder):
        with pytest.raises(
            InputError, match=r"another base.*tiny-base.*ffffffffffff.*aaaaaaaaaaaa"
        ):
            load_adapter(folder, base_fingerprint="a" * 64)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"q_proj": SiteShape(3, 16, 12)}, "'q_proj' is 3 layers of 8 -> 12.*16 -> 12"),
            ({"down_proj": SiteShape(3, 8, 8)}, "'down_proj' is 3 layers of 8 -> 4.*8 -> 8"),
            ({"q_proj": SiteShape(4, 8, 12)}, "'q_proj' is 3 layers .* 4 of"),
            ({"q_proj": SiteShape(2, 8, 12)}, "'q_proj' is 3 layers .* 2 of"),
        ],
    )
    def test_other_shapes_are_refused_with_both(self, folder, changes, message):
        with pytest.raises(InputError, match=message):
            load_adapter(folder, sites={**SITES, **changes})

    def test_a_type_the_base_lacks_is_named(self, folder):
        with pytest.raises(InputError, match="adapts 'down_proj', which the base does not have"):
            load_adapter(folder, sites={"q_proj": SITES["q_proj"]})

    def test_a_block_the_base_lacks_is_refused(self, tmp_path):
        some = create_adapter(LoRAConfig(rank=2), SOME_LAYERS, jax.random.key(0))
        folder = save_adapter(tmp_path / "some", some)
        with pytest.raises(InputError, match="another base"):
            load_adapter(folder, sites=SITES)


class TestDamagedArrays:
    def test_a_valid_but_other_table_is_refused_by_its_checksum(self, folder):
        def swap_two_vectors(arrays):
            table = arrays["table_a/q_proj"]
            table[0, [0, 1]] = table[0, [1, 0]]

        edit_arrays(folder, swap_two_vectors)
        stored = read_card(folder).routing_checksum
        with pytest.raises(InputError, match=f"routing tables have checksum .*{stored}"):
            load_adapter(folder)

    @pytest.mark.parametrize("index", [-1, 12, 2**31 - 1])
    def test_an_index_out_of_range_is_refused_with_its_table(self, folder, index):
        def break_table(arrays):
            arrays["table_b/q_proj"][1, 2, 0] = index

        edit_arrays(folder, break_table)
        with pytest.raises(InputError, match=r"table_b/q_proj: block 1 .* outside 0\.\.11"):
            load_adapter(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda arrays: arrays.pop("pool_a/q_proj"), "missing pool_a/q_proj; extra none"),
            (
                lambda arrays: arrays.update({"pool_c/q_proj": np.zeros(3, np.float32)}),
                "missing none; extra pool_c/q_proj",
            ),
            (
                lambda arrays: arrays.update({"pool_c": arrays.pop("pool_b/q_proj")}),
                "missing pool_b/q_proj; extra pool_c",
            ),
            (
                lambda arrays: arrays.update({"pool_a/q_proj": np.zeros((18, 5), np.float32)}),
                r"'pool_a/q_proj' must be float32 \(18, 4\), got float32 \(18, 5\)",
            ),
            (
                lambda arrays: arrays.update({"pool_a/q_proj": np.zeros((18, 4), np.float16)}),
                r"'pool_a/q_proj' must be float32 \(18, 4\), got float16",
            ),
            (
                lambda arrays: arrays.update(
                    {"table_a/q_proj": arrays["table_a/q_proj"].astype(np.int64)}
                ),
                "'table_a/q_proj' must be int32 .* got int64",
            ),
            (
                lambda arrays: arrays["pool_b/down_proj"].put(3, np.nan),
                "'pool_b/down_proj' holds values that are not finite",
            ),
            (
                lambda arrays: arrays["pool_a/q_proj"].put(0, -np.inf),
                "'pool_a/q_proj' holds values that are not finite",
            ),
        ],
    )
    def test_arrays_that_are_not_the_adapters_are_named(self, folder, change, message):
        edit_arrays(folder, change)
        with pytest.raises(InputError, match=message):
            load_adapter(folder)

    def test_one_flipped_bit_is_refused(self, folder):
        payload = bytearray((folder / ARRAYS_FILE).read_bytes())
        payload[-1] ^= 1
        (folder / ARRAYS_FILE).write_bytes(payload)
        with pytest.raises(InputError, match=f"{ARRAYS_FILE} is not the file that {CARD_FILE}"):
            load_adapter(folder)

    @pytest.mark.parametrize("kept", [0, 7, 100, -1])
    def test_a_truncated_file_is_refused_whether_its_hash_agrees_or_not(self, folder, kept):
        payload = (folder / ARRAYS_FILE).read_bytes()[:kept]
        (folder / ARRAYS_FILE).write_bytes(payload)
        with pytest.raises(InputError, match="truncated"):
            load_adapter(folder)
        put_arrays_file(folder, payload)
        with pytest.raises(InputError, match="not a safetensors file"):
            load_adapter(folder)

    def test_a_torn_pair_of_files_is_refused(self, adapter, folder, tmp_path):
        other = save_adapter(tmp_path / "other", randomised(adapter, seed=5))
        (folder / ARRAYS_FILE).write_bytes((other / ARRAYS_FILE).read_bytes())
        with pytest.raises(InputError, match="belongs to another adapter"):
            load_adapter(folder)

    def test_a_missing_file_of_arrays_is_named(self, folder):
        (folder / ARRAYS_FILE).unlink()
        with pytest.raises(InputError, match=f"{ARRAYS_FILE} is missing"):
            load_adapter(folder)

    def test_foreign_arrays_are_refused(self, folder):
        foreign = {"base_model.model.q_proj.lora_A.weight": np.zeros((2, 8), np.float32)}
        put_arrays_file(folder, format_safetensors(foreign))
        with pytest.raises(InputError, match=r"missing pool_a/.* extra base_model.model.q_proj"):
            load_adapter(folder)

    @pytest.mark.parametrize(("dtype", "width"), [("BF16", 2), ("F8_E4M3", 1)])
    def test_a_dtype_that_no_adapter_has_is_refused(self, folder, dtype, width):
        entry = {"dtype": dtype, "shape": [18, 4], "data_offsets": [0, 72 * width]}
        text = json.dumps({"pool_a/q_proj": entry}).encode()
        put_arrays_file(folder, len(text).to_bytes(8, "little") + text + bytes(72 * width))
        with pytest.raises(InputError, match=f"{ARRAYS_FILE} holds .*{dtype}|missing pool_a"):
            load_adapter(folder)

    def test_a_folder_in_the_place_of_the_arrays_is_refused(self, folder):
        (folder / ARRAYS_FILE).unlink()
        (folder / ARRAYS_FILE).mkdir()
        with pytest.raises(InputError, match=f"{ARRAYS_FILE} is missing, or no regular file"):
            load_adapter(folder)


class TestDamagedCard:
    def test_no_folder_or_no_card_is_said(self, folder, tmp_path):
        with pytest.raises(InputError, match=f"no adapter at .*nowhere: {CARD_FILE} is missing"):
            load_adapter(tmp_path / "nowhere")
        (folder / CARD_FILE).unlink()
        with pytest.raises(InputError, match=f"{CARD_FILE} is missing"):
            load_adapter(folder)

    @pytest.mark.parametrize("text", [b"", b"{", b"not json", b'{"format": "mos', b"\xff\xfe{}"])
    def test_what_is_not_json_is_refused(self, folder, text):
        (folder / CARD_FILE).write_bytes(text)
        with pytest.raises(InputError, match=f"{CARD_FILE} is not (valid JSON|UTF-8)"):
            load_adapter(folder)

    @pytest.mark.parametrize(
        "card", [[], "mos", None, {}, {"peft_type": "LORA"}, {"format": "mos_jax.base"}]
    )
    def test_foreign_json_is_refused(self, folder, card):
        (folder / CARD_FILE).write_text(json.dumps(card))
        with pytest.raises(InputError, match=r"not the card of a mos_jax|must hold a JSON"):
            load_adapter(folder)

    @pytest.mark.parametrize("version", [2, 99, "1", None, 1.5, 0, -1, True])
    def test_a_newer_or_senseless_version_is_refused_with_its_number(self, folder, version):
        edit_card(folder, format_version=version)
        with pytest.raises(InputError, match=f"format version {version!r}.* up to 1"):
            load_adapter(folder)

    @pytest.mark.parametrize(
        "field", [field.name for field in dataclasses.fields(storage.AdapterCard)]
    )
    def test_a_missing_field_is_named(self, folder, field):
        card = json.loads((folder / CARD_FILE).read_text())
        del card[field]
        (folder / CARD_FILE).write_text(json.dumps(card))
        with pytest.raises(InputError, match=f"lacks {field}"):
            load_adapter(folder)

    @pytest.mark.parametrize(
        "sites", [{"q_proj": None}, {"q_proj": {"d_in": 8}}, {"q_proj": [3, 8, 8]}]
    )
    def test_malformed_sites_are_refused(self, folder, sites):
        edit_card(folder, sites=sites)
        with pytest.raises(InputError, match="'sites' is malformed"):
            load_adapter(folder)

    def test_senseless_sites_are_refused(self, folder):
        site = {"num_layers": -3, "d_in": 8, "d_out": 8, "layers": None}
        edit_card(folder, sites={"q_proj": site})
        with pytest.raises(InputError, match="num_layers must be a positive integer, got -3"):
            load_adapter(folder)

    def test_an_unknown_method_is_named(self, folder):
        edit_card(folder, method="dora")
        with pytest.raises(InputError, match="unknown method 'dora'; known: mos, lora"):
            load_adapter(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"ranks": 5}, "unknown field 'ranks'; did you mean 'rank'"),
            ({"rank": 2.5}, "rank must be an integer >= 1, got 2.5"),
            ({"private_rank": 4}, "private_rank=4 must be at most equivalent_rank=3"),
            ({"rank": 4}, r"'table_a/\w+' must be int32 \(3, 4, 2\), got int32 \(3, 5, 2\)"),
        ],
    )
    def test_a_changed_configuration_is_refused(self, folder, changes, message):
        edit_card(folder, config={**read_card(folder).config, **changes})
        with pytest.raises(InputError, match=message):
            load_adapter(folder)

    def test_a_changed_scale_is_refused_with_both_values(self, folder):
        edit_card(folder, config={**read_card(folder).config, "alpha": 32.0})
        with pytest.raises(InputError, match=r"'\w+' has scale 6.4.* says \[3\.2"):
            load_adapter(folder)

    @pytest.mark.parametrize("scale", [{}, {"q_proj": [3.2] * 2}, {"q_proj": 3.2}])
    def test_a_senseless_scale_is_refused(self, folder, scale):
        edit_card(folder, scale=scale)
        with pytest.raises(InputError, match=r"'scale'"):
            load_adapter(folder)

    @pytest.mark.parametrize(
        ("field", "value"), [("equivalent_rank", 1 << 62), ("rank", 1 << 40), ("rank", 3 << 24)]
    )
    def test_sizes_beyond_the_arrays_are_refused_before_anything_is_drawn(
        self, folder, field, value
    ):
        config = read_card(folder).config
        edit_card(folder, config={**config, field: value, "equivalent_rank": value})
        with pytest.raises(InputError, match=r"does not fit|drawn numbers, more than are stored"):
            load_adapter(folder)

    def test_arrays_larger_than_the_card_says_are_not_read(self, folder):
        with (folder / ARRAYS_FILE).open("r+b") as stream:
            stream.truncate(1 << 40)  # a hole: nothing on the disk
        with pytest.raises(InputError, match="1099511627776 bytes; an adapter of this conf"):
            load_adapter(folder)

    @pytest.mark.parametrize("field", ["num_layers", "d_in", "d_out"])
    def test_widths_and_depths_beyond_the_arrays_are_refused(self, folder, field):
        card = json.loads((folder / CARD_FILE).read_text())
        card["sites"]["q_proj"][field] = 1 << 62
        edit_card(folder, sites=card["sites"])
        with pytest.raises(InputError, match=field):
            load_adapter(folder)

    def test_a_lost_or_invented_routing_checksum_is_refused(self, folder, tmp_path):
        edit_card(folder, routing_checksum=None)
        with pytest.raises(InputError, match="says None"):
            load_adapter(folder)
        lora = create_adapter(LoRAConfig(rank=2), SITES, jax.random.key(0))
        lora_folder = save_adapter(tmp_path / "lora", lora)
        edit_card(lora_folder, routing_checksum="0" * 64)
        with pytest.raises(InputError, match="have checksum None"):
            load_adapter(lora_folder)

    @pytest.mark.parametrize(
        ("field", "value", "wanted"),
        [
            ("config", [], "dict"),
            ("config", None, "dict"),
            ("method", ["mos"], "str"),
            ("scale", None, "dict"),
            ("sites", None, "dict"),
            ("sites", [], "dict"),
            ("routing_checksum", 0, "str or None"),
            ("base_fingerprint", 3, "str or None"),
            ("arrays_sha256", None, "str"),
            ("metadata", None, "dict"),
        ],
    )
    def test_a_field_of_the_wrong_type_is_refused(self, folder, field, value, wanted):
        edit_card(folder, **{field: value})
        message = f"{CARD_FILE}: '{field}' must be {wanted}, got {re.escape(repr(value))}"
        with pytest.raises(InputError, match=message):
            read_card(folder)

    @pytest.mark.parametrize("layers", [["0"], [], "0", [True]], ids=str)
    def test_senseless_layers_are_refused(self, folder, layers):
        site = {"num_layers": 1, "d_in": 8, "d_out": 12, "layers": layers}
        edit_card(folder, sites={"q_proj": site})
        with pytest.raises(InputError, match=f"{CARD_FILE}: site 'q_proj': layers must be"):
            load_adapter(folder, sites=SITES)


class TestSavingSafely:
    def files(self, folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def test_a_new_adapter_replaces_the_old_one(self, adapter, folder):
        other = randomised(adapter, seed=5)
        save_adapter(folder, other)
        assert_same_arrays(load_adapter(folder), other)
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    @pytest.mark.parametrize("failing", [1, 2])
    def test_a_full_disk_leaves_the_old_adapter_and_no_rubbish(
        self, adapter, folder, monkeypatch, failing
    ):
        calls = []
        write = storage.write_file

        def full(file, payload):
            calls.append(file)
            if len(calls) == failing:
                file.write_bytes(payload[:10])
                raise OSError(errno.ENOSPC, "No space left on device")
            write(file, payload)

        monkeypatch.setattr(storage, "write_file", full)
        before = self.files(folder)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(folder, randomised(adapter, seed=5))
        assert len(calls) == failing
        assert self.files(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        assert_same_arrays(load_adapter(folder), adapter)

    def test_a_full_disk_at_a_new_place_leaves_nothing(self, adapter, tmp_path, monkeypatch):
        def full(file, payload):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(storage, "write_file", full)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(tmp_path / "new", adapter)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "arguments",
        [
            {"metadata": {"key": object()}},
            {"metadata": {"loss": float("nan")}},
            {"metadata": {("a", "b"): 1}},
            {"metadata": ["a"]},
            {"base_fingerprint": 3},
        ],
        ids=["object", "nan", "tuple-key", "list", "fingerprint"],
    )
    def test_what_a_card_cannot_hold_is_refused_and_leaves_nothing(
        self, adapter, tmp_path, arguments
    ):
        with pytest.raises(InputError, match=next(iter(arguments))):
            save_adapter(tmp_path / "new", adapter, **arguments)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("step", ["file", "folder"])
    def test_a_place_that_is_not_an_adapters_is_not_overwritten(self, adapter, tmp_path, step):
        place = tmp_path / "place"
        if step == "file":
            place.write_text("mine")
        else:
            place.mkdir()
            (place / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match="place exists and is not an adapter"):
            save_adapter(place, adapter)
        mine = place if step == "file" else place / "notes.txt"
        assert mine.read_text() == "mine"

    def test_an_empty_folder_and_missing_parents_are_fine(self, adapter, tmp_path):
        (tmp_path / "empty").mkdir()
        for place in (tmp_path / "empty", tmp_path / "new" / "deep"):
            assert_same_arrays(load_adapter(save_adapter(place, adapter)), adapter)

    def test_a_failing_rename_leaves_the_old_adapter_in_its_place(
        self, adapter, folder, monkeypatch
    ):
        rename, calls = Path.rename, []

        def second_fails(path, target):
            calls.append(target)
            if len(calls) == 2:
                raise OSError(errno.EIO, "Input/output error")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", second_fails)
        with pytest.raises(OSError, match="Input/output"):
            save_adapter(folder, randomised(adapter, seed=5))
        assert_same_arrays(load_adapter(folder), adapter)
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_files_and_parent_folder_are_on_the_disk_before_the_old_one_goes(
        self, adapter, folder, monkeypatch
    ):
        synced = []
        sync = os.fsync

        def record(descriptor):
            synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
            old = [path for path in folder.parent.iterdir() if path.suffix == ".old"]
            assert len(old) == synced[-1]
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", record)
        save_adapter(folder, adapter)
        assert synced == [False, False, True]

    def test_other_files_beside_an_adapter_are_not_deleted(self, adapter, folder):
        (folder / "notes.txt").write_text("mine")
        (folder / "merged").mkdir()
        with pytest.raises(InputError, match=r"adapter holds merged, notes\.txt beside"):
            save_adapter(folder, adapter)
        assert (folder / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize("text", ['{"peft_type": "LORA"}', "[]", "{"])
    def test_a_foreign_adapter_json_does_not_make_a_folder_an_adapters(
        self, adapter, tmp_path, text
    ):
        (tmp_path / "place").mkdir()
        (tmp_path / "place" / CARD_FILE).write_text(text)
        with pytest.raises(InputError, match="not an adapter"):
            save_adapter(tmp_path / "place", adapter)

    def test_a_link_to_an_adapter_can_be_saved_to(self, adapter, folder):
        link = folder.with_name("link")
        link.symlink_to(folder, target_is_directory=True)
        other = randomised(adapter, seed=5)
        save_adapter(link, other)
        assert_same_arrays(load_adapter(link), other)
        assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter", "link"]
        assert link.is_symlink()

    def test_the_working_folder_can_be_saved_to(self, adapter, folder, monkeypatch):
        monkeypatch.chdir(folder)
        other = randomised(adapter, seed=5)
        assert save_adapter(".", other) == folder
        assert_same_arrays(load_adapter(folder), other)

    def test_an_adapter_that_could_not_be_loaded_does_not_replace_a_good_one(self, adapter, folder):
        diverged = randomised(adapter, seed=5)
        diverged.pool_b["q_proj"][...] = jnp.full_like(diverged.pool_b["q_proj"][...], jnp.nan)
        with pytest.raises(InputError, match=r"pool_b/q_proj.*not finite"):
            save_adapter(folder, diverged)
        assert_same_arrays(load_adapter(folder), adapter)
        misrouted = randomised(adapter, seed=5)
        misrouted.table_a["q_proj"] = Frozen(misrouted.table_a["q_proj"][...] + 99)
        with pytest.raises(InputError, match=r"table_a/q_proj: block 0 .* outside"):
            save_adapter(folder, misrouted)
        assert_same_arrays(load_adapter(folder), adapter)


class TestWithArrays:
    def test_the_adapter_given_is_left_as_it_was(self, adapter):
        before = adapter_arrays(adapter)
        arrays = {
            name: array + 1 if name.startswith("pool") else array for name, array in before.items()
        }
        changed = with_arrays(adapter, arrays)
        assert_same_arrays(adapter, with_arrays(adapter, before))
        for name, array in adapter_arrays(changed).items():
            np.testing.assert_array_equal(array, arrays[name])
        np.testing.assert_array_equal(adapter.pool_a["q_proj"][...], before["pool_a/q_proj"])

    def test_the_kinds_of_the_arrays_stay(self, adapter):
        again = with_arrays(adapter, adapter_arrays(adapter))
        assert nnx.graphdef(again) == nnx.graphdef(adapter)
        assert again.count_trained() == adapter.count_trained()
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(again)))

    def test_arrays_of_another_block_count_are_refused(self, adapter):
        other = create_adapter(CONFIG, {n: SiteShape(4, 8, s.d_out) for n, s in SITES.items()},
                               jax.random.key(0))  # fmt: skip
        with pytest.raises(InputError, match=r"must be .*, got .*"):
            with_arrays(adapter, adapter_arrays(other))


def test_stored_bytes_are_plain_safetensors(folder, tmp_path):
    arrays = parse_safetensors((folder / ARRAYS_FILE).read_bytes())
    save_file(arrays, tmp_path / "copy.safetensors")
    again = load_file(tmp_path / "copy.safetensors")
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)
    assert jnp.asarray(arrays["pool_a/q_proj"]).dtype == jnp.float32
