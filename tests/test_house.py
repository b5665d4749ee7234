"""The rules of the house, checked on the tree itself: layers, names, build flags, symbols, and what an import costs."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, NATIVE = ROOT / "mlpkit", ROOT / "csrc"

# Imports point down, or stay on one floor.
FLOORS = [
    {"errors", "_C", "_events", "_ext", "__init__"},
    {"ops", "reference"},
    {"functional"},
    {"nn", "init"},
    {"guard", "population", "trace", "report"},
    {"interop"},
    {"tune", "bench"},
    {"cli", "__main__"},
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
NUMERIC = ["ops", "functional", "nn", "init", "guard", "population"]


def top(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    """Top-level names of mlpkit that a module imports, wherever in it: ``mlpkit.trace.hooks`` counts as trace."""
    package = ("mlpkit", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            modules = [f"{module}.{alias.name}" for alias in node.names] if module == "mlpkit" else [module]
        else:
            continue
        yield from (module.split(".")[1] for module in modules if module.startswith("mlpkit."))


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_a_floor():
    assert {top(path) for path in MODULES} <= FLOOR.keys(), "give the new module its floor above"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    here = top(path)
    for name in set(imports_of(path)) & FLOOR.keys():
        assert FLOOR[name] <= FLOOR[here], f"{here} imports {name}, which lies above it"
        assert not (name == "trace" and here in NUMERIC), f"{here} is numeric and imports trace"


def test_an_upward_import_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "nn").mkdir()
    module = tmp_path / "nn" / "layers.py"
    module.write_text(
        "from mlpkit import tune\nfrom ..cli import main\nimport mlpkit.trace.hooks\nfrom mlpkit.guard import x"
    )
    assert set(imports_of(module)) == {"tune", "cli", "trace", "guard"}


# Folder of csrc: the folders it may include from, and the foreign headers it may not.
TORCH = re.compile(r"^(torch|ATen|c10|pybind11)/")
INCLUDES = {
    "core": ({"core"}, TORCH),
    "cpu": ({"cpu", "core"}, re.compile(r"^(torch|c10|pybind11)/|^ATen/(?!cpu/vec/)")),
    "cuda": ({"cuda", "core"}, TORCH),
    "ops": ({"ops", "cpu", "cuda", "core"}, None),
}
SOURCES = sorted(path for path in NATIVE.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_native_includes_point_down_and_torch_stays_in_ops(path):
    folder = path.relative_to(NATIVE).parts[0]
    if folder not in INCLUDES:
        assert folder.startswith("bindings"), f"csrc/{folder} has no place in the house"
        return
    may_include, foreign = INCLUDES[folder]
    for quote, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), re.MULTILINE):
        if quote == '"' and "/" in name:
            assert name.split("/")[0] in may_include, f"{path.name} includes {name}"
        assert not (foreign and foreign.match(name)), f"{path.name} includes {name}: torch's headers stay in csrc/ops"


def test_the_map_in_contributing_is_the_tree():
    """Every folder that holds code is on the map, and everything on the map is there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`([\w./*]+)`", text.partition("| folder |")[2].partition("\nImports")[0]))
    for name in named - {"mlpkit._C", "mlpkit bench"}:
        assert list(ROOT.glob(name)) or (PACKAGE / name).exists(), f"CONTRIBUTING.md names {name}"
    folders = [path for base in (ROOT, PACKAGE, NATIVE) for path in base.iterdir() if path.is_dir()]
    tracked = [path for path in folders if not path.name.startswith((".", "_")) and path != ROOT / "build"]
    homes = {str(path.relative_to(ROOT)) for path in tracked if any(path.rglob("*.*"))}
    unbuilt = {name for name in homes if name not in {"mlpkit", "csrc", "shared", "out", "dist"}}
    assert unbuilt <= named, f"not on the map: {sorted(unbuilt - named)}"


def test_an_op_has_one_name_in_every_layer():
    import mlpkit

    ops = [path.stem for path in (PACKAGE / "ops").glob("*.py") if path.stem != "__init__"]
    assert "linear_act_dropout" in ops
    for op in ops:
        assert hasattr(mlpkit.functional, op) or op in mlpkit.__all__, f"nothing public is called {op}"
        places = [f"csrc/ops/{op}.cpp", f"tests/test_{op}.py"]
        sources = [path.read_text() for path in (NATIVE / "ops").glob(f"{op}*.cpp")]
        if any("TORCH_LIBRARY_IMPL(mlpkit, CPU" in source for source in sources):  # others are made of other ops
            places.append(f"csrc/cpu/{op}*")
        cuda = NATIVE / "ops" / f"{op}_cuda.cpp"
        if cuda.exists() and f'"cuda/{op}.h"' in cuda.read_text():  # others use the kernels of other ops
            places.append(f"csrc/cuda/{op}.cu")
        for place in places:
            assert list(ROOT.glob(place)), f"{op} has no {place}"


BUILD_FILES = [
    *(ROOT / name for name in ("CMakeLists.txt", "pyproject.toml", "Makefile")),
    *(ROOT / "cmake").rglob("*"),
    *SOURCES,
]
FAST_MATH = re.compile(
    r"fast[-_]math|-Ofast|unsafe-math|associative-math|finite-math|reciprocal-math|no-signed-zeros|ftz=true|prec-(div|sqrt)=false"
)


