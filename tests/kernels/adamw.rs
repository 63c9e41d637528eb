//! `AdamW` on the device: a hundred steps against f64, and what is not taken.

use half::bf16;
use pixmim::dtype::Element;
use pixmim::ops::adamw::{COEFFICIENTS, Prepare, Update, prepare, update};
use pixmim::{DType, Device, Error, Result};

use crate::common::{Input, Output, gpu, normal, same_on_any_schedule, uniform, widen};

const BETAS: [f64; 2] = [0.9, 0.95];
const EPS: f64 = 1e-8;
const WEIGHT_DECAY: f64 = 0.05;

#[derive(Clone, Copy)]
struct Hyper {
    loss: f64,
    norm: f64,
    clip: f64,
    lr: f64,
}

const HYPER: Hyper = Hyper { loss: 1.0, norm: 1.0, clip: 0.0, lr: 1e-3 };

/// Parameters and moments on a device that computes in `T`, and the steps done.
struct State {
    dev: Device,
    /// Parameter, first and second moment.
    numbers: [Output; 3],
    copy: Output,
    coefficients: Output,
    step: Output,
}

/// `x` in the device's precision.
trait Real: Element {
    fn of(x: f64) -> Self;
}
impl Real for f32 {
    fn of(x: f64) -> Self {
        x as f32
    }
}
impl Real for f64 {
    fn of(x: f64) -> Self {
        x
    }
}

fn tensor<T: Real>(dev: &Device, values: &[f64]) -> Output {
    Output::holding(dev, &values.iter().map(|&x| T::of(x)).collect::<Vec<_>>(), &[values.len()])
}

impl State {
    fn new<T: Real>(dev: &Device, param: &[f32], step: i64) -> Self {
        let elems = param.len();
        let zeros = vec![0.0; elems];
        Self {
            dev: dev.clone(),
            numbers: [&widen(param), &zeros, &zeros].map(|values| tensor::<T>(dev, values)),
            copy: Output::holding(dev, &vec![bf16::NAN; elems], &[elems]),
            coefficients: Output::new(dev, T::DTYPE, &[COEFFICIENTS]),
            step: Output::holding(dev, &[step], &[1]),
        }
    }

    fn step<T: Real>(&mut self, grad: &[f32], hyper: Hyper, copied: bool) {
        let dev = &self.dev;
        let lr = Input::new(dev, &[hyper.lr], &[1]);
        let mut scalars = [hyper.loss, hyper.norm].map(|x| tensor::<T>(dev, &[x]));
        let [loss, norm] = &mut scalars;
        let args = Prepare {
            coefficients: self.coefficients.view(),
            step: self.step.view(),
            lr: lr.view(),
            loss: loss.as_ref(),
            grad_norm: norm.as_ref(),
            clip: hyper.clip,
            betas: BETAS,
        };
        prepare(dev, args).unwrap();
        let mut grad = tensor::<T>(dev, &widen(grad));
        let [param, m, v] = &mut self.numbers;
        let args = Update {
            param: param.view(),
            copy: copied.then(|| self.copy.view()),
            exp_avg: m.view(),
            exp_avg_sq: v.view(),
            grad: grad.as_ref(),
            coefficients: self.coefficients.as_ref(),
            betas: BETAS,
            eps: EPS,
            weight_decay: WEIGHT_DECAY,
        };
        update(dev, args).unwrap();
    }

    fn values<T: Real>(&self) -> [Vec<T>; 3] {
        self.numbers.each_ref().map(|numbers| numbers.values())
    }
}

fn gradient(step: usize, elems: usize) -> Vec<f32> {
    normal(100 + step as u64, elems, 0.1, 1.0)
}

#[test]
fn a_hundred_steps_follow_the_cpu_in_f64() {
    const ELEMS: usize = 331;
    let param: Vec<f32> = normal(1, ELEMS, 0.0, 1.0);
    let mut got = State::new::<f32>(&gpu(), &param, 0);
    let mut exact = State::new::<f64>(&Device::cpu(), &param, 0);
    for step in 1..=100 {
        // A learning rate that changes, as under a schedule, and gradients that are clipped at times.
        let lr = 2.4e-3 * (step as f64 / 40.0).min(1.0);
        let hyper = Hyper { lr, clip: 2.0, norm: 1.0 + (step % 3) as f64, ..HYPER };
        got.step::<f32>(&gradient(step, ELEMS), hyper, true);
        exact.step::<f64>(&gradient(step, ELEMS), hyper, true);
    }
    let (numbers, want) = (got.values::<f32>(), exact.values::<f64>());
    for ((name, got), want) in ["param", "exp_avg", "exp_avg_sq"].iter().zip(&numbers).zip(want) {
        let largest = want.iter().fold(0f64, |most, x| most.max(x.abs()));
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let err = (f64::from(*got) - want).abs();
            assert!(err <= 1e-6 * largest, "{name} {i}: {got} instead of {want}");
        }
    }
    let rounded: Vec<_> = numbers[0].iter().map(|&x| bf16::from_f32(x)).collect();
    assert_eq!(got.copy.values::<bf16>(), rounded);
    assert_eq!(got.step.values::<i64>(), [100]);
}

