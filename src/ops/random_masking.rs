//! Random masking (He et al. 2021, arXiv:2111.06377, section 3): of each image's patches a random subset is kept.
//!
//! Patches are shuffled by sorting random words; the first `K` are kept, in that order, the others masked. With
//! `block > 1` whole squares of patches are shuffled (Hu et al. 2022, arXiv:2210.07224, long-sequence MAE): inside a
//! block, patches go down the columns first.

use rayon::prelude::*;

use super::{cost, expect_nonzero};
use crate::device::Call;
use crate::rng::{Purpose, Stream};
use crate::tensor::{carve_bytes, expect_workspace};
use crate::{DType, Device, Error, Result, TensorMut, TensorRef};

/// Where the noise comes from that orders the blocks.
#[derive(Debug)]
pub enum Noise<'a> {
    /// Word `i` of the stream (seed, epoch, sample, [`Purpose::Mask`]) for block `i`; equal words keep their order.
    Drawn {
        /// Seed of the run.
        seed: u64,
        /// `(1)` i64: epoch of the step, below 2^28.
        epoch: TensorRef<'a>,
        /// `(B)` i64: sample ids.
        samples: TensorRef<'a>,
    },
    /// `(B, G)` f64, one value for each of the `G` blocks, ascending order first; none NaN. For the CPU only: it repeats
    /// orders drawn elsewhere.
    Given(TensorRef<'a>),
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(B, K)` i32: kept patches. Overwritten.
    pub ids_keep: TensorMut<'a>,
    /// `(B, M)` i32: masked patches. Overwritten.
    pub ids_masked: TensorMut<'a>,
    /// `(B, L)` i32: where patch `l` stands in `ids_keep` followed by `ids_masked`. Overwritten.
    pub ids_restore: TensorMut<'a>,
    /// What orders the blocks.
    pub noise: Noise<'a>,
    /// Patches along a side of a block; 1: each patch by itself.
    pub block: usize,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Number of patches kept of `patches` (L) when `mask_ratio` of them are masked: `int(L (1 - mask_ratio))`.
#[must_use]
pub fn kept(patches: usize, mask_ratio: f64) -> usize {
    (patches as f64 * (1.0 - mask_ratio)) as usize
}

/// Bytes of workspace that [`forward`] needs for `images` (B) of `patches` (L).
#[must_use]
pub fn workspace_bytes(dev: &Device, images: usize, patches: usize) -> usize {
    match dev {
        Device::Cpu(_) => carve_bytes(DType::I64, images * patches),
        // It sorts in shared memory.
        Device::Cuda(_) => 0,
    }
}

/// Draws which patches are kept.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] unless the arguments are as their fields say and `L` is a square;
/// [`Error::Invalid`] for a block that is empty or larger than the image, noise that holds NaN, and on a GPU noise that is
/// given or more blocks than its shared memory sorts; [`Error::Workspace`].
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev.span("random_masking::forward", || {
        cost::random_masking_forward([dims.images, dims.patches])
    });
    match dev {
        Device::Cpu(_) => cpu(args, dims),
        Device::Cuda(gpu) => launch::forward(gpu, args, dims)?,
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Dims {
    images: usize,
    patches: usize,
    kept: usize,
    /// Patches along a side of the image.
    grid: usize,
    /// Blocks along a side of the image.
    blocks: usize,
}

impl Forward<'_> {
    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "random_masking::forward", dev };
        let [images, kept] = self.ids_keep.dims(call, "ids_keep", "(B, K)")?;
        let [_, masked] = self.ids_masked.dims(call, "ids_masked", "(B, M)")?;
        let patches = kept + masked;
        expect_nonzero(call, "ids_keep", &[images, kept])?;
        expect_nonzero(call, "ids_masked", &[masked])?;
        self.ids_keep.expect(call, "ids_keep", DType::I32, &[images, kept])?;
        self.ids_masked.expect(call, "ids_masked", DType::I32, &[images, masked])?;
        self.ids_restore.expect(call, "ids_restore", DType::I32, &[images, patches])?;
        let grid = patches.isqrt();
        if grid * grid != patches {
            let expected = "(B, L) with a square number L of patches".into();
            let found = vec![images, patches];
            return Err(Error::Shape { op: call.op, arg: "ids_restore", expected, found });
        }
        if self.block == 0 || self.block > grid {
            let why = format!("is {}, must be 1 to the {grid} patches of a side", self.block);
            return Err(Error::invalid("random_masking: block", why));
        }
        let blocks = grid.div_ceil(self.block);
        match &self.noise {
            Noise::Drawn { samples, epoch, .. } => {
                epoch.expect(call, "noise.epoch", DType::I64, &[1])?;
                samples.expect(call, "noise.samples", DType::I64, &[images])?;
            }
            Noise::Given(_) if matches!(dev, Device::Cuda(_)) => {
                let why = "is given, which only the CPU takes; a GPU draws it from a seed";
                return Err(Error::invalid("random_masking: noise", why));
            }
            Noise::Given(noise) => {
                noise.expect(call, "noise", DType::F64, &[images, blocks * blocks])?;
                if noise.as_slice::<f64>().iter().any(|x| x.is_nan()) {
                    return Err(Error::invalid("random_masking: noise", "holds NaN"));
                }
            }
        }
        if let Device::Cuda(gpu) = dev {
            launch::expect_room(gpu, blocks)?;
        }
        expect_workspace(call, &self.workspace, workspace_bytes(dev, images, patches))?;
        Ok(Dims { images, patches, kept, grid, blocks })
    }
}

fn cpu(args: Forward<'_>, dims: Dims) {
    let Dims { images, patches, kept, .. } = dims;
    let Forward { noise, block, .. } = args;
    let (orders, _) = args.workspace.carve::<i64>(images * patches);
    let keep = args.ids_keep.into_slice::<i32>().par_chunks_mut(kept);
    let masked = args.ids_masked.into_slice::<i32>().par_chunks_mut(patches - kept);
    let restore = args.ids_restore.into_slice::<i32>().par_chunks_mut(patches);
    let rows = keep.zip(masked).zip(restore).zip(orders.par_chunks_mut(patches)).enumerate();
    rows.for_each(|(b, (((keep, masked), restore), order))| {
        let count = dims.blocks * dims.blocks;
        let order = &mut order[..count];
        order.iter_mut().zip(0..).for_each(|(id, i)| *id = i);
        match &noise {
            Noise::Drawn { seed, epoch, samples } => {
                let sample = samples.as_slice::<i64>()[b].cast_unsigned();
                let words =
                    Stream::new(*seed, epoch.as_slice::<i64>()[0] as u32, sample, Purpose::Mask);
                // The word above the id: sorting these sorts by word, then by id. Unsigned, as words are.
                for (id, i) in order.iter_mut().zip(0..) {
                    *id = i64::from(words.word(i)) << 32 | i64::from(i);
                }
                order.sort_unstable_by_key(|id| id.cast_unsigned());
                order.iter_mut().for_each(|id| *id &= i64::from(u32::MAX));
            }
            Noise::Given(noise) => {
                let noise = &noise.as_slice::<f64>()[b * count..][..count];
                let key = |id: &i64| (noise[*id as usize], *id);
                order.sort_unstable_by(|a, b| key(a).partial_cmp(&key(b)).expect("none is NaN"));
            }
        }
        let shuffled = order.iter().flat_map(|&id| patches_of_block(id as usize, block, dims));
        for (place, patch) in shuffled.enumerate() {
            restore[patch] = place as i32;
            match place.checked_sub(kept) {
                None => keep[place] = patch as i32,
                Some(place) => masked[place] = patch as i32,
            }
        }
    });
}

/// The patches of a block, columns outermost; those beyond the image's edge are left out.
fn patches_of_block(id: usize, block: usize, dims: Dims) -> impl Iterator<Item = usize> {
    let grid = dims.grid;
    let (x, y) = (id % dims.blocks * block, id / dims.blocks * block);
    (x..(x + block).min(grid))
        .flat_map(move |x| (y..(y + block).min(grid)).map(move |y| y * grid + x))
}

mod launch {
    use super::{Dims, Forward, Noise};
    use crate::cuda::{DevPtr, Gpu};
    use crate::{Error, Result};

    /// As in `kernels/random_masking.cu`.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    struct Params {
        ids_keep: DevPtr,
        ids_masked: DevPtr,
        ids_restore: DevPtr,
        epoch: DevPtr,
        samples: DevPtr,
        seed: u64,
        kept: u32,
        grid: u32,
        block: u32,
        blocks: u32,
        slots: u32,
        unused: u32,
    }
    const _: () = assert!(size_of::<Params>() == 72);

    /// Keys that one image sorts: a Philox block makes four.
    fn slots(blocks: usize) -> Option<usize> {
        blocks.checked_mul(blocks)?.checked_next_power_of_two().map(|slots| slots.max(4))
    }

    /// Refuses more blocks along a side than shared memory has room for.
    pub(super) fn expect_room(gpu: &Gpu, blocks: usize) -> Result<()> {
        let most = gpu.properties().shared_bytes as usize / size_of::<u64>();
        if slots(blocks).is_some_and(|slots| slots <= most) {
            return Ok(());
        }
        let why = format!(
            "leaves {blocks} x {blocks} blocks of an image, of which this GPU sorts {}; take a larger block",
            1usize << most.ilog2()
        );
        Err(Error::invalid("random_masking: block", why))
    }

    pub(super) fn forward(gpu: &Gpu, args: Forward<'_>, dims: Dims) -> Result<()> {
        let Noise::Drawn { seed, epoch, samples } = args.noise else {
            unreachable!("checked: a GPU draws")
        };
        let slots = slots(dims.blocks).expect("checked: they have room");
        let params = Params {
            ids_keep: args.ids_keep.dev_ptr(),
            ids_masked: args.ids_masked.dev_ptr(),
            ids_restore: args.ids_restore.dev_ptr(),
            epoch: epoch.dev_ptr(),
            samples: samples.dev_ptr(),
            seed,
            kept: dims.kept as u32,
            grid: dims.grid as u32,
            block: args.block as u32,
            blocks: dims.blocks as u32,
            slots: slots as u32,
            unused: 0,
        };
        // A thread for each pair of keys.
        let block = (slots / 2).clamp(32, 1024) as u32;
        let shared_bytes = slots * size_of::<u64>();
        gpu.launch("random_masking_forward", dims.images, block, shared_bytes, &params)
    }
}
