//! `pretrain_vit bench-data`: what each stage of the data path takes on the images of `--data`, on one core, and what the
//! loader makes of all cores. Nothing is trained or written.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use pixmim::Result;
use pixmim::data::loader::{Loader, order};
use pixmim::data::resize::{Rect, resize, short_side};
use pixmim::data::source::Source;
use pixmim::data::{Image, augment, decode};
use pixmim::train::config::{Config, Crop};
use pixmim::train::run;

use crate::progress::say;

/// Images that the stages are timed on: those that a run would see first.
const IMAGES: usize = 256;
/// Passes over them, of which the median counts.
const PASSES: usize = 5;
/// What a stage is called that decodes nothing.
const READ: &str = "read";
/// The loader is timed for about so long.
const LOADER_TIME: Duration = Duration::from_secs(2);

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
    let read = if source.in_memory() { READ } else { "read and decode" };
    row(&format!("{read}, first time"), first);
    let read = Stage::time(read, samples.len(), || {
        samples.iter().for_each(|&sample| drop(black_box(source.read(sample))));
    });
    let crop = crop(config, &images, &samples);
    let whole = read.seconds + crop.seconds;
    row("all of them", whole);
    let (rate, threads) = loader(config, Arc::new(source))?;
    say(&format!("loader    {rate:.0} images/s with data.threads={threads}"));
    say(&format!("cores     {:.1} such as this one for 10,000 images/s", 10_000.0 * whole));
    if read.name != READ && config.method.crop == Crop::Simple {
        say(
            "next: decode and resize once and for all: cargo run --release --example pack_dataset -- DATA OUT",
        );
    }
    Ok(())
}

/// Makes what a batch gets of each image.
fn crop(config: &Config, images: &[Image], samples: &[usize]) -> Stage {
    let (side, method) = (config.model.image_size, &config.method);
    let each = || images.iter().zip(samples);
    match method.crop {
        Crop::Simple => Stage::time("resize the short side", images.len(), || {
            for image in images {
                let size = short_side(image.height, image.width, side);
                if size != (image.height, image.width) {
                    black_box(resize(image, Rect::whole(image), size, method.interpolation));
                }
            }
        }),
        Crop::RandomResized => Stage::time("random resized crop", images.len(), || {
            for (image, &sample) in each() {
                let choices = augment::choices(config.runtime.seed, 0, sample);
                let extent = (image.height, image.width);
                let (part, _) =
                    augment::random_resized_crop(&choices, extent, method.crop_scale, method.flip);
                black_box(resize(image, part, (side, side), method.interpolation));
            }
        }),
    }
}

/// Images in a second that the loader makes of data it has not seen, and its threads.
fn loader(config: &Config, source: Arc<Source>) -> Result<(f64, usize)> {
    let mut config = run::loader_config(config, &config.resolved());
    // As in the first epoch, and whatever the batch is.
    config.cache_bytes = 0;
    config.micro_batch = config.micro_batch.min(source.len());
    config.global_batch = config.micro_batch;
    let (images, threads) = (config.micro_batch, config.threads);
    let mut loader = Loader::new(source, config, 0)?;
    let never = AtomicBool::new(false);
    let start = Instant::now();
    let mut batches = 0;
    while batches == 0 || start.elapsed() < LOADER_TIME {
        let batch = loader.next(&never)?.expect("nobody stops it");
        loader.recycle(batch);
        batches += 1;
    }
    Ok(((batches * images) as f64 / start.elapsed().as_secs_f64(), threads))
}

/// A stage and what it takes.
struct Stage {
    name: &'static str,
    /// Of an image, the median over passes.
    seconds: f64,
}

impl Stage {
    /// Times a stage that `pass` takes through so many images, and prints it.
    fn time(name: &'static str, images: usize, mut pass: impl FnMut()) -> Self {
        let mut passes: Vec<f64> = (0..PASSES).map(|_| per_image(images, &mut pass)).collect();
        passes.sort_by(f64::total_cmp);
        let stage = Self { name, seconds: passes[PASSES / 2] };
        row(stage.name, stage.seconds);
        stage
    }
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
