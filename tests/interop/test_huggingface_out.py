import dataclasses
import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from mos_jax.errors import InputError
from mos_jax.files import check_space, fresh_file
from mos_jax.interop import huggingface_out, safetensors_out
from mos_jax.interop.huggingface_out import plan_model, write_model
from mos_jax.models import huggingface
from mos_jax.models.base import Base, load_base
from mos_jax.models.decoder import Decoder
from mos_jax.models.known import known_config
from mos_jax.models.tiny import tiny_config, tiny_weights
from mos_jax.models.tokenizer import Tokenizer
from tests.models.fixtures_models import write_gguf

CONFIG = dataclasses.replace(tiny_config(), num_layers=2, d_model=32, d_ff=48, name="out")


def base_of(dtype="float32", **changes):
    config = dataclasses.replace(CONFIG, **changes)
    weights = {name: jnp.asarray(a) for name, a in tiny_weights(config, 0, dtype).items()}
    return Base("small", Decoder(config, weights), Tokenizer.byte_level())


def assert_same_weights(a, b):
    assert a.config == dataclasses.replace(b.config, name=a.config.name)
    theirs = b.model.weights
    for name, array in a.model.weights.items():
        assert array.dtype == theirs[name].dtype, name
        assert np.asarray(array).tobytes() == np.asarray(theirs[name]).tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": False, "head_dim": 8},
        {"rope_scaling": known_config("llama3.2-1b").rope_scaling},
    ],
    ids=["tied", "head", "scaled"],
)
@pytest.mark.parametrize("shard", [5 * 10**9, 20_000, 1])
def test_what_is_written_reads_back_bitwise(tmp_path, dtype, changes, shard):
    base = base_of(dtype, **changes)
    plan = write_model(tmp_path / "m", base, max_shard_bytes=shard)
    assert_same_weights(load_base(tmp_path / "m", dtype), base)
    files = {file.name for file in tmp_path.joinpath("m").glob("*.safetensors")}
    assert files == set(plan.shards)
    index = tmp_path / "m" / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    for name, tensors in plan.shards.items():
        assert len(tensors) == 1 or sum(t.bytes for t in tensors) <= shard
        # As the format's own library sees it.
        with safe_open(tmp_path / "m" / name, "numpy") as file:
            assert set(file.keys()) == {t.name for t in tensors}
            assert file.metadata() == {"format": "pt"}
    if len(files) > 1:
        listed = json.loads(index.read_text())
        assert listed["metadata"]["total_size"] == plan.weight_bytes
        assert set(listed["weight_map"].values()) == files
    if shard == 1:
        assert len(files) == sum(map(len, plan.shards.values()))


def test_norms_stay_exact_in_a_bf16_folder(tmp_path):
    base = base_of("bfloat16")
    write_model(tmp_path / "m", base)
    with safe_open(tmp_path / "m" / "model.safetensors", "numpy") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    assert {kinds[name] for name in kinds if "norm" in name} == {"F32"}
    assert {kinds[name] for name in kinds if "norm" not in name} == {"BF16"}
    # Where bf16 holds them, as in a checkpoint of bf16, they are bf16 like the rest.
    weights = base.model.weights
    for name in ("blocks/attn_norm", "blocks/mlp_norm", "final_norm"):
        weights[name] = weights[name].astype(jnp.bfloat16).astype(jnp.float32)
    rounded = dataclasses.replace(base, model=Decoder(base.config, weights))
    plan = write_model(tmp_path / "n", rounded)
    assert {t.dtype for tensors in plan.shards.values() for t in tensors} == {"bfloat16"}
    assert_same_weights(load_base(tmp_path / "n", "bfloat16"), rounded)


