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
import torch
from PIL import Image

import evaluate
import sample
import train
from conftest import (
    ROOT,
    TINY,
    assert_same,
    checkpoints,
    errors,
    launch,
    make_pictures,
    run_ok,
    train_run,
)
from data import CaptionedImages

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
NOTEBOOK, CHANGE_IT, HUGGING_FACE = [block for language, block in BLOCKS if language == "python"]

# Not run here: the environment is what .ci/run makes, pytest would run this test again, and
# TensorBoard serves until it is stopped.
NOT_RUN = ("python3 -m venv", ". .venv", "pip install", "pytest", "tensorboard")
# What keeps a command short, by what it contains; a later flag wins over an earlier one.
ONE_STEP = [*TINY, "--batch-size", "4", "--max-steps", "1"]
TINY_NETWORKS = [*ONE_STEP, "--preset", "tiny", "--workers", "0", "--val-fraction", "0.2",
                 "--text-encoder", "{clip}"]
SHORT = {
    "--data mnist": TINY_NETWORKS[:-2],   # with the built-in text encoder
    "mine.py train": ONE_STEP,
    "mine.py sample": ["--steps", "2", "--device", "cpu"],
    "--init-from": ["--batch-size", "4", "--max-steps", "1", "--workers", "0", "--device", "cpu",
                    "--val-fraction", "0.2"],
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
    (folder / "mine.py").write_text(CHANGE_IT)
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
        own = next(iter((project / "runs").glob("*_mine")), "none")
        command = command.replace("runs/run_..._mine", str(own)).replace("runs/run_...", str(run))
        words, processes = shlex.split(command), 1
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
    """The notebook's block, with fewer steps, trains, samples and ends in a picture, and gives the
    signals back, also after a run that failed."""
    *lines, last = NOTEBOOK.strip().splitlines()
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


CHECK_CHANGES = """
import torch, data, mine, models, sample, train

def difference(a, b):
    return (a - b).abs().max().item()

data.setup_processes("cpu")
config = models.ModelConfig(beta_schedule="sigmoid", num_train_timesteps=100, vae="none")
schedule = models.NoiseSchedule(config)
s = 1 / (1 + torch.exp(torch.linspace(3, -3, 101, dtype=torch.float64)))
assert difference(schedule.on_cpu[:-1], ((s[-1] - s) / (s[-1] - s[0]))[1:-1]) < 1e-12

x_T, steps = torch.randn(2, 3, 4, 4, dtype=torch.float64), sample.make_timesteps(100, 9)
def denoise(x_t, t):   # exact for images from N(1, 0.25)
    a = schedule.alpha_bar(t, x_t)
    return 1 + a.sqrt() * 0.25 * (x_t - a.sqrt()) / (a * 0.25 + 1 - a)
ours, ddim = (list(sampler(denoise, x_T, schedule, steps, None, 0.0))
              for sampler in (sample.SAMPLERS["euler"], sample.ddim))
assert len(ours) == 9 and all(difference(a[0], b[0]) < 1e-9 for a, b in zip(ours, ddim))

model = models.Model(train.parse_args(["--beta-schedule", "sigmoid"])[1])
x_0, eps = torch.rand(4, 48, 8, 8), 3 * torch.randn(4, 48, 8, 8)
t, caption = torch.tensor([5, 300, 700, 999]), ["red", "blue", "", "a"]
batch = dict(moments=torch.stack([x_0, 0 * x_0], dim=1), t=t, eps=eps, caption=caption)
x_t = model.schedule.add_noise(x_0, eps, t)
error = (model.unet(x_t, t, model.text_encoder(caption))[0] - x_0).abs()
huber = torch.where(error < 1, error**2 / 2, error - 0.5).flatten(1).mean(dim=1)
assert difference(train.diffusion_loss(model.unet, model, batch, 5.0, 1.0), huber) < 1e-6
"""


@pytest.mark.slow
def test_four_changes(project, tmp_path):
    """The section "Change it": an own schedule, sampler (DDIM's equal) and loss do what they say;
    with an own network, whose position table is a buffer, two processes train, a resumed run is
    the run that did not stop, and what needs diffusers' UNet is refused in one line."""
    done = subprocess.run([sys.executable, "-c", CHECK_CHANGES], cwd=project, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    flags = [project / "mine.py", "train", *TINY, "--beta-schedule", "sigmoid", "--batch-size", 8,
             "--folder"]
    run_ok(*flags, tmp_path / "a", "--max-steps", 4, processes=2)
    for steps in (2, 4):
        run_ok(*flags, tmp_path / "b", "--max-steps", steps, processes=2)
    one, two = (torch.load(*checkpoints(tmp_path / name)[-1:])["ema"] for name in "ab")
    assert_same(one, two)
    assert one["position"].shape == (16, 128)
    for more, reason in ((["train", "--gradient-checkpointing"], "--gradient-checkpointing True"),
                         (["sample", "--export", "x", "--checkpoint", tmp_path / "a"], "--export")):
        done = launch(project / "mine.py", *more, "--device", "cpu", cwd=tmp_path)
        assert done.returncode == 2 and errors(done.stderr)[0].startswith(f"error: {reason}")


@pytest.mark.parametrize("kind", ["captions", "labels"])
def test_the_recipe_for_hugging_face(tmp_path, kind):
    """The recipe, as it stands, makes one .zip of a parquet file with five captions an
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
    done = subprocess.run([sys.executable, "-c", HUGGING_FACE], cwd=tmp_path, capture_output=True,
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
