//! The loader: order, determinism, bad images, memory.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pixmim::data::Image;
use pixmim::data::augment::{Geometry, choices, random_resized_crop, reflect, simple_crop};
use pixmim::data::decode::Options;
use pixmim::data::loader::{Batch, Loader, LoaderConfig, MOST_SQUARES, Resample, order};
use pixmim::data::resize::{Rect, resize, short_side};
use pixmim::data::source::Source;
use pixmim::train::config::{Crop, Interpolation};
use pixmim::{HostBuffer, Result};
use tempfile::{TempDir, tempdir};

use crate::{mixed, write_png};

const SIZE: usize = 16;

fn config() -> LoaderConfig {
    LoaderConfig {
        image_size: SIZE,
        crop: Crop::Simple,
        padding: 3,
        crop_scale: [0.2, 1.0],
        interpolation: Interpolation::Bicubic,
        flip: 0.5,
        seed: 11,
        global_batch: 6,
        micro_batch: 3,
        threads: 2,
        prefetch: 3,
        cache_bytes: 1 << 20,
        max_bad_share: 0.01,
        resample: Resample::OnHost,
    }
}

/// A folder of `count` images of different sizes; those for which `bad` holds are no images.
fn folder(count: usize, bad: impl Fn(usize) -> bool) -> (TempDir, Arc<Source>) {
    let root = tempdir().unwrap();
    for i in 0..count {
        let path = root.path().join(format!("class_{}/{i:03}.png", i % 3));
        write_png(&path, &mixed(i, 17 + i % 5, 31 - i % 7));
        if bad(i) {
            fs::write(&path, "no image").unwrap();
        }
    }
    let source = Arc::new(open(root.path()));
    (root, source)
}

fn open(path: &Path) -> Source {
    Source::open(path, &Options::default()).unwrap()
}

fn next(loader: &mut Loader) -> Result<Batch> {
    let never = AtomicBool::new(false);
    loader.next(&never).map(|batch| batch.expect("nobody asked to stop"))
}

fn batches(
    source: &Arc<Source>,
    config: LoaderConfig,
    first_step: u64,
    count: usize,
) -> Vec<Batch> {
    let mut loader = Loader::new(Arc::clone(source), config, first_step).unwrap();
    (0..count).map(|_| next(&mut loader).unwrap()).collect()
}

fn failure(source: &Arc<Source>, config: LoaderConfig) -> String {
    let mut loader = Loader::new(Arc::clone(source), config, 0).unwrap();
    let error = loop {
        if let Err(error) = next(&mut loader) {
            break error;
        }
    };
    assert_eq!(error.exit_code(), 4);
    assert!(next(&mut loader).is_err(), "the failure lasts");
    error.to_string()
}

/// From a Python transcription of Philox and of the definition.
#[test]
fn the_order_is_the_golden_one() {
    assert_eq!(order(0, 0, 10), [8, 2, 1, 9, 5, 0, 4, 7, 6, 3]);
    assert_eq!(order(7, 3, 9), [2, 8, 3, 6, 7, 0, 4, 1, 5]);
    assert_eq!(order(0, 0, 1), [0]);
}

#[test]
fn an_epoch_holds_whole_steps_and_no_sample_twice() {
    let (_root, source) = folder(20, |_| false);
    // Three steps of two micro-batches an epoch; two samples are left out.
    for (epoch, batches) in batches(&source, config(), 0, 18).chunks(6).enumerate() {
        let epoch = epoch as u32;
        let samples: Vec<i64> = batches.iter().flat_map(|batch| batch.samples.clone()).collect();
        let expected: Vec<i64> =
            order(11, epoch, 20)[..18].iter().map(|&sample| i64::from(sample)).collect();
        assert_eq!(samples, expected);
        for (i, batch) in batches.iter().enumerate() {
            let step = u64::from(epoch) * 3 + i as u64 / 2;
            assert_eq!((batch.step, batch.micro, batch.epoch), (step, i % 2, epoch));
        }
    }
}

/// The pixels that a crop of `side` shows of an image among `bytes`.
fn seen(bytes: &[u8], crop: &Geometry, side: usize) -> Vec<u8> {
    let [height, width] = [crop.height, crop.width].map(|n| n as usize);
    let image = &bytes[crop.offset as usize..][..3 * height * width];
    let pixel = |y: usize, x: usize| {
        let x = if crop.flip == 1 { side - 1 - x } else { x };
        let row = reflect(crop.top + y as i64, height);
        let column = reflect(crop.left + x as i64, width);
        &image[3 * (row * width + column)..][..3]
    };
    (0..side * side).flat_map(|at| pixel(at / side, at % side)).copied().collect()
}

