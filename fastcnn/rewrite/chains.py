"""Layers called one after another in a function's syntax tree, and the tree in which stages of them are one call.

Only what nobody else can see changes: an intermediate value goes away where the next call is its one use. Everything
else in the function, and the order in which it happens, stays.
"""

import ast
from collections.abc import Callable
from typing import Any, NamedTuple

from fastcnn.calls import METHODS

RUN, CALL, METHOD, ADD, ADD_TO = (f"__fastcnn_{name}__" for name in ("run", "call", "method", "add", "add_to"))
MAKERS = ("conv", "bn", "linear")  # roles of layers whose output is a new tensor
ANY = "?"  # a callee that is known when it runs, such as the variable of a loop


class Callee(NamedTuple):
    """What an expression such as ``self.conv1`` or ``F.relu`` stands for: `role` is what it can be in a stage."""

    kind: str  # layer, function or layers
    role: str | None


class Link(NamedTuple):
    """One call of a chain: ``callee(inner, …)``, ``inner.method(…)``, ``inner + …`` or, alone, ``name += …``."""

    node: ast.Call | ast.BinOp | ast.AugAssign
    inner: ast.expr
    text: str  # of the callee
    role: str | None
    item: ast.expr  # what a stage is given for it

    @property
    def is_layer(self) -> bool:
        """Whether the callee itself is what a stage is given, not a call of a function."""
        return isinstance(self.node, ast.Call) and self.item is self.node.func


class Step(NamedTuple):
    """A statement ``target = chain``, with or without an annotation, ``return chain`` or ``target += …``."""

    statement: ast.Assign | ast.AnnAssign | ast.Return | ast.AugAssign
    target: str | None
    head: ast.expr
    links: list[Link]


class Found(NamedTuple):
    """A stage that the rewritten function runs as one call."""

    line: int
    texts: tuple[str, ...]  # of the callees
    roles: tuple[str, ...]
    source: str


class Part(NamedTuple):
    """Links that run as one stage, or one link by itself: then `roles` is None."""

    links: list[Link]
    roles: tuple[str, ...] | None
    source: str  # of the stage


# Gives roles that begin at a place of a row, where they can form a stage; ANY stands for each role.
Matcher = Callable[[list[Link], int], tuple[str, ...] | None]


