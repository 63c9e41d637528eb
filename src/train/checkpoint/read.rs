//! Loading.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;

use super::fs::{Disk, Fs};
use super::{
    EXP_AVG, EXP_AVG_SQ, FOLDER, FORMAT_VERSION, LATEST, Line, MANIFEST, MAX_HEADER_BYTES,
    MAX_TENSORS, MODEL, Name, OPTIM, PLANS, STATE, State, StateFile, elems,
};
use crate::{Error, Result};

/// Longest text file of a checkpoint, in bytes.
const MAX_TEXT_BYTES: u64 = 64 << 10;
/// Largest `matmul-plans.bin`, in bytes: a hundred times what a run makes.
const MAX_PLANS_BYTES: u64 = 16 << 20;

/// Where a tensor of a checkpoint is to be copied.
#[derive(Debug)]
pub struct NamedTensorMut<'a> {
    /// Key, as MAE names it: `blocks.0.attn.qkv.weight`.
    pub name: &'a str,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// As many elements as `shape` says.
    pub data: &'a mut [f32],
}

/// A group of tensors of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Weights and frozen tensors.
    Model,
    /// First moments, under the names of their weights.
    ExpAvg,
    /// Second moments, under the names of their weights.
    ExpAvgSq,
}

/// A checkpoint whose every byte agrees with its manifest. The files stay open: deleting the folder does not disturb
/// the reading.
#[derive(Debug)]
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// Where the run stood.
    pub state: State,
    /// For [`Gpu::load_matmul_plans`](crate::Gpu::load_matmul_plans); empty if there are none.
    pub matmul_plans: Vec<u8>,
    model: TensorFile,
    optim: TensorFile,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `dir` and verifies every file of it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] or [`Error::Io`] with the file that is not as it was written; [`Error::Config`] if a newer
    /// version of this crate wrote it.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let lines = Line::parse_all(&read_text(&path)?, &path)?;
        for needed in [MODEL, OPTIM, STATE] {
            if !lines.iter().any(|line| line.file == needed) {
                let why = format!("it has no line for {needed}; use an older checkpoint");
                return Err(Error::corrupt(path, why));
            }
        }
        lines.iter().try_for_each(|line| verify(dir, line))?;
        let has_plans = lines.iter().any(|line| line.file == PLANS);
        let plans = has_plans.then(|| read_bytes(&dir.join(PLANS), MAX_PLANS_BYTES));
        Ok(Self {
            path: dir.to_owned(),
            state: read_state(&dir.join(STATE))?,
            matmul_plans: plans.transpose()?.unwrap_or_default(),
            model: TensorFile::open(&dir.join(MODEL))?,
            optim: TensorFile::open(&dir.join(OPTIM))?,
        })
    }

    /// What was said of the weights when they were saved: see [`Contents::metadata`](super::Contents::metadata).
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.model.metadata()
    }

    /// The file of its weights.
    #[must_use]
    pub fn model(&self) -> &TensorFile {
        &self.model
    }

    /// Refuses a checkpoint of another architecture or method: `hash` is [`config_hash`](super::config_hash) of the
    /// config that is to go on.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check_config(&self, hash: &str) -> Result<()> {
        let saved = &self.state.config_hash;
        if saved == hash {
            return Ok(());
        }
        let why = format!(
            "was saved under another [model] or [method] (hash {saved}, this config has {hash}); \
             resume with the config.toml of its run, or start a new run"
        );
        Err(Error::config(self.path.display().to_string(), why))
    }

    /// Copies all tensors of a part. Names and shapes are compared first, all of them: nothing is copied unless the
    /// part holds exactly the tensors of `out`, in whatever order.
    ///
    /// # Errors
    /// [`Error::Config`] for a checkpoint of another architecture, [`Error::Io`], and [`Error::Invalid`] if the
    /// length of an output contradicts its shape.
    pub fn read(&mut self, part: Part, out: &mut [NamedTensorMut<'_>]) -> Result<()> {
        match part {
            Part::Model => self.model.read_all("", out),
            Part::ExpAvg => self.optim.read_all(EXP_AVG, out),
            Part::ExpAvgSq => self.optim.read_all(EXP_AVG_SQ, out),
        }
    }
}

/// A checkpoint that cannot be used.
#[derive(Debug)]
pub struct Rejected {
    /// Its folder, or the file `LATEST`.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: Error,
}

