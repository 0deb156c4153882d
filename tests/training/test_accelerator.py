"""The check of an accelerator, with the CPU in its place: what it says, and that it can fail."""

import json

import jax
import numpy as np
import pytest

from mos_jax.errors import InputError
from mos_jax.training import accelerator
from mos_jax.training.accelerator import Compared, compare, find_devices
from mos_jax.training.config import RunConfig
from tests.experiments.fixtures_programs import call


def test_without_an_accelerator_the_program_says_so_and_finds_no_difference(tmp_path):
    out = tmp_path / "deep" / "found.json"
    sizes = ("--rows=1", "--width=16", "--rounds=1")
    done = call("check_accelerator", "--config=configs/smoke.py", *sizes, f"--out={out}")
    assert "no accelerator here" in done.stdout
    found = json.loads(out.read_text())
    assert found["device"] == {"kind": "cpu", "platform": "cpu", "is_cpu": True}
    names = ["logits", "loss", "gradient", "losses", "moments", "decoded"]
    assert [(one["name"], one["dtype"]) for one in found["compared"]] == [
        (name, dtype) for dtype in ("float32", "bfloat16") for name in names
    ]
    assert all(one["difference"] == 0 and one["within"] for one in found["compared"])
    assert found["step"]["tokens_per_second"] > 0
    inside, before = (
        next(cost for name, cost in found["costs"].items() if name.endswith(where))
        for where in ("inside", "before")
    )
    assert inside["flops"] == before["flops"] > 0


def test_a_device_that_computes_otherwise_is_found_out(monkeypatch):
    """Results come from a stand-in, so that only what is made of them is tried."""
    config = RunConfig.from_mapping(
        {"base": {"name": "tiny-random"}, "adapter": {"method": "lora", "rank": 1}}
    )
    calls = []

    def results_on(device, model, *_):
        wrong = 0.01 * len(calls)  # the CPU is asked first
        calls.append(model.attention)
        array = np.ones(3, np.float32)
        found = dict.fromkeys(("loss", "gradient", "losses", "moments"), array)
        return {**found, "logits": array + wrong, "decoded": [[1, 2], [3, len(calls)]]}

    monkeypatch.setattr(accelerator, "results_on", results_on)
    monkeypatch.setattr(accelerator, "TOLERANCES", {"float32": 1e-3})
    cpu = jax.devices("cpu")[0]
    found = {one.name: one for one in compare(config, cpu, cpu)}
    assert found["logits"].difference == pytest.approx(0.01)
    assert found["decoded"].difference == 0.25
    assert [name for name, one in found.items() if not one.within] == ["logits", "decoded"]
    assert not Compared("loss", "float32", "auto", float("nan"), 1e-3).within
    # Beside a device that is not the CPU, both kinds of attention are asked for.
    calls.clear()
    compare(config, object(), cpu)
    assert calls == ["grouped", "grouped", "auto"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("remat", "full"), ("quantize", "int8"), ("attention", "xla"), ("logits_mib", 0.25)],
)
def test_the_base_that_is_timed_and_compared_is_that_of_the_config(monkeypatch, field, value):
    section = {"name": "tiny-random", "dtype": "bfloat16", field: value}
    config = RunConfig.from_mapping({"base": section, "adapter": {"method": "lora", "rank": 1}})
    asked, load = [], accelerator.Loads.base

    def base(self, section, placement=None):
        asked.append(section)
        return load(self, section, placement)

    monkeypatch.setattr(accelerator.Loads, "base", base)
    cpu = jax.devices("cpu")[0]
    accelerator.time_step(config, cpu, 1, 8, 1)
    assert asked == [config.base]
    asked.clear()
    array = np.ones(3, np.float32)
    found = dict.fromkeys(("logits", "loss", "gradient", "losses", "moments"), array)
    monkeypatch.setattr(accelerator, "results_on", lambda *_: {**found, "decoded": [[1]]})
    compare(config, cpu, cpu)
    if field == "attention":
        # The dtype that is not the config's has what its device would choose.
        used = [(one.dtype, one.attention) for one in asked]
        assert used[2:] == [("bfloat16", way) for way in ("grouped", "grouped", "xla")]
        assert {way for _, way in used[:2]} == {"grouped"}
    else:
        assert {getattr(one, field) for one in asked} == {value}
    assert {one.dtype for one in asked} == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("section", "field"), [("training", "accumulation"), ("mesh", "data"), ("mesh", "fsdp")]
)
def test_what_one_device_does_not_do_is_refused(section, field):
    config = RunConfig.from_mapping(
        {"base": {"name": "tiny-random"}, "adapter": {"method": "lora"}, section: {field: 2}}
    )
    cpu = jax.devices("cpu")[0]
    for check in (
        lambda: compare(config, cpu, cpu),
        lambda: accelerator.time_step(config, cpu, 1, 8, 1),
    ):
        with pytest.raises(InputError, match=rf"{section}\.{field} is 2; .* needs 1"):
            check()


def test_a_missing_cpu_is_named(monkeypatch):
    def devices(platform=None):
        if platform == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return ["gpu"]

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(InputError, match="unset JAX_PLATFORMS"):
        find_devices()
