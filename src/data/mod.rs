//! Images in: sources, decoding, PIL-exact resizing, crops, and the threaded loader.

pub mod augment;
mod cifar;
pub mod decode;
mod folder;
pub mod loader;
pub mod resize;
pub mod shard;
pub mod source;
mod tar;

use bytes::Bytes;

/// An RGB image of bytes, row-major, `(height, width, 3)`. A clone shares the pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `height * width * 3` bytes, in memory of its own or in a mapped file.
    pub pixels: Bytes,
}

/// Mean of the colours of ImageNet's training images, RGB on [0, 1]: what MAE and PixMIM normalise with.
pub const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
/// Standard deviation that goes with [`IMAGENET_MEAN`].
pub const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];
