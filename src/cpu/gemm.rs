//! Matrix products of the CPU side: f32 and f64 through the `gemm` crate, bf16 through our own kernel.
//!
//! Neither depends on the number of threads: each element of the result is summed over `k` in one fixed order.

mod bf16;

use super::Real;
use crate::Products;

pub(crate) use bf16::is_native as bf16_is_native;
pub(super) use bf16::matmul as in_bf16;

/// A matrix to read: a view of a slice, one of its two strides being 1.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// `rows x cols`, row-major, without gaps.
    pub(crate) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `rows x cols`, row-major, rows `row_stride` elements apart.
    pub(crate) fn strided(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows > 0 && cols > 0 && cols <= row_stride);
        assert!((rows - 1) * row_stride + cols <= data.len());
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A matrix to write: row-major.
#[derive(Debug)]
pub(crate) struct MatMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a, T> MatMut<'a, T> {
    /// `rows x cols` without gaps.
    pub(crate) fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `rows x cols`, rows `row_stride` elements apart.
    pub(crate) fn strided(data: &'a mut [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows > 0 && cols > 0 && cols <= row_stride);
        assert!((rows - 1) * row_stride + cols <= data.len());
        Self { data, rows, cols, row_stride }
    }
}

/// Below this many multiplications a product stays on one thread: handing it out would cost more.
const THREADED_FROM: usize = 1 << 20;

/// `dst = lhs rhs`, or with `accumulate` `dst += lhs rhs`, on the threads of the current pool.
pub(crate) fn matmul<T: Real>(
    dst: MatMut<'_, T>,
    lhs: Mat<'_, T>,
    rhs: Mat<'_, T>,
    accumulate: bool,
    products: Products,
) {
    let threaded = dst.rows * dst.cols * lhs.cols >= THREADED_FROM;
    T::matmul(dst, lhs, rhs, accumulate, products, threaded);
}

/// As [`matmul`], in full precision and on the calling thread: for code that is itself spread over threads.
pub(crate) fn matmul_here<T: Real>(
    dst: MatMut<'_, T>,
    lhs: Mat<'_, T>,
    rhs: Mat<'_, T>,
    accumulate: bool,
) {
    T::matmul(dst, lhs, rhs, accumulate, Products::F32, false);
}

fn assert_conform<T>(dst: &MatMut<'_, T>, lhs: &Mat<'_, T>, rhs: &Mat<'_, T>) {
    let conform = dst.rows == lhs.rows && dst.cols == rhs.cols && lhs.cols == rhs.rows;
    assert!(conform, "{}x{} times {}x{}", lhs.rows, lhs.cols, rhs.rows, rhs.cols);
}

/// The product in the operands' own precision.
#[expect(unsafe_code, reason = "the gemm crate takes pointers")]
pub(super) fn through_crate<T: Real>(
    dst: MatMut<'_, T>,
    lhs: Mat<'_, T>,
    rhs: Mat<'_, T>,
    accumulate: bool,
    threaded: bool,
) {
    assert_conform(&dst, &lhs, &rhs);
    let threads = rayon::current_num_threads();
    let parallelism = if threaded && threads > 1 {
        gemm::Parallelism::Rayon(threads)
    } else {
        gemm::Parallelism::None
    };
    // SAFETY: `Mat` and `MatMut` checked that each matrix lies inside its slice, `assert_conform` that the sizes
    // agree, and `dst` is borrowed exclusively, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            lhs.cols,
            dst.data.as_mut_ptr(),
            1,
            dst.row_stride as isize,
            accumulate,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            parallelism,
        );
    }
}
