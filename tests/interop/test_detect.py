import functools
import json
import pickle

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.storage import save_adapter
from mos_jax.errors import InputError
from mos_jax.interop.detect import FOUND, detect
from mos_jax.interop.peft_fields import KINDS
from tests.interop.fixtures_folders import SITES, edit_config, write_peft


class Bomb:
    """Whatever unpickles it fails the test."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def write_gguf(path, **fields):
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        writer.add_string(key.replace("_", "."), value)
    writer.add_name("tiny")
    writer.add_tensor("x", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ours(path):
    config = MoSConfig(equivalent_rank=2, rank=2, shards_per_vector=2)
    adapter = create_adapter(config, SITES, jax.random.key(0))
    return save_adapter(path, adapter, metadata={"base": "tiny-random"})


def model_folder(path):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"x": np.zeros(2, np.float32)}, path / "model.safetensors")
    return path


MAKE = {
    "mos_jax adapter": (ours, "method mos on q_proj, up_proj, down_proj, for the base tiny-random"),
    **{
        f"PEFT {kind}": (
            functools.partial(write_peft, kind=kind),
            "on down_proj, q_proj, for the base org/base",
        )
        for kind in KINDS
    },
    "Hugging Face model folder": (model_folder, "Hugging Face model folder"),
    "GGUF model": (lambda path: write_gguf(path), "tiny, architecture llama"),
    "GGUF adapter": (
        lambda path: write_gguf(path, general_type="adapter", adapter_type="lora"),
        "tiny, architecture llama",
    ),
}


def test_every_kind_is_here():
    assert set(MAKE) == set(FOUND)


@pytest.mark.parametrize("kind", MAKE)
def test_what_lies_there_is_told(tmp_path, kind):
    make, about = MAKE[kind]
    found = detect(make(tmp_path / "x"))
    assert found.kind == kind == found.details["format"]
    assert found.description.startswith(kind)
    assert about in found.description
    assert "\n" not in found.description
    assert found.is_adapter == (kind == "mos_jax adapter" or kind.startswith("PEFT"))
    json.dumps(found.details, allow_nan=False)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "pytorch_model.bin", "model.pt", "w.pkl", "weights"]
)
def test_a_pickle_is_named_and_not_opened(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"is a pickle.*safetensors\.torch\.save_file"):
        detect(file)


@pytest.mark.parametrize("name", ["adapter_model", "model"])
def test_a_folder_of_pickles(tmp_path, name):
    folder = (
        write_peft(tmp_path / "x", "LORA") if "adapter" in name else model_folder(tmp_path / "x")
    )
    (folder / f"{name}.safetensors").unlink()
    (folder / f"{name}.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=rf"{name}\.bin is a pickle"):
        detect(folder)


def test_what_is_not_known_is_refused_in_words(tmp_path):
    with pytest.raises(InputError, match=r"neither a file nor a folder at .*nowhere"):
        detect(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no adapter and no model: .* but nothing"):
        detect(tmp_path)
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=r"but thesis\.txt"):
        detect(tmp_path)
    with pytest.raises(InputError, match="neither a GGUF file nor a folder"):
        detect(tmp_path / "thesis.txt")
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="neither a GGUF file nor a folder"):
        detect(tmp_path / "empty")
    folder = write_peft(tmp_path / "x", "LORA")
    with pytest.raises(InputError, match="one file of an adapter; give its folder"):
        detect(folder / "adapter_model.safetensors")
    edit_config(folder, peft_type="LOHA")
    with pytest.raises(InputError, match="peft_type = 'LOHA' is not supported"):
        detect(folder)
    edit_config(folder, peft_type="LORA", target_modules=[])
    assert "on no module" in detect(folder).description
    (tmp_path / "cut.gguf").write_bytes(write_gguf(tmp_path / "whole").read_bytes()[:40])
    with pytest.raises(InputError, match="not a whole GGUF file"):
        detect(tmp_path / "cut.gguf")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"a config\.json but no safetensors"):
        detect(tmp_path / "hf")
