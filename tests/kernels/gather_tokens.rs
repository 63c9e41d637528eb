//! Copies: bit for bit what the CPU makes of the same numbers.

use half::bf16;
use pixmim::dtype::Element;
use pixmim::ops::gather_tokens::{Backward, Forward, backward, forward};
use pixmim::{DType, Device, Error, Tensor};

use crate::common::{Input, Output, Stored, gpu, masks, same_on_any_schedule, uniform, widen};

/// (B, L, M, D): one warp's row, rows of several turns, one patch, all patches.
const SIZES: [[usize; 4]; 5] =
    [[3, 7, 5, 24], [2, 49, 37, 264], [1, 196, 147, 8], [2, 5, 1, 1032], [1, 9, 9, 520]];

struct Case<T> {
    size: [usize; 4],
    inp: Vec<T>,
    ids_masked: Vec<i32>,
    ids_restore: Vec<i32>,
    grad_out: Vec<T>,
}

impl<T: Stored> Case<T> {
    fn new(size: [usize; 4]) -> Self {
        let [images, patches, masked, dim] = size;
        let masks = masks(1, images, patches, patches - masked);
        Self {
            size,
            inp: uniform(1, images * (1 + patches) * dim),
            ids_masked: masks.masked,
            ids_restore: masks.restore,
            grad_out: uniform(2, images * masked * dim),
        }
    }

    fn widened(&self) -> Case<f64> {
        let (ids_masked, ids_restore) = (self.ids_masked.clone(), self.ids_restore.clone());
        let (inp, grad_out) = (widen(&self.inp), widen(&self.grad_out));
        Case { size: self.size, inp, ids_masked, ids_restore, grad_out }
    }
}

/// Output and gradient.
fn run<T: Element>(dev: &Device, case: &Case<T>) -> [Vec<T>; 2] {
    let [images, patches, masked, dim] = case.size;
    let mut out = Output::new(dev, T::DTYPE, &[images, masked, dim]);
    forward(
        dev,
        Forward {
            out: out.view(),
            inp: Input::new(dev, &case.inp, &[images, 1 + patches, dim]).view(),
            ids_masked: Input::new(dev, &case.ids_masked, &[images, masked]).view(),
        },
    )
    .unwrap();
    let mut grad_inp = Output::new(dev, T::DTYPE, &[images, 1 + patches, dim]);
    backward(
        dev,
        Backward {
            grad_inp: grad_inp.view(),
            grad_out: Input::new(dev, &case.grad_out, &[images, masked, dim]).view(),
            ids_restore: Input::new(dev, &case.ids_restore, &[images, patches]).view(),
        },
    )
    .unwrap();
    [out.values(), grad_inp.values()]
}

fn tokens_and_gradients_are_those_of_the_cpu<T: Stored>() {
    for size in SIZES {
        let case = Case::<T>::new(size);
        let got = run(&gpu(), &case).map(|values| widen(&values));
        assert!(got == run(&Device::cpu(), &case.widened()), "{size:?}: not the same rows");
    }
}

#[test]
fn tokens_and_gradients_are_those_of_the_cpu_in_bf16() {
    tokens_and_gradients_are_those_of_the_cpu::<bf16>();
}

#[test]
fn tokens_and_gradients_are_those_of_the_cpu_in_f32() {
    tokens_and_gradients_are_those_of_the_cpu::<f32>();
}

#[test]
fn no_schedule_changes_a_bit() {
    let case = Case::<bf16>::new([2, 49, 37, 40]);
    same_on_any_schedule(|dev| run(dev, &case).concat());
}

#[test]
fn what_does_not_fit_is_refused() {
    let dev = gpu();
    let tensor = |dev: &Device, dtype, shape: &[usize]| Tensor::new(dev, dtype, shape).unwrap();
    let refusal = |dtype, dim: usize, inp: &Tensor| {
        let (mut out, ids) = (tensor(&dev, dtype, &[2, 3, dim]), [0i32, 1, 2, 3, 2, 1]);
        forward(
            &dev,
            Forward {
                out: out.view_mut(),
                inp: inp.view(),
                ids_masked: Input::new(&dev, &ids, &[2, 3]).view(),
            },
        )
        .unwrap_err()
    };
    let err = refusal(DType::Bf16, 12, &tensor(&dev, DType::Bf16, &[2, 5, 12]));
    let want = "gather_tokens::forward: `inp` has shape [2, 5, 12], \
                expected a last dimension that is a multiple of 8: a GPU takes no other";
    assert_eq!(err.to_string(), want);
    let err = refusal(DType::F64, 16, &tensor(&dev, DType::F64, &[2, 5, 16]));
    assert!(matches!(err, Error::DType { arg: "inp", .. }), "{err}");
    let err = refusal(DType::F32, 16, &tensor(&Device::cpu(), DType::F32, &[2, 5, 16]));
    assert!(matches!(err, Error::Place { arg: "inp", .. }), "{err}");

    let longer = tensor(&dev, DType::F32, &[2 * 3 * 16 + 1]);
    let (_, misaligned) = longer.view().split_at(1);
    let mut grad_inp = tensor(&dev, DType::F32, &[2, 5, 16]);
    let err = backward(
        &dev,
        Backward {
            grad_inp: grad_inp.view_mut(),
            grad_out: misaligned.reshaped(&[2, 3, 16]).unwrap(),
            ids_restore: Input::new(&dev, &[0i32, 1, 2, 3, 3, 1, 0, 2], &[2, 4]).view(),
        },
    )
    .unwrap_err()
    .to_string();
    assert!(err.starts_with("`gather_tokens::backward: grad_out` starts at address"), "{err}");
}
