//! Work recorded once and enqueued again as one.

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::handles::{Stream, check};
use super::{Inner, REPLAY};
use crate::cuda::driver::Graph;
use crate::{Error, Result};

/// What this file calls.
pub(super) const SYMBOLS: [&str; 6] = [
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
];

/// A recording that can be run. Keeps the kernels, the workspace and the stream it uses.
#[derive(Debug)]
pub(super) struct Replay {
    handle: sys::CUgraphExec,
    gpu: Arc<Inner>,
}

#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: the driver's functions may be called with a graph from any thread, though not at the same time, so there is no
// Sync.
unsafe impl Send for Replay {}

/// From here on calls of this thread on the stream are recorded.
#[expect(unsafe_code, reason = "calls into libcuda")]
pub(super) fn begin(stream: &Stream) -> Result<()> {
    if stream.is_legacy_default() {
        let why = "work on the legacy default stream cannot be recorded; make a stream and use it with Gpu::on_stream";
        return Err(Error::Gpu { action: "begin to record", why: why.into() });
    }
    // Calls of other threads, such as a loader that pins memory, must not spoil the recording.
    let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: the probe found the symbol; the stream is alive.
    check("begin to record", unsafe { sys::cuStreamBeginCapture_v2(stream.handle(), mode) })
}

/// Ends recording.
#[expect(unsafe_code, reason = "calls into libcuda")]
pub(super) fn end(gpu: &Arc<Inner>) -> Result<Replay> {
    let mut graph = ptr::null_mut();
    // SAFETY: the probe found the symbol; the stream is alive; writes one pointer, null if recording failed.
    let status = unsafe { sys::cuStreamEndCapture(gpu.stream.handle(), &raw mut graph) };
    check("end recording", status)?;
    let mut handle = ptr::null_mut();
    // SAFETY: the probe found the symbol; the graph is the one just recorded; 0 are the default flags; writes one pointer.
    let instantiated = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut handle, graph, 0) };
    // SAFETY: the probe found the symbol; nothing refers to the graph any more: an executable one is a copy.
    let _ = unsafe { sys::cuGraphDestroy(graph) };
    check("prepare what was recorded", instantiated)?;
    Ok(Replay { handle, gpu: Arc::clone(gpu) })
}

impl Graph for Replay {
    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn replay(&self) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: the probe found the symbol; graph and stream are alive.
        let status = unsafe { sys::cuGraphLaunch(self.handle, self.gpu.stream.handle()) };
        self.gpu.check("replay a recording", status)?;
        self.gpu.suspects.push(REPLAY);
        Ok(())
    }
}

impl Drop for Replay {
    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: the probe found the symbol; `end` made the graph destroyed here; if it is running, the driver waits
            // for its end before it frees it.
            let _ = unsafe { sys::cuGraphExecDestroy(self.handle) };
        }
    }
}
