//! The ops of masked image modelling.

use std::ffi::c_void;

use pixmim_core::ops::input::{self, Target};
use pixmim_core::ops::low_freq_target::{self, Filter};
use pixmim_core::ops::random_masking::{self, Noise};
use pixmim_core::ops::resize::{self, Interpolation};
use pixmim_core::ops::{
    add_positions, gather_tokens, masked_mse_loss, patch_embed, restore_tokens,
};

use crate::call::{Call, call, flag, size, three};
use crate::context::pixmim_context;
use crate::status::{Failure, Outcome, pixmim_status};
use crate::tensor::{pixmim_tensor, pointee, pointee_mut};

/// Masks by `noise`, which is read last, as outputs come before inputs.
fn mask<'a>(
    call: &Call<'_>,
    [ids_keep, ids_masked, ids_restore]: [*const pixmim_tensor; 3],
    block: i64,
    (workspace, workspace_bytes): (*mut c_void, *mut usize),
    noise: impl FnOnce() -> Outcome<Noise<'a>>,
) -> Outcome {
    let all = call.describe("ids_restore", ids_restore)?;
    let needed = random_masking::workspace_bytes(call.dev, all.dim(0), all.dim(1));
    let Some(workspace) = call.workspace(workspace, workspace_bytes, needed)? else {
        return Ok(());
    };
    let args = random_masking::Forward {
        ids_keep: call.write("ids_keep", ids_keep)?,
        ids_masked: call.write("ids_masked", ids_masked)?,
        ids_restore: call.write("ids_restore", ids_restore)?,
        noise: noise()?,
        block: size("block", block)?,
        workspace,
    };
    Ok(random_masking::forward(call.dev, args)?)
}

/// Draws which patches are kept, by a random order of each image's patches, or of squares of `block` x `block` patches.
///
/// Writes ids_keep (B, K), ids_masked (B, M) and ids_restore (B, L), i32; L = K + M is a square. Reads epoch (1) i64 and
/// samples (B) i64: with `seed` they decide the order, the same on every device. He et al. 2021, section 3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_random_masking_forward(
    context: *const pixmim_context,
    ids_keep: *const pixmim_tensor,
    ids_masked: *const pixmim_tensor,
    ids_restore: *const pixmim_tensor,
    seed: u64,
    epoch: *const pixmim_tensor,
    samples: *const pixmim_tensor,
    block: i64,
    workspace: *mut c_void,
    workspace_bytes: *mut usize,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let (ids, workspace) = ([ids_keep, ids_masked, ids_restore], (workspace, workspace_bytes));
        mask(call, ids, block, workspace, || {
            Ok(Noise::Drawn {
                seed,
                epoch: call.read("epoch", epoch)?,
                samples: call.read("samples", samples)?,
            })
        })
    })
}

/// As pixmim_random_masking_forward, in an order drawn elsewhere. CPU only.
///
/// Reads noise (B, G) f64, a value for each of the G blocks of an image, smallest first, none NaN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_random_masking_from_noise(
    context: *const pixmim_context,
    ids_keep: *const pixmim_tensor,
    ids_masked: *const pixmim_tensor,
    ids_restore: *const pixmim_tensor,
    noise: *const pixmim_tensor,
    block: i64,
    workspace: *mut c_void,
    workspace_bytes: *mut usize,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let (ids, workspace) = ([ids_keep, ids_masked, ids_restore], (workspace, workspace_bytes));
        mask(call, ids, block, workspace, || Ok(Noise::Given(call.read("noise", noise)?)))
    })
}

/// Keys' cubic with a = -0.5, antialiased: Pillow's BICUBIC.
pub const PIXMIM_BICUBIC: i32 = 3;
/// Linear, antialiased: Pillow's BILINEAR.
pub const PIXMIM_BILINEAR: i32 = 2;

