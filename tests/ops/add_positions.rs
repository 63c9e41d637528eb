//! Kept tokens with their positions, and the mask token at every position.

use pixmim::ops::add_positions::{Backward, Forward, backward, forward, workspace_bytes};
use pixmim::{DType, Error, Result};

use crate::common::{
    Guarded, Real, close, close_as_naive, cpu, dot, for_any, gradcheck, masks, no_workspace,
    same_on_any_threads, uniform, view, widen,
};
use crate::refusal::{Any, arg, refusal, refuses_what_does_not_fit};

/// (B, L, K, D).
type Size = [usize; 4];

#[derive(Clone)]
struct Case<T> {
    size: Size,
    inp: Vec<T>,
    ids_keep: Vec<i32>,
    mask_token: Vec<T>,
    pos_embed: Vec<T>,
    grad_out: Vec<T>,
}

impl<T: Real> Case<T> {
    fn new(size: Size) -> Self {
        let [images, patches, kept, dim] = size;
        Self {
            size,
            inp: uniform(1, &[images, 1 + kept, dim]),
            ids_keep: masks(1, images, patches, kept).keep,
            mask_token: uniform(2, &[dim]),
            pos_embed: uniform(3, &[1 + patches, dim]),
            grad_out: uniform(4, &[images * (1 + kept) + patches, dim]),
        }
    }

    fn forward(&self) -> Vec<T> {
        let [images, patches, kept, dim] = self.size;
        let mut out = Guarded::poisoned(&[images * (1 + kept) + patches, dim]);
        let args = Forward {
            out: out.view(),
            inp: view(&self.inp, &[images, 1 + kept, dim]),
            ids_keep: view(&self.ids_keep, &[images, kept]),
            mask_token: view(&self.mask_token, &[dim]),
            pos_embed: view(&self.pos_embed, &[1 + patches, dim]),
        };
        forward(&cpu(), args).unwrap();
        out.values()
    }

    /// The gradients of `inp`, which are those of its rows, and of the rows of the mask token.
    fn grads(&self) -> (&[T], &[T]) {
        self.grad_out.split_at(self.inp.len())
    }

    /// The gradient of the mask token, added to `before`.
    fn backward(&self, before: &[T]) -> Vec<T> {
        let [_, patches, _, dim] = self.size;
        let mut grad_mask_token = Guarded::holding(before, &[dim]);
        let args = Backward {
            grad_mask_token: grad_mask_token.view(),
            grad_fill: view(self.grads().1, &[patches, dim]),
            workspace: no_workspace(),
        };
        assert_eq!(workspace_bytes(&cpu(), patches, dim), 0);
        backward(&cpu(), args).unwrap();
        grad_mask_token.values()
    }
}

fn naive<T: Real>(case: &Case<T>) -> Vec<T> {
    let [images, patches, kept, dim] = case.size;
    let row = |token: &[T], position: usize| -> Vec<T> {
        (0..dim).map(|d| token[d] + case.pos_embed[position * dim + d]).collect()
    };
    let mut out = vec![];
    for b in 0..images {
        let tokens = &case.inp[b * (1 + kept) * dim..];
        out.extend(row(tokens, 0));
        for k in 0..kept {
            out.extend(row(&tokens[(1 + k) * dim..], 1 + case.ids_keep[b * kept + k] as usize));
        }
    }
    out.extend((0..patches).flat_map(|l| row(&case.mask_token, 1 + l)));
    out
}

#[test]
fn two_images_of_three_patches_by_hand() {
    let case = Case {
        size: [2, 3, 1, 1],
        inp: vec![1.0, 2.0, 3.0, 4.0],
        ids_keep: vec![1, 2],
        mask_token: vec![7.0],
        pos_embed: vec![100.0, 10.0, 20.0, 30.0],
        grad_out: vec![64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0],
    };
    assert_eq!(case.forward(), [101.0, 22.0, 103.0, 34.0, 17.0, 27.0, 37.0]);
    assert_eq!(case.backward(&[1000.0]), [1007.0]);
}

#[test]
fn rows_are_the_naive_ones() {
    for_any((1usize..=4, 1usize..=12, 0usize..=12, 1usize..=40), |(b, l, k, d)| {
        let case = Case::<f64>::new([b, l, k.min(l), d]);
        assert_eq!(case.forward(), naive(&case));
        let single = Case::<f32>::new(case.size);
        assert_eq!(single.forward(), naive(&single));
        close(
            "grad_mask_token",
            &single.backward(&vec![0.0; d]),
            &case.backward(&vec![0.0; d]),
            1e-5,
        );
    });
}

