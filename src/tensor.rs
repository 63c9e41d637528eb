//! Tensors: contiguous, row-major, typed at run time. Views own nothing and do no arithmetic; [`Arena`] owns memory.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::dtype::Element;
use crate::{DType, Error, Result};

/// Extents of up to four dimensions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [usize; 4],
    rank: usize,
}

impl Shape {
    /// The extents, outermost first.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// Number of elements.
    #[must_use]
    pub fn elems(&self) -> usize {
        self.dims().iter().product()
    }
}

impl From<&[usize]> for Shape {
    /// # Panics
    /// If there are more than four dimensions.
    fn from(extents: &[usize]) -> Self {
        assert!(extents.len() <= 4, "a tensor has at most four dimensions");
        let mut dims = [1; 4];
        dims[..extents.len()].copy_from_slice(extents);
        Self { dims, rank: extents.len() }
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.dims().fmt(f)
    }
}

/// Read-only view of a tensor.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    ptr: *const u8,
    shape: Shape,
    dtype: DType,
    life: PhantomData<&'a [u8]>,
}

/// Writable view of a tensor.
#[derive(Debug)]
pub struct TensorMut<'a> {
    ptr: *mut u8,
    shape: Shape,
    dtype: DType,
    life: PhantomData<&'a mut [u8]>,
}

macro_rules! common {
    ($view:ident) => {
        impl $view<'_> {
            /// The extents, outermost first.
            #[must_use]
            pub fn shape(&self) -> &[usize] {
                self.shape.dims()
            }

            /// The element type.
            #[must_use]
            pub fn dtype(&self) -> DType {
                self.dtype
            }

            /// Number of elements.
            #[must_use]
            pub fn elems(&self) -> usize {
                self.shape.elems()
            }

            /// Refuses the tensor unless it has this dtype and shape.
            pub(crate) fn expect(
                &self,
                op: &'static str,
                arg: &'static str,
                dtype: DType,
                shape: &[usize],
            ) -> Result<()> {
                if self.dtype != dtype {
                    let expected = format!("{dtype:?}");
                    return Err(Error::DType { op, arg, expected, found: self.dtype });
                }
                if self.shape() != shape {
                    let expected = format!("{shape:?}");
                    return Err(Error::Shape { op, arg, expected, found: self.shape().to_vec() });
                }
                Ok(())
            }

            /// The extents, if there are `N` of them.
            pub(crate) fn dims<const N: usize>(
                &self,
                op: &'static str,
                arg: &'static str,
                letters: &'static str,
            ) -> Result<[usize; N]> {
                self.shape().try_into().map_err(|_| Error::Shape {
                    op,
                    arg,
                    expected: letters.into(),
                    found: self.shape().to_vec(),
                })
            }

            /// Refuses the tensor unless it holds f32 or f64.
            pub(crate) fn expect_real(&self, op: &'static str, arg: &'static str) -> Result<DType> {
                match self.dtype {
                    DType::F32 | DType::F64 => Ok(self.dtype),
                    found => Err(Error::DType { op, arg, expected: "F32 or F64".into(), found }),
                }
            }
        }
    };
}
common!(TensorRef);
common!(TensorMut);

fn expect_len(len: usize, shape: &Shape) -> Result<()> {
    if len == shape.elems() {
        return Ok(());
    }
    let expected = format!("{} elements in all, one for each given", len);
    Err(Error::Shape { op: "tensor", arg: "shape", expected, found: shape.dims().to_vec() })
}

impl<'a> TensorRef<'a> {
    /// Views `data` as a tensor of this shape.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the shape has as many elements as `data`.
    pub fn new<T: Element>(data: &'a [T], shape: &[usize]) -> Result<Self> {
        let shape = Shape::from(shape);
        expect_len(data.len(), &shape)?;
        Ok(Self { ptr: data.as_ptr().cast(), shape, dtype: T::DTYPE, life: PhantomData })
    }

    /// The elements.
    ///
    /// # Panics
    /// If the tensor does not hold `T`: the op's `check` has judged that.
    #[expect(unsafe_code, reason = "the one place that turns a checked view back into a slice")]
    #[must_use]
    pub fn as_slice<T: Element>(&self) -> &'a [T] {
        assert_eq!(self.dtype, T::DTYPE);
        // SAFETY: a view is only made from memory that holds `elems` elements of its dtype and is borrowed for 'a.
        unsafe { std::slice::from_raw_parts(self.ptr.cast(), self.elems()) }
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the number of elements stays the same.
    pub fn reshaped(self, shape: &[usize]) -> Result<Self> {
        let shape = Shape::from(shape);
        expect_len(self.elems(), &shape)?;
        Ok(Self { shape, ..self })
    }

