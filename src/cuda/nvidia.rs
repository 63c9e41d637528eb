//! An NVIDIA GPU: the CUDA driver through cudarc's raw functions, matrix products through cublasLt.
//!
//! All work goes to one stream of the GPU's primary context, which each call makes current on its thread, as calls of the
//! CUDA runtime do. There is no event tracking and no memory pool; the only
//! calls that wait are those that must: [`free`](Driver::free), [`download`](Driver::download) and
//! [`synchronize`](Driver::synchronize).

mod copies;
mod graph;
mod handles;
mod kernels;

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cudarc::driver::sys;

use self::copies::Uploads;
pub(super) use self::copies::{upload, within_gpu};
use self::handles::Context;
pub(super) use self::handles::{Event, Memory, Stream};
use self::kernels::{Kernels, Suspects};
use crate::cuda::cublaslt::Plans;
use crate::cuda::driver::{DevPtr, Driver, Graph, Launch, Matmul, Properties};
use crate::cuda::kernels::FATBINS;
use crate::cuda::probe::{self, Found};
use crate::{Error, Result};

/// What a matrix product is called in messages.
const PRODUCT: &str = "a cublasLt product";
/// What a replayed graph is called in messages.
const REPLAY: &str = "a recorded graph";

/// Every function of libcuda called below this module.
pub(super) fn symbols() -> impl Iterator<Item = &'static str> {
    let symbols = [&handles::SYMBOLS[..], &copies::SYMBOLS, &kernels::SYMBOLS, &graph::SYMBOLS];
    symbols.into_iter().flatten().copied()
}

/// A GPU with a stream.
#[derive(Clone)]
pub(crate) struct Nvidia(Arc<Inner>);

/// Fields drop in this order: the context goes last.
#[derive(Debug)]
struct Inner {
    properties: Properties,
    suspects: Suspects,
    /// Memory given back while recording, which must wait for the end of that.
    freed_late: Mutex<Vec<Memory>>,
    uploads: Mutex<Uploads>,
    plans: Mutex<Plans>,
    kernels: Kernels,
    stream: Stream,
    context: Context,
}

impl Nvidia {
    /// The GPU of this ordinal, with a stream of its own.
    ///
    /// # Errors
    /// [`NoDevice`](Error::NoDevice) with what the [`probe`] says; [`Gpu`](Error::Gpu) and
    /// [`OutOfMemory`](Error::OutOfMemory) if the GPU cannot be opened.
    pub(crate) fn new(ordinal: usize) -> Result<Self> {
        Self::open(ordinal, Stream::new)
    }

    /// The GPU of this ordinal, with a stream made by somebody else in its primary context: PyTorch's, say.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Invalid`](Error::Invalid) for a stream of another context.
    ///
    /// # Safety
    /// The stream must be a `CUstream`, or null for the legacy default stream, and outlive `Self` and every graph
    /// recorded on it.
    #[expect(unsafe_code, reason = "trusts a pointer")]
    pub(crate) unsafe fn with_stream(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        Self::open(ordinal, || Ok(Stream::borrow(stream.cast())))
    }

    fn open(ordinal: usize, stream: impl FnOnce() -> Result<Stream>) -> Result<Self> {
        let found = probe::probe()
            .map_err(|reason| Error::NoDevice { asked: name(ordinal), why: reason.to_string() })?;
        Self::start(found, ordinal, FATBINS, stream)
    }

