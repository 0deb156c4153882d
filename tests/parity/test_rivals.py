"""The rivals against PEFT's own implementations of them, from the same arrays.

PEFT has VeRA, VB-LoRA and Uni-LoRA. ShareLoRA is its LoRA with one matrix held by all blocks, and
Tied-LoRA computes with trained matrices what its VeRA computes with frozen ones. MoS, PRoLoRA and
RaSA it lacks; what they export is compared in `test_peft.py`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import METHODS, create_adapter
from mos_jax.adapters.share_lora import ShareLoRAConfig
from mos_jax.adapters.sites import select_sites
from mos_jax.adapters.storage import adapter_arrays
from mos_jax.adapters.tied_lora import TiedLoRAConfig
from mos_jax.adapters.uni_lora import UniLoRAConfig
from mos_jax.adapters.vb_lora import VBLoRAConfig
from mos_jax.adapters.vera import VeRAConfig
from tests.adapters.fixtures_adapters import quick_jit, randomised, split_trained
from tests.parity.fixtures_peft import (
    CONFIG,
    TOKENS,
    TOLERANCE,
    adapted_modules,
    count_trainable,
    distance,
    logits_of,
    put,
    random_decoder,
    replaced,
    scaled,
    torch_logits,
    torch_model,
)

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # those of the other libraries
]

# Of the largest gradient of an array.
GRADIENT_TOLERANCE = 1e-3
# What a scalar loss weighs the logits by.
WEIGHTS = np.random.default_rng(2).normal(size=(*TOKENS.shape, CONFIG.vocab_size))
WEIGHTS = (WEIGHTS / WEIGHTS.size).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Link:
    """One tensor of a PEFT model and where it stands in an adapter of ours.

    Attributes:
      path: of our array.
      index: the tensor's entry of the array's first axes; () for all of it.
      tensor: PEFT's parameter or buffer.
      axes: how our axes are ordered to be PEFT's; None for no change.
    """

    path: str
    index: tuple[int, ...]
    tensor: Any
    axes: tuple[int, ...] | None = None

    def as_theirs(self, array) -> np.ndarray:
        part = np.asarray(array)[self.index]
        return part if self.axes is None else part.transpose(self.axes)


def link_lora(model, adapter) -> list[Link]:
    """Links of LoRA, or of ShareLoRA where the blocks hold one and the same module."""
    links = []
    for name, k, module in adapted_modules(model, peft.tuners.lora.LoraLayer):
        for path, axes, part in (
            (f"a/{name}", None, module.lora_A["default"]),
            (f"b/{name}", (1, 0), module.lora_B["default"]),
        ):
            shared = adapter_arrays(adapter)[path].ndim == 2
            links.append(Link(path, () if shared else (k,), part.weight, axes))
    return links


def link_vera(model, adapter) -> list[Link]:
    """Links where one type is adapted, so that PEFT's one pair of projections is that type's."""
    (only,) = adapter.sites
    whole = model.base_model
    links = [
        Link(f"projection_a/{only}", (), whole.vera_A["default"]),
        Link(f"projection_b/{only}", (), whole.vera_B["default"], (1, 0)),
    ]
    for name, k, module in adapted_modules(model, peft.tuners.vera.VeraLayer):
        links.append(Link(f"d/{name}", (k,), module.vera_lambda_d["default"]))
        links.append(Link(f"b/{name}", (k,), module.vera_lambda_b["default"]))
    return links


def link_vb_lora(model, adapter) -> list[Link]:
    links = [Link("bank", (), model.base_model.vblora_vector_bank["default"])]
    for name, k, module in adapted_modules(model, peft.tuners.vblora.layer.VBLoRALayer):
        links.append(Link(f"logits_a/{name}", (k,), module.vblora_logits_A["default"]))
        logits_b = module.vblora_logits_B["default"]
        links.append(Link(f"logits_b/{name}", (k,), logits_b, (1, 0, 2)))
    return links


def link_uni_lora(model, adapter) -> list[Link]:
    """Links of what is trained and of the index, which `of_ours` has PEFT take from the adapter."""
    links = [Link("theta", (), model.base_model.unilora_theta_d["default"])]
    for name, k, module in adapted_modules(model, peft.tuners.unilora.layer.UniLoraLayer):
        links.append(Link(f"index_a/{name}", (k,), module.unilora_indices_A["default"]))
        links.append(Link(f"index_b/{name}", (k,), module.unilora_indices_B["default"], (1, 0)))
    return links


@dataclasses.dataclass(frozen=True)
class Twin:
    """A configuration of ours and PEFT's of the same adapter.

    Attributes:
      ours: the configuration.
      theirs: PEFT's, for given `target_modules`.
      link: which arrays are which tensors.
      include: the adapted site types.
      sizes: factors of randomised arrays, by the first word of their paths, for which adapted
        logits are as large as the base's.
    """

    ours: Any
    theirs: Callable[..., Any]
    link: Callable[..., list[Link]]
    include: str = "all-linear"
    sizes: dict[str, float] = dataclasses.field(default_factory=dict)

    def sites(self, decoder):
        return select_sites(decoder.sites, self.include)

    def fresh(self, decoder):
        return create_adapter(self.ours, self.sites(decoder), jax.random.key(0))

    def random(self, decoder):
        return scaled(randomised(self.fresh(decoder)), **self.sizes)

    def model(self, decoder):
        """A fresh model of PEFT."""
        config = self.theirs(target_modules=list(self.sites(decoder)))
        return peft.get_peft_model(torch_model(CONFIG), config).eval()


def their_lora(**options):
    return peft.LoraConfig(r=3, lora_alpha=5, **options)


TWINS = {
    "lora": Twin(LoRAConfig(rank=3, alpha=5.0), their_lora, link_lora, "[qd].*", {"b": 0.1}),
    # Wider in than out, so that no two axes are mistaken for each other.
    "vera": Twin(
        VeRAConfig(rank=48),
        lambda **options: peft.VeraConfig(r=48, **options),
        link_vera,
        "down_proj",
        {"d": 0.3, "b": 0.3},
    ),
    "vb_lora": Twin(
        VBLoRAConfig(rank=3, num_vectors=40, vector_length=16, top_k=3),
        lambda **options: peft.VBLoRAConfig(
            r=3, num_vectors=40, vector_length=16, topk=3, **options
        ),
        link_vb_lora,
        sizes={"bank": 0.3},
    ),
    "uni_lora": Twin(
        UniLoRAConfig(theta_length=2500, rank=3),
        lambda **options: peft.UniLoraConfig(r=3, theta_d_length=2500, **options),
        link_uni_lora,
        sizes={"theta": 0.3},
    ),
}
SHARED = {
    part: Twin(
        ShareLoRAConfig(rank=3, alpha=5.0, shared=part),
        their_lora,
        link_lora,
        "[qd].*",
        {"b": 0.1},
    )
    for part in ("a", "b")
}

# Large enough for deciles to mean something.
BIG = {
    "lora": (LoRAConfig(rank=64), lambda **o: peft.LoraConfig(r=64, **o)),
    "vera": (VeRAConfig(rank=256), lambda **o: peft.VeraConfig(r=256, **o)),
    "vb_lora": (
        VBLoRAConfig(rank=8, num_vectors=512, vector_length=32),
        lambda **o: peft.VBLoRAConfig(r=8, num_vectors=512, vector_length=32, **o),
    ),
    "uni_lora": (
        UniLoRAConfig(theta_length=20_000, rank=32),
        lambda **o: peft.UniLoraConfig(r=32, theta_d_length=20_000, **o),
    ),
}
# Which arrays start as constants, and which uniform within bounds.
CONSTANT = {"lora": {"b"}, "vera": {"d", "b"}, "vb_lora": set(), "uni_lora": set()}
UNIFORM = {
    "lora": {"a"},
    "vera": {"projection_a", "projection_b"},
    "vb_lora": {"bank"},
    "uni_lora": {"theta"},
}


@pytest.fixture(scope="module")
def decoder():
    return random_decoder()


@quick_jit
def run(decoder, adapter, weights):
    """Logits, and the gradients of their weighted sum."""
    graphdef, trained, frozen = split_trained(adapter)

    def loss(trained):
        factors = nnx.merge(graphdef, trained, frozen).factors()
        logits = decoder(jnp.asarray(TOKENS), factors)
        return jnp.sum(logits * weights), logits

    gradients, logits = jax.grad(loss, has_aux=True)(trained)
    return logits, gradients


def share(model, part):
    """Has all blocks of a PEFT LoRA hold the first one's A or B."""
    first = {}
    for name, _, module in adapted_modules(model, peft.tuners.lora.LoraLayer):
        parts = getattr(module, f"lora_{part.upper()}")
        parts["default"] = first.setdefault(name, parts["default"])


