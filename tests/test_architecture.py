"""The arrows and names of the design, read from the source: who imports whom, what is empty, what is camelCase."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import causallm.models  # noqa: F401  registers the families
from causallm.config import ModelConfig
from causallm.factory import Factory

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("causallm", "layers")
ROOMS = (*PACKAGES, "tools", "benchmarks", "examples", "tests")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of all modules that a file imports, wherever in it."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield ".".join((*package[: -node.level], node.module or "")) if node.level else node.module or ""


def imported_rooms(path: Path) -> set[str]:
    """The first names of a file's imports that are not of the standard library."""
    return {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)


def normal(distribution: str) -> str:
    """A distribution's name in the one spelling that compares (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def functions(room: str) -> Iterator[str]:
    """The name of every function and method."""
    for path in sources(room):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name


def test_the_reader_of_imports_sees_them() -> None:
    """Or the tests below could not fail."""
    assert "causallm.config" in set(imports(ROOT / "causallm" / "transformer.py"))
    assert "layers.step" in set(imports(ROOT / "causallm" / "transformer.py"))
    assert imported_rooms(ROOT / "layers" / "rms_norm.py") == {"torch", "jaxtyping", "layers"}
    assert all(sources(room) for room in (*PACKAGES, "tests"))


def test_main_imports_causallm_and_nothing_else() -> None:
    assert imported_rooms(ROOT / "main.py") == {"causallm"}


@pytest.mark.parametrize("path", sources("layers"), ids=name_of)
def test_layers_are_leaves(path: Path) -> None:
    optional = {"triton"} if path.name == "triton_product.py" else set()
    assert imported_rooms(path) <= {"layers", "torch", "jaxtyping"} | optional


@pytest.mark.parametrize("path", sources("causallm"), ids=name_of)
def test_causallm_imports_layers_and_its_declared_dependencies(path: Path) -> None:
    """No development tool, transformers above all, is needed at run time."""
    project = PROJECT["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    declared = {normal(re.split(r"[^\w.-]", line)[0]) for line in project["dependencies"] + extras}
    sold_as = packages_distributions()
    for module in imported_rooms(path) - {"causallm", "layers"}:
        # What an extra brings may not be here to ask: mlflow-skinny brings mlflow.
        names = {normal(name) for name in sold_as.get(module, [module])}
        assert any(known == name or known.startswith(f"{name}-") for known in declared for name in names), module


@pytest.mark.parametrize("room", ROOMS)
def test_nobody_imports_tools_benchmarks_or_tests(room: str) -> None:
    for path in [*sources(room), ROOT / "main.py"]:
        forbidden = {"tools", "benchmarks", "tests", "main"}
        if room != "tests":
            forbidden |= {other.stem for other in sources("tests")}
        assert not imported_rooms(path) & forbidden, path


def test_leaves_cannot_lean_on_their_package() -> None:
    assert (ROOT / "layers" / "__init__.py").read_text(encoding="utf-8") == ""


def test_all_packages_are_listed() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for room in PACKAGES
        for path in sources(room)
        if path.name == "__init__.py"
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_camel_case_means_an_override_point_and_all_of_them_exist() -> None:
    listed = PROJECT["tool"]["ruff"]["lint"]["pep8-naming"]["extend-ignore-names"]
    found = {name for room in PACKAGES for name in functions(room) if re.search("[a-z][A-Z]", name)}
    assert found == set(listed)
    assert len(listed) == len(set(listed))


def test_override_points_have_no_snake_case_twins() -> None:
    listed = PROJECT["tool"]["ruff"]["lint"]["pep8-naming"]["extend-ignore-names"]
    twins = {re.sub("([A-Z])", r"_\1", name).lower() for name in listed}
    assert not twins & {name for room in PACKAGES for name in functions(room)}


@pytest.mark.parametrize("path", [path for room in ROOMS for path in sources(room)], ids=name_of)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    if path != ROOT / "layers" / "__init__.py":
        assert ast.get_docstring(parse(path))


@pytest.mark.parametrize("path", [path for room in PACKAGES for path in sources(room)], ids=name_of)
def test_nothing_breaks_the_shape_checks(path: Path) -> None:
    """Postponed annotations and typing.Self are beyond the run-time check."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "__future__"
            assert node.module != "typing" or "Self" not in {alias.name for alias in node.names}


@pytest.mark.parametrize("path", sources("causallm/models"), ids=name_of)
def test_families_have_no_constructor_and_no_forward(path: Path) -> None:
    defined = {node.name for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)}
    assert not defined & {"__init__", "forward"}


SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 8,
}


@pytest.mark.parametrize("architecture", sorted(Factory._models))
def test_what_a_family_assumes_is_what_config_json_may_say(architecture: str) -> None:
    """A misspelt default would be warned about, which fails a test; one of the wrong kind is a ValueError."""
    defaults = Factory.find(architecture).config_defaults
    read = ModelConfig.from_json({**SIZES, **defaults}, {})
    assert read == ModelConfig.from_json(SIZES, defaults)
