"""A network of Hugging Face's library as PixMIM, and what of a network keeps its own code."""

import copy
import warnings

import pytest
import reference
import torch
from checks import expect_close, randn
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import pixmim
from pixmim.loss import gather_patches

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
IMAGES = (3, 3, 32, 32)


def network(device="cpu", **options):
    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8,
        decoder_num_attention_heads=2, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_intermediate_size=64, norm_pix_loss=True, layer_norm_eps=1e-6, **options,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device)


def step(model, images, **options):
    torch.manual_seed(7)
    model.zero_grad()
    output = model(images, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expect_same_step(found, wanted, tolerance=3e-6):
    for name in ("loss", "logits", "mask", "ids_restore"):
        expect_close(found[0][name], wanted[0][name], tolerance, name)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        # The bias of the keys has no gradient but what rounding leaves.
        if not name.endswith(("k_proj.bias", "key.bias")):
            expect_close(found[1][name], grad, 30 * tolerance, f"gradient of {name}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_with_its_own_target_it_is_the_network_it_was(device, masking, qkv_bias):
    model, images = network(device, qkv_bias=qkv_bias), randn(device, *IMAGES, dtype=torch.float32)
    noise = torch.rand(3, 16, device=device)
    wanted, keys = step(model, images, noise=noise), list(model.state_dict())
    assert pixmim.patch_vit_mae(model, None, masking=masking) is model
    assert list(model.state_dict()) == keys
    # It is written into checkpoints.
    assert type(model).__name__ == "ViTMAEForPreTraining" and isinstance(model, ViTMAEForPreTraining)
    expect_same_step(step(model, images, noise=noise), wanted)
    expect_same_step(step(copy.deepcopy(model), images, noise=noise), wanted)
    if not masking:
        expect_same_step(step(model, images), step(pixmim.unpatch_vit_mae(copy.deepcopy(model)), images))
    taken = [module for module in model.modules() if hasattr(type(module), "_pixmim_original")]
    # Of three blocks two norms and attention each, two norms at the ends, the network, and its embeddings.
    assert len(taken) == 3 * 3 + 2 + 1 + masking


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns_the_filtered_pixels_of_the_patches_it_masked(device):
    model, images = network(device), randn(device, *IMAGES, dtype=torch.float32)
    pixmim.patch_vit_mae(model)
    output, _ = step(model, images)
    assert output.mask.sum(1).tolist() == [12.0] * 3 and output.ids_restore.dtype == torch.int64
    assert torch.equal(output.ids_restore.sort(1).values.cpu(), torch.arange(16).expand(3, -1))
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (reference.MEAN, reference.STD))
    ids = output.mask.argsort(dim=1, descending=True, stable=True)[:, :12]
    target = reference.low_freq_target(images * std + mean, ids, 8, 40 * 32 / 224)
    wanted = reference.masked_mse_loss(gather_patches(output.logits, ids), target, True)
    expect_close(output.loss, wanted, 2e-5, "loss")
    assert torch.equal(step(model, images)[0].mask, output.mask)
    torch.manual_seed(8)
    assert not torch.equal(model(images).mask, output.mask)


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast_it_is_as_near_to_f32_as_it_was(device):
    model, images = network(device), randn(device, *IMAGES, dtype=torch.float32)
    noise = torch.rand(3, 16, device=device)
    exact = step(model, images, noise=noise)[0].logits
    with torch.autocast(device, torch.bfloat16):
        theirs = model(images, noise=noise).logits
        pixmim.patch_vit_mae(model, None)
        ours = model(images, noise=noise)
    assert ours.loss.dtype == torch.float32 and ours.logits.dtype == theirs.dtype
    assert (ours.logits.float() - exact).norm() <= 1.5 * (theirs.float() - exact).norm()


def test_it_gives_tuples_to_those_who_ask():
    model, images = network(), randn("cpu", *IMAGES, dtype=torch.float32)
    pixmim.patch_vit_mae(model)
    torch.manual_seed(0)
    loss, logits, mask, ids_restore = model(images, return_dict=False)
    torch.manual_seed(0)
    output = model(pixel_values=images)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert torch.equal(mask, output.mask) and torch.equal(ids_restore, output.ids_restore)


def test_gradient_checkpointing_changes_nothing():
    model, images = network(), randn("cpu", *IMAGES, dtype=torch.float32)
    pixmim.patch_vit_mae(model).train()
    wanted = step(model, images)
    model.gradient_checkpointing_enable()
    expect_same_step(step(model, images), wanted, 0.0)


def test_a_saved_network_loads_into_the_class_it_had(tmp_path):
    model = pixmim.patch_vit_mae(network())
    model.save_pretrained(tmp_path)
    loaded = ViTMAEForPreTraining.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["ViTMAEForPreTraining"]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_unpatching_undoes_it():
    model = network()
    classes = [type(module) for module in model.modules()]
    pixmim.unpatch_vit_mae(pixmim.patch_vit_mae(pixmim.patch_vit_mae(model, 3)))
    assert [type(module) for module in model.modules()] == classes


def test_dropout_inside_attention_keeps_the_networks_code():
    model, images = network(attention_probs_dropout_prob=0.3), randn("cpu", *IMAGES, dtype=torch.float32)
    noise = torch.rand(3, 16)
    wanted = step(model.train(), images, noise=noise)
    assert (step(model.eval(), images, noise=noise)[0].loss - wanted[0].loss).abs() > 1e-4
    pixmim.patch_vit_mae(model, None).train()
    expect_same_step(step(model, images, noise=noise), wanted)


def test_attention_that_is_not_ours_is_left_with_a_warning():
    model = reference.Mae(reference.SMALL)
    model.blocks[1].attn.q_norm = nn.LayerNorm(16)
    with pytest.warns(UserWarning, match=r"blocks\.1\.attn .* normalises queries"):
        pixmim.patch_vit_mae(model)
    assert type(model.blocks[1].attn).__mro__[1] is nn.Module
    assert hasattr(type(model.blocks[0].attn), "_pixmim_original")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixmim.patch_vit_mae(reference.Mae(reference.SMALL))


def test_other_networks_are_refused_with_what_they_lack():
    with pytest.raises(TypeError, match=r"Linear is neither .*it has no patch_embed, blocks, .*PixMIMLoss"):
        pixmim.patch_vit_mae(nn.Linear(2, 2))
    model = reference.Mae(reference.SMALL)
    model.patchify = lambda imgs: reference.patches(imgs, 8, "crw")
    with pytest.raises(ValueError, match=r"not in \(row, column, channel\) order"):
        pixmim.patch_vit_mae(model)
    with pytest.raises(ValueError, match='"pixmim" or None'):
        pixmim.patch_vit_mae(reference.Mae(reference.SMALL), "nearest")
