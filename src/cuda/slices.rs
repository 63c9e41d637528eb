//! Memory of cudarc's as tensors: no copy, no pointer, and the order that cudarc promises.
//!
//! Each `CudaSlice` of cudarc has two events, of its last read and its last write. Whoever takes its address for use on a
//! stream makes that stream wait for them, and gets a guard that marks the use when dropped. The views here are that
//! address with that guard: they wait for what cudarc enqueued before, and what it enqueues after them waits for what was
//! enqueued with them, whatever the streams.

use std::sync::Arc;

use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceSlice, SyncOnDrop};

use super::Gpu;
use crate::dtype::Element;
use crate::{Error, Result, TensorMut, TensorRef};

/// A slice of cudarc's as a tensor to read. Hold it until the ops that read it have been called.
#[derive(Debug)]
pub struct SliceRef<'a> {
    tensor: TensorRef<'a>,
    _reads: SyncOnDrop<'a>,
}

impl SliceRef<'_> {
    /// The tensor.
    #[must_use]
    pub fn tensor(&self) -> TensorRef<'_> {
        self.tensor
    }
}

/// A slice of cudarc's as a tensor to write. Hold it until the ops that write it have been called.
#[derive(Debug)]
pub struct SliceMut<'a> {
    tensor: TensorMut<'a>,
    _writes: SyncOnDrop<'a>,
}

impl SliceMut<'_> {
    /// The tensor, to write.
    #[must_use]
    pub fn tensor_mut(&mut self) -> TensorMut<'_> {
        self.tensor.reborrow()
    }

    /// The tensor, to read.
    #[must_use]
    pub fn tensor(&self) -> TensorRef<'_> {
        self.tensor.as_ref()
    }
}

impl Gpu {
    /// The same GPU with a stream of cudarc's, which it keeps alive; slices of cudarc's become tensors by
    /// [`view`](Self::view). Kernels and matrix plans are common to both; tensors are not, as nothing would order their
    /// uses. What the stream captures for its owner: see [`on_stream`](Self::on_stream).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a stream of another context than the GPU's primary one; [`Error::Gpu`].
    #[expect(unsafe_code, reason = "hands over a pointer")]
    pub fn borrow(&self, stream: &Arc<CudaStream>) -> Result<Self> {
        self.expect_own("stream", stream)?;
        // SAFETY: the stream is one of this GPU's primary context, by the line above, and lives as long as the Arc, which
        // every clone of the result holds, with it its tensors and recordings. `Gpu::new` numbers the result anew, so ops
        // refuse a tensor of `self` on it, and the reverse.
        let gpu = unsafe { self.on_stream(stream.cu_stream().cast()) }?;
        Ok(Self { cudarc: Some(Arc::clone(stream)), ..Self::new(gpu.driver) })
    }

    /// A slice of cudarc's, or a part of one, as a tensor of this shape to read: `gpu.view(slice.as_view(), &[rows, cols])`.
    /// Work enqueued with the tensor comes after what has written the slice.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the shape has as many elements as the slice; [`Error::Invalid`] if the GPU does not
    /// [`borrow`](Self::borrow) a stream of the slice's context; [`Error::Gpu`].
    #[expect(unsafe_code, reason = "views memory of cudarc's")]
    pub fn view<'a, T: Element>(
        &'a self,
        slice: CudaView<'a, T>,
        shape: &[usize],
    ) -> Result<SliceRef<'a>> {
        let stream = self.expect_view(&slice, shape)?;
        let (address, reads) = slice.view_ptr(stream);
        expect_ordered(stream)?;
        let ptr = std::ptr::without_provenance(address as usize);
        // SAFETY: cudarc's slice has `shape` elements, by `expect_view`, in this context's memory; it is borrowed for 'a. Work
        // goes to `stream`, after the last write, by `view_ptr`; what cudarc writes or frees later waits for `reads`, which
        // outlives the tensor, as `SliceRef` lends it only.
        let tensor = unsafe { TensorRef::from_raw(self.place(), ptr, T::DTYPE, shape) }?;
        Ok(SliceRef { tensor, _reads: reads })
    }

    /// As [`view`](Self::view), to write: `gpu.view_mut(slice.as_view_mut(), &[rows, cols])`. Work enqueued with the tensor
    /// comes after what has read or written the slice.
    ///
    /// # Errors
    /// As [`view`](Self::view).
    #[expect(unsafe_code, reason = "views memory of cudarc's")]
    pub fn view_mut<'a, T: Element>(
        &'a self,
        slice: CudaViewMut<'a, T>,
        shape: &[usize],
    ) -> Result<SliceMut<'a>> {
        let stream = self.expect_view(&slice, shape)?;
        let (address, writes) = slice.view_ptr_mut(stream);
        expect_ordered(stream)?;
        let ptr = std::ptr::without_provenance_mut(address as usize);
        // SAFETY: as in `view`; the slice is borrowed exclusively, and work with it comes after its last reads too.
        let tensor = unsafe { TensorMut::from_raw(self.place(), ptr, T::DTYPE, shape) }?;
        Ok(SliceMut { tensor, _writes: writes })
    }

    /// Judges a slice that is to be a tensor, and gives the stream that work with it goes to.
    fn expect_view<T: Element>(
        &self,
        slice: &impl DeviceSlice<T>,
        shape: &[usize],
    ) -> Result<&CudaStream> {
        let Some(stream) = &self.cudarc else {
            let why = "is of cudarc's, this GPU has no stream of cudarc's; view it with one made by Gpu::borrow";
            return Err(Error::invalid("slice", why));
        };
        self.expect_own("slice", slice.stream())?;
        // More dimensions than a tensor has are refused when it is made.
        let elems = shape.iter().try_fold(1usize, |elems, &extent| elems.checked_mul(extent));
        if elems != Some(slice.len()) {
            let expected = format!("{} elements in all, those of the slice", slice.len());
            return Err(Error::Shape { op: "view", arg: "shape", expected, found: shape.to_vec() });
        }
        Ok(stream)
    }

    /// Refuses a stream, or what was made on it, of another context.
    fn expect_own(&self, what: &str, stream: &CudaStream) -> Result<()> {
        if self.driver.context() == Some(stream.context().cu_ctx().addr()) {
            return Ok(());
        }
        let why = format!(
            "is not of the primary context of this {}; make it there, with CudaContext::new",
            self.properties().name
        );
        Err(Error::invalid(what, why))
    }
}

/// cudarc keeps an error to itself where it cannot return it. One of the waits just enqueued would leave the order to chance.
fn expect_ordered(stream: &CudaStream) -> Result<()> {
    stream.context().check_err().map_err(|error| {
        let why = format!("{error}; make views before a capture begins, not during it");
        Error::Gpu { action: "order its streams", why }
    })
}
