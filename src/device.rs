//! Where an op runs, and where its tensors are.

mod buffer;

use std::borrow::Cow;
use std::time::{Duration, Instant};

use half::bf16;
use half::slice::HalfFloatSliceExt;

pub use self::buffer::HostBuffer;
pub(crate) use self::buffer::HostMemory;
use crate::cuda::Gpu;
use crate::dtype::Element;
use crate::{DType, Error, Result, TensorMut, TensorRef};

/// A device. Closed on purpose: each op matches on it right under its contract.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Device {
    /// The machine's cores, through the current rayon thread pool.
    Cpu(Cpu),
    /// A GPU, or the host executor that stands in for one.
    Cuda(Gpu),
}

/// Whose memory a tensor is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The process's own.
    Host,
    /// That of the GPU with this number, given at its opening.
    Gpu(u32),
}

/// How the CPU computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// Precision of matrix products of f32 tensors. f64 tensors are always multiplied in f64.
    pub products: Products,
}

/// Precision in which f32 tensors are multiplied on the CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// f32 operands, f32 accumulation.
    #[default]
    F32,
    /// Operands rounded to bf16, products and sums in f32 (what PyTorch calls `medium` matmul precision).
    /// Twice as fast where the CPU has the AVX-512 BF16 instructions; see [`Products::bf16_is_fast`].
    Bf16,
}

impl Products {
    /// Whether this machine multiplies bf16 faster than f32.
    #[must_use]
    pub fn bf16_is_fast() -> bool {
        crate::cpu::gemm::bf16_is_native()
    }
}

/// An op, called on a device: what its checks judge by and name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<'a> {
    pub(crate) op: &'static str,
    pub(crate) dev: &'a Device,
}

impl Call<'_> {
    /// Refuses a tensor that is not where the op runs, or that vector loads on a GPU could not read.
    pub(crate) fn expect_place(
        self,
        arg: &'static str,
        place: Place,
        ptr: *const u8,
    ) -> Result<()> {
        let expected = self.dev.place();
        if place != expected {
            return Err(Error::Place { op: self.op, arg, expected, found: place });
        }
        if place != Place::Host && !ptr.addr().is_multiple_of(GPU_ALIGN_BYTES) {
            let why = format!(
                "starts at address {:#x}; on a GPU a tensor starts at a multiple of {GPU_ALIGN_BYTES}",
                ptr.addr()
            );
            return Err(Error::invalid(format!("{}: {arg}", self.op), why));
        }
        Ok(())
    }
}

/// Alignment that kernels rely on: the widest load.
const GPU_ALIGN_BYTES: usize = 16;

impl Device {
    /// The CPU with f32 products.
    #[must_use]
    pub fn cpu() -> Self {
        Self::Cpu(Cpu::default())
    }

    /// Where this device's tensors are.
    #[must_use]
    pub fn place(&self) -> Place {
        match self {
            Self::Cpu(_) => Place::Host,
            Self::Cuda(gpu) => gpu.place(),
        }
    }

    /// Copies numbers into a tensor of this device. `src` may be reused at once; on a GPU the copy is ordered before all work
    /// enqueued later.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`] or [`Error::Place`] unless the tensor fits; [`Error::Gpu`].
    pub fn upload<T: Element>(&self, dst: TensorMut<'_>, src: &[T]) -> Result<()> {
        let call = Call { op: "upload", dev: self };
        expect_elems(call, "dst", dst.elems(), src.len())?;
        dst.expect(call, "dst", T::DTYPE, dst.shape())?;
        let _span = self.span_of_bytes("upload", size_of_val(src));
        match self {
            Self::Cpu(_) => dst.into_slice::<T>().copy_from_slice(src),
            Self::Cuda(gpu) => gpu.driver().upload(dst.dev_ptr(), bytemuck::cast_slice(src))?,
        }
        Ok(())
    }

