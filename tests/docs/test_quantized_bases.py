"""The code and the numbers of docs/quantized_bases.md."""

import math
import re

import pytest

from mos_jax.models.known import known_config
from mos_jax.models.quantized import BLOCK, SCHEMES
from tests.docs.fixtures_pages import Page

PAGE = Page("quantized_bases")


def test_the_python_runs(tmp_path):
    assert PAGE.has_only("python", "bash")
    assert PAGE.run_python(tmp_path)["base"].quantization == "int8"


@pytest.mark.parametrize("name", ["none", *SCHEMES])
def test_the_table_is_what_the_schemes_say(name):
    (row,) = re.findall(rf"^\| `?{name}`?[,\s].* GB \|.*$", PAGE.text, re.MULTILINE)
    bits, llama, smollm = [cell.strip() for cell in row.split("|")[4:7]]
    expected = SCHEMES[name].bits if name in SCHEMES else 16
    assert float(bits) == expected
    for cell, model, unit in ((llama, "llama2-7b", 1e9), (smollm, "smollm2-135m", 1e6)):
        count = sum(math.prod(shape) for shape in known_config(model).site_shapes().values())
        assert float(cell.split()[0]) == pytest.approx(count * expected / 8 / unit, abs=0.06)
    assert f"{BLOCK} neighbours" in PAGE.text
