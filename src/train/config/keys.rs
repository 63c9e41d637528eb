//! One table of all keys: what each takes, what it means, where its value comes from. Type and range
//! checks, the comments of a written config and `docs/config.md` are all made from it.

use std::ops::{Bound, RangeBounds as _, RangeInclusive};

use toml::{Table, Value};

use super::Length;

/// Most passes over the data that a config can ask for.
pub(super) const EPOCHS_MAX: f64 = 1e6;
/// Most updates that a config can ask for.
pub(super) const STEPS_MAX: u64 = 1_000_000_000;

/// A key of a config.
#[derive(Clone, Debug)]
pub struct Key {
    /// Section and name: `optim.lr`.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// What it means, with its unit.
    pub meaning: &'static str,
    /// What the papers use, or what to know before changing it; may be empty.
    pub note: &'static str,
}

/// A range of numbers.
pub type Bounds = (Bound<f64>, Bound<f64>);

/// What a key takes.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A whole number.
    Integer(RangeInclusive<u64>),
    /// A number.
    Number(Bounds),
    /// A whole number, or `"auto"`.
    AutoInteger(RangeInclusive<u64>),
    /// A number, or `"auto"`.
    AutoNumber(Bounds),
    /// Two numbers.
    Pair(Bounds),
    /// One number each for red, green and blue.
    Rgb(Bounds),
    /// `true` or `false`.
    Bool,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A [`Length`] as text.
    Length,
    /// A path.
    Path,
}

const fn integer(min: u64, max: u64) -> Kind {
    Kind::Integer(RangeInclusive::new(min, max))
}

const fn auto_integer(min: u64, max: u64) -> Kind {
    Kind::AutoInteger(RangeInclusive::new(min, max))
}

const fn closed(min: f64, max: f64) -> Bounds {
    (Bound::Included(min), Bound::Included(max))
}

/// From 0 on, without 0.
const fn positive(max: f64) -> Bounds {
    (Bound::Excluded(0.0), Bound::Included(max))
}

const fn key(name: &'static str, kind: Kind, meaning: &'static str, note: &'static str) -> Key {
    Key { name, kind, meaning, note }
}

