"""From a recipe to its guidance: which models take part, and which words they are not to follow."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dream4d_engine import cameras
from dream4d_engine.guidance.prompts import NEGATIVE_PROMPT
from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.files import toy_prior
from dream4d_engine.priors.networks.execution import Runtime
from dream4d_engine.training.config import (
    IMAGE_TO_3D,
    IMAGE_TO_3D_ORBIT,
    MODEL_VIDEO,
    TEXT_TO_3D,
    TOY_IMAGE,
    TOY_STATIC,
)
from dream4d_engine.training.guidance import (
    active_terms,
    choose_negative,
    load_guidance,
    with_frames_of,
    with_views_of,
)

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU)


def test_a_term_without_weight_needs_no_model():
    first, second = TEXT_TO_3D.guidance
    assert active_terms(replace(TEXT_TO_3D, guidance=(first, replace(second, weight=0.0)))) == [first]


def test_a_take_has_as_many_frames_as_its_prior_must_have():
    wan, any_number = SimpleNamespace(n_frames=21), SimpleNamespace(n_frames=None)
    assert with_frames_of(MODEL_VIDEO, {"video": wan}) == replace(MODEL_VIDEO, n_frames=21)
    assert with_frames_of(MODEL_VIDEO, {"video": any_number}) is MODEL_VIDEO
    with pytest.raises(ValueError, match="takes of 21 and 25 frames: they must agree"):
        with_frames_of(MODEL_VIDEO, {"video": wan, "image": SimpleNamespace(n_frames=25)})


def test_views_are_those_that_a_model_of_novel_views_sees():
    static, dynamic = (SimpleNamespace(name="SV3D", n_frames=14, orbit=orbit) for orbit in ("static", "dynamic"))
    single = SimpleNamespace(name="Zero123", n_frames=None, orbit=None)
    for handle, orbit in ((static, "static"), (dynamic, "dynamic")):
        fitted = with_views_of(IMAGE_TO_3D_ORBIT, {"novel_view": handle})
        assert fitted == replace(IMAGE_TO_3D_ORBIT, orbit=orbit, n_views=14)
    asked = replace(IMAGE_TO_3D_ORBIT, orbit="static")
    assert with_views_of(asked, {"novel_view": dynamic}).orbit == "static"
    for recipe in (IMAGE_TO_3D, TOY_IMAGE):
        assert with_views_of(recipe, {"novel_view": single}) is recipe
        with pytest.raises(ValueError, match=r"sees whole orbits of 14 views.* choose image-to-3d-orbit"):
            with_views_of(recipe, {"novel_view": static})
    assert with_views_of(TEXT_TO_3D, {"image": single}) is TEXT_TO_3D
    for handle in (single, toy_prior("novel_view")):
        with pytest.raises(ValueError, match=r"sees single views.* choose image-to-3d, or connect a model of orbits"):
            with_views_of(IMAGE_TO_3D_ORBIT, {"novel_view": handle})


@pytest.mark.parametrize(
    ("own", "in_recipe", "asked", "expected"),
    [
        (None, NEGATIVE_PROMPT, "", NEGATIVE_PROMPT),
        ("", NEGATIVE_PROMPT, "", ""),
        ("its own", NEGATIVE_PROMPT, " ", "its own"),
        ("its own", "changed in the recipe", "", "changed in the recipe"),
        ("its own", "changed in the recipe", " asked ", "asked"),
        (None, NEGATIVE_PROMPT, "asked", "asked"),
    ],
)
def test_negative_words_are_those_that_somebody_chose_else_the_models_own(own, in_recipe, asked, expected):
    recipe = replace(TEXT_TO_3D, negative_prompt=in_recipe)
    assert choose_negative(recipe, SimpleNamespace(negative_prompt=own), asked) == expected


def test_a_sentence_may_end_with_a_full_stop():
    """The toy models were taught captions without."""
    handle, views = toy_prior("multiview"), cameras.orbit(4, 32, 32).reshape(1, 4)
    told = []
    for prompt, negative in (("a red cube", "a cone"), ("a red cube. ", "a cone."), ("a red cube.\n", "a cone")):
        handle.check_prompt(prompt)
        guidance = load_guidance(TOY_STATIC, {"multiview": handle}, prompt, RUNTIME, negative=negative)["multiview"]
        told.append([conditions.tokens for conditions in guidance.conditions(views)])
    for other in told[1:]:
        assert torch.equal(told[0][0], other[0]) and torch.equal(told[0][1], other[1])
    assert not torch.equal(*told[0])
    with pytest.raises(PriorError, match="the prompt is empty"):
        handle.check_prompt(" . ")
    with pytest.raises(PriorError, match="does not know 'cube.red'"):
        handle.check_prompt("a cube.red")


def test_loading_tells_of_each_model_and_can_be_ended():
    handles, seen = {"multiview": toy_prior("multiview")}, []
    guidance = load_guidance(TOY_STATIC, handles, "a red cube", RUNTIME, on_prior=lambda p: seen.append(p.kind))
    assert seen == ["multiview"] == list(guidance)
    with pytest.raises(PriorError, match="does not know 'blurry'"):
        load_guidance(TOY_STATIC, handles, "a red cube", RUNTIME, negative="blurry")

    def stop(prior):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_guidance(TOY_STATIC, handles, "a golden dragon", RUNTIME, on_prior=stop)
