"""The README is true: its commands run, its flags exist, its line counts and links are right."""
import ast
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize

import numpy as np
import pytest
from PIL import Image

import evaluate
import sample
import train
from conftest import ROOT, TINY, launch, make_pictures, train_run
from data import CaptionedImages

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)

# Not run here: the environment is what .ci/run makes, pytest would run this test again, and
# TensorBoard serves until it is stopped.
NOT_RUN = ("python3 -m venv", ". .venv", "pip install", "pytest", "tensorboard")
# What keeps a command short, by what it contains; a later flag wins over an earlier one.
ONE_STEP = [*TINY, "--batch-size", "4", "--max-steps", "1"]
TINY_NETWORKS = [*ONE_STEP, "--preset", "tiny", "--workers", "0", "--val-fraction", "0.2",
                 "--text-encoder", "{clip}"]
SHORT = {
    "--data mnist": TINY_NETWORKS[:-2],   # with the built-in text encoder
    "--init-unet": [*TINY_NETWORKS[:-2], "--no-pooled-text", "--pixel-unshuffle", "1"],
    "--data": [*TINY_NETWORKS, "--vae", "{vae}", "--pixel-unshuffle", "1"],
    "--resume": ["--max-steps", "2"],
    "train.py": ONE_STEP,
    "--export": ["--device", "cpu"],
    "sample.py": ["--steps", "2", "--device", "cpu"],
    "evaluate.py": ["--num-images", "4", "--steps", "1", "--device", "cpu"]}


def commands():
    """Every command of the README's shell blocks that is run, comments taken off."""
    lines = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("   #")[0].split(" && ")]
    return [part for part in parts if part and not part.startswith(NOT_RUN)]


@pytest.fixture(scope="module")
def project(tmp_path_factory, photos, clip, vae):
    """A folder with the scripts and small stand-ins for the data that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    for script in [*ROOT.glob("*.py"), ROOT / "slurm" / "preflight.py"]:
        place = folder / script.relative_to(ROOT)
        place.parent.mkdir(exist_ok=True)
        shutil.copy(script, place)
    shutil.make_archive(folder / "flickr8k", "zip", photos)
    for name in ("my_folder", "celeba"):
        make_pictures(folder / name)
    for digit, i in np.ndindex(2, 8):
        path = folder / "mnist" / str(digit) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    flags = [flag.format(clip=clip, vae=vae) for flag in SHORT["--data"]]
    (folder / "runs").mkdir()
    run = train_run(folder / "runs", "--data", photos, "--no-pooled-text", *flags)
    run.rename(run.parent / "run_photos")
    return folder


@pytest.mark.slow
def test_every_shell_command_runs(project, clip, vae):
    """Each command of the README runs in the order of the page, shortened by further flags; the
    first by two processes, the others by one to save time."""
    run, several = "runs/run_...", True
    for command in commands():
        words, processes = shlex.split(command.replace("runs/run_...", str(run))), 1
        if words[:3] == ["torchrun", "--standalone", "--nproc_per_node=2"]:
            words, processes, several = words[2:], 2 if several else 1, False
        assert words[0] in ("python", "--nproc_per_node=2"), f"not run: {command}"
        extra = next(flags for part, flags in SHORT.items() if part in command)
        words += [flag.format(clip=clip, vae=vae) for flag in extra]
        done = launch(project / words[1], *words[2:], processes=processes, cwd=project)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        if run == "runs/run_...":
            run, = set((project / "runs").iterdir()) - {project / "runs" / "run_photos"}
    assert list(run.glob("samples_*/steps.png")) and list(run.glob("evaluation_*"))
    assert (project / "my_pipeline" / "unet").is_dir()


@pytest.mark.slow
def test_the_notebook_block_runs(project):
    """The Python block, with fewer steps, trains, samples and ends in a picture, and gives the
    signals back, also after a run that failed."""
    _, block = [block for language, block in BLOCKS if language == "python"]
    *lines, last = block.strip().splitlines()
    small = str(["--max-steps", "2", *TINY])
    code = "\n".join(lines).replace('["--max-steps", "200"]', small) + f"""
grid = {last}
import signal
assert grid.width > 64 and run.is_dir()
def broken(*_):
    raise ValueError("on purpose")
train.diffusion_loss = broken
try:
    train.main({small})
except ValueError as error:
    assert str(error) == "on purpose"
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""
    assert small in code
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["captions", "labels"])
def test_the_recipe_for_hugging_face(tmp_path, kind):
    """The first Python block, as it stands, makes one .zip of a parquet file with five captions an
    image, or of one with labels of greyscale images: all of it is read."""
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet
    texts = [[f"caption {k} of {i}" for k in range(5)] for i in range(20)]
    types = {f"caption_{k}": datasets.Value("string") for k in range(5)}
    rows = [dict(zip(types, captions)) for captions in texts]
    if kind == "labels":
        types = dict(label=datasets.ClassLabel(names=["boot", "shirt"]))
        rows, texts = [{"label": i % 2} for i in range(20)], 10 * [["boot"], ["shirt"]]
    for i, row in enumerate(rows):
        buffer = io.BytesIO()
        Image.new("L" if kind == "labels" else "RGB", (28, 28), 9 * i).save(buffer, "PNG")
        row["image"] = dict(bytes=buffer.getvalue(), path=None)
    schema = datasets.Features(image=datasets.Image(), **types).arrow_schema
    (tmp_path / "jxie" / "flickr8k").mkdir(parents=True)   # taken instead of the hub's
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema),
                                tmp_path / "jxie" / "flickr8k" / "train-00000-of-00001.parquet")
    recipe, _ = [block for language, block in BLOCKS if language == "python"]
    done = subprocess.run([sys.executable, "-c", recipe], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120, env={**os.environ, "HF_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    source = CaptionedImages(tmp_path / "my_data.zip")
    assert [source.captions(i) for i in range(20)] == texts
    assert [source.image(i, 3, 8).getpixel((4, 4))[0] for i in range(20)] == [
        9 * i for i in range(20)]


def test_blocks_and_flags(monkeypatch, capsys):
    """No block is in a language that is not run, and every --flag of the page is in a script's
    help or belongs to another program."""
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    others = {"--standalone", "--nproc_per_node", "--max-restarts", "--local-addr", "--logdir",
              "--use_ema", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    for parse in (train.parse_args, sample.parse_args, evaluate.parse_args):
        with pytest.raises(SystemExit):
            parse()
    known = set(re.findall(r"--[a-z][a-z_-]+", capsys.readouterr().out)) | others
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)) <= known


def code_lines(path):
    """Lines with code on them: no blanks, comments and docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = {line for node in ast.walk(tree) if isinstance(node, documented)
             and ast.get_docstring(node)
             for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    with open(path, "rb") as file:
        lines = {line for token in tokenize.tokenize(file.readline)
                 if token.type not in skipped and token.line
                 for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - texts)


def test_line_counts_links_and_names():
    """The table's line counts are within 5% of the truth and name all scripts, linked files are
    there, and every name in the equations' last column is defined."""
    table = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE))
    assert set(table) == {path.name for path in ROOT.glob("*.py")}
    for name, count in table.items():
        assert int(count) == pytest.approx(code_lines(ROOT / name), rel=0.05), name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    names = re.findall(r"^\|.*(?:19|20)\d\d.*\| `([\w.]+)` \|$", README, re.MULTILINE)
    defined = set(re.findall(r"^\s*(?:def|class) (\w+)", code, re.MULTILINE))
    assert len(names) > 10 and {part for name in names for part in name.split(".")} <= defined
