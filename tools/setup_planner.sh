#!/bin/sh
# Brings .venv-tpu to the extra `tpu` of pyproject.toml at the versions of constraints.txt; returns
# at once if it is there.
#
#   tools/setup_planner.sh
#
# The TPU compiler, libtpu, has an environment of its own: where it is installed, every start of JAX
# looks for TPUs and says that there are none. PYTHON=... names the interpreter to build with. A
# stamp that is written last holds what it was built from; anything else is rebuilt from nothing.
set -eu
cd "$(dirname "$0")/.."
venv=.venv-tpu
if command -v flock >/dev/null 2>&1; then
  exec 9<tools/setup_planner.sh
  flock -n 9 || { echo "planner: waiting for another run of this script"; flock 9; }
fi
wanted=$(cat pyproject.toml constraints.txt tools/setup_planner.sh | cksum; pwd -P)
if "$venv/bin/python" -S -c "" 2>/dev/null && [ "$(cat $venv/.stamp 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
python=$(sh tools/preflight.sh)
echo "planner: building $venv (about 1.2 GB on disk; one to three minutes)"
rm -rf "$venv"
"$python" -m venv "$venv"
PIP_USE_PEP517=${PIP_USE_PEP517:-1}
export PIP_USE_PEP517
"$venv/bin/python" -m pip --quiet --disable-pip-version-check --no-input \
  install -c constraints.txt -e ".[tpu]" </dev/null
printf '%s\n' "$wanted" >"$venv/.stamp"
echo "planner: done"