/// All keys, section by section, in the order of [`super::Config`].
pub static KEYS: &[Key] = &[
    key("model.image_size", integer(1, 4096), "side of the square input, in pixels", "papers: 224"),
    key(
        "model.patch_size",
        integer(1, 1024),
        "side of a patch, in pixels; divides image_size",
        "papers: 16 (ViT-H: 14)",
    ),
    key(
        "model.dim",
        integer(4, 16384),
        "width of the encoder; divisible by 4 and by heads",
        "ViT-B: 768",
    ),
    key("model.depth", integer(1, 256), "transformer blocks of the encoder", "ViT-B: 12"),
    key("model.heads", integer(1, 256), "attention heads of the encoder", "ViT-B: 12"),
    key(
        "model.decoder_dim",
        integer(4, 16384),
        "width of the decoder; divisible by 4 and by decoder_heads",
        "MAE: 512",
    ),
    key("model.decoder_depth", integer(1, 256), "transformer blocks of the decoder", "MAE: 8"),
    key("model.decoder_heads", integer(1, 256), "attention heads of the decoder", "MAE: 16"),
    key(
        "model.mlp_ratio",
        integer(1, 16),
        "width of the MLPs over the width of the tokens",
        "papers: 4",
    ),
    key(
        "method.target",
        Kind::Word(&["low_freq", "raw"]),
        "what is reconstructed: the low-pass filtered image, or the image itself",
        "PixMIM: low_freq; MAE: raw",
    ),
    key(
        "method.radius",
        Kind::AutoNumber(positive(8192.0)),
        "radius of the low-pass filter, in cycles per image",
        "PixMIM: 40 at 224; auto scales that with image_size (0.179 cycles per pixel)",
    ),
    key(
        "method.crop",
        Kind::Word(&["simple", "random_resized"]),
        "how an image becomes a square: resize the short side, pad, crop; or crop a random part, \
         resize",
        "PixMIM: simple; MAE: random_resized",
    ),
    key(
        "method.padding",
        auto_integer(0, 1024),
        "reflected border of the simple crop, in pixels",
        "PixMIM: 4 at 224; auto scales that with image_size, from 1 to 4",
    ),
    key(
        "method.crop_scale",
        Kind::Pair(positive(1.0)),
        "smallest and largest share of the area that the random resized crop keeps",
        "MAE: 0.2 to 1",
    ),
    key(
        "method.interpolation",
        Kind::Word(&["bicubic", "bilinear"]),
        "interpolation of resizing, as Pillow does it",
        "MAE and PixMIM's research code: bicubic; PixMIM's released config: bilinear",
    ),
    key(
        "method.flip",
        Kind::Number(closed(0.0, 1.0)),
        "probability of a horizontal flip",
        "papers: 0.5",
    ),
    key(
        "method.norm_pix",
        Kind::Bool,
        "normalise each target patch by its own mean and variance",
        "papers: true",
    ),
    key(
        "method.mask_ratio",
        Kind::Number((Bound::Excluded(0.0), Bound::Excluded(1.0))),
        "share of the patches that are masked",
        "papers: 0.75",
    ),
    key(
        "method.mask_block",
        integer(1, 4096),
        "side of the blocks of patches that are masked together",
        "MAE, PixMIM: 1; LSMAE: 2",
    ),
    key(
        "data.path",
        Kind::Path,
        "folder tree of JPEG, PNG and WebP files, of .tar files, packed shards or CIFAR-10 binary batches; or a .tar",
        "relative to where the program runs; empty: the bundled photos, for the preset demo",
    ),
    key(
        "data.mean",
        Kind::Rgb(closed(0.0, 1.0)),
        "mean of the colours, RGB on [0, 1]",
        "ImageNet's: 0.485, 0.456, 0.406",
    ),
    key(
        "data.std",
        Kind::Rgb(closed(0.001, 1.0)),
        "standard deviation of the colours, RGB on [0, 1]",
        "ImageNet's: 0.229, 0.224, 0.225",
    ),
    key(
        "data.threads",
        auto_integer(1, 1024),
        "threads that decode",
        "auto: one less than the cores, at least one",
    ),
    key("data.prefetch", integer(1, 1024), "micro-batches decoded ahead", ""),
    key("data.cache_mib", integer(0, 1 << 20), "resized images kept in memory, in MiB", ""),
    key(
        "data.max_bad_share",
        Kind::Number(closed(0.0, 1.0)),
        "training stops when more than this share of the images cannot be read",
        "",
    ),
    key("data.max_file_mib", integer(1, 4096), "largest image file that is read, in MiB", ""),
    key("data.max_side", integer(1, 65535), "longest side of an image that is read, in pixels", ""),
    key(
        "data.max_mebipixels",
        integer(1, 4096),
        "most pixels of an image that is read, in units of 2^20",
        "",
    ),
    key(
        "data.exif_orientation",
        Kind::Bool,
        "turn images as their EXIF orientation says",
        "false is what torchvision's ImageFolder does",
    ),
    key(
        "optim.global_batch",
        integer(1, 1 << 20),
        "images per update of the weights",
        "papers: 4096",
    ),
    key(
        "optim.micro_batch",
        integer(1, 1 << 16),
        "images in memory at once; divides global_batch",
        "memory and speed only: the result is that of global_batch",
    ),
    key(
        "optim.base_lr",
        Kind::Number(positive(10.0)),
        "peak learning rate per 256 images of global_batch; give this or lr",
        "papers: 1.5e-4",
    ),
    key(
        "optim.lr",
        Kind::Number(positive(10.0)),
        "peak learning rate; give this or base_lr",
        "papers: 2.4e-3, which is base_lr 1.5e-4 at 4096 images",
    ),
    key(
        "optim.weight_decay",
        Kind::Number(closed(0.0, 100.0)),
        "decoupled weight decay of AdamW",
        "papers: 0.05; biases, norms and position embeddings never decay",
    ),
    key(
        "optim.decay_tokens",
        Kind::Bool,
        "whether cls_token and mask_token decay too",
        "PixMIM: false; MAE: true",
    ),
    key(
        "optim.betas",
        Kind::Pair((Bound::Included(0.0), Bound::Excluded(1.0))),
        "decay rates of Adam's moments",
        "papers: 0.9, 0.95",
    ),
    key("optim.eps", Kind::Number(positive(1.0)), "epsilon of AdamW", "papers: 1e-8"),
    key(
        "optim.clip_grad",
        Kind::Number(closed(0.0, 1e9)),
        "largest L2 norm of the gradient; 0: no clipping",
        "papers: no clipping",
    ),
    key(
        "optim.max_skipped",
        integer(1, 1_000_000),
        "training stops after this many non-finite steps in a row",
        "",
    ),
    key(
        "schedule.epochs",
        Kind::Number(positive(EPOCHS_MAX)),
        "passes over the data; give this or steps",
        "PixMIM: 300 and 800; MAE: 800 and 1600",
    ),
    key("schedule.steps", integer(1, STEPS_MAX), "updates of the weights; give this or epochs", ""),
    key(
        "schedule.warmup",
        Kind::Length,
        "length of the linear warm-up, in epochs (\"40ep\") or updates (\"1000it\")",
        "papers: 40ep",
    ),
    key(
        "schedule.min_lr",
        Kind::Number(closed(0.0, 10.0)),
        "learning rate at the end of the cosine",
        "papers: 0",
    ),
    key(
        "runtime.device",
        Kind::Word(&["auto", "cpu", "cuda", "simt"]),
        "where it computes; simt runs the CUDA kernels on the CPU and checks them, for debugging",
        "auto: the fastest that works here",
    ),
    key(
        "runtime.precision",
        Kind::Word(&["auto", "f32", "bf16"]),
        "cpu: precision of matrix products; cuda: of activations; sums, weights and statistics are always f32",
        "auto: bf16 where the hardware multiplies it faster",
    ),
    key("runtime.threads", auto_integer(1, 1024), "threads that compute", "auto: all cores"),
    key(
        "runtime.seed",
        integer(0, i64::MAX as u64),
        "seed of every random choice",
        "PixMIM: 2; MAE: 0",
    ),
    key(
        "log.out",
        Kind::Path,
        "folder of the run",
        "empty: a new one, `runs/<date>_<time>_<preset>_<method>`, in UTC",
    ),
    key("log.every", integer(1, STEPS_MAX), "steps between logged lines", ""),
    key(
        "log.picture_every",
        integer(0, STEPS_MAX),
        "steps between pictures; 0: only at the start and the end",
        "",
    ),
    key("log.picture_images", integer(1, 64), "images in a picture", ""),
    key(
        "log.checkpoint_every",
        integer(0, STEPS_MAX),
        "steps between checkpoints; 0: only at the end",
        "",
    ),
    key(
        "log.keep_last",
        integer(1, 10_000),
        "checkpoints kept; older ones are deleted once a newer one is safe",
        "",
    ),
];

