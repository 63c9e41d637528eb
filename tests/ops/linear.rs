//! The product with each epilogue, its gradients, and both precisions of products.

use half::bf16;
use pixmim::ops::gelu;
use pixmim::ops::linear::{Backward, Epilogue, Forward, GradInput, backward, forward};
use pixmim::{DType, Device, Result};

use crate::common::{
    Guarded, Real, close, close_as_naive, cpu, cpu_bf16, dot, for_any, gradcheck, no_workspace,
    same_on_any_threads, scale, slopecheck, uniform, view,
};
use crate::refusal::{Any, arg, refusal, refuses_what_does_not_fit};

/// (R, K, N).
type Size = [usize; 3];

#[derive(Clone, Copy, Debug, PartialEq)]
enum After {
    Nothing,
    Gelu,
    Residual,
}
const AFTER: [After; 3] = [After::Nothing, After::Gelu, After::Residual];

#[derive(Clone)]
struct Layer<T> {
    inp: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    residual: Vec<T>,
    /// What gave `inp`, where the layer before ended in GELU.
    pre: Vec<T>,
    grad_out: Vec<T>,
}

impl<T: Real> Layer<T> {
    fn new([rows, inputs, outputs]: Size) -> Self {
        Self {
            inp: uniform(1, &[rows, inputs]),
            weight: uniform(2, &[outputs, inputs]),
            bias: uniform(3, &[outputs]),
            residual: uniform(4, &[rows, outputs]),
            pre: uniform(5, &[rows, inputs]),
            grad_out: uniform(6, &[rows, outputs]),
        }
    }

    /// The output, and what GELU was applied to.
    fn forward(&self, dev: &Device, [rows, inputs, outputs]: Size, after: After) -> [Vec<T>; 2] {
        let mut out = Guarded::poisoned(&[rows, outputs]);
        let mut pre = Guarded::poisoned(&[rows, outputs]);
        let epilogue = match after {
            After::Nothing => Epilogue::None,
            After::Gelu => Epilogue::Gelu(pre.view()),
            After::Residual => Epilogue::Residual(view(&self.residual, &[rows, outputs])),
        };
        let args = Forward {
            out: out.view(),
            inp: view(&self.inp, &[rows, inputs]),
            weight: view(&self.weight, &[outputs, inputs]),
            bias: view(&self.bias, &[outputs]),
            epilogue,
        };
        forward(dev, args).unwrap();
        [out.values(), pre.values()]
    }

    /// Gradients of input, weight and bias; the last two are added to `before`.
    fn backward(
        &self,
        dev: &Device,
        [rows, inputs, outputs]: Size,
        through_gelu: bool,
        before: [&[T]; 2],
    ) -> [Vec<T>; 3] {
        let mut grad_inp = Guarded::poisoned(&[rows, inputs]);
        let mut grad_weight = Guarded::holding(before[0], &[outputs, inputs]);
        let mut grad_bias = Guarded::holding(before[1], &[outputs]);
        let grad = grad_inp.view();
        let args = Backward {
            grad_inp: match through_gelu {
                true => GradInput::Gelu { grad, pre: view(&self.pre, &[rows, inputs]) },
                false => GradInput::Plain(grad),
            },
            grad_weight: grad_weight.view(),
            grad_bias: grad_bias.view(),
            grad_out: view(&self.grad_out, &[rows, outputs]),
            inp: view(&self.inp, &[rows, inputs]),
            weight: view(&self.weight, &[outputs, inputs]),
            workspace: no_workspace(),
        };
        backward(dev, args).unwrap();
        [grad_inp.values(), grad_weight.values(), grad_bias.values()]
    }

    fn backward_from_zero(&self, dev: &Device, size: Size, through_gelu: bool) -> [Vec<T>; 3] {
        let zeros = vec![T::of(0.0); size[1] * size[2]];
        self.backward(dev, size, through_gelu, [&zeros, &zeros[..size[2]]])
    }
}

/// `m x n` product of `a` (m, k) and `b` (k, n), given by their elements.
fn product<T: Real>(
    [m, k, n]: Size,
    a: impl Fn(usize, usize) -> T,
    b: impl Fn(usize, usize) -> T,
) -> Vec<T> {
    (0..m * n).map(|at| (0..k).map(|p| a(at / n, p) * b(p, at % n)).sum()).collect()
}

