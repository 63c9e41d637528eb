//! Random masks, for tests of ops and of kernels.

use pixmim::rng::{Purpose, Stream};

/// Random masks: for each image a shuffle of its patches, cut into kept and masked ones, and its inverse.
pub(crate) struct Masks {
    pub(crate) keep: Vec<i32>,
    pub(crate) masked: Vec<i32>,
    pub(crate) restore: Vec<i32>,
}

pub(crate) fn masks(seed: u64, images: usize, patches: usize, kept: usize) -> Masks {
    let mut masks = Masks { keep: vec![], masked: vec![], restore: vec![] };
    for b in 0..images {
        let stream = Stream::new(0x0D15_EA5E, 0, seed << 32 | b as u64, Purpose::Init);
        let mut shuffle: Vec<i32> = (0..patches as i32).collect();
        for i in 1..patches {
            shuffle.swap(i, stream.below(i as u32, i as u64 + 1) as usize);
        }
        let mut restore = vec![0; patches];
        for (place, &patch) in shuffle.iter().enumerate() {
            restore[patch as usize] = place as i32;
        }
        masks.keep.extend(&shuffle[..kept]);
        masks.masked.extend(&shuffle[kept..]);
        masks.restore.extend(restore);
    }
    masks
}
