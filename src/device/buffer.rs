//! Memory of the host in which a batch is made: on a GPU page-locked, so that the GPU copies from it by itself.

use std::any::Any;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// What [`HostBuffer`]s stand on.
///
/// # Safety
/// From `start` on there are `bytes` initialised bytes, which stay there while `self` lives. Nothing writes them but through
/// the buffers made of `self`, and nothing reads them otherwise but a device.
#[expect(unsafe_code, reason = "buffers trust it")]
pub(crate) unsafe trait HostMemory: Any + Send + Sync + fmt::Debug {
    /// The first byte.
    fn start(&self) -> *mut u8;

    /// How many there are.
    fn bytes(&self) -> usize;

    /// Waits until no device reads them any more.
    fn wait(&self);
}

/// Bytes of the host's memory, from which a GPU copies by itself if they are [`Device::host_buffer`]'s.
///
/// [`Device::upload_buffer`] returns before the GPU has read them. To write them waits until it has, and so does giving
/// them back: nobody needs to think of it.
///
/// A buffer can be taken apart, so that several threads fill it, and put together again.
///
/// [`Device::host_buffer`]: crate::Device::host_buffer
/// [`Device::upload_buffer`]: crate::Device::upload_buffer
pub struct HostBuffer {
    memory: Arc<dyn HostMemory>,
    /// Where the buffer's bytes begin in the memory. No two buffers of a memory have bytes in common.
    offset: usize,
    bytes: usize,
}

impl HostBuffer {
    /// As many zeros, in ordinary memory.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self::of(Box::new(Plain(Box::into_raw(vec![0; bytes].into_boxed_slice()))))
    }

    /// All of a memory.
    pub(crate) fn of(memory: Box<dyn HostMemory>) -> Self {
        let bytes = memory.bytes();
        Self { memory: memory.into(), offset: 0, bytes }
    }

    /// The memory that it is a part of.
    #[cfg(feature = "cuda")]
    pub(crate) fn memory(&self) -> &dyn HostMemory {
        &*self.memory
    }

    /// Where in its memory it begins.
    #[cfg(feature = "cuda")]
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    /// Takes it apart into pieces of `bytes` bytes, in order; the last may have fewer.
    ///
    /// # Panics
    /// If `bytes` is 0.
    #[must_use]
    pub fn into_pieces(self, bytes: usize) -> Vec<Self> {
        let Self { memory, offset, bytes: all } = self;
        let piece = |at| {
            let bytes = bytes.min(all - at);
            Self { memory: Arc::clone(&memory), offset: offset + at, bytes }
        };
        (0..all).step_by(bytes).map(piece).collect()
    }

    /// Puts pieces together; `None` if there are none, or one does not begin where the one before it ends.
    #[must_use]
    pub fn join(pieces: impl IntoIterator<Item = Self>) -> Option<Self> {
        let mut pieces = pieces.into_iter();
        let mut whole = pieces.next()?;
        for piece in pieces {
            let follows = Arc::ptr_eq(&whole.memory, &piece.memory)
                && whole.offset + whole.bytes == piece.offset;
            if !follows {
                return None;
            }
            whole.bytes += piece.bytes;
        }
        Some(whole)
    }
}

impl Deref for HostBuffer {
    type Target = [u8];

    #[expect(unsafe_code, reason = "the one place that turns a buffer into a slice to read")]
    fn deref(&self) -> &[u8] {
        // SAFETY: `of`, `into_pieces` and `join` keep the range within the memory, which `self` keeps alive, and apart from
        // that of every other buffer; so who writes these bytes has borrowed `self` exclusively.
        unsafe { std::slice::from_raw_parts(self.memory.start().add(self.offset), self.bytes) }
    }
}

impl DerefMut for HostBuffer {
    #[expect(unsafe_code, reason = "the one place that turns a buffer into a slice to write")]
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.wait();
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.memory.start().add(self.offset), self.bytes) }
    }
}

impl Default for HostBuffer {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Clone for HostBuffer {
    /// The same bytes, in ordinary memory.
    fn clone(&self) -> Self {
        let mut copy = Self::new(self.bytes);
        copy.copy_from_slice(self);
        copy
    }
}

impl PartialEq for HostBuffer {
    /// Whether the bytes are the same, wherever they are.
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for HostBuffer {}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostBuffer({} bytes, {:?})", self.bytes, self.memory)
    }
}

/// Ordinary memory: a box of bytes, held by its address.
struct Plain(*mut [u8]);

impl fmt::Debug for Plain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Plain")
    }
}

#[expect(unsafe_code, reason = "a box that buffers share")]
mod plain {
    use super::*;

    // SAFETY: it owns its bytes and never reads or writes them; who may is settled by `HostBuffer`.
    unsafe impl Send for Plain {}
    // SAFETY: as above.
    unsafe impl Sync for Plain {}

    // SAFETY: the bytes are those of a box that only `drop` gives back; no device knows of them.
    unsafe impl HostMemory for Plain {
        fn start(&self) -> *mut u8 {
            self.0.cast()
        }

        fn bytes(&self) -> usize {
            self.0.len()
        }

        fn wait(&self) {}
    }

    impl Drop for Plain {
        fn drop(&mut self) {
            // SAFETY: `HostBuffer::new` made it of a box, which is given back once.
            drop(unsafe { Box::from_raw(self.0) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_written_by_several_threads_and_put_together_in_order() {
        let buffer = HostBuffer::new(11);
        let address = buffer.as_ptr();
        let mut pieces = buffer.into_pieces(4);
        assert_eq!(pieces.iter().map(|piece| piece.len()).collect::<Vec<_>>(), [4, 4, 3]);
        std::thread::scope(|scope| {
            for (i, piece) in pieces.iter_mut().enumerate() {
                scope.spawn(move || piece.fill(i as u8 + 1));
            }
        });
        let whole = HostBuffer::join(pieces).unwrap();
        assert_eq!(*whole, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]);
        assert_eq!(whole.as_ptr(), address, "nothing was copied");
        assert_eq!(whole.clone(), whole);
        assert_ne!(whole.clone().as_ptr(), address);
    }

    #[test]
    fn pieces_that_do_not_follow_each_other_stay_pieces() {
        let pieces = || HostBuffer::new(12).into_pieces(4);
        let mut swapped = pieces();
        swapped.swap(0, 1);
        let mut missing = pieces();
        missing.remove(1);
        let mut foreign = pieces();
        foreign[1] = pieces().remove(1);
        for pieces in [swapped, missing, foreign, Vec::new()] {
            assert!(HostBuffer::join(pieces).is_none());
        }
        let rest = HostBuffer::join(pieces().into_iter().skip(1)).unwrap();
        assert_eq!(rest.into_pieces(3).len(), 3);
    }
}
