"""The imports of a package as a graph, and the names that it uses, read from syntax trees.

Nothing is imported.  An import counts wherever it stands: at the top, inside a
function, under ``if TYPE_CHECKING``, as ``import_module("...")``, or as the
discovery of a package's modules, which is a call that takes ``__path__``.
"""

import ast
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, kw_only=True)
class Module:
    """One file of a package."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def is_package(self):
        return self.path.name == "__init__.py"

    @property
    def package(self):
        """Name of the package that relative imports start from."""
        return self.name if self.is_package else self.name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Import:
    """One arrow: the importer makes Python run the imported module."""

    importer: str
    imported: str
    line: int
    #: Runs when a function is called, after the importer is loaded.
    late: bool
    #: Never runs: stands under ``if TYPE_CHECKING``.
    unreal: bool


class Package:
    """The modules of a package, whose subpackages may lie in other folders.

    Parameters
    ----------
    folders : dict
        Folders by the full name of the package that each holds; links in them are not followed.
    """

    def __init__(self, folders):
        self.modules = {}
        for package, folder in folders.items():
            for path in sorted(folder.rglob("*.py")):
                inner = path.relative_to(folder).with_suffix("").parts
                name = ".".join([package, *(part for part in inner if part != "__init__")])
                self.modules[name] = Module(name=name, path=path, tree=ast.parse(path.read_text()))

    @cached_property
    def imports(self):
        """Every import of one module of the package by another, directly or as its ``__init__``."""
        return [arrow for module in self.modules.values() for arrow in self._arrows(module)]

    @cached_property
    def outside(self):
        """Every import of another package, by the name of its root."""
        found = []
        for module in self.modules.values():
            for node, late, unreal in walk(module.tree):
                for name in self._imported_names(module, node):
                    root = name.partition(".")[0]
                    if root not in self.modules:
                        found.append(_arrow(module, root, node, late, unreal))
        return found

    @cached_property
    def names(self):
        """What `names` finds in each module."""
        return {name: list(names(module.tree)) for name, module in self.modules.items()}

    def loaded(self, module):
        """Return what loading a module runs: a way of imports to each module and each outside package."""
        ways = _ways(self._at_once, module)
        for parent in ancestors(module):
            ways = _ways(self._at_once, parent) | ways
        return ways

    @cached_property
    def _at_once(self):
        arrows = [*self.imports, *self.outside]
        return by_importer(arrow for arrow in arrows if not arrow.late and not arrow.unreal)

    def _arrows(self, module):
        found = {}
        for node, late, unreal in walk(module.tree):
            for name in self._imported_names(module, node):
                # A module's own ancestors have run before it, but a name taken from one is an import.
                parents = [parent for parent in ancestors(name) if parent not in ancestors(module.name)]
                for target in [name, *parents]:
                    if target in self.modules and target != module.name:
                        arrow = _arrow(module, target, node, late, unreal)
                        found.setdefault((target, late, unreal), arrow)
        return found.values()

    def _imported_names(self, module, node):
        """Yield the full name of each module that a node imports."""
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    parts = module.package.split(".")
                    base = ".".join([*parts[: len(parts) - level + 1], *filter(None, [base])])
                for alias in names:
                    name = f"{base}.{alias.name}"
                    yield name if name in self.modules else base
            case ast.Call():
                yield from self._named_by_call(module, node)

    def _named_by_call(self, module, call):
        if any(isinstance(value, ast.Name) and value.id == "__path__" for value in call.args):
            # Discovery: the package imports its modules, whatever they are.
            yield from self._children(module.package)
        if ast.unparse(call.func).rpartition(".")[2] not in ("import_module", "__import__"):
            return
        match call.args:
            case [ast.Constant(value=str() as name), *_]:
                yield name
            case [ast.JoinedStr(values=[ast.Constant(value=str() as start), *_]), *_]:
                # A module by its name: one of those that the importer's own strings name.
                named = {text.replace("-", "_") for text in strings(module.tree)}
                children = self._children(start.removesuffix("."))
                yield from (name for name in children if name.rpartition(".")[2] in named)

    def _children(self, package):
        for name in self.modules:
            parent, _, own = name.rpartition(".")
            if parent == package and not own.startswith("_"):
                yield name


def _arrow(module, imported, node, late, unreal):
    return Import(importer=module.name, imported=imported, line=node.lineno, late=late, unreal=unreal)


def walk(tree):
    """Yield every node, whether it runs after the module is loaded, and whether it never runs."""
    # Functions that the module calls by itself run while it is loaded.
    called = {node.func.id for node in _run_on_load(tree) if _is_call_by_name(node)}
    stack = [(tree, False, False)]
    while stack:
        node, late, unreal = stack.pop()
        yield node, late, unreal
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            late = late or getattr(node, "name", None) not in called
        skipped = node.body if isinstance(node, ast.If) and _is_for_checkers(node.test) else ()
        stack += [(child, late, unreal or child in skipped) for child in ast.iter_child_nodes(node)]


def _run_on_load(node):
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*FUNCTIONS, ast.Lambda)):
            yield from _run_on_load(child)


def _is_for_checkers(test):
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _is_call_by_name(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def ancestors(name):
    """Names of the packages that hold a module, nearest first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def strings(tree):
    """Every text in a tree."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def by_importer(arrows):
    leaving = {}
    for arrow in arrows:
        leaving.setdefault(arrow.importer, []).append(arrow)
    return leaving


def cycles(arrows):
    """Return a shortest cycle, as text, of each tangle of modules that reach each other."""
    leaving, tangled, found = by_importer(arrows), set(), []
    for start in sorted(leaving):
        ways = _ways(leaving, start)
        if start in ways and start not in tangled:
            found.append(shown(ways[start]))
            tangled |= {name for name in ways if start in _ways(leaving, name)}
    return found


def _ways(leaving, start):
    """Return a shortest way of imports from ``start`` to every module that it reaches."""
    ways, queue = {}, deque([(start, [])])
    while queue:
        name, way = queue.popleft()
        for arrow in leaving.get(name, ()):
            if arrow.imported not in ways:
                ways[arrow.imported] = [*way, arrow]
                queue.append((arrow.imported, ways[arrow.imported]))
    return ways


def shown(way):
    """Return a way of imports as text, each module with the line of its import."""
    return "".join(f"{arrow.importer}:{arrow.line} -> " for arrow in way) + way[-1].imported


def upward_imports(package, rooms, top):
    """Return a line for each import of a higher room, or of another room of the same level.

    Parameters
    ----------
    package : Package
    rooms : tuple of tuples of str
        Levels from the bottom to the top.  A room holds a module or a package with all below it that
        is in no narrower room; ``a.__init__`` is that one file.
    top : str
        Name of the whole package, which precedes the names of rooms.
    """
    levels = {f"{top}.{room}": level for level, row in enumerate(rooms) for room in row}
    faults = []
    for arrow in package.imports:
        if top in (arrow.importer, arrow.imported):
            continue
        lower, upper = (room_of(package.modules[n], levels) for n in (arrow.imported, arrow.importer))
        if lower != upper and levels[lower] >= levels[upper]:
            path = package.modules[arrow.importer].path
            faults.append(f"{path}:{arrow.line}: {upper} imports {arrow.imported} of {lower}")
    return faults


def room_of(module, rooms):
    """Return the narrowest room that holds a module; KeyError where none does."""
    names = [f"{module.name}.__init__"] if module.is_package else []
    for name in [*names, module.name, *ancestors(module.name)]:
        if name in rooms:
            return name
    raise KeyError(f"{module.name} has no room; give it a place in the order")


def names(tree):
    """Yield each name that a module uses, with its line.

    Imported names come in full: ``np.rint`` as ``numpy.rint``.  Of anything
    else the attributes that are called come, as ``*.name``.
    """
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                imported[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    stack = [(tree, False)]
    while stack:
        node, called = stack.pop()
        attributes, root = [], node
        while isinstance(root, ast.Attribute):
            attributes.insert(0, root.attr)
            root = root.value
        if isinstance(root, ast.Name) and (root.id in imported or not attributes):
            yield ".".join([imported.get(root.id, root.id), *attributes]), node.lineno
        elif attributes and called:
            yield f"*.{attributes[-1]}", node.lineno
        if attributes and not isinstance(root, ast.Name):
            stack.append((root, False))
        elif not attributes:
            function = node.func if isinstance(node, ast.Call) else None
            stack += [(child, child is function) for child in ast.iter_child_nodes(node)]
