"""Loads bases in a process of its own, watched: `python -m tests.models.fixtures_loading JSON`.

Prints one JSON object. The process has eight CPU devices and no other work, so that its peak of
memory is that of the loading.
"""

import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def watch(what, **arguments):
    """Calls the function `what` of this file in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.fixtures_loading", json.dumps([what, arguments])],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def memory(path, dtype, quantize):
    """Rise of the process's peak of resident memory while a base is loaded, and what it holds.

    The base is loaded twice: `first` holds what XLA and its compiled programs take, which does not
    grow with the model; `rise` is that of the second time.
    """
    import jax

    from mos_jax import load_base

    load_base("tiny-random", dtype, quantize=quantize)
    rises = []
    for _ in range(2):
        base = None
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # nothing free is left to be used again
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
        before = _status("VmRSS")
        base = load_base(path, dtype, quantize=quantize)
        rises.append(_status("VmHWM") - before)
    weights = base.model.weights
    return {
        "first": rises[0],
        "rise": rises[1],
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(base.model)),
        "largest": max(sum(x.nbytes for x in jax.tree.leaves(w)) for w in weights.values()),
        "parameters": base.config.num_parameters,
    }


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def sharded(path, quantize, data):
    """Loads a base over a mesh and without one; what was read, held and computed."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from mos_jax import load_base
    from mos_jax.models import layout

    plain = load_base(path, quantize=quantize)
    mesh = Mesh(np.array(jax.devices()).reshape(data, -1), ("data", "model"))
    rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

    def shardings(name, shape):
        site = name.removeprefix("blocks/")
        if site in rows:
            return NamedSharding(mesh, P(None, None, "model"))
        if site in ("o_proj", "down_proj"):
            return NamedSharding(mesh, P(None, "model", None))
        return NamedSharding(mesh, P("model") if name == "embed" else P())

    requested, parts = [], []
    read, part = layout.ByteFile.read, layout.WeightReader.read

    def counting(self, *arguments):
        block = read(self, *arguments)
        requested.append(block.nbytes)
        return block

    def watching(self, index, dtype):
        values = part(self, index, dtype)
        parts.append((self.slots[0].target, values.size))
        return values

    layout.ByteFile.read, layout.WeightReader.read = counting, watching
    base = load_base(path, quantize=quantize, shardings=shardings)
    layout.ByteFile.read, layout.WeightReader.read = read, part
    largest: dict[str, int] = {}
    for name, size in parts:
        largest[name] = max(largest.get(name, 0), size)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    run = jax.jit(lambda model: model(tokens))
    difference = np.abs(np.asarray(run(base.model)) - np.asarray(run(plain.model))).max()
    weights, others = base.model.weights, plain.model.weights
    return {
        "requested": sum(requested),
        "largest": largest,
        "shapes": {
            name: [sorted({s.data.shape for s in leaf.addressable_shards}) for leaf in leaves]
            for name, leaves in ((n, jax.tree.leaves(w)) for n, w in weights.items())
        },
        "devices": min(len(leaf.sharding.device_set) for leaf in jax.tree.leaves(base.model)),
        "equal": all(
            np.array_equal(np.asarray(a), np.asarray(b))
            for name in weights
            for a, b in zip(
                jax.tree.leaves(weights[name]), jax.tree.leaves(others[name]), strict=True
            )
        ),
        "difference": float(difference),
        "same_fingerprint": base.fingerprint == plain.fingerprint,
    }


def write_model(path, config, kind="F32"):
    """Writes a model of `config` whose tensors repeat some random numbers, tensor by tensor.

    `kind` "F32" writes a Hugging Face folder in float32, others a GGUF file in that type.
    """
    import gguf
    import numpy as np

    from mos_jax.models import gguf as gguf_reader
    from mos_jax.models import huggingface
    from mos_jax.models.tokenizer import Tokenizer
    from tests.models.fixtures_models import huggingface_config, write_gguf

    noise = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32) * 0.05

    def tensors(names):
        for target, shape in config.weight_shapes().items():
            stacked = target.startswith("blocks/")
            shape = shape[1:] if stacked else shape
            turned = shape if target == "embed" else shape[::-1]
            for layer in range(config.num_layers if stacked else 1):
                yield names[target].format(layer), np.resize(noise, turned)

    if kind != "F32":
        if not path.parent.exists():
            path.parent.mkdir()
        weights = dict(tensors(gguf_reader.tensor_names(config)))
        assert gguf.GGMLQuantizationType[kind]
        write_gguf(path, config, {}, kind, extra=weights, vocabulary=True)
        return path
    path.mkdir(parents=True)
    content = huggingface_config(dataclasses.replace(config, name="model"))
    (path / "config.json").write_text(json.dumps(content))
    (path / "tokenizer.json").write_text(Tokenizer.byte_level().to_json())
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    header, end = {}, 0
    for name, tensor in tensors(huggingface.tensor_names(config)):
        span = [end, end + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": span}
        end = span[1]
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors(huggingface.tensor_names(config)):
            tensor.tofile(file)
    return path


if __name__ == "__main__":
    name, given = json.loads(sys.argv[1])
    print(json.dumps(globals()[name](**given)))
