"""Everything needed to turn a file into a text-to-image model: configuration, networks, noise schedule, EMA, checkpoints.

    model = load_model("runs/run_20250131_120000", device="cuda")       # a run folder or a checkpoint file

Symbols, as in Ho et al. 2020 (DDPM) and Salimans & Ho 2022 (v-prediction):
    x_0        clean latents, (B, C, h, w), about unit variance; in pixel space the image itself, in [-1, 1]
    x_t        noisy latents at timestep t, int64 in [0, T); our t = 0 is the paper's t = 1
    eps        the Gaussian noise in x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
    v          sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0
    text_emb   the text encoder's last_hidden_state, (B, L, D)
"""
import os
import re
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

# Configuration


BETA_SCHEDULES = ("linear", "scaled_linear", "cosine")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def model_flag(default, text, **more):
    """A field of ModelConfig that is a flag of train.py too, with this help."""
    return field(default=default, metadata=dict(help=text, **more))


@dataclass(frozen=True)
class ModelConfig:
    """What the model is. It travels inside every checkpoint, so sampling and evaluation need no model flags."""

    unet: dict = field(default_factory=dict)            # keyword arguments of UNet2DConditionModel
    resolution: int = model_flag(256, "side of the square images, in pixels")
    image_channels: int = model_flag(3, "3 for RGB; 1 for greyscale, with --vae none", choices=(1, 3))
    text_encoder: str = model_flag("openai/clip-vit-base-patch32", "CLIP text model: hub id or local folder")   # or "builtin"
    builtin_words: list = field(default_factory=list)   # vocabulary of the built-in text encoder
    token_length: int = model_flag(77, "tokens per caption, which is padded or cut to this; 16 to 77")
    pooled_text: bool = model_flag(False, "add the mean token feature to the timestep embedding")
    vae: str = model_flag("stabilityai/sdxl-vae", 'AutoencoderKL or AutoencoderTiny: hub id or folder; "none" for pixel space')
    pixel_unshuffle: int = model_flag(1, "in pixel space, fold p x p pixels into the channels")
    num_train_timesteps: int = model_flag(1000, "T")
    beta_schedule: str = model_flag("scaled_linear", "of the forward process", choices=BETA_SCHEDULES)
    zero_terminal_snr: bool = model_flag(False, "rescale the betas so that x_T is pure noise (Lin et al. 2024)")
    prediction_type: str = model_flag("epsilon", "what the network learns to output", choices=PREDICTION_TYPES)
    caption_dropout: float = model_flag(0.1, "share of captions emptied, for classifier-free guidance")

    def __post_init__(self):
        def check(ok, name, fix):
            if not ok:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: {fix}")

        check(self.beta_schedule in BETA_SCHEDULES, "beta_schedule", f"choose from {', '.join(BETA_SCHEDULES)}")
        check(self.prediction_type in PREDICTION_TYPES, "prediction_type", f"choose from {', '.join(PREDICTION_TYPES)}")
        check(16 <= self.token_length <= 77, "token_length", "must be from 16 to 77")
        check(0 <= self.caption_dropout <= 1, "caption_dropout", "must be from 0 to 1")
        check(self.num_train_timesteps > 1, "num_train_timesteps", "must be at least 2")
        check(self.image_channels in (1, 3), "image_channels", "must be 1 (greyscale) or 3 (RGB)")
        check(self.image_channels == 3 or self.vae == "none", "image_channels", "greyscale is for pixel space: add --vae none")
        check(self.pixel_unshuffle == 1 or self.pixel_unshuffle > 1 and self.vae == "none", "pixel_unshuffle",
              "must be 1, or more in pixel space: add --vae none")
        check(self.resolution > 0 and self.resolution % self.pixel_unshuffle == 0, "resolution",
              f"must be a positive multiple of --pixel-unshuffle {self.pixel_unshuffle}")
        check(self.prediction_type != "epsilon" or not self.zero_terminal_snr, "zero_terminal_snr", "x_t becomes the noise "
              "itself and epsilon-prediction learns nothing; add --prediction-type v_prediction or sample")

    @classmethod
    def from_dict(cls, values):
        """The config stored in a checkpoint; unknown keys are an error, not ignored."""
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise ValueError(f"unknown config entries {sorted(unknown)}: written by a newer version of this code")
        return cls(**values)

    def to_dict(self):
        return asdict(self)


