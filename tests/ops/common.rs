//! What the tests of the ops share: inputs, guarded outputs, comparisons, finite differences, thread pools.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, Div, Mul, Neg, Sub};

use pixmim::dtype::Element;
use pixmim::rng::{Purpose, Stream};
use pixmim::{Cpu, Device, Products, TensorMut, TensorRef};
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngSeed, TestRunner};

#[path = "../shared/masks.rs"]
mod masks;
pub(crate) use masks::masks;

/// f32 or f64, for naive formulas in either precision.
pub(crate) trait Real:
    Element
    + PartialOrd
    + Debug
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + Sum
{
    fn of(x: f64) -> Self;
    fn f64(self) -> f64;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn sqrt(self) -> Self;
}

macro_rules! real {
    ($($float:ident),*) => {$(
        impl Real for $float {
            fn of(x: f64) -> Self {
                x as $float
            }
            fn f64(self) -> f64 {
                f64::from(self)
            }
            fn exp(self) -> Self {
                self.exp()
            }
            fn ln(self) -> Self {
                self.ln()
            }
            fn sqrt(self) -> Self {
                self.sqrt()
            }
        }
    )*};
}
real!(f32, f64);

pub(crate) fn cpu() -> Device {
    Device::cpu()
}

/// The CPU with matrix products of bf16 operands.
pub(crate) fn cpu_bf16() -> Device {
    Device::Cpu(Cpu { products: Products::Bf16 })
}

fn stream(seed: u64) -> Stream {
    Stream::new(0x0D15_EA5E, 0, seed, Purpose::Init)
}

/// Numbers in [-1, 1). They are f32 numbers in either precision, so that both see the same input.
pub(crate) fn uniform<T: Real>(seed: u64, shape: &[usize]) -> Vec<T> {
    let stream = stream(seed);
    let elems: usize = shape.iter().product();
    (0..elems as u32).map(|i| T::of((2.0 * stream.uniform(i) - 1.0) as f32 as f64)).collect()
}

/// `mean` plus `std` times standard normal numbers; f32 numbers in either precision.
pub(crate) fn normal<T: Real>(seed: u64, shape: &[usize], mean: f64, std: f64) -> Vec<T> {
    let stream = stream(seed);
    let elems: usize = shape.iter().product();
    (0..elems as u32).map(|i| T::of((mean + std * stream.normal(i)) as f32 as f64)).collect()
}

/// A tensor to read.
pub(crate) fn view<'a, T: Element>(data: &'a [T], shape: &[usize]) -> TensorRef<'a> {
    TensorRef::new(data, shape).expect("the test's shapes fit")
}

/// A tensor to write to, between two guard zones.
pub(crate) struct Guarded<T> {
    cells: Vec<T>,
    shape: Vec<usize>,
}

/// Elements of a guard zone: odd, so that a workspace starts off any alignment.
const GUARD: usize = 67;
const GUARD_BYTE: u8 = 0xa5;
/// A float whose bits are all set is NaN.
const POISON_BYTE: u8 = 0xff;

impl<T: Element> Guarded<T> {
    /// Holds NaN, or -1 for integers.
    pub(crate) fn poisoned(shape: &[usize]) -> Self {
        let poison: T = bytemuck::pod_read_unaligned(&[POISON_BYTE; 8][..size_of::<T>()]);
        Self::holding(&vec![poison; shape.iter().product()], shape)
    }

    pub(crate) fn holding(values: &[T], shape: &[usize]) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        let mut cells = vec![T::zeroed(); values.len() + 2 * GUARD];
        bytemuck::cast_slice_mut::<T, u8>(&mut cells).fill(GUARD_BYTE);
        cells[GUARD..][..values.len()].copy_from_slice(values);
        Self { cells, shape: shape.to_vec() }
    }

    pub(crate) fn view(&mut self) -> TensorMut<'_> {
        let elems = self.cells.len() - 2 * GUARD;
        TensorMut::new(&mut self.cells[GUARD..][..elems], &self.shape).expect("made so")
    }

    /// What the tensor holds, once both guard zones are seen to be intact.
    #[track_caller]
    pub(crate) fn values(&self) -> Vec<T> {
        let (before, rest) = self.cells.split_at(GUARD);
        let (values, after) = rest.split_at(rest.len() - GUARD);
        for zone in [before, after] {
            let bytes = bytemuck::cast_slice::<T, u8>(zone);
            assert!(bytes.iter().all(|&b| b == GUARD_BYTE), "wrote outside {:?}", self.shape);
        }
        values.to_vec()
    }
}

/// A workspace of exactly this many bytes.
pub(crate) fn workspace(bytes: usize) -> Guarded<u8> {
    Guarded::poisoned(&[bytes])
}

/// For ops that need none on the CPU.
pub(crate) fn no_workspace<'a>() -> TensorMut<'a> {
    TensorMut::new::<u8>(&mut [], &[0]).expect("no element")
}

/// Largest magnitude, the scale that errors are measured by.
pub(crate) fn scale(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |a, x| a.max(x.abs()))
}

pub(crate) fn widen<T: Real>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.f64()).collect()
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Asserts that nothing is further than `tol` from where it should be. NaN is.
#[track_caller]
pub(crate) fn close<T: Real>(name: &str, got: &[T], want: &[f64], tol: f64) {
    assert_eq!(got.len(), want.len(), "{name}: number of elements");
    for (i, (got, &want)) in got.iter().zip(want).enumerate() {
        let err = (got.f64() - want).abs();
        assert!(err <= tol, "{name}[{i}] is {got:?}, not {want:?}: off by {err:e} > {tol:e}");
    }
}

