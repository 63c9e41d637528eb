//! What the CPU side of the ops shares.
pub mod gemm;
