"""From a file to networks: noise schedule, configuration, frozen networks, UNet, checkpoints.

    model = load_model("runs/run_20250131_120000", device="cuda")   # a run folder or checkpoint

Symbols, as in Ho et al. 2020 (DDPM) and Salimans & Ho 2022 (v-prediction):
    x_0        clean latents, (B, C, h, w), about unit variance; in pixel space images in [-1, 1]
    x_t        noisy latents at timestep t, int64 in [0, T); our t = 0 is the paper's t = 1
    eps        the Gaussian noise in x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
    v          sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0
    text_emb   the text encoder's last_hidden_state, (B, L, D)
"""
import errno
import math
import os
import re
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from types import MethodType

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

for library in (diffusers_logging, transformers_logging):
    library.disable_progress_bar()   # bars of networks that load in a second hide the run's lines

# Betas of the forward process, (T,) float64


def linear(T):
    """Ho et al. 2020, section 4."""
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)


def scaled_linear(T):
    """Linear in sqrt(beta), as in Stable Diffusion (Rombach et al. 2022, code)."""
    return torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2


def cosine(T):
    """Nichol & Dhariwal 2021, Eq. 17, clipped at 0.999."""
    s = (torch.linspace(0, 1, T + 1, dtype=torch.float64) + 0.008) / 1.008
    f = torch.cos(s * torch.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


BETA_SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine}


