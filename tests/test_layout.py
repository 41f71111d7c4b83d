"""The house: a module imports only from floors below it, and `import nyscaled` needs little."""

import ast
import importlib
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nyscaled"
FLOORS = {
    "typing": 0,
    "_outcome": 0,
    "_pytree": 0,
    "_files": 0,
    "matrices": 0,
    "operators": 0,
    "numerics": 0,
    "lapack": 0,
    "linalg": 0,
    "validation": 0,
    "spectra": 0,
    "problems": 1,
    "initializers": 1,
    "transforms": 1,
    "optimality": 1,
    "dynamics": 1,
    "solvers": 2,
    "lowrank": 2,
    "lora": 3,
    "models": 4,
    "diffusion": 4,
    "checkpoints": 2,
    "sklearn": 3,
    "finetune": 5,
    "cli": 6,
}
# Rooms that may be used from their own floor: starts belong to problems, and diffusion is made of
# the blocks of language models.
SHARED = {name for name, floor in FLOORS.items() if floor == 0} | {"problems", "models"}
MODULES = sorted(
    p for p in PACKAGE.rglob("*.py") if p.name != "conftest.py" and p != PACKAGE / "__init__.py"
)


def test_every_room_of_the_floors_exists():
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__", "conftest"} == set(FLOORS)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of every import in the file, those inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {n.split(".")[1] for n in names if n.startswith("nyscaled.")}
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_floors_below(path):
    mine = room(path)
    for other in imported_rooms(path) - {mine}:
        below = FLOORS[other] < FLOORS[mine]
        assert below or (FLOORS[other] == FLOORS[mine] and other in SHARED), f"{mine} → {other}"


def test_no_function_of_a_room_has_the_name_of_a_module_in_it():
    """The reference would leave it out, because the module of that name hides it."""
    for init in PACKAGE.rglob("__init__.py"):
        room = importlib.import_module(".".join(init.parent.relative_to(ROOT).parts))
        for name in getattr(room, "__all__", ()):
            if (init.parent / f"{name}.py").exists():
                assert isinstance(getattr(room, name), types.ModuleType), f"{room.__name__}.{name}"


def test_library_needs_only_jax_optax_jaxtyping_numpy():
    code = "import sys, nyscaled; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    # Not chex, which optax 0.2.5 and 0.2.6 import.
    heavy = {"flax", "matplotlib", "tyro", "tqdm", "scipy.io", "torch", "sklearn", "mpmath"}
    assert not heavy & set(loaded.stdout.split())


def test_library_leaves_global_configuration_alone():
    code = (
        "import jax; before = dict(jax.config.values); import nyscaled;"
        "assert dict(jax.config.values) == before; import os"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scripts_use_public_names_only():
    for folder in ("experiments", "paper_checks", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nyscaled"):
                    private = [a.name for a in node.names if a.name.startswith("_")]
                    assert not private, f"{path} imports {private}"
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    private = node.attr.startswith("_") and node.attr != "__version__"
                    assert not (node.value.id == "nys" and private), path


def test_any_is_used_no_more_than_it_was():
    """A ratchet: lower the number with each type that is found."""
    words = sum(len(re.findall(r"\bAny\b", path.read_text())) for path in PACKAGE.rglob("*.py"))
    assert words <= 597
