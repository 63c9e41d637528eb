//! An NVIDIA GPU: the CUDA driver through cudarc's raw functions, matrix products through cublasLt.
//!
//! All work goes to one stream of the GPU's primary context, which each call makes current on its thread, as calls of the
//! CUDA runtime do. Kernels and plans are shared by all streams of a GPU ([`Shared`]). There is no event tracking and no
//! memory pool; the only calls that wait are those that must: [`free`](Driver::free), [`download`](Driver::download),
//! [`synchronize`](Driver::synchronize) and [`time`](Driver::time).

mod clock;
mod copies;
mod graph;
mod handles;
mod kernels;
mod outbox;

use std::any::Any;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cudarc::driver::sys;

use self::clock::EventClock;
use self::copies::Uploads;
pub(super) use self::copies::{upload, within_gpu};
use self::handles::Context;
pub(super) use self::handles::{Event, Memory, Stream};
use self::kernels::{Kernels, Suspects};
use self::outbox::Outbox;
use crate::cuda::cublaslt::{Lane, Plans, WORKSPACE_BYTES};
use crate::cuda::driver::{Clock, DevPtr, Driver, Epilogues, Graph, Launch, Matmul, Properties};
use crate::cuda::kernels::FATBINS;
use crate::cuda::probe::{self, Found};
use crate::device::{HostBuffer, HostMemory};
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

/// What all streams of a GPU share. Fields drop in this order: the context goes last.
#[derive(Debug)]
struct Shared {
    properties: Properties,
    plans: Plans,
    kernels: Kernels,
    context: Context,
}

/// What each stream has of its own. Fields drop in this order.
#[derive(Debug)]
struct Inner {
    suspects: Suspects,
    /// Memory given back while the stream is captured, which must wait for the end of that.
    freed_late: Mutex<Vec<Memory>>,
    /// Made when first needed, like the workspace.
    uploads: Mutex<Option<Uploads>>,
    workspace: Mutex<Option<Memory>>,
    stream: Stream,
    gpu: Arc<Shared>,
}

impl Nvidia {
    /// The GPU of this ordinal, with a stream of its own.
    ///
    /// # Errors
    /// [`NoDevice`](Error::NoDevice) with what the [`probe`] says; [`Gpu`](Error::Gpu) and
    /// [`OutOfMemory`](Error::OutOfMemory) if the GPU cannot be opened.
    pub(crate) fn new(ordinal: usize) -> Result<Self> {
        let found = probe::probe()
            .map_err(|reason| Error::NoDevice { asked: name(ordinal), why: reason.to_string() })?;
        Self::start(found, ordinal, FATBINS)
    }

