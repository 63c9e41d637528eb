//! Tensors as a caller describes them.

use std::ffi::c_void;

use pixmim_core::{DType, TensorRef};

use crate::context::PIXMIM_CPU;
use crate::status::{Failure, Outcome, PIXMIM_DTYPE, PIXMIM_SHAPE, guard, pixmim_status};

/// IEEE 754 binary32.
pub const PIXMIM_F32: i32 = 0;
/// bfloat16.
pub const PIXMIM_BF16: i32 = 1;
/// IEEE 754 binary64; CPU only, but for learning rates.
pub const PIXMIM_F64: i32 = 2;
/// Unsigned byte.
pub const PIXMIM_U8: i32 = 3;
/// Signed 32-bit integer.
pub const PIXMIM_I32: i32 = 4;
/// Signed 64-bit integer.
pub const PIXMIM_I64: i32 = 5;
/// Most dimensions of a tensor.
pub const PIXMIM_MAX_DIMS: usize = 6;

/// A view of somebody's memory: it owns nothing, and a call is done with it when it returns (its data, when the enqueued
/// work is done).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct pixmim_tensor {
    /// sizeof(pixmim_tensor).
    pub struct_size: u32,
    /// PIXMIM_F32 and so on.
    pub dtype: i32,
    /// PIXMIM_CPU, or the CUDA ordinal of the GPU whose memory it is.
    pub device: i32,
    /// Number of dimensions; 0 is a single number.
    pub ndim: i32,
    /// The first element. On the CPU aligned to an element, on a GPU to 16 bytes.
    pub data: *mut c_void,
    /// Extents, outermost first.
    pub shape: [i64; PIXMIM_MAX_DIMS],
    /// Elements from an index to the next, of each dimension. Row-major without gaps is the only layout taken.
    pub strides: [i64; PIXMIM_MAX_DIMS],
}

/// What a tensor's description says, once it is seen to make sense.
#[derive(Clone, Debug)]
pub(crate) struct Described {
    pub(crate) dtype: DType,
    pub(crate) device: i32,
    pub(crate) data: *mut u8,
    pub(crate) dims: Vec<usize>,
}

/// Most elements of a tensor: what is computed from sizes below it does not overflow.
const MOST_ELEMS: usize = 1 << 40;

/// The struct behind a pointer.
///
/// # Safety
/// `pointer` is null, misaligned, or leads to a `T`.
pub(crate) unsafe fn pointee<'a, T>(name: &str, pointer: *const T) -> Outcome<&'a T> {
    if pointer.is_null() {
        return Err(Failure::invalid(name, "is null"));
    }
    if !pointer.is_aligned() {
        return Err(Failure::invalid(name, "is misaligned"));
    }
    // SAFETY: neither null nor misaligned, so it leads to a `T`, as the caller promises.
    Ok(unsafe { &*pointer })
}

/// As [`pointee`], writable.
///
/// # Safety
/// As for [`pointee`], and nobody else uses it meanwhile.
pub(crate) unsafe fn pointee_mut<'a, T>(name: &str, pointer: *mut T) -> Outcome<&'a mut T> {
    // SAFETY: as the caller promises.
    unsafe { pointee(name, pointer) }?;
    // SAFETY: as in `pointee`, and nobody else uses it.
    Ok(unsafe { &mut *pointer })
}

impl Described {
    /// # Safety
    /// `tensor` is null, misaligned, or leads to a `pixmim_tensor`.
    pub(crate) unsafe fn new(name: &str, tensor: *const pixmim_tensor) -> Outcome<Self> {
        // SAFETY: promised by the caller.
        let tensor = unsafe { pointee(name, tensor) }?;
        expect_struct(name, tensor.struct_size, size_of::<pixmim_tensor>())?;
        let dtype = dtype(tensor.dtype).ok_or_else(|| {
            let why = format!("`{name}` has dtype {}, which is none of PIXMIM_*", tensor.dtype);
            Failure::new(PIXMIM_DTYPE, why)
        })?;
        if tensor.device < PIXMIM_CPU {
            let why =
                format!("has device {}; it is PIXMIM_CPU or the ordinal of a GPU", tensor.device);
            return Err(Failure::invalid(name, why));
        }
        let shape = |why: String| Failure::new(PIXMIM_SHAPE, format!("`{name}` has {why}"));
        let rank = usize::try_from(tensor.ndim).ok().filter(|&rank| rank <= PIXMIM_MAX_DIMS);
        let rank = rank.ok_or_else(|| shape(format!("{} dimensions, not 0 to 6", tensor.ndim)))?;
        let mut dims = Vec::with_capacity(rank);
        // Elements of what lies below a dimension, an empty one counted as 1.
        let mut below = 1usize;
        for axis in (0..rank).rev() {
            let extent = tensor.shape[axis];
            let Some(room) = usize::try_from(extent)
                .ok()
                .and_then(|extent| below.checked_mul(extent.max(1)))
                .filter(|&room| room <= MOST_ELEMS)
            else {
                return Err(shape(format!(
                    "the shape {:?}: negative, or more than 2^40 elements",
                    &tensor.shape[..rank]
                )));
            };
            if extent > 1 && tensor.strides[axis] != below as i64 {
                let strides = &tensor.strides[..rank];
                let shown = &tensor.shape[..rank];
                return Err(shape(format!(
                    "strides {strides:?} for the shape {shown:?}; only row-major without gaps is taken: copy it first"
                )));
            }
            below = room;
            dims.push(extent as usize);
        }
        dims.reverse();
        Ok(Self { dtype, device: tensor.device, data: tensor.data.cast(), dims })
    }

