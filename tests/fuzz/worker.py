"""The process in which readers meet damaged files: `python -m tests.fuzz.worker`.

One line of JSON before a case and one after it, on standard output. What is judged of each case:

  * it is read, and another reading of the files agrees, or `InputError` is raised, in one line
    that names the file; nothing else is raised;
  * memory: what Python and NumPy had allocated at the same time (tracemalloc), and what the whole
    process had resident (VmHWM), stay within the bytes of the files and a constant. A limit on
    private memory (RLIMIT_DATA) turns what would take gigabytes into a MemoryError;
  * opened: nothing outside the folder, by Python's audit events, and by the kernel's (inotify),
    which also see what other languages open; no pickle, in the folder or outside;
  * nothing is written, in the folder, the temporary folder or the current one.

A case that does not return within its time ends the process, with the trace of where it was; so
does a crash. The parent, `runner.py`, then goes on with the next case in a new process.
"""

import argparse
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import random
import resource
import struct
import sys
import sysconfig
import traceback
import tracemalloc
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from mos_jax.errors import InputError
from mos_jax.reading import MAX_TEXT_BYTES
from tests.fuzz.mutations import OUTSIDE, a_torch_file, clear
from tests.fuzz.target import Target

SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))
# Beyond the bytes of the files. tracemalloc counts the arrays that a good file is read into, the
# parsed header and the traces of errors; the process also has what allocators keep.
TRACED_CONSTANT = 4 << 20
RESIDENT_CONSTANT = 48 << 20
DATA = 1 << 30  # private memory that a case may ask for at all
LONGEST_MESSAGE = 1500
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_CODE = (
    *{sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()},
    str(Path(__file__).parents[2] / "mos_jax"),
    str(Path(__file__).parent),
    "/proc/",
    "/sys/",
)


class Watch:
    """What is opened while `on`, by audit events and by the kernel."""

    OPEN = 0x20

    def __init__(self, folder: Path, outside: Path):
        self.on = False
        self.folder, self.outside = str(folder), outside
        self.seen: list[str] = []
        self.kernel = -1
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "inotify_init1"):
            self.kernel = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if libc.inotify_add_watch(self.kernel, os.fsencode(outside), self.OPEN) < 0:
                raise OSError("cannot watch a folder")
        self._libc = libc
        sys.addaudithook(self._hook)

    def pickles(self, folder: Path) -> None:
        """Also watches the pickles in `folder`; a link is watched by what it points to."""
        if self.kernel >= 0:
            for file in folder.iterdir():
                if file.suffix in PICKLES and file.is_file():
                    self._libc.inotify_add_watch(self.kernel, os.fsencode(file), self.OPEN)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path = arguments[0]
            if isinstance(path, int):
                return
            path = os.path.abspath(os.fsdecode(path))
            inside = path.startswith(self.folder)
            if path.endswith(PICKLES) or not (inside or path.startswith(_CODE)):
                self.seen.append(f"opened {path}")
        elif event.startswith(("pickle.", "marshal.load", "subprocess.", "os.system", "socket.")):
            if event != "marshal.loads" or self._foreign_import():
                self.seen.append(event)
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.truncate", "os.exec", "os.fork"):
            self.seen.append(event)

    @staticmethod
    def _foreign_import() -> bool:
        # Importing a module late is what loads code objects.
        frame = sys._getframe()
        while frame is not None:
            if "importlib" in frame.f_code.co_filename:
                return False
            frame = frame.f_back  # type: ignore[assignment]
        return True

    def collect(self) -> list[str]:
        seen, self.seen = self.seen, []
        if self.kernel >= 0:
            try:
                data = os.read(self.kernel, 1 << 16)
            except BlockingIOError:
                data = b""
            while data:
                _, mask, _, length = struct.unpack_from("iIII", data)
                name = data[16 : 16 + length].rstrip(b"\0").decode()
                if mask & self.OPEN:
                    seen.append(f"opened {name or 'a pickle in the folder'} (seen by the kernel)")
                data = data[16 + length :]
        return sorted(set(seen))


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise OSError(field)


def _reset_resident_peak() -> int:
    """Sets the peak of resident memory to what is resident now, and returns that."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmHWM")


def _on_disk(folder: Path) -> int:
    """Bytes of the folder's files, of holes no more than a header may have."""
    total = 0
    for file in folder.rglob("*"):
        state = file.lstat()
        total += min(state.st_size, state.st_blocks * 512 + MAX_TEXT_BYTES)
    return total


def _snapshot(*folders: Path) -> list[tuple[str, int, int]]:
    found = []
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            state = path.lstat()
            found.append((str(path), state.st_size, state.st_mtime_ns))
    return found


def case_mutations(target: Target, seed: str) -> tuple[str, list[tuple[int, int]]]:
    """The variant of a case, and which mutations are applied with which seeds."""
    rng = random.Random(seed)
    variant = rng.choice(sorted(target.variants))
    count = rng.choice((1, 1, 1, 1, 1, 1, 2, 3))
    chosen = [(rng.randrange(len(target.mutations)), rng.getrandbits(32)) for _ in range(count)]
    return variant, chosen


