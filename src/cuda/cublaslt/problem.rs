//! A matrix product as cublasLt sees it: column-major, and only what decides which algorithm is best.

use cudarc::cublaslt::sys;

use crate::cuda::driver::{DevPtr, Epilogue, Matmul, Matrix};
use crate::{DType, Error, Result};

/// Everything about a product but its addresses. The bytes are part of the format of exported plans.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, bytemuck::Pod, bytemuck::Zeroable,
)]
#[repr(C)]
pub(super) struct Problem {
    m: u64,
    n: u64,
    k: u64,
    batch: u64,
    a_row_stride: u64,
    a_batch_stride: u64,
    b_row_stride: u64,
    b_batch_stride: u64,
    out_row_stride: u64,
    out_batch_stride: u64,
    /// 1 or 0, like the other flags.
    a_transposed: u8,
    b_transposed: u8,
    /// Whether `a` and `b` are bf16; else they are f32.
    factors_bf16: u8,
    out_bf16: u8,
    has_bias: u8,
    /// An [`Add`].
    add: u8,
    /// Powers of two that divide the addresses of `a`, `b`, `add` and `out`.
    aligned: [u8; 4],
    /// An [`Extra`].
    extra: u8,
    zero: [u8; 5],
}

/// What is added to the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Add {
    /// Nothing.
    Nothing = 0,
    /// The result's old value.
    InPlace = 1,
    /// Another matrix.
    Other = 2,
}

/// An [`Epilogue`] without its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extra {
    Nothing = 0,
    Gelu = 1,
    GeluSlope = 2,
    RowSums = 3,
}

/// `out (m, n) = op(a) op(b)` for column-major matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ColumnMajor {
    pub(super) a: Operand,
    pub(super) b: Operand,
    pub(super) out: Operand,
    pub(super) batch: i32,
}

/// A column-major matrix, as it lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operand {
    pub(super) rows: u64,
    pub(super) cols: u64,
    /// Elements from a column to the next.
    pub(super) leading: i64,
    /// Elements from a matrix to the next.
    pub(super) batch_stride: i64,
    /// Whether the product takes its transpose.
    pub(super) transposed: bool,
}

impl Problem {
    /// Judges a product. Sizes are not 0.
    ///
    /// # Errors
    /// [`Error::Gpu`] for what cublasLt cannot do, or would do wrong.
    pub(super) fn new(matmul: &Matmul) -> Result<Self> {
        let &Matmul { m, n, k, batch, a, b, out, bias, add, epilogue } = matmul;
        let refuse = |why: String| {
            let why = format!("({m}, {k}) by ({k}, {n}), {batch} times: {why}");
            Err(Error::Gpu { action: "multiply", why })
        };
        let dtypes = (a.dtype, b.dtype, out.dtype);
        let (factors_bf16, out_bf16) = match dtypes {
            (DType::F32, DType::F32, DType::F32) => (false, false),
            (DType::Bf16, DType::Bf16, DType::Bf16) => (true, true),
            (DType::Bf16, DType::Bf16, DType::F32) => (true, false),
            _ => return refuse(format!("dtypes {dtypes:?} go together in no algorithm")),
        };
        if m == 0 || n == 0 || k == 0 || batch == 0 || i32::try_from(batch).is_err() {
            return refuse("a size is 0, or batch does not fit 31 bits".into());
        }
        let lies = |matrix: &Matrix, rows: usize, cols: usize| {
            let (rows, cols) = if matrix.transposed { (cols, rows) } else { (rows, cols) };
            let bytes = matrix.dtype.size_bytes() as u64;
            cols <= matrix.row_stride
                && matrix.ptr.0.is_multiple_of(bytes)
                && (batch == 1
                    || matrix.batch_stride == 0
                    || matrix.batch_stride >= (rows - 1) * matrix.row_stride + cols)
        };
        if !lies(&a, m, k) || !lies(&b, k, n) || !lies(&out, m, n) {
            return refuse("rows or matrices overlap, or an address cuts an element".into());
        }
        if out.transposed || (batch > 1 && out.batch_stride == 0) {
            return refuse("the result is transposed, or its matrices are one".into());
        }
        if bias.is_some_and(|bias| !bias.0.is_multiple_of(16)) {
            return refuse("the address of the bias is not a multiple of 16".into());
        }
        if let Err(why) = matmul.check_epilogue() {
            return refuse(why);
        }
        let extra = match epilogue {
            Epilogue::None => Extra::Nothing,
            Epilogue::Gelu(_) => Extra::Gelu,
            Epilogue::GeluSlope(_) => Extra::GeluSlope,
            Epilogue::RowSums(_) => Extra::RowSums,
        };
        let kind = match add {
            None => Add::Nothing,
            Some(add) if add == out.ptr => Add::InPlace,
            Some(_) => Add::Other,
        };
        let strides = |matrix: &Matrix| {
            // With one matrix the distance to the next means nothing, and must not make two plans of one.
            let batch_stride = if batch == 1 { 0 } else { matrix.batch_stride };
            (matrix.row_stride as u64, batch_stride as u64)
        };
        let (a_row_stride, a_batch_stride) = strides(&a);
        let (b_row_stride, b_batch_stride) = strides(&b);
        let (out_row_stride, out_batch_stride) = strides(&out);
        Ok(Self {
            m: m as u64,
            n: n as u64,
            k: k as u64,
            batch: batch as u64,
            a_row_stride,
            a_batch_stride,
            b_row_stride,
            b_batch_stride,
            out_row_stride,
            out_batch_stride,
            a_transposed: a.transposed.into(),
            b_transposed: b.transposed.into(),
            factors_bf16: factors_bf16.into(),
            out_bf16: out_bf16.into(),
            has_bias: bias.is_some().into(),
            add: kind as u8,
            aligned: [a.ptr, b.ptr, add.unwrap_or(out.ptr), out.ptr].map(alignment),
            extra: extra as u8,
            zero: [0; 5],
        })
    }

