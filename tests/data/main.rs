//! Tests of the data: decoding, resizing, crops, sources and the loader.
#![cfg(feature = "train")]
#![allow(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::fs;
use std::path::{Path, PathBuf};

use pixmim::data::Image;

mod augment;
mod decode;
mod loader;
mod resize;
mod shard;
mod source;
mod tar;

/// Path of a file made by `fixtures/make.py`.
fn fixture_path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/data/fixtures", name].iter().collect()
}

fn fixture(name: &str) -> Vec<u8> {
    let path = fixture_path(name);
    fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// An image in which neighbours and channels differ, as do the images of other seeds.
fn mixed(seed: usize, height: usize, width: usize) -> Image {
    let value = |y: usize, x: usize, c: usize| seed + (y * 7919 + x * 104_729 + c * 1_299_709) / 13;
    let pixels = (0..height)
        .flat_map(|y| (0..width).flat_map(move |x| (0..3).map(move |c| value(y, x, c) as u8)))
        .collect();
    Image { height, width, pixels }
}

fn write_png(path: &Path, image: &Image) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let file = fs::File::create(path).unwrap();
    let mut encoder = png::Encoder::new(file, image.width as u32, image.height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(&image.pixels).unwrap();
}
