"""Folders of tiny tenants on the tiny base."""

from mos_jax import LoRAConfig, MoSConfig, save_adapter
from mos_jax.serving.options import BankOptions
from mos_jax.serving.tenants import TenantBank
from tests.models.fixtures_decoder import filled_adapter, tiny_decoder

MOS = MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1)
LORA = LoRAConfig(rank=2)
DECODER = tiny_decoder()
FINGERPRINT = "f" * 64


def tenants_in(folder, **configs):
    """Writes an adapter folder for each name; returns the adapters."""
    made = {}
    for seed, (name, config) in enumerate(configs.items()):
        made[name] = filled_adapter(DECODER.sites, config, seed)
        save_adapter(folder / name, made[name], base_fingerprint=FINGERPRINT)
    return made


def bank_of(folder, **options):
    """A bank of all tenants in a folder."""
    bank = TenantBank(DECODER.sites, BankOptions(**options), base_fingerprint=FINGERPRINT)
    refused = bank.register_folder(folder)
    return bank, refused
