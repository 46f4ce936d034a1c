"""Print the value of a block's last expression, as a notebook does."""

import ast

MAX_PARSED = 10_000  # characters; longer code is left as it is


def with_echo(code: str) -> str:
    """Return code that also prints the `repr` of its last expression, unless that is None.

    The rewriting keeps the value inside of the sandbox. Code that does not parse is returned as it is, so that running
    it gives the error; so is code of more than `MAX_PARSED` characters.
    """
    code = code.encode(errors="replace").decode().replace("\r\n", "\n").replace("\r", "\n")
    if len(code) > MAX_PARSED:
        return code + "\nNone"
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return code
    if not statements or not isinstance(statements[-1], ast.Expr):
        return code + "\nNone"
    last = statements[-1]
    source = code.encode()
    starts = [0]
    for line in source.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    assert last.end_lineno is not None
    assert last.end_col_offset is not None
    start = starts[last.lineno - 1] + last.col_offset
    end = starts[last.end_lineno - 1] + last.end_col_offset
    expression = source[start:end].decode()
    return f"{source[:start].decode()}_ = (\n{expression}\n)\nif _ is not None: print(repr(_))\nNone"
