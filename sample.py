"""Sampling: the reverse process with classifier-free guidance, Algorithm 2 of Ho et al. 2020.

    python sample.py --checkpoint runs/run_20250131_120000 --prompts "a small red circle"
    torchrun --standalone --nproc_per_node=2 sample.py --checkpoint RUN --prompt-file prompts.txt
    sbatch slurm/run.sh sample.py --checkpoint RUN --prompts "a dog, running"
    python sample.py --checkpoint RUN --export FOLDER      # for diffusers' StableDiffusionPipeline

In Python: `from sample import generate; images = generate("runs/run_...", ["a dog"] * 4)`.

Every sampler below is a generator of (x_prev, x_0) pairs, from noise to picture, and needs one
thing of the network: `denoise(x_t, t)`, its guided estimate of x_0. Where x_0 is clipped, as in
pixel space, each sampler derives eps anew from the clipped x_0: under guidance the clipped x_0 and
the network's own eps contradict each other, and more guidance makes such pictures worse.
"""
import argparse
import inspect
import json
import math
import re
import textwrap
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import models
from data import amp_dtype, counter_rng, gather, interleave, rank_batches, run_main, setup_processes
from models import BETA_SCHEDULES, Model, apply_unet, check_ranges, load_model, require

# Samplers


def make_timesteps(num_train_timesteps, steps):
    """(t, t_prev) pairs from T - 1 down to -1, evenly spaced from the noisy end ("trailing", Lin et
    al. 2024, Table 2)."""
    T = num_train_timesteps
    if not 1 <= steps <= T:
        raise ValueError(f"--steps {steps}: must be from 1 to the model's {T} timesteps")
    t = np.arange(T, 0, -T / steps)[:steps].round().astype(int) - 1   # arange may add one
    return list(zip(t.tolist(), [*t[1:].tolist(), -1]))


def ddpm(denoise, x_t, schedule, timesteps, draw_noise, eta=None):
    """Ancestral sampling: Ho et al. 2020, Algorithm 2, with the posterior variance of Eq. 7."""
    for t, t_prev in timesteps:
        x_0 = denoise(x_t, t)
        x_t, variance = schedule.posterior(x_0, x_t, t, t_prev)
        if t_prev >= 0:
            x_t = x_t + variance.sqrt() * draw_noise()
        yield x_t, x_0


def ddim(denoise, x_t, schedule, timesteps, draw_noise, eta=0.0):
    """Song et al. 2021, Eq. 12: eta 0 is deterministic, eta 1 has the posterior variance of DDPM
    (their Eq. 16)."""
    for t, t_prev in timesteps:
        x_0 = denoise(x_t, t)
        eps = schedule.predict_eps(x_0, x_t, t)
        alpha_bar_prev = schedule.alpha_bar(t_prev)
        variance = eta**2 * schedule.posterior(x_0, x_t, t, t_prev)[1]
        x_t = alpha_bar_prev.sqrt() * x_0 + (1 - alpha_bar_prev - variance).sqrt() * eps
        if eta > 0 and t_prev >= 0:
            x_t = x_t + variance.sqrt() * draw_noise()
        yield x_t, x_0


def dpm_solver_2m(denoise, x_t, schedule, timesteps, draw_noise=None, eta=None):
    """DPM-Solver++ (2M): Lu et al. 2022, Algorithm 2; first order in the first and last step."""
    x_0_last = h_last = None
    for t, t_prev in timesteps:
        x_0 = denoise(x_t, t)
        # At either end h may be infinite (zero SNR, or the clean x_0). Every term below then has
        # its finite limit. h = lambda_prev - lambda_t, with lambda = log(SNR) / 2.
        alpha_bar_t, alpha_bar_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        h = (alpha_bar_prev.logit() - alpha_bar_t.logit()) / 2
        D = x_0
        if x_0_last is not None and t_prev >= 0:
            D = x_0 + (x_0 - x_0_last) * h / (2 * h_last)
        x_t = (((1 - alpha_bar_prev) / (1 - alpha_bar_t)).sqrt() * x_t
               - alpha_bar_prev.sqrt() * torch.expm1(-h) * D)
        x_0_last, h_last = x_0, h
        yield x_t, x_0


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver_2m}

# Guidance


