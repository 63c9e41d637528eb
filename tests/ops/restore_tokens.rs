//! Kept tokens back at their places, mask tokens elsewhere.

use pixmim::ops::restore_tokens::{Backward, Forward, backward, forward, workspace_bytes};
use pixmim::{DType, Error, Result};

use crate::common::{
    Guarded, Real, close, cpu, dot, for_any, gradcheck, masks, same_on_any_threads, uniform, view,
    widen, workspace,
};
use crate::refusal::{Any, arg, refusal, refuses_what_does_not_fit, workspace_arg};

/// (B, L, K, D).
type Size = [usize; 4];

#[derive(Clone)]
struct Case<T> {
    size: Size,
    inp: Vec<T>,
    ids_restore: Vec<i32>,
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
            ids_restore: masks(1, images, patches, kept).restore,
            mask_token: uniform(2, &[dim]),
            pos_embed: uniform(3, &[1 + patches, dim]),
            grad_out: uniform(4, &[images, 1 + patches, dim]),
        }
    }

    fn forward(&self) -> Vec<T> {
        let [images, patches, kept, dim] = self.size;
        let mut out = Guarded::poisoned(&[images, 1 + patches, dim]);
        let args = Forward {
            out: out.view(),
            inp: view(&self.inp, &[images, 1 + kept, dim]),
            ids_restore: view(&self.ids_restore, &[images, patches]),
            mask_token: view(&self.mask_token, &[dim]),
            pos_embed: view(&self.pos_embed, &[1 + patches, dim]),
        };
        forward(&cpu(), args).unwrap();
        out.values()
    }

    /// Gradients of the kept tokens and of the mask token; the second is added to `before`.
    fn backward(&self, before: &[T]) -> [Vec<T>; 2] {
        let [images, patches, kept, dim] = self.size;
        let mut grad_inp = Guarded::poisoned(&[images, 1 + kept, dim]);
        let mut grad_mask_token = Guarded::holding(before, &[dim]);
        let mut work = workspace(workspace_bytes(&cpu(), T::DTYPE, images, dim));
        let args = Backward {
            grad_inp: grad_inp.view(),
            grad_mask_token: grad_mask_token.view(),
            grad_out: view(&self.grad_out, &[images, 1 + patches, dim]),
            ids_restore: view(&self.ids_restore, &[images, patches]),
            workspace: work.view(),
        };
        backward(&cpu(), args).unwrap();
        work.values();
        [grad_inp.values(), grad_mask_token.values()]
    }
}

/// As the MAE paper says it: mask tokens behind the kept ones, then unshuffled.
fn naive(case: &Case<f64>) -> Vec<f64> {
    let [_, patches, kept, dim] = case.size;
    let mut out = vec![];
    for (inp, restore) in case.inp.chunks((1 + kept) * dim).zip(case.ids_restore.chunks(patches)) {
        let (class, tokens) = inp.split_at(dim);
        let shuffled = [tokens, &case.mask_token.repeat(patches - kept)].concat();
        let unshuffled = restore.iter().flat_map(|&place| &shuffled[place as usize * dim..][..dim]);
        let all = class.iter().chain(unshuffled);
        out.extend(all.zip(&case.pos_embed).map(|(x, pos)| x + pos));
    }
    out
}

#[test]
fn three_patches_by_hand() {
    let case = Case {
        size: [1, 3, 1, 1],
        inp: vec![1.0, 2.0],
        ids_restore: vec![2, 0, 1],
        mask_token: vec![7.0],
        pos_embed: vec![0.0, 10.0, 20.0, 30.0],
        grad_out: vec![1.0, 2.0, 4.0, 8.0],
    };
    assert_eq!(case.forward(), [1.0, 17.0, 22.0, 37.0]);
    assert_eq!(case.backward(&[100.0]), [vec![1.0, 4.0], vec![110.0]]);
}

#[test]
fn tokens_stand_where_the_unshuffled_sequence_has_them() {
    for_any((1usize..=4, 1usize..=12, 0usize..=12, 1usize..=40), |(b, l, k, d)| {
        let case = Case::<f64>::new([b, l, k.min(l), d]);
        assert_eq!(case.forward(), naive(&case));
        let single = Case::<f32>::new(case.size);
        close("f32", &single.forward(), &naive(&case), 1.2e-7);
        let (grads, wide) = (single.backward(&vec![0.0; d]), case.backward(&vec![0.0; d]));
        assert_eq!(widen(&grads[0]), wide[0], "copied");
        close("grad_mask_token", &grads[1], &wide[1], 1e-5);
    });
}

