"""Captioned images in the layouts that people have: who gets which captions, and what is said."""
import re
import unicodedata

import numpy as np
import pytest

from data import CaptionedImages, split_images
from layouts import FIVE, FLAT, KAGGLE, LAYOUTS, N, caption, lines, packed, picture, pictures, write
from test_data import run_python

# Captions an image, where they are from, and what is left out; all images have their own captions.
READ = {
    **dict.fromkeys(["flickr8k_kaggle", "flickr8k_kaggle.zip", "captions_beside", "tar_kaggle.tar",
                     "flickr30k_kaggle_commas", "link_images_folder", "link_each_image",
                     "link_whole", "link_captions", "link_circle"], (5, "captions.txt", "")),
    "flickr8k_brownlee": (5, "Flickr8k.token.txt", r"5 other files, such as 'ExpertAnnotations.*"),
    "flickr30k_tar": (5, "results_20130124.token", ""),
    "webdataset": (1, "30 .txt files", r"30 other files, such as '00000.tar/0000.json', .*"),
    "hf_root_csv": (1, "metadata.csv", ""),
    "hub_cache": (1, "snapshots/abc/train/metadata.csv", "31 other files, such as 'blobs/0', .*"),
    "csv_caption0to4": (5, "metadata.csv", ""), "csv_openclip": (1, "train.csv", ""),
    **dict.fromkeys(["csv_prompt", "csv_tab_metadata", "csv_semicolon"], (1, "metadata.csv", "")),
    **dict.fromkeys(["csv_image_path", "csv_filename", "csv_captions", "csv_id_noext",
                     "csv_absolute", "csv_windows", "csv_pandas_index"], (1, "captions.csv", "")),
    "csv_two_texts": (1, "metadata.csv (caption; --caption-column text takes the other)", ""),
    "csv_other_name": (1, "labels.csv", ""), "csv_train_csv": (1, "train.csv", ""),
    "csv_list": (2, "metadata.csv", ""),
    "csv_no_header": (1, "captions.txt", ""), "csv_no_header_tab": (1, "captions.txt", ""),
    "jsonl_text_list": (2, "metadata.jsonl", ""), "jsonl_captions_list": (2, "metadata.jsonl", ""),
    **dict.fromkeys(["jsonl_caption", "jsonl_prompt", "jsonl_blip_caption", "jsonl_image_key",
                     "jsonl_kohya"], (1, "metadata.jsonl", "")),
    "jsonl_two_captions": (
        1, "metadata.jsonl (caption; --caption-column text takes the other)", ""),
    "captions_jsonl": (1, "captions.jsonl", ""), "train_jsonl": (1, "train.jsonl", ""),
    "lavis": (5, "annotations/flickr30k_train.json", ""),
    "kohya_meta": (1, "meta_cap.json", ""),
    "captions_json_map": (1, "captions.json", ""),
    "both_csv_and_captions": (1, "captions.txt", "1 other files, such as 'metadata.csv'"),
    "two_caption_files_one_backup": (5, "captions.txt", "1 other .* such as 'backup/captions.txt'"),
    "partial_download": (1, "metadata.csv", "10 named images of folders that are not there, such "
                         "as 'test/0000.png', .*"),
    "sidecar_flat": (1, "30 .txt files", ""), "sidecar_caption_ext": (1, "30 .caption files", ""),
    "sidecar_kohya_two": (1, "30 .txt files", ""), "sidecar_deep": (1, "30 .txt files", ""),
    "mm_celeba": (1, "30 .txt files", ""),
    "img2dataset_files": (1, "30 .txt files", "32 other files, such as '00000/0000.json', .*"),
    "cub200": (10, "30 .txt files", "3 other files, such as 'CUB_200_2011/classes.txt', .*")}
# Captions an image, where they are from; which images are to train on and which to validate on.
SPLIT = {
    "karpathy": (5, "dataset_flickr8k.json", range(20), range(20, 25)),
    "karpathy_filepath": (5, "dataset_coco.json", range(20), range(20, 25)),
    "coco2017": (5, "annotations/captions_val2017.json, annotations/captions_train2017.json",
                 range(24), range(24, N)),
    "coco2014": (5, "annotations/captions_val2014.json, annotations/captions_train2014.json",
                 range(24), range(24, N)),
    "hf_splits_jsonl": (1, "test/metadata.jsonl, train/metadata.jsonl, validation/metadata.jsonl",
                        range(20), range(20, 25)),
    "csv_split_column": (1, "metadata.csv", range(20), ()),
    "csv_of_each_split": (1, "test.csv, train.csv, val.csv", range(20), range(20, 25))}