def rescale_guidance(guided, cond, phi):
    """Lin et al. 2024, Eqs. 15 and 16: brings the guided output's spread back towards the
    conditional's."""
    std_cond, std_guided = (x.std(dim=(1, 2, 3), keepdim=True) for x in (cond, guided))
    return phi * guided * (std_cond / std_guided) + (1 - phi) * guided


def guided_denoiser(model, text_emb, negative_emb, guidance_scale=1.0, guidance_rescale=0.0,
                    dtype=None):
    """denoise(x_t, t) -> x_0 by classifier-free guidance, uncond + s (cond - uncond): Ho & Salimans
    2022, Eq. 6 with s = w + 1.

    Both halves go through the network in one call. With s = 1 the conditional half is enough. In
    pixel space x_0 is clipped to [-1, 1].
    """
    both = torch.cat([negative_emb, text_emb])

    def denoise(x_t, t):
        guide = guidance_scale != 1
        x_in, emb = (torch.cat([x_t, x_t]), both) if guide else (x_t, text_emb)
        t_in = torch.full((len(x_in),), t, device=x_t.device)
        with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            output = apply_unet(model.unet, model.config, x_in, t_in, emb).to(x_t.dtype)
        if guide:
            uncond, cond = output.chunk(2)
            output = uncond + guidance_scale * (cond - uncond)
            if guidance_rescale:
                output = rescale_guidance(output, cond, guidance_rescale)
        x_0 = model.schedule.predict_x0(output, x_t, t)
        return x_0.clamp(-1, 1) if model.codec.is_pixel_space else x_0

    return denoise


# Generation


def check_sampling(flags, **ranges):
    """Raises: ValueError for a setting of `generate`, or its flag, that would draw nonsense."""
    check_ranges(flags, eta=(0, 1), guidance_rescale=(0, 1), seed=0, guidance_scale=(0, 100),
                 guidance_scales=(0, 100), batch_size=1, **ranges)
    require(flags.sampler in SAMPLERS, flags, "sampler", f"choose from {', '.join(SAMPLERS)}")
    require(flags.sampler == "ddim" or not flags.eta, flags, "eta",
            f"{flags.sampler} has none; add --sampler ddim")


