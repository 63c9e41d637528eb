//! GELU on a GPU: against f64 over the whole range, any count, in place.

use half::bf16;
use pixmim::ops::gelu::{Backward, Forward, backward, forward};
use pixmim::{Device, TensorMut, TensorRef};

use crate::common::{
    Input, Output, Stored, gpu, normal, same_on_any_schedule, unit_roundoff, widen,
};

fn gelu<T: Stored>(dev: &Device, inp: &[T]) -> Vec<T> {
    let shape = [inp.len()];
    let inp = Input::new(dev, inp, &shape);
    let mut out = Output::new(dev, T::DTYPE, &shape);
    forward(dev, Forward { out: out.view(), inp: inp.view() }).unwrap();
    out.values()
}

fn grad<T: Stored>(dev: &Device, grad_out: &[T], inp: &[T]) -> Vec<T> {
    let shape = [inp.len()];
    let (inp, grad_out) = (Input::new(dev, inp, &shape), Input::new(dev, grad_out, &shape));
    let mut grad_inp = Output::new(dev, T::DTYPE, &shape);
    let args = Backward { grad_inp: grad_inp.view(), grad_out: grad_out.view(), inp: inp.view() };
    backward(dev, args).unwrap();
    grad_inp.values()
}

/// GELU and its slope, in f64.
fn exact(inp: &[f64]) -> [Vec<f64>; 2] {
    let shape = [inp.len()];
    let view = |x| TensorRef::new(x, &shape).unwrap();
    let [mut value, mut slope] = [vec![0.0; inp.len()], vec![0.0; inp.len()]];
    let out = TensorMut::new(&mut value, &shape).unwrap();
    forward(&Device::cpu(), Forward { out, inp: view(inp) }).unwrap();
    let ones = vec![1.0; inp.len()];
    let grad_inp = TensorMut::new(&mut slope, &shape).unwrap();
    backward(&Device::cpu(), Backward { grad_inp, grad_out: view(&ones), inp: view(inp) }).unwrap();
    [value, slope]
}

/// Asserts that each number is as near as its own rounding and an absolute error of `tol` of its input's scale.
#[track_caller]
fn near<T: Stored + std::fmt::Debug>(name: &str, got: &[T], want: &[f64], inp: &[f64], tol: f64) {
    assert_eq!(got.len(), want.len(), "{name}: number of elements");
    for ((got, want), x) in got.iter().zip(want).zip(inp) {
        let err = (got.f64() - want).abs();
        let tol = unit_roundoff::<T>() * want.abs() + tol * x.abs().max(1.0);
        assert!(err <= tol, "{name} at {x} is {got:?}, not {want:e}: off by {err:e} > {tol:e}");
    }
}

fn over_the_whole_range<T: Stored + std::fmt::Debug>() {
    let steps = 20_003;
    let inp: Vec<T> = (0..steps)
        .map(|i| T::round(-13.0 + 26.0 * f64::from(i) / f64::from(steps)))
        .chain([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 3e38, -3e38].map(T::round))
        .collect();
    let wide = widen(&inp);
    let [value, slope] = exact(&wide);
    near("gelu", &gelu(&gpu(), &inp), &value, &wide, 5e-7);
    let ones = vec![T::round(1.0); inp.len()];
    // The slope is of the order of 1 everywhere.
    near("slope", &grad(&gpu(), &ones, &inp), &slope, &vec![1.0; inp.len()], 5e-7);
}

#[test]
fn it_is_exact_over_the_whole_range() {
    over_the_whole_range::<f32>();
    over_the_whole_range::<bf16>();
}

fn any_count<T: Stored + std::fmt::Debug>() {
    // Around one vector of 16 bytes, one block, and none.
    for count in [0, 1, 3, 7, 8, 9, 1023, 4095, 4096, 4101, 8191] {
        let (inp, upstream) = (normal::<T>(1, count, 0.2, 1.5), normal::<T>(2, count, 0.0, 3.0));
        let wide = widen(&inp);
        let [value, slope] = exact(&wide);
        near("gelu", &gelu(&gpu(), &inp), &value, &wide, 5e-7);
        let upstream_wide = widen(&upstream);
        let want: Vec<f64> = slope.iter().zip(&upstream_wide).map(|(s, g)| s * g).collect();
        near("grad_inp", &grad(&gpu(), &upstream, &inp), &want, &upstream_wide, 5e-7);
    }
}

#[test]
fn any_number_of_elements_is_done_and_no_other_touched() {
    any_count::<f32>();
    any_count::<bf16>();
}

#[test]
fn nan_and_infinity_go_through() {
    let inp = [f32::NAN, f32::INFINITY, 2.0];
    let out = gelu(&gpu(), &inp);
    assert!(out[0].is_nan() && out[1] == f32::INFINITY && (out[2] - 1.954_499_7).abs() < 1e-6);
    assert!(grad(&gpu(), &[1.0; 3], &inp)[0].is_nan());
}

#[test]
fn schedules_change_no_bit() {
    let (inp, upstream) = (normal::<bf16>(1, 4999, 0.0, 1.0), normal::<bf16>(2, 4999, 0.0, 1.0));
    same_on_any_schedule(|dev| [gelu(dev, &inp), grad(dev, &upstream, &inp)].concat());
}
