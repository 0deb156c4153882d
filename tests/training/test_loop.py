"""What a loop does between its steps: it waits for nothing, and copies nothing unasked."""

import jax
import pytest
from jax._src.array import ArrayImpl
from rich.console import Console

from mos_jax.training.config import RunConfig
from mos_jax.training.loop import Loop, _SingleLoop, train
from mos_jax.training.session import Session
from mos_jax.training.stacked import StackedLoop, train_stacked
from tests.training.fixtures_training import tiny_mapping, tiny_run, write_data

QUIET = Console(quiet=True)
STEPS = 5


@pytest.fixture(scope="module")
def train_path(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def course(monkeypatch):
    """Guards batches, steps and reports, and notes what happens in which order."""
    events = []
    value = ArrayImpl._value

    def fetched(array):
        events.append("fetch")
        return value.__get__(array)

    def guarded(name, function):
        def call(*arguments, **named):
            with jax.transfer_guard("disallow"), pytest.MonkeyPatch.context() as patch:
                # On a CPU, JAX's guard does not see what comes back from the device.
                patch.setattr(ArrayImpl, "_value", property(fetched))
                events.append(name)
                return function(*arguments, **named)

        return call

    compile_step = Loop._compile
    monkeypatch.setattr(Loop, "_compile", lambda *a: guarded("step", compile_step(*a)))
    for loop in (_SingleLoop, StackedLoop):
        monkeypatch.setattr(loop, "next_batch", guarded("batch", loop.next_batch))
        report = loop.report

        def reporting(self, reporter, pending, evaluating=False, report=report):
            if evaluating:  # validates: not a part of the loop
                return report(self, reporter, pending, evaluating)
            return guarded(f"report {pending.step}", report)(self, reporter, pending)

        monkeypatch.setattr(loop, "report", reporting)
    return events


def run_of(train_path, **training):
    mapping = tiny_mapping(train_path, steps=STEPS, dropout=0.1, **training)
    mapping["checkpoint"]["every"] = STEPS
    return mapping


def expected(fetches):
    """A step's two metrics are fetched when the next step is under way, and nothing else is."""
    order = ["batch", "step"]
    for step in range(1, STEPS):
        order += ["batch", "step", f"report {step}", *["fetch"] * fetches]
    return order


def test_a_step_is_under_way_before_anything_of_the_last_one_is_fetched(
    tmp_path, train_path, course
):
    config = RunConfig.from_mapping(run_of(train_path, accumulation=2))
    train(config, tmp_path / "run", QUIET)
    assert course == expected(fetches=2)


def test_the_same_on_a_mesh(tmp_path, train_path, course):
    mapping = run_of(train_path)
    mapping["mesh"]["data"] = 2
    mapping["mesh"]["tensor"] = -1
    train(RunConfig.from_mapping(mapping), tmp_path / "run", QUIET)
    assert course == expected(fetches=2)


def test_the_same_for_stacked_runs(tmp_path, train_path, course):
    configs = [RunConfig.from_mapping(run_of(train_path, seed=seed)) for seed in (0, 1)]
    train_stacked(configs, [tmp_path / "a", tmp_path / "b"], QUIET)
    assert course == expected(fetches=2)


def test_the_guard_sees_what_it_is_there_for(train_path):
    """A batch that was not moved."""
    session = Session.create(tiny_run(train_path))
    state, parts = session.initial()
    batch = session.data.source(0, 1)[0]
    step = session.train_step().lower(state, parts, session.base.model, batch).compile()
    with (
        jax.transfer_guard("disallow"),
        pytest.raises(Exception, match="Disallowed host-to-device"),
    ):
        step(state, parts, session.base.model, batch)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("mesh", "dtype"), [((1, 1, 1), "float32"), ((1, 2, 2), "bfloat16")], ids=["one", "mesh"]
)
def test_the_new_state_takes_the_memory_of_the_old_one(train_path, mesh, dtype):
    mapping = tiny_run(train_path).to_dict()
    mapping["mesh"] |= dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    mapping["base"]["dtype"] = dtype
    session = Session.create(RunConfig.from_mapping(mapping))
    state, parts = session.initial()
    batch = session.place_batch(session.data.source(0, 1)[0])
    model = session.base.model
    compiled = session.train_step().lower(state, parts, model, batch).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= nbytes(state)
    before = jax.tree.leaves(state)
    compiled(state, parts, model, batch)
    assert all(leaf.is_deleted() for leaf in before)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((parts, model)))
