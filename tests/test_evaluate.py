"""Evaluation: every figure against an independent calculation, and the same from any number of processes."""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch_fidelity
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import data
import evaluate
from conftest import ROOT, TINY, launch, train_run
from data import Ranks, all_scenes, caption_of, counter_rng, draw, is_held_out
from evaluate import Clip, FeatureStatistics, Inception, frechet_distance, kernel_distance
from models import load_checkpoint, load_model
from sample import generate
from tiny_networks import make_clip

CPU = torch.device("cpu")
ONE = Ranks(0, 0, 1, 1, CPU)


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """torch-fidelity's Inception with seeded weights, in the file format that it downloads."""
    network_class = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(network_class, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = network_class("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):   # keeps the features' size through the layers
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def whole_clip(tmp_path_factory):
    """A tiny CLIP model with text and image encoder, tokenizer and image processor."""
    folder = make_clip(tmp_path_factory.mktemp("whole_clip"))
    text = json.loads((Path(folder) / "config.json").read_text())
    text = {name: text[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                          "num_attention_heads", "max_position_embeddings", "bos_token_id", "eos_token_id")}
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.visual_projection.weight.data.neg_()   # so that the mean cosine is above 0
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A model that has learned something, so that its prompt accuracy is neither 0 nor 1."""
    return train_run(tmp_path_factory.mktemp("evaluate"), *TINY, "--batch-size", 32, "--max-steps", 80, "--warmup-steps", 10,
                     timeout=900)


def picture_folder(folder, count, seed, side=24):
    """A folder of PNG pictures with structure, and captions, so that it serves as --images and as --data."""
    folder.mkdir()
    rng, lines = np.random.default_rng(seed), ["image,caption"]
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 200 + 25 * seed, (4, 4, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.BICUBIC).save(folder / f"{i:03d}.png")
        lines += [f"{i:03d}.png,a dog number {i}", f"{i:03d}.png,the cat {i}"]
    (folder / "captions.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("folders")
    return picture_folder(base / "generated", 80, seed=1), picture_folder(base / "real", 90, seed=2)


def main(monkeypatch, *flags):
    """evaluate.py in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *map(str, flags)])
    evaluate.main()


def record_in(folder):
    """The only evaluation.json below the folder."""
    path, = folder.rglob("evaluation.json")
    return json.loads(path.read_text())


def statistics_of(features, rank=0, world_size=1):
    """FeatureStatistics of one rank's share, in batches of 7."""
    statistics, mine = FeatureStatistics(features.shape[1], CPU), list(range(rank, len(features), world_size))
    for start in range(0, len(mine), 7):
        indices = mine[start:start + 7]
        statistics.update(indices, features[indices])
    return statistics


class Together:
    """Ranks that exist one after the other: sums and gathers what the others have left."""

    def __init__(self, parts):
        self.parts, self.world_size, self.rank, self.is_main = parts, len(parts), 0, True

    def sum(self, tensor):
        return tensor.copy_(sum(part.moments for part in self.parts))

    def gather(self, _):
        return [part.features for part in self.parts]