def use_our_index(monkeypatch, adapter):
    """Has PEFT deal out the adapter's index, in place of the one that it would draw."""
    tables = adapter.tables()

    def generate_index(count, length, seed):
        pieces = []
        for k in range(CONFIG.num_layers):
            # The order of the modules of a block, which is that of the decoder's sites.
            for name in adapter.sites:
                pieces += [tables[f"index_a/{name}"][k], tables[f"index_b/{name}"][k].T]
        flat = np.concatenate([piece.ravel() for piece in pieces]).astype(np.int64)
        assert (flat.size, length) == (count, adapter.config.theta_length)
        return torch.from_numpy(flat)

    owner = peft.tuners.unilora.model.UniLoraModel
    monkeypatch.setattr(owner, "generate_index", staticmethod(generate_index))


def assert_agree(decoder, adapter, model, links):
    """Logits, trained parameters and the gradients of all that trains."""
    logits, gradients = run(decoder, adapter, WEIGHTS)
    output = model(torch.from_numpy(TOKENS.astype(np.int64))).logits
    assert distance(output.detach().numpy(), np.asarray(logits)) < TOLERANCE
    assert distance(logits_of(decoder), np.asarray(logits)) > 0.5

    assert adapter.count_trained() == count_trainable(model)
    (output * torch.from_numpy(WEIGHTS)).sum().backward()
    ours = {
        "/".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(gradients)
    }
    assert {link.path for link in links if link.tensor.requires_grad} == set(ours)
    for link in links:
        if link.tensor.requires_grad:
            theirs = link.tensor.grad.numpy()
            largest = np.abs(theirs).max()
            assert largest > 0, link.path
            np.testing.assert_allclose(
                link.as_theirs(ours[link.path]),
                theirs,
                rtol=0,
                atol=GRADIENT_TOLERANCE * largest,
                err_msg=link.path,
            )