    fn start(found: &Found, ordinal: usize, fatbins: &[(&str, &'static [u8])]) -> Result<Self> {
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
        let properties = Properties {
            name: gpu.name.clone(),
            multiprocessors: gpu.multiprocessors,
            shared_bytes: gpu.shared_bytes,
            memory_bytes: gpu.memory_bytes,
            executor: false,
        };
        let kernels = Kernels::load(fatbins, &gpu.name)?;
        let plans = Plans::new(gpu, found)?;
        let gpu =
            Self::with(Stream::new()?, Arc::new(Shared { properties, plans, kernels, context }));
        // Now, so that memory seen to be available stays so.
        gpu.0.workspace()?;
        Ok(gpu)
    }

    fn with(stream: Stream, gpu: Arc<Shared>) -> Self {
        Self(Arc::new(Inner {
            suspects: Suspects::default(),
            freed_late: Mutex::default(),
            uploads: Mutex::default(),
            workspace: Mutex::default(),
            stream,
            gpu,
        }))
    }

    /// The same GPU with another stream of its context.
    fn on(&self, stream: Stream) -> Result<Self> {
        self.0.bind()?;
        if !self.0.gpu.context.owns(&stream)? {
            let gpu = &self.0.gpu.properties.name;
            let why = format!("is not of the primary context of this {gpu}; make it there");
            return Err(Error::invalid("stream", why));
        }
        Ok(Self::with(stream, Arc::clone(&self.0.gpu)))
    }
}

impl Inner {
    /// Makes the GPU's context current on this thread.
    fn bind(&self) -> Result<()> {
        self.gpu.context.bind()
    }

    /// Address of the workspace of products. Works while the stream is being captured.
    fn workspace(&self) -> Result<u64> {
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = &*workspace {
            return Ok(memory.address());
        }
        let memory = Memory::new(WORKSPACE_BYTES, "the workspace of cublasLt")?;
        Ok(workspace.insert(memory).address())
    }

    /// A status that may be about earlier work.
    fn check(&self, action: &'static str, status: sys::CUresult) -> Result<()> {
        match status {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            _ => Err(Error::Gpu { action, why: self.suspects.explain(status) }),
        }
    }

    /// Does an upload by what uploads go through, which is made when first needed.
    fn upload(&self, copy: impl FnOnce(&mut Uploads, &Stream) -> Result<()>) -> Result<()> {
        self.bind()?;
        self.expect_no_capture("copy from the host")?;
        let mut uploads = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        let made = match &mut *uploads {
            Some(uploads) => Ok(uploads),
            none => Uploads::new().map(|uploads| none.insert(uploads)),
        };
        made.and_then(|uploads| copy(uploads, &self.stream)).map_err(|error| self.blame(error))
    }

    /// What is behind the error of a call that enqueues: work enqueued before, if that has failed.
    fn blame(&self, error: Error) -> Error {
        let Error::Gpu { action, .. } = error else { return error };
        // Waiting spoils a capture: this stream's, or that of one which the default stream waits for.
        if !matches!(self.stream.is_capturing(), Ok(false)) {
            return error;
        }
        self.check(action, self.stream.synchronize()).err().unwrap_or(error)
    }

    /// Waits for all work enqueued so far. The context must be current.
    fn finish(&self) -> Result<()> {
        self.check("finish its work", self.stream.synchronize())?;
        self.suspects.clear();
        Ok(())
    }

    /// Refuses what cannot be recorded before the driver would, which spoils the recording.
    fn expect_no_capture(&self, action: &'static str) -> Result<()> {
        if self.stream.is_capturing()? {
            let why = "its stream is being recorded; do it before or afterwards".into();
            return Err(Error::Gpu { action, why });
        }
        Ok(())
    }

    /// Frees `memory` and what was given back while the stream was being captured, unless it still is.
    fn free(&self, memory: Option<Memory>) {
        let mut freed = self.freed_late.lock().unwrap_or_else(PoisonError::into_inner);
        freed.extend(memory);
        // Waiting now would spoil the capture. cuMemFree waits in practice; its manual only says that it may.
        if !freed.is_empty() && matches!(self.stream.is_capturing(), Ok(false)) {
            let _ = self.stream.synchronize();
            freed.clear();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What the fields free must not be in use, and their context must be current. A stream of somebody else may be
        // gone by now, so it is not asked.
        if self.bind().is_ok() {
            let _ = self.gpu.context.synchronize();
        }
    }
}

/// A GPU as `--device` names it.
fn name(ordinal: usize) -> String {
    if ordinal == 0 { "cuda".into() } else { format!("cuda:{ordinal}") }
}

impl std::fmt::Debug for Nvidia {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Nvidia").field(&self.0.gpu.properties).finish()
    }
}

impl Driver for Nvidia {
    fn properties(&self) -> &Properties {
        &self.0.gpu.properties
    }

    #[expect(unsafe_code, reason = "trusts a pointer")]
    unsafe fn on_stream(&self, stream: *mut c_void) -> Result<Option<Arc<dyn Driver>>> {
        Ok(Some(Arc::new(self.on(Stream::borrow(stream.cast()))?)))
    }

    fn context(&self) -> Option<usize> {
        Some(self.0.gpu.context.address())
    }

    fn available_bytes(&self) -> Result<u64> {
        self.0.bind()?;
        handles::available_bytes()
    }

    fn alloc(&self, bytes: usize, what: &'static str) -> Result<DevPtr> {
        self.0.bind()?;
        self.0.expect_no_capture("allocate")?;
        self.0.free(None);
        Ok(DevPtr(Memory::new(bytes, what)?.into_raw()))
    }

    fn free(&self, memory: DevPtr) {
        if memory != DevPtr::default() && self.0.bind().is_ok() {
            self.0.free(Some(Memory::from_raw(memory.0)));
        }
    }

    fn upload(&self, dst: DevPtr, src: &[u8]) -> Result<()> {
        if src.is_empty() {
            return Ok(());
        }
        self.0.upload(|uploads, stream| uploads.copy(dst.0, src, stream))
    }

    fn lock_pages(&self, bytes: usize) -> Option<Box<dyn HostMemory>> {
        self.0.bind().ok()?;
        // Whatever is wrong, ordinary memory does as well, or the next call will say it.
        let outbox = if bytes > 0 { Outbox::new(bytes, &self.0.gpu).ok() } else { None };
        outbox.map(|outbox| Box::new(outbox) as _)
    }

    fn upload_buffer(&self, dst: DevPtr, src: &HostBuffer) -> Result<()> {
        let memory: &dyn Any = src.memory();
        match memory.downcast_ref::<Outbox>() {
            Some(outbox) if !src.is_empty() && outbox.is_of(&self.0.gpu) => {
                let range = src.offset()..src.offset() + src.len();
                self.0.upload(|uploads, stream| uploads.fetch(dst.0, outbox, range, stream))
            }
            _ => self.upload(dst, src),
        }
    }

    fn download(&self, dst: &mut [u8], src: DevPtr) -> Result<()> {
        if dst.is_empty() {
            return Ok(());
        }
        self.0.bind()?;
        self.0.expect_no_capture("copy to the host")?;
        self.0.check("copy to the host", copies::to_host(dst, src.0, &self.0.stream))?;
        self.0.suspects.clear();
        Ok(())
    }

    fn copy(&self, dst: DevPtr, src: DevPtr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.0.bind()?;
        within_gpu(dst.0, src.0, bytes, &self.0.stream).map_err(|error| self.0.blame(error))
    }

    fn clear(&self, dst: DevPtr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.0.bind()?;
        copies::clear(dst.0, bytes, &self.0.stream).map_err(|error| self.0.blame(error))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.0.bind()?;
        self.0.gpu.kernels.launch(launch, &self.0.stream, &self.0.suspects)
    }

    fn epilogues(&self) -> Epilogues {
        self.0.gpu.plans.epilogues()
    }

    fn offers(&self, matmul: &Matmul) -> Result<bool> {
        self.0.bind()?;
        let lane = Lane { stream: &self.0.stream, workspace: self.0.workspace()? };
        self.0.gpu.plans.offers(matmul, lane).map_err(|error| self.0.blame(error))
    }

    fn matmul(&self, matmul: &Matmul) -> Result<()> {
        if matmul.m == 0 || matmul.n == 0 || matmul.batch == 0 {
            return Ok(());
        }
        self.0.bind()?;
        let run = |workspace| {
            let lane = Lane { stream: &self.0.stream, workspace };
            self.0.gpu.plans.run(matmul, lane)
        };
        self.0.workspace().and_then(run).map_err(|error| self.0.blame(error))?;
        self.0.suspects.push(PRODUCT);
        Ok(())
    }

    fn plans(&self) -> Vec<u8> {
        self.0.gpu.plans.export()
    }

    fn load_plans(&self, plans: &[u8]) -> Result<usize, String> {
        self.0.gpu.plans.import(plans)
    }

    fn synchronize(&self) -> Result<()> {
        self.0.bind()?;
        self.0.finish()
    }

    fn time(&self, enqueue: Box<dyn FnOnce() -> Result<()> + '_>) -> Result<Duration> {
        self.0.bind()?;
        self.0.expect_no_capture("time its work")?;
        let (start, end) = (Event::timed()?, Event::timed()?);
        start.record(&self.0.stream).map_err(|error| self.0.blame(error))?;
        enqueue()?;
        // The work may have made another GPU's context current.
        self.0.bind()?;
        end.record(&self.0.stream).map_err(|error| self.0.blame(error))?;
        self.synchronize()?;
        Ok(Duration::from_secs_f64(f64::from(end.milliseconds_since(&start)?) / 1e3))
    }

    fn clock(&self) -> Result<Box<dyn Clock>> {
        self.0.bind()?;
        self.0.expect_no_capture("time its work")?;
        Ok(Box::new(EventClock::new(Arc::clone(&self.0))))
    }

    fn begin_capture(&self) -> Result<()> {
        self.0.bind()?;
        self.0.expect_no_capture("begin to record")?;
        graph::begin(&self.0.stream)
    }

    fn end_capture(&self) -> Result<Box<dyn Graph>> {
        self.0.bind()?;
        let replay = graph::end(&self.0);
        self.0.free(None);
        Ok(Box::new(replay?))
    }
}

#[cfg(test)]
mod tests;