    fn start(
        found: &Found,
        ordinal: usize,
        fatbins: &[(&str, &'static [u8])],
        stream: impl FnOnce() -> Result<Stream>,
    ) -> Result<Self> {
        let refuse = |why| Err(Error::NoDevice { asked: name(ordinal), why });
        let Some(gpu) = found.gpus.get(ordinal) else {
            return refuse(format!("the driver shows {} GPUs, counted from 0", found.gpus.len()));
        };
        if !gpu.is_new_enough() {
            return refuse(gpu.too_old().to_string());
        }
        let context = match Context::retain(ordinal) {
            // Another process has it to itself, or has left no memory.
            Err(Error::Gpu { why, .. }) => {
                return refuse(format!(
                    "{} does not open ({why}); see what `nvidia-smi` says",
                    gpu.name
                ));
            }
            context => context?,
        };
        let stream = stream()?;
        if !context.owns(&stream)? {
            let why = format!("is not of the primary context of GPU {ordinal}; make it there");
            return Err(Error::invalid("stream", why));
        }
        let kernels = Kernels::load(fatbins, &gpu.name)?;
        let plans = Plans::new(gpu, found)?;
        let uploads = Uploads::new()?;
        let properties = Properties {
            name: gpu.name.clone(),
            multiprocessors: gpu.multiprocessors,
            shared_bytes: gpu.shared_bytes,
            memory_bytes: gpu.memory_bytes,
        };
        Ok(Self(Arc::new(Inner {
            properties,
            suspects: Suspects::default(),
            freed_late: Mutex::default(),
            uploads: Mutex::new(uploads),
            plans: Mutex::new(plans),
            kernels,
            stream,
            context,
        })))
    }
}

impl Inner {
    fn plans(&self) -> MutexGuard<'_, Plans> {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A status that may be about earlier work.
    fn check(&self, action: &'static str, status: sys::CUresult) -> Result<()> {
        match status {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            _ => Err(Error::Gpu { action, why: self.suspects.explain(status) }),
        }
    }

    /// What is behind the error of a call that enqueues: work enqueued before, if that has failed.
    fn blame(&self, error: Error) -> Error {
        let Error::Gpu { action, .. } = error else { return error };
        if matches!(self.stream.is_capturing(), Ok(true)) {
            return error;
        }
        self.check(action, self.stream.synchronize()).err().unwrap_or(error)
    }

    /// Refuses what cannot be recorded before the driver would, which spoils the recording.
    fn expect_no_capture(&self, action: &'static str) -> Result<()> {
        if self.stream.is_capturing()? {
            let why = "its stream is being recorded; do it before or afterwards".into();
            return Err(Error::Gpu { action, why });
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What the fields free must not be in use, and their context must be current.
        if self.context.bind().is_ok() {
            let uploads = self.uploads.get_mut().unwrap_or_else(PoisonError::into_inner);
            let _ = uploads.synchronize();
            let _ = self.stream.synchronize();
        }
    }
}

/// A GPU as `--device` names it.
fn name(ordinal: usize) -> String {
    if ordinal == 0 { "cuda".into() } else { format!("cuda:{ordinal}") }
}

impl std::fmt::Debug for Nvidia {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Nvidia").field(&self.0.properties).finish()
    }
}

impl Driver for Nvidia {
    fn properties(&self) -> &Properties {
        &self.0.properties
    }

    fn available_bytes(&self) -> Result<u64> {
        self.0.context.bind()?;
        handles::available_bytes()
    }

    fn alloc(&self, bytes: usize, what: &'static str) -> Result<DevPtr> {
        self.0.context.bind()?;
        self.0.expect_no_capture("allocate")?;
        Ok(DevPtr(Memory::new(bytes, what)?.into_raw()))
    }

    fn free(&self, memory: DevPtr) {
        if memory == DevPtr::default() || self.0.context.bind().is_err() {
            return;
        }
        let memory = Memory::from_raw(memory.0);
        if self.0.stream.is_capturing().unwrap_or(true) {
            // Waiting now would spoil the recording.
            self.0.freed_late.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
            return;
        }
        // cuMemFree waits in practice; its manual only says that it may.
        let _ = self.0.stream.synchronize();
    }

    fn upload(&self, dst: DevPtr, src: &[u8]) -> Result<()> {
        if src.is_empty() {
            return Ok(());
        }
        self.0.context.bind()?;
        self.0.expect_no_capture("copy from the host")?;
        let mut uploads = self.0.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        uploads.copy(dst.0, src, &self.0.stream).map_err(|error| self.0.blame(error))
    }

    fn download(&self, dst: &mut [u8], src: DevPtr) -> Result<()> {
        if dst.is_empty() {
            return Ok(());
        }
        self.0.context.bind()?;
        self.0.expect_no_capture("copy to the host")?;
        self.0.check("copy to the host", copies::to_host(dst, src.0, &self.0.stream))?;
        self.0.suspects.clear();
        Ok(())
    }

    fn copy(&self, dst: DevPtr, src: DevPtr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.0.context.bind()?;
        within_gpu(dst.0, src.0, bytes, &self.0.stream).map_err(|error| self.0.blame(error))
    }

    fn clear(&self, dst: DevPtr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.0.context.bind()?;
        copies::clear(dst.0, bytes, &self.0.stream).map_err(|error| self.0.blame(error))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.0.context.bind()?;
        self.0.kernels.launch(launch, &self.0.stream, &self.0.suspects)
    }

    fn matmul(&self, matmul: &Matmul) -> Result<()> {
        if matmul.m == 0 || matmul.n == 0 || matmul.batch == 0 {
            return Ok(());
        }
        self.0.context.bind()?;
        self.0.plans().run(matmul, &self.0.stream).map_err(|error| self.0.blame(error))?;
        self.0.suspects.push(PRODUCT);
        Ok(())
    }

    fn plans(&self) -> Vec<u8> {
        self.0.plans().export()
    }

    fn load_plans(&self, plans: &[u8]) -> Result<usize, String> {
        self.0.plans().import(plans)
    }

    fn synchronize(&self) -> Result<()> {
        self.0.context.bind()?;
        self.0.check("finish its work", self.0.stream.synchronize())?;
        self.0.suspects.clear();
        Ok(())
    }

    fn time(&self, enqueue: Box<dyn FnOnce() -> Result<()> + '_>) -> Result<Duration> {
        self.0.context.bind()?;
        self.0.expect_no_capture("time its work")?;
        let (start, end) = (Event::timed()?, Event::timed()?);
        start.record(&self.0.stream).map_err(|error| self.0.blame(error))?;
        enqueue()?;
        // The work may have made another GPU's context current.
        self.0.context.bind()?;
        end.record(&self.0.stream).map_err(|error| self.0.blame(error))?;
        self.synchronize()?;
        Ok(Duration::from_secs_f64(f64::from(end.milliseconds_since(&start)?) / 1e3))
    }

    fn begin_capture(&self) -> Result<()> {
        self.0.context.bind()?;
        self.0.expect_no_capture("begin to record")?;
        graph::begin(&self.0.stream)
    }

    fn end_capture(&self) -> Result<Box<dyn Graph>> {
        self.0.context.bind()?;
        let replay = graph::end(&self.0);
        let mut freed = self.0.freed_late.lock().unwrap_or_else(PoisonError::into_inner);
        if !freed.is_empty() {
            let _ = self.0.stream.synchronize();
            freed.clear();
        }
        Ok(Box::new(replay?))
    }
}

#[cfg(test)]
mod tests;
