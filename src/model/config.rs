//! Sizes of the masked autoencoder.

use crate::{Error, Result};

/// Sizes of a masked autoencoder with a ViT encoder (He et al. 2021, arXiv:2111.06377).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "train", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "train", serde(deny_unknown_fields))]
pub struct MaeConfig {
    /// Side of the square input, in pixels (S).
    pub image_size: usize,
    /// Side of a patch, in pixels (P); divides `image_size`.
    pub patch_size: usize,
    /// Width of the encoder (D); divisible by 4 and by `heads`.
    pub dim: usize,
    /// Transformer blocks of the encoder.
    pub depth: usize,
    /// Attention heads of the encoder (NH).
    pub heads: usize,
    /// Width of the decoder; divisible by 4 and by `decoder_heads`.
    pub decoder_dim: usize,
    /// Transformer blocks of the decoder.
    pub decoder_depth: usize,
    /// Attention heads of the decoder.
    pub decoder_heads: usize,
    /// Width of the MLPs over the width of the tokens.
    pub mlp_ratio: usize,
}

/// Added to the variance in every layer norm.
pub const LAYER_NORM_EPS: f64 = 1e-6;

impl MaeConfig {
    /// `mae_vit_base_patch16` with the decoder of the paper, 512 wide and 8 blocks deep.
    pub const VIT_BASE_PATCH16: Self = Self::vit(16, 768, 12, 12);
    /// `mae_vit_large_patch16`.
    pub const VIT_LARGE_PATCH16: Self = Self::vit(16, 1024, 24, 16);
    /// `mae_vit_huge_patch14`.
    pub const VIT_HUGE_PATCH14: Self = Self::vit(14, 1280, 32, 16);
    /// ViT-S/16 with a decoder of its own width, as PixMIM's authors have it.
    pub const VIT_SMALL_PATCH16: Self =
        Self { decoder_dim: 384, decoder_heads: 12, ..Self::vit(16, 384, 12, 6) };

    const fn vit(patch_size: usize, dim: usize, depth: usize, heads: usize) -> Self {
        Self {
            image_size: 224,
            patch_size,
            dim,
            depth,
            heads,
            decoder_dim: 512,
            decoder_depth: 8,
            decoder_heads: 16,
            mlp_ratio: 4,
        }
    }

    /// Patches along a side of the image.
    #[must_use]
    pub const fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Patches of an image (L).
    #[must_use]
    pub const fn patches(&self) -> usize {
        self.grid() * self.grid()
    }

    /// Numbers of a patch (E).
    #[must_use]
    pub const fn patch_numbers(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }

    /// Refuses sizes that make no network, in the words of a config file's keys.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the key and what it may be.
    pub fn check(&self) -> Result<()> {
        let bounds = [
            ("model.image_size", self.image_size, 4096),
            ("model.patch_size", self.patch_size, 256),
            ("model.dim", self.dim, 16_384),
            ("model.depth", self.depth, 1024),
            ("model.heads", self.heads, 1024),
            ("model.decoder_dim", self.decoder_dim, 16_384),
            ("model.decoder_depth", self.decoder_depth, 1024),
            ("model.decoder_heads", self.decoder_heads, 1024),
            ("model.mlp_ratio", self.mlp_ratio, 64),
        ];
        for (key, value, most) in bounds {
            if !(1..=most).contains(&value) {
                return Err(Error::invalid(key, format!("is {value}, must be 1 to {most}")));
            }
        }
        let (image, patch) = (self.image_size, self.patch_size);
        if patch > image {
            let why =
                format!("is {patch}, larger than model.image_size {image}; use a smaller patch");
            return Err(Error::invalid("model.patch_size", why));
        }
        if !image.is_multiple_of(patch) {
            let below = image - image % patch;
            let why = format!(
                "is {image} and not a multiple of model.patch_size {patch}; use {below} or {}",
                below + patch
            );
            return Err(Error::invalid("model.image_size", why));
        }
        let widths = [
            ("model.dim", self.dim, "model.heads", self.heads),
            ("model.decoder_dim", self.decoder_dim, "model.decoder_heads", self.decoder_heads),
        ];
        for (dim_key, dim, heads_key, heads) in widths {
            if !dim.is_multiple_of(4) {
                let below = dim - dim % 4;
                let why = format!(
                    "is {dim} and not divisible by 4, as its position embedding of two sines and two \
                     cosines needs; use {below} or {}",
                    below + 4
                );
                return Err(Error::invalid(dim_key, why));
            }
            if !dim.is_multiple_of(heads) {
                let why = format!(
                    "is {heads} and does not divide {dim_key} {dim}; use {}",
                    near_divisors(dim, heads)
                );
                return Err(Error::invalid(heads_key, why));
            }
        }
        Ok(())
    }
}

/// The divisors of `whole` next to `part` on both sides, in words: "32 or 64".
pub(crate) fn near_divisors(whole: usize, part: usize) -> String {
    let below = (1..part.min(whole + 1)).rev().find(|part| whole.is_multiple_of(*part));
    let above = (part + 1..=whole).find(|part| whole.is_multiple_of(*part));
    let near: Vec<_> = [below, above].into_iter().flatten().map(|near| near.to_string()).collect();
    near.join(" or ")
}