# Which of the images there are, the captions, and their classes by the images' numbers in turn.
CLASSES = {
    "mnist_classes": range(10), "link_class_folders": range(10),
    "mnist_split_classes": range(10), "class_train_val": ("cat", "dog"),
    "imagenet": ("n01440764", "n01443537"), "kohya_no_sidecar": ("shiba dog", "dog"),
    "wikiart": ("Impressionism", "Abstract Expressionism"),
    "caltech256": ("ak47", "american-flag"), "vehicles": ("bus", "train", "car")}
CLASS_SPLIT = {"mnist_split_classes": (20, 0, 10), "class_train_val": (20, 10, 0)}
NO_IMAGES = (r"no images among \d+ file\(s\), such as {}; name a \.zip itself, unpack a compressed "
             r"\.tar; for parquet, arrow, npz or idx see README\.md's recipe")
NO_CAPTIONS = (r"no captions: {}; give --captions FILE, --caption-column NAME or a "
               r"--caption-template: \{{\}} in it stands for an image's folder, one without \{{\}} "
               r"serves all images, an empty one is no caption")
REFUSED = {
    **{key: NO_IMAGES.format(re.escape(name)) for key, name in {
        "flickr8k_two_zips": "Flickr8k_Dataset.zip", "mnist_csv": "mnist_train.csv",
        "mnist_idx": "MNIST/raw/t10k-images-idx3-ubyte.gz", "npz": "mnist.npz",
        "hf_parquet": "data/train-00000-of-00001.parquet", "img2dataset_parquet": "00000.parquet",
        "save_to_disk": "data-00000-of-00001.arrow", "link_zip": "data.zip"}.items()},
    **{key: NO_CAPTIONS.format(reason) for key, reason in {
        "hf_metadata_parquet": r"metadata\.parquet may hold them \(not read\)",
        "celeba_torchvision": r"celeba/list_attr_celeba\.txt may hold them \(line 1: no col.*\)",
        "pokemon_types": r"pokemon\.csv may hold them \(line 1: no column caption, .* among name, "
                         r"type1, type2\)",
        "stylegan": r"dataset\.json may hold them \(.*\)",
        "stylegan.zip": r"dataset\.json may hold them \(.*\)",
        "split_only_no_captions": r"0000\.png is in no folder of one class among others",
        "one_class": r"0000\.png is in no folder of one class among others",
        "class_stray_image": r"preview\.png is in no folder of one class among others",
        "images_masks": "the folders hold files of the same names, as masks do"}.items()},
    "tar_kaggle.tar.gz": r"no folder, whole \.zip or \.tar \(unpack a compressed one\): .*",
    "flickr30k_kaggle": r"flickr30k_images/results\.csv: 1 rows with too few or too many columns, "
                        r"such as 'line 152'; mend them, or allow more with --max-bad-images, .*"}
LEFT_OUT = {
    "csv_empty_captions": (range(0, N, 3), r"10 empty captions, such as 'images/0000\.png', .*; 10 "
                           r"images without a caption, such as 'images/0000\.png', .*"),
    "partial_captions": (range(15, N), r"15 images without a caption, such as '0015\.png', .*"),
    "two_that_overlap": (range(20, N), r"10 images without a caption, such as '0020\.png', .*; 1 "
                         r"other files, such as 'metadata\.csv'"),
    "sidecars_of_others": (range(1, N, 2), r"15 images without a caption, such as 'b/0001\.png', "
                           r".*; 15 other files, such as 'a/0001\.txt', .*")}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """A folder with all of them."""
    folder = tmp_path_factory.mktemp("layouts")
    for key, files in LAYOUTS.items():
        write(folder / key, files)
    return folder


def numbers(source, images=None):
    """The numbers of the source's images, by what is to be seen on them."""
    images = range(len(source)) if images is None else images
    return [round(np.mean(source.image(i, 1, 8)) / 8) for i in images]


def check(source, expected, each=1):
    """The source has these images and each of them its own captions."""
    shown = numbers(source)
    assert sorted(shown) == list(expected)
    assert [source.captions(i) for i in range(len(source))] == [
        [caption(n, k) for k in range(each)] for n in shown]


