"""The code of docs/peft.md, run from top to bottom, and its tables."""

import json
import re

import pytest

from mos_jax.adapters.methods import METHODS
from mos_jax.interop.peft_fields import KINDS
from mos_jax.interop.peft_native import NATIVE
from mos_jax.interop.vllm import VLLM_RANKS
from tests.experiments.fixtures_programs import ROOT

PAGE = (ROOT / "docs/peft.md").read_text(encoding="utf-8")


def test_the_python_runs(tmp_path, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert PAGE.count("```") == 2 * len(blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(compile("".join(blocks), "docs/peft.md", "exec"), {})
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["mine", "mixed", "mos_as_lora", "padded", "vera"]
    assert (
        json.loads((tmp_path / "vera" / "adapter_config.json").read_text())["peft_type"] == "VERA"
    )
    assert "rank_pattern has" in capsys.readouterr().out


def test_the_table_names_every_method_and_type():
    table = PAGE[PAGE.index("| Method") : PAGE.index("## Out, as a LoRA")]
    named = re.sub(r"[^a-z]", "", table.lower())
    for method in METHODS:
        assert method.replace("_", "") in named
    assert set(re.findall(r"`([A-Z]+)`", table)) == set(NATIVE.values()) == set(KINDS)


def test_the_ranks_are_those_of_the_code():
    text = ", ".join(map(str, VLLM_RANKS[:-1])) + f" or {VLLM_RANKS[-1]}"
    assert text in PAGE