#[test]
fn coefficients_are_those_of_the_cpu() {
    let dev = gpu();
    for before in [0, 1, 6, 99, 12_345, 1 << 20, i64::from(u32::MAX), i64::MAX - 1] {
        for (norm, clip) in [(4.0, 1.0), (4.0, 0.0), (0.5, 1.0), (0.0, 1.0)] {
            let hyper = Hyper { norm, clip, lr: 1.7e-3, ..HYPER };
            let coefficients = |dev: &Device| {
                let mut state = State::new::<f32>(dev, &[], before);
                state.step::<f32>(&[], hyper, false);
                assert_eq!(state.step.values::<i64>(), [before + 1]);
                state.coefficients.values::<f32>()
            };
            // Computed in f64 and rounded once: the same but where a last bit of f64 tips the rounding.
            for (got, want) in coefficients(&dev).iter().zip(coefficients(&Device::cpu())) {
                assert!((got - want).abs() <= 1.2e-7 * want, "step {before}: {got} not {want}");
            }
        }
    }
}

#[test]
fn any_number_of_parameters_is_updated_with_and_without_a_copy() {
    for elems in [1, 2, 3, 4, 5, 1023, 1024, 1025, 2051] {
        let param: Vec<f32> = normal(1, elems, 0.0, 1.0);
        for copied in [true, false] {
            let mut got = State::new::<f32>(&gpu(), &param, 0);
            let mut want = State::new::<f32>(&Device::cpu(), &param, 0);
            for state in [&mut got, &mut want] {
                state.step::<f32>(&gradient(1, elems), HYPER, copied);
            }
            let numbers = got.values::<f32>().concat();
            for (got, want) in numbers.iter().zip(want.values::<f32>().concat()) {
                assert!((got - want).abs() <= 2.5e-7 * want.abs().max(0.1), "{got} not {want}");
            }
            let rounded = |x: &f32| bf16::from_f32(if copied { *x } else { f32::NAN }).to_bits();
            let copy: Vec<_> = got.copy.values::<bf16>().iter().map(|x| x.to_bits()).collect();
            assert_eq!(copy, numbers[..elems].iter().map(rounded).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_step_that_is_not_taken_changes_no_bit() {
    let param: Vec<f32> = normal(1, 37, 0.0, 1.0);
    let mut state = State::new::<f32>(&gpu(), &param, 0);
    state.step::<f32>(&gradient(1, 37), HYPER, true);
    let (before, copy) = (state.values::<f32>(), state.copy.values::<bf16>());
    let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    // The square of 1e20 is no f32.
    let norms = bad.iter().chain(&[1e20]).map(|&norm| Hyper { norm, ..HYPER });
    for hyper in norms.chain(bad.iter().map(|&loss| Hyper { loss, ..HYPER })) {
        let mut grad = gradient(2, 37);
        grad[5] = f32::NAN;
        state.step::<f32>(&grad, Hyper { clip: 1.0, ..hyper }, true);
        assert_eq!(state.values::<f32>(), before);
        assert_eq!(state.copy.values::<bf16>(), copy);
        assert_eq!(state.step.values::<i64>(), [1]);
    }
    state.step::<f32>(&gradient(3, 37), HYPER, true);
    assert_ne!(state.values::<f32>(), before);
}

#[test]
fn schedules_change_no_bit() {
    let (param, grad) = (uniform::<f32>(1, 2051), uniform::<f32>(2, 2051));
    same_on_any_schedule(|dev| {
        let mut state = State::new::<f32>(dev, &param, 5);
        for _ in 0..2 {
            state.step::<f32>(&grad, Hyper { clip: 0.5, ..HYPER }, true);
        }
        state.values::<f32>().concat()
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    let dev = gpu();
    let names = ["param", "exp_avg", "exp_avg_sq", "grad", "coefficients", "copy"];
    let call = |bad: &str, dtype: DType, elems: usize, skipped: usize| -> Error {
        let mut args = names.map(|name| match name {
            name if name == bad => Output::new(&dev, dtype, &[elems + skipped]),
            "coefficients" => Output::new(&dev, DType::F32, &[COEFFICIENTS]),
            "copy" => Output::new(&dev, DType::Bf16, &[37]),
            _ => Output::new(&dev, DType::F32, &[37]),
        });
        let mut views = args
            .each_mut()
            .map(Output::view)
            .into_iter()
            .zip(names)
            .map(|(view, name)| if name == bad { view.split_at(skipped).1 } else { view });
        let mut next = || views.next().unwrap();
        let (param, exp_avg, exp_avg_sq) = (next(), next(), next());
        let (grad, coefficients, copy) = (next().into_ref(), next().into_ref(), Some(next()));
        let (betas, eps, weight_decay) = (BETAS, EPS, WEIGHT_DECAY);
        let args = Update {
            param,
            copy,
            exp_avg,
            exp_avg_sq,
            grad,
            coefficients,
            betas,
            eps,
            weight_decay,
        };
        let result: Result<()> = update(&dev, args);
        result.unwrap_err()
    };
    for name in names {
        let elems = if name == "coefficients" { COEFFICIENTS } else { 37 };
        let err = call(name, DType::I32, elems, 0);
        assert!(matches!(err, Error::DType { arg, .. } if arg == name), "{err}");
        let err = call(name, if name == "copy" { DType::Bf16 } else { DType::F32 }, elems, 1);
        assert!(err.to_string().contains("starts at a multiple of 16"), "{err}");
        if name != "param" {
            let err = call(name, if name == "copy" { DType::Bf16 } else { DType::F32 }, 38, 0);
            assert!(matches!(err, Error::Shape { arg, .. } if arg == name), "{err}");
        }
    }
    // A bf16 parameter would lose its updates.
    let err = call("param", DType::Bf16, 37, 0);
    assert!(matches!(err, Error::DType { arg: "param", .. }), "{err}");
}
