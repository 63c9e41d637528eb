//! What `pixmim` computes for one number at a time, without std: GELU, the squared error of a normalised target, random
//! words, and where patches are. `pixmim`'s CPU side calls these very functions.
//!
//! With the feature `cuda-std` they are for kernels that you write in Rust and compile with
//! [rust-cuda](https://github.com/Rust-GPU/rust-cuda): depend on this crate alone there, since a device cannot build the ops
//! of `pixmim`. It then re-exports [`cuda_std`](https://docs.rs/cuda_std), which on the host builds with stable Rust but
//! does nothing.
//!
//! ```toml
//! [dependencies]   # of the crate that rust-cuda compiles
//! pixmim-scalar = { path = "../pixmim/scalar", features = ["cuda-std"] }
//! ```
//!
//! The feature `std` takes roots, exponentials and fused multiply-adds from the standard library instead of `libm`, whose
//! functions rust-cuda replaces with those of CUDA's libdevice. Roots and fused multiply-adds are exact in both; the rest
//! may differ in the last bit.

#![no_std]

#[cfg(feature = "std")]
extern crate std;

#[cfg(feature = "cuda-std")]
pub use cuda_std;

pub use gelu::{gelu, gelu_slope};
pub use norm_pix::{NORM_PIX_EPS, PatchNorm};
pub use patches::{patch_corner, patch_of, reflect};
pub use real::Scalar;

/// The first with the feature `std`, the second without.
macro_rules! with_std {
    ($std:expr, $without:expr) => {{
        #[cfg(feature = "std")]
        let value = $std;
        #[cfg(not(feature = "std"))]
        let value = $without;
        value
    }};
}

mod gelu;
mod norm_pix;
mod patches;
mod real;
pub mod rng;
