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
SPECIES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")


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


def packed(files, kind):
    """The bytes of a zip, tar or tar.gz of these files."""
    files = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write(path, files):
    """Make path, a folder or, as its suffix says, an archive, of these files; returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix[1:]
    for name, content in ({"": packed(files, kind)} if kind in ("zip", "tar", "gz")
                          else files).items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, PurePath):
            file.symlink_to(content)
        else:
            file.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def coco(year, prefix="", present=("train", "val")):
    """COCO's folders and annotations; `present`: the splits whose pictures are there."""
    files = {}
    for split, numbers in (("train", range(24)), ("val", range(24, N))):
        name = f"{prefix.format(split)}00000000<n>.jpg"
        notes = [dict(image_id=n, id=10 * n + k, caption=caption(n, k))
                 for n in numbers for k in range(5)]
        images = [dict(license=1, file_name=fill(name, n), id=n) for n in numbers]
        for kind in ("instances", "person_keypoints"):
            files[f"annotations/{kind}_{split}{year}.json"] = "{}"
        files[f"annotations/captions_{split}{year}.json"] = json.dumps(
            dict(info={}, licenses=[], images=images, annotations=notes))
        if split in present:
            files |= pictures(f"{split}{year}/{name}", numbers=numbers)
    return files


def karpathy(**extra):
    """Karpathy's JSON: 20 pictures to train on, 5 to validate on, 5 to test on."""
    return json.dumps(dict(dataset="flickr8k", images=[dict(
        extra, sentids=[5 * n], imgid=n, filename=f"{n:04d}_ab.jpg",
        sentences=[dict(tokens=[], raw=caption(n, k), imgid=n) for k in range(5)],
        split="train" if n < 20 else "val" if n < 25 else "test") for n in range(N)]))


def img2dataset(shard, name):
    """What img2dataset leaves of ten pictures."""
    numbers = range(10 * shard, 10 * shard + 10)
    about = '{"url": "http://x", "caption": "<caption>", "key": "<n>", "status": "success"}'
    return (pictures(f"{name}.jpg", numbers=numbers) | beside(f"{name}.txt", numbers=numbers)
            | beside(f"{name}.json", about, numbers))


def digits(pattern, numbers=range(N)):
    """One folder a digit."""
    return pictures(*(pattern.replace("<digit>", str(k)) for k in range(10)), numbers=numbers)