/// Asserts that an f32 result is as near to the exact one as twice the error of the formula written down naively in
/// f32, plus 1e-6 of the scale.
#[track_caller]
pub(crate) fn close_as_naive(name: &str, got: &[f32], naive: &[f32], exact: &[f64]) {
    assert_eq!(naive.len(), exact.len(), "{name}: number of elements");
    let errors: Vec<f64> = naive.iter().zip(exact).map(|(n, e)| n.f64() - e).collect();
    close(name, got, exact, 2.0 * scale(&errors) + 1e-6 * scale(exact));
}

/// Asserts that `grad` is the gradient of `loss` at `x`, by central differences along each axis.
#[track_caller]
pub(crate) fn gradcheck(name: &str, x: &[f64], grad: &[f64], loss: impl Fn(&[f64]) -> f64) {
    const EPS: f64 = 1e-6;
    let mut at = x.to_vec();
    let slopes: Vec<f64> = (0..x.len())
        .map(|i| {
            at[i] = x[i] + EPS;
            let above = loss(&at);
            at[i] = x[i] - EPS;
            let below = loss(&at);
            at[i] = x[i];
            (above - below) / (2.0 * EPS)
        })
        .collect();
    assert!(scale(&slopes) > 1e-3, "{name}: the loss depends on it");
    close(name, grad, &slopes, 1e-7 * scale(&slopes).max(1.0));
}

/// As [`gradcheck`], along one random direction: for shapes too large to try every axis.
#[track_caller]
pub(crate) fn slopecheck(name: &str, x: &[f64], grad: &[f64], loss: impl Fn(&[f64]) -> f64) {
    const EPS: f64 = 1e-6;
    let direction: Vec<f64> = uniform(x.len() as u64, &[x.len()]);
    let step =
        |eps: f64| -> Vec<f64> { x.iter().zip(&direction).map(|(x, d)| x + eps * d).collect() };
    let slope = (loss(&step(EPS)) - loss(&step(-EPS))) / (2.0 * EPS);
    let norm = dot(grad, grad).sqrt() * dot(&direction, &direction).sqrt();
    close(name, &[dot(grad, &direction)], &[slope], 1e-7 * norm.max(1.0));
}

/// Runs twice on one thread, then on two and on four, and asserts that no bit of the result changes.
#[track_caller]
pub(crate) fn same_on_any_threads<T: Element>(run: impl Fn() -> Vec<T> + Sync) -> Vec<T> {
    let results = [1, 1, 2, 4].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.expect("threads can be had").install(&run)
    });
    let bytes = |result: &Vec<T>| bytemuck::cast_slice::<T, u8>(result).to_vec();
    let first = bytes(&results[0]);
    for (result, threads) in results.iter().zip([1, 1, 2, 4]) {
        assert!(bytes(result) == first, "other bits on {threads} threads");
    }
    let [result, ..] = results;
    result
}

/// Tries 64 values of a strategy, always the same ones.
pub(crate) fn for_any<S: Strategy>(strategy: S, check: impl Fn(S::Value)) {
    let config = Config {
        cases: 64,
        rng_seed: RngSeed::Fixed(2303),
        failure_persistence: None,
        ..Config::default()
    };
    let result = TestRunner::new(config).run(&strategy, |value| {
        check(value);
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

mod tests {
    use super::*;

    fn fails(check: impl FnOnce() + std::panic::UnwindSafe) -> bool {
        std::panic::catch_unwind(check).is_err()
    }

    #[test]
    fn close_refuses_nan_infinity_and_one_wrong_element() {
        let want = vec![1.0; 100_000];
        let wrong = |x: f64| {
            let mut got = want.clone();
            got[77_777] = x;
            got
        };
        close("right", &wrong(1.0 + 1e-9), &want, 1e-8);
        for x in [f64::NAN, f64::INFINITY, 1.0 + 2e-8, 0.0] {
            let (got, want) = (wrong(x), want.clone());
            assert!(fails(move || close("wrong", &got, &want, 1e-8)), "{x}");
        }
        assert!(fails(|| close("nan", &[0.0], &[f64::NAN], 1.0)));
        assert!(fails(|| close("short", &[0.0], &[0.0, 0.0], 1.0)));
    }

    #[test]
    fn a_gradient_that_is_off_is_refused() {
        let x = [0.3, -0.7, 1.1];
        let loss = |x: &[f64]| x[0] * x[1] + x[2].powi(3);
        let grad = [-0.7, 0.3, 3.63];
        gradcheck("right", &x, &grad, loss);
        slopecheck("right", &x, &grad, loss);
        let off = [-0.7, 0.3, 3.63001];
        assert!(fails(move || gradcheck("wrong", &x, &off, loss)));
        assert!(fails(move || slopecheck("wrong", &x, &off, loss)));
        assert!(fails(move || gradcheck("swapped", &x, &[0.3, -0.7, 3.63], loss)));
    }

    #[test]
    fn a_write_beside_a_guarded_tensor_is_seen_and_the_rest_is_poison() {
        let mut out = Guarded::<f32>::poisoned(&[3, 5]);
        assert!(out.values().iter().all(|x| x.is_nan()));
        out.view().into_slice::<f32>().fill(1.0);
        assert_eq!(out.values(), [1.0; 15]);
        for at in [GUARD - 1, GUARD + 15] {
            let mut out = Guarded::<f32>::poisoned(&[3, 5]);
            out.cells[at] = 0.0;
            assert!(fails(move || drop(out.values())));
        }
    }
}
