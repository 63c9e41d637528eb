//! Layer normalization of rows.

use pixmim::ops::layer_norm::{Backward, Forward, backward, forward, workspace_bytes};
use pixmim::{DType, Result};

use crate::common::{
    Guarded, Real, close, close_as_naive, cpu, dot, for_any, gradcheck, normal,
    same_on_any_threads, slopecheck, uniform, view, widen, workspace,
};
use crate::refusal::{
    Any, arg, refusal, refuses_numbers, refuses_what_does_not_fit, workspace_arg,
};

const EPS: f64 = 1e-6;

#[derive(Clone)]
struct Case<T> {
    images: usize,
    tokens: usize,
    dim: usize,
    inp: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    grad_out: Vec<T>,
    /// What the gradient of the residual stream holds beforehand.
    grad_before: Vec<T>,
}

impl<T: Real> Case<T> {
    fn new([images, tokens, dim]: [usize; 3], mean: f64) -> Self {
        Self {
            images,
            tokens,
            dim,
            inp: normal(1, &[images, tokens, dim], mean, 1.0),
            weight: uniform(2, &[dim]),
            bias: uniform(3, &[dim]),
            grad_out: uniform(4, &[images, tokens, dim]),
            grad_before: uniform(5, &[images, tokens, dim]),
        }
    }

    /// The output, the means, and one over the standard deviations.
    fn forward(&self, eps: f64) -> [Vec<T>; 3] {
        let Self { images, tokens, dim, .. } = *self;
        let mut out = Guarded::poisoned(&[images, tokens, dim]);
        let mut mean = Guarded::poisoned(&[images, tokens]);
        let mut rstd = Guarded::poisoned(&[images, tokens]);
        let args = Forward {
            out: out.view(),
            mean: mean.view(),
            rstd: rstd.view(),
            inp: view(&self.inp, &[images, tokens, dim]),
            weight: view(&self.weight, &[dim]),
            bias: view(&self.bias, &[dim]),
            eps,
        };
        forward(&cpu(), args).unwrap();
        [out.values(), mean.values(), rstd.values()]
    }

    /// Gradients of input, weight and bias, added to `grad_before`, 0 and 0.
    fn backward(&self) -> [Vec<T>; 3] {
        let Self { images, tokens, dim, .. } = *self;
        let [_, mean, rstd] = self.forward(EPS);
        let stats = [images, tokens];
        let zeros = vec![T::of(0.0); dim];
        let mut grad_inp = Guarded::holding(&self.grad_before, &[images, tokens, dim]);
        let mut grad_weight = Guarded::holding(&zeros, &[dim]);
        let mut grad_bias = Guarded::holding(&zeros, &[dim]);
        let mut work = workspace(workspace_bytes(&cpu(), T::DTYPE, images * tokens, dim));
        let args = Backward {
            grad_inp: grad_inp.view(),
            grad_weight: grad_weight.view(),
            grad_bias: grad_bias.view(),
            grad_out: view(&self.grad_out, &[images, tokens, dim]),
            inp: view(&self.inp, &[images, tokens, dim]),
            mean: view(&mean, &stats),
            rstd: view(&rstd, &stats),
            weight: view(&self.weight, &[dim]),
            workspace: work.view(),
        };
        backward(&cpu(), args).unwrap();
        work.values();
        [grad_inp.values(), grad_weight.values(), grad_bias.values()]
    }
}

/// The formula, written down in the precision of `T`.
fn naive<T: Real>(case: &Case<T>) -> Vec<T> {
    let dim = T::of(case.dim as f64);
    let row = |x: &[T]| -> Vec<T> {
        let mean = x.iter().copied().sum::<T>() / dim;
        let var = x.iter().map(|&x| (x - mean) * (x - mean)).sum::<T>() / dim;
        let std = (var + T::of(EPS)).sqrt();
        let affine = case.weight.iter().zip(&case.bias);
        x.iter().zip(affine).map(|(&x, (&w, &b))| (x - mean) / std * w + b).collect()
    };
    case.inp.chunks(case.dim).flat_map(row).collect()
}

