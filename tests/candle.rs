//! The ops of `pixmim::candle` against the same formulas in candle's own ops, differentiated by its autograd.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use candle_core::{DType, Device, Result, Tensor, Var};
use pixmim::candle::{LowFreqTarget, attention, low_freq_target, masked_mse_loss};
use pixmim::ops::low_freq_target::Filter;
use pixmim::rng::{Purpose, Stream};

#[path = "../examples/candle_pixmim/in_candle.rs"]
mod in_candle;

const MEAN_STD: [[f64; 3]; 2] = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]];

/// Standard normal numbers, f64.
fn normal(seed: u64, shape: &[usize]) -> Tensor {
    let stream = Stream::new(seed, 0, 0, Purpose::Init);
    let elems: usize = shape.iter().product();
    let values: Vec<f64> = (0..elems as u32).map(|i| stream.normal(i)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn var(tensor: &Tensor) -> Var {
    Var::from_tensor(tensor).unwrap()
}

/// Asserts that nothing is further than `tol` from where it should be. NaN is.
#[track_caller]
fn close(name: &str, got: &Tensor, want: &Tensor, tol: f64) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    let numbers = |tensor: &Tensor| {
        let tensor = tensor.to_dtype(DType::F64).unwrap();
        tensor.flatten_all().unwrap().to_vec1::<f64>().unwrap()
    };
    for (i, (got, want)) in numbers(got).into_iter().zip(numbers(want)).enumerate() {
        assert!((got - want).abs() <= tol, "{name}[{i}] is {got}, not {want}");
    }
}

/// The sum of `out` times random numbers, so that every gradient differs.
fn weighted_sum(out: &Tensor) -> Tensor {
    let upstream = normal(77, out.dims()).to_dtype(out.dtype()).unwrap();
    (out * upstream).unwrap().sum_all().unwrap()
}

fn grad(loss: &Tensor, of: &Tensor) -> Tensor {
    loss.backward().unwrap().get(of).unwrap().clone()
}

#[test]
fn attention_and_its_gradient_are_candles() {
    // One block of queries, and two with a rest.
    for (images, tokens, heads, head_dim) in [(2, 7, 3, 5), (1, 131, 2, 3)] {
        let qkv = normal(1, &[images, tokens, 3 * heads * head_dim]);
        let x = var(&qkv);
        let (got, want) = (attention(&x, heads).unwrap(), in_candle::attention(&x, heads).unwrap());
        close("out", &got, &want, 1e-12);
        let want_grad = grad(&weighted_sum(&want), &x);
        close("grad_qkv", &grad(&weighted_sum(&got), &x), &want_grad, 1e-12);

        let x = var(&qkv.to_dtype(DType::F32).unwrap());
        let got = attention(&x, heads).unwrap();
        assert_eq!(got.dtype(), DType::F32);
        close("out in f32", &got, &want, 1e-5);
        close("grad_qkv in f32", &grad(&weighted_sum(&got), &x), &want_grad, 1e-5);
    }
}

#[test]
fn the_loss_and_its_gradient_are_candles() {
    let shape = [2, 3, 11];
    let (pred, target) = (normal(1, &shape), (normal(2, &shape) * 3.0).unwrap());
    for norm_pix in [false, true] {
        // The loss is one term of several, as of a network with another head.
        let total = |loss: Tensor, x: &Tensor| {
            ((loss * 0.37).unwrap() + weighted_sum(x).affine(0.1, 0.0).unwrap()).unwrap()
        };
        let x = var(&pred);
        let got = masked_mse_loss(&x, &target, norm_pix).unwrap();
        let want = in_candle::masked_mse_loss(&x, &target, norm_pix).unwrap();
        close("loss", &got, &want, 1e-13);
        let want_grad = grad(&total(want.clone(), &x), &x);
        close("grad_pred", &grad(&total(got, &x), &x), &want_grad, 1e-14);

        let x = var(&pred.to_dtype(DType::F32).unwrap());
        let got = masked_mse_loss(&x, &target.to_dtype(DType::F32).unwrap(), norm_pix).unwrap();
        assert_eq!(got.dtype(), DType::F32);
        close("loss in f32", &got, &want, 1e-5);
        close("grad_pred in f32", &grad(&total(got, &x), &x), &want_grad, 1e-6);
    }
}

#[test]
fn the_low_pass_target_is_candles() {
    // An even side and an odd one: their discs have other centres.
    for (side, radius, patch_size, ids) in
        [(12, 3.7, 3, [[3u32, 0, 15, 6, 9], [1, 2, 14, 5, 4]]), (15, 4.0, 5, [[8, 1, 0, 2, 4]; 2])]
    {
        let filter = Filter::new(&pixmim::Device::cpu(), side, radius).unwrap();
        let [mean, std] = MEAN_STD;
        let how = LowFreqTarget { filter: &filter, mean, std, patch_size };
        let pixels = (normal(3, &[2, 3, side, side]) * 0.2).unwrap().affine(1.0, 0.5).unwrap();
        let ids = Tensor::new(&ids, &Device::Cpu).unwrap();
        let low_pass = in_candle::LowPass::new(side, radius, DType::F64).unwrap();
        let want = low_pass.target(&pixels, &ids, MEAN_STD, patch_size).unwrap();
        close("target", &low_freq_target(&pixels, &ids, how).unwrap(), &want, 1e-12);
        for dtype in [DType::I64, DType::I32] {
            let ids = ids.to_dtype(dtype).unwrap();
            close("target", &low_freq_target(&pixels, &ids, how).unwrap(), &want, 1e-12);
        }
        let got = low_freq_target(&pixels.to_dtype(DType::F32).unwrap(), &ids, how).unwrap();
        assert_eq!(got.dtype(), DType::F32);
        close("target in f32", &got, &want, 2e-5);
    }
}

#[test]
fn a_tensor_with_gaps_or_an_offset_is_taken_as_it_reads() {
    let (images, tokens, width) = (2, 5, 18);
    let x = var(&normal(4, &[tokens, images + 1, width]));
    let qkv = x.narrow(1, 1, images).unwrap().transpose(0, 1).unwrap();
    let (got, want) = (attention(&qkv, 2).unwrap(), in_candle::attention(&qkv, 2).unwrap());
    close("out", &got, &want, 1e-12);
    close("grad", &grad(&weighted_sum(&got), &x), &grad(&weighted_sum(&want), &x), 1e-12);
    // The gradient that arrives has gaps too.
    let (got, want) = (got.t().unwrap(), want.t().unwrap());
    close("grad", &grad(&weighted_sum(&got), &x), &grad(&weighted_sum(&want), &x), 1e-12);

    let x = var(&normal(5, &[3, 4, 2]));
    let (pred, target) = (x.t().unwrap(), normal(6, &[4, 2, 4]).narrow(0, 1, 3).unwrap());
    let got = masked_mse_loss(&pred, &target, true).unwrap();
    let want = in_candle::masked_mse_loss(&pred, &target, true).unwrap();
    close("loss", &got, &want, 1e-13);
    close("grad", &grad(&got, &x), &grad(&want, &x), 1e-13);

    let filter = Filter::new(&pixmim::Device::cpu(), 6, 2.0).unwrap();
    let [mean, std] = MEAN_STD;
    let how = LowFreqTarget { filter: &filter, mean, std, patch_size: 2 };
    let pixels = normal(7, &[1, 6, 6, 3]).permute((0, 3, 1, 2)).unwrap();
    let ids = Tensor::new(&[[8i64, 0, 3], [4, 2, 1]], &Device::Cpu).unwrap();
    let got = low_freq_target(&pixels, &ids.narrow(0, 1, 1).unwrap(), how).unwrap();
    let want = low_freq_target(
        &pixels.contiguous().unwrap(),
        &ids.get(1).unwrap().unsqueeze(0).unwrap(),
        how,
    );
    close("target", &got, &want.unwrap(), 0.0);
}

#[test]
fn backward_can_run_again_and_leaves_the_target_alone() {
    let (pred, target) = (var(&normal(1, &[1, 2, 3])), var(&normal(2, &[1, 2, 3])));
    let doubled = (target.as_tensor() * 2.0).unwrap();
    let loss = masked_mse_loss(&pred, &doubled, false).unwrap();
    let (first, second) = (loss.backward().unwrap(), loss.backward().unwrap());
    assert!(first.get(&target).is_none());
    close("grad", second.get(&pred).unwrap(), first.get(&pred).unwrap(), 0.0);
    let qkv = var(&normal(3, &[1, 2, 6]));
    let sum = weighted_sum(&attention(&qkv, 1).unwrap());
    close("grad", &grad(&sum, &qkv), &grad(&sum, &qkv), 0.0);
}

#[test]
fn what_cannot_be_taken_is_refused_with_a_sentence() {
    #[track_caller]
    fn refused(result: Result<Tensor>, says: &str) {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let x = normal(1, &[2, 3, 12]);
    for dtype in [DType::BF16, DType::F16, DType::U8] {
        let (x, says) = (x.to_dtype(dtype).unwrap(), format!("has dtype {dtype:?}; pixmim takes"));
        refused(attention(&x, 2), &format!("attention: `qkv` {says}"));
        refused(masked_mse_loss(&x, &x, true), &format!("masked_mse_loss: `pred` {says}"));
    }
    refused(attention(&x.get(0).unwrap(), 2), "unexpected rank");
    refused(attention(&normal(1, &[1, 1, 1, 1, 12]), 2), "unexpected rank");
    refused(attention(&x, 3), "D divisible by the 3 heads");
    refused(attention(&x, 0), "0 heads share 12 numbers");
    refused(attention(&x, usize::MAX), "heads share 12 numbers");
    refused(attention(&normal(1, &[0, 3, 12]), 2), "no dimension of size 0");

    let single = x.to_dtype(DType::F32).unwrap();
    refused(masked_mse_loss(&x, &single, true), "`target` has dtype F32, expected F64");
    refused(masked_mse_loss(&x, &normal(1, &[2, 12, 3]), true), "`target` has shape [2, 12, 3]");
    refused(masked_mse_loss(&x, &normal(1, &[1, 2, 3, 12, 1]), true), "unexpected rank");
    refused(masked_mse_loss(&normal(1, &[2, 3, 1]), &normal(2, &[2, 3, 1]), true), "two numbers");

    let filter = Filter::new(&pixmim::Device::cpu(), 6, 2.0).unwrap();
    let [mean, std] = MEAN_STD;
    let how = LowFreqTarget { filter: &filter, mean, std, patch_size: 2 };
    let (pixels, device) = (normal(1, &[1, 3, 6, 6]), Device::Cpu);
    let ids = |ids: &[i64]| Tensor::new(ids, &device).unwrap().unsqueeze(0).unwrap();
    refused(low_freq_target(&pixels, &ids(&[8, 9]), how), "holds the id 9, outside 0..9");
    refused(low_freq_target(&pixels, &ids(&[1 << 32]), how), "holds the id -1, outside 0..9");
    refused(low_freq_target(&pixels, &ids(&[]), how), "no dimension of size 0");
    let floats = ids(&[1]).to_dtype(DType::F32).unwrap();
    refused(low_freq_target(&pixels, &floats, how), "`ids_masked` has dtype F32, takes integers");
    refused(low_freq_target(&normal(1, &[1, 3, 8, 8]), &ids(&[1]), how), "is for 6 pixels");
    refused(low_freq_target(&normal(1, &[2, 3, 6, 6]), &ids(&[1]), how), "shape");
    refused(low_freq_target(&normal(1, &[3, 6, 6]), &ids(&[1]), how), "unexpected rank");
    for patch_size in [0, 4, 7, usize::MAX] {
        let how = LowFreqTarget { patch_size, ..how };
        refused(low_freq_target(&pixels, &ids(&[1]), how), "low_freq_target");
    }
}
