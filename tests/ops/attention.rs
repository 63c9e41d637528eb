//! Attention against the softmax written down, over one and several blocks of queries.

use pixmim::ops::attention::{Backward, Forward, backward, forward, workspace_bytes};
use pixmim::{DType, Result};

use crate::common::{
    Guarded, Real, close, close_as_naive, cpu, dot, for_any, gradcheck, normal,
    same_on_any_threads, slopecheck, uniform, view, workspace,
};
use crate::refusal::{Any, arg, refusal, refuses_what_does_not_fit, workspace_arg};

#[derive(Clone, Copy, Debug)]
struct Size {
    images: usize,
    tokens: usize,
    heads: usize,
    head_dim: usize,
}

const fn size(images: usize, tokens: usize, heads: usize, head_dim: usize) -> Size {
    Size { images, tokens, heads, head_dim }
}

impl Size {
    fn dim(self) -> usize {
        self.heads * self.head_dim
    }

    fn out(self) -> [usize; 3] {
        [self.images, self.tokens, self.dim()]
    }

    fn qkv(self) -> [usize; 3] {
        [self.images, self.tokens, 3 * self.dim()]
    }

    fn lse(self) -> [usize; 3] {
        [self.images, self.heads, self.tokens]
    }

    fn qkv_values<T: Real>(self) -> Vec<T> {
        normal(1, &self.qkv(), 0.2, 1.0)
    }

    fn upstream<T: Real>(self) -> Vec<T> {
        uniform(2, &self.out())
    }
}

/// The output and the logarithm of the rows' sums.
fn attend<T: Real>(size: Size, qkv: &[T]) -> [Vec<T>; 2] {
    let mut out = Guarded::poisoned(&size.out());
    let mut lse = Guarded::poisoned(&size.lse());
    let mut work = workspace(workspace_bytes(&cpu(), T::DTYPE, size.images, size.tokens));
    let args = Forward {
        out: out.view(),
        lse: lse.view(),
        qkv: view(qkv, &size.qkv()),
        workspace: work.view(),
    };
    forward(&cpu(), args).unwrap();
    work.values();
    [out.values(), lse.values()]
}

fn grad<T: Real>(size: Size, qkv: &[T], grad_out: &[T]) -> Vec<T> {
    let [out, lse] = attend(size, qkv);
    let mut grad_qkv = Guarded::poisoned(&size.qkv());
    let mut work = workspace(workspace_bytes(&cpu(), T::DTYPE, size.images, size.tokens));
    let args = Backward {
        grad_qkv: grad_qkv.view(),
        grad_out: view(grad_out, &size.out()),
        out: view(&out, &size.out()),
        lse: view(&lse, &size.lse()),
        qkv: view(qkv, &size.qkv()),
        workspace: work.view(),
    };
    backward(&cpu(), args).unwrap();
    work.values();
    grad_qkv.values()
}

/// One head of one image, by its elements.
struct Head<'a, T> {
    size: Size,
    image: usize,
    head: usize,
    qkv: &'a [T],
}

impl<T: Real> Head<'_, T> {
    fn index(&self, part: usize, token: usize, d: usize) -> usize {
        let row = self.image * self.size.tokens + token;
        row * 3 * self.size.dim() + part * self.size.dim() + self.head * self.size.head_dim + d
    }

    fn at(&self, part: usize, token: usize, d: usize) -> T {
        self.qkv[self.index(part, token, d)]
    }

    /// Weights of query `t`, and the logarithm of the sum of the exponentials.
    fn weights(&self, t: usize) -> (Vec<T>, T) {
        let scale = T::of(1.0) / T::of(self.size.head_dim as f64).sqrt();
        let logits: Vec<T> = (0..self.size.tokens)
            .map(|s| {
                let products = (0..self.size.head_dim).map(|d| self.at(0, t, d) * self.at(1, s, d));
                products.sum::<T>() * scale
            })
            .collect();
        let top = logits.iter().copied().fold(logits[0], |a, b| if b > a { b } else { a });
        let exps: Vec<T> = logits.iter().map(|&x| (x - top).exp()).collect();
        let total: T = exps.iter().copied().sum();
        (exps.iter().map(|&e| e / total).collect(), top + total.ln())
    }

    /// Row `t` of the output.
    fn out(&self, t: usize) -> Vec<T> {
        let (weights, _) = self.weights(t);
        let mixed = |d| weights.iter().enumerate().map(|(s, &w)| w * self.at(2, s, d)).sum();
        (0..self.size.head_dim).map(mixed).collect()
    }
}

fn heads<T: Real>(size: Size, qkv: &[T]) -> impl Iterator<Item = Head<'_, T>> {
    (0..size.images * size.heads).map(move |i| Head {
        size,
        image: i / size.heads,
        head: i % size.heads,
        qkv,
    })
}

