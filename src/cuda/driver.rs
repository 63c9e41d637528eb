//! The seam beneath every launch: what a GPU does for us, and nothing else.
//!
//! Two implementations: `nvidia` (the CUDA driver and cublasLt, loaded at run time) and `simt` (the host executor, which
//! runs the same kernels compiled for the CPU). All work of a driver goes to one stream, in order.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};

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

/// `out (m, n) = a (m, k) b (k, n) + bias (n) + add (m, n)`, products and sums in f32; real f32, never TF32, when `a` and
/// `b` are f32. `a` and `b` have one dtype.
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

    /// Enqueues a matrix product.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu).
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
