"""The built-in pictures, their captions and split, and the answer key that reads them."""
from dataclasses import asdict, astuple
from itertools import combinations

import numpy as np
import pytest

from data import BACKGROUNDS, COLOURS, SCENES, SIZES, VOCABULARY, BuiltinShapes, draw, is_held_out
from evaluate import read_picture


def drawn(scenes, resolution=32, noise=0, seed=0):
    """(scene, uint8 picture of it) for each, with noise of this share of the range."""
    rng = np.random.default_rng(seed)
    for scene in scenes:
        picture = np.asarray(draw(scene, resolution, rng)) / 255
        picture = picture + noise * rng.standard_normal(picture.shape)
        yield scene, (255 * picture.clip(0, 1)).round().astype(np.uint8)


def test_captions_are_unique():
    """Every scene has a caption of its own, made of the vocabulary's words."""
    captions = {scene.caption for scene in SCENES}
    assert len(captions) == len(SCENES) == 2 * 8 * 4 * 3
    assert set(" ".join(captions).split()) <= set(VOCABULARY)
    assert len(VOCABULARY) == len(set(VOCABULARY))


def test_the_split_keeps_every_triple_in_training():
    """One scene in eight is held out, and any three attributes still occur together in training."""
    def triples(scenes):
        return {triple for scene in scenes for triple in combinations(enumerate(astuple(scene)), 3)}

    trained = [scene for scene in SCENES if not is_held_out(scene)]
    assert len(trained) == 168 and triples(trained) == triples(SCENES)


def test_the_data_set_shows_what_it_says():
    """The built-in data set holds all trained scenes and no other, alike often; each picture shows
    its caption, and is the same on every call."""
    source, again = BuiltinShapes(32, count=168), BuiltinShapes(32, count=168)
    assert np.array_equal(source.pictures, again.pictures)
    said = [source.captions(i)[0] for i in range(len(source))]
    assert sorted(said) == sorted(s.caption for s in SCENES if not is_held_out(s))
    scenes = {scene.caption: asdict(scene) for scene in SCENES}
    assert all(read_picture(source.image(i, 3, 32)) == scenes[said[i]] for i in range(168))


@pytest.mark.slow
@pytest.mark.parametrize("resolution, noise, least", [(32, 0, 1), (64, 0, 1), (32, 0.1, 0.99)])
def test_pictures_are_read_right(resolution, noise, least):
    """All attributes of every clean picture are read right, wherever the thing is; with noise of a
    tenth of the range those of at least 99%."""
    right = [read_picture(picture) == asdict(scene)
             for scene, picture in drawn(3 * SCENES, resolution, noise)]
    assert np.mean(right) >= least


def test_pictures_of_nothing_have_no_attributes():
    """A blank picture has a background alone, and pure noise has nothing at all."""
    rng = np.random.default_rng(0)
    nothing = dict(size=None, colour=None, shape=None, background=None)
    for name, colour in BACKGROUNDS.items():
        blank = np.full((32, 32, 3), colour, dtype=np.uint8)
        assert read_picture(blank) == {**nothing, "background": name}
    for _ in range(20):
        assert read_picture(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) == nothing


def test_any_picture_can_be_read():
    """Whatever the pixels, the reader returns an answer."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        grey = rng.choice([0, 128, 255]) + rng.normal(size=(4, 4, 3)) * rng.choice([0, 50, 150])
        picture = np.full((32, 32, 3), rng.choice([0, 128, 255]))
        picture[8:24, 8:24] = np.kron(grey, np.ones((4, 4, 1))).clip(0, 255)
        assert read_picture(picture.astype(np.uint8)).keys() == asdict(SCENES[0]).keys()


@pytest.mark.parametrize("radius", SIZES.values())
def test_unclear_things_have_no_shape_or_no_colour(radius):
    """Half circle, half square; three round lobes; a diamond: these have no shape. Half red and
    half blue is no colour, and of two things nothing is read."""
    y, x = (np.mgrid[:64, :64] - 31.5) / 64
    between = 0.5 * np.hypot(x, y) + 0.5 * np.maximum(abs(x), abs(y)) / 0.9 < radius
    lobes = np.hypot(x, y) < radius * (0.75 + 0.35 * np.sin(3 * np.arctan2(y, x)))
    diamond, circle = abs(x) + abs(y) < 1.25 * radius, np.hypot(x, y) < radius
    red, blue, white = COLOURS["red"], COLOURS["blue"], np.full((64, 64, 3), 255, dtype=np.uint8)
    for blob in (between, lobes, diamond):
        assert read_picture(np.where(blob[..., None], red, white))["shape"] is None
    colours = np.where((x < 0)[..., None], red, blue)
    assert read_picture(np.where(circle[..., None], colours, white))["colour"] is None
    parts = (circle & (abs(x) > 0.1))[..., None]
    assert set(read_picture(np.where(parts, red, white)).values()) == {None, "white"}