    /// A tensor of the library's own.
    pub(crate) fn of(view: TensorRef<'_>, device: i32) -> Self {
        let (data, dims) = (view.as_ptr().cast_mut(), view.shape().to_vec());
        Self { dtype: view.dtype(), device, data, dims }
    }

    /// As a caller is told of it.
    pub(crate) fn lent(&self) -> pixmim_tensor {
        let mut shape = [0; PIXMIM_MAX_DIMS];
        let dims = self.dims.iter().map(|&extent| extent as i64);
        shape.iter_mut().zip(dims).for_each(|(into, extent)| *into = extent);
        let mut strides = [0; PIXMIM_MAX_DIMS];
        let mut below = 1;
        for axis in (0..self.dims.len()).rev() {
            strides[axis] = below;
            below *= shape[axis];
        }
        pixmim_tensor {
            struct_size: size_of::<pixmim_tensor>() as u32,
            dtype: code(self.dtype),
            device: self.device,
            ndim: self.dims.len() as i32,
            data: self.data.cast(),
            shape,
            strides,
        }
    }

    /// Extent of a dimension; 0 if there is none, which the op refuses.
    pub(crate) fn dim(&self, axis: usize) -> usize {
        self.dims.get(axis).copied().unwrap_or(0)
    }

    /// Extent of the last dimension.
    pub(crate) fn width(&self) -> usize {
        self.dims.last().copied().unwrap_or(0)
    }

    /// All dimensions but the last, as one.
    pub(crate) fn rows(&self) -> usize {
        self.dims.split_last().map_or(0, |(_, rows)| rows.iter().product())
    }

    pub(crate) fn elems(&self) -> usize {
        self.dims.iter().product()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.elems() * self.dtype.size_bytes()
    }
}

/// Refuses a tensor of another dtype than the function takes.
pub(crate) fn expect_dtype(name: &str, found: DType, expected: DType) -> Outcome {
    if found == expected {
        return Ok(());
    }
    let why = format!("`{name}` has dtype {found:?}, expected {expected:?}");
    Err(Failure::new(PIXMIM_DTYPE, why))
}

/// Refuses a tensor of another dtype or shape than that which it is copied from or to.
pub(crate) fn expect_like(
    name: &str,
    dtype: DType,
    shape: &[usize],
    like: TensorRef<'_>,
) -> Outcome {
    expect_dtype(name, dtype, like.dtype())?;
    if shape != like.shape() {
        let why = format!("`{name}` has shape {shape:?}, expected {:?}", like.shape());
        return Err(Failure::new(PIXMIM_SHAPE, why));
    }
    Ok(())
}

/// Refuses a struct of another version of this header.
pub(crate) fn expect_struct(name: &str, found: u32, expected: usize) -> Outcome {
    if found as usize == expected {
        return Ok(());
    }
    let why = format!(
        "has struct_size {found}, this library's is {expected}; set it to sizeof, and compare pixmim_abi_version()"
    );
    Err(Failure::invalid(name, why))
}

pub(crate) fn dtype(code: i32) -> Option<DType> {
    Some(match code {
        PIXMIM_F32 => DType::F32,
        PIXMIM_BF16 => DType::Bf16,
        PIXMIM_F64 => DType::F64,
        PIXMIM_U8 => DType::U8,
        PIXMIM_I32 => DType::I32,
        PIXMIM_I64 => DType::I64,
        _ => return None,
    })
}

fn code(dtype: DType) -> i32 {
    dtype as i32
}

const _: () = assert!(
    DType::F32 as i32 == PIXMIM_F32
        && DType::Bf16 as i32 == PIXMIM_BF16
        && DType::F64 as i32 == PIXMIM_F64
        && DType::U8 as i32 == PIXMIM_U8
        && DType::I32 as i32 == PIXMIM_I32
        && DType::I64 as i32 == PIXMIM_I64
);

/// Fills in `*out`: a tensor of `ndim` extents at `shape`, row-major without gaps.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_tensor_init(
    out: *mut pixmim_tensor,
    data: *mut c_void,
    dtype: i32,
    device: i32,
    ndim: i32,
    shape: *const i64,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it leads to a tensor, which nobody else uses.
        let out = unsafe { pointee_mut("out", out) }?;
        // SAFETY: the header asks of the caller that it leads to `ndim` numbers.
        let shape = unsafe { numbers("shape", shape, ndim) }?;
        *out = row_major("tensor", data, dtype, device, shape)?;
        Ok(())
    })
}

