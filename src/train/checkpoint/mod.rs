//! Checkpoints: each is a folder that is whole and verified, or is not there.
//!
//! ```text
//! RUN/ckpt/step-00012000/     written as .tmp-step-00012000-<pid>, then renamed
//!     model.safetensors       weights and position tables, f32, under the key names of MAE
//!     optim.safetensors       AdamW's moments: exp_avg.<name>, exp_avg_sq.<name>
//!     state.toml              the rest of what a run needs to go on: `State`
//!     matmul-plans.bin        how a GPU's products are computed, for the same bits after a resume; only where there is one
//!     MANIFEST                a line per file: name, bytes, crc32c
//! RUN/ckpt/LATEST             "step-00012000", replaced by a rename
//! ```
//!
//! A save writes these files and syncs each, writes and syncs `MANIFEST`, syncs the folder, renames it, syncs
//! its parent, replaces `LATEST`, and only then deletes old checkpoints: whenever the machine stops, the newest
//! checkpoint before or after the save is there. A step saved a second time becomes `step-00012000.2`, as a folder
//! cannot replace another in one move; the first is deleted once the second is safe.

mod fs;
mod read;
mod write;

#[cfg(test)]
mod faults;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

pub use read::{Checkpoint, NamedTensorMut, Part, Rejected, TensorFile, newest};

/// Version of the layout on disk. It grows when older readers could no longer read it; what they may ignore is added
/// without a new version.
pub const FORMAT_VERSION: u32 = 1;

const FOLDER: &str = "ckpt";
const LATEST: &str = "LATEST";
const MANIFEST: &str = "MANIFEST";
const MODEL: &str = "model.safetensors";
const OPTIM: &str = "optim.safetensors";
const STATE: &str = "state.toml";
const PLANS: &str = "matmul-plans.bin";
const EXP_AVG: &str = "exp_avg.";
const EXP_AVG_SQ: &str = "exp_avg_sq.";

/// Largest header of a safetensors file: parsing time grows with it, and files may come from strangers.
const MAX_HEADER_BYTES: u64 = 4 << 20;
/// Most tensors in a file.
const MAX_TENSORS: usize = 10_000;

#[cfg(target_endian = "big")]
compile_error!("checkpoints are copied to and from memory as little-endian f32");

/// A tensor in host memory, row-major.
#[derive(Clone, Debug)]
pub struct NamedTensor<'a> {
    /// Key, as MAE names it: `blocks.0.attn.qkv.weight`.
    pub name: &'a str,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// As many elements as `shape` says.
    pub data: &'a [f32],
}

/// What a checkpoint holds.
#[derive(Clone, Debug)]
pub struct Contents<'a> {
    /// Trained parameters.
    pub weights: Vec<NamedTensor<'a>>,
    /// What belongs to the model but is not trained: the position tables.
    pub frozen: Vec<NamedTensor<'a>>,
    /// First moments; names, shapes and order are those of `weights`.
    pub exp_avg: Vec<NamedTensor<'a>>,
    /// Second moments; names, shapes and order are those of `weights`.
    pub exp_avg_sq: Vec<NamedTensor<'a>>,
    /// What a user of the weights must know: `norm_pix`, `target`, `radius`, `crop`, `mean`, `std`, `patch`. Goes to
    /// the header of `model.safetensors`; `format`, `format_version` and `pixmim_version` are added.
    pub metadata: BTreeMap<String, String>,
    /// Where the run stands.
    pub state: State,
    /// What [`Gpu::matmul_plans`](crate::Gpu::matmul_plans) gave; empty where products are computed in one way only.
    pub matmul_plans: Vec<u8>,
}

/// Where a run stands, beside its tensors. Data order, crops and masks are functions of seed, epoch and sample, so
/// counters are all that a bit-exact resume needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Updates done, skipped ones included.
    pub step: u64,
    /// Images seen.
    pub samples: u64,
    /// Seed of every random choice.
    pub seed: u64,
    /// Steps skipped so far as their gradient was not finite.
    pub skipped: u64,
    /// Steps skipped in a row, up to now.
    pub skipped_in_row: u32,
    /// Updates in an epoch.
    pub steps_per_epoch: u64,
    /// Exponentially smoothed loss.
    pub smoothed_loss: f64,
    /// [`config_hash`] of what must not change between save and resume.
    pub config_hash: String,
    /// Processes that trained together.
    pub world_size: u32,
}

/// `state.toml`.
#[derive(Serialize, Deserialize)]
struct StateFile {
    format_version: u32,
    pixmim_version: String,
    #[serde(flatten)]
    state: State,
}

/// Short name of a text, such as the `[model]` and `[method]` sections of a config: its crc32c in hexadecimal.
#[must_use]
pub fn config_hash(text: &str) -> String {
    format!("{:08x}", crc32c::crc32c(text.as_bytes()))
}

