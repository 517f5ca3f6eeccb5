"""Which fields of each configuration the code reads, found in its syntax trees; a field nobody reads is a dead flag.

What counts is an attribute read of something that is annotated as the configuration: a parameter, a field of a
dataclass, or `self.NAME` that a parameter was stored in. Methods and properties of a configuration count as far as
they are used; its own checks (`__post_init__`) and what writes or compares whole configurations do not.
"""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Config:
    """A configuration class: its own fields, its bases, what each of its methods reads, and what methods return."""

    fields: set[str] = field(default_factory=set)
    bases: list[str] = field(default_factory=list)
    methods: dict[str, set[str]] = field(default_factory=dict)
    copied_to: dict[str, str] = field(default_factory=dict)


def dead_fields(package: Path) -> dict[str, set[str]]:
    """Fields of each configuration class below package/config that no code of the package reads."""
    configs = _configs(package / "config")
    direct = _direct_reads(package, configs)
    return {name: all_fields(configs, name) - _closure(configs, direct, name) - {"version"} for name in configs}


def all_fields(configs: dict[str, Config], name: str) -> set[str]:
    """Fields of a class and of its bases."""
    found = set(configs[name].fields)
    return found.union(*(all_fields(configs, base) for base in configs[name].bases if base in configs))


def _configs(folder: Path) -> dict[str, Config]:
    found = {}
    for path in sorted(folder.glob("*.py")):
        for node in _tree(path).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = _config(node)
    return found


def _config(node: ast.ClassDef) -> Config:
    config = Config(bases=[base.id for base in node.bases if isinstance(base, ast.Name)])
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            config.fields.add(item.target.id)
        elif isinstance(item, Function) and item.name != "__post_init__":
            config.methods[item.name] = set(_read_of(item, "self"))
            copies = any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "fields" for n in ast.walk(item))
            if copies and isinstance(item.returns, ast.Name):
                config.copied_to[item.name] = item.returns.id
    return config


def _direct_reads(package: Path, configs: dict[str, Config]) -> dict[str, set[str]]:
    """Attributes read of values that are annotated as each class, outside of the configurations themselves."""
    trees = [_tree(path) for path in sorted(package.rglob("*.py")) if path.parent.name != "config"]
    holders = _holders(trees, configs)
    found: dict[str, set[str]] = defaultdict(set)
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, Function):
                for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                    for name in _classes(argument.annotation, configs):
                        found[name] |= set(_read_of(node, argument.arg))
                for local, name in _aliases(node, holders):
                    found[name] |= set(_read_of(node, local))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
                for name in holders.get(node.value.attr, ()):
                    found[name].add(node.attr)
    return found


def _holders(trees: list[ast.Module], configs: dict[str, Config]) -> dict[str, set[str]]:
    """Attribute names that hold a configuration: annotated fields of classes, and `self.x = parameter`."""
    found: dict[str, set[str]] = defaultdict(set)
    for tree in trees:
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for item in ast.walk(node):
                if isinstance(item, ast.AnnAssign):
                    name = item.target.id if isinstance(item.target, ast.Name) else getattr(item.target, "attr", "")
                    found[name] |= _classes(item.annotation, configs)
                elif isinstance(item, Function):
                    kinds = {a.arg: _classes(a.annotation, configs) for a in [*item.args.args, *item.args.kwonlyargs]}
                    for assigned in (one for one in ast.walk(item) if isinstance(one, ast.Assign)):
                        for target, value in _pairs(assigned):
                            if isinstance(target, ast.Attribute) and isinstance(value, ast.Name):
                                found[target.attr] |= kinds.get(value.id, set())
    return found


def _aliases(function: Function, holders: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Local names that hold a configuration, as in `config = self.config`, with its class."""
    for assigned in (node for node in ast.walk(function) if isinstance(node, ast.Assign)):
        for target, value in _pairs(assigned):
            if isinstance(target, ast.Name) and isinstance(value, ast.Attribute):
                yield from ((target.id, name) for name in holders.get(value.attr, ()))


def _pairs(assigned: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    for target in assigned.targets:
        if isinstance(target, ast.Tuple) and isinstance(assigned.value, ast.Tuple):
            yield from zip(target.elts, assigned.value.elts, strict=False)
        else:
            yield target, assigned.value


def _read_of(function: Function, variable: str) -> Iterator[str]:
    """Attributes of a variable that a function reads; by getattr, every text that the function writes out."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == variable:
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            texts = (n.value for n in ast.walk(function) if isinstance(n, ast.Constant))
            if getattr(node.args[0], "id", "") == variable:
                yield from (text for text in texts if isinstance(text, str))


def _classes(annotation: ast.expr | None, configs: dict[str, Config]) -> set[str]:
    """Configuration classes that an annotation names."""
    if annotation is None:
        return set()
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    names = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(annotation)}
    return names & set(configs)


def _closure(configs: dict[str, Config], direct: dict[str, set[str]], name: str) -> set[str]:
    """What is read of a class: directly, as one of its bases, by its methods that are used, and of its copies."""
    family = [name]
    for one in family:
        family += [base for base in configs[one].bases if base in configs]
    found = set().union(*(direct.get(one, set()) for one in family))
    methods = {method: reads for one in family for method, reads in configs[one].methods.items()}
    copies = {method: target for one in family for method, target in configs[one].copied_to.items()}
    waiting = [method for method in methods if method in found]
    seen = set()
    while waiting:
        method = waiting.pop()
        if method in seen:
            continue
        seen.add(method)
        found |= methods[method]
        if method in copies:
            found |= _closure(configs, direct, copies[method])
        waiting += [other for other in methods if other in found]
    return found


def _tree(path: Path) -> ast.Module:
    return _parsed(path.read_text(encoding="utf-8"))


@functools.cache
def _parsed(text: str) -> ast.Module:
    """Once for each text: copies of the package differ in one file."""
    return ast.parse(text)