/// The `count` numbers behind a pointer.
///
/// # Safety
/// `pointer` is null, misaligned, or leads to `count` numbers.
unsafe fn numbers<'a>(name: &str, pointer: *const i64, count: i32) -> Outcome<&'a [i64]> {
    let Some(count) = usize::try_from(count).ok().filter(|&count| count <= PIXMIM_MAX_DIMS) else {
        let why = format!("has ndim {count}, not 0 to {PIXMIM_MAX_DIMS}");
        return Err(Failure::invalid(name, why));
    };
    if count == 0 {
        return Ok(&[]);
    }
    // SAFETY: promised by the caller.
    unsafe { pointee(name, pointer) }?;
    // SAFETY: neither null nor misaligned, so it leads to `count` numbers, as the caller promises.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

fn row_major(
    name: &str,
    data: *mut c_void,
    dtype: i32,
    device: i32,
    shape: &[i64],
) -> Outcome<pixmim_tensor> {
    let mut tensor = pixmim_tensor {
        struct_size: size_of::<pixmim_tensor>() as u32,
        dtype,
        device,
        ndim: shape.len() as i32,
        data,
        shape: [0; PIXMIM_MAX_DIMS],
        strides: [0; PIXMIM_MAX_DIMS],
    };
    tensor.shape[..shape.len()].copy_from_slice(shape);
    let mut stride = 1i64;
    for (axis, &extent) in shape.iter().enumerate().rev() {
        tensor.strides[axis] = stride;
        stride = stride.checked_mul(extent.max(1)).ok_or_else(|| {
            Failure::new(
                PIXMIM_SHAPE,
                format!("`{name}` has shape {shape:?}, more elements than i64 counts"),
            )
        })?;
    }
    // SAFETY: a reference leads to a tensor.
    unsafe { Described::new(name, &tensor) }?;
    Ok(tensor)
}

/// `DLDevice`, `DLDataType` and `DLTensor` of DLPack 0.2 to 1.x, whose layout is fixed.
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// Fills in `*out` from a `DLTensor` of DLPack, which is only looked at: ownership stays where it is. A managed tensor, of
/// either kind, holds one as `dl_tensor`. CPU and CUDA memory (pinned memory is the CPU's), row-major without gaps.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_tensor_from_dlpack(
    out: *mut pixmim_tensor,
    dl_tensor: *const c_void,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it leads to a tensor, which nobody else uses.
        let out = unsafe { pointee_mut("out", out) }?;
        // SAFETY: the header asks of the caller that it leads to a `DLTensor`.
        let from = unsafe { pointee("dl_tensor", dl_tensor.cast::<DlTensor>()) }?;
        let device = match (from.device_type, from.device_id) {
            (1 | 3, _) => PIXMIM_CPU,
            (2, ordinal @ 0..) => ordinal,
            (kind, id) => {
                let why = format!("is on device ({kind}, {id}) of DLPack; CPU and CUDA are taken");
                return Err(Failure::invalid("dl_tensor", why));
            }
        };
        let dtype = match (from.code, from.bits, from.lanes) {
            (2, 32, 1) => DType::F32,
            (2, 64, 1) => DType::F64,
            (4, 16, 1) => DType::Bf16,
            (1, 8, 1) => DType::U8,
            (0, 32, 1) => DType::I32,
            (0, 64, 1) => DType::I64,
            (kind, bits, lanes) => {
                let why = format!(
                    "`dl_tensor` has the type ({kind}, {bits} bits, {lanes} lanes) of DLPack; f32, f64, bf16, u8, i32 and i64 are taken"
                );
                return Err(Failure::new(PIXMIM_DTYPE, why));
            }
        };
        let offset = usize::try_from(from.byte_offset).ok();
        let Some(offset) = offset.filter(|&offset| from.data.addr().checked_add(offset).is_some())
        else {
            let why = format!("has byte_offset {}, past all addresses", from.byte_offset);
            return Err(Failure::invalid("dl_tensor", why));
        };
        let data = from.data.wrapping_byte_add(offset);
        // SAFETY: a `DLTensor` has `ndim` extents.
        let shape = unsafe { numbers("dl_tensor: shape", from.shape, from.ndim) }?;
        let mut tensor = row_major("dl_tensor", data, code(dtype), device, shape)?;
        if !from.strides.is_null() {
            // SAFETY: strides that are not null are `ndim` numbers.
            let strides = unsafe { numbers("dl_tensor: strides", from.strides, from.ndim) }?;
            tensor.strides[..strides.len()].copy_from_slice(strides);
            // SAFETY: a reference leads to a tensor.
            unsafe { Described::new("dl_tensor", &tensor) }?;
        }
        *out = tensor;
        Ok(())
    })
}