def refusal(*args, **options):
    """The message by which it is refused, one line."""
    with pytest.raises(ValueError) as caught:
        CaptionedImages(*args, **options)
    message = str(caught.value)
    assert message.startswith(f"--data {args[0]}: ") and "\n" not in message
    return message.removeprefix(f"--data {args[0]}: ")


def test_every_layout_is_looked_at():
    """Each layout is in exactly one of the tables above, or has a test of its own."""
    tables = [*READ, *SPLIT, *CLASSES, *REFUSED, *LEFT_OUT, "coco_train_only"]
    assert sorted(tables) == sorted(LAYOUTS)


@pytest.mark.parametrize("key", READ)
def test_layouts_that_are_read(layouts, key):
    """All images have exactly their own captions, and the report says from where, how many, an
    example, and what was left out."""
    each, where, left_out = READ[key]
    source = CaptionedImages(layouts / key)
    check(source, range(N), each)
    assert not len(source.validation)
    assert source.report.pop("captions") == (
        f"{N * each} of {where}, {each} an image, such as {source.captions(0)[0]!r}")
    assert re.fullmatch(left_out, source.report.pop("left out", ""))
    assert not source.report


@pytest.mark.parametrize("key", SPLIT)
def test_own_splits(layouts, key):
    """The data's own training part is trained on, its validation part validated on (drawn from
    the training part where there is none), and its test part is in neither; all is said."""
    each, where, train, val = SPLIT[key]
    source = CaptionedImages(layouts / key)
    check(source, [*train, *val], each)
    of_train, of_val = split_images(source, 0.1)
    drawn = round(0.1 * len(train)) if not val else 0
    assert len(of_val) == len(val) + drawn
    if not drawn:
        assert sorted(numbers(source, of_train)) == [*train]
        assert sorted(numbers(source, of_val)) == [*val]
    assert source.report["captions"].startswith(f"{N * each} of {where}, {each} an image, such as ")
    assert source.report["splits"] == (
        f"the data's own: {len(train)} images to train on, {len(val)} to validate on, "
        f"{N - len(train) - len(val)} left out")


def test_captions_of_images_that_are_not_there(layouts):
    """COCO with its training pictures alone: the validation pictures' captions do no harm and are
    named."""
    source = CaptionedImages(layouts / "coco_train_only")
    check(source, range(24), 5)
    assert source.report["left out"].startswith("5 other files, such as 'annotations/captions_val")


@pytest.mark.parametrize("key", CLASSES)
def test_class_folders(layouts, key):
    """Folders become captions, without kohya's and Caltech's numbers in front and without folders
    that are splits, and the report says so."""
    words, (train, val, test) = CLASSES[key], CLASS_SPLIT.get(key, (N, 0, 0))
    source = CaptionedImages(layouts / key)
    assert len(source) == train + val and len(source.validation) == val
    for i, n in enumerate(numbers(source)):
        assert source.captions(i) == [f"a photo of a {words[n % len(words)]}"]
    assert source.report["captions"] == ("30 of --caption-template 'a photo of a {}', 1 an image, "
                                         f"such as {source.captions(0)[0]!r}")
    assert source.report.get("splits") == (
        f"the data's own: {train} images to train on, {val} to validate on, {test} left out"
        if train < N else None)


@pytest.mark.parametrize("key", LEFT_OUT)
def test_images_without_captions(layouts, key):
    """Empty captions and images without any are left out, counted and named."""
    without, said = LEFT_OUT[key]
    source = CaptionedImages(layouts / key)
    check(source, [n for n in range(N) if n not in without])
    assert re.fullmatch(said, source.report["left out"])


@pytest.mark.parametrize("key", REFUSED)
def test_layouts_that_are_refused(layouts, key):
    """Where captions lie that are not read, or folders' names may be none, one line names what
    lies there and what to do."""
    assert re.fullmatch(REFUSED[key], refusal(layouts / key))


def test_a_few_broken_rows_are_counted(layouts):
    """The one broken row of Flickr30k's results.csv is no reason to stop where few of so many."""
    source = CaptionedImages(layouts / "flickr30k_kaggle", max_missing=0.1)
    check(source, range(N), 5)
    assert source.report["left out"] == (
        "1 rows with too few or too many columns, such as 'line 152'")


# What flags decide


