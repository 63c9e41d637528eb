//! Epilogues of products on the stand-ins, which refuse descriptors that do not fit.

use super::*;
use crate::cuda::driver::Epilogues;

const BF16: Case = Case { dtypes: (DType::Bf16, DType::Bf16), ..CASE };
const TO_F32: Case = Case { dtypes: (DType::Bf16, DType::F32), ..CASE };

/// GELU's tanh form and its slope.
fn gelu(x: f32) -> [f32; 2] {
    let (x, scale) = (f64::from(x), (2.0 / std::f64::consts::PI).sqrt());
    let tanh = (scale * (x + 0.044715 * x.powi(3))).tanh();
    let slope = scale * (1.0 + 3.0 * 0.044715 * x * x) * (1.0 - tanh * tanh);
    [0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh + x * slope)].map(|y| y as f32)
}

/// Memory whose first byte is a multiple of 16 and of no more: what is promised of an epilogue's address.
fn barely_aligned(gpu: &Nvidia, src: &[u8]) -> (DevPtr, DevPtr) {
    let whole = upload(gpu, &[&[0; 16], src].concat());
    (whole, whole.offset(16))
}

fn products_with_epilogues_are_right(gpu: &Nvidia) {
    for flags in 0..4 {
        let transposed = (flags & 1 != 0, flags & 2 != 0);

        // One product each: sums of more would leave the range in which GELU is neither 0 nor its input.
        let mut problem = product(gpu, Case { k: 1, transposed, bias: true, ..BF16 });
        let inputs = problem.expected.clone();
        let (memory, pre) = barely_aligned(gpu, &bytes(&[9.0; 24], DType::Bf16));
        problem.memories.push(memory);
        problem.matmul.epilogue = Epilogue::Gelu(pre);
        problem.expected.iter_mut().for_each(|(_, x)| *x = gelu(*x)[0]);
        gpu.matmul(&problem.matmul).unwrap();
        problem.check(gpu);
        let kept = floats(&download(gpu, pre, 48), DType::Bf16);
        for (at, x) in inputs {
            assert!((kept[at] - x).abs() <= x.abs() / 256.0, "{at}: {} for {x}", kept[at]);
        }
        // Between rows nothing is written: 3 rows of 5 are 8 apart.
        assert_eq!(kept[5..8], [9.0; 3]);
        problem.memories.iter().for_each(|memory| gpu.free(*memory));

        let mut problem = product(gpu, Case { transposed, ..BF16 });
        let pre_values = numbers(24, 11);
        let (memory, pre) = barely_aligned(gpu, &bytes(&pre_values, DType::Bf16));
        problem.memories.push(memory);
        problem.matmul.epilogue = Epilogue::GeluSlope(pre);
        problem.expected.iter_mut().for_each(|(at, x)| *x *= gelu(pre_values[*at])[1]);
        gpu.matmul(&problem.matmul).unwrap();
        problem.check(gpu);
        problem.memories.iter().for_each(|memory| gpu.free(*memory));

        for case in [CASE, TO_F32] {
            let mut problem = product(gpu, Case { transposed, add: 1, ..case });
            let (memory, sums) = barely_aligned(gpu, &[0x55; 4 * 4]);
            problem.memories.push(memory);
            problem.matmul.epilogue = Epilogue::RowSums(sums);
            let Matrix { ptr, dtype, row_stride, transposed, .. } = problem.matmul.a;
            let (rows, cols) = if transposed { (7, 3) } else { (3, 7) };
            let count = (rows - 1) * row_stride + cols;
            let a = floats(&download(gpu, ptr, count * dtype.size_bytes()), dtype);
            let at = |row, k| if transposed { k * row_stride + row } else { row * row_stride + k };
            let expected = [0, 1, 2].map(|row| (0..7).map(|k| a[at(row, k)]).sum::<f32>());
            assert!(gpu.offers(&problem.matmul).unwrap());
            // In timed planning the result is added to scratch, and to the result once.
            gpu.matmul(&problem.matmul).unwrap();
            problem.check(gpu);
            let found = download(gpu, sums, 16);
            assert_eq!(floats(&found[..12], DType::F32), expected);
            assert_eq!(found[12..], [0x55; 4], "as many sums as there are rows");
            problem.memories.iter().for_each(|memory| gpu.free(*memory));
        }
    }
}