    /// The same product of column-major matrices.
    ///
    /// A row-major matrix is, byte for byte, the column-major matrix of its transpose, and `out = a b` is
    /// `outᵀ = bᵀ aᵀ`: so the factors change places, rows become columns, and nothing moves. A bias for each column of
    /// `out` becomes one for each row, which is the kind cublasLt adds; and our `a` is its B, whose sums over `k` are those
    /// of our rows.
    pub(super) fn column_major(&self) -> ColumnMajor {
        let operand = |rows, cols, [row_stride, batch_stride]: [u64; 2], transposed: u8| {
            // Row-major (rows, cols), or its transpose, as it lies in memory.
            let (rows, cols) = if transposed == 0 { (rows, cols) } else { (cols, rows) };
            Operand {
                rows: cols,
                cols: rows,
                leading: row_stride as i64,
                batch_stride: batch_stride as i64,
                transposed: transposed != 0,
            }
        };
        let &Self { m, n, k, .. } = self;
        ColumnMajor {
            a: operand(k, n, [self.b_row_stride, self.b_batch_stride], self.b_transposed),
            b: operand(m, k, [self.a_row_stride, self.a_batch_stride], self.a_transposed),
            out: operand(m, n, [self.out_row_stride, self.out_batch_stride], 0),
            batch: self.batch as i32,
        }
    }

    pub(super) fn factors(&self) -> DType {
        if self.factors_bf16 == 0 { DType::F32 } else { DType::Bf16 }
    }

    pub(super) fn result(&self) -> DType {
        if self.out_bf16 == 0 { DType::F32 } else { DType::Bf16 }
    }

    pub(super) fn has_bias(&self) -> bool {
        self.has_bias != 0
    }

    pub(super) fn extra(&self) -> Extra {
        match self.extra {
            0 => Extra::Nothing,
            1 => Extra::Gelu,
            2 => Extra::GeluSlope,
            _ => Extra::RowSums,
        }
    }

    /// What cublasLt calls the epilogue.
    pub(super) fn epilogue(&self) -> sys::cublasLtEpilogue_t {
        use sys::cublasLtEpilogue_t as E;
        match self.extra() {
            Extra::Nothing if self.has_bias() => E::CUBLASLT_EPILOGUE_BIAS,
            Extra::Nothing => E::CUBLASLT_EPILOGUE_DEFAULT,
            Extra::Gelu => E::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
            Extra::GeluSlope => E::CUBLASLT_EPILOGUE_DGELU,
            Extra::RowSums => E::CUBLASLT_EPILOGUE_BGRADB,
        }
    }

    /// Whether there is a matrix beside `out`, and laid out as it.
    pub(super) fn has_aux(&self) -> bool {
        matches!(self.extra(), Extra::Gelu | Extra::GeluSlope)
    }

    /// Numbers of the vector that cublasLt calls the bias: one to add, or sums to write. In the result's dtype.
    pub(super) fn vector(&self) -> Option<usize> {
        match self.extra() {
            Extra::RowSums => Some(self.m as usize),
            _ => self.has_bias().then_some(self.n as usize),
        }
    }

    pub(super) fn add(&self) -> Add {
        match self.add {
            0 => Add::Nothing,
            1 => Add::InPlace,
            _ => Add::Other,
        }
    }

    /// Least alignment of cublasLt's A, B, C and D, in bytes.
    pub(super) fn alignments(&self) -> [u32; 4] {
        let [a, b, add, out] = self.aligned.map(|exponent| 1 << exponent);
        [b, a, add, out]
    }

    /// Bytes from the first element to the last of an operand.
    pub(super) fn bytes(&self, operand: &Operand, dtype: DType) -> usize {
        let matrices = (self.batch - 1) * operand.batch_stride as u64;
        let columns = (operand.cols - 1) * operand.leading as u64;
        (matrices + columns + operand.rows) as usize * dtype.size_bytes()
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let flip = |transposed: u8| if transposed == 0 { "" } else { "ᵀ" };
        let Self { m, n, k, batch, .. } = self;
        write!(f, "({m}, {k}){}", flip(self.a_transposed))?;
        write!(f, " by ({k}, {n}){}", flip(self.b_transposed))?;
        write!(f, " of {:?} to {:?}", self.factors(), self.result())?;
        let bias = if self.has_bias() { " with bias" } else { "" };
        let add = if self.add() == Add::Nothing { "" } else { " added to a matrix" };
        let extra = match self.extra() {
            Extra::Nothing => "",
            Extra::Gelu => " and GELU",
            Extra::GeluSlope => " times the slope of GELU",
            Extra::RowSums => " and the sums of rows",
        };
        write!(f, "{bias}{add}{extra}, {batch} times")
    }
}

/// Exponent of a power of two that divides the address. No algorithm needs more than 16 to be right; 256 is told apart
/// because some may be offered for it alone.
fn alignment(ptr: DevPtr) -> u8 {
    match ptr.0.trailing_zeros() {
        8.. => 8,
        4..8 => 4,
        exponent => exponent as u8,
    }
}

#[cfg(test)]
mod tests;
