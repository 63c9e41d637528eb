//! Layer normalization of all tokens and of chosen ones.

use pixmim::ops::layer_norm::{Backward, Forward, Select, backward, forward, workspace_bytes};
use pixmim::{DType, Error, Result};
use proptest::prelude::{Just, Strategy};

use crate::common::{
    Guarded, Real, close, close_as_naive, cpu, dot, for_any, gradcheck, masks, normal,
    same_on_any_threads, slopecheck, uniform, view, widen, workspace,
};
use crate::refusal::{Any, arg, refusal, refuses_what_does_not_fit, workspace_arg};

const EPS: f64 = 1e-6;

#[derive(Clone)]
struct Case<T> {
    images: usize,
    tokens: usize,
    dim: usize,
    /// Chosen patches of each image, and the tokens before the first patch.
    select: Option<(Vec<i32>, usize)>,
    inp: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    grad_out: Vec<T>,
    /// What the gradient of the residual stream holds beforehand.
    grad_before: Vec<T>,
}

impl<T: Real> Case<T> {
    /// `masked` of the patches are chosen, behind one class token; 0: all tokens.
    fn new([images, tokens, dim]: [usize; 3], masked: usize, mean: f64) -> Self {
        let patches = tokens - 1;
        let select = (masked > 0).then(|| (masks(9, images, patches, patches - masked).masked, 1));
        let rows = if masked > 0 { masked } else { tokens };
        Self {
            images,
            tokens,
            dim,
            select,
            inp: normal(1, &[images, tokens, dim], mean, 1.0),
            weight: uniform(2, &[dim]),
            bias: uniform(3, &[dim]),
            grad_out: uniform(4, &[images, rows, dim]),
            grad_before: uniform(5, &[images, tokens, dim]),
        }
    }

    /// Rows of an image's output.
    fn rows(&self) -> usize {
        self.select.as_ref().map_or(self.tokens, |(ids, _)| ids.len() / self.images)
    }

