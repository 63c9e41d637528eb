//! Views of tensors: contiguous, row-major, typed at run time. They own nothing and do no arithmetic; an
//! [`Arena`](crate::Arena) owns memory. A view knows where its memory is: only the host's can be read as a slice.

use std::marker::PhantomData;

use crate::cuda::DevPtr;
use crate::device::{Call, Place};
use crate::dtype::Element;
use crate::{DType, Device, Error, Result};

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
    place: Place,
    life: PhantomData<&'a [u8]>,
}

/// Writable view of a tensor.
#[derive(Debug)]
pub struct TensorMut<'a> {
    ptr: *mut u8,
    shape: Shape,
    dtype: DType,
    place: Place,
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

            /// Where the elements are.
            #[must_use]
            pub fn place(&self) -> Place {
                self.place
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

            /// The first `at` along the outermost dimension, and the others.
            ///
            /// # Panics
            /// If there are fewer, or no dimension.
            #[must_use]
            pub fn split_at(self, at: usize) -> (Self, Self) {
                let (all, each) = self.shape.dims().split_first().expect("at least a vector");
                let stride = each.iter().product::<usize>() * self.dtype.size_bytes();
                assert!(at <= *all, "a tensor is split inside");
                let part = |from: usize, count: usize| {
                    let mut shape = self.shape;
                    shape.dims[0] = count;
                    Self { ptr: self.ptr.wrapping_add(from * stride), shape, ..self }
                };
                (part(0, at), part(at, all - at))
            }

            /// Size of all elements, in bytes.
            #[must_use]
            pub fn bytes(&self) -> usize {
                self.elems() * self.dtype.size_bytes()
            }

            /// Address of the first element, in the memory of [`place`](Self::place).
            #[must_use]
            pub fn as_ptr(&self) -> *const u8 {
                self.ptr
            }

            /// The same elements as their bytes.
            pub(crate) fn into_bytes(self) -> Self {
                let shape = Shape::from(&[self.bytes()][..]);
                Self { shape, dtype: DType::U8, ..self }
            }

            /// The first element's address on the GPU where the tensor is.
            pub(crate) fn dev_ptr(&self) -> DevPtr {
                debug_assert!(self.place != Place::Host, "an op's check has judged the place");
                DevPtr(self.ptr.addr() as u64)
            }

            /// Refuses the tensor unless it is where the op runs and has this dtype and shape.
            pub(crate) fn expect(
                &self,
                call: Call<'_>,
                arg: &'static str,
                dtype: DType,
                shape: &[usize],
            ) -> Result<()> {
                let op = call.op;
                call.expect_place(arg, self.place, self.ptr)?;
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
                call: Call<'_>,
                arg: &'static str,
                letters: &'static str,
            ) -> Result<[usize; N]> {
                self.shape().try_into().map_err(|_| Error::Shape {
                    op: call.op,
                    arg,
                    expected: letters.into(),
                    found: self.shape().to_vec(),
                })
            }

            /// Refuses the tensor unless it is where the op runs and holds what the device computes with: f32 or f64 on
            /// the CPU, f32 or bf16 on a GPU.
            pub(crate) fn expect_real(&self, call: Call<'_>, arg: &'static str) -> Result<DType> {
                let expected = match (call.dev, self.dtype) {
                    (Device::Cpu(_), DType::F32 | DType::F64)
                    | (Device::Cuda(_), DType::F32 | DType::Bf16) => {
                        call.expect_place(arg, self.place, self.ptr)?;
                        return Ok(self.dtype);
                    }
                    (Device::Cpu(_), _) => "F32 or F64".into(),
                    (Device::Cuda(_), _) => "F32 or Bf16".into(),
                };
                Err(Error::DType { op: call.op, arg, expected, found: self.dtype })
            }
        }
    };
}
common!(TensorRef);
common!(TensorMut);

