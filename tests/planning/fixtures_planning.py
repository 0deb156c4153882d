"""Requests of tiny runs, and a compiler that answers by rule."""

import dataclasses
import os

import pytest

from mos_jax.errors import InputError
from mos_jax.models.tiny import tiny_config
from mos_jax.planning.compiling import Program, devices, find_python
from mos_jax.planning.counting import Counts
from mos_jax.planning.request import Request
from mos_jax.training.config import RunConfig, default_config

GIB = 2**30


def need_libtpu():
    """Skips a test where the TPU compiler is not installed; where CI is set, fails it."""
    try:
        find_python()
    except InputError as error:
        if os.environ.get("CI"):
            pytest.fail(f"nothing is tested by skipping: {error}")
        pytest.skip(str(error))


def tiny_request(topology="v5e:2x2", mesh=(1, 4, 1), rows=4, method="mos", model=None, **base):
    fields = {"equivalent_rank": 2, "rank": 4, "private_rank": 0} if method == "mos" else {}
    config = default_config(method, **fields)
    config.base.update(base)
    config.data.batch_size = rows
    config.data.sequence_length = 16
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    run = RunConfig.from_mapping(config.to_dict())
    return Request(run, model or tiny_config(), 16, 8, topology)


def deeper(request, layers):
    model = dataclasses.replace(request.model, num_layers=layers)
    return dataclasses.replace(request, model=model)


class RuleCompiler:
    """Says what a step needs by `rule(request)`, in bytes, and takes what fits 16 GiB."""

    def __init__(self, rule, usable=16 * GIB):
        self.rule, self.usable, self.asked = rule, usable, []

    def program(self, request):
        self.asked.append(request)
        needed = self.rule(request)
        fits = needed <= self.usable
        counts = Counts(1e12 * request.tokens / devices(request), 1e9, (), {}, ())
        return Program(
            seconds=1.0,
            usable=self.usable,
            arguments=0,
            peak=needed,
            code=1000 if fits else None,
            refusal=None if fits else "RESOURCE_EXHAUSTED",
            counts=counts if fits else None,
            versions={},
        )
