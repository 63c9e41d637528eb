//! Which kernels attend on a GPU, and their launches.
//!
//! Heads of the sizes that training meets have kernels of their own (`WHOLE`), which keep a whole head in shared memory;
//! every other one, and those where shared memory is too small, is streamed through it.

use super::{Backward, Dims, Forward};
use crate::cuda::{DevPtr, Gpu};
use crate::{DType, Result};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ForwardParams {
    out: DevPtr,
    lse: DevPtr,
    qkv: DevPtr,
    tokens: i32,
    heads: i32,
    head_dim: i32,
    scale_log2: f32,
}
const _: () = assert!(size_of::<ForwardParams>() == 40, "as in kernels/attention/common.cuh");

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct BackwardParams {
    grad_qkv: DevPtr,
    grad_out: DevPtr,
    out: DevPtr,
    lse: DevPtr,
    qkv: DevPtr,
    delta: DevPtr,
    tokens: i32,
    heads: i32,
    head_dim: i32,
    scale_log2: f32,
}
const _: () = assert!(size_of::<BackwardParams>() == 64, "as in kernels/attention/common.cuh");

/// A kernel, its threads, the tokens of one head that a block serves, and a block's shared memory.
#[derive(Clone, Copy)]
struct Kernel {
    name: &'static str,
    threads: u32,
    block_tokens: usize,
    shared_bytes: usize,
}

impl Kernel {
    fn launch<P: bytemuck::Pod>(&self, gpu: &Gpu, dims: Dims, params: &P) -> Result<()> {
        let blocks = dims.images * dims.heads * dims.tokens.div_ceil(self.block_tokens);
        gpu.launch(self.name, blocks, self.threads, self.shared_bytes, params)
    }
}

/// Bytes of a tile of bf16.
const fn tile(rows: usize, columns: usize) -> usize {
    rows * columns * 2
}

/// A head of one size, kept whole in shared memory.
struct Whole {
    tokens: usize,
    head_dim: usize,
    forward: Kernel,
    backward: Kernel,
}

impl Whole {
    /// Forward with queries, keys and values in shared memory.
    const fn forward(name: &'static str, warps: u32, tokens: usize, head_dim: usize) -> Kernel {
        let shared_bytes = tile(3 * tokens.next_multiple_of(16), head_dim);
        Kernel { name, threads: warps * 32, block_tokens: tokens, shared_bytes }
    }

    /// Backward whose warps see all queries at once: four tiles, `lse`, and the part of delta from each warp.
    const fn short(name: &'static str, tokens: usize, head_dim: usize) -> Kernel {
        let rows = tokens.next_multiple_of(16);
        let warps = rows / 16;
        let shared_bytes = tile(4 * rows, head_dim) + rows * 4 * (1 + warps);
        Kernel { name, threads: warps as u32 * 32, block_tokens: tokens, shared_bytes }
    }

    /// Backward in chunks of `chunk` tiles of queries, with `tiles` tiles of keys to a warp.
    const fn long(
        name: &'static str,
        [warps, tiles, chunk]: [usize; 3],
        tokens: usize,
        head_dim: usize,
    ) -> Kernel {
        let (rows, keys) = (tokens.next_multiple_of(16), warps * tiles * 16);
        let shared_bytes = tile(2 * (rows + keys), head_dim) + tile(keys, chunk * 16) + rows * 8;
        Kernel { name, threads: warps as u32 * 32, block_tokens: tokens, shared_bytes }
    }
}

const WHOLE: [Whole; 5] = [
    Whole {
        tokens: 50,
        head_dim: 64,
        forward: Whole::forward("attention_forward_50x64_bf16", 4, 50, 64),
        backward: Whole::short("attention_backward_50x64_bf16", 50, 64),
    },
    Whole {
        tokens: 65,
        head_dim: 80,
        forward: Whole::forward("attention_forward_65x80_bf16", 5, 65, 80),
        backward: Whole::short("attention_backward_65x80_bf16", 65, 80),
    },
    Whole {
        tokens: 197,
        head_dim: 32,
        forward: Whole::forward("attention_forward_197x32_bf16", 4, 197, 32),
        backward: Whole::long("attention_backward_197x32_bf16", [7, 2, 7], 197, 32),
    },
    Whole {
        tokens: 197,
        head_dim: 64,
        forward: Whole::forward("attention_forward_197x64_bf16", 4, 197, 64),
        backward: Whole::long("attention_backward_197x64_bf16", [13, 1, 7], 197, 64),
    },
    Whole {
        tokens: 257,
        head_dim: 32,
        forward: Whole::forward("attention_forward_257x32_bf16", 4, 257, 32),
        backward: Whole::long("attention_backward_257x32_bf16", [9, 2, 9], 257, 32),
    },
];

/// Kernels for any number of tokens, by the width of a head rounded up to a multiple of 16.
struct Streamed {
    forward: &'static str,
    query: &'static str,
    key: &'static str,
}

macro_rules! streamed {
    ($($width:literal),*) => {
        [$(Streamed {
            forward: concat!("attention_forward_", $width, "_bf16"),
            query: concat!("attention_backward_query_", $width, "_bf16"),
            key: concat!("attention_backward_key_", $width, "_bf16"),
        }),*]
    };
}
const STREAMED: [Streamed; 8] = streamed![16, 32, 48, 64, 80, 96, 112, 128];
/// Tokens that a streamed kernel loads at once.
const STEP: usize = 64;

