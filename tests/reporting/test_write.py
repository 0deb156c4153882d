import json
import re
import shutil

import jax
import numpy as np
import pytest

from mos_jax import InputError, MoSConfig, SiteShape, create_adapter
from mos_jax.analysis.sharing import (
    KINDS,
    Sharing,
    compare_layers,
    usage_counts,
)
from mos_jax.reporting.curves import Curve
from mos_jax.reporting.gallery import change_at_end, draw_pictures
from mos_jax.reporting.results import load_results
from mos_jax.reporting.scores import arm_scores, compare_arms
from mos_jax.reporting.sharing_pictures import gradient_map, usage_map
from mos_jax.reporting.write import (
    SharedRun,
    look_into_sharing,
    memory_reading,
    write_report,
)
from tests.reporting.demo import SMALL, STEPS, STUDY, fill, make_sweep


@pytest.fixture(scope="module")
def sharing():
    sites = {"q_proj": SiteShape(4, 8, 12), "down_proj": SiteShape(4, 8, 4)}
    config = MoSConfig(2, 3, shards_per_vector=2, private_rank=1, pool_scope="width")
    counts = usage_counts(create_adapter(config, sites, jax.random.key(0)))
    random = np.random.default_rng(0)
    parts = {
        path: random.normal(size=(4, len(used), 3)) * (used.T > 0)[:, :, None]
        for path, used in counts.items()
    }
    groups = {path: [path] for path in counts}
    groups |= {kind: [path for path in counts if path.startswith(kind)] for kind in KINDS}
    pulls = {
        name: compare_layers([parts[path] for path in paths], [counts[path] for path in paths])
        for name, paths in groups.items()
    }
    return Sharing((0, 1, 2, 3), counts, pulls, 0.25, 4321)


@pytest.fixture(scope="module")
def written(study, sharing, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    write_report(load_results([study]), out, SharedRun("MoS", 0, sharing))
    return out


def table_below(markdown, heading, place=0):
    """The cells of a table under a heading, as a list of rows without the header."""
    part = markdown.split(f"## {heading}\n")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE)
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in tables[place].splitlines()
    ]
    return rows[2:]


def test_numbers_in_the_markdown_are_those_of_the_runs(written, study):
    markdown = (written / "report.md").read_text()
    rows = {row[0]: row for row in table_below(markdown, "Equal budget: LoRA of rank 2")}
    results = load_results([study])
    for name, row in rows.items():
        scores = np.stack(list(results.arm(name).scores.values()))
        assert row[1] == f"{scores.mean():.3f}"
        low, high = map(float, row[2].split(" to "))
        assert low < scores.mean() < high
    assert rows["MoS"][3:] == [
        "4", "610,560", "1.000", "8", "2,447,240", "2,442,240", "1.10", "123,456,789",
    ]  # fmt: skip
    assert rows["-sp"][3] == "3 of 4"
    assert "LoRA e=8" not in rows
    assert "LoRA e=1" not in rows


def test_arms_off_the_budget_stand_apart(written):
    markdown = (written / "report.md").read_text()
    (other,) = table_below(markdown, "Equal budget: LoRA of rank 2", 1)
    (unequal,) = table_below(markdown, "Equal budget: LoRA of rank 2", 2)
    assert (other[0], other[5]) == ("LoRA e=8", "4.000")
    assert (unequal[0], unequal[3], unequal[5]) == ("LoRA e=1", "2 of 4", "0.500")
    assert markdown.index("**Another budget.**") < markdown.index("**Unequal.**")


def test_differences_in_the_markdown_are_those_by_hand(written, study):
    markdown = (written / "report.md").read_text()
    results = load_results([study])
    base = results.arm("LoRA e=2").scores
    rows = {row[0]: row for row in table_below(markdown, "Against LoRA e=2")}
    assert set(rows) == {arm.name for arm in results.arms} - {"LoRA e=2"}
    for name, row in rows.items():
        arm = results.arm(name).scores
        seeds = sorted(set(arm) & set(base))
        assert row[-1] == str(len(seeds))
        if name == "LoRA e=1":
            assert row[1].startswith("no verdict: only 2 of 4 seeds pair")
            assert row[2:-1] == ["-", "-", "-", "-"]
        else:
            difference = np.mean([arm[seed].mean() - base[seed].mean() for seed in seeds])
            assert row[3] == f"{difference:+.3f}"
            assert "at margin 0.05" in row[2]
    words = markdown.split("## In words")[1].split("\n## ")[0]
    for name in rows:
        assert f"- **{name}**: " in words


