//! Patch embedding against the sums written down.

use half::bf16;
use pixmim::ops::patch_embed::{Backward, Forward, backward, forward, workspace_bytes};
use pixmim::{DType, Device, Error, Result};

use crate::common::{
    Guarded, Real, close, close_as_naive, cpu, cpu_bf16, dot, for_any, gradcheck, masks,
    same_on_any_threads, scale, slopecheck, uniform, view, workspace,
};
use crate::refusal::{Any, arg, refusal, refuses_what_does_not_fit, workspace_arg};

/// (B, L, K, E, D).
type Size = [usize; 5];

#[derive(Clone)]
struct Case<T> {
    size: Size,
    patches: Vec<T>,
    ids_keep: Vec<i32>,
    weight: Vec<T>,
    bias: Vec<T>,
    cls_token: Vec<T>,
    pos_embed: Vec<T>,
    grad_out: Vec<T>,
}

impl<T: Real> Case<T> {
    fn new(size: Size) -> Self {
        let [images, all, kept, numbers, dim] = size;
        Self {
            size,
            patches: uniform(1, &[images, kept, numbers]),
            ids_keep: masks(1, images, all, kept).keep,
            weight: uniform(2, &[dim, numbers]),
            bias: uniform(3, &[dim]),
            cls_token: uniform(4, &[dim]),
            pos_embed: uniform(5, &[1 + all, dim]),
            grad_out: uniform(6, &[images, 1 + kept, dim]),
        }
    }

    fn forward(&self, dev: &Device) -> Vec<T> {
        let [images, all, kept, numbers, dim] = self.size;
        let mut out = Guarded::poisoned(&[images, 1 + kept, dim]);
        let mut work = workspace(workspace_bytes(&cpu(), T::DTYPE, images, kept, dim));
        let args = Forward {
            out: out.view(),
            patches: view(&self.patches, &[images, kept, numbers]),
            ids_keep: view(&self.ids_keep, &[images, kept]),
            weight: view(&self.weight, &[dim, numbers]),
            bias: view(&self.bias, &[dim]),
            cls_token: view(&self.cls_token, &[dim]),
            pos_embed: view(&self.pos_embed, &[1 + all, dim]),
            workspace: work.view(),
        };
        forward(dev, args).unwrap();
        work.values();
        out.values()
    }

    /// Gradients of weight, bias and class token, each added to `before`.
    fn backward(&self, dev: &Device, before: [&[T]; 3]) -> [Vec<T>; 3] {
        let [images, _, kept, numbers, dim] = self.size;
        let mut grad_weight = Guarded::holding(before[0], &[dim, numbers]);
        let mut grad_bias = Guarded::holding(before[1], &[dim]);
        let mut grad_cls_token = Guarded::holding(before[2], &[dim]);
        let mut work = workspace(workspace_bytes(&cpu(), T::DTYPE, images, kept, dim));
        let args = Backward {
            grad_weight: grad_weight.view(),
            grad_bias: grad_bias.view(),
            grad_cls_token: grad_cls_token.view(),
            grad_out: view(&self.grad_out, &[images, 1 + kept, dim]),
            patches: view(&self.patches, &[images, kept, numbers]),
            workspace: work.view(),
        };
        backward(dev, args).unwrap();
        work.values();
        [grad_weight.values(), grad_bias.values(), grad_cls_token.values()]
    }

    fn backward_from_zero(&self, dev: &Device) -> [Vec<T>; 3] {
        let zeros = vec![T::of(0.0); self.weight.len()];
        let dim = self.bias.len();
        self.backward(dev, [&zeros, &zeros[..dim], &zeros[..dim]])
    }
}

fn naive<T: Real>(case: &Case<T>) -> Vec<T> {
    let [images, _, kept, numbers, dim] = case.size;
    let mut out = vec![];
    for b in 0..images {
        out.extend((0..dim).map(|d| case.cls_token[d] + case.pos_embed[d]));
        for k in 0..kept {
            let patch = &case.patches[(b * kept + k) * numbers..][..numbers];
            let pos = &case.pos_embed[(1 + case.ids_keep[b * kept + k] as usize) * dim..][..dim];
            out.extend((0..dim).map(|d| {
                let weight = &case.weight[d * numbers..][..numbers];
                let product: T = patch.iter().zip(weight).map(|(&x, &w)| x * w).sum();
                product + case.bias[d] + pos[d]
            }));
        }
    }
    out
}