/// Writes a checkpoint into the folder `run`, which exists, and returns the checkpoint's folder. When this returns
/// `Ok`, the checkpoint survives a power cut, and of the earlier steps the newest `keep_last - 1` are left.
/// Checkpoints of later steps, as a rewound run has, are not touched. One process may save into a run at a time.
///
/// # Errors
/// [`Error::Io`] with the path that could not be written: the newest checkpoint is then the one before, or this one.
/// [`Error::Diverged`] if a value is not finite, so that no sound checkpoint is deleted in favour of that one.
/// [`Error::Invalid`] for contents that contradict themselves and for a `keep_last` of 0.
pub fn save(run: &Path, contents: &Contents<'_>, keep_last: usize) -> Result<PathBuf> {
    write::save(&mut fs::Disk, run, contents, keep_last)
}

/// Writes a file like `model.safetensors` of a checkpoint, in place of what is there: a reader sees the old file or the new
/// one. `step` is where training stands.
///
/// # Errors
/// As [`save`].
pub fn save_weights(
    path: &Path,
    tensors: &[NamedTensor<'_>],
    metadata: &BTreeMap<String, String>,
    step: u64,
) -> Result<()> {
    write::save_weights(&mut fs::Disk, path, tensors, metadata, step)
}

/// Number of elements, unless it is more than memory could hold.
fn elems(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1, |product: usize, &extent| product.checked_mul(extent))
}

/// Name of a checkpoint's folder. Ordered by step, then by attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    step: u64,
    /// 1, or more where the step had been saved before.
    attempt: u32,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.attempt {
            1 => write!(f, "step-{:08}", self.step),
            _ => write!(f, "step-{:08}.{}", self.step, self.attempt),
        }
    }
}

impl Name {
    /// The name behind `text`, if that is exactly how it is written.
    fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("step-")?;
        let (step, attempt) = digits.split_once('.').unwrap_or((digits, "1"));
        let name = Self { step: step.parse().ok()?, attempt: attempt.parse().ok()? };
        (name.to_string() == text).then_some(name)
    }
}

/// A line of `MANIFEST`.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    file: String,
    bytes: u64,
    crc: u32,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}  {}  {:08x}", self.file, self.bytes, self.crc)
    }
}

impl Line {
    /// The lines of a `MANIFEST`. Nothing but what [`Line`] writes is taken, so that no changed byte goes unnoticed.
    fn parse_all(text: &str, path: &Path) -> Result<Vec<Self>> {
        text.split_inclusive('\n')
            .enumerate()
            .map(|(index, line)| {
                Self::parse(line).ok_or_else(|| {
                    let why = format!("line {} is not `file  bytes  crc32c`", index + 1);
                    Error::corrupt(path, why + "; use an older checkpoint")
                })
            })
            .collect()
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.trim_end().split("  ");
        let file =
            words.next().filter(|file| !file.starts_with('.') && !file.contains(['/', '\\']))?;
        let line = Self {
            file: file.to_owned(),
            bytes: words.next()?.parse().ok()?,
            crc: u32::from_str_radix(words.next()?, 16).ok()?,
        };
        (line.to_string() == text).then_some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::{Line, Name};

    #[test]
    fn names_are_read_as_they_are_written_and_sorted_by_step() {
        for (text, step, attempt) in [
            ("step-00000000", 0, 1),
            ("step-00012000", 12_000, 1),
            ("step-00012000.2", 12_000, 2),
            ("step-00012000.10", 12_000, 10),
            ("step-123456789", 123_456_789, 1),
        ] {
            let name = Name { step, attempt };
            assert_eq!(name.to_string(), text);
            assert_eq!(Name::parse(text), Some(name));
        }
        assert!(Name::parse("step-00012000.10") > Name::parse("step-00012000.2"));
        assert!(Name::parse("step-123456789") > Name::parse("step-00012000.2"));
    }

    #[test]
    fn other_names_are_no_checkpoints() {
        for text in [
            "",
            "step-",
            "step-12",
            "step-00012000.1",
            "step-00012000.02",
            "step-00012000 ",
            "step-0000000a",
            "step-+0012000",
            ".tmp-step-00012000-7",
            "../step-00012000",
            "LATEST",
        ] {
            assert_eq!(Name::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_manifest_line_has_one_spelling() {
        let text = "model.safetensors  1284  0badcafe\n";
        let line = Line { file: "model.safetensors".into(), bytes: 1284, crc: 0x0bad_cafe };
        assert_eq!(line.to_string(), text);
        assert_eq!(Line::parse(text), Some(line));
        for other in [
            "model.safetensors  1284  0BADCAFE\n",
            "model.safetensors  1284  badcafe\n",
            "model.safetensors  01284  0badcafe\n",
            "model.safetensors  +1284  0badcafe\n",
            "model.safetensors 1284 0badcafe\n",
            "model.safetensors  1284  0badcafe",
            "model.safetensors  1284  0badcafe\r\n",
            "model.safetensors  1284  0badcafe  \n",
            "../model.safetensors  1284  0badcafe\n",
            "/etc/passwd  1284  0badcafe\n",
        ] {
            assert_eq!(Line::parse(other), None, "{other:?}");
        }
    }
}
