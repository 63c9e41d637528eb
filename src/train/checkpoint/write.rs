//! Saving.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorInfo};
use serde::Serialize;

use super::fs::Fs;
use super::{
    Contents, EXP_AVG, EXP_AVG_SQ, FOLDER, FORMAT_VERSION, LATEST, Line, MANIFEST,
    MAX_HEADER_BYTES, MAX_TENSORS, MODEL, Name, NamedTensor, OPTIM, PLANS, STATE, StateFile, elems,
};
use crate::{Error, Result};

/// Prefix of what is not yet, or no longer, part of a run. Such names end with the id of the process that made them.
const ASIDE: &str = ".tmp-";

/// See [`super::save`].
pub(super) fn save(
    fs: &mut dyn Fs,
    run: &Path,
    contents: &Contents<'_>,
    keep_last: usize,
) -> Result<PathBuf> {
    contents.check()?;
    if keep_last == 0 {
        return Err(Error::invalid("keep_last", "is 0, must be at least 1"));
    }
    let state = StateFile {
        format_version: FORMAT_VERSION,
        pixmim_version: crate::VERSION.to_owned(),
        state: contents.state.clone(),
    };
    let state = toml::to_string(&state).map_err(|e| Error::invalid("state", e.to_string()))?;

    let folder = run.join(FOLDER);
    match fs.create_dir(&folder) {
        Ok(()) => fs.sync_dir(run).map_err(Error::io("sync", run))?,
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
        Err(e) => return Err(Error::io("create", folder)(e)),
    }

    let entries = fs.list(&folder).map_err(Error::io("list", &folder))?;
    for leftover in entries.iter().filter(|entry| is_leftover(entry)) {
        remove(fs, &folder.join(leftover))?;
    }
    let names: Vec<Name> = entries.iter().filter_map(|entry| Name::parse(entry)).collect();
    let step = contents.state.step;
    let attempts = names.iter().filter(|name| name.step == step).map(|name| name.attempt);
    let name = Name { step, attempt: attempts.max().unwrap_or(0) + 1 };

    let aside = folder.join(aside(name));
    let path = folder.join(name.to_string());
    let written =
        write_folder(fs, &aside, contents, &state).and_then(|()| rename(fs, &aside, &path));
    if written.is_err() {
        // The first error is the one to report; what stays behind is removed by the next save.
        let _ = fs.remove(&aside);
    }
    written?;
    sync_dir(fs, &folder)?;
    replace_latest(fs, &folder, name)?;
    prune(fs, &folder, names, name, keep_last)?;
    Ok(path)
}

/// See [`super::save_weights`].
pub(super) fn save_weights(
    fs: &mut dyn Fs,
    path: &Path,
    tensors: &[NamedTensor<'_>],
    metadata: &BTreeMap<String, String>,
    step: u64,
) -> Result<()> {
    tensors.iter().try_for_each(|tensor| check_tensor(tensor, step))?;
    let Some(file) = path.file_name().and_then(|name| name.to_str()) else {
        let why = format!("is {}, which names no file", path.display());
        return Err(Error::invalid("path", why));
    };
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let tensors = tensors.iter().map(|tensor| (tensor.name.to_owned(), tensor)).collect();
    let aside = aside(file);
    let written = write_tensors(fs, dir, &aside, &labelled(metadata), &tensors)
        .and_then(|_| rename(fs, &dir.join(&aside), path));
    if written.is_err() {
        // The first error is the one to report; what is left aside is only litter.
        let _ = fs.remove(&dir.join(&aside));
    }
    written?;
    sync_dir(fs, dir)
}

/// Metadata of a file, with what tells how to read it.
fn labelled(metadata: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let own = [
        ("format", "pt".to_owned()),
        ("format_version", FORMAT_VERSION.to_string()),
        ("pixmim_version", crate::VERSION.to_owned()),
    ];
    let own = own.map(|(key, value)| (key.to_owned(), value));
    metadata.clone().into_iter().chain(own).collect()
}

impl Contents<'_> {
    fn check(&self) -> Result<()> {
        // The header of a safetensors file is one JSON object: this key of it is not a tensor's.
        let mut model = BTreeSet::from(["__metadata__"]);
        for tensor in self.weights.iter().chain(&self.frozen) {
            if !model.insert(tensor.name) {
                return Err(Error::invalid(
                    tensor.name,
                    "is a name already taken in the checkpoint",
                ));
            }
        }
        let most = (self.weights.len() + self.frozen.len()).max(2 * self.weights.len());
        if most > MAX_TENSORS {
            let why = format!("make {most} tensors in a file, at most {MAX_TENSORS} are allowed");
            return Err(Error::invalid("weights", why));
        }
        let all = [&self.weights, &self.frozen, &self.exp_avg, &self.exp_avg_sq];
        all.into_iter().flatten().try_for_each(|tensor| check_tensor(tensor, self.state.step))?;
        for (prefix, moments) in [(EXP_AVG, &self.exp_avg), (EXP_AVG_SQ, &self.exp_avg_sq)] {
            if !moments.iter().map(key).eq(self.weights.iter().map(key)) {
                let why = "must have the names, shapes and order of the weights";
                return Err(Error::invalid(prefix.trim_end_matches('.'), why));
            }
        }
        Ok(())
    }
}

