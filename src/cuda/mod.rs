//! Everything that knows CUDA: one [`Gpu`], two drivers beneath it.
//!
//! `nvidia` is a real GPU, through the CUDA driver and cublasLt, both loaded at run time. `simt` runs the same kernels
//! on the host, and checks every access they make: see `docs/executor.md`.

#[cfg(feature = "cuda")]
mod cublaslt;
#[cfg_attr(
    not(any(feature = "cuda", pixmim_simt)),
    expect(dead_code, reason = "there is no driver to read what it is told")
)]
mod driver;
pub mod kernels;
#[cfg(feature = "cuda")]
mod nvidia;
#[cfg(feature = "cuda")]
pub mod probe;
#[cfg(pixmim_simt)]
mod simt;
#[cfg(feature = "cuda")]
mod slices;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub(crate) use driver::{Clock, Driver, Epilogue, Graph, HostClock, Launch, Matmul, Matrix};
pub use driver::{DevPtr, Epilogues, Properties};
#[cfg(pixmim_simt)]
pub use simt::SimtOptions;
#[cfg(feature = "cuda")]
pub use slices::{SliceMut, SliceRef};

use crate::device::Place;
use crate::{Error, Result};

/// Work recorded by [`Gpu::record`], to be done again as a whole: one call in place of hundreds.
pub struct Recording {
    graph: Mutex<Box<dyn Graph>>,
    /// Keeps a borrowed stream alive.
    _gpu: Gpu,
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Recording")
    }
}

impl Recording {
    /// Enqueues the work. The tensors it was recorded with must be alive and where they were.
    ///
    /// # Errors
    /// Those of the recorded work.
    pub fn replay(&self) -> Result<()> {
        self.graph.lock().unwrap_or_else(PoisonError::into_inner).replay()
    }
}

/// A GPU and a stream of it: cheap to clone, all clones are one.
#[derive(Clone, Debug)]
pub struct Gpu {
    driver: Arc<dyn Driver>,
    id: u32,
    /// The stream, if it is borrowed from cudarc. Must outlive the driver.
    #[cfg(feature = "cuda")]
    cudarc: Option<Arc<cudarc::driver::CudaStream>>,
}

impl Gpu {
    /// The host executor.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if the CPU lacks AVX2, FMA or F16C, which the executor is compiled for.
    #[cfg(pixmim_simt)]
    pub fn simt(options: SimtOptions) -> Result<Self> {
        Ok(Self::new(Arc::new(simt::Simt::new(options)?)))
    }

    /// The NVIDIA GPU of this ordinal.
    ///
    /// # Errors
    /// [`Error::NoDevice`] with what [`probe`](probe::probe) says; [`Error::Gpu`] or [`Error::OutOfMemory`] if it cannot
    /// be opened.
    #[cfg(feature = "cuda")]
    pub fn nvidia(ordinal: usize) -> Result<Self> {
        Ok(Self::new(Arc::new(nvidia::Nvidia::new(ordinal)?)))
    }

    /// No GPU: this build leaves CUDA out.
    ///
    /// # Errors
    /// Always [`Error::NoDevice`].
    #[cfg(not(feature = "cuda"))]
    pub fn nvidia(_ordinal: usize) -> Result<Self> {
        let why = "this build leaves CUDA out; build with feature `cuda`, or use --device cpu";
        Err(Error::NoDevice { asked: "cuda".into(), why: why.into() })
    }

    /// The same GPU with somebody else's stream, such as PyTorch's current one: tensors, filters and kernels are common to
    /// both, and products are computed the same way. Takes little time; the first product takes 32 MiB of workspace.
    /// Dropping its last clone waits for all work of the GPU. The host executor has no streams, and gives itself.
    ///
    /// While the stream's owner is capturing it (as PyTorch's CUDA graphs do), ops, [`Device::copy`](crate::Device::copy) and
    /// [`clear`](crate::Device::clear) are captured with it. Products must have been computed once before, on any stream.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a stream of another context than the GPU's primary one; [`Error::Gpu`].
    ///
    /// # Safety
    /// * `stream` must be a `CUstream` or `cudaStream_t`; null is the legacy default stream. It must be alive whenever the
    ///   GPU given back is called, and when a tensor made with that, or a [`Recording`], is dropped.
    /// * Streams run side by side: a tensor that is written on one must not be read, written or dropped on another before
    ///   the caller has ordered the two, by an event say.
    /// * What the owner has captured uses the workspace: the GPU given back must outlive those graphs, and no two of them
    ///   with products may run at once, nor one beside the stream.
    #[expect(unsafe_code, reason = "trusts a pointer")]
    pub unsafe fn on_stream(&self, stream: *mut std::ffi::c_void) -> Result<Self> {
        // SAFETY: what is asked of the stream is asked of the caller.
        let driver = unsafe { self.driver.on_stream(stream) }?;
        let driver = driver.unwrap_or_else(|| Arc::clone(&self.driver));
        Ok(Self { id: self.id, ..Self::new(driver) })
    }