#[test]
fn a_batch_holds_what_the_crops_show_of_the_resized_images() {
    let (_root, source) = folder(9, |_| false);
    let mut reflected = 0;
    for batch in batches(&source, config(), 0, 8) {
        for (i, (&sample, crop)) in batch.samples.iter().zip(&batch.geometry).enumerate() {
            let image = source.read(sample as usize).unwrap();
            let size = short_side(image.height, image.width, SIZE);
            let image = resize(&image, Rect::whole(&image), size, Interpolation::Bicubic);
            let stream = choices(11, batch.epoch, sample as usize);
            let whole = simple_crop(&stream, size, SIZE, 3, 0.5).unwrap();
            assert_eq!(seen(&batch.images, crop, SIZE), seen(&image.pixels, &whole, SIZE));
            // Each in a place of its own, and nothing but zeros beside it.
            let place = 3 * SIZE * SIZE;
            assert_eq!(crop.offset as usize, i * place);
            let bytes = 3 * (crop.height * crop.width) as usize;
            assert!(batch.images[i * place..][bytes..place].iter().all(|byte| *byte == 0));
            reflected += usize::from(bytes < place);
        }
        assert_eq!((batch.samples.len(), batch.geometry.len()), (3, 3));
        assert_eq!(batch.images.len(), 3 * 3 * SIZE * SIZE);
    }
    assert!(reflected > 3, "some crops reach over an edge");
}

#[test]
fn rectangles_left_to_the_device_to_resize_give_the_crops_of_the_host() {
    let root = tempdir().unwrap();
    for i in 0..6 {
        write_png(&root.path().join(format!("{i}.png")), &mixed(i, 51 + 3 * i, 67 - 2 * i));
    }
    let source = Arc::new(open(root.path()));
    let on_host = LoaderConfig { crop: Crop::RandomResized, ..config() };
    let on_device = LoaderConfig { resample: Resample::OnDevice, ..on_host.clone() };
    let (mut small, mut large) = (0, 0);
    let squares = batches(&source, on_host, 0, 8);
    for (squares, batch) in squares.iter().zip(batches(&source, on_device, 0, 8)) {
        assert_eq!(batch.images.len(), 3 * MOST_SQUARES * 3 * SIZE * SIZE);
        assert_eq!(batch.samples, squares.samples);
        for (i, (crop, square)) in batch.geometry.iter().zip(&squares.geometry).enumerate() {
            let image = source.read(batch.samples[i] as usize).unwrap();
            let stream = choices(11, batch.epoch, batch.samples[i] as usize);
            let (rect, _) =
                random_resized_crop(&stream, (image.height, image.width), [0.2, 1.0], 0.5);
            let [height, width] = [crop.height, crop.width].map(|n| n as usize);
            if rect.height * rect.width <= MOST_SQUARES * SIZE * SIZE {
                assert_eq!((height, width), (rect.height, rect.width));
                small += 1;
            } else {
                assert_eq!((height, width), (SIZE, SIZE));
                large += 1;
            }
            let offset = i * MOST_SQUARES * 3 * SIZE * SIZE;
            let expected = Geometry { offset: offset as i64, ..*crop };
            assert_eq!((*crop, crop.top, crop.left, crop.flip), (expected, 0, 0, square.flip));
            let pixels = batch.images[offset..][..3 * height * width].to_vec().into();
            let rectangle = Image { height, width, pixels };
            let whole = Rect::whole(&rectangle);
            let resized = resize(&rectangle, whole, (SIZE, SIZE), Interpolation::Bicubic);
            let same = &squares.images[square.offset as usize..][..3 * SIZE * SIZE];
            assert_eq!(resized.pixels, same);
        }
    }
    assert!(small > 3 && large > 3, "{small} rectangles, {large} squares");
}

#[test]
fn a_random_resized_crop_is_the_whole_of_its_image() {
    let (_root, source) = folder(9, |_| false);
    let config = LoaderConfig { crop: Crop::RandomResized, ..config() };
    let batches = batches(&source, config, 0, 8);
    let geometry: Vec<Geometry> = batches.iter().flat_map(|b| b.geometry.clone()).collect();
    for (i, crop) in geometry.iter().enumerate() {
        let offset = (i % 3 * SIZE * SIZE * 3) as i64;
        let side = SIZE as i64;
        let whole = Geometry { offset, height: side, width: side, ..Geometry::default() };
        assert_eq!(Geometry { flip: 0, ..*crop }, whole);
    }
    assert!(geometry.iter().any(|crop| crop.flip == 1));
    assert!(geometry.iter().any(|crop| crop.flip == 0));
    assert!(batches.iter().all(|batch| batch.images.len() == 3 * SIZE * SIZE * 3));
}

