"""The decoder against transformers, and LoRA folders both ways against PEFT."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import METHODS, create_adapter
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.prolora import PRoLoRAConfig
from mos_jax.adapters.rasa import RaSAConfig
from mos_jax.adapters.share_lora import ShareLoRAConfig
from mos_jax.adapters.sites import SITE_TYPES, select_sites
from mos_jax.adapters.storage import adapter_arrays, with_arrays
from mos_jax.adapters.tied_lora import TiedLoRAConfig
from mos_jax.adapters.uni_lora import UniLoRAConfig
from mos_jax.adapters.vb_lora import VBLoRAConfig
from mos_jax.adapters.vera import VeRAConfig
from mos_jax.interop.check import largest_logit_difference
from mos_jax.interop.peft import export_peft, read_peft_factors
from mos_jax.models.config import RopeScaling
from tests.adapters.fixtures_adapters import randomised
from tests.parity.fixtures_peft import (
    CONFIG,
    TOKENS,
    TOLERANCE,
    adapted_modules,
    decoder_of,
    distance,
    logits_of,
    random_decoder,
    torch_logits,
    torch_model,
    trained_size,
    warnings_are_errors,
)

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # those of the other libraries
]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied_embeddings": False},
    # Of the eight wavelengths of a head, 6, 24, 94 and more positions, the first is kept, the
    # second blended, the others stretched.
    "llama3 rope": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64), "rope_base": 50000.0},
    "wide heads": {"head_dim": 32, "num_kv_heads": 1, "rms_eps": 1e-2},
}
MOS = MoSConfig(equivalent_rank=3, rank=5, shards_per_vector=2, private_rank=1, alpha=16.0)
# A configuration and what of the base it adapts.
EXPORTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "mos": (MOS, {}),
    "mos, one layer": (dataclasses.replace(MOS, rank=2), {"layers": [1]}),
    "mos, all options": (
        dataclasses.replace(MOS, balanced_routing=True, rank_scaling=True, pool_scope="width"),
        {},
    ),
    "pure sharing, fixed random scaling": (
        MoSConfig.pure_sharing(2, random_scaling="fixed", random_scaling_std=0.5),
        {},
    ),
    "pure sharing, trained random scaling": (
        MoSConfig.pure_sharing(2, random_scaling="trained", random_scaling_std=0.5),
        {},
    ),
    "lora": (LoRAConfig(rank=7, alpha=16.0), {}),
    "mos, blocks by type": (
        dataclasses.replace(MOS, rank=2),
        {"include": ["0.self_attn.q_proj", "v_proj", r"layers\.1\.mlp\..*"]},
    ),
    "mos, patterns": (
        dataclasses.replace(
            MOS,
            pool_scope="width",
            rank_pattern={"0.self_attn.q_proj": 2, "mlp.*": 3},
            alpha_pattern={"layers.1.*": 4.0},
        ),
        {},
    ),
    "lora, one layer": (LoRAConfig(rank=4, alpha=3.5), {"layers": [0]}),
    "rslora": (LoRAConfig(rank=8, alpha=2.0, rslora=True), {}),
    "lora, patterns": (
        LoRAConfig(
            rank=4,
            alpha=3.0,
            rslora=True,
            rank_pattern={"layers.0.self_attn.q_proj": 2, "1.mlp.*": 1, "up_proj": 7},
            alpha_pattern={"[kv]_proj": 1.5, "layers.1.*": 5},
        ),
        {},
    ),
    # Neither number of chunks divides all widths.
    "prolora": (PRoLoRAConfig(rank=5, unshared_rank=1, chunks_a=3, chunks_b=5), {}),
    "rasa": (RaSAConfig(rank=3, shared_rank=2, alpha=6.0), {}),
    "rasa, patterns": (RaSAConfig(rank=3, shared_rank=2, rank_pattern={"0.*": 2}), {}),
    "share_lora, a": (ShareLoRAConfig(rank=5, shared="a"), {}),
    "share_lora, b": (ShareLoRAConfig(rank=5, shared="b"), {}),
    "tied_lora": (TiedLoRAConfig(rank=5), {}),
    "tied_lora, qkv": (TiedLoRAConfig(rank=5, tie_qkv=True), {"include": "[qkv]_proj"}),
    "uni_lora": (UniLoRAConfig(theta_length=1000, rank=5), {}),
    "vb_lora": (VBLoRAConfig(rank=5, num_vectors=9, vector_length=16), {}),
    "vera": (VeRAConfig(rank=5), {}),
    "vera, one layer": (VeRAConfig(rank=5), {"layers": [1]}),
}


@pytest.fixture(scope="module")
def decoder():
    return random_decoder()


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
    def test_every_method_is_here(self):
        assert {config.method for config, _ in EXPORTED.values()} == set(METHODS)

    @pytest.mark.parametrize("method", EXPORTED)
    def test_peft_computes_the_same_logits(self, tmp_path, decoder, method):
        config, selection = EXPORTED[method]
        sites = select_sites(decoder.sites, **selection)
        adapter = randomised(create_adapter(config, sites, jax.random.key(0)))
        factors = trained_size(adapter.factors())
        path = export_peft(
            tmp_path / "x", factors, base_name="tiny", num_layers=CONFIG.num_layers, card={"a": 1}
        )
        with warnings_are_errors():
            model = peft.PeftModel.from_pretrained(torch_model(CONFIG), path).eval()
        expected = logits_of(decoder, factors)
        assert distance(torch_logits(model), expected) < TOLERANCE
        assert distance(logits_of(decoder), expected) > 1

        found = list(adapted_modules(model, peft.tuners.lora.LoraLayer))
        assert len(found) == sum(site.num_layers for site in sites.values())
        for name, layer, module in found:
            position = (sites[name].layers or range(CONFIG.num_layers)).index(layer)
            assert np.float32(module.scaling["default"]) == factors[name].scale[position]

        read = read_peft_factors(path, decoder.sites)
        assert largest_logit_difference(decoder, TOKENS, factors, read) == 0.0

    def test_merged_by_peft(self, tmp_path, decoder):
        adapter = randomised(create_adapter(MOS, decoder.sites, jax.random.key(0)))
        factors = trained_size(adapter.factors())
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


class TestPatterns:
    """The same arrays in a LoRA of PEFT and in one of ours with the same patterns."""

    @pytest.mark.parametrize(
        "options",
        [
            {"rank_pattern": {"layers.1.self_attn.q_proj": 2, r".*\.0\..*": 6}},
            {"alpha_pattern": {"q_proj": 2, "0.mlp.down_proj": 40}, "use_rslora": True},
            {
                "rank_pattern": {"down_proj": 3, "self_attn.*": 5},
                "alpha_pattern": {"layers.1.*": 1.5, "q_proj": 7},
                "use_rslora": True,
            },
            {"rank_pattern": {"q_proj": 1}, "layers_to_transform": [1]},
        ],
    )
    def test_ranks_scales_and_logits(self, decoder, options):
        types = ("q_proj", "v_proj", "down_proj")
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=list(types), task_type="CAUSAL_LM", **options
        )
        model = peft.get_peft_model(torch_model(CONFIG), config).eval()
        ours = LoRAConfig(
            4,
            8,
            options.get("use_rslora", False),
            rank_pattern=options.get("rank_pattern", {}),
            alpha_pattern=options.get("alpha_pattern", {}),
        )
        layers = options.get("layers_to_transform")
        sites = select_sites(decoder.sites, types, layers=layers)
        adapter = create_adapter(ours, sites, jax.random.key(0))
        arrays = {name: array.copy() for name, array in adapter_arrays(adapter).items()}
        torch.manual_seed(1)
        for name, layer, module in adapted_modules(model, peft.tuners.lora.LoraLayer):
            position = sites[name].blocks.index(layer)
            rank = adapter.site_ranks[name][position]
            assert module.r["default"] == rank
            assert np.float32(module.scaling["default"]) == np.float32(
                adapter.site_scales[name][position]
            )
            b = module.lora_B["default"].weight
            with torch.no_grad():
                b.normal_(0.0, 0.05)
            a = module.lora_A["default"].weight.detach().numpy()
            arrays[f"a/{name}"][position, :rank] = a
            arrays[f"b/{name}"][position, :rank] = b.detach().numpy().T
        factors = with_arrays(adapter, arrays).factors()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert adapter.count_trained() == trained
        assert distance(logits_of(decoder, factors), torch_logits(model)) < TOLERANCE
        assert distance(logits_of(decoder), torch_logits(model)) > 0.01


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
