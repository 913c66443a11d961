"""The noise schedule and the samplers against diffusers' schedulers, in float64, with a network
that depends on x and t."""
import diffusers
import numpy as np
import pytest
import torch

from models import BETA_SCHEDULES, PREDICTION_TYPES, PRESETS, ModelConfig, NoiseSchedule, build_unet
from sample import SAMPLERS, make_timesteps

DIFFUSERS_BETAS = {
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2")}
CASES = [(betas, prediction, zero) for betas in BETA_SCHEDULES for prediction in PREDICTION_TYPES
         for zero in (False, True) if not (zero and prediction == "epsilon")]
every_case = pytest.mark.parametrize("betas, prediction, zero", CASES)


def make_schedule(betas="linear", prediction="epsilon", zero=False):
    return NoiseSchedule(ModelConfig(beta_schedule=betas, prediction_type=prediction,
                                     zero_terminal_snr=zero))


def reference(kind, betas, prediction, zero, **settings):
    """diffusers' scheduler, its alpha_bar compared with ours and then brought to float64: its own
    float32 table is off by up to 6e-5 where a cosine alpha is 0.001."""
    scheduler = getattr(diffusers, kind)(
        num_train_timesteps=1000, **DIFFUSERS_BETAS[betas], prediction_type=prediction,
        rescale_betas_zero_snr=zero, timestep_spacing="trailing", **settings)
    alpha_bar = make_schedule(betas, prediction, zero).alphas_cumprod.clone()
    close(alpha_bar, scheduler.alphas_cumprod, atol=2e-7)
    if kind == "DPMSolverMultistepScheduler" and zero:
        alpha_bar.clamp_(min=2**-24)   # as diffusers does itself at zero terminal SNR
    scheduler.alphas_cumprod = alpha_bar
    return scheduler


def network(x, t):
    """Stands in for the UNet: smooth, of order one, and different for every x and t."""
    return torch.tanh(1.3 * x) * np.cos(t / 400) + 0.3 * torch.sin(x * (1 + t / 300))


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def close(ours, theirs, atol=1e-8):
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=atol)


@every_case
def test_forward_process(betas, prediction, zero):
    """alpha_bar, add_noise and the v target are diffusers', also where training is in float32, and
    predict_x0 and predict_eps give back what went in; no weight is infinite, even at zero SNR."""
    schedule, t = make_schedule(betas, prediction, zero), torch.arange(1000)
    theirs = reference("DDPMScheduler", betas, prediction, zero)
    x_0, eps = normal(2, 1000, 2, 3, 3)
    x_t, target = schedule.add_noise(x_0, eps, t), schedule.target(x_0, eps, t)
    close(x_t, theirs.add_noise(x_0, eps, t))
    close(schedule.add_noise(x_0.float(), eps.float(), t), x_t, atol=1e-6)
    if prediction == "v_prediction":
        close(target, theirs.get_velocity(x_0, eps, t))
    close(schedule.predict_x0(target, x_t, t), x_0)
    close(schedule.predict_eps(x_0, x_t, t)[1:], eps[1:])   # t = 0 is all but clean
    assert schedule.loss_weight(t, min_snr_gamma=5.0).isfinite().all()
    assert (schedule.alphas_cumprod[-1] == 0) == zero


@pytest.mark.parametrize("sampler, kind, steps, eta, settings", [
    *[("ddpm", "DDPMScheduler", steps, 0, dict(clip_sample=True)) for steps in (1000, 50, 8)],
    ("ddim", "DDIMScheduler", 50, 0.0, dict(clip_sample=False)),
    ("ddim", "DDIMScheduler", 50, 0.0, dict(clip_sample=True)),
    ("ddim", "DDIMScheduler", 50, 0.7, dict(clip_sample=True)),
    *[("dpm++", "DPMSolverMultistepScheduler", steps, 0, {}) for steps in (50, 20, 5)]])