def test_frechet_distance_against_closed_forms():
    """0 for a set and itself; the squared shift for a shifted set; scipy's matrix square root for any two Gaussians."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(500, 12, generator=rng) @ torch.randn(12, 12, generator=rng)
    shift = torch.arange(12) / 4
    other = torch.randn(300, 12, generator=rng) + 1
    a, shifted, b = statistics_of(features), statistics_of(features + shift), statistics_of(other)
    assert frechet_distance(a, a) < 1e-9
    assert frechet_distance(a, shifted) == pytest.approx(shift.square().sum().item(), rel=1e-6)
    S_a, S_b = np.cov(features.double().numpy(), rowvar=False), np.cov(other.double().numpy(), rowvar=False)
    mu = (features.double().mean(0) - other.double().mean(0)).square().sum().item()
    expected = mu + np.trace(S_a + S_b - 2 * scipy.linalg.sqrtm(S_a @ S_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_distances_against_torch_fidelity_on_the_same_features():
    """FID and KID, mean and deviation, are those of torch-fidelity, also where there are fewer features than dimensions."""
    rng = torch.Generator().manual_seed(1)
    for count, dim in ((300, 64), (60, 100)):
        a, b = torch.rand(count, dim, generator=rng), torch.rand(count + 30, dim, generator=rng) ** 1.3
        theirs = fid_statistics_to_metric(*(fid_features_to_statistics(x.double()) for x in (a, b)), verbose=False)
        ours = frechet_distance(statistics_of(a), statistics_of(b))
        assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
        theirs = kid_features_to_metric(a.double(), b.double(), kid_subset_size=count // 2, kid_subsets=100, rng_seed=2020)
        theirs = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
        assert kernel_distance(a, b, CPU) == pytest.approx(theirs, rel=1e-9)
    with pytest.raises(ValueError, match="--metrics kid: needs at least 4 pictures"):
        kernel_distance(a, b[:3], CPU)


@pytest.mark.parametrize("world_size", [2, 3, 200])
def test_ranks_add_up(world_size, monkeypatch):
    """Statistics of any number of ranks, even ones without a picture, are those of one: sums to 1e-12, features exactly."""
    monkeypatch.setattr(evaluate, "KID_IMAGES", 50)
    features = torch.randn(101, 8, generator=torch.Generator().manual_seed(2))
    whole = statistics_of(features)
    parts = [statistics_of(features, rank, world_size) for rank in range(world_size)]
    joined = FeatureStatistics(8, CPU).reduce(Together(parts))
    assert torch.allclose(joined.moments, whole.moments, rtol=1e-12)
    assert torch.equal(joined.features, whole.features) and torch.equal(whole.features, features[:50])


@pytest.mark.slow
def test_fid_of_two_folders_is_torch_fidelitys(folders, inception, tmp_path, monkeypatch):
    """The script's FID of two folders is torch-fidelity's own to 1e-3; sample.py's overview among the pictures is not judged."""
    generated, real = folders
    judged = shutil.copytree(generated, tmp_path / "generated")
    Image.new("RGB", (50, 80)).save(judged / "grid.png")
    main(monkeypatch, "--images", judged, "--data", real, "--resolution", 24, "--metrics", "fid", "kid", "--inception-layer", 64,
         "--inception-weights", inception, "--cache-dir", tmp_path)
    record = record_in(tmp_path)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(generated), input2=str(real), fid=True, kid=True, kid_subset_size=40, feature_layer_fid="64",
        feature_layer_kid="64", feature_extractor_weights_path=inception, cuda=False, verbose=False, cache=False,
        save_cpu_ram=True)
    ours = record["results"][0]
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    # The pictures' order, and with it the random subsets, differ.
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=theirs["kernel_inception_distance_std"])
    assert record["settings"]["num_images"] == 80 and record["settings"]["networks"]["inception"]["count"] == 90


@pytest.mark.slow
def test_features_and_fid_are_torchmetrics(folders, inception):
    """torchmetrics' FID without antialiasing to 1e-3, in 192 features, where its eigenvalues take no time; and its
    2048 features, those of the literature, to rounding."""
    sets = [torch.stack([torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
                         for path in sorted(folder.glob("*.png"))[:12]]) for folder in folders]
    network = Inception("192", inception, CPU)
    metric = FrechetInceptionDistance(192, feature_extractor_weights_path=inception, antialias=False)
    for real, images in enumerate(sets):
        metric.update(images, real=bool(real))
    ours = frechet_distance(*(statistics_of(network(images)) for images in sets))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-3)
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], inception, antialias=False)(sets[0][:2])
    assert torch.allclose(Inception("2048", inception, CPU)(sets[0][:2]), theirs, rtol=1e-4)
    assert theirs.shape == (2, 2048) and theirs.std() > 0


