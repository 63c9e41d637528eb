//! The command line.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Parser;
use pixmim::data::shard::MAX_IMAGES;
use pixmim::train::config::Interpolation;

const EXAMPLES: &str = "\
Examples:
  pack_dataset ~/imagenet/train ~/imagenet-224       for training at model.image_size = 224
  pack_dataset ~/shards.tar ~/packed --side 0        decoded, not resized
  pack_dataset ~/imagenet-224 ~/imagenet-128 --side 128
  pack_dataset --verify ~/imagenet-224               reads every byte again

Run again with the same arguments it goes on where it stopped, and packs what is missing. Photos that
cannot be read are left out and listed in OUT/bad_images.jsonl.

Exit codes: 0 done, or stopped by a signal; 1 a mistake in options; 4 data; 5 input or output, or a
damaged shard; 70 a defect of pixmim.";

/// Pack photos into shards, decoded and resized once.
#[derive(Debug, Parser)]
#[command(name = "pack_dataset", version = pixmim::VERSION, after_help = EXAMPLES)]
#[command(max_term_width = 110)]
pub(crate) struct Cli {
    /// Folder of photos, of .tar files or of shards, a .tar file, or CIFAR-10 binary batches.
    pub(crate) data: PathBuf,
    /// Folder for the shards: a new one, an empty one, or one that was begun with the same arguments.
    #[arg(required_unless_present = "verify")]
    pub(crate) out: Option<PathBuf>,
    /// Short side of the packed images, in pixels: the image size to train with; 0: as they are.
    #[arg(long, value_name = "N", default_value_t = 224)]
    #[arg(value_parser = clap::value_parser!(u32).range(0..=16_384))]
    pub(crate) side: u32,
    /// Interpolation of the resize: the one to train with.
    #[arg(long, value_name = "NAME", default_value = "bicubic", value_parser = interpolation)]
    pub(crate) interpolation: Interpolation,
    /// Images in a shard; the last one may have fewer.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_IMAGES)))]
    pub(crate) images_per_shard: u32,
    /// Threads that decode and resize [default: one for each core]. The shards do not depend on it.
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Stop when more than this share of the photos cannot be read, and more than one.
    #[arg(long, value_name = "SHARE", default_value_t = 0.01, value_parser = share)]
    pub(crate) max_bad_share: f64,
    /// Turn and mirror photos as their EXIF orientation says.
    #[arg(long)]
    pub(crate) exif_orientation: bool,
    /// Check every byte of the shards in DATA; write nothing.
    #[arg(long, conflicts_with = "out")]
    verify: bool,
}

impl Cli {
    pub(crate) fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        self.threads.map_or_else(cores, NonZeroUsize::get)
    }
}

fn interpolation(text: &str) -> Result<Interpolation, &'static str> {
    match text {
        "bicubic" => Ok(Interpolation::Bicubic),
        "bilinear" => Ok(Interpolation::Bilinear),
        _ => Err("may be bicubic or bilinear"),
    }
}

fn share(text: &str) -> Result<f64, &'static str> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or("must be a number within 0 to 1")
}
