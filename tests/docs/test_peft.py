"""The code of docs/peft.md, run from top to bottom, and its tables."""

import json
import re
import shlex

from mos_jax.adapters.methods import METHODS
from mos_jax.interop.detect import detect
from mos_jax.interop.peft_fields import KINDS
from mos_jax.interop.peft_native import NATIVE
from mos_jax.interop.vllm import VLLM_RANKS
from tests.docs.fixtures_pages import Page
from tests.experiments.fixtures_programs import call

PAGE = Page("peft")


def test_all_of_it_runs(tmp_path, capsys):
    assert PAGE.has_only("python", "bash")
    PAGE.run_python(tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["mine", "mixed", "mos_as_lora", "padded", "vera"]
    assert (
        json.loads((tmp_path / "vera" / "adapter_config.json").read_text())["peft_type"] == "VERA"
    )
    assert "rank_pattern has" in capsys.readouterr().out

    (text,) = PAGE.blocks("bash")
    for line in text.splitlines():
        python, program, *flags = shlex.split(line)
        assert (python, program) == ("python", "experiments/convert.py")
        call("convert", *(re.sub(r"^--(in|out)=", rf"--\1={tmp_path}/", flag) for flag in flags))
    found = [detect(tmp_path / "out" / name).kind for name in ("lora", "ours", "native")]
    assert found == ["PEFT LORA", "mos_jax adapter", "PEFT VERA"]


def test_the_table_names_every_method_and_type():
    table = PAGE.text[PAGE.text.index("| Method") : PAGE.text.index("## Out, as a LoRA")]
    named = re.sub(r"[^a-z]", "", table.lower())
    for method in METHODS:
        assert method.replace("_", "") in named
    assert set(re.findall(r"`([A-Z]+)`", table)) == set(NATIVE.values()) == set(KINDS)


def test_the_ranks_are_those_of_the_code():
    text = ", ".join(map(str, VLLM_RANKS[:-1])) + f" or {VLLM_RANKS[-1]}"
    assert text in PAGE.text