/// What runs for a size: forward, and the one or two kernels of backward.
struct Plan {
    forward: Kernel,
    backward: [Option<Kernel>; 2],
}

/// The kernels for a size, on a GPU whose blocks have this much shared memory.
fn plan(shared_bytes: u32, dims: Dims) -> Plan {
    let Dims { tokens, head_dim, dtype, .. } = dims;
    if dtype == DType::F32 {
        // A warp to a row; so many numbers for each token of the other side.
        let kernel = |name, numbers: usize| Kernel {
            name,
            threads: 128,
            block_tokens: 4,
            shared_bytes: 4 * numbers * tokens * size_of::<f32>(),
        };
        return Plan {
            forward: kernel("attention_forward_f32", 1),
            backward: [
                Some(kernel("attention_backward_query_f32", 1)),
                Some(kernel("attention_backward_key_f32", 2)),
            ],
        };
    }
    let width = head_dim.next_multiple_of(16);
    let names = &STREAMED[width / 16 - 1];
    // Four warps, each with one or two tiles of 16 of the block's own tokens.
    let kernel = |name, tiles: usize, owned: usize, sums: usize| Kernel {
        name,
        threads: 128,
        block_tokens: 64 * tiles,
        shared_bytes: tile(owned * 64 * tiles + 4 * STEP, width) + sums * size_of::<f32>(),
    };
    let (queries, keys) = (if width <= 64 { 2 } else { 1 }, if width <= 32 { 2 } else { 1 });
    let fits = |k: &Kernel| k.shared_bytes <= shared_bytes as usize;
    let whole = WHOLE.iter().find(|w| (w.tokens, w.head_dim) == (tokens, head_dim));
    let forward = whole.map(|w| w.forward).filter(fits);
    let backward = whole.map(|w| w.backward).filter(fits);
    Plan {
        forward: forward.unwrap_or(kernel(names.forward, queries, 1, 0)),
        backward: match backward {
            Some(whole) => [Some(whole), None],
            None => [
                Some(kernel(names.query, queries, 2, 64 * queries)),
                Some(kernel(names.key, keys, 2, 4 * STEP)),
            ],
        },
    }
}

/// Factor of the products, for weights that are powers of two.
fn scale_log2(dims: Dims) -> f32 {
    ((dims.head_dim as f64).powf(-0.5) * std::f64::consts::LOG2_E) as f32
}

pub(super) fn forward(gpu: &Gpu, args: &Forward<'_>, dims: Dims) -> Result<()> {
    let params = ForwardParams {
        out: args.out.dev_ptr(),
        lse: args.lse.dev_ptr(),
        qkv: args.qkv.dev_ptr(),
        tokens: dims.tokens as i32,
        heads: dims.heads as i32,
        head_dim: dims.head_dim as i32,
        scale_log2: scale_log2(dims),
    };
    plan(gpu.properties().shared_bytes, dims).forward.launch(gpu, dims, &params)
}

pub(super) fn backward(gpu: &Gpu, args: Backward<'_>, dims: Dims) -> Result<()> {
    let (delta, _) =
        args.workspace.carve_tensor(DType::F32, dims.images * dims.heads * dims.tokens);
    let params = BackwardParams {
        grad_qkv: args.grad_qkv.dev_ptr(),
        grad_out: args.grad_out.dev_ptr(),
        out: args.out.dev_ptr(),
        lse: args.lse.dev_ptr(),
        qkv: args.qkv.dev_ptr(),
        delta: delta.dev_ptr(),
        tokens: dims.tokens as i32,
        heads: dims.heads as i32,
        head_dim: dims.head_dim as i32,
        scale_log2: scale_log2(dims),
    };
    let kernels = plan(gpu.properties().shared_bytes, dims).backward;
    kernels.iter().flatten().try_for_each(|kernel| kernel.launch(gpu, dims, &params))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory of a block on compute capability 8.9, 8.0, 9.0.
    const SHARED: [u32; 3] = [101_376, 166_912, 232_448];

    fn dims(tokens: usize, head_dim: usize) -> Dims {
        Dims { images: 1, tokens, heads: 1, head_dim, dtype: DType::Bf16 }
    }

    #[test]
    fn every_size_fits_on_every_gpu() {
        for shared_bytes in SHARED {
            for tokens in (1..=1024).step_by(31).chain(WHOLE.map(|w| w.tokens)) {
                for head_dim in (8..=128).step_by(8) {
                    for dtype in [DType::F32, DType::Bf16] {
                        let Plan { forward, backward } =
                            plan(shared_bytes, Dims { dtype, ..dims(tokens, head_dim) });
                        for kernel in [Some(forward)].iter().chain(&backward).flatten() {
                            let fits = kernel.shared_bytes <= shared_bytes as usize;
                            assert!(fits, "{} for {tokens} x {head_dim}", kernel.name);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn heads_are_kept_whole_where_they_fit() {
        let whole = SHARED.map(|shared_bytes| {
            WHOLE.map(|w| plan(shared_bytes, dims(w.tokens, w.head_dim)).backward[1].is_none())
        });
        let small = [true, true, false, false, false];
        assert_eq!(whole, [small, [true; 5], [true; 5]]);
    }
}