/// Resamples rectangles to square crops, bit for bit as Pillow's `Image.resize` does; the same bytes on every device.
///
/// Writes crops (B, S, S, 3) u8. Reads images (bytes) u8 and geometry (B, 6) i64 as pixmim_input_forward does, which reads
/// the crops then; a whole image is resampled, so top and left are 0, and `interpolation` is PIXMIM_BICUBIC or
/// PIXMIM_BILINEAR. On a GPU nobody looks at geometry.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_resize_forward(
    context: *const pixmim_context,
    crops: *const pixmim_tensor,
    images: *const pixmim_tensor,
    geometry: *const pixmim_tensor,
    interpolation: i32,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let interpolation = match interpolation {
            PIXMIM_BICUBIC => Interpolation::Bicubic,
            PIXMIM_BILINEAR => Interpolation::Bilinear,
            other => {
                let why = format!("is {other}; it is PIXMIM_BICUBIC or PIXMIM_BILINEAR");
                return Err(Failure::invalid("interpolation", why));
            }
        };
        let args = resize::Forward {
            crops: call.write("crops", crops)?,
            images: call.read("images", images)?,
            geometry: call.read("geometry", geometry)?,
            interpolation,
        };
        Ok(resize::forward(call.dev, args)?)
    })
}

/// From bytes to numbers: crops, mirrors, normalises and patchifies images.
///
/// Writes patches (B, K, E), real, in (channel, row, column) order, and one of: target (B, M, E), wide, in (row, column,
/// channel) order, of the patches ids_masked (B, M) i32 (MAE); or pixels (B, 3, S, S), real on [0, 1] on the CPU and u8 on a
/// GPU, for pixmim_low_freq_target_forward (PixMIM). What is not wanted is NULL. Reads images (bytes) u8, RGB images
/// (height, width, 3) one after another; geometry (B, 6) i64: byte where the image starts, height, width, top, left, whether
/// mirrored (1 or 0); ids_keep (B, K) i32. `mean` and `std` have three numbers. On a GPU nobody looks at geometry.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_input_forward(
    context: *const pixmim_context,
    patches: *const pixmim_tensor,
    target: *const pixmim_tensor,
    pixels: *const pixmim_tensor,
    images: *const pixmim_tensor,
    geometry: *const pixmim_tensor,
    ids_keep: *const pixmim_tensor,
    ids_masked: *const pixmim_tensor,
    mean: *const f64,
    std: *const f64,
    patch_size: i64,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let target = match (target.is_null(), pixels.is_null()) {
            (false, true) => Target::Raw {
                target: call.write("target", target)?,
                ids_masked: call.read("ids_masked", ids_masked)?,
            },
            (true, false) => Target::Filtered { pixels: call.write("pixels", pixels)? },
            _ => {
                let why = "and `pixels`: one of the two is given, the other is NULL";
                return Err(Failure::invalid("target", why));
            }
        };
        let args = input::Forward {
            patches: call.write("patches", patches)?,
            target,
            images: call.read("images", images)?,
            geometry: call.read("geometry", geometry)?,
            ids_keep: call.read("ids_keep", ids_keep)?,
            mean: three("mean", mean)?,
            std: three("std", std)?,
            patch_size: size("patch_size", patch_size)?,
        };
        Ok(input::forward(call.dev, args)?)
    })
}

/// The tables of a low-pass filter, for one size and radius on one device.
pub struct pixmim_filter(Filter);

/// Makes a filter for images of `size` x `size` pixels that keeps frequencies within `radius`. PixMIM has radius 40 at 224;
/// the same cycles per pixel elsewhere are 40 size / 224. Allocates, and on a GPU synchronises.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_filter_create(
    context: *const pixmim_context,
    size: i64,
    radius: f64,
    out: *mut *mut pixmim_filter,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        // SAFETY: the header asks of the caller that it leads to a pointer, which nobody else uses.
        let out = unsafe { pointee_mut("out", out) }?;
        // Its tables have 16 numbers for each pair of a pixel and a frequency.
        let side = usize::try_from(size).ok().filter(|size| (1..=8192).contains(size));
        let side = side.ok_or_else(|| {
            Failure::invalid("size", format!("is {size}; it lies between 1 and 8192"))
        })?;
        *out = Box::into_raw(Box::new(pixmim_filter(Filter::new(call.dev, side, radius)?)));
        Ok(())
    })
}