#[test]
fn epilogues_do_what_the_seam_says() {
    let test = "epilogues::epilogues_do_what_the_seam_says";
    let Some(gpu) = on_fake(test, &[]) else { return };
    assert_eq!(gpu.epilogues(), Epilogues::default());
    products_with_epilogues_are_right(&gpu);
}

#[test]
fn epilogues_are_timed_like_all_products() {
    let test = "epilogues::epilogues_are_timed_like_all_products";
    let variables = [("PIXMIM_MATMUL", "timed"), ("PIXMIM_EPILOGUES", "gelu,bias")];
    let Some(gpu) = on_fake(test, &variables) else { return };
    assert_eq!(gpu.epilogues(), Epilogues { gelu: true, bias: true });
    products_with_epilogues_are_right(&gpu);
    assert!(algorithms(&gpu.plans()).iter().all(|algorithm| *algorithm == 2));
}

#[test]
fn a_switch_that_there_is_not_is_refused() {
    let test = "epilogues::a_switch_that_there_is_not_is_refused";
    let Some(refused) = start_on_fake(test, &[("PIXMIM_EPILOGUES", "bias,relu")]) else { return };
    let error = refused.unwrap_err().to_string();
    assert!(error.starts_with("`PIXMIM_EPILOGUES` is `bias,relu`; `gelu`, `bias` or"), "{error}");
}

#[test]
fn without_an_algorithm_sums_are_not_offered_and_gelu_is_an_error() {
    let test = "epilogues::without_an_algorithm_sums_are_not_offered_and_gelu_is_an_error";
    let variables = [("FAKE_NO_EPILOGUES", "1"), ("PIXMIM_EPILOGUES", "bias")];
    let Some(gpu) = on_fake(test, &variables) else { return };
    assert_eq!(gpu.epilogues(), Epilogues { gelu: false, bias: true });
    let with = |case, epilogue| {
        let mut problem = product(&gpu, case);
        problem.matmul.epilogue = epilogue;
        problem
    };
    let pre = upload(&gpu, &[0; 48]);
    let gelu = with(Case { bias: true, ..BF16 }, Epilogue::Gelu(pre));
    let slope = with(BF16, Epilogue::GeluSlope(pre));
    for problem in [&gelu, &slope] {
        let error = gpu.matmul(&problem.matmul).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }));
        let error = error.to_string();
        assert!(error.starts_with("`PIXMIM_EPILOGUES` asks for `gelu`, and (3, 7)"), "{error}");
    }
    let sums = with(TO_F32, Epilogue::RowSums(pre));
    assert!(!gpu.offers(&sums.matmul).unwrap());
    assert!(!gpu.offers(&sums.matmul).unwrap());
    assert!(gpu.matmul(&sums.matmul).unwrap_err().to_string().contains("no algorithm"));
    // Known while it is being recorded, too.
    gpu.begin_capture().unwrap();
    assert!(!gpu.offers(&sums.matmul).unwrap());
    gpu.end_capture().unwrap();
    let found = probe::find().unwrap();
    let other = Nvidia::start(&found, 0, &[("fake", b"image")]).unwrap();
    assert_eq!(other.load_plans(&gpu.plans()), Ok(1));
    assert_eq!(other.plans(), gpu.plans(), "what is not there is remembered");
    let all = [gelu, slope, sums].into_iter().flat_map(|problem| problem.memories);
    all.chain([pre]).for_each(|memory| gpu.free(memory));
}

#[test]
fn sums_that_an_earlier_run_did_without_stay_without() {
    let test = "epilogues::sums_that_an_earlier_run_did_without_stay_without";
    let Some(gpu) = on_fake(test, &[("PIXMIM_EPILOGUES", "bias")]) else { return };
    let mut problem = product(&gpu, TO_F32);
    let sums = upload(&gpu, &[0; 16]);
    problem.matmul.epilogue = Epilogue::RowSums(sums);
    assert!(gpu.offers(&problem.matmul).unwrap());
    let mut plans = gpu.plans();
    // Arithmetic is the last word of a plan; all ones say that there was no algorithm.
    let last = plans.len() - 8;
    plans[last..].fill(0xFF);
    let found = probe::find().unwrap();
    let other = Nvidia::start(&found, 0, &[("fake", b"image")]).unwrap();
    assert_eq!(other.load_plans(&plans), Ok(1));
    assert!(!other.offers(&problem.matmul).unwrap());
    problem.memories.iter().chain([&sums]).for_each(|memory| gpu.free(*memory));
}
