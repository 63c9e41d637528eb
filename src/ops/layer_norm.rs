//! Layer normalization over the last dimension (Ba et al. 2016, arXiv:1607.06450).
//!
//! `out = (inp - mean) * rstd * weight + bias`, `rstd = 1 / sqrt(var + eps)`, biased variance, as `torch.nn.LayerNorm`.

use super::{NOT_NEGATIVE, cost, expect_nonzero, expect_vectors, expect_within, for_real};
use crate::device::Call;
use crate::tensor::{carve_bytes, expect_workspace};
use crate::{DType, Device, Error, Result, TensorMut, TensorRef};

/// Arguments of [`forward`]. Leading dimensions count as rows: `(B, T, D)` is taken as `(R, D)` with `R = B T`.
#[derive(Debug)]
pub struct Forward<'a> {
    /// As `inp`. Overwritten.
    pub out: TensorMut<'a>,
    /// As `inp` without its last dimension. Overwritten; read by [`backward`].
    pub mean: TensorMut<'a>,
    /// As `mean`; `1 / sqrt(var + eps)`. Overwritten; read by [`backward`].
    pub rstd: TensorMut<'a>,
    /// `(R, D)`.
    pub inp: TensorRef<'a>,
    /// `(D)`.
    pub weight: TensorRef<'a>,
    /// `(D)`.
    pub bias: TensorRef<'a>,
    /// Added to the variance; MAE uses `1e-6`.
    pub eps: f64,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// As `inp`. Accumulates: it is the gradient of the residual stream.
    pub grad_inp: TensorMut<'a>,
    /// `(D)`. Accumulates.
    pub grad_weight: TensorMut<'a>,
    /// `(D)`. Accumulates.
    pub grad_bias: TensorMut<'a>,
    /// As `inp`.
    pub grad_out: TensorRef<'a>,
    /// `(R, D)`, as given to [`forward`].
    pub inp: TensorRef<'a>,
    /// From [`forward`].
    pub mean: TensorRef<'a>,
    /// From [`forward`].
    pub rstd: TensorRef<'a>,
    /// `(D)`.
    pub weight: TensorRef<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Bytes of workspace that [`backward`] needs for `rows` (R) of width `dim` (D). Fewer rows or narrower ones never need
/// more.
#[must_use]
pub fn workspace_bytes(dev: &Device, dtype: DType, rows: usize, dim: usize) -> usize {
    match dev {
        Device::Cpu(_) => carve_bytes(dtype, rows.div_ceil(cpu::PIECE_ROWS) * 2 * dim),
        Device::Cuda(_) => launch::workspace_bytes(dtype, rows, dim),
    }
}

/// Normalises rows.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] unless the arguments are as their fields say, and on a GPU D is a multiple of 8 and at
/// most 8192; [`Error::Invalid`] for a negative `eps` or one that is not finite.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev.span("layer_norm::forward", || {
        cost::layer_norm_forward(dims.dtype, [dims.rows, dims.dim])
    });
    match dev {
        Device::Cpu(_) => for_real!(dims.dtype, T => cpu::forward::<T>(args, dims)),
        Device::Cuda(gpu) => launch::forward(gpu, args, dims)?,
    }
    Ok(())
}

/// Gradients of [`forward`].
///
/// # Errors
/// As [`forward`]; [`Error::Workspace`] if the workspace is too small.
pub fn backward(dev: &Device, args: Backward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev.span("layer_norm::backward", || {
        cost::layer_norm_backward(dims.dtype, [dims.rows, dims.dim])
    });
    match dev {
        Device::Cpu(_) => for_real!(dims.dtype, T => cpu::backward::<T>(args, dims)),
        Device::Cuda(gpu) => launch::backward(gpu, args, dims)?,
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Dims {
    rows: usize,
    dim: usize,
    dtype: DType,
}

fn dims(call: Call<'_>, inp: &TensorRef<'_>) -> Result<Dims> {
    let dtype = inp.expect_real(call, "inp")?;
    let shape = inp.shape();
    expect_nonzero(call, "inp", shape)?;
    expect_vectors(call, "inp", shape)?;
    let dim = shape.last().copied().unwrap_or(1);
    if matches!(call.dev, Device::Cuda(_)) && dim > launch::MAX_DIM {
        return Err(Error::Shape {
            op: call.op,
            arg: "inp",
            expected: format!(
                "a last dimension of at most {}: a GPU takes no wider",
                launch::MAX_DIM
            ),
            found: shape.to_vec(),
        });
    }
    Ok(Dims { rows: inp.elems() / dim, dim, dtype })
}

/// The shape without its last dimension.
fn leading<'a>(inp: &'a TensorRef<'_>) -> &'a [usize] {
    inp.shape().split_last().map_or(&[], |(_, leading)| leading)
}

impl Forward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "layer_norm::forward", dev };
        let dims = dims(call, &self.inp)?;
        let Dims { dim, dtype, .. } = dims;
        self.out.expect(call, "out", dtype, self.inp.shape())?;
        self.mean.expect(call, "mean", dtype.wide(), leading(&self.inp))?;
        self.rstd.expect(call, "rstd", dtype.wide(), leading(&self.inp))?;
        self.weight.expect(call, "weight", dtype, &[dim])?;
        self.bias.expect(call, "bias", dtype, &[dim])?;
        expect_within(call, "eps", self.eps, NOT_NEGATIVE)?;
        Ok(dims)
    }
}

