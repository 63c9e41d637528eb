//! The loss by hand, its gradient, and what a predictor of zeros scores.

use pixmim::ops::masked_mse_loss::{ForwardBackward, forward_backward, workspace_bytes};
use pixmim::{DType, Error, Result};

use crate::common::{
    Guarded, Real, close, close_as_naive, cpu, for_any, gradcheck, normal, same_on_any_threads,
    slopecheck, uniform, view, workspace,
};
use crate::refusal::{
    Any, arg, refusal, refuses_numbers, refuses_what_does_not_fit, workspace_arg,
};

#[derive(Clone, Copy)]
struct How {
    norm_pix: bool,
    scale: f64,
    /// What the loss holds beforehand.
    before: f64,
}

const PLAIN: How = How { norm_pix: false, scale: 1.0, before: 0.0 };
const NORM_PIX: How = How { norm_pix: true, ..PLAIN };

/// The loss, and its gradient.
fn run<T: Real>(shape: [usize; 3], pred: &[T], target: &[T], how: How) -> (T, Vec<T>) {
    let mut loss = Guarded::holding(&[T::of(how.before)], &[1]);
    let mut grad_pred = Guarded::poisoned(&shape);
    let mut work = workspace(workspace_bytes(&cpu(), T::DTYPE, shape[0] * shape[1]));
    let args = ForwardBackward {
        loss: loss.view(),
        grad_pred: grad_pred.view(),
        pred: view(pred, &shape),
        target: view(target, &shape),
        norm_pix: how.norm_pix,
        scale: how.scale,
        workspace: work.view(),
    };
    forward_backward(&cpu(), args).unwrap();
    work.values();
    (loss.values()[0], grad_pred.values())
}

/// The loss as the mean over patches of the mean over their numbers, and its gradient.
fn naive<T: Real>([_, _, numbers]: [usize; 3], pred: &[T], target: &[T], how: How) -> (T, Vec<T>) {
    let n = T::of(numbers as f64);
    let patches = T::of((pred.len() / numbers) as f64);
    let (mut loss, mut grad) = (T::of(0.0), vec![]);
    for (pred, target) in pred.chunks(numbers).zip(target.chunks(numbers)) {
        let mean = target.iter().copied().sum::<T>() / n;
        let squares: T = target.iter().map(|&t| (t - mean) * (t - mean)).sum();
        let std = (squares / (n - T::of(1.0)) + T::of(1e-6)).sqrt();
        let normal = |t: T| if how.norm_pix { (t - mean) / std } else { t };
        let errors: Vec<T> = pred.iter().zip(target).map(|(&p, &t)| p - normal(t)).collect();
        let scale = T::of(how.scale);
        loss = loss + scale * errors.iter().map(|&e| e * e).sum::<T>() / n / patches;
        grad.extend(errors.iter().map(|&e| scale * T::of(2.0) * e / n / patches));
    }
    (T::of(how.before) + loss, grad)
}

#[test]
fn two_patches_by_hand() {
    let shape = [1, 2, 2];
    let (pred, target) = ([1.0, 2.0, 3.0, 5.0], [0.0, 2.0, 7.0, 4.0]);
    let (loss, grad) = run(shape, &pred, &target, PLAIN);
    close("loss", &[loss], &[(1.0 + 0.0 + 16.0 + 1.0) / 4.0], 1e-15);
    close("grad", &grad, &[0.5, 0.0, -2.0, 0.5], 1e-15);
    // (0, 2) becomes -+1 / sqrt(2 + 1e-6), because its variance has n - 1 below; (7, 4) likewise, variance 4.5.
    let [a, b] = [1.0 / 2.000_001f64.sqrt(), 1.5 / 4.500_001f64.sqrt()];
    let errors = [1.0 + a, 2.0 - a, 3.0 - b, 5.0 + b];
    let (loss, grad) = run(shape, &pred, &target, NORM_PIX);
    close("loss", &[loss], &[errors.iter().map(|e| e * e / 4.0).sum()], 1e-14);
    close("grad", &grad, &errors.map(|e| e / 2.0), 1e-15);
}

#[test]
fn a_predictor_of_zeros_scores_one_minus_one_over_the_numbers_with_norm_pix() {
    for numbers in [12, 48, 768] {
        let shape = [3, 7, numbers];
        let target: Vec<f64> = normal(1, &shape, 0.3, 100.0);
        let (loss, _) = run(shape, &vec![0.0; target.len()], &target, NORM_PIX);
        // The deviation of 100 makes the 1e-6 under the root vanish.
        close("loss", &[loss], &[(numbers - 1) as f64 / numbers as f64], 1e-9);
        let single: Vec<f32> = target.iter().map(|&t| t as f32).collect();
        let (loss, _) = run(shape, &vec![0.0; target.len()], &single, NORM_PIX);
        close("loss in f32", &[loss], &[(numbers - 1) as f64 / numbers as f64], 1e-6);
    }
}

#[test]
fn a_flat_target_patch_becomes_zero() {
    let (loss, grad) = run([1, 1, 12], &[0.0; 12], &[3.0; 12], NORM_PIX);
    close("loss", &[loss], &[0.0], 1e-15);
    close("grad", &grad, &[0.0; 12], 1e-15);
}

