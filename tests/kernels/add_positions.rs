//! Rows with positions, and the gradient of the mask token.

use half::bf16;
use pixmim::dtype::Element;
use pixmim::ops::add_positions::{Backward, Forward, backward, forward, workspace_bytes};
use pixmim::{DType, Device, Error, Tensor};

use crate::common::{
    Input, Output, Stored, close_as_naive, gpu, masks, same_on_any_schedule, uniform,
    unit_roundoff, widen, workspace,
};

/// (B, L, K, D): no kept patch, all kept, rows of several turns.
const SIZES: [[usize; 4]; 5] =
    [[3, 7, 2, 24], [2, 196, 49, 40], [1, 9, 9, 520], [5, 6, 0, 8], [2, 5, 1, 1032]];

/// `T` is stored, `G` is what gradients of parameters are.
struct Case<T, G> {
    size: [usize; 4],
    inp: Vec<T>,
    ids_keep: Vec<i32>,
    mask_token: Vec<T>,
    pos_embed: Vec<T>,
    grad_fill: Vec<T>,
    before: Vec<G>,
}

impl<T: Stored> Case<T, f32> {
    fn new(size: [usize; 4]) -> Self {
        let [images, patches, kept, dim] = size;
        Self {
            size,
            inp: uniform(1, images * (1 + kept) * dim),
            ids_keep: masks(1, images, patches, kept).keep,
            mask_token: uniform(2, dim),
            pos_embed: uniform(3, (1 + patches) * dim),
            grad_fill: uniform(4, patches * dim),
            before: uniform(5, dim),
        }
    }

    fn widened(&self) -> Case<f64, f64> {
        Case {
            size: self.size,
            inp: widen(&self.inp),
            ids_keep: self.ids_keep.clone(),
            mask_token: widen(&self.mask_token),
            pos_embed: widen(&self.pos_embed),
            grad_fill: widen(&self.grad_fill),
            before: widen(&self.before),
        }
    }

    /// Row by row in f32.
    fn naive_grad(&self) -> Vec<f64> {
        let mut sums = self.before.clone();
        for row in self.grad_fill.chunks_exact(sums.len()) {
            sums.iter_mut().zip(row).for_each(|(sum, g)| *sum += g.f64() as f32);
        }
        widen(&sums)
    }
}

fn run<T: Element, G: Element>(dev: &Device, case: &Case<T, G>) -> (Vec<T>, Vec<G>) {
    let [images, patches, kept, dim] = case.size;
    let mut out = Output::new(dev, T::DTYPE, &[images * (1 + kept) + patches, dim]);
    forward(
        dev,
        Forward {
            out: out.view(),
            inp: Input::new(dev, &case.inp, &[images, 1 + kept, dim]).view(),
            ids_keep: Input::new(dev, &case.ids_keep, &[images, kept]).view(),
            mask_token: Input::new(dev, &case.mask_token, &[dim]).view(),
            pos_embed: Input::new(dev, &case.pos_embed, &[1 + patches, dim]).view(),
        },
    )
    .unwrap();
    let mut grad_mask_token = Output::holding(dev, &case.before, &[dim]);
    backward(
        dev,
        Backward {
            grad_mask_token: grad_mask_token.view(),
            grad_fill: Input::new(dev, &case.grad_fill, &[patches, dim]).view(),
            workspace: workspace(dev, workspace_bytes(dev, patches, dim)).view(),
        },
    )
    .unwrap();
    (out.values(), grad_mask_token.values())
}

fn rows_and_gradient_are_those_of_the_cpu<T: Stored>() {
    for size in SIZES {
        let case = Case::<T, _>::new(size);
        let (out, grad) = run(&gpu(), &case);
        let (exact, exact_grad) = run(&Device::cpu(), &case.widened());
        // One sum of two numbers, rounded once.
        for (i, (out, exact)) in out.iter().zip(&exact).enumerate() {
            let err = (out.f64() - exact).abs();
            assert!(
                err <= unit_roundoff::<T>() * exact.abs(),
                "{size:?}: out[{i}] is off by {err:e}"
            );
        }
        let naive = case.naive_grad();
        let roundoff = unit_roundoff::<f32>();
        close_as_naive("grad_mask_token", &widen(&grad), &naive, &exact_grad, size[3], roundoff);
    }
}

#[test]
fn rows_and_gradient_are_those_of_the_cpu_in_bf16() {
    rows_and_gradient_are_those_of_the_cpu::<bf16>();
}

#[test]
fn rows_and_gradient_are_those_of_the_cpu_in_f32() {
    rows_and_gradient_are_those_of_the_cpu::<f32>();
}

#[test]
fn no_schedule_changes_a_bit() {
    let case = Case::<bf16, _>::new([2, 49, 12, 40]);
    same_on_any_schedule(|dev| {
        let (out, grad) = run(dev, &case);
        [bytemuck::cast_slice::<_, u8>(&out), bytemuck::cast_slice(&grad)].concat()
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    let dev = gpu();
    let tensor = |dev: &Device, dtype, shape: &[usize]| Tensor::new(dev, dtype, shape).unwrap();
    let refusal = |dtype, dim: usize, mask_token: &Tensor| {
        let mut out = tensor(&dev, dtype, &[2 * 3 + 4, dim]);
        forward(
            &dev,
            Forward {
                out: out.view_mut(),
                inp: tensor(&dev, dtype, &[2, 3, dim]).view(),
                ids_keep: Input::new(&dev, &[3i32, 0, 1, 2], &[2, 2]).view(),
                mask_token: mask_token.view(),
                pos_embed: tensor(&dev, dtype, &[5, dim]).view(),
            },
        )
        .unwrap_err()
    };
    let err = refusal(DType::F32, 20, &tensor(&dev, DType::F32, &[20]));
    let want = "add_positions::forward: `inp` has shape [2, 3, 20], \
                expected a last dimension that is a multiple of 8: a GPU takes no other";
    assert_eq!(err.to_string(), want);
    let err = refusal(DType::F64, 24, &tensor(&dev, DType::F64, &[24]));
    assert!(matches!(err, Error::DType { arg: "inp", .. }), "{err}");
    let err = refusal(DType::Bf16, 24, &tensor(&Device::cpu(), DType::Bf16, &[24]));
    assert!(matches!(err, Error::Place { arg: "mask_token", .. }), "{err}");

    let needed = workspace_bytes(&dev, 4, 24);
    let backward_of = |grad: DType, offset: usize, bytes: usize| {
        let mut grad_mask_token = tensor(&dev, grad, &[24]);
        let longer = tensor(&dev, DType::Bf16, &[4 * 24 + offset]);
        let (_, grad_fill) = longer.view().split_at(offset);
        backward(
            &dev,
            Backward {
                grad_mask_token: grad_mask_token.view_mut(),
                grad_fill: grad_fill.reshaped(&[4, 24]).unwrap(),
                workspace: workspace(&dev, bytes).view(),
            },
        )
        .unwrap_err()
    };
    let err = backward_of(DType::Bf16, 0, needed);
    assert!(matches!(err, Error::DType { arg: "grad_mask_token", .. }), "{err}");
    let err = backward_of(DType::F32, 4, needed).to_string();
    assert!(err.starts_with("`add_positions::backward: grad_fill` starts at address"), "{err}");
    let err = backward_of(DType::F32, 0, needed - 1);
    assert!(matches!(err, Error::Workspace { .. }), "{err}");
}
