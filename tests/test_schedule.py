"""The noise schedule and the samplers against diffusers' schedulers, in float64 and with a network that depends on x and t."""
import diffusers
import numpy as np
import pytest
import torch

from models import BETA_SCHEDULES, PREDICTION_TYPES, PRESETS, ModelConfig, NoiseSchedule
from sample import SAMPLERS, ddim, ddpm, dpm_solver_2m, make_timesteps

DIFFUSERS_BETAS = {"linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
                   "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
                   "cosine": dict(beta_schedule="squaredcos_cap_v2")}
CASES = [(betas, prediction, zero) for betas in BETA_SCHEDULES for prediction in PREDICTION_TYPES for zero in (False, True)
         if not (zero and prediction == "epsilon")]


def config(betas="linear", prediction="epsilon", zero=False):
    return ModelConfig(beta_schedule=betas, prediction_type=prediction, zero_terminal_snr=zero)


def reference(kind, betas, prediction, zero, steps=None, **kwargs):
    """diffusers' scheduler of the same settings, its tables brought to float64: its own float32 tables are off by up to
    6e-5 where a cosine alpha is 0.001."""
    scheduler = getattr(diffusers, kind)(num_train_timesteps=1000, **DIFFUSERS_BETAS[betas], prediction_type=prediction,
                                         rescale_betas_zero_snr=zero, timestep_spacing="trailing", **kwargs)
    scheduler.alphas_cumprod = NoiseSchedule(config(betas, prediction, zero)).alphas_cumprod.clone()
    if kind == "DPMSolverMultistepScheduler" and zero:
        scheduler.alphas_cumprod.clamp_(min=2**-24)   # as diffusers does itself at zero terminal SNR
    scheduler.alphas = scheduler.alphas_cumprod / torch.cat([torch.ones(1), scheduler.alphas_cumprod[:-1]])
    scheduler.betas = 1 - scheduler.alphas
    if steps:
        scheduler.set_timesteps(steps)
    return scheduler


def network(x, t):
    """Stands in for the UNet: smooth, of order one, and different for every x and t."""
    return torch.tanh(1.3 * x) * np.cos(t / 400) + 0.3 * torch.sin(x * (1 + t / 300))


