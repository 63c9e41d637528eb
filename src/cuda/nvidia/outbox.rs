//! Page-locked memory from which the GPU copies by itself, while the host goes on.

use std::sync::{Arc, Mutex, PoisonError};

use super::Shared;
use super::handles::{AllowWhileCapturing, Event, Pinned, Stream};
use crate::Result;
use crate::device::HostMemory;

/// Names it in messages.
const WHAT: &str = "a batch in page-locked memory";

/// Pinned memory, and the mark of the last copy out of it. Fields drop in this order.
#[derive(Debug)]
pub(super) struct Outbox {
    last_read: Mutex<LastRead>,
    host: Pinned,
    gpu: Arc<Shared>,
}

#[derive(Debug)]
struct LastRead {
    event: Event,
    /// Whether nobody has seen the event reached yet.
    pending: bool,
}

impl Outbox {
    /// Zeros. The GPU's context must be current.
    pub(super) fn new(bytes: usize, gpu: &Arc<Shared>) -> Result<Self> {
        // A loader's threads wait here as long as the GPU is the slower one.
        let last_read = Mutex::new(LastRead { event: Event::sleeping()?, pending: false });
        let mut host = Pinned::new(bytes, WHAT)?;
        host.clear();
        Ok(Self { last_read, host, gpu: Arc::clone(gpu) })
    }

    /// Whether streams of `gpu` can read it: it belongs to one context.
    pub(super) fn is_of(&self, gpu: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.gpu, gpu)
    }

    /// Lets `stream` read it by what `enqueue` enqueues there. Who writes afterwards, waits for that.
    pub(super) fn read_on(
        &self,
        stream: &Stream,
        enqueue: impl FnOnce(&Pinned) -> Result<()>,
    ) -> Result<()> {
        let mut last = self.last_read.lock().unwrap_or_else(PoisonError::into_inner);
        if last.pending {
            // There is one event: it must come after the reads before this one too, on whichever stream they are.
            stream.wait(&last.event)?;
        }
        last.pending = true;
        let marked = enqueue(&self.host).and_then(|()| last.event.record(stream));
        if marked.is_err() {
            // What was enqueued has no mark that could be waited for.
            let _ = stream.synchronize();
        }
        marked
    }
}

#[expect(unsafe_code, reason = "buffers trust it")]
// SAFETY: the memory is the driver's, set to zeros in `new`, and stays until `self` is dropped; only `start` gives it out to
// be written.
unsafe impl HostMemory for Outbox {
    fn start(&self) -> *mut u8 {
        self.host.start()
    }

    fn bytes(&self) -> usize {
        self.host.bytes()
    }

    fn wait(&self) {
        let mut last = self.last_read.lock().unwrap_or_else(PoisonError::into_inner);
        if last.pending && self.gpu.context.bind().is_ok() {
            let _allowed = AllowWhileCapturing::new();
            // It fails when the GPU has, and then every later call does and says why; nothing reads any more.
            let _ = last.event.synchronize();
            last.pending = false;
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        // Memory and event must not be in use, and their context must be current.
        self.wait();
        let _ = self.gpu.context.bind();
    }
}
