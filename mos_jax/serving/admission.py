"""Who is next: turns between tenants, and slots of the bank for those whose turn comes.

The rule, in which an admission is a request that gets a row:

1. Tenants take turns (`FairQueue`). A request that finds its tenant without others waiting sees at
   most one admission of each tenant that waits already before its own turn has come.
2. The bank is asked for the tenants whose turns come next, so that they are read beside the work.
   One that is being read is passed over, keeps its turn, and is admitted as soon as it is there.
3. One whose slot cannot be had, since all belong to tenants with requests in rows, is passed over
   too, and others go on. Once `patience` requests of its slab have been admitted ahead of it, the
   tenant that has held a slot of that slab longest gets no more turns until it has none in a row;
   its slot then goes to the one that waited. So there is one that gives way for each that has lost
   patience, and all others go on.

So a tenant with one request waits at most for one admission of each tenant before it, `patience`
ahead of its turn, and the end of answers that are in rows by then, which are as long as a row at
most. With at least as many slots as rows and tenants asked for ahead, no tenant waits for a slot.
"""

from __future__ import annotations

from mos_jax.errors import InputError
from mos_jax.serving.fair_queue import FairQueue
from mos_jax.serving.jobs import Job
from mos_jax.serving.slots import SlotsTaken
from mos_jax.serving.tenants import TenantBank


class Admission:
    """Requests that wait, and the uses of the bank of these and of those in rows.

    Attributes:
      queue: those that wait.
    """

    def __init__(self, bank: TenantBank, ahead: int, patience: int):
        """Asks for the next `ahead` tenants; see above for `patience`."""
        self.queue: FairQueue[Job] = FairQueue()
        self._bank, self._ahead, self._patience = bank, ahead, patience
        # Uses by tenant, the one that has been in use longest first, and its slab.
        self._uses: dict[str, int] = {}
        self._slab: dict[str, str] = {}
        # Tenants without a slot to be had, when the bank was asked last, and their slabs.
        self._blocked: dict[str, str] = {}
        # How many of their slab were admitted ahead of them since, by slab and tenant.
        self._passed: dict[str, dict[str, int]] = {}

    @property
    def stuck(self) -> bool:
        """Whether slots are missing and nothing of these requests holds one, but somebody else."""
        return bool(self._blocked) and not self._uses

    @property
    def blocked(self) -> int:
        """Number of tenants whose slot cannot be had."""
        return len(self._blocked)

    def add(self, job: Job) -> None:
        """One more that waits."""
        self.queue.push(job.tenant, job)

    def remove(self, job: Job) -> None:
        """Takes one out, if it still waits; its use remains."""
        if self.queue.remove(job.tenant, job) and job.tenant not in self.queue:
            self._blocked.pop(job.tenant, None)
            self._not_waiting(job)

    def release(self, job: Job) -> None:
        """Ends the use of a job, if it has one."""
        use, job.use = job.use, None
        if use is not None:
            use.release()
            self._uses[job.tenant] -= 1
            if not self._uses[job.tenant]:
                del self._uses[job.tenant], self._slab[job.tenant]

    def ask(self) -> list[tuple[Job, InputError]]:
        """Asks the bank for tenants whose turn comes soon; those that have no hope, and why."""
        failed: list[tuple[Job, InputError]] = []
        giving_way, full, asked = self._giving_way(), set(), 0
        blocked = self._blocked = {}
        # Very many may wait for a slot, so that what is done for each of them is little.
        for tenant, job in self.queue.heads():
            if asked == self._ahead:
                break
            use, slab = job.use, job.slab
            if slab is None or use is not None:
                if use is not None and use.error is not None:
                    failed.append((job, use.error))
                asked += 1
            elif tenant in giving_way or (slab in full and tenant not in self._uses):
                blocked[tenant] = slab
            else:
                try:
                    job.use = self._bank.request(tenant)
                except SlotsTaken:
                    full.add(slab)
                    blocked[tenant] = slab
                except InputError as error:
                    failed.append((job, error))
                else:
                    asked += 1
                    self._uses[tenant] = self._uses.get(tenant, 0) + 1
                    self._slab[tenant] = slab
                    self._not_waiting(job)
        return failed

    def next(self) -> Job | None:
        """Takes out the one whose turn it is: the first whose tenant is ready. None if none is."""
        ahead: list[str] = []
        for tenant, job in self.queue.heads():
            if job.slab is None or (job.use is not None and job.use.ready):
                if job.slab is not None:
                    passed = self._passed.setdefault(job.slab, {})
                    for other in ahead:
                        if self._blocked[other] == job.slab:
                            passed[other] = passed.get(other, 0) + 1
                return self.queue.take(tenant)
            if tenant in self._blocked:
                ahead.append(tenant)
        return None

    def _not_waiting(self, job: Job) -> None:
        if job.slab is not None and job.slab in self._passed:
            self._passed[job.slab].pop(job.tenant, None)

    def _giving_way(self) -> set[str]:
        """Tenants in use that get no more turns: those in use longest, as many as lost patience."""
        missing = {
            slab: sum(
                count >= self._patience and tenant not in self._uses
                for tenant, count in passed.items()
            )
            for slab, passed in self._passed.items()
        }
        chosen = set()
        for tenant in self._uses if any(missing.values()) else ():
            slab = self._slab[tenant]
            if missing.get(slab):
                missing[slab] -= 1
                chosen.add(tenant)
        return chosen