def start(seed=0):
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("betas", BETA_SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
def test_betas_are_those_of_diffusers(betas, zero):
    """alpha_bar agrees with diffusers' own float32 tables, with and without the zero-terminal-SNR rescale."""
    theirs = diffusers.DDIMScheduler(**DIFFUSERS_BETAS[betas], rescale_betas_zero_snr=zero, num_train_timesteps=1000)
    ours = NoiseSchedule(config(betas, "v_prediction", zero)).alphas_cumprod
    # The absolute part covers float32 rounding of alphas near 0, the last ones of the cosine schedule.
    torch.testing.assert_close(ours, theirs.alphas_cumprod.double(), rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("betas, prediction, zero", CASES)
def test_forward_process(betas, prediction, zero):
    """add_noise and the v target equal diffusers', and predict_x0 gives back x_0 from the target at every timestep."""
    schedule = NoiseSchedule(config(betas, prediction, zero))
    t = torch.arange(1000)
    x_0, eps = (torch.randn(1000, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    theirs = reference("DDPMScheduler", betas, prediction, zero)
    x_t = schedule.add_noise(x_0, eps, t)
    close(x_t, theirs.add_noise(x_0, eps, t))
    if prediction == "v_prediction":
        close(schedule.target(x_0, eps, t), theirs.get_velocity(x_0, eps, t))
    close(schedule.predict_x0(schedule.target(x_0, eps, t), x_t, t), x_0)
    not_clean = t > 0
    close(schedule.predict_eps(x_0, x_t, t)[not_clean], eps[not_clean])


def test_schedule_is_exact_in_float32_training():
    """add_noise on float32 training tensors equals the float64 result to float32 rounding, one timestep per sample."""
    schedule, t = NoiseSchedule(config("cosine")), torch.tensor([0, 500, 999])
    x_0, eps = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha_bar = schedule.alphas_cumprod[t].view(3, 1, 1, 1)
    expected = alpha_bar.sqrt() * x_0.double() + (1 - alpha_bar).sqrt() * eps.double()
    torch.testing.assert_close(schedule.add_noise(x_0, eps, t), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1000, 50, 8])
@pytest.mark.parametrize("betas, prediction, zero", CASES)
def test_ddpm_trajectory(betas, prediction, zero, steps):
    """Ancestral sampling follows diffusers' DDPMScheduler at every step, given the same noise."""
    schedule, theirs = NoiseSchedule(config(betas, prediction, zero)), reference(
        "DDPMScheduler", betas, prediction, zero, steps, variance_type="fixed_small", clip_sample=True)
    ours_noise, their_noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)

    def denoise(x_t, t):
        return schedule.predict_x0(network(x_t, t), x_t, t).clamp(-1, 1)

    x = start()
    run = ddpm(denoise, start(), schedule, make_timesteps(1000, steps),
               lambda: torch.randn(x.shape, dtype=x.dtype, generator=ours_noise))
    for t, (x_prev, x_0) in zip(theirs.timesteps, run, strict=True):
        out = theirs.step(network(x, int(t)), int(t), x, generator=their_noise)
        close(x_0, out.pred_original_sample)
        close(x_prev, out.prev_sample)
        x = out.prev_sample


@pytest.mark.parametrize("eta, clip", [(0.0, False), (0.0, True), (0.7, True)])
@pytest.mark.parametrize("betas, prediction, zero", CASES)
def test_ddim_trajectory(betas, prediction, zero, eta, clip):
    """DDIM follows diffusers' DDIMScheduler at every step; where x_0 is clipped, with its use_clipped_model_output."""
    schedule, theirs = NoiseSchedule(config(betas, prediction, zero)), reference(
        "DDIMScheduler", betas, prediction, zero, 50, clip_sample=clip)
    ours_noise, their_noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)

    def denoise(x_t, t):
        x_0 = schedule.predict_x0(network(x_t, t), x_t, t)
        return x_0.clamp(-1, 1) if clip else x_0

    x = start()
    run = ddim(denoise, start(), schedule, make_timesteps(1000, 50),
               lambda: torch.randn(x.shape, dtype=x.dtype, generator=ours_noise), eta=eta)
    for t, (x_prev, x_0) in zip(theirs.timesteps, run, strict=True):
        out = theirs.step(network(x, int(t)), int(t), x, eta=eta, use_clipped_model_output=clip, generator=their_noise)
        if t == theirs.timesteps[-1]:   # diffusers adds noise of its last variance even at the clean end, where it is 0
            assert eta == 0 or theirs._get_variance(int(t), -1) < 1e-20
        close(x_0, out.pred_original_sample)
        close(x_prev, out.prev_sample)
        x = out.prev_sample


@pytest.mark.parametrize("steps", [50, 20, 5])
@pytest.mark.parametrize("betas, prediction, zero", CASES)
def test_dpm_solver_trajectory(betas, prediction, zero, steps):
    """DPM-Solver++ 2M follows diffusers' DPMSolverMultistepScheduler at every step, onto the same final x_0."""
    schedule = NoiseSchedule(config(betas, prediction, zero))
    theirs = reference("DPMSolverMultistepScheduler", betas, prediction, zero, algorithm_type="dpmsolver++")
    theirs.set_timesteps(steps)
    # set_timesteps rounds the sigmas to float32; give it the exact ones.
    alpha_bar = theirs.alphas_cumprod[theirs.timesteps]
    theirs.sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1, dtype=torch.float64)])
    x = start()

    def denoise(x_t, t):
        return schedule.predict_x0(network(x_t, t), x_t, t)

    run = dpm_solver_2m(denoise, start(), schedule, make_timesteps(1000, steps))
    for k, (t, (x_prev, _)) in enumerate(zip(theirs.timesteps, run, strict=True)):
        out = theirs.step(network(x, int(t)), int(t), x).prev_sample
        # From zero SNR diffusers starts at an arbitrary floor of 2^-24 and ours at the limit, which shows in two steps.
        if not zero or k > 1:
            close(x_prev, out)
        elif k == 0:
            torch.testing.assert_close(x_prev, out, rtol=1e-2, atol=1e-2)
        x = x_prev


@pytest.mark.parametrize("steps", [1000, 300, 30, 7, 1])
def test_timesteps_are_diffusers_trailing_ones(steps):
    """The visited timesteps are those of diffusers' "trailing" spacing, from T - 1 to the clean end at -1."""
    theirs = diffusers.DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    pairs = make_timesteps(1000, steps)
    assert [t for t, _ in pairs] == theirs.timesteps.tolist()
    assert [p for _, p in pairs] == [t for t, _ in pairs[1:]] + [-1]