fn check_tensor(tensor: &NamedTensor<'_>, step: u64) -> Result<()> {
    let NamedTensor { name, shape, data } = tensor;
    if elems(shape) != Some(data.len()) {
        let why = format!("has shape {shape:?}, but {} elements", data.len());
        return Err(Error::invalid(*name, why));
    }
    if !data.iter().all(|x| x.is_finite()) {
        let why = format!("`{name}` is not finite, no checkpoint was written; resume the last");
        return Err(Error::Diverged { step, why });
    }
    Ok(())
}

fn key<'a>(tensor: &'a NamedTensor<'_>) -> (&'a str, &'a [usize]) {
    (tensor.name, &tensor.shape)
}

fn aside(name: impl std::fmt::Display) -> String {
    format!("{ASIDE}{name}-{}", std::process::id())
}

/// Whether a name in the folder was left by a process that is no more, or by a failed save of this one.
fn is_leftover(entry: &str) -> bool {
    let owner = entry.strip_prefix(ASIDE).and_then(|rest| rest.rsplit_once('-'));
    match owner.and_then(|(_, pid)| pid.parse::<u32>().ok()) {
        Some(pid) => pid == std::process::id() || !Path::new(&format!("/proc/{pid}")).exists(),
        None => false,
    }
}

fn write_folder(fs: &mut dyn Fs, dir: &Path, contents: &Contents<'_>, state: &str) -> Result<()> {
    fs.create_dir(dir).map_err(Error::io("create", dir))?;

    let model = contents.weights.iter().chain(&contents.frozen);
    let model = model.map(|tensor| (tensor.name.to_owned(), tensor)).collect();
    let exp_avg = contents.exp_avg.iter().map(|tensor| (EXP_AVG, tensor));
    let exp_avg_sq = contents.exp_avg_sq.iter().map(|tensor| (EXP_AVG_SQ, tensor));
    let optim = exp_avg.chain(exp_avg_sq);
    let optim =
        optim.map(|(prefix, tensor)| (format!("{prefix}{}", tensor.name), tensor)).collect();

    let plans = Some(contents.matmul_plans.as_slice()).filter(|plans| !plans.is_empty());
    let plans = plans.map(|plans| write_bytes(fs, dir, PLANS, plans)).transpose()?;
    let lines = [
        write_tensors(fs, dir, MODEL, &labelled(&contents.metadata), &model)?,
        write_tensors(fs, dir, OPTIM, &labelled(&BTreeMap::new()), &optim)?,
        write_bytes(fs, dir, STATE, state.as_bytes())?,
    ];
    let manifest: String = plans.iter().chain(&lines).map(Line::to_string).collect();
    write_bytes(fs, dir, MANIFEST, manifest.as_bytes())?;
    sync_dir(fs, dir)
}

/// Header of a safetensors file.
#[derive(Serialize)]
struct Header<'a> {
    #[serde(rename = "__metadata__")]
    metadata: &'a BTreeMap<String, String>,
    #[serde(flatten)]
    tensors: BTreeMap<&'a str, TensorInfo>,
}

