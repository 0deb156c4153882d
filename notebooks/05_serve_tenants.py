# %% [markdown]
# # 5. Three tenants in one batch
#
# One base, three customers with a MoS adapter each, and an engine that answers them side by side. A
# tenant is its pools and nothing else: how many fit is counted at the end.
#
# **You need** a checkout with `make setup` done, or Colab. **It takes** about 3 minutes on 2 CPU cores:
# each tenant is trained for a moment, to answer in a way of its own.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mos-jax/mos_jax/blob/main/notebooks/05_serve_tenants.ipynb)

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
WORKDIR = "runs/notebooks/tenants"
BASE = "smollm2-135m-instruct"
RANK = 8
STEPS = 12

# %%
import json
from pathlib import Path

import mos_jax
from configs import own_data
from mos_jax.data import prompt_text
from mos_jax.models.known import known_config
from mos_jax.reporting.capacity_picture import capacity_picture
from mos_jax.reporting.notebook import show, text_console
from mos_jax.serving.capacity import Server, capacity
from mos_jax.training.config import RunConfig
from mos_jax.training.loop import train

console = text_console()
folder = Path(WORKDIR)

# %% [markdown]
# ## Three tenants
#
# Each learns to greet in its own language, from a handful of lines. All have the same configuration, so
# their routing tables are the same, and a server keeps them once.

# %%
greetings = {"paris": "Bonjour !", "madrid": "¡Hola!", "berlin": "Guten Tag!"}
names = ["Ann", "Bob", "Carla", "Deniz", "Emma", "Farid", "Grace", "Hugo"]
for tenant, greeting in greetings.items():
    lines = [
        {"prompt": f"My name is {name}{mark} Greet me.", "completion": f"{greeting} {name}"}
        for name in names
        for mark in (".", "!", ", hello.", " and I am new here.", ", good morning.")
    ]
    (folder / tenant).mkdir(parents=True, exist_ok=True)
    (folder / tenant / "lines.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    config = own_data.get_config()
    config.base.name = BASE
    config.data.train_path = str(folder / tenant / "lines.jsonl")
    config.adapter.rank = RANK
    config.training.steps = STEPS
    config.training.learning_rate = 8e-3
    config.evaluation.every = 0
    config.evaluation.samples = 0
    summary = train(RunConfig.from_mapping(config.to_dict()), folder / tenant / "run", console)
    print(f"{tenant}: loss {summary['test']['adapter']['loss']:.3f}")

# %% [markdown]
# ## The bank and the engine
#
# `TenantBank` knows all tenants and holds those in use; the engine gives each request a row of one
# batch. Everything is allocated, and everything is compiled, before the first request.

# %%
base = mos_jax.load_base(BASE)
bank = mos_jax.TenantBank(base, mos_jax.BankOptions(slots=4, cached=4))
for tenant in greetings:
    bank.register(tenant, folder / tenant / "run/adapter")
engine = mos_jax.Engine(base, bank, mos_jax.EngineOptions(rows=4, length=256, pieces=(32,)))
engine.start()
print(f"{bank.nbytes:,} bytes for the bank, {engine.nbytes:,} with the rows' keys and values")

# %%
messages = [{"role": "user", "content": "My name is Zoe. Greet me."}]
prompt = tuple(base.tokenizer.encode(prompt_text(messages, base.tokenizer)))
sampling = mos_jax.TokenSampling(max_tokens=24)
streams = {
    tenant: engine.stream(mos_jax.Request(tenant, prompt, sampling))
    for tenant in ["__base__", *greetings]
}
for tenant, stream in streams.items():
    print(f"{tenant:10}{''.join(event.text for event in stream if hasattr(event, 'text'))}")

# %% [markdown]
# Four rows of one batch, four models: the base and three tenants. A row's tokens are the same, bit for
# bit, whoever its neighbours are.

# %%
for slab in bank.summary()["slabs"]:
    print(slab)
engine.close()
bank.close()

# %% [markdown]
# ## How many fit
#
# For LLaMA2-7B on a device of 80 GiB, with the arithmetic.

# %%
found = capacity(known_config("llama2-7b"), Server(memory=80 * 2**30))
print("\n".join(found.lines))

# %%
show(capacity_picture(found))
