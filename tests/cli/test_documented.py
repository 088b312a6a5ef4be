"""The commands that the documents show are commands."""

from __future__ import annotations

import re
import shlex

import pytest
from places import ROOT

from dream4d_engine.cli.parsing import parse_line

DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
CALL = re.compile(r"(?:^|&& |\s-m )(?:dream4d|dream4d_engine\.cli) ([^|&]+)")


def shown(text: str) -> list[str]:
    """What follows the command's name in every line that is set as code."""
    lines = text.replace("\\\n", " ").splitlines()
    found = (CALL.search(line.strip()) for line in lines if line.startswith("    "))
    return [one[1] for one in found if one]


COMMANDS = [(path.name, words) for path in DOCUMENTS for words in shown(path.read_text(encoding="utf-8"))]


def test_there_are_commands_in_the_documents():
    assert {"README.md", "command_line.md", "speed.md"} <= {name for name, _ in COMMANDS} and len(COMMANDS) > 50


@pytest.mark.parametrize(("document", "text"), COMMANDS)
def test_a_command_that_is_shown_is_taken(document, text):
    words = shlex.split(text, comments=True)
    if "--resume" in words:  # its words are looked for in a run's folder
        with pytest.raises(ValueError, match="holds no run to resume"):
            parse_line(words)
    else:
        parse_line(words)
