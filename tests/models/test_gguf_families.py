"""GGUF files of every architecture and type of tensor, as the readers of other rooms see them."""

import dataclasses

import numpy as np
import pytest

from mos_jax.errors import InputError
from mos_jax.models.config import RopeScaling
from mos_jax.models.gguf import GGUF_TYPES, open_gguf, read_config, read_weights, tensor_names
from mos_jax.models.tiny import tiny_weights
from tests.models.fixtures_families import family_config
from tests.models.fixtures_models import as_halves, plain_tensors, write_gguf

CONFIGS = {
    "llama": family_config("llama", rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)),
    # A Mistral file calls itself "llama" and has no window.
    "mistral": family_config("mistral", window=None),
    "qwen2": family_config("qwen2", window=None, windowed_layers=None),
    "qwen3": family_config("qwen3", tied_embeddings=False),
    "gemma3": family_config(
        "gemma3", num_layers=7, windowed_layers=(0, 1, 2, 3, 4, 6), query_scale=None
    ),
    "gemma3 with windows of its own": family_config("gemma3", query_scale=None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(tmp_path, name):
    config, weights = CONFIGS[name], tiny_weights(CONFIGS[name], seed=5)
    path = write_gguf(tmp_path / "m.gguf", config, weights)
    stated = "llama" if name == "mistral" else config.family
    assert read_config(path) == dataclasses.replace(config, family=stated)
    read = read_weights(path, config)
    assert read.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(read[key], value, err_msg=key)


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_type_of_tensor(tmp_path, family, kind):
    wide = {"d_model": 256, "d_ff": 256, "head_dim": 64, "num_layers": 1}
    changes = {
        "llama": {"rope_scaling": None},
        "gemma3": {"query_scale": None, "embed_scale": 16.0},
    }
    config = family_config(family, **wide, **changes[family], window=None, windowed_layers=None,
                           local_rope_base=None)  # fmt: skip
    path = write_gguf(tmp_path / "m.gguf", config, tiny_weights(config), kind)
    assert read_config(path) == config
    assert open_gguf(path).tensors["blk.0.attn_q.weight"].type.name == kind
    plain, read = plain_tensors(path), read_weights(path, config)
    for name, source in tensor_names(config).items():
        if name not in read:
            continue
        want = plain[source.format(0)]
        if family == "llama" and name == "blocks/q_proj":
            want = as_halves(want, config.num_heads)
        elif family == "llama" and name == "blocks/k_proj":
            want = as_halves(want, config.num_kv_heads)
        got = read[name][0] if name.startswith("blocks/") else read[name]
        np.testing.assert_array_equal(got, want.T if name.endswith("proj") else want, err_msg=name)
        assert want.std() > 0


def test_a_type_that_cannot_be_read_names_those_that_can(tmp_path):
    config = CONFIGS["llama"]
    path = write_gguf(tmp_path / "m.gguf", config, tiny_weights(config))
    data = bytearray(path.read_bytes())
    name = b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    data[at : at + 4] = (26).to_bytes(4, "little")  # I32, as large as F32
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"type I32, which cannot be read.*F32, F16.*Q4_K"):
        read_weights(path, config)


def test_other_rope_factors_are_refused_by_the_file(tmp_path):
    config = CONFIGS["llama"]
    odd = {"rope_freqs.weight": np.linspace(1, 3, config.head_dim // 2, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", config, tiny_weights(config), extra=odd)
    with pytest.raises(InputError, match=r"rope_freqs\.weight holds factors"):
        read_config(path)
    qwen = CONFIGS["qwen2"]
    write_gguf(path, qwen, tiny_weights(qwen), extra=odd)
    with pytest.raises(InputError, match=r"rope_freqs\.weight beside qwen2"):
        read_config(path)
