//! Who owns memory: an [`Arena`] is one allocation, given out as disjoint tensors.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::cuda::{DevPtr, Gpu};
use crate::device::Place;
use crate::dtype::Element;
use crate::tensor::{ALIGN_BYTES, Shape};
use crate::{DType, Device, Error, Result, TensorMut, TensorRef};

/// One allocation, in the host's memory or a GPU's.
struct Memory {
    ptr: *mut u8,
    bytes: usize,
    place: Place,
    owner: Owner,
}

enum Owner {
    Host(Layout),
    Gpu(Gpu),
}

#[expect(unsafe_code, reason = "the one allocation behind an arena, and the views into it")]
mod memory {
    use super::*;

    // SAFETY: `Memory` is plain bytes; who may touch which of them is settled by `Tensor`, one region each.
    unsafe impl Send for Memory {}
    // SAFETY: as above; `Memory` itself never reads or writes its bytes.
    unsafe impl Sync for Memory {}

    impl Memory {
        pub(super) fn host(bytes: usize, what: &'static str) -> Result<Self> {
            let layout = Layout::from_size_align(bytes.max(ALIGN_BYTES), ALIGN_BYTES)
                .map_err(|_| Error::OutOfMemory { what, bytes })?;
            // SAFETY: the layout's size is not zero.
            let ptr = unsafe { alloc_zeroed(layout) };
            let ptr = NonNull::new(ptr).ok_or(Error::OutOfMemory { what, bytes })?.as_ptr();
            Ok(Self { ptr, bytes: layout.size(), place: Place::Host, owner: Owner::Host(layout) })
        }
    }

    impl Drop for Memory {
        fn drop(&mut self) {
            match &self.owner {
                // SAFETY: allocated in `host` with this layout, freed once: `Memory` is not `Clone`.
                Owner::Host(layout) => unsafe { dealloc(self.ptr, *layout) },
                Owner::Gpu(gpu) => gpu.driver().free(DevPtr(self.ptr.addr() as u64)),
            }
        }
    }

    impl TensorList {
        /// All elements of all tensors, and the padding between them, as one vector.
        #[must_use]
        pub fn flat(&self) -> TensorRef<'_> {
            let (ptr, shape) = (self.memory.at(self.offset), Shape::from(&[self.elems][..]));
            // SAFETY: `Arena::list` gave out this range of this memory, in bounds, to the list's tensors alone.
            unsafe { TensorRef::from_parts(ptr, shape, self.dtype, self.memory.place) }
        }

        /// As [`flat`](Self::flat), writable.
        #[must_use]
        pub fn flat_mut(&mut self) -> TensorMut<'_> {
            let (ptr, shape) = (self.memory.at(self.offset), Shape::from(&[self.elems][..]));
            // SAFETY: as in `flat`; the list owns its tensors and is borrowed exclusively, so no view of one lives.
            unsafe { TensorMut::from_parts(ptr, shape, self.dtype, self.memory.place) }
        }
    }

    impl Tensor {
        /// Read-only view.
        #[must_use]
        pub fn view(&self) -> TensorRef<'_> {
            let ptr = self.memory.at(self.offset);
            // SAFETY: `Arena::tensor` gave out `offset..offset + bytes` of this memory, in bounds, once.
            unsafe { TensorRef::from_parts(ptr, self.shape, self.dtype, self.memory.place) }
        }

        /// Writable view.
        #[must_use]
        pub fn view_mut(&mut self) -> TensorMut<'_> {
            let ptr = self.memory.at(self.offset);
            // SAFETY: as in `view`; the region belongs to this tensor alone, which is borrowed exclusively.
            unsafe { TensorMut::from_parts(ptr, self.shape, self.dtype, self.memory.place) }
        }
    }
}

impl Memory {
    fn new(dev: &Device, bytes: usize, what: &'static str) -> Result<Self> {
        match dev {
            Device::Cpu(_) => Self::host(bytes, what),
            Device::Cuda(gpu) => {
                let bytes = bytes.max(1);
                let ptr =
                    std::ptr::without_provenance_mut(gpu.driver().alloc(bytes, what)?.0 as usize);
                Ok(Self { ptr, bytes, place: gpu.place(), owner: Owner::Gpu(gpu.clone()) })
            }
        }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        self.ptr.wrapping_add(offset)
    }
}

