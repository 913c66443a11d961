"""Evaluation: every figure against an independent calculation, and the same from any number of
processes."""
import json
import os
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from dataclasses import astuple
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch.utils.data import Subset
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig

import data
import evaluate
from conftest import CPU, ROOT, TINY, Job, make_pictures, run_ok, train_run
from data import SCENES
from evaluate import Gaussian, frechet_distance
from models import load_model
from sample import generate
from tiny_networks import make_clip


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's Inception with seeded weights, in the file format that it downloads."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):   # keeps the features' size through the layers
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def whole_clip(tmp_path_factory):
    """A tiny CLIP model with text and image encoder, tokenizer and image processor."""
    folder = make_clip(tmp_path_factory.mktemp("whole_clip"))
    text = CLIPTextConfig.from_pretrained(folder).to_dict()
    vision = dict(text, patch_size=112)   # the same depth and width
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    # Images and texts have something in common, so that the score is above 0.
    model.text_projection.weight.data = model.visual_projection.weight.data.clone()
    for norm in (model.text_model.final_layer_norm, model.vision_model.post_layernorm):
        torch.nn.init.ones_(norm.bias)
    model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """90 captioned pictures of 4 x 4 pixels, as --data."""
    return make_pictures(tmp_path_factory.mktemp("real"), 90, 2, (4, 4), False, suffix="png",
                         prefix="", seed=2)


def main(*flags):
    """evaluate.py in this process."""
    evaluate.main(["--device", "cpu", *map(str, flags)])


def record_in(folder):
    """The only evaluation.json below the folder."""
    path, = folder.rglob("evaluation.json")
    return json.loads(path.read_text())


def gaussian(features):
    """Mean and covariance, computed plainly."""
    return features.double().mean(dim=0), features.double().T.cov()


@pytest.mark.parametrize("count, dim", [(300, 64), (60, 100)])
def test_distances_of_features(count, dim):
    """FID is torch-fidelity's, also of fewer features than dimensions; it is 0 for a set and
    itself, and for a shifted set the squared shift."""
    rng, shift = torch.Generator().manual_seed(1), torch.arange(dim) / 4
    a = torch.rand(count, dim, generator=rng)
    b = torch.rand(count + 30, dim, generator=rng) ** 1.3
    gaussians = [fid_features_to_statistics(x.double()) for x in (a, b)]
    theirs = fid_statistics_to_metric(*gaussians, verbose=False)["frechet_inception_distance"]
    for x, y, expected in ((a, b, theirs), (b, a, theirs), (a, a, 0),
                           (a, a + shift, shift.square().sum().item())):
        distance = frechet_distance(gaussian(x), gaussian(y))
        assert distance == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 200])
