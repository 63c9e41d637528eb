//! Layer normalization on a GPU: every kernel's widths, against f64 and the naive formula.

use half::bf16;
use pixmim::ops::layer_norm::{Backward, Forward, backward, forward, workspace_bytes};
use pixmim::{DType, Device, Error, TensorMut, TensorRef};

use crate::common::{
    Input, Output, Stored, close_as_naive, gpu, normal, same_on_any_schedule, uniform,
    unit_roundoff, widen, workspace,
};

const EPS: f64 = 1e-6;

struct Case<T> {
    rows: usize,
    dim: usize,
    inp: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    grad_out: Vec<T>,
    /// What the gradients of the residual stream and of the parameters hold beforehand.
    grad_before: Vec<T>,
    params_before: Vec<f32>,
}

/// Output, means, one over the deviations; gradients of input, weight and bias.
struct Results {
    out: Vec<f64>,
    mean: Vec<f64>,
    rstd: Vec<f64>,
    grads: [Vec<f64>; 3],
}

impl<T: Stored> Case<T> {
    fn new([rows, dim]: [usize; 2], mean: f64) -> Self {
        Self {
            rows,
            dim,
            inp: normal(1, rows * dim, mean, 1.5),
            weight: uniform(2, dim),
            bias: uniform(3, dim),
            grad_out: uniform(4, rows * dim),
            grad_before: uniform(5, rows * dim),
            params_before: uniform(6, 2 * dim),
        }
    }

    fn on(&self, dev: &Device) -> Results {
        let Self { rows, dim, .. } = *self;
        let (full, stats) = ([rows, dim], [rows]);
        let inp = Input::new(dev, &self.inp, &full);
        let weight = Input::new(dev, &self.weight, &[dim]);
        let bias = Input::new(dev, &self.bias, &[dim]);
        let mut out = Output::new(dev, T::DTYPE, &full);
        let mut mean = Output::new(dev, DType::F32, &stats);
        let mut rstd = Output::new(dev, DType::F32, &stats);
        let args = Forward {
            out: out.view(),
            mean: mean.view(),
            rstd: rstd.view(),
            inp: inp.view(),
            weight: weight.view(),
            bias: bias.view(),
            eps: EPS,
        };
        forward(dev, args).unwrap();

        let grad_out = Input::new(dev, &self.grad_out, &full);
        let mut grad_inp = Output::holding(dev, &self.grad_before, &full);
        let mut grad_weight = Output::holding(dev, &self.params_before[..dim], &[dim]);
        let mut grad_bias = Output::holding(dev, &self.params_before[dim..], &[dim]);
        let mut work = workspace(dev, workspace_bytes(dev, T::DTYPE, rows, dim));
        let args = Backward {
            grad_inp: grad_inp.view(),
            grad_weight: grad_weight.view(),
            grad_bias: grad_bias.view(),
            grad_out: grad_out.view(),
            inp: inp.view(),
            mean: mean.as_ref(),
            rstd: rstd.as_ref(),
            weight: weight.view(),
            workspace: work.view(),
        };
        backward(dev, args).unwrap();
        Results {
            out: widen(&out.values::<T>()),
            mean: widen(&mean.values::<f32>()),
            rstd: widen(&rstd.values::<f32>()),
            grads: [
                widen(&grad_inp.values::<T>()),
                widen(&grad_weight.values::<f32>()),
                widen(&grad_bias.values::<f32>()),
            ],
        }
    }

