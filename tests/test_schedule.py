"""The noise schedule and the samplers against diffusers' schedulers, in float64, with a network
that depends on x and t."""
from itertools import product

import diffusers
import numpy as np
import pytest
import torch

import train
from models import PREDICTION_TYPES, PRESETS, ModelConfig, NoiseSchedule, build_unet
from sample import SAMPLERS, make_timesteps

DIFFUSERS_BETAS = {
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2")}
every_case = pytest.mark.parametrize("betas, prediction, zero", [
    case for case in product(DIFFUSERS_BETAS, PREDICTION_TYPES, (False, True))
    if case[1:] != ("epsilon", True)])


def make_schedules(kind, betas, prediction, zero, **settings):
    """Ours and diffusers'. Its alpha_bar is compared with ours and then brought to float64: its own
    float32 table is off by up to 6e-5 where a cosine alpha is 0.001."""
    ours = NoiseSchedule(ModelConfig(beta_schedule=betas, prediction_type=prediction,
                                     zero_terminal_snr=zero))
    theirs = getattr(diffusers, kind)(
        num_train_timesteps=1000, **DIFFUSERS_BETAS[betas], prediction_type=prediction,
        rescale_betas_zero_snr=zero, timestep_spacing="trailing", **settings)
    close(ours.alphas_cumprod, theirs.alphas_cumprod, atol=2e-7)
    # Its DPM-Solver has a floor at zero terminal SNR.
    floor = 2**-24 if kind.startswith("DPM") and zero else 0
    theirs.alphas_cumprod = ours.alphas_cumprod.clamp(min=floor)
    return ours, theirs


def network(x, t):
    """Stands in for the UNet: smooth, of order one, and different for every x and t."""
    return torch.tanh(1.3 * x) * np.cos(t / 400) + 0.3 * torch.sin(x * (1 + t / 300))


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def close(ours, theirs, rtol=1e-5, atol=1e-8):
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol)


@every_case
def test_forward_process(betas, prediction, zero):
    """alpha_bar, add_noise and the v target are diffusers', also where training is in float32, and
    predict_x0 and predict_eps give back what went in; no weight is infinite, even at zero SNR."""
    schedule, theirs = make_schedules("DDPMScheduler", betas, prediction, zero)
    (x_0, eps), t = normal(2, 1000, 2, 3, 3), torch.arange(1000)
    x_t, target = schedule.add_noise(x_0, eps, t), schedule.target(x_0, eps, t)
    close(x_t, theirs.add_noise(x_0, eps, t))
    close(schedule.add_noise(x_0.float(), eps.float(), t), x_t, atol=1e-6)
    if prediction == "v_prediction":
        close(target, theirs.get_velocity(x_0, eps, t))
    close(schedule.predict_x0(target, x_t, t), x_0)
    close(schedule.predict_eps(x_0, x_t, t)[1:], eps[1:])   # t = 0 is all but clean
    assert schedule.loss_weight(t, min_snr_gamma=5.0).isfinite().all()
    assert (schedule.alphas_cumprod[-1] == 0) == zero


@pytest.mark.parametrize("sampler, steps, eta, clip", [
    ("ddpm", 1000, None, True), ("ddpm", 50, None, True), ("ddpm", 8, None, True),
    ("ddim", 50, 0.0, False), ("ddim", 50, 0.0, True), ("ddim", 50, 0.7, True),
    ("dpm++", 50, None, False), ("dpm++", 20, None, False), ("dpm++", 5, None, False)])
@every_case
def test_samplers_are_diffusers(betas, prediction, zero, sampler, steps, eta, clip):
    """Every step of ours is diffusers' from the same x_t with the same noise; where x_0 is clipped,
    DDIM's with use_clipped_model_output."""
    kind = dict(ddpm="DDPM", ddim="DDIM").get(sampler, "DPMSolverMultistep") + "Scheduler"
    settings = {} if sampler == "dpm++" else dict(clip_sample=clip)
    schedule, theirs = make_schedules(kind, betas, prediction, zero, **settings)
    theirs.set_timesteps(steps)
    ours_noise, theirs_noise = (torch.Generator().manual_seed(7) for _ in range(2))
    how = dict(eta=eta, use_clipped_model_output=clip) if sampler == "ddim" else {}
    if sampler == "dpm++":   # set_timesteps rounds the sigmas to float32
        alpha_bar = theirs.alphas_cumprod[theirs.timesteps]
        theirs.sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), normal(1) * 0])
    bound, x = 1 if clip else float("inf"), normal(2, 3, 4, 4)

    def denoise(x_t, t):
        return schedule.predict_x0(network(x_t, t), x_t, t).clamp(-bound, bound)

    def draw_noise():
        return torch.randn(x.shape, dtype=x.dtype, generator=ours_noise)

    run = SAMPLERS[sampler](denoise, x, schedule, make_timesteps(1000, steps), draw_noise, eta)
    for k, (t, (x_prev, x_0)) in enumerate(zip(theirs.timesteps.tolist(), run, strict=True)):
        out = theirs.step(network(x, t), t, x, generator=theirs_noise, **how)
        close(x_0, out.get("pred_original_sample", x_0))
        # From zero SNR diffusers' solver starts at its floor and ours at the limit.
        is_near = sampler == "dpm++" and zero and k < 2
        close(x_prev, out.prev_sample, *((3e-2, 3e-2) if is_near else ()))
        x = x_prev


