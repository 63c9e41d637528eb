"""The checks of every device, on the CPU and on a GPU if there is one; and those that need f64."""

import checks
import pytest
import reference
import torch

import pixmim

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test(check, device):
    check(device)


def randn(*shape, seed=0):
    return checks.randn("cpu", *shape, seed=seed).requires_grad_()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 4), (1, 7, 2, 3)])
def test_attention_has_the_gradient_of_finite_differences(shape):
    b, t, heads, head_dim = shape
    assert torch.autograd.gradcheck(lambda x: pixmim.attention(x, heads), randn(b, t, 3 * heads * head_dim))


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7)])
def test_layer_norm_has_the_gradient_of_finite_differences(shape):
    inputs = randn(*shape), randn(shape[-1], seed=1), randn(shape[-1], seed=2)
    assert torch.autograd.gradcheck(lambda *x: pixmim.layer_norm(*x, 1e-6), inputs)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_masked_mse_loss_has_the_gradient_of_finite_differences(norm_pix):
    target = randn(2, 3, 7, seed=1).detach()
    assert torch.autograd.gradcheck(lambda x: pixmim.masked_mse_loss(x, target, norm_pix), randn(2, 3, 7))


@pytest.mark.parametrize(
    ("norm_pix", "radius", "loss"),
    [
        (False, None, 2.420112978034),
        (False, 2, 1.106015768093),
        (True, None, 1.861839455008),
        (True, 2, 1.713184878851),
    ],
)
def test_a_patched_mae_reproduces_golden_losses_and_gradients(norm_pix, radius, loss):
    model = reference.golden_mae()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (reference.MEAN, reference.STD))
    images = (reference.uniform("image", (2, 3, 8, 8)) - mean) / std
    pixmim.patch_vit_mae(model, radius, norm_pix=norm_pix, masking=False)
    found = model(images)[0]
    assert abs(found.item() - loss) <= 1e-9
    if (norm_pix, radius) == (True, 2):
        found.backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
        assert abs(norm - 3.544680775385) <= 1e-9
        assert abs(model.blocks[0].attn.qkv.weight.grad.norm().item() - 0.1130069379) <= 1e-9
