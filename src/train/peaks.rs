//! What a device reaches now, in a copy and in a product of large square matrices: what rates are measured against, as
//! clocks differ from machine to machine and from hour to hour.
//!
//! On random numbers: a GPU multiplies zeros a tenth faster, as they cost less power.

use std::time::Duration;

use half::bf16;
use rayon::prelude::*;

use crate::dtype::Element;
use crate::ops::cost::{self, Cost, Peaks};
use crate::ops::linear::{self, Epilogue, Forward};
use crate::rng::{Purpose, Stream};
use crate::{DType, Device, Error, Result, Tensor};

/// The fastest of a few runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fastest {
    /// Bytes of the copy, or side of the matrices.
    pub size: usize,
    /// Its useful work.
    pub cost: Cost,
    /// Its time.
    pub took: Duration,
}

impl Fastest {
    /// Bytes in a second.
    #[must_use]
    pub fn bytes_per_second(&self) -> f64 {
        self.cost.bytes as f64 / self.took.as_secs_f64()
    }

    /// Operations in a second.
    #[must_use]
    pub fn flops_per_second(&self) -> f64 {
        self.cost.flops as f64 / self.took.as_secs_f64()
    }
}

/// Runs before those that count (they plan the product, load kernels and raise clocks), and those that do.
const RUNS_ON_CPU: (usize, usize) = (1, 3);
const RUNS_ON_GPU: (usize, usize) = (3, 10);

/// Both peaks of a device, for work whose tensors are of this dtype: [`copy`] and [`product`]. Takes less than a second and
/// up to 2 GiB, which it gives back.
///
/// # Errors
/// As [`copy`] and [`product`].
pub fn measure(dev: &Device, dtype: DType) -> Result<Peaks> {
    let (copy, product) = (copy(dev)?, product(dev, dtype)?);
    Ok(Peaks {
        bytes_per_second: copy.bytes_per_second(),
        flops_per_second: product.flops_per_second(),
    })
}

/// A copy within the device's memory, of more than a cache holds: 1 GiB on a GPU; on the CPU 256 MiB, by all threads of
/// the current rayon pool. On the host executor, whose times mean nothing, 1 MiB.
///
/// # Errors
/// [`Error::OutOfMemory`], [`Error::Gpu`].
pub fn copy(dev: &Device) -> Result<Fastest> {
    let bytes = match dev {
        Device::Cuda(gpu) if gpu.properties().executor => 1 << 20,
        Device::Cuda(_) => 1 << 30,
        Device::Cpu(_) => 256 << 20,
    };
    let inp = random(dev, &[bytes], |word| word as u8)?;
    let mut out = Tensor::new(dev, DType::U8, &[bytes])?;
    let took = fastest(dev, || match dev {
        Device::Cuda(_) => dev.copy(out.view_mut(), inp.view()),
        // One thread does not saturate the memory.
        Device::Cpu(_) => {
            const PART: usize = 1 << 20;
            let (out, inp) = (out.view_mut().into_slice::<u8>(), inp.view().as_slice::<u8>());
            let parts = out.par_chunks_mut(PART).zip(inp.par_chunks(PART));
            parts.for_each(|(out, inp)| out.copy_from_slice(inp));
            Ok(())
        }
    })?;
    Ok(Fastest { size: bytes, cost: cost::cast_forward([DType::U8; 2], bytes), took })
}