IMAGES = pictures("images/<n>.png")
FLAT = pictures("<n>.png")
FLICKR = pictures("Images/<n>_ab.jpg")
TOKENS = '<n>_ab.jpg#<k>\t<caption>'
FIVE = lines("image,caption", '<n>_ab.jpg,"<caption>"', each=5)
KAGGLE = FLICKR | {"captions.txt": FIVE}
# Pictures in images/ and one captions file: its name, its header, a row.
TABLES = {
    "csv_caption0to4": (
        "metadata.csv", "file_name,split,caption_0,caption_1,caption_2,caption_3,caption_4",
        'images/<n>.png,train,"<0>","<1>","<2>","<3>","<4>"'),
    "csv_prompt": ("metadata.csv", "file_name,prompt", 'images/<n>.png,"<caption>"'),
    "csv_two_texts": ("metadata.csv", "file_name,text,caption", 'images/<n>.png,alt,"<caption>"'),
    "csv_openclip": ("train.csv", "filepath\ttitle", "images/<n>.png\t<caption>"),
    "csv_tab_metadata": ("metadata.csv", "file_name\ttext", "images/<n>.png\t<caption>"),
    "csv_semicolon": ("metadata.csv", "file_name;text", "images/<n>.png;<caption>"),
    "csv_image_path": ("captions.csv", "image_path,caption\r", 'images/<n>.png,"<caption>"\r'),
    "csv_filename": ("captions.csv", "filename,caption", '<n>.png,"<caption>"'),
    "csv_captions": ("captions.csv", "image,captions", '<n>.png,"<caption>"'),
    "csv_id_noext": ("captions.csv", "image,caption", '<n>,"<caption>"'),
    "csv_absolute": ("captions.csv", "image,caption", '/scratch/me/images/<n>.png,"<caption>"'),
    "csv_windows": ("captions.csv", "image,caption", r'C:\Users\me\images\<n>.png,"<caption>"'),
    "csv_pandas_index": ("captions.csv", ",image,caption", '<n>,<n>.png,"<caption>"'),
    "csv_other_name": ("labels.csv", "file_name,text", 'images/<n>.png,"<caption>"'),
    "csv_train_csv": ("train.csv", "file_name,text", 'images/<n>.png,"<caption>"'),
    "csv_list": ("metadata.csv", "file_name,text", '<n>.png,"[""<0>"", ""<1>""]"'),
    "csv_empty_captions": ("metadata.csv", "file_name,text", "images/<n>.png,",
                           *2 * ['images/<n>.png,"<caption>"']),
    "jsonl_text_list": ("metadata.jsonl", None,
                        '{"file_name": "images/<n>.png", "text": ["<0>", "<1>"]}'),
    "jsonl_captions_list": ("metadata.jsonl", None,
                            '{"file_name": "images/<n>.png", "captions": ["<0>", "<1>"]}'),
    "jsonl_caption": ("metadata.jsonl", None,
                      '{"file_name": "images/<n>.png", "caption": "<caption>", "width": 24}'),
    "jsonl_prompt": ("metadata.jsonl", None,
                     '{"file_name": "images/<n>.png", "prompt": "<caption>"}'),
    "jsonl_blip_caption": ("metadata.jsonl", None, '{"file_name": "images/<n>.png", '
                           '"blip_caption": "<caption>", "score": 0.3}'),
    "jsonl_two_captions": ("metadata.jsonl", None, '{"file_name": "images/<n>.png", '
                           '"text": "alt", "caption": "<caption>", "tags": "x"}'),
    "jsonl_image_key": ("metadata.jsonl", None,
                        '{"image": "images/<n>.png", "text": "<caption>"}'),
    "jsonl_kohya": ("metadata.jsonl", None, '{"image_path": "images/<n>.png", '
                    '"caption": "<caption>", "image_size": [24, 20]}'),
    "captions_jsonl": ("captions.jsonl", None,
                       '{"file_name": "images/<n>.png", "caption": "<caption>"}'),
    "train_jsonl": ("train.jsonl", None, '{"file_name": "images/<n>.png", "text": "<caption>"}')}