#[test]
fn batches_do_not_depend_on_threads_prefetch_or_cache() {
    let (_root, source) = folder(19, |i| i == 4);
    for (crop, resample) in [
        (Crop::Simple, Resample::OnHost),
        (Crop::RandomResized, Resample::OnHost),
        (Crop::RandomResized, Resample::OnDevice),
    ] {
        let config = LoaderConfig { crop, resample, max_bad_share: 0.1, ..config() };
        let reference =
            batches(&source, LoaderConfig { threads: 1, prefetch: 1, ..config.clone() }, 0, 20);
        for (threads, prefetch, cache_bytes) in [(2, 1, 0), (2, 4, 3000), (4, 3, 1 << 20)] {
            let other = LoaderConfig { threads, prefetch, cache_bytes, ..config.clone() };
            assert_eq!(batches(&source, other, 0, 20), reference, "{threads} threads");
        }
    }
}

#[test]
fn a_fresh_loader_goes_on_where_another_stopped() {
    let (_root, source) = folder(13, |_| false);
    let all = batches(&source, config(), 0, 20);
    for step in [1, 3, 7] {
        assert_eq!(batches(&source, config(), step, 2)[..], all[2 * step as usize..][..2]);
    }
}

#[test]
fn other_seeds_give_other_batches() {
    let (_root, source) = folder(13, |_| false);
    let other = LoaderConfig { seed: 12, ..config() };
    assert_ne!(batches(&source, other, 0, 1), batches(&source, config(), 0, 1));
}

/// Sources sort by path, `class_0` first: this is where image `i` of 12 is.
fn sample_of(i: usize) -> usize {
    4 * (i % 3) + i / 3
}

#[test]
fn a_bad_image_is_replaced_by_the_next_of_the_epoch_and_reported_once() {
    let bad = [sample_of(2), sample_of(7)].map(|sample| sample as u32);
    let (_root, source) = folder(12, |i| i == 2 || i == 7);
    let config = LoaderConfig { max_bad_share: 0.2, ..config() };
    let batches = batches(&source, config, 0, 12);
    for (epoch, batches) in batches.chunks(4).enumerate() {
        let order = order(11, epoch as u32, 12);
        let replaced = |position: usize| {
            let following = order[position..].iter().chain(&order);
            i64::from(*following.into_iter().find(|sample| !bad.contains(sample)).unwrap())
        };
        let expected: Vec<i64> = (0..12).map(replaced).collect();
        let samples: Vec<i64> = batches.iter().flat_map(|batch| batch.samples.clone()).collect();
        assert_eq!(samples, expected);
    }
    let reports: Vec<_> = batches.iter().flat_map(|batch| &batch.bad).collect();
    assert_eq!(reports.len(), 2);
    assert_eq!(reports.iter().map(|bad| bad.sample as u32).collect::<HashSet<_>>(), bad.into());
    assert!(reports.iter().all(|bad| bad.reason.starts_with("not an image")));
    // In the micro-batch in which its turn came first.
    let first = order(11, 0, 12).iter().position(|sample| bad.contains(sample)).unwrap();
    assert_eq!(batches.iter().position(|batch| !batch.bad.is_empty()), Some(first / 3));
}

#[test]
fn one_bad_image_is_tolerated_and_a_second_stops_a_small_run() {
    let (_root, source) = folder(12, |i| i == 2);
    assert_eq!(batches(&source, config(), 0, 8).iter().map(|b| b.bad.len()).sum::<usize>(), 1);
    let (root, source) = folder(12, |i| i == 2 || i == 7);
    let error = failure(&source, config());
    assert!(error.starts_with(&format!("data {}: has 2", root.path().display())), "{error}");
    for said in ["of 12 (16.67 %)", "allows 1.00 %", "class_2/002.png (not an image", "class_1/007"]
    {
        assert!(error.contains(said), "{said}: {error}");
    }
}

#[test]
fn data_without_a_single_image_ends_with_the_error() {
    for share in [0.0, 0.3, 1.0] {
        let (_root, source) = folder(7, |_| true);
        let error = failure(&source, LoaderConfig { max_bad_share: share, ..config() });
        assert!(error.contains("unreadable images of 7") && error.contains(", ..;"), "{error}");
    }
}

