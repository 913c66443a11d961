"""The README is true: its blocks run, its flags, files and names exist, and each of its four
changes is made in one place."""
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
import train
from conftest import ROOT, TINY, assert_same, checkpoints, errors, launch, run_ok, train_run
from data import BuiltinShapes, CaptionedImages, split_images

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)

# Not run here: the environment is what .ci/run makes, pytest would run this test again, and
# TensorBoard serves until it is stopped.
NOT_RUN = ("python3 -m venv", ". .venv", "pip install", "pytest", "tensorboard")
# What keeps a command short, by what it contains; a later flag wins over an earlier one.
STEP = [*TINY, "--batch-size", "4", "--max-steps", "1", "--workers", "0", "--val-fraction", "0.2"]
SHORT = {
    "--resume": ["--max-steps", "2"], "--init-from": STEP[2:], "--preset tiny": STEP,
    "--data": [*STEP, "--preset", "tiny", "--text-encoder", "{clip}", "--vae", "{vae}",
               "--pixel-unshuffle", "1"],
    "train.py": STEP, "sample.py": ["--steps", "2", "--device", "cpu"],
    "evaluate.py": ["--num-images", "4", "--steps", "1", "--device", "cpu"]}
# The notebook's run is made short, and the signals are looked at after it.
AFTER_IT = "import signal\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"


def commands(language, block, folder):
    """The commands of a block, comments taken off; a block of Python becomes a script."""
    if language == "python":
        short, runs = re.subn(r"train\.main\(\[.*?\]\)", f"train.main({STEP})", block)
        (folder / "block.py").write_text(short + runs * AFTER_IT)
        return [] if "ZipFile" in block else [f"python {folder / 'block.py'}"]
    lines = block.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("   #")[0].split(" && ")]
    return [part for part in parts if part and not part.startswith(NOT_RUN)]


def make_data(place, photos, has_template):
    """A small stand-in for data that the README names."""
    if place.suffix == ".zip":
        shutil.make_archive(place.with_suffix(""), "zip", photos)
    elif not has_template:
        shutil.copytree(photos, place, dirs_exist_ok=True)
    for i in range(16) if has_template else ():
        (place / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), i).save(place / f"{i % 2}/{i}.png")


@pytest.mark.slow
def test_every_block_runs(tmp_path, photos, clip, vae):
    """In the order of the page, each command on small data and made short by further flags; the
    first of torchrun runs two processes, the others one to save time."""
    def short(command):
        extra = next((flags for part, flags in SHORT.items() if part in command), [])
        return [flag.format(clip=clip, vae=vae) for flag in extra]

    runs, run, processes = tmp_path / "runs", "", 2
    runs.mkdir()
    train_run(runs, "--data", photos, "--no-pooled-text", *short("--data")).rename(
        runs / "run_photos")
    for command in (c for language, block in BLOCKS for c in commands(language, block, tmp_path)):
        words = shlex.split(re.sub(r"runs/run_\.\.\.|\bRUN\b", str(run), command))
        is_several = words[0] == "torchrun"
        assert words[2 * is_several] in ("python", "--nproc_per_node=2"), f"not run: {command}"
        if "--data" in words:
            make_data(tmp_path / words[words.index("--data") + 1], photos, "--caption-t" in command)
        done = launch(*words[1 + 2 * is_several:], *short(command), cwd=tmp_path,
                      processes=processes if is_several else 1)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        run, processes = run or next(runs.glob("run_[0-9]*")), 1 if is_several else processes
    assert list(run.glob("samples_*/steps.png")) and list(run.glob("evaluation_*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captions", "label"])
def test_the_recipe_for_hugging_face(tmp_path, kind):
    """The recipe, as it stands, makes one .zip of a parquet file with five captions an
    image, or of one with labels of greyscale images: all of it is read."""
    datasets = pytest.importorskip("datasets")
    texts, mode = [[f"caption {k} of {i}" for k in range(5)] for i in range(20)], "RGB"
    columns = {f"caption_{k}": [of_image[k] for of_image in texts] for k in range(5)}
    types = dict.fromkeys(columns, datasets.Value("string"))
    if kind == "label":
        columns, texts, mode = dict(label=[0, 1] * 10), [["boot"], ["shirt"]] * 10, "L"
        types = dict(label=datasets.ClassLabel(names=["boot", "shirt"]))
    columns["image"] = [Image.new("L", (28, 28), 9 * i).convert(mode) for i in range(20)]
    datasets.Dataset.from_dict(columns, datasets.Features(image=datasets.Image(), **types)
                               ).to_parquet(tmp_path / "jxie/flickr8k/train.parquet")
    block, = [block for _, block in BLOCKS if "load_dataset" in block]
    subprocess.run([sys.executable, "-c", block], check=True, timeout=120,
                   cwd=tmp_path, env={**os.environ, "HF_HOME": str(tmp_path)})
    source = CaptionedImages(tmp_path / "my_data.zip")
    assert [source.captions(i) for i in range(20)] == texts
    assert [source.image(i, 1, 8).getpixel((4, 4)) for i in range(20)] == [*range(0, 180, 9)]


def test_the_grid_is_the_first_commands():
    """The prompts in samples.png, which it holds as text too, are those of the default run."""
    source, image = BuiltinShapes(32), Image.open(ROOT / ".github" / "samples.png")
    parts = np.array_split(split_images(source, 0.05)[1], 16)
    assert image.info["prompts"].split("|") == [source.captions(part[0])[0] for part in parts]


