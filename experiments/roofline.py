r"""What a decode step moves and computes on an accelerator, and the most that it can reach.

python experiments/roofline.py --base=llama2-7b --device=a100-80gb
python experiments/roofline.py --base=llama2-7b --device=h100-80gb --rows=16 --rows=256 --json
python experiments/roofline.py --s_lora
python experiments/roofline.py --base=llama2-7b --out=roofline.png

No weights are needed, nothing is run: bytes and operations are counted from sizes, and divided by
the peaks of the device's data sheet. --s_lora prints S-LoRA's published measurement with 2,000
adapters beside what its device would allow.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mos_jax import app

BASE = flags.DEFINE_string("base", "llama2-7b", "Name of a known model.")
DEVICE = flags.DEFINE_string("device", "a100-80gb", "a100-80gb or h100-80gb.")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "float32 or bfloat16, of base, cache and tenants.")
ROWS = flags.DEFINE_multi_integer("rows", [1, 8, 32, 64, 128], "Rows of a step; again for more.")
TOKENS = flags.DEFINE_integer("tokens", 1024, "Positions that each row's query sees.")
TENANTS = flags.DEFINE_integer("tenants", 2000, "Tenants on the device, where fitting is asked.")
RESERVE = flags.DEFINE_float("reserve", 0.1, "Share of the memory left for everything else.")
EQUIVALENT_RANK = flags.DEFINE_integer("equivalent_rank", 2, "e of MoS.")
RANK = flags.DEFINE_integer("rank", 8, "r of MoS, and of LoRA at the same active rank.")
SITES = flags.DEFINE_multi_string("sites", ["all-linear"], "Adapted sites; again for more.")
S_LORA = flags.DEFINE_bool("s_lora", False, "Print the comparison with S-LoRA instead.")
JSON = flags.DEFINE_bool("json", False, "Print JSON instead.")
OUT = flags.DEFINE_string("out", None, "PNG file for a picture.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from mos_jax.adapters.mos import MoSConfig
    from mos_jax.files import fresh_file, write_file
    from mos_jax.models.known import known_config
    from mos_jax.serving.published import compare_s_lora
    from mos_jax.serving.roofline import find_device, roofline

    if S_LORA.value:
        print("\n".join(compare_s_lora()))
        return
    found = roofline(
        known_config(BASE.value),
        find_device(DEVICE.value),
        MoSConfig(EQUIVALENT_RANK.value, RANK.value, shards_per_vector=2),
        rows=ROWS.value,
        tokens=TOKENS.value,
        tenants=TENANTS.value,
        reserve=RESERVE.value,
        include=SITES.value,
        dtype=DTYPE.value,
    )
    print(json.dumps(found.to_dict(), indent=2) if JSON.value else "\n".join(found.lines))
    if OUT.value:
        from mos_jax.reporting.roofline_picture import roofline_picture
        from mos_jax.reporting.style import png_bytes

        payload = png_bytes(roofline_picture(found))
        with fresh_file(Path(OUT.value)) as fresh:
            write_file(fresh, payload)


if __name__ == "__main__":
    app.run(main)
