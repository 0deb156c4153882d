"""The decoder against transformers, and LoRA folders both ways against PEFT."""

import contextlib
import dataclasses
import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.sites import SITE_TYPES, select_sites
from mos_jax.interop.check import largest_logit_difference
from mos_jax.interop.peft import export_peft, read_peft_factors
from mos_jax.interop.peft_config import SITE_MODULES
from mos_jax.models.config import DecoderConfig, RopeScaling
from mos_jax.models.decoder import Decoder
from tests.adapters.fixtures_adapters import randomised

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # those of the other libraries
]

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
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied_embeddings": False},
    # Of the eight wavelengths of a head, 6, 24, 94 and more positions, the first is kept, the
    # second blended, the others stretched.
    "llama3 rope": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64), "rope_base": 50000.0},
    "wide heads": {"head_dim": 32, "num_kv_heads": 1, "rms_eps": 1e-2},
}
MOS = MoSConfig(equivalent_rank=3, rank=5, shards_per_vector=2, private_rank=1, alpha=16.0)
METHODS = {
    "mos": (MOS, None),
    "mos, one layer": (dataclasses.replace(MOS, rank=2), [1]),
    "pure sharing, fixed random scaling": (
        MoSConfig.pure_sharing(2, random_scaling="fixed", random_scaling_std=0.5),
        None,
    ),
    "pure sharing, trained random scaling": (
        MoSConfig.pure_sharing(2, random_scaling="trained", random_scaling_std=0.5),
        None,
    ),
    "lora": (LoRAConfig(rank=7, alpha=16.0), None),
    "lora, one layer": (LoRAConfig(rank=4, alpha=3.5), [0]),
    "rslora": (LoRAConfig(rank=8, alpha=2.0, rslora=True), None),
}


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


def logits_of(decoder, factors=None, tokens=TOKENS):
    return np.asarray(jax.jit(lambda model, f: model(jnp.asarray(tokens), f))(decoder, factors))


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


@pytest.fixture(scope="module")
def decoder():
    return decoder_of(torch_model(CONFIG), CONFIG)


class TestDecoder:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_logits_are_those_of_transformers(self, architecture):
        config = dataclasses.replace(CONFIG, **ARCHITECTURES[architecture])
        model = torch_model(config)
        expected = torch_logits(model)
        assert np.abs(expected).max() > 1
        assert distance(logits_of(decoder_of(model, config)), expected) < TOLERANCE

    def test_far_positions(self):
        """At positions in the hundreds, wavelengths of every kind have turned."""
        config = dataclasses.replace(CONFIG, **ARCHITECTURES["llama3 rope"])
        model = torch_model(config)
        tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 300)).astype(np.int32)
        expected = torch_logits(model, tokens)
        decoder = decoder_of(model, config)
        assert distance(logits_of(decoder, tokens=tokens), expected) < TOLERANCE
        # The test would not notice a scaling that does nothing.
        plain = decoder_of(model, dataclasses.replace(config, rope_scaling=None))
        assert distance(logits_of(plain, tokens=tokens), expected) > 0.1