impl Key {
    /// Section and name apart.
    pub(super) fn split(&self) -> (&'static str, &'static str) {
        self.name.split_once('.').expect("every name in KEYS has a section")
    }

    /// The key's value in a config that was turned into a table; none for an option that is not given.
    pub(super) fn of<'a>(&self, config: &'a Table) -> Option<&'a Value> {
        let (section, name) = self.split();
        config.get(section)?.get(name)
    }
}

impl Kind {
    /// The value as the config keeps it (a whole number where any number goes becomes a float); none
    /// if the key does not take it.
    pub(super) fn accept(&self, value: Value) -> Option<Value> {
        let number = |value: &Value, bounds: &Bounds| {
            let number = value.as_float().or(value.as_integer().map(|whole| whole as f64))?;
            bounds.contains(&number).then_some(Value::Float(number))
        };
        let numbers = |value: &Value, count: usize, bounds: &Bounds| {
            let items = value.as_array().filter(|items| items.len() == count)?;
            items.iter().map(|item| number(item, bounds)).collect::<Option<_>>().map(Value::Array)
        };
        let is_auto = value.as_str() == Some("auto");
        match self {
            Self::AutoInteger(_) | Self::AutoNumber(_) if is_auto => Some(value),
            Self::Integer(range) | Self::AutoInteger(range) => {
                let whole = u64::try_from(value.as_integer()?).ok()?;
                range.contains(&whole).then_some(value)
            }
            Self::Number(bounds) | Self::AutoNumber(bounds) => number(&value, bounds),
            Self::Pair(bounds) => numbers(&value, 2, bounds),
            Self::Rgb(bounds) => numbers(&value, 3, bounds),
            Self::Bool => value.is_bool().then_some(value),
            Self::Word(words) => words.contains(&value.as_str()?).then_some(value),
            Self::Length => Length::parse(value.as_str()?).map(|_| value),
            Self::Path => value.is_str().then_some(value),
        }
    }