def test_clip_score_is_torchmetrics_and_a_plain_cosine(whole_clip):
    """On 6 pictures and prompts, one far too long: equal to torchmetrics' call, and to cosines from transformers' forward."""
    clip, images = Clip(whole_clip, CPU), torch.randint(0, 256, (6, 3, 20, 24), dtype=torch.uint8)
    prompts = ["a dog", "two people on a beach", "a red car", "the cat sleeps", "a", "grass " * 100]
    ours = clip.score(clip(images), prompts)
    model, processor = CLIPModel.from_pretrained(whole_clip), CLIPProcessor.from_pretrained(whole_clip)
    inputs = processor(text=prompts, images=list(images), padding=True, truncation=True, max_length=77, return_tensors="pt")
    assert (inputs.input_ids[5] == model.config.text_config.eos_token_id).sum() == 1 and inputs.input_ids.shape[1] == 77
    with torch.no_grad():
        output = model(**inputs)
    plain = [100 * float(i @ t / i.norm() / t.norm()) for i, t in zip(output.image_embeds, output.text_embeds)]
    assert ours.tolist() == pytest.approx(plain, abs=1e-4)

    class ReturnsTensors:
        """torchmetrics 1.9 takes the features as tensors; transformers 5 hands them out in an object."""

        config = model.config

        def to(self, device):
            return self

        def get_image_features(self, *args):
            found = model.get_image_features(*args)
            return found if torch.is_tensor(found) else found.pooler_output

        def get_text_features(self, *args):
            found = model.get_text_features(*args)
            return found if torch.is_tensor(found) else found.pooler_output

    theirs = clip_score(list(images[:5]), prompts[:5], lambda: (ReturnsTensors(), processor))
    assert max(0.0, ours[:5].mean().item()) == pytest.approx(theirs.item(), abs=1e-4)
    assert ours.std() > 0.01


def drawings(scenes, resolution, noise=0.0, seed=0):
    """Right pictures of the scenes, uint8 (N, 3, H, W), with Gaussian noise (pixels in [0, 1])."""
    rng = np.random.default_rng(seed)
    pixels = np.stack([np.asarray(draw(scene, resolution, rng)) for scene in scenes]) / 255
    noisy = pixels + noise * rng.standard_normal(pixels.shape)
    return torch.from_numpy((255 * noisy).round().clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2)


def shares_of(images, scenes):
    """Accuracy of each attribute and of all together over both groups."""
    attributes = evaluate.attributes_of(scenes[0])
    *right, count = evaluate.read_answers(images, scenes, attributes).sum(0).tolist()
    assert count == len(scenes)
    return {name: k / count for name, k in zip([*attributes, "all"], right)}


@pytest.mark.parametrize("hard, resolution", [(False, 32), (False, 64), (True, 64)])
def test_answer_key(hard, resolution):
    """All right on clean drawings, 99% with noise, nothing right for the attributes of another caption."""
    scenes = all_scenes(hard)[::97 if hard else 1]
    # With two small things, a square whose edges fall on the middle of pixels is sometimes left unread, and strong noise
    # can join the two.
    noise, clean_share, noisy_share = (0.05, 0.99, 0.98) if hard else (0.1, 1, 0.99)
    assert min(shares_of(drawings(scenes, resolution), scenes).values()) >= clean_share
    assert min(shares_of(drawings(scenes, resolution, noise), scenes).values()) >= noisy_share

    def other(thing):
        pick = {name: list(words) for name, words in (("size", data.SIZES), ("colour", data.COLOURS), ("shape", data.SHAPES))}
        return data.Thing(*(words[words.index(getattr(thing, name)) - 1] for name, words in pick.items()))

    others = []
    for scene in map(data.as_drawn, scenes):
        background = list(data.BACKGROUNDS)[list(data.BACKGROUNDS).index(scene.background) - 1]
        swapped = {"left of": "above", "above": "left of", None: None}[scene.position]
        others.append(data.Scene(other(scene.thing), background, swapped, other(scene.other) if hard else None))
    assert set(shares_of(drawings(scenes, resolution), others).values()) == {0.0}