/// The checkpoint of the folder `run` to go on from: the one that `LATEST` names, or else the newest that is sound;
/// none if there is none. Every one that was tried before it and rejected is told, for the user to know: where all are
/// rejected, starting from step 0 would hide a fault. Changes nothing on disk.
///
/// # Errors
/// [`Error::Io`] if the folder of checkpoints exists and cannot be listed.
pub fn newest(run: &Path) -> Result<(Option<Checkpoint>, Vec<Rejected>)> {
    let folder = run.join(FOLDER);
    let mut rejected = Vec::new();
    let entries = match Disk.list(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok((None, rejected)),
        Err(e) => return Err(Error::io("list", folder)(e)),
    };
    let latest = if entries.iter().any(|entry| entry == LATEST) {
        let path = folder.join(LATEST);
        read_latest(&path).map_err(|why| rejected.push(Rejected { path, why })).ok()
    } else {
        None
    };
    let mut names: Vec<Name> = entries.iter().filter_map(|entry| Name::parse(entry)).collect();
    names.retain(|&name| Some(name) != latest);
    names.sort_unstable_by(|a, b| b.cmp(a));
    for name in latest.into_iter().chain(names) {
        let path = folder.join(name.to_string());
        match Checkpoint::open(&path) {
            Ok(checkpoint) => return Ok((Some(checkpoint), rejected)),
            Err(why) => rejected.push(Rejected { path, why }),
        }
    }
    Ok((None, rejected))
}

fn read_latest(path: &Path) -> Result<Name> {
    let text = read_text(path)?;
    text.strip_suffix('\n').and_then(Name::parse).ok_or_else(|| {
        Error::corrupt(path, format!("it names no checkpoint: {:?}", text.trim_end()))
    })
}

/// The checkpoint's `format_version`, readable whatever else the file holds.
#[derive(Deserialize)]
struct Version {
    format_version: u64,
}

fn read_state(path: &Path) -> Result<State> {
    let text = read_text(path)?;
    let damaged = |e: toml::de::Error| Error::corrupt(path, e.message());
    let version = toml::from_str::<Version>(&text).map_err(damaged)?.format_version;
    if version > u64::from(FORMAT_VERSION) {
        let why = format!(
            "has format_version {version}, pixmim {} reads up to {FORMAT_VERSION}; update pixmim \
             or use an older checkpoint",
            crate::VERSION
        );
        return Err(Error::config(path.display().to_string(), why));
    }
    Ok(toml::from_str::<StateFile>(&text).map_err(damaged)?.state)
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = read_bytes(path, MAX_TEXT_BYTES)?;
    String::from_utf8(bytes).map_err(|_| Error::corrupt(path, "it is not UTF-8 text"))
}

fn read_bytes(path: &Path, most: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > most {
        return Err(Error::corrupt(path, format!("it has more than {most} bytes")));
    }
    Ok(bytes)
}

fn verify(dir: &Path, line: &Line) -> Result<()> {
    let path = dir.join(&line.file);
    let mut file = File::open(&path).map_err(Error::io("open", &path))?;
    let (mut bytes, mut crc) = (0, 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                bytes += n as u64;
                crc = crc32c::crc32c_append(crc, &buffer[..n]);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("read", path)(e)),
        }
    }
    let why = if bytes != line.bytes {
        format!("it has {bytes} bytes, {MANIFEST} says {}; use an older checkpoint", line.bytes)
    } else if crc != line.crc {
        let expected = line.crc;
        format!("its crc32c is {crc:08x}, {MANIFEST} says {expected:08x}; use an older checkpoint")
    } else {
        return Ok(());
    };
    Err(Error::corrupt(path, why))
}

