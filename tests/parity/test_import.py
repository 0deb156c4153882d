"""PEFT folders in and out: what PEFT saved, imported, trained on, and loaded by PEFT again."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.sites import select_sites
from mos_jax.adapters.storage import adapter_arrays, load_adapter, save_adapter
from mos_jax.adapters.uni_lora import UniLoRAConfig
from mos_jax.adapters.vb_lora import VBLoRAConfig
from mos_jax.adapters.vera import VeRAConfig
from mos_jax.errors import InputError
from mos_jax.interop.peft import export_peft
from mos_jax.interop.peft_import import import_peft
from mos_jax.interop.peft_native import NATIVE, export_native
from mos_jax.models import huggingface
from mos_jax.models.decoder import Decoder
from tests.adapters.fixtures_adapters import quick_jit, randomised, split_trained
from tests.parity.fixtures_peft import (
    CONFIG,
    TOKENS,
    TOLERANCE,
    adapted_modules,
    distance,
    logits_of,
    random_decoder,
    scaled,
    torch_logits,
    torch_model,
    trained_size,
)
from tests.parity.test_families import MODELS, build

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # those of the other libraries
]

ALL = "all-linear"
OPTIONS = {"base_name": "tiny", "num_layers": CONFIG.num_layers}


@dataclasses.dataclass(frozen=True)
class Saved:
    """An adapter that PEFT makes.

    Attributes:
      make: PEFT's configuration.
      sizes: standard deviations of its random parameters, by a word of their names.
      method: ours.
    """

    make: Callable[[], Any]
    sizes: dict[str, float]
    method: str


def lora(**options):
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    return Saved(lambda: peft.LoraConfig(task_type="CAUSAL_LM", **fields), {"lora_B": 0.1}, "lora")


def vera(**options):
    fields = {"r": 24, "target_modules": ALL, **options}
    sizes = {"lambda_d": 0.2, "lambda_b": 0.2}
    return Saved(lambda: peft.VeraConfig(task_type="CAUSAL_LM", **fields), sizes, "vera")


def vb_lora(**options):
    fields = {"r": 3, "num_vectors": 40, "vector_length": 16, "topk": 3, "target_modules": ALL}
    fields |= options
    sizes = {"logits": 1.0, "bank": 0.3}
    return Saved(lambda: peft.VBLoRAConfig(task_type="CAUSAL_LM", **fields), sizes, "vb_lora")


def uni_lora(**options):
    fields = {"r": 3, "theta_d_length": 2500, "target_modules": ALL, **options}
    sizes = {"theta": 0.3}
    return Saved(lambda: peft.UniLoraConfig(task_type="CAUSAL_LM", **fields), sizes, "uni_lora")


SAVED = {
    "lora": lora(),
    "lora, all linear, alpha below the rank": lora(target_modules=ALL, lora_alpha=3),
    "rslora": lora(use_rslora=True, lora_alpha=5),
    "lora, one block": lora(target_modules=["o_proj", "up_proj"], layers_to_transform=[1]),
    "lora, blocks that differ": lora(
        target_modules=["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "v_proj"]
    ),
    "lora, an expression": lora(target_modules=r"model\.layers\.1\..*(k|down)_proj"),
    "lora, excluded": lora(target_modules=ALL, exclude_modules=["layers.0.mlp.up_proj"]),
    "lora, patterns": lora(
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 3, "layers.1.self_attn.q_proj": 2},
        alpha_pattern={r".*\.0\..*": 7.5, "v_proj": 1},
    ),
    "rslora, patterns": lora(
        rank_pattern={"q_proj": 9, "k_proj": 1}, alpha_pattern={"v_proj": 2}, use_rslora=True
    ),
    "vera": vera(),
    "vera, one block": vera(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    "vb_lora": vb_lora(),
    "vb_lora, some sites": vb_lora(target_modules=["k_proj", "o_proj"], layers_to_transform=[0]),
    "uni_lora, index saved": uni_lora(save_indices=True),
    "uni_lora, index drawn": uni_lora(proj_seed=7),
    "uni_lora, some sites": uni_lora(
        target_modules=["k_proj", "down_proj"], layers_to_transform=[1], theta_d_length=64
    ),
}


@pytest.fixture(scope="module")
def decoder():
    return random_decoder()


def make(saved: Saved):
    """PEFT's model, all of whose parameters are random and not zero."""
    return randomised_peft(peft.get_peft_model(torch_model(CONFIG), saved.make()), saved)


