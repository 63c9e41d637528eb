//! Element types.

use half::bf16;

/// Element type of a tensor. The values are part of the C ABI and of checkpoints: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary32.
    F32 = 0,
    /// bfloat16: 8 exponent bits, 7 mantissa bits.
    Bf16 = 1,
    /// IEEE 754 binary64: the oracle's precision, CPU only.
    F64 = 2,
    /// Unsigned byte: pixels and workspaces.
    U8 = 3,
    /// Signed 32-bit integer: token ids.
    I32 = 4,
    /// Signed 64-bit integer: sample ids, image geometry.
    I64 = 5,
}

impl DType {
    /// Size of one element, in bytes.
    #[must_use]
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    /// The dtype of sums, statistics and parameter gradients where this one is stored: f32 for bf16, else itself.
    #[must_use]
    pub const fn wide(self) -> Self {
        match self {
            Self::Bf16 => Self::F32,
            other => other,
        }
    }
}

/// Rust types that can stand in a tensor. Sealed: the list is [`DType`]'s.
pub trait Element: bytemuck::Pod + Send + Sync + sealed::Sealed {
    /// The dtype of this Rust type.
    const DTYPE: DType;
}

mod sealed {
    /// Keeps [`Element`](super::Element) in step with [`DType`](super::DType).
    pub trait Sealed {}
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),*) => {$(
        impl sealed::Sealed for $rust {}
        impl Element for $rust {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}
elements!(f32 => F32, f64 => F64, bf16 => Bf16, u8 => U8, i32 => I32, i64 => I64);