PRESETS = {
    # 3 M parameters for the built-in pictures: learns in minutes on two CPU cores, on an 8 x 8 grid of 4 x 4 pixels.
    "tiny": ModelConfig(
        unet=dict(block_out_channels=[64, 128], layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
                  down_block_types=["DownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "UpBlock2D"],
                  resnet_time_scale_shift="scale_shift"),   # cross-attention in the middle block alone
        resolution=32, text_encoder="builtin", token_length=16, pooled_text=True, vae="none",
        pixel_unshuffle=4, beta_schedule="linear", prediction_type="sample"),
    "standard": ModelConfig(
        unet=dict(block_out_channels=[128, 256], layers_per_block=2, attention_head_dim=[2, 4],   # heads of 64 channels
                  down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
                  up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])),
    # The shape of Stable Diffusion 1.5: 860 M parameters.
    "large": ModelConfig(
        unet=dict(block_out_channels=[320, 640, 1280, 1280], layers_per_block=2, attention_head_dim=8,
                  down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                  up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)),
}


# Noise schedule


def make_betas(beta_schedule, num_train_timesteps):
    """Betas of the forward process, (T,) float64.

    linear: Ho et al. 2020, section 4. scaled_linear: linear in sqrt(beta), as in Stable Diffusion (Rombach et al. 2022, code).
    cosine: Nichol & Dhariwal 2021, Eq. 17, with betas clipped at 0.999.
    """
    T = num_train_timesteps
    if beta_schedule == "linear":
        return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    if beta_schedule == "scaled_linear":
        return torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2
    f = torch.cos((torch.linspace(0, 1, T + 1, dtype=torch.float64) + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def rescale_zero_terminal_snr(alphas_cumprod):
    """Shift and scale sqrt(alpha_bar) so that its last value is 0 and its first is kept: Lin et al. 2024, Algorithm 1."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


class NoiseSchedule:
    """The forward process q(x_t | x_0) and what follows from it in closed form.

    `t` is either an int64 tensor (B,) on the device of the data, one timestep per sample (training), or one Python
    int for the whole batch (sampling); t = -1 then stands for the clean end, where alpha_bar is 1.
    """

    def __init__(self, config, device="cpu"):
        alphas_cumprod = (1 - make_betas(config.beta_schedule, config.num_train_timesteps)).cumprod(0)
        if config.zero_terminal_snr:
            alphas_cumprod = rescale_zero_terminal_snr(alphas_cumprod)
        self.alphas_cumprod = alphas_cumprod.to(device)                              # (T,) float64
        self._on_cpu = alphas_cumprod
        self.num_train_timesteps = config.num_train_timesteps
        self.prediction_type = config.prediction_type

    def alpha_bar(self, t, like):
        """alpha_bar_t as float64, shaped to multiply `like` (B, ...). For an int t, a scalar tensor on the CPU, which
        any device takes without synchronising and which leaves the dtype of `like` alone."""
        if isinstance(t, int):
            return self._on_cpu[t] if t >= 0 else torch.ones((), dtype=torch.float64)
        return self.alphas_cumprod[t].view(-1, *[1] * (like.ndim - 1))

    def scales(self, t, like):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) in the dtype of `like`; rounded last, as 1 - alpha_bar_t cancels."""
        alpha_bar_t = self.alpha_bar(t, like)
        return alpha_bar_t.sqrt().to(like.dtype), (1 - alpha_bar_t).sqrt().to(like.dtype)

    def add_noise(self, x_0, eps, t):
        """A sample of q(x_t | x_0): Ho et al. 2020, Eq. 4."""
        signal, noise = self.scales(t, x_0)
        return signal * x_0 + noise * eps

    def target(self, x_0, eps, t):
        """What the network is trained to output: eps, v (Salimans & Ho 2022, section 4) or x_0."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "sample":
            return x_0
        signal, noise = self.scales(t, x_0)
        return signal * eps - noise * x_0

    def predict_x0(self, output, x_t, t):
        """x_0 from the network's output: Ho et al. 2020, Eq. 15 (epsilon); Salimans & Ho 2022, appendix D (v)."""
        if self.prediction_type == "sample":
            return output
        signal, noise = self.scales(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - noise * output) / signal
        return signal * x_t - noise * output

    def predict_eps(self, x_0, x_t, t):
        """The noise that explains x_t, given x_0: Ho et al. 2020, Eq. 4 solved for eps."""
        signal, noise = self.scales(t, x_t)
        return (x_t - signal * x_0) / noise

    def posterior(self, x_0, x_t, t, t_prev):
        """Mean and variance of q(x_{t_prev} | x_t, x_0): Ho et al. 2020, Eqs. 6 and 7, for any t_prev < t.

        With t_prev = t - 1 these are the paper's; a longer stride uses alpha_t = alpha_bar_t / alpha_bar_{t_prev}
        (Nichol & Dhariwal 2021, section 4).
        """
        alpha_bar_t, alpha_bar_prev = self.alpha_bar(t, x_t), self.alpha_bar(t_prev, x_t)
        alpha_t = alpha_bar_t / alpha_bar_prev
        beta_t = 1 - alpha_t
        mean = (alpha_bar_prev.sqrt() * beta_t * x_0 + alpha_t.sqrt() * (1 - alpha_bar_prev) * x_t) / (1 - alpha_bar_t)
        return mean, beta_t * (1 - alpha_bar_prev) / (1 - alpha_bar_t)

    def snr(self, t):
        """Signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), (B,) float64."""
        return self.alphas_cumprod[t] / (1 - self.alphas_cumprod[t])

    def loss_weight(self, t, min_snr_gamma=None, snr_floor=None):
        """Weight of each sample's squared error in the network's own target, (B,) float32.

        A weight w on the x_0 error is w / SNR on the eps error and w / (SNR + 1) on the v error. With neither bound
        the weight is 1 (the "simple" loss, Ho et al. 2020, Eq. 14); otherwise w = SNR clamped to
        [snr_floor, min_snr_gamma]: min-SNR of Hang et al. 2023 above, truncated SNR of Salimans & Ho 2022 below.
        """
        if min_snr_gamma is None and snr_floor is None:
            return torch.ones(t.shape, device=t.device)
        snr = self.snr(t)
        w = snr.clamp(min=snr_floor, max=min_snr_gamma)
        if self.prediction_type == "epsilon":
            # Written as a clamp of w / SNR, which stays finite where the SNR is 0 and there is no floor.
            w = w / snr if snr_floor is not None else (min_snr_gamma / snr).clamp(max=1)
        elif self.prediction_type == "v_prediction":
            w = w / (snr + 1)
        return w.float()


# Frozen networks

WHOLE = dict(low_cpu_mem_usage=False)   # the other way needs accelerate, and says so


def load_pretrained(load, name, subfolder, flag, **options):
    """load(name, **options) or, for a diffusers pipeline, that of its sub-folder; a one-line error where neither is there."""
    if not name:
        raise ValueError(f"{flag}: give a hub id or a folder")
    folder, places, errors = Path(name), [{}, dict(subfolder=subfolder)], []
    if folder.is_dir():
        places = places[1:] if (folder / subfolder).is_dir() else places[:1]
    for place in places:
        try:
            return load(name, **place, **options)
        except (OSError, ValueError) as error:
            errors.append(error)
    if folder.is_dir():
        raise ValueError(f"{flag} {name}: {' '.join(str(errors[0]).split())[:300]}") from errors[0]
    raise FileNotFoundError(
        f"{flag} {name}: no such folder, and not to be had from the Hugging Face hub or its cache "
        f"(HF_HOME={os.environ.get('HF_HOME', '~/.cache/huggingface')}, HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '0')}); "
        f"where there is internet, run: hf download {name} (on a cluster: bash slurm/fetch.sh with this run's flags); if it was "
        "a folder when the model was trained, put that, or a link to it, there again"
    ) from errors[0]


def load_whole(kind, name, subfolder, flag):
    """A transformers model of this class, none of whose weights are missing and so random."""
    model, info = load_pretrained(kind.from_pretrained, name, subfolder, flag, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{flag} {name}: lacks {len(missing)} weights ({missing[0]}, ...); give a whole {kind.__name__}")
    return model


def builtin_tokenizer(words):
    """A word-level tokenizer with the given vocabulary, as a transformers tokenizer: no download, no file."""
    specials = ["<|startoftext|>", "<|endoftext|>", "<|unknown|>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*specials, *words])}, unk_token=specials[2]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{specials[0]} $A {specials[1]}", special_tokens=[(specials[0], 0), (specials[1], 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1],
                                   pad_token=specials[1], unk_token=specials[2], model_max_length=77)


class TextEncoder(nn.Module):
    """Frozen CLIP text encoder and its tokenizer: captions to tokens (B, L) int64 to text_emb (B, L, D) float32."""

    def __init__(self, config):
        """Raises: FileNotFoundError where the encoder is neither a folder nor to be had from the hub."""
        super().__init__()
        self.token_length = config.token_length
        if config.text_encoder == "builtin":
            self.tokenizer = builtin_tokenizer(config.builtin_words)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.clip = CLIPTextModel(CLIPTextConfig(
                    vocab_size=len(self.tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                    num_attention_heads=4, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1))
                # With CLIP's own initialisation all captions are nearly alike. Unit embeddings let the words speak, and
                # a gain of L lets one of L words move the mean feature, the pooled text, by about 1.
                nn.init.normal_(self.clip.get_input_embeddings().weight)
                norm, = [module for name, module in self.clip.named_modules() if name.endswith("final_layer_norm")]
                nn.init.constant_(norm.weight, config.token_length)
        else:
            self.clip = load_whole(CLIPTextModel, config.text_encoder, "text_encoder", "--text-encoder")
            self.tokenizer = load_pretrained(AutoTokenizer.from_pretrained, config.text_encoder, "tokenizer", "--text-encoder")
            longest = self.clip.config.max_position_embeddings
            if config.token_length > longest:
                raise ValueError(f"--token-length {config.token_length}: {config.text_encoder} takes at most {longest}")
        self.width = self.clip.config.hidden_size
        self.numbers, self.remembered = {}, torch.empty(0)   # see remember()
        self.float().requires_grad_(False).eval()   # whatever dtype the weights were stored in

    def remember(self, captions, batch_size=256):
        """Encode these captions once and for all, in float32: from now on they are looked up."""
        captions = list(dict.fromkeys(captions))
        batches = [captions[i:i + batch_size] for i in range(0, len(captions), batch_size)]
        self.remembered = torch.cat([self(self.tokenize(batch).to(self.clip.device)) for batch in batches])   # (N, L, D)
        self.numbers = {caption: i for i, caption in enumerate(captions)}

    def tokenize(self, captions):
        """Tokens (B, L) int64, cut to L with the end token kept, padded as the encoder was trained; where all captions are
        remembered, their row numbers (B,) instead."""
        if all(caption in self.numbers for caption in captions):
            return torch.tensor([self.numbers[caption] for caption in captions])
        return self.tokenizer(list(captions), padding="max_length", max_length=self.token_length, truncation=True,
                              return_tensors="pt").input_ids

    @torch.no_grad()
    def forward(self, tokens):
        return self.remembered[tokens] if tokens.ndim == 1 else self.clip(tokens).last_hidden_state


class ImageCodec(nn.Module):
    """Between images (B, c, H, W) in [-1, 1] and x_0 (B, C, h, w): a frozen VAE, or the pixels themselves.

    The VAE stays in float32: in float16 the SDXL VAE overflows to NaN. Its scaling factor (and shift) come from its
    own config, never from a constant here.
    """

    def __init__(self, config):
        """Raises: FileNotFoundError where the VAE is missing, ValueError where it does not fit the images."""
        super().__init__()
        self.is_pixel_space, self.patch = config.vae == "none", config.pixel_unshuffle
        if self.is_pixel_space:
            side = config.resolution // self.patch
            self.latent_shape = (config.image_channels * self.patch**2, side, side)
            return
        found = load_pretrained(AutoencoderKL.load_config, config.vae, "vae", "--vae")
        kinds = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}
        if found.get("_class_name") not in kinds:
            raise ValueError(f"--vae {config.vae}: is a {found.get('_class_name')}, not one of {', '.join(kinds)}")
        self.vae = load_pretrained(kinds[found["_class_name"]].from_pretrained, config.vae, "vae", "--vae", **WHOLE)
        self.vae.float().requires_grad_(False).eval()
        self.scale, self.shift = self.vae.config.scaling_factor, self.vae.config.get("shift_factor") or 0.0
        blocks = self.vae.config.get("block_out_channels") or self.vae.config.encoder_block_out_channels
        factor = 2 ** (len(blocks) - 1)
        if config.resolution % factor:
            raise ValueError(f"--resolution {config.resolution}: {config.vae} needs a multiple of {factor}")
        self.latent_shape = (self.vae.config.latent_channels, config.resolution // factor, config.resolution // factor)

    @torch.no_grad()
    def moments(self, images):
        """Mean and standard deviation of the scaled posterior q(x_0 | image), both (B, C, h, w); std is 0 where the
        codec is deterministic (pixels, AutoencoderTiny)."""
        if self.is_pixel_space:
            x_0 = F.pixel_unshuffle(images, self.patch)
            return x_0, torch.zeros_like(x_0)
        with torch.autocast(images.device.type, enabled=False):
            encoded = self.vae.encode(images.float())
            if isinstance(self.vae, AutoencoderTiny):
                return (encoded.latents - self.shift) * self.scale, torch.zeros_like(encoded.latents)
            posterior = encoded.latent_dist
            return (posterior.mean - self.shift) * self.scale, posterior.std * self.scale

    def encode(self, images, posterior_eps=None):
        """x_0 (B, C, h, w): a draw from the posterior with the given unit Gaussian, or its mean without."""
        mean, std = self.moments(images)
        return mean if posterior_eps is None else mean + std * posterior_eps

    @torch.no_grad()
    def decode(self, x_0, slice_size=8):
        """Images (B, c, H, W) in [-1, 1]; decoded `slice_size` at a time, so that memory stays flat in B."""
        if self.is_pixel_space:
            return F.pixel_shuffle(x_0, self.patch).clamp(-1, 1)
        with torch.autocast(x_0.device.type, enabled=False):
            slices = [self.vae.decode(part.float() / self.scale + self.shift).sample for part in x_0.split(slice_size)]
        return torch.cat(slices).clamp(-1, 1)


# The denoiser


def build_unet(config, latent_shape, text_width):
    """The trainable UNet, freshly initialised from torch's global seed; its sizes follow from the frozen networks."""
    channels, side, _ = latent_shape
    sizes = dict(in_channels=channels, out_channels=channels, cross_attention_dim=text_width,
                 class_embed_type="projection" if config.pooled_text else None, addition_embed_type=None)
    for name, value in sizes.items():   # a preset leaves them open, --init-unet does not
        if config.unet.get(name, value) != value:
            raise ValueError(f"--init-unet: that UNet has {name} {config.unet[name]}, but the VAE, the text encoder and "
                             f"--pooled-text call for {value}; choose those that it was trained with")
    halvings = len(config.unet["block_out_channels"]) - 1
    if side % 2**halvings:
        raise ValueError(f"--resolution {config.resolution}: the UNet halves its {side} x {side} input {halvings} times; "
                         f"choose a resolution that gives a multiple of {2**halvings}")
    if config.pooled_text:
        sizes["projection_class_embeddings_input_dim"] = text_width
    return UNet2DConditionModel(**{**config.unet, **sizes, "sample_size": side})


def read_unet_config(name):
    """The architecture of a UNet of diffusers (hub id, its folder or a pipeline's), in the form of ModelConfig.unet."""
    found = load_pretrained(UNet2DConditionModel.load_config, name, "unet", "--init-unet")
    if found.get("_class_name") != "UNet2DConditionModel":
        raise ValueError(f"--init-unet {name}: is a {found.get('_class_name')}, not a UNet2DConditionModel")
    return {key: value for key, value in found.items() if not key.startswith("_")}


def load_unet_weights(unet, name):
    """Copy the weights of that UNet into ours."""
    pretrained = load_pretrained(UNet2DConditionModel.from_pretrained, name, "unet", "--init-unet", **WHOLE)
    load_parameters(unet, dict(pretrained.named_parameters()))


def apply_unet(unet, config, x_t, t, text_emb):
    """The network's output, (B, C, h, w): eps, v or x_0 by config.prediction_type. `unet` may be wrapped in DDP."""
    pooled = text_emb.mean(dim=1) if config.pooled_text else None
    return unet(x_t, t, text_emb, class_labels=pooled, return_dict=False)[0]


def speed_up(unet, device, compiled=False):
    """On GPUs the layout of the tensor cores' convolutions; where asked, torch.compile by the module's own compile(), which
    leaves the names of its weights alone."""
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    if compiled:
        unet.compile()


class EMA:
    """Exponential moving average of a module's parameters, kept in float32 and updated in one fused pass.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that early averages forget the initialisation.
    """

    def __init__(self, module, decay):
        """`module` holds float32 parameters on their final device."""
        self.decay = decay
        self.source = [p.detach() for p in module.parameters()]     # sees every update: it shares their memory
        self.parameters = {name: p.detach().clone() for name, p in module.named_parameters()}

    def update(self, step):
        """ema <- ema + (1 - decay) (parameters - ema), after optimizer update number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.parameters.values()), self.source, 1 - decay)

    @contextmanager
    def applied_to(self, module):
        """Within the block the module holds the averaged weights; afterwards its own again, bit for bit."""
        own = {name: p.detach().clone() for name, p in module.named_parameters()}
        load_parameters(module, self.parameters)
        try:
            yield
        finally:
            load_parameters(module, own)


@torch.no_grad()
def load_parameters(module, values):
    """Copy {name: tensor} into the module's parameters in place. Raises: ValueError where names or shapes differ."""
    own = dict(module.named_parameters())
    if own.keys() != values.keys() or any(own[name].shape != values[name].shape for name in own):
        raise ValueError("the checkpoint's weights are not those of its config's UNet: the file is damaged")
    torch._foreach_copy_(list(own.values()), [values[name].to(own[name].device) for name in own])


# Checkpoints


def write_atomically(path, write, check=lambda temporary: None):
    """Let write(file) fill the file `path`, so that it is either as it was or complete.

    The bytes go to a temporary file beside it and reach the disk before the rename, and the rename before we return.
    `check` is given the temporary file's path before the rename. Where anything fails the temporary file is removed.
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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def verify_checkpoint(path):
    """Compare every byte with the checksums that torch.save wrote. Raises: ValueError that says where they differ.

    Its members are stored as they are; packed ones come from elsewhere and could unfold to any size.
    """
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("not written by torch.save")
        if damaged := archive.testzip():
            raise ValueError(f"the bytes of {damaged!r} have changed since they were written")


def save_checkpoint(payload, path):
    """Write a dict of tensors and plain Python values; `path` is either as it was or complete and verified.

    Raises: OSError where it cannot be written or reads back differently.
    """
    try:
        write_atomically(path, lambda file: torch.save(payload, file), check=verify_checkpoint)
    except (RuntimeError, ValueError, zipfile.BadZipFile) as error:   # the first is torch.save's word for a full disk
        raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from None


def prune_checkpoints(newest, keep_last, keep_every):
    """Delete checkpoints older than `newest`, but for `keep_last` with it and, of every keep_every-th epoch (0: none), the
    first."""
    found = [path for path in find_checkpoints(newest.parent) if re.fullmatch(r"checkpoint_epoch\d+_step\d+", path.stem)]
    ends = {int(re.search(r"\d+", path.stem)[0]): path for path in found}   # epoch: its oldest checkpoint
    kept = {path for epoch, path in ends.items() if keep_every and epoch and epoch % keep_every == 0}
    for path in set(found[found.index(newest) + keep_last:]) - kept:
        path.unlink()


def find_checkpoints(folder):
    """Checkpoint files of a run folder, newest first by the numbers (epoch, step) in their names."""
    return sorted(Path(folder).glob("checkpoint_*.pt"), reverse=True,
                  key=lambda path: [int(number) for number in re.findall(r"\d+", path.stem)])


def load_checkpoint(path):
    """The payload of a checkpoint file, or of the newest one in a run folder that opens and verifies, on the CPU.

    Returns (payload, path of the file). Nothing in the file is executed (weights_only).
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
            payload = torch.load(candidate, map_location="cpu", weights_only=True, mmap=True)   # once a node, not once a rank
            if not isinstance(payload, dict) or not {"unet", "ema", "config", "step", "epoch"} <= payload.keys():
                raise ValueError("not a checkpoint of this project")
            ModelConfig.from_dict(payload["config"])
            return payload, candidate
        except Exception as error:  # torch.load raises a dozen kinds on damaged bytes
            problem = f"checkpoint {candidate}: cannot be read ({f'{type(error).__name__}: {error}'.splitlines()[0][:200]})"
            if path.is_dir():
                warnings.warn(f"{problem}; trying the one before it", stacklevel=2)
    raise ValueError(problem if not path.is_dir() else f"checkpoint {path}: none of the {len(candidates)} files can be read")


class Model:
    """All that sampling needs: the networks on one device, and where they came from. The UNet is untrained at first,
    initialised from torch's global seed."""

    def __init__(self, config, device="cpu"):
        self.config, self.device, self.schedule = config, torch.device(device), NoiseSchedule(config, device)
        self.text_encoder, self.codec = TextEncoder(config).to(device), ImageCodec(config).to(device)
        self.unet = build_unet(config, self.codec.latent_shape, self.text_encoder.width).to(device)
        self.source = {}   # path, epoch, step and weights, for the record
        self.run = {}      # the training run's flags and how many images it trained on


def load_model(checkpoint, device="cpu", weights="ema", compiled=False):
    """The Model in a checkpoint file or run folder, ready to sample; weights: "ema" (default) or "raw"."""
    payload, path = load_checkpoint(checkpoint)
    model = Model(ModelConfig.from_dict(payload["config"]), device)
    load_parameters(model.unet, payload["ema" if weights == "ema" else "unet"])
    speed_up(model.unet.requires_grad_(False).eval(), model.device, compiled)
    model.source = dict(checkpoint=str(path), epoch=payload["epoch"], step=payload["step"], weights=weights)
    model.run = dict(payload.get("args", {}), train_images=payload.get("train_images"))
    return model
