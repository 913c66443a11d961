"""Captioned images in the layouts that people have: who gets which captions, and what is said."""
import re
import signal
import tarfile
import unicodedata
import zipfile

import numpy as np
import pytest

from data import CaptionedImages, split_images
from layouts import LAYOUTS, N, caption, packed, picture, pictures, write

# Layouts of more than one caption an image. All that are in no table below are read: all 30
# pictures have their own captions, and nothing is left out.
EACH = {key: 5 for key in LAYOUTS if key.startswith((
    "flickr", "karpathy", "coco", "link", "tar", "captions_beside", "two_caption_files", "preview",
    "csv_caption0to4"))} | {"jsonl_text_list": 2, "jsonl_captions_list": 2, "cub200": 10}
# Images to train on, to validate on; how many are left out as test.
PARTS = {
    "coco2017": (range(24), range(24, N), 0), "coco2014": (range(24), range(24, N), 0),
    **dict.fromkeys("""karpathy karpathy_filepath hf_splits_jsonl csv_of_each_split
        csv_and_lists_of_splits""".split(), (range(20), range(20, 25), 5)),
    **dict.fromkeys(("csv_split_column", "mnist_split_classes", "split_only_no_captions"),
                    (range(20), (), 10)),
    "coco_train_only": (range(24), (), 0), "class_train_val": (range(20), range(20, N), 0),
    "csv_empty_captions": ([n for n in range(N) if n % 3], (), 0),
    "partial_captions": (range(15), (), 0), "sidecars_of_others": (range(0, N, 2), (), 0)}
# What is left out.
LEFT_OUT = {
    "coco_train_only": r"3 .*captions_val2017.json' \(30 .*'000000000024.jpg'",
    "csv_empty_captions": "10 .*'images/0000.png'", "coco2014": "2 .*instances_train2014.json",
    "cub200": "1 .*train_test_split.txt", "flickr30k_kaggle": "1 .*'row 151'",
    "flickr8k_brownlee": "5 .*'ExpertAnnotations.txt'.*lemma.token", "hub_cache": "31 .*'blobs/0'",
    "img2dataset_files": "32 .*'00000.parquet', '00000_stats.json'",
    "karpathy_filepath": "30 .*'thumbs/0000_ab.jpg'", "coco2017": "2 .*instances_train2017.json",
    "partial_captions": "15 .*'0015.png'", "preview_beside": "1 .*'preview.png'",
    "sidecars_of_others": "15 .*'b/0001.png'.*15 .*'a/0001.txt'",
    "webdataset": "30 .*'00000.tar/0000.json'", "flickr8k_gone_image": "1 .*'gone.jpg.1'"}
