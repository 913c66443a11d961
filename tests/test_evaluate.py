"""Evaluation: every figure against an independent calculation, and the same from any number of
processes."""
import json
import sys
from argparse import Namespace
from dataclasses import astuple

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.image.fid import NoTrainInceptionV3
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig

import data
import evaluate
from conftest import CPU, TINY, Job, launch, make_pictures, newest, run_ok, train_run
from data import SCENES
from evaluate import FeatureStatistics, frechet_distance, kernel_distance
from tiny_networks import make_clip


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A model that has learned something: its prompt accuracy is neither 0 nor 1."""
    return train_run(tmp_path_factory.mktemp("evaluate"), *TINY, "--batch-size", 32,
                     "--max-steps", 80, "--warmup-steps", 10, timeout=900)


def tiny_pictures(folder, count, seed):
    """Of 4 x 4 pixels, with two captions each: for --images and for --data."""
    return make_pictures(folder, count, 2, (4, 4), False, suffix="png", prefix="", seed=seed)


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    return tiny_pictures(tmp_path_factory.mktemp("real"), 90, seed=2)


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
    statistics = FeatureStatistics(features.shape[1], CPU)
    mine = list(range(rank, len(features), world_size))
    for numbers in (mine[start:start + 7] for start in range(0, len(mine), 7)):
        statistics.update(numbers, features[numbers])
    return statistics


@pytest.mark.parametrize("count, dim", [(300, 64), (60, 100)])
def test_distances_of_features(count, dim):
    """FID and KID, mean and deviation, are torch-fidelity's, also of fewer features than
    dimensions; FID is 0 for a set and itself, and for a shifted set the squared shift."""
    rng, shift = torch.Generator().manual_seed(1), torch.arange(dim) / 4
    a = torch.rand(count, dim, generator=rng)
    b = torch.rand(count + 30, dim, generator=rng) ** 1.3
    gaussians = [fid_features_to_statistics(x.double()) for x in (a, b)]
    theirs = fid_statistics_to_metric(*gaussians, verbose=False)["frechet_inception_distance"]
    for x, y, expected in ((a, b, theirs), (b, a, theirs), (a, a, 0),
                           (a, a + shift, shift.square().sum().item())):
        distance = frechet_distance(statistics_of(x), statistics_of(y))
        assert distance == pytest.approx(expected, rel=1e-6, abs=1e-6)
    theirs = kid_features_to_metric(a.double(), b.double(), kid_subset_size=count // 2,
                                    kid_subsets=100, rng_seed=2020)
    theirs = [theirs[f"kernel_inception_distance_{name}"] for name in ("mean", "std")]
    assert kernel_distance(a, b, CPU) == pytest.approx(theirs, rel=1e-9)
    with pytest.raises(ValueError, match="^--metrics kid: needs at least 4 pictures to judge and"):
        kernel_distance(a, b[:3], CPU)


@pytest.mark.parametrize("world_size", [2, 3, 200])
def test_ranks_add_up(world_size, monkeypatch):
    """Any number of ranks, even ones without a picture, have the statistics of one: features
    exactly, sums to 1e-12."""
    monkeypatch.setattr(evaluate, "KID_IMAGES", 50)
    features = torch.randn(101, 8, generator=torch.Generator().manual_seed(2))
    parts = [statistics_of(features, rank, world_size) for rank in range(world_size)]
    monkeypatch.setattr(evaluate.dist, "all_reduce",
                        lambda tensor: tensor.copy_(sum(part.moments for part in parts)))
    monkeypatch.setattr(evaluate, "gather", lambda _: [part.features for part in parts])
    joined, whole = FeatureStatistics(8, CPU).reduce(), statistics_of(features)
    assert torch.allclose(joined.moments, whole.moments, rtol=1e-12)
    for statistics in (joined, whole):
        assert torch.equal(statistics.features, features[:50])


@pytest.mark.slow
def test_two_folders(real, inception, tmp_path, monkeypatch):
    """The FID of two folders is torch-fidelity's own to 1e-3 and the KID within its deviation, as
    random subsets differ; sample.py's overviews are not judged."""
    judged = tiny_pictures(tmp_path / "judged", 80, seed=1)
    theirs = calculate_metrics(
        input1=str(judged), input2=str(real), fid=True, kid=True, kid_subset_size=40, cuda=False,
        feature_layer_fid="64", feature_layer_kid="64", feature_extractor_weights_path=inception,
        verbose=False, cache=False, save_cpu_ram=True)
    for name in ("grid", "steps"):
        Image.new("RGB", (50, 80)).save(judged / f"{name}.png")
    main(monkeypatch, "--images", judged, "--data", real, "--resolution", 4, "--metrics", "fid",
         "kid", "--inception-layer", 64, "--inception-weights", inception)
    ours, = record_in(tmp_path)["results"]
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"],
                                        abs=theirs["kernel_inception_distance_std"])


