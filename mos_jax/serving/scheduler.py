"""Continuous batching: which requests are in which rows, and what each turn of the engine does.

A turn places a tenant that has been read, admits requests to free rows, computes pieces of
prompts, dispatches a decode step of all rows that are past theirs, and only then fetches the step
before: the host's work runs beside the device's. So a row computes one token more after its last,
which is dropped; where the end is known beforehand, at the limit, the row is free a step earlier.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Any

from mos_jax.errors import InputError
from mos_jax.serving.admission import Admission
from mos_jax.serving.engine_options import EngineOptions
from mos_jax.serving.jobs import Job
from mos_jax.serving.observing import LOG, Observers
from mos_jax.serving.requests import Done, Event, Piece, Reason, Refused, TokenInfo
from mos_jax.serving.runner import Runner, Step
from mos_jax.serving.tenants import TenantBank

# Seconds between two looks at a bank whose slots are all held by somebody else than the engine.
STUCK = 0.1
# The longest wait, in seconds; much longer ones are more than a lock can be waited for.
LONGEST_WAIT = 3600.0


class Scheduler:
    """The requests of an engine. One thread calls `turn`; any thread what is marked so.

    Attributes:
      wake: the lock of all that threads share, and what the turning thread waits on.
      open: jobs that have not ended, by id.
      untold: how many were accepted whose listeners have not had their end.
      counts: what has happened so far.
      refusal: why no job is accepted, if none is.
    """

    def __init__(
        self,
        runner: Runner,
        bank: TenantBank,
        options: EngineOptions,
        stop: int,
        emit: Callable[[Job, Event], None],
        observers: Observers,
    ):
        """Without requests.

        Args:
          runner: whose rows are used.
          bank: where the tenants are.
          options: limits.
          stop: the token that ends an answer.
          emit: takes an event to the listener of a job, at once.
          observers: who is told.
        """
        self.wake = threading.Condition()
        self.counts: collections.Counter[str] = collections.Counter()
        self.refusal: Refused | None = None
        self.open: dict[str, Job] = {}
        self.untold = self._entering = 0
        self._of_tenant: collections.Counter[str] = collections.Counter()
        self._leaving: set[str] = set()
        self._runner, self._bank, self._options = runner, bank, options
        self._stop, self._emit, self._observers = stop, emit, observers
        self._admission = Admission(bank, ahead=runner.rows, patience=runner.rows)
        self._rows = list(reversed(range(runner.rows)))
        self._prefilling: collections.deque[Job] = collections.deque()
        self._decoding: dict[int, Job] = {}
        self._flying: tuple[Step, dict[int, Job]] | None = None
        self._cancelled: list[Job] = []
        self._next_deadline: float | None = None
        # Whether anything has happened that may let a request go on; tenants read, not placed.
        self._news, self._read = False, 0
        self._ending = False
        self._turned: float | None = None

    # Any thread.

    def add(self, job: Job) -> None:
        """Accepts a job. Raises Refused."""
        with self.wake:
            queue, options = self._admission.queue, self._options
            if self.refusal is not None:
                raise Refused(self.refusal.code, str(self.refusal))
            if job.tenant in self._leaving:
                raise Refused("unknown_tenant", f"no tenant {job.tenant!r}: it is being unloaded")
            if len(queue) + self._entering >= options.queue:
                raise Refused(
                    "queue_full", f"{options.queue} requests wait already; try again later"
                )
            if queue.waiting(job.tenant) >= options.tenant_queue:
                raise Refused(
                    "queue_full",
                    f"{options.tenant_queue} requests of {job.tenant!r} wait already; try again "
                    "when some have been answered",
                )
            self.open[job.id] = job
            self._of_tenant[job.tenant] += 1
            self.untold += 1
            self.counts["accepted"] += 1
            self._entering += 1
        # Before it can get anywhere, so that nothing is told of it earlier; and not with the lock.
        self._observers.tell(lambda each: each.accepted(job.request))
        with self.wake:
            self._entering -= 1
            if job.id in self.open:
                self._admission.add(job)
                if job.deadline is not None:
                    self._next_deadline = min(job.deadline, self._next_deadline or job.deadline)
                self._tell()

    def told(self, job: Job) -> None:
        """The listener of a job has had its end."""
        with self.wake:
            self.untold -= 1
            self.wake.notify_all()

    def cancel(self, job: Job) -> None:
        """Has a job end, whatever it is at; nothing if it has ended."""
        with self.wake:
            if not job.ended:
                self._cancelled.append(job)
                self._tell()

    def count_refused(self, code: str) -> None:
        """Counts a request that was refused."""
        with self.wake:
            self.counts[f"refused_{code}"] += 1

    def tenant_read(self) -> None:
        """The bank has a tenant to be placed."""
        with self.wake:
            self._read += 1
            self._tell()

    def end(self) -> None:
        """Has the next turn cancel all jobs and be the last."""
        with self.wake:
            self._ending = True
            self._tell()

    def leave(self, tenant: str) -> None:
        """Has a tenant forgotten when its last job has ended; accepts no more of it.

        Raises:
          InputError: if it is unknown.
        """
        with self.wake:
            if tenant not in self._bank or tenant in self._leaving:
                raise InputError(f"no tenant {tenant!r}")
            self._leaving.add(tenant)
            self._tell()

    def is_leaving(self, tenant: str) -> bool:
        """Whether a tenant is to be forgotten and is still there."""
        with self.wake:
            return tenant in self._leaving

    def summary(self) -> dict[str, Any]:
        """What there is now, as JSON values."""
        with self.wake:
            queue, since = self._admission.queue, self._turned
            return {
                "turn_seconds": 0.0 if since is None else round(time.monotonic() - since, 3),
                "open": len(self.open),
                "untold": self.untold,
                "queue": {
                    "requests": len(queue),
                    "limit": self._options.queue,
                    "tenants": queue.tenants,
                    "without_slot": self._admission.blocked,
                },
                "rows": {
                    "all": self._runner.rows,
                    "prefill": len(self._prefilling),
                    "decode": len(self._decoding),
                },
                "leaving": sorted(self._leaving),
                "counts": dict(self.counts),
            }

    def _tell(self) -> None:
        self._news = True
        self.wake.notify_all()

    # The turning thread.

    def turn(self) -> bool:
        """Waits until there is something to do, and does one turn. False after the last."""
        with self.wake:
            self._turned = None
            self._wait()
            self._turned = time.monotonic()
            cancelled, self._cancelled = self._cancelled, []
            news, self._news = self._news or self._read > 0, False  # a read one may have its turn
            self._read = max(0, self._read - 1)
            ending = self._ending
        if ending:
            self.end_all("cancelled")
            return False
        for job in cancelled:
            self._end(job, "cancelled")
        self._expire()
        self._bank.poll(limit=1)
        if news:
            self._admit()
        self._prefill()
        flying = self._dispatch()
        if self._flying is not None:
            self._land(*self._flying)
        self._flying = flying
        self.settle()
        return True

    def end_all(self, reason: Reason, error: str | None = None, detail: str | None = None) -> None:
        """Ends every open job; for an error, without a call of the runner, which may be broken."""
        for job in list(self.open.values()):
            self._end(job, reason, error, detail)

    def settle(self) -> None:
        """Forgets the tenants that were to leave and have no jobs any more."""
        with self.wake:
            ready = [tenant for tenant in self._leaving if not self._of_tenant[tenant]]
        for tenant in ready:
            try:
                if tenant in self._bank:
                    self._bank.remove(tenant)
            except InputError:  # it is still being read, or somebody else uses it
                continue
            self._runner.forget(tenant)
            with self.wake:
                self._leaving.discard(tenant)
                self.wake.notify_all()

    def _wait(self) -> None:
        while not (self._news or self._read or self._prefilling or self._decoding or self._flying):
            limits = [LONGEST_WAIT]
            if self._next_deadline is not None:
                limits.append(max(0.0, self._next_deadline - time.monotonic()))
            if self._admission.stuck:
                limits.append(STUCK)
            if not self.wake.wait(min(limits)):
                self._news = True
                return

    def _expire(self) -> None:
        now = time.monotonic()
        with self.wake:
            if self._next_deadline is None or now < self._next_deadline:
                return
            timed = [(job.deadline, job) for job in self.open.values() if job.deadline is not None]
            late = [job for deadline, job in timed if deadline <= now]
            self._next_deadline = min((d for d, _ in timed if d > now), default=None)
        for job in late:
            self._end(job, "timeout")

    def _admit(self) -> None:
        while True:
            with self.wake:
                failed = self._admission.ask()
                job = self._admission.next() if self._rows and not failed else None
            for broken, error in failed:
                self._end_broken(broken, f"tenant {broken.tenant!r} cannot be loaded", error)
            if job is not None:
                self._start(job)
            elif not failed:
                return

    def _start(self, job: Job) -> None:
        row = self._rows.pop()
        try:
            job.cached = self._runner.start(row, job.request.prompt, job.tenant, job.sampling)
        except InputError as error:  # of this request alone
            self._rows.append(row)
            self._end_broken(job, "the request cannot be computed", error)
            return
        job.row, job.prefilled = row, job.cached
        self.counts["admitted"] += 1
        self._prefilling.append(job)

    def _prefill(self) -> None:
        """Pieces of prompts in turn, one of each row, as many as the budget has room for."""
        pieces = self._options.pieces
        # A piece makes each answer pause once, whenever it comes; a row that waits makes every step
        # poorer. So those that wait go first as far as they outnumber those that would pause.
        outnumbered = max(1, len(self._prefilling) // max(1, len(self._decoding)))
        budget, spent = self._options.prefill or outnumbered * pieces[-1], 0
        while self._prefilling:
            job = self._prefilling[0]
            left = len(job.request.prompt) - 1 - job.prefilled
            size = next((piece for piece in pieces if piece >= left), pieces[-1]) if left > 0 else 0
            if spent and spent + size > budget:
                return
            assert job.row is not None
            if self._runner.prefill(job.row):
                self._decoding[job.row] = job
                self._prefilling.popleft()
            else:
                self._prefilling.rotate(-1)
            job.prefilled += size
            spent += size
            self.counts["pieces"] += size > 0

    def _dispatch(self) -> tuple[Step, dict[int, Job]] | None:
        if not self._decoding:
            return None
        jobs = dict(self._decoding)
        step = self._runner.decode()
        self.counts["steps"] += 1
        for job in jobs.values():
            job.dispatched += 1
            if job.dispatched == job.limit:
                self._leave_row(job)
        return step, jobs

    def _land(self, step: Step, jobs: dict[int, Job]) -> None:
        for row, info in step.fetch():
            job = jobs.get(row)
            if job is not None and not job.ended:
                self._take(job, info)

    def _take(self, job: Job, info: TokenInfo) -> None:
        """One more token of a job."""
        now, first = time.monotonic(), job.generated == 0
        job.generated += 1
        job.unsent.append(info)
        self.counts["tokens"] += 1
        if first:
            self._observers.tell(lambda each: each.first_token(job.request, now - job.accepted))
        else:
            self._observers.tell(lambda each: each.tokens(job.request, 1, now - job.heard))
        job.heard = now
        if info.token == self._stop and not job.sampling.ignore_eos:
            self._end(job, "stop")
            return
        text = job.text.push(info.token)
        if text:
            self._emit(job, Piece(text, tuple(job.unsent)))
            job.unsent.clear()
        if job.text.stopped:
            self._end(job, "stop")
        elif job.generated == job.limit:
            self._end(job, "length")

    def _end(
        self, job: Job, reason: Reason, error: str | None = None, detail: str | None = None
    ) -> None:
        if job.id not in self.open:
            return
        job.ended = True
        with self.wake:
            self._admission.remove(job)
        self._leave_row(job, broken=reason == "error")
        rest = job.text.finish()
        if job.text.stopped and reason == "length":
            reason = "stop"
        if rest or job.unsent:
            self._emit(job, Piece(rest, tuple(job.unsent)))
        done = Done(
            reason, len(job.request.prompt), job.generated, job.cached, error=error, detail=detail
        )
        with self.wake:
            del self.open[job.id]
            self._of_tenant[job.tenant] -= 1
            if not self._of_tenant[job.tenant]:
                del self._of_tenant[job.tenant]
            self.counts[f"done_{reason}"] += 1
            self._tell()
        seconds = time.monotonic() - job.accepted
        self._observers.tell(lambda each: each.done(job.request, done, seconds))
        self._emit(job, done)

    def _end_broken(self, job: Job, error: str, detail: InputError) -> None:
        """Ends a job for an error of its own."""
        LOG.warning("request %s of %r: %s: %s", job.id, job.tenant, error, detail)
        self._end(job, "error", error, str(detail))

    def _leave_row(self, job: Job, broken: bool = False) -> None:
        """Frees a job's row and then its tenant's slot, as far as it has them."""
        # What is known of the job comes first: if a call fails, it is ended once more, as broken.
        row, job.row = job.row, None
        if row is not None:
            if self._decoding.pop(row, None) is None:
                self._prefilling.remove(job)
            self._rows.append(row)
            if not broken:
                self._runner.free(row)
        with self.wake:
            self._admission.release(job)
            self._tell()
