//! L2 norm of all gradients: what is logged, clipped by, and asked whether a step may be taken.

use super::for_real;
use crate::device::Call;
use crate::tensor::{carve_bytes, expect_workspace};
use crate::{DType, Device, Result, TensorMut, TensorRef};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(1)`. Overwritten; not finite if any gradient is not.
    pub norm: TensorMut<'a>,
    /// `(N)`.
    pub grad: TensorRef<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Elements whose squares make one partial sum.
const PIECE: usize = 65_536;

/// Bytes of workspace for `elems` (N) gradients.
#[must_use]
pub fn workspace_bytes(dev: &Device, elems: usize) -> usize {
    carve_bytes(DType::F64, elems.div_ceil(PIECE))
}

/// `norm = sqrt(sum of grad^2)`, added up in f64, in a fixed order.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) or [`Error::DType`](crate::Error::DType) unless the arguments are as their
/// fields say; [`Error::Workspace`](crate::Error::Workspace) if the workspace is too small.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let call = Call { op: "grad_norm", dev };
    let dtype = args.grad.expect_real(call, "grad")?;
    let [elems] = args.grad.dims(call, "grad", "(N)")?;
    args.norm.expect(call, "norm", dtype, &[1])?;
    expect_workspace(call, &args.workspace, workspace_bytes(dev, elems))?;
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::forward::<T>(args)),
        Device::Cuda(gpu) => return Err(gpu.missing()),
    }
    Ok(())
}

mod cpu {
    use rayon::prelude::*;

    use super::{Forward, PIECE};
    use crate::cpu::{Real, simd};

    pub(super) fn forward<T: Real>(args: Forward<'_>) {
        let grad = args.grad.as_slice::<T>();
        let (partials, _) = args.workspace.carve::<f64>(grad.len().div_ceil(PIECE));
        grad.par_chunks(PIECE).zip(partials.par_iter_mut()).for_each(|(grad, partial)| {
            *partial = simd!(|| {
                let mut lanes = [0.0; 16];
                for chunk in grad.chunks(16) {
                    for (lane, &g) in lanes.iter_mut().zip(chunk) {
                        *lane += g.to_f64() * g.to_f64();
                    }
                }
                lanes.into_iter().sum()
            });
        });
        let [norm] = args.norm.into_slice::<T>() else { unreachable!("checked: (1)") };
        *norm = T::of(partials.iter().sum::<f64>().sqrt());
    }
}