def rescale_zero_terminal_snr(alphas_cumprod):
    """Shift and scale sqrt(alpha_bar) so that its last value is 0 and its first stays:
    Lin et al. 2024, Algorithm 1."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


class NoiseSchedule:
    """The forward process q(x_t | x_0) and what follows from it in closed form.

    `t` is an int64 tensor (B,), one timestep per sample (training), or one Python int for the whole
    batch (sampling). The int -1 stands for the clean end, where alpha_bar is 1.
    """

    def __init__(self, config, device="cpu"):
        betas = BETA_SCHEDULES[config.beta_schedule](config.num_train_timesteps)
        alphas_cumprod = (1 - betas).cumprod(0)
        if config.zero_terminal_snr:
            alphas_cumprod = rescale_zero_terminal_snr(alphas_cumprod)
        self.alphas_cumprod = alphas_cumprod.to(device)                 # (T,) float64
        self.snr = (alphas_cumprod / (1 - alphas_cumprod)).to(device)   # likewise
        # For an int t, on the CPU: the GPU need not be waited for. The 1 at the end is for t = -1.
        self.scalars = F.pad(alphas_cumprod, (0, 1), value=1.0)
        self.num_train_timesteps = config.num_train_timesteps
        self.prediction_type = config.prediction_type

    def alpha_bar(self, t):
        """alpha_bar_t in float64: (B, 1, 1, 1) for timesteps (B,), a scalar for an int."""
        if isinstance(t, int):
            return self.scalars[t]
        return self.alphas_cumprod[t][:, None, None, None]

    def scales(self, t, dtype):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t). Rounded to the dtype last: in float32
        1 - alpha_bar_t would lose its digits near t = 0."""
        alpha_bar_t = self.alpha_bar(t)
        return alpha_bar_t.sqrt().to(dtype), (1 - alpha_bar_t).sqrt().to(dtype)

    def add_noise(self, x_0, eps, t):
        """A sample of q(x_t | x_0): Ho et al. 2020, Eq. 4."""
        signal, noise = self.scales(t, x_0.dtype)
        return signal * x_0 + noise * eps

    def target(self, x_0, eps, t):
        """What the network is trained to output: eps, v (Salimans & Ho 2022, section 4) or x_0."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "sample":
            return x_0
        signal, noise = self.scales(t, x_0.dtype)
        return signal * eps - noise * x_0

    def predict_x0(self, output, x_t, t):
        """x_0 from the network's output: Ho et al. 2020, Eq. 15 (epsilon); Salimans & Ho 2022,
        appendix D (v)."""
        if self.prediction_type == "sample":
            return output
        signal, noise = self.scales(t, x_t.dtype)
        if self.prediction_type == "epsilon":
            return (x_t - noise * output) / signal
        return signal * x_t - noise * output

    def predict_eps(self, x_0, x_t, t):
        """The noise that explains x_t, given x_0: Ho et al. 2020, Eq. 4 solved for eps."""
        signal, noise = self.scales(t, x_t.dtype)
        return (x_t - signal * x_0) / noise

    def posterior(self, x_0, x_t, t, t_prev):
        """Mean and variance of q(x_{t_prev} | x_t, x_0), for any t_prev < t: Ho et al. 2020,
        Eqs. 6 and 7.

        With t_prev = t - 1 these are the paper's; a longer stride uses
        alpha_t = alpha_bar_t / alpha_bar_{t_prev} (Nichol & Dhariwal 2021, section 4).
        """
        alpha_bar_t, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        alpha_t = alpha_bar_t / alpha_bar_prev
        beta_t = 1 - alpha_t
        mean = (alpha_bar_prev.sqrt() * beta_t * x_0
                + alpha_t.sqrt() * (1 - alpha_bar_prev) * x_t) / (1 - alpha_bar_t)
        return mean, beta_t * (1 - alpha_bar_prev) / (1 - alpha_bar_t)

    def loss_weight(self, t, min_snr_gamma=None, snr_floor=None):
        """Weight of each sample's squared error in the network's own target, (B,) float32.

        With neither bound it is 1: the "simple" loss, Ho et al. 2020, Eq. 14. Otherwise the x_0
        error has the weight w = min(max(SNR, snr_floor), min_snr_gamma). The upper bound is
        min-SNR of Hang et al. 2023, the lower one truncated SNR of Salimans & Ho 2022. That is
        w / SNR for the error in eps, and w / (SNR + 1) for the error in v.
        """
        if min_snr_gamma is None and snr_floor is None:
            return torch.ones(t.shape, device=t.device)
        snr = self.snr[t]
        w = snr.clamp(min=snr_floor, max=min_snr_gamma)
        if self.prediction_type == "epsilon" and snr_floor is None:
            w = (min_snr_gamma / snr).clamp(max=1)   # w / SNR, which is 1 where the SNR is 0
        elif self.prediction_type == "epsilon":
            w = w / snr
        elif self.prediction_type == "v_prediction":
            w = w / (snr + 1)
        return w.float()


def apply_unet(unet, config, x_t, t, text_emb):
    """The network's output, (B, C, h, w): eps, v or x_0 by config.prediction_type.

    Pooled text enters diffusers' UNet as `class_labels`, which it adds to the timestep embedding.
    """
    pooled = text_emb.mean(dim=1) if config.pooled_text else None
    return unet(x_t, t, text_emb, class_labels=pooled, return_dict=False)[0]


@torch.no_grad()
def update_ema(averages, weights, step, decay):
    """ema <- ema + (1 - decay) (weights - ema), after optimizer update number `step`; both lists of
    tensors, in one fused pass. The decay warms up as min(decay, (1 + step) / (10 + step)), to
    forget the first weights."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(averages, weights, 1 - decay)


# Whoever reads for the method may stop here; the rest is the networks and how they are kept.


# Configuration

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def require(ok, flags, name, fix):
    """Raises: ValueError that names the flag, its value among `flags` and the fix, unless ok."""
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} {getattr(flags, name)}: {fix}")


def check_ranges(flags, **ranges):
    """Raises: ValueError that names the flag with a value, or one of several, below the minimum or
    outside (minimum, maximum). NaN is in no range; a flag that was not given passes."""
    for name, bounds in ranges.items():
        low, high = bounds if isinstance(bounds, tuple) else (bounds, math.inf)
        value = getattr(flags, name, None)
        values = value if isinstance(value, (list, tuple)) else [value]
        fix = f"must be at least {low}" if high == math.inf else f"must be from {low} to {high}"
        require(all(v is None or low <= v <= high for v in values), flags, name, fix)


def flag(default, text, **more):
    """A field of a configuration that is a command-line flag too, with this help."""
    return field(default=default, metadata=dict(help=text, **more))


