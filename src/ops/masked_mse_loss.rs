//! The reconstruction loss: mean squared error over the numbers of the masked patches, and its gradient.
//!
//! `loss = mean over B M E of (pred - t)^2`, where `t = target`, or with `norm_pix` the target patch minus its mean, over
//! `sqrt(var + 1e-6)`, var with `E - 1` below (He et al. 2021, section 4; `norm_pix_loss` of the MAE source). Every image
//! masks the same number of patches, so this is the sum over masked patches divided by their number.

use super::{expect_nonzero, for_real};
use crate::device::Call;
use crate::tensor::{carve_bytes, expect_workspace};
use crate::{DType, Device, Result, TensorMut, TensorRef};

/// Added to a target patch's variance.
pub const NORM_PIX_EPS: f64 = 1e-6;

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
    carve_bytes(dtype, patches)
}

/// Value and gradient in one pass.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) or [`Error::DType`](crate::Error::DType) unless the arguments are as their
/// fields say; [`Error::Invalid`](crate::Error::Invalid) for `norm_pix` of a single number;
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
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::forward_backward::<T>(args)),
        Device::Cuda(gpu) => return Err(gpu.missing()),
    }
    Ok(())
}

mod cpu {
    use rayon::prelude::*;

    use super::{ForwardBackward, NORM_PIX_EPS};
    use crate::cpu::{Real, rows_per_task, simd, sum};

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
                    let (shift, factor) =
                        if args.norm_pix { standardise(target) } else { (T::ZERO, T::ONE) };
                    let error = |pred: T, target: T| pred - (target - shift) * factor;
                    *loss = sum([pred, target], |[p, t]| error(p, t) * error(p, t));
                    for ((grad, &p), &t) in grad.iter_mut().zip(pred).zip(target) {
                        *grad = T::of(2.0) * per_number * error(p, t);
                    }
                }
            });
        });
        let total = losses.iter().map(|loss| loss.to_f64()).sum::<f64>();
        let [loss] = args.loss.into_slice::<T>() else { unreachable!("checked: (1)") };
        *loss = *loss + T::of(total * args.scale / (patches * numbers) as f64);
    }

    /// A patch's mean, and one over its standard deviation.
    #[inline(always)]
    fn standardise<T: Real>(patch: &[T]) -> (T, T) {
        let n = patch.len() as f64;
        let mean = sum([patch], |[x]| x) / T::of(n);
        let var = sum([patch], |[x]| (x - mean) * (x - mean)) / T::of(n - 1.0);
        (mean, T::ONE / (var + T::of(NORM_PIX_EPS)).sqrt())
    }
}
