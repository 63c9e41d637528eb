//! Patch embedding of the kept patches only, with positions and the class token.
//!
//! `out[b][0] = cls_token + pos_embed[0]`, `out[b][1 + k] = patches[b][k] weight^T + bias + pos_embed[1 + ids_keep[b][k]]`.
//! A convolution whose stride is its kernel's side is this product, so masked patches need none (exact).

use super::cost::{self, Cost};
use super::{expect_ids, expect_nonzero, expect_vectors, for_real};
use crate::device::Call;
use crate::tensor::{carve_bytes, expect_workspace};
use crate::{DType, Device, Result, TensorMut, TensorRef};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(B, 1 + K, D)`. Overwritten.
    pub out: TensorMut<'a>,
    /// `(B, K, E)`, numbers of a patch in (channel, row, column) order.
    pub patches: TensorRef<'a>,
    /// `(B, K)` i32.
    pub ids_keep: TensorRef<'a>,
    /// `(D, E)`.
    pub weight: TensorRef<'a>,
    /// `(D)`.
    pub bias: TensorRef<'a>,
    /// `(D)`.
    pub cls_token: TensorRef<'a>,
    /// `(1 + L, D)`, row 0 the class token's.
    pub pos_embed: TensorRef<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// `(D, E)`. Accumulates.
    pub grad_weight: TensorMut<'a>,
    /// `(D)`. Accumulates.
    pub grad_bias: TensorMut<'a>,
    /// `(D)`. Accumulates.
    pub grad_cls_token: TensorMut<'a>,
    /// `(B, 1 + K, D)`.
    pub grad_out: TensorRef<'a>,
    /// `(B, K, E)`, as given to [`forward`].
    pub patches: TensorRef<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Bytes of workspace for `images` (B), `kept` patches of each (K) and width `dim` (D).
#[must_use]
pub fn workspace_bytes(
    dev: &Device,
    dtype: DType,
    images: usize,
    kept: usize,
    dim: usize,
) -> usize {
    match dev {
        Device::Cpu(_) => carve_bytes(dtype, images * kept * dim),
        Device::Cuda(_) => launch::workspace_bytes(dtype, images, kept, dim),
    }
}

/// Embeds the kept patches.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) or [`Error::DType`](crate::Error::DType) unless the arguments are as their
/// fields say, and on a GPU D is a multiple of 8; [`Error::Invalid`](crate::Error::Invalid) for an id outside its bounds;
/// [`Error::Workspace`](crate::Error::Workspace) if the workspace is too small.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev.span("patch_embed::forward", || dims.forward_cost(args.pos_embed.shape()));
    match dev {
        Device::Cpu(cpu) => for_real!(dims.dtype, T => cpu::forward::<T>(args, dims, *cpu)),
        Device::Cuda(gpu) => launch::forward(gpu, args, dims)?,
    }
    Ok(())
}

/// Gradients of [`forward`]'s parameters; pixels need none.
///
/// # Errors
/// As [`forward`]; there are no ids.
pub fn backward(dev: &Device, args: Backward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev.span("patch_embed::backward", || {
        cost::patch_embed_backward(dims.dtype, [dims.images, dims.kept, dims.inputs, dims.dim])
    });
    match dev {
        Device::Cpu(cpu) => for_real!(dims.dtype, T => cpu::backward::<T>(args, dims, *cpu)),
        Device::Cuda(gpu) => launch::backward(gpu, args, dims)?,
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Dims {
    images: usize,
    kept: usize,
    inputs: usize,
    dim: usize,
    dtype: DType,
}

impl Dims {
    /// Of [`forward`], with positions of this shape.
    fn forward_cost(self, positions: &[usize]) -> Cost {
        let Self { images, kept, inputs, dim, dtype } = self;
        cost::patch_embed_forward(dtype, [images, positions[0] - 1, kept, inputs, dim])
    }
}

impl Forward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "patch_embed::forward", dev };
        let dtype = self.patches.expect_real(call, "patches")?;
        let [images, kept, inputs] = self.patches.dims(call, "patches", "(B, K, E)")?;
        let [dim, _] = self.weight.dims(call, "weight", "(D, E)")?;
        let [positions, _] = self.pos_embed.dims(call, "pos_embed", "(1 + L, D)")?;
        expect_nonzero(call, "patches", self.patches.shape())?;
        expect_nonzero(call, "weight", self.weight.shape())?;
        expect_nonzero(call, "pos_embed", self.pos_embed.shape())?;
        expect_vectors(call, "pos_embed", self.pos_embed.shape())?;
        self.patches.expect(call, "patches", dtype, &[images, kept, inputs])?;
        self.out.expect(call, "out", dtype, &[images, 1 + kept, dim])?;
        self.weight.expect(call, "weight", dtype, &[dim, inputs])?;
        self.bias.expect(call, "bias", dtype, &[dim])?;
        self.cls_token.expect(call, "cls_token", dtype, &[dim])?;
        self.pos_embed.expect(call, "pos_embed", dtype, &[positions, dim])?;
        self.ids_keep.expect(call, "ids_keep", DType::I32, &[images, kept])?;
        expect_ids(call, "ids_keep", &self.ids_keep, positions - 1)?;
        let needed = workspace_bytes(dev, dtype, images, kept, dim);
        expect_workspace(call, &self.workspace, needed)?;
        Ok(Dims { images, kept, inputs, dim, dtype })
    }
}

impl Backward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "patch_embed::backward", dev };
        let dtype = self.patches.expect_real(call, "patches")?;
        let [images, kept, inputs] = self.patches.dims(call, "patches", "(B, K, E)")?;
        let [dim, _] = self.grad_weight.dims(call, "grad_weight", "(D, E)")?;
        expect_nonzero(call, "patches", self.patches.shape())?;
        expect_nonzero(call, "grad_weight", self.grad_weight.shape())?;
        expect_vectors(call, "grad_out", self.grad_out.shape())?;
        self.patches.expect(call, "patches", dtype, &[images, kept, inputs])?;
        self.grad_weight.expect(call, "grad_weight", dtype.wide(), &[dim, inputs])?;
        self.grad_bias.expect(call, "grad_bias", dtype.wide(), &[dim])?;
        self.grad_cls_token.expect(call, "grad_cls_token", dtype.wide(), &[dim])?;
        self.grad_out.expect(call, "grad_out", dtype, &[images, 1 + kept, dim])?;
        let needed = workspace_bytes(dev, dtype, images, kept, dim);
        expect_workspace(call, &self.workspace, needed)?;
        Ok(Dims { images, kept, inputs, dim, dtype })
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{Backward, Dims, Forward};
    use crate::Cpu;
    use crate::cpu::gemm::{Mat, MatMut, matmul};
    use crate::cpu::{Real, simd};
    use crate::ops::linear::cpu::add_row_sums;

    pub(super) fn forward<T: Real>(args: Forward<'_>, dims: Dims, cpu: Cpu) {
        let Dims { images, kept, inputs, dim, .. } = dims;
        let (embedded, _) = args.workspace.carve::<T>(images * kept * dim);
        let patches = Mat::new(args.patches.as_slice::<T>(), images * kept, inputs);
        let weight = Mat::new(args.weight.as_slice::<T>(), dim, inputs).t();
        let dst = MatMut::new(embedded, images * kept, dim);
        matmul(dst, patches, weight, false, cpu.products);
        let (bias, pos) = (args.bias.as_slice::<T>(), args.pos_embed.as_slice::<T>());
        let cls_token = args.cls_token.as_slice::<T>();
        let ids = args.ids_keep.as_slice::<i32>().par_chunks(kept);
        let embedded = embedded.par_chunks(kept * dim);
        let out = args.out.into_slice::<T>().par_chunks_mut((1 + kept) * dim);
        out.zip(embedded).zip(ids).for_each(|((out, embedded), ids)| {
            let (cls, out) = out.split_at_mut(dim);
            simd!(|| {
                for ((y, &cls), &pos) in cls.iter_mut().zip(cls_token).zip(pos) {
                    *y = cls + pos;
                }
                let rows = out.chunks_exact_mut(dim).zip(embedded.chunks_exact(dim)).zip(ids);
                for ((out, x), &id) in rows {
                    let pos = &pos[(1 + id as usize) * dim..][..dim];
                    for (((y, &x), &bias), &pos) in out.iter_mut().zip(x).zip(bias).zip(pos) {
                        *y = x + bias + pos;
                    }
                }
            });
        });
    }

    pub(super) fn backward<T: Real>(args: Backward<'_>, dims: Dims, cpu: Cpu) {
        let Dims { images, kept, inputs, dim, .. } = dims;
        let grad_out = args.grad_out.as_slice::<T>();
        // The rows of the patches, without the class tokens between them.
        let (rows, _) = args.workspace.carve::<T>(images * kept * dim);
        let images_grad = grad_out.par_chunks((1 + kept) * dim);
        rows.par_chunks_mut(kept * dim)
            .zip(images_grad)
            .for_each(|(rows, grad)| rows.copy_from_slice(&grad[dim..]));
        let grad_weight = MatMut::new(args.grad_weight.into_slice::<T>(), dim, inputs);
        let grads = Mat::new(rows, images * kept, dim).t();
        let patches = Mat::new(args.patches.as_slice::<T>(), images * kept, inputs);
        matmul(grad_weight, grads, patches, true, cpu.products);
        add_row_sums(args.grad_bias.into_slice(), rows);
        let grad_cls_token = args.grad_cls_token.into_slice::<T>();
        for grad in grad_out.chunks_exact((1 + kept) * dim) {
            for (sum, &g) in grad_cls_token.iter_mut().zip(grad) {
                *sum = *sum + g;
            }
        }
    }
}

mod launch {
    use super::{Backward, Dims, Forward};
    use crate::cuda::{DevPtr, Epilogue, Gpu, Matmul};
    use crate::ops::linear::launch::{add_column_sums, dense, transposed};
    use crate::ops::{linear, rows};
    use crate::tensor::carve_bytes;
    use crate::{DType, Result};

    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct PatchEmbedAddBias {
        out: DevPtr,
        product: DevPtr,
        bias: DevPtr,
        cls_token: DevPtr,
        pos_embed: DevPtr,
        ids_keep: DevPtr,
        kept: u64,
        dim: u32,
        blocks: u32,
    }
    const _: () = assert!(size_of::<PatchEmbedAddBias>() == 64);

    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct PatchEmbedSplitRows {
        out: DevPtr,
        inp: DevPtr,
        images: u32,
        kept: u32,
        chunks: u32,
        blocks: u32,
    }
    const _: () = assert!(size_of::<PatchEmbedSplitRows>() == 32);

    /// The product of [`forward`], or the rows and the sums of [`backward`].
    pub(super) fn workspace_bytes(dtype: DType, images: usize, kept: usize, dim: usize) -> usize {
        let sums = |rows| linear::launch::workspace_bytes(rows, dim);
        carve_bytes(dtype, images * (kept + 1) * dim) + sums(images * kept).max(sums(images))
    }

    pub(super) fn forward(gpu: &Gpu, args: Forward<'_>, dims: Dims) -> Result<()> {
        let Dims { images, kept, inputs, dim, dtype } = dims;
        let (product, _) = args.workspace.carve_tensor(dtype, images * kept * dim);
        gpu.driver().matmul(&Matmul {
            m: images * kept,
            n: dim,
            k: inputs,
            batch: 1,
            a: dense(args.patches.dev_ptr(), dtype, inputs),
            b: transposed(dense(args.weight.dev_ptr(), dtype, inputs)),
            out: dense(product.dev_ptr(), dtype, dim),
            bias: None,
            add: None,
            epilogue: Epilogue::None,
        })?;
        let blocks = rows::blocks(1 + kept);
        let params = PatchEmbedAddBias {
            out: args.out.dev_ptr(),
            product: product.dev_ptr(),
            bias: args.bias.dev_ptr(),
            cls_token: args.cls_token.dev_ptr(),
            pos_embed: args.pos_embed.dev_ptr(),
            ids_keep: args.ids_keep.dev_ptr(),
            kept: kept as u64,
            dim: dim as u32,
            blocks: blocks as u32,
        };
        let kernel = match dtype {
            DType::Bf16 => "patch_embed_add_bias_bf16",
            _ => "patch_embed_add_bias_f32",
        };
        gpu.launch(kernel, images * blocks, rows::THREADS, 0, &params)
    }

    pub(super) fn backward(gpu: &Gpu, args: Backward<'_>, dims: Dims) -> Result<()> {
        let Dims { images, kept, inputs, dim, dtype } = dims;
        let patch_elems = images * kept * dim;
        let (split, mut workspace) = args.workspace.carve_tensor(dtype, patch_elems + images * dim);
        let blocks = rows::blocks(1 + kept);
        let params = PatchEmbedSplitRows {
            out: split.dev_ptr(),
            inp: args.grad_out.dev_ptr(),
            images: images as u32,
            kept: kept as u32,
            chunks: rows::chunks(dtype, dim),
            blocks: blocks as u32,
        };
        let grid = images * blocks;
        gpu.launch("patch_embed_split_rows", grid, rows::THREADS, 0, &params)?;
        let (of_patches, of_class) = split.as_ref().split_at(patch_elems);
        let grad_weight = args.grad_weight.dev_ptr();
        gpu.driver().matmul(&Matmul {
            m: dim,
            n: inputs,
            k: images * kept,
            batch: 1,
            a: transposed(dense(of_patches.dev_ptr(), dtype, dim)),
            b: dense(args.patches.dev_ptr(), dtype, inputs),
            out: dense(grad_weight, DType::F32, inputs),
            bias: None,
            add: Some(grad_weight),
            epilogue: Epilogue::None,
        })?;
        add_column_sums(gpu, args.grad_bias, of_patches, workspace.reborrow())?;
        add_column_sums(gpu, args.grad_cls_token, of_class, workspace)
    }
}