def place(text):
    """A path is made absolute, since a run goes on from any folder. A name stays as it is."""
    if not text:
        raise ValueError(text)
    path = os.path.abspath(os.path.expanduser(text))
    return path if os.path.exists(path) and text not in ("shapes", "builtin", "none") else text


@dataclass(frozen=True)
class ModelConfig:
    """What the model is. It travels in every checkpoint, so sampling needs no model flags."""

    unet: dict = field(default_factory=dict)            # keyword arguments of UNet2DConditionModel
    resolution: int = flag(256, "side of the square images, in pixels")
    image_channels: int = flag(3, "3: RGB; 1: greyscale, with --vae none", choices=(1, 3))
    text_encoder: str = flag("openai/clip-vit-base-patch32", "hub id, folder, builtin", type=place)
    builtin_words: list = field(default_factory=list)   # vocabulary of --text-encoder builtin
    token_length: int = flag(77, "tokens per caption, padded or cut to this; 16 to 77")
    pooled_text: bool = flag(False, "add the mean token feature to the timestep embedding")
    vae: str = flag("stabilityai/sdxl-vae", "hub id, folder or, for pixel space, none", type=place)
    pixel_unshuffle: int = flag(1, "in pixel space, fold p x p pixels into the channels")
    num_train_timesteps: int = flag(1000, "T, the number of noise levels")
    beta_schedule: str = flag("scaled_linear", "how the noise grows", choices=BETA_SCHEDULES)
    zero_terminal_snr: bool = flag(False, "make x_T pure noise (Lin et al. 2024)")
    prediction_type: str = flag("epsilon", "what the network predicts", choices=PREDICTION_TYPES)
    caption_dropout: float = flag(0.1, "share of captions emptied, for guidance")

    def __post_init__(self):
        pixels, unshuffle = self.vae == "none", self.pixel_unshuffle
        require(self.beta_schedule in BETA_SCHEDULES, self, "beta_schedule", "not known here")
        require(self.prediction_type in PREDICTION_TYPES, self, "prediction_type", "not known here")
        check_ranges(self, token_length=(16, 77), caption_dropout=(0, 1), num_train_timesteps=2,
                     image_channels=(1, 3), pixel_unshuffle=1)
        for name, always in dict(image_channels=3, pixel_unshuffle=1).items():
            require(pixels or getattr(self, name) == always, self, name, "add --vae none")
        require(self.resolution > 0 and self.resolution % unshuffle == 0, self, "resolution",
                f"must be a positive multiple of --pixel-unshuffle {unshuffle}")
        # Epsilon-prediction learns nothing where x_T is the noise itself.
        require(not self.zero_terminal_snr or self.prediction_type != "epsilon", self,
                "zero_terminal_snr", "x_T is eps; add --prediction-type v_prediction or sample")


PRESETS = {
    # 0.8 M parameters for the built-in pictures: learns in minutes on two CPU cores, on a 16 x 16
    # grid of 2 x 2 pixels, with cross-attention in the middle block alone.
    "tiny": ModelConfig(
        unet=dict(block_out_channels=[32, 64], layers_per_block=1, norm_num_groups=8,
                  attention_head_dim=4, resnet_time_scale_shift="scale_shift",
                  down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2),
        resolution=32, text_encoder="builtin", token_length=16, pooled_text=True, vae="none",
        pixel_unshuffle=2, beta_schedule="cosine", prediction_type="sample"),
    # Attention heads of 64 channels; diffusers calls their number attention_head_dim.
    "standard": ModelConfig(
        unet=dict(block_out_channels=[128, 256], layers_per_block=2, attention_head_dim=[2, 4],
                  down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
                  up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])),
    # The shape of Stable Diffusion 1.5: 860 M parameters.
    "large": ModelConfig(
        unet=dict(block_out_channels=[320, 640, 1280, 1280], layers_per_block=2,
                  down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                  up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, attention_head_dim=8))}


# The networks