def test_every_method_that_peft_has_is_here():
    """Fails when a version of PEFT gains one of the methods that are compared in no other way."""
    known = {kind.value.lower().replace("_", "") for kind in peft.PeftType}
    assert {name for name in METHODS if name.replace("_", "") in known} == set(TWINS)


@pytest.mark.parametrize("method", TWINS)
def test_peft_computes_the_same_from_our_arrays(decoder, method, monkeypatch):
    twin = TWINS[method]
    adapter = twin.random(decoder)
    if method == "uni_lora":
        use_our_index(monkeypatch, adapter)
    model = twin.model(decoder)
    links, arrays = twin.link(model, adapter), adapter_arrays(adapter)
    assert {link.path for link in links} == set(arrays)
    for link in links:
        if link.tensor.is_floating_point():
            put(link.tensor, link.as_theirs(arrays[link.path]))
        else:
            np.testing.assert_array_equal(link.tensor, link.as_theirs(arrays[link.path]))
    assert_agree(decoder, adapter, model, links)


@pytest.mark.parametrize("part", SHARED)
def test_share_lora_is_their_lora_with_one_matrix_in_all_blocks(decoder, part):
    twin = SHARED[part]
    adapter, model = twin.random(decoder), twin.model(decoder)
    share(model, part)
    links, arrays = twin.link(model, adapter), adapter_arrays(adapter)
    for link in links:
        put(link.tensor, link.as_theirs(arrays[link.path]))
    assert_agree(decoder, adapter, model, links)