impl Backward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "layer_norm::backward", dev };
        let dims = dims(call, &self.inp)?;
        let Dims { rows, dim, dtype } = dims;
        self.grad_inp.expect(call, "grad_inp", dtype, self.inp.shape())?;
        self.grad_weight.expect(call, "grad_weight", dtype.wide(), &[dim])?;
        self.grad_bias.expect(call, "grad_bias", dtype.wide(), &[dim])?;
        self.grad_out.expect(call, "grad_out", dtype, self.inp.shape())?;
        self.mean.expect(call, "mean", dtype.wide(), leading(&self.inp))?;
        self.rstd.expect(call, "rstd", dtype.wide(), leading(&self.inp))?;
        self.weight.expect(call, "weight", dtype, &[dim])?;
        expect_workspace(call, &self.workspace, workspace_bytes(dev, dtype, rows, dim))?;
        Ok(dims)
    }
}

mod launch {
    use std::mem::offset_of;

    use super::{Backward, Dims, Forward};
    use crate::cuda::{DevPtr, Gpu};
    use crate::ops::linear::launch::add_partials;
    use crate::tensor::carve_bytes;
    use crate::{DType, Result};

    /// As `LayerNormForward` in `kernels/layer_norm.cu`.
    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct ForwardParams {
        out: DevPtr,
        mean: DevPtr,
        rstd: DevPtr,
        inp: DevPtr,
        weight: DevPtr,
        bias: DevPtr,
        rows: i64,
        dim: i32,
        eps: f32,
    }
    const _: () = assert!(size_of::<ForwardParams>() == 64 && offset_of!(ForwardParams, eps) == 60);

    /// As `LayerNormBackward` in `kernels/layer_norm.cu`.
    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct BackwardParams {
        grad_inp: DevPtr,
        partials: DevPtr,
        grad_out: DevPtr,
        inp: DevPtr,
        weight: DevPtr,
        mean: DevPtr,
        rstd: DevPtr,
        rows: i64,
        dim: i64,
    }
    const _: () =
        assert!(size_of::<BackwardParams>() == 72 && offset_of!(BackwardParams, dim) == 64);

    /// The kernels for one dtype and rows of up to `width`.
    struct Kernels {
        width: usize,
        forward: &'static str,
        backward: &'static str,
        /// Warps that share a row.
        warps: usize,
        /// Blocks of `backward` on one multiprocessor of an H200.
        blocks: usize,
    }

    macro_rules! kernels {
        ($dtype:literal: $([$width:literal, $warps:literal, $blocks:literal]),*) => {
            [$(Kernels {
                width: $width,
                forward: concat!("layer_norm_forward_", $dtype, "_", $width),
                backward: concat!("layer_norm_backward_", $dtype, "_", $width),
                warps: $warps,
                blocks: $blocks,
            }),*]
        };
    }
    static BF16: [Kernels; 7] = kernels!("bf16": [256, 1, 5], [512, 1, 4], [768, 1, 3], [1024, 1, 3],
        [1280, 1, 3], [2048, 2, 3], [8192, 16, 1]);
    static F32: [Kernels; 7] = kernels!("f32": [256, 1, 5], [512, 1, 4], [768, 1, 2], [1024, 2, 3],
        [1280, 2, 3], [2048, 4, 3], [8192, 16, 1]);