/// Gradients of input, weight and bias, as sums over the Jacobian's terms.
fn naive_grads<T: Real>(case: &Case<T>) -> [Vec<T>; 3] {
    let (dim, n) = (case.dim, T::of(case.dim as f64));
    let mut grads = [vec![], vec![T::of(0.0); dim], vec![T::of(0.0); dim]];
    for (x, g) in case.inp.chunks(dim).zip(case.grad_out.chunks(dim)) {
        let mean = x.iter().copied().sum::<T>() / n;
        let var = x.iter().map(|&x| (x - mean) * (x - mean)).sum::<T>() / n;
        let std = (var + T::of(EPS)).sqrt();
        let hat: Vec<T> = x.iter().map(|&x| (x - mean) / std).collect();
        let gw: Vec<T> = g.iter().zip(&case.weight).map(|(&g, &w)| g * w).collect();
        let mean_gw = gw.iter().copied().sum::<T>() / n;
        let mean_hat = gw.iter().zip(&hat).map(|(&g, &h)| g * h).sum::<T>() / n;
        for d in 0..dim {
            grads[0].push((gw[d] - mean_gw - hat[d] * mean_hat) / std);
            grads[1][d] = grads[1][d] + g[d] * hat[d];
            grads[2][d] = grads[2][d] + g[d];
        }
    }
    grads
}

fn loss(case: &Case<f64>) -> f64 {
    dot(&case.forward(EPS)[0], &case.grad_out)
}

/// What was added to the residual stream's gradient.
fn added(case: &Case<f64>, grad_inp: &[f64]) -> Vec<f64> {
    grad_inp.iter().zip(&case.grad_before).map(|(after, before)| after - before).collect()
}

#[test]
fn a_row_comes_out_with_mean_zero_and_variance_one_before_weight_and_bias() {
    let mut case = Case::<f64>::new([1, 1, 4], 0.0);
    case.inp = vec![1.0, 2.0, 3.0, 4.0];
    case.weight = vec![1.0, 1.0, 10.0, 1.0];
    case.bias = vec![0.0, 0.0, 0.0, 5.0];
    let [out, mean, rstd] = case.forward(0.0);
    // Variance with n below: 5 / 4.
    let root = 1.25f64.sqrt();
    close("out", &out, &[-1.5 / root, -0.5 / root, 5.0 / root, 1.5 / root + 5.0], 1e-15);
    close("mean", &mean, &[2.5], 1e-15);
    close("rstd", &rstd, &[1.0 / root], 1e-15);
}

#[test]
fn a_constant_row_gives_the_bias() {
    let mut case = Case::<f32>::new([1, 3, 37], 0.0);
    case.inp.fill(7.0);
    let [out, _, rstd] = case.forward(EPS);
    close("out", &out, &widen(&case.bias.repeat(3)), 0.0);
    close("rstd", &rstd, &[1e3; 3], 1e-3);
}

#[test]
fn output_and_gradients_are_the_naive_ones() {
    for_any((1usize..=4, 1usize..=40, 1usize..=70), |(images, tokens, dim)| {
        let mut case = Case::<f64>::new([images, tokens, dim], 0.5);
        close("out", &case.forward(EPS)[0], &naive(&case), 1e-11);
        let grads = case.backward();
        let want = naive_grads(&case);
        let got = added(&case, &grads[0]);
        // A row of two numbers can be almost constant: there rounding is as large as one over its deviation.
        let steep = case.forward(EPS)[2].iter().fold(1.0, |a: f64, &r| a.max(r));
        for (got, want) in got.chunks(dim).zip(want[0].chunks(dim)) {
            close("grad_inp", got, want, 1e-13 * steep * steep);
        }
        close("grad_weight", &grads[1], &want[1], 1e-11 * steep);
        close("grad_bias", &grads[2], &want[2], 1e-12);
        if steep < 20.0 {
            let inp = std::mem::take(&mut case.inp);
            slopecheck("inp", &inp, &got, |x| loss(&Case { inp: x.to_vec(), ..case.clone() }));
        }
    });
}

#[test]
fn the_gradients_pass_the_finite_differences() {
    for shape in [[2, 5, 7], [3, 7, 5], [1, 2, 33]] {
        let case = Case::<f64>::new(shape, 0.3);
        let grads = case.backward();
        gradcheck("inp", &case.inp, &added(&case, &grads[0]), |x| {
            loss(&Case { inp: x.to_vec(), ..case.clone() })
        });
        gradcheck("weight", &case.weight, &grads[1], |x| {
            loss(&Case { weight: x.to_vec(), ..case.clone() })
        });
        gradcheck("bias", &case.bias, &grads[2], |x| {
            loss(&Case { bias: x.to_vec(), ..case.clone() })
        });
    }
}

