"""The layouts in which people have captioned pictures, small: 30 grey pictures in most.

LAYOUTS is {key: {name: content}}; a Path stands for a link there. Picture n is of the grey level
8 n, whatever its name, and its captions are "cap NN a dog, number K".
"""
import io
import json
import re
import tarfile
import zipfile
from functools import lru_cache
from pathlib import Path, PurePath

from PIL import Image

N = 30
PARTS = {"train": range(20), "val": range(20, 25), "test": range(25, N)}


def caption(n, k=0):
    return f"cap {n:02d} a dog, number {k}"


def fill(pattern, n, k=0):
    """<n>: the picture's number, <k>: the caption's, <caption>: that caption, <1>: caption 1."""
    pattern = pattern.replace("<n>", f"{n:04d}").replace("<caption>", caption(n, k))
    return re.sub("<(.)>", lambda found: caption(n, found[1]), pattern.replace("<k>", str(k)))


@lru_cache(maxsize=None)
def picture(n, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), (8 * n, 8 * n, 8 * n)).save(buffer, kind)
    return buffer.getvalue()


def pictures(*patterns, numbers=range(N)):
    """Pictures whose names follow the patterns in turn."""
    names = {fill(patterns[n % len(patterns)], n): n for n in numbers}
    return {name: picture(n, "JPEG" if name.lower().endswith(("jpg", "jpeg")) else "PNG")
            for name, n in names.items()}


def lines(header, *patterns, numbers=range(N), each=1):
    """A captions file: a header, or none, and `each` lines a picture, patterns in turn."""
    rows = [fill(patterns[n % len(patterns)], n, k) for n in numbers for k in range(each)]
    return "".join(f"{line}\n" for line in [header, *rows] if line is not None)


def beside(pattern, text="<caption>", numbers=range(N)):
    """A file for each picture."""
    return {fill(pattern, n): fill(text, n) for n in numbers}


def of_parts(pattern, *rows):
    """A captions file for each part of the data."""
    return {pattern.format(part): lines(*rows, numbers=PARTS[part]) for part in PARTS}


def packed(files, kind, **options):
    """The bytes of a zip, tar or tar.gz of these files."""
    buffer = io.BytesIO()
    with (zipfile.ZipFile(buffer, "w", **options) if kind == "zip" else tarfile.open(
            fileobj=buffer, mode="w:gz" if kind == "gz" else "w", **options)) as archive:
        for name, content in files.items():
            content, member = as_bytes(content), tarfile.TarInfo(name)
            member.size = len(content)
            if kind == "zip":
                archive.writestr(name, content)
            else:
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def as_bytes(content):
    return content.encode() if isinstance(content, str) else content


def write(path, files):
    """Make path, a folder or, as its suffix says, an archive, of these files; returns it."""
    if path.suffix in (".zip", ".tar", ".gz"):
        files = {"": packed(files, path.suffix[1:])}
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, PurePath):
            file.symlink_to(content)
        else:
            file.write_bytes(as_bytes(content))
    return path


def coco(year, prefix="", present=("train", "val")):
    """COCO's folders and annotations; `present`: the splits whose pictures are there."""
    files = {}
    for split, numbers in (("train", range(24)), ("val", range(24, N))):
        name = f"{prefix.format(split)}00000000<n>.jpg"
        notes = [dict(image_id=n, caption=caption(n, k)) for n in numbers for k in range(5)]
        images = [dict(license=1, file_name=fill(name, n), id=n) for n in numbers]
        files |= {f"annotations/captions_{split}{year}.json": json.dumps(
            dict(info={}, licenses=[], images=images, annotations=notes)),
            f"annotations/instances_{split}{year}.json": "{}"}
        if split in present:
            files |= pictures(f"{split}{year}/{name}", numbers=numbers)
    return files


def karpathy(**extra):
    """Karpathy's JSON: 20 pictures to train on, 5 to validate on, 5 to test on."""
    return json.dumps(dict(dataset="flickr8k", images=[dict(
        extra, imgid=n, filename=f"{n:04d}_ab.jpg", split=part,
        sentences=[dict(tokens=[], raw=caption(n, k), imgid=n) for k in range(5)])
        for part in PARTS for n in PARTS[part]]))