@torch.no_grad()
def generate(model, prompts, *, seed=0, indices=None, sampler="ddim", steps=30, guidance_scale=2.0,
             guidance_rescale=0.0, eta=0.0, negative_prompt="", batch_size=64, dtype=None,
             trajectory=False, progress=lambda pictures: None):
    """Pictures for a list of prompts, uint8 (N, c, H, W) on the CPU.

    model: a Model, or the path of a run folder or checkpoint. The starting noise and every later
    draw of picture i come from (seed, indices[i]) alone (indices: 0, 1, ... by default), so they do
    not change with the batch size or the number of processes. dtype: autocast dtype of the network,
    None for float32. With `trajectory` the x_t of each step and the estimate of x_0 made from it
    are returned as well, a list of uint8 (2, N, c, H, W). `progress` is called after every step of
    that many pictures.
    """
    check_sampling(argparse.Namespace(**locals()))   # of the arguments
    if not isinstance(model, Model):
        model = load_model(model, "cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(prompts, str):
        raise ValueError(f"prompts {prompts!r}: must be a list of texts, one a picture")
    if guidance_scale != 1 and model.config.caption_dropout == 0:
        warnings.warn(f"--guidance-scale {guidance_scale}: the model was trained without caption "
                      "dropout, so knows no empty caption to guide away from; use 1", stacklevel=2)
    if guidance_scale == 1 and (negative_prompt or guidance_rescale):
        warnings.warn("--negative-prompt and --guidance-rescale do nothing at --guidance-scale 1")
    if model.text_encoder.count_cut([*prompts, negative_prompt]):
        warnings.warn(f"prompts are cut at {model.config.token_length} tokens")
    words, known = re.findall(r"\w+", " ".join(prompts).lower()), model.config.builtin_words
    if known and (unknown := sorted(set(words).difference(known))):
        warnings.warn(f"{', '.join(unknown)}: not among the words of the captions in training")
    indices = range(len(prompts)) if indices is None else indices
    timesteps = make_timesteps(model.schedule.num_train_timesteps, steps)
    negative_emb = model.text_encoder([negative_prompt])
    pictures, states = [], [[] for _ in timesteps]
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        rngs = [counter_rng("sampling", seed, index) for index in indices[part]]

        def draw_noise():
            eps = [rng.standard_normal(model.codec.latent_shape, dtype=np.float32) for rng in rngs]
            return torch.from_numpy(np.stack(eps)).to(model.device)

        text_emb = model.text_encoder(prompts[part])
        denoise = guided_denoiser(model, text_emb, negative_emb.expand_as(text_emb),
                                  guidance_scale, guidance_rescale, dtype)
        x_t = draw_noise()
        steps_taken = SAMPLERS[sampler](denoise, x_t, model.schedule, timesteps, draw_noise, eta)
        for k, (x_t_prev, x_0) in enumerate(steps_taken):
            progress(len(rngs))
            if trajectory:
                states[k].append(torch.stack([to_uint8(model.codec.decode(x)) for x in (x_t, x_0)]))
            x_t = x_t_prev
        images = model.codec.decode(x_t)
        if not images.isfinite().all():
            raise FloatingPointError(f"--amp {dtype or 'off'}: pictures are not finite; use --amp "
                                     "off or the type of training, or an older --checkpoint")
        pictures.append(to_uint8(images))
    # A rank may be left without prompts.
    pictures = torch.cat(pictures or [torch.empty(0, dtype=torch.uint8)])
    return (pictures, [torch.cat(parts, dim=1) for parts in states]) if trajectory else pictures


# Whoever reads for the method may stop here.


def generate_sharded(model, prompts, **kwargs):
    """The same pictures, each drawn by one rank and given to all: i belongs to rank i mod size."""
    mine = range(dist.get_rank(), len(prompts), dist.get_world_size())
    with data.all_or_none():
        own = generate(model, [prompts[i] for i in mine], indices=mine, **kwargs)
    return torch.stack(interleave(gather(own)))


def draw_share(model, prompts, numbers, batch_size, **settings):
    """(picture numbers, pictures) of this rank's share of `numbers`, a batch at a time."""
    for part in rank_batches(len(numbers), batch_size):
        own = [numbers[k] for k in part]
        yield own, generate(model, [prompts[i] for i in own], indices=own, batch_size=batch_size,
                            **settings)


def to_uint8(images):
    """[-1, 1] to uint8 [0, 255], rounded, on the CPU."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def to_pil(picture):
    """uint8 (c, H, W) to a PIL image."""
    return Image.fromarray(picture.permute(1, 2, 0).squeeze(2).numpy())   # greyscale: (H, W)


def make_grid(pictures, captions=None, columns=None):
    """One PIL image with all pictures (N, c, H, W) uint8 in rows, each with its caption below, of
    at most four lines; small ones are enlarged."""
    cell = pictures.shape[-1] * max(1, round(128 / pictures.shape[-1]))
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows, gap, line = math.ceil(len(pictures) / columns), 8, 14
    font = ImageFont.load_default(12)   # ASCII alone
    with suppress(OSError):   # where the machine has this
        font = ImageFont.truetype("DejaVuSans.ttf", 12)
    wrapped = [textwrap.wrap(caption, max(5, cell // 7), max_lines=4, placeholder=" ...")
               for caption in captions or [""] * len(pictures)]
    # From one picture to the next.
    right, down = cell + gap, cell + gap + line * max(map(len, wrapped), default=0)
    grid = Image.new("RGB", (columns * right + gap, rows * down + gap), "white")
    draw = ImageDraw.Draw(grid)
    for i, (picture, lines) in enumerate(zip(pictures, wrapped)):
        x, y = gap + i % columns * right, gap + i // columns * down
        grid.paste(to_pil(picture).resize((cell, cell), Image.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + cell, y + cell), outline="lightgray")
        for k, text in enumerate(lines):
            draw.text((x, y + cell + 1 + k * line), text, fill="black", font=font)
    return grid


def make_strip(model, prompt, length=10, **how):
    """One PIL image of the first picture's way from noise to picture, drawn as `generate` does: x_t
    above and the estimate of x_0 that the network makes of it below, at `length` of the steps."""
    _, states = generate(model, [prompt], trajectory=True, **how)
    timesteps = make_timesteps(model.schedule.num_train_timesteps, len(states))
    chosen = np.linspace(0, len(states) - 1, min(len(states), length)).round().astype(int)
    pictures = torch.cat([states[k] for k in chosen], dim=1).flatten(0, 1)
    labels = [f"{what}, t = {timesteps[k][0]}" for what in ("x_t", "x_0") for k in chosen]
    return make_grid(pictures, labels, columns=len(chosen))


# Export


def export_pipeline(model, folder, sampler="ddim"):
    """Write a folder that diffusers.StableDiffusionPipeline.from_pretrained loads, in safetensors
    and float32, and that draws our pictures from our noise.

    These are those of `ddim` with eta 0, which is DPM-Solver++ of first order (Lu et al. 2022), or
    those of `dpm++`, its second. diffusers' own DDIM fits only where --steps divides T.
    Raises: ValueError where that pipeline cannot express the model.
    """
    # Importing these takes seconds, and nothing else needs them.
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    config, encoder, codec = model.config, model.text_encoder, model.codec
    kinds = dict(linear="linear", scaled_linear="scaled_linear", cosine="squaredcos_cap_v2")
    for wrong, reason in (
            (codec.is_pixel_space, "the model draws pixels; train with --vae"),
            (config.pooled_text, "it has no input for pooled text; train with --no-pooled-text"),
            (getattr(codec, "shift", 0), "it ignores the VAE's shift_factor; use another --vae"),
            (sampler not in ("ddim", "dpm++"), "it has no other --sampler than ddim and dpm++"),
            (not isinstance(model.unet, models.UNet2DConditionModel), "the network is of your own"),
            (config.beta_schedule not in kinds, f"it has no {config.beta_schedule} betas")):
        if wrong:
            raise ValueError(f"--export {folder}: not for StableDiffusionPipeline: {reason}")
    betas = BETA_SCHEDULES[config.beta_schedule](config.num_train_timesteps)
    scheduler = DPMSolverMultistepScheduler(
        config.num_train_timesteps, betas[0].item(), betas[-1].item(), kinds[config.beta_schedule],
        prediction_type=config.prediction_type, rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing="trailing", steps_offset=1, solver_order=1 + (sampler == "dpm++"))
    encoder.tokenizer.model_max_length = config.token_length   # to which the pipeline pads
    encoder.clip.config.use_attention_mask = False             # as in training
    parts = dict(vae=codec.vae, text_encoder=encoder.clip, tokenizer=encoder.tokenizer,
                 unet=model.unet, scheduler=scheduler, safety_checker=None, feature_extractor=None)
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)


# Command line

DEFAULTS = inspect.unwrap(generate).__kwdefaults__
SAMPLING_FLAGS = ("seed", "sampler", "steps", "guidance_rescale", "eta", "negative_prompt",
                  "batch_size")


def add_sampling_flags(parser):
    """The flags that say how pictures are drawn, with generate()'s defaults; evaluate.py's too."""
    parser.set_defaults(**{name: DEFAULTS[name] for name in SAMPLING_FLAGS})
    add = parser.add_argument_group("sampling").add_argument
    add("--sampler", choices=SAMPLERS, help="dpm++ is DPM-Solver++ 2M")
    add("--steps", type=int, help="network evaluations per picture")
    add("--guidance-rescale", type=float, help="phi of Lin et al. 2024, 0 (off) to 1")
    add("--eta", type=float, help="DDIM's eta, 0 (deterministic) to 1")
    add("--negative-prompt", help="guide away from this text instead of the empty caption")
    add("--seed", type=int, help="picture i is a function of the seed and i")
    add("--batch-size", type=int, help="pictures at a time on each process")
    add("--weights", choices=("ema", "raw"), default="ema", help="averaged, or as trained last")
    add("--vae", metavar="PLACE", help="where the VAE is, if not where it was in training")
    add("--text-encoder", metavar="PLACE", help="likewise; its weights must be those of training")
    add("--amp", choices=data.AMP, default="auto", help="autocast dtype")
    add("--device", choices=data.DEVICES, default="auto", help="auto: GPUs, if any")


def sampling_settings(args):
    """generate()'s keyword arguments from the flags, all but the guidance scale."""
    return {name: getattr(args, name) for name in SAMPLING_FLAGS}


def parse_args(argv=None):
    parser = data.Parser("Draw pictures for prompts with a trained model.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run folder (its newest checkpoint) or a file")
    add("--prompts", nargs="+", default=[], metavar="TEXT", help="one or more prompts")
    add("--prompt-file", help="a text file with one prompt per line")
    add("--images-per-prompt", type=int, default=1, metavar="N", help="pictures of each prompt")
    add("--guidance-scale", type=float, default=DEFAULTS["guidance_scale"], help="s; 1 is off")
    add("--guidance-scales", type=float, nargs="+", default=[], help="also a sheet of these")
    add("--steps-strip", action="store_true", help="also the first picture's way from noise")
    add("--output", type=Path, help="the pictures' folder (default: samples_TIME in the run's)")
    add("--export", type=Path, help="write the model as a pipeline of diffusers, into this folder")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    if args.prompt_file:
        lines = Path(args.prompt_file).read_text("utf-8-sig").splitlines()
        args.prompts += [line.strip() for line in lines if line.strip()]
    if not args.prompts and not args.export:
        raise ValueError("no prompts: give --prompts TEXT ... or --prompt-file FILE")
    check_sampling(args, images_per_prompt=1)
    return args


def draw_into(folder, model, prompts, batch_size, **how):
    """Draw picture i into its file, batch by batch; returns all paths. pictures.json says how they
    are made. What an interrupted call has left stays. Raises: ValueError for a folder with pictures
    of another call, or of other code."""
    paths, record = [folder / f"{i:05d}.png" for i in range(len(prompts))], folder / "pictures.json"
    text = json.dumps(dict(model.source, **how, prompts=prompts, code=data.hash_of_code()),
                      indent=1, default=str)
    is_same = not any(folder.glob("*.png")) or record.exists() and record.read_text() == text
    # The main rank's answer for all, and before any of them writes.
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    is_same, missing = gather((is_same, missing))[0]
    if not is_same:
        raise ValueError(f"--output {folder}: another call, or code that was changed since, made "
                         "these pictures; name a new folder")
    bar = tqdm(total=how["steps"] * len(missing) // dist.get_world_size(), unit="",
               desc=f"{len(missing)} pictures x {how['steps']} steps", disable=dist.get_rank() > 0)
    if dist.get_rank() == 0:
        models.write_atomically(record, lambda file: file.write(text.encode()))
    for numbers, pictures in draw_share(model, prompts, missing, batch_size, progress=bar.update,
                                        **how):
        for i, picture in zip(numbers, pictures):
            models.write_atomically(paths[i], partial(to_pil(picture).save, format="png"))
    bar.close()
    gather(None)   # until all are there
    return paths


def main(argv=None):
    args = parse_args(argv)
    device = setup_processes(args.device)
    is_main, dtype = dist.get_rank() == 0, amp_dtype(args.amp, device)
    model = load_model(args.checkpoint, device, args.weights, vae=args.vae,
                       text_encoder=args.text_encoder)
    if args.export and is_main:
        export_pipeline(model, args.export, args.sampler)
        print(f"for diffusers: StableDiffusionPipeline.from_pretrained({str(args.export)!r})")
    if not args.prompts:
        return
    make_timesteps(model.schedule.num_train_timesteps, args.steps)   # before a folder is
    prompts = [prompt for prompt in args.prompts for _ in range(args.images_per_prompt)]
    how = dict(sampling_settings(args), guidance_scale=args.guidance_scale, dtype=dtype)
    run = Path(model.source["checkpoint"]).parent
    output = gather(args.output or run / time.strftime("samples_%Y%m%d_%H%M%S"))[0]
    output.mkdir(parents=True, exist_ok=True)
    paths = draw_into(output, model, prompts, **how)
    columns = [generate_sharded(model, args.prompts, **how | dict(guidance_scale=scale))
               for scale in args.guidance_scales]
    if not is_main:
        return
    first = np.stack([np.atleast_3d(Image.open(path)) for path in paths[:100]])
    sheets = dict(grid=make_grid(torch.from_numpy(first).permute(0, 3, 1, 2), prompts[:100]))
    if columns:
        labels = [f"s = {s:g}: {prompt}" for prompt in args.prompts for s in args.guidance_scales]
        sheets["guidance"] = make_grid(torch.stack(columns, 1).flatten(0, 1), labels, len(columns))
    if args.steps_strip:
        sheets["steps"] = make_strip(model, prompts[0], **how)
    for name, sheet in sheets.items():
        sheet.save(output / f"{name}.png")
    print(f"{len(paths)} pictures in {output}; overviews: {', '.join(sheets)}")


if __name__ == "__main__":
    run_main(main)
