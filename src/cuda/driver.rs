//! The seam beneath every launch: what a GPU does for us, and nothing else.
//!
//! Two implementations: `nvidia` (the CUDA driver and cublasLt, loaded at run time) and `simt` (the host executor, which
//! runs the same kernels compiled for the CPU). All work of a driver goes to one stream, in order.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::device::{HostBuffer, HostMemory};
use crate::{DType, Result};

/// An address in a GPU's memory. Eight bytes in a kernel's parameters; 0 is "none".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct DevPtr(pub u64);

impl DevPtr {
    /// The address `bytes` further on.
    #[must_use]
    pub const fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// What a launch may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// The device in words: "NVIDIA H200", "host executor".
    pub name: String,
    /// Streaming multiprocessors, which sizes the grids of persistent kernels.
    pub multiprocessors: u32,
    /// Most dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Memory in all, in bytes.
    pub memory_bytes: u64,
    /// Whether it is the host executor, whose times mean nothing.
    pub executor: bool,
}

/// One launch: a grid of blocks in one dimension.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch<'a> {
    /// Entry name, as in `KERNEL(name, ..)`.
    pub(crate) kernel: &'static str,
    /// Blocks.
    pub(crate) grid: u32,
    /// Threads of a block.
    pub(crate) block: u32,
    /// Dynamic shared memory, in bytes.
    pub(crate) shared_bytes: u32,
    /// The kernel's one parameter, a struct by value.
    pub(crate) params: &'a [u8],
}

/// A matrix in row-major order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    /// First element.
    pub(crate) ptr: DevPtr,
    /// F32 or Bf16.
    pub(crate) dtype: DType,
    /// Elements from a row to the next.
    pub(crate) row_stride: usize,
    /// Elements from one matrix of a batch to the next; 0: all share it.
    pub(crate) batch_stride: usize,
    /// Whether the product takes its transpose. Never for the result.
    pub(crate) transposed: bool,
}

/// `out (m, n) = epilogue(a (m, k) b (k, n) + bias (n) + add (m, n))`, products and sums in f32; real f32, never TF32, when
/// `a` and `b` are f32. `a` and `b` have one dtype.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matmul {
    /// Rows of the result.
    pub(crate) m: usize,
    /// Columns of the result.
    pub(crate) n: usize,
    /// Products summed in each element.
    pub(crate) k: usize,
    /// Matrices multiplied, one after another in memory.
    pub(crate) batch: usize,
    /// Left factor: `(m, k)`, or `(k, m)` if transposed.
    pub(crate) a: Matrix,
    /// Right factor: `(k, n)`, or `(n, k)` if transposed.
    pub(crate) b: Matrix,
    /// Result. Overwritten.
    pub(crate) out: Matrix,
    /// A row added to every row, in `out`'s dtype.
    pub(crate) bias: Option<DevPtr>,
    /// A matrix laid out as `out`, added; `out` itself to accumulate.
    pub(crate) add: Option<DevPtr>,
    /// What is done in the same call.
    pub(crate) epilogue: Epilogue,
}

/// What saves a pass over the result, or over a factor. GELU is in its tanh form, and computed in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// Nothing.
    None,
    /// GELU of the product and its bias. They are kept here, rounded: a matrix laid out as `out`.
    Gelu(DevPtr),
    /// The product times the slope of GELU at this matrix, laid out as `out`.
    GeluSlope(DevPtr),
    /// The sum of each row of `a (m, k)` as it is multiplied, in f32: `(m)`. Overwritten.
    RowSums(DevPtr),
}

impl Matmul {
    /// Why no driver takes this epilogue with this product: the limits are those of cublasLt's manual.
    pub(crate) fn check_epilogue(&self) -> Result<(), String> {
        let &Self { batch, out, bias, add, epilogue, .. } = self;
        let (ptr, goes_with) = match epilogue {
            Epilogue::None => return Ok(()),
            Epilogue::Gelu(pre) => (pre, bias.is_some() && add.is_none()),
            Epilogue::GeluSlope(pre) => (pre, bias.is_none() && add.is_none()),
            Epilogue::RowSums(sums) => (sums, bias.is_none()),
        };
        let dtype = match epilogue {
            Epilogue::RowSums(_) => DType::F32,
            _ => DType::Bf16,
        };
        if !goes_with || batch != 1 || out.dtype != dtype {
            return Err(format!("{epilogue:?} goes with no such bias, sum, batch or dtype"));
        }
        if ptr == DevPtr(0) || !ptr.0.is_multiple_of(16) {
            return Err("the address of the epilogue's tensor is not a multiple of 16".into());
        }
        if dtype == DType::Bf16 && !out.row_stride.is_multiple_of(8) {
            let width = out.row_stride;
            return Err(format!(
                "GELU in a product needs rows of a multiple of 8, not of {width}; leave `gelu` out of PIXMIM_EPILOGUES"
            ));
        }
        Ok(())
    }
}

/// Which epilogues of products take the place of passes of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Epilogues {
    /// GELU and its slope where tensors are bf16, in the tanh form, which is up to 4.8e-4 off the exact one. In f32 they
    /// stay exact, and passes.
    pub gelu: bool,
    /// The gradients of biases, where there is an algorithm that leaves them beside the gradients of weights.
    pub bias: bool,
}

/// Launches, copies and products recorded once, to be run again as they are.
pub(crate) trait Graph: Send {
    /// Enqueues everything recorded.
    ///
    /// # Errors
    /// As the recorded calls.
    fn replay(&self) -> Result<()>;
}