def find_target(name: str) -> Target:
    """The target of this name; "module:name" is one of another module's `TARGETS`."""
    module, _, name = name.rpartition(":")
    return importlib.import_module(module or "tests.fuzz.targets").TARGETS[name]


class Bench:
    """One target with its good files in memory and a folder in which copies are damaged."""

    def __init__(self, name: str, root: Path, watch: Watch, folder: Path):
        self.target, self.watch, self.folder = find_target(name), watch, folder
        self.scratch = (root / "temporary", root / "current")
        self.case = -1
        self.good: dict[str, dict[str, bytes]] = {}
        for variant, write in self.target.variants.items():
            clear(folder)
            place = folder / variant
            place.mkdir()
            write(place)
            files = {p.name: p.read_bytes() for p in sorted(place.iterdir())}
            self.good[variant] = files
            reading = self.target.read(place)  # warm, and the good files must be right
            self.target.check(place, reading)

    def prepare(self, variant: str, mutations: list[tuple[int, int]]) -> tuple[Path, list[str]]:
        clear(self.folder)
        place = self.folder / variant
        place.mkdir()
        for name, content in self.good[variant].items():
            (place / name).write_bytes(content)
        done = []
        for index, seed in mutations:
            done.append(self.target.mutations[index](random.Random(seed), place))
        if self.target.seal is not None and mutations[0][1] % 8:
            self.target.seal(place)
        return place, done

    def run(self, variant: str, mutations: list[tuple[int, int]]) -> dict[str, Any]:
        place, done = self.prepare(variant, mutations)
        size = _on_disk(place)
        print(json.dumps({"start": self.case, "mutations": done, "variant": variant}), flush=True)
        self.watch.collect()
        self.watch.pickles(place)
        before = _snapshot(place, *self.scratch)
        found: list[str] = []
        reading, outcome, message = None, "read", ""
        gc.collect(0)
        resident = _reset_resident_peak()
        traced = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        self.watch.on = True
        try:
            reading = self.target.read(place)
        except InputError as error:
            self.watch.on = False
            outcome, message = "refused", str(error)
        except BaseException as error:
            self.watch.on = False
            outcome = "raised"
            trace = "".join(traceback.format_exception(error)[-4:])
            found.append(f"raised {type(error).__name__}: {str(error)[:200]}\n{trace[-1500:]}")
        finally:
            self.watch.on = False
        traced = tracemalloc.get_traced_memory()[1] - traced
        resident = _status("VmHWM") - resident
        found += self.watch.collect()
        if before != _snapshot(place, *self.scratch):
            found.append("something was written")
        if traced > size + TRACED_CONSTANT or resident > size + RESIDENT_CONSTANT:
            found.append(f"memory: {traced} traced, {resident} resident, {size} on disk")
        if outcome == "refused":
            names = [str(place), *self.good[variant]]
            if not any(name in message for name in names):
                found.append(f"the message names no file: {message[:300]!r}")
            if len(message) > LONGEST_MESSAGE or not message.isprintable():
                found.append(f"not one readable line of {len(message)}: {message[:300]!r}")
        elif outcome == "read":
            try:
                self.target.check(place, reading)
            except BaseException as error:
                trace = "".join(traceback.format_exception(error)[-3:])
                found.append(f"wrong: {type(error).__name__}: {str(error)[:300]}\n{trace[-1200:]}")
        return {
            "outcome": outcome,
            "message": message[:300],
            "mutations": done,
            "variant": variant,
            "traced": traced,
            "resident": resident,
            "size": size,
            "findings": found,
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("format")
    parser.add_argument("seed")
    parser.add_argument("cases", type=int, nargs="+")
    options = parser.parse_args()
    root = options.root.resolve()
    folder, outside = root / "case", root / OUTSIDE
    for path in (folder, outside, root / "temporary", root / "current"):
        clear(path)
    # Names that damaged files give, and what would be found under them.
    import numpy as np

    save_file({"secret": np.zeros(4, np.float32)}, outside / "secret.safetensors")
    (outside / "secret").write_bytes(a_torch_file(folder))
    (outside / "secret.bin").write_bytes(a_torch_file(folder))
    os.environ["TMPDIR"] = str(root / "temporary")
    faulthandler.enable()
    os.chdir(root / "current")
    watch = Watch(folder, outside)
    bench = Bench(options.format, root, watch, folder)
    limit = _status("VmData") + DATA
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    tracemalloc.start(1)
    first, last = options.cases[0], options.cases[-1]
    for case in range(first, last + 1):
        bench.case = case
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        variant, mutations = case_mutations(bench.target, f"{options.seed}/{options.format}/{case}")
        result = bench.run(variant, mutations)
        if result["findings"] and len(mutations) > 1:
            for one in mutations:  # the one that is enough
                alone = bench.run(variant, [one])
                if alone["findings"]:
                    result = alone
                    break
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"case": case, **result}), flush=True)
        if case % 100 == 99:
            import jax

            jax.clear_caches()  # shapes of damaged files
            gc.collect()


if __name__ == "__main__":
    main()
