"""What surprises users of remote blocks, said before the request waits in a queue for it.

The block runs elsewhere, on copies. What follows from that, Python does not tell: values come back empty, code is
skipped, or an error comes after an hour of waiting. Each check reads the block's source and the names it uses; none
runs anything. They are warnings because they guess: `warnings.filterwarnings("ignore",
category=edif_hpc.SurpriseWarning)` silences them.

Two known surprises have no check. A body on the line of its `with` is refused by nnsight before this is reached where
the `with` is the outermost, and packing moves inner ones to lines of their own. A saved slice does not ship its whole
storage, since the service compacts it.
"""

from __future__ import annotations

import ast
import collections
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.tracing.tracer import Tracer

from ._errors import Misused
from ._warning import SurpriseWarning

CONTAINERS = (list, dict, set, collections.deque)
FILLING = frozenset({"append", "extend", "insert", "add", "update", "setdefault", "appendleft", "extendleft"})
GENERATING = frozenset({"generate", "pipe"})
CACHE_READS = frozenset({"keys", "output", "inputs", "input"})
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
OTHERS = (Envoy, Tracer, ModuleType)
"""Not the user's own, or not to be looked into."""
PLAIN = (torch.Tensor, str, bytes, int, float, complex, bool, type(None))

FILLED = (
    "{name!r} is made outside the block and filled inside it: the service fills a copy, and yours stays as it is; make "
    "it inside the block and save it."
)
NEVER = (
    "This line never runs: the loop before it goes over all steps without an end; give it one, as tracer.iter[:8], or "
    "move this line into a block of its own."
)
WALKED = (
    "A cache that came back from the service has no model to walk through: read it by path, as "
    '{name}["model.transformer.h.0"].output; {name}.keys() lists the paths.'
)
NO_GRADIENTS = (
    "There are no gradients inside generate, and backward will raise: take them in a trace over the finished tokens."
)
UNPACKED = (
    "What is saved here is taken apart at once, and its parts are not what is saved: save it under one name, and take "
    "it apart outside the block."
)

Found = tuple[int, str]
"""A line of the user's file, and a sentence."""


def warn(tracer: Tracer) -> None:
    """Warn of each surprise in a captured block, at the user's own line."""
    frame = tracer.info.frame
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__") or "__main__"  # without a name nothing would be said
    for line, sentence in look(tracer):
        warnings.warn_explicit(sentence, SurpriseWarning, frame.f_code.co_filename, line, module, registry)


def look(tracer: Tracer) -> list[Found]:
    """The surprises of a captured block, in the order of their lines."""
    frame, body = tracer.info.frame, tracer.node.body
    names = {**frame.f_globals, **frame.f_locals}
    found = [*_filled_outside(body, names), *_after_endless(body), *_gradients(tracer), *_unpacked(body)]
    found += _cache_walked(tracer)
    return sorted(dict.fromkeys(found))


# -- 0: saved and taken apart in one line ------------------------------------------------------------------------------


def _unpacked(body: list[ast.stmt]) -> Iterator[Found]:
    """`one, other = both.save()`: the mark is on what held them."""
    for node in _nodes(body):
        if isinstance(node, ast.Assign) and _saves(node.value) and any(map(_several, node.targets)):
            yield node.lineno, UNPACKED


def _several(target: ast.expr) -> bool:
    return isinstance(target, (ast.Tuple, ast.List))


def _saves(value: ast.expr) -> bool:
    """Whether this is a call of `….save(…)`: a value's own, or nnsight's."""
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "save"


# -- 1: made outside, filled inside ------------------------------------------------------------------------------------


def _filled_outside(body: list[ast.stmt], names: dict[str, Any]) -> Iterator[Found]:
    own = _made(body) | _saved(body)
    told: set[str] = set()
    for node in _nodes(body):
        place = _filled(node)
        name, *path = _path(place)
        if place is None or name in own | told or name not in names:
            continue
        if _changes(node, _at(names[name], path)):
            told.add(name)
            yield place.lineno, FILLED.format(name=name)