def randomised_peft(model, saved: Saved):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for word, size in saved.sizes.items():
                if word in name:
                    parameter.normal_(0.0, size)
    return model.eval()


def reloaded(path):
    return peft.PeftModel.from_pretrained(torch_model(CONFIG), str(path)).eval()


def arrays_of(path):
    return load_file(path / "adapter_model.safetensors")


def assert_same_files(ours, theirs):
    """The tensors bitwise, and of the configuration all that says what is computed or drawn."""
    have, want = arrays_of(ours), arrays_of(theirs)
    assert set(have) == set(want)
    for name, array in want.items():
        assert (have[name].dtype, have[name].shape) == (array.dtype, array.shape), name
        assert have[name].tobytes() == array.tobytes(), name
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (ours, theirs)]
    said_otherwise = {"target_modules", "exclude_modules", "layers_to_transform", "rank_pattern"}
    said_otherwise |= {"alpha_pattern", "base_model_name_or_path"}
    for name, value in configs[0].items():
        if name not in said_otherwise:
            assert value == configs[1][name], name


def described(model):
    """By module, what PEFT computes with there."""
    return {
        (name, layer): {
            part: getattr(module, part)["default"]
            for part in ("r", "scaling", "topk")
            if part in dir(module)
        }
        for name, layer, module in adapted_modules(model, peft.tuners.tuners_utils.BaseTunerLayer)
    }


@quick_jit
def loss_and_gradients(decoder, adapter, targets):
    graphdef, trained, frozen = split_trained(adapter)

    def loss(trained):
        logits = decoder(jnp.asarray(TOKENS), nnx.merge(graphdef, trained, frozen).factors())
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return jax.value_and_grad(loss)(trained)


def trained_on(decoder, adapter, steps=3, rate=0.1):
    """The adapter after a few plain steps, and the losses before each and after the last."""
    targets, losses = jnp.asarray(np.roll(TOKENS, -1, axis=1)), []
    for _ in range(steps):
        loss, gradients = loss_and_gradients(decoder, adapter, targets)
        losses.append(float(loss))
        graphdef, trained, frozen = split_trained(adapter)
        trained = jax.tree.map(lambda leaf, g: leaf - rate * g, trained, gradients)
        adapter = nnx.merge(graphdef, trained, frozen)
    losses.append(float(loss_and_gradients(decoder, adapter, targets)[0]))
    return adapter, losses


@pytest.mark.parametrize("name", SAVED)
def test_the_whole_way(tmp_path, decoder, name):
    saved = SAVED[name]
    model = make(saved)
    theirs = tmp_path / "theirs"
    model.save_pretrained(theirs)
    expected = torch_logits(model)
    assert distance(logits_of(decoder), expected) > 0.02

    adapter = import_peft(theirs, decoder.sites)
    assert adapter.config.method == saved.method
    assert distance(logits_of(decoder, adapter.factors()), expected) < TOLERANCE

    # Out again in its own type: the same files, which PEFT computes the same with.
    save_indices = {"save_indices": getattr(saved.make(), "save_indices", True)}
    ours = export_native(tmp_path / "ours", adapter, **OPTIONS, **save_indices)
    assert_same_files(ours, theirs)
    again = reloaded(ours)
    assert described(again) == described(model)
    assert np.array_equal(torch_logits(again), expected)

    # And as a LoRA.
    as_lora = export_peft(tmp_path / "lora", adapter.factors(), **OPTIONS)
    assert distance(torch_logits(reloaded(as_lora)), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["rslora, patterns", "vera", "vb_lora", "uni_lora, index saved"])