# What the one line says, in this order; then what to do.
REFUSED = {
    **{key: f"{word}.*recipe" for key, word in {
        "flickr8k_two_zips": "Flickr8k_Dataset.zip", "mnist_csv": "mnist_train.csv",
        "mnist_idx": "train-images-idx3", "npz": "mnist.npz", "hf_parquet": "data/train-00000-of",
        "img2dataset_parquet": "00000.parquet", "save_to_disk": "data-00000-of-00001.arrow",
        "link_zip": "data.zip.*name a .zip"}.items()},
    **{key: f"{words}.*--captions FILE.*--caption-template" for key, words in {
        "hf_metadata_parquet": "metadata.parquet", "pokemon_types": "pokemon.csv.*name, type1",
        "celeba_torchvision": "list_attr_celeba.txt.*'img_align_celeba'",
        "stylegan": "dataset.json.*'00000'", "stylegan.zip": "dataset.json.*'00000'",
        "images_masks": "'images', 'masks'", "vehicles": "'bus', 'car', 'train'",
        "one_class": "'dog'", "class_stray_image": "'cat', 'dog'", "split_only_no_captions": "",
        "mnist_classes": "'0', '1'", "link_class_folders": "'0', '1'",
        "mnist_split_classes": "'0', '1'", "class_train_val": "'cat', 'dog'",
        "imagenet": "LOC_synset_mapping.txt.*'n01440764'", "kohya_no_sidecar": "'10_shiba dog'",
        "wikiart": "'Abstract_Expressionism'", "caltech256": "'001.ak47'",
        "csv_two_texts": "metadata.csv.*text.*caption.*--caption-column",
        "csv_two_captions": "captions.csv.*caption", "csv_unknown_split": "captions.csv.*'fold 2'",
        "csv_no_header": "captions.txt.*header", "csv_no_header_tab": "captions.txt.*header",
        "jsonl_two_captions": "metadata.jsonl.*text.*caption.*--caption-column",
        "jsonl_late_key": "metadata.jsonl.*text.*caption.*--caption-column",
        "jsonl_blip_caption": "metadata.jsonl.*blip_caption.*--caption-column",
        "json_sidecars": "30 .*'0000.txt'", "json_list_sidecars": "30 .*'0000.txt'",
        "yaml_sidecars": "30 .*'0000.yaml'", "xml_sidecars": "30 .*/0000.xml.*'cat', 'dog'",
        "empty_table": "captions.csv.*'cat', 'dog'", "header_alone": "captions.csv.*'cat', 'dog'",
        "table_of_others": "labels.csv.*'x9.png', 'cow/0000.png'",
        "link_dead_captions": "notes.txt.*No such file",
        "folders_alike_alone": "captions.csv.*30 .*'0000.png'",
        "two_names_for_one": "metadata.csv.*60 .*'test/0000.png'"}.items()},
    "tar_kaggle.tar.gz": "unpack", "two_of_one_stem": "captions.csv.* 1 .*'0003'",
    "partial_download": "metadata.csv.* 40 .* 10 .*'test/0000.png'.*--max-bad-images",
    "both_csv_and_captions": "captions.txt and metadata.csv .*'images/0000.png'.*--captions",
    "two_sidecars": "0000.caption and 0000.txt .*'0000.png'.*--captions",
    "csv_broken_line": "captions.csv.* 7 rows", "json_broken_line": "metadata.jsonl.* 7 rows",
    "latin1_table": "captions.csv.*utf-8", "latin1_sidecar": "0003.txt.*utf-8"}
# The words for {} by the images' numbers in turn; where it is another, the template.
WORDS = {
    "mnist_classes": range(10), "link_class_folders": range(10), "mnist_split_classes": range(10),
    "class_train_val": ("cat", "dog"), "class_stray_image": ("cat", "dog"),
    "imagenet": ("n01440764", "n01443537"), "kohya_no_sidecar": ("shiba dog", "dog"),
    "wikiart": ("Impressionism", "Abstract Expressionism"), "vehicles": ("bus", "train", "car"),
    "caltech256": ("ak47", "american-flag"), "stylegan": ("00000", "00001", "00002"),
    "stylegan.zip": ("00000", "00001", "00002")}
TEMPLATES = dict.fromkeys(WORDS, "a photo of a {}") | {
    "wikiart": "{}", "one_class": "a photo of my dog", "hf_metadata_parquet": "",
    "split_only_no_captions": "", "sidecar_flat": ""}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """A folder with all of them."""
    folder = tmp_path_factory.mktemp("layouts")
    for key, files in LAYOUTS.items():
        write(folder / key, files)
    return folder


def shown(source):
    """The numbers of the source's images, by what is to be seen on them."""
    return [round(np.mean(source.image(i, 1, 8)) / 8) for i in range(len(source))]


def check(source, train, val=(), each=1):
    """The source has these images and each of them its own captions; it validates on its own
    validation part or, where it has none, on images drawn from the training part."""
    numbers = shown(source)
    assert sorted(numbers) == [*train, *val]
    assert [source.captions(i) for i in range(len(source))] == [
        [caption(n, k) for k in range(each)] for n in numbers]
    held = sorted(numbers[i] for i in split_images(source, 0.1)[1])
    assert held == [*val] if val else len(held) == round(0.1 * len(train))


def refusal(path, *args, **options):
    """The message by which it is refused, one line."""
    with pytest.raises(ValueError) as caught:
        CaptionedImages(path, *args, **options)
    message = str(caught.value)
    assert message.startswith(f"--data {path}: ") and "\n" not in message
    return message.removeprefix(f"--data {path}: ")


