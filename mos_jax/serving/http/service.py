"""What all routes of the server share: the engine, who may ask it what, and how it is asked."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mos_jax.adapters.bank import BASE_NAME
from mos_jax.data import prompt_text
from mos_jax.errors import InputError
from mos_jax.serving.engine import Engine
from mos_jax.serving.http.answer import Answer
from mos_jax.serving.http.errors import ApiError, no_model, no_right, of_refused
from mos_jax.serving.http.forms import ChatForm, Form, TextForm, TokenTexts
from mos_jax.serving.http.keys import Key, Keyring
from mos_jax.serving.http.metrics import Metrics
from mos_jax.serving.http.options import Limits
from mos_jax.serving.http.running import Running
from mos_jax.serving.http.schemas import MOST_CHOICES, ChatBody, Common, CompletionBody
from mos_jax.serving.kinds import check_tenant_name
from mos_jax.serving.requests import Refused, Request, TokenSampling

# What OpenAI's API generates where a completion names no number.
COMPLETION_TOKENS = 16
State = Literal["starting", "ready", "draining", "failed"]


@dataclasses.dataclass
class Service:
    """One server.

    Attributes:
      engine: what answers.
      base_id: the name by which the base is asked for.
      keyring: who may ask; with no keys, anybody, and nobody is an administrator.
      limits: what one request may cost.
      metrics: figures.
      roots: folders in which adapters may be loaded at run time.
      hosts: names by which the server may be called; None for any.
      state: whether it takes requests.
      started: seconds, by `time.time`.
      connections: how many there are now.
    """

    engine: Engine
    base_id: str
    keyring: Keyring
    limits: Limits
    metrics: Metrics
    roots: Sequence[Path] = ()
    hosts: frozenset[str] | None = None
    state: State = "starting"
    started: float = dataclasses.field(default_factory=time.time)
    connections: Callable[[], int] = lambda: 0

    def __post_init__(self) -> None:
        """Raises InputError if the base has the name of a tenant, or one that no model can have."""
        check_tenant_name(self.base_id)
        if self.base_id in self.engine.bank:
            raise InputError(
                f"the base and a tenant are both called {self.base_id!r}; name the base with "
                "--base_id"
            )
        self.roots = tuple(Path(os.path.realpath(root)) for root in self.roots)
        self.texts = TokenTexts(self.engine.tokenizer)

    @property
    def health(self) -> State:
        """Whether it takes requests; an engine that failed takes none any more."""
        return "failed" if self.engine.failed is not None else self.state

    def check_ready(self) -> None:
        """Raises ApiError, 503, unless it takes requests."""
        if (state := self.health) != "ready":
            word = {"starting": "starting", "draining": "going down"}.get(state, "broken")
            raise ApiError(503, f"the server is {word}", state, headers={"Retry-After": "5"})

    def tenant_of(self, key: Key, model: str) -> str:
        """The engine's name of a model.

        Raises:
          ApiError: 400 for a name that none can have, 403 where the key has no right to it,
            whether it exists or not, and 404 where it does not exist.
        """
        try:
            check_tenant_name(model)
        except InputError as error:
            raise ApiError(400, f"model: {error}", "invalid_model", "model") from error
        if not key.may_use(model):
            raise no_right(model)
        if model == self.base_id:
            return BASE_NAME
        if model not in self.engine.bank:
            raise no_model(model)
        return model

    def models(self, key: Key) -> list[str]:
        """Names of the models that a key may use, the base first."""
        return [name for name in (self.base_id, *self.engine.bank.names) if key.may_use(name)]

    def chat_prompt(self, body: ChatBody) -> tuple[int, ...]:
        """Ids of a conversation and of what opens the answer. Raises ApiError."""
        tokenizer = self.engine.tokenizer
        try:
            text = prompt_text([message.plain() for message in body.messages], tokenizer)
            return self._checked(tokenizer.encode(text), "messages")
        except InputError as error:
            raise ApiError(400, str(error), "invalid_value", "messages") from error

    def completion_prompts(self, body: CompletionBody) -> list[tuple[int, ...]]:
        """Ids of the prompts of a completion. Raises ApiError."""
        given: Any = body.prompt
        one = isinstance(given, str) or isinstance(given[0], int)
        return [self._prompt(prompt) for prompt in ([given] if one else given)]

    def _prompt(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        tokenizer = self.engine.tokenizer
        if isinstance(prompt, str):
            start = tokenizer.text_start
            try:
                ids = tokenizer.encode(prompt if prompt.startswith(start) else start + prompt)
            except InputError as error:
                raise ApiError(400, str(error), "invalid_value", "prompt") from error
            return self._checked(ids, "prompt")
        for token in prompt:
            if token >= tokenizer.vocab_size:
                raise ApiError(
                    400,
                    f"prompt: the token {token} is not below {tokenizer.vocab_size}",
                    "invalid_value",
                    "prompt",
                )
        return self._checked(prompt, "prompt")

    def _checked(self, ids: Sequence[int], field: str) -> tuple[int, ...]:
        most = self.engine.options.length - 1
        most = min(most, self.limits.prompt_tokens or most)
        if not ids:
            raise ApiError(400, f"{field}: there is no text", "invalid_value", field)
        if len(ids) > most:
            raise ApiError(
                400,
                f"{field}: {len(ids)} tokens, and the server takes {most}",
                "context_length_exceeded",
                field,
            )
        return tuple(ids)

    def answer_chat(self, tenant: str, body: ChatBody, prompt: tuple[int, ...]) -> Answer:
        """Starts the answer to a conversation. Raises ApiError."""
        most = body.max_completion_tokens
        if None not in (most, body.max_tokens) and most != body.max_tokens:
            raise ApiError(
                400,
                f"max_tokens {body.max_tokens} and max_completion_tokens {most} differ; give one",
                "invalid_value",
                "max_tokens",
            )
        most = body.max_tokens if most is None else most
        if body.top_logprobs and not body.logprobs:
            raise ApiError(
                400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs"
            )
        room = self.engine.room(len(prompt))
        sampling = self._sampling(
            body,
            self._most(most, min(self.limits.output_tokens, room)),
            (body.top_logprobs or 0) if body.logprobs else None,
        )
        return self._answer(tenant, body, [prompt], sampling, ChatForm)

    def answer_completion(
        self, tenant: str, body: CompletionBody, prompts: Sequence[tuple[int, ...]]
    ) -> Answer:
        """Starts the answer to a completion. Raises ApiError."""
        if body.best_of not in (None, body.n):
            raise ApiError(
                400, "best_of: another value than n is not supported", "unsupported", "best_of"
            )
        if len(prompts) * body.n > MOST_CHOICES:
            raise ApiError(
                400,
                f"{len(prompts)} prompts x n {body.n} are over {MOST_CHOICES} answers",
                "invalid_value",
                "n",
            )
        default = min(COMPLETION_TOKENS, self.limits.output_tokens)
        sampling = self._sampling(body, self._most(body.max_tokens, default), body.logprobs)
        return self._answer(tenant, body, prompts, sampling, TextForm)

    def _most(self, asked: int | None, default: int) -> int:
        if asked is not None and asked > self.limits.output_tokens:
            raise ApiError(
                400,
                f"max_tokens: {asked} is over this server's {self.limits.output_tokens}",
                "invalid_value",
                "max_tokens",
            )
        return default if asked is None else asked

    def _sampling(self, body: Common, most: int, logprobs: int | None) -> TokenSampling:
        try:
            return TokenSampling(
                max_tokens=most,
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=body.top_k,
                stop=body.stops,
                logprobs=logprobs,
            )
        except InputError as error:
            raise ApiError(400, str(error), "invalid_value") from error

    def _answer(
        self,
        tenant: str,
        body: Common,
        prompts: Sequence[tuple[int, ...]],
        sampling: TokenSampling,
        form: type[Form],
    ) -> Answer:
        self.check_ready()
        requests = [
            Request(
                tenant,
                prompt,
                # Each choice with a seed of its own, and the first with the one that was given.
                dataclasses.replace(
                    sampling,
                    seed=None if body.seed is None else (body.seed + choice) % (1 << 32),
                ),
                self.limits.timeout,
            )
            for prompt in prompts
            for choice in range(body.n)
        ]
        try:
            running = Running(self.engine, requests)
        except Refused as refused:
            raise of_refused(refused, body.model, self.wait()) from refused
        except InputError as error:
            raise ApiError(400, str(error), "invalid_value") from error
        return Answer(
            running,
            form(
                body.model,
                self.texts,
                fingerprint=self.engine.base.fingerprint,
                logprobs=sampling.logprobs is not None,
                usage=body.wants_usage,
            ),
            choices=len(requests),
            n=body.n,
            stream=body.stream,
            usage=body.wants_usage,
        )

    def wait(self) -> float:
        """Seconds after which the queue should have moved, from 1 to 60."""
        rate = self.metrics.done_meter.rate()
        return min(max(1.0, self.engine.options.rows / rate if rate else 5.0), 60.0)

    def folder_in_roots(self, given: str) -> Path:
        """The folder of an adapter, which with all that is in it lies in a root, links followed.

        Raises:
          ApiError: for any other, and where there are no roots.
        """
        if not self.roots:
            raise ApiError(403, "the server was started without a folder of adapters", "no_roots")
        inside = False
        for root in self.roots:
            try:
                path = Path(os.path.realpath(root / given))
                if path == root or not path.is_relative_to(root):
                    continue
                inside = True
                if not path.is_dir():
                    continue
                entries = [Path(os.path.realpath(entry)) for entry in path.iterdir()]
            except (OSError, ValueError):  # a name that the system does not take
                continue
            if all(entry.is_relative_to(root) for entry in entries):
                return path
            break
        else:
            if inside:
                raise ApiError(400, "folder: there is no such folder", "not_found", "folder")
        raise ApiError(
            400, "folder: it is not in a folder of the server's adapters", "outside", "folder"
        )

    def load_figures(self, key: Key) -> Mapping[str, Any]:
        """How busy the server is; an administrator sees all."""
        summary = self.engine.summary()
        rows = summary["rows"]
        found = {
            "state": self.health,
            "seconds": round(time.time() - self.started, 1),
            "tokens_per_second": round(self.metrics.tokens_meter.rate(), 2),
            "rows": rows["all"],
            "running": rows["prefill"] + rows["decode"],
            "waiting": summary["queue"]["requests"],
        }
        return {**found, "engine": summary} if key.admin else found