/// A tensor that owns its region of an [`Arena`]. The arena's memory lives as long as any of its tensors.
pub struct Tensor {
    memory: Arc<Memory>,
    offset: usize,
    shape: Shape,
    dtype: DType,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({:?} {:?})", self.dtype, self.shape)
    }
}

/// Tensors of one dtype that lie side by side, to be used one by one or all at once (as an optimizer does).
pub struct TensorList {
    tensors: Vec<Tensor>,
    memory: Arc<Memory>,
    offset: usize,
    elems: usize,
    dtype: DType,
}

impl std::fmt::Debug for TensorList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorList({} x {:?}, {} elements)", self.tensors.len(), self.dtype, self.elems)
    }
}

impl TensorList {
    /// Tensor `index`, read-only.
    ///
    /// # Panics
    /// If there is no such tensor.
    #[must_use]
    pub fn view(&self, index: usize) -> TensorRef<'_> {
        self.tensors[index].view()
    }

    /// Several different tensors, writable at once.
    ///
    /// # Panics
    /// If an index is out of range or given twice.
    #[must_use]
    pub fn views_mut<const N: usize>(&mut self, indices: [usize; N]) -> [TensorMut<'_>; N] {
        self.tensors
            .get_disjoint_mut(indices)
            .expect("each index names another tensor of the list")
            .map(Tensor::view_mut)
    }

    /// All tensors, writable at once.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = TensorMut<'_>> {
        self.tensors.iter_mut().map(Tensor::view_mut)
    }

    /// Where tensor `index` starts in [`flat`](Self::flat), in elements.
    ///
    /// # Panics
    /// If there is no such tensor.
    #[must_use]
    pub fn offset(&self, index: usize) -> usize {
        (self.tensors[index].offset - self.offset) / self.dtype.size_bytes()
    }

    /// Elements of all tensors and the padding between them.
    #[must_use]
    pub fn elems(&self) -> usize {
        self.elems
    }

    /// Number of tensors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
}

impl Tensor {
    /// The extents, outermost first.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        self.shape.dims()
    }

    /// Read-only view of `range` of the flattened elements.
    ///
    /// # Panics
    /// If the range is not inside the tensor.
    #[must_use]
    pub fn slice<T: Element>(&self, range: Range<usize>) -> &[T] {
        &self.view().as_slice()[range]
    }
}

/// One allocation, given out as disjoint tensors. Zeroed at first on the host; on a GPU what it holds is undefined.
pub struct Arena {
    /// `None` while sizes are only being counted.
    memory: Option<Arc<Memory>>,
    used: usize,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Arena({} bytes)", self.used)
    }
}

impl Arena {
    /// Builds a set of tensors in one allocation of the device: `carve` runs twice, first to count the bytes, then to
    /// get them. Returns what `carve` made and the size in bytes. `what` names the arena when there is not enough memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the system refuses the bytes.
    ///
    /// # Panics
    /// If `carve` does not carve the same tensors both times.
    pub fn build<T>(
        dev: &Device,
        what: &'static str,
        carve: impl Fn(&mut Arena) -> T,
    ) -> Result<(T, usize)> {
        let bytes = Self::count(&carve);
        let memory = Arc::new(Memory::new(dev, bytes, what)?);
        let mut arena = Self { memory: Some(memory), used: 0 };
        let tensors = carve(&mut arena);
        assert_eq!(arena.used, bytes, "both passes carve the same tensors");
        Ok((tensors, bytes))
    }

    /// Bytes of the tensors that `carve` makes.
    pub(crate) fn count<T>(carve: impl Fn(&mut Arena) -> T) -> usize {
        // The tensors of the counting pass share one tiny block and are dropped unread.
        let mut counting = Self { memory: None, used: 0 };
        drop(carve(&mut counting));
        counting.used
    }

    /// The next tensor of the arena.
    ///
    /// # Panics
    /// If more is carved than was counted (see [`build`](Self::build)).
    pub fn tensor(&mut self, dtype: DType, shape: &[usize]) -> Tensor {
        self.padded(dtype, shape, 1)
    }