def test_timesteps():
    """They are diffusers' "trailing" ones, and any number of steps from 1 to T is that many
    different timesteps, from T - 1 to the clean end at -1."""
    theirs = diffusers.DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    for steps in (1000, 300, 30, 7, 1):
        theirs.set_timesteps(steps)
        assert [t for t, _ in make_timesteps(1000, steps)] == theirs.timesteps.tolist()
    for T, steps in [(T, steps) for T in (1000, 999, 50) for steps in range(1, T + 1)]:
        t, t_prev = zip(*make_timesteps(T, steps))
        assert len(set(t)) == steps and t[0] == T - 1 and min(t) >= 0 and t_prev == (*t[1:], -1)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("gamma, floor", [(5.0, None), (5.0, 1.0), (None, 1.0)])
def test_loss_weights_mean_the_same_for_every_prediction_type(prediction, gamma, floor):
    """Weight times error is the clamped SNR times the error of x_0, whether a wrong x_0 shows as an
    error of x_0, eps or v (Hang et al. 2023, section 3.4)."""
    schedule, _ = make_schedules("DDPMScheduler", "linear", prediction, False)
    (x_0, wrong, eps), t = normal(3, 5, 1, 2, 2), torch.tensor([3, 200, 500, 800, 999])
    x_t = schedule.add_noise(x_0, eps, t)
    output = schedule.target(wrong, schedule.predict_eps(wrong, x_t, t), t)
    error = (output - schedule.target(x_0, eps, t)).square().mean(dim=(1, 2, 3))
    alpha_bar = schedule.alphas_cumprod[t]
    w = (alpha_bar / (1 - alpha_bar)).clamp(min=floor, max=gamma)
    close(schedule.loss_weight(t, gamma, floor) * error, w * (wrong - x_0).square().mean((1, 2, 3)))


def test_presets_are_valid_and_large_is_sd15():
    """Every preset builds; the large one has as many parameters as Stable Diffusion 1.5's UNet."""
    shapes = dict(tiny=((12, 16, 16), 64), standard=((4, 32, 32), 512), large=((4, 32, 32), 768))
    with torch.device("meta"):
        unets = {name: build_unet(PRESETS[name], *shape) for name, shape in shapes.items()}
    assert sum(p.numel() for p in unets["large"].parameters()) == 859_520_964


@pytest.mark.parametrize("steps", [40, 350, 780])
def test_short_runs_reach_their_learning_rate(steps):
    """After a twentieth of the run the learning rate is at its peak, whatever --warmup-steps."""
    args = train.TrainingConfig(warmup_steps=1000, lr=2e-4, lr_schedule="constant")
    rates = [train.learning_rate(step, steps, args) for step in range(steps)]
    assert max(rates) == 2e-4 and rates.index(2e-4) <= steps / 20


@every_case
def test_the_network_learns_where_sampling_starts(betas, prediction, zero):
    """By default the loss weight at x_T is no less than a twentieth of the mean, whatever is
    predicted; flags that make it next to nothing, or all that counts, are refused."""
    flags = dict(vae="none", beta_schedule=betas, prediction_type=prediction,
                 zero_terminal_snr=zero)
    args, config, *_ = train.settle(flags)
    weights = NoiseSchedule(config).loss_weight(torch.arange(1000), args.min_snr_gamma,
                                                args.snr_floor)
    assert 0.05 * weights.mean() < weights[-1] < 20 * weights.mean()
    if zero or (prediction, betas) == ("epsilon", "cosine"):
        with pytest.raises(ValueError, match="--snr-floor"):
            train.settle(flags | dict(snr_floor=None if zero else 1.0))
