"""The distribution: what a wheel holds, what an import costs, and that what is declared, pinned and checked agrees."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import repflow
from repflow import _imports

ROOT = Path(__file__).parents[1]
FOLDERS = ("callbacks", "monitor", "triton_kernels")
OPTIONAL_PACKAGES = ("lightning", "transformers", "accelerate", "wandb", "plotly", "pillow")


def run_python(code: str, *options: str, cwd: Path, path: str) -> str:
    """Run `code` in an interpreter of its own and return what it printed."""
    command = [sys.executable, *options, "-c", code]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist of a copy of the checkout, as a release is."""
    work = tmp_path_factory.mktemp("release")
    source = work / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "tests", *FOLDERS):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    build = "import sys; from setuptools import build_meta; getattr(build_meta, {!r})({!r})"
    run_python(build.format("build_sdist", str(work)), cwd=source, path="")
    with tarfile.open(next(work.glob("*.tar.gz"))) as sdist:
        sdist.extractall(work / "sdist", filter="data")
    run_python(build.format("build_wheel", str(work)), cwd=next((work / "sdist").iterdir()), path="")
    return next(work.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    """The wheel's files, as installing it would lay them out."""
    target = wheel.with_suffix("")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def package_files(package: Path) -> set[str]:
    """Every file of a package, the folders behind links included."""
    found = {Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names}
    return {str(file.relative_to(package)) for file in found if "__pycache__" not in file.parts}


def test_the_wheel_holds_the_whole_package_and_nothing_else(unpacked: Path):
    files = package_files(unpacked / "repflow")
    assert files == package_files(ROOT / "src" / "repflow")
    assert "py.typed" in files
    assert {f"{folder}/__init__.py" for folder in FOLDERS} <= files
    assert {entry.name for entry in unpacked.iterdir()} == {"repflow", f"repflow-{repflow.__version__}.dist-info"}


def test_the_unpacked_wheel_is_imported_from_where_it_lies(unpacked: Path, tmp_path: Path):
    code = "import repflow.triton_kernels, repflow.monitor.snapshot as m; print(repflow.__version__, m.__file__)"
    version, file = run_python(code, cwd=tmp_path, path=str(unpacked)).split()
    assert version == repflow.__version__
    assert Path(file) == unpacked / "repflow" / "monitor" / "snapshot.py"


def test_importing_repflow_costs_nothing():
    code = "import repflow, sys; print(*sys.modules)"
    loaded = run_python(code, cwd=ROOT, path=str(ROOT / "src")).split()
    heavy = {"torch", "numpy", "xarray", "torchmetrics", "triton", *OPTIONAL_PACKAGES}
    assert "repflow" in loaded
    assert not heavy.intersection(loaded)


def test_the_folders_at_the_root_are_imported_through_repflow_alone():
    code = "import repflow.monitor, repflow.callbacks, repflow.triton_kernels, sys; print(*sys.modules)"
    loaded = run_python(code, cwd=ROOT, path=str(ROOT / "src")).split()
    assert "repflow.monitor" in loaded
    assert not {"monitor", "callbacks", "triton_kernels"}.intersection(loaded)


def test_the_flags_check_what_the_extras_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    checked = [
        (extra, Requirement(str(alternatives[0].requirement))) for extra, alternatives in _imports._EXTRAS.values()
    ]
    flags = {canonicalize_name(requirement.name): (extra, requirement.specifier) for extra, requirement in checked}
    declared = {
        canonicalize_name(requirement.name): (extra, requirement.specifier)
        for extra in ("lightning", "transformers", "wandb", "report", "offline")
        for requirement in map(Requirement, project["optional-dependencies"][extra])
    }
    assert flags == declared


def test_every_dependency_is_pinned_to_a_version_that_it_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert not {"mamba-ssm", "causal-conv1d"} & {Requirement(text).name for text in extras["all"]}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, (line for line in lines if line[:1] != "#"))}
    declared = [*project["dependencies"], *(text for name in extras if name != "mamba" for text in extras[name])]
    for requirement in map(Requirement, declared):
        if requirement.name != "repflow":
            (pin,) = pins[canonicalize_name(requirement.name)].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), requirement


@pytest.fixture
def bare_site(tmp_path: Path) -> Path:
    """A folder of packages that holds what `repflow._imports` needs, and no optional package."""
    for name in ("lightning_utilities", "packaging", "typing_extensions"):
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        file = Path(spec.origin)
        source = file.parent if file.name == "__init__.py" else file
        (tmp_path / source.name).symlink_to(source)
    return tmp_path


@pytest.mark.parametrize("package", OPTIONAL_PACKAGES)
def test_a_missing_package_names_the_extra(package: str, bare_site: Path):
    code = f"""
from repflow._imports import require
try:
    require({package!r})
except ModuleNotFoundError as error:
    print(error.name, error)
"""
    # -S leaves out the environment's own packages.
    printed = run_python(code, "-S", cwd=bare_site, path=os.pathsep.join([str(ROOT / "src"), str(bare_site)]))
    extra = _imports._EXTRAS[package][0]
    assert printed.startswith(f"{package} repflow needs {package}>=")
    assert f"{package} is not installed" in printed
    assert f"pip install 'repflow[{extra}]'" in printed


@pytest.mark.parametrize("package", OPTIONAL_PACKAGES)
def test_an_installed_package_is_accepted(package: str):
    _imports.require(package)  # pyright: ignore[reportArgumentType]