class TextEncoder(nn.Module):
    """Frozen CLIP text encoder with its tokenizer: captions to text_emb (B, L, D) float32."""

    def __init__(self, config):
        """Raises: FileNotFoundError where it is neither a folder nor to be had from the hub."""
        super().__init__()
        self.token_length, name = config.token_length, config.text_encoder
        if name == "builtin":
            self.tokenizer = builtin_tokenizer(config.builtin_words)
            self.clip = builtin_clip(len(self.tokenizer), config.token_length)
        else:
            self.clip = load_whole(CLIPTextModel, name, "text_encoder", "--text-encoder")
            self.tokenizer = load_pretrained(AutoTokenizer.from_pretrained, name, "tokenizer",
                                             "--text-encoder")
            longest = self.clip.config.max_position_embeddings
            require(config.token_length <= longest, config, "token_length", f"at most {longest}")
        self.width = self.clip.config.hidden_size
        self.rows, self.features = {}, torch.empty(0)   # see remember()
        self.float().requires_grad_(False).eval()       # whatever dtype the weights were stored in

    def remember(self, captions, most_bytes=None, batch_size=256):
        """Encode the different captions, and the empty one, once: from now on they are looked up.
        In half precision where they fit into `most_bytes` in no other: by default a fifth of a
        GPU's memory (for Flickr8k's 40,000) or a GiB. Does nothing where they do not fit at all."""
        if most_bytes is None:
            gpu = self.clip.device if self.clip.device.type == "cuda" else None
            most_bytes = torch.cuda.get_device_properties(gpu).total_memory // 5 if gpu else 2**30
        distinct = list(dict.fromkeys(["", *captions]))
        most = most_bytes // (2 * self.token_length * self.width)
        if len(distinct) > most:
            return
        dtype = torch.float16 if 2 * len(distinct) > most else torch.float32
        self.features = torch.cat([self(distinct[start:start + batch_size]).to(dtype)
                                   for start in range(0, len(distinct), batch_size)])  # (N, L, D)
        self.rows = {caption: row for row, caption in enumerate(distinct)}

    def count_cut(self, captions):
        """How many captions have more than L tokens, so that their ends are not seen."""
        most = self.token_length
        long = [text for text in captions if len(text) > most - 2] + [""]   # a token has a letter
        tokens = self.tokenizer(long, truncation=True, max_length=most + 1).input_ids
        return sum(len(of_caption) > most for of_caption in tokens)

    @torch.no_grad()
    def forward(self, captions):
        """Captions are cut to L tokens, with the end token kept, and padded as CLIP was trained."""
        if all(caption in self.rows for caption in captions):
            rows = torch.tensor([self.rows[caption] for caption in captions])
            return self.features[rows.to(self.features.device, non_blocking=True)].float()
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True,
                                max_length=self.token_length, return_tensors="pt").input_ids
        if self.clip.device.type == "cuda":   # else the copy would wait for the GPU's work
            tokens = tokens.pin_memory()
        with torch.autocast(self.clip.device.type, enabled=False):   # in training as in sampling
            return self.clip(tokens.to(self.clip.device, non_blocking=True)).last_hidden_state


