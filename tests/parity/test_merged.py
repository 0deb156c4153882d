"""Merged models, written as Hugging Face folders, as transformers loads and computes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax.errors import InputError
from mos_jax.interop.check import probe_logits, probe_tokens
from mos_jax.interop.huggingface_out import write_model
from mos_jax.interop.merged import merge
from mos_jax.models.base import Base, load_base
from mos_jax.models.config import FAMILIES
from mos_jax.models.decoder import Decoder
from mos_jax.models.tiny import tiny_weights
from mos_jax.models.tokenizer import Tokenizer
from tests.models.fixtures_decoder import filled_adapter
from tests.models.fixtures_families import family_config
from tests.parity.test_readers import CHAT, TEXTS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # those of the other libraries
]


def torch_logits(folder, tokens, dtype="float32"):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=getattr(torch, dtype)
    ).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy(), model


def assert_same_tokenizer(folder, ours, chats):
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), text
        # What begins a text, if anything does, is added by both or by neither.
        assert theirs.encode(text) == ours.encode(ours.text_start) + ids
    for messages in chats:
        for prompt in (True, False):
            rendered = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert ours.render(messages, add_generation_prompt=prompt) == rendered
    assert theirs.eos_token_id == ours.end_of_turn
    assert (theirs.bos_token_id, theirs.pad_token_id) == (ours.bos, ours.pad)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_merged(tmp_path, family):
    config = family_config(family)
    weights = {name: jnp.asarray(array) for name, array in tiny_weights(config).items()}
    base = Base("small", Decoder(config, weights), Tokenizer.byte_level())
    factors = filled_adapter(base.sites).factors()
    merged = merge(base, factors)
    # Shards of 40 kB: several files and an index.
    plan = write_model(tmp_path / "m", merged.base, max_shard_bytes=40_000)
    assert len(plan.shards) > 2
    tokens = probe_tokens(config.vocab_size)
    with jax.default_matmul_precision("highest"):
        beside = np.asarray(base.model(jnp.asarray(tokens), factors))
    theirs, model = torch_logits(tmp_path / "m", tokens)
    scale = max(1.0, np.abs(beside).max())
    np.testing.assert_allclose(theirs, beside, atol=1e-3 * scale)
    assert np.abs(beside - probe_logits(base.model)).max() > 0.01 * scale
    assert model.config.eos_token_id == base.tokenizer.end_of_turn
    # Our own reader finds the same numbers.
    again = load_base(tmp_path / "m").model.weights
    for name, array in merged.base.model.weights.items():
        assert np.asarray(array).tobytes() == np.asarray(again[name]).tobytes(), name


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_bf16_folder_is_loaded_in_bf16(tmp_path, family):
    config = dataclasses.replace(family_config(family))
    weights = {n: jnp.asarray(a) for n, a in tiny_weights(config, 0, "bfloat16").items()}
    base = Base("small", Decoder(config, weights), Tokenizer.byte_level())
    write_model(tmp_path / "m", base)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", local_files_only=True, dtype="auto"
    )
    assert theirs.model.embed_tokens.weight.dtype == torch.bfloat16
    again = load_base(tmp_path / "m", "bfloat16").model.weights
    for name, array in base.model.weights.items():
        assert np.asarray(array).tobytes() == np.asarray(again[name]).tobytes(), name


def test_byte_level_tokenizer(tmp_path):
    write_model(tmp_path / "m", load_base("tiny-random"))
    assert_same_tokenizer(tmp_path / "m", Tokenizer.byte_level(), [CHAT])


def test_smollm2_merged(tmp_path):
    try:
        base = load_base("smollm2-135m-instruct")
    except InputError as error:
        pytest.skip(str(error))
    factors = {
        name: low_rank.scaled(0.2)
        for name, low_rank in filled_adapter(base.sites).factors().items()
    }
    merged = merge(base, factors)
    write_model(tmp_path / "m", merged.base)
    text = "The capital of France is"
    tokens = np.asarray([base.tokenizer.encode(text)], np.int32)
    beside = np.asarray(base.model(jnp.asarray(tokens), factors))
    theirs, _ = torch_logits(tmp_path / "m", tokens)
    scale = np.abs(beside).max()
    np.testing.assert_allclose(theirs, beside, atol=1e-3 * max(1.0, scale))
    assert np.abs(beside - np.asarray(base.model(jnp.asarray(tokens)))).max() > 0.1
    assert merged.difference < 1e-3 * scale
    assert_same_tokenizer(
        tmp_path / "m",
        base.tokenizer,
        [CHAT, CHAT[:1], [{"role": "system", "content": "Be brief."}, *CHAT]],
    )
