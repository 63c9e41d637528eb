//! The loss and its gradient against the CPU in f64, for patches that registers hold and others.

use half::bf16;
use pixmim::dtype::Element;
use pixmim::ops::masked_mse_loss::{ForwardBackward, forward_backward, workspace_bytes};
use pixmim::{DType, Device, Error, Result};

use crate::common::{
    Input, Output, Stored, close_as_naive, gpu, normal, same_on_any_schedule, uniform,
    unit_roundoff, widen, workspace,
};

type Shape = [usize; 3];

#[derive(Clone, Copy, Debug)]
struct How {
    norm_pix: bool,
    scale: f64,
    /// What the loss holds beforehand.
    before: f32,
}

const PLAIN: How = How { norm_pix: false, scale: 1.0, before: 0.0 };
const NORM_PIX: How = How { norm_pix: true, scale: 0.25, before: 3.0 };

/// The loss, and its gradient. `W` is the wide partner of `T`.
fn run<T: Element, W: Element>(
    dev: &Device,
    shape: Shape,
    pred: &[T],
    target: &[W],
    before: W,
    how: How,
) -> (W, Vec<T>) {
    let mut loss = Output::holding(dev, &[before], &[1]);
    let mut grad_pred = Output::new(dev, T::DTYPE, &shape);
    let (pred, target) = (Input::new(dev, pred, &shape), Input::new(dev, target, &shape));
    let mut work = workspace(dev, workspace_bytes(dev, T::DTYPE, shape[0] * shape[1]));
    let args = ForwardBackward {
        loss: loss.view(),
        grad_pred: grad_pred.view(),
        pred: pred.view(),
        target: target.view(),
        norm_pix: how.norm_pix,
        scale: how.scale,
        workspace: work.view(),
    };
    forward_backward(dev, args).unwrap();
    (loss.values()[0], grad_pred.values())
}

/// The formula in f32, one operation after another; the gradient is stored in `T`.
fn naive<T: Stored>([_, _, numbers]: Shape, pred: &[T], target: &[f32], how: How) -> [Vec<f64>; 2] {
    let n = numbers as f32;
    let patches = (pred.len() / numbers) as f32;
    let (mut loss, mut grad) = (how.before, vec![]);
    for (pred, target) in pred.chunks(numbers).zip(target.chunks(numbers)) {
        let mean = target.iter().sum::<f32>() / n;
        let squares: f32 = target.iter().map(|&t| (t - mean) * (t - mean)).sum();
        let std = (squares / (n - 1.0) + 1e-6).sqrt();
        let normal = |t: f32| if how.norm_pix { (t - mean) / std } else { t };
        let errors: Vec<f32> =
            pred.iter().zip(target).map(|(p, &t)| p.f64() as f32 - normal(t)).collect();
        let scale = how.scale as f32;
        loss += scale * errors.iter().map(|e| e * e).sum::<f32>() / n / patches;
        grad.extend(errors.iter().map(|e| T::round(f64::from(scale * 2.0 * e / n / patches))));
    }
    [vec![f64::from(loss)], widen(&grad)]
}

fn check<T: Stored>(shape: Shape, mean: f64, how: How) {
    let elems = shape.iter().product();
    let pred: Vec<T> = normal(1, elems, 0.1, 1.0);
    let target: Vec<f32> = normal(2, elems, mean, 1.5);
    let (loss, grad) = run(&gpu(), shape, &pred, &target, how.before, how);
    let before = f64::from(how.before);
    let (want, want_grad) = run(&Device::cpu(), shape, &widen(&pred), &widen(&target), before, how);
    let [rough, rough_grad] = naive(shape, &pred, &target, how);
    let (u, name) = (unit_roundoff::<f32>(), format!("{shape:?} {:?} {how:?}", T::DTYPE));
    close_as_naive(&format!("loss {name}"), &[f64::from(loss)], &rough, &[want], 1, u);
    let u = unit_roundoff::<T>();
    let name = format!("grad {name}");
    close_as_naive(&name, &widen(&grad), &rough_grad, &want_grad, shape[2], u);
}

