"""One batch with a different adapter for each row, against PEFT's `adapter_names`."""

import jax
import numpy as np
import pytest

from mos_jax import LoRAConfig, MoSConfig, create_adapter, select_sites
from mos_jax.adapters.bank import BASE_NAME, AdapterBank
from mos_jax.interop.peft import export_peft
from tests.adapters.fixtures_adapters import randomised
from tests.parity.fixtures_peft import (
    CONFIG,
    TOKENS,
    TOLERANCE,
    distance,
    logits_of,
    random_decoder,
    torch_model,
    trained_size,
)

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # those of the other libraries
]

ADAPTERS = {
    "lora": (LoRAConfig(rank=4), "all-linear", None),
    "small": (LoRAConfig(rank=2, alpha=3.0), ["q_proj", "down_proj"], [1]),
    "mos": (MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2), "all-linear", None),
}


def test_rows_are_those_of_peft(tmp_path):
    decoder, model, adapters = random_decoder(), None, {}
    for name, (config, include, layers) in ADAPTERS.items():
        sites = select_sites(decoder.sites, include, layers=layers)
        adapter = randomised(create_adapter(config, sites, jax.random.key(0)), len(adapters))
        adapters[name] = trained_size(adapter.factors())
        path = export_peft(tmp_path / name, adapters[name], base_name="tiny", num_layers=2)
        if model is None:
            model = peft.PeftModel.from_pretrained(torch_model(CONFIG), path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    model.eval()
    bank = AdapterBank.holding(decoder.sites, adapters)
    tokens = np.concatenate([TOKENS, TOKENS[::-1]])[:5]
    names = ["mos", BASE_NAME, "small", "lora", "mos"]
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens.astype(np.int64)), adapter_names=names).logits
    found = logits_of(decoder, bank.for_rows(names), tokens)
    assert distance(found, expected.numpy()) < TOLERANCE
    base = logits_of(decoder, tokens=tokens)
    changed = np.abs(found - base).max((1, 2)) > 0.5
    assert changed.tolist() == [name != BASE_NAME for name in names]
