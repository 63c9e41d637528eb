//! Attention on a GPU, in each of its kernels, against the f64 CPU side.

use half::bf16;
use pixmim::ops::attention::{Backward, Forward, backward, forward, workspace_bytes};
use pixmim::{DType, Device, Error, Result, Tensor, TensorMut, TensorRef};

use crate::common::{
    Input, Output, Stored, close_as_naive, gpu, normal, same_on_any_schedule, unit_roundoff, widen,
    workspace,
};

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

/// Heads that are kept whole in shared memory.
const WHOLE: [Size; 5] = [
    size(2, 50, 3, 64),
    size(1, 65, 2, 80),
    size(1, 197, 2, 32),
    size(2, 197, 1, 64),
    size(1, 257, 2, 32),
];

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

    fn workspace_bytes(self, dev: &Device, dtype: DType) -> usize {
        workspace_bytes(dev, dtype, self.images, self.tokens, self.heads)
    }

    fn inputs<T: Stored>(self, std: f64) -> Inputs<T> {
        let elems = self.out().iter().product();
        Inputs {
            size: self,
            qkv: normal(1, 3 * elems, 0.0, std),
            grad_out: normal(2, elems, 0.0, 1.0),
        }
    }

    /// Of part 0, 1 or 2 (query, key, value), in `qkv` and what is laid out as it.
    fn at(self, image: usize, token: usize, part: usize, head: usize) -> usize {
        ((image * self.tokens + token) * 3 + part) * self.dim() + head * self.head_dim
    }

    /// In `out` and what is laid out as it.
    fn row(self, image: usize, token: usize, head: usize) -> usize {
        (image * self.tokens + token) * self.dim() + head * self.head_dim
    }
}

struct Inputs<T> {
    size: Size,
    qkv: Vec<T>,
    grad_out: Vec<T>,
}

struct Outputs {
    out: Vec<f64>,
    lse: Vec<f64>,
    grad_qkv: Vec<f64>,
}

impl<T: Stored> Inputs<T> {
    /// What the kernels of a device make of it. The gradient is given the kernels' own `out` and `lse`.
    fn on(&self, dev: &Device) -> Outputs {
        let size = self.size;
        let qkv = Input::new(dev, &self.qkv, &size.qkv());
        let grad_out = Input::new(dev, &self.grad_out, &size.out());
        let mut out = Output::new(dev, T::DTYPE, &size.out());
        let mut lse = Output::new(dev, DType::F32, &size.lse());
        let mut grad_qkv = Output::new(dev, T::DTYPE, &size.qkv());
        let mut work = workspace(dev, size.workspace_bytes(dev, T::DTYPE));
        let args =
            Forward { out: out.view(), lse: lse.view(), qkv: qkv.view(), workspace: work.view() };
        forward(dev, args).unwrap();
        let args = Backward {
            grad_qkv: grad_qkv.view(),
            grad_out: grad_out.view(),
            out: out.as_ref(),
            lse: lse.as_ref(),
            qkv: qkv.view(),
            workspace: work.view(),
        };
        backward(dev, args).unwrap();
        Outputs {
            out: widen(&out.values::<T>()),
            lse: widen(&lse.values::<f32>()),
            grad_qkv: widen(&grad_qkv.values::<T>()),
        }
    }

    /// In f64 on the CPU.
    fn exact(&self) -> Outputs {
        let (dev, size) = (Device::cpu(), self.size);
        let (qkv, grad_out) = (widen(&self.qkv), widen(&self.grad_out));
        let mut out = vec![0.0; grad_out.len()];
        let mut lse = vec![0.0; size.lse().iter().product()];
        let mut grad_qkv = vec![0.0; qkv.len()];
        let mut work = vec![0u8; size.workspace_bytes(&dev, DType::F64)];
        let bytes = [work.len()];
        let args = Forward {
            out: TensorMut::new(&mut out, &size.out()).unwrap(),
            lse: TensorMut::new(&mut lse, &size.lse()).unwrap(),
            qkv: TensorRef::new(&qkv, &size.qkv()).unwrap(),
            workspace: TensorMut::new(&mut work, &bytes).unwrap(),
        };
        forward(&dev, args).unwrap();
        let args = Backward {
            grad_qkv: TensorMut::new(&mut grad_qkv, &size.qkv()).unwrap(),
            grad_out: TensorRef::new(&grad_out, &size.out()).unwrap(),
            out: TensorRef::new(&out, &size.out()).unwrap(),
            lse: TensorRef::new(&lse, &size.lse()).unwrap(),
            qkv: TensorRef::new(&qkv, &size.qkv()).unwrap(),
            workspace: TensorMut::new(&mut work, &bytes).unwrap(),
        };
        backward(&dev, args).unwrap();
        Outputs { out, lse, grad_qkv }
    }

