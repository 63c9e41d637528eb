//! The product by the driver, and what kernels put around it.

use half::bf16;
use pixmim::dtype::Element;
use pixmim::ops::patch_embed::{Backward, Forward, backward, forward, workspace_bytes};
use pixmim::{DType, Device, Error, Tensor};

use crate::common::{
    Input, Output, Stored, close_as_naive, gpu, masks, same_on_any_schedule, uniform,
    unit_roundoff, widen, workspace,
};

/// (B, L, K, E, D): one patch, all patches, a patch whose numbers do not fill 16 bytes, rows of several turns.
const SIZES: [[usize; 5]; 4] =
    [[3, 9, 4, 12, 24], [2, 196, 49, 48, 264], [5, 7, 1, 588, 8], [1, 6, 6, 48, 1032]];

/// `T` is stored, `G` is what gradients of parameters are.
struct Case<T, G> {
    size: [usize; 5],
    patches: Vec<T>,
    ids_keep: Vec<i32>,
    weight: Vec<T>,
    bias: Vec<T>,
    cls_token: Vec<T>,
    pos_embed: Vec<T>,
    grad_out: Vec<T>,
    before: [Vec<G>; 3],
}

impl<T: Stored> Case<T, f32> {
    fn new(size: [usize; 5]) -> Self {
        let [images, all, kept, numbers, dim] = size;
        Self {
            size,
            patches: uniform(1, images * kept * numbers),
            ids_keep: masks(1, images, all, kept).keep,
            weight: uniform(2, dim * numbers),
            bias: uniform(3, dim),
            cls_token: uniform(4, dim),
            pos_embed: uniform(5, (1 + all) * dim),
            grad_out: uniform(6, images * (1 + kept) * dim),
            before: [uniform(7, dim * numbers), uniform(8, dim), uniform(9, dim)],
        }
    }

    fn widened(&self) -> Case<f64, f64> {
        Case {
            size: self.size,
            patches: widen(&self.patches),
            ids_keep: self.ids_keep.clone(),
            weight: widen(&self.weight),
            bias: widen(&self.bias),
            cls_token: widen(&self.cls_token),
            pos_embed: widen(&self.pos_embed),
            grad_out: widen(&self.grad_out),
            before: [0, 1, 2].map(|i| widen(&self.before[i])),
        }
    }

    /// In f32, one number after another; the product is stored before bias and position are added.
    fn naive(&self) -> Vec<f64> {
        let [images, _, kept, numbers, dim] = self.size;
        let f32 = |x: T| x.f64() as f32;
        let mut out: Vec<T> = vec![];
        for b in 0..images {
            out.extend(
                (0..dim)
                    .map(|d| T::round(f64::from(f32(self.cls_token[d]) + f32(self.pos_embed[d])))),
            );
            for k in 0..kept {
                let patch = &self.patches[(b * kept + k) * numbers..][..numbers];
                let pos = (1 + self.ids_keep[b * kept + k] as usize) * dim;
                out.extend((0..dim).map(|d| {
                    let weight = &self.weight[d * numbers..][..numbers];
                    let product: f32 =
                        patch.iter().zip(weight).map(|(&x, &w)| f32(x) * f32(w)).sum();
                    let product = f32(T::round(f64::from(product)));
                    T::round(f64::from(product + f32(self.bias[d]) + f32(self.pos_embed[pos + d])))
                }));
            }
        }
        widen(&out)
    }

    fn naive_grads(&self) -> [Vec<f64>; 3] {
        let [_, _, kept, numbers, dim] = self.size;
        let mut grads = self.before.clone();
        for (row, grad) in self.grad_out.chunks(dim).enumerate() {
            let (b, token) = (row / (1 + kept), row % (1 + kept));
            for (d, g) in grad.iter().map(|g| g.f64() as f32).enumerate() {
                if token == 0 {
                    grads[2][d] += g;
                    continue;
                }
                grads[1][d] += g;
                let patch = &self.patches[(b * kept + token - 1) * numbers..][..numbers];
                for (sum, x) in grads[0][d * numbers..].iter_mut().zip(patch) {
                    *sum += g * x.f64() as f32;
                }
            }
        }
        grads.map(|grad| widen(&grad))
    }
}

/// Tokens, and the gradients of weight, bias and class token.
fn run<T: Element, G: Element>(dev: &Device, case: &Case<T, G>) -> (Vec<T>, [Vec<G>; 3]) {
    let [images, all, kept, numbers, dim] = case.size;
    let patches = Input::new(dev, &case.patches, &[images, kept, numbers]);
    let bytes = workspace_bytes(dev, T::DTYPE, images, kept, dim);
    let mut out = Output::new(dev, T::DTYPE, &[images, 1 + kept, dim]);
    forward(
        dev,
        Forward {
            out: out.view(),
            patches: patches.view(),
            ids_keep: Input::new(dev, &case.ids_keep, &[images, kept]).view(),
            weight: Input::new(dev, &case.weight, &[dim, numbers]).view(),
            bias: Input::new(dev, &case.bias, &[dim]).view(),
            cls_token: Input::new(dev, &case.cls_token, &[dim]).view(),
            pos_embed: Input::new(dev, &case.pos_embed, &[1 + all, dim]).view(),
            workspace: workspace(dev, bytes).view(),
        },
    )
    .unwrap();
    let [weight, bias, cls_token] = &case.before;
    let mut grad_weight = Output::holding(dev, weight, &[dim, numbers]);
    let mut grad_bias = Output::holding(dev, bias, &[dim]);
    let mut grad_cls_token = Output::holding(dev, cls_token, &[dim]);
    backward(
        dev,
        Backward {
            grad_weight: grad_weight.view(),
            grad_bias: grad_bias.view(),
            grad_cls_token: grad_cls_token.view(),
            grad_out: Input::new(dev, &case.grad_out, &[images, 1 + kept, dim]).view(),
            patches: patches.view(),
            workspace: workspace(dev, bytes).view(),
        },
    )
    .unwrap();
    (out.values(), [grad_weight.values(), grad_bias.values(), grad_cls_token.values()])
}

