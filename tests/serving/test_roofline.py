import json
import math

import jax
import pytest
from PIL import Image

from mos_jax import InputError, MoSConfig, load_base
from mos_jax.models.config import SITES
from mos_jax.models.known import known_config
from mos_jax.models.tiny import tiny_config
from mos_jax.serving.capacity import base_bytes, cache_bytes, factor_bytes, pool_bytes
from mos_jax.serving.published import S_LORA, compare_s_lora
from mos_jax.serving.roofline import (
    DEVICES,
    Device,
    Form,
    Step,
    find_device,
    roofline,
    rows_that_fit,
    step_of,
    tenant_forms,
    widths_of,
)
from tests.experiments.fixtures_programs import call

MOS = MoSConfig(2, 8, 2)
LLAMA = known_config("llama2-7b")


def sites_of(base):
    return load_base(base).sites


def test_llama2_7b_by_hand():
    form = Form("one", 0, 1000, 4)
    step = step_of(LLAMA, form, 3, 100)
    block = 4 * 4096**2 + 3 * 4096 * 11008
    norms = 65 * 4096
    # Of the embedding a row for each token; the head whole.
    assert step.base == 2 * (32 * block + 32000 * 4096) + 4 * norms + 3 * 4096 * 2
    assert step.cache == 3 * 101 * 2 * 32 * 4096 * 2
    assert step.adapters == 3000
    per_rank = 32 * (4 * 8192 + 3 * 15104)
    operations = 32 * block + 32000 * 4096 + 2 * 32 * 4096 * 100 + 4 * per_rank
    assert step.flops == 2 * 3 * operations
    assert step.nbytes == step.base + step.cache + step.adapters


def test_the_base_of_a_step_is_what_is_loaded():
    base = load_base("tiny-random", "float32")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(base.model.weights))
    config = base.config
    step = step_of(config, Form("bare", 0, 0, 0), 2, 10, dtype="float32")
    lookups = 2 * config.d_model * 4
    embed = 0 if config.tied_embeddings else math.prod(config.weight_shapes()["embed"]) * 4
    assert step.base == held - embed + lookups


def test_time_is_the_larger_of_bytes_and_operations():
    device = Device("d", 1, bandwidth=100.0, peak=1000.0, link=1.0)
    slow = Step(4, base=100, cache=60, adapters=40, flops=1)
    assert (slow.seconds(device), slow.bound(device)) == (2.0, "memory")
    assert slow.tokens_per_second(device) == 2.0
    busy = Step(4, base=1, cache=0, adapters=0, flops=4000)
    assert (busy.seconds(device), busy.bound(device)) == (4.0, "compute")


def test_forms_move_what_the_bank_holds():
    sites = sites_of("tiny-random")
    mos = MoSConfig(2, 4, 2)
    bare, pools, once, gathered, lora, claim = tenant_forms(mos, sites, "bfloat16")
    assert (bare.held, bare.moved) == (0, 0)
    assert pools.held == pools.moved == once.held == pool_bytes(mos, sites, "bfloat16")[0]
    assert once.moved == lora.moved == factor_bytes(4, sites, "bfloat16")
    assert gathered.moved == 3 * once.moved
    assert claim.held == factor_bytes(16, sites, "bfloat16")
    # Scales aside, e/r of the bytes.
    scales = 4 * sum(site.num_layers for site in sites.values())
    assert pools.held * 4 == 2 * (lora.held - scales)
    assert once.moved - scales == 4 * widths_of(sites) * 2


@pytest.mark.parametrize("form", range(6))
def test_rows_that_fit_fill_the_memory(form):
    config, tokens, small = tiny_config(), 64, Device("small", 1 << 22, 1.0, 1.0, 1.0)
    chosen = tenant_forms(MoSConfig(2, 4, 2), sites_of("tiny-random"), "bfloat16")[form]
    fits = rows_that_fit(config, small, chosen, 3, tokens, 0.1)

    def used(rows):
        cache = cache_bytes(config, rows, tokens, "bfloat16")
        beside = (rows + 1) * chosen.assembled + 3 * chosen.held
        return base_bytes(config, "bfloat16") + cache + beside

    usable = small.memory - int(0.1 * small.memory)
    assert fits > 0
    assert used(fits) <= usable < used(fits + 1)
    many = rows_that_fit(config, small, chosen, 10**6, tokens, 0.1)
    assert many == (0 if chosen.held else fits)


def test_sites_and_dtype_are_those_asked_for():
    device = DEVICES["h100-80gb"]
    every = roofline(LLAMA, device, MOS, rows=[4])
    some = roofline(LLAMA, device, MOS, rows=[4], include=SITES[0])
    name = "MoS e=2 r=8, once"
    assert some.steps[name][0].adapters < every.steps[name][0].adapters
    assert some.steps[name][0].base == every.steps[name][0].base
    wide = roofline(LLAMA, device, MOS, rows=[4], dtype="float32")
    assert wide.steps[name][0].cache == 2 * every.steps[name][0].cache


def test_refusals():
    with pytest.raises(InputError, match="did you mean 'a100-80gb'"):
        find_device("a100-80g")
    for rows, tokens in ((0, 5), (5, 0)):
        with pytest.raises(InputError, match="roofline"):
            step_of(LLAMA, Form("x", 0, 0, 0), rows, tokens)


def test_s_lora_beside_its_own_device():
    text = "\n".join(compare_s_lora())
    # r (h + o) L of four square sites in 16 bits, and the scales.
    assert f"{32 * 4 * 8 * 2 * 4096 * 2 + 4 * 32 * 4:,} bytes" in text
    assert f"{32 * 4 * 2 * 2 * 4096 * 2:,}" in text
    assert f"{S_LORA[-1].requests * 260:,.0f} tokens/s" in text
    fewer = "\n".join(compare_s_lora(equivalent_rank=1))
    assert "e=1" in fewer
    assert fewer != text


def test_the_program(tmp_path):
    flags = ("--base=llama2-7b", "--rows=2", "--rows=16")
    text = call("roofline", *flags, f"--out={tmp_path / 'a.png'}").stdout
    found = json.loads(call("roofline", *flags, "--json").stdout)
    step = found["steps"]["MoS e=2 r=8, once"][1]
    assert step["rows"] == 16
    assert f"{step['adapters']:,}" in text
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 800
