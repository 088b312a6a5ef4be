"""The pack in a real browser, on ComfyUI's own front end. Screenshots are kept in the test's folder.

The browser is driven by tests/browser/drive.mjs (playwright-core, from `npm install` in that folder).
DREAM4D_SCREENSHOTS names another folder for the screenshots, DREAM4D_CHROMIUM another browser.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "browser"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The browser to use, or None."""
    return os.environ.get("DREAM4D_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


def why_no_browser() -> str | None:
    """Return why the browser tests can't run here, or None."""
    if shutil.which("node") is None:
        return "no node.js found"
    if find_browser() is None:
        return "no Chromium found: install it or set DREAM4D_CHROMIUM"
    if not (HERE / "node_modules" / "playwright-core").is_dir():
        return "playwright-core is missing: run npm install in tests/browser"
    return None


@pytest.fixture(scope="module")
def seen(server, tmp_path_factory) -> dict:
    """What a session in the browser saw."""
    reason = why_no_browser()
    if reason:
        pytest.skip(reason)
    folder = Path(os.environ.get("DREAM4D_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    words = ["node", "drive.mjs", f"http://127.0.0.1:{server.port}", find_browser(), str(folder)]
    done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert "failed" not in found, found["failed"]
    return found


def test_the_live_preview_appears_on_the_node(seen):
    assert seen["livePreview"]


def test_the_scene_is_seen_before_all_of_it_is_rendered_and_then_whole(seen):
    assert seen["firstPicture"] and seen["early"] and seen["whole"]


@pytest.mark.parametrize("when", ["classic", "vue"])
def test_the_viewer_turns_plays_and_switches(seen, when):
    """On classic nodes after a reload of the page, and on Vue nodes."""
    found = seen[when]
    assert found and found["moments"] == 8
    uses = ("drag", "keys", "slider", "depth", "normals", "rgb", "play")
    assert [name for name in uses if not found[name]] == []
    assert found["nodeStayed"], "dragging in the viewer does not move the node"


def test_the_view_is_there_after_a_reload_and_in_another_tab(seen):
    assert seen["afterReload"] and seen["vueNodes"] and seen["inNewTab"]


def test_a_fresh_copy_of_the_workflow_shows_nothing_old(seen):
    assert "Run the workflow" in seen["freshHint"]


@pytest.mark.parametrize("when", ["severalVue", "severalClassic"])
def test_several_viewers_on_one_canvas(seen, when):
    found = seen[when]
    assert found["pictures"] and found["finished"]
    assert found["times"] == [False, True], "a still scene has no time"
    assert found["turned"] == [True, False], "only the one that is dragged turns"
    assert found["resized"], "the picture grows with the node"
    assert found["progress"] and found["settled"] and found["partly"], "what was made before Cancel stays"
    assert found["left"] == 1 and found["otherWorks"], "a removed node takes its viewer with it"


def test_the_page_stays_at_home_and_without_errors(seen):
    assert seen["asked"] > 0, "the viewer's own requests are recognised"
    assert seen["outside"] == [] and seen["errors"] == []