def test_float16_is_written_and_checked(tmp_path):
    base = base_of()
    write_model(tmp_path / "m", base, dtype="float16")
    found = load_base(tmp_path / "m").model.weights["blocks/q_proj"]
    want = np.asarray(base.model.weights["blocks/q_proj"]).astype(np.float16).astype(np.float32)
    assert np.array_equal(found, want)
    weights = base.model.weights
    weights["blocks/up_proj"] = weights["blocks/up_proj"].at[1, 0, 0].set(65520.0)
    large = dataclasses.replace(base, model=Decoder(base.config, weights))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*6\.552e\+04.*float16"):
        write_model(tmp_path / "n", large, dtype="float16")
    assert not (tmp_path / "n").exists()
    weights["blocks/up_proj"] = weights["blocks/up_proj"].at[1, 0, 0].set(65504.0)
    write_model(
        tmp_path / "n",
        dataclasses.replace(base, model=Decoder(base.config, weights)),
        dtype="float16",
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_and_leave_nothing(tmp_path, value):
    weights = base_of().model.weights
    weights["embed"] = weights["embed"].at[5, 3].set(value)
    base = dataclasses.replace(base_of(), model=Decoder(CONFIG, weights))
    with pytest.raises(InputError, match=r"embed_tokens.*not finite"):
        write_model(tmp_path / "m", base)
    assert list(tmp_path.iterdir()) == []


def test_pieces_bound_the_memory_of_a_large_tensor(tmp_path, monkeypatch):
    base, sizes = base_of(), []
    monkeypatch.setattr(huggingface_out, "CHUNK", 100)
    real = safetensors_out.round_to

    def spy(values, dtype, name):
        sizes.append(values.size)
        return real(values, dtype, name)

    monkeypatch.setattr(safetensors_out, "round_to", spy)
    write_model(tmp_path / "m", base)
    assert max(sizes) <= 100
    assert_same_weights(load_base(tmp_path / "m"), base)


def test_the_header_is_aligned_and_counts_its_bytes(tmp_path):
    plan = write_model(tmp_path / "m", base_of())
    content = (tmp_path / "m" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    assert len(content) == 8 + length + plan.weight_bytes


def test_the_tokenizer_of_a_gguf_base_is_written_to_encode_alike(tmp_path):
    config = tiny_config()
    path = write_gguf(tmp_path / "m.gguf", config, tiny_weights(config), vocabulary=True)
    base = load_base(path)
    write_model(tmp_path / "m", base)
    again = load_base(tmp_path / "m")
    assert_same_weights(again, base)
    messages = [{"role": "user", "content": "hi 12 é"}]
    text = base.tokenizer.render(messages, True)
    assert again.tokenizer.render(messages, True) == text
    assert again.tokenizer.encode(text) == base.tokenizer.encode(text)
    for name in ("end_of_turn", "pad", "bos", "vocab_size"):
        assert getattr(again.tokenizer, name) == getattr(base.tokenizer, name)
    assert again.tokenizer.ordinary_ids() == base.tokenizer.ordinary_ids()


def test_the_tokenizer_of_a_folder_is_copied_byte_for_byte(tmp_path):
    write_model(tmp_path / "first", base_of())
    odd = {
        "tokenizer_config.json": b'{"eos_token": "<|im_end|>",   "odd": 1}',
        "special_tokens_map.json": b"{}\n\n",
        "chat_template.jinja": b"{{ messages[0]['content'] }}",
        "generation_config.json": b'{"temperature": 0.7}',
    }
    for name, content in odd.items():
        (tmp_path / "first" / name).write_bytes(content)
    (tmp_path / "first" / "notes.txt").write_text("not a tokenizer's")
    write_model(tmp_path / "second", load_base(tmp_path / "first"))
    for name in (*odd, "tokenizer.json"):
        assert (tmp_path / "second" / name).read_bytes() == (
            tmp_path / "first" / name
        ).read_bytes(), name
    assert not (tmp_path / "second" / "notes.txt").exists()
    base = load_base(tmp_path / "first")
    (tmp_path / "first" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json.* is gone"):
        plan_model(base)


def test_the_card_says_what_it_is_told(tmp_path):
    card = {"Adapter": {"method": "mos", "rank": 3}, "Merge": {"largest difference": 1e-6}}
    write_model(tmp_path / "m", base_of(), card=card)
    text = (tmp_path / "m" / "README.md").read_text()
    assert text.startswith('---\nbase_model: "small"\n')
    for line in ("## Adapter", "- **method**: mos", "- **largest difference**: 1e-06"):
        assert line in text
    with pytest.raises(InputError, match="card"):
        plan_model(base_of(), card={"Bad": {"a": float("nan")}})


def test_nothing_is_replaced_unasked(tmp_path):
    base = base_of()
    write_model(tmp_path / "m", base)
    with pytest.raises(InputError, match="not empty"):
        write_model(tmp_path / "m", base)
    write_model(tmp_path / "m", base_of("bfloat16"), overwrite=True)
    assert load_base(tmp_path / "m").dtype == "float32"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="not a model"):
        write_model(tmp_path / "own", base, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        write_model(tmp_path / "file", base, overwrite=True)
    with pytest.raises(InputError, match="the base itself"):
        write_model(tmp_path / "m", load_base(tmp_path / "m"), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m", "own"]


def test_a_failure_half_way_leaves_what_stood_there(tmp_path, monkeypatch):
    write_model(tmp_path / "m", base_of())
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(huggingface_out, "write_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_model(tmp_path / "m", base_of("bfloat16"), overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    usage = dataclasses.make_dataclass("usage", ["free"])
    monkeypatch.setattr("mos_jax.files.shutil.disk_usage", lambda _: usage(1000))
    with pytest.raises(InputError, match=r"needs [\d,]+ bytes, .* has 1,000 left"):
        write_model(tmp_path / "m", base_of())
    assert list(tmp_path.iterdir()) == []
    check_space(tmp_path / "a" / "b", 1000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"max_shard_bytes": 0}, "max_shard_bytes = 0"),
        ({"max_shard_bytes": 1.5}, r"max_shard_bytes = 1\.5"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        write_model(tmp_path / "m", base_of(), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_file_takes_its_place_whole(tmp_path):
    with fresh_file(tmp_path / "a" / "f") as fresh:
        fresh.write_text("one")

    def fail():
        with fresh_file(tmp_path / "a" / "f") as fresh:
            fresh.write_text("tw")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (tmp_path / "a" / "f").read_text() == "one"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["f"]


def test_what_is_written_has_no_more_tensors_than_the_model(tmp_path):
    config = dataclasses.replace(CONFIG, tied_embeddings=False)
    names = huggingface.tensor_names(config)
    plan = plan_model(base_of(tied_embeddings=False))
    written = [t.name for tensors in plan.shards.values() for t in tensors]
    assert len(written) == len(set(written))
    assert names["head"] in written
    tied = [t.name for tensors in plan_model(base_of()).shards.values() for t in tensors]
    assert names["head"] not in tied
