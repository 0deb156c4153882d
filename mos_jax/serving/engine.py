"""The serving engine: requests of any tenants of one base, answered side by side."""

from __future__ import annotations

import dataclasses
import operator
import os
import secrets
import threading
import time
import traceback
import uuid
from types import TracebackType
from typing import Any, Self

from mos_jax.adapters.adapter import require_positive
from mos_jax.adapters.bank import BASE_NAME
from mos_jax.errors import InputError
from mos_jax.models.base import Base
from mos_jax.serving.answer_text import AnswerText
from mos_jax.serving.delivery import Delivery
from mos_jax.serving.engine_options import EngineOptions
from mos_jax.serving.jobs import Job
from mos_jax.serving.observing import LOG, Observer, Observers
from mos_jax.serving.requests import Listener, Refused, Request
from mos_jax.serving.runner import Runner
from mos_jax.serving.scheduler import Scheduler
from mos_jax.serving.tenants import TenantBank
from mos_jax.serving.tickets import Answer, Stream, Ticket


class Engine:
    """Answers requests for any tenants of a bank, and for the base alone.

    `start` it, `submit` requests from any threads, `close` it; or use it in a `with`. A thread of
    its own does the work, and another tells the listeners.

    All memory of the device is allocated when it is made and started: what is accepted has a row
    and a slot to wait for, and cannot run out of memory. Every accepted request gets exactly one
    `Done`, whatever happens. Tokens of a request are a function of the weights, its prompt and
    its sampling with its seed; neither other requests nor the load change them.

    Attributes:
      base: the base.
      bank: its tenants; they may be registered in it directly as well as by `load`.
      options: sizes and limits.
      tokenizer: of the base.
    """

    def __init__(
        self,
        base: Base,
        bank: TenantBank,
        options: EngineOptions | None = None,
        *,
        runner: Runner | None = None,
    ):
        """Allocates rows.

        Args:
          base: on one device.
          bank: of tenants of this base; no other thread may `poll` it from `start` to `close`.
          options: default `EngineOptions()`.
          runner: what computes; default a `Runner` with these options.

        Raises:
          InputError: as `Runner`.
        """
        self.base, self.bank, self.tokenizer = base, bank, base.tokenizer
        self.options = options if options is not None else EngineOptions()
        self._runner = runner if runner is not None else Runner(base, bank, self.options)
        self._observers = Observers()
        self._delivery = Delivery()
        self._scheduler = Scheduler(
            self._runner,
            bank,
            self.options,
            base.tokenizer.end_of_turn,
            self._delivery.put,
            self._observers,
        )
        self._wake = self._scheduler.wake
        self._scheduler.refusal = Refused("closing", "the engine has not been started")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._state = "new"
        self._error: BaseException | None = None

    # Its life.

    def start(self) -> None:
        """Compiles all programs, and starts to accept requests.

        Raises:
          InputError: if it was started before.
          Exception: what the runner raises.
        """
        with self._wake:
            if self._state != "new":
                raise InputError("an engine is started once; make a new one")
            self._state = "starting"
        self.bank.open()
        self.bank.on_read(self._scheduler.tenant_read)
        self._delivery.start(self._scheduler.cancel, self._scheduler.told)
        self._thread.start()
        with self._wake:
            self._wake.wait_for(lambda: self._state != "starting")
        if self._error is not None:
            raise self._error

    def drain(self, timeout: float) -> bool:
        """Accepts no more requests, and waits for those that were; `close` it then.

        Args:
          timeout: seconds to wait at most.

        Returns:
          Whether all have ended, and their listeners have been told.
        """
        with self._wake:
            if self._scheduler.refusal is None:
                self._scheduler.refusal = Refused("closing", "the server is shutting down")
            return self._wake.wait_for(lambda: not self._scheduler.untold, timeout)

    def close(self) -> None:
        """Ends what is open with `Done("cancelled")`, and the threads; the bank stays as it is.

        Returns when all listeners have been told, or after some seconds if one of them blocks.
        """
        with self._wake:
            started, self._state = self._thread.is_alive(), "closed"
            self._scheduler.refusal = Refused("closing", "the engine is closed")
        self._scheduler.end()
        if started and self._thread is not threading.current_thread():
            self._thread.join()
        self._delivery.join()
        self.bank.on_read(None)

    def __enter__(self) -> Self:
        """Starts it."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()

    @property
    def alive(self) -> bool:
        """Whether it works: started, neither closed nor `failed`."""
        return self._state == "running"

    @property
    def failed(self) -> str | None:
        """What ended it, for the operator; None if nothing did."""
        return None if self._error is None else f"{type(self._error).__name__}: {self._error}"

    # Requests.

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Accepts a request; from any thread, without waiting for anything.

        Args:
          request: what to answer. A `max_tokens` beyond the row's end is cut: the answer then ends
            with the reason "length" where the row is full, see `room`.
          listener: is told what comes, and last the `Done`, see `Listener`.

        Raises:
          Refused: for an unknown tenant, a prompt that leaves no room in a row, a full queue, or an
            engine that accepts nothing.
          InputError: for an empty prompt, ids outside the vocabulary, or a timeout that is none.
        """
        try:
            job = self._job(request, listener)
            self._scheduler.add(job)
        except InputError as error:
            code = error.code if isinstance(error, Refused) else "invalid"
            self._scheduler.count_refused(code)
            self._observers.tell(lambda observer: observer.refused(code))
            raise
        return Ticket(job, self._scheduler.cancel, self._delivery.abandon)

    def room(self, prompt_tokens: int) -> int:
        """How many tokens an answer to a prompt of so many can have, 0 or less for none."""
        return self._runner.length - prompt_tokens

    def stream(self, request: Request) -> Stream:
        """The pieces of an answer as they come, and last its `Done`.

        Raises:
          InputError: as `submit`.
        """
        stream = Stream()
        stream.ticket = self.submit(request, stream.listen)
        return stream

    def complete(self, request: Request) -> Answer:
        """Waits for a whole answer. Look at its `done.reason`: it may be "error".

        Raises:
          InputError: as `submit`.
        """
        return self.stream(request).answer()

    # Tenants.

    def load(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Makes a tenant known, as `TenantBank.register` does; from any thread.

        Once the engine is started, its arrays are read and checked as well, in the calling thread.

        Raises:
          InputError: for what cannot be a tenant; or if one of this name is being unloaded.
        """
        if self._scheduler.is_leaving(name):
            raise InputError(
                f"tenant {name!r} is being unloaded; try again when its requests have ended"
            )
        self.bank.register(name, folder, read=self._state == "running")

    def unload(self, name: str, wait: float = 2.0) -> bool:
        """Forgets a tenant, with its cached prefixes; its folder stays. From any thread.

        From now on requests for it are refused. Those that were accepted are answered first.

        Args:
          name: the tenant.
          wait: seconds to wait for that at most.

        Returns:
          Whether it is gone; if not, it will be when its last request has ended.

        Raises:
          InputError: if it is unknown.
        """
        self._scheduler.leave(name)
        if not self._thread.is_alive():
            self._scheduler.settle()
        with self._wake:
            return self._wake.wait_for(lambda: not self._scheduler.is_leaving(name), wait)

    # What it does.

    def observe(self, observer: Observer) -> None:
        """Has an observer told what happens from now on."""
        self._observers.add(observer)

    @property
    def nbytes(self) -> int:
        """Bytes on the device of rows and bank; constant once it is started."""
        return self._runner.nbytes + self.bank.nbytes

    def summary(self) -> dict[str, Any]:
        """State, sizes and counts as JSON values; from any thread."""
        return {
            "state": self._state,
            "alive": self.alive,
            "failed": self.failed,
            "events_waiting": self._delivery.backlog,
            "bytes": self.nbytes,
            **self._scheduler.summary(),
            "bank": self.bank.summary(),
            "runner": self._runner.summary(),
        }

    # Within.

    def _job(self, request: Request, listener: Listener) -> Job:
        tenant = request.tenant
        if not isinstance(tenant, str) or (tenant != BASE_NAME and tenant not in self.bank):
            raise Refused("unknown_tenant", f"no tenant {tenant!r}")
        slab = None if tenant == BASE_NAME else self.bank.slab_of(tenant)
        if not len(request.prompt):
            raise InputError("the prompt is empty; give at least one token")
        room = self.room(len(request.prompt))
        if room < 1:
            raise Refused(
                "too_long",
                f"a prompt of {len(request.prompt)} tokens does not fit: prompt and answer "
                f"together have at most {self._runner.length} tokens",
            )
        try:
            prompt = tuple(map(operator.index, request.prompt))
        except TypeError:
            raise InputError("the prompt must be token ids, as integers") from None
        vocabulary = self.base.config.vocab_size
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise InputError(f"the prompt holds a token id outside 0..{vocabulary - 1}")
        if request.timeout is not None:
            require_positive("request", "timeout", request.timeout)
        sampling = request.sampling
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(32)
        now = time.monotonic()
        return Job(
            id=uuid.uuid4().hex,
            request=dataclasses.replace(request, prompt=prompt),
            seed=seed,
            sampling=dataclasses.replace(sampling, seed=seed),
            listener=listener,
            slab=slab,
            limit=min(sampling.max_tokens, room),
            text=AnswerText(self.tokenizer, sampling.stop, prompt),
            accepted=now,
            deadline=None if request.timeout is None else now + request.timeout,
        )

    def _run(self) -> None:
        try:
            self._runner.warm_up()
            with self._wake:
                if self._state == "starting":
                    self._state, self._scheduler.refusal = "running", None
                self._wake.notify_all()
            while self._scheduler.turn():
                pass
        except BaseException as error:
            self._fail(error)
        finally:
            self._delivery.finish()

    def _fail(self, error: BaseException) -> None:
        LOG.error("the engine failed:\n%s", "".join(traceback.format_exception(error)))
        with self._wake:
            self._error, self._state = error, "failed"
            self._scheduler.refusal = Refused("failed", "the engine has failed; restart the server")
        self._scheduler.end_all("error", "the engine has failed", self.failed)
        with self._wake:
            self._wake.notify_all()
