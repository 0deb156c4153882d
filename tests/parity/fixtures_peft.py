"""One small random model, in PyTorch and as a `Decoder`, and adapters on it."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.sites import SITE_MODULES
from mos_jax.adapters.storage import adapter_arrays, with_arrays
from mos_jax.models.config import DecoderConfig
from mos_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = 1e-3
CONFIG = DecoderConfig.create(
    name="tiny",
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=96,
    vocab_size=128,
    rope_base=10000.0,
    rms_eps=1e-5,
    tied_embeddings=True,
    max_positions=64,
)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 40)).astype(np.int32)


def torch_model(config):
    """A random LlamaForCausalLM whose norms are not all ones."""
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_eps,
            tie_word_embeddings=config.tied_embeddings,
            max_position_embeddings=1024,
            rope_parameters=rope,
            initializer_range=0.2,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
    return model


def decoder_of(model, config):
    """The same weights as a Decoder; torch holds W transposed."""
    state = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}

    def stacked(module):
        return np.stack(
            [state[f"model.layers.{k}.{module}.weight"] for k in range(config.num_layers)]
        )

    weights = {
        "embed": state["model.embed_tokens.weight"],
        "final_norm": state["model.norm.weight"],
        "blocks/attn_norm": stacked("input_layernorm"),
        "blocks/mlp_norm": stacked("post_attention_layernorm"),
        **{f"blocks/{n}": stacked(m).swapaxes(1, 2) for n, m in SITE_MODULES.items()},
    }
    if not config.tied_embeddings:
        weights["head"] = state["lm_head.weight"].T
    assert {n: w.shape for n, w in weights.items()} == config.weight_shapes()
    return Decoder(config, {name: jnp.asarray(array) for name, array in weights.items()})


def torch_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


@jax.jit
def _logits(decoder, tokens, factors):
    return decoder(tokens, factors)


def logits_of(decoder, factors=None, tokens=TOKENS):
    return np.asarray(_logits(decoder, jnp.asarray(tokens), factors))


def distance(left, right):
    assert left.shape == right.shape
    found = float(np.abs(left - right).max())
    print(f"largest difference {found:.2e} of logits up to {np.abs(left).max():.2f}")
    return found


@contextlib.contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of transformers' own making, whatever the adapter.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def trained_size(factors: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Factors whose A, B and change of the weights are of the size of trained ones.

    Whatever the method and its scale, logits of `CONFIG` then differ visibly from the base's and
    stay of their size.
    """
    return {
        name: dataclasses.replace(
            f, a=f.a * (0.1 / f.a.std()), b=f.b * (0.15 / f.b.std() / f.scale.max())
        )
        for name, f in factors.items()
    }


def random_decoder():
    """The `Decoder` with the weights of `torch_model(CONFIG)`."""
    return decoder_of(torch_model(CONFIG), CONFIG)


def adapted_modules(model, kind: type) -> Iterator[tuple[str, int, Any]]:
    """Site type, block and module of every layer of a PEFT model that is a `kind`, in its order."""
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, kind):
            yield name.split(".")[-1], int(name.split(".")[2]), module


def count_trainable(model) -> int:
    """Trainable parameters, each counted once however many modules hold it."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def put(tensor, array) -> None:
    """Overwrites a parameter or a buffer in place."""
    source = torch.from_numpy(np.array(array))
    assert tensor.shape == source.shape
    assert tensor.dtype == source.dtype
    with torch.no_grad():
        tensor.copy_(source)


def replaced(adapter: Adapter, arrays: Mapping[str, np.ndarray]) -> Adapter:
    """The adapter with some of its arrays, by their path, replaced."""
    have = adapter_arrays(adapter)
    assert set(arrays) <= set(have)
    return with_arrays(adapter, {**have, **arrays})


def scaled(adapter: Adapter, **sizes: float) -> Adapter:
    """The adapter with its arrays multiplied, by the first word of their paths."""
    have = adapter_arrays(adapter)
    assert set(sizes) <= {path.split("/")[0] for path in have}
    return replaced(
        adapter,
        {
            path: array * np.float32(sizes[path.split("/")[0]])
            for path, array in have.items()
            if path.split("/")[0] in sizes
        },
    )
