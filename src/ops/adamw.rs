//! AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), one fused pass over a vector of parameters.
//!
//! `g = grad clip`, `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
//! `param = param (1 - lr wd) - lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)`, as `torch.optim.AdamW`.
//!
//! A step whose loss, gradient norm or norm's square is not finite changes nothing: neither parameters nor moments. That
//! is decided where the numbers are, by [`prepare`], so that a GPU need not wait for the host.

use super::{NOT_NEGATIVE, cost, expect_within, for_real};
use crate::device::Call;
use crate::{DType, Device, Result, TensorMut, TensorRef};

/// Numbers in [`Prepare::coefficients`]: whether the step is taken (1 or 0), the factor that clips gradients,
/// `lr / (1 - b1^step)`, `1 / sqrt(1 - b2^step)`, and `lr`.
pub const COEFFICIENTS: usize = 5;

/// Arguments of [`prepare`].
#[derive(Debug)]
pub struct Prepare<'a> {
    /// `(COEFFICIENTS)`. Overwritten; read by [`update`].
    pub coefficients: TensorMut<'a>,
    /// `(1)` i64: updates done. Counted up if the step is taken.
    pub step: TensorMut<'a>,
    /// `(1)` f64: learning rate of this step.
    pub lr: TensorRef<'a>,
    /// `(1)`: a step whose loss is not finite is not taken.
    pub loss: TensorRef<'a>,
    /// `(1)`, from [`super::grad_norm`] over all parameters of the model. Its square must be finite: it would stay in the
    /// second moments.
    pub grad_norm: TensorRef<'a>,
    /// Gradients are scaled down to this norm if theirs is larger; 0: never.
    pub clip: f64,
    /// Decay rates of the moments.
    pub betas: [f64; 2],
}

/// Arguments of [`update`].
#[derive(Debug)]
pub struct Update<'a> {
    /// `(N)`. Updated.
    pub param: TensorMut<'a>,
    /// `(N)` bf16: a copy of `param` to compute with. Overwritten if the step is taken.
    pub copy: Option<TensorMut<'a>>,
    /// `(N)`, first moment. Updated.
    pub exp_avg: TensorMut<'a>,
    /// `(N)`, second moment. Updated.
    pub exp_avg_sq: TensorMut<'a>,
    /// `(N)`.
    pub grad: TensorRef<'a>,
    /// `(COEFFICIENTS)`, from [`prepare`].
    pub coefficients: TensorRef<'a>,
    /// Decay rates of the moments, as given to [`prepare`].
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, per unit of learning rate.
    pub weight_decay: f64,
}

/// Decides whether a step is taken, counts it, and works out what is the same for all parameters.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) or [`Error::DType`](crate::Error::DType) unless the arguments are as their
/// fields say; [`Error::Invalid`](crate::Error::Invalid) for decay rates outside `0..1`, and other numbers that are negative
/// or not finite.
pub fn prepare(dev: &Device, args: Prepare<'_>) -> Result<()> {
    let call = Call { op: "adamw::prepare", dev };
    let dtype = args.coefficients.expect_real(call, "coefficients")?.wide();
    args.coefficients.expect(call, "coefficients", dtype, &[COEFFICIENTS])?;
    args.step.expect(call, "step", DType::I64, &[1])?;
    args.lr.expect(call, "lr", DType::F64, &[1])?;
    args.loss.expect(call, "loss", dtype, &[1])?;
    args.grad_norm.expect(call, "grad_norm", dtype, &[1])?;
    expect_within(call, "clip", args.clip, NOT_NEGATIVE)?;
    expect_betas(call, args.betas)?;
    let _span = dev.span("adamw::prepare", cost::Cost::default);
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::prepare::<T>(args)),
        Device::Cuda(gpu) => launch::prepare(gpu, &args)?,
    }
    Ok(())
}

/// Updates the parameters, or leaves everything as it is if the step is not taken.
///
/// # Errors
/// As [`prepare`].
pub fn update(dev: &Device, args: Update<'_>) -> Result<()> {
    let call = Call { op: "adamw::update", dev };
    let dtype = args.param.expect_real(call, "param")?.wide();
    let [elems] = args.param.dims(call, "param", "(N)")?;
    args.param.expect(call, "param", dtype, &[elems])?;
    if let Some(copy) = &args.copy {
        copy.expect(call, "copy", DType::Bf16, &[elems])?;
    }
    args.exp_avg.expect(call, "exp_avg", dtype, &[elems])?;
    args.exp_avg_sq.expect(call, "exp_avg_sq", dtype, &[elems])?;
    args.grad.expect(call, "grad", dtype, &[elems])?;
    args.coefficients.expect(call, "coefficients", dtype, &[COEFFICIENTS])?;
    expect_betas(call, args.betas)?;
    expect_within(call, "eps", args.eps, NOT_NEGATIVE)?;
    expect_within(call, "weight_decay", args.weight_decay, NOT_NEGATIVE)?;
    let _span = dev.span("adamw::update", || {
        cost::adamw_update(dtype, elems, args.copy.as_ref().map(TensorMut::dtype))
    });
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::update::<T>(args)),
        Device::Cuda(gpu) => launch::update(gpu, &args)?,
    }
    Ok(())
}