LAYOUTS = {key: IMAGES | {name: lines(header, *rows)}
           for key, (name, header, *rows) in TABLES.items()} | {
    # Flickr
    "flickr8k_kaggle": KAGGLE, "flickr8k_kaggle.zip": KAGGLE, "captions_beside": KAGGLE,
    "tar_kaggle.tar": KAGGLE, "tar_kaggle.tar.gz": KAGGLE,
    "flickr8k_brownlee": pictures("Flicker8k_Dataset/<n>_ab.jpg") | {
        "Flickr8k.token.txt": lines(None, TOKENS, each=5),
        "Flickr8k.lemma.token.txt": lines(None, "<n>_ab.jpg#<k>\tLEMMA", each=5),
        "Flickr_8k.trainImages.txt": lines(None, "<n>_ab.jpg", numbers=range(20)),
        "Flickr_8k.devImages.txt": lines(None, "<n>_ab.jpg", numbers=range(20, 25)),
        "Flickr_8k.testImages.txt": lines(None, "<n>_ab.jpg", numbers=range(25, N)),
        "ExpertAnnotations.txt": "0000_ab.jpg\t0000_ab.jpg#0\t1\t1\t1\n"},
    "flickr8k_two_zips": {
        "Flickr8k_Dataset.zip": packed(FLICKR, "zip"), "Flickr8k_text.zip": packed(
            {"Flickr8k.token.txt": lines(None, TOKENS, each=5)}, "zip")},
    # The real file too has one row without its last pipe.
    "flickr30k_kaggle": pictures("flickr30k_images/flickr30k_images/10<n>.jpg") | {
        "flickr30k_images/results.csv": lines(
            "image_name| comment_number| comment", "10<n>.jpg| <k>| <caption>", each=5)
        + "100003.jpg| 4   A dog runs across the grass .\n"},
    "flickr30k_kaggle_commas": pictures("Images/10<n>.jpg") | {"captions.txt": lines(
        "image_name,comment_number,comment", '10<n>.jpg,<k>,"<caption>"', "10<n>.jpg,<k>,<caption>",
        each=5)},
    "flickr30k_tar": pictures("flickr30k-images/10<n>.jpg") | {
        "results_20130124.token": lines(None, "10<n>.jpg#<k>\t<caption>", each=5)},
    "karpathy": pictures("images/<n>_ab.jpg") | {"dataset_flickr8k.json": karpathy()},
    "karpathy_filepath": pictures("val2014/<n>_ab.jpg") | pictures("thumbs/<n>_ab.jpg") | {
        "dataset_coco.json": karpathy(filepath="val2014")},
    "lavis": pictures("images/<n>.jpg") | {"annotations/flickr30k_train.json": json.dumps(
        [dict(image=f"images/{n:04d}.jpg", caption=[caption(n, k) for k in range(5)])
         for n in range(N)])},
    # COCO
    "coco2017": coco(2017), "coco2014": coco(2014, "COCO_{}2014_"),
    "coco_train_only": coco(2017, present=["train"]),
    # Hugging Face
    "hf_root_csv": FLAT | {"metadata.csv": lines("file_name,text", '<n>.png,"<caption>"')},
    "hf_splits_jsonl": {name: content for split, numbers in (
        ("train", range(20)), ("validation", range(20, 25)), ("test", range(25, N)))
        for name, content in (pictures(f"{split}/<n>.png", numbers=numbers) | {
            f"{split}/metadata.jsonl": lines(
                None, '{"file_name": "<n>.png", "text": "<caption>"}', numbers=numbers)}).items()},
    "hub_cache": {f"blobs/{n}": picture(n) for n in range(N)} | {
        f"snapshots/abc/train/{n}.png": Path(f"../../../blobs/{n}") for n in range(N)} | {
        "blobs/m": lines("file_name,text", *(f'{n}.png,"<caption>"' for n in range(N))),
        "snapshots/abc/train/metadata.csv": Path("../../../blobs/m")},
    "hf_parquet": {"data/train-00000-of-00001.parquet": b"PAR1"},
    "hf_metadata_parquet": FLAT | {"metadata.parquet": b"PAR1"},
    "save_to_disk": {"data-00000-of-00001.arrow": b"ARROW1", "dataset_info.json": "{}"},
    # Tables
    "csv_split_column": IMAGES | {"metadata.csv": lines(
        "file_name,text,split", 'images/<n>.png,"<caption>",train', numbers=range(20)) + lines(
        None, 'images/<n>.png,"<caption>",test', numbers=range(20, N))},
    "csv_of_each_split": IMAGES | {f"{split}.csv": lines(
        "file_name,text", '<n>.png,"<caption>"', numbers=numbers) for split, numbers in (
        ("train", range(20)), ("val", range(20, 25)), ("test", range(25, N)))},
    "csv_no_header": FLAT | {"captions.txt": lines(None, '<n>.png,"<caption>"')},
    "csv_no_header_tab": FLAT | {"captions.txt": lines(None, "<n>.png\t<caption>")},
    "captions_json_map": IMAGES | {"captions.json": json.dumps(
        {f"{n:04d}.png": caption(n) for n in range(N)})},
    "kohya_meta": IMAGES | {"meta_cap.json": json.dumps(
        {f"/scratch/me/images/{n:04d}": {"caption": caption(n)} for n in range(N)})},
    "both_csv_and_captions": IMAGES | {
        "captions.txt": lines("image,caption", '<n>.png,"<caption>"'),
        "metadata.csv": lines("file_name,text", "images/<n>.png,another", numbers=range(10))},
    "two_caption_files_one_backup": KAGGLE | {"backup/captions.txt": FIVE},
    "partial_captions": FLAT | {
        "metadata.csv": lines("file_name,text", '<n>.png,"<caption>"', numbers=range(15))},
    "two_that_overlap": FLAT | {
        "captions.txt": lines("image,caption", '<n>.png,"<caption>"', numbers=range(20)),
        "metadata.csv": lines("file_name,text", "<n>.png,another", numbers=range(10))},
    "partial_download": pictures("train/<n>.png") | {
        "metadata.csv": lines("file_name,text", 'train/<n>.png,"<caption>"')
        + lines(None, "test/<n>.png,of another picture", numbers=range(10))},
    # Sidecars
    "sidecar_flat": FLAT | beside("<n>.txt"),
    "sidecar_caption_ext": FLAT | beside("<n>.caption"),
    "sidecar_kohya_two": (
        pictures("10_shiba dog/<n>.png", "5_style/<n>.png")
        | beside("10_shiba dog/<n>.txt", "<caption>\n", range(0, N, 2))
        | beside("5_style/<n>.txt", "<caption>\n", range(1, N, 2))),
    "cub200": pictures(*(f"CUB_200_2011/images/{name}/<n>.jpg" for name in SPECIES)) | {
        f"text/{SPECIES[n % 3]}/{n:04d}.txt": lines(None, "<caption>", numbers=[n], each=10)
        for n in range(N)} | {
        "CUB_200_2011/images.txt": "1 x\n", "CUB_200_2011/train_test_split.txt": "1 0\n",
        "CUB_200_2011/classes.txt": "1 001.Black_footed_Albatross\n"},
    "img2dataset_files": img2dataset(0, "00000/<n>") | img2dataset(1, "00001/<n>")
    | img2dataset(2, "00002/<n>") | {"00000_stats.json": "{}", "00000.parquet": b"PAR1"},
    "img2dataset_parquet": {"00000.parquet": b"PAR1"},
    "webdataset": {f"0000{s}.tar": packed(img2dataset(s, "<n>"), "tar") for s in range(3)},
    "mm_celeba": pictures("images/<n>.jpg") | beside("text/celeba-caption/<n>.txt"),
    "sidecar_deep": pictures("a/<n>.png", "a/b/<n>.png", "c/d/e/<n>.png")
    | beside("a/<n>.txt", numbers=range(0, N, 3)) | beside("a/b/<n>.txt", numbers=range(1, N, 3))
    | beside("c/d/e/<n>.txt", numbers=range(2, N, 3)),
    "sidecars_of_others": pictures("a/<n>.png", "b/<n>.png") | beside("a/<n>.txt"),
    # Classes
    "mnist_classes": digits("<digit>/<n>.png"),
    "mnist_split_classes": digits("train/<digit>/<n>.png", range(20))
    | digits("test/<digit>/<n>.png", range(20, N)),
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
    "class_stray_image": pictures("cat/<n>.png", "dog/<n>.png") | {"preview.png": picture(1)},
    "one_class": pictures("dog/<n>.png"),
    "stylegan": (stylegan := pictures(*(f"0000{k}/img<n>.png" for k in range(3))) | {
        "dataset.json": json.dumps({"labels": [
            [f"0000{n % 3}/img{n:04d}.png", n % 3] for n in range(N)]})}),
    "stylegan.zip": stylegan,
    "images_masks": {f"{folder}/{n:04d}.png": picture(n) for folder in ("images", "masks")
                     for n in range(15)},
    # Other kinds
    "pokemon_types": pictures("images/poke<n>.png") | {
        "pokemon.csv": lines("Name,Type1,Type2", "poke<n>,Grass,")},
    "celeba_torchvision": pictures("celeba/img_align_celeba/00<n>.jpg") | {
        "celeba/list_attr_celeba.txt": lines("30\nMale Smiling Young ", "00<n>.jpg -1  1 -1"),
        "celeba/list_eval_partition.txt": lines(None, "00<n>.jpg 0")},
    "mnist_idx": {f"MNIST/raw/{split}-{kind}-ubyte.gz": b"\x1f\x8b" for split in ("train", "t10k")
                  for kind in ("images-idx3", "labels-idx1")},
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
    "link_zip": {"data.zip": Path("../flickr8k_kaggle.zip")}}
