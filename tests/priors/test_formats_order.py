"""The files of priors/formats read one another in one direction: the one that the folder's docstring gives."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from dream4d_engine.priors import formats


def test_files_read_only_those_above_them_in_the_list():
    rows = re.findall(r"^    (\S.*?)  ", formats.__doc__, re.M)
    level = {name: i for i, row in enumerate(rows) for name in row.split(", ")}
    folder = Path(formats.__file__).parent
    assert level.keys() == {path.stem for path in folder.glob("*.py")} - {"__init__"}
    for name in level:
        # all imports, also those in functions and for types alone
        tree = ast.walk(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8")))
        own = [node for node in tree if isinstance(node, ast.ImportFrom) and node.level == 1]
        read = {other for node in own for other in ([node.module] if node.module else [a.name for a in node.names])}
        assert all(level[other] < level[name] for other in read), f"{name} reads {read}"