def test_ranks_add_up(world_size, monkeypatch):
    """Any number of ranks, even ones without a picture, find the mean and the covariance of all."""
    features = torch.randn(101, 8, generator=torch.Generator().manual_seed(2)) + 5
    parts = [Gaussian(8, CPU) for _ in range(world_size)]
    for rank, part in enumerate(parts):
        for batch in features[rank::world_size].split(7):
            part.update(batch)
    monkeypatch.setattr(evaluate.dist, "all_reduce",
                        lambda tensor: tensor.copy_(sum(part.moments for part in parts)))
    for found, expected in zip(Gaussian(8, CPU).reduce(), gaussian(features)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_clip_score_is_a_plain_cosine(whole_clip):
    """Equal, also for a prompt that is far too long, to the cosines of transformers' forward."""
    images = torch.randint(0, 256, (6, 3, 20, 24), dtype=torch.uint8)
    prompts = ["a dog", "two people on a beach", "a red car", "the cat sleeps", "a", "grass " * 100]
    inputs = CLIPProcessor.from_pretrained(whole_clip)(
        text=prompts, images=list(images), padding=True, truncation=True, max_length=77,
        return_tensors="pt")
    assert inputs.input_ids.shape[1] == 77 and inputs.input_ids[5, -1] == 1, "the end token is kept"
    inputs.pop("token_type_ids", None)   # older tokenizers give them, and CLIP has no use for them
    output = CLIPModel.from_pretrained(whole_clip).requires_grad_(False)(**inputs)
    plain = 100 * torch.cosine_similarity(output.image_embeds, output.text_embeds)
    ours = evaluate.Clip(whole_clip, CPU)(images, prompts)
    torch.testing.assert_close(ours, plain.double(), rtol=0, atol=1e-4)
    assert ours.std() > 0.01


def drawings():
    """Right pictures of all scenes, uint8 (N, 3, 32, 32)."""
    rng = np.random.default_rng(0)
    pictures = np.stack([np.asarray(data.draw(scene, 32, data.jitter(rng))) for scene in SCENES])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def test_answers_are_counted_by_attribute():
    """All is right for the scenes that were drawn, all but one word for scenes that differ in it,
    and nothing for scenes that share none."""
    tables = [list(table) for table in (data.SIZES, data.COLOURS, data.SHAPES, data.BACKGROUNDS)]
    images, words = drawings(), [astuple(scene) for scene in SCENES]
    others = [[table[table.index(word) - 1] for table, word in zip(tables, row)] for row in words]
    for changed in ([], [0], [1], [2], [3], [0, 1, 2, 3]):
        asked = [data.Scene(*(theirs[k] if k in changed else own[k] for k in range(4)))
                 for own, theirs in zip(words, others)]
        right = [right for _, right, _ in evaluate.read_answers(images, asked)]
        assert np.mean(right, 0).tolist() == [*(k not in changed for k in range(4)), not changed]


def test_accuracy_report_counts_groups_apart():
    """Held-out scenes painted over count against the held-out group alone; the distances' median
    and 90th percentile are those of each group."""
    images, held_out = drawings(), torch.tensor([data.is_held_out(scene) for scene in SCENES])
    images[held_out] = 128
    trained, others = evaluate.accuracy_report(evaluate.read_answers(images, SCENES)).values()
    assert trained["images"] == (~held_out).sum() and others["images"] == held_out.sum()
    assert trained["all"]["share"] == 1 and others["all"]["share"] == 0
    distances = [evaluate.read_picture(x.permute(1, 2, 0).numpy())[1] for x in images[~held_out]]
    assert trained["rms"]["p90"] == np.quantile(distances, 0.9) < others["rms"]["median"]


@pytest.mark.parametrize("k, n", [(0, 10), (3, 10), (10, 10), (499, 500)])
def test_wilson_interval(k, n):
    """It is scipy's."""
    expected = list(binomtest(k, n).proportion_ci(method="wilson"))
    assert evaluate.wilson_interval(k, n) == pytest.approx(expected, abs=1e-12)


def test_prompts_of_built_in_data():
    """Trained and held-out combinations in equal number, each in an order that covers all of them;
    the reference pictures show what the prompts say."""
    args = Namespace(num_images=400, resolution=32, mode="RGB")
    prompts, scenes, reference = evaluate.builtin_data(args)
    assert [data.is_held_out(scene) for scene in scenes] == [False, True] * 200
    assert set(scenes) == set(SCENES) and prompts == [scene.caption for scene in scenes]
    assert [evaluate.read_picture(reference[i])[0] for i in range(100)] == scenes[:100]


def arguments(source, **more):
    """Of captioned_data."""
    return Namespace(**dict(data=str(source), val_fraction=0.3, reference="validation",
                            num_images=60, resolution=16, mode="RGB") | more)


def test_prompts_of_captioned_data(real):
    """The validation split's captions, each once and first captions first, then from the beginning;
    without such images those of --reference, which must hold some. Another split than that of the
    training is refused."""
    run = dict(data="x", caption_template=None, max_bad_images=0.01, train_images=64)
    source = data.CaptionedImages(real)
    first, second = zip(*(source.captions(i) for i in data.split_images(source, 0.3)[1]))
    prompts, _, reference = evaluate.captioned_data(arguments(real), run)
    assert [sorted(prompts[:27]), sorted(prompts[27:54])] == [sorted(first), sorted(second)]
    assert prompts[54:] == prompts[:6] and reference.count == 27
    prompts, _, reference = evaluate.captioned_data(
        arguments(real, val_fraction=0.0, reference="training", num_images=90), run)
    assert sorted(prompts) == sorted(source.captions(i)[0] for i in range(90))
    assert reference.count == 90
    with pytest.raises(ValueError, match="^--data .* 64"):
        evaluate.captioned_data(arguments(real), run | dict(data=str(real)))
    with pytest.raises(ValueError, match="^--reference validation"):
        evaluate.captioned_data(arguments(real, val_fraction=0.0), run)


@pytest.mark.slow
def test_processes_and_batch_size_do_not_change_the_figures(run, inception, whole_clip, tmp_path):
    """All metrics from one process, and in other batches from two: the same accuracy exactly, the
    others to 1e-3."""
    for processes, batch_size in ((1, 64), (2, 17)):
        folder = tmp_path / str(processes)
        done = run_ok("evaluate.py", "--checkpoint", run, "--num-images", 81, "--steps", 5,
                      "--metrics", *evaluate.METRICS, "--inception-layer", 64,
                      "--inception-weights", inception, "--clip-model", whole_clip,
                      "--batch-size", batch_size, "--output", folder, "--device", "cpu",
                      processes=processes)
        assert "nan" not in done.stdout.lower()
    one, two = (record_in(tmp_path / name)["results"][0] for name in "12")
    assert one["clip"] > 0
    for ours, theirs in zip(one["accuracy"].values(), two["accuracy"].values()):
        assert ours.pop("rms") == pytest.approx(theirs.pop("rms"), rel=1e-2) and ours == theirs
    for metric in ("fid", "clip"):
        assert two[metric] == pytest.approx(one[metric], rel=1e-3), metric


@pytest.mark.slow
def test_a_killed_sweep_continues(run, tmp_path, monkeypatch, capsys):
    """Killed after its first scale, a rerun keeps that result untouched and adds the others; other
    settings, and code that was edited since, have a folder of their own. What cannot be written is
    printed all the same."""
    flags = ["--checkpoint", run, "--num-images", 24, "--steps", 8, "--output", tmp_path / "out",
             "--guidance-scales", 1, 2.5, 4]
    with Job(tmp_path, "--device", "cpu", *flags, script="evaluate.py", processes=1) as job:
        job.until(lambda: list(tmp_path.rglob("evaluation.json")))
    before = record_in(tmp_path)["results"]
    assert 1 <= len(before) < 3
    main(*flags)
    after = record_in(tmp_path)["results"]
    assert [result["guidance_scale"] for result in after] == [1, 2.5, 4]
    assert after[:len(before)] == before and "held_out" in capsys.readouterr().out
    main(*flags, "--seed", 1)
    monkeypatch.setattr(data, "hash_of_code", lambda: "edited")
    main(*flags)
    assert len(list(tmp_path.rglob("evaluation.json"))) == 3
    (tmp_path / "file").touch()
    capsys.readouterr()
    with pytest.raises(OSError, match="file"):
        main(*flags, "--guidance-scales", 2, "--output", tmp_path / "file")
    assert "  12 pictures of held_out" in capsys.readouterr().out


@pytest.mark.slow
def test_captioned_data(real, inception, whole_clip, tmp_path, capsys):
    """A model trained on captioned images: FID is torch-fidelity's of the same two sets of
    pictures. Where images are few it is left out with the reason, and the CLIP score goes on;
    accuracy is refused."""
    run = train_run(tmp_path, *TINY, "--data", real, "--preset", "tiny", "--text-encoder",
                    whole_clip, "--batch-size", 8, "--max-steps", 2, "--val-fraction", 0.3)
    flags = ["--checkpoint", run, "--num-images", 80, "--steps", 2, "--clip-model", whole_clip,
             "--inception-weights", inception, "--inception-layer", 64, "--output"]
    main(*flags, tmp_path / "all", "--reference", "all")
    ours, = record_in(tmp_path / "all")["results"]
    prompts, _, reference = evaluate.captioned_data(arguments(real, reference="all", num_images=80),
                                                    load_model(run).run)
    images = torch.from_numpy(np.stack([reference[i] for i in range(90)])).permute(0, 3, 1, 2)
    theirs = calculate_metrics(
        input1=Subset(generate(run, prompts, steps=2), range(80)), input2=Subset(images, range(90)),
        fid=True, feature_layer_fid="64", feature_extractor_weights_path=inception, cuda=False,
        verbose=False, cache=False)
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    main(*flags, tmp_path / "few")
    printed = capsys.readouterr().out
    assert "fid left out" in printed and "--reference all" in printed and "nan" not in printed
    assert {"clip"} == record_in(tmp_path / "few")["results"][0].keys() & {*evaluate.METRICS}
    with pytest.raises(ValueError, match="^--metrics accuracy"):
        main(*flags, tmp_path, "--metrics", "accuracy")


@pytest.mark.slow
def test_what_is_in_the_cache_is_not_asked_of_the_hub(tmp_path, clip, vae, whole_clip, inception):
    """slurm/fetch.sh finds all four networks in the cache, and calls no hub within reach."""
    for name, folder in {"tiny--clip": clip, "tiny--vae": vae,
                         "openai--clip-vit-large-patch14": whole_clip}.items():
        place = tmp_path / f"hub/models--{name}"
        shutil.copytree(folder, place / "snapshots" / ("0" * 40))
        (place / "refs").mkdir()
        (place / "refs/main").write_text("0" * 40)   # a commit
    weights = tmp_path / "torch/hub/checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    weights.parent.mkdir(parents=True)
    shutil.copy(inception, weights)
    asked = []

    class Hub(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    flags = ["--data", "photos", "--text-encoder", "tiny/clip", "--vae", "tiny/vae"]
    subprocess.run(["bash", "slurm/fetch.sh", *flags], cwd=ROOT, check=True, timeout=100, env={
        **os.environ, "HF_HOME": str(tmp_path), "no_proxy": "*",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert not [path for path in asked if "clip" in path or "vae" in path]   # others are of none