/// The gradient by the chain rule through each weight.
fn naive_grad<T: Real>(size: Size, qkv: &[T], grad_out: &[T]) -> Vec<T> {
    let mut grad = vec![T::of(0.0); qkv.len()];
    let scale = T::of(1.0) / T::of(size.head_dim as f64).sqrt();
    for head in heads(size, qkv) {
        for t in 0..size.tokens {
            let (weights, _) = head.weights(t);
            let row = (head.image * size.tokens + t) * size.dim() + head.head * size.head_dim;
            let upstream = &grad_out[row..][..size.head_dim];
            let of_weight: Vec<T> = (0..size.tokens)
                .map(|s| (0..size.head_dim).map(|d| upstream[d] * head.at(2, s, d)).sum())
                .collect();
            let mean: T = weights.iter().zip(&of_weight).map(|(&w, &g)| w * g).sum();
            for s in 0..size.tokens {
                let of_logit = weights[s] * (of_weight[s] - mean) * scale;
                for (d, &g) in upstream.iter().enumerate() {
                    let mut add = |part, token, x| {
                        let at = head.index(part, token, d);
                        grad[at] = grad[at] + x;
                    };
                    add(0, t, of_logit * head.at(1, s, d));
                    add(1, s, of_logit * head.at(0, t, d));
                    add(2, s, weights[s] * g);
                }
            }
        }
    }
    grad
}

fn naive<T: Real>(size: Size, qkv: &[T]) -> Vec<T> {
    let mut out = vec![T::of(0.0); size.out().iter().product()];
    for head in heads(size, qkv) {
        for t in 0..size.tokens {
            let row = (head.image * size.tokens + t) * size.dim() + head.head * size.head_dim;
            out[row..][..size.head_dim].copy_from_slice(&head.out(t));
        }
    }
    out
}

#[test]
fn two_tokens_by_hand() {
    let size = size(1, 2, 1, 1);
    // Queries 0 and 1, keys ln 3 and 0, values 4 and 8: the first row is a plain mean, the second 3 to 1.
    let qkv = [0.0, 3f64.ln(), 4.0, 1.0, 0.0, 8.0];
    let [out, lse] = attend(size, &qkv);
    close("out", &out, &[6.0, 5.0], 1e-14);
    close("lse", &lse, &[2f64.ln(), 4f64.ln()], 1e-15);
}

#[test]
fn output_and_gradient_are_the_naive_ones() {
    for_any((1usize..=3, 1usize..=20, 1usize..=5, 1usize..=17), |(b, t, h, d)| {
        let size = size(b, t, h, d);
        let (qkv, upstream) = (size.qkv_values::<f64>(), size.upstream::<f64>());
        let [out, lse] = attend(size, &qkv);
        close("out", &out, &naive(size, &qkv), 1e-12);
        let want: Vec<f64> =
            heads(size, &qkv).flat_map(|h| (0..t).map(move |t| h.weights(t).1)).collect();
        close("lse", &lse, &want, 1e-12);
        let got = grad(size, &qkv, &upstream);
        close("grad_qkv", &got, &naive_grad(size, &qkv, &upstream), 1e-11);
        slopecheck("qkv", &qkv, &got, |x| dot(&attend(size, x)[0], &upstream));
    });
}

/// Around the most queries of a block, 128, and the lengths of the models.
const LENGTHS: [usize; 7] = [1, 127, 128, 129, 197, 257, 785];

#[test]
fn sampled_rows_of_long_sequences_are_the_naive_ones() {
    for tokens in LENGTHS {
        let size = size(2, tokens, 3, 5);
        let qkv = size.qkv_values::<f64>();
        let [out, _] = attend(size, &qkv);
        for head in heads(size, &qkv) {
            for t in [0, tokens / 3, tokens / 2, tokens - 1] {
                let row = (head.image * tokens + t) * size.dim() + head.head * size.head_dim;
                close("out", &out[row..][..5], &head.out(t), 1e-13);
            }
        }
    }
}

#[test]
fn gradients_over_several_blocks_of_queries_are_the_naive_ones() {
    for tokens in LENGTHS.into_iter().filter(|&tokens| tokens < 785) {
        let size = size(1, tokens, 3, 5);
        let (qkv, upstream) = (size.qkv_values::<f64>(), size.upstream::<f64>());
        let got = grad(size, &qkv, &upstream);
        close("grad_qkv", &got, &naive_grad(size, &qkv, &upstream), 1e-12);
    }
    let size = size(1, 785, 1, 3);
    let (qkv, upstream) = (size.qkv_values::<f64>(), size.upstream::<f64>());
    let got = grad(size, &qkv, &upstream);
    slopecheck("qkv", &qkv, &got, |x| dot(&attend(size, x)[0], &upstream));
}

#[test]
fn the_gradient_passes_the_finite_differences() {
    for size in [size(2, 5, 3, 2), size(1, 7, 1, 4), size(1, 131, 1, 1)] {
        let (qkv, upstream) = (size.qkv_values::<f64>(), size.upstream::<f64>());
        gradcheck("qkv", &qkv, &grad(size, &qkv, &upstream), |x| {
            dot(&attend(size, x)[0], &upstream)
        });
    }
}

