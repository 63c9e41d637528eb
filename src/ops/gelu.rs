//! GELU in its exact form (Hendrycks and Gimpel 2016, arXiv:1606.08415): `x cdf(x)`, cdf the normal distribution's.

use super::for_real;
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
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::forward::<T>(args)),
        Device::Cuda(gpu) => return Err(gpu.missing()),
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
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::backward::<T>(args)),
        Device::Cuda(gpu) => return Err(gpu.missing()),
    }
    Ok(())
}

pub(super) mod cpu {
    use rayon::prelude::*;

    use super::{Backward, Forward};
    use crate::cpu::{Real, simd};

    /// Elements of a piece of work.
    const PIECE: usize = 16_384;

    #[inline(always)]
    pub(in crate::ops) fn value<T: Real>(x: T) -> T {
        x * x.normal_cdf_pdf().0
    }

    #[inline(always)]
    pub(in crate::ops) fn slope<T: Real>(x: T) -> T {
        let (cdf, pdf) = x.normal_cdf_pdf();
        cdf + x * pdf
    }

    pub(super) fn forward<T: Real>(args: Forward<'_>) {
        let out = args.out.into_slice::<T>().par_chunks_mut(PIECE);
        out.zip(args.inp.as_slice::<T>().par_chunks(PIECE)).for_each(|(out, inp)| {
            simd!(|| out.iter_mut().zip(inp).for_each(|(y, &x)| *y = value(x)));
        });
    }

    pub(super) fn backward<T: Real>(args: Backward<'_>) {
        let inp = args.inp.as_slice::<T>().par_chunks(PIECE);
        let grad_out = args.grad_out.as_slice::<T>().par_chunks(PIECE);
        let grad_inp = args.grad_inp.into_slice::<T>().par_chunks_mut(PIECE);
        grad_inp.zip(grad_out.zip(inp)).for_each(|(grad_inp, (grad_out, inp))| {
            simd!(|| {
                for ((grad, &out), &x) in grad_inp.iter_mut().zip(grad_out).zip(inp) {
                    *grad = out * slope(x);
                }
            });
        });
    }
}
