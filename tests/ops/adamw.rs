//! `AdamW` against its formula, step by step; what a bad gradient may not do.

use half::bf16;
use pixmim::ops::adamw::{COEFFICIENTS, Prepare, Update, prepare, update};
use pixmim::{DType, Result};

use crate::common::{
    Guarded, Real, close, cpu, normal, same_on_any_threads, scale, uniform, view, widen,
};
use crate::refusal::{Any, arg, refuses_numbers, refuses_what_does_not_fit};

/// Parameters and moments.
#[derive(Clone, Debug, PartialEq)]
struct State<T> {
    param: Vec<T>,
    exp_avg: Vec<T>,
    exp_avg_sq: Vec<T>,
}

#[derive(Clone, Copy)]
struct Hyper {
    loss: f64,
    norm: f64,
    clip: f64,
    lr: f64,
    weight_decay: f64,
    step: i64,
}

const HYPER: Hyper =
    Hyper { loss: 1.0, norm: 1.0, clip: 0.0, lr: 1e-3, weight_decay: 0.05, step: 1 };
const BETAS: [f64; 2] = [0.9, 0.95];
const EPS: f64 = 1e-8;

impl<T: Real> State<T> {
    fn new(elems: usize) -> Self {
        let zeros = vec![T::of(0.0); elems];
        Self { param: normal(1, &[elems], 0.0, 1.0), exp_avg: zeros.clone(), exp_avg_sq: zeros }
    }

    fn update(&mut self, grad: &[T], hyper: Hyper) {
        let shape = [grad.len()];
        let Self { param, exp_avg, exp_avg_sq } = self;
        let mut buffers =
            [param, exp_avg, exp_avg_sq].map(|values| (Guarded::holding(values, &shape), values));
        let [(p, _), (m, _), (v, _)] = &mut buffers;
        let mut copy = Guarded::poisoned(&shape);
        let coefficients = coefficients::<T>(hyper);
        let args = Update {
            param: p.view(),
            copy: Some(copy.view()),
            exp_avg: m.view(),
            exp_avg_sq: v.view(),
            grad: view(grad, &shape),
            coefficients: view(&coefficients, &[COEFFICIENTS]),
            betas: BETAS,
            eps: EPS,
            weight_decay: hyper.weight_decay,
        };
        update(&cpu(), args).unwrap();
        if coefficients[0] == T::of(1.0) {
            let rounded: Vec<_> = p.values().iter().map(|x| bf16::from_f64(x.f64())).collect();
            assert_eq!(copy.values(), rounded);
        } else {
            assert!(copy.values().iter().all(|x: &bf16| x.is_nan()), "the copy stays as it was");
        }
        for (buffer, values) in buffers {
            *values = buffer.values();
        }
    }
}

fn coefficients<T: Real>(hyper: Hyper) -> Vec<T> {
    let mut coefficients = Guarded::<T>::poisoned(&[COEFFICIENTS]);
    let mut step = Guarded::holding(&[hyper.step - 1], &[1]);
    let (lr, loss, norm) = ([hyper.lr], [T::of(hyper.loss)], [T::of(hyper.norm)]);
    let args = Prepare {
        coefficients: coefficients.view(),
        step: step.view(),
        lr: view(&lr, &[1]),
        loss: view(&loss, &[1]),
        grad_norm: view(&norm, &[1]),
        clip: hyper.clip,
        betas: BETAS,
    };
    prepare(&cpu(), args).unwrap();
    let coefficients = coefficients.values();
    let is_taken = coefficients[0] == T::of(1.0);
    assert_eq!(step.values(), [hyper.step - i64::from(!is_taken)], "counts the steps taken");
    coefficients
}

/// The formula of `torch.optim.AdamW`, written down once more.
fn reference(state: &mut State<f64>, grad: &[f64], hyper: Hyper) {
    let t = hyper.step as f64;
    for (i, &g) in grad.iter().enumerate() {
        let (m, v) = (&mut state.exp_avg[i], &mut state.exp_avg_sq[i]);
        *m = BETAS[0] * *m + (1.0 - BETAS[0]) * g;
        *v = BETAS[1] * *v + (1.0 - BETAS[1]) * g * g;
        let m_hat = *m / (1.0 - BETAS[0].powf(t));
        let v_hat = *v / (1.0 - BETAS[1].powf(t));
        state.param[i] -= hyper.lr * hyper.weight_decay * state.param[i];
        state.param[i] -= hyper.lr * m_hat / (v_hat.sqrt() + EPS);
    }
}