#[test]
fn too_few_samples_for_a_step_are_refused() {
    let (_root, source) = folder(5, |_| false);
    let error = Loader::new(source, config(), 0).unwrap_err();
    assert_eq!(error.exit_code(), 4);
    let error = error.to_string();
    assert!(error.contains("holds 5 images, fewer than the 6 of a step"), "{error}");
    assert!(error.contains("lower optim.global_batch"), "{error}");
}

#[test]
fn configs_that_make_no_sense_are_refused() {
    let (_root, source) = folder(6, |_| false);
    let refused =
        |config: LoaderConfig| Loader::new(Arc::clone(&source), config, 0).unwrap_err().to_string();
    for (config, name) in [
        (LoaderConfig { padding: SIZE, ..config() }, "method.padding"),
        (LoaderConfig { micro_batch: 4, ..config() }, "optim.micro_batch"),
        (LoaderConfig { threads: 0, ..config() }, "data.threads"),
        (LoaderConfig { prefetch: 0, ..config() }, "data.prefetch"),
        (LoaderConfig { crop_scale: [0.0, 1.0], ..config() }, "method.crop_scale"),
        (LoaderConfig { crop_scale: [0.6, 0.5], ..config() }, "method.crop_scale"),
        (LoaderConfig { flip: f64::NAN, ..config() }, "method.flip"),
        (LoaderConfig { max_bad_share: 1.1, ..config() }, "data.max_bad_share"),
    ] {
        let error = refused(config);
        assert!(error.contains(name), "{name}: {error}");
    }
    assert!(Loader::new(source, config(), u64::MAX).is_err());
}

#[test]
fn recycled_batches_are_filled_anew() {
    let root = tempdir().unwrap();
    for i in 0..6 {
        write_png(&root.path().join(format!("{i}.png")), &mixed(i, 20, 20));
    }
    let source = Arc::new(open(root.path()));
    let config = LoaderConfig { prefetch: 1, ..config() };
    let reference = batches(&source, config.clone(), 0, 3);
    let mut loader = Loader::new(source, config, 0).unwrap();
    let first = next(&mut loader).unwrap();
    let buffer = first.images.as_ptr();
    loader.recycle(first);
    // The second may have been made before the first came back; the third is begun once the second is taken.
    let second = next(&mut loader).unwrap();
    let third = next(&mut loader).unwrap();
    assert!([second.images.as_ptr(), third.images.as_ptr()].contains(&buffer));
    assert_eq!([second, third], reference[1..3]);
}

#[test]
fn a_recycled_batch_of_other_memory_does_not_matter() {
    let (_root, source) = folder(12, |_| false);
    let config = LoaderConfig { prefetch: 1, ..config() };
    let reference = batches(&source, config.clone(), 0, 4);
    let mut loader = Loader::new(source, config, 0).unwrap();
    for expected in &reference {
        let mut batch = next(&mut loader).unwrap();
        assert_eq!(batch, *expected);
        batch.images = HostBuffer::new(5);
        loader.recycle(batch);
    }
}

#[test]
fn a_loader_can_be_dropped_at_any_time() {
    let (_root, source) = folder(12, |_| false);
    for taken in 0..6 {
        let mut loader = Loader::new(Arc::clone(&source), config(), 0).unwrap();
        for _ in 0..taken {
            next(&mut loader).unwrap();
        }
        drop(loader);
        assert_eq!(Arc::strong_count(&source), 1, "every worker has ended");
    }
}

#[test]
fn cifar_is_loaded_without_resizing() {
    let root = tempdir().unwrap();
    let records: Vec<u8> = (0..8 * 3073).map(|i| if i % 3073 == 0 { 3 } else { i as u8 }).collect();
    fs::write(root.path().join("data_batch_1.bin"), records).unwrap();
    let source = Arc::new(open(root.path()));
    let config = LoaderConfig { image_size: 32, padding: 4, ..config() };
    for batch in batches(&source, config, 0, 2) {
        for (&sample, crop) in batch.samples.iter().zip(&batch.geometry) {
            let image = source.read(sample as usize).unwrap();
            let stream = choices(11, batch.epoch, sample as usize);
            let whole = simple_crop(&stream, (32, 32), 32, 4, 0.5).unwrap();
            assert_eq!(seen(&batch.images, crop, 32), seen(&image.pixels, &whole, 32));
        }
    }
}
