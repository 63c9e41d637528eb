//! Kept tokens back at their places, a row for each masked place.

use pixmim::ops::restore_tokens::{Backward, Forward, backward, forward};
use pixmim::{DType, Error, Result};

use crate::common::{
    Guarded, Real, close, cpu, dot, for_any, gradcheck, masks, same_on_any_threads, uniform, view,
    widen,
};
use crate::refusal::{Any, arg, refusal, refuses_what_does_not_fit};

/// (B, L, K, W).
type Size = [usize; 4];

#[derive(Clone)]
struct Case<T> {
    size: Size,
    inp: Vec<T>,
    fill: Vec<T>,
    ids_keep: Vec<i32>,
    ids_masked: Vec<i32>,
    ids_restore: Vec<i32>,
    grad_out: Vec<T>,
}

impl<T: Real> Case<T> {
    fn new(size: Size) -> Self {
        let [images, patches, kept, width] = size;
        let masks = masks(1, images, patches, kept);
        Self {
            size,
            inp: uniform(1, &[images, 1 + kept, width]),
            fill: uniform(2, &[patches, width]),
            ids_keep: masks.keep,
            ids_masked: masks.masked,
            ids_restore: masks.restore,
            grad_out: uniform(3, &[images, 1 + patches, width]),
        }
    }

    fn forward(&self) -> Vec<T> {
        let [images, patches, kept, width] = self.size;
        let mut out = Guarded::poisoned(&[images, 1 + patches, width]);
        let args = Forward {
            out: out.view(),
            inp: view(&self.inp, &[images, 1 + kept, width]),
            fill: view(&self.fill, &[patches, width]),
            ids_restore: view(&self.ids_restore, &[images, patches]),
        };
        forward(&cpu(), args).unwrap();
        out.values()
    }

    /// Gradients of `inp` and of `fill`.
    fn backward(&self) -> [Vec<T>; 2] {
        let [images, patches, kept, width] = self.size;
        let mut grad_inp = Guarded::poisoned(&[images, 1 + kept, width]);
        let mut grad_fill = Guarded::poisoned(&[patches, width]);
        let args = Backward {
            grad_inp: grad_inp.view(),
            grad_fill: grad_fill.view(),
            grad_out: view(&self.grad_out, &[images, 1 + patches, width]),
            ids_restore: view(&self.ids_restore, &[images, patches]),
        };
        backward(&cpu(), args).unwrap();
        [grad_inp.values(), grad_fill.values()]
    }
}

/// As the MAE paper says it: masked rows behind the kept ones, then unshuffled.
fn naive<T: Real>(case: &Case<T>) -> Vec<T> {
    let [images, patches, kept, width] = case.size;
    let mut out = vec![];
    for b in 0..images {
        let (class, tokens) =
            case.inp[b * (1 + kept) * width..][..(1 + kept) * width].split_at(width);
        let masked = &case.ids_masked[b * (patches - kept)..][..patches - kept];
        let fill = masked.iter().flat_map(|&id| &case.fill[id as usize * width..][..width]);
        let shuffled: Vec<T> = tokens.iter().chain(fill).copied().collect();
        out.extend(class);
        for &place in &case.ids_restore[b * patches..][..patches] {
            out.extend(&shuffled[place as usize * width..][..width]);
        }
    }
    out
}

/// By the ids of kept and masked patches, which the op is not given.
fn naive_grads<T: Real>(case: &Case<T>) -> [Vec<T>; 2] {
    let [images, patches, kept, width] = case.size;
    let mut grads = [vec![], vec![T::of(0.0); patches * width]];
    for b in 0..images {
        let grad = &case.grad_out[b * (1 + patches) * width..];
        grads[0].extend(&grad[..width]);
        for &id in &case.ids_keep[b * kept..][..kept] {
            grads[0].extend(&grad[(1 + id as usize) * width..][..width]);
        }
        for &id in &case.ids_masked[b * (patches - kept)..][..patches - kept] {
            for w in id as usize * width..(id as usize + 1) * width {
                grads[1][w] = grads[1][w] + grad[width + w];
            }
        }
    }
    grads
}

#[test]
fn three_patches_of_two_images_by_hand() {
    let case = Case {
        size: [2, 3, 1, 1],
        inp: vec![1.0, 2.0, 3.0, 4.0],
        fill: vec![10.0, 20.0, 30.0],
        ids_keep: vec![1, 0],
        ids_masked: vec![2, 0, 1, 2],
        ids_restore: vec![2, 0, 1, 0, 1, 2],
        grad_out: vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0],
    };
    assert_eq!(case.forward(), [1.0, 10.0, 2.0, 30.0, 3.0, 4.0, 20.0, 30.0]);
    assert_eq!(case.backward(), [vec![1.0, 4.0, 16.0, 32.0], vec![2.0, 64.0, 136.0]]);
}