@pytest.mark.parametrize("key", sorted(LAYOUTS.keys() - REFUSED.keys()))
def test_layouts_that_are_read(layouts, key):
    """Images have exactly their own captions, splits are followed, and the report says how many
    captions there are, with an example, which splits, and what was left out."""
    each, (train, val, test) = EACH.get(key, 1), PARTS.get(key, (range(N), (), 0))
    source = CaptionedImages(layouts / key)
    check(source, train, val, each)
    count = each * (len(train) + len(val) + test)
    assert re.search(rf"\b{count}\b.*'cap \d\d a dog, number 0'", source.report["captions"])
    assert re.findall(r"\d+", source.report.get("splits", "")) == [
        str(len(part)) for part in (train, val, range(test)) if val or test]
    said = source.report.get("left out", "")
    assert re.match(LEFT_OUT.get(key, "$"), said), said


@pytest.mark.parametrize("key", REFUSED)
def test_layouts_that_are_refused(layouts, key):
    """Where captions lie that are not read, contradict each other or may be another image's, or
    where folders' names may be captions, one line names what lies there and what to do."""
    assert re.search(REFUSED[key], refusal(layouts / key))


# What flags decide


@pytest.mark.parametrize("key", TEMPLATES)
def test_template(layouts, key):
    """--caption-template makes captions of folders' names, without kohya's and Caltech's numbers in
    front and without folders that are splits; one without {} is every image's caption, an empty
    one no caption; what is to test on stays left out."""
    template, words = TEMPLATES[key], WORDS.get(key, [""])
    source = CaptionedImages(layouts / key, template)
    train, val, _ = PARTS.get(key, (range(N), (), 0))
    assert (len(source), len(source.validation)) == (len(train) + len(val), len(val))
    assert [source.captions(i) for i in range(len(source))] == [
        [template.replace("{}", str(words[n % len(words)]))] for n in shown(source)]
    assert repr(template) in source.report["captions"]
    assert ("preview.png" in source.report.get("left out", "")) == (key == "class_stray_image")


@pytest.mark.parametrize("key", ["flickr8k_kaggle.zip", "sidecar_flat"])
def test_template_beside_captions(layouts, key):
    """A template with {} where there are captions is refused, not ignored."""
    assert re.search("--caption-template 'the {}'.*(captions.txt|.txt files)",
                     refusal(layouts / key, "the {}"))


@pytest.mark.parametrize("key", ["csv_two_texts", "jsonl_two_captions", "jsonl_blip_caption"])
def test_caption_column(layouts, key):
    """--caption-column takes the column that it names, in capitals or not; one that is not there is
    refused with those that are."""
    column = "Blip_caption" if "blip" in key else "Caption"
    check(CaptionedImages(layouts / key, column=column), range(N))
    assert re.search("metadata.*file_name.*aption", refusal(layouts / key, column="summary"))


@pytest.mark.parametrize("key, data, captions, images", [
    ("captions_beside", "Images", "captions.txt", N), ("coco2017", "train2017", "annotations", 24),
    ("karpathy", "images", "dataset_flickr8k.json", 25),
    ("flickr8k_two_zips", "Flickr8k_Dataset.zip", "Flickr8k_text.zip", N)])
def test_captions_elsewhere(layouts, tmp_path, key, data, captions, images):
    """--captions is a file, a folder or an archive; one of other images or that is not there is
    refused."""
    path = layouts / key / data
    source = CaptionedImages(path, captions=layouts / key / captions)
    assert [source.captions(i) for i in range(images)] == [
        [caption(n, k) for k in range(5)] for n in shown(source)]
    (tmp_path / "x.csv").write_text("image,caption\nnothing.png,a dog\n")
    for name in ("x.csv", "gone.csv", "gone"):
        assert name in refusal(path, captions=tmp_path / name)


# Names and words


