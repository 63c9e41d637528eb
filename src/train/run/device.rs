//! Which device computes, in which precision, and why.

use crate::train::config::{Config, Resolved};
use crate::{Cpu, DType, Device, Error, Gpu, Products, Result};

/// The device that `config` asks for, what its tensors hold, and both in words.
pub(super) fn choose(config: &Config, resolved: &Resolved) -> Result<(Device, DType, String)> {
    let precision = config.runtime.precision.as_str();
    match config.runtime.device.as_str() {
        "cpu" => Ok(cpu(precision, resolved, "")),
        "auto" => match Gpu::nvidia(0) {
            Ok(gpu) => Ok(cuda(gpu, precision, "cuda")),
            // What there is; what would help stands in doctor.
            Err(Error::NoDevice { why, .. }) => {
                let why = why.split(';').next().unwrap_or(&why);
                Ok(cpu(precision, resolved, &format!("; {why}")))
            }
            Err(error) => Err(error),
        },
        "simt" => Ok(cuda(executor()?, precision, "simt (for debugging: checks every access)")),
        _ => Ok(cuda(Gpu::nvidia(0)?, precision, "cuda")),
    }
}

fn cuda(gpu: Gpu, precision: &str, kind: &str) -> (Device, DType, String) {
    let (dtype, stored) = match precision {
        "f32" => (DType::F32, "f32"),
        _ => (DType::Bf16, "bf16 with f32 sums and weights"),
    };
    let words = format!("{kind}: {} ({stored})", gpu.properties().name);
    (Device::Cuda(gpu), dtype, words)
}

#[cfg(pixmim_simt)]
fn executor() -> Result<Gpu> {
    Gpu::simt(crate::cuda::SimtOptions::default())
}

#[cfg(not(pixmim_simt))]
fn executor() -> Result<Gpu> {
    let why = "this build has no host executor: build for x86-64 Linux with feature `simt`";
    Err(Error::NoDevice { asked: "simt".into(), why: why.into() })
}

fn cpu(precision: &str, resolved: &Resolved, why: &str) -> (Device, DType, String) {
    let fast = Products::bf16_is_fast();
    let products = match precision {
        "bf16" => Products::Bf16,
        "auto" if fast => Products::Bf16,
        _ => Products::F32,
    };
    let precision = match (products, fast) {
        (Products::Bf16, true) => {
            "bf16 products with f32 sums, as this CPU multiplies bf16 natively"
        }
        (Products::Bf16, false) => "bf16 products as asked, slower than f32 on this CPU",
        (Products::F32, true) => "f32 products as asked",
        (Products::F32, false) => "f32 products",
    };
    let threads = resolved.compute_threads;
    let words = format!("cpu ({threads} threads, {precision}){why}");
    (Device::Cpu(Cpu { products }), DType::F32, words)
}
