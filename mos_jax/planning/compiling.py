"""Compiles requests where libtpu is installed, and keeps what was compiled.

The library itself runs without libtpu, which makes every start of JAX slow and talkative; a worker
in an environment that has it does the compiling. What it finds lies in a folder: a request that
was compiled before costs nothing, and a step that comes out the same, whatever was asked or
changed, is compiled once.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mos_jax
from mos_jax.errors import InputError
from mos_jax.files import fresh_file
from mos_jax.planning.counting import Counts, count_program
from mos_jax.planning.hlo import read_program
from mos_jax.planning.request import Request
from mos_jax.planning.worker import UNKNOWN, read_refusal

# Built by `make planner`; looked for beside the package and in the working directory.
ENVIRONMENT = ".venv-tpu"
PYTHON_VARIABLE = "MOS_JAX_TPU_PYTHON"
_VERSIONS = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({n: m.version(n) for n in ('jax', 'jaxlib', 'libtpu', 'flax', 'optax')}))"
)
# What the compiled step, and what is kept of it, depends on, of this package.
_SOURCES = (
    "adapters",
    "data/batches.py",
    "distributed",
    "evaluation",
    "models",
    "planning/outline.py",
    "planning/worker.py",
    "training",
)


# Variables that would change what is compiled. No key knows of them, so no worker gets them, nor
# any of JAX's own.
_SHAPING = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, or the refusal of one.

    Attributes:
      seconds: that compiling it took.
      usable: bytes of a chip's memory that the compiler lets programs have.
      arguments: bytes of its arguments on each chip.
      peak: bytes that a step needs at once on each chip, arguments and all, by the compiler: what
        it accepts or refuses a program for. None where it refuses for something else than a chip's
        main memory.
      code: bytes of the program itself, not in the peak; None if refused.
      refusal: the compiler's words; None if it fits.
      counts: what a step does; None if refused.
      versions: of the compiler.
    """

    seconds: float
    usable: int
    arguments: int
    peak: int | None
    code: int | None
    refusal: str | None
    counts: Counts | None
    versions: dict[str, str]

    @property
    def temporaries(self) -> int | None:
        """Bytes at the peak that are no arguments; None where there is no peak."""
        return None if self.peak is None else self.peak - self.arguments

    @property
    def fits(self) -> bool:
        """Whether the compiler took it."""
        return self.refusal is None


