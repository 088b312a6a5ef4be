"""The browser that tests look through, driven by the scripts in tests/browser (`npm install` there).

DREAM4D_CHROMIUM names another browser than the first that is found.
"""

from __future__ import annotations

import os
import shutil

from places import TESTS

HERE = TESTS / "browser"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The browser to use, or None."""
    return os.environ.get("DREAM4D_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


def why_no_module(name: str) -> str | None:
    """Return why scripts that need a module of node.js can't run here, or None."""
    if shutil.which("node") is None:
        return "no node.js found"
    return None if (HERE / "node_modules" / name).is_dir() else f"{name} is missing: run npm install in tests/browser"


def why_no_browser() -> str | None:
    """Return why the browser tests can't run here, or None."""
    if find_browser() is None:
        return "no Chromium found: install it or set DREAM4D_CHROMIUM"
    return why_no_module("playwright-core")
