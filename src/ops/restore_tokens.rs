//! The decoder's input: kept tokens back at their places, the mask token everywhere else, positions added.
//!
//! `out[b][0] = inp[b][0] + pos_embed[0]`; for patch `l` with place `r = ids_restore[b][l]`:
//! `out[b][1 + l] = (r < K ? inp[b][1 + r] : mask_token) + pos_embed[1 + l]`.

use super::{expect_ids, expect_nonzero, for_real};
use crate::device::Call;
use crate::tensor::{carve_bytes, expect_workspace};
use crate::{DType, Device, Result, TensorMut, TensorRef};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(B, 1 + L, D)`. Overwritten.
    pub out: TensorMut<'a>,
    /// `(B, 1 + K, D)`.
    pub inp: TensorRef<'a>,
    /// `(B, L)` i32.
    pub ids_restore: TensorRef<'a>,
    /// `(D)`.
    pub mask_token: TensorRef<'a>,
    /// `(1 + L, D)`.
    pub pos_embed: TensorRef<'a>,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// `(B, 1 + K, D)`. Overwritten.
    pub grad_inp: TensorMut<'a>,
    /// `(D)`. Accumulates.
    pub grad_mask_token: TensorMut<'a>,
    /// `(B, 1 + L, D)`.
    pub grad_out: TensorRef<'a>,
    /// `(B, L)` i32: a permutation of `0..L` in each row, as [`super::random_masking`] makes it.
    pub ids_restore: TensorRef<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Bytes of workspace that [`backward`] needs for `images` (B) of width `dim` (D).
#[must_use]
pub fn workspace_bytes(dev: &Device, dtype: DType, images: usize, dim: usize) -> usize {
    carve_bytes(dtype, images * dim)
}

/// Puts tokens back.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) or [`Error::DType`](crate::Error::DType) unless the arguments are as their
/// fields say; [`Error::Invalid`](crate::Error::Invalid) for an id outside its bounds.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    match dev {
        Device::Cpu(_) => for_real!(dims.dtype, T => cpu::forward::<T>(args, dims)),
        Device::Cuda(gpu) => return Err(gpu.missing()),
    }
    Ok(())
}

/// Gradients of [`forward`].
///
/// # Errors
/// As [`forward`]; [`Error::Workspace`](crate::Error::Workspace) if the workspace is too small.
pub fn backward(dev: &Device, args: Backward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    match dev {
        Device::Cpu(_) => for_real!(dims.dtype, T => cpu::backward::<T>(args, dims)),
        Device::Cuda(gpu) => return Err(gpu.missing()),
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Dims {
    images: usize,
    kept: usize,
    patches: usize,
    dim: usize,
    dtype: DType,
}

fn dims(
    call: Call<'_>,
    inp: (&'static str, &[usize], DType),
    ids_restore: &TensorRef<'_>,
) -> Result<Dims> {
    let (arg, shape, dtype) = inp;
    let [images, patches] = ids_restore.dims(call, "ids_restore", "(B, L)")?;
    ids_restore.expect(call, "ids_restore", DType::I32, &[images, patches])?;
    expect_nonzero(call, "ids_restore", &[images, patches])?;
    expect_ids(call, "ids_restore", &ids_restore, patches)?;
    match *shape {
        [b, tokens, dim] if b == images && (1..=1 + patches).contains(&tokens) && dim > 0 => {
            Ok(Dims { images, kept: tokens - 1, patches, dim, dtype })
        }
        _ => {
            let expected = format!("[{images}, 1 to {}, D]", 1 + patches);
            Err(crate::Error::Shape { op: call.op, arg, expected, found: shape.to_vec() })
        }
    }
}

impl Forward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "restore_tokens::forward", dev };
        let dtype = self.inp.expect_real(call, "inp")?;
        let dims = dims(call, ("inp", self.inp.shape(), dtype), &self.ids_restore)?;
        let Dims { images, patches, dim, .. } = dims;
        self.out.expect(call, "out", dtype, &[images, 1 + patches, dim])?;
        self.mask_token.expect(call, "mask_token", dtype, &[dim])?;
        self.pos_embed.expect(call, "pos_embed", dtype, &[1 + patches, dim])?;
        Ok(dims)
    }
}

impl Backward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "restore_tokens::backward", dev };
        let dtype = self.grad_inp.expect_real(call, "grad_inp")?;
        let dims = dims(call, ("grad_inp", self.grad_inp.shape(), dtype), &self.ids_restore)?;
        let Dims { images, patches, dim, .. } = dims;
        self.grad_out.expect(call, "grad_out", dtype, &[images, 1 + patches, dim])?;
        self.grad_mask_token.expect(call, "grad_mask_token", dtype.wide(), &[dim])?;
        expect_workspace(call, &self.workspace, workspace_bytes(dev, dtype, images, dim))?;
        Ok(dims)
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{Backward, Dims, Forward};
    use crate::cpu::{Real, add_rows, simd};

    pub(super) fn forward<T: Real>(args: Forward<'_>, dims: Dims) {
        let Dims { kept, patches, dim, .. } = dims;
        let (mask_token, pos) = (args.mask_token.as_slice::<T>(), args.pos_embed.as_slice::<T>());
        let inp = args.inp.as_slice::<T>().par_chunks((1 + kept) * dim);
        let ids = args.ids_restore.as_slice::<i32>().par_chunks(patches);
        let out = args.out.into_slice::<T>().par_chunks_mut((1 + patches) * dim);
        out.zip(inp).zip(ids).for_each(|((out, inp), ids)| {
            simd!(|| {
                for (t, out) in out.chunks_exact_mut(dim).enumerate() {
                    // Token 0 is the class token, wherever the patches stand.
                    let place = if t == 0 { 0 } else { 1 + ids[t - 1] as usize };
                    let token = if place <= kept { &inp[place * dim..][..dim] } else { mask_token };
                    for ((y, &x), &pos) in out.iter_mut().zip(token).zip(&pos[t * dim..]) {
                        *y = x + pos;
                    }
                }
            });
        });
    }

    pub(super) fn backward<T: Real>(args: Backward<'_>, dims: Dims) {
        let Dims { images, kept, patches, dim, .. } = dims;
        let (partials, _) = args.workspace.carve::<T>(images * dim);
        let ids = args.ids_restore.as_slice::<i32>().par_chunks(patches);
        let grad_out = args.grad_out.as_slice::<T>().par_chunks((1 + patches) * dim);
        let grad_inp = args.grad_inp.into_slice::<T>().par_chunks_mut((1 + kept) * dim);
        let sums = partials.par_chunks_mut(dim);
        grad_inp.zip(sums).zip(grad_out.zip(ids)).for_each(|((grad_inp, sum), (grad_out, ids))| {
            sum.fill(T::ZERO);
            simd!(|| {
                for (t, grad) in grad_out.chunks_exact(dim).enumerate() {
                    let place = if t == 0 { 0 } else { 1 + ids[t - 1] as usize };
                    if place <= kept {
                        grad_inp[place * dim..][..dim].copy_from_slice(grad);
                    } else {
                        sum.iter_mut().zip(grad).for_each(|(sum, &g)| *sum = *sum + g);
                    }
                }
            });
        });
        add_rows(args.grad_mask_token.into_slice(), partials);
    }
}
