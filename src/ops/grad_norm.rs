//! L2 norm of all gradients: what is logged, clipped by, and asked whether a step may be taken.

use super::{cost, for_real};
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

/// Elements whose squares make one partial sum on the CPU.
const PIECE: usize = 65_536;

/// Bytes of workspace for `elems` (N) gradients.
#[must_use]
pub fn workspace_bytes(dev: &Device, elems: usize) -> usize {
    let partials = match dev {
        Device::Cpu(_) => elems.div_ceil(PIECE),
        Device::Cuda(_) => launch::blocks(elems),
    };
    carve_bytes(DType::F64, partials)
}

/// `norm = sqrt(sum of grad^2)`, added up in f64, in a fixed order.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) or [`Error::DType`](crate::Error::DType) unless the arguments are as their
/// fields say; [`Error::Workspace`](crate::Error::Workspace) if the workspace is too small.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let call = Call { op: "grad_norm", dev };
    let dtype = args.grad.expect_real(call, "grad")?.wide();
    let [elems] = args.grad.dims(call, "grad", "(N)")?;
    args.grad.expect(call, "grad", dtype, &[elems])?;
    args.norm.expect(call, "norm", dtype, &[1])?;
    expect_workspace(call, &args.workspace, workspace_bytes(dev, elems))?;
    let _span = dev.span("grad_norm::forward", || cost::grad_norm_forward(dtype, elems));
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::forward::<T>(args)),
        Device::Cuda(gpu) => launch::forward(gpu, args)?,
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

mod launch {
    use super::Forward;
    use crate::cuda::{DevPtr, Gpu};
    use crate::{DType, Result};

    /// As in `kernels/grad_norm.cu`.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    struct PartialParams {
        grad: DevPtr,
        partials: DevPtr,
        elems: i64,
    }
    const _: () = assert!(size_of::<PartialParams>() == 24);

    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    struct SumParams {
        norm: DevPtr,
        partials: DevPtr,
        count: i64,
    }
    const _: () = assert!(size_of::<SumParams>() == 24);

    const BLOCK: u32 = 256;
    const SUM_BLOCK: u32 = 512;
    /// Elements of a block.
    const PIECE: usize = 16_384;

    /// Blocks for this many elements; each leaves a partial sum. One even where there is nothing to add up.
    pub(super) fn blocks(elems: usize) -> usize {
        elems.div_ceil(PIECE).max(1)
    }

    pub(super) fn forward(gpu: &Gpu, args: Forward<'_>) -> Result<()> {
        let elems = args.grad.elems();
        let blocks = blocks(elems);
        let (partials, _) = args.workspace.carve_tensor(DType::F64, blocks);
        let partials = partials.dev_ptr();
        let params = PartialParams { grad: args.grad.dev_ptr(), partials, elems: elems as i64 };
        gpu.launch("grad_norm_partial", blocks, BLOCK, 0, &params)?;
        let params = SumParams { norm: args.norm.dev_ptr(), partials, count: blocks as i64 };
        gpu.launch("grad_norm_sum", 1, SUM_BLOCK, 0, &params)
    }
}
