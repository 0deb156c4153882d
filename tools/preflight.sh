#!/bin/sh
# Says at once everything a build of .venv needs and this machine lacks, with the line that
# installs it. Prints the Python to use on standard output. Exits 1 when something is missing.
#
# PYTHON=/path/to/python  takes that interpreter instead of the first fit one on PATH.
# Only shell built-ins, the interpreter and the compiler are called.
set -u

missing=""
apt=""
need() { # need <what is missing> <its Debian package>
  missing="${missing}  - $1
"
  case " $apt " in *" $2 "*) ;; *) apt="${apt:+$apt }$2" ;; esac
}

PROBE='
import sys
print("%d.%d" % sys.version_info[:2])
if sys.version_info < (3, 11):
    sys.exit(3)
lacks = []
try:
    import venv, ensurepip
except ImportError:
    lacks.append("venv")
else:
    try:
        ensurepip.version()
    except Exception:
        lacks.append("pip")
import sysconfig
print(" ".join(lacks))
print(sysconfig.get_paths()["include"])
print((sysconfig.get_config_var("CC") or "cc").split()[0])
'

python=""
version=""
seen=""
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
  command -v "$candidate" >/dev/null 2>&1 || continue
  if answer=$("$candidate" -c "$PROBE" 2>/dev/null); then
    python=$(command -v "$candidate")
    break
  fi
  seen="${seen:+$seen, }$candidate is ${answer:-not working}"
done

include=""
compiler=""
if [ -n "$python" ]; then
  { read -r version; read -r lacks; read -r include; read -r compiler; } <<EOF
$answer
EOF
  # Debian splits the standard library: the packages carry the version for any other Python.
  case "$python" in
    */python3) package=python3 ;;
    *) package=python$version ;;
  esac
  case " $lacks " in
    *" venv "*) need "the venv and ensurepip modules of $python (Python $version)" "$package-venv" ;;
    *" pip "*) need "pip (the copy that ensurepip installs from)" python3-pip-whl ;;
  esac
else
  package=python3
  if [ -n "$seen" ]; then
    need "Python 3.11 or newer ($seen; or name one: make PYTHON=/path/to/python3)" python3
  elif [ -n "${PYTHON:-}" ]; then
    need "Python 3.11 or newer ($PYTHON is not a program)" python3
  else
    need "Python 3.11 or newer (no python3 on PATH)" python3
  fi
  need "the venv and ensurepip modules that go with it" python3-venv
fi

# pycosat, which reasoning-gym needs, is compiled on install: a compiler and two sets of headers.
cc=""
for candidate in ${CC:-} "$compiler" cc gcc; do
  [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
  cc=$candidate
  break
done
if [ -z "$cc" ]; then
  need "a C compiler (cc or gcc)" gcc
  need "the headers of the C library" libc6-dev
else
  echo '#include <stdlib.h>' | "$cc" -x c -fsyntax-only - >/dev/null 2>&1 ||
    need "the headers of the C library ($cc cannot include stdlib.h)" libc6-dev
fi
if [ -z "$python" ]; then
  need "the C headers of Python (Python.h)" python3-dev
elif [ -n "$include" ] && [ ! -f "$include/Python.h" ]; then
  need "the C headers of Python $version ($include/Python.h)" "$package-dev"
fi

if [ -n "$missing" ]; then
  {
    echo "Missing on this machine:"
    printf '%s' "$missing"
    echo "On Debian or Ubuntu:"
    echo "  sudo apt-get update && sudo apt-get install -y $apt"
  } >&2
  exit 1
fi
echo "$python"