def test_an_imported_adapter_trains_on_merges_and_is_saved(tmp_path, decoder, name):
    model = make(SAVED[name])
    model.save_pretrained(tmp_path / "theirs")
    adapter = import_peft(tmp_path / "theirs", decoder.sites)
    adapter, losses = trained_on(decoder, adapter)
    assert losses[-1] < losses[0]
    factors = adapter.factors()
    logits = logits_of(decoder, factors)
    assert distance(logits, torch_logits(model)) > 1e-3

    loaded = load_adapter(save_adapter(tmp_path / "adapter", adapter), sites=decoder.sites)
    assert loaded.config == adapter.config
    for path, array in adapter_arrays(adapter).items():
        np.testing.assert_array_equal(adapter_arrays(loaded)[path], array)

    weights = {key: array[...] for key, array in decoder.weights.items()}
    for key, low_rank in factors.items():
        weights[f"blocks/{key}"] = low_rank.merge(weights[f"blocks/{key}"])
    assert distance(logits_of(Decoder(CONFIG, weights)), logits) < TOLERANCE

    ours = export_native(tmp_path / "ours", adapter, **OPTIONS)
    assert distance(torch_logits(reloaded(ours)), logits) < TOLERANCE


class TestNative:
    """Adapters that were trained here, in PEFT's own types."""

    CONFIGS = {  # noqa: RUF012
        "lora": (LoRAConfig(rank=3, alpha=5.0, rslora=True), ALL, {"a": 0.2, "b": 0.1}),
        "vera, shared": (VeRAConfig(rank=24, projections="shared"), ALL, {"d": 0.2, "b": 0.2}),
        "vera, one type": (VeRAConfig(rank=48), "down_proj", {"d": 0.3, "b": 0.3}),
        "vb_lora": (VBLoRAConfig(rank=3, num_vectors=40, vector_length=16), ALL, {"bank": 0.3}),
        "uni_lora": (UniLoRAConfig(theta_length=2500, rank=3), ALL, {"theta": 0.3}),
        "uni_lora, drawn": (
            UniLoRAConfig(theta_length=2500, rank=3, used_more="drawn"),
            ALL,
            {"theta": 0.3},
        ),
    }

    def test_every_method_is_here(self):
        assert {config.method for config, _, _ in self.CONFIGS.values()} == set(NATIVE)

    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize("layers", [None, [1]], ids=["all", "one block"])
    def test_peft_computes_the_same(self, tmp_path, decoder, name, layers):
        config, include, sizes = self.CONFIGS[name]
        if layers and config.method == "uni_lora":
            config = dataclasses.replace(config, theta_length=500)
        sites = select_sites(decoder.sites, include, layers=layers)
        adapter = scaled(randomised(create_adapter(config, sites, jax.random.key(0))), **sizes)
        path = export_native(tmp_path / "x", adapter, **OPTIONS)
        expected = logits_of(decoder, adapter.factors())
        model = reloaded(path)
        assert distance(torch_logits(model), expected) < TOLERANCE
        assert distance(logits_of(decoder), expected) > 0.02
        assert len(described(model)) == sum(site.num_layers for site in sites.values())

        # What PEFT saves of it is the same file, which is imported as the same adapter.
        model.save_pretrained(tmp_path / "theirs")
        assert_same_files(path, tmp_path / "theirs")
        again = adapter_arrays(import_peft(tmp_path / "theirs", decoder.sites))
        for key, array in adapter_arrays(adapter).items():
            if not key.startswith("projection"):  # which have another name with one type
                np.testing.assert_array_equal(again[key], array)


class TestIncomplete:
    """Folders that lack what training needs."""

    def test_the_compact_vb_lora_is_a_lora(self, tmp_path, decoder):
        model = make(vb_lora(save_only_topk_weights=True))
        model.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"not the logits that VB-LoRA trains.*as_lora=True"):
            import_peft(tmp_path, decoder.sites)
        adapter = import_peft(tmp_path, decoder.sites, as_lora=True)
        assert adapter.config.method == "lora"
        expected = torch_logits(model)
        assert distance(logits_of(decoder, adapter.factors()), expected) < TOLERANCE
        assert distance(logits_of(decoder), expected) > 0.02
        _, losses = trained_on(decoder, adapter)
        assert losses[-1] < losses[0]

    def test_a_vera_without_its_projections_is_refused(self, tmp_path, decoder):
        make(vera(save_projection=False)).save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"without its projections.*PyTorch's generator"):
            import_peft(tmp_path, decoder.sites)


