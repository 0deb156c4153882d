"""What loading takes of memory and of the file, watched from a process of its own."""

import dataclasses
import functools
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mos_jax import InputError, load_base
from mos_jax.models import layout
from mos_jax.models.layout import parts
from mos_jax.models.placing import ArrayReader, place
from mos_jax.models.quantized import SCHEMES
from mos_jax.models.tiny import tiny_config
from tests.models.fixtures_loading import watch, write_model

SMALL = dataclasses.replace(
    tiny_config(), name="model", num_layers=3, d_model=512, num_heads=8, num_kv_heads=8,
    head_dim=64, d_ff=1024,
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    yield {
        "safetensors": write_model(folder / "model", SMALL),
        "gguf": write_model(folder / "model.gguf", SMALL, "Q8_0"),
    }
    shutil.rmtree(folder)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "dtype", "quantize", "layers"),
    [
        ("F32", "bfloat16", None, 6),
        ("F32", "bfloat16", "nf4", 6),
        ("Q8_0", "float32", None, 3),
    ],
)
def test_the_peak_is_that_of_the_model_that_is_made(tmp_path, kind, dtype, quantize, layers):
    config = dataclasses.replace(
        SMALL, num_layers=layers, d_model=1024, num_heads=16, num_kv_heads=16, d_ff=2816,
        vocab_size=8192,
    )  # fmt: skip
    path = write_model(tmp_path / ("model" if kind == "F32" else "model.gguf"), config, kind)
    found = watch("memory", path=str(path), dtype=dtype, quantize=quantize)
    (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    # A quantised base may need one weight more, in the dtype of the others.
    allowed = 1.3 * found["bytes"] + (found["largest"] if quantize else 0)
    assert 0.9 * found["bytes"] < found["rise"] < allowed, found
    # XLA's own share, whatever the size of the model.
    assert found["first"] < allowed + (80 << 20), found


@pytest.mark.parametrize(
    ("form", "quantize", "data"),
    [("safetensors", None, 1), ("safetensors", "nf4", 1), ("gguf", None, 1), ("gguf", "int8", 2)],
)
def test_each_device_is_given_its_slice_and_only_that_is_read(small, form, quantize, data):
    found = watch("sharded", path=str(small[form]), quantize=quantize, data=data)
    assert found["equal"]
    assert found["devices"] == 8
    assert found["difference"] < 1e-4
    assert found["same_fingerprint"]
    count, ways = 8 // data, {"o_proj": 1, "down_proj": 1}
    for name, shape in SMALL.weight_shapes().items():
        site = name.removeprefix("blocks/")
        slice_shape = list(shape)
        if name == "embed":
            slice_shape[0] //= count
        elif not name.endswith("norm"):
            slice_shape[ways.get(site, 2)] //= count
        assert found["largest"][name] <= np.prod(slice_shape), name
        leaves = found["shapes"][name]
        entries = SCHEMES[quantize].entries if quantize and len(leaves) == 2 else (1,)
        expected = [
            [[*slice_shape[:-2], slice_shape[-2] // rows, slice_shape[-1]]] if rows > 1
            else [slice_shape]
            for rows in entries
        ]  # fmt: skip
        assert leaves == expected, name
    # Every byte of the tensors once, whatever the number of devices that hold it; a safetensors
    # file is asked for its header too.
    size = SMALL.num_parameters * 4 if form == "safetensors" else quantised_bytes()
    header = (small[form] / "model.safetensors").stat().st_size - size if form != "gguf" else 0
    assert found["requested"] == size + header


def quantised_bytes():
    norms = sum(np.prod(s) for n, s in SMALL.weight_shapes().items() if n.endswith("norm"))
    return norms * 4 + (SMALL.num_parameters - norms) // 32 * 34


@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 4, 5), (1, 9, 2), (4, 1, 1)])
@pytest.mark.parametrize("chunk", [1, 4, 13, 1000])
def test_parts_cover_an_array_once_and_are_small(monkeypatch, shape, chunk):
    monkeypatch.setattr(layout, "CHUNK", chunk)
    for long_axis in {0, len(shape) - 1}:
        seen = np.zeros(shape, int)
        for index in parts(shape, long_axis):
            seen[index] += 1
            across = seen[index].size // (index[long_axis].stop - index[long_axis].start)
            assert seen[index].size <= max(chunk, across)
        assert (seen == 1).all()


@pytest.mark.parametrize("scheme", [None, *SCHEMES.values()], ids=["plain", *SCHEMES])
@pytest.mark.parametrize("spec", [("model", None, None), (None, "model", None), (None, None, None)])
def test_a_weight_in_many_parts_is_the_weight_in_one(monkeypatch, scheme, spec):
    array = np.random.default_rng(0).standard_normal((4, 256, 6)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    reader, dtype = ArrayReader(array), np.dtype(np.float32)
    whole = place("w", reader, dtype, None, scheme)
    monkeypatch.setattr(layout, "CHUNK", 300)
    for chosen in (None, sharding):
        seen: list[tuple] = []
        watch_part = functools.partial(_keep, seen)
        found = place("w", reader, dtype, chosen, scheme, watch_part)
        assert len(seen) > 4
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
            assert np.array_equal(a, b)
            assert chosen is None or a.sharding == sharding
        again = np.zeros_like(array)
        for index, part in seen:
            again[index] += part
        assert np.array_equal(again, array)


def _keep(seen, *given):
    seen.append(given)


def test_a_base_without_shardings_goes_where_its_data_is():
    base = load_base("tiny-random", quantize="nf4")
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    tokens = jax.device_put(
        jnp.zeros((2, 4), jnp.int32), NamedSharding(mesh, PartitionSpec("data"))
    )
    assert jax.jit(lambda model, tokens: model(tokens))(base.model, tokens).shape[0] == 2


def test_shardings_that_do_not_fit_are_refused_with_the_numbers():
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    names = load_base("tiny-random").config.weight_shapes()

    def cut(site, *spec):
        chosen = dict.fromkeys(names, everywhere)
        return chosen | {site: NamedSharding(mesh, PartitionSpec(*spec))}

    for shardings, quantize, words in (
        ({"embed": everywhere}, None, r"no entry for weight 'final_norm' \[64\]"),
        (cut("blocks/q_prok"), None, "unknown weight 'blocks/q_prok'; did you mean 'blocks/q_proj"),
        (lambda name, shape: "model", None, "give 'model' for 'embed'"),
        (cut("blocks/q_proj", "model"), None, r"'blocks/q_proj' of shape \[2, 64, 64\] cannot be"),
        (cut("blocks/down_proj", None, "model"), "nf4", r"along d_in at \[0, 32\].*multiple of 64"),
    ):
        with pytest.raises(InputError, match=words):
            load_base("tiny-random", quantize=quantize, shardings=shardings)
