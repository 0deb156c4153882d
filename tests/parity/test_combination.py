"""Combinations of adapters against PEFT's `add_weighted_adapter`."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax.adapters.combine import combine, keep_mask
from mos_jax.adapters.low_rank import LowRank
from mos_jax.interop.peft import export_peft
from tests.parity.fixtures_peft import (
    CONFIG,
    TOLERANCE,
    adapted_modules,
    distance,
    logits_of,
    random_decoder,
    torch_logits,
    torch_model,
    trained_size,
)

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # those of the other libraries
]

WEIGHTS = [0.7, -0.4, 0.5]
SITES = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def decoder():
    return random_decoder()


def draw(decoder, rank, seed, sites=SITES):
    """Factors whose scale differs by block."""
    random = np.random.default_rng(seed)
    factors = {}
    for name in sites:
        site = decoder.sites[name]
        a, b = (random.normal(size=(2, rank, w)) for w in (site.d_in, site.d_out))
        scale = random.uniform(0.5, 2, 2)
        factors[name] = LowRank(*(jnp.asarray(x, jnp.float32) for x in (a, b, scale)))
    return trained_size(factors)


def peft_model(folder, several):
    """A PEFT model with the adapters "0", "1", ..."""
    model = None
    for i, factors in enumerate(several):
        path = export_peft(folder / str(i), factors, base_name="tiny", num_layers=CONFIG.num_layers)
        if model is None:
            model = peft.PeftModel.from_pretrained(torch_model(CONFIG), path, adapter_name="0")
        else:
            model.load_adapter(path, adapter_name=str(i))
    return model.eval()


def added(model, weights, **options):
    """PEFT's own combination, active, and its A [r, h] and B [r, o] by site type and block."""
    names = [str(i) for i in range(len(weights))]
    model.base_model.add_weighted_adapter(names, weights, "both", **options)
    model.set_adapter("both")
    found = {}
    for name, layer, module in adapted_modules(model, peft.tuners.lora.LoraLayer):
        assert module.scaling["both"] == 1
        a, b = module.lora_A["both"].weight, module.lora_B["both"].weight
        found[name, layer] = a.detach().numpy(), b.detach().numpy().T
    return found


def assert_factors(factors, found):
    assert set(found) == {(name, k) for name in factors for k in range(CONFIG.num_layers)}
    for (name, k), (a, b) in found.items():
        f = factors[name]
        np.testing.assert_allclose(f.a[k], a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(f.b[k], b, rtol=1e-5, atol=1e-6)


def assert_changes(factors, found):
    for (name, k), (a, b) in found.items():
        want = a.T @ b
        change = np.asarray(factors[name].delta())[k]
        np.testing.assert_allclose(change, want, atol=1e-4 * np.abs(want).max())


def test_exact_is_cat(tmp_path, decoder):
    several = [draw(decoder, rank, seed) for seed, rank in enumerate((2, 3, 1))]
    model = peft_model(tmp_path, several)
    found = added(model, WEIGHTS, combination_type="cat")
    factors = combine(several, WEIGHTS).factors
    assert_changes(factors, found)
    assert distance(torch_logits(model), logits_of(decoder, factors)) < TOLERANCE
    assert distance(logits_of(decoder), logits_of(decoder, factors)) > 0.1


@pytest.mark.parametrize(
    ("how", "theirs", "density"),
    [("linear", "linear", None), ("ties", "ties", 1.0), ("ties", "ties", 0.3)],
)
def test_on_a_and_b(tmp_path, decoder, how, theirs, density):
    several = [draw(decoder, 3, seed) for seed in range(3)]
    model = peft_model(tmp_path, several)
    found = added(model, WEIGHTS, combination_type=theirs, density=density)
    factors = combine(several, WEIGHTS, how, density=density).factors
    assert_factors(factors, found)
    assert distance(torch_logits(model), logits_of(decoder, factors)) < TOLERANCE


@pytest.mark.parametrize(("how", "density"), [("exact", None), ("ties", 0.3)])
def test_on_dense_changes(tmp_path, decoder, how, density):
    several = [draw(decoder, rank, seed) for seed, rank in enumerate((2, 3))]
    model = peft_model(tmp_path, several)
    theirs = "svd" if how == "exact" else f"{how}_svd"
    found = added(model, WEIGHTS[:2], combination_type=theirs, svd_rank=2, density=density)
    factors = combine(several, WEIGHTS[:2], how, density=density, rank=2).factors
    assert_changes(factors, found)
    assert distance(torch_logits(model), logits_of(decoder, factors)) < TOLERANCE


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_with_the_same_choice_of_entries(tmp_path, decoder, monkeypatch, how, rank):
    """PEFT draws from PyTorch's generator; here it is given our masks, in its order of asking."""
    several = [draw(decoder, 3, seed) for seed in range(2)]
    model = peft_model(tmp_path, several)
    masks = [
        keep_mask(shape, 0.5, 7, i, name, part, layer).T if part != "a" else
        keep_mask(shape, 0.5, 7, i, name, part, layer)
        for name, layer, _ in adapted_modules(model, peft.tuners.lora.LoraLayer)
        for part, shape in parts(decoder.sites[name], rank)
        for i in range(2)
    ]  # fmt: skip
    waiting = iter(masks)
    asked = itertools.count()

    def bernoulli(probabilities):
        next(asked)
        mask = torch.from_numpy(np.ascontiguousarray(next(waiting)))
        assert mask.shape == probabilities.shape
        return mask.to(probabilities.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    theirs, options = (how, {}) if rank is None else (f"{how}_svd", {"svd_rank": rank})
    found = added(model, WEIGHTS[:2], combination_type=theirs, density=0.5, **options)
    assert next(asked) == len(masks)
    combined = combine(several, WEIGHTS[:2], how, density=0.5, rank=rank, seed=7)
    assert_changes(combined.factors, found)
    if rank is None:
        assert_factors(combined.factors, found)
    assert distance(torch_logits(model), logits_of(decoder, combined.factors)) < TOLERANCE


def parts(site, rank):
    """What is masked of a site, in PEFT's order: A and B, or the dense change."""
    if rank is not None:
        return [("delta", (site.d_in, site.d_out))]
    return [("a", (3, site.d_in)), ("b", (3, site.d_out))]


def test_a_combination_of_other_methods_is_a_lora_for_peft(tmp_path, decoder):
    """What `add_weighted_adapter` refuses: adapters of other sites, ranks and methods."""
    several = [draw(decoder, 2, 0, ("q_proj",)), draw(decoder, 3, 1, ("v_proj", "q_proj"))]
    factors = combine(several, WEIGHTS[:2]).factors
    model = peft_model(tmp_path, [factors])
    assert distance(torch_logits(model), logits_of(decoder, factors)) < TOLERANCE
    negated = {name: -f for name, f in factors.items()}
    model = peft_model(tmp_path / "negated", [negated])
    assert distance(torch_logits(model), logits_of(decoder, negated)) < TOLERANCE
