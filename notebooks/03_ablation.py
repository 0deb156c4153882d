# %% [markdown]
# # 3. Run a small ablation, and read its report
#
# A sweep is a config, arms, learning rates and seeds: rates are chosen on the validation set, and
# the test set is used once. The report says what the numbers can tell, and what they cannot.
#
# **You need** a checkout with `make setup` done, or Colab. **It takes** about 40 minutes on 2 CPU
# cores that are free; the run resumes. (The copy shown here ran beside other programs, for longer,
# which its first times and estimates show.) The study itself, nine arms and four seeds, is in
# `results/core_study`.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mos-jax/mos_jax/blob/main/notebooks/03_ablation.ipynb)

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
WORKDIR = "runs/notebooks/ablation"
MOS = {"equivalent_rank": 2, "rank": 8, "shards_per_vector": 2, "private_rank": 1}
OVERRIDES = {
    "training.steps": 24,
    "data.validation_examples": 48,
    "data.test_examples": 96,
    "sweep.learning_rates": "2.5e-3,4e-3",
    "sweep.seeds": 3,
}

# %%
from pathlib import Path

from IPython.display import Markdown

from configs import study
from mos_jax.reporting.notebook import Shown, text_console
from mos_jax.reporting.results import load_results
from mos_jax.reporting.write import write_report
from mos_jax.sweeps.combinators import arm
from mos_jax.sweeps.definition import Sweep
from mos_jax.sweeps.estimate import print_costs
from mos_jax.sweeps.executors import LocalExecutor
from mos_jax.sweeps.runner import run_sweep
from mos_jax.training.session import Loads

console = text_console()

# %% [markdown]
# ## Three arms
#
# MoS, MoS in which every layer uses all shards, and LoRA. All train the same number of parameters.
#
# In a report a strategy that is off is a minus and its initials: "-ss" is without **s**ubset
# **s**election. (The others, not run here: "-pd" without pair dissociation, "-vs" without vector
# sharding, "-sp" without shard privatization.)

# %%
config = study.base_config()
config.sweep.baseline = "MoS"
config.update_from_flattened_dict(OVERRIDES)
arms = [
    arm("MoS", method="mos", **MOS),
    arm("-ss", method="mos", **{**MOS, "subset_selection": False, "rank": None}),
    arm("LoRA", method="lora", rank=2),
]
sweep, loads = Sweep.create(config.to_dict(), arms), Loads()
print_costs(sweep, loads, console)

# %% [markdown]
# ## Run it
#
# Each run has a folder of its own; what is finished is skipped when this cell runs again, and what
# failed keeps its error. The counts at the end are of the runs that are reported.

# %%
executor = LocalExecutor(str(Path(WORKDIR, "compiled").absolute()), loads)
counts = run_sweep(sweep, WORKDIR, executor, console)
print(counts)

# %% [markdown]
# ## The report
#
# Intervals carry both seeds and questions; differences are paired and corrected for how many there
# are. With so short a study, expect "no difference seen at this size" more often than not: read how
# large a difference would have been seen, and the widths of the intervals, not the order of the means.

# %%
page = write_report(load_results([WORKDIR]), Path(WORKDIR) / "report")
report = page.with_name("report.md").read_text(encoding="utf-8")
sections = dict(part.split("\n", 1) for part in report.split("\n## ")[1:])
Markdown(next(text for title, text in sections.items() if title.startswith("In words")))

# %% [markdown]
# A difference is an arm's accuracy less that of MoS; "non-inferior at margin 0.05" would say that it
# is at most so much worse.
#
# Now accuracy against trained parameters, as the report captions it: bars are 95% intervals over seeds
# and items; the grey step joins the arms that no other beats at their size or below, by their means
# alone; **arms of equal size stand side by side**. All three have 610,560 parameters here, and where
# they stand across tells nothing.

# %%
Shown(page.with_name("accuracy-trained_parameters.png").read_bytes())

# %% [markdown]
# The same differences with their p-values.

# %%
Markdown(sections["Against MoS"].partition("![")[0])