#[test]
fn loss_and_gradient_are_those_of_the_cpu() {
    // Up to 256 numbers, up to 768, and those that are too many or no multiple of 4; one block and several.
    let shapes = [
        [1, 1, 12],
        [3, 7, 48],
        [2, 65, 192],
        [1, 2, 256],
        [1, 3, 260],
        [1, 7, 588],
        [2, 49, 768],
        [1, 5, 772],
        [2, 3, 1200],
        [5, 27, 147],
        [1, 1, 2],
    ];
    for shape in shapes {
        for how in [PLAIN, NORM_PIX] {
            check::<f32>(shape, 0.5, how);
            check::<bf16>(shape, 0.5, how);
        }
    }
}

#[test]
fn a_target_far_from_zero_keeps_its_variance() {
    for shape in [[1, 9, 192], [1, 9, 768], [1, 9, 147]] {
        check::<f32>(shape, 1000.0, NORM_PIX);
        check::<bf16>(shape, 1000.0, NORM_PIX);
    }
}

#[test]
fn a_flat_target_patch_becomes_zero() {
    for numbers in [12, 768, 27] {
        let shape = [1, 3, numbers];
        let (pred, target) = (vec![0f32; 3 * numbers], vec![3f32; 3 * numbers]);
        let how = How { before: 0.0, ..NORM_PIX };
        let (loss, grad) = run(&gpu(), shape, &pred, &target, 0.0, how);
        assert_eq!((loss, grad), (0.0, pred));
    }
}

#[test]
fn a_nan_in_the_prediction_makes_the_loss_nan() {
    for numbers in [48, 300, 49] {
        let mut pred = vec![bf16::ZERO; 70 * numbers];
        pred[70 * numbers - 1] = bf16::NAN;
        let target = vec![1f32; pred.len()];
        let (loss, grad) = run(&gpu(), [1, 70, numbers], &pred, &target, 0.0, PLAIN);
        assert!(loss.is_nan() && grad[70 * numbers - 1].is_nan());
        assert!(grad[..70 * numbers - 1].iter().all(|g| g.is_finite()));
    }
}

#[test]
fn schedules_change_no_bit() {
    fn check<T: Stored>(shape: Shape) {
        let elems = shape.iter().product();
        let (pred, target) = (uniform::<T>(1, elems), uniform::<f32>(2, elems));
        same_on_any_schedule(|dev| {
            let (loss, grad) = run(dev, shape, &pred, &target, 1.0, NORM_PIX);
            [vec![f64::from(loss)], widen(&grad)].concat()
        });
    }
    for shape in [[3, 50, 48], [1, 7, 768], [1, 70, 27]] {
        check::<f32>(shape);
        check::<bf16>(shape);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let dev = gpu();
    let good = |name: &str| match name {
        "loss" => (DType::F32, vec![1]),
        "target" => (DType::F32, vec![2, 3, 12]),
        _ => (DType::Bf16, vec![2, 3, 12]),
    };
    // The call with one argument of another dtype or shape.
    let call = |bad: &str, dtype: DType, shape: &[usize], bytes: usize| -> Error {
        let arg = |name: &str| match name == bad {
            true => Output::new(&dev, dtype, shape),
            false => Output::new(&dev, good(name).0, &good(name).1),
        };
        let [mut loss, mut grad_pred, mut pred, mut target] =
            ["loss", "grad_pred", "pred", "target"].map(arg);
        let mut work = workspace(&dev, bytes);
        let args = ForwardBackward {
            loss: loss.view(),
            grad_pred: grad_pred.view(),
            pred: pred.as_ref(),
            target: target.as_ref(),
            norm_pix: true,
            scale: 1.0,
            workspace: work.view(),
        };
        let result: Result<()> = forward_backward(&dev, args);
        result.unwrap_err()
    };
    let bytes = workspace_bytes(&dev, DType::Bf16, 6);
    for (bad, dtype) in [("loss", DType::Bf16), ("grad_pred", DType::F32), ("target", DType::Bf16)]
    {
        let err = call(bad, dtype, &good(bad).1, bytes);
        assert!(matches!(err, Error::DType { arg, .. } if arg == bad), "{err}");
    }
    for bad in ["grad_pred", "target"] {
        let err = call(bad, good(bad).0, &[2, 3, 13], bytes);
        assert!(matches!(err, Error::Shape { arg, .. } if arg == bad), "{err}");
    }
    let err = call("pred", DType::F64, &[2, 3, 12], bytes);
    assert!(matches!(err, Error::DType { arg: "pred", .. }), "{err}");
    let err = call("none", DType::F32, &[1], bytes - 1);
    assert!(matches!(err, Error::Workspace { .. }), "{err}");
}