#[test]
fn in_f32_it_is_as_exact_as_the_naive_formula() {
    for size in [size(2, 50, 3, 64), size(1, 197, 2, 32), size(1, 257, 1, 80)] {
        let (qkv, wide) = (size.qkv_values::<f32>(), size.qkv_values::<f64>());
        close_as_naive("out", &attend(size, &qkv)[0], &naive(size, &qkv), &naive(size, &wide));
        let got = grad(size, &qkv, &size.upstream());
        let rough = naive_grad(size, &qkv, &size.upstream());
        let exact = naive_grad(size, &wide, &size.upstream());
        close_as_naive("grad_qkv", &got, &rough, &exact);
    }
}

#[test]
fn logits_of_thousands_neither_overflow_nor_lose_more_than_the_naive_formula() {
    let size = size(2, 130, 3, 16);
    // Rows of logits with a mean near 1000 and a deviation of order one: keys share a large part.
    let logits_of_a_thousand = |part: usize, x: f64| match part {
        0 => 10.0 + 0.1 * x,
        1 => 25.0 + 0.1 * x,
        _ => x,
    };
    let noise = size.qkv_values::<f64>();
    let part = |i: usize| i / size.dim() % 3;
    let qkv: Vec<f32> =
        noise.iter().enumerate().map(|(i, &x)| logits_of_a_thousand(part(i), x) as f32).collect();
    let wide: Vec<f64> = qkv.iter().map(|x| x.f64()).collect();
    let [out, lse] = attend(size, &qkv);
    assert!(lse.iter().all(|&lse| (900.0..1100.0).contains(&lse)));
    close_as_naive("out", &out, &naive(size, &qkv), &naive(size, &wide));
    // One weight of 1, all others 0: nothing overflows on the way.
    let peaked: Vec<f32> = noise.iter().map(|&x| 1e3 * x as f32).collect();
    let got = grad(size, &peaked, &size.upstream());
    assert!(got.iter().all(|x| x.is_finite()));
}

#[test]
fn each_image_is_by_itself_however_many_there_are() {
    // More images than run at once, and not a multiple of that.
    let (many, one) = (size(71, 6, 3, 5), size(1, 6, 3, 5));
    let (qkv, upstream) = (many.qkv_values::<f64>(), many.upstream::<f64>());
    let [out, lse] = attend(many, &qkv);
    let grads = grad(many, &qkv, &upstream);
    for (b, qkv) in qkv.chunks(6 * 45).enumerate() {
        let [want, want_lse] = attend(one, qkv);
        close("out", &out[b * 90..][..90], &want, 1e-14);
        close("lse", &lse[b * 18..][..18], &want_lse, 1e-14);
        let want = grad(one, qkv, &upstream[b * 90..][..90]);
        close("grad_qkv", &grads[b * 270..][..270], &want, 1e-14);
    }
}

#[test]
fn threads_change_no_bit() {
    for size in [size(37, 50, 3, 16), size(3, 257, 2, 16)] {
        let qkv = size.qkv_values::<f32>();
        same_on_any_threads(|| {
            [attend(size, &qkv).concat(), grad(size, &qkv, &size.upstream())].concat()
        });
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let size = size(2, 5, 3, 5);
    let real = |name, shape: &[usize]| arg(name, DType::F32, shape);
    let work = || workspace_arg(workspace_bytes(&cpu(), DType::F32, 2, 5));
    let args =
        [real("out", &size.out()), real("lse", &size.lse()), real("qkv", &size.qkv()), work()];
    let call = |t: &mut [Any]| -> Result<()> {
        let [out, lse, qkv, workspace] = t else { unreachable!() };
        let (out, lse, workspace) = (out.view_mut(), lse.view_mut(), workspace.view_mut());
        forward(&cpu(), Forward { out, lse, qkv: qkv.view(), workspace })
    };
    refuses_what_does_not_fit("attention::forward", &args, &call);
    let err = refusal(&args, &call, "lse", Any::new(DType::F32, &[2, 4, 5]));
    let want = "attention::forward: `qkv` has shape [2, 5, 45], \
                expected (B, T, 3 D) with D divisible by the 4 heads of `lse`";
    assert_eq!(err.to_string(), want);

    let args = [
        real("grad_qkv", &size.qkv()),
        real("grad_out", &size.out()),
        real("out", &size.out()),
        real("lse", &size.lse()),
        real("qkv", &size.qkv()),
        work(),
    ];
    refuses_what_does_not_fit("attention::backward", &args, &|t| {
        let [grad_qkv, grad_out, out, lse, qkv, workspace] = t else { unreachable!() };
        let (grad_qkv, workspace) = (grad_qkv.view_mut(), workspace.view_mut());
        let (grad_out, out, lse, qkv) = (grad_out.view(), out.view(), lse.view(), qkv.view());
        backward(&cpu(), Backward { grad_qkv, grad_out, out, lse, qkv, workspace })
    });
}