/// An open safetensors file, of a checkpoint or of another program. Its header may come from a stranger: it is limited
/// in size and count, and its offsets must cover the file exactly.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    header: Metadata,
    metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Corrupt`] if it is no safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        let size = file.metadata().map_err(Error::io("read", path))?.len();
        let damaged = |why: String| Error::corrupt(path, why);
        if size < 8 {
            return Err(damaged(format!("it has {size} bytes, less than any safetensors file")));
        }
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(Error::io("read", path))?;
        let length = u64::from_le_bytes(length);
        let most = MAX_HEADER_BYTES.min(size - 8);
        if length > most {
            return Err(damaged(format!("its header has {length} bytes, at most {most} can be")));
        }
        let mut json = vec![0; length as usize];
        file.read_exact(&mut json).map_err(Error::io("read", path))?;
        let header: Metadata = serde_json::from_slice(&json)
            .map_err(|e| damaged(format!("its header is not that of a safetensors file ({e})")))?;
        let count = header.offset_keys().len();
        if count > MAX_TENSORS {
            return Err(damaged(format!("it has {count} tensors, at most {MAX_TENSORS} can be")));
        }
        let data_start = 8 + length;
        if size - data_start != header.data_len() as u64 {
            let (found, expected) = (size - data_start, header.data_len());
            return Err(damaged(format!("it has {found} bytes of tensors, expected {expected}")));
        }
        let metadata = header.metadata().iter().flatten();
        let metadata = metadata.map(|(key, value)| (key.clone(), value.clone())).collect();
        Ok(Self { path: path.to_owned(), file, data_start, header, metadata })
    }

    /// The `__metadata__` of the header.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Shape of a tensor, if the file has one of that name.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.header.info(name).map(|info| info.shape.as_slice())
    }

    /// Copies all tensors, as [`Checkpoint::read`] does.
    ///
    /// # Errors
    /// Those of [`Checkpoint::read`].
    pub fn read(&mut self, out: &mut [NamedTensorMut<'_>]) -> Result<()> {
        self.read_all("", out)
    }

    /// Copies the tensors whose names start with `prefix`.
    fn read_all(&mut self, prefix: &str, out: &mut [NamedTensorMut<'_>]) -> Result<()> {
        let starts = self.check(prefix, out)?;
        for (tensor, start) in out.iter_mut().zip(starts) {
            let bytes = bytemuck::cast_slice_mut(tensor.data);
            let sought = self.file.seek(SeekFrom::Start(start));
            let read = sought.and_then(|_| self.file.read_exact(bytes));
            read.map_err(Error::io("read", &self.path))?;
        }
        Ok(())
    }

    /// Where each tensor of `out` begins in the file, if they are all there and no others.
    fn check(&self, prefix: &str, out: &[NamedTensorMut<'_>]) -> Result<Vec<u64>> {
        let mut starts = Vec::with_capacity(out.len());
        let mut wanted = BTreeSet::new();
        let (mut missing, mut differing) = (0, 0);
        let mut first = None;
        for NamedTensorMut { name, shape, data } in out {
            if elems(shape) != Some(data.len()) {
                let why = format!("has shape {shape:?}, but {} elements", data.len());
                return Err(Error::invalid(*name, why));
            }
            let key = format!("{prefix}{name}");
            match self.header.info(&key) {
                Some(info) if info.dtype == Dtype::F32 && info.shape == *shape => {
                    starts.push(self.data_start + info.data_offsets.0 as u64);
                }
                Some(TensorInfo { dtype, shape: found, .. }) => {
                    differing += 1;
                    first.get_or_insert_with(|| {
                        format!("`{key}` is {dtype} {found:?}, this model needs F32 {shape:?}")
                    });
                }
                None => {
                    missing += 1;
                    first.get_or_insert_with(|| {
                        format!("`{key}` is missing, this model needs it as F32 {shape:?}")
                    });
                }
            }
            wanted.insert(key);
        }
        let mut unexpected = self.header.offset_keys();
        unexpected.retain(|key| key.starts_with(prefix) && !wanted.contains(key));
        if let (None, Some(key)) = (&first, unexpected.first()) {
            let shape = self.shape(key).unwrap_or_default();
            first = Some(format!("`{key}` {shape:?} is not part of this model"));
        }
        let Some(first) = first else { return Ok(starts) };
        let why = format!(
            "{first} ({missing} missing, {} unexpected, {differing} different); it belongs to \
             another architecture: give the [model] it was trained with, or start a new run",
            unexpected.len()
        );
        Err(Error::config(self.path.display().to_string(), why))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{NamedTensorMut, TensorFile};
    use crate::Error;

    /// A safetensors file with this header and as many bytes of tensors.
    fn tensor_file(header: &str, data: usize) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
    }

    #[test]
    fn a_hostile_tensor_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights.safetensors");
        let refused = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let error = TensorFile::open(&path).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{error}");
            error.to_string()
        };
        let one = |begin: usize, end: usize| {
            format!(r#"{{"a":{{"dtype":"F32","shape":[2,3],"data_offsets":[{begin},{end}]}}}}"#)
        };
        fs::write(&path, tensor_file(&one(0, 24), 24)).unwrap();
        assert_eq!(TensorFile::open(&path).unwrap().shape("a"), Some([2, 3].as_slice()));

        refused(b"");
        refused(&u64::MAX.to_le_bytes());
        refused(&tensor_file("{", 0));
        refused(&tensor_file("{}", 1));
        refused(&tensor_file(&one(0, 24), 23));
        refused(&tensor_file(&one(0, 24), 25));
        refused(&tensor_file(&one(4, 28), 28));
        refused(&tensor_file(&one(0, 20), 20));
        refused(&tensor_file(&one(24, 0), 24));
        let overflow =
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#;
        refused(&tensor_file(overflow, 0));
        let zip = refused(b"PK\x03\x04 a pickle of PyTorch");
        assert!(zip.contains("its header has"), "{zip}");

        let spaces = format!("{{}}{}", " ".repeat((4 << 20) - 1));
        assert!(refused(&tensor_file(&spaces, 0)).contains("at most 4194304"));
        let many = |count: usize| {
            let entry = |i| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
            format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","))
        };
        assert!(refused(&tensor_file(&many(10_001), 0)).contains("at most 10000"));
        fs::write(&path, tensor_file(&many(10_000), 0)).unwrap();
        TensorFile::open(&path).unwrap();
    }

    #[test]
    fn weights_of_another_dtype_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights.safetensors");
        let header = r#"{"norm.bias":{"dtype":"BF16","shape":[3],"data_offsets":[0,6]}}"#;
        fs::write(&path, tensor_file(header, 6)).unwrap();
        let mut data = [0.0; 3];
        let mut out = [NamedTensorMut { name: "norm.bias", shape: vec![3], data: &mut data }];
        let error = TensorFile::open(&path).unwrap().read(&mut out).unwrap_err().to_string();
        assert!(error.contains("`norm.bias` is BF16 [3], this model needs F32 [3]"), "{error}");
    }
}
