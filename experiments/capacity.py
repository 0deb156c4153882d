r"""How many tenants fit beside one base, per method, with the arithmetic; no weights are needed.

python experiments/capacity.py --base=llama2-7b --memory=80GiB
python experiments/capacity.py --base=llama3.1-8b --memory=24GB --quantize=nf4 --rows=8 --json
python experiments/capacity.py --base=llama2-7b --memory=80GiB --out=capacity.png

--base is a name in mos_jax/models/known.py. MoS of equivalent rank e and active rank r is compared
with LoRA of the same active rank, and with LoRA of 8 times its budget, which its paper claims it
matches in quality.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mos_jax import app

BASE = flags.DEFINE_string("base", None, "Name of a known model, such as llama2-7b.")
MEMORY = flags.DEFINE_string("memory", None, "Memory of the device: 80GiB, 24GB, ...")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "float32 or bfloat16, of base, cache and tenants.")
QUANTIZE = flags.DEFINE_enum(
    "quantize", "none", ["none", "int8", "nf4"], "How the base's linear layers are held."
)
ROWS = flags.DEFINE_integer("rows", 32, "Requests at a time, rows of the key-value cache.")
TOKENS = flags.DEFINE_integer("tokens", 2048, "Positions of a row in the key-value cache.")
RESERVE = flags.DEFINE_float("reserve", 0.1, "Share of the memory left for everything else.")
EQUIVALENT_RANK = flags.DEFINE_integer("equivalent_rank", 2, "e of MoS.")
RANK = flags.DEFINE_integer("rank", None, "Active rank r of MoS; default 4 e.")
SHARDS = flags.DEFINE_integer("shards_per_vector", 2, "l of MoS.")
CACHED = flags.DEFINE_integer(
    "cached", None, "Tenants of MoS with assembled factors; default one a row; 0 = inside the scan."
)
SITES = flags.DEFINE_multi_string("sites", ["all-linear"], "Adapted sites; again for more.")
JSON = flags.DEFINE_bool("json", False, "Print JSON instead.")
OUT = flags.DEFINE_string("out", None, "PNG file for a picture.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from mos_jax.errors import InputError
    from mos_jax.files import fresh_file, write_file
    from mos_jax.models.known import known_config
    from mos_jax.serving.capacity import Server, capacity, parse_bytes

    if not BASE.value or not MEMORY.value:
        raise InputError("give --base and --memory, for example --base=llama2-7b --memory=80GiB")
    server = Server(
        parse_bytes(MEMORY.value),
        DTYPE.value,
        None if QUANTIZE.value == "none" else QUANTIZE.value,
        ROWS.value,
        TOKENS.value,
        RESERVE.value,
    )
    found = capacity(
        known_config(BASE.value),
        server,
        equivalent_rank=EQUIVALENT_RANK.value,
        rank=RANK.value,
        shards_per_vector=SHARDS.value,
        cached=CACHED.value,
        include=SITES.value,
    )
    print(json.dumps(found.to_dict(), indent=2) if JSON.value else "\n".join(found.lines))
    if OUT.value:
        from mos_jax.reporting.capacity_picture import capacity_picture
        from mos_jax.reporting.style import png_bytes

        payload = png_bytes(capacity_picture(found))
        with fresh_file(Path(OUT.value)) as fresh:
            write_file(fresh, payload)


if __name__ == "__main__":
    app.run(main)
