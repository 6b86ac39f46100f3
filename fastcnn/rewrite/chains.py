"""Finds layers called one after another in a function's syntax tree, and makes one call of those that form a stage.

An intermediate value is removed only if the next call is its only use. Everything else in the function stays, and so
does the order of its effects.
"""

import ast
from collections import Counter
from itertools import takewhile
from types import CodeType
from typing import Any

from fastcnn import stages
from fastcnn.calls import FUNCTIONS
from fastcnn.rewrite.links import (
    ADD,
    ADD_TO,
    ANY,
    CALL,
    MAKERS,
    Callee,
    Found,
    Link,
    Part,
    Step,
    call_of,
    is_name,
    run_of,
    simple,
)
from fastcnn.roles import IDENTITY, ROW


class Rewriter:
    """Rewrites one function; `found` are the stages, `chains` all chains of calls, stage or not."""

    def __init__(self, node: ast.FunctionDef, code: CodeType, callees: dict[str, Callee]) -> None:
        """Change a method's definition, given its code and its callees."""
        self.callees = callees
        nodes = list(ast.walk(node))
        names = [each for each in nodes if isinstance(each, ast.Name)]
        augmented = [each.target for each in nodes if isinstance(each, ast.AugAssign)]
        self.loads = Counter(each.id for each in names if isinstance(each.ctx, ast.Load))
        self.loads.update(each.id for each in augmented if isinstance(each, ast.Name))
        deleted = {each.id for each in names if isinstance(each.ctx, ast.Del)}
        self.plain = set(code.co_varnames) - set(code.co_cellvars) - deleted  # variables that no inner function uses
        module, *parameters = [each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)]
        self.variables = {each.id for each in names if isinstance(each.ctx, ast.Store)}.union(parameters) - {module}
        self.makers: dict[int, ast.expr] = {}  # by the `+=` that changes it: the layer that made the tensor
        self.found: list[Found] = []
        self.chains: list[tuple[str, ...]] = []  # the callees of each, and the `if` before and after it
        node.body = self._block(node.body)

    def _block(self, statements: list[ast.stmt], around: str = "") -> list[ast.stmt]:
        """Rewrite statements; `around` is the ``if`` in which they stand."""
        written: list[ast.stmt] = []
        start = 0
        for i, statement in enumerate(statements):
            if isinstance(statement, ast.AugAssign) and (maker := self._maker(statement, statements[:i])):
                self.makers[id(statement)] = maker
        while start < len(statements):
            steps = self._steps(statements[start:])
            if steps:
                following = statements[start + len(steps) :]
                stop = self._stop(steps[-1], following[0]) if following else around
                written += self._run(steps, "" if start else around, stop)
            else:
                written.append(self._other(statements[start]))
            start += max(len(steps), 1)
        return written

    def _other(self, statement: ast.stmt) -> ast.stmt:
        """Rewrite a statement by itself, and the blocks in it; a `try` keeps values that a handler may look at."""
        if isinstance(statement, ast.For) and (unrolled := self._walk_over_layers(statement)):
            return unrolled
        if isinstance(statement, (ast.If, ast.For, ast.While, ast.With)):
            around = f"if {ast.unparse(statement.test)}" if isinstance(statement, ast.If) else ""
            holds = self.callees.get(around, Callee("test", None)).role
            statement.body = self._branch_of(statement.body, around, holds != "false")
            if not isinstance(statement, ast.With):
                statement.orelse = self._branch_of(statement.orelse, around, holds != "true")
        elif (
            isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)) and statement.value
        ):
            statement.value = self._expression(statement.value)
        return statement

    def _branch_of(self, statements: list[ast.stmt], around: str, runs: bool) -> list[ast.stmt]:
        """Rewrite the statements of one branch, and mark the stages in it where it never runs."""
        start = len(self.found)
        written = self._block(statements, around)
        self.found[start:] = [each._replace(runs=each.runs and runs) for each in self.found[start:]]
        return written

    def _steps(self, statements: list[ast.stmt]) -> list[Step]:
        """Return the statements from the first on of which each takes what the one before it has left, alone."""
        steps: list[Step] = []
        for statement in statements:
            step = self._step(statement)
            if step is None or (steps and not self._goes_on(steps[-1], step)):
                break
            steps.append(step)
        return steps

    def _stop(self, step: Step, statement: ast.stmt) -> str:
        """Return the ``if`` after a step that takes its value and ends its row, or an empty string."""
        taken = isinstance(statement, ast.If) and any(is_name(each, step.target) for each in ast.walk(statement))
        return f"if {ast.unparse(statement.test)}" if isinstance(statement, ast.If) and taken else ""

    def _step(self, statement: ast.stmt) -> Step | None:
        if isinstance(statement, ast.AugAssign):
            return self._added_to(statement)
        if isinstance(statement, ast.If):
            return self._optional(statement)
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Return)) or statement.value is None:
            return None
        assigned = [statement.target] if isinstance(statement, ast.AnnAssign) else getattr(statement, "targets", [])
        names = [each.id for each in assigned if isinstance(each, ast.Name)]
        if len(assigned) > 1 or len(names) < len(assigned):
            return None
        head, links = self._chain(statement.value)
        return Step(statement, names[0] if names else None, head, links) if links else None

    def _optional(self, statement: ast.If) -> Step | None:
        """Read ``if self.bn is not None: x = self.bn(x)``: layers that a call of the module may leave out."""
        variables = [each for each in ast.walk(statement) if isinstance(each, ast.Name)]
        names = {each.id for each in variables if isinstance(each.ctx, ast.Store)}
        name = min(names, default="")
        then, otherwise = self._branch(statement.body, name), self._branch(statement.orelse, name)
        looks = any(is_name(each, name) for each in ast.walk(statement.test))
        if len(names) != 1 or looks or not simple(statement.test) or then is None or otherwise is None:
            return None
        text = f"if {ast.unparse(statement.test)}"
        known = self.callees.get(text)
        items = [ast.Tuple([link.item for link in links], ast.Load()) for links in (then, otherwise)]
        item = ast.Starred(ast.IfExp(statement.test, *items), ast.Load())
        head = ast.copy_location(ast.Name(name, ast.Load()), statement)
        role = known.role if known else None
        return Step(statement, name, head, [Link(statement, head, text, role, item, (then, otherwise))])

    def _branch(self, statements: list[ast.stmt], name: str) -> list[Link] | None:
        """Return the calls of a branch in which each statement is ``name = call(name)``."""
        links: list[Link] = []
        for statement in statements:
            step = self._step(statement) if isinstance(statement, (ast.Assign, ast.If)) else None
            if step is None or step.target != name or not is_name(step.head, name) or step.uses(name) != 1:
                return None
            if not all(link.branches or isinstance(link.node, ast.Call) for link in step.links):
                return None
            links += step.links
        return links

    def _added_to(self, statement: ast.AugAssign) -> Step | None:
        """Read ``x += other`` where a layer has just made `x`, so that no other code can see it change."""
        maker, target = self.makers.get(id(statement)), statement.target
        if maker is None or not isinstance(target, ast.Name):
            return None
        head = ast.copy_location(ast.Name(target.id, ast.Load()), target)
        item = call_of(ADD_TO, [maker, statement.value])
        return Step(statement, target.id, head, [Link(statement, head, "+=", "add", item)])

    def _maker(self, statement: ast.AugAssign, before: list[ast.stmt]) -> ast.expr | None:
        if not isinstance(statement.op, ast.Add) or not isinstance(statement.target, ast.Name):
            return None
        name = statement.target.id
        between: list[ast.If] = []  # that may put another layer after the maker
        for each in reversed(before):
            if not any(is_name(node, name) for node in ast.walk(each)):
                continue
            step = self._step(each) if isinstance(each, (ast.Assign, ast.AnnAssign, ast.If)) else None
            if step is None or step.target != name:
                return None
            if isinstance(each, ast.If) and not each.orelse:
                between.append(each)
                continue
            maker = step.links[-1].item
            for other in between:
                maker = ast.IfExp(other.test, ast.Constant(None), maker)
            return maker if step.links[-1].role in MAKERS else None
        return None

    def _goes_on(self, before: Step, after: Step) -> bool:
        name = before.target
        if name not in self.plain or not isinstance(after.head, ast.Name) or after.head.id != name:
            return False
        forgotten = after.target in (name, None) or self.loads[name] == 1
        return after.uses(name) == 1 and forgotten

    def _chain(self, expression: ast.expr) -> tuple[ast.expr, list[Link]]:
        """Take an expression apart: the innermost input, and the calls from there outwards."""
        links: list[Link] = []
        while link := self._link(expression):
            links.insert(0, link)
            expression = link.inner
        return expression, links

    def _link(self, node: ast.expr) -> Link | None:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return Link(node, node.left, "+", "add", call_of(ADD, [node.right]))
        if not isinstance(node, ast.Call) or not all(each.arg and simple(each.value) for each in node.keywords):
            return None
        if isinstance(node.func, ast.Attribute) and node.func.attr in FUNCTIONS and not node.args:
            name = node.func.attr
            item = call_of(CALL, [ast.Constant(name)], node.keywords)
            return Link(node, node.func.value, f".{name}", FUNCTIONS[name][0], item)
        if not node.args or isinstance(node.args[0], ast.Starred) or not all(map(simple, (node.func, *node.args[1:]))):
            return None
        text = ast.unparse(node.func)
        callee, more = self._callee(node.func, text), bool(node.args[1:] or node.keywords)
        if callee.kind == "function":
            item = call_of(CALL, [node.func, *node.args[1:]], node.keywords)
            return Link(node, node.args[0], text, callee.role, item)
        return Link(node, node.args[0], text, None if more else callee.role, node.func)

    def _callee(self, function: ast.expr, text: str) -> Callee:
        known = self.callees.get(text)
        if known:
            return known
        # Not `x.view`: a layer is a variable of its own, or an element of something.
        names = {each.id for each in ast.walk(function) if isinstance(each, ast.Name)}
        unknown = isinstance(function, (ast.Name, ast.Subscript)) and not names.isdisjoint(self.variables)
        return Callee("layer", ANY if unknown else None)

    def _expression(self, expression: Any) -> Any:
        """Rewrite the chains anywhere in an expression."""
        head, links = self._chain(expression)
        if links:
            inner, parts = self._parts(head, links)
            for part in parts:
                inner = self._joined(inner, part)
            return inner
        for name, value in ast.iter_fields(expression):
            if isinstance(value, ast.expr):
                setattr(expression, name, self._expression(value))
            elif isinstance(value, list) and not isinstance(expression, ast.JoinedStr):
                holds = (ast.expr, ast.keyword)
                setattr(
                    expression, name, [self._expression(each) if isinstance(each, holds) else each for each in value]
                )
        return expression

    def _parts(
        self, head: ast.expr, links: list[Link], steps: dict[int, Step] | None = None, before: str = "", after: str = ""
    ) -> tuple[ast.expr, list[Part]]:
        """Return a chain's input, rewritten, and the chain in stages and calls by themselves.

        It is divided before anything in it changes; `steps` are the statements that end with a link, by its id.
        """
        texts = [each.text for link in links for each in link.calls(undecided=True) or [link]]
        self.chains.append(tuple(filter(None, (before, *texts, after))))
        parts: list[Part] = []
        inner, start = head, 0
        while start < len(links):
            count, calls, roles = self._stage(links[start:])
            span = links[start : start + count]
            for call in calls:
                inner = call.applied(inner)
            found = roles and Found(tuple(each.text for each in calls), roles, ast.unparse(inner))
            parts.append(Part(span, found or None))
            start += len(span)
            if step := (steps or {}).get(id(span[-1])):
                inner = ast.Name(step.target or "", ast.Load())
        head = self._expression(head)
        for link in links:  # the right sides of sums, where a chain of their own may stand
            if isinstance(link.node, ast.BinOp):
                link.node.right = link.item.args[0] = self._expression(link.node.right)  # type: ignore[attr-defined]
            elif isinstance(link.node, ast.AugAssign):
                link.node.value = link.item.args[1] = self._expression(link.node.value)  # type: ignore[attr-defined]
        return head, parts

    def _stage(self, links: list[Link]) -> tuple[int, list[Link], tuple[str, ...]]:
        """Return how many links the first stage takes, its calls and their roles; without one, the first link's."""
        for undecided in (True, False):
            calls = [(place, call) for place, link in enumerate(links) for call in link.calls(undecided)]
            calls = [(place, call) for place, call in calls if call.role != IDENTITY]
            for first in range(len(links[0].calls(undecided))):
                roles = _stage_roles([call for _, call in calls], first)
                last = calls[first + len(roles) - 1][0] if roles else 0
                if roles and (last or links[0].branches is None):  # within one `if` its own block is rewritten
                    return last + 1, [call for _, call in calls[first : first + len(roles)]], roles
        return 1, links[0].calls(undecided=True), ()

    def _joined(self, inner: ast.expr, part: Part) -> ast.expr:
        """Return the call of a part on its input."""
        if part.found is None:
            return part.links[0].applied(inner)
        self.found.append(part.found)
        return run_of([inner, *(link.item for link in part.links)], part.links[-1].node)

    def _run(self, steps: list[Step], before: str, after: str) -> list[ast.stmt]:
        """Rewrite statements that hand one value on; those inside a stage go away."""
        links = [link for step in steps for link in step.links]
        ends = {id(step.links[-1]): step for step in steps}
        written: list[ast.stmt] = []
        inner, parts = self._parts(steps[0].head, links, ends, before, after)
        for part in parts:
            step = ends.get(id(part.links[-1]))
            if part.found is None and part.links[0].branches:
                known = len(self.chains)
                written.append(self._other(part.links[0].node))  # type: ignore[arg-type]
                del self.chains[known:]  # its calls are in this chain
            else:
                inner = self._joined(inner, part)
                if step:
                    written.append(step.ended(inner))
            if step:
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
        self.found.append(Found((text,), (), ast.unparse(loop)))
        assert isinstance(step.statement, (ast.Assign, ast.AnnAssign))
        layers = ast.Starred(loop.iter, ast.Load())
        step.statement.value = run_of([step.head, layers], step.statement.value or loop)
        return step.statement


def _stage_roles(links: list[Link], start: int) -> tuple[str, ...] | None:
    """Return the roles of the stage that begins at a link. A single layer never matches: its own forward runs it.

    Rows one after another are taken together as well, so that stages may begin in one and end in the next.
    """
    rows = len(list(takewhile(lambda link: link.role == ROW, links[start:])))
    if rows > 1:
        return (ROW,) * rows
    for stage in stages.STAGES:
        span = links[start : start + len(stage.roles)]
        pairs = [(link.role, role) for link, role in zip(span, stage.roles)]
        if len(span) < len(stage.roles) or not all(given in (role, ANY) for given, role in pairs):
            continue
        if all(given == ANY for given, _ in pairs) or (len(span) == 1 and span[0].is_layer):
            continue
        return stage.roles
    return None
