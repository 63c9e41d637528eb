//! Where an op runs.

/// A device. Closed on purpose: each op matches on it right under its contract.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Device {
    /// The machine's cores, through the current rayon thread pool.
    Cpu(Cpu),
}

/// How the CPU computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// Precision of matrix products of f32 tensors. f64 tensors are always multiplied in f64.
    pub products: Products,
}

/// Precision in which f32 tensors are multiplied on the CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// f32 operands, f32 accumulation.
    #[default]
    F32,
    /// Operands rounded to bf16, products and sums in f32 (what PyTorch calls `medium` matmul precision).
    /// Twice as fast where the CPU has the AVX-512 BF16 instructions; see [`Products::bf16_is_fast`].
    Bf16,
}

impl Products {
    /// Whether this machine multiplies bf16 faster than f32.
    #[must_use]
    pub fn bf16_is_fast() -> bool {
        crate::cpu::gemm::bf16_is_native()
    }
}

impl Device {
    /// The CPU with f32 products.
    #[must_use]
    pub fn cpu() -> Self {
        Self::Cpu(Cpu::default())
    }
}