#[test]
fn loss_and_gradient_are_the_naive_ones() {
    for_any((1usize..=4, 1usize..=7, 2usize..=70), |(images, masked, numbers)| {
        let shape = [images, masked, numbers];
        let pred: Vec<f64> = normal(1, &shape, 0.1, 1.0);
        let target: Vec<f64> = normal(2, &shape, 0.5, 1.0);
        for how in [PLAIN, NORM_PIX, How { norm_pix: true, scale: 0.25, before: 3.0 }] {
            let (loss, grad) = run(shape, &pred, &target, how);
            let (want, want_grad) = naive(shape, &pred, &target, how);
            close("loss", &[loss], &[want], 1e-12);
            close("grad_pred", &grad, &want_grad, 1e-12);
            slopecheck("pred", &pred, &grad, |x| run(shape, x, &target, how).0);
        }
    });
}

#[test]
fn the_gradient_passes_the_finite_differences() {
    let shape = [2, 3, 5];
    let (pred, target) = (normal::<f64>(1, &shape, 0.1, 1.0), normal::<f64>(2, &shape, 0.5, 2.0));
    for norm_pix in [false, true] {
        let how = How { norm_pix, scale: 3.0, before: 0.0 };
        let (_, grad) = run(shape, &pred, &target, how);
        gradcheck("pred", &pred, &grad, |x| run(shape, x, &target, how).0);
    }
}

#[test]
fn micro_batches_add_up_to_the_batch() {
    let shape = [6, 3, 12];
    let (pred, target) = (uniform::<f64>(1, &shape), uniform::<f64>(2, &shape));
    let (whole, whole_grad) = run(shape, &pred, &target, NORM_PIX);
    let (mut loss, mut grads) = (0.0, vec![]);
    for (pred, target) in pred.chunks(2 * 36).zip(target.chunks(2 * 36)) {
        let how = How { norm_pix: true, scale: 1.0 / 3.0, before: loss };
        let (sum, grad) = run([2, 3, 12], pred, target, how);
        loss = sum;
        grads.extend(grad);
    }
    close("loss", &[loss], &[whole], 1e-14);
    close("grad_pred", &grads, &whole_grad, 1e-16);
}

#[test]
fn in_f32_it_is_as_exact_as_the_naive_formula() {
    let shape = [3, 147, 768];
    for (mean, how) in [(0.0, PLAIN), (0.0, NORM_PIX), (1000.0, NORM_PIX)] {
        let pred: Vec<f32> = normal(1, &shape, 0.0, 1.0);
        let target: Vec<f32> = normal(2, &shape, mean, 1.0);
        let wide =
            naive::<f64>(shape, &normal(1, &shape, 0.0, 1.0), &normal(2, &shape, mean, 1.0), how);
        let rough = naive(shape, &pred, &target, how);
        let (loss, grad) = run(shape, &pred, &target, how);
        close_as_naive("loss", &[loss], &[rough.0], &[wide.0]);
        close_as_naive("grad_pred", &grad, &rough.1, &wide.1);
    }
}

#[test]
fn a_nan_in_the_prediction_makes_the_loss_nan() {
    let mut pred = vec![0.0f32; 300];
    pred[299] = f32::NAN;
    assert!(run([1, 25, 12], &pred, &vec![1.0; 300], NORM_PIX).0.is_nan());
}

#[test]
fn threads_change_no_bit() {
    let shape = [37, 27, 192];
    let (pred, target) = (uniform::<f32>(1, &shape), uniform::<f32>(2, &shape));
    same_on_any_threads(|| {
        let (loss, grad) = run(shape, &pred, &target, NORM_PIX);
        [vec![loss], grad].concat()
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    let real = |name, shape: &[usize]| arg(name, DType::F32, shape);
    let args_of = |numbers| {
        [
            real("loss", &[1]),
            real("grad_pred", &[2, 3, numbers]),
            real("pred", &[2, 3, numbers]),
            real("target", &[2, 3, numbers]),
            workspace_arg(workspace_bytes(&cpu(), DType::F32, 6)),
        ]
    };
    let with_scale = |t: &mut [Any], scale: f64| -> Result<()> {
        let [loss, grad_pred, pred, target, workspace] = t else { unreachable!() };
        let args = ForwardBackward {
            loss: loss.view_mut(),
            grad_pred: grad_pred.view_mut(),
            pred: pred.view(),
            target: target.view(),
            norm_pix: true,
            scale,
            workspace: workspace.view_mut(),
        };
        forward_backward(&cpu(), args)
    };
    let call = |t: &mut [Any]| with_scale(t, 1.0);
    let args = args_of(12);
    refuses_numbers("masked_mse_loss: scale", &[], &args, &with_scale);
    refuses_what_does_not_fit("masked_mse_loss", &args, &call);
    let err = refusal(&args, &call, "target", Any::new(DType::F32, &[2, 4, 12]));
    let want = "masked_mse_loss: `target` has shape [2, 4, 12], expected [2, 3, 12]";
    assert_eq!(err.to_string(), want);
    // One number has no variance.
    let err = refusal(&args_of(1), &call, "loss", Any::new(DType::F32, &[1]));
    assert!(matches!(err, Error::Invalid { .. }), "{err}");
}
