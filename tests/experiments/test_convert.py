"""convert.py as a user calls it; what it does is tested in tests/conversion."""

import json

import pytest

from mos_jax.adapters.storage import save_adapter
from mos_jax.models.base import load_base
from tests.experiments.fixtures_programs import call
from tests.models.fixtures_decoder import filled_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    base = load_base("tiny-random")
    return save_adapter(
        tmp_path_factory.mktemp("adapters") / "mos",
        filled_adapter(base.sites),
        base_fingerprint=base.fingerprint,
        metadata={"base": "tiny-random"},
    )


def test_it_says_what_it_found_and_how_exact_the_output_is_and_does_not_overwrite(
    adapter, tmp_path
):
    flags = (f"--in={adapter}", f"--out={tmp_path / 'peft'}", "--format=peft")
    out = call("convert", *flags).stdout
    for words in (
        "mos_jax adapter",
        "tiny-random: llama, 2 layers",
        "mos, 4,096 trained parameters",
        "rank 3, all layers",
        f"wrote {tmp_path / 'peft'} (peft)",
        "adapter_model.safetensors",
        "0 over 64 tokens, computed in float32",
    ):
        assert words in out, words
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 16)
    refused = call("convert", *flags, ok=False)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1


def test_a_dry_run_writes_nothing(adapter, tmp_path):
    out = tmp_path / "merged"
    done = call(
        "convert", f"--in={adapter}", f"--out={out}", "--format=merged", "--dtype=bfloat16",
        "--dry_run",
    )  # fmt: skip
    assert f"would write {out} (merged)" in done.stdout
    assert "model.safetensors" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--in is missing"),
        (("--in=a",), "--out is missing"),
        (("--in=a", "--out=b"), "--format is missing"),
        (("--in=a", "--out=b", "--format=pickle"), "unknown --format=pickle"),
        (("--in=a", "--out=b", "--format=peft"), "neither a file, nor a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, words):
    done = call("convert", *flags, ok=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
