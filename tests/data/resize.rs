//! Resizing against Pillow 12.2.0, bit for bit. The goldens are made by `fixtures/make.py`.

use pixmim::data::Image;
use pixmim::data::resize::{Rect, resize, short_side};
use pixmim::train::config::Interpolation::{self, Bicubic, Bilinear};

use crate::mixed;

/// `v[i, j] = (37 i + 59 j) mod 256` in all channels.
fn ramp(height: usize, width: usize) -> Image {
    let pixels = (0..height)
        .flat_map(|i| (0..width).flat_map(move |j| [((37 * i + 59 * j) % 256) as u8; 3]))
        .collect();
    Image { height, width, pixels }
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

fn resized(image: &Image, size: (usize, usize), interpolation: Interpolation) -> Vec<Vec<u8>> {
    let out = resize(image, Rect::whole(image), size, interpolation);
    assert_eq!((out.height, out.width), size);
    let (pixels, rest) = out.pixels.as_chunks::<3>();
    assert!(rest.is_empty() && pixels.iter().all(|[r, g, b]| r == g && g == b));
    pixels.chunks(size.1).map(|row| row.iter().map(|pixel| pixel[0]).collect()).collect()
}

#[test]
fn shrinking_gives_pillows_values() {
    let size = short_side(6, 8, 4);
    assert_eq!(size, (4, 5));
    assert_eq!(
        resized(&ramp(6, 8), size, Bicubic),
        [
            [30, 126, 176, 76, 146],
            [82, 191, 131, 96, 194],
            [148, 147, 73, 180, 114],
            [205, 86, 121, 181, 82]
        ]
    );
    assert_eq!(
        resized(&ramp(6, 8), size, Bilinear),
        [
            [38, 128, 166, 87, 147],
            [90, 174, 132, 109, 182],
            [143, 143, 90, 162, 118],
            [195, 95, 122, 173, 88]
        ]
    );
}

#[test]
fn enlarging_gives_pillows_values() {
    assert_eq!(
        resized(&ramp(3, 3), (5, 5), Bicubic),
        [
            [0, 15, 56, 97, 119],
            [10, 29, 70, 111, 133],
            [33, 55, 96, 137, 159],
            [59, 81, 122, 163, 185],
            [73, 95, 136, 177, 199]
        ]
    );
}

#[test]
fn crops_of_many_shapes_give_pillows_bits() {
    for ((h, w), (top, left, height, width), size, bilinear, expected) in [
        ((53, 37), (0, 0, 53, 37), (32, 22), false, 0xca3d0c672a63af23),
        ((53, 37), (0, 0, 53, 37), (32, 22), true, 0x139656d71164b2a8),
        ((37, 61), (3, 5, 29, 41), (24, 24), false, 0xa72d0336fe96bbef),
        ((37, 61), (3, 5, 29, 41), (24, 24), true, 0xc14c28e77a002fa9),
        ((17, 9), (1, 2, 11, 5), (40, 31), false, 0x450930b4376da957),
        ((17, 9), (1, 2, 11, 5), (40, 31), true, 0xc069569ee1ddb3f5),
        ((200, 301), (0, 0, 200, 301), (64, 96), false, 0xf7e2cc1b7428cca0),
        ((45, 20), (5, 0, 30, 20), (30, 55), false, 0x6dcc4c672528f9b2),
        ((45, 20), (5, 0, 30, 20), (10, 20), true, 0x83ab816b56b05088),
    ] {
        let interpolation = if bilinear { Bilinear } else { Bicubic };
        let rect = Rect { top, left, height, width };
        let out = resize(&mixed(0, h, w), rect, size, interpolation);
        assert_eq!(fnv1a(&out.pixels), expected, "{rect:?} of {h}x{w} to {size:?}, {bilinear}");
    }
}

#[test]
fn the_same_size_is_the_same_image() {
    let image = mixed(0, 19, 33);
    assert_eq!(resize(&image, Rect::whole(&image), (19, 33), Bicubic), image);
}

#[test]
fn pixels_outside_the_rectangle_do_not_bleed_in() {
    let inner = mixed(0, 11, 14);
    let mut outer = vec![255; 17 * 23 * 3];
    for (y, row) in inner.pixels.chunks(14 * 3).enumerate() {
        let start = ((y + 2) * 23 + 5) * 3;
        outer[start..start + 14 * 3].copy_from_slice(row);
    }
    let outer = Image { height: 17, width: 23, pixels: outer.into() };
    let rect = Rect { top: 2, left: 5, height: 11, width: 14 };
    for size in [(7, 7), (30, 29), (11, 5), (4, 14)] {
        assert_eq!(
            resize(&outer, rect, size, Bicubic),
            resize(&inner, Rect::whole(&inner), size, Bicubic)
        );
    }
}

#[test]
fn the_long_side_is_rounded_towards_zero() {
    assert_eq!(short_side(375, 500, 224), (224, 298));
    assert_eq!(short_side(500, 333, 224), (336, 224));
    assert_eq!(short_side(256, 384, 224), (224, 336));
    assert_eq!(short_side(100, 100, 224), (224, 224));
}
