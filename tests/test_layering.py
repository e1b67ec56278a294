"""The walls of the house: who imports whom, what a user's install brings, and no room too large to know."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ssa", "reference_model", "benchmarks", "examples")
FILES = sorted(f for p in (*PACKAGES, "tests") for f in (ROOT / p).rglob("*.py"))

# What a file of ssa may import from ssa. A folder stands for every file in it.
MAY_IMPORT = {
    "ssa.partition": set(),
    "ssa.naive": {"ssa.partition"},
    "ssa.chunked": {"ssa.partition"},
    "ssa.kernels": {"ssa.kernels"},
    "ssa.autograd": {"ssa.autograd", "ssa.kernels"},
    "ssa.functional": {"ssa.partition", "ssa.naive", "ssa.chunked", "ssa.autograd"},
    "ssa.compression": {"ssa.partition", "ssa.functional"},
    "ssa.module": {"ssa.partition", "ssa.functional", "ssa.compression"},
    "ssa": {"ssa.partition", "ssa.functional", "ssa.compression", "ssa.module"},
}
# What ssa may import from outside, and where.
THIRD_PARTY = {"ssa.kernels": {"torch", "triton"}, "ssa": {"torch"}}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever the statement stands; `from ssa import naive` counts as ssa.naive when that is a file."""
    source, package = module_name(path).split("."), path.name == "__init__.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = source[: len(source) - node.level + package] if node.level else []
            base = ".".join(base + (node.module.split(".") if node.module else []))
            for alias in node.names:
                child = ROOT.joinpath(*base.split("."), alias.name)
                found.add(f"{base}.{alias.name}" if child.with_suffix(".py").exists() or child.is_dir() else base)
    return found


def within(module: str, layer: str) -> bool:
    return module == layer or module.startswith(layer + ".")


def layer_of(module: str, layers) -> str:
    """The most specific layer that holds the module."""
    return max((layer for layer in layers if within(module, layer)), key=len)


def id_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [f for f in FILES if module_name(f).split(".")[0] == "ssa"], ids=id_of)
def test_ssa_layers(path):
    module = module_name(path)
    layer = layer_of(module, MAY_IMPORT)
    assert layer != "ssa" or path.name == "__init__.py", f"{module} has no layer: say in MAY_IMPORT what it may import"
    outside = set(sys.stdlib_module_names) | THIRD_PARTY[layer_of(module, THIRD_PARTY)]
    for name in imports(path):
        if name.split(".")[0] == "ssa":
            assert any(name == a or a in ("ssa.kernels", "ssa.autograd") and within(name, a) for a in MAY_IMPORT[layer]), (
                f"{module} must not import {name}"
            )
        else:
            assert name.split(".")[0] in outside, f"{module} must not import {name}"


@pytest.mark.parametrize("path", [f for f in FILES if module_name(f).split(".")[0] in PACKAGES[1:]], ids=id_of)
def test_users_of_ssa_import_its_public_names(path):
    package = module_name(path).split(".")[0]
    allowed = {"reference_model": set(), "benchmarks": {"ssa.kernels"}, "examples": set()}[package]
    for name in imports(path):
        if within(name, "ssa") and name != "ssa":
            assert any(within(name, a) for a in allowed), f"{id_of(path)} must use ssa's public names, not {name}"
        if package == "reference_model":
            assert name.split(".")[0] not in ("benchmarks", "examples", "tests"), f"{id_of(path)} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=id_of)
def test_file_length(path):
    limit = 300 if within(module_name(path), "reference_model") else 600
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"{id_of(path)} has {lines} lines, the limit is {limit}"


def run_without(modules: list[str], code: str) -> subprocess.CompletedProcess:
    """Run code in a fresh process in which importing any of the modules fails."""
    block = "".join(f"sys.modules[{m!r}] = None; " for m in modules)
    return subprocess.run([sys.executable, "-c", f"import sys; {block}{code}"], cwd=ROOT, capture_output=True, text=True, check=False)


def test_ssa_imports_and_runs_without_triton():
    code = (
        "import torch, ssa; xyz = torch.cartesian_prod(*[torch.arange(5)] * 3); "
        "coords = torch.cat([torch.zeros(125, 1, dtype=torch.long), xyz], 1); "
        "layer = ssa.SpatialSparseAttention(32, 2, 1, 16, topk=1); layer(torch.randn(125, 32), coords).sum().backward()"
    )
    done = run_without(["triton", "numpy"], code)
    assert done.returncode == 0, done.stderr


REFERENCE_EXTRA = "PIL embreex hydra igl manifold3d omegaconf safetensors scipy tensorboard tqdm transformers trimesh webdataset".split()


def test_reference_model_names_its_extra():
    """Without the extra every file imports or ends in an ImportError that says how to get it."""
    modules = [module_name(f) for f in FILES if within(module_name(f), "reference_model")]
    code = f"""
import importlib
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert 'spatial-sparse-attention[reference]' in str(error), (name, error)
        print(name)
"""
    block = f"import sys\nfor m in {REFERENCE_EXTRA!r}: sys.modules[m] = None\n"
    done = subprocess.run([sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "reference_model\n" not in done.stdout, "the package itself must import without its extra"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree, as `pip install .` builds it."""
    tree, out = tmp_path_factory.mktemp("tree") / "src", tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, tree, ignore=junk)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(tree)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_two_packages_with_their_data(wheel):
    names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert {n.split("/")[0] for n in names} == {"ssa", "reference_model"}
    tree = {id_of(f) for p in ("ssa", "reference_model") for f in (ROOT / p).rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    reports = {n for n in tree if n.startswith("reference_model/results/")}  # of the repository, not of the package
    assert reports and names == tree - reports


def test_wheel_brings_only_torch_and_numpy(wheel):
    (path,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
    lines = wheel.read(path).decode().split("\n\n")[0].splitlines()
    needs = [x.removeprefix("Requires-Dist: ") for x in lines if x.startswith("Requires-Dist: ") and "extra ==" not in x]
    assert sorted(needs) == ["numpy", "torch>=2.11"]
    extras = {x.removeprefix("Provides-Extra: ") for x in lines if x.startswith("Provides-Extra: ")}
    assert extras == {"flash-attn", "spconv", "bench", "reference", "dev"}
    assert "Name: spatial-sparse-attention" in lines and "License-Expression: Apache-2.0" in lines


def test_the_tree_stays_below_18_mb():
    """What git keeps, not what lies beside it."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    assert sum((ROOT / name).stat().st_size for name in names if name and (ROOT / name).exists()) < 18e6