    /// The CPU side in f64, on the same numbers.
    fn exact(&self) -> Results {
        let Self { rows, dim, .. } = *self;
        let (dev, full) = (Device::cpu(), [rows, dim]);
        let [inp, weight, bias, grad_out] =
            [&self.inp, &self.weight, &self.bias, &self.grad_out].map(|x| widen(x));
        let mut out = vec![0.0; rows * dim];
        let (mut mean, mut rstd) = (vec![0.0; rows], vec![0.0; rows]);
        let args = Forward {
            out: TensorMut::new(&mut out, &full).unwrap(),
            mean: TensorMut::new(&mut mean, &[rows]).unwrap(),
            rstd: TensorMut::new(&mut rstd, &[rows]).unwrap(),
            inp: TensorRef::new(&inp, &full).unwrap(),
            weight: TensorRef::new(&weight, &[dim]).unwrap(),
            bias: TensorRef::new(&bias, &[dim]).unwrap(),
            eps: EPS,
        };
        forward(&dev, args).unwrap();
        let params = widen(&self.params_before);
        let mut grads = [widen(&self.grad_before), params[..dim].to_vec(), params[dim..].to_vec()];
        let [grad_inp, grad_weight, grad_bias] = &mut grads;
        let mut work = vec![0u8; workspace_bytes(&dev, DType::F64, rows, dim)];
        let bytes = work.len();
        let args = Backward {
            grad_inp: TensorMut::new(grad_inp, &full).unwrap(),
            grad_weight: TensorMut::new(grad_weight, &[dim]).unwrap(),
            grad_bias: TensorMut::new(grad_bias, &[dim]).unwrap(),
            grad_out: TensorRef::new(&grad_out, &full).unwrap(),
            inp: TensorRef::new(&inp, &full).unwrap(),
            mean: TensorRef::new(&mean, &[rows]).unwrap(),
            rstd: TensorRef::new(&rstd, &[rows]).unwrap(),
            weight: TensorRef::new(&weight, &[dim]).unwrap(),
            workspace: TensorMut::new(&mut work, &[bytes]).unwrap(),
        };
        backward(&dev, args).unwrap();
        Results { out, mean, rstd, grads }
    }

    /// The formulas written down in f32, stored as `T`.
    fn naive(&self) -> Results {
        let dim = self.dim;
        let n = dim as f32;
        let f32s = |x: &[T]| -> Vec<f32> { x.iter().map(|x| x.f64() as f32).collect() };
        let [inp, weight, bias, grad_out, before] =
            [&self.inp, &self.weight, &self.bias, &self.grad_out, &self.grad_before]
                .map(|x| f32s(x));
        let store = |x: f32| T::round(f64::from(x)).f64();
        let [mut out, mut mean, mut rstd, mut grad_inp] = [vec![], vec![], vec![], vec![]];
        let mut params = self.params_before.clone();
        let rows = inp.chunks(dim).zip(grad_out.chunks(dim)).zip(before.chunks(dim));
        for ((x, g), before) in rows {
            let mu = x.iter().sum::<f32>() / n;
            let var = x.iter().map(|x| (x - mu) * (x - mu)).sum::<f32>() / n;
            let r = 1.0 / (var + EPS as f32).sqrt();
            let hat: Vec<f32> = x.iter().map(|x| (x - mu) * r).collect();
            let gw: Vec<f32> = g.iter().zip(&weight).map(|(g, w)| g * w).collect();
            let mean_gw = gw.iter().sum::<f32>() / n;
            let mean_hat = gw.iter().zip(&hat).map(|(g, h)| g * h).sum::<f32>() / n;
            for d in 0..dim {
                out.push(store(hat[d] * weight[d] + bias[d]));
                grad_inp.push(store(before[d] + r * (gw[d] - mean_gw - hat[d] * mean_hat)));
                params[d] += g[d] * hat[d];
                params[dim + d] += g[d];
            }
            mean.push(f64::from(mu));
            rstd.push(f64::from(r));
        }
        let params = widen(&params);
        Results {
            out,
            mean,
            rstd,
            grads: [grad_inp, params[..dim].to_vec(), params[dim..].to_vec()],
        }
    }

    #[track_caller]
    fn check(&self) {
        let (dim, [got, naive, exact]) = (self.dim, [self.on(&gpu()), self.naive(), self.exact()]);
        let (stored, single) = (unit_roundoff::<T>(), unit_roundoff::<f32>());
        let [grad_inp, grad_weight, grad_bias] =
            [0, 1, 2].map(|i| [&got, &naive, &exact].map(|results| &results.grads[i]));
        for (name, [got, naive, exact], width, floor) in [
            ("out", [&got.out, &naive.out, &exact.out], dim, stored),
            // Each is one row: a single number may be exact in the naive formula by chance.
            ("mean", [&got.mean, &naive.mean, &exact.mean], self.rows, 2.0 * single),
            ("rstd", [&got.rstd, &naive.rstd, &exact.rstd], self.rows, 2.0 * single),
            ("grad_inp", grad_inp, dim, stored),
            ("grad_weight", grad_weight, dim, single),
            ("grad_bias", grad_bias, dim, single),
        ] {
            let name = format!("{name} of {} rows of {dim}, {:?}", self.rows, T::DTYPE);
            close_as_naive(&name, got, naive, exact, width, floor);
        }
    }
}