fn naive_grads<T: Real>(case: &Case<T>) -> [Vec<T>; 3] {
    let [_, _, kept, numbers, dim] = case.size;
    let zero = T::of(0.0);
    let mut grads = [vec![zero; dim * numbers], vec![zero; dim], vec![zero; dim]];
    for (row, grad) in case.grad_out.chunks(dim).enumerate() {
        let (b, token) = (row / (1 + kept), row % (1 + kept));
        for (d, &g) in grad.iter().enumerate() {
            if token == 0 {
                grads[2][d] = grads[2][d] + g;
                continue;
            }
            grads[1][d] = grads[1][d] + g;
            let patch = &case.patches[(b * kept + token - 1) * numbers..][..numbers];
            for (e, &x) in patch.iter().enumerate() {
                grads[0][d * numbers + e] = grads[0][d * numbers + e] + g * x;
            }
        }
    }
    grads
}

const NAMES: [&str; 3] = ["grad_weight", "grad_bias", "grad_cls_token"];

#[test]
fn output_and_gradients_are_the_naive_ones() {
    for_any((1usize..=4, 1usize..=9, 0usize..=4, 1usize..=40, 1usize..=70), |(b, k, m, e, d)| {
        let case = Case::<f64>::new([b, k + m, k, e, d]);
        close("out", &case.forward(&cpu()), &naive(&case), 1e-13);
        let (grads, want) = (case.backward_from_zero(&cpu()), naive_grads(&case));
        for i in 0..3 {
            close(NAMES[i], &grads[i], &want[i], 1e-13);
        }
        slopecheck("weight", &case.weight, &grads[0], |x| {
            let changed = Case { weight: x.to_vec(), ..case.clone() };
            dot(&changed.forward(&cpu()), &case.grad_out)
        });
    });
}

#[test]
fn the_gradients_pass_the_finite_differences() {
    let case = Case::<f64>::new([2, 9, 5, 12, 7]);
    let grads = case.backward_from_zero(&cpu());
    let loss = |changed: Case<f64>| dot(&changed.forward(&cpu()), &case.grad_out);
    gradcheck("weight", &case.weight, &grads[0], |x| {
        loss(Case { weight: x.to_vec(), ..case.clone() })
    });
    gradcheck("bias", &case.bias, &grads[1], |x| loss(Case { bias: x.to_vec(), ..case.clone() }));
    gradcheck("cls_token", &case.cls_token, &grads[2], |x| {
        loss(Case { cls_token: x.to_vec(), ..case.clone() })
    });
}

#[test]
fn parameter_gradients_are_added_to_what_is_there() {
    let case = Case::<f64>::new([3, 16, 4, 12, 7]);
    let before: [Vec<f64>; 3] = [uniform(7, &[84]), uniform(8, &[7]), uniform(9, &[7])];
    let grads = case.backward_from_zero(&cpu());
    let added = case.backward(&cpu(), [&before[0], &before[1], &before[2]]);
    for i in 0..3 {
        let want: Vec<f64> = before[i].iter().zip(&grads[i]).map(|(a, b)| a + b).collect();
        close(NAMES[i], &added[i], &want, 1e-14);
    }
}

#[test]
fn in_f32_it_is_as_exact_as_the_naive_formula() {
    let size = [3, 196, 49, 768, 97];
    let (case, exact) = (Case::<f32>::new(size), Case::<f64>::new(size));
    close_as_naive("out", &case.forward(&cpu()), &naive(&case), &naive(&exact));
    let grads = case.backward_from_zero(&cpu());
    let (rough, want) = (naive_grads(&case), naive_grads(&exact));
    for i in 0..3 {
        close_as_naive(NAMES[i], &grads[i], &rough[i], &want[i]);
    }
}

