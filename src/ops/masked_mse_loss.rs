//! The reconstruction loss: mean squared error over the numbers of the masked patches, and its gradient.
//!
//! `loss = mean over B M E of (pred - t)^2`, where `t = target`, or with `norm_pix` the target patch minus its mean, over
//! `sqrt(var + 1e-6)`, var with `E - 1` below (He et al. 2021, section 4; `norm_pix_loss` of the MAE source). Every image
//! masks the same number of patches, so this is the sum over masked patches divided by their number.

use super::{FINITE, cost, expect_nonzero, expect_within, for_real};
use crate::device::Call;
pub use crate::scalar::NORM_PIX_EPS;
use crate::tensor::{carve_bytes, expect_workspace};
use crate::{DType, Device, Result, TensorMut, TensorRef};

/// Arguments of [`forward_backward`].
#[derive(Debug)]
pub struct ForwardBackward<'a> {
    /// `(1)`. `scale` times the loss is added.
    pub loss: TensorMut<'a>,
    /// `(B, M, E)`, gradient of `scale` times the loss. Overwritten.
    pub grad_pred: TensorMut<'a>,
    /// `(B, M, E)`, for the masked patches.
    pub pred: TensorRef<'a>,
    /// `(B, M, E)`, in `pred`'s order, before `norm_pix`.
    pub target: TensorRef<'a>,
    /// Whether each target patch is normalised by its own mean and variance.
    pub norm_pix: bool,
    /// Weight of this micro-batch: one over the micro-batches of a step.
    pub scale: f64,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Bytes of workspace for `patches` (B M).
#[must_use]
pub fn workspace_bytes(dev: &Device, dtype: DType, patches: usize) -> usize {
    match dev {
        Device::Cpu(_) => carve_bytes(dtype, patches),
        Device::Cuda(_) => carve_bytes(DType::F64, launch::blocks(patches)),
    }
}

/// Value and gradient in one pass.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) or [`Error::DType`](crate::Error::DType) unless the arguments are as their
/// fields say; [`Error::Invalid`](crate::Error::Invalid) for `norm_pix` of a single number and a `scale` that is not finite;
/// [`Error::Workspace`](crate::Error::Workspace) if the workspace is too small.
pub fn forward_backward(dev: &Device, args: ForwardBackward<'_>) -> Result<()> {
    let call = Call { op: "masked_mse_loss", dev };
    let dtype = args.pred.expect_real(call, "pred")?;
    let [images, masked, numbers] = args.pred.dims(call, "pred", "(B, M, E)")?;
    expect_nonzero(call, "pred", args.pred.shape())?;
    args.target.expect(call, "target", dtype.wide(), args.pred.shape())?;
    args.grad_pred.expect(call, "grad_pred", dtype, args.pred.shape())?;
    args.loss.expect(call, "loss", dtype.wide(), &[1])?;
    expect_workspace(call, &args.workspace, workspace_bytes(dev, dtype, images * masked))?;
    if args.norm_pix && numbers < 2 {
        return Err(crate::Error::invalid(
            "masked_mse_loss: norm_pix",
            "needs patches of two numbers",
        ));
    }
    expect_within(call, "scale", args.scale, FINITE)?;
    let _span = dev.span("masked_mse_loss::forward_backward", || {
        cost::masked_mse_loss_forward_backward(dtype, [images, masked, numbers])
    });
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::forward_backward::<T>(args)),
        Device::Cuda(gpu) => launch::forward_backward(gpu, args)?,
    }
    Ok(())
}

mod cpu {
    use rayon::prelude::*;

    use super::ForwardBackward;
    use crate::cpu::{Real, rows_per_task, simd, sum};
    use crate::scalar::PatchNorm;

