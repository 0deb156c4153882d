"""Many tenants of one base: known by name, read when they are asked for, on the device while used.

Three tiers: a folder for each tenant on disk; checked arrays of those read latest in host memory;
and slots on the device, of which a tenant in use never loses its own. All but `open` and
`register_folder` costs the same however many tenants are known.

One thread, that of the decoder, calls `poll` and `for_rows`, which change what lies on the device;
any thread may call the rest.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mos_jax.adapters.bank import BASE_NAME
from mos_jax.adapters.sites import Sites, check_sites
from mos_jax.errors import InputError
from mos_jax.models.base import Base
from mos_jax.serving.assembled import AssembledCache
from mos_jax.serving.kinds import adapter_folders, check_tenant_name, make_kind, read_key
from mos_jax.serving.lanes import FACTORS, KnownKinds, Lane, Tenant, allocate, planned_bytes
from mos_jax.serving.loading import HostTier, Loader
from mos_jax.serving.options import BankOptions
from mos_jax.serving.slabs import Rows, Slab, SummedRows
from mos_jax.serving.uses import Use

# Batches whose factors are remembered; a decoder asks for one again and again.
_REMEMBERED = 64


class TenantBank:
    """Tenants of one base in slots on the device.

    Register tenants, `open` the bank, which allocates all it will ever have, and `request` the
    tenants of a batch. The program that takes what `for_rows` gives is compiled once for each
    number of rows, whatever tenants come and go.
    """

    def __init__(
        self,
        sites: Base | Sites,
        options: BankOptions | None = None,
        *,
        base_fingerprint: str | None = None,
    ):
        """An empty bank.

        Args:
          sites: the base, or all its sites.
          options: sizes; default `BankOptions()`.
          base_fingerprint: of the base, where it is given by its sites.
        """
        if isinstance(sites, Base):
            base_fingerprint = sites.fingerprint
        self.sites = check_sites(sites.sites if isinstance(sites, Base) else sites)
        self.options = options if options is not None else BankOptions()
        self._fingerprint = base_fingerprint
        self._tenants: dict[str, Tenant] = {}
        self._kinds, self._registered = KnownKinds(), itertools.count()
        self._lanes: dict[str, Lane] | None = None
        self._cache: AssembledCache | None = None
        self._loading: dict[str, list[Use]] = {}
        # What `for_rows` gave and would give again, until something changes.
        self._given: dict[tuple[str, ...], Rows | None] = {}
        self._lock = threading.RLock()
        self.host = HostTier(self.options.host_bytes)
        self._loader = Loader(self._read, self.host)
        self.counts = {"requests": 0, "hits": 0, "placed": 0, "failed": 0}

    # What is known.

    def __len__(self) -> int:
        """Number of tenants known."""
        return len(self._tenants)

    def __contains__(self, name: object) -> bool:
        """Whether a tenant is known."""
        return name in self._tenants

    @property
    def names(self) -> tuple[str, ...]:
        """All tenants known, in the order they were registered."""
        return tuple(self._tenants)

    def register(self, name: str, folder: str | os.PathLike[str], read: bool = False) -> None:
        """Makes a tenant known; its arrays are read when it is first asked for.

        Only its card is read, and checked against the base; all is of PEFT, and of the first tenant
        of a kind. What it holds then is what the tenant is: a folder that is changed later is
        refused when it is read again.

        Args:
          name: of the tenant.
          folder: of its adapter.
          read: whether to read and check its arrays at once, too; `open` the bank before.

        Raises:
          InputError: for a name that is malformed or taken, a damaged card, an adapter for another
            base, or, once the bank is open, one that does not fit what was allocated.
        """
        check_tenant_name(name)
        path = Path(folder).resolve()
        try:
            key, digest = read_key(path, self.sites, self._fingerprint)
            kind = self._kinds.get(key) or make_kind(key, path, self.sites, self._fingerprint)
            with self._lock:
                self._check_free(name)
                place = self._kinds.place(name, kind, self._lanes, self.options)
                tenant = Tenant(name, path, *place, digest, next(self._registered))
                if not read:
                    self._enter(tenant)
                    return
            entry = self._read(name, tenant)
        except OSError as error:
            raise InputError(f"{name!r} cannot be read: {error}") from error
        with self._lock:
            self._check_free(name)
            self._enter(tenant)
            self.host.put(name, entry)

    def register_folder(self, folder: str | os.PathLike[str]) -> dict[str, str]:
        """Registers each folder in `folder` under its own name.

        Returns:
          By the name of its folder, why an adapter was refused; the others are registered.

        Raises:
          InputError: if `folder` is none.
        """
        refused = {}
        for path in adapter_folders(folder):
            try:
                self.register(path.name, path)
            except InputError as error:
                refused[path.name] = str(error)
        return refused

    def remove(self, name: str) -> None:
        """Forgets a tenant; its folder stays.

        Raises:
          InputError: if it is unknown, in use or being read.
        """
        with self._lock:
            tenant = self._tenant(name)
            lane = self._lanes[tenant.slab] if self._lanes is not None else None
            if name in self._loading or (lane is not None and lane.slots.pins(name)):
                raise InputError(f"{name!r} is in use; remove it when that has ended")
            del self._tenants[name]
            self._kinds.leave(tenant, is_open=self._lanes is not None)
            self.host.drop(name)
            if lane is not None:
                lane.slots.forget(name)
            if self._cache is not None:
                self._cache.forget(name)

    # What is on the device.

    def open(self) -> None:
        """Allocates slabs for the kinds registered so far. Once; later calls do nothing."""
        with self._lock:
            if self._lanes is not None:
                return
            lanes, self._cache = allocate(self._kinds, self.sites, self.options)
            self._lanes = lanes

    def planned_bytes(self, slots: int) -> int:
        """Bytes that `open` would allocate with so many slots, from shapes alone."""
        options = dataclasses.replace(self.options, slots=slots)
        return planned_bytes(self._kinds, self.sites, options)

    def warm_up(self) -> None:
        """Compiles all that reading and placing tenants of the kinds known will ever run."""
        self.open()
        with self._lock:
            assert self._lanes is not None
            self._given.clear()
            for lane in self._lanes.values():
                lane.warm_up(self._cache)
            held = [tenant for tenant in self._tenants.values() if tenant.slab == FACTORS]
        for tenant in {tenant.kind.key: tenant for tenant in held}.values():
            with suppress(InputError, OSError):  # told when it is asked for
                self._read(tenant.name, tenant)

    def request(self, name: str) -> Use:
        """Asks for a tenant; returns at once.

        Where it is not on the device, it is read beside all else, and a later `poll` places it.
        Its `Use` is then `ready`, or has an `error`. Its slot is its own until `Use.release`.

        Raises:
          InputError: for an unknown tenant; `SlotsTaken`, which is one, if all slots of its slab
            are of tenants in use.
        """
        self.open()
        with self._lock:
            tenant, use = self._tenant(name), Use(self.is_resident, self._release, name)
            slots = self._lane(tenant).slots
            if slots.place_of(name) is None:
                self._loader.check_open()
            slots.pin(name)
            self.counts["requests"] += 1
            if slots.place_of(name) is not None:
                self.counts["hits"] += 1
            elif name in self._loading:
                self._loading[name].append(use)
            else:
                self._loading[name] = [use]
                self._loader.ask(name, tenant)
            return use

    def poll(self, limit: int = 1, timeout: float = 0) -> list[str]:
        """Places tenants that have been read, each with one write into its slot.

        Factors that `for_rows` gave before are gone if it placed any: ask again.

        Args:
          limit: how many at most, so that a decoder's step waits for no more.
          timeout: seconds to wait for the first at most; 0 for none.

        Returns:
          Those that were placed.
        """
        placed: list[str] = []
        for _ in range(limit):
            found = self._loader.take(0 if placed else timeout)
            if found is None:
                break
            tenant, entry, error = found
            with self._lock:
                name = tenant.name
                uses = self._loading.pop(name)
                lane = self._lane(tenant)
                if error is not None:
                    self.counts["failed"] += 1
                    for use in uses:
                        use.error = error
                        use.release()
                elif lane.slots.pins(name):
                    self._given.clear()
                    lane.slab.write(lane.slots.give(name), entry)
                    if self._cache is not None:
                        self._cache.forget(name)
                    self.counts["placed"] += 1
                    placed.append(name)
        return placed

    def on_read(self, call: Callable[[], None] | None) -> None:
        """Has `call` called, in the reading thread, each time one more tenant waits for `poll`."""
        self._loader.tell = call

    @contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """Waits until tenants are on the device, and keeps them there for the block.

        Raises:
          InputError: as `request`, or for a tenant that cannot be read.
        """
        uses: list[Use] = []
        try:
            for name in dict.fromkeys(names):
                if name != BASE_NAME:
                    uses.append(self.request(name))
            while not all(use.ready for use in uses):
                broken = next((use.error for use in uses if use.error is not None), None)
                if broken is not None:
                    raise broken
                self.poll(timeout=1.0)
            yield
        finally:
            for use in uses:
                use.release()

    def for_rows(self, names: Sequence[str]) -> Rows | None:
        """Factors for a batch in which row i uses the tenant `names[i]`.

        Args:
          names: one for each row, of tenants in use and ready; "__base__" for the base alone.

        Returns:
          What `base.model` and `generate` take as factors, until the next `poll` that places one
          or, with a cache, the next `for_rows`. None if the bank has no tenants of any kind.

        Raises:
          InputError: for no rows, or a tenant that is unknown or not ready.
        """
        if isinstance(names, str) or not len(names):
            raise InputError(f"for_rows needs a list of names, one for each row, got {names!r}")
        self.open()
        with self._lock:
            given = tuple(names)
            if given not in self._given:
                if len(self._given) == _REMEMBERED:
                    self._given.clear()
                rows = self._make_rows(names)
                self._given[given] = rows
            return self._given[given]

    def registration(self, name: str) -> int:
        """A number that no other registration of a name has. Raises InputError if unknown."""
        with self._lock:
            return self._tenant(name).number

    def slab_of(self, name: str) -> str:
        """Which slab a tenant lies in, whose slots it shares. Raises InputError if unknown."""
        with self._lock:
            return self._tenant(name).slab

    def is_resident(self, name: str) -> bool:
        """Whether a tenant is on the device. Raises InputError for an unknown one."""
        with self._lock:
            tenant = self._tenant(name)
            return self._lanes is not None and self._lane(tenant).slots.place_of(name) is not None

    def close(self) -> None:
        """Ends the reading thread; what is on the device can still be used."""
        self._loader.close()

    @property
    def nbytes(self) -> int:
        """Bytes on the device, whatever comes and goes; see `loading.STAGED` for what is beside."""
        held = sum(lane.slab.nbytes for lane in (self._lanes or {}).values())
        return held + (self._cache.nbytes if self._cache is not None else 0)

    def summary(self) -> dict[str, Any]:
        """Sizes and counts as JSON values: by slab, and of the tiers."""
        with self._lock:
            return {
                "known": len(self._tenants),
                "bytes": self.nbytes,
                "slabs": [lane.summary() for lane in (self._lanes or {}).values()],
                "cache_bytes": self._cache.nbytes if self._cache is not None else 0,
                "assembled": self._cache.assembled if self._cache is not None else 0,
                "host": {"tenants": len(self.host), "bytes": self.host.nbytes},
                "read": self._loader.read,
                "loading": len(self._loading),
                **self.counts,
            }

    # Within.

    def _read(self, name: str, tenant: Tenant) -> Any:
        """A tenant's slot on the host; runs in the loader's thread."""
        return self._lane(tenant).read(tenant, self.sites, self._fingerprint)

    def _make_rows(self, names: Sequence[str]) -> Rows | None:
        assert self._lanes is not None
        at = {lane: np.zeros(len(names), np.int32) for lane in self._lanes}
        places: dict[str, tuple[Slab, int]] = {}
        for row, name in enumerate(names):
            if name == BASE_NAME:
                continue
            tenant = self._tenant(name)
            lane = self._lane(tenant)
            place = lane.slots.place_of(name)
            if place is None or not lane.slots.pins(name):
                raise InputError(f"{name!r} is not ready; request it and wait for it")
            at[tenant.slab][row] = place
            places[name] = lane.slab, place
        if self._cache is not None:
            before = self._cache.assembled
            rows = self._cache.for_rows(names, places)
            if self._cache.assembled > before:
                self._given.clear()
            return rows
        sources = tuple(lane.slab.rows(at[key]) for key, lane in self._lanes.items())
        return SummedRows(sources) if len(sources) > 1 else next(iter(sources), None)

    def _check_free(self, name: str) -> None:
        if name in self._tenants:
            raise InputError(f"there is a tenant {name!r} already; remove it first")

    def _enter(self, tenant: Tenant) -> None:
        self._tenants[tenant.name] = tenant
        self._kinds.enter(tenant)

    def _tenant(self, name: str) -> Tenant:
        if name not in self._tenants:
            raise InputError(f"no tenant {name!r}")
        return self._tenants[name]

    def _lane(self, tenant: Tenant) -> Lane:
        assert self._lanes is not None
        return self._lanes[tenant.slab]

    def _release(self, use: Use) -> None:
        with self._lock:
            slots = self._lane(self._tenant(use.name)).slots
            slots.unpin(use.name)
            if not slots.pins(use.name):
                self._given.clear()
