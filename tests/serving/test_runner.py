"""What the engine runs on the device: tokens, and that rows leave each other alone."""

import pytest

from mos_jax import Sampling, generate, load_base, save_adapter
from mos_jax.adapters.bank import BASE_NAME
from mos_jax.serving.engine_options import EngineOptions
from mos_jax.serving.options import BankOptions
from mos_jax.serving.requests import TokenSampling
from mos_jax.serving.runner import Runner
from mos_jax.serving.tenants import TenantBank
from tests.models.fixtures_decoder import filled_adapter
from tests.serving.fixtures_tenants import LORA, MOS

GREEDY = TokenSampling(seed=0)
PROMPTS = {
    "a": list(range(5, 40)),
    "b": [7],
    "c": [9, 8, 7, 6, 5],
    BASE_NAME: list(range(100, 117)),
}


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-random")


@pytest.fixture(scope="module")
def adapters(base):
    return {
        name: filled_adapter(base.sites, config, seed)
        for seed, (name, config) in enumerate({"a": MOS, "b": MOS, "c": LORA}.items())
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base, adapters):
    folder = tmp_path_factory.mktemp("tenants")
    for name, adapter in adapters.items():
        save_adapter(folder / name, adapter, base_fingerprint=base.fingerprint)
    return folder


@pytest.fixture(scope="module")
def runner(base, folder):
    bank = TenantBank(base, BankOptions())
    assert bank.register_folder(folder) == {}
    runner = Runner(base, bank, EngineOptions(rows=4, length=64, pieces=(4, 16)))
    runner.warm_up()
    with bank.using(*"abc"):
        yield runner
    bank.close()


def answers(runner, requests, steps):
    """Tokens of `steps` steps by row, of (row, tenant, prompt, sampling)."""
    for row, tenant, prompt, sampling in requests:
        runner.start(row, prompt, tenant, sampling)
        while not runner.prefill(row):
            pass
    found = {row: [] for row, *_ in requests}
    for _ in range(steps):
        for row, info in runner.decode().fetch():
            found[row].append(info.token)
    for row, *_ in requests:
        runner.free(row)
    return found


def test_greedy_rows_of_many_tenants_are_what_generate_gives_each_alone(runner, base, adapters):
    requests = [(row, *item, GREEDY) for row, item in enumerate(PROMPTS.items())]
    found = answers(runner, requests, 8)
    for row, (name, prompt) in enumerate(PROMPTS.items()):
        factors = None if name == BASE_NAME else adapters[name].factors()
        want = generate(base.model, [prompt], [-1], Sampling.create(8), factors)
        assert found[row] == want[0], name
