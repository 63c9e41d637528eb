//! Resizing of images, bit for bit as Pillow does it: [`crate::ops::resize`] on a part of an [`Image`].

use crate::data::Image;
use crate::ops::resize::{Interpolation, Rectangle, resample};

/// A rectangle of whole pixels within an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Rect {
    /// All of `image`.
    #[must_use]
    pub fn whole(image: &Image) -> Self {
        Self { top: 0, left: 0, height: image.height, width: image.width }
    }
}

/// `(height, width)` after the short side is resized to `size` and the aspect ratio is kept; the long side is
/// rounded towards zero, as `torchvision.transforms.Resize(size)` has it.
///
/// # Panics
/// If a side is 0.
#[must_use]
pub fn short_side(height: usize, width: usize, size: usize) -> (usize, usize) {
    if height <= width { (size, size * width / height) } else { (size * height / width, size) }
}

/// Crops `image` to `rect`, then resizes the crop to `(height, width)`. Pixels outside `rect` do not bleed in.
///
/// # Panics
/// If `rect` is not within `image`, or a side of either size is 0.
#[must_use]
pub fn resize(
    image: &Image,
    rect: Rect,
    (height, width): (usize, usize),
    interpolation: Interpolation,
) -> Image {
    assert!(rect.top + rect.height <= image.height && rect.left + rect.width <= image.width);
    assert!(rect.height > 0 && rect.width > 0 && height > 0 && width > 0);
    let part = Rectangle {
        pixels: &image.pixels[3 * (rect.top * image.width + rect.left)..],
        stride: 3 * image.width,
        height: rect.height,
        width: rect.width,
    };
    let mut pixels = vec![0; 3 * height * width];
    resample(&mut pixels, (height, width), part, interpolation);
    Image { height, width, pixels: pixels.into() }
}