/// Marks in a stream's work, and when each was reached.
pub(crate) trait Clock {
    /// Marks the end of the work enqueued so far.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu), also while the stream's work is being recorded.
    fn mark(&mut self) -> Result<()>;

    /// Waits for the last mark, and gives the time of each since the first.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu), also for what went wrong in work enqueued before.
    fn read(&mut self) -> Result<Vec<Duration>>;
}

/// That of a device which does work as it is enqueued.
#[derive(Debug, Default)]
pub(crate) struct HostClock(Vec<Instant>);

impl Clock for HostClock {
    fn mark(&mut self) -> Result<()> {
        self.0.push(Instant::now());
        Ok(())
    }

    fn read(&mut self) -> Result<Vec<Duration>> {
        let since_first = |mark: &Instant| mark.duration_since(self.0[0]);
        Ok(self.0.iter().map(since_first).collect())
    }
}

/// A GPU with a stream.
pub(crate) trait Driver: Send + Sync + std::fmt::Debug {
    /// What it can do.
    fn properties(&self) -> &Properties;

    /// The same GPU with somebody else's stream; `None` if it has no streams.
    ///
    /// # Errors
    /// [`Invalid`](crate::Error::Invalid) for a stream of another context.
    ///
    /// # Safety
    /// As [`Gpu::on_stream`](super::Gpu::on_stream).
    #[expect(unsafe_code, reason = "trusts a pointer")]
    unsafe fn on_stream(&self, stream: *mut c_void) -> Result<Option<Arc<dyn Driver>>>;

    /// Address of its CUDA context, which tells whose streams and memory are its own; `None` on the host executor.
    #[cfg(feature = "cuda")]
    fn context(&self) -> Option<usize>;

    /// Bytes of memory that nobody has taken.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu).
    fn available_bytes(&self) -> Result<u64>;

    /// Memory of `bytes`, aligned to 256 on a GPU and to 16 on the host executor. What it holds is undefined. `what` names
    /// it in messages.
    ///
    /// # Errors
    /// [`OutOfMemory`](crate::Error::OutOfMemory).
    fn alloc(&self, bytes: usize, what: &'static str) -> Result<DevPtr>;

    /// Gives memory back, once the work enqueued so far is done with it.
    fn free(&self, memory: DevPtr);

    /// Copies from the host. `src` may be reused when this returns; work enqueued later sees the copy, work enqueued earlier
    /// does not. May run beside earlier work. Not while capturing.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu).
    fn upload(&self, dst: DevPtr, src: &[u8]) -> Result<()>;

    /// Zeros in page-locked memory of the host, from which the GPU copies by itself; `None` if there is none to be had, or
    /// nothing to be gained by it.
    fn lock_pages(&self, _bytes: usize) -> Option<Box<dyn HostMemory>> {
        None
    }

    /// As [`upload`](Self::upload). From memory of [`lock_pages`](Self::lock_pages) without a copy on the host: it is read
    /// after this returns, and waits when it is written.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu).
    fn upload_buffer(&self, dst: DevPtr, src: &HostBuffer) -> Result<()> {
        self.upload(dst, src)
    }

    /// Copies to the host, after all work enqueued so far. Not while capturing.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu), also for what went wrong in that work.
    fn download(&self, dst: &mut [u8], src: DevPtr) -> Result<()>;

    /// Copies on the device.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu).
    fn copy(&self, dst: DevPtr, src: DevPtr, bytes: usize) -> Result<()>;

    /// Sets every byte to 0.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu).
    fn clear(&self, dst: DevPtr, bytes: usize) -> Result<()>;

    /// Enqueues a kernel.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu); on the host executor [`Kernel`](crate::Error::Kernel) for whatever the kernel did wrong.
    fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Which epilogues products should have.
    fn epilogues(&self) -> Epilogues;

    /// Whether there is an algorithm for a product whose epilogue is [`RowSums`](Epilogue::RowSums). Always the same answer, so
    /// that recorded work is what was done before.
    ///
    /// # Errors
    /// As [`matmul`](Self::matmul).
    fn offers(&self, matmul: &Matmul) -> Result<bool>;

    /// Enqueues a matrix product.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu); [`Invalid`](crate::Error::Invalid) if the user asked for an epilogue that is not there.
    fn matmul(&self, matmul: &Matmul) -> Result<()>;

    /// How products seen so far are computed, for [`load_plans`](Self::load_plans) of a later run; may be empty.
    fn plans(&self) -> Vec<u8>;

    /// Computes products as an earlier run did, so that the same bits come out. Returns how many plans there are.
    ///
    /// # Errors
    /// Why they cannot be used here; products are then planned anew.
    fn load_plans(&self, plans: &[u8]) -> Result<usize, String>;

    /// Waits for all work enqueued so far.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu) for what went wrong in that work.
    fn synchronize(&self) -> Result<()>;

    /// How long what `enqueue` enqueues takes, from the end of earlier work to its own. Waits for it. Not while capturing.
    ///
    /// # Errors
    /// Those of `enqueue`; [`Gpu`](crate::Error::Gpu), also for what went wrong in that work.
    fn time(&self, enqueue: Box<dyn FnOnce() -> Result<()> + '_>) -> Result<Duration>;

    /// Tells the time of points in the work. Not while capturing.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu).
    fn clock(&self) -> Result<Box<dyn Clock>>;

    /// From here on launches, products, copies on the device and clears are recorded, not run. The shapes of all products
    /// must have been seen before. All of these also work while the stream's owner is capturing it.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu).
    fn begin_capture(&self) -> Result<()>;

    /// Ends recording.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu) for what could not be recorded.
    fn end_capture(&self) -> Result<Box<dyn Graph>>;
}
