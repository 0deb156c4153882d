"""The readers and the tokenizer against transformers, on the same files."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

from mos_jax.errors import InputError
from mos_jax.models import gguf, huggingface
from mos_jax.models.huggingface_config import config_from_huggingface
from mos_jax.models.known import known_config
from mos_jax.models.packaged import find_packaged_gguf
from mos_jax.models.tiny import tiny_config, tiny_weights
from mos_jax.models.tokenizer import Tokenizer
from tests.models.fixtures_models import in_file_order, write_folder, write_gguf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # those of the other libraries
]

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "a\n\nb\r\n\tc   \n",
    "The year 1984 cost $12,345.67 (or 3.14e-10).",
    "x = [i**2 for i in range(10)]\n    return x  # done",
    "I'm sure they'll say we've won; he'd agree, she's not.",
    "naïve café, Ångström, straße, ½ and ²",
    "你好，世界。これはテストです。안녕하세요",
    "Привет мир! مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🇫🇷 😀!",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "<|im_start|> <|im_end|><|im_end|> <|im_sta rt|>",
    "٣٤٥ Ⅷ 一二三",
    "e\u0301 \u200b\u00a0end",
]
CHAT = [
    {"role": "user", "content": "  What is 17 + 25?\n"},
    {"role": "assistant", "content": "42."},
    {"role": "user", "content": "Thanks 😀"},
]


@pytest.fixture(scope="module")
def smollm2():
    try:
        return find_packaged_gguf()
    except InputError as error:
        pytest.skip(str(error))


def load(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype=torch.float32, **options
        ).eval()


def assert_same_weights(ours, model, config):
    theirs = model.state_dict()
    names = huggingface.tensor_names(config)
    for name, value in in_file_order(config, ours, names).items():
        assert np.array_equal(theirs[name].numpy(), value), name


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_of_the_tiny_base(tmp_path, kind):
    config = dataclasses.replace(tiny_config(), tied_embeddings=kind == "F32")
    path = write_gguf(tmp_path / "m.gguf", config, tiny_weights(config), kind, vocabulary=True)
    model = load(tmp_path, gguf_file=path.name)
    assert_same_weights(gguf.read_weights(path, config), model, config)


def test_gguf_of_smollm2(smollm2):
    model = load(smollm2.parent, gguf_file=smollm2.name)
    config = gguf.read_config(smollm2)
    # transformers notes the file's quantisation there, though it has turned it into numbers, and
    # keeps the digits that single precision adds.
    assert model.config.rms_norm_eps == np.float32(config.rms_eps)
    raw = model.config.to_dict() | {"quantization_config": None, "rms_norm_eps": config.rms_eps}
    theirs = config_from_huggingface(raw, "smollm2-135m")
    assert dataclasses.replace(config, name="smollm2-135m") == theirs
    assert_same_weights(gguf.read_weights(smollm2, config), model, config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_folder_read_by_both(tmp_path, tied, dtype):
    config = dataclasses.replace(tiny_config(), tied_embeddings=tied, name="m")
    folder = write_folder(tmp_path / "m", config, tiny_weights(config), dtype, shards=2)
    model = load(folder)
    ours = huggingface.read_weights(folder, huggingface.read_config(folder))
    assert_same_weights(ours, model, config)


@pytest.mark.parametrize("scaled", [True, False])
def test_folder_written_by_transformers(tmp_path, scaled):
    scaling = known_config("llama3.2-1b").rope_scaling if scaled else None
    config = dataclasses.replace(tiny_config(), name="m", rope_scaling=scaling)
    first = load(write_folder(tmp_path / "first", config, tiny_weights(config)))
    folder = tmp_path / "m"
    first.save_pretrained(folder)
    assert huggingface.read_config(folder) == config
    assert_same_weights(huggingface.read_weights(folder, config), first, config)


@pytest.mark.parametrize("head_dim", [16, 32])
def test_logits_from_a_gguf_file(tmp_path, head_dim):
    # A wrong order of query and key rows leaves every weight's values right, and the logits wrong.
    decoder = pytest.importorskip("mos_jax.models.decoder")
    config = dataclasses.replace(tiny_config(), name="m", head_dim=head_dim)
    weights = tiny_weights(config, seed=3)
    path = write_gguf(tmp_path / "m.gguf", config, weights)
    model = load(write_folder(tmp_path / "m", config, weights))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 17))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        ours = decoder.Decoder(config, gguf.read_weights(path, config))(tokens)
    np.testing.assert_allclose(np.asarray(ours), expected, atol=2e-4)


def test_tokenizer_of_smollm2(smollm2):
    theirs = transformers.AutoTokenizer.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, local_files_only=True
    )
    # transformers takes vocabulary and merges from the file but ignores its pre-tokenizer, which
    # sets digits apart (the published tokenizer.json of SmolLM2 does).
    from tokenizers import pre_tokenizers

    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = Tokenizer.from_gguf(smollm2)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        for skip in (True, False):
            decoded = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special=skip) == decoded, text
    for messages in (CHAT, CHAT[:1], [{"role": "system", "content": "Be brief."}, *CHAT]):
        for prompt in (True, False):
            text = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert ours.render(messages, add_generation_prompt=prompt) == text
    assert (ours.bos, ours.end_of_turn, ours.pad) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )


def test_tokenizer_folder_written_by_transformers(smollm2, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, local_files_only=True
    )
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert (ours.end_of_turn, ours.pad, ours.bos) == (2, 2, 1)
    assert ours.render(CHAT, True) == theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
