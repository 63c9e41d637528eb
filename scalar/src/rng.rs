//! Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
//!
//! Every random choice of a run is a pure function of (seed, epoch, sample, purpose, index), never of a generator's
//! history: it does not depend on the number of threads, ranks or workers, nor on where a run was resumed. CPU and
//! CUDA produce the same words.

use crate::Scalar;

/// What a stream of random words decides. The numbers are part of the format: a resumed run must draw the same words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Order of the samples in an epoch.
    Order = 0,
    /// Crop and flip of a sample.
    Augment = 1,
    /// Which patches of a sample are masked.
    Mask = 2,
    /// Initial weights; the stream's `sample` is the tensor's name, hashed.
    Init = 3,
    /// Which images are shown in the pictures.
    Picture = 4,
}

/// One Philox4x32-10 block: four words from a counter and a key.
#[must_use]
pub const fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let mut round = 0;
    while round < 10 {
        let wide0 = 0xD251_1F53_u64 * counter[0] as u64;
        let wide1 = 0xCD9E_8D57_u64 * counter[2] as u64;
        counter = [
            (wide1 >> 32) as u32 ^ counter[1] ^ key[0],
            wide1 as u32,
            (wide0 >> 32) as u32 ^ counter[3] ^ key[1],
            wide0 as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        round += 1;
    }
    counter
}

/// The random words of one (seed, epoch, sample, purpose), addressable by index.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    seed: [u32; 2],
    sample: u32,
    epoch_and_purpose: [u32; 2],
}

impl Stream {
    /// The stream of `sample` in `epoch`. Samples and epochs count below 2^32, epochs below 2^28.
    #[must_use]
    pub const fn new(seed: u64, epoch: u32, sample: u64, purpose: Purpose) -> Self {
        // The counter has room for one word of sample; its high bits share the word of the purpose.
        Self {
            seed: [seed as u32, (seed >> 32) as u32],
            sample: sample as u32,
            epoch_and_purpose: [epoch, purpose as u32 ^ ((sample >> 32) as u32) << 4],
        }
    }

    /// Block `index` of the stream: four words.
    #[must_use]
    pub const fn block(&self, index: u32) -> [u32; 4] {
        let [epoch, purpose] = self.epoch_and_purpose;
        philox4x32_10([index, self.sample, epoch, purpose], self.seed)
    }

    /// Word `index` of the stream.
    #[must_use]
    pub const fn word(&self, index: u32) -> u32 {
        self.block(index / 4)[(index % 4) as usize]
    }

    /// Uniform in [0, 1) with 53 bits, from words `2 index` and `2 index + 1`.
    #[must_use]
    pub fn uniform(&self, index: u32) -> f64 {
        let block = self.block(index / 2);
        let at = 2 * (index % 2) as usize;
        let bits = (u64::from(block[at]) << 32) | u64::from(block[at + 1]);
        (bits >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..bound`, from words `2 index` and `2 index + 1`: 64-bit multiply-shift, whose bias is below
    /// `bound / 2^64`.
    #[must_use]
    pub fn below(&self, index: u32, bound: u64) -> u64 {
        let block = self.block(index / 2);
        let at = 2 * (index % 2) as usize;
        let bits = (u64::from(block[at]) << 32) | u64::from(block[at + 1]);
        ((u128::from(bits) * u128::from(bound)) >> 64) as u64
    }

    /// Standard normal (Box-Muller), from uniforms `2 index` and `2 index + 1`.
    #[must_use]
    pub fn normal(&self, index: u32) -> f64 {
        // 1 - u lies in (0, 1]: the logarithm is finite.
        let radius = Scalar::sqrt(-2.0 * Scalar::ln(1.0 - self.uniform(2 * index)));
        let angle = core::f64::consts::TAU * self.uniform(2 * index + 1);
        radius * with_std!(angle.cos(), libm::cos(angle))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors published with Random123 (`kat_vectors`, philox4x32 10).
    #[test]
    fn philox_gives_the_random123_vectors() {
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(
            philox4x32_10([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10(pi, [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn streams_of_different_keys_differ() {
        let base = Stream::new(1, 2, 3, Purpose::Mask).block(0);
        for other in [
            Stream::new(2, 2, 3, Purpose::Mask),
            Stream::new(1 << 32 | 1, 2, 3, Purpose::Mask),
            Stream::new(1, 3, 3, Purpose::Mask),
            Stream::new(1, 2, 4, Purpose::Mask),
            Stream::new(1, 2, 1 << 32 | 3, Purpose::Mask),
            Stream::new(1, 2, 3, Purpose::Augment),
        ] {
            assert_ne!(other.block(0), base);
        }
    }

    #[test]
    fn uniforms_fill_the_unit_interval_and_normals_have_unit_variance() {
        let stream = Stream::new(7, 0, 0, Purpose::Init);
        let n = 20_000;
        let uniforms = || (0..n).map(|i| stream.uniform(i));
        assert!(uniforms().all(|u| (0.0..1.0).contains(&u)));
        let mean = uniforms().sum::<f64>() / f64::from(n);
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        let normals = || (0..n).map(|i| stream.normal(i));
        let mean = normals().sum::<f64>() / f64::from(n);
        let var = normals().map(|x| (x - mean) * (x - mean)).sum::<f64>() / f64::from(n);
        assert!(mean.abs() < 0.03 && (var - 1.0).abs() < 0.05, "{mean} {var}");
        assert!((0..n).map(|i| stream.below(i, 9)).all(|x| x < 9));
    }
}