/// Frees a filter, once work enqueued with it is done. NULL is let pass.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_filter_destroy(filter: *mut pixmim_filter) {
    crate::status::guard(|| {
        if !filter.is_null() && filter.is_aligned() {
            // SAFETY: the header asks of the caller that it came from `pixmim_filter_create` and is not used any more.
            drop(unsafe { Box::from_raw(filter) });
        }
        Ok(())
    });
}

/// PixMIM's target: images through an ideal low-pass filter, then normalised and patchified. arXiv 2303.02416, section 3.
///
/// Writes target (B, M, E), wide, in (row, column, channel) order. Reads pixels (B, 3, S, S), real on [0, 1], on a GPU f32 or
/// u8; ids_masked (B, M) i32; a filter of this context's device. `mean` and `std` have three numbers. `exact`: 1 for f32
/// arithmetic on a GPU too; 0 filters u8 pixels of 224 (radius 40) and 448 (radius 80) in half precision, all else exactly.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_low_freq_target_forward(
    context: *const pixmim_context,
    target: *const pixmim_tensor,
    pixels: *const pixmim_tensor,
    ids_masked: *const pixmim_tensor,
    filter: *const pixmim_filter,
    mean: *const f64,
    std: *const f64,
    patch_size: i64,
    exact: i32,
    workspace: *mut c_void,
    workspace_bytes: *mut usize,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        // SAFETY: the header asks of the caller that it came from `pixmim_filter_create`.
        let filter = &unsafe { pointee("filter", filter) }?.0;
        let exact = flag("exact", exact)?;
        let images = call.describe("pixels", pixels)?;
        let needed =
            low_freq_target::workspace_bytes(call.dev, images.dtype, images.dim(0), filter, exact);
        let Some(workspace) = call.workspace(workspace, workspace_bytes, needed)? else {
            return Ok(());
        };
        let args = low_freq_target::Forward {
            target: call.write("target", target)?,
            pixels: call.read("pixels", pixels)?,
            ids_masked: call.read("ids_masked", ids_masked)?,
            filter,
            mean: three("mean", mean)?,
            std: three("std", std)?,
            patch_size: size("patch_size", patch_size)?,
            exact,
            workspace,
        };
        Ok(low_freq_target::forward(call.dev, args)?)
    })
}

/// The loss and its gradient in one pass: mean squared error over the numbers of the masked patches.
///
/// Adds `scale` times the loss to loss (1), wide, and writes grad_pred (B, M, E), real, the gradient of `scale` times the
/// loss. Reads pred (B, M, E), real, and target (B, M, E), wide. `norm_pix` 1: each target patch is normalised by its own
/// mean and variance first. For one loss of many calls, `scale` is one over their number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_masked_mse_loss_forward_backward(
    context: *const pixmim_context,
    loss: *const pixmim_tensor,
    grad_pred: *const pixmim_tensor,
    pred: *const pixmim_tensor,
    target: *const pixmim_tensor,
    norm_pix: i32,
    scale: f64,
    workspace: *mut c_void,
    workspace_bytes: *mut usize,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let of = call.describe("pred", pred)?;
        let needed = masked_mse_loss::workspace_bytes(call.dev, of.dtype, of.rows());
        let Some(workspace) = call.workspace(workspace, workspace_bytes, needed)? else {
            return Ok(());
        };
        let args = masked_mse_loss::ForwardBackward {
            loss: call.write("loss", loss)?,
            grad_pred: call.write("grad_pred", grad_pred)?,
            pred: call.read("pred", pred)?,
            target: call.read("target", target)?,
            norm_pix: flag("norm_pix", norm_pix)?,
            scale,
            workspace,
        };
        Ok(masked_mse_loss::forward_backward(call.dev, args)?)
    })
}

