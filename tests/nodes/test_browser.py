"""The pack in a real browser, on ComfyUI's own front end. Screenshots are kept in the test's folder.

The browser is driven by tests/browser/drive.mjs (playwright-core, from `npm install` in that folder).
DREAM4D_SCREENSHOTS names another folder for the screenshots, DREAM4D_CHROMIUM another browser.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from browsers import HERE, find_browser, why_no_browser
from comfy_harness import why_no_meshes
from pack import GROWN, HEAD, overlaps
from PIL import Image

pytestmark = pytest.mark.browser


def screenshots(tmp_path_factory) -> Path:
    """Where they are kept."""
    return Path(os.environ.get("DREAM4D_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))


def look(server, folder: Path, part: str) -> dict:
    """What a part of drive.mjs saw in the browser."""
    reason = why_no_browser()
    if reason:
        pytest.skip(reason)
    folder.mkdir(parents=True, exist_ok=True)
    words = ["node", "drive.mjs", f"http://127.0.0.1:{server.port}", find_browser(), str(folder), part]
    done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert "failed" not in found, found["failed"]
    assert found["outside"] == [] and found["errors"] == [], "the page stays at home and without errors"
    return found


@pytest.fixture(scope="module")
def seen(server, tmp_path_factory) -> dict:
    """A template is run and looked at."""
    return look(server, screenshots(tmp_path_factory), "story")


@pytest.fixture(scope="module")
def several(server, tmp_path_factory) -> dict:
    """Three viewers on one canvas."""
    return look(server, screenshots(tmp_path_factory), "several")


@pytest.fixture(scope="module")
def templates(server, tmp_path_factory) -> dict:
    """All templates loaded, one of them run."""
    return look(server, screenshots(tmp_path_factory), "templates")


@pytest.fixture(scope="module")
def damaged(server, tmp_path_factory) -> dict:
    """Workflows and messages that hold anything in place of a view."""
    return look(server, screenshots(tmp_path_factory), "damaged")


def test_the_live_preview_appears_on_the_node(seen):
    assert seen["livePreview"]


def test_the_scene_is_seen_before_all_of_it_is_rendered_and_then_whole(seen):
    assert seen["firstImage"] and seen["early"] and seen["whole"]


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
def test_several_viewers_on_one_canvas(several, when):
    found = several[when]
    assert found["images"] and found["finished"]
    assert found["times"] == [False, True], "a still scene has no time"
    assert found["turned"] == [True, False], "only the one that is dragged turns"
    assert found["resized"], "the image grows with the node"
    assert found["progress"] and found["settled"] and found["partly"], "what was made before Cancel stays"
    assert found["left"] == 1 and found["otherWorks"], "a removed node takes its viewer with it"


@pytest.mark.parametrize("when", ["classic", "vue"])
def test_a_damaged_view_does_not_keep_a_workflow_from_loading(damaged, when):
    found = damaged[when]
    assert len(found["kinds"]) > 20 and found["lost"] == {}, "all other nodes are there, and the viewer says what to do"
    assert found["asked"] == 0, "nothing of it is asked of the server"
    assert found["works"] and found["turns"], "a run brings the viewers back"
    assert found["stays"], "messages that make no sense change nothing"
    assert found["errors"] == []


@pytest.mark.parametrize("when", ["classic", "vue"])
def test_a_viewer_outlives_copies_subgraphs_and_moves(damaged, when):
    found = damaged[when]["copied"]
    assert found["copies"][0] and found["copies"][0] == found["copies"][1], "a copy shows the same"
    assert found["grows"], "taken away and added again, the image still fits its node"
    assert found["subgraph"] == [True, "other"], "in a subgraph it keeps its view and hears the server"


@pytest.mark.parametrize("when", ["classic", "vue"])
def test_the_templates_leave_room_for_what_their_nodes_show(templates, when):
    found = templates[when]
    assert found["video"], "Save Video shows its video"
    assert overlaps([(box["type"], *box["box"]) for box in found["after"]]) == [], "after a real run"
    grown = found["heights"]
    assert grown["SaveVideo"] > 300 + HEAD, "what it becomes has been measured"
    for name, boxes in found["loaded"].items():
        high = [(b["type"], *b["box"][:3], max(b["box"][3], grown.get(b["type"], 0))) for b in boxes]
        assert overlaps(high) == [], name
    for name, height in GROWN.items():
        assert grown[name] <= height + HEAD, f"{name} becomes higher than what the templates are checked with"


def test_comfyuis_own_viewer_plays_an_exported_file(server, tmp_path_factory):
    """The red cube stands still until the button is pressed, and jumps then."""
    if reason := why_no_meshes():
        pytest.skip(reason)
    folder = screenshots(tmp_path_factory)
    look(server, folder, "meshes")

    def red(name: str) -> np.ndarray:
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB")).astype(int)
        return np.argwhere((pixels[..., 0] > 120) & (pixels[..., 1] < 80))

    still = red("still0")
    assert len(still) > 2000 and np.array_equal(still, red("still1"))
    middles = np.array([red(f"playing{number}").mean(0) for number in range(8)])
    height, width = middles.max(0) - middles.min(0)
    assert height > 15 and width < 8, "up and down, not sideways"


def test_the_viewers_own_requests_are_recognised(seen):
    assert seen["asked"] > 0
