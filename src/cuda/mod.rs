//! All that knows CUDA.

pub mod kernels;
