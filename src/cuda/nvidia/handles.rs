//! The driver's objects as Rust values: each is destroyed once, when dropped. A failure to destroy is ignored: nothing can
//! be done about it, and the driver reports the cause at the next call.

use std::ffi::{CStr, c_void};
use std::ptr;

use cudarc::driver::sys;

use crate::{Error, Result};

/// What this file calls.
pub(super) const SYMBOLS: [&str; 23] = [
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuGetErrorString",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamGetCtx",
    "cuStreamIsCapturing",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuThreadExchangeStreamCaptureMode",
];

/// A status as a result.
pub(crate) fn check(action: &'static str, status: sys::CUresult) -> Result<()> {
    match status {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        _ => Err(Error::Gpu { action, why: describe(status) }),
    }
}

/// Name and meaning of a status.
#[expect(unsafe_code, reason = "calls into libcuda")]
pub(super) fn describe(status: sys::CUresult) -> String {
    let mut text = ptr::null();
    // SAFETY: the probe found the symbol; writes a pointer to a static string, or null for a status unknown to it.
    let known = unsafe { sys::cuGetErrorString(status, &raw mut text) };
    if known != sys::CUresult::CUDA_SUCCESS || text.is_null() {
        return format!("{status:?}");
    }
    // SAFETY: not null, so a string that lives as long as the driver is loaded.
    let text = unsafe { CStr::from_ptr(text) };
    format!("{status:?}, {}", text.to_string_lossy())
}

/// A reference to a GPU's primary context: the one that the CUDA runtime, and so PyTorch and cublasLt, use.
///
/// Everything else in this file lives in it: it must be current where those are made and dropped, and outlive them.
#[derive(Debug)]
pub(super) struct Context {
    device: sys::CUdevice,
    handle: sys::CUcontext,
}

#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: the driver's functions may be called with any context from any thread.
unsafe impl Send for Context {}
#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: as above, also at the same time.
unsafe impl Sync for Context {}

impl Context {
    /// The primary context of a GPU, current on this thread.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(super) fn retain(ordinal: usize) -> Result<Self> {
        let ordinal = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let mut device = 0;
        // SAFETY: the probe found the symbol and called cuInit; writes one int.
        check("find it", unsafe { sys::cuDeviceGet(&raw mut device, ordinal) })?;
        let mut handle = ptr::null_mut();
        // SAFETY: the probe found the symbol; `device` came from cuDeviceGet; writes one pointer.
        let status = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut handle, device) };
        check("open a context", status)?;
        let context = Self { device, handle };
        context.bind()?;
        Ok(context)
    }

    /// Makes it current on this thread.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(super) fn bind(&self) -> Result<()> {
        // SAFETY: the probe found the symbol; the context is retained until `self` is dropped.
        check("use its context", unsafe { sys::cuCtxSetCurrent(self.handle) })
    }

    /// Waits for all work in it, whoever enqueued it. It must be current.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(super) fn synchronize(&self) -> sys::CUresult {
        // SAFETY: the probe found the symbol.
        unsafe { sys::cuCtxSynchronize() }
    }

    /// Its handle as a number, to tell it from others.
    pub(super) fn address(&self) -> usize {
        self.handle.addr()
    }

    /// Whether a stream was made in it. It must be current, as the default streams are those of the current context.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(super) fn owns(&self, stream: &Stream) -> Result<bool> {
        let mut handle = ptr::null_mut();
        // SAFETY: the probe found the symbol; the stream is alive; writes one pointer.
        let status = unsafe { sys::cuStreamGetCtx(stream.handle, &raw mut handle) };
        check("use the stream given", status)?;
        Ok(handle == self.handle)
    }
}

impl Drop for Context {
    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn drop(&mut self) {
        // SAFETY: the probe found the symbol; `retain` took the reference given back here.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A queue of work.
#[derive(Debug)]
pub(crate) struct Stream {
    handle: sys::CUstream,
    borrowed: bool,
}

#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: the driver's functions may be called with any stream from any thread.
unsafe impl Send for Stream {}
#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: as above, also at the same time: the driver orders the calls.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream that does not wait for the legacy default stream.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(super) fn new() -> Result<Self> {
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        let mut handle = ptr::null_mut();
        // SAFETY: the probe found the symbol; a context is current; writes one pointer.
        check("open a stream", unsafe { sys::cuStreamCreate(&raw mut handle, flags) })?;
        Ok(Self { handle, borrowed: false })
    }