    /// What a word of the command line or the environment stands for. Texts need no quotes there.
    pub(super) fn read(&self, text: &str) -> Value {
        let is_text = matches!(self, Self::Word(_) | Self::Length | Self::Path);
        let is_quoted = text.starts_with(['"', '\'']);
        let parsed = if is_text && !is_quoted { None } else { text.parse().ok() };
        parsed.unwrap_or_else(|| Value::String(text.to_owned()))
    }

    /// The value as TOML.
    pub(super) fn show(&self, value: &Value) -> String {
        match value {
            Value::Array(items) => {
                let items: Vec<_> = items.iter().map(|item| self.show(item)).collect();
                format!("[{}]", items.join(", "))
            }
            Value::Float(number) if *number != 0.0 && number.abs() < 1e-3 => format!("{number:e}"),
            _ => value.to_string(),
        }
    }
}

/// What the kind takes, for "expected ..." and the reference.
impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Integer(range) => {
                write!(f, "a whole number from {} to {}", range.start(), range.end())
            }
            Self::AutoInteger(range) => {
                write!(f, "a whole number from {} to {}, or \"auto\"", range.start(), range.end())
            }
            Self::Number(bounds) => write!(f, "a number {}", in_words(bounds)),
            Self::AutoNumber(bounds) => write!(f, "a number {}, or \"auto\"", in_words(bounds)),
            Self::Pair(bounds) => write!(f, "two numbers [a, b], each {}", in_words(bounds)),
            Self::Rgb(bounds) => write!(f, "three numbers [r, g, b], each {}", in_words(bounds)),
            Self::Bool => f.write_str("true or false"),
            Self::Word(words) => {
                let (last, others) = words.split_last().expect("a word kind has words");
                let others: Vec<_> = others.iter().map(|word| format!("\"{word}\"")).collect();
                write!(f, "{} or \"{last}\"", others.join(", "))
            }
            Self::Length => f.write_str("epochs like \"40ep\" or updates like \"1000it\""),
            Self::Path => f.write_str("a path as text"),
        }
    }
}

fn in_words((min, max): &Bounds) -> String {
    let min = match min {
        Bound::Included(min) => format!("from {min}"),
        Bound::Excluded(min) => format!("above {min}"),
        Bound::Unbounded => String::new(),
    };
    let max = match max {
        Bound::Included(max) => format!("to {max}"),
        Bound::Excluded(max) => format!("below {max}"),
        Bound::Unbounded => String::new(),
    };
    format!("{min} {max}")
}
