"""What may be asked: the bodies of requests, in the form of OpenAI's API.

A field that would change the answer and is not supported is refused by name; one that is null is as
good as absent. Of what has no bearing on the answer (`user`, `metadata`, ...) any value is taken.
"""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mos_jax.serving.requests import MOST_STOPS, MOST_TOP_LOGPROBS

MOST_CHOICES = 16
# Fields of OpenAI's API, and of servers like it, that are refused whatever they say.
UNSUPPORTED = (
    "audio",
    "function_call",
    "functions",
    "guided_json",
    "min_p",
    "min_tokens",
    "name",
    "prediction",
    "reasoning_effort",
    "repetition_penalty",
    "suffix",
    "tool_call_id",
    "tool_calls",
    "verbosity",
    "web_search_options",
)
# The only values that change nothing, of fields that clients send all the same.
NEUTRAL = {
    "echo": "true",
    "frequency_penalty": "another value than 0",
    "logit_bias": "anything but {}",
    "modalities": "anything but text",
    "presence_penalty": "another value than 0",
    "response_format": "anything but text",
    "store": "true",
    "tool_choice": "anything but none and auto",
    "tools": "a list that is not empty",
}

Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Body(BaseModel):
    """An object without unknown fields, whose values have exactly the types that they should.

    What is wrong with one makes a few errors, however large it is: lists stop at their first
    (`fail_fast`), and of unknown fields only the first is told. A body of a megabyte would else
    make a million of them, in the event loop.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.model_fields
        unknown = (n for n, entry in value.items() if entry is not None and n not in known)
        kept = [*(name for name in known if value.get(name) is not None), *islice(unknown, 1)]
        return {name: value[name] for name in kept}


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool = False
    # Against attackers who measure the sizes of packets; there is none.
    include_obfuscation: Literal[False] = False


class TextFormat(Body):
    """The only form of an answer."""

    type: Literal["text"]


class Common(Body):
    """Fields of both kinds of completions."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int | None, Field(ge=1, lt=1 << 31)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=1 << 31, description="0 is all; not of OpenAI's API.")] = 0
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63)] = None
    stop: Stop | Stops | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Taken, and without a bearing on the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Taken only where they change nothing.
    frequency_penalty: Zero = 0.0
    presence_penalty: Zero = 0.0
    logit_bias: Annotated[dict[str, Any] | None, Field(max_length=0)] = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Body):
    """One part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]

    def plain(self) -> dict[str, str]:
        """As a chat template takes it: all text, and no "developer", which is "system"."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Common):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, lt=1 << 31)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_TOP_LOGPROBS)] = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]] | None, Field(fail_fast=True)] = None
    store: Literal[False] = False
    tools: Annotated[list[Any] | None, Field(max_length=0)] = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None


class CompletionBody(Common):
    """Body of `POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)]
    )
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_TOP_LOGPROBS)] = None
    best_of: Annotated[int | None, Field(ge=1, le=MOST_CHOICES)] = None
    echo: Literal[False] = False


class AdapterBody(Body):
    """Body of `POST /v1/adapters`."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    folder: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=1024,
            description="In one of the folders that the server was started with; default: name.",
        ),
    ] = None


FIELDS = frozenset(
    field
    for model in (ChatBody, CompletionBody, AdapterBody, Message, TextPart, StreamOptions)
    for field in model.model_fields
)
