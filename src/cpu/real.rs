//! The element types of the CPU side: f32, which trains, and f64, the oracle.

use super::gemm::{Mat, MatMut};
use crate::Products;
use crate::dtype::Element;
use crate::scalar::Scalar;

/// f32 or f64: numbers that tensors hold and matrix products take.
pub(crate) trait Real: Element + Scalar {
    /// `dst = lhs rhs`, or `dst += lhs rhs`. See [`super::gemm::matmul`].
    fn matmul(
        dst: MatMut<'_, Self>,
        lhs: Mat<'_, Self>,
        rhs: Mat<'_, Self>,
        accumulate: bool,
        products: Products,
        threaded: bool,
    );
}

impl Real for f64 {
    fn matmul(
        dst: MatMut<'_, Self>,
        lhs: Mat<'_, Self>,
        rhs: Mat<'_, Self>,
        accumulate: bool,
        _: Products,
        threaded: bool,
    ) {
        super::gemm::through_crate(dst, lhs, rhs, accumulate, threaded);
    }
}

impl Real for f32 {
    fn matmul(
        dst: MatMut<'_, Self>,
        lhs: Mat<'_, Self>,
        rhs: Mat<'_, Self>,
        accumulate: bool,
        products: Products,
        threaded: bool,
    ) {
        match products {
            Products::F32 => super::gemm::through_crate(dst, lhs, rhs, accumulate, threaded),
            Products::Bf16 => super::gemm::in_bf16(dst, lhs, rhs, accumulate, threaded),
        }
    }
}