    /// How matrix products seen so far are computed, as bytes for [`load_matmul_plans`](Self::load_matmul_plans).
    #[must_use]
    pub fn matmul_plans(&self) -> Vec<u8> {
        self.driver.plans()
    }

    /// Computes matrix products as an earlier run did, so that the same bits come out. Returns how many plans there are.
    ///
    /// # Errors
    /// Why they cannot be used, in words: they are of another GPU or version. Products are then planned anew.
    pub fn load_matmul_plans(&self, plans: &[u8]) -> Result<usize, String> {
        self.driver.load_plans(plans)
    }

    fn new(driver: Arc<dyn Driver>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self {
            driver,
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            #[cfg(feature = "cuda")]
            cudarc: None,
        }
    }

    /// What it can do.
    #[must_use]
    pub fn properties(&self) -> &Properties {
        self.driver.properties()
    }

    /// Waits for all work enqueued so far.
    ///
    /// # Errors
    /// [`Error::Gpu`] for what went wrong in that work.
    pub fn synchronize(&self) -> Result<()> {
        self.driver.synchronize()
    }

    /// Bytes of memory that nobody has taken.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub fn available_bytes(&self) -> Result<u64> {
        self.driver.available_bytes()
    }

    /// How long the work that `enqueue` enqueues takes on the device, by its own clock: from the end of what was enqueued
    /// before to the end of this work, which it waits for. A device that runs out of work waits for the host, and that
    /// counts: enqueue enough, or replay a [`Recording`]. Exact to about a microsecond. On the host executor, which does
    /// work as it is enqueued, the time that `enqueue` takes.
    ///
    /// # Errors
    /// Those of `enqueue`, and [`Error::Gpu`] for what went wrong in that work, or while it is being recorded.
    pub fn time(&self, enqueue: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.driver.time(Box::new(enqueue))
    }

    /// Records the work that `enqueue` enqueues (ops, [`Device::clear`](crate::Device::clear) and
    /// [`copy`](crate::Device::copy)) instead of doing it. The same work must have been done once before, so that matrix
    /// products are planned and kernels loaded; what is recorded keeps the addresses it was given.
    ///
    /// # Errors
    /// Those of `enqueue`, and [`Error::Gpu`] for what cannot be recorded, such as a copy from or to the host.
    pub fn record(&self, enqueue: impl FnOnce() -> Result<()>) -> Result<Recording> {
        self.driver.begin_capture()?;
        let enqueued = enqueue();
        // Whatever happened, the stream must not stay recording.
        let graph = self.driver.end_capture();
        enqueued?;
        Ok(Recording { graph: Mutex::new(graph?), _gpu: self.clone() })
    }

    /// Enqueues a kernel by its name, with the bytes of its parameters: for tests of the executor itself.
    ///
    /// # Errors
    /// [`Error::Kernel`] for whatever the kernel did wrong.
    #[doc(hidden)]
    pub fn launch_raw(
        &self,
        kernel: &'static str,
        [grid, block, shared_bytes]: [u32; 3],
        params: &[u8],
    ) -> Result<()> {
        self.driver.launch(&Launch { kernel, grid, block, shared_bytes, params })
    }

    /// Enqueues a kernel of `grid` blocks of `block` threads with `shared_bytes` of dynamic shared memory.
    pub(crate) fn launch<P: bytemuck::Pod>(
        &self,
        kernel: &'static str,
        grid: usize,
        block: u32,
        shared_bytes: usize,
        params: &P,
    ) -> Result<()> {
        let most = self.properties().shared_bytes as usize;
        let (Ok(grid), true) = (u32::try_from(grid), shared_bytes <= most) else {
            let why = format!(
                "needs {grid} blocks with {shared_bytes} bytes of shared memory, of which there are {most}"
            );
            return Err(Error::Gpu { action: "launch", why: format!("{kernel} {why}") });
        };
        let shared_bytes = shared_bytes as u32;
        let params = bytemuck::bytes_of(params);
        self.driver.launch(&Launch { kernel, grid, block, shared_bytes, params })
    }

    pub(crate) fn place(&self) -> Place {
        Place::Gpu(self.id)
    }

    pub(crate) fn driver(&self) -> &dyn Driver {
        &*self.driver
    }
}
