r"""Serves a base and the adapters of many tenants over HTTP, in the form of OpenAI's API.

python experiments/serve.py --base=smollm2-135m-instruct --adapters=DIR --port=8000
python experiments/serve.py --base=smollm2-135m-instruct --adapters=DIR --memory=4GiB --dry_run
python experiments/serve.py --base=... --adapters=DIR --keys=keys.json --host=0.0.0.0

DIR holds a folder for each adapter, ours or a LoRA of PEFT; its name is the `model` to ask for. The
file of keys is JSON: {"keys": [{"name": "shop", "key": "...", "models": ["shop-*"]}]}, see
docs/serving.md. SIGTERM lets open answers end.
"""

import os
from collections.abc import Sequence

from absl import flags

from mos_jax import app

BASE = flags.DEFINE_string("base", "smollm2-135m-instruct", "Name or path of the base.")
ADAPTERS = flags.DEFINE_multi_string("adapters", [], "Folder of adapter folders; again for more.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is all.")
PORT = flags.DEFINE_integer("port", 8000, "Port; 0 is any that is free.")
KEYS = flags.DEFINE_string("keys", None, "JSON file of keys; also MOS_JAX_API_KEYS.")
OPEN = flags.DEFINE_bool("open", False, "Let anybody in where others reach the host, without keys.")
BASE_ID = flags.DEFINE_string("base_id", None, "The base's name in the API.")
DTYPE = flags.DEFINE_string("dtype", "float32", "float32 or bfloat16, of base and cache.")
QUANTIZE = flags.DEFINE_enum("quantize", "none", ["none", "int8", "nf4"], "How to hold the base.")
ROWS = flags.DEFINE_integer("rows", 8, "Requests that are decoded at a time.")
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of prompt and answer together.")
PREFIX = flags.DEFINE_string("prefix_cache", "0", "Bytes for prompts' beginnings: 256MiB, ...")
SLOTS = flags.DEFINE_integer("slots", None, "Tenants on the device; default: all that fit.")
BANK_DTYPE = flags.DEFINE_string("bank_dtype", "float32", "float32 or bfloat16, of tenants.")
ASSEMBLY = flags.DEFINE_string("assembly", "cached", "cached or inside; see docs/tenants.md.")
CACHED = flags.DEFINE_integer("cached", None, "Tenants with assembled factors; default: rows.")
HOST_CACHE = flags.DEFINE_string("host_cache", "1GiB", "Bytes of tenants kept in host memory.")
FACTOR_RANK = flags.DEFINE_integer("factor_rank", 0, "Rank left for LoRAs that come later.")
MEMORY = flags.DEFINE_string("memory", None, "Bytes to stay within; default: the device's.")
RESERVE = flags.DEFINE_float("reserve", 0.1, "Share of it for programs and activations.")
QUEUE = flags.DEFINE_integer("queue", 1024, "Requests that wait at most.")
TENANT_QUEUE = flags.DEFINE_integer("tenant_queue", 256, "Of these, of one tenant.")
BODY = flags.DEFINE_string("max_body", "1MiB", "Bytes of a request at most.")
PROMPT = flags.DEFINE_integer("max_prompt", 0, "Tokens of a prompt at most; 0: what fits.")
OUTPUT = flags.DEFINE_integer("max_output", 4096, "Tokens of an answer at most.")
TIMEOUT = flags.DEFINE_float("timeout", 600, "Seconds an answer may take, waiting included.")
DRAIN = flags.DEFINE_float("drain", 30, "Seconds that open answers have after SIGTERM.")
TENANT_FIGURES = flags.DEFINE_bool("tenant_metrics", False, "Tenants' names in /metrics.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show where the memory would go, and end.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from mos_jax.errors import InputError
    from mos_jax.serving.capacity import parse_bytes
    from mos_jax.serving.engine_options import EngineOptions
    from mos_jax.serving.options import BankOptions

    try:
        from mos_jax.serving.http.launch import Launch, plan, serve
        from mos_jax.serving.http.options import Limits
        from mos_jax.serving.http.server import log_to_stderr, tell_operator
    except ModuleNotFoundError as error:
        raise InputError(
            f"the server needs {error.name}; install the extra: pip install 'mos_jax[serve]', or "
            "make setup EXTRAS=serve"
        ) from error
    launch = Launch(
        base=BASE.value,
        adapters=tuple(ADAPTERS.value),
        host=HOST.value,
        port=PORT.value,
        keys=KEYS.value,
        open=OPEN.value,
        base_id=BASE_ID.value,
        dtype=DTYPE.value,
        quantize=None if QUANTIZE.value == "none" else QUANTIZE.value,
        engine=EngineOptions(
            rows=ROWS.value,
            length=LENGTH.value,
            prefix_bytes=parse_bytes(PREFIX.value),
            queue=QUEUE.value,
            tenant_queue=TENANT_QUEUE.value,
        ),
        bank=BankOptions(
            dtype=BANK_DTYPE.value,
            assembly=ASSEMBLY.value,
            cached=ROWS.value if CACHED.value is None else CACHED.value,
            host_bytes=parse_bytes(HOST_CACHE.value),
            factor_rank=FACTOR_RANK.value,
        ),
        slots=SLOTS.value,
        memory=None if MEMORY.value is None else parse_bytes(MEMORY.value),
        reserve=RESERVE.value,
        limits=Limits(
            body_bytes=parse_bytes(BODY.value),
            prompt_tokens=PROMPT.value,
            output_tokens=OUTPUT.value,
            timeout=TIMEOUT.value,
            drain_seconds=DRAIN.value,
        ),
        tenant_figures=TENANT_FIGURES.value,
    )
    if DRY_RUN.value:
        found, refused = plan(launch)
        print("\n".join([*found.lines, *(f"refused: {n}: {why}" for n, why in refused.items())]))
        return
    log_to_stderr()
    serve(launch, os.environ, tell_operator)


if __name__ == "__main__":
    app.run(main)