    /// The next tensors of the arena, side by side. Each starts at the same element in every dtype.
    pub fn list(&mut self, dtype: DType, shapes: &[Shape]) -> TensorList {
        let offset = self.used;
        let padded = |shape: &Shape| self.padded(dtype, shape.dims(), ALIGN_BYTES);
        let tensors: Vec<_> = shapes.iter().map(padded).collect();
        match &self.memory {
            Some(memory) => {
                let elems = (self.used - offset) / dtype.size_bytes();
                TensorList { tensors, memory: memory.clone(), offset, elems, dtype }
            }
            None => {
                let memory = Tensor::counted(dtype).memory;
                TensorList { tensors, memory, offset: 0, elems: 0, dtype }
            }
        }
    }

    /// The next tensor, which takes a multiple of `elems` elements.
    fn padded(&mut self, dtype: DType, shape: &[usize], elems: usize) -> Tensor {
        let shape = Shape::from(shape);
        let offset = self.used;
        let bytes = shape.elems().next_multiple_of(elems) * dtype.size_bytes();
        self.used += bytes.next_multiple_of(ALIGN_BYTES);
        match &self.memory {
            Some(memory) => {
                assert!(self.used <= memory.bytes, "carved no more than was counted");
                Tensor { memory: memory.clone(), offset, shape, dtype }
            }
            None => Tensor::counted(dtype),
        }
    }
}

impl Tensor {
    /// A tensor with an allocation of its own, of exactly its bytes on a GPU.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(dev: &Device, dtype: DType, shape: &[usize]) -> Result<Self> {
        let shape = Shape::from(shape);
        let memory = Memory::new(dev, shape.elems() * dtype.size_bytes(), "tensor")?;
        Ok(Self { memory: Arc::new(memory), offset: 0, shape, dtype })
    }

    /// A tensor that holds a copy of these numbers.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the shape has as many elements; [`Error::OutOfMemory`]; [`Error::Gpu`].
    pub fn holding<T: Element>(dev: &Device, values: &[T], shape: &[usize]) -> Result<Self> {
        let mut tensor = Self::new(dev, T::DTYPE, shape)?;
        dev.upload(tensor.view_mut(), values)?;
        Ok(tensor)
    }

    /// A stand-in during the counting pass: no elements, so that touching it cannot reach past its memory.
    fn counted(dtype: DType) -> Self {
        let memory = Memory::host(0, "counting").expect("128 bytes can be had");
        Self { memory: Arc::new(memory), offset: 0, shape: Shape::from(&[0][..]), dtype }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_gives_out_disjoint_aligned_zeroed_tensors() {
        let (mut tensors, bytes) = Arena::build(&Device::cpu(), "test", |arena| {
            [arena.tensor(DType::F32, &[3, 5]), arena.tensor(DType::F64, &[7])]
        })
        .unwrap();
        assert_eq!(bytes, 256);
        let [a, b] = &mut tensors;
        assert_eq!(a.view().as_slice::<f32>(), [0.0; 15]);
        a.view_mut().into_slice::<f32>().fill(1.0);
        b.view_mut().into_slice::<f64>().fill(2.0);
        assert_eq!(a.view().as_slice::<f32>(), [1.0; 15]);
        assert_eq!(b.view().as_slice::<f64>(), [2.0; 7]);
        assert_eq!(b.view().as_slice::<f64>().as_ptr().align_offset(ALIGN_BYTES), 0);
    }

    #[test]
    fn a_list_is_one_vector_of_its_tensors() {
        let shapes = [Shape::from(&[3, 5][..]), Shape::from(&[2][..])];
        let (mut list, _) =
            Arena::build(&Device::cpu(), "test", |arena| arena.list(DType::F32, &shapes)).unwrap();
        let [b, a] = list.views_mut([1, 0]);
        a.into_slice::<f32>().fill(1.0);
        b.into_slice::<f32>().fill(2.0);
        assert_eq!(list.offset(1), 128);
        let flat = list.flat().as_slice::<f32>();
        assert_eq!(flat.len(), 256);
        let at = [14, 15, 128, 129, 130].map(|i| flat[i]);
        assert_eq!(at, [1.0, 0.0, 2.0, 2.0, 0.0]);
        list.flat_mut().into_slice::<f32>().fill(3.0);
        assert_eq!(list.view(0).as_slice::<f32>(), [3.0; 15]);
    }
}