class ImageCodec(nn.Module):
    """Between images (B, c, H, W) in [-1, 1] and x_0 (B, C, h, w): a frozen VAE, or the pixels.

    The VAE stays in float32: in float16 the SDXL VAE overflows to NaN. Its scaling factor (and
    shift) come from its own config, never from a constant here.
    """

    def __init__(self, config):
        """Raises: FileNotFoundError where the VAE is missing, ValueError where it does not fit."""
        super().__init__()
        self.is_pixel_space, self.patch = config.vae == "none", config.pixel_unshuffle
        channels, factor = config.image_channels * self.patch**2, self.patch
        if not self.is_pixel_space:
            self.vae = load_whole(AutoencoderKL, config.vae, "vae", "--vae",
                                  low_cpu_mem_usage=False)   # else diffusers asks for accelerate
            self.vae.float().requires_grad_(False).eval()
            vae = self.vae.config
            self.scale, self.shift = vae.scaling_factor, vae.get("shift_factor") or 0.0
            channels, factor = vae.latent_channels, 2 ** (len(vae.block_out_channels) - 1)
        require(config.resolution % factor == 0, config, "resolution",
                f"{config.vae} needs a multiple of {factor}")
        side = config.resolution // factor
        self.latent_shape = (channels, side, side)
        # Images that the VAE takes at a time, so that its memory stays flat.
        self.slice_size = max(1, 8 * 256**2 // config.resolution**2)

    @torch.no_grad()
    def moments(self, images):
        """Mean and standard deviation of the scaled posterior q(x_0 | image), both (B, C, h, w).
        The latter is 0 in pixel space."""
        if self.is_pixel_space:
            x_0 = F.pixel_unshuffle(images, self.patch)
            return x_0, torch.zeros_like(x_0)
        with torch.autocast(images.device.type, enabled=False):
            parts = [self.vae.encode(x).latent_dist for x in images.float().split(self.slice_size)]
        mean, std = (torch.cat(values) for values in zip(*((q.mean, q.std) for q in parts)))
        return (mean - self.shift) * self.scale, std * self.scale

    @torch.no_grad()
    def decode(self, x_0):
        """Images (B, c, H, W) in [-1, 1]."""
        if self.is_pixel_space:
            return F.pixel_shuffle(x_0, self.patch).clamp(-1, 1)
        with torch.autocast(x_0.device.type, enabled=False):
            slices = [self.vae.decode(x.float() / self.scale + self.shift).sample
                      for x in x_0.split(self.slice_size)]
        return torch.cat(slices).clamp(-1, 1)


def build_unet(config, latent_shape, text_width):
    """The trainable UNet, freshly initialised from torch's global seed. Its inputs' sizes follow
    from the frozen networks."""
    channels, side, _ = latent_shape
    pooled = dict(class_embed_type="projection", projection_class_embeddings_input_dim=text_width)
    halvings = len(config.unet["block_out_channels"]) - 1
    require(side % 2**halvings == 0, config, "resolution", f"the UNet halves its {side} x {side} "
            f"input {halvings} times; choose one that gives a multiple of {2**halvings}")
    return UNet2DConditionModel(**config.unet | (pooled if config.pooled_text else {}) | dict(
        in_channels=channels, out_channels=channels, cross_attention_dim=text_width,
        sample_size=side))


def keep_dtype_in_norms(unet):
    """Let each GroupNorm and LayerNorm return the dtype of its input. On a GPU autocast makes them
    float32, and what reads them too: a third of an update's memory traffic, for the same sums,
    which the kernels add up in float32 in either case."""
    def forward(norm, x):
        weight, bias = (p if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(norm, nn.GroupNorm):
                return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
            return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)

    for norm in unet.modules():
        if type(norm) in (nn.GroupNorm, nn.LayerNorm):   # a subclass has a forward of its own
            norm.forward = MethodType(forward, norm)     # as a method, which deepcopy binds anew
    return unet


class Model:
    """All that sampling needs: the networks on one device, and where they came from.

    The UNet is untrained at first, initialised from torch's global seed. Raises: ValueError where
    the frozen networks' weights are not those that `frozen` (the checkpoint) tells of.
    """

    def __init__(self, config, device="cpu", frozen=None):
        self.config, self.device = config, torch.device(device)
        self.schedule = NoiseSchedule(config, device)
        self.text_encoder = TextEncoder(config).to(device)
        self.codec = ImageCodec(config).to(device)
        unet = build_unet(config, self.codec.latent_shape, self.text_encoder.width)
        self.unet = keep_dtype_in_norms(unet).to(device)
        # The weights' bits added up as integers: the same on any device, and fast. The built-in
        # text encoder is drawn anew, and may differ in a last bit on another machine.
        networks = dict(text_encoder=self.text_encoder, vae=self.codec)
        self.frozen = {name: sum(p.view(torch.int32).sum().item() for p in network.parameters())
                       for name, network in networks.items()
                       if getattr(config, name) not in ("builtin", "none")}
        for name in {*self.frozen, *(frozen or {})} if frozen is not None else ():
            require(frozen.get(name) == self.frozen.get(name), config, name, "holds other weights "
                    "than the network of training; name the place of that one")
        self.source = {}   # checkpoint, epoch, step and weights, for the record
        self.run = {}      # the training run's flags and how many images it trained on


# Loading networks, and the built-in text encoder

def load_pretrained(load, name, subfolder, flag, **options):
    """load(name, **options) or, for a diffusers pipeline, that of its sub-folder.

    Raises: FileNotFoundError, ValueError with one line that names `flag` and the fix.
    """
    folder, errors = Path(name), []
    if folder.is_file():
        raise ValueError(f"{flag} {name}: give a hub id or a folder that holds a config.json")
    places = [{}] if folder.is_dir() else [{}, dict(subfolder=subfolder)]
    if (folder / subfolder).is_dir():
        places = [dict(subfolder=subfolder)]
    # What is in the cache is not asked of the hub, which may be out of reach.
    for is_local, place in product((True, False), places):
        try:
            return load(name, **place, **options, local_files_only=is_local)
        except Exception as error:   # the libraries raise a dozen kinds
            errors.append(error)
    # What is not there is an OSError; anything else says that it is there, but damaged.
    damage = [error for error in errors if folder.is_dir() or not isinstance(error, OSError)]
    if half := next(folder.rglob("*.fp16.*"), None):
        damage = [f"holds {half.name}; files without fp16 in their names are needed"]
    if damage:
        raise ValueError(f"{flag} {name}: {' '.join(str(damage[0]).split())[:300]}")
    raise FileNotFoundError(
        f"{flag} {name}: no such folder, and not in the Hugging Face cache (HF_HOME="
        f"{os.environ.get('HF_HOME')}); name its folder, or run online: hf download {name}; "
        "--preset tiny needs no download") from errors[0]


def load_whole(kind, name, subfolder, flag, **options):
    """A network of this class. Raises: ValueError where weights are missing, which the libraries
    would leave random."""
    model, info = load_pretrained(kind.from_pretrained, name, subfolder, flag,
                                  output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{flag} {name}: is no whole {kind.__name__}: {missing[0]} is missing")
    return model


def with_words(config, captions, most=5000):
    """The config with the vocabulary of --text-encoder builtin: the words that it has already or
    all of the captions, as its tokenizer takes them apart. Raises: ValueError where it has some,
    but not all, or where they are too many for random features."""
    if config.text_encoder != "builtin":
        return config
    split, known = pre_tokenizers.Whitespace().pre_tokenize_str, config.builtin_words
    words = sorted({word for caption in captions for word, _ in split(caption.lower())})
    if known and (unknown := sorted(set(words) - set(known))):
        raise ValueError(f"--init-from: its text encoder lacks {len(unknown)} words of these "
                         f"captions, such as {', '.join(unknown[:9])}; start from a run with them")
    require(len(words) <= most, config, "text_encoder", f"the captions have {len(words):,} "
            f"different words, over {most:,}; name a CLIP text model")
    return replace(config, builtin_words=known or words)


def builtin_tokenizer(words):
    """A word-level tokenizer with the given vocabulary: no download, no file."""
    start, end, unknown = specials = ["<|startoftext|>", "<|endoftext|>", "<|unknown|>"]
    vocabulary = {word: i for i, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end,
                                   pad_token=end, unk_token=unknown, model_max_length=77)


def builtin_clip(vocab_size, token_length):
    """A small CLIP text model with random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPTextModel(CLIPTextConfig(
            vocab_size=vocab_size, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1))
        # With CLIP's own initialisation all captions are nearly alike. Unit embeddings let the
        # words speak, and a gain of L lets one of L words move the pooled text by about 1.
        nn.init.normal_(clip.get_input_embeddings().weight)
        norm, = [m for name, m in clip.named_modules() if name.endswith("final_layer_norm")]
        nn.init.constant_(norm.weight, token_length)
    return clip


# Checkpoints


def write_atomically(path, write, check=lambda temporary: None):
    """Let write(file) fill the file `path`, so that it is either as it was or complete.

    The bytes go to a temporary file beside it and reach the disk before the rename, and the rename
    before we return. `check` is given the temporary file's path before the rename.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        check(temporary)
        os.replace(temporary, path)
    except OSError as error:   # numpy's names neither the file nor the reason
        reason = error.strerror or f"disk full? {error}"
        raise OSError(error.errno or errno.ENOSPC, reason, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def verify_checkpoint(path):
    """Compare every byte with the checksums that torch.save wrote. Raises: ValueError.

    torch.save stores members as they are; packed ones could unfold to any size.
    """
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("not written by torch.save")
        if damaged := archive.testzip():
            raise ValueError(f"the bytes of {damaged!r} have changed since they were written")


def save_checkpoint(payload, path):
    """Write a dict of tensors and plain Python values, verified; `path` is as it was or complete.

    On a full disk the older checkpoints make room, but for the newest good one. Raises: OSError
    where it cannot be written or reads back differently.
    """
    for is_last in (False, True):
        try:
            return write_atomically(path, lambda file: torch.save(payload, file), verify_checkpoint)
        except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            # A full disk may reach us as torch.save's RuntimeError, with the OSError behind it.
            causes = (error, error.__context__, OSError(errno.EIO, str(error), str(path)))
            fault = next(cause for cause in causes if isinstance(cause, OSError))
        if is_last or fault.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise fault
        with suppress(OSError, ValueError):   # there is none, or none that is good
            prune_checkpoints(load_checkpoint(path.parent)[1], 1)


def find_checkpoints(folder):
    """Checkpoint files of a run folder, newest first by the (epoch, step) in their names."""
    return sorted(Path(folder).glob("checkpoint_*.pt"), reverse=True,
                  key=lambda path: [int(number) for number in re.findall(r"\d+", path.stem)])


def prune_checkpoints(newest, keep_last):
    """Keep `newest` and the keep_last - 1 before it; delete older ones. Newer ones, and files of
    other names, stay."""
    found = [path for path in find_checkpoints(newest.parent)
             if re.fullmatch(r"checkpoint_epoch\d+_step\d+", path.stem)]
    for path in found[found.index(newest) + keep_last:]:
        path.unlink()


def load_checkpoint(path):
    """(payload, its path) of a checkpoint file, or of the newest in a run folder that verifies.

    Tensors are on the CPU, mapped from the file. Nothing in it is executed (weights_only).
    Raises: FileNotFoundError, ValueError with one line that says what is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path}: no such file or run folder")
    candidates = find_checkpoints(path) if path.is_dir() else [path]
    if not candidates:
        raise FileNotFoundError(f"checkpoint {path}: the folder holds no checkpoint_*.pt file")
    for candidate in candidates:
        try:
            verify_checkpoint(candidate)
            payload = torch.load(candidate, map_location="cpu", weights_only=True, mmap=True)
            ModelConfig(**payload["config"])   # knows all that it says
            return payload, candidate
        except Exception as error:  # torch.load raises a dozen kinds on damaged bytes
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            reason = f"checkpoint {candidate}: cannot be read ({reason})"
        if candidate != candidates[-1]:
            warnings.warn(f"{reason}; trying the one before it", stacklevel=2)
    raise ValueError(reason)


def load_weights(unet, values):
    """Copy a checkpoint's weights, {name: tensor}, into the UNet in place."""
    try:
        unet.load_state_dict(values)
    except RuntimeError:
        raise ValueError("checkpoint: its weights are not those of its config's UNet") from None


def load_model(checkpoint, device="cpu", weights="ema", **places):
    """The Model in a checkpoint file or run folder, ready to sample. weights: "ema" or "raw";
    places: vae and text_encoder, where they have moved; Model compares their weights."""
    payload, path = load_checkpoint(checkpoint)
    moved = {name: place for name, place in places.items() if place}
    model = Model(ModelConfig(**payload["config"] | moved), device, payload.get("frozen"))
    load_weights(model.unet, payload["ema" if weights == "ema" else "unet"])
    model.unet.requires_grad_(False).eval()
    model.source = dict(checkpoint=str(path), epoch=payload["epoch"], step=payload["step"],
                        weights=weights)
    model.run = dict(payload.get("args", {}), train_images=payload.get("train_images"))
    return model
