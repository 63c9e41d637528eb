//! Copies from the host that neither wait for earlier work nor overtake it.
//!
//! A copy straight to its destination would have to wait for the work that still reads what is there. So large ones
//! travel beside that work, on a stream of their own, to a staging area, and from there, after it, within the GPU at the
//! speed of its memory. Small ones are enqueued as they are. Either way the source is first copied to pinned memory, so
//! it may be reused at once; unless it is pinned itself ([`Outbox`]), and knows when it may.

use std::ffi::c_void;
use std::ops::Range;

use cudarc::driver::sys;

use super::handles::{Event, Memory, Pinned, Stream, check};
use super::outbox::Outbox;
use crate::{Error, Result};

/// What this file calls.
pub(super) const SYMBOLS: [&str; 4] =
    ["cuMemcpyDtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2", "cuMemsetD8Async"];

/// Up to here a copy is small: step counters, learning rates, ids.
const SMALL_BYTES: usize = 64 << 10;
/// Small copies under way at a time.
const SMALL_SLOTS: usize = 16;
/// Most bytes of a staging area: 1024 images of 224 x 224. Larger copies go in pieces.
const LARGE_BYTES: usize = 160 << 20;
/// Staging areas: one is filled while the other waits for its turn.
const LARGE_SLOTS: usize = 2;
/// Names them in messages.
const WHAT: &str = "the staging area for uploads";

/// What copies from the host go through.
#[derive(Debug)]
pub(super) struct Uploads {
    small: Vec<Small>,
    next_small: usize,
    large: Vec<Large>,
    next_large: usize,
    fetched: Fetched,
    stream: Stream,
}

#[derive(Debug)]
struct Small {
    host: Pinned,
    /// After the last copy out of `host`.
    done: Event,
}

#[derive(Debug)]
struct Large {
    /// Made and grown when needed.
    staging: Option<(Pinned, Memory)>,
    /// After the last copy from host to staging.
    arrived: Event,
    /// After the last copy from staging to its destination.
    done: Event,
}

/// Where what is fetched from an [`Outbox`] arrives: all of it, so that it can travel while earlier work runs.
#[derive(Debug)]
struct Fetched {
    /// Its bytes. Made and grown when needed.
    staging: Option<(usize, Memory)>,
    /// After the last copy from host to staging.
    arrived: Event,
    /// After the last copy from staging to its destination.
    done: Event,
}

impl Uploads {
    pub(super) fn new() -> Result<Self> {
        let small = |_| Ok(Small { host: Pinned::new(SMALL_BYTES, WHAT)?, done: Event::new()? });
        let large = |_| Ok(Large { staging: None, arrived: Event::new()?, done: Event::new()? });
        Ok(Self {
            small: (0..SMALL_SLOTS).map(small).collect::<Result<_>>()?,
            next_small: 0,
            large: (0..LARGE_SLOTS).map(large).collect::<Result<_>>()?,
            next_large: 0,
            fetched: Fetched { staging: None, arrived: Event::new()?, done: Event::new()? },
            stream: Stream::new()?,
        })
    }

    /// Enqueues a copy after the work of `stream` and before what it is given later.
    pub(super) fn copy(
        &mut self,
        dst: sys::CUdeviceptr,
        src: &[u8],
        stream: &Stream,
    ) -> Result<()> {
        if src.len() <= SMALL_BYTES {
            return self.copy_small(dst, src, stream);
        }
        let addresses = (dst..).step_by(LARGE_BYTES);
        src.chunks(LARGE_BYTES)
            .zip(addresses)
            .try_for_each(|(src, dst)| self.copy_large(dst, src, stream))
    }

    fn copy_small(&mut self, dst: sys::CUdeviceptr, src: &[u8], stream: &Stream) -> Result<()> {
        let slot = &mut self.small[self.next_small];
        self.next_small = (self.next_small + 1) % SMALL_SLOTS;
        slot.done.synchronize()?;
        slot.host.write(src);
        to_gpu(dst, &slot.host, 0..src.len(), stream)?;
        slot.done.record(stream)
    }

    fn copy_large(&mut self, dst: sys::CUdeviceptr, src: &[u8], stream: &Stream) -> Result<()> {
        let slot = &mut self.large[self.next_large];
        self.next_large = (self.next_large + 1) % LARGE_SLOTS;
        slot.done.synchronize()?;
        if slot.staging.as_ref().is_none_or(|(host, _)| host.bytes() < src.len()) {
            // Whole MiB, so that batches of slightly different sizes share it.
            let bytes = src.len().next_multiple_of(1 << 20);
            slot.staging = None;
            slot.staging = match staging(bytes) {
                Ok(staging) => Some(staging),
                // Without memory to spare the copy goes in small pieces and waits for earlier work.
                Err(Error::OutOfMemory { .. }) => None,
                Err(error) => return Err(error),
            };
        }
        let Some((host, gpu)) = &mut slot.staging else {
            let addresses = (dst..).step_by(SMALL_BYTES);
            return src
                .chunks(SMALL_BYTES)
                .zip(addresses)
                .try_for_each(|(src, dst)| self.copy_small(dst, src, stream));
        };
        host.write(src);
        to_gpu(gpu.address(), host, 0..src.len(), &self.stream)?;
        slot.arrived.record(&self.stream)?;
        stream.wait(&slot.arrived)?;
        within_gpu(dst, gpu.address(), src.len(), stream)?;
        slot.done.record(stream)
    }