def test_tied_lora_is_their_vera_with_trained_matrices(decoder):
    """VeRA has no scale; Tied-LoRA's is put into the scalings of the outputs."""
    twin = dataclasses.replace(
        TWINS["vera"],
        ours=TiedLoRAConfig(rank=48, alpha=12.0),
        sizes={"a": 0.2, "b": 0.2, "u": 0.3},
    )
    adapter, model = twin.random(decoder), twin.model(decoder)
    arrays = adapter_arrays(adapter)
    put(model.base_model.vera_A["default"], arrays["a/down_proj"])
    put(model.base_model.vera_B["default"], arrays["b/down_proj"].T)
    for name, k, module in adapted_modules(model, peft.tuners.vera.VeraLayer):
        put(module.vera_lambda_d["default"], arrays[f"u/{name}"][k])
        put(module.vera_lambda_b["default"], arrays[f"v/{name}"][k] * np.float32(12 / 48))
    logits, _ = run(decoder, adapter, WEIGHTS)
    assert distance(torch_logits(model), np.asarray(logits)) < TOLERANCE
    assert distance(logits_of(decoder), np.asarray(logits)) > 0.5
    matrices = arrays["a/down_proj"].size + arrays["b/down_proj"].size
    assert adapter.count_trained() == count_trainable(model) + matrices


class TestStarts:
    """Fresh adapters: the same constants, the same distributions within the same bounds."""

    @pytest.mark.parametrize("method", TWINS)
    def test_alike(self, decoder, method):
        ours, theirs = BIG[method]
        twin = dataclasses.replace(TWINS[method], ours=ours, theirs=theirs)
        adapter, model = twin.fresh(decoder), twin.model(decoder)
        arrays = adapter_arrays(adapter)
        tensors = {}
        for link in twin.link(model, adapter):
            if link.tensor.is_floating_point():
                tensors.setdefault(link.path, []).append(link.tensor.detach().numpy())
        for path, found in tensors.items():
            word, have = path.split("/")[0], arrays[path].ravel()
            want = np.concatenate([tensor.ravel() for tensor in found])
            assert have.size == want.size
            if word in CONSTANT[method]:
                np.testing.assert_array_equal(have, want)
                continue
            tenths = np.linspace(0.1, 0.9, 9)
            deciles = [np.quantile(array, tenths) for array in (have, want)]
            np.testing.assert_allclose(*deciles, rtol=0, atol=0.1 * deciles[1][-1], err_msg=path)
            assert abs(have.std() / want.std() - 1) < 0.03, path
            largest = [np.abs(array).max() for array in (have, want)]
            if word in UNIFORM[method]:
                np.testing.assert_allclose(*largest, rtol=3e-3, err_msg=path)
        known = {path.split("/")[0] for path in tensors}
        assert CONSTANT[method] | UNIFORM[method] <= known