#[test]
fn rows_stand_where_the_unshuffled_sequence_has_them() {
    for_any((1usize..=4, 1usize..=12, 0usize..=12, 1usize..=40), |(b, l, k, w)| {
        let case = Case::<f64>::new([b, l, k.min(l), w]);
        assert_eq!(case.forward(), naive(&case));
        let single = Case::<f32>::new(case.size);
        assert_eq!(single.forward(), naive(&single));
        // The images are summed in the same order here and there.
        assert_eq!(case.backward(), naive_grads(&case));
        assert_eq!(single.backward(), naive_grads(&single));
    });
}

#[test]
fn the_gradients_pass_the_finite_differences() {
    for size in [[2, 9, 4, 5], [3, 7, 0, 2]] {
        let case = Case::<f64>::new(size);
        let grads = case.backward();
        let loss = |changed: Case<f64>| dot(&changed.forward(), &case.grad_out);
        gradcheck("inp", &case.inp, &grads[0], |x| loss(Case { inp: x.to_vec(), ..case.clone() }));
        gradcheck("fill", &case.fill, &grads[1], |x| {
            loss(Case { fill: x.to_vec(), ..case.clone() })
        });
    }
}

#[test]
fn backward_is_the_adjoint_of_forward() {
    let case = Case::<f64>::new([37, 49, 12, 97]);
    let [grad_inp, grad_fill] = case.backward();
    let there = dot(&case.forward(), &case.grad_out);
    let back = dot(&case.inp, &grad_inp) + dot(&case.fill, &grad_fill);
    close("dot product", &[there], &[back], 1e-9);
}

#[test]
fn in_f32_the_sums_over_images_are_as_exact_as_one_after_another() {
    let size = [1024, 5, 2, 3];
    let (case, exact) = (Case::<f32>::new(size), Case::<f64>::new(size));
    let [grad_inp, grad_fill] = case.backward();
    let want = exact.backward();
    assert_eq!(widen(&grad_inp), want[0], "copied");
    // About 614 numbers of at most 1, summed in any order.
    close("grad_fill", &grad_fill, &want[1], 614.0 * 32.0 * f64::from(f32::EPSILON));
}

#[test]
fn threads_change_no_bit() {
    let case = Case::<f32>::new([37, 49, 12, 97]);
    same_on_any_threads(|| [case.forward(), case.backward().concat()].concat());
}

#[test]
fn what_does_not_fit_is_refused() {
    let real = |name, shape: &[usize]| arg(name, DType::F32, shape);
    let ids = || arg("ids_restore", DType::I32, &[2, 4]).holding(&[0, 1, 2, 3, 3, 1, 0, 2]);
    let args = [
        real("out", &[2, 5, 7]),
        // Any number of tokens up to 1 + L; too many and none are tried below.
        real("inp", &[2, 3, 7]).free(&[1]),
        real("fill", &[4, 7]),
        ids(),
    ];
    let call = |t: &mut [Any]| -> Result<()> {
        let [out, inp, fill, ids_restore] = t else { unreachable!() };
        let (out, inp, fill) = (out.view_mut(), inp.view(), fill.view());
        forward(&cpu(), Forward { out, inp, fill, ids_restore: ids_restore.view() })
    };
    refuses_what_does_not_fit("restore_tokens::forward", &args, &call);
    for tokens in [0, 6] {
        let err = refusal(&args, &call, "inp", Any::new(DType::F32, &[2, tokens, 7]));
        let want = format!(
            "restore_tokens::forward: `inp` has shape [2, {tokens}, 7], expected [2, 1 to 5, W]"
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
        real("grad_fill", &[4, 7]),
        real("grad_out", &[2, 5, 7]),
        ids(),
    ];
    refuses_what_does_not_fit("restore_tokens::backward", &args, &|t| {
        let [grad_inp, grad_fill, grad_out, ids_restore] = t else { unreachable!() };
        let args = Backward {
            grad_inp: grad_inp.view_mut(),
            grad_fill: grad_fill.view_mut(),
            grad_out: grad_out.view(),
            ids_restore: ids_restore.view(),
        };
        backward(&cpu(), args)
    });
}
