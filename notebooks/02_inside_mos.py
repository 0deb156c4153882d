# %% [markdown]
# # 2. Inside MoS
#
# A small MoS, built by hand and taken apart: pools, routing, private shards, matrices as mosaics,
# and what each of the four strategies does.
#
# **You need** a checkout with `make setup` done, or Colab. **It takes** half a minute on any machine.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mos-jax/mos_jax/blob/main/notebooks/02_inside_mos.ipynb)

# %% tags=["setup"]
# In a checkout there is nothing to do. On Colab: fetch one, install it and the default base.
import os
import runpy
import subprocess
import sys
from pathlib import Path

on_colab = "google.colab" in sys.modules
if on_colab and not Path("pyproject.toml").exists():
    if not Path("mos_jax").exists():
        address = "https://github.com/mos-jax/mos_jax"
        subprocess.run(["git", "clone", "--depth=1", address, "mos_jax"], check=True)
    os.chdir("mos_jax")  # after a restart of the kernel, too
here = Path.cwd()
os.chdir(next(folder for folder in [here, *here.parents] if (folder / "pyproject.toml").exists()))
sys.path.insert(0, os.getcwd())  # configs/ is not part of the package
if on_colab:
    runpy.run_path("tools/colab.py", run_name="__main__")

# %% tags=["parameters"]
LAYERS = 8
WIDTH = 48

# %%
import jax
import jax.numpy as jnp
import numpy as np

import mos_jax
from mos_jax.reporting.inside_pictures import mosaic, pool_picture, routing_map, strategy_map
from mos_jax.reporting.notebook import show

# %% [markdown]
# ## One site type in eight layers
#
# An adapter needs no model, only the shapes that it adapts. LoRA of rank 2 would train two vectors
# of A and two of B in every layer. MoS puts the same numbers, $e = 2$ for each layer, into two pools
# that all layers share, and gives each layer a rank of $r = 6$.

# %%
sites = {"q_proj": mos_jax.SiteShape(num_layers=LAYERS, d_in=WIDTH, d_out=WIDTH)}
config = mos_jax.MoSConfig(equivalent_rank=2, rank=6, shards_per_vector=4, private_rank=1)
mos = mos_jax.create_adapter(config, sites, jax.random.key(0))
for name, size in mos.summary().items():
    print(f"{name:40} {size}")

# %% [markdown]
# ## The pool
#
# A **shard** is a quarter of a vector here ($l = 4$). The pool of A has $e L l$ of them. The last
# ones are **private**: $p = 1$ vector of each layer, which no other layer reads.

# %%
show(pool_picture(mos, "q_proj", "a"))

# %% [markdown]
# ## A as a mosaic of shards
#
# A table that was drawn once, and is never trained, says which shard stands where. On the left the
# pool, pale what this layer does not read; on the right the matrix A of layer 2. Its last vector is
# its own.

# %%
show(mosaic(mos, "q_proj", layer=2))

# %% [markdown]
# That picture, and nothing else, is how factors are computed: look up, and concatenate.

# %%
pool = np.asarray(mos.pool_a["q_proj"][...])
table = mos.tables()["table_a/q_proj"]
by_hand = pool[table[2]].reshape(config.rank, WIDTH)
factors = mos.factors()["q_proj"]
print("A:", factors.a.shape, " B:", factors.b.shape, " scale:", factors.scale.shape)
assert (np.asarray(factors.a[2]) == by_hand).all()

# %% [markdown]
# ## Routing
#
# All layers at once, A on the left and B on the right. Yellow to violet are shards of the public part,
# orange the private ones.

# %%
show(routing_map(mos, "q_proj"))

# %% [markdown]
# ## Four strategies, each switched off alone
#
# Each strategy is for one thing, which is one row of the picture.
#
# - **subset selection**: a layer draws its shards. Without it every layer uses all public ones, and
#   layers have more shards in common.
# - **pair dissociation**: B is routed apart from A. Without it a shard of A meets the same shard of B
#   in every layer, and layers have as many pairs in common as shards.
# - **vector sharding**: $l > 1$. Without it whole vectors are drawn, and layers have whole vectors in
#   common, not only parts of them.
# - **shard privatization**: $p > 0$. Without it a layer has a shard to itself by chance alone.
#
# Below each panel is the mean over layers, in colour where the row's strategy is off.

# %%
fields = {"equivalent_rank": 2, "rank": 6, "shards_per_vector": 4, "private_rank": 1}
arms = {
    "MoS": {},
    "without subset\nselection": {"subset_selection": False, "rank": None},
    "without pair\ndissociation": {"pair_dissociation": False},
    "without vector\nsharding": {"shards_per_vector": 1},
    "without\nprivatization": {"private_rank": 0},
}
adapters = {
    name: mos_jax.create_adapter(
        mos_jax.MoSConfig(**{**fields, **change}), sites, jax.random.key(0)
    )
    for name, change in arms.items()
}
show(strategy_map(adapters, "q_proj"))

# %% [markdown]
# All five train exactly the same number of parameters, so what one row gains another may pay for: a
# private vector is missing from the public pool. Without privatization layers draw from a public pool
# twice as large, and have *fewer* shards in common (first row, last column). What privatization gives
# is in the last row. What a strategy is worth in accuracy, no row says.

# %%
print({name.replace("\n", " "): arm.count_trained() for name, arm in adapters.items()})

# %% [markdown]
# ## Why step 0 is the base
#
# The pool of B starts at zeros, so every B is zero, whatever the routing, and the change of the weight
# is $B^T A = 0$. The logits are those of the base to the bit.

# %%
base = mos_jax.load_base("tiny-random")
fresh = mos_jax.create_adapter(
    mos_jax.MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2), base.sites, jax.random.key(0)
)
tokens = jnp.arange(12, dtype=jnp.int32)[None]
before = base.model(tokens)
after = base.model(tokens, fresh.factors())
print("largest difference of a logit:", float(jnp.abs(before - after).max()))
assert (before == after).all()
