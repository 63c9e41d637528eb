//! The norm of all gradients, from one number to several blocks of them.

use half::bf16;
use pixmim::ops::grad_norm::{Forward, forward, workspace_bytes};
use pixmim::{DType, Device, Error, Result, TensorRef};

use crate::common::{Input, Output, gpu, normal, same_on_any_schedule, uniform, workspace};

fn run(dev: &Device, grad: &[f32]) -> f32 {
    let grad = Input::new(dev, grad, &[grad.len()]);
    let mut norm = Output::new(dev, DType::F32, &[1]);
    let mut work = workspace(dev, workspace_bytes(dev, grad.view().elems()));
    let args = Forward { norm: norm.view(), grad: grad.view(), workspace: work.view() };
    forward(dev, args).unwrap();
    norm.values()[0]
}

fn exact(grad: &[f32]) -> f64 {
    grad.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn it_is_the_exact_norm_rounded_once() {
    for elems in [0, 1, 3, 4, 7, 1023, 1028, 16_383, 16_384, 16_385, 50_003] {
        for grad in [uniform::<f32>(1, elems), normal(2, elems, 3.0, 1e-4)] {
            let (got, want) = (f64::from(run(&gpu(), &grad)), exact(&grad));
            // The sums in f64 are off by far less than the rounding to f32.
            let tol = 1.001 * 2f64.powi(-24) * want;
            assert!((got - want).abs() <= tol, "{elems}: {got} instead of {want}");
        }
    }
}

#[test]
fn no_square_overflows_or_vanishes() {
    for size in [1e30f32, 1e-30] {
        let grad: Vec<f32> = uniform::<f32>(3, 777).iter().map(|g| g * size).collect();
        let (got, want) = (f64::from(run(&gpu(), &grad)), exact(&grad));
        assert!((got - want).abs() <= 1e-7 * want, "{got} instead of {want}");
    }
    assert_eq!(run(&gpu(), &[f32::MAX; 5]), f32::INFINITY);
}

#[test]
fn one_gradient_that_is_not_finite_shows() {
    for elems in [5, 16_390] {
        for at in [0, elems - 1] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut grad: Vec<f32> = uniform(4, elems);
                grad[at] = bad;
                assert!(!run(&gpu(), &grad).is_finite(), "{bad} at {at}");
            }
        }
    }
}

#[test]
fn schedules_change_no_bit() {
    let grad: Vec<f32> = normal(5, 40_001, 0.1, 1.0);
    same_on_any_schedule(|dev| vec![run(dev, &grad)]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let dev = gpu();
    let call = |grad: TensorRef<'_>, shape: &[usize], bytes| -> Error {
        let mut norm = Output::new(&dev, DType::F32, shape);
        let mut work = workspace(&dev, bytes);
        let args = Forward { norm: norm.view(), grad, workspace: work.view() };
        let result: Result<()> = forward(&dev, args);
        result.unwrap_err()
    };
    let bytes = workspace_bytes(&dev, 20_000);
    let grad = Input::new(&dev, &uniform::<f32>(1, 20_000), &[20_000]);
    let err = call(grad.view(), &[2], bytes);
    assert!(matches!(err, Error::Shape { arg: "norm", .. }), "{err}");
    let err = call(grad.view(), &[1], bytes - 1);
    assert!(matches!(err, Error::Workspace { .. }), "{err}");
    let err = call(grad.view().split_at(1).1, &[1], bytes);
    assert!(err.to_string().contains("starts at a multiple of 16"), "{err}");
    let err = call(grad.view().reshaped(&[2, 10_000]).unwrap(), &[1], bytes);
    assert!(matches!(err, Error::Shape { arg: "grad", .. }), "{err}");
    let half = Input::new(&dev, &[bf16::ONE; 5], &[5]);
    let err = call(half.view(), &[1], bytes);
    assert!(matches!(err, Error::DType { arg: "grad", .. }), "{err}");
    let host = [1f32; 5];
    let err = call(TensorRef::new(&host, &[5]).unwrap(), &[1], bytes);
    assert!(matches!(err, Error::Place { arg: "grad", .. }), "{err}");
}
