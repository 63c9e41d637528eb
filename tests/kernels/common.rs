//! What the tests of the kernels share: the devices, inputs and guarded outputs on them, comparisons.

use std::sync::OnceLock;

use half::bf16;
use pixmim::cuda::SimtOptions;
use pixmim::dtype::Element;
use pixmim::rng::{Purpose, Stream};
use pixmim::{DType, Device, Gpu, Tensor, TensorMut, TensorRef};

#[path = "../shared/masks.rs"]
mod masks;
pub(crate) use masks::masks;

/// Whether the tests were asked to run on a real GPU.
pub(crate) fn is_real() -> bool {
    std::env::var("PIXMIM_TEST_DEVICE").is_ok_and(|name| name == "cuda")
}

fn simt(seed: u32) -> Device {
    Device::Cuda(Gpu::simt(SimtOptions { seed, ..SimtOptions::default() }).unwrap())
}

/// The real GPU. All tests share it, as each opening loads all kernels.
fn nvidia() -> Device {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    Device::Cuda(GPU.get_or_init(|| Gpu::nvidia(0).unwrap()).clone())
}

/// The device under test.
pub(crate) fn gpu() -> Device {
    if is_real() { nvidia() } else { simt(0) }
}

/// Three schedules of the device under test: on the executor three orders of blocks, warps and lanes; on a real GPU,
/// whose order nobody chooses, three runs.
pub(crate) fn schedules() -> [Device; 3] {
    [0, 1, 7].map(|seed| if is_real() { nvidia() } else { simt(seed) })
}

/// Runs under three schedules, the first of them twice, and asserts that no bit of the result changes.
#[track_caller]
pub(crate) fn same_on_any_schedule<T: Element>(run: impl Fn(&Device) -> Vec<T>) -> Vec<T> {
    let devices = schedules();
    let first = run(&devices[0]);
    let bytes = |result: &[T]| bytemuck::cast_slice::<T, u8>(result).to_vec();
    for (at, dev) in [0, 1, 2].into_iter().zip(&devices) {
        assert!(bytes(&run(dev)) == bytes(&first), "other bits under schedule {at}");
    }
    first
}

/// f32 or bf16: what a GPU stores.
pub(crate) trait Stored: Element {
    fn round(x: f64) -> Self;
    fn f64(self) -> f64;
}

impl Stored for f32 {
    fn round(x: f64) -> Self {
        x as f32
    }
    fn f64(self) -> f64 {
        f64::from(self)
    }
}

impl Stored for bf16 {
    fn round(x: f64) -> Self {
        // Through f32, as everything computed is.
        bf16::from_f32(x as f32)
    }
    fn f64(self) -> f64 {
        bf16::to_f64(self)
    }
}

fn stream(seed: u64) -> Stream {
    Stream::new(0x0D15_EA5E, 0, seed, Purpose::Init)
}

/// Numbers in [-1, 1), rounded to `T`.
pub(crate) fn uniform<T: Stored>(seed: u64, elems: usize) -> Vec<T> {
    let stream = stream(seed);
    (0..elems as u32).map(|i| T::round(2.0 * stream.uniform(i) - 1.0)).collect()
}

/// `mean` plus `std` times standard normal numbers, rounded to `T`.
pub(crate) fn normal<T: Stored>(seed: u64, elems: usize, mean: f64, std: f64) -> Vec<T> {
    let stream = stream(seed);
    (0..elems as u32).map(|i| T::round(mean + std * stream.normal(i))).collect()
}

pub(crate) fn widen<T: Stored>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.f64()).collect()
}

/// A tensor of the device to read, in an allocation of its own.
pub(crate) struct Input(Tensor);

impl Input {
    pub(crate) fn new<T: Element>(dev: &Device, values: &[T], shape: &[usize]) -> Self {
        let mut tensor = Tensor::new(dev, T::DTYPE, shape).unwrap();
        dev.upload(tensor.view_mut(), values).unwrap();
        Self(tensor)
    }

    pub(crate) fn view(&self) -> TensorRef<'_> {
        self.0.view()
    }
}

/// Bytes of a guard zone on either side of an output: a multiple of every alignment that kernels ask for.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xa5;
/// A float whose bits are all set is NaN, an integer is -1.
const POISON_BYTE: u8 = 0xff;

/// A tensor of the device to write. On a real GPU it lies between guard zones; on the executor it has an allocation of
/// exactly its bytes, which the executor guards itself, and what nothing has written it refuses to copy out.
pub(crate) struct Output {
    dev: Device,
    memory: Tensor,
    shape: Vec<usize>,
    dtype: DType,
}

impl Output {
    /// Holds NaN, or -1 for integers; on the executor, nothing that may be read.
    pub(crate) fn new(dev: &Device, dtype: DType, shape: &[usize]) -> Self {
        if !is_real() {
            let memory = Tensor::new(dev, dtype, shape).unwrap();
            return Self { dev: dev.clone(), memory, shape: shape.to_vec(), dtype };
        }
        let bytes = shape.iter().product::<usize>() * dtype.size_bytes();
        Self::between_guards(dev, dtype, shape, &vec![POISON_BYTE; bytes])
    }

    /// Holds these numbers, to be added to.
    pub(crate) fn holding<T: Element>(dev: &Device, values: &[T], shape: &[usize]) -> Self {
        if !is_real() {
            let mut output = Self::new(dev, T::DTYPE, shape);
            dev.upload(output.memory.view_mut(), values).unwrap();
            return output;
        }
        Self::between_guards(dev, T::DTYPE, shape, bytemuck::cast_slice(values))
    }