/// Writes from the memory of the tensors, sorted by name: the same contents give the same bytes.
fn write_tensors(
    fs: &mut dyn Fs,
    dir: &Path,
    file: &str,
    metadata: &BTreeMap<String, String>,
    tensors: &BTreeMap<String, &NamedTensor<'_>>,
) -> Result<Line> {
    let mut end = 0;
    let infos = tensors.iter().map(|(name, tensor)| {
        let start = end;
        end += size_of_val(tensor.data);
        let data_offsets = (start, end);
        (name.as_str(), TensorInfo { dtype: Dtype::F32, shape: tensor.shape.clone(), data_offsets })
    });
    let header = Header { metadata, tensors: infos.collect() };
    let mut header =
        serde_json::to_vec(&header).map_err(|e| Error::invalid("metadata", e.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let header_bytes = header.len() as u64;
    if header_bytes > MAX_HEADER_BYTES {
        let why = format!("needs a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} fit");
        return Err(Error::invalid("metadata", why));
    }

    let mut writer = Writer::create(fs, dir, file)?;
    writer.write(&header_bytes.to_le_bytes())?;
    writer.write(&header)?;
    for tensor in tensors.values() {
        writer.write(bytemuck::cast_slice(tensor.data))?;
    }
    writer.finish()
}

fn write_bytes(fs: &mut dyn Fs, dir: &Path, file: &str, bytes: &[u8]) -> Result<Line> {
    let mut writer = Writer::create(fs, dir, file)?;
    writer.write(bytes)?;
    writer.finish()
}

/// A file being written, and the line it will have in the manifest.
struct Writer<'a> {
    fs: &'a mut dyn Fs,
    path: PathBuf,
    file: File,
    line: Line,
}

impl<'a> Writer<'a> {
    fn create(fs: &'a mut dyn Fs, dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(name);
        let file = fs.create(&path).map_err(Error::io("create", &path))?;
        Ok(Self { fs, path, file, line: Line { file: name.to_owned(), bytes: 0, crc: 0 } })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        // In pieces that are still in cache when they are copied out after the checksum has read them.
        for piece in bytes.chunks(1 << 20) {
            self.line.crc = crc32c::crc32c_append(self.line.crc, piece);
            self.line.bytes += piece.len() as u64;
            self.fs.write(&mut self.file, piece).map_err(Error::io("write", &self.path))?;
        }
        Ok(())
    }

    fn finish(self) -> Result<Line> {
        self.fs.sync(&self.file).map_err(Error::io("sync", self.path))?;
        Ok(self.line)
    }
}

fn replace_latest(fs: &mut dyn Fs, folder: &Path, name: Name) -> Result<()> {
    let aside = aside(LATEST);
    let path = folder.join(&aside);
    let replaced = write_bytes(fs, folder, &aside, format!("{name}\n").as_bytes())
        .and_then(|_| rename(fs, &path, &folder.join(LATEST)));
    if replaced.is_err() {
        let _ = fs.remove(&path);
    }
    replaced?;
    sync_dir(fs, folder)
}

/// Deletes the checkpoints before `new` but for `keep_last - 1` steps.
fn prune(
    fs: &mut dyn Fs,
    folder: &Path,
    mut names: Vec<Name>,
    new: Name,
    keep_last: usize,
) -> Result<()> {
    names.retain(|&name| name < new);
    names.sort_unstable_by(|a, b| b.cmp(a));
    let (mut kept, mut last_step) = (1, new.step);
    names.retain(|name| {
        let keep = name.step < last_step && kept < keep_last;
        if keep {
            kept += 1;
            last_step = name.step;
        }
        !keep
    });
    if names.is_empty() {
        return Ok(());
    }
    // Deleting a folder takes many steps. Out of sight first, so that no half of a checkpoint is ever seen.
    for &name in &names {
        rename(fs, &folder.join(name.to_string()), &folder.join(aside(name)))?;
    }
    sync_dir(fs, folder)?;
    names.into_iter().try_for_each(|name| remove(fs, &folder.join(aside(name))))
}

fn rename(fs: &mut dyn Fs, from: &Path, to: &Path) -> Result<()> {
    fs.rename(from, to).map_err(Error::io("rename to", to))
}

fn sync_dir(fs: &mut dyn Fs, dir: &Path) -> Result<()> {
    fs.sync_dir(dir).map_err(Error::io("sync", dir))
}

fn remove(fs: &mut dyn Fs, path: &Path) -> Result<()> {
    fs.remove(path).map_err(Error::io("remove", path))
}
