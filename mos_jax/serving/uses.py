"""One use of a tenant that a bank holds."""

from __future__ import annotations

from collections.abc import Callable

from mos_jax.errors import InputError


class Use:
    """One use of a tenant, from `request` until `release`: it keeps its slot as long.

    Attributes:
      name: the tenant.
      error: why it cannot be used, once that is known.
    """

    def __init__(
        self, is_resident: Callable[[str], bool], release: Callable[[Use], None], name: str
    ):
        """For the bank, which says whether the tenant is there, and is told of the release."""
        self.name = name
        self.error: InputError | None = None
        self._is_resident, self._release, self._released = is_resident, release, False

    @property
    def ready(self) -> bool:
        """Whether the tenant is on the device, so that `for_rows` takes it."""
        return not self._released and self._is_resident(self.name)

    def release(self) -> None:
        """Ends the use; what follows a first call does nothing."""
        if not self._released:
            self._released = True
            self._release(self)
