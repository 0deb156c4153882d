"""Adapters as GGUF, loaded and computed by llama.cpp itself.

Needs the package xllamacpp, which carries llama.cpp and which the interop extra installs on
Linux on x86-64.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax.adapters.low_rank import LowRank
from mos_jax.interop.adapter_gguf import write_adapter_gguf
from mos_jax.models.base import load_base
from mos_jax.models.tiny import tiny_weights
from tests.models.fixtures_families import family_config
from tests.models.fixtures_models import write_gguf

llama_cpp = pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.parity

# What these GGUF files do not say: windows of Mistral and Qwen 2, and linear scaling.
PLAIN = {
    "llama": {"rope_scaling": None},
    "mistral": {"window": None},
    "qwen2": {"window": None, "windowed_layers": None},
    "qwen3": {},
    "gemma3": {"rope_scaling": None},
}
# Gemma's own difference; llama.cpp looks its GELU up in a table of half precision.
TOLERANCE = {"gemma3": 5e-3}


def some(config, scales):
    random, factors = np.random.default_rng(0), {}
    for name, (scale, rank, layers) in scales.items():
        depth, d_in, d_out = config.site_shapes()[name]
        depth = depth if layers is None else len(layers)
        a = random.normal(size=(depth, rank, d_in)) / np.sqrt(d_in)
        b = random.normal(size=(depth, rank, d_out)) / np.sqrt(rank)
        a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
        factors[name] = LowRank(a, b, jnp.full(depth, scale, jnp.float32), layers)
    return factors


def log_probabilities(model, adapter, prompt, forced):
    """Log-probabilities of the next token by id, of the 200 likeliest."""
    params = llama_cpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 256, 1, 0, 0
    params.warmup = False
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    request = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": 200,
        "cache_prompt": False,
        # The sampled token must be a whole character; probabilities are those before the bias.
        "logit_bias": [[forced, 1000.0]],
    }
    answer = llama_cpp.Server(params).handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
    (first,) = answer["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}


@pytest.mark.parametrize("family", PLAIN)
def test_llama_cpp_computes_the_adapter(tmp_path, family):
    config = family_config(family, vocab_size=260, **PLAIN[family])
    model = write_gguf(tmp_path / "m.gguf", config, tiny_weights(config), vocabulary=True)
    base = load_base(model)
    prompt = np.random.default_rng(1).integers(0, 260, 24)
    forced = base.tokenizer.encode("a")[0]
    # Rows of queries and keys alone; then all sites, most with a scale that goes into B.
    every = {name: (0.2 + 0.1 * i, 3 + i, None) for i, name in enumerate(config.site_shapes())}
    sets = {
        "base": None,
        "qk": some(config, {"q_proj": (2.0, 4, None), "k_proj": (2.0, 4, None)}),
        "all": some(config, every | {"o_proj": (0.3, 3, (1,))}),
    }
    tokens = jnp.asarray(prompt[None], jnp.int32)
    ours = {
        name: np.asarray(jax.nn.log_softmax(base.model(tokens, factors)[0, -1]))
        for name, factors in sets.items()
    }
    for name, factors in sets.items():
        file = None
        if factors is not None:
            file = tmp_path / f"{name}.gguf"
            write_adapter_gguf(file, factors, base.config)
        found = log_probabilities(model, file, [int(token) for token in prompt], forced)
        ids, values = np.array(list(found)), np.array(list(found.values()))
        distances = {other: np.abs(values - ours[other][ids]).max() for other in sets}
        own = distances.pop(name)
        assert own < TOLERANCE.get(family, 1e-4), (name, own)
        assert min(distances.values()) > 0.2, distances