def test_missing_and_failed_runs_are_listed(written):
    markdown = (written / "report.md").read_text()
    assert "2 runs failed and 2 runs never finished" in markdown
    assert "-sp (3 of 4 seeds) and LoRA e=1 (2 of 4 seeds)" in markdown
    rows = table_below(markdown, "What is missing")
    assert ["-sp", "final", "3", "2e-3", "missing", ""] in rows
    failed = "`step 3: loss nan, gradient norm inf; stopped`"
    assert ["pure sharing", "tune", "1000", "6e-3", "failed", failed] in rows
    assert "Runs: 50 of 54 finished" in markdown


def test_rates_are_listed_with_what_they_reached(written, study):
    rows = table_below((written / "report.md").read_text(), "Learning rates")
    summary = json.loads((study / "runs/MoS/tune-lr0.002-seed1000/summary.json").read_text())[
        "validation"
    ]
    cells = [f"{summary['loss']:.4f}", f"{summary['accuracy']:.3f}"]
    assert ["MoS", "2e-3", *cells, "1 of 1", "taken"] in rows
    assert ["pure sharing", "6e-3", "-", "-", "0 of 1", ""] in rows


def test_every_picture_is_a_file_in_the_markdown_and_in_the_page(written):
    markdown = (written / "report.md").read_text()
    shown = re.findall(r"^!\[[^\]]+\]\((.+)\)$", markdown, re.MULTILINE)
    assert sorted(shown) == sorted(path.name for path in written.glob("*.png"))
    assert set(shown) == {
        "accuracy-trained_parameters.png", "accuracy-served_bytes.png", "differences-1.png",
        "rates-validation_accuracy.png", "rates-validation_loss.png", "curves-steps.png",
        "curves-each.png", "sharing-usage.png", "sharing-gradients.png",
    }  # fmt: skip
    for name in shown:
        content = (written / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 4000
    page = (written / "report.html").read_text()
    sources = re.findall(r'<img src="([^"]+)"', page)
    assert len(sources) == len(shown)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script|<link", page)
    # Reports are committed, and no file of the tree may be larger.
    assert len(page) < 1 << 20


def test_summary_has_the_statistics_and_the_sharing(written, study):
    summary = json.loads((written / "summary.json").read_text())
    assert summary["runs"] == {"finished": 50, "failed": 2, "missing": 2}
    arm = summary["arms"]["LoRA e=1"]
    assert (arm["seeds"], arm["seeds_planned"], arm["unequal"]) == ([0, 1], 4, True)
    scores = arm_scores(load_results([study]))["LoRA e=1"]
    assert (arm["accuracy"], arm["accuracy_low"]) == (scores.mean, scores.low)
    compared = summary["comparisons"]["LoRA e=2"]
    assert [one["arm"] for one in compared if one["difference"] is None] == ["LoRA e=1"]
    assert summary["commonest_answer_rate"] == 0.125
    assert summary["sharing"]["use"]["pool_a/width_8"]["shards"] == 32
    assert "NaN" not in (written / "summary.json").read_text()
    assert len(json.loads((written / "results.json").read_text())) == 54


def test_no_path_of_this_machine_gets_into_the_report(written, study):
    for file in ("report.md", "report.html", "results.json", "summary.json"):
        assert str(study.parent) not in (written / file).read_text()


def test_a_second_report_removes_pictures_that_are_gone(written, small, tmp_path):
    out = tmp_path / "report"
    shutil.copytree(written, out)
    (out / "notes.png").write_bytes(b"mine")
    write_report(load_results([small]), out)
    assert not (out / "sharing-usage.png").exists()
    assert (out / "accuracy-served_bytes.png").exists()
    assert (out / "notes.png").read_bytes() == b"mine"
    assert "How the layers share" not in (out / "report.md").read_text()


def test_the_memory_probe_shows_recall_and_bits(probe, tmp_path):
    results = load_results([probe])
    write_report(results, tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "512 random pairs of 31.2 bits" in markdown
    assert "commonest answer" not in markdown
    arm = results.arm("MoS")
    bits = arm.curve("validation_bits_recalled").values.mean(axis=0) / 610_560
    row = next(row for row in table_below(markdown, "Memory probe") if row[0] == "MoS")
    assert row[3] == f"{bits[-1]:.3f}"
    assert row[4] == f"{bits[-1] / bits[2] - 1:+.1%}"
    assert row[1] == "not flat: speed of learning"
    pictures = draw_pictures(results, arm_scores(results), {}, None)
    (picture,) = [one for one in pictures if one.name == "memory-steps"]
    recall, per_parameter = picture.figure.axes
    line = next(line for line in per_parameter.lines if line.get_label() == "MoS")
    np.testing.assert_allclose(line.get_ydata(), bits)
    assert recall.get_ylim()[0] == 0


def test_a_curve_is_flat_when_its_last_quarter_adds_little():
    steps = np.array([10, 20, 30, 40])
    assert change_at_end(Curve(steps, np.array([[1.0, 2, 4, 5]]))) == pytest.approx(0.25)
    assert change_at_end(Curve(steps, np.array([[1.0, 2, 4, 4]]))) == 0
    assert change_at_end(Curve(steps[-1:], np.array([[1.0]]))) is None
    assert change_at_end(Curve(steps, np.zeros((1, 4)))) is None


def test_usage_and_gradients_as_pictures(sharing):
    figure = usage_map(sharing)
    shown = [axes for axes in figure.axes if axes.get_visible() and axes.images]
    titles = {axes.get_title(loc="left"): axes for axes in shown}
    assert set(titles) == {"A of width_8", "B of q_proj", "B of down_proj"}
    np.testing.assert_array_equal(
        titles["A of width_8"].images[0].get_array(), sharing.counts["pool_a/width_8"]
    )
    left, first, second, _ = gradient_map(sharing).axes
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    np.testing.assert_allclose(lines["pools of A"], sharing.pulls["pool_a"].norms)
    shown_cosines = np.ma.filled(second.images[0].get_array(), np.nan)
    expected = sharing.pulls["pool_b"].cosines.copy()
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_allclose(shown_cosines, expected)
    assert "pools of A" in first.get_title(loc="left")


def test_a_sweep_without_budget_tuning_or_margin(tmp_path):
    fill(tmp_path, make_sweep(tmp_path, rates="", budget_rank=0, margin=0.0))
    write_report(load_results([tmp_path]), tmp_path / "report")
    markdown = (tmp_path / "report/report.md").read_text()
    assert "## Accuracy and cost" in markdown
    assert "of the budget" not in markdown.lower()
    assert "margin" not in markdown
    assert "the only one" in markdown
    assert not list((tmp_path / "report").glob("rates-*"))
    assert "Nothing: every run of the sweep is finished." in markdown


def test_runs_evaluated_at_their_end_alone_have_curves_of_the_loss(tmp_path):
    fill(tmp_path, make_sweep(tmp_path, STUDY), STUDY)
    for file in tmp_path.glob("runs/*/*/metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [
            {k: v for k, v in line.items() if line["step"] == STEPS or "validation" not in k}
            for line in lines
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    results = load_results([tmp_path])
    pictures = {one.name: one for one in draw_pictures(results, arm_scores(results), {}, None)}
    (axes,) = pictures["curves-steps"].figure.axes
    assert axes.get_title(loc="left") == "Training"
    (line,) = [
        line for line in pictures["curves-each"].figure.axes[0].lines if line.get_label() in STUDY
    ]
    assert len(line.get_xdata()) == STEPS
    assert pictures["curves-each"].caption.startswith("Training loss")


def test_a_sweep_that_has_only_begun(tmp_path):
    missing = [(name, "final", seed, None) for name in SMALL for seed in range(4)]
    fill(tmp_path, make_sweep(tmp_path), missing=missing)
    results = load_results([tmp_path])
    assert arm_scores(results) == {}
    assert all(one.mean is None for one in compare_arms(results, "LoRA e=2"))
    write_report(results, tmp_path / "report")
    rows = table_below((tmp_path / "report/report.md").read_text(), "Equal budget: LoRA of rank 2")
    assert {row[1] for row in rows} == {"-"}
    assert {row[3] for row in rows} == {"0 of 4"}


def test_sharing_that_cannot_be_computed_is_told_and_stops_nothing(tmp_path):
    folder = tmp_path / "sweep"
    arms = {"MoS": SMALL["MoS"]}
    fill(folder, make_sweep(folder, arms, rates="", seeds=1), arms)
    results = load_results([folder])
    shared = look_into_sharing(results)
    assert (shared.arm, shared.seed, shared.found) == ("MoS", 0, None)
    write_report(results, tmp_path / "report", shared)
    markdown = (tmp_path / "report/report.md").read_text()
    assert "Not looked into (MoS, seed 0)" in markdown
    assert "There is no other arm to compare." in markdown
    assert str(folder) not in markdown


def test_out_must_not_be_a_file(small, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file; give a folder"):
        write_report(load_results([small]), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "share", "words"),
    [
        (None, 0.5, "not enough evaluations"),
        (0.3, 0.5, "not flat: speed of learning"),
        (0.3, 0.99, "not flat: speed of learning"),
        (0.01, 0.5, "flat: a capacity"),
        (-0.01, 0.99, "the pairs are used up"),
        (0.01, None, "flat: a capacity"),
    ],
)
def test_a_flat_curve_is_a_capacity_only_while_pairs_are_left(change, share, words):
    assert words in memory_reading(change, share)