#[test]
fn parameter_gradients_are_added_to_what_is_there() {
    let case = Case::<f64>::new([3, 4, 7], 0.0);
    let [_, grad_weight, grad_bias] = case.backward();
    let [_, mean, rstd] = case.forward(EPS);
    let before: [Vec<f64>; 2] = [uniform(7, &[7]), uniform(8, &[7])];
    let mut grad_inp = Guarded::holding(&case.grad_before, &[3, 4, 7]);
    let [mut weight, mut bias] = before.clone().map(|values| Guarded::holding(&values, &[7]));
    let mut work = workspace(workspace_bytes(&cpu(), DType::F64, 12, 7));
    let args = Backward {
        grad_inp: grad_inp.view(),
        grad_weight: weight.view(),
        grad_bias: bias.view(),
        grad_out: view(&case.grad_out, &[3, 4, 7]),
        inp: view(&case.inp, &[3, 4, 7]),
        mean: view(&mean, &[3, 4]),
        rstd: view(&rstd, &[3, 4]),
        weight: view(&case.weight, &[7]),
        workspace: work.view(),
    };
    backward(&cpu(), args).unwrap();
    for (got, (before, grad)) in
        [(weight, (&before[0], grad_weight)), (bias, (&before[1], grad_bias))]
    {
        let want: Vec<f64> = before.iter().zip(grad).map(|(a, b)| a + b).collect();
        close("grad", &got.values(), &want, 1e-14);
    }
}

#[test]
fn in_f32_it_is_as_exact_as_the_naive_formula_however_far_the_mean() {
    for mean in [0.0, 10.0, 1000.0] {
        for shape in [[2, 197, 768], [3, 50, 97]] {
            let case = Case::<f32>::new(shape, mean);
            let exact = Case::<f64>::new(shape, mean);
            let [out, ..] = case.forward(EPS);
            close_as_naive("out", &out, &naive(&case), &naive(&exact));
            let (rough, want) = (naive_grads(&case), naive_grads(&exact));
            let mut zero = case.clone();
            zero.grad_before.fill(0.0);
            let grads = zero.backward();
            close_as_naive("grad_inp", &grads[0], &rough[0], &want[0]);
            close_as_naive("grad_weight", &grads[1], &rough[1], &want[1]);
            close_as_naive("grad_bias", &grads[2], &rough[2], &want[2]);
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let case = Case::<f32>::new([37, 50, 97], 0.5);
    same_on_any_threads(|| [case.forward(EPS).concat(), case.backward().concat()].concat());
}

#[test]
fn what_does_not_fit_is_refused() {
    let real = |name, shape: &[usize]| arg(name, DType::F32, shape);
    let args = [
        real("out", &[2, 6, 7]),
        real("mean", &[2, 6]),
        real("rstd", &[2, 6]),
        real("inp", &[2, 6, 7]),
        real("weight", &[7]),
        real("bias", &[7]),
    ];
    let with_eps = |t: &mut [Any], eps: f64| -> Result<()> {
        let [out, mean, rstd, inp, weight, bias] = t else { unreachable!() };
        let args = Forward {
            out: out.view_mut(),
            mean: mean.view_mut(),
            rstd: rstd.view_mut(),
            inp: inp.view(),
            weight: weight.view(),
            bias: bias.view(),
            eps,
        };
        forward(&cpu(), args)
    };
    let call = |t: &mut [Any]| with_eps(t, EPS);
    refuses_numbers("layer_norm::forward: eps", &[-1e-6], &args, &with_eps);
    refuses_what_does_not_fit("layer_norm::forward", &args, &call);
    let err = refusal(&args, &call, "bias", Any::new(DType::F32, &[6]));
    assert_eq!(err.to_string(), "layer_norm::forward: `bias` has shape [6], expected [7]");

    let args = vec![
        real("grad_inp", &[2, 6, 7]),
        real("grad_weight", &[7]),
        real("grad_bias", &[7]),
        real("grad_out", &[2, 6, 7]),
        real("inp", &[2, 6, 7]),
        real("mean", &[2, 6]),
        real("rstd", &[2, 6]),
        real("weight", &[7]),
        workspace_arg(workspace_bytes(&cpu(), DType::F32, 12, 7)),
    ];
    refuses_what_does_not_fit("layer_norm::backward", &args, &|t| {
        let [grad_inp, grad_weight, grad_bias, grad_out, inp, mean, rstd, weight, workspace] = t
        else {
            unreachable!()
        };
        let args = Backward {
            grad_inp: grad_inp.view_mut(),
            grad_weight: grad_weight.view_mut(),
            grad_bias: grad_bias.view_mut(),
            grad_out: grad_out.view(),
            inp: inp.view(),
            mean: mean.view(),
            rstd: rstd.view(),
            weight: weight.view(),
            workspace: workspace.view_mut(),
        };
        backward(&cpu(), args)
    });
}