#[test]
fn the_gradients_pass_the_finite_differences() {
    for size in [[2, 9, 4, 5], [3, 7, 0, 2]] {
        let case = Case::<f64>::new(size);
        let grads = case.backward(&vec![0.0; size[3]]);
        let loss = |changed: Case<f64>| dot(&changed.forward(), &case.grad_out);
        gradcheck("inp", &case.inp, &grads[0], |x| loss(Case { inp: x.to_vec(), ..case.clone() }));
        gradcheck("mask_token", &case.mask_token, &grads[1], |x| {
            loss(Case { mask_token: x.to_vec(), ..case.clone() })
        });
    }
}

#[test]
fn the_gradient_of_the_mask_token_is_added_to_what_is_there() {
    let case = Case::<f64>::new([3, 9, 4, 5]);
    let before: Vec<f64> = uniform(9, &[5]);
    let [_, grad] = case.backward(&[0.0; 5]);
    let want: Vec<f64> = before.iter().zip(grad).map(|(a, b)| a + b).collect();
    close("grad_mask_token", &case.backward(&before)[1], &want, 1e-14);
}

#[test]
fn threads_change_no_bit() {
    let case = Case::<f32>::new([37, 49, 12, 97]);
    same_on_any_threads(|| [case.forward(), case.backward(&[0.5; 97]).concat()].concat());
}

#[test]
fn what_does_not_fit_is_refused() {
    let real = |name, shape: &[usize]| arg(name, DType::F32, shape);
    let ids = || arg("ids_restore", DType::I32, &[2, 4]).holding(&[0, 1, 2, 3, 3, 1, 0, 2]);
    let args = [
        real("out", &[2, 5, 7]),
        // Any number of tokens up to 1 + L; too many and none are tried below.
        real("inp", &[2, 3, 7]).free(&[1]),
        ids(),
        real("mask_token", &[7]),
        real("pos_embed", &[5, 7]),
    ];
    let call = |t: &mut [Any]| -> Result<()> {
        let [out, inp, ids_restore, mask_token, pos_embed] = t else { unreachable!() };
        let (out, inp, ids_restore) = (out.view_mut(), inp.view(), ids_restore.view());
        let (mask_token, pos_embed) = (mask_token.view(), pos_embed.view());
        forward(&cpu(), Forward { out, inp, ids_restore, mask_token, pos_embed })
    };
    refuses_what_does_not_fit("restore_tokens::forward", &args, &call);
    for tokens in [0, 6] {
        let err = refusal(&args, &call, "inp", Any::new(DType::F32, &[2, tokens, 7]));
        let want = format!(
            "restore_tokens::forward: `inp` has shape [2, {tokens}, 7], expected [2, 1 to 5, D]"
        );
        assert_eq!(err.to_string(), want);
    }
    for id in [4, -1] {
        let bad = Any::holding(&[0, 1, 2, 3, 3, id, 0, 2], &[2, 4]);
        let err = refusal(&args, &call, "ids_restore", bad);
        assert!(matches!(err, Error::Invalid { .. }));
        let want =
            format!("`restore_tokens::forward: ids_restore` holds the id {id}, outside 0..4");
        assert_eq!(err.to_string(), want);
    }

    let args = [
        real("grad_inp", &[2, 3, 7]).free(&[1]),
        real("grad_mask_token", &[7]),
        real("grad_out", &[2, 5, 7]),
        ids(),
        workspace_arg(workspace_bytes(&cpu(), DType::F32, 2, 7)),
    ];
    refuses_what_does_not_fit("restore_tokens::backward", &args, &|t| {
        let [grad_inp, grad_mask_token, grad_out, ids_restore, workspace] = t else {
            unreachable!()
        };
        let args = Backward {
            grad_inp: grad_inp.view_mut(),
            grad_mask_token: grad_mask_token.view_mut(),
            grad_out: grad_out.view(),
            ids_restore: ids_restore.view(),
            workspace: workspace.view_mut(),
        };
        backward(&cpu(), args)
    });
}