    fn select(&self) -> Option<Select<'_>> {
        let shape = [self.images, self.rows()];
        self.select.as_ref().map(|(ids, prefix)| Select { ids: view(ids, &shape), prefix: *prefix })
    }

    /// The rows of `values` that are normalised, one after another.
    fn chosen<'a>(&self, values: &'a [T]) -> Vec<&'a [T]> {
        (0..self.images * self.rows())
            .map(|row| {
                let token = match &self.select {
                    Some((ids, prefix)) => prefix + ids[row] as usize,
                    None => row % self.rows(),
                };
                let at = row / self.rows() * self.tokens + token;
                &values[at * self.dim..][..self.dim]
            })
            .collect()
    }

    /// The output, the means, and one over the standard deviations.
    fn forward(&self, eps: f64) -> [Vec<T>; 3] {
        let Self { images, tokens, dim, .. } = *self;
        let mut out = Guarded::poisoned(&[images, self.rows(), dim]);
        let mut mean = Guarded::poisoned(&[images, self.rows()]);
        let mut rstd = Guarded::poisoned(&[images, self.rows()]);
        let args = Forward {
            out: out.view(),
            mean: mean.view(),
            rstd: rstd.view(),
            inp: view(&self.inp, &[images, tokens, dim]),
            select: self.select(),
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
        let stats = [images, self.rows()];
        let zeros = vec![T::of(0.0); dim];
        let mut grad_inp = Guarded::holding(&self.grad_before, &[images, tokens, dim]);
        let mut grad_weight = Guarded::holding(&zeros, &[dim]);
        let mut grad_bias = Guarded::holding(&zeros, &[dim]);
        let mut work = workspace(workspace_bytes(&cpu(), T::DTYPE, images, dim));
        let args = Backward {
            grad_inp: grad_inp.view(),
            grad_weight: grad_weight.view(),
            grad_bias: grad_bias.view(),
            grad_out: view(&self.grad_out, &[images, self.rows(), dim]),
            inp: view(&self.inp, &[images, tokens, dim]),
            select: self.select(),
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
    case.chosen(&case.inp).into_iter().flat_map(row).collect()
}

/// Gradients of weight and bias, and of the chosen rows of the input, as sums over the Jacobian's terms.
fn naive_grads<T: Real>(case: &Case<T>) -> [Vec<T>; 3] {
    let (dim, n) = (case.dim, T::of(case.dim as f64));
    let mut grads = [vec![], vec![T::of(0.0); dim], vec![T::of(0.0); dim]];
    for (x, g) in case.chosen(&case.inp).into_iter().zip(case.grad_out.chunks(dim)) {
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
    let mut case = Case::<f64>::new([1, 1, 4], 0, 0.0);
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
    let mut case = Case::<f32>::new([1, 3, 37], 0, 0.0);
    case.inp.fill(7.0);
    let [out, _, rstd] = case.forward(EPS);
    close("out", &out, &widen(&case.bias.repeat(3)), 0.0);
    close("rstd", &rstd, &[1e3; 3], 1e-3);
}

/// Images, tokens, width, and how many patches are chosen (0: all tokens).
fn shapes() -> impl Strategy<Value = (usize, usize, usize, usize)> {
    (1usize..=4, 2usize..=9, 1usize..=70)
        .prop_flat_map(|(images, tokens, dim)| (Just(images), Just(tokens), Just(dim), 0..tokens))
}

#[test]
fn output_and_gradients_are_the_naive_ones() {
    for_any(shapes(), |(images, tokens, dim, masked)| {
        let mut case = Case::<f64>::new([images, tokens, dim], masked, 0.5);
        close("out", &case.forward(EPS)[0], &naive(&case), 1e-11);
        let grads = case.backward();
        let want = naive_grads(&case);
        let got = added(&case, &grads[0]);
        // A row of two numbers can be almost constant: there rounding is as large as one over its deviation.
        let steep = case.forward(EPS)[2].iter().fold(1.0, |a: f64, &r| a.max(r));
        for (got, want) in case.chosen(&got).into_iter().zip(want[0].chunks(dim)) {
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
    for (shape, masked) in [([2, 5, 7], 0), ([3, 7, 5], 2), ([1, 2, 33], 1)] {
        let case = Case::<f64>::new(shape, masked, 0.3);
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
fn tokens_that_are_not_chosen_keep_their_gradient() {
    let case = Case::<f32>::new([3, 10, 33], 4, 0.0);
    let [grad_inp, ..] = case.backward();
    let (ids, _) = case.select.as_ref().unwrap();
    for (row, (after, before)) in grad_inp.chunks(33).zip(case.grad_before.chunks(33)).enumerate() {
        let (b, token) = (row / 10, row % 10);
        let chosen = ids[b * 4..][..4].iter().any(|&id| 1 + id as usize == token);
        assert_eq!(after != before, chosen, "token {token} of image {b}");
    }
}

#[test]
fn parameter_gradients_are_added_to_what_is_there() {
    let case = Case::<f64>::new([3, 4, 7], 0, 0.0);
    let [_, grad_weight, grad_bias] = case.backward();
    let [_, mean, rstd] = case.forward(EPS);
    let before: [Vec<f64>; 2] = [uniform(7, &[7]), uniform(8, &[7])];
    let mut grad_inp = Guarded::holding(&case.grad_before, &[3, 4, 7]);
    let [mut weight, mut bias] = before.clone().map(|values| Guarded::holding(&values, &[7]));
    let mut work = workspace(workspace_bytes(&cpu(), DType::F64, 3, 7));
    let args = Backward {
        grad_inp: grad_inp.view(),
        grad_weight: weight.view(),
        grad_bias: bias.view(),
        grad_out: view(&case.grad_out, &[3, 4, 7]),
        inp: view(&case.inp, &[3, 4, 7]),
        select: None,
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
        for (shape, masked) in [([2, 197, 768], 0), ([3, 50, 97], 20)] {
            let case = Case::<f32>::new(shape, masked, mean);
            let exact = Case::<f64>::new(shape, masked, mean);
            let [out, ..] = case.forward(EPS);
            close_as_naive("out", &out, &naive(&case), &naive(&exact));
            let (rough, want) = (naive_grads(&case), naive_grads(&exact));
            let mut zero = case.clone();
            zero.grad_before.fill(0.0);
            let grads = zero.backward();
            let got = zero.chosen(&grads[0]).concat();
            close_as_naive("grad_inp", &got, &rough[0], &want[0]);
            close_as_naive("grad_weight", &grads[1], &rough[1], &want[1]);
            close_as_naive("grad_bias", &grads[2], &rough[2], &want[2]);
        }
    }
}

#[test]
fn threads_change_no_bit() {
    for masked in [0, 30] {
        let case = Case::<f32>::new([37, 50, 97], masked, 0.5);
        same_on_any_threads(|| [case.forward(EPS).concat(), case.backward().concat()].concat());
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let real = |name, shape: &[usize]| arg(name, DType::F32, shape);
    let ids = || arg("select.ids", DType::I32, &[2, 3]).holding(&[0, 4, 2, 3, 1, 0]);
    let forward_args = |rows, inp| {
        [
            real("out", &[2, rows, 7]),
            real("mean", &[2, rows]),
            real("rstd", &[2, rows]),
            inp,
            real("weight", &[7]),
            real("bias", &[7]),
        ]
    };
    let inp = || real("inp", &[2, 6, 7]);
    let call = |t: &mut [Any]| -> Result<()> {
        let [out, mean, rstd, inp, weight, bias, ids @ ..] = t else { unreachable!() };
        let args = Forward {
            out: out.view_mut(),
            mean: mean.view_mut(),
            rstd: rstd.view_mut(),
            inp: inp.view(),
            select: ids.first().map(|ids| Select { ids: ids.view(), prefix: 1 }),
            weight: weight.view(),
            bias: bias.view(),
            eps: EPS,
        };
        forward(&cpu(), args)
    };
    let op = "layer_norm::forward";
    refuses_what_does_not_fit(op, &forward_args(6, inp()), &call);
    let chosen: Vec<_> = forward_args(3, inp().free(&[1])).into_iter().chain([ids()]).collect();
    refuses_what_does_not_fit(op, &chosen, &call);
    let err = refusal(&forward_args(6, inp()), &call, "bias", Any::new(DType::F32, &[6]));
    assert_eq!(err.to_string(), "layer_norm::forward: `bias` has shape [6], expected [7]");
    for id in [5, -1, i32::MAX] {
        let bad = Any::holding(&[0, 4, 2, 3, id, 0], &[2, 3]);
        let err = refusal(&chosen, &call, "select.ids", bad);
        assert!(matches!(err, Error::Invalid { .. }));
        let want = format!("`layer_norm::forward: select.ids` holds the id {id}, outside 0..5");
        assert_eq!(err.to_string(), want);
    }

    let args = vec![
        real("grad_inp", &[2, 6, 7]),
        real("grad_weight", &[7]),
        real("grad_bias", &[7]),
        real("grad_out", &[2, 3, 7]),
        inp(),
        ids(),
        real("mean", &[2, 3]),
        real("rstd", &[2, 3]),
        real("weight", &[7]),
        workspace_arg(workspace_bytes(&cpu(), DType::F32, 2, 7)),
    ];
    refuses_what_does_not_fit("layer_norm::backward", &args, &|t| {
        let [grad_inp, grad_weight, grad_bias, grad_out, inp, ids, mean, rstd, weight, workspace] =
            t
        else {
            unreachable!()
        };
        let args = Backward {
            grad_inp: grad_inp.view_mut(),
            grad_weight: grad_weight.view_mut(),
            grad_bias: grad_bias.view_mut(),
            grad_out: grad_out.view(),
            inp: inp.view(),
            select: Some(Select { ids: ids.view(), prefix: 1 }),
            mean: mean.view(),
            rstd: rstd.view(),
            weight: weight.view(),
            workspace: workspace.view_mut(),
        };
        backward(&cpu(), args)
    });
}