/// Embeds the kept patches, adds positions, and puts the class token before them.
///
/// Writes out (B, 1 + K, D). Reads patches (B, K, E), ids_keep (B, K) i32, weight (D, E), bias (D), cls_token (D), pos_embed
/// (1 + L, D), all real.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_patch_embed_forward(
    context: *const pixmim_context,
    out: *const pixmim_tensor,
    patches: *const pixmim_tensor,
    ids_keep: *const pixmim_tensor,
    weight: *const pixmim_tensor,
    bias: *const pixmim_tensor,
    cls_token: *const pixmim_tensor,
    pos_embed: *const pixmim_tensor,
    workspace: *mut c_void,
    workspace_bytes: *mut usize,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let (of, into) = (call.describe("patches", patches)?, call.describe("out", out)?);
        let [images, kept, dim] = [of.dim(0), of.dim(1), into.width()];
        let needed = patch_embed::workspace_bytes(call.dev, of.dtype, images, kept, dim);
        let Some(workspace) = call.workspace(workspace, workspace_bytes, needed)? else {
            return Ok(());
        };
        let args = patch_embed::Forward {
            out: call.write("out", out)?,
            patches: call.read("patches", patches)?,
            ids_keep: call.read("ids_keep", ids_keep)?,
            weight: call.read("weight", weight)?,
            bias: call.read("bias", bias)?,
            cls_token: call.read("cls_token", cls_token)?,
            pos_embed: call.read("pos_embed", pos_embed)?,
            workspace,
        };
        Ok(patch_embed::forward(call.dev, args)?)
    })
}

/// Gradients of pixmim_patch_embed_forward's parameters.
///
/// Adds to grad_weight (D, E), grad_bias (D) and grad_cls_token (D), wide. Reads grad_out (B, 1 + K, D) and patches (B, K,
/// E), real.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_patch_embed_backward(
    context: *const pixmim_context,
    grad_weight: *const pixmim_tensor,
    grad_bias: *const pixmim_tensor,
    grad_cls_token: *const pixmim_tensor,
    grad_out: *const pixmim_tensor,
    patches: *const pixmim_tensor,
    workspace: *mut c_void,
    workspace_bytes: *mut usize,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let (of, grad) = (call.describe("patches", patches)?, call.describe("grad_out", grad_out)?);
        let [images, kept, dim] = [of.dim(0), of.dim(1), grad.width()];
        let needed = patch_embed::workspace_bytes(call.dev, of.dtype, images, kept, dim);
        let Some(workspace) = call.workspace(workspace, workspace_bytes, needed)? else {
            return Ok(());
        };
        let args = patch_embed::Backward {
            grad_weight: call.write("grad_weight", grad_weight)?,
            grad_bias: call.write("grad_bias", grad_bias)?,
            grad_cls_token: call.write("grad_cls_token", grad_cls_token)?,
            grad_out: call.read("grad_out", grad_out)?,
            patches: call.read("patches", patches)?,
            workspace,
        };
        Ok(patch_embed::backward(call.dev, args)?)
    })
}

/// Adds positions to the encoder's tokens and to the mask token: the rows from which pixmim_restore_tokens_forward makes the
/// decoder's tokens.
///
/// Writes out (B (1 + K) + L, D). Reads inp (B, 1 + K, D), ids_keep (B, K) i32, mask_token (D), pos_embed (1 + L, D), all
/// real.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_add_positions_forward(
    context: *const pixmim_context,
    out: *const pixmim_tensor,
    inp: *const pixmim_tensor,
    ids_keep: *const pixmim_tensor,
    mask_token: *const pixmim_tensor,
    pos_embed: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let args = add_positions::Forward {
            out: call.write("out", out)?,
            inp: call.read("inp", inp)?,
            ids_keep: call.read("ids_keep", ids_keep)?,
            mask_token: call.read("mask_token", mask_token)?,
            pos_embed: call.read("pos_embed", pos_embed)?,
        };
        Ok(add_positions::forward(call.dev, args)?)
    })
}

