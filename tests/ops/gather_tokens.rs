//! The masked patches' tokens, and their gradients back among the others.

use pixmim::ops::gather_tokens::{Backward, Forward, backward, forward};
use pixmim::{DType, Error, Result};

use crate::common::{
    Guarded, Real, close, cpu, dot, for_any, gradcheck, masks, same_on_any_threads, uniform, view,
};
use crate::refusal::{Any, arg, refusal, refuses_what_does_not_fit};

/// (B, L, M, D).
type Size = [usize; 4];

#[derive(Clone)]
struct Case<T> {
    size: Size,
    inp: Vec<T>,
    ids_masked: Vec<i32>,
    ids_restore: Vec<i32>,
    grad_out: Vec<T>,
}

impl<T: Real> Case<T> {
    fn new(size: Size) -> Self {
        let [images, patches, masked, dim] = size;
        let masks = masks(1, images, patches, patches - masked);
        Self {
            size,
            inp: uniform(1, &[images, 1 + patches, dim]),
            ids_masked: masks.masked,
            ids_restore: masks.restore,
            grad_out: uniform(2, &[images, masked, dim]),
        }
    }

    fn forward(&self) -> Vec<T> {
        let [images, patches, masked, dim] = self.size;
        let mut out = Guarded::poisoned(&[images, masked, dim]);
        let args = Forward {
            out: out.view(),
            inp: view(&self.inp, &[images, 1 + patches, dim]),
            ids_masked: view(&self.ids_masked, &[images, masked]),
        };
        forward(&cpu(), args).unwrap();
        out.values()
    }

    fn backward(&self) -> Vec<T> {
        let [images, patches, masked, dim] = self.size;
        let mut grad_inp = Guarded::poisoned(&[images, 1 + patches, dim]);
        let args = Backward {
            grad_inp: grad_inp.view(),
            grad_out: view(&self.grad_out, &[images, masked, dim]),
            ids_restore: view(&self.ids_restore, &[images, patches]),
        };
        backward(&cpu(), args).unwrap();
        grad_inp.values()
    }
}

/// The formula, and its transpose as a scatter through the ids that only the forward pass is given.
fn naive<T: Real>(case: &Case<T>) -> [Vec<T>; 2] {
    let [_, patches, masked, dim] = case.size;
    let (mut out, mut grad_inp) = (vec![], vec![T::of(0.0); case.inp.len()]);
    for (row, &id) in case.ids_masked.iter().enumerate() {
        let at = (row / masked * (1 + patches) + 1 + id as usize) * dim;
        out.extend(&case.inp[at..][..dim]);
        grad_inp[at..][..dim].copy_from_slice(&case.grad_out[row * dim..][..dim]);
    }
    [out, grad_inp]
}

#[test]
fn three_patches_by_hand() {
    let case = Case {
        size: [1, 3, 2, 1],
        inp: vec![1.0, 2.0, 4.0, 8.0],
        ids_masked: vec![2, 0],
        ids_restore: vec![2, 0, 1],
        grad_out: vec![16.0, 32.0],
    };
    assert_eq!(case.forward(), [8.0, 2.0]);
    assert_eq!(case.backward(), [0.0, 32.0, 0.0, 16.0]);
}

#[test]
fn tokens_and_gradients_are_the_naive_ones() {
    for_any((1usize..=4, 1usize..=12, 1usize..=12, 1usize..=40), |(b, l, m, d)| {
        let case = Case::<f64>::new([b, l, m.min(l), d]);
        assert_eq!([case.forward(), case.backward()], naive(&case));
        let single = Case::<f32>::new(case.size);
        assert_eq!([single.forward(), single.backward()], naive(&single));
    });
}

#[test]
fn the_gradient_passes_the_finite_differences() {
    let case = Case::<f64>::new([2, 9, 5, 3]);
    gradcheck("inp", &case.inp, &case.backward(), |x| {
        dot(&Case { inp: x.to_vec(), ..case.clone() }.forward(), &case.grad_out)
    });
}

#[test]
fn backward_is_the_adjoint_of_forward() {
    let case = Case::<f64>::new([37, 49, 37, 97]);
    let there = dot(&case.forward(), &case.grad_out);
    close("dot product", &[there], &[dot(&case.inp, &case.backward())], 1e-9);
}

#[test]
fn all_patches_can_be_gathered_in_any_order() {
    let case = Case::<f64>::new([3, 7, 7, 2]);
    assert_eq!([case.forward(), case.backward()], naive(&case));
}

#[test]
fn threads_change_no_bit() {
    let case = Case::<f32>::new([37, 49, 37, 97]);
    same_on_any_threads(|| [case.forward(), case.backward()].concat());
}

#[test]
fn what_does_not_fit_is_refused() {
    let real = |name, shape: &[usize]| arg(name, DType::F32, shape);
    let args = [
        real("out", &[2, 3, 7]),
        // More patches than are gathered; fewer are tried below.
        real("inp", &[2, 5, 7]).free(&[1]),
        arg("ids_masked", DType::I32, &[2, 3]).holding(&[0, 3, 2, 1, 2, 3]),
    ];
    let call = |t: &mut [Any]| -> Result<()> {
        let [out, inp, ids_masked] = t else { unreachable!() };
        let (out, inp, ids_masked) = (out.view_mut(), inp.view(), ids_masked.view());
        forward(&cpu(), Forward { out, inp, ids_masked })
    };
    refuses_what_does_not_fit("gather_tokens::forward", &args, &call);
    for tokens in [0, 1, 3] {
        let err = refusal(&args, &call, "inp", Any::new(DType::F32, &[2, tokens, 7]));
        assert!(matches!(err, Error::Shape { .. }), "{err}");
    }
    for id in [4, -1] {
        let bad = Any::holding(&[0, 3, id, 1, 2, 3], &[2, 3]);
        let err = refusal(&args, &call, "ids_masked", bad);
        let want = format!("`gather_tokens::forward: ids_masked` holds the id {id}, outside 0..4");
        assert_eq!(err.to_string(), want);
    }

    let args = [
        real("grad_inp", &[2, 5, 7]),
        // Any number of masked patches up to L.
        real("grad_out", &[2, 3, 7]).free(&[1]),
        arg("ids_restore", DType::I32, &[2, 4]).holding(&[0, 1, 2, 3, 3, 1, 0, 2]),
    ];
    let call = |t: &mut [Any]| -> Result<()> {
        let [grad_inp, grad_out, ids_restore] = t else { unreachable!() };
        let (grad_inp, grad_out) = (grad_inp.view_mut(), grad_out.view());
        backward(&cpu(), Backward { grad_inp, grad_out, ids_restore: ids_restore.view() })
    };
    refuses_what_does_not_fit("gather_tokens::backward", &args, &call);
    for masked in [0, 5] {
        let err = refusal(&args, &call, "grad_out", Any::new(DType::F32, &[2, masked, 7]));
        assert!(matches!(err, Error::Shape { .. }), "{err}");
    }
    for id in [4, -1] {
        let bad = Any::holding(&[0, 1, 2, 3, 3, id, 0, 2], &[2, 4]);
        let err = refusal(&args, &call, "ids_restore", bad);
        assert!(matches!(err, Error::Invalid { .. }), "{err}");
    }
}