/// A width for each kernel, most of them with idle lanes: see `kernels/layer_norm.cu`.
const DIMS: [usize; 9] = [8, 200, 256, 392, 768, 1000, 1272, 1400, 2056];

#[test]
fn every_width_is_as_exact_as_the_naive_formula() {
    for (rows, dim) in [1, 7, 49, 3, 50, 5, 9, 11, 2].into_iter().zip(DIMS) {
        Case::<f32>::new([rows, dim], 0.5).check();
        Case::<bf16>::new([rows, dim], 0.5).check();
    }
    Case::<bf16>::new([1, 8192], -0.3).check();
}

#[test]
fn it_stays_exact_however_far_the_mean() {
    for mean in [10.0, 1000.0] {
        Case::<f32>::new([17, 776], mean).check();
        Case::<bf16>::new([17, 520], mean).check();
    }
}

#[test]
fn a_warp_may_have_many_rows() {
    // More rows than the whole grid takes in one turn, with one, two and sixteen warps to a row.
    Case::<bf16>::new([2 * 2640 + 131, 8], 0.5).check();
    Case::<f32>::new([2 * 792 + 67, 776], 0.5).check();
    Case::<f32>::new([135, 2056], 0.5).check();
    Case::<bf16>::new([135, 2056], 0.5).check();
}

#[test]
fn a_constant_row_gives_the_bias() {
    let mut case = Case::<f32>::new([3, 264], 0.0);
    case.inp.fill(7.0);
    let results = case.on(&gpu());
    assert_eq!(results.out, widen(&case.bias.repeat(3)));
    assert!(results.rstd.iter().all(|r| (r - 1e3).abs() < 1e-3));
}

#[test]
fn schedules_change_no_bit() {
    let all = |results: Results| {
        [vec![results.out, results.mean, results.rstd], results.grads.to_vec()].concat().concat()
    };
    let (one, several) = (Case::<bf16>::new([65, 72], 0.5), Case::<bf16>::new([5, 1288], 0.5));
    same_on_any_schedule(|dev| all(one.on(dev)));
    same_on_any_schedule(|dev| all(several.on(dev)));
}

#[test]
fn leading_dimensions_count_as_rows() {
    let (dev, case) = (gpu(), Case::<f32>::new([6, 40], 0.5));
    let [weight, bias] = [&case.weight, &case.bias].map(|x| Input::new(&dev, x, &[40]));
    let inp = Input::new(&dev, &case.inp, &[2, 3, 40]);
    let mut out = Output::new(&dev, DType::F32, &[2, 3, 40]);
    let [mut mean, mut rstd] = [(); 2].map(|()| Output::new(&dev, DType::F32, &[2, 3]));
    let args = Forward {
        out: out.view(),
        mean: mean.view(),
        rstd: rstd.view(),
        inp: inp.view(),
        weight: weight.view(),
        bias: bias.view(),
        eps: EPS,
    };
    forward(&dev, args).unwrap();
    assert_eq!(widen(&out.values::<f32>()), case.on(&dev).out);
}

/// What is said of an input of this dtype and width, in memory of `home`.
fn refusal(dev: &Device, home: &Device, dtype: DType, dim: usize) -> Error {
    let tensor = |shape: &[usize]| Output::new(home, dtype, shape);
    let [mut inp, mut out] = [(); 2].map(|()| tensor(&[3, dim]));
    let [mut mean, mut rstd] = [(); 2].map(|()| tensor(&[3]));
    let [mut weight, mut bias] = [(); 2].map(|()| tensor(&[dim]));
    let args = Forward {
        out: out.view(),
        mean: mean.view(),
        rstd: rstd.view(),
        inp: inp.as_ref(),
        weight: weight.as_ref(),
        bias: bias.as_ref(),
        eps: EPS,
    };
    forward(dev, args).unwrap_err()
}

#[test]
fn what_a_gpu_cannot_do_is_refused() {
    let dev = gpu();
    for (dim, cure) in [(12, "a multiple of 8"), (8200, "at most 8192")] {
        let err = refusal(&dev, &dev, DType::F32, dim);
        assert!(err.to_string().contains(cure), "{err}");
    }
    assert!(matches!(refusal(&dev, &dev, DType::F64, 16), Error::DType { .. }));
    let err = refusal(&dev, &Device::cpu(), DType::F32, 16);
    assert!(matches!(err, Error::Place { .. }), "{err}");
}
