"""Imports go down only; orchestration stays out of the library; optional packages are imported where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ORDER = [
    {"errors"},
    {"documents", "redaction"},
    {"files", "settings", "tensors", "threads", "worker_main", "workers"},
    {"device", "hashes"},
    {"checkpoint", "formats", "store"},
    {"models", "proxies"},
    {"calibration", "plan", "run"},
    {"artifact"},
    {"quantize"},
    {"engine", "transfer"},
    {"evaluation"},
    {"distill"},
    {"report"},
    {"stages"},
    {"deep_verify", "dry_run", "publish"},
    {"family"},
    {"ablations"},
    {"cli"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
OPTIONAL = {"prefect", "prefect_dask", "dask", "dvc", "datasets", "lm_eval", "transformers", "pandas", "scipy"}


def imported(tree: ast.AST, *, top_only: bool) -> set[str]:
    nodes = list(ast.iter_child_nodes(tree)) if top_only else list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {
        f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "rwkvq").parts[0].removesuffix(".py")


def test_every_room_has_a_rank() -> None:
    rooms = {room_of(path) for path in (ROOT / "rwkvq").rglob("*.py")} - {"__init__"}
    assert rooms == set(RANK)


def test_rooms_import_lower_rooms_only() -> None:
    wrong = []
    for path in (ROOT / "rwkvq").rglob("*.py"):
        room = room_of(path)
        for name in imported(ast.parse(path.read_text()), top_only=False):
            head, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            is_outside = head in ("tasks", "flows", "prefect", "dvc")
            if is_outside or (head == "rwkvq" and other != room and RANK[other] >= RANK[room]):
                wrong.append(f"{path}: {name}")
    assert not wrong


def test_optional_packages_are_not_imported_at_module_level() -> None:
    wrong = []
    for path in (ROOT / "rwkvq").rglob("*.py"):
        tops = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()), top_only=True)}
        wrong += [f"{path}: {name}" for name in tops & OPTIONAL]
    assert not wrong


def test_help_does_not_import_torch() -> None:
    code = "import sys, rwkvq.cli; rwkvq.cli.run_app(rwkvq.cli.app, ['--help']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.strip().splitlines()[-1] == "False"
    assert "quantize" in shown


def test_nothing_imports_flows() -> None:
    for folder in ("rwkvq", "tasks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not any(name.startswith("flows") for name in imported(ast.parse(path.read_text()), top_only=False))
