"""Ten thousand mutated captions files, archives, checkpoints and pictures: each loads, or is
refused by an error of our own kind, in little time and memory."""
import resource
import tarfile
import time
import warnings
import zipfile
from contextlib import contextmanager, suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from data import CaptionedImages, UnreadableImage
from layouts import LAYOUTS, as_bytes, packed, write
from models import PRESETS, ModelConfig, load_checkpoint, save_checkpoint
from test_data import stored

pytestmark = pytest.mark.slow
fuzz = settings(max_examples=2500, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))
edits = st.lists(st.tuples(st.sampled_from(["set", "cut", "insert", "repeat", "number"]),
                           st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)),
                 min_size=1, max_size=6)
EXTREMES, ORDERS = [0, 1, 127, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1], ["little", "big"]


def mutate(content, changes):
    """The bytes with some of them set, cut off, inserted, repeated, or made an extreme number."""
    content = bytearray(content)
    for kind, place, new in changes:
        k = int(place * len(content))
        end, replacement = {
            "set": (k + len(new), new), "insert": (k, new),
            "cut": (k + new[0] if new[0] % 2 else len(content), b""),
            "repeat": (k, content[k:k + 50] * (new[0] % 20)),
            "number": (k + 4, EXTREMES[new[-1] % 8].to_bytes(4, ORDERS[new[0] % 2]))}[kind]
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


GRADIENT = Image.linear_gradient("L").resize((12, 12)).convert("RGB")
TEXTS = {key: next(name for name in LAYOUTS[key] if not name.endswith(("png", "jpg")))
         for key in """flickr8k_kaggle flickr30k_kaggle flickr30k_tar csv_tab_metadata coco2017
         jsonl_text_list karpathy captions_json_map sidecar_flat utf16_captions""".split()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with these layouts."""
    folder = tmp_path_factory.mktemp("fuzz")
    for key in TEXTS:
        write(folder / key, LAYOUTS[key])
    return folder


@fuzz
@given(key=st.sampled_from(list(TEXTS)), changes=edits)
def test_captions_files(folder, key, changes):
    """Mutated captions files of all kinds."""
    text = mutate(as_bytes(LAYOUTS[key][TEXTS[key]]), changes)
    (folder / key / TEXTS[key]).write_bytes(text)
    try_source(folder / key)


MEMBERS = {"captions.txt": b"image,caption\na.png,one\nb.png,two\n", **dict.fromkeys(
    ("a.png", "b.png", f"{50 * 'long '}/\xe9.png"), stored(GRADIENT))}
ARCHIVES = [*(("zip", packed(MEMBERS, "zip", compression=method)) for method in (
    zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
    *2 * [("tar", packed(MEMBERS, "tar", format=kind)) for kind in (
        tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)]]   # which have long names in members of their own


@fuzz
@given(base=st.sampled_from(ARCHIVES), changes=edits, rights=st.booleans())
def test_archives(folder, base, changes, rights):
    """Mutated archives, with each kind of compression; the sums of half of the .tar files' headers
    are taken for right."""
    path = folder / f"set.{base[0]}"
    path.write_bytes(mutate(base[1], changes))
    with pytest.MonkeyPatch.context() as patch:
        if rights:
            patch.setattr(tarfile, "calc_chksums", lambda header: [tarfile.nti(header[148:156])])
        try_source(path)


PICTURES = [stored(GRADIENT, format=kind) for kind in (*7 * ["PNG"], "GIF", "BMP", "WEBP")] + [
    stored(GRADIENT, format=kind, **more) for kind, more in (
        ("JPEG", {}), ("JPEG", dict(progressive=True)), ("TIFF", {}),
        ("TIFF", dict(compression="tiff_lzw")))]


@fuzz
@given(base=st.sampled_from(PICTURES), changes=edits)
def test_pictures(monkeypatch, folder, base, changes):
    """Mutated PNGs, half of all, without a look at their checksums, and other formats."""
    chunks = PngImagePlugin.ChunkStream
    monkeypatch.setattr(chunks, "crc", chunks.crc_skip)
    write(folder / "set", {"metadata.csv": "image,text\na.png,x\n", "a.png": mutate(base, changes)})
    try_source(folder / "set")


@fuzz
@given(changes=edits, inside=st.booleans())
def test_checkpoints(folder, changes, inside):
    """Mutated checkpoints: the file's bytes, or the pickle in it with checksums that fit."""
    path, weights = folder / "checkpoint_epoch0001_step00000003.pt", {"w": torch.ones(9)}
    if not path.exists():
        save_checkpoint(dict(unet=weights, ema=weights, config=vars(PRESETS["tiny"]), step=3,
                             epoch=1, args={"seed": 0}), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: mutate(archive.read(name), changes if "data.pkl" in name else ())
                   for name in archive.namelist()}
    (folder / "mutated.pt").write_bytes(
        packed(members, "zip") if inside else mutate(path.read_bytes(), changes))
    with quick_or_refused():
        payload = load_checkpoint(folder / "mutated.pt")[0]
        assert ModelConfig(**payload["config"])