    /// Somebody else's stream, which is not destroyed here.
    pub(super) fn borrow(handle: sys::CUstream) -> Self {
        Self { handle, borrowed: true }
    }

    /// Whether it is the legacy default stream, by either of its names.
    pub(super) fn is_legacy_default(&self) -> bool {
        // CU_STREAM_LEGACY is 1.
        self.handle.addr() <= 1
    }

    /// For calls into the driver and cublasLt.
    pub(crate) fn handle(&self) -> sys::CUstream {
        self.handle
    }

    /// Waits for its work.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(super) fn synchronize(&self) -> sys::CUresult {
        // SAFETY: the probe found the symbol; the stream is alive.
        unsafe { sys::cuStreamSynchronize(self.handle) }
    }

    /// Whether calls on it are recorded, not run.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(crate) fn is_capturing(&self) -> Result<bool> {
        let mut status = sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the probe found the symbol; the stream is alive; writes one enum.
        let result = unsafe { sys::cuStreamIsCapturing(self.handle, &raw mut status) };
        check("tell whether its work is being recorded", result)?;
        Ok(status != sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Lets work enqueued from here on wait for the event.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(super) fn wait(&self, event: &Event) -> Result<()> {
        // SAFETY: the probe found the symbol; stream and event are alive; 0 are the default flags.
        let status = unsafe { sys::cuStreamWaitEvent(self.handle, event.handle, 0) };
        check("order two streams", status)
    }
}

impl Drop for Stream {
    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn drop(&mut self) {
        if !self.borrowed {
            // SAFETY: the probe found the symbol; `new` made the stream destroyed here.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.handle) };
        }
    }
}

/// A mark in a stream.
#[derive(Debug)]
pub(crate) struct Event {
    handle: sys::CUevent,
}

#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: the driver's functions may be called with any event from any thread.
unsafe impl Send for Event {}

impl Event {
    /// An event that orders.
    pub(super) fn new() -> Result<Self> {
        Self::with_flags(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32)
    }

    /// An event that orders, and whose waiting thread sleeps instead of asking on and on.
    pub(super) fn sleeping() -> Result<Self> {
        let sleeping = sys::CUevent_flags_enum::CU_EVENT_BLOCKING_SYNC as u32;
        Self::with_flags(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32 | sleeping)
    }

    /// An event that also tells the time.
    pub(crate) fn timed() -> Result<Self> {
        Self::with_flags(sys::CUevent_flags_enum::CU_EVENT_DEFAULT as u32)
    }

    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn with_flags(flags: u32) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: the probe found the symbol; a context is current; writes one pointer.
        check("make an event", unsafe { sys::cuEventCreate(&raw mut handle, flags) })?;
        Ok(Self { handle })
    }

    /// Marks the end of the work enqueued so far.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: the probe found the symbol; event and stream are alive.
        check("mark its stream", unsafe { sys::cuEventRecord(self.handle, stream.handle) })
    }

    /// Waits until the mark is reached; one never made is.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(crate) fn synchronize(&self) -> Result<()> {
        // SAFETY: the probe found the symbol; the event is alive.
        check("finish earlier work", unsafe { sys::cuEventSynchronize(self.handle) })
    }

    /// Milliseconds from `start` to `self`, both timed and reached.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(crate) fn milliseconds_since(&self, start: &Self) -> Result<f32> {
        let mut time = 0.0;
        // SAFETY: the probe found the symbol; both events are alive; writes one float.
        let status =
            unsafe { sys::cuEventElapsedTime_v2(&raw mut time, start.handle, self.handle) };
        check("tell the time", status)?;
        Ok(time)
    }
}

impl Drop for Event {
    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn drop(&mut self) {
        // SAFETY: the probe found the symbol; `with_flags` made the event destroyed here.
        let _ = unsafe { sys::cuEventDestroy_v2(self.handle) };
    }
}

/// Bytes of the current GPU's memory that nobody has taken.
#[expect(unsafe_code, reason = "calls into libcuda")]
pub(super) fn available_bytes() -> Result<u64> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the probe found the symbol; writes two numbers.
    let status = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
    check("ask for its free memory", status)?;
    Ok(free as u64)
}

