"""The rules of the house that no other tool checks: the direction of imports, what no source may call, sizes, versions, the lock."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model", "streaming", "consumers", "benchmarks", "deploy")
MAX_LINES = 400

FORBIDDEN_MODULES = frozenset({"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"})
FORBIDDEN_CALLS = frozenset({"eval", "exec", "yaml.load", "yaml.unsafe_load", "torch.load", "torch.save", "os.system", "os.popen"})


def sources() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def called(function: ast.expr, names: dict[str, str]) -> str:
    """The full name of what is called, with `import x as y` and `from x import y` undone. Empty if it is no plain name."""
    parts: list[str] = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        return ""
    return ".".join([names.get(function.id, function.id), *reversed(parts)])


def breaches(text: str) -> list[str]:
    """What in a source is forbidden, as `line: what`."""
    tree = ast.parse(text)
    names: dict[str, str] = {}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            modules = [node.module or ""]
        else:
            continue
        found += [(node.lineno, f"import {module}") for module in modules if module.partition(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called(node.func, names).removeprefix("builtins.")
        if name in FORBIDDEN_CALLS:
            found.append((node.lineno, name))
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg in {"shell", "allow_pickle"} and not (isinstance(value, ast.Constant) and value.value is False):
                found.append((node.lineno, f"{keyword.arg}="))
    return [f"{line}: {what}" for line, what in sorted(found)]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_source_runs_no_foreign_code(path: Path) -> None:
    assert breaches(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["1: import pickle"]),
        ("from pickle import loads as l", ["1: import pickle"]),
        ("import torch\ntorch.load('x', weights_only=True)", ["2: torch.load"]),
        ("import torch as t\nt.load('x')", ["2: torch.load"]),
        ("from torch import load\nload('x')", ["2: torch.load"]),
        ("from yaml import load as read\nread('x')", ["2: yaml.load"]),
        ("eval('1')", ["1: eval"]),
        ("import builtins\nbuiltins.exec('1')", ["2: exec"]),
        ("import subprocess\nsubprocess.run('ls', shell=True)", ["2: shell="]),
        ("import subprocess\nsubprocess.run('ls', shell=flag)", ["2: shell="]),
        ("import subprocess\nsubprocess.run(['ls'], shell=False)", []),
        ("import re, json\nre.compile('x'); json.load(f); model.eval()", []),
    ],
)
def test_the_check_of_sources_finds_what_it_should(source: str, found: list[str]) -> None:
    assert breaches(source) == found


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    command = [str(program), "--no-cache", "--config", "pyproject.toml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


def test_rooms_import_in_one_direction() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("model/extra.py", "import streaming.log"),
        ("model/extra.py", "import sqlite3"),
        ("model/extra.py", "from kafka import KafkaConsumer"),
        ("model/extra.py", "import prometheus_client"),
        ("streaming/extra.py", "import torch"),
        ("streaming/extra.py", "import torch.nn.functional"),
        ("streaming/extra.py", "import model"),
        ("streaming/extra.py", "import consumers"),
    ],
)
def test_an_import_in_the_wrong_direction_is_noticed(tmp_path: Path, module: str, line: str) -> None:
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for room in ("model", "streaming", "consumers"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    (tmp_path / "streaming" / "log.py").touch()
    assert lint_imports(tmp_path).returncode == 0
    (tmp_path / module).write_text(f"{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert "BROKEN" in done.stdout


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {name: length for name, length in lengths.items() if length >= MAX_LINES} == {}


def test_nothing_listens_beyond_loopback_by_default() -> None:
    everywhere = re.compile(r"""\b0\.0\.0\.0\b|["']::["']""")
    assert [str(path.relative_to(ROOT)) for path in sources() if everywhere.search(path.read_text(encoding="utf-8"))] == []


def test_files_that_sources_and_pages_name_exist() -> None:
    named = re.compile(r"(?<![\w/.-])(?:docs|benchmarks|deploy|model|streaming|consumers|tests)/[\w./-]+\.(?:md|py|toml|ya?ml|json|svg)\b")
    decision = re.compile(r"docs/decisions/(\d{4})\b|\]\((\d{4})-")
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml")]
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path.name != Path(__file__).name]
    missing = []
    for path in [
        *pages,
        *sources(),
        *tests,
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").rglob("*.*ml"),
        *(ROOT / "deploy").rglob("*.md"),
    ]:
        text = path.read_text(encoding="utf-8")
        missing += [f"{path.name}: {name}" for name in named.findall(text) if not any((at / name).exists() for at in (ROOT, path.parent))]
        numbers = ["".join(found) for found in decision.findall(text)]
        missing += [f"{path.name}: {number}" for number in numbers if not list((ROOT / "docs" / "decisions").glob(f"{number}-*.md"))]
    assert missing == []


def pyproject() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> list[Requirement]:
    project = pyproject()
    return [Requirement(line) for line in [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]]


def test_the_changelog_begins_with_the_version_of_the_project() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == pyproject()["project"]["version"]


def test_every_dependency_has_a_lower_bound() -> None:
    assert [str(need) for need in requirements() if not any(bound.operator == ">=" for bound in need.specifier)] == []


def test_the_lock_holds_every_dependency_at_a_version_allowed() -> None:
    lock = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8")
    locked: dict[str, list[Version]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock, re.MULTILINE):
        locked.setdefault(canonicalize_name(name), []).append(Version(version))
    for need in requirements():
        versions = locked.get(canonicalize_name(need.name), [])
        assert versions, f"{need.name} is not in requirements-dev.lock: run `make lock`"
        assert all(version in need.specifier for version in versions), f"{need} but {versions} is locked: run `make lock`"


def test_the_lock_names_no_registry_and_has_a_digest_for_every_package() -> None:
    lock = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8")
    assert "://" not in lock
    packages = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)[1:]
    assert [package.split()[0] for package in packages if "--hash=sha256:" not in package] == []


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(path for room in (*ROOMS, "docs") for path in (ROOT / room).rglob("*.md"))])


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("folder", ["docs", "docs/decisions"])
def test_every_page_is_in_the_index_of_its_folder(folder: str) -> None:
    index = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    names = [path.name for path in (ROOT / folder).glob("*.md") if path.name != "README.md"]
    assert [name for name in names if f"]({name})" not in index] == []