/// Gradient of the mask token; that of pixmim_add_positions_forward's `inp` is the gradient of its rows as it is.
///
/// Adds to grad_mask_token (D), wide. Reads grad_fill (L, D), real: the gradient of the last L rows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_add_positions_backward(
    context: *const pixmim_context,
    grad_mask_token: *const pixmim_tensor,
    grad_fill: *const pixmim_tensor,
    workspace: *mut c_void,
    workspace_bytes: *mut usize,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let of = call.describe("grad_fill", grad_fill)?;
        let needed = add_positions::workspace_bytes(call.dev, of.rows(), of.width());
        let Some(workspace) = call.workspace(workspace, workspace_bytes, needed)? else {
            return Ok(());
        };
        let args = add_positions::Backward {
            grad_mask_token: call.write("grad_mask_token", grad_mask_token)?,
            grad_fill: call.read("grad_fill", grad_fill)?,
            workspace,
        };
        Ok(add_positions::backward(call.dev, args)?)
    })
}

/// Puts the kept tokens back at their places, with a row of its own at each masked place ("unshuffle").
///
/// Writes out (B, 1 + L, W). Reads inp (B, 1 + K, W), fill (L, W), real, and ids_restore (B, L) i32. With mask tokens that
/// have their positions as `fill` this is MAE's decoder input.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_restore_tokens_forward(
    context: *const pixmim_context,
    out: *const pixmim_tensor,
    inp: *const pixmim_tensor,
    fill: *const pixmim_tensor,
    ids_restore: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let args = restore_tokens::Forward {
            out: call.write("out", out)?,
            inp: call.read("inp", inp)?,
            fill: call.read("fill", fill)?,
            ids_restore: call.read("ids_restore", ids_restore)?,
        };
        Ok(restore_tokens::forward(call.dev, args)?)
    })
}

/// Gradients of pixmim_restore_tokens_forward.
///
/// Writes grad_inp (B, 1 + K, W) and grad_fill (L, W), the sum over the images that mask a patch. Reads grad_out (B, 1 + L,
/// W), all real, and ids_restore (B, L) i32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_restore_tokens_backward(
    context: *const pixmim_context,
    grad_inp: *const pixmim_tensor,
    grad_fill: *const pixmim_tensor,
    grad_out: *const pixmim_tensor,
    ids_restore: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let args = restore_tokens::Backward {
            grad_inp: call.write("grad_inp", grad_inp)?,
            grad_fill: call.write("grad_fill", grad_fill)?,
            grad_out: call.read("grad_out", grad_out)?,
            ids_restore: call.read("ids_restore", ids_restore)?,
        };
        Ok(restore_tokens::backward(call.dev, args)?)
    })
}

/// Gathers the masked patches' tokens: all that the end of the decoder need work on.
///
/// Writes out (B, M, D). Reads inp (B, 1 + L, D), real, and ids_masked (B, M) i32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_gather_tokens_forward(
    context: *const pixmim_context,
    out: *const pixmim_tensor,
    inp: *const pixmim_tensor,
    ids_masked: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let args = gather_tokens::Forward {
            out: call.write("out", out)?,
            inp: call.read("inp", inp)?,
            ids_masked: call.read("ids_masked", ids_masked)?,
        };
        Ok(gather_tokens::forward(call.dev, args)?)
    })
}

/// Gradient of pixmim_gather_tokens_forward.
///
/// Writes grad_inp (B, 1 + L, D), zero where nothing was gathered. Reads grad_out (B, M, D), real, and ids_restore (B, L)
/// i32, drawn together with ids_masked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_gather_tokens_backward(
    context: *const pixmim_context,
    grad_inp: *const pixmim_tensor,
    grad_out: *const pixmim_tensor,
    ids_restore: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let args = gather_tokens::Backward {
            grad_inp: call.write("grad_inp", grad_inp)?,
            grad_out: call.read("grad_out", grad_out)?,
            ids_restore: call.read("ids_restore", ids_restore)?,
        };
        Ok(gather_tokens::backward(call.dev, args)?)
    })
}
