"""Which models a script builds, read off its source: nothing of it is run.

Found are calls of nnsight's model classes whose repo id is a literal, or a name that the module binds once to a
literal. Whatever else decides it (arguments, a loop, a function's parameter) only the script knows when it runs, and
its author has to say.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..errors import EnvelopeError, ModelError
from .envelope import NamedModel

TASKS = {
    "TransformersModel": None,
    "LanguageModel": "text-generation",
    "VisionLanguageModel": "image-text-to-text",
}
"""nnsight's classes, and the task that each means when none is named."""


def models_in(source: str, file: str = "script.py") -> list[NamedModel]:
    """The models that this script builds, in the order of their first mention, each once.

    Raises:
        EnvelopeError: it is no Python.
        ModelError: it builds none, or one whose name cannot be told.
    """
    try:
        tree = ast.parse(source, file)
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f" in line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        raise EnvelopeError(f"{file} is no Python{line}: {what}.") from None
    constants = _constants(tree)
    found = [_model(call, name, constants, file) for call, name in _calls(tree)]
    if not found:
        raise ModelError(
            f"{file} builds no model that can be seen (TransformersModel(...), LanguageModel(...)); "
            "name what it needs with --model ORG/NAME."
        )
    return list(dict.fromkeys(found))


def _calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    aliases = {
        alias.asname: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname and alias.name in TASKS
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        called = call.func
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        name = aliases.get(name, name)
        if name in TASKS:
            yield call, name


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Names that the module binds once, to a literal, and nothing else in it binds."""
    bound = Counter(name for node in ast.walk(tree) for name in _bound(node))
    literal: dict[str, Any] = {}
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
        value = getattr(statement, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and bound[target.id] == 1:
                literal[target.id] = value.value
    return literal


def _bound(node: ast.AST) -> list[str]:
    """The names that this node binds, in whatever scope."""
    if isinstance(node, ast.Name):
        return [node.id] if isinstance(node.ctx, ast.Store) else []
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.alias):
        return [(node.asname or node.name).partition(".")[0]]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
        return [node.name]
    return [node.rest] if isinstance(node, ast.MatchMapping) and node.rest else []


def _model(call: ast.Call, name: str, constants: dict[str, Any], file: str) -> NamedModel:
    given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    unclear = ModelError(
        f"Which model {file} builds in line {call.lineno} is only known when it runs; "
        "name all that it needs with --model ORG/NAME."
    )

    def literal(expression: ast.expr, kind: type) -> Any:
        value = constants.get(expression.id, ...) if isinstance(expression, ast.Name) else ...
        value = expression.value if isinstance(expression, ast.Constant) else value
        if value is not None and not isinstance(value, kind):
            raise unclear
        return value

    def option(field: str, default: Any, kind: type) -> Any:
        value = literal(given[field], kind) if field in given else None
        return default if value is None else value

    first = call.args[0] if call.args else given.get("repo_id")
    repo_id = literal(first, str) if first is not None else None
    if repo_id is None:
        raise unclear
    return NamedModel(
        repo_id=repo_id,
        revision=option("revision", None, str),
        task=option("task", TASKS[name], str),
        trust_remote_code=option("trust_remote_code", False, bool),
    )