def img2dataset(shard, name):
    """What img2dataset leaves of ten pictures."""
    numbers = range(10 * shard, 10 * shard + 10)
    return (pictures(f"{name}.jpg", numbers=numbers) | beside(f"{name}.txt", numbers=numbers)
            | beside(f"{name}.json", '{"caption": "<caption>", "key": "<n>"}', numbers))


def digits(pattern, numbers=range(N)):
    """One folder a digit."""
    return pictures(*(f"{pattern}{k}/<n>.png" for k in range(10)), numbers=numbers)


IMAGES, FLAT = pictures("images/<n>.png"), pictures("<n>.png")
FLICKR, CLASSES = pictures("Images/<n>_ab.jpg"), pictures("cat/<n>.png", "dog/<n>.png")
TOKENS = lines(None, "<n>_ab.jpg#<k>\t<caption>", each=5)
FIVE = lines("image,caption", '<n>_ab.jpg,"<caption>"', each=5)
CSV = lines("image,caption", '<n>.png,"<caption>"')
KAGGLE = FLICKR | {"captions.txt": FIVE}
# Pictures in images/ and one captions file: its name, its header if it has one, a row.
TABLES = """
csv_prompt          metadata.csv   file_name,prompt        images/<n>.png,"<caption>"
csv_two_texts       metadata.csv   file_name,text,caption  images/<n>.png,alt,"<caption>"
csv_openclip        train.csv      filepath<tab>title      images/<n>.png<tab><caption>
csv_tab_metadata    metadata.csv   file_name<tab>text      images/<n>.png<tab><caption>
csv_semicolon       metadata.csv   file_name;text          images/<n>.png;<caption>
csv_image_path      captions.csv   image_path,caption      images/<n>.png,"<caption>"
csv_filename        captions.csv   filename,caption        <n>.png,"<caption>"
csv_captions        captions.csv   image,captions          <n>.png,"<caption>"
csv_id_noext        captions.csv   image,caption           <n>,"<caption>"
csv_absolute        captions.csv   image,caption           /scratch/me/images/<n>.png,"<caption>"
csv_windows         captions.csv   image,caption           C:\\me\\images\\<n>.png,"<caption>"
csv_pandas_index    captions.csv   ,image,caption          <n>,<n>.png,"<caption>"
csv_other_name      labels.csv     file_name,text          images/<n>.png,"<caption>"
csv_train_csv       train.csv      file_name,text          images/<n>.png,"<caption>"
csv_two_captions    captions.csv   image,caption,caption   <n>.png,other,"<caption>"
csv_unknown_split   captions.csv   image,caption,split     <n>.png,"<caption>",fold 2
csv_of_excel        captions.csv   <bom>"image","caption"  "<n>.png","<caption>",<return>
jsonl_text_list     metadata.jsonl  {"file_name": "images/<n>.png", "text": ["<0>", "<1>"]}
jsonl_captions_list metadata.jsonl  {"file_name": "images/<n>.png", "captions": ["<0>", "<1>"]}
jsonl_caption       metadata.jsonl  {"file_name": "images/<n>.png", "caption": "<0>", "width": 24}
jsonl_prompt        metadata.jsonl  {"file_name": "images/<n>.png", "prompt": "<caption>"}
jsonl_blip_caption  metadata.jsonl  {"file_name": "images/<n>.png", "blip_caption": "<caption>"}
jsonl_two_captions  metadata.jsonl  {"file_name": "images/<n>.png", "text": "alt", "caption": "<0>"}
jsonl_image_key     metadata.jsonl  {"image": "images/<n>.png", "text": "<caption>"}
jsonl_kohya         metadata.jsonl  {"image_path": "images/<n>.png", "caption": "<0>", "size": [2]}
captions_jsonl      captions.jsonl  {"file_name": "images/<n>.png", "caption": "<caption>"}
train_jsonl         train.jsonl     {"file_name": "images/<n>.png", "text": "<caption>"}
""".replace("<tab>", "\t").replace("<bom>", "\ufeff").replace("<return>", "\r")
LAYOUTS = {key: IMAGES | {name: lines(*header or [None], row)} for key, name, *header, row in (
    re.split(" {2,}| (?=metadata.jsonl)", line) for line in TABLES.strip().split("\n"))} | {
    # Flickr
    "flickr8k_kaggle": KAGGLE, "flickr8k_kaggle.zip": KAGGLE, "captions_beside": KAGGLE,
    "tar_kaggle.tar": KAGGLE, "tar_kaggle.tar.gz": KAGGLE,
    "flickr8k_brownlee": pictures("Flicker8k_Dataset/<n>_ab.jpg") | {
        "Flickr8k.token.txt": TOKENS, "Flickr8k.lemma.token.txt": TOKENS.replace("dog", "LEMMA"),
        "ExpertAnnotations.txt": "0000_ab.jpg\t0000_ab.jpg#0\t1\t1\t1\n"}
    | of_parts("Flickr_8k.{}Images.txt", None, "<n>_ab.jpg"),
    "flickr8k_two_zips": {"Flickr8k_Dataset.zip": packed(FLICKR, "zip"),
                          "Flickr8k_text.zip": packed({"Flickr8k.token.txt": TOKENS}, "zip")},
    # The real file too has one row without its last pipe.
    "flickr30k_kaggle": pictures("flickr30k_images/flickr30k_images/10<n>.jpg") | {
        "flickr30k_images/results.csv": lines(
            "image_name| comment_number| comment", "10<n>.jpg| <k>| <caption>", each=5)
        + "100003.jpg| 4   A dog runs across the grass .\n"},
    "flickr30k_kaggle_commas": FLICKR | {"captions.txt": lines(
        "image_name,comment_number,comment", "<n>_ab.jpg,<k>,<caption>", each=5)},
    "flickr30k_tar": pictures("flickr30k-images/10<n>.jpg") | {
        "results_20130124.token": lines(None, "10<n>.jpg#<k>\t<caption>", each=5)},
    "flickr8k_gone_image": FLICKR | {"captions.txt": FIVE + "gone.jpg.1,x\n"},
    "karpathy": pictures("images/<n>_ab.jpg") | {"dataset_flickr8k.json": karpathy()},
    "karpathy_filepath": pictures("val2014/<n>_ab.jpg") | pictures("thumbs/<n>_ab.jpg") | {
        "dataset_coco.json": karpathy(filepath="val2014")},
    "lavis": IMAGES | {"annotations/flickr30k_train.json": json.dumps(
        [dict(image=f"images/{n:04d}.png", caption=[caption(n)]) for n in range(N)])},
    # COCO
    "coco2017": coco(2017), "coco2014": coco(2014, "COCO_{}2014_"),
    "coco_train_only": coco(2017, present=["train"]),
    # Hugging Face
    "hf_root_csv": FLAT | {"metadata.csv": CSV},
    "hf_splits_jsonl": of_parts(
        "{}/metadata.jsonl", None, '{"file_name": "<n>.png", "text": "<caption>"}') | {
        f"{part}/{n:04d}.png": picture(n) for part in PARTS for n in PARTS[part]},
    "hub_cache": {f"blobs/{n}": picture(n) for n in range(N)} | {"blobs/m": CSV} | {
        f"snapshots/abc/train/{n:04d}.png": Path(f"../../../blobs/{n}") for n in range(N)} | {
        "snapshots/abc/train/metadata.csv": Path("../../../blobs/m")},
    "hf_parquet": {"data/train-00000-of-00001.parquet": b"PAR1"},
    "hf_metadata_parquet": FLAT | {"metadata.parquet": b"PAR1"},
    "save_to_disk": {"data-00000-of-00001.arrow": b"ARROW1", "dataset_info.json": "{}"},
    # Tables
    "csv_caption0to4": IMAGES | {"metadata.csv": lines(
        "file_name,split," + ",".join(f"caption_{k}" for k in range(5)),
        'images/<n>.png,train,"<0>","<1>","<2>","<3>","<4>"')},
    "csv_split_column": IMAGES | {"metadata.csv": lines(
        "file_name,text,split", *20 * ['images/<n>.png,"<caption>",train'],
        *10 * ['images/<n>.png,"<caption>",test'])},
    "csv_of_each_split": IMAGES | of_parts("{}.csv", "file_name,text", '<n>.png,"<caption>"'),
    "csv_and_lists_of_splits": IMAGES | {"captions.csv": CSV} | of_parts(
        "{}.csv", "file_name,text", '<n>.png,"<caption>"'),
    "csv_empty_captions": IMAGES | {"metadata.csv": lines(
        "file_name,text", "images/<n>.png,", *2 * ['images/<n>.png,"<caption>"'])},
    "csv_no_header": FLAT | {"captions.txt": CSV.partition("\n")[2]},
    "csv_no_header_tab": FLAT | {"captions.txt": lines(None, "<n>.png\t<caption>")},
    "captions_json_map": IMAGES | {"captions.json": json.dumps(
        {f"{n:04d}.png": caption(n) for n in range(N)})},
    "kohya_meta": IMAGES | {"meta_cap.json": json.dumps(
        {f"/scratch/me/images/{n:04d}": {"caption": caption(n)} for n in range(N)})},
    "both_csv_and_captions": IMAGES | {
        "captions.txt": CSV, "metadata.csv": CSV.replace("dog", "x")},
    "two_caption_files_one_backup": KAGGLE | {"backup/captions.txt": FIVE},
    "partial_captions": FLAT | {"metadata.csv": "".join(CSV.splitlines(True)[:16])},
    "partial_download": pictures("train/<n>.png") | {"metadata.csv": lines(
        "image,text", 'train/<n>.png,"<caption>"')
        + lines(None, "test/<n>.png,x", numbers=range(10))},
    # Sidecars
    "sidecar_flat": FLAT | beside("<n>.txt"), "sidecar_caption_ext": FLAT | beside("<n>.caption"),
    **{key: pictures(f"{even}<n>.png", f"{odd}<n>.png")
       | beside(f"{even}<n>.txt", "<caption>\n", range(0, N, 2)) | beside(
           f"{odd}<n>.txt", "<caption>\n", range(1, N, 2)) for key, even, odd in (
        ("sidecar_kohya_two", "10_shiba dog/", "5_style/"),
        ("sidecar_train_in_name", "train ", "test "))},
    "cub200": pictures(*(f"CUB_200_2011/images/00{k}.Tern/<n>.jpg" for k in range(3))) | {
        f"text/00{n % 3}.Tern/{n:04d}.txt": lines(None, "<caption>", numbers=[n], each=10)
        for n in range(N)} | {"CUB_200_2011/train_test_split.txt": "1 0\n"},
    "img2dataset_files": img2dataset(0, "00000/<n>") | img2dataset(1, "00001/<n>")
    | img2dataset(2, "00002/<n>") | {"00000_stats.json": "{}", "00000.parquet": b"PAR1"},
    "img2dataset_parquet": {"00000.parquet": b"PAR1"},
    "webdataset": {f"0000{s}.tar": packed(img2dataset(s, "<n>"), "tar") for s in range(3)},
    "mm_celeba": pictures("images/<n>.jpg") | beside("text/celeba-caption/<n>.txt"),
    "sidecars_of_others": pictures("a/<n>.png", "b/<n>.png") | beside("a/<n>.txt"),
    # What must not be guessed, lost or swapped
    "utf16_captions": FLAT | {"captions.csv": CSV.encode("utf-16")},
    "utf16_metadata": FLAT | {"metadata.csv": b"\xfe\xff" + CSV.encode("utf-16-be")},
    "latin1_table": CLASSES | {"captions.csv": CSV.replace("dog", "caf\xe9").encode("latin-1")},
    "latin1_sidecar": FLAT | beside("<n>.txt") | {"0003.txt": "caf\xe9".encode("latin-1")},
    "json_sidecars": FLAT | beside("<n>.txt", '{"caption": "<caption>"}'),
    "json_list_sidecars": FLAT | beside("<n>.txt", '[{"caption": "<caption>"}]'),
    "csv_broken_line": FLAT | {"captions.csv": CSV.replace("cap 07", 'cap" 07')},
    "json_broken_line": FLAT | {"metadata.jsonl": lines(
        None, '{"image": "<n>.png", "text": "<caption>"}').replace('"cap 07', "cap 07")},
    "yaml_sidecars": FLAT | beside("<n>.yaml", "caption: <caption>"),
    "xml_sidecars": CLASSES | beside("annotations/<n>.xml", "<name><caption></name>"),
    "two_sidecars": FLAT | beside("<n>.txt") | beside("<n>.caption", "a tag, another"),
    "empty_table": CLASSES | {"captions.csv": ""},
    "header_alone": CLASSES | {"captions.csv": "image,caption\n"},
    "table_of_others": CLASSES | {"labels.csv": "image,caption\nx9.png,a\ncow/0000.png,a cow\n"},
    "preview_beside": KAGGLE | {"preview.png": picture(1)},
    "folders_alike": {f"{'ab'[n // 15]}/i/{n % 15}.png": picture(n) for n in range(N)} | {
        f"{folder}/metadata.csv": "image,text\n" + "".join(
            f"i/{n % 15}.png,{caption(n)}\n" for n in range(start, start + 15))
        for folder, start in (("a", 0), ("b", 15))},
    "folders_alike_alone": pictures("a/<n>.png") | pictures("b/<n>.png") | {"captions.csv": CSV},
    "two_of_one_stem": FLAT | {"0003.jpg": picture(4), "captions.csv": CSV.replace(".png", "")},
    "two_names_for_one": FLAT | {"metadata.csv": lines(
        "file_name,text", "test/<n>.png,of another") + lines(None, 'train/<n>.png,"<caption>"')},
    "jsonl_late_key": FLAT | {"metadata.jsonl": '{"image": "0000.png", "text": "alt"}\n' + lines(
        None, '{"image": "<n>.png", "text": "alt", "caption": "<caption>"}')},
    # Classes
    "mnist_classes": digits(""),
    "mnist_split_classes": digits("train/", range(20)) | digits("test/", range(20, N)),
    "class_train_val": pictures("train/cat/<n>.png", "train/dog/<n>.png", numbers=range(20))
    | pictures("val/cat/<n>.png", "val/dog/<n>.png", numbers=range(20, N)),
    "imagenet": pictures("train/n01440764/<n>.JPEG", "train/n01443537/<n>.JPEG") | {
        "LOC_synset_mapping.txt": "n01440764 tench, Tinca tinca\nn01443537 goldfish\n"},
    "split_only_no_captions": pictures("train/<n>.png", numbers=range(20))
    | pictures("test/<n>.png", numbers=range(20, N)),
    "kohya_no_sidecar": pictures("10_shiba dog/<n>.png", "1_dog/<n>.png"),
    "wikiart": pictures("Impressionism/monet_<n>.jpg", "Abstract_Expressionism/monet_<n>.jpg"),
    "caltech256": pictures("001.ak47/<n>.jpg", "002.american-flag/<n>.jpg"),
    "vehicles": pictures("bus/<n>.png", "train/<n>.png", "car/<n>.png"),
    "class_stray_image": CLASSES | {"preview.png": picture(1)},
    "one_class": pictures("dog/<n>.png"),
    "stylegan": (stylegan := pictures(*(f"0000{k}/<n>.png" for k in range(3))) | {
        "dataset.json": json.dumps({"labels": [[f"0000{n % 3}/{n:04d}.png", n] for n in (0, 1)]})}),
    "stylegan.zip": stylegan,
    "images_masks": {f"{folder}/{n:04d}.png": picture(n) for folder in ("images", "masks")
                     for n in range(15)},
    # Other kinds
    "pokemon_types": pictures("images/poke<n>.png") | {
        "pokemon.csv": lines("Name,Type1,Type2", "poke<n>,Grass,")},
    "celeba_torchvision": pictures("celeba/img_align_celeba/00<n>.jpg") | {
        "celeba/list_attr_celeba.txt": lines("30\nMale Smiling Young ", "00<n>.jpg -1  1 -1")},
    "mnist_idx": {"MNIST/raw/train-images-idx3-ubyte.gz": b"\x1f\x8b"},
    "mnist_csv": {"mnist_train.csv": "label,pixel0,pixel1\n" + 9 * "3,0,0\n"},
    "npz": {"mnist.npz": b"PK\3\4"},
    # Links, to the layouts above
    "link_images_folder": {"Images": Path("../flickr8k_kaggle/Images"), "captions.txt": FIVE},
    "link_each_image": {name: Path("../../flickr8k_kaggle") / name for name in FLICKR} | {
        "captions.txt": FIVE},
    "link_whole": {"": Path("flickr8k_kaggle")},
    "link_captions": FLICKR | {"captions.txt": Path("../flickr8k_kaggle/captions.txt")},
    "link_class_folders": {str(k): Path(f"../mnist_classes/{k}") for k in range(10)},
    "link_circle": KAGGLE | {"Images/up": Path(".."), "again": Path("Images")},
    "link_zip": {"data.zip": Path("../flickr8k_kaggle.zip")},
    "link_dead_captions": CLASSES | {"notes.txt": Path("nowhere")}}