#[test]
fn products_of_bf16_are_those_of_the_rounded_operands() {
    let size = [3, 196, 49, 768, 97];
    let (case, exact) = (Case::<f32>::new(size), Case::<f64>::new(size));
    let rounded = |values: &[f32]| -> Vec<f64> {
        values.iter().map(|&x| bf16::from_f32(x).to_f64()).collect()
    };
    // Only what is multiplied is rounded.
    let forth =
        Case { patches: rounded(&case.patches), weight: rounded(&case.weight), ..exact.clone() };
    let out = case.forward(&cpu_bf16());
    let root = 768f64.sqrt();
    close("out", &out, &naive(&forth), 1e-6 * root);
    close("out", &out, &naive(&exact), root / 256.0);
    let errors: Vec<f64> = out.iter().zip(naive(&exact)).map(|(o, e)| o.f64() - e).collect();
    assert!(scale(&errors) > 1e-4, "the operands were not rounded");

    let back = Case { grad_out: rounded(&case.grad_out), ..forth };
    let grads = case.backward_from_zero(&cpu_bf16());
    close("grad_weight", &grads[0], &naive_grads(&back)[0], 1e-6 * 147f64.sqrt());
    let exact = naive_grads(&exact);
    close("grad_weight", &grads[0], &exact[0], 147f64.sqrt() / 256.0);
    close("grad_bias", &grads[1], &exact[1], 1e-4);
    close("grad_cls_token", &grads[2], &exact[2], 1e-6);
}

#[test]
fn threads_change_no_bit() {
    let case = Case::<f32>::new([37, 36, 9, 192, 130]);
    for dev in [cpu(), cpu_bf16()] {
        same_on_any_threads(|| {
            [case.forward(&dev), case.backward_from_zero(&dev).concat()].concat()
        });
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let real = |name, shape: &[usize]| arg(name, DType::F32, shape);
    let work = || workspace_arg(workspace_bytes(&cpu(), DType::F32, 2, 3, 7));
    let args = [
        real("out", &[2, 4, 7]),
        real("patches", &[2, 3, 12]),
        arg("ids_keep", DType::I32, &[2, 3]).holding(&[0, 8, 3, 1, 2, 7]),
        real("weight", &[7, 12]),
        real("bias", &[7]),
        real("cls_token", &[7]),
        // More positions than are used.
        real("pos_embed", &[10, 7]).free(&[0]),
        work(),
    ];
    let call = |t: &mut [Any]| -> Result<()> {
        let [out, patches, ids_keep, weight, bias, cls_token, pos_embed, workspace] = t else {
            unreachable!()
        };
        let args = Forward {
            out: out.view_mut(),
            patches: patches.view(),
            ids_keep: ids_keep.view(),
            weight: weight.view(),
            bias: bias.view(),
            cls_token: cls_token.view(),
            pos_embed: pos_embed.view(),
            workspace: workspace.view_mut(),
        };
        forward(&cpu(), args)
    };
    refuses_what_does_not_fit("patch_embed::forward", &args, &call);
    let err = refusal(&args, &call, "weight", Any::new(DType::F32, &[7, 13]));
    let want = "patch_embed::forward: `weight` has shape [7, 13], expected [7, 12]";
    assert_eq!(err.to_string(), want);
    for id in [9, -1] {
        let bad = Any::holding(&[0, 8, id, 1, 2, 7], &[2, 3]);
        let err = refusal(&args, &call, "ids_keep", bad);
        let want = format!("`patch_embed::forward: ids_keep` holds the id {id}, outside 0..9");
        assert_eq!(err.to_string(), want);
    }
    for positions in [0, 1, 8] {
        let err = refusal(&args, &call, "pos_embed", Any::new(DType::F32, &[positions, 7]));
        assert!(matches!(err, Error::Shape { .. } | Error::Invalid { .. }), "{err}");
    }

    let args = [
        real("grad_weight", &[7, 12]),
        real("grad_bias", &[7]),
        real("grad_cls_token", &[7]),
        real("grad_out", &[2, 4, 7]),
        real("patches", &[2, 3, 12]),
        work(),
    ];
    refuses_what_does_not_fit("patch_embed::backward", &args, &|t| {
        let [grad_weight, grad_bias, grad_cls_token, grad_out, patches, workspace] = t else {
            unreachable!()
        };
        let args = Backward {
            grad_weight: grad_weight.view_mut(),
            grad_bias: grad_bias.view_mut(),
            grad_cls_token: grad_cls_token.view_mut(),
            grad_out: grad_out.view(),
            patches: patches.view(),
            workspace: workspace.view_mut(),
        };
        backward(&cpu(), args)
    });
}