fn gradient<T: Real>(step: i64, elems: usize) -> Vec<T> {
    normal(100 + step as u64, &[elems], 0.1, 1.0)
}

#[test]
fn a_hundred_steps_follow_the_formula() {
    const ELEMS: usize = 2_003;
    let mut exact = State::<f64>::new(ELEMS);
    let (mut double, mut single) = (exact.clone(), State::<f32>::new(ELEMS));
    for step in 1..=100 {
        // A learning rate that changes, as under a schedule.
        let hyper = Hyper { step, lr: 2.4e-3 * (step as f64 / 40.0).min(1.0), ..HYPER };
        reference(&mut exact, &gradient(step, ELEMS), hyper);
        double.update(&gradient(step, ELEMS), hyper);
        single.update(&gradient(step, ELEMS), hyper);
    }
    for (name, exact, double, single) in [
        ("param", &exact.param, &double.param, &single.param),
        ("exp_avg", &exact.exp_avg, &double.exp_avg, &single.exp_avg),
        ("exp_avg_sq", &exact.exp_avg_sq, &double.exp_avg_sq, &single.exp_avg_sq),
    ] {
        close(name, double, exact, 1e-12 * scale(exact));
        close(name, single, exact, 1e-6 * scale(exact));
    }
}

#[test]
fn the_first_step_goes_by_the_learning_rate_against_the_gradient() {
    let mut state =
        State { param: vec![2.0, 2.0], exp_avg: vec![0.0; 2], exp_avg_sq: vec![0.0; 2] };
    state.update(&[5.0, -0.25], Hyper { lr: 0.1, weight_decay: 0.5, ..HYPER });
    // 2 (1 - 0.1 0.5) -+ 0.1, whatever the gradient's size.
    close("param", &state.param, &[1.8, 2.0], 1e-8);
    close("exp_avg", &state.exp_avg, &[0.5, -0.025], 1e-14);
    close("exp_avg_sq", &state.exp_avg_sq, &[1.25, 0.003_125], 1e-14);
}

#[test]
fn a_loss_or_norm_that_is_not_finite_changes_no_bit() {
    let mut state = State::<f32>::new(37);
    state.update(&gradient(1, 37), HYPER);
    let before = state.clone();
    let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    // The square of 1e20 is no f32.
    let norms = bad.iter().chain(&[1e20]).map(|&norm| Hyper { norm, ..HYPER });
    for hyper in norms.chain(bad.iter().map(|&loss| Hyper { loss, ..HYPER })) {
        for clip in [0.0, 1.0] {
            let mut grad = gradient::<f32>(2, 37);
            grad[5] = f32::NAN;
            state.update(&grad, Hyper { clip, step: 2, ..hyper });
            assert_eq!(state, before);
        }
    }
}

#[test]
fn gradients_are_scaled_down_to_the_clip_and_never_up() {
    let grad = gradient::<f64>(1, 37);
    for (norm, clip, factor) in
        [(4.0, 1.0, 0.25), (4.0, 0.0, 1.0), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0), (0.0, 1.0, 1.0)]
    {
        let (mut clipped, mut scaled) = (State::<f64>::new(37), State::<f64>::new(37));
        clipped.update(&grad, Hyper { norm, clip, ..HYPER });
        let smaller: Vec<f64> = grad.iter().map(|g| g * factor).collect();
        scaled.update(&smaller, HYPER);
        assert_eq!(clipped, scaled, "norm {norm}, clip {clip}");
    }
}

#[test]
fn a_learning_rate_of_zero_moves_the_moments_only() {
    let mut state = State::<f32>::new(37);
    state.update(&gradient(1, 37), Hyper { lr: 0.0, ..HYPER });
    assert_eq!(state.param, State::<f32>::new(37).param);
    assert!(state.exp_avg.iter().zip(&state.exp_avg_sq).all(|(m, v)| *m != 0.0 && *v > 0.0));
}

