"""The command-line programs as a user calls them."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest

from mos_jax.adapters.methods import METHODS
from mos_jax.models.remat import REMAT_POLICIES
from tests.experiments.fixtures_programs import ROOT, call
from tools.program_flags import flags_of, programs


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "smoke"
    flags = ("--config=configs/smoke.py", f"--workdir={workdir}")
    return workdir, flags, call("quickstart", *flags)


def test_quickstart_shows_what_the_readme_promises(quickstart):
    workdir, _, done = quickstart
    out = done.stdout
    for words in (
        "step 1/8",
        "tokens/s",
        "exact match",
        "95% interval",
        "base + mos",
        "always ",
        "LoRA of the same rank, 3",
        "LoRA of the same budget, rank 2",
        "On disk: ",
        "before",
        "after",
        "The adapter is in",
        "Largest logit difference of the export: 0",
        "Try next:",
    ):
        assert words in out, words
    assert f"experiments/generate.py --adapter={workdir}/adapter --compare \\\n" in out
    assert f"experiments/convert.py --in={workdir}/adapter --format=merged \\\n" in out
    for name in ("config.json", "metrics.jsonl", "summary.json", "adapter", "peft", "tensorboard"):
        assert (workdir / name).exists(), name
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["adapter"]["trained_parameters"] == 4096
    assert summary["test"]["adapter"]["examples"] == 8
    assert summary["adapter"]["used_parameters"] <= 4096
    steps = [
        json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 9))


def test_a_second_quickstart_shows_the_result_and_trains_nothing(quickstart):
    workdir, flags, first = quickstart
    before = (workdir / "metrics.jsonl").stat().st_mtime_ns
    again = call("quickstart", *flags).stdout
    assert "step 1/8" not in again
    assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before
    table = first.stdout[first.stdout.index("questions of the test set") :]
    assert (
        table.splitlines()[3:8] == again[again.index("questions of the test") :].splitlines()[3:8]
    )


def test_an_extended_quickstart_exports_the_new_adapter(quickstart, tmp_path):
    workdir, (config, _), _ = quickstart
    longer = tmp_path / "longer"
    shutil.copytree(workdir, longer)
    name = "peft/adapter_model.safetensors"
    call("quickstart", config, f"--workdir={longer}", "--config.training.steps=9")
    assert json.loads((longer / "summary.json").read_text())["steps"] == 9
    assert (longer / name).read_bytes() != (workdir / name).read_bytes()


def test_evaluate_repeats_the_scores_of_the_run(quickstart, tmp_path):
    workdir, _, _ = quickstart
    out = tmp_path / "scores.json"
    call("evaluate", f"--adapter={workdir}/adapter", f"--out={out}")
    found = json.loads(out.read_text())
    summary = json.loads((workdir / "summary.json").read_text())
    assert found["adapter"] == summary["test"]["adapter"]
    other = call("evaluate", f"--adapter={workdir}/adapter", "--task=chain_sum", "--examples=4")
    assert "chain_sum: 4 questions of the test set" in other.stdout


def test_generate_answers_with_and_without_the_adapter(quickstart):
    workdir, _, _ = quickstart
    flags = (f"--adapter={workdir}/adapter", "--prompt=Hello", "--max_new_tokens=4")
    both = call("generate", *flags, "--compare").stdout
    assert both.startswith("[base] ")
    assert "\n[mos] " in both
    alone = call("generate", "--base=tiny-random", "--prompt=Hello", "--max_new_tokens=4")
    assert f"[base] {alone.stdout}" == both[: both.index("[mos]")]


def labelled(output):
    """The labels and the answers, of one line or more, that generate printed."""
    return re.findall(r"^\[(\w+)\] (.*?)(?=^\[\w+\] |\Z)", output, re.DOTALL | re.MULTILINE)


def test_several_adapters_answer_in_one_batch_as_each_does_alone(quickstart):
    workdir, _, _ = quickstart
    prompts = ("--prompt=Hello", "--prompt=What is 2 + 2?", "--max_new_tokens=4")
    ours, exported = f"--adapter={workdir}/adapter", f"--adapter=lora={workdir}/peft"
    found = labelled(call("generate", ours, exported, "--compare", *prompts).stdout)
    assert [label for label, _ in found] == ["base", "mos", "lora"] * 2
    answers = [answer for _, answer in found]
    assert answers[1] == answers[2] != answers[0]
    assert answers[4] == answers[5]
    assert call("generate", ours, *prompts).stdout == answers[1] + answers[4]


def test_own_data_trains_from_a_small_file(tmp_path):
    data = tmp_path / "mine.jsonl"
    lines = [{"prompt": f"What is {i} plus 1?", "completion": str(i + 1)} for i in range(20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = call(
        "train",
        "--config=configs/own_data.py:lora",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.train_path={data}",
        "--config.base.name=tiny-random",
        "--config.training.steps=2",
        "--config.evaluation.max_new_tokens=4",
    )
    assert "jsonl: 2 questions of the test set" in done.stdout
    assert "The adapter is in" in done.stdout


def test_dry_run_prints_parameters_and_memory_and_writes_nothing(tmp_path):
    workdir = tmp_path / "run"
    patterns = '--config.adapter.rank_pattern={"0.self_attn.q_proj": 2}'
    done = call("train", "--config=configs/smoke.py", f"--workdir={workdir}", "--dry_run", patterns)
    for words in ("q_proj", "down_proj", "4,096", "base", "optimizer", "activations", "padding"):
        assert words in done.stdout, words
    ranks = {line.split("│")[1].strip(): line.split("│")[5].strip() for line in _rows(done.stdout)}
    assert (ranks["q_proj"], ranks["down_proj"]) == ("2 to 3", "3")
    assert not workdir.exists()


def _rows(text):
    """The lines of a table that are about a site type."""
    return [line for line in text.splitlines() if "_proj" in line]


SMOKE = ("--config=configs/smoke.py", "--workdir=runs/never")


@pytest.mark.parametrize(
    ("program", "flags", "words"),
    [
        ("train", ("--config.training.stepz=3",), 'Did you mean "steps"'),
        (
            "train",
            ("--config=configs/nope.py",),
            "no config file configs/nope.py; there are",
        ),
        (
            "train",
            (*SMOKE, "--config.training.steps=abc"),
            "steps is an integer, not 'abc'",
        ),
        ("train", (*SMOKE, "--config.training.b1=x"), "training.b1 is a number, not 'x'"),
        ("train", ("--config.training.steps=3", *SMOKE), "put --config=file first"),
        ("train", ("--config=configs/smoke.py:vero",), "'vero'; did you mean 'vera'"),
        ("train", ("--config=configs/own_data.py:mosz",), "'mosz'; did you mean 'mos'"),
        ("train", ("--workdirr=x",), "workdir"),
        ("train", (*SMOKE, "extra"), "unexpected words 'extra'"),
        ("train", (*SMOKE, "--config.base.name=tinyrandom"), "did you mean 'tiny-random'"),
        ("train", (*SMOKE, "--config.data.task=family"), "family_relationships"),
        ("train", (*SMOKE, "--config.sites.include=qproj"), "did you mean 'q_proj'"),
        ("train", (*SMOKE, "--config.adapter.rank=99"), "rank=99"),
        ("train", (*SMOKE, "--config.adapter.rank_pattern=q=9"), "must be a JSON object"),
        ("train", (*SMOKE, "--config.adapter.shards_per_vector=7"), "shards_per_vector=7"),
        ("train", (*SMOKE, "--config.adapter.private_rank=3"), "private_rank=3"),
        ("evaluate", (), "--adapter is missing"),
        ("evaluate", ("--adapter=runs/never/adapter",), "no adapter at runs/never/adapter"),
        ("generate", ("--base=tiny-random",), "--prompt is missing"),
        ("generate", ("--base=x.gguf", "--prompt=a"), "unknown base 'x.gguf'"),
        ("generate", ("--adapter=a=x", "--adapter=a=y", "--prompt=a"), "adapters are called 'a'"),
        ("generate", ("--adapter==x", "--prompt=a"), "name of an adapter must be"),
        ("combine", ("--weights=1",), "--adapter is missing"),
        ("combine", ("--adapter=x", "--weights=1,a", "--out=y"), "must be numbers, got 1,a"),
    ],
)
def test_bad_input_is_one_line_and_status_2(program, flags, words):
    done = call(program, *flags, ok=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert not (ROOT / "runs/never").exists()


@pytest.mark.parametrize("program", [path.stem for path in programs()])
def test_help_is_a_page_to_work_from(program):
    """Says what it does, commands to copy, and of every flag what it is for."""
    done = call(program, "--help")
    assert done.stderr == ""
    about, _, listed = done.stdout.partition("\nflags:\n")
    title, *examples = about.strip().splitlines()
    assert title[0].isupper()
    assert title.rstrip()[-1] in ".;"
    assert any(line.strip().startswith(f"python experiments/{program}.py") for line in examples)
    tree = ast.parse((ROOT / f"experiments/{program}.py").read_text(encoding="utf-8"))
    flags = flags_of(tree)
    shown = dict(re.findall(r"^  --(?:\[no\])?(\w+): ((?:.+\n?)+?)(?=^  --|\Z|^$)", listed, re.M))
    assert {flag.name for flag in flags} | {"compilation_cache"} == set(shown)
    for flag in flags:
        text = " ".join(shown[flag.name].split())
        assert len(flag.text) > 8
        assert flag.text.split()[0] in text


@pytest.mark.parametrize("program", ["train", "quickstart"])
def test_help_of_training_names_every_method_and_where_the_fields_are(program):
    words = " ".join(call(program, "--help").stdout.split())
    (listed,) = re.findall(r"quickstart\.py:lora[^.]*?((?:\w+, )+\w+(?: or |, )\w+)", words)
    assert sorted(re.split(r", | or ", listed)) == sorted(METHODS)
    assert "docs/reference/config.md lists all" in words


def test_help_of_the_planner_names_the_policies_that_a_search_tries():
    words = " ".join(call("plan", "--help").stdout.split())
    default = ",".join(name for name in REMAT_POLICIES if name != "none")
    assert f"Policies of a search. Default: {default}." in words


def test_a_foreign_base_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    done = call("generate", f"--base={path}", "--prompt=a", ok=False)
    assert done.returncode == 2
    assert "model.gguf" in done.stderr


def test_the_library_starts_without_reference_frameworks():
    code = (
        "import sys, mos_jax; "
        "heavy = {'torch', 'transformers', 'peft', 'reasoning_gym', 'orbax', 'grain', "
        "'tensorboardX'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
