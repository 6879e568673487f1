"""The stubs say what the compiled modules have."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def members(tree: ast.Module) -> dict[str, dict[str, ast.FunctionDef]]:
    """Return the functions of a stub: of each class by its name, of the module under ''."""
    found: dict[str, dict[str, ast.FunctionDef]] = {"": {}}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[""][node.name] = node
        elif isinstance(node, ast.ClassDef):
            found[node.name] = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    return found


def public(owner: object) -> set[str]:
    return {name for name in vars(owner) if not name.startswith("_")}


@pytest.mark.parametrize("name", ["pkgindex._core", "pkgindex.store._disk"])
def test_the_stub_names_all_that_the_module_has_and_its_arguments(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    stub = Path(module.__file__).with_name(name.rpartition(".")[2] + ".pyi")
    tree = ast.parse(stub.read_text())
    described = members(tree)
    plain = {
        node.name: {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}  # type: ignore[union-attr]
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    own = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == name
    }
    assert own == (described.keys() - {""}) | described[""].keys()
    for owner, functions in described.items():
        if owner:
            has = public(getattr(module, owner))
            assert has == {f for f in functions if f[0] != "_"} | plain[owner], owner
        for function, node in functions.items():
            if function.startswith("__") or node.decorator_list:
                continue
            real = getattr(getattr(module, owner) if owner else module, function)
            arguments = list(inspect.signature(real).parameters)
            assert arguments == [argument.arg for argument in node.args.args], function