fn naive<T: Real>(layer: &Layer<T>, [rows, inputs, outputs]: Size, after: After) -> Vec<T> {
    let xw = product(
        [rows, inputs, outputs],
        |r, p| layer.inp[r * inputs + p],
        |p, n| layer.weight[n * inputs + p],
    );
    let y: Vec<T> = xw.iter().enumerate().map(|(i, &x)| x + layer.bias[i % outputs]).collect();
    match after {
        After::Nothing => y,
        After::Residual => y.iter().zip(&layer.residual).map(|(&y, &x)| x + y).collect(),
        After::Gelu => y.iter().map(|y| T::of(gelu_of(y.f64()))).collect(),
    }
}

fn gelu_of(x: f64) -> f64 {
    0.5 * x * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2)
}

/// Gradients of input (without GELU), weight and bias.
fn naive_grads<T: Real>(layer: &Layer<T>, [rows, inputs, outputs]: Size) -> [Vec<T>; 3] {
    let grad = |r: usize, n: usize| layer.grad_out[r * outputs + n];
    let inp = |r: usize, k: usize| layer.inp[r * inputs + k];
    [
        product([rows, outputs, inputs], grad, |n, k| layer.weight[n * inputs + k]),
        product([outputs, rows, inputs], |n, r| grad(r, n), inp),
        (0..outputs).map(|n| (0..rows).map(|r| grad(r, n)).sum()).collect(),
    ]
}

#[test]
fn the_product_is_the_naive_one_with_each_epilogue() {
    for_any((1usize..=40, 1usize..=70, 1usize..=70), |(rows, inputs, outputs)| {
        let size = [rows, inputs, outputs];
        let layer = Layer::<f64>::new(size);
        let plain = naive(&layer, size, After::Nothing);
        for after in AFTER {
            let [out, pre] = layer.forward(&cpu(), size, after);
            close("out", &out, &naive(&layer, size, after), 1e-12);
            if after == After::Gelu {
                close("pre", &pre, &plain, 1e-12);
            }
        }
    });
}

#[test]
fn the_gradients_are_the_naive_ones_and_belong_to_the_product() {
    for_any((1usize..=20, 1usize..=37, 1usize..=37), |(rows, inputs, outputs)| {
        let size = [rows, inputs, outputs];
        let layer = Layer::<f64>::new(size);
        let grads = layer.backward_from_zero(&cpu(), size, false);
        let want = naive_grads(&layer, size);
        let names = ["grad_inp", "grad_weight", "grad_bias"];
        for ((name, grad), want) in names.iter().zip(&grads).zip(&want) {
            close(name, grad, want, 1e-12);
        }
        let loss = |layer: &Layer<f64>| {
            dot(&layer.forward(&cpu(), size, After::Residual)[0], &layer.grad_out)
        };
        slopecheck("inp", &layer.inp, &grads[0], |x| {
            loss(&Layer { inp: x.to_vec(), ..layer.clone() })
        });
        slopecheck("weight", &layer.weight, &grads[1], |x| {
            loss(&Layer { weight: x.to_vec(), ..layer.clone() })
        });
    });
}

#[test]
fn the_gradient_through_gelu_is_that_of_the_layer_before() {
    let size = [5, 7, 3];
    let layer = Layer::<f64>::new(size);
    // A layer whose input is gelu(pre).
    let of_pre = |pre: &[f64]| {
        let mut inp = Guarded::poisoned(&[5, 7]);
        let args = gelu::Forward { out: inp.view(), inp: view(pre, &[5, 7]) };
        gelu::forward(&cpu(), args).unwrap();
        Layer { inp: inp.values(), ..layer.clone() }
    };
    let whole = of_pre(&layer.pre);
    let grads = whole.backward_from_zero(&cpu(), size, true);
    gradcheck("pre", &layer.pre, &grads[0], |pre| {
        dot(&of_pre(pre).forward(&cpu(), size, After::Nothing)[0], &layer.grad_out)
    });
    gradcheck("weight", &layer.weight, &grads[1], |x| {
        let changed = Layer { weight: x.to_vec(), ..whole.clone() };
        dot(&changed.forward(&cpu(), size, After::Nothing)[0], &layer.grad_out)
    });
    gradcheck("bias", &layer.bias, &grads[2], |x| {
        let changed = Layer { bias: x.to_vec(), ..whole.clone() };
        dot(&changed.forward(&cpu(), size, After::Nothing)[0], &layer.grad_out)
    });
}

#[test]
fn parameter_gradients_are_added_to_what_is_there() {
    let size = [5, 70, 13];
    let layer = Layer::<f64>::new(size);
    let before: [Vec<f64>; 2] = [uniform(8, &[70 * 13]), uniform(9, &[13])];
    for dev in [cpu(), cpu_bf16()] {
        let grads = layer.backward_from_zero(&dev, size, false);
        let added = layer.backward(&dev, size, false, [&before[0], &before[1]]);
        for i in 0..2 {
            let want: Vec<f64> = before[i].iter().zip(&grads[i + 1]).map(|(a, b)| a + b).collect();
            close("grad", &added[i + 1], &want, 1e-12);
        }
        assert_eq!(added[0], grads[0]);
    }
}

