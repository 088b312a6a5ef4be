"""Priors of the graph's own models against ComfyUI's real classes, in its own Python without a server.

The checks themselves are in graph_checks.py, the small models in graph_models.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from comfy_harness import find_comfyui, find_python, why_no_server

SCRIPT = Path(__file__).with_name("graph_checks.py")
IMAGES, VIDEOS = ("sd15", "sdxl", "sd3", "flux"), ("wan", "wan22", "ltx", "hunyuan")
LTX_VAES = ("ltx", "ltx 0.9", "ltx 0.9.1", "ltx 0.9.5")
IMAGE_VAES, WAN_VAES = ("kl", "kl of 16 channels", "kl with a decoder of videos"), ("wan", "wan with opacity")
CHECKS = {  # each with the arguments that it is made for
    "equal_to_diffusers": ("sd15", "sdxl", "wan", "ltx", "sd3", "hunyuan"),
    "the_toys": ("image", "video"),
    "two_experts": (),
    "one_expert": (),
    "gaussian": ("eps", "v", "flow"),
    "encoder": (*IMAGE_VAES, "taesd", *WAN_VAES, "wan 2.2", "taew", *LTX_VAES, "hunyuan"),
    "fused_encoder": (*IMAGE_VAES, *WAN_VAES, "wan 2.2", *LTX_VAES),
    "another_encoder": ("kl", "wan"),
    "choices_of_convolutions": (),
    "what_was_taken_for_trials_is_given_back": (),
    "tiny_autoencoders": (),
    "out_of_memory_in_the_encoder": ("wan", "ltx", "hunyuan"),
    "different_prompts_in_one_batch": (*IMAGES, *VIDEOS),
    "a_step": (*IMAGES, *VIDEOS),
    "where_and_in_which_numbers": (),
    "cancel_in_the_middle": ("sd15", "ltx"),
    "the_model_stays_usable": ("sd15", "wan"),
    "novel_views": ("zero123", "sv3d_u", "sv3d_p"),
    "a_lora_before_it": (),
    "a_lora_beside_it": (),
    "another_precision_before_it": (),
    "weights_with_scales": (),
    "shares_of_noise": (*IMAGES, *VIDEOS),
    "ten_steps": (*IMAGES, *VIDEOS),
    "two_at_once": (),
    "room_is_made_in_the_middle_of_a_step": (),
    "fingerprints": (),
    "bad_input": (),
}
NAMES = [name for check, ones in CHECKS.items() for name in ([f"{check}[{one}]" for one in ones] or [check])]


@pytest.fixture(scope="module")
def outcomes(request) -> Callable[[str], dict]:
    """Run the checks that were asked for, in one process: to start one takes longer than most of them."""
    reason = why_no_server()
    if reason:
        pytest.skip(reason)
    comfyui, here = find_comfyui(), request.node.path
    asked = [item.callspec.params["name"] for item in request.session.items if item.path == here]
    words = [find_python(comfyui), str(SCRIPT), str(comfyui), *asked]
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=2400)
    lines = [line.removeprefix("CHECK ") for line in done.stdout.splitlines() if line.startswith("CHECK ")]
    found = {outcome["name"]: outcome for outcome in map(json.loads, lines)}

    def of(name: str) -> dict:
        assert name in found, f"the process ended before, with {done.returncode}: {done.stderr[-3000:]}"
        return found[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_check(name, outcomes):
    outcome = outcomes(name)
    assert outcome["error"] is None, outcome["error"]
