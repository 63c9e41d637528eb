//! The journals of a run: `metrics.jsonl` (one line per logged step), `bad_images.jsonl` and `notices.jsonl`.
//!
//! A journal is a text file of JSON objects, one a line. Line 1 names the schema and the run; every other line is a
//! record with a `step`. Records are appended, each in one write. A run that resumes from a checkpoint first cuts
//! off what the abandoned run logged after that checkpoint, so that curves never fold back on themselves.
//!
//! A number that is not finite is written as `null` (JSON has no NaN) and read back as NaN. A `null` loss or gradient
//! norm is a step that was skipped.

use std::io::ErrorKind;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

use crate::train::StepRecord;
use crate::train::files::Appender;
use crate::{Error, Result};

/// What one line of a journal holds.
pub trait Record: Serialize + DeserializeOwned {
    /// Name of the journal's file in the run folder.
    const FILE: &'static str;
    /// Name and version of the record's fields, as line 1 states it.
    const SCHEMA: &'static str;
    /// Updates done when the record was made.
    fn step(&self) -> u64;
}

impl Record for StepRecord {
    const FILE: &'static str = "metrics.jsonl";
    const SCHEMA: &'static str = "pixmim-metrics-1";
    fn step(&self) -> u64 {
        self.step
    }
}

/// An image that could not be used, and was replaced by another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadImage {
    /// Updates done when it was met.
    pub step: u64,
    /// The image, as its source names it: a path, or file and index.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Record for BadImage {
    const FILE: &'static str = "bad_images.jsonl";
    const SCHEMA: &'static str = "pixmim-bad-images-1";
    fn step(&self) -> u64 {
        self.step
    }
}

/// Something worth knowing that happened once: what the report lists under "Events".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// Updates done when it happened.
    pub step: u64,
    /// What sort of thing it is.
    pub kind: NoticeKind,
    /// One sentence about it.
    pub text: String,
}

/// Sorts of [`Notice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoticeKind {
    /// The run went on from a checkpoint of this step.
    Resumed,
    /// The step's loss or gradient was not finite; the weights were left as they were.
    Skipped,
    /// A signal ended the run here.
    Interrupted,
    /// Anything else the user should know.
    Warning,
}

impl Record for Notice {
    const FILE: &'static str = "notices.jsonl";
    const SCHEMA: &'static str = "pixmim-notices-1";
    fn step(&self) -> u64 {
        self.step
    }
}

/// Line 1 of a journal.
#[derive(Serialize, Deserialize)]
struct Header {
    schema: String,
    run: String,
}

/// `metrics.jsonl`.
pub type Metrics = Journal<StepRecord>;
/// `bad_images.jsonl`.
pub type BadImages = Journal<BadImage>;
/// `notices.jsonl`.
pub type Notices = Journal<Notice>;

/// A journal that is being written.
#[derive(Debug)]
pub struct Journal<R> {
    file: Appender,
    record: PhantomData<fn(&R)>,
}

impl<R: Record> Journal<R> {
    /// Opens the journal of the run folder `dir`. With `resumed_step` it goes on after the records up to that
    /// step: later ones, and a line that a crash tore, are cut off; a missing journal starts anew. Without, it starts
    /// anew and an old one is lost. `title` is the run's name, for line 1 of a new journal.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] when a line up to `resumed_step` is not a record of this schema: the file is
    /// then left as it is.
    pub fn open(dir: &Path, title: &str, resumed_step: Option<u64>) -> Result<Self> {
        let path = dir.join(R::FILE);
        let keep = match resumed_step {
            None => 0,
            Some(step) => match std::fs::read(&path) {
                Ok(bytes) => length_up_to::<R>(&bytes, &path, step)?,
                Err(error) if error.kind() == ErrorKind::NotFound => 0,
                Err(error) => return Err(Error::io("read", path)(error)),
            },
        };
        let file = Appender::open_at(path, keep)?;
        let mut journal = Self { file, record: PhantomData };
        if keep == 0 {
            journal.append(&Header { schema: R::SCHEMA.into(), run: title.into() })?;
        }
        Ok(journal)
    }

    /// Appends `record`. Another process sees it at once; a loss of power may take it until [`Self::sync`].
    ///
    /// # Errors
    /// [`Error::Io`]; the journal then ends after the record before.
    pub fn write(&mut self, record: &R) -> Result<()> {
        self.append(record)
    }

    /// Waits until all records are on the disk: for checkpoints, which must not be ahead of their journals.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync()
    }

    fn append(&mut self, object: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(object)
            .map_err(|error| Error::io("write", self.file.path())(error.into()))?;
        line.push(b'\n');
        self.file.append(&line)
    }
}

/// All records of the run folder `dir`, in the order they were written. A last line that a crash tore, or that is
/// being written, is left out; a journal that does not exist has no records.
///
/// # Errors
/// [`Error::Io`]; [`Error::Corrupt`] when a line is not a record of this schema.
pub fn read<R: Record>(dir: &Path) -> Result<Vec<R>> {
    let path = dir.join(R::FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let mut lines = whole_lines(&bytes);
    let Some(header) = lines.next() else { return Ok(Vec::new()) };
    check_header::<R>(header, &path)?;
    lines
        .zip(2..)
        .map(|(line, number)| serde_json::from_slice(line).map_err(|_| not_a_record(&path, number)))
        .collect()
}

/// Bytes up to the end of the last record with a step of at most `step`; 0 when there is no whole header.
fn length_up_to<R: Record>(bytes: &[u8], path: &Path, step: u64) -> Result<u64> {
    let mut lines = whole_lines(bytes);
    let Some(header) = lines.next() else { return Ok(0) };
    check_header::<R>(header, path)?;
    let mut end = header.len();
    let mut keep = end;
    let mut damaged = None;
    for (line, number) in lines.zip(2..) {
        end += line.len();
        match serde_json::from_slice::<R>(line) {
            Ok(record) if record.step() <= step => match damaged {
                None => keep = end,
                Some(number) => return Err(not_a_record(path, number)),
            },
            Ok(_) => {}
            // Fatal only if a record to keep follows: records up to a checkpoint were synced, what a crash
            // damaged after it is cut off anyway.
            Err(_) => damaged = damaged.or(Some(number)),
        }
    }
    Ok(keep as u64)
}

/// Lines with their line feed; what follows the last line feed is not a line.
fn whole_lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"))
}

fn check_header<R: Record>(line: &[u8], path: &Path) -> Result<()> {
    match serde_json::from_slice::<Header>(line) {
        Ok(header) if header.schema == R::SCHEMA => Ok(()),
        Ok(header) => Err(Error::corrupt(
            path,
            format!(
                "its schema is {:?}, this version writes {:?}; move it away to go on without it",
                header.schema,
                R::SCHEMA
            ),
        )),
        Err(_) => Err(Error::corrupt(
            path,
            "line 1 is not the header of a journal; move it away to go on without it",
        )),
    }
}

fn not_a_record(path: &Path, number: u64) -> Error {
    Error::corrupt(path, format!("line {number} is not a record; delete that line to go on"))
}

/// For `default`: a number that older versions did not write.
pub(super) const fn nan() -> f64 {
    f64::NAN
}

/// For `deserialize_with`: the `null` of a number that was not finite.
pub(super) fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Option::deserialize(deserializer).map(|number| number.unwrap_or(f64::NAN))
}
