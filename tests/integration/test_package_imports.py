"""Imports point one way, and importing kvsight loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvsight

SOURCE = Path(kvsight.__file__).parent
ENGINES = {"transformers", "vllm"}
# an import may only point to its own line or one above it
ORDER = (
    (
        "errors",
        "packing",
        "tiling",
        "retention",
        "atomic",
        "assets",
        "waterfill",
        "text",
        "console",
        "records",
    ),
    ("projections", "allocate"),
    ("formats", "rope"),
    ("ops",),
    ("quantizers", "transforms", "stats", "distortion"),
    ("drift", "reach"),
    ("codec",),
    ("methods",),
    ("plan", "planfile", "fingerprint", "curves"),
    ("rules",),
    ("request",),
    ("spend", "cache"),
    ("integrations",),
    ("probe",),
    ("rotary", "trace", "propagation", "fit", "doctor"),
    ("eval", "testing"),
    ("report",),
    ("cli", "__main__"),
)


def path_name(path):
    """The dotted name below kvsight; a package is its __init__."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


TREES = {path_name(p): ast.parse(p.read_text(encoding="utf-8")) for p in sorted(SOURCE.rglob("*.py"))}


def imports(name, inside_functions=True):
    """What a module imports, except for type checkers: (top, dotted name below it)."""
    skipped = set()
    for node in ast.walk(TREES[name]):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if typing_only or (isinstance(node, ast.FunctionDef) and not inside_functions):
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(TREES[name]):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[::2] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            top, _, rest = str(node.module).partition(".")
            for alias in node.names:
                inner = f"{rest}.{alias.name}".lstrip(".")
                yield top, inner if top == "kvsight" and inner in TREES else rest


def ours(name, inside_functions=True):
    return {inner for top, inner in imports(name, inside_functions) if top == "kvsight"} - {"", name}


def part(name):
    return name.partition(".")[0]


def test_engines_are_imported_only_where_the_design_allows():
    found = {name for name in TREES if ENGINES & {top for top, _ in imports(name)}}
    assert {part(name) for name in found} <= {"integrations", "rotary", "trace", "eval"}


def test_imports_point_one_way():
    rank = {name: i for i, line in enumerate(ORDER) for name in line}
    unknown = {part(name) for name in TREES} - {""} - set(rank)
    assert not unknown, f"give {unknown} a place in ORDER"
    up = [
        f"{name} imports {inner}"
        for name in TREES
        for inner in (ours(name, inside_functions=False) if name else ())
        if rank[part(inner)] > rank[part(name)]
    ]
    assert up == []


def test_ops_import_formats_and_packing_only():
    found = {part(inner) for name in TREES if part(name) == "ops" for inner in ours(name)}
    assert found <= {"ops", "formats", "packing", "rope", "tiling", "errors", "atomic"}


def test_nothing_imports_eval_but_the_package_and_the_commands():
    found = {name for name in TREES if any(part(inner) == "eval" for inner in ours(name))}
    assert {part(name) for name in found} <= {"", "cli", "eval"}


def test_there_are_no_cycles():
    # a package's own __init__ may gather its modules
    graph = {
        name: {inner for inner in ours(name, inside_functions=False) if not name.startswith(f"{inner}.")}
        for name in TREES
    }
    done = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for inner in graph[name]:
                visit(inner, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def run(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=SOURCE.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("code", ["import kvsight; dir(kvsight)", "import kvsight.cli"])
def test_importing_loads_nothing_heavy(code):
    heavy = "import sys; print(*{'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules))"
    assert run(f"{code}; {heavy}") == ""


def test_triton_waits_for_a_gpu():
    modules = "kvsight.ops.attend, kvsight.ops.encode, kvsight.cache.side"
    assert run(f"import sys, {modules}; print('triton' in sys.modules)") == "False"


def test_public_functions_outlive_the_modules_of_their_name():
    run(
        "import kvsight\n"
        "first = kvsight.fit, kvsight.methods\n"
        "import kvsight.fit, kvsight.methods.base\n"
        "from kvsight.methods import get\n"
        "assert (kvsight.fit, kvsight.methods) == first and all(map(callable, first))\n"
        "assert 'sight' in kvsight.methods() and kvsight.method_info('sight') is get('sight')\n"
        "from kvsight import fit, methods\n"
        "assert (fit, methods) == first"
    )


def test_every_public_name_exists():
    for name in kvsight.__all__:
        assert callable(getattr(kvsight, name))
        assert name in dir(kvsight)
    with pytest.raises(AttributeError, match="module 'kvsight' has no attribute 'nothing'"):
        _ = kvsight.nothing
