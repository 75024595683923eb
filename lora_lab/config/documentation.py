"""Reads the docstrings under a dataclass's fields, which Python itself does not keep."""

import ast
import inspect
from functools import cache
from textwrap import dedent


@cache
def field_documentation(kind: type) -> dict[str, str]:
    """Returns field name → the docstring under it, for a dataclass and its base classes.

    Classes without a source file, for example in a notebook, add nothing.
    """
    found: dict[str, str] = {}
    for ancestor in reversed(kind.__mro__[:-1]):
        try:
            source = dedent(inspect.getsource(ancestor))
        except (OSError, TypeError):
            continue
        body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
        for statement, following in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                if isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
                    found[statement.target.id] = " ".join(following.value.value.split())  # type: ignore[union-attr]
    return found