    /// The formulas written down: arithmetic in f32, what a product reads and what it yields for good rounded to `T`.
    fn naive(&self) -> Outputs {
        let size = self.size;
        let (t, hd, scale) = (size.tokens, size.head_dim, (size.head_dim as f32).powf(-0.5));
        let f32s = |values: &[T]| values.iter().map(|x| x.f64() as f32).collect::<Vec<_>>();
        let (qkv, grad_out) = (f32s(&self.qkv), f32s(&self.grad_out));
        let round = |x: f32| T::round(f64::from(x)).f64() as f32;
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b);
        let mut outputs =
            Outputs { out: vec![0.0; grad_out.len()], lse: vec![], grad_qkv: vec![0.0; qkv.len()] };
        for (image, head) in (0..size.images * size.heads).map(|i| (i / size.heads, i % size.heads))
        {
            let row = |part, token| &qkv[size.at(image, token, part, head)..][..hd];
            let mut grads = vec![0f32; 3 * t * hd];
            let mut add = |part: usize, token: usize, factor: f32, row: &[f32]| {
                let to = &mut grads[(part * t + token) * hd..][..hd];
                to.iter_mut().zip(row).for_each(|(to, x)| *to += factor * x);
            };
            for i in 0..t {
                let logits: Vec<f32> = (0..t).map(|j| dot(row(0, i), row(1, j)) * scale).collect();
                let top = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                let total: f32 = logits.iter().map(|x| (x - top).exp()).sum();
                outputs.lse.push(f64::from(top + total.ln()));
                let weights: Vec<f32> = logits.iter().map(|x| (x - top).exp() / total).collect();
                let mut out = vec![0f32; hd];
                for (j, &weight) in weights.iter().enumerate() {
                    let weight = round(weight);
                    out.iter_mut().zip(row(2, j)).for_each(|(out, v)| *out += weight * v);
                }
                let out: Vec<f32> = out.into_iter().map(round).collect();
                let at = size.row(image, i, head);
                let upstream = &grad_out[at..][..hd];
                let delta = dot(upstream, &out);
                for (to, x) in outputs.out[at..].iter_mut().zip(&out) {
                    *to = f64::from(*x);
                }
                for (j, &weight) in weights.iter().enumerate() {
                    let grad_logit = round(weight * (dot(upstream, row(2, j)) - delta));
                    add(0, i, grad_logit * scale, row(1, j));
                    add(1, j, grad_logit * scale, row(0, i));
                    add(2, j, round(weight), upstream);
                }
            }
            for (part, token) in (0..3 * t).map(|i| (i / t, i % t)) {
                let to = &mut outputs.grad_qkv[size.at(image, token, part, head)..][..hd];
                let from = &grads[(part * t + token) * hd..][..hd];
                to.iter_mut().zip(from).for_each(|(to, &x)| *to = f64::from(round(x)));
            }
        }
        outputs
    }

    /// Judges each row of a head, and the tensors as wholes.
    #[track_caller]
    fn is_as_good_as_naive(&self) {
        self.judge(self.size.head_dim);
    }

    #[track_caller]
    fn judge(&self, width: usize) {
        let size = self.size;
        let [got, naive, exact] = [self.on(&gpu()), self.naive(), self.exact()];
        // The gradient forms its weights from `lse`, an f32: its rounding is a relative error of all weights of a row.
        let largest_lse = exact.lse.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
        let of_lse = 2.0 * (1.0 + largest_lse) * unit_roundoff::<f32>();
        let floor = if T::DTYPE == DType::F32 { of_lse } else { unit_roundoff::<T>() };
        let close = |what: &str, width, floor, of: &dyn Fn(&Outputs) -> Vec<f64>| {
            let name = format!("{what} of {size:?}");
            close_as_naive(&name, &of(&got), &of(&naive), &of(&exact), width, floor);
        };
        close("out", width, floor, &|all| all.out.clone());
        close("lse", size.tokens, of_lse, &|all| all.lse.clone());
        for (part, what) in ["grad_q", "grad_k", "grad_v"].into_iter().enumerate() {
            let rows = |all: &Outputs| {
                let rows = all.grad_qkv.chunks_exact(size.dim()).skip(part).step_by(3);
                rows.flatten().copied().collect()
            };
            close(what, width, floor, &rows);
        }
    }
}

#[test]
fn whole_heads_attend_as_the_cpu_does() {
    for size in WHOLE {
        size.inputs::<bf16>(1.0).is_as_good_as_naive();
    }
}

#[test]
fn streamed_heads_of_any_width_attend_as_the_cpu_does() {
    for size in [
        size(3, 1, 2, 8),
        size(2, 7, 1, 16),
        size(1, 49, 3, 24),
        size(2, 50, 2, 16),
        size(1, 65, 2, 40),
        size(1, 64, 1, 48),
        size(1, 130, 1, 72),
        size(2, 128, 1, 96),
        size(1, 66, 2, 104),
        size(1, 196, 1, 128),
        size(1, 257, 1, 64),
    ] {
        size.inputs::<bf16>(1.0).is_as_good_as_naive();
    }
}

#[test]
fn long_rows_attend_as_the_cpu_does() {
    for size in [size(1, 785, 1, 64), size(1, 785, 1, 32), size(1, 1024, 1, 8)] {
        size.inputs::<bf16>(1.0).is_as_good_as_naive();
    }
}

