"""The numbers of docs/serving_on_paper.md are those that its commands print."""

import re
import shlex

from mos_jax import MoSConfig
from mos_jax.models.known import known_config
from mos_jax.serving.roofline import find_device, roofline
from tests.docs.fixtures_pages import Page
from tests.experiments.fixtures_programs import call

PAGE = Page("serving_on_paper")
TEXT = " ".join(PAGE.text.split())


def numbers(text):
    return {n.rstrip(".,") for n in re.findall(r"\d[\d,]*\.?\d*", text)}


def test_the_tables_are_what_the_arithmetic_gives():
    device = find_device("a100-80gb")
    found = roofline(known_config("llama2-7b"), device, MoSConfig(2, 8, 2))
    for form in found.forms:
        cells = [f"{step.tokens_per_second(device):,.0f}" for step in found.steps[form.name]]
        assert f"| {form.name} | {' | '.join(cells)} |" in PAGE.text
    step = found.steps["MoS e=2 r=8, once"][3]
    assert step.rows == 64
    for size in (step.base, step.cache, step.adapters):
        assert f"| {size:,} |" in PAGE.text


def test_the_commands_run_and_say_what_the_page_says():
    first, second = (shlex.split(block) for block in PAGE.blocks("bash"))
    assert first[:2] == second[:2] == ["python", "experiments/roofline.py"]
    printed = numbers(call("roofline", *first[2:]).stdout)
    assert {"18.62", "75", "74.46", "148.93", "1.25", "2.039", "312", "153"} <= printed
    published = call("roofline", *second[2:]).stdout
    section = PAGE.text[PAGE.text.index("## Beside") : PAGE.text.index("The claim behind")]
    said = numbers(re.sub(r"\(https.*?\)", "", section.split("sets these beside")[1]))
    assert said - numbers(published) <= {"2", "80"}  # e and the device, in words
    assert {"148", "250", "1,978", "199", "26.5", "31.4", "28", "5.5", "3.4"} <= said
    assert PAGE.has_only("bash")
