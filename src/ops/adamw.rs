//! AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), one fused pass over a vector of parameters.
//!
//! `g = grad clip`, `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
//! `param = param (1 - lr wd) - lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)`, as `torch.optim.AdamW`.
//!
//! A step whose gradient norm is not finite changes nothing: neither parameters nor moments.

use super::for_real;
use crate::{Device, Error, Result, TensorMut, TensorRef};

/// Arguments of [`update`].
#[derive(Debug)]
pub struct Update<'a> {
    /// `(N)`. Updated.
    pub param: TensorMut<'a>,
    /// `(N)`, first moment. Updated.
    pub exp_avg: TensorMut<'a>,
    /// `(N)`, second moment. Updated.
    pub exp_avg_sq: TensorMut<'a>,
    /// `(N)`.
    pub grad: TensorRef<'a>,
    /// `(1)`, from [`super::grad_norm`] over all parameters of the model.
    pub grad_norm: TensorRef<'a>,
    /// Gradients are scaled down to this norm if theirs is larger; 0: never.
    pub clip: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay rates of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, per unit of learning rate.
    pub weight_decay: f64,
    /// Updates made with this one: 1 at first.
    pub step: u64,
}

/// Updates the parameters, or leaves everything as it is if the gradient norm is not finite.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] unless the arguments are as their fields say; [`Error::Invalid`] for step 0.
pub fn update(dev: &Device, args: Update<'_>) -> Result<()> {
    const OP: &str = "adamw";
    let dtype = args.param.expect_real(OP, "param")?;
    let [elems] = args.param.dims(OP, "param", "(N)")?;
    args.exp_avg.expect(OP, "exp_avg", dtype, &[elems])?;
    args.exp_avg_sq.expect(OP, "exp_avg_sq", dtype, &[elems])?;
    args.grad.expect(OP, "grad", dtype, &[elems])?;
    args.grad_norm.expect(OP, "grad_norm", dtype, &[1])?;
    if args.step == 0 {
        return Err(Error::invalid("adamw: step", "is 0, must count this update: 1 at first"));
    }
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::update::<T>(args)),
    }
    Ok(())
}

mod cpu {
    use rayon::prelude::*;

    use super::Update;
    use crate::cpu::{Real, simd};

    /// Elements of a piece of work: four streams of 64 KiB stay in L2.
    const PIECE: usize = 16_384;

    pub(super) fn update<T: Real>(args: Update<'_>) {
        let norm = args.grad_norm.as_slice::<T>()[0].to_f64();
        if !norm.is_finite() {
            return;
        }
        let clip = if args.clip > 0.0 && norm > args.clip { args.clip / norm } else { 1.0 };
        let [b1, b2] = args.betas;
        // Steps beyond i32 have long lost their correction: both powers are 0.
        let step = i32::try_from(args.step).unwrap_or(i32::MAX);
        let step_size = T::of(args.lr / (1.0 - b1.powi(step)));
        let root_correction = T::of((1.0 - b2.powi(step)).sqrt().recip());
        // Not as a factor 1 - lr wd on the parameter: f32 rounds that by as much as a small rate decays in a step.
        let decay = T::of(args.lr * args.weight_decay);
        let (clip, eps) = (T::of(clip), T::of(args.eps));
        let (b1, b2, new1, new2) = (T::of(b1), T::of(b2), T::of(1.0 - b1), T::of(1.0 - b2));
        let param = args.param.into_slice::<T>().par_chunks_mut(PIECE);
        let exp_avg = args.exp_avg.into_slice::<T>().par_chunks_mut(PIECE);
        let exp_avg_sq = args.exp_avg_sq.into_slice::<T>().par_chunks_mut(PIECE);
        let grad = args.grad.as_slice::<T>().par_chunks(PIECE);
        param.zip(exp_avg).zip(exp_avg_sq.zip(grad)).for_each(|((param, m), (v, grad))| {
            simd!(|| {
                for ((p, m), (v, &g)) in param.iter_mut().zip(m).zip(v.iter_mut().zip(grad)) {
                    let g = g * clip;
                    *m = b1 * *m + new1 * g;
                    *v = b2 * *v + new2 * g * g;
                    let toward = step_size * *m / (v.sqrt() * root_correction + eps);
                    *p = *p - (toward + decay * *p);
                }
            });
        });
    }
}