def find_python(named: str | None = None) -> Path:
    """The Python that has libtpu: the one `named`, this one, or that of `make planner`.

    Raises:
      InputError: if there is none, or the named one does not exist.
    """
    named = named or os.environ.get(PYTHON_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise InputError(f"{named}: there is no such Python; see docs/planner.md")
        return Path(named)
    if importlib.util.find_spec("libtpu") is not None:
        return Path(sys.executable)
    for root in (_root(), Path.cwd()):
        python = root / ENVIRONMENT / "bin" / "python"
        if python.is_file():
            return python
    raise InputError(
        f"libtpu, the TPU compiler, is not installed: `make planner` builds {ENVIRONMENT} for it "
        "(the extra `tpu`; an environment of its own, since it makes every start of JAX slow), or "
        "name a Python that has it with --python"
    )


def default_cache() -> Path:
    """The folder of compiled plans in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mos_jax" / "plans"


class Compiler:
    """Compiles requests with the TPU compiler, each once.

    Attributes:
      folder: where what was compiled lies.
      compiled: how many requests this object had to compile or lower; the others were known.
    """

    def __init__(self, folder: Path | None = None, python: str | None = None) -> None:
        """Compiles with `python` (default: `find_python`) into `folder` (`default_cache`).

        Raises:
          InputError: if there is no Python with libtpu.
        """
        self._python = find_python(python)
        self.folder = default_cache() if folder is None else folder
        self.compiled = 0

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """Of what decides how a step is compiled. Raises InputError where libtpu is missing."""
        done = self._call("-c", _VERSIONS)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it failed without a word"]
            raise InputError(f"{self._python} has no working libtpu ({lines[-1]}); `make planner`")
        return json.loads(done.stdout)

    @property
    def code(self) -> str:
        """A digest of the code that the step comes from, as hexadecimal digits."""
        return _code_digest()

    def known(self, request: Request) -> bool:
        """Whether `request` costs no compile; where the code has changed, its step is traced.

        Raises:
          InputError: if libtpu or the step refuses what was asked.
          RuntimeError: if the tracing fails otherwise.
        """
        note = self._note(request)
        if self._noted(note) is not None:
            return True
        name = self._work(request, "known")
        if name == UNKNOWN or not self._whole(name):
            return False
        _write_note(note, name, request)
        return True

    def program(self, request: Request) -> Program:
        """The compiled step of `request`.

        Raises:
          InputError: if libtpu or the step refuses what was asked.
          RuntimeError: if the compiler fails otherwise.
        """
        note = self._note(request)
        name = self._noted(note)
        if name is None:
            name = self._work(request)
            if not self._whole(name):
                # A worker looks at the first of the two files alone.
                self._files(name)[0].unlink()
                name = self._work(request)
            _write_note(note, name, request)
            self.compiled += 1
        return self._load(name, request)

    def _noted(self, note: Path) -> str | None:
        """The program of a note; None where there is no note, or not all of the program."""
        if not note.is_file():
            return None
        name = json.loads(note.read_text())["program"]
        return name if self._whole(name) else None

    def _whole(self, name: str) -> bool:
        """Whether all of a program is there; of a refused one there is no text."""
        said, text = self._files(name)
        return said.is_file() and (text.is_file() or "refused" in json.loads(said.read_text()))

    def _files(self, name: str) -> tuple[Path, Path]:
        """What the compiler says of a program, and its text."""
        programs = self.folder / "programs"
        return programs / f"{name}.json", programs / f"{name}.hlo.gz"

    def _note(self, request: Request) -> Path:
        key = json.dumps([request.digest(), self.versions, self.code], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self.folder / "requests" / f"{name}.json"

    def _work(self, request: Request, *options: str) -> str:
        """The last line of a worker."""
        programs = self.folder / "programs"
        programs.mkdir(parents=True, exist_ok=True)
        asked = json.dumps(request.to_dict())
        done = self._call("-m", "mos_jax.planning.worker", str(programs), *options, text=asked)
        if done.returncode == 2 and (said := re.findall(r"^error: (.*)$", done.stderr, re.M)):
            raise InputError(said[-1])
        if done.returncode:
            raise RuntimeError(
                f"the TPU compiler ended with status {done.returncode}; its last words:\n"
                + "\n".join(done.stderr.strip().splitlines()[-12:])
            )
        return done.stdout.strip().splitlines()[-1]

    def _call(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        # The worker must be of this checkout, whichever one its environment was made from.
        paths = [str(_root()), os.environ.get("PYTHONPATH", "")]
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in _SHAPING and not name.startswith("JAX_")
        }
        environment = inherited | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            # The host is no TPU machine: JAX runs on its CPU, and libtpu asks no metadata server.
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            # It describes chips and holds none, so several may run at a time.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            # What is compiled for described chips cannot be loaded again.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        return subprocess.run(
            [str(self._python), *arguments],
            input=text,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def _load(self, name: str, request: Request) -> Program:
        said, packed = self._files(name)
        found = json.loads(said.read_text())
        common = {name: found[name] for name in ("seconds", "usable", "versions")}
        if "refused" in found:
            needed, _ = read_refusal(found["refused"])
            return Program(
                **common,
                arguments=found["arguments"],
                peak=needed,
                code=None,
                refusal=found["refused"],
                counts=None,
            )
        text = gzip.decompress(packed.read_bytes()).decode()
        memory = found["memory"]
        return Program(
            **common,
            # As laid out, with what tiles of 8 x 128 pad.
            arguments=memory["argument_size_in_bytes"],
            peak=memory["peak_memory_in_bytes"],
            code=memory["generated_code_size_in_bytes"],
            refusal=None,
            counts=count_program(read_program(text), devices(request)),
        )


def devices(request: Request) -> int:
    """Chips of a request's mesh."""
    mesh = request.config.mesh
    return mesh.data * mesh.fsdp * mesh.tensor


def _write_note(note: Path, name: str, request: Request) -> None:
    with fresh_file(note) as file:
        file.write_text(json.dumps({"program": name, "request": request.to_dict()}))


def _root() -> Path:
    return Path(mos_jax.__file__).resolve().parents[1]


@functools.cache
def _code_digest() -> str:
    return code_digest(Path(mos_jax.__file__).resolve().parent)


def code_digest(package: Path) -> str:
    """SHA-256 of the code of a step, in the folder of a copy of this package."""
    digest = hashlib.sha256()
    for source in _SOURCES:
        place = package / source
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(str(file.relative_to(package)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
