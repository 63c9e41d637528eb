//! The data path on the bundled photos: decoding, the two crops, each on one thread, and the loader on all. Images in
//! a second, on the CPU whatever the device.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use criterion::Bencher;
use pixmim::data::decode::{self, Options};
use pixmim::data::loader::{Loader, LoaderConfig, Resample};
use pixmim::data::resize::{Rect, resize, short_side};
use pixmim::data::source::Source;
use pixmim::data::{Image, augment};
use pixmim::train::config::{Crop, Interpolation};

use crate::Bench;
use crate::report::Row;

/// Side of the square that the network sees, in pixels.
const SIDE: usize = 224;
const PADDING: usize = 4;
const SCALE: [f64; 2] = [0.2, 1.0];
const FLIP: f64 = 0.5;

pub(crate) fn bench(bench: &mut Bench) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/photos");
    // The program may have been carried to another machine.
    let Ok(source) = Source::open(&path, &Options::default()) else {
        println!("data is left out: {} holds no photos", path.display());
        return;
    };
    let source = Arc::new(source);
    let count = source.len();
    let files: Vec<Vec<u8>> =
        (0..count).map(|i| std::fs::read(path.join(source.name(i))).unwrap()).collect();
    let decode = |file: &Vec<u8>| decode::decode(file, &Options::default()).unwrap();
    let photos: Vec<Image> = files.iter().map(decode).collect();

    time(bench, "decode", "jpeg", count, |b| {
        b.iter(|| files.iter().for_each(|file| drop(black_box(decode(file)))));
    });
    time(bench, "simple crop", "bicubic 224", count, |b| {
        b.iter(|| {
            for (i, photo) in photos.iter().enumerate() {
                let size = short_side(photo.height, photo.width, SIDE);
                let resized = resize(photo, Rect::whole(photo), size, Interpolation::Bicubic);
                let choices = augment::choices(0, 0, i);
                let place = augment::simple_crop(&choices, size, SIDE, PADDING, FLIP).unwrap();
                black_box((resized, place));
            }
        });
    });
    time(bench, "random resized crop", "bicubic 224", count, |b| {
        b.iter(|| {
            for (i, photo) in photos.iter().enumerate() {
                let choices = augment::choices(0, 0, i);
                let extent = (photo.height, photo.width);
                let (part, _) = augment::random_resized_crop(&choices, extent, SCALE, FLIP);
                black_box(resize(photo, part, (SIDE, SIDE), Interpolation::Bicubic));
            }
        });
    });
    for (shape, crop) in
        [("simple crop", Crop::Simple), ("random resized crop", Crop::RandomResized)]
    {
        let config = LoaderConfig {
            image_size: SIDE,
            crop,
            padding: PADDING,
            crop_scale: SCALE,
            interpolation: Interpolation::Bicubic,
            flip: FLIP,
            seed: 0,
            global_batch: count,
            micro_batch: count,
            threads: rayon::current_num_threads(),
            prefetch: 2,
            cache_bytes: 0,
            max_bad_share: 0.0,
            resample: Resample::OnHost,
        };
        let (source, mut loader) = (Arc::clone(&source), None);
        time(bench, "loader", shape, count, |b| {
            let loader = loader.get_or_insert_with(|| {
                Loader::new(Arc::clone(&source), config.clone(), 0).unwrap()
            });
            b.iter(|| {
                let batch = loader.next(&AtomicBool::new(false)).unwrap().expect("nobody stops it");
                loader.recycle(batch);
            });
        });
    }
}

fn time(
    bench: &mut Bench,
    direction: &str,
    shape: &str,
    images: usize,
    body: impl FnMut(&mut Bencher<'_>),
) {
    let took = bench.measure(["data", direction, shape], None, body);
    bench.rows.extend(took.map(|took| Row {
        op: "data".into(),
        direction: direction.into(),
        shape: shape.into(),
        batch: images,
        precision: "u8",
        took,
        images_per_second: Some(images as f64 / took.as_secs_f64()),
        cost: None,
    }));
}
