//! The ops of `pixmim::candle`, written in candle's own: what its autograd then differentiates.

use std::f64::consts::TAU;

use candle_core::{D, DType, Device, Result, Tensor};

/// Queries, keys and values `(B, T, 3 D)`, each head after head, to `(B, T, D)`.
pub(crate) fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let (images, tokens, width) = qkv.dims3()?;
    let head_dim = width / 3 / heads;
    let qkv = qkv.reshape((images, tokens, 3, heads, head_dim))?.permute((2, 0, 3, 1, 4))?;
    let part = |i: usize| qkv.get(i)?.contiguous();
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let scores = (q.matmul(&k.t()?)? * (head_dim as f64).powf(-0.5))?;
    // Softmax does not change when a row is shifted, so no gradient has to pass through its maximum.
    let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
    weights.matmul(&v)?.transpose(1, 2)?.reshape((images, tokens, width / 3))
}

/// Mean squared error between `(B, M, E)`, each target patch by its own mean and variance with `norm_pix`.
pub(crate) fn masked_mse_loss(pred: &Tensor, target: &Tensor, norm_pix: bool) -> Result<Tensor> {
    if !norm_pix {
        return pred.sub(target)?.sqr()?.mean_all();
    }
    let centred = target.broadcast_sub(&target.mean_keepdim(D::Minus1)?)?;
    let numbers = target.dim(D::Minus1)? as f64;
    let variance = (centred.sqr()?.sum_keepdim(D::Minus1)? / (numbers - 1.0))?;
    pred.sub(&centred.broadcast_div(&(variance + 1e-6)?.sqrt()?)?)?.sqr()?.mean_all()
}

/// The ideal low-pass filter of one size, its kept frequencies alone.
pub(crate) struct LowPass {
    /// `(n, S)`: cosine and sine of `2 pi f y / S`.
    cos: Tensor,
    sin: Tensor,
    /// `(n, n)`: 1 where a bin is kept.
    keep: Tensor,
}

impl LowPass {
    pub(crate) fn new(size: usize, radius: f64, dtype: DType) -> Result<Self> {
        let half = (size / 2) as i64;
        // The centre of the disc is between two bins if there is an even number of them.
        let centre = if size.is_multiple_of(2) { 0.5 } else { 0.0 };
        let distance = |f: i64| f as f64 + centre;
        let frequencies: Vec<i64> =
            (-half..size as i64 - half).filter(|&f| distance(f).abs() <= radius).collect();
        let n = frequencies.len();
        let table = |of: fn(f64) -> f64| {
            let angle = |f: i64, y: usize| {
                TAU * (f * y as i64).rem_euclid(size as i64) as f64 / size as f64
            };
            let rows = frequencies.iter().flat_map(|&f| (0..size).map(move |y| of(angle(f, y))));
            Tensor::from_vec(rows.collect::<Vec<f64>>(), (n, size), &Device::Cpu)?.to_dtype(dtype)
        };
        let bins = frequencies.iter().flat_map(|&u| {
            frequencies.iter().map(move |&v| distance(u).powi(2) + distance(v).powi(2))
        });
        let keep: Vec<f64> = bins.map(|d| if d <= radius * radius { 1.0 } else { 0.0 }).collect();
        Ok(Self {
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
            keep: Tensor::from_vec(keep, (n, n), &Device::Cpu)?.to_dtype(dtype)?,
        })
    }

    /// Pixels `(B, 3, S, S)` to their filtered magnitudes.
    fn filter(&self, pixels: &Tensor) -> Result<Tensor> {
        let (cos, sin, size) = (&self.cos, &self.sin, pixels.dim(D::Minus1)?);
        let (cos_t, sin_t) = (cos.t()?, sin.t()?);
        // Along the rows, then along the columns, e^-ix = cos x - i sin x; then only the disc.
        let (re, im) = (pixels.broadcast_matmul(&cos_t)?, pixels.broadcast_matmul(&sin_t)?.neg()?);
        let spectrum_re = cos.broadcast_matmul(&re)?.add(&sin.broadcast_matmul(&im)?)?;
        let spectrum_im = cos.broadcast_matmul(&im)?.sub(&sin.broadcast_matmul(&re)?)?;
        let (re, im) =
            (spectrum_re.broadcast_mul(&self.keep)?, spectrum_im.broadcast_mul(&self.keep)?);
        // Back, e^ix = cos x + i sin x.
        let columns_re = cos_t.broadcast_matmul(&re)?.sub(&sin_t.broadcast_matmul(&im)?)?;
        let columns_im = cos_t.broadcast_matmul(&im)?.add(&sin_t.broadcast_matmul(&re)?)?;
        let re = columns_re.broadcast_matmul(cos)?.sub(&columns_im.broadcast_matmul(sin)?)?;
        let im = columns_im.broadcast_matmul(cos)?.add(&columns_re.broadcast_matmul(sin)?)?;
        re.sqr()?.add(&im.sqr()?)?.sqrt()? / (size * size) as f64
    }

    /// The masked patches of the filtered images, `(B, M, 3 P P)` as (row, column, channel).
    pub(crate) fn target(
        &self,
        pixels: &Tensor,
        ids_masked: &Tensor,
        [mean, std]: [[f64; 3]; 2],
        patch: usize,
    ) -> Result<Tensor> {
        let (images, _, side, _) = pixels.dims4()?;
        let (grid, numbers) = (side / patch, 3 * patch * patch);
        let colours = |of: [f64; 3]| {
            Tensor::new(&of, &Device::Cpu)?.to_dtype(pixels.dtype())?.reshape((1, 3, 1, 1))
        };
        let low = self.filter(pixels)?;
        let low = low.broadcast_sub(&colours(mean)?)?.broadcast_div(&colours(std)?)?;
        let patches = low
            .reshape(vec![images, 3, grid, patch, grid, patch])?
            .permute([0, 2, 4, 3, 5, 1].to_vec())?
            .reshape((images, grid * grid, numbers))?;
        let masked = ids_masked.dim(1)?;
        let rows = ids_masked.unsqueeze(2)?.expand((images, masked, numbers))?.contiguous()?;
        patches.gather(&rows, 1)
    }
}
