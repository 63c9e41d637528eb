//! Layer normalization over the last dimension (Ba et al. 2016, arXiv:1607.06450), of all tokens or of chosen ones.
//!
//! `out = (inp - mean) * rstd * weight + bias`, `rstd = 1 / sqrt(var + eps)`, biased variance, as `torch.nn.LayerNorm`.
//! Choosing tokens serves the decoder's end: only masked patches are predicted, so only they are normalised.

use super::{expect_ids, expect_nonzero, for_real};
use crate::device::Call;
use crate::tensor::{carve_bytes, expect_workspace};
use crate::{DType, Device, Result, TensorMut, TensorRef};

/// The tokens that are normalised: in image `b`, token `prefix + ids[b][m]` makes row `m` of the output.
#[derive(Clone, Copy, Debug)]
pub struct Select<'a> {
    /// `(B, M)` i32: patches, each at most once in an image.
    pub ids: TensorRef<'a>,
    /// Tokens before the first patch: 1 where there is a class token.
    pub prefix: usize,
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(B, M, D)`; `M = T` without `select`. Overwritten.
    pub out: TensorMut<'a>,
    /// `(B, M)`. Overwritten; read by [`backward`].
    pub mean: TensorMut<'a>,
    /// `(B, M)`, `1 / sqrt(var + eps)`. Overwritten; read by [`backward`].
    pub rstd: TensorMut<'a>,
    /// `(B, T, D)`.
    pub inp: TensorRef<'a>,
    /// Which tokens; all if `None`.
    pub select: Option<Select<'a>>,
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
    /// `(B, T, D)`. Accumulates: it is the gradient of the residual stream.
    pub grad_inp: TensorMut<'a>,
    /// `(D)`. Accumulates.
    pub grad_weight: TensorMut<'a>,
    /// `(D)`. Accumulates.
    pub grad_bias: TensorMut<'a>,
    /// `(B, M, D)`.
    pub grad_out: TensorRef<'a>,
    /// `(B, T, D)`, as given to [`forward`].
    pub inp: TensorRef<'a>,
    /// As given to [`forward`].
    pub select: Option<Select<'a>>,
    /// `(B, M)`, from [`forward`].
    pub mean: TensorRef<'a>,
    /// `(B, M)`, from [`forward`].
    pub rstd: TensorRef<'a>,
    /// `(D)`.
    pub weight: TensorRef<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Bytes of workspace that [`backward`] needs for `images` (B) of width `dim` (D).
#[must_use]
pub fn workspace_bytes(dev: &Device, dtype: DType, images: usize, dim: usize) -> usize {
    carve_bytes(dtype, images * 2 * dim)
}

/// Normalises tokens.
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
    tokens: usize,
    selected: usize,
    dim: usize,
    dtype: DType,
}

fn dims(call: Call<'_>, inp: &TensorRef<'_>, select: Option<Select<'_>>) -> Result<Dims> {
    let dtype = inp.expect_real(call, "inp")?;
    let [images, tokens, dim] = inp.dims(call, "inp", "(B, T, D)")?;
    expect_nonzero(call, "inp", &[images, tokens, dim])?;
    let selected = match select {
        None => tokens,
        Some(Select { ids, prefix }) => {
            let [_, selected] = ids.dims(call, "select.ids", "(B, M)")?;
            expect_nonzero(call, "select.ids", &[selected])?;
            ids.expect(call, "select.ids", DType::I32, &[images, selected])?;
            expect_ids(call, "select.ids", &ids, tokens.saturating_sub(prefix))?;
            selected
        }
    };
    Ok(Dims { images, tokens, selected, dim, dtype })
}

impl Forward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "layer_norm::forward", dev };
        let dims = dims(call, &self.inp, self.select)?;
        let Dims { images, selected, dim, dtype, .. } = dims;
        self.out.expect(call, "out", dtype, &[images, selected, dim])?;
        self.mean.expect(call, "mean", dtype.wide(), &[images, selected])?;
        self.rstd.expect(call, "rstd", dtype.wide(), &[images, selected])?;
        self.weight.expect(call, "weight", dtype, &[dim])?;
        self.bias.expect(call, "bias", dtype, &[dim])?;
        Ok(dims)
    }
}

impl Backward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "layer_norm::backward", dev };
        let dims = dims(call, &self.inp, self.select)?;
        let Dims { images, tokens, selected, dim, dtype } = dims;
        self.grad_inp.expect(call, "grad_inp", dtype, &[images, tokens, dim])?;
        self.grad_weight.expect(call, "grad_weight", dtype.wide(), &[dim])?;
        self.grad_bias.expect(call, "grad_bias", dtype.wide(), &[dim])?;
        self.grad_out.expect(call, "grad_out", dtype, &[images, selected, dim])?;
        self.mean.expect(call, "mean", dtype.wide(), &[images, selected])?;
        self.rstd.expect(call, "rstd", dtype.wide(), &[images, selected])?;
        self.weight.expect(call, "weight", dtype, &[dim])?;
        expect_workspace(call, &self.workspace, workspace_bytes(dev, dtype, images, dim))?;
        Ok(dims)
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{Backward, Dims, Forward, Select};
    use crate::cpu::{Real, add_rows, simd, sum};

    /// The row of token space that row `m` of image `b` stands for.
    fn token(select: Option<Select<'_>>, b: usize, m: usize) -> usize {
        select.map_or(m, |Select { ids, prefix }| {
            prefix + ids.as_slice::<i32>()[b * ids.shape()[1] + m] as usize
        })
    }

    pub(super) fn forward<T: Real>(args: Forward<'_>, dims: Dims) {
        let Dims { tokens, selected, dim, .. } = dims;
        let Forward { out, mean, rstd, inp, select, weight, bias, eps } = args;
        let (inp, weight, bias): (&[T], &[T], &[T]) =
            (inp.as_slice(), weight.as_slice(), bias.as_slice());
        let per_dim = T::ONE / T::of(dim as f64);
        let images = out.into_slice::<T>().par_chunks_mut(selected * dim);
        let means = mean.into_slice::<T>().par_chunks_mut(selected);
        let rstds = rstd.into_slice::<T>().par_chunks_mut(selected);
        images.zip(means).zip(rstds).enumerate().for_each(|(b, ((out, mean), rstd))| {
            simd!(|| {
                for (m, out) in out.chunks_exact_mut(dim).enumerate() {
                    let x = &inp[(b * tokens + token(select, b, m)) * dim..][..dim];
                    let mu = sum([x], |[x]| x) * per_dim;
                    let var = sum([x], |[x]| (x - mu) * (x - mu)) * per_dim;
                    let r = T::ONE / (var + T::of(eps)).sqrt();
                    for (((y, &x), &w), &b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                        *y = (x - mu) * r * w + b;
                    }
                    (mean[m], rstd[m]) = (mu, r);
                }
            });
        });
    }

    /// With `n = (inp - mean) rstd` and `g = grad_out weight`:
    /// `grad_inp += rstd (g - mean(g) - n mean(g n))`, `grad_weight += sum grad_out n`, `grad_bias += sum grad_out`.
    pub(super) fn backward<T: Real>(args: Backward<'_>, dims: Dims) {
        let Dims { images, tokens, selected, dim, .. } = dims;
        let Backward { grad_inp, grad_weight, grad_bias, grad_out, .. } = args;
        let (inp, weight): (&[T], &[T]) = (args.inp.as_slice(), args.weight.as_slice());
        let (mean, rstd): (&[T], &[T]) = (args.mean.as_slice(), args.rstd.as_slice());
        let grad_out = grad_out.as_slice::<T>();
        let per_dim = T::ONE / T::of(dim as f64);
        // One partial sum of both parameter gradients for each image, added up in order below.
        let (partials, _) = args.workspace.carve::<T>(images * 2 * dim);
        let (weights, biases) = partials.split_at_mut(images * dim);
        let parts = weights.par_chunks_mut(dim).zip(biases.par_chunks_mut(dim));
        let grads = grad_inp.into_slice::<T>().par_chunks_mut(tokens * dim);
        grads.zip(parts).enumerate().for_each(|(b, (grad_inp, (grad_weight, grad_bias)))| {
            grad_weight.fill(T::ZERO);
            grad_bias.fill(T::ZERO);
            simd!(|| {
                for m in 0..selected {
                    let row = b * selected + m;
                    let (mu, r) = (mean[row], rstd[row]);
                    let at = token(args.select, b, m);
                    let x = &inp[(b * tokens + at) * dim..][..dim];
                    let grad = &grad_out[row * dim..][..dim];
                    let weight = &weight[..dim];
                    let mean_g = sum([grad, weight], |[g, w]| g * w) * per_dim;
                    let mean_gn =
                        sum([grad, weight, x], |[g, w, x]| g * w * ((x - mu) * r)) * per_dim;
                    let into = &mut grad_inp[at * dim..][..dim];
                    let (grad_weight, grad_bias) = (&mut grad_weight[..dim], &mut grad_bias[..dim]);
                    for d in 0..dim {
                        let n = (x[d] - mu) * r;
                        into[d] = into[d] + r * (grad[d] * weight[d] - mean_g - n * mean_gn);
                        grad_weight[d] = grad_weight[d] + grad[d] * n;
                        grad_bias[d] = grad_bias[d] + grad[d];
                    }
                }
            });
        });
        add_rows(grad_weight.into_slice(), weights);
        add_rows(grad_bias.into_slice(), biases);
    }
}
