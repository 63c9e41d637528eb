//! `pretrain_vit bench-data`: what each stage of the data path takes on the images of `--data`, on one core, and what the
//! loader makes of all cores. Nothing is trained or written.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use pixmim::Result;
use pixmim::data::loader::{Loader, LoaderConfig, order};
use pixmim::data::resize::{Rect, resize, short_side};
use pixmim::data::source::Source;
use pixmim::data::{Image, augment, decode};
use pixmim::train::config::{Config, Crop};
use pixmim::train::run;

use crate::program::{quoted, say};

/// Images that the stages are timed on: those that a run would see first.
const IMAGES: usize = 256;
/// Passes over them, of which the median counts.
const PASSES: usize = 5;
/// Each loader is timed for about so long.
const LOADER_TIME: Duration = Duration::from_millis(1500);

/// Times the stages, prints them, and says what to do about the slowest.
pub(crate) fn measure(config: &Config) -> Result<()> {
    config.check()?;
    let source = Source::open(&config.data.path, &decode::Options::from(&config.data))?;
    let order = order(config.runtime.seed, 0, source.len());
    let samples: Vec<usize> = order.iter().take(IMAGES).map(|&sample| sample as usize).collect();
    say(&format!("data      {} images: {}", source.len(), source.path().display()));

    let (mut images, mut bad) = (Vec::new(), Vec::new());
    let first = per_image(samples.len(), || {
        for &sample in &samples {
            match source.read(sample) {
                Ok(image) => images.push(image),
                Err(why) => bad.push(why),
            }
        }
    });
    if let Some(one) = bad.first() {
        let which = format!("{}: {}", one.name, one.reason);
        if images.is_empty() {
            let why = format!("none of {} images can be read, such as {which}", samples.len());
            return Err(pixmim::Error::data(source.path(), why));
        }
        say(&format!("bad       {} of {} images, such as {which}", bad.len(), samples.len()));
    }
    let sides = images.iter().map(|image| image.height * image.width);
    let pixels = sides.sum::<usize>() as f64 / images.len() as f64;
    say(&format!("pixels    {:.0} x {0:.0} on average", pixels.sqrt()));

    say(&format!("{:<34}{:>10}{:>16}", "stage, on one core", "us/image", "images/s a core"));
    let read = if source.in_memory() { "read" } else { "read and decode" };
    row(&format!("{read}, first time"), first);
    time(read, samples.len(), || {
        samples.iter().for_each(|&sample| drop(black_box(source.read(sample))));
    });
    crop(config, &images, &samples);
    let source = Arc::new(source);
    // It also copies what crops show into batches.
    let seconds = 1.0 / loader(config, &source, 1)?;
    row("loader", seconds);
    let threads = config.resolved().data_threads;
    let rate = loader(config, &source, threads)?;
    say(&format!("loader    {rate:.0} images/s with data.threads={threads}"));
    say(&format!("cores     {:.2} such as this one for 10,000 images/s", 10_000.0 * seconds));
    if !source.in_memory() && config.method.crop == Crop::Simple {
        let (data, side) = (source.path().to_string_lossy(), config.model.image_size);
        say(&format!(
            "next: decode and resize once and for all: \
             cargo run --release --example pack_dataset -- {} OUT --side {side}",
            quoted(&data)
        ));
    }
    Ok(())
}

/// Times what turns an image into what its crop is taken of.
fn crop(config: &Config, images: &[Image], samples: &[usize]) {
    let (side, method) = (config.model.image_size, &config.method);
    let resized = |image: &Image| short_side(image.height, image.width, side);
    let is_resized = |image: &Image| resized(image) == (image.height, image.width);
    match method.crop {
        // As packed for this size.
        Crop::Simple if images.iter().all(is_resized) => {}
        Crop::Simple => time("resize the short side", images.len(), || {
            for image in images {
                black_box(resize(image, Rect::whole(image), resized(image), method.interpolation));
            }
        }),
        Crop::RandomResized => time("random resized crop", images.len(), || {
            for (image, &sample) in images.iter().zip(samples) {
                let choices = augment::choices(config.runtime.seed, 0, sample);
                let extent = (image.height, image.width);
                let (part, _) =
                    augment::random_resized_crop(&choices, extent, method.crop_scale, method.flip);
                black_box(resize(image, part, (side, side), method.interpolation));
            }
        }),
    }
}

/// Images in a second that the loader makes of data it has not seen.
fn loader(config: &Config, source: &Arc<Source>, threads: usize) -> Result<f64> {
    let images = config.optim.micro_batch.min(source.len());
    let config = LoaderConfig {
        threads,
        // As in the first epoch, and whatever the batch of a step is.
        cache_bytes: 0,
        micro_batch: images,
        global_batch: images,
        ..run::loader_config(config, &config.resolved())
    };
    let mut loader = Loader::new(Arc::clone(source), config, 0)?;
    let never = AtomicBool::new(false);
    let start = Instant::now();
    let mut batches = 0;
    while batches == 0 || start.elapsed() < LOADER_TIME {
        let batch = loader.next(&never)?.expect("nobody stops it");
        loader.recycle(batch);
        batches += 1;
    }
    Ok((batches * images) as f64 / start.elapsed().as_secs_f64())
}

/// Times a stage that `pass` takes through so many images, and prints the median.
fn time(name: &str, images: usize, mut pass: impl FnMut()) {
    let mut passes: Vec<f64> = (0..PASSES).map(|_| per_image(images, &mut pass)).collect();
    passes.sort_by(f64::total_cmp);
    row(name, passes[PASSES / 2]);
}

/// Seconds of one of so many images.
fn per_image(images: usize, pass: impl FnOnce()) -> f64 {
    let start = Instant::now();
    pass();
    start.elapsed().as_secs_f64() / images as f64
}

fn row(name: &str, seconds: f64) {
    say(&format!("{name:<34}{:>10.1}{:>16.0}", 1e6 * seconds, 1.0 / seconds));
}