    /// The only element of a real tensor, widened.
    ///
    /// # Panics
    /// If there is another number of elements, or they are neither f32 nor f64.
    #[must_use]
    pub fn scalar(&self) -> f64 {
        assert_eq!(self.elems(), 1, "a scalar has one element");
        match self.dtype {
            DType::F64 => self.as_slice::<f64>()[0],
            _ => f64::from(self.as_slice::<f32>()[0]),
        }
    }

    /// The first `at` elements of a vector, and the others.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn split_at(self, at: usize) -> (Self, Self) {
        let bytes = at * self.dtype.size_bytes();
        assert!(at <= self.elems(), "a vector is split inside");
        let part = |skip: usize, elems: usize| Self {
            ptr: self.ptr.wrapping_add(skip),
            shape: Shape::from(&[elems][..]),
            ..self
        };
        (part(0, at), part(bytes, self.elems() - at))
    }
}

impl<'a> TensorMut<'a> {
    /// Views `data` as a writable tensor of this shape.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the shape has as many elements as `data`.
    pub fn new<T: Element>(data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        let shape = Shape::from(shape);
        expect_len(data.len(), &shape)?;
        Ok(Self { ptr: data.as_mut_ptr().cast(), shape, dtype: T::DTYPE, life: PhantomData })
    }

    /// The elements.
    ///
    /// # Panics
    /// If the tensor does not hold `T`: the op's `check` has judged that.
    #[expect(unsafe_code, reason = "the one place that turns a checked view back into a slice")]
    #[must_use]
    pub fn into_slice<T: Element>(self) -> &'a mut [T] {
        assert_eq!(self.dtype, T::DTYPE);
        // SAFETY: a view is only made from memory that holds `elems` elements of its dtype, exclusively borrowed
        // for 'a; consuming the view hands that borrow on.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.cast(), self.elems()) }
    }

    /// The first `at` elements of a vector, and the others.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn split_at(self, at: usize) -> (Self, Self) {
        let bytes = at * self.dtype.size_bytes();
        assert!(at <= self.elems(), "a vector is split inside");
        let part = |skip: usize, elems: usize| Self {
            ptr: self.ptr.wrapping_add(skip),
            shape: Shape::from(&[elems][..]),
            ..self
        };
        (part(0, at), part(bytes, self.elems() - at))
    }

    /// Sets every byte to zero, which is the number 0 in every dtype.
    #[expect(unsafe_code, reason = "bytes of any dtype")]
    pub fn clear(&mut self) {
        // SAFETY: the view covers `elems` elements, exclusively borrowed; all-zero bytes are valid in every dtype.
        unsafe { self.ptr.write_bytes(0, self.elems() * self.dtype.size_bytes()) }
    }

    /// A shorter-lived view of the same elements.
    #[must_use]
    pub fn reborrow(&mut self) -> TensorMut<'_> {
        TensorMut { ptr: self.ptr, shape: self.shape, dtype: self.dtype, life: PhantomData }
    }

    /// Read-only view of the same elements.
    #[must_use]
    pub fn as_ref(&self) -> TensorRef<'_> {
        TensorRef { ptr: self.ptr, shape: self.shape, dtype: self.dtype, life: PhantomData }
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the number of elements stays the same.
    pub fn reshaped(self, shape: &[usize]) -> Result<Self> {
        let shape = Shape::from(shape);
        expect_len(self.elems(), &shape)?;
        Ok(Self { shape, ..self })
    }

    /// Splits a workspace (dtype U8) into `T` elements and the rest.
    ///
    /// # Panics
    /// If the workspace is too small: the op's `check` has judged that.
    pub(crate) fn carve<T: Element>(self, elems: usize) -> (&'a mut [T], TensorMut<'a>) {
        let bytes = self.into_slice::<u8>();
        let skip = bytes.as_ptr().align_offset(ALIGN_BYTES);
        let end = skip + elems * size_of::<T>();
        let (head, tail) = bytes.split_at_mut(end);
        let len = tail.len();
        let rest = TensorMut::new(tail, &[len]).expect("the length is its own");
        (bytemuck::cast_slice_mut(&mut head[skip..]), rest)
    }
}