class TestExport:
    @pytest.mark.parametrize("method", METHODS)
    def test_peft_computes_the_same_logits(self, tmp_path, decoder, method):
        config, layers = METHODS[method]
        sites = select_sites(decoder.sites, layers=layers)
        # Scaled so that A, B and the logits stay of the size of trained ones.
        adapter = randomised(create_adapter(config, sites, jax.random.key(0)))
        factors = {
            name: dataclasses.replace(f, a=0.1 * f.a, b=0.05 * f.b)
            for name, f in adapter.factors().items()
        }
        path = export_peft(
            tmp_path / "x", factors, base_name="tiny", num_layers=CONFIG.num_layers, card={"a": 1}
        )
        with warnings_are_errors():
            model = peft.PeftModel.from_pretrained(torch_model(CONFIG), path).eval()
        expected = logits_of(decoder, factors)
        assert distance(torch_logits(model), expected) < TOLERANCE
        assert distance(logits_of(decoder), expected) > 0.1

        for module_name, module in model.base_model.model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                name, layer = module_name.split(".")[-1], int(module_name.split(".")[2])
                position = layers.index(layer) if layers else layer
                assert np.float32(module.scaling["default"]) == factors[name].scale[position]

        read = read_peft_factors(path, decoder.sites)
        assert largest_logit_difference(decoder, TOKENS, factors, read) == 0.0

    def test_merged_by_peft(self, tmp_path, decoder):
        adapter = randomised(create_adapter(MOS, decoder.sites, jax.random.key(0)))
        factors = {
            name: dataclasses.replace(f, a=0.1 * f.a, b=0.05 * f.b)
            for name, f in adapter.factors().items()
        }
        path = export_peft(tmp_path / "x", factors, base_name="tiny", num_layers=2)
        merged = peft.PeftModel.from_pretrained(torch_model(CONFIG), path).merge_and_unload()
        assert distance(torch_logits(merged), logits_of(decoder, factors)) < TOLERANCE

    def test_ranks_scales_and_layers_that_differ(self, tmp_path, decoder):
        """Every pattern that the export can write, as PEFT understands it."""
        factors = {}
        for name, rank, layers in (
            ("q_proj", 2, None),
            ("o_proj", 3, (1,)),
            ("gate_proj", 2, (0,)),
            ("down_proj", 5, None),
        ):
            sites = select_sites(decoder.sites, name, layers=layers)
            adapter = randomised(create_adapter(LoRAConfig(rank=rank), sites, jax.random.key(0)))
            (low_rank,) = adapter.factors().values()
            scale = jnp.asarray([0.07, -0.3], jnp.float32)[: len(low_rank.scale)]
            factors[name] = dataclasses.replace(low_rank, a=0.3 * low_rank.a, scale=scale)
        path = export_peft(tmp_path / "x", factors, base_name="tiny", num_layers=2)
        raw = json.loads((path / "adapter_config.json").read_text())
        assert raw["rank_pattern"]
        assert raw["alpha_pattern"]
        with warnings_are_errors():
            model = peft.PeftModel.from_pretrained(torch_model(CONFIG), path).eval()
        assert distance(torch_logits(model), logits_of(decoder, factors)) < TOLERANCE
        read = read_peft_factors(path, decoder.sites)
        assert largest_logit_difference(decoder, TOKENS, factors, read) == 0.0

    def test_the_config_is_one_that_peft_writes(self, tmp_path, decoder):
        config = LoRAConfig(rank=4, alpha=16.0)
        sites = select_sites(decoder.sites, ["q_proj", "down_proj"], layers=[1])
        factors = create_adapter(config, sites, jax.random.key(0)).factors()
        export_peft(tmp_path / "ours", factors, base_name="tiny", num_layers=2)
        theirs = peft.LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=["q_proj", "down_proj"],
            layers_to_transform=[1],
            task_type="CAUSAL_LM",
            base_model_name_or_path="tiny",
        )
        model = peft.get_peft_model(torch_model(CONFIG), theirs)
        model.save_pretrained(tmp_path / "theirs")
        ours, theirs = (
            json.loads((tmp_path / who / "adapter_config.json").read_text())
            for who in ("ours", "theirs")
        )
        # The folder that the model came from: here none.
        theirs["base_model_name_or_path"] = "tiny"
        theirs["target_modules"].sort()
        assert ours == {name: theirs[name] for name in ours}
        names = [
            set(peft.utils.load_peft_weights(str(tmp_path / who), device="cpu"))
            for who in ("ours", "theirs")
        ]
        assert names[0] == names[1]


class TestRead:
    @pytest.mark.parametrize(
        "options",
        [
            {"target_modules": "all-linear"},
            {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_alpha": 5},
            {"target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]},
            {"target_modules": ["gate_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
            {"target_modules": r"model\.layers\.1\..*(k|down)_proj"},
            {"target_modules": list(SITE_TYPES), "exclude_modules": ["layers.0.mlp.up_proj"]},
            {
                "target_modules": ["q_proj", "v_proj", "down_proj"],
                "rank_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 2},
                "alpha_pattern": {r".*\.0\..*": 7.5, "v_proj": 1},
            },
            {
                "target_modules": ["q_proj", "v_proj"],
                "rank_pattern": {"q_proj": 9},
                "use_rslora": True,
            },
        ],
    )
    def test_a_lora_of_peft(self, tmp_path, decoder, options):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **options})
        model = peft.get_peft_model(torch_model(CONFIG), config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.05)
        model.save_pretrained(tmp_path)
        expected = torch_logits(model)
        factors = read_peft_factors(tmp_path, decoder.sites)
        assert distance(logits_of(decoder, factors), expected) < TOLERANCE
        assert distance(logits_of(decoder), expected) > 0.01
