"""From flags to a server that runs: plan, base, bank, engine, service."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from mos_jax.errors import InputError
from mos_jax.models.base import NAMED_BASES, Base, load_base, outline_base
from mos_jax.serving.capacity import in_gib
from mos_jax.serving.engine import Engine
from mos_jax.serving.engine_options import EngineOptions
from mos_jax.serving.http.keys import ADMIN_VARIABLE, KEYS_VARIABLE, Keyring, read_keys
from mos_jax.serving.http.metrics import Metrics
from mos_jax.serving.http.options import Limits
from mos_jax.serving.http.server import Server, is_loopback, listen
from mos_jax.serving.http.service import Service
from mos_jax.serving.memory_plan import MemoryPlan, device_memory, plan_memory
from mos_jax.serving.options import BankOptions
from mos_jax.serving.tenants import TenantBank

_WILDCARDS = ("0.0.0.0", "::", "")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A server to be.

    Attributes:
      base: name or path of the base.
      adapters: folders that hold a folder for each adapter, which is registered under its name;
        adapters that come at run time must lie in them.
      host: address to listen on.
      port: 0 is any that is free.
      keys: file of keys; those of the environment come besides.
      open: whether to let anybody in who reaches a host that others reach, where there are no keys.
      base_id: the base's name in the API; default: its own, or that of its file.
      dtype: of the base and of the key-value cache.
      quantize: how the base's sites are held.
      engine: its sizes.
      bank: its sizes; how many slots there are is `slots`.
      slots: tenants on the device, of each slab; None is as many as are known and fit.
      memory: bytes to stay within; None is what the device has.
      reserve: share of it for programs, activations and fragments.
      limits: what one request may cost.
      tenant_figures: whether the figures count by tenants' names.
    """

    base: str
    adapters: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    keys: str | None = None
    open: bool = False
    base_id: str | None = None
    dtype: str = "float32"
    quantize: str | None = None
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    bank: BankOptions = dataclasses.field(default_factory=BankOptions)
    slots: int | None = None
    memory: int | None = None
    reserve: float = 0.1
    limits: Limits = dataclasses.field(default_factory=Limits)
    tenant_figures: bool = False


def read_access(launch: Launch, environment: Mapping[str, str]) -> tuple[Keyring, list[str]]:
    """The keys of a server, and what its operator should know of them.

    Raises:
      InputError: for keys that cannot be read, or none at all where others reach the server.
    """
    notes = []
    file = None if launch.keys is None else Path(launch.keys)
    keyring = read_keys(file, environment)
    if file is not None and stat.S_IMODE(os.stat(file).st_mode) & 0o077:
        notes.append(f"others on this machine may read {file}; chmod 600 {file}")
    if not len(keyring):
        if not is_loopback(launch.host) and not launch.open:
            raise InputError(
                f"anybody who reaches {launch.host} could ask; give --keys or set {KEYS_VARIABLE}, "
                "or say --open to mean it"
            )
        notes.append("there are no keys: whoever reaches the server may ask")
    elif not any(key.models for key in keyring.keys):
        notes.append(f"no key may use any model; give --keys or set {KEYS_VARIABLE}")
    if not any(key.admin for key in keyring.keys):
        notes.append(f"adapters cannot be loaded at run time: no administrator ({ADMIN_VARIABLE})")
    return keyring, notes


def plan(launch: Launch) -> tuple[MemoryPlan, dict[str, str]]:
    """The account of a server's memory, and why adapters were refused, by name.

    Reads the base's outline and the adapters' cards, and allocates nothing on the device.

    Raises:
      InputError: for anything that cannot be used, or if the server does not fit.
    """
    outline = outline_base(launch.base, launch.dtype, quantize=launch.quantize)
    if launch.engine.length > outline.config.max_positions:
        raise InputError(
            f"length = {launch.engine.length} is over the {outline.config.max_positions} positions "
            f"of {outline.config.name}; take --length={outline.config.max_positions} or less"
        )
    bank = TenantBank(outline.sites, _bank_options(launch, 1))
    refused = _register(bank, launch)
    found = plan_memory(
        outline.config,
        launch.dtype,
        launch.quantize,
        bank,
        launch.engine,
        memory=launch.memory if launch.memory is not None else device_memory(),
        reserve=launch.reserve,
        slots=launch.slots,
    )
    return found, refused


