"""Ten thousand mutated captions files, zips, checkpoints and pictures: each loads or is refused by an error of our own kind."""
import io
import json
import resource
import struct
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import CaptionedImages, UnreadableImage
from models import PRESETS, ModelConfig, load_checkpoint, save_checkpoint

fuzz = settings(max_examples=2500, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))
OURS = (ValueError, OSError)
edits = st.lists(st.tuples(st.sampled_from(["set", "cut", "insert", "repeat", "number"]), st.floats(0, 1, exclude_max=True),
                           st.binary(min_size=1, max_size=8)), min_size=1, max_size=6)
EXTREMES = [0, 1, 127, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]


def mutate(content, changes):
    """The bytes with a few of them set, cut off, inserted, repeated, or replaced by an extreme number."""
    content = bytearray(content)
    for kind, place, new in changes:
        k = int(place * len(content))
        if kind == "set":
            content[k:k + len(new)] = new
        elif kind == "cut":
            content[k:k + new[0] if new[0] % 2 else len(content)] = b""
        elif kind == "insert":
            content[k:k] = new
        elif kind == "repeat":
            content[k:k] = content[k:k + 50] * (new[0] % 20)
        else:
            content[k:k + 4] = struct.pack("<I" if new[0] % 2 else ">I", EXTREMES[new[-1] % len(EXTREMES)])
    return bytes(content)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """All of it together takes less than 2 GiB more than before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20


@contextmanager
def quick_and_quiet():
    """No example takes five seconds of this process's time."""
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    assert time.process_time() - began < 5


def try_source(path):
    """Index the data and read its first pictures."""
    with quick_and_quiet():
        try:
            source = CaptionedImages(path, max_missing=0.9)
        except OURS:
            return
        for i in range(min(len(source), 3)):
            assert all(isinstance(text, str) and text.encode() is not None for text in source.captions(i))
            try:
                assert source.image(i, 3, 8).size == (8, 8)
            except UnreadableImage:
                pass


PAIRS = [("a.png", 'a dog, "the" dog'), ("b.png", "ein Bär"), ("a.png", "a second one")]
CAPTIONS = {
    "captions.txt": "\n".join(["image,caption", *(f'{name},"{text}"' for name, text in PAIRS)]),
    "x/Flickr8k.token.txt": "\n".join(f"{name}#{k}\t{text}" for k, (name, text) in enumerate(PAIRS)),
    "metadata.jsonl": "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in PAIRS),
    "captions_val.json": json.dumps({"images": [{"id": k, "file_name": f"{name}.png"} for k, name in enumerate("ab")],
                                     "annotations": [{"image_id": k % 2, "caption": text} for k, (_, text) in enumerate(PAIRS)]})}


def png():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
@fuzz
@given(name=st.sampled_from(sorted(CAPTIONS)), changes=edits)
def test_captions_files(tmp_path_factory, name, changes):
    """Mutated captions files of all kinds."""
    folder = tmp_path_factory.getbasetemp() / "fuzz_captions" / name.replace("/", "_")
    for image in ("a.png", "b.png"):
        if not (folder / image).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / image).write_bytes(png())
    (folder / name).write_bytes(mutate(CAPTIONS[name].encode(), changes))
    try_source(folder)


def packed(method):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("captions.txt", CAPTIONS["captions.txt"])
        archive.writestr("a.png", png())
        archive.writestr("b.png", png())
    return buffer.getvalue()


ZIPS = [packed(method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)]


@pytest.mark.slow
@fuzz
@given(base=st.sampled_from(ZIPS), changes=edits)
def test_zips(tmp_path_factory, base, changes):
    """Mutated archives, with each kind of compression."""
    path = tmp_path_factory.getbasetemp() / "fuzz.zip"
    path.write_bytes(mutate(base, changes))
    try_source(path)


def pictures():
    """A small picture in every format that is read."""
    image, found = Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)), []
    for kind, options in (("PNG", {}), ("JPEG", {}), ("GIF", {}), ("BMP", {}), ("WEBP", {}), ("TIFF", {}),
                          ("TIFF", dict(compression="tiff_lzw")), ("JPEG", dict(progressive=True))):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


def with_right_checksums(content):
    """A PNG whose chunks' checksums fit again, so that the decoder looks further."""
    content, k = bytearray(content), 8
    while k + 12 <= len(content):
        length = int.from_bytes(content[k:k + 4], "big")
        if k + 12 + length > len(content):
            break
        content[k + 8 + length:k + 12 + length] = zlib.crc32(content[k + 4:k + 8 + length]).to_bytes(4, "big")
        k += 12 + length
    return bytes(content)


@pytest.mark.slow
@fuzz
@given(base=st.sampled_from([png()] * 8 + pictures()), changes=edits)
def test_pictures(tmp_path_factory, base, changes):
    """Mutated PNGs, half of all, with checksums made right again, and other formats."""
    folder = tmp_path_factory.getbasetemp() / "fuzz_pictures"
    folder.mkdir(exist_ok=True)
    (folder / "captions.txt").write_text("image,caption\na.png,x\n")
    content = mutate(base, changes)
    (folder / "a.png").write_bytes(with_right_checksums(content) if content.startswith(b"\x89PNG") else content)
    try_source(folder)


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "checkpoint_epoch0001_step00000001.pt"
    save_checkpoint(dict(unet={"w": torch.ones(9)}, ema={"w": torch.ones(9)}, config=PRESETS["tiny"].to_dict(), step=3, epoch=1,
                         args={"seed": 0}), path)
    return path, path.read_bytes(), members(path)


@pytest.mark.slow
@fuzz
@given(changes=edits, inside=st.booleans())
def test_checkpoints(checkpoint, changes, inside):
    """Mutated checkpoints: the file's bytes, or the pickle in it with checksums that fit."""
    path, whole, parts = checkpoint
    mutated = path.with_name("mutated.pt")
    if inside:
        with zipfile.ZipFile(mutated, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, mutate(content, changes) if name.endswith("data.pkl") else content)
    else:
        mutated.write_bytes(mutate(whole, changes))
    with quick_and_quiet():
        try:
            payload = load_checkpoint(mutated)[0]
        except OURS:
            return
    assert isinstance(ModelConfig.from_dict(payload["config"]), ModelConfig)
