"""The built-in pictures, their captions and split, and the answer key that reads them."""
from dataclasses import astuple
from itertools import combinations

import numpy as np
import pytest

import data
from data import BACKGROUNDS, COLOURS, SCENES, VOCABULARY, Scene, is_held_out
from evaluate import read_picture


def draw(scene, place=(0.5, 0.5), side=32):
    """In floats, to calculate with."""
    return np.asarray(data.draw(scene, side, place), dtype=float)


def read(picture):
    return read_picture(picture.round().clip(0, 255).astype(np.uint8))


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
    source, again = data.BuiltinShapes(32, count=168), data.BuiltinShapes(32, count=168)
    assert np.array_equal(source.pictures, again.pictures)
    said = [source.captions(i)[0] for i in range(168)]
    assert sorted(said) == sorted(s.caption for s in SCENES if not is_held_out(s))
    assert said == [read_picture(source.image(i, 3, 32))[0].caption for i in range(168)]


@pytest.mark.slow
@pytest.mark.parametrize("side, count, noise", [(16, 400, 0), (32, 2000, 0), (64, 400, 0),
                                               (32, 400, 12)])
def test_drawings_are_read_right(side, count, noise):
    """Every drawing is read right wherever the thing is, also with noise of 12 grey levels."""
    rng = np.random.default_rng(0)
    for k in range(count):
        picture = draw(scene := SCENES[k % 192], data.jitter(rng), side)
        assert read(picture + noise * rng.standard_normal(picture.shape))[0] == scene


def test_the_distance_is_the_root_mean_square():
    """A drawing is 0 grey levels from itself; all pixels 3 brighter, it is 3 away."""
    picture = draw(SCENES[100])
    assert read(picture)[1] < 1e-3 and read(picture + 3) == (SCENES[100], pytest.approx(3))


def test_what_is_no_drawing_is_not_read():
    """Blank pictures, noise, blends of two scenes without a common word, things beside or under
    another one and things cut off: none is read, and all are far."""
    rng, seen = np.random.default_rng(0), [np.full((32, 32, 3), c) for c in BACKGROUNDS.values()]
    seen += [rng.integers(0, 256, (32, 32, 3)) for _ in range(20)]
    for a, b in rng.choice(SCENES, (500, 2)):
        seen.append(draw(a, (0.5, rng.choice([0.15, 0.85]))))
        if not set(astuple(a)) & set(astuple(b)):
            seen.append((draw(a, data.jitter(rng)) + draw(b, data.jitter(rng))) / 2)
        if a.colour != b.colour:
            corner = rng.choice([0.26, 0.74], 2)
            mask = draw(Scene("small", "yellow", b.shape, "black"), corner)[..., :1] / 255
            seen.append(draw(a) * (1 - mask) + mask * np.array(COLOURS[b.colour]))
    readings = [read(picture) for picture in seen]
    assert len(seen) > 1000 and {scene for scene, _ in readings} == {None}
    assert min(distance for _, distance in readings) > 20


def test_half_way_between_two_drawings_is_neither():
    """A blend of two scenes that differ in one word is not read as one of the two."""
    for a, b in combinations(SCENES, 2):
        if sum(x != y for x, y in zip(astuple(a), astuple(b))) == 1:
            assert read((draw(a) + draw(b)) / 2)[0] not in (a, b)
