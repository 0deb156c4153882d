"""How the programs in `experiments/` start and fail.

A mistake of the user is one line on standard error and exit status 2; a signal or a diverged run
is one line and its own status; anything else is a defect and keeps its trace.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from mos_jax.compilation_cache import keep_compiled
from mos_jax.errors import InputError, RunEnded

USER_ERROR = 2
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder where compiled programs are kept for the next start, or 'off'. By default that of "
    "$MOS_JAX_COMPILATION_CACHE, else mos_jax/compiled in the user's cache.",
)
HOSTS_FLAGS = ("coordinator", "processes", "process_id", "lost_after", "wait_for_others")
# Set to 1, every process runs for itself a program that several cannot run together.
ALONE = "MOS_JAX_ALONE"
# A config file and its overrides fail in as many ways as Python code can.
CONFIG_ERRORS = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)


def define_config(default: str) -> flags.FlagHolder:
    """Defines `--config`, a config file whose fields can be set: `--config.training.steps=200`.

    Its default is loaded here and now, with the overrides of the command line, so that a mistake
    in those is answered here too. Config files may import each other, as `configs.name`.
    """
    # Python itself looks for modules beside the program only, not beside `configs/`.
    sys.path.append(str(Path(sys.argv[0]).resolve().parents[1]))
    try:
        holder = config_flags.DEFINE_config_file(
            "config",
            default,
            "File of the configuration, or file.py:word, where the word goes to its get_config(): "
            "configs/quickstart.py:lora trains LoRA. Any field can be set, as in "
            "--config.training.steps=200; docs/reference/config.md lists all of them with their "
            "meaning, and a name that is none is answered with the nearest.",
        )
    except CONFIG_ERRORS as error:
        _leave(f"{_in_words(error)}; see --help", USER_ERROR)
    # The flag is the program's own, though it is defined here: --help must show it.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])
    return holder


def define_hosts() -> None:
    """Defines the flags of a program that several processes may run together.

    `run` then joins them before its `main` is called; see `mos_jax/distributed/hosts.py`.
    """
    flags.DEFINE_string(
        "coordinator", "", "Several hosts: host:port of process 0; auto: what JAX finds in a TPU "
        "pod, SLURM or Open MPI 4; none: alone. Default: auto in a job of several, else alone.",
    )  # fmt: skip
    flags.DEFINE_integer("processes", None, "How many, with --coordinator=host:port.")
    flags.DEFINE_integer("process_id", None, "Of this one, from 0, with --coordinator=host:port.")
    flags.DEFINE_float(
        "lost_after", 60.0, "Seconds without a sign of life after which a process is lost, and all "
        "others end with status 75.", lower_bound=1.0,
    )  # fmt: skip
    flags.DEFINE_float(
        "wait_for_others", 300.0, "Seconds to wait until all processes have started.",
        lower_bound=1.0,
    )  # fmt: skip
    for name in HOSTS_FLAGS:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def _together() -> contextlib.AbstractContextManager[None]:
    """The processes of a program with `define_hosts`, joined; nothing for a single one.

    Raises:
      InputError: for one of several processes of another program, unless `ALONE` is set.
    """
    # Imported here: what they import --help does not need.
    from mos_jax.distributed.meeting import find_meeting, started_as_several

    values = flags.FLAGS
    if "coordinator" not in values:
        if os.environ.get(ALONE) != "1" and (told := started_as_several(os.environ)):
            raise InputError(
                f"{Path(sys.argv[0]).name} was started as one of several processes ({told}), which "
                "would each do all of it and write over each other's files; train.py and "
                "lr_find.py can be run by several. Start it once (srun --ntasks=1, mpirun -n 1), "
                f"or set {ALONE}=1 if each has work and files of its own"
            )
        return contextlib.nullcontext()
    from mos_jax.distributed.hosts import joined

    meeting = find_meeting(values.coordinator, values.processes, values.process_id, os.environ)
    if meeting is None:
        return contextlib.nullcontext()
    return joined(meeting, values.lost_after, values.wait_for_others)


def load_from_config(name: str) -> Callable[..., Any]:
    """The function `name` of the file given as `--config`.

    Raises:
      InputError: if that file has none.
    """
    # "file.py:argument" is a file with an argument for its get_config().
    path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    spec = importlib.util.spec_from_file_location("mos_jax_config_file", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise InputError(f"{path} has no {name}(); the configs of sweeps in configs/ablations do")
    return getattr(module, name)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the flags, runs `main`, and turns expected failures into one line and a status."""
    # Every program has the flag, and its --help shows it.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["compilation_cache"])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = list(flags.FLAGS(list(argv)))
        # A config file that cannot be loaded shows only when its value is asked for.
        if "config" in flags.FLAGS:
            _ = dict(flags.FLAGS["config"].value or {})
    except SystemExit:
        # --help has been answered; absl takes that for a failure.
        print()
        sys.exit(0)
    except CONFIG_ERRORS as error:
        _leave(f"{_in_words(error)}; see --help", USER_ERROR)
    if len(rest) > 1:
        _leave(f"unexpected words {' '.join(rest[1:])!r}; flags start with --", USER_ERROR)
    if not flags.FLAGS["verbosity"].present:
        # Orbax and JAX tell of every step they take.
        logging.set_verbosity(logging.WARNING)
    return rest


def _in_words(error: BaseException) -> str:
    # What a config file's own code raised comes wrapped, its whole trace a part of the message.
    while "Traceback (most recent call last)" in str(error) and error.__context__ is not None:
        error = error.__context__
    text = " ".join(str(error.args[0] if error.args else error).split())
    # What absl and ml_collections say in words of their own code.
    if found := re.search(r"flag --config\.(\S+?)=(.*): invalid literal for int\(\)", text):
        return f"{found[1]} is an integer, not {found[2]!r}"
    if found := re.search(r"flag --config\.(\S+?)=(.*): could not convert string to float", text):
        return f"{found[1]} is a number, not {found[2]!r}"
    if found := re.search(r"Found (--\S+) in argv before a value for --config was", text):
        return f"{found[1]} stands before --config; put --config=file first"
    if found := re.search(r"Attempted \[[^\]]*\]: (\S+) \[Errno 2\]", text):
        there = Path(sys.argv[0]).resolve().parents[1] / "configs"
        files = [file for file in sorted(there.glob("*.py")) if "get_config(" in file.read_text()]
        names = ", ".join(f"configs/{file.name}" for file in files)
        return f"there is no config file {found[1]}; there are {names}, and others in folders there"
    return text


def _guarded(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    keep_compiled(COMPILATION_CACHE.value)
    try:
        with _together():
            main(argv)
    except InputError as error:
        _leave(str(error), USER_ERROR)
    except RunEnded as error:
        _leave(str(error), error.status)


def _leave(words: str, status: int) -> NoReturn:
    print(f"error: {words}", file=sys.stderr)
    sys.exit(status)
