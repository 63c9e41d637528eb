//! The crate's one error type.

use std::path::PathBuf;

use crate::DType;
use crate::device::Place;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, grouped by who can fix it. Each message names the thing and, where there is
/// one, the cure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has the wrong shape. The caller of the op fixes this.
    #[error("{op}: `{arg}` has shape {found:?}, expected {expected}")]
    Shape {
        /// Operation that refused the tensor.
        op: &'static str,
        /// Argument name, as written in the op's argument struct.
        arg: &'static str,
        /// What the op accepts, in words.
        expected: String,
        /// What it was given.
        found: Vec<usize>,
    },
    /// A tensor has a dtype that the op does not take there. The caller of the op fixes this.
    #[error("{op}: `{arg}` has dtype {found:?}, expected {expected}")]
    DType {
        /// Operation that refused the tensor.
        op: &'static str,
        /// Argument name.
        arg: &'static str,
        /// What the op accepts, in words.
        expected: String,
        /// What it was given.
        found: DType,
    },
    /// A tensor is in another memory than the op's device. The caller of the op fixes this.
    #[error(
        "{op}: `{arg}` is in {found:?} memory, the op runs on {expected:?}; copy it there first"
    )]
    Place {
        /// Operation that refused the tensor.
        op: &'static str,
        /// Argument name.
        arg: &'static str,
        /// Where the op runs.
        expected: Place,
        /// Where the tensor is.
        found: Place,
    },
    /// The GPU, its driver or one of its libraries refused a call, or work enqueued before failed.
    #[error("the GPU could not {action}: {why}")]
    Gpu {
        /// What was tried, as a verb.
        action: &'static str,
        /// The driver's own words, and what to do.
        why: String,
    },
    /// A kernel did something wrong, as the host executor saw it: a race, an access out of bounds, a read of what
    /// nothing wrote. A defect of this library.
    #[error("kernel {kernel}: {why}")]
    Kernel {
        /// Entry name.
        kernel: &'static str,
        /// Block, thread, source line and what happened.
        why: String,
    },
    /// A workspace is too small. The caller of the op fixes this.
    #[error("{op}: `workspace` has {found} bytes, needs {needed} (see workspace_bytes)")]
    Workspace {
        /// Operation that refused the workspace.
        op: &'static str,
        /// Bytes needed.
        needed: usize,
        /// Bytes given.
        found: usize,
    },
    /// A value outside what is possible: sizes, radii, ratios, ids. The caller or the config fixes this.
    #[error("`{name}` {why}")]
    Invalid {
        /// Name of the argument or config key.
        name: String,
        /// What is wrong with it and what would be right.
        why: String,
    },
    /// A config file, command line or existing run folder that cannot be used as it is. The user fixes this.
    #[error("{0}")]
    Config(ConfigError),
    /// The device asked for cannot be used here.
    #[error("--device {asked}: {why}")]
    NoDevice {
        /// The device asked for.
        asked: String,
        /// Why it cannot be used, and what to do.
        why: String,
    },
    /// Memory that could not be had.
    #[error("out of memory: {what} needs {bytes} bytes; lower optim.micro_batch")]
    OutOfMemory {
        /// What was being allocated.
        what: &'static str,
        /// How many bytes it needs.
        bytes: usize,
    },
    /// Training stopped because gradients stayed non-finite.
    #[error("training diverged at step {step}: {why}")]
    Diverged {
        /// Global step of the last attempt.
        step: u64,
        /// What was seen, and what to try.
        why: String,
    },
    /// Training data that cannot be used.
    #[error("data {}: {why}", path.display())]
    Data {
        /// Folder or file.
        path: PathBuf,
        /// What is wrong with it and what would be right.
        why: String,
    },
    /// The operating system refused to read or write.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: "write", "create".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's own words.
        source: std::io::Error,
    },
    /// A file that is damaged: truncated, or not what its checksum says.
    #[error("{} is damaged: {why}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What does not agree, and what to do.
        why: String,
    },
}

/// A configuration that cannot be used: where it stands, what is wrong, what would be right.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {why}")]
pub struct ConfigError {
    /// File with line and column, command-line option, or key.
    pub place: String,
    /// What is wrong and what would be right.
    pub why: String,
}

impl Error {
    /// A value that cannot be used: `name` as the caller wrote it, `why` with the cure.
    pub fn invalid(name: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid { name: name.into(), why: why.into() }
    }

    /// A config that cannot be used.
    pub fn config(place: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Config(ConfigError { place: place.into(), why: why.into() })
    }

    /// Training data that cannot be used.
    pub fn data(path: impl Into<PathBuf>, why: impl Into<String>) -> Self {
        Self::Data { path: path.into(), why: why.into() }
    }

    /// A damaged file.
    pub fn corrupt(path: impl Into<PathBuf>, why: impl Into<String>) -> Self {
        Self::Corrupt { path: path.into(), why: why.into() }
    }

    /// For `map_err` on a call into the file system.
    pub fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// The exit code of a program that ends with this error: 1 user or config, 2 no device, 3 diverged, 4 data,
    /// 5 input or output, 70 a defect of this library.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Invalid { .. } | Self::Config(_) | Self::OutOfMemory { .. } => 1,
            Self::NoDevice { .. } => 2,
            Self::Diverged { .. } => 3,
            Self::Data { .. } => 4,
            Self::Io { .. } | Self::Corrupt { .. } => 5,
            Self::Shape { .. }
            | Self::DType { .. }
            | Self::Place { .. }
            | Self::Workspace { .. }
            | Self::Gpu { .. }
            | Self::Kernel { .. } => 70,
        }
    }
}
