//! The norm of all gradients, whatever their size and number.

use pixmim::ops::grad_norm::{Forward, forward, workspace_bytes};
use pixmim::{DType, Result};

use crate::common::{
    Guarded, Real, close, cpu, normal, same_on_any_threads, view, widen, workspace,
};
use crate::refusal::{Any, arg, refusal, refuses_what_does_not_fit, workspace_arg};

fn norm<T: Real>(grad: &[T]) -> T {
    let mut norm = Guarded::poisoned(&[1]);
    let mut work = workspace(workspace_bytes(&cpu(), grad.len()));
    let args =
        Forward { norm: norm.view(), grad: view(grad, &[grad.len()]), workspace: work.view() };
    forward(&cpu(), args).unwrap();
    work.values();
    norm.values()[0]
}

#[test]
fn it_is_the_root_of_the_sum_of_squares() {
    assert_eq!(norm(&[3.0f64, -4.0]), 5.0);
    assert_eq!(norm::<f32>(&[]), 0.0);
    for elems in [1, 15, 16, 17, 65_535, 65_536, 65_537, 200_003] {
        let grad: Vec<f32> = normal(elems as u64, &[elems], 0.1, 1.0);
        let want = grad.iter().map(|g| g.f64() * g.f64()).sum::<f64>().sqrt();
        close("f64", &[norm(&widen(&grad))], &[want], 1e-13 * want);
        close("f32", &[norm(&grad)], &[want], 6e-8 * want);
    }
}

#[test]
fn large_and_small_f32_neither_overflow_nor_vanish() {
    for size in [1e30f32, 1e-30] {
        let want = size.f64() * 200.0;
        close("norm", &[norm(&vec![size; 40_000])], &[want], 1e-7 * want);
    }
}

#[test]
fn one_bad_gradient_makes_the_norm_not_finite() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut grad = vec![1.0f32; 70_000];
        grad[69_999] = bad;
        assert!(!norm(&grad).is_finite(), "{bad}");
    }
}

#[test]
fn threads_change_no_bit() {
    let grad = normal::<f32>(1, &[500_001], 0.0, 1.0);
    same_on_any_threads(|| vec![norm(&grad)]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let needed = workspace_bytes(&cpu(), 70_000);
    let args = [
        arg("norm", DType::F32, &[1]),
        arg("grad", DType::F32, &[70_000]).free(&[0]),
        workspace_arg(needed),
    ];
    let call = |t: &mut [Any]| -> Result<()> {
        let [norm, grad, workspace] = t else { unreachable!() };
        let (norm, workspace) = (norm.view_mut(), workspace.view_mut());
        forward(&cpu(), Forward { norm, grad: grad.view(), workspace })
    };
    refuses_what_does_not_fit("grad_norm", &args, &call);
    let err = refusal(&args, &call, "norm", Any::new(DType::F32, &[2]));
    assert_eq!(err.to_string(), "grad_norm: `norm` has shape [2], expected [1]");
    let err = refusal(&args, &call, "workspace", Any::new(DType::U8, &[100]));
    let want = "grad_norm: `workspace` has 100 bytes, needs 144 (see workspace_bytes)";
    assert_eq!(err.to_string(), want);
}
