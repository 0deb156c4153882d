"""Compiles one step with the TPU compiler: a program of its own, run where libtpu is installed.

    python -m mos_jax.planning.worker FOLDER [known] < request.json

It reads a `Request` as JSON and prints, as its last line, the name of the compiled program in
FOLDER: a digest of the step before compilation, of the chips and of the compiler's versions, so
that two requests for one step are compiled once. NAME.json holds what the compiler says of it (or
why it refused), NAME.hlo.gz the scheduled program as text. With `known` nothing is compiled: where
the program is not there, the last line is "unknown".
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

from mos_jax.errors import InputError
from mos_jax.files import fresh_file

COMPILER = ("jax", "jaxlib", "libtpu")
# What is said of a program that was not compiled.
UNKNOWN = "unknown"
# How the compiler says that a program does not fit.
NO_ROOM = "RESOURCE_EXHAUSTED"
# "17.03G" as the compiler writes 17.03 GiB.
_SIZE = r"([\d.]+)([KMGT]?)"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def describe_devices(topology: str) -> list[Any]:
    """The devices of a topology, described by libtpu. Raises InputError if it refuses the name."""
    from jax.experimental import topologies

    # libtpu takes four chips for a host unless it is told otherwise; a single chip is its own.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone)
    except Exception as error:
        raise InputError(f"libtpu refuses the topology {topology!r}: {error}") from error
    return list(described.devices)


def usable_memory(device: Any) -> int:
    """Bytes of a chip that the compiler lets programs have.

    It says so when it refuses a program, so it is given one that no chip has room for.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    # 2 TiB, and as much for the result.
    huge = jax.ShapeDtypeStruct(
        (2**11, 2**14, 2**14), jnp.float32, sharding=SingleDeviceSharding(device)
    )
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        _, usable = read_refusal(str(error))
        if usable is not None:
            return usable
        raise RuntimeError(f"the compiler states no memory: {error}") from error
    raise RuntimeError("the compiler took a program of 4 TiB for one chip")


def argument_bytes(arguments: Any) -> int:
    """Bytes of the arguments of a step on each chip, from their shapes and shardings."""
    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arguments)
    )


def read_refusal(message: str) -> tuple[int | None, int | None]:
    """Bytes that a refused program needs, and bytes that there are, from the compiler's words."""
    for pattern in (
        rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
        rf"Used {_SIZE} of {_SIZE} hbm",
    ):
        found = re.search(pattern, message)
        if found is not None:
            needed, unit, usable, other = found.groups()
            return (
                round(float(needed) * _UNITS[unit]),
                round(float(usable) * _UNITS[other]),
            )
    return None, None


def compile_program(lowered: Any) -> tuple[dict[str, Any], str]:
    """What the compiler says of a lowered step, and the compiled program as text.

    Returns:
      `seconds` of the compilation, and either `memory`, bytes on each chip by name as in XLA's
      CompiledMemoryStats, or `refused`, the compiler's message for a program that does not fit.
    """
    import jax

    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if NO_ROOM not in str(error):
            raise
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "refused": str(error)}, ""
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    memory = {name: getattr(stats, name) for name in dir(stats) if name.endswith("_in_bytes")}
    return {"seconds": seconds, "memory": memory}, compiled.as_text()


def main() -> None:
    """Compiles the request on standard input; see the module."""
    from mos_jax.planning.outline import outline_step
    from mos_jax.planning.request import Request

    folder = Path(sys.argv[1])
    request = Request.from_dict(json.load(sys.stdin))
    devices = describe_devices(request.topology)
    outline = outline_step(request, devices)
    lowered = outline.lower()
    versions = {name: importlib.metadata.version(name) for name in COMPILER}
    placement = outline.session.placement
    order = [] if placement is None else [d.id for d in placement.mesh.devices.flat]
    what = json.dumps([request.topology, order, versions])
    name = hashlib.sha256((what + lowered.as_text()).encode()).hexdigest()[:32]
    if not (folder / f"{name}.json").is_file():
        if sys.argv[2:] == ["known"]:
            print(UNKNOWN)
            return
        found, text = compile_program(lowered)
        found |= {
            "arguments": argument_bytes(outline.arguments),
            "usable": usable_memory(devices[0]),
            "versions": versions,
        }
        if text:
            with fresh_file(folder / f"{name}.hlo.gz") as file:
                # Without a time, so that equal programs are equal files.
                file.write_bytes(gzip.compress(text.encode(), 6, mtime=0))
        with fresh_file(folder / f"{name}.json") as file:
            file.write_text(json.dumps(found, indent=1) + "\n")
    print(name)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
