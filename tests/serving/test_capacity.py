import json

import jax
import pytest
from PIL import Image

from mos_jax import InputError, MoSConfig
from mos_jax.models.base import load_base
from mos_jax.models.config import SITES
from mos_jax.models.known import known_config
from mos_jax.models.tiny import tiny_config
from mos_jax.serving.capacity import (
    Server,
    base_bytes,
    cache_bytes,
    capacity,
    factor_bytes,
    parse_bytes,
    pool_bytes,
)
from tests.experiments.fixtures_programs import call
from tests.serving.fixtures_tenants import DECODER, LORA, bank_of, tenants_in


def test_llama2_7b_by_hand():
    found = capacity(known_config("llama2-7b"), Server(80 * 2**30, rows=4, tokens=1024))
    # 32 blocks of 4 squares of 4096 and 3 of 4096 x 11008, two embeddings of 32000 x 4096, in bf16;
    # 65 norms of 4096 in fp32.
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 32000 * 4096
    assert found.base_bytes == 2 * weights + 4 * 65 * 4096 == 13_477_363_712
    assert found.cache_bytes == 2 * 32 * 32 * 128 * 2 * 4 * 1024 == 2 * 2**30
    assert found.reserve_bytes == 8 * 2**30
    assert found.free_bytes == 70 * 2**30 - 13_477_363_712
    # L (h + o): 4 sites of 8192 and 3 of 15104.
    per_rank = 32 * (4 * 8192 + 3 * 15104)
    mos, equal_rank, claim, budget = found.fits
    assert mos.tenant_bytes == 2 * 2 * per_rank == 9_994_240
    tables = 2 * 7 * 32 * 8 * 2 * 4  # A and B, sites, blocks, r, l, bytes
    factors = 2 * 8 * per_rank + 7 * 32 * 4
    assert mos.shared_bytes == mos.tenant_bytes + tables + 5 * factors  # four rows, and the zeros
    assert mos.tenants == (found.free_bytes - mos.shared_bytes) // 9_994_240
    assert equal_rank.tenant_bytes == factors
    assert claim.tenant_bytes == 2 * 16 * per_rank + 7 * 32 * 4
    assert "paper claims" in claim.why
    assert budget.tenant_bytes == 2 * 2 * per_rank + 7 * 32 * 4
    for fit in found.fits:
        used = fit.shared_bytes + fit.tenants * fit.tenant_bytes
        assert used <= found.free_bytes < used + fit.tenant_bytes
    text = "\n".join(found.lines)
    for number in (
        5 * factors,
        13_477_363_712,
        2 * 2**30,
        9_994_240,
        tables,
        mos.tenants,
        claim.tenants,
    ):
        assert f"{number:,}" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_the_base_as_it_is_loaded(dtype, quantize):
    base = load_base("tiny-random", dtype, quantize=quantize)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(base.model.weights))
    assert base_bytes(base.config, dtype, quantize) == held
    cache = jax.tree.leaves(base.model.empty_cache(3, 40))
    assert cache_bytes(base.config, 3, 40, dtype) == sum(leaf.nbytes for leaf in cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        MoSConfig(2, 3, 2, 1),
        MoSConfig(2, 2, pool_scope="width", rank_scaling=True),
        MoSConfig(2, 2, random_scaling="fixed", rank_pattern={"q_proj": 3}),
    ],
)
def test_pools_as_the_bank_allocates_them(tmp_path, config, dtype):
    tenants_in(tmp_path, a=config)
    one, shared = pool_bytes(config, DECODER.sites, dtype)
    bank, _ = bank_of(tmp_path, slots=5, dtype=dtype, assembly="inside")
    bank.open()
    assert bank.nbytes == 6 * one + shared
    if not config.rank_pattern:
        bank, _ = bank_of(tmp_path, slots=5, dtype=dtype, cached=3)
        bank.open()
        factors = factor_bytes(config.rank, DECODER.sites, dtype)
        assert bank.nbytes == 6 * one + shared + 4 * factors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_factors_as_the_bank_allocates_them(tmp_path, dtype):
    tenants_in(tmp_path, a=LORA)
    bank, _ = bank_of(tmp_path, slots=5, dtype=dtype)
    bank.open()
    assert bank.nbytes == 6 * factor_bytes(LORA.rank, DECODER.sites, dtype)


def test_a_base_that_fills_the_memory_leaves_no_tenants():
    found = capacity(known_config("llama2-70b"), Server(80 * 2**30))
    assert found.free_bytes == 0
    assert [fit.tenants for fit in found.fits] == [0] * 4
    assert "short by" in "\n".join(found.lines)
    smaller = capacity(known_config("llama2-70b"), Server(80 * 2**30, quantize="nf4", rows=8))
    assert smaller.fits[0].tenants > 0


def test_sites_are_chosen():
    config = tiny_config()
    every, some = (
        capacity(config, Server(2**20), rank=3, include=names) for names in ("all-linear", SITES[0])
    )
    assert some.fits[0].tenant_bytes < every.fits[0].tenant_bytes
    assert some.base_bytes == every.base_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("16 GB", 16 * 10**9), ("1.5MiB", 3 * 2**19), ("512", 512)],
)
def test_bytes_in_words(text, size):
    assert parse_bytes(text) == size


def test_refusals():
    for text in ("", "GiB", "80 gigs", "-1GB"):
        with pytest.raises(InputError, match="no number of bytes"):
            parse_bytes(text)
    for fields in ({"memory": 0}, {"rows": 0}, {"reserve": 1}, {"dtype": "int8"}):
        with pytest.raises(InputError):
            Server(**{"memory": 2**30, **fields})
    with pytest.raises(InputError, match="rank=99"):
        capacity(tiny_config(), Server(2**30), rank=99)


def test_the_program(tmp_path):
    flags = ("--base=smollm2-135m", "--memory=8GiB", "--rows=4")
    text = call("capacity", *flags, f"--out={tmp_path / 'a.png'}").stdout
    found = json.loads(call("capacity", *flags, "--json").stdout)
    assert f"{found['fits'][0]['tenants']:,} tenants" in text
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 800
    failed = call("capacity", "--base=smollm2", "--memory=8GiB", ok=False)
    assert failed.returncode == 2
    assert "did you mean 'smollm2" in failed.stderr