@pytest.mark.parametrize("on_disk, written", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents(tmp_path, on_disk, written):
    """A name with its accent as a letter of its own, as macOS has it, is that with both in one; the
    words of a caption are kept, quotes, commas and accents too."""
    name, words = unicodedata.normalize(on_disk, "caf\xe9.png"), 'the "big" B\xe4r, twice'
    for cell in (words, '"the ""big"" B\xe4r, twice"'):
        source = CaptionedImages(write(tmp_path / cell[:1], {
            name: picture(3), "captions.csv":
            f"image,caption\n{unicodedata.normalize(written, name)},{cell}\n"}))
        assert source.names[0] == name and source.captions(0) == [words]


def test_zips_of_windows(tmp_path):
    """Back-slashes in a .zip's names part folders, UTF-8 names that are not marked as such are not
    taken apart into two letters for one, and what macOS adds is no picture."""
    files = {"XXcole\\0.png": picture(0), "dog\\1.png": picture(1), "__MACOSX\\dog\\._1.png": b"x"}
    (tmp_path / "set.zip").write_bytes(packed(files, "zip").replace(b"XX", "\xe9".encode()))
    source = CaptionedImages(tmp_path / "set.zip", "a photo of a {}")
    assert list(map(source.names.__getitem__, range(2))) == ["dog/1.png", "\xe9cole/0.png"]
    assert source.captions(1) == ["a photo of a \xe9cole"] and shown(source) == [1, 0]


@pytest.mark.parametrize("columns", ["image,caption", "caption,image", ",image,caption"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_stray_quotes(tmp_path, columns, end):
    """A cell that begins with a stray quote and swallows rows as its caption is a broken row, which
    is counted, whichever column stands first."""
    quotes = {7: '"cap 07', 9: 'cap 09"'}
    rows = [columns.replace("image", f"{n:04d}.png").replace("caption", quotes.get(
        n, f"cap {n:02d}")) for n in range(200)]
    source = CaptionedImages(write(tmp_path, pictures("<n>.png", numbers=range(200)) | {
        "captions.csv": end.join([columns, *rows])}))
    assert {source.names[i]: source.captions(i) for i in range(len(source))} == {
        f"{n:04d}.png": [f"cap {n:02d}"] for n in range(200) if n not in (7, 8, 9)}
    assert "'row 8'" in source.report["left out"]


# Archives and damage


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_the_folder_that_they_were_made_of(layouts, tmp_path, kind):
    """A .zip and a .tar give the names, captions, splits, fingerprint and pictures of the folder,
    or the same refusal."""
    def all_of(path):
        try:
            source = CaptionedImages(path)
        except ValueError as error:
            return str(error).replace(str(path), "")
        return (source.fingerprint, source.report, source.validation.tolist(), shown(source),
                [(source.names[i], source.captions(i)) for i in range(len(source))])

    for key, files in LAYOUTS.items():
        if not key.endswith(("zip", "tar", "gz")) and "link" not in key and key not in (
                "hub_cache", "webdataset"):
            path = write(tmp_path / f"{key}.{kind}", dict(sorted(files.items(), reverse=True)))
            assert all_of(path) == all_of(layouts / key), key


def test_damaged_tars_are_refused(tmp_path):
    """A .tar with a damaged header, one that is cut off, or one whose sizes lead in a circle is
    refused, not taken for a shorter one."""
    whole = packed(pictures("<n>.png"), "tar")   # a header and a picture take 1,024 bytes
    broken = whole[:1024 + 148] + b"x" + whole[1024 + 149:]
    back = tarfile.TarInfo("back")
    back.size = -512
    for content, word in ((broken, "damaged"), (whole[:2048], "cut off"), (whole[:2100], "cut off"),
                          (back.tobuf(tarfile.GNU_FORMAT) + whole, "negative")):
        (tmp_path / "set.tar").write_bytes(content)
        signal.alarm(60)   # ends the tests where it goes round for ever
        assert word in refusal(tmp_path / "set.tar", "")
        signal.alarm(0)


def test_encrypted_members_are_named(tmp_path):
    """That a .zip's member needs a password is in the message, for a picture and for captions."""
    for name in ("Images/0003_ab.jpg", "captions.txt"):
        path = write(tmp_path / "set.zip", LAYOUTS["flickr8k_kaggle"])
        with zipfile.ZipFile(path, "a") as archive:   # a comment has its directory written anew
            archive.getinfo(name).flag_bits, archive.comment = 1, b"locked"
        with pytest.raises(ValueError, match=f"{name}.*password"):
            CaptionedImages(path).image(3, 3, 8)
