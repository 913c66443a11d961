"""The UNet's norms keep the type of their input under autocast."""
import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from models import PRESETS, Model, apply_unet, keep_dtype_in_norms

CONFIG = PRESETS["tiny"]


def norms(unet):
    return [m for m in unet.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]


def with_own_norms(unet):
    """The network, whose norms are PyTorch's again."""
    for norm in norms(unet):
        del norm.forward
    return unet


def make_inputs(batch=4):
    torch.manual_seed(0)
    return torch.randn(batch, 12, 16, 16), torch.arange(batch), torch.randn(batch, 16, 64)


def update(unet, dtype=None):
    """A forward and backward pass: the output and all gradients."""
    x_t, t, text_emb = make_inputs()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = apply_unet(unet, CONFIG, x_t, t, text_emb).float()
    (output - x_t).square().mean().backward()
    return output, torch.cat([p.grad.flatten() for p in unet.parameters()])


@pytest.fixture
def unet():
    unet = Model(CONFIG).unet
    for p in [p for norm in norms(unet) for p in norm.parameters()]:   # as if trained
        nn.init.normal_(p, p.mean().item(), 0.1)
    return unet


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_half_precision(unet, dtype):
    """Outputs and gradients of a copy, as EMA is one, differ from those with float32 norms by half
    precision's rounding."""
    ours, in_float32 = copy.deepcopy(unet), with_own_norms(copy.deepcopy(unet))
    for norm, original in zip(norms(in_float32), norms(unet)):
        norm.register_forward_pre_hook(lambda _, inputs: inputs[0].float())   # as CUDA's autocast
        nn.init.zeros_(original.weight)   # the copies have their own
    for x, y in zip(update(ours, dtype), update(in_float32, dtype)):
        assert (x - y).norm() < 4 * torch.finfo(dtype).eps * y.norm()


def test_nothing_changes_in_float32(unet):
    """Without autocast outputs and gradients stay the same to the bit."""
    before = update(with_own_norms(copy.deepcopy(unet)))
    assert all(x.equal(y) for x, y in zip(update(unet), before))


def test_weights_keep_their_names(unet):
    """Checkpoints fit as before: the weights have the names that diffusers gives them."""
    assert list(unet.state_dict()) == list(unet.from_config(unet.config).state_dict())


def test_less_is_kept_for_the_backward_pass(unet):
    """Under CUDA's autocast, which fake tensors obey without a GPU, the network keeps a quarter
    less for the backward pass than with PyTorch's own norms."""
    kept = {keep_dtype_in_norms: [], with_own_norms: []}
    with FakeTensorMode(), torch.device("cuda"):
        net, inputs = unet.from_config(unet.config), make_inputs(256)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)   # torch.autocast would look for a GPU
        for change, sizes in kept.items():
            with saved_tensors_hooks(lambda t: sizes.append(t.nbytes), lambda _: None):
                apply_unet(change(net), CONFIG, *inputs)
        torch.set_autocast_enabled("cuda", False)
    ours, before = map(sum, kept.values())
    assert ours < 0.75 * before, ours / before


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.LayerNorm(8)])
def test_large_values_in_float16(norm):
    """Activations of 1e4, whose squares are too large for float16, are normalised correctly."""
    x, norm = 1e4 * torch.randn(4, 8, 8, 8), keep_dtype_in_norms(norm)
    with torch.autocast("cpu", torch.float16):
        ours = norm(x.half())
    torch.testing.assert_close(ours, norm(x).half(), rtol=0.002, atol=0.002)
