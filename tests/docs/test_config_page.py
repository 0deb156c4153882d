"""The page of a config's fields has all of them, with a default and a meaning."""

import dataclasses
import re

from mos_jax.adapters.methods import METHODS
from mos_jax.sweeps.definition import SweepSection
from mos_jax.training.config import RunConfig, default_config
from tests.docs.fixtures_pages import Page
from tools import config_page

ROW = re.compile(r"^\| `([\w.]+)` \| (`[^`]+`|empty) \| ([^|]+) \| ([^|].{10,}) \|$", re.MULTILINE)
ROWS = ROW.findall(Page("reference/config").text)


def test_it_is_what_the_sections_say():
    committed = config_page.PAGE.read_text(encoding="utf-8")
    assert committed == config_page.config_page(), "run `make fields`"


def test_every_field_is_there():
    listed = {name for name, *_ in ROWS}
    config = RunConfig.from_mapping(default_config("lora").to_dict())
    fields = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
    }
    fields |= {f"adapter.{f.name}" for c in METHODS.values() for f in dataclasses.fields(c)}
    fields |= {f"sweep.{field.name}" for field in dataclasses.fields(SweepSection)}
    assert listed == fields


def test_defaults_are_those_of_a_fresh_config():
    config = default_config("mos").to_dict()
    shown = {name: default for name, default, *_ in ROWS if not name.startswith("adapter.")}
    for name in ("base.name", "training.steps", "data.batch_size", "mesh.fsdp", "data.packing"):
        section, _, field = name.partition(".")
        assert shown[name] == f"`{config[section][field]}`"
    assert shown["data.train_path"] == "`None`"
    assert shown["training.start"] == "empty"