    /// As many zeros in the host's memory, for [`upload_buffer`](Self::upload_buffer): of a GPU page-locked, as far as that
    /// can be had. To lock pages takes time; keep the buffer.
    #[must_use]
    pub fn host_buffer(&self, bytes: usize) -> HostBuffer {
        let locked = match self {
            Self::Cpu(_) => None,
            Self::Cuda(gpu) => gpu.driver().lock_pages(bytes),
        };
        locked.map_or_else(|| HostBuffer::new(bytes), HostBuffer::of)
    }

    /// As [`upload`](Self::upload), of the bytes of a buffer. Those of this device's [`host_buffer`](Self::host_buffer) are
    /// not copied on the host: a GPU reads them by itself, beside earlier work, and whoever writes them waits for that.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn upload_buffer(&self, dst: TensorMut<'_>, src: &HostBuffer) -> Result<()> {
        let Self::Cuda(gpu) = self else { return self.upload::<u8>(dst, src) };
        let call = Call { op: "upload", dev: self };
        expect_elems(call, "dst", dst.elems(), src.len())?;
        dst.expect(call, "dst", DType::U8, dst.shape())?;
        let _span = self.span_of_bytes("upload", src.len());
        gpu.driver().upload_buffer(dst.dev_ptr(), src)
    }

    /// Copies numbers into a tensor of this device, over and over until it is full. They cross to a GPU once.
    ///
    /// # Errors
    /// As [`upload`](Self::upload); [`Error::Shape`] for no numbers.
    pub fn fill<T: Element>(&self, dst: TensorMut<'_>, src: &[T]) -> Result<()> {
        let (elems, count) = (dst.elems(), dst.elems().min(src.len()));
        if count == 0 && elems > 0 {
            let expected = "at least one element".into();
            return Err(Error::Shape { op: "fill", arg: "src", expected, found: vec![0] });
        }
        let (mut first, mut rest) = dst.reshaped(&[elems])?.split_at(count);
        self.upload(first.reborrow(), &src[..count])?;
        while rest.elems() > 0 {
            let count = count.min(rest.elems());
            let (part, others) = rest.split_at(count);
            self.copy(part, first.as_ref().split_at(count).0)?;
            rest = others;
        }
        Ok(())
    }

    /// The numbers of a tensor of this device: its own memory on the CPU, a copy of a GPU's after all work enqueued so far.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn read<'a, T: Element>(&self, src: TensorRef<'a>) -> Result<Cow<'a, [T]>> {
        let call = Call { op: "read", dev: self };
        src.expect(call, "src", T::DTYPE, src.shape())?;
        match self {
            Self::Cpu(_) => Ok(Cow::Borrowed(src.as_slice())),
            Self::Cuda(gpu) => {
                let _span = self.span_of_bytes("read", src.bytes());
                let mut dst = vec![T::zeroed(); src.elems()];
                gpu.driver().download(bytemuck::cast_slice_mut(&mut dst), src.dev_ptr())?;
                Ok(Cow::Owned(dst))
            }
        }
    }

    /// As [`read`](Self::read), always a copy.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn download<T: Element>(&self, src: TensorRef<'_>) -> Result<Vec<T>> {
        self.read(src).map(Cow::into_owned)
    }

    /// As [`read`](Self::read), of f32 or of bf16 widened to it.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn read_f32<'a>(&self, src: TensorRef<'a>) -> Result<Cow<'a, [f32]>> {
        match src.dtype() {
            DType::Bf16 => Ok(Cow::Owned(self.read::<bf16>(src)?.to_f32_vec())),
            _ => self.read(src),
        }
    }

    /// As [`read`](Self::read), one real number, widened.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn scalar(&self, src: TensorRef<'_>) -> Result<f64> {
        expect_elems(Call { op: "scalar", dev: self }, "src", src.elems(), 1)?;
        match src.dtype() {
            DType::F64 => Ok(self.read::<f64>(src)?[0]),
            _ => Ok(f64::from(self.read::<f32>(src)?[0])),
        }
    }

    /// Copies a tensor into another of the same dtype and shape. Each is of this device, or in the host's memory: as
    /// [`upload`](Self::upload) and [`read`](Self::read) if one of them is.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn copy(&self, dst: TensorMut<'_>, src: TensorRef<'_>) -> Result<()> {
        let host = Self::cpu();
        let at = |place| Call { op: "copy", dev: if place == Place::Host { &host } else { self } };
        src.expect(at(src.place()), "src", src.dtype(), src.shape())?;
        dst.expect(at(dst.place()), "dst", src.dtype(), src.shape())?;
        let _span = match (self, dst.place(), src.place()) {
            (Self::Cuda(_), Place::Gpu(_), Place::Host) => {
                self.span_of_bytes("upload", src.bytes())
            }
            (Self::Cuda(_), Place::Host, Place::Gpu(_)) => self.span_of_bytes("read", src.bytes()),
            _ => self.span_of_bytes("copy", 2 * src.bytes()),
        };
        match self {
            Self::Cuda(gpu) => match (dst.place(), src.place()) {
                (Place::Host, Place::Host) => dst.copy_host(src),
                (Place::Gpu(_), Place::Host) => {
                    gpu.driver().upload(dst.dev_ptr(), src.into_bytes().as_slice())?;
                }
                (Place::Host, Place::Gpu(_)) => {
                    gpu.driver().download(dst.into_bytes().into_slice(), src.dev_ptr())?;
                }
                (Place::Gpu(_), Place::Gpu(_)) => {
                    gpu.driver().copy(dst.dev_ptr(), src.dev_ptr(), src.bytes())?;
                }
            },
            Self::Cpu(_) => dst.copy_host(src),
        }
        Ok(())
    }

    /// How long work takes: by a GPU's own clock, as [`Gpu::time`] says, or wall time on the CPU.
    ///
    /// # Errors
    /// As [`Gpu::time`].
    pub fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        match self {
            Self::Cuda(gpu) => gpu.time(work),
            Self::Cpu(_) => {
                let start = Instant::now();
                work().map(|()| start.elapsed())
            }
        }
    }

    /// Sets every byte to zero, which is the number 0 in every dtype.
    ///
    /// # Errors
    /// [`Error::Place`], [`Error::Gpu`].
    pub fn clear(&self, dst: TensorMut<'_>) -> Result<()> {
        dst.expect(Call { op: "clear", dev: self }, "dst", dst.dtype(), dst.shape())?;
        let _span = self.span_of_bytes("clear", dst.bytes());
        match self {
            Self::Cpu(_) => dst.clear_host(),
            Self::Cuda(gpu) => gpu.driver().clear(dst.dev_ptr(), dst.bytes())?,
        }
        Ok(())
    }
}

fn expect_elems(call: Call<'_>, arg: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let expected = format!("{expected} elements in all");
    Err(Error::Shape { op: call.op, arg, expected, found: vec![found] })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tensor;

    #[test]
    fn numbers_are_repeated_until_the_tensor_is_full() {
        let dev = Device::cpu();
        let mut tensor = Tensor::new(&dev, DType::I32, &[2, 4]).unwrap();
        dev.fill(tensor.view_mut(), &[1i32, 2, 3]).unwrap();
        assert_eq!(tensor.slice::<i32>(0..8), [1, 2, 3, 1, 2, 3, 1, 2]);
        dev.fill(tensor.view_mut(), &[9i32; 20]).unwrap();
        assert_eq!(tensor.slice::<i32>(0..8), [9; 8], "more numbers than there is room for");
        let refused = dev.fill(tensor.view_mut(), &[0i32; 0]).unwrap_err();
        assert!(refused.to_string().contains("at least one element"), "{refused}");
        dev.fill(Tensor::new(&dev, DType::I32, &[0]).unwrap().view_mut(), &[0i32; 0]).unwrap();
    }
}
