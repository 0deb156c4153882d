# %% [markdown]
# # 1. Fine-tune, and chat before and after
#
# SmolLM2-135M-Instruct learns who is related to whom with **MoS**: low-rank matrices of rank 8 for
# every layer, put together from pools that hold as many numbers as LoRA of rank 2.
#
# **You need** a checkout with `make setup` done, or Colab. **It takes** about 4 minutes on 2 CPU
# cores, and 2.5 GB of memory.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mos-jax/mos_jax/blob/main/notebooks/01_quickstart.ipynb)

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
CONFIG = "quickstart"
WORKDIR = "runs/notebooks/quickstart"

# %%
import importlib

from mos_jax.finished import load_finished
from mos_jax.reporting.notebook import text_console
from mos_jax.several import load_several
from mos_jax.training.config import RunConfig
from mos_jax.training.loop import train
from mos_jax.training.report import print_summary

console = text_console()

# %% [markdown]
# ## Before
#
# A question as the test set has them. The base answers at length, and wrong.

# %%
config = importlib.import_module(f"configs.{CONFIG}").get_config()
question = (
    "John is married to Isabella. They have a child called Edward. Edward is married to Victoria.\n"
    "\nWhat is Isabella to Edward? Respond only with the word that describes their relationship."
)
untouched = load_several([], base=config.base.name)
print(untouched.ask([question])[0]["__base__"])

# %% [markdown]
# ## Train
#
# A config is an `ml_collections.ConfigDict`; `RunConfig` checks it as a whole. `train` goes on where
# an earlier call stopped, so this cell can be interrupted and run again.

# %%
print(config.adapter)

# %%
run = RunConfig.from_mapping(config.to_dict())
summary = train(run, WORKDIR, console)

# %%
print_summary(summary, WORKDIR, console)

# %% [markdown]
# ## After
#
# The base and the adapter answer in one batch: each row has an adapter of its own, or none.

# %%
several = load_several([f"{WORKDIR}/adapter"])
for name, answer in several.ask([question], ["__base__", "mos"])[0].items():
    print(f"{name:10}{answer}")

# %% [markdown]
# ## Take it with you
#
# The same change of the base as a LoRA that PEFT loads, read back and compared: the largest
# difference of a logit is that of rounding.

# %%
exported = load_finished(f"{WORKDIR}/adapter").export_peft(f"{WORKDIR}/peft", overwrite=True)
print(exported)