#[test]
fn the_gradients_pass_the_finite_differences() {
    let case = Case::<f64>::new([2, 9, 4, 5]);
    let loss = |changed: Case<f64>| dot(&changed.forward(), &case.grad_out);
    gradcheck("inp", &case.inp, case.grads().0, |x| loss(Case { inp: x.to_vec(), ..case.clone() }));
    gradcheck("mask_token", &case.mask_token, &case.backward(&[0.0; 5]), |x| {
        loss(Case { mask_token: x.to_vec(), ..case.clone() })
    });
}

#[test]
fn the_gradient_of_the_mask_token_is_added_to_what_is_there() {
    let case = Case::<f64>::new([3, 9, 4, 5]);
    let before: Vec<f64> = uniform(9, &[5]);
    let grad = case.backward(&[0.0; 5]);
    let want: Vec<f64> = before.iter().zip(grad).map(|(a, b)| a + b).collect();
    close("grad_mask_token", &case.backward(&before), &want, 1e-14);
}

#[test]
fn in_f32_it_is_as_exact_as_the_naive_formula() {
    let size = [3, 196, 49, 97];
    let (case, exact) = (Case::<f32>::new(size), Case::<f64>::new(size));
    close_as_naive("out", &case.forward(), &naive(&case), &naive(&exact));
    let mut sums = [0f32; 97];
    for row in case.grads().1.chunks(97) {
        sums.iter_mut().zip(row).for_each(|(sum, &g)| *sum += g);
    }
    let want = exact.backward(&[0.0; 97]);
    close_as_naive("grad_mask_token", &case.backward(&[0.0; 97]), &sums, &widen(&want));
}

#[test]
fn threads_change_no_bit() {
    let case = Case::<f32>::new([37, 49, 12, 97]);
    same_on_any_threads(|| [case.forward(), case.backward(&[0.5; 97])].concat());
}

#[test]
fn what_does_not_fit_is_refused() {
    let real = |name, shape: &[usize]| arg(name, DType::F32, shape);
    let args = [
        real("out", &[2 * 3 + 4, 7]),
        real("inp", &[2, 3, 7]),
        arg("ids_keep", DType::I32, &[2, 2]).holding(&[3, 0, 1, 2]),
        real("mask_token", &[7]),
        real("pos_embed", &[5, 7]),
    ];
    let call = |t: &mut [Any]| -> Result<()> {
        let [out, inp, ids_keep, mask_token, pos_embed] = t else { unreachable!() };
        let (out, inp, ids_keep) = (out.view_mut(), inp.view(), ids_keep.view());
        let (mask_token, pos_embed) = (mask_token.view(), pos_embed.view());
        forward(&cpu(), Forward { out, inp, ids_keep, mask_token, pos_embed })
    };
    refuses_what_does_not_fit("add_positions::forward", &args, &call);
    let err = refusal(&args, &call, "out", Any::new(DType::F32, &[9, 7]));
    let want = "add_positions::forward: `out` has shape [9, 7], expected [10, 7]";
    assert_eq!(err.to_string(), want);
    for id in [4, -1] {
        let bad = Any::holding(&[3, 0, id, 2], &[2, 2]);
        let err = refusal(&args, &call, "ids_keep", bad);
        assert!(matches!(err, Error::Invalid { .. }));
        let want = format!("`add_positions::forward: ids_keep` holds the id {id}, outside 0..4");
        assert_eq!(err.to_string(), want);
    }

    let args = [
        real("grad_mask_token", &[7]),
        // As many rows as there are patches: no other argument knows.
        real("grad_fill", &[4, 7]).free(&[0]),
    ];
    let call = |t: &mut [Any]| -> Result<()> {
        let [grad_mask_token, grad_fill] = t else { unreachable!() };
        let (grad_mask_token, grad_fill) = (grad_mask_token.view_mut(), grad_fill.view());
        backward(&cpu(), Backward { grad_mask_token, grad_fill, workspace: no_workspace() })
    };
    refuses_what_does_not_fit("add_positions::backward", &args, &call);
    let err = refusal(&args, &call, "grad_fill", Any::new(DType::F32, &[0, 7]));
    assert!(matches!(err, Error::Shape { .. }), "{err}");
}