@pytest.mark.parametrize("key, template, expected", [
    ("one_class", "a photo of my dog", N * ["a photo of my dog"]),
    ("stylegan", "number {}", [f"number {n // 10:05d}" for n in range(N)]),
    ("stylegan.zip", "number {}", [f"number {n // 10:05d}" for n in range(N)]),
    ("images_masks", "{}", 15 * ["images"] + 15 * ["masks"]),
    ("hf_metadata_parquet", "", N * [""]), ("sidecar_flat", "", N * [""]),
    ("split_only_no_captions", "", 20 * [""])])
def test_template_by_hand(layouts, key, template, expected):
    """A template that is given is followed, also where its default is refused; one without {} is
    every image's caption, an empty one no caption, and what is to test on stays left out."""
    source = CaptionedImages(layouts / key, template)
    assert [source.captions(i) for i in range(len(source))] == [[text] for text in expected]
    assert f" of --caption-template {template!r}, 1 an image, " in source.report["captions"]


@pytest.mark.parametrize("data", ["Images", "Images.zip", "Images.tar"])
@pytest.mark.parametrize("captions", ["captions.txt", "texts", "texts.zip", "texts.tar"])
def test_captions_elsewhere(tmp_path, data, captions):
    """--captions is a file, a folder or an archive, beside images of each kind."""
    write(tmp_path / data, pictures("<n>_ab.jpg"))
    write(tmp_path / captions if captions[:5] == "texts" else tmp_path, {"captions.txt": FIVE})
    check(CaptionedImages(tmp_path / data, captions=tmp_path / captions), range(N), 5)


@pytest.mark.parametrize("key, data, captions, expected", [
    ("coco2017", "train2017", "annotations", range(24)),
    ("coco2017", "train2017", "annotations/captions_train2017.json", range(24)),
    ("karpathy", "images", "dataset_flickr8k.json", range(25)),
    ("flickr8k_two_zips", "Flickr8k_Dataset.zip", "Flickr8k_text.zip", range(N))])
def test_one_part_of_a_layout(layouts, key, data, captions, expected):
    """--data and --captions name two parts of what was downloaded."""
    check(CaptionedImages(layouts / key / data, captions=layouts / key / captions), expected, 5)


@pytest.mark.parametrize("key, name", [("csv_two_texts", "metadata.csv"),
                                       ("jsonl_two_captions", "metadata.jsonl")])
def test_caption_column(layouts, key, name):
    """--caption-column takes the column that it names; one that is not there is refused with those
    that are."""
    source = CaptionedImages(layouts / key, column="Text")
    assert [source.captions(i) for i in range(len(source))] == N * [["alt"]]
    assert source.report["captions"] == (f"30 of {name} (text; --caption-column caption takes the "
                                         "other), 1 an image, such as 'alt'")
    with pytest.raises(ValueError, match=f"{name}.* no column summary .* file_name, text, caption"):
        CaptionedImages(layouts / key, column="summary")


@pytest.mark.parametrize("name, text", [
    ("a.csv", "image,caption\nnothing.png,a dog\n"), ("a.jsonl", '{"file": 3}\n'), ("a.csv", None)])
def test_captions_by_hand_are_not_passed_over(layouts, tmp_path, name, text):
    """--captions of other images, of another kind, or not there, and --caption-column where there
    are no captions files, are refused, never replaced by the class folders' names."""
    if text:
        write(tmp_path, {name: text})
    for flag, value in (("captions", tmp_path / name), ("column", "caption")):
        with pytest.raises(ValueError, match=f"^--caption.* {value}: no captions of the images "):
            CaptionedImages(layouts / "mnist_classes", **{flag: value})


# Names