# Four changes: the file, what stands in the place, and what is put in before it or instead of it.
CHANGES = [
    ("sample.py", "SAMPLERS = {", """
def own(denoise, x_t, schedule, timesteps, *_):
    for t, t_prev in timesteps:
        x_0, a, a_prev = denoise(x_t, t), schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        x_t = a_prev.sqrt() * x_0 + ((1 - a_prev) / (1 - a)).sqrt() * (x_t - a.sqrt() * x_0)
        yield x_t, x_0


SAMPLERS = {"own": own, """),
    ("models.py", "BETA_SCHEDULES = {", """
def sigmoid(T):   # Jabri et al. 2022
    s = torch.linspace(-3, 3, T + 1, dtype=torch.float64).sigmoid()
    alpha_bar = (s[-1] - s) / (s[-1] - s[0])
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


BETA_SCHEDULES = {"sigmoid": sigmoid, """),
    ("train.py", "    error = (output - target).square()", """
    return torch.nn.functional.huber_loss(output, target, reduction="none").mean(dim=(1, 2, 3))
    error = (output - target).square()"""),
    ("models.py", "def build_unet(", """
class Network(nn.Module):
    def __init__(self, channels, text_width):
        super().__init__()
        self.image, self.dropout = nn.Conv2d(channels, channels, 3, padding=1), nn.Dropout(0.1)
        self.text = nn.Linear(text_width, channels)
        self.register_buffer("T", torch.tensor(1000.0))

    def forward(self, x_t, t, text_emb, **_):
        shift = self.text(text_emb[:, 0] * (t / self.T)[:, None])
        return (self.dropout(self.image(x_t)) + shift[:, :, None, None],)


def build_unet(config, latent_shape, text_width):
    return Network(latent_shape[0], text_width)


def unet_of_diffusers(""")]
CHECKS = """
import torch, models, sample, train
from torch.testing import assert_close

model = models.load_model("a")
s = 1 / (1 + torch.exp(torch.linspace(3, -3, 1001, dtype=torch.float64)))
assert_close(model.schedule.alphas_cumprod[:-1], ((s[-1] - s) / (s[-1] - s[0]))[1:-1])
own, ddim = (sample.generate(model, ["red"], steps=9, sampler=name) for name in ("own", "ddim"))
assert_close(own, ddim, rtol=0, atol=1)
t, caption = torch.tensor([5, 300, 700, 999]), ["red", "blue", "", "a"]
batch = dict(moments=torch.rand(4, 2, 12, 8, 8), t=t, eps=torch.randn(4, 12, 8, 8), caption=caption)
output, target = train.predict(model.unet, model, batch)
error = (output - target).abs()
huber = torch.where(error < 1, error**2 / 2, error - 0.5).mean(dim=(1, 2, 3))
assert_close(train.diffusion_loss(model.unet, model, batch, 5.0, 1.0), huber)
"""


@pytest.mark.slow
def test_four_changes(tmp_path):
    """An own sampler (DDIM's equal), schedule, loss and network, put in where the originals stand,
    do what they say. Two processes train the network, which has dropout and a buffer; a resumed run
    is bit for bit the run that did not stop. What needs diffusers' UNet is refused in one line, and
    so is a call of sample.py into pictures that were drawn before a further edit."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name, place, edited in CHANGES:
        text = (tmp_path / name).read_text()
        assert place in text
        (tmp_path / name).write_text(text.replace(place, edited, 1))
    (tmp_path / "checks.py").write_text(CHECKS)
    flags = [tmp_path / "train.py", *TINY, "--beta-schedule", "sigmoid", "--batch-size", 8]
    for folder, steps in (("a", 4), ("b", 2), ("b", 4)):
        run_ok(*flags, "--folder", folder, "--max-steps", steps, processes=2, cwd=tmp_path)
    one, two = (torch.load(checkpoints(tmp_path / name)[-1])["ema"] for name in "ab")
    assert_same(one, two)
    assert "T" in one
    run_ok(tmp_path / "checks.py", cwd=tmp_path)
    draw = [tmp_path / "sample.py", "--checkpoint", "a", "--prompts", "red", "--sampler", "own",
            "--steps", 2, "--device", "cpu"]
    run_ok(*draw, "--output", "out", cwd=tmp_path)
    with open(tmp_path / "sample.py", "a") as file:
        file.write("# a further edit\n")
    for command, flag in (([*draw, "--output", "out"], "--output out"),
                          ([*draw, "--export", "x"], "--export x"),
                          ([*flags, "--gradient-checkpointing"], "--gradient-checkpointing")):
        done = launch(*command, cwd=tmp_path)
        assert done.returncode == 2 and errors(done.stderr)[0].startswith(f"error: {flag}")


def test_flags_links_and_names(capsys):
    """Every --flag of the page and of test_gpu.py is in a script's help, or another program's, and
    linked files are there, and every name in the equations' last column is defined."""
    for parse in (train.parse_flags, sample.parse_args, evaluate.parse_args):
        with pytest.raises(SystemExit):
            parse(["--help"])
    seen = capsys.readouterr().out + "--standalone --nproc_per_node --max-restarts --logdir --small"
    text = README + (ROOT / "tests/test_gpu.py").read_text()
    assert not [flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", text) if flag not in seen]
    files = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert files and all((ROOT / file).exists() for file in files)
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    cells = re.findall(r"^\|.*\b(?:19|20)\d\d.*\| (`.*`) \|$", README, re.MULTILINE)
    names = re.findall(r"\w+", " ".join(cells))
    assert len(names) > 10 and all(re.search(rf"(def|class) {name}\b", code) for name in names)