#[test]
fn the_gradient_of_the_input_may_be_left_out() {
    let size = [5, 7, 3];
    let layer = Layer::<f64>::new(size);
    let (mut weight, mut bias) =
        (Guarded::holding(&[0.0; 21], &[3, 7]), Guarded::holding(&[0.0; 3], &[3]));
    let args = Backward {
        grad_inp: GradInput::None,
        grad_weight: weight.view(),
        grad_bias: bias.view(),
        grad_out: view(&layer.grad_out, &[5, 3]),
        inp: view(&layer.inp, &[5, 7]),
        weight: view(&layer.weight, &[3, 7]),
        workspace: no_workspace(),
    };
    backward(&cpu(), args).unwrap();
    let [_, want_weight, want_bias] = layer.backward_from_zero(&cpu(), size, false);
    assert_eq!((weight.values(), bias.values()), (want_weight, want_bias));
}

/// Sizes at and around the tiles and blocks of both kinds of products.
const LARGE: [Size; 6] =
    [[1, 1, 1], [197, 768, 65], [480, 257, 96], [481, 256, 33], [13, 3072, 31], [50, 48, 4099]];

#[test]
fn in_f32_it_is_as_exact_as_the_naive_formula() {
    for size in LARGE {
        let (layer, exact) = (Layer::<f32>::new(size), Layer::<f64>::new(size));
        for after in AFTER {
            let [out, _] = layer.forward(&cpu(), size, after);
            close_as_naive("out", &out, &naive(&layer, size, after), &naive(&exact, size, after));
        }
        let grads = layer.backward_from_zero(&cpu(), size, false);
        let (rough, want) = (naive_grads(&layer, size), naive_grads(&exact, size));
        for (i, name) in ["grad_inp", "grad_weight", "grad_bias"].into_iter().enumerate() {
            close_as_naive(name, &grads[i], &rough[i], &want[i]);
        }
    }
}

/// Asserts that `got` sums `terms` products of bf16 operands in f32: the sums of the rounded operands up to f32's own
/// error, the exact ones up to that of the operands, and not exact beyond that by chance.
fn close_in_bf16(name: &str, terms: usize, got: &[f32], rounded: &[f64], exact: &[f64]) {
    // All operands lie in [-1, 1): a product is rounded by 2^-8 at most, and their errors add like a random walk.
    let root = (terms as f64).sqrt();
    close(name, got, rounded, 1e-6 * root);
    close(name, got, exact, root / 256.0);
    let errors: Vec<f64> = got.iter().zip(exact).map(|(g, e)| g.f64() - e).collect();
    assert!(terms < 100 || scale(&errors) > 1e-4, "{name}: the operands were not rounded");
}

#[test]
fn products_of_bf16_are_those_of_the_rounded_operands() {
    let rounded = |values: &[f32]| -> Vec<f64> {
        values.iter().map(|&x| bf16::from_f32(x).to_f64()).collect()
    };
    for size in LARGE {
        let [rows, inputs, outputs] = size;
        let (layer, exact) = (Layer::<f32>::new(size), Layer::<f64>::new(size));
        let in_bf16 = Layer {
            inp: rounded(&layer.inp),
            weight: rounded(&layer.weight),
            grad_out: rounded(&layer.grad_out),
            ..exact.clone()
        };
        for after in AFTER {
            let [out, _] = layer.forward(&cpu_bf16(), size, after);
            let (want, exact) = (naive(&in_bf16, size, after), naive(&exact, size, after));
            close_in_bf16("out", inputs, &out, &want, &exact);
        }
        let grads = layer.backward_from_zero(&cpu_bf16(), size, false);
        let (want, exact) = (naive_grads(&in_bf16, size), naive_grads(&exact, size));
        close_in_bf16("grad_inp", outputs, &grads[0], &want[0], &exact[0]);
        close_in_bf16("grad_weight", rows, &grads[1], &want[1], &exact[1]);
        // No product: nothing is rounded.
        close("grad_bias", &grads[2], &exact[2], 1e-6 * rows as f64);
    }
}

#[test]
fn f64_is_never_rounded() {
    let size = [5, 70, 13];
    let layer = Layer::<f64>::new(size);
    let run = |dev| layer.forward(&dev, size, After::Nothing)[0].clone();
    assert_eq!(run(cpu_bf16()), run(cpu()));
}

