# %% [markdown]
# # 4. Your own data, base and tools
#
# A JSONL file, a model folder, four bits a weight, and out to PEFT: each step is one field or one
# call.
#
# **You need** a checkout with `make setup` done, or Colab. **It takes** about a minute on 2 CPU cores
# that are free (the copy shown here ran beside other programs, for five): the base is a tiny random
# model in Hugging Face's format, which stands where your folder would. It knows no language, and five
# colours are what can be taught to it. Set `BASE` to the path of a Llama, Mistral, Qwen or Gemma 3
# folder, or of a GGUF file, to use that, with the rank and the rate below.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mos-jax/mos_jax/blob/main/notebooks/04_bring_your_own.ipynb)

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
WORKDIR = "runs/notebooks/own"
BASE = None
RANK = 3  # the tiny base has two layers, too few for the usual 8
RATE = 2e-2  # for random weights; 2e-3 suits a base that was trained
STEPS = 200

# %%
import json
import random
from pathlib import Path

import mos_jax
from configs import own_data
from mos_jax.finished import load_finished
from mos_jax.reporting.notebook import text_console
from mos_jax.training.config import RunConfig
from mos_jax.training.loop import train
from mos_jax.training.plan import print_plan
from mos_jax.training.report import print_summary

console = text_console()
folder = Path(WORKDIR)
folder.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Data
#
# A line is `{"prompt", "completion"}` or `{"messages"}`. Validation and test questions are split off,
# and no question is in two sets.

# %%
colours = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "rust": "red"}
draw = random.Random(0)
lines = [
    {"prompt": f"Case {number}: colour of the {thing}?", "completion": colours[thing]}
    for number in range(200)
    for thing in [draw.choice(sorted(colours))]
]
(folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
print(lines[0])

# %% [markdown]
# ## Base
#
# A folder with `config.json`, safetensors and a tokenizer.

# %%
if BASE is None:
    BASE = str(folder / "model")
    if not Path(BASE).exists():
        mos_jax.write_model(BASE, mos_jax.load_base("tiny-random"))
print(sorted(path.name for path in Path(BASE).iterdir()))

# %% [markdown]
# ## What it will take
#
# The base in NF4: its projections are held in 4.25 bits a weight, encoded while loading; the adapter
# trains in fp32 above them. A dry run prints parameters and memory from the compiled step.

# %%
config = own_data.get_config()
config.base.name = BASE
config.base.quantize = "nf4"
config.data.train_path = str(folder / "mine.jsonl")
config.adapter.rank = RANK
config.training.steps = STEPS
config.training.learning_rate = RATE
config.logging.every = 40
run = RunConfig.from_mapping(config.to_dict())
print_plan(run, console)

# %% [markdown]
# ## Train
#
# Before, the answers of random weights are random bytes. All that changes is the adapter, 4,096
# numbers beside the base in four bits.

# %%
summary = train(run, folder / "run", console)
print_summary(summary, folder / "run", console)

# %% [markdown]
# ## Out to PEFT
#
# Any method goes out as a LoRA. The folder is read back, and the largest difference of a logit over
# the base as it was trained is stated.

# %%
finished = load_finished(folder / "run/adapter")
print(finished.export_peft(folder / "peft", overwrite=True))
print(json.loads((folder / "peft/adapter_config.json").read_text())["target_modules"])