def test_accuracy_report_counts_groups_apart():
    """Held-out scenes painted over count against the held-out group alone; intervals are scipy's Wilson intervals."""
    scenes = all_scenes()
    images = drawings(scenes, 32)
    images[torch.tensor([is_held_out(scene) for scene in scenes])] = 128
    attributes = evaluate.attributes_of(scenes[0])
    report = evaluate.accuracy_report(evaluate.read_answers(images, scenes, attributes), attributes)
    held_out = sum(map(is_held_out, scenes))
    assert report["trained"]["images"] == len(scenes) - held_out and report["held_out"]["images"] == held_out
    assert report["trained"]["all"]["share"] == 1 and report["held_out"]["all"]["share"] == 0
    assert report["held_out"]["background"]["share"] == pytest.approx(1 / 3)
    two = all_scenes(hard=True)[100]
    told = replace(two, other=replace(two.other, colour="blue" if two.other.colour != "blue" else "red"))
    found = shares_of(drawings([two], 64), [told])
    assert found["colour"] == found["all"] == 0 and found["shape"] == found["background"] == 1
    for k, n in ((0, 10), (3, 10), (10, 10), (499, 500)):
        theirs = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
        assert evaluate.wilson_interval(k, n) == pytest.approx([theirs.low, theirs.high], abs=1e-12)


@pytest.mark.slow
def test_pictures_are_the_samplers(run):
    """Every picture is drawn on exactly one rank, and is the one that `generate` draws for all prompts at once."""
    model, prompts = load_model(run), [caption_of(scene) for scene in all_scenes()[:7]]
    expected, seen = generate(model, prompts, seed=3, steps=3), []
    for rank in range(3):
        ranks = Ranks(rank, rank, 3, 3, CPU)
        for indices, images in evaluate.generated_pictures(model, prompts, ranks, batch_size=2, seed=3, steps=3):
            assert (images.int() - expected[indices].int()).abs().max() <= 1
            seen += indices
    assert sorted(seen) == list(range(7))