class TestVeRA:
    """Where the definitions differ: PEFT has one pair for all types, ours by default one for each.

    Kaiming's bound of A goes with the width that a matrix was drawn for. PEFT draws a single A for
    the widest input and a single B for the widest output and hands slices to narrower sites, whose
    A is then smaller than if drawn for them, and overlaps with that of the other types. The single
    pair of the paper fits layers of one shape only, so that either is a reading of it; drawn by
    type, each A has the bound of its own width. What trains is the same. `projections="shared"` is
    PEFT's reading, compared in `test_import.py`.
    """

    def test_slices_of_their_pair_are_an_adapter_of_ours(self, decoder):
        adapter = create_adapter(VeRAConfig(rank=48), decoder.sites, jax.random.key(0))
        adapter = scaled(randomised(adapter), d=0.2, b=0.2)
        config = peft.VeraConfig(r=48, target_modules=list(decoder.sites))
        model = peft.get_peft_model(torch_model(CONFIG), config).eval()
        a, b = (
            pair["default"].numpy() for pair in (model.base_model.vera_A, model.base_model.vera_B)
        )
        assert (a.shape, b.shape) == ((48, CONFIG.d_ff), (CONFIG.d_ff, 48))
        sliced = {}
        for name, site in decoder.sites.items():
            sliced[f"projection_a/{name}"] = a[:, : site.d_in]
            sliced[f"projection_b/{name}"] = b[: site.d_out].T
        own = adapter_arrays(adapter)
        adapter = replaced(adapter, sliced)
        arrays, links = adapter_arrays(adapter), []
        for name, k, module in adapted_modules(model, peft.tuners.vera.VeraLayer):
            links.append(Link(f"d/{name}", (k,), module.vera_lambda_d["default"]))
            links.append(Link(f"b/{name}", (k,), module.vera_lambda_b["default"]))
        for link in links:
            put(link.tensor, link.as_theirs(arrays[link.path]))
        assert_agree(decoder, adapter, model, links)

        # The bounds: one of PEFT's, ours by type; B's goes with the rank and is the same.
        assert np.abs(a[:, : CONFIG.d_model]).max() <= math.sqrt(6 / CONFIG.d_ff)
        for name, site in decoder.sites.items():
            largest = np.abs(own[f"projection_a/{name}"]).max()
            assert largest == pytest.approx(math.sqrt(6 / site.d_in), rel=0.01)
            largest = np.abs(own[f"projection_b/{name}"]).max()
            assert largest == pytest.approx(np.abs(b).max(), rel=0.01)


class TestVBLoRA:
    """Where the definitions differ: how a stored index is counted."""

    def test_they_save_as_many_values_as_we_count_served(self, decoder):
        twin = TWINS["vb_lora"]
        adapter, model = twin.fresh(decoder), twin.model(decoder)
        model.peft_config["default"].save_only_topk_weights = True
        saved = peft.get_peft_model_state_dict(model)
        assert sum(tensor.numel() for tensor in saved.values()) == adapter.count_served()

        # As the paper does, we count an index as one parameter; PEFT's figure is in units of four
        # bytes and puts an index below 256 down as a quarter.
        indices = sum(tensor.numel() for name, tensor in saved.items() if "indices" in name)
        theirs, others = model.base_model.get_nb_savable_parameters()
        assert others == 0
        assert theirs == adapter.count_served() - int(0.75 * indices)


class TestUniLoRA:
    """Where the definitions differ: which entries of theta are used once more than the others.

    `used_more="drawn"` is PEFT's choice, compared in `test_import.py`.
    """

    def test_their_index_is_one_of_ours_with_the_entries_renamed(self, decoder):
        """PEFT, as the authors, draws them; ours are the first ones, whatever they are called."""
        twin = TWINS["uni_lora"]
        adapter, model = twin.random(decoder), twin.model(decoder)
        length = twin.ours.theta_length
        links = twin.link(model, adapter)
        theta = adapter_arrays(adapter)["theta"]
        indices = [link.tensor.numpy() for link in links[1:]]
        used = np.bincount(np.concatenate([index.ravel() for index in indices]), minlength=length)
        every = np.concatenate([table.ravel() for table in adapter.tables().values()])
        assert used.min() < used.max()
        np.testing.assert_array_equal(np.sort(used)[::-1], np.bincount(every))

        put(links[0].tensor, theta)
        # Those that are used more often first; name_of is an entry's place in this order.
        order = np.argsort(-used, kind="stable")
        name_of = np.argsort(order).astype(np.int32)
        renamed = {"theta": theta[order]}
        for path, table in adapter.tables().items():
            renamed[path] = np.empty_like(table)
        for link, index in zip(links[1:], indices, strict=True):
            # Two axes at most change places, so that it is the same order in both directions.
            renamed[link.path][link.index] = name_of[index].transpose(link.axes or (0, 1))
        logits, _ = run(decoder, replaced(adapter, renamed), WEIGHTS)
        assert distance(torch_logits(model), np.asarray(logits)) < TOLERANCE