/// Judges a view of somebody else's memory, and gives its shape: up to four dimensions, no more bytes than an address space
/// has, an address that is neither null nor between elements.
fn expect_raw(ptr: *const u8, dtype: DType, shape: &[usize]) -> Result<Shape> {
    let refuse = |why: String| Err(Error::invalid("tensor: data", why));
    if shape.len() > 4 {
        let expected = "at most four dimensions".into();
        return Err(Error::Shape { op: "tensor", arg: "shape", expected, found: shape.to_vec() });
    }
    let elems = shape.iter().try_fold(1usize, |elems, &extent| elems.checked_mul(extent));
    let bytes = elems.and_then(|elems| elems.checked_mul(dtype.size_bytes()));
    if bytes.is_none_or(|bytes| ptr.addr().checked_add(bytes).is_none_or(|end| end > MOST_BYTES)) {
        let expected = "no more bytes than there are addresses".into();
        return Err(Error::Shape { op: "tensor", arg: "shape", expected, found: shape.to_vec() });
    }
    if ptr.is_null() && elems != Some(0) {
        return refuse("is null".into());
    }
    if !ptr.addr().is_multiple_of(dtype.size_bytes()) {
        let (at, size) = (ptr.addr(), dtype.size_bytes());
        return refuse(format!("is at address {at:#x}; {dtype:?} lies at a multiple of {size}"));
    }
    Ok(Shape::from(shape))
}

/// Most bytes of a slice.
const MOST_BYTES: usize = isize::MAX as usize;

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
        Ok(Self {
            ptr: data.as_ptr().cast(),
            shape,
            dtype: T::DTYPE,
            place: Place::Host,
            life: PhantomData,
        })
    }

    /// The elements.
    ///
    /// # Panics
    /// If the tensor does not hold `T`, or not in the host's memory: the op's `check` has judged that.
    #[expect(unsafe_code, reason = "the one place that turns a checked view back into a slice")]
    #[must_use]
    pub fn as_slice<T: Element>(&self) -> &'a [T] {
        assert_eq!((self.dtype, self.place), (T::DTYPE, Place::Host));
        // SAFETY: a view is only made from memory that holds `elems` elements of its dtype and is borrowed for 'a.
        unsafe { std::slice::from_raw_parts(self.ptr.cast(), self.elems()) }
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
}

impl<'a> TensorMut<'a> {
    /// Views `data` as a writable tensor of this shape.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the shape has as many elements as `data`.
    pub fn new<T: Element>(data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        let shape = Shape::from(shape);
        expect_len(data.len(), &shape)?;
        Ok(Self {
            ptr: data.as_mut_ptr().cast(),
            shape,
            dtype: T::DTYPE,
            place: Place::Host,
            life: PhantomData,
        })
    }

    /// The elements.
    ///
    /// # Panics
    /// If the tensor does not hold `T`, or not in the host's memory: the op's `check` has judged that.
    #[expect(unsafe_code, reason = "the one place that turns a checked view back into a slice")]
    #[must_use]
    pub fn into_slice<T: Element>(self) -> &'a mut [T] {
        assert_eq!((self.dtype, self.place), (T::DTYPE, Place::Host));
        // SAFETY: a view is only made from memory that holds `elems` elements of its dtype, exclusively borrowed
        // for 'a; consuming the view hands that borrow on.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.cast(), self.elems()) }
    }

    /// A shorter-lived view of the same elements.
    #[must_use]
    pub fn reborrow(&mut self) -> TensorMut<'_> {
        TensorMut { life: PhantomData, ..*self }
    }

    /// Read-only view of the same elements, for as long.
    #[must_use]
    pub fn into_ref(self) -> TensorRef<'a> {
        TensorRef {
            ptr: self.ptr,
            shape: self.shape,
            dtype: self.dtype,
            place: self.place,
            life: PhantomData,
        }
    }

    /// Read-only view of the same elements.
    #[must_use]
    pub fn as_ref(&self) -> TensorRef<'_> {
        TensorRef {
            ptr: self.ptr,
            shape: self.shape,
            dtype: self.dtype,
            place: self.place,
            life: PhantomData,
        }
    }

    /// Splits a workspace (dtype U8) into a vector of `elems` elements and the rest.
    ///
    /// # Panics
    /// If the workspace is too small: the op's `check` has judged that.
    pub fn carve_tensor(self, dtype: DType, elems: usize) -> (Self, Self) {
        assert_eq!(self.dtype, DType::U8, "a workspace is bytes");
        let start = self.ptr.addr().next_multiple_of(ALIGN_BYTES) - self.ptr.addr();
        let end = start + elems * dtype.size_bytes();
        assert!(end <= self.elems(), "a workspace holds what is carved from it");
        let part = |skip: usize, elems: usize, dtype: DType| Self {
            ptr: self.ptr.wrapping_add(skip),
            shape: Shape::from(&[elems][..]),
            dtype,
            ..self
        };
        (part(start, elems, dtype), part(end, self.elems() - end, DType::U8))
    }

    /// As [`carve_tensor`](Self::carve_tensor), in the host's memory.
    pub(crate) fn carve<T: Element>(self, elems: usize) -> (&'a mut [T], TensorMut<'a>) {
        let (head, rest) = self.carve_tensor(T::DTYPE, elems);
        (head.into_slice(), rest)
    }
}