    fn between_guards(dev: &Device, dtype: DType, shape: &[usize], values: &[u8]) -> Self {
        let zone = [GUARD_BYTE; GUARD];
        // The end of the zone behind starts right after the last byte, wherever that is.
        let bytes = [&zone[..], values, &zone[..]].concat();
        let mut memory = Tensor::new(dev, DType::U8, &[bytes.len()]).unwrap();
        dev.upload(memory.view_mut(), &bytes).unwrap();
        Self { dev: dev.clone(), memory, shape: shape.to_vec(), dtype }
    }

    pub(crate) fn view(&mut self) -> TensorMut<'_> {
        if !is_real() {
            return self.memory.view_mut();
        }
        let (_, rest) = self.memory.view_mut().split_at(GUARD);
        let elems = self.shape.iter().product();
        rest.carve_tensor(self.dtype, elems).0.reshaped(&self.shape).unwrap()
    }

    pub(crate) fn as_ref(&mut self) -> TensorRef<'_> {
        let view = self.view();
        // The borrow of `view` ends here, that of `self` goes on.
        view.into_ref()
    }

    /// What the tensor holds, once both guard zones are seen to be intact.
    #[track_caller]
    pub(crate) fn values<T: Element>(&self) -> Vec<T> {
        assert_eq!(self.dtype, T::DTYPE);
        if !is_real() {
            return self.dev.download(self.memory.view()).unwrap();
        }
        let bytes: Vec<u8> = self.dev.download(self.memory.view()).unwrap();
        let (before, rest) = bytes.split_at(GUARD);
        let (values, after) = rest.split_at(rest.len() - GUARD);
        for zone in [before, after] {
            assert!(zone.iter().all(|&b| b == GUARD_BYTE), "wrote outside {:?}", self.shape);
        }
        values.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }
}

/// A workspace of exactly this many bytes.
pub(crate) fn workspace(dev: &Device, bytes: usize) -> Output {
    Output::new(dev, DType::U8, &[bytes])
}

/// Euclidean norm.
fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// Asserts that a result is as near to the exact one as twice the error of the formula written down naively in the
/// same precision: over the whole tensor, and in each row of `width` numbers. A row in which the naive formula happens to be
/// lucky is measured by its error in rows on average. `floor` is the relative error that is always allowed: what one rounding
/// to the stored precision may do.
#[track_caller]
pub(crate) fn close_as_naive(
    name: &str,
    got: &[f64],
    naive: &[f64],
    exact: &[f64],
    width: usize,
    floor: f64,
) {
    assert_eq!((got.len(), naive.len()), (exact.len(), exact.len()), "{name}: number of elements");
    assert_eq!(exact.len() % width, 0, "{name}: whole rows");
    let off = |a: &[f64], b: &[f64]| norm(a.iter().zip(b).map(|(a, b)| a - b));
    let all = norm(exact.iter().copied());
    let naive_off = off(naive, exact);
    assert!(naive_off.is_finite(), "{name}: the naive formula has no result");
    let (err, tol) = (off(got, exact), 2.0 * naive_off + floor * all);
    assert!(err <= tol, "{name}: off by {err:e} > {tol:e} (naive: {naive_off:e}, norm {all:e})");
    let rows = (exact.len() / width) as f64;
    let usual = naive_off / rows.sqrt();
    let chunks = got.chunks_exact(width).zip(naive.chunks_exact(width));
    for (row, ((got, naive), exact)) in chunks.zip(exact.chunks_exact(width)).enumerate() {
        let size = norm(exact.iter().copied());
        let (err, tol) = (off(got, exact), 2.0 * off(naive, exact).max(usual) + floor * size);
        assert!(err <= tol, "{name}, row {row}: off by {err:e} > {tol:e} (norm {size:e})");
    }
}

/// Relative error of one rounding to `T`.
pub(crate) fn unit_roundoff<T: Stored>() -> f64 {
    match T::DTYPE {
        DType::Bf16 => 2f64.powi(-8),
        _ => 2f64.powi(-24),
    }
}

mod tests {
    use super::*;

    #[test]
    fn a_tensor_goes_to_the_device_and_back() {
        let dev = gpu();
        let values: Vec<f32> = normal(1, 37, 0.5, 2.0);
        let input = Input::new(&dev, &values, &[37]);
        assert_eq!(dev.download::<f32>(input.view()).unwrap(), values);
        let mut output = Output::holding(&dev, &values, &[37]);
        dev.clear(output.view()).unwrap();
        assert_eq!(output.values::<f32>(), [0.0; 37]);
    }

    #[test]
    fn what_nothing_wrote_is_not_copied_out() {
        let dev = gpu();
        let output = Output::new(&dev, DType::F32, &[5]);
        if is_real() {
            assert!(output.values::<f32>().iter().all(|x| x.is_nan()));
        } else {
            assert!(dev.download::<f32>(output.memory.view()).is_err());
        }
    }

    #[test]
    fn closeness_is_judged_by_row_and_refuses_nan() {
        let fails = |got: Vec<f64>| {
            let (naive, exact) = (vec![1.001; 300], vec![1.0; 300]);
            let check = move || close_as_naive("test", &got, &naive, &exact, 3, 0.0);
            std::panic::catch_unwind(check).is_err()
        };
        let with = |value: f64| {
            let mut got = vec![1.0; 300];
            got[77] = value;
            got
        };
        assert!(!fails(with(1.002)));
        assert!(fails(with(1.004)) && fails(with(f64::NAN)));
    }
}