    /// The widest row.
    pub(super) const MAX_DIM: usize = 8192;

    impl Kernels {
        fn table(dtype: DType) -> &'static [Self] {
            if dtype == DType::Bf16 { &BF16 } else { &F32 }
        }

        fn of(dtype: DType, dim: usize) -> &'static Self {
            let fitting = Self::table(dtype).iter().find(|kernels| dim <= kernels.width);
            fitting.expect("`check` has judged the width")
        }

        /// Threads of a block of `least` or of as many as a row needs, and rows that it holds.
        fn block(&self, least: usize) -> (usize, usize) {
            let threads = least.max(32 * self.warps);
            (threads, threads / (32 * self.warps))
        }

        /// Blocks of `backward`: as many as an H200's 132 multiprocessors hold at once, on every GPU, so that the order of
        /// the sums is the same.
        fn backward_blocks(&self, rows: usize) -> usize {
            rows.div_ceil(self.block(BACKWARD_THREADS).1).min(132 * self.blocks)
        }

        /// Three rows for each one that a block works on, once or twice, and the weight: `Queue` in
        /// `kernels/layer_norm.cu`.
        fn shared_bytes(&self, dtype: DType) -> usize {
            let row = self.width * dtype.size_bytes() * self.block(BACKWARD_THREADS).1;
            let stages = if 2 * 3 * row <= 160 << 10 { 2 } else { 1 };
            (3 * stages + 1) * row
        }
    }

    const FORWARD_THREADS: usize = 256;
    const BACKWARD_THREADS: usize = 128;

    pub(super) fn workspace_bytes(dtype: DType, rows: usize, dim: usize) -> usize {
        let partials =
            |kernels: &Kernels| kernels.backward_blocks(rows) * 2 * dim.min(kernels.width);
        let narrower = Kernels::table(dtype).iter().take_while(|kernels| kernels.width < dim);
        let fitting = Kernels::table(dtype).iter().find(|kernels| dim <= kernels.width);
        carve_bytes(DType::F32, narrower.chain(fitting).map(partials).max().unwrap_or(0))
    }

    pub(super) fn forward(gpu: &Gpu, args: Forward<'_>, dims: Dims) -> Result<()> {
        let Dims { rows, dim, dtype } = dims;
        let kernels = Kernels::of(dtype, dim);
        let (threads, rows_of_block) = kernels.block(FORWARD_THREADS);
        let params = ForwardParams {
            out: args.out.dev_ptr(),
            mean: args.mean.dev_ptr(),
            rstd: args.rstd.dev_ptr(),
            inp: args.inp.dev_ptr(),
            weight: args.weight.dev_ptr(),
            bias: args.bias.dev_ptr(),
            rows: rows as i64,
            dim: dim as i32,
            eps: args.eps as f32,
        };
        gpu.launch(kernels.forward, rows.div_ceil(rows_of_block), threads as u32, 0, &params)
    }

    pub(super) fn backward(gpu: &Gpu, args: Backward<'_>, dims: Dims) -> Result<()> {
        let Dims { rows, dim, dtype } = dims;
        let kernels = Kernels::of(dtype, dim);
        let (threads, _) = kernels.block(BACKWARD_THREADS);
        let blocks = kernels.backward_blocks(rows);
        let (partials, _) = args.workspace.carve_tensor(DType::F32, blocks * 2 * dim);
        let params = BackwardParams {
            grad_inp: args.grad_inp.dev_ptr(),
            partials: partials.dev_ptr(),
            grad_out: args.grad_out.dev_ptr(),
            inp: args.inp.dev_ptr(),
            weight: args.weight.dev_ptr(),
            mean: args.mean.dev_ptr(),
            rstd: args.rstd.dev_ptr(),
            rows: rows as i64,
            dim: dim as i64,
        };
        let shared = kernels.shared_bytes(dtype);
        gpu.launch(kernels.backward, blocks, threads as u32, shared, &params)?;
        let sums = [args.grad_weight.dev_ptr(), args.grad_bias.dev_ptr()];
        add_partials(gpu, sums, dim, partials.dev_ptr(), blocks)
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{Backward, Dims, Forward};
    use crate::cpu::{Real, add_rows, rows_per_task, simd, sum};

    pub(super) fn forward<T: Real>(args: Forward<'_>, dims: Dims) {
        let dim = dims.dim;
        let Forward { out, mean, rstd, inp, weight, bias, eps } = args;
        let (weight, bias): (&[T], &[T]) = (weight.as_slice(), bias.as_slice());
        let per_dim = T::ONE / T::of(dim as f64);
        let rows = rows_per_task(dim);
        let inps = inp.as_slice::<T>().par_chunks(rows * dim);
        let outs = out.into_slice::<T>().par_chunks_mut(rows * dim);
        let means = mean.into_slice::<T>().par_chunks_mut(rows);
        let rstds = rstd.into_slice::<T>().par_chunks_mut(rows);
        outs.zip(means).zip(rstds).zip(inps).for_each(|(((out, mean), rstd), inp)| {
            simd!(|| {
                let stats = mean.iter_mut().zip(rstd);
                for ((out, x), (mean, rstd)) in
                    out.chunks_exact_mut(dim).zip(inp.chunks_exact(dim)).zip(stats)
                {
                    let mu = sum([x], |[x]| x) * per_dim;
                    let var = sum([x], |[x]| (x - mu) * (x - mu)) * per_dim;
                    let r = T::ONE / (var + T::of(eps)).sqrt();
                    for (((y, &x), &w), &b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                        *y = (x - mu) * r * w + b;
                    }
                    (*mean, *rstd) = (mu, r);
                }
            });
        });
    }

    /// Rows whose parameter gradients make one partial sum. Their order depends on nothing else.
    pub(super) const PIECE_ROWS: usize = 64;

    /// With `n = (inp - mean) rstd` and `g = grad_out weight`:
    /// `grad_inp += rstd (g - mean(g) - n mean(g n))`, `grad_weight += sum grad_out n`, `grad_bias += sum grad_out`.
    pub(super) fn backward<T: Real>(args: Backward<'_>, dims: Dims) {
        let Dims { rows, dim, .. } = dims;
        let Backward { grad_inp, grad_weight, grad_bias, grad_out, .. } = args;
        let weight = args.weight.as_slice::<T>();
        let per_dim = T::ONE / T::of(dim as f64);
        let pieces = rows.div_ceil(PIECE_ROWS);
        let (partials, _) = args.workspace.carve::<T>(pieces * 2 * dim);
        let (weights, biases) = partials.split_at_mut(pieces * dim);
        let parts = weights.par_chunks_mut(dim).zip(biases.par_chunks_mut(dim));
        let inps = args.inp.as_slice::<T>().par_chunks(PIECE_ROWS * dim);
        let means = args.mean.as_slice::<T>().par_chunks(PIECE_ROWS);
        let rstds = args.rstd.as_slice::<T>().par_chunks(PIECE_ROWS);
        let outs = grad_out.as_slice::<T>().par_chunks(PIECE_ROWS * dim);
        let grads = grad_inp.into_slice::<T>().par_chunks_mut(PIECE_ROWS * dim);
        let stats = means.zip(rstds);
        grads.zip(parts).zip(inps.zip(outs)).zip(stats).for_each(
            |(((grad_inp, (grad_weight, grad_bias)), (inp, grad_out)), (mean, rstd))| {
                grad_weight.fill(T::ZERO);
                grad_bias.fill(T::ZERO);
                simd!(|| {
                    let rows = inp.chunks_exact(dim).zip(grad_out.chunks_exact(dim));
                    let stats = mean.iter().zip(rstd);
                    for ((into, (x, grad)), (&mu, &r)) in
                        grad_inp.chunks_exact_mut(dim).zip(rows).zip(stats)
                    {
                        let weight = &weight[..dim];
                        let mean_g = sum([grad, weight], |[g, w]| g * w) * per_dim;
                        let mean_gn =
                            sum([grad, weight, x], |[g, w, x]| g * w * ((x - mu) * r)) * per_dim;
                        let (grad_weight, grad_bias) =
                            (&mut grad_weight[..dim], &mut grad_bias[..dim]);
                        for d in 0..dim {
                            let n = (x[d] - mu) * r;
                            into[d] = into[d] + r * (grad[d] * weight[d] - mean_g - n * mean_gn);
                            grad_weight[d] = grad_weight[d] + grad[d] * n;
                            grad_bias[d] = grad_bias[d] + grad[d];
                        }
                    }
                });
            },
        );
        add_rows(grad_weight.into_slice(), weights);
        add_rows(grad_bias.into_slice(), biases);
    }
}