/// While it lives, this thread may allocate, and wait for events of other streams, although a stream is being captured, by
/// whomever: the driver refuses that at first, and spoils the capture, as it cannot know that the graph does not count on it
/// being repeated.
pub(super) struct AllowWhileCapturing(sys::CUstreamCaptureMode);

impl AllowWhileCapturing {
    pub(super) fn new() -> Self {
        Self(Self::exchange(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED))
    }

    /// Sets the mode of this thread, and gives the one it had.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn exchange(mut mode: sys::CUstreamCaptureMode) -> sys::CUstreamCaptureMode {
        // SAFETY: the probe found the symbol; reads a mode and writes another. It fails for no mode there is.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        mode
    }
}

impl Drop for AllowWhileCapturing {
    fn drop(&mut self) {
        Self::exchange(self.0);
    }
}

/// Memory of the GPU. Not from a pool, so that sanitizers see its bounds.
#[derive(Debug)]
pub(crate) struct Memory {
    address: sys::CUdeviceptr,
}

impl Memory {
    /// At least one byte, aligned to 256. `what` names it in messages.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(crate) fn new(bytes: usize, what: &'static str) -> Result<Self> {
        let _allowed = AllowWhileCapturing::new();
        let mut address = 0;
        // SAFETY: the probe found the symbol; a context is current; writes one address.
        let status = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(1)) };
        if status == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(Error::OutOfMemory { what, bytes });
        }
        check("allocate", status)?;
        Ok(Self { address })
    }

    /// Its first byte.
    pub(crate) fn address(&self) -> sys::CUdeviceptr {
        self.address
    }

    /// Leaves it to the caller, who ends it with [`Memory::from_raw`].
    pub(super) fn into_raw(self) -> sys::CUdeviceptr {
        std::mem::ManuallyDrop::new(self).address
    }

    /// Takes back what [`Memory::into_raw`] gave out.
    pub(super) fn from_raw(address: sys::CUdeviceptr) -> Self {
        Self { address }
    }
}

impl Drop for Memory {
    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn drop(&mut self) {
        // SAFETY: the probe found the symbol; for an address that is not allocated the driver returns an error.
        let _ = unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// Page-locked memory of the host, from which the GPU copies by itself.
#[derive(Debug)]
pub(super) struct Pinned {
    start: *mut u8,
    bytes: usize,
}

#[expect(unsafe_code, reason = "holds a pointer")]
// SAFETY: it owns the memory, like a Box<[u8]>.
unsafe impl Send for Pinned {}
#[expect(unsafe_code, reason = "holds a pointer")]
// SAFETY: a shared reference gives address and size only.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `what` names it in messages.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(super) fn new(bytes: usize, what: &'static str) -> Result<Self> {
        let _allowed = AllowWhileCapturing::new();
        let mut start: *mut c_void = ptr::null_mut();
        // SAFETY: the probe found the symbol; a context is current; writes one pointer; 0 are the default flags.
        let status = unsafe { sys::cuMemHostAlloc(&raw mut start, bytes, 0) };
        if status == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(Error::OutOfMemory { what, bytes });
        }
        check("pin host memory", status)?;
        Ok(Self { start: start.cast(), bytes })
    }

    /// Its size.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its first byte.
    pub(super) fn start(&self) -> *mut u8 {
        self.start
    }

    /// Sets every byte to 0.
    #[expect(unsafe_code, reason = "writes to memory of the driver")]
    pub(super) fn clear(&mut self) {
        // SAFETY: the memory has `bytes` bytes, and is borrowed exclusively.
        unsafe { self.start.write_bytes(0, self.bytes) };
    }

    /// Copies `src` to its start. No copy out of it may be under way.
    ///
    /// # Panics
    /// If `src` does not fit.
    #[expect(unsafe_code, reason = "writes to memory of the driver")]
    pub(super) fn write(&mut self, src: &[u8]) {
        assert!(src.len() <= self.bytes, "what is written fits");
        // SAFETY: the memory has at least `src.len()` bytes, by the line above; it is not part of any Rust object, so
        // `src` does not overlap it.
        unsafe { ptr::copy_nonoverlapping(src.as_ptr(), self.start, src.len()) };
    }
}

impl Drop for Pinned {
    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn drop(&mut self) {
        // SAFETY: the probe found the symbol; `new` got the memory freed here from cuMemHostAlloc.
        let _ = unsafe { sys::cuMemFreeHost(self.start.cast()) };
    }
}