def test_no_build_file_asks_for_fast_math():
    for path in filter(Path.is_file, BUILD_FILES):
        code = re.sub(r"^\s*(#(?!pragma)|//).*$", "", path.read_text(), flags=re.MULTILINE)
        found = FAST_MATH.search(code)
        assert not found, f"{path.relative_to(ROOT)}: {found.group()}"
    assert FAST_MATH.search("nvcc --use_fast_math")
    assert FAST_MATH.search("g++ -ffast-math")


def isa_objects():
    """Object files under build/ that define something in an instruction set's namespace: (path, set, symbols)."""
    if shutil.which("nm") is None:
        pytest.skip("no nm on this machine")
    found = []
    for path in sorted((ROOT / "build").rglob("*.o")):
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines() if len(line.split(maxsplit=2)) == 3]
        sets = {
            m.group(1) for kind, name in symbols if kind == "T" for m in [re.match(r"mlpkit::isa_(\w+)::", name)] if m
        }
        found += [(path, isa, symbols) for isa in sets]
    return found


def test_per_isa_objects_share_no_symbol():
    """The linker keeps one of many weak copies: an AVX-512 copy of a shared function would crash older machines."""
    if not (ROOT / "build").is_dir():
        pytest.skip("no build tree beside the sources")
    objects = isa_objects()
    assert {isa for _, isa, _ in objects} >= {"default", "avx2", "avx512"}, "no per-ISA objects found under build/"
    for path, isa, symbols in objects:
        if isa == "default":
            continue
        shared = [name for kind, name in symbols if kind in "WVu" and f"mlpkit::isa_{isa}::" not in name]
        assert not shared, f"{path.name} ({isa}) defines weak symbols that other objects may define too: {shared[:5]}"


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ | environment, cwd=ROOT.parent
    )


def test_import_starts_no_cuda_and_pulls_in_no_heavy_package():
    code = """
import sys, torch
before = set(sys.modules)
import mlpkit
import mlpkit.functional, mlpkit.reference
heavy = ("sklearn", "pandas", "pyarrow", "plotly", "optuna", "matplotlib", "jinja2", "triton", "torch._dynamo")
new = sorted(m for m in set(sys.modules) - before if m.startswith(heavy))
assert not new, f"imports {new[:5]}"
assert not torch.cuda.is_initialized(), "initialises CUDA"
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


def test_the_package_tells_what_was_built_and_what_runs():
    import torch

    result = python("-m", "mlpkit")
    assert result.returncode == 0, result.stderr
    for word in ("mlpkit", torch.__version__.split("+")[0], "cuda", "default"):
        assert word in result.stdout.lower()


def test_the_instruction_set_is_forced_and_named_by_the_environment():
    code = "from mlpkit._ext import _C; print(_C.cpu_capability())"
    assert python("-c", code, MLPKIT_CPU_CAPABILITY="default").stdout.strip() == "default"
    result = python("-c", code, MLPKIT_CPU_CAPABILITY="AVX2")
    assert result.returncode != 0
    assert "MLPKIT_CPU_CAPABILITY is 'AVX2'" in result.stderr
    assert "default" in result.stderr


def test_an_unknown_instruction_set_is_refused_and_changes_nothing():
    from mlpkit._ext import _C

    before = _C.cpu_capability()
    with pytest.raises(ValueError, match=r"'sse9'.*default"):
        _C.force_cpu_capability("sse9")
    assert _C.cpu_capability() == before


def test_the_cuda_kernels_are_chosen_and_named_by_the_environment():
    code = "from mlpkit._ext import _C; print(_C.cuda_kernels())"
    assert python("-c", code, MLPKIT_CUDA_KERNELS="").stdout.strip() == "proven"
    assert python("-c", code, MLPKIT_CUDA_KERNELS="all").stdout.strip() == "all"
    result = python("-c", code, MLPKIT_CUDA_KERNELS="fast")
    assert result.returncode != 0
    assert "MLPKIT_CUDA_KERNELS is 'fast'; it must be proven or all" in result.stderr
    result = python("-m", "mlpkit", MLPKIT_CUDA_KERNELS="all")
    assert "cuda kernels: all" in result.stdout
    assert "thin kernels" in result.stdout


def test_no_more_than_four_environment_variables():
    sources = [*MODULES, *SOURCES]
    text = "\n".join(path.read_text() for path in sources)
    names = set(re.findall(r"[\"'](MLPKIT_[A-Z0-9_]+)[\"']", text))
    assert names >= {"MLPKIT_CPU_CAPABILITY", "MLPKIT_CUDA_KERNELS", "MLPKIT_FP32_PRECISION"}
    assert len(names) <= 4, names


def test_missing_cuda_fails_where_it_is_required():
    from conftest import cuda_is_missing

    if cuda_is_missing() is None:
        pytest.skip("CUDA is here")
    needs_cuda = str(ROOT / "tests" / "test_linear_act_dropout.py") + "::test_on_cuda_two_runs_are_bitwise_equal"
    result = python("-m", "pytest", "-p", "no:cacheprovider", needs_cuda, MLPKIT_REQUIRE_CUDA="1")
    assert result.returncode == 1
    assert "4 errors" in result.stdout