/// A product of square matrices of this dtype, large enough that a larger one is hardly faster: 8192 on a GPU; on the
/// CPU, which multiplies as the device says, from 1024 on, by all threads of the current rayon pool. On the host
/// executor, whose times mean nothing, 64.
///
/// # Errors
/// [`Error::DType`] for a dtype without products; [`Error::OutOfMemory`], [`Error::Gpu`].
pub fn product(dev: &Device, dtype: DType) -> Result<Fastest> {
    let side = match dev {
        Device::Cuda(gpu) if gpu.properties().executor => 64,
        Device::Cuda(_) => 8192,
        // So that each thread has as large a part on any number of them.
        Device::Cpu(_) => {
            512 * ((rayon::current_num_threads() as f64).sqrt().ceil() as usize).max(2)
        }
    };
    let square = || {
        // Uniform on [-1, 1).
        let real = |word: u32| f64::from(word.cast_signed()) / (1u64 << 31) as f64;
        match dtype {
            DType::F64 => random(dev, &[side, side], real),
            DType::F32 => random(dev, &[side, side], |word| real(word) as f32),
            DType::Bf16 => random(dev, &[side, side], |word| bf16::from_f64(real(word))),
            found => Err(Error::DType {
                op: "product",
                arg: "dtype",
                expected: "F64, F32 or Bf16".into(),
                found,
            }),
        }
    };
    let (inp, weight) = (square()?, square()?);
    let mut bias = Tensor::new(dev, dtype, &[side])?;
    dev.clear(bias.view_mut())?;
    let mut out = Tensor::new(dev, dtype, &[side, side])?;
    let took = fastest(dev, || {
        linear::forward(
            dev,
            Forward {
                out: out.view_mut(),
                inp: inp.view(),
                weight: weight.view(),
                bias: bias.view(),
                epilogue: Epilogue::None,
            },
        )
    })?;
    Ok(Fastest { size: side, cost: cost::linear_forward(dtype, [side; 3], false), took })
}

fn fastest(dev: &Device, mut run: impl FnMut() -> Result<()>) -> Result<Duration> {
    let (warm_up, runs) = match dev {
        Device::Cpu(_) => RUNS_ON_CPU,
        Device::Cuda(_) => RUNS_ON_GPU,
    };
    (0..warm_up).try_for_each(|_| run())?;
    let mut times = (0..runs).map(|_| dev.time(&mut run));
    times.try_fold(Duration::MAX, |least, took| Ok(least.min(took?)))
}

/// A tensor of random numbers, every million of them the same.
fn random<T: Element>(dev: &Device, shape: &[usize], number: impl Fn(u32) -> T) -> Result<Tensor> {
    const DRAWN: usize = 1 << 20;
    let mut tensor = Tensor::new(dev, T::DTYPE, shape)?;
    let elems = tensor.view().elems();
    let stream = Stream::new(0, 0, 0, Purpose::Init);
    let drawn: Vec<T> = (0..DRAWN.min(elems) as u32).map(|i| number(stream.word(i))).collect();
    dev.fill(tensor.view_mut(), &drawn)?;
    Ok(tensor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_is_work_over_its_time() {
        let cost = Cost { bytes: 600, flops: 9000 };
        let fastest = Fastest { size: 3, cost, took: Duration::from_millis(250) };
        assert_eq!(fastest.bytes_per_second(), 2400.0);
        assert_eq!(fastest.flops_per_second(), 36_000.0);
    }

    #[test]
    fn a_product_is_of_square_matrices_of_numbers() {
        let found = product(&Device::cpu(), DType::F32).unwrap();
        assert_eq!(found.cost.flops, 2 * (found.size as u64).pow(3));
        assert!(found.size >= 1024 && found.took > Duration::ZERO);
        let refused = product(&Device::cpu(), DType::U8).unwrap_err();
        assert!(refused.to_string().contains("F64, F32 or Bf16"), "{refused}");
    }

    #[cfg(pixmim_simt)]
    #[test]
    fn on_the_executor_both_are_tiny() {
        let gpu = crate::Gpu::simt(crate::cuda::SimtOptions::default()).unwrap();
        let dev = Device::Cuda(gpu);
        let (copy, product) = (copy(&dev).unwrap(), product(&dev, DType::Bf16).unwrap());
        assert_eq!([copy.size, product.size], [1 << 20, 64]);
        let peaks = measure(&dev, DType::Bf16).unwrap();
        assert!(peaks.bytes_per_second > 0.0 && peaks.flops_per_second > 0.0);
    }

    #[test]
    fn random_numbers_fill_the_tensor_and_repeat_after_a_million() {
        let dev = Device::cpu();
        let tensor = random(&dev, &[3, 1 << 19], u32::cast_signed).unwrap();
        let numbers = tensor.slice::<i32>(0..3 << 19);
        assert_eq!(numbers[..1 << 19], numbers[2 << 19..]);
        assert_ne!(numbers[..1 << 19], numbers[1 << 19..2 << 19]);
    }
}