#[test]
fn f32_attends_as_the_cpu_does() {
    for size in [
        size(3, 2, 2, 8),
        size(2, 7, 3, 16),
        size(1, 50, 2, 64),
        size(1, 65, 1, 80),
        size(1, 197, 1, 32),
    ] {
        size.inputs::<f32>(1.0).is_as_good_as_naive();
    }
}

/// Sizes of all kernels, some with padded keys.
const EACH: [Size; 7] = [
    size(1, 50, 2, 64),
    size(1, 65, 1, 80),
    size(1, 197, 1, 32),
    size(1, 197, 1, 64),
    size(1, 257, 1, 32),
    size(1, 70, 2, 64),
    size(1, 33, 1, 128),
];

#[test]
fn a_peaked_softmax_keeps_its_precision() {
    // Errors of single rows differ widely here, and the naive formula is lucky in some: images are judged.
    for size in EACH {
        size.inputs::<bf16>(4.0).judge(size.tokens * size.dim());
    }
    size(1, 50, 1, 16).inputs::<f32>(4.0).judge(50 * 16);
}

#[test]
fn very_negative_scores_make_no_infinities() {
    /// Every score of a head is about -140, where the exponential of a padded key's 0 less `lse` is infinite.
    fn opposed<T: Stored>(size: Size) -> Inputs<T> {
        let Inputs { mut qkv, grad_out, .. } = size.inputs::<T>(0.2);
        let mean = (140.0 / (size.head_dim as f64).sqrt()).sqrt();
        for (i, x) in qkv.iter_mut().enumerate() {
            let shift = [mean, -mean, 0.0][i / size.dim() % 3];
            *x = T::round(x.f64() + shift);
        }
        Inputs { size, qkv, grad_out }
    }
    for size in EACH {
        opposed::<bf16>(size).judge(size.tokens * size.dim());
    }
    opposed::<f32>(size(1, 50, 1, 16)).judge(50 * 16);
}

#[test]
fn no_schedule_changes_a_bit() {
    fn all(outputs: Outputs) -> Vec<f64> {
        [outputs.out, outputs.lse, outputs.grad_qkv].concat()
    }
    for size in [
        size(2, 50, 2, 64),
        size(1, 65, 1, 80),
        size(1, 197, 1, 32),
        size(1, 197, 1, 64),
        size(1, 130, 1, 40),
    ] {
        let inputs = size.inputs::<bf16>(1.0);
        same_on_any_schedule(|dev| all(inputs.on(dev)));
    }
    let inputs = size(2, 9, 3, 8).inputs::<f32>(1.0);
    same_on_any_schedule(|dev| all(inputs.on(dev)));
}

#[test]
fn what_a_gpu_does_not_take_is_refused() {
    let dev = gpu();
    let call = |size: Size, dtype, out: DType, skip: usize, out_dev: &Device| -> Result<()> {
        let elems = size.qkv().iter().product::<usize>();
        let mut qkv = Tensor::new(&dev, dtype, &[skip + elems]).unwrap();
        dev.clear(qkv.view_mut()).unwrap();
        let mut out = Tensor::new(out_dev, out, &size.out()).unwrap();
        let mut lse = Tensor::new(&dev, DType::F32, &size.lse()).unwrap();
        let bytes = size.workspace_bytes(&dev, dtype);
        let mut workspace = Tensor::new(&dev, DType::U8, &[bytes]).unwrap();
        let args = Forward {
            out: out.view_mut(),
            lse: lse.view_mut(),
            qkv: qkv.view().split_at(skip).1.reshaped(&size.qkv())?,
            workspace: workspace.view_mut(),
        };
        forward(&dev, args)
    };
    let (good, bf16) = (size(1, 5, 2, 8), DType::Bf16);
    call(good, bf16, bf16, 0, &dev).unwrap();
    let told = |result: Result<()>| result.unwrap_err().to_string();
    let why = told(call(size(1, 5, 2, 12), bf16, bf16, 0, &dev));
    assert!(why.contains("12 numbers wide") && why.contains("multiple of 8"), "{why}");
    let why = told(call(size(1, 5, 1, 136), bf16, bf16, 0, &dev));
    assert!(why.contains("136 numbers wide") && why.contains("up to 128"), "{why}");
    let why = told(call(size(1, 1025, 1, 8), DType::F32, DType::F32, 0, &dev));
    assert!(why.contains("1025 tokens") && why.contains("at most 1024"), "{why}");
    let why = told(call(good, bf16, bf16, 4, &dev));
    assert!(why.contains("qkv") && why.contains("multiple of 16"), "{why}");
    assert!(matches!(
        call(good, DType::F64, DType::F64, 0, &dev),
        Err(Error::DType { arg: "qkv", .. })
    ));
    assert!(matches!(call(good, bf16, DType::F32, 0, &dev), Err(Error::DType { arg: "out", .. })));
    let host = Device::cpu();
    assert!(matches!(call(good, bf16, bf16, 0, &host), Err(Error::Place { arg: "out", .. })));
}