@pytest.mark.slow
def test_processes_and_batch_size_do_not_change_the_figures(run, inception, whole_clip, tmp_path):
    """All metrics from one process, and in other batches from two: FID and the like to 1e-3, accuracy exactly."""
    results = []
    for name, processes, batch_size in (("one", 1, 64), ("two", 2, 17)):
        done = launch("evaluate.py", "--checkpoint", run, "--num-images", 81, "--steps", 5, "--metrics", *evaluate.METRICS,
                      "--inception-layer", 64, "--inception-weights", inception, "--clip-model", whole_clip, "--batch-size",
                      batch_size, "--output", tmp_path / name, "--cache-dir", tmp_path / name, "--device", "cpu",
                      processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "nan" not in done.stdout.lower()
        results += record_in(tmp_path / name)["results"]
    one, two = results
    assert one["clip"] > 0 and 0 < one["accuracy"]["trained"]["size"]["right"] < 41
    assert (one["accuracy"]["trained"]["images"], one["accuracy"]["held_out"]["images"]) == (41, 40)
    assert two["accuracy"] == one["accuracy"]
    for metric in ("fid", "kid", "kid_std", "clip", "clip-fd"):
        assert two[metric] == pytest.approx(one[metric], rel=1e-3), metric


def count_pictures(monkeypatch):
    """How many pictures each call of the feature network got, from now on."""
    calls, plain = [], Inception.__call__
    monkeypatch.setattr(Inception, "__call__", lambda self, images: calls.append(len(images)) or plain(self, images))
    return calls


@pytest.mark.slow
def test_reference_statistics_are_cached_by_content(folders, inception, tmp_path, monkeypatch):
    """A second evaluation and a moved copy of the data find them; one changed image, or another resolution, does not."""
    generated, real = folders[0], shutil.copytree(folders[1], tmp_path / "data" / "real")
    calls = count_pictures(monkeypatch)

    def evaluate_against(real, resolution=24):
        calls.clear()
        main(monkeypatch, "--images", generated, "--data", real, "--resolution", resolution, "--metrics", "fid",
             "--inception-layer", 64, "--inception-weights", inception, "--cache-dir", tmp_path, "--output", tmp_path / "results")
        return sum(calls)

    assert evaluate_against(real) == 170
    first = json.loads(next((tmp_path / "results").rglob("evaluation.json")).read_text())["results"]
    shutil.rmtree(tmp_path / "results")
    os.utime(real / "000.png")
    assert evaluate_against(real) == 80
    second = record_in(tmp_path / "results")["results"]
    assert second[0]["fid"] == pytest.approx(first[0]["fid"], rel=1e-12)
    assert evaluate_against(real) == 0, "nothing is left to judge"
    assert evaluate_against(real.rename(tmp_path / "data" / "moved")) == 0
    assert evaluate_against(tmp_path / "data" / "moved", resolution=20) == 170
    Image.new("RGB", (24, 24)).save(tmp_path / "data" / "moved" / "003.png")
    assert evaluate_against(tmp_path / "data" / "moved") == 170
    for path in tmp_path.glob("*.npz"):
        with np.load(path, allow_pickle=False) as file:
            assert file["moments"][0, 0] == 90 and json.loads(str(file["made_of"]))["count"] == 90


@pytest.mark.slow
def test_a_killed_sweep_continues(run, tmp_path, monkeypatch, capsys):
    """Killed after its first scale, a rerun keeps that result untouched and adds the others; TensorBoard has the curve."""
    flags = ["--checkpoint", run, "--num-images", 24, "--steps", 8, "--output", tmp_path, "--guidance-scales", "1", "2.5", "4"]
    process = subprocess.Popen([sys.executable, str(ROOT / "evaluate.py"), "--device", "cpu", *map(str, flags)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not list(tmp_path.rglob("evaluation.json")) and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = record_in(tmp_path)["results"]
    assert 1 <= len(before) < 3
    main(monkeypatch, *flags)
    after = record_in(tmp_path)["results"]
    assert [result["guidance_scale"] for result in after] == [1, 2.5, 4] and after[:len(before)] == before
    assert "held out" in capsys.readouterr().out
    folder = next(tmp_path.rglob("evaluation.json")).parent
    events = EventAccumulator(str(folder)).Reload()
    curve = events.Scalars("over 100 x guidance scale/colour_trained")
    assert [event.step for event in curve] == [100, 250, 400]
    assert curve[-1].value == pytest.approx(after[-1]["accuracy"]["trained"]["colour"]["share"])
    main(monkeypatch, *flags, "--seed", 1)
    assert len(list(tmp_path.rglob("evaluation.json"))) == 2, "other settings, another folder"


@pytest.mark.slow
def test_captioned_data(folders, inception, whole_clip, tmp_path, monkeypatch, capsys):
    """A model trained on captioned images takes prompts from its own validation split; FID is refused where images are few,
    with the reason, and the other metrics go on."""
    real = folders[1]
    run = train_run(tmp_path, "--data", real, "--preset", "tiny", "--resolution", 16, "--text-encoder", whole_clip,
                    "--batch-size", 8, "--max-steps", 2, "--val-fraction", 0.3, "--sample-every", 0, "--device", "cpu")
    flags = ["--checkpoint", run, "--num-images", 40, "--steps", 2, "--inception-weights", inception, "--inception-layer", 64,
             "--clip-model", whole_clip, "--cache-dir", tmp_path]
    main(monkeypatch, *flags)
    printed, record = capsys.readouterr().out, record_in(run)
    assert "left out: --metrics fid: --num-images 40 is below the 64 dimensions" in printed and "use kid" in printed
    assert "nan" not in printed.lower() and "fid" not in record["results"][0]
    assert set(record["settings"]["metrics"]) == {"kid", "clip", "clip-fd"}
    assert record["settings"]["networks"]["inception"]["count"] == 27
    with pytest.raises(ValueError, match="below the 64 dimensions"):
        main(monkeypatch, *flags, "--metrics", "fid")
    with pytest.raises(ValueError, match="accuracy is for models on the built-in pictures"):
        main(monkeypatch, *flags, "--metrics", "accuracy")
    with pytest.raises(ValueError, match="the model was trained on 63"):
        main(monkeypatch, *flags, "--val-fraction", 0.5)

    seen = []
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, **kwargs: seen.extend(prompts) or generate(
        model, prompts, **kwargs))
    main(monkeypatch, *flags, "--metrics", "clip", "--num-images", 60)
    source = data.CaptionedImages(real)
    validation = data.split_images(len(source), 0.3)[1]
    captions = sorted(caption for i in validation for caption in source.captions(i))
    assert sorted(seen[:54]) == captions and seen[54:] == seen[:6], "each caption once, then from the beginning"
    assert all("dog" in caption for caption in seen[:27])


def test_prompts_where_there_are_no_validation_images(folders):
    """A model trained on all its images is judged on those: with --reference training they give the prompts, and the default
    is refused with the flag to use."""
    source = data.CaptionedImages(folders[1])
    args = argparse.Namespace(data=folders[1], val_fraction=0.0, reference="training", num_images=len(source), resolution=16,
                              channels=3)
    prompts, _, reference = evaluate.captioned_data(args, {}, ONE)
    assert sorted(prompts) == sorted(source.captions(i)[0] for i in range(len(source))) and reference.count == len(source)
    args.reference = "validation"
    with pytest.raises(ValueError, match="--reference validation: .* --val-fraction 0.0 has no such images; choose another"):
        evaluate.captioned_data(args, {}, ONE)


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [
    (["--checkpoint", "RUN", "--num-images", "1"], "--num-images 1: must be at least 4"),
    (["--checkpoint", "RUN", "--num-images", "100", "--metrics", "fid", "--inception-weights", "WEIGHTS"], "use kid"),
    (["--checkpoint", "RUN", "--metrics", "kid", "--inception-weights", "nowhere.pth"], "--inception-weights nowhere.pth"),
    (["--checkpoint", "RUN", "--metrics", "clip", "--clip-model", "nowhere/clip"], "--clip-model nowhere/clip"),
    (["--images", "nowhere", "--data", "shapes", "--resolution", "32"], "--images nowhere: no such folder"),
    (["--images", "nowhere"], "add --data"),
    (["--checkpoint", "RUN", "--resolution", "32"], "--resolution 32: goes with --images"),
    (["--checkpoint", "DIVERGED"], "training had diverged")])
def test_mistakes_are_one_line(run, inception, tmp_path, monkeypatch, flags, message):
    """A user's mistake is told in one line that names the flag, its value and what to do."""
    payload, _ = load_checkpoint(run)
    next(iter(payload["ema"].values()))[0] = float("nan")
    torch.save(payload, tmp_path / "diverged.pt")
    places = {"RUN": run, "WEIGHTS": inception, "DIVERGED": tmp_path / "diverged.pt"}
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        main(monkeypatch, *(places.get(flag, flag) for flag in flags))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_mistakes_end_the_script(tmp_path):
    """A mistake ends the script with exit code 2 and that line, no traceback."""
    done = launch("evaluate.py", "--images", tmp_path / "nowhere", "--data", "shapes", "--resolution", "32", "--device", "cpu")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == f"error: --images {tmp_path / 'nowhere'}: no such folder"


def test_prompts_of_built_in_data():
    """Trained and held-out combinations in equal number, each in a fixed order that covers all of them; the reference
    pictures show what the prompts say."""
    args = evaluate.parse_args(["--checkpoint", "RUN", "--num-images", "400"])
    args.data, args.resolution, args.channels = "shapes", 32, 3
    prompts, scenes, reference = evaluate.builtin_data(args)
    assert [is_held_out(scene) for scene in scenes] == [False, True] * 200
    assert {scene for scene in scenes} == set(all_scenes())
    assert prompts == [caption_of(scene) for scene in scenes]
    indices, images = reference.__getitems__(list(range(100)))
    assert shares_of(images, scenes[:100])["all"] == 1
    assert not np.array_equal(reference.image(0), draw(scenes[0], 32, counter_rng("shapes", 1, 0)))