def _filled(node: ast.AST) -> ast.expr | None:
    """What a node fills, by a method, an item, an attribute or `+=`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FILLING:
        return node.func.value
    if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return node.value
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        return node.target
    return None


def _path(place: ast.expr | None) -> list[str]:
    """The name that `a.b["c"][0]` begins with, and the way from there: a, b, "", ""; a first "" for anything else."""
    path: list[str] = []
    while isinstance(place, (ast.Attribute, ast.Subscript)):
        path.append(place.attr if isinstance(place, ast.Attribute) else "")
        place = place.value
    return [place.id if isinstance(place, ast.Name) else "", *reversed(path)]


def _at(value: Any, path: list[str]) -> Any:
    """What lies there, or one of its kind: any item stands for all of them. None where that takes running something."""
    for attribute in path:
        if isinstance(value, OTHERS):
            return None
        if attribute:
            value = vars(value).get(attribute) if hasattr(value, "__dict__") else None
        elif isinstance(value, CONTAINERS):
            items = value.values() if isinstance(value, dict) else value
            value = next(iter(items), [])
        elif not isinstance(value, torch.Tensor):
            return None
    return value


def _changes(node: ast.AST, value: Any) -> bool:
    """Whether a node that fills this value fills something of the user's own."""
    if isinstance(node, ast.Attribute):
        return not isinstance(value, (*OTHERS, *PLAIN))
    arrays = isinstance(node, ast.Subscript) and (isinstance(value, torch.Tensor) or type(value).__name__ == "ndarray")
    return isinstance(value, CONTAINERS) or arrays