#[test]
fn late_steps_need_no_correction() {
    for step in [1 << 20, i64::from(u32::MAX), i64::MAX] {
        let (mut got, mut want) = (State::<f64>::new(37), State::<f64>::new(37));
        got.update(&gradient(1, 37), Hyper { step, ..HYPER });
        reference(&mut want, &gradient(1, 37), Hyper { step, ..HYPER });
        close("param", &got.param, &want.param, 1e-12);
    }
}

#[test]
fn threads_change_no_bit() {
    const ELEMS: usize = 50_003;
    let grad: Vec<f32> = uniform(3, &[ELEMS]);
    let all = same_on_any_threads(|| {
        let mut state = State::<f32>::new(ELEMS);
        for step in 1..=3 {
            state.update(&grad, Hyper { step, clip: 0.5, ..HYPER });
        }
        [state.param, state.exp_avg, state.exp_avg_sq].concat()
    });
    assert!(scale(&widen(&all)).is_finite());
}

#[test]
fn what_does_not_fit_is_refused() {
    let with = |t: &mut [Any], [beta1, beta2, eps, weight_decay]: [f64; 4]| -> Result<()> {
        let [param, exp_avg, exp_avg_sq, grad, coefficients, copy] = t else { unreachable!() };
        let args = Update {
            param: param.view_mut(),
            copy: Some(copy.view_mut()),
            exp_avg: exp_avg.view_mut(),
            exp_avg_sq: exp_avg_sq.view_mut(),
            grad: grad.view(),
            coefficients: coefficients.view(),
            betas: [beta1, beta2],
            eps,
            weight_decay,
        };
        update(&cpu(), args)
    };
    let good = [BETAS[0], BETAS[1], EPS, 0.05];
    let call = |t: &mut [Any]| with(t, good);
    let args = [
        arg("param", DType::F32, &[37]),
        arg("exp_avg", DType::F32, &[37]),
        arg("exp_avg_sq", DType::F32, &[37]),
        arg("grad", DType::F32, &[37]),
        arg("coefficients", DType::F32, &[COEFFICIENTS]),
        arg("copy", DType::Bf16, &[37]),
    ];
    refuses_what_does_not_fit("adamw::update", &args, &call);
    for (at, name) in ["beta1", "beta2", "eps", "weight_decay"].into_iter().enumerate() {
        let bad: &[f64] = if at < 2 { &[-0.1, 1.0] } else { &[-1e-9] };
        refuses_numbers(&format!("adamw::update: {name}"), bad, &args, &|t, number| {
            let mut numbers = good;
            numbers[at] = number;
            with(t, numbers)
        });
    }
    let with = |t: &mut [Any], [clip, beta1, beta2]: [f64; 3]| -> Result<()> {
        let [coefficients, step, lr, loss, grad_norm] = t else { unreachable!() };
        let args = Prepare {
            coefficients: coefficients.view_mut(),
            step: step.view_mut(),
            lr: lr.view(),
            loss: loss.view(),
            grad_norm: grad_norm.view(),
            clip,
            betas: [beta1, beta2],
        };
        prepare(&cpu(), args)
    };
    let good = [0.0, BETAS[0], BETAS[1]];
    let call = |t: &mut [Any]| with(t, good);
    let args = [
        arg("coefficients", DType::F32, &[COEFFICIENTS]),
        arg("step", DType::I64, &[1]),
        arg("lr", DType::F64, &[1]),
        arg("loss", DType::F32, &[1]),
        arg("grad_norm", DType::F32, &[1]),
    ];
    refuses_what_does_not_fit("adamw::prepare", &args, &call);
    for (at, name) in ["clip", "beta1", "beta2"].into_iter().enumerate() {
        let bad: &[f64] = if at > 0 { &[-0.1, 1.0] } else { &[-1e-9] };
        refuses_numbers(&format!("adamw::prepare: {name}"), bad, &args, &|t, number| {
            let mut numbers = good;
            numbers[at] = number;
            with(t, numbers)
        });
    }
}
