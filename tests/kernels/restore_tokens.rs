//! Rows in place bit for bit, and the sums over the images that mask a patch.

use half::bf16;
use pixmim::dtype::Element;
use pixmim::ops::restore_tokens::{Backward, Forward, backward, forward};
use pixmim::{DType, Device, Error, Tensor};

use crate::common::{
    Input, Output, Stored, close_as_naive, gpu, masks, same_on_any_schedule, uniform,
    unit_roundoff, widen,
};

/// (B, L, K, W): fewer images than warps, more than a turn of them, no masked and no kept patch, several stripes.
const SIZES: [[usize; 4]; 6] = [
    [3, 7, 2, 24],
    [37, 16, 4, 40],
    [65, 5, 1, 8],
    [2, 49, 12, 776],
    [2, 6, 6, 264],
    [5, 9, 0, 136],
];

struct Case<T> {
    size: [usize; 4],
    inp: Vec<T>,
    fill: Vec<T>,
    ids_restore: Vec<i32>,
    grad_out: Vec<T>,
}

impl<T: Stored> Case<T> {
    fn new(size: [usize; 4]) -> Self {
        let [images, patches, kept, width] = size;
        Self {
            size,
            inp: uniform(1, images * (1 + kept) * width),
            fill: uniform(2, patches * width),
            ids_restore: masks(1, images, patches, kept).restore,
            grad_out: uniform(3, images * (1 + patches) * width),
        }
    }

    fn widened(&self) -> Case<f64> {
        let (inp, fill) = (widen(&self.inp), widen(&self.fill));
        let (ids_restore, grad_out) = (self.ids_restore.clone(), widen(&self.grad_out));
        Case { size: self.size, inp, fill, ids_restore, grad_out }
    }

    /// The gradient of `fill`, image by image in f32, rounded at the end.
    fn naive_grad_fill(&self) -> Vec<f64> {
        let [images, patches, kept, width] = self.size;
        let mut sums = vec![0f32; patches * width];
        for b in 0..images {
            for l in 0..patches {
                if self.ids_restore[b * patches + l] as usize >= kept {
                    let grad = &self.grad_out[(b * (1 + patches) + 1 + l) * width..];
                    let sum = &mut sums[l * width..][..width];
                    sum.iter_mut().zip(grad).for_each(|(sum, g)| *sum += g.f64() as f32);
                }
            }
        }
        sums.iter().map(|&sum| T::round(f64::from(sum)).f64()).collect()
    }
}

/// Output, and the gradients of `inp` and `fill`.
fn run<T: Element>(dev: &Device, case: &Case<T>) -> [Vec<T>; 3] {
    let [images, patches, kept, width] = case.size;
    let ids_restore = Input::new(dev, &case.ids_restore, &[images, patches]);
    let mut out = Output::new(dev, T::DTYPE, &[images, 1 + patches, width]);
    forward(
        dev,
        Forward {
            out: out.view(),
            inp: Input::new(dev, &case.inp, &[images, 1 + kept, width]).view(),
            fill: Input::new(dev, &case.fill, &[patches, width]).view(),
            ids_restore: ids_restore.view(),
        },
    )
    .unwrap();
    let mut grad_inp = Output::new(dev, T::DTYPE, &[images, 1 + kept, width]);
    let mut grad_fill = Output::new(dev, T::DTYPE, &[patches, width]);
    backward(
        dev,
        Backward {
            grad_inp: grad_inp.view(),
            grad_fill: grad_fill.view(),
            grad_out: Input::new(dev, &case.grad_out, &[images, 1 + patches, width]).view(),
            ids_restore: ids_restore.view(),
        },
    )
    .unwrap();
    [out.values(), grad_inp.values(), grad_fill.values()]
}

fn rows_and_gradients_are_those_of_the_cpu<T: Stored>() {
    for size in SIZES {
        let case = Case::<T>::new(size);
        let [out, grad_inp, grad_fill] = run(&gpu(), &case).map(|values| widen(&values));
        let want = run(&Device::cpu(), &case.widened());
        assert!([out, grad_inp] == want[..2], "{size:?}: not the same rows");
        let (naive, roundoff) = (case.naive_grad_fill(), unit_roundoff::<T>());
        close_as_naive("grad_fill", &grad_fill, &naive, &want[2], size[3], roundoff);
    }
}

#[test]
fn rows_and_gradients_are_those_of_the_cpu_in_bf16() {
    rows_and_gradients_are_those_of_the_cpu::<bf16>();
}

#[test]
fn rows_and_gradients_are_those_of_the_cpu_in_f32() {
    rows_and_gradients_are_those_of_the_cpu::<f32>();
}

#[test]
fn a_patch_that_no_image_masks_has_no_gradient() {
    let mut case = Case::<f32>::new([3, 4, 2, 8]);
    case.ids_restore = [1, 0, 2, 3].repeat(3);
    let [_, _, grad_fill] = run(&gpu(), &case);
    assert_eq!(grad_fill[..16], [0.0; 16]);
    assert!(grad_fill[16..].iter().all(|&g| g != 0.0));
}

#[test]
fn no_schedule_changes_a_bit() {
    let case = Case::<bf16>::new([37, 7, 2, 40]);
    same_on_any_schedule(|dev| run(dev, &case).concat());
    let case = Case::<f32>::new([37, 7, 2, 40]);
    same_on_any_schedule(|dev| run(dev, &case).concat());
}

#[test]
fn what_does_not_fit_is_refused() {
    let dev = gpu();
    let tensor = |dev: &Device, dtype, shape: &[usize]| Tensor::new(dev, dtype, shape).unwrap();
    let ids = [0i32, 1, 2, 3, 3, 1, 0, 2];
    let refusal = |dtype, width: usize, fill: &Tensor| {
        let mut out = tensor(&dev, dtype, &[2, 5, width]);
        forward(
            &dev,
            Forward {
                out: out.view_mut(),
                inp: tensor(&dev, dtype, &[2, 3, width]).view(),
                fill: fill.view(),
                ids_restore: Input::new(&dev, &ids, &[2, 4]).view(),
            },
        )
        .unwrap_err()
    };
    let err = refusal(DType::F32, 20, &tensor(&dev, DType::F32, &[4, 20]));
    let want = "restore_tokens::forward: `inp` has shape [2, 3, 20], \
                expected a last dimension that is a multiple of 8: a GPU takes no other";
    assert_eq!(err.to_string(), want);
    let err = refusal(DType::F32, 24, &tensor(&dev, DType::Bf16, &[4, 24]));
    assert!(matches!(err, Error::DType { arg: "fill", .. }), "{err}");
    let err = refusal(DType::F32, 24, &tensor(&Device::cpu(), DType::F32, &[4, 24]));
    assert!(matches!(err, Error::Place { arg: "fill", .. }), "{err}");

    let longer = tensor(&dev, DType::Bf16, &[2 * 5 * 24 + 1]);
    let (_, misaligned) = longer.view().split_at(1);
    let mut grads = [[2, 3, 24].as_slice(), &[4, 24]].map(|shape| tensor(&dev, DType::Bf16, shape));
    let [grad_inp, grad_fill] = &mut grads;
    let err = backward(
        &dev,
        Backward {
            grad_inp: grad_inp.view_mut(),
            grad_fill: grad_fill.view_mut(),
            grad_out: misaligned.reshaped(&[2, 5, 24]).unwrap(),
            ids_restore: Input::new(&dev, &ids, &[2, 4]).view(),
        },
    )
    .unwrap_err()
    .to_string();
    assert!(err.starts_with("`restore_tokens::backward: grad_out` starts at address"), "{err}");
}