def serve(
    launch: Launch, environment: Mapping[str, str], say: Callable[[str], None] = print
) -> bool:
    """Runs a server until it is told to end; in the main thread, which gets the signals.

    Args:
      launch: what to serve.
      environment: where keys may be.
      say: takes lines for the operator.

    Returns:
      Whether all that was accepted has been answered.

    Raises:
      InputError: for anything that cannot be used.
    """
    keyring, notes = read_access(launch, environment)
    # Before the base is read: whether the port is free shows at once.
    listening = listen(launch.host, launch.port)
    with listening:
        memory, _ = plan(launch)
        say("\n".join(memory.lines))
        say(f"loading {launch.base}")
        base = load_base(launch.base, launch.dtype, quantize=launch.quantize)
        service, refused = build_service(launch, base, keyring, memory.slots)
        notes += [f"the adapter {name} is refused: {why}" for name, why in refused.items()]
        for note in notes:
            say(f"note: {note}")
        server = Server(service, service.engine, listening)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)
        say("compiling; until that is done, requests are answered 503")
        try:
            done = server.run_until_told(lambda: say(describe(service, server)))
        finally:
            service.engine.bank.close()
        if service.state == "starting":
            # Told to end while it compiled: that cannot be interrupted, nor outlive Python.
            sys.stderr.flush()
            os._exit(0)
        return done


def build_service(
    launch: Launch, base: Base, keyring: Keyring, slots: int
) -> tuple[Service, dict[str, str]]:
    """The engine with its bank, and what the server knows besides.

    Returns:
      The service, and why adapters were refused, by name.

    Raises:
      InputError: for names that clash or sizes that do not fit.
    """
    bank = TenantBank(base, _bank_options(launch, slots))
    refused = _register(bank, launch)
    engine = Engine(base, bank, launch.engine)
    metrics = Metrics(engine.summary, tenants=launch.tenant_figures)
    engine.observe(metrics)
    service = Service(
        engine,
        launch.base_id or _base_id(launch.base),
        keyring,
        launch.limits,
        metrics,
        [Path(folder) for folder in launch.adapters],
        called_by(launch, keyring),
    )
    return service, refused


def called_by(launch: Launch, keyring: Keyring) -> frozenset[str] | None:
    """The names that a server answers to, lower-cased; None for any.

    Without keys, a page of the web whose name was made to point to this machine (DNS rebinding)
    could read what is open to all. Where a server is opened to others, as `Launch.open` means it,
    nothing says by which names they call it, and whoever reaches it may ask anyway.
    """
    if len(keyring) or (launch.open and not is_loopback(launch.host)):
        return None
    return frozenset({"localhost", "127.0.0.1", "::1", launch.host.lower()})


def describe(service: Service, server: Server) -> str:
    """What is served, where, and how to ask it."""
    host, port = server.address
    shown = "127.0.0.1" if host in _WILDCARDS else f"[{host}]" if ":" in host else host
    names = service.engine.bank.names
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    options = service.engine.options
    key = ' -H "Authorization: Bearer $KEY"' if len(service.keyring) else ""
    model = names[0] if names else service.base_id
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    return "\n".join(
        [
            f"ready: {service.base_id} and {len(names)} tenants{f' ({some})' if names else ''}, "
            f"{options.rows} rows of {options.length} tokens, "
            f"{in_gib(service.engine.nbytes)} on the device beside the base",
            f"http://{shown}:{port}/ in a browser; http://{shown}:{port}/v1 for OpenAI's clients:",
            f"  curl http://{shown}:{port}/v1/chat/completions{key} "
            "-H 'Content-Type: application/json' \\",
            f"    -d '{json.dumps(body)}'",
        ]
    )


def _bank_options(launch: Launch, slots: int) -> BankOptions:
    cached = max(launch.bank.cached, launch.engine.rows)
    return dataclasses.replace(launch.bank, slots=slots, cached=cached)


def _register(bank: TenantBank, launch: Launch) -> dict[str, str]:
    refused: dict[str, str] = {}
    for folder in launch.adapters:
        refused |= bank.register_folder(folder)
    return refused


def _base_id(base: str) -> str:
    """A name for the API: that of the base, or of its file, with what no name may hold left out."""
    name = base if base in NAMED_BASES else Path(base).resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.removesuffix(".gguf")).strip("-._")[:64] or "base"