class Rewriter:
    """Rewrites one function; `found` are the stages, `chains` all chains of calls, stage or not."""

    def __init__(
        self, node: ast.FunctionDef, plain: frozenset[str], callees: dict[str, Callee], match: Matcher
    ) -> None:
        """Take a definition, its variables that no other scope sees, what its callees are, and what a stage is."""
        self.node, self.callees, self.match = node, callees, match
        names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
        loads = [each.id for each in names if isinstance(each.ctx, ast.Load)]
        loads += [each.target.id for each in ast.walk(node) if _augments(each)]  # type: ignore[attr-defined]
        self.loads = {name: loads.count(name) for name in set(loads)}
        self.plain = plain
        self.variables = {each.id for each in names if isinstance(each.ctx, ast.Store)} | _parameters(node)
        self.makers: dict[int, ast.expr] = {}  # of what `+=` changes: layers that make a new tensor for it
        self.found: list[Found] = []
        self.chains: list[list[Link]] = []

    def rewritten(self) -> ast.FunctionDef:
        """Change the definition and return it."""
        self.node.body = self._block(self.node.body)
        return self.node

    def _block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        written: list[ast.stmt] = []
        start = 0
        for i, statement in enumerate(statements):
            if isinstance(statement, ast.AugAssign) and (maker := self._maker(statement, statements[:i])):
                self.makers[id(statement)] = maker
        while start < len(statements):
            steps = self._steps(statements[start:])
            if steps:
                written += self._run(steps)
            else:
                written.append(self._other(statements[start]))
            start += max(len(steps), 1)
        return written

    def _other(self, statement: ast.stmt) -> ast.stmt:
        """Rewrite a statement by itself, and the blocks in it; a `try` keeps values that a handler may look at."""
        if isinstance(statement, ast.For) and (unrolled := self._walk_over_layers(statement)):
            return unrolled
        if isinstance(statement, (ast.If, ast.For, ast.While, ast.With)):
            statement.body = self._block(statement.body)
            if not isinstance(statement, ast.With):
                statement.orelse = self._block(statement.orelse)
        elif (
            isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)) and statement.value
        ):
            statement.value = self._expression(statement.value)
        return statement

    def _steps(self, statements: list[ast.stmt]) -> list[Step]:
        """Return the statements from the first on of which each takes what the one before it has left, alone."""
        steps: list[Step] = []
        for statement in statements:
            step = self._step(statement)
            if step is None or (steps and not self._goes_on(steps[-1], step)):
                break
            steps.append(step)
        return steps

    def _step(self, statement: ast.stmt) -> Step | None:
        if isinstance(statement, ast.AugAssign):
            return self._added_to(statement)
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Return)) or statement.value is None:
            return None
        targets = _targets(statement)
        if len(targets) > 1 or not all(isinstance(each, ast.Name) for each in targets):
            return None
        head, links = self._chain(statement.value)
        target = targets[0].id if targets else None  # type: ignore[attr-defined]
        return Step(statement, target, head, links) if links else None

    def _added_to(self, statement: ast.AugAssign) -> Step | None:
        """Read ``x += other`` where a layer has just made `x`, so that nobody else sees it change."""
        maker, target = self.makers.get(id(statement)), statement.target
        if maker is None or not isinstance(target, ast.Name):
            return None
        head = ast.copy_location(ast.Name(target.id, ast.Load()), target)
        item = _call(ADD_TO, [maker, statement.value])
        return Step(statement, target.id, head, [Link(statement, head, "+=", "add", item)])

    def _maker(self, statement: ast.AugAssign, before: list[ast.stmt]) -> ast.expr | None:
        if not isinstance(statement.op, ast.Add) or not isinstance(statement.target, ast.Name):
            return None
        name = statement.target.id
        for each in reversed(before):
            if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(each)):
                step = self._step(each) if isinstance(each, (ast.Assign, ast.AnnAssign)) else None
                made = step is not None and step.target == name and step.links[-1].role in MAKERS
                return step.links[-1].item if step and made else None
        return None

    def _goes_on(self, before: Step, after: Step) -> bool:
        name = before.target
        if name not in self.plain or not isinstance(after.head, ast.Name) or after.head.id != name:
            return False
        uses = sum(isinstance(each, ast.Name) and each.id == name for each in _loaded(after.statement))
        forgotten = after.target in (name, None) or self.loads[name] == 1
        return uses == 1 and forgotten

    def _chain(self, expression: ast.expr) -> tuple[ast.expr, list[Link]]:
        """Take an expression apart: the innermost input, and the calls from there outwards."""
        links: list[Link] = []
        while link := self._link(expression):
            links.insert(0, link)
            expression = link.inner
        return expression, links

    def _link(self, node: ast.expr) -> Link | None:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return Link(node, node.left, "+", "add", _call(ADD, [node.right]))
        if not isinstance(node, ast.Call) or not all(each.arg and _simple(each.value) for each in node.keywords):
            return None
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not node.args:
            name = node.func.attr
            item = _call(METHOD, [ast.Constant(name)], node.keywords)
            return Link(node, node.func.value, f".{name}", METHODS[name][0], item)
        if not node.args or isinstance(node.args[0], ast.Starred) or not all(map(_simple, (node.func, *node.args[1:]))):
            return None
        text = ast.unparse(node.func)
        callee, more = self._callee(node.func, text), bool(node.args[1:] or node.keywords)
        if callee.kind == "function":
            return Link(node, node.args[0], text, callee.role, _call(CALL, [node.func, *node.args[1:]], node.keywords))
        return Link(node, node.args[0], text, None if more else callee.role, node.func)

    def _callee(self, function: ast.expr, text: str) -> Callee:
        known = self.callees.get(text)
        if known:
            return known
        # Not `x.view`: a layer is a variable of its own, or an element of something.
        names = {each.id for each in ast.walk(function) if isinstance(each, ast.Name)}
        unknown = isinstance(function, (ast.Name, ast.Subscript)) and not names.isdisjoint(self.variables)
        return Callee("layer", ANY if unknown else None)

    def _expression(self, expression: ast.expr) -> ast.expr:
        """Rewrite the chains anywhere in an expression."""
        head, links = self._chain(expression)
        if links:
            parts = self._parts(head, links, {})
            inner = self._expression(head)
            self._visit_operands(links)
            for part in parts:
                inner = self._joined(inner, part)
            return inner
        for name, value in ast.iter_fields(expression):
            if isinstance(value, ast.expr):
                setattr(expression, name, self._expression(value))
            elif isinstance(value, list) and not isinstance(expression, (ast.Lambda, ast.JoinedStr)):
                setattr(expression, name, [self._part(each) for each in value])
        return expression

    def _part(self, value: Any) -> Any:
        if isinstance(value, ast.keyword):
            value.value = self._expression(value.value)
            return value
        return self._expression(value) if isinstance(value, ast.expr) else value

    def _parts(self, head: ast.expr, links: list[Link], ends: dict[int, Step]) -> list[Part]:
        """Divide a chain into stages and calls by themselves, before anything in it changes."""
        self.chains.append(links)
        parts: list[Part] = []
        inner, start = head, 0
        while start < len(links):
            roles = self.match(links, start)
            span = links[start : start + len(roles or "1")]
            for link in span:
                inner = _applied(link, inner)
            parts.append(Part(span, roles, ast.unparse(inner) if roles else ""))
            start += len(span)
            if step := ends.get(id(span[-1])):
                inner = ast.Name(step.target or "", ast.Load())
        return parts

    def _joined(self, inner: ast.expr, part: Part) -> ast.expr:
        """Return the call of a part on its input."""
        if part.roles is None:
            return _applied(part.links[0], inner)
        first, last = part.links[0].node, part.links[-1].node
        self.found.append(Found(first.lineno, tuple(link.text for link in part.links), part.roles, part.source))
        return _placed(_call(RUN, [inner, *(link.item for link in part.links)]), last)

    def _visit_operands(self, links: list[Link]) -> None:
        """Rewrite the right sides of sums, where a chain of their own may stand."""
        for link in links:
            if isinstance(link.node, ast.BinOp):
                link.node.right = link.item.args[0] = self._expression(link.node.right)  # type: ignore[attr-defined]
            elif isinstance(link.node, ast.AugAssign):
                link.node.value = link.item.args[1] = self._expression(link.node.value)  # type: ignore[attr-defined]

    def _run(self, steps: list[Step]) -> list[ast.stmt]:
        """Rewrite statements that hand one value on; those inside a stage go away."""
        links = [link for step in steps for link in step.links]
        ends = {id(step.links[-1]): step for step in steps}
        written: list[ast.stmt] = []
        parts = self._parts(steps[0].head, links, ends)
        inner = self._expression(steps[0].head)
        self._visit_operands(links)
        for part in parts:
            inner = self._joined(inner, part)
            if step := ends.get(id(part.links[-1])):
                if not isinstance(step.statement, ast.AugAssign):
                    step.statement.value = inner
                written.append(step.statement)
                inner = ast.Name(step.target or "", ast.Load())
        return written

    def _walk_over_layers(self, loop: ast.For) -> ast.stmt | None:
        """Turn ``for layer in self.layers: x = layer(x)`` into one run of the layers."""
        step = self._step(loop.body[0]) if len(loop.body) == 1 and not loop.orelse else None
        if step is None or not isinstance(loop.target, ast.Name) or not isinstance(step.head, ast.Name):
            return None
        name, text = loop.target.id, ast.unparse(loop.iter)
        alone = [link.text for link in step.links] == [name] and step.links[0].role == ANY
        known = self.callees.get(text, Callee("", None)).kind == "layers"
        if not (alone and known and step.target == step.head.id and {name, step.target} <= self.plain):
            return None
        if self.loads[name] != 1 or step.target in {n.id for n in ast.walk(loop.iter) if isinstance(n, ast.Name)}:
            return None
        self.found.append(Found(loop.lineno, (text,), (), ast.unparse(loop)))
        assert isinstance(step.statement, (ast.Assign, ast.AnnAssign))
        layers = ast.Starred(loop.iter, ast.Load())
        step.statement.value = _placed(_call(RUN, [step.head, layers]), step.statement.value or loop)
        return step.statement


