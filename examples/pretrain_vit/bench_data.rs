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
/// The loader is timed for about so long.
const LOADER_TIME: Duration = Duration::from_secs(3);

/// Times the stages, prints them, and says what to do about the slowest.
pub(crate) fn measure(config: &Config) -> Result<()> {
    config.check()?;
    let source = Source::open(&config.data.path, &decode::Options::from(&config.data))?;
    let order = order(config.runtime.seed, 0, source.len());
    let samples: Vec<usize> = order.iter().take(IMAGES).map(|&sample| sample as usize).collect();
    say(&format!("data      {} images: {}", source.len(), source.path().display()));

    let mut images = Vec::new();
    let first = per_image(samples.len(), || {
        images = samples.iter().filter_map(|&sample| source.read(sample).ok()).collect();
    });
    if images.is_empty() {
        let name = source.name(samples[0]);
        let why = format!("cannot be read, nor can {} others; see data.path", samples.len() - 1);
        return Err(pixmim::Error::data(name, why));
    }
    if images.len() < samples.len() {
        say(&format!("bad       {} of {} images", samples.len() - images.len(), samples.len()));
    }
    let sides = images.iter().map(|image| image.height * image.width);
    let pixels = sides.sum::<usize>() as f64 / images.len() as f64;
    say(&format!("pixels    {:.0} x {0:.0} on average", pixels.sqrt()));

    say(&format!("{:<34}{:>10}{:>16}", "stage, on one core", "us/image", "images/s a core"));
    let read = if source.in_memory() { "read" } else { "read and decode" };
    row(&format!("{read}, first time"), first);
    let read = Stage::time(read, samples.len(), || {
        samples.iter().for_each(|&sample| drop(black_box(source.read(sample))));
    });
    let crop = crop(config, &images, &samples);
    let whole = read.seconds + crop.seconds;
    row("both", whole);

    let loader = loader(config, Arc::new(source))?;
    let threads = config.resolved().data_threads;
    say(&format!("loader    {loader:.0} images/s with data.threads={threads}"));
    say(&format!("cores     {:.1} of these for 10,000 images/s", 10_000.0 * whole));
    if read.seconds > crop.seconds && read.name != "read" {
        say("next: decode once and for all: cargo run --release --example pack_dataset -- DATA OUT");
    }
    Ok(())
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
