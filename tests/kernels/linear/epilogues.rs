//! The layer with what `PIXMIM_EPILOGUES` moves into its products: GELU in the tanh form, and bias gradients.

use std::process::Command;

use half::bf16;
use pixmim::cuda::{Epilogues, SimtOptions};
use pixmim::ops::linear::{Epilogue, Forward, forward};
use pixmim::{DType, Device, Gpu};

use super::{After, Layer, gelu_and_slope};
use crate::common::{
    Input, Output, Stored, close_as_naive, gpu, is_real, uniform, unit_roundoff, widen,
};

const GELU: Epilogues = Epilogues { gelu: true, bias: false };
const BIAS: Epilogues = Epilogues { gelu: false, bias: true };
const BOTH: Epilogues = Epilogues { gelu: true, bias: true };

/// Runs a check on the device under test with these epilogues. A real GPU takes them from the environment, so there the
/// test runs itself again in a process that has it.
fn with(epilogues: Epilogues, test: &str, check: impl Fn(&Device)) {
    if !is_real() {
        let options = SimtOptions { epilogues, ..SimtOptions::default() };
        return check(&Device::Cuda(Gpu::simt(options).unwrap()));
    }
    const CHILD: &str = "PIXMIM_TEST_EPILOGUES";
    if std::env::var_os(CHILD).is_some() {
        return check(&gpu());
    }
    let names = match (epilogues.gelu, epilogues.bias) {
        (true, true) => "gelu,bias",
        (true, false) => "gelu",
        _ => "bias",
    };
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", &format!("linear::epilogues::{test}")])
        .env("PIXMIM_EPILOGUES", names)
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// GELU in the tanh form of cublasLt's manual, and its slope, in f64.
fn tanh_gelu(x: f64) -> [f64; 2] {
    let scale = (2.0 / std::f64::consts::PI).sqrt();
    let tanh = (scale * (x + 0.044715 * x.powi(3))).tanh();
    let inner_slope = scale * (1.0 + 3.0 * 0.044715 * x * x);
    [0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner_slope]
}

#[test]
fn bias_gradients_of_products_are_as_exact_as_the_naive_ones() {
    with(BIAS, "bias_gradients_of_products_are_as_exact_as_the_naive_ones", |dev| {
        for size in [[1, 8, 16], [7, 24, 72], [49, 40, 264], [33, 16, 12], [2111, 8, 24]] {
            Layer::<f32>::new(size).check_on(dev, After::Nothing);
            Layer::<bf16>::new(size).check_on(dev, After::Nothing);
        }
        // GELU stays a pass.
        Layer::<bf16>::new([49, 40, 264]).check_on(dev, After::Gelu);
    });
}

#[test]
fn bias_gradients_of_products_are_added_each_time() {
    with(BIAS, "bias_gradients_of_products_are_added_each_time", |dev| {
        let first = Layer::<bf16>::new([77, 24, 40]);
        let narrow = |x: &[f64]| -> Vec<f32> { x.iter().map(|x| *x as f32).collect() };
        let then = |weight: &[f64], bias: &[f64]| {
            let (weight_before, bias_before) = (narrow(weight), narrow(bias));
            Layer { weight_before, bias_before, ..Layer::<bf16>::new(first.size) }
        };
        let [_, weight, bias] = first.backward(dev, false);
        let [_, weight, bias] = then(&weight, &bias).backward(dev, false);
        let [_, _, _, naive_weight, naive_bias] = first.naive(After::Nothing, false);
        let [_, _, _, naive_weight, naive_bias] =
            then(&naive_weight, &naive_bias).naive(After::Nothing, false);
        let [_, _, _, exact_weight, exact_bias] = first.exact(After::Nothing, false);
        let twice = |once: Vec<f64>, before: &[f32]| -> Vec<f64> {
            once.iter().zip(before).map(|(x, before)| 2.0 * x - f64::from(*before)).collect()
        };
        let (weight_twice, bias_twice) =
            (twice(exact_weight, &first.weight_before), twice(exact_bias, &first.bias_before));
        let floor = unit_roundoff::<f32>();
        close_as_naive("grad_weight, twice", &weight, &naive_weight, &weight_twice, 24, floor);
        close_as_naive("grad_bias, twice", &bias, &naive_bias, &bias_twice, 40, floor);
    });
}

#[test]
fn gelu_of_products_has_the_tanh_form_and_its_gradients() {
    with(BOTH, "gelu_of_products_has_the_tanh_form_and_its_gradients", |dev| {
        for size in [[1, 8, 16], [7, 24, 72], [49, 40, 264]] {
            let layer = Layer::<bf16>::new(size);
            let [_, inputs, outputs] = size;
            let [out, pre] = layer.forward(dev, After::Gelu);
            let [grad_inp, grad_weight, grad_bias] = layer.backward(dev, true);
            // All but GELU, which is worked out here.
            let mut naive = layer.naive(After::Nothing, false);
            let mut exact = layer.exact(After::Nothing, false);
            naive[1] = naive[0].clone();
            exact[1] = exact[0].clone();
            let slopes = widen(&layer.pre).into_iter().map(|x| tanh_gelu(x)[1]);
            for (naive, slope) in naive[2].iter_mut().zip(slopes.clone()) {
                *naive = bf16::round(*naive * slope).f64();
            }
            exact[2].iter_mut().zip(slopes).for_each(|(exact, slope)| *exact *= slope);
            naive[0].iter_mut().for_each(|x| *x = bf16::round(tanh_gelu(*x)[0]).f64());
            exact[0].iter_mut().for_each(|x| *x = tanh_gelu(*x)[0]);
            let (stored, single) = (unit_roundoff::<bf16>(), unit_roundoff::<f32>());
            for (i, (name, got, width, floor)) in [
                ("out", out, outputs, stored),
                ("pre", pre, outputs, stored),
                ("grad_inp", grad_inp, inputs, stored),
                ("grad_weight", grad_weight, inputs, single),
                ("grad_bias", grad_bias, outputs, single),
            ]
            .into_iter()
            .enumerate()
            {
                let name = format!("{name} of {size:?}");
                close_as_naive(&name, &got, &naive[i], &exact[i], width, floor);
            }
        }
    });
}

/// In the tails GELU is small, and bf16 tells its forms apart.
#[test]
fn the_form_is_not_the_exact_one() {
    with(GELU, "the_form_is_not_the_exact_one", |dev| {
        let points: Vec<bf16> = (0..64).map(|i| bf16::round(f64::from(i) / 8.0 - 4.0)).collect();
        let zeros = |count| vec![bf16::ZERO; count];
        // No product, the points as bias.
        let values = Layer {
            inp: zeros(8),
            weight: zeros(8 * 64),
            bias: points.clone(),
            ..Layer::<bf16>::new([1, 8, 64])
        };
        let [values, _] = values.forward(dev, After::Gelu);
        // The first output's gradient is 1 and reaches every input by 1, the others' are 0.
        let first = |i: usize| bf16::from_f32(if i == 0 { 1.0 } else { 0.0 });
        let slopes = Layer {
            grad_out: (0..8 * 16).map(|i| first(i % 16)).collect(),
            weight: (0..16 * 8).map(|i| first(i / 8)).collect(),
            pre: points.clone(),
            ..Layer::<bf16>::new([8, 8, 16])
        };
        let [slopes, ..] = slopes.backward(dev, true);
        let exact = gelu_and_slope(&widen(&points));
        let mut told_apart = [0; 2];
        for (i, x) in widen(&points).into_iter().enumerate() {
            // A GPU's own instruction for tanh is exact to 2^-11.
            let slack = if is_real() { x.abs() * 2f64.powi(-11) } else { 0.0 };
            for (form, got) in [values[i], slopes[i]].into_iter().enumerate() {
                let want = tanh_gelu(x)[form];
                let tolerance = want.abs() * 2f64.powi(-8) + 1e-6 + slack;
                assert!((got - want).abs() <= tolerance, "{x}: {got} for {want}");
                told_apart[form] += usize::from((exact[form][i] - want).abs() > tolerance);
            }
        }
        assert!(is_real() || told_apart.iter().all(|points| *points >= 5), "{told_apart:?}");
    });
}

#[test]
fn in_f32_gelu_stays_exact() {
    with(BOTH, "in_f32_gelu_stays_exact", |dev| {
        Layer::<f32>::new([49, 40, 264]).check_on(dev, After::Gelu);
    });
}

#[test]
fn widths_that_no_product_takes_gelu_for_are_refused_by_name() {
    with(GELU, "widths_that_no_product_takes_gelu_for_are_refused_by_name", |dev| {
        let [inp, weight] = [3 * 8, 12 * 8].map(|count| uniform::<bf16>(1, count));
        let inp = Input::new(dev, &inp, &[3, 8]);
        let weight = Input::new(dev, &weight, &[12, 8]);
        let bias = Input::new(dev, &uniform::<bf16>(2, 12), &[12]);
        let [mut out, mut pre] = [(); 2].map(|()| Output::new(dev, DType::Bf16, &[3, 12]));
        let args = Forward {
            out: out.view(),
            inp: inp.view(),
            weight: weight.view(),
            bias: bias.view(),
            epilogue: Epilogue::Gelu(pre.view()),
        };
        let why = forward(dev, args).unwrap_err().to_string();
        assert!(why.contains("not of 12; leave `gelu` out of PIXMIM_EPILOGUES"), "{why}");
    });
}