def _targets(statement: ast.Assign | ast.AnnAssign | ast.Return) -> list[ast.expr]:
    if isinstance(statement, ast.AnnAssign):
        return [statement.target]
    return statement.targets if isinstance(statement, ast.Assign) else []


def _augments(node: ast.AST) -> bool:
    return isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)


def _parameters(node: ast.FunctionDef) -> set[str]:
    """Return the parameters but the first, which is the module."""
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args][1:] + arguments.kwonlyargs
    return {each.arg for each in (*named, arguments.vararg, arguments.kwarg) if each}


def _simple(node: ast.expr) -> bool:
    """Whether an expression only reads, so that it may be read a little earlier."""
    if isinstance(node, (ast.Constant, ast.Name)):
        return True
    if isinstance(node, ast.Attribute):
        return _simple(node.value)
    if isinstance(node, ast.Subscript):
        return _simple(node.value) and _simple(node.slice)
    if isinstance(node, (ast.Tuple, ast.List)):
        return all(map(_simple, node.elts))
    return isinstance(node, ast.UnaryOp) and _simple(node.operand)


def _loaded(statement: ast.Assign | ast.AnnAssign | ast.Return | ast.AugAssign) -> list[ast.AST]:
    return list(ast.walk(statement if isinstance(statement, ast.AugAssign) else statement.value or statement))


def _call(name: str, args: list[ast.expr], keywords: list[ast.keyword] | None = None) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), args, keywords or [])


def _applied(link: Link, inner: ast.expr) -> ast.expr:
    """Return the call of a link on another input."""
    node = link.node
    if not isinstance(node, ast.Call):
        right = node.right if isinstance(node, ast.BinOp) else node.value
        return ast.copy_location(ast.BinOp(inner, ast.Add(), right), node)
    if link.text.startswith("."):
        assert isinstance(node.func, ast.Attribute)
        function = ast.copy_location(ast.Attribute(inner, node.func.attr, ast.Load()), node.func)
        return ast.copy_location(ast.Call(function, [], node.keywords), node)
    return ast.copy_location(ast.Call(node.func, [inner, *node.args[1:]], node.keywords), node)


def _placed(made: ast.expr, where: ast.AST) -> ast.expr:
    """Give an expression that was made, and what in it has no place, the place of another."""
    return ast.fix_missing_locations(ast.copy_location(made, where))
