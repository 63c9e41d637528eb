//! Known values, the slope by finite differences, f32 over its whole range.

use pixmim::ops::gelu::{Backward, Forward, backward, forward};
use pixmim::{DType, Result};

use crate::common::{
    Guarded, Real, close, cpu, gradcheck, normal, same_on_any_threads, uniform, view, widen,
};
use crate::refusal::{Any, arg, refusal, refuses_what_does_not_fit};

fn gelu<T: Real>(inp: &[T]) -> Vec<T> {
    let mut out = Guarded::poisoned(&[inp.len()]);
    forward(&cpu(), Forward { out: out.view(), inp: view(inp, &[inp.len()]) }).unwrap();
    out.values()
}

fn grad<T: Real>(grad_out: &[T], inp: &[T]) -> Vec<T> {
    let shape = [inp.len()];
    let mut grad_inp = Guarded::poisoned(&shape);
    let args = Backward {
        grad_inp: grad_inp.view(),
        grad_out: view(grad_out, &shape),
        inp: view(inp, &shape),
    };
    backward(&cpu(), args).unwrap();
    grad_inp.values()
}

/// `x cdf(x)` with the tabled normal distribution.
const KNOWN: [(f64, f64); 7] = [
    (0.0, 0.0),
    (0.5, 0.345_731_230_637_006_5),
    (1.0, 0.841_344_746_068_542_9),
    (-1.0, -0.158_655_253_931_457_1),
    (2.0, 1.954_499_736_103_641_6),
    (-3.0, -0.004_049_694_094_890_284),
    (40.0, 40.0),
];

#[test]
fn it_is_x_times_the_normal_distribution() {
    let (x, y): (Vec<f64>, Vec<f64>) = KNOWN.into_iter().unzip();
    close("gelu", &gelu(&x), &y, 1e-15);
    let x: Vec<f32> = x.iter().map(|&x| x as f32).collect();
    close("gelu in f32", &gelu(&x), &y, 1.2e-7);
}

#[test]
fn the_backward_pass_is_the_slope() {
    let ones = [1.0; 3];
    let want = [0.5, 1.083_315_470_587_686_4, -0.083_315_470_587_686_3];
    close("slope", &grad(&ones, &[0.0, 1.0, -1.0]), &want, 1e-15);
    let inp: Vec<f64> = normal(1, &[101], 0.0, 2.0);
    let upstream: Vec<f64> = uniform(2, &[101]);
    gradcheck("gelu", &inp, &grad(&upstream, &inp), |x| {
        gelu(x).iter().zip(&upstream).map(|(y, g)| y * g).sum()
    });
}

#[test]
fn in_f32_value_and_slope_are_exact_to_a_few_ulp_of_the_scale() {
    let inp: Vec<f32> = (0..100_001).map(|i| -25.0 + 50.0 * (i as f32 / 100_000.0)).collect();
    let wide = widen(&inp);
    let (y, slope) = (gelu(&inp), grad(&vec![1.0; inp.len()], &inp));
    let (want, want_slope) = (gelu(&wide), grad(&vec![1.0; inp.len()], &wide));
    for i in 0..inp.len() {
        let tol = 2.5e-7 * wide[i].abs().max(1.0);
        close("gelu", &y[i..=i], &want[i..=i], tol);
        close("slope", &slope[i..=i], &want_slope[i..=i], tol);
    }
    let big = [1e6f32, -1e6, 1e30, -1e30];
    close("of large numbers", &gelu(&big), &[big[0].f64(), 0.0, big[2].f64(), 0.0], 1e-30);
    close("their slope", &grad(&[1.0; 4], &big), &[1.0, 0.0, 1.0, 0.0], 1e-7);
    assert!(gelu(&[f32::NAN])[0].is_nan() && grad(&[1.0], &[f32::NAN])[0].is_nan());
}

#[test]
fn threads_change_no_bit() {
    let (inp, upstream) = (normal::<f32>(1, &[50_001], 0.0, 2.0), uniform::<f32>(2, &[50_001]));
    same_on_any_threads(|| [gelu(&inp), grad(&upstream, &inp)].concat());
}

#[test]
fn what_does_not_fit_is_refused() {
    let args = [arg("out", DType::F32, &[3, 5]), arg("inp", DType::F32, &[3, 5])];
    let call = |t: &mut [Any]| -> Result<()> {
        let [out, inp] = t else { unreachable!() };
        forward(&cpu(), Forward { out: out.view_mut(), inp: inp.view() })
    };
    refuses_what_does_not_fit("gelu::forward", &args, &call);
    let err = refusal(&args, &call, "out", Any::new(DType::F32, &[5, 3]));
    assert_eq!(err.to_string(), "gelu::forward: `out` has shape [5, 3], expected [3, 5]");

    let args = ["grad_inp", "grad_out", "inp"].map(|name| arg(name, DType::F32, &[3, 5]));
    refuses_what_does_not_fit("gelu::backward", &args, &|t| {
        let [grad_inp, grad_out, inp] = t else { unreachable!() };
        let (grad_inp, grad_out) = (grad_inp.view_mut(), grad_out.view());
        backward(&cpu(), Backward { grad_inp, grad_out, inp: inp.view() })
    });
}