#[test]
fn a_nan_in_the_input_reaches_its_row_and_no_other() {
    let size = [5, 70, 33];
    for dev in [cpu(), cpu_bf16()] {
        let mut layer = Layer::<f32>::new(size);
        layer.inp[2 * 70 + 69] = f32::NAN;
        let [out, _] = layer.forward(&dev, size, After::Gelu);
        for (row, out) in out.chunks(33).enumerate() {
            assert!(out.iter().all(|y| y.is_nan() == (row == 2)), "row {row}");
        }
    }
}

#[test]
fn threads_change_no_bit() {
    for size in
        [[331, 257, 515], [1576, 64, 130], [3, 1031, 1031], [1, 1031, 1031], [1031, 1031, 1]]
    {
        for dev in [cpu(), cpu_bf16()] {
            let layer = Layer::<f32>::new(size);
            for after in AFTER {
                same_on_any_threads(|| layer.forward(&dev, size, after)[0].clone());
            }
            same_on_any_threads(|| layer.backward_from_zero(&dev, size, true).concat());
        }
    }
    let (size, layer) = ([331, 257, 515], Layer::<f64>::new([331, 257, 515]));
    same_on_any_threads(|| layer.backward_from_zero(&cpu(), size, true).concat());
}

#[test]
fn leading_dimensions_count_as_rows() {
    let layer = Layer::<f64>::new([6, 7, 5]);
    let mut out = Guarded::<f64>::poisoned(&[2, 3, 5]);
    let args = Forward {
        out: out.view(),
        inp: view(&layer.inp, &[3, 2, 7]),
        weight: view(&layer.weight, &[5, 7]),
        bias: view(&layer.bias, &[5]),
        epilogue: Epilogue::None,
    };
    forward(&cpu(), args).unwrap();
    assert_eq!(out.values(), layer.forward(&cpu(), [6, 7, 5], After::Nothing)[0]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let (x, w, y) = (&[5, 7][..], &[3, 7][..], &[5, 3][..]);
    let real = |name, shape| arg(name, DType::F32, shape);
    let args = || vec![real("out", y), real("inp", x), real("weight", w), real("bias", &[3])];
    let with = |name, shape| args().into_iter().chain([real(name, shape)]).collect::<Vec<_>>();
    let call = |t: &mut [Any], after: After| -> Result<()> {
        let [out, inp, weight, bias, rest @ ..] = t else { unreachable!() };
        let epilogue = match after {
            After::Nothing => Epilogue::None,
            After::Gelu => Epilogue::Gelu(rest[0].view_mut()),
            After::Residual => Epilogue::Residual(rest[0].view()),
        };
        let (out, inp) = (out.view_mut(), inp.view());
        let (weight, bias) = (weight.view(), bias.view());
        forward(&cpu(), Forward { out, inp, weight, bias, epilogue })
    };
    let op = "linear::forward";
    refuses_what_does_not_fit(op, &args(), &|t| call(t, After::Nothing));
    refuses_what_does_not_fit(op, &with("epilogue.pre", y), &|t| call(t, After::Gelu));
    refuses_what_does_not_fit(op, &with("epilogue.residual", y), &|t| call(t, After::Residual));
    let bad = Any::new(DType::F32, &[6, 3]);
    let err = refusal(&args(), &|t| call(t, After::Nothing), "out", bad);
    let want = "linear::forward: `out` has shape [6, 3], expected [.., 3] of 5 rows";
    assert_eq!(err.to_string(), want);

    let args = |names: &[&'static str]| -> Vec<_> {
        let grads = [real("grad_weight", w), real("grad_bias", &[3]), real("grad_out", y)];
        let layer = [real("inp", x), real("weight", w)];
        let inputs = names.iter().map(|name| real(name, x));
        grads.into_iter().chain(layer).chain(inputs).collect()
    };
    let call = |t: &mut [Any]| -> Result<()> {
        let [grad_weight, grad_bias, grad_out, inp, weight, rest @ ..] = t else { unreachable!() };
        let grad_inp = match rest {
            [] => GradInput::None,
            [grad] => GradInput::Plain(grad.view_mut()),
            [grad, pre, ..] => GradInput::Gelu { grad: grad.view_mut(), pre: pre.view() },
        };
        let (grad_weight, grad_bias) = (grad_weight.view_mut(), grad_bias.view_mut());
        let (grad_out, inp, weight) = (grad_out.view(), inp.view(), weight.view());
        let workspace = no_workspace();
        let args = Backward { grad_inp, grad_weight, grad_bias, grad_out, inp, weight, workspace };
        backward(&cpu(), args)
    };
    for names in [&[][..], &["grad_inp"], &["grad_inp.grad", "grad_inp.pre"]] {
        refuses_what_does_not_fit("linear::backward", &args(names), &call);
    }
}