    /// As [`copy`](Self::copy), straight from pinned memory, which is read after this returns and written after that only.
    /// Makes the host wait for the GPU once, when the first batch of a size comes.
    pub(super) fn fetch(
        &mut self,
        dst: sys::CUdeviceptr,
        src: &Outbox,
        range: Range<usize>,
        stream: &Stream,
    ) -> Result<()> {
        let bytes = range.len();
        let Some(staging) = self.fetched.room(bytes)? else {
            // Nothing to gain, or no memory to spare: in its turn among the stream's work.
            return src.read_on(stream, |host| to_gpu(dst, host, range, stream));
        };
        let Self { fetched, stream: beside, .. } = self;
        beside.wait(&fetched.done)?;
        src.read_on(beside, |host| to_gpu(staging, host, range, beside))?;
        fetched.arrived.record(beside)?;
        stream.wait(&fetched.arrived)?;
        within_gpu(dst, staging, bytes, stream)?;
        fetched.done.record(stream)
    }
}

impl Fetched {
    /// Address of a staging area of so many bytes; `None` if they are few, or there is no memory for them.
    fn room(&mut self, bytes: usize) -> Result<Option<sys::CUdeviceptr>> {
        if bytes <= SMALL_BYTES {
            return Ok(None);
        }
        if self.staging.as_ref().is_none_or(|(room, _)| *room < bytes) {
            self.done.synchronize()?;
            self.staging = None;
            let room = bytes.next_multiple_of(1 << 20);
            self.staging = match Memory::new(room, WHAT) {
                Ok(memory) => Some((room, memory)),
                Err(Error::OutOfMemory { .. }) => None,
                Err(error) => return Err(error),
            };
        }
        Ok(self.staging.as_ref().map(|(_, memory)| memory.address()))
    }
}

fn staging(bytes: usize) -> Result<(Pinned, Memory)> {
    Ok((Pinned::new(bytes, WHAT)?, Memory::new(bytes, WHAT)?))
}

#[expect(unsafe_code, reason = "calls into libcuda")]
fn to_gpu(dst: sys::CUdeviceptr, src: &Pinned, range: Range<usize>, stream: &Stream) -> Result<()> {
    assert!(range.start <= range.end && range.end <= src.bytes(), "what is read is there");
    let start = src.start().wrapping_add(range.start).cast::<c_void>();
    // SAFETY: the probe found the symbol; the range lies within `src`, by the line above, which is neither written nor freed
    // before the event that the caller records after this copy is reached.
    let status = unsafe { sys::cuMemcpyHtoDAsync_v2(dst, start, range.len(), stream.handle()) };
    check("copy from the host", status)
}

/// Copies from the host and waits for it: simple, for what is done once.
#[expect(unsafe_code, reason = "calls into libcuda")]
pub(crate) fn upload(dst: sys::CUdeviceptr, src: &[u8], stream: &Stream) -> Result<()> {
    let start = src.as_ptr().cast::<c_void>();
    // SAFETY: the probe found the symbol; `src` has the bytes given and is borrowed until the wait below is over.
    let status = unsafe { sys::cuMemcpyHtoDAsync_v2(dst, start, src.len(), stream.handle()) };
    let waited = stream.synchronize();
    check("copy from the host", status)?;
    check("copy from the host", waited)
}

/// Copies to the host and waits for it. The status, since it may be about earlier work.
#[expect(unsafe_code, reason = "calls into libcuda")]
pub(super) fn to_host(dst: &mut [u8], src: sys::CUdeviceptr, stream: &Stream) -> sys::CUresult {
    let start = dst.as_mut_ptr().cast::<c_void>();
    // SAFETY: the probe found the symbol; `dst` has the bytes given and is borrowed until the wait below is over, which
    // is not left out when the enqueuing fails.
    let enqueued = unsafe { sys::cuMemcpyDtoHAsync_v2(start, src, dst.len(), stream.handle()) };
    let waited = stream.synchronize();
    if enqueued == sys::CUresult::CUDA_SUCCESS { waited } else { enqueued }
}

/// Enqueues a copy on the device.
#[expect(unsafe_code, reason = "calls into libcuda")]
pub(crate) fn within_gpu(
    dst: sys::CUdeviceptr,
    src: sys::CUdeviceptr,
    bytes: usize,
    stream: &Stream,
) -> Result<()> {
    // SAFETY: the probe found the symbol; both addresses are used by the GPU only, which reports wrong ones.
    let status = unsafe { sys::cuMemcpyDtoDAsync_v2(dst, src, bytes, stream.handle()) };
    check("copy", status)
}

/// Enqueues zeros.
#[expect(unsafe_code, reason = "calls into libcuda")]
pub(super) fn clear(dst: sys::CUdeviceptr, bytes: usize, stream: &Stream) -> Result<()> {
    // SAFETY: the probe found the symbol; the address is used by the GPU only, which reports a wrong one.
    check("clear", unsafe { sys::cuMemsetD8Async(dst, 0, bytes, stream.handle()) })
}