def test_every_number_of_steps_is_kept():
    """Each number of steps from 1 to T gives so many different timesteps from T - 1 down, the last one to the clean end."""
    for T in (1000, 999, 50):
        for steps in range(1, T + 1):
            t, t_prev = zip(*make_timesteps(T, steps))
            assert len(set(t)) == steps and t[0] == T - 1 and min(t) >= 0 and t_prev == (*t[1:], -1), (T, steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_recover_a_gaussian(sampler):
    """With the exact denoiser of Gaussian data N(1, 0.5^2) each sampler returns samples of that mean and spread."""
    schedule, mean, std = NoiseSchedule(config("cosine", "sample")), 1.0, 0.5
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(1, 1, 100, 100, dtype=torch.float64, generator=generator)

    def denoise(x_t, t):   # E[x_0 | x_t], closed form
        a = schedule.alpha_bar(t, x_t)
        return mean + std**2 * a.sqrt() / (a * std**2 + 1 - a) * (x_t - a.sqrt() * mean)

    *_, (x, _) = SAMPLERS[sampler](denoise, draw(), schedule, make_timesteps(1000, 250), draw, 0.0)
    assert abs(x.mean() - mean) < 0.03 and abs(x.std() - std) < 0.03


def test_posterior_is_bayes():
    """posterior() equals Bayes' rule on the two Gaussians q(x_t | x_prev) and q(x_prev | x_0), for strides 1 and 40."""
    schedule, x_0, x_t = NoiseSchedule(config("scaled_linear")), start(1), start(2)
    for t, t_prev in ((500, 499), (500, 460), (1, 0)):
        a_t, a_prev = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t_prev]
        alpha = a_t / a_prev
        precision = 1 / (1 - a_prev) + alpha / (1 - alpha)
        mean = (a_prev.sqrt() * x_0 / (1 - a_prev) + alpha.sqrt() * x_t / (1 - alpha)) / precision
        ours_mean, ours_variance = schedule.posterior(x_0, x_t, t, t_prev)
        close(ours_mean, mean)
        close(ours_variance, 1 / precision)


@pytest.mark.parametrize("gamma, floor", [(5.0, None), (5.0, 1.0), (None, 1.0)])
def test_loss_weights_mean_the_same_for_every_prediction_type(gamma, floor):
    """Weight times error is the same number whether one wrong x_0 is expressed as an x_0, eps or v error."""
    t = torch.tensor([3, 200, 500, 800, 999])
    x_0, wrong, eps = torch.randn(3, 5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weighted = {}
    for prediction in PREDICTION_TYPES:
        schedule = NoiseSchedule(config("linear", prediction))
        x_t = schedule.add_noise(x_0, eps, t)
        wrong_output = schedule.target(wrong, schedule.predict_eps(wrong, x_t, t), t)
        error = (wrong_output - schedule.target(x_0, eps, t)).square().mean(dim=(1, 2, 3))
        weighted[prediction] = schedule.loss_weight(t, gamma, floor).double() * error
    snr = schedule.snr(t)
    expected = snr.clamp(min=floor, max=gamma) * (wrong - x_0).square().mean(dim=(1, 2, 3))
    for prediction in PREDICTION_TYPES:
        torch.testing.assert_close(weighted[prediction], expected, rtol=1e-5, atol=1e-8)
    if gamma:
        # Hang et al. 2023, section 3.4: min(SNR, gamma) / SNR for eps, / (SNR + 1) for v.
        epsilon = NoiseSchedule(config("linear", "epsilon")).loss_weight(t, gamma)
        torch.testing.assert_close(epsilon.double(), snr.clamp(max=gamma) / snr, rtol=1e-5, atol=0)


def test_weights_stay_finite_at_zero_terminal_snr():
    """min-SNR weights are finite where the SNR is 0."""
    for prediction in ("v_prediction", "sample"):
        schedule = NoiseSchedule(config("scaled_linear", prediction, True))
        assert schedule.snr(torch.tensor([999])).item() == 0
        assert schedule.loss_weight(torch.arange(1000), 5.0).isfinite().all()


def test_zero_terminal_snr_is_refused_with_epsilon():
    """The combination that cannot learn is refused when the configuration is made."""
    with pytest.raises(ValueError, match="--zero-terminal-snr"):
        config("linear", "epsilon", True)


def test_presets_are_valid_and_large_is_sd15():
    """Every preset builds; the large one has the parameter count of Stable Diffusion 1.5's UNet at its text width."""
    from models import build_unet
    with torch.device("meta"):
        large = build_unet(PRESETS["large"], (4, 32, 32), 768)
        build_unet(PRESETS["standard"], (4, 32, 32), 512)
        build_unet(PRESETS["tiny"], (48, 8, 8), 64)
    assert sum(p.numel() for p in large.parameters()) == 859_520_964