    pub(super) fn forward_backward<T: Real>(args: ForwardBackward<'_>) {
        let numbers = *args.pred.shape().last().expect("checked: (B, M, E)");
        let patches = args.pred.elems() / numbers;
        let piece = rows_per_task(numbers);
        let per_number = T::of(args.scale / args.pred.elems() as f64);
        let (losses, _) = args.workspace.carve::<T>(patches);
        let pred = args.pred.as_slice::<T>().par_chunks(piece * numbers);
        let target = args.target.as_slice::<T>().par_chunks(piece * numbers);
        let grad = args.grad_pred.into_slice::<T>().par_chunks_mut(piece * numbers);
        let pieces = grad.zip(losses.par_chunks_mut(piece)).zip(pred.zip(target));
        pieces.for_each(|((grad, losses), (pred, target))| {
            simd!(|| {
                let rows = pred.chunks_exact(numbers).zip(target.chunks_exact(numbers));
                let into = grad.chunks_exact_mut(numbers).zip(losses);
                for ((grad, loss), (pred, target)) in into.zip(rows) {
                    let norm = if args.norm_pix { norm_of(target) } else { PatchNorm::NONE };
                    *loss = sum([pred, target], |[p, t]| norm.squared_error(p, t));
                    for ((grad, &p), &t) in grad.iter_mut().zip(pred).zip(target) {
                        *grad = norm.gradient(per_number, p, t);
                    }
                }
            });
        });
        let total = losses.iter().map(|loss| loss.to_f64()).sum::<f64>();
        let [loss] = args.loss.into_slice::<T>() else { unreachable!("checked: (1)") };
        *loss = *loss + T::of(total * args.scale / (patches * numbers) as f64);
    }

    #[inline(always)]
    fn norm_of<T: Real>(patch: &[T]) -> PatchNorm<T> {
        let n = patch.len() as f64;
        let mean = sum([patch], |[x]| x) / T::of(n);
        let var = sum([patch], |[x]| (x - mean) * (x - mean)) / T::of(n - 1.0);
        PatchNorm::new(mean, var)
    }
}

mod launch {
    use super::{ForwardBackward, NORM_PIX_EPS};
    use crate::cuda::{DevPtr, Gpu};
    use crate::{DType, Result};

    /// As in `kernels/masked_mse_loss.cu`.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    struct Params {
        grad_pred: DevPtr,
        pred: DevPtr,
        target: DevPtr,
        partials: DevPtr,
        patches: i64,
        numbers: u32,
        norm_pix: u32,
        grad_scale: f32,
        eps: f32,
    }
    const _: () = assert!(size_of::<Params>() == 56);

    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    struct SumParams {
        loss: DevPtr,
        partials: DevPtr,
        count: i64,
        scale: f64,
    }
    const _: () = assert!(size_of::<SumParams>() == 32);

    const BLOCK: u32 = 256;
    const SUM_BLOCK: u32 = 512;
    /// Patches of a block: 8 warps take 8 each.
    const PATCHES: usize = 64;

    /// Blocks for this many patches; each leaves a partial sum.
    pub(super) fn blocks(patches: usize) -> usize {
        patches.div_ceil(PATCHES)
    }

    pub(super) fn forward_backward(gpu: &Gpu, args: ForwardBackward<'_>) -> Result<()> {
        let numbers = *args.pred.shape().last().expect("checked: (B, M, E)");
        let (elems, dtype) = (args.pred.elems(), args.pred.dtype());
        let patches = elems / numbers;
        let blocks = blocks(patches);
        let (partials, _) = args.workspace.carve_tensor(DType::F64, blocks);
        let partials = partials.dev_ptr();
        let params = Params {
            grad_pred: args.grad_pred.dev_ptr(),
            pred: args.pred.dev_ptr(),
            target: args.target.dev_ptr(),
            partials,
            patches: patches as i64,
            numbers: numbers as u32,
            norm_pix: u32::from(args.norm_pix),
            grad_scale: (2.0 * args.scale / elems as f64) as f32,
            eps: NORM_PIX_EPS as f32,
        };
        let in_registers = |most| numbers.is_multiple_of(4) && numbers <= most;
        let kernel = match dtype {
            DType::Bf16 if in_registers(256) => "masked_mse_loss_bf16_256",
            DType::Bf16 if in_registers(768) => "masked_mse_loss_bf16_768",
            DType::Bf16 => "masked_mse_loss_bf16_any",
            _ if in_registers(256) => "masked_mse_loss_f32_256",
            _ if in_registers(768) => "masked_mse_loss_f32_768",
            _ => "masked_mse_loss_f32_any",
        };
        gpu.launch(kernel, blocks, BLOCK, 0, &params)?;
        let count = blocks as i64;
        let scale = args.scale / elems as f64;
        let params = SumParams { loss: args.loss.dev_ptr(), partials, count, scale };
        gpu.launch("masked_mse_loss_sum", 1, SUM_BLOCK, 0, &params)
    }
}