@every_case
def test_samplers_are_diffusers(betas, prediction, zero, sampler, kind, steps, eta, settings):
    """Every step of ours is diffusers' from the same x_t with the same noise; where x_0 is clipped,
    DDIM's with use_clipped_model_output."""
    schedule, clip = make_schedule(betas, prediction, zero), settings.get("clip_sample", False)
    bound = 1 if clip else float("inf")
    theirs = reference(kind, betas, prediction, zero, **settings)
    theirs.set_timesteps(steps)
    how = dict(generator=torch.Generator().manual_seed(7))
    if sampler == "ddim":
        how |= dict(eta=eta, use_clipped_model_output=clip)
    if sampler == "dpm++":   # set_timesteps rounds the sigmas to float32
        alpha_bar = theirs.alphas_cumprod[theirs.timesteps]
        theirs.sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), normal(1) * 0])
    ours_noise, x = torch.Generator().manual_seed(7), normal(2, 3, 4, 4)

    def denoise(x_t, t):
        return schedule.predict_x0(network(x_t, t), x_t, t).clamp(-bound, bound)

    def draw_noise():
        return torch.randn(x.shape, dtype=x.dtype, generator=ours_noise)

    run = SAMPLERS[sampler](denoise, x, schedule, make_timesteps(1000, steps), draw_noise, eta)
    for k, (t, (x_prev, x_0)) in enumerate(zip(theirs.timesteps.tolist(), run, strict=True)):
        out = theirs.step(network(x, t), t, x, **how)
        if "pred_original_sample" in out:
            close(x_0, out.pred_original_sample)
        # From zero SNR diffusers' solver starts at a floor of 2^-24 and ours at the limit.
        if not (sampler == "dpm++" and zero and k < 2):
            close(x_prev, out.prev_sample)
        elif k == 0:
            torch.testing.assert_close(x_prev, out.prev_sample, rtol=1e-2, atol=1e-2)
        x = x_prev


def test_timesteps():
    """They are diffusers' "trailing" ones, and any number of steps from 1 to T is that many
    different timesteps, from T - 1 to the clean end at -1."""
    theirs = diffusers.DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    for steps in (1000, 300, 30, 7, 1):
        theirs.set_timesteps(steps)
        assert [t for t, _ in make_timesteps(1000, steps)] == theirs.timesteps.tolist()
    for T in (1000, 999, 50):
        for steps in range(1, T + 1):
            t, t_prev = zip(*make_timesteps(T, steps))
            assert len(set(t)) == steps and t[0] == T - 1 and min(t) >= 0, (T, steps)
            assert t_prev == (*t[1:], -1)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("gamma, floor", [(5.0, None), (5.0, 1.0), (None, 1.0)])
def test_loss_weights_mean_the_same_for_every_prediction_type(prediction, gamma, floor):
    """Weight times error is the clamped SNR times the error of x_0, whether a wrong x_0 shows as an
    error of x_0, eps or v (Hang et al. 2023, section 3.4)."""
    schedule, t = make_schedule("linear", prediction), torch.tensor([3, 200, 500, 800, 999])
    x_0, wrong, eps = normal(3, 5, 1, 2, 2)
    x_t = schedule.add_noise(x_0, eps, t)
    output = schedule.target(wrong, schedule.predict_eps(wrong, x_t, t), t)
    error = (output - schedule.target(x_0, eps, t)).square().mean(dim=(1, 2, 3))
    alpha_bar = schedule.alphas_cumprod[t]
    w = (alpha_bar / (1 - alpha_bar)).clamp(min=floor, max=gamma)
    close(schedule.loss_weight(t, gamma, floor) * error, w * (wrong - x_0).square().mean((1, 2, 3)))


def test_an_unknown_schedule_is_refused():
    """No other schedule is made of it."""
    with pytest.raises(ValueError, match="^--beta-schedule sigmoid: use linear or scaled_.*"):
        ModelConfig(beta_schedule="sigmoid")


def test_zero_terminal_snr_is_refused_with_epsilon():
    """The combination that cannot learn is refused when the configuration is made."""
    with pytest.raises(ValueError, match="^--zero-terminal-snr True: .* add --prediction-type"):
        make_schedule("linear", "epsilon", True)


def test_presets_are_valid_and_large_is_sd15():
    """Every preset builds; the large one has as many parameters as Stable Diffusion 1.5's UNet."""
    shapes = dict(tiny=((48, 8, 8), 64), standard=((4, 32, 32), 512), large=((4, 32, 32), 768))
    with torch.device("meta"):
        unets = {name: build_unet(PRESETS[name], *shape) for name, shape in shapes.items()}
    assert sum(p.numel() for p in unets["large"].parameters()) == 859_520_964