/// Bytes of workspace that [`TensorMut::carve`] may take for `elems` elements, wherever the workspace starts.
pub(crate) const fn carve_bytes(dtype: DType, elems: usize) -> usize {
    elems * dtype.size_bytes() + ALIGN_BYTES
}

/// Refuses a workspace that is not bytes where the op runs, or too few of them.
pub(crate) fn expect_workspace(
    call: Call<'_>,
    workspace: &TensorMut<'_>,
    needed: usize,
) -> Result<()> {
    let (op, found) = (call.op, workspace.elems());
    if found < needed {
        return Err(Error::Workspace { op, needed, found });
    }
    workspace.expect(call, "workspace", DType::U8, &[found])
}

/// Alignment of every tensor in an arena and of every piece of a workspace: two cache lines, as much as any kernel asks
/// for.
pub(crate) const ALIGN_BYTES: usize = 128;

#[expect(unsafe_code, reason = "views are borrows of plain numbers")]
mod memory {
    use super::*;

    // SAFETY: a `TensorRef` is a shared borrow of plain numbers, as `&[u8]` is.
    unsafe impl Send for TensorRef<'_> {}
    // SAFETY: as above.
    unsafe impl Sync for TensorRef<'_> {}
    // SAFETY: a `TensorMut` is an exclusive borrow of plain numbers, as `&mut [u8]` is.
    unsafe impl Send for TensorMut<'_> {}
    // SAFETY: a shared `&TensorMut` only reads.
    unsafe impl Sync for TensorMut<'_> {}

    /// A slice of no elements may not be null, a foreign tensor of none often is.
    fn host_ptr(ptr: *mut u8, shape: &Shape) -> *mut u8 {
        let nowhere = std::ptr::without_provenance_mut(ALIGN_BYTES);
        if shape.elems() == 0 { nowhere } else { ptr }
    }

    impl<'a> TensorRef<'a> {
        /// A view of somebody else's memory: a framework's tensor, say. `place` is the device's that the memory is for.
        ///
        /// # Errors
        /// [`Error::Shape`] for more than four dimensions or more bytes than there are addresses; [`Error::Invalid`] for a
        /// null or misaligned address.
        ///
        /// # Safety
        /// * `ptr` leads to `shape` elements of `dtype` in `place`, row-major without gaps, initialised if on the host;
        /// * for `'a` they live, and nobody writes them. On a GPU that is until the work enqueued with the view is done, unless
        ///   who frees or writes them is ordered after it on the same stream.
        pub unsafe fn from_raw(
            place: Place,
            ptr: *const u8,
            dtype: DType,
            shape: &[usize],
        ) -> Result<Self> {
            let shape = expect_raw(ptr, dtype, shape)?;
            // SAFETY: promised by the caller.
            Ok(unsafe { Self::from_parts(host_ptr(ptr.cast_mut(), &shape), shape, dtype, place) })
        }

