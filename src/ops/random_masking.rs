//! Random masking (He et al. 2021, arXiv:2111.06377, section 3): of each image's patches a random subset is kept.
//!
//! Patches are shuffled by sorting random words; the first `K` are kept, in that order, the others masked. With
//! `block > 1` whole squares of patches are shuffled (Hu et al. 2022, arXiv:2210.07224, long-sequence MAE): inside a
//! block, patches go down the columns first.

use rayon::prelude::*;

use super::expect_nonzero;
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
    /// `(B, G)` f64, one value for each of the `G` blocks, ascending order first; none NaN.
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
    carve_bytes(DType::I64, images * patches)
}

/// Draws which patches are kept.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] unless the arguments are as their fields say and `L` is a square;
/// [`Error::Invalid`] for a block that is empty or larger than the image, or noise that holds NaN;
/// [`Error::Workspace`].
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    match dev {
        Device::Cpu(_) => cpu(args, dims),
        Device::Cuda(gpu) => return Err(gpu.missing()),
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
            Noise::Given(noise) => {
                noise.expect(call, "noise", DType::F64, &[images, blocks * blocks])?;
                if noise.as_slice::<f64>().iter().any(|x| x.is_nan()) {
                    return Err(Error::invalid("random_masking: noise", "holds NaN"));
                }
            }
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
