//! Decoding against Pillow. The files are made by `fixtures/make.py`; `<name>.rgb` is what Pillow makes of them.

use pixmim::data::Image;
use pixmim::data::decode::{DecodeError, Options, decode};
use proptest::prelude::*;

use crate::fixture;

const HEIGHT: usize = 13;
const WIDTH: usize = 21;

const TURNING: Options = Options {
    max_file_bytes: 1 << 20,
    max_side: 1 << 10,
    max_pixels: 1 << 20,
    exif_orientation: true,
};

fn decoded(name: &str) -> Image {
    decode(&fixture(name), &Options::default()).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn expected(name: &str) -> Image {
    Image { height: HEIGHT, width: WIDTH, pixels: fixture(&format!("{name}.rgb")).into() }
}

#[test]
fn png_is_as_pillow_has_it() {
    for name in [
        "colour.png",
        "png_named.JPEG",
        "grey.png",
        "one_bit.png",
        "alpha.png",
        "grey_alpha.png",
        "palette_alpha.png",
        "grey_16.png",
    ] {
        assert_eq!(decoded(name), expected(name), "{name}");
    }
}

#[test]
fn lossless_webp_is_as_pillow_has_it_and_an_animation_gives_its_first_frame() {
    for name in ["lossless.webp", "alpha.webp", "animated.webp"] {
        assert_eq!(decoded(name), expected(name), "{name}");
    }
}

/// Inverse DCT, chroma upsampling and colour conversion may round differently from libjpeg-turbo and libwebp.
#[test]
fn lossy_formats_are_within_rounding_of_pillow() {
    for (name, worst_allowed, mean_allowed) in [
        ("colour.jpg", 1, 0.5),
        // Colour conversion magnifies how upsampled chroma was rounded.
        ("halved_chroma.jpg", 4, 0.5),
        ("progressive.jpg", 1, 0.5),
        ("grey.jpg", 1, 0.5),
        ("cmyk.jpg", 1, 0.5),
        ("lossy.webp", 1, 0.5),
    ] {
        let (found, expected) = (decoded(name), expected(name));
        assert_eq!((found.height, found.width), (HEIGHT, WIDTH), "{name}");
        assert_eq!(found.pixels.len(), expected.pixels.len(), "{name}");
        let differences = found.pixels.iter().zip(&expected.pixels).map(|(a, b)| a.abs_diff(*b));
        let worst = differences.clone().max().unwrap();
        let mean = differences.map(f64::from).sum::<f64>() / found.pixels.len() as f64;
        assert!(worst <= worst_allowed, "{name}: worst {worst}, mean {mean}");
        assert!(mean <= mean_allowed, "{name}: worst {worst}, mean {mean}");
    }
}

/// The first pixel of each 8x8 block of `orientation.jpg`, whose six blocks are named a to f.
fn blocks(image: &Image) -> String {
    let letter = |y: usize, x: usize| {
        let value = image.pixels[3 * ((8 * y + 4) * image.width + 8 * x + 4)];
        char::from(b"abcdef"[(usize::from(value) + 20) / 40 - 1])
    };
    let row = |y| (0..image.width / 8).map(|x| letter(y, x)).collect::<String>();
    (0..image.height / 8).map(row).collect::<Vec<_>>().join("/")
}

#[test]
fn exif_orientation_is_applied_only_if_asked_for() {
    let mut bytes = fixture("orientation.jpg");
    // The entry of the tag: type SHORT, count 1, then the value.
    let tag = bytes.windows(8).position(|w| w == [1, 0x12, 0, 3, 0, 0, 0, 1]).unwrap();
    for (orientation, shown) in [
        (1, "abc/def"),
        (2, "cba/fed"),
        (3, "fed/cba"),
        (4, "def/abc"),
        (5, "ad/be/cf"),
        (6, "da/eb/fc"),
        (7, "fc/eb/da"),
        (8, "cf/be/ad"),
        (0, "abc/def"),
        (9, "abc/def"),
    ] {
        bytes[tag + 9] = orientation;
        assert_eq!(blocks(&decode(&bytes, &TURNING).unwrap()), shown, "{orientation}");
        let plain = decode(&bytes, &Options::default()).unwrap();
        assert_eq!(blocks(&plain), "abc/def", "{orientation}");
    }
}

#[test]
fn exif_orientation_is_found_in_png_and_webp() {
    for name in ["turned.png", "turned.webp"] {
        let turned = Image { height: WIDTH, width: HEIGHT, ..expected(name) };
        assert_eq!(decode(&fixture(name), &TURNING).unwrap(), turned, "{name}");
    }
}

#[test]
fn a_truncated_file_is_an_error_wherever_it_ends() {
    for name in [
        "colour.jpg",
        "progressive.jpg",
        "grey.jpg",
        "cmyk.jpg",
        "colour.png",
        "lossless.webp",
        "lossy.webp",
    ] {
        let bytes = fixture(name);
        // The end chunk of PNG holds nothing, the last byte of WebP may be padding.
        let needed = bytes.len()
            - match name.rsplit('.').next() {
                Some("png") => 12,
                Some("webp") => 1,
                _ => 0,
            };
        for len in 0..needed {
            let error = decode(&bytes[..len], &Options::default());
            assert!(error.is_err(), "{name} is accepted with {len} of {} bytes", bytes.len());
        }
    }
    let half = &fixture("colour.jpg")[..700];
    let error = decode(half, &Options::default()).unwrap_err();
    assert_eq!(error, DecodeError::Truncated("JPEG"));
}

#[test]
fn other_files_are_named_in_the_error() {
    let said = |bytes: &[u8]| decode(bytes, &Options::default()).unwrap_err().to_string();
    assert_eq!(said(b""), "not an image: the file is empty");
    assert_eq!(said(b"<html>"), "not an image: starts with 3c 68 74 6d 6c 3e");
    assert_eq!(said(b"\x1f\x8b\x08\0"), "not an image: a gzip file");
    assert_eq!(said(b"GIF89a.."), "a GIF image: convert it to JPEG, PNG or WebP");
}

#[test]
fn limits_are_judged_from_the_header() {
    let bytes = fixture("colour.png");
    let refused = |options: Options| decode(&bytes, &options).unwrap_err().to_string();
    let default = Options::default();
    assert_eq!(
        refused(Options { max_file_bytes: 300, ..default }),
        "too large: 309 bytes; data.max_file_mib allows 300"
    );
    assert_eq!(
        refused(Options { max_side: 20, ..default }),
        "too large: 21 x 13 pixels; data.max_side allows 20"
    );
    assert_eq!(
        refused(Options { max_pixels: 272, ..default }),
        "too large: 21 x 13 pixels; data.max_mebipixels allows 272 pixels"
    );
    let just = Options { max_file_bytes: 309, max_side: 21, max_pixels: 273, ..default };
    assert!(decode(&bytes, &just).is_ok());

    // Nothing but headers, which claim 1.6 GB, and a strip that a resize of its short side would blow up.
    let jpeg = [0xFF, 0xD8, 0xFF, 0xC0, 0, 11, 8, 0x40, 0, 0x80, 0, 1, 1, 0x11, 0];
    let scan = [0xFF, 0xDA, 0, 8, 1, 1, 0, 0, 63, 0];
    let bomb = [&jpeg[..], &scan[..]].concat();
    let error = decode(&bomb, &default).unwrap_err().to_string();
    assert_eq!(error, "too large: 32768 x 16384 pixels; data.max_side allows 16384");
    let mut strip = bomb;
    strip[7..11].copy_from_slice(&[0, 1, 0, 101]);
    let error = decode(&strip, &default).unwrap_err().to_string();
    assert_eq!(error, "too large: 101 x 1 pixels; its sides may differ 100-fold");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn no_bytes_make_it_panic(
        name in prop::sample::select(vec![
            "colour.jpg", "halved_chroma.jpg", "progressive.jpg", "cmyk.jpg", "orientation.jpg",
            "palette_alpha.png", "grey_16.png", "turned.png",
            "lossless.webp", "lossy.webp", "alpha.webp", "animated.webp", "turned.webp",
        ]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        keep in 0.5..2.0,
    ) {
        let mut bytes = fixture(name);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate((bytes.len() as f64 * keep) as usize);
        if let Ok(image) = decode(&bytes, &TURNING) {
            prop_assert_eq!(image.pixels.len(), 3 * image.height * image.width);
            prop_assert!(image.height * image.width > 0);
        }
    }
}
