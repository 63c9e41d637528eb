//! Multi-head self-attention over packed queries, keys and values (Vaswani et al. 2017, arXiv:1706.03762).
//!
//! `out = softmax(q k^T / sqrt(HD)) v` for each image and head. The `T x T` weights exist for a block of queries of
//! one head at a time and are never stored: the backward pass forms them again from the row statistic `lse`.

mod launch;

use super::{cost, expect_nonzero, for_real};
use crate::device::Call;
use crate::tensor::{carve_bytes, expect_workspace};
use crate::{DType, Device, Error, Result, TensorMut, TensorRef};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(B, T, D)`, head `h` in columns `h HD..(h + 1) HD`. Overwritten.
    pub out: TensorMut<'a>,
    /// `(B, NH, T)`, logarithm of the sum of the exponentials of a row. Overwritten; read by [`backward`].
    pub lse: TensorMut<'a>,
    /// `(B, T, 3 D)`: queries, keys, values, each head after head, as `timm` packs them.
    pub qkv: TensorRef<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// `(B, T, 3 D)`. Overwritten.
    pub grad_qkv: TensorMut<'a>,
    /// `(B, T, D)`.
    pub grad_out: TensorRef<'a>,
    /// `(B, T, D)`, from [`forward`].
    pub out: TensorRef<'a>,
    /// `(B, NH, T)`, from [`forward`].
    pub lse: TensorRef<'a>,
    /// `(B, T, 3 D)`, as given to [`forward`].
    pub qkv: TensorRef<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Most queries of a block.
const BLOCK: usize = 128;
/// Most images in work at once, each with its own scratch.
const LANES: usize = 32;

/// Bytes of workspace that [`forward`] and [`backward`] need.
#[must_use]
pub fn workspace_bytes(
    dev: &Device,
    dtype: DType,
    images: usize,
    tokens: usize,
    heads: usize,
) -> usize {
    match dev {
        Device::Cpu(_) => carve_bytes(dtype, LANES.min(images) * 2 * BLOCK.min(tokens) * tokens),
        // A number for each row, for sizes whose backward pass is two kernels.
        Device::Cuda(_) => carve_bytes(DType::F32, images * heads * tokens),
    }
}

/// Mixes values.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] unless the arguments are as their fields say; [`Error::Workspace`].
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span =
        dev.span("attention::forward", || cost::attention_forward(dims.dtype, dims.shape()));
    match dev {
        Device::Cpu(_) => for_real!(dims.dtype, T => cpu::forward::<T>(args, dims)),
        Device::Cuda(gpu) => launch::forward(gpu, &args, dims)?,
    }
    Ok(())
}

/// Gradient of [`forward`].
///
/// # Errors
/// As [`forward`].
pub fn backward(dev: &Device, args: Backward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span =
        dev.span("attention::backward", || cost::attention_backward(dims.dtype, dims.shape()));
    match dev {
        Device::Cpu(_) => for_real!(dims.dtype, T => cpu::backward::<T>(args, dims)),
        Device::Cuda(gpu) => launch::backward(gpu, args, dims)?,
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Dims {
    images: usize,
    tokens: usize,
    heads: usize,
    head_dim: usize,
    dtype: DType,
}

impl Dims {
    /// `[B, T, NH, D]`.
    fn shape(self) -> [usize; 4] {
        [self.images, self.tokens, self.heads, self.heads * self.head_dim]
    }
}

fn dims(call: Call<'_>, qkv: &TensorRef<'_>, lse: &[usize]) -> Result<Dims> {
    let dtype = qkv.expect_real(call, "qkv")?;
    qkv.expect(call, "qkv", dtype, qkv.shape())?;
    let [images, tokens, width] = qkv.dims(call, "qkv", "(B, T, 3 D)")?;
    let &[_, heads, _] = lse else {
        let expected = "(B, NH, T)".into();
        return Err(Error::Shape { op: call.op, arg: "lse", expected, found: lse.to_vec() });
    };
    expect_nonzero(call, "qkv", qkv.shape())?;
    expect_nonzero(call, "lse", lse)?;
    if width % (3 * heads) != 0 {
        let expected = format!("(B, T, 3 D) with D divisible by the {heads} heads of `lse`");
        return Err(Error::Shape {
            op: call.op,
            arg: "qkv",
            expected,
            found: qkv.shape().to_vec(),
        });
    }
    let head_dim = width / 3 / heads;
    if let Device::Cuda(_) = call.dev {
        // What the kernels are built for.
        if !head_dim.is_multiple_of(8) || head_dim > 128 {
            let why = format!(
                "is {head_dim} numbers wide; on a GPU take a multiple of 8 up to 128, or run on the CPU"
            );
            return Err(Error::invalid(format!("{}: a head of qkv", call.op), why));
        }
        if tokens > 1024 || tokens * width > i32::MAX as usize {
            let why = format!(
                "holds {tokens} tokens of {width} numbers; on a GPU take at most 1024 tokens, or run on the CPU"
            );
            return Err(Error::invalid(format!("{}: an image of qkv", call.op), why));
        }
    }
    Ok(Dims { images, tokens, heads, head_dim, dtype })
}

impl Forward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "attention::forward", dev };
        let dims = dims(call, &self.qkv, self.lse.shape())?;
        let Dims { images, tokens, heads, head_dim, dtype } = dims;
        self.out.expect(call, "out", dtype, &[images, tokens, heads * head_dim])?;
        self.lse.expect(call, "lse", dtype.wide(), &[images, heads, tokens])?;
        expect_workspace(
            call,
            &self.workspace,
            workspace_bytes(dev, dtype, images, tokens, heads),
        )?;
        Ok(dims)
    }
}

impl Backward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "attention::backward", dev };
        let dims = dims(call, &self.qkv, self.lse.shape())?;
        let Dims { images, tokens, heads, head_dim, dtype } = dims;
        self.grad_qkv.expect(call, "grad_qkv", dtype, self.qkv.shape())?;
        self.grad_out.expect(call, "grad_out", dtype, &[images, tokens, heads * head_dim])?;
        self.out.expect(call, "out", dtype, &[images, tokens, heads * head_dim])?;
        self.lse.expect(call, "lse", dtype.wide(), &[images, heads, tokens])?;
        expect_workspace(
            call,
            &self.workspace,
            workspace_bytes(dev, dtype, images, tokens, heads),
        )?;
        Ok(dims)
    }
}

mod cpu {
    use std::ops::Range;

    use rayon::prelude::*;

    use super::{BLOCK, Backward, Dims, Forward, LANES};
    use crate::cpu::gemm::{Mat, MatMut, matmul_here};
    use crate::cpu::{Real, max, simd, sum};

    impl Dims {
        fn dim(&self) -> usize {
            self.heads * self.head_dim
        }

        fn scale<T: Real>(&self) -> T {
            T::of((self.head_dim as f64).powf(-0.5))
        }

        /// The tokens, cut into blocks of nearly equal length.
        fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
            let (tokens, count) = (self.tokens, self.tokens.div_ceil(BLOCK));
            (0..count).map(move |i| i * tokens / count..(i + 1) * tokens / count)
        }

        /// Images of a lane; lanes work in parallel, each through its images in turn.
        fn images_per_lane(&self) -> usize {
            self.images.div_ceil(LANES)
        }

        /// Part 0, 1 or 2 (query, key, value) of a head, over some tokens of one image's `qkv`.
        fn part<'a, T: Real>(
            &self,
            qkv: &'a [T],
            part: usize,
            head: usize,
            rows: &Range<usize>,
        ) -> Mat<'a, T> {
            let stride = 3 * self.dim();
            let start = rows.start * stride + part * self.dim() + head * self.head_dim;
            Mat::strided(&qkv[start..], rows.len(), self.head_dim, stride)
        }

        /// As [`part`](Self::part), writable.
        fn part_mut<'a, T: Real>(
            &self,
            qkv: &'a mut [T],
            part: usize,
            head: usize,
            rows: &Range<usize>,
        ) -> MatMut<'a, T> {
            let stride = 3 * self.dim();
            let start = rows.start * stride + part * self.dim() + head * self.head_dim;
            MatMut::strided(&mut qkv[start..], rows.len(), self.head_dim, stride)
        }

        /// A head over some tokens of one image's `out`.
        fn head<'a, T: Real>(&self, out: &'a [T], head: usize, rows: &Range<usize>) -> Mat<'a, T> {
            let start = rows.start * self.dim() + head * self.head_dim;
            Mat::strided(&out[start..], rows.len(), self.head_dim, self.dim())
        }
    }

    pub(super) fn forward<T: Real>(args: Forward<'_>, dims: Dims) {
        let Dims { images, tokens, heads, head_dim, .. } = dims;
        let (dim, per_lane, all) = (dims.dim(), dims.images_per_lane(), 0..tokens);
        let scratch_elems = 2 * BLOCK.min(tokens) * tokens;
        let (scratch, _) = args.workspace.carve::<T>(LANES.min(images) * scratch_elems);
        let qkv = args.qkv.as_slice::<T>().par_chunks(per_lane * tokens * 3 * dim);
        let lse = args.lse.into_slice::<T>().par_chunks_mut(per_lane * heads * tokens);
        let out = args.out.into_slice::<T>().par_chunks_mut(per_lane * tokens * dim);
        let lanes = out.zip(lse).zip(qkv).zip(scratch.par_chunks_mut(scratch_elems));
        lanes.for_each(|(((out, lse), qkv), scratch)| {
            let lse = lse.chunks_exact_mut(heads * tokens);
            let images = out.chunks_exact_mut(tokens * dim).zip(lse);
            for ((out, lse), qkv) in images.zip(qkv.chunks_exact(tokens * 3 * dim)) {
                for (head, lse) in lse.chunks_exact_mut(tokens).enumerate() {
                    for rows in dims.blocks() {
                        let weights = &mut scratch[..rows.len() * tokens];
                        let (q, k) =
                            (dims.part(qkv, 0, head, &rows), dims.part(qkv, 1, head, &all));
                        matmul_here(MatMut::new(weights, rows.len(), tokens), q, k.t(), false);
                        softmax(weights, &mut lse[rows.clone()], dims.scale());
                        let start = rows.start * dim + head * head_dim;
                        let out = MatMut::strided(&mut out[start..], rows.len(), head_dim, dim);
                        let v = dims.part(qkv, 2, head, &all);
                        matmul_here(out, Mat::new(weights, rows.len(), tokens), v, false);
                    }
                }
            }
        });
    }

    /// Turns rows of products into rows of weights, and keeps the logarithm of each row's sum.
    fn softmax<T: Real>(rows: &mut [T], lse: &mut [T], scale: T) {
        let tokens = rows.len() / lse.len();
        simd!(|| {
            for (row, lse) in rows.chunks_exact_mut(tokens).zip(lse) {
                let top = max(row) * scale;
                for x in row.iter_mut() {
                    *x = (*x * scale - top).exp();
                }
                let total = sum([row], |[x]| x);
                let share = T::ONE / total;
                row.iter_mut().for_each(|x| *x = *x * share);
                *lse = top + total.ln();
            }
        });
    }

    /// With weights `P` and `dP = grad_out v^T`: `grad_v = P^T grad_out`, `dS = P (dP - delta) scale` with
    /// `delta = sum(grad_out out)` of a row, `grad_q = dS k`, `grad_k = dS^T q`.
    pub(super) fn backward<T: Real>(args: Backward<'_>, dims: Dims) {
        let Dims { images, tokens, heads, head_dim, .. } = dims;
        let (dim, per_lane, all) = (dims.dim(), dims.images_per_lane(), 0..tokens);
        let scratch_elems = 2 * BLOCK.min(tokens) * tokens;
        let (scratch, _) = args.workspace.carve::<T>(LANES.min(images) * scratch_elems);
        let grad_qkv = args.grad_qkv.into_slice::<T>().par_chunks_mut(per_lane * tokens * 3 * dim);
        let qkv = args.qkv.as_slice::<T>();
        let (out, grad_out) = (args.out.as_slice::<T>(), args.grad_out.as_slice::<T>());
        let lse = args.lse.as_slice::<T>();
        let lanes = grad_qkv.zip(scratch.par_chunks_mut(scratch_elems)).enumerate();
        lanes.for_each(|(lane, (grad_qkv, scratch))| {
            let (weights, grads) = scratch.split_at_mut(scratch.len() / 2);
            for (i, grad_qkv) in grad_qkv.chunks_exact_mut(tokens * 3 * dim).enumerate() {
                let image = lane * per_lane + i;
                let qkv = &qkv[image * tokens * 3 * dim..][..tokens * 3 * dim];
                let out = &out[image * tokens * dim..][..tokens * dim];
                let grad_out = &grad_out[image * tokens * dim..][..tokens * dim];
                for head in 0..heads {
                    let lse = &lse[(image * heads + head) * tokens..][..tokens];
                    for rows in dims.blocks() {
                        let n = rows.len();
                        let (weights, grads) =
                            (&mut weights[..n * tokens], &mut grads[..n * tokens]);
                        let (q, k, v) = (
                            dims.part(qkv, 0, head, &rows),
                            dims.part(qkv, 1, head, &all),
                            dims.part(qkv, 2, head, &all),
                        );
                        let grad = dims.head(grad_out, head, &rows);
                        let later = rows.start > 0;
                        matmul_here(MatMut::new(weights, n, tokens), q, k.t(), false);
                        matmul_here(MatMut::new(grads, n, tokens), grad, v.t(), false);
                        simd!(|| {
                            let pairs = weights.chunks_exact_mut(tokens);
                            for (r, (p, ds)) in
                                pairs.zip(grads.chunks_exact_mut(tokens)).enumerate()
                            {
                                let at = (rows.start + r) * dim + head * head_dim;
                                let delta = sum(
                                    [&grad_out[at..at + head_dim], &out[at..at + head_dim]],
                                    |[g, o]| g * o,
                                );
                                let (scale, lse) = (dims.scale::<T>(), lse[rows.start + r]);
                                for (p, ds) in p.iter_mut().zip(ds) {
                                    *p = (*p * scale - lse).exp();
                                    *ds = *p * (*ds - delta) * scale;
                                }
                            }
                        });
                        let weights = Mat::new(weights, n, tokens);
                        let grads = Mat::new(grads, n, tokens);
                        let grad_v = dims.part_mut(grad_qkv, 2, head, &all);
                        matmul_here(grad_v, weights.t(), grad, later);
                        let grad_q = dims.part_mut(grad_qkv, 0, head, &rows);
                        matmul_here(grad_q, grads, k, false);
                        let grad_k = dims.part_mut(grad_qkv, 1, head, &all);
                        matmul_here(grad_k, grads.t(), q, later);
                    }
                }
            }
        });
    }
}
