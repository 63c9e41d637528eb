//! The masked patches' tokens, side by side: all that the end of the decoder works on, as the loss sees no others.
//!
//! `out[b][m] = inp[b][1 + ids_masked[b][m]]`. Nothing is lost: the gradient of the tokens left out is zero.

use super::{cost, expect_ids, expect_nonzero, expect_vectors, for_real};
use crate::device::Call;
use crate::{DType, Device, Error, Result, TensorMut, TensorRef};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(B, M, D)`. Overwritten.
    pub out: TensorMut<'a>,
    /// `(B, 1 + L, D)`, the class token first.
    pub inp: TensorRef<'a>,
    /// `(B, M)` i32: patches, each at most once in an image.
    pub ids_masked: TensorRef<'a>,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// `(B, 1 + L, D)`. Overwritten: zero where nothing was gathered.
    pub grad_inp: TensorMut<'a>,
    /// `(B, M, D)`.
    pub grad_out: TensorRef<'a>,
    /// `(B, L)` i32, as [`super::random_masking`] made it beside `ids_masked`: patch `l` is number `ids_restore[b][l]` of the
    /// kept and masked ones, so row `ids_restore[b][l] - (L - M)` of the gathered ones if that is not negative.
    pub ids_restore: TensorRef<'a>,
}

/// Gathers tokens.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] unless the arguments are as their fields say, and on a GPU D is a multiple of 8;
/// [`Error::Invalid`] for an id outside its bounds.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev.span("gather_tokens::forward", || {
        cost::gather_tokens_forward(dims.dtype, [dims.images, dims.masked, dims.dim])
    });
    match dev {
        Device::Cpu(_) => for_real!(dims.dtype, T => cpu::forward::<T>(args, dims)),
        Device::Cuda(gpu) => launch::forward(gpu, args, dims)?,
    }
    Ok(())
}

/// Gradient of [`forward`].
///
/// # Errors
/// As [`forward`].
pub fn backward(dev: &Device, args: Backward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev.span("gather_tokens::backward", || {
        cost::gather_tokens_backward(dims.dtype, [dims.images, dims.patches, dims.masked, dims.dim])
    });
    match dev {
        Device::Cpu(_) => for_real!(dims.dtype, T => cpu::backward::<T>(args, dims)),
        Device::Cuda(gpu) => launch::backward(gpu, args, dims)?,
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Dims {
    images: usize,
    patches: usize,
    masked: usize,
    dim: usize,
    dtype: DType,
}

/// Refuses more rows than there are patches: an image gives each at most once.
fn expect_masked(call: Call<'_>, arg: &'static str, shape: &[usize], patches: usize) -> Result<()> {
    if (1..=patches).contains(&shape[1]) {
        return Ok(());
    }
    let expected = format!("1 to {patches} masked patches of an image");
    Err(Error::Shape { op: call.op, arg, expected, found: shape.to_vec() })
}

impl Forward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "gather_tokens::forward", dev };
        let dtype = self.inp.expect_real(call, "inp")?;
        let [images, tokens, dim] = self.inp.dims(call, "inp", "(B, 1 + L, D)")?;
        let [_, masked] = self.ids_masked.dims(call, "ids_masked", "(B, M)")?;
        expect_nonzero(call, "inp", self.inp.shape())?;
        expect_vectors(call, "inp", self.inp.shape())?;
        expect_masked(call, "ids_masked", self.ids_masked.shape(), tokens - 1)?;
        self.inp.expect(call, "inp", dtype, &[images, tokens, dim])?;
        self.ids_masked.expect(call, "ids_masked", DType::I32, &[images, masked])?;
        self.out.expect(call, "out", dtype, &[images, masked, dim])?;
        expect_ids(call, "ids_masked", &self.ids_masked, tokens - 1)?;
        Ok(Dims { images, patches: tokens - 1, masked, dim, dtype })
    }
}

impl Backward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "gather_tokens::backward", dev };
        let dtype = self.grad_out.expect_real(call, "grad_out")?;
        let [images, masked, dim] = self.grad_out.dims(call, "grad_out", "(B, M, D)")?;
        let [_, patches] = self.ids_restore.dims(call, "ids_restore", "(B, L)")?;
        expect_nonzero(call, "grad_out", self.grad_out.shape())?;
        expect_vectors(call, "grad_out", self.grad_out.shape())?;
        expect_masked(call, "grad_out", self.grad_out.shape(), patches)?;
        self.grad_out.expect(call, "grad_out", dtype, &[images, masked, dim])?;
        self.ids_restore.expect(call, "ids_restore", DType::I32, &[images, patches])?;
        self.grad_inp.expect(call, "grad_inp", dtype, &[images, 1 + patches, dim])?;
        expect_ids(call, "ids_restore", &self.ids_restore, patches)?;
        Ok(Dims { images, patches, masked, dim, dtype })
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{Backward, Dims, Forward};
    use crate::cpu::Real;

    pub(super) fn forward<T: Real>(args: Forward<'_>, dims: Dims) {
        let Dims { patches, masked, dim, .. } = dims;
        let inp = args.inp.as_slice::<T>().par_chunks((1 + patches) * dim);
        let ids = args.ids_masked.as_slice::<i32>().par_chunks(masked);
        let out = args.out.into_slice::<T>().par_chunks_mut(masked * dim);
        out.zip(inp).zip(ids).for_each(|((out, inp), ids)| {
            for (out, &id) in out.chunks_exact_mut(dim).zip(ids) {
                out.copy_from_slice(&inp[(1 + id as usize) * dim..][..dim]);
            }
        });
    }

    pub(super) fn backward<T: Real>(args: Backward<'_>, dims: Dims) {
        let Dims { patches, masked, dim, .. } = dims;
        let kept = patches - masked;
        let grad_out = args.grad_out.as_slice::<T>().par_chunks(masked * dim);
        let ids = args.ids_restore.as_slice::<i32>().par_chunks(patches);
        let grad_inp = args.grad_inp.into_slice::<T>().par_chunks_mut((1 + patches) * dim);
        grad_inp.zip(grad_out).zip(ids).for_each(|((grad_inp, grad_out), ids)| {
            let (class, grad_inp) = grad_inp.split_at_mut(dim);
            class.fill(T::ZERO);
            for (grad, &place) in grad_inp.chunks_exact_mut(dim).zip(ids) {
                match (place as usize).checked_sub(kept) {
                    Some(row) => grad.copy_from_slice(&grad_out[row * dim..][..dim]),
                    None => grad.fill(T::ZERO),
                }
            }
        });
    }
}

mod launch {
    use super::{Backward, Dims, Forward};
    use crate::Result;
    use crate::cuda::{DevPtr, Gpu};
    use crate::ops::rows;

    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct GatherTokensForward {
        out: DevPtr,
        inp: DevPtr,
        ids_masked: DevPtr,
        patches: u32,
        masked: u32,
        chunks: u32,
        blocks: u32,
    }
    const _: () = assert!(size_of::<GatherTokensForward>() == 40);

    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct GatherTokensBackward {
        grad_inp: DevPtr,
        grad_out: DevPtr,
        ids_restore: DevPtr,
        patches: u32,
        masked: u32,
        chunks: u32,
        blocks: u32,
    }
    const _: () = assert!(size_of::<GatherTokensBackward>() == 40);

    pub(super) fn forward(gpu: &Gpu, args: Forward<'_>, dims: Dims) -> Result<()> {
        let blocks = rows::blocks(dims.masked);
        let params = GatherTokensForward {
            out: args.out.dev_ptr(),
            inp: args.inp.dev_ptr(),
            ids_masked: args.ids_masked.dev_ptr(),
            patches: dims.patches as u32,
            masked: dims.masked as u32,
            chunks: rows::chunks(dims.dtype, dims.dim),
            blocks: blocks as u32,
        };
        gpu.launch("gather_tokens_forward", dims.images * blocks, rows::THREADS, 0, &params)
    }

    pub(super) fn backward(gpu: &Gpu, args: Backward<'_>, dims: Dims) -> Result<()> {
        let blocks = rows::blocks(1 + dims.patches);
        let params = GatherTokensBackward {
            grad_inp: args.grad_inp.dev_ptr(),
            grad_out: args.grad_out.dev_ptr(),
            ids_restore: args.ids_restore.dev_ptr(),
            patches: dims.patches as u32,
            masked: dims.masked as u32,
            chunks: rows::chunks(dims.dtype, dims.dim),
            blocks: blocks as u32,
        };
        gpu.launch("gather_tokens_backward", dims.images * blocks, rows::THREADS, 0, &params)
    }
}