@pytest.mark.slow
def test_features_are_torchmetrics(inception):
    """The 2048 features of the literature, resized without antialiasing, to rounding."""
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], inception, antialias=False)(images)
    ours = evaluate.Inception("2048", inception, CPU)(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
    assert theirs.shape == (2, 2048) and theirs.std() > 0


def test_clip_score_is_torchmetrics_and_a_plain_cosine(whole_clip):
    """Equal to torchmetrics' call and, also for a prompt that is far too long, to the cosines of
    transformers' forward."""
    clip = evaluate.Clip(whole_clip, CPU)
    images = torch.randint(0, 256, (6, 3, 20, 24), dtype=torch.uint8)
    prompts = ["a dog", "two people on a beach", "a red car", "the cat sleeps", "a", "grass " * 100]
    ours, model = clip.score(clip(images), prompts), CLIPModel.from_pretrained(whole_clip)
    processor = CLIPProcessor.from_pretrained(whole_clip)
    inputs = processor(text=prompts, images=list(images), padding=True, truncation=True,
                       max_length=77, return_tensors="pt")
    assert inputs.input_ids.shape[1] == 77 and inputs.input_ids[5, -1] == 1, "the end token is kept"
    inputs.pop("token_type_ids", None)   # older tokenizers give them, and CLIP has no use for them
    output = model.requires_grad_(False)(**inputs)
    plain = 100 * torch.cosine_similarity(output.image_embeds, output.text_embeds)
    torch.testing.assert_close(ours, plain.double(), rtol=0, atol=1e-4)
    assert ours.std() > 0.01
    for name in ("get_image_features", "get_text_features"):
        # torchmetrics 1.9 takes features as tensors, transformers 5 hands them out in an object.
        plain = getattr(model, name)
        setattr(model, name, lambda *args, plain=plain: getattr(
            features := plain(*args), "pooler_output", features))
    theirs = clip_score(list(images[:5]), prompts[:5], lambda: (model, processor))
    assert max(0.0, ours[:5].mean().item()) == pytest.approx(theirs.item(), abs=1e-4)


def drawings(resolution, noise=0.0):
    """Right pictures of all scenes, uint8 (N, 3, H, W), with Gaussian noise (pixels in [0, 1])."""
    rng = np.random.default_rng(0)
    pixels = np.stack([np.asarray(data.draw(scene, resolution, rng)) for scene in SCENES]) / 255
    noisy = pixels + noise * rng.standard_normal(pixels.shape)
    noisy = (255 * noisy).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(noisy).permute(0, 3, 1, 2)


def shares(images, scenes):
    """The shares that are right: size, colour, shape, background, all of them."""
    counts = evaluate.read_answers(images, scenes).sum(0)
    assert counts[-1] == len(scenes)
    return (counts[:-1] / counts[-1]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("resolution", [32, 64])
def test_answer_key(resolution):
    """All is right on clean drawings, 99% with noise, and nothing for another caption."""
    tables = [list(table) for table in (data.SIZES, data.COLOURS, data.SHAPES, data.BACKGROUNDS)]
    others = [data.Scene(*(words[words.index(word) - 1] for words, word in zip(tables, astuple(s))))
              for s in SCENES]
    assert shares(drawings(resolution), SCENES) == [1] * 5
    assert min(shares(drawings(resolution, noise=0.1), SCENES)) >= 0.99
    assert shares(drawings(resolution), others) == [0] * 5


def test_two_things_are_no_answer():
    """Beside a second thing of its colour no thing is read, and all else than the background is
    wrong."""
    small = torch.tensor([scene.size == "small" for scene in SCENES])
    images = drawings(64)
    images[:, :, 3:11, 3:11] = images[:, :, 32:33, 32:33]
    assert shares(images[small], [s for s in SCENES if s.size == "small"]) == [0, 0, 0, 1, 0]


def test_accuracy_report_counts_groups_apart():
    """Held-out scenes painted over count against the held-out group alone."""
    images, held_out = drawings(32), torch.tensor([data.is_held_out(scene) for scene in SCENES])
    images[held_out] = 128
    trained, others = evaluate.accuracy_report(evaluate.read_answers(images, SCENES)).values()
    assert trained["images"] == (~held_out).sum() and others["images"] == held_out.sum()
    assert trained["all"]["share"] == 1 and others["all"]["share"] == 0
    assert others["background"]["share"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("k, n", [(0, 10), (3, 10), (10, 10), (499, 500)])
def test_wilson_interval(k, n):
    """It is scipy's."""
    expected = list(binomtest(k, n).proportion_ci(method="wilson"))
    assert evaluate.wilson_interval(k, n) == pytest.approx(expected, abs=1e-12)


def test_prompts_of_built_in_data():
    """Trained and held-out combinations in equal number, each in an order that covers all of them;
    the reference pictures show what the prompts say."""
    args = Namespace(num_images=400, resolution=32, channels=3)
    prompts, scenes, reference = evaluate.builtin_data(args)
    assert [data.is_held_out(scene) for scene in scenes] == [False, True] * 200
    assert set(scenes) == set(SCENES) and prompts == [scene.caption for scene in scenes]
    numbers, images = next(reference.batches(100))
    assert shares(images, [scenes[i] for i in numbers])[-1] == 1


def test_prompts_of_captioned_data(real):
    """The validation split's captions, each once and first captions first, then from the beginning;
    without such images those of --reference, which must hold some. Another split than that of the
    training is refused."""
    source = data.CaptionedImages(real)
    captions = [source.captions(i) for i in data.split_images(source, 0.3)[1]]
    args = Namespace(data=real, val_fraction=0.3, reference="validation", num_images=60,
                     resolution=16, channels=3)
    prompts, _, reference = evaluate.captioned_data(args, {})
    assert sorted(prompts[:27]) == sorted(first for first, _ in captions)
    assert sorted(prompts[27:54]) == sorted(second for _, second in captions)
    assert prompts[54:] == prompts[:6] and reference.count == 27
    with pytest.raises(ValueError, match="^--data .* 64 .* so some may be validation images"):
        evaluate.captioned_data(args, dict(data=real, train_images=64))
    args.val_fraction, args.num_images = 0.0, 90
    with pytest.raises(ValueError, match="^--reference validation: .* 0.0 has no such images; cho"):
        evaluate.captioned_data(args, {})
    args.reference = "training"
    prompts, _, reference = evaluate.captioned_data(args, {})
    assert sorted(prompts) == sorted(source.captions(i)[0] for i in range(90))
    assert reference.count == 90


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
    trained, held_out = one["accuracy"]["trained"], one["accuracy"]["held_out"]
    assert (trained["images"], held_out["images"]) == (41, 40) and one["clip"] > 0
    assert 0 < trained["size"]["right"] < 41 and two["accuracy"] == one["accuracy"]
    for metric in ("fid", "kid", "kid_std", "clip", "clip-fd"):
        assert two[metric] == pytest.approx(one[metric], rel=1e-3), metric


@pytest.mark.slow
def test_a_killed_sweep_continues(run, tmp_path, monkeypatch, capsys):
    """Killed after its first scale, a rerun keeps that result untouched and adds the others; other
    settings have a folder of their own."""
    flags = ["--checkpoint", run, "--num-images", 24, "--steps", 8, "--output", tmp_path / "out",
             "--guidance-scales", "1", "2.5", "4"]
    with Job(tmp_path, "--device", "cpu", *flags, script="evaluate.py", processes=1) as job:
        job.until(lambda: list(tmp_path.rglob("evaluation.json")))
    before = record_in(tmp_path)["results"]
    assert 1 <= len(before) < 3
    main(monkeypatch, *flags)
    after = record_in(tmp_path)["results"]
    assert [result["guidance_scale"] for result in after] == [1, 2.5, 4]
    assert after[:len(before)] == before and "held out" in capsys.readouterr().out
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        main(monkeypatch, *flags, "--guidance-scales", 2, "--output", tmp_path / "file")
    assert "guidance scale 2, 12 pictures of held out" in capsys.readouterr().out
    main(monkeypatch, *flags, "--seed", 1)
    assert len(list(tmp_path.rglob("evaluation.json"))) == 2


@pytest.mark.slow
def test_captioned_data(real, inception, whole_clip, tmp_path, monkeypatch, capsys):
    """A model trained on captioned images: FID is left out where images are few, with the reason,
    and the other metrics go on; accuracy is refused."""
    run = train_run(tmp_path, *TINY, "--data", real, "--preset", "tiny", "--text-encoder",
                    whole_clip, "--batch-size", 8, "--max-steps", 2, "--val-fraction", 0.3)
    flags = ["--checkpoint", run, "--num-images", 40, "--steps", 2,
             "--inception-weights", inception, "--inception-layer", 64, "--clip-model", whole_clip]
    main(monkeypatch, *flags)
    printed, record = capsys.readouterr().out, record_in(run)
    assert "left out: --metrics fid: 40 pictures, a reference of 27: below the 64 dim" in printed
    assert "--reference all" in printed
    assert "nan" not in printed.lower()
    assert {"kid", "clip", "clip-fd"} == record["results"][0].keys() & set(evaluate.METRICS)
    assert record["settings"]["networks"]["inception"]["count"] == 27
    with pytest.raises(ValueError, match="^--metrics accuracy: accuracy is for models on the bui"):
        main(monkeypatch, *flags, "--metrics", "accuracy")


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [
    ("--checkpoint RUN --num-images 1", "--num-images 1: must be at least 4"),
    ("--checkpoint RUN --num-images 100 --metrics fid --inception-weights not/yet/looked/for",
     "--metrics fid: 100 pictures, a reference of 100: below the 2048 dimensions"),
    ("--checkpoint RUN --metrics kid --inception-weights no.pth", "--inception-weights no.pth: "),
    ("--checkpoint RUN --metrics clip --clip-model no/clip", "--clip-model no/clip: no such fold"),
    ("--images no --data shapes --resolution 32", "--images no: no such folder"),
    ("--images no", "--images no: add --data"),
    ("--checkpoint RUN --resolution 32", "--resolution 32: goes with --images"),
    ("--checkpoint DIVERGED", "--amp off: pictures are not finite")])
def test_mistakes_are_one_line(run, tmp_path, flags, message):
    """A mistake ends the script with exit code 2 and one line: flag, value and what to do."""
    payload = newest(run)
    payload["ema"] = {name: value * float("nan") for name, value in payload["ema"].items()}
    torch.save(payload, tmp_path / "DIVERGED")
    places = {"RUN": run}
    done = launch("evaluate.py", *(places.get(flag, flag) for flag in flags.split()), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
