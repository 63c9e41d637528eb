//! The decoder's input: kept tokens with the positions they come from, and below them the mask token at every position.
//!
//! Row `b (1 + K)` of `out` is `inp[b][0] + pos_embed[0]`, row `b (1 + K) + 1 + k` is
//! `inp[b][1 + k] + pos_embed[1 + ids_keep[b][k]]`. The last L rows, `mask_token + pos_embed[1 + l]`, are the same for all
//! images: [`super::restore_tokens`] fills the masked places with them.

use super::{cost, expect_ids, expect_nonzero, expect_vectors, for_real, linear};
use crate::device::Call;
use crate::tensor::expect_workspace;
use crate::{DType, Device, Result, TensorMut, TensorRef};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(B (1 + K) + L, D)`. Overwritten.
    pub out: TensorMut<'a>,
    /// `(B, 1 + K, D)`, the class token first.
    pub inp: TensorRef<'a>,
    /// `(B, K)` i32.
    pub ids_keep: TensorRef<'a>,
    /// `(D)`.
    pub mask_token: TensorRef<'a>,
    /// `(1 + L, D)`, row 0 the class token's.
    pub pos_embed: TensorRef<'a>,
}

/// Arguments of [`backward`]. The gradient of `inp` is the gradient of the first `B (1 + K)` rows as it is.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `(D)`. Accumulates.
    pub grad_mask_token: TensorMut<'a>,
    /// `(L, D)`: gradient of the last L rows.
    pub grad_fill: TensorRef<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Bytes of workspace that [`backward`] needs for `patches` (L) of width `dim` (D).
#[must_use]
pub fn workspace_bytes(dev: &Device, patches: usize, dim: usize) -> usize {
    match dev {
        Device::Cpu(_) => 0,
        Device::Cuda(_) => linear::launch::workspace_bytes(patches, dim),
    }
}

/// Adds positions.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) or [`Error::DType`](crate::Error::DType) unless the arguments are as their
/// fields say, and on a GPU D is a multiple of 8; [`Error::Invalid`](crate::Error::Invalid) for an id outside its bounds.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev.span("add_positions::forward", || {
        cost::add_positions_forward(dims.dtype, [dims.images, dims.patches, dims.kept, dims.dim])
    });
    match dev {
        Device::Cpu(_) => for_real!(dims.dtype, T => cpu::forward::<T>(args, dims)),
        Device::Cuda(gpu) => launch::forward(gpu, args, dims)?,
    }
    Ok(())
}

/// Gradient of [`forward`]'s mask token: the sum of the rows of `grad_fill`.
///
/// # Errors
/// As [`forward`], and there are no ids; [`Error::Workspace`](crate::Error::Workspace) if the workspace is too small.
pub fn backward(dev: &Device, args: Backward<'_>) -> Result<()> {
    let dtype = args.check(dev)?;
    let _span = dev.span("add_positions::backward", || {
        cost::add_positions_backward(dtype, [0, 1].map(|axis| args.grad_fill.shape()[axis]))
    });
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::backward::<T>(args)),
        Device::Cuda(gpu) => linear::launch::add_column_sums(
            gpu,
            args.grad_mask_token,
            args.grad_fill,
            args.workspace,
        )?,
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

impl Forward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "add_positions::forward", dev };
        let dtype = self.inp.expect_real(call, "inp")?;
        let [images, tokens, dim] = self.inp.dims(call, "inp", "(B, 1 + K, D)")?;
        let [positions, _] = self.pos_embed.dims(call, "pos_embed", "(1 + L, D)")?;
        expect_nonzero(call, "inp", self.inp.shape())?;
        expect_nonzero(call, "pos_embed", self.pos_embed.shape())?;
        expect_vectors(call, "inp", self.inp.shape())?;
        let (kept, patches) = (tokens - 1, positions - 1);
        self.out.expect(call, "out", dtype, &[images * tokens + patches, dim])?;
        self.inp.expect(call, "inp", dtype, &[images, tokens, dim])?;
        self.ids_keep.expect(call, "ids_keep", DType::I32, &[images, kept])?;
        self.mask_token.expect(call, "mask_token", dtype, &[dim])?;
        self.pos_embed.expect(call, "pos_embed", dtype, &[positions, dim])?;
        expect_ids(call, "ids_keep", &self.ids_keep, patches)?;
        Ok(Dims { images, kept, patches, dim, dtype })
    }
}

impl Backward<'_> {
    fn check(&self, dev: &Device) -> Result<DType> {
        let call = Call { op: "add_positions::backward", dev };
        let dtype = self.grad_fill.expect_real(call, "grad_fill")?;
        let [patches, dim] = self.grad_fill.dims(call, "grad_fill", "(L, D)")?;
        expect_nonzero(call, "grad_fill", self.grad_fill.shape())?;
        expect_vectors(call, "grad_fill", self.grad_fill.shape())?;
        self.grad_fill.expect(call, "grad_fill", dtype, &[patches, dim])?;
        self.grad_mask_token.expect(call, "grad_mask_token", dtype.wide(), &[dim])?;
        expect_workspace(call, &self.workspace, workspace_bytes(dev, patches, dim))?;
        Ok(dtype)
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{Backward, Dims, Forward};
    use crate::cpu::{Real, add_rows, simd};

    pub(super) fn forward<T: Real>(args: Forward<'_>, dims: Dims) {
        let Dims { images, kept, dim, .. } = dims;
        let (mask_token, pos) = (args.mask_token.as_slice::<T>(), args.pos_embed.as_slice::<T>());
        let (inp, ids) = (args.inp.as_slice::<T>(), args.ids_keep.as_slice::<i32>());
        let (rows, fill) = args.out.into_slice::<T>().split_at_mut(images * (1 + kept) * dim);
        rows.par_chunks_mut((1 + kept) * dim).enumerate().for_each(|(b, rows)| {
            let inp = &inp[b * (1 + kept) * dim..];
            let ids = &ids[b * kept..][..kept];
            // The class token's position stands before those of the patches.
            let positions = std::iter::once(0).chain(ids.iter().map(|&id| 1 + id as usize));
            simd!(|| {
                let rows = rows.chunks_exact_mut(dim).zip(inp.chunks_exact(dim));
                for ((out, inp), at) in rows.zip(positions) {
                    for ((y, &x), &pos) in out.iter_mut().zip(inp).zip(&pos[at * dim..]) {
                        *y = x + pos;
                    }
                }
            });
        });
        simd!(|| {
            for (out, pos) in fill.chunks_exact_mut(dim).zip(pos[dim..].chunks_exact(dim)) {
                for ((y, &x), &pos) in out.iter_mut().zip(mask_token).zip(pos) {
                    *y = x + pos;
                }
            }
        });
    }

    pub(super) fn backward<T: Real>(args: Backward<'_>) {
        add_rows(args.grad_mask_token.into_slice(), args.grad_fill.as_slice::<T>());
    }
}

mod launch {
    use super::{Dims, Forward};
    use crate::cuda::{DevPtr, Gpu};
    use crate::ops::rows;
    use crate::{DType, Result};

    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct AddPositionsForward {
        out: DevPtr,
        inp: DevPtr,
        mask_token: DevPtr,
        pos_embed: DevPtr,
        ids_keep: DevPtr,
        images: u32,
        kept: u32,
        patches: u32,
        dim: u32,
        blocks: u32,
        fill_block: u32,
    }
    const _: () = assert!(size_of::<AddPositionsForward>() == 64);

    pub(super) fn forward(gpu: &Gpu, args: Forward<'_>, dims: Dims) -> Result<()> {
        let blocks = rows::blocks(1 + dims.kept);
        let fill_block = dims.images * blocks;
        let params = AddPositionsForward {
            out: args.out.dev_ptr(),
            inp: args.inp.dev_ptr(),
            mask_token: args.mask_token.dev_ptr(),
            pos_embed: args.pos_embed.dev_ptr(),
            ids_keep: args.ids_keep.dev_ptr(),
            images: dims.images as u32,
            kept: dims.kept as u32,
            patches: dims.patches as u32,
            dim: dims.dim as u32,
            blocks: blocks as u32,
            fill_block: fill_block as u32,
        };
        let kernel = match dims.dtype {
            DType::Bf16 => "add_positions_forward_bf16",
            _ => "add_positions_forward_f32",
        };
        let grid = fill_block + rows::blocks(dims.patches);
        gpu.launch(kernel, grid, rows::THREADS, 0, &params)
    }
}