@pytest.mark.parametrize("on_disk, written", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents(tmp_path, on_disk, written):
    """A name with its accent as a letter of its own, as macOS has it, is that with both in one."""
    name = unicodedata.normalize(on_disk, "caf\xe9.png")
    row = unicodedata.normalize(written, f"caf\xe9.png,{caption(3)}\n".replace(" dog,", " dog"))
    write(tmp_path, {name: picture(3), "captions.csv": "image,caption\n" + row})
    source = CaptionedImages(tmp_path)
    assert source.names[0] == name and numbers(source) == [3] and len(source.captions(0)) == 1


def test_zips_of_windows(tmp_path):
    """Back-slashes in a .zip's names part folders; UTF-8 names that are not marked as such are not
    taken apart into two letters for one."""
    files = {f"{name}\\{n}.png": picture(n) for n, name in enumerate(("XXcole", "dog"))}
    content = packed(files, "zip").replace(b"XX", "\xe9".encode())
    (tmp_path / "set.zip").write_bytes(content)
    source = CaptionedImages(tmp_path / "set.zip")
    assert list(map(source.names.__getitem__, range(2))) == ["dog/1.png", "\xe9cole/0.png"]
    assert source.captions(1) == ["a photo of a \xe9cole"] and numbers(source) == [1, 0]


def test_one_image_under_two_names(tmp_path):
    """An image that a captions file means by one of two names gets no caption of the other's."""
    write(tmp_path, FLAT | {
        "metadata.csv": lines("file_name,text", 'train/<n>.png,"<caption>"')
        + lines(None, "test/<n>.png,of another picture", numbers=range(9))})
    source = CaptionedImages(tmp_path)
    check(source, range(N))
    assert source.report["left out"].startswith(
        "9 named images of folders that are not there, such as 'test/0000.png'")


# Archives and damage


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_the_folder_that_they_were_made_of(layouts, tmp_path, kind):
    """A .zip and a .tar give the names, captions, splits, fingerprint and bytes of the folder."""
    def all_of(path):
        try:
            source = CaptionedImages(path)
        except ValueError as error:
            return str(error).replace(str(path), "")
        images = range(len(source))
        return (source.fingerprint, source.report, source.validation.tolist(),
                [(source.names[i], source.captions(i), source.content(i)) for i in images])

    for key, files in LAYOUTS.items():
        if not any(key.endswith(("zip", "tar", "gz")) or name.endswith(".tar") or "link" in key
                   or key == "hub_cache" for name in files):
            shuffled = dict(sorted(files.items(), reverse=True))
            path = write(tmp_path / f"{key}.{kind}", shuffled)
            assert all_of(path) == all_of(layouts / key), key


def test_damaged_tars_are_refused(tmp_path):
    """A .tar with a damaged header, one that is cut off, or one whose sizes lead in a circle is
    refused, not taken for a shorter one."""
    whole = packed(pictures("<n>.png"), "tar")   # a header and a picture take 1,024 bytes
    broken, circle = bytearray(whole), bytearray(whole)
    broken[1024 + 148] ^= 1
    circle[1024 + 124:1024 + 136] = b"\xff" * 10 + (-512 & 0xffff).to_bytes(2, "big")
    circle[1024 + 148:1024 + 156] = b" " * 8
    circle[1024 + 148:1024 + 156] = b"%06o\0 " % sum(circle[1024:1536])
    for k, content in enumerate([broken, whole[:2048], whole[:2100], circle]):
        (tmp_path / f"{k}.tar").write_bytes(content)
    done = run_python("""
import sys, data
for path in sys.argv[1:]:
    try:
        print(len(data.CaptionedImages(path, "")))
    except ValueError as error:
        print("refused:", error)
""", *sorted(tmp_path.iterdir()), timeout=60)
    assert done.returncode == 0 and re.fullmatch(
        "(refused: --data .* damaged or cut off at byte .*\n){3}refused: .* a negative size\n",
        done.stdout), done.stdout + done.stderr


def test_encrypted_members_are_named(tmp_path):
    """That a .zip's member needs a password is in the message, for a picture and for captions."""
    for name in ("Images/0003_ab.jpg", "captions.txt"):
        content = bytearray(packed(KAGGLE, "zip"))
        for signature, name_at, flags_at in ((b"PK\3\4", 30, 6), (b"PK\1\2", 46, 8)):
            starts = [found.start() for found in re.finditer(re.escape(signature), content)]
            for k in starts:
                if content[k + name_at:].startswith(name.encode()):
                    content[k + flags_at] |= 1
        (tmp_path / "set.zip").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*needs a password"):
            CaptionedImages(tmp_path / "set.zip").image(3, 3, 8)


@pytest.mark.parametrize("name, row, where", [
    ("metadata.jsonl", '{"file_name": "<n>.png", "text": "<caption>"}', "JSONDecodeError: line 7"),
    ("captions.csv", '<n>.png,"<caption>"', "Error: line 7")])
def test_broken_lines_are_numbered(tmp_path, name, row, where):
    """The line of a captions file that is broken is named by its number."""
    header = None if name.endswith("jsonl") else "image,caption"
    rows = lines(header, row).splitlines()
    rows[6] = rows[6].replace('"}', "}") if header is None else rows[6].replace(' dog', ' "dog" x')
    write(tmp_path, FLAT | {name: "\n".join(rows)})
    assert refusal(tmp_path).startswith(f"{name} is not as expected: {where}: ")
