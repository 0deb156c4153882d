# %% [markdown]
# # 6. Eight devices, and a pod that is not here
#
# The same config runs on one device and on a mesh of many. Eight CPU devices stand in for eight
# accelerators: they show what lies where, not how fast it is.
#
# **You need** a checkout with `make setup` done, or Colab. **It takes** about 2 minutes on 2 CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mos-jax/mos_jax/blob/main/notebooks/06_scale.ipynb)

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
WORKDIR = "runs/notebooks/scale"
CONFIG = "quickstart"
TOPOLOGY = "v5e:2x4"

# %%
import importlib

os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8")  # before JAX is imported

import jax
from IPython.display import Markdown

from configs import smoke
from mos_jax.errors import InputError
from mos_jax.planning.chips import find_slice
from mos_jax.planning.compiling import Compiler
from mos_jax.planning.plan import make_plan
from mos_jax.planning.report import print_plan as print_pod_plan
from mos_jax.planning.resolving import make_request
from mos_jax.reporting.notebook import text_console
from mos_jax.training.config import RunConfig
from mos_jax.training.loop import train
from mos_jax.training.plan import print_plan

console = text_console()
print(jax.devices())

# %% [markdown]
# ## What lies where
#
# The mesh has three axes: `data` divides the batch, `fsdp` divides batch and weights, `tensor` the work
# on each token. Nothing of the base is read for this table: it comes from shapes, and from the step as
# it is compiled for the mesh.

# %%
config = importlib.import_module(f"configs.{CONFIG}").get_config()
config.data.batch_size = 4  # a row for each of the four shares of fsdp
config.mesh.fsdp = 4
config.mesh.tensor = 2
print_plan(RunConfig.from_mapping(config.to_dict()), console)

# %% [markdown]
# ## The same result
#
# A run on one device and on a mesh of eight: the losses agree to rounding.

# %%
losses = {}
for name, sizes in {"one": {}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}}.items():
    config = smoke.get_config()
    config.data.batch_size = 4
    config.evaluation.every = 0
    config.evaluation.samples = 0
    config.mesh.update(sizes)
    run = RunConfig.from_mapping(config.to_dict())
    losses[name] = train(run, f"{WORKDIR}/{name}", console)["test"]["adapter"]["loss"]
print(losses)
assert abs(losses["one"] - losses["eight"]) < 1e-4

# %% [markdown]
# ## A pod that is not here
#
# The planner gives the training step itself to the TPU compiler, from shapes alone, and says what a
# chip would hold, send and compute, and whether it fits. Here is the config from above on eight v5e
# chips.
#
# The compiler has an environment of its own, which `make planner` builds, once, in one to three
# minutes (1.2 GB). On Colab it is `!make planner` in a cell above; what it lacks there it names,
# with the line that installs it. Without the compiler the next cell says so, and the notebook goes
# on.

# %%
config = importlib.import_module(f"configs.{CONFIG}").get_config()
config.base.dtype = "bfloat16"
config.data.batch_size = 8
slice_of_chips = find_slice(TOPOLOGY)
request, assumed = make_request(RunConfig.from_mapping(config.to_dict()), slice_of_chips)
try:
    compiler = Compiler(Path(WORKDIR, "plans"))
except InputError as missing:
    print(missing)
else:
    print_pod_plan(make_plan(request, compiler), assumed, console)

# %% [markdown]
# Larger models take minutes to compile:
#
#     python experiments/plan.py --config=configs/paper/llama2_7b.py --topology=v5e:4x4
#
# This is the table that `make plans` makes, LLaMA2 7B, 13B and 70B; no chip has run it.

# %%
plans = Path("results/plans.md").read_text(encoding="utf-8")
tables = [part for part in plans.split("\n\n") if part.startswith("| model |")]
Markdown(tables[0])

# %% [markdown]
# MoS beside LoRA: bytes of a chip, and what it receives from others in a step.

# %%
Markdown(tables[1])