/// Bytes of workspace that [`TensorMut::carve`] may take for `elems` elements of `T`, wherever the workspace starts.
pub(crate) const fn carve_bytes(dtype: DType, elems: usize) -> usize {
    elems * dtype.size_bytes() + ALIGN_BYTES
}

/// Refuses a workspace that is not bytes, or too few of them.
pub(crate) fn expect_workspace(
    op: &'static str,
    workspace: &TensorMut<'_>,
    needed: usize,
) -> Result<()> {
    if workspace.dtype() != DType::U8 {
        let found = workspace.dtype();
        return Err(Error::DType { op, arg: "workspace", expected: "U8".into(), found });
    }
    let found = workspace.elems();
    if found < needed { Err(Error::Workspace { op, needed, found }) } else { Ok(()) }
}

/// Alignment of every tensor in an arena: two cache lines, as much as any kernel asks for.
const ALIGN_BYTES: usize = 128;

struct Memory {
    ptr: NonNull<u8>,
    layout: Layout,
}

#[expect(unsafe_code, reason = "the one allocation behind an arena, and the views into it")]
mod memory {
    use super::*;

    // SAFETY: `Memory` is plain bytes; who may touch which of them is settled by `Tensor`, one region each.
    unsafe impl Send for Memory {}
    // SAFETY: as above; `Memory` itself never reads or writes its bytes.
    unsafe impl Sync for Memory {}

    // SAFETY: a `TensorRef` is a shared borrow of plain numbers, as `&[u8]` is.
    unsafe impl Send for TensorRef<'_> {}
    // SAFETY: as above.
    unsafe impl Sync for TensorRef<'_> {}
    // SAFETY: a `TensorMut` is an exclusive borrow of plain numbers, as `&mut [u8]` is.
    unsafe impl Send for TensorMut<'_> {}
    // SAFETY: a shared `&TensorMut` only reads.
    unsafe impl Sync for TensorMut<'_> {}

    impl Memory {
        pub(super) fn zeroed(bytes: usize, what: &'static str) -> Result<Self> {
            let layout = Layout::from_size_align(bytes.max(ALIGN_BYTES), ALIGN_BYTES)
                .map_err(|_| Error::OutOfMemory { what, bytes })?;
            // SAFETY: the layout's size is not zero.
            let ptr = unsafe { alloc_zeroed(layout) };
            let ptr = NonNull::new(ptr).ok_or(Error::OutOfMemory { what, bytes })?;
            Ok(Self { ptr, layout })
        }
    }

    impl Drop for Memory {
        fn drop(&mut self) {
            // SAFETY: allocated in `zeroed` with this layout, freed once: `Memory` is not `Clone`.
            unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
        }
    }

    impl TensorList {
        /// All elements of all tensors, and the zero padding between them, as one vector.
        #[must_use]
        pub fn flat(&self) -> TensorRef<'_> {
            // SAFETY: `Arena::list` gave out this range of this memory, in bounds, to the list's tensors alone.
            let ptr = unsafe { self.memory.ptr.as_ptr().add(self.offset) };
            let shape = Shape::from(&[self.elems][..]);
            TensorRef { ptr, shape, dtype: self.dtype, life: PhantomData }
        }

        /// As [`flat`](Self::flat), writable.
        #[must_use]
        pub fn flat_mut(&mut self) -> TensorMut<'_> {
            // SAFETY: as in `flat`; the list owns its tensors and is borrowed exclusively, so no view of one lives.
            let ptr = unsafe { self.memory.ptr.as_ptr().add(self.offset) };
            let shape = Shape::from(&[self.elems][..]);
            TensorMut { ptr, shape, dtype: self.dtype, life: PhantomData }
        }
    }

    impl Tensor {
        /// Read-only view.
        #[must_use]
        pub fn view(&self) -> TensorRef<'_> {
            // SAFETY: `Arena::tensor` gave out `offset..offset + bytes` of this memory, in bounds, once.
            let ptr = unsafe { self.memory.ptr.as_ptr().add(self.offset) };
            TensorRef { ptr, shape: self.shape, dtype: self.dtype, life: PhantomData }
        }

        /// Writable view.
        #[must_use]
        pub fn view_mut(&mut self) -> TensorMut<'_> {
            // SAFETY: as in `view`; the region belongs to this tensor alone, which is borrowed exclusively.
            let ptr = unsafe { self.memory.ptr.as_ptr().add(self.offset) };
            TensorMut { ptr, shape: self.shape, dtype: self.dtype, life: PhantomData }
        }
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