fn tokens_and_gradients_are_as_exact_as_the_naive_formula<T: Stored>() {
    for size in SIZES {
        let [_, _, _, numbers, dim] = size;
        let case = Case::<T, _>::new(size);
        let (out, grads) = run(&gpu(), &case);
        let (exact, exact_grads) = run(&Device::cpu(), &case.widened());
        close_as_naive("out", &widen(&out), &case.naive(), &exact, dim, unit_roundoff::<T>());
        let naive = case.naive_grads();
        let names = [("grad_weight", numbers), ("grad_bias", dim), ("grad_cls_token", dim)];
        for (i, (name, width)) in names.into_iter().enumerate() {
            let (got, roundoff) = (widen(&grads[i]), unit_roundoff::<f32>());
            close_as_naive(name, &got, &naive[i], &exact_grads[i], width, roundoff);
        }
    }
}

#[test]
fn tokens_and_gradients_are_as_exact_as_the_naive_formula_in_bf16() {
    tokens_and_gradients_are_as_exact_as_the_naive_formula::<bf16>();
}

#[test]
fn tokens_and_gradients_are_as_exact_as_the_naive_formula_in_f32() {
    tokens_and_gradients_are_as_exact_as_the_naive_formula::<f32>();
}

#[test]
fn no_schedule_changes_a_bit() {
    let case = Case::<bf16, _>::new([3, 16, 7, 48, 40]);
    same_on_any_schedule(|dev| {
        let (out, grads) = run(dev, &case);
        [bytemuck::cast_slice::<_, u8>(&out), bytemuck::cast_slice(&grads.concat())].concat()
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    let dev = gpu();
    let tensor = |dev: &Device, dtype, shape: &[usize]| Tensor::new(dev, dtype, shape).unwrap();
    let refusal = |dtype, dim: usize, patches: &Tensor, short: usize| {
        let mut out = tensor(&dev, dtype, &[2, 4, dim]);
        let bytes = workspace_bytes(&dev, dtype, 2, 3, dim) - short;
        forward(
            &dev,
            Forward {
                out: out.view_mut(),
                patches: patches.view(),
                ids_keep: Input::new(&dev, &[0i32, 8, 3, 1, 2, 7], &[2, 3]).view(),
                weight: tensor(&dev, dtype, &[dim, 12]).view(),
                bias: tensor(&dev, dtype, &[dim]).view(),
                cls_token: tensor(&dev, dtype, &[dim]).view(),
                pos_embed: tensor(&dev, dtype, &[10, dim]).view(),
                workspace: workspace(&dev, bytes).view(),
            },
        )
        .unwrap_err()
    };
    let patches = |dev: &Device, dtype| tensor(dev, dtype, &[2, 3, 12]);
    let err = refusal(DType::F32, 20, &patches(&dev, DType::F32), 0);
    let want = "patch_embed::forward: `pos_embed` has shape [10, 20], \
                expected a last dimension that is a multiple of 8: a GPU takes no other";
    assert_eq!(err.to_string(), want);
    let err = refusal(DType::F64, 24, &patches(&dev, DType::F64), 0);
    assert!(matches!(err, Error::DType { arg: "patches", .. }), "{err}");
    let err = refusal(DType::Bf16, 24, &patches(&Device::cpu(), DType::Bf16), 0);
    assert!(matches!(err, Error::Place { arg: "patches", .. }), "{err}");
    let err = refusal(DType::Bf16, 24, &patches(&dev, DType::Bf16), 1);
    assert!(matches!(err, Error::Workspace { .. }), "{err}");

    let longer = tensor(&dev, DType::Bf16, &[2 * 4 * 24 + 1]);
    let (_, misaligned) = longer.view().split_at(1);
    let [mut grad_weight, mut grad_bias, mut grad_cls_token] =
        [&[24, 12][..], &[24], &[24]].map(|shape| tensor(&dev, DType::F32, shape));
    let err = backward(
        &dev,
        Backward {
            grad_weight: grad_weight.view_mut(),
            grad_bias: grad_bias.view_mut(),
            grad_cls_token: grad_cls_token.view_mut(),
            grad_out: misaligned.reshaped(&[2, 4, 24]).unwrap(),
            patches: patches(&dev, DType::Bf16).view(),
            workspace: workspace(&dev, workspace_bytes(&dev, DType::Bf16, 2, 3, 24)).view(),
        },
    )
    .unwrap_err()
    .to_string();
    assert!(err.starts_with("`patch_embed::backward: grad_out` starts at address"), "{err}");
}