def _made(body: list[ast.stmt]) -> set[str]:
    """Names that the block makes itself, as opposed to adding to what they are."""
    added = {id(node.target) for node in _nodes(body) if isinstance(node, ast.AugAssign)}
    stored = [node for node in _nodes(body) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return {node.id for node in stored if id(node) not in added}


# -- 2: after a loop without an end ------------------------------------------------------------------------------------


def _after_endless(body: list[ast.stmt]) -> Iterator[Found]:
    """The first statement that follows an unbounded loop over a tracer's steps, in its own list or in one around it."""
    for statement, following in itertools.zip_longest(body, body[1:]):
        for inner in [] if _endless(statement) else _lists(statement):
            yield from _after_endless(inner)
        if _runs_on(statement):
            if following is not None:
                yield following.lineno, NEVER
            return


def _runs_on(statement: ast.stmt) -> bool:
    """Whether nothing behind this statement is reached. What follows an invoke is another one's."""
    if _endless(statement):
        return True
    if isinstance(statement, (ast.With, ast.FunctionDef)):
        return False
    return any(_runs_on(inner) for inners in _lists(statement) for inner in inners)


def _endless(statement: ast.stmt) -> bool:
    """`for … in X.iter[…:]` without an end, or `in X.all()`; the same in a `with`."""
    if isinstance(statement, ast.With):
        return any(_all_steps(item.context_expr) for item in statement.items)
    return isinstance(statement, ast.For) and _all_steps(statement.iter)


def _all_steps(over: ast.expr) -> bool:
    if isinstance(over, ast.Subscript) and isinstance(over.value, ast.Attribute) and over.value.attr == "iter":
        return isinstance(over.slice, ast.Slice) and over.slice.upper is None
    return (
        isinstance(over, ast.Call)
        and isinstance(over.func, ast.Attribute)
        and over.func.attr == "all"
        and not over.args
    )


# -- 3: a returned cache -----------------------------------------------------------------------------------------------


def _cache_walked(tracer: Tracer) -> Iterator[Found]:
    """Reads of a cache after the block that walk through the model, which a cache that came back has no more."""
    caches = {
        target.id
        for node in _nodes(tracer.node.body)
        if isinstance(node, ast.Assign) and _is_cache(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if not caches:
        return
    try:
        tree = ast.parse(Tracer.source(tracer.info.frame.f_code.co_filename))
    except (SyntaxError, SystemError):  # the latter from CPython 3.11, when greenlets are collected meanwhile
        return
    end = tracer.node.end_lineno or tracer.node.lineno
    for node in _scope_nodes(_scope(tree, end)):
        if not isinstance(node, (ast.Attribute, ast.Subscript)) or node.lineno <= end:
            continue
        if not isinstance(node.value, ast.Name) or node.value.id not in caches:
            continue
        walks = isinstance(node, ast.Attribute) and node.attr not in CACHE_READS
        walks |= (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, int)
        )
        if walks:
            yield node.lineno, WALKED.format(name=node.value.id)
            return


def _is_cache(value: ast.expr) -> bool:
    """`X.cache(…)`, or that with `.save()` behind it."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "save":
        value = value.func.value
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "cache"


# -- 4: gradients while generating -------------------------------------------------------------------------------------


def _gradients(tracer: Tracer) -> Iterator[Found]:
    called = getattr(tracer, "fn", None)
    generating = getattr(called, "__name__", called) in GENERATING
    blocks = [tracer.node.body] if generating else []
    for node in _nodes(tracer.node.body):
        if isinstance(node, ast.With) and _called(node) & GENERATING:
            blocks.append(node.body)
    for block in blocks:
        for node in _nodes(block):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward":
                yield node.lineno, NO_GRADIENTS


def _called(node: ast.With) -> set[str]:
    """The methods that a `with` enters, by name."""
    calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
    return {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}


# -- 6: a tracer that is left over -------------------------------------------------------------------------------------


def refuse_dead_tracers(tracer: Tracer) -> None:
    """Refuse a block that uses a tracer of an earlier one: it cannot be packed.

    Raises:
        Misused: the sentence names it.
    """
    frame, body = tracer.info.frame, tracer.node.body
    bound = _bound(body)
    for node in _nodes(body):
        if not isinstance(node, ast.Name) or node.id in bound:
            continue
        if _is_dead(frame.f_locals.get(node.id, frame.f_globals.get(node.id))):
            raise Misused(
                f"{node.id!r} is left from an earlier block, and its time is over: use the name that the `with … as` "
                "of this block gives."
            )


@contextmanager
def without_dead_tracers(tracer: Tracer) -> Iterator[None]:
    """Hide from the packing what earlier blocks left: a tracer without its frame, under a name that this block binds
    anew.

    nnsight packs every name that the block reads, this one too, and fails on it. The frame gets it back.
    """
    frame = tracer.info.frame
    bound = _bound(tracer.node.body)
    dead = {name: value for name, value in frame.f_locals.items() if name in bound and _is_dead(value)}
    dead_globals = {name: value for name, value in frame.f_globals.items() if name in bound and _is_dead(value)}
    if not dead and not dead_globals:
        yield
        return
    kept = tracer.info
    tracer.info = type(kept)(_Without(frame, dead, dead_globals), kept.code)
    try:
        yield
    finally:
        tracer.info = kept


class _Without:
    """A frame without some names, as far as packing looks at one."""

    def __init__(self, frame: Any, dead: dict[str, Any], dead_globals: dict[str, Any]) -> None:
        self.f_code = frame.f_code
        self.f_locals = {name: value for name, value in frame.f_locals.items() if name not in dead}
        self.f_globals = {name: value for name, value in frame.f_globals.items() if name not in dead_globals}


def _is_dead(value: Any) -> bool:
    return isinstance(value, Tracer) and value.info is not None and value.info.frame is None


# -- reading source ----------------------------------------------------------------------------------------------------


def _nodes(body: list[ast.stmt]) -> Iterator[ast.AST]:
    for statement in body:
        yield from ast.walk(statement)


def _scope(tree: ast.AST, line: int) -> ast.AST:
    """The innermost function around a line, else the whole."""
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    around = [node for node in functions if node.lineno <= line <= (node.end_lineno or 0)]
    return max(around, key=lambda node: node.lineno, default=tree)


def _scope_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """What belongs to a scope itself, and not to a function inside it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, FUNCTIONS):
            yield child
            yield from _scope_nodes(child)


def _lists(statement: ast.stmt) -> list[list[ast.stmt]]:
    """The lists of statements inside one."""
    found = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
    return [inner for inner in found if inner and isinstance(inner[0], ast.stmt)]


def _bound(body: list[ast.stmt]) -> set[str]:
    """Names that the block binds itself."""
    return {node.id for node in _nodes(body) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _saved(body: list[ast.stmt]) -> set[str]:
    """Names that the block saves: `name.save()`, `save(name)`, `nnsight.save(name)`."""
    saved = set()
    for node in _nodes(body):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "save" and isinstance(function.value, ast.Name):
            saved.add(function.value.id)
        named = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if named == "save":
            saved |= {value.id for value in node.args if isinstance(value, ast.Name)}
    return saved
