//! Kept tokens back at their places, a row of its own for each masked place: the decoder's tokens.
//!
//! `out[b][0] = inp[b][0]`; for patch `l` with place `r = ids_restore[b][l]`: `out[b][1 + l] = inp[b][1 + r]` if `r < K`,
//! else `fill[l]`. What stands at a masked patch depends on its position alone, so whatever the decoder computes of one
//! token by itself, it computes once for each position and not for each image.

use super::{cost, expect_ids, expect_nonzero, expect_vectors, for_real};
use crate::device::Call;
use crate::{DType, Device, Error, Result, TensorMut, TensorRef};

/// Arguments of [`forward`]. W is the width of a row: D for tokens, 3 D for packed queries, keys and values.
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(B, 1 + L, W)`. Overwritten.
    pub out: TensorMut<'a>,
    /// `(B, 1 + K, W)`, the class token first.
    pub inp: TensorRef<'a>,
    /// `(L, W)`: what stands at each patch of the images that mask it.
    pub fill: TensorRef<'a>,
    /// `(B, L)` i32.
    pub ids_restore: TensorRef<'a>,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// `(B, 1 + K, W)`. Overwritten.
    pub grad_inp: TensorMut<'a>,
    /// `(L, W)`: for each patch the sum over the images that mask it. Overwritten.
    pub grad_fill: TensorMut<'a>,
    /// `(B, 1 + L, W)`.
    pub grad_out: TensorRef<'a>,
    /// `(B, L)` i32: a permutation of `0..L` in each row, as [`super::random_masking`] makes it.
    pub ids_restore: TensorRef<'a>,
}

/// Puts tokens back.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] unless the arguments are as their fields say, and on a GPU W is a multiple of 8;
/// [`Error::Invalid`] for an id outside its bounds.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev
        .span("restore_tokens::forward", || cost::restore_tokens_forward(dims.dtype, dims.shape()));
    match dev {
        Device::Cpu(_) => for_real!(dims.dtype, T => cpu::forward::<T>(args, dims)),
        Device::Cuda(gpu) => launch::forward(gpu, args, dims)?,
    }
    Ok(())
}

/// Gradients of [`forward`].
///
/// # Errors
/// As [`forward`].
pub fn backward(dev: &Device, args: Backward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev.span("restore_tokens::backward", || {
        cost::restore_tokens_backward(dims.dtype, dims.shape())
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
    kept: usize,
    patches: usize,
    width: usize,
    dtype: DType,
}

impl Dims {
    /// `[B, L, K, W]`.
    fn shape(self) -> [usize; 4] {
        [self.images, self.patches, self.kept, self.width]
    }
}

fn dims(
    call: Call<'_>,
    (arg, inp, dtype): (&'static str, &[usize], DType),
    ids_restore: &TensorRef<'_>,
) -> Result<Dims> {
    let [images, patches] = ids_restore.dims(call, "ids_restore", "(B, L)")?;
    ids_restore.expect(call, "ids_restore", DType::I32, &[images, patches])?;
    expect_nonzero(call, "ids_restore", &[images, patches])?;
    expect_ids(call, "ids_restore", ids_restore, patches)?;
    match *inp {
        [b, tokens, width] if b == images && (1..=1 + patches).contains(&tokens) && width > 0 => {
            expect_vectors(call, arg, inp)?;
            Ok(Dims { images, kept: tokens - 1, patches, width, dtype })
        }
        _ => {
            let expected = format!("[{images}, 1 to {}, W]", 1 + patches);
            Err(Error::Shape { op: call.op, arg, expected, found: inp.to_vec() })
        }
    }
}

impl Forward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "restore_tokens::forward", dev };
        let dtype = self.inp.expect_real(call, "inp")?;
        let dims = dims(call, ("inp", self.inp.shape(), dtype), &self.ids_restore)?;
        let Dims { images, kept, patches, width, .. } = dims;
        self.out.expect(call, "out", dtype, &[images, 1 + patches, width])?;
        self.inp.expect(call, "inp", dtype, &[images, 1 + kept, width])?;
        self.fill.expect(call, "fill", dtype, &[patches, width])?;
        Ok(dims)
    }
}

impl Backward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "restore_tokens::backward", dev };
        let dtype = self.grad_inp.expect_real(call, "grad_inp")?;
        let dims = dims(call, ("grad_inp", self.grad_inp.shape(), dtype), &self.ids_restore)?;
        let Dims { images, kept, patches, width, .. } = dims;
        self.grad_inp.expect(call, "grad_inp", dtype, &[images, 1 + kept, width])?;
        self.grad_fill.expect(call, "grad_fill", dtype, &[patches, width])?;
        self.grad_out.expect(call, "grad_out", dtype, &[images, 1 + patches, width])?;
        Ok(dims)
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{Backward, Dims, Forward};
    use crate::cpu::{Real, simd};

    pub(super) fn forward<T: Real>(args: Forward<'_>, dims: Dims) {
        let Dims { kept, patches, width, .. } = dims;
        let fill = args.fill.as_slice::<T>();
        let inp = args.inp.as_slice::<T>().par_chunks((1 + kept) * width);
        let ids = args.ids_restore.as_slice::<i32>().par_chunks(patches);
        let out = args.out.into_slice::<T>().par_chunks_mut((1 + patches) * width);
        out.zip(inp).zip(ids).for_each(|((out, inp), ids)| {
            let (class, out) = out.split_at_mut(width);
            class.copy_from_slice(&inp[..width]);
            let places = ids.iter().map(|&place| place as usize);
            for ((out, fill), place) in
                out.chunks_exact_mut(width).zip(fill.chunks_exact(width)).zip(places)
            {
                let kept_token = || &inp[(1 + place) * width..][..width];
                out.copy_from_slice(if place < kept { kept_token() } else { fill });
            }
        });
    }

    pub(super) fn backward<T: Real>(args: Backward<'_>, dims: Dims) {
        let Dims { kept, patches, width, .. } = dims;
        let grad_out = args.grad_out.as_slice::<T>();
        let ids = args.ids_restore.as_slice::<i32>();
        let images = || grad_out.par_chunks((1 + patches) * width).zip(ids.par_chunks(patches));
        let grad_inp = args.grad_inp.into_slice::<T>().par_chunks_mut((1 + kept) * width);
        grad_inp.zip(images()).for_each(|(grad_inp, (grad_out, ids))| {
            let (class, tokens) = grad_out.split_at(width);
            grad_inp[..width].copy_from_slice(class);
            for (grad, &place) in tokens.chunks_exact(width).zip(ids) {
                let place = place as usize;
                if place < kept {
                    grad_inp[(1 + place) * width..][..width].copy_from_slice(grad);
                }
            }
        });
        // Threads take patches, so that the images are always summed in the same order.
        let grad_fill = args.grad_fill.into_slice::<T>().par_chunks_mut(width);
        grad_fill.enumerate().for_each(|(l, sum)| {
            sum.fill(T::ZERO);
            let images = grad_out.chunks_exact((1 + patches) * width);
            simd!(|| {
                for (grad_out, ids) in images.zip(ids.chunks_exact(patches)) {
                    if ids[l] as usize >= kept {
                        let grad = &grad_out[(1 + l) * width..];
                        sum.iter_mut().zip(grad).for_each(|(sum, &g)| *sum = *sum + g);
                    }
                }
            });
        });
    }
}

mod launch {
    use super::{Backward, Dims, Forward};
    use crate::cuda::{DevPtr, Gpu};
    use crate::ops::rows;
    use crate::{DType, Result};

    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct RestoreTokensForward {
        out: DevPtr,
        inp: DevPtr,
        fill: DevPtr,
        ids_restore: DevPtr,
        patches: u32,
        kept: u32,
        chunks: u32,
        blocks: u32,
    }
    const _: () = assert!(size_of::<RestoreTokensForward>() == 48);

    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct RestoreTokensBackward {
        grad_inp: DevPtr,
        grad_fill: DevPtr,
        grad_out: DevPtr,
        ids_restore: DevPtr,
        images: u32,
        patches: u32,
        kept: u32,
        width: u32,
        stripes: u64,
    }
    const _: () = assert!(size_of::<RestoreTokensBackward>() == 56);

    /// Bytes of a row that a block of `restore_tokens_backward_*` takes: 16 for each lane.
    const STRIPE_BYTES: usize = 512;
    const BACKWARD_THREADS: u32 = 256;

    pub(super) fn forward(gpu: &Gpu, args: Forward<'_>, dims: Dims) -> Result<()> {
        let blocks = rows::blocks(1 + dims.patches);
        let params = RestoreTokensForward {
            out: args.out.dev_ptr(),
            inp: args.inp.dev_ptr(),
            fill: args.fill.dev_ptr(),
            ids_restore: args.ids_restore.dev_ptr(),
            patches: dims.patches as u32,
            kept: dims.kept as u32,
            chunks: rows::chunks(dims.dtype, dims.width),
            blocks: blocks as u32,
        };
        gpu.launch("restore_tokens_forward", dims.images * blocks, rows::THREADS, 0, &params)
    }

    pub(super) fn backward(gpu: &Gpu, args: Backward<'_>, dims: Dims) -> Result<()> {
        let stripes = (dims.width * dims.dtype.size_bytes()).div_ceil(STRIPE_BYTES);
        let params = RestoreTokensBackward {
            grad_inp: args.grad_inp.dev_ptr(),
            grad_fill: args.grad_fill.dev_ptr(),
            grad_out: args.grad_out.dev_ptr(),
            ids_restore: args.ids_restore.dev_ptr(),
            images: dims.images as u32,
            patches: dims.patches as u32,
            kept: dims.kept as u32,
            width: dims.width as u32,
            stripes: stripes as u64,
        };
        let kernel = match dims.dtype {
            DType::Bf16 => "restore_tokens_backward_bf16",
            _ => "restore_tokens_backward_f32",
        };
        gpu.launch(kernel, (1 + dims.patches) * stripes, BACKWARD_THREADS, 0, &params)
    }
}