@pytest.mark.parametrize("name", ["vera", "vb_lora", "uni_lora, index drawn"])
def test_any_type_as_a_lora(tmp_path, decoder, name):
    model = make(SAVED[name])
    model.save_pretrained(tmp_path / "theirs")
    adapter = import_peft(tmp_path / "theirs", decoder.sites, as_lora=True)
    assert adapter.config.method == "lora"
    expected = torch_logits(model)
    assert distance(logits_of(decoder, adapter.factors()), expected) < TOLERANCE
    path = export_native(tmp_path / "ours", adapter, **OPTIONS)
    assert distance(torch_logits(reloaded(path)), expected) < TOLERANCE


def test_a_base_in_bf16_rounds_the_scales_of_a_uni_lora(tmp_path, decoder):
    """PEFT keeps them in the dtype of the base; they are imported as they are, and go out again."""
    config = peft.UniLoraConfig(
        r=3, theta_d_length=700, target_modules=["q_proj", "v_proj"], save_indices=True
    )
    model = peft.get_peft_model(torch_model(CONFIG).to(torch.bfloat16), config).eval()
    model.save_pretrained(tmp_path / "theirs")
    adapter = import_peft(tmp_path / "theirs", decoder.sites)
    path = export_native(tmp_path / "ours", adapter, **OPTIONS)
    have = arrays_of(path)
    for name, tensor in peft.utils.load_peft_weights(str(tmp_path / "theirs"), "cpu").items():
        np.testing.assert_array_equal(have[name], tensor.float().numpy())


@pytest.mark.parametrize(
    ("pad_rank", "ranks"), [(8, (3, 8)), (16, (3, 5))], ids=["to the largest", "above all"]
)
def test_padded_for_vllm(tmp_path, decoder, pad_rank, ranks):
    """PEFT computes the same logits from one rank and one alpha, with no pattern."""
    factors = {}
    for (name, rank), scale in zip(
        {"q_proj": ranks[0], "down_proj": ranks[1]}.items(), ([2.0, -0.5], [1.0, 0.0]), strict=True
    ):
        sites = select_sites(decoder.sites, name)
        adapter = randomised(create_adapter(LoRAConfig(rank=rank), sites, jax.random.key(0)))
        (low_rank,) = trained_size(adapter.factors()).values()
        factors[name] = dataclasses.replace(low_rank, scale=jnp.asarray(scale, jnp.float32))
    path = export_peft(tmp_path / "x", factors, **OPTIONS, pad_rank=pad_rank)
    raw = json.loads((path / "adapter_config.json").read_text())
    assert (raw["r"], raw["rank_pattern"], raw["alpha_pattern"]) == (pad_rank, {}, {})
    expected = logits_of(decoder, factors)
    assert distance(torch_logits(reloaded(path)), expected) < TOLERANCE
    assert distance(logits_of(decoder), expected) > 0.5


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3"])
def test_other_families(tmp_path, family):
    """Uni-LoRA with a drawn index: every place depends on the order of the family's modules."""
    name, fields = MODELS[family]
    base = build(name, fields)
    base.save_pretrained(tmp_path / "base")
    config = huggingface.read_config(tmp_path / "base")
    weights = huggingface.read_weights(tmp_path / "base", config)
    decoder = Decoder(config, {key: jnp.asarray(array) for key, array in weights.items()})
    saved = uni_lora(theta_d_length=8000)
    model = randomised_peft(peft.get_peft_model(base, saved.make()), saved)
    model.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(model)
    adapter = import_peft(tmp_path / "theirs", decoder.sites)
    assert distance(logits_of(decoder, adapter.factors()), expected) < TOLERANCE
    assert distance(logits_of(decoder), expected) > 0.1

    options = {"base_name": "tiny", "num_layers": config.num_layers}
    path = export_peft(tmp_path / "lora", adapter.factors(), **options)
    again = peft.PeftModel.from_pretrained(build(name, fields), str(path)).eval()
    assert distance(torch_logits(again), expected) < TOLERANCE