/// One allocation, given out as disjoint tensors. Zeroed at first.
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
    /// Builds a set of tensors in one allocation: `carve` runs twice, first to count the bytes, then to get them.
    /// Returns what `carve` made and the size in bytes. `what` names the arena when there is not enough memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the system refuses the bytes.
    ///
    /// # Panics
    /// If `carve` does not carve the same tensors both times.
    pub fn build<T>(what: &'static str, carve: impl Fn(&mut Arena) -> T) -> Result<(T, usize)> {
        // The tensors of the counting pass share one tiny block and are dropped unread.
        let mut counting = Self { memory: None, used: 0 };
        drop(carve(&mut counting));
        let bytes = counting.used;
        let mut arena = Self { memory: Some(Arc::new(Memory::zeroed(bytes, what)?)), used: 0 };
        let tensors = carve(&mut arena);
        assert_eq!(arena.used, bytes, "both passes carve the same tensors");
        Ok((tensors, bytes))
    }

    /// The next tensor of the arena.
    ///
    /// # Panics
    /// If more is carved than was counted (see [`build`](Self::build)).
    pub fn tensor(&mut self, dtype: DType, shape: &[usize]) -> Tensor {
        let shape = Shape::from(shape);
        let offset = self.used;
        self.used += (shape.elems() * dtype.size_bytes()).next_multiple_of(ALIGN_BYTES);
        match &self.memory {
            Some(memory) => {
                assert!(self.used <= memory.layout.size(), "carved no more than was counted");
                Tensor { memory: memory.clone(), offset, shape, dtype }
            }
            None => Tensor::counted(dtype),
        }
    }

    /// The next tensors of the arena, side by side.
    pub fn list(&mut self, dtype: DType, shapes: &[Shape]) -> TensorList {
        let offset = self.used;
        let tensors: Vec<_> = shapes.iter().map(|s| self.tensor(dtype, s.dims())).collect();
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
}

impl Tensor {
    /// A stand-in during the counting pass: no elements, so that touching it cannot reach past its memory.
    fn counted(dtype: DType) -> Self {
        let memory = Memory::zeroed(0, "counting").expect("128 bytes can be had");
        Self { memory: Arc::new(memory), offset: 0, shape: Shape::from(&[0][..]), dtype }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_gives_out_disjoint_aligned_zeroed_tensors() {
        let (mut tensors, bytes) = Arena::build("test", |arena| {
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
        let (mut list, _) = Arena::build("test", |arena| arena.list(DType::F32, &shapes)).unwrap();
        let [b, a] = list.views_mut([1, 0]);
        a.into_slice::<f32>().fill(1.0);
        b.into_slice::<f32>().fill(2.0);
        assert_eq!(list.offset(1), 32);
        let flat = list.flat().as_slice::<f32>();
        assert_eq!(flat.len(), 64);
        assert_eq!((flat[14], flat[15], flat[32], flat[33], flat[34]), (1.0, 0.0, 2.0, 2.0, 0.0));
        list.flat_mut().into_slice::<f32>().fill(3.0);
        assert_eq!(list.view(0).as_slice::<f32>(), [3.0; 15]);
    }

    #[test]
    fn a_view_refuses_a_shape_of_another_size() {
        let err = TensorRef::new(&[0f32; 6], &[2, 4]).unwrap_err();
        assert!(matches!(err, Error::Shape { .. }), "{err}");
    }

    #[test]
    fn a_workspace_is_carved_with_alignment() {
        let mut bytes = vec![0u8; 1000];
        let workspace = TensorMut::new(&mut bytes, &[1000]).unwrap();
        let (a, rest) = workspace.carve::<f64>(5);
        let (b, _) = rest.carve::<f32>(3);
        assert_eq!((a.len(), b.len()), (5, 3));
        assert!(b.as_ptr() as usize >= a.as_ptr() as usize + 40);
    }
}