fn expect_betas(call: Call<'_>, [beta1, beta2]: [f64; 2]) -> Result<()> {
    expect_within(call, "beta1", beta1, 0.0..1.0)?;
    expect_within(call, "beta2", beta2, 0.0..1.0)
}

mod cpu {
    use rayon::prelude::*;

    use half::bf16;

    use super::{Prepare, Update};
    use crate::cpu::{Real, simd};

    /// Elements of a piece of work: four streams of 64 KiB stay in L2.
    const PIECE: usize = 16_384;

    pub(super) fn prepare<T: Real>(args: Prepare<'_>) {
        let (loss, norm) = (args.loss.scalar(), args.grad_norm.scalar());
        let is_taken = loss.is_finite() && T::of(norm * norm).to_f64().is_finite();
        let [step] = args.step.into_slice::<i64>() else { unreachable!("checked: (1)") };
        *step += i64::from(is_taken);
        let lr = args.lr.scalar();
        let [b1, b2] = args.betas;
        // Steps beyond i32 have long lost their correction: both powers are 0.
        let power = i32::try_from(*step).unwrap_or(i32::MAX);
        let clip = if args.clip > 0.0 && norm > args.clip { args.clip / norm } else { 1.0 };
        let step_size = lr / (1.0 - b1.powi(power));
        let root_correction = (1.0 - b2.powi(power)).sqrt().recip();
        let coefficients =
            [f64::from(u8::from(is_taken)), clip, step_size, root_correction, lr].map(T::of);
        args.coefficients.into_slice().copy_from_slice(&coefficients);
    }

    pub(super) fn update<T: Real>(mut args: Update<'_>) {
        let &[is_taken, clip, step_size, root_correction, lr] = args.coefficients.as_slice::<T>()
        else {
            unreachable!("checked: (COEFFICIENTS)")
        };
        if is_taken == T::ZERO {
            return;
        }
        // Not as a factor 1 - lr wd on the parameter: f32 rounds that by as much as a small rate decays in a step.
        let (decay, eps) = (lr * T::of(args.weight_decay), T::of(args.eps));
        let [b1, b2] = args.betas.map(T::of);
        let [new1, new2] = args.betas.map(|beta| T::of(1.0 - beta));
        let param = args.param.reborrow().into_slice::<T>().par_chunks_mut(PIECE);
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
        if let Some(copy) = args.copy {
            let copy = copy.into_slice::<bf16>().par_chunks_mut(PIECE);
            copy.zip(args.param.as_ref().as_slice::<T>().par_chunks(PIECE)).for_each(
                |(copy, param)| {
                    for (copy, p) in copy.iter_mut().zip(param) {
                        *copy = bf16::from_f64(p.to_f64());
                    }
                },
            );
        }
    }
}

mod launch {
    use super::{Prepare, Update};
    use crate::Result;
    use crate::cuda::{DevPtr, Gpu};

    /// As in `kernels/adamw.cu`.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    struct PrepareParams {
        coefficients: DevPtr,
        step: DevPtr,
        lr: DevPtr,
        loss: DevPtr,
        grad_norm: DevPtr,
        clip: f64,
        betas: [f64; 2],
    }
    const _: () = assert!(size_of::<PrepareParams>() == 64);

    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    struct UpdateParams {
        param: DevPtr,
        copy: DevPtr,
        exp_avg: DevPtr,
        exp_avg_sq: DevPtr,
        grad: DevPtr,
        coefficients: DevPtr,
        elems: i64,
        /// Each with what it leaves of 1.
        betas: [[f32; 2]; 2],
        eps: f32,
        weight_decay: f32,
    }
    const _: () = assert!(size_of::<UpdateParams>() == 80);

    const BLOCK: u32 = 256;
    /// Parameters of a block: four a thread.
    const PARAMS: usize = 4 * BLOCK as usize;

    pub(super) fn prepare(gpu: &Gpu, args: &Prepare<'_>) -> Result<()> {
        let params = PrepareParams {
            coefficients: args.coefficients.dev_ptr(),
            step: args.step.dev_ptr(),
            lr: args.lr.dev_ptr(),
            loss: args.loss.dev_ptr(),
            grad_norm: args.grad_norm.dev_ptr(),
            clip: args.clip,
            betas: args.betas,
        };
        gpu.launch("adamw_prepare", 1, 1, 0, &params)
    }

    pub(super) fn update(gpu: &Gpu, args: &Update<'_>) -> Result<()> {
        let elems = args.param.elems();
        if elems == 0 {
            return Ok(());
        }
        let params = UpdateParams {
            param: args.param.dev_ptr(),
            copy: args.copy.as_ref().map_or_else(DevPtr::default, |copy| copy.dev_ptr()),
            exp_avg: args.exp_avg.dev_ptr(),
            exp_avg_sq: args.exp_avg_sq.dev_ptr(),
            grad: args.grad.dev_ptr(),
            coefficients: args.coefficients.dev_ptr(),
            elems: elems as i64,
            betas: args.betas.map(|beta| [beta as f32, (1.0 - beta) as f32]),
            eps: args.eps as f32,
            weight_decay: args.weight_decay as f32,
        };
        gpu.launch("adamw_update", elems.div_ceil(PARAMS), BLOCK, 0, &params)
    }
}
