"""A checkpoint gives back what was saved, whatever the method keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.rasa import RaSAConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.adapters.uni_lora import UniLoRAConfig
from mos_jax.adapters.vb_lora import VBLoRAConfig
from mos_jax.training.checkpoint import Checkpoints
from mos_jax.training.config import CheckpointSection, RunConfig, TrainingSection, default_config
from mos_jax.training.optimizer import make_optimizer
from mos_jax.training.step import AdapterParts, initial_state

SITES = {"q_proj": SiteShape(2, 8, 12), "down_proj": SiteShape(2, 8, 4)}
# Each has arrays that belong to no site type, or is without some that other settings have.
CONFIGS = {
    "vb_lora": VBLoRAConfig(rank=2, num_vectors=5, vector_length=4),
    "uni_lora": UniLoRAConfig(theta_length=31, rank=2),
    "rasa": RaSAConfig(rank=1),
}


def state_of(config, seed):
    parts, trained = AdapterParts.split(create_adapter(config, SITES, jax.random.key(seed)))
    optimizer = make_optimizer(TrainingSection(steps=5, warmup_share=0.0), config.rate_ratios())
    return parts, initial_state(trained, optimizer, jax.random.key(seed)), optimizer


@pytest.mark.parametrize("name", CONFIGS)
def test_arrays_of_no_site_type_survive_a_checkpoint(name, tmp_path):
    config = CONFIGS[name]
    parts, state, _ = state_of(config, seed=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointSection())
    checkpoints.save(state, parts, {"position": 3})
    checkpoints.wait()
    _, fresh, _ = state_of(config, seed=2)
    adapter = create_adapter(config, SITES, jax.random.key(2))
    restored, parts_again, loader = checkpoints.restore(0, fresh, adapter)
    checkpoints.close()
    assert loader == {"position": 3}
    for have, want in (
        (restored.trained, state.trained),
        (restored.optimizer, state.optimizer),
        (parts_again.frozen, parts.frozen),
    ):
        assert jax.tree.structure(have) == jax.tree.structure(want)
        for one, other in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_logits_of_vb_lora_move_ten_times_as_far_as_its_bank():
    _, state, optimizer = state_of(CONFIGS["vb_lora"], seed=0)
    ones = jax.tree.map(jnp.ones_like, state.trained)
    updates, _ = optimizer.update(ones, state.optimizer, state.trained)
    # AdamW's first step is the rate itself, where all gradients are alike.
    for path, variable in nnx.to_flat_state(updates):
        ratio = 1 if path[0] == "bank" else 10
        np.testing.assert_allclose(variable[...], -3e-3 * ratio, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_flags_can_set_every_field_of_the_method(name):
    config = {"adapter": default_config(name).adapter.to_dict(), "data": {"task": "leg_counting"}}
    assert RunConfig.from_mapping(config).adapter == type(CONFIGS[name])()
