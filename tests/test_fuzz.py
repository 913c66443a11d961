"""Ten thousand mutated captions files, archives, checkpoints and pictures: each loads, or is
refused by an error of our own kind, in little time and memory."""
import io
import resource
import struct
import tarfile
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import CaptionedImages, UnreadableImage
from models import PRESETS, ModelConfig, load_checkpoint, save_checkpoint
from test_data import CAPTION_FILES, EXPECTED, make_files

pytestmark = pytest.mark.slow
fuzz = settings(max_examples=2500, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))
edits = st.lists(st.tuples(st.sampled_from(["set", "cut", "insert", "repeat", "number"]),
                           st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)),
                 min_size=1, max_size=6)
EXTREMES = [0, 1, 127, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]


def mutate(content, changes):
    """The bytes with some of them set, cut off, inserted, repeated, or made an extreme number."""
    content = bytearray(content)
    for kind, place, new in changes:
        k = int(place * len(content))
        end, replacement = {
            "set": (k + len(new), new), "insert": (k, new),
            "cut": (k + new[0] if new[0] % 2 else len(content), b""),
            "repeat": (k, content[k:k + 50] * (new[0] % 20)),
            "number": (k + 4, struct.pack("<>"[new[0] % 2] + "I", EXTREMES[new[-1] % 8]))}[kind]
        content[k:end] = replacement
    return bytes(content)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """All of it together takes less than 2 GiB more than before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20


@contextmanager
def quick_or_refused():
    """No example takes five seconds of this process's time; our own kinds of errors are fine."""
    began = time.process_time()
    with warnings.catch_warnings(), suppress(ValueError, OSError):
        warnings.simplefilter("ignore")
        yield
    assert time.process_time() - began < 5


def try_source(path):
    """Index the data and read its first pictures."""
    with quick_or_refused():
        source = CaptionedImages(path, max_missing=0.9)
        for i in range(min(len(source), 3)):
            assert all(text.encode() is not None for text in source.captions(i))
            with suppress(UnreadableImage):
                assert source.image(i, 3, 8).size == (8, 8)


def picture(kind="PNG", **options):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((12, 12)).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a data set in a sub-folder for each kind of captions file."""
    folder = tmp_path_factory.mktemp("fuzz")
    for k, name in enumerate(CAPTION_FILES):
        make_files(folder / str(k), EXPECTED, {name: ""})
    return folder


@fuzz
@given(k=st.integers(0, len(CAPTION_FILES) - 1), changes=edits)
def test_captions_files(folder, k, changes):
    """Mutated captions files of all kinds."""
    name, text = list(CAPTION_FILES.items())[k]
    (folder / str(k) / name).write_bytes(mutate(text.encode(), changes))
    try_source(folder / str(k))


def packed(members, method=zipfile.ZIP_STORED):
    """The bytes of an archive of these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
MEMBERS = {"captions.txt": CAPTION_FILES["captions.txt"].encode(), "a.png": picture(),
           "b.png": picture()}
ZIPS = [packed(MEMBERS, method) for method in METHODS]


@fuzz
@given(base=st.sampled_from(ZIPS), changes=edits)
def test_zips(folder, base, changes):
    """Mutated archives, with each kind of compression."""
    (folder / "set.zip").write_bytes(mutate(base, changes))
    try_source(folder / "set.zip")


def tar_of(members, kind):
    """The bytes of a .tar; PAX and GNU keep long names in members of their own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def with_right_sums(content):
    """A .tar whose headers' sums fit again, so that it is not refused for these."""
    content = bytearray(content)
    for k in range(0, len(content) - 511, 512):
        if content[k + 257:k + 262] == b"ustar":
            total = 256 + sum(content[k:k + 148]) + sum(content[k + 156:k + 512])
            content[k + 148:k + 156] = b"%06o\0 " % total
    return bytes(content)


TARS = [tar_of(MEMBERS | {f"{50 * 'long '}/\xe9.png": picture()}, kind)
        for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)] + [
        tar_of(MEMBERS, tarfile.USTAR_FORMAT)]


@fuzz
@given(base=st.sampled_from(TARS), changes=edits, rights=st.booleans())
def test_tars(folder, base, changes, rights):
    """Mutated .tar files, half of them with the headers' sums made right again."""
    content = mutate(base, changes)
    (folder / "set.tar").write_bytes(with_right_sums(content) if rights else content)
    try_source(folder / "set.tar")


PICTURES = [picture(kind) for kind in ("JPEG", "GIF", "BMP", "WEBP", "TIFF")] + [
    picture("TIFF", compression="tiff_lzw"), picture("JPEG", progressive=True)]


def with_right_checksums(content):
    """A PNG whose chunks' checksums fit again, so that the decoder looks further."""
    content, k = bytearray(content), 8
    while content.startswith(b"\x89PNG") and k + 12 <= len(content):
        end = k + 8 + int.from_bytes(content[k:k + 4], "big")
        if end + 4 > len(content):
            break
        content[end:end + 4] = zlib.crc32(content[k + 4:end]).to_bytes(4, "big")
        k = end + 4
    return bytes(content)


@fuzz
@given(base=st.sampled_from([picture()] * 7 + PICTURES), changes=edits)
def test_pictures(folder, base, changes):
    """Mutated PNGs, half of all, with checksums made right again, and other formats."""
    (folder / "set").mkdir(exist_ok=True)
    (folder / "set" / "captions.txt").write_text("image,caption\na.png,x\n")
    (folder / "set" / "a.png").write_bytes(with_right_checksums(mutate(base, changes)))
    try_source(folder / "set")


@pytest.fixture(scope="module")
def checkpoint(folder):
    """A checkpoint's bytes, and its members."""
    path, weights = folder / "checkpoint_epoch0001_step00000003.pt", {"w": torch.ones(9)}
    save_checkpoint(dict(unet=weights, ema=weights, config=asdict(PRESETS["tiny"]), step=3,
                         epoch=1, args={"seed": 0}), path)
    with zipfile.ZipFile(path) as archive:
        return path.read_bytes(), {name: archive.read(name) for name in archive.namelist()}


@fuzz
@given(changes=edits, inside=st.booleans())
def test_checkpoints(folder, checkpoint, changes, inside):
    """Mutated checkpoints: the file's bytes, or the pickle in it with checksums that fit."""
    whole, members = checkpoint
    path = folder / "mutated.pt"
    pickle, = [name for name in members if name.endswith("data.pkl")]
    mutated = {**members, pickle: mutate(members[pickle], changes)}
    path.write_bytes(packed(mutated) if inside else mutate(whole, changes))
    with quick_or_refused():
        payload = load_checkpoint(path)[0]
        assert ModelConfig(**payload["config"])
