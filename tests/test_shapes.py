"""Tests of the built-in pictures, their captions, and the reader that marks them."""

from itertools import combinations

import numpy as np
import pytest

from data import (
    BACKGROUNDS,
    COLOURS,
    SIZES,
    all_scenes,
    as_drawn,
    caption_of,
    draw,
    expected_reading,
    is_held_out,
    read_picture,
    vocabulary,
)

PLAIN = all_scenes()
HARD = [all_scenes(hard=True)[i] for i in np.random.default_rng(0).permutation(49152)[:500]]


def with_noise(image, rng, std=0.1):
    noisy = np.asarray(image) / 255 + std * rng.standard_normal((*image.size, 3))
    return (255 * noisy.clip(0, 1)).round().astype(np.uint8)


@pytest.mark.parametrize("hard", [False, True])
def test_captions_are_unique(hard):
    """Every scene has its own caption, whose words are in the vocabulary."""
    scenes = all_scenes(hard)
    captions = [caption_of(scene) for scene in scenes]
    assert len(set(captions)) == len(scenes) == (2 * 64 * 64 * 6 if hard else 192)
    assert {word for caption in captions for word in caption.split()} <= set(vocabulary())
    assert len(vocabulary()) == len(set(vocabulary()))


def test_the_plain_split_keeps_every_triple_in_training():
    """One plain scene in eight is held out, and any three attributes still occur together in training."""
    assert sum(map(is_held_out, PLAIN)) == 24

    def triples(scenes):
        rows = [(s.thing.size, s.thing.colour, s.thing.shape, s.background) for s in scenes]
        return {(which, *(row[i] for i in which)) for row in rows for which in combinations(range(4), 3)}

    assert triples(s for s in PLAIN if not is_held_out(s)) == triples(PLAIN)


def test_the_hard_split_holds_out_pictures_not_captions():
    """One hard scene in eight is held out, together with the other caption of the same picture."""
    scenes = all_scenes(hard=True)
    assert sum(map(is_held_out, scenes)) == len(scenes) // 8
    assert all(is_held_out(scene) == is_held_out(as_drawn(scene)) for scene in scenes)


@pytest.mark.parametrize("resolution", [32, 64])
def test_clean_plain_pictures_are_all_read_right(resolution):
    """The reader finds all four attributes of every plain scene, wherever the jitter puts the thing."""
    rng = np.random.default_rng(0)
    for scene in 10 * PLAIN:
        assert read_picture(np.asarray(draw(scene, resolution, rng))) == expected_reading(scene), scene


def test_clean_hard_pictures_are_read_right():
    """The reader finds both things and their positions in at least 99% of clean hard pictures."""
    rng = np.random.default_rng(0)
    right = [read_picture(np.asarray(draw(scene, 64, rng))) == expected_reading(scene) for scene in HARD]
    assert np.mean(right) >= 0.99


def test_noise_does_not_mislead_the_reader():
    """With noise of a tenth of the range, at least 99% of plain pictures are still read entirely right."""
    rng = np.random.default_rng(0)
    right = [read_picture(with_noise(draw(scene, 32, rng), rng)) == expected_reading(scene) for scene in 5 * PLAIN]
    assert np.mean(right) >= 0.99


def test_a_picture_never_passes_for_another_caption():
    """No clean picture has the attributes of any other plain scene."""
    rng = np.random.default_rng(0)
    for scene in PLAIN:
        reading = read_picture(np.asarray(draw(scene, 32, rng)))
        assert not any(reading == expected_reading(other) for other in PLAIN if other != scene)


def test_pictures_of_nothing_have_no_attributes():
    """A blank picture has only a background, and pure noise has nothing at all."""
    rng = np.random.default_rng(0)
    for name, colour in BACKGROUNDS.items():
        blank = np.full((32, 32, 3), colour, dtype=np.uint8)
        assert read_picture(blank) == {"size": None, "colour": None, "shape": None, "background": name}
    for _ in range(20):
        assert not any(read_picture(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).values())


def test_any_picture_can_be_read():
    """Whatever the pixels, the reader returns an answer."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        grey = rng.choice([0, 128, 255]) + rng.normal(size=(4, 4, 3)) * rng.choice([0, 50, 150])
        picture = np.full((32, 32, 3), rng.choice([0, 128, 255]))
        picture[8:24, 8:24] = np.kron(grey, np.ones((4, 4, 1)))
        reading = read_picture(picture.clip(0, 255).astype(np.uint8))
        assert {"size", "colour", "shape", "background"} <= set(reading)


def test_a_blob_between_two_shapes_has_no_shape():
    """Half circle, half square; three round lobes; a diamond: none of these is given a shape."""
    y, x = (np.mgrid[:64, :64] - 31.5) / 64
    picture = np.full((64, 64, 3), 255, dtype=np.uint8)
    for radius in SIZES.values():
        between = 0.5 * np.hypot(x, y) + 0.5 * np.maximum(abs(x), abs(y)) / 0.9 < radius
        lobes = np.hypot(x, y) < radius * (0.75 + 0.35 * np.sin(3 * np.arctan2(y, x)))
        diamond = abs(x) + abs(y) < 1.25 * radius
        for blob in (between, lobes, diamond):
            assert read_picture(np.where(blob[..., None], COLOURS["red"], picture))["shape"] is None


def test_a_thing_of_two_colours_has_no_colour():
    """Half red and half blue is neither."""
    scene = next(s for s in PLAIN if s.thing.colour == "red" and s.thing.shape == "square" and s.background == "white")
    picture = np.asarray(draw(scene, 32, np.random.default_rng(0))).copy()
    right = picture[:, 16:]
    right[right[..., 1] < 128] = COLOURS["blue"]
    assert read_picture(picture)["colour"] is None
