//! `pixmim`: masked image modelling as a kernel library with a small autograd-free trainer.
//!
//! It implements PixMIM (arXiv 2303.02416): masked autoencoding whose reconstruction target is low-pass filtered
//! and whose crop keeps the subject in view.

pub mod arena;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod dtype;
pub mod error;
pub mod ops;
pub mod profile;
pub mod tensor;

pub mod model;

#[cfg(feature = "candle")]
pub mod candle;

#[cfg(feature = "train")]
pub mod data;
#[cfg(feature = "train")]
pub mod train;

pub use arena::{Arena, Tensor, TensorList};
pub use cuda::Gpu;
/// The CUDA bindings in use, for [`Gpu::borrow`] and [`Gpu::view`]. They panic without a driver: ask
/// [`cuda::probe::probe`] first. Slices of `bf16` need their feature `f16`.
#[cfg(feature = "cuda")]
pub use cudarc;
pub use device::{Cpu, Device, HostBuffer, Place, Products};
pub use dtype::DType;
pub use error::{Error, Result};
pub use pixmim_scalar::{self as scalar, rng};
pub use tensor::{TensorMut, TensorRef};

/// Version of the crate and commit it was built from.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (git ", env!("PIXMIM_GIT"), ")");
/// The compiler this crate was built with.
pub const RUSTC: &str = env!("PIXMIM_RUSTC");

#[cfg(doctest)]
#[doc = include_str!("../docs/backend.md")]
struct Backend;
