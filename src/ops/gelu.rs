//! GELU in its exact form (Hendrycks and Gimpel 2016, arXiv:1606.08415): `x cdf(x)`, cdf the normal distribution's.

use super::{cost, for_real};
use crate::device::Call;
use crate::{DType, Device, Result, TensorMut, TensorRef};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// Any shape. Overwritten.
    pub out: TensorMut<'a>,
    /// As `out`.
    pub inp: TensorRef<'a>,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// Any shape. Overwritten.
    pub grad_inp: TensorMut<'a>,
    /// As `grad_inp`.
    pub grad_out: TensorRef<'a>,
    /// As `grad_inp`; the input of [`forward`].
    pub inp: TensorRef<'a>,
}

/// `out = inp cdf(inp)`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) or [`Error::DType`](crate::Error::DType) unless all tensors agree.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let call = Call { op: "gelu::forward", dev };
    let dtype: DType = args.inp.expect_real(call, "inp")?;
    args.out.expect(call, "out", dtype, args.inp.shape())?;
    let _span = dev.span("gelu::forward", || cost::gelu_forward(dtype, args.inp.elems()));
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::forward::<T>(args)),
        Device::Cuda(gpu) => {
            let (out, inp) = (args.out.dev_ptr(), args.inp.dev_ptr());
            launch::forward(gpu, dtype, out, inp, args.inp.elems())?;
        }
    }
    Ok(())
}

/// `grad_inp = grad_out (cdf(inp) + inp pdf(inp))`.
///
/// # Errors
/// As [`forward`].
pub fn backward(dev: &Device, args: Backward<'_>) -> Result<()> {
    let call = Call { op: "gelu::backward", dev };
    let dtype: DType = args.inp.expect_real(call, "inp")?;
    args.grad_inp.expect(call, "grad_inp", dtype, args.inp.shape())?;
    args.grad_out.expect(call, "grad_out", dtype, args.inp.shape())?;
    let _span = dev.span("gelu::backward", || cost::gelu_backward(dtype, args.inp.elems()));
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::backward::<T>(args)),
        Device::Cuda(gpu) => {
            let (grad_inp, grad_out) = (args.grad_inp.dev_ptr(), args.grad_out.dev_ptr());
            let (inp, count) = (args.inp.dev_ptr(), args.inp.elems());
            launch::backward(gpu, dtype, grad_inp, grad_out, inp, count)?;
        }
    }
    Ok(())
}

pub(super) mod launch {
    use std::mem::offset_of;

    use crate::cuda::{DevPtr, Gpu};
    use crate::{DType, Result};

    /// As `GeluForward` in `kernels/gelu.cu`.
    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct Forward {
        out: DevPtr,
        inp: DevPtr,
        count: i64,
    }
    const _: () = assert!(size_of::<Forward>() == 24 && offset_of!(Forward, count) == 16);

    /// As `GeluBackward` in `kernels/gelu.cu`.
    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct Backward {
        grad_inp: DevPtr,
        grad_out: DevPtr,
        inp: DevPtr,
        count: i64,
    }
    const _: () = assert!(size_of::<Backward>() == 32 && offset_of!(Backward, count) == 24);

    const THREADS: u32 = 256;

    /// A thread takes 2 x 16 bytes.
    fn grid(dtype: DType, count: usize) -> usize {
        count.div_ceil(THREADS as usize * 2 * 16 / dtype.size_bytes())
    }

    /// `out = inp cdf(inp)`, `count` numbers.
    pub(in crate::ops) fn forward(
        gpu: &Gpu,
        dtype: DType,
        out: DevPtr,
        inp: DevPtr,
        count: usize,
    ) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let kernel = match dtype {
            DType::Bf16 => "gelu_forward_bf16",
            _ => "gelu_forward_f32",
        };
        let params = Forward { out, inp, count: count as i64 };
        gpu.launch(kernel, grid(dtype, count), THREADS, 0, &params)
    }

    /// `grad_inp = grad_out (cdf(inp) + inp pdf(inp))`, `count` numbers; `grad_inp` may be `grad_out`.
    pub(in crate::ops) fn backward(
        gpu: &Gpu,
        dtype: DType,
        grad_inp: DevPtr,
        grad_out: DevPtr,
        inp: DevPtr,
        count: usize,
    ) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let kernel = match dtype {
            DType::Bf16 => "gelu_backward_bf16",
            _ => "gelu_backward_f32",
        };
        let params = Backward { grad_inp, grad_out, inp, count: count as i64 };
        gpu.launch(kernel, grid(dtype, count), THREADS, 0, &params)
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{Backward, Forward};
    use crate::cpu::{Real, simd};
    use crate::scalar::{gelu, gelu_slope};

    /// Elements of a piece of work.
    const PIECE: usize = 16_384;

    pub(super) fn forward<T: Real>(args: Forward<'_>) {
        let out = args.out.into_slice::<T>().par_chunks_mut(PIECE);
        out.zip(args.inp.as_slice::<T>().par_chunks(PIECE)).for_each(|(out, inp)| {
            simd!(|| out.iter_mut().zip(inp).for_each(|(y, &x)| *y = gelu(x)));
        });
    }

    pub(super) fn backward<T: Real>(args: Backward<'_>) {
        let inp = args.inp.as_slice::<T>().par_chunks(PIECE);
        let grad_out = args.grad_out.as_slice::<T>().par_chunks(PIECE);
        let grad_inp = args.grad_inp.into_slice::<T>().par_chunks_mut(PIECE);
        grad_inp.zip(grad_out.zip(inp)).for_each(|(grad_inp, (grad_out, inp))| {
            simd!(|| {
                for ((grad, &out), &x) in grad_inp.iter_mut().zip(grad_out).zip(inp) {
                    *grad = out * gelu_slope(x);
                }
            });
        });
    }
}
