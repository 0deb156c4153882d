"""The default base against transformers on the same weights: logits, loss, greedy text."""

import jax
import numpy as np
import pytest

from mos_jax import InputError, Sampling, generate, load_base
from mos_jax.models.huggingface import tensor_names
from tests.models.fixtures_models import huggingface_config, in_file_order

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # those of the other libraries
]

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "John is married to Mary. They have a child called Ann. What is Mary to Ann?",
    "Count from one to ten.",
    "Is 17 a prime number? Explain briefly.",
]


@pytest.fixture(scope="module")
def base():
    try:
        return load_base("smollm2-135m-instruct")
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reference(base):
    """transformers' model, filled from this base's own arrays."""
    fields = huggingface_config(base.config)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    weights = {"embed": base.model.embed[...], "final_norm": base.model.final_norm[...]}
    weights |= {f"blocks/{n}": v[...] for n, v in base.model.blocks.items()}
    tensors = in_file_order(base.config, weights, tensor_names(base.config))
    state = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    missing, extra = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not extra
    model.tie_weights()
    return model.eval()


def prompts(base):
    texts = [base.tokenizer.render([{"role": "user", "content": q}], True) for q in QUESTIONS]
    return [base.tokenizer.encode(text) for text in texts]


def test_logits_agree_on_every_prompt(base, reference):
    run = jax.jit(lambda model, tokens: model(tokens))
    for prompt in prompts(base):
        tokens = np.array([prompt], np.int32)
        with torch.no_grad():
            want = reference(torch.from_numpy(tokens).long()).logits.numpy()
        np.testing.assert_allclose(run(base.model, tokens), want, atol=1e-3)


def test_logits_agree_with_padding_in_front(base, reference):
    """Padded rows: positions from the first real token on, padding in a segment of its own."""
    rows = prompts(base)[:3]
    width = max(map(len, rows))
    tokens = np.zeros((3, width), np.int32)
    real = np.zeros((3, width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        real[i, width - len(row) :] = 1
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    with torch.no_grad():
        want = reference(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(real).long(),
            position_ids=torch.from_numpy(positions).long(),
        ).logits.numpy()
    got = np.asarray(base.model(tokens, positions=positions, segments=real))
    np.testing.assert_allclose(got[real > 0], want[real > 0], atol=1e-3)


def test_greedy_text_is_identical(base, reference):
    stop = base.tokenizer.end_of_turn
    got = generate(base.model, prompts(base), [stop], Sampling.create(max_new_tokens=24))
    for prompt, ids in zip(prompts(base), got, strict=True):
        with torch.no_grad():
            out = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=stop,
            )[0, len(prompt) :].tolist()
        want = out[: out.index(stop)] if stop in out else out
        assert base.tokenizer.decode(ids) == base.tokenizer.decode(want)
        assert ids == want
