"""Calls of layers in a syntax tree, as links of a chain, and the expressions generated for them."""

import ast
from typing import NamedTuple

RUN, CALL, ADD, ADD_TO = (f"__fastcnn_{name}__" for name in ("run", "call", "add", "add_to"))
MAKERS = ("conv", "bn", "linear")  # roles of layers whose output is a new tensor
ANY = "?"  # a callee known only at run time, such as the variable of a loop


class Callee(NamedTuple):
    """What an expression such as ``self.conv1`` or ``F.relu`` stands for: `role` is what it can be in a stage.

    A test, such as ``self.bn is not None``, has the role `true` or `false` where its module decides it.
    """

    kind: str  # layer, function, layers or test
    role: str | None


class Link(NamedTuple):
    """One call of a chain: ``callee(inner, …)``, ``inner.method(…)``, ``inner + …`` or, alone, ``name += …``.

    An ``if`` around such calls is one link as well: `branches` are the calls where its test holds and where it does
    not, and `text` is the test.
    """

    node: ast.Call | ast.BinOp | ast.AugAssign | ast.If
    inner: ast.expr
    text: str  # of the callee
    role: str | None
    item: ast.expr  # the argument for it in the call of a stage
    branches: tuple[list["Link"], list["Link"]] | None = None

    @property
    def is_layer(self) -> bool:
        """Whether the callee is a layer, which itself is the argument, rather than a function."""
        return isinstance(self.node, ast.Call) and self.item is self.node.func

    def calls(self, undecided: bool) -> list["Link"]:
        """Return the calls that run, where `undecided` tests are taken to hold or not."""
        if self.branches is None:
            return [self]
        holds = undecided if self.role is None else self.role == "true"
        return [call for link in self.branches[not holds] for call in link.calls(undecided)]

    def applied(self, inner: ast.expr) -> ast.expr:
        """Return the call on another input."""
        node = self.node
        assert not isinstance(node, ast.If)
        if not isinstance(node, ast.Call):
            right = node.right if isinstance(node, ast.BinOp) else node.value
            return ast.copy_location(ast.BinOp(inner, ast.Add(), right), node)
        function, args = node.func, [inner, *node.args[1:]]
        if self.text.startswith("."):
            assert isinstance(function, ast.Attribute)
            function, args = ast.copy_location(ast.Attribute(inner, function.attr, ast.Load()), function), []
        return ast.copy_location(ast.Call(function, args, node.keywords), node)


class Step(NamedTuple):
    """A statement ``target = chain``, with or without an annotation, ``return chain``, ``target += …`` or an ``if``."""

    statement: ast.Assign | ast.AnnAssign | ast.Return | ast.AugAssign | ast.If
    target: str | None
    head: ast.expr
    links: list[Link]

    def uses(self, name: str) -> int:
        """Count how often it takes a variable; an ``if`` takes its own once on each way."""
        statement = self.statement
        if isinstance(statement, ast.If):
            return int(is_name(self.head, name))
        value = statement if isinstance(statement, ast.AugAssign) else statement.value or statement
        return sum(is_name(each, name) for each in ast.walk(value))

    def ended(self, value: ast.expr) -> ast.stmt:
        """Return the statement that gives its target a value."""
        if isinstance(self.statement, ast.If):
            made = ast.Assign([ast.Name(self.target or "", ast.Store())], value)
            return ast.fix_missing_locations(ast.copy_location(made, self.statement))
        if not isinstance(self.statement, ast.AugAssign):
            self.statement.value = value
        return self.statement


class Found(NamedTuple):
    """A stage that the rewritten function runs as one call."""

    texts: tuple[str, ...]  # of the callees
    roles: tuple[str, ...]
    source: str
    runs: bool = True  # False in a branch that the attributes of the module rule out


class Part(NamedTuple):
    """Links that run as one stage, or one link by itself: then `found` is None."""

    links: list[Link]
    found: Found | None


def simple(node: ast.expr) -> bool:
    """Whether an expression only reads, so that it may be read a little earlier."""
    if isinstance(node, (ast.Constant, ast.Name)):
        return True
    if isinstance(node, ast.Attribute):
        return simple(node.value)
    if isinstance(node, ast.Subscript):
        return simple(node.value) and simple(node.slice)
    if isinstance(node, (ast.Tuple, ast.List)):
        return all(map(simple, node.elts))
    if isinstance(node, (ast.BoolOp, ast.Compare, ast.IfExp)):
        return all(simple(each) for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr))
    return isinstance(node, ast.UnaryOp) and simple(node.operand)


def is_name(node: ast.AST, name: str | None) -> bool:
    """Whether a node is this variable."""
    return isinstance(node, ast.Name) and node.id == name


def call_of(name: str, args: list[ast.expr], keywords: list[ast.keyword] | None = None) -> ast.Call:
    """Return the call of a variable."""
    return ast.Call(ast.Name(name, ast.Load()), args, keywords or [])


def run_of(args: list[ast.expr], where: ast.AST) -> ast.expr:
    """Return the call that runs layers as one; it and its unpositioned children get the source position of `where`."""
    return ast.fix_missing_locations(ast.copy_location(call_of(RUN, args), where))
