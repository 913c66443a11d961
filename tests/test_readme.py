"""The README is true: its commands run, its flags exist, its line counts and links are right."""
import ast
import io
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
from conftest import ROOT, TINY, launch, train_run

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)

# Commands that are not run here, by their beginning, and why.
NOT_RUN = {"python3 -m venv": "makes an environment: what .ci/run does", ". .venv": "likewise", "pip install": "likewise",
           "pytest": "would run this test again", "tensorboard": "serves until it is stopped"}
# What keeps a command short, by what it contains; a later flag wins over an earlier one.
ONE_STEP = [*TINY, "--batch-size", "4", "--max-steps", "1"]
TINY_NETWORKS = [*ONE_STEP, "--preset", "tiny", "--workers", "0", "--val-fraction", "0.2", "--text-encoder", "{clip}"]
SHORT = {
    "--data mnist": [*TINY_NETWORKS],
    "--init-unet": [*TINY_NETWORKS[:-2], "--no-pooled-text", "--pixel-unshuffle", "1"],
    "--data": [*TINY_NETWORKS, "--vae", "{vae}", "--pixel-unshuffle", "1"],
    "--resume": ["--max-steps", "2"],
    "train.py": ONE_STEP,
    "--export": ["--device", "cpu"],
    "sample.py": ["--steps", "2", "--device", "cpu"],
    "evaluate.py": ["--num-images", "4", "--steps", "1", "--device", "cpu"]}


def commands():
    """Every command of the README's shell blocks, in order, comments taken off."""
    for language, block in BLOCKS:
        for line in block.splitlines() if language == "bash" else []:
            yield from (part.strip() for part in line.split("   #")[0].split(" && ") if part.strip())


@pytest.fixture(scope="module")
def project(tmp_path_factory, photos, clip, vae):
    """A folder with the scripts and small stand-ins for the data that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    shutil.make_archive(folder / "flickr8k", "zip", photos)
    for name in ("my_folder", "celeba"):
        shutil.copytree(photos, folder / name)
    for digit in range(2):
        (folder / "mnist" / str(digit)).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "mnist" / str(digit) / f"{i}.png")
    (folder / "runs").mkdir()
    run = train_run(folder, "--data", photos, "--no-pooled-text", *[flag.format(clip=clip, vae=vae) for flag in SHORT["--data"]])
    run.rename(folder / "runs" / "run_photos")
    return folder


@pytest.mark.slow
def test_every_shell_command_runs(project, clip, vae):
    """Each command of the README runs in the order of the page, shortened by further flags, or is listed above with the reason
    why not. All but the first use one process, to save time."""
    run, several = "runs/run_...", True
    for command in commands():
        if any(command.startswith(start) for start in NOT_RUN):
            continue
        words = shlex.split(command.replace("runs/run_...", str(run)))
        processes, torchrun = 1, ["torchrun", "--standalone", "--nproc_per_node=2"]
        if words[:3] == torchrun:
            words, processes, several = words[2:], 2 if several else 1, False
        else:
            assert words[0] == "python", f"neither run nor listed: {command}"
        extra = next(flags for part, flags in SHORT.items() if part in command)
        words += [flag.format(clip=clip, vae=vae) for flag in extra]
        done = launch(project / words[1], *words[2:], processes=processes, cwd=project)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        if run == "runs/run_...":
            run = next(path for path in (project / "runs").iterdir() if path.name != "run_photos")
    assert list(run.glob("samples_*/steps.png")) and list(run.glob("evaluation_*"))
    assert (project / "my_pipeline" / "unet").is_dir()


@pytest.mark.slow
def test_the_notebook_block_runs(project):
    """The Python block, with fewer steps, trains, samples and ends in a picture, in one process, and gives Ctrl-C back, also
    after a run that failed."""
    block, = [block for language, block in BLOCKS if language == "python"]
    *lines, last = block.strip().splitlines()
    small = str(["--max-steps", "2", *TINY])
    code = "\n".join(lines).replace('["--max-steps", "200"]', small) + f"""
grid = {last}
import signal
assert grid.width > 64 and run.is_dir() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
def broken(*_):
    raise ValueError("on purpose")
train.train_epoch = broken
try:
    train.main({small})
except ValueError as error:
    assert str(error) == "on purpose"
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""
    assert small in code
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_block_is_a_kind_that_is_run():
    """No block is in a language that the tests above pass over."""
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


def test_every_flag_exists(monkeypatch, capsys):
    """Every --flag that the README names is in the help of one of the scripts, or belongs to another program."""
    others = {"--standalone", "--nproc_per_node", "--max-restarts", "--logdir", "--use_ema"}
    for parse in (train.parse_args, sample.parse_args, evaluate.parse_args):
        monkeypatch.setattr(sys, "argv", ["script", "--help"])
        with pytest.raises(SystemExit):
            parse()
    known = set(re.findall(r"--[a-z][a-z_-]+", capsys.readouterr().out)) | others
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)) <= known


def code_lines(path):
    """Lines with code on them: no blanks, comments and docstrings."""
    source = path.read_text("utf-8")
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {line for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in skipped
             for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_line_counts_and_links():
    """The table's line counts are within 5% of the truth and name all scripts; linked files are there."""
    table = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE))
    assert set(table) == {path.name for path in ROOT.glob("*.py")}
    for name, count in table.items():
        assert int(count) == pytest.approx(code_lines(ROOT / name), rel=0.05), name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_function_of_the_equations_exists():
    """Every name in the last column of the equations is defined in the scripts."""
    defined = set(re.findall(r"^\s*(?:def|class) (\w+)", "".join(path.read_text() for path in ROOT.glob("*.py")), re.MULTILINE))
    names = re.findall(r"^\|.*(?:19|20)\d\d.*\| `([\w.]+)` \|$", README, re.MULTILINE)
    assert len(names) > 10 and {part for name in names for part in name.split(".")} <= defined
