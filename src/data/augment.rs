//! Crops and flips, as pure functions of the seed, the epoch and the sample.
//!
//! Nothing is drawn from a generator's history, so that a sample is cropped alike whatever the number of threads and
//! wherever a run was resumed. Which word of the stream decides what is part of the format.

use crate::data::Image;
use crate::data::resize::{Rect, resize, short_side};
pub use crate::ops::input::{Geometry, reflect};
use crate::rng::{Purpose, Stream};
use crate::train::config::Interpolation;
use crate::{Error, Result};

/// The crop that starts at the first pixel of `image`, not mirrored: all of it, if it is square.
#[must_use]
pub fn whole(image: &Image) -> Geometry {
    Geometry { height: image.height as i64, width: image.width as i64, ..Geometry::default() }
}

/// The choices made for `sample` in `epoch`.
#[must_use]
pub const fn choices(seed: u64, epoch: u32, sample: usize) -> Stream {
    Stream::new(seed, epoch, sample as u64, Purpose::Augment)
}

/// Simple Resized Crop (PixMIM section 3.3; SRC of `DeiT` III), its random half: of an image whose short side is
/// `size`, padded by reflection with `padding` pixels on each side, a `size x size` crop anywhere, mirrored with
/// probability `flip`.
///
/// # Errors
/// [`Error::Invalid`] if `padding` is not below `size`, or the image smaller than the crop.
pub fn simple_crop(
    choices: &Stream,
    (height, width): (usize, usize),
    size: usize,
    padding: usize,
    flip: f64,
) -> Result<Geometry> {
    check_padding(padding, size)?;
    if height.min(width) < size {
        return Err(Error::invalid(
            "image",
            format!("is {width} x {height}, smaller than the crop of {size} x {size}"),
        ));
    }
    let start = |index, extent: usize| {
        let places = (extent + 2 * padding - size + 1) as u64;
        choices.below(index, places) as i64 - padding as i64
    };
    Ok(Geometry {
        offset: 0,
        height: height as i64,
        width: width as i64,
        top: start(0, height),
        left: start(1, width),
        flip: i64::from(choices.uniform(2) < flip),
    })
}

/// The part of an image that a crop of `side` pixels shows, and the crop's place in that part, which shows the same.
///
/// A crop that reaches over an edge shows what lies there by reflection; the part then ends at that edge, so that it is
/// reflected alike. It is at most `side` pixels high and wide, unless all rows or columns of the crop lie over an edge. The
/// crop must be one that [`check_geometry`](crate::ops::input::check_geometry) lets pass.
#[must_use]
pub fn shown(crop: &Geometry, side: usize) -> (Rect, Geometry) {
    let span = |start: i64, extent: i64| {
        let folded = |i| reflect(i, extent as usize) as i64;
        let last = start + side as i64 - 1;
        let first = if start < 0 { 0 } else { start.min(folded(last)) };
        let end = if last >= extent { extent } else { last.max(folded(start)) + 1 };
        (first, end - first)
    };
    let (top, height) = span(crop.top, crop.height);
    let (left, width) = span(crop.left, crop.width);
    let place =
        Geometry { offset: 0, height, width, top: crop.top - top, left: crop.left - left, ..*crop };
    let [top, left, height, width] = [top, left, height, width].map(|n| n as usize);
    (Rect { top, left, height, width }, place)
}

/// Refuses a border that reflection cannot fill.
///
/// # Errors
/// [`Error::Invalid`] if `padding` is not below `size`.
pub fn check_padding(padding: usize, size: usize) -> Result<()> {
    if padding >= size {
        return Err(Error::invalid(
            "method.padding",
            format!(
                "is {padding}, but an image of {size} pixels can be reflected by at most {}",
                size.saturating_sub(1)
            ),
        ));
    }
    Ok(())
}

/// Tries of [`random_resized_crop`] before it falls back to the centre.
const TRIES: u32 = 10;

/// Random Resized Crop (Szegedy et al. 2015; `torchvision.transforms.RandomResizedCrop`): a rectangle with a share
/// of the area within `scale` and an aspect ratio within 3/4 to 4/3, and whether it is mirrored. The rectangle is to be
/// resized to a square.
#[must_use]
pub fn random_resized_crop(
    choices: &Stream,
    (height, width): (usize, usize),
    scale: [f64; 2],
    flip: f64,
) -> (Rect, bool) {
    const ASPECT: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];
    let between = |u: f64, [low, high]: [f64; 2]| low + u * (high - low);
    let mirrored = choices.uniform(4 * TRIES) < flip;
    for attempt in 0..TRIES {
        let word = 4 * attempt;
        let area = between(choices.uniform(word), scale) * (height * width) as f64;
        let aspect = between(choices.uniform(word + 1), ASPECT.map(f64::ln)).exp();
        let w = (area * aspect).sqrt().round_ties_even() as usize;
        let h = (area / aspect).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let top = choices.below(word + 2, (height - h + 1) as u64) as usize;
            let left = choices.below(word + 3, (width - w + 1) as u64) as usize;
            return (Rect { top, left, height: h, width: w }, mirrored);
        }
    }
    // The largest rectangle in the centre whose aspect ratio is allowed.
    let aspect = width as f64 / height as f64;
    let (h, w) = if aspect < ASPECT[0] {
        ((width as f64 / ASPECT[0]).round_ties_even() as usize, width)
    } else if aspect > ASPECT[1] {
        (height, (height as f64 * ASPECT[1]).round_ties_even() as usize)
    } else {
        (height, width)
    };
    (Rect { top: (height - h) / 2, left: (width - w) / 2, height: h, width: w }, mirrored)
}

/// The image with its short side resized to `size`, and the `size x size` crop in its centre, not mirrored: what is
/// shown in pictures and used in evaluation. Odd margins are halved as `torchvision.transforms.CenterCrop` does.
#[must_use]
pub fn center(image: &Image, size: usize, interpolation: Interpolation) -> (Image, Geometry) {
    let target = short_side(image.height, image.width, size);
    let resized = resize(image, Rect::whole(image), target, interpolation);
    let start = |extent: usize| ((extent - size) as f64 / 2.0).round_ties_even() as i64;
    let (top, left) = (start(resized.height), start(resized.width));
    let geometry = Geometry { top, left, ..whole(&resized) };
    (resized, geometry)
}