        /// A view of memory that need not be the host's.
        ///
        /// # Safety
        /// `ptr` leads to `shape` elements of `dtype` in `place`, which live and are not written for `'a`.
        pub(crate) unsafe fn from_parts(
            ptr: *const u8,
            shape: Shape,
            dtype: DType,
            place: Place,
        ) -> Self {
            Self { ptr, shape, dtype, place, life: PhantomData }
        }
    }

    impl<'a> TensorMut<'a> {
        /// As [`TensorRef::from_raw`], writable.
        ///
        /// # Errors
        /// As [`TensorRef::from_raw`].
        ///
        /// # Safety
        /// As for [`TensorRef::from_raw`], and for `'a` nobody else reads them either.
        pub unsafe fn from_raw(
            place: Place,
            ptr: *mut u8,
            dtype: DType,
            shape: &[usize],
        ) -> Result<Self> {
            let shape = expect_raw(ptr, dtype, shape)?;
            // SAFETY: promised by the caller.
            Ok(unsafe { Self::from_parts(host_ptr(ptr, &shape), shape, dtype, place) })
        }

        /// A view of memory that need not be the host's.
        ///
        /// # Safety
        /// `ptr` leads to `shape` elements of `dtype` in `place`, which live and are used by nobody else for `'a`.
        pub(crate) unsafe fn from_parts(
            ptr: *mut u8,
            shape: Shape,
            dtype: DType,
            place: Place,
        ) -> Self {
            Self { ptr, shape, dtype, place, life: PhantomData }
        }

        /// Copies as many bytes. Host memory only: see [`Device::copy`](crate::Device::copy).
        pub(crate) fn copy_host(self, src: TensorRef<'_>) {
            assert_eq!(
                (self.place, src.place),
                (Place::Host, Place::Host),
                "the caller has looked"
            );
            assert_eq!(self.bytes(), src.bytes(), "the caller has looked");
            // SAFETY: both views cover `bytes` of host memory; an exclusive borrow and a shared one do not overlap.
            unsafe { self.ptr.copy_from_nonoverlapping(src.ptr, src.bytes()) }
        }

        /// Sets every byte to zero, which is the number 0 in every dtype. Host memory only: see
        /// [`Device::clear`](crate::Device::clear).
        pub(crate) fn clear_host(self) {
            assert_eq!(self.place, Place::Host, "the caller has looked");
            // SAFETY: the view covers `bytes` of host memory, exclusively borrowed; zero bytes are valid in every dtype.
            unsafe { self.ptr.write_bytes(0, self.bytes()) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_refuses_a_shape_of_another_size() {
        let err = TensorRef::new(&[0f32; 6], &[2, 4]).unwrap_err();
        assert!(matches!(err, Error::Shape { .. }), "{err}");
    }

    #[test]
    #[expect(unsafe_code, reason = "what is under test")]
    fn a_view_of_foreign_memory_is_judged_before_it_is_made() {
        let data = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0];
        let (ptr, host) = (data.as_ptr().cast::<u8>(), Place::Host);
        // SAFETY: whatever is asked for more than `data` or of another address is refused.
        let view =
            |ptr, shape: &[usize]| unsafe { TensorRef::from_raw(host, ptr, DType::F32, shape) };
        assert_eq!(view(ptr, &[2, 3]).unwrap().as_slice::<f32>(), data);
        assert!(view(std::ptr::null(), &[0, 3]).unwrap().as_slice::<f32>().is_empty());
        let refused = |ptr: *const u8, shape: &[usize]| view(ptr, shape).unwrap_err().to_string();
        assert_eq!(refused(std::ptr::null(), &[2, 3]), "`tensor: data` is null");
        assert!(refused(ptr.wrapping_add(2), &[1]).contains("F32 lies at a multiple of 4"));
        assert!(refused(ptr, &[1; 5]).contains("at most four dimensions"));
        for huge in [[usize::MAX, 2], [1 << 62, 1], [1 << 60, 2]] {
            assert!(refused(ptr, &huge).contains("no more bytes than there are addresses"));
        }
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
